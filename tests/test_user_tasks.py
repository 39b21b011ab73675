"""Networks and tasks of a user's own, several inputs and outputs: forced policies, and whole small searches."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

import autocompress
from autocompress import artifact, export, load, registry
from autocompress.models.foreign import Foreign
from autocompress.ops import Op
from autocompress.parts import make_ops
from autocompress.pipeline import Work, qualities, release, shape, training
from autocompress.reuse import apply
from autocompress.tasks import Task, several
from autocompress.tasks.recipe import Recipe
from autocompress.testing import check_task
from autocompress.train import Training
from autocompress.types import Candidate, Policy, Profile, Rule
from examples.my_regression import Boxes, TwoHeads
from examples.my_segmentation import Shapes, UNet

QUIET = Console(quiet=True)
OPS: dict[str, Op] = dict(make_ops(("prune", "lowrank", "quantize")))
CASES = {
    "segmentation": (Shapes, UNet, 3, "down.3", "join.3", 0.8),
    "regression": (Boxes, TwoHeads, 8, "body.0", "mix", 0.6),
}
SPACE = """
name: own
builder: {builder}
policy:
  - {{sites: "{pruned}", op: prune, param: ratio, choices: [0.0, 0.5]}}
  - {{sites: "*", op: quantize, param: bits, choices: [float, int8]}}
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A task, and a network that was trained on it."""
    make_task, make_network, epochs, *rest = CASES[request.param]
    torch.manual_seed(0)
    task, network = make_task(), make_network()
    Training(network, task, epochs, 0).run_to(1.0)
    return task, network.eval(), *rest


def quality(task: Task, network: nn.Module, split: str = "selection") -> float:
    def predict(inputs):
        with torch.no_grad():
            outputs = several(network(*(torch.from_numpy(np.ascontiguousarray(one)) for one in several(inputs))))
        found = tuple(one.numpy() for one in outputs)
        return found if len(found) > 1 else found[0]

    return task.quality(predict, split).value.value


def test_the_examples_keep_the_contract_and_learn(case):
    task, network, _, _, least = case
    check_task(task, network=network)
    assert quality(task, network) > least


def test_pruned_and_in_int8_they_still_answer(case):
    """Half of one group, low rank elsewhere, int8 everywhere: forward, train, export, parity, the file's quality."""
    task, network, pruned, factored, _ = case
    builder = Foreign.of(network, task.input)
    rules = [
        Rule(site=pruned, op="prune", settings={"ratio": 0.5}),
        Rule(site=factored, op="lowrank", settings={"rank": 0.5}),
        *(Rule(site=s.name, op="quantize", settings={"bits": "int8"}) for s in builder.sites() if "quantize" in s.ops),
    ]
    candidate = Candidate(arch={}, policy=Policy(rules=tuple(rules)))
    work = Work(builder=builder, task=task, ops=OPS, parent=network, profiles=(Profile(name="p"),), epochs=1.0)
    shaped = shape(work, candidate)
    done = {(receipt.op, entry.site) for receipt in shaped.receipts for entry in receipt.entries}
    assert {("prune", pruned), ("lowrank", factored)} <= done
    assert all(entry.status == "done" for receipt in shaped.receipts for entry in receipt.entries)
    size = sum(one.numel() for one in shaped.module.parameters())
    assert size < 0.9 * sum(one.numel() for one in network.parameters())
    training(work, shaped, candidate.policy, seed=0).run_to(1.0)
    releases = release(work, shaped.module, candidate.policy)
    (file,) = releases.values()
    assert b"QuantizeLinear" in file.model
    session = export.open_session(file.model)
    assert [one.name for one in session.get_inputs()] == [one.name for one in task.input.every]
    found = qualities(work, releases, "selection")["p"].value.value
    assert found > quality(task, network) - 0.15


def test_a_whole_search_leaves_an_artifact_that_runs_alone(case, tmp_path: Path):
    task, network, pruned, _, _ = case
    builder = Foreign.of(network, task.input)
    (tmp_path / "own.yaml").write_text(SPACE.format(builder=builder.name, pruned=pruned))
    summary = autocompress.search(
        network,
        task,
        space=load.space(tmp_path / "own.yaml", builder),
        devices=[{"profile": "local-1t", "speedup": 0.2}],
        quality={"metric": task.metric, "max_drop": 0.9},
        fidelity={"full_epochs": 0.5, "rungs": [1.0]},
        searcher="random",
        trials=2,
        minutes=2,
        sessions=2,
        out=tmp_path / "run",
        serial=True,
        console=QUIET,
    )
    assert summary.counts["done"] >= 1, summary
    (winner,) = [*summary.winners.values(), *summary.closest.values()]
    folder = tmp_path / "run" / winner.path
    read = artifact.read(folder)
    assert read.manifest.input == task.input
    inputs, _ = next(iter(task.batches("test", 3)))
    given = {spec.name: one.numpy() for spec, one in zip(task.input.every, several(inputs), strict=True)}
    np.savez(tmp_path / "inputs.npz", **given)
    printed = subprocess.run(
        [sys.executable, "-I", str(folder / "infer.py"), str(tmp_path / "inputs.npz")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    session = export.open_session((folder / "model.onnx").read_bytes())
    for output, answer in zip(session.get_outputs(), session.run(None, given), strict=True):
        assert f"{output.name}\n{answer.shape}\n" in printed
    applied = apply(folder, model=network, task=task)
    assert applied.reproduced
    assert applied.byte_equal or applied.error < 1e-2


def test_what_the_docs_write_under_data_is_understood():
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) >= 5
    for block in blocks:
        known = inspect.signature(registry.resolve("task", block["task"])).parameters
        assert set(block["data"]) <= set(known)
        Recipe.of(block["data"].get("training"), "docs")
