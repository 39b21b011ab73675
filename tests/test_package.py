"""The package as it is installed: what its import costs, what the wheel carries, what stands beside it."""

import importlib.util
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import autocompress
from autocompress import shelves

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "torchvision", "ray", "onnx", "onnxruntime", "sklearn", "scipy", "plotly", "torch_pruning", "thop")


def loaded_by(code: str) -> set[str]:
    """The heavy packages among the modules that are loaded after `code` in a fresh interpreter."""
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in done.stdout.split()} & set(HEAVY)


@pytest.mark.parametrize(
    "code",
    [
        "import autocompress",
        "from autocompress import Job, Space, UserError; dir(__import__('autocompress'))",
        "import autocompress.cli",
        "from autocompress import load; load.profiles(); load.space_file('convnet'); load.job('examples/digits.yaml')",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert loaded_by(code) == set()


@pytest.mark.parametrize("name", sorted(set(autocompress.__all__)))
def test_every_public_name_is_there(name):
    assert not isinstance(getattr(autocompress, name), ModuleType)
    assert name in dir(autocompress)


def test_no_submodule_bears_the_name_of_a_public_function():
    """Importing it would put the module in the function's place."""
    modules = {module.name for module in pkgutil.iter_modules(autocompress.__path__)}
    assert not modules & set(autocompress.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = autocompress.serach


def test_version_and_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == autocompress.__version__
    assert {"test", "dev", "optuna", "nni"} <= set(project["optional-dependencies"])


def test_the_wheel_carries_both_shelves(tmp_path):
    hatchling = pytest.importorskip("hatchling.builders.wheel", reason="needs the dev extra")
    (wheel,) = hatchling.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for shelf in (shelves.SPACES, shelves.PROFILES):
        files = {f"autocompress/_shelves/{shelf}/{path.name}" for path in (ROOT / shelf).glob("*.yaml")}
        assert files
        assert files <= names
    assert "autocompress/py.typed" in names
    assert not {name.partition("/")[0] for name in names} & {"tests", "examples", "benchmarks", "search_spaces"}


def test_nothing_that_ships_names_a_machine_of_ours():
    for folder in ("autocompress", "examples", "benchmarks", "search_spaces", "hardware_profiles"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".md", ".txt", ".html"):
                assert not re.search(r"/(root|home)/", path.read_text(encoding="utf-8")), path


@pytest.mark.skipif(importlib.util.find_spec("nni") is None, reason="needs the nni extra")
def test_nni_stands_beside_everything_else():
    """A model of NNI's hub is drawn and runs in the environment that holds torch, ray and onnxruntime of today."""
    script = """
import warnings
warnings.simplefilter("ignore")  # nni 3.0 is archived and full of them
import torch
try:
    import torchvision
except RuntimeError as error:  # torchvision's binary beside another build of torch
    assert "torchvision::nms does not exist" in str(error), error
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import onnxruntime, ray.tune, torch_pruning
from nni.nas.hub.pytorch import MobileNetV3Space
model = MobileNetV3Space(num_labels=10).random().eval()
print(tuple(model(torch.zeros(1, 3, 32, 32)).shape))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 10)"
