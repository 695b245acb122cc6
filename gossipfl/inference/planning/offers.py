"""What a device asks a server for, what the server offers, and which pieces of the model the device then has to pull.

Both travel as JSON: objects whose keys are the fields below, an infinite number as null. Nothing that comes in is trusted: what
is no such object is a RemoteProtocolError, an offer that does not add up for the device's own model a PlanError. An offer is
filled up with spaces to the size that its plan predicts, since that cannot know how many digits a threshold has.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Literal, TypeVar

from gossipfl.errors import PlanError, RemoteProtocolError
from gossipfl.inference.planning.json_values import MAX_INTEGER, read
from gossipfl.inference.planning.profile import (
    ON_DEVICE,
    ON_SERVER,
    DeviceProfile,
    FallbackCost,
    ModelProfile,
    Plan,
    Prediction,
    Range,
    Stage,
)
from gossipfl.protocol.messages import FULL_BITS
from gossipfl.protocol.wire import MAX_NAME_BYTES
from gossipfl.segments.codecs.planes import MAX_PLANES, Planes

SAMPLE_BITS = 8
BIASES = "float32"
"""The codec of biases."""
T = TypeVar("T")


class Failure(StrEnum):
    """Kinds of a failure; of these only BUSY passes by itself."""

    BUSY = "busy"
    DRAINING = "draining"
    MODEL = "model"
    """Nobody here has it."""
    VERSION = "version"
    """Not held here (any more)."""
    PLAN = "plan"
    """No plan keeps within what is allowed."""
    FORGOTTEN = "forgotten"
    """What was to be continued is not kept (any more)."""
    OFFER = "offer"
    """What was offered, or pulled of it, is not what it should be."""
    INPUT = "input"
    """The question cannot be right."""
    COMPUTE = "compute"
    """Loading or computing went wrong."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A plan for this device, please, within this loss of accuracy (None: the server's choice).

    It has version `held` already (0: none), and of it `cached` planes of each of the first layers: the answer may wait until
    there is a newer one, for at most `wait_s`. `samples` is the digest of those it has to compile engines with. Those engines
    that are `refused`, and why, do not work on it or are slower than "fp32" there, and are not planned.
    """

    device: DeviceProfile
    max_accuracy_loss: float | None = None
    held: int = 0
    wait_s: float = 0.0
    cached: tuple[int, ...] = ()
    samples: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LayerOffer:
    """One of the device's layers: the codec of its weights, the digest of each plane (scales with the first), of its bias."""

    codec: str
    planes: tuple[str, ...]
    bias: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A version of a model and how a device is to run it.

    An answer of the reduced model is accepted from margin `threshold` on (0: always), on `scale`, others fall back as the plan
    says; with probability 1 - `delta` at most `alpha` of all requests are then answered otherwise than by the full model (None:
    nobody has measured it).
    `samples` are inputs that the plan's engine is compiled with, where it needs any and the device has others than these:
    activations at cut 0 in SAMPLE_BITS bits, in base64. Compiled with the same ones, it computes what was certified.
    """

    model: str
    version: int
    layout: str
    plan: Plan
    layers: tuple[LayerOffer, ...]
    threshold: float = 0.0
    scale: Literal["softmax", "logits"] = "softmax"
    alpha: float | None = None
    delta: float | None = None
    samples: str = ""

    @property
    def cut(self) -> int:
        return self.plan.cut

    @property
    def sends_everything(self) -> bool:
        """Whether the server computes everything, from inputs as they are: nothing is reduced."""
        return self.cut == 0 and self.plan.activation_bits == FULL_BITS

    def check(self, profile: ModelProfile, layout: str) -> None:
        """PlanError unless it adds up for a model that the device knows as `profile`, with this layout's digest."""
        plan, num_layers = self.plan, len(profile.layers)
        if self.layout != layout:
            _refuse(f"its model has layout {self.layout}, the one here {layout}", "build the same model at both ends")
        if self.version < 1 or plan.version != self.version:
            _refuse(f"version {self.version} with a plan for version {plan.version}")
        if not 0 <= self.cut <= num_layers:
            _refuse(f"a cut after {self.cut} of {num_layers} layers")
        if not len(plan.weight_bits) == len(self.layers) == self.cut:
            _refuse(f"{len(plan.weight_bits)} weight bits and {len(self.layers)} layers for a cut after {self.cut}")
        is_cut = self.cut < num_layers
        if plan.activation_bits not in ({FULL_BITS, *range(1, MAX_PLANES + 1)} if is_cut else {0}):
            _refuse(f"activation_bits = {plan.activation_bits} for a cut after {self.cut} of {num_layers} layers")
        if plan.fallback == "continued" and not 0 < plan.activation_bits < MAX_PLANES:
            _refuse(f"fallbacks that continue what went up at {plan.activation_bits} bits")
        if not self.threshold >= 0 or self.scale not in ("softmax", "logits"):
            _refuse(f"threshold = {self.threshold} on scale {self.scale!r}")
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            if value is not None and not 1e-9 <= value < 1:
                _refuse(f"{name} = {value}")
        for layer, offer, bits in zip(profile.layers, self.layers, plan.weight_bits, strict=False):
            if not 1 <= bits <= MAX_PLANES or offer.codec != Planes(0, bits, layer.group).name or len(offer.planes) != bits:
                _refuse(f"{len(offer.planes)} planes as {offer.codec!r} for {bits} bits of layer {layer.name!r}")
            if (offer.bias is None) != (layer.bias is None):
                _refuse(f"layer {layer.name!r} has {'a' if layer.bias else 'no'} bias")


def _refuse(what: str, remedy: str = "update the server") -> None:
    raise PlanError(f"the offer does not add up: {what}; {remedy}")


def samples_digest(samples: str) -> str:
    """Of a manifest's samples; empty where there are none."""
    return hashlib.blake2b(samples.encode(), digest_size=16).hexdigest() if samples else ""


# --- pieces -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """The smallest thing that is cached: one plane of a layer's weights, or its bias. `digest` names the content."""

    digest: str
    range: Range
    codec: str


def pieces(manifest: Manifest, profile: ModelProfile) -> Iterator[Piece]:
    """All that the device's layers consist of."""
    for layer, offer in zip(profile.layers, manifest.layers, strict=False):
        for plane, digest in enumerate(offer.planes):
            yield Piece(digest, layer.weight, Planes(plane, plane + 1, layer.group).name)
        if layer.bias is not None and offer.bias is not None:
            yield Piece(offer.bias, layer.bias, BIASES)


def missing(manifest: Manifest, profile: ModelProfile, have: Collection[str]) -> dict[str, list[Range]]:
    """What to pull where the pieces `have` (digests) are there already: ranges by codec, adjacent planes as one."""
    pulls: dict[str, list[Range]] = {}
    for layer, offer in zip(profile.layers, manifest.layers, strict=False):
        first = None
        for plane, digest in enumerate((*offer.planes, None)):
            is_missing = digest is not None and digest not in have
            if is_missing and first is None:
                first = plane
            elif not is_missing and first is not None:
                pulls.setdefault(Planes(first, plane, layer.group).name, []).append(layer.weight)
                first = None
        if layer.bias is not None and offer.bias not in have:
            pulls.setdefault(BIASES, []).append(layer.bias)
    return pulls


def split(codec: str, range_: Range, payload: memoryview) -> Iterator[tuple[Piece, memoryview]]:
    """What has been pulled of `range_` as the pieces that are cached, still without their digests."""
    if codec == BIASES:
        yield Piece("", range_, BIASES), payload
        return
    whole, num_values, begin = Planes.of(codec), range_[1] - range_[0], 0
    for plane in range(whole.start, whole.stop):
        one = Planes(plane, plane + 1, whole.group)
        end = begin + one.num_bytes(num_values)
        yield Piece("", range_, one.name), payload[begin:end]
        begin = end


# --- JSON -------------------------------------------------------------------------------------------------------------


def to_json(value: Ask | LayerOffer | Manifest) -> bytes:
    return json.dumps(_plain(value), allow_nan=False, separators=(",", ":"), default=_item).encode()


def offer_to_json(manifest: Manifest) -> bytes:
    """As long as its plan predicts (`offer_bytes`), and the samples."""
    return to_json(manifest).ljust(manifest.plan.prediction.offer_bytes + len(manifest.samples))


def offer_bytes(profile: ModelProfile, weight_bits: Sequence[int]) -> int:
    """Of an offer without samples, of the first layers at these bits: the most that it takes.

    Engines with long names and models whose names JSON has to escape may take a little more.
    """
    layers = zip(profile.layers, weight_bits, strict=False)
    of_layers = sum(_layer_bytes(bits, layer.group, layer.bias is not None) for layer, bits in layers)
    return _least_bytes() + of_layers + (len(profile.layers) - len(weight_bits)) * len('"float32",')


@cache
def _layer_bytes(bits: int, group: int, has_bias: bool) -> int:
    """Of what an offer says of a layer on the device: its digests, its codec there and in the plan, and its bits."""
    codec, digest = Planes(0, bits, group).name, "0" * 32
    return len(to_json(LayerOffer(codec, (digest,) * bits, digest if has_bias else None))) + len(f',"{codec}",{bits},')


@cache
def _least_bytes() -> int:
    """Of an offer of no layers, where each number and name in it is as long as it may be."""
    real, count, many = sys.float_info.max, 10**5, 10**15
    prediction = Prediction(real, real, real, real, real, real, many, many, many, real, many, many)
    stages = tuple(Stage(where, count, count, (), "e" * 16) for where in (ON_DEVICE, ON_SERVER))
    cost = FallbackCost(real, real, real, real, many)
    plan = Plan(MAX_INTEGER, stages, count, (), FULL_BITS, prediction, "continued", cost, cost, real, ("e" * 11, "e" * 4))
    return len(to_json(Manifest("m" * MAX_NAME_BYTES, MAX_INTEGER, "0" * 16, plan, (), real, "softmax", real, real)))


def ask_from_json(payload: bytes | memoryview) -> Ask:
    """RemoteProtocolError for what `to_json` cannot have written."""
    ask = _from_json(Ask, payload)
    if not 0 <= ask.wait_s < math.inf or ask.held < 0:
        raise RemoteProtocolError(f"a plan request with wait_s = {ask.wait_s}, held = {ask.held}")
    return ask


def manifest_from_json(payload: bytes | memoryview) -> Manifest:
    """RemoteProtocolError for what `to_json` cannot have written; `Manifest.check` says whether it adds up."""
    return _from_json(Manifest, payload)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return None if value == math.inf else value


def _item(number: Any) -> Any:
    """Of numpy's."""
    return number.item()


def _from_json(class_: type[T], payload: bytes | memoryview) -> T:
    name = class_.__name__.lower()
    try:
        value: T = read(class_, json.loads(bytes(payload), parse_float=_finite, parse_constant=_finite), name)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        raise RemoteProtocolError(f"no {name}: {str(error)[:160]}") from error
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value
