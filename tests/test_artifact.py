"""Artifacts: whole or not at all, vouched for by hashes, and read without executing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from autocompress import artifact
from autocompress.artifact import Manifest, PolicyFile, check_policy, read, read_policy, write
from autocompress.certify import Certificate
from autocompress.tasks import InputSpec
from autocompress.types import Budget, Entry, Goal, Policy, Receipt, Rule, Site, UserError

SITES = (
    Site(name="stem", kind="conv", ops=("quantize",), in_channels=1, out_channels=4, kernel=3),
    Site(name="stages.0.conv1", kind="conv", ops=("prune",), in_channels=4, out_channels=8, kernel=3),
    Site(name="head", kind="linear", in_channels=8, out_channels=3),
)
POLICY = PolicyFile(
    builder="convnet",
    arch={"depth": 1, "width": 0.5, "block": "plain", "skip": True},
    policy=Policy(rules=(Rule(site="stages.0.conv1", op="prune", settings={"ratio": 0.5, "importance": "l1"}),)),
    receipts=(Receipt(op="prune", entries=(Entry(site="stages.0.conv1", facts={"kept": [0, 2]}),)),),
    sites=SITES,
)


def tiny_model(labels: int = 3) -> bytes:
    """`scores = input.reshape(N, 4)[:, :labels]` as an ONNX file."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, (4, labels), np.eye(4, labels).ravel().tolist())
    shape = helper.make_tensor("s", TensorProto.INT64, (2,), [0, 4])
    nodes = [helper.make_node("Reshape", ["input", "s"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["out"])]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 2, 2])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", labels])],
        [weight, shape],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


def manifest(**more: Any) -> Manifest:
    goal = Goal(name="local-1t", budgets=(Budget(profile="local-1t", speedup=3),))
    proof = Certificate(goal="local-1t", certified=True, budget_met=True, quality_held=True, floor=0.9)
    spec = InputSpec(shape=(1, 2, 2), labels=("zero", "one", "two"))
    return Manifest(goal=goal, certificate=proof, input=spec, task="digits", builder="convnet", **more)


def made(folder: Path, **more: Any) -> artifact.Artifact:
    weights = {"stem.weight": torch.arange(12.0).reshape(4, 3), "tied": torch.ones(2)}
    return write(folder, model=tiny_model(), weights=weights, policy=POLICY, manifest=manifest(), **more)


def test_what_is_written_is_read(tmp_path: Path):
    first = made(tmp_path / "best" / "local-1t")
    found = read(tmp_path / "best" / "local-1t")
    assert found == first
    assert sorted(p.name for p in found.folder.iterdir()) == sorted(
        ["model.onnx", "weights.safetensors", "policy.json", "manifest.json", "infer.py"]
    )
    assert found.policy == POLICY
    assert torch.equal(found.weights()["stem.weight"], torch.arange(12.0).reshape(4, 3))
    assert found.model() == found.model("local-1t")
    assert onnx.load(str(found.model())).graph.name == "tiny"
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["local-1t"]  # nothing left beside it


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path):
    made(tmp_path / "a")
    made(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "policy.json", "infer.py"])
def test_a_changed_or_missing_file_is_named(tmp_path: Path, name: str):
    made(tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=f"{name}: changed since"):
        read(tmp_path / "a")
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        read(tmp_path / "a")


def test_no_folder_no_manifest_and_a_damaged_manifest(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"manifest\.json: missing"):
        read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: "):
        read(tmp_path)


def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path: Path):
    made(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    data = json.loads(path.read_text())
    data["files"]["../../etc/passwd"] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="not a plain file name"):
        read(tmp_path / "a")
    del data["files"]["../../etc/passwd"]
    data["models"] = {"local-1t": "/etc/passwd"}
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="does not vouch"):
        read(tmp_path / "a")


def test_rewriting_replaces_ours_and_keeps_what_is_not(tmp_path: Path):
    made(tmp_path / "a", variants={"model-s8s8.onnx": b"old variant"})
    (tmp_path / "a" / "notes.txt").write_text("mine")
    made(tmp_path / "a")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "a" / "model-s8s8.onnx").exists()
    read(tmp_path / "a")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else than an artifact"):
        made(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_failed_rename_leaves_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made(tmp_path / "a")
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match="No space left"):
        made(tmp_path / "a")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    read(tmp_path / "a")


def test_variants_are_named_served_and_checked(tmp_path: Path):
    goal = Goal(name="all-devices", budgets=(Budget(profile="a", speedup=2), Budget(profile="b", speedup=2)))
    record = manifest().model_copy(update={"goal": goal, "models": {"a": "model.onnx", "b": "model-s8s8.onnx"}})
    extra = {"model-s8s8.onnx": tiny_model(2)}
    found = write(tmp_path / "v", model=tiny_model(), weights={}, policy=POLICY, manifest=record, variants=extra)
    assert read(tmp_path / "v").model("b").read_bytes() == tiny_model(2)
    with pytest.raises(UserError, match="serves: a, b"):
        found.model("c")
    with pytest.raises(UserError, match="is not written"):
        write(tmp_path / "w", model=b"", weights={}, policy=POLICY, manifest=record)
    with pytest.raises(UserError, match="not a file name of a variant"):
        write(tmp_path / "w", model=b"", weights={}, policy=POLICY, manifest=record, variants={"../x.onnx": b""})
    assert not (tmp_path / "w").exists()


def test_tied_tensors_are_written(tmp_path: Path):
    tensor = torch.ones(3)
    found = write(tmp_path / "t", model=b"", weights={"a": tensor, "b": tensor}, policy=POLICY, manifest=manifest())
    assert set(found.weights()) == {"a", "b"}


def test_weights_that_are_no_safetensors_are_a_clear_error(tmp_path: Path):
    found = write(tmp_path / "t", model=b"", weights=b"\x80\x04pickle", policy=POLICY, manifest=manifest())
    with pytest.raises(UserError, match="not a readable safetensors file"):
        found.weights()


def test_infer_runs_alone_in_a_page(tmp_path: Path):
    made(tmp_path / "a")
    script = tmp_path / "a" / "infer.py"
    assert len(script.read_text().splitlines()) <= 25
    np.save(tmp_path / "x.npy", np.array([[[[0.0, 0.0], [5.0, 0.0]]], [[[0.0, 3.0], [0.0, 0.0]]]], dtype=np.float64))

    def run(*arguments: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-I", str(script), *arguments], check=True, capture_output=True, text=True, cwd="/"
        )
        return done.stdout.split()

    assert run(str(tmp_path / "x.npy")) == ["two", "one"]
    assert run()[0] in ("zero", "one", "two")


def two_and_two() -> bytes:
    """`total = ids + mask` and `most = max(total)` of two int64 inputs (N, 3)."""
    three = [helper.make_tensor_value_info(name, TensorProto.INT64, ["N", 3]) for name in ("ids", "mask", "total")]
    most = helper.make_tensor_value_info("most", TensorProto.INT64, ["N", 1])
    nodes = [
        helper.make_node("Add", ["ids", "mask"], ["total"]),
        helper.make_node("ReduceMax", ["total"], ["most"], axes=[1]),
    ]
    graph = helper.make_graph(nodes, "two", three[:2], [three[2], most])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


def test_infer_feeds_several_inputs_by_name_and_prints_what_is_no_class(tmp_path: Path):
    other = InputSpec(name="mask", shape=(3,), dtype="int64", layout="")
    spec = InputSpec(name="ids", shape=(3,), dtype="int64", layout="", labels=("a", "b", "c"), others=(other,))
    proof = manifest().model_copy(update={"input": spec})
    found = write(tmp_path / "a", model=two_and_two(), weights={}, policy=POLICY, manifest=proof)
    assert read(found.folder).manifest.input == spec
    np.savez(tmp_path / "x.npz", ids=np.array([[4.0, 5.0, 6.0]]), mask=np.array([1, 0, 0]))
    np.save(tmp_path / "x.npy", np.zeros((1, 3)))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = str(found.folder / "infer.py")
        return subprocess.run(
            [sys.executable, "-I", script, *arguments], check=False, capture_output=True, text=True, cwd="/"
        )

    lines = run(str(tmp_path / "x.npz")).stdout.splitlines()
    assert lines == ["total", "(1, 3)", "[[5 5 6]]", "most", "(1, 1)", "[[6]]"]
    assert "[[2 2 2]]" in run().stdout
    alone = run(str(tmp_path / "x.npy"))
    assert alone.returncode == 1
    assert "no array 'mask'; give an .npz with arrays named ids, mask" in alone.stderr


# --- policies --------------------------------------------------------------------------------------------------------


def policy_json(**more: Any) -> bytes:
    return json.dumps({**json.loads(POLICY.model_dump_json()), **more}).encode()


def test_a_policy_survives_json():
    assert read_policy(policy_json()) == POLICY


def test_unknown_ops_and_code_are_refused_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "evil_module.py").write_text("import pathlib\npathlib.Path('executed').touch()\nattr = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for op in ("evil_module:attr", "prunee", "os:system", ""):
        rules = {"rules": [{"site": "stem", "op": op, "settings": {}}]}
        with pytest.raises(UserError) as caught:
            read_policy(policy_json(policy=rules))
        assert "\n" not in str(caught.value)
        receipts = [{"op": op, "entries": []}]
        with pytest.raises(UserError):
            read_policy(policy_json(receipts=receipts))
        with pytest.raises(UserError):
            read_policy(policy_json(numeric={"u8s8-pc-minmax": receipts}))
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "executed").exists()


def test_a_trusted_package_may_bring_an_op_and_a_look_needs_no_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_ops.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    data = policy_json(policy={"rules": [{"site": "stem", "op": "my_ops:Halve", "settings": {}}]})
    assert artifact.look(data) == read_policy(data, trust=["my_ops"])
    with pytest.raises(UserError, match="cannot name code"):
        read_policy(data, trust=["my_op", "my_ops.sub"])


def test_the_builder_is_named_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_builder_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_policy(policy_json(builder="my_builder_module:Net")).builder == "my_builder_module:Net"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "policy.json"),
        (b"[]", "policy.json"),
        (b"\xff\xfe", "policy.json"),
        (b"[" * 100_000, "policy.json"),
        (policy_json(format=2), "format"),
        (policy_json(polcy={}), "polcy"),
        (policy_json(builder=3), "builder"),
        (policy_json(arch={"width": float("nan")}), "not finite"),
        (policy_json(sites=[SITES[0].model_dump(), SITES[0].model_dump()]), "occurs twice"),
    ],
)
def test_bad_policies_are_one_clear_line(data: bytes, words: str):
    with pytest.raises(UserError, match=words) as caught:
        read_policy(data)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_policy_or_a_user_error(data: bytes):
    try:
        found = read_policy(data)
    except UserError as refused:
        found = refused
    assert isinstance(found, PolicyFile) or "\n" not in str(found)


@given(st.sampled_from(sorted(PolicyFile.model_fields)), JSON)
def test_any_field_replaced_by_any_value_is_a_policy_or_a_user_error(field: str, value: object):
    try:
        found = read_policy(policy_json(**{field: value}))
    except UserError as refused:
        found = refused
    if isinstance(found, PolicyFile):
        assert read_policy(found.model_dump_json().encode()) == found
    else:
        assert "\n" not in str(found)


def test_the_same_network_passes_and_another_is_described():
    check_policy(POLICY, SITES)
    wider = SITES[1].model_copy(update={"out_channels": 16})
    with pytest.raises(UserError, match=r"conv 4->8 kernel 3 there, conv 4->16 kernel 3 here"):
        check_policy(POLICY, (SITES[0], wider, SITES[2]))
    with pytest.raises(UserError, match=r"no site 'stages\.0\.conv1' here"):
        check_policy(POLICY, (SITES[0], SITES[2]))
    extra = Site(name="aux", kind="linear", in_channels=8, out_channels=2)
    with pytest.raises(UserError, match="'aux' is not in the policy's network"):
        check_policy(POLICY, (*SITES, extra))
    with pytest.raises(UserError) as caught:
        check_policy(POLICY, tuple(extra.model_copy(update={"name": f"other.{i}"}) for i in range(5)))
    assert str(caught.value).endswith("; and 5 more")


def test_a_rule_for_a_site_its_own_network_lacks_is_told():
    strange = POLICY.model_copy(update={"policy": Policy(rules=(Rule(site="nose", op="prune", settings={}),))})
    with pytest.raises(UserError, match="'nose', which its own network lacks"):
        check_policy(strange, SITES)
    whole = POLICY.model_copy(update={"policy": Policy(rules=(Rule(site="stages.0", op="prune", settings={}),))})
    check_policy(whole, SITES)
