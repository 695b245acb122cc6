"""Codecs that send some of the values, with their indices."""

from __future__ import annotations

import math
from abc import abstractmethod
from fractions import Fraction

import numpy as np

from gossipfl.errors import CodecError, ConfigError
from gossipfl.segments.codecs.base import CODECS, F32, Buffer, Codec, Decoded, check_vector, full_name, payload_of, split

_DEFAULT_RATIO = "0.1"


class SparseCodec(Codec):
    """Sends `num_selected(n)` of n values with their indices; subclasses choose which."""

    sparse = True
    item_bytes: int | None = None

    def __init__(self, name: str, ratio: Fraction) -> None:
        self.name = name
        self.ratio = ratio

    @abstractmethod
    def select(self, importance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Indices to send (sorted i64[k]), given how much each value matters (f32[n]; the sign does not count)."""

    def num_selected(self, n: int) -> int:
        """k = ceil(ratio n), at least one. `ratio` is a fraction: ceil(0.07 * 100) is 8 in floating point."""
        return min(n, max(1, math.ceil(self.ratio * n)))

    def num_bytes(self, n: int) -> int:
        return self.num_selected(n) * (_index_type(n).itemsize + 4)

    def encode(self, x: np.ndarray, selected: np.ndarray | None = None) -> memoryview:
        check_vector(x)
        k = self.num_selected(x.size)
        assert selected is not None and selected.size == k, f"{self.name} sends {k} of {x.size} values"
        payload = np.empty(self.num_bytes(x.size), np.uint8)
        indices, values = split(payload, k, _index_type(x.size), F32)
        indices[:] = selected
        values[:] = x[selected]
        return payload.data

    def decode(self, buffer: Buffer, n: int) -> Decoded:
        payload = payload_of(self, buffer, n)
        coded_indices, coded_values = split(payload, self.num_selected(n), _index_type(n), F32)
        indices = coded_indices.astype(np.int64)  # numpy indexes with int64, converting once is faster
        if indices.size and (indices[-1] >= n or not (indices[1:] > indices[:-1]).all()):
            raise CodecError(f"{self.name}: the indices are not in rising order below {n}")
        values, present = np.zeros(n, np.float32), np.zeros(n, np.bool_)
        values[indices] = coded_values
        present[indices] = True
        return Decoded(values, present)


class _TopK(SparseCodec):
    """The k most important values; of equal ones, those of the lowest index, on every machine."""

    def select(self, importance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        k = self.num_selected(importance.size)
        # The bits of a float without its sign order like its magnitude, and NaN last, so that k is always met. They
        # partition twice as fast as floats do. argpartition would break ties differently from machine to machine.
        magnitudes = importance.view(np.int32) & 0x7FFFFFFF
        threshold = np.partition(magnitudes, importance.size - k)[importance.size - k]
        chosen = magnitudes > threshold
        chosen[np.flatnonzero(magnitudes == threshold)[: k - np.count_nonzero(chosen)]] = True
        return np.flatnonzero(chosen)


class _RandomK(SparseCodec):
    """k values drawn uniformly without replacement; importance does not count."""

    def select(self, importance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        n = importance.size
        return np.sort(rng.choice(n, self.num_selected(n), replace=False, shuffle=False))


@CODECS.register("topk")
def _topk(argument: str) -> Codec:
    return _TopK(full_name("topk", argument), _ratio("topk", argument))


@CODECS.register("randomk")
def _randomk(argument: str) -> Codec:
    return _RandomK(full_name("randomk", argument), _ratio("randomk", argument))


def _ratio(kind: str, argument: str) -> Fraction:
    """The share of the values to send, exactly as written in decimal."""
    try:
        ratio = float(argument or _DEFAULT_RATIO)
    except ValueError:
        ratio = math.nan
    if not 1e-9 <= ratio <= 1.0:
        raise ConfigError(f"codec '{kind}:{argument}': the ratio is a share of the values from 1e-9 to 1, as in '{kind}:0.1'")
    return Fraction(str(ratio))


def _index_type(n: int) -> np.dtype:
    return np.dtype("<u2" if n <= 65_536 else "<u4")
