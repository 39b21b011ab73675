"""What the search itself costs, with an evaluator in closed form that costs next to nothing.

    python benchmarks/overhead.py [--quick] [--json FILE]

`core_s_2000`: controller, journal and random search, 2,000 trials in this process, without the evaluator's own time.
`ask_ms`: processor time of evolution's ask at 60 genes, the median of trials 101 to 200 (it breeds some 200 children).
`tune_ms_per_trial_200`: through a local Ray Tune, 4 at once, the median time between the ends of two trials.
`first_trial_s`: a fresh Python process until the first trial is asked, Ray's start included.
`import_s`, `help_s`: median of fresh processes. `--quick` takes fewer repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autocompress.controller import Controller, Header, run_serial
from autocompress.journal import Journal
from autocompress.registry import resolve
from autocompress.searchers import Searcher
from autocompress.testing import ClosedForm
from autocompress.types import Assignment, Cost, Outcome, SearchPlan, State

GOALS = {
    "core_s_2000": 5.0,
    "ask_ms": 30.0,
    "tune_ms_per_trial_200": 50.0,
    "first_trial_s": 8.0,
    "import_s": 0.5,
    "help_s": 0.5,
}
CHILD = "--until-first-trial"


def begin(path: Path, trials: int, problem: ClosedForm, searcher: str = "evolution") -> Controller:
    """A new search on the closed form, journal at `path`."""
    plan = SearchPlan(searcher=searcher, cost=Cost(trials=trials, minutes=60))
    head = Header(space=problem.space, goals=problem.goals, limit=problem.limit, plan=plan, facts=problem.facts)

    def make(h: Header) -> Searcher:
        return resolve("searcher", h.plan.searcher)(h.space, h.goals, h.limit, h.facts, h.plan.seed)

    return Controller.begin(Journal.create(path, head.event()), make)


class Timed:
    """An evaluator and the seconds spent in it."""

    def __init__(self, problem: ClosedForm) -> None:
        self.problem, self.seconds = problem, 0.0

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        """As the closed form does."""
        inner = self.problem.evaluate(assignment)
        while True:
            started = time.perf_counter()
            found = next(inner, None)
            self.seconds += time.perf_counter() - started
            if found is None:
                return
            yield found


def core(folder: Path, trials: int = 2000) -> dict[str, float]:
    """Controller, journal and random search alone."""
    evaluator = Timed(ClosedForm(20))
    started = time.perf_counter()
    controller = begin(folder / "core.jsonl", trials, evaluator.problem, "random")
    run_serial(controller, evaluator)
    controller.journal.close()
    total = time.perf_counter() - started
    ended = sum(trial.state.ended for trial in controller.trials)
    if ended != trials:
        raise RuntimeError(f"{ended} of {trials} trials ended")
    size = (folder / "core.jsonl").stat().st_size / 1e6
    return {"core_s_2000": total - evaluator.seconds, "core_evaluator_s": evaluator.seconds, "core_journal_mb": size}


def ask(trials: int = 200) -> dict[str, float]:
    """What evolution thinks about a proposal."""
    problem = ClosedForm(60)
    searcher = resolve("searcher", "evolution")(problem.space, problem.goals, problem.limit, problem.facts, 0)
    spent: list[float] = []
    for number in range(1, trials + 1):
        started = time.process_time()
        proposal = searcher.ask(number, [])
        spent.append(1000 * (time.process_time() - started))
        searcher.tell(problem.trial(number, proposal.genotype, proposal.note))
    return {"ask_ms": statistics.median(spent[trials // 2 :])}


def tune(folder: Path, trials: int = 200) -> dict[str, float]:
    """Through Ray Tune, four at once."""
    from autocompress import ray_tune  # noqa: PLC0415  Ray is not loaded for the other figures

    controller = begin(folder / "tune.jsonl", trials, ClosedForm(20))
    ray_tune.run(controller, partial(ClosedForm, 20), workers=4)
    events = controller.journal.events()[1:]
    controller.journal.close()
    ends = [event["at"] for event in events if State(event["state"]).ended]
    gaps = [1000 * (b - a) for a, b in pairwise(ends)]
    return {
        "tune_ms_per_trial_200": statistics.median(gaps),
        "tune_mean_ms_per_trial": 1000 * (ends[-1] - ends[0]) / (trials - 1),
        "tune_attempts": float(sum(event["state"] == State.RUNNING for event in events)),
    }


def until_first_trial() -> None:
    """The child of `first_trial`: a search as a command would start it, stopped at its first trial."""
    from autocompress import ray_tune  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        controller = begin(Path(folder) / "first.jsonl", 10, ClosedForm(20))

        def hear(_: dict[str, Any]) -> None:
            print("asked", flush=True)
            controller.stop()

        ray_tune.run(controller, partial(ClosedForm, 20), workers=2, on_event=hear)


def first_trial(repetitions: int) -> float:
    """Seconds from starting a process to its first trial."""
    return _median(repetitions, lambda: _until_line([sys.executable, __file__, CHILD]))


def command(repetitions: int, *arguments: str) -> float:
    """Seconds of a whole Python process."""

    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        return time.perf_counter() - started

    once()  # writes the byte code
    return _median(repetitions, once)


def _median(repetitions: int, once: Callable[[], float]) -> float:
    return statistics.median(once() for _ in range(repetitions))


def _until_line(arguments: list[str]) -> float:
    started = time.perf_counter()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - started
        child.communicate()
    if line != "asked\n" or child.returncode:
        raise RuntimeError(f"the search did not start: {line!r}, exit code {child.returncode}")
    return seconds


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="one repetition of each: under two minutes")
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.until_first_trial:
        until_first_trial()
        return
    repetitions = 1 if arguments.quick else 5
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        figures["import_s"] = command(max(3, repetitions), "-c", "import autocompress")
        figures["help_s"] = command(max(3, repetitions), "-c", "from autocompress.cli import main; main()", "--help")
        figures |= core(Path(folder)) | ask()
        figures["first_trial_s"] = first_trial(repetitions)
        figures |= tune(Path(folder))
    table = Table("figure", "value", "goal", "", title="Overhead of the search itself")
    for name, value in figures.items():
        goal = GOALS.get(name)
        told = "" if goal is None else "[green]met[/]" if value < goal else "[red]missed[/]"
        table.add_row(name, f"{value:.3g}", "" if goal is None else f"< {goal:g}", told)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
