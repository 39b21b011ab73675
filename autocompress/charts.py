"""Geometry of the report's pictures: plain records of pixels and words, which a template draws as SVG.

Own SVG rather than plotly: a hundredth of its inlined script, it prints, and it follows the reader's colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autocompress import pareto
from autocompress.summary import Control, Figures, Winner
from autocompress.types import Budget, Goal, Limit, Quality, Reading, State, Trial
from autocompress.wording import TIMES, lost, times, wish


@dataclass(frozen=True)
class Scale:
    """Values to pixels; `log` for ratios and times."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value; values outside are clamped to the ends."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        share = math.log(at / low) / math.log(high / low) if self.log else (at - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 and their decades between low and high; finer where that gives fewer than three."""
    for factors in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(1 + i / 5 for i in range(45))):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [round(f * 10**d, 9) for d in decades for f in factors if low <= f * 10**d <= high]
        if len(found) >= 3:
            return found[:: max(1, len(found) // 7)]
    return [low, high]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """One bin of a histogram, in pixels."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """How often which time."""

    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    width: int = 380
    height: int = 150
    bottom: int = 120


def histogram(values: Sequence[float], bins: int = 20) -> Histogram:
    """Of milliseconds, one at least."""
    low, high = min(values), max(values)
    pad = max(0.02 * (high - low), 0.01 * high, 1e-9)
    scale = Scale(low - pad, high + pad, 10, 370)
    step = (high - low + 2 * pad) / bins
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low + pad) / step))] += 1
    found: list[Bar] = []
    for place, count in enumerate(counts):
        begin, end = low - pad + place * step, low - pad + (place + 1) * step
        tall = round(100 * count / max(counts), 1)
        title = f"{begin:.3g} to {end:.3g} ms: {count} of {len(values)} inputs"
        found.append(Bar(scale(begin) + 1, 120 - tall, max(1.0, scale(end) - scale(begin) - 2), tall, title))
    marks = tuple(Tick(scale(one), f"{one:g}") for one in ticks(low - pad, high + pad))
    return Histogram(tuple(bar for bar in found if bar.height), marks)


@dataclass(frozen=True)
class Mark:
    """One trial or control arm in a panel."""

    x: float
    y: float
    kind: str  # done | front | stopped | below | infeasible | baseline | int8 | winner
    title: str
    number: int = -1
    label: str = ""
    left: bool = False  # label on the left side
    whiskers: tuple[float, float, float, float] | None = None  # x low, x high, y low, y high
    up: float = -9.0  # pixels from the mark down to its label
    decides: bool = False  # by its input, how much it computes


@dataclass(frozen=True)
class Line:
    """A limit drawn across a panel."""

    at: float
    label: str


@dataclass(frozen=True)
class Panel:
    """The front of one device."""

    profile: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    metric: str
    x_ticks: tuple[Tick, ...]
    top_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    front: str  # points of a polyline
    plain: str  # the same without the files that decide by their input
    decides: bool  # whether there are such files
    limits: tuple[Line, ...]
    floor: Line | None
    feasible: tuple[float, float, float, float] | None  # x, y, width, height
    counts: str


def panel(
    goal: Goal,
    trials: Sequence[Trial],
    limit: Limit,
    baseline: Reading,
    baseline_quality: Quality | None,
    words: Mapping[int, str],
    winners: Sequence[Winner] = (),
    controls: Mapping[str, Control] | None = None,
) -> Panel:
    """Quality over latency on the device of a single-device goal. Quality is that of the selection split."""
    budget = goal.budgets[0]
    profile = budget.profile
    width, height, left, right, top, bottom = 560, 390, 56.0, 544.0, 46.0, 340.0
    seen = [trial for trial in trials if trial.number > 0 and profile in trial.outcome.readings]
    on_front = pareto.front(seen, goal, limit)
    deciding = {trial.number for trial in seen if trial.outcome.readings[profile].inputs}
    plain = pareto.front([trial for trial in seen if trial.number not in deciding], goal, limit) if deciding else []
    base_ms = baseline.ms.value
    arms = {name: arm.devices[profile] for name, arm in (controls or {}).items() if profile in arm.devices}
    allowed = [ms for ms, _ in _bounds(budget, base_ms, baseline.batch)]
    all_ms = (
        [t.outcome.readings[profile].ms.value for t in seen] + allowed + [found.ms.value for found in arms.values()]
    )
    x = Scale(min([*all_ms, base_ms]) * 0.88, max([*all_ms, base_ms]) * 1.18, left, right, log=True)
    y = Scale(*_quality_range(seen, profile, limit, baseline_quality), bottom, top)

    front_numbers = {trial.number for trial in on_front}
    marks = [_mark(trial, profile, x, y, trial.number in front_numbers, words, limit.metric) for trial in seen]
    marks.sort(key=lambda mark: ("infeasible", "below", "stopped", "done", "front").index(mark.kind))
    if baseline_quality is not None:
        title = f"baseline\n{base_ms:.3f} ms\n{limit.metric} {baseline_quality.value.value:.4f}"
        marks.append(Mark(x(base_ms), y(baseline_quality.value.value), "baseline", title, 0, "baseline", left=True))
    for name, found in arms.items():
        if found.selection is not None:
            marks.append(_special(found, x, y, "int8", f"{name} alone (no search)", limit.metric, label=name))
    for winner in _distinct(winners, profile):
        found = winner.devices[profile]
        if found.selection is not None:
            head = f"#{winner.number}, {'certified' if winner.certified else 'not certified'} for {winner.goal}"
            marks.append(_special(found, x, y, "winner", head, limit.metric, winner.number, times(found.speedup.value)))
    marks = [replace(mark, decides=mark.number in deciding) for mark in marks]
    without = {trial.number for trial in plain}
    lines = [Line(x(ms), label) for ms, label in _bounds(budget, base_ms, baseline.batch)]
    floor_in = y.low <= limit.floor <= y.high
    edge = min((line.at for line in lines), default=right)
    floor_y = y(limit.floor) if floor_in else bottom
    return Panel(
        profile=profile,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        metric=limit.metric,
        x_ticks=tuple(Tick(x(v), f"{v:g}") for v in log_ticks(x.low, x.high)),
        top_ticks=tuple(Tick(x(base_ms / v), f"{v:g}{TIMES}") for v in log_ticks(base_ms / x.high, base_ms / x.low)),
        y_ticks=tuple(Tick(y(v), f"{v:.4g}") for v in ticks(y.low, y.high, 6)),
        marks=tuple(_readable(marks)),
        front=_line(mark for mark in marks if mark.kind == "front"),
        decides=bool(deciding),
        plain=_line(mark for mark in marks if mark.number in without and mark.kind in ("front", "done", "stopped")),
        limits=tuple(lines),
        floor=Line(floor_y, f"{limit.metric} floor {limit.floor:.4g}") if floor_in else None,
        feasible=(left, top, round(edge - left, 1), round(floor_y - top, 1)),
        counts=f"{sum(m.kind in ('done', 'front') for m in marks)} fully trained, "
        f"{sum(m.kind in ('stopped', 'below') for m in marks)} below or stopped, "
        f"{sum(m.kind == 'infeasible' for m in marks)} too slow to train{_undrawn(budget)}",
    )


def _line(marks: Iterable[Mark]) -> str:
    """Points of a polyline, from left to right."""
    return " ".join(f"{mark.x},{mark.y}" for mark in sorted(marks, key=lambda mark: mark.x))


def _readable(marks: Sequence[Mark]) -> list[Mark]:
    """Labels that would lie over an earlier one go below their marks."""
    taken: list[tuple[float, float, float]] = []
    found: list[Mark] = []
    for mark in marks:
        if mark.label:
            width = 7.0 * len(mark.label)
            start = mark.x - 11 - width if mark.left else mark.x + 11

            def over(up: float, mark: Mark = mark, start: float = start, width: float = width) -> bool:
                return any(
                    start < end + 8 and start + width + 8 > begin and abs(mark.y + up - y) < 14
                    for begin, end, y in taken
                )

            ups = (mark.up, 18.0, -24.0)
            mark = replace(mark, up=next((up for up in ups if not over(up)), mark.up))  # noqa: PLW2901
            taken.append((start, start + width, mark.y + mark.up))
        found.append(mark)
    return found


def _bounds(budget: Budget, base_ms: float, batch: int) -> list[tuple[float, str]]:
    found: list[tuple[float, str]] = []
    if budget.speedup is not None:
        found.append((base_ms / budget.speedup, f"budget {budget.speedup:g}{TIMES}"))
    if budget.latency_ms is not None:
        found.append((budget.latency_ms, f"budget {budget.latency_ms:g} ms"))
    if budget.throughput is not None:
        found.append((1e3 * batch / budget.throughput, f"budget {budget.throughput:g}/s"))
    return found


def _undrawn(budget: Budget) -> str:
    """Bounds that have no place in a picture of quality over the median."""
    rest = budget.model_copy(update=dict.fromkeys(("speedup", "latency_ms", "throughput")))
    return f"; also asked: {wish(rest)}" if wish(rest) != wish(Budget(profile="")) else ""


def _quality_range(seen: Sequence[Trial], profile: str, limit: Limit, baseline: Quality | None) -> tuple[float, float]:
    """Where decisions happen: around baseline and floor, not down to the worst early trial."""
    known = [t.outcome.quality[profile].value.value for t in seen if profile in t.outcome.quality]
    top = max([*known, baseline.value.value if baseline else limit.floor, limit.floor])
    spread = max(top - limit.floor, 1e-3 * max(abs(top), 1.0))
    low = max(min([*known, limit.floor]), limit.floor - 0.8 * spread) - 0.15 * spread
    return low, top + 0.18 * spread


def _mark(trial: Trial, profile: str, x: Scale, y: Scale, front: bool, words: Mapping[int, str], metric: str) -> Mark:
    reading, quality = trial.outcome.readings[profile], trial.outcome.quality.get(profile)
    across = x(reading.ms.value)
    head = f"#{trial.number} {trial.state.value}" + (", on the front" if front else "")
    speed = f"{times(reading.speedup)}, {reading.ms.value:.3f} ms ({reading.ms.low:.3f} to {reading.ms.high:.3f})"
    about = words.get(trial.number, "")
    if quality is None:
        why = trial.outcome.reason or "quality not measured"
        return Mark(across, y.start, "infeasible", f"{head}\n{speed}\n{why}\n{about}", trial.number)
    figures = f"{metric} {quality.value.value:.4f} ({quality.value.low:.4f} to {quality.value.high:.4f})"
    kind = "front" if front else "done" if trial.state is State.DONE else "stopped"
    if quality.value.value < y.low:
        kind = "below"
    title = f"{head}\n{speed}\n{figures}\n{about}"
    return Mark(across, y(quality.value.value), kind, title, trial.number)


def _special(
    found: Figures, x: Scale, y: Scale, kind: str, head: str, metric: str, number: int = -1, label: str = ""
) -> Mark:
    assert found.selection is not None
    quality = found.selection.value
    title = (
        f"{head}\n{times(found.speedup.value)} ({found.speedup.low:.2f} to {found.speedup.high:.2f}), "
        f"{found.ms.value:.3f} ms\n{metric} {quality.value:.4f} ({quality.low:.4f} to {quality.high:.4f})"
    )
    whiskers = (x(found.ms.low), x(found.ms.high), y(quality.low), y(quality.high))
    at = x(found.ms.value)
    return Mark(
        at, y(quality.value), kind, title, number, label, at > x.end - 80, whiskers if kind == "winner" else None
    )


def _distinct(winners: Sequence[Winner], profile: str) -> list[Winner]:
    """Winners measured on a device, one per trial, its own goal first."""
    ranked = sorted((w for w in winners if profile in w.devices), key=lambda winner: winner.goal != profile)
    return list({winner.number: winner for winner in reversed(ranked)}.values())


def steps(winners: Sequence[Winner]) -> tuple[str, ...]:
    """Names of the stages of several winners in one order: each where the winner that has it puts it."""
    found: list[str] = []
    for winner in winners:
        at = 0
        for stage in winner.stages:
            if stage.name not in found:
                found.insert(at, stage.name)
            at = found.index(stage.name) + 1
    return tuple(found)


# --- over time ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One goal's hypervolume over ended trials."""

    goal: str
    points: str
    end_x: float
    end_y: float
    last: float


@dataclass(frozen=True)
class Growth:
    """How the fronts grew."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]


def growth(
    order: Sequence[Trial], goals: Sequence[Goal], limit: Limit, baseline: float | None, most: int = 150
) -> Growth | None:
    """Hypervolume per goal over trials in the order they ended; None while no fully trained trial holds the floor.

    The unit is the box from the floor to the baseline's quality and from the baseline's latency to none.
    """
    if baseline is None or not order:
        return None
    box = max(baseline - limit.floor, 1e-6)
    series: list[tuple[str, list[tuple[int, float]]]] = []
    step = max(1, len(order) // most)
    for goal in goals:
        points: list[tuple[float, float]] = []
        values = [(0, 0.0)]
        for index, trial in enumerate(order, start=1):
            score = pareto.of(trial, goal, limit) if trial.state is State.DONE else None
            if score is not None and math.isfinite(score.quality):
                points.append((score.quality, score.latency))
            if index % step == 0 or index == len(order):
                values.append((index, pareto.hypervolume(points, (limit.floor, 1.0)) / box))
        series.append((goal.name, values))
    top_value = max(value for _, values in series for _, value in values)
    if top_value <= 0:
        return None
    width, height, left, right, top, bottom = 420, 240, 40.0, 330.0, 14.0, 198.0
    x, y = Scale(0, len(order), left, right), Scale(0, top_value * 1.08, bottom, top)
    curves: list[Curve] = []
    for name, values in series:
        path = " ".join(f"{x(at)},{y(value)}" for at, value in values)
        curves.append(Curve(name, path, x(values[-1][0]), y(values[-1][1]), values[-1][1]))
    return Growth(
        width, height, left, right, top, bottom,
        tuple(Tick(x(v), f"{v:g}") for v in ticks(0, len(order), 6)),
        tuple(Tick(y(v), f"{v:g}") for v in ticks(0, top_value * 1.08, 4)),
        tuple(_apart(curves)),
    )  # fmt: skip


def _apart(curves: Sequence[Curve], distance: float = 15.0) -> list[Curve]:
    """Labels at the right end pushed apart so that they can be read."""
    placed: list[Curve] = []
    for curve in sorted(curves, key=lambda one: one.end_y):
        at = max(curve.end_y, placed[-1].end_y + distance) if placed else curve.end_y
        placed.append(Curve(curve.goal, curve.points, curve.end_x, at, curve.last))
    return placed


@dataclass(frozen=True)
class Share:
    """A stage's share of the work."""

    name: str
    seconds: float
    share: float
    start: float


def shares(seconds: Mapping[str, float]) -> tuple[Share, ...]:
    """Stages by falling time, as shares of the whole."""
    total = sum(seconds.values())
    found: list[Share] = []
    start = 0.0
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if value > 0:
            found.append(Share(name, value, value / total, start))
            start += value / total
    return tuple(found)


def headline(winners: Sequence[Winner]) -> str:
    """`5.2x faster on a and 3.3x on b, at most 0.34 pt lost`; empty without winners."""
    single = [w for w in winners if len(w.devices) == 1] or list(winners)
    if not single:
        return ""
    speeds = [f"{times(w.speedup)}{' faster' if i == 0 else ''} on {w.goal}" for i, w in enumerate(single)]
    said = speeds[0] if len(speeds) == 1 else f"{', '.join(speeds[:-1])} and {speeds[-1]}"
    drops = [w.drop for w in single if w.drop is not None]
    if not drops:
        return said
    worst = max(drops)
    return f"{said}, " + ("nothing lost" if worst <= 0 else f"at most {lost(worst, 0.0)} lost")
