"""What plans promise with their fallbacks, and what they take: certified cascades on emulated devices, behind emulated links.

    latencies, cascades = request_rows(calibrator, catalogue, devices, inputs)

For each device, at the largest loss that there are bits for: the plan that it gets, and all layers on the device at the bits of
that level, which fall back the most. Answers stand from the certified margin on, as a server offers it. All plans, those of
`latency` too, are asked by turns, so that what is predicted of them has the same overheads, and a plan that is in both tables
is measured once.

A mean request takes the reduced model's time, and a fallback's as often as one falls back. Both times are measured, with as
many requests that fall back as stand. How often is counted: of the samples that the plan was certified on, which is what is
predicted, and of all test samples. Where samples are few these shares differ by chance, and the predicted mean with them; so
there are two errors, one for either share.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtri

from gossipfl.inference.execution.calibration import Calibrator, Progress
from gossipfl.inference.execution.engines import undisturbed
from gossipfl.inference.planning.cascade import cascade_cost
from gossipfl.inference.planning.catalogue import Bits, Catalogue
from gossipfl.inference.planning.certificates import Certificate
from gossipfl.inference.planning.cuts import CutRow, choose_plan
from gossipfl.inference.planning.margins import accepted, margins
from gossipfl.inference.planning.profile import DeviceProfile, Fallback, FallbackCost
from gossipfl.runtime.inference_server import InferenceServer
from gossipfl.scenario.inference import latency
from gossipfl.scenario.inference.bench import certified
from gossipfl.scenario.inference.latency import LatencyRow, Opened, Overheads

TOTAL_S = 20.0
"""What all requests together may take, as predicted."""
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class CascadeRow:
    """One plan as a device is served it; seconds and bytes up are of a mean request with the weights there."""

    device: str
    cut: int
    num_layers: int
    weight_bits: tuple[int, ...]
    is_chosen: bool
    fallback: Fallback
    turns: int
    """Requests of each kind that there is: that stand, and that fall back."""
    certified_on: int
    predicted_rate: float
    """Share of the `certified_on` samples of the certificate that fall back."""
    rate_within: tuple[float, float]
    """The interval of CONFIDENCE that so many samples leave for it (Clopper and Pearson, 1934)."""
    measured_rate: float
    """Share of all test samples."""
    predicted_s: float
    """With the overheads of this machine as it was meanwhile."""
    at_rate_s: float
    """The same, had the share of the test samples been known."""
    measured_s: float
    """Where other work on the machine does not disturb."""
    predicted_up: float
    measured_up: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted_s / self.measured_s - 1

    @property
    def error_at_rate(self) -> float:
        return self.at_rate_s / self.measured_s - 1


@dataclass(frozen=True, slots=True)
class _Cascade:
    """A device whose doubtful answers fall back, and which of the test samples (bool[n]) are doubtful."""

    one: Opened
    is_chosen: bool
    certificate: Certificate
    falls: np.ndarray

    @property
    def predicted_rate(self) -> float:
        return self.certificate.fallback_rate if self.one.plan.afresh else 0.0

    def added(self, row: CutRow) -> FallbackCost:
        """What a fallback costs of the plan as predicted in `row`."""
        way = row.continued if self.certificate.basis.fallback == "continued" else None
        return way or row.afresh or FallbackCost(0.0, 0.0, 0.0, 0.0, 0)


def request_rows(
    calibrator: Calibrator,
    catalogue: Catalogue,
    devices: Sequence[DeviceProfile],
    inputs: np.ndarray,
    total_s: float = TOTAL_S,
    told: Progress = lambda what, share: None,
) -> tuple[list[LatencyRow], list[CascadeRow]]:
    """Of `devices`, on test samples `inputs` (f32[n, *input_shape]); all of their requests take some `total_s`, by turns.

    Latencies are of the plan that each gets, the middle cut and all on the server, where these can be.
    """
    with ExitStack() as stack:
        unlinked = latency.open_unlinked(stack, calibrator, catalogue, inputs, relayed=True)
        servers: dict[tuple[int, Bits, bool], InferenceServer] = {}
        timed: list[tuple[Opened, bool]] = []
        cascades: list[_Cascade] = []

        def opened(device: DeviceProfile, forced: Catalogue, is_certified: bool) -> Opened:
            key = *_bits(forced), is_certified
            if key not in servers:
                servers[key] = latency.serve(stack, calibrator, forced, *([calibrator.certify] if is_certified else []))
            return latency.open_linked(stack, calibrator, forced, device, servers[key], inputs)

        for device in devices:
            known: dict[tuple[int, Bits], Opened] = {}
            for forced, is_chosen in _worth_measuring(catalogue, device):
                known[_bits(forced)] = one = opened(device, forced, True)
                cascades.append(_cascade(calibrator, one, is_chosen, inputs))
            for forced, is_chosen in latency.worth_measuring(catalogue, device):
                timed.append((known.get(_bits(forced)) or opened(device, forced, False), is_chosen))
        asked = [(one, inputs) for one, _ in timed if all(one is not each.one for each in cascades)]
        asked += [(each.one, inputs[rows]) for each in cascades for rows in (~each.falls, each.falls) if rows.any()]
        turn_s = sum(one.predicted(catalogue.overheads).request_s for one, _ in asked)
        turn_s += sum(each.added(each.one.predicted(catalogue.overheads)).latency_s for each in cascades if each.falls.any())
        turns = latency.turns_within(total_s, turn_s)
        for turn in range(turns):
            told("requests over emulated links", turn / turns)
            latency.ask_all([*((one, inputs) for one in unlinked), *asked], turn)
        now = latency.overheads_of(unlinked)
        return [latency.latency_row(*each, now) for each in timed], [_row(each, turns, now) for each in cascades]


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


def _bits(forced: Catalogue) -> tuple[int, Bits]:
    """Of the only cut."""
    ((only,),) = (cuts.items() for cuts in forced.levels.values())
    return only


def _cascade(calibrator: Calibrator, one: Opened, is_chosen: bool, inputs: np.ndarray) -> _Cascade:
    certificate = certified(calibrator, one.plan)
    falls = np.zeros(len(inputs), bool)
    if one.plan.afresh is not None:
        falls = ~accepted(margins(calibrator.scores(one.plan, inputs), calibrator.scale), certificate.threshold)
    return _Cascade(one, is_chosen, certificate, falls)


def _row(cascade: _Cascade, turns: int, now: Overheads) -> CascadeRow:
    one, certificate, rate = cascade.one, cascade.certificate, float(cascade.falls.mean())
    predicted, fell_back = one.predicted(now), [receipt for receipt in one.receipts if receipt.fallback_bytes_up]
    added, expected = cascade.added(predicted), cascade.predicted_rate
    measured_s = undisturbed(receipt.fallback_s for receipt in fell_back) if fell_back else 0.0
    measured_up = statistics.fmean(receipt.fallback_bytes_up for receipt in fell_back) if fell_back else 0.0
    reduced_up = one.receipts[0].bytes_up - one.receipts[0].fallback_bytes_up
    return CascadeRow(
        one.device.name,
        one.plan.cut,
        len(one.forced.profile.layers),
        one.plan.weight_bits,
        cascade.is_chosen,
        certificate.basis.fallback,
        turns,
        certificate.n,
        expected,
        share_within(round(expected * certificate.n), certificate.n),
        rate,
        cascade_cost(predicted.request_s, added.latency_s, expected),
        cascade_cost(predicted.request_s, added.latency_s, rate),
        cascade_cost(one.reduced_s, measured_s, rate),
        cascade_cost(one.plan.prediction.activation_bytes, added.bytes_up, expected),
        cascade_cost(reduced_up, measured_up, rate),
    )


def share_within(num: int, n: int) -> tuple[float, float]:
    """What share, at CONFIDENCE, `num` of `n` samples may be of."""
    tail = (1 - CONFIDENCE) / 2
    return float(bdtri(num - 1, n, 1 - tail)) if num else 0.0, float(bdtri(num, n, tail)) if num < n else 1.0
