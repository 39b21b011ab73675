"""report.html: one self-contained page from journal.jsonl, summary.json and best/*, readable offline and in print.

Reads without the journal's lock, so a run that is still going can be looked at. Everything that comes from users or
files is escaped by the template engine.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError

from autocompress import artifact, charts, heatmap, journal, pareto, picture, space, summary, wording
from autocompress.controller import COST, Header
from autocompress.live import clock
from autocompress.summary import Summary, Winner
from autocompress.types import (
    Cost,
    Facts,
    Goal,
    Limit,
    Record,
    SearchPlan,
    Space,
    State,
    Trial,
    UserError,
)

_ROWS = 400  # trials listed on the page; front.csv has all
_R = TypeVar("_R", bound=Record)
_STATES = {state.value for state in State}


@dataclass(frozen=True)
class Run:
    """What a journal says of a run, without its lock."""

    space: Space
    goals: tuple[Goal, ...]
    limit: Limit
    plan: SearchPlan
    facts: Facts
    job: dict[str, Any]
    trials: tuple[Trial, ...]  # by number
    order: tuple[Trial, ...]  # ended ones, in the order of their end
    minutes: float


def load(out: Path) -> Run:
    """Read OUT/journal.jsonl. Raises UserError if it is missing or not a journal of this version."""
    path = out / "journal.jsonl"
    events = journal.read(path).events
    if not events:
        raise UserError(f"{path}: holds no complete header, so its run never began")
    header = _record(Header, events[0], path)
    trials = trials_of(events, path)
    ended = [event["number"] for event in events if event["number"] > 0 and State(event["state"]).ended]
    latest = {number: at for at, number in enumerate(ended)}
    by_number = {trial.number: trial for trial in trials}
    costs = [_record(Cost, event.get("cost"), path) for event in events if event["state"] == COST]
    at = [float(event["at"]) for event in events if isinstance(event.get("at"), (int, float))]
    job = header.more.get("job")
    return Run(
        space=header.space,
        goals=header.goals,
        limit=header.limit,
        plan=header.plan.model_copy(update={"cost": costs[-1]}) if costs else header.plan,
        facts=header.facts,
        job=dict(job) if isinstance(job, dict) else {},
        trials=trials,
        order=tuple(by_number[number] for number in sorted(latest, key=latest.__getitem__)),
        minutes=max(at, default=0.0) / 60,
    )


def trials_of(events: Sequence[Mapping[str, Any]], path: Path = Path("journal.jsonl")) -> tuple[Trial, ...]:
    """The trials as the last event of each leaves them, by number; a running attempt keeps what earlier ones found."""
    found: dict[int, Trial] = {}
    for event in events:
        if event["state"] not in _STATES:
            if event["number"] > 0:
                raise UserError(f"{path}: trial {event['number']} has the unknown state {event['state']!r}")
            continue  # events of the run itself
        before = found.get(event["number"])
        outcome = event.get("outcome")
        genotype = event.get("genotype") or (before.genotype if before is not None else ())
        fields = {
            "number": event["number"],
            "state": event["state"],
            "attempt": event.get("attempt", before.attempt if before else 1),
            "rung": event.get("rung", before.rung if before else -1),
            "genotype": genotype,
            "outcome": outcome or (before.outcome.model_dump(mode="json") if before else {}),
        }
        found[event["number"]] = _record(Trial, fields, path)
    return tuple(found[number] for number in sorted(found))


def _record(kind: type[_R], data: object, path: Path) -> _R:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {kind.__name__.lower()} cannot be read ({at}: {first['msg']})") from error


def provisional(run: Run) -> Summary:
    """What can be said of a run that has written no summary yet: nothing in it is certified."""
    return summary.build(
        state="running",
        space_=run.space,
        goals=run.goals,
        limit=run.limit,
        facts=run.facts,
        trials=run.trials,
        searcher=run.plan.searcher,
        seed=run.plan.seed,
        minutes=run.minutes,
        job=run.job,
    )


def write(out: Path) -> Path:
    """Write OUT/report.html from what lies in OUT; returns its path. Raises UserError if OUT holds no run."""
    path = out / "report.html"
    page = render(out)
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=out, prefix=".report", delete=False) as file:
            file.write(page)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def render(out: Path) -> str:
    """The page as text."""
    run = load(out)
    written = summary.read(out)
    searched = [trial for trial in run.trials if trial.number > 0]
    # A resumed run may have outgrown the summary of its interruption.
    stale = written is not None and _ends(written.counts) != _ends(summary.counts(searched))
    found = written if written is not None and not stale else provisional(run)
    winners = [*found.winners.values(), *found.closest.values()]
    base = summary.parent_arch(run.space)
    words = {trial.number: wording.describe(space.decode(run.space, trial.genotype), base) for trial in searched}
    baseline = run.facts.baseline_quality.value.value if run.facts.baseline_quality else None
    environment = Environment(
        loader=PackageLoader("autocompress", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "times": wording.times,
        "lost": wording.lost,
        "beside": summary.beside,
        "clock": clock,
        "big": _big,
        "change": _change,
    }
    return environment.get_template("report.html.jinja").render(
        title=" · ".join(part for part in (found.task, found.builder, found.searcher) if part) or "search",
        run=run,
        found=found,
        budgets={budget.profile: budget for goal in run.goals for budget in goal.budgets},
        finished=found.state == "finished",
        headline=charts.headline(list(found.winners.values())),
        winners=winners,
        panels=_panels(run, found, winners, words),
        networks=_networks(out, winners),
        steps=charts.steps,
        histogram=charts.histogram,
        simpler={name: summary.simpler(found, name) for name in found.closest},
        growth=charts.growth(run.order, run.goals, run.limit, baseline),
        shares=charts.shares(found.seconds),
        heat=heatmap.heatmap(run.facts, run.space),
        failed=[failure for failure in found.failures if failure.state == State.FAILED],
        infeasible=found.counts.get(State.INFEASIBLE, 0),
        rows=_rows(run, searched, words),
        hidden=max(0, len(searched) - _ROWS),
        job=yaml.safe_dump(_plain(run.job), sort_keys=False, allow_unicode=True, width=100) if run.job else "",
        out=str(run.job.get("out") or out.name),
    )


def _ends(counts: Mapping[str, int]) -> dict[str, int]:
    """Ended trials by state: those in flight at an interruption do not make its summary old."""
    return {state.value: counts.get(state.value, 0) for state in State if state.ended}


def _panels(run: Run, found: Summary, winners: Sequence[Winner], words: Mapping[int, str]) -> list[charts.Panel]:
    return [
        charts.panel(
            goal,
            run.trials,
            run.limit,
            run.facts.baseline[goal.name],
            run.facts.baseline_quality,
            words,
            winners,
            found.controls,
        )
        for goal in run.goals
        if len(goal.budgets) == 1 and goal.name in run.facts.baseline
    ]


def _networks(out: Path, winners: Sequence[Winner]) -> list[tuple[str, picture.Network]]:
    """One picture per distinct winner whose artifact lies in OUT."""
    pictures: dict[int, tuple[list[str], picture.Network]] = {}
    for winner in winners:
        folder = out / winner.path
        if not winner.path or not (folder / artifact.POLICY).is_file():
            continue
        if winner.number in pictures:
            pictures[winner.number][0].append(winner.goal)
            continue
        policy = artifact.look((folder / artifact.POLICY).read_bytes(), str(folder / artifact.POLICY))
        pictures[winner.number] = ([winner.goal], picture.network(policy, shapes_of(folder / artifact.WEIGHTS)))
    return [(f"#{number}, {' and '.join(goals)}", picture) for number, (goals, picture) in pictures.items()]


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file from its header alone (8 bytes of length, then JSON), no tensor is read.

    Raises UserError if the file is not safetensors.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _rows(run: Run, searched: Sequence[Trial], words: Mapping[int, str]) -> list[dict[str, Any]]:
    """Trials for the table; of many, those nearest to what was asked."""
    fronts = Counter[int]()
    for goal in run.goals:
        fronts.update(trial.number for trial in pareto.front(searched, goal, run.limit))
    chosen = list(searched)
    if len(chosen) > _ROWS:
        goal = run.goals[-1]
        near = {trial.number for trial in pareto.best(searched, goal, run.limit, _ROWS - len(fronts))} | set(fronts)
        chosen = [trial for trial in searched if trial.number in near]
    return [
        {
            "number": trial.number,
            "state": trial.state.value,
            "front": fronts[trial.number],
            "speedups": [
                trial.outcome.readings[goal.name].speedup if goal.name in trial.outcome.readings else None
                for goal in run.goals
                if len(goal.budgets) == 1
            ],
            "quality": min((q.value.value for q in trial.outcome.quality.values()), default=None),
            "fidelity": trial.outcome.fidelity,
            "size": max(trial.outcome.size_mb.values(), default=None),
            "seconds": sum(trial.outcome.seconds.values()),
            "about": trial.outcome.reason if trial.state is State.FAILED else words[trial.number],
        }
        for trial in chosen
    ]


def _big(value: float) -> str:
    """`2.9 M`, `320 k`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def _change(value: float, form: str = "%+d") -> str:
    """`+3`, `-0.0133` with a minus sign that is as wide as the plus."""
    return (form % value).replace("-", wording.MINUS)


def _plain(value: Any) -> Any:
    """A job without what it leaves at None, for reading."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None and item != {}}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else str(value)
