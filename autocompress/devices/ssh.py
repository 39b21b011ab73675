"""A target over ssh, by the system's OpenSSH client: its configuration, keys and known hosts hold.

One connection is kept as long as the device is used and shared by all commands (ControlMaster), so that a small file is
copied in tens of milliseconds. Nothing is ever asked for or accepted by itself: no password, no passphrase, no unknown
host key. `AUTOCOMPRESS_SSH_CONFIG` names a configuration file to use in place of the user's (`ssh -F`).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from autocompress.devices import Unreachable
from autocompress.devices.transport import RemoteDevice
from autocompress.types import Profile, Reach, UserError

CONNECT_S = 10
ALIVE_S, ALIVE_TIMES = 5, 2  # a connection that is cut without a word is noticed after at most (2 + 1) * 5 seconds
LOGIN_S = 45.0  # connecting, keys and the login shell together
READY = "autocompress-ready"
CONFIG = "AUTOCOMPRESS_SSH_CONFIG"
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": str(CONNECT_S),
    "ConnectionAttempts": "1",
    "ServerAliveInterval": str(ALIVE_S),
    "ServerAliveCountMax": str(ALIVE_TIMES),
    "TCPKeepAlive": "yes",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "ControlPersist": "no",
    "LogLevel": "INFO",  # what it says is how we know what happened
}


class SshDevice(RemoteDevice):
    """The device of profiles with `device: ssh`. Raises UserError without a host in `reach.ssh`, or without ssh."""

    def __init__(self, profile: Profile, *, patience: float = 120.0) -> None:
        super().__init__(profile, Ssh(profile.name, profile.reach), patience=patience)


class Ssh:
    """One shared connection; see `transport.Transport`."""

    def __init__(self, profile: str, reach: Reach) -> None:
        if not reach.ssh or reach.ssh.startswith("-") or reach.ssh.split() != [reach.ssh]:
            raise UserError(f"profile {profile!r}: reach.ssh must be user@host or a host of your ssh configuration")
        client = shutil.which("ssh")
        if client is None:
            raise UserError(f"profile {profile!r} is reached by ssh, which is not installed here: install OpenSSH")
        self.name = reach.ssh
        self._base = [client, "-T", "-x", "-a"]
        if config := os.environ.get(CONFIG):
            self._base += ["-F", config]
        for name, value in OPTIONS.items():
            self._base += ["-o", f"{name}={value}"]
        if reach.port is not None:
            self._base += ["-p", str(reach.port)]
        if reach.identity:
            key = Path(reach.identity).expanduser()
            if not key.is_file():
                raise UserError(f"profile {profile!r}: reach.identity: no file {key}")
            self._base += ["-i", str(key), "-o", "IdentitiesOnly=yes"]
        self._login = f"-p {reach.port} {self.name}" if reach.port is not None else self.name
        self._master: _Master | None = None

    def command(self, argv: Sequence[str]) -> list[str]:
        """See `Transport.command`."""
        if self._master is None or not self._master.alive:
            self.close()
            self._connect()
        assert self._master is not None
        return [*self._base, "-S", self._master.socket, "-o", "ControlMaster=no", "--", self.name, _line(argv)]

    def explain(self, code: int, words: str) -> Exception | None:
        """See `Transport.explain`. ssh itself ends with 255, and then so does the shared connection, or soon."""
        if code != 255 and code >= 0:
            return None
        master = self._master
        if master is not None and master.ends_within(3.0):
            self.close()
            return self._diagnosis(f"{words}\n{master.words()}", "the connection was cut")
        return self._diagnosis(words, "the connection was cut") if code == 255 else None

    def close(self) -> None:
        """See `Transport.close`."""
        master, self._master = self._master, None
        if master is not None:
            master.end()

    def _connect(self) -> None:
        """Log in, and hold the connection by a command that ends with this process."""
        folder = tempfile.mkdtemp(prefix="acp-", dir="/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else None)
        socket = f"{folder}/s"  # a socket's path may have about a hundred characters
        stay = f"sh -c {shlex.quote(f'echo {READY}; exec cat >/dev/null')}"
        master = _Master([*self._base, "-M", "-S", socket, "--", self.name, stay], folder, socket)
        if master.ready(LOGIN_S):
            self._master = master
            return
        ended = not master.alive
        master.end()
        raise self._diagnosis(master.words(), "the login ended early" if ended else f"no login within {LOGIN_S:.0f} s")

    def _diagnosis(self, words: str, otherwise: str) -> Exception:
        """What ssh's words mean, and what to type."""
        name = self.name
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in words:
            known, place = self._known_as(), re.search(r"Offending .* key in (.*):(\d+)", words)
            file = f" -f {shlex.quote(place[1])}" if place else ""
            where = f" ({place[1]}, line {place[2]})" if place else ""
            return UserError(
                f"{name}: its host key is not the known one{where}: somebody is in between, or it was installed anew: "
                f"then ssh-keygen{file} -R {shlex.quote(known)}, and {self._scan()}"
            )
        if re.search(r"No .*host key is known for", words) or "Host key verification failed" in words:
            return UserError(
                f"{name}: its host key is not known here; log in once by `ssh {self._login}` and compare it, or "
                f"type: {self._scan()}"
            )
        if found := re.search(r"Permission denied \((.*?)\)", words):
            lacking = re.search(r"Identity file (.*) not accessible", words)
            extra = f"; {lacking[0].lower()}" if lacking else ""
            return UserError(
                f"{name}: permission denied ({found[1]}): none of your keys is accepted there{extra}; type: "
                f"ssh-copy-id {self._login} (a key with a passphrase belongs into ssh-agent)"
            )
        if "Too many authentication failures" in words:
            return UserError(f"{name}: too many authentication failures; name the key in the profile's reach.identity")
        if found := re.search(r"(Can't open user config file .*|.*Bad configuration option.*|Bad owner or .*)", words):
            return UserError(f"{name}: ssh: {found[1].strip()}")
        lines = [line.strip() for line in words.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if not _NOISE.search(line)), otherwise)
        return Unreachable(f"{name} cannot be reached: {said.removeprefix('ssh: ')[:300]}")

    def _settings(self) -> dict[str, str]:
        """What ssh makes of the name."""
        told = subprocess.run([*self._base, "-G", "--", self.name], capture_output=True, text=True, check=False).stdout
        return dict(line.split(" ", 1) for line in told.splitlines() if " " in line)

    def _known_as(self) -> str:
        settings = self._settings()
        host, port = settings.get("hostkeyalias") or settings.get("hostname", self.name), settings.get("port", "22")
        return host if port == "22" else f"[{host}]:{port}"

    def _scan(self) -> str:
        settings = self._settings()
        port = "" if settings.get("port", "22") == "22" else f"-p {settings['port']} "
        return f"ssh-keyscan {port}{settings.get('hostname', self.name)} >> ~/.ssh/known_hosts"


_NOISE = re.compile(r"^(mux_client|Shared connection|Warning: Permanently|Control socket|\*\*|@@)|post-quantum")


class _Master:
    """The process that holds the connection. It ends when its stdin does, so also when we are killed."""

    def __init__(self, command: Sequence[str], folder: str, socket: str) -> None:
        self.socket = socket
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
        )
        self._words = ""
        self._bury = weakref.finalize(self, _bury, self._process, self._log, folder)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ready(self, limit: float) -> bool:
        """Whether the login came about in time; what a login shell prints is passed over."""
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        until, seen = time.monotonic() + limit, b""
        while time.monotonic() < until:
            piece = self._process.stdout.read(1 << 16)
            if piece == b"":
                self.ends_within(5.0)
                return False
            seen += piece or b""
            if READY.encode() in seen:
                return True
            time.sleep(0.005)
        return False

    def ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def words(self) -> str:
        """What ssh has said."""
        if not self._log.closed:
            self._log.seek(0)
            self._words = self._log.read().decode(errors="replace")
        return self._words

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.words()
        self._bury()


def _bury(process: subprocess.Popen[bytes], log: IO[bytes], folder: str) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    log.close()
    shutil.rmtree(folder, ignore_errors=True)


def _line(argv: Sequence[str]) -> str:
    """For the login shell there, whichever it is; `sh` stays, so that the signal that ends a command is told."""
    return f"sh -c {shlex.quote(shlex.join(argv) + '; exit $?')}"
