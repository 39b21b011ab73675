"""What memory is left, and the line that is said where it is too little."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from torch import nn

from autocompress import memory
from autocompress.export import export
from autocompress.parent import make_parent
from autocompress.parts import parts
from autocompress.pipeline import Work, shape
from autocompress.tasks.digits import Digits
from autocompress.types import Candidate, Policy, TrialFailure, UserError
from tests import small_search

GROUP = "sys/fs/cgroup"


def group(root: Path, kind: str, **files: str) -> Path:
    """A root folder of a container whose control group has these files."""
    (root / "proc/self").mkdir(parents=True)
    (root / GROUP).mkdir(parents=True)
    line, mount = ("0::/", "cgroup2") if kind == "cgroup2" else ("4:memory:/", "cgroup")
    (root / "proc/self/cgroup").write_text(f"{line}\n")
    (root / "proc/self/mountinfo").write_text(f"30 23 0:26 / /{GROUP} rw - {mount} cgroup rw,memory\n")
    for name, text in files.items():
        (root / GROUP / name.replace("__", ".")).write_text(f"{text}\n")
    return root


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert memory.available(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(
    ("kind", "files", "left"),
    [
        ("cgroup2", {"memory__max": "5000", "memory__current": "3000", "memory__stat": "inactive_file 400"}, 2400),
        ("cgroup2", {"memory__max": "1000", "memory__current": "3000", "memory__stat": "anon 3000"}, 0),
        (
            "cgroup",
            {
                "memory__limit_in_bytes": "5000",
                "memory__usage_in_bytes": "3000",
                "memory__stat": "total_active_file 500\ntotal_inactive_file 100",
            },
            2600,
        ),
    ],
)
def test_a_groups_limit_holds(tmp_path: Path, kind: str, files: dict[str, str], left: int) -> None:
    assert memory.available(group(tmp_path, kind, **files)) == left


def test_a_group_without_a_limit(tmp_path: Path) -> None:
    root = group(tmp_path, "cgroup2", memory__max="max", memory__current="3000", memory__stat="")
    assert memory.available(root) > 1e6


def test_the_line_says_needed_and_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2_000_000_000)
    memory.check(1.9e9, "a trial")
    with pytest.raises(TrialFailure, match=r"^a trial needs about 7.6 GB of memory, 2.0 GB are available; end other"):
        memory.check(7.6e9, "a trial")
    with pytest.raises(UserError, match="needs about"):
        memory.check(7.6e9, "the model", UserError)


def test_an_export_that_does_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(TrialFailure, match=r"exporting a network of 0.0 GB needs about"):
        export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Digits.input, opset=17)


def test_neither_a_parent_nor_a_candidate_is_begun_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = parts(small_search.job(tmp_path), builder=small_search.builder(), space=small_search.space(tmp_path))
    parent = made.builder.build({})
    work = Work(builder=made.builder, task=made.task, ops={}, parent=parent, profiles=made.profiles)
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(TrialFailure, match=r"a candidate of 0.0 GB needs about 0.0 GB of memory"):
        shape(work, Candidate(arch={}, policy=Policy()))
    with pytest.raises(UserError, match=r"model convnet, 0.0 GB, with a candidate needs about"):
        make_parent(made, tmp_path, lambda _: None)


def test_shared_weights_count_once() -> None:
    module = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    module.append(module[0])
    assert memory.module_bytes(module) == 4 * (64 + 2 * 8 + 2 * 8) + 8
