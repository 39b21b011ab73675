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
from autocompress.tasks.intervals import wilson
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
