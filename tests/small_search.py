"""A search small enough for a test and real in every part: digits, a thin convnet, one thread, this machine."""

from pathlib import Path

from autocompress import load
from autocompress.models.convnet import ConvNet
from autocompress.types import (
    Budget,
    Cost,
    Fidelity,
    Job,
    ModelSource,
    QualityLimit,
    SearchPlan,
    Space,
)

SPACE = """
name: small
builder: convnet
arch:
  depth.2: [2, 1]
  kind.1: [residual, separable]
policy:
  - {sites: "stages.*.conv1", op: prune, param: ratio, choices: [0.0, 0.5]}
  - {sites: "stages.1.*.conv2", op: lowrank, param: rank, choices: [1.0, 0.25], when: {kind.1: residual}}
  - {sites: ["stem.conv", "stages.*", "head"], op: quantize, param: bits, choices: [float, int8]}
  - {sites: ".", op: distill, param: weight, choices: [0.0, 0.5]}
"""


def builder() -> ConvNet:
    """The convnet family with a thin parent: trains in seconds."""
    return ConvNet(arch={"resolution": 8, "width.0": 16, "width.1": 32, "width.2": 64})


def space(folder: Path) -> Space:
    """A few genes of every op."""
    path = folder / "small.yaml"
    path.write_text(SPACE)
    return load.space(path, builder())


def job(out: Path, **plan: object) -> Job:
    """A job of a few trials; `plan` replaces fields of `search`."""
    search = SearchPlan(
        searcher="random",
        fidelity=Fidelity(full_epochs=2.0, rungs=(0.5, 1.0)),
        cost=Cost(trials=4, minutes=5),
        sessions=2,
    ).model_copy(update=plan)
    return Job(
        task="digits",
        model=ModelSource(builder="convnet", epochs=4),
        space="small",
        devices=(Budget(profile="local-1t", speedup=0.3),),
        quality=QualityLimit(max_drop=0.9),
        search=search,
        out=str(out),
    )
