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

    A copy from a sparse codec counts only at the coordinates that it holds. With `own_weight` = 0 (adopting) the one copy is
    taken as it is, and the own one serves only the coordinates that it does not hold.
    """
    if not copies or not own_weight:
        out[:] = own
        for decoded, _ in copies:
            np.copyto(out, np.asarray(decoded.values), where=True if decoded.present is None else decoded.present)
        return
    rows = [own, *(decoded.values for decoded, _ in copies)]
    weights = [weight if decoded.present is None else np.float32(weight) * decoded.present for decoded, weight in copies]
    aggregate(rows, [own_weight, *weights], out=out)
