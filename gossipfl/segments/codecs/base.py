"""What a codec is, the table of all, and what those of every kind share."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from gossipfl.errors import CodecError, ConfigError
from gossipfl.registry import Registry, did_you_mean
from gossipfl.segments.buffers import Pieces

assert sys.byteorder == "little", "the payloads are little-endian and views of memory, so the machine must be too"

Buffer = bytes | bytearray | memoryview | np.ndarray
"""A contiguous run of bytes; need not be aligned or writable."""

F32 = np.dtype("<f4")


class Decoded(NamedTuple):
    """Values of a range, and which of them the sender sent. Sparse codecs leave 0 where nothing was sent."""

    values: np.ndarray | Pieces
    """f32[n]; may be a read-only view of the payload."""
    present: np.ndarray | None
    """bool[n], or None when every value was sent."""


class Codec(Protocol):
    """Turns the n values of a range into `num_bytes(n)` bytes and back."""

    name: str
    """As asked for, with its argument: `topk:0.1`."""
    item_bytes: int | None
    """Bytes per value, where any run of whole values decodes on its own; else None."""
    sparse: bool
    """Needs `selected` to encode and leaves out the other values."""

    def num_bytes(self, n: int) -> int:
        """Exact length of `encode`'s result for n values."""
        ...

    def encode(self, x: np.ndarray, selected: np.ndarray | None = None) -> memoryview:
        """The payload of `x` (f32[n], contiguous); `selected` (sorted i64[k]) is for sparse codecs only.

        May be a view of `x`, which must then stay as it is while the payload is in use.
        """
        ...

    def decode(self, buffer: Buffer, n: int) -> Decoded:
        """The n values in `buffer`, perhaps as a view of it. CodecError when it is no encoding of n values."""
        ...


CODECS: Registry[Callable[[str], Codec]] = Registry("codec")
"""Codec name -> function from the text after the colon to a codec."""


@lru_cache(maxsize=64)
def codec(name: str) -> Codec:
    """The codec called `name`, such as `int8` or `topk:0.05`. ConfigError for an unknown name or a bad argument.

    Looks in `CODECS` only and imports nothing, so it may be asked for a name that came from a peer.
    """
    kind, colon, argument = name.partition(":")
    if kind not in CODECS:
        raise ConfigError(f"unknown codec {name!r}{did_you_mean(kind, CODECS)}; known: {', '.join(CODECS)}")
    if colon and not argument:
        raise ConfigError(f"codec {name!r} lacks the argument after the colon; write {kind!r} for the default")
    return CODECS.get(kind)(argument)


def all_finite(x: np.ndarray) -> bool:
    """Whether no value of `x` (f32[n]) is infinite or NaN.

    Infinities and NaNs survive every sum, so a finite sum clears all values at twice the speed of looking at each. A
    sum that is not finite decides nothing: large finite values may overflow it. (`einsum` sums thrice as fast as `sum`, which
    takes care of the last bits.)
    """
    return math.isfinite(np.einsum("i->", x)) or bool(np.isfinite(x).all())


# --- shared by codecs -------------------------------------------------------------------------------------------------


def full_name(kind: str, argument: str) -> str:
    return f"{kind}:{argument}" if argument else kind


def check_vector(x: np.ndarray) -> None:
    assert x.dtype == np.float32 and x.ndim == 1 and x.flags.c_contiguous, "x must be a contiguous f32[n]"


def payload_of(decoder: Codec, buffer: Buffer, n: int) -> np.ndarray:
    """`buffer` as u8[num_bytes(n)], without a copy."""
    payload = np.frombuffer(buffer, np.uint8)
    if payload.size != decoder.num_bytes(n):
        raise CodecError(f"{decoder.name}: {payload.size} bytes where {n} values take {decoder.num_bytes(n)}")
    return payload


def split(payload: np.ndarray, count: int, first: np.dtype, second: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Views of the first `count` numbers of a payload and of those after them."""
    cut = count * first.itemsize
    return payload[:cut].view(first), payload[cut:].view(second)


def check_scales(name: str, scales: np.ndarray) -> None:
    if not ((scales >= 0) & (scales < np.inf)).all():  # NaN fails every comparison
        raise CodecError(f"{name}: a scale is negative or not finite")
