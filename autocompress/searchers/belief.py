"""What told trials teach about a number that depends on the genotype: a Gaussian process over its choices.

The kernel is additive first: choices shared by all sites of a setting (weighted by what the sites are like), each
choice on its own, and a probe's reading of it; then squared, so that what two choices do together can be learned too
(Duvenaud, Nickisch and Rasmussen 2011, additive Gaussian processes). How much of each is chosen by marginal likelihood
(Rasmussen and Williams 2006, section 5.4.1). Everything is linear or quadratic in a genotype's indicators, so it also
holds, with its slope, for a relaxed genotype whose genes are probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from autocompress.types import Facts, Gene, Genotype, Site, Space

Array = NDArray[np.float64]

OWN = (0.1, 0.4, 0.8)  # share of a choice's own effect against what it shares with the other sites
CURVED = (0.0, 0.3, 1.0)  # weight of the squared kernel
NOISE = (1e-4, 1e-2, 1e-1)  # variance of the observations, of 1
FLAT = 4.0  # prior variance of the mean


class Coding:
    """Genotypes as rows of indicators: one column per choice that does not leave its gene alone."""

    def __init__(self, space: Space, facts: Facts, effect: Sequence[float] | None = None) -> None:
        """`effect`, one number per column: what a probe found each choice to do, in any unit."""
        self.space = space
        sizes = [len(gene.choices) for gene in space.genes]
        self.start = np.concatenate([[0], np.cumsum([size - 1 for size in sizes])]).astype(int)
        self.width = int(self.start[-1])
        self.gene = np.repeat(np.arange(len(sizes)), [size - 1 for size in sizes])
        self.choice = np.arange(self.width) - self.start[self.gene] + 1
        self.group = groups_of(space.genes)
        known = np.zeros(self.width) if effect is None else np.asarray(effect, dtype=float)
        self.known = known / max(float(np.abs(known).mean()), 1e-12) if known.any() else known
        self.shared = self._shared(facts.sites)
        # A choice that a probe found to do much is the one whose own effect is most uncertain.
        self.own = 0.3 + 0.7 * np.abs(self.known) if known.any() else 0.5 + 0.5 * work(space, facts.sites)[self.gene]

    def row(self, genotype: Genotype) -> Array:
        """(width,) indicators of one canonical genotype."""
        found = np.zeros(self.width)
        for i, value in enumerate(genotype):
            if value:
                found[self.start[i] + value - 1] = 1.0
        return found

    def rows(self, genotypes: Sequence[Genotype]) -> Array:
        """(n, width)."""
        return np.stack([self.row(g) for g in genotypes]) if genotypes else np.zeros((0, self.width))

    def _shared(self, sites: Sequence[Site]) -> Array:
        """(width, features): which setting, how far it goes, and the same weighted by what the site is like."""
        about = np.stack(
            [np.ones(len(self.space.genes)), work(self.space, sites), *_traits(self.space, sites).T], axis=1
        )
        keys = [(int(self.group[g]), int(c)) for g, c in zip(self.gene, self.choice, strict=True)]
        at = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        which = np.zeros((self.width, len(at)))
        which[np.arange(self.width), [at[key] for key in keys]] = 1.0
        crossed = (which[:, :, None] * about[self.gene][:, None, :]).reshape(self.width, len(at) * about.shape[1])
        if not self.known.any():
            return crossed
        # How far training wins back what was lost without differs from op to op.
        per_group = np.zeros((self.width, int(self.group.max(initial=0)) + 1))
        per_group[np.arange(self.width), self.group[self.gene]] = self.known
        parts = (crossed, self.known[:, None], per_group)
        return np.concatenate([part / math.sqrt(usual(part, self.start)) for part in parts], axis=1)


def work(space: Space, sites: Sequence[Site]) -> Array:
    """(genes,) each site's multiply-adds over the mean; 1 where they are not known."""
    macs = {site.name: float(site.macs) for site in sites}
    mean = sum(macs.values()) / len(macs) if macs else 0.0
    return np.array([macs.get(gene.site, mean) / mean if mean else 1.0 for gene in space.genes])


def groups_of(genes: Sequence[Gene]) -> NDArray[np.int64]:
    """(genes,) number of the question that is asked: one per op and setting, one per kind of architecture knob."""
    ids: dict[tuple[str, str], int] = {}
    keys = [("", g.name.rsplit(".", 1)[-1]) if g.kind == "arch" else (g.op, g.param) for g in genes]
    return np.array([ids.setdefault(key, len(ids)) for key in keys], dtype=int)


@dataclass(frozen=True)
class Guess:
    """One function of rows: a mean, a slope per column, and what each told trial pulls."""

    mean: float
    linear: Array  # (width,)
    across: Array  # (width, n): kernel between a column alone and each told trial
    pull: Array  # (n,)
    curved: float

    def __call__(self, rows: Array) -> Array:
        """(n,) for rows (n, width); rows may be relaxed."""
        near = rows @ self.across
        return self.mean + rows @ self.linear + (near + self.curved * near**2) @ self.pull

    def slope(self, rows: Array) -> Array:
        """(n, width): derivative by each indicator."""
        near = rows @ self.across
        return self.linear + ((1.0 + 2.0 * self.curved * near) * self.pull) @ self.across.T


@dataclass(frozen=True)
class Fit:
    """A process fitted to told trials, from which functions can be drawn."""

    coding: Coding
    rows: Array  # (n, width)
    doubt: Array  # (n,) variance of each beyond the noise, of 1
    y: Array  # (n,) standardised
    offset: float
    scale: float
    own: float
    curved: float
    noise: float
    signal: float  # variance of the whole, of 1
    root: Array  # Cholesky factor of the kernel's matrix with noise

    def mean(self) -> Guess:
        """The expected function."""
        return self._guess(np.zeros(self.coding.width), _solve(self.root, self.y))

    def draw(self, rng: np.random.Generator, width: float = 1.0) -> Guess:
        """A function from the posterior, by Matheron's rule (Wilson et al. 2020); of the prior its additive part.

        `width` draws it nearer to the mean (0) or as far from it as belief says (1).
        """
        shared, own = self._columns()
        slope = shared @ rng.standard_normal(shared.shape[1]) + own * rng.standard_normal(len(own))
        slope *= width * math.sqrt(self.signal)
        noise = width * np.sqrt(self.signal * (self.noise + self.doubt))
        sampled = self.rows @ slope + noise * rng.standard_normal(len(self.y))
        return self._guess(slope, _solve(self.root, self.y - sampled))

    def _columns(self) -> tuple[Array, Array]:
        return _scaled(self.coding, self.own)

    def _guess(self, slope: Array, pull: Array) -> Guess:
        shared, own = self._columns()
        across = shared @ (self.rows @ shared).T + (own**2)[:, None] * self.rows.T
        constant = self.offset + self.scale * FLAT * float(pull.sum())
        return Guess(constant, self.scale * slope, across, self.scale * pull, self.curved)


def fit(
    coding: Coding,
    rows: Array,
    y: Array,
    beside: Array | None = None,
    like: Fit | None = None,
    doubt: Array | None = None,
) -> Fit:
    """Fit to `y` (n,) at `rows` (n, width), n >= 1.

    `beside` (n, k) is what else `y` depends on, 0 where predictions are asked for: how far below full fidelity, from
    which earlier run. `doubt` (n,) is variance of each beyond the noise, in units of the variance of `y`. With `like`
    its hyperparameters are taken over instead of being chosen anew.
    """
    offset, scale = float(np.median(y)), max(float(np.std(y)), 1e-9)
    told = (y - offset) / scale
    apart = np.zeros((len(y), 0)) if beside is None else beside
    unsure = np.zeros(len(y)) if doubt is None else doubt
    best: tuple[float, float, float, float, float, Array] | None = None
    options = product(OWN, CURVED, NOISE) if like is None else [(like.own, like.curved, like.noise)]
    near: dict[float, Array] = {}
    for own, curved, noise in options:
        if own not in near:
            shared, alone = _scaled(coding, own)
            mine = rows @ shared
            near[own] = mine @ mine.T + (rows * alone**2) @ rows.T
        kernel = near[own] + curved * near[own] ** 2 + FLAT + 2.0 * apart @ apart.T
        root: Array = np.linalg.cholesky(kernel + np.diag(noise + 1e-9 + unsure)).astype(np.float64)
        white = np.linalg.solve(root, told)
        signal = max(float(white @ white) / len(told), 1e-6)
        likelihood = -0.5 * len(told) * math.log(signal) - float(np.log(np.diag(root)).sum())
        if best is None or likelihood > best[0]:
            best = (likelihood, own, curved, noise, signal, root)
    assert best is not None
    _, own, curved, noise, signal, root = best
    return Fit(coding, rows, unsure, told, offset, scale, own, curved, noise, signal, root)


def _solve(root: Array, y: Array) -> Array:
    return np.asarray(np.linalg.solve(root.T, np.linalg.solve(root, y)), dtype=np.float64)


def usual(features: Array, start: NDArray[np.int64]) -> float:
    """Mean square of a genotype's features, summed, if its choices are drawn at random."""
    sizes = np.diff(start)
    often = np.repeat(1.0 / (sizes + 1.0), sizes)
    found = float(((often @ features) ** 2).sum() + ((often * (1 - often)) @ features**2).sum())
    return max(found, 1e-12)


def _scaled(coding: Coding, own: float) -> tuple[Array, Array]:
    """Columns of both additive parts, scaled so that a genotype drawn at random has about variance 1."""
    sizes = np.diff(coding.start)
    alone = max(float(np.repeat(1.0 / (sizes + 1.0), sizes) @ coding.own**2), 1e-12)
    shared = usual(coding.shared, coding.start)
    return coding.shared * math.sqrt((1.0 - own) / shared), coding.own * math.sqrt(own / alone)


def _traits(space: Space, sites: Sequence[Site]) -> Array:
    """(genes, 3) depth, size and width of the site, each about zero and small; 0 where there is none."""
    known = {site.name: site for site in sites}
    sizes = [math.log1p(site.parameters) for site in sites] or [0.0]
    widths = [math.log1p(site.out_channels) for site in sites] or [0.0]
    rows = np.zeros((len(space.genes), 3))
    for i, gene in enumerate(space.genes):
        if (site := known.get(gene.site)) is not None:
            rows[i] = (
                site.depth - 0.5,
                0.5 * (math.log1p(site.parameters) - sum(sizes) / len(sizes)) / (max(sizes) - min(sizes) + 0.1),
                0.5 * (math.log1p(site.out_channels) - sum(widths) / len(widths)) / (max(widths) - min(widths) + 0.1),
            )
    return rows
