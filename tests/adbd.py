"""The device end of adb, scripted: what a phone's adbd says on its TCP port, for the real adb client.

Packets and the order of things: Android's packages/modules/adb, protocol.txt; inside a shell stream: shell_protocol.h.
Commands run in a folder of this host.
"""

from __future__ import annotations

import queue
import socket
import struct
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

CNXN, OPEN, OKAY, WRTE, CLSE = (
    int.from_bytes(name, "little") for name in (b"CNXN", b"OPEN", b"OKAY", b"WRTE", b"CLSE")
)
VERSION, MOST = 0x01000001, 256 * 1024
BANNER = b"device::ro.product.name=test;ro.product.model=Test;ro.product.device=test;features="
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)


class Adbd:
    """Listens from `start` on; `cut` ends every connection, `stop` also the listening."""

    def __init__(self, folder: Path, features: str = "shell_v2,cmd") -> None:
        self.folder, self.features = folder, features.encode()
        folder.mkdir(parents=True, exist_ok=True)
        self._listener: socket.socket | None = None
        self._links: list[_Link] = []
        self.port = 0

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                link = _Link(listener.accept()[0], self)
                self._links.append(link)
                threading.Thread(target=link.serve, daemon=True).start()

    def processes(self) -> list[subprocess.Popen[bytes]]:
        return [one.process for link in self._links for one in link.streams.values() if one.process.poll() is None]

    def cut(self) -> None:
        links, self._links = self._links, []
        for link in links:
            link.end()

    def stop(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.cut()


class _Link:
    """One connection of an adb server."""

    def __init__(self, connection: socket.socket, adbd: Adbd) -> None:
        self.connection, self.adbd = connection, adbd
        self.lock = threading.Lock()
        self.streams: dict[int, _Shell] = {}  # by our number
        self.made = 0

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        head = struct.pack("<6I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF)
        with self.lock, suppress(OSError):
            self.connection.sendall(head + data)

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.connection.recv(size - len(data))
            if not piece:
                raise ConnectionResetError
            data += piece
        return data

    def serve(self) -> None:
        try:
            while True:
                command, first, second, size, *_ = struct.unpack("<6I", self.receive(24))
                data = self.receive(size)
                if command == CNXN:
                    self.send(CNXN, VERSION, MOST, BANNER + self.adbd.features)
                elif command == OPEN:
                    self.open(first, data.rstrip(b"\0").decode())
                elif second in self.streams:
                    self.streams[second].take(command, data)
        except OSError:
            self.end()

    def open(self, theirs: int, service: str) -> None:
        kind, _, line = service.partition(":")
        if not {"shell", "v2", "raw"} <= set(kind.split(",")):  # TERM may stand among them
            self.send(CLSE, 0, theirs)
            return
        self.made += 1
        self.send(OKAY, self.made, theirs)
        self.streams[self.made] = _Shell(self, self.made, theirs, line)

    def end(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        for stream in list(self.streams.values()):
            stream.close()


class _Shell:
    """One command, its three streams and its end, in packets of the shell protocol."""

    def __init__(self, link: _Link, ours: int, theirs: int, line: str) -> None:
        self.link, self.ours, self.theirs = link, ours, theirs
        self.acknowledged, self.rest = threading.Semaphore(1), b""
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            ["sh", "-c", line], cwd=link.adbd.folder, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        threading.Thread(target=self.feed, daemon=True).start()
        threading.Thread(target=self.tell, daemon=True).start()

    def take(self, command: int, data: bytes) -> None:
        if command == OKAY:
            self.acknowledged.release()
        elif command == CLSE:
            self.close()
        elif command == WRTE:
            self.lines.put(data)

    def feed(self) -> None:
        """What comes goes to stdin, and is acknowledged when the command has taken it."""
        assert self.process.stdin
        while (data := self.lines.get()) is not None:
            self.rest += data
            while len(self.rest) >= 5 and len(self.rest) >= 5 + (size := int.from_bytes(self.rest[1:5], "little")):
                kind, body, self.rest = self.rest[0], self.rest[5 : 5 + size], self.rest[5 + size :]
                with suppress(OSError, ValueError):
                    if kind == STDIN:
                        self.process.stdin.write(body)
                        self.process.stdin.flush()
                    elif kind == CLOSE_STDIN:
                        self.process.stdin.close()
            self.link.send(OKAY, self.ours, self.theirs)
        with suppress(OSError, ValueError):
            self.process.stdin.close()

    def tell(self) -> None:
        assert self.process.stdout
        assert self.process.stderr
        both = [(STDOUT, self.process.stdout), (STDERR, self.process.stderr)]
        threads = [threading.Thread(target=self.pump, args=one, daemon=True) for one in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        code = self.process.wait()
        for _, stream in both:
            stream.close()
        self.packet(EXIT, bytes([code if code >= 0 else 128 - code]))
        self.link.send(CLSE, self.ours, self.theirs)
        self.lines.put(None)

    def pump(self, kind: int, stream: object) -> None:
        with suppress(OSError, ValueError):
            while data := stream.read1(60_000):  # type: ignore[attr-defined]
                self.packet(kind, data)

    def packet(self, kind: int, body: bytes) -> None:
        if self.acknowledged.acquire(timeout=30):
            self.link.send(WRTE, self.ours, self.theirs, bytes([kind]) + len(body).to_bytes(4, "little") + body)

    def close(self) -> None:
        """The other side is gone: stdin ends, as on a phone."""
        self.lines.put(None)
        self.acknowledged.release()
