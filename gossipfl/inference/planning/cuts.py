"""Where to cut a served model for one device: the online half of QPART, by the costs that were measured.

For a request, Algorithm 2 of Li, Ghafouri, Ji, Vandierendonck, John and Nikolopoulos, "QPART: Adaptive Model Quantization and
Dynamic Workload Balancing for Accuracy-aware Edge Inference" (arXiv 2506.23934) takes the stored bits for the allowed loss of
accuracy and the cheapest of all cuts, from 0 (all on the server) to L (all on the device):

    plan, rows = choose_plan(catalogue, device, max_accuracy_loss=0.01)

What has been measured is the `catalogue`; bytes are counted in `sizes`.

Costs are the paper's weighted sum of time, the device's energy and the server's price, with these differences. Seconds of
computing are those of real engines, timed when the model was calibrated: fewer bits make fewer bytes, not faster arithmetic.
Weights are not sent for each request but fetched once for all that the device expects, less the planes that it holds already;
before them comes the offer, with the samples that an engine is compiled with if the device lacks these.
Messages take the link's latency and have headers, a request takes more than its layers and bytes, and the part on the device
must fit its memory.

To fall back costs as well: afresh, with the input as it is and all layers, or by continuing, with the planes that the values at
the cut lack and the layers after it. Where it was measured how many requests fall back, each cut is priced with its share of
the cheaper way, and bits of stricter levels compete with those of the level: more bytes, but fewer fallbacks. Where it was
not, the cheapest cut is taken as if none fell back, and the plan says so. The shares are of samples that no certificate is
tested on (`Calibrator.catalogue`), so that a certificate holds for the plan that is chosen as for any other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

from gossipfl.errors import PlanError
from gossipfl.inference.planning.cascade import with_fallbacks
from gossipfl.inference.planning.catalogue import Catalogue
from gossipfl.inference.planning.offers import offer_bytes
from gossipfl.inference.planning.profile import (
    FULL_ENGINE,
    ON_DEVICE,
    ON_SERVER,
    DeviceProfile,
    Expected,
    Fallback,
    FallbackCost,
    ModelProfile,
    Plan,
    Prediction,
    Stage,
    check_device,
)
from gossipfl.inference.planning.sizes import HEADER_BYTES, Fetched, LayerSizes, activation_bytes, message_bytes, missing_bytes
from gossipfl.protocol.messages import FULL_BITS
from gossipfl.segments.codecs.planes import MAX_PLANES


@dataclass(frozen=True, slots=True)
class CutRow:
    """One cut for one device. Nothing but `obstacle` is known of a cut without bits at the level.

    `fallback_rate` and what is `expected` with it are None where nobody has measured how many fall back.
    """

    cut: int
    weight_bits: tuple[int, ...] = ()
    activation_bits: int = 0
    device_engine: str = ""
    server_engine: str = ""
    prediction: Prediction | None = None
    obstacle: str | None = None
    """Why this cut cannot be; None if it can."""
    fallback: Fallback = "full"
    afresh: FallbackCost | None = None
    continued: FallbackCost | None = None
    fallback_rate: float | None = None
    expected: Expected | None = None
    other_engines: tuple[str, ...] = ()
    request_s: float = 0.0
    """Of a request with the weights there: what is predicted, without its share of what is fetched."""
    offer_s: float = 0.0
    """Of the offer's coming down, with the samples to compile an engine with; once for all requests that are expected."""
    pull_s: float = 0.0
    """Of pulling the weights, once as well."""

    @property
    def cost(self) -> float:
        """What is minimised: infinite for a cut that cannot be."""
        if self.prediction is None or self.obstacle is not None:
            return math.inf
        return self.prediction.cost if self.expected is None else self.expected.cost


def choose_plan(
    catalogue: Catalogue,
    device: DeviceProfile,
    max_accuracy_loss: float,
    cached: Sequence[int] = (),
    has_samples: bool = False,
    refused: Collection[str] = (),
) -> tuple[Plan, tuple[CutRow, ...]]:
    """The cheapest plan for `device`, and what every cut 0..L would cost. `cached[l]` planes of layer l are on the device.

    It gets no samples to compile its engine with where it `has_samples` already, and none of the engines that it has `refused`,
    if "fp32" can be had in their place.

    PlanError where no level is within `max_accuracy_loss` or no cut fits the memory, with the nearest that would do;
    ConfigError for a device that cannot be.
    """
    check_device(device)
    num_layers = len(catalogue.profile.layers)
    if len(cached) > num_layers or not all(0 <= bits <= MAX_PLANES for bits in cached):
        raise PlanError(f"cached bits {tuple(cached)} are not 0 to {MAX_PLANES} for each of at most {num_layers} layers")
    levels = _levels_within(catalogue, max_accuracy_loss)
    if not catalogue.fallback_rates:
        levels = levels[:1]  # nothing speaks for more bits than are needed
    known = replace(catalogue, sample_bytes=0) if has_samples else catalogue
    if FULL_ENGINE in catalogue.device_s:
        left = {name: times for name, times in catalogue.device_s.items() if name == FULL_ENGINE or name not in refused}
        known = replace(known, device_s=left)
    sizes = LayerSizes(catalogue.profile, cached)
    afresh = _fallback_cost(catalogue, device, 0, activation_bytes(catalogue.profile, 0, FULL_BITS))
    no_bits = f"has no bits for a loss of {max_accuracy_loss:g}"
    found = (_best_row(known, device, levels, cut, sizes, afresh) for cut in range(num_layers + 1))
    rows = tuple(row if row.prediction else CutRow(row.cut, obstacle=no_bits) for row in found)
    best = min(rows, key=lambda row: row.cost)
    if not best.cost < math.inf:
        memory, cut = min((row.prediction.memory_bytes, row.cut) for row in rows if row.prediction)
        raise PlanError(
            f"memory_bytes = {device.memory_bytes:,} of device {device.name!r} is too little for every cut; "
            f"the smallest, after {cut} of {num_layers} layers, takes {memory:,}"
        )
    return _plan(catalogue, best), rows


def fetch_seconds(catalogue: Catalogue, device: DeviceProfile, weight_bits: Sequence[int], cached: Sequence[int] = ()) -> float:
    """Of pulling what is missing of them, all at once, with the headers of all messages; 0 where nothing is."""
    return _fetch_seconds(catalogue, device, LayerSizes(catalogue.profile, cached).fetched(weight_bits))


def _levels_within(catalogue: Catalogue, max_accuracy_loss: float) -> list[float]:
    """The stored levels that `max_accuracy_loss` allows, the largest first."""
    if not max_accuracy_loss >= 0:
        raise PlanError(f"max_accuracy_loss = {max_accuracy_loss} is no loss of accuracy; give a share of at least 0, as 0.01")
    allowed = [level for level in catalogue.levels if level <= max_accuracy_loss]
    if not allowed:
        nearest = min(catalogue.levels)
        raise PlanError(f"no plan keeps within max_accuracy_loss = {max_accuracy_loss}; the nearest is {nearest}")
    return sorted(allowed, reverse=True)


def _best_row(
    catalogue: Catalogue, device: DeviceProfile, levels: Sequence[float], cut: int, sizes: LayerSizes, afresh: FallbackCost
) -> CutRow:
    """With the bits of the first level; or of a later, stricter one where with its fallbacks that is cheaper."""
    computing = _computing(catalogue, device, cut, sizes)
    best = _row(catalogue, device, levels[0], cut, sizes, computing, afresh)
    for level in levels[1:]:
        if best.prediction is not None and not best.fallback_rate:
            break  # where nothing falls back, more bits save nothing; where that is not known, nobody can tell
        row = _row(catalogue, device, level, cut, sizes, computing, afresh)
        if row.fallback_rate is not None and (best.prediction is None or row.cost < best.cost):
            best = row
    return best


class _Computing(NamedTuple):
    """What a cut takes but for its bits. `others` than `engine` are cheaper than the full one too, the cheapest first."""

    engine: str
    others: tuple[str, ...]
    server_engine: str
    device_s: float
    server_s: float
    memory_bytes: int
    sample_bytes: int
    obstacle: str | None


def _computing(catalogue: Catalogue, device: DeviceProfile, cut: int, sizes: LayerSizes) -> _Computing:
    device_times, server_times = _times(catalogue.device_s, cut), _times(catalogue.server_s, cut)
    memory = {engine: sizes.resident_bytes(cut, engine) for engine in device_times}
    fitting = [engine for engine, num_bytes in memory.items() if num_bytes <= device.memory_bytes]
    samples = {engine: catalogue.sample_bytes if cut and engine != FULL_ENGINE else 0 for engine in device_times}

    def computing_cost(engine: str) -> tuple[float, float]:
        device_s = device_times[engine] / device.speed
        return (device.time_weight + device.energy_weight * device.compute_w) * device_s, device_s

    def cost(engine: str) -> tuple[float, float]:
        """With what it takes to compile."""
        computing, device_s = computing_cost(engine)
        return computing + device.time_weight * samples[engine] / device.downlink / device.requests, device_s

    engine = min(fitting, key=cost) if fitting else min(memory, key=memory.__getitem__)
    others: tuple[str, ...] = ()
    if engine != FULL_ENGINE:  # its samples are there for the others too
        cheaper = takewhile(FULL_ENGINE.__ne__, sorted(fitting, key=computing_cost))
        others = tuple(other for other in cheaper if other != engine)
    server_engine = min(server_times, key=server_times.__getitem__)
    overhead = catalogue.overhead(cut)
    device_s = (device_times[engine] + overhead.device_s) / device.speed
    server_s = server_times[server_engine] + overhead.server_s
    obstacle = None if fitting else f"takes {memory[engine]:,} bytes of memory, of {device.memory_bytes:,}"
    return _Computing(engine, others, server_engine, device_s, server_s, memory[engine], samples[engine], obstacle)


def _row(
    catalogue: Catalogue,
    device: DeviceProfile,
    level: float,
    cut: int,
    sizes: LayerSizes,
    computing: _Computing,
    afresh: FallbackCost,
) -> CutRow:
    profile, overhead = catalogue.profile, catalogue.overhead(cut)
    if cut not in catalogue.levels[level]:
        return CutRow(cut)
    weights, activations = catalogue.levels[level][cut]
    engine, others, server_engine, device_s, server_s, memory, samples, obstacle = computing
    fetched = sizes.fetched(weights)
    up = activation_bytes(profile, cut, activations)
    offer = offer_bytes(profile, weights)
    offer_s = message_bytes(offer + samples) / device.downlink
    pull_s = _fetch_seconds(catalogue, device, fetched)
    uplink_s = answer_s = 0.0
    if cut < len(profile.layers):
        uplink_s, answer_s = _exchange_seconds(profile, device, up)
    transfer_s = (offer_s + pull_s) / device.requests + uplink_s + answer_s
    latency_s = device_s + transfer_s + server_s + overhead.rest_s
    request_s = device_s + uplink_s + answer_s + server_s + overhead.rest_s
    energy_j = device.compute_w * device_s + device.transmit_w * uplink_s
    cost = device.time_weight * latency_s + device.energy_weight * energy_j + device.price_weight * server_s
    prediction = Prediction(
        latency_s, device_s, server_s, transfer_s, energy_j, cost, fetched.num_bytes, up, memory, level, samples, offer
    )
    fallback = _fallback(catalogue, device, cut, activations, prediction, afresh)
    what = cut, weights, activations, engine, server_engine, prediction, obstacle
    return CutRow(*what, *fallback, others, request_s=request_s, offer_s=offer_s, pull_s=pull_s)


def _fallback(
    catalogue: Catalogue, device: DeviceProfile, cut: int, bits: int, reduced: Prediction, afresh: FallbackCost
) -> tuple[Fallback, FallbackCost | None, FallbackCost | None, float | None, Expected | None]:
    """The last fields of a row: the way that is cheaper, for all that take it where it is known how many do, else for each."""
    if not cut and bits == FULL_BITS:
        return "full", None, None, 0.0, with_fallbacks(reduced, None, 0.0)
    rates = catalogue.fallback_rates.get(reduced.accuracy_loss, {}).get(cut)
    continued = None
    if 0 < bits < MAX_PLANES and (rates is None or rates.continued is not None):
        found = _fallback_cost(catalogue, device, cut, missing_bytes(catalogue.profile, cut, bits))
        continued = found if found.cost < afresh.cost else None
    if rates is None:
        return "continued" if continued else "full", afresh, continued, None, None
    if continued and rates.continued is not None and rates.continued * continued.cost < rates.full * afresh.cost:
        return "continued", afresh, continued, rates.continued, with_fallbacks(reduced, continued, rates.continued)
    return "full", afresh, None, rates.full, with_fallbacks(reduced, afresh, rates.full)


def _fetch_seconds(catalogue: Catalogue, device: DeviceProfile, fetched: Fetched) -> float:
    if not fetched.num_pieces:
        return 0.0
    transfer_s = fetched.bytes_up / device.uplink + fetched.bytes_down / device.downlink
    return transfer_s + 2 * device.latency_s + catalogue.overheads[0].rest_s


def _exchange_seconds(profile: ModelProfile, device: DeviceProfile, up: int) -> tuple[float, float]:
    """Of sending a server `up` bytes of a sample, and of having its scores back."""
    uplink_s = message_bytes(up) / device.uplink
    return uplink_s, (4 * profile.num_classes + HEADER_BYTES) / device.downlink + 2 * device.latency_s


def _fallback_cost(catalogue: Catalogue, device: DeviceProfile, cut: int, up: int) -> FallbackCost:
    """Of sending `up` bytes more for the layers after the cut."""
    overhead = catalogue.overhead(cut)
    device_s = overhead.device_s / device.speed
    server_s = min(_times(catalogue.server_s, cut).values()) + overhead.server_s
    uplink_s, answer_s = _exchange_seconds(catalogue.profile, device, up)
    latency_s = device_s + uplink_s + server_s + answer_s + overhead.rest_s
    energy_j = device.compute_w * device_s + device.transmit_w * uplink_s
    cost = device.time_weight * latency_s + device.energy_weight * energy_j + device.price_weight * server_s
    return FallbackCost(latency_s, server_s, energy_j, cost, up)


def _times(times: Mapping[str, Sequence[float | None]], cut: int) -> dict[str, float]:
    """Seconds of the engines that run it."""
    return {engine: value for engine, seconds in times.items() if (value := seconds[cut]) is not None}


def _plan(catalogue: Catalogue, row: CutRow) -> Plan:
    layers, cut = catalogue.profile.layers, row.cut
    codecs = tuple(f"planes:0-{bits}:{layer.group}" for bits, layer in zip(row.weight_bits, layers, strict=False))
    stages = []
    if cut:
        stages.append(Stage(ON_DEVICE, 0, cut, codecs, row.device_engine))
    if cut < len(layers):
        stages.append(Stage(ON_SERVER, cut, len(layers), ("float32",) * (len(layers) - cut), row.server_engine))
    assert row.prediction is not None, "a row that was chosen"
    return Plan(
        catalogue.version,
        tuple(stages),
        cut,
        row.weight_bits,
        row.activation_bits,
        row.prediction,
        row.fallback,
        row.afresh,
        row.continued,
        row.fallback_rate,
        row.other_engines,
    )
