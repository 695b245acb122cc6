"""Incoming chunks become decoded segments: reassembled in order, checked for size, decoded, and checked to be finite."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from gossipfl.errors import CodecError
from gossipfl.segments.buffers import Pieces
from gossipfl.segments.codecs import Codec, Decoded, all_finite
from gossipfl.segments.layout import Range


@dataclass(slots=True)
class _Partial:
    """What has come of one range: decoded pieces, where the codec's chunks decode on their own, else encoded bytes."""

    num_bytes: int = 0
    pieces: list[np.ndarray] = field(default_factory=list)
    encoded: bytearray = field(default_factory=bytearray)


class Assembler:
    """The ranges that one peer has asked for and not yet got in full. Memory is taken only for what was asked for."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._asked: dict[Hashable, dict[Range, _Partial]] = {}

    def expect(self, request: Hashable, ranges: tuple[Range, ...]) -> None:
        """Open `request`, or narrow it to the ranges still missing when it is asked again."""
        known = self._asked.get(request, {})
        self._asked[request] = {range_: known.get(range_) or _Partial() for range_ in ranges}

    def is_open(self, request: Hashable) -> bool:
        return request in self._asked

    def forget(self, request: Hashable) -> None:
        self._asked.pop(request, None)

    def add(self, request: Hashable, range_: Range, offset: int, total: int, chunk: memoryview) -> Decoded | None:
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
        if offset == 0:
            ranges[range_] = _Partial()
        partial = ranges[range_]
        if partial.num_bytes != offset:
            return None
        item_bytes = self._codec.item_bytes
        if len(chunk) == total:
            decoded = self._decode(chunk, size)
        elif item_bytes:
            if len(chunk) % item_bytes:
                raise CodecError(f"a chunk of {len(chunk)} bytes, not whole values of {item_bytes}")
            partial.pieces.append(np.asarray(self._decode(chunk, len(chunk) // item_bytes).values))
            partial.num_bytes += len(chunk)
            if partial.num_bytes < total:
                return None
            decoded = Decoded(Pieces(partial.pieces), None)
        else:
            partial.encoded += chunk
            partial.num_bytes += len(chunk)
            if partial.num_bytes < total:
                return None
            decoded = self._decode(partial.encoded, size)
        del ranges[range_]
        if not ranges:
            del self._asked[request]
        return decoded

    def _decode(self, encoded: memoryview | bytearray, size: int) -> Decoded:
        decoded = self._codec.decode(encoded, size)
        if not all_finite(np.asarray(decoded.values)):
            raise CodecError("the values are not finite")
        return decoded
