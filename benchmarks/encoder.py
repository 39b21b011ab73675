"""A small BERT that is trained on SST-2 here once, and what is done to it: techniques on transformers.

`AUTOCOMPRESS_DATA` names a folder with `sst2/train.tsv`, `dev.tsv` and `test.tsv`. There is no pretrained encoder at
hand, so that its accuracy (about 78 %) is that of a network trained on 6,920 sentences alone; what counts is the drop.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import references as by
import torch
import torch_pruning as tp
from arms import DISTILL, Arm, Lab, Rules, all_of, both, every_second, rows_of
from safetensors.torch import load_file, save_file
from torch import nn

from autocompress.models.sources import hugging_face
from autocompress.store import cache_dir
from autocompress.tasks import several
from autocompress.tasks.text import Text
from autocompress.tasks.tokens import open_tokenizer, train_tokenizer
from autocompress.train import Training
from autocompress.types import Policy, Rule, Site, UserError

LENGTH, WORDS, EPOCHS, RATE, SEED = 48, 8000, 4, 1e-3, 0
HEADS = 4
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "num_labels": 2,
}


class Sentences(Text):
    """SST-2 by the project's own text task."""

    @classmethod
    def sst2(cls) -> Sentences:
        """The data set with a WordPiece tokenizer of its own train split. Raises UserError if it is not there."""
        folder = Path(os.environ.get("AUTOCOMPRESS_DATA", "")) / "sst2"
        if not (folder / "train.tsv").is_file():
            raise UserError("set AUTOCOMPRESS_DATA to the folder that holds sst2/ (benchmarks/encoder.py)")
        tokenizer = cache_dir() / "benchmarks" / f"sst2-{WORDS}.json"
        if not tokenizer.is_file():
            tokenizer.parent.mkdir(parents=True, exist_ok=True)
            train_tokenizer([folder / "train.tsv"], tokenizer, vocabulary=WORDS)
        return cls(folder, tokenizer, length=LENGTH)


def untrained() -> nn.Module:
    """The encoder as its config makes it."""
    torch.manual_seed(SEED)
    words = open_tokenizer(cache_dir() / "benchmarks" / f"sst2-{WORDS}.json").get_vocab_size()
    return hugging_face("bert", vocab_size=words, **SHAPE)


def encoder(task: Sentences) -> nn.Module:
    """The trained encoder, from the cache folder where it was trained before."""
    told = hashlib.sha256(repr((SHAPE, LENGTH, WORDS, EPOCHS, RATE, SEED)).encode()).hexdigest()[:12]
    kept = cache_dir() / "benchmarks" / f"encoder-{told}.safetensors"
    module = untrained()
    if not kept.is_file():
        training = Training(Answers(module), task, EPOCHS, SEED, lr=RATE)
        for epoch in range(1, EPOCHS + 1):
            done = training.run_to(epoch / EPOCHS)
            sys.stderr.write(f"encoder: epoch {epoch} of {EPOCHS}, loss {done['loss']:.3f}\n")
        save_file({name: one.detach().contiguous() for name, one in module.state_dict().items()}, kept)
    module.load_state_dict(load_file(kept))
    return module.eval()


class Answers(nn.Module):
    """A network of transformers that gives its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, length) twice to (n, classes)."""
        return self.network(ids, mask).logits


def ending(end: str, op: str, **settings: Any) -> Rules:
    """A rule at every site whose name ends so."""

    def rules(sites: Sequence[Site]) -> list[Rule]:
        found = [site.name for site in sites if op in site.ops and site.name.endswith(end)]
        return [Rule(site=name, op=op, settings=settings) for name in found]

    return rules


def cut(*, heads: bool) -> by.Reference:
    """torch-pruning, L1, on half of the heads or half of the hidden units of the encoder before it was unfolded."""

    def make(lab: Lab, policy: Policy) -> bytes:  # noqa: ARG001
        assert isinstance(lab.task, Sentences)
        module = copy.deepcopy(encoder(lab.task))
        attention = ("self.query", "self.key", "self.value")
        wanted = attention if heads else ("intermediate.dense",)
        linear = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
        inputs, _ = next(iter(lab.task.batches("calibration", 2)))
        pruner = tp.pruner.BasePruner(
            module,
            dict(zip(("input_ids", "attention_mask"), several(inputs), strict=True)),  # type: ignore[arg-type]
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=[part for name, part in linear if not name.endswith(wanted)],
            num_heads={part: HEADS for name, part in linear if heads and name.endswith(attention)},
            prune_num_heads=heads,
            prune_head_dims=False,
            head_pruning_ratio=0.5,
            output_transform=lambda out: out.logits.sum(),
        )
        pruner.step()
        for part in module.modules():
            if heads and hasattr(part, "all_head_size"):
                query: Any = part.query
                part.num_attention_heads, part.all_head_size = pruner.num_heads[query], query.out_features  # type: ignore[assignment]
        return lab.finish(Answers(module))

    return make


BLOCKS = ("bert.encoder.layer.0", "bert.encoder.layer.2")


def taught(kind: str) -> Rules:
    """Every second block dropped, taught by a kind of distillation."""
    return both(every_second("drop"), all_of("distill", **DISTILL, kind=kind))


ENCODER_ARMS = (
    Arm(
        "prune 50 % of the heads, L1",
        ending("self.query", "prune", ratio=0.5),
        reference=cut(heads=True),
        beside="torch-pruning, L1",
    ),
    Arm(
        "prune 50 % of the MLP widths, L1",
        ending("intermediate.dense", "prune", ratio=0.5),
        reference=cut(heads=False),
        beside="torch-pruning, L1",
    ),
    Arm("drop every second block", every_second("drop"), reference=by.without, beside="the blocks taken out by hand"),
    Arm(
        "drop every second block, distilled by relation",
        taught("relation"),
        reference=by.hinted("relation", ()),
        beside="RKD's formula by hand",
    ),
    Arm(
        "drop every second block, distilled by attention",
        taught("attention"),
        reference=by.hinted("attention", BLOCKS),
        beside="attention transfer's formula by hand",
    ),
    Arm(
        "drop every second block, distilled by features",
        taught("features"),
        reference=by.hinted("features", BLOCKS),
        beside="FitNets' hint by hand",
    ),
    Arm(
        "low rank 25 %, SVD",
        rows_of("lowrank", rank=0.25, method="svd"),
        reference=by.thinned("svd"),
        beside="numpy's SVD by hand",
    ),
    Arm(
        "low rank 25 %, SVD by outputs",
        rows_of("lowrank", rank=0.25, method="svd", data=True),
        reference=by.thinned("svd", data=True),
        beside="whitened SVD by hand (SVD-LLM)",
    ),
    Arm(
        "sparsify 70 %, one shot",
        rows_of("sparsify", ratio=0.7),
        reference=by.masked(0.7),
        beside="torch.nn.utils.prune, layer by layer",
    ),
    Arm(
        "sparsify 70 %, gradual",
        rows_of("sparsify", ratio=0.7, schedule="gradual"),
        reference=by.ramped(0.7),
        beside="cubic schedule by hand",
    ),
    Arm(
        "sparsify 2:4",
        rows_of("sparsify", ratio=0.5, pattern="2:4"),
        reference=by.two_of_four,
        beside="torch.ao.pruning, WeightNormSparsifier",
    ),
    Arm(
        "int8, quantization-aware training",
        both(rows_of("qat", bits="int8"), rows_of("quantize", bits="int8")),
        reference=by.simulated,
        beside="torch.ao, eager, its own simulation",
    ),
    Arm(
        "int8, static",
        rows_of("quantize", bits="int8"),
        trained=False,
        reference=by.integers(),
        beside="onnxruntime, min-max",
    ),
    Arm(
        "int8, static, entropy",
        rows_of("quantize", bits="int8", calibration="entropy"),
        trained=False,
        reference=by.integers("Entropy"),
        beside="onnxruntime, entropy",
    ),
    Arm(
        "int8, dynamic",
        rows_of("quantize", bits="int8-dynamic"),
        trained=False,
        reference=by.dynamic,
        beside="onnxruntime, quantize_dynamic",
    ),
    Arm(
        "int4 weights",
        rows_of("quantize", bits="int4"),
        trained=False,
        reference=by.four_bits,
        beside="onnxruntime, MatMulNBitsQuantizer",
    ),
    Arm(
        "float16",
        rows_of("quantize", bits="float16"),
        trained=False,
        reference=by.half,
        beside="onnxconverter-common",
    ),
    Arm(
        "store: k-means codebook",
        all_of("store", codec="codebook"),
        trained=False,
        reference=by.clustered,
        beside="scikit-learn, KMeans",
    ),
    Arm(
        "store: powers of two",
        all_of("store", codec="pow2"),
        trained=False,
        reference=by.powers,
        beside="INQ's rounding by hand",
    ),
    Arm(
        "store: zstd",
        all_of("store", codec="zstd"),
        trained=False,
        reference=by.squeezed,
        beside="zstandard on the whole file",
    ),
)
