"""Incoming chunks become decoded segments: reassembled in order, checked for size, decoded, and checked to be finite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gossipfl.errors import CodecError
from gossipfl.segments.codecs import Codec, Decoded, all_finite
from gossipfl.segments.layout import Range


@dataclass(slots=True)
class _Partial:
    buffer: np.ndarray
    num_bytes: int = 0


class Assembler:
    """The ranges that one peer has asked for and not yet got in full. Memory is taken only for what was asked for."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._asked: dict[int, dict[Range, _Partial | None]] = {}

    def expect(self, request: int, ranges: tuple[Range, ...]) -> None:
        """Open `request`, or narrow it to the ranges still missing when it is asked again."""
        known = self._asked.get(request, {})
        self._asked[request] = {range_: known.get(range_) for range_ in ranges}

    def forget(self, request: int) -> None:
        self._asked.pop(request, None)

    def add(self, request: int, range_: Range, offset: int, total: int, chunk: memoryview) -> Decoded | None:
        """Take one chunk in; the decoded range once it is complete, else None.

        A chunk that nobody asked for, or that does not continue what is there, is passed over (the machine counts it).
        CodecError if it cannot be what was asked for.
        """
        ranges = self._asked.get(request)
        if ranges is None or range_ not in ranges:
            return None
        size = range_[1] - range_[0]
        if total != self._codec.num_bytes(size):
            raise CodecError(f"{total} bytes for {size} values; {self._codec.name} takes {self._codec.num_bytes(size)}")
        partial = ranges[range_]
        if offset == 0 and len(chunk) == total:
            return self._finish(request, range_, chunk)
        if offset == 0:
            partial = ranges[range_] = _Partial(np.empty(total, np.uint8))
        if partial is None or partial.num_bytes != offset:
            return None
        partial.buffer[offset : offset + len(chunk)] = chunk
        partial.num_bytes += len(chunk)
        return self._finish(request, range_, partial.buffer) if partial.num_bytes == total else None

    def _finish(self, request: int, range_: Range, encoded: memoryview | np.ndarray) -> Decoded:
        decoded = self._codec.decode(encoded, range_[1] - range_[0])
        if not all_finite(decoded.values):
            raise CodecError(f"values of {range_} are not finite")
        ranges = self._asked[request]
        del ranges[range_]
        if not ranges:
            del self._asked[request]
        return decoded
