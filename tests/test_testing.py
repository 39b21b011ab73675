"""The contract checks pass what is right and name what is wrong."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from autocompress.devices import Samples
from autocompress.registry import resolve
from autocompress.tasks.intervals import mean_of
from autocompress.testing import check_device, check_op, check_task
from autocompress.types import Entry, Profile, Receipt, Rule


class Scale:
    """Multiplies a layer's weights: a made-up op with one fault at a time."""

    name, phase, params = "scale", "structure", {"factor": 1.0}

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def decide(self, subject, rules, task, profile):
        if self.fault == "decide changes":
            nn.init.zeros_(subject.get_submodule(rules[0].site).weight)
        facts = {"factor": np.float32(2) if self.fault == "not json" else rules[0].settings["factor"]}
        status = "skipped" if self.fault == "silent skip" else "done"
        return Receipt(op=self.name, entries=(Entry(site=rules[0].site, status=status, facts=facts),))

    def enact(self, subject, receipt):
        factor = receipt.entries[0].facts["factor"]
        if self.fault == "enact draws":
            factor += torch.rand(()).item()
        with torch.no_grad():
            subject.get_submodule(receipt.entries[0].site).weight.mul_(factor)
        return subject


def checked(fault: str = "", **settings) -> Receipt:
    rules = [Rule(site="0", op="scale", settings=settings or {"factor": 2.0})]
    return check_op(Scale(fault), nn.Sequential(nn.Linear(3, 2)), rules, None, Profile(name="p"))


def test_an_op_that_keeps_the_contract_passes():
    assert checked().entries[0].facts == {"factor": 2.0}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("decide changes", "decide changed its subject"),
        ("not json", "is not JSON"),
        ("silent skip", "without saying why"),
        ("enact draws", "two results"),
    ],
)
def test_an_op_that_breaks_it_is_named(fault, says):
    with pytest.raises(AssertionError, match=says):
        checked(fault)


def test_a_setting_that_the_op_does_not_know_is_named():
    with pytest.raises(AssertionError, match="not among its params"):
        checked(facter=2.0)


@pytest.fixture
def file(tmp_path):
    value = helper.make_tensor_value_info
    node = helper.make_node("Relu", ["input"], ["output"])
    graph = helper.make_graph(
        [node], "g", [value("input", TensorProto.FLOAT, ["batch", 4])], [value("output", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "relu.onnx"
    onnx.save(model, path)
    return path


class Clock:
    """A made-up device that answers with what it was given."""

    profile = Profile(name="clock")

    def __init__(self, *readings, key=str):
        self.readings, self.key = list(readings), key

    def fingerprint(self):
        return {"processor": "made up"}

    def time(self, models, *, rounds, seconds, cores=()):
        taken = self.readings.pop(0)
        return Samples(times_ms={self.key(model): taken for model in models})


def test_a_device_is_held_to_its_protocol(file):
    check_device(Clock((1.0, 1.1, 1.2), (1.5, 1.4, 1.6)), file)
    with pytest.raises(AssertionError, match="two readings of one file differ"):
        check_device(Clock((1.0, 1.1, 1.2), (9.0, 9.0, 9.0)), file)
    with pytest.raises(AssertionError, match="not positive"):
        check_device(Clock((1.0, 0.0, 1.2)), file)
    with pytest.raises(AssertionError, match="not by the file as given"):
        check_device(Clock((1.0, 1.0, 1.0), key=lambda model: model.name), file)


def test_the_digits_task_passes_and_a_leaking_one_does_not():
    digits = resolve("task", "digits")
    check_task(digits())

    class Leaking(digits):
        def batches(self, split, size, **more):
            return super().batches("selection" if split == "test" else split, size, **more)

    with pytest.raises(AssertionError, match="selection and test share"):
        check_task(Leaking())

    class Sure(digits):
        def quality(self, predict, split):
            found = super().quality(predict, split)
            return found.model_copy(update={"value": found.value.model_copy(update={"low": found.value.value + 0.1})})

    with pytest.raises(AssertionError, match="does not contain its value"):
        check_task(Sure())

    class Unlike(digits):
        def quality(self, predict, split):
            return mean_of(~self.scores(predict, split), self.metric, split)

    with pytest.raises(AssertionError, match="the mean of the scores is"):
        check_task(Unlike())
