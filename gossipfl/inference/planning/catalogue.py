"""What has been measured of one version of a model, and its JSON: calibrating makes it, the choice of the cut reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from gossipfl.errors import PlanError
from gossipfl.inference.planning.json_values import read
from gossipfl.inference.planning.profile import FallbackRates, ModelProfile
from gossipfl.protocol.messages import FULL_BITS
from gossipfl.segments.codecs.planes import MAX_PLANES

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
