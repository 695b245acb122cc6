"""A question on a device, with all that has been computed of it, and the answer that is made of that."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from gossipfl.inference.planning.device_words import Resolve
from gossipfl.inference.planning.receipts import Answer, Receipt, Tier
from gossipfl.runtime.stages import FULL_ENGINE


@dataclass(slots=True)
class Job:
    inputs: np.ndarray
    asked_at: float
    future: Future[Answer]
    payload: bytes | None = None
    """The live tensors of the cut, encoded."""
    reduced: np.ndarray | None = None
    full: np.ndarray | None = None
    """Scores of the samples that fell back, f32[b, K]."""
    margins: tuple[float, ...] = ()
    device_s: float = 0.0
    server_s: float = 0.0
    transfer_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


def set_aside(job: Job, samples: tuple[int, ...]) -> Job:
    """A job of its own of these samples, to be audited: nobody waits for it, and the caller may change the inputs."""
    assert job.reduced is not None, "it is accepted"
    rows = list(samples)
    return Job(job.inputs[rows], time.perf_counter(), Future(), reduced=job.reduced[rows])


def answer(job: Job, resolve: Resolve, engine: str | None) -> Answer:
    """Where each of the `unsure` samples has the full model's scores, if it `is_verified`; `engine` ran the device's layers."""
    manifest, unsure, is_verified = resolve.manifest, resolve.unsure, resolve.is_verified
    scores = job.full if manifest.sends_everything else job.reduced
    assert scores is not None, "it is resolved"
    if is_verified and unsure and not manifest.sends_everything:
        scores = scores.copy()
        scores[list(unsure)] = job.full
    fell_back: Tier = "full" if is_verified else "unverified"
    doubted = set(unsure)
    receipt = Receipt(
        manifest.model,
        manifest.version,
        tuple(fell_back if index in doubted else "reduced" for index in range(len(scores))),
        job.margins,
        threshold=None if manifest.sends_everything else manifest.threshold,
        alpha=None if resolve.alarm else manifest.alpha,
        delta=None if resolve.alarm else manifest.delta,
        alarm=resolve.alarm,
        cut=manifest.cut,
        weight_bits=manifest.plan.weight_bits,
        activation_bits=manifest.plan.activation_bits,
        engines=(*([engine] if engine else []), *([FULL_ENGINE] if job.bytes_down else [])),
        bytes_up=job.bytes_up,
        bytes_down=job.bytes_down,
        seconds={
            "device": job.device_s,
            "transfer": job.transfer_s,
            "server": job.server_s,
            "total": time.perf_counter() - job.asked_at,
        },
    )
    return Answer(scores, receipt)
