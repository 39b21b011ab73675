"""Networks that decide by their input: exits, gates and branches, from the policy to the file."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from torch import nn

import autocompress
from autocompress import auto, branches, journal, load, onnxfile, pipeline
from autocompress import export as exporting
from autocompress.batches import Batched
from autocompress.controller import Header
from autocompress.models.convnet import ConvNet
from autocompress.models.foreign import Foreign
from autocompress.ops import thresholds
from autocompress.registry import make
from autocompress.reuse import apply
from autocompress.run import run
from autocompress.tasks.digits import Digits
from autocompress.train import Training
from autocompress.types import Budget, Candidate, Gene, Policy, Reading, Rule, Space, TrialFailure, UserError
from autocompress.verify import verify

OPS = ("exit", "skip", "branch", "cascade", "route", "quantize", "prune", "lowrank", "block", "distill")


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(16) for _ in range(5)))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class Tokens(nn.Module):
    """A transformer of two layers over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.squeeze(1))
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean(1))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.net(x)
        return y, y + 1


def rule(op: str, site: str, **settings: object) -> Rule:
    return Rule(site=site, op=op, settings=settings)


@pytest.fixture(scope="module")
def task() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def parent(task: Digits) -> nn.Module:
    torch.manual_seed(0)
    module = Net()
    Training(module, task, epochs=3, seed=0).run_to(1.0)
    return module.eval()


def work_of(parent: nn.Module, task: Digits, profile: str = "local-1t") -> pipeline.Work:
    ops = {name: make("op", name) for name in OPS}
    builder = Foreign.of(parent, task.input)
    return pipeline.Work(
        builder=builder, task=task, ops=ops, parent=parent, profiles=(load.profile(profile),), epochs=2, bf16=False
    )


EVERYTHING = (
    rule("exit", "blocks.1", head="conv"),
    rule("exit", "blocks.3", head="hidden", confidence="learned"),
    rule("skip", "blocks.2", rate=0.5),
    rule("branch", "blocks.4", rate=0.5),
    rule("prune", "blocks.1.conv1", ratio=0.5),
    rule("quantize", ".", bits="int8"),
    rule("distill", ".", weight=0.5),
)


class Made:
    """A candidate with every kind of route, trained."""

    def __init__(self, parent: nn.Module, task: Digits) -> None:
        self.work = work_of(parent, task)
        self.policy = Policy(rules=EVERYTHING)
        self.shaped = pipeline.shape(self.work, Candidate(arch={}, policy=self.policy))
        self.first = pipeline.release(self.work, self.shaped.plain(self.work), self.policy, first_look=True)
        pipeline.training(self.work, self.shaped, self.policy, 0).run_to(1.0)
        self.settled = self.shaped.settle(self.work)
        (self.release,) = pipeline.release(self.work, self.settled.module, self.policy).values()
        self.images = torch.cat([x for x, _ in task.batches("selection", 64)]).numpy()


@pytest.fixture(scope="module")
def made(parent: nn.Module, task: Digits) -> Made:
    return Made(parent, task)


def test_routes_compose_with_pruning_and_integers(made: Made):
    assert [receipt.op for receipt in made.shaped.receipts if receipt.entries] == ["prune"]
    learned = [(receipt.op, entry.status) for receipt in made.settled.learned for entry in receipt.entries]
    assert learned == [("exit", "done"), ("exit", "done"), ("skip", "done"), ("branch", "done")]
    proto = onnxfile.read(made.release.model)
    onnx.checker.check_model(proto)
    (decision,) = [node for node in proto.graph.node if node.op_type == "If"]
    inside = next(one.g for one in decision.attribute if one.name == "else_branch")
    assert sum(node.op_type == "If" for node in inside.node) == 2  # a gate, and the second exit
    assert any(node.op_type == "QuantizeLinear" for node in inside.node)
    assert {*branches.thresholds_of(made.release.model)} == {
        "blocks.1.exit", "blocks.3.exit", "blocks.2.gate", "blocks.4.gate",
    }  # fmt: skip
    assert next(dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim) == 1


def test_plain_onnxruntime_runs_the_file_and_batches_give_the_same(made: Made):
    session = onnxruntime.InferenceSession(made.release.model, providers=["CPUExecutionProvider"])
    (name,) = [one.name for one in session.get_inputs()]
    one_by_one = np.concatenate([session.run(None, {name: made.images[i : i + 1]})[0] for i in range(64)])
    assert np.allclose(exporting.predictor(made.release.model)(made.images[:64]), one_by_one)
    batched = Batched(made.release.model)
    assert np.allclose(batched(made.images)[:64], one_by_one, atol=1e-5)
    late = branches.set_thresholds(made.release.model, {"blocks.1.exit": 2.0, "blocks.3.exit": 2.0})
    never = batched(made.images, thresholds={"blocks.1.exit": 2.0, "blocks.3.exit": 2.0})
    assert np.allclose(Batched(late)(made.images), never, atol=1e-5)
    always = batched(made.images, thresholds={"blocks.1.exit": 0.0})
    assert not np.allclose(always, never, atol=1e-3)
    with pytest.raises(UserError, match=r"no route 'blocks.9.exit' in the file; there are blocks"):
        batched(made.images, thresholds={"blocks.9.exit": 0.5})


def test_a_threshold_can_be_given_when_the_file_is_loaded(made: Made):
    options = onnxruntime.SessionOptions()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([0.0], np.float32))
    options.add_initializer(branches.threshold_name("blocks.1.exit"), value)
    session = onnxruntime.InferenceSession(made.release.model, options, providers=["CPUExecutionProvider"])
    (name,) = [one.name for one in session.get_inputs()]
    expected = Batched(made.release.model)(made.images[:8], thresholds={"blocks.1.exit": 0.0})
    found = np.concatenate([session.run(None, {name: made.images[i : i + 1]})[0] for i in range(8)])
    assert np.allclose(found, expected, atol=1e-5)


def test_receipts_and_weights_make_the_same_file(made: Made):
    receipts = (*made.shaped.receipts, *made.settled.learned)
    module = pipeline.reshape(made.work.builder, made.work.ops, {}, receipts)
    pipeline.load_weights(module, pipeline.weights_of(made.settled.module))
    assert pipeline.rerelease(made.work, module, made.release.receipts).model == made.release.model


def test_thresholds_lose_no_more_than_is_allowed_where_they_were_tuned(made: Made):
    (route,) = [receipt for receipt in made.release.receipts if receipt.op == "route"]
    *routes, last = route.entries
    curve = last.facts["curve"]
    chosen = {entry.site: entry.facts["threshold"] for entry in routes if entry.site.endswith(".exit")}
    assert set(chosen) == {"blocks.1.exit", "blocks.3.exit"}
    point = next(one for one in curve if one["thresholds"] == pytest.approx(chosen))
    quality = point["quality"]
    assert quality >= curve[-1]["quality"] - 0.005
    assert point["saved"] == max(one["saved"] for one in curve if one["quality"] >= curve[-1]["quality"] - 0.005)
    assert curve[0]["saved"] > curve[-1]["saved"] == 0.0
    assert curve[0]["shares"]["blocks.1.exit"] == 1.0
    assert curve[-1]["shares"]["blocks.1.exit"] == 0.0
    assert (last.facts["split"], last.facts["samples"]) == ("selection", 360)
    exact = exporting.predictor(made.release.model)
    assert made.work.task.quality(exact, "selection").value.value == pytest.approx(quality, abs=1e-6)


def test_the_first_look_takes_every_exit_and_skips_every_gate(made: Made):
    (first,) = made.first.values()
    assert branches.thresholds_of(first.model) == {
        "blocks.1.exit": 0.0, "blocks.3.exit": 0.0, "blocks.2.gate": 2.0, "blocks.4.gate": 2.0,
    }  # fmt: skip
    assert first.key != made.release.key  # weights decide the speed, so they are part of the key


def test_gates_learn_their_rate(made: Made):
    (route,) = [receipt for receipt in made.release.receipts if receipt.op == "route"]
    shares = {entry.site: entry.achieved["share"] for entry in route.entries if entry.site.endswith(".gate")}
    assert all(0.1 < share < 0.9 for share in shares.values()), shares


def test_the_network_rows_decide_as_the_file_does(made: Made):
    module = copy.deepcopy(made.settled.module).eval()
    with torch.no_grad():
        whole = module(torch.from_numpy(made.images[:16]))
        single = torch.cat([module(torch.from_numpy(made.images[i : i + 1])) for i in range(16)])
    assert torch.allclose(whole, single, atol=1e-5)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        assert torch.equal(copied(torch.from_numpy(made.images[:16])), whole)


def test_transformers_have_exits_and_gates(task: Digits):
    torch.manual_seed(0)
    parent = Tokens().eval()
    work = work_of(parent, task)
    policy = Policy(
        rules=(
            rule("exit", "layers.0", head="linear", confidence="entropy"),
            rule("skip", "layers.1", rate=0.5),
            rule("branch", "layers.2", rate=0.5, width=0.5),
        )
    )
    shaped = pipeline.shape(work, Candidate(arch={}, policy=policy))
    pipeline.training(work, shaped, policy, 0).run_to(0.5)
    (release,) = pipeline.release(work, shaped.settle(work).module, policy).values()
    assert len(branches.thresholds_of(release.model)) == 3


def test_what_cannot_be_routed_is_skipped_with_its_reason(parent: nn.Module, task: Digits):
    work = work_of(parent, task)

    def reasons(*rules: Rule) -> dict[str, str]:
        shaped = pipeline.shape(work, Candidate(arch={}, policy=Policy(rules=rules)))
        receipts = (*shaped.receipts, *shaped.instruments)
        return {entry.site: entry.why for receipt in receipts for entry in receipt.entries if entry.why}

    assert reasons(rule("skip", "stem", rate=0.5)) == {"stem": "its input is (1, 8, 8) and its output (16, 8, 8)"}
    assert reasons(rule("exit", ".", head="linear")) == {".": "that is the whole network"}
    assert reasons(rule("exit", "nowhere", head="linear")) == {"nowhere": "no block is there"}
    gone = reasons(rule("block", "blocks.2", kind="drop"), rule("exit", "blocks.2", head="linear"))
    assert gone == {}  # an exit behind a dropped block lies behind the one before


def test_several_outputs_cannot_be_routed(task: Digits):
    torch.manual_seed(0)
    module = Two().eval()
    op = make("op", "exit")
    with pytest.raises(TrialFailure, match="2 outputs; an input can only be routed to one answer"):
        op.decide(module, [rule("exit", "net.blocks.1", head="linear")], task, load.profile("local-1t"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (rule("route", ".", threshold=1.5), "threshold 1.5; give a number from 0 to 1, or tuned"),
        (rule("route", ".", loses=-0.1), "loses -0.1 is not a share from 0 to 1"),
        (rule("exit", "a", head="wide"), "head 'wide'; choose one of none, linear, hidden, conv"),
        (rule("exit", "a", size=3), "unknown setting 'size'; known are head and confidence"),
        (rule("skip", "a", rate=0.0), "rate 0.0 is not above 0 and at most 1"),
        (rule("branch", "a", width=2), "width 2 is not above 0 and at most 1"),
    ],
)
def test_settings_are_checked_before_anything_runs(asked: Rule, message: str):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        make("op", asked.op).check(asked)


def test_files_that_decide_serve_one_sample_at_a_time(made: Made):
    profile = made.work.profiles[0].model_copy(update={"batch": 8, "name": "eight"})
    work = pipeline.replace(made.work, profiles=(profile,))
    with pytest.raises(TrialFailure, match="takes one sample at a time; profile eight measures batches of 8"):
        pipeline.release(work, made.settled.module, made.policy)


def test_a_space_file_may_ask_for_routes_behind_any_module():
    space = load.space("examples/early_exit_space.yaml", ConvNet())
    names = [gene.name for gene in space.genes]
    assert "exit.head@stages.0.1" in names
    assert "skip.rate@stages.2.1" in names


def test_budgets_name_quantiles():
    budget = Budget.model_validate({"profile": "d", "latency_ms": {"mean": 0.4, "p99": 1.0, "worst": 2}})
    assert (budget.latency_ms, budget.p99_ms, budget.worst_ms, budget.p95_ms) == (0.4, 1.0, 2.0, None)
    with pytest.raises(ValueError, match="latency_ms: unknown 'p90'; it names mean, p50, p95, p99, worst"):
        Budget.model_validate({"profile": "d", "latency_ms": {"p90": 1}})


def test_a_distribution_is_measured_over_real_inputs(made: Made, tmp_path):
    from autocompress.devices.cores import plan_cores
    from autocompress.devices.local import LocalDevice
    from autocompress.devices.station import Station

    baseline = tmp_path / "baseline.onnx"
    baseline.write_bytes(exporting.compose(pipeline.export_float(made.work, made.work.parent)))
    station = Station(made.work.profiles, plan_cores(made.work.profiles), baseline, tmp_path / "cache")
    try:
        reading: Reading = station.measure("local-1t", made.release.timed, made.release.key)
        early = branches.set_thresholds(made.release.model, {"blocks.1.exit": 0.0})
        fast: Reading = station.measure("local-1t", pipeline.timed(made.work.task, early))
        whole: Reading = station.session("local-1t", made.release.timed)
        path = tmp_path / "model.onnx"
        path.write_bytes(made.release.model)
        device = LocalDevice(made.work.profiles[0])
        (told,) = device.answers(path, [made.images[:9]])
        device.close()
    finally:
        station.close()
    assert reading.inputs == 64
    assert reading.samples % 64 == 0
    assert reading.p50_ms is not None
    assert reading.worst_ms is not None
    assert reading.p50_ms.value <= reading.worst_ms * 1.5
    assert fast.ms.value < reading.ms.value
    assert np.allclose(told, exporting.predictor(made.release.model)(made.images[:9]))
    assert whole.runs is not None
    assert whole.runs.inputs == 64
    assert all(len(block) == 64 for block in whole.runs.model)


def test_routes_that_always_decide_alike_are_told(made: Made):
    policy = Policy(rules=(*EVERYTHING, rule("route", ".", threshold=0.0)))
    (release,) = pipeline.release(made.work, made.settled.module, policy).values()
    notes = pipeline.notes_of(release.receipts)
    assert "blocks.1.exit: every sample leaves there" in notes
    assert "blocks.3.exit: no sample leaves there" in notes


def test_a_derived_space_offers_routes_where_they_are_asked_for(parent: nn.Module, task: Digits):
    builder = Foreign.of(parent, task.input)
    profile = load.profile("local-1t")
    plain, routed = (auto.targeted(builder, (profile,), routes=routes) for routes in (False, True))
    assert not any(gene.op in ("exit", "skip") for gene in plain.genes)
    added = [gene for gene in routed.genes if gene.op in ("exit", "skip")]
    assert {gene.op for gene in added} == {"exit", "skip"}
    assert "cascade.keep@." in [gene.name for gene in routed.genes]
    alone = {"cascade.keep@.": (1.0,)}
    kept = [{**alone, f"block.kind@{gene.site}": ("keep",)} if gene.op == "skip" else alone for gene in added]
    assert [gene.when for gene in added] == kept
    many = profile.model_copy(update={"batch": 8})
    assert auto.targeted(builder, (profile, many), routes=True).genes == plain.genes
    file = auto.written(routed, builder)
    assert {row.op for row in file.policy} >= {"exit", "skip"}


def test_a_policy_with_routes_goes_from_search_to_artifact_to_new_weights(parent: nn.Module, tmp_path):
    bits = Gene(
        name="bits", kind="policy", choices=("float", "int8"), site="blocks.0.conv1", op="quantize", param="bits"
    )
    always = (
        rule("exit", "blocks.1", head="linear"),
        rule("skip", "blocks.3", rate=0.5),
        rule("route", ".", loses=0.02),
        rule("distill", ".", weight=0.5),
    )
    summary = autocompress.search(
        parent, "digits", space=Space(name="leaving", genes=(bits,), always=always),
        devices=[{"profile": "local-1t", "latency_ms": {"p99": 500}}],
        quality={"max_drop": 0.9}, trials=1, minutes=3, sessions=2, fidelity={"full_epochs": 1, "rungs": (1.0,)},
        out=tmp_path / "run", serial=True, console=Console(file=io.StringIO()),
    )  # fmt: skip
    assert summary.winners, summary.problems
    folder = tmp_path / "run" / "best" / "local-1t"
    manifest = json.loads((folder / "manifest.json").read_text())
    points = manifest["thresholds"]
    whole_curve(points)
    times = [point["readings"]["local-1t"]["ms"]["value"] for point in points]
    assert times[0] < times[-1]
    reading = manifest["certificate"]["readings"]["local-1t"]
    assert reading["inputs"] == 64
    html = (tmp_path / "run" / "report.html").read_text()
    assert all(words in html for words in ("mean of 64 inputs", "decides by its input", "% leave", "% run"))
    verified = verify(folder, sessions=1, model=parent)
    assert not [check for check in verified.checks if check.status == "failed"]
    (folder / "manifest.json").write_text(json.dumps(faster(manifest)))
    doubted = next(check for check in verify(folder, sessions=1, model=parent).checks if check.name == "samples")
    assert doubted.says.startswith("session 1 on local-1t: worst_ms")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    weights = tmp_path / "run" / "baseline" / "weights.safetensors"
    applied = apply(folder, weights=weights, out=tmp_path / "next", max_drop=0.9, model=parent)
    again = json.loads((tmp_path / "next" / "policy.json").read_text())
    before = json.loads((folder / "policy.json").read_text())
    heads = [[e for r in one["receipts"] for e in r["entries"] if "exit" in e["facts"]] for one in (before, again)]
    assert heads[0] == heads[1]
    assert applied.certificate.certified
    whole_curve(json.loads((tmp_path / "next" / "manifest.json").read_text())["thresholds"])


def whole_curve(points: list[dict[str, Any]]):
    """From all that leave at the first exit to none, the shipped thresholds among them."""
    assert [point["shipped"] for point in points].count(True) == 1
    left = [point["shares"]["blocks.1.exit"] for point in points]
    assert (left[0], left[-1]) == (1.0, 0.0)
    assert left == sorted(left, reverse=True)
    assert len(points) > 2


def faster(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest whose first session says that its slowest input is half as slow."""
    found = copy.deepcopy(manifest)
    found["certificate"]["each"]["local-1t"][0]["worst_ms"] /= 2
    return found


@pytest.fixture(scope="module")
def cascaded(parent: nn.Module, task: Digits) -> tuple[pipeline.Work, pipeline.Shaped, Policy, pipeline.Release]:
    work = work_of(parent, task)
    rules = (
        rule("cascade", ".", keep=0.4),
        rule("quantize", "blocks", bits="int8"),
        rule("route", ".", loses=0.01),
        rule("distill", ".", weight=0.5),
    )
    policy = Policy(rules=rules)
    shaped = pipeline.shape(work, Candidate(arch={}, policy=policy))
    before = {name: tensor.clone() for name, tensor in shaped.module.state_dict().items()}
    pipeline.training(work, shaped, policy, 0).run_to(1.0)
    after = shaped.module.state_dict()
    for name, tensor in before.items():  # the network itself rests, its statistics too
        assert torch.equal(tensor, after[name]) or name.startswith("little."), name
    assert all(parameter.requires_grad for parameter in shaped.module.parameters())
    (release,) = pipeline.release(work, shaped.settle(work).module, policy).values()
    return work, shaped, policy, release


def test_a_smaller_copy_answers_first(cascaded, task: Digits):
    work, shaped, _, release = cascaded
    assert len([block for block in shaped.module.little.net.blocks if isinstance(block, Block)]) == 2
    (route,) = [receipt for receipt in release.receipts if receipt.op == "route"]
    assert [entry.site for entry in route.entries] == ["little.exit", "."]
    point = route.entries[-1].facts["curve"][0]
    assert point["saved"] > 0.5  # the whole deep network
    integers = {node.name for node in onnxfile.read(release.model).graph.initializer if node.data_type == 3}
    assert any("little" in name for name in integers)  # the copy of a site in integers is one, too
    proto = onnxfile.read(release.model)
    assert [node.op_type for node in proto.graph.node].count("If") == 1
    images = torch.cat([x for x, _ in task.batches("selection", 64)]).numpy()
    batched = Batched(release.model)
    for value, network in ((0.0, shaped.module.little.net), (2.0, work.parent)):
        file = branches.set_thresholds(release.model, {"little.exit": value})
        said = exporting.predictor(file)(images[:32]).argmax(1)
        assert np.array_equal(batched(images[:32], thresholds={"little.exit": value}).argmax(1), said)
        with torch.no_grad():
            meant = network.eval()(torch.from_numpy(images[:32])).argmax(1).numpy()
        assert (said == meant).mean() > 0.9
    receipts = tuple(r for r in (*shaped.receipts, *shaped.instruments))
    module = pipeline.reshape(work.builder, work.ops, {}, receipts)
    pipeline.load_weights(module, pipeline.weights_of(shaped.module))
    assert pipeline.rerelease(work, module, release.receipts).model == release.model


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (rule("cascade", "blocks", keep=0.5), "give it site '.'"),
        (rule("cascade", ".", keep=0), "keep 0 is not above 0 and at most 1"),
        (rule("cascade", ".", share=0.5), "unknown setting 'share'"),
        (rule("cascade", ".", confidence="loud"), "confidence 'loud'; choose one of softmax"),
    ],
)
def test_a_cascades_settings_are_checked(asked: Rule, message: str):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        make("op", "cascade").check(asked)


def test_what_cannot_have_a_copy_says_why(parent: nn.Module, task: Digits):
    cascade = make("op", "cascade")
    profile = load.profile("local-1t")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    (entry,) = cascade.decide(plain, [rule("cascade", ".", keep=0.5)], task, profile).entries
    assert (entry.status, entry.why) == ("skipped", "it has no repeated blocks that can be left out")
    work = work_of(parent, task)
    policy = Policy(rules=(rule("exit", "blocks.1", head="linear"), rule("cascade", ".", keep=0.5)))
    shaped = pipeline.shape(work, Candidate(arch={}, policy=policy))
    skipped = [e for r in shaped.receipts for e in r.entries if e.status == "skipped"]
    assert [e.why for e in skipped] == ["the network has exits or gates already"]


def test_an_exit_is_taken_where_what_it_saves_is_worth_the_risk():
    """Two exits that are sure alike: the earlier one may be wrong more often, for it saves more."""
    plain = object.__new__(thresholds.Plain)
    rng = np.random.default_rng(0)
    sure = rng.uniform(size=(2, 2000)).astype(np.float32)
    truth = rng.integers(0, 4, 2000)
    wrong = rng.uniform(size=(2, 2000)) > 0.5 + 0.5 * sure  # how often falls with how sure they are
    said = np.where(wrong, (truth + 1) % 4, truth)
    scores = {name: np.eye(4)[answer] for name, answer in (("a", said[0]), ("b", said[1]), ("last", truth))}
    plain.exits, plain.answers, plain.final, plain.saved = ["a", "b"], ["a", "b"], "last", [0.6, 0.2]
    plain.compared = {"a": "sure a", "b": "sure b"}
    plain.calls = [{"sure a": sure[0], "sure b": sure[1], **scores}]
    found = list(plain.settings())
    assert found[0] == {"a": 0.0, "b": 0.0}
    assert sum(one["a"] <= one["b"] for one in found) > 0.9 * len(found)
    assert sum(one["a"] < one["b"] for one in found) > 0.5 * len(found)
    assert [one["a"] for one in found] == sorted(one["a"] for one in found)
    # the surest samples of a deep network are as sure as float32 can say
    plain.calls[0]["sure a"] = np.float32(1) - rng.exponential(1e-6, 2000).astype(np.float32)
    assert len({one["a"] for one in plain.settings()}) > 2


def test_what_an_exit_saves_is_the_work_behind_it(made: Made):
    (part,) = pipeline.export_float(made.work, made.settled.module).parts
    plain = thresholds.Plain(part.model, part.routes, made.work.task)
    first, second = plain.saved
    assert 0.9 > first > second > 0.0


def test_the_example_runs(tmp_path):
    cost = {"search.cost": {"trials": 2, "minutes": 5}, "search.sessions": 2}
    small = {"model.epochs": 2, "search.fidelity.full_epochs": 1, **cost}
    job = load.job("examples/early_exit.yaml", {"out": str(tmp_path / "out"), **small})
    summary = run(job, serial=True, console=Console(file=io.StringIO()))
    assert (summary.state, summary.trials) == ("finished", 2)
    assert not summary.counts["failed"], summary.failures
    assert (tmp_path / "out" / "report.html").is_file()
    space = Header.model_validate(journal.read(tmp_path / "out" / "journal.jsonl").events[0]).space
    assert {gene.op for gene in space.genes} >= {"exit", "skip", "prune", "quantize"}
