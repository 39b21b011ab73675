"""What measures, one file at a time on each host: lock, quiet phase, repetition, cache, devices that are away."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autocompress import load, onnxfile
from autocompress.devices import Device, TellsAnswers, TellsKernels, TellsMemory, Unreachable, host_of
from autocompress.devices.cores import CorePlan, plan_cores
from autocompress.devices.fingerprint import check_same, identity, resolve_local, short
from autocompress.devices.gate import Gate, HostLock
from autocompress.devices.kerneltable import KernelTable
from autocompress.devices.local import Unloadable
from autocompress.devices.slowing import Slowing
from autocompress.devices.statistics import MIN_BLOCKS, NARROW, SLOW, Window, width
from autocompress.pareto import settled
from autocompress.registry import call, genuine, resolve
from autocompress.store import cache_dir, make_folder, write_atomic
from autocompress.tasks import Predict, several
from autocompress.types import Budget, Profile, Reading, TrialFailure, UserError

LONGEST_S = 120.0  # a model so slow that MIN_BLOCKS take longer is reported as noisy
PORTION_S = 10.0  # of timing kernels, between which a device is asked whether it is there
PATIENCE_S = 600.0  # for trainers to pause, or for other measurements to end
LET_GO_S = 1.0  # for trainers to reach a step boundary where the device has become slow
RETAKES = 3  # while they pause: what they did to the machine outlasts them by a second or two
LONGER = 4  # times as long a file is timed, at most, where its interval leaves a budget open
PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # between tries at a device that is away; each is twice the one before
CACHE = "set AUTOCOMPRESS_CACHE to a folder that can be written"
FORMAT = 3  # part of every cache key: raise it when a reading comes to mean something else


@dataclass(frozen=True)
class Away:
    """A device that did not answer; it is not asked before `until`."""

    why: str
    pause: float
    until: float  # by time.monotonic


class Station:
    """Measures files against the baseline, one at a time on each host, and nothing twice. Threads may share it.

    A device that does not answer is away: what is not in the cache is refused at once until it is time to try again,
    after pauses that grow from `pause` seconds. Of locks and quiet phases only this host's are taken here; those of
    another host are taken there. Readings of the profiles `weighed` say what memory a file takes, which costs a process
    each; those of a `session` always do. Where a reading's interval leaves open whether one of `budgets` is met it is
    timed up to `LONGER` times as long: what lies near a budget is what a search looks for.

    Trainers that have cores of their own can slow the station's nevertheless: a virtual machine does not tell which of
    its cores are two threads of one, and that changes. Integers lose twice as much by it as floats, so a ratio is
    wrong too. Where the baseline is slower than it was, by `SLOW`, or a reading is noisy, the trainers of this host
    pause and the file is timed again.

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
        pause: float = PAUSE_S,
        weighed: Collection[str] = (),
        budgets: Sequence[Budget] = (),
    ) -> None:
        if not baseline.is_file():
            raise UserError(f"no baseline model at {baseline}")
        self.plan, self.baseline = plan, baseline.resolve()
        self._profiles = {profile.name: resolve_local(profile) for profile in profiles}
        self._make = device or _plug_in
        self._devices: dict[str, Device] = {}
        self._hosts: dict[str, dict[str, Any]] = {}  # fingerprints
        self._away: dict[str, Away] = {}
        self._pause = pause
        self._weighed = frozenset(weighed)
        self._budgets = {name: tuple(one for one in budgets if one.profile == name) for name in self._profiles}
        self._turns = {host_of(profile): threading.RLock() for profile in self._profiles.values()}
        self._cache = make_folder(cache or cache_dir(), CACHE)
        self._baseline_key = baseline_key or _sha(onnxfile.load(self.baseline))
        self._gate = gate or Gate()
        self._slowing = {name: Slowing() for name in self._profiles}
        self._lock = HostLock()
        self._tables: dict[str, KernelTable] = {}
        self._ready = False
        try:
            for name in self._profiles:
                with suppress(Unreachable):
                    self.fingerprint(name)
        except BaseException:
            self.close()
            raise
        self._ready = True

    def fingerprint(self, profile_name: str) -> dict[str, Any]:
        """What identifies the device of a profile; `fingerprint.short` of it stands in the readings.

        Raises Unreachable for a device that has not answered yet.
        """
        if profile_name not in self._profiles:
            raise UserError(f"the station has no profile {profile_name!r}, only {', '.join(self._profiles)}")
        if profile_name not in self._hosts:
            with self._turn(profile_name), self._reached(profile_name):
                pass
        return self._hosts[profile_name]

    def away(self) -> dict[str, str]:
        """Profiles whose device does not answer, and why."""
        return {name: one.why for name, one in list(self._away.items())}

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
        set and not kept; nor is one of a device that is slower than it was. Raises TrialFailure if the model cannot
        be loaded or run, Unreachable while it is away.
        """
        place = self._place(profile_name, key or _sha(model if isinstance(model, bytes) else onnxfile.load(model)))
        if (known := self._known(place, profile_name, seconds)) is not None:
            return known
        with self._turn(profile_name), self._alone(profile_name), self._file(model) as path:
            if (known := self._known(place, profile_name, seconds)) is not None:
                return known  # somebody measured it while we waited
            try:
                with self._reached(profile_name) as device:
                    weigh = profile_name in self._weighed
                    window, reading = self._take(
                        device, profile_name, path, seconds, again=again, weigh=weigh, longer=LONGER
                    )
            except Unloadable as refusal:
                self._keep(place, {"failure": str(refusal)})
                raise
        if not reading.noisy and reading.slowed <= SLOW:
            times = dict(zip(("model", "baseline"), window.times_ms, strict=True))
            raw = {
                "times_ms": {name: [round(ms, 5) for ms in row] for name, row in times.items()},
                "blocks": dict(zip(times, (list(map(len, those)) for those in window.parts_ms), strict=True)),
            }
            self._keep(place, {"reading": reading.model_dump(mode="json"), "load_ms": window.load_ms, **raw})
        return reading

    def kernels(self, profile_name: str, model: bytes | Path, key: str | None = None) -> dict[str, float]:
        """What a file's kernels take by operation, and how many they are: what a latency model is fitted to.

        Every kernel is timed alone, once for each device. Empty for a device that cannot. `key` and what is raised are
        those of `measure`.
        """
        named = key or _sha(model if isinstance(model, bytes) else onnxfile.load(model))
        place, table = self._place(profile_name, named, "kernels"), self._table(profile_name)
        known = self._kept(place)
        if failure := known.get("failure"):
            raise Unloadable(failure)
        if "counts" not in known or table.missing(known["counts"]):
            cores = self._cores(profile_name)
            with self._turn(profile_name), self._alone(profile_name), self._file(model) as path:
                try:
                    with self._reached(profile_name) as device:
                        if not isinstance(device, TellsKernels):
                            return {}
                        known = {"counts": device.kernels(path, (), seconds=PORTION_S, cores=cores).counts}
                        while missing := table.missing(known["counts"]):
                            with ExitStack() as held:
                                self._trainers_pause(held, profile_name)
                                table.add(device.kernels(path, missing, seconds=PORTION_S, cores=cores).ratios)
                except Unloadable as refusal:
                    self._keep(place, {"failure": str(refusal)})
                    raise
            self._keep(place, known)
        return table.amounts(known["counts"])

    @contextmanager
    def predictor(self, profile_name: str, model: bytes | Path) -> Iterator[Predict | None]:
        """What a file answers on the device of a profile, a function of inputs (n, ...), while the block lasts.

        None for this host, whose answers need no device, and for a device that only times files. It raises TrialFailure
        if the file does not run there, Unreachable while it is away.
        """
        if not host_of(self._profiles[profile_name]):
            yield None
            return
        with self._turn(profile_name), self._file(model) as path:
            with self._reached(profile_name) as device:
                tells = isinstance(device, TellsAnswers)

            def predict(inputs: Any) -> Any:
                with self._reached(profile_name) as device:
                    assert isinstance(device, TellsAnswers)
                    found = device.answers(path, several(inputs))
                return found[0] if len(found) == 1 else tuple(found)

            yield predict if tells else None

    def session(self, profile_name: str, model: bytes | Path, seconds: float = 1.5) -> Reading:
        """A reading by a fresh process, never from the cache: processes differ by more than noise within one.

        It has its single runs with it.
        """
        self.fingerprint(profile_name)
        with (
            self._turn(profile_name),
            self._alone(profile_name),
            self._file(model) as path,
            self._reached(profile_name, fresh=True) as device,
        ):
            window, reading = self._take(device, profile_name, path, seconds, weigh=True)
            return reading.model_copy(update={"runs": window.runs})

    def certify(
        self, profile_name: str, model: bytes | Path, sessions: int = 5, seconds: float = 1.5
    ) -> tuple[Reading, ...]:
        """Readings of several fresh processes, one after another; `certify.pool` makes one of them."""
        return tuple(self.session(profile_name, model, seconds) for _ in range(sessions))

    def close(self) -> None:
        """End the timing processes."""
        for device in self._devices.values():
            _close(device)
        self._devices.clear()

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
        with ExitStack() as held:
            try:
                held.enter_context(self._lock.held(f"profile {profile_name}", PATIENCE_S))
                if self.plan.quiet:
                    held.enter_context(self._gate.quiet(PATIENCE_S))
            except TimeoutError as error:
                raise TrialFailure(f"could not measure on {profile_name}: {error}") from error
            yield

    def _trainers_pause(self, held: ExitStack, profile_name: str) -> bool | None:
        """Let this host's trainers pause until `held` is closed; whether all do, None where nobody is to be asked."""
        if self.plan.quiet or host_of(self._profiles[profile_name]):
            return None
        return held.enter_context(self._gate.hushed(LET_GO_S))

    def _turn(self, profile_name: str) -> threading.RLock:
        """One thread at a time on each host."""
        return self._turns[host_of(self._profiles[profile_name])]

    @contextmanager
    def _reached(self, profile_name: str, *, fresh: bool = False) -> Iterator[Device]:
        """The device of a profile, or another object for it (`fresh`). Raises Unreachable while it is away.

        What comes back must be what left: readings of before and after are compared.
        """
        away = self._away.get(profile_name)
        if away is not None and time.monotonic() < away.until:
            raise Unreachable(away.why)
        own: Device | None = None
        try:
            if fresh:
                device = own = self._make(self._profiles[profile_name])
            elif (device := self._devices.get(profile_name)) is None:
                device = self._devices[profile_name] = self._make(self._profiles[profile_name])
            if away is not None or profile_name not in self._hosts:
                self._same(profile_name, device.fingerprint())
            yield device
        except Unreachable as gone:
            pause = self._pause if away is None else min(2 * away.pause, LONGEST_PAUSE_S)
            self._away[profile_name] = Away(str(gone), pause, time.monotonic() + pause)
            _close(self._devices.pop(profile_name, None))
            raise
        except TrialFailure:  # a verdict on the file is an answer too
            self._away.pop(profile_name, None)
            raise
        else:
            self._away.pop(profile_name, None)
        finally:
            _close(own)

    def _same(self, profile_name: str, found: dict[str, Any]) -> None:
        profile = self._profiles[profile_name]
        try:
            check_same(profile, found, as_is=profile.as_is)
        except UserError as other:
            if self._ready:  # one that answers late ends no search
                raise Unreachable(str(other)) from other
            raise
        known = self._hosts.setdefault(profile_name, found)
        if short(known) != short(found):
            changed = [name for name in {**known, **found} if known.get(name) != found.get(name)]
            raise Unreachable(f"{profile_name} answers, but is not what it was before: {', '.join(changed)} changed")

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
        # A folder for each: on another host the same file may be under way at the same time.
        with TemporaryDirectory(dir=make_folder(self._cache / "measuring", CACHE)) as folder:
            path = Path(folder) / f"{_sha(model)}.onnx"
            onnxfile.save(path, model)
            yield path

    def _take(
        self,
        device: Device,
        profile_name: str,
        model: Path,
        seconds: float,
        *,
        again: bool = True,
        weigh: bool = False,
        longer: int = 1,
    ) -> tuple[Window, Reading]:
        """Time it; once more beside pausing trainers if that was noisy (for twice as long) or the device slow.

        Then on, up to `longer` times, for a budget's sake; then `weigh` what memory it takes.
        """
        cores, began = self._cores(profile_name), time.perf_counter()
        slowing = self._slowing[profile_name]
        with ExitStack() as held:
            window, paused = self._window(device, model, seconds, cores), None
            anew = window.noisy and again
            if anew or slowing.blamed(window.baseline_ms):
                paused, before, taken = self._trainers_pause(held, profile_name), window, 0
                while taken < (int(anew) if paused is None else RETAKES):
                    taken += 1
                    window = self._window(device, model, 2 * seconds if anew else seconds, cores)
                    if not slowing.slow(window.baseline_ms):
                        break
                if paused is not None:
                    slowing.paused(before, window, taken)

            def reading() -> Reading:
                found = window.reading(
                    profile_name,
                    seconds=time.perf_counter() - began - window.waited_s,
                    quiet=self.plan.quiet or bool(paused),
                    cores=cores,
                    host=short(self.fingerprint(profile_name)),
                    batch=self._profiles[profile_name].batch,
                )
                return found.model_copy(update={"slowed": slowing.by(found.baseline_ms)})

            for _ in range(longer - 1):
                if window.noisy or self._decides(reading()):
                    break
                window.add(device.time([self.baseline, model], rounds=8 * MIN_BLOCKS, seconds=seconds, cores=cores))
        if not window.noisy:
            slowing.seen(window.baseline_ms)
        if weigh and isinstance(device, TellsMemory):
            window.memory_mb = device.memory([model]).get(str(model))
        return window, reading().model_copy(update={"as_is": self._another(profile_name)})

    def _another(self, profile_name: str) -> bool:
        """Whether the device is not the one that the profile was made for, and measured on as it is."""
        made_for = self._profiles[profile_name].fingerprint
        return bool(made_for) and identity(self.fingerprint(profile_name)) != made_for

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

    def _table(self, profile_name: str) -> KernelTable:
        """What kernels take on the device of a profile."""
        if profile_name not in self._tables:
            path, _ = self._place(profile_name, "", "kernels")
            self._tables[profile_name] = KernelTable(path.parents[1] / f"{path.name.partition('.')[0]}.jsonl")
        return self._tables[profile_name]

    def _place(self, profile_name: str, key: str, what: str = "readings") -> tuple[Path, dict[str, Any]]:
        """Where a reading is kept, and everything that it depends on."""
        host = self.fingerprint(profile_name)
        parts = {
            "format": FORMAT,
            "model": key,
            "baseline": self._baseline_key if what == "readings" else what,
            "profile": self._profiles[profile_name].model_dump(
                mode="json", include={"device", "provider", "provider_options", "threads", "batch", "reach"}
            ),
            "host": short(host),
            "cores": self._cores(profile_name),
            "quiet": self.plan.quiet,
            **({"weighed": True} if profile_name in self._weighed else {}),
        }
        name = _sha(json.dumps(parts, sort_keys=True).encode())
        return self._cache / what / name[:2] / f"{name}.json.gz", parts

    def _decides(self, reading: Reading) -> bool:
        """Whether a reading says of every budget that it is met, or that it is not."""
        budgets = self._budgets[reading.profile]
        return not budgets or settled(reading, budgets)

    def _known(self, place: tuple[Path, dict[str, Any]], profile_name: str, seconds: float) -> Reading | None:
        """A reading from the cache, unless it leaves a budget open that more time may decide."""
        known = self._recall(place, profile_name)
        long = known is not None and known.seconds > (LONGER - 1) * seconds
        return known if known is None or long or self._decides(known) else None

    def _recall(self, place: tuple[Path, dict[str, Any]], profile_name: str) -> Reading | None:
        """What is known of it; raises TrialFailure where that is a refusal."""
        kept = self._kept(place)
        if failure := kept.get("failure"):
            raise Unloadable(failure)
        try:
            reading = Reading.model_validate(kept["reading"])
        except (ValueError, LookupError):
            return None
        reading = reading.model_copy(update={"profile": profile_name, "as_is": self._another(profile_name)})
        self._slowing[profile_name].seen(reading.baseline_ms)
        return reading

    def _kept(self, place: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
        """What lies there; nothing if that is damaged: it is measured again and overwritten."""
        try:
            found = json.loads(gzip.decompress(place[0].read_bytes()))
        except (OSError, EOFError, ValueError, zlib.error):
            return {}
        return found if isinstance(found, dict) else {}

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


def _close(device: Device | None) -> None:
    """Plug-ins that hold nothing need no `close`."""
    close = getattr(device, "close", None)
    if close is not None:
        close()
