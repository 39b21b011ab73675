"""YAML files -> records: the job, a target's profile, and a search space expanded over a network's sites.

The grammar of a space file (one record, `SpaceFile`):

    name: convnet                       # the file's stem
    about: one line
    builder: convnet
    arch:                               # knob: choices, or {choices, when}; the first choice is the parent's
      depth: [3, 2, 1]
    policy:                             # one row per parameter of an op, spread over all sites that a glob matches
      - {sites: "stages.*", op: prune, param: ratio, choices: [0.0, 0.25, 0.5]}
      - {sites: "stages.*", op: prune, param: importance, choices: [l1, l2], when: {ratio: [0.25, 0.5]}}
      - {sites: ".", op: distill, param: weight, choices: [0.0, 0.5]}

A row makes a gene `op.param@site` at every site that a glob of `sites` (one or a list; `*` also matches dots) names and
that lists the op (a plug-in's op: every site that is named); `"."`, the whole network, is only for ops that act on
training as a whole. A module's path that holds such sites makes one gene for all of them (`layer3`: the op acts on
whatever is under it at once). The first choice leaves the network alone. `when` maps a knob to the choices (one or a
list) under which the gene means anything; a knob is the name of an `arch` knob, of a gene (`{site}` stands for this
row's site), of a parameter of the same op at the same site (`ratio`) or of another op's there (`prune.ratio`). A knob
that this space leaves out stands at the parent's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from autocompress import reader, registry, shelves
from autocompress.shelves import suggest
from autocompress.types import Budget, Choice, Gene, Job, Profile, Record, Rule, Site, Space, UserError

if TYPE_CHECKING:
    from autocompress.models import Builder
    from autocompress.ops import Op

Choices = tuple[Choice, ...]


class Knob(Record):
    """One row of `arch`."""

    choices: Choices = Field(min_length=1)
    when: dict[str, Choices] = {}


class Row(Record):
    """One row of `policy`."""

    sites: tuple[str, ...] = Field(min_length=1)
    op: str
    param: str
    choices: Choices = Field(min_length=1)
    when: dict[str, Choices] = {}


class SpaceFile(Record):
    """A search space as its file writes it, before its globs are spread over sites."""

    name: str
    about: str = ""
    builder: str
    arch: dict[str, Knob] = {}
    policy: tuple[Row, ...] = ()
    always: tuple[Rule, ...] = ()


# --- job and profile --------------------------------------------------------------------------------------------


def job(path: Path | str, changes: Mapping[str, Any] | None = None) -> Job:
    """Read a job file. `changes` (dotted key -> value, e.g. `search.seed`) take the place of what it says.

    Paths of weights, space and profiles are relative to the job file and come back absolute; `out` is relative to the
    current folder. Every name is checked, nothing is imported. Raises UserError, one line per problem.
    """
    path = Path(path).expanduser()
    data, lines = reader.parse(reader.text(path), str(path))
    if isinstance(data.get("model"), str):  # short for {builder: NAME}
        data["model"] = {"builder": data["model"]}
    for key, value in (changes or {}).items():
        _put(data, key.split("."), value)
    read = reader.check(data, Job, str(path), lines)

    problems: list[str] = []

    def look(place: reader.Place, kind: registry.Kind | None, name: str, shelf: str = "") -> str:
        try:
            if kind:
                registry.check(kind, name)
                return name
            found = shelves.find(shelf, name, path.parent) if shelf else _weights(path.parent, name)
        except UserError as error:
            line = f":{lines[place]}" if place in lines else ""
            problems.append(f"{path}{line}: {reader.dotted(place)}: {error}")
            return name
        return name if shelf and shelves.is_name(name) and shelves.ours(shelf, found) else str(found.resolve())

    look(("task",), "task", read.task)
    look(("model", "builder") if ("model", "builder") in lines else ("model",), "builder", read.model.builder)
    look(("search", "searcher"), "searcher", read.search.searcher)
    space_name = read.space if read.space == "auto" else look(("space",), None, read.space, shelves.SPACES)
    devices = tuple(
        budget.model_copy(update={"profile": look(("devices", n, "profile"), None, budget.profile, shelves.PROFILES)})
        for n, budget in enumerate(read.devices)
    )
    model = read.model
    if model.weights is not None:
        model = model.model_copy(update={"weights": look(("model", "weights"), None, model.weights)})
    if problems:
        raise UserError("\n".join(problems))
    return read.model_copy(update={"space": space_name, "devices": devices, "model": model})


def profile(name_or_path: str | Path) -> Profile:
    """A target's profile, from the user's shelves, the package's or from a file. Raises UserError."""
    path = shelves.find(shelves.PROFILES, str(name_or_path))
    read = reader.record(path, Profile)
    try:
        registry.check("device", read.device)
    except UserError as error:
        raise UserError(f"{path}: device: {error}") from error
    return read


def check_reach(profile: Profile) -> None:
    """Raise UserError for a profile that does not say where its device is, as the templates on the shelf do not."""
    ways = {"ssh": ("ssh", "--ssh user@host"), "adb": ("adb", "--adb SERIAL"), "ray": ("resource", "--ray RESOURCE")}
    asked = ways.get(profile.device)
    if asked is not None and not getattr(profile.reach, asked[0]):
        kind = "is a template, not yet measured, and" if profile.template else "has"
        lacks = f"has no `reach: {asked[0]}`" if profile.template else f"no `reach: {asked[0]}`"
        raise UserError(
            f"profile {profile.name!r} {kind} {lacks}: make one of your own device by "
            f"`autocompress device add NAME {asked[1]} --like {profile.name}`"
        )


def targets(devices: Iterable[Budget]) -> tuple[tuple[Profile, ...], tuple[Budget, ...]]:
    """The profiles that budgets speak of, and the budgets again under the profiles' own names. Raises UserError."""
    budgets = tuple(devices)
    found = ((profile(budget.profile), budget) for budget in budgets)
    profiles = tuple(one.model_copy(update={"as_is": True}) if budget.as_is else one for one, budget in found)
    names = [one.name for one in profiles]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"devices: two profiles are called {name!r}")
    for one in profiles:
        check_reach(one)
    renamed = (b.model_copy(update={"profile": p.name}) for b, p in zip(budgets, profiles, strict=True))
    return profiles, tuple(map(within, renamed, profiles))


def within(budget: Budget, profile: Profile) -> Budget:
    """A budget under its profile's own limit of memory: the smaller of the two holds."""
    stated = [one for one in (budget.memory_mb, profile.memory_mb) if one is not None]
    return budget.model_copy(update={"memory_mb": min(stated, default=None)})


def profiles() -> tuple[str, ...]:
    """Names of hardware profiles, the user's own and the package's."""
    return tuple(sorted(shelves.files(shelves.PROFILES)))


def spaces() -> tuple[str, ...]:
    """Names on the shelf of search spaces."""
    return shelves.names(shelves.SPACES)


def _put(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = _mapping(data.setdefault(key, {}))
        if inner is None:
            return  # the check says what should stand there
        data = inner
    data[keys[-1]] = value


def _mapping(data: object) -> dict[str, Any] | None:
    return cast("dict[str, Any]", data) if isinstance(data, dict) else None


def _weights(folder: Path, name: str) -> Path:
    path = folder / Path(name).expanduser()
    try:
        if not path.is_file():
            raise UserError(f"there is no file {path}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return path


# --- space ------------------------------------------------------------------------------------------------------


def space_file(name_or_path: str | Path) -> SpaceFile:
    """A search space as it is written. Raises UserError, one line per problem."""
    return _space_file(name_or_path)[0]


def space(name_or_path: str | Path, builder: Builder) -> Space:
    """A search space for `builder`'s network: one gene per arch knob, then one per (row, site), in the file's order.

    Conditions of rows and of sites meet in `Gene.when`; a gene whose condition can never hold is left out. Raises
    UserError, one line per problem: unknown knobs, ops and parameters, choices that an op does not take, globs that
    match nothing, first choices that are not the parent's.
    """
    file, path, lines = _space_file(name_or_path)
    if file.builder != builder.name:
        raise UserError(f"{path}: this space is for builder {file.builder!r}, not {builder.name!r}")
    draft = _Draft(builder)
    problems: list[str] = []
    rows = [(("arch", name), name, knob) for name, knob in file.arch.items()]
    rows += [(("policy", n), None, row) for n, row in enumerate(file.policy)]
    for place, name, row in rows:
        try:
            if isinstance(row, Row):
                draft.add_row(row)
            else:
                draft.add_knob(str(name), row)
        except UserError as error:
            problems.append(f"{path}:{lines.get(place, 1)}: {reader.dotted(place)}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return Space(name=file.name, genes=tuple(draft.genes.values()), always=file.always)


def _space_file(name_or_path: str | Path) -> tuple[SpaceFile, Path, dict[reader.Place, int]]:
    path = shelves.find(shelves.SPACES, str(name_or_path))
    data, lines = reader.parse(reader.text(path), str(path))
    return reader.check(_long_form(data), SpaceFile, str(path), lines), path, lines


def _long_form(data: dict[str, Any]) -> dict[str, Any]:
    """Short forms written out: `knob: [..]`, one glob for `sites`, one choice in `when`."""
    arch, policy = _mapping(data.get("arch")), data.get("policy")
    rows = cast("list[object]", policy) if isinstance(policy, list) else []
    if arch is not None:
        long: dict[str, object] = {name: {"choices": it} if isinstance(it, list) else it for name, it in arch.items()}
        data = data | {"arch": long}
        rows = [*rows, *long.values()]
    for row in filter(None, map(_mapping, rows)):
        if isinstance(row.get("sites"), str):
            row["sites"] = [row["sites"]]
        if when := _mapping(row.get("when")):
            row["when"] = {key: value if isinstance(value, list) else [value] for key, value in when.items()}
    return data


class _Draft:
    """Genes made so far, and what the rows are checked against."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.sites = builder.sites()
        self.genes: dict[str, Gene] = {}

    def add_knob(self, name: str, knob: Knob) -> None:
        parent = self.builder.knobs
        if name not in parent:
            raise UserError(f"builder {self.builder.name!r} has no such knob; {suggest(name, list(parent))}")
        _distinct(knob.choices)
        if not _same(knob.choices[0], parent[name]):
            raise UserError(f"the first choice must be the parent's own, {_shown(parent[name])}")
        when = self._when(knob.when)
        for choice in knob.choices[1:]:
            self._build({key: values[0] for key, values in (when or {}).items()} | {name: choice})
        if when is not None:
            self.genes[name] = Gene(name=name, kind="arch", choices=knob.choices, when=when)

    def _build(self, arch: dict[str, Choice]) -> None:
        """Try a choice. Raises UserError, also for what a stranger's builder raises."""
        try:
            self.builder.build(arch)
        except Exception as error:
            if self.builder.name in registry.BUILT_IN["builder"] or isinstance(error, UserError):
                raise
            asked = ", ".join(f"{key} {_shown(value)}" for key, value in arch.items())
            why = next(iter(str(error).splitlines()), "no message")
            raise UserError(f"the builder cannot build {asked}: {type(error).__name__}: {why}") from error

    def add_row(self, row: Row) -> None:
        op: Op = registry.make("op", row.op)
        check_choices(op, row.op, row.param, row.choices, row.sites[0])
        _distinct(row.choices)
        modifier = any(key in op.params for key in row.when)  # decided only where a parameter beside it acts
        if not modifier and not _same(row.choices[0], op.params[row.param]):
            neutral = _shown(op.params[row.param])
            raise UserError(f"the first choice must be {neutral}, which leaves the network alone")
        for site in self._matching(row, op):
            when = self._when(row.when, site, row.op)
            if when is None:
                continue
            name = f"{row.op}.{row.param}@{site.name}"
            if name in self.genes:
                raise UserError(f"gene {name!r} is already made by an earlier row; let their `sites` not overlap")
            made = Gene(
                name=name, kind="policy", choices=row.choices, when=when, site=site.name, op=row.op, param=row.param
            )
            self.genes[name] = made

    def _matching(self, row: Row, op: Op) -> list[Site]:
        picked: dict[str, Site] = {}
        for glob in row.sites:
            if glob == ".":
                root = [site for site in self.sites if site.name == "." and row.op in site.ops]
                whole = op.phase == "train" or row.param in getattr(op, "network_params", ())
                if not root and not whole:
                    raise UserError(f"sites: op {row.op!r} acts on single sites; write `sites: '*'` for all of them")
                picked["."] = root[0] if root else Site(name=".", kind="network", ops=(row.op,))
                continue
            if getattr(op, "on_modules", False):  # its own decide says which of them it cannot act on
                found = {site.name: site for site in modules(self.sites, row.op) if _names(glob, site.name)}
                if not found:
                    known = [site.name for site in modules(self.sites, row.op)]
                    raise UserError(f"sites: {glob!r} matches no block of the network; {suggest(glob, known)}")
                picked |= found
                continue
            named = [site for site in self.sites if site.name != "." and _names(glob, site.name)]
            if not any(row.op in site.ops for site in named) and (tied := holder(glob, self.sites, row.op)):
                picked[glob] = tied
                continue
            if not named:
                known = [site.name for site in self.sites]
                raise UserError(f"sites: {glob!r} matches nothing in the network; {suggest(glob, known)}")
            # A builder lists what our ops can do; a plug-in's own decide says which sites it skips.
            plugin = row.op not in registry.BUILT_IN["op"]
            able = [site for site in named if plugin or row.op in site.ops]
            if not able:
                kinds = sorted({op for site in named for op in site.ops})
                raise UserError(
                    f"sites: op {row.op!r} can act on none of the {len(named)} sites that {glob!r} matches"
                    f" (possible there: {', '.join(kinds) or 'nothing'})"
                )
            picked |= {site.name: site for site in able}
        return list(picked.values())

    def _when(self, asked: Mapping[str, Choices], site: Site | None = None, op: str = "") -> dict[str, Choices] | None:
        """Conditions on genes of this space; None where they can never hold."""
        made: dict[str, Choices] = {}
        conditions = [(key, values, True) for key, values in asked.items()]
        conditions += [(key, values, False) for key, values in (site.when if site else {}).items()]
        for key, values, written in conditions:
            gene, parent = self._lookup(key, site, op)
            if gene is None:
                if not _among(parent, values):
                    return None
                continue
            if written and (strange := [value for value in values if not _among(value, gene.choices)]):
                choices = ", ".join(map(_shown, gene.choices))
                raise UserError(f"when: {key}: {_shown(strange[0])} is not a choice of {gene.name!r} ({choices})")
            allowed = tuple(c for c in made.get(gene.name, gene.choices) if _among(c, values))
            if not allowed:
                return None
            made[gene.name] = allowed
        return {name: values for name, values in made.items() if len(values) < len(self.genes[name].choices)}

    def _lookup(self, key: str, site: Site | None, op: str) -> tuple[Gene | None, Choice]:
        """The gene that a `when` speaks of, or None and the parent's choice where this space has no such gene."""
        if site is None:
            names = [key]
        else:
            key = key.replace("{site}", site.name)
            names = [key, f"{op}.{key}@{site.name}", f"{key}@{site.name}"]
        found = [self.genes[name] for name in names if name in self.genes]
        if len(found) > 1:
            raise UserError(f"when: {key!r} may mean {found[0].name!r} or {found[1].name!r}; write it in full")
        if found:
            return found[0], found[0].choices[0]
        if key in self.builder.knobs:
            return None, self.builder.knobs[key]
        stem = key.partition("@")[0]
        for other in self.genes.values():  # the same parameter elsewhere: at this site the op cannot act
            if other.kind == "policy" and stem in (f"{other.op}.{other.param}", other.param if other.op == op else ""):
                return None, other.choices[0]
        near = [gene.name for gene in self.genes.values()]
        near += [gene.param for gene in self.genes.values() if gene.op == op and site and gene.site == site.name]
        raise UserError(f"when: {key!r} is no knob of an earlier row; {suggest(key, near)}")


def check_choices(op: Op, name: str, param: str, choices: Iterable[Choice], site: str) -> None:
    """Raise UserError for a parameter that an op does not have, and for the first choice that it does not take."""
    if param not in op.params:
        raise UserError(f"op {name!r} has no parameter {param!r}; {suggest(param, list(op.params))}")
    check: Callable[[Rule], None] | None = getattr(op, "check", None)
    if check is None:
        return
    for choice in choices:
        check(Rule(site=site, op=name, settings={param: choice}))


def check_space(made: Space) -> None:
    """Raise UserError, one line per gene, for ops, parameters and choices of a space that cannot be asked for."""
    problems: list[str] = []
    for gene in made.genes:
        if gene.kind == "policy":
            try:
                check_choices(registry.make("op", gene.op), gene.op, gene.param, gene.choices, gene.site)
            except UserError as error:
                problems.append(f"space {made.name!r}, gene {gene.name!r}: {error}")
    if problems:
        raise UserError("\n".join(problems))


def holder(path: str, sites: Iterable[Site], op: str) -> Site | None:
    """The module at `path` as one site that stands for every site under it that lists `op`; None if none does.

    It exists where any of them exists, as far as each knob on its own can say that.
    """
    members = [site for site in sites if site.name.startswith(f"{path}.") and op in site.ops]
    if not members:
        return None
    shared = [key for key in members[0].when if all(key in member.when for member in members)]
    when = {key: _union(member.when[key] for member in members) for key in shared}
    return Site(name=path, kind="module", ops=(op,), when=when, depth=members[0].depth)


def modules(sites: Iterable[Site], op: str) -> list[Site]:
    """Every module that holds sites, as a site for an op that acts on modules; blocks that are sites as they are."""
    known = tuple(sites)
    blocks = {site.name: site for site in known if site.kind == "block"}
    paths: dict[str, None] = {}
    for site in known:
        atoms = site.name.split(".")
        inner = len(atoms) + (site.kind == "block")
        paths |= dict.fromkeys(".".join(atoms[:length]) for length in range(1, inner))
    found = [blocks.get(path) or _holding(path, known, op) for path in paths]
    return [site for site in found if site is not None]


def _holding(path: str, sites: Sequence[Site], op: str) -> Site | None:
    """The module at `path`, which exists where any site under it does."""
    inside = [site.model_copy(update={"ops": (op,)}) for site in sites if site.name.startswith(f"{path}.")]
    return holder(path, inside, op)


def among(choices: Choices, allowed: Choices) -> Choices:
    """Those of `choices` that are allowed; true is not 1."""
    return tuple(choice for choice in choices if _among(choice, allowed))


def _union(sets: Iterable[Choices]) -> Choices:
    found: list[Choice] = []
    for choices in sets:
        found += [choice for choice in choices if not _among(choice, found)]
    return tuple(found)


def _names(glob: str, site: str) -> bool:
    return glob == site or fnmatchcase(site, glob)


def _same(one: Choice, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _among(choice: Choice, choices: Iterable[Choice]) -> bool:
    return any(_same(choice, one) for one in choices)


def _distinct(choices: Choices) -> None:
    for n, choice in enumerate(choices):
        if choice in choices[:n]:
            raise UserError(f"choice {_shown(choice)} occurs twice")


def _shown(choice: Any) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)
