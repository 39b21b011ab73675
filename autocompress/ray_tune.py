"""The search on Ray Tune (floor F5); imports ray, as only `residents.py` and `devices/ray_node.py` do too.

The controller and its journal are the state; Tune only runs attempts. One Tune trial is one attempt; Tune's own
retries, restoring, logging and checkpoints are off. What trials share, files and stations, lives in `residents`.
"""

# ruff: noqa: ARG001, ARG002  (Ray and Python call these by signature)
from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

# Ray reads this once, when it is imported: nothing but `Session` may start or join a Ray.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher as TuneSearcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autocompress.controller import Controller, Evaluator, steps
from autocompress.devices import AllAway
from autocompress.devices.cores import keep_to
from autocompress.devices.ray_node import first_line, host_and_port, reach
from autocompress.journal import Event
from autocompress.residents import RESIDENT, RemoteFiles, RemoteStation
from autocompress.store import Store
from autocompress.types import Assignment, Outcome, State, UserError

PREFIX = "acray"  # Ray's temporary folder: short, because socket paths must stay below 107 characters
SWITCHES = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_INIT": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # nobody reads Tune's own state
}
FRUITLESS = 3  # starts of Tune in a row that come to nothing before we give up

EvaluatorMaker = Callable[[], Evaluator]


# --- a trial in its worker --------------------------------------------------------------------------------------------


class _Worker(tune.Trainable):
    """A reused process: builds the evaluator once, then walks one attempt after another, one rung per step."""

    def setup(
        self,
        config: dict[str, Any],
        make: EvaluatorMaker | None = None,
        keep: RemoteFiles | None = None,
        cores: tuple[int, ...] = (),
        node: str = "",
    ) -> None:
        self._keep, self._evaluator, self._problem, self._user = keep, None, "", False
        self._work: Generator[tuple[State, Outcome]] | None = None
        self._cores = cores if ray.get_runtime_context().get_node_id() == node else ()
        try:
            assert make is not None
            self._evaluator = make()
        except Exception as error:  # noqa: BLE001  it would fail for every trial: the driver ends the search with it
            self._user = isinstance(error, UserError)
            self._problem = str(error) if self._user else f"a worker cannot start: {type(error).__name__}: {error}"
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._close()
        keep_to(self._cores)
        if self._evaluator is not None:
            assignment = Assignment.model_validate_json(new_config["assignment"])
            self._work = steps(self._evaluator, assignment, self._keep.put if self._keep else None)
        return True

    def step(self) -> dict[str, Any]:
        if self._work is None:
            return {"problem": self._problem, "user": self._user, "done": True}
        try:
            state, outcome = next(self._work)
        except UserError as error:
            return {"problem": str(error), "user": True, "away": isinstance(error, AllAway), "done": True}
        # As one string: Tune would flatten a nested result key by key.
        found = json.dumps(outcome.model_dump(exclude_defaults=True))
        return {"state": state.value, "outcome": found, "done": state.ended}

    def cleanup(self) -> None:
        self._close()
        close = getattr(self._evaluator, "close", None)
        if close is not None:
            close()

    def _close(self) -> None:
        if self._work is not None:
            self._work.close()
            self._work = None


# --- Tune's side of the driver ------------------------------------------------------------------------------------


class _Loop:
    """Between Tune and the controller. Nothing here may raise into Tune: it ends the loop, and `run` raises."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.fatal: BaseException | None = None
        self.fruitful = False  # whether Tune has brought any result since it was started
        self.numbers: dict[str, int] = {}  # Tune's trial id -> trial in flight
        self.tune_trials: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}  # why a worker was lost

    @property
    def over(self) -> bool:
        """Whether Tune should drop everything now."""
        return self.fatal is not None or self.controller.stopped

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        try:
            if self.over or self.controller.finished:
                return TuneSearcher.FINISHED
            assignment = self.controller.ask()
        except Exception as error:  # noqa: BLE001  kept and raised by `run`
            return self._end(error)
        if assignment is None:
            return None
        self.numbers[trial_id] = assignment.number
        return {"assignment": assignment.model_dump_json()}

    def result(self, trial_id: str, result: Mapping[str, Any]) -> str:
        if self.over or trial_id not in self.numbers:
            return TrialScheduler.STOP
        try:
            self.fruitful = True
            if self.controller.rung(self.numbers[trial_id], _outcome(result)):
                return TrialScheduler.CONTINUE
            del self.numbers[trial_id]
        except Exception as error:  # noqa: BLE001
            self._end(error)
        return TrialScheduler.STOP

    def complete(self, trial_id: str, result: Mapping[str, Any] | None) -> None:
        reason = self.reasons.pop(trial_id, "its process ended without a result")
        self.tune_trials.pop(trial_id, None)
        if self.over or trial_id not in self.numbers:
            return
        number = self.numbers.pop(trial_id)
        try:
            if result is not None and "problem" in result:
                kind = AllAway if result.get("away") else UserError if result["user"] else RuntimeError
                self._end(kind(result["problem"]))
            elif result is not None and "state" in result and State(result["state"]).ended:
                self.fruitful = True
                self.controller.tell(number, State(result["state"]), _outcome(result))
            else:
                self.controller.lost(number, reason)
        except Exception as error:  # noqa: BLE001
            self._end(error)

    def settle(self) -> None:
        """Take in what other threads have posted, between results too."""
        try:
            self.controller.settle()
        except Exception as error:  # noqa: BLE001
            self._end(error)

    def abandon(self, reason: str) -> None:
        """Tune has ended with trials in flight."""
        for number in self.numbers.values():
            self.controller.lost(number, reason)
        self.numbers.clear()
        self.tune_trials.clear()

    def kill_workers(self) -> None:
        """End running steps, instead of waiting for them."""
        for trial in self.tune_trials.values():
            if (actor := trial.temporary_state.ray_actor) is not None:
                ray.kill(actor)
        self.tune_trials.clear()

    def _end(self, error: BaseException) -> str:
        self.fatal = self.fatal or error
        return TuneSearcher.FINISHED


def _outcome(result: Mapping[str, Any]) -> Outcome:
    return Outcome.model_validate(json.loads(result["outcome"]))


class _Asks(TuneSearcher):
    """Tune pickles it, so it says that it has no state: the journal has it."""

    def __init__(self, loop: _Loop) -> None:
        super().__init__()
        self._loop = loop

    def suggest(self, trial_id: str) -> Any:
        return self._loop.suggest(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._loop.complete(trial_id, None if error else result)

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> NoReturn:
        raise RuntimeError("a search is resumed from its journal")

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Rungs(FIFOScheduler):
    """Asks the controller whether a trial goes on."""

    def __init__(self, loop: _Loop) -> None:
        super().__init__()
        self._loop = loop

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._loop.result(trial.trial_id, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        with suppress(OSError, TypeError):  # TypeError: Tune kept no file
            lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
            self._loop.reasons[trial.trial_id] = lines[-1][:300]

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Watch(tune.Callback):
    """Knows which worker runs what."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._loop.tune_trials[trial.trial_id] = trial

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Until(tune.Stopper):
    """Ends Tune at once when the search was stopped."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        self._loop.settle()
        if self._loop.over:
            self._loop.kill_workers()
        return self._loop.over

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Silent(tune.ProgressReporter):
    def should_report(self, trials: list[Any], done: bool = False) -> bool:
        return False

    def report(self, trials: list[Any], done: bool, *sys_info: Any) -> None:
        pass


# --- a session: Ray up, Ray down ----------------------------------------------------------------------------------


class Session(AbstractContextManager["Session"]):
    """Ray for one search: local, or the running cluster at `address` ("host:port"). Leaves nothing behind."""

    def __init__(
        self,
        *,
        workers: int | None = None,
        address: str | None = None,
        env: Mapping[str, str] | None = None,
        store_root: Path | None = None,
        trainer_cores: Sequence[int] = (),
    ) -> None:
        """`workers`: trials at once (default: the cluster's CPUs, or `trainer_cores`); `env`: set in every worker;
        `store_root`: where `files` keeps what workers put; `trainer_cores`: the driver, Ray and the workers of this
        host stay on these. Raises UserError for an address that is none.
        """
        if address is not None:
            host_and_port(address)
        self.address, self.env, self.store_root = address, dict(env or {}), store_root
        self.cores = tuple(trainer_cores)
        self.workers = workers or 0
        self.namespace = f"autocompress-{secrets.token_hex(6)}"  # the same after a restart: stand-ins hold it
        self._residents: dict[str, Callable[[], Any]] = {}
        self._handles: dict[str, Any] = {}
        self._undo: list[Callable[[], object]] = []
        self._folder: Path | None = None
        self.up = False

    def __enter__(self) -> Session:
        if ray.is_initialized():
            raise UserError("Ray is running in this process already: call ray.shutdown() first")
        if self.address is not None and "RAY_AUTH_MODE" not in os.environ and _HAD_LOCAL:
            # Ray keeps demanding the local session's token of everybody, and the cluster would take us for dead.
            raise UserError("a local Ray ran in this process before: use a cluster from a new Python process")
        try:
            self._prepare()
            self._start()
            self.up = True
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.up = False
        self._handles.clear()
        ray.shutdown()
        while self._undo:
            self._undo.pop()()

    @property
    def files(self) -> RemoteFiles:
        """Store of the driver's node, from anywhere. Needs `store_root`."""
        if self.store_root is None:
            raise ValueError("this session has no store_root")
        return RemoteFiles("files", self.namespace)

    def station(
        self, make_station: Callable[[], Any], name: str = "station", *, timeout: float = 900.0
    ) -> RemoteStation:
        """Run a station in its own process on the driver's node; `make_station` is picklable and runs there.

        One call of it may take `timeout` seconds before its process is killed and the call repeated.
        """
        self._residents[name] = make_station
        self._settle(name)
        return RemoteStation(name, self.namespace, timeout=timeout)

    def run(
        self, controller: Controller, make_evaluator: EvaluatorMaker, on_event: Callable[[Event], None] | None = None
    ) -> None:
        """Run the search until it is finished, or stopped by Ctrl-C or SIGTERM; a second signal is KeyboardInterrupt.

        `make_evaluator` is picklable and runs once in every worker. `on_event` is called in this thread for every
        event, after it was journalled. When Tune dies it is started again from the controller's state. Raises
        UserError, and RuntimeError when workers cannot start or Tune dies three times without any result.
        """
        loop = _Loop(controller)
        fruitless = 0
        while not (controller.finished or loop.over):
            loop.fruitful = False
            with _signals(controller):  # each time, because ray.init takes SIGTERM
                died = self._fit(loop, make_evaluator, on_event)
            if loop.fatal is not None:
                raise loop.fatal
            if loop.over or controller.finished:
                break
            fruitless = 0 if loop.fruitful else fruitless + 1
            if fruitless == FRUITLESS:
                raise RuntimeError(f"Ray Tune ended {FRUITLESS} times without any result: {died}") from died
            loop.abandon(f"Ray Tune died: {first_line(died) if died else 'it ended early'}")
            # A dead Tune leaves its placement groups, and with them the CPUs: only the end of the job frees them.
            self._handles.clear()
            ray.shutdown()
            self._start()
        controller.journal.sync()

    def _fit(
        self, loop: _Loop, make_evaluator: EvaluatorMaker, on_event: Callable[[Event], None] | None
    ) -> BaseException | None:
        """One life of a Tuner, in its own thread so that signals reach this one. What it died of, if it did."""
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        died: list[BaseException] = []

        def live() -> None:
            try:
                self._tuner(loop, make_evaluator).fit()
            except BaseException as error:  # noqa: BLE001  the thread's only way to say so
                died.append(error)
            finally:
                events.put(None)

        loop.controller.on_event = events.put
        thread = threading.Thread(target=live, name="tune", daemon=True)
        thread.start()
        try:
            while (event := _next(events)) is not None:
                if on_event is not None:
                    on_event(event)
            thread.join()
        finally:
            loop.controller.on_event = None
            if thread.is_alive():  # a second Ctrl-C, or a failing on_event: do not wait for Tune
                loop.controller.stop()
        return died[0] if died else None

    def _tuner(self, loop: _Loop, make_evaluator: EvaluatorMaker) -> tune.Tuner:
        assert self._folder is not None
        node = ray.get_runtime_context().get_node_id()
        keep = self.files if self.store_root is not None else None
        worker = tune.with_parameters(_Worker, make=make_evaluator, keep=keep, cores=self.cores, node=node)
        return tune.Tuner(
            worker,
            tune_config=tune.TuneConfig(
                search_alg=_Asks(loop),
                scheduler=_Rungs(loop),
                num_samples=-1,
                max_concurrent_trials=self.workers,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=f"search-{secrets.token_hex(4)}",  # a Tuner in an old folder overwrites it
                storage_path=str(self._folder / "tune"),
                stop=_Until(loop),
                callbacks=[_Watch(loop)],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the default of class trainables
                progress_reporter=_Silent(),
                verbose=0,
            ),
        )

    # --- up and down

    def _prepare(self) -> None:
        _sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-", dir=_short_folder()))
        self._undo.append(partial(shutil.rmtree, self._folder, ignore_errors=True))
        switches = dict(SWITCHES)
        if self.address is None:
            switches |= {
                "RAY_TMPDIR": str(self._folder),
                "RAY_memory_monitor_refresh_ms": "0",  # its kill ends the whole fit()
                "RAY_AUTH_TOKEN": _TOKEN,  # otherwise Ray writes one into the home folder
                "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",
                "PYTHONPATH": _own_paths(),
                **self.env,
            }
        for name, value in switches.items():
            self._undo.append(partial(_set_variable, name, os.environ.get(name)))
            os.environ[name] = value
        self._undo.append(partial(_set_variable, "RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE")))  # Ray sets it
        for name in ("ray", "ray.tune"):
            logger = logging.getLogger(name)
            self._undo.append(partial(logger.setLevel, logger.level))
            logger.setLevel(logging.CRITICAL)  # what fails is in the journal
        if threading.current_thread() is threading.main_thread():
            self._undo.append(partial(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM)))
        if self.cores and sys.platform == "linux":
            self._undo.append(partial(keep_to, sorted(os.sched_getaffinity(0))))
            keep_to(self.cores)

    def _start(self) -> None:
        common: dict[str, Any] = {
            "namespace": self.namespace,
            "log_to_driver": False,
            "logging_level": logging.CRITICAL,
            "configure_logging": True,
        }
        if self.address is None:
            self.workers = self.workers or len(self.cores) or os.cpu_count() or 1
            _HAD_LOCAL.append(True)
            ray.init(
                address="local",
                num_cpus=self.workers,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_object_store(),
                **common,
            )
        else:
            reach(self.address)
            try:
                ray.init(address=self.address, runtime_env={"env_vars": self.env} if self.env else None, **common)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise UserError(f"no Ray cluster can be used at {self.address}: {first_line(error)}") from error
            cpus = int(ray.cluster_resources().get("CPU", 0))
            if cpus < 1:
                raise UserError(f"the Ray cluster at {self.address} has no CPU for trials; add a node with --num-cpus")
            self.workers = min(self.workers or cpus, cpus)
        if self.store_root is not None:
            self._residents["files"] = partial(Store, self.store_root)
        for name in self._residents:
            self._settle(name)

    def _settle(self, name: str) -> None:
        node = ray.get_runtime_context().get_node_id()
        where = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        actor = RESIDENT.options(name=name, namespace=self.namespace, scheduling_strategy=where)
        give_up = time.monotonic() + 60.0
        while name not in self._handles:
            try:
                self._handles[name] = actor.remote(self._residents[name])  # it ends with its last handle
            except ValueError:  # the name of the job before is not free yet
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.2)


def run(
    controller: Controller,
    make_evaluator: EvaluatorMaker,
    *,
    workers: int | None = None,
    address: str | None = None,
    env: Mapping[str, str] | None = None,
    store_root: Path | None = None,
    trainer_cores: Sequence[int] = (),
    on_event: Callable[[Event], None] | None = None,
) -> None:
    """A session for one search whose evaluator needs neither files nor station; see `Session`."""
    with Session(
        workers=workers, address=address, env=env, store_root=store_root, trainer_cores=trainer_cores
    ) as session:
        session.run(controller, make_evaluator, on_event)


_HAD_LOCAL: list[bool] = []
_TOKEN = secrets.token_hex(32)  # one per process: Ray caches the first that it sees


@contextmanager
def _signals(controller: Controller) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: stop asking. Second: KeyboardInterrupt. Outside the main thread: nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    first = 0.0

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not controller.stopped:
            first = time.monotonic()
            controller.stop()
        elif time.monotonic() - first > 1.0:  # some senders signal a process and then its group
            raise KeyboardInterrupt

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _next(events: queue.SimpleQueue[Event | None]) -> Event | None:
    while True:
        with suppress(queue.Empty):
            return events.get(timeout=0.1)  # with a limit, so that signals are heard


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _own_paths() -> str:
    """Where this process finds modules outside its Python installation: the user's own plug-ins, say."""
    installed = tuple({str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)})
    folders = [str(Path(entry).resolve()) for entry in sys.path]
    return os.pathsep.join(f for f in dict.fromkeys(folders) if Path(f).is_dir() and not f.startswith(installed))


def _short_folder() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 30 else "/tmp"


def _sweep() -> None:
    """Remove folders of drivers that were killed."""
    for folder in Path(_short_folder()).glob(f"{PREFIX}-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _object_store() -> int:
    """Bytes for Ray's object store: models are small, and /dev/shm may be (a container's 64 MB)."""
    shm = Path("/dev/shm")
    free = shutil.disk_usage(shm).free if shm.is_dir() else 0
    return max(80_000_000, min(1_000_000_000, int(free * 0.4)))
