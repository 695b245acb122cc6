"""Carrying out a Merge: the own copy of a segment and the decoded copies of neighbours become the mixed one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gossipfl.aggregation import Aggregator, mean, shares_of
from gossipfl.errors import ConfigError
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
    mixed = aggregate(rows, [own_weight, *weights], out=out)
    if mixed is not out and mixed is not None:  # a user's rule that leaves `out` alone
        if np.shape(mixed) != out.shape:
            raise ConfigError(
                f"gossip.aggregation returned values of shape {np.shape(mixed)} for {len(rows)} copies of {out.size} values; "
                f"return an array of {out.size} values, or write them to `out` and return it"
            )
        out[:] = mixed


def check_writes(aggregate: Aggregator, name: str) -> None:
    """ConfigError for a rule, called `name`, that neither returns a mix nor writes it to `out`: a peer would keep garbage."""
    own, out = np.arange(8, dtype=np.float32), np.full(8, np.nan, np.float32)
    try:
        mixed = aggregate([own, own + 1, own + 3], [1.0, 1.0, 1.0], out=out)
    except Exception:  # it may be made for the sizes of a model's segments; what it raises there is told by the run
        return
    if mixed is None and np.isnan(out).any():
        raise ConfigError(
            f"gossip.aggregation = {name!r} returns None and leaves values of `out` unwritten; return an array of as many "
            "values as a copy has, or write them all to `out` and return it"
        )


class SegmentMix(NamedTuple):
    """What one segment is to be mixed from, besides the own copy."""

    range: Range
    own_weight: float
    copies: Copies


def mix_segments(aggregate: Aggregator, own: np.ndarray, mixes: Sequence[SegmentMix], out: np.ndarray) -> None:
    """`mix` for several segments of `own` (f32[P]), in their order, to the same bits.

    Where the segments make up the vector and each is the mean of as many copies, all are mixed at once: on small segments most
    of the time goes into calling numpy.
    """
    if aggregate is mean and _is_even(mixes, own.size):
        _mean_of_all(own, mixes, out)
        return
    for (start, stop), own_weight, copies in mixes:
        mix(aggregate, own[start:stop], own_weight, copies, out=out[start:stop])


def _is_even(mixes: Sequence[SegmentMix], size: int) -> bool:
    end = 0
    for (start, stop), own_weight, copies in mixes:
        if start != end or not own_weight or not copies or len(copies) != len(mixes[0].copies):
            return False
        if any(decoded.present is not None for decoded, _ in copies):
            return False
        end = stop
    return end == size


def _mean_of_all(own: np.ndarray, mixes: Sequence[SegmentMix], out: np.ndarray) -> None:
    """`mean`, with the same operations on each value: own - sum_i share_i (own - copy_i)."""
    shares = [_shares_of_copies((own_weight, *(weight for _, weight in copies))) for _, own_weight, copies in mixes]
    sizes = [stop - start for (start, stop), _, _ in mixes]
    total, term = np.empty((2, own.size), np.float32)
    for number, of_each in enumerate(zip(*shares, strict=True)):
        into = term if number else total
        np.concatenate([copies[number][0].values for _, _, copies in mixes], out=into)
        np.subtract(own, into, out=into)
        np.multiply(into, of_each[0] if len(set(of_each)) == 1 else np.repeat(np.array(of_each), sizes), out=into)
        if number:
            np.add(total, term, out=total)
    np.subtract(own, total, out=out)


@lru_cache(maxsize=4096)
def _shares_of_copies(weights: tuple[float, ...]) -> Sequence[np.float32]:
    """Kept, for peers have the same few weights round after round."""
    return shares_of(weights)[1:]
