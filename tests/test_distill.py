"""Distillation: each kind is zero for the teacher itself and pulls a student to it; lessons leave nothing behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress import export, taught
from autocompress.distill import (
    KINDS,
    Distill,
    Distillation,
    attention_loss,
    feature_loss,
    pooled,
    relation_loss,
    response_loss,
    responses_loss,
)
from autocompress.lesson import Lesson, evenly, shared_places, survey
from autocompress.models.convnet import ConvNet
from autocompress.ops.prune import Prune
from autocompress.pipeline import distillation
from autocompress.tasks import InputSpec
from autocompress.tasks.digits import Digits
from autocompress.testing import check_op
from autocompress.train import Training
from autocompress.types import Policy, Profile, Rule, TrialFailure, UserError

BUILDER = ConvNet(arch={"resolution": 8, "width.0": 12, "width.1": 16, "width.2": 24})
LEAVE = Profile(name="any")


@pytest.fixture(autouse=True)
def one_thread():
    """Bit equality is promised for equal thread counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def built(seed: int = 0, arch: dict | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDER.build(arch or {})


def narrow(seed: int = 0) -> nn.Module:
    """The parent with half of its channels."""
    module = built(seed)
    rules = [Rule(site=".", op="prune", settings={"ratio": 0.5})]
    return Prune().enact(module, Prune().decide(module, rules, Digits(), LEAVE))


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


class Plain(Digits):
    """Digits as they are: a pass is shuffled, not augmented."""

    augments = False

    def __init__(self, most: int = 256) -> None:
        self.most = most

    def batches(self, split, size, *, limit=None, seed=None):
        limit = min(self.most, limit or self.most)
        batches = list(super().batches(split, limit, limit=limit))
        inputs, targets = batches[0]
        order = torch.arange(len(inputs))
        if seed is not None:
            order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        for chosen in order.split(size):
            yield inputs[chosen], targets[chosen]


class Few(Digits):
    """Fewer batches of the augmented digits."""

    def batches(self, split, size, *, limit=None, seed=None):
        yield from super().batches(split, size, limit=limit or 256, seed=seed)


# --- losses ---------------------------------------------------------------------------------------------------------


def test_losses_are_zero_for_the_teacher_itself_and_positive_else():
    torch.manual_seed(0)
    a, b = torch.randn(8, 6, 4, 4), torch.randn(8, 6, 4, 4)
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    pairs = {
        "response": (response_loss(flat_a, flat_a, 2.0), response_loss(flat_a, flat_b, 2.0)),
        "relation": (relation_loss(flat_a, flat_a), relation_loss(flat_a, flat_b)),
        "attention": (attention_loss(a, a, 1), attention_loss(a, b, 1)),
        "features": (feature_loss(a, a), feature_loss(a, b)),
    }
    for kind, (same, other) in pairs.items():
        assert float(same) == pytest.approx(0, abs=1e-5), kind
        assert float(other) > 0.01, kind


def test_responses_as_hinton_writes_them():
    torch.manual_seed(0)
    mine, theirs = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (theirs / 3).softmax(1), (mine / 3).softmax(1)
    assert float(response_loss(mine, theirs, 3.0)) == pytest.approx(
        float(9 * (p * (p / q).log()).sum(1).mean()), rel=1e-5
    )
    maps = response_loss(mine.T.reshape(1, 7, 5, 1), theirs.T.reshape(1, 7, 5, 1), 3.0)  # classes are the second axis
    assert float(maps) == pytest.approx(float(response_loss(mine, theirs, 3.0)), rel=1e-5)
    tokens = response_loss(mine[None], theirs[None], 3.0)
    assert float(tokens) == pytest.approx(float(response_loss(mine, theirs, 3.0)), rel=1e-5)


def test_numbers_are_compared_by_their_squares():
    mine, theirs = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    assert float(response_loss(mine, theirs, 4.0)) == 2.0
    assert float(response_loss(mine[:, None], theirs[:, None], 4.0)) == 2.0


def test_several_outputs_count_where_shapes_agree():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    found = responses_loss((a, torch.zeros(4, 9), a), (b, torch.zeros(4, 8), b), 1.0)
    assert float(found) == pytest.approx(2 * float(response_loss(a, b, 1.0)))
    with pytest.raises(TrialFailure, match=r"outputs \(4, 3\) but the teacher's are \(4, 2\)"):
        responses_loss((a,), (torch.zeros(4, 2),), 1.0)


def test_relations_as_park_writes_them():
    """By loops over pairs and triplets; widths differ."""
    torch.manual_seed(0)
    mine, theirs = torch.randn(5, 3), torch.randn(5, 6)

    def distances(rows):
        found = torch.tensor([[float((a - b).norm()) for b in rows] for a in rows])
        return found / (found.sum() / 20)

    def angles(rows):
        def cosine(i, j, k):
            a, b = rows[i] - rows[j], rows[k] - rows[j]
            return float(a @ b / (a.norm() * b.norm())) if j not in (i, k) else 0.0

        return torch.tensor([[[cosine(i, j, k) for k in range(5)] for i in range(5)] for j in range(5)])

    smooth = nn.functional.smooth_l1_loss
    wanted = smooth(distances(mine), distances(theirs)) + 2 * smooth(angles(mine), angles(theirs))
    assert float(relation_loss(mine, theirs)) == pytest.approx(25 * float(wanted), rel=1e-4)


def test_relations_have_a_gradient_even_among_equal_samples():
    mine = torch.ones(6, 4, requires_grad=True)
    relation_loss(mine, torch.randn(6, 4)).backward()
    assert mine.grad is not None
    assert mine.grad.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 10), st.integers(1, 9))
def test_attention_sees_where_and_not_how_much(scale, channels):
    torch.manual_seed(channels)
    one = torch.rand(3, channels, 4, 5)
    assert float(attention_loss(scale * one, one, 1)) == pytest.approx(0, abs=1e-5)
    assert float(attention_loss(one.repeat(1, 2, 1, 1), one, 1)) == pytest.approx(0, abs=1e-5)
    blank = torch.zeros(3, channels, 4, 5)
    assert float(attention_loss(one, blank, 1)) == pytest.approx(0.5, rel=1e-4)


def test_maps_of_another_size_are_pooled():
    big, small = torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4)
    assert pooled(big, (4, 4)).shape == (2, 3, 4, 4)
    assert attention_loss(small, big, 1).isfinite()
    assert pooled(torch.rand(2, 3, 8), (4,)).shape == (2, 3, 4)


# --- places ---------------------------------------------------------------------------------------------------------


def places(teacher: nn.Module, student: nn.Module, *inputs: torch.Tensor, conv1d: bool = False) -> tuple[str, ...]:
    return shared_places(teacher, survey(teacher, inputs), survey(student, inputs), flat=False, conv1d=conv1d)


def test_images_are_watched_where_stages_end():
    x = torch.zeros(2, 1, 8, 8)
    assert places(built(), built(arch={"depth.1": 1, "kind.2": "separable"}), x) == ("stages.0", "stages.1", "stages.2")
    deep = nn.Sequential(*(nn.Conv2d(1, 1, 3, 2, 1) for _ in range(7)))
    assert places(deep, deep, torch.zeros(1, 1, 64, 64)) == ("1", "2", "3", "4")  # 1 x 1 is no map


class Tokens(nn.Module):
    def __init__(self, layers: int, wide: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, wide), nn.GELU(), nn.Linear(wide, 16)) for _ in range(layers)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))


def test_tokens_are_watched_at_blocks_evenly():
    x = torch.ones(2, 7, dtype=torch.int64)
    assert places(Tokens(6), Tokens(6, wide=4), x) == ("layers.0", "layers.2", "layers.3", "layers.5")
    assert places(Tokens(3), Tokens(2), x) == ("layers.0", "layers.1")
    assert evenly("abcdefgh") == ("b", "d", "f", "h")


def test_what_is_called_twice_or_gives_no_tensor_is_no_place():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.out = nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.act(self.out(self.act(self.conv(x))))

    assert places(Twice(), Twice(), torch.zeros(1, 1, 8, 8)) == ("out",)


def test_channels_are_found_where_they_are():
    class Last(nn.Module):
        def __init__(self, wide: int) -> None:
            super().__init__()
            self.stem, self.up = nn.Linear(1, 4), nn.Linear(4, wide)
            self.down, self.head = nn.Linear(wide, 4), nn.Linear(4, 2)

        def forward(self, x):  # (n, 1, h, w) to (n, h, w, c)
            return self.head(self.down(self.up(self.stem(x.permute(0, 2, 3, 1)))).mean((1, 2)))

    x = torch.randn(3, 1, 5, 5)
    lesson = Lesson(Distillation(weight=1, kind="features"), Last(8), Last(6), (x,))
    assert lesson.places == ("down",)
    sequence = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 9, 3, 2), nn.Flatten(), nn.Linear(27, 2))
    other = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 9, 3, 2), nn.Flatten(), nn.Linear(27, 2))
    x = torch.randn(3, 3, 10)
    lesson = Lesson(Distillation(weight=1, kind="features"), sequence, other, (x,))
    assert lesson.places == ("1", "2")
    assert [tuple(p.shape) for p in lesson.parameters()] == [(8, 4), (8,)]
    lesson.open()
    outputs = other(x)
    lesson.listen((x,))
    assert lesson.loss(outputs).isfinite()


def test_a_network_without_places_is_a_failed_trial_in_one_line():
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 10))
    x = (torch.zeros(2, 1, 8, 8),)
    with pytest.raises(TrialFailure, match="by attention: no layer with spatial outputs has one name"):
        Lesson(Distillation(weight=1, kind="attention"), mlp, copy.deepcopy(mlp), x)
    assert Lesson(Distillation(weight=1, kind="features"), mlp, copy.deepcopy(mlp), x).places == ("0", "1", "2")


# --- lessons --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_lesson_watches_only_while_it_is_open(kind):
    teacher, student = built(1).eval(), narrow()
    x = torch.rand(4, 1, 8, 8)
    lesson = Lesson(Distillation(weight=0.5, kind=kind), teacher, student, (x,))
    assert hooks(teacher) == hooks(student) == 0
    lesson.open()
    outputs = student(x)
    lesson.listen((x,))
    loss = lesson.loss(outputs)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    lesson.close()
    assert hooks(teacher) == hooks(student) == 0
    assert not lesson._mine
    assert not lesson._theirs


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_itself_has_nothing_to_learn(kind):
    teacher = built(1).eval()
    student, x = copy.deepcopy(teacher), torch.rand(6, 1, 8, 8)
    lesson = Lesson(Distillation(weight=0.5, kind=kind), teacher, student, (x,))
    lesson.open()
    outputs = student(x)
    lesson.listen((x,))
    assert float(lesson.loss(outputs).detach()) == pytest.approx(0, abs=1e-3)
    assert not list(lesson.parameters())  # equal widths need no adapter


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_each_kind_brings_the_student_nearer(kind):
    teacher = built(1)
    Training(teacher, Few(), 4, 1).run_to(1.0)
    teacher.eval()
    x = torch.cat([inputs for inputs, _ in Digits().batches("selection", 120)])

    def distance(training: Training) -> float:
        lesson = Lesson(Distillation(weight=1, kind=kind), teacher, training.module.eval(), (x,))
        if training.lesson is not None:
            lesson.adapters = training.lesson.adapters
        lesson.open()
        with torch.no_grad():
            outputs = training.module(x)
            lesson.listen((x,))
            found = float(lesson.loss(outputs))
        lesson.close()
        return found

    training = Training(narrow(), Few(), 8, 0, teacher=teacher, weight=0.9, kind=kind)
    before = distance(training)
    training.run_to(1.0)
    assert distance(training) < 0.7 * before
    assert hooks(training.module) == hooks(teacher) == 0
    names = set(training.module.state_dict())
    assert names == set(narrow().state_dict())
    model = export.compose(export.export(training.module, Digits.input, opset=17))
    assert export.parity(training.module, model, x[:4].numpy()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", [Few(), Plain()], ids=["augmented", "plain"])
def test_a_training_in_pieces_equals_one_in_one_go(kind, task):
    teacher = built(1).eval()

    def fresh() -> Training:
        return Training(narrow(), task, 2, 5, teacher=copy.deepcopy(teacher), weight=0.5, temperature=2.0, kind=kind)

    whole, first, second = fresh(), fresh(), fresh()
    whole.run_to(1.0)
    first.run_to(0.3)
    second.load(first.state())
    second.run_to(1.0)
    assert second.state() == whole.state()
    if kind == "features":
        assert any(name.startswith("lesson:") for name, _ in whole._learning())
        with pytest.raises(UserError, match="training state"):
            Training(narrow(), task, 2, 5, teacher=teacher, weight=0.5).load(whole.state()) or fresh().load(
                Training(narrow(), task, 2, 5).state()
            )


def test_responses_take_a_share_of_the_loss_and_hints_are_added():
    x = (torch.zeros(2, 1, 8, 8),)
    left = [Lesson(Distillation(weight=0.75, kind=kind), built(1), built(), x).left for kind in KINDS]
    assert left == [0.25, 1, 1, 1, 0.25]


def test_adapters_do_not_depend_on_the_random_numbers_before():
    found = []
    for drawn in (0, 3):
        torch.rand(drawn)
        training = Training(narrow(), Few(), 1, 5, teacher=built(1), weight=0.5, kind="features")
        found.append(training.state())
    assert found[0] == found[1]


def test_a_training_that_breaks_off_leaves_no_hook():
    class Poisoned(Few):
        def loss(self, outputs, targets):
            return super().loss(outputs, targets) * math.nan

    training = Training(narrow(), Poisoned(), 1, 0, teacher=built(1), weight=0.5, kind="attention")
    with pytest.raises(TrialFailure, match="diverged"):
        training.run_to(1.0)
    assert training.lesson is not None
    assert hooks(training.module) == hooks(training.lesson.teacher) == 0


def test_a_task_may_judge_responses_itself():
    class Judge(Few):
        def distillation(self, outputs, taught, temperature):
            asked.append(temperature)
            return (outputs - taught).abs().mean()

    asked: list[float] = []
    Training(narrow(), Judge(), 0.5, 0, teacher=built(1), weight=0.5, temperature=3.0).run_to(1.0)
    assert set(asked) == {3.0}


# --- answers that are kept ------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A teacher that counts its samples."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.asked = module, 0

    def forward(self, x):
        self.asked += len(x)
        return self.module(x)


def test_answers_are_kept_where_batches_are_not_augmented_and_shared_by_trials():
    task, teacher = Plain(), Counted(built(1)).eval()
    for _ in range(2):
        Training(narrow(), task, 3, 0, teacher=teacher, weight=0.5).run_to(1.0)
    assert teacher.asked == 256
    with torch.no_grad():
        next(teacher.parameters()).mul_(2)
    Training(narrow(), task, 3, 0, teacher=teacher, weight=0.5).run_to(1.0)
    assert teacher.asked == 2 * 256  # another teacher now


@pytest.mark.parametrize(("task", "epochs"), [(Few(), 3), (Plain(), 1)], ids=["augmented", "once"])
def test_a_teacher_is_asked_each_time_where_nothing_would_be_gained(task, epochs):
    teacher = Counted(built(1)).eval()
    Training(narrow(), task, epochs, 0, teacher=teacher, weight=0.5).run_to(1.0)
    assert teacher.asked == epochs * 256


def test_kept_answers_are_the_teachers(monkeypatch):
    task, teacher = Plain(), built(1).eval()
    free = {"bf16": False, "prepare": lambda x: (x,), "pause": lambda: None}
    answers = taught.answers_of(teacher, task, 32, **free)
    assert answers is not None
    for inputs, _ in task.batches("train", 48, seed=3):
        with torch.no_grad():
            torch.testing.assert_close(answers.of((inputs,)), teacher(inputs), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="says `augments = False`"):
        answers.of((torch.rand(2, 1, 8, 8),))
    monkeypatch.setattr(taught, "LIMIT", 100)
    assert taught.answers_of(teacher, task, 16, **free) is None


def test_several_inputs_and_outputs_are_kept_as_they_are():
    class Two(nn.Module):
        def forward(self, a, b):
            return a.sum(1, keepdim=True) + b, b.flatten(1)

    class Pairs:
        name, metric, input = "pairs", "accuracy", InputSpec(shape=(3,), others=(InputSpec(name="b", shape=(2,)),))

        def batches(self, split, size, *, limit=None, seed=None):
            generator = torch.Generator().manual_seed(0)
            for _ in range(2):
                yield (torch.rand(4, 3, generator=generator), torch.rand(4, 2, generator=generator)), torch.zeros(4)

    free = {"bf16": False, "prepare": tuple, "pause": lambda: None}
    answers = taught.answers_of(Two(), Pairs(), 4, **free)
    inputs = (
        torch.cat([b[0][0] for b in Pairs().batches("train", 4)]),
        torch.cat([b[0][1] for b in Pairs().batches("train", 4)]),
    )
    order = torch.randperm(8)
    shuffled = tuple(one[order] for one in inputs)
    for mine, theirs in zip(answers.of(shuffled), Two()(*shuffled), strict=True):
        assert torch.equal(mine, theirs)


# --- the op ---------------------------------------------------------------------------------------------------------


def test_the_op_keeps_its_contract_and_the_policy_is_read():
    rules = [Rule(site=".", op="distill", settings={"weight": 0.5, "kind": "relation"})]
    receipt = check_op(Distill(), built(), rules, Digits(), LEAVE)
    assert receipt.entries[0].facts == {"weight": 0.5, "temperature": 1.0, "kind": "relation"}
    assert list(Distill.params.items()) == [("weight", 0.0), ("temperature", 1.0), ("kind", "response")]
    assert distillation(Policy(rules=tuple(rules))) == Distillation(weight=0.5, kind="relation")
    assert distillation(Policy()) == Distillation()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"weight": 1.5}, "weight 1.5: .*less than or equal to 1"),
        ({"temperature": 0}, "temperature 0: .*greater than 0"),
        ({"kind": "osmosis"}, "kind 'osmosis': .*'response', 'relation', 'attention', 'features' or 'both'"),
        ({"kinds": "x"}, "kinds 'x': no such setting, there are weight, temperature, kind"),
    ],
)
def test_settings_that_make_no_sense_are_the_users_error(asked, says):
    with pytest.raises(UserError, match=says):
        Distillation.of(asked)
