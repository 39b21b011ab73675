"""The summary, the table and the page: from real searches on a closed-form problem, read back from their files."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save as save_arrays

from autocompress import artifact, charts, pareto, report, summary
from autocompress import space as sp
from autocompress.certify import certify, choose
from autocompress.controller import Controller, Header, run_serial
from autocompress.journal import Journal
from autocompress.picture import network
from autocompress.searchers.evolution import Evolution
from autocompress.summary import Arm, Finding, Summary
from autocompress.tasks import InputSpec
from autocompress.testing.closed_form import ClosedForm
from autocompress.types import (
    Candidate,
    Choice,
    Cost,
    Entry,
    Fidelity,
    Interval,
    Outcome,
    Policy,
    Quality,
    Receipt,
    Rule,
    SearchPlan,
    Site,
    Stage,
    State,
    Trial,
    UserError,
)
from autocompress.wording import describe


@dataclass
class Run:
    """A search that was run to its end or part of it."""

    out: Path
    problem: ClosedForm
    header: Header
    trials: tuple[Trial, ...]


def search(out: Path, *, devices: int = 2, trials: int = 40, stop_after: int = 0, **options: float) -> Run:
    """Run evolution on the closed-form problem and leave its journal in `out`."""
    problem = ClosedForm(20, devices=devices, fail_one_in=9, **options)  # type: ignore[arg-type]
    parent = problem.trial(0, sp.parent(problem.space))
    facts = problem.facts.model_copy(
        update={
            "baseline": parent.outcome.readings,
            "baseline_quality": next(iter(parent.outcome.quality.values())),
            "baseline_size_mb": 1.0,
            "fingerprints": {"abcd1234": {"processor": "made-up <processor>", "flags": ["avx2", "fma"]}},
            "versions": {"python": "3.11.0"},
        }
    )
    plan = SearchPlan(cost=Cost(trials=trials, minutes=5), fidelity=Fidelity(rungs=(0.3, 1.0)), seed=3)
    job = {"task": "<i>digits</i>", "model": {"builder": "convnet"}, "space": problem.space.name, "out": "runs/x"}
    header = Header(
        space=problem.space, goals=problem.goals, limit=problem.limit, plan=plan, facts=facts, more={"job": job}
    )

    def searcher(h: Header) -> Evolution:
        return Evolution(h.space, h.goals, h.limit, h.facts, h.plan.seed)

    with Journal.create(out / "journal.jsonl", header.event()) as journal:
        controller = Controller.begin(journal, searcher)
        controller.control(parent.outcome.model_copy(update={"macs": 1_000_000, "parameters": 5_000}))

        def hear(event: dict[str, object]) -> None:
            if stop_after and event["number"] == stop_after and event["state"] == "running":
                raise KeyboardInterrupt

        run_serial(controller, problem, hear)
        return Run(out, problem, header, controller.trials)


def finish(run: Run, state: summary.RunState = "finished") -> Summary:
    """Certify, write artifacts, summary and table, as the end of a search does."""
    problem, findings = run.problem, []
    for goal in problem.goals:
        full = [t for t in run.trials if t.number and t.state is State.DONE]

        def one(trial: Trial, goal=goal):
            found = trial.outcome
            return certify(
                found.readings.__getitem__, goal, quality=found.quality, size_mb=found.size_mb, limit=problem.limit
            )

        chosen = choose(pareto.best(full, goal, problem.limit, 3), one)
        assert chosen is not None
        candidate = sp.decode(problem.space, chosen.winner.genotype)
        path = f"best/{goal.name}"
        artifact.write(
            run.out / path,
            model=b"onnx",
            weights=save_arrays({f"{site.name}.weight": np.zeros((5, 2)) for site in run.header.facts.sites[:-1]}),
            policy=artifact.PolicyFile(
                builder="convnet", arch=candidate.arch, policy=candidate.policy, sites=run.header.facts.sites
            ),
            manifest=artifact.Manifest(
                goal=goal, certificate=chosen.certificate, input=InputSpec(shape=(1,)), task="digits", builder="convnet"
            ),
        )
        quality = next(iter(chosen.winner.outcome.quality.values())).model_copy(update={"split": "test"})
        findings.append(
            Finding(
                goal=goal.name,
                number=chosen.winner.number,
                candidate=candidate,
                certificate=chosen.certificate,
                test=dict.fromkeys(problem.profiles, quality),
                path=path,
            )
        )
    arm = Arm(
        name="int8",
        ran=True,
        selection=run.trials[0].outcome.quality,
        readings=run.trials[0].outcome.readings,
        size_mb=dict.fromkeys(problem.profiles, 0.25),
    )
    found = summary.build(
        state=state,
        space_=problem.space,
        goals=problem.goals,
        limit=problem.limit,
        facts=run.header.facts,
        trials=run.trials,
        findings=findings,
        arms=[arm],
        baseline_test=run.header.facts.baseline_quality,
        searcher="evolution",
        minutes=0.5,
        seconds={"parent": 2.0},
        job=run.header.more["job"],
    )
    table = summary.front_csv(problem.space, problem.goals, problem.limit, run.header.facts, run.trials)
    summary.write(run.out, found, table)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Summary]:
    run = search(tmp_path_factory.mktemp("finished"))
    return run, finish(run)


class Page(HTMLParser):
    """Checks that tags close and collects what the page would load."""

    VOID = {"meta", "link", "br", "input", "img", "circle", "rect", "line", "path", "polyline", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


# --- summary and table -----------------------------------------------------------------------------------------------


def test_summary_says_what_was_found_in_the_projects_conventions(finished: tuple[Run, Summary]):
    run, found = finished
    assert summary.read(run.out) == found
    data = json.loads((run.out / "summary.json").read_text())
    assert data["trials"] == sum(data["counts"].values()) == 40
    assert set(data["counts"]) == {state.value for state in State}
    assert data["winners"].keys() | data["closest"].keys() == {"device-a", "device-b", "all-devices"}
    for winner in found.winners.values():
        trial = next(t for t in run.trials if t.number == winner.number)
        for profile, figures in winner.devices.items():
            reading = trial.outcome.readings[profile]
            assert figures.speedup.value == pytest.approx(1 / reading.ratio.value)
            assert figures.speedup.low <= figures.speedup.value <= figures.speedup.high
            assert figures.drop_test is not None
            assert figures.drop_test.value == pytest.approx(
                found.baseline.test.value.value - figures.test.value.value  # type: ignore[union-attr]
            )
        assert winner.speedup == min(f.speedup.value for f in winner.devices.values())
        assert winner.certified
    assert found.controls["int8"].ran
    assert found.controls["int8"].devices["device-a"].size_ratio == pytest.approx(4.0)
    assert {name for name, arm in found.controls.items() if not arm.ran} == {"uniform", "random"}
    assert found.seconds["parent"] == 2.0
    assert found.baseline.macs == 1_000_000


def test_failures_of_one_kind_are_one_line():
    def failed(number: int, reason: str, state: State = State.FAILED) -> Trial:
        return Trial(number=number, genotype=(), state=state, outcome=Outcome(reason=reason))

    groups = summary.failures([
        failed(1, "parity: relative error 0.0132 above 1e-3"),
        failed(2, "loss is NaN"),
        failed(3, "parity: relative error 0.2 above 1e-3"),
        failed(4, "over every budget: a 3 ms", State.INFEASIBLE),
        failed(5, ""),
    ])  # fmt: skip
    assert [(g.state, g.count, g.trials) for g in groups] == [
        ("failed", 2, (1, 3)),
        ("failed", 1, (5,)),
        ("failed", 1, (2,)),
        ("infeasible", 1, (4,)),
    ]
    assert groups[0].reason == "parity: relative error \u2026 above \u2026"
    assert groups[1].reason == "no reason given"


shares = st.floats(0, 1).flatmap(
    lambda v: st.tuples(st.just(v), st.floats(0, v), st.floats(v, 1)).map(
        lambda t: Quality(metric="m", split="test", value=Interval(value=t[0], low=t[1], high=t[2]), samples=100)
    )
)


@given(shares, shares)
def test_a_drop_and_its_interval(before: Quality, after: Quality):
    found = summary.drop(before, after)
    assert found is not None
    assert found.low <= found.value <= found.high
    assert found.value == before.value.value - after.value.value
    # Square and add lies between the wider of the two and their sum (Newcombe 1998).
    assert (
        found.high - found.value <= before.value.high - before.value.value + after.value.value - after.value.low + 1e-9
    )
    assert summary.drop(None, after) is None


def test_the_table_has_one_row_per_measured_trial_and_device(finished: tuple[Run, Summary]):
    run, _ = finished
    with (run.out / "front.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == summary.CSV_COLUMNS
    measured = [(t.number, profile) for t in run.trials for profile in t.outcome.readings]
    assert sorted((int(row["number"]), row["device"]) for row in rows) == sorted(measured)
    for goal in run.problem.goals:
        named = {int(row["number"]) for row in rows if goal.name in row["front"].split("+")}
        assert named == {t.number for t in pareto.front(run.trials, goal, run.problem.limit)}
    done = next(row for row in rows if row["state"] == "done" and row["number"] != "0")
    assert float(done["speedup"]) == pytest.approx(1 / float(done["ratio"]))
    assert done["budget_met"] in ("True", "False")
    assert re.fullmatch(r"[0-9a-f]{8}", done["genotype"])


def test_a_candidate_in_a_few_words():
    rules = [Rule(site=f"s{i}", op="prune", settings={"ratio": r}) for i, r in enumerate((0.25, 0.5, 0.5))]
    rules += [Rule(site=f"s{i}", op="quantize", settings={"bits": "int8"}) for i in range(4)]
    rules += [Rule(site=".", op="distill", settings={"weight": 0.9, "temperature": 2.0})]
    candidate = Candidate(arch={"depth": 2, "width": 1.0}, policy=Policy(rules=tuple(rules)))
    words = describe(candidate, {"depth": 3, "width": 1.0})
    assert words == "depth 2 \u00b7 prune \u00d73 (0.25\u20130.5) \u00b7 int8 \u00d74 \u00b7 distill 0.9"
    assert describe(Candidate(arch={"depth": 3}, policy=Policy()), {"depth": 3}) == "unchanged"


def test_what_an_op_does_is_named_by_its_kind_and_rules_that_ask_nothing_are_not():
    asked: list[tuple[str, str, dict[str, Choice]]] = [
        ("a", "block", {"kind": "drop"}),
        ("b", "block", {"kind": "drop"}),
        ("c", "block", {"kind": "merge"}),
        ("d", "replace", {"kind": "separable"}),
        ("e", "replace", {"kind": "keep"}),
        ("e", "prune", {"importance": "taylor", "ratio": 0.5}),
        ("f", "prune", {"importance": "taylor", "ratio": 0.0}),
        ("g", "lowrank", {"method": "tucker", "rank": 0.25}),
        ("h", "lowrank", {"rank": 1.0, "data": True}),
        ("i", "sparsify", {"ratio": 0.5, "pattern": "2:4"}),
        ("j", "sparsify", {"ratio": 0.7, "pattern": "unstructured"}),
        (".", "qat", {"bits": "int8"}),
        ("k", "quantize", {"bits": "int8-dynamic"}),
        (".", "quantize", {"equalize": True, "correct_bias": False}),
        ("l", "quantize", {"bits": "float", "calibration": "minmax"}),
        ("m", "store", {"codec": "codebook"}),
        (".", "distill", {"weight": 0.9, "kind": "attention"}),
        (".", "mine", {"share": 0.2}),
    ]
    rules = tuple(Rule(site=site, op=op, settings=settings) for site, op, settings in asked)
    words = describe(Candidate(arch={}, policy=Policy(rules=rules)))
    assert words.split(" \u00b7 ") == [
        "drop block \u00d72", "merge block", "replace separable", "prune 0.5", "lowrank tucker 0.25",
        "sparsify 2:4 0.5", "sparsify 0.7", "qat int8", "int8-dynamic", "equalized", "store codebook",
        "distill attention 0.9", "mine 0.2",
    ]  # fmt: skip


def test_a_broken_summary_is_a_user_error(tmp_path: Path):
    assert summary.read(tmp_path) is None
    (tmp_path / "summary.json").write_text('{"format": 1, "surprise": 2}')
    with pytest.raises(UserError, match=r"summary\.json: not a summary"):
        summary.read(tmp_path)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing(finished: tuple[Run, Summary]):
    run, found = finished
    path = report.write(run.out)
    assert path == run.out / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert len(text) < 1_000_000
    for words in ("certified", "Quality over latency", "What failed, and why", "this candidate fails by design"):
        assert words in page.words
    assert "Unfinished run" not in page.words
    for winner in found.winners.values():
        assert f"#{winner.number}" in page.words
        assert f"autocompress apply runs/x/{winner.path}" in page.words or winner.path in page.words
    assert "not run in this search" in page.words
    assert "made-up <processor>" in page.words
    assert "avx2 fma" in page.words
    assert [p.name for p in run.out.iterdir() if p.name.startswith(".")] == []


def test_what_users_wrote_is_escaped(finished: tuple[Run, Summary]):
    text = report.render(finished[0].out)
    assert "<i>digits" not in text
    assert "&lt;i&gt;digits" in text
    assert "made-up <processor>" not in text


def test_every_trial_stands_in_every_panel(finished: tuple[Run, Summary]):
    run, found = finished
    text = report.render(run.out)
    panels = re.findall(r'<svg [^>]*aria-label="accuracy over latency.*?</svg>', text, flags=re.DOTALL)
    assert len(panels) == 2
    for profile, panel in zip(("device-a", "device-b"), panels, strict=True):
        shown = {int(n) for n in re.findall(r'data-n="(\d+)"', panel)}
        assert shown == {t.number for t in run.trials if t.number and profile in t.outcome.readings}
        assert "budget 1.25\u00d7" in panel
        assert "accuracy floor" in panel
        assert 'class="int8"' in panel
        assert 'class="baseline"' in panel
    assert found.winners


def test_an_unfinished_run_says_so_and_may_be_looked_at_while_it_is_written(tmp_path: Path):
    search(tmp_path, stop_after=20)
    with Journal.open(tmp_path / "journal.jsonl"):  # the writer's lock is held
        page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert "Unfinished run." in page.words
    assert "20 of at most 40 trials so far" in page.words
    assert "autocompress resume runs/x" in page.words
    assert "not run so far" in page.words
    assert "not certified" in page.words
    assert not (tmp_path / "summary.json").exists()
    assert report.load(tmp_path).trials[20].state is State.RUNNING


def test_an_interrupted_run_keeps_what_was_certified_until_it_goes_on(tmp_path: Path):
    run = search(tmp_path, stop_after=20)
    finish(run, "interrupted")
    page = Page(report.render(tmp_path))
    assert "Interrupted run." in page.words
    assert "\u2714 certified" in page.words
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"number": 20, "state": "failed", "outcome": {"reason": "x"}}) + "\n")
    assert "Unfinished run." in Page(report.render(tmp_path)).words


def test_a_run_with_nothing_but_a_header_and_a_torn_line(tmp_path: Path):
    run = search(tmp_path, trials=2)
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().split(b"\n")[0] + b'\n{"number": 1, "sta')
    page = Page(report.render(tmp_path))
    assert "Nothing measured yet" in page.words
    assert run.header.limit.metric == "accuracy"


def test_no_candidate_met_the_budget(tmp_path: Path):
    run = search(tmp_path, devices=1, speedup=40.0, drop=0.01)
    found = summary.build(
        state="finished",
        space_=run.problem.space,
        goals=run.problem.goals,
        limit=run.problem.limit,
        facts=run.header.facts,
        trials=run.trials,
    )
    assert found.winners == {}
    assert set(found.closest) == {"device-a"}
    assert not found.closest["device-a"].budget_met
    summary.write(tmp_path, found, "")
    page = Page(report.render(tmp_path))
    assert "No candidate met every limit" in page.words
    assert "limits not met" in page.words


@pytest.mark.parametrize("text", ["", "not json\n", '{"number":0,"state":"header","format":1,"space":3}\n'])
def test_a_folder_without_a_run_is_a_user_error(tmp_path: Path, text: str):
    with pytest.raises(UserError, match=r"journal\.jsonl"):
        report.write(tmp_path)
    (tmp_path / "journal.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"journal\.jsonl"):
        report.write(tmp_path)


def test_shapes_come_from_the_header_alone(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(save_arrays({"a.weight": np.zeros((3, 2)), "b": np.zeros(4)}))
    assert report.shapes_of(path) == {"a.weight": (3, 2), "b": (4,)}
    for bad in (b"", b"12345678", (10**12).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="not a readable safetensors"):
            report.shapes_of(path)


# --- geometry --------------------------------------------------------------------------------------------------------


@given(st.floats(1e-4, 1e4), st.floats(1.01, 1e4))
def test_log_ticks_lie_inside(low: float, factor: float):
    found = charts.log_ticks(low, low * factor)
    assert 2 <= len(found) <= 16
    assert all(low * 0.999 <= tick <= low * factor * 1.001 for tick in found)
    assert found == sorted(found)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), st.integers(2, 8))
def test_linear_ticks_are_few_and_inside(low: float, width: float, count: int):
    found = charts.ticks(low, low + width, count)
    assert len(found) <= count + 1
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in found)


@given(st.floats(0.01, 100), st.floats(1.1, 100), st.floats(-1e3, 1e3))
def test_a_scale_stays_between_its_ends(low: float, factor: float, value: float):
    for log in (False, True):
        at = charts.Scale(low, low * factor, 50, 500, log)(value)
        assert 50 <= at <= 500
        assert math.isfinite(at)


def test_the_network_is_read_from_the_shipped_weights():
    sites = (
        Site(name="stem", kind="conv", out_channels=16, in_channels=1, kernel=3),
        Site(name="stages.0.0.conv", kind="conv", out_channels=16, in_channels=16, kernel=3),
        Site(name="stages.0.1.conv", kind="conv", out_channels=16, in_channels=16, kernel=3),
        Site(name="head", kind="linear", out_channels=10, in_channels=16),
    )
    policy = artifact.PolicyFile(
        builder="b",
        policy=Policy(
            rules=(
                Rule(site="stem", op="quantize", settings={"bits": "int8"}),
                Rule(site="stages.0.0.conv", op="prune", settings={"ratio": 0.5}),
                Rule(site="stages.0.0.conv", op="lowrank", settings={"rank": 0.25}),
            )
        ),
        sites=sites,
    )
    shapes = {
        "stem.weight": (16, 1, 3, 3),
        "stages.0.0.conv.0.weight": (2, 16, 3, 3),
        "stages.0.0.conv.1.weight": (8, 2, 1, 1),
        "stages.0.0.conv.1.bias": (8,),
        "head.weight": (10, 16),
    }
    picture = network(policy, shapes)
    stem, pruned, dropped, head = picture.layers
    assert (stem.bits, stem.kept) == ("int8", stem.full)
    assert pruned.kept == pytest.approx(pruned.full / 2, abs=0.2)
    assert pruned.rank == "0.25"
    assert "8 of 16 output channels" in pruned.title
    assert dropped.dropped
    assert not head.dropped
    assert (picture.dropped, picture.int8, picture.factored, picture.pruned) == (1, 1, 1, 1)
    assert [stage.label for stage in picture.stages] == ["stem", "stages.0", "head"]
    guessed = network(policy, {})
    assert [layer.dropped for layer in guessed.layers] == [False] * 4
    assert guessed.layers[1].kept == pytest.approx(guessed.layers[1].full / 2, abs=0.2)


def test_layers_that_were_touched_are_told_apart():
    names = ("conv1", "l.0.a", "l.0.b", "l.1.a", "l.1.b", "l.2.a", "l.2.b", "l.3.a", "l.3.b", "fc")
    layers = [Site(name=name, kind="conv", in_channels=8, out_channels=8, kernel=3) for name in names]
    blocks = [Site(name=name, kind="block", ops=("block",)) for name in ("l.0", "l.1", "l.2")]
    asked: list[tuple[str, str, dict[str, Choice]]] = [
        ("l.0", "block", {"kind": "drop"}),
        ("l.1", "block", {"kind": "merge"}),
        ("l.2", "block", {"kind": "drop"}),  # skipped
        ("l.2.a", "replace", {"kind": "separable"}),
        ("l.2.b", "sparsify", {"ratio": 0.5, "pattern": "unstructured"}),
        ("l.3", "quantize", {"bits": "int8"}),
        ("l.3.b", "quantize", {"bits": "int4"}),
        (".", "quantize", {"equalize": True}),
        (".", "qat", {"bits": "int8"}),
        (".", "store", {"codec": "zstd"}),
    ]
    policy = artifact.PolicyFile(
        builder="b",
        policy=Policy(rules=tuple(Rule(site=site, op=op, settings=settings) for site, op, settings in asked)),
        receipts=(Receipt(op="block", entries=(Entry(site="l.2", status="skipped", why="w"),)),),
        sites=(*layers, *blocks),
    )
    gone = ("l.0.a", "l.0.b", "l.1.a")
    shapes = {f"{name}.weight": (8, 8, 3, 3) for name in names if name not in gone}
    picture = network(policy, shapes)
    found = dict(zip(names, picture.layers, strict=True))
    assert [name for name, layer in found.items() if layer.dropped] == list(gone)
    assert {name for name, layer in found.items() if layer.fill == "none"} == {"conv1", "fc"}
    assert (found["l.3.a"].fill, found["l.3.b"].fill) == ("int8", "int4")
    assert (found["l.1.b"].form, found["l.2.a"].form) == ("merged", "separable")
    assert found["l.2.b"].marks == "50 % zeros"
    assert "merged into" in found["l.1.a"].title
    assert [block.label for block in picture.blocks] == ["dropped", "merged"]
    assert {(words, count) for _, words, count in picture.fills} == {
        ("not touched", 2), ("float", 3), ("int8", 1), ("int4", 1),
    }  # fmt: skip
    assert (picture.dropped, picture.replaced, picture.zeros) == (3, 2, 1)


def test_dropped_neighbours_have_one_box_and_packed_weights_their_fill():
    sites = tuple(Site(name=f"l.{n}.a", kind="conv", in_channels=8, out_channels=8, kernel=3) for n in range(6))
    blocks = tuple(Site(name=f"l.{n}", kind="block", ops=("block",)) for n in range(6))
    kinds = {1: "drop", 2: "drop", 3: "merge", 4: "drop"}
    rules = [Rule(site=f"l.{n}", op="block", settings={"kind": kind}) for n, kind in kinds.items()]
    rules += [Rule(site=".", op="quantize", settings={"bits": "int8"})]
    rules += [Rule(site="l.5", op="quantize", settings={"weights": "int4"})]
    picture = network(artifact.PolicyFile(builder="b", policy=Policy(rules=tuple(rules)), sites=(*sites, *blocks)), {})
    assert [block.label for block in picture.blocks] == ["dropped", "merged", "dropped"]
    first, _, last = picture.blocks
    assert (first.x, last.x) == (picture.layers[1].x, picture.layers[4].x)
    assert first.x + first.width == pytest.approx(picture.layers[2].x + picture.bar)
    assert [layer.fill for layer in picture.layers if not layer.dropped] == ["int8", "int8", "packed"]
    assert {words: count for _, words, count in picture.fills} == {"int8": 2, "int8, weights in 4 bits": 1}


def test_samples_leave_behind_exits_and_before_all_layers():
    names = ("conv1", "l.0.a", "l.1.a", "fc")
    sites = tuple(Site(name=name, kind="conv", in_channels=8, out_channels=8, kernel=3) for name in names)
    marks = {}
    for routes in ((), ("little.exit",), ("l.0.exit",), ("l.1.gate",)):
        entries = [Entry(site=route, facts={"threshold": 0.5}, achieved={"share": 0.84}) for route in routes]
        told = {"u8s8": (Receipt(op="route", entries=(*entries, Entry(site="."))),)}
        marks[routes] = network(artifact.PolicyFile(builder="b", sites=sites, numeric=told), {})
    plain, before, behind, gated = marks.values()
    assert not plain.exits
    assert [one.label for one in (*before.exits, *behind.exits)] == ["84 % leave", "84 % leave"]
    assert plain.layers[0].x < before.exits[0].x < before.layers[0].x
    assert behind.layers[1].x + behind.bar < behind.exits[0].x < behind.layers[2].x
    assert not gated.exits
    assert [one.label for one in gated.blocks] == ["84 % run"]


def test_stages_of_a_deep_network_are_its_blocks():
    names = [
        "proj",
        *(f"encoder.layers.layer_{i}.{part}" for i in range(8) for part in ("q", "k", "v", "mlp.0")),
        "head",
    ]
    sites = tuple(Site(name=name, kind="linear", in_channels=8, out_channels=8) for name in names)
    picture = network(artifact.PolicyFile(builder="b", sites=sites), {})
    assert [stage.label for stage in picture.stages] == ["proj", *(f"layer_{i}" for i in range(8)), "head"]
    assert all(layer.fill == "none" for layer in picture.layers)


def test_labels_over_one_another_move_apart():
    near = [
        charts.Mark(100, 50, "int8", "", label="int8"),
        charts.Mark(180, 50, "baseline", "", label="baseline", left=True),
    ]
    moved = charts._readable([*near, charts.Mark(300, 50, "winner", "", label="2x")])
    assert moved[0].up == moved[2].up == near[0].up
    assert moved[1].up > 0


def test_stages_of_several_winners_share_columns(finished: tuple[Run, Summary]):
    one = next(iter(finished[1].winners.values()))
    quality = next(found.selection for found in one.devices.values())
    assert quality is not None

    def staged(*names: str) -> summary.Winner:
        return one.model_copy(update={"stages": tuple(Stage(name=name, quality=quality) for name in names)})

    winners = [staged("inherited", "prune", "trained", "shipped"), staged("inherited", "block", "lowrank", "trained")]
    assert charts.steps(winners) == ("inherited", "block", "lowrank", "prune", "trained", "shipped")


def test_a_control_arm_that_holds_what_no_candidate_holds_is_named(finished: tuple[Run, Summary]):
    found = finished[1]
    goal = next(goal for goal in found.goals if len(goal.budgets) == 1)
    profile = goal.budgets[0].profile
    nearest = {**found.winners, **found.closest}[goal.name]
    arm = found.controls["int8"]
    figures = arm.devices[profile].model_copy(update={"budget_met": True})
    assert figures.selection is not None

    def told(**changes: Any) -> str:
        control = arm.model_copy(update={"devices": {profile: figures.model_copy(update=changes)}})
        limit = found.limit.model_copy(update={"floor": figures.selection.value.value})  # type: ignore[union-attr]
        missed = {"winners": {}, "closest": {goal.name: nearest}, "controls": {"int8": control}, "limit": limit}
        return summary.simpler(found.model_copy(update=missed), goal.name)

    assert told().startswith("int8 alone, without a search, holds")
    assert told(budget_met=False) == told(selection=None) == ""
    assert summary.simpler(found.model_copy(update={"closest": {}}), goal.name) == ""


def test_a_page_whose_winners_went_through_different_stages(tmp_path: Path):
    run = search(tmp_path)
    written = finish(run)
    quality = next(iter(run.trials[0].outcome.quality.values()))
    paths = (("inherited", "prune", "batch norm", "trained", "shipped"), ("inherited", "trained", "shipped"))
    winners = {**written.winners, **written.closest}
    staged = {
        goal: winner.model_copy(
            update={
                "number": index + 1,
                "stages": tuple(Stage(name=name, quality=quality) for name in paths[index % 2]),
                "fused": {"Relu": -3, "nodes": -3},
            }
        )
        for index, (goal, winner) in enumerate(winners.items())
    }
    changed = written.model_copy(
        update={
            "winners": {goal: staged[goal] for goal in written.winners},
            "closest": {goal: staged[goal] for goal in written.closest},
        }
    )
    (tmp_path / "summary.json").write_text(changed.model_dump_json())
    page = report.render(tmp_path)
    assert "Where quality went on the way" in page
    assert "3 nodes fewer" in page
