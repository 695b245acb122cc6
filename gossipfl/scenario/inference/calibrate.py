"""`gossipfl calibrate`: measure a trained model for serving, and keep what was found beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from gossipfl._version import __version__
from gossipfl.errors import ConfigError
from gossipfl.inference.execution.calibration import Calibration, Calibrator, Progress, by_side
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.engines import available_engines, stage_seconds
from gossipfl.inference.planning.catalogue import Catalogue
from gossipfl.inference.planning.certificates import ALPHA, DELTA, Certificate
from gossipfl.inference.planning.cuts import choose_plan
from gossipfl.inference.planning.profile import DeviceProfile, Plan
from gossipfl.learning.checkpoint import write_atomically
from gossipfl.scenario.inference.latency import measure_overheads
from gossipfl.scenario.inference.trained import Trained
from gossipfl.scenario.records import machine, processor

logger = logging.getLogger(__name__)

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
        remedy="keep more with data.calibration_fraction",
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
        certificates=tuple(filter(None, map(calibrator.certify, dict.fromkeys(alone(catalogue).values())))),
        warning=calibrator.warning,
        made_with={
            "version": __version__,
            "machine": machine(),
            "kernels": kernels(),
            "seed": str(trained.scenario.data_seed),
        },
    )
    write_atomically(trained.calibration_file, calibration.to_json().encode())
    return calibration


def kernels() -> str:
    """What seconds of engines hang on, in one line."""
    return f"{processor()} with {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def timed_here(calibration: Calibration, calibrator: Calibrator, say: Callable[[str], None]) -> Catalogue:
    """The catalogue with seconds of this machine; measured again, and said so, where they are of another."""
    catalogue, there, here = calibration.catalogue, calibration.made_with.get("kernels", "another machine"), kernels()
    if there == here:
        return catalogue
    say(f"the engines were timed on {there}; timing them again on {here}")
    known = [name for name in available_engines() if name in catalogue.device_s]
    seconds = stage_seconds(calibrator.chain, calibrator.vector, calibrator.samples, known)
    device_s, server_s = by_side(seconds)
    catalogue = replace(catalogue, device_s=device_s, server_s=server_s)
    return replace(catalogue, overheads=measure_overheads(calibrator, catalogue, calibrator.samples))


def served_here(catalogue: Catalogue, here: Catalogue) -> Catalogue:
    """What a server plans with whose seconds are those of `here`.

    A device's stay: its speed is relative to the machine that calibrated. But an engine that cannot run a part here, or
    computes something else, is not planned for it, since what it computes could not be certified.
    """
    device_s = {
        engine: tuple(
            value if known is not None else None for value, known in zip(catalogue.device_s[engine], own, strict=True)
        )
        for engine, own in here.device_s.items()
    }
    own, before = here.overheads, catalogue.overheads
    overheads = [replace(one, device_s=calibrated.device_s) for one, calibrated in zip(own, before, strict=True)]
    return replace(here, device_s=device_s, overheads=(overheads[0], overheads[1], overheads[2]))


def alone(catalogue: Catalogue) -> dict[float, Plan]:
    """By level, the plan that has all layers on the device, at the bits of that level."""
    last, plans = len(catalogue.profile.layers), {}
    for level, cuts in sorted(catalogue.levels.items()):
        if last in cuts:
            rates = catalogue.fallback_rates.get(level, {})
            forced = replace(
                catalogue,
                levels={level: {last: cuts[last]}},
                fallback_rates={level: {last: rates[last]}} if last in rates else {},
            )
            plans[level], _ = choose_plan(forced, ALONE, level)
    return plans


class Certificates:
    """Of plans: those of the calibration are `known`; others are made when they are first asked for, and kept with it."""

    def __init__(self, trained: Trained, calibration: Calibration, calibrator: Calibrator) -> None:
        self._trained, self._calibrator, self._made = trained, calibrator, list(calibration.certificates)

    def known(self, plan: Plan) -> Certificate | None:
        basis, tried = self._calibrator.basis(plan), self._calibrator.tried(plan)
        return next((one for one in self._made if one.tried == tried and one.holds_for(basis)), None)

    def certify(self, plan: Plan) -> Certificate | None:
        found = self.known(plan)
        if found is None and (found := self._calibrator.certify(plan)) is not None:
            self._made.append(found)
            _keep(self._trained, found)
        return found


def _keep(trained: Trained, certificate: Certificate) -> None:
    """With what is stored now, which may have been calibrated anew; where it cannot be, the next server makes it again."""
    try:
        stored = load_calibration(trained)
        levels = {(one.alpha, one.delta) for one in stored.certificates}
        if certificate not in stored.certificates and levels <= {(certificate.alpha, certificate.delta)}:
            stored = replace(stored, certificates=(*stored.certificates, certificate))
            write_atomically(trained.calibration_file, stored.to_json().encode())
    except (ConfigError, OSError) as error:
        logger.info("a certificate is not kept: %s", error)


def load_calibration(trained: Trained) -> Calibration:
    """ConfigError where there is none, or it is of another model."""
    command = f"`gossipfl calibrate {trained.folder} --model {trained.name}`"
    try:
        text = trained.calibration_file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{trained.name} of {trained.folder} is not calibrated ({error}); run {command}") from error
    try:
        calibration = Calibration.from_json(text)
    except ConfigError as error:
        raise ConfigError(f"{trained.calibration_file}: {error}, with {command}") from error
    if calibration.digest != trained.digest:
        raise ConfigError(f"{trained.calibration_file} is of other weights; run {command} again")
    return calibration


def certificates_by_bits(calibration: Calibration) -> dict[tuple[int, ...], Certificate]:
    return {certificate.basis.weight_bits: certificate for certificate in calibration.certificates}
