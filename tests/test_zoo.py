"""A few strangers' networks through the whole path, as `benchmarks/zoo.py` takes all of them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "benchmarks" / "zoo.py"


@pytest.fixture(scope="module")
def zoo():
    spec = importlib.util.spec_from_file_location("zoo", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "network",
    ["torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5", "timm:resnet18d", "hf:vit", "hf:distilbert"],
)
def test_a_network_passes_with_a_random_policy(zoo, network, tmp_path):
    state = torch.get_rng_state()
    try:
        row = zoo.conform(network, 0, tmp_path)
    finally:
        torch.set_rng_state(state)
    assert row["changed"] >= zoo.SITES
    assert row["removed"] >= zoo.MACS
    assert row["parity"] < 1e-3
    assert row["reload_error"] == 0.0
    assert row["ops"]["quantize"] > 0
    json.dumps(row)


def test_figures_of_rows_of_every_kind(zoo):
    rows = [
        {"network": "a", "seed": 0, "passed": True, "reason": "", "changed": 0.5, "removed": 0.3, "parity": 1e-6},
        {"network": "a", "seed": 1, "passed": False, "reason": "the network is too small"},
        {"network": "b", "seed": 0, "passed": False, "reason": "", "crash": "exit code -9"},
    ]
    found = zoo.summary(rows)
    assert (found["pairs"], found["passed"], found["explained"], found["unexplained"]) == (3, 1, 1, 1)
    assert "| a |  | 1 of 2 | 50% | 30% | 1e-06 | the network is too small |" in zoo.table(rows)
