"""What one cold request moves, and how much of it quantization saves."""

from __future__ import annotations

from collections.abc import Sequence

from gossipfl.inference.planning.profile import ModelProfile
from gossipfl.inference.planning.sizes import activation_bytes, weight_bytes


def saved(profile: ModelProfile, cut: int, weight_bits: Sequence[int], activation_bits: int) -> float:
    """Share of the bytes of one cold request that quantization saves, against 32 bits for the same cut."""
    return 1 - payload(profile, cut, weight_bits, activation_bits) / payload_32(profile, cut)


def payload(profile: ModelProfile, cut: int, weight_bits: Sequence[int], activation_bits: int) -> int:
    """Bytes of one request whose weights are not there yet: weights, scales and biases down, the cut up."""
    return weight_bytes(profile, weight_bits) + activation_bytes(profile, cut, activation_bits)


def payload_32(profile: ModelProfile, cut: int) -> int:
    """The same in float32."""
    layers = profile.layers[:cut]
    biases = sum(layer.bias[1] - layer.bias[0] for layer in layers if layer.bias)
    return 4 * (sum(layer.num_weights for layer in layers) + biases + profile.num_cut(cut))
