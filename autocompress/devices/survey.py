"""What pays on a target: types, activation type, saturation, steps of channels, ranks, noise, found by timing alone.

Everything goes through `Device.time`, so a survey works on whatever can time a file. A comparison is a ratio within one
window, with its 95 % interval; it `pays` where the whole interval lies below `EVEN` of one, `costs` above.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autocompress.devices import Device, TellsRoom, smallnets
from autocompress.devices.findings import EVEN, About, Advice, Bench, Finding, Middles, Sign, Survey
from autocompress.devices.fingerprint import identity
from autocompress.devices.smallnets import INTEGERS, TYPICAL, Kind
from autocompress.devices.statistics import drift, median
from autocompress.types import Interval, Profile, Record, TrialFailure

SECONDS = 30.0
WINDOWS = 5  # of a file against itself
PLENTY_MB = 2000.0  # free memory that no file is likely to fill
ROOM = 0.8  # share of the free memory that a file may take: others need some, too
WIDTHS = (16, 24, 28, 32, 40, 44, 48, 52, 56, 60, 62, 63, 64)
STEPS: dict[int, tuple[tuple[int, int], ...]] = {  # step -> a width between two of its multiples, and the upper one
    2: ((63, 64),),
    4: ((62, 64),),
    8: ((28, 32), (44, 48), (52, 56), (60, 64)),
    16: ((24, 32), (40, 48), (56, 64)),
    32: ((16, 32), (48, 64)),
}
RANKS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # of the full one
SHARES = {"noise": 0.15, "types": 0.4, "steps": 0.25, "ranks": 0.2}  # of the seconds
NAMES: dict[str, str] = {"u8s8": "int8 (u8s8)", "s8s8": "int8 (s8s8)"}
NARROW: tuple[Kind, ...] = ("float16", "bfloat16")
KINDS: tuple[Kind, ...] = ("float32", *INTEGERS, *NARROW)
FORMS: tuple[Literal["linear", "1x1"], ...] = ("linear", "1x1")

Say = Callable[[str], None]


def survey(
    device: Device,
    profile: Profile,
    *,
    seconds: float = SECONDS,
    cores: Sequence[int] = (),
    say: Say = lambda _: None,
) -> Survey:
    """Find out what pays on a device, in about `seconds` of timing and some more for loading and warm-up.

    `profile` is what is believed of it so far; what is found takes its place.
    Raises Unreachable, UserError for a provider that is not built in there, TrialFailure if not even float32 runs.
    """
    began = time.perf_counter()
    facts = device.fingerprint()
    with tempfile.TemporaryDirectory(prefix="autocompress-survey-") as folder:
        looking = _Looking(Bench(device, Path(folder), cores), profile, seconds, say)
        looking.look()
    found = looking.found(facts)
    return Survey(
        profile=found,
        facts=facts,
        findings=tuple(looking.findings),
        advice=tuple(looking.advice),
        seconds=round(time.perf_counter() - began, 1),
    )


class Quiet(Record):
    """A file against itself in several windows."""

    ratios: tuple[float, ...]
    drift: float  # from the first window to the last, as a share
    disturbed: float


def quiet(device: Device, batch: int = 1, *, seconds: float = 3.0, cores: Sequence[int] = ()) -> Quiet:
    """How well two readings of one file agree there now. Raises as `Device.time`."""
    model = smallnets.residual("float32", batch)
    with tempfile.TemporaryDirectory(prefix="autocompress-survey-") as folder:
        bench = Bench(device, Path(folder), cores)
        windows = [bench.middles({"one": model, "other": model}, seconds / WINDOWS)[0] for _ in range(WINDOWS)]
    ratios = [median((one["one"] / one["other"]).tolist()).value for one in windows]
    whole = [float(ms) for one in windows for ms in one["other"]]
    return Quiet(ratios=tuple(ratios), drift=drift(whole), disturbed=bench.disturbed)


@dataclass
class _Looking:
    """A survey as it goes on."""

    bench: Bench
    profile: Profile
    seconds: float
    say: Say
    findings: list[Finding] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)
    measured: dict[str, float | str] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def look(self) -> None:
        """All of it, one thing after the other."""
        self.say("clock and noise")
        self.clock()
        self.room()
        self.noise()
        for name in TYPICAL:
            self.say(f"types: {name}")
            self.types(name)
        self.say("activation type and saturation")
        integer = self.integers()
        self.say("steps of channels")
        self.steps(integer)
        for form in FORMS:
            self.say(f"low rank: {form}")
            self.ranks(form, integer)

    def clock(self) -> None:
        """The clock's step, and what a run costs that computes nothing."""
        path = self.bench.folder / "nothing.onnx"
        path.write_bytes(smallnets.nothing())
        samples = self.bench.device.time([path], rounds=20, seconds=0.3, cores=self.bench.cores)
        times = np.asarray(samples.times_ms[str(path)])
        gaps = np.diff(np.unique(np.round(times * 1e6)))  # nanoseconds
        step = float(gaps.min()) if len(gaps) else 0.0
        self.measured["clock_ns"] = step
        self.measured["empty_run_us"] = round(float(np.median(times)) * 1e3, 2)

    def room(self) -> None:
        """What a file may take in memory. Where there is plenty no limit is set: it costs a process per candidate."""
        device = self.bench.device
        free = device.room() if isinstance(device, TellsRoom) else None
        if free is None:
            return
        self.measured["free_mb"] = round(free)
        self.changes["memory_mb"] = limit = round(ROOM * free) or 1 if free < PLENTY_MB else None
        if limit:
            said = f"a file may take {limit} MB in memory: {free:.0f} MB are free there beside the runtime"
            self.tell("setting", said)

    def noise(self) -> None:
        """A file against itself, in several windows."""
        model = smallnets.residual("float32", self.profile.batch)
        ratios: list[float] = []
        drifts: list[float] = []
        for _ in range(WINDOWS):
            middles, _ = self.bench.middles({"one": model, "other": model}, self.share("noise") / WINDOWS)
            ratios.append(self.add("noise", "a file", "one", "other", middles, against="itself").value)
            drifts.append(drift(middles["other"].tolist()))
        blocks = sum(one.blocks for one in self.findings if one.about == "noise")
        self.measured["noise_pct"] = round(100 * max(abs(one - 1) for one in ratios), 2)
        self.measured["drift_pct"] = round(100 * max(drifts, key=abs), 2)
        self.measured["noise"] = (
            f"a file to itself: {min(ratios):.4f} to {max(ratios):.4f} in {WINDOWS} windows, {blocks} blocks"
        )

    def types(self, name: str) -> None:
        """One typical graph in all types, in one window."""
        files = {kind: TYPICAL[name](kind, self.profile.batch) for kind in KINDS}
        middles, refused = self.bench.middles(dict(files), self.share("types") / len(TYPICAL))
        if "float32" in refused:
            raise TrialFailure(f"not even float32 runs there: {refused['float32']}")
        for kind in KINDS[1:]:
            what = f"{NAMES.get(kind, kind)}, {name}"
            if kind in refused:
                self.findings.append(Finding(about="types", what=what, against="float32", why=refused[kind]))
            else:
                self.add("types", what, kind, "float32", middles, note=f"{kind} {name}")

    def integers(self) -> Kind | None:
        """The type of activations that suits integers, and whether their sums are right; None if neither runs."""
        running: dict[Kind, float] = {kind: mean for kind in INTEGERS if (mean := self.mean(kind)) is not None}
        narrow = [kind for kind in NARROW if self.pays(kind)]
        self.changes["types"] = ("float32", *(("int8",) if running else ()), *narrow)
        if not running:
            for kind in (*INTEGERS, *NARROW):
                self.tell_type(kind)
            return None
        own: Kind = "u8s8" if self.profile.numeric.activation == "uint8" else "s8s8"
        best: Kind = min(running, key=running.__getitem__)
        if own in running and running[own] < (1 + EVEN) * running[best]:
            best = own
        other: Kind | None = next((kind for kind in running if kind != best), None)
        for kind in (best, *NARROW):
            self.tell_type(kind)
        activation = "uint8" if best == "u8s8" else "int8"
        if other is None:
            why = "the only form of integers that runs there"
        elif running[other] > (1 + EVEN) * running[best]:
            why = f"{best} takes {running[best]:.2f} of float32 on average, {other} {running[other]:.2f}"
        else:
            why = f"u8s8 and s8s8 are equally fast, within {100 * EVEN:.0f} %"
        self.tell("setting", f"activations in {activation}: {why}")
        sums = self.sums(best)
        self.measured["sums"] = f"{best}: {sums}"
        reduced = {"saturate": True, "right": False}.get(sums, self.profile.numeric.reduce_range)
        said = {
            "saturate": "large sums saturate with weights of 8 bits: `reduce_range` keeps 7",
            "right": "large sums are right with weights of all 8 bits: no `reduce_range`",
            "unknown": f"whether large sums saturate could not be told; `reduce_range` stays {str(reduced).lower()}",
        }
        self.tell("setting", said[sums])
        self.changes["numeric"] = self.profile.numeric.model_copy(
            update={"activation": activation, "weight": "int8", "reduce_range": reduced}
        )
        return best

    def tell_type(self, kind: Kind) -> None:
        """A line for a type: where it pays, where not, or why it does not run."""
        found, name = self.of(kind), NAMES.get(kind, kind)
        running = [one for one in found if one.ratio is not None]
        if not running:
            self.tell("costs", f"{name} does not run there: {found[0].why}")
            return
        faster = [one for one in running if one.verdict == "pays"]
        slower = [one for one in running if one.verdict == "costs"]
        if faster:
            self.tell("pays", f"{name}: {_figures(faster)} of float32's time")
        if slower:
            self.tell("costs", f"{name}: {_figures(slower)} of float32's time")
        if not faster and not slower:
            self.tell("costs", f"{name} runs and gains nothing: {_figures(running)} of float32's time")

    def sums(self, kind: Kind) -> Literal["right", "saturate", "unknown"]:
        """Whether large products of 8 bits are summed right there; both controls must answer as they have to."""
        verdicts: set[str] = set()
        for form in FORMS:
            runs = {
                name: not self.bench.refusal(smallnets.sums(kind, form, reduced=reduced, expected=expected))
                for name, reduced, expected in (("wrong", True, 1.5), ("reduced", True, 1.0), ("full", False, 1.0))
            }
            if runs["wrong"] or not runs["reduced"]:
                return "unknown"
            verdicts.add("right" if runs["full"] else "saturate")
        return "saturate" if "saturate" in verdicts else "right"

    def steps(self, integer: Kind | None) -> None:
        """Numbers of channels that a convolution gains by."""
        found: dict[Kind, int] = {}
        kinds: tuple[Kind, ...] = ("float32",) if integer is None else ("float32", integer)
        for kind in kinds:
            files = {str(width): smallnets.convolutions(kind, self.profile.batch, width, 3) for width in WIDTHS}
            middles, refused = self.bench.middles(files, self.share("steps") / len(kinds))
            if refused:
                continue
            found[kind] = step(middles)
            self.measured[f"channel_step {kind}"] = float(found[kind])
        if found:
            multiple = found.get(integer or "float32", found.get("float32", 1))
            steps = ", ".join(f"{NAMES.get(kind, kind)} {one}" for kind, one in found.items())
            self.tell("setting", f"channels count in steps of {multiple} (3x3 convolutions: {steps})")
            self.changes["channel_multiple"] = multiple

    def ranks(self, form: Literal["linear", "1x1"], integer: Kind | None) -> None:
        """Up to which share of the full rank two factors are faster than the layer."""
        for kind in ("float32",) if integer is None else ("float32", integer):
            full = smallnets.FULL_RANK[form]
            files = {
                str(share): smallnets.factored(kind, form, int(share * full), self.profile.batch)
                for share in (0.0, *RANKS)
            }
            count = 2 * (1 if integer is None else 2)
            middles, refused = self.bench.middles(files, self.share("ranks") / count)
            if refused:
                continue
            what = f"{NAMES.get(kind, kind)} {form}"
            ratios = [
                self.add(
                    "ranks", f"{what} by factors of {share:g} of the rank", str(share), "0.0", middles, "the layer"
                )
                for share in RANKS
            ]
            limit = crossing(RANKS, [ratio.value for ratio in ratios])
            self.measured[f"rank_limit {kind} {form}"] = limit
            label = "linear layers" if form == "linear" else "1x1 convolutions"
            if limit:
                self.tell("pays", f"low rank in {label}, {NAMES.get(kind, kind)}: up to {limit:g} of the full rank")
            else:
                self.tell("costs", f"low rank in {label}, {NAMES.get(kind, kind)}: at no rank that was tried")

    def add(
        self,
        about: About,
        what: str,
        name: str,
        reference: str,
        middles: Middles,
        against: str = "",
        note: str = "",
    ) -> Interval:
        """A finding: the ratio of neighbouring blocks."""
        ratio = median((middles[name] / middles[reference]).tolist())
        blocks = len(middles[name])
        self.findings.append(Finding(about=about, what=what, against=against or reference, ratio=ratio, blocks=blocks))
        if note:
            self.measured[note] = self.findings[-1].figure
        return ratio

    def tell(self, sign: Sign, text: str) -> None:
        """A line for the user."""
        self.advice.append(Advice(sign=sign, text=text))

    def mean(self, kind: Kind) -> float | None:
        """Geometric mean of a type's ratios to float32, None if it does not run."""
        ratios = [one.ratio for one in self.of(kind) if one.ratio is not None]
        return math.exp(sum(math.log(one.value) for one in ratios) / len(ratios)) if ratios else None

    def pays(self, kind: Kind) -> bool:
        """Whether a type is faster than float32 on one typical graph at least."""
        return any(one.verdict == "pays" for one in self.of(kind))

    def of(self, kind: Kind) -> list[Finding]:
        """What was found of a type."""
        name = f"{NAMES.get(kind, kind)}, "
        return [one for one in self.findings if one.about == "types" and one.what.startswith(name)]

    def share(self, name: str) -> float:
        """Seconds of one part of the survey."""
        return SHARES[name] * self.seconds

    def found(self, facts: Mapping[str, Any]) -> Profile:
        """The profile with all of it."""
        told = {key: facts[key] for key in ("onnxruntime", "processor", "kernel", "governor") if facts.get(key)}
        told |= {key: float(facts[key]) for key in ("cores", "max_mhz") if isinstance(facts.get(key), int)}
        told["surveyed"] = datetime.now(UTC).date().isoformat()
        told["disturbed_pct"] = round(100 * self.bench.disturbed, 1)
        changes = {**self.changes, "measured": {**told, **self.measured}, "fingerprint": identity(facts)}
        known = self.profile.model_dump(exclude_unset=True)
        return Profile.model_validate({**known, **changes, "template": False})


def _figures(findings: Sequence[Finding]) -> str:
    return ", ".join(f"{one.what.partition(', ')[2]} {one.ratio.value:.2f}" for one in findings if one.ratio)


def crossing(shares: Sequence[float], ratios: Sequence[float], level: float = 1.0 - EVEN) -> float:
    """The share up to which ratios stay below `level`, between two of them on a line; 0 if the first does not."""
    before: tuple[float, float] | None = None
    for share, ratio in zip(shares, ratios, strict=True):
        if ratio >= level:
            if before is None:
                return 0.0
            return round(before[0] + (share - before[0]) * (level - before[1]) / (ratio - before[1]), 3)
        before = share, ratio
    return shares[-1]


def step(middles: Middles) -> int:
    """The largest step at which fewer channels than a multiple save less than half of their products.

    `middles` is keyed by widths, as in `WIDTHS`. A step counts only if all smaller ones do.
    """
    found = 1
    for candidate, pairs in STEPS.items():
        gains: list[float] = []
        for fewer, more in pairs:
            ratio = float(np.median(middles[str(fewer)] / middles[str(more)]))
            gains.append((1 - ratio) / (1 - (fewer / more) ** 2))
        if float(np.median(gains)) >= 0.5:
            break
        found = candidate
    return found
