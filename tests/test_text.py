"""Task text: tables and a tokenizer file to ids and masks; a small BERT trains on it and its file agrees."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress import export
from autocompress.parts import make_builder, make_ops, make_task
from autocompress.pipeline import Work, qualities, release, shape, training
from autocompress.tasks import several
from autocompress.tasks.tables import read_table
from autocompress.tasks.text import Text
from autocompress.tasks.tokens import open_tokenizer, train_tokenizer
from autocompress.testing import check_task
from autocompress.train import Training
from autocompress.types import Candidate, Policy, Profile, Rule, UserError

GOOD, BAD = ("good", "fine", "lovely", "great"), ("bad", "poor", "awful", "dull")
THINGS = ("film", "song", "meal", "book", "play", "day")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        label = int(number >= count // 2)  # sorted, as files often are
        word = rng.choice(GOOD if label else BAD)
        filler = " ".join(rng.choice(THINGS, rng.integers(1, 6)))
        found.append((f"{filler} was {word} number {seed}{number}", str(label)))
    return found


def write(path: Path, table: list[tuple[str, ...]], comma: str = "\t") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(comma.join(row) + "\n" for row in table))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for seed, (name, count) in enumerate((("train", 240), ("dev", 40), ("test", 60))):
        write(root / f"{name}.tsv", rows(count, seed))
    train_tokenizer([root / "train.tsv"], root / "tokenizer.json", vocabulary=300)
    return root


def everything(task: Text, split: str, **options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*task.batches(split, 16, **options), strict=True)
    ids, masks = zip(*inputs, strict=True)
    return torch.cat(ids), torch.cat(masks), torch.cat(targets)


def test_it_keeps_the_contract(data: Path):
    task = Text(data, data / "tokenizer.json", length=12)
    check_task(task)
    first, second = task.input.every
    assert (first.name, first.shape, first.dtype, first.labels) == ("input_ids", (12,), "int64", ("0", "1"))
    assert (second.name, second.shape, second.dtype) == ("attention_mask", (12,), "int64")
    assert [task.count(split) for split in ("train", "calibration", "selection", "test")] == [240, 240, 40, 60]
    assert "tokens of tokenizer.json" in first.normalisation
    data_ = pickle.dumps(task)
    assert len(data_) < 2000
    assert all(map(torch.equal, everything(pickle.loads(data_), "test"), everything(task, "test")))


def test_ids_are_the_tokenizers_framed_cut_and_padded(data: Path):
    words = open_tokenizer(data / "tokenizer.json")
    task = Text(data, data / "tokenizer.json", length=8)
    sentences = {}
    for sentence, label in rows(60, 2):
        ids = words.encode(sentence, add_special_tokens=False).ids[:6]
        full = [words.token_to_id("[CLS]"), *ids, words.token_to_id("[SEP]")]
        sentences[tuple(full + [0] * (8 - len(full)))] = (len(full), int(label))
    ids, masks, targets = everything(task, "test")
    assert len(ids) == 60
    for one, mask, target in zip(ids.tolist(), masks, targets.tolist(), strict=True):
        length, label = sentences[tuple(one)]
        assert mask.tolist() == [1] * length + [0] * (8 - length)
        assert target == label
    assert targets[:16].unique().tolist() == [0, 1]


def test_a_vocabulary_alone_is_berts_tokenizer(data: Path, tmp_path: Path):
    words = open_tokenizer(data / "tokenizer.json")
    listed = sorted(words.get_vocab().items(), key=lambda pair: pair[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in listed))
    one, other = (Text(data, path, length=12) for path in (data / "tokenizer.json", tmp_path / "vocab.txt"))
    assert all(map(torch.equal, everything(one, "train"), everything(other, "train")))


def test_columns_by_name_by_number_and_found(tmp_path: Path, data: Path):
    table = rows(40, 0)
    plain = write(tmp_path / "plain.tsv", table)
    titled = write(tmp_path / "titled.tsv", [("label", "id", "Sentence"), *((b, "7", a) for a, b in table)])
    quoted = write(tmp_path / "q.csv", [("review", "stars"), *((f'"{a}, so"', b) for a, b in table)], ",")
    wanted = (tuple(a for a, _ in table), tuple(b for _, b in table))
    found = read_table(plain)
    assert (found.sentences, found.labels) == wanted
    assert found.lines[0] == 1
    assert read_table(titled).sentences == wanted[0]
    assert read_table(titled).lines[0] == 2
    assert read_table(quoted, "review", "stars").sentences == tuple(f"{a}, so" for a in wanted[0])
    assert read_table(plain, 1, 0).sentences == wanted[1]
    one = Text(plain, data / "tokenizer.json")
    assert [one.count(split) for split in ("train", "selection", "test")] == [32, 4, 4]


def test_labels_may_be_words(tmp_path: Path, data: Path):
    names = {"0": "negative", "1": "positive"}
    write(tmp_path / "train.tsv", [(a, names[b]) for a, b in rows(40, 0)])
    assert Text(tmp_path, data / "tokenizer.json").input.labels == ("negative", "positive")
    ordered = Text(tmp_path, data / "tokenizer.json", labels=["positive", "negative"])
    assert ordered.input.labels == ("positive", "negative")


@pytest.fixture(scope="module")
def trained(data: Path):
    """Task, builder and a BERT that has learned it, from names alone as a job gives them."""
    options = {"path": str(data), "tokenizer": str(data / "tokenizer.json"), "length": 12}
    task = make_task("text", options | {"training": {"lr": 2e-3, "batch": 32}})
    words = open_tokenizer(data / "tokenizer.json").get_vocab_size()
    size = {**TINY, "vocab_size": words, "max_position_embeddings": 12, "num_labels": 2}
    torch.manual_seed(0)
    builder = make_builder("hf:bert", task.input, size)
    run = Training(builder.build({}), task, 14, 0)
    assert isinstance(run.optimizer, torch.optim.AdamW)
    assert (run.lr, run.batch, run.recipe.decay) == (2e-3, 32, 0.01)
    run.run_to(1.0)
    return task, builder, run.module.eval()


def test_a_tiny_bert_learns_and_its_file_agrees(trained):
    task, _, module = trained
    exported = export.export(module, task.input, opset=17)
    inputs, _ = next(task.batches("calibration", 16))
    export.parity(module, export.compose(exported), *(one.numpy() for one in several(inputs)))
    quality = task.quality(export.predictor(export.compose(exported)), "test")
    assert quality.samples == 60
    assert quality.value.value > 0.9
    assert quality.value.low <= quality.value.value <= quality.value.high


def test_with_half_its_heads_and_in_int8_it_still_answers(trained):
    task, builder, module = trained
    asked = (("prune", {"ratio": 0.5}), ("quantize", {"bits": "int8"}))
    rules = [
        Rule(site=site.name, op=op, settings=settings)
        for op, settings in asked
        for site in builder.sites()
        if op in site.ops
    ]
    work = Work(
        builder=builder,
        task=task,
        ops=dict(make_ops(("prune", "quantize"))),
        parent=module,
        profiles=(Profile(name="p"),),
        epochs=8.0,
    )
    candidate = Candidate(arch={}, policy=Policy(rules=tuple(rules)))
    shaped = shape(work, candidate)
    assert all(entry.status == "done" for receipt in shaped.receipts for entry in receipt.entries)
    training(work, shaped, candidate.policy, seed=0).run_to(1.0)
    releases = release(work, shaped.module, candidate.policy)
    assert b"QuantizeLinear" in releases["u8s8-pc-minmax"].model
    assert qualities(work, releases, "selection")["p"].value.value > 0.85


def test_a_network_of_ones_own_may_go_without_a_mask(data: Path):
    task = Text(data, data / "tokenizer.json", length=12, mask=False)
    check_task(task)
    bag = nn.Sequential(nn.EmbeddingBag(300, 16), nn.Linear(16, 2))
    Training(bag, task, 100, 0, lr=0.05).run_to(1.0)
    bag.eval()
    with torch.no_grad():
        found = task.quality(lambda x: bag(torch.from_numpy(x)).numpy(), "selection").value.value
        assert found > 0.7


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokenizer": None}, r"data\.tokenizer: task text needs a tokenizer file; make one .*train_tokenizer"),
        ({"path": None}, r"data: task text needs `path`"),
        ({"path": ["a.tsv"]}, r"data\.path: \['a\.tsv'\] is no path"),
        ({"labels": "01"}, r"data\.labels: '01' is no list"),
        ({"tokenizer": "no.json"}, r"data\.tokenizer: there is no file .*no\.json; make one"),
        ({"tokenizer": "train.tsv"}, r"data\.tokenizer: .*train\.tsv is no tokenizer\.json or vocab\.txt"),
        ({"path": "nowhere"}, r"data\.path: there is no file or folder .*nowhere"),
        ({"length": 2}, r"data\.length: 2"),
        ({"sentence": "text"}, r"train\.tsv: data\.sentence: no column 'text'; the first line has"),
        ({"label": 5}, r"train\.tsv:1: has 2 columns, needed are 6"),
        ({"label": -1}, r"data: column -1; write a name, or a number from 0"),
        ({"labels": ["0"]}, r"train\.tsv:121: the label '1' is none of 0; name all"),
        ({"smoothing": -1}, r"data\.smoothing: -1"),
        ({"training": {"optimizer": "lamb"}}, r"training\.optimizer: Input should be 'sgd' or 'adamw'"),
        ({"selection": "dev"}, r"data\.selection: 'dev' is no range of train, val, test"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(data: Path, options: dict, says: str):
    given = {"path": data, "tokenizer": "tokenizer.json", **options}
    if given["tokenizer"] is not None:
        given["tokenizer"] = data / given["tokenizer"]
    with pytest.raises(UserError, match=says) as caught:
        Text(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.tsv", b"", r"train\.tsv: is empty"),
        ("train.tsv", b"good film\t1\nno label here\n", r"train\.tsv:2: has 1 columns, needed are 2"),
        ("train.tsv", b"good film\t1\nbad\t\n", r"train\.tsv:2: the label is empty"),
        ("train.tsv", b"\xff\xfe\x00", r"train\.tsv: not readable as a table of UTF-8 text"),
        ("test.tsv", b"good film\t-1\n", r"test\.tsv:1: the label '-1' is none of 0, 1"),
        ("valid.txt", b"", r"there is no train\.tsv or train\.csv in"),
    ],
)
def test_tables_that_cannot_be_used_are_named(tmp_path: Path, data: Path, name: str, content: bytes, says: str):
    if name == "test.tsv":
        write(tmp_path / "train.tsv", rows(40, 0))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        Text(tmp_path, data / "tokenizer.json")


def test_words_without_marks_are_refused(tmp_path: Path, data: Path):
    (tmp_path / "vocab.txt").write_text("[UNK]\nfilm\n")
    with pytest.raises(UserError, match=r"its words lack \[CLS\] or \[SEP\]"):
        Text(data, tmp_path / "vocab.txt")


def test_without_tokenizers_the_pip_line_is_said(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"task text needs more packages: pip install 'autocompress\[text\]'"):
        Text(data, data / "tokenizer.json")


def test_a_split_that_is_none_is_named(data: Path):
    with pytest.raises(UserError, match=r"no split 'dev'; there are train, calibration, selection, test"):
        next(Text(data, data / "tokenizer.json").batches("dev", 4))


@pytest.mark.skipif("AUTOCOMPRESS_DATA" not in os.environ, reason="AUTOCOMPRESS_DATA names no folder of reference data")
def test_the_reference_data_are_read(tmp_path: Path):
    folder = Path(os.environ["AUTOCOMPRESS_DATA"]) / "sst2"
    task = Text(folder, train_tokenizer([folder / "train.tsv"], tmp_path / "t.json", vocabulary=2000), length=48)
    assert [task.count(split) for split in ("train", "selection", "test")] == [6920, 872, 1821]
    check_task(task)
