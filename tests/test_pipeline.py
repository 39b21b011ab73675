import json

import numpy as np
import pytest
import torch

from autocompress import export
from autocompress.evaluator import Checkpoint, Evaluator
from autocompress.models.convnet import ConvNet
from autocompress.ops.lowrank import LowRank
from autocompress.ops.prune import Prune
from autocompress.ops.quantize import Quantize
from autocompress.pareto import at_best
from autocompress.parts import make_ops
from autocompress.pipeline import Work, load_weights, ordered, release, rerelease, reshape, shape
from autocompress.store import Store
from autocompress.tasks.digits import Digits
from autocompress.train import Training
from autocompress.types import (
    Assignment,
    Budget,
    Candidate,
    Interval,
    LatencyModel,
    Numeric,
    Policy,
    Profile,
    Reading,
    Receipt,
    Rule,
    Screen,
    State,
    TrialFailure,
)
from tests.small_search import builder

PROFILES = (
    Profile(name="one"),
    Profile(name="two", threads=2),
    Profile(name="signed", numeric=Numeric(activation="int8")),
)


def policy(*rules: tuple[str, str, dict]) -> Policy:
    return Policy(rules=tuple(Rule(site=site, op=op, settings=settings) for site, op, settings in rules))


MIXED = policy(
    ("stages.0.0.conv1", "prune", {"ratio": 0.5, "importance": "l2"}),
    ("stages.2.0.conv1", "lowrank", {"rank": 0.25}),
    ("stages.0.0.conv1", "quantize", {"bits": "int8"}),
    ("stages.0.0.conv2", "quantize", {"bits": "int8"}),
    ("stages.2.0.conv2", "quantize", {"bits": "int8"}),
    (".", "distill", {"weight": 0.5, "temperature": 2.0}),
)
CANDIDATE = Candidate(arch={"depth.2": 1}, policy=MIXED)


@pytest.fixture(scope="module")
def work() -> Work:
    torch.manual_seed(0)
    family = builder()
    parent = family.build({})
    Training(parent, Digits(), epochs=3, seed=0).run_to(1.0)
    ops = make_ops(("prune", "lowrank", "sparsify", "qat", "quantize", "distill"))
    return Work(builder=family, task=Digits(), ops=ops, parent=parent.eval(), profiles=PROFILES, epochs=1.0)


class Clock:
    """Stands where a station stands: latency by file size, so that a test needs no quiet machine."""

    def __init__(self, ms_per_mb: float = 1.0) -> None:
        self.ms_per_mb, self.asked = ms_per_mb, []

    def __call__(self, profile_name: str, model: bytes, key: str, *, again: bool = True) -> Reading:
        profile = profile_name
        self.asked.append((profile, key))
        ms = self.ms_per_mb * len(model) / 1e6
        spread = Interval(value=ms, low=ms, high=ms)
        return Reading(
            profile=profile, ms=spread, p95_ms=spread, baseline_ms=spread, ratio=spread, samples=1, rounds=1, seconds=0
        )


def assignment(candidate: Candidate = CANDIDATE, **changes: object) -> Assignment:
    fields = {"number": 1, "attempt": 1, "genotype": (0,), "candidate": candidate, "rungs": (0.5, 1.0), "seed": 7}
    return Assignment(**(fields | changes))


def test_structure_is_pruned_before_it_is_split_whatever_the_policy_writes_first(work: Work) -> None:
    backwards = Policy(rules=tuple(reversed(MIXED.rules)))
    assert [name for name, _, _ in ordered(backwards, work.ops, "structure")] == ["prune", "lowrank"]
    assert [name for name, _, _ in ordered(backwards, work.ops, "numeric")] == ["quantize"]


def test_a_rule_of_an_unknown_op_is_a_failed_trial(work: Work) -> None:
    with pytest.raises(TrialFailure, match="shave"):
        ordered(policy(("stem.conv", "shave", {})), work.ops, "structure")


def test_receipts_alone_rebuild_every_shape_and_the_same_file(work: Work) -> None:
    shaped = shape(work, CANDIDATE)
    receipts = [Receipt.model_validate_json(receipt.model_dump_json()) for receipt in shaped.receipts]
    again = reshape(work.builder, work.ops, CANDIDATE.arch, receipts)
    own, made = shaped.module.state_dict(), again.state_dict()
    assert {name: tensor.shape for name, tensor in own.items()} == {name: t.shape for name, t in made.items()}
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in work.parent.parameters())
    again.load_state_dict(own)
    first = release(work, shaped.module, MIXED)
    for variant, item in first.items():
        numeric = [Receipt.model_validate_json(receipt.model_dump_json()) for receipt in item.receipts]
        assert rerelease(work, again.eval(), numeric).model == item.model, variant


def test_profiles_with_equal_numeric_settings_share_a_file(work: Work) -> None:
    assert set(work.variants) == {"u8s8-pc-minmax", "s8s8-pc-minmax"}
    files = release(work, work.parent, MIXED)
    assert set(files) == set(work.variants)
    assert files["u8s8-pc-minmax"].model != files["s8s8-pc-minmax"].model


def test_the_first_look_has_the_graph_of_the_final_file(work: Work) -> None:
    shaped = shape(work, CANDIDATE)
    look, full = (release(work, shaped.module, MIXED, first_look=first) for first in (True, False))
    for variant in full:
        assert look[variant].key == full[variant].key
        assert look[variant].model != full[variant].model  # ranges of 32 images are not those of all


def test_an_evaluation_goes_latency_rung_done_and_measures_each_graph_once(work: Work, tmp_path) -> None:
    clock, store = Clock(), Store(tmp_path)
    budgets = [Budget(profile=profile.name, latency_ms=10) for profile in PROFILES]
    (rung, at_rung), (done, outcome) = Evaluator(work, budgets, store, clock).evaluate(assignment())
    assert (rung, done) == (State.RUNG, State.DONE)
    assert (at_rung.fidelity, outcome.fidelity) == (0.5, 1.0)
    assert [profile for profile, _ in clock.asked] == ["one", "two", "signed"]
    assert set(outcome.quality) == {"one", "two", "signed"}
    assert outcome.quality["one"].split == "selection"
    assert outcome.quality["one"].value.value > 0.3  # three epochs of a thin parent, one of the candidate
    assert 0 < outcome.macs < 10**8
    assert outcome.parameters > 0
    assert {"structure", "export", "measure", "train", "quality"} <= set(outcome.seconds)
    kept = json.loads(store.get(outcome.files["receipts"]))
    assert [receipt["op"] for receipt in kept["structure"]] == ["prune", "lowrank"]
    model = store.get(outcome.files["model:u8s8-pc-minmax"])
    module = reshape(work.builder, work.ops, CANDIDATE.arch, [Receipt.model_validate(r) for r in kept["structure"]])
    load_weights(module, store.get(outcome.files["weights"]))
    made = rerelease(work, module, [Receipt.model_validate(r) for r in kept["numeric"]["u8s8-pc-minmax"]])
    assert made.model == model


def test_over_every_budget_ends_before_training(work: Work, tmp_path) -> None:
    budgets = [Budget(profile=profile.name, latency_ms=1e-6) for profile in PROFILES]
    ((state, outcome),) = Evaluator(work, budgets, Store(tmp_path), Clock()).evaluate(assignment())
    assert state is State.INFEASIBLE
    assert "train" not in outcome.seconds
    assert not outcome.quality
    assert outcome.reason.startswith("over every budget before training: ")
    for profile in PROFILES:  # what was found, and what was asked for
        ms = f"{outcome.readings[profile.name].ms.value:.3g} ms"
        assert f"{profile.name} {ms} (1e-06 ms)" in outcome.reason


def test_what_is_predicted_to_be_far_over_every_budget_is_not_measured(work: Work, tmp_path) -> None:
    clock, budgets = Clock(), [Budget(profile=profile.name, latency_ms=10) for profile in PROFILES]
    model, weighed = LatencyModel(units={"Conv": 0.001}, usual=0.0, always=0.2, factor=1.2), []

    def weigh(profile_name: str, model: bytes, key: str) -> dict[str, float]:
        assert export.graph_hash(model, weights=False) == key
        weighed.append(profile_name)
        return {"Conv": 700.0, "Add": 3.0}

    for most, expected in ((0.5, State.INFEASIBLE), (0.76, State.RUNG)):
        screen = {profile.name: Screen(model=model, most=most) for profile in PROFILES}
        evaluator = Evaluator(work, budgets, Store(tmp_path), clock, weigh)
        state, outcome = next(evaluator.evaluate(assignment(screen=screen)))
        assert state is expected
        assert sorted(weighed) == sorted(outcome.amounts) == sorted(profile.name for profile in PROFILES)
        weighed.clear()
        assert bool(clock.asked) is bool(outcome.readings) is (state is State.RUNG)
        assert ("not measured: one 0.90 times the baseline (the budget: 0.50)" in outcome.reason) is (not clock.asked)


def test_a_file_that_cannot_be_weighed_is_measured_and_a_note_says_so(work: Work, tmp_path) -> None:
    def weigh(profile_name: str, model: bytes, key: str) -> dict[str, float]:
        del model, key
        if profile_name == "one":
            raise TrialFailure("If runs a graph of its own")
        return {"Conv": 700.0}

    model = LatencyModel(units={}, usual=0.0, always=0.9, factor=1.0)
    screen = {profile.name: Screen(model=model, most=0.5) for profile in PROFILES}
    evaluator = Evaluator(work, (), Store(tmp_path), Clock(), weigh)
    state, outcome = next(evaluator.evaluate(assignment(screen=screen)))
    assert state is State.RUNG
    assert outcome.amounts == {"two": {"Conv": 700.0}, "signed": {"Conv": 700.0}}
    (note,) = [one for one in outcome.notes if "predicted" in one]
    assert note == "one: no latency is predicted: If runs a graph of its own"


def test_one_met_budget_is_enough_to_go_on(work: Work, tmp_path) -> None:
    budgets = [Budget(profile="one", latency_ms=10), Budget(profile="two", latency_ms=1e-6)]
    state, _ = next(iter(Evaluator(work, budgets, Store(tmp_path), Clock()).evaluate(assignment())))
    assert state is State.RUNG


def test_going_on_from_a_checkpoint_is_the_same_as_never_having_stopped(work: Work, tmp_path) -> None:
    store = Store(tmp_path)
    budgets = [Budget(profile="one", latency_ms=10)]
    whole = list(Evaluator(work, budgets, store, Clock()).evaluate(assignment()))
    checkpoint = whole[0][1].files["checkpoint"]
    clock = Clock()
    ((state, outcome),) = Evaluator(work, budgets, store, clock).evaluate(assignment(start=1, checkpoint=checkpoint))
    assert state is State.DONE
    assert not clock.asked  # its readings are in the checkpoint
    assert outcome.files == whole[1][1].files
    store.keep_only(set())
    ((_, anew),) = Evaluator(work, budgets, store, clock).evaluate(assignment(start=1, checkpoint=checkpoint))
    assert anew.files == whole[1][1].files  # the checkpoint was swept away: only time is lost


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_a_checkpoint_whose_training_is_damaged_is_only_time_lost(work: Work, tmp_path, damage: str) -> None:
    store = Store(tmp_path)
    budgets = [Budget(profile="one", latency_ms=10)]
    whole = list(Evaluator(work, budgets, store, Clock()).evaluate(assignment()))
    checkpoint = whole[0][1].files["checkpoint"]
    path = store.path(Checkpoint.model_validate_json(store.get(checkpoint)).training)
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:100])
    evaluator = Evaluator(work, budgets, store, Clock())
    ((state, anew),) = evaluator.evaluate(assignment(start=1, checkpoint=checkpoint))
    assert state is State.DONE
    assert anew.files == whole[1][1].files
    with pytest.raises(TrialFailure, match="its checkpoint is gone"):
        evaluator.pace(assignment(start=1, checkpoint=checkpoint))


TRAINED = policy(
    ("stages.1.0.conv1", "prune", {"ratio": 0.5, "importance": "l2"}),
    (".", "qat", {"bits": "int8"}),
    (".", "sparsify", {"ratio": 0.5, "scope": "global", "schedule": "gradual"}),
    ("stages.1", "quantize", {"bits": "int8"}),
    ("head", "quantize", {"bits": "int8"}),
    ("nowhere", "sparsify", {"ratio": 0.5}),
)


def test_instruments_live_through_rungs_and_checkpoints_and_are_gone_in_the_end(work: Work, tmp_path) -> None:
    store, budgets = Store(tmp_path), [Budget(profile="one", latency_ms=10)]
    candidate = Candidate(arch={}, policy=TRAINED)
    whole = list(Evaluator(work, budgets, store, Clock()).evaluate(assignment(candidate)))
    checkpoint = whole[0][1].files["checkpoint"]
    ((state, outcome),) = Evaluator(work, budgets, store, Clock()).evaluate(
        assignment(candidate, start=1, checkpoint=checkpoint)
    )
    assert (state, outcome.files) == (State.DONE, whole[1][1].files)
    assert outcome.notes == whole[1][1].notes == ("sparsify nowhere: skipped, no layer is there",)
    kept = json.loads(store.get(outcome.files["receipts"]))
    assert [receipt["op"] for receipt in kept["structure"]] == ["prune", "sparsify", "qat"]
    receipts = [Receipt.model_validate(receipt) for receipt in kept["structure"]]
    assert receipts[1].entries[0].achieved["ratio"] == pytest.approx(0.5, abs=0.01)
    trained = {entry.site for entry in receipts[2].entries}
    assert "head" in trained
    assert all(site == "head" or site.startswith("stages.1.") for site in trained)
    module = reshape(work.builder, work.ops, candidate.arch, receipts)
    load_weights(module, store.get(outcome.files["weights"]))
    assert float((module.head.weight == 0).float().mean()) > 0
    numeric = [Receipt.model_validate(receipt) for receipt in kept["numeric"]["u8s8-pc-minmax"]]
    assert rerelease(work, module, numeric).model == store.get(outcome.files["model:u8s8-pc-minmax"])
    (learned,) = (entry.facts["ranges"]["input"] for entry in receipts[2].entries if entry.site == "head")
    spans = [span for one in numeric for entry in one.entries for span in entry.facts["model"]["ranges"].values()]
    assert learned in [list(span) for span in spans]


def test_a_checkpoint_reads_back(work: Work, tmp_path) -> None:
    store = Store(tmp_path)
    _, outcome = next(iter(Evaluator(work, [], store, Clock()).evaluate(assignment())))
    found = Checkpoint.model_validate_json(store.get(outcome.files["checkpoint"]))
    assert set(found.readings) == {"one", "two", "signed"}
    assert store.has(found.training)


def test_a_builder_that_fails_is_a_failed_trial_with_its_reason(work: Work, tmp_path) -> None:
    class Broken(ConvNet):
        def build(self, arch):
            raise TrialFailure("no such network today")

    broken = Work(builder=Broken(), task=work.task, ops=work.ops, parent=work.parent, profiles=PROFILES)
    ((state, outcome),) = Evaluator(broken, [], Store(tmp_path), Clock()).evaluate(assignment())
    assert (state, outcome.reason) == (State.FAILED, "no such network today")


def test_a_network_that_gives_nan_fails_its_trial(work: Work, tmp_path) -> None:
    class Poisoned(ConvNet):
        def inherit(self, child, parent, arch):
            for parameter in child.parameters():
                parameter.data.fill_(float("nan"))

    family = Poisoned(arch={"resolution": 8, "width.0": 16, "width.1": 32, "width.2": 64})
    poisoned = Work(builder=family, task=work.task, ops=work.ops, parent=work.parent, profiles=PROFILES, epochs=1.0)
    candidate = Candidate(arch={}, policy=Policy())
    *_, (state, outcome) = Evaluator(poisoned, [], Store(tmp_path), Clock()).evaluate(assignment(candidate))
    assert state is State.FAILED
    assert outcome.reason


def test_a_noisy_reading_is_taken_again_and_then_refused(work: Work, tmp_path) -> None:
    class Restless(Clock):
        def __call__(self, profile_name: str, model: bytes, key: str, *, again: bool = True) -> Reading:
            return super().__call__(profile_name, model, key).model_copy(update={"noisy": True})

    clock = Restless()
    budgets = [Budget(profile="two", latency_ms=10)]  # nothing is asked of the first: a noisy reading settles nothing
    *_, (state, outcome) = Evaluator(work, budgets, Store(tmp_path), clock).evaluate(assignment())
    assert state is State.FAILED
    assert "too noisy" in outcome.reason
    assert [profile for profile, _ in clock.asked] == ["one", "two", "signed", "one", "one"]


def test_noise_that_leaves_no_doubt_about_the_budget_does_not_cost_a_trained_trial(work: Work, tmp_path) -> None:
    class Restless(Clock):
        def __call__(self, profile_name: str, model: bytes, key: str, *, again: bool = True) -> Reading:
            wide = Interval(value=0.1, low=0.08, high=0.12)
            found = super().__call__(profile_name, model, key)
            return found.model_copy(update={"noisy": True, "ms": wide, "ratio": wide})

    budgets = [Budget(profile=profile.name, speedup=3) for profile in PROFILES]
    *_, (state, outcome) = Evaluator(work, budgets, Store(tmp_path), Restless()).evaluate(assignment())
    assert state is State.DONE
    assert outcome.readings["one"].noisy
    close = [Budget(profile=profile.name, speedup=10) for profile in PROFILES]
    *_, (state, outcome) = Evaluator(work, close, Store(tmp_path), Restless()).evaluate(assignment())
    assert state is State.FAILED
    assert "too noisy" in outcome.reason


def test_of_noisy_readings_the_surest_counts(work: Work, tmp_path) -> None:
    class Worse(Clock):
        """Noise that grows: an hour later the machine is busier."""

        def __call__(self, profile_name: str, model: bytes, key: str, *, again: bool = True) -> Reading:
            found = super().__call__(profile_name, model, key)
            low = 0.2 / 4 ** sum(profile == profile_name for profile, _ in self.asked)
            wide = Interval(value=2 * low, low=low, high=0.21)
            return found.model_copy(update={"noisy": True, "ms": wide, "ratio": wide})

    budgets = [Budget(profile=profile.name, speedup=3) for profile in PROFILES]
    clock = Worse()
    *_, (state, outcome) = Evaluator(work, budgets, Store(tmp_path), clock).evaluate(assignment())
    assert state is State.DONE
    assert [profile for profile, _ in clock.asked].count("one") == 3
    assert outcome.readings["one"].ratio.low == 0.05  # the first one's


def test_a_noisy_reading_is_infeasible_only_if_its_better_end_is_over_the_budget() -> None:
    interval = Interval(value=2.0, low=1.0, high=3.0)
    noisy = Reading(
        profile="one",
        ms=interval,
        p95_ms=interval,
        baseline_ms=interval,
        ratio=interval,
        samples=9,
        rounds=3,
        noisy=True,
    )
    assert at_best(noisy).ms.high == 1.0
    assert at_best(noisy).ratio.high == 1.0


def test_ops_are_the_ones_of_the_registry(work: Work) -> None:
    assert isinstance(work.ops["prune"], Prune)
    assert isinstance(work.ops["lowrank"], LowRank)
    assert isinstance(work.ops["quantize"], Quantize)


def test_the_file_answers_as_torch_does(work: Work) -> None:
    inputs, _ = next(iter(work.task.batches("selection", 64)))
    files = release(work, work.parent, Policy())
    found = export.predictor(files["u8s8-pc-minmax"].model)(inputs.numpy())
    with torch.no_grad():
        wanted = work.parent(inputs).numpy()
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
