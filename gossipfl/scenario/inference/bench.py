"""`gossipfl bench-inference`: what plans and thresholds promise for a trained model, and what they keep, on test samples.

The payload of QPART is what one cold request moves: the weights of the device's layers and the values at the cut, against 32
bits for the same cut (Li, Ghafouri, Ji, Vandierendonck, John and Nikolopoulos, arXiv 2506.23934, report 11.88 to 18.12 % of it
at 0.08 to 0.66 % of accuracy lost). Thresholds are those of ARI (arXiv 2408.14528) and that of `planning.certificates`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from gossipfl.inference.execution.calibration import Calibrator
from gossipfl.inference.execution.tables import planned_scores
from gossipfl.inference.planning.cascade import cascade_cost, cheapest, relative_energy_of_integers, saving
from gossipfl.inference.planning.catalogue import Catalogue
from gossipfl.inference.planning.certificates import Certificate
from gossipfl.inference.planning.cuts import choose_plan
from gossipfl.inference.planning.margins import THRESHOLDS, accepted, differing, margins
from gossipfl.inference.planning.profile import FULL, ON_DEVICE, DeviceProfile, Fallback, Plan
from gossipfl.protocol.messages import FULL_BITS
from gossipfl.scenario.inference.calibrate import ALONE, alone
from gossipfl.scenario.inference.payload import payload, payload_32

DEVICES = (
    DeviceProfile("sensor", speed=0.02, memory_bytes=2**20, uplink=25e3, downlink=100e3, latency_s=0.05, requests=1000),
    DeviceProfile("phone", speed=0.2, memory_bytes=2**26, uplink=1.25e6, downlink=5e6, latency_s=0.02, requests=100),
    DeviceProfile("gateway", speed=0.5, memory_bytes=2**30, uplink=12.5e6, downlink=12.5e6, latency_s=0.002, requests=10),
)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One plan, as predicted and as measured on test samples. Shares are of 1, losses of accuracy."""

    device: str
    level: float
    cut: int
    num_layers: int
    weight_bits: tuple[int, ...]
    activation_bits: int
    engine: str
    payload: int
    payload_32: int
    predicted_loss: float
    measured_loss: float
    changed: float
    fallback: Fallback
    """The way that is certified and costs a mean request the least."""
    predicted_fallback: float
    """Share that falls back: of the tables' samples, of those that were certified on, and of the test samples."""
    certified_fallback: float
    measured_fallback: float

    @property
    def saved(self) -> float:
        return 1 - self.payload / self.payload_32


@dataclass(frozen=True, slots=True)
class ThresholdRow:
    """One threshold of one reduced model, all on the device; `risk` is the share of all answers that differ and stand."""

    level: float
    bits: float
    rule: str
    threshold: float
    fallback: float
    risk: float
    loss: float
    energy_saved: float
    """By the paper's E_R + F E_F, with the energy of integer products."""
    time_saved: float
    """With the seconds that were measured for both models on this machine."""


def certified(calibrator: Calibrator, plan: Plan) -> Certificate:
    """What a server offers: of the certified ways to fall back that which costs a mean request the least."""
    ways = dict.fromkeys((FULL, plan.fallback))
    found = filter(None, (calibrator.certify(replace(plan, fallback=way)) for way in ways))
    certificate = cheapest(found, plan)
    assert certificate is not None, "to start afresh is always certified, if only where all do"
    return certificate


def full_scores(calibrator: Calibrator, inputs: np.ndarray) -> np.ndarray:
    return planned_scores(calibrator.chain, calibrator.vector, 0, ((), FULL_BITS), inputs)


def plan_rows(
    calibrator: Calibrator,
    catalogue: Catalogue,
    harm: dict[float, dict[int, float]],
    devices: Iterable[DeviceProfile],
    inputs: np.ndarray,
    labels: np.ndarray,
) -> Iterator[PlanRow]:
    """For each level: all on the device, and the cut that each of `devices` would get."""
    profile = catalogue.profile
    full = full_scores(calibrator, inputs).argmax(1)
    known: dict[tuple[int, tuple[int, ...], int, str], np.ndarray] = {}
    all_on_device = alone(catalogue)
    for level in sorted(catalogue.levels):
        if not level:
            continue
        plans = {ALONE.name: all_on_device[level]} if level in all_on_device else {}
        for name, plan in (plans | {device.name: choose_plan(catalogue, device, level)[0] for device in devices}).items():
            engine = engine_of(plan)
            key = plan.cut, plan.weight_bits, plan.activation_bits, engine
            if key not in known:
                known[key] = calibrator.scores(plan, inputs)
            scores, certificate = known[key], certified(calibrator, plan)
            classes = scores.argmax(1)
            yield PlanRow(
                name,
                level,
                plan.cut,
                len(profile.layers),
                plan.weight_bits,
                plan.activation_bits,
                engine,
                payload(profile, plan.cut, plan.weight_bits, plan.activation_bits),
                payload_32(profile, plan.cut),
                harm[plan.prediction.accuracy_loss].get(plan.cut, 0.0),
                float((full == labels).mean() - (classes == labels).mean()),
                float((classes != full).mean()),
                certificate.basis.fallback,
                plan.fallback_rate or 0.0,
                certificate.fallback_rate,
                1 - float(accepted(margins(scores, calibrator.scale), certificate.threshold).mean()),
            )


def threshold_rows(
    calibrator: Calibrator, catalogue: Catalogue, inputs: np.ndarray, labels: np.ndarray
) -> Iterator[ThresholdRow]:
    """For each level, all on the device: the paper's thresholds and the certified one, side by side."""
    full = full_scores(calibrator, inputs).argmax(1)
    seen: set[tuple[int, ...]] = set()
    for level, plan in alone(catalogue).items():
        if plan.weight_bits in seen:
            continue
        seen.add(plan.weight_bits)
        bits = mean_bits(catalogue, plan)
        scores = calibrator.scores(plan, inputs)
        found, own = margins(scores, calibrator.scale), scores.argmax(1)
        differs = differing(own, full)
        for rule, threshold in thresholds(calibrator, plan).items():
            stands = accepted(found, threshold)
            cascade = np.where(stands, own, full)
            fallback = 1 - float(stands.mean())
            yield ThresholdRow(
                level,
                bits,
                rule,
                threshold,
                fallback,
                float((stands & differs).mean()),
                float((full == labels).mean() - (cascade == labels).mean()),
                saving(relative_energy_of_integers(bits, 16), 1.0, fallback),
                1 - cascade_cost(*seconds(catalogue, plan), fallback) / seconds(catalogue, plan)[1],
            )


def thresholds(calibrator: Calibrator, plan: Plan) -> dict[str, float]:
    """By rule: the paper's, and the certified one."""
    scores, differs = calibrator.kept_scores(plan)
    found = margins(scores, calibrator.scale)
    rules = {name: THRESHOLDS.get(name)(found, differs, calibrator.scale) for name in THRESHOLDS}
    certificate = calibrator.certify(plan)
    assert certificate is not None, "it falls back to the full model"
    return rules | {"certified": certificate.threshold}


def seconds(catalogue: Catalogue, plan: Plan) -> tuple[float, float]:
    """Of the plan's device stage, and of the full model, on the machine that calibrated."""
    reduced = catalogue.device_s[engine_of(plan)][plan.cut] if plan.cut else 0.0
    full = catalogue.device_s["fp32"][len(catalogue.profile.layers)]
    assert reduced is not None and full is not None, "fp32 runs everything, and the plan's engine its stage"
    return reduced, full


def mean_bits(catalogue: Catalogue, plan: Plan) -> float:
    """Of the device's multiply-accumulates."""
    layers = catalogue.profile.layers[: plan.cut]
    macs = sum(layer.macs for layer in layers)
    return sum(layer.macs * bits for layer, bits in zip(layers, plan.weight_bits, strict=True)) / macs if macs else math.nan


def engine_of(plan: Plan) -> str:
    return next((stage.engine for stage in plan.stages if stage.device == ON_DEVICE), "-")
