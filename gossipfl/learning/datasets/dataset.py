"""What a data set is, what must hold of one, and how to load one of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gossipfl.errors import ConfigError, DataError
from gossipfl.learning.datasets.arguments import call_with
from gossipfl.plain import without_numpy
from gossipfl.randomness import generator
from gossipfl.registry import Registry


@dataclass(frozen=True, eq=False, slots=True)
class Dataset:
    """Training and test samples. The arrays may be read-only maps of files.

    `x_*` are `uint8[n, C, H, W]` images of 0..255, `f32[n, ...]` images or features, or `i64[n, T]` tokens;
    `y_*` are `i64[n]` classes, or `i64[n, T]` next tokens, in `0 .. num_classes - 1`.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    keys: np.ndarray | None = None  # i64[n_train], 0 .. K-1: the natural owner of each training sample
    mean: tuple[float, ...] | None = None  # of x / 255 per channel over the training images; set for uint8 only
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", without_numpy(self.num_classes))  # y.max() + 1 is one of numpy's

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, as models take it: `(C, H, W)`, `(d,)` or `(T,)`."""
        return tuple(self.x_train.shape[1:])


DATASETS: Registry[Callable[..., Dataset]] = Registry("data set")
"""`f(path: Path | None, test_fraction: float, seed: int, **args) -> Dataset`; `test_fraction` and `seed` matter only
to kinds that bring no test set of their own."""


def load_dataset(
    kind: str, path: Path | str | None, test_fraction: float, seed: int, args: Mapping[str, Any] | None = None
) -> Dataset:
    """Read and check a data set. `kind` is a name in `DATASETS`, or a user's `package.module:function`, which may
    also return `(x_train, y_train, x_test, y_test)`, or `(x, y)` to be split.

    ConfigError for arguments the kind does not take; DataError for data that are missing, unreadable or inconsistent.
    """
    function = DATASETS.get(kind)
    if not 0.0 < test_fraction < 1.0:
        raise ConfigError(f"data.test_fraction = {test_fraction} must lie between 0 and 1")
    what = f"data set {kind!r}"
    source = None if path is None else Path(path).expanduser()
    result = call_with(what, function, (source, test_fraction, seed), args or {})
    try:
        if isinstance(result, tuple | list) and len(result) == 2:
            result = split_dataset(*result, test_fraction=test_fraction, seed=seed)
        elif isinstance(result, tuple | list) and len(result) == 4:
            result = dataset_of(*result)
        elif not isinstance(result, Dataset):
            raise DataError(f"returned {type(result).__name__}; return a Dataset, (x_train, y_train, x_test, y_test) or (x, y)")
        check_dataset(result)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
    return result


def normalise(batch_x: np.ndarray, dataset: Dataset) -> np.ndarray:
    """What a model is fed: `uint8[b, C, H, W]` becomes `f32 (x / 255 - mean) / std`; other dtypes pass through."""
    if batch_x.dtype != np.uint8:
        return batch_x
    mean = np.asarray(dataset.mean or (0.0,))
    std = np.asarray(dataset.std or (1.0,))
    scale = (1.0 / (255.0 * std)).astype(np.float32).reshape(-1, 1, 1)
    shift = (mean / std).astype(np.float32).reshape(-1, 1, 1)
    result = batch_x.astype(np.float32)
    result *= scale
    result -= shift
    return result


def dataset_of(x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Dataset:
    """A `Dataset` of array-likes: casts to its dtypes, gives `uint8[n, H, W]` a channel, counts classes and measures
    `mean` and `std`. DataError for what cannot be cast without a guess."""
    x_train, x_test = _samples(x_train, "x_train"), _samples(x_test, "x_test")
    y_train, y_test = _labels(y_train, "y_train"), _labels(y_test, "y_test")
    num_classes = 1 + max((int(y.max()) for y in (y_train, y_test) if y.size), default=0)
    dataset = Dataset(x_train, y_train, x_test, y_test, num_classes)
    if x_train.dtype == np.uint8 and x_train.ndim == 4 and x_train.size:
        mean, std = channel_statistics(x_train)
        dataset = replace(dataset, mean=mean, std=std)
    return dataset


def split_dataset(x: Any, y: Any, *, test_fraction: float, seed: int) -> Dataset:
    """Cut `(x, y)` into training and test samples; stratified by class where `y` is `[n]`; the seed decides."""
    x, y = _samples(x, "x"), _labels(y, "y")
    if len(x) != len(y) or len(x) < 2:
        raise DataError(f"x holds {len(x)} samples and y {len(y)}; both must hold the same number, 2 at least")
    is_test = np.zeros(len(y), dtype=bool)
    is_test[_test_indices(y, test_fraction, generator(seed, "split"))] = True
    return dataset_of(x[~is_test], y[~is_test], x[is_test], y[is_test])


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of `images / 255` per channel; `images` is `uint8[n, C, H, W]`."""
    levels = np.arange(256) / 255.0
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)  # a histogram is exact, and a slice at a time needs little memory
        for start in range(0, len(images), 4096):
            counts += np.bincount(images[start : start + 4096, channel].ravel(), minlength=256)
        share = counts / counts.sum()
        centre = float(share @ levels)
        mean.append(centre)
        std.append(float(np.sqrt(share @ (levels - centre) ** 2)) or 1.0)  # a constant channel stays finite
    return tuple(mean), tuple(std)


def required_path(path: Path | None, kind: str, expected: str) -> Path:
    """`path` if it exists; DataError says what the kind expects there."""
    if path is None:
        raise DataError(f"data.path is not set; data.kind = {kind!r} needs {expected}")
    if not path.exists():
        raise DataError(f"data.path = {str(path)!r} does not exist; data.kind = {kind!r} needs {expected}")
    return path


def no_path(path: Path | None, kind: str) -> None:
    """DataError when a path is given to a kind that reads none: else one would train on other data than one thinks."""
    if path is not None:
        raise DataError(f"data.path = {str(path)!r} is not read by data.kind = {kind!r}; drop it or name another kind")


def check_dataset(dataset: Dataset) -> None:
    """DataError for what breaks the promises of `Dataset`: shapes, dtypes, label range, finite values."""
    for part in ("train", "test"):
        x, y = getattr(dataset, f"x_{part}"), getattr(dataset, f"y_{part}")
        for name, array in ((f"x_{part}", x), (f"y_{part}", y)):
            if not isinstance(array, np.ndarray):
                raise DataError(f"{name} is a {type(array).__name__}, not a numpy array; convert it by numpy.asarray")
            if len(array.shape) == 0 or len(array) == 0:
                raise DataError(f"{name} is empty; a data set needs training and test samples")
        if len(x) != len(y):
            raise DataError(f"x_{part} holds {len(x)} samples but y_{part} {len(y)}; give a label for each sample")
        if x.shape[1:] != dataset.x_train.shape[1:] or x.dtype != dataset.x_train.dtype:
            raise DataError(
                f"x_test is {x.dtype}{list(x.shape[1:])} per sample but x_train "
                f"{dataset.x_train.dtype}{list(dataset.x_train.shape[1:])}; both must agree"
            )
        _check_samples(f"x_{part}", x)
        _check_labels(f"y_{part}", y, x, dataset.num_classes)
    _check_keys(dataset)
    _check_statistics(dataset)


def _check_samples(name: str, x: np.ndarray) -> None:
    if x.dtype == np.uint8 and x.ndim == 4:
        return
    if x.dtype == np.int64 and x.ndim == 2:
        if x.min() < 0:
            raise DataError(f"{name} holds the token {x.min()}; tokens count from 0 (features must be float32)")
    elif x.dtype == np.float32 and x.ndim >= 2:
        if not all(np.isfinite(x[start : start + 4096]).all() for start in range(0, len(x), 4096)):
            raise DataError(f"{name} holds values that are not finite; clean or impute them first")
    else:
        raise DataError(
            f"{name} is {x.dtype}{list(x.shape)}; give uint8[n, C, H, W] images, float32[n, ...] or int64[n, T] tokens"
        )


def _check_labels(name: str, y: np.ndarray, x: np.ndarray, num_classes: int) -> None:
    if y.dtype != np.int64 or (y.ndim != 1 and not (y.ndim == 2 and x.dtype == np.int64 and y.shape == x.shape)):
        raise DataError(f"{name} is {y.dtype}{list(y.shape)}; give int64 classes [n], or [n, T] next tokens as x is")
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0 or highest >= num_classes:
        allowed = f"{num_classes} classes allow 0 to {num_classes - 1}"
        raise DataError(f"{name} holds labels {lowest} to {highest}; {allowed}: mend the labels or num_classes")
    if y.ndim == 2 and int(x.max()) >= num_classes:
        raise DataError(f"the token {int(x.max())} beside {name} is outside the vocabulary of {num_classes}")


def _check_keys(dataset: Dataset) -> None:
    keys = dataset.keys
    if keys is None:
        return
    if not isinstance(keys, np.ndarray) or keys.dtype != np.int64 or keys.shape != (len(dataset.x_train),):
        raise DataError(f"keys must be int64[{len(dataset.x_train)}], one owner for each training sample")
    if keys.min() < 0:
        raise DataError(f"keys holds {keys.min()}; owners count from 0")


def _check_statistics(dataset: Dataset) -> None:
    if dataset.mean is None and dataset.std is None:
        return
    if dataset.x_train.dtype != np.uint8:
        raise DataError("mean and std apply to uint8 images only; normalise other samples beforehand")
    channels = dataset.x_train.shape[1]
    mean, std = dataset.mean or (), dataset.std or ()
    if len(mean) != channels or len(std) != channels or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise DataError(f"mean = {mean} and std = {std} must give {channels} finite values each, std above 0")


def _samples(values: Any, name: str) -> np.ndarray:
    """`values` as uint8, float32 or int64, by the kind of its dtype."""
    x = _array(values, name)
    if x.dtype == np.uint8:
        return x[:, None] if x.ndim == 3 else x
    if x.dtype.kind == "f":
        return x.astype(np.float32, copy=False)
    if x.dtype.kind in "iu" and x.ndim == 2:
        return x.astype(np.int64, copy=False)
    raise DataError(f"{name} is {x.dtype}{list(x.shape)}; images are uint8 or float, features float, tokens 2-D integers")


def _labels(values: Any, name: str) -> np.ndarray:
    y = _array(values, name)
    if y.dtype.kind not in "iub":
        raise DataError(f"{name} is {y.dtype}{list(y.shape)}; labels are integers from 0")
    return y.astype(np.int64, copy=False)


def _array(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(f"{name} is no array ({error})") from error


def _test_indices(y: np.ndarray, test_fraction: float, rng: np.random.Generator) -> np.ndarray:
    """`round(n * test_fraction)` indices, at least 1 and at most n - 1; each class gives its share, rounded by
    largest remainder, where `y` is `[n]`."""
    num_test = min(max(round(len(y) * test_fraction), 1), len(y) - 1)
    order = rng.permutation(len(y))
    if y.ndim != 1:
        return order[:num_test]
    _, inverse, counts = np.unique(y[order], return_inverse=True, return_counts=True)
    ideal = counts * (num_test / len(y))
    quota = np.floor(ideal).astype(np.int64)
    by_remainder = np.argsort(quota - ideal, kind="stable")
    quota[by_remainder[: num_test - quota.sum()]] += 1
    chosen = [order[np.flatnonzero(inverse == c)[: quota[c]]] for c in range(len(counts))]
    return np.concatenate(chosen)
