import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from autocompress import cli, load, parts, reader, sitetable
from autocompress.devices.profiler import Times
from autocompress.tasks import InputSpec
from autocompress.types import Job, LimitError, Site, TrialFailure, UserError

COMMANDS = ("search", "resume", "report", "measure", "apply", "verify", "spaces", "profiles", "check", "init", "space")
ROOT = Path(__file__).parent.parent


def call(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it, in a process of its own."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "autocompress.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": python_path, "COLUMNS": "120", "NO_COLOR": "1", **environment},
        check=False,
        timeout=60,
    )


@pytest.fixture
def exits(monkeypatch, capsys):
    """Runs `main` with a command that raises; gives exit code and what stands on stderr."""

    def run(error: Exception, *arguments: str) -> tuple[int, str]:
        def raising():
            raise error

        raising.__name__ = "profiles"  # the command's name
        monkeypatch.setattr(sys, "argv", ["autocompress", *arguments, "profiles"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        command = next(one for one in cli.app.registered_commands if one.callback.__name__ == "profiles")
        monkeypatch.setattr(command, "callback", raising)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert f"Example: autocompress {command}" in " ".join(result.output.split())


def test_help_names_every_command_and_version_is_the_packages():
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    assert all(command in shown for command in COMMANDS)
    assert CliRunner().invoke(cli.app, ["--version"]).output == "autocompress 0.1.0\n"


def test_shelves_are_listed_and_shown():
    listed = CliRunner().invoke(cli.app, ["profiles"]).output
    assert "local-1t" in listed
    assert "x86-vnni-1t" in listed
    shown = CliRunner().invoke(cli.app, ["spaces", "convnet"]).output
    assert shown == (ROOT / "search_spaces" / "convnet.yaml").read_text()
    assert "convnet" in CliRunner().invoke(cli.app, ["spaces"]).output
    assert CliRunner().invoke(cli.app, ["profiles", "local-1t"]).output.startswith("name: local-1t")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "job.yaml").write_text("task: digits\nmodel: convnet\nspace: convnet\ndevices: [{profil: local-1t}]\n")
    for arguments, told in [
        (["check", "job.yaml"], "job.yaml:4: devices[0].profil: unknown key; did you mean 'profile'?"),
        (["search", "job.yaml", "--seed", "-1"], "search.seed: must be greater than or equal to 0"),
        (["search", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["search", "job.yaml", "--serial", "--address", "a:1"], "--serial and --address exclude one another"),
        (["spaces", "convnett"], "unknown search space 'convnett'; did you mean 'convnet'?"),
        (["profiles", "local-3t"], "unknown hardware profile 'local-3t'; did you mean 'local-"),
        (["search"], "Missing argument 'JOB'"),
        (["serch"], "No such command 'serch'"),
    ]:
        result = call(*arguments, cwd=tmp_path)
        assert result.returncode == 2, (arguments, result)
        assert told in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


NAMES = "[a] wrong [/b]: model nets:ok: is none"  # nothing that rich takes for markup or an emoji


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError(NAMES), 2), (TrialFailure(NAMES), 2), (LimitError(NAMES), 1)],
)
def test_expected_errors_are_their_line_and_code(exits, error, code):
    assert exits(error) == (code, f"{NAMES}\n")


def test_a_full_disk_is_the_users_to_mend(exits):
    assert exits(OSError(28, "No space left on device", "x/journal.jsonl")) == (
        2,
        "x/journal.jsonl: No space left on device\n",
    )


def test_a_bug_is_logged_and_has_its_own_code(exits, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, shown = exits(ZeroDivisionError("of ours"))
    (log,) = tmp_path.glob("autocompress-*.log")
    assert code == 70
    assert shown.splitlines()[0] == "ZeroDivisionError: of ours"
    assert str(log) in shown
    assert "Traceback" not in shown
    assert "Traceback" in log.read_text()
    with pytest.raises(ZeroDivisionError):
        exits(ZeroDivisionError("of ours"), "--debug")


def test_the_users_own_code_is_found_in_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text("raise RuntimeError('imported')\n")
    script = "import sys; from autocompress import cli, registry; sys.argv = ['autocompress', 'profiles']\n"
    script += "try: cli.main()\nexcept SystemExit: pass\nregistry.resolve('task', 'mine:Task')"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "importing mine failed: RuntimeError: imported" in result.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the demo measures with two threads")
def test_check_says_what_a_search_will_take(tmp_path):
    job = (ROOT / "examples" / "digits.yaml").read_text()
    (tmp_path / "job.yaml").write_text(job)
    result = call("check", "job.yaml", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    for told in ("space", "trials", "min", "MB"):
        assert told in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


# --- init and space -----------------------------------------------------------------------------------------------


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A user's own module `nets`, found in the current folder."""
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "def small(num_classes=10):\n"
        "    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), "
        "nn.Linear(32 * 144, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return "nets:small"


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False, env={"COLUMNS": "100"})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["convnet"], {"task": "digits"}),
        (["torchvision:resnet18", "--classes", "7"], {"task": "images", "data": {"size": 224}}),
        (["nets:small", "--shape", "3,16,16"], {"task": "images", "data": {"size": 16}}),
        (["nets:small", "--task", "text", "--shape", "32"], {"task": "text", "data": {"length": 32}}),
        (["nets:small", "--task", "mine:Task"], {"task": "mine:Task", "data": {}}),
    ],
)
def test_init_writes_a_job_that_is_read(network, arguments, told, tmp_path):
    out = tmp_path / "new.yaml"
    result = invoke("init", *arguments, "--out", str(out))
    assert result.exit_code == 0
    assert f"autocompress check {out}" in result.output
    job = load.job(out)
    assert job.model.builder == arguments[0]
    assert job.space == "auto"
    assert job.devices[0].profile == "local-1t"
    assert job.task == told["task"]
    assert told.get("data", {}).items() <= job.data.items()
    assert job.model.options == ({"num_classes": 7} if "--classes" in arguments else {})
    assert load.job(out) == reader.check(*_parsed(invoke("init", *arguments).output))


def _parsed(text: str):
    data, lines = reader.parse(text, "new.yaml")
    return data, Job, "new.yaml", lines


def test_init_never_writes_over_a_file_unless_told(tmp_path):
    out = tmp_path / "job.yaml"
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        invoke("init", "convnet", "--out", str(out))
    assert out.read_text() == "mine"
    invoke("init", "convnet", "--out", str(out), "--force")
    assert "space: auto" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["init", "convnett"], "unknown builder 'convnett'; did you mean 'convnet'?"),
        (["init", "convnet", "--task", "digit"], "unknown task 'digit'; did you mean 'digits'?"),
        (["init", "convnet", "--shape", "a,b"], "give sizes without the batch"),
        (["space", "nets:small"], "say what it is fed, e.g. --shape 3,32,32"),
        (["space", "nowhere.yaml"], "no such file"),
        (["space", "nets:small", "--shape", "3,16,16", "--profile", "nowhere"], "unknown hardware profile"),
    ],
)
def test_what_init_and_space_cannot_do_is_said(network, arguments, told):
    with pytest.raises(UserError, match=re.escape(told)):
        invoke(*arguments)


def test_space_shows_sites_and_writes_a_space_that_is_read(network, tmp_path):
    out = tmp_path / "mine.yaml"
    arguments = [network, "--shape", "3,16,16", "--classes", "5", "--out", str(out)]
    shown = invoke("space", *arguments).output
    for told in ("conv 3", "32\u00d714\u00b2", "time", "by torch", "by thop", "prune", "ms a run here", "genes"):
        assert told in shown, told
    builder = parts.make_builder(network, InputSpec(shape=(3, 16, 16)), {"num_classes": 5})
    written = load.space(out, builder)
    assert {gene.site for gene in written.genes if gene.op == "quantize"} == {"0", "2", "4"}
    with pytest.raises(UserError, match="is there already"):
        invoke("space", *arguments)
    plain = invoke("space", *arguments, "--no-time", "--force").output
    assert "time" not in plain.splitlines()[2]


def test_space_of_a_job_is_the_jobs(network, tmp_path):
    (tmp_path / "digits.yaml").write_text(
        "task: digits\nmodel: convnet\nspace: convnet\ndevices: [{profile: local-1t}]\nout: runs/x\n"
    )
    shown = invoke("space", "digits.yaml", "--no-time").output
    assert "space convnet:" in shown
    assert "stages.2.1.conv2" in shown
    with pytest.raises(UserError, match="leave --shape"):
        invoke("space", "digits.yaml", "--shape", "3,8,8")


def test_a_block_stands_before_its_layers():
    sites = [Site(name=name, kind=kind) for name, kind in [("b.1", "block"), ("a", "conv"), ("b.0.x", "conv")]]
    sites += [Site(name="b.0", kind="block"), Site(name="b.1.x.y", kind="conv"), Site(name="b.1.x", kind="block")]
    assert [site.name for site in sitetable.in_order(sites)] == ["a", "b.0", "b.0.x", "b.1", "b.1.x", "b.1.x.y"]


@pytest.mark.parametrize("width", [60, 80, 103, 104, 120, 200])
def test_the_table_fits_the_terminal(width):
    sites = tuple(
        Site(name=f"encoder.layers.{n}.self_attention.projection", kind=kind, ops=("prune", "quantize"), macs=10**n)
        for n, kind in enumerate(["conv", "block", "depthwise", "linear"])
    )
    lines = tuple(sitetable.Line(site, (64, 56, 56), (128, 28, 28), 10**9, 0.5) for site in sites)
    found = sitetable.Figures(lines, 10**7, 10**9, 10**9, Times({"a": 2.0}, 1.0))
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(sitetable.show(found, width, "net"))
    text = console.export_text()
    table = text.split("layers, ")[0]
    assert max(map(len, table.rstrip().splitlines())) <= width
    assert "16.7 %" in text
    assert "jection" in text


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (9999, "10.0k"),
        (99_960, "100k"),
        (999_900, "1.00M"),
        (4_089_184_256, "4.09G"),
    ],
)
def test_numbers_are_short(number, told):
    assert sitetable.short(number) == told
    assert len(told) <= 5
