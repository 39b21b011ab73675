"""The journal survives what may happen to a file: kills, full disks, a second writer, garbage."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress import journal
from autocompress.journal import Journal
from autocompress.types import UserError

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
events = st.lists(
    st.dictionaries(st.text().filter(lambda k: k not in {"number", "state"}), values, max_size=3).flatmap(
        lambda more: st.fixed_dictionaries({"number": st.integers(0, 10**6), "state": st.text(max_size=10)}).map(
            lambda event: {**event, **more}
        )
    ),
    max_size=6,
)


def _write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "journal.jsonl"
    with Journal.create(path, {"space": "é\u2028x"}) as opened:
        for line in lines:
            opened.append(line)
    return path


@settings(max_examples=60, deadline=None)
@given(events)
def test_what_was_appended_comes_back(lines: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = _write(Path(folder), lines)
        with Journal.open(path) as opened:
            assert opened.events()[1:] == lines
            assert opened.header["space"] == "é\u2028x"
            assert opened.notes == ()
        assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())


@settings(max_examples=120, deadline=None)
@given(events, st.data())
def test_a_file_cut_at_any_byte_keeps_every_complete_line(lines: list[dict[str, Any]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = _write(Path(folder), lines)
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        first = whole.index(b"\n")
        if cut < first:
            with pytest.raises(UserError, match="never began"):
                Journal.open(path)
            Journal.create(path, {"space": "again"}).close()  # such a file stands in nobody's way
            return
        # A line that lacks only its newline is whole.
        complete = whole[:cut].count(b"\n") + (cut < len(whole) and whole[cut : cut + 1] == b"\n")
        with Journal.open(path) as opened:
            assert opened.events()[1:] == lines[: complete - 1]
            torn = cut > 0 and whole[cut - 1 : cut] != b"\n" and whole[cut : cut + 1] != b"\n"
            assert bool(opened.notes) == torn
            opened.append({"number": 7, "state": "after"})
        with Journal.open(path) as opened:
            assert opened.events()[1:] == [*lines[: complete - 1], {"number": 7, "state": "after"}]
            assert opened.notes == ()


@settings(max_examples=80, deadline=None)
@given(st.binary(min_size=1, max_size=40).filter(lambda raw: b"\n" not in raw), st.integers(1, 3))
def test_garbage_before_the_end_names_its_line(garbage: bytes, at: int) -> None:
    try:
        parsed = json.loads(garbage)
    except (ValueError, RecursionError):
        parsed = None
    assert not isinstance(parsed, dict)
    with tempfile.TemporaryDirectory() as folder:
        path = _write(Path(folder), [{"number": 1, "state": "running"}, {"number": 1, "state": "done"}])
        rows = path.read_bytes().split(b"\n")
        rows.insert(at, garbage)
        path.write_bytes(b"\n".join(rows))
        before = path.read_bytes()
        for opening in (Journal.open, journal.read):
            with pytest.raises(UserError, match=rf"line {at + 1}\b") as caught:
                opening(path)
            assert "\n" not in str(caught.value)
        assert path.read_bytes() == before


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_file_is_read_or_refused_in_one_line(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        path.write_bytes(raw)
        with pytest.raises(UserError) as caught:
            Journal.open(path)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == raw


@pytest.mark.parametrize(
    "line", ["[1]", '{"state":"done"}', '{"number":"1","state":"done"}', '{"number":true,"state":"x"}']
)
def test_a_line_needs_number_and_state(tmp_path: Path, line: str) -> None:
    path = _write(tmp_path, [])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"line 2: .*number"):
        Journal.open(path)


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    path = _write(tmp_path, [])
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds another run"):
        Journal.create(path, {})
    path.write_text("my diary")
    with pytest.raises(UserError, match="holds another run"):
        Journal.create(path, {})
    path.write_bytes(before.replace(b'"format":1', b'"format":99'))
    with pytest.raises(UserError, match="format 99"):
        Journal.open(path)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, [])
    with Journal.open(path) as first:
        with pytest.raises(UserError, match="another process"):
            Journal.open(path)
        with pytest.raises(UserError, match="another process"):
            Journal.create(path, {})
        code = "import sys, pathlib, autocompress.journal as j; j.Journal.open(pathlib.Path(sys.argv[1]))"
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        assert "another process" in other.stderr
        first.append({"number": 1, "state": "running"})
    Journal.open(path).close()


def test_a_missing_or_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no journal"):
        Journal.open(tmp_path / "journal.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        journal.read(tmp_path / "journal.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        Journal.create(tmp_path / "file" / "journal.jsonl", {})


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    path = _write(tmp_path, [])
    before = path.read_bytes()
    with Journal.open(path) as opened, pytest.raises(ValueError, match="JSON"):
        opened.append({"number": 1, "state": "done", "loss": float("nan")})
    assert path.read_bytes() == before


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = _write(tmp_path, [])
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Journal.open(path) as opened:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (len(before) + 10, hard)
            )  # the write is cut short, as on a full disk
            with pytest.raises(UserError, match="nothing was lost"):
                opened.append({"number": 1, "state": "running"})
            assert path.read_bytes() == before
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            opened.append({"number": 2, "state": "running"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert [event["number"] for event in journal.read(path).events] == [0, 2]


def test_kill_at_any_moment_loses_no_written_event(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import os, sys; from pathlib import Path; from autocompress.journal import Journal\n"
        "j = Journal.create(Path(sys.argv[1]), {})\n"
        "for n in range(1, 10**6):\n"
        "    j.append({'number': n, 'state': 'running'}); os.write(1, b'%d\\n' % n)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    seen = 0
    while seen < 500:
        seen = int(child.stdout.readline())
    child.kill()
    for line in child.stdout:
        seen = max(seen, int(line)) if line.endswith(b"\n") else seen
    child.stdout.close()
    child.wait()
    with Journal.open(path) as opened:
        numbers = [event["number"] for event in opened.events()]
    assert numbers == list(range(len(numbers)))
    assert seen <= numbers[-1] <= seen + 1


def test_a_run_began_only_with_a_complete_header(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert not journal.began(path)
    path.write_bytes(b'{"number":0,"sta')
    assert not journal.began(path)
    path.write_bytes(b"something else\n")
    assert journal.began(path)  # never overwritten
    path.unlink()
    journal.Journal.create(path, {}).close()
    assert journal.began(path)
    with pytest.raises(UserError, match="cannot read the journal"):
        journal.began(tmp_path)
