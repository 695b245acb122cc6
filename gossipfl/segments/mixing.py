"""Carrying out a Merge: the own copy of a segment and the decoded copies of neighbours become the mixed one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gossipfl.aggregation import Aggregator
from gossipfl.segments.codecs import Decoded


def mix(
    aggregate: Aggregator,
    own: np.ndarray,
    own_weight: float,
    copies: Sequence[tuple[Decoded, float]],
    out: np.ndarray,
) -> None:
    """Write the mix of `own` (f32[n]) and `copies` into `out` (f32[n]).

    A copy from a sparse codec counts only at the coordinates that it holds. With `own_weight` = 0 (adopting) the own copy
    serves only the coordinates that no copy holds.
    """
    if not copies:
        out[:] = own
        return
    rows = [own, *(decoded.values for decoded, _ in copies)]
    if own_weight and all(decoded.present is None for decoded, _ in copies):
        aggregate(rows, np.array([own_weight, *(weight for _, weight in copies)]), out=out)
        return
    weights = np.empty((len(rows), own.size), np.float32)
    for row, (decoded, weight) in zip(weights[1:], copies, strict=True):
        row[:] = weight if decoded.present is None else weight * decoded.present
    weights[0] = own_weight or (weights[1:].sum(axis=0) == 0)
    if own_weight:
        aggregate(rows, weights, out=out)
    else:  # adopting takes the copies as they are, whatever the rule
        np.divide((np.stack(rows) * weights).sum(axis=0), weights.sum(axis=0), out=out)
