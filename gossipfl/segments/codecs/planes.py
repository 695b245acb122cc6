"""Bit planes: one 16-bit quantization of a range that is sent a few bits at a time, the most significant first.

`planes:A-B:G` are planes A up to B (exclusive; 0 is the most significant) of codes of 16 bits, in groups of G values with a
scale of their own; without G the whole range is one group. With s the largest magnitude of its group, a value's code is its
place among 2^16 equal steps of [-s, s]; its first b bits stand for the middle of one of 2^b steps (a mid-rise quantizer):

    code = min(floor((x / s + 1) 2^15), 2^16 - 1)        u = code >> (16 - b)        value = s (2 u + 1 - 2^b) / 2^b

So the first b planes are exactly what quantizing to b bits directly would give, within s / 2^b of the value: one content serves
every precision, and a receiver that has 4 planes and wants 6 pulls `planes:4-6:G` and nothing twice (the embedded quantizers
of progressive image coding, as in Taubman and Marcellin, "JPEG2000", Kluwer 2002). A group of zeros stays zero.

A payload is, where A = 0, the float32 scales of the n / G groups, then for each plane its bits (those of 8 values to a byte,
the first in the highest bit; the last byte is filled up with zeros). So the payload of `planes:0-6:G` is that of `planes:0-4:G`
and that of `planes:4-6:G` end to end, which is all that joining and splitting take.

    held = PlaneSet(n, group)
    held.add("planes:0-4:576", payload)
    held.add("planes:4-6:576", later)
    held.decode()                                        # f32[n], from 6 bits
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np

from gossipfl.errors import CodecError, ConfigError
from gossipfl.segments.codecs.base import CODECS, F32, Buffer, Decoded, check_scales, check_vector, payload_of

MAX_PLANES = 16

_RUN = 131_072
"""Values worked on at a time: the temporaries (1 MiB of float64) stay in a second-level cache."""

_FEW = 256
"""Values whose planes are made, and taken apart, all at once: then calling numpy is what takes the time."""

_DIGEST_BYTES = 16
_NAME = re.compile(r"(0|[1-9]\d?)-([1-9]\d?)(?::([1-9]\d{0,8}))?", re.ASCII)


class Planes:
    """The codec `planes:start-stop:group`. What it encodes decodes on its own only if `start` is 0; see `PlaneSet`."""

    sparse = False
    item_bytes: int | None = None

    def __init__(self, start: int, stop: int, group: int | None = None) -> None:
        self.start = start
        self.stop = stop
        self.group = group
        """Values per scale; None: the whole range has one."""
        self.name = f"planes:{start}-{stop}" + (f":{group}" if group else "")

    @staticmethod
    def of(name: str) -> Planes:
        """The codec that `name` spells; ConfigError if it is none of bit planes."""
        kind, _, argument = name.partition(":")
        match = _NAME.fullmatch(argument)
        if kind != "planes" or match is None or not int(match[1]) < int(match[2]) <= MAX_PLANES:
            raise ConfigError(
                f"codec {name!r} names no bit planes; write 'planes:A-B' or 'planes:A-B:G' with 0 <= A < B <= {MAX_PLANES} "
                "and G values per scale, as in 'planes:0-4:576'"
            )
        return Planes(int(match[1]), int(match[2]), int(match[3]) if match[3] else None)

    def num_groups(self, n: int) -> int:
        """Scales of n values; ConfigError unless they are whole groups."""
        group = self.group or n
        if n % max(group, 1):
            raise ConfigError(f"codec {self.name!r}: {n} values are no whole groups of {group}; use a divisor of {n}")
        return n // group if n else 0

    def num_bytes(self, n: int) -> int:
        scales = self.num_groups(n)
        return (4 * scales if self.start == 0 else 0) + (self.stop - self.start) * _plane_bytes(n)

    def encode(self, x: np.ndarray, selected: np.ndarray | None = None) -> memoryview:
        """The payload of `x` (f32[n], contiguous). A group with a value that is not finite gets a scale that is not finite."""
        check_vector(x)
        payload = np.empty(self.num_bytes(x.size), np.uint8)
        if not x.size:
            return payload.data
        rows = x.reshape(self.num_groups(x.size), -1)
        scales = _absmax(rows)
        start = scales.nbytes if self.start == 0 else 0
        payload[:start].view(F32)[:] = scales[: start // 4]
        codes, planes = _codes(rows, scales), payload[start:].reshape(self.stop - self.start, -1)
        if x.size <= _FEW:
            planes[:] = np.packbits(np.unpackbits(codes, axis=0), axis=1)[self.start : self.stop]
            return payload.data
        for plane, packed in zip(range(self.start, self.stop), planes, strict=True):
            packed[:] = np.packbits(codes[plane // 8] & np.uint8(0x80 >> plane % 8))
        return payload.data

    def check(self, buffer: Buffer, n: int) -> np.ndarray:
        """`buffer` as u8[num_bytes(n)], without a copy. CodecError unless it is an encoding of n values."""
        payload = payload_of(self, buffer, n)
        self._checked_parts(payload, n)
        return payload

    def decode(self, buffer: Buffer, n: int) -> Decoded:
        """The n values, each within scale / 2^stop of what was encoded. CodecError also where the planes before are missing."""
        scales, planes = self._checked_parts(payload_of(self, buffer, n), n)
        if self.start:
            raise CodecError(f"{self.name} decodes only after planes 0-{self.start}; collect both in a PlaneSet")
        return Decoded(_values(scales, planes, n), None)

    def _checked_parts(self, payload: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of the scales (f32[n / group], none unless `start` is 0) and of the planes (u8[stop - start, ceil(n / 8)])."""
        cut = 4 * self.num_groups(n) if self.start == 0 else 0
        scales, planes = payload[:cut].view(F32), payload[cut:].reshape(self.stop - self.start, _plane_bytes(n))
        check_scales(self.name, scales)
        if n % 8 and (planes[:, -1] & np.uint8(0xFF >> n % 8)).any():
            raise CodecError(f"{self.name}: bits that belong to none of the {n} values are not zero")
        return scales, planes


class PlaneSet:
    """The first planes of one range, as many as have come so far. Immutable bytes inside; to be changed by one thread."""

    def __init__(self, num_values: int, group: int | None = None) -> None:
        self.num_values = num_values
        self.group = group
        self.depth = 0
        """Planes that are here: 0 .. depth - 1."""
        self._payload = b""

    def add(self, name: str, payload: Buffer) -> None:
        """Take in the piece that was pulled as `name`, which starts where the planes here end.

        CodecError for bytes that are no such piece or for a gap; ConfigError for other groups.
        """
        piece = Planes.of(name)
        if piece.group != self.group:
            raise ConfigError(f"{name} has groups of {piece.group} values, the planes here of {self.group}; pull the same ones")
        if piece.start != self.depth:
            raise CodecError(f"{name} does not continue the {self.depth} planes that are here")
        self._payload += piece.check(payload, self.num_values).tobytes()
        self.depth = piece.stop

    def piece(self, start: int, stop: int) -> memoryview:
        """The payload of planes `[start, stop)`, cut from what is here."""
        assert start < stop <= self.depth, f"planes {start}-{stop} of {self.depth}"
        begin = Planes(0, start, self.group).num_bytes(self.num_values) if start else 0
        return memoryview(self._payload)[begin : Planes(0, stop, self.group).num_bytes(self.num_values)]

    def decode(self, depth: int | None = None) -> np.ndarray:
        """f32[num_values], from the first `depth` planes (all that are here)."""
        depth = self.depth if depth is None else depth
        return np.asarray(Planes(0, depth, self.group).decode(self.piece(0, depth), self.num_values).values)


def piece_digest(name: str, num_values: int, payload: Buffer) -> bytes:
    """16 bytes that name a piece by its content, so that a device can say what it has. Scales count where planes 0.. do."""
    digest = hashlib.blake2b(f"{name}/{num_values}/".encode(), digest_size=_DIGEST_BYTES)
    digest.update(np.frombuffer(payload, np.uint8).data)
    return digest.digest()


@CODECS.register("planes")
def _planes(argument: str) -> Planes:
    return Planes.of(f"planes:{argument or '0-8'}")


def _plane_bytes(n: int) -> int:
    return -(-n // 8)


def _runs(num_groups: int, group: int) -> Iterator[slice]:
    """Runs of whole groups, `_RUN` values or one group long."""
    step = max(1, _RUN // group)
    for start in range(0, num_groups, step):
        yield slice(start, start + step)


def _absmax(rows: np.ndarray) -> np.ndarray:
    """Largest magnitude of each row of f32[m, group], NaN where there is one: f32[m]."""
    scales = np.empty(len(rows), np.float32)
    for run in _runs(*rows.shape):
        np.abs(rows[run]).max(1, out=scales[run])
    return scales


def _codes(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """High and low bytes (u8[2, n]) of the codes of `rows` (f32[m, group]); without a usable scale, codes of zero."""
    high, low = halves = np.empty((2, *rows.shape), np.uint8)
    usable = (scales > 0) & (scales < np.inf)
    for run in _runs(*rows.shape):
        values, divisors = rows[run], scales[run, None]
        if not usable[run].all():
            values, divisors = np.where(usable[run, None], values, 0), np.where(usable[run, None], divisors, 1)
        # float64: its rounding of x / s + 1 is the same for every number of bits, and far below the finest step.
        steps = np.divide(values, divisors, dtype=np.float64)
        steps += 1.0
        steps *= 2.0 ** (MAX_PLANES - 1)
        codes = np.minimum(steps, 2.0**MAX_PLANES - 1, out=steps).astype(np.uint16)
        high[run] = codes >> 8
        low[run] = codes
    return halves.reshape(2, -1)


def _values(scales: np.ndarray, planes: np.ndarray, n: int) -> np.ndarray:
    """f32[n] from `scales` (f32[m]) and the first `planes` (u8[b, ceil(n / 8)]).

    All but the last product, by the scale, is exact: 2 u + 1 has 17 bits at most.
    """
    bits = len(planes)
    values = np.empty(n, np.float32)
    for start in range(0, n, _RUN):  # a multiple of 8
        part = values[start : start + _RUN]
        part[:] = _leading(planes[:8], start, part.size)
        if bits > 8:
            part *= 2.0 ** (bits - 8)
            part += _leading(planes[8:], start, part.size)
        part *= 2.0 ** (1 - bits)
        part += 2.0**-bits - 1.0
    if n:
        values.reshape(len(scales), -1)[:] *= scales[:, None]
    return values


def _leading(planes: np.ndarray, start: int, count: int) -> np.ndarray:
    """The numbers (u8[count]) whose bits are up to 8 `planes` (u8[b, ...]), for values from `start` on (a multiple of 8)."""
    if count <= _FEW:
        first = start // 8
        bits = np.unpackbits(planes[:, first : first + _plane_bytes(count)], axis=1, count=count)
        return np.packbits(bits, axis=0)[0] >> np.uint8(8 - len(planes))
    numbers = np.zeros(count, np.uint8)
    for packed in planes[:, start // 8 :]:
        numbers += numbers
        numbers += np.unpackbits(packed[: _plane_bytes(count)], count=count)
    return numbers
