"""A real OpenSSH server for tests: own port, own host and user keys, loopback, run as whoever runs the tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile {folder}/pid
AuthorizedKeysFile {folder}/authorized_keys
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintMotd no
SetEnv HOME={home} AUTOCOMPRESS_THERE=1
ForceCommand cd {home} && {limits}sh -c "$SSH_ORIGINAL_COMMAND"
"""
CLIENT = """
Host pi
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  ControlMaster auto
"""


def required() -> None:
    """Without a server these tests fail, unless it is asked by name to leave them out."""
    if "ssh" in os.environ.get("AUTOCOMPRESS_SKIP", "").split(","):
        pytest.skip("AUTOCOMPRESS_SKIP asks for it")
    if server() is None or shutil.which("ssh") is None:
        pytest.fail("no OpenSSH server and client: apt-get install openssh-server, or AUTOCOMPRESS_SKIP=ssh")


def server() -> str | None:
    """sshd wants to be called by its whole path, which is seldom in PATH."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Sshd:
    """One server; `config` is for the client's `-F`, where it is called `pi`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.limits = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.new_key("host_key")
        self.new_key("user_key")
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        self.know()
        self.config = folder / "config"
        self.config.write_text(CLIENT.format(port=self.port, folder=folder))
        python = self.home / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)

    def new_key(self, name: str) -> None:
        for old in (self.folder / name, self.folder / f"{name}.pub"):
            old.unlink(missing_ok=True)
        keygen = shutil.which("ssh-keygen")
        assert keygen
        command = [keygen, "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(self.folder / name)]
        subprocess.run(command, check=True)

    def know(self) -> None:
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}")

    def start(self) -> None:
        settings = CONFIG.format(port=self.port, folder=self.folder, home=self.home, limits=self.limits)
        (self.folder / "sshd_config").write_text(settings)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd drops its privileges; a service would make it
        path = server()
        assert path
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen([path, "-D", "-e", "-f", str(self.folder / "sshd_config")], stderr=log)
        log.close()
        until = time.monotonic() + 10
        while True:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)

    def sessions(self) -> list[psutil.Process]:
        """What serves the connections that are open."""
        assert self.process
        return psutil.Process(self.process.pid).children(recursive=True)

    def cut(self) -> None:
        """Kill what serves the connections, and nothing else."""
        for one in self.sessions():
            with suppress(psutil.NoSuchProcess):
                if one.name().startswith("sshd"):
                    one.kill()

    def freeze(self) -> None:
        """As if the cable were pulled: the connections stay, nothing answers."""
        for one in self.sessions():
            if one.name().startswith("sshd"):
                one.suspend()

    def stop(self) -> None:
        """End the server and every connection."""
        if self.process is not None:
            family = self.sessions()
            self.process.kill()
            self.process.wait()
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            self.process = None
