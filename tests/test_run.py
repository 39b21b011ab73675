"""A whole search, small and real: serial and on Ray, interrupted, resumed, re-applied."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import autocompress
from autocompress import artifact, journal, reuse
from autocompress.estimate import estimate
from autocompress.evaluator import Checkpoint
from autocompress.export import predictor
from autocompress.live import fold
from autocompress.parts import parts
from autocompress.pipeline import weights_of
from autocompress.run import resume, run
from autocompress.summary import drop
from autocompress.tasks.digits import Digits
from autocompress.tasks.intervals import paired
from autocompress.train import Training
from autocompress.types import Cost, Job, LimitError, ModelSource, QualityLimit, State, UserError
from tests.small_search import builder, job, space

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def found(folder: Path):
    """One serial search of four trials; every test below looks at what it left."""
    out = folder / "run"
    return run(job(out, sessions=5), builder=builder(), space=space(folder), serial=True, console=QUIET), out


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


def test_a_search_leaves_everything_that_was_promised(found) -> None:
    summary, out = found
    for name in ("journal.jsonl", "summary.json", "front.csv", "report.html", "baseline/model.onnx", "job.json"):
        assert (out / name).stat().st_size > 0, name
    assert summary.state == "finished"
    assert summary.trials == 4
    assert summary.counts["done"] >= 1
    events = lines(out)
    assert all({"number", "state"} <= set(event) for event in events)
    assert events[0]["state"] == "header"
    assert (events[1]["number"], events[1]["state"]) == (0, "done")
    assert json.loads((out / "summary.json").read_text())["baseline"]["test"]["split"] == "test"
    rows = list(csv.DictReader((out / "front.csv").read_text().splitlines()))
    assert {row["device"] for row in rows} == {"local-1t"}
    assert "local-1t" in (out / "report.html").read_text()


def test_the_winner_is_certified_and_runs_with_numpy_alone(found) -> None:
    summary, out = found
    (winner,) = [*summary.winners.values(), *summary.closest.values()]
    assert winner.devices["local-1t"].samples > 0
    folder = out / winner.path
    read = artifact.read(folder)
    assert read.manifest.test["local-1t"].split == "test"
    assert read.manifest.baseline.test is not None
    assert read.manifest.certificate.sessions == {"local-1t": 5}
    image = np.load(_digit(out), allow_pickle=False)
    printed = subprocess.run(
        [sys.executable, "-I", str(folder / "infer.py"), str(_digit(out))], capture_output=True, text=True, check=True
    ).stdout.split()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    wanted = session.run(None, {"input": image})[0].argmax(1)
    assert printed == [str(digit) for digit in wanted]


def test_what_is_lost_is_told_sample_by_sample(found) -> None:
    summary, out = found
    (winner,) = [*summary.winners.values(), *summary.closest.values()]
    figures, task = winner.devices["local-1t"], Digits()
    before, after = (
        task.scores(predictor(path.read_bytes()), "test")
        for path in (out / "baseline" / "model.onnx", out / winner.path / "model.onnx")
    )
    assert figures.drop_test == paired(before, after)
    assert artifact.read(out / winner.path).manifest.lost == {"local-1t": figures.drop_test}
    apart = drop(summary.baseline.test, figures.test)  # as if they had been asked about different samples
    assert figures.drop_test.high - figures.drop_test.low < apart.high - apart.low
    int8 = summary.controls["int8"].devices["local-1t"].drop_test
    assert int8.low <= int8.value <= int8.high


def _digit(out: Path) -> Path:
    path = out / "digits.npy"
    if not path.exists():
        inputs, _ = next(iter(Digits().batches("test", 5)))
        np.save(path, inputs.numpy())
    return path


def test_the_one_shot_int8_arm_stands_beside_the_winner_and_missing_arms_are_named(found) -> None:
    controls = found[0].controls
    assert controls["int8"].ran
    assert controls["int8"].devices["local-1t"].test is not None
    assert not controls["uniform"].ran
    assert controls["uniform"].why
    assert "random" not in controls  # this search is one itself


def test_the_work_folder_keeps_only_what_is_needed(found) -> None:
    _, out = found
    kept = {path.name for path in (out / "work").glob("??/*")}
    last = {event["number"]: event for event in lines(out) if event["number"] > 0}
    files = {number: set(event["outcome"].get("files", {}).values()) for number, event in last.items()}
    waiting = [number for number, event in last.items() if event["state"] == "stopped"]
    (winner,) = [one.number for one in (*found[0].winners.values(), *found[0].closest.values())]
    assert files[winner]
    assert files[winner] <= kept
    assert set().union(*(files[number] for number in waiting)) <= kept  # a longer search may go on with them
    behind = {
        sha
        for event in lines(out)
        if event["state"] == "rung" and last[event["number"]]["state"] == "done"
        for sha in event["outcome"]["files"].values()
    }
    assert behind
    assert not behind & kept  # checkpoints of trials that are fully trained
    trained = {
        Checkpoint.model_validate_json((out / "work" / s[:2] / s).read_bytes()).training
        for n in waiting
        for s in files[n]
    }
    assert kept <= set().union(*files.values(), trained)


def test_an_out_that_holds_a_run_is_refused_and_left_alone(found, folder: Path) -> None:
    _, out = found
    before = (out / "journal.jsonl").read_bytes()
    with pytest.raises(UserError, match="resume"):
        run(job(out), builder=builder(), space=space(folder), serial=True, console=QUIET)
    assert (out / "journal.jsonl").read_bytes() == before


def test_a_finished_search_goes_on_when_it_may_cost_more(found, folder: Path, tmp_path: Path) -> None:
    _, out = found
    copy = tmp_path / "more"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    summary = resume(copy, builder=builder(), space=space(folder), trials=6, serial=True, console=QUIET)
    assert summary.trials == 6
    before, after = lines(out), lines(copy)
    assert after[: len(before)] == before


def test_without_weights_apply_makes_the_same_bytes(found, tmp_path: Path) -> None:
    summary, out = found
    (winner,) = [*summary.winners.values(), *summary.closest.values()]
    made = reuse.apply(out / winner.path, out=tmp_path / "again", model=builder())
    assert made.reproduced
    assert made.byte_equal
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (out / winner.path / "model.onnx").read_bytes()
    artifact.read(tmp_path / "again")


@pytest.fixture(scope="module")
def retrained(folder: Path) -> Path:
    torch.manual_seed(5)
    network = builder().build({})
    Training(network, Digits(), epochs=4, seed=5).run_to(1.0)
    path = folder / "retrained.safetensors"
    path.write_bytes(weights_of(network))
    return path


def test_a_run_is_not_resumed_on_other_weights(found, retrained: Path, folder: Path, tmp_path: Path) -> None:
    _, out = found
    copy = tmp_path / "other"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    (copy / "baseline" / "weights.safetensors").write_bytes(retrained.read_bytes())
    with pytest.raises(UserError, match=r"baseline/weights.safetensors: not the weights that this run began with"):
        resume(copy, builder=builder(), space=space(folder), trials=6, serial=True, console=QUIET)
    assert (copy / "baseline" / "model.onnx").read_bytes() == (out / "baseline" / "model.onnx").read_bytes()
    assert lines(copy) == lines(out)


def test_apply_to_retrained_weights_decides_again_and_certifies(found, retrained: Path, tmp_path: Path) -> None:
    summary, out = found
    (winner,) = [*summary.winners.values(), *summary.closest.values()]
    new = tmp_path / "new"
    # A noisy machine may refuse the reading: the artifact is written all the same, and says so.
    with contextlib.suppress(LimitError):
        reuse.apply(out / winner.path, weights=retrained, out=new, max_drop=0.9, model=builder())
    old, made = artifact.read(out / winner.path), artifact.read(new)
    assert made.policy.policy == old.policy.policy
    assert {name: t.shape for name, t in made.weights().items()} == {n: t.shape for n, t in old.weights().items()}
    proof = made.manifest.certificate
    assert proof.quality_held
    assert proof.certified or "noisy" in proof.reason
    assert made.manifest.files["model.onnx"] != old.manifest.files["model.onnx"]


def test_apply_says_which_limit_fails_after_writing_everything(found, retrained: Path, tmp_path: Path) -> None:
    summary, out = found
    (winner,) = [*summary.winners.values(), *summary.closest.values()]
    source = tmp_path / "strict"
    subprocess.run(["cp", "-r", str(out / winner.path), str(source)], check=True)
    path = source / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["goal"]["budgets"][0]["speedup"] = 1000.0
    path.write_text(json.dumps(manifest))
    with pytest.raises(LimitError, match="1000x asked"):
        reuse.apply(source, weights=retrained, out=tmp_path / "out", model=builder())
    assert not artifact.read(tmp_path / "out").manifest.certificate.certified


def test_apply_refuses_another_network_and_other_weights(found, retrained: Path, tmp_path: Path) -> None:
    summary, out = found
    (winner,) = [*summary.winners.values(), *summary.closest.values()]
    with pytest.raises(UserError, match=r"stem\.conv|stages"):
        reuse.apply(out / winner.path)  # the built-in convnet is wider
    tensors = load_file(retrained)
    del tensors["stem.conv.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"stem\.conv\.weight is missing"):
        reuse.apply(out / winner.path, weights=tmp_path / "short.safetensors", out=tmp_path / "x", model=builder())
    with pytest.raises(UserError, match="--out"):
        reuse.apply(out / winner.path, weights=retrained, model=builder())


def test_a_budget_that_cannot_be_met_gives_the_closest(folder: Path, tmp_path: Path) -> None:
    asked = job(tmp_path / "out", cost=Cost(trials=2, minutes=5))
    asked = asked.model_copy(
        update={"devices": (asked.devices[0].model_copy(update={"speedup": 900.0}),), "quality": QualityLimit(min=0.2)}
    )
    weights = folder / "run" / "baseline" / "weights.safetensors"
    if weights.is_file():
        asked = asked.model_copy(update={"model": ModelSource(builder="convnet", weights=str(weights), epochs=4)})
    summary = run(asked, builder=builder(), space=space(folder), serial=True, console=QUIET)
    assert not summary.winners
    assert summary.closest["local-1t"].number > 0
    assert summary.counts["infeasible"] == 2
    assert summary.closest["local-1t"].reason.startswith("over every budget")
    assert not (tmp_path / "out" / "best").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04K\x01."])
def test_unreadable_weights_are_one_line(folder: Path, tmp_path: Path, content: bytes) -> None:
    for name in ("w.safetensors", "w.pt"):
        (tmp_path / name).write_bytes(content)
        asked = job(tmp_path / "out")
        asked = asked.model_copy(update={"model": ModelSource(builder="convnet", weights=str(tmp_path / name))})
        with pytest.raises(UserError) as error:
            run(asked, builder=builder(), space=space(folder), serial=True, console=QUIET)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_weights_file_that_runs_code_is_refused_unexecuted(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(mark),))

    torch.save({"x": Trap()}, tmp_path / "trap.pt")
    asked = job(tmp_path / "out")
    asked = asked.model_copy(update={"model": ModelSource(builder="convnet", weights=str(tmp_path / "trap.pt"))})
    with pytest.raises(UserError, match="beside tensors"):
        run(asked, builder=builder(), space=space(folder), serial=True, console=QUIET)
    assert not mark.exists()


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        resume(tmp_path, serial=True, console=QUIET)


def test_a_metric_the_task_does_not_have_is_said(folder: Path, tmp_path: Path) -> None:
    asked = job(tmp_path).model_copy(update={"quality": QualityLimit(metric="f1", max_drop=0.1)})
    with pytest.raises(UserError, match="measures 'accuracy'"):
        parts(asked, builder=builder(), space=space(folder))


def test_check_says_what_it_will_take(folder: Path, tmp_path: Path) -> None:
    asked = job(tmp_path / "out")
    said = estimate(asked, parts(asked, builder=builder(), space=space(folder)))
    assert said.trials == 4
    assert 0 < said.minutes < 30
    assert "sound" in str(said)
    assert not (tmp_path / "out").exists()


SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from autocompress.run import resume, run
from tests.small_search import builder, job, space
from autocompress.types import Cost
if __name__ == "__main__":
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    made = {"builder": builder(), "space": space(folder), "console": Console(quiet=True)}
    if sys.argv[3] == "run":
        run(job(out, cost=Cost(trials=5, minutes=5), workers=2), **made)
    else:
        resume(out, **made)
"""


def _spawn(folder: Path, out: Path, what: str) -> subprocess.Popen:
    script = folder / "drive.py"
    script.write_text(SCRIPT)
    root = str(Path(autocompress.__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen([sys.executable, str(script), str(folder), str(out), what], env=env, cwd=root)


def _story(events: list[dict]) -> list[tuple]:
    return [(e["number"], e["state"], e.get("attempt"), tuple(e.get("genotype", ()))) for e in events]


def test_killed_on_ray_and_resumed_nothing_is_lost_or_repeated(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = _spawn(tmp_path, out, "run")
    path, deadline = out / "journal.jsonl", time.monotonic() + 150
    while time.monotonic() < deadline:
        ended = (
            [e for e in journal.read(path).events if e["number"] and State(e["state"]).ended] if path.exists() else []
        )
        if ended:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read(path).events
    assert ended, "no trial ended before the kill"
    assert _spawn(tmp_path, out, "resume").wait(timeout=170) == 0
    after = journal.read(path).events
    assert after[: len(before)] == before
    numbers = [e["number"] for e in after if e.get("why") == "new"]
    assert numbers == [1, 2, 3, 4, 5]
    flying = {e["number"] for e in before if e["number"]} - {
        e["number"] for e in before if e["number"] and State(e["state"]).ended
    }
    again = {e["number"]: e for e in after[len(before) :] if e.get("why") == "resumed"}
    assert set(again) == flying
    first = {e["number"]: e["genotype"] for e in before if e.get("why") == "new"}
    assert all(event["genotype"] == first[number] for number, event in again.items())
    ends = [(e["number"], e["attempt"]) for e in after if e["number"] and State(e["state"]).ended]
    assert len(ends) == len(set(ends))
    assert (out / "report.html").exists()


def test_ctrl_c_writes_what_was_found(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    process = _spawn(tmp_path, out, "run")
    path, deadline = out / "journal.jsonl", time.monotonic() + 150
    done = False
    while time.monotonic() < deadline and not done:
        done = path.exists() and any(e["number"] and e["state"] == "done" for e in journal.read(path).events)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["state"] == "interrupted"
    assert {**summary["winners"], **summary["closest"]}
    assert (out / "report.html").exists()


def test_events_fold_into_trials() -> None:
    known: dict = {}
    assert fold(known, {"number": 0, "state": "header"}) is None
    assert fold(known, {"number": 1, "state": "running", "genotype": [1, 0], "attempt": 1}).state is State.RUNNING
    ended = fold(known, {"number": 1, "state": "failed", "attempt": 1, "outcome": {"reason": "because"}})
    assert (ended.genotype, ended.outcome.reason) == ((1, 0), "because")


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    asked = job(tmp_path)
    assert Job.model_validate_json(asked.model_dump_json()) == asked


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"options": {"populaton": 3}, "searcher": "evolution"}, "no option 'populaton'; did you mean 'population'"),
        ({"options": {"x": 3}}, "searcher 'random' has no option 'x'; known: design"),
        ({"searcher": "os:path"}, "is no searcher: it has no ask, no tell"),
        ({"searcher": "evolutoin"}, "did you mean 'evolution'"),
    ],
)
def test_a_searcher_is_checked_before_anything_is_computed(folder: Path, tmp_path: Path, plan: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        run(job(tmp_path / "out", **plan), builder=builder(), space=space(folder), serial=True, console=QUIET)
    assert not (tmp_path / "out").exists()


def test_a_profile_that_does_not_fit_this_host_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("name: odd\nexpects: [no_such_flag]\n")
    (tmp_path / "none.yaml").write_text("name: none\ndevice: os:name\n")
    for name, told in (("odd", "expects a processor with no_such_flag"), ("none", "is no device")):
        budget = job(tmp_path).devices[0].model_copy(update={"profile": str(tmp_path / f"{name}.yaml")})
        with pytest.raises(UserError, match=told):
            parts(job(tmp_path).model_copy(update={"devices": (budget,)}), builder=builder(), space=space(folder))


def test_options_that_the_searcher_refuses_leave_no_journal(found, folder: Path, tmp_path: Path) -> None:
    weights = found[1] / "baseline" / "weights.safetensors"
    asked = job(tmp_path / "out", searcher="evolution", options={"population": 1})
    asked = asked.model_copy(update={"model": ModelSource(builder="convnet", weights=str(weights))})
    with pytest.raises(UserError, match="population >= 2"):
        run(asked, builder=builder(), space=space(folder), serial=True, console=QUIET)
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_check_looks_into_the_weights_file(folder: Path, tmp_path: Path) -> None:
    tensors = builder().build({}).state_dict()
    tensors["stem.conv.weight"] = tensors["stem.conv.weight"] * float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    asked = job(tmp_path / "out").model_copy(
        update={"model": ModelSource(builder="convnet", weights=str(tmp_path / "nan.safetensors"))}
    )
    with pytest.raises(UserError, match=r"stem\.conv\.weight holds numbers that are not finite"):
        estimate(asked, parts(asked, builder=builder(), space=space(folder)))


def test_a_cluster_that_does_not_answer_is_said_within_seconds(folder: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no Ray cluster can be used at 127\.0\.0\.1:9"):
        run(job(tmp_path / "o"), builder=builder(), space=space(folder), address="127.0.0.1:9", console=QUIET)
    assert time.monotonic() - began < 15
    assert not (tmp_path / "o" / "baseline").exists()


def test_a_run_killed_while_its_journal_began_goes_on_or_starts_again(found, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "baseline").mkdir(parents=True)
    (out / "journal.jsonl").write_bytes(b'{"number":0,"st')
    kept = out / "baseline" / "weights.safetensors"
    kept.write_bytes(b"a parent of another job, given up")
    weights = str(found[1] / "baseline" / "weights.safetensors")
    asked = job(out, cost=Cost(trials=1, minutes=5))
    asked = asked.model_copy(update={"model": ModelSource(builder="convnet", weights=weights)})
    summary = run(asked, builder=builder(), space=space(folder), serial=True, console=QUIET)
    assert summary.trials == 1
    assert kept.read_bytes() == Path(weights).read_bytes()


def test_a_damaged_job_file_is_told_by_its_keys(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"task": 5}')
    with pytest.raises(UserError, match=r"job\.json: task: must be text") as error:
        resume(tmp_path, serial=True, console=QUIET)
    assert "pydantic" not in str(error.value)
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        resume(tmp_path, serial=True, console=QUIET)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"devices": [{"profil": "local-1t"}]}, "devices[0].profil: unknown key; did you mean 'profile'?"),
        ({"devices": "local-1t"}, 'devices: must be a list, not "local-1t"'),
        ({"devices": ["local-1t"]}, "devices[0]: must be a mapping of keys"),
        ({"quality": {"max_drop": 0.1, "min": 0.9}}, "quality: give exactly one of"),
        ({"seed": 2**32}, "search.seed: must be less than 4294967296"),
        ({"trials": 0}, "search.cost.trials: must be greater than or equal to 1, not 0"),
        ({"space": 5}, "space: must be a name, a path or a Space, not 5"),
        ({"model": object()}, "is no builder"),
        ({"task": object()}, "is no task"),
    ],
)
def test_bad_arguments_in_python_are_user_errors(tmp_path: Path, change: dict, told: str) -> None:
    good = {"model": "convnet", "task": "digits", "devices": [{"profile": "local-1t"}], "out": tmp_path / "out"}
    with pytest.raises(UserError) as error:
        autocompress.search(**{**good, **change}, serial=True, console=QUIET)
    assert told in str(error.value)
    assert not (tmp_path / "out").exists()


def test_apply_says_what_is_wrong_before_it_trains(found, retrained: Path, tmp_path: Path) -> None:
    summary, out = found
    (winner,) = [*summary.winners.values(), *summary.closest.values()]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not an artifact")
    for arguments, told in (
        ({"out": tmp_path / "mine"}, "holds something else than an artifact"),
        ({"out": tmp_path / "new", "max_drop": -1}, "max_drop: must be greater than or equal to 0"),
        ({"out": tmp_path / "new", "task": object()}, "is no task"),
    ):
        with pytest.raises(UserError, match=told):
            reuse.apply(out / winner.path, **{"weights": retrained, "model": builder(), **arguments})
    assert not (tmp_path / "new").exists()


def test_an_artifact_does_not_decide_what_apply_reaches(found, retrained: Path, tmp_path: Path) -> None:
    summary, out = found
    (winner,) = [*summary.winners.values(), *summary.closest.values()]
    made = tmp_path / "made"
    shutil.copytree(out / winner.path, made)
    manifest = json.loads((made / "manifest.json").read_text())
    (profile,) = manifest["profiles"]
    for change in ({"device": "evil_things:Device"}, {"device": "ssh"}, {"provider_options": {"library": "evil.so"}}):
        manifest["profiles"] = [{**profile, "device": "local", **change}]
        (made / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="which an artifact may not decide: give --device PROFILE"):
            reuse.apply(made, weights=retrained, out=tmp_path / "new", model=builder())
        with pytest.raises(UserError, match="is for local-1t, not for local-2t"):
            reuse.apply(made, weights=retrained, out=tmp_path / "new", model=builder(), devices=["local-2t"])
        (mine,) = reuse.measured_on(artifact.read(made), ["local-1t"])
        assert mine.device == "local"
        assert not mine.provider_options
    assert not (tmp_path / "new").exists()
