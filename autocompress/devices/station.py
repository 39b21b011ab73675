"""The exclusive process that measures: lock, quiet phase, repetition, cache."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from autocompress import load, onnxfile
from autocompress.devices import Device, host_of
from autocompress.devices.cores import CorePlan, plan_cores
from autocompress.devices.fingerprint import resolve_local, short
from autocompress.devices.gate import Gate, HostLock
from autocompress.devices.local import Unloadable
from autocompress.devices.statistics import MIN_BLOCKS, NARROW, Window, width
from autocompress.registry import call, genuine, resolve
from autocompress.store import cache_dir, make_folder, write_atomic
from autocompress.types import Profile, Reading, TrialFailure, UserError

LONGEST_S = 120.0  # a model so slow that MIN_BLOCKS take longer is reported as noisy
PATIENCE_S = 600.0  # for trainers to pause, or for other measurements to end
FORMAT = 2  # part of every cache key: raise it when a reading comes to mean something else


class Station:
    """Measures files against the baseline, one at a time on the whole host, and nothing twice.

    `baseline_key` stands for the baseline in cache keys (a weight-free graph hash lets searches from different
    weights share readings); without it the file's sha256 does. Raises UserError for a missing baseline or a host that
    a profile does not fit.
    """

    def __init__(
        self,
        profiles: Sequence[Profile],
        plan: CorePlan,
        baseline: Path,
        cache: Path | None = None,
        *,
        baseline_key: str | None = None,
        gate: Gate | None = None,
        device: Callable[[Profile], Device] | None = None,
    ) -> None:
        if not baseline.is_file():
            raise UserError(f"no baseline model at {baseline}")
        self.plan, self.baseline = plan, baseline.resolve()
        self._profiles = {profile.name: resolve_local(profile) for profile in profiles}
        self._make = device or _plug_in
        self._devices = {name: self._make(profile) for name, profile in self._profiles.items()}
        self._cache = make_folder(cache or cache_dir(), "set AUTOCOMPRESS_CACHE to a folder that can be written")
        self._baseline_key = baseline_key or _sha(onnxfile.load(self.baseline))
        self._gate = (gate or Gate()) if plan.quiet else None
        self._lock = HostLock()
        self._hosts = {name: one.fingerprint() for name, one in self._devices.items()}

    def fingerprint(self, profile_name: str) -> dict[str, Any]:
        """What identifies the device of a profile; `fingerprint.short` of it stands in the readings."""
        self._device(profile_name)
        return self._hosts[profile_name]

    def measure(
        self,
        profile_name: str,
        model: bytes | Path,
        key: str | None = None,
        seconds: float = 1.0,
        *,
        again: bool = True,
    ) -> Reading:
        """A reading from the cache or a new one.

        `key` says what decides the latency of the model (a weight-free graph hash); without it the file's sha256
        does. `seconds` bounds the timing, not the loading; a very slow model takes longer, since fewer than eight
        blocks give no interval. A noisy reading is taken `again` with twice the time, then returned with `noisy`
        set and not kept. Raises TrialFailure if the model cannot be loaded or run.
        """
        place = self._place(profile_name, key or _sha(model if isinstance(model, bytes) else onnxfile.load(model)))
        if (known := self._recall(place, profile_name)) is not None:
            return known
        with self._alone(profile_name), self._file(model) as path:
            if (known := self._recall(place, profile_name)) is not None:
                return known  # somebody measured it while we waited
            try:
                window, reading = self._take(self._device(profile_name), profile_name, path, seconds, again)
            except Unloadable as refusal:
                self._keep(place, {"failure": str(refusal)})
                raise
        if not reading.noisy:
            times = dict(zip(("model", "baseline"), window.times_ms, strict=True))
            rounded = {name: [round(ms, 5) for ms in row] for name, row in times.items()}
            self._keep(
                place, {"reading": reading.model_dump(mode="json"), "load_ms": window.load_ms, "times_ms": rounded}
            )
        return reading

    def session(self, profile_name: str, model: bytes | Path, seconds: float = 1.5) -> Reading:
        """A reading by a fresh process, never from the cache: processes differ by more than noise within one."""
        device = self._make(self._profiles[profile_name])
        try:
            with self._alone(profile_name), self._file(model) as path:
                return self._take(device, profile_name, path, seconds)[1]
        finally:
            _close(device)

    def certify(
        self, profile_name: str, model: bytes | Path, sessions: int = 5, seconds: float = 1.5
    ) -> tuple[Reading, ...]:
        """Readings of several fresh processes, one after another; `certify.pool` makes one of them."""
        return tuple(self.session(profile_name, model, seconds) for _ in range(sessions))

    def close(self) -> None:
        """End the timing processes."""
        for device in self._devices.values():
            _close(device)

    def _device(self, profile_name: str) -> Device:
        try:
            return self._devices[profile_name]
        except KeyError:
            raise UserError(f"the station has no profile {profile_name!r}, only {', '.join(self._devices)}") from None

    def _cores(self, profile_name: str) -> tuple[int, ...]:
        """Always the last cores of the station, so that a profile's readings do not depend on its neighbours.

        None for a target that is not this host: cores are chosen there.
        """
        if host_of(self._profiles[profile_name]):
            return ()
        return self.plan.station[-self._profiles[profile_name].threads :]

    @contextmanager
    def _alone(self, profile_name: str) -> Iterator[None]:
        """Hold the host, and in a quiet phase wait for the trainers to pause; another host has a lock of its own."""
        if host_of(self._profiles[profile_name]):
            yield
            return
        try:
            quiet = self._gate.quiet(PATIENCE_S) if self._gate else nullcontext()
            with self._lock.held(f"profile {profile_name}", PATIENCE_S), quiet:
                yield
        except TimeoutError as error:
            raise TrialFailure(f"could not measure on {profile_name}: {error}") from error

    @contextmanager
    def _file(self, model: bytes | Path) -> Iterator[Path]:
        """The model as a file for as long as it is measured."""
        if isinstance(model, Path):
            if not model.is_file():
                raise UserError(f"no model at {model}")
            path = model.resolve()
            # Times are told apart by path, so a model that is its own baseline needs a second spelling of it.
            yield path if path != self.baseline else path.parent / ".." / path.parent.name / path.name
            return
        path = self._cache / "measuring" / f"{_sha(model)}.onnx"
        onnxfile.save(path, model)
        try:
            yield path
        finally:
            onnxfile.remove(path)

    def _take(
        self, device: Device, profile_name: str, model: Path, seconds: float, again: bool = True
    ) -> tuple[Window, Reading]:
        """Time it, and once more with twice the seconds if that was noisy."""
        cores, began = self._cores(profile_name), time.perf_counter()
        window = self._window(device, model, seconds, cores)
        if window.noisy and again:
            window = self._window(device, model, 2 * seconds, cores)
        reading = window.reading(
            profile_name,
            seconds=time.perf_counter() - began - window.waited_s,
            quiet=self.plan.quiet,
            cores=cores,
            host=short(self.fingerprint(profile_name)),
            batch=self._profiles[profile_name].batch,
        )
        return window, reading

    def _window(self, device: Device, model: Path, seconds: float, cores: tuple[int, ...]) -> Window:
        """Repeat until the ratio's interval is narrow or the seconds are over."""
        window, rounds, began = Window(model, self.baseline), 2 * MIN_BLOCKS, time.perf_counter()
        while True:
            left = seconds - (time.perf_counter() - began - window.waited_s)
            window.add(device.time([self.baseline, model], rounds=rounds, seconds=max(left, 0.0), cores=cores))
            spent = time.perf_counter() - began - window.waited_s
            enough = window.blocks >= MIN_BLOCKS and spent >= seconds
            if window.narrow or enough or spent > max(LONGEST_S, seconds):
                return window
            # An interval shrinks with the root of the count: this many more make it narrow, in portions.
            wanted = window.blocks * (width(window.ratio) / NARROW) ** 2 - window.blocks
            rounds = int(min(max(wanted, MIN_BLOCKS), 8 * MIN_BLOCKS))

    def _place(self, profile_name: str, key: str) -> tuple[Path, dict[str, Any]]:
        """Where a reading is kept, and everything that it depends on."""
        host = self.fingerprint(profile_name)
        parts = {
            "format": FORMAT,
            "model": key,
            "baseline": self._baseline_key,
            "profile": self._profiles[profile_name].model_dump(
                mode="json", include={"device", "provider", "provider_options", "threads", "batch", "reach"}
            ),
            "host": short(host),
            "cores": self._cores(profile_name),
            "quiet": self.plan.quiet,
        }
        name = _sha(json.dumps(parts, sort_keys=True).encode())
        return self._cache / "readings" / name[:2] / f"{name}.json.gz", parts

    def _recall(self, place: tuple[Path, dict[str, Any]], profile_name: str) -> Reading | None:
        """What is known of it; raises TrialFailure where that is a refusal."""
        try:
            kept = json.loads(gzip.decompress(place[0].read_bytes()))
            failure = kept.get("failure")
            reading = None if failure else Reading.model_validate(kept["reading"])
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
            return None  # not there, or damaged: measured again and overwritten
        if failure:
            raise Unloadable(failure)
        return reading.model_copy(update={"profile": profile_name}) if reading else None

    def _keep(self, place: tuple[Path, dict[str, Any]], found: dict[str, Any]) -> None:
        path, parts = place
        write_atomic(path, gzip.compress(json.dumps({"key": parts, **found}).encode(), 6, mtime=0))


def _plug_in(profile: Profile) -> Device:
    """The device that a profile names. Raises UserError where it is none or cannot be made."""
    made = call("device", profile.device, resolve("device", profile.device), profile)
    return genuine("device", profile.device, made)


def measure_file(
    model: Path | str, profile: Profile | str, baseline: Path | str | None = None, seconds: float = 3.0
) -> Reading:
    """Measure one file once, without the cache: `autocompress measure MODEL.onnx --profile P`.

    `profile` is a record, the name of one or its YAML file. Without a baseline the model is its own, and
    the ratio shows what the machine's noise does to two equal files.
    Raises UserError for a missing file or a host that the profile does not fit, TrialFailure if it does not run.
    """
    target = profile if isinstance(profile, Profile) else load.profile(profile)
    candidate, reference = Path(model), Path(baseline or model)
    for path in (candidate, reference):
        if not path.is_file():
            raise UserError(f"no model at {path}")
    station = Station([target], plan_cores([target]), reference)
    try:
        return station.session(target.name, candidate, seconds)
    finally:
        station.close()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _close(device: Device) -> None:
    """Plug-ins that hold nothing need no `close`."""
    close = getattr(device, "close", None)
    if close is not None:
        close()
