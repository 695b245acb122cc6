"""Kinds made of image files: `idx` (MNIST and its kin), `cifar10` (binary batches or images), `images` (any folder)."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from gossipfl.errors import ConfigError, DataError
from gossipfl.learning.datasets.dataset import DATASETS, Dataset, dataset_of, required_path

_IDX_UBYTE = b"\x00\x00\x08"  # two zero bytes and the type code of uint8; the fourth byte counts the dimensions
_IMAGE_FILE = r"(?:^|/)(train|test)/([^/]+)/([^/.][^/]*\.(?:jpg|jpeg|png|JPG|JPEG|PNG))$"
_CIFAR_BATCH = r"(?:^|/)(?:data_batch_\d+|test_batch)\.bin$"
_CIFAR_SHAPE = (3, 32, 32)
_FILE_LIMIT = 256 << 20  # bytes of one file in an archive: a binary CIFAR batch has 31 MB, a photograph less


@DATASETS.register("idx")
def idx(path: Path | None, test_fraction: float, seed: int) -> Dataset:
    """A folder of four IDX files, plain or gzip, named as those of MNIST (LeCun, Cortes and Burges;
    `train-images-idx3-ubyte.gz`, ...); Fashion-MNIST and KMNIST come so too. `uint8[n, 1, H, W]`."""
    path = required_path(path, "idx", "a folder with train-images-idx3-ubyte(.gz) and its three companions")
    arrays = []
    for part in ("train", "t10k"):
        arrays += [_read_idx(path, f"{part}-images", 3), _read_idx(path, f"{part}-labels", 1)]
    return dataset_of(*arrays)


@DATASETS.register("cifar10")
def cifar10(path: Path | None, test_fraction: float, seed: int) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009), `uint8[n, 3, 32, 32]`: a folder, or a tar archive of one, that holds either the
    binary batches (`data_batch_1.bin` ... `test_batch.bin`) or `train|test/<class>/*.jpg|png`."""
    expected = "a folder or tar archive with data_batch_1.bin ... or train|test/<class>/*.jpg"
    path = required_path(path, "cifar10", expected)
    files = dict(_files(path, re.compile(f"{_CIFAR_BATCH}|{_IMAGE_FILE}")))
    batches = {Path(name).name: data for name, data in files.items() if re.search(_CIFAR_BATCH, name)}
    if not batches:
        dataset = _decoded(path, files.items(), channels=3)
        if dataset.input_shape != _CIFAR_SHAPE or dataset.num_classes != 10:
            raise DataError(
                f"data.path = {str(path)!r} holds {dataset.num_classes} classes of {list(dataset.input_shape)}, not "
                f"CIFAR-10's 10 of {list(_CIFAR_SHAPE)}; use data.kind = 'images'"
            )
        return dataset
    test = batches.pop("test_batch.bin", None)
    if test is None or not batches:
        found = ", ".join(sorted(batches)) or "test_batch.bin"
        raise DataError(f"data.path = {str(path)!r} holds only {found}; it needs data_batch_1.bin ... and test_batch.bin")
    return replace(dataset_of(*_read_cifar(batches), *_read_cifar({"test_batch.bin": test})), num_classes=10)


@DATASETS.register("images")
def images(path: Path | None, test_fraction: float, seed: int, *, channels: int = 3) -> Dataset:
    """A folder, or a tar archive of one, with `train|test/<class>/*.jpg|png`, all of one size; `uint8[n, C, H, W]`.

    `channels` C is 3 for colour, 1 for grey. Classes are numbered by sorted name, samples sorted by file name.
    Archives are read in memory: nothing is written under a name that an archive chose.
    """
    path = required_path(path, "images", "a folder or tar archive with train|test/<class>/*.jpg|png")
    if channels not in (1, 3):
        raise ConfigError(f"data set 'images': channels = {channels!r} must be 1 (grey) or 3 (colour)")
    return _decoded(path, _files(path, re.compile(_IMAGE_FILE)), channels)


def _decoded(path: Path, files: Iterable[tuple[str, bytes]], channels: int) -> Dataset:
    """The data set of encoded images, named as `_IMAGE_FILE` says."""
    decode = _decoder(channels)
    decoded: dict[str, dict[tuple[str, str], np.ndarray]] = {"train": {}, "test": {}}
    first: tuple[str, np.ndarray] | None = None
    for name, data in files:
        image = decode(name, data)
        first = first or (name, image)
        if image.shape != first[1].shape:
            raise DataError(f"{name} is {_size(image)} but {first[0]} {_size(first[1])}; resize the images to one size")
        part, label, file = _parts(name)
        decoded[part][label, file] = image
    for part, found in decoded.items():
        if not found:
            raise DataError(f"data.path = {str(path)!r} holds no {part}/<class>/*.jpg or *.png")
    number = {name: i for i, name in enumerate(sorted({label for found in decoded.values() for label, _ in found}))}
    arrays = []
    for found in decoded.values():
        order = sorted(found)
        arrays += [np.stack([found[key] for key in order]), np.array([number[label] for label, _ in order])]
    return dataset_of(*arrays)


def _read_idx(folder: Path, stem: str, ndim: int) -> np.ndarray:
    """One IDX file: magic number, big-endian dimensions, then the values."""
    names = [f"{stem}{mark}idx{ndim}-ubyte{end}" for end in ("", ".gz") for mark in "-."]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise DataError(f"data.path = {str(folder)!r} has no {names[0]} or {names[2]}; the four IDX files lie side by side")
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            header = stream.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim or header[:4] != _IDX_UBYTE + bytes([ndim]):
                raise DataError(f"{file} is no IDX file of {ndim}-dimensional uint8 (it starts with {header.hex()})")
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
            expected = int(np.prod(shape, dtype=object))
            data = stream.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}); copy it again") from error
    if len(data) != expected:
        more = "more than " if len(data) > expected else ""
        raise DataError(f"{file} holds {more}{min(len(data), expected)} of {expected} values; copy it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_cifar(batches: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the binary version: records of one label byte and 3,072 bytes, channel by channel."""
    record = 1 + int(np.prod(_CIFAR_SHAPE))
    for name, data in batches.items():
        if not data or len(data) % record:
            raise DataError(f"{name} has {len(data)} bytes, no multiple of {record}; copy it again")
    rows = np.concatenate([np.frombuffer(batches[name], np.uint8).reshape(-1, record) for name in sorted(batches)])
    if rows[:, 0].max() > 9:
        raise DataError(f"{', '.join(sorted(batches))}: label {rows[:, 0].max()} is outside 0 to 9; is it CIFAR-10?")
    return rows[:, 1:].reshape(-1, *_CIFAR_SHAPE), rows[:, 0]


def _files(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that `wanted` matches, in a folder or a tar archive (of any compression)."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if wanted.search(file.relative_to(path).as_posix()) and file.is_file():
                yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    try:
        with tarfile.open(path, "r|*") as archive:  # a stream: one pass, members in the order they are stored
            for member in archive:
                if not (member.isfile() and wanted.search(member.name)):
                    continue
                if member.size > _FILE_LIMIT:
                    raise DataError(f"{path}: {member.name} has {member.size} bytes, above the {_FILE_LIMIT} allowed")
                stream = archive.extractfile(member)
                assert stream is not None, "regular files have content"
                yield member.name, stream.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise DataError(f"data.path = {str(path)!r} is no readable folder or tar archive ({error})") from error


def _decoder(channels: int) -> Callable[[str, bytes], np.ndarray]:
    """`decode(name, data) -> uint8[channels, H, W]`; ConfigError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("reading JPEG or PNG images needs Pillow; pip install 'gossipfl[images]'") from error

    def decode(name: str, data: bytes) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{name} cannot be decoded ({error})") from error
        return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)

    return decode


def _parts(name: str) -> tuple[str, str, str]:
    """`train` or `test`, the class and the file of an image's name."""
    match = re.search(_IMAGE_FILE, name)
    assert match is not None, "only such names are read"
    return match[1], match[2], match[3]


def _size(image: np.ndarray) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"
