"""Objects that live in one process of a Ray cluster and are called from anywhere in it (floor F5).

Files travel as bytes to the store on the driver's node and back, files to be measured to a station: nothing needs a
shared file system. Each object is an actor that holds no CPU, for a trial that waits inside a placement group would
otherwise wait for ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

# Ray reads this once, when it is imported: nothing but `ray_tune.Session` may start or join a Ray.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from autocompress.devices.ray_node import first_line
from autocompress.types import Reading, TrialFailure


class _Resident:
    """One object in one process; its calls run one after another. `age` answers beside them."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made, self._since = make, None, 0.0

    def call(self, method: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self._since = time.monotonic()
        try:
            if self._made is None:
                self._made = self._make()  # here, so that its failure travels to the caller
            return getattr(self._made, method)(*args, **named)
        finally:
            self._since = 0.0

    @ray.method(concurrency_group="watch")
    def age(self) -> float:
        """Seconds the current call has been running, 0 when idle."""
        return time.monotonic() - self._since if self._since else 0.0

    @ray.method(concurrency_group="watch")
    def look(self, method: str) -> Any:
        """What a quick method says, in the middle of a call too; None before the object is made."""
        return None if self._made is None else getattr(self._made, method)()


_REMOTE: dict[str, Any] = {
    "num_cpus": 0,  # a blocked actor never gives its CPU back
    "max_restarts": -1,
    "max_task_retries": 0,
    "concurrency_groups": {"watch": 1},
}
RESIDENT: Any = ray.remote(**_REMOTE)(_Resident)


class Remote:
    """A thin stand-in for a resident object: picklable, usable from the driver and from workers."""

    def __init__(self, name: str, namespace: str, *, timeout: float = 300.0, patience: float = 60.0) -> None:
        """`timeout`: seconds one call may run; `patience`: seconds its process may be away."""
        self.name, self.namespace, self.timeout, self.patience = name, namespace, timeout, patience

    def call(self, method: str, *args: Any, **named: Any) -> Any:
        """Call a method there. What it raises is raised here.

        A call that overruns its time is ended by killing its process, so that the next does not run beside it.
        Raises TrialFailure when it overran three times, or the process stayed away.
        """
        overruns, away = 0, 0.0
        pause = 0.1
        while True:
            try:
                actor = ray.get_actor(self.name, self.namespace)
                return self._wait(actor, actor.call.remote(method, args, named))
            except RayTaskError as error:
                raise error.cause from error
            except GetTimeoutError as error:
                overruns += 1
                if overruns == 3:
                    raise TrialFailure(
                        f"{self.name}: {method} ran longer than {self.timeout:g} s, three times"
                    ) from error
            except (
                ActorUnavailableError,
                ActorDiedError,
                ValueError,
            ) as error:  # ValueError: no actor of that name now
                if away > self.patience:
                    raise TrialFailure(f"{self.name} has been away for {away:.0f} s ({first_line(error)})") from error
                time.sleep(pause)
                away += pause
                pause = min(2 * pause, 2.0)

    def _wait(self, actor: Any, answer: Any) -> Any:
        look = min(self.timeout, 10.0)
        while True:
            try:
                return ray.get(answer, timeout=look)
            except GetTimeoutError:
                # Time spent waiting behind others does not count.
                age: Any = ray.get(actor.age.remote(), timeout=look)
                if age > self.timeout:
                    ray.kill(actor, no_restart=False)
                    raise


class RemoteFiles(Remote):
    """`store.Store` on the driver's node: bytes travel through Ray's object store."""

    def put(self, data: bytes) -> str:
        """Store bytes there; their sha256."""
        return self.call("put", data)

    def get(self, sha: str) -> bytes:
        """The bytes of a sha256."""
        return self.call("get", sha)

    def has(self, sha: str) -> bool:
        """Whether they are there."""
        return self.call("has", sha)


class RemoteStation(Remote):
    """A station in its own process; other methods than these through `call`."""

    def measure(self, profile_name: str, model: bytes, key: str = "", **named: Any) -> Reading:
        """Latency of an ONNX file, given as bytes, on a profile's device."""
        return self.call("measure", profile_name, model, *([key] if key else []), **named)

    def kernels(self, profile_name: str, model: bytes, key: str = "") -> dict[str, float]:
        """What a file is told to a latency model by: see `station.Station.kernels`."""
        return self.call("kernels", profile_name, model, *([key] if key else []))

    def away(self) -> dict[str, str]:
        """Profiles whose device does not answer, and why. Raises RayError where the station itself does not."""
        actor = ray.get_actor(self.name, self.namespace)
        found: Any = ray.get(actor.look.remote("away"), timeout=self.patience)
        return found or {}


class RemoteStations:
    """A station for each host, so that one does not wait for another's."""

    def __init__(self, stations: Mapping[str, RemoteStation]) -> None:
        """`stations` by profile."""
        self._stations = dict(stations)

    def measure(self, profile_name: str, model: bytes, key: str = "", **named: Any) -> Reading:
        """Latency of an ONNX file, given as bytes, on a profile's device."""
        return self._stations[profile_name].measure(profile_name, model, key, **named)

    def kernels(self, profile_name: str, model: bytes, key: str = "") -> dict[str, float]:
        """See `station.Station.kernels`."""
        return self._stations[profile_name].kernels(profile_name, model, key)

    def away(self) -> dict[str, str]:
        """Profiles whose device does not answer, and why."""
        once = {station.name: station for station in self._stations.values()}
        return {name: why for station in once.values() for name, why in station.away().items()}
