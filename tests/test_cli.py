import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autocompress import cli
from autocompress.types import LimitError, TrialFailure, UserError

COMMANDS = ("search", "resume", "report", "measure", "apply", "spaces", "profiles", "check")
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


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("[a] wrong [/b]"), 2), (TrialFailure("[a] wrong [/b]"), 2), (LimitError("[a] wrong [/b]"), 1)],
)
def test_expected_errors_are_their_line_and_code(exits, error, code):
    assert exits(error) == (code, "[a] wrong [/b]\n")


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
