"""What identifies this host for a reading, and the numeric settings that suit its processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autocompress.devices import there
from autocompress.devices.cores import all_threads
from autocompress.types import Numeric, Profile, UserError

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
X86 = frozenset({"x86_64", "amd64", "i686"})
ARM = frozenset({"aarch64", "arm64"})
CHANGING = frozenset({"onnxruntime", "provider", "providers", "kernel", "governor", "python", "numpy", "bench"})
"""Facts of a fingerprint that an update or a setting changes, and that leave the device the same."""


def host(root: Path = Path("/")) -> dict[str, Any]:
    """Processor, its flags of interest, cores, memory, kernel and governor, as JSON. `root` is for tests."""
    return there.facts(root)  # as every other target tells them


def short(facts: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for a fingerprint in readings and cache keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def identity(facts: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for the device alone, whatever runtime or kernel it has today.

    Two boards of the same make and memory have the same: a reading on one speaks of the other.
    """
    return short({key: value for key, value in facts.items() if key not in CHANGING})


def check_same(profile: Profile, facts: Mapping[str, Any], *, as_is: bool = False) -> bool:
    """Whether this is the device that the profile was made for; a profile without a fingerprint fits any.

    Raises UserError for another device, unless it is taken `as_is`.
    """
    found = identity(facts)
    if not profile.fingerprint or found == profile.fingerprint:
        return True
    if not as_is:
        raise UserError(
            f"profile {profile.name!r} was made for another device (fingerprint {profile.fingerprint}, this one has "
            f"{found}: {facts.get('processor', 'unknown processor')}); add this one by `autocompress device add`, or "
            "measure on it all the same by --as-is"
        )
    return False


def suited(facts: Mapping[str, Any]) -> Numeric:
    """How integers are best computed on a processor, as far as its facts tell; a survey finds out by trying.

    x86: uint8 activations with int8 weights, which is what fuses there; without VNNI its multiply-add saturates at
    16 bit, so weights keep 7 bits (`reduce_range`). Arm: int8 activations and weights, which do not saturate.
    Source: onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "Method selection" and "When to use
    reduce-range and per-channel quantization".
    """
    if facts.get("machine") in ARM:
        return Numeric(activation="int8", reduce_range=False)
    return Numeric(activation="uint8", reduce_range=not VNNI & set(facts.get("flags", ())))


def resolve_local(profile: Profile, facts: Mapping[str, Any] | None = None) -> Profile:
    """Fill in what a `local` profile leaves open, for this host: `threads`, if 0, and `numeric`, if it is not stated.

    Idempotent; profiles of other hosts are returned as they are.
    """
    if profile.device != "local":
        return profile
    changes: dict[str, Any] = {} if profile.threads else {"threads": all_threads()}
    if "numeric" not in profile.model_fields_set:
        changes["numeric"] = suited(host() if facts is None else facts)
    return profile.model_copy(update=changes) if changes else profile


def check_expects(profile: Profile, facts: Mapping[str, Any]) -> None:
    """Raise UserError where a reading would not speak of the profile's target.

    `expects` names flags of the processor, its architecture (`aarch64`) or the system (`darwin`): `a|b` means either,
    `!a` that it must not have it.
    """
    told = {*facts.get("flags", ()), facts.get("machine"), str(facts.get("system", "")).lower()}
    for wanted in profile.expects:
        absent, names = wanted.startswith("!"), wanted.removeprefix("!")
        if bool(told & set(names.split("|"))) == absent:
            raise UserError(
                f"profile {profile.name!r} expects a processor {'without' if absent else 'with'} "
                f"{names.replace('|', ' or ')}, which this one ({facts.get('processor', 'unknown')}) is not; "
                "measure on such a machine or use `local-1t`"
            )
