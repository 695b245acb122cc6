"""Kinds that are arrays already: `digits` (bundled), `npz` (a user's own), `synthetic` (made up)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from gossipfl.errors import ConfigError, DataError
from gossipfl.learning.datasets.arguments import positive_number, whole_number
from gossipfl.learning.datasets.dataset import DATASETS, Dataset, dataset_of, no_path, required_path, split_dataset
from gossipfl.randomness import generator


@DATASETS.register("digits")
def digits(path: Path | None, test_fraction: float, seed: int) -> Dataset:
    """The 1,797 handwritten digits bundled with scikit-learn (Alpaydin and Kaynak 1998), `f32[n, 1, 8, 8]` in 0..1."""
    no_path(path, "digits")
    from sklearn.datasets import load_digits  # ~1 s to import, so not before it is needed

    bunch = load_digits()
    x = (bunch.images / 16.0).astype(np.float32)[:, None]
    return split_dataset(x, bunch.target, test_fraction=test_fraction, seed=seed)


@DATASETS.register("npz")
def npz(path: Path | None, test_fraction: float, seed: int) -> Dataset:
    """A folder with `train.npz` and `test.npz`, or one `.npz` file that is split; each holds arrays `x` and `y`.

    Floats become float32, `uint8[n, H, W]` gets a channel, 2-D integers are tokens.
    """
    path = required_path(path, "npz", "a folder with train.npz and test.npz, or one .npz file with x and y")
    if path.is_dir():
        return dataset_of(*_read_npz(path / "train.npz"), *_read_npz(path / "test.npz"))
    return split_dataset(*_read_npz(path), test_fraction=test_fraction, seed=seed)


@DATASETS.register("synthetic")
def synthetic(
    path: Path | None,
    test_fraction: float,
    seed: int,
    *,
    n: int = 1000,
    shape: int | list[int] | tuple[int, ...] = 20,
    num_classes: int = 10,
    noise: float = 1.0,
) -> Dataset:
    """Gaussian blobs for tests and offline use: `n` samples `f32[n, *shape]` in equal classes, training and test
    together. A class's centre is drawn from N(0, 1) per coordinate, a sample adds `noise` times N(0, 1)."""
    no_path(path, "synthetic")
    what = "data set 'synthetic'"
    whole_number(what, "num_classes", num_classes, least=2)
    whole_number(what, "n", n, least=2 * num_classes)
    dims = [shape] if isinstance(shape, int) else list(shape)
    if not dims:
        raise ConfigError(f"{what}: shape = {shape!r} must name one dimension at least")
    for dim in dims:
        whole_number(what, "shape", dim)
    positive_number(what, "noise", noise)

    rng = generator(seed, "synthetic")
    centres = rng.standard_normal((num_classes, *dims), dtype=np.float32)
    y = rng.permutation(np.arange(n) % num_classes)
    x = centres[y] + np.float32(noise) * rng.standard_normal((n, *dims), dtype=np.float32)
    return split_dataset(x, y, test_fraction=test_fraction, seed=seed)


def _read_npz(path: Path) -> tuple[Any, Any]:
    """The arrays `x` and `y` of one file; object arrays are refused, since reading them runs code."""
    if not path.is_file():
        raise DataError(f"data.path = {str(path.parent)!r} has no {path.name}; write it with np.savez({path.name!r}, x=, y=)")
    try:
        with open(path, "rb") as file:
            if not file.peek(2).startswith((b"PK", b"\x93NUMPY")):  # numpy would take it for a pickle, and advise to load it
                raise DataError(f"{path} is no npz file; write it with np.savez(path, x=..., y=...)")
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise DataError(f"{path} is one bare array; write it with np.savez(path, x=..., y=...)")
            missing = [name for name in ("x", "y") if name not in archive]
            if missing:
                raise DataError(f"{path} has no array {missing[0]!r}, only {', '.join(archive)}; it needs x and y")
            return archive["x"], archive["y"]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}); x and y must be plain numeric arrays") from error
