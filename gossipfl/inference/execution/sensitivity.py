"""How much the scores change when one layer's weights, or the values at one cut, are quantized and nothing else is.

Zhou, Moosavi-Dezfooli, Cheung and Frossard, "Adaptive Quantization for Deep Neural Network" (AAAI 2018, arXiv 1712.01048), on
which QPART builds: the squared change of the scores falls fourfold with each bit, `energy * 4^-bits`, and the changes of
several layers add up. Robustness is the change that a layer alone may cause before REFERENCE_CHANGE of the classes change, over
the mean squared distance from the scores to the nearest change of class, `(z_1 - z_2)^2 / 2`. We count changed classes where
the paper counts lost accuracy, which takes labels and is noisier.

Everything is measured end to end, so that residual links and what follows a layer are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gossipfl.inference.execution.activations import decode_live, encode_live
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.planning.profile import LayerProfile
from gossipfl.segments.codecs import codec

BITS = (2, 3, 4, 5, 6, 8)
"""Precisions that a layer's curve is measured at; its energy is taken from those of FINE or more."""
FINE = 5
REFERENCE_CHANGE = 0.01
BATCH = 128
Live = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Of one layer or cut, quantized to BITS alone: mean squared change of the scores, and share of changed classes."""

    energy: float
    """Squared change at 0 bits, by the law 4^-bits."""
    robustness: float
    squared_change: tuple[float, ...]
    changed: tuple[float, ...]

    @property
    def relative(self) -> float:
        """`s_l / rho_l` of the constraint: noise in units of what the layer withstands."""
        return self.energy / self.robustness


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Curves of the weights of layers 1..L and of the values at cuts 0..L-1."""

    weights: tuple[Curve, ...]
    cuts: tuple[Curve, ...]


def measure(
    chain: Chain, vector: np.ndarray, inputs: np.ndarray, progress: Callable[[float], None] = lambda share: None
) -> Sensitivity:
    """The sensitivity of `chain` with weights `vector` (f32[P]) on `inputs` (f32[n, *input_shape])."""
    layers = chain.profile.layers
    exact = [chain.stage(index, index + 1, vector) for index in range(len(layers))]
    coarse = [
        [chain.stage(index, index + 1, with_quantized(vector, layer, bits)) for bits in BITS]
        for index, layer in enumerate(layers)
    ]
    sums = np.zeros((2, len(layers), len(BITS), 2))  # weights or cut; layer; bits; squared change, changed classes
    distance = 0.0
    with torch.no_grad():
        for done, batch in _batches(inputs):
            live = [(batch,)]
            for layer_ in exact:
                live.append(layer_(*live[-1]))
            scores = live[-1][0]
            top = scores.topk(2).values
            distance += float((0.5 * (top[:, 0] - top[:, 1]) ** 2).sum())
            for index in range(len(layers)):
                for place, bits in enumerate(BITS):
                    after = _run(exact[index + 1 :], coarse[index][place](*live[index]))
                    sums[0, index, place] += _change(scores, after)
                    sums[1, index, place] += _change(scores, _run(exact[index:], rounded(live[index], bits)))
            progress(done / len(inputs))
    means = sums / len(inputs)
    weights, cuts = ([_curve(rows[:, 0], rows[:, 1], distance / len(inputs)) for rows in part] for part in means)
    return Sensitivity(tuple(weights), tuple(cuts))


def quantized(chain: Chain, vector: np.ndarray, weight_bits: tuple[int, ...]) -> np.ndarray:
    """`vector` with the weights of the first layers at these bits, as a device gets them."""
    for layer, bits in zip(chain.profile.layers, weight_bits, strict=False):
        vector = with_quantized(vector, layer, bits)
    return vector


def with_quantized(vector: np.ndarray, layer: LayerProfile, bits: int) -> np.ndarray:
    """A copy of `vector` with this layer's weights at `bits`; its bias stays as it is."""
    planes, weights = codec(f"planes:0-{bits}:{layer.group}"), slice(*layer.weight)
    result = vector.copy()
    result[weights] = np.asarray(planes.decode(planes.encode(vector[weights]), layer.num_weights).values)
    return result


def rounded(live: Live, bits: int) -> Live:
    """The live tensors as they come out at the other side of a cut."""
    arrays = [values.numpy() for values in live]
    payload = encode_live(arrays, bits)
    return tuple(map(torch.from_numpy, decode_live(payload, [values.shape[1:] for values in arrays], len(arrays[0]), bits)))


def _batches(inputs: np.ndarray) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(inputs), BATCH):
        batch = torch.tensor(inputs[start : start + BATCH])
        yield start + len(batch), batch


def _run(layers: Sequence[nn.Module], live: Live) -> Tensor:
    for layer in layers:
        live = layer(*live)
    return live[0]


def _change(scores: Tensor, others: Tensor) -> tuple[float, float]:
    """Sums over the batch."""
    return float(((scores - others) ** 2).sum()), float((scores.argmax(1) != others.argmax(1)).sum())


def _curve(squared: np.ndarray, changed: np.ndarray, distance: float) -> Curve:
    fine = [place for place, bits in enumerate(BITS) if bits >= FINE]
    energy = float(np.mean([4.0 ** BITS[place] * squared[place] for place in fine]))
    return Curve(energy, _withstood(squared, changed) / distance, tuple(squared.tolist()), tuple(changed.tolist()))


def _withstood(squared: np.ndarray, changed: np.ndarray) -> float:
    """The squared change at which REFERENCE_CHANGE of the classes change, between two measured points on logarithmic scales.

    Where the coarsest quantization changes fewer, its own: the layer withstands that much at least.
    """
    changed = np.maximum.accumulate(changed[::-1])[::-1]  # more bits never change more
    if changed[0] < REFERENCE_CHANGE:
        return max(float(squared[0]), np.finfo(np.float64).tiny)
    place = int(np.flatnonzero(changed >= REFERENCE_CHANGE)[-1])
    if place == len(BITS) - 1:
        return float(squared[place])
    above, below = max(changed[place + 1], 1e-4), changed[place]
    share = (np.log(REFERENCE_CHANGE) - np.log(above)) / max(np.log(below) - np.log(above), 1e-9)
    low, high = np.log(max(squared[place + 1], 1e-30)), np.log(max(squared[place], 1e-30))
    return float(np.exp(low + np.clip(share, 0, 1) * (high - low)))
