"""What plans promise with their fallbacks, and what they take: certified cascades on emulated devices, behind emulated links.

For each device, at the largest loss that there are bits for: the plan that it gets, and all layers on the device at the bits of
that level, which fall back the most. Answers stand from the certified margin on, as a server offers it. What is predicted to
fall back is the share of the samples that the plan was certified on; what does is counted on test samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from gossipfl.inference.execution.calibration import Calibrator, Progress
from gossipfl.inference.execution.engines import undisturbed
from gossipfl.inference.planning.cascade import with_fallbacks
from gossipfl.inference.planning.catalogue import Catalogue
from gossipfl.inference.planning.certificates import Certificate
from gossipfl.inference.planning.cuts import choose_plan
from gossipfl.inference.planning.profile import DeviceProfile, Expected, Fallback
from gossipfl.scenario.inference import latency
from gossipfl.scenario.inference.bench import certified

TURNS = 4
"""Times as many requests as for latencies: few fall back."""


@dataclass(frozen=True, slots=True)
class CascadeRow:
    """One plan as a device is served it; seconds and bytes up are of a mean request."""

    device: str
    cut: int
    num_layers: int
    weight_bits: tuple[int, ...]
    is_chosen: bool
    fallback: Fallback
    turns: int
    predicted_rate: float
    measured_rate: float
    predicted_s: float
    """With the overheads of this machine as it was meanwhile."""
    at_rate_s: float
    """The same, had it been known how many of these requests fall back."""
    measured_s: float
    """Of requests that other work on the machine does not disturb."""
    predicted_up: float
    measured_up: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted_s / self.measured_s - 1

    @property
    def error_at_rate(self) -> float:
        return self.at_rate_s / self.measured_s - 1


def cascade_rows(
    calibrator: Calibrator,
    catalogue: Catalogue,
    devices: Sequence[DeviceProfile],
    inputs: np.ndarray,
    total_s: float = latency.TOTAL_S,
    told: Progress = lambda what, share: None,
) -> list[CascadeRow]:
    """Rows of `devices`, on `inputs` (f32[n, *input_shape]); all of their requests take some `total_s`, by turns."""
    with ExitStack() as stack:
        unlinked = latency.open_unlinked(stack, calibrator, catalogue, inputs, relayed=True)
        opened: list[latency.Opened] = []
        chosen: list[bool] = []
        for device in devices:
            for forced, is_chosen in _worth_measuring(catalogue, device):
                server = latency.serve(stack, calibrator, forced, calibrator.certify)
                opened.append(latency.open_linked(stack, calibrator, forced, device, server, inputs))
                chosen.append(is_chosen)
        certificates = [certified(calibrator, one.plan) for one in opened]
        predicted_s = sum(
            _expected(one, catalogue.overheads, certificate.basis.fallback, certificate.fallback_rate).latency_s
            for one, certificate in zip(opened, certificates, strict=True)
        )
        turns = int(min(max(total_s / predicted_s, latency.LEAST_TURNS), TURNS * latency.MOST_TURNS))
        for turn in range(turns):
            told("certified cascades over emulated links", turn / turns)
            latency.ask_all([*unlinked, *opened], inputs, turn)
        now = latency.overheads_of(unlinked)
        return [_row(*each, now) for each in zip(opened, certificates, chosen, strict=True)]


def _worth_measuring(catalogue: Catalogue, device: DeviceProfile) -> Iterator[tuple[Catalogue, bool]]:
    """Catalogues of one cut only, with its fallbacks: the device's own (True), and all on the device where that is another."""
    level, last = max(catalogue.levels), len(catalogue.profile.layers)
    plan, rows = choose_plan(catalogue, device, level)
    known = catalogue.fallback_rates.get(plan.prediction.accuracy_loss, {}).get(plan.cut)
    bits = plan.weight_bits, plan.activation_bits
    yield latency.only(catalogue, plan.cut, bits, known), True
    all_bits, rates = catalogue.levels[level].get(last), catalogue.fallback_rates.get(level, {}).get(last)
    if all_bits is not None and all_bits != bits and rows[last].obstacle is None:
        yield latency.only(catalogue, last, all_bits, rates), False


def _expected(one: latency.Opened, overheads: latency.Overheads, way: Fallback, rate: float) -> Expected:
    """Of a request with the weights there, where so many fall back that way."""
    plan, _ = choose_plan(
        replace(one.forced, overheads=overheads), one.device, latency.LEVEL, cached=one.plan.weight_bits, has_samples=True
    )
    return with_fallbacks(plan.prediction, replace(plan, fallback=way).fallback_cost, rate)


def _row(one: latency.Opened, certificate: Certificate, is_chosen: bool, now: latency.Overheads) -> CascadeRow:
    receipts, way = one.receipts, certificate.basis.fallback
    fell_back, stood = (
        [receipt.seconds["total"] for receipt in receipts if bool(receipt.fallback_bytes_up) == is_one]
        for is_one in (True, False)
    )
    rate = len(fell_back) / len(receipts)
    predicted = _expected(one, now, way, certificate.fallback_rate)
    return CascadeRow(
        one.device.name,
        one.plan.cut,
        len(one.forced.profile.layers),
        one.plan.weight_bits,
        is_chosen,
        way,
        len(receipts),
        certificate.fallback_rate,
        rate,
        predicted.latency_s,
        _expected(one, now, way, rate).latency_s,
        sum(len(group) / len(receipts) * undisturbed(group) for group in (fell_back, stood) if group),
        predicted.bytes_up,
        sum(receipt.bytes_up for receipt in receipts) / len(receipts),
    )
