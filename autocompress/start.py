"""Where a job begins: a network by its name or by a job file, and a new job file to start from (floor F5)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from autocompress import auto, load, registry
from autocompress.devices.fingerprint import resolve_local
from autocompress.models import Builder
from autocompress.models.sources import PICTURE, usual_input
from autocompress.parts import make_builder, parts
from autocompress.shelves import suggest
from autocompress.spacefile import flow
from autocompress.store import write_atomic
from autocompress.tasks import InputSpec
from autocompress.types import Profile, Space, UserError

Shape = tuple[int, ...]
TYPES = ("float32", "int64", "int32")


@dataclass(frozen=True)
class Subject:
    """A network with its input, and the space that its job asks for."""

    builder: Builder
    spec: InputSpec
    space: Space
    profile: Profile


def subject(
    name: str,
    *,
    shape: Shape | None = None,
    dtype: str | None = None,
    classes: int | None = None,
    profile: str | None = None,
) -> Subject:
    """What a network's name or the path of a job means. The profile is the job's first, or `local-1t`.

    Raises UserError for what is not there, for a network that does not run on the input, for a shape beside a job.
    """
    if is_job(name):
        if shape or dtype or classes:
            raise UserError(
                f"{name}: the job's task says what its network is fed; leave --shape, --dtype and --classes out"
            )
        made = parts(load.job(name))
        target = resolve_local(load.profile(profile)) if profile else made.profiles[0]
        return Subject(made.builder, made.task.input, made.space, target)
    target = resolve_local(load.profile(profile or "local-1t"))
    builder, spec = network(name, shape, dtype, classes)
    try:
        builder.sites()
    except UserError as error:
        if shape is not None or is_own(name):
            raise
        raise UserError(f"{error}; say what it is fed, e.g. --shape 3,32,32") from error
    return Subject(builder, spec, auto.targeted(builder, (target,)), target)


def is_job(name: str) -> bool:
    """Whether a job file is meant rather than a network."""
    return name.endswith((".yaml", ".yml"))


def is_own(name: str) -> bool:
    """A builder that knows its own input."""
    return name in registry.BUILT_IN["builder"]


def network(name: str, shape: Shape | None, dtype: str | None, classes: int | None) -> tuple[Builder, InputSpec]:
    """A network by name and what it is fed. Raises UserError."""
    if dtype is not None and dtype not in TYPES:
        raise UserError(f"--dtype {dtype}: {suggest(dtype, TYPES)}")
    options = options_of(name, shape, classes)
    usual = None if is_own(name) else usual_input(name, options)
    spec = usual or InputSpec(shape=PICTURE)
    spec = spec.model_copy(update={"shape": shape or spec.shape, "dtype": dtype or spec.dtype})
    builder = make_builder(name, spec, options)
    if is_own(name):
        own: Any = builder
        spec = InputSpec(shape=(own.in_channels, *own.size))
    return builder, spec


def options_of(name: str, shape: Shape | None, classes: int | None) -> dict[str, Any]:
    """What a network's function is told of input and classes, in its own words."""
    if is_own(name):
        channels = {} if shape is None else {"in_channels": shape[0], "size": list(shape[1:])}
        return channels | ({} if classes is None else {"classes": classes})
    word = "num_labels" if name.startswith("hf:") else "num_classes"
    return {} if classes is None else {word: classes}


# --- a job to start from --------------------------------------------------------------------------------------------

TEXT = Template("""\
# A search for smaller and faster versions of $model.
#   autocompress check $file      says what is wrong with this file, or how long the search will take
#   autocompress search $file     runs it; Ctrl-C and `autocompress resume $out` go on later
task: $task
$data
model:
  builder: $model
$options  # weights: trained.safetensors     # or .pt: your trained network; without it, it is trained for `epochs`
  epochs: 8
space: auto                          # derived from the network; `autocompress space $file` shows it
devices:                             # one budget per target (`autocompress profiles`); also latency_ms, size_mb
  - {profile: local-1t, speedup: 2}  # at least twice as fast as the uncompressed file, one thread of this machine
quality: {metric: accuracy, max_drop: 0.01}   # at most one point lost
search:
  searcher: evolution                # or portfolio, policy_gradient, gradient, random; optuna (an extra)
  seed: 0
  probe: 60                          # seconds for trying the choices of the derived space one by one beforehand
  fidelity: {full_epochs: 10, rungs: [0.3, 1.0]}   # training of a candidate; weak ones end at the first rung
  cost: {trials: 100, minutes: 60}   # the search ends at whichever comes first
$place
""")
DATA = {
    "images": """\
data:
  path: photos                       # photos/train/CLASS/*.jpg and photos/val/CLASS/*.jpg, an .npz, or idx files
  size: $size
  augment: crop""",
    "text": """\
data:
  path: texts                        # texts/train.tsv and texts/test.tsv: a text and its class per line
  tokenizer: tokenizer.json          # of the `tokenizers` library, as Hugging Face saves it
  length: $size""",
    "digits": "# The task needs no data: 8 x 8 digits come with scikit-learn.",
}
OWN = "data: {}                            # keyword arguments of your task"


def job_text(
    name: str,
    *,
    task: str | None = None,
    shape: Shape | None = None,
    classes: int | None = None,
    file: str = "job.yaml",
) -> str:
    """A job file for a network: what to fill in stands in comments.

    Raises UserError for a network or a task that is not there.
    """
    registry.check("builder", name)
    builder, spec = network(name, shape, None, classes)
    if not name.startswith("hf:"):  # a folder may not be there yet
        builder.build({})
    chosen = task or usual_task(name, spec)
    registry.check("task", chosen)
    options = options_of(name, shape, classes)
    out = flow(f"runs/{stem(name)}")
    values: Mapping[str, str] = {
        "model": flow(name),
        "file": file,
        "task": flow(chosen),
        "data": Template(DATA.get(chosen, OWN)).substitute(size=size(spec)),
        "options": f"  options: {flow(options)}\n" if options else "",
        "out": out,
        "place": f"out: {out}".ljust(36) + " # relative to the current folder",
    }
    return TEXT.substitute(values)


def usual_task(name: str, spec: InputSpec) -> str:
    """The built-in task that such a network is for."""
    if is_own(name):
        return "digits"
    return "images" if spec.dtype == "float32" else "text"


def size(spec: InputSpec) -> str:
    """Pixels of a side, or tokens."""
    sides = spec.shape[1:] or spec.shape
    return str(sides[0]) if len(set(sides)) == 1 else flow(list(sides))


def stem(name: str) -> str:
    """A folder's name out of a network's: `torchvision:resnet18` gives `resnet18`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name.rpartition(":")[2]).name).strip("-.") or "search"


def write_new(path: Path, text: str, *, force: bool) -> None:
    """Write a file that is not there yet. Raises UserError if it is and `force` is not given."""
    if path.exists() and not force:
        raise UserError(f"{path} is there already; choose another name by --out, or --force to write over it")
    write_atomic(path, text.encode())
