"""Op store and its file: what is read back is the ONNX file bit for bit, what is rounded is what is stored."""

import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from autocompress.export import compose, export, graph_hash, predictor
from autocompress.ops.quantize import Quantize
from autocompress.ops.storage import restore, storage
from autocompress.ops.store import Store, codecs_of, main
from autocompress.tasks.digits import Digits
from autocompress.testing import check_op
from autocompress.types import Profile, Rule, UserError

OP, PROFILE = Store(), Profile(name="here")


def network(pruned: float = 0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        ).eval()
        with torch.no_grad():
            for weight in (module[2].weight, module[5].weight):
                weight[torch.rand(weight.shape) < pruned] = 0.0
    return export(module, Digits.input, opset=17)


def rule(site: str, **settings) -> Rule:
    return Rule(site=site, op="store", settings=settings)


def weights(model: bytes) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(model).graph.initializer}


@pytest.mark.parametrize("codec", ["zstd", "sparse", "codebook", "pow2"])
@pytest.mark.parametrize("bits", ["float", "int8"])
def test_every_codec_keeps_the_contract_and_is_read_back_bit_for_bit(codec, bits):
    subject = network(0.8 if codec == "sparse" else 0.0)
    if bits == "int8":
        asked = [Rule(site=site, op="quantize", settings={"bits": bits}) for site in ("0", "2", "5")]
        subject = Quantize().enact(subject, Quantize().decide(subject, asked, Digits(), PROFILE, limit=32))
    receipt = check_op(OP, subject, [rule("2", codec=codec), rule("5", codec=codec)], Digits(), PROFILE)
    assert [entry.status for entry in receipt.entries] == ["done", "done"]
    model = compose(OP.enact(subject, receipt))
    stored = storage(model, codecs_of([receipt]))
    assert restore(stored) == model
    assert stored == storage(model, codecs_of([receipt]))
    most = {"zstd": 0.95, "sparse": 0.4, "codebook": 0.25, "pow2": 0.3}[codec]
    assert receipt.entries[0].achieved["stored"] < most * (1.0 if bits == "float" else 3.0)
    assert len(stored) < len(model)
    assert graph_hash(model, weights=False) == graph_hash(compose(subject), weights=False)  # no word of speed


def test_the_file_computes_with_the_values_that_are_stored():
    subject, images = network(), next(Digits().batches("selection", 64))[0].numpy()
    before = predictor(compose(subject))(images)
    errors = {}
    for codec, entries in (("zstd", 16), ("codebook", 16), ("codebook", 256), ("pow2", 16)):
        receipt = OP.decide(subject, [rule(".", codec=codec, entries=entries)], Digits(), PROFILE)
        model = compose(OP.enact(subject, receipt))
        distinct = max(len(np.unique(values)) for values in weights(model).values() if values.ndim > 1)
        assert distinct <= {"zstd": 10**6, "pow2": 17}.get(codec, entries)
        errors[codec, entries] = float(
            np.abs(predictor(restore(storage(model, codecs_of([receipt]))))(images) - before).max()
        )
    assert errors["zstd", 16] == 0.0
    assert errors["codebook", 256] < errors["codebook", 16] < np.abs(before).max() * 0.5
    assert errors["pow2", 16] < np.abs(before).max() * 0.5


def test_powers_of_two_are_those_of_the_paper():
    receipt = OP.decide(network(), [rule("2", codec="pow2")], Digits(), PROFILE)
    table = receipt.entries[0].facts["model"]["2.weight"]["table"]
    largest = np.abs(weights(compose(network()))["2.weight"]).max()
    assert max(table) == 2.0 ** np.floor(np.log2(4 * largest / 3))
    assert sorted(-value for value in table) == table
    assert len(table) == 17
    assert all(np.log2(value) == np.rint(np.log2(value)) for value in table if value > 0)


def test_what_is_pruned_stays_pruned_in_a_codebook():
    subject = network(0.7)
    receipt = OP.decide(subject, [rule("2", codec="codebook")], Digits(), PROFILE)
    before, after = (weights(compose(one))["2.weight"] for one in (subject, OP.enact(subject, receipt)))
    assert not after[before == 0].any()
    assert len(receipt.entries[0].facts["model"]["2.weight"]["table"]) <= 16


def test_a_sites_own_rule_outranks_the_networks():
    subject = network()
    receipt = OP.decide(
        subject, [rule("0", codec="none"), rule("5", codec="pow2"), rule(".", codec="zstd")], Digits(), PROFILE
    )
    found = {name: fact["codec"] for e in receipt.entries for name, fact in e.facts["model"].items()}
    assert found == {"5.weight": "pow2", "2.weight": "zstd"}
    assert codecs_of([receipt]) == found | {"": "zstd"}
    assert codecs_of([OP.decide(subject, [rule("2", codec="none")], Digits(), PROFILE)]) == {}
    assert codecs_of([receipt], ("model", "head"))["model:5.weight"] == "pow2"


def test_packed_weights_and_sites_without_weights_are_skipped():
    subject = network()
    asked = [Rule(site="5", op="quantize", settings={"bits": "int4"})]
    subject = Quantize().enact(subject, Quantize().decide(subject, asked, Digits(), PROFILE))
    receipt = OP.decide(subject, [rule("5", codec="codebook"), rule("9", codec="zstd")], Digits(), PROFILE)
    assert [(entry.site, entry.why) for entry in receipt.entries] == [
        ("5", "its weights are packed already"),
        ("9", "no weights in the file, or every one of them has a rule of its own"),
    ]
    assert OP.decide(subject, [rule("5", codec="zstd")], Digits(), PROFILE).entries[0].status == "done"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codec": "zip"}, "codec = 'zip'"),
        ({"codec": "codebook", "entries": 5}, "entries = 5"),
        ({"level": 3}, "'level'"),
    ],
)
def test_unknown_settings_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        OP.decide(network(), [rule("2", **settings)], Digits(), PROFILE)


def test_receipts_of_other_networks_are_refused():
    receipt = OP.decide(network(), [rule("2", codec="pow2")], Digits(), PROFILE)
    other = export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), Digits.input, opset=17)
    with pytest.raises(UserError, match=r"store: the receipt speaks of '2\.weight'"):
        OP.enact(other, receipt)


def file_of(*tensors: onnx.TensorProto) -> bytes:
    return helper.make_model(helper.make_graph([], "g", [], [], list(tensors))).SerializeToString(deterministic=True)


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8, np.uint8, np.int64])
@pytest.mark.parametrize("codec", ["zstd", "sparse", "codebook"])
def test_odd_values_survive(kind, codec):
    values = np.array([0.0, -0.0, 1.0, 0.0, 3.0] * 101, np.float32)
    if np.issubdtype(kind, np.floating):
        values[7] = np.nan
    with np.errstate(invalid="ignore"):
        values = np.abs(values).astype(kind) if kind == np.uint8 else values.astype(kind)
    tensors = [numpy_helper.from_array(values, "w"), numpy_helper.from_array(np.zeros(0, kind), "none")]
    tensors.append(helper.make_tensor("typed", onnx.TensorProto.FLOAT, [3], [1.0, -0.0, 2.0]))  # in another field
    model = file_of(*tensors)
    stored = storage(model, {"w": codec, "none": codec, "typed": codec})
    assert restore(stored) == model


def test_wrong_asks_are_named():
    model = file_of(numpy_helper.from_array(np.arange(300, dtype=np.float32), "w"))
    with pytest.raises(UserError, match="no constant 'v'"):
        storage(model, {"v": "zstd"})
    with pytest.raises(UserError, match="300 different values"):
        storage(model, {"w": "codebook"})


def test_a_damaged_file_is_said_to_be_one():
    model = compose(network())
    stored = storage(model, {"2.weight": "zstd"})
    with pytest.raises(UserError, match="no stored model"):
        restore(model)
    with pytest.raises(UserError, match="damaged"):
        restore(stored[:-50])
    flipped = bytearray(stored)
    flipped[-10] ^= 1
    with pytest.raises(UserError, match="damaged"):
        restore(bytes(flipped))
    with pytest.raises(UserError, match="format 'x/9'"):
        restore(b'{"format":"x/9"}\n')


def test_a_missing_zstandard_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r"pip install 'autocompress\[storage\]'"):
        OP.decide(network(), [rule("2", codec="zstd")], Digits(), PROFILE)
    receipt = OP.decide(network(), [rule("2", codec="codebook")], Digits(), PROFILE)  # needs nothing
    assert receipt.entries[0].status == "done"


def test_the_command_restores_a_file(tmp_path, capsys):
    model = compose(network())
    (tmp_path / "model.store").write_bytes(storage(model, {"2.weight": "zstd"}))
    assert main(["restore", str(tmp_path / "model.store")]) == 0
    assert (tmp_path / "model.onnx").read_bytes() == model
    assert main(["restore", str(tmp_path / "model.store"), str(tmp_path / "other.onnx")]) == 0
    assert (tmp_path / "other.onnx").read_bytes() == model
    assert main(["restore", str(tmp_path / "model.onnx")]) == 2
    assert main([]) == 2
    assert main(["restore", str(tmp_path / "nothing")]) == 2
    assert "usage" in capsys.readouterr().err
