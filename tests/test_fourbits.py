"""Weights of integer layers in four bits: small files, as fast, trained to be rounded, offered where it helps."""

import contextlib
import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from autocompress import auto, load, reuse
from autocompress.export import compose, export, predictor
from autocompress.models.convnet import ConvNet
from autocompress.models.foreign import Foreign
from autocompress.ops import TrainOp, fourbits
from autocompress.ops.fourbits import FourBits
from autocompress.ops.quantize import Quantize
from autocompress.ops.store import Store
from autocompress.parts import make_ops, parts
from autocompress.pipeline import Work, release, shape, training
from autocompress.run import run
from autocompress.searchers.additive import SIZE, additive, rows
from autocompress.searchers.design import evenly
from autocompress.tasks.digits import Digits
from autocompress.train import reestimate_batchnorm
from autocompress.types import (
    Candidate,
    Cost,
    Facts,
    Gene,
    Job,
    LimitError,
    Numeric,
    Policy,
    Probed,
    Profile,
    Rule,
    Site,
    Space,
    UserError,
)
from tests.small_search import builder, job

TASK, VNNI = Digits(), Profile(name="vnni")
UNSIGNED = Profile(name="unsigned", numeric=Numeric(weight="uint8"))
ARCH = {"width.0": 16, "width.1": 32, "width.2": 32, "depth.0": 1, "depth.1": 1, "depth.2": 1, "resolution": 8}
EVERYWHERE = Rule(site=".", op="quantize", settings={"bits": "int8", "weights": "int4"})


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = ConvNet().build(ARCH)
    reestimate_batchnorm(module, TASK, 4)
    return module.eval()


def written(module: nn.Module, *rules: Rule, profile: Profile = VNNI) -> tuple[bytes, bytes]:
    """The file, and the same made from the receipt alone."""
    exported, op = export(module, TASK.input, opset=17), Quantize()
    receipt = op.decide(exported, list(rules), TASK, profile)
    again = type(receipt).model_validate_json(receipt.model_dump_json())
    return compose(op.enact(exported, receipt)), compose(Quantize().enact(exported, again))


def answers(model: bytes) -> np.ndarray:
    return predictor(model)((next(iter(TASK.batches("selection", 64)))[0].numpy(),))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_two_integers_to_a_byte(half, columns, seed):
    integers = np.random.default_rng(seed).integers(-8, 8, (2 * half, columns)).astype(np.int8)
    found = fourbits.packed(integers)
    assert found.nbytes * 2 == integers.nbytes
    np.testing.assert_array_equal(np.concatenate([found >> 4, found % 16]).astype(np.int8) - 8, integers)


def test_torch_and_the_file_round_alike():
    module = network()
    plain, again = written(module, EVERYWHERE)
    assert plain == again
    rounded = copy.deepcopy(module)
    for part in rounded.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.weight.data = fourbits.rounded(part.weight.data, per_channel=True)
    (eight, _), found = written(rounded, Rule(site=".", op="quantize", settings={"bits": "int8"})), answers(plain)
    far = np.abs(found - answers(written(module, Rule(site=".", op="quantize", settings={"bits": "int8"}))[0])).mean()
    assert np.abs(found - answers(eight)).mean() < 0.2 * far


def test_the_runtime_unpacks_them_once_and_computes_in_integers(tmp_path):
    module = network()
    four, _ = written(module, EVERYWHERE)
    eight, _ = written(module, Rule(site=".", op="quantize", settings={"bits": "int8"}))
    assert len(four) < len(eight)
    found = []
    for model in (four, eight):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found.append(Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node))
    assert found[0] == found[1]


def test_only_integers_of_the_asked_site_are_packed():
    module = network()
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    layers = [Rule(site=name, op="quantize", settings={"bits": "int8"}) for name in names[1:]]
    asked = [*layers, Rule(site=".", op="quantize", settings={"weights": "int4"})]
    spared = Rule(site=names[2], op="quantize", settings={"bits": "int8", "weights": "profile"})
    exported = export(module, TASK.input, opset=17)

    def packed(rules) -> int:
        facts = Quantize().decide(exported, rules, TASK, VNNI).entries[-1].facts["model"]
        return len(facts.get("four_bits", ()))

    assert packed(asked) == len(layers)
    assert packed([rule if rule.site != names[2] else spared for rule in asked]) == len(layers) - 1
    assert packed(layers) == 0
    without = Quantize().decide(exported, asked, TASK, UNSIGNED).entries[-1].facts["model"]
    assert "four_bits" not in without  # its weights have a zero point of their own


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    parent = network()
    builder = Foreign.of(parent, TASK.input)
    return Work(
        task=TASK,
        builder=builder,
        profiles=(VNNI,),
        ops=make_ops(("quantize", "qat", "distill")),
        parent=parent,
        epochs=0.5,
    )


def test_training_rounds_what_the_file_will_round(work):
    policy = Policy(rules=(Rule(site=".", op="quantize", settings={"bits": "int8", "weights": "int4"}),))
    shaped = shape(work, Candidate(arch={}, policy=policy))
    (receipt,) = shaped.instruments
    assert receipt.op == "fourbits"
    seen: list[int] = []
    layer = shaped.module.get_submodule(receipt.entries[1].site)
    layer.register_forward_pre_hook(
        lambda one, _: seen.append(max(len(channel.unique()) for channel in one.weight.detach().flatten(1)))
    )
    before = layer.weight.detach().clone()
    made = training(work, shaped, policy, seed=0)
    made.run_to(0.5)
    assert max(seen) <= 2 * fourbits.MOST + 1
    assert not torch.equal(layer.weight, before)
    assert len(layer.weight[0].unique()) > 2 * fourbits.MOST + 1  # what learns is not rounded
    settled = shaped.settle(work)
    for module, hooked in ((settled.module, False), (shaped.module, True)):  # a copy in mid-training leaves it as it is
        found = [bool(module.get_submodule(entry.site)._forward_pre_hooks) for entry in receipt.entries[2:]]
        assert set(found) == {hooked}
    made.run_to(1.0)
    assert set(shaped.module.state_dict()) == set(work.parent.state_dict())


def test_rounded_training_is_what_ships(work):
    """After training, the four bit file answers as the network did that was trained with rounded weights."""
    policy = Policy(rules=(Rule(site=".", op="quantize", settings={"bits": "int8", "weights": "int4"}),))
    shaped = shape(work, Candidate(arch={}, policy=policy))
    training(work, shaped, policy, seed=0).run_to(1.0)
    module = shaped.module.eval()
    inputs = next(iter(TASK.batches("selection", 64)))[0]
    with torch.no_grad():
        simulated = module(inputs).numpy()
    FourBits().settle(module, shaped.instruments[0])
    with torch.no_grad():
        unrounded = module(inputs).numpy()
    (done,) = release(work, module, policy).values()
    found = answers(done.model)
    assert np.abs(found - simulated).mean() < 0.5 * np.abs(unrounded - simulated).mean()


def test_strange_receipts_are_said():
    module, op = network(), FourBits()
    assert isinstance(op, TrainOp)
    (rule, *_), _ = op.narrow(module, (), Policy(rules=(EVERYWHERE,)))
    receipt = op.decide(module, [rule], TASK, VNNI)
    assert op.decide(module, [rule], TASK, UNSIGNED).entries == ()
    wrong = receipt.entries[0].model_copy(update={"facts": {"shape": [1, 2], "per_channel": True}})
    with pytest.raises(UserError, match="the weight is"):
        op.enact(module, receipt.model_copy(update={"entries": (wrong,)}))
    lost = receipt.entries[0].model_copy(update={"site": "nowhere"})
    with pytest.raises(UserError, match="nothing is there"):
        op.enact(module, receipt.model_copy(update={"entries": (lost,)}))


def test_derived_spaces_ask_it_where_size_is_bounded():
    builder = Foreign.of(network(), TASK.input)
    profile = (Profile(name="any"),)
    names = {gene.name for gene in auto.targeted(builder, profile, small=True).genes}
    plain = {gene.name for gene in auto.targeted(builder, profile).genes}
    asked = names - plain
    assert asked
    assert all(name.startswith("quantize.weights@") for name in asked)
    assert auto.targeted(builder, (UNSIGNED,), small=True) == auto.targeted(builder, (UNSIGNED,))


def test_what_is_saved_among_integers_is_saved_there_alone():
    genes = [
        Gene(
            name=f"quantize.bits@{site}",
            kind="policy",
            choices=("float", "int8"),
            site=site,
            op="quantize",
            param="bits",
        )
        for site in ("a", "b")
    ]
    genes += [
        Gene(name="block.kind@b", kind="policy", choices=("keep", "drop"), site="b", op="block", param="kind"),
        Gene(
            name="quantize.weights@.",
            kind="policy",
            choices=("profile", "int4"),
            site=".",
            op="quantize",
            param="weights",
        ),
    ]
    sites = [
        Site(
            name=name,
            kind="conv",
            depth=depth,
            macs=10,
            parameters=10,
            out_channels=4,
            in_channels=4,
            ops=("quantize",),
        )
        for name, depth in (("a", 0.0), ("b", 1.0))
    ]
    probed = [Probed(gene=f"quantize.bits@{s}", choice="int8", kl=0.01, ms={"p": 0.2}, smaller=0.375) for s in "ab"]
    probed.append(Probed(gene="block.kind@b", choice="drop", kl=0.1, ms={"p": 0.5}, smaller=0.5))
    probed.append(
        Probed(
            gene="quantize.weights@.",
            choice="int4",
            kl=0.01,
            ms={"p": 0.0},
            best_ms={"p": 0.0},
            smaller=0.0,
            best_smaller=0.125,
        )
    )
    from tests.test_additive import reading

    space = Space(name="s", genes=tuple(genes))
    facts = Facts(sites=tuple(sites), probe=tuple(probed), baseline={"p": reading(1.0)}, baseline_size_mb=1.0)
    model = additive(space, facts)
    assert model is not None
    size = [device.profile for device in model.devices].index(SIZE)
    found = model.ratios(rows(space, [(0, 0, 0, 0), (0, 0, 0, 1), (1, 1, 0, 0), (1, 1, 0, 1)]))[:, size]
    assert found[0] == pytest.approx(found[1])
    assert found[2] == pytest.approx(0.25, rel=0.05)
    assert found[3] == pytest.approx(0.125, rel=0.05)
    even = list(evenly(space))
    assert {g[3] for g in even} == {0, 1}


@pytest.mark.parametrize("size_mb", [None, 0.1])
def test_a_job_with_a_bound_on_size_asks_it(size_mb):
    budget = {"profile": "local-1t", "speedup": 2} | ({"size_mb": size_mb} if size_mb else {})
    job = Job.model_validate(
        {
            "task": "digits",
            "model": {"builder": "torchvision:resnet18"},
            "space": "auto",
            "devices": [budget],
            "out": "unused",
        }
    )
    found = parts(job, task=Digits(), builder=network())
    assert any(gene.param == "weights" for gene in found.space.genes) == (size_mb is not None)


@pytest.mark.timeout(300)
def test_a_search_ships_them_and_its_policy_is_applied_again(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    packed = tmp_path / "packed.yaml"
    packed.write_text(
        "name: packed\nbuilder: convnet\narch: {depth.2: [2, 1]}\npolicy: []\n"
        "always: [{op: quantize, site: '.', settings: {bits: int8, weights: int4}}]\n"
    )
    asked = job(tmp_path / "out", cost=Cost(trials=2, minutes=5))
    found = run(asked, builder=builder(), space=load.space(packed, builder()), serial=True, console=Console(quiet=True))
    winner = (found.winners | found.closest)["local-1t"]
    assert "4-bit weights" in winner.policy
    made = tmp_path / "out" / winner.path
    names = {one.name for one in onnx.load(made / "model.onnx").graph.initializer}
    assert any(name.endswith("_packed") for name in names)
    assert reuse.apply(made, model=builder()).byte_equal
    next_weeks = tmp_path / "next.safetensors"
    next_weeks.write_bytes((tmp_path / "out" / "baseline" / "weights.safetensors").read_bytes())
    with contextlib.suppress(LimitError):  # a busy machine may not certify it; it is written all the same
        reuse.apply(made, weights=next_weeks, out=tmp_path / "next", max_drop=0.9, model=builder())
    again = {one.name for one in onnx.load(tmp_path / "next" / "model.onnx").graph.initializer}
    assert {name for name in again if name.endswith("_packed")} == {name for name in names if name.endswith("_packed")}


def test_tables_leave_packed_weights_alone():
    exported = export(network(), TASK.input, opset=17)
    op = Quantize()
    packed = op.enact(exported, op.decide(exported, [EVERYWHERE], TASK, VNNI))
    rule = Rule(site=".", op="store", settings={"codec": "codebook"})
    receipt = Store().decide(packed, [rule], TASK, VNNI)
    named = {name for entry in receipt.entries for name in entry.facts.get("model", {})}
    assert not any(name.endswith(fourbits.PACKED) for name in named)
    np.testing.assert_array_equal(answers(compose(Store().enact(packed, receipt))), answers(compose(packed)))
