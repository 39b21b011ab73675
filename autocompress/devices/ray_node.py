"""A node of a Ray cluster as a device: an actor there measures, files travel to it as bytes.

With `ray_tune.py` and `residents.py` the only file that imports ray: for a profile with `device: ray`, or a search.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Ray reads this once, when it is imported: nothing starts or joins a Ray but by `ray.init`.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
import ray
from numpy.typing import NDArray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from autocompress.devices import Kernels, Samples, Unreachable
from autocompress.devices.cores import plan_cores
from autocompress.devices.fingerprint import resolve_local
from autocompress.devices.local import WAIT_S, LocalDevice
from autocompress.types import Profile, Reach, TrialFailure, UserError

TOKEN = 0.001  # of the resource: it says where; that nothing overlaps is for the lock of the host
KEEP_BYTES = 1 << 30  # of models on the node


class _There:
    """The device's end, on the node that holds the resource: a local device there, with files that came as bytes."""

    def __init__(self, profile: str) -> None:
        self._profile = Profile.model_validate_json(profile).model_copy(update={"device": "local", "reach": Reach()})
        self._device: LocalDevice | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="autocompress-")  # for as long as this process lives

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def fingerprint(self) -> dict[str, Any]:
        return self._made().fingerprint()

    def lacks(self, places: Sequence[tuple[str, str]]) -> list[int]:
        return [at for at, place in enumerate(places) if not Path(self._folder.name, *place).is_file()]

    def put(self, key: str, files: dict[str, bytes], wanted: Collection[str]) -> None:
        """Take a model. The least lately used make room, but none that is `wanted` beside it."""
        root = Path(self._folder.name)
        taken = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in root.iterdir()}
        total = sum(taken.values()) + sum(map(len, files.values()))
        for folder in sorted(taken, key=lambda folder: folder.stat().st_mtime):
            if total > KEEP_BYTES and folder.name not in wanted:
                shutil.rmtree(folder)
                total -= taken[folder]
        try:
            (root / key).mkdir(exist_ok=True)
            for name, data in reversed(files.items()):  # the graph last: it says that all is there
                (root / key / name).write_bytes(data)
        except OSError as error:
            shutil.rmtree(root / key, ignore_errors=True)
            raise TrialFailure(f"{self._profile.name}: cannot write the file there ({error.strerror})") from error

    def time(self, places: Sequence[tuple[str, str]], rounds: int, seconds: float) -> tuple[Samples, list[str]]:
        device, paths = self._made(), self._paths(places)
        cores = plan_cores([self._profile]).station
        return device.time(paths, rounds=rounds, seconds=seconds, cores=cores), list(map(str, paths))

    def room(self) -> float | None:
        return self._made().room()

    def memory(self, places: Sequence[tuple[str, str]]) -> tuple[dict[str, float], list[str]]:
        device, paths = self._made(), self._paths(places)
        return device.memory(paths), list(map(str, paths))

    def kernels(self, place: tuple[str, str], wanted: Sequence[str], seconds: float) -> Kernels:
        cores = plan_cores([self._profile]).station
        (path,) = self._paths([place])
        return self._made().kernels(path, wanted, seconds=seconds, cores=cores)

    def answers(self, place: tuple[str, str], inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        (path,) = self._paths([place])
        return self._made().answers(path, inputs)

    def _paths(self, places: Sequence[tuple[str, str]]) -> list[Path]:
        """A file named twice gets a second spelling, since times are told apart by path."""
        paths: list[Path] = []
        for key, name in places:
            path = Path(self._folder.name, key, name)
            os.utime(path.parent)
            paths.append(path if path not in paths else path.parent / ".." / key / name)
        return paths

    def _made(self) -> LocalDevice:
        if self._device is None:
            self._device = LocalDevice(resolve_local(self._profile))
        return self._device


_ACTOR: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
_THERE: Any = ray.remote(**_ACTOR)(_There)


class RayDevice:
    """`device: ray`, `reach: {resource: "device:pi"}`: a node of the cluster that holds the resource measures.

    An actor there (no CPU, a little of the resource) runs the same timing process as a local device; files travel as
    bytes. It ends with this object. Outside a search the cluster is that of RAY_ADDRESS. Raises UserError without a
    resource or a cluster, Unreachable while no node holds the resource.
    """

    def __init__(self, profile: Profile, *, patience: float = 60.0) -> None:
        """`patience`: seconds that a call may take beyond its timing, and an actor to start."""
        self.profile, self.patience = profile, patience
        self.resource = profile.reach.resource
        if not self.resource:
            raise UserError(f'profile {profile.name!r}: `device: ray` needs `reach: {{resource: "device:NAME"}}`')
        if not ray.is_initialized():
            _join(profile.name)
        self._actor: Any = None
        self._node = ""
        self._keys: dict[tuple[str, int, int], str] = {}  # path, time of change, size -> sha256

    def fingerprint(self) -> dict[str, Any]:
        """Of the node: processor, kernel, runtime, as a local device there has it."""
        return self._ask("fingerprint")

    def time(self, models: Sequence[Path], *, rounds: int, seconds: float, cores: Sequence[int] = ()) -> Samples:  # noqa: ARG002
        """See `Device.time`; cores are chosen there."""
        limit = seconds + 2 * self.patience + WAIT_S
        samples, names = self._ask("time", self._sent(models), rounds, seconds, limit=limit)
        here = dict(zip(names, map(str, models), strict=True))
        renamed: dict[str, Any] = {
            field: {here[name]: value for name, value in getattr(samples, field).items()}
            for field in ("times_ms", "load_ms", "memory_mb", "energy_mj")
        }
        return samples.model_copy(update=renamed)

    def memory(self, models: Sequence[Path]) -> dict[str, float]:
        """See `TellsMemory.memory`."""
        found, names = self._ask("memory", self._sent(models), limit=2 * self.patience + WAIT_S)
        here = dict(zip(names, map(str, models), strict=True))
        return {here[name]: value for name, value in found.items()}

    def room(self) -> float | None:
        """See `TellsRoom.room`."""
        return self._ask("room")

    def kernels(self, model: Path, wanted: Sequence[str], *, seconds: float, cores: Sequence[int] = ()) -> Kernels:  # noqa: ARG002
        """See `TellsKernels.kernels`; cores are chosen there."""
        (place,) = self._sent([model])
        return self._ask("kernels", place, list(wanted), seconds, limit=seconds + 2 * self.patience + WAIT_S)

    def answers(self, model: Path, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """See `TellsAnswers.answers`."""
        (place,) = self._sent([model])
        return self._ask("answers", place, list(inputs), limit=2 * self.patience + WAIT_S)

    def _sent(self, models: Sequence[Path]) -> list[tuple[str, str]]:
        """Where the files lie there; those that it lacks are sent."""
        places = [(self._key(model), model.name) for model in models]
        for at in self._ask("lacks", places):
            files = {path.name: path.read_bytes() for path in _parts(models[at])}
            self._ask("put", places[at][0], files, {key for key, _ in places}, limit=2 * self.patience)
        return places

    def close(self) -> None:
        """End the actor; the device may be used again."""
        actor, self._actor = self._actor, None
        if actor is not None and ray.is_initialized():
            with suppress(RayError, ValueError):
                ray.kill(actor)

    def _key(self, model: Path) -> str:
        parts = _parts(model)
        facts = [path.stat() for path in parts]
        known = (str(model), max(fact.st_mtime_ns for fact in facts), sum(fact.st_size for fact in facts))
        if known not in self._keys:
            found = hashlib.sha256(model.name.encode())
            for path in parts:
                found.update(path.read_bytes())
            self._keys[known] = found.hexdigest()
        return self._keys[known]

    def _ask(self, method: str, *args: Any, limit: float | None = None) -> Any:
        """Call the actor. Raises what it raises, and Unreachable when it or its node is gone."""
        limit = limit or self.patience
        actor = self._start()
        try:
            answer = getattr(actor, method).remote(*args)
            until = time.monotonic() + limit
            while True:
                with suppress(GetTimeoutError):
                    return ray.get(answer, timeout=min(limit, 5.0))
                if not self._alive():
                    raise self._gone("its node has left the cluster")
                if time.monotonic() > until:
                    self.close()
                    raise TrialFailure(f"{self.profile.name}: no answer within {limit:.0f} s; its process was ended")
        except RayTaskError as error:
            raise error.cause from error
        except (RayError, ValueError) as error:  # ValueError: a handle of a cluster that we have left
            if isinstance(error, ActorDiedError) and self._alive(settle=5.0):
                self.close()
                raise TrialFailure(f"{self.profile.name}: the process there ended ({first_line(error)})") from error
            lost = isinstance(error, ActorDiedError | ActorUnavailableError)
            raise self._gone("the node is gone" if lost else first_line(error)) from error

    def _start(self) -> Any:
        if self._actor is not None:
            return self._actor
        if not ray.is_initialized():
            raise self._gone("not connected to the cluster")
        if not any(node["Alive"] and node["Resources"].get(self.resource, 0) > 0 for node in ray.nodes()):
            raise self._gone(f"no node of the Ray cluster holds {self.resource}")
        actor = _THERE.options(resources={self.resource: TOKEN}).remote(self.profile.model_dump_json())
        try:
            self._node = ray.get(actor.node.remote(), timeout=self.patience)
        except RayError as error:
            with suppress(RayError):
                ray.kill(actor)
            why = f"nothing started there within {self.patience:.0f} s"
            raise self._gone(why if isinstance(error, GetTimeoutError) else first_line(error)) from error
        self._actor = actor
        return actor

    def _alive(self, settle: float = 0.0) -> bool:
        """Whether the node is there; a death is known to all after some seconds (`settle`)."""
        until = time.monotonic() + settle
        while any(node["NodeID"] == self._node and node["Alive"] for node in ray.nodes()):
            if time.monotonic() >= until:
                return True
            time.sleep(0.25)
        return False

    def _gone(self, why: str) -> Unreachable:
        self.close()
        return Unreachable(f"{self.profile.name} cannot be reached: {why}")


def _parts(model: Path) -> list[Path]:
    """A model's file, and the one beside it with large weights."""
    beside = model.with_name(f"{model.name}.data")
    return [model, beside] if beside.is_file() else [model]


def _join(name: str) -> None:
    """Outside a search: the cluster of RAY_ADDRESS."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise UserError(
            f"profile {name!r} is reached through Ray: name the cluster that holds it in the environment, "
            "RAY_ADDRESS=HOST:PORT"
        )
    reach(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, configure_logging=True)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"no Ray cluster can be used at {address}: {first_line(error)}") from error


def reach(address: str) -> None:
    """Raise UserError, within seconds, where nothing answers at HOST:PORT; Ray itself tries for minutes."""
    try:
        socket.create_connection(host_and_port(address), timeout=5.0).close()
    except (OSError, UnicodeError) as error:  # the latter for a host name that can be none
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"no Ray cluster can be used at {address}: {why}; see `ray status` there") from error


def host_and_port(address: str) -> tuple[str, int]:
    """Of `HOST:PORT`; raises UserError for an address that is none."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16) or "://" in address:
        raise UserError(f"address {address!r}: give HOST:PORT of a running Ray cluster, e.g. 10.0.0.1:6379")
    return host.strip("[]"), int(port)


def first_line(error: BaseException) -> str:
    """What Ray said, in one line."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
