"""How weights lie on the disk: the network computes as before, on the values that are stored.

`python -m autocompress.ops.store restore model.store model.onnx` writes the ONNX file again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from autocompress.onnxfile import save, write
from autocompress.ops import Phase
from autocompress.ops.fourbits import PACKED
from autocompress.ops.storage import Codec, need_zstd, restore, storage
from autocompress.ops.wiring import WEIGHTED, Wiring, constant
from autocompress.tasks import Task
from autocompress.types import Choice, Entry, Profile, Receipt, Rule, UserError

if TYPE_CHECKING:
    from autocompress.export import Exported, Part

CODECS: tuple[str, ...] = ("none", "zstd", "sparse", "codebook", "pow2")
ENTRIES: tuple[int, ...] = (16, 256)
POWERS = 8
"""Powers of two on either side of zero: the 5 bits of the paper."""
STEPS = 60
READERS = (*WEIGHTED, "MatMulInteger", "MatMulNBits")


class Store:
    """Op `store`, phase numeric, storage only: neither shapes nor speed change.

    `codec`: "zstd", "sparse" (bitmap and values, for pruned weights), "codebook" (k-means, Han et al. 2016, "Deep
    Compression", section 3, `entries` values per weight, zeros of a pruned one staying zeros), "pow2" (powers of two,
    Zhou et al. 2017, "Incremental Network Quantization", equations 1-4, without their retraining). The last two round
    the weights in the ONNX file, so that quality is that of what is stored. At site "." everything is meant, with zstd
    also what is no weight. A site's own rule outranks that of a site that contains it.
    """

    name = "store"
    phase: Phase = "numeric"
    params: dict[str, Any] = {"codec": "none", "entries": 16}
    network_params = ("codec", "entries")
    """May be asked of the whole network, at site "."."""

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        if _checked(rule).settings.get("codec") == "zstd":
            need_zstd()

    def decide(
        self,
        subject: Exported,
        rules: Sequence[Rule],
        task: Task,  # noqa: ARG002
        profile: Profile,  # noqa: ARG002
        tensors: dict[str, Any] | None = None,  # noqa: ARG002  (tables are short)
    ) -> Receipt:
        """Tables by constant: `facts[part][constant]` is {"codec", "table"}; `achieved` has the share of its bytes.

        Raises UserError for unknown settings.
        """
        asked = [_checked(rule) for rule in rules]
        wirings = {part.name: Wiring.of(part.model) for part in subject.parts}
        claimed = _claimed(subject.parts, wirings, asked)
        entries: list[Entry] = []
        for index, rule in enumerate(asked):
            codec, size = rule.settings["codec"], int(rule.settings.get("entries", ENTRIES[0]))
            if codec == "none":
                continue
            settings: dict[str, Choice] = {"codec": codec} | ({"entries": size} if codec == "codebook" else {})
            found = [place for place, owner in claimed.items() if owner == index]
            facts: dict[str, Any] = {}
            before = after = 0
            why = "no weights in the file, or every one of them has a rule of its own"
            for part, name in found:
                tensor = wirings[part].constants[name]
                values = wirings[part].value(name)
                fits = values.dtype in (np.float32, np.float16, np.int8, np.uint8)
                fact: dict[str, Any] = {"codec": codec}
                if codec in ("codebook", "pow2"):
                    if not fits or "_4bit" in name or name.endswith(PACKED):
                        why = "its weights are packed already"
                        continue
                    table = _kmeans(values, size) if codec == "codebook" else _powers(values)
                    fact["table"] = table.tolist()
                    tensor = constant(name, _rounded(values, table))
                facts.setdefault(part, {})[name] = fact
                single = _alone(tensor.name, tensor)
                before += len(single)
                after += len(storage(single, {name: cast("Codec", codec)}))
            if facts:
                share = {"stored": after / before}
                entries.append(Entry(site=rule.site, asked=settings, achieved=share, facts=facts))
            else:
                entries.append(Entry(site=rule.site, status="skipped", why=why, asked=settings))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(
        self,
        subject: Exported,
        receipt: Receipt,
        tensors: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> Exported:
        """New parts whose weights have the tables' values. Raises UserError where a constant is not there."""
        parts: list[Part] = []
        for part in subject.parts:
            facts = {n: fact for entry in receipt.entries for n, fact in entry.facts.get(part.name, {}).items()}
            if not any("table" in fact for fact in facts.values()):
                parts.append(part)
                continue
            wiring = Wiring.of(part.model)
            for name, fact in facts.items():
                if name not in wiring.constants:
                    raise UserError(f"store: the receipt speaks of {name!r}, which part {part.name!r} does not have")
                if "table" in fact:
                    values = wiring.value(name)
                    table = np.asarray(fact["table"], values.dtype)
                    wiring.constants[name].CopyFrom(constant(name, _rounded(values, table)))
            parts.append(replace(part, model=write(wiring.model)))
        return replace(subject, parts=tuple(parts))


def codecs_of(receipts: Sequence[Receipt], parts: Sequence[str] = ("model",)) -> dict[str, Codec]:
    """What `storage` needs for the composed file: codec by constant, {} where no receipt stores anything.

    `parts` are the names of the composed network's parts; several get their names as prefix.
    """
    found: dict[str, Codec] = {}
    for receipt in receipts:
        for entry in receipt.entries if receipt.op == Store.name else ():
            for part, facts in entry.facts.items():
                prefix = f"{part}:" if len(parts) > 1 else ""
                found |= {f"{prefix}{name}": fact["codec"] for name, fact in facts.items()}
            if entry.site == "." and entry.asked.get("codec") == "zstd":
                found[""] = "zstd"
    return found


def _checked(rule: Rule) -> Rule:
    codec, size = rule.settings.get("codec", "none"), rule.settings.get("entries", ENTRIES[0])
    if codec not in CODECS:
        raise UserError(f"store {rule.site}: codec = {codec!r}; choose {', '.join(CODECS)}")
    if size not in ENTRIES or isinstance(size, bool):
        raise UserError(f"store {rule.site}: entries = {size!r}; choose {' or '.join(map(str, ENTRIES))}")
    if unknown := set(rule.settings) - set(Store.params):
        raise UserError(f"store {rule.site}: no such setting {min(unknown)!r}; it has codec and entries")
    return rule.model_copy(update={"settings": {**rule.settings, "codec": codec}})


def _claimed(parts: Sequence[Part], wirings: Mapping[str, Wiring], rules: Sequence[Rule]) -> dict[tuple[str, str], int]:
    """(part, constant) -> index of the rule that holds for it: of several, the one whose site has fewest layers."""
    found: dict[tuple[str, str], int] = {}
    sizes = [sum(len(part.nodes.get(rule.site, ())) for part in parts) for rule in rules]
    order = sorted(range(len(rules)), key=lambda index: (rules[index].site != ".", -sizes[index]))
    for index in order:
        for part in parts:
            wiring = wirings[part.name]
            if rules[index].site == ".":
                names = [name for name, tensor in wiring.constants.items() if _is_weight(tensor.dims)]
            else:
                nodes = (wiring.nodes.get(name) for name in part.nodes.get(rules[index].site, ()))
                names = [weight_of(wiring, node) for node in nodes if node is not None]
            found.update({(part.name, name): index for name in names if name})
    return found


def _is_weight(dims: Sequence[int]) -> bool:
    return len(dims) >= 2 and int(np.prod(dims)) >= 64


def weight_of(wiring: Wiring, node: Any) -> str:
    """The constant that a weighted node multiplies with, "" if there is none: its own, or dequantized or cast."""
    if node.op_type not in READERS or len(node.input) < 2:
        return ""
    name = node.input[1]
    maker = wiring.makers.get(name)
    if maker is not None and maker.op_type in ("DequantizeLinear", "Cast"):
        name = maker.input[0]
    return name if name in wiring.constants else ""


def _alone(name: str, tensor: Any) -> bytes:
    """A file of one constant, to see what a codec makes of it."""
    graph = helper.make_graph([], name, [], [], [tensor])
    return write(helper.make_model(graph))


def _rounded(values: NDArray[Any], table: NDArray[Any]) -> NDArray[Any]:
    """Each value's nearest in the table (ascending), the lower one in the middle between two."""
    wide = table.astype(np.float64)
    middles = (wide[1:] + wide[:-1]) / 2
    return table[np.searchsorted(middles, values.astype(np.float64).ravel())].reshape(values.shape).astype(values.dtype)


def _kmeans(values: NDArray[Any], entries: int) -> NDArray[Any]:
    """At most `entries` values, ascending, that lie closest to all (Lloyd 1982), from a linear start (section 3.2).

    Zeros of a pruned weight keep an entry of their own.
    """
    flat = np.sort(values.astype(np.float64).ravel())
    pruned = np.mean(flat == 0.0) > 1 / 16 and values.dtype.kind == "f"
    if pruned:
        flat = flat[flat != 0.0]
    if len(flat) == 0:
        return np.zeros(1, values.dtype)
    sums = np.concatenate(([0.0], np.cumsum(flat)))
    centres = np.linspace(flat[0], flat[-1], entries - pruned)
    for _ in range(STEPS):
        ends = np.concatenate(([0], np.searchsorted(flat, (centres[1:] + centres[:-1]) / 2), [len(flat)]))
        counts = np.diff(ends)
        moved = np.where(counts > 0, np.diff(sums[ends]) / np.maximum(counts, 1), centres)
        if np.allclose(moved, centres, rtol=1e-9, atol=0.0):
            break
        centres = moved
    if values.dtype.kind != "f":
        centres = np.rint(centres)
    return np.unique(np.concatenate((centres, [0.0] if pruned else [])).astype(values.dtype))


def _powers(values: NDArray[Any]) -> NDArray[Any]:
    """Zero and `POWERS` powers of two of either sign, the largest by equation 2: 2 ^ floor(log2(4/3 max |w|))."""
    largest = float(np.abs(values.astype(np.float64)).max())
    if largest == 0.0:
        return np.zeros(1, values.dtype)
    top = int(np.floor(np.log2(4 * largest / 3)))
    powers = np.ldexp(1.0, np.arange(top - POWERS + 1, top + 1))
    if values.dtype.kind != "f":
        powers = powers[powers >= 1]
    table = np.concatenate((-powers[::-1], [0.0], powers))
    if values.dtype.kind != "f":
        table = np.clip(table, np.iinfo(values.dtype).min, np.iinfo(values.dtype).max)
    return np.unique(table.astype(values.dtype))


def main(arguments: Sequence[str]) -> int:
    """`restore FILE [OUT]`: write the ONNX file of a stored model."""
    if not 2 <= len(arguments) <= 3 or arguments[0] != "restore":
        sys.stderr.write("usage: python -m autocompress.ops.store restore FILE [OUT]\n")
        return 2
    source = Path(arguments[1])
    out = Path(arguments[2]) if len(arguments) == 3 else source.with_suffix(".onnx")
    try:
        save(out, restore(source.read_bytes()))
    except (UserError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{out}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
