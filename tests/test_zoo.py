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


def test_what_does_not_fit_into_memory_is_one_line(zoo, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(zoo.memory, "SMALL", 0)
    monkeypatch.setattr(zoo.memory, "available", lambda: 1000)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        zoo.child("hf:vit", 0)
    finally:
        torch.set_rng_state(state)
        torch.set_num_threads(threads)
    row = json.loads(capsys.readouterr().out)
    assert not row["passed"]
    assert row["reason"].startswith("hf:vit, 0.0 GB, with a candidate needs about 0.0 GB of memory, 0.0 GB are")
    assert row["peak_mb"] > 0


def test_figures_of_rows_of_every_kind(zoo):
    rows = [
        {"network": "a", "seed": 0, "passed": True, "reason": "", "changed": 0.5, "removed": 0.3, "parity": 1e-6},
        {"network": "a", "seed": 1, "passed": False, "reason": "the network is too small"},
        {"network": "b", "seed": 0, "passed": False, "reason": "", "crash": "exit code -9"},
    ]
    found = zoo.summary(rows)
    assert (found["pairs"], found["passed"], found["explained"], found["unexplained"]) == (3, 1, 1, 1)
    assert "| a |  | 1 of 2 | 50% | 30% | 1e-06 | the network is too small |" in zoo.table(rows)
