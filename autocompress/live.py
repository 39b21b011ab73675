"""What the user sees while a search runs: a live view in a terminal, one plain line per ended trial elsewhere.

`Progress` is what is known, `view` and `line` draw it, `Live` is the thin shell that a driver feeds with events.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.padding import Padding
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from autocompress import pareto, space
from autocompress.journal import Event
from autocompress.summary import Summary, Winner, beside, parent_arch, simpler
from autocompress.types import Facts, Goal, Limit, Outcome, SearchPlan, Space, State, Trial
from autocompress.wording import DASH, TIMES, describe, lost, times, wish

STYLE = {
    State.RUNNING: "cyan",
    State.RUNG: "cyan",
    State.DONE: "green",
    State.STOPPED: "yellow",
    State.INFEASIBLE: "magenta",
    State.FAILED: "red",
}
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # dot bits of a cell by row and column
_SHOWN_TRIALS = 6
EVERY = 10.0  # seconds between lines about one stage where nothing is drawn


@dataclass(frozen=True)
class Step:
    """Where a stage of many steps stands."""

    words: str  # what is looked at
    done: int
    total: int
    left: float  # seconds, estimated

    def __str__(self) -> str:
        """For the end of a line."""
        return f"{self.done} of {self.total}, about {clock(self.left)} left: {self.words}"


@dataclass
class Progress:
    """What is known of a run. Times are seconds of `clock`; `already` is what earlier attempts of the run spent."""

    goals: Sequence[Goal]
    limit: Limit
    plan: SearchPlan
    space: Space | None = None
    facts: Facts = field(default_factory=Facts)
    title: str = ""
    stage: str = ""
    stage_began: float = 0.0
    step: Step | None = None  # how far the stage is, where it can say that
    began: float | None = None  # first trial of this process
    already: float = 0.0
    trials: dict[int, Trial] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)  # when the attempt began
    took: dict[int, float] = field(default_factory=dict)
    last: list[int] = field(default_factory=list)  # numbers in the order of their latest event

    def see(self, trial: Trial, now: float) -> None:
        """Take in one event."""
        if trial.number > 0 and self.began is None:
            self.began = now
        if trial.state is State.RUNNING:
            self.since[trial.number] = now
        if trial.state.ended and trial.number in self.since:  # a reading that came late leaves this alone
            self.took[trial.number] = now - self.since.pop(trial.number)
        self.trials[trial.number] = trial
        if trial.number in self.last:
            self.last.remove(trial.number)
        self.last.append(trial.number)

    @property
    def searched(self) -> list[Trial]:
        """All trials but the control."""
        return [trial for number, trial in self.trials.items() if number > 0]

    @property
    def ended(self) -> int:
        """Trials that came to an end."""
        return sum(trial.state.ended for trial in self.searched)

    def elapsed(self, now: float) -> float:
        """Seconds of search."""
        return self.already + (0.0 if self.began is None else now - self.began)

    def left(self, now: float) -> float | None:
        """Seconds until trials or minutes are spent, whichever comes first; None before the first end."""
        if not self.ended:
            return None
        elapsed = self.elapsed(now)
        by_trials = elapsed / self.ended * max(self.plan.cost.trials - self.ended, 0)
        return max(0.0, min(by_trials, self.plan.cost.minutes * 60 - elapsed))

    def share(self, now: float) -> float:
        """How much of the cost is used."""
        cost = self.plan.cost
        return min(1.0, max(self.ended / cost.trials, self.elapsed(now) / (cost.minutes * 60)))


def view(progress: Progress, now: float, width: int) -> RenderableType:
    """The whole picture for a terminal of `width` columns."""
    parts: list[RenderableType] = [_header(progress, now, width), Text()]
    goals = _goals(progress)
    if width >= 112 and (plot := _plot(progress, 38, 7)) is not None:
        side = Table.grid(Column(ratio=1), Column(width=42), expand=True, padding=(0, 1))
        side.add_row(goals, plot)
        parts.append(side)
    else:
        parts.append(goals)
    if progress.last:
        parts += [Text(), _recent(progress, now, width)]
    failed = Counter(
        _one_line(trial.outcome.reason.split(":")[0][:60]) for trial in progress.searched if trial.state is State.FAILED
    )
    if failed:
        words = " · ".join(f"{reason} {TIMES}{count}" for reason, count in failed.most_common(3))
        parts += [Text(), Text(f"failed: {words}", style="red", no_wrap=True, overflow="ellipsis")]
    title = Text.assemble(("autocompress", "bold"), (f"  {progress.title}" if progress.title else "", "default"))
    return Panel(Group(*parts), title=title, title_align="left", border_style="dim", padding=(1, 2), box=box.ROUNDED)


def _header(progress: Progress, now: float, width: int) -> RenderableType:
    cost = progress.plan.cost
    counted = Counter(trial.state for trial in progress.searched)
    running = counted[State.RUNNING] + counted[State.RUNG]
    states = Text("  ").join(
        [Text(f"{running} running", style="cyan" if running else "dim")] * (running > 0 or not progress.ended)
        + [
            Text(f"{counted[state]} {state.value}", style=STYLE[state])
            for state in State
            if state.ended and counted[state]
        ]
    )
    bar = Text()
    cells = 24 if width >= 80 else 6
    filled = round(progress.share(now) * cells)
    bar.append("━" * filled, style="green").append("━" * (cells - filled), style="bright_black")
    left = progress.left(now) or None  # once the search is over, the stage says what is still done
    first = Table.grid(Column(), Column(ratio=1), Column(justify="right"), expand=True, padding=(0, 2, 0, 0))
    spent = f"{clock(progress.elapsed(now))} of {clock(cost.minutes * 60)}"
    about = Text(f"{progress.ended}/{cost.trials} trials   {spent}", no_wrap=True)
    first.add_row(bar, about, Text("" if left is None else f"about {clock(left)} left", style="dim", no_wrap=True))
    if progress.stage:
        parts = [(progress.stage, "bold"), (f"  {clock(now - progress.stage_began)}", "dim")]
        if step := progress.step:
            parts.append((f"  {step.done} of {step.total}, about {clock(step.left)} left", "default"))
        words = Text.assemble(*parts, no_wrap=True, overflow="ellipsis")
        stage = Spinner("dots", text=words, style="cyan")
        if step := progress.step:
            looked = Text(f"  {_one_line(step.words)}", style="dim", no_wrap=True, overflow="ellipsis")
            return Group(first, stage, looked) if not progress.ended else Group(stage, looked, states)
        return Group(first, stage if not progress.ended else Group(stage, states))
    return Group(first, states)


def _goals(progress: Progress) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("goal", no_wrap=True)
    for name in ("speedup", progress.limit.metric, "lost", "trial"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("budget", no_wrap=True)
    base = progress.facts.baseline_quality
    for goal in progress.goals:
        near = pareto.best(progress.searched, goal, progress.limit, 1)
        score = pareto.score(near[0].outcome, goal, progress.limit) if near else None
        asked = _asked(goal)
        if not near or score is None:
            table.add_row(goal.name, DASH, DASH, DASH, DASH, Text(asked, style="dim"))
            continue
        trial, met = near[0], score.violation <= 0 and near[0].state is State.DONE
        slowest = min(trial.outcome.readings[budget.profile].speedup for budget in goal.budgets)
        known = math.isfinite(score.quality)
        style = "bold green" if met else "yellow"
        table.add_row(
            Text(goal.name, style="bold" if met else ""),
            Text(times(slowest), style=style),
            f"{score.quality:.4f}" if known else DASH,
            lost(base.value.value - score.quality, score.quality) if known and base else DASH,
            f"#{trial.number}",
            Text(f"{'✔' if met else '…'} {asked}", style="green" if met else "dim"),
        )
    return table


def _asked(goal: Goal) -> str:
    wishes = [wish(budget) for budget in goal.budgets]
    return wishes[0] if len(set(wishes)) == 1 else "each its own"


def _recent(progress: Progress, now: float, width: int) -> RenderableType:
    table = Table.grid(
        Column(justify="right", style="dim", no_wrap=True),
        Column(no_wrap=True),
        Column(justify="right", no_wrap=True),
        Column(justify="right", no_wrap=True),
        Column(justify="right", style="dim", no_wrap=True),
        Column(no_wrap=True, overflow="ellipsis", ratio=1),
        padding=(0, 2, 0, 0),
        expand=True,
    )
    numbers = [number for number in progress.last if number > 0]
    running = [n for n in numbers if not progress.trials[n].state.ended]
    ended = [n for n in numbers if progress.trials[n].state.ended]
    running = running[-(_SHOWN_TRIALS - 2) :]
    for number in [*reversed(running), *reversed(ended[-(_SHOWN_TRIALS - len(running)) :])]:
        trial = progress.trials[number]
        seconds = progress.took.get(number) if trial.state.ended else now - progress.since.get(number, now)
        state = f"rung {trial.rung + 1}" if trial.state is State.RUNG else trial.state.value
        about = trial.outcome.reason if trial.state is State.FAILED else _words(progress, trial)
        table.add_row(
            f"#{number}",
            Text(state, style=STYLE[trial.state]),
            _speed(trial),
            _quality(trial),
            "" if seconds is None else f"{seconds:.1f} s",
            Text(_one_line(about) if width >= 70 else "", style="red dim" if trial.state is State.FAILED else "dim"),
        )
    return table


def _speed(trial: Trial) -> str:
    found = [reading.speedup for reading in trial.outcome.readings.values()]
    return times(min(found)) if found else ""


def _quality(trial: Trial) -> str:
    found = [quality.value.value for quality in trial.outcome.quality.values()]
    return f"{min(found):.4f}" if found else ""


def _words(progress: Progress, trial: Trial) -> str:
    if progress.space is None:
        return ""
    return describe(space.decode(progress.space, trial.genotype), parent_arch(progress.space))


def _plot(progress: Progress, columns: int, rows: int) -> RenderableType | None:
    """Quality over speedup of the first goal in braille dots, with budget and floor; None with few points."""
    goal = progress.goals[0]
    points = [
        (1.0 / score.latency, score.quality)
        for trial in progress.searched
        if trial.state is State.DONE
        and (score := pareto.of(trial, goal, progress.limit))
        and math.isfinite(score.quality)
    ]
    base = progress.facts.baseline_quality
    if len(points) < 3 or base is None:
        return None
    budget = goal.budgets[0].speedup
    spread = max(base.value.value - progress.limit.floor, 1e-3)
    low, high = progress.limit.floor - spread, max(base.value.value, *(q for _, q in points)) + 0.3 * spread
    right = max(budget or 1.0, *(s for s, _ in points)) * 1.05
    picture = scatter(points, columns, rows, (1.0, right), (low, high), budget, progress.limit.floor)
    caption = Text(f"{progress.limit.metric} over speedup, {goal.name}", style="dim", no_wrap=True, overflow="ellipsis")
    axis = Text(f"1{TIMES}{times(right):>{columns - 2}}", style="dim")
    return Group(caption, *picture, axis)


def scatter(
    points: Iterable[tuple[float, float]],
    columns: int,
    rows: int,
    xs: tuple[float, float],
    ys: tuple[float, float],
    vertical: float | None = None,
    horizontal: float | None = None,
) -> list[Text]:
    """Points as braille dots in `rows` lines of `columns` cells; points outside are drawn at the border."""
    cells: dict[tuple[int, int], int] = {}
    for x, y in points:
        across = min(max((x - xs[0]) / (xs[1] - xs[0]), 0.0), 1.0)
        down = 1.0 - min(max((y - ys[0]) / (ys[1] - ys[0]), 0.0), 1.0)
        column, row = round(across * (columns * 2 - 1)), round(down * (rows * 4 - 1))
        at = (row // 4, column // 2)
        cells[at] = cells.get(at, 0) | _BRAILLE[row % 4][column % 2]
    wall = None if vertical is None else round((vertical - xs[0]) / (xs[1] - xs[0]) * (columns - 1))
    floor = None if horizontal is None else round((1 - (horizontal - ys[0]) / (ys[1] - ys[0])) * (rows - 1))
    lines: list[Text] = []
    for row in range(rows):
        text = Text(no_wrap=True)
        for column in range(columns):
            if (row, column) in cells:
                good = (wall is None or column >= wall) and (floor is None or row <= floor)
                text.append(chr(0x2800 + cells[row, column]), style="green" if good else "bright_black")
            elif column == wall and row == floor:
                text.append("┼", style="blue")
            elif column == wall:
                text.append("│", style="blue")
            elif row == floor:
                text.append("─", style="blue")
            else:
                text.append(" ")
        lines.append(text)
    return lines


def clock(seconds: float) -> str:
    """`42s`, `3m05s`, `2h10m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def line(progress: Progress, trial: Trial, now: float) -> str:
    """One trial at a rung or at its end, as one plain line."""
    found = trial.outcome
    speeds = ", ".join(f"{times(reading.speedup)} {profile}" for profile, reading in found.readings.items())
    quality = _quality(trial)
    took = progress.took.get(trial.number)
    parts = [
        f"[{progress.ended}/{progress.plan.cost.trials} {clock(progress.elapsed(now))}]",
        f"#{trial.number} {trial.state.value}" + (f" {found.fidelity:.0%}" if trial.state is State.RUNG else ""),
        speeds,
        f"{progress.limit.metric} {quality}" if quality else "",
        f"{took:.1f} s" if took is not None else "",
        found.reason if trial.state in (State.FAILED, State.INFEASIBLE) else _words(progress, trial),
    ]
    return _one_line("  ".join(part for part in parts if part))


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


class Live:
    """Shell around `Progress`: `with Live(progress) as live: live.event(trial)`; thread-safe as rich's Live is.

    Draws in place in a UTF-8 terminal; otherwise prints a plain line per stage and per ended trial, without ANSI.
    """

    def __init__(
        self,
        progress: Progress,
        console: Console | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ) -> None:
        self.progress = progress
        self.console = console or Console(emoji=False)
        self.now = now
        self.quiet = quiet
        self._said = self.now()
        drawn = (
            self.console.is_terminal and not self.console.is_dumb_terminal and self.console.encoding.startswith("utf")
        )
        self._screen = (
            Screen(get_renderable=self._view, console=self.console, refresh_per_second=4, transient=True)
            if drawn and not quiet
            else None
        )

    def __enter__(self) -> Live:
        if self._screen is not None:
            self._screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._screen is not None:
            self._screen.stop()

    def _view(self) -> RenderableType:
        return view(self.progress, self.now(), self.console.width)

    def stage(self, words: str) -> None:
        """Say what is going on outside the trials: `training the parent`, `certifying`; empty when that is over."""
        self.progress.stage, self.progress.stage_began, self.progress.step = words, self.now(), None
        self._said = self.now()
        if self._screen is None and words:
            self._plain(words)

    def step(self, words: str, done: int, total: int, left: float) -> None:
        """How far the stage is: drawn at once in a terminal, elsewhere a line every `EVERY` seconds."""
        self.progress.step = Step(words, done, total, left)
        if self._screen is None and self.now() - self._said >= EVERY:
            self._said = self.now()
            self._plain(f"{self.progress.stage}: {self.progress.step}")

    def facts(self, facts: Facts) -> None:
        """The baseline is known."""
        self.progress.facts = facts

    def note(self, words: str) -> None:
        """A line that stays: a warning, a mended journal."""
        if self._screen is not None:
            self.console.print(Text(_one_line(words), style="yellow"))
        else:
            self._plain(words)

    def event(self, trial: Trial) -> None:
        """One journal event: the trial as it stands now."""
        now = self.now()
        self.progress.see(trial, now)
        if self._screen is None and trial.state is not State.RUNNING and trial.number > 0:
            self._plain(line(self.progress, trial, now))

    def _plain(self, words: str) -> None:
        if not self.quiet:
            # A file's encoding may be poorer than ours.
            encoding = self.console.encoding
            safe = _one_line(words).encode(encoding, "replace").decode(encoding)
            print(safe, file=self.console.file, flush=True)  # one unwrapped line, which rich would fold


# --- the end ------------------------------------------------------------------------------------------------------


def result(summary: Summary, out: Path, report: Path | None = None) -> RenderableType:
    """The final table, what came nearest where nothing met a budget, and where everything lies."""
    parts: list[RenderableType] = []
    winners = [*summary.winners.values(), *summary.closest.values()]
    if winners:
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        table.add_column("goal", no_wrap=True)
        for name in ("speedup", "ms", "lost", "MB"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for profile, found in summary.baseline.devices.items():
            table.add_row(
                Text(f"{profile}, baseline", style="dim"),
                Text(f"1{TIMES}", style="dim"),
                Text(f"{found.ms.value:.3f}", style="dim"),
                "",
                Text(f"{summary.baseline.size_mb:.3g}", style="dim"),
                Text(_metric(summary), style="dim"),
            )
        control = summary.controls.get("int8")
        for profile, found in (control.devices if control else {}).items():
            figure = found.drop_test or found.drop_selection
            table.add_row(
                Text(f"{profile}, int8 alone", style="dim"),
                Text(times(found.speedup.value), style="dim"),
                Text(f"{found.ms.value:.3f}", style="dim"),
                Text(lost(figure.value, 0.0) if figure else "", style="dim"),
                Text(f"{found.size_mb:.3g}" if found.size_mb else "", style="dim"),
                Text("control", style="dim"),
            )
        for winner in winners:
            table.add_row(*_winner_row(winner))
        parts.append(table)
        budgets = {budget.profile: budget for goal in summary.goals for budget in goal.budgets}
        for winner in winners:
            for profile, found in winner.devices.items():
                if words := ", ".join(beside(found, budgets.get(profile))):
                    on = winner.goal if profile == winner.goal else f"{winner.goal} on {profile}"
                    parts.append(Text(_one_line(f"{on}: {words}"), style="dim"))
    for name, winner in summary.closest.items():
        words = (
            f"{name}: no candidate met its budget and the quality floor; closest is #{winner.number}: {winner.reason}"
        )
        parts.append(Text(_one_line(words), style="yellow"))
        parts += [Text(f"{name}: {words}")] if (words := simpler(summary, name)) else []
    parts += [Text(_one_line(f"{w.goal}: {w.reason}"), style="yellow") for w in summary.winners.values() if w.reason]
    parts += [Text(_one_line(words), style="yellow") for words in summary.problems]
    if not winners:
        parts.append(Text("no trial was measured, so there is nothing to choose from", style="yellow"))
    done = f"{summary.trials} trials in {clock(summary.minutes * 60)}"
    parts += [Text(), Text(f"{done}{'' if summary.state == 'finished' else f', {summary.state}'}", style="dim")]
    parts += [Text.assemble((f"  {what:<9}", "dim"), str(path)) for what, path in _places(summary, out, report)]
    return Padding(Group(*parts), (1, 1))


def _winner_row(winner: Winner) -> tuple[RenderableType, ...]:
    slowest = min(winner.devices.values(), key=lambda found: found.speedup.value, default=None)
    verdict = Text("✔ certified", style="green") if winner.certified else Text("✘ not certified", style="yellow")
    return (
        Text(winner.goal, style="bold"),
        Text(times(winner.speedup), style="bold green" if winner.budget_met else "bold yellow"),
        f"{slowest.ms.value:.3f}" if slowest else "",
        lost(winner.drop, 0.0) if winner.drop is not None else "",
        f"{slowest.size_mb:.3g}" if slowest and slowest.size_mb else "",
        verdict,
    )


def _metric(summary: Summary) -> str:
    found = summary.baseline.test or summary.baseline.selection
    return f"{found.metric} {found.value.value:.4f} ({found.split})" if found else ""


def _places(summary: Summary, out: Path, report: Path | None) -> list[tuple[str, Path]]:
    found = [(winner.goal, out / winner.path) for winner in summary.winners.values() if winner.path]
    near = any(winner.path for winner in summary.closest.values())
    places = [("best", out / "best")] * bool(found) + [("closest", out / "closest")] * near
    return places + ([("report", report)] if report else [])


def result_lines(summary: Summary, out: Path, report: Path | None = None) -> list[str]:
    """The same as plain lines, one fact each."""
    lines = []
    budgets = {budget.profile: budget for goal in summary.goals for budget in goal.budgets}
    for winner in [*summary.winners.values(), *summary.closest.values()]:
        figures = ", ".join(
            f"{profile} {times(found.speedup.value)} ({found.speedup.low:.2f} to {found.speedup.high:.2f}) "
            + ", ".join([f"{found.ms.value:.3f} ms", *beside(found, budgets.get(profile))])
            for profile, found in winner.devices.items()
        )
        words = lost(winner.drop, 0.0) if winner.drop is not None else "unknown"
        verdict = "certified" if winner.certified else f"not certified: {winner.reason}"
        lines.append(_one_line(f"{winner.goal}: #{winner.number}, {figures}, lost {words}, {verdict}"))
    lines += [f"{name}: no candidate met its budget and the quality floor" for name in summary.closest]
    lines += [f"{name}: {words}" for name in summary.closest if (words := simpler(summary, name))]
    lines += [_one_line(words) for words in summary.problems]
    if not lines:
        lines.append("no trial was measured, so there is nothing to choose from")
    lines.append(f"{summary.trials} trials in {clock(summary.minutes * 60)}, {summary.state}")
    return lines + [f"{what}: {path}" for what, path in _places(summary, out, report)]


def show_result(console: Console, summary: Summary, out: Path, report: Path | None = None) -> None:
    """Print the end of a run: a table in a terminal, plain lines elsewhere."""
    if console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf"):
        console.print(result(summary, out, report))
    else:
        for text in result_lines(summary, out, report):
            safe = text.encode(console.encoding, "replace").decode(console.encoding)
            print(safe, file=console.file, flush=True)  # one unwrapped line


@contextmanager
def telling(view: Live) -> Iterator[None]:
    """What our modules log (waiting for another measurement, say) stands in the view, not across it."""
    logger = logging.getLogger("autocompress")
    handler = logging.Handler()
    handler.emit = lambda record: view.note(record.getMessage())
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def fold(known: dict[int, Trial], event: Event) -> Trial | None:
    """One journal event upon what is known of its trial; None for events of the run itself."""
    number, state = event["number"], event["state"]
    if state not in set(State):
        return None
    old = known.get(number)
    genotype = tuple(event["genotype"]) if "genotype" in event else old.genotype if old else ()
    outcome = Outcome.model_validate(event["outcome"]) if "outcome" in event else old.outcome if old else Outcome()
    known[number] = Trial(
        number=number,
        genotype=genotype,
        state=State(state),
        attempt=event.get("attempt", 1),
        rung=event.get("rung", -1),
        outcome=outcome,
    )
    return known[number]
