"""Quality by stages is made by the very path that makes candidates."""

import torch

from autocompress.export import predictor
from autocompress.parts import make_ops
from autocompress.pipeline import Work, release, shape, training, weights_of
from autocompress.stages import answers, stages
from autocompress.tasks.digits import Digits
from autocompress.train import Training
from autocompress.types import Candidate, Policy, Profile, Rule
from tests.small_search import builder


def test_every_stage_has_the_quality_of_its_own_network():
    torch.manual_seed(0)
    network, task = builder(), Digits()
    parent = network.build({})
    Training(parent, task, epochs=2, seed=0).run_to(1.0)
    work = Work(network, task, make_ops(("prune", "lowrank", "quantize")), parent.eval(), (Profile(name="here"),))
    rules = (
        Rule(site="stages.1", op="prune", settings={"ratio": 0.5}),
        Rule(site="head", op="lowrank", settings={"rank": 0.5}),
        Rule(site="stem.conv", op="quantize", settings={"bits": "int8"}),
    )
    candidate = Candidate(arch={"depth.2": 1}, policy=Policy(rules=rules))
    shaped = shape(work, candidate)
    Training(shaped.module, task, epochs=1, seed=0).run_to(1.0)
    (file,) = release(work, shaped.module, candidate.policy).values()
    found = stages(work, candidate, shaped.receipts, weights_of(shaped.module), file.model, "selection")
    assert [stage.name for stage in found] == ["inherited", "prune", "lowrank", "batch norm", "trained", "shipped"]
    by_name = {stage.name: stage.quality.value.value for stage in found}
    assert by_name["trained"] > by_name["prune"]
    assert found[-1].quality == task.quality(predictor(file.model), "selection")
    assert all(stage.quality.split == "selection" and stage.quality.samples == 360 for stage in found)


def test_weights_trained_to_be_rounded_are_judged_rounded():
    torch.manual_seed(0)
    network, task = builder(), Digits()
    parent = network.build({})
    Training(parent, task, epochs=2, seed=0).run_to(1.0)
    ops = make_ops(("prune", "quantize", "fourbits"))
    work = Work(network, task, ops, parent.eval(), (Profile(name="here"),), epochs=1.0)
    rules = (
        Rule(site=".", op="quantize", settings={"bits": "int8"}),
        Rule(site=".", op="quantize", settings={"weights": "int4"}),
    )
    candidate = Candidate(arch={}, policy=Policy(rules=rules))
    shaped = shape(work, candidate)
    assert [receipt.op for receipt in shaped.instruments] == ["fourbits"]
    training(work, shaped, candidate.policy, 0).run_to(1.0)
    rounded = task.quality(answers(shaped.module), "selection")
    settled = shaped.settle(work)
    (file,) = release(work, settled.module, candidate.policy).values()
    made = (*shaped.receipts, *settled.learned)
    found = stages(work, candidate, made, weights_of(settled.module), file.model, "selection")
    assert found[-2].name == "trained"
    assert found[-2].quality == rounded
    assert rounded != task.quality(answers(settled.module), "selection")
