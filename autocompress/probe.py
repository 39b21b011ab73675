"""The probe: choices of a derived space tried one by one, untrained, before the search (floor F5).

A choice is looked at in two backgrounds, because neither alone says what it is worth: an integer layer among floats
pays for the borders around it, a float layer among integers pays for them too. It leaves the space only if it pays in
neither: alone in the unmodified network, and on top of the best choices of all others (every site in integers, every
site with the best change of its structure).

Quality is judged by how far the outputs move from the parent's, latency by what this machine takes for the changed
layers. Both steer only; what a candidate is worth is trained and measured in the search.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress import auto, export, latency
from autocompress import space as sp
from autocompress.devices.layers import Table
from autocompress.devices.profiler import ratio, site_latency
from autocompress.pipeline import FirstLook, Work, export_float, finish, notes_of, ordered
from autocompress.store import write_atomic
from autocompress.tasks import several
from autocompress.train import reestimate_batchnorm
from autocompress.types import (
    Budget,
    Candidate,
    Choice,
    Facts,
    Gene,
    Probed,
    Profile,
    Receipt,
    Space,
    TrialFailure,
)

SAMPLES, FEWEST = 64, 8  # calibration samples that outputs are compared on
PASS_S = 0.3  # how long one pass over them may take
BATCHNORM_BATCHES = 1
TIMING_S = 0.15  # per file
PAYS = 0.002  # share of the baseline's latency (or size) that counts as a gain
HOPELESS = 2.0  # times the divergence of an answer that is always the same ...
LEAST = 0.1  # ... which an untrained network has none of
FILE = "probe.json"


@dataclass(frozen=True)
class Found:
    """What the probe found: the space that is left, and why."""

    space: Space
    probed: tuple[Probed, ...]
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line for the terminal."""
        tried = [one for one in self.probed if one.kl is not None]
        gone = [one for one in self.probed if not one.kept]
        return (
            f"probed {len(tried)} of {len(self.probed)} choices in {self.seconds:.0f} s: {len(gone)} never pay, "
            f"{len(self.space.genes)} genes are left"
        )


def probe(
    work: Work,
    full: Space,
    facts: Facts,
    budgets: Sequence[Budget],
    *,
    seconds: float,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """Try the choices of `full`, largest sites first, for at most about `seconds`; what was not tried stays.

    With a folder, an earlier probe of the same network, space and devices there is read instead of done again.
    """
    key = _key(work, full, facts)
    kept = _recall(folder, key)
    if kept is not None:
        return Found(reduced(full, kept), kept)
    began = time.perf_counter()
    small = any(budget.size_mb is not None for budget in budgets)
    found = _Probe(work, full, facts, began + seconds, small=small, say=say).go()
    if folder is not None:
        records = [one.model_dump(mode="json") for one in found]
        write_atomic(folder / FILE, json.dumps({"key": key, "probed": records}, indent=1).encode())
    return Found(reduced(full, found), found, time.perf_counter() - began)


def reduced(full: Space, probed: Sequence[Probed]) -> Space:
    """The space without what the probe found never to pay."""
    return auto.reduce(full, [(one.gene, one.choice) for one in probed if not one.kept])


def _key(work: Work, full: Space, facts: Facts) -> str:
    parts = [
        full.model_dump(mode="json"),
        facts.parent,
        [profile.model_dump(mode="json") for profile in work.profiles],
        sorted(facts.fingerprints),
        facts.versions,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _recall(folder: Path | None, key: str) -> tuple[Probed, ...] | None:
    try:
        kept = json.loads((folder / FILE).read_bytes()) if folder else {}
        return tuple(Probed.model_validate(one) for one in kept["probed"]) if kept.get("key") == key else None
    except (OSError, ValueError, LookupError, AttributeError):
        return None  # not there, or damaged: probed again


# --- quality -----------------------------------------------------------------------------------------------------


class Answers:
    """The parent's outputs on some samples, and how far others are from them."""

    def __init__(self, parent: Sequence[Tensor], *, classes: bool) -> None:
        self.parent, self.classes = tuple(one.float() for one in parent), classes

    def divergence(self, others: Sequence[Tensor]) -> float:
        """Nats per sample: KL(parent || other) of class scores, or of unit Gaussians around standardised values."""
        pairs = zip(self.parent, others, strict=True)
        return float(sum(self._one(mine, theirs.float()) for mine, theirs in pairs))

    def constant(self) -> float:
        """The divergence of the best answer that is the same for every sample: what knowing nothing costs."""
        if not self.classes:
            return 0.5 * len(self.parent)
        means = [_shares(one).exp().mean(0, keepdim=True).log().expand_as(one) for one in self.parent]
        return self.divergence(means)

    def _one(self, mine: Tensor, theirs: Tensor) -> Tensor:
        if self.classes:
            wanted, found = _shares(mine), _shares(theirs)
            spread = (wanted.exp() * (wanted - found)).sum(_axis(mine))
            return spread.mean()
        return 0.5 * ((mine - theirs) ** 2).mean() / mine.var(correction=0).clamp_min(1e-12)


def _axis(scores: Tensor) -> int:
    """Where the classes are: after the samples in an image of scores, else last."""
    return 1 if scores.ndim == 4 else scores.ndim - 1


def _shares(scores: Tensor) -> Tensor:
    return functional.log_softmax(scores, dim=_axis(scores))


def _is_labels(targets: Any) -> bool:
    first = several(targets)[0] if not isinstance(targets, Mapping) else next(iter(targets.values()))
    return not (isinstance(first, Tensor) and first.is_floating_point())


def quickest(work: Callable[[], object]) -> float:
    """Seconds of `work` with one thread or with as many as torch has, whichever is faster now; that stays set.

    On cores that others want too, threads that wait for one another take many times as long as one alone.
    """
    took: dict[int, float] = {}
    for threads in dict.fromkeys((torch.get_num_threads(), 1)):
        torch.set_num_threads(threads)
        work()
        began = time.perf_counter()
        work()
        took[threads] = time.perf_counter() - began
    best = min(took, key=lambda threads: took[threads])
    torch.set_num_threads(best)
    return took[best]


# --- one probe ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What of a profile decides a file and its latency on this machine."""

    profile: Profile
    proportions: latency.Proportions
    floats: bytes = field(repr=False)
    integers: bytes | None = field(repr=False)
    names: tuple[str, ...] = ()  # profiles that are alike
    scale: Mapping[str, float] = field(default_factory=dict)  # of this machine's milliseconds to the device's

    @property
    def total(self) -> float:
        """Milliseconds of the baseline on this machine."""
        return self.proportions.times[False].total


@dataclass
class Tried:
    """One choice on its way."""

    gene: Gene
    choice: Choice
    place: int  # index of the gene
    kl: float | None = None
    gained: dict[str, float] = field(default_factory=dict)  # share of the baseline's latency, by profile
    best_kl: float | None = None
    best_gained: dict[str, float] = field(default_factory=dict)
    smaller: float = 0.0  # share of the size
    used: tuple[latency.Used, ...] = ()
    why: str = ""

    def pays(self, hopeless: float, *, small: bool) -> bool:
        """Alone in the unmodified network."""
        return self._worth(self.gained, small) and self.kl is not None and self.kl <= hopeless

    def pays_on_top(self, hopeless: float, *, small: bool) -> bool:
        """On top of the best choices of the others; where its divergence was not looked at, the first one counts."""
        kl = self.kl if self.best_kl is None else self.best_kl
        return self._worth(self.best_gained, small) and kl is not None and kl <= hopeless

    def _worth(self, gained: Mapping[str, float], small: bool) -> bool:
        return any(share > PAYS for share in gained.values()) or (small and self.smaller > PAYS)


class _Probe:
    def __init__(
        self, work: Work, full: Space, facts: Facts, deadline: float, *, small: bool, say: Callable[[str], None]
    ) -> None:
        self.work, self.space, self.facts, self.deadline = work, full, facts, deadline
        self.small, self.say = small, say
        self.phase = {gene.op: work.ops[gene.op].phase for gene in full.genes if gene.op in work.ops}
        self.neutral = sp.parent(full)

    def go(self) -> tuple[Probed, ...]:
        threads = torch.get_num_threads()
        try:
            return self.tried()
        finally:
            torch.set_num_threads(threads)

    def tried(self) -> tuple[Probed, ...]:
        waiting = self.questions()
        if not waiting:
            return ()
        left = self.deadline - time.perf_counter()
        self.say(f"probing {len(waiting)} choices, for at most about {left:.0f} s")
        self.prepare()
        for one in waiting:
            if time.perf_counter() > self.deadline:
                break
            self.alone(one)
        self.predict(waiting)
        for one in waiting:
            if one.kl is not None and time.perf_counter() < self.deadline and not self.paid(one):
                self.on_top(one, waiting)
        return tuple(self.record(one) for one in waiting)

    def questions(self) -> list[Tried]:
        """Choices that change the untrained network by themselves, those of the largest sites first, knobs last."""
        sites = self.facts.sites
        macs = {
            gene.name: sum(s.macs for s in sites if s.name == gene.site or s.name.startswith(f"{gene.site}."))
            for gene in self.space.genes
        }
        found = [
            Tried(gene, choice, place)
            for place, gene in enumerate(self.space.genes)
            if gene.kind == "arch" or self.phase.get(gene.op) in ("structure", "numeric")
            for choice in gene.choices[1:]
            if sp.canonical(self.space, self.genotype({place: choice})) != self.neutral
        ]
        return sorted(found, key=lambda one: (one.gene.kind == "arch", -macs[one.gene.name], one.place))

    def genotype(self, chosen: Mapping[int, Choice]) -> tuple[int, ...]:
        values = list(self.neutral)
        for place, choice in chosen.items():
            values[place] = self.space.genes[place].choices.index(choice)
        return sp.canonical(self.space, tuple(values))

    def candidate(self, chosen: Mapping[int, Choice]) -> Candidate:
        return sp.decode(self.space, self.genotype(chosen))

    # --- what is compared with

    def prepare(self) -> None:
        """The parent's answers, its file and the file with every site in integers, their times."""
        work = self.work
        batches = work.task.batches("calibration", FEWEST, limit=FEWEST)
        inputs, targets = next(iter(batches))
        each = quickest(lambda: latency.run(work.parent, several(inputs))) / len(several(inputs)[0])
        self.samples = max(FEWEST, min(SAMPLES, int(PASS_S / max(each, 1e-9))))
        inputs, _ = next(iter(work.task.batches("calibration", self.samples, limit=self.samples)))
        self.inputs: tuple[Tensor, ...] = several(inputs)
        outputs, self.parent = latency.run(work.parent, self.inputs)
        self.answers = Answers(several(outputs), classes=_is_labels(targets))
        self.hopeless = HOPELESS * max(self.answers.constant(), LEAST)
        self.exported = export_float(work, work.parent)
        self.task = FirstLook(work.task)
        self.numbers = {
            place: gene.choices[1]
            for place, gene in enumerate(self.space.genes)
            if self.phase.get(gene.op) == "numeric"
        }
        self.targets = tuple(self.target(like) for like in self.alike())
        self.parameters = sum(parameter.numel() for parameter in work.parent.parameters())

    def alike(self) -> list[list[Profile]]:
        """Profiles whose files and times on this machine are the same."""
        found: dict[tuple[object, ...], list[Profile]] = {}
        for profile in self.work.profiles:
            found.setdefault((profile.numeric.variant, profile.threads, profile.batch), []).append(profile)
        return list(found.values())

    def target(self, like: Sequence[Profile]) -> Target:
        profile, part = like[0], self.exported.parts[0]
        floats = export.compose(self.exported)
        integers = self.file(self.numbers, profile) if self.numbers else None
        times = [
            None if model is None else site_latency(model, part.nodes, profile.threads, batch=profile.batch)
            for model in (floats, integers)
        ]
        assert times[0] is not None
        table = Table(profile.threads, profile.batch)
        proportions = latency.Proportions(self.parent, table, profile.numeric, times[0], times[1])
        readings = self.facts.baseline
        scale = {p.name: readings[p.name].ms.value if p.name in readings else times[0].total for p in like}
        return Target(profile, proportions, floats, integers, tuple(p.name for p in like), scale)

    def file(self, chosen: Mapping[int, Choice], profile: Profile) -> bytes:
        """The unmodified network with some sites in integers."""
        policy = self.candidate(chosen).policy
        return finish(self.work, self.exported, policy, profile, self.task).model

    # --- one choice

    def alone(self, one: Tried) -> None:
        """In the unmodified network."""
        try:
            if one.gene.kind == "policy" and self.phase[one.gene.op] == "numeric":
                self.as_numbers(one)
            else:
                outputs, one.used, why = self.outputs({one.place: one.choice})
                one.kl = self.answers.divergence(outputs)
                one.why = why
        except TrialFailure as failure:
            one.why = str(failure)
        except Exception as error:  # noqa: BLE001  a stranger's network may break an op: said, and the choice is left out
            one.why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

    def as_numbers(self, one: Tried) -> None:
        for target in self.targets:
            model = self.file({one.place: one.choice}, target.profile)
            one.kl = max(one.kl or 0.0, self.of_file(model))
            one.smaller = 1 - len(model) / len(target.floats)
            share = 1 - self.ratio(model, target.floats, target.profile)
            one.gained |= dict.fromkeys(target.names, share)

    def of_file(self, model: bytes) -> float:
        found = several(export.predictor(model)(tuple(one.numpy() for one in self.inputs)))
        return self.answers.divergence([torch.from_numpy(one) for one in found])

    def ratio(self, model: bytes, reference: bytes, profile: Profile) -> float:
        return ratio(model, reference, profile.threads, batch=profile.batch, seconds=TIMING_S)

    def outputs(self, chosen: Mapping[int, Choice]) -> tuple[tuple[Tensor, ...], tuple[latency.Used, ...], str]:
        """Of the changed network, the layers it uses, and what was not followed."""
        candidate = self.candidate(chosen)
        module, notes = self.changed(candidate)
        found, used = latency.run(module, self.inputs)
        return several(found), used, notes

    def changed(self, candidate: Candidate) -> tuple[nn.Module, str]:
        """The parent with the candidate's structure ops, batch-norm statistics estimated again."""
        work = self.work
        own = {gene.name: gene.choices[0] for gene in self.space.genes if gene.kind == "arch"}
        if all(candidate.arch.get(knob) == choice for knob, choice in own.items()):
            module = copy.deepcopy(work.parent)
        else:
            module = work.builder.build(candidate.arch)
            work.builder.inherit(module, work.parent, candidate.arch)
        receipts: list[Receipt] = []
        for _, op, rules in ordered(candidate.policy, work.ops, "structure"):
            tensors: dict[str, Any] = {}
            receipt = op.decide(module, rules, work.task, work.shape_profile, tensors)
            module = op.enact(module, receipt, tensors)
            receipts.append(receipt)
        reestimate_batchnorm(module, work.task, BATCHNORM_BATCHES, size=self.samples)
        return module, next(iter(notes_of(receipts)), "")

    # --- latency of what was not exported, and the other background

    def predict(self, tried: Sequence[Tried]) -> None:
        """What changed layers gain, from the table; where onnxruntime refuses one, nothing is known and all stays."""
        changed = [one for one in tried if one.used]
        every = [used for one in changed for used in one.used]
        for target in self.targets:
            target.proportions.learn(every)
            for one in changed:
                for integers in (False, True):
                    ms = target.proportions.gained(one.used, integers=integers)
                    share = dict.fromkeys(target.names, 0.0 if ms is None else ms / target.total)
                    (one.best_gained if integers else one.gained).update(share)
        for one in changed:
            one.smaller = 1 - _weights(one.used) / max(_weights(self.parent), 1)

    def paid(self, one: Tried) -> bool:
        return one.pays(self.hopeless, small=self.small)

    def on_top(self, one: Tried, tried: Sequence[Tried]) -> None:
        """In the network where all others take their best choice: with it, and with it alone undone."""
        try:
            if one.gene.kind == "policy" and self.phase[one.gene.op] == "numeric":
                self.numbers_undone(one)
            elif one.kl is not None and one.kl > self.hopeless:
                others = {best.place: best.choice for best in self.best(tried) if best.place != one.place}
                without = self.answers.divergence(self.outputs(others)[0])
                with_it = self.answers.divergence(self.outputs({**others, one.place: one.choice})[0])
                one.best_kl = with_it - without
        except TrialFailure as failure:
            one.why = one.why or str(failure)
        except Exception as error:  # noqa: BLE001  as in `alone`
            one.why = one.why or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

    def numbers_undone(self, one: Tried) -> None:
        for target in self.targets:
            others = {place: choice for place, choice in self.numbers.items() if place != one.place}
            undone = self.file(others, target.profile)
            full = self.file({**others, one.place: one.choice}, target.profile)
            slower = self.ratio(undone, full, target.profile) - 1
            integers = target.proportions.times.get(True)
            share = slower * (integers.total if integers else target.total) / target.total
            one.best_gained |= dict.fromkeys(target.names, share)
            if one.kl is not None and one.kl > self.hopeless:
                one.best_kl = max(one.best_kl or 0.0, self.of_file(full) - self.of_file(undone))

    def best(self, tried: Sequence[Tried]) -> list[Tried]:
        """Per site the change of structure that gains most for what it costs; blocks stay, or nothing inside could."""
        found: dict[str, Tried] = {}
        for one in tried:
            structural = one.gene.kind == "policy" and self.phase[one.gene.op] == "structure" and one.gene.op != "block"
            if structural and self.paid(one):
                held = found.get(one.gene.site)
                if held is None or self.worth(one) > self.worth(held):
                    found[one.gene.site] = one
        return list(found.values())

    def worth(self, one: Tried) -> float:
        return max(one.gained.values(), default=0.0) * (1 - (one.kl or 0.0) / self.hopeless)

    def record(self, one: Tried) -> Probed:
        tried = one.kl is not None or bool(one.why)
        kept = not tried or one.gene.kind == "arch" or self.paid(one)
        kept = kept or one.pays_on_top(self.hopeless, small=self.small)
        scale = {name: ms for target in self.targets for name, ms in target.scale.items()}
        why = one.why
        if not tried:
            why = "not tried: the time was up"
        elif not kept and not why:
            why = "hopeless without training" if (one.kl or 0.0) > self.hopeless else "gains nothing"
        return Probed(
            gene=one.gene.name,
            choice=one.choice,
            kl=_figure(one.kl),
            ms={name: _figure(share * scale[name]) or 0.0 for name, share in one.gained.items()},
            best_kl=_figure(one.best_kl),
            best_ms={name: _figure(share * scale[name]) or 0.0 for name, share in one.best_gained.items()},
            kept=kept,
            why=why,
        )


def _weights(used: Sequence[latency.Used]) -> int:
    return sum({one.name: one.weights for one in used}.values())


def _figure(value: float | None) -> float | None:
    """Six digits; nothing that JSON cannot hold."""
    if value is None:
        return None
    return float(f"{min(value, 1e9):.6g}") if math.isfinite(value) else 1e9
