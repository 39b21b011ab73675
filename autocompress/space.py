"""The question as pure data (floor F1): canonical form, sampling, variation, decoding and counting of genotypes.

A genotype holds one choice index per gene. In the canonical form a gene whose `when` does not hold stands at its first
choice; `when` is read in the order of the space on canonical values, so a chain of vanishing genes vanishes whole.
Every function that returns a genotype returns a canonical one. Random numbers come from the `random.Random` given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from random import Random

from autocompress.types import Candidate, Choice, Gene, Genotype, Policy, Rule, Space, UserError


@dataclass(frozen=True, slots=True)
class Knob:
    """One gene made ready: `needs` pairs an earlier gene's index with its choices that let this one apply."""

    size: int
    needs: tuple[tuple[int, frozenset[int]], ...]
    ordered: bool  # the choices are numbers that only rise or only fall, so a neighbour is a small step
    index: Mapping[tuple[bool, Choice], int]

    def applies(self, values: list[int] | Genotype) -> bool:
        """Whether the gene means anything, given the canonical values of the genes before it."""
        return all(values[other] in allowed for other, allowed in self.needs)


# A Space is not hashable (it holds dicts). The entry keeps its space alive, so an id here is never used twice.
_ready: dict[int, tuple[Space, tuple[Knob, ...]]] = {}
_READY_MOST = 64


def knobs(space: Space) -> tuple[Knob, ...]:
    """The genes made ready for reading, in order; raises UserError for a space that contradicts itself."""
    entry = _ready.get(id(space))
    if entry is None:
        made = _make(space)
        while len(_ready) >= _READY_MOST:
            del _ready[next(iter(_ready))]
        entry = _ready[id(space)] = (space, made)
    return entry[1]


def parent(space: Space) -> Genotype:
    """The genotype that leaves the parent alone: every gene at its first choice."""
    return (0,) * len(space.genes)


def check(space: Space, g: Genotype) -> None:
    """Raises UserError unless `g` has one valid choice index per gene."""
    if len(g) != len(space.genes):
        raise UserError(f"space {space.name!r} has {len(space.genes)} genes, but the genotype has {len(g)}")
    for gene, value in zip(space.genes, g, strict=True):
        if isinstance(value, bool) or not 0 <= value < len(gene.choices):
            raise UserError(f"gene {gene.name!r} has choices 0 to {len(gene.choices) - 1}, the genotype says {value!r}")


def canonical(space: Space, g: Genotype) -> Genotype:
    """`g` with every gene that does not apply at its first choice; idempotent. Raises UserError for an invalid `g`."""
    ready = knobs(space)
    if len(g) != len(ready) or not all(0 <= value < knob.size for value, knob in zip(g, ready, strict=True)):
        check(space, g)
    return _canonical(ready, list(g))


def active(space: Space, g: Genotype) -> tuple[bool, ...]:
    """Per gene, whether it applies in the canonical genotype `g`."""
    return tuple(knob.applies(g) for knob in knobs(space))


def sample(space: Space, rng: Random) -> Genotype:
    """Every gene drawn uniformly on its own, then made canonical."""
    ready = knobs(space)
    return _canonical(ready, [int(rng.random() * knob.size) for knob in ready])


def mutate(space: Space, g: Genotype, rng: Random, changes: float = 1.5) -> Genotype:
    """Another canonical genotype near `g`; `g` made canonical where the space holds no other.

    One gene that applies always changes, each further one with a chance that makes `changes` the mean in all. The
    earliest changed gene keeps applying (its `when` looks only at genes before it), so the result always differs.
    Genes of rising or falling numbers take a neighbouring choice half of the time.
    """
    ready = knobs(space)
    values = list(canonical(space, g))
    free = [i for i, knob in enumerate(ready) if knob.size > 1 and knob.applies(values)]
    if not free:
        return tuple(values)
    sure = free[int(rng.random() * len(free))]
    chance = max(0.0, changes - 1.0) / max(1, len(free) - 1)
    for i in free:
        if i == sure or rng.random() < chance:
            values[i] = _other(ready[i], values[i], rng)
    return _canonical(ready, values)


def crossover(space: Space, a: Genotype, b: Genotype, rng: Random) -> Genotype:
    """A child of two: half of the time gene by gene, else a stretch of `b` laid into `a` (neighbours stay together).

    A gene that applies in the child but in only one of the two is taken from that one, where its value was meant.
    """
    ready = knobs(space)
    first, second = canonical(space, a), canonical(space, b)
    size = len(ready)
    if rng.random() < 0.5:
        share = rng.random()
        from_second = [rng.random() < share for _ in range(size)]
    else:
        low, high = sorted((int(rng.random() * (size + 1)), int(rng.random() * (size + 1))))
        from_second = [low <= i < high for i in range(size)]
    child: list[int] = []
    for i, knob in enumerate(ready):
        if not knob.needs:
            child.append(second[i] if from_second[i] else first[i])
        elif not knob.applies(child):
            child.append(0)
        else:
            mine, theirs = knob.applies(first), knob.applies(second)
            take = from_second[i] if mine == theirs else theirs
            child.append(second[i] if take else first[i])
    return tuple(child)


def every(space: Space) -> Iterator[Genotype]:
    """All canonical genotypes, once each, in lexicographic order (the parent first); lazily."""
    ready = knobs(space)
    values = [0] * len(ready)
    while True:
        yield tuple(values)
        i = len(values) - 1
        while i >= 0 and not (values[i] + 1 < ready[i].size and ready[i].applies(values)):
            values[i] = 0
            i -= 1
        if i < 0:
            return
        values[i] += 1


def decode(space: Space, g: Genotype) -> Candidate:
    """What to build and how to compress it.

    One Rule per (site, op) with all its settings, only where at least one of them leaves its first choice.
    """
    arch: dict[str, Choice] = {}
    settings: dict[tuple[str, str], dict[str, Choice]] = {}
    asked: set[tuple[str, str]] = set()
    for gene, value in zip(space.genes, canonical(space, g), strict=True):
        if gene.kind == "arch":
            arch[gene.name] = gene.choices[value]
            continue
        settings.setdefault((gene.site, gene.op), {})[gene.param] = gene.choices[value]
        if value:
            asked.add((gene.site, gene.op))
    rules = tuple(Rule(site=key[0], op=key[1], settings=found) for key, found in settings.items() if key in asked)
    return Candidate(arch=arch, policy=Policy(rules=(*rules, *space.always)))


def encode(space: Space, candidate: Candidate) -> Genotype:
    """The canonical genotype of a candidate. What it does not mention stands at its first choice.

    Raises UserError for knobs, sites, ops, settings or values that the space does not hold.
    """
    ready = knobs(space)
    at = {_key(gene): i for i, gene in enumerate(space.genes)}
    values = [0] * len(ready)

    def put(key: tuple[str, str, str], value: Choice, what: str) -> None:
        i = at.get(key)
        if i is None:
            raise UserError(f"space {space.name!r} has no {what}")
        choice = ready[i].index.get((isinstance(value, bool), value))
        if choice is None:
            raise UserError(f"{what}: {value!r} is not one of {list(space.genes[i].choices)} in space {space.name!r}")
        values[i] = choice

    for name, value in candidate.arch.items():
        put(("", "", name), value, f"architecture knob {name!r}")
    for rule in candidate.policy.rules:
        if rule in space.always:
            continue
        for param, value in rule.settings.items():
            put((rule.site, rule.op, param), value, f"setting {param!r} of op {rule.op!r} at site {rule.site!r}")
    return _canonical(ready, values)


def cardinality(space: Space) -> int:
    """How many canonical genotypes there are, exactly, by variable elimination (Dechter 1999, bucket elimination).

    Choices that no `when` tells apart are counted together, so the tables grow only with how `when`s are entangled.
    """
    ready = knobs(space)
    uses: list[list[frozenset[int]]] = [[] for _ in ready]
    for knob in ready:
        for other, allowed in knob.needs:
            uses[other].append(allowed)
    # Per gene: classes of choices that satisfy the same `when`s, with how many choices each holds.
    classes: list[list[tuple[frozenset[int], int]]] = []
    for knob, sets in zip(ready, uses, strict=True):
        groups: dict[tuple[bool, ...], set[int]] = {}
        for value in range(knob.size):
            groups.setdefault(tuple(value in allowed for allowed in sets), set()).add(value)
        classes.append([(frozenset(group), len(group)) for group in groups.values()])

    factors: list[tuple[tuple[int, ...], dict[tuple[int, ...], int]]] = []
    for i, knob in enumerate(ready):
        scope = (*(other for other, _ in knob.needs), i)
        table: dict[tuple[int, ...], int] = {}
        for cell in product(*(range(len(classes[j])) for j in scope)):
            holds = all(classes[o][c][0] <= allowed for (o, allowed), c in zip(knob.needs, cell, strict=False))
            members, count = classes[i][cell[-1]]
            table[cell] = count if holds else int(0 in members)
        factors.append((scope, table))

    total, left = 1, set(range(len(ready)))
    while left:
        i = min(left, key=lambda j: (_width(factors, classes, j), j))
        left.remove(i)
        near = [f for f in factors if i in f[0]]
        factors = [f for f in factors if i not in f[0]]
        scope = tuple(sorted({j for f in near for j in f[0]} - {i}))
        table = {}
        for cell in product(*(range(len(classes[j])) for j in scope)):
            known = dict(zip(scope, cell, strict=True))
            table[cell] = sum(
                math.prod(f_table[tuple(c if j == i else known[j] for j in f_scope)] for f_scope, f_table in near)
                for c in range(len(classes[i]))
            )
        if scope:
            factors.append((scope, table))
        else:
            total *= table[()]
    return total


def _width(
    factors: list[tuple[tuple[int, ...], dict[tuple[int, ...], int]]],
    classes: list[list[tuple[frozenset[int], int]]],
    i: int,
) -> int:
    """Size of the table that eliminating gene `i` now would make."""
    return math.prod(len(classes[j]) for j in {j for scope, _ in factors if i in scope for j in scope} - {i})


def _key(gene: Gene) -> tuple[str, str, str]:
    return ("", "", gene.name) if gene.kind == "arch" else (gene.site, gene.op, gene.param)


def _make(space: Space) -> tuple[Knob, ...]:
    at: dict[str, int] = {}
    keys: set[tuple[str, str, str]] = set()
    made: list[Knob] = []
    for i, gene in enumerate(space.genes):
        where = f"space {space.name!r}, gene {gene.name!r}"
        if gene.kind == "policy" and not (gene.site and gene.op and gene.param):
            raise UserError(f"{where}: a policy gene needs `site`, `op` and `param`")
        if _key(gene) in keys:
            raise UserError(f"{where}: another gene already sets {gene.param!r} of {gene.op!r} at {gene.site!r}")
        keys.add(_key(gene))
        index = {(isinstance(choice, bool), choice): j for j, choice in reversed(list(enumerate(gene.choices)))}
        if len(index) != len(gene.choices):
            raise UserError(f"{where}: a choice occurs twice in {list(gene.choices)}")
        needs: list[tuple[int, frozenset[int]]] = []
        for name, allowed in gene.when.items():
            other = made[at[name]]
            wanted = [other.index.get((isinstance(choice, bool), choice)) for choice in allowed]
            for choice, found in zip(allowed, wanted, strict=True):
                if found is None:
                    known = list(space.genes[at[name]].choices)
                    raise UserError(f"{where}: `when` asks {name!r} for {choice!r}, which is not one of {known}")
            needs.append((at[name], frozenset(found for found in wanted if found is not None)))
        made.append(Knob(len(gene.choices), tuple(needs), _monotone(gene.choices), index))
        at[gene.name] = i
    return tuple(made)


def _monotone(choices: tuple[Choice, ...]) -> bool:
    numbers = [float(choice) for choice in choices if not isinstance(choice, bool | str)]
    if len(numbers) != len(choices):
        return False
    return numbers == sorted(numbers) or numbers == sorted(numbers, reverse=True)


def _canonical(ready: tuple[Knob, ...], values: list[int]) -> Genotype:
    for i, knob in enumerate(ready):
        if knob.needs and values[i] and not knob.applies(values):
            values[i] = 0
    return tuple(values)


def _other(knob: Knob, value: int, rng: Random) -> int:
    if knob.ordered and knob.size > 2 and rng.random() < 0.5:
        return rng.choice([near for near in (value - 1, value + 1) if 0 <= near < knob.size])
    other = int(rng.random() * (knob.size - 1))
    return other + (other >= value)


def spaced(size: int, many: int) -> tuple[int, ...]:
    """So many of `size` places, evenly spaced, the last among them."""
    return tuple(place for place in range(size) if (place + 1) * many // size > place * many // size)
