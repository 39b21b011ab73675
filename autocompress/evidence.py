"""What a certificate rests on beside times: quality on the device's provider, answers to compare (floor F5)."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from autocompress import export
from autocompress.certify import Checked
from autocompress.devices.fingerprint import host
from autocompress.tasks import InputSpec, Task, several
from autocompress.types import Profile, Quality, UserError

SAMPLES = 2  # in a pair
MOST = 4096  # numbers of one sample's answer that are kept
STEP = 1 / 64  # inputs are whole multiples of it in [-2, 2)


def quality(
    task: Task, model: bytes, profile: Profile, known: Quality | None = None, there: Mapping[str, Any] | None = None
) -> tuple[Quality, Checked]:
    """Quality on the whole selection split, on the profile's own provider where its device is this host.

    A device that only times files (ssh, adb, a plug-in) answers nothing: `known`, or the quality on this host's
    processor, stands for it, and Checked says so. Files differ per processor where 8-bit products saturate.
    `there` is the device's fingerprint, for its name. Raises TrialFailure if the file does not run.
    """
    local = profile.device == "local"
    found = known
    if local or found is None:
        found = task.quality(export.predictor(model, profile=profile if local else None), "selection")
    processor = str((there or {}).get("processor", "")) if local else ""
    return found, Checked(
        provider=profile.provider if local else "CPUExecutionProvider",
        processor=processor or str(host()["processor"]),
        on_device=local,
        samples=found.samples,
    )


def inputs_of(spec: InputSpec) -> dict[str, NDArray[np.int8]]:
    """Seeded inputs by name, in steps of STEP where they are floats; 0 and 1 are tokens of any table."""
    rng = np.random.default_rng(0)
    found: dict[str, NDArray[np.int8]] = {}
    for one in spec.every:
        low, high = (-128, 128) if _is_float(one.dtype) else (0, 2)
        found[one.name] = rng.integers(low, high, (SAMPLES, *one.shape)).astype(np.int8)
    return found


def pair(spec: InputSpec, models: Mapping[str, bytes]) -> bytes:
    """An .npz of seeded inputs and what each model (file name -> bytes) answers on this host's processor.

    Arrays `input:NAME` in whole steps, `output:FILE:INDEX`, the first MOST numbers per sample. Equal models give equal
    bytes on equal processors. Raises TrialFailure if a model does not run.
    """
    steps = inputs_of(spec)
    arrays: dict[str, NDArray[Any]] = {f"input:{name}": values for name, values in steps.items()}
    for name, model in models.items():
        for index, answer in enumerate(_answers(spec, steps, model)):
            arrays[f"output:{name}:{index}"] = answer
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **cast("dict[str, Any]", arrays))
    return buffer.getvalue()


def disagreement(data: bytes, spec: InputSpec, name: str, model: bytes) -> float:
    """Largest relative difference of a model's answers to those that a pair has of the file `name`.

    Raises UserError for a pair that is damaged or of another network, TrialFailure if the model does not run.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            steps = {one.name: file[f"input:{one.name}"] for one in spec.every}
            kept = [file[key] for key in sorted(file.files, key=_index) if key.startswith(f"output:{name}:")]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"check.npz: {' '.join(str(error).split())[:200]}") from error
    answers = _answers(spec, steps, model)
    if len(kept) != len(answers) or any(one.shape != two.shape for one, two in zip(kept, answers, strict=True)):
        raise UserError(f"check.npz: holds no answers of this shape for {name}")
    return max(differ(one, two) for one, two in zip(kept, answers, strict=True))


def differ(reference: NDArray[Any], found: NDArray[Any]) -> float:
    """Largest difference, as a share of the largest reference; infinite where one of them is not finite."""
    one, two = reference.astype(np.float64), found.astype(np.float64)
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        return 0.0 if np.array_equal(one, two, equal_nan=True) else float("inf")
    if not one.size:
        return 0.0
    return float(np.abs(one - two).max() / max(float(np.abs(one).max()), 1e-12))


def _index(key: str) -> int:
    last = key.rpartition(":")[2]
    return int(last) if last.isdecimal() else -1


def _is_float(dtype: str) -> bool:
    return "float" in dtype


def _answers(spec: InputSpec, steps: Mapping[str, NDArray[Any]], model: bytes) -> list[NDArray[Any]]:
    given = tuple(
        (steps[one.name] * STEP if _is_float(one.dtype) else steps[one.name]).astype(one.dtype) for one in spec.every
    )
    found = several(export.predictor(model)(given[0] if len(given) == 1 else given))
    return [np.asarray(one).reshape(len(one), -1)[:, :MOST] for one in found]
