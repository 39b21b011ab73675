"""A job's names become objects: task, builder, space, profiles, goals, ops (floor F5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autocompress import load, pareto, registry
from autocompress.controller import Header
from autocompress.devices.fingerprint import resolve_local
from autocompress.models import Builder
from autocompress.ops import Op
from autocompress.searchers import Searcher
from autocompress.tasks import Task
from autocompress.types import Budget, Goal, Job, Profile, Space, UserError


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
        return tuple(dict.fromkeys([*(gene.op for gene in self.space.genes if gene.op), "quantize"]))


def parts(job: Job, *, task: Task | None = None, builder: Builder | None = None, space: Space | None = None) -> Parts:
    """Resolve a job; objects given take the place of its names.

    Raises UserError for unknown names, a space of another builder, a metric the task does not have.
    """
    data: Task = task or registry.make("task", job.task)
    network: Builder = builder or registry.make("builder", job.model.builder)
    if job.quality.metric != data.metric:
        raise UserError(f"quality.metric: task {data.name!r} measures {data.metric!r}, not {job.quality.metric!r}")
    genes = space or load.space(job.space, network)
    profiles, budgets = load.targets(job.devices)
    resolved = tuple(resolve_local(profile) for profile in profiles)
    return Parts(job, data, network, genes, resolved, budgets, pareto.goals(budgets))


def make_ops(names: tuple[str, ...]) -> Mapping[str, Op]:
    """Ops by name, each made once."""
    return {name: registry.make("op", name) for name in names}


def make_searcher(header: Header) -> Searcher:
    """A fresh searcher as the journal's header describes it. Raises UserError for options it does not take."""
    plan = header.plan
    kind: Any = registry.resolve("searcher", plan.searcher)
    if not isinstance(kind, type):
        return kind
    try:
        return kind(header.space, header.goals, header.limit, header.facts, plan.seed, **plan.options)
    except TypeError as error:
        raise UserError(f"search.options: {plan.searcher}: {error}") from error
