"""Carrying out a Merge: the own copy of a segment and the decoded copies of neighbours become the mixed one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gossipfl.aggregation import AGGREGATORS, Aggregator
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
    weights = [weight if decoded.present is None else np.float32(weight) * decoded.present for decoded, weight in copies]
    if own_weight:
        aggregate(rows, [own_weight, *weights], out=out)
        return
    held = np.zeros(own.size, np.float32)  # adopting takes the copies as they are, whatever the rule
    for weight in weights:
        held += weight
    AGGREGATORS.get("mean")(rows, [(held == 0).astype(np.float32), *weights], out=out)
