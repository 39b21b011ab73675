"""Searchers on closed-form problems with a known front: hypervolume as a share of the true front's.

    python benchmarks/searchers.py [--quick] [--json FILE]

20 seeds, 200 trials, problems of 20 and 60 genes; each seed draws another problem, the same for all searchers. The
budget is a speedup of 1.25, up to 10 points of quality may be lost, and the rest of the front is what is counted.
`hv_ci` is the 95 % bootstrap interval of the median. Optuna is left out, and said to be, where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from autocompress.registry import resolve
from autocompress.searchers import Searcher
from autocompress.testing import ClosedForm
from autocompress.types import Trial


def searchers() -> dict[str, Callable[..., Searcher]]:
    """Name -> constructor."""
    made: dict[str, Callable[..., Searcher]] = {
        name: resolve("searcher", name) for name in ("random", "evolution", "policy_gradient")
    }
    if find_spec("optuna"):
        for sampler in ("tpe", "nsga2"):
            made[f"optuna-{sampler}"] = partial(resolve("searcher", "optuna"), sampler=sampler)
    return made


def search(make: Callable[..., Searcher], problem: ClosedForm, seed: int, trials: int) -> tuple[float, float]:
    """(hypervolume share, milliseconds per ask and tell) of one search."""
    searcher = make(problem.space, problem.goals, problem.limit, problem.facts, seed)
    told: list[Trial] = []
    spent = 0.0
    for number in range(1, trials + 1):
        start = time.perf_counter()
        proposal = searcher.ask(number, [])
        spent += time.perf_counter() - start
        if proposal is None:
            break
        told.append(problem.trial(number, proposal.genotype, proposal.note))
        start = time.perf_counter()
        searcher.tell(told[-1])
        spent += time.perf_counter() - start
    return problem.hypervolume(told), 1000.0 * spent / max(1, len(told))


def interval(values: list[float]) -> list[float]:
    """95 % bootstrap interval of the median (percentile method, 10,000 resamples, fixed seed)."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, size=(10_000, len(values))), axis=1)
    return [float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))]


def main() -> None:
    """Run, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="5 seeds and 100 trials: under two minutes")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--only", nargs="*", help="names of the searchers to run")
    arguments = parser.parse_args()
    seeds = arguments.seeds or (5 if arguments.quick else 20)
    trials = arguments.trials or (100 if arguments.quick else 200)
    made = {name: make for name, make in searchers().items() if not arguments.only or name in arguments.only}
    if "optuna-tpe" not in searchers():
        print("optuna is not installed: its rows are missing (pip install 'autocompress[optuna]')")
    print(f"{seeds} seeds, {trials} trials; hypervolume as a share of the true front's\n")
    print(f"{'problem':<10}{'searcher':<18}{'hv median':>10}{'95 % interval':>18}{'ms per trial':>14}")
    figures: dict[str, dict[str, dict[str, object]]] = {}
    for size in (20, 60):
        problem = f"genes-{size}"
        figures[problem] = {}
        for name, make in made.items():
            runs = [search(make, ClosedForm(size, seed=seed), seed, trials) for seed in range(seeds)]
            values = [share for share, _ in runs]
            low, high = interval(values)
            ms = float(np.median([spent for _, spent in runs]))
            median = float(np.median(values))
            figures[problem][name] = {"hv_median": median, "hv_ci": [low, high], "ask_tell_ms": ms, "hv": values}
            print(f"{problem:<10}{name:<18}{median:>10.3f}{f'{low:.3f} - {high:.3f}':>18}{ms:>14.2f}", flush=True)
    if arguments.json:
        record = {"seeds": seeds, "trials": trials, "problems": figures}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
