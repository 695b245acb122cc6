"""Codecs that send each value as a floating-point number."""

from __future__ import annotations

import numpy as np
import torch

from gossipfl.errors import ConfigError
from gossipfl.segments.codecs.base import CODECS, Buffer, Codec, Decoded, check_vector, payload_of
from gossipfl.segments.quantization import tensor


class _Float32:
    """The values as they are; encode and decode are views."""

    name, sparse = "float32", False
    item_bytes: int | None = 4

    def num_bytes(self, n: int) -> int:
        return 4 * n

    def encode(self, x: np.ndarray, selected: np.ndarray | None = None) -> memoryview:
        check_vector(x)
        return x.view(np.uint8).data

    def decode(self, buffer: Buffer, n: int) -> Decoded:
        return Decoded(payload_of(self, buffer, n).view(np.float32), None)


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
        check_vector(x)
        bits = tensor(x).to(self._dtype).view(torch.int16).numpy()
        magnitudes = bits & 0x7FFF
        if magnitudes.max(initial=0) >= self._infinity:
            bits[(magnitudes == self._infinity) & np.isfinite(x)] -= 1
        return bits.view(np.uint8).data

    def decode(self, buffer: Buffer, n: int) -> Decoded:
        bits = payload_of(self, buffer, n).view(np.int16)
        return Decoded(tensor(bits).view(self._dtype).float().numpy(), None)


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


def _refuse_argument(kind: str, argument: str) -> None:
    if argument:
        raise ConfigError(f"codec '{kind}:{argument}': {kind} takes no argument; write {kind!r}")
