"""The end of a search loses nothing that was found: what fails there is a reason in the summary and the report."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from autocompress import report, summary
from autocompress.live import result_lines
from autocompress.run import resume, run
from autocompress.tasks.digits import Digits
from autocompress.types import Cost, Entry, Fidelity, Gene, Receipt, Space, TrialFailure
from tests.small_search import builder, job

QUIET = Console(quiet=True)
OP = f"{__name__}:Once"


class Once:
    """An op that can decide once in a process: a search does, looking at the winner's stages then fails."""

    name, phase = "once", "structure"
    decided = 0

    def __init__(self) -> None:
        self.params = {"on": False}

    def decide(self, subject, rules, task, profile, tensors=None):
        type(self).decided += 1
        if self.decided > 1:
            raise TrialFailure("once: it has decided already")
        return Receipt(op=self.name, entries=tuple(Entry(site=rule.site) for rule in rules))

    def enact(self, subject, receipt, tensors=None):
        return subject


class Withheld(Digits):
    """A task whose test split cannot be read."""

    def quality(self, predict, split):
        if split == "test":
            raise ValueError("the test split is under lock")
        return super().quality(predict, split)


def asked(out: Path):
    one_trial = {"cost": Cost(trials=1, minutes=5), "fidelity": Fidelity(full_epochs=1.0, rungs=(1.0,))}
    made = job(out, **one_trial)
    return made.model_copy(update={"model": made.model.model_copy(update={"epochs": 1.0})})


def space(op: str, param: str, *choices) -> Space:
    gene = Gene(name="gene", kind="policy", choices=choices, site="head", op=op, param=param)
    return Space(name="one", genes=(gene,))


def test_an_op_that_fails_when_stages_are_made_costs_the_stages_alone(tmp_path, monkeypatch):
    out = tmp_path / "run"
    found = run(asked(out), builder=builder(), space=space(OP, "on", False, True), serial=True, console=QUIET)
    assert found.state == "finished"
    (winner,) = [*found.winners.values(), *found.closest.values()]
    assert winner.number == 1
    assert winner.stages == ()
    assert (out / winner.path / "manifest.json").is_file()
    said = "quality by stages of #1: once: it has decided already"
    assert found.problems == (said,)
    assert json.loads((out / "summary.json").read_text())["problems"] == [said]
    assert said in (out / "report.html").read_text()
    assert said in result_lines(found, out)


def test_what_breaks_certification_is_raised_after_everything_is_written(tmp_path):
    out, task = tmp_path / "run", Withheld()
    genes = space("quantize", "bits", "float", "int8")
    with pytest.raises(ValueError, match="under lock"):
        run(asked(out), task=task, builder=builder(), space=genes, serial=True, console=QUIET)
    found = summary.read(out)
    assert found is not None
    assert found.state == "interrupted"
    assert found.trials == 1
    told = "ValueError: the test split is under lock"
    assert found.problems == (
        f"the baseline on the test split: {told}",
        f"certifying for local-1t: {told}",
        f"the control arm: {told}",
    )
    assert told in (out / "report.html").read_text()
    assert [one.number for one in (*found.winners.values(), *found.closest.values())] == [1]
    mended = resume(out, builder=builder(), space=genes, task=Digits(), serial=True, console=QUIET)
    assert (mended.state, mended.problems) == ("finished", ())
    assert report.write(out).is_file()
