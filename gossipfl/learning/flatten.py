"""A torch model as one flat vector and back, for models that stay their owner's (`training.FlatModel` is for ours)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from gossipfl.errors import LayoutError
from gossipfl.segments.layout import Layout
from gossipfl.segments.quantization import tensor


def travelling_tensors(model: nn.Module, buffers: str = "average") -> list[tuple[str, torch.Tensor]]:
    """What travels, in order: the parameters, then with `buffers = "average"` the float buffers (BatchNorm statistics)."""
    parameters = list(model.named_parameters())
    if not parameters:
        raise LayoutError(f"{type(model).__name__} has no parameters to train")
    return parameters + (float_buffers(model) if buffers == "average" else [])


def float_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Integer buffers (counters) are each peer's own."""
    return [(name, values) for name, values in model.named_buffers() if values.is_floating_point()]


def layout_of(model: nn.Module, buffers: str = "average") -> Layout:
    return Layout.of((name, values.shape) for name, values in travelling_tensors(model, buffers))


def flatten(model: nn.Module, buffers: str = "average") -> np.ndarray:
    """The model's values as a fresh f32[P]."""
    tensors = [values.detach().reshape(-1).float().cpu() for _, values in travelling_tensors(model, buffers)]
    return torch.cat(tensors).numpy()


def unflatten_(model: nn.Module, vector: np.ndarray, buffers: str = "average") -> None:
    """Write `vector` (f32[P]) into the model's tensors. LayoutError if it does not fit."""
    tensors = travelling_tensors(model, buffers)
    views = layout_of(model, buffers).tensors(vector)
    with torch.no_grad():
        for name, values in tensors:
            values.copy_(tensor(views[name]))
