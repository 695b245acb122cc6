"""The tensors alive at a cut, as the bytes that go up: per sample and tensor its centre, then planes of what is left.

Values after a ReLU lie on one side of zero; measured from their centre they use every level of the code. Each sample is scaled
on its own, so an answer does not depend on what else is in its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gossipfl.errors import CodecError
from gossipfl.segments.codecs import all_finite, codec

EXACT_BITS = 32
"""float32, where the cut is not quantized at all."""


def num_bytes(shapes: Sequence[tuple[int, ...]], num_samples: int, bits: int) -> int:
    """Length of `encode_live`'s result for tensors of these shapes (per sample)."""
    sizes = [math.prod(shape) for shape in shapes]
    if bits == EXACT_BITS:
        return 4 * num_samples * sum(sizes)
    return sum(4 * num_samples + codec(_name(bits, size)).num_bytes(num_samples * size) for size in sizes)


def encode_live(live: Sequence[np.ndarray], bits: int) -> bytes:
    """The tensors (f32[B, ...] each) at `bits` bits a value, 2 to 16, or 32 for exactly as they are."""
    if bits == EXACT_BITS:
        return b"".join(np.ascontiguousarray(values, np.float32).tobytes() for values in live)
    pieces = []
    for values in live:
        rows = np.ascontiguousarray(values, np.float32).reshape(len(values), -1)
        centres = (0.5 * rows.min(1) + 0.5 * rows.max(1)).astype(np.float32)
        rest = (rows - centres[:, None]).reshape(-1)
        pieces += [centres.tobytes(), bytes(codec(_name(bits, rows.shape[1])).encode(rest))]
    return b"".join(pieces)


def decode_live(
    payload: bytes | memoryview, shapes: Sequence[tuple[int, ...]], num_samples: int, bits: int
) -> tuple[np.ndarray, ...]:
    """The tensors again, f32[B, *shape] each. CodecError for bytes that are no encoding of them or are not finite."""
    expected = num_bytes(shapes, num_samples, bits)
    if len(payload) != expected:
        raise CodecError(f"{len(payload)} bytes for {num_samples} samples at a cut that takes {expected}")
    view, start, live = memoryview(payload), 0, []
    for shape in shapes:
        count = num_samples * math.prod(shape)
        if bits == EXACT_BITS:
            values = np.frombuffer(view, np.float32, count, start).copy()
            start += 4 * count
        else:
            centres = np.frombuffer(view, np.float32, num_samples, start)
            start += 4 * num_samples
            planes = codec(_name(bits, math.prod(shape)))
            rest = planes.decode(view[start : start + planes.num_bytes(count)], count).values
            start += planes.num_bytes(count)
            values = (np.asarray(rest).reshape(num_samples, -1) + centres[:, None]).reshape(-1)
        if not all_finite(values):
            raise CodecError("the activations are not finite")
        live.append(values.reshape(num_samples, *shape))
    return tuple(live)


def _name(bits: int, group: int) -> str:
    return f"planes:0-{bits}:{group}"
