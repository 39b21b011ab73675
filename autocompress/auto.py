"""`space: auto`: the joint space derived from a network's sites (floor F1).

Genes exist only where they can matter: a site's share of the network decides whether it is asked to be replaced or
split, its channels which ratios differ on the target at all. Where the sites are too many for a search, neighbouring
ones are tied: one gene for all that lies under a module. The same network gives the same space, always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autocompress import registry, spacefile
from autocompress.load import SpaceFile, among, holder
from autocompress.shelves import suggest
from autocompress.types import Choice, Gene, Profile, Rule, Site, Space, UserError

if TYPE_CHECKING:
    from autocompress.models import Builder

NAME = "auto"
PACKED = 8  # genes, about, of weights in four bits
MOST = 150  # genes; beyond it sites are tied
RATIOS = (0.25, 0.5, 0.75)
RANKS = (0.5, 0.25)
RANK_LIMIT = "rank_limit "  # what a profile's `measured` calls the share of the rank below which low rank pays
BLOCKS = ("merge", "drop")
CASCADES: Choices = (1.0, 0.5, 0.34)  # shares of the blocks that a copy which answers first may have
EXITS = (0.35, 0.5, 0.65)  # of the depth, behind which exits are offered
GATED = 6  # blocks with a gate, at most
REPLACEMENTS = ("separable", "shuffle", "bottleneck", "smaller")
# Least share of the network's multiply-adds that makes a site worth a gene; a prune gene's also counts its parameters.
SHARES = {"replace": 0.02, "lowrank": 0.01, "prune": 0.002, "weights": 0.1}
ORDER = ("replace", "prune", "lowrank", "quantize")  # of policy genes after the blocks'
TIED = {"quantize": 1.0, "lowrank": 1.0, "replace": 1.0, "prune": 0.5}  # how soon an op's sites are tied
ABOUT = "Derived from the network; edit it and name this file in the job's `space`"

TAUGHT: Mapping[str, Choice] = {"weight": 0.5, "temperature": 1.0, "kind": "both"}
"""How every candidate is taught, see `distill.Distillation`."""

Choices = tuple[Choice, ...]
Places = dict[str, tuple[Site, ...]]
"""Path -> the sites that one gene there stands for."""


def file(builder: Builder, *, multiple: int = 1) -> SpaceFile:
    """The derived space as its YAML file writes it."""
    return written(space(builder, multiple=multiple), builder)


def written(derived: Space, builder: Builder) -> SpaceFile:
    """A derived space, or what the probe left of it, as a file for this network."""
    return spacefile.of(derived, builder.name, ABOUT, sites=builder.sites())


def targeted(builder: Builder, profiles: Sequence[Profile], *, routes: bool = False, small: bool = False) -> Space:
    """The space for these targets: what their profiles say of channels, types and ranks decides what is offered.

    A choice stays if it may pay on one of them. `routes` are offered where every target measures single samples;
    `small` says that a budget bounds the file's size.
    """
    return space(
        builder,
        small=small and all(profile.numeric.weight == "int8" for profile in profiles),
        routes=routes and all(profile.batch == 1 for profile in profiles),
        multiple=max(profile.channel_multiple for profile in profiles),
        types=tuple(dict.fromkeys(kind for profile in profiles for kind in profile.types)),
        factors=max(_factors(profile) for profile in profiles),
    )


def _factors(profile: Profile) -> float:
    """Up to which share of a layer's products two factors were faster on a target; 1 where nobody looked.

    A survey's limit is a share of the rank of square layers, whose factors cost twice that share.
    """
    found = [limit for name, limit in profile.measured.items() if name.startswith(RANK_LIMIT)]
    limits = [float(limit) for limit in found if isinstance(limit, float | int)]
    return min(1.0, 2 * max(limits)) if limits else 1.0


def space(
    builder: Builder,
    *,
    multiple: int = 1,
    types: Sequence[str] = ("float32", "int8"),
    factors: float = 1.0,
    routes: bool = False,
    small: bool = False,
) -> Space:
    """The genes that make sense for this network, exits and gates (`routes`) where they are asked for.

    `small`: weights of integer layers may lie in four bits, which makes a file smaller and nothing faster.

    `multiple` is the targets' largest channel multiple, `types` are those that one of them computes with, `factors` is
    the share of a layer's products up to which two factors pay.

    Architecture first, then blocks, then each op's sites from input to output, then the training's recipe.
    """
    sites = tuple(sorted(builder.sites(), key=lambda site: (site.depth, len(site.name))))
    recipe = tuple(_recipe(types))
    arch = tuple(
        Gene(name=knob, kind="arch", choices=choices) for knob, choices in arch_choices(builder).items() if choices[1:]
    )
    blocks = tuple(_blocks(sites))
    whole = replace(_Whole.of(sites, multiple), types=frozenset(types), factors=factors)
    asked = {op: whole.places(op) for op in ORDER}
    hung = tuple(_routes(sites, {gene.site: gene for gene in blocks})) if routes else ()
    packed = tuple(_packed(whole, asked["quantize"])) if small and "int8" in types else ()
    tied = tie(asked, MOST - len(arch) - len(blocks) - len(recipe) - len(hung) - len(packed))
    genes = {gene.name: gene for gene in (*arch, *blocks)}
    for op in ORDER:
        for path, members in tied[op].items():
            when = _when(path, op, sites, genes)
            if when is not None:
                param = PARAMS[op]
                name = f"{op}.{param}@{path}"
                choices = whole.choices(op, members)
                genes[name] = Gene(name=name, kind="policy", choices=choices, when=when, site=path, op=op, param=param)
    for gene in packed:
        own = f"quantize.bits@{gene.site}"  # of a site, or of a module whose sites are tied
        genes[gene.name] = gene.model_copy(update={"when": {own: ("int8",)}}) if own in genes else gene
    return Space(name=NAME, genes=(*genes.values(), *hung, *recipe), always=tuple(_taught()))


PARAMS = {"block": "kind", "replace": "kind", "prune": "ratio", "lowrank": "rank", "quantize": "bits"}


def reduce(full: Space, gone: Collection[tuple[str, Choice]]) -> Space:
    """The space without the choices in `gone` (gene's name, choice); what can no longer differ goes with them."""
    lost = {(name, isinstance(choice, bool), choice) for name, choice in gone}
    left: dict[str, Gene] = {}
    fixed: dict[str, Choice] = {}
    for gene in full.genes:
        first, *others = gene.choices
        choices = (first, *(c for c in others if (gene.name, isinstance(c, bool), c) not in lost))
        when: dict[str, Choices] | None = {}
        for key, allowed in gene.when.items():
            held = among(left[key].choices if key in left else (fixed[key],), allowed)
            if not held:
                when = None
                break
            if key in left and len(held) < len(left[key].choices):
                when[key] = held
        if when is None or len(choices) == 1:
            fixed[gene.name] = first
        else:
            left[gene.name] = gene.model_copy(update={"choices": choices, "when": when})
    return Space(name=full.name, genes=tuple(left.values()), always=full.always)


def limited(full: Space, ops: Collection[str]) -> Space:
    """The space with the questions of these ops alone; `arch` stands for the architecture's knobs.

    Raises UserError for what the space does not ask.
    """
    kinds = {gene.name: gene.op or "arch" for gene in full.genes}
    known = list(dict.fromkeys(kinds.values()))
    if strange := [op for op in ops if op not in known]:
        raise UserError(f"search.ops: the derived space asks nothing of {strange[0]!r}; {suggest(strange[0], known)}")
    return reduce(full, [(g.name, choice) for g in full.genes if kinds[g.name] not in ops for choice in g.choices[1:]])


# --- architecture, recipe, blocks -----------------------------------------------------------------------------------


def arch_choices(builder: Builder) -> Mapping[str, Choices]:
    """Knob -> choices, the parent's own first: the builder's `choices()`, else smaller whole numbers that it builds."""
    own: Callable[[], Mapping[str, Choices]] | None = getattr(builder, "choices", None)
    if callable(own):
        return {knob: tuple(choices) for knob, choices in own().items()}
    found: dict[str, Choices] = {}
    for knob, value in builder.knobs.items():
        if isinstance(value, int) and not isinstance(value, bool):
            smaller = dict.fromkeys(round(value * share) for share in (0.75, 0.5, 0.25))
            found[knob] = (value, *(one for one in smaller if 0 < one < value and _builds(builder, knob, one)))
    return found


def _builds(builder: Builder, knob: str, choice: Choice) -> bool:
    try:
        builder.build({knob: choice})
    except Exception:  # noqa: BLE001  a stranger's builder may raise anything; what it cannot build is no choice
        return False
    return True


def _recipe(types: Collection[str]) -> Iterable[Gene]:
    """How candidates are trained: with simulated integers or without."""
    if "bits" in _params("qat") and "int8" in types:
        yield _gene("qat", "bits", ".", ("float", "int8"))


def _packed(whole: _Whole, places: Places) -> Iterable[Gene]:
    """Whether the weights of a stage's integers lie in four bits: a gene for each module that holds many of all."""
    while len(places) > PACKED and len(wider := coarser(places)) < len(places):
        places = wider
    for path, members in places.items():
        held = sum(site.parameters for site in members) / whole.parameters
        if held >= SHARES["weights"]:
            yield _gene("quantize", "weights", path, ("profile", "int4"))


def _taught() -> Iterable[Rule]:
    """Every candidate is taught by the parent: what teaches best is known, and trials are too few to find it again."""
    if "distill" in registry.BUILT_IN["op"]:
        yield Rule(site=".", op="distill", settings=dict(TAUGHT))


def _params(op: str) -> Mapping[str, Any]:
    return registry.make("op", op).params if op in registry.BUILT_IN["op"] else {}


def _blocks(sites: Iterable[Site]) -> Iterable[Gene]:
    """Inner blocks (a transformer layer's attention) after the ones that hold them."""
    made: dict[str, Gene] = {}
    waiting = {site.name: site for site in sites if "block" in site.ops}
    for name in list(waiting):
        holding = [other for other in waiting if f"{name}.".startswith(f"{other}.")]
        for site in (waiting.pop(other) for other in sorted(holding, key=len)):
            choices = _offered(site, "block", ("keep", *BLOCKS))
            outer: dict[str, Choices] = {
                gene.name: ("keep",) for other, gene in made.items() if site.name.startswith(f"{other}.")
            }
            if choices[1:]:
                made[site.name] = _gene("block", "kind", site.name, choices, outer)
    return made.values()


def _routes(sites: Sequence[Site], blocks: Mapping[str, Gene]) -> Iterable[Gene]:
    """A cascade; or exits behind the blocks nearest to EXITS of the depth, gates around every GATED-th of the others.

    An exit stays where its block is dropped: it then lies behind the block before.
    """
    outer = [site for site in sites if "block" in site.ops]
    outer = [one for one in outer if not any(one.name.startswith(f"{other.name}.") for other in outer)]
    if not outer:
        return
    cascade = _gene("cascade", "keep", ".", CASCADES)
    yield cascade
    alone: dict[str, Choices] = {cascade.name: CASCADES[:1]}  # a cascade's copy has no exits of its own
    leaving = {min(outer, key=lambda site: abs(site.depth - depth)).name for depth in EXITS}
    for site in outer:
        if site.name in leaving:
            yield _gene("exit", "head", site.name, ("none", "linear", "conv"), dict(alone))
    inner = [site for site in outer if site.name not in leaving]
    for site in inner[:: max(1, math.ceil(len(inner) / GATED))]:
        keeps: dict[str, Choices] = {blocks[site.name].name: ("keep",)} if site.name in blocks else {}
        yield _gene("skip", "rate", site.name, (1.0, 0.6, 0.3), {**alone, **keeps})


def _gene(op: str, param: str, site: str, choices: Choices, when: dict[str, Choices] | None = None) -> Gene:
    return Gene(
        name=f"{op}.{param}@{site}", kind="policy", choices=choices, when=when or {}, site=site, op=op, param=param
    )


# --- sites --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Whole:
    """The network that a site is a share of."""

    sites: tuple[Site, ...]
    macs: int
    parameters: int
    multiple: int
    types: frozenset[str] = frozenset({"int8"})
    factors: float = 1.0

    @classmethod
    def of(cls, sites: tuple[Site, ...], multiple: int) -> _Whole:
        layers = [site for site in sites if "block" not in site.ops]
        macs, parameters = sum(one.macs for one in layers), sum(one.parameters for one in layers)
        return cls(sites, max(macs, 1), max(parameters, 1), multiple)

    def share(self, members: Iterable[Site], *, parameters: bool = False) -> float:
        """Of the network's multiply-adds, or of its parameters if that is more."""
        members = tuple(members)
        macs = sum(site.macs for site in members) / self.macs
        return max(macs, sum(site.parameters for site in members) / self.parameters) if parameters else macs

    def places(self, op: str) -> Places:
        """Where a gene of `op` is worth its place: at single sites, or where these are many and small, tied ones."""
        places: Places = {site.name: (site,) for site in self.sites if len(self.choices(op, (site,))) > 1}
        every = tuple(site for members in places.values() for site in members)
        while True:
            worth = {
                path: members
                for path, members in places.items()
                if self.share(members, parameters=op == "prune") >= SHARES.get(op, 0.0)
            }
            covered = self.share(site for members in worth.values() for site in members)
            wider = coarser(places)
            if op == "prune" or 2 * covered >= self.share(every) or len(wider) == len(places):
                return worth
            places = wider

    def choices(self, op: str, members: tuple[Site, ...]) -> Choices:
        """What a gene of `op` for these sites may ask: whatever makes sense at one of them."""
        found = {choice for site in members if op in site.ops for choice in self._choices(op, site)}
        rank = {choice: place for place, choice in enumerate(_ALL[op])}
        return tuple(sorted(found, key=lambda choice: rank[choice]))

    def _choices(self, op: str, site: Site) -> Choices:
        neutral, *offered = _offered(site, op, _ALL[op])
        if op == "prune":
            return (neutral, *distinct(site.out_channels, tuple(map(float, offered)), self.multiple))
        if op == "lowrank":
            return (neutral, *(rank for rank in offered if pays(site, float(rank), self.multiple, self.factors)))
        if op == "quantize":
            return (neutral, *(bits for bits in offered if bits in self.types))
        return (neutral, *offered)


_ALL: dict[str, Choices] = {
    "prune": (0.0, *RATIOS),
    "lowrank": (1.0, *RANKS),
    "replace": ("keep", *REPLACEMENTS),
    "quantize": ("float", "int8", "float16", "bfloat16"),
}


def _offered(site: Site, op: str, choices: Choices) -> Choices:
    """Of `choices` those that the site allows, the first in any case."""
    return (choices[0], *among(choices[1:], site.choices.get(op, choices)))


def distinct(channels: int, ratios: tuple[float, ...], multiple: int) -> tuple[float, ...]:
    """The ratios that cut a layer of `channels` to different multiples of `multiple`, at least one apart."""
    found: list[float] = []
    last = channels
    for ratio in ratios:
        keep = int(channels * (1 - ratio) / multiple + 0.5) * multiple
        if 0 < keep <= last - multiple:
            found.append(ratio)
            last = keep
    return tuple(found)


def pays(site: Site, rank: float, multiple: int, factors: float = 1.0) -> bool:
    """Whether two factors of this share of the full rank cost less than the layer (plain SVD).

    `factors` is the share of the layer's products up to which they are faster, where a target was asked: that was with
    linear layers and 1x1 convolutions.
    """
    inputs = site.in_channels * site.kernel**2
    full = min(site.out_channels, inputs)
    wanted = max(int(rank * full / multiple + 0.5) * multiple, 1)
    share = factors if site.kernel == 1 else 1.0
    return wanted * (inputs + site.out_channels) < share * inputs * site.out_channels


def _when(path: str, op: str, sites: tuple[Site, ...], genes: Mapping[str, Gene]) -> dict[str, Choices] | None:
    """Under which choices of earlier genes the gene means anything; None if under none."""
    place = next((site for site in sites if site.name == path and op in site.ops), None) or holder(path, sites, op)
    assert place is not None, "a gene's path is a site's or leads to some"
    asked = [(key, values) for key, values in place.when.items() if key in genes]
    # of a merged block its one convolution is left, which can still be an integer one
    standing: Choices = ("keep", "merge") if op == "quantize" else ("keep",)
    blocks = (gene for gene in genes.values() if gene.op == "block")
    asked += [(gene.name, standing) for gene in blocks if f"{path}.".startswith(f"{gene.site}.")]
    if op == "lowrank" and (other := f"replace.kind@{path}") in genes:
        asked.append((other, ("keep",)))
    when: dict[str, Choices] = {}
    for key, values in asked:
        held = among(genes[key].choices, values)
        if not held:
            return None
        if len(held) < len(genes[key].choices):
            when[key] = held
    return when


# --- tying --------------------------------------------------------------------------------------------------------


def tie(asked: Mapping[str, Places], most: int) -> dict[str, Places]:
    """At most `most` genes, if it can be had: again and again the op with most genes goes a step up.

    From layers to blocks, to stages and so on; ratios differ most between neighbours, so prune genes wait.
    """
    tied = {op: dict(places) for op, places in asked.items()}
    turns = list(TIED)
    while turns and sum(map(len, tied.values())) > most:
        op = max(turns, key=lambda one: len(tied[one]) * TIED[one])
        coarse = coarser(tied[op])
        if len(coarse) == len(tied[op]):
            turns.remove(op)
        tied[op] = coarse
    return tied


def coarser(places: Places) -> Places:
    """Fewer genes: the deepest paths give way to the modules that hold them, until some meet; the same if none can.

    A module that holds a single site goes by the site's name.
    """
    paths = {path: path for path in places}  # place -> path that will stand for it
    while (deepest := max((path.count(".") for path in paths.values()), default=0)) > 0:
        paths = {
            place: path.rpartition(".")[0] if path.count(".") == deepest else path for place, path in paths.items()
        }
        if len(set(paths.values())) < len(paths):
            break
    else:
        return places
    found: dict[str, list[str]] = {}
    for place, path in paths.items():
        found.setdefault(path, []).append(place)
    return {
        path if len(held) > 1 else held[0]: tuple(site for place in held for site in places[place])
        for path, held in found.items()
    }
