"""An artifact checked again: what is whole passes, and every real fault is one clear line."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from rich.console import Console
from safetensors.torch import load_file, save_file

from autocompress import artifact, evidence, live, summary
from autocompress.estimate import estimate
from autocompress.parts import parts
from autocompress.run import run
from autocompress.tasks.digits import Digits
from autocompress.types import Budget, Numeric, Profile, UserError
from autocompress.verify import Check, Verified, verify
from autocompress.wording import TIMES
from tests.small_search import builder, job, space

ASKED = Budget(
    profile="local-1t", speedup=0.01, latency_ms=1e3, p95_ms=1e3, throughput=1.0, size_mb=100.0, memory_mb=4e3
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One serial search; its winner is what the tests below copy and damage."""
    folder = tmp_path_factory.mktemp("verify")
    asked = job(folder / "run", sessions=5).model_copy(update={"devices": (ASKED,)})
    run(asked, builder=builder(), space=space(folder), serial=True, console=Console(quiet=True))
    return folder / "run"


@pytest.fixture
def made(out: Path, tmp_path: Path) -> Path:
    """A copy of the search, which may be damaged."""
    shutil.copytree(out, tmp_path / "run")
    (found,) = (tmp_path / "run").glob("*/local-1t")
    return found


def by_name(found: Verified) -> dict[str, Check]:
    return {check.name: check for check in found.checks}


def firm(found: Verified, *but: str) -> bool:
    """Whether nothing failed, a busy machine's noise and the named checks aside."""
    bad = [check for check in found.checks if check.status == "failed" and check.name not in but]
    return all("noisy" in check.says or check.name == "speedup" for check in bad)


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of a manifest (dots go down); hashes of files as they lie there are taken anew."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for key, value in changes.items():
        *path, last = key.split("__")
        place = manifest
        for part in path:
            place = place[int(part) if isinstance(place, list) else part]
        place[last] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_artifact_passes_and_says_what_was_looked_at(made: Path) -> None:
    said: list[Check] = []
    found = verify(made, model=builder(), say=said.append)
    assert tuple(said) == found.checks
    checks = by_name(found)
    bounds = {"speedup", "latency_ms", "p95_ms", "throughput", "size_mb", "memory_mb"}
    assert set(checks) == {"files", "samples", "parity", "rebuilt", "baseline", "device", "quality", "latency"} | bounds
    assert firm(found), found
    assert checks["parity"].says == "model.onnx gives the stored answers exactly"
    assert "byte for byte" in checks["rebuilt"].says
    runs = artifact.read(made).manifest.certificate.readings["local-1t"].samples
    assert checks["samples"].says == f"the certificate's figures follow from its {runs} runs"
    assert checks["device"].says.endswith("the certificate's own")
    assert "360 samples (all of the split) on" in checks["quality"].says
    assert "5 sessions" in checks["latency"].says
    assert found.certificates["local-1t"].readings["local-1t"].fingerprint in found.fingerprints
    assert all("\n" not in str(check) for check in found.checks)


def test_every_budget_goes_from_the_job_to_every_page(out: Path) -> None:
    (made,) = out.glob("*/local-1t")
    proof = artifact.read(made).manifest.certificate
    reading = proof.readings["local-1t"]
    assert {bound.name for bound in proof.bounds} == set(ASKED.model_fields_set) - {"profile"}
    assert all(bound.met for bound in proof.bounds)
    assert reading.memory_mb is not None
    assert 0 < reading.memory_mb < 4e3
    rows = list(csv.DictReader((out / "front.csv").read_text().splitlines()))
    assert all(float(row["p95_low"]) <= float(row["p95_ms"]) <= float(row["p95_high"]) for row in rows)
    assert all(float(row["throughput"]) > 1 for row in rows)
    assert all(float(row["memory_mb"]) > 0 for row in rows if row["number"] != "0")  # the search asked for it
    assert all(row["drift"] != "" and row["slowed"] != "" for row in rows)
    found = summary.read(out)
    assert found is not None
    (winner,) = [*found.winners.values(), *found.closest.values()]
    figures = winner.devices["local-1t"]
    assert figures.memory_mb == reading.memory_mb
    assert figures.throughput == reading.throughput
    words = summary.beside(figures, ASKED)
    assert [part for part in ("p95", "samples/s", "MB of memory") if any(part in one for one in words)] == [
        "p95", "samples/s", "MB of memory",
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    assert "MB of memory" in page
    assert "samples/s" in page
    assert "also asked: p95 1000 ms, 100 MB, 4000 MB in memory" in page
    said = live.result_lines(found, out)
    assert "samples/s" in said[0]
    assert "MB of memory" in said[0]
    drifted = figures.model_copy(update={"drift": 0.031, "slowed": 0.0, "memory_mb": None})
    assert summary.beside(drifted, ASKED)[-2:] == ("memory unknown", "the baseline drifted by +3.1%")
    slow = figures.model_copy(update={"drift": 0.0, "slowed": 0.12, "memory_mb": None})
    assert summary.beside(slow, None) == ("the device was 12% slower than at its fastest",)
    assert summary.beside(slow.model_copy(update={"slowed": 0.0}), None) == ()


def test_check_shows_what_is_asked_and_what_certifying_takes(tmp_path: Path) -> None:
    asked = job(tmp_path / "run", sessions=5).model_copy(update={"devices": (ASKED,)})
    words = str(estimate(asked, parts(asked, builder=builder(), space=space(tmp_path))))
    assert f"local-1t: 1000 ms, p95 1000 ms, 0.01{TIMES}, 1/s, 100 MB, 4000 MB in memory" in words
    assert "5 sessions per finalist and device" in words


def test_the_certificate_has_its_evidence(made: Path) -> None:
    read = artifact.read(made)
    proof = read.manifest.certificate
    reading = proof.readings["local-1t"]
    assert read.manifest.fingerprints[reading.fingerprint]["processor"]  # facts, not only their hash
    assert len(proof.each["local-1t"]) == proof.sessions["local-1t"] == 5
    assert sum(one.samples for one in proof.each["local-1t"]) == reading.samples
    assert all(one.p95_ms.low <= one.p95_ms.value <= one.p95_ms.high for one in proof.each["local-1t"])
    checked = proof.checked["local-1t"]
    assert checked.on_device
    assert checked.samples == 360  # all that the split has
    assert read.manifest.selection == proof.quality
    assert read.manifest.baseline.sha256 == _sha(made.parents[1] / "baseline" / "model.onnx")


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["weights.safetensors", "model.onnx", "check.npz", "samples.npz", "infer.py"])
def test_one_changed_byte_fails_and_nothing_is_run(made: Path, name: str) -> None:
    data = bytearray((made / name).read_bytes())
    data[len(data) // 2] ^= 1
    (made / name).write_bytes(data)
    found = verify(made, model=builder())
    assert not found.passed
    assert [check.name for check in found.checks] == ["files"]
    assert f"{name}: changed since" in found.checks[0].says


def test_every_bad_file_has_its_line_and_a_broken_manifest_is_one(made: Path) -> None:
    (made / "model.onnx").unlink()
    (made / "policy.json").write_text("{}")
    found = verify(made)
    assert [check.status for check in found.checks] == ["failed", "failed"]
    assert {"model.onnx: missing", "policy.json: changed"} == {
        word for word in ("model.onnx: missing", "policy.json: changed") if word in str(found.checks)
    }
    (made / "manifest.json").write_text("{")
    assert by_name(verify(made))["files"].status == "failed"
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        verify(made / "nowhere")


def test_a_file_that_answers_otherwise_fails_though_its_hash_was_mended(made: Path) -> None:
    model = onnx.load(str(made / "model.onnx"))
    bias = max(
        (t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) >= 1),
        key=lambda tensor: tensor.name.startswith("head"),
    )
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * 3 + 1, bias.name))
    onnx.save(model, str(made / "model.onnx"))
    edit(made)
    checks = by_name(verify(made, model=builder(), sessions=1, quality=False))
    assert checks["files"].status == "ok"
    assert checks["parity"].status == "failed"
    assert "at most 0.01 is allowed" in checks["parity"].says
    assert checks["rebuilt"].status == "failed"


def test_weights_that_do_not_make_the_file_fail(made: Path) -> None:
    tensors = load_file(made / "weights.safetensors")
    save_file({name: tensor + 0.05 * torch.ones_like(tensor) if tensor.is_floating_point() else tensor
               for name, tensor in tensors.items()}, made / "weights.safetensors")  # fmt: skip
    edit(made)
    checks = by_name(verify(made, model=builder(), sessions=1, quality=False))
    assert checks["parity"].status == "ok"
    assert checks["rebuilt"].status == "failed"
    assert "made again from its receipts differs" in checks["rebuilt"].says


def test_away_from_its_search_a_speedup_cannot_be_judged(made: Path, tmp_path: Path) -> None:
    alone = tmp_path / "shipped" / "to" / "somebody" / "else" / "there" / "model"
    shutil.copytree(made, alone)
    checks = by_name(verify(alone, sessions=1, quality=False))
    assert checks["baseline"].status == "skipped"
    assert "give --baseline FILE" in checks["baseline"].says
    assert "baseline" not in checks["latency"].says
    assert checks["speedup"].status == "failed"
    assert "cannot be judged without the baseline" in checks["speedup"].says
    edit(alone, goal__budgets=[{"profile": "local-1t", "latency_ms": 1000.0, "size_mb": 100.0}])
    found = verify(alone, sessions=1, quality=False)
    assert firm(found)
    assert {"latency_ms", "size_mb"} <= set(by_name(found))
    given = verify(alone, sessions=1, quality=False, baseline=made.parents[1] / "baseline" / "model.onnx")
    assert by_name(given)["baseline"].status == "ok"
    assert "the baseline" in by_name(given)["latency"].says
    wrong = verify(alone, sessions=1, quality=False, baseline=alone / "model.onnx")
    assert "is not the file that the certificate was measured against" in by_name(wrong)["baseline"].says
    assert by_name(verify(alone, sessions=1, quality=False, baseline=alone / "no.onnx"))["baseline"].status == "failed"


def test_limits_that_do_not_hold_fail_by_name(made: Path) -> None:
    asked = {"profile": "local-1t", "speedup": 1000.0, "p95_ms": 1e-6, "size_mb": 1e-6, "throughput": 1e12}
    edit(made, goal__budgets=[asked], certificate__floor=0.9999)
    found = verify(made, sessions=1)
    checks = by_name(found)
    assert {name for name, one in checks.items() if one.status == "failed"} >= {
        "speedup", "p95_ms", "size_mb", "throughput", "quality",
    }  # fmt: skip
    assert "is below the floor 0.9999" in checks["quality"].says
    assert "1000x asked: does not hold" in checks["speedup"].says


def test_another_processor_is_said_and_allowed_what_rounding_may_do(made: Path) -> None:
    manifest = artifact.read(made).manifest
    facts = {key: {**value, "processor": "Another Chip 9000"} for key, value in manifest.fingerprints.items()}
    edit(made, fingerprints=facts)
    checks = by_name(verify(made, sessions=1, quality=False))
    assert "another processor than the certificate's Another Chip 9000" in checks["device"].says
    assert "another processor" in checks["parity"].says
    assert checks["parity"].status == "ok"


def test_nothing_that_an_artifact_names_is_imported_or_reached(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_things.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    policy = json.loads((made / "policy.json").read_text()) | {"builder": "evil_things:Net"}
    (made / "policy.json").write_text(json.dumps(policy))
    edit(made, builder="evil_things:Net", task="evil_things:Task")
    checks = by_name(verify(made, sessions=1))
    assert checks["rebuilt"].status == "skipped"
    assert "--trust evil_things" in checks["rebuilt"].says
    assert checks["quality"].status == "failed"
    assert "--no-quality" in checks["quality"].says
    for change in ({"device": "evil_things:Device"}, {"device": "ssh"}, {"provider_options": {"library": "evil.so"}}):
        edit(made, profiles=[{**artifact.read(made).manifest.profiles[0].model_dump(), "device": "local", **change}])
        check = by_name(verify(made, sessions=1, quality=False))["device"]
        assert check.status == "failed"
        assert "an artifact may not decide" in check.says
    assert "evil_things" not in sys.modules


def test_a_device_of_the_users_own(made: Path) -> None:
    numeric = artifact.read(made).manifest.profiles[0].numeric
    mine = Profile(name="mine", numeric=numeric, batch=4)
    found = verify(made, devices=[mine], sessions=1, quality=False)
    assert by_name(found)["latency"].device == "mine"
    assert "samples/s" in by_name(found)["latency"].says
    assert firm(found)
    other = Numeric(activation="int8" if numeric.activation == "uint8" else "uint8")
    with pytest.raises(UserError, match="no file for odd"):
        verify(made, devices=[Profile(name="odd", numeric=other)])
    away = verify(made, devices=[Profile(name="local-1t", provider="NoSuchExecutionProvider")], sessions=1)
    assert not away.passed
    assert "NoSuchExecutionProvider" in str(away.checks[-1])


def test_the_command_has_an_exit_code_for_pipelines(made: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "autocompress.cli", "verify", str(made), "--no-quality", "--sessions", "1"]
        return subprocess.run([*line, *arguments], capture_output=True, text=True, check=False)

    edit(made, goal__budgets=[{"profile": "local-1t", "size_mb": 100.0}])
    good = command("--json")
    found = json.loads(good.stdout)
    assert good.returncode == (0 if found["passed"] else 1)
    assert {check["name"] for check in found["checks"]} >= {"files", "parity", "size_mb"}
    (made / "model.onnx").write_bytes(b"no model")
    bad = command()
    assert bad.returncode == 1
    assert "failed  files" in bad.stdout
    assert "1 of 1 checks failed" in bad.stdout
    assert bad.stderr == ""


def test_figures_that_do_not_follow_from_the_runs_are_found(made: Path) -> None:
    proof, path = artifact.read(made).manifest.certificate, made / "samples.npz"
    data = path.read_bytes()
    assert len(data) < 8 * proof.readings["local-1t"].samples  # of as many runs of the baseline, too
    with pytest.raises(UserError, match=r"samples\.npz"):
        evidence.follows(data[:100], proof)
    better = proof.each["local-1t"][2].ratio.model_dump(mode="json")
    edit(made, **{"certificate__each__local-1t__2__ratio": {**better, "value": better["value"] * 0.99}})
    said = by_name(verify(made, quality=False, sessions=1))["samples"]
    assert said.status == "failed"
    assert said.says.startswith("session 3 on local-1t: ratio")
    path.unlink()
    manifest = json.loads((made / "manifest.json").read_text())
    del manifest["files"]["samples.npz"]
    (made / "manifest.json").write_text(json.dumps(manifest))
    assert by_name(verify(made, quality=False, sessions=1))["samples"].status == "skipped"


def test_a_pair_tells_equal_files_from_others_and_refuses_a_damaged_one(made: Path) -> None:
    model, spec = (made / "model.onnx").read_bytes(), Digits().input
    data = evidence.pair(spec, {"model.onnx": model})
    assert data == evidence.pair(spec, {"model.onnx": model}) == (made / "check.npz").read_bytes()
    assert evidence.disagreement(data, spec, "model.onnx", model) == 0
    baseline = (made.parents[1] / "baseline" / "model.onnx").read_bytes()
    assert evidence.disagreement(data, spec, "model.onnx", baseline) > 0.01
    with pytest.raises(UserError, match="no answers of this shape for other"):
        evidence.disagreement(data, spec, "other.onnx", model)
    for broken in (b"", data[:100], b"\x93NUMPY", data.replace(b"input:input", b"input:other")):
        with pytest.raises(UserError, match=r"check\.npz"):
            evidence.disagreement(broken, spec, "model.onnx", model)
