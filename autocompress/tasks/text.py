"""Text classification on the user's tables (TSV or CSV), with a tokenizer from a file: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from autocompress.tasks import InputSpec, Predict, several
from autocompress.tasks.intervals import mean_of
from autocompress.tasks.pictures import as_path
from autocompress.tasks.recipe import Recipe
from autocompress.tasks.splits import Cut, classes_of, cut, whole
from autocompress.tasks.tables import in_order, numbers, read_table, tables
from autocompress.tasks.tokens import MAKE_ONE, Tokens, open_tokenizer
from autocompress.types import Quality, UserError

PADS = ("[PAD]", "<pad>", "<PAD>")
SHORTEST = 4  # tokens: two of them may be marks of beginning and end
BATCH = 64  # sentences whose quality is measured at once


class Text:
    """Task `text`: every option is a key under `data:` in the job.

    path         a folder with train.tsv (.csv), and dev and test beside it, or one file alone
    tokenizer    a tokenizer.json of Hugging Face's tokenizers, or a WordPiece vocab.txt; see `tokens.train_tokenizer`
    length       tokens that the network is fed; longer sentences are cut off, shorter ones padded
    sentence, label   columns by name (then the first line is a header) or number from 0; default: the first two, or
                 those that a header calls sentence (text) and label
    labels       classes in order; default: those of train, sorted
    mask         whether the network takes an attention mask as its second input
    lowercase    for vocab.txt: whether its words are lower case
    train, selection, test, calibration, limit   which samples a split has, see `splits.cut`; dev is called val there
    smoothing    of labels in the loss; default 0
    training     optimizer, lr, batch ..., see `recipe.Recipe`; AdamW unless said otherwise
    """

    name, metric = "text", "accuracy"
    augments = False  # a teacher answers each sentence once

    def __init__(
        self,
        path: str | Path | None = None,
        tokenizer: str | Path | None = None,
        *,
        length: int = 64,
        sentence: str | int | None = None,
        label: str | int | None = None,
        labels: Sequence[str] | None = None,
        mask: bool = True,
        lowercase: bool = True,
        train: str | None = None,
        selection: str | float | None = None,
        test: str | float | None = None,
        calibration: int | None = None,
        limit: int | Mapping[str, int] | None = None,
        smoothing: float = 0.0,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises UserError naming the file, its line and the key for whatever cannot be used."""
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if path is None:
            raise UserError("data: task text needs `path`: a folder with train.tsv (or .csv), or one such file")
        folder = as_path(path, "path")
        if tokenizer is None:
            raise UserError(f"data.tokenizer: task text needs a tokenizer file; {MAKE_ONE}")
        file = as_path(tokenizer, "tokenizer")
        self._given = {**given, "path": folder, "tokenizer": file}  # what a worker makes the task again from
        if not whole(length) or length < SHORTEST:
            raise UserError(f"data.length: {length!r} is no number of tokens from {SHORTEST} on")
        if not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise UserError(f"data.smoothing: {smoothing!r} must lie between 0 and 1")
        self._length, self.smoothing = length, float(smoothing)
        self.training = Recipe.of(training, "data", optimizer="adamw")
        self._words = open_tokenizer(file, lowercase=lowercase)
        self._words.enable_truncation(length)
        self._pad = next((at for one in PADS if (at := self._words.token_to_id(one)) is not None), 0)
        found = {part: read_table(one, sentence, label) for part, one in tables(folder).items()}
        self._sentences = {part: table.sentences for part, table in found.items()}
        if labels is not None and not isinstance(labels, list | tuple):
            raise UserError(f"data.labels: {labels!r} is no list of names")
        names = tuple(map(str, labels)) if labels is not None else in_order(found["train"].labels)
        self._labels = {part: numbers(table, names) for part, table in found.items()}
        names = classes_of(self._labels, names, str(folder))
        self._cuts = cut(
            self._labels,
            str(folder),
            train=train,
            selection=selection,
            test=test,
            calibration=calibration,
            limit=limit,
        )
        self._tokens: dict[str, Tokens] = {}
        size = self._words.get_vocab_size()
        tokens = f"tokens of {file.name} ({size} words), {length} of them, padded with {self._pad}"
        spec = InputSpec(name="attention_mask", shape=(length,), dtype="int64", layout="", normalisation="1 at tokens")
        self.input = InputSpec(
            name="input_ids",
            shape=(length,),
            dtype="int64",
            layout="",
            normalisation=tokens,
            labels=names,
            others=(spec,) if mask else (),
        )

    def __reduce__(self) -> tuple[Callable[[], Text], tuple[()]]:
        """Made again from its options: a worker reads the files itself."""
        return partial(Text, **self._given), ()

    def count(self, split: str) -> int:
        """Samples of a split. Raises UserError for an unknown one."""
        return len(self._cut(split).indices)

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Any, Tensor]]:
        """Batches ((ids, mask), labels), (n, length) and (n,), all int64, n <= size; without a mask the ids alone.

        In the split's own fixed order, or shuffled, the same way for the same seed. Raises UserError for an unknown
        split.
        """
        chosen = self._cut(split).first(limit)
        if chosen.part not in self._tokens:  # once per process: the ids take less memory than the sentences
            self._tokens[chosen.part] = Tokens.of(self._words, self._sentences[chosen.part])
        tokens, labels = self._tokens[chosen.part], self._labels[chosen.part]
        order = chosen.indices if seed is None else np.random.default_rng(seed).permutation(chosen.indices)
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            ids, mask = tokens.padded(indices, self._length, self._pad)
            yield (ids, mask) if self.input.others else ids, torch.from_numpy(labels[indices])

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Cross entropy of the logits (n, classes), of the first output where there are several."""
        logits = several(outputs)[0]
        self._fits(tuple(logits.shape))
        return functional.cross_entropy(logits, targets, label_smoothing=self.smoothing)

    def quality(self, predict: Predict, split: str) -> Quality:
        """Accuracy with Wilson's 95 % interval."""
        return mean_of(self.scores(predict, split), self.metric, split)

    def scores(self, predict: Predict, split: str) -> NDArray[np.bool_]:
        """Whether each text is classified rightly."""
        right: list[NDArray[np.bool_]] = []
        for inputs, targets in self.batches(split, BATCH):
            given = tuple(one.numpy() for one in several(inputs))
            answer = predict(given) if len(given) > 1 else predict(*given)
            logits: NDArray[Any] = several(answer)[0]
            self._fits(logits.shape)
            right.append(logits.argmax(axis=1) == targets.numpy())
        return np.concatenate(right)

    def _cut(self, split: str) -> Cut:
        if split not in self._cuts:
            raise UserError(f"text: no split {split!r}; there are {', '.join(self._cuts)}")
        return self._cuts[split]

    def _fits(self, shape: tuple[int, ...]) -> None:
        classes = len(self.input.labels)
        if len(shape) != 2 or shape[1] < classes:
            raise UserError(f"text: the network answers with shape {shape}, the data have {classes} classes")
