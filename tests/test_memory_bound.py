"""What a real trial holds in memory, measured from outside."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "evaluate.py"


@pytest.mark.skipif(sys.platform != "linux", reason="another system counts memory otherwise")
@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_a_trials_peak_stays_under_its_bound(tmp_path):
    """Pruning, low rank by data, distillation, int8; above what Python and the libraries take before."""
    file = tmp_path / "found.json"
    told = ["--only", "trial", "--model", "torchvision:resnet18", "--size", "64", "--epochs", "1", "--json", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    subprocess.run([sys.executable, str(SCRIPT), *told], check=True, capture_output=True, env=environment, timeout=150)
    found = json.loads(file.read_text())["memory"]
    assert found["trial_mb"] < found["bound_mb"]
    assert found["bound_mb"] < 500 + 3 * found["weights_mb"] + found["teacher_mb"] + found["activations_mb"] + 1
    assert found["structure_mb"] - found["libraries_mb"] < 2 * found["teacher_mb"] + 500  # fits stream their data
