"""(kind, name) -> object. Three doors: what comes built in, an installed package's entry point, `module:attr`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

from autocompress.shelves import suggest
from autocompress.types import TrialFailure, UserError

Kind = Literal["op", "searcher", "device", "task", "builder"]

# Paths, not objects: nothing is imported before it is asked for.
BUILT_IN: dict[Kind, dict[str, str]] = {
    "op": {
        "block": "autocompress.ops.block:Block",
        "replace": "autocompress.ops.replace:Replace",
        "exit": "autocompress.ops.route:Exit",
        "skip": "autocompress.ops.route:Skip",
        "branch": "autocompress.ops.route:Branch",
        "prune": "autocompress.ops.prune:Prune",
        "cascade": "autocompress.ops.cascade:Cascade",
        "lowrank": "autocompress.ops.lowrank:LowRank",
        "sparsify": "autocompress.ops.sparsify:Sparsify",
        "qat": "autocompress.ops.qat:Qat",
        "quantize": "autocompress.ops.quantize:Quantize",
        "fourbits": "autocompress.ops.fourbits:FourBits",
        "store": "autocompress.ops.store:Store",
        "route": "autocompress.ops.thresholds:Route",
        "distill": "autocompress.distill:Distill",
    },
    "searcher": {
        "random": "autocompress.searchers.random:Random",
        "evolution": "autocompress.searchers.evolution:Evolution",
        "policy_gradient": "autocompress.searchers.policy_gradient:PolicyGradient",
        "optuna": "autocompress.searchers.optuna:Optuna",
        "gradient": "autocompress.searchers.gradient:Gradient",
        "portfolio": "autocompress.searchers.portfolio:Portfolio",
    },
    "device": {
        "local": "autocompress.devices.local:LocalDevice",
        "ssh": "autocompress.devices.ssh:SshDevice",
        "adb": "autocompress.devices.adb:AdbDevice",
        "ray": "autocompress.devices.ray_node:RayDevice",
    },
    "task": {
        "digits": "autocompress.tasks.digits:Digits",
        "images": "autocompress.tasks.images:Images",
        "text": "autocompress.tasks.text:Text",
    },
    "builder": {"convnet": "autocompress.models.convnet:ConvNet"},
}
# `scheme:rest` -> a function (rest, options) -> nn.Module: networks that are named, not imported from user code.
SOURCES: dict[str, str] = {
    "torchvision": "autocompress.models.sources:torchvision",
    "timm": "autocompress.models.sources:timm",
    "hf": "autocompress.models.sources:hugging_face",
    "nni": "autocompress.models.nni_space:NniSpace",
}
# What the protocols of a kind ask for; a plug-in without it is refused before anything runs.
_MEMBERS: dict[Kind, tuple[str, ...]] = {
    "op": ("name", "phase", "params", "decide", "enact"),
    "searcher": ("ask", "tell"),
    "device": ("fingerprint", "time"),
    "task": ("name", "metric", "input", "batches", "loss", "quality"),
    "builder": ("name", "knobs", "build", "sites", "inherit"),
}
# Packages that only an extra of ours brings.
EXTRAS = {
    "optuna": "optuna",
    "nni": "nni",
    "pytorch_lightning": "nni",
    "timm": "timm",
    "transformers": "hf",
    "tokenizers": "text",
    "PIL": "images",
    "zstandard": "storage",
}


def optional(package: str, what: str) -> Any:
    """A package that an extra of ours brings. Raises UserError with the pip line if it is not installed."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise UserError(f"{what} needs more packages: pip install 'autocompress[{extra}]'") from error


def resolve(kind: Kind, name: str, *, trusted: bool = True) -> Any:
    """What goes by `name`: a class to call or an object ready for use, as its module defines it.

    With `trusted=False` (names read from a policy or an artifact) only built-ins and entry points of installed
    packages count: `module:attr` is refused and nothing is imported. Raises UserError, near names listed.
    """
    if name in BUILT_IN[kind]:
        return _built_in(kind, name)
    entries = _entries(kind)
    if len(found := entries.get(name, ())) > 1:
        raise UserError(
            f"{kind} {name!r} comes from several packages ({', '.join(map(_package, found))}): uninstall one"
        )
    if found:
        return _foreign(kind, name, found[0].value)
    if kind == "builder" and (source := name.partition(":")[0]) in SOURCES:
        return _from_source(source, name)
    if ":" in name:
        if not trusted:
            package = name.partition(":")[0].partition(".")[0]
            raise UserError(
                f"{kind} {name!r}: a policy or artifact cannot name code to import, and nothing was executed; "
                f"if it is yours: --trust {package}, in Python trust={package!r} or the object itself"
            )
        return _foreign(kind, name, name)
    raise UserError(f"unknown {kind} {name!r}; {suggest(name, names(kind))}" + (" (or module:attr)" if trusted else ""))


def make(kind: Kind, name: str, *, trusted: bool = True) -> Any:
    """`resolve`, and a class is called without arguments: for ops, tasks and builders.

    Raises UserError for a plug-in that cannot be made or is none of its kind.
    """
    found = resolve(kind, name, trusted=trusted)
    return genuine(kind, name, call(kind, name, found) if isinstance(found, type) else found)


def call(kind: Kind, name: str, made_by: Any, *arguments: Any) -> Any:
    """Call a class or function of a plug-in; what a stranger's raises becomes a UserError, ours stays as it is."""
    try:
        return made_by(*arguments)
    except Exception as error:
        if name in BUILT_IN[kind] or isinstance(error, (UserError, TrialFailure)):
            raise
        raise UserError(f"{kind} {name!r}: cannot be made: {type(error).__name__}: {error}") from error


def genuine(kind: Kind, name: str, made: Any) -> Any:
    """`made` itself. Raises UserError naming what it lacks to be of its kind."""
    if lacks := [member for member in _MEMBERS[kind] if not hasattr(made, member)]:
        raise UserError(f"{kind} {name!r} is no {kind}: it has no {', no '.join(lacks)}")
    return made


def check(kind: Kind, name: str) -> None:
    """Raises UserError if no door leads to `name`; imports nothing (a `module:attr` is believed)."""
    if ":" not in name and name not in names(kind):
        raise UserError(f"unknown {kind} {name!r}; {suggest(name, names(kind))} (or module:attr)")


def names(kind: Kind) -> tuple[str, ...]:
    """Built-in names first, then those of entry points."""
    return (*BUILT_IN[kind], *sorted(set(_entries(kind)) - set(BUILT_IN[kind])))


def kinds() -> tuple[Kind, ...]:
    """All kinds of plug-in."""
    return get_args(Kind)


@cache
def _entries(kind: Kind) -> dict[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=f"autocompress.{kind}"):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _built_in(kind: Kind, name: str) -> Any:
    module, _, attribute = BUILT_IN[kind][name].partition(":")
    return getattr(optional(module, f"{kind} {name!r}"), attribute)


def _from_source(source: str, name: str) -> Any:
    """A function of options that makes the network; what is named comes from an installed package or a local folder."""
    module, _, attribute = SOURCES[source].partition(":")
    return partial(getattr(import_module(module), attribute), name.partition(":")[2])


def _foreign(kind: Kind, name: str, value: str) -> Any:
    module, _, attribute = value.partition(":")
    if not all(part.isidentifier() for part in _parts(module, attribute)):
        raise UserError(f"{kind} {name!r}: write module:attr, e.g. mypackage.tasks:Faces")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{kind} {name!r}: importing {module} failed: {error}") from error
        raise UserError(
            f"{kind} {name!r}: no module {error.name!r} in the current folder or among the installed packages"
        ) from error
    except Exception as error:  # a stranger's module may raise anything
        raise UserError(f"{kind} {name!r}: importing {module} failed: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = tuple(one for one in dir(found) if not one.startswith("_"))
            raise UserError(f"{kind} {name!r}: {module} has no {part!r}; {suggest(part, public)}")
        found = getattr(found, part)
    return found


def _parts(module: str, attribute: str) -> Iterator[str]:
    yield from module.split(".")
    yield from attribute.split(".")
