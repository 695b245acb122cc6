"""The tensors alive at a cut, as the bytes that go up: per sample and tensor its centre, then planes of what is left.

Values after a ReLU lie on one side of zero; measured from their centre they use every level of the code. Each sample is scaled
on its own, so an answer does not depend on what else is in its batch.

What has gone up at a few bits becomes what it would have been at all 16 by the planes that were left out:

    first, missing = encode_live(live, 4), encode_missing(live, 4, rows)      # `rows` of the samples, marked by a bit each
    decode_continued(first, missing, shapes, num_samples, 4)                  # as encode_live(live[rows], 16) decodes
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np

from gossipfl.errors import CodecError
from gossipfl.inference.planning.offers import SAMPLE_BITS
from gossipfl.protocol.messages import FULL_BITS
from gossipfl.segments.codecs import all_finite, codec
from gossipfl.segments.codecs.planes import MAX_PLANES


def num_bytes(shapes: Sequence[tuple[int, ...]], num_samples: int, bits: int) -> int:
    """Length of `encode_live`'s result for tensors of these shapes (per sample)."""
    sizes = [math.prod(shape) for shape in shapes]
    if bits == FULL_BITS:
        return 4 * num_samples * sum(sizes)
    return sum(4 * num_samples + codec(_name(bits, size)).num_bytes(num_samples * size) for size in sizes)


def encode_live(live: Sequence[np.ndarray], bits: int) -> bytes:
    """The tensors (f32[B, ...] each) at `bits` bits a value, 2 to 16, or 32 for exactly as they are."""
    if bits == FULL_BITS:
        return b"".join(np.ascontiguousarray(values, np.float32).tobytes() for values in live)
    pieces = []
    for values in live:
        rows = np.ascontiguousarray(values, np.float32).reshape(len(values), -1)
        centres, rest = _centred(rows)
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
        if bits == FULL_BITS:
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


def encode_missing(live: Sequence[np.ndarray], bits: int, rows: Sequence[int]) -> bytes:
    """What `encode_live(live, bits)` left out of these rows (in order), after a bitmap of them."""
    chosen = np.zeros(len(live[0]), bool)
    chosen[list(rows)] = True
    pieces = [np.packbits(chosen).tobytes()]
    for values in live:
        rest = _centred(np.ascontiguousarray(values[chosen], np.float32).reshape(len(rows), -1))[1]
        pieces.append(bytes(codec(_name(MAX_PLANES, rest.size // len(rows), bits)).encode(rest)))
    return b"".join(pieces)


def decode_continued(
    first: bytes | memoryview, missing: bytes | memoryview, shapes: Sequence[tuple[int, ...]], num_samples: int, bits: int
) -> tuple[np.ndarray, ...]:
    """The tensors of the rows marked, f32[b, *shape] each. CodecError for bytes that are not `encode_missing` of what came
    `first`, the `encode_live` of `num_samples` samples at `bits` bits."""
    mark_bytes = -(-num_samples // 8)
    marks = np.frombuffer(missing, np.uint8, min(mark_bytes, len(missing)))
    chosen = np.unpackbits(marks).astype(bool)
    if len(marks) < mark_bytes or chosen[num_samples:].any() or not chosen.any():
        raise CodecError(f"no marks of {num_samples} samples are continued")
    chosen = chosen[:num_samples]
    count = int(chosen.sum())
    expected = num_bytes(shapes, count, MAX_PLANES) - num_bytes(shapes, count, bits) + mark_bytes
    if len(missing) != expected or len(first) != num_bytes(shapes, num_samples, bits):
        raise CodecError(f"{len(missing)} bytes continue {count} of {num_samples} samples, which takes {expected}")
    pieces, at, rest = [], 0, memoryview(missing)[mark_bytes:]
    for shape in shapes:
        size = math.prod(shape)
        scales_end, plane_bytes = at + 8 * num_samples, -(-num_samples * size // 8)
        end = scales_end + bits * plane_bytes
        centres_and_scales = np.frombuffer(first, np.float32, 2 * num_samples, at).reshape(2, -1)
        planes = np.frombuffer(first, np.uint8, bits * plane_bytes, scales_end).reshape(bits, -1)
        pieces.append(centres_and_scales[:, chosen].tobytes())
        for plane in planes:
            pieces.append(np.packbits(np.unpackbits(plane, count=num_samples * size).reshape(-1, size)[chosen]).tobytes())
        taken = (MAX_PLANES - bits) * -(-count * size // 8)
        pieces.append(bytes(rest[:taken]))
        at, rest = end, rest[taken:]
    return decode_live(b"".join(pieces), shapes, count, MAX_PLANES)


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


def _centred(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle of each row (f32[B]), and what is left of all of them (f32[B n])."""
    centres = (0.5 * rows.min(1) + 0.5 * rows.max(1)).astype(np.float32)
    return centres, (rows - centres[:, None]).reshape(-1)


def _name(stop: int, group: int, start: int = 0) -> str:
    return f"planes:{start}-{stop}:{group}"
