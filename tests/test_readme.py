"""The README's ways to compress one's own network, run as they stand there (for a few trials)."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from autocompress.tasks.digits import read_digits

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
NETS = """
import torch
from torch import nn

from autocompress.tasks.images import Images


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


def thin():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), Block(32), Block(32), Block(32),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )


images = Images(path="images.npz")
trained = thin()
trained.load_state_dict(torch.load("thin.pt", weights_only=True))
"""


def block(kind: str) -> str:
    """The first fenced block of a kind below the heading."""
    section = README.partition("## Compress your own network")[2]
    found = re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


def test_at_most_ten_lines_each():
    for kind in ("yaml", "python"):
        assert len([line for line in block(kind).splitlines() if line.strip()]) <= 10


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the user's module, a trained network and data."""
    folder = tmp_path_factory.mktemp("mine")
    pixels, labels = read_digits()
    pictures = (pixels.reshape(-1, 8, 8) * 15.9).astype(np.uint8)
    np.savez(
        folder / "images.npz",
        x_train=pictures[:1400],
        y_train=labels[:1400].astype(np.int64),
        x_test=pictures[1400:],
        y_test=labels[1400:].astype(np.int64),
    )
    (folder / "nets.py").write_text(NETS)
    script = (
        "import torch, nets\nfrom autocompress.train import Training\nfrom safetensors.torch import save_file\n"
        "torch.manual_seed(0)\nnetwork = nets.thin()\n"
        "Training(network, nets.images, epochs=3, seed=0).run_to(1.0)\n"
        "save_file({k: v.contiguous() for k, v in network.state_dict().items()}, 'thin.safetensors')\n"
        "torch.save(network.state_dict(), 'thin.pt')\n"
    )
    sys.path.insert(0, str(folder))
    try:
        import torch

        namespace: dict[str, object] = {}
        exec(NETS.partition("images = ")[0], namespace)
        network = namespace["thin"]()
        torch.save(network.state_dict(), folder / "thin.pt")
        save_file(dict(network.state_dict()), folder / "thin.safetensors")
    finally:
        sys.path.remove(str(folder))
    run(folder, script)
    return folder


def run(folder: Path, script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_job(place):
    few = block("yaml").replace("search: {", "search: {sessions: 2, ")
    assert few != block("yaml")
    (place / "job.yaml").write_text(few)
    run(
        place,
        "import sys; sys.argv = ['autocompress', 'search', 'job.yaml', '--serial', '--trials', '3']\n"
        "from autocompress.cli import main\nmain()",
    )
    assert (place / "runs/mine/report.html").is_file()
    assert (place / "runs/mine/space.yaml").is_file()


def test_the_python(place):
    few = block("python").replace("minutes=10", "minutes=10, trials=3, serial=True, sessions=2")
    assert few != block("python")
    run(place, few.replace("found.winners", "{**found.closest, **found.winners}"))
    assert (place / "runs/own/summary.json").is_file()
