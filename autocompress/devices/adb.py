"""A phone over adb, by the system's adb client: a Python on it runs the same timing script as everywhere else.

Not yet tried on a phone: the tests drive the real client against a scripted device end. Needs Android 7 or later (the
shell protocol that tells exit codes). Commands begin in /data/local/tmp, which is adb's own folder there.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from autocompress.devices import Unreachable
from autocompress.devices.transport import RemoteDevice
from autocompress.types import Profile, Reach, UserError

HOME = "/data/local/tmp"
ANSWER_S = 30.0
_AWAY = re.compile(
    r"(device .*not found|device offline|no devices|device still connecting|closed|protocol fault|cannot.*)"
)
_NOISE = re.compile(r"^\* daemon ")


class AdbDevice(RemoteDevice):
    """The device of profiles with `device: adb`. Raises UserError without a serial in `reach.adb`, or without adb."""

    def __init__(self, profile: Profile, *, patience: float = 120.0) -> None:
        super().__init__(profile, Adb(profile.name, profile.reach), patience=patience)


class Adb:
    """Commands on one phone; see `transport.Transport`. The adb server keeps the connection."""

    def __init__(self, profile: str, reach: Reach) -> None:
        if not reach.adb or reach.adb.startswith("-") or reach.adb.split() != [reach.adb]:
            raise UserError(f"profile {profile!r}: reach.adb must be a serial number, as `adb devices` lists them")
        client = shutil.which("adb")
        if client is None:
            raise UserError(f"profile {profile!r} is reached by adb, which is not installed here: apt-get install adb")
        self.name = reach.adb
        self._client = client
        self._connected = False

    def command(self, argv: Sequence[str]) -> list[str]:
        """See `Transport.command`."""
        if not self._connected:
            self._connect()
        # `sh` stays, so that a signal that ends the command is told as 128 + n.
        script = f"cd {HOME} 2>/dev/null; {shlex.join(argv)}; exit $?"
        return [self._client, "-s", self.name, "shell", "-T", f"sh -c {shlex.quote(script)}"]

    def explain(self, code: int, words: str) -> Exception | None:
        """See `Transport.explain`. The client ends with 0 or 255 when a connection goes, with 1 when there is none.

        Nothing of ours ends with 0 before it has answered.
        """
        said = next((line for line in words.splitlines() if re.match(r"(adb|error): ", line)), "")
        if code < 0 or (code not in (0, 255) and not said):
            return None
        self._connected = False
        return self._diagnosis(said or words)

    def close(self) -> None:
        """See `Transport.close`; the adb server and its connections are the user's."""
        self._connected = False

    def _connect(self) -> None:
        """See that the phone is there; one with an address (host:port) is connected to."""
        code, words = self._ask("-s", self.name, "get-state")
        if code and ":" in self.name:
            self._ask("disconnect", self.name)  # an old connection would count as one
            _, told = self._ask("connect", self.name)
            code, words = self._ask("-s", self.name, "get-state")
            words = told if code else words
        if code or words.strip() != "device":
            raise self._diagnosis(words)
        _, features = self._ask("-s", self.name, "features")
        if "shell_v2" not in features.split():
            raise UserError(f"{self.name}: its adb cannot tell exit codes; Android 7 or later is needed")
        self._connected = True

    def _ask(self, *arguments: str) -> tuple[int, str]:
        try:
            done = subprocess.run(
                [self._client, *arguments], capture_output=True, text=True, check=False, timeout=ANSWER_S
            )
        except subprocess.TimeoutExpired:
            return 1, f"adb {arguments[-1]} has not answered within {ANSWER_S:.0f} s"
        lines = (done.stdout + done.stderr).splitlines()
        return done.returncode, "\n".join(line for line in lines if not _NOISE.match(line))

    def _diagnosis(self, words: str) -> Exception:
        """What adb's words mean, and what to do."""
        if "unauthorized" in words or "authenticate" in words:
            return UserError(f"{self.name}: not authorized: unlock the phone and allow USB debugging for this computer")
        if "no permissions" in words:
            return UserError(f"{self.name}: {words.strip().splitlines()[0]}")
        lines = [line.strip() for line in words.splitlines() if line.strip()]
        said = next((line for line in lines if _AWAY.search(line)), lines[0] if lines else "the connection was cut")
        return Unreachable(f"{self.name} cannot be reached: {re.sub(r'^(adb|error): ', '', said)[:300]}")
