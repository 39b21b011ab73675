"""A compression problem in closed form whose true front is known: for tests and benchmarks, without torch or ray.

A made-up network of stages and sites. Latency behaves as measured networks do: channels pay in steps of 16, a site's
work depends on what its neighbour before it kept, int8 pays differently per site and every change of number type
between neighbours costs a border. Quality falls per site by its own sensitivity, more where one site is cut twice or
two neighbours are both pruned, and is partly won back by a distillation recipe. All of it is a chain, so dynamic
programming over integer microseconds finds the exact front.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from zlib import crc32

import numpy as np

from autocompress import pareto
from autocompress import space as sp
from autocompress.testing.closed_probe import probed
from autocompress.types import (
    Assignment,
    Budget,
    Choice,
    Facts,
    Gene,
    Genotype,
    Goal,
    Interval,
    Limit,
    Outcome,
    Quality,
    Reading,
    Site,
    Space,
    State,
    Trial,
    TrialFailure,
)

RATIOS = (0.0, 0.2, 0.4, 0.6)
BITS = ("float", "int8")
RANKS = (1.0, 0.5, 0.25)
SIDES = (32, 24)
WEIGHTS = (0.0, 0.5, 0.9)
TEMPERATURES = (1.0, 2.0, 4.0)
RANK_TIME = (1.0, 0.85, 0.55)
PRUNE_DROP = (0, 150, 500, 1600)  # in units of 1e-5, for a site of sensitivity 1
RANK_DROP = (0, 250, 900)
INT8_DROP = 60
PARENT_QUALITY, CHANCE = 0.98, 0.1
LAYOUTS = {  # genes -> (channels, sites) of the stages
    10: ((32, 2),),
    20: ((32, 2), (64, 3)),
    60: ((32, 5), (64, 6), (128, 6)),
    200: ((32, 15), (64, 16), (128, 16), (256, 16)),
}


@dataclass(frozen=True, slots=True)
class Place:
    """One site of the made-up network: where it stands, what it costs and how it suffers."""

    name: str
    stage: int
    place: int  # within its stage
    channels: int
    work: int  # microseconds in float at full width
    int8: tuple[float, ...]  # time factor per device
    sensitivity: float
    pair: int  # drop when this site and the one before it are both pruned to the most


class ClosedForm:
    """The problem of `size` genes (10, 20, 60 or 200), drawn from `seed`, on `devices` made-up devices.

    Holds `space`, `goals`, `limit`, `facts`, and is an evaluator: `evaluate(assignment)` yields (state, outcome).
    `speedup` is every device's budget, `drop` the quality that may be lost. Where `fail_one_in` is n > 0, about one
    candidate in n raises TrialFailure, always the same ones. With `probe` the facts hold a probe's table (`probed`).
    `noise` is the spread of quality's and latency's errors as shares, the same for the same genotype; hypervolume is
    always that of the true values.
    """

    def __init__(
        self,
        size: int = 20,
        *,
        devices: int = 1,
        seed: int = 0,
        speedup: float = 1.25,
        drop: float = 0.1,
        fail_one_in: int = 0,
        probe: bool = False,
        noise: float = 0.0,
    ) -> None:
        if size not in LAYOUTS:
            raise ValueError(f"size {size} is not one of {sorted(LAYOUTS)}")
        rng = Random(f"closed-form:{size}:{seed}")
        self.stages = LAYOUTS[size]
        self.kernels = size >= 60
        self.fail_one_in, self.noise, self.seed = fail_one_in, noise, seed
        self.profiles = tuple(f"device-{'ab'[i] if devices <= 2 else i}" for i in range(devices))
        self.border = tuple(6 + 10 * i for i in range(devices))  # microseconds per change of number type
        self.places = tuple(self._places(rng, devices))
        self.shallow = tuple(rng.randint(500, 3000) for _ in self.stages)  # drop per site left out of a stage, 1e-5
        self.narrow = tuple(rng.randint(200, 2500) for _ in self.stages)  # drop of the smaller kernel
        self.small = rng.randint(1500, 4000)  # drop of the smaller input
        self.recipe = [[900, 900, 900], *([rng.randint(0, 800) for _ in TEMPERATURES] for _ in WEIGHTS[1:])]
        self.space = Space(name=f"closed-form-{size}", genes=tuple(self._genes()))
        self.baseline = tuple(self.cost(sp.parent(self.space), d)[0] for d in range(devices))
        self.budgets = tuple(Budget(profile=profile, speedup=speedup) for profile in self.profiles)
        self.goals: tuple[Goal, ...] = pareto.goals(self.budgets)
        self.limit = Limit(metric="accuracy", floor=self.quality(sp.parent(self.space)) - drop)
        self.facts = Facts(
            sites=tuple(self._sites()),
            baseline={
                name: _reading(name, base, base) for name, base in zip(self.profiles, self.baseline, strict=True)
            },
            baseline_quality=_found(self.quality(sp.parent(self.space))),
        )
        if probe:
            self.facts = self.facts.model_copy(update={"probe": tuple(probed(self))})

    # --- the problem ------------------------------------------------------------------------------------------------

    def quality(self, g: Genotype) -> float:
        """Quality after full training."""
        return _quality(self.cost(g, 0)[1])

    def ratio(self, g: Genotype, device: int = 0) -> float:
        """Latency over the parent's on a device."""
        return self.cost(g, device)[0] / self.baseline[device]

    def cost(self, g: Genotype, device: int = 0) -> tuple[int, int]:
        """(microseconds, drop in units of 1e-5) of a genotype in canonical form or not."""
        value = dict(zip((gene.name for gene in self.space.genes), sp.canonical(self.space, g), strict=True))
        side = value["side"]
        micros, drop = 0, self.small * side + self.recipe[value["weight"]][value["temperature"]]
        before = (0, 0, self.stages[0][0])
        for stage, (_, size) in enumerate(self.stages):
            left_out = value[f"stage{stage}.depth"]
            kernel = value.get(f"stage{stage}.kernel", 0)
            drop += self._stage_drop(stage, left_out, kernel)
            for place in (p for p in self.places if p.stage == stage and p.place < size - left_out):
                own = tuple(value[f"{place.name}.{knob}"] for knob in ("ratio", "bits", "rank"))
                micros += self._micros(place, before, (own[0], own[1], own[2]), kernel, side, device)
                drop += self._drop(place, before[0], (own[0], own[1], own[2]))
                before = (own[0], own[1], place.channels)
        return micros, drop

    def _stage_drop(self, stage: int, left_out: int, kernel: int) -> int:
        return round(self.shallow[stage] * left_out**1.5) + self.narrow[stage] * kernel

    def _micros(
        self, place: Place, before: tuple[int, int, int], own: tuple[int, int, int], kernel: int, side: int, device: int
    ) -> int:
        kept = _stepped(before[0], before[2]) * _stepped(own[0], place.channels)
        factor = (place.int8[device] if own[1] else 1.0) * RANK_TIME[own[2]] * (0.5 if kernel else 1.0)
        border = self.border[device] if own[1] != before[1] else 0
        return max(1, round(place.work * kept * factor * (SIDES[side] / SIDES[0]) ** 2)) + border

    def _drop(self, place: Place, ratio_before: int, own: tuple[int, int, int]) -> int:
        twice = PRUNE_DROP[own[0]] * RANK_DROP[own[2]] / 1000
        alone = PRUNE_DROP[own[0]] + RANK_DROP[own[2]] + INT8_DROP * own[1]
        both = place.pair * RATIOS[own[0]] * RATIOS[ratio_before] / RATIOS[-1] ** 2
        return round(place.sensitivity * (alone + twice) + both)

    # --- the evaluator ----------------------------------------------------------------------------------------------

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        """Latency first, then one outcome per rung. Raises TrialFailure for the candidates that fail by design."""
        g = sp.canonical(self.space, assignment.genotype)
        if self.fail_one_in and any(g) and crc32(repr(g).encode()) % self.fail_one_in == 0:
            raise TrialFailure("this candidate fails by design")
        costs = [self.cost(g, d) for d in range(len(self.profiles))]
        luck = Random(f"{self.seed}:{g}")
        readings = {
            name: _reading(name, max(1, round(cost[0] * (1 + luck.gauss(0, self.noise)))), base)
            for name, cost, base in zip(self.profiles, costs, self.baseline, strict=True)
        }
        sizes = dict.fromkeys(self.profiles, 1.0)
        if assignment.number and pareto.over_every_budget(readings, self.budgets):
            yield State.INFEASIBLE, Outcome(readings=readings, size_mb=sizes, reason="over every budget")
            return
        for index in range(assignment.start, len(assignment.rungs)):
            fidelity = assignment.rungs[index]
            # Half-trained candidates stand lower, the more heavily cut the lower.
            value = _quality(round(costs[0][1] * (2.0 - fidelity)) + round(2000 * (1.0 - fidelity)))
            value = min(1.0, max(0.0, value + luck.gauss(0, self.noise))) if self.noise else value
            found = _found(value)
            state = State.DONE if index == len(assignment.rungs) - 1 else State.RUNG
            quality = dict.fromkeys(self.profiles, found)
            yield state, Outcome(fidelity=fidelity, readings=readings, quality=quality, size_mb=sizes)

    def assignment(self, number: int, g: Genotype) -> Assignment:
        """What a worker would be asked to do for a genotype, in one rung."""
        return Assignment(number=number, attempt=1, genotype=g, candidate=sp.decode(self.space, g), rungs=(1.0,))

    def trial(self, number: int, g: Genotype, note: dict[str, object] | None = None) -> Trial:
        """The ended trial of a genotype, fully trained, infeasible or failed."""
        try:
            *_, (state, outcome) = self.evaluate(self.assignment(number, g))
        except TrialFailure as failure:
            state, outcome = State.FAILED, Outcome(reason=str(failure))
        return Trial(number=number, genotype=g, state=state, outcome=outcome, note=note or {})

    # --- what is known about it -------------------------------------------------------------------------------------

    def front(self, device: int = 0) -> tuple[tuple[float, float], ...]:
        """The exact front of one device: (quality, latency ratio), by rising ratio up to the parent's latency.

        Dynamic programming along the chain of sites: for each state (ratio and bits of the last site) and each whole
        number of microseconds, the least drop that reaches it.
        """
        found: list[np.ndarray] = [self._least_drop(side, device) for side in range(len(SIDES))]
        least = np.minimum.reduce(found) + min(min(row) for row in self.recipe)
        points: list[tuple[float, float]] = []
        lowest = math.inf
        for micros, drop in enumerate(least.tolist()):
            if drop < lowest and drop < _NEVER:
                lowest = drop
                points.append((_quality(drop), micros / self.baseline[device]))
        return tuple(points)

    def reference(self, device: int = 0) -> tuple[float, float]:
        """Reference point of the hypervolume: the quality floor and the latency budget."""
        return self.limit.floor, 1.0 / (self.budgets[device].speedup or 1.0)

    def hypervolume(self, trials: list[Trial], device: int = 0) -> float:
        """Hypervolume of what the trials reached, as a share of the true front's; ValueError where that is nothing."""
        goal = self.goals[device]
        told = [
            t for t in trials if t.state is State.DONE and (s := pareto.of(t, goal, self.limit)) and s.violation <= 0
        ]
        points = [(self.quality(t.genotype), self.ratio(t.genotype, device)) for t in told]
        reference = self.reference(device)
        most = pareto.hypervolume(self.front(device), reference)
        if not most:
            raise ValueError(f"no candidate of this problem meets {self.budgets[device]} with quality {reference[0]}")
        return pareto.hypervolume(points, reference) / most

    def _least_drop(self, side: int, device: int) -> np.ndarray:
        length = self.baseline[device] + 1
        table = np.full((len(RATIOS), len(BITS), length), _NEVER, dtype=np.int64)
        table[0, 0, 0] = self.small * side
        channels = self.stages[0][0]
        for stage, (own_channels, size) in enumerate(self.stages):
            ends: list[np.ndarray] = []
            for kernel in range(2 if self.kernels else 1):
                current, before = table, channels
                for place in (p for p in self.places if p.stage == stage):
                    current = self._step(current, place, before, kernel, side, device)
                    before = own_channels
                    left_out = size - 1 - place.place
                    if left_out < len(self._depths(size)):
                        ends.append(current + self._stage_drop(stage, left_out, kernel))
            table, channels = np.minimum.reduce(ends), own_channels
        return table.min(axis=(0, 1))

    def _step(self, table: np.ndarray, place: Place, channels: int, kernel: int, side: int, device: int) -> np.ndarray:
        length = table.shape[-1]
        after = np.full_like(table, _NEVER)
        for ratio_before, bits_before, ratio, bits, rank in np.ndindex(4, 2, 4, 2, 3):
            own = (ratio, bits, rank)
            micros = self._micros(place, (ratio_before, bits_before, channels), own, kernel, side, device)
            drop = self._drop(place, ratio_before, own)
            target = after[ratio, bits, micros:]
            np.minimum(target, table[ratio_before, bits_before, : length - micros] + drop, out=target)
        return after

    # --- drawing it -------------------------------------------------------------------------------------------------

    def _places(self, rng: Random, devices: int) -> Iterator[Place]:
        for stage, (channels, size) in enumerate(self.stages):
            for place in range(size):
                yield Place(
                    name=f"stages.{stage}.{place}",
                    stage=stage,
                    place=place,
                    channels=channels,
                    work=rng.randint(60, 180),
                    int8=tuple(rng.uniform(0.35, 0.9) for _ in range(devices)),
                    sensitivity=math.exp(rng.gauss(-0.3, 0.9)),
                    pair=rng.randint(0, 1500),
                )

    @staticmethod
    def _depths(size: int) -> tuple[int, ...]:
        return tuple(range(size, max(1, size - 3), -1))

    def _genes(self) -> Iterator[Gene]:
        yield Gene(name="side", kind="arch", choices=SIDES)
        for stage, (_, size) in enumerate(self.stages):
            yield Gene(name=f"stage{stage}.depth", kind="arch", choices=self._depths(size))
            if self.kernels:
                yield Gene(name=f"stage{stage}.kernel", kind="arch", choices=(5, 3))
        for place in self.places:
            size = self.stages[place.stage][1]
            kept = tuple(depth for depth in self._depths(size) if depth > place.place)
            when: dict[str, tuple[Choice, ...]] = (
                {} if kept == self._depths(size) else {f"stage{place.stage}.depth": kept}
            )
            for knob, op, param, choices in (
                ("ratio", "prune", "ratio", RATIOS),
                ("bits", "quantize", "bits", BITS),
                ("rank", "lowrank", "rank", RANKS),
            ):
                name = f"{place.name}.{knob}"
                yield Gene(name=name, kind="policy", choices=choices, when=when, site=place.name, op=op, param=param)
        yield Gene(name="weight", kind="policy", choices=WEIGHTS, site=".", op="distill", param="weight")
        yield Gene(
            name="temperature",
            kind="policy",
            choices=TEMPERATURES,
            when={"weight": WEIGHTS[1:]},
            site=".",
            op="distill",
            param="temperature",
        )

    def _sites(self) -> Iterator[Site]:
        channels = (self.places[0].channels, *(place.channels for place in self.places))
        for i, (place, (inputs, outputs)) in enumerate(zip(self.places, pairwise(channels), strict=True)):
            yield Site(
                name=place.name,
                kind="conv",
                ops=("prune", "quantize", "lowrank"),
                parameters=inputs * outputs * 9,
                macs=place.work * 10_000,
                in_channels=inputs,
                out_channels=outputs,
                kernel=3,
                depth=i / max(1, len(self.places) - 1),
            )


_NEVER = 2**40  # more drop than any genotype has


def _stepped(ratio: int, channels: int) -> float:
    """Share of the work that is left: channels are computed in blocks of 16."""
    return math.ceil(round(channels * (1.0 - RATIOS[ratio])) / 16) * 16 / channels


def _quality(drop: int) -> float:
    return CHANCE + (PARENT_QUALITY - CHANCE) * math.exp(-drop * 1e-5)


def _found(value: float) -> Quality:
    interval = Interval(value=value, low=max(0.0, value - 0.01), high=min(1.0, value + 0.01))
    return Quality(metric="accuracy", split="selection", value=interval, samples=1000)


def _reading(profile: str, micros: int, baseline: int) -> Reading:
    def exact(value: float) -> Interval:
        return Interval(value=value, low=value, high=value)

    return Reading(
        profile=profile,
        ms=exact(micros / 1000),
        p95_ms=exact(micros / 1000),
        baseline_ms=exact(baseline / 1000),
        ratio=exact(micros / baseline),
        samples=100,
        rounds=3,
    )
