"""Bytes of a model that is cut: to fetch, to keep in memory, to send up, and of the messages that they travel in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from gossipfl.inference.planning.profile import LayerProfile, ModelProfile
from gossipfl.protocol.messages import FULL_BITS, MAX_RANGES
from gossipfl.protocol.wire import MAX_PAYLOAD_BYTES
from gossipfl.segments.codecs.planes import MAX_PLANES

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
"""Per weight in memory, by engine; 4 for others."""
HEADER_BYTES, RANGE_BYTES = 80, 12
"""Of a message on the wire beside its payload, with ZeroMQ's frames (76 to 90 for names of 12 and 23 letters), and of each
range that a Pull names."""


def weight_bytes(profile: ModelProfile, weight_bits: Sequence[int], cached: Sequence[int] = ()) -> int:
    """Bytes to fetch for the first layers at these bits, where `cached` planes of each are there (with scales and biases)."""
    return LayerSizes(profile, cached).fetched(weight_bits).num_bytes


def resident_bytes(profile: ModelProfile, cut: int, engine: str) -> int:
    """Of the first `cut` layers: weights as `engine` holds them, biases, and twice the largest live set in float32."""
    return LayerSizes(profile, ()).resident_bytes(cut, engine)


def activation_bytes(profile: ModelProfile, cut: int, bits: int) -> int:
    """Bytes that go up for one sample: each live tensor with its centre and its scale, unless it goes as it is."""
    if cut == len(profile.layers):
        return 0
    shapes = profile.layers[cut - 1].live if cut else (profile.input_shape,)
    sizes = [math.prod(shape) for shape in shapes]
    return sum(4 * size if bits == FULL_BITS else 8 + bits * -(-size // 8) for size in sizes)


def missing_bytes(profile: ModelProfile, cut: int, bits: int) -> int:
    """Bytes that go up to continue a sample of which `bits` planes are there: the others, and its mark."""
    return activation_bytes(profile, cut, MAX_PLANES) - activation_bytes(profile, cut, bits) + 1


def message_bytes(num_bytes: int) -> int:
    """Of a payload with the headers of its chunks."""
    return num_bytes + HEADER_BYTES * -(-num_bytes // MAX_PAYLOAD_BYTES)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What is pulled for a device, in how many pieces, messages and Pulls."""

    num_bytes: int
    num_pieces: int
    num_messages: int
    num_pulls: int

    @property
    def bytes_up(self) -> int:
        """Of the Pulls."""
        return HEADER_BYTES * self.num_pulls + RANGE_BYTES * self.num_pieces

    @property
    def bytes_down(self) -> int:
        """With the headers of all messages."""
        return self.num_bytes + HEADER_BYTES * self.num_messages


class LayerSizes:
    """Bytes of each layer, counted once for all cuts: to fetch its planes, and scales and bias if it is new; in memory."""

    def __init__(self, profile: ModelProfile, cached: Sequence[int]) -> None:
        layers, input_size = profile.layers, math.prod(profile.input_shape)
        self._num_weights = (0, *accumulate(layer.num_weights for layer in layers))
        self._num_biases = (0, *accumulate(_num_biases(layer) for layer in layers))
        self._num_live = tuple(accumulate((layer.num_live for layer in layers), max, initial=input_size))
        self._held = np.zeros(len(layers), np.int64)
        self._held[: len(cached)] = cached[: len(layers)]
        self._groups = [layer.group for layer in layers]
        self._planes = np.array([-(-layer.num_weights // 8) for layer in layers], np.int64)
        self._scales = np.array([4 * layer.channels for layer in layers], np.int64) * (self._held == 0)
        self._biases = np.array([4 * _num_biases(layer) for layer in layers], np.int64) * (self._held == 0)

    def fetched(self, weight_bits: Sequence[int]) -> Fetched:
        count = len(weight_bits)
        missing = np.maximum(np.array(weight_bits, np.int64) - self._held[:count], 0)
        pieces = np.concatenate([missing * self._planes[:count] + self._scales[:count], self._biases[:count]])
        num_pieces = int(np.count_nonzero(pieces))
        if not num_pieces:
            return Fetched(0, 0, 0, 0)
        codecs = set(zip(weight_bits, self._groups, strict=False))
        num_pulls = max(len(codecs) + 1, -(-num_pieces // MAX_RANGES))
        num_messages = int((-(-pieces // MAX_PAYLOAD_BYTES)).sum())
        return Fetched(int(pieces.sum()), num_pieces, num_messages, num_pulls)

    def resident_bytes(self, cut: int, engine: str) -> int:
        weights = self._num_weights[cut] * WEIGHT_BYTES.get(engine, 4)
        return weights + 4 * self._num_biases[cut] + 2 * 4 * self._num_live[cut]


def _num_biases(layer: LayerProfile) -> int:
    return layer.bias[1] - layer.bias[0] if layer.bias else 0
