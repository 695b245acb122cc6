"""Model files: safetensors, written atomically, with the order of the tensors kept so that the flat vector comes back."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gossipfl._version import __version__
from gossipfl.errors import DataError, RunError
from gossipfl.segments.layout import Layout


def model_bytes(layout: Layout, vector: np.ndarray, **metadata: str) -> bytes:
    """The safetensors file of `vector` (f32[P]), its tensors under the model's own names."""
    tensors = layout.tensors(np.ascontiguousarray(vector))
    order = json.dumps([entry.name for entry in layout.entries])
    return save(tensors, {"order": order, "gossipfl": __version__, **metadata})


def save_model(path: Path, layout: Layout, vector: np.ndarray, **metadata: str) -> None:
    """Write `vector` (f32[P]) to `path`, which is there whole or not at all. RunError where that fails."""
    with writing(path):
        write_atomically(path, model_bytes(layout, vector, **metadata))


def load_model(path: Path) -> tuple[Layout, np.ndarray]:
    """The layout and the vector (f32[P]) of a file that `save_model` wrote. DataError if it is no such file."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = json.loads((file.metadata() or {})["order"])
            if not isinstance(names, list) or sorted(map(str, names)) != sorted(file.keys()):
                raise DataError(f"{path} is no model file of gossipfl: its list of tensors does not fit its tensors")
            tensors = [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no model file of gossipfl: {error}") from error
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.dtype != np.float32:
            raise DataError(f"{path}: {name} is {tensor.dtype}; models are float32")
    layout = Layout.of((name, tensor.shape) for name, tensor in zip(names, tensors, strict=True))
    return layout, np.concatenate([np.empty(0, np.float32), *(tensor.reshape(-1) for tensor in tensors)])


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails within to be written to `path` is a RunError that names it: a full disk, say."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{path} cannot be written: {reason}; mend that, or choose another folder") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a torn one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
