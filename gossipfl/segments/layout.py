"""What travels: the named tensors of a model laid end to end in one flat vector, and the segments cut from it.

A gossip segment is a half-open range `(start, stop)` of that vector (Hu, Jiang and Wang, "Decentralized Federated
Learning: A Segmented Gossip Approach", arXiv 1908.07782: S non-overlapping segments). Both ends of a pull must agree
on the layout, so peers compare `Layout.digest` before they exchange anything.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from gossipfl.errors import ConfigError, LayoutError

Range = tuple[int, int]
"""Half-open range `(start, stop)` of the flat vector."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the model: its name and shape, and its range in the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The tensors that travel, in order. `size` (P) is the length of the flat vector, in float32 values."""

    entries: tuple[Entry, ...]

    @staticmethod
    def of(tensors: Iterable[tuple[str, Sequence[int]]]) -> Layout:
        """Lay out `(name, shape)` pairs end to end."""
        entries, start = [], 0
        for name, shape in tensors:
            stop = start + math.prod(shape)
            entries.append(Entry(name, tuple(shape), start, stop))
            start = stop
        return Layout(tuple(entries))

    @cached_property
    def size(self) -> int:
        return self.entries[-1].stop if self.entries else 0

    @property
    def num_bytes(self) -> int:
        """The model's size in float32 bytes."""
        return 4 * self.size

    @cached_property
    def digest(self) -> str:
        """16 hex digits that differ when any name, shape or order differs."""
        text = repr([(entry.name, entry.shape) for entry in self.entries])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def tensors(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Views of `vector` (f32[P]) by tensor name, in the tensors' own shapes."""
        if vector.shape != (self.size,):
            raise LayoutError(f"a vector of shape {vector.shape} does not fit a layout of {self.size} values")
        return {entry.name: vector[entry.start : entry.stop].reshape(entry.shape) for entry in self.entries}


def even_segments(layout: Layout, num_segments: int) -> list[Range]:
    """S contiguous segments whose lengths differ by one value at most."""
    if num_segments > layout.size:
        raise ConfigError(f"gossip.segments = {num_segments} exceeds the model's {layout.size} values; lower it")
    cuts = [index * layout.size // num_segments for index in range(num_segments + 1)]
    return list(pairwise(cuts))


def layer_segments(layout: Layout, num_segments: int) -> list[Range]:
    """S contiguous runs of whole tensors, each cut at the tensor boundary nearest to the even cut that is still free."""
    stops = [entry.stop for entry in layout.entries if entry.stop > entry.start]
    if num_segments > len(stops):
        raise ConfigError(
            f"gossip.segments = {num_segments} exceeds the model's {len(stops)} tensors with segmentation = 'by_layer'; "
            "lower it or use segmentation = 'even'"
        )
    cuts, first = [0], 0
    for index in range(1, num_segments):
        goal = index * layout.size / num_segments
        last = len(stops) - (num_segments - index)  # leaves one tensor for each segment still to come
        best = min(range(first, last), key=lambda position: abs(stops[position] - goal))
        cuts.append(stops[best])
        first = best + 1
    cuts.append(layout.size)
    return list(pairwise(cuts))


SEGMENTATIONS = {"even": even_segments, "by_layer": layer_segments}
