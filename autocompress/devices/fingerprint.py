"""What identifies this host for a reading, and the numeric settings that suit its processor."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from autocompress.types import Numeric, Profile, UserError

FLAGS = frozenset(
    {"avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"}
    | {"avx_vnni_int8", "amx_tile", "amx_int8", "amx_bf16"}
    | {"asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"}
)
VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
X86 = frozenset({"x86_64", "amd64", "i686"})
ARM = frozenset({"aarch64", "arm64"})


def host(root: Path = Path("/")) -> dict[str, Any]:
    """Processor, its flags of interest, cores, memory, kernel and governor, as JSON. `root` is for tests."""
    name, flags = _processor(root)
    governor = root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    return {
        "processor": name,
        "machine": platform.machine().lower(),
        "flags": sorted(flags & FLAGS),
        "cores": psutil.cpu_count(logical=True) or 1,
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
        "kernel": platform.release(),
        "governor": governor.read_text().strip() if governor.is_file() else None,
    }


def short(facts: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for a fingerprint in readings and cache keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def resolve_local(profile: Profile, facts: Mapping[str, Any] | None = None) -> Profile:
    """Fill in what a `local` profile leaves open, for this host; a profile that states `numeric` is returned as it is.

    x86: uint8 activations with int8 weights, which is what fuses there; without VNNI its multiply-add saturates at
    16 bit, so weights keep 7 bits (`reduce_range`). Arm: int8 activations and weights, which do not saturate.
    Source: onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "Method selection" and "When to use
    reduce-range and per-channel quantization". Idempotent.
    """
    if profile.device != "local" or "numeric" in profile.model_fields_set:
        return profile
    seen = host() if facts is None else facts
    if seen["machine"] in ARM:
        numeric = Numeric(activation="int8", reduce_range=False)
    else:
        numeric = Numeric(activation="uint8", reduce_range=not VNNI & set(seen["flags"]))
    return profile.model_copy(update={"numeric": numeric})


def check_expects(profile: Profile, facts: Mapping[str, Any]) -> None:
    """Raise UserError where a reading would not speak of the profile's target. `a|b` in `expects` means either."""
    flags = set(facts["flags"])
    for wanted in profile.expects:
        if not flags & set(wanted.split("|")):
            raise UserError(
                f"profile {profile.name!r} expects a processor with {wanted.replace('|', ' or ')}, which this one "
                f"({facts['processor']}) is not; measure on such a machine or use `local-1t`"
            )


def _processor(root: Path) -> tuple[str, set[str]]:
    """Model name and all flags, as Linux or macOS tell them."""
    listing = root / "proc/cpuinfo"
    if listing.is_file():
        rows = [line.partition(":") for line in listing.read_text().splitlines()]
        pairs = {key.strip().lower(): value.strip() for key, _, value in reversed(rows)}
        name = pairs.get("model name") or pairs.get("cpu part") or platform.machine()
        return name, set((pairs.get("flags") or pairs.get("features") or "").split())
    if platform.system() == "Darwin":
        told = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return told.stdout.strip() or platform.machine(), {"asimd", "asimddp"} if platform.machine() in ARM else set()
    return platform.processor() or platform.machine(), set()
