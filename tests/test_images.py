"""Task images: every source gives the same samples, splits never meet, whatever is wrong is named with its file."""

import gzip
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from autocompress import registry
from autocompress.models.trace import examples
from autocompress.parts import make_task
from autocompress.tasks.arrays import npz
from autocompress.tasks.frame import Frame, mirrored, shifted
from autocompress.tasks.images import Images
from autocompress.tasks.splits import cut
from autocompress.testing import check_task
from autocompress.train import Training
from autocompress.types import UserError

CLASSES = ("circle", "cross", "dot")


def pixels(count: int, seed: int, size: int = 12, channels: int = 3) -> np.ndarray:
    """No two images alike."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return np.arange(count) * 3 // count  # sorted by class, as files often are


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "set.npz"
    save(path)
    return path


def save(path: Path, **arrays) -> None:
    usual = {"x_train": pixels(90, 0), "y_train": labels(90), "x_test": pixels(30, 1), "y_test": labels(30)}
    np.savez(path, **{name: array for name, array in (usual | arrays).items() if array is not None})


def folder(root: Path, parts: dict[str, int], size: int = 12, suffix: str = "png") -> Path:
    for seed, (part, count) in enumerate(parts.items()):
        images, classes = pixels(count, seed, size), labels(count)
        for number, (image, label) in enumerate(zip(images, classes, strict=True)):
            path = root / part / CLASSES[label] / f"{number:03}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def everything(task, split: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*task.batches(split, 7, **options), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def raw(task, split: str) -> set[bytes]:
    """The stored bytes of a split's images (made with mean 0 and std 1)."""
    images, _ = everything(task, split)
    return {(image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes() for image in images}


# --- sources ------------------------------------------------------------------------------------------------------


def test_an_npz_keeps_the_contract_and_its_pixels(file: Path):
    task = Images(file, mean=0, std=1)
    check_task(task)
    assert task.input.shape == (3, 12, 12)
    assert task.input.labels == ("0", "1", "2")
    assert task.input.normalisation == "(pixel / 255 - 0) / 1, RGB"
    assert {split: task.count(split) for split in ("train", "calibration", "selection", "test")} == {
        "train": 81,
        "calibration": 81,
        "selection": 9,
        "test": 30,
    }
    assert raw(task, "test") == {image.tobytes() for image in pixels(30, 1)}
    assert raw(task, "train") | raw(task, "selection") == {image.tobytes() for image in pixels(90, 0)}
    assert everything(task, "selection")[1].bincount().tolist() == [3, 3, 3]
    assert everything(task, "train", limit=30)[1].unique().tolist() == [0, 1, 2]  # though the file is sorted


def test_normalisation_is_the_usual_one_and_can_be_given(file: Path):
    stored = torch.from_numpy(pixels(30, 1)).permute(0, 3, 1, 2) / 255.0
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = (stored - mean[:, None, None]) / std[:, None, None]
    found, _ = everything(Images(file), "test")
    order = np.random.RandomState(0).permutation(30)
    torch.testing.assert_close(found, wanted[order], atol=2e-6, rtol=1e-5)
    assert found[:7].is_contiguous(memory_format=torch.channels_last)
    plain, _ = everything(Images(file, mean=0.0, std=1 / 255), "test")  # raw 0 to 255
    torch.testing.assert_close(plain, stored[order] * 255, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "shape"),
    [
        ({"x_train": pixels(90, 0, channels=1)[..., 0], "x_test": pixels(30, 1, channels=1)[..., 0]}, (1, 12, 12)),
        ({"x_train": pixels(90, 0).transpose(0, 3, 1, 2), "x_test": pixels(30, 1).transpose(0, 3, 1, 2)}, (3, 12, 12)),
        ({"y_train": labels(90)[:, None].astype(np.uint8)}, (3, 12, 12)),
        ({"x_train": pixels(90, 0) / np.float32(9), "x_test": pixels(30, 1) / np.float32(9)}, (3, 12, 12)),
    ],
    ids=["grey", "channels first", "labels as a column", "float32"],
)
def test_the_usual_layouts_of_arrays_are_understood(tmp_path: Path, arrays: dict, shape: tuple[int, ...]):
    save(tmp_path / "x.npz", **arrays)
    task = Images(tmp_path / "x.npz", mean=0, std=1)
    assert task.input.shape == shape
    check_task(task)
    if "x_train" in arrays and arrays["x_train"].dtype == np.uint8:
        flat = {np.ascontiguousarray(image).tobytes() for image in (pixels(30, 1, channels=shape[0]),)[0]}
        assert raw(task, "test") == flat


def test_medmnist_names_and_a_part_to_select_by(tmp_path: Path):
    parts = {"train": (90, 0), "val": (20, 1), "test": (30, 2)}
    arrays = {f"{part}_images": pixels(*rest) for part, rest in parts.items()}
    arrays |= {f"{part}_labels": labels(count)[:, None] for part, (count, _) in parts.items()}
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    task = Images(tmp_path / "m.npz", mean=0, std=1)
    assert [task.count(split) for split in ("train", "selection", "test")] == [90, 20, 30]
    assert raw(task, "selection") == {image.tobytes() for image in pixels(20, 1)}


def test_grey_images_feed_a_network_of_three_channels(tmp_path: Path):
    save(tmp_path / "g.npz", x_train=pixels(90, 0, channels=1), x_test=pixels(30, 1, channels=1))
    inputs, _ = everything(Images(tmp_path / "g.npz", channels=3, mean=0, std=1), "test")
    assert inputs.shape[1] == 3
    assert torch.equal(inputs[:, 0], inputs[:, 2])


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_idx_files_are_mnists(tmp_path: Path, zipped: str):
    for part, count, seed in (("train", 60, 0), ("t10k", 30, 1)):
        idx(tmp_path / f"{part}-images-idx3-ubyte{zipped}", pixels(count, seed, channels=1)[..., 0])
        idx(tmp_path / f"{part}-labels-idx1-ubyte{zipped}", labels(count))
    task = Images(tmp_path, mean=0, std=1)
    check_task(task)
    assert task.input.shape == (1, 12, 12)
    assert raw(task, "test") == {image.tobytes() for image in pixels(30, 1, channels=1)}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_folder_of_files_gives_what_an_npz_gives(tmp_path: Path, file: Path, threads: int):
    root = folder(tmp_path / "root", {"train": 90, "val": 30})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        files, arrays = Images(root, mean=0, std=1), Images(file, mean=0, std=1)
        check_task(files)
        for split in ("train", "selection", "test"):
            assert all(map(torch.equal, everything(files, split), everything(arrays, split)))
        assert files.input.labels == CLASSES
    finally:
        torch.set_num_threads(before)


def test_a_folder_of_classes_alone_is_cut_in_three(tmp_path: Path):
    root = folder(tmp_path, {".": 60})
    task = Images(root, mean=0, std=1)
    check_task(task)
    assert [task.count(split) for split in ("train", "selection", "test")] == [49, 5, 6]


def test_torchvisions_data_sets_with_arrays_and_without(tmp_path: Path):
    files = tmp_path / "MNIST" / "raw"
    files.mkdir(parents=True)
    for part, count, seed in (("train", 60, 0), ("t10k", 30, 1)):
        idx(files / f"{part}-images-idx3-ubyte", pixels(count, seed, channels=1)[..., 0])
        idx(files / f"{part}-labels-idx1-ubyte", labels(count))
    task = Images(dataset="MNIST", root=tmp_path, mean=0, std=1, labels=["a", "b", "c"])
    check_task(task)
    assert raw(task, "test") == {image.tobytes() for image in pixels(30, 1, channels=1)}
    fake = Images(dataset="FakeData", options={"size": 60, "image_size": [3, 16, 16], "num_classes": 3}, test=12)
    check_task(fake)
    assert (fake.input.shape, fake.count("test")) == ((3, 16, 16), 12)
    with pytest.raises(UserError, match=r"CIFAR10 in .*not found.*set `download: true`"):
        Images(dataset="CIFAR10", root=tmp_path)
    with pytest.raises(UserError, match="no data set 'CIFAR11'; did you mean 'CIFAR10'"):
        Images(dataset="CIFAR11", root=tmp_path)


# --- size and augmentation ----------------------------------------------------------------------------------------


def test_files_of_any_size_are_resized_and_their_centre_cut_out_as_torchvision_does(tmp_path: Path):
    from autocompress.vision import import_torchvision

    import_torchvision()
    from torchvision.transforms import CenterCrop, Compose, Resize

    rng = np.random.default_rng(0)
    for number in range(12):
        high, wide = rng.integers(20, 60, 2)
        smooth = Image.fromarray(pixels(1, number, 5)[0]).resize((int(wide), int(high)))
        path = tmp_path / ("train", "test")[number % 2] / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth.save(path)
    task = Images(tmp_path, size=16, resize=20, mean=0, std=1)
    assert "shorter side resized to 20, centre 16 x 16" in task.input.normalisation
    transform = Compose([Resize(20), CenterCrop(16)])
    wanted = {np.asarray(transform(Image.open(path))).tobytes() for path in tmp_path.glob("test/*/*.png")}
    assert raw(task, "test") == wanted
    crops, _ = everything(Images(tmp_path, size=16, augment="crop", mean=0, std=1), "train", seed=1)
    assert crops.shape[1:] == (3, 16, 16)


def test_arrays_are_resized_like_files(tmp_path: Path, file: Path):
    root = folder(tmp_path / "root", {"train": 90, "test": 30})
    for options in ({"size": 8}, {"size": [6, 10]}, {"size": 8, "resize": 10}, {"size": 20}):
        one, other = (everything(Images(path, mean=0, std=1, **options), "test")[0] for path in (root, file))
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= 2 / 255 + 1e-6  # PIL rounds between its two passes


def test_augmentation_is_the_same_for_the_same_seed_whatever_the_batch(file: Path):
    task = Images(file, augment="crop", mean=0, std=1)
    plain, once, again, other = (everything(task, "train", seed=seed) for seed in (None, 1, 1, 2))
    assert torch.equal(once[0], again[0])
    assert not torch.equal(once[0], other[0])
    assert torch.equal(once[1].sort().values, plain[1].sort().values)
    whole = torch.cat([x for x, _ in task.batches("train", 81, seed=1)])
    assert torch.equal(whole, once[0])


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(5, 9))
def test_shifting_moves_and_mirrors_and_nothing_else(seed: int, count: int, size: int):
    rng = np.random.default_rng(seed)
    images, draws = pixels(count, seed, size), rng.random((count, 5))
    moved = shifted(images, draws)
    for image, draw, result in zip(images, draws, moved, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        top, left = int(draw[3] * 9), int(draw[2] * 9)
        wanted = padded[top : top + size, left : left + size]
        assert np.array_equal(result, wanted[:, ::-1] if draw[4] < 0.5 else wanted)
    assert np.array_equal(mirrored(mirrored(images, draws), draws), images)


@given(st.integers(1, 200), st.integers(1, 200), st.lists(st.floats(0, 0.999), min_size=5, max_size=5))
def test_a_random_crop_lies_in_the_image(width: int, height: int, draw: list[float]):
    left, top, right, bottom = Frame(10, 14)._box(width, height, np.array(draw))
    assert 0 <= left < right <= width + 1e-9
    assert 0 <= top < bottom <= height + 1e-9


def test_large_images_are_cropped_from_arrays_and_files_alike(tmp_path: Path):
    smooth = np.stack([np.asarray(Image.fromarray(one).resize((90, 90))) for one in pixels(30, 0, 6)])
    np.savez(tmp_path / "l.npz", x_train=smooth, y_train=labels(30), x_test=smooth[:9], y_test=labels(9))
    task = Images(tmp_path / "l.npz", size=72, augment="crop", mean=0, std=1)
    inputs, _ = everything(task, "train", seed=3)
    assert inputs.shape[1:] == (3, 72, 72)
    plain, _ = everything(task, "train")
    assert 0.5 < float(inputs.std() / plain.std()) < 1.5


# --- splits -------------------------------------------------------------------------------------------------------


def test_the_cifar_protocol_can_be_written(tmp_path: Path):
    save(tmp_path / "c.npz", x_test=pixels(100, 1), y_test=labels(100))
    task = Images(tmp_path / "c.npz", selection="test[10:50]", test="test[50:]", calibration=20, mean=0, std=1)
    stored = [image.tobytes() for image in pixels(100, 1)]
    assert raw(task, "selection") == set(stored[10:50])
    assert raw(task, "test") == set(stored[50:])
    assert task.count("train") == 90
    assert task.count("calibration") == 20
    assert raw(task, "calibration") <= raw(task, "train")


@given(
    st.lists(st.integers(0, 4), min_size=30, max_size=200),
    st.sampled_from([None, 0.2, 7, "train[-5:]", "test[:9]"]),
    st.sampled_from([None, 0.3, 4, "test[9:]", "train[:3]"]),
    st.sampled_from([None, "train[4:-5]"]),
)
def test_splits_never_share_a_sample(found, selection, test, train):
    parts = {"train": np.array(found), "test": np.array(found[:25])}
    cuts = cut(parts, "here", train=train, selection=selection, test=test, calibration=11)
    seen = [(one.part, int(i)) for split, one in cuts.items() if split != "calibration" for i in one.indices]
    assert len(seen) == len(set(seen))
    assert set(cuts["calibration"].indices) <= set(cuts["train"].indices)
    if isinstance(selection, int):
        assert len(cuts["selection"].indices) == selection
    again = cut(parts, "here", train=train, selection=selection, test=test, calibration=11)
    assert all(np.array_equal(cuts[split].indices, again[split].indices) for split in cuts)


def test_at_most_five_thousand_are_held_out():
    cuts = cut({"train": np.arange(80_000) % 10, "test": np.arange(10) % 10}, "here")
    assert len(cuts["selection"].indices) == 5000
    assert np.bincount(cuts["selection"].indices % 10).tolist() == [500] * 10


def test_a_limit_holds_for_each_split(file: Path):
    task = Images(file, limit={"train": 40, "test": 11})
    assert [task.count(split) for split in ("train", "selection", "test")] == [40, 9, 11]


# --- what goes to workers, and whole trainings ------------------------------------------------------------------------


def test_a_task_travels_without_its_images(file: Path):
    task = Images(file, augment="flip")
    everything(task, "train")
    data = pickle.dumps(task)
    assert len(data) < 2000
    assert all(map(torch.equal, everything(pickle.loads(data), "train", seed=5), everything(task, "train", seed=5)))


def test_opening_reads_no_image(file: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = []
    find = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda s, k: loaded.append(k) or find(s, k))
    task = Images(file)
    assert set(loaded) == {"y_train", "y_test"}
    next(task.batches("test", 4))
    assert "x_train" not in loaded


def test_a_network_learns_from_a_job_of_names_alone(tmp_path: Path):
    shades = np.repeat(np.arange(3, dtype=np.uint8) * 80, 30)[:, None, None, None]
    images = (pixels(90, 0) // 8 + shades).astype(np.uint8)
    np.savez(tmp_path / "s.npz", x_train=images, y_train=labels(90), x_test=images[::3], y_test=labels(90)[::3])
    data = {"path": str(tmp_path / "s.npz"), "augment": "crop", "training": {"lr": 0.05, "batch": 16}}
    task = make_task("images", json.loads(json.dumps(data)))
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
    module = module.append(torch.nn.Flatten()).append(torch.nn.Linear(8, 3))
    training = Training(module, task, 12, 0)
    assert training.batch == 16
    training.run_to(1.0)
    module.eval()
    with torch.no_grad():
        assert module(*examples(task.input)).shape == (1, 3)
        assert task.quality(lambda x: module(torch.from_numpy(x)).numpy(), "test").value.value > 0.9


def test_top_five_counts_the_first_five(tmp_path: Path):
    count = 16
    arrays = {"y_train": np.arange(90) % count, "y_test": np.arange(30) % count}
    save(tmp_path / "t.npz", **arrays)
    task = Images(tmp_path / "t.npz", metric="top5")
    constant = np.linspace(1, 0, count, dtype=np.float32)
    found = task.quality(lambda x: np.tile(constant, (len(x), 1)), "test")
    _, targets = everything(task, "test")
    assert found.value.value == pytest.approx(float((targets < 5).float().mean()))
    assert found.metric == "top5"
    with pytest.raises(UserError, match=r"answers with shape \(30, 3\), the data have 16 classes"):
        task.quality(lambda x: np.zeros((len(x), 3)), "test")


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": "nowhere.npz"}, r"data\.path: there is no file or folder .*nowhere\.npz"),
        ({"path": None}, "needs either `path` or `dataset`"),
        ({"path": 3}, r"data\.path: 3 is no path"),
        ({"path": "~nobody-at-all/x.npz"}, r"data\.path: .*home"),
        ({"path": None, "dataset": "FakeData", "options": [1]}, r"data\.options: \[1\] is no mapping"),
        ({"augment": "flop"}, r"data\.augment: 'flop'; did you mean 'flip'"),
        ({"metric": "top1"}, r"data\.metric: 'top1'"),
        ({"size": -3}, r"data\.size: -3"),
        ({"size": 8, "resize": 4}, r"data\.resize: 4 must be .* at least the size 8"),
        ({"mean": [0.5, 0.5]}, r"data\.mean: 2 numbers for 3 channels"),
        ({"std": 0}, r"data\.std: 0 must be above 0"),
        ({"mean": "imagenet"}, r"data\.mean: 'imagenet'"),
        ({"channels": 1}, r"data\.channels: .* has 3 channels"),
        ({"labels": ["a", "b"]}, r"set\.npz: train has the label 2; the classes are 0 to 1"),
        ({"labels": "abc"}, r"data\.labels: 'abc' is no list"),
        ({"selection": "tset[:3]"}, r"data\.selection: 'tset\[:3\]' is no range of train, test"),
        ({"selection": "test[:20]", "test": "test[10:]"}, r"data\.selection and data\.test share 10 samples of test"),
        ({"selection": 90}, r"data\.selection: 90 samples to be taken from train, which has 90"),
        ({"selection": 1.5}, r"data\.selection: 1\.5 is no share"),
        ({"test": "test[40:]"}, "the split 'test' is empty"),
        ({"train": "test"}, r"data\.train: 'test' is no range of the part train"),
        ({"limit": {"trian": 3}}, r"data\.limit: no split 'trian'"),
        ({"limit": 0}, r"data\.limit: 0 is no number"),
        ({"calibration": "all"}, r"data\.calibration: 'all'"),
        ({"smoothing": 2}, r"data\.smoothing: 2"),
        ({"training": {"rate": 1}}, r"data: training\.rate: no such setting"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(file: Path, options: dict, says: str):
    with pytest.raises(UserError, match=says) as caught:
        Images(**{"path": file, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x_train": None}, "holds the arrays x_test, y_test, y_train; needed are x_train"),
        ({"y_train": labels(89)}, "train has 90 images and 89 labels"),
        ({"y_train": labels(90) + 1}, "must count from 0 without gaps: there is no 0, but 1"),
        ({"y_train": labels(90) * 2}, "without gaps: there is no 1, but 2"),
        ({"y_test": labels(30) + 1}, "test has the label 3; the classes are 0 to 2"),
        ({"y_train": labels(90) - 1}, "without gaps: there is no 0, but -1"),
        (
            {"y_train": np.eye(3)[labels(90)]},
            r"labels of train: float64 of shape \(90, 3\); needed is one whole number",
        ),
        ({"x_train": pixels(90, 0).astype(np.int64)}, "images are int64, uint8; save them as uint8"),
        ({"x_train": pixels(90, 0, size=10)}, "images of test are 12 x 12 x 3, those of train 10 x 10 x 3"),
        ({"x_train": pixels(90, 0, channels=7)}, r"images of shape \(90, 12, 12, 7\)"),
        ({"y_train": np.array([None] * 90)}, "y_train holds Python objects"),
        ({"x_train": pixels(0, 0), "y_train": labels(1)[:0]}, r"bad\.npz: train is empty"),
    ],
)
def test_arrays_that_cannot_be_used_are_named(tmp_path: Path, arrays: dict, says: str):
    save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=says) as caught:
        Images(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value)


def test_files_that_are_damaged_are_named(tmp_path: Path, file: Path):
    (tmp_path / "no.npz").write_bytes(b"not a zip")
    with pytest.raises(UserError, match=r"no\.npz: not readable as \.npz"):
        npz(tmp_path / "no.npz")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255  # in the middle of the images: found when they are read
    (tmp_path / "bad.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.npz: x_train is not readable"):
        everything(Images(tmp_path / "bad.npz"), "train")
    (tmp_path / "text.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"text\.csv is no \.npz"):
        Images(tmp_path / "text.csv")
    folder_ = tmp_path / "mnist"
    folder_.mkdir()
    idx(folder_ / "train-images-idx3-ubyte", pixels(9, 0, channels=1)[..., 0])
    with pytest.raises(UserError, match="there are images of train alone"):
        Images(folder_)
    idx(folder_ / "train-labels-idx1-ubyte", labels(9))
    cut_off = (folder_ / "train-images-idx3-ubyte").read_bytes()[:-5]
    (folder_ / "train-images-idx3-ubyte").write_bytes(cut_off)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte: is cut off: 1291 bytes, its head says 9 x 12 x 12"):
        everything(Images(folder_), "train")
    (folder_ / "train-images-idx3-ubyte").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="is no idx file of bytes"):
        Images(folder_)


def test_a_broken_image_is_named_or_left_out(tmp_path: Path):
    root = folder(tmp_path, {"train": 30, "test": 12})
    broken = root / "train" / "cross" / "013.png"
    broken.write_bytes(broken.read_bytes()[:60])
    task = Images(root)
    with pytest.raises(UserError, match=r"train/cross/013\.png: cannot be read .*skip_broken: true"):
        everything(task, "train", seed=1)
    lenient = Images(root, skip_broken=True, augment="crop")
    _, targets = everything(lenient, "train", seed=1)
    assert len(targets) == task.count("train") - 1
    assert list(lenient.broken) == [str(broken)]
    Image.fromarray(pixels(1, 0, 20)[0]).save(broken)
    with pytest.raises(UserError, match=r"013\.png: is 20 x 20 pixels, the first 12 x 12; give a size"):
        everything(Images(root), "train")
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="every image of a batch is broken"):
        everything(Images(root, skip_broken=True), "test")


def test_folders_that_cannot_be_used_are_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no folders; needed is one folder of images per class"):
        Images(tmp_path / "empty")
    root = folder(tmp_path / "root", {"train": 12, "val": 12})
    (root / "val" / "square").mkdir()
    with pytest.raises(UserError, match=r"val: has a class 'square' that .*train does not have"):
        Images(root)
    (root / "train" / "square").mkdir()
    with pytest.raises(UserError, match=r"train/square: holds no image \(\.bmp"):
        Images(root)


def test_without_pillow_the_pip_line_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = folder(tmp_path, {"train": 12, "val": 12})
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'autocompress\[images\]'"):
        Images(root)


def test_options_of_a_job_are_checked_by_name(file: Path):
    with pytest.raises(UserError, match=r"data: task 'images' has no option 'augmnt'; did you mean 'augment'"):
        make_task("images", {"path": str(file), "augmnt": "flip"})
    assert isinstance(registry.resolve("task", "images"), type)


def test_a_batch_of_one_is_no_step(file: Path):
    task = Images(file, limit={"train": 17}, training={"batch": 16})
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    module.append(torch.nn.Linear(400, 3))
    found = Training(module, task, 2, 0).run_to(1.0)  # the last batch has one image
    assert (found["steps"], found["images"]) == (4, 34)


@pytest.mark.skipif("AUTOCOMPRESS_DATA" not in os.environ, reason="AUTOCOMPRESS_DATA names no folder of reference data")
def test_the_reference_data_are_read():
    data = Path(os.environ["AUTOCOMPRESS_DATA"])
    fashion = Images(data / "fashion-mnist", selection="test[1000:5000]", test="test[5000:]")
    assert fashion.input.shape == (1, 28, 28)
    assert [fashion.count(split) for split in ("train", "selection", "test")] == [60_000, 4000, 5000]
    check_task(fashion)
    cifar = Images(data / "cifar10-lossless" / "cifar10_lossless.npz", augment="crop")
    assert cifar.input.shape == (3, 32, 32)
    assert cifar.count("test") == 1017
    check_task(cifar)
