"""QPART: how much less moves where layers and cut are quantized for an allowed loss of accuracy.

Li, Ghafouri, Ji, Vandierendonck, John and Nikolopoulos, "QPART: Adaptive Model Quantization and Dynamic Workload Balancing for
Accuracy-aware Edge Inference", arXiv 2506.23934. Published, from simulation, for a fully connected net on MNIST and for ResNets
on SVHN, CIFAR and ImageNet: 11.88 to 18.12 % of the bits of a 32-bit model move, at 0.08 to 0.66 % of accuracy. What it counts
is taken to be the weights of the device's part and the values at the cut. Here scales and biases count as well.

Each arm trains one model centrally and briefly (the loss is relative to the full model), calibrates it on samples kept for
that, and measures on test samples.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gossipfl.inference.execution.calibration import Calibrator
from gossipfl.inference.execution.chain import Chain
from gossipfl.scenario.inference.bench import DEVICES, PlanRow, plan_rows
from gossipfl.scenario.inference.calibrate import ALONE
from gossipfl.scenario.inference.display import bits_text
from gossipfl.scenario.reproduce.figures import REPRODUCTIONS, Arm, Arms, Reproduction, Row, Table
from gossipfl.scenario.reproduce.trained_arm import read_record, train_arm, write_record

SAVED = (0.8188, 0.8812)
"""1 minus what was published."""
LEVEL = 0.01
SEEN, UNSEEN = 256, 3000
"""Samples for the noise of each layer, and for tables and certificates."""
ADAM = {"batch_size": 64, "learning_rate": 0.001, "optimizer": "adam"}


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of one model."""

    name: str
    accuracy: float
    calibrated: int
    tested: int
    rows: tuple[PlanRow, ...]
    train_s: float
    calibrate_s: float

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.3f}, took {self.train_s:.0f} s to train and {self.calibrate_s:.0f} s to calibrate"


def _arms(full: bool) -> Arms:
    """The largest first."""
    idx = {"kind": "idx", "path": "mnist", "calibration_fraction": 0.1}
    cifar10 = {"kind": "cifar10", "path": "cifar10", "calibration_fraction": 0.1}
    digits = {"kind": "digits", "test_fraction": 0.3, "calibration_fraction": 0.5}
    return {
        "resnet20-cifar10": {
            "model": "resnet20",
            "data": cifar10,
            "training": ADAM | {"local_steps": 15_000 if full else 1200},
        },
        "cnn-mnist": {"model": "cnn", "data": idx, "training": ADAM | {"local_steps": 5000 if full else 600}},
        "mlp-mnist": {"model": "mlp", "data": idx, "training": ADAM | {"local_steps": 10_000 if full else 2000}},
        "mlp-digits": {"model": "mlp", "data": digits, "training": ADAM | {"local_steps": 400}},
    }


def measure(name: str, arm: Arm, folder: Path) -> Measured:
    """Train, calibrate and test one model; `folder / name.json` is the record."""
    trained = train_arm(arm)
    dataset, seen, kept = trained.dataset, trained.seen, trained.kept[:UNSEEN]
    began = time.perf_counter()
    calibrator = Calibrator(
        Chain.of(trained.model, dataset.input_shape),
        trained.inputs(dataset.x_train[seen[:: len(seen) // SEEN][:SEEN]]),
        (trained.inputs(dataset.x_train[kept]), dataset.y_train[kept]),
        data=name,
    )
    catalogue, found = calibrator.catalogue()
    calibrate_s = time.perf_counter() - began
    harm = {level: {cut: row.harm for cut, row in cuts.items()} for level, cuts in found.items()}
    rows = tuple(plan_rows(calibrator, catalogue, harm, DEVICES, trained.inputs(dataset.x_test), dataset.y_test))
    accuracy = trained.engine.evaluate(trained.engine.flat.read())
    measured = Measured(name, accuracy, len(kept), len(dataset.y_test), rows, trained.seconds, calibrate_s)
    write_record(folder, name, arm, measured)
    return measured


def _tables(outcomes: Mapping[str, Measured], full: bool) -> list[Table]:
    notes = [
        f"{name}: accuracy {found.accuracy:.4f}; {found.calibrated:,} samples to calibrate, {found.tested:,} to measure"
        for name, found in outcomes.items()
    ]
    plans = [(found, row) for found in outcomes.values() for row in found.rows if row.level == LEVEL]
    cuts = [_row(found, row, ", ".join(names)) for found, row, names in _by_plan(plans)]
    alone = [
        _row(found, row, f"{row.level:.1%}") for found in outcomes.values() for row in found.rows if row.device == ALONE.name
    ]
    return [
        Table(f"for a loss of accuracy of {LEVEL:.0%} at most, at the cut that a device would get", cuts, notes),
        Table("all on the device, by the loss of accuracy that is allowed", alone),
    ]


def _by_plan(plans: list[tuple[Measured, PlanRow]]) -> list[tuple[Measured, PlanRow, list[str]]]:
    """Devices that get the same plan together."""
    together: dict[tuple[str, PlanRow], tuple[Measured, PlanRow, list[str]]] = {}
    for found, row in plans:
        key = (
            found.name,
            replace(row, device="", engine="", measured_loss=0.0, changed=0.0),
        )  # which engine it was may change a class
        together.setdefault(key, (found, row, []))[2].append(row.device)
    return list(together.values())


def _row(found: Measured, row: PlanRow, what: str) -> Row:
    values = {
        "for": what,
        "cut": f"{row.cut}/{row.num_layers}",
        "bits": f"{bits_text(row.weight_bits)} | {row.activation_bits or '-'}",
        "saved": f"{row.saved:.1%}",
        "loss": f"{row.measured_loss:.2%}",
        "bound": f"{row.predicted_loss:.2%}",
    }
    return Row(found.name, values, row.saved, SAVED)


@REPRODUCTIONS.register("qpart")
def qpart() -> Reproduction:
    return Reproduction(_arms, _tables, measure, partial(read_record, Measured))
