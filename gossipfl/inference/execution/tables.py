"""The offline half of QPART: how many bits each layer and each cut needs for an allowed loss of accuracy.

Li, Ghafouri, Ji, Vandierendonck, John and Nikolopoulos, "QPART: Adaptive Model Quantization and Dynamic Workload Balancing for
Accuracy-aware Edge Inference" (arXiv 2506.23934), Algorithm 1. The closed form (`planning.bits`) turns a budget of noise into
bits. Which budget keeps within which loss is not taken from a formula, for the noise of few bits does not add up: it is
measured for every cut, on samples that were not trained on.

What is counted is harm, the share of requests that the full model has right and the quantized one wrong, which is at least
the loss of accuracy. Bits are said to keep within a level if so few of n samples are harmed that, were the harm of requests
greater, no more would be with probability DELTA only (exact binomial). Budgets are tried in their order up to the first that
fails, so trying many does not add up (fixed-sequence testing; Angelopoulos, Bates, Candes, Jordan and Lei, arXiv 2110.01052),
as far as harm grows with the budget: to save time, the search for a cut begins where that for the cut before it ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import bdtri

from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.sensitivity import BATCH, Sensitivity, quantized, rounded
from gossipfl.inference.planning.bits import allocate_bits
from gossipfl.inference.planning.certificates import DELTA, samples_needed
from gossipfl.inference.planning.margins import Scale, differing, margins

LEVELS = (0.002, 0.005, 0.01, 0.02, 0.05)
"""Losses of accuracy that tables are made for."""
BUDGETS = tuple(2.0 ** (power / 2) for power in range(-16, 21))
"""Noise in units of what changes REFERENCE_CHANGE of the classes; each a quarter of a bit less in every layer."""
LEAST_BITS, MOST_BITS = 2, 16

Bits = tuple[tuple[int, ...], int]
"""Of the weights of the device's layers, and of the values at the cut (0 where nothing is cut)."""


@dataclass(frozen=True, slots=True)
class Row:
    """The fewest bits found for one cut that keep within a level.

    `harm` is the upper bound of what was measured, true with probability 1 - DELTA. `margins` f32[n] are of the samples that it
    was measured on; `differs` bool[n]: where the class is not the full model's.
    """

    weight_bits: tuple[int, ...]
    activation_bits: int
    harm: float
    margins: np.ndarray = field(compare=False, repr=False)
    differs: np.ndarray = field(compare=False, repr=False)


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
    scores = [np.zeros((0, chain.profile.num_classes), np.float32)]  # of no inputs
    with torch.no_grad():
        for start in range(0, len(inputs), BATCH):
            live: tuple[torch.Tensor, ...] = (torch.tensor(inputs[start : start + BATCH]),)
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
    scale: Scale = "softmax",
) -> dict[float, dict[int, Row]]:
    """Rows by level and cut (0..L), measured on `inputs` (f32[n, *input_shape]), with margins on `scale`.

    Without labels (i64[n]) every change of class counts as harm. A level that n samples cannot vouch for, or a cut at which no
    budget keeps within it, is left out.
    """
    full = planned_scores(chain, vector, 0, ((), 0), inputs).argmax(1)
    is_right = full == (full if labels is None else labels)
    levels = [level for level in LEVELS if len(inputs) >= samples_needed(level, DELTA)]
    tables: dict[float, dict[int, Row]] = {level: {} for level in levels}
    last = len(chain.profile.layers)
    places = dict.fromkeys(levels, 0)  # where the search begins: where it ended for the cut before
    for cut in range(last + 1):
        known: dict[Bits, Row] = {}

        def row(place: int, cut: int = cut, known: dict[Bits, Row] = known) -> Row:
            bits = bits_for(sensitivity, chain, cut, BUDGETS[place])
            if bits not in known:
                scores = planned_scores(chain, vector, cut, bits, inputs)
                differs = differing(scores.argmax(1), full)
                harm = harm_bound(int((is_right & differs).sum()), len(inputs))
                known[bits] = Row(*bits, harm, margins(scores, scale), differs)
            return known[bits]

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


def harm_bound(num_harmed: int, num_samples: int) -> float:
    """The greatest harm of which so few would be seen with probability DELTA or more (Clopper and Pearson, 1934)."""
    return float(bdtri(num_harmed, num_samples, DELTA)) if num_harmed < num_samples else 1.0
