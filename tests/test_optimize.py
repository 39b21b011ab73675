"""What the runtime's optimizer fused, and its file as an artifact."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from autocompress.export import compose, export, predictor
from autocompress.ops.optimize import fused, optimized
from autocompress.tasks.digits import Digits
from autocompress.types import Profile, TrialFailure


def model() -> bytes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
        return compose(export(nn.Sequential(body, nn.Linear(256, 10)).eval(), Digits.input, opset=17))


def test_the_report_counts_what_was_fused():
    found = fused(model(), optimized(model(), Profile(name="here")))
    assert found["Relu"] == -2
    assert found["nodes"] < 0
    assert sum(count for name, count in found.items() if name != "nodes") == found["nodes"]


def test_the_offline_file_answers_as_before():
    images = next(Digits().batches("selection", 16))[0].numpy()
    file = optimized(model(), Profile(name="here"))
    assert np.allclose(predictor(file)(images), predictor(model())(images), rtol=1e-4, atol=1e-5)
    assert len(onnx.load_model_from_string(file).graph.node) < len(onnx.load_model_from_string(model()).graph.node) + 3


def test_what_cannot_be_loaded_is_a_failed_trial():
    with pytest.raises(TrialFailure, match="cannot optimize"):
        optimized(b"no model", Profile(name="here"))
