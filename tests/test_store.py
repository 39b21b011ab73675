"""Content-addressed files: whole or not at all, and never another content than their name says."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocompress.store import Store, cache_dir, write_atomic
from autocompress.types import UserError


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=2000))
def test_what_is_put_is_got(tmp_path: Path, data: bytes) -> None:
    store = Store(tmp_path / "store")
    sha = store.put(data)
    assert sha == hashlib.sha256(data).hexdigest()
    assert store.has(sha)
    assert store.get(sha) == data
    assert store.path(sha).read_bytes() == data
    assert store.put(data) == sha  # twice is once


def test_no_part_files_remain_and_others_may_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sha = store.put(b"one")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [store.path(sha)]
    assert store.path(sha).stat().st_mode & 0o777 == 0o644


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UserError, match="is missing"):
        store.get("0" * 64)
    sha = store.put(b"right")
    store.path(sha).write_bytes(b"wrong")
    with pytest.raises(UserError, match="is damaged"):
        store.get(sha)


def test_a_file_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sha = store.put(b"right")
    store.path(sha).write_bytes(b"rig")
    assert store.put(b"right") == sha
    assert store.get(sha) == b"right"


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "0" * 63, "g" * 64])
def test_only_a_sha256_is_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a sha256"):
        Store(tmp_path).path(name)


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot create") as caught:
        Store(tmp_path / "file" / "store")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "file" / "x", b"data")


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from autocompress.store import write_atomic
from autocompress.types import UserError
path = Path(sys.argv[1])
write_atomic(path, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    write_atomic(path, b"n" * 100_000)
except UserError as error:
    print(error)
"""
    target = tmp_path / "folder" / "x"
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b"
    assert cache_dir().is_dir()
    monkeypatch.delenv("AUTOCOMPRESS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "autocompress"
