"""What a certificate rests on: single runs, quality on the device's provider, answers to compare (floor F5)."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from autocompress import export
from autocompress.certify import Certificate, Checked, pool
from autocompress.devices.fingerprint import host
from autocompress.devices.statistics import figures
from autocompress.tasks import InputSpec, Predict, Task, several
from autocompress.types import Interval, Profile, Quality, Reading, Runs, UserError

SAMPLES = 2  # in a pair
MOST = 4096  # numbers of one sample's answer that are kept
STEP = 1 / 64  # inputs are whole multiples of it in [-2, 2)


def quality(
    task: Task,
    model: bytes,
    profile: Profile,
    known: Quality | None = None,
    there: Mapping[str, Any] | None = None,
    predict: Predict | None = None,
) -> tuple[Quality, Checked]:
    """Quality on the whole selection split, by the device's own answers: on this host the profile's provider gives
    them, from elsewhere `predict` fetches them (`Station.predictor`).

    For a device that only times files (a plug-in may) `known`, or the quality on this host's processor, stands, and
    Checked says so. Files differ per processor where 8-bit products saturate. `there` is the device's fingerprint, for
    its name. Raises TrialFailure if the file does not run, Unreachable if the device does not answer.
    """
    local = profile.device == "local"
    own = local or predict is not None
    found = known
    if predict is not None:
        found = task.quality(predict, "selection")
    elif local or found is None:
        found = task.quality(export.predictor(model, profile=profile if local else None), "selection")
    processor = str((there or {}).get("processor", "")) if own else ""
    return found, Checked(
        provider=profile.provider if own else "CPUExecutionProvider",
        processor=processor or str(host()["processor"]),
        on_device=own,
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


NS = 1e6  # nanoseconds of a millisecond, which runs are kept in
FIGURES = ("ms", "baseline_ms", "ratio", "p50_ms", "p95_ms", "p99_ms", "worst_ms")
ALIKE = 1e-6  # relative: what keeping whole nanoseconds may change


def samples(proof: Certificate) -> bytes | None:
    """The .npz of a certificate's single runs, None where its sessions have none.

    Arrays `PROFILE:SESSION:FILE` in whole nanoseconds and in the order taken, `PROFILE:SESSION:FILE:blocks` how many of
    them are in each block; FILE is `model` or `baseline`. `PROFILE:SESSION:inputs` is there where a model was timed
    with so many real samples in turn. Equal runs give equal bytes.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for profile, sessions in proof.each.items():
        for index, reading in enumerate(sessions):
            if reading.runs is None:
                continue
            for name, blocks in (("model", reading.runs.model), ("baseline", reading.runs.baseline)):
                flat = np.rint(np.array([ms for block in blocks for ms in block]) * NS).astype(np.uint64)
                key = f"{profile}:{index}:{name}"
                if name == "model" and reading.runs.inputs:
                    arrays[f"{profile}:{index}:inputs"] = _small(np.array([reading.runs.inputs]))
                arrays[key] = _small(flat)
                arrays[f"{key}:blocks"] = _small(np.array([len(block) for block in blocks]))
    if not arrays:
        return None
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **cast("dict[str, Any]", arrays))
    return buffer.getvalue()


def _small(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def follows(data: bytes, proof: Certificate) -> tuple[int, str]:
    """How many runs of the shipped file there are, and the first figure of the certificate they do not give, if any.

    Raises UserError for a file that is damaged or holds other sessions.
    """
    total = 0
    for profile, sessions in proof.each.items():
        for index, reading in enumerate(sessions):
            runs = _runs(data, profile, index)
            total += sum(map(len, runs.model))
            if wrong := _unlike(reading, figures(runs)):
                return total, f"session {index + 1} on {profile}: {wrong}"
        pooled = pool(sessions)
        if wrong := _unlike(proof.readings[profile], {name: getattr(pooled, name) for name in FIGURES}):
            return total, f"sessions on {profile} together: {wrong}"
    return total, ""


def _runs(data: bytes, profile: str, index: int) -> Runs:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            inputs = int(file[key][0]) if (key := f"{profile}:{index}:inputs") in file.files else 0
            model, baseline = (
                _blocks(file[f"{profile}:{index}:{name}"] / NS, file[f"{profile}:{index}:{name}:blocks"])
                for name in ("model", "baseline")
            )
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"samples.npz: {' '.join(str(error).split())[:200]}") from error
    if not model or len(model) != len(baseline) or not all((*model, *baseline)):
        raise UserError(f"samples.npz: session {index + 1} on {profile} is incomplete")
    return Runs(model=model, baseline=baseline, inputs=inputs)


def _blocks(times: NDArray[Any], lengths: NDArray[Any]) -> tuple[tuple[float, ...], ...]:
    if int(lengths.sum()) != len(times):
        raise ValueError("blocks and runs do not agree")
    return tuple(tuple(part.tolist()) for part in np.split(times, np.cumsum(lengths.astype(np.int64))[:-1]))


def _unlike(reading: Reading, found: Mapping[str, Interval | float | None]) -> str:
    """The first figure of a reading that is another than `found`."""
    for name in FIGURES:
        stated, made = _numbers(getattr(reading, name)), _numbers(found.get(name))
        if stated and not made:
            return f"{name} {stated[0]:.6g} is stated, no real inputs were timed"
        if stated and not all(math.isclose(a, b, rel_tol=ALIKE) for a, b in zip(stated, made, strict=True)):
            return f"{name} {stated[0]:.6g} is stated, {made[0]:.6g} follows"
    return ""


def _numbers(figure: Interval | float | None) -> tuple[float, ...]:
    """The value first; empty where nothing is known."""
    if isinstance(figure, Interval):
        return figure.value, figure.low, figure.high
    return () if figure is None else (figure,)


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
