"""Carrying out a Merge: the own copy of a segment and the decoded copies of neighbours become the mixed one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gossipfl.aggregation import Aggregator, mean, shares_of
from gossipfl.segments.codecs import Decoded
from gossipfl.segments.layout import Range

Copies = Sequence[tuple[Decoded, float]]
"""What neighbours sent, and the weight of each."""


def mix(
    aggregate: Aggregator,
    own: np.ndarray,
    own_weight: float,
    copies: Copies,
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


class SegmentMix(NamedTuple):
    """What one segment is to be mixed from, besides the own copy."""

    range: Range
    own_weight: float
    copies: Copies


def mix_segments(aggregate: Aggregator, own: np.ndarray, mixes: Sequence[SegmentMix], out: np.ndarray) -> None:
    """`mix` for several segments of `own` (f32[P]), in their order, to the same bits.

    Where all are mixed by their mean, all at once: on small segments most of the time goes into calling numpy.
    """
    covered = sum(mix_.range[1] - mix_.range[0] for mix_ in mixes)
    if aggregate is mean and covered == own.size and all(map(_is_plain, mixes)):
        _mean_of_all(own, mixes, out)
        return
    for (start, stop), own_weight, copies in mixes:
        mix(aggregate, own[start:stop], own_weight, copies, out=out[start:stop])


def _is_plain(mix_: SegmentMix) -> bool:
    return bool(mix_.own_weight) and all(decoded.present is None for decoded, _ in mix_.copies)


def _mean_of_all(own: np.ndarray, mixes: Sequence[SegmentMix], out: np.ndarray) -> None:
    """`mean`, with the same operations on each value: own - sum_i share_i (own - copy_i)."""
    shares = [shares_of([mix_.own_weight, *(weight for _, weight in mix_.copies)])[1:] for mix_ in mixes]
    sizes = [mix_.range[1] - mix_.range[0] for mix_ in mixes]
    total, terms = np.zeros((2, own.size), np.float32)
    places = [(own[start:stop], terms[start:stop]) for (start, stop), _, _ in mixes]
    for number in range(max(map(len, shares))):
        for (values, term), mix_ in zip(places, mixes, strict=True):
            if number < len(mix_.copies):
                np.subtract(values, mix_.copies[number][0].values, out=term)
            else:
                term.fill(0.0)  # changes nothing: a sum that began with +0 is never -0
        of_each = [own_shares[number] if number < len(own_shares) else np.float32(0.0) for own_shares in shares]
        share = of_each[0] if len(set(of_each)) == 1 else np.repeat(np.array(of_each), sizes)
        np.multiply(terms, share, out=terms)
        np.add(total, terms, out=total)
    np.subtract(own, total, out=out)
