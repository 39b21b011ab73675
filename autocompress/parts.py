"""A job's names become objects: task, builder, space, profiles, goals, ops (floor F5)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from autocompress import auto, load, pareto, registry
from autocompress.controller import Header
from autocompress.devices.fingerprint import check_expects, check_same, host, resolve_local
from autocompress.models import Builder
from autocompress.models.foreign import Foreign
from autocompress.ops import Op
from autocompress.searchers import Searcher
from autocompress.shelves import suggest
from autocompress.tasks import InputSpec, Task
from autocompress.types import Budget, Facts, Goal, Job, Limit, Profile, SearchPlan, Space, UserError

IMPLIED: Mapping[str, tuple[str, ...]] = {"quantize": ("fourbits",)}
"""Ops that act where another one's rules ask for something."""


@dataclass(frozen=True)
class Parts:
    """Everything a search is made of, before anything runs."""

    job: Job
    task: Task
    builder: Builder
    space: Space
    profiles: tuple[Profile, ...]
    budgets: tuple[Budget, ...]
    goals: tuple[Goal, ...]

    @property
    def op_names(self) -> tuple[str, ...]:
        """The ops that the space speaks of, and int8 for the control arm."""
        asked = [gene.op for gene in self.space.genes if gene.op]
        return tuple(dict.fromkeys([*asked, *(rule.op for rule in self.space.always), "quantize"]))


def parts(
    job: Job, *, task: Task | None = None, builder: Builder | nn.Module | None = None, space: Space | None = None
) -> Parts:
    """Resolve a job; objects given take the place of its names.

    Raises UserError for unknown names, plug-ins that are none, options the searcher does not take, choices that an op
    does not take, packages that are not installed, a space of another builder, a metric the task does not have, a
    profile that this host does not fit.
    """
    data = make_task(job.task, job.data) if task is None else registry.genuine("task", job.task, task)
    network = make_builder(job.model.builder, data.input, job.model.options, given=builder)
    check_searcher(job.search)
    if job.quality.metric != data.metric:
        raise UserError(f"quality.metric: task {data.name!r} measures {data.metric!r}, not {job.quality.metric!r}")
    profiles, budgets = load.targets(job.devices)
    small = any(budget.size_mb is not None for budget in budgets)
    genes = space or make_space(job.space, network, profiles, job.search, small=small)
    if space is not None:
        load.check_space(space)
    resolved = tuple(resolve_local(profile) for profile in profiles)
    for profile in resolved:
        if not callable(registry.resolve("device", profile.device)):
            raise UserError(f"device {profile.device!r} is no device: it cannot be called with a profile")
        if profile.device == "local":
            check_expects(profile, host())
            check_same(profile, host(), as_is=profile.as_is)
    made = Parts(job, data, network, genes, resolved, budgets, pareto.goals(budgets))
    if job.search.searcher in registry.BUILT_IN["searcher"]:
        # options and packages that it lacks are said now, not when the parent is trained and measured
        facts = Facts(sites=tuple(network.sites()))
        limit = Limit(metric=data.metric, floor=0.0)
        make_searcher(Header(space=genes, goals=made.goals, limit=limit, plan=job.search, facts=facts))
    return made


def make_task(name: str, data: Mapping[str, Any], *, trusted: bool = True) -> Task:
    """A task by name, given its options. Raises UserError for options it does not take."""
    found = registry.resolve("task", name, trusted=trusted)
    if not callable(found):
        if data:
            raise UserError(f"data: task {name!r} takes no options")
        return registry.genuine("task", name, found)
    _check_options("data", f"task {name!r}", found, data)
    return registry.genuine("task", name, registry.call("task", name, functools.partial(found, **data)))


def make_builder(
    name: str,
    spec: InputSpec,
    options: Mapping[str, Any],
    *,
    given: Builder | nn.Module | None = None,
    trusted: bool = True,
) -> Builder:
    """A builder by name, or of an object; a function that gives an nn.Module, or a module, becomes a `Foreign`.

    `spec` is the task's input. Raises UserError for options that the function does not take.
    """
    if isinstance(given, nn.Module):
        return Foreign.of(given, spec)
    if given is not None:
        return registry.genuine("builder", name, given)
    found = registry.resolve("builder", name, trusted=trusted)
    if isinstance(found, nn.Module):
        return Foreign.of(found, spec)
    if isinstance(found, functools.partial) and isinstance(found.func, type):  # a source that is a builder: nni
        return registry.genuine("builder", name, found(options, spec))
    if isinstance(found, type) and all(hasattr(found, member) for member in ("build", "sites", "inherit")):
        _check_options("model.options", f"builder {name!r}", found, options)
        return registry.genuine("builder", name, registry.call("builder", name, functools.partial(found, **options)))
    if isinstance(found, Builder) or not callable(found):
        if options:
            raise UserError(f"model.options: builder {name!r} takes no options")
        return registry.genuine("builder", name, found)
    _check_options("model.options", f"model {name!r}", found, options)
    return Foreign(name, functools.partial(found, **options), spec)


def _check_options(key: str, what: str, function: Any, options: Mapping[str, Any]) -> None:
    """Raise UserError for the first option that a class or function does not take."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return
    known = [one.name for one in parameters if one.kind is not inspect.Parameter.POSITIONAL_ONLY]
    if strange := [option for option in options if option not in known]:
        raise UserError(f"{key}: {what} has no option {strange[0]!r}; {suggest(strange[0], known)}")


def make_space(
    name: str, network: Builder, profiles: Sequence[Profile], plan: SearchPlan, *, small: bool = False
) -> Space:
    """The space of a job: derived from the network as its plan says, from the shelf or from a file.

    `small`: a budget bounds the file's size.
    """
    if name != auto.NAME:
        if plan.ops:
            raise UserError("search.ops: is for `space: auto`; leave rows out of the space's own file instead")
        return load.space(name, network)
    if not network.sites():
        raise UserError(f"space: auto: model {network.name} has no layer or block that an op could act on")
    found = auto.targeted(network, profiles, routes=plan.routes, small=small)
    return auto.limited(found, plan.ops) if plan.ops else found


def make_ops(names: tuple[str, ...]) -> Mapping[str, Op]:
    """Ops by name, each made once, and those that their rules imply."""
    implied = (other for name in names for other in IMPLIED.get(name, ()))
    return {name: registry.make("op", name) for name in dict.fromkeys((*names, *implied))}


def check_searcher(plan: SearchPlan) -> None:
    """Raise UserError for a searcher that is none and for options whose names it does not know."""
    kind: Any = registry.genuine("searcher", plan.searcher, registry.resolve("searcher", plan.searcher))
    if not isinstance(kind, type) or not plan.options:
        return
    parameters = list(inspect.signature(kind).parameters.values())
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return
    known = [one.name for one in parameters[5:]]  # after space, goals, limit, facts and seed
    if strange := [name for name in plan.options if name not in known]:
        raise UserError(
            f"search.options: searcher {plan.searcher!r} has no option {strange[0]!r}; {suggest(strange[0], known)}"
        )


def make_searcher(header: Header) -> Searcher:
    """A fresh searcher as the journal's header describes it. Raises UserError for options it does not take."""
    plan = header.plan
    kind: Any = registry.genuine("searcher", plan.searcher, registry.resolve("searcher", plan.searcher))
    if not isinstance(kind, type):
        return kind
    try:
        return kind(header.space, header.goals, header.limit, header.facts, plan.seed, **plan.options)
    except TypeError as error:
        raise UserError(f"search.options: {plan.searcher}: {error}") from error
