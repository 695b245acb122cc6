"""Reduced models for hardware that is not here: the same model, computed less precisely, layer by layer.

    reduced = with_streams(model, samples, bits=8, seed=0)       # stochastic computing, streams of 2^8 bits
    reduced = with_integers(model, samples, bits=6)              # weights and activations of 6 bits
    reduced = with_mantissas(model, bits=2)                      # FP16 cut to FP8: 1 + 5 + 2 bits
    scores_of(reduced, inputs)                                   # f32[n, K]

The three are the kinds of reduced models of ARI (arXiv 2408.14528), which has the first and the last. `model` is any module
whose products are in Conv2d and Linear layers, such as a stage of a `Chain`; it is left as it is. Batch norm should be folded
beforehand, as a chain does. `samples` f32[n, *input_shape] set the range of each layer's inputs.

Stochastic computing (Gaines, "Stochastic Computing Systems", 1969): a value is the share of ones in a stream of N = 2^bits
random bits, and a gate multiplies two independent streams, p = w x. What an output's K product streams come to is counted
exactly (accumulative parallel counters), so that only the streams themselves are random: the sum has mean sum p_k and variance

    bipolar: -1..1, ones with probability (1 + v) / 2, XNOR         (K - sum p_k^2) / N
    signed: a sign, and ones with probability |v|, AND              sum |p_k| (1 - |p_k|) / N

In the bipolar coding a product of zero is as noisy as can be; with signs apart it is exact. What is computed is the mean plus
Gaussian noise of that variance (a sum of K N independent bits). Weights are scaled by the greatest of their output channel,
inputs by the greatest that the layer saw in `samples` (beyond it they saturate); scales and biases are applied to the counts,
exactly. Left out: the rounding of values to the 2^bits levels of a stream's generator, of variance about 4^-bits, and
what outputs that share a stream have in common.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossipfl.errors import ConfigError
from gossipfl.randomness import derived_seed

Layer = nn.Conv2d | nn.Linear
Compute = Callable[[Tensor], Tensor]
Coding = Literal["bipolar", "signed"]
BATCH = 256


def scores_of(model: Callable[[Tensor], Tensor | tuple[Tensor, ...]], inputs: Tensor) -> np.ndarray:
    """The scores (f32[n, K]) of `inputs`; of a stage, its only live tensor."""
    with torch.no_grad():
        found = [model(batch) for batch in inputs.split(BATCH)]
    return torch.cat([scores[0] if isinstance(scores, tuple) else scores for scores in found]).numpy()


def with_streams(model: nn.Module, samples: Tensor, bits: int, seed: int, coding: Coding = "signed") -> nn.Module:
    """The model in stochastic computing. It draws anew at each call; made anew of the same seed, it repeats itself."""
    _check_bits(bits, 6, 24)
    generator = torch.Generator().manual_seed(derived_seed(seed, "streams"))
    ranges = _input_ranges(model, samples)

    def change(name: str, layer: Layer) -> Compute:
        weight_scale = _greatest(layer.weight)
        input_scale = max(abs(end) for end in ranges[name]) or 1.0
        squares, sizes = copy.deepcopy(layer), copy.deepcopy(layer)
        squares.weight.copy_((layer.weight / weight_scale).square())
        sizes.weight.copy_((layer.weight / weight_scale).abs())
        squares.bias = sizes.bias = None
        num_products = layer.weight[0].numel()
        scale = (weight_scale * input_scale).flatten() / 2 ** (bits / 2)
        if isinstance(layer, nn.Conv2d):
            scale = scale[:, None, None]

        def compute(x: Tensor) -> Tensor:
            x = x.clamp(-input_scale, input_scale)
            most = sizes((x / input_scale).abs()) if coding == "signed" else num_products
            variance = most - squares((x / input_scale).square())
            noise = torch.randn(variance.shape, generator=generator)
            return layer(x) + scale * variance.clamp(min=0.0).sqrt() * noise

        return compute

    return _changed(model, change)


def with_integers(model: nn.Module, samples: Tensor, bits: int) -> nn.Module:
    """Weights and inputs of each layer rounded to `bits` bits: weights evenly within +- the greatest of their channel, inputs
    from 0 where none is negative, else within +- the greatest. Sums and biases are exact."""
    _check_bits(bits, 2, 16)
    ranges = _input_ranges(model, samples)

    def change(name: str, layer: Layer) -> Compute:
        rounded, most = copy.deepcopy(layer), 2 ** (bits - 1) - 1
        rounded.weight.copy_(_rounded(layer.weight, _greatest(layer.weight) / most, -most, most))
        low, high = ranges[name]
        least, most = (0, 2**bits - 1) if low >= 0.0 else (-most, most)
        step = torch.tensor(max(-low, high) / most or 1.0)
        return lambda x: rounded(_rounded(x, step, least, most))

    return _changed(model, change)


def with_mantissas(model: nn.Module, bits: int) -> nn.Module:
    """FP16 with mantissas cut to `bits` of their 10 bits (towards zero): weights, biases, inputs and outputs of each layer.
    Sums are exact. 10 is FP16, 2 is an FP8 with 5 bits of exponent."""
    _check_bits(bits, 0, 10)

    def change(name: str, layer: Layer) -> Compute:
        cut = copy.deepcopy(layer)
        for values in cut.parameters():
            values.copy_(_cut_mantissas(values, bits))
        return lambda x: _cut_mantissas(cut(_cut_mantissas(x, bits)), bits)

    return _changed(model, change)


class _Changed(nn.Module):
    """A layer that computes otherwise."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self._compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self._compute(x)


def _layers(model: nn.Module) -> dict[str, Layer]:
    found: dict[str, Layer] = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    if not found or "" in found:
        raise ConfigError(f"a {type(model).__name__} has no layers to change; give a model with Conv2d or Linear inside")
    return found


@torch.no_grad()
def _changed(model: nn.Module, change: Callable[[str, Layer], Compute]) -> nn.Module:
    """A copy of the model, with `change(name, layer)` in place of each layer."""
    reduced = copy.deepcopy(model).eval()
    for name, layer in _layers(reduced).items():
        reduced.set_submodule(name, _Changed(change(name, layer)))
    return reduced


def _input_ranges(model: nn.Module, samples: Tensor) -> dict[str, tuple[float, float]]:
    """The least and the greatest input of each layer."""
    ranges: dict[str, tuple[float, float]] = {}

    def watched(name: str, layer: Layer) -> Compute:
        def compute(x: Tensor) -> Tensor:
            least, greatest = ranges.get(name, (float("inf"), float("-inf")))
            ranges[name] = min(least, float(x.min())), max(greatest, float(x.max()))
            return layer(x)

        return compute

    scores_of(_changed(model, watched), samples)
    return ranges


def _greatest(weight: Tensor) -> Tensor:
    """The greatest magnitude of each output channel, f32[channels, 1, ...]; 1 where all are zero."""
    greatest = weight.flatten(1).abs().amax(1)
    return torch.where(greatest > 0, greatest, 1.0).view(-1, *[1] * (weight.ndim - 1))


def _rounded(values: Tensor, step: Tensor, least: int, most: int) -> Tensor:
    """To whole steps."""
    return (values / step).round().clamp(least, most) * step


def _cut_mantissas(values: Tensor, bits: int) -> Tensor:
    halves = values.clamp(-65504.0, 65504.0).half()
    return (halves.view(torch.int16) & -(1 << (10 - bits))).view(torch.float16).float()


def _check_bits(bits: int, least: int, most: int) -> None:
    if not least <= bits <= most:
        raise ConfigError(f"bits = {bits} must lie between {least} and {most}")
