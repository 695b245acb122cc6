"""What a cascade costs: the reduced model for every request, and the full one for those that fall back.

ARI (arXiv 2408.14528) counts energy: E = E_R + F E_F with F the share that falls back, and saves 1 - E_R / E_F - F of what the
full model alone takes. Latency, bytes and work add up in the same way; a request that falls back pays for both.

    saved = saving(reduced=relative_energy_of_streams(8), full=1.0, fallback_rate=0.083)     # 0.85

The three `relative_energy_...` are assumptions about hardware that is not here; seconds are measured on a machine that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gossipfl.errors import ConfigError
from gossipfl.inference.planning.certificates import Certificate
from gossipfl.inference.planning.profile import Expected, FallbackCost, ModelProfile, Plan, Prediction

FULL_STREAM_BITS = 12
FULL_INTEGER_BITS = 16
FULL_MANTISSA_BITS = 10


def cascade_cost(reduced: float, full: float, fallback_rate: float) -> float:
    """Mean cost of a request, in the unit of both."""
    return reduced + fallback_rate * full


def with_fallbacks(reduced: Prediction, fallback: FallbackCost | None, fallback_rate: float) -> Expected:
    """Of a mean request; `fallback` is None where the answer is the full model's already."""
    if fallback is None:
        return Expected(reduced.latency_s, reduced.server_s, reduced.energy_j, reduced.cost, reduced.activation_bytes)
    return Expected(
        cascade_cost(reduced.latency_s, fallback.latency_s, fallback_rate),
        cascade_cost(reduced.server_s, fallback.server_s, fallback_rate),
        cascade_cost(reduced.energy_j, fallback.energy_j, fallback_rate),
        cascade_cost(reduced.cost, fallback.cost, fallback_rate),
        cascade_cost(reduced.activation_bytes, fallback.bytes_up, fallback_rate),
    )


def saving(reduced: float, full: float, fallback_rate: float) -> float:
    """Share of the full model's cost that the cascade saves; negative where it costs more."""
    return 1.0 - cascade_cost(reduced, full, fallback_rate) / full


def relative_energy_of_streams(bits: int, full_bits: int = FULL_STREAM_BITS) -> float:
    """Stochastic computing takes as long as its streams are: 2^bits against 2^full_bits. The paper's longest have 2^12."""
    return 2.0 ** (bits - full_bits)


def relative_energy_of_integers(weight_bits: float, activation_bits: float, full_bits: int = FULL_INTEGER_BITS) -> float:
    """An array multiplier has a cell for each pair of bits: their product, against `full_bits` squared. No memory traffic."""
    return weight_bits * activation_bits / full_bits**2


def relative_energy_of_mantissas(bits: int, full_bits: int = FULL_MANTISSA_BITS) -> float:
    """The multiplier of significands alone, quadratic in their width of 1 + `bits`; exponents and additions are left out."""
    return ((1 + bits) / (1 + full_bits)) ** 2


def cheapest(certificates: Iterable[Certificate], plan: Plan) -> Certificate | None:
    """Of certificates of the plan with one fallback and the other, that whose fallbacks cost a mean request the least."""

    def cost(certificate: Certificate) -> float:
        each = plan.continued if certificate.basis.fallback == "continued" else plan.afresh
        return 0.0 if each is None else certificate.fallback_rate * each.cost

    return min(certificates, key=cost, default=None)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one request. What was not measured or makes no sense for a model is None."""

    seconds: float | None = None
    num_bytes: float | None = None
    """Of weights and activations that move."""
    bit_macs: float | None = None
    """Multiply-accumulates, each times the bits of its weight and of its activation."""
    energy: float | None = None
    """In units of the full model's."""


def of_cascade(reduced: Cost, full: Cost, fallback_rate: float) -> Cost:
    """Mean cost of a request; None where one of the two is."""

    def mixed(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else cascade_cost(one, other, fallback_rate)

    return Cost(
        mixed(reduced.seconds, full.seconds),
        mixed(reduced.num_bytes, full.num_bytes),
        mixed(reduced.bit_macs, full.bit_macs),
        mixed(reduced.energy, full.energy),
    )


def bit_macs(profile: ModelProfile, weight_bits: Sequence[int], activation_bits: Sequence[int]) -> float:
    """Multiply-accumulates of all layers, each weighted by the bits of its weights and of its inputs."""
    if not len(weight_bits) == len(activation_bits) == len(profile.layers):
        raise ConfigError(
            f"{len(weight_bits)} and {len(activation_bits)} bit widths for {len(profile.layers)} layers; give one for each"
        )
    layers = zip(profile.layers, weight_bits, activation_bits, strict=True)
    return float(sum(layer.macs * weights * activations for layer, weights, activations in layers))
