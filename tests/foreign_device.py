"""A torch device that is not there: its tensors lie in main memory, but meet no tensor of the CPU, as those of a GPU do not.

    python foreign_device.py          # trains and evaluates on the CPU and on this device; JSON: what came to other values
    python foreign_device.py cuda     # the same on a device that is there

Moving a tensor is the only way from one to the other. Run as a program, for torch knows one such device in a process, for good.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from gossipfl.learning.central import train_centrally
from gossipfl.learning.cohort import CohortTask, choose_cohort
from gossipfl.learning.datasets import Dataset
from gossipfl.learning.training import Engine, Learner, TrainingConfig

NAME = "foreign"
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)  # a GPU takes indices from main memory


class Foreign(torch.Tensor):
    """Stands for `inner`, a tensor of the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Foreign:
        like = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like, device=torch.device(NAME, 0))
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        strangers = [value for value in tensors if value.dim() and not isinstance(value, Foreign)]
        if function in INDEXING and isinstance(args[0], Foreign):
            strangers = []
        if strangers and function not in MOVES:
            raise RuntimeError(f"{function}: a tensor of the CPU among those of another device: {list(strangers[0].shape)}")
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        args_, kwargs_ = tree_map(lambda value: value.inner if isinstance(value, Foreign) else value, (args, kwargs))
        result = function(*args_, **kwargs_)
        if target is not None and target.type == "cpu":
            return result.clone()
        if function is aten.copy_.default and not isinstance(args[0], Foreign):
            return args[0]
        known = {id(value.inner): value for value in tensors if isinstance(value, Foreign)}

        def wrapped(value):
            return known[id(value)] if id(value) in known else Foreign(value)

        return tree_map(lambda value: wrapped(value) if isinstance(value, torch.Tensor) else value, result)


class Moves(TorchFunctionMode):
    """What torch does with a real device's tensors before an operator sees them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own = args[0] if args and isinstance(args[0], Foreign) else None
        if function is torch.Tensor.to and own is None and _is_foreign(args[1:], kwargs):
            return Foreign(args[0].detach().clone())
        if own is not None and function == torch.Tensor.data.__set__:
            own.inner = args[1].inner
        elif own is not None and function is torch.Tensor.tolist:
            return own.inner.tolist()
        elif own is not None and function is torch.Tensor.__deepcopy__:
            copied = args[1][id(own)] = _parameter(own.inner) if isinstance(own, nn.Parameter) else Foreign(own.inner.clone())
            return copied.requires_grad_(own.requires_grad)
        return function(*args, **kwargs)


def _is_foreign(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(
        isinstance(value, str | torch.device) and torch.device(value).type == NAME for value in (*args, *kwargs.values())
    )


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(Foreign(values.detach().clone()), requires_grad=values.requires_grad)


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Foreign(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Foreign(torch.empty_strided(size, stride, dtype=dtype))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4))


MODELS: dict[Callable[[], nn.Module], tuple[int, ...]] = {batch_norm: (5,), perceptron: (2, 3), convolutional: (1, 8, 8)}
CONFIGS: list[dict[str, Any]] = [
    dict(momentum=0.9, weight_decay=0.1),
    dict(momentum=0.9, reset_optimizer=True, local_epochs=None, local_steps=3),
    dict(buffers="local"),
    dict(optimizer="adam"),
]


def dataset(shape: tuple[int, ...]) -> Dataset:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, *shape)).astype(np.float32), rng.integers(0, 4, 200)
    return Dataset(x, y, x[:90], y[:90], 4)


def outcome(model: Callable[[], nn.Module], kind: str, config: dict[str, Any], device: str) -> list[Any]:
    """What four peers with ragged shards come to in two rounds: vectors, losses, accuracies, and a central model's accuracy."""
    torch.manual_seed(0)
    engine = Engine(model(), TrainingConfig(device=device, batch_size=11, **config), dataset(MODELS[model]))
    cohort = choose_cohort(engine, kind)
    learners = [Learner(f"p{k}", np.arange(k * 30, k * 30 + 30 + k)) for k in range(4)]
    vectors = np.stack([cohort.initial_vector()] * 4)
    for round_ in (1, 2):
        losses = cohort.train(
            [CohortTask(learner, round_, row) for learner, row in zip(learners, vectors, strict=True)], vectors
        )
    accuracies = cohort.evaluate(vectors, learners) + cohort.evaluate(vectors, [None] * 4)
    return [vectors, losses, accuracies, train_centrally(engine, cohort.initial_vector(), 1, 2)]


def compared(device: str) -> dict[str, bool]:
    """By model, engine and settings, whether they come to the same on `device` as on the CPU."""
    found = {}
    for model in MODELS:
        for config in CONFIGS:
            for kind in ("loop", "stacked") if "optimizer" not in config else ("loop",):
                expected = outcome(model, kind, config, "cpu")
                with Moves() if device == NAME else contextlib.nullcontext():
                    there = outcome(model, kind, config, device)
                pairs = zip(expected, there, strict=True)
                found[f"{model.__name__}, {kind}, {config}"] = all(np.allclose(a, b, atol=1e-5) for a, b in pairs)
    return found


def refusal(device: str) -> str:
    """What the device says to a tensor of the CPU."""
    with Moves() if device == NAME else contextlib.nullcontext():
        try:
            torch.ones(3, device=device) + torch.ones(3)
        except RuntimeError as error:
            return str(error)
    return ""


def main(device: str = NAME) -> None:
    if device == NAME:
        _setup_privateuseone_for_python_backend(NAME)
        library = torch.library.Library("aten", "IMPL")
        library.impl("empty.memory_format", _empty, "PrivateUse1")
        library.impl("empty_strided", _empty_strided, "PrivateUse1")
    print(json.dumps(compared(device) | {"refusal": refusal(device)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
