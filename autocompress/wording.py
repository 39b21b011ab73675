"""How a policy, a speed-up and a drop are said to a reader, the same in the terminal, the report and the summary."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from autocompress.pareto import tails
from autocompress.types import Budget, Candidate, Reading

TIMES, DASH, MINUS = "\u00d7", "\u2013", "\u2212"  # as printed; the source stays free of look-alikes
MAIN = {
    "prune": "ratio",
    "block": "kind",
    "replace": "kind",
    "lowrank": "rank",
    "sparsify": "ratio",
    "qat": "bits",
    "quantize": "bits",
    "distill": "weight",
    "store": "codec",
}
"""The parameter of a built-in op that says whether and how much; the others say how."""
BESIDE = (
    ("weights", "int4", "4-bit weights"),
    ("equalize", True, "equalized"),
    ("correct_bias", True, "biases corrected"),
)
"""What `quantize` may ask beside or without bits, and its words."""
_ALONE: tuple[Any, ...] = (None, "keep", "float", "none", 0.0, False)
_SAID = {"drop": "drop block", "merge": "merge block"}


def asks(op: str, settings: Mapping[str, Any]) -> bool:
    """Whether a rule asks for anything: its main parameter, or what stands without one, leaves its first value."""
    if op not in MAIN:
        return True
    main = settings.get(MAIN[op])
    if op == "lowrank":
        return main is not None and main != 1.0
    more = op == "quantize" and any(settings.get(key) == value for key, value, _ in BESIDE)
    pattern = op == "sparsify" and settings.get("pattern", "unstructured") != "unstructured"
    return main not in _ALONE or more or (pattern and main is None)


def describe(candidate: Candidate, parent_arch: Mapping[str, Any] | None = None) -> str:
    """A candidate in a few words: changed knobs, then how many rules ask for each setting, and within which range."""
    base = parent_arch or {}
    knobs = [f"{name} {_short(value)}" for name, value in candidate.arch.items() if base.get(name) != value]
    groups: dict[str, list[Any]] = {}
    for rule in candidate.policy.rules:
        if asks(rule.op, rule.settings):
            for name, amount in _named(rule.op, rule.settings):
                groups.setdefault(name, []).append(amount)
    return " · ".join([*knobs, *(_group(name, amounts) for name, amounts in groups.items())]) or "unchanged"


def _named(op: str, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """A rule under the words that a reader knows it by, each with its amount or None."""
    main = settings.get(MAIN.get(op, ""))
    if op == "quantize":
        found = [(_short(main), None)] if main not in _ALONE else []
        return found + [(words, None) for key, value, words in BESIDE if settings.get(key) == value]
    if op == "block":
        return [(_SAID.get(str(main), f"block {main}"), None)]
    if op in ("replace", "store", "qat"):
        return [(f"{op} {main}", None)]
    kinds = {"lowrank": ("method", "svd"), "distill": ("kind", "response"), "sparsify": ("pattern", "unstructured")}
    key, usual = kinds.get(op, ("", ""))
    how = settings.get(key, usual)
    amount = main if op in MAIN else next(iter(settings.values()), None)
    return [(op if how == usual else f"{op} {how}", amount)]


def _group(name: str, amounts: Sequence[Any]) -> str:
    """`prune x5 (0.25-0.5)`: how many rules, and the range of the amounts where they are numbers."""
    numbers = [one for one in amounts if isinstance(one, (int, float)) and not isinstance(one, bool)]
    if len(amounts) == 1:
        return f"{name} {_short(numbers[0])}" if numbers else name
    low, high = (min(numbers), max(numbers)) if numbers else (0, 0)
    spread = f" ({_short(low)})" if low == high else f" ({_short(low)}{DASH}{_short(high)})"
    return f"{name} {TIMES}{len(amounts)}" + (spread if numbers else "")


def wish(budget: Budget) -> str:
    """What a budget asks for: `2.5x, p95 4 ms`."""
    said = {
        "latency_ms": "{:g} ms",
        "p50_ms": "p50 {:g} ms",
        "p95_ms": "p95 {:g} ms",
        "p99_ms": "p99 {:g} ms",
        "worst_ms": "worst {:g} ms",
        "speedup": "{:g}" + TIMES,
        "throughput": "{:g}/s",
        "size_mb": "{:g} MB",
        "memory_mb": "{:g} MB in memory",
    }
    parts = [words.format(asked) for name, words in said.items() if (asked := getattr(budget, name)) is not None]
    return ", ".join(parts) or "none"


def beyond(reading: Reading, budget: Budget, size_mb: float | None, bounds: Collection[str]) -> str:
    """What of a file is beyond these bounds of a budget, and what is asked: `3.10x (5x), 0.832 MB (0.342 MB)`."""
    found = {
        "latency_ms": f"{reading.ms.value:.3g} ms",
        **{
            name: f"{name.removesuffix('_ms')} {'unknown' if value is None else f'{value:.3g} ms'}"
            for name, (value, _) in tails(reading).items()
        },
        "speedup": times(reading.speedup),
        "throughput": f"{reading.throughput.value:.3g}/s",
        "size_mb": "size unknown" if size_mb is None else f"{size_mb:.3g} MB",
        "memory_mb": "memory unknown" if reading.memory_mb is None else f"{reading.memory_mb:.3g} MB in memory",
    }
    parts = [
        f"{found[name]} ({wish(Budget.model_validate({'profile': budget.profile, name: getattr(budget, name)}))})"
        for name in found
        if name in bounds
    ]
    return ", ".join(parts)


def times(speedup: float) -> str:
    """`4.12x`."""
    return f"{speedup:.2f}{TIMES}" if speedup < 100 else f"{speedup:.0f}{TIMES}"


def lost(value: float, quality: float) -> str:
    """A drop for the eye: points (hundredths) where the metric is a share, else its own unit."""
    return f"{100 * value:.2f} pt".replace("-", MINUS) if abs(quality) <= 1 and abs(value) <= 1 else f"{value:.4g}"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
