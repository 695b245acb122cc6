"""The vocabulary of inference: what is known of a served model and of a device, and what a plan says.

The served model is a derived version of a trained one (batch norm folded into its convolutions), one flat vector with a layout
of its own: for each layer its weight, then its bias. A cut `p` puts layers 1..p on the device and the rest on the server; p = 0
is all on the server, p = L all on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from gossipfl.errors import ConfigError

Range = tuple[int, int]
"""Half-open range `(start, stop)` of the served vector."""
Shape = tuple[int, ...]
"""Of one sample, without the batch."""
Fallback = Literal["full", "continued"]
"""What answers where the reduced model is unsure: the full model, afresh from the input; or the layers after the cut once more,
from the values at the cut with all planes (the layers before it stay quantized)."""
FULL: Fallback = "full"
ON_DEVICE, ON_SERVER = "device", "server"
FULL_ENGINE = "fp32"
"""Of the full model, which the others are measured by; it is compiled without samples."""

_LEAST, _MOST = 1e-9, 1e15
"""Of what a device may say of itself: far outside of what there is, and every cost stays finite."""


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """A convolution or linear layer of the served model, with all that follows it up to the next one."""

    name: str
    kind: Literal["conv2d", "linear"]
    weight: Range
    bias: Range | None
    channels: int
    """Output channels: groups of the weight that are scaled on their own."""
    macs: int
    """Multiply-accumulates per sample."""
    live: tuple[Shape, ...]
    """The tensors that later layers need: what goes up where the model is cut after this layer. Of the last: the scores."""

    @property
    def num_weights(self) -> int:
        return self.weight[1] - self.weight[0]

    @property
    def group(self) -> int:
        """Weights per channel."""
        return self.num_weights // self.channels

    @property
    def num_live(self) -> int:
        return sum(math.prod(shape) for shape in self.live)


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """The served model as a chain of layers (L of them)."""

    layers: tuple[LayerProfile, ...]
    input_shape: Shape
    num_classes: int

    def num_cut(self, cut: int) -> int:
        """Values that go up where the model is cut after `cut` layers; the input for 0, nothing for all."""
        if cut == len(self.layers):
            return 0
        return self.layers[cut - 1].num_live if cut else math.prod(self.input_shape)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """An edge device and its link, as its request names them.

    `speed` is relative to the machine that calibrated (0.1: ten times slower). What is minimised is
    time_weight * seconds + energy_weight * the device's joules + price_weight * the server's seconds.
    """

    name: str = "device"
    speed: float = 1.0
    memory_bytes: int = 1 << 30
    uplink: float = math.inf  # bytes/s
    downlink: float = math.inf  # bytes/s
    latency_s: float = 0.0  # one way
    compute_w: float = 1.0
    transmit_w: float = 1.0
    time_weight: float = 1.0  # per second
    energy_weight: float = 0.0  # per joule
    price_weight: float = 0.0  # per server second
    requests: int = 1
    """Requests expected for each download of the weights."""


def is_within(least: float, value: Any, most: float) -> bool:
    """Whether it is a number, and from `least` to `most`; nan is not."""
    return issubclass(type(value), Real) and bool(least <= value <= most)


def check_loss(max_accuracy_loss: float | None) -> None:
    """ConfigError for what is no share."""
    if max_accuracy_loss is not None and not is_within(0, max_accuracy_loss, 1):
        raise ConfigError(f"max_accuracy_loss = {max_accuracy_loss!r}; give a share from 0 to 1, as 0.01")


def check_device(device: DeviceProfile) -> None:
    """ConfigError, naming the key and the remedy, for a device that cannot be."""
    rate = "above 0: bytes per second, or inf where there is no limit"
    watts, weight = "watts of at least 0", "a number of at least 0"
    checks = (
        ("speed", _LEAST, _MOST, "above 0: 1 is the machine that calibrated, 0.1 is ten times slower"),
        ("memory_bytes", 1, _MOST, "above 0: the bytes that the model may take"),
        ("uplink", _LEAST, math.inf, rate),
        ("downlink", _LEAST, math.inf, rate),
        ("latency_s", 0, _MOST, "seconds of at least 0, one way"),
        ("compute_w", 0, _MOST, watts),
        ("transmit_w", 0, _MOST, watts),
        ("time_weight", 0, _MOST, weight),
        ("energy_weight", 0, _MOST, weight),
        ("price_weight", 0, _MOST, weight),
        ("requests", 1, _MOST, "at least 1: those expected for each download of the weights"),
    )
    for key, least, most, expected in checks:
        value = getattr(device, key)
        if not is_within(least, value, most):
            expected = f"at most {most:g}" if is_within(most, value, math.inf) else expected
            raise ConfigError(f"{key} = {value!r} of device {device.name!r} must be {expected}")
    if not device.time_weight + device.energy_weight + device.price_weight:
        raise ConfigError(f"device {device.name!r} weighs nothing; give time_weight, energy_weight or price_weight, such as 1")


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `[start, stop)` on one device, pulled with these codecs (one for each layer)."""

    device: str
    start: int
    stop: int
    codecs: tuple[str, ...]
    engine: str = FULL_ENGINE


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one request is predicted to cost; what is downloaded is spread over the requests expected, in time alone."""

    latency_s: float
    device_s: float
    server_s: float
    transfer_s: float
    energy_j: float
    cost: float
    weight_bytes: int
    activation_bytes: int
    memory_bytes: int
    accuracy_loss: float
    sample_bytes: int = 0
    """Of the samples that the device compiles its engine with, where it gets them."""
    offer_bytes: int = 0
    """Of the rest of the offer that this is part of: the plan, and a digest for each piece of the layers."""


@dataclass(frozen=True, slots=True)
class FallbackCost:
    """What a sample that falls back is predicted to cost beside what it has cost already."""

    latency_s: float
    server_s: float
    energy_j: float
    cost: float
    bytes_up: int


@dataclass(frozen=True, slots=True)
class FallbackRates:
    """Shares of the requests that fall back, by way; `continued` is None where continuing cannot be certified."""

    full: float
    continued: float | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """What a mean request is predicted to cost: each the reduced model's part, and some a fallback's as well."""

    latency_s: float
    server_s: float
    energy_j: float
    cost: float
    bytes_up: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in the order of the layers (QPART: two, or one where all is at one place), and how the cut goes up."""

    version: int
    stages: tuple[Stage, ...]
    cut: int
    weight_bits: tuple[int, ...]
    """Of the device's layers."""
    activation_bits: int
    """Of the cut's values; 0 where nothing is cut."""
    prediction: Prediction
    fallback: Fallback = "full"
    afresh: FallbackCost | None = None
    """None where there is nothing to fall back from."""
    continued: FallbackCost | None = None
    """None where there is nothing left to send, or starting afresh is as cheap: then nobody continues."""
    fallback_rate: float | None = None
    """Share of the requests that fall back; None where nobody has measured it: then the plan was chosen as if none did."""
    other_engines: tuple[str, ...] = ()
    """What comes next for the device's layers, should its engine be of no use there; all that were better than fp32."""

    @property
    def device_engines(self) -> tuple[str, ...]:
        """What a certificate of the plan speaks of; the rest runs in full precision."""
        return tuple(stage.engine for stage in self.stages if stage.device == ON_DEVICE)

    @property
    def fallback_cost(self) -> FallbackCost | None:
        """Of the way that is named."""
        return self.continued if self.fallback == "continued" else self.afresh
