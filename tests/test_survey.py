"""What pays on a target: small graphs, what is made of their times, and `device add`, `check` and `list`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from autocompress import auto, load
from autocompress.devices import adding, smallnets
from autocompress.devices.findings import Bench, Finding
from autocompress.devices.fingerprint import host, identity
from autocompress.devices.local import LocalDevice
from autocompress.devices.survey import STEPS, WIDTHS, _Looking, crossing, step
from autocompress.types import Interval, Profile, Site, UserError
from tests import sshd

ROOT = Path(__file__).parent.parent


def ran(model: bytes) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape
    return session.run(None, {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)})[0]


def optimized(model: bytes, path: Path) -> set[str]:
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(path)
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(path).graph.node}


# --- small graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", smallnets.TYPICAL)
def test_typical_graphs_say_about_the_same_in_floats_and_run_as_integers(name: str, tmp_path: Path) -> None:
    make = smallnets.TYPICAL[name]
    floats = ran(make("float32", 2))
    assert len(floats) == 2
    assert 0.1 < floats.std() < 10
    assert np.allclose(ran(make("float16", 2)), floats, atol=0.05 * np.abs(floats).max())
    assert ran(make("u8s8", 2)).shape == floats.shape
    onnx.checker.check_model(onnx.load_from_string(make("s8s8")))
    fused = optimized(make("u8s8"), tmp_path / "optimized.onnx")
    assert fused & {"QLinearConv", "QLinearMatMul"}  # else a survey would time floats with casts around them


def test_additions_fuse_with_unsigned_activations_only(tmp_path: Path) -> None:
    assert "Conv" not in optimized(smallnets.residual("u8s8"), tmp_path / "u.onnx")
    assert "Conv" in optimized(smallnets.residual("s8s8"), tmp_path / "s.onnx")


def test_factors_are_what_they_say() -> None:
    for form, full in smallnets.FULL_RANK.items():
        whole, half = (onnx.load_from_string(smallnets.factored("float32", form, rank)) for rank in (0, full // 2))
        sizes = [
            sum(np.prod(one.dims) for one in model.graph.initializer if len(one.dims) > 1) for model in (whole, half)
        ]
        assert sizes[0] == sizes[1] == full * full


@pytest.fixture
def bench(tmp_path: Path):
    device = LocalDevice(Profile(name="here"))
    yield Bench(device, tmp_path, ())
    device.close()


@pytest.mark.parametrize("form", ["linear", "1x1"])
@pytest.mark.parametrize("kind", smallnets.INTEGERS)
def test_wrong_sums_are_refused_and_right_ones_run(bench: Bench, kind: str, form: str) -> None:
    assert bench.refusal(smallnets.sums(kind, form, reduced=True)) == ""
    assert "out of data bounds" in bench.refusal(smallnets.sums(kind, form, reduced=True, expected=1.5))
    assert "out of data bounds" in bench.refusal(smallnets.sums(kind, form, reduced=True, expected=0.5))


def test_files_that_do_not_run_are_left_out_of_a_window(bench: Bench) -> None:
    files = {"good": smallnets.nothing(), "bad": b"no model", "bf16": smallnets.linears("bfloat16")}
    middles, refused = bench.middles(files, 0.1)
    assert set(middles) == {"good"}
    assert set(refused) == {"bad", "bf16"}
    assert not any("[ONNXRuntimeError]" in why or "/" in why for why in refused.values())


# --- what is made of times --------------------------------------------------------------------------------------------


def staircase(size: int) -> dict[str, np.ndarray]:
    """Milliseconds of a convolution that computes whole blocks of `size` channels."""
    return {str(width): np.full(9, float(-(-width // size) * size) ** 2) for width in WIDTHS}


@pytest.mark.parametrize("size", [1, *STEPS])
def test_the_step_of_a_staircase_is_found(size: int) -> None:
    assert step(staircase(size)) == size


def test_noise_that_is_less_than_a_step_does_not_hide_it() -> None:
    rng = np.random.default_rng(0)
    noisy = {name: times * rng.uniform(0.98, 1.02, len(times)) for name, times in staircase(16).items()}
    assert step(noisy) == 16


def test_the_limit_of_low_rank_lies_where_it_gains_nothing() -> None:
    assert crossing((0.25, 0.5, 0.75), (0.5, 1.0, 1.5), level=0.9) == pytest.approx(0.45)
    assert crossing((0.25, 0.5), (1.1, 1.2)) == 0.0
    assert crossing((0.25, 0.5), (0.4, 0.6)) == 0.5


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.8, 0.9), "pays"),
        ((1.1, 1.2), "costs"),
        ((0.98, 1.01), "even"),
        ((0.8, 1.2), "undecided"),
        ((0.9, 0.99), "undecided"),
    ],
)
def test_a_verdict_is_the_whole_intervals(interval: tuple[float, float], verdict: str) -> None:
    low, high = interval
    ratio = Interval(value=(low + high) / 2, low=low, high=high)
    assert Finding(about="types", what="x", against="y", ratio=ratio, blocks=9).verdict == verdict


# --- what it does to a search -----------------------------------------------------------------------------------------


class Layers:
    """A builder with one linear layer, one 1x1 and one 3x3 convolution."""

    name = "layers"
    knobs: dict = {}

    def sites(self) -> tuple[Site, ...]:
        ops = ("prune", "lowrank", "quantize")
        common = {"ops": ops, "parameters": 10_000, "macs": 10_000, "in_channels": 64, "out_channels": 64}
        kinds = (("fc", "linear", 1), ("point", "conv", 1), ("wide", "conv", 3))
        return tuple(Site(name=name, kind=kind, kernel=kernel, **common) for name, kind, kernel in kinds)


def choices(*profiles: Profile) -> dict[str, tuple]:
    return {gene.name: gene.choices for gene in auto.targeted(Layers(), profiles).genes}


def test_types_steps_and_ranks_of_a_profile_decide_what_a_space_offers() -> None:
    plain = choices(Profile(name="p"))
    assert plain["quantize.bits@fc"] == ("float", "int8")
    assert plain["prune.ratio@fc"] == (0.0, 0.25, 0.5, 0.75)
    assert plain["lowrank.rank@wide"] == (1.0, 0.5, 0.25)
    assert plain["lowrank.rank@fc"] == (1.0, 0.25)
    gpu = choices(Profile(name="p", types=("float32", "float16")))
    assert gpu["quantize.bits@fc"] == ("float", "float16")
    assert "qat.bits@." not in gpu
    assert "quantize.bits@fc" not in choices(Profile(name="p", types=("float32",)))
    both = choices(Profile(name="p", types=("float32", "float16")), Profile(name="q"))
    assert both["quantize.bits@fc"] == ("float", "int8", "float16")
    assert choices(Profile(name="p", channel_multiple=32))["prune.ratio@fc"] == (0.0, 0.5)
    slow = choices(Profile(name="p", measured={"rank_limit float32 linear": 0.2, "rank_limit u8s8 1x1": 0.1}))
    assert "lowrank.rank@fc" not in slow
    assert slow["lowrank.rank@wide"] == (1.0, 0.5, 0.25)  # of larger kernels nothing was found out


# --- add, check, list -------------------------------------------------------------------------------------------------


def call(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it, with a home of its own."""
    return subprocess.run(
        [sys.executable, "-m", "autocompress.cli", "device", *arguments],
        capture_output=True,
        text=True,
        cwd=home,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_CONFIG_HOME": str(home / "config"),
            "AUTOCOMPRESS_CACHE": str(home / "cache"),  # nobody else's measurements are waited for
            "TMPDIR": str(home),
            "COLUMNS": "110",
            "NO_COLOR": "1",
            **environment,
        },
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(("free", "limit"), [(None, 1000.0), (250.0, 200), (20_000.0, None)])
def test_a_small_memory_becomes_a_limit(free: float | None, limit: float | None, tmp_path: Path) -> None:
    """What a board of 512 MB has left; with plenty of it no limit is set, the one of another profile neither."""

    class Small(LocalDevice):
        def room(self) -> float | None:
            return free

    like = Profile(name="pi", memory_mb=1000.0)
    looking = _Looking(Bench(Small(like), tmp_path, ()), like, 1.0, lambda _: None)
    looking.room()
    assert looking.found(host()).memory_mb == limit
    assert [one.text for one in looking.advice] == (
        ["a file may take 200 MB in memory: 250 MB are free there beside the runtime"] if free == 250 else []
    )


def test_a_device_is_added_checked_and_listed(tmp_path: Path, monkeypatch) -> None:
    assert "no device yet" in call("list", home=tmp_path).stdout
    added = call("add", "mine", "--local", "--seconds", "1", home=tmp_path)
    assert added.returncode == 0, added.stderr
    path = tmp_path / "config" / "autocompress" / "profiles" / "mine.yaml"
    for said in (
        "Time against float32",
        "int8 (u8s8)",
        "What pays",
        "Settings",
        "channels count in steps",
        "fingerprint",
    ):
        assert said in added.stdout
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    profile = load.profile("mine")
    assert path.is_file()
    assert (profile.device, profile.threads, profile.template) == ("local", 1, False)
    assert profile.measured["onnxruntime"] == ort.__version__
    assert "float32" in profile.types
    assert profile.channel_multiple in (1, 2, 4, 8, 16, 32)
    assert float(profile.measured["clock_ns"]) > 0
    assert "blocks" in str(profile.measured["u8s8 3x3 convolutions"])

    again = call("add", "mine", "--local", "--seconds", "1", home=tmp_path)
    assert again.returncode == 2
    assert "is there already; --force writes over it" in again.stderr

    checked = call("check", "mine", "--seconds", "1", "--json", home=tmp_path)
    facts = {one["what"]: one for one in map(json.loads, checked.stdout.splitlines())}
    assert set(facts) >= {"reachable", "device", "runtime", "noise", "drift", "alone"}
    assert all(facts[what]["ok"] for what in ("reachable", "device", "runtime"))
    assert checked.returncode == (0 if all(one["ok"] for one in facts.values()) else 1)

    text = path.read_text()
    text = text.replace(f"onnxruntime: {ort.__version__}", "onnxruntime: 1.0.0")
    path.write_text(text.replace(profile.fingerprint, "0123456789ab"))
    other = call("check", "mine", "--seconds", "0.5", home=tmp_path)
    assert other.returncode == 1
    assert "but made for 0123456789ab" in other.stdout
    assert f"{ort.__version__}, was 1.0.0: run `autocompress device add mine ... --force`" in other.stdout
    assert "mine" in call("list", home=tmp_path).stdout


def test_a_device_behind_ssh_is_added_as_one_of_this_host(tmp_path: Path) -> None:
    sshd.required()
    server = sshd.Sshd(tmp_path / "server")
    server.start()
    reach, python = {"AUTOCOMPRESS_SSH_CONFIG": str(server.config)}, str(server.home / "python")
    try:
        made = ("add", "board", "--ssh", "pi", "--python", python, "--seconds", "1", "--json")
        added = call(*made, home=tmp_path, **reach)
        assert added.returncode == 0, added.stderr
        found = json.loads(added.stdout)
        assert found["profile"]["reach"]["ssh"] == "pi"
        assert found["profile"]["fingerprint"] == identity(host())
        assert {one["about"] for one in found["findings"]} == {"noise", "types", "ranks"}
    finally:
        server.stop()
    gone = call("check", "board", home=tmp_path, **reach)
    assert gone.returncode == 1
    assert "NO  reachable" in gone.stdout
    assert "Connection refused" in gone.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pi",), "say how the device is reached, by one of --ssh"),
        (("pi", "--local", "--ssh", "pi@pi"), "say how the device is reached, by one of --ssh"),
        (("pi", "--local", "--port", "22"), "--port belongs to --ssh"),
        (("../pi", "--local"), "device name '../pi': use letters"),
        (("local-1t", "--local"), "'local-1t' is a profile of the package"),
        (("pi", "--local", "--like", "raspberry-pi-55"), "did you mean 'raspberry-pi-5'"),
        (
            ("pi", "--local", "--provider", "Cuda"),
            "wants CudaExecutionProvider, but the onnxruntime installed here offers",
        ),
        (("pi", "--local", "--threads", "999"), "'pi' measures with 999 threads, but"),
        (("pi", "--local", "--out", "pi.txt"), "--out pi.txt: a profile is a file ending in .yaml"),
        (("pi", "--ssh", "-oProxyCommand=x"), "what begins with a dash is no address"),
        (("pi", "--local", "--like", "apple-silicon-cpu"), "expects a processor with darwin"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    found = call("add", *arguments, "--seconds", "1", home=tmp_path)
    assert found.returncode == 2
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_broken_profile_does_not_hide_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "config" / "autocompress" / "profiles"
    folder.mkdir(parents=True)
    (folder / "good.yaml").write_text("name: good\nabout: fine\n")
    (folder / "bad.yaml").write_text("name: bad\nthread: 3\n")
    listed = call("list", home=tmp_path)
    assert listed.returncode == 0
    assert "fine" in listed.stdout
    assert "bad.yaml:2: thread: unknown key" in listed.stderr


def test_what_a_new_profile_starts_from() -> None:
    pi = adding.wanted("pi", ssh="me@pi", port=2222, like="raspberry-pi-5", threads=0, python="venv/bin/python")
    assert (pi.device, pi.reach.ssh, pi.reach.port, pi.threads) == ("ssh", "me@pi", 2222, 0)
    assert (pi.numeric.activation, pi.channel_multiple, pi.expects) == ("int8", 4, ("aarch64", "asimddp"))
    assert pi.reach.python == "venv/bin/python"
    gpu = adding.wanted("gpu", local=True, provider="CUDA", like="openvino-cpu")
    assert (gpu.provider, gpu.provider_options) == ("CUDAExecutionProvider", {})


def test_a_tilde_that_the_shell_expanded_means_the_home_over_there() -> None:
    def python(**how: Any) -> str:
        return adding.wanted("pi", **how).reach.python

    assert python(ssh="pi", python=str(Path.home() / "venv/bin/python")) == "venv/bin/python"
    assert python(ssh="pi", python="/opt/venv/bin/python") == "/opt/venv/bin/python"
    assert python(ssh="pi", python="~/venv/bin/python") == "~/venv/bin/python"
    assert python(ssh="pi") == "python3"


def test_a_written_profile_is_read_as_it_was(tmp_path: Path) -> None:
    made = adding.wanted("pi", ssh="me@pi", like="raspberry-pi-4")
    made = made.model_copy(update={"measured": {"a: b": "0.5 [0.4, 0.6]", "n": 3.0}, "about": "- #1: yes"})
    path = tmp_path / "pi.yaml"
    adding.save(made, path)
    assert load.profile(path) == made
    with pytest.raises(UserError, match="is there already"):
        adding.place("pi", path)
