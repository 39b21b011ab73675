"""The loop: ask, tell, journal, resume (floor F4). Knows neither torch nor ray, nor how a trial is evaluated.

Every step is written to the journal first and acted upon afterwards. States of a trial in the journal: `running` (a new
attempt, with `why`: new, promoted, resumed or retry), `rung` (it went on), and the ends of `types.State`. An end with
`late` completes one before it: those profiles' devices were away then. Number 0 also has `away` and `back`, of devices,
and `finals`: from there on the named trials alone go on, to the named rungs.
"""

from __future__ import annotations

import functools
import math
import queue
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pydantic import ValidationError

from autocompress.journal import FORMAT, HEADER, Event, Journal
from autocompress.rungs import Ladder
from autocompress.searchers import Searcher
from autocompress.space import canonical, check, decode, parent
from autocompress.surrogate import screens
from autocompress.types import (
    Assignment,
    Cost,
    Facts,
    Genotype,
    Goal,
    Limit,
    Outcome,
    Reading,
    Record,
    Screen,
    SearchPlan,
    Space,
    State,
    Trial,
    TrialFailure,
    UserError,
)

P = ParamSpec("P")
R = TypeVar("R")
RETRIES = 2
COST = "cost"  # an event of number 0: the cost was changed on resuming
AWAY, BACK = "away", "back"  # events of number 0: a device does not answer, or does again
FINALS = "finals"  # an event of number 0: the search is over, these trials go on to these rungs
LATE = "late"  # key of an event: the profiles whose readings came after the trial's end


class Header(Record):
    """What a journal's first line says: all that a searcher is a function of, and the caller's own `more`."""

    number: int = 0
    state: str = HEADER
    format: int = FORMAT
    space: Space
    goals: tuple[Goal, ...]
    limit: Limit
    plan: SearchPlan
    facts: Facts = Facts()
    more: dict[str, Any] = {}  # e.g. the job as it was written

    def event(self) -> Event:
        """As the journal keeps it."""
        return self.model_dump(mode="json")


def header(journal: Journal) -> Header:
    """The header of an open journal. Raises UserError if it is not one of ours."""
    try:
        return Header.model_validate(journal.header)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{journal.path}, line 1: {where}: {first['msg']}; restore the file from a copy") from error


def trial_seed(seed: int, number: int) -> int:
    """The seed of everything random in a trial: the same when its policy is applied again."""
    return (seed * 1_000_003 + number) % 2**31


class Evaluator(Protocol):
    """Evaluates one assignment after another."""

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        """Yield (RUNG, outcome) after each rung but the last, then one end; closing the generator stops the trial."""
        ...


def _engine(method: Callable[Concatenate[Controller, P], R]) -> Callable[Concatenate[Controller, P], R]:
    """The method, whose time counts as the engine's."""

    @functools.wraps(method)
    def timed(self: Controller, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.deciding:  # called by another that counts
            return method(self, *args, **kwargs)
        began = time.perf_counter()
        self.deciding = True
        try:
            return method(self, *args, **kwargs)
        finally:
            self.deciding = False
            self.engine += time.perf_counter() - began

    return timed


class Controller:
    """Which trial next, does it go on, what came out. One thread calls it; `stop` and `post` may be called from any."""

    def __init__(
        self,
        space: Space,
        goals: tuple[Goal, ...],
        limit: Limit,
        plan: SearchPlan,
        searcher: Searcher,
        facts: Facts,
        journal: Journal,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A search that begins now: `journal` was just created. Use `resume` for one that has events."""
        self.space, self.goals, self.limit, self.plan, self.facts = space, tuple(goals), limit, plan, facts
        self.searcher, self.journal = searcher, journal
        self.cost = plan.cost
        self.notes: list[str] = list(journal.notes)  # what the user should hear once
        self.on_event: Callable[[Event], None] | None = None
        self._trials: dict[int, Trial] = {}
        self._open: set[int] = set()  # numbers of trials in flight
        self._asked = 0
        self._again: dict[int, str] = {}  # number -> why it runs again: resumed or retry
        self._retries: dict[int, int] = {}
        self._ladder = Ladder(plan.fidelity, self.goals, limit, held=1 if plan.cost.final > 0 else 0)
        self._finals: dict[int, tuple[float, ...]] = {}  # number -> its rungs, of trials that go on after the search
        self._cycles: dict[int, tuple[float, ...]] = {}
        self._peaks: dict[int, tuple[float, ...]] = {}  # of those
        self._waiting: list[int] = []  # of those, not begun yet
        self._stood: dict[int, Trial] = {}  # of those, as they were before they went on
        self._fell: set[int] = set()  # of those, failed since
        self.rounds = 0  # of finals
        self.narrowed = False  # the last round was for some of those that had gone on before
        self.extended = False  # more minutes were given since it began
        self._exhausted = self._stopped = False
        self._posted: queue.SimpleQueue[Callable[[Controller], None]] = queue.SimpleQueue()
        self._clock = clock
        self._before = 0.0  # seconds spent before this process
        self._started = clock()
        self.engine = 0.0  # seconds that this process took to decide and to write, searcher included
        self.deciding = False  # within one of its steps

    @classmethod
    def begin(
        cls,
        journal: Journal,
        make_searcher: Callable[[Header], Searcher],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> Controller:
        """A search as the journal's header describes it, from the beginning."""
        h = header(journal)
        return cls(h.space, h.goals, h.limit, h.plan, make_searcher(h), h.facts, journal, clock=clock)

    @classmethod
    def resume(
        cls,
        journal: Journal,
        make_searcher: Callable[[Header], Searcher],
        *,
        spent: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Controller:
        """Replay the journal's asks and tells, in their order, into a fresh searcher; `spent` replaces fields of cost.

        Trials in flight run again under their number and genotype, as a new attempt, from their last rung. Where the
        searcher asks otherwise than the journal says (it is of another version), a fresh one is told the ended
        trials alone, and `notes` says so. Raises UserError for a journal that contradicts itself, or a cost that makes
        no sense, before that is written.
        """
        controller = cls.begin(journal, make_searcher, clock=clock)
        controller._replay(make_searcher)
        cost = renewed(controller.cost, spent or {})
        if cost != controller.cost:
            controller._write({"number": 0, "state": COST, "cost": cost.model_dump(mode="json")})
            controller._spend(cost)
        return controller

    # --- the view from outside --------------------------------------------------------------------------------------

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial as it stands now, in the order of first asking; number 0 is the control."""
        return tuple(self._trials.values())

    @property
    def standing(self) -> tuple[Trial, ...]:
        """The same, those that are going on after the search as they were before: what they had come to is whole."""
        return tuple(
            self._stood[trial.number] if trial.number in self._stood and not trial.state.ended else trial
            for trial in self.trials
        )

    @property
    def running(self) -> tuple[Trial, ...]:
        """Trials in flight, by number."""
        return tuple(self._trials[number] for number in sorted(self._open))

    @property
    def elapsed(self) -> float:
        """Wall seconds spent so far, summed over resumes."""
        return self._before + self._clock() - self._started

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    @property
    def finished(self) -> bool:
        """No ask will ever be answered again, but for finals. Trials in flight may still be told."""
        if self._stopped:
            return True
        if self.rounds:
            return not (self._waiting or self._lost_finals() or self._open & self._finals.keys())
        if self.time_is_over:
            return True
        if self._open or self._again or not (self._exhausted or self._asked >= self.cost.trials):
            return False
        return self._ladder.promotable() is None

    @property
    def time_is_over(self) -> bool:
        """Whether the time for new trials is over. What is kept for the best few is the search's until there is one."""
        elapsed = self.elapsed
        if elapsed < self.cost.search_seconds:
            return False
        whole = elapsed >= 60 * self.cost.minutes
        return whole or any(t.number and t.rung >= 0 and t.state is not State.FAILED for t in self._trials.values())

    def stop(self) -> None:
        """Ask nothing more. What is in flight stays so in the journal, and runs again after a resume."""
        self._stopped = True

    # --- ask, rung, tell --------------------------------------------------------------------------------------------

    def control(self, outcome: Outcome) -> None:
        """Record the uncompressed parent as trial 0, once; a resumed search that has it already does nothing."""
        if 0 not in self._trials:
            trial = Trial(number=0, genotype=parent(self.space), state=State.DONE, outcome=outcome)
            self._write(self._end(trial) | {"genotype": list(trial.genotype)})
            self._trials[0] = trial
            self.searcher.tell(trial)

    @_engine
    def ask(self) -> Assignment | None:
        """What to run next: lost trials first, then promotions, then the searcher's; None when there is nothing now."""
        self.settle()
        if self._stopped or (not self.rounds and self.time_is_over):
            return None
        if self.rounds:
            return self._ask_final()
        if self._again:
            number = min(self._again)
            return self._start(self._trials[number], self._again[number])
        promoted = self._ladder.promotable()
        if promoted is not None:
            return self._start(self._trials[promoted], "promoted")
        if self._asked >= self.cost.trials:
            return None
        number = self._asked + 1
        proposal = self.searcher.ask(number, self.running)
        # With trials in flight a searcher may only be waiting; alone, None means that it has nothing left.
        self._exhausted = proposal is None and not self._open
        if proposal is None:
            return None
        check(self.space, proposal.genotype)
        genotype = canonical(self.space, proposal.genotype)
        return self._start(
            Trial(number=number, genotype=genotype, state=State.RUNNING, attempt=0, note=proposal.note), "new"
        )

    @_engine
    def rung(self, number: int, outcome: Outcome) -> bool:
        """A trial has reached its next rung. True: it goes on; False: it is stopped, which has been told already."""
        trial = self._in_flight(number)
        trial = trial.model_copy(update={"rung": trial.rung + 1, "outcome": outcome})
        bad = _not_json(outcome)
        if bad:
            self.tell(number, State.FAILED, Outcome(reason=bad))
            return False
        if number not in self._finals:
            self._ladder.reach(number, trial.rung, outcome)
        late = self.elapsed >= self.cost.search_seconds and not self._stopped
        if number in self._finals or (not late and self._ladder.goes_on(number, trial.rung)):
            trial = trial.model_copy(update={"state": State.RUNG})
            self._write(self._end(trial))
            self._trials[number] = trial
            return True
        self._close(trial.model_copy(update={"state": State.STOPPED}))
        return False

    @_engine
    def tell(self, number: int, state: State, outcome: Outcome) -> None:
        """A trial has ended as DONE, INFEASIBLE or FAILED."""
        trial = self._in_flight(number)
        if state not in (State.DONE, State.INFEASIBLE, State.FAILED):
            raise ValueError(f"{state} is no end that an evaluation can come to")
        bad = _not_json(outcome)
        if bad:
            state, outcome = State.FAILED, Outcome(reason=bad)
        rung = len(self._rungs(number)) - 1 if state is State.DONE else trial.rung
        self._close(trial.model_copy(update={"state": state, "rung": rung, "outcome": outcome}))

    def lost(self, number: int, reason: str) -> bool:
        """The worker of a trial is gone. True: the next ask gives the trial again; False: it has failed for good."""
        trial = self._in_flight(number)
        if self._retries.get(number, 0) >= RETRIES:
            outcome = trial.outcome.model_copy(update={"reason": f"worker lost {RETRIES + 1} times: {reason}"})
            self.tell(number, State.FAILED, outcome)
            return False
        self._open.discard(number)
        self._again[number] = "retry"
        return True

    # --- after the search -------------------------------------------------------------------------------------------

    def finals(self, paths: Mapping[int, Sequence[float]], peaks: Mapping[int, float] | None = None) -> None:
        """From now on these trials alone are asked for, in this order, each to go on through fidelities of its own.

        The learning rate begins at a trial's share of it in `peaks`, at all of it where none is said, and comes down at
        the last. Raises ValueError for a trial that has no checkpoint or is beyond.
        """
        peaks = peaks or {}
        event: Event = {
            "number": 0,
            "state": FINALS,
            "paths": [
                {"number": number, "rungs": list(rungs), "peak": peaks.get(number, 1.0)}
                for number, rungs in paths.items()
            ],
        }
        self._begin_finals(event)
        self._write(event)

    def assignment(self, number: int) -> Assignment:
        """What a worker would be asked, were this trial to go on now."""
        return self._assignment(self._trials[number])

    @property
    def in_finals(self) -> tuple[int, ...]:
        """Numbers of the trials that go on, or went on, after the search."""
        return tuple(self._finals)

    @property
    def fell(self) -> frozenset[int]:
        """Those of them that failed on their further way. They stand as before it."""
        return frozenset(self._fell)

    @property
    def reached(self) -> tuple[Mapping[int, Outcome], ...]:
        """Per rung the outcomes of trials as they were when they reached it, by number."""
        done = {t.number: t.outcome for t in self._trials.values() if t.number and t.state is State.DONE}
        return (*self._ladder.reached, {number: done[number] for number in done.keys() - self._finals.keys()})

    def _begin_finals(self, event: Event) -> None:
        self._waiting, self.extended = [], False
        self.narrowed = bool(self._finals) and all(int(path["number"]) in self._finals for path in event["paths"])
        for path in event["paths"]:
            number, rungs = int(path["number"]), tuple(map(float, path["rungs"]))
            trial = self._trials[number]
            if list(rungs) != sorted(set(rungs)) or not rungs or not 0 < rungs[0] <= rungs[-1] <= 1:
                raise ValueError(f"finals: {list(rungs)} are no rungs")
            if trial.state not in (State.STOPPED, State.DONE) or "checkpoint" not in trial.outcome.files:
                raise ValueError(f"finals: trial {number} is {trial.state.value}, or has no checkpoint")
            behind = self._rungs(number)[: trial.rung + 1]
            if behind[-1] >= rungs[0]:
                raise ValueError(f"finals: trial {number} is at {behind[-1]:g} already")
            before = self._cycles.get(number) or behind
            self._peaks[number] = (*(self._peaks.get(number) or (1.0,) * len(before)), float(path.get("peak", 1.0)))
            self._cycles[number] = (*before, rungs[-1])
            self._finals[number] = (*behind, *rungs)
            self._stood[number] = trial
            self._waiting.append(number)
        self.rounds += 1

    def _spend(self, cost: Cost) -> None:
        self.extended = self.extended or cost.minutes > self.cost.minutes
        self.cost = cost

    def _rungs(self, number: int) -> tuple[float, ...]:
        """A trial's fidelities, behind it and ahead."""
        return self._finals.get(number, self.plan.fidelity.rungs)

    def _lost_finals(self) -> list[int]:
        return sorted(self._again.keys() & self._finals.keys())

    def _ask_final(self) -> Assignment | None:
        for number in self._lost_finals():
            return self._start(self._trials[number], self._again[number])
        return self._start(self._trials[self._waiting[0]], "final") if self._waiting else None

    # --- devices that were away -----------------------------------------------------------------------------------

    def post(self, action: Callable[[Controller], None]) -> None:
        """From any thread: have this done in the controller's own, at its next ask or `settle`."""
        self._posted.put(action)

    def settle(self) -> None:
        """Do what was posted."""
        while True:
            try:
                action = self._posted.get_nowait()
            except queue.Empty:
                return
            action(self)

    def device(self, profile: str, why: str) -> None:
        """Note that a device does not answer, and `why`; or, with an empty `why`, that it does again."""
        told = {"why": why} if why else {}
        self._write({"number": 0, "state": AWAY if why else BACK, "profile": profile, **told})

    def late(self, number: int, attempt: int, role: str, readings: Mapping[str, Reading], reason: str = "") -> None:
        """Readings of a trial that ended while a device was away, or the `reason` why its file fails there.

        The file's `role` leaves the outcome, and the trial is told again. Nothing happens for a trial that has gone on
        since `attempt`: it measures for itself.
        """
        trial = self._trials[number]
        known = trial.attempt == attempt and role in trial.outcome.files
        if not known or number in self._open or trial.state not in (State.DONE, State.STOPPED):
            return
        files = {other: sha for other, sha in trial.outcome.files.items() if other != role}
        outcome = trial.outcome.model_copy(
            update={"readings": {**trial.outcome.readings, **readings}, "files": files, "reason": reason}
        )
        if bad := _not_json(outcome):
            reason, outcome = bad, trial.outcome.model_copy(update={"files": files, "reason": bad})
        trial = trial.model_copy(update={"state": State.FAILED if reason else trial.state, "outcome": outcome})
        self._write(self._end(trial) | {LATE: sorted(readings)})
        self._completed(trial)
        self.searcher.tell(trial)

    def _completed(self, trial: Trial) -> None:
        self._trials[trial.number] = trial
        self._ladder.complete(trial.number, trial.outcome)
        if trial.state is State.FAILED and trial.number not in self._finals:
            self._ladder.leave(trial.number, trial.rung)

    # --- journal first, then act --------------------------------------------------------------------------------------

    def _start(self, trial: Trial, why: str) -> Assignment:
        trial = trial.model_copy(update={"state": State.RUNNING, "attempt": trial.attempt + 1})
        event: Event = {
            "number": trial.number,
            "state": State.RUNNING.value,
            "attempt": trial.attempt,
            "rung": trial.rung,
            "why": why,
            "genotype": list(trial.genotype),
        }
        if trial.note and why == "new":
            event["note"] = trial.note
        assignment = self._assignment(trial)
        self._write(event)
        self._running(trial, why)
        return assignment

    def _running(self, trial: Trial, why: str) -> None:
        number = trial.number
        self._again.pop(number, None)
        if why == "new":
            self._asked = number
        elif why == "promoted":
            self._ladder.leave(number, trial.rung)
        elif why == "final":
            self._waiting.remove(number)
        elif why == "retry":
            self._retries[number] = self._retries.get(number, 0) + 1
        self._open.add(number)
        self._trials[number] = trial

    def _assignment(self, trial: Trial) -> Assignment:
        return Assignment(
            number=trial.number,
            attempt=trial.attempt,
            genotype=trial.genotype,
            candidate=decode(self.space, trial.genotype),
            rungs=self._rungs(trial.number),
            cycles=self._cycles.get(trial.number, ()),
            peaks=self._peaks.get(trial.number, ()),
            final=trial.number in self._finals,
            start=trial.rung + 1,
            checkpoint=trial.outcome.files.get("checkpoint"),
            seed=trial_seed(self.plan.seed, trial.number),
            screen=self._screen() if self.plan.screen and trial.rung < 0 else {},
        )

    def _screen(self) -> dict[str, Screen]:
        """What a candidate must be predicted to be slower than to be left unmeasured, by the trials told so far."""
        ended = [trial for trial in self._trials.values() if trial.state.ended]
        budgets = {budget.profile: budget for goal in self.goals for budget in goal.budgets}
        return screens(ended, tuple(budgets.values()), self.facts.baseline)

    def _close(self, trial: Trial) -> None:
        self._write(self._end(trial))
        self.searcher.tell(self._ended(trial))

    def _ended(self, trial: Trial) -> Trial:
        """Take note of an end; the trial as it stands then."""
        self._open.discard(trial.number)
        before = self._stood.get(trial.number)
        if before is not None and trial.state is State.FAILED:
            self._fell.add(trial.number)
            note = f"going on from {before.outcome.fidelity:.2%} of the training failed: {trial.outcome.reason}"
            outcome = before.outcome.model_copy(update={"notes": (*before.outcome.notes, note)})
            trial = before.model_copy(update={"attempt": trial.attempt, "outcome": outcome})
        elif trial.state is State.STOPPED:
            self._ladder.wait(trial.number, trial.rung)
        self._trials[trial.number] = trial
        return trial

    def _end(self, trial: Trial) -> Event:
        return {
            "number": trial.number,
            "state": trial.state.value,
            "attempt": trial.attempt,
            "rung": trial.rung,
            "outcome": trial.outcome.model_dump(mode="json", exclude_defaults=True),
        }

    def _write(self, event: Event) -> None:
        event["at"] = round(self.elapsed, 3)
        self.journal.append(event)
        if self.on_event is not None:
            self.on_event(event)

    def _in_flight(self, number: int) -> Trial:
        if number not in self._open:
            raise ValueError(f"trial {number} is not in flight")
        return self._trials[number]

    # --- resume -------------------------------------------------------------------------------------------------------

    def _replay(self, make_searcher: Callable[[Header], Searcher]) -> None:
        told: list[Trial] = []
        same = True  # whether the searcher still asks as it did
        for line, event in enumerate(self.journal.events()[1:], start=2):
            try:
                trial, asked = self._step(event)
            except (KeyError, ValueError, TypeError, OverflowError, UserError) as error:
                what = str(error).splitlines()[0]
                raise UserError(
                    f"{self.journal.path}, line {line}: does not follow from the lines before it ({what}); "
                    f"cut the file before this line (`head -n {line - 1}`) to resume from there"
                ) from error
            if asked is not None and same:
                number, pending = asked
                proposal = self.searcher.ask(number, pending)
                same = (
                    proposal is not None and canonical(self.space, proposal.genotype) == self._trials[number].genotype
                )
                if not same:
                    self.notes.append(
                        f"trial {number}: {self.plan.searcher} would ask otherwise today than the journal says "
                        "(another version?); it has been told the trials alone and goes on from them"
                    )
                    self.searcher = make_searcher(header(self.journal))
                    for earlier in told:
                        self.searcher.tell(earlier)
            if trial is not None:
                told.append(trial)
                self.searcher.tell(trial)
        self._again = dict.fromkeys(self._open, "resumed")
        self._open.clear()
        self._started = self._clock()

    def _step(self, event: Event) -> tuple[Trial | None, tuple[int, tuple[Trial, ...]] | None]:
        """Follow one event: the trial to tell, if one ended, and (number, pending) if the searcher was asked."""
        number, state = int(event["number"]), str(event["state"])
        at = float(event["at"])
        if not 0.0 <= at < math.inf:
            raise ValueError("`at` is no time")
        self._before = max(self._before, at)
        if state == COST:
            self._spend(Cost.model_validate(event["cost"]))
            return None, None
        if number == 0 and state in (AWAY, BACK):
            return None, None
        if number == 0 and state == FINALS:
            self._begin_finals(event)
            return None, None
        if state == State.RUNNING:
            return None, self._step_running(event)
        outcome = Outcome.model_validate(event["outcome"])
        if number == 0:
            genotype: Genotype = tuple(event["genotype"])
            self._trials[0] = Trial(number=0, genotype=genotype, state=State(state), outcome=outcome)
            return self._trials[0], None
        if LATE in event:
            if number in self._open or not self._trials[number].state.ended:
                raise ValueError(f"trial {number} is completed before its end")
            trial = self._trials[number].model_copy(update={"state": State(state), "outcome": outcome})
            self._completed(trial)
            return trial, None
        trial = self._in_flight(number).model_copy(
            update={"state": State(state), "rung": int(event["rung"]), "outcome": outcome}
        )
        if not -1 <= trial.rung < len(self._rungs(number)):
            raise ValueError(f"there is no rung {trial.rung}")
        if trial.state in (State.RUNG, State.STOPPED):
            if trial.rung != self._trials[number].rung + 1:
                raise ValueError(f"rung {trial.rung} after rung {self._trials[number].rung}")
            if number not in self._finals:
                self._ladder.reach(number, trial.rung, outcome)
        if trial.state is State.RUNG:
            self._trials[number] = trial
            return None, None
        return self._ended(trial), None

    def _step_running(self, event: Event) -> tuple[int, tuple[Trial, ...]] | None:
        number, why = int(event["number"]), str(event["why"])
        genotype: Genotype = tuple(event["genotype"])
        check(self.space, genotype)
        if why == "new":
            if number != self._asked + 1:
                raise ValueError(f"trial {number} after trial {self._asked}")
            asked = (number, self.running)
            trial = Trial(number=number, genotype=genotype, state=State.RUNNING, note=event.get("note", {}))
            self._running(trial, why)
            return asked
        update = {"state": State.RUNNING, "attempt": int(event["attempt"])}
        trial = self._trials[number].model_copy(update=update)
        if trial.genotype != genotype:
            raise ValueError(f"trial {number} has two genotypes")
        self._running(trial, why)
        return None


def renewed(cost: Cost, spent: Mapping[str, float]) -> Cost:
    """A cost with some of its fields replaced. Raises UserError for what makes no sense."""
    try:
        return Cost.model_validate({**cost.model_dump(), **spent})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))} {first['input']!r}: {first['msg']}") from error


def _not_json(outcome: Outcome) -> str:
    """Why an outcome cannot be journalled: JSON has no NaN, and a number that is not finite is no finding."""

    def walk(value: object, path: str) -> str:
        if isinstance(value, float) and value - value != 0.0:
            return path
        if isinstance(value, dict):
            items: Any = value.items()  # pyright: ignore[reportUnknownVariableType]
            return next((found for key, inner in items if (found := walk(inner, f"{path}.{key}"))), "")
        return ""

    where = walk(outcome.model_dump(), "outcome")
    return f"{where} is not a finite number" if where else ""


def steps(
    evaluator: Evaluator, assignment: Assignment, keep: Callable[[bytes], str] | None = None
) -> Generator[tuple[State, Outcome]]:
    """What an evaluator yields, with its failures as data: exactly one end, and nothing after it.

    An exception becomes FAILED on top of the last outcome; the traceback of any but TrialFailure goes to `keep`
    (bytes -> sha256) as `files["log"]`. UserError passes through: it is not the candidate's fault.
    """
    last = Outcome()
    reason = "the evaluation ended without a result"
    found: Iterator[tuple[State, Outcome]] | None = None
    try:
        found = evaluator.evaluate(assignment)
        for state, outcome in found:
            yield state, outcome
            last = outcome
            if state.ended:
                return
    except UserError:
        raise
    except TrialFailure as failure:
        reason = str(failure)
    except Exception as error:  # noqa: BLE001  whatever a candidate does is data
        text = str(error).strip()
        reason = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
        log = traceback.format_exc()
        if keep is not None:
            last = last.model_copy(update={"files": {**last.files, "log": keep(log.encode())}})
        else:
            last = last.model_copy(update={"notes": (*last.notes, *log.splitlines())})
    finally:
        if isinstance(found, Generator):
            found.close()
    yield State.FAILED, last.model_copy(update={"reason": reason})


def run_serial(
    controller: Controller,
    evaluator: Evaluator,
    on_event: Callable[[Event], None] | None = None,
    *,
    keep: Callable[[bytes], str] | None = None,
) -> None:
    """Run the search in this process, one trial at a time. Ctrl-C stops it; a resume runs the trial in flight again."""
    controller.on_event = on_event
    try:
        while (assignment := controller.ask()) is not None:
            work = steps(evaluator, assignment, keep)
            try:
                for state, outcome in work:
                    if state.ended:
                        controller.tell(assignment.number, state, outcome)
                    elif not controller.rung(assignment.number, outcome) or controller.stopped:
                        break
            finally:
                work.close()
    except KeyboardInterrupt:
        controller.stop()
    finally:
        controller.on_event = None
        controller.journal.sync()
