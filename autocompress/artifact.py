"""What ships: a folder with the ONNX file, its weights, the policy that made it, and a manifest that vouches for them.

A folder appears whole or not at all. Reading checks every hash and never executes code: tensors come as safetensors,
ops of a policy resolve from the built-in list, and the builder is named but never imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save as save_tensors

from autocompress import onnxfile, registry
from autocompress.certify import Certificate
from autocompress.tasks import InputSpec
from autocompress.types import (
    Choice,
    Genotype,
    Goal,
    Interval,
    Point,
    Policy,
    Profile,
    Quality,
    Reading,
    Receipt,
    Record,
    Site,
    UserError,
)

if TYPE_CHECKING:
    from torch import Tensor

MODEL, WEIGHTS, POLICY, MANIFEST, INFER = (
    "model.onnx",
    "weights.safetensors",
    "policy.json",
    "manifest.json",
    "infer.py",
)
STORED, OPTIMIZED, CHECK, SAMPLES = "model.store", "optimized.onnx", "check.npz", "samples.npz"
"""Beside the model: its weights as a `store` rule packs them, the file as onnxruntime runs it on this host, a few
inputs with the models' answers (`evidence.pair`), and the certificate's single runs (`evidence.samples`)."""
_VARIANT = re.compile(r"model-[A-Za-z0-9._-]+\.onnx")
_SHOWN = 3  # differences listed before "and N more"
_R = TypeVar("_R", bound=Record)


class PolicyFile(Record):
    """policy.json: what to do again to the next checkpoint of the same network, and what exactly was done to this one.

    `sites` is the fingerprint of the unmodified network. Receipts hold facts alone; what was fitted or trained is in
    weights.safetensors.
    """

    format: Literal[1] = 1
    builder: str
    arch: dict[str, Choice] = {}
    parent_arch: dict[str, Choice] = {}  # knobs of the unmodified network
    policy: Policy = Policy()
    receipts: tuple[Receipt, ...] = ()  # of structure ops
    numeric: dict[str, tuple[Receipt, ...]] = {}  # of numeric ops, by variant
    sites: tuple[Site, ...] = ()


class BaselineFigures(Record):
    """The uncompressed file, for comparison. Sizes in MB (1e6 bytes)."""

    sha256: str = ""  # by which `verify` knows it again

    selection: Quality | None = None
    test: Quality | None = None
    readings: dict[str, Reading] = {}
    size_mb: float = 0.0
    macs: int = 0
    parameters: int = 0


class Manifest(Record):
    """manifest.json. `files` maps each file's name to its sha256; `models` says which file serves which profile."""

    format: Literal[1] = 1
    goal: Goal
    certificate: Certificate
    input: InputSpec
    task: str
    builder: str  # named, never imported
    files: dict[str, str] = {}
    models: dict[str, str] = {}
    profiles: tuple[Profile, ...] = ()  # as they were resolved on the measuring host
    epochs: float = 0.0  # of the full fine-tuning
    number: int = Field(default=0, ge=0)
    genotype: Genotype = ()
    seed: int = 0
    selection: dict[str, Quality] = {}  # per profile
    test: dict[str, Quality] = {}  # per profile, read once
    lost: dict[str, Interval] = {}  # of that, sample by sample, where the task tells how each fares
    size_mb: dict[str, float] = {}
    macs: int = 0
    parameters: int = 0
    baseline: BaselineFigures = BaselineFigures()
    fingerprints: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    exporter: str = ""
    opset: int = 0
    parity: float | None = None  # relative error of the float file against torch
    thresholds: tuple[Point, ...] = ()  # what a file that decides by its input trades where its thresholds are moved
    fused: dict[str, int] = {}  # nodes that onnxruntime's optimizer makes (positive) of those that go (negative)
    job: dict[str, Any] = {}


@dataclass(frozen=True)
class Artifact:
    """A folder that was read and found whole."""

    folder: Path
    manifest: Manifest
    policy: PolicyFile

    def model(self, profile: str | None = None) -> Path:
        """The ONNX file, or the one that serves `profile`."""
        if profile is None:
            return self.folder / MODEL
        if profile not in self.manifest.models:
            known = ", ".join(self.manifest.models) or "none"
            raise UserError(f"{self.folder}: no model for profile {profile!r} (it serves: {known})")
        return self.folder / self.manifest.models[profile]

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the compressed torch model (safetensors, no code)."""
        path = self.folder / WEIGHTS
        try:
            return load_tensors(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({_line(error)})") from error


def versions() -> dict[str, str]:
    """Versions that decide whether files come out byte-equal."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("autocompress", "torch", "onnx", "onnxruntime", "torch-pruning", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


# --- writing ------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    *,
    model: bytes,
    weights: Mapping[str, Tensor] | bytes,
    policy: PolicyFile,
    manifest: Manifest,
    variants: Mapping[str, bytes] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> Artifact:
    """Write an artifact whole: into a folder beside it, then renamed into place.

    `weights` may come as safetensors bytes already; `variants` are further ONNX files by name (`model-<variant>.onnx`)
    where one file does not serve every device, and the manifest's `models` says which is whose; `beside` are STORED,
    OPTIMIZED, CHECK and SAMPLES where there are such. Weights of a large file go into one of their own,
    `model.onnx.data`, which the manifest vouches for too. Hashes are filled in here. An artifact of an earlier run is
    replaced, files in it that are not ours are kept. Raises UserError if the folder holds something else or cannot be
    written.
    """
    for name in variants or {}:
        if not _VARIANT.fullmatch(name):
            raise UserError(f"{name!r} is not a file name of a variant: use model-<variant>.onnx")
    for name in beside or {}:
        if name not in (allowed := (STORED, OPTIMIZED, CHECK, SAMPLES)):
            raise UserError(f"{name!r} is no file of an artifact: use {', '.join(allowed)}")
    files: dict[str, bytes | memoryview] = {}
    for name, data in {MODEL: model, **(variants or {}), **(beside or {})}.items():
        files |= onnxfile.files(name, data)
    files[WEIGHTS] = weights if isinstance(weights, bytes) else _tensors(weights)
    files[POLICY] = _json(policy)
    files[INFER] = resources.files("autocompress").joinpath("templates/infer.py.txt").read_bytes()
    models = manifest.models or {budget.profile: MODEL for budget in manifest.goal.budgets}
    for profile, name in models.items():
        if name not in files:
            raise UserError(f"the manifest gives {profile} the file {name!r}, which is not written")
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    complete = manifest.model_copy(update={"files": hashes, "models": models})
    files[MANIFEST] = _json(complete)
    _place(folder, files)
    return Artifact(folder, complete, policy)


def _tensors(weights: Mapping[str, Tensor]) -> bytes:
    # safetensors refuses tensors that share memory, which tied weights do: each is written on its own.
    return save_tensors({name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()})


def _json(record: Record) -> bytes:
    return (json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def check_place(folder: Path) -> None:
    """Raise UserError if an artifact may not be written there: it is a file, or a folder of something else."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).is_file())):
        raise UserError(f"{folder}: holds something else than an artifact; name another folder")


def _place(folder: Path, files: Mapping[str, bytes | memoryview]) -> None:
    """Rename a complete folder into place; what stood there is moved aside first and removed last."""
    folder = folder.absolute()
    check_place(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            fresh, aside = scratch / "new", scratch / "old"
            fresh.mkdir()
            for name, data in files.items():
                _write_synced(fresh / name, data)
            if folder.exists():
                _keep_strangers(folder, fresh)
                folder.rename(aside)
                try:
                    fresh.rename(folder)
                except OSError:
                    aside.rename(folder)
                    raise
            else:
                fresh.rename(folder)
            _sync_folder(folder.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _keep_strangers(old: Path, fresh: Path) -> None:
    try:
        ours = set(Manifest.model_validate_json((old / MANIFEST).read_bytes()).files)
    except ValidationError:
        ours = set[str]()
    for path in old.iterdir():
        if path.name in ours or (fresh / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- reading ------------------------------------------------------------------------------------------------------


def read(folder: Path, *, trust: Sequence[str] = ()) -> Artifact:
    """Read an artifact and check every hash; `trust` as for `read_policy`.

    Raises UserError naming the file that is missing, changed or not ours.
    """
    manifest = read_manifest(folder)
    for problem in problems(folder, manifest):
        raise UserError(problem)
    policy_bytes = _bytes(folder / POLICY)
    if hashlib.sha256(policy_bytes).hexdigest() != manifest.files[POLICY]:  # what was hashed is what is parsed
        raise UserError(f"{folder / POLICY}: changed while it was read")
    for profile, name in manifest.models.items():
        if name not in manifest.files:
            raise UserError(f"{folder / MANIFEST}: the model of {profile} is {name!r}, which it does not vouch for")
    if missing := [one.name for one in manifest.profiles if one.name not in manifest.models]:
        raise UserError(f"{folder / MANIFEST}: names no model for {missing[0]}")
    policy = read_policy(policy_bytes, str(folder / POLICY), trust=trust)
    if policy.builder != manifest.builder:
        raise UserError(f"{folder}: policy and manifest name different builders ({policy.builder}, {manifest.builder})")
    return Artifact(folder, manifest, policy)


def read_manifest(folder: Path) -> Manifest:
    """A manifest alone; its files are not looked at. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; an artifact is a folder such as OUT/best/DEVICE")
    manifest = _record(Manifest, _bytes(folder / MANIFEST), str(folder / MANIFEST))
    for name in (MODEL, WEIGHTS, POLICY):
        if name not in manifest.files:
            raise UserError(f"{folder / MANIFEST}: says nothing about {name}")
    return manifest


def problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """One line for every file that is missing, unreadable or not what the manifest vouches for."""
    for name, sha in manifest.files.items():
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            yield f"{folder / MANIFEST}: {name!r} is not a plain file name"
            continue
        try:
            if _hash(folder / name) != sha:
                yield f"{folder / name}: changed since it was written (its sha256 is not the manifest's)"
        except UserError as error:
            yield str(error)


def read_policy(data: bytes, where: str = POLICY, *, trust: Sequence[str] = ()) -> PolicyFile:
    """A policy from untrusted JSON. Raises UserError, one line, for whatever is wrong; executes nothing.

    Every op must be an installed one. A `module:attr` is refused, or, if its package is in `trust`, left for the
    caller to import.
    """
    policy = look(data, where)
    receipts = [*policy.receipts, *(receipt for those in policy.numeric.values() for receipt in those)]
    named = [*(rule.op for rule in policy.policy.rules), *(receipt.op for receipt in receipts)]
    for op in dict.fromkeys(named):
        if ":" in op and op.partition(":")[0].partition(".")[0] in trust:
            continue
        try:
            registry.resolve("op", op, trusted=False)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return policy


def look(data: bytes, where: str = POLICY) -> PolicyFile:
    """A policy to be looked at, not applied: whatever ops it names. Raises UserError as `read_policy` does."""
    policy = _record(PolicyFile, data, where)
    seen: set[str] = set()
    for site in policy.sites:
        if site.name in seen:
            raise UserError(f"{where}: site {site.name!r} occurs twice")
        seen.add(site.name)
    return policy


def check_policy(policy: PolicyFile, sites: Sequence[Site]) -> None:
    """Raise UserError with the first few differences if the policy was made for another network than `sites`."""
    theirs = {site.name: site for site in policy.sites}
    ours = {site.name: site for site in sites}
    found = [f"no site {name!r} here" for name in theirs if name not in ours]
    found += [
        f"{name}: {_shape(theirs[name])} there, {_shape(ours[name])} here"
        for name in theirs
        if name in ours and _shape(theirs[name]) != _shape(ours[name])
    ]
    found += [f"site {name!r} is not in the policy's network" for name in ours if name not in theirs]
    known = set(theirs) | {"."}
    found += [
        f"rule of {rule.op!r} for {rule.site!r}, which its own network lacks"
        for rule in policy.policy.rules
        if rule.site not in known and not any(name.startswith(rule.site + ".") for name in theirs)
    ]
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UserError(f"this policy was made for another network: {'; '.join(found[:_SHOWN])}{more}")


def _shape(site: Site) -> str:
    return f"{site.kind} {site.in_channels}->{site.out_channels} kernel {site.kernel}"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _hash(path: Path) -> str:
    """A file's sha256, a large one not being held."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _record(kind: type[_R], data: bytes, where: str) -> _R:
    try:
        record = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UserError(f"{where}: {_line(f'{at}: ' if at else '')}{_line(first['msg'])}{more}") from None
    if not _finite(record.model_dump(mode="python")):
        raise UserError(f"{where}: a number is not finite")
    return record


def _finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(_finite(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_finite(item) for item in value)
    return True


def _line(error: object) -> str:
    """One printable line of whatever a library or a file said."""
    return "".join(char if char.isprintable() else " " for char in str(error))[:300]
