"""The live view: what is drawn, what is printed where nothing can be drawn, and the table at the end."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from autocompress import space as sp
from autocompress import summary
from autocompress.live import Live, Progress, clock, line, result_lines, scatter, show_result, view
from autocompress.testing.closed_form import ClosedForm
from autocompress.types import Cost, Outcome, SearchPlan, State, Trial

PROBLEM = ClosedForm(20, devices=2)
PARENT = PROBLEM.trial(0, sp.parent(PROBLEM.space))
FACTS = PROBLEM.facts.model_copy(
    update={"baseline": PARENT.outcome.readings, "baseline_quality": PARENT.outcome.quality["device-a"]}
)


def progress(trials: int = 20) -> Progress:
    plan = SearchPlan(cost=Cost(trials=trials, minutes=2))
    return Progress(PROBLEM.goals, PROBLEM.limit, plan, space=PROBLEM.space, facts=FACTS, title="digits \u00b7 convnet")


def trials(count: int) -> list[Trial]:
    """Ended trials of random genotypes, and one that failed with a hostile reason."""
    rng = Random(1)
    found = [PROBLEM.trial(i, sp.sample(PROBLEM.space, rng)) for i in range(1, count + 1)]
    bad = Outcome(reason="RuntimeError: [red]\x1b[31mline one\nline two[/red]")
    return [*found, Trial(number=count + 1, genotype=found[0].genotype, state=State.FAILED, outcome=bad)]


def filled(count: int = 12) -> Progress:
    known = progress()
    for at, trial in enumerate(trials(count)):
        known.see(trial.model_copy(update={"state": State.RUNNING, "outcome": Outcome()}), float(at))
        known.see(trial, at + 0.5)
    running = Trial(number=count + 2, genotype=sp.parent(PROBLEM.space), state=State.RUNNING)
    known.see(running, float(count + 2))
    return known


def drawn(known: Progress, width: int, now: float = 20.0) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(view(known, now, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 112, 120, 200])
def test_the_view_fits_every_width(width: int):
    text = drawn(filled(), width)
    assert all(len(row) <= width for row in text.splitlines())
    for words in ("13/20 trials", "1 running", "device-a", "all-devices", "#14", "running", "#13", "failed"):
        assert words in text
    assert "\x1b[31m" not in text
    assert ("accuracy over speedup" in text) == (width >= 112)


def test_the_view_before_anything_is_known():
    known = progress()
    known.stage = "training the parent"
    text = drawn(known, 80, 0.0)
    assert "training the parent" in text
    assert "0/20 trials" in text


def test_what_is_over_is_not_counted_down():
    known = progress(trials=13)
    for at, trial in enumerate(trials(12)):
        known.see(trial, float(at))
    known.stage = "certifying finalists"
    text = drawn(known, 100)
    assert "13/13 trials" in text
    assert "certifying finalists" in text
    assert "0 running" not in text
    assert "left" not in text


def test_time_left_is_the_nearer_of_trials_and_minutes():
    known = progress(trials=20)
    assert known.left(5.0) is None
    for at, trial in enumerate(trials(3)[:2]):
        known.see(trial.model_copy(update={"state": State.RUNNING}), at * 4.0)
        known.see(trial, at * 4.0 + 4.0)
    assert known.elapsed(8.0) == 8.0
    assert known.left(8.0) == pytest.approx(8.0 / 2 * 18)
    assert known.took == {1: 4.0, 2: 4.0}
    known.already = 100.0
    assert known.left(8.0) == pytest.approx(12.0)
    assert known.share(8.0) == pytest.approx(108 / 120)


def test_without_a_terminal_one_plain_line_per_ended_trial():
    file = io.StringIO()
    now = iter(range(1000))
    with Live(progress(), Console(file=file), now=lambda: float(next(now))) as live:
        live.stage("training the parent")
        live.event(PARENT)
        for trial in trials(5):
            live.event(trial.model_copy(update={"state": State.RUNNING, "outcome": Outcome()}))
            live.event(trial)
        live.note("a note\nin two lines")
    rows = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert rows[0] == "training the parent"
    assert len(rows) == 1 + 6 + 1
    for number, row in enumerate(rows[1:7], start=1):
        assert row.startswith(f"[{number}/20 ")
        assert f"#{number} " in row
    assert "line one line two" in rows[6]
    assert rows[7] == "a note in two lines"


def test_a_stage_of_many_steps_says_how_far_it_is():
    known = progress()
    live = Live(known, Console(file=io.StringIO(), force_terminal=True, width=100, _environ={}), now=lambda: 12.0)
    live.stage("probing 40 choices, for at most about 60 s")
    live.step("latency: prune.ratio@stages.0.0.conv1 = 0.5", 10, 40, 33.0)
    for width in (60, 100, 160):
        rows = drawn(known, width, 20.0).splitlines()
        assert all(len(row) <= width for row in rows)
        assert any("prune.ratio@stages.0.0.conv1 = 0.5" in row for row in rows)
        assert any("10 of 40" in row and "about 33s left" in row for row in rows) or width == 60
    live.stage("next")
    assert "10 of 40" not in drawn(known, 100)


def test_without_a_terminal_steps_are_told_now_and_then():
    file, clocked = io.StringIO(), [0.0]
    with Live(progress(), Console(file=file), now=lambda: clocked[0]) as live:
        live.stage("probing 40 choices")
        for done in range(40):
            live.step(f"quality: gene = {done}", done, 40, 40.0 - done)
            clocked[0] += 1.0
    assert file.getvalue().splitlines() == [
        "probing 40 choices",
        *(f"probing 40 choices: {n} of 40, about {40 - n}s left: quality: gene = {n}" for n in (10, 20, 30)),
    ]


def test_an_ascii_file_gets_ascii():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    with Live(progress(), Console(file=file)) as live:
        for trial in trials(2):
            live.event(trial)
    show_result(Console(file=file), summarised(), Path("out"))
    file.flush()
    assert raw.getvalue().decode("ascii").count("\n") >= 4


def test_quiet_says_nothing():
    file = io.StringIO()
    with Live(progress(), Console(file=file), quiet=True) as live:
        live.stage("x")
        live.event(trials(1)[0])
        live.note("y")
    assert file.getvalue() == ""


def test_in_a_terminal_it_draws_and_leaves_nothing_behind():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, height=40, legacy_windows=False, _environ={})
    with Live(progress(), console) as live:
        for trial in trials(4):
            live.event(trial)
        live.note("kept")
    assert "kept" in file.getvalue()
    assert "\x1b[" in file.getvalue()


def test_a_line_says_why_and_how_fast():
    known = filled()
    done = next(t for t in known.searched if t.state is State.DONE)
    text = line(known, done, 20.0)
    assert f"#{done.number} done" in text
    assert "\u00d7 device-a" in text
    assert "accuracy 0." in text
    failed = next(t for t in known.searched if t.state is State.FAILED)
    assert "RuntimeError" in line(known, failed, 20.0)


def summarised(**more: object) -> summary.Summary:
    return summary.build(
        state="finished",
        space_=PROBLEM.space,
        goals=PROBLEM.goals,
        limit=PROBLEM.limit,
        facts=FACTS,
        trials=[PARENT, *trials(30)],
        minutes=1.5,
    )


def test_the_end_is_a_table_in_a_terminal_and_facts_elsewhere():
    found = summarised()
    file = io.StringIO()
    show_result(
        Console(file=file, force_terminal=True, width=100, color_system=None), found, Path("o"), Path("o/r.html")
    )
    for words in ("device-a, baseline", "all-devices", "31 trials in 1m30s", "o/r.html", "not certified"):
        assert words in file.getvalue()
    assert all(len(row) <= 100 for row in file.getvalue().splitlines())
    rows = result_lines(found, Path("o"), Path("o/r.html"))
    assert rows[-1] == "report: o/r.html"
    assert any(row.startswith("all-devices: #") for row in rows)


def test_the_end_names_the_folder_of_what_came_closest():
    found = summarised()
    near = {
        name: one.model_copy(update={"path": f"closest/{name}"})
        for name, one in {**found.winners, **found.closest}.items()
    }
    rows = result_lines(found.model_copy(update={"winners": {}, "closest": near}), Path("o"), Path("o/r.html"))
    assert rows[-2:] == ["closest: o/closest", "report: o/r.html"]


def test_the_end_of_a_search_that_found_nothing():
    empty = summary.build(
        state="interrupted",
        space_=PROBLEM.space,
        goals=PROBLEM.goals,
        limit=PROBLEM.limit,
        facts=FACTS,
        trials=[PARENT],
    )
    rows = result_lines(empty, Path("o"))
    assert rows == ["no trial was measured, so there is nothing to choose from", "0 trials in 0s, interrupted"]
    file = io.StringIO()
    show_result(Console(file=file, force_terminal=True, width=80), empty, Path("o"))
    assert "nothing to choose from" in file.getvalue()


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), max_size=30),
    st.integers(2, 40),
    st.integers(1, 9),
    st.none() | st.floats(-20, 20),
    st.none() | st.floats(-20, 20),
)
def test_a_scatter_keeps_its_size(
    points: list[tuple[float, float]], columns: int, rows: int, vertical: float | None, horizontal: float | None
):
    found = scatter(points, columns, rows, (-5, 5), (-5, 5), vertical, horizontal)
    assert len(found) == rows
    assert all(len(text.plain) == columns for text in found)
    dots = sum(any("\u2800" < char <= "\u28ff" for char in text.plain) for text in found)
    assert (dots > 0) == bool(points)


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0s"), (0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7800, "2h10m")]
)
def test_clock(seconds: float, words: str):
    assert clock(seconds) == words
