"""The probe's findings as a picture: every choice has its cell, every device its sheet."""

from __future__ import annotations

from autocompress.heatmap import heatmap
from autocompress.testing import ClosedForm
from autocompress.types import Facts, Probed, Space


def test_every_choice_has_its_cells_on_every_sheet():
    problem = ClosedForm(20, devices=2, probe=True)
    found = heatmap(problem.facts, problem.space)
    assert [sheet.title for sheet in found.sheets] == [
        "quality lost",
        "milliseconds gained, device-a",
        "milliseconds gained, device-b",
    ]
    probe = problem.facts.probe
    assert len(found.sheets[0].cells) == len(probe)
    assert all(len(sheet.cells) == 2 * len(probe) for sheet in found.sheets[1:])
    assert [row.label for row in found.rows[-5:]] == [site.name for site in problem.facts.sites]
    assert [row.label for row in found.rows[:2]] == ["side 24", "stage1.depth 2"]
    assert {"whole", "prune 0.6", "rank 0.25", "int8"} <= {head.label for head in found.sheets[0].columns}
    inside = (0 < cell.x < found.width and 0 < cell.y < found.height for sheet in found.sheets for cell in sheet.cells)
    assert all(inside)


def test_what_was_not_looked_at_and_what_left_the_space_are_told_apart():
    probe = (
        Probed(gene="block.kind@a", choice="drop", kl=0.5, ms={"d": 2.0}, best_ms={"d": -1.0}),
        Probed(gene="block.kind@a", choice="merge", ms={"d": 0.0}, kept=False, why="gains nothing"),
        Probed(gene="quantize.bits@a", choice="int8", why="not tried: the time was up"),
    )
    found = heatmap(Facts(probe=probe), Space(name="left", genes=()))
    quality, times = found.sheets
    assert [cell.kind for cell in quality.cells] == ["lost", "none", "none"]
    assert [cell.kind for cell in times.cells] == ["gain", "slow", "slow", "none", "none", "none"]
    assert times.cells[0].strength == 1.0 > times.cells[1].strength > times.cells[2].strength
    assert "left the space: gains nothing" in quality.cells[1].title
    assert "1 left the space" in found.about


def test_without_a_probe_there_is_no_picture():
    assert heatmap(Facts(), Space(name="none", genes=())) is None
