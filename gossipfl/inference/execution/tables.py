"""The offline half of QPART: how many bits each layer and each cut needs for an allowed loss of accuracy.

Li, Ghafouri, Ji, Vandierendonck, John and Nikolopoulos, "QPART: Adaptive Model Quantization and Dynamic Workload Balancing for
Accuracy-aware Edge Inference" (arXiv 2506.23934), Algorithm 1. The closed form (`planning.bits`) turns a budget of noise into
bits. Which budget keeps within which loss is not taken from a formula, for the noise of few bits does not add up: it is
measured for every cut, on samples that were not trained on.

What is counted is harm, the share of samples that the full model has right and the quantized one wrong, which is at least the
loss of accuracy. With k of n samples harmed, bits are said to keep within `(k + 1) / (n + 1)`: the mean harm of new samples is
at most that, where harm grows with the budget (conformal risk control; Angelopoulos, Bates, Fisch, Lei and Schuster, arXiv
2208.02814).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.sensitivity import BATCH, Sensitivity, quantized, rounded
from gossipfl.inference.planning.bits import allocate_bits

LEVELS = (0.002, 0.005, 0.01, 0.02, 0.05)
"""Losses of accuracy that tables are made for."""
BUDGETS = tuple(2.0 ** (power / 2) for power in range(-16, 21))
"""Noise in units of what changes REFERENCE_CHANGE of the classes; each a quarter of a bit less in every layer."""
LEAST_BITS, MOST_BITS = 2, 16

Bits = tuple[tuple[int, ...], int]
"""Of the weights of the device's layers, and of the values at the cut (0 where nothing is cut)."""


@dataclass(frozen=True, slots=True)
class Row:
    """The fewest bits found for one cut that keep within a level; `harm` is what they were measured to keep within."""

    weight_bits: tuple[int, ...]
    activation_bits: int
    harm: float


def bits_for(sensitivity: Sensitivity, chain: Chain, cut: int, budget: float) -> Bits:
    """The bits of layers 1..cut and of the values at the cut that keep within `budget` with the fewest bits in all."""
    profile = chain.profile
    noise = [curve.relative for curve in sensitivity.weights[:cut]]
    sizes = [layer.num_weights for layer in profile.layers[:cut]]
    if cut < len(profile.layers):
        noise.append(sensitivity.cuts[cut].relative)
        sizes.append(profile.num_cut(cut))
    bits = allocate_bits(noise, sizes, budget, LEAST_BITS, MOST_BITS)
    return (bits[:cut], bits[cut]) if cut < len(profile.layers) else (bits, 0)


def planned_scores(chain: Chain, vector: np.ndarray, cut: int, bits: Bits, inputs: np.ndarray) -> np.ndarray:
    """Scores (f32[n, K]) of `inputs` with layers 1..cut quantized, the cut rounded, and the rest as it is."""
    weight_bits, activation_bits = bits
    last = len(chain.profile.layers)
    device = chain.stage(0, cut, quantized(chain, vector, weight_bits)) if cut else None
    server = chain.stage(cut, last, vector) if cut < last else None
    scores = []
    with torch.no_grad():
        for start in range(0, len(inputs), BATCH):
            live: tuple[torch.Tensor, ...] = (torch.from_numpy(np.ascontiguousarray(inputs[start : start + BATCH])),)
            if device is not None:
                live = device(*live)
            if server is not None:
                live = server(*(rounded(live, activation_bits) if activation_bits else live))
            scores.append(live[0].numpy())
    return np.concatenate(scores)


def make_tables(
    chain: Chain,
    vector: np.ndarray,
    sensitivity: Sensitivity,
    inputs: np.ndarray,
    labels: np.ndarray | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[float, dict[int, Row]]:
    """Rows by level and cut (0..L), measured on `inputs` (f32[n, *input_shape]).

    Without labels (i64[n]) every change of class counts as harm. A level that n samples cannot vouch for, or a cut at which no
    budget keeps within it, is left out.
    """
    full = planned_scores(chain, vector, 0, ((), 0), inputs).argmax(1)
    is_right = full == (full if labels is None else labels)
    levels = [level for level in LEVELS if len(inputs) >= smallest_samples(level)]
    tables: dict[float, dict[int, Row]] = {level: {} for level in levels}
    last = len(chain.profile.layers)
    places = dict.fromkeys(levels, 0)  # where the search begins: where it ended for the cut before
    for cut in range(last + 1):
        known: dict[Bits, float] = {}

        def row(place: int, cut: int = cut, known: dict[Bits, float] = known) -> Row:
            bits = bits_for(sensitivity, chain, cut, BUDGETS[place])
            if bits not in known:
                found = planned_scores(chain, vector, cut, bits, inputs).argmax(1)
                known[bits] = (float((is_right & (found != full)).sum()) + 1) / (len(inputs) + 1)
            return Row(*bits, known[bits])

        for level in levels:
            place = places[level]
            while place >= 0 and row(place).harm > level:
                place -= 1
            while 0 <= place < len(BUDGETS) - 1 and row(place + 1).harm <= level:
                place += 1
            if place >= 0:
                tables[level][cut] = row(place)
            places = {other: max(start, place, 0) if other >= level else start for other, start in places.items()}
        progress((cut + 1) / (last + 1))
    return tables


def smallest_samples(level: float) -> int:
    """Samples without any harm that it takes to vouch for a loss of `level`."""
    return math.ceil(1 / level) - 1


def payload_bits(chain: Chain, cut: int, bits: Bits) -> tuple[int, int]:
    """What goes over the link for one request whose weights are not there yet, scales included, and the same in float32."""
    profile, (weight_bits, activation_bits) = chain.profile, bits
    layers = profile.layers[:cut]
    weights = sum(layer.num_weights * b + 32 * layer.channels for layer, b in zip(layers, weight_bits, strict=True))
    biases = sum(32 * (layer.bias[1] - layer.bias[0]) for layer in layers if layer.bias)
    live = len(profile.layers[cut - 1].live) if cut else 1
    values = profile.num_cut(cut)
    activations = values * activation_bits + 64 * live * (values > 0)
    full = 32 * (sum(layer.num_weights for layer in layers) + values) + biases
    return weights + biases + activations, full
