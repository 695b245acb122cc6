"""Codecs: how the values of a range of the flat vector become the bytes that travel, and back.

| name             | bytes for n values              | loses                                                          |
|------------------|---------------------------------|----------------------------------------------------------------|
| `float32`        | 4 n                             | nothing; encode and decode copy nothing                        |
| `float16`        | 2 n                             | 13 of 23 fraction bits; magnitudes above 65,504 become 65,504  |
| `bfloat16`       | 2 n                             | 16 of 23 fraction bits                                         |
| `int8[:block]`   | 4 ceil(n / block) + n           | half a level: 1/254 of the largest magnitude of the block      |
| `int4[:block]`   | 4 ceil(n / block) + ceil(n / 2) | half a level: 1/14 of the largest magnitude of the block       |
| `topk[:ratio]`   | k (2 or 4) + 4 k                | all but the k = ceil(ratio n) most important values            |
| `randomk[:ratio]`| k (2 or 4) + 4 k                | all but k values drawn at random                               |
| `planes[:A-B[:G]]`| 4 n / G + (B - A) ceil(n / 8)  | 1/2^B of the largest magnitude of the G values (see `planes`)  |

All numbers are little-endian. A quantized payload is the float32 scales, then the levels (see `quantization`). A sparse
payload is the k indices in rising order (uint16 while n <= 65,536, else uint32), then the k values in float32.

    pull = codec("int8:64")
    payload = pull.encode(x)                   # pull.num_bytes(x.size) bytes
    pull.decode(payload, x.size).values        # f32[n], near x

Sparse codecs send the selected values themselves; the receiver mixes only the coordinates that are `present`. What to
select by is the sender's: with top-k, the change accumulated since a coordinate was last sent (Dhasade, Kermarrec,
Pires, Sharma, Vujasinovic and Wigger, "Get More for Less in Decentralized Learning Systems", ICDCS 2023, arXiv
2306.04377, there on wavelet coefficients). The accumulator lives with the stored versions, not here.

The contract. A codec is pure: no state, clock or randomness of its own, so one instance serves every thread. `encode`
gives exactly `num_bytes(n)` bytes, the same for the same input. `decode` trusts no byte: a wrong length, index or scale
is a `CodecError`. It does not look at each value; whoever merges the result first asks `all_finite`.

To add one, write a function from the text after the colon (empty when there is none) to a `Codec`, and register it
from a module that the scenario already names, such as that of its model:

    @CODECS.register("sign")
    def _sign(argument: str) -> Codec: ...
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch

from gossipfl.errors import CodecError, ConfigError
from gossipfl.registry import Registry, did_you_mean
from gossipfl.segments.buffers import Pieces
from gossipfl.segments.quantization import (
    dequantize,
    num_blocks,
    pack_nibbles,
    quantize_,
    tensor,
    unpack_nibbles,
)

assert sys.byteorder == "little", "the payloads are little-endian and views of memory, so the machine must be too"

Buffer = bytes | bytearray | memoryview | np.ndarray
"""A contiguous run of bytes; need not be aligned or writable."""

_DEFAULT_BLOCK = 128
"""Values per scale. Trained weights of a small MLP and a small CNN lose 0.14 to 0.23 bits of precision from 128 to 256
and save 0.125 bits per value; from 128 to 64 they gain 0.17 to 0.20 bits and pay 0.25."""

_MAX_BLOCK = 65_536

_DEFAULT_RATIO = "0.1"

_F32, _I8, _U16, _U32 = (np.dtype(name) for name in ("<f4", "i1", "<u2", "<u4"))


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
        _check_vector(x)
        k = self.num_selected(x.size)
        assert selected is not None and selected.size == k, f"{self.name} sends {k} of {x.size} values"
        payload = np.empty(self.num_bytes(x.size), np.uint8)
        indices, values = _split(payload, k, _index_type(x.size), _F32)
        indices[:] = selected
        values[:] = x[selected]
        return payload.data

    def decode(self, buffer: Buffer, n: int) -> Decoded:
        payload = _payload(self, buffer, n)
        coded_indices, coded_values = _split(payload, self.num_selected(n), _index_type(n), _F32)
        indices = coded_indices.astype(np.int64)  # numpy indexes with int64, converting once is faster
        if indices.size and (indices[-1] >= n or not (indices[1:] > indices[:-1]).all()):
            raise CodecError(f"{self.name}: the indices are not in rising order below {n}")
        values, present = np.zeros(n, np.float32), np.zeros(n, np.bool_)
        values[indices] = coded_values
        present[indices] = True
        return Decoded(values, present)


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


class _Float32:
    """The values as they are; encode and decode are views."""

    name, sparse = "float32", False
    item_bytes: int | None = 4

    def num_bytes(self, n: int) -> int:
        return 4 * n

    def encode(self, x: np.ndarray, selected: np.ndarray | None = None) -> memoryview:
        _check_vector(x)
        return x.view(np.uint8).data

    def decode(self, buffer: Buffer, n: int) -> Decoded:
        return Decoded(_payload(self, buffer, n).view(np.float32), None)


class _Half:
    """A 16-bit float type. Finite values beyond its range become its largest; infinity and NaN stay what they are."""

    sparse = False
    item_bytes: int | None = 2

    def __init__(self, name: str, dtype: torch.dtype, infinity: int) -> None:
        self.name = name
        self._dtype = dtype
        self._infinity = infinity  # its bits; one less is the largest finite number, one more the first NaN

    def num_bytes(self, n: int) -> int:
        return 2 * n

    def encode(self, x: np.ndarray, selected: np.ndarray | None = None) -> memoryview:
        _check_vector(x)
        bits = tensor(x).to(self._dtype).view(torch.int16).numpy()
        magnitudes = bits & 0x7FFF
        if magnitudes.max(initial=0) >= self._infinity:
            bits[(magnitudes == self._infinity) & np.isfinite(x)] -= 1
        return bits.view(np.uint8).data

    def decode(self, buffer: Buffer, n: int) -> Decoded:
        bits = _payload(self, buffer, n).view(np.int16)
        return Decoded(tensor(bits).view(self._dtype).float().numpy(), None)


class _Quantized:
    """Block-wise levels: bytes when `max_level` is 127, half bytes when it is 7."""

    sparse = False
    item_bytes: int | None = None

    def __init__(self, name: str, max_level: int, block: int) -> None:
        self.name = name
        self._max_level = max_level
        self._block = block
        self._packed = max_level <= 7

    def num_bytes(self, n: int) -> int:
        return 4 * num_blocks(n, self._block) + (-(-n // 2) if self._packed else n)

    def encode(self, x: np.ndarray, selected: np.ndarray | None = None) -> memoryview:
        _check_vector(x)
        payload = np.empty(self.num_bytes(x.size), np.uint8)
        scales, coded = _split(payload, num_blocks(x.size, self._block), _F32, _I8)
        levels = np.empty(x.size, np.int8) if self._packed else coded
        quantize_(scales, levels, x, self._block, self._max_level)
        if self._packed:
            coded.view(np.uint8)[:] = pack_nibbles(levels)
        return payload.data

    def decode(self, buffer: Buffer, n: int) -> Decoded:
        payload = _payload(self, buffer, n)
        scales, coded = _split(payload, num_blocks(n, self._block), _F32, _I8)
        if not ((scales >= 0) & (scales < np.inf)).all():  # NaN fails every comparison
            raise CodecError(f"{self.name}: a scale is negative or not finite")
        levels = unpack_nibbles(coded.view(np.uint8), n) if self._packed else coded
        return Decoded(dequantize(scales, levels, self._block), None)


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


CODECS: Registry[Callable[[str], Codec]] = Registry("codec")
"""Codec name -> function from the text after the colon to a codec."""


@CODECS.register("float32")
def _float32(argument: str) -> Codec:
    _refuse_argument("float32", argument)
    return _Float32()


@CODECS.register("float16")
def _float16(argument: str) -> Codec:
    _refuse_argument("float16", argument)
    return _Half("float16", torch.float16, infinity=0x7C00)


@CODECS.register("bfloat16")
def _bfloat16(argument: str) -> Codec:
    _refuse_argument("bfloat16", argument)
    return _Half("bfloat16", torch.bfloat16, infinity=0x7F80)


@CODECS.register("int8")
def _int8(argument: str) -> Codec:
    return _Quantized(_full_name("int8", argument), 127, _block("int8", argument))


@CODECS.register("int4")
def _int4(argument: str) -> Codec:
    return _Quantized(_full_name("int4", argument), 7, _block("int4", argument))


@CODECS.register("topk")
def _topk(argument: str) -> Codec:
    return _TopK(_full_name("topk", argument), _ratio("topk", argument))


@CODECS.register("randomk")
def _randomk(argument: str) -> Codec:
    return _RandomK(_full_name("randomk", argument), _ratio("randomk", argument))


def _full_name(kind: str, argument: str) -> str:
    return f"{kind}:{argument}" if argument else kind


def _refuse_argument(kind: str, argument: str) -> None:
    if argument:
        raise ConfigError(f"codec '{kind}:{argument}': {kind} takes no argument; write {kind!r}")


def _block(kind: str, argument: str) -> int:
    """The block length that `argument` spells. Bounded in length too: it may come from a peer."""
    if not argument:
        return _DEFAULT_BLOCK
    block = int(argument) if argument.isascii() and argument.isdigit() and len(argument) <= 5 else 0
    if not 1 <= block <= _MAX_BLOCK:
        raise ConfigError(
            f"codec '{kind}:{argument}': the block is a number of values from 1 to {_MAX_BLOCK}, as in '{kind}:256'"
        )
    return block


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
    return _U16 if n <= 65_536 else _U32


def _check_vector(x: np.ndarray) -> None:
    assert x.dtype == np.float32 and x.ndim == 1 and x.flags.c_contiguous, "x must be a contiguous f32[n]"


def _payload(decoder: Codec, buffer: Buffer, n: int) -> np.ndarray:
    """`buffer` as u8[num_bytes(n)], without a copy."""
    payload = np.frombuffer(buffer, np.uint8)
    if payload.size != decoder.num_bytes(n):
        raise CodecError(f"{decoder.name}: {payload.size} bytes where {n} values take {decoder.num_bytes(n)}")
    return payload


def _split(payload: np.ndarray, count: int, first: np.dtype, second: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Views of the first `count` numbers of a payload and of those after them."""
    cut = count * first.itemsize
    return payload[:cut].view(first), payload[cut:].view(second)


from gossipfl.segments import planes as _planes  # noqa: E402, F401 (registers itself; needs the names above)
