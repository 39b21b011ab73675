"""Devices that are away: the user is told once, and what they missed is measured when they are back (floor F5)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from autocompress.controller import Controller
from autocompress.devices import Unreachable
from autocompress.evaluator import LATER, Files, firm, missed
from autocompress.export import graph_hash
from autocompress.types import Budget, Reading, State, Trial, TrialFailure, UserError

LOOK_S = 1.0  # between looks at a device
PUZZLED = 60  # looks in a row that fail by what is neither the device's nor the file's fault


class Station(Protocol):
    """Measures, and knows which devices do not answer. Threads may call it."""

    def measure(self, profile_name: str, model: bytes, key: str, *, again: bool = True) -> Reading:
        """See `station.Station.measure`."""
        ...

    def away(self) -> Mapping[str, str]:
        """Profiles whose device does not answer, and why."""
        ...


@dataclass(frozen=True)
class Missed:
    """One file that a device has not measured."""

    number: int
    attempt: int
    sha: str
    full: bool  # the trial is fully trained, so that the reading must be firm


class Later(AbstractContextManager["Later"]):
    """A thread per device beside the search, in the controller's process. Readings are posted to the controller.

    How often a device is tried is the station's affair: until it is time, it refuses at once.
    """

    def __init__(
        self,
        controller: Controller,
        station: Station,
        files: Files,
        budgets: Sequence[Budget],
        say: Callable[[str], None],
    ) -> None:
        """`say` is told a line when a device goes and when it is back, from a thread of ours."""
        self.controller, self.station, self.files = controller, station, files
        self._budgets, self._say = tuple(budgets), say
        self._missed: dict[str, dict[int, Missed]] = {budget.profile: {} for budget in budgets}  # by number
        self._away: set[str] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(name,), daemon=True) for name in self._missed]
        for trial in controller.trials:
            self.hear(trial)

    def __enter__(self) -> Later:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=60.0)
        self.controller.settle()

    def hear(self, trial: Trial) -> None:
        """A trial as it stands now."""
        wanted = missed(trial.outcome) if trial.state in (State.DONE, State.STOPPED) else {}
        with self._lock:
            for profile, those in self._missed.items():
                those.pop(trial.number, None)
                if profile in wanted:
                    those[trial.number] = Missed(
                        trial.number, trial.attempt, wanted[profile], trial.state is State.DONE
                    )

    @property
    def waiting(self) -> dict[str, int]:
        """How many files wait for each device that has any."""
        with self._lock:
            return {profile: len(those) for profile, those in self._missed.items() if those}

    def finish(self, patience: float, stage: Callable[[str], None]) -> None:
        """After the last trial: wait until nothing is missing, or its devices were away for `patience` seconds."""
        until, told = time.monotonic() + patience, ""
        while (now := self.waiting) and time.monotonic() < until and not self.controller.stopped:
            if not now.keys() <= self._away:
                until = time.monotonic() + patience
            words = f"waiting for {', '.join(f'{name} ({count} to measure)' for name, count in now.items())}"
            if words != told:
                stage(words)
                told = words
            self._over.wait(0.2)
            self.controller.settle()
        self.controller.settle()
        for name, count in self.waiting.items():
            self._say(f"{name} stayed away: {count} trials lack its reading; a resume measures them when it is back")

    def _watch(self, profile: str) -> None:
        told, puzzled = False, 0
        while not self._over.wait(LOOK_S):
            try:
                told = self._tell(profile, told)
                while not self._over.is_set() and (next_ := self._next(profile)) is not None:
                    self._measure(profile, next_)
                    told = self._tell(profile, told)
                puzzled = 0
            except Unreachable:
                self._away.add(profile)
                continue
            except UserError as error:
                self._give_up(profile, str(error))
                return
            except Exception as error:  # noqa: BLE001  Ray is being started again, say: the next look will tell
                puzzled += 1
                if puzzled == PUZZLED:
                    self._give_up(profile, f"{type(error).__name__}: {error}")
                    return

    def _give_up(self, profile: str, why: str) -> None:
        self._say(f"{profile}: what it missed is not measured in this run: {why}")
        with self._lock:
            self._missed[profile].clear()

    def _tell(self, profile: str, told: bool) -> bool:
        why = self.station.away().get(profile, "")
        (self._away.add if why else self._away.discard)(profile)
        if bool(why) != told:
            count = self.waiting.get(profile, 0)
            rest = f"; {count} files wait for it" if count else ""
            self._say(f"{profile} is away, its queue pauses: {why}" if why else f"{profile} is back{rest}")
            self.controller.post(lambda controller: controller.device(profile, why))
        return bool(why)

    def _next(self, profile: str) -> Missed | None:
        with self._lock:
            return next(iter(self._missed[profile].values()), None)

    def _measure(self, profile: str, one: Missed) -> None:
        model, reason = self.files.get(one.sha), ""
        readings: dict[str, Reading] = {}
        key = graph_hash(model, weights=False)
        try:
            if one.full:
                readings[profile] = firm(self.station.measure, profile, model, key, self._budgets)
            else:
                readings[profile] = self.station.measure(profile, model, key, again=False)
        except Unreachable:
            raise
        except TrialFailure as failure:
            reason = str(failure)
        late = partial(
            Controller.late,
            number=one.number,
            attempt=one.attempt,
            role=f"{LATER}{profile}",
            readings=readings,
            reason=reason,
        )
        self.controller.post(late)
        with self._lock:
            if self._missed[profile].get(one.number) == one:
                del self._missed[profile][one.number]
