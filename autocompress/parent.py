"""The uncompressed network: its weights, its ONNX file, its figures (floor F5). It is trial 0 and the control."""

from __future__ import annotations

import hashlib
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from autocompress import early, export, memory, onnxfile, registry
from autocompress.artifact import versions
from autocompress.devices.fingerprint import short
from autocompress.devices.station import Station
from autocompress.models.attention import own_names
from autocompress.models.plain import as_folded
from autocompress.models.trace import examples, thop_count
from autocompress.models.weights import fill
from autocompress.parts import Parts
from autocompress.pipeline import Work, export_float, weights_of
from autocompress.store import write_atomic
from autocompress.tasks import Task
from autocompress.train import Training
from autocompress.types import Facts, Limit, Outcome, QualityLimit, Reading, TrialFailure, UserError

PROBE_STEPS, SLICE_STEPS = 3, 12  # of training, between choices of the number of threads
BASELINE_S = 0.5  # seconds per device: every later reading takes the baseline along
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts save a network
PREFIXES = ("module.", "_orig_mod.", "model.")  # before every name: DataParallel's, torch.compile's, Lightning's
INNER = (".module.", "._orig_mod.")  # the same inside a name, where a part alone was wrapped
SAVE = "save the weights alone, by torch.save(network.state_dict(), FILE) or as .safetensors"
MODEL, WEIGHTS = "model.onnx", "weights.safetensors"  # in OUT/baseline
ELASTIC = "elastic.safetensors"  # there, too: weights that candidates of other structure begin with


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file, or of a .pt that holds tensors alone. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # torch remarks on pickles of other makers before it refuses them
            warnings.simplefilter("ignore", UserWarning)
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not readable as weights ({_line(error)})") from error
    except Exception as error:  # torch.load raises pickle errors of its own for anything but tensors
        stranger = re.search(r"GLOBAL (\S+)", str(error))  # the first function or class that loading would call
        why = f"holds {stranger[1]} beside tensors, which is not loaded" if stranger else "is no weights file"
        raise UserError(f"{path}: {why}; {SAVE}") from error
    while isinstance(found, dict) and (key := next((key for key in WRAPPERS if isinstance(found.get(key), dict)), "")):
        found = found[key]
    if isinstance(found, dict) and not _is_state_dict(found):
        inside = [value for value in found.values() if _is_state_dict(value)]
        found = inside[0] if len(inside) == 1 else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"{path}: does not hold a state dict of tensors; {SAVE}")
    return found


def _is_state_dict(found: object) -> bool:
    return isinstance(found, dict) and bool(found) and all(isinstance(value, torch.Tensor) for value in found.values())


def load_parent(module: nn.Module, path: Path) -> nn.Module:
    """Fill the parent from a weights file. Raises UserError naming the first tensors that do not fit, or a NaN."""
    wanted = module.state_dict()
    tensors = named_like(module, read_weights(path))
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not the network's" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the network has {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    problems += [
        f"{name} and {first} differ, the network has one tensor for both"
        for first, *others in tied(module)
        for name in others
        if first in tensors and name in tensors and not torch.equal(tensors[first], tensors[name])
    ]
    if problems:
        raise UserError(f"{path}: weights of another network: {_first(problems)}")
    ill = [
        f"{name} holds numbers that are not finite"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if ill:
        raise UserError(f"{path}: {_first(ill)}; take a checkpoint from before that")
    fill(module, tensors)
    return module.eval()


def _first(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"{'; '.join(problems[:3])}{more}"


def named_like(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the network's names, as far as that can be told: see PREFIXES, INNER and `tied`.

    And by what the network's layers were before they were unfolded (`attention.own_names`) and folded (`as_folded`).

    Counters of batch normalisation, which inference does not read, are the network's own where they are missing.
    """
    wanted = module.state_dict()
    found = _own_layers(module, tensors)
    while prefix := next((one for one in PREFIXES if found and all(name.startswith(one) for name in found)), ""):
        if any(name.startswith(prefix) for name in wanted):
            break
        found = _own_layers(module, {name.removeprefix(prefix): tensor for name, tensor in found.items()})
    for names in tied(module):
        held = next((name for name in names if name in found), None)
        if held is not None:  # savers write a shared tensor once
            found = {**dict.fromkeys(names, found[held]), **found}
    counters = {name: tensor for name, tensor in wanted.items() if name.endswith(".num_batches_tracked")}
    return {**counters, **found}


def _own_layers(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for inner in INNER:
        if not any(inner in f".{name}" for name in module.state_dict()):
            tensors = {f".{name}".replace(inner, ".")[1:]: tensor for name, tensor in tensors.items()}
    return as_folded(module, own_names(module, tensors))


def tied(module: nn.Module) -> list[list[str]]:
    """Names of the state dict that stand for one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def train_parent(module: nn.Module, task: Task, epochs: float, seed: int) -> nn.Module:
    """Train the parent from scratch, with all threads that torch has."""
    training = Training(module, task, epochs=epochs, seed=seed)
    try:
        run_through(training, torch.get_num_threads())
    except TrialFailure as failure:
        raise UserError(f"training the uncompressed model: {failure}; give trained `weights` for `model`") from failure
    return module.eval()


@contextmanager
def strangers(name: str, what: str = "cannot be trained", kind: registry.Kind = "builder") -> Iterator[None]:
    """What a network or task that is none of ours raises meanwhile becomes a UserError that names the place."""
    try:
        yield
    except (UserError, TrialFailure):
        raise
    except Exception as error:
        if name in registry.BUILT_IN[kind]:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        subject = "model" if kind == "builder" else kind
        raise UserError(f"{subject} {name}: {what}: {type(error).__name__} at {place}: {_line(error)}") from error


def run_through(training: Training, most: int) -> int:
    """Train to the end with `most` threads or with one, whichever is faster at the time; returns the last choice.

    Where other processes want the cores too, threads that wait for one another take ten times as long as one alone.
    """
    took: dict[int, float] = {}  # seconds per step, latest
    threads, step = most, 0
    while step < training.total:
        untried = [n for n in (most, 1) if n not in took]
        threads = untried[0] if untried else min(took, key=lambda n: took[n])
        torch.set_num_threads(threads)
        until = min(step + (PROBE_STEPS if untried else SLICE_STEPS), training.total)
        found = training.run_to(until / training.total)
        took[threads] = found["seconds"] / max(found["steps"], 1.0)
        step = until
    torch.set_num_threads(most)
    return threads


def make_parent(parts: Parts, folder: Path, say: Callable[[str], None]) -> nn.Module:
    """The parent with weights: from an earlier start of this run, from the job's file, or trained; kept in `folder`."""
    torch.manual_seed(parts.job.search.seed)
    module, kept = parts.builder.build({}), folder / WEIGHTS
    size = memory.module_bytes(module)
    memory.check(memory.TRIAL * size, f"model {parts.builder.name}, {size / 1e9:.1f} GB, with a candidate", UserError)
    if kept.is_file():
        return load_parent(module, kept)
    if parts.job.model.weights is not None:
        say(f"loading {parts.job.model.weights}")
        load_parent(module, Path(parts.job.model.weights))
    elif parts.job.model.epochs > 0:
        say(f"training the uncompressed {parts.builder.name} for {parts.job.model.epochs:g} epochs")
        with strangers(parts.builder.name):
            train_parent(module, parts.task, parts.job.model.epochs, parts.job.search.seed)
    write_atomic(kept, weights_of(module))
    return module


@dataclass(frozen=True)
class Baseline:
    """What the search is held against."""

    facts: Facts
    limit: Limit
    outcome: Outcome  # of trial 0
    key: str  # weight-free graph hash


def export_baseline(
    work: Work, folder: Path, exporters: Sequence[export.Exporter] = export.EXPORTERS
) -> tuple[str, export.Exporter]:
    """Write OUT/baseline/model.onnx by the first exporter that can; returns its weight-free graph hash, and which.

    Raises TrialFailure with the first one's reason if none can.
    """
    first: TrialFailure | None = None
    for exporter in exporters:
        try:
            model = export.compose(export_float(replace(work, exporter=exporter), work.parent))
        except TrialFailure as failure:
            first = first or failure
            continue
        onnxfile.save(folder / MODEL, model)
        return export.graph_hash(model, weights=False), exporter
    raise first or TrialFailure("no exporter was asked")


def measure_baseline(parts: Parts, work: Work, station: Station, folder: Path, key: str) -> Baseline:
    """Quality on the selection split and a reading on every device (against itself)."""
    path = folder / MODEL
    model = onnxfile.load(path)
    with strangers(parts.job.task, "its quality cannot be measured", "task"):
        quality = work.task.quality(export.predictor(model), "selection")
    readings: dict[str, Reading] = {}
    prints = {}
    for profile in parts.profiles:
        host = station.fingerprint(profile.name)
        prints[short(host)] = host
        readings[profile.name] = station.measure(profile.name, path, key, BASELINE_S, again=False)
    size = len(model) / 1e6
    macs, parameters = thop_count(work.parent, examples(work.task.input))
    facts = Facts(
        sites=parts.builder.sites(),
        baseline=readings,
        baseline_quality=quality,
        baseline_size_mb=size,
        parent=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        fingerprints=prints,
        versions=versions(),
    )
    outcome = Outcome(
        fidelity=1.0,
        readings=readings,
        quality={profile.name: quality for profile in parts.profiles},
        size_mb={profile.name: size for profile in parts.profiles},
        macs=macs,
        parameters=parameters,
    )
    early.refuse(quality)
    return Baseline(facts, floor(parts.job.quality, quality.value.value), outcome, key)


def floor(asked: QualityLimit, baseline: float) -> Limit:
    """The quality that must hold, given the baseline's."""
    value = asked.min if asked.min is not None else baseline - (asked.max_drop or 0.0)
    return Limit(metric=asked.metric, floor=value)


def _line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
