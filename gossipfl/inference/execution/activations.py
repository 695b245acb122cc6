"""The tensors alive at a cut, as the bytes that go up: per sample and tensor its centre, then planes of what is left.

Values after a ReLU lie on one side of zero; measured from their centre they use every level of the code. Each sample is scaled
on its own, so an answer does not depend on what else is in its batch.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np

from gossipfl.errors import CodecError
from gossipfl.inference.planning.offers import SAMPLE_BITS
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


def samples_to_text(samples: np.ndarray) -> str:
    """Calibration inputs (f32[n, *input_shape]) as an offer carries them."""
    return base64.b64encode(encode_live((samples,), SAMPLE_BITS)).decode()


def samples_from_text(text: str, input_shape: tuple[int, ...]) -> np.ndarray | None:
    """None where there are none; CodecError for what `samples_to_text` cannot have written."""
    if not text:
        return None
    try:
        payload = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise CodecError(f"the calibration samples of the offer are no base64: {error}") from error
    # each takes a centre, a scale and a byte for each value; where planes do not end with a byte, 7 more for all
    count = len(payload) // (8 + math.prod(input_shape))
    return decode_live(payload, (input_shape,), count, SAMPLE_BITS)[0]


def _name(bits: int, group: int) -> str:
    return f"planes:0-{bits}:{group}"
