"""Structures that share the parent's weights: which do, that gradients reach them, that training them together pays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from autocompress import elastic, load
from autocompress import space as sp
from autocompress.journal import read
from autocompress.models.foreign import Foreign
from autocompress.parts import make_ops
from autocompress.pipeline import Work, shape
from autocompress.run import resume, run
from autocompress.slices import slice_of
from autocompress.stages import answers
from autocompress.tasks.digits import Digits
from autocompress.train import Training
from autocompress.types import Facts, Fidelity, Gene, Genotype, Space, TrialFailure
from tests import small_search

torch.set_num_threads(1)


class Block(nn.Module):
    """x + f(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(16) for _ in range(6)]
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def gene(op: str, site: str, *choices: str | float) -> Gene:
    param = {"block": "kind", "prune": "ratio", "lowrank": "rank", "replace": "kind", "quantize": "bits"}[op]
    return Gene(name=f"{op}@{site}", kind="policy", choices=choices, site=site, op=op, param=param)


SPACE = Space(
    name="own",
    genes=(
        *(gene("block", str(at), "keep", "drop") for at in range(3, 9)),
        *(gene("prune", f"{at}.conv1", 0.0, 0.5) for at in range(3, 9)),
        gene("replace", "4.conv1", "keep", "separable"),
        gene("lowrank", "5.conv2", 1.0, 0.25),
        gene("quantize", "0", "float", "int8"),
    ),
)


@pytest.fixture(scope="module")
def work() -> Work:
    task = Digits()
    builder = Foreign.of(network(), task.input)
    parent = builder.build({})
    Training(parent, task, 4.0, 0, bf16=False).run_to(1.0)
    ops = make_ops(("block", "prune", "replace", "lowrank", "quantize"))
    profile = load.profile("local-1t")
    return Work(builder=builder, task=task, ops=ops, parent=parent.eval(), profiles=(profile,), bf16=False)


def chosen(**values: int) -> Genotype:
    names = [one.name for one in SPACE.genes]
    asked = {key.replace("_", "@", 1).replace("_", "."): value for key, value in values.items()}
    return sp.canonical(SPACE, tuple(asked.get(name, 0) for name in names))


def test_a_slice_computes_what_the_candidate_does_and_its_gradients_reach_the_parent(work: Work) -> None:
    genotype = chosen(block_3=1, prune_4_conv1=1, prune_6_conv1=1)
    one = slice_of(work, SPACE, genotype)
    parent = {name: p.detach().requires_grad_() for name, p in work.parent.named_parameters()}
    shaped = shape(work, sp.decode(SPACE, genotype)).module.eval()
    inputs, _ = next(iter(work.task.batches("selection", 8)))
    weights = one.weights(parent)
    found = functional_call(one.module.eval(), {**weights, **dict(shaped.named_buffers())}, (inputs,))
    assert torch.equal(found, shaped(inputs))
    assert {"0.weight", "11.weight"} <= set(one.whole)
    cut = ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight")
    assert set(one.places) == {f"{at}.{name}" for at in (4, 6) for name in cut}
    found.square().sum().backward()
    reached = {name: tensor.grad.abs() for name, tensor in parent.items() if tensor.grad is not None}
    assert float(reached["3.conv1.weight"].sum()) == 0  # the block that was dropped
    assert int((reached["4.conv1.weight"].sum((1, 2, 3)) > 0).sum()) == 8  # of 16 channels


@pytest.mark.parametrize("values", [{"replace_4_conv1": 1}, {"lowrank_5_conv2": 1}])
def test_what_computes_new_weights_is_no_selection(work: Work, values: dict[str, int]) -> None:
    with pytest.raises(TrialFailure):
        slice_of(work, SPACE, chosen(**values))


def test_structures_are_those_that_only_take_away(work: Work) -> None:
    kinds = elastic.structures(work, SPACE)
    ops = {SPACE.genes[at].op for at, choices in kinds.allowed.items() if choices}
    assert ops == {"block", "prune"}
    some = kinds.some(Facts(), (), 12, seed=1)
    assert len(some) == len(set(some)) == 12
    assert some == kinds.some(Facts(), (), 12, seed=1)
    assert all(kinds.restrict(one) == one and any(one) for one in some)


def test_sharing_helps_structures_that_it_never_saw(work: Work) -> None:
    kinds = elastic.structures(work, SPACE)
    every = kinds.some(Facts(), (), 24, seed=3)
    unseen, used = every[:6], [slice_of(work, SPACE, one) for one in every[6:]]
    sharing = elastic.Sharing(work, used, seed=0)
    batches = [inputs for seed in range(12) for inputs, _ in work.task.batches("train", 64, seed=seed)]
    for number, inputs in enumerate(batches):
        sharing.update((inputs,), number / len(batches), number)
    donor = replace(work, donor=sharing.module.eval())

    def mean(source: Work) -> float:
        shaped = [shape(source, sp.decode(SPACE, one)).module for one in unseen]
        return sum(work.task.quality(answers(one), "selection").value.value for one in shaped) / len(shaped)

    before, after = mean(work), mean(donor)
    assert after > before + 0.1, (before, after)


def test_a_structure_like_the_parents_keeps_the_parents_weights(work: Work) -> None:
    donor = replace(work, donor=network())
    int8 = sp.decode(SPACE, sp.encode(SPACE, sp.decode(SPACE, chosen(quantize_0=1))))
    assert donor.source(int8) is work.parent
    assert donor.source(sp.decode(SPACE, chosen(block_3=1))) is donor.donor


def test_a_search_with_an_elastic_parent_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "CHECK_STEPS", 4)
    job = small_search.job(tmp_path / "out", elastic=0.08, fidelity=Fidelity(full_epochs=1.0, rungs=(0.5, 1.0)))
    run(job, builder=small_search.builder(), space=small_search.space(tmp_path), serial=True)
    first = read(tmp_path / "out" / "journal.jsonl").events[0]
    shared = first["facts"]["shared"]
    assert shared["structures"] >= elastic.FEWEST
    assert shared["steps"] > 0
    assert first["plan"]["fidelity"]["rungs"] == ([0.0, 0.5, 1.0] if shared["decides"] else [0.5, 1.0])
    assert (tmp_path / "out" / "baseline" / "elastic.safetensors").is_file()
    resume(tmp_path / "out", builder=small_search.builder(), space=small_search.space(tmp_path), serial=True, trials=5)
    states = [event["state"] for event in read(tmp_path / "out" / "journal.jsonl").events if event.get("number") == 5]
    assert states
    assert states[-1] != "failed"
