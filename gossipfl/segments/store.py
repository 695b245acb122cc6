"""What a peer serves: its stored model versions, each one flat vector, read and encoded by range.

A published vector is never written to again, so it is sent without a copy, and a reader never sees two versions mixed.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from gossipfl.errors import CodecError, LayoutError
from gossipfl.randomness import generator
from gossipfl.segments.codecs import Codec, SparseCodec
from gossipfl.segments.layout import Range


class SegmentStore:
    """The stored versions of one peer's vector (f32[P]); its machine decides which are kept.

    With a sparse codec the store keeps one accumulator of what has changed since each coordinate was last sent. It is advanced
    on publishing, not on serving: all who pull a version get the same coordinates, however many they are (as JWINS does;
    Dhasade et al., ICDCS 2023). `initial` is the common initial model, from which the first change is counted.
    """

    def __init__(self, initial: np.ndarray, segments: tuple[Range, ...], codec: Codec, seed: int, name: str) -> None:
        self._size = initial.size
        self._segments = segments
        self._codec = codec
        self._seed, self._name = seed, name
        self._versions: dict[int, np.ndarray] = {}
        self._encoded: dict[tuple[int, Range], memoryview] = {}
        self._selected: dict[tuple[int, Range], np.ndarray] = {}
        self._sparse = codec if isinstance(codec, SparseCodec) else None
        self._previous = initial.copy() if self._sparse else initial
        self._accumulator = np.zeros_like(initial) if self._sparse else np.empty(0, np.float32)

    def publish(self, version: int, vector: np.ndarray) -> None:
        """Keep `vector` (f32[P], not to be written to again) as `version`."""
        if vector.shape != (self._size,) or vector.dtype != np.float32:
            raise LayoutError(f"version {version} is {vector.dtype}{vector.shape}; the layout has float32 ({self._size},)")
        vector.flags.writeable = False
        self._versions[version] = vector
        if self._sparse is not None:
            self._select(self._sparse, version, vector)

    def retain(self, versions: Collection[int]) -> None:
        """Forget all versions but these."""
        for forgotten in [version for version in self._versions if version not in versions]:
            del self._versions[forgotten]
            for table in (self._encoded, self._selected):
                for key in [key for key in table if key[0] == forgotten]:
                    del table[key]

    def read(self, version: int, range_: Range) -> np.ndarray:
        """A read-only view of the range, f32[stop - start]. KeyError if the version is not stored."""
        start, stop = range_
        return self._versions[version][start:stop]

    def encode(self, version: int, range_: Range) -> memoryview:
        """The range as the codec sends it, a segment once for all who ask. CodecError for a range that cannot be served."""
        values = self.read(version, range_)
        if self._codec.name == "float32":
            return self._codec.encode(values)  # a view already: nothing to keep
        key = version, range_
        if key not in self._encoded:
            if self._sparse and key not in self._selected:
                raise CodecError(f"range {range_} of version {version} is no segment; {self._codec.name} serves whole segments")
            encoded = self._codec.encode(values, self._selected.get(key))
            if range_ not in self._segments:  # there is no end to the ranges that may be asked for
                return encoded
            self._encoded[key] = encoded
        return self._encoded[key]

    def _select(self, codec: SparseCodec, version: int, vector: np.ndarray) -> None:
        self._accumulator += vector - self._previous
        self._previous = vector
        rng = generator(self._seed, "coordinates", self._name, version)
        for range_ in self._segments:
            change = self._accumulator[slice(*range_)]
            selected = codec.select(change, rng)
            change[selected] = 0
            self._selected[version, range_] = selected
