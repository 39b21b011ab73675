"""A search that screens, stopped and resumed: the same screens, the same journal."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import autocompress
from autocompress import journal as journals
from autocompress import pareto, surrogate
from autocompress.controller import Controller, Header, run_serial
from autocompress.journal import Journal
from autocompress.parts import make_searcher
from autocompress.types import Assignment, Cost, Outcome, SearchPlan, State, UserError
from tests.test_controller import story
from tests.test_surrogate import Weighed


class Screened(Weighed):
    """Leaves unmeasured what its assignment's screen finds hopeless, as a trial does."""

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        for state, outcome in super().evaluate(assignment):
            if surrogate.hopeless(assignment.screen, outcome.amounts):
                why = "predicted to be far over every budget, so not measured"
                yield State.INFEASIBLE, Outcome(amounts=outcome.amounts, reason=why)
                return
            yield state, outcome


def test_a_screened_search_is_resumed_as_if_nothing_had_been(tmp_path: Path) -> None:
    evaluator, whole = Screened(), tmp_path / "whole.jsonl"
    problem = evaluator.problem
    plan = SearchPlan(searcher="random", screen=True, cost=Cost(trials=60, minutes=10))
    asked = [one.model_copy(update={"speedup": 3.0}) for goal in problem.goals for one in goal.budgets]
    goals = pareto.goals(asked)
    head = Header(space=problem.space, goals=goals, limit=problem.limit, plan=plan, facts=problem.facts)
    controller = Controller.begin(Journal.create(whole, head.event()), make_searcher)
    run_serial(controller, evaluator)
    controller.journal.close()
    first = min(number for number, one in evaluator.asked.items() if one.screen)
    left_out = [trial.number for trial in controller.trials if trial.outcome.reason.startswith("predicted")]
    assert left_out, "the screen never decided anything, so nothing was shown"

    lines = whole.read_bytes().splitlines(keepends=True)
    numbers = [event.get("number", 0) for event in journals.read(whole).events]
    at = (numbers.index(first), numbers.index(left_out[0]) + 1, len(lines) - 4)  # before, amid and after the first
    for cut in at:
        path, again = tmp_path / f"cut{cut}.jsonl", Screened()
        path.write_bytes(b"".join(lines[:cut]))
        with Journal.open(path) as journal:
            resumed = Controller.resume(journal, make_searcher)
            run_serial(resumed, again)
        assert story(path) == story(whole)
        assert again.asked
        for number, one in again.asked.items():  # one that had reached a rung goes on there, unscreened
            assert one.start or one.screen == evaluator.asked[number].screen, (cut, number)


def test_python_takes_screen_and_patience(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search\.screen: must be a valid boolean"):
        autocompress.search("convnet", "digits", devices=[{"profile": "local-1t"}], screen=3, out=tmp_path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"search\.patience: must be greater than or equal to 0"):
        autocompress.search("convnet", "digits", devices=[{"profile": "local-1t"}], patience=-1, out=tmp_path)
