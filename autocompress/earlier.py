"""Trials of earlier runs, told in the words of this one: another space's genes in common, another device's ratios.

What they are worth is not decided here: a searcher weighs them by how well they rank what this run finds itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autocompress import journal
from autocompress import space as sp
from autocompress.types import (
    Facts,
    Gene,
    Genotype,
    Interval,
    Outcome,
    Quality,
    Reading,
    Space,
    State,
    Trial,
    UserError,
)

FILE = "journal.jsonl"
SOURCE, SHARE = "source", "share"  # of a trial's note: which run it comes from, and how much of its policy is here


@dataclass(frozen=True)
class Earlier:
    """Trials for `Facts.warm`, and a line about each run for the user."""

    trials: tuple[Trial, ...]
    notes: tuple[str, ...]


def events(given: str | Path) -> list[journal.Event]:
    """Of a run's folder or journal. Raises UserError for what is none, or holds nothing yet."""
    path = Path(given) / FILE if Path(given).is_dir() else Path(given)
    found = journal.read(path).events
    if not found:
        raise UserError(f"{path}: holds no run to start from; leave it out of `warm`")
    return found


def trials(paths: Sequence[str | Path], space: Space, facts: Facts) -> Earlier:
    """The measured trials of these runs (folders or journals) as trials of `space` on the devices of `facts`.

    A gene is known again by its name and a choice by its value; what is not here stays at its first choice. Latencies
    are kept as ratios to the baseline, qualities as differences to it. Raises UserError for what is no journal.
    """
    found: list[Trial] = []
    notes: list[str] = []
    for source, given in enumerate(paths):
        header, *rest = events(given)
        run = _Run.of(header, Path(given))
        told = [trial for trial in run.ended(rest) if trial.number > 0]
        kept = _once(one for trial in told if (one := run.told(trial, space, facts, source)) is not None)
        found += kept
        notes.append(run.says(given, len(told), kept, space, facts))
    numbered = (t.model_copy(update={"number": n}) for n, t in enumerate(found, start=1))
    return Earlier(tuple(numbered), tuple(notes))


def _once(trials: Iterable[Trial]) -> list[Trial]:
    """One trial per genotype: of several that fell together the one of which most is here."""
    found: dict[Genotype, Trial] = {}
    for trial in trials:
        held = found.get(trial.genotype)
        if held is None or trial.note[SHARE] > held.note[SHARE]:
            found[trial.genotype] = trial
    return list(found.values())


@dataclass(frozen=True)
class _Run:
    """What the header of an earlier run says."""

    path: Path
    space: Space
    quality: float | None  # of its baseline
    fingerprints: Mapping[str, str]  # by profile

    @classmethod
    def of(cls, header: Mapping[str, Any], path: Path) -> _Run:
        facts = header.get("facts") or {}
        try:
            space = Space.model_validate(header.get("space"))
            known = facts.get("baseline_quality")
            quality = None if known is None else float(known["value"]["value"])
            marks = {name: str(one.get("fingerprint", "")) for name, one in (facts.get("baseline") or {}).items()}
        except (ValidationError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}, line 1: not a header that this version reads; leave it out of `warm`") from error
        return cls(path, space, quality, marks)

    def ended(self, events: Sequence[journal.Event]) -> list[Trial]:
        """Trials as they stood last, those that were measured."""
        genotypes: dict[int, Genotype] = {}
        found: dict[int, Trial] = {}
        for event in events:
            number = event["number"]
            if "genotype" in event:
                genotypes[number] = tuple(event["genotype"])
            if event["state"] not in (State.DONE, State.STOPPED, State.INFEASIBLE, State.FAILED):
                continue
            found.pop(number, None)
            if number not in genotypes or event["state"] == State.FAILED:
                continue
            try:
                outcome = Outcome.model_validate(event.get("outcome", {}))
            except ValidationError as error:
                where = ".".join(map(str, error.errors()[0]["loc"]))
                raise UserError(
                    f"{self.path}: trial {number}, {where}: written by another version; leave it out of `warm`"
                ) from error
            if outcome.readings:
                found[number] = Trial(
                    number=number, genotype=genotypes[number], state=State(event["state"]), outcome=outcome
                )
        return list(found.values())

    def told(self, trial: Trial, space: Space, facts: Facts, source: int) -> Trial | None:
        """The trial in the words of another space; None where nothing that it changed is there."""
        if len(trial.genotype) != len(self.space.genes):
            return None
        at = {gene.name: i for i, gene in enumerate(space.genes)}
        values = [0] * len(space.genes)
        asked = kept = 0
        for gene, value in zip(self.space.genes, trial.genotype, strict=True):
            if value:
                asked += 1
                i = at.get(gene.name)
                choice = None if i is None else _same(gene, value, space.genes[i])
                if i is not None and choice is not None:
                    values[i], kept = choice, kept + 1
        genotype = sp.canonical(space, tuple(values))
        if not any(genotype):
            return None
        outcome = self.outcome(trial.outcome, facts)
        note = {SOURCE: source, SHARE: round(kept / max(1, asked), 3)}
        return Trial(number=0, genotype=genotype, state=trial.state, outcome=outcome, note=note)

    def outcome(self, outcome: Outcome, facts: Facts) -> Outcome:
        """Ratios and differences of quality; a device of this run that was not measured there takes another's."""
        readings: dict[str, Reading] = {}
        quality: dict[str, Quality] = {}
        top = facts.baseline_quality.value.value if facts.baseline_quality else None
        shift = 0.0 if top is None or self.quality is None else top - self.quality
        for profile, baseline in facts.baseline.items():
            name = profile if profile in outcome.readings else next(iter(outcome.readings))
            readings[profile] = _scaled(outcome.readings[name], profile, baseline)
            answered = outcome.quality.get(name) or next(iter(outcome.quality.values()), None)
            if answered is not None and math.isfinite(answered.value.value):
                v = answered.value
                moved = Interval(value=v.value + shift, low=v.low + shift, high=v.high + shift)
                quality[profile] = answered.model_copy(update={"value": moved})
        sizes = {p: s for p, s in outcome.size_mb.items() if p in facts.baseline}
        return Outcome(fidelity=outcome.fidelity, readings=readings, quality=quality, size_mb=sizes)

    def says(self, given: str | Path, measured: int, kept: Sequence[Trial], space: Space, facts: Facts) -> str:
        """One line: what of the run is used, and what is not."""
        mine = {gene.name for gene in space.genes}
        common = [gene for gene in self.space.genes if gene.name in mine]
        missing = [gene.name for gene in self.space.genes if gene.name not in mine]
        words = f"begins with {len(kept)} of {measured} measured trials of {given}"
        if self.space != space:
            words += f"; {len(common)} of its {len(self.space.genes)} genes are here"
            words += f" (not {missing[0]}{' ...' if missing[1:] else ''})" if missing else ""
        other = [name for name, reading in facts.baseline.items() if self.fingerprints.get(name) != reading.fingerprint]
        return words + (f"; measured on another device than {', '.join(other)}" if other else "")


def _same(gene: Gene, value: int, other: Gene) -> int | None:
    """Index of the same choice in another gene; None where it has none."""
    choice = gene.choices[value]
    kind = isinstance(choice, bool)
    return next((i for i, one in enumerate(other.choices) if one == choice and isinstance(one, bool) == kind), None)


def _scaled(reading: Reading, profile: str, baseline: Reading) -> Reading:
    """A reading as it would stand beside this run's baseline: the same ratio."""
    base = baseline.ms.value
    ratio = reading.ratio
    ms = Interval(value=ratio.value * base, low=ratio.low * base, high=ratio.high * base)
    tail = reading.p95_ms.value / max(reading.ms.value, 1e-9)
    p95 = Interval(value=ms.value * tail, low=ms.low * tail, high=ms.high * tail)
    return Reading(
        profile=profile, ms=ms, p95_ms=p95, baseline_ms=baseline.ms, ratio=ratio, samples=reading.samples,
        rounds=reading.rounds, fingerprint=reading.fingerprint, batch=baseline.batch, memory_mb=reading.memory_mb,
    )  # fmt: skip
