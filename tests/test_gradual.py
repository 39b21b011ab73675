"""Channels that go while the network trains: silent and cut are one network, receipts rebuild it, trainings go on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress import artifact, journal, reuse
from autocompress.controller import trial_seed
from autocompress.evaluator import Evaluator
from autocompress.models.attention import unfold
from autocompress.models.convnet import ConvNet
from autocompress.models.coupling import Coupling
from autocompress.models.fading import COUNTED, Sketch, heard, replan, silence, sketch
from autocompress.models.groups import Group, choose
from autocompress.models.slicing import Cut, apply
from autocompress.ops import TrainOp, gradual
from autocompress.ops.prune import Prune
from autocompress.parts import make_ops, parts
from autocompress.pipeline import (
    Shaped,
    Work,
    load_weights,
    notes_of,
    rate,
    release,
    reshape,
    shape,
    training,
    weights_of,
)
from autocompress.space import decode
from autocompress.stages import answers
from autocompress.store import Store
from autocompress.tasks import InputSpec
from autocompress.tasks.digits import Digits
from autocompress.tasks.recipe import recipe
from autocompress.testing import check_op
from autocompress.train import Training
from autocompress.types import (
    Candidate,
    Cost,
    Fidelity,
    Gene,
    Job,
    LimitError,
    Policy,
    Profile,
    Receipt,
    Rule,
    Space,
    State,
    UserError,
)
from autocompress.worker import make_work, one_thread
from tests.small_search import job
from tests.test_groups import Kinds
from tests.test_pipeline import Clock, assignment

TASK, PROFILE, OP = Digits(), Profile(name="any"), Prune()
BUILDER = ConvNet(arch={"resolution": 8, "width.0": 16, "width.1": 32, "width.2": 48})
WHOLE = {"ratio": 0.5, "schedule": "gradual"}


def rule(site: str = ".", op: str = "prune", **asked: object) -> Rule:
    return Rule(site=site, op=op, settings=asked)


def network(seed: int = 0, **arch: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = BUILDER.build(arch).train()
        with torch.no_grad():
            for _ in range(3):
                module(torch.rand(16, 1, 8, 8))
    return module.eval()


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def through_json(receipt: Receipt) -> Receipt:
    return Receipt.model_validate(json.loads(receipt.model_dump_json()))


class Mixed(nn.Module):
    """Channels side by side, in groups, one by one, flattened, and bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 16, 1)
        self.norm = nn.BatchNorm2d(24)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.scale = nn.Parameter(torch.rand(24, 1, 1))
        self.out = nn.Conv2d(24, 6, 1)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x):
        x = torch.cat([self.left(x), torch.sigmoid(self.right(x))], 1)
        x = torch.relu(self.norm(x))
        x = self.depthwise(torch.sigmoid(self.grouped(x))) * self.scale
        return self.head(self.out(x).flatten(1))


class Encoder(nn.Module):
    """Heads and hidden units can be silent; the stream, which layer norms count, cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 32)
        self.layer = unfold(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0))
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.layer(self.stem(x)).mean(1))


class Input:
    """Digits' words for networks of another input shape."""

    name, metric = "shape", "accuracy"

    def __init__(self, *shape: int) -> None:
        self.input = InputSpec(shape=shape)


# --- silent is cut ------------------------------------------------------------------------------------------------


NETWORKS = {
    "residual": network,
    "separable": lambda seed: network(seed, **{"kind.1": "separable"}),
    "shuffle": lambda seed: network(seed, **{"kind.1": "shuffle"}),
    "mixed": lambda _: Mixed(),
    "encoder": lambda _: Encoder(),
    "kinds": lambda _: Kinds(),
}
INPUTS = {
    "mixed": lambda: (torch.rand(2, 3, 4, 4),),
    "encoder": lambda: (torch.rand(2, 5, 6),),
    "kinds": lambda: (torch.randint(0, 20, (2, 6)), torch.rand(2, 1, 1, 7)),
}


@settings(max_examples=24, deadline=None)
@given(
    seed=st.integers(0, 99),
    shares=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=1, max_size=5),
    kind=st.sampled_from(sorted(NETWORKS)),
)
def test_what_is_silent_can_be_cut_and_a_sketch_knows_how(seed, shares, kind):
    torch.manual_seed(seed)
    module = NETWORKS[kind](seed).eval()
    x = INPUTS.get(kind, lambda: (torch.rand(2, 1, 8, 8),))()
    coupling = Coupling(module, tuple(one[:1] for one in x))
    noise = torch.Generator().manual_seed(seed)
    kept: dict[Group, list[int]] = {}
    for at, group in enumerate(coupling.groups):
        keep = max(1, round((1 - shares[at % len(shares)]) * group.size / group.step)) * group.step
        kept[group] = choose(torch.rand(group.size, generator=noise), group.cells, keep)
    for group in heard(module, coupling, kept, x):
        del kept[group]
    assert kept
    first = dict(list(kept.items())[: len(kept) // 2])  # these go at once
    plan = coupling.plan()
    before = plan.facts(first)
    later = [group for group in kept if group not in first]
    drawn = Sketch.model_validate_json(sketch(plan, later).model_dump_json())
    expected = plan.facts({group: kept[group] for group in later})

    apply(module, map(Cut.model_validate, before["cuts"]), before.get("attributes"))
    again = dict(zip(drawn.groups(), (kept[group] for group in later), strict=True))
    assert replan([drawn]).facts(again) == expected
    silence(module, [(group, group.rest(left)) for group, left in again.items()])
    with torch.no_grad():
        silent = module(*x)
        apply(module, map(Cut.model_validate, expected["cuts"]), expected.get("attributes"))
        torch.testing.assert_close(module(*x), silent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "asked",
    [
        {"importance": "l1"},
        {"importance": "l2", "scope": "global"},
        {"importance": "taylor"},
        {"importance": "first_order", "scope": "global"},
        {"importance": "bn_scale"},
        {"importance": "fpgm"},
        {"importance": "random"},
    ],
    ids=lambda asked: "-".join(map(str, asked.values())),
)
def test_keeps_the_contract(asked):
    assert isinstance(OP, TrainOp)
    receipt = check_op(OP, network(), [rule(**WHOLE, **asked)], TASK, PROFILE)
    assert {entry.status for entry in receipt.entries} == {"open"}


def test_settled_at_the_start_it_is_the_one_shot_cut():
    now = OP.decide(network(), [rule(ratio=0.5)], TASK, PROFILE)
    later = OP.decide(network(), [rule(**WHOLE)], TASK, PROFILE)
    module = OP.enact(network(), through_json(later))
    settled = OP.settle(module, later)
    assert [entry.facts["cuts"] for entry in settled.entries] == [entry.facts["cuts"] for entry in now.entries]
    assert [entry.achieved for entry in settled.entries] == [entry.achieved for entry in now.entries]


def test_channels_go_on_the_cubic_ramp_and_never_come_back():
    assert [gradual.goal(share, 1000) for share in (0.0, 1.0)] == [0, 1000]
    half = gradual.goal(gradual.RAMP / 2, 1000)
    assert half == 875  # s (1 - (1 - t / T)^3) at half time
    assert gradual.goal(0.3 - 1 / 200, 1000) == 1000, "a usual first rung sees what would ship"
    module = network()
    receipt = OP.decide(module, [rule(**WHOLE)], TASK, PROFILE)
    OP.enact(module, receipt)
    root = next(part for part in module.modules() if hasattr(part, gradual.GONE))
    gone = root.get_buffer(gradual.GONE)
    seen: list[set[int]] = []
    for step in range(11):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)  # training moves whatever it likes
        OP.advance(module, receipt, step / 40)
        seen.append(set(gone.nonzero().flatten().tolist()))
        assert bool((root.weight[gone] == 0).all())
    assert all(one <= other for one, other in pairwise(seen))
    assert [len(seen[0]), len(seen[-1])] == [0, gone.numel() // 2]
    assert len({len(one) for one in seen}) > 4


def test_what_goes_is_chosen_by_the_weights_of_the_moment():
    module = network()
    receipt = OP.decide(module, [rule(**WHOLE)], TASK, PROFILE)
    OP.enact(module, receipt)
    root, fading = next((part, vars(part)[gradual.OWN]) for part in module.modules() if gradual.OWN in vars(part))
    weak = gradual.scores(module, fading.group, "l1").values.argmin()
    with torch.no_grad():
        for member in fading.group.members:  # what was weakest becomes strongest
            tensor = module.get_parameter(member.place.tensor) if "running" not in member.place.tensor else None
            if tensor is not None:
                positions = torch.from_numpy(member.positions[member.units == int(weak)])
                tensor.index_copy_(
                    member.place.axis, positions, 9 * torch.ones_like(tensor).index_select(member.place.axis, positions)
                )
    OP.advance(module, receipt, 1.0)
    assert not bool(root.get_buffer(gradual.GONE)[weak])


# --- who goes at once ---------------------------------------------------------------------------------------------


def test_channels_that_a_norm_counts_go_before_training():
    torch.manual_seed(0)
    receipt = OP.decide(Encoder().eval(), [rule(**WHOLE)], Input(5, 6), PROFILE)
    now, later = receipt.entries
    assert [now.status, later.status] == ["done", "open"]
    assert now.facts["at_once"] == {"stem": COUNTED}
    roots = {strand["root"] for strand in later.facts["sketch"]["strands"]}
    assert "layer.linear1" in roots
    assert "stem" not in roots
    module = OP.enact(Encoder().eval(), receipt)
    x = torch.rand(2, 5, 6)
    OP.advance(module, receipt, 1.0)
    with torch.no_grad():
        silent = module(x)
        settled = OP.settle(module, receipt)
        torch.testing.assert_close(module(x), silent, rtol=1e-4, atol=1e-5)
    again = OP.enact(Encoder(), through_json(settled))
    assert shapes(again) == shapes(module)
    assert notes_of([receipt]) == (f"prune .: 1 of its groups before training, {COUNTED}",)


def test_a_site_may_ask_for_one_shot_and_ops_that_count_channels_do():
    site = "stages.0.0.conv1"
    both = [rule(schedule="gradual"), rule(site, ratio=0.5), rule("stages.1.0.conv1", ratio=0.5, schedule="oneshot")]
    receipt = OP.decide(network(), both, TASK, PROFILE)
    assert [(entry.site, entry.status) for entry in receipt.entries] == [("stages.1.0.conv1", "done"), (site, "open")]

    sites = ["stages.0.0.conv1", "stages.1.0.conv1", "stages.2.0.conv1"]
    asked = [rule(schedule="gradual"), *(rule(name, ratio=0.5) for name in sites)]
    others = [
        rule("stages.0.0.conv2", "lowrank", rank=0.5),
        rule("stages.1.0.conv1", "sparsify", ratio=0.5),
        rule("stages.2.0.conv1", "lowrank", rank=1.0),
        rule("stages.2.0.conv1", "quantize", bits="int8"),
    ]
    narrowed, skipped = OP.narrow(network(), asked, Policy(rules=(*asked, *others)))
    assert not skipped
    receipt = OP.decide(network(), narrowed, TASK, PROFILE)
    status = {entry.site: entry.status for entry in receipt.entries}
    assert status == dict(zip(sites, ("done", "done", "open"), strict=True))
    assert receipt.entries[0].facts["at_once"] == {
        sites[0]: "what is done to stages.0.0.conv2 needs its channels settled"
    }


def test_a_receipt_of_another_network_is_one_line():
    receipt = OP.decide(network(), [rule(**WHOLE)], TASK, PROFILE)
    with pytest.raises(
        UserError, match=r"prune at site \.: the receipt is of another network: .* 16 .* had 8 there|had"
    ):
        OP.enact(ConvNet(arch={"resolution": 8, "width.0": 8}).build({}), receipt)
    with pytest.raises(UserError, match="is not there"):
        OP.enact(nn.Sequential(nn.Linear(2, 2)), receipt)


# --- the whole path -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work() -> Work:
    torch.manual_seed(0)
    parent = BUILDER.build({})
    Training(parent, TASK, epochs=6, seed=0).run_to(1.0)
    ops = make_ops(("prune", "lowrank", "sparsify", "qat", "quantize", "distill"))
    return Work(BUILDER, TASK, ops, parent.eval(), (PROFILE,), epochs=2.0)


SITES = tuple(site.name for site in BUILDER.sites() if "prune" in site.ops)
PRUNED = tuple(rule(name, ratio=0.7) for name in SITES)
GRADUAL = Policy(rules=(*PRUNED, rule(schedule="gradual")))


def test_the_first_look_has_the_graph_that_ships(work):
    now, later = (shape(work, Candidate(arch={}, policy=Policy(rules=rules))) for rules in (PRUNED, GRADUAL.rules))
    first = later.settle(work)
    assert shapes(first.module) == shapes(now.module)
    keys = [release(work, module, GRADUAL)[PROFILE.numeric.variant].key for module in (now.module, first.module)]
    assert keys[0] == keys[1]
    assert later.intact, "the parent's statistics stay as they are"
    assert rate(work, later) == recipe(TASK).lr
    torch.manual_seed(3)
    training(work, later, GRADUAL, 3).run_to(1.0)
    last = later.settle(work)
    assert release(work, last.module, GRADUAL)[PROFILE.numeric.variant].key == keys[0]
    receipts = tuple(map(through_json, (*later.receipts, *last.learned)))
    assert all(entry.status == "done" for one in last.learned for entry in one.entries)
    again = reshape(BUILDER, work.ops, {}, receipts)
    assert shapes(again) == shapes(last.module)
    with torch.no_grad():
        later.module.eval()
        x = torch.rand(4, 1, 8, 8)
        torch.testing.assert_close(last.module.eval()(x), later.module(x), rtol=1e-4, atol=1e-4)
    assert TASK.quality(answers(last.module), "selection").value.value > 0.8


@pytest.mark.parametrize("importance", ["l1", "taylor"])
def test_an_interrupted_training_ends_in_the_same_network(work, importance):
    rules = (*(rule(name, ratio=0.5, importance=importance) for name in SITES), rule(schedule="gradual"))
    policy = Policy(rules=rules)
    ends: list[bytes] = []
    for stops in ((), (0.1, 0.2)):
        shaped = shape(work, Candidate(arch={}, policy=policy))
        trainer = training(work, shaped, policy, 5)
        for stop in stops:
            trainer.run_to(stop)
            module = reshape(BUILDER, work.ops, {}, shaped.receipts)  # another process: receipts and a state
            for receipt in map(through_json, shaped.instruments):
                OP.enact(module, receipt)
            shaped = Shaped(module, shaped.receipts, shaped.instruments, shaped.intact)
            state, trainer = trainer.state(), training(work, shaped, policy, 5)
            trainer.load(state)
        trainer.run_to(1.0)
        ends.append(trainer.state())
    assert ends[0] == ends[1]


def test_a_trial_goes_rung_by_rung_beside_all_other_ops(work, tmp_path):
    rules = (
        *GRADUAL.rules,
        rule("stages.1.0.conv2", "lowrank", rank=0.5),
        rule("stages.2.0.conv1", "sparsify", ratio=0.5),
        rule(".", "qat", bits="int8"),
        *(rule(site.name, "quantize", bits="int8") for site in BUILDER.sites() if "quantize" in site.ops),
    )
    candidate = Candidate(arch={"depth.2": 1}, policy=Policy(rules=rules))
    files = Store(tmp_path)
    evaluator = Evaluator(work, (), files, Clock())
    first, *_ = evaluator.evaluate(assignment(candidate, rungs=(0.1, 1.0)))
    assert first[0] is State.RUNG
    whole = list(evaluator.evaluate(assignment(candidate, rungs=(0.1, 1.0))))
    resumed = list(
        evaluator.evaluate(assignment(candidate, rungs=(0.1, 1.0), start=1, checkpoint=first[1].files["checkpoint"]))
    )
    assert [state for state, _ in whole] == [State.RUNG, State.DONE]
    done, again = whole[-1][1], resumed[-1][1]
    assert done.reason == again.reason == ""
    assert done.files == again.files
    assert any("before training" in note for note in done.notes)
    receipts = json.loads(files.get(done.files["receipts"]))["structure"]
    module = reshape(BUILDER, work.ops, candidate.arch, [Receipt.model_validate(one) for one in receipts])
    load_weights(module, files.get(done.files["weights"]))
    first_readings = {key: reading.ms.value for key, reading in first[1].readings.items()}
    assert first_readings == {key: reading.ms.value for key, reading in done.readings.items()}


# --- a search -----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from autocompress.run import resume, run
from tests.test_gradual import BUILDER, searched, SPACE
if __name__ == "__main__":
    made = {"builder": BUILDER, "space": SPACE, "serial": True, "console": Console(quiet=True)}
    run(searched(Path(sys.argv[1])), **made) if sys.argv[2] == "run" else resume(Path(sys.argv[1]), **made)
"""
SPACE = Space(
    name="gradual",
    genes=(
        Gene(name="ratio", kind="policy", choices=(0.0, 0.5), site=".", op="prune", param="ratio"),
        Gene(name="schedule", kind="policy", choices=("gradual",), site=".", op="prune", param="schedule"),
    ),
)


def searched(out: Path) -> Job:
    """One gradual candidate, two rungs, the first one in the middle of the ramp."""
    fidelity = Fidelity(full_epochs=2.0, rungs=(0.2, 1.0), keep=1.0)
    made = job(out, fidelity=fidelity, cost=Cost(trials=1, minutes=5))
    return made.model_copy(update={"model": made.model.model_copy(update={"epochs": 1.0})})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_between_rungs_it_ends_as_if_nothing_had_been_and_its_policy_goes_on(tmp_path):
    out = tmp_path / "killed"
    script = tmp_path / "drive.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, str(script), str(out), "run"], env=env)
    path, deadline = out / "journal.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and any(event["state"] == "rung" for event in journal.read(path).events):
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = [event["state"] for event in journal.read(path).events if event["number"] == 1]
    assert before[-1] == "rung", before
    assert subprocess.run([sys.executable, str(script), str(out), "resume"], env=env, check=False).returncode == 0

    events = journal.read(path).events
    parent = load_weights(BUILDER.build({}), (out / "baseline" / "weights.safetensors").read_bytes())
    uncut = make_work(parts(searched(out), builder=BUILDER, space=SPACE), parent, bf16=events[0]["facts"]["bf16"])
    one = assignment(decode(SPACE, (1, 0)), rungs=(0.2, 1.0), seed=trial_seed(0, 1))
    with one_thread():
        *_, (_, expected) = Evaluator(uncut, (), Store(tmp_path / "uncut"), Clock()).evaluate(one)
    (done,) = (event["outcome"] for event in events if event["number"] == 1 and event["state"] == "done")
    for key in ("weights", "receipts"):
        assert done["files"][key] == expected.files[key]

    (made,) = [path.parent for path in out.glob("*/local-1t/policy.json")]
    (kept,) = artifact.read(made).policy.receipts[-1].entries
    assert (kept.status, kept.asked) == ("done", {"ratio": 0.5, "schedule": "gradual"})
    assert reuse.apply(made, model=BUILDER).byte_equal
    torch.manual_seed(9)
    other = BUILDER.build({})
    Training(other, TASK, epochs=1, seed=9).run_to(1.0)
    (tmp_path / "next.safetensors").write_bytes(weights_of(other))
    with contextlib.suppress(LimitError):  # a busy machine may not certify it; it is written all the same
        reuse.apply(made, weights=tmp_path / "next.safetensors", out=tmp_path / "next", max_drop=0.9, model=BUILDER)
    (again,) = artifact.read(tmp_path / "next").policy.receipts[-1].entries
    assert again.achieved == kept.achieved
    assert again.facts["cuts"] != kept.facts["cuts"], "chosen by the new weights"
    assert reuse.apply(tmp_path / "next", model=BUILDER).byte_equal
