"""`gossipfl calibrate`: measure a trained model for serving, and keep what was found beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from gossipfl._version import __version__
from gossipfl.errors import ConfigError
from gossipfl.inference.execution.calibration import Calibration, Calibrator, Progress
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.tables import Row
from gossipfl.inference.planning.cuts import Catalogue, choose_plan
from gossipfl.inference.planning.margins import ALPHA, DELTA, Certificate
from gossipfl.inference.planning.profile import DeviceProfile, Plan
from gossipfl.learning.checkpoint import write_atomically
from gossipfl.scenario.inference.latency import measure_overheads
from gossipfl.scenario.inference.trained import Trained
from gossipfl.scenario.records import machine

ALONE = DeviceProfile("alone", time_weight=1e-9, price_weight=1e9, requests=10**9)
"""Whatever the server does costs it dearly, so it does all by itself."""


def calibrator_of(trained: Trained, alpha: float = ALPHA, delta: float = DELTA) -> Calibrator:
    """On one thread: batches of one are what is timed, and a stage's last bits depend on how many threads it has."""
    torch.set_num_threads(1)
    return Calibrator(
        Chain.of(trained.model, trained.dataset.input_shape),
        trained.fit_samples()[0],
        trained.calibration_samples,
        data=trained.data_name,
        version=trained.version,
        alpha=alpha,
        delta=delta,
    )


def calibrator_like(trained: Trained, calibration: Calibration) -> Calibrator:
    """That certifies at the levels of the calibration."""
    for certificate in calibration.certificates[:1]:
        return calibrator_of(trained, certificate.alpha, certificate.delta or DELTA)
    return calibrator_of(trained)


def calibrate(trained: Trained, calibrator: Calibrator, progress: Progress = lambda what, share: None) -> Calibration:
    """The calibration of a run's model, written beside it; with certificates of the plans that leave nothing to a server."""
    catalogue, rows = calibrator.catalogue(progress)
    catalogue = replace(catalogue, overheads=measure_overheads(calibrator, catalogue, calibrator.samples))
    calibration = Calibration(
        model=trained.name,
        digest=trained.digest,
        data=trained.data_name,
        catalogue=catalogue,
        harm={level: {cut: row.harm for cut, row in cuts.items()} for level, cuts in rows.items()},
        certificates=tuple(filter(None, map(calibrator.certify, alone(catalogue, rows).values()))),
        warning=calibrator.warning,
        made_with={
            "version": __version__,
            "machine": machine(),
            "torch": torch.__version__,
            "seed": str(trained.scenario.data_seed),
        },
    )
    write_atomically(trained.calibration_file, calibration.to_json().encode())
    return calibration


def alone(catalogue: Catalogue, rows: Mapping[float, Mapping[int, Row]]) -> dict[float, Plan]:
    """By level, the plan that has all layers on the device."""
    last = len(catalogue.profile.layers)
    return {level: choose_plan(catalogue, ALONE, level)[0] for level, cuts in rows.items() if last in cuts}


def load_calibration(trained: Trained) -> Calibration:
    """ConfigError where there is none, or it is of another model."""
    try:
        text = trained.calibration_file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{trained.folder} is not calibrated ({error}); run `gossipfl calibrate {trained.folder}`") from error
    calibration = Calibration.from_json(text)
    if calibration.digest != trained.digest:
        raise ConfigError(f"{trained.calibration_file} is of other weights; run `gossipfl calibrate {trained.folder}` again")
    return calibration


def certificates_by_bits(calibration: Calibration) -> dict[tuple[int, ...], Certificate]:
    return {certificate.basis.weight_bits: certificate for certificate in calibration.certificates}
