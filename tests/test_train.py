"""Training in pieces equals training in one go; distillation; batch-norm statistics."""

import math
import time
from itertools import islice

import pytest
import torch
from torch import nn

from autocompress import train
from autocompress.distill import Distill, response_loss
from autocompress.models.convnet import ConvNet
from autocompress.tasks.digits import Digits
from autocompress.train import bf16_faster, one_cycle, reestimate_batchnorm
from autocompress.types import Profile, Rule, TrialFailure, UserError
from examples.my_task import EvenDigits

PROFILE = Profile(name="here")


def training_of(*args, **options) -> train.Training:
    """With the batches that the figures below speak of."""
    return train.Training(*args, **{"batch": 32, "lr": 0.05, **options})


@pytest.fixture(autouse=True)
def one_thread():
    """Bit equality is promised for equal thread counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net(seed: int = 0, classes: int = 10) -> nn.Module:
    """With batch norm and dropout, whose random numbers must come from (seed, step) too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(32 * 16, classes),
        )


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def accuracy(module: nn.Module, split: str = "selection") -> float:
    module.eval()
    with torch.no_grad():
        return Digits().quality(lambda x: module(torch.from_numpy(x)).numpy(), split).value.value


class Adam(Digits):
    training = {"optimizer": "adamw", "lr": 2e-3}


@pytest.mark.parametrize(
    ("task", "bf16"), [(Digits(), False), (Digits(), True), (Adam(), False)], ids=["float32", "bfloat16", "adamw"]
)
def test_pieces_equal_one_go(task, bf16):
    whole = train.Training(net(), task, 1.5, 7, bf16=bf16, batch=32)
    whole.run_to(1.0)
    first = train.Training(net(), task, 1.5, 7, bf16=bf16, batch=32)
    first.run_to(0.1)
    first.run_to(0.3)  # in the middle of an epoch
    state = first.state()
    torch.rand(100)  # the global generator is nobody's business
    second = train.Training(net(seed=99), task, 1.5, 7, bf16=bf16, batch=32)
    second.load(state)
    assert second.state() == state
    second.run_to(1.0)
    assert same(whole.module, second.module)
    assert whole.state() == second.state()
    other = train.Training(net(), task, 1.5, 8, bf16=bf16, batch=32)
    other.run_to(1.0)
    assert not same(whole.module, other.module)


def test_cycles_end_at_rest_and_survive_a_restart():
    cycles = {0.2: 1.0, 1.0: 0.25}
    whole = training_of(net(), Digits(), 1.5, 7, cycles=cycles)
    rates = []
    whole.pause = lambda: rates.append(whole._share())
    whole.run_to(1.0)
    end = next(iter(whole.ends))
    assert end == round(0.2 * whole.total)
    assert max(rates[end - 1], rates[end]) < 0.2  # down at the rung, and up again
    assert 0.8 < max(rates[:end]) <= 1
    assert 0.2 < max(rates[end:]) <= 0.25
    first, second = (training_of(net(seed=s), Digits(), 1.5, 7, cycles=cycles) for s in (0, 99))
    first.run_to(0.5)  # in the middle of the second cycle
    second.load(first.state())
    second.run_to(1.0)
    assert same(whole.module, second.module)


def test_going_on_without_the_momenta_would_differ():
    whole, cut = training_of(net(), Digits(), 1, 0), training_of(net(), Digits(), 1, 0)
    whole.run_to(0.5)
    cut.run_to(0.5)
    cut.optimizer.state.clear()
    whole.run_to(1.0)
    cut.run_to(1.0)
    assert not same(whole.module, cut.module)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    training_of(net(), Digits(), 0.2, 0).run_to(1.0)
    assert torch.equal(torch.rand(3), expected)


def test_it_learns():
    training = training_of(net(), Digits(), 4, 0)
    before = accuracy(training.module)
    metrics = training.run_to(1.0)
    assert metrics["steps"] == training.total == 4 * math.ceil(1077 / 32)
    assert metrics["images"] == 4 * 1077
    assert 0 < metrics["loss"] < 1.5
    assert before < 0.3
    assert accuracy(training.module) > 0.93
    assert training.run_to(1.0)["steps"] == 0


def test_any_task_will_do():
    training = training_of(net(classes=2), EvenDigits(), 2, 0)
    training.run_to(1.0)
    training.module.eval()
    with torch.no_grad():
        quality = EvenDigits().quality(lambda x: training.module(torch.from_numpy(x)).numpy(), "selection")
    assert quality.value.value > 0.85


def test_the_pause_is_asked_at_every_step():
    asked = []
    training = training_of(net(), Digits(), 1, 0, pause=lambda: asked.append(training.step))
    training.run_to(0.5)
    assert asked == list(range(17))


def test_schedule_rises_and_ends_at_nothing():
    rates = [one_cycle(step, 100) for step in range(100)]
    assert max(rates) <= 1
    assert max(rates) > 0.95
    assert rates[0] < 0.1
    assert rates[-1] < 0.01
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(0 < one_cycle(step, total) <= 1 for total in (1, 2, 3) for step in range(total))


def test_a_tasks_recipe_is_respected():
    training = train.Training(net(), Adam(), 1, 0)
    assert isinstance(training.optimizer, torch.optim.AdamW)
    assert (training.lr, training.batch, training.recipe.decay) == (2e-3, 64, 0.01)
    assert train.Training(net(), Adam(), 1, 0, lr=0.1).lr == 0.1
    training.run_to(1.0)
    assert accuracy(training.module) > 0.5


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"rate": 1.0}, r"task digits: training\.rate: no such setting, there are optimizer, lr"),
        ({"lr": -1.0}, r"training\.lr: Input should be greater than 0"),
        ({"optimizer": "lion"}, r"training\.optimizer: Input should be 'sgd' or 'adamw'"),
        ({"batch": 1}, r"training\.batch: Input should be greater than or equal to 2"),
        ("adamw", r"write a mapping such as"),
    ],
)
def test_a_recipe_that_is_none_is_named(asked, says):
    class Odd(Digits):
        training = asked

    with pytest.raises(UserError, match=says):
        train.Training(net(), Odd(), 1, 0)


def test_a_task_that_counts_is_not_run_through_to_count():
    class Counting(Digits):
        def count(self, split):
            return {"train": 1077}[split]

        def batches(self, *args, **options):
            raise AssertionError("drawn")

    assert train.Training(net(), Counting(), 2, 0).total == train.Training(net(), Digits(), 2, 0).total


class Poisoned(Digits):
    def loss(self, outputs, targets):
        return super().loss(outputs, targets) * float("nan")


class Exploding(Digits):
    def loss(self, outputs, targets):
        return (outputs - outputs.detach()).sum() * float("inf") + outputs.new_ones(())


@pytest.mark.parametrize("task", [Poisoned(), Exploding()], ids=["loss", "gradient"])
def test_what_is_no_number_is_a_failed_trial(task):
    with pytest.raises(TrialFailure, match=r"diverged.*step 0 of"):
        training_of(net(), task, 1, 0).run_to(1.0)


class Short(Digits):
    def batches(self, split, size, *, limit=None, seed=None):
        return super().batches(split, size, limit=64 if seed is not None else limit, seed=seed)


def test_a_task_whose_passes_differ_is_named():
    with pytest.raises(UserError, match=r"task digits: a shuffled pass ended after 2 batches, a plain one gives 34"):
        training_of(net(), Short(), 1, 0).run_to(1.0)


def test_states_of_other_trainings_are_refused():
    state = training_of(net(), Digits(), 1, 0).state()
    with pytest.raises(UserError, match="this training has"):
        training_of(net(), Digits(), 1, 1).load(state)
    with pytest.raises(UserError, match=r"size mismatch for 7\.weight"):
        training_of(net(classes=4), Digits(), 1, 0).load(state)
    with pytest.raises(UserError, match="not readable"):
        training_of(net(), Digits(), 1, 0).load(b"not safetensors at all")


def test_distillation_pulls_towards_the_teacher():
    teacher = net(seed=3)
    training_of(teacher, Digits(), 3, 3).run_to(1.0)
    teacher.eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    inputs = torch.cat([inputs for inputs, _ in Digits().batches("selection", 64)])
    with torch.no_grad():
        wanted = teacher(inputs)
    distances = {}
    for weight in (0.0, 1.0):
        student = training_of(net(), Digits(), 2, 0, teacher=teacher, weight=weight, temperature=2.0)
        student.run_to(1.0)
        student.module.eval()
        with torch.no_grad():
            distances[weight] = float(response_loss(student.module(inputs), wanted, 1.0))
    assert distances[1.0] < 0.7 * distances[0.0]
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_response_loss_is_hintons():
    outputs, taught = torch.randn(6, 4), torch.randn(6, 4)
    for temperature in (1.0, 4.0):
        p, q = (taught / temperature).softmax(1), (outputs / temperature).softmax(1)
        expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
        assert float(response_loss(outputs, taught, temperature)) == pytest.approx(float(expected), rel=1e-5)
    assert float(response_loss(taught, taught, 2.0)) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(TrialFailure, match="teacher"):
        response_loss(outputs, torch.randn(6, 5), 1.0)


def test_distill_decides_its_settings_and_changes_nothing():
    op, module = Distill(), net()
    rules = [Rule(site=".", op="distill", settings={"weight": 0.5, "temperature": 4})]
    receipt = op.decide(module, rules, Digits(), PROFILE)
    assert receipt.entries[0].facts == {"weight": 0.5, "temperature": 4.0, "kind": "response"}
    assert op.enact(module, receipt) is module
    assert op.decide(module, [], Digits(), PROFILE).entries == ()
    with pytest.raises(UserError, match=r"weight 1\.5"):
        op.decide(module, [Rule(site=".", op="distill", settings={"weight": 1.5})], Digits(), PROFILE)
    with pytest.raises(UserError, match="needs a teacher"):
        training_of(module, Digits(), 1, 0, weight=0.5)


def test_batchnorm_gets_the_populations_statistics():
    module = net()
    module[1].running_mean.fill_(100.0)
    module.train()
    module[5].eval()
    weights = [parameter.clone() for parameter in module.parameters()]
    asked = []
    reestimate_batchnorm(module, Digits(), 4, pause=lambda: asked.append(1))
    assert len(asked) == 4
    assert module[1].momentum == 0.1
    assert module[1].training
    assert not module[5].training
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))
    with torch.no_grad():
        batches = [module[0](inputs) for inputs, _ in islice(Digits().batches("train", 64, seed=0), 4)]
    expected = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(module[1].running_mean, expected, atol=1e-6)
    variances = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    assert torch.allclose(module[1].running_var, variances, rtol=1e-4)


def test_without_batchnorm_no_batch_is_drawn():
    class Silent(Digits):
        def batches(self, *args, **options):
            raise AssertionError("drawn")

    reestimate_batchnorm(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Silent(), 4)


def test_whether_bf16_pays_is_tried_on_a_copy():
    module, task = ConvNet(arch={"resolution": 8, "width.0": 16, "width.1": 16, "width.2": 16}).build({}), Digits()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert bf16_faster(module, task) in (True, False)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_bf16_is_not_tried_where_the_processor_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert bf16_faster(torch.nn.Identity(), Digits()) is False


def test_a_network_without_bf16_kernels_is_trained_in_float32(monkeypatch):
    class Special(nn.Sequential):
        def forward(self, images):
            return torch.special.erfcx(super().forward(images))  # torch 2.13 has it for float32 and float64

    monkeypatch.setattr(train, "bf16_pays", lambda: True)
    network = Special(nn.Flatten(), nn.Linear(64, 10))
    assert not bf16_faster(network, Digits())
    training = train.Training(network, Digits(), 1.0, 0)
    assert not training.bf16
    assert training.run_to(2 / training.total)["steps"] == 2
    assert train.Training(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Digits(), 1.0, 0).bf16


def test_statistics_are_the_weights_own_where_a_cycle_has_ended():
    made = training_of(ConvNet().build({}), Digits(), 20, 0, cycles={0.1: 1.0, 0.5: 1.0})
    assert not made.rested
    made.ends = {10: 1.0, 70: 1.0, made.total: 1.0}
    for step, rested in ((9, False), (10, False), (69, False), (70, True), (71, False), (made.total, True)):
        made.step = step  # ten steps are too few to forget what was before
        assert made.rested == rested, step


def test_seconds_are_those_of_the_steps_and_not_of_passing_over_what_is_behind():
    """Else a training that goes on in the middle of an epoch looks slower than it is, and gets less of it."""

    class Slow(Digits):
        def batches(self, *args, **options):
            for one in super().batches(*args, **options):
                time.sleep(0.02)
                yield one

    made = train.Training(net(), Slow(), epochs=2, seed=0, batch=32)
    behind = made.steps_per_epoch - 2
    made.step = behind
    began = time.perf_counter()
    found = made.run_to((behind + 1) / made.total)
    assert found["steps"] == 1
    assert time.perf_counter() - began > behind * 0.02 > found["seconds"]
