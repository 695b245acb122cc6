"""Where to cut a served model for one device: the online half of QPART, by the costs that were measured.

For a request, Algorithm 2 of Li, Ghafouri, Ji, Vandierendonck, John and Nikolopoulos, "QPART: Adaptive Model Quantization and
Dynamic Workload Balancing for Accuracy-aware Edge Inference" (arXiv 2506.23934) takes the stored bits for the allowed loss of
accuracy and the cheapest of all cuts, from 0 (all on the server) to L (all on the device):

    plan, rows = choose_plan(catalogue, device, max_accuracy_loss=0.01)

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
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from gossipfl.errors import ConfigError, PlanError
from gossipfl.inference.planning.cascade import with_fallbacks
from gossipfl.inference.planning.json_values import read
from gossipfl.inference.planning.offers import offer_bytes
from gossipfl.inference.planning.profile import (
    FULL_ENGINE,
    ON_DEVICE,
    ON_SERVER,
    DeviceProfile,
    Expected,
    Fallback,
    FallbackCost,
    FallbackRates,
    LayerProfile,
    ModelProfile,
    Plan,
    Prediction,
    Stage,
)
from gossipfl.protocol.messages import FULL_BITS, MAX_RANGES
from gossipfl.protocol.wire import MAX_PAYLOAD_BYTES
from gossipfl.segments.codecs.planes import MAX_PLANES

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
"""Per weight in memory, by engine; 4 for others."""
HEADER_BYTES, RANGE_BYTES = 80, 12
"""Of a message on the wire beside its payload, with ZeroMQ's frames (76 to 90 for names of 12 and 23 letters), and of each
range that a Pull names."""

_LEAST, _MOST = 1e-9, 1e15
"""Of what a device may say of itself: far outside of what there is, and every cost stays finite."""

Bits = tuple[tuple[int, ...], int]
"""Of the weights of the device's layers, and of each value at the cut (0 where nothing is cut)."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds of a request beside its layers and its bytes, as measured: calls of stages, codecs, messages between threads."""

    device_s: float = 0.0
    """Of the part on the device; a slower one takes longer."""
    server_s: float = 0.0
    rest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All that was measured of one version of a model. PlanError, naming the key, for what cannot be.

    `levels` has bits by loss of accuracy and cut; a level may leave out cuts. `device_s` and `server_s` are seconds per sample
    by engine, for each cut 0..L: of layers 1..cut on a device of speed 1, and of the layers after the cut on the server; None
    where an engine does not run them. `overheads` are of requests that the server computes alone, both, and the device alone.
    `fallback_rates` are of bits of `levels`, by level and cut, as far as they were measured.
    """

    profile: ModelProfile
    version: int
    levels: Mapping[float, Mapping[int, Bits]]
    device_s: Mapping[str, tuple[float | None, ...]]
    server_s: Mapping[str, tuple[float | None, ...]]
    overheads: tuple[Overhead, Overhead, Overhead] = (Overhead(), Overhead(), Overhead())
    sample_bytes: int = 0
    """Of the samples that an offer carries, for engines on the device other than "fp32"."""
    fallback_rates: Mapping[float, Mapping[int, FallbackRates]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_profile(self.profile)
        num_layers = len(self.profile.layers)
        _require(self.version >= 0, "catalogue.version", self.version, "a number of at least 0")
        _require(bool(self.levels), "catalogue.levels", {}, "a table with at least one level")
        for level, cuts in self.levels.items():
            _require(0 <= level < math.inf, f"catalogue.levels.{level}", level, "a loss of accuracy of at least 0")
            _require(bool(cuts), f"catalogue.levels.{level}", {}, "a table with at least one cut")
            for cut, (weights, activations) in cuts.items():
                key = f"catalogue.levels.{level}.{cut}"
                _require(0 <= cut <= num_layers, key, cut, f"a cut of 0 to {num_layers}")
                _require(len(weights) == cut, f"{key}[0]", weights, f"bits for {cut} layers")
                _require(all(1 <= bits <= MAX_PLANES for bits in weights), f"{key}[0]", weights, f"bits of 1 to {MAX_PLANES}")
                is_right = activations == 0 if cut == num_layers else activations in (FULL_BITS, *range(2, MAX_PLANES + 1))
                _require(is_right, f"{key}[1]", activations, f"0 where nothing is cut, else 2 to {MAX_PLANES} or {FULL_BITS}")
        _check_times(self.device_s, "catalogue.device_s", num_layers, none=0)
        _check_times(self.server_s, "catalogue.server_s", num_layers, none=num_layers)
        _require(self.sample_bytes >= 0, "catalogue.sample_bytes", self.sample_bytes, "a number of at least 0")
        for level, by_cut in self.fallback_rates.items():
            for cut, rates in by_cut.items():
                key = f"catalogue.fallback_rates.{level}.{cut}"
                _require(cut in self.levels.get(level, ()), key, cut, "a cut that has bits at this level")
                is_right = 0 <= rates.full <= 1 and (rates.continued is None or 0 <= rates.continued <= 1)
                _require(is_right, key, rates, "a share of 0 to 1 for each way to fall back")
        for index, overhead in enumerate(self.overheads):
            values = astuple(overhead)
            is_right = all(0 <= value < math.inf for value in values)
            _require(is_right, f"catalogue.overheads[{index}]", values, "seconds of at least 0")

    def overhead(self, cut: int) -> Overhead:
        return self.overheads[0 if not cut else 2 if cut == len(self.profile.layers) else 1]

    def to_json(self) -> dict[str, Any]:
        """What `json.dumps` writes; the keys of `levels` become text."""
        return asdict(self)

    @staticmethod
    def from_json(value: object) -> Catalogue:
        """What `to_json` gave, also after a round through JSON. PlanError, naming the key, for anything else."""
        try:
            found: Catalogue = read(Catalogue, value, "catalogue")
        except ValueError as error:
            raise PlanError(f"{error}; calibrate again") from error
        return found


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
    pieces = _Pieces(catalogue.profile, cached)
    afresh = _fallback_cost(catalogue, device, 0, activation_bytes(catalogue.profile, 0, FULL_BITS))
    rows = tuple(_best_row(known, device, levels, cut, pieces, afresh) for cut in range(num_layers + 1))
    best = min(rows, key=lambda row: row.cost)
    if not best.cost < math.inf:
        memory, cut = min((row.prediction.memory_bytes, row.cut) for row in rows if row.prediction)
        raise PlanError(
            f"memory_bytes = {device.memory_bytes:,} of device {device.name!r} is too little for every cut; "
            f"the smallest, after {cut} of {num_layers} layers, takes {memory:,}"
        )
    return _plan(catalogue, best), rows


def check_device(device: DeviceProfile) -> None:
    """ConfigError, naming the key and the remedy, for a device that cannot be."""
    rate = "above 0: bytes per second, or inf where there is no limit"
    watts, weight = "watts of at least 0", "a number of at least 0"
    checks = (
        ("speed", _LEAST <= device.speed <= _MOST, "above 0: 1 is the machine that calibrated, 0.1 is ten times slower"),
        ("memory_bytes", 1 <= device.memory_bytes <= _MOST, "above 0: the bytes that the model may take"),
        ("uplink", device.uplink >= _LEAST, rate),
        ("downlink", device.downlink >= _LEAST, rate),
        ("latency_s", 0 <= device.latency_s <= _MOST, "seconds of at least 0, one way"),
        ("compute_w", 0 <= device.compute_w <= _MOST, watts),
        ("transmit_w", 0 <= device.transmit_w <= _MOST, watts),
        ("time_weight", 0 <= device.time_weight <= _MOST, weight),
        ("energy_weight", 0 <= device.energy_weight <= _MOST, weight),
        ("price_weight", 0 <= device.price_weight <= _MOST, weight),
        ("requests", 1 <= device.requests <= _MOST, "at least 1: those expected for each download of the weights"),
    )
    for key, is_right, expected in checks:
        if not is_right:  # nor is nan
            raise ConfigError(f"{key} = {getattr(device, key)} of device {device.name!r} must be {expected}")
    if not device.time_weight + device.energy_weight + device.price_weight:
        raise ConfigError(f"device {device.name!r} weighs nothing; give time_weight, energy_weight or price_weight, such as 1")


def weight_bytes(profile: ModelProfile, weight_bits: Sequence[int], cached: Sequence[int] = ()) -> int:
    """Bytes to fetch for the first layers at these bits, where `cached` planes of each are there (with scales and biases)."""
    return _Pieces(profile, cached).fetched(weight_bits).num_bytes


def resident_bytes(profile: ModelProfile, cut: int, engine: str) -> int:
    """Of the first `cut` layers: weights as `engine` holds them, biases, and twice the largest live set in float32."""
    return _Pieces(profile, ()).resident_bytes(cut, engine)


def fetch_seconds(catalogue: Catalogue, device: DeviceProfile, weight_bits: Sequence[int], cached: Sequence[int] = ()) -> float:
    """Of pulling what is missing of them, all at once, with the headers of all messages; 0 where nothing is."""
    return _Pieces(catalogue.profile, cached).fetched(weight_bits).seconds(catalogue, device)


@dataclass(frozen=True, slots=True)
class _Fetched:
    """What is pulled for a device, in how many pieces, messages and Pulls."""

    num_bytes: int
    num_pieces: int
    num_messages: int
    num_pulls: int

    def seconds(self, catalogue: Catalogue, device: DeviceProfile) -> float:
        if not self.num_pieces:
            return 0.0
        down = self.num_bytes + HEADER_BYTES * self.num_messages
        up = HEADER_BYTES * self.num_pulls + RANGE_BYTES * self.num_pieces
        return up / device.uplink + down / device.downlink + 2 * device.latency_s + catalogue.overheads[0].rest_s


class _Pieces:
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

    def fetched(self, weight_bits: Sequence[int]) -> _Fetched:
        count = len(weight_bits)
        missing = np.maximum(np.array(weight_bits, np.int64) - self._held[:count], 0)
        pieces = np.concatenate([missing * self._planes[:count] + self._scales[:count], self._biases[:count]])
        num_pieces = int(np.count_nonzero(pieces))
        if not num_pieces:
            return _Fetched(0, 0, 0, 0)
        codecs = set(zip(weight_bits, self._groups, strict=False))
        num_pulls = max(len(codecs) + 1, -(-num_pieces // MAX_RANGES))
        num_messages = int((-(-pieces // MAX_PAYLOAD_BYTES)).sum())
        return _Fetched(int(pieces.sum()), num_pieces, num_messages, num_pulls)

    def resident_bytes(self, cut: int, engine: str) -> int:
        weights = self._num_weights[cut] * WEIGHT_BYTES.get(engine, 4)
        return weights + 4 * self._num_biases[cut] + 2 * 4 * self._num_live[cut]


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


def _num_biases(layer: LayerProfile) -> int:
    return layer.bias[1] - layer.bias[0] if layer.bias else 0


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
    catalogue: Catalogue, device: DeviceProfile, levels: Sequence[float], cut: int, pieces: _Pieces, afresh: FallbackCost
) -> CutRow:
    """With the bits of the first level; or of a later, stricter one where with its fallbacks that is cheaper."""
    computing = _computing(catalogue, device, cut, pieces)
    best = _row(catalogue, device, levels[0], cut, pieces, computing, afresh)
    for level in levels[1:]:
        if best.prediction is not None and not best.fallback_rate:
            break  # where nothing falls back, more bits save nothing; where that is not known, nobody can tell
        row = _row(catalogue, device, level, cut, pieces, computing, afresh)
        if row.fallback_rate is not None and (best.prediction is None or row.cost < best.cost):
            best = row
    return best


class _Computing(NamedTuple):
    """What a cut takes but for its bits."""

    engine: str
    server_engine: str
    device_s: float
    server_s: float
    memory_bytes: int
    sample_bytes: int
    obstacle: str | None


def _computing(catalogue: Catalogue, device: DeviceProfile, cut: int, pieces: _Pieces) -> _Computing:
    device_times, server_times = _times(catalogue.device_s, cut), _times(catalogue.server_s, cut)
    memory = {engine: pieces.resident_bytes(cut, engine) for engine in device_times}
    fitting = [engine for engine, num_bytes in memory.items() if num_bytes <= device.memory_bytes]
    samples = {engine: catalogue.sample_bytes if cut and engine != FULL_ENGINE else 0 for engine in device_times}

    def cost_of(engine: str) -> tuple[float, float]:
        """Of computing here, and of what it takes to compile."""
        device_s = device_times[engine] / device.speed
        computing = (device.time_weight + device.energy_weight * device.compute_w) * device_s
        return computing + device.time_weight * samples[engine] / device.downlink / device.requests, device_s

    engine = min(fitting, key=cost_of) if fitting else min(memory, key=memory.__getitem__)
    server_engine = min(server_times, key=server_times.__getitem__)
    overhead = catalogue.overhead(cut)
    device_s = (device_times[engine] + overhead.device_s) / device.speed
    server_s = server_times[server_engine] + overhead.server_s
    obstacle = None if fitting else f"takes {memory[engine]:,} bytes of memory, of {device.memory_bytes:,}"
    return _Computing(engine, server_engine, device_s, server_s, memory[engine], samples[engine], obstacle)


def _row(
    catalogue: Catalogue,
    device: DeviceProfile,
    level: float,
    cut: int,
    pieces: _Pieces,
    computing: _Computing,
    afresh: FallbackCost,
) -> CutRow:
    profile, overhead = catalogue.profile, catalogue.overhead(cut)
    if cut not in catalogue.levels[level]:
        return CutRow(cut, obstacle=f"has no bits for a loss of {level}")
    weights, activations = catalogue.levels[level][cut]
    engine, server_engine, device_s, server_s, memory, samples, obstacle = computing
    fetched = pieces.fetched(weights)
    up = activation_bytes(profile, cut, activations)
    offer = offer_bytes(profile, weights)
    offer_s = _message_bytes(offer + samples) / device.downlink
    fetch_s = (offer_s + fetched.seconds(catalogue, device)) / device.requests
    uplink_s = answer_s = 0.0
    if cut < len(profile.layers):
        uplink_s, answer_s = _exchange_seconds(profile, device, up)
    transfer_s = fetch_s + uplink_s + answer_s
    latency_s = device_s + transfer_s + server_s + overhead.rest_s
    energy_j = device.compute_w * device_s + device.transmit_w * uplink_s
    cost = device.time_weight * latency_s + device.energy_weight * energy_j + device.price_weight * server_s
    prediction = Prediction(
        latency_s, device_s, server_s, transfer_s, energy_j, cost, fetched.num_bytes, up, memory, level, samples, offer
    )
    fallback = _fallback(catalogue, device, cut, activations, prediction, afresh)
    return CutRow(cut, weights, activations, engine, server_engine, prediction, obstacle, *fallback)


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


def _exchange_seconds(profile: ModelProfile, device: DeviceProfile, up: int) -> tuple[float, float]:
    """Of sending a server `up` bytes of a sample, and of having its scores back."""
    uplink_s = _message_bytes(up) / device.uplink
    return uplink_s, (4 * profile.num_classes + HEADER_BYTES) / device.downlink + 2 * device.latency_s


def _message_bytes(num_bytes: int) -> int:
    """Of a payload with the headers of its chunks."""
    return num_bytes + HEADER_BYTES * -(-num_bytes // MAX_PAYLOAD_BYTES)


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
    )


# --- checks -----------------------------------------------------------------------------------------------------------


def _require(is_right: object, key: str, value: object, expected: str) -> None:
    if not is_right:
        raise PlanError(f"{key} = {str(value)[:60]} is not {expected}; calibrate again")


def _check_profile(profile: ModelProfile) -> None:
    _require(bool(profile.layers), "catalogue.profile.layers", (), "a list of at least one layer")
    _require(profile.num_classes >= 1, "catalogue.profile.num_classes", profile.num_classes, "at least 1")
    _check_shape(profile.input_shape, "catalogue.profile.input_shape")
    stop = 0
    for index, layer in enumerate(profile.layers):
        key = f"catalogue.profile.layers[{index}]"
        for name, part in (("weight", layer.weight), ("bias", layer.bias)):
            if part is not None:
                _require(stop <= part[0] < part[1], f"{key}.{name}", part, f"a range that begins at {stop} or after")
                stop = part[1]
        divides = layer.channels >= 1 and layer.num_weights % layer.channels == 0
        _require(divides, f"{key}.channels", layer.channels, f"a divisor of its {layer.num_weights} weights")
        _require(layer.macs >= 0, f"{key}.macs", layer.macs, "a number of at least 0")
        _require(bool(layer.live), f"{key}.live", (), "a list of at least one shape")
        for shape in layer.live:
            _check_shape(shape, f"{key}.live")


def _check_times(times: Mapping[str, Sequence[float | None]], key: str, num_layers: int, none: int) -> None:
    """`none` is the cut at which there is nothing to compute."""
    for engine, seconds in times.items():
        _require(len(seconds) == num_layers + 1, f"{key}.{engine}", seconds, f"{num_layers + 1} numbers, one for each cut")
        for cut, value in enumerate(seconds):
            is_right = value is None or (value == 0 if cut == none else 0 <= value < math.inf)
            _require(is_right, f"{key}.{engine}[{cut}]", value, "0, with nothing to compute" if cut == none else "seconds")
    for cut in range(num_layers + 1):
        has_any = any(seconds[cut] is not None for seconds in times.values())
        _require(has_any, key, {}, f"a table with an engine that runs cut {cut}")


def _check_shape(shape: tuple[int, ...], key: str) -> None:
    _require(all(size >= 1 for size in shape), key, shape, "a shape of sizes of at least 1")
