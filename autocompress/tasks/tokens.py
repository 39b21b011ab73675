"""From sentences to token ids, by a tokenizer of Hugging Face's `tokenizers` from a local file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.registry import optional
from autocompress.tasks.pictures import line
from autocompress.tasks.tables import read_table
from autocompress.types import UserError

MAKE_ONE = (
    "make one from your own tables in Python: from autocompress.tasks.tokens import train_tokenizer; "
    "train_tokenizer(['train.tsv'], 'tokenizer.json')"
)


@dataclass(frozen=True)
class Tokens:
    """Sentences as ids, one after another; sentence i is from `starts[i]` to `starts[i + 1]`."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, words: Any, sentences: Sequence[str]) -> Tokens:
        """By a tokenizer that cuts them to length."""
        # one by one: encode_batch starts threads of its own on all cores
        found = [np.asarray(words.encode(sentence).ids, dtype=np.int32) for sentence in sentences]
        return cls(np.concatenate(found), np.cumsum([0, *map(len, found)]))

    def padded(self, indices: NDArray[np.int64], length: int, pad: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (n, length), int64."""
        starts, lengths = self.starts[indices], self.starts[indices + 1] - self.starts[indices]
        mask = np.arange(length) < lengths[:, None]
        ids = np.full((len(indices), length), pad, dtype=np.int64)
        places = starts[:, None] + np.arange(length)
        ids[mask] = self.ids[places[mask]]
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def open_tokenizer(path: Path, *, lowercase: bool = True) -> Any:
    """A `tokenizers.Tokenizer` of a tokenizer.json, or BERT's WordPiece with the words of a vocab.txt.

    Raises UserError for a file that is missing or neither.
    """
    library = optional("tokenizers", "task text")
    if not path.is_file():
        raise UserError(f"data.tokenizer: there is no file {path}; {MAKE_ONE}")
    try:
        if path.suffix == ".txt":
            words = library.Tokenizer(library.models.WordPiece.from_file(str(path), unk_token="[UNK]"))
            return _as_bert(library, words, lowercase)
        words = library.Tokenizer.from_file(str(path))
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"data.tokenizer: {path} is no tokenizer.json or vocab.txt ({line(error)})") from error
    words.no_padding()
    words.no_truncation()
    return words


def train_tokenizer(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    vocabulary: int = 8000,
    lowercase: bool = True,
    sentence: str | int | None = None,
    label: str | int | None = None,
) -> Path:
    """Write a WordPiece tokenizer (Devlin et al. 2019) for the sentences of TSV or CSV files; returns where.

    `vocabulary` is the most words it may have. Give the network the number it ends with: `vocab_size` in the config.
    Raises UserError for files that cannot be read.
    """
    library = optional("tokenizers", "train_tokenizer")
    words = library.Tokenizer(library.models.WordPiece(unk_token="[UNK]"))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = library.trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    words.normalizer = library.normalizers.BertNormalizer(lowercase=lowercase)
    words.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tables = (read_table(Path(file), sentence, label) for file in files)
    words.train_from_iterator((one for table in tables for one in table.sentences), trainer)
    path = Path(out)
    _as_bert(library, words, lowercase).save(str(path))
    return path


def _as_bert(library: Any, words: Any, lowercase: bool) -> Any:
    """Normalised, cut and framed as BERT's tokenizer does it: [CLS] sentence [SEP]."""
    first, last = (words.token_to_id(one) for one in ("[CLS]", "[SEP]"))
    if first is None or last is None:
        raise UserError("data.tokenizer: its words lack [CLS] or [SEP]; give a tokenizer.json instead")
    words.normalizer = library.normalizers.BertNormalizer(lowercase=lowercase)
    words.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    words.decoder = library.decoders.WordPiece()
    words.post_processor = library.processors.BertProcessing(("[SEP]", last), ("[CLS]", first))
    return words
