"""What a plan says that a request takes, against what it does take: emulated devices behind emulated links, over real sockets.

A device waits until its part has taken as long as at its speed (`EdgeDevice.emulated_speed`), a relay holds bytes back to its
link's rates and latency (`runtime.link_relay`); all else is as it is used. A small model is rarely worth a link, so beside the
plan that is chosen those are measured that cut it in the middle, and that leave it all to the server. `cascades.request_rows`
asks them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.inference.execution.calibration import Calibrator
from gossipfl.inference.execution.engines import undisturbed
from gossipfl.inference.planning.catalogue import Bits, Catalogue, Overhead
from gossipfl.inference.planning.cuts import CutRow, choose_plan, fetch_seconds
from gossipfl.inference.planning.profile import ON_DEVICE, DeviceProfile, FallbackRates, Plan
from gossipfl.inference.planning.receipts import Receipt
from gossipfl.runtime.edge_device import EdgeDevice
from gossipfl.runtime.inference_server import InferenceServer
from gossipfl.runtime.link_relay import LinkRelay
from gossipfl.runtime.served import Certifier, nothing_certified

LEVEL = 0.01
"""The loss that plans are made for, or the least that there is."""
LEAST_TURNS, MOST_TURNS = 3, 25
PAUSE_S = 0.05
"""Rest before each request: who is asked once in a while begins cold, which takes up to three times as long."""
PATIENCE_S = 60.0
MODEL = "m"
Overheads = tuple[Overhead, Overhead, Overhead]


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One plan of one device: `turns` requests with the weights there, but for their fallbacks, and the pull of the weights."""

    device: str
    cut: int
    num_layers: int
    is_chosen: bool
    engine: str
    refused: tuple[str, ...]
    """Engines that did not work on the device or were slower there than "fp32": its plan is without them."""
    turns: int
    predicted_s: float
    """As `gossipfl plan-inference` says where no engine is refused."""
    predicted_now_s: float
    """With the overheads of this machine as it was meanwhile (the relay's among them), not those of the calibration."""
    measured_s: float
    """Of a request that other work on the machine does not disturb."""
    median_s: float
    predicted_up: int
    measured_up: int
    predicted_pull: int
    """With the offer, and the samples in it that the engine may be compiled with."""
    measured_pull: int
    predicted_pull_s: float
    measured_pull_s: float
    """Without the offer before, samples and all, and the compiling after."""

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted_s / self.measured_s - 1

    @property
    def error_now(self) -> float:
        return self.predicted_now_s / self.measured_s - 1


@dataclass(frozen=True, slots=True)
class Opened:
    """A device that has answered once, and what it has to do: the only cut of `forced`.

    `offered` are the plans that it had: one more where it has refused the engine of the first.
    """

    device: DeviceProfile
    forced: Catalogue
    offered: list[Plan]
    edge: EdgeDevice
    receipts: list[Receipt] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return self.offered[-1]

    def ask(self, inputs: np.ndarray, turn: int) -> None:
        """About one sample, after a rest."""
        time.sleep(PAUSE_S)
        self.receipts.append(self.edge.predict(inputs[turn % len(inputs)][None], PATIENCE_S).receipt)

    def predicted(self, overheads: Overheads) -> CutRow:
        """With these overheads, and what it was offered last."""
        catalogue = replace(self.forced, overheads=overheads)
        return choose_plan(catalogue, self.device, LEVEL, (), self.has_samples, self.edge.refused)[1][self.plan.cut]

    @property
    def has_samples(self) -> bool:
        """When it was offered the last plan."""
        return any(plan.prediction.sample_bytes for plan in self.offered[:-1])

    @property
    def reduced_s(self) -> float:
        """Of a request that other work on the machine does not disturb, up to where it is known whether it falls back."""
        return undisturbed(map(_reduced_s, self.receipts))

    @property
    def overhead(self) -> Overhead:
        """What was measured, less what is known of the layers; of a device without a link.

        The rest is what the parts lack of the whole: as a rule quantiles of parts come to less than that of their sum.
        """
        known = self.plan.prediction
        device_s, server_s, total_s = (
            undisturbed(receipt.seconds[part] for receipt in self.receipts) for part in ("device", "server", "total")
        )
        return Overhead(
            max(0.0, device_s - known.device_s), max(0.0, server_s - known.server_s), max(0.0, total_s - device_s - server_s)
        )


def measure_overheads(calibrator: Calibrator, catalogue: Catalogue, inputs: np.ndarray) -> Overheads:
    """For `Catalogue.overheads`, on this machine and without a link. `inputs` f32[n, *input_shape]."""
    with ExitStack() as stack:
        unlinked = open_unlinked(stack, calibrator, catalogue, inputs, relayed=False)
        for turn in range(MOST_TURNS):
            ask_all([(one, inputs) for one in unlinked], turn)
        return overheads_of(unlinked)


def check_emulated(devices: Iterable[DeviceProfile]) -> None:
    """ConfigError for a device that is faster than this machine."""
    for device in devices:
        if device.speed > 1:
            what = f"speed = {device.speed} of device {device.name!r}"
            raise ConfigError(f"{what} cannot be emulated, as waiting only makes slower; give 1 at most")


def turns_within(total_s: float, turn_s: float) -> int:
    """How often to ask for what takes `turn_s` each time."""
    return int(min(max(total_s / turn_s, LEAST_TURNS), MOST_TURNS))


def worth_measuring(catalogue: Catalogue, device: DeviceProfile) -> Iterator[tuple[Catalogue, bool]]:
    """Catalogues of one cut only: the device's own (True), then the middle one and all on the server, where these can be."""
    plan, rows = choose_plan(catalogue, device, LEVEL if min(catalogue.levels) <= LEVEL else min(catalogue.levels))
    able = {row.cut: (row.weight_bits, row.activation_bits) for row in rows if row.obstacle is None}
    between = [cut for cut in able if 0 < cut < len(catalogue.profile.layers)]
    for cut in dict.fromkeys((plan.cut, *between[len(between) // 2 :][:1], *([0] if 0 in able else []))):
        yield only(catalogue, cut, able[cut]), cut == plan.cut


def ask_all(questions: Sequence[tuple[Opened, np.ndarray]], turn: int) -> None:
    """Each device about one of its inputs (f32[n, ...]).

    In an order of its own for each turn: how cold a request begins hangs on what came before it.
    """
    for index in np.random.default_rng(turn).permutation(len(questions)):
        one, inputs = questions[index]
        one.ask(inputs, turn)


def open_unlinked(
    stack: ExitStack, calibrator: Calibrator, catalogue: Catalogue, inputs: np.ndarray, relayed: bool
) -> list[Opened]:
    """For each of `Catalogue.overheads` a device as fast as the server; `relayed` through a link without limits.

    Its engine is the fastest, as that of most plans: where the machine is slower than when engines were timed, one engine's
    delay would be too much for another.
    """
    bare, last = replace(catalogue, overheads=(Overhead(),) * 3), len(catalogue.profile.layers)
    device, opened = DeviceProfile(memory_bytes=2**40), []
    for cut in (0, last // 2, last):
        forced = only(bare, cut, ((8,) * cut, 8 if cut < last else 0))
        address = serve(stack, calibrator, forced).address
        if relayed:
            address = _relay(stack, address, device)
        opened.append(_open(stack, calibrator, forced, device, address, inputs))
    return opened


def overheads_of(unlinked: Sequence[Opened]) -> Overheads:
    server_alone, both, device_alone = (one.overhead for one in unlinked)
    return server_alone, both, device_alone


def only(catalogue: Catalogue, cut: int, bits: Bits, rates: FallbackRates | None = None) -> Catalogue:
    """Where there is nothing else to choose; nor is anything known of fallbacks but these `rates`."""
    return replace(catalogue, levels={LEVEL: {cut: bits}}, fallback_rates={LEVEL: {cut: rates}} if rates else {})


def serve(
    stack: ExitStack, calibrator: Calibrator, forced: Catalogue, certificate: Certifier = nothing_certified
) -> InferenceServer:
    server = stack.enter_context(InferenceServer({MODEL: calibrator.chain}))
    server.publish(MODEL, forced.version, calibrator.vector, forced, certificate, calibrator.samples)
    return server


def open_linked(
    stack: ExitStack,
    calibrator: Calibrator,
    forced: Catalogue,
    device: DeviceProfile,
    server: InferenceServer,
    inputs: np.ndarray,
) -> Opened:
    """The device, behind its link."""
    return _open(stack, calibrator, forced, device, _relay(stack, server.address, device), inputs)


def _relay(stack: ExitStack, address: str, device: DeviceProfile) -> str:
    """The address behind the device's link."""
    link = LinkRelay(address, uplink=device.uplink, downlink=device.downlink, latency_s=device.latency_s)
    return stack.enter_context(link).address


def _open(
    stack: ExitStack, calibrator: Calibrator, forced: Catalogue, device: DeviceProfile, address: str, inputs: np.ndarray
) -> Opened:
    edge = EdgeDevice(
        [address],
        calibrator.chain,
        device,
        LEVEL,
        model=MODEL,
        patience_s=PATIENCE_S,
        audit_share=0.0,
        emulated_speed=device.speed,
    )
    stack.callback(edge.close)
    edge.predict(inputs[:1], PATIENCE_S)
    offered = [choose_plan(forced, device, LEVEL, (), bool(ask.samples), ask.refused)[0] for ask in edge.first_asks]
    return Opened(device, forced, offered, edge)


def _reduced_s(receipt: Receipt) -> float:
    return receipt.seconds["total"] - receipt.fallback_s


def latency_row(one: Opened, is_chosen: bool, now: Overheads) -> LatencyRow:
    plan, predicted = one.plan, one.predicted(one.forced.overheads)
    return LatencyRow(
        one.device.name,
        plan.cut,
        len(one.forced.profile.layers),
        is_chosen,
        next((stage.engine for stage in plan.stages if stage.device == ON_DEVICE), "-"),
        tuple(engine for engine in one.edge.refused if engine in one.forced.device_s),
        len(one.receipts),
        predicted.request_s,
        one.predicted(now).request_s,
        one.reduced_s,
        statistics.median(map(_reduced_s, one.receipts)),
        plan.prediction.activation_bytes,
        one.receipts[0].bytes_up - one.receipts[0].fallback_bytes_up,
        plan.prediction.weight_bytes
        + sum(offer.prediction.sample_bytes + offer.prediction.offer_bytes for offer in one.offered),
        one.edge.bytes_pulled + one.edge.bytes_offered,
        fetch_seconds(one.forced, one.device, plan.weight_bits),
        one.edge.seconds_pulled,
    )
