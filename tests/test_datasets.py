"""Data sets: each kind from tiny files made here, what bad files say, and the folders that peers map."""

import contextlib
import gzip
import importlib
import io
import json
import linecache
import os
import re
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gossipfl.errors import ConfigError, DataError
from gossipfl.learning.datasets import (
    DATASETS,
    Dataset,
    load_dataset,
    normalise,
    open_dataset,
    prepare_dataset,
    save_dataset,
    store,
)

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def load(kind, path=None, test_fraction=0.2, seed=0, **args) -> Dataset:
    return load_dataset(kind, path, test_fraction, seed, args)


def tiny(**changes) -> Dataset:
    """Six training and two test images of 1x2x2 pixels, three classes."""
    pixels = np.arange(32, dtype=np.uint8).reshape(8, 1, 2, 2)
    labels = np.arange(8) % 3
    return replace(Dataset(pixels[:6], labels[:6], pixels[6:], labels[6:], 3, mean=(0.1,), std=(0.5,)), **changes)


def assert_same(a: Dataset, b: Dataset) -> None:
    for name in ARRAYS:
        assert getattr(a, name).dtype == getattr(b, name).dtype
        assert np.array_equal(getattr(a, name), getattr(b, name))
    assert (a.num_classes, a.mean, a.std) == (b.num_classes, b.mean, b.std)


# --- kinds that read no files


def test_digits_are_split_by_class_and_by_seed():
    pytest.importorskip("sklearn")
    dataset = load("digits")
    assert dataset.x_train.shape == (1438, 1, 8, 8) and dataset.x_test.shape == (359, 1, 8, 8)
    assert dataset.x_train.dtype == np.float32 and dataset.x_train.max() == 1.0
    assert dataset.input_shape == (1, 8, 8) and dataset.num_classes == 10
    counts = np.bincount(dataset.y_train) + np.bincount(dataset.y_test)
    assert (np.abs(np.bincount(dataset.y_test) - 0.2 * counts) < 1).all()
    assert np.array_equal(load("digits").y_train, dataset.y_train)
    assert not np.array_equal(load("digits", seed=1).y_train, dataset.y_train)


def test_synthetic_blobs_have_the_shape_asked_for_and_can_be_told_apart():
    dataset = load("synthetic", n=300, shape=[1, 4, 4], num_classes=3, noise=0.1)
    assert dataset.x_train.shape == (240, 1, 4, 4) and dataset.x_train.dtype == np.float32
    assert np.bincount(dataset.y_train).tolist() == [80, 80, 80]
    centres = np.stack([dataset.x_train[dataset.y_train == c].mean(axis=0) for c in range(3)])
    distance = np.square(dataset.x_test[:, None] - centres).sum(axis=(2, 3, 4))
    assert (distance.argmin(axis=1) == dataset.y_test).all()
    assert load("synthetic", n=20, num_classes=2, shape=5).input_shape == (5,)
    assert np.array_equal(load("synthetic").x_train, load("synthetic").x_train)
    assert not np.array_equal(load("synthetic").x_train, load("synthetic", seed=1).x_train)


@pytest.mark.parametrize("kind", ["digits", "synthetic"])
def test_a_path_that_would_not_be_read_is_refused(kind, tmp_path):
    with pytest.raises(DataError, match=rf"data\.path = .* is not read by data\.kind = '{kind}'"):
        load(kind, tmp_path)


# --- idx


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, suffix: str = "") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (6, 5, 4)),
        "train-labels-idx1-ubyte": np.array([0, 1, 2, 2, 1, 0]),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (2, 5, 4)),
        "t10k-labels-idx1-ubyte": np.array([3, 1]),
    }
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        data = idx_bytes(array)
        (folder / (name + suffix)).write_bytes(gzip.compress(data) if suffix else data)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_plain_or_gzip(tmp_path, suffix):
    arrays = write_idx(tmp_path, suffix)
    dataset = load("idx", tmp_path)
    assert np.array_equal(dataset.x_train[:, 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(dataset.y_test, [3, 1])
    assert dataset.x_train.dtype == np.uint8 and dataset.y_train.dtype == np.int64
    assert dataset.input_shape == (1, 5, 4) and dataset.num_classes == 4


def test_images_are_normalised_by_the_statistics_of_the_training_set(tmp_path):
    write_idx(tmp_path)
    dataset = load("idx", tmp_path)
    batch = normalise(dataset.x_train, dataset)
    assert batch.dtype == np.float32
    expected = dataset.x_train / 255.0
    np.testing.assert_allclose(batch, (expected - expected.mean()) / expected.std(), atol=1e-6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "holds 119 of 120 values; copy it again"),
        (lambda data: data + b"x", "holds more than 120 of 120 values"),
        (lambda data: data[:7], "is no IDX file"),
        (lambda data: b"\x00\x00\x0d" + data[3:], r"is no IDX file .* \(it starts with 00000d03[0-9a-f]+\)"),
        (lambda data: b"", "is no IDX file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage, message):
    write_idx(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=f"{re.escape(str(file))}.*({message})"):
        load("idx", tmp_path)


def test_a_gzip_file_cut_short_is_named(tmp_path):
    write_idx(tmp_path, ".gz")
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        load("idx", tmp_path)


def test_a_missing_idx_file_is_named(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"has no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        load("idx", tmp_path)


@pytest.mark.parametrize("kind", ["idx", "cifar10", "images", "npz", "text"])
def test_a_missing_path_names_the_key_the_value_and_what_is_needed(kind, tmp_path):
    with pytest.raises(DataError, match=rf"data\.path is not set; data\.kind = '{kind}' needs a "):
        load(kind)
    with pytest.raises(DataError, match=r"data\.path = '.*nowhere' does not exist; .* needs a "):
        load(kind, tmp_path / "nowhere")


# --- cifar10 and images

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    """The bytes of an image file of `uint8[C, H, W]`."""
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    array = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def image_files(classes=CIFAR_CLASSES, shape=(3, 32, 32)) -> dict[str, np.ndarray]:
    """Two training images and one test image per class, by name; all different."""
    rng = np.random.default_rng(0)
    names = [f"train/{c}/000{i}.png" for c in classes for i in (0, 1)] + [f"test/{c}/0000.png" for c in classes]
    return {name: rng.integers(0, 256, shape, dtype=np.uint8) for name in names}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:xz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_cifar10_is_read_from_binary_batches_in_a_folder_or_an_archive(tmp_path):
    rng = np.random.default_rng(0)
    rows = {f"data_batch_{i}.bin": rng.integers(0, 256, (3, 3073), dtype=np.uint8) for i in (1, 2)}
    rows["test_batch.bin"] = rng.integers(0, 256, (2, 3073), dtype=np.uint8)
    for batch in rows.values():
        batch[:, 0] %= 9  # the tenth class does not occur, and counts nevertheless
    files = {f"cifar-10-batches-bin/{name}": batch.tobytes() for name, batch in rows.items()}
    dataset = load("cifar10", write_folder(tmp_path / "folder", files))
    assert np.array_equal(dataset.x_train[4, 2, 0, :2], rows["data_batch_2.bin"][1, 1 + 2048 : 1 + 2050])
    assert np.array_equal(dataset.y_train, [*rows["data_batch_1.bin"][:, 0], *rows["data_batch_2.bin"][:, 0]])
    assert dataset.x_test.shape == (2, 3, 32, 32) and dataset.num_classes == 10
    assert_same(dataset, load("cifar10", write_tar(tmp_path / "batches.tar.gz", files, "w:gz")))


def test_cifar10_is_read_from_images_in_a_folder_or_an_archive(tmp_path):
    pixels = image_files()
    files = {name: encoded(image) for name, image in pixels.items()} | {"README.md": b"not an image"}
    dataset = load("cifar10", write_folder(tmp_path / "folder", files))
    assert dataset.y_train.tolist() == [c for c in range(10) for _ in (0, 1)]
    assert dataset.y_test.tolist() == list(range(10))
    assert np.array_equal(dataset.x_train[7], pixels["train/cat/0001.png"])
    backwards = dict(reversed(files.items()))
    assert_same(dataset, load("cifar10", write_tar(tmp_path / "images.tar.xz", backwards)))


def test_images_of_any_size_are_read_in_grey_or_colour(tmp_path):
    pixels = image_files(("no", "yes"), (1, 6, 5))
    folder = write_folder(tmp_path, {name: encoded(image) for name, image in pixels.items()})
    grey = load("images", folder, channels=1)
    assert grey.input_shape == (1, 6, 5) and grey.num_classes == 2
    assert np.array_equal(grey.x_test[1], pixels["test/yes/0000.png"])
    colour = load("images", folder)
    assert np.array_equal(colour.x_train, np.repeat(grey.x_train, 3, axis=1))
    with pytest.raises(ConfigError, match="channels = 2 must be 1"):
        load("images", folder, channels=2)


def test_jpeg_files_are_read_too(tmp_path):
    flat = {name.replace("png", "jpg"): np.full((3, 8, 8), 200, np.uint8) for name in image_files(("a", "b"))}
    dataset = load("images", write_folder(tmp_path, {name: encoded(image, "JPEG") for name, image in flat.items()}))
    assert dataset.x_train.shape == (4, 3, 8, 8)
    assert np.abs(dataset.x_train.astype(int) - 200).max() <= 2


def test_an_archive_writes_nothing_under_the_names_it_chose(tmp_path):
    files = {f"../../{name}": encoded(image) for name, image in image_files(("a", "b"), (3, 4, 4)).items()}
    (tmp_path / "inner").mkdir()
    archive = write_tar(tmp_path / "inner" / "evil.tar", files, "w:")
    assert load("images", archive).num_classes == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["evil.tar", "inner"]


def test_bad_images_are_named(tmp_path):
    good = {name: encoded(image) for name, image in image_files(("a", "b"), (3, 4, 4)).items()}
    odd = encoded(np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(DataError, match=r"train/b/0001.png is 5x4 but .* 4x4; resize"):
        load("images", write_folder(tmp_path / "odd", good | {"train/b/0001.png": odd}))
    with pytest.raises(DataError, match=r"train/b/0001\.png cannot be decoded"):
        load("images", write_folder(tmp_path / "broken", good | {"train/b/0001.png": b"nonsense"}))
    with pytest.raises(DataError, match=r"holds no test/<class>/\*\.jpg or"):
        load("images", write_folder(tmp_path / "half", {n: d for n, d in good.items() if n.startswith("train")}))
    with pytest.raises(DataError, match=r"2 classes of \[3, 4, 4\], not CIFAR-10's .* use data\.kind = 'images'"):
        load("cifar10", write_folder(tmp_path / "small", good))
    with pytest.raises(DataError, match="no readable folder or tar archive"):
        load("images", write_folder(tmp_path, {"file": b"neither"}) / "file")


def test_a_batch_of_another_length_or_alone_is_named(tmp_path):
    whole = bytes(3073)
    with pytest.raises(DataError, match=r"data_batch_1\.bin has 3074 bytes, no multiple of 3073"):
        load("cifar10", write_folder(tmp_path / "a", {"data_batch_1.bin": whole + b"x", "test_batch.bin": whole}))
    with pytest.raises(DataError, match=r"holds only data_batch_1\.bin; it needs"):
        load("cifar10", write_folder(tmp_path / "b", {"data_batch_1.bin": whole}))
    with pytest.raises(DataError, match="label 11 is outside 0 to 9"):
        load("cifar10", write_folder(tmp_path / "c", {"data_batch_1.bin": b"\x0b" + whole[1:], "test_batch.bin": whole}))


def test_without_pillow_the_remedy_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, {"train/a/0.jpg": b"", "test/a/0.jpg": b""})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"pip install 'gossipfl\[images\]'"):
        load("images", folder)


# --- npz


def test_npz_is_a_folder_of_two_files_or_one_file_that_is_split(tmp_path):
    x, y = np.arange(40.0).reshape(10, 4), np.arange(10) % 2
    np.savez(tmp_path / "train.npz", x=x, y=y)
    np.savez(tmp_path / "test.npz", x=x[:3], y=y[:3])
    both = load("npz", tmp_path)
    assert both.x_train.dtype == np.float32 and np.array_equal(both.x_train, x) and np.array_equal(both.y_test, [0, 1, 0])
    split = load("npz", tmp_path / "train.npz", test_fraction=0.4)
    assert sorted([*split.x_train[:, 0], *split.x_test[:, 0]]) == x[:, 0].tolist()
    assert np.bincount(split.y_test).tolist() == [2, 2]
    assert not np.array_equal(split.x_test, load("npz", tmp_path / "train.npz", test_fraction=0.4, seed=1).x_test)


def test_what_an_npz_lacks_is_named(tmp_path):
    np.savez(tmp_path / "train.npz", x=np.zeros((4, 2)), labels=np.zeros(4, int))
    with pytest.raises(DataError, match=r"train\.npz has no array 'y', only x, labels; it needs x and y"):
        load("npz", tmp_path / "train.npz")
    np.savez(tmp_path / "train.npz", x=np.zeros((4, 2)), y=np.arange(4) % 2)
    with pytest.raises(DataError, match=r"has no test\.npz"):
        load("npz", tmp_path)
    np.savez(tmp_path / "objects.npz", x=np.array([{}, {}], dtype=object), y=np.zeros(2, int))
    with pytest.raises(DataError, match=r"objects\.npz cannot be read .* plain numeric arrays"):
        load("npz", tmp_path / "objects.npz")
    (tmp_path / "junk.npz").write_bytes(b"PK\x03\x04 but no more")
    with pytest.raises(DataError, match=r"junk\.npz cannot be read"):
        load("npz", tmp_path / "junk.npz")
    for name, junk in (("table.npz", b"a,b\n1,2\n"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(junk)
        with pytest.raises(DataError, match=rf"{name} is no npz file; write it with np\.savez\(path, x=\.\.\., y=\.\.\.\)$"):
            load("npz", tmp_path / name)
    np.save(tmp_path / "bare.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"bare\.npy is one bare array"):
        load("npz", tmp_path / "bare.npy")


# --- text


def test_text_becomes_windows_whose_targets_are_one_character_later(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgh" * 10)
    dataset = load("text", tmp_path / "text.txt", test_fraction=0.25, block=7)
    assert dataset.num_classes == 8 and dataset.input_shape == (7,)
    assert dataset.x_train.dtype == dataset.y_train.dtype == np.int64
    assert dataset.x_train.shape == (8, 7) and dataset.x_test.shape == (2, 7)  # 60 and 20 characters
    assert dataset.x_train[:2].tolist() == [[0, 1, 2, 3, 4, 5, 6], [7, 0, 1, 2, 3, 4, 5]]
    assert np.array_equal(dataset.y_train, (dataset.x_train + 1) % 8)
    assert dataset.x_test[0, 0] == 60 % 8
    assert dataset.keys is None


def test_windows_of_a_play_are_keyed_by_the_speaker_of_their_first_character(tmp_path):
    speeches = [
        (0, "Enter two.\n"),  # before anyone speaks
        (2, "ROMEO:\nIs the day so young?\n\n"),
        (1, "First Citizen:\nBut new struck nine; he said:\nay me! sad hours seem long.\n\n"),  # verse may end with a colon
        (2, "ROMEO:\nWas that my father that went hence so fast?\n\n"),
    ]
    content = "".join(speech for _, speech in speeches)
    speaker = np.repeat([who for who, _ in speeches], [len(speech) for _, speech in speeches])
    (tmp_path / "play.txt").write_text(content)
    dataset = load("text", tmp_path / "play.txt", test_fraction=0.1, block=5)
    assert dataset.keys is not None and dataset.keys.dtype == np.int64
    assert dataset.keys.tolist() == speaker[::5][: len(dataset.x_train)].tolist()
    assert set(dataset.keys) == {0, 1, 2}


def test_a_text_that_is_too_short_or_not_text_is_an_error(tmp_path):
    (tmp_path / "short.txt").write_text("a" * 100)
    with pytest.raises(DataError, match=r"holds 100 characters; .* more than block = 64 each; lower block"):
        load("text", tmp_path / "short.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        load("text", tmp_path / "binary.txt")
    with pytest.raises(ConfigError, match="block = 0 must be a whole number"):
        load("text", tmp_path / "short.txt", block=0)


# --- loading and checking


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "my_data_for_test.py").write_text(
        "import numpy as np\n"
        "def pair(path, test_fraction, seed, *, n=10):\n"
        "    return np.zeros((n, 3)), np.arange(n) % 2\n"
        "def four(path, test_fraction, seed):\n"
        "    return [[[0, 255]]], [0], [[[7, 7]]], [1]\n"
        "def images(path, test_fraction, seed):\n"
        "    x = np.zeros((4, 3, 3), np.uint8)\n"
        "    return x, [0, 1, 2, 0], x[:1], [2]\n"
        "def ragged(path, test_fraction, seed):\n"
        "    return [[1.0], [1.0, 2.0]], [0, 1]\n"
        "def real_labels(path, test_fraction, seed):\n"
        "    return np.zeros((4, 2)), np.zeros(4)\n"
        "def infinite(path, test_fraction, seed):\n"
        "    return np.full((4, 2), np.inf), np.arange(4) % 2\n"
        "def none(path, test_fraction, seed):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the registry adds the current folder
    yield "my_data_for_test"
    sys.modules.pop("my_data_for_test", None)


def test_a_users_function_may_return_arrays(users_module):
    pair = load(f"{users_module}:pair", n=20)
    assert pair.x_train.shape == (16, 3) and pair.x_train.dtype == np.float32 and pair.num_classes == 2
    images = load(f"{users_module}:images")
    assert images.input_shape == (1, 3, 3) and images.num_classes == 3
    assert (images.mean, images.std) == ((0.0,), (1.0,))  # constant images are not divided by zero


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("four", r"x_train is int64\[1, 1, 2\]; images are uint8 or float"),
        ("ragged", "x is no array"),
        ("real_labels", r"y is float64\[4\]; labels are integers"),
        ("infinite", "x_train holds values that are not finite"),
        ("none", r"returned NoneType; return a Dataset, \(x_train"),
    ],
)
def test_a_users_mistake_is_named(users_module, function, message):
    with pytest.raises(DataError, match=f"data set '{users_module}:{function}': {message}"):
        load(f"{users_module}:{function}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.array([0, 1, 2, 3, 0, 1])}, "y_train holds labels 0 to 3; 3 classes allow 0 to 2"),
        ({"y_test": np.array([-1, 0])}, "y_test holds labels -1 to 0"),
        ({"y_train": np.arange(5) % 3}, "x_train holds 6 samples but y_train 5"),
        ({"y_train": np.zeros(6, np.int32)}, r"y_train is int32\[6\]; give int64"),
        ({"y_train": np.zeros((6, 1), np.int64)}, r"y_train is int64\[6, 1\]; give int64"),
        ({"x_test": np.zeros((2, 1, 3, 2), np.uint8)}, r"x_test is uint8\[1, 3, 2\] per sample but x_train"),
        ({"x_test": np.zeros((2, 1, 2, 2), np.float32)}, r"x_test is float32\[1, 2, 2\] per sample but x_train"),
        ({"x_test": np.zeros((0, 1, 2, 2), np.uint8), "y_test": np.zeros(0, np.int64)}, "x_test is empty"),
        ({"x_train": [1, 2]}, "x_train is a list, not a numpy array"),
        ({"keys": np.zeros(5, np.int64)}, r"keys must be int64\[6\]"),
        ({"keys": np.full(6, -1)}, "keys holds -1"),
        ({"mean": (0.1, 0.2)}, "must give 1 finite values each"),
        ({"std": (0.0,)}, "std above 0"),
    ],
)
def test_an_inconsistent_data_set_is_not_saved(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        save_dataset(tiny(**changes), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_classes_may_be_one_of_numpy(tmp_path):
    save_dataset(tiny(num_classes=np.int64(3)), tmp_path / "set")
    assert type(tiny(num_classes=np.int64(3)).num_classes) is int and open_dataset(tmp_path / "set").num_classes == 3


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    tokens = np.arange(12).reshape(3, 4)
    dataset = Dataset(tokens, np.zeros_like(tokens), tokens, np.zeros_like(tokens), num_classes=11)
    with pytest.raises(DataError, match=r"token 11 .* outside the vocabulary of 11"):
        save_dataset(dataset, tmp_path / "set")


@pytest.mark.parametrize(
    ("kind", "test_fraction", "args", "message"),
    [
        ("digts", 0.2, {}, r"unknown data set 'digts'; did you mean 'digits'\?"),
        ("synthetic", 0.2, {"num_clases": 3}, r"no argument 'num_clases'; did you mean 'num_classes'\?; it accepts n, shape"),
        ("synthetic", 0.2, {"n": 3}, "n = 3 must be a whole number of at least 20"),
        ("synthetic", 0.2, {"shape": [4, 0]}, "shape = 0 must be a whole number"),
        ("synthetic", 1.0, {}, r"data\.test_fraction = 1\.0 must lie between 0 and 1"),
    ],
)
def test_a_wrong_setting_is_named(kind, test_fraction, args, message):
    with pytest.raises(ConfigError, match=message):
        load(kind, test_fraction=test_fraction, **args)


def test_normalising_leaves_features_and_tokens_as_they_are():
    for dtype in (np.float32, np.int64):
        batch = np.arange(6, dtype=dtype).reshape(2, 3)
        assert normalise(batch, tiny()) is batch
    assert normalise(np.full((1, 1, 1, 1), 51, np.uint8), tiny()).item() == pytest.approx((0.2 - 0.1) / 0.5)


# --- folders that peers map


def test_a_saved_data_set_opens_as_read_only_maps_of_the_same_values(tmp_path):
    dataset = tiny(keys=np.array([0, 0, 1, 1, 2, 2]))
    save_dataset(dataset, tmp_path / "set")
    opened = open_dataset(tmp_path / "set")
    assert_same(opened, dataset)
    assert np.array_equal(opened.keys, dataset.keys)
    assert isinstance(opened.x_train, np.memmap) and not opened.x_train.flags.writeable
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    with pytest.raises(DataError, match="exists already"):
        save_dataset(dataset, tmp_path / "set")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "y_test.npy").unlink(), "y_test.npy is missing"),
        (lambda folder: (folder / "dataset.json").unlink(), "dataset.json is missing"),
        (lambda folder: (folder / "dataset.json").write_text("[1"), "dataset.json is damaged"),
        (lambda folder: os.truncate(folder / "x_train.npy", 140), r"x_train.npy has 140 of \d+ bytes"),
        (
            lambda folder: (folder / "dataset.json").write_text(json.dumps({"format": 99})),
            "its format is 99, this version reads",
        ),
    ],
)
def test_a_damaged_folder_is_not_opened_but_prepared_anew(tmp_path, damage, message):
    folder = prepare_dataset("synthetic", None, 0.2, 0, {"n": 40}, tmp_path)
    damage(folder)
    with pytest.raises(DataError, match=f"is no complete data set .*{message}.*prepare it again"):
        open_dataset(folder)
    assert prepare_dataset("synthetic", None, 0.2, 0, {"n": 40}, tmp_path) == folder
    assert_same(open_dataset(folder), load("synthetic", n=40))


def test_a_data_set_is_converted_once_and_again_when_its_source_or_a_setting_changes(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("to be or not to be " * 40)

    def prepare(fraction=0.2, seed=0, **args):
        return prepare_dataset("text", source, fraction, seed, args, tmp_path / "cache")

    first = prepare()
    written = (first / "x_train.npy").stat().st_mtime_ns
    assert prepare() == first and (first / "x_train.npy").stat().st_mtime_ns == written
    others = {prepare(fraction=0.3), prepare(seed=1), prepare(block=16)}
    source.write_text("that is the question " * 40)
    others.add(prepare())
    assert len(others | {first}) == 5


def test_a_changed_function_of_the_user_is_a_changed_source_once_it_is_loaded(users_module, tmp_path):
    def prepare():
        return prepare_dataset(f"{users_module}:pair", None, 0.2, 0, {}, tmp_path / "cache")

    first, file = prepare(), Path(sys.modules[users_module].__file__)
    file.write_text(file.read_text().replace("np.zeros((n, 3))", "np.ones((n, 3))"))
    assert prepare() == first  # else what the old function returns would be kept in the new one's name
    del sys.modules[users_module]  # as in another process
    importlib.invalidate_caches()
    assert open_dataset(prepare()).x_train.all()


def test_a_function_without_a_file_is_known_by_its_text(tmp_path, monkeypatch):
    """As in a notebook, whose cells are no files."""
    for value in (0, 1):
        text = f"def own(path, test_fraction, seed):\n    return np.full((10, 3), {value}.0), np.arange(10) % 2\n"
        names = {"np": np, "__name__": "__main__"}
        exec(compile(text, f"<cell {value}>", "exec"), names)
        linecache.cache[f"<cell {value}>"] = (len(text), None, text.splitlines(keepends=True), f"<cell {value}>")
        monkeypatch.setitem(DATASETS._functions, "own", names["own"])
        assert (open_dataset(prepare_dataset("own", None, 0.2, 0, {}, tmp_path / "cache")).x_train == value).all()


def test_a_failed_conversion_leaves_no_folder(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(DataError, match="no space left; mend that, or set GOSSIPFL_CACHE"):
        prepare_dataset("synthetic", None, 0.2, 0, {}, tmp_path)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def test_of_two_that_ask_at_once_one_converts_and_the_other_waits(tmp_path, monkeypatch):
    calls, together = [], threading.Barrier(2, timeout=20)

    def counted(*args):
        calls.append(args)
        return load_dataset(*args)

    def ask(_):
        together.wait()
        return prepare_dataset("synthetic", None, 0.2, 0, {"n": 20_000}, tmp_path)

    monkeypatch.setattr(store, "load_dataset", counted)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(ask, range(2))
    assert one == two and len(calls) == 1


def test_where_locks_do_not_work_the_first_to_finish_wins(tmp_path, monkeypatch):
    """Another process puts its folder in place just before this one would."""
    monkeypatch.setattr(store, "_locked", lambda path: contextlib.nullcontext())
    real_write, others = store._write, []

    def overtaken(dataset, folder):
        real_write(dataset, folder)
        others.append((folder / "x_train.npy").stat().st_ino)
        real_write(dataset, folder)

    monkeypatch.setattr(store, "_write", overtaken)
    folder = prepare_dataset("synthetic", None, 0.2, 0, {"n": 40}, tmp_path)
    assert (folder / "x_train.npy").stat().st_ino == others[0]
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_opening_a_data_set_imports_numpy_only(tmp_path):
    save_dataset(tiny(), tmp_path / "set")
    code = (
        "import sys; from pathlib import Path; from gossipfl.learning.datasets import open_dataset\n"
        "assert open_dataset(Path(sys.argv[1])).num_classes == 3\n"
        "print([name for name in ('sklearn', 'scipy', 'networkx', 'PIL', 'torch') if name in sys.modules])"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code, str(tmp_path / "set")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# --- the real ones, where present


def test_mnist_is_read(shared_data):
    dataset = load("idx", shared_data / "mnist")
    assert dataset.x_train.shape == (60_000, 1, 28, 28) and dataset.x_test.shape == (10_000, 1, 28, 28)
    assert dataset.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.mean == pytest.approx((0.1307,), abs=5e-5) and dataset.std == pytest.approx((0.3081,), abs=5e-5)


def test_cifar10_images_are_read(shared_data, tmp_path):
    """One image per class, from the test part with which the archive begins: the whole takes too long for a test."""
    pytest.importorskip("PIL")
    files: dict[str, bytes] = {}
    with tarfile.open(shared_data / "cifar10-jpg.tar.xz", "r|xz") as archive:
        for member in archive:
            if member.name.endswith("/0000.jpg"):
                files[member.name] = archive.extractfile(member).read()
            if len(files) == 10:
                break
    train = {name.replace("test/", "train/"): data for name, data in files.items()}
    dataset = load("cifar10", write_tar(tmp_path / "few.tar.xz", files | train))
    assert dataset.x_test.shape == (10, 3, 32, 32)
    assert sorted(name.split("/")[1] for name in files) == list(CIFAR_CLASSES)
    assert dataset.x_test.std(axis=(1, 2, 3)).min() > 10


def test_the_plays_of_shakespeare_have_speakers(shared_data):
    dataset = load("text", shared_data / "tinyshakespeare.txt", test_fraction=0.1)
    assert dataset.num_classes == 65 and dataset.input_shape == (64,)
    assert dataset.x_train.shape == (15_685, 64)  # (1,003,855 - 1) // 64
    assert dataset.keys is not None and 200 < dataset.keys.max() < 320
    assert np.array_equal(np.unique(dataset.keys), np.arange(dataset.keys.max() + 1))


def test_every_kind_is_tested_here():
    assert set(DATASETS) == {"cifar10", "digits", "idx", "images", "npz", "synthetic", "text"}
