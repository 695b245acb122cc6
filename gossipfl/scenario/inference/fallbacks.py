"""What it takes to fall back by continuing, and by starting afresh: bytes, time and answers that differ, side by side.

Time and bytes are of requests over emulated links, with a threshold that none reaches; how many fall back, and how many answers
then differ from the full model's, is counted on test samples at the threshold that is certified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from gossipfl.inference.execution.calibration import Calibrator, Progress, continuation_of
from gossipfl.inference.execution.engines import undisturbed
from gossipfl.inference.planning.cascade import cheapest
from gossipfl.inference.planning.catalogue import Catalogue
from gossipfl.inference.planning.certificates import Certificate
from gossipfl.inference.planning.cuts import choose_plan
from gossipfl.inference.planning.margins import accepted, differing, margins
from gossipfl.inference.planning.profile import DeviceProfile, Fallback, Plan
from gossipfl.scenario.inference import latency
from gossipfl.scenario.inference.bench import full_scores

TOTAL_S = 4.0
"""What all requests together may take, as predicted."""
WAYS: tuple[Fallback, ...] = ("continued", "full")


@dataclass(frozen=True, slots=True)
class FallbackRow:
    """One way to fall back from one plan. What hangs on a threshold is None where none is certified."""

    device: str
    cut: int
    num_layers: int
    activation_bits: int
    fallback: Fallback
    is_chosen: bool
    threshold: float | None
    fallback_rate: float | None
    """Share of the test samples; of them and the others together, `risk` is the share whose answers differ."""
    risk: float | None
    differs: float
    """Share of the test samples that differ where all fall back."""
    predicted_up: int
    measured_up: int
    predicted_s: float
    measured_s: float
    """From the reduced answer's being known to be unsure, where other work on the machine does not disturb."""


def fallback_rows(
    calibrator: Calibrator,
    catalogue: Catalogue,
    devices: Sequence[DeviceProfile],
    inputs: np.ndarray,
    total_s: float = TOTAL_S,
    told: Progress = lambda what, share: None,
) -> list[FallbackRow]:
    """Both ways for the plans of `cascades.request_rows` in which continuing is predicted to be the cheaper one."""
    plans = []
    for device in devices:
        for forced, _ in latency.worth_measuring(catalogue, device):
            plan, _ = choose_plan(forced, device, latency.LEVEL)
            if plan.continued is not None:
                plans.append((device, forced, plan))
    rows, full = [], full_scores(calibrator, inputs).argmax(1)
    for index, (device, forced, plan) in enumerate(plans):
        told("fallbacks over emulated links", index / len(plans))
        certificates = {way: calibrator.certify(replace(plan, fallback=way)) for way in WAYS}
        chosen = cheapest(filter(None, certificates.values()), plan)
        for way in WAYS:
            measured_up, measured_s = _measured(calibrator, forced, device, way, inputs, total_s / len(plans) / len(WAYS))
            certificate, cost = certificates[way], plan.continued if way == "continued" else plan.afresh
            assert cost is not None, "it may fall back"
            fallback = calibrator.scores(continuation_of(plan), inputs).argmax(1) if way == "continued" else full
            share = risk = None
            if certificate is not None:
                scores = calibrator.scores(plan, inputs)
                stands = accepted(margins(scores, calibrator.scale), certificate.threshold)
                share = 1 - float(stands.mean())
                risk = float(differing(np.where(stands, scores.argmax(1), fallback), full).mean())
            rows.append(
                FallbackRow(
                    device.name,
                    plan.cut,
                    len(catalogue.profile.layers),
                    plan.activation_bits,
                    way,
                    certificate is not None and certificate is chosen,
                    None if certificate is None else certificate.threshold,
                    share,
                    risk,
                    float(differing(fallback, full).mean()),
                    cost.bytes_up,
                    measured_up,
                    cost.latency_s,
                    measured_s,
                )
            )
    return rows


def _measured(
    calibrator: Calibrator, forced: Catalogue, device: DeviceProfile, way: Fallback, inputs: np.ndarray, total_s: float
) -> tuple[int, float]:
    """Bytes and seconds of a fallback."""

    def unsure(plan: Plan) -> Certificate | None:
        if plan.fallback != way:
            return None
        return Certificate(math.inf, calibrator.alpha, calibrator.delta, 1, 0, 0, 1.0, "disagreement", calibrator.basis(plan))

    with ExitStack() as stack:
        server = latency.serve(stack, calibrator, forced, unsure)
        one = latency.open_linked(stack, calibrator, forced, device, server, inputs)
        for turn in range(latency.turns_within(total_s, one.predicted(forced.overheads).request_s)):
            one.ask(inputs, turn)
        return one.receipts[0].fallback_bytes_up, undisturbed(receipt.fallback_s for receipt in one.receipts)
