"""A search's front on another device: files of its variant, its own ranking and certificate, no new search."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from autocompress import artifact, summary
from autocompress.remeasure import Remeasured, remeasure
from autocompress.run import run
from autocompress.types import Numeric, Profile, UserError
from autocompress.verify import verify
from tests.small_search import builder, job, space


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One serial search; the tests below measure copies of it again."""
    folder = tmp_path_factory.mktemp("remeasure")
    run(job(folder / "run"), builder=builder(), space=space(folder), serial=True, console=Console(quiet=True))
    return folder / "run"


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    shutil.copytree(out, tmp_path / "run")
    return tmp_path / "run"


def other(out: Path) -> Profile:
    """A device whose integers are computed the other way, four samples at a time."""
    first = json.loads((out / "journal.jsonl").read_text().splitlines()[0])
    assert first["goals"][0]["name"] == "local-1t"
    (found,) = out.glob("*/local-1t")
    mine = artifact.read(found).manifest.profiles[0].numeric.activation
    return Profile(name="other", numeric=Numeric(activation="int8" if mine == "uint8" else "uint8"), batch=4)


def again(out: Path, profile: Profile, **budget: float) -> Remeasured:
    return remeasure(out, profile, budget=budget, builder=builder(), sessions=2)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_variant_is_made_measured_ranked_and_certified(copy: Path) -> None:
    before = snapshot(copy)
    target = other(copy)
    found = again(copy, target, speedup=0.01, throughput=1.0, memory_mb=4e3)
    after = snapshot(copy)
    assert {name: after[name] for name in before} == before  # the journal too: nothing of the search is touched
    measured = [row for row in found.rows if row.ms is not None]
    assert measured
    assert all(row.made for row in measured)
    assert any(row.front for row in measured)
    assert all(row.met for row in measured)
    rows = list(csv.DictReader((copy / "devices" / "other" / "front.csv").read_text().splitlines()))
    assert {row["device"] for row in rows} == {"other"}
    assert sorted(int(row["number"]) for row in rows) == sorted(row.number for row in measured)
    read = summary.read(copy / "devices" / "other")
    assert read is not None
    assert [goal.name for goal in read.goals] == ["other"]
    assert set(read.baseline.devices) == {"other"}
    made = artifact.read(Path(found.artifact))
    assert made.manifest.profiles == (target,)
    assert list(made.policy.numeric) == [target.numeric.variant]
    proof = made.manifest.certificate
    assert proof.sessions == {"other": 2}
    assert proof.readings["other"].batch == 4
    assert proof.checked["other"].on_device
    assert proof.certified or "noisy" in proof.reason
    assert Path(found.artifact).parent == copy / ("best" if proof.certified else "closest")
    assert "best: #" in str(found)
    checks = verify(Path(found.artifact), model=builder(), sessions=1)
    bad = [check for check in checks.checks if check.status == "failed" and "noisy" not in check.says]
    assert not bad


def test_where_the_variant_is_the_searchs_own_its_files_are_used(copy: Path) -> None:
    (source,) = copy.glob("*/local-1t")
    read = artifact.read(source).manifest
    same = read.profiles[0].model_copy(update={"name": "same", "batch": 2})
    found = again(copy, same, speedup=0.01)
    assert not any(row.made for row in found.rows)
    made = artifact.read(Path(found.artifact)).manifest
    if made.number == read.number:
        assert made.files["model.onnx"] == read.files["model.onnx"]
    assert found.summary.limit.floor == pytest.approx(read.certificate.floor)


def test_a_device_of_the_search_keeps_its_own_artifact(copy: Path) -> None:
    (source,) = copy.glob("*/local-1t")
    before = snapshot(source)
    found = again(copy, artifact.read(source).manifest.profiles[0], speedup=0.02, size_mb=50.0)
    assert snapshot(source) == before
    assert Path(found.artifact).is_relative_to(copy / "devices" / "local-1t")
    check = next(c for c in verify(found.artifact, sessions=1, quality=False).checks if c.name == "baseline")
    assert check.status == "ok"  # found from there too


def test_where_nothing_holds_the_closest_is_written(copy: Path) -> None:
    found = again(copy, other(copy), speedup=1000.0)
    assert not any(row.met for row in found.rows)
    assert not found.summary.winners
    assert "1000x asked" in found.summary.closest["other"].reason
    assert Path(found.artifact) == copy / "closest" / "other"
    assert "not certified" in str(found)


def test_what_is_gone_is_said_per_trial_and_an_interrupted_search_is_measured_too(copy: Path) -> None:
    events = [json.loads(line) for line in (copy / "journal.jsonl").read_text().splitlines()]
    weights = {
        e["number"]: e["outcome"]["files"]["weights"] for e in events if e["state"] == "done" and e["number"] > 0
    }
    kept = {number: copy / "work" / sha[:2] / sha for number, sha in weights.items()}
    gone, *others = [number for number, path in kept.items() if path.is_file()]
    assert others  # the best three, of which the uncompressed one may be one
    kept[gone].write_bytes(b"damaged")
    for name in ("summary.json", "report.html", "front.csv"):
        (copy / name).unlink()
    with (copy / "journal.jsonl").open("a") as file:
        file.write('{"number": 99, "state": "runn')  # killed inside a write
    found = again(copy, other(copy), speedup=0.01)
    row = next(row for row in found.rows if row.number == gone)
    assert "is damaged" in row.why
    assert row.ms is None
    assert f"#{gone}: " in str(found)
    assert {row.number for row in found.rows if row.ms is not None} == set(others)
    for number in others:
        kept[number].unlink()
    with pytest.raises(UserError, match="nothing of this search could be measured on other"):
        again(copy, other(copy), speedup=0.01)


def test_bad_input_is_one_line(copy: Path, tmp_path: Path) -> None:
    plain = Profile(name="new")
    for words, call in {
        "cannot read the journal": lambda: again(tmp_path, plain, speedup=1.0),
        "speedup": lambda: again(copy, plain, speedup=-1.0),
        "NoSuchExecutionProvider": lambda: again(
            copy, plain.model_copy(update={"provider": "NoSuchExecutionProvider"})
        ),
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="weights of another network"):
        remeasure(copy, plain, budget={"speedup": 1.0})  # the built-in convnet is wider
    (copy / "baseline" / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"model\.onnx: missing"):
        again(copy, plain, speedup=1.0)


def test_the_command_tells_files_and_folders_apart(copy: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "autocompress.cli", "measure", *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    (tmp_path / "new.yaml").write_text(yaml.safe_dump({"name": "new", "threads": 1}))
    model = str(copy / "baseline" / "model.onnx")
    alone = command(model, "--profile", str(tmp_path / "new.yaml"), "--speedup", "3")
    assert alone.returncode == 2
    assert "--speedup is for a search's folder" in alone.stderr
    folder = command(str(copy), "--profile", str(tmp_path / "new.yaml"), "--baseline", model)
    assert folder.returncode == 2
    assert "--baseline is for a file" in folder.stderr
    wider = command(str(copy), "--profile", str(tmp_path / "new.yaml"), "--speedup", "3")
    assert wider.returncode == 2
    assert "another network" in wider.stderr
    assert "Traceback" not in wider.stderr
