"""The probe: choices of a derived space tried one by one, untrained, before the search (floor F5).

A choice is looked at in two backgrounds, because neither alone says what it is worth: an integer layer among floats
pays for the borders around it, a float layer among integers pays for them too. It leaves the space only if it pays in
neither: alone in the unmodified network, and on top of the best choices of all others (every site in integers, every
site with the best change of its structure).

Quality is judged by how far the outputs move from the parent's, latency by what this machine takes for the changed
layers. Both steer only; what a candidate is worth is trained and measured in the search.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autocompress import auto, latency
from autocompress import space as sp
from autocompress.pipeline import Work
from autocompress.store import write_atomic
from autocompress.types import (
    Budget,
    Choice,
    Facts,
    Gene,
    Probed,
    Space,
    TrialFailure,
)
from autocompress.untrained import Untrained, genotype, is_numeric, is_packing

PAYS = 0.002  # share of the baseline's latency (or size) that counts as a gain
HOPELESS = 2.0  # times the divergence of an answer that is always the same ...
LEAST = 0.1  # ... which an untrained network has none of
FILE = "probe.json"
Step = Callable[[str, int, int, float], None]
"""Told what is looked at, how many of how many are done, and how many seconds are left."""


@dataclass(frozen=True)
class Found:
    """What the probe found: the space that is left, and why."""

    space: Space
    probed: tuple[Probed, ...]
    integers: dict[str, float] = field(default_factory=dict)  # latency with every site in integers, as a share
    seconds: float = 0.0

    @property
    def facts(self) -> dict[str, Any]:
        """What of it belongs to a search's facts."""
        return {"probe": self.probed, "integers": self.integers}

    def __str__(self) -> str:
        """One line for the terminal."""
        tried = [one for one in self.probed if one.ms]
        gone = [one for one in self.probed if not one.kept]
        return (
            f"probed {len(tried)} of {len(self.probed)} choices in {self.seconds:.0f} s: {len(gone)} never pay, "
            f"{len(self.space.genes)} genes are left"
        )


def probe(
    work: Work,
    full: Space,
    facts: Facts,
    budgets: Sequence[Budget],
    *,
    seconds: float,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    step: Step = lambda _words, _done, _total, _left: None,
) -> Found:
    """Try the choices of `full`, largest sites first, for at most about `seconds`; what was not tried stays.

    `say` is told what begins, `step` what is looked at, how many looks of how many are done, and seconds left.

    With a folder, an earlier probe of the same network, space and devices there is read instead of done again.
    """
    small = any(budget.size_mb is not None for budget in budgets)
    key = _key(work, full, facts, small)
    kept = _recall(folder, key)
    if kept is not None:
        return Found(reduced(full, kept[0]), *kept)
    began = time.perf_counter()
    asked = _Probe(work, full, facts, began + seconds, small=small, say=say, step=step)
    found = asked.go()
    if folder is not None:
        records = [one.model_dump(mode="json") for one in found]
        told = {"key": key, "probed": records, "integers": asked.integers}
        write_atomic(folder / FILE, json.dumps(told, indent=1).encode())
    return Found(reduced(full, found), found, asked.integers, time.perf_counter() - began)


def reduced(full: Space, probed: Sequence[Probed]) -> Space:
    """The space without what the probe found never to pay."""
    return auto.reduce(full, [(one.gene, one.choice) for one in probed if not one.kept])


def _key(work: Work, full: Space, facts: Facts, small: bool) -> str:
    parts = [
        small,
        full.model_dump(mode="json"),
        facts.parent,
        [profile.model_dump(mode="json") for profile in work.profiles],
        sorted(facts.fingerprints),
        facts.versions,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _recall(folder: Path | None, key: str) -> tuple[tuple[Probed, ...], dict[str, float]] | None:
    try:
        kept = json.loads((folder / FILE).read_bytes()) if folder else {}
        if kept.get("key") != key:
            return None
        return tuple(Probed.model_validate(one) for one in kept["probed"]), dict(kept["integers"])
    except (OSError, ValueError, LookupError, AttributeError):
        return None  # not there, or damaged: probed again


@dataclass
class Tried:
    """One choice on its way."""

    gene: Gene
    choice: Choice
    place: int  # index of the gene
    kl: float | None = None
    gained: dict[str, float] = field(default_factory=dict)  # share of the baseline's latency, by profile
    best_kl: float | None = None
    best_gained: dict[str, float] = field(default_factory=dict)
    smaller: float | None = None  # share of the size
    best_smaller: float | None = None  # the same among integers, where it saves nothing alone
    used: tuple[latency.Used, ...] = ()
    reach: tuple[str, ...] = ()  # layers outside of its own site that it changes
    failed: bool = False
    why: str = ""

    def pays(self, hopeless: float, *, small: bool) -> bool:
        """Alone in the unmodified network."""
        return worth(self.gained, self.smaller, small) and self.kl is not None and self.kl <= hopeless

    def pays_on_top(self, hopeless: float, *, small: bool) -> bool:
        """On top of the best choices of the others; where its divergence was not looked at, the first one counts."""
        kl = self.kl if self.best_kl is None else self.best_kl
        return worth(self.best_gained, self.saved, small) and kl is not None and kl <= hopeless

    @property
    def saved(self) -> float | None:
        """Of the size, in the background where it saves anything."""
        return self.smaller if self.best_smaller is None else self.best_smaller

    def gains(self, *, small: bool) -> bool:
        """In one background or the other, whatever it costs in quality."""
        return worth(self.gained, self.smaller, small) or worth(self.best_gained, self.saved, small)


def worth(gained: Mapping[str, float], smaller: float | None, small: bool) -> bool:
    """Faster on a device, or smaller where size is bounded."""
    return any(share > PAYS for share in gained.values()) or (small and smaller is not None and smaller > PAYS)


class _Probe:
    def __init__(
        self,
        work: Work,
        full: Space,
        facts: Facts,
        deadline: float,
        *,
        small: bool,
        say: Callable[[str], None],
        step: Step,
    ) -> None:
        self.work, self.space, self.facts, self.deadline = work, full, facts, deadline
        self.small, self.say, self.step = small, say, step
        self.phase = {gene.op: work.ops[gene.op].phase for gene in full.genes if gene.op in work.ops}
        self.integers: dict[str, float] = {}

    def go(self) -> tuple[Probed, ...]:
        threads = torch.get_num_threads()
        try:
            return self.tried()
        finally:
            torch.set_num_threads(threads)

    def tried(self) -> tuple[Probed, ...]:
        waiting = self.questions()
        if not waiting:
            return ()
        left = self.deadline - time.perf_counter()
        self.say(f"probing {len(waiting)} choices, for at most about {left:.0f} s")
        self.step("the network as it is", 0, len(waiting), left)
        self.network = Untrained(self.work, self.space, self.facts.baseline)
        self.hopeless = HOPELESS * max(self.network.answers.constant(), LEAST)
        shaped = [one for one in waiting if not is_numeric(one.gene, self.work)]
        halfway = (time.perf_counter() + self.deadline) / 2
        for one in self.counted(shaped, "latency", halfway):
            self.attempt(self.shape, one, until=halfway)
        self.predict([one for one in shaped if one.used])
        try:
            self.integers = self.in_integers()
        except Exception as error:  # noqa: BLE001  a stranger's network may break an op: each site is still tried alone
            self.say(f"not all sites together can be integers: {' '.join(str(error).split())[:160]}")
        for one in self.counted(waiting, "quality", self.deadline):
            self.attempt(self.judge, one)
        doubtful = [one for one in shaped if one.kl is not None and one.kl > self.hopeless]
        for one in self.counted(doubtful, "quality beside the others' best", self.deadline):
            self.attempt(self.judge_on_top, one, self.best(waiting))
        return tuple(self.record(one) for one in waiting)

    def counted(self, every: Sequence[Tried], what: str, until: float) -> Iterator[Tried]:
        """Each of them, said before it is looked at."""
        began = time.perf_counter()
        for done, one in enumerate(every):
            now = time.perf_counter()
            left = until - now
            if done:
                left = min(left, (now - began) / done * (len(every) - done))
            choice = str(one.choice).lower() if isinstance(one.choice, bool) else one.choice
            self.step(f"{what}: {one.gene.name} = {choice}", done, len(every), max(left, 0.0))
            yield one

    def in_integers(self) -> dict[str, float]:
        """Latency with every site in integers, as a share of the baseline's, by profile."""
        if not self.network.numbers:
            return {}
        found: dict[str, float] = {}
        for target in self.network.targets:
            ratio = target.ratio(self.network.file(self.network.numbers, target.profile), target.floats)
            found |= dict.fromkeys(target.names, _figure(ratio) or 0.0)
        return found

    def attempt(self, look: Callable[..., None], one: Tried, *more: Any, until: float | None = None) -> None:
        """Look at a choice if there is time; one that cannot be made is marked so."""
        if one.failed or time.perf_counter() > (until or self.deadline):
            return
        try:
            look(one, *more)
        except TrialFailure as failure:
            one.failed, one.why = True, str(failure)
        except Exception as error:  # noqa: BLE001  a stranger's network may break an op: said, and the choice is left out
            one.failed, one.why = True, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

    def questions(self) -> list[Tried]:
        """Choices that change the untrained network by themselves.

        Sites of one shape are asked the same question: of each such group an equal share is asked before any time is
        up, so that nothing is known of few and something of all; so of the choices of a knob. Larger sites first.
        """
        sites = self.facts.sites
        inside = {gene.name: [s for s in sites if _inside(s.name, gene.site)] for gene in self.space.genes}
        macs = {name: sum(s.macs for s in found) for name, found in inside.items()}
        sizes = {name: sum(s.parameters for s in found) for name, found in inside.items()}
        neutral = sp.parent(self.space)
        found = [
            Tried(gene, choice, place)
            for place, gene in enumerate(self.space.genes)
            if gene.kind == "arch" or (self.phase.get(gene.op) in ("structure", "numeric") and not self.learns(gene.op))
            for choice in gene.choices[1:]
            # weights in four bits do nothing where their layers are floats: they are looked at beside integers
            if is_packing(gene) or genotype(self.space, {place: choice}) != neutral
        ]
        alike: dict[tuple[object, ...], list[Tried]] = {}
        for one in found:
            name = one.gene.name
            kind = (one.gene.op, one.gene.param, one.choice, macs[name], sizes[name])
            alike.setdefault((name,) if one.gene.kind == "arch" else kind, []).append(one)
        turn = {id(one): n / len(group) for group in alike.values() for n, one in enumerate(group)}
        return sorted(found, key=lambda one: (turn[id(one)], one.gene.kind != "arch", -macs[one.gene.name], one.place))

    def learns(self, op: str) -> bool:
        """Whether an op's parts begin at random, so that nothing is known of them before training."""
        return bool(getattr(self.work.ops[op], "learns", False))

    # --- one choice

    def shape(self, one: Tried) -> None:
        """Which layers it leaves: what decides its latency, and needs no fit."""
        one.used, one.why = self.network.shaped({one.place: one.choice})
        if one.gene.kind == "policy":
            one.reach = tuple(
                name for name in _changed(self.network.used, one.used) if not _inside(name, one.gene.site)
            )

    def predict(self, shaped: Sequence[Tried]) -> None:
        """What the changed layers gain, among floats and among integers."""
        before = max(_weights(self.network.used), 1)
        for target in self.network.targets:
            target.proportions.learn(used for one in shaped for used in one.used)
            for one in shaped:
                for integers, gained in ((False, one.gained), (True, one.best_gained)):
                    ms = target.proportions.gained(one.used, integers=integers)
                    gained.update(dict.fromkeys(target.names, 0.0 if ms is None else ms / target.total))
        for one in shaped:
            one.smaller = 1 - _weights(one.used) / before

    def judge(self, one: Tried) -> None:
        """Its divergence alone in the unmodified network, if it gains anything; a change of numbers is timed too."""
        if is_packing(one.gene):
            self.judge_packing(one)
        elif is_numeric(one.gene, self.work):
            self.judge_numbers(one)
        elif one.used and (one.gene.kind == "arch" or one.gains(small=self.small)):
            one.kl = self.network.changed({one.place: one.choice})

    def judge_packing(self, one: Tried) -> None:
        """What it saves and costs where all sites are integers; among floats it is not there."""
        network = self.network
        for target in network.targets:
            plain = network.file(network.numbers, target.profile)
            full = network.file({**network.numbers, one.place: one.choice}, target.profile)
            added = network.divergence_of(full) - network.divergence_of(plain)
            one.kl = one.best_kl = max(one.kl or 0.0, added)
            one.smaller, one.best_smaller = 0.0, (len(plain) - len(full)) / len(target.floats)
            one.gained |= dict.fromkeys(target.names, 0.0)
            one.best_gained |= dict.fromkeys(target.names, 0.0)

    def judge_numbers(self, one: Tried) -> None:
        network = self.network
        for target in network.targets:
            model = network.file({one.place: one.choice}, target.profile)
            one.kl = max(one.kl or 0.0, network.divergence_of(model))
            one.smaller = 1 - len(model) / len(target.floats)
            one.gained |= dict.fromkeys(target.names, 1 - target.ratio(model, target.floats))
        if self.paid(one) and worth(one.gained, None, False):  # a smaller file that is slower alone is not judged yet
            return
        others = {place: choice for place, choice in network.numbers.items() if place != one.place}
        for target in network.targets:
            undone = network.file(others, target.profile)
            full = network.file({**others, one.place: one.choice}, target.profile)
            slower = target.ratio(undone, full) - 1
            one.best_gained |= dict.fromkeys(target.names, slower * target.integers_total / target.total)
            if one.kl is not None and one.kl > self.hopeless:
                added = network.divergence_of(full) - network.divergence_of(undone)
                one.best_kl = max(one.best_kl or 0.0, added)

    def judge_on_top(self, one: Tried, best: Sequence[Tried]) -> None:
        """What it adds to the divergence where all other sites take their best change of structure."""
        others = {other.place: other.choice for other in best if other.place != one.place}
        one.best_kl = self.network.changed({**others, one.place: one.choice}) - self.network.changed(others)

    def paid(self, one: Tried) -> bool:
        return one.pays(self.hopeless, small=self.small)

    def best(self, tried: Sequence[Tried]) -> list[Tried]:
        """Per site the change of structure that gains most for what it costs; blocks stay, or nothing inside could."""
        found: dict[str, Tried] = {}
        for one in tried:
            structural = one.gene.kind == "policy" and self.phase[one.gene.op] == "structure" and one.gene.op != "block"
            if structural and self.paid(one):
                held = found.get(one.gene.site)
                if held is None or self.merit(one) > self.merit(held):
                    found[one.gene.site] = one
        return list(found.values())

    def merit(self, one: Tried) -> float:
        return max(one.gained.values(), default=0.0) * (1 - (one.kl or 0.0) / self.hopeless)

    def record(self, one: Tried) -> Probed:
        kept, why = self.verdict(one)
        scale = {name: ms for target in self.network.targets for name, ms in target.scale.items()}
        return Probed(
            gene=one.gene.name,
            choice=one.choice,
            kl=_figure(one.kl),
            ms={name: _figure(share * scale[name]) or 0.0 for name, share in one.gained.items()},
            best_kl=_figure(one.best_kl),
            best_ms={name: _figure(share * scale[name]) or 0.0 for name, share in one.best_gained.items()},
            smaller=_figure(one.smaller),
            best_smaller=_figure(one.best_smaller),
            reach=one.reach,
            kept=kept,
            why=why,
        )

    def verdict(self, one: Tried) -> tuple[bool, str]:
        """Whether a choice stays, and why if not, or if that is not known."""
        if one.failed:
            return False, one.why
        if not one.gained:
            return True, "not tried: the time was up"
        if one.gene.kind == "arch" or self.paid(one) or one.pays_on_top(self.hopeless, small=self.small):
            return True, ""
        if not one.gains(small=self.small):
            return False, one.why or "gains nothing"
        if one.kl is None or one.best_kl is None:
            return True, "its quality was not looked at: the time was up"
        return False, "hopeless without training"


def _weights(used: Sequence[latency.Used]) -> int:
    return sum({one.name: one.weights for one in used}.values())


def _changed(before: Sequence[latency.Used], after: Sequence[latency.Used]) -> list[str]:
    """Names of layers that are not there any more, or are other layers."""
    left = {one.name: one for one in after}
    return list(dict.fromkeys(one.name for one in before if left.get(one.name) != one))


def _inside(name: str, site: str) -> bool:
    return site == "." or f"{name}.".startswith(f"{site}.")


def _figure(value: float | None) -> float | None:
    """Six digits; nothing that JSON cannot hold."""
    if value is None:
        return None
    return float(f"{min(value, 1e9):.6g}") if math.isfinite(value) else 1e9
