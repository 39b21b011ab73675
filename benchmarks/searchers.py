"""Searchers on closed-form problems with a known front: hypervolume as a share of the true front's.

    python benchmarks/searchers.py [--quick] [--workers N] [--json FILE] [--svg FILE]

20 seeds, 200 trials, problems of 20, 60 and 200 genes; each seed draws another problem, the same for all searchers. The
budget is a speedup of 1.25, up to 10 points of quality may be lost, and the rest of the front is what is counted. Seeds
from 100 on: those below were for tuning (`--first 0`). `black` problems tell site features only; `probed` ones also a
probe's table, whose looks are charged: the curve begins LOOK trials per choice later, and ends at the same total.
`table` is a space of 2,916 candidates of a ResNet-20, really evaluated once (`table.py`; there 20 points): seeds are
the searcher's, and a probe costs what it took beside an evaluation.

`hv_ci` is the 95 % bootstrap interval of the median. `trials_to_best_peer` is the median number of trials until a run
of ours reaches what the best peer's median has at the end of its black-box run; null for peers and where fewer than
half of the runs get there. Peers that are not installed are left out, and said to be. Only where `--only` names them:
`optuna-gp`, which takes seconds per ask, and `policy_gradient-moved`, which starts from the agent that an earlier
search left (120 trials on a problem of 20 genes with seed 0).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from autocompress import pareto
from autocompress.charts import Scale, ticks
from autocompress.registry import resolve
from autocompress.searchers import Searcher
from autocompress.testing import ClosedForm
from autocompress.types import Facts, Genotype, Goal, Limit, Space, Trial

if TYPE_CHECKING:
    from table import FrozenTable

OURS = ("portfolio", "evolution", "policy_gradient", "gradient", "random")
PEERS = ("optuna-tpe", "optuna-nsga2", "optuna-gp", "pymoo-nsga2", "syne-tune-morea")
NEEDS = {"optuna": "autocompress[optuna]", "pymoo": "pymoo", "syne": "syne-tune"}
LOOK = 0.01  # trials that a probe's look at one choice costs: no training, a few hundred samples
SIZES = (20, 60, 200)
TABLE = 0  # in place of genes: the frozen table
SLOW = ("optuna-gp",)  # seconds per ask: only where --only names them
MOVED = "policy_gradient-moved"
TAUGHT = (20, 0, 120)  # genes, seed and trials of the search whose agent is moved
COLOURS = ("#0b6", "#06c", "#c40", "#90c", "#888", "#d90", "#a55", "#333", "#5aa", "#b5b")


class Problem(Protocol):
    """What a searcher is told, and what tells how its candidates ended."""

    space: Space
    goals: tuple[Goal, ...]
    limit: Limit
    facts: Facts

    def trial(self, number: int, g: Genotype, note: dict[str, object] | None = None) -> Trial:
        """The ended trial of a genotype."""
        ...


@dataclass(frozen=True)
class Run:
    """One search to do."""

    searcher: str
    genes: int
    seed: int
    trials: int
    probed: bool
    agent: str = ""

    @property
    def problem(self) -> str:
        """Its name in the table."""
        return f"{f'genes-{self.genes}' if self.genes else 'table'}{'-probed' if self.probed else ''}"


def made(name: str, agent: str = "") -> Callable[..., Searcher]:
    """The constructor that goes by a name of the table."""
    if name.startswith("optuna-"):
        return partial(resolve("searcher", "optuna"), sampler=name.removeprefix("optuna-"))
    if name in ("pymoo-nsga2", "syne-tune-morea"):
        import peers  # noqa: PLC0415  its packages are optional

        return peers.Pymoo if name == "pymoo-nsga2" else peers.MoRea
    if name == MOVED:
        return partial(resolve("searcher", "policy_gradient"), agent=agent)
    return resolve("searcher", name)


def taught(folder: str) -> str:
    """The folder, with the agent of a search in it."""
    genes, seed, trials = TAUGHT
    problem = ClosedForm(genes, seed=seed)
    made: list[Any] = []

    def make(*given: Any) -> Searcher:
        made.append(resolve("searcher", "policy_gradient")(*given))
        return made[-1]

    searched(make, problem, seed, trials)
    made[0].save(Path(folder))
    return folder


def missing() -> dict[str, str]:
    """Peers that cannot run here -> what would bring them."""
    packages = {"optuna": "optuna", "pymoo": "pymoo", "syne": "syne_tune"}
    absent = {key for key, package in packages.items() if find_spec(package) is None}
    return {name: NEEDS[name.split("-")[0]] for name in PEERS if name.split("-")[0] in absent}


def drawn_from(run: Run) -> ClosedForm | FrozenTable:
    """The problem of a run."""
    return ClosedForm(run.genes, seed=run.seed, probe=run.probed) if run.genes else frozen(run.probed)


@cache
def frozen(probed: bool) -> FrozenTable:
    """The table, read once a process."""
    import table  # noqa: PLC0415  scikit-learn and a file of its own

    return table.FrozenTable(probe=probed)


@cache
def whole(genes: int, seed: int) -> float:
    """Hypervolume of a problem's true front."""
    problem = ClosedForm(genes, seed=seed) if genes else frozen(False)
    return pareto.hypervolume(problem.front(), problem.reference())


def search(make: Callable[..., Searcher], problem: ClosedForm, seed: int, trials: int) -> tuple[float, float]:
    """(hypervolume share, milliseconds per ask and tell) of one search."""
    told, spent = searched(make, problem, seed, trials)
    return problem.hypervolume(told), spent


def searched(make: Callable[..., Searcher], problem: Problem, seed: int, trials: int) -> tuple[list[Trial], float]:
    """The trials of one search, and processor milliseconds per ask and tell."""
    searcher = make(problem.space, problem.goals, problem.limit, problem.facts, seed)
    told: list[Trial] = []
    spent = 0.0
    for number in range(1, trials + 1):
        start = time.process_time()
        proposal = searcher.ask(number, [])
        spent += time.process_time() - start
        if proposal is None:
            break
        told.append(problem.trial(number, proposal.genotype, proposal.note))
        start = time.process_time()
        searcher.tell(told[-1])
        spent += time.process_time() - start
    return told, 1000.0 * spent / max(1, len(told))


def curve(run: Run) -> tuple[list[float], float]:
    """Share of the true hypervolume after each trial that was paid for, and milliseconds per trial."""
    problem = drawn_from(run)
    looks = math.ceil(LOOK * len(problem.facts.probe) if isinstance(problem, ClosedForm) else problem.looks)
    told, spent = searched(made(run.searcher, run.agent), problem, run.seed, run.trials - looks)
    total, reference = whole(run.genes, run.seed if run.genes else 0), problem.reference()
    points: list[tuple[float, float]] = []
    values = [0.0] * looks
    for trial in told:
        score = pareto.of(trial, problem.goals[0], problem.limit)
        if score is not None and score.violation <= 0:
            points.append((problem.quality(trial.genotype), problem.ratio(trial.genotype)))
        values.append(pareto.hypervolume(points, reference) / total)
    values += [values[-1] if values else 0.0] * (run.trials - len(values))
    return values, spent


def interval(values: Sequence[float]) -> list[float]:
    """95 % bootstrap interval of the median (percentile method, 10,000 resamples, fixed seed)."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, size=(10_000, len(values))), axis=1)
    return [float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))]


def reaches(curves: np.ndarray, level: float) -> int | None:
    """Median number of trials until the curves (runs, trials) reach a level; None where half of them do not."""
    first = [int(np.argmax(one >= level)) + 1 if (one >= level).any() else 10**9 for one in curves]
    middle = float(np.median(first))
    return round(middle) if middle < 10**8 else None


def figured(results: Sequence[tuple[list[float], float]], level: float) -> dict[str, Any]:
    """What stands in the table and in the file, of one searcher's runs; `level` is the best peer's, 0 without peers."""
    curves = np.array([values for values, _ in results])
    return {
        "hv_median": float(np.median(curves[:, -1])),
        "hv_ci": interval(curves[:, -1].tolist()),
        "trials_to_best_peer": reaches(curves, level) if level else None,
        "ask_tell_ms": float(np.median([spent for _, spent in results])),
        "hv": curves[:, -1].tolist(),
        "curve": [round(float(value), 4) for value in np.median(curves, axis=0)],
    }


def drawn(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Median curves as SVG, one panel per problem."""
    wide, high, pad = 330, 250, 34
    names = list(dict.fromkeys(name for one in figures.values() for name in one))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    parts: list[str] = []
    columns = min(3, max(1, len(figures)))
    for k, (problem, by_searcher) in enumerate(figures.items()):
        left, top = (k % columns) * wide, (k // columns) * high
        trials = max(len(one["curve"]) for one in by_searcher.values())
        x, y = Scale(0, trials, left + pad, left + wide - 12), Scale(0, 1, top + high - 30, top + 24)
        parts.append(f'<text x="{left + pad}" y="{top + 15}" font-weight="bold">{problem}</text>')
        for value in ticks(0, 1):
            parts.append(f'<path d="M{x(0)} {y(value)}H{x(trials)}" stroke="#ddd"/>')
            parts.append(f'<text x="{x(0) - 4}" y="{y(value) + 3}" text-anchor="end">{value:g}</text>')
        parts += [
            f'<text x="{x(value)}" y="{top + high - 16}" text-anchor="middle">{value:g}</text>'
            for value in ticks(0, trials, 4)
        ]
        for name, one in by_searcher.items():
            path = "L".join(f"{x(i + 1)} {y(value)}" for i, value in enumerate(one["curve"]))
            dash = "" if name in OURS else ' stroke-dasharray="4 2"'
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour[name]}" stroke-width="1.5"{dash}/>')
    bottom = -(-len(figures) // columns) * high
    for i, name in enumerate(names):
        at = pad + (i % 5) * 190
        line = bottom + 12 + 16 * (i // 5)
        parts.append(f'<path d="M{at} {line - 3}h18" stroke="{colour[name]}" stroke-width="2"/>')
        parts.append(f'<text x="{at + 22}" y="{line}">{name}</text>')
    size = f"{max(columns * wide, 960)} {bottom + 16 * (-(-len(names) // 5)) + 8}"
    style = 'font-family="sans-serif" font-size="10" style="background:#fff"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" {style}>' + "\n".join(parts) + "</svg>\n"


def main() -> None:
    """Run, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--svg", type=Path, help="draw the median curves into this file")
    parser.add_argument("--quick", action="store_true", help="5 seeds and 100 trials, 20 and 60 genes")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--first", type=int, default=100, help="the first seed")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--genes", nargs="*", choices=(*map(str, SIZES), "table"))
    parser.add_argument("--only", nargs="*", help="names of the searchers to run")
    parser.add_argument("--kinds", nargs="*", choices=("black", "probed"), default=("black", "probed"))
    parser.add_argument("--workers", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    seeds = arguments.seeds or (5 if arguments.quick else 20)
    trials = arguments.trials or (100 if arguments.quick else 200)
    absent = missing()
    for name, package in absent.items():
        print(f"{name} is left out: pip install '{package}'")
    wanted = [n for n in (*OURS, MOVED, *PEERS) if n not in absent]
    wanted = [n for n in wanted if (n in arguments.only if arguments.only else n not in (*SLOW, MOVED))]
    there = (Path(__file__).parent / "table.json.gz").is_file()
    sizes = (*(SIZES[:2] if arguments.quick else SIZES), *([TABLE] if there else []))
    if arguments.genes:
        sizes = tuple(TABLE if size == "table" else int(size) for size in arguments.genes)
    wanted.sort(key=lambda name: name not in PEERS)  # peers first: the others are held against the best of them
    arms = [
        (size, kind, name)
        for size in sizes
        for kind in arguments.kinds
        for name in wanted
        if kind == "black" or (name not in PEERS and name != "random")
    ]
    print(f"{seeds} seeds from {arguments.first}, {trials} trials; hypervolume as a share of the true front's\n")
    print(
        f"{'problem':<18}{'searcher':<18}{'hv median':>10}{'95 % interval':>18}{'to best peer':>14}{'ms per trial':>14}"
    )
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    best: dict[int, float] = dict.fromkeys(sizes, 0.0)
    with TemporaryDirectory() as folder, ProcessPoolExecutor(arguments.workers) as pool:
        agent = taught(folder) if MOVED in wanted else ""
        for size, kind, name in arms:
            runs = [
                Run(name, size, arguments.first + seed, trials, probed=kind == "probed", agent=agent)
                for seed in range(seeds)
            ]
            one = figured(list(pool.map(curve, runs)), best[size])
            if name in PEERS:
                best[size] = max(best[size], one["hv_median"])
                one["trials_to_best_peer"] = None
            figures.setdefault(runs[0].problem, {})[name] = one
            low, high = one["hv_ci"]
            print(
                f"{runs[0].problem:<18}{name:<18}{one['hv_median']:>10.3f}{f'{low:.3f} - {high:.3f}':>18}"
                f"{one['trials_to_best_peer'] or '-':>14}{one['ask_tell_ms']:>14.2f}",
                flush=True,
            )
    if arguments.json:
        record = {
            "seeds": seeds,
            "first": arguments.first,
            "trials": trials,
            "look": LOOK,
            "left_out": sorted(absent),
            "problems": figures,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if arguments.svg:
        arguments.svg.write_text(drawn(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
