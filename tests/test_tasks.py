"""Tasks: fixed splits, deterministic augmentation, honest intervals."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from autocompress.tasks import Task
from autocompress.tasks.digits import Digits, augment, read_digits
from autocompress.tasks.intervals import mean_of, paired, wilson
from autocompress.tasks.judge import judged
from autocompress.types import UserError
from examples.my_task import EvenDigits


def everything(task: Task, split: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*task.batches(split, 64, **options), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def test_splits_are_disjoint_complete_and_always_the_same():
    task = Digits()
    parts = {split: everything(task, split) for split in ("train", "selection", "test")}
    assert {split: len(targets) for split, (_, targets) in parts.items()} == {
        "train": 1077,
        "selection": 360,
        "test": 360,
    }
    labels = torch.cat([targets for _, targets in parts.values()])
    assert len(labels) == 1797
    # changing the split would make every stored result incomparable
    assert hashlib.sha256(labels.numpy().astype(np.uint8).tobytes()).hexdigest().startswith(LABELS)
    inputs, targets = everything(task, "calibration")
    assert torch.equal(inputs, parts["train"][0][:200])
    assert torch.equal(targets, parts["train"][1][:200])
    whole = torch.cat([inputs for inputs, _ in parts.values()])
    assert whole.shape[1:] == (1, 8, 8) == task.input.shape
    assert whole.dtype == torch.float32
    assert float(whole.min()) == 0.0
    assert float(whole.max()) == 1.0


LABELS = "06bff8c997abbcaf"


def test_seeded_passes_are_shuffled_augmented_and_repeatable():
    task = Digits()
    plain, once, again, other = (everything(task, "train", seed=seed) for seed in (None, 1, 1, 2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert not torch.equal(once[1], other[1])
    assert torch.equal(once[1].sort().values, plain[1].sort().values)  # every sample once
    assert abs(float(once[0].mean() - plain[0].mean())) < 0.02


def test_limit_counts_samples():
    sizes = [len(targets) for _, targets in Digits().batches("train", 64, limit=100)]
    assert sizes == [64, 36]


def test_augmentation_moves_pixels_but_little():
    images, _ = next(Digits().batches("train", 256))
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    distance = (moved - images).flatten(1).norm(dim=1)
    stranger = (images[torch.randperm(256, generator=torch.Generator().manual_seed(1))] - images).flatten(1).norm(dim=1)
    assert 0.3 < float(distance.mean()) < 0.5 * float(stranger.mean())


def test_unknown_split_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"'tset'.*train, calibration, selection, test"):
        next(Digits().batches("tset", 8))


def test_quality_of_a_perfect_and_a_constant_answer():
    task = Digits()
    inputs, targets = everything(task, "selection")
    known = {image.numpy().tobytes(): int(label) for image, label in zip(inputs, targets, strict=True)}
    perfect = task.quality(lambda x: np.eye(10)[[known[image.tobytes()] for image in x]], "selection")
    assert (perfect.value.value, perfect.value.high, perfect.samples) == (1.0, 1.0, 360)
    assert 0.985 < perfect.value.low < 0.995
    constant = task.quality(lambda x: np.eye(10)[[0] * len(x)], "selection")
    assert constant.value.value == pytest.approx(float((targets == 0).float().mean()))


def test_loss_is_smoothed():
    sure = torch.full((1, 10), -50.0)
    sure[0, 3] = 50.0
    assert float(Digits().loss(sure, torch.tensor([3]))) == pytest.approx(0.1 * 0.9 * 100)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_shrinks(counts):
    successes, samples = counts
    interval = wilson(successes, samples)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    longer = wilson(successes * 4, samples * 4)
    assert longer.high - longer.low < interval.high - interval.low
    mirrored = wilson(samples - successes, samples)
    assert mirrored.low == pytest.approx(1 - interval.high)


def test_wilson_known_values():
    # Newcombe 1998, table I, method 3: 81 of 263 and 0 of 20
    assert (wilson(81, 263).low, wilson(81, 263).high) == (
        pytest.approx(0.2553, abs=5e-5),
        pytest.approx(0.3662, abs=5e-5),
    )
    assert (wilson(0, 20).low, wilson(0, 20).high) == (0.0, pytest.approx(0.1611, abs=5e-5))
    with pytest.raises(ValueError, match="not a share"):
        wilson(1, 0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_paired_holds_the_difference_mirrors_and_shrinks(pairs):
    before, after = (np.array(one) for one in zip(*pairs, strict=True))
    lost = paired(before, after)
    assert lost.value == pytest.approx(before.mean() - after.mean())
    assert lost.low <= lost.value <= lost.high
    assert lost.low < lost.high  # also where no two answers differ
    won = paired(after, before)
    assert (won.low, won.high) == (pytest.approx(-lost.high), pytest.approx(-lost.low))
    longer = paired(np.tile(before, 4), np.tile(after, 4))
    assert longer.high - longer.low < lost.high - lost.low


def test_paired_known_values_and_what_cannot_be_paired():
    # airways before and after a transplantation, of 21 children (Fagerland et al. 2014, Statistics in Medicine
    # 33:2850, gives -0.517 to -0.026)
    before, after = (
        np.repeat([True, True, False, False], [1, 1, 7, 12]),
        np.repeat([True, False, True, False], [1, 1, 7, 12]),
    )
    lost = paired(before, after)
    assert (lost.value, lost.low, lost.high) == pytest.approx((-6 / 21, -0.517, -0.026), abs=5e-4)
    # no two differ: z^2 / (n + z^2), as Wilson has it
    same = paired(before, before)
    assert (same.low, same.high) == (pytest.approx(-same.high), pytest.approx(1.96**2 / (21 + 1.96**2), abs=1e-4))
    numbers = paired(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    assert numbers.high == pytest.approx(4 / 3 + 1.96 * (7 / 9) ** 0.5, abs=1e-3)
    for other in (after[:-1], after[:0], after[None]):
        with pytest.raises(ValueError, match="not pairs"):
            paired(before if len(other) else other, other)


@pytest.mark.parametrize(("worse", "better"), [(0.02, 0.0), (0.03, 0.02), (0.005, 0.005), (0.2, 0.1)])
def test_paired_covers_what_is_lost(worse, better):
    draws = np.random.default_rng(0).random((400, 360))
    before, after = draws < 1 - better, (draws > worse)
    found = [paired(*pair) for pair in zip(before, after, strict=True)]
    held = np.mean([one.low <= worse - better <= one.high for one in found])
    assert 0.93 <= held <= 0.99


def test_a_file_is_asked_once_for_quality_and_scores():
    asked: list[int] = []

    def predict(inputs):
        asked.append(len(inputs))
        return np.eye(10)[np.arange(len(inputs)) % 10]

    quality, scores = judged(Digits(), predict, "test")
    assert sum(asked) == quality.samples == len(scores)
    assert mean_of(scores, "accuracy", "test") == quality

    def even(inputs):
        return np.eye(2)[np.arange(len(inputs)) % 2]

    assert judged(EvenDigits(), even, "test") == (EvenDigits().quality(even, "test"), None)


def test_a_task_that_measures_otherwise_than_the_one_it_extends_has_no_scores():
    class Lenient(Digits):
        def quality(self, predict, split):
            return mean_of(self.scores(predict, split) | (np.arange(360) % 2 == 0), self.metric, split)

    class Piecemeal(Digits):
        def scores(self, predict, split):
            asked = (predict(one.numpy()[None]) for inputs, _ in self.batches(split, 64) for one in inputs)
            targets = np.concatenate([targets.numpy() for _, targets in self.batches(split, 64)])
            return np.concatenate(list(asked)).argmax(axis=1) == targets

        def quality(self, predict, split):
            return mean_of(super().scores(predict, split), self.metric, split)

    def predict(inputs):
        return np.eye(10)[[3] * len(inputs)]

    quality, scores = judged(Lenient(), predict, "test")
    assert quality.value.value > 0.5
    assert scores is None
    quality, scores = judged(Piecemeal(), predict, "test")  # asks again, in batches of its own
    assert scores.mean() == pytest.approx(quality.value.value)


def test_quality_is_the_mean_of_scores():
    right = np.array([True, False, True, True])
    assert mean_of(right, "accuracy", "test").value == wilson(3, 4)
    found = mean_of(np.array([0.5, 1.0, 0.75]), "iou", "test")
    assert (found.value.value, found.samples, found.metric) == (0.75, 3, "iou")
    assert (
        found.value.high - 0.75
        == pytest.approx(0.75 - found.value.low)
        == pytest.approx(1.96 * 0.25 / 3**0.5, abs=1e-4)
    )
    with pytest.raises(ValueError, match="one sample or more"):
        mean_of(right[:0], "accuracy", "test")


@pytest.mark.parametrize("task", [Digits(), EvenDigits()], ids=lambda task: task.name)
def test_keeps_the_contract(task):
    assert isinstance(task, Task)
    inputs, targets = next(task.batches("train", 16, seed=3))
    assert inputs.shape == (16, *task.input.shape)
    assert inputs.dtype == torch.float32
    outputs = torch.zeros(16, len(task.input.labels), requires_grad=True)
    task.loss(outputs, targets).backward()
    assert torch.isfinite(outputs.grad).all()
    quality = task.quality(lambda x: x.reshape(len(x), -1)[:, : len(task.input.labels)], "selection")
    assert quality.value.low <= quality.value.value <= quality.value.high
    with pytest.raises(UserError):
        next(task.batches("no such split", 4))


def test_the_digits_are_scikit_learns():
    images, labels = read_digits()
    wanted, digits = load_digits(return_X_y=True)
    assert (images == wanted).all()
    assert (labels == digits).all()
