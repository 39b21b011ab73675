"""A device that can be cut off: a real timing process with a temporary folder of its own, as if on another host.

`reach.ssh` is the board's name and `reach.identity` its folder. While a file `cut` lies there nothing is reached and
what was running has been killed. `spans` gets a line per answer: when it began and ended, and who asked.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autocompress.devices import Samples, Unreachable
from autocompress.devices.fingerprint import host
from autocompress.devices.local import BENCH, Child, refusal, setup
from autocompress.types import Profile, TrialFailure


class Board:
    """`device: tests.board:Board`."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.folder = profile, Path(profile.reach.identity)
        self._child: Child | None = None

    def fingerprint(self) -> dict[str, Any]:
        """The host's, with what the test writes on the board."""
        child = self._reached()
        name = self.folder / "name"
        board = name.read_text() if name.exists() else "first"
        return {**host(), "onnxruntime": child.hello["onnxruntime"], "board": board}

    def time(self, models: Sequence[Path], *, rounds: int, seconds: float, cores: Sequence[int] = ()) -> Samples:
        """Kills its process as soon as it is cut off."""
        child, over = self._reached(), threading.Event()

        def cut() -> None:
            while not over.wait(0.01):
                if (self.folder / "cut").exists():
                    os.kill(child.pid, 9)
                    return

        watch = threading.Thread(target=cut, daemon=True)
        watch.start()
        began = time.monotonic()
        try:
            answer = child.ask(
                {"models": list(map(str, models)), "rounds": rounds, "seconds": seconds, "cores": []}, 60
            )
        except TrialFailure as failure:
            self.close()
            raise Unreachable(f"{self.profile.name} cannot be reached: {failure}") from failure
        finally:
            over.set()
            watch.join()
            with (self.folder / "spans").open("a") as log:
                log.write(f"{began} {time.monotonic()} {os.getpid()}\n")
        if "error" in answer:
            raise refusal(answer, Path(answer["model"]).name)
        return Samples.model_validate(answer)

    def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _reached(self) -> Child:
        if (self.folder / "cut").exists():
            self.close()
            raise Unreachable(f"{self.profile.name} cannot be reached: the cable is out")
        if self._child is None:
            bench = self.folder / "bench.py"  # the lock of a host lies in its folder for temporary files
            bench.write_text(BENCH.read_text().replace('"/tmp"', repr(str(self.folder))))
            self._child = Child([sys.executable, "-I", str(bench)], setup(self.profile), 60)
        return self._child


def spans(folder: Path) -> list[tuple[float, float, int]]:
    """What the boards' logs say: begin, end, process."""
    rows = [line.split() for line in (folder / "spans").read_text().splitlines()]
    return [(float(began), float(ended), int(pid)) for began, ended, pid in rows]


def board(folder: Path, name: str, **changes: Any) -> Profile:
    """A board's profile, its file beside it."""
    place = folder / name
    place.mkdir(exist_ok=True)
    made = Profile(name=name, device="tests.board:Board", reach={"ssh": name, "identity": str(place)}, **changes)  # pyright: ignore[reportArgumentType]
    (folder / f"{name}.yaml").write_text(made.model_dump_json(exclude_defaults=True))
    return made
