"""Data sets on disk: one folder of `.npy` files and a `dataset.json`, written once, mapped read-only by every peer.

A folder appears under its name only when it is complete: it is written beside it and renamed. No pickle is written
or read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gossipfl.errors import DataError
from gossipfl.learning.datasets.dataset import DATASETS, Dataset, check_dataset, load_dataset

log = logging.getLogger(__name__)

_FORMAT = 1  # of the folder, and of what the kinds read into it: raise it when either changes
_ARRAYS = ("x_train", "y_train", "x_test", "y_test", "keys")


def prepare_dataset(
    kind: str,
    path: Path | str | None,
    test_fraction: float,
    seed: int,
    args: Mapping[str, Any] | None,
    cache: Path,
) -> Path:
    """The folder in `cache` that holds this data set, converted first if it is not there yet.

    Its name is a digest of everything the result depends on, the size and time of the source files among it, so a
    changed source is converted anew. Processes that ask at once wait for the first one. Errors of `load_dataset`.
    """
    args = dict(args or {})
    with _keeping(cache):
        cache.mkdir(parents=True, exist_ok=True)
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', kind)}-{_digest(kind, path, test_fraction, seed, args)}"
    folder = cache / name
    if _problem(folder) is None:
        return folder
    with _locked(cache / f".{name}.lock"):
        if _problem(folder) is None:
            return folder
        dataset = load_dataset(kind, path, test_fraction, seed, args)
        if folder.exists():  # damaged: our own writes appear complete
            shutil.rmtree(folder)
        log.info("converting data set %s into %s", kind, folder)
        with _keeping(folder):
            _write(dataset, folder)
    return folder


def save_dataset(dataset: Dataset, folder: Path) -> None:
    """Check `dataset` and write it to a new `folder`, which appears complete or not at all; DataError if it exists."""
    if folder.exists():
        raise DataError(f"{folder} exists already; remove it or save elsewhere")
    check_dataset(dataset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _write(dataset, folder)


def open_dataset(folder: Path) -> Dataset:
    """Map a saved data set read-only. DataError if files are missing or cut short."""
    problem = _problem(folder)
    if problem is not None:
        raise DataError(f"{folder} is no complete data set ({problem}); remove it and prepare it again")
    about = json.loads((folder / "dataset.json").read_text())
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in about["arrays"]}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} cannot be read ({error}); remove it and prepare it again") from error
    return Dataset(
        **arrays,
        num_classes=about["num_classes"],
        mean=None if about["mean"] is None else tuple(about["mean"]),
        std=None if about["std"] is None else tuple(about["std"]),
    )


def _digest(kind: str, path: Path | str | None, test_fraction: float, seed: int, args: dict[str, Any]) -> str:
    """16 hexadecimal digits over all that decides the content of a prepared folder."""
    source = None if path is None else Path(path).expanduser().resolve()
    files = [] if source is None else _stamps(source)
    basis = [_FORMAT, kind, str(source), [*files, *_stamps_of(DATASETS.get(kind))], test_fraction, seed, args]
    text = json.dumps(basis, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _stamps_of(function: Callable[..., Any]) -> list[Any]:
    """A function of the user's is a source too, by its file, or by its text where there is none, as in a notebook."""
    if getattr(function, "__module__", "").startswith("gossipfl."):
        return []
    with contextlib.suppress(TypeError, OSError):
        return _first_stamps(function)
    return []


@lru_cache
def _first_stamps(function: Callable[..., Any]) -> list[Any]:
    """As the file was when it was first asked for: what it is changed to later is not what has been loaded."""
    file = inspect.getsourcefile(function)
    return _stamps(Path(file or os.devnull)) or [inspect.getsource(function)]


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change in ns of a file, or of all files below a folder."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names] or [str(path)]
    found = [(file, os.stat(file)) for file in sorted(files) if os.path.isfile(file)]
    return [(file, about.st_size, about.st_mtime_ns) for file, about in found]


def _problem(folder: Path) -> str | None:
    """What keeps `folder` from being a complete data set, or None. Looks at sizes, not at contents."""
    try:
        about = json.loads((folder / "dataset.json").read_text())
        if about["format"] != _FORMAT:
            return f"its format is {about['format']}, this version reads {_FORMAT}"
        for name, num_bytes in about["arrays"].items():
            found = (folder / f"{name}.npy").stat().st_size
            if found != num_bytes:
                return f"{name}.npy has {found} of {num_bytes} bytes"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"dataset.json is damaged: {error}"
    return None


def _write(dataset: Dataset, folder: Path) -> None:
    """Write beside `folder`, then rename; if another process was faster, its complete folder stays."""
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        num_bytes = {}
        for name in _ARRAYS:
            array = getattr(dataset, name)
            if array is not None:
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
                num_bytes[name] = (temporary / f"{name}.npy").stat().st_size
        about = {
            "format": _FORMAT,
            "num_classes": dataset.num_classes,
            "mean": dataset.mean,
            "std": dataset.std,
            "arrays": num_bytes,
        }
        (temporary / "dataset.json").write_text(json.dumps(about, indent=2) + "\n")
        try:
            os.rename(temporary, folder)
        except OSError:
            if _problem(folder) is not None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system drops it when the process dies."""
    with _keeping(path):
        path.touch()
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: both convert, the rename decides
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _keeping(path: Path) -> Iterator[None]:
    """What fails within to be written to `path` is a DataError that tells where else to keep data sets."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be written: {reason}; mend that, or set GOSSIPFL_CACHE") from error
