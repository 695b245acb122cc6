"""A question on a device, with all that has been computed of it, and the answer that is made of that."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from gossipfl.inference.planning.device_words import Resolve
from gossipfl.inference.planning.profile import FULL_ENGINE
from gossipfl.inference.planning.receipts import Answer, Receipt, Tier


@dataclass(slots=True)
class Job:
    inputs: np.ndarray
    asked_at: float
    future: Future[Answer]
    live: tuple[np.ndarray, ...] = ()
    """The tensors of the cut, where they may be continued."""
    payload: bytes | None = None
    """The same, encoded."""
    reduced: np.ndarray | None = None
    fallback: np.ndarray | None = None
    """Scores of the samples that fell back, f32[b, K]; continued or full."""
    margins: tuple[float, ...] = ()
    device_s: float = 0.0
    server_s: float = 0.0
    transfer_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    fallback_bytes_up: int = 0
    fell_back_at: float | None = None


def set_aside(job: Job, samples: tuple[int, ...], continued: tuple[int, ...]) -> Job:
    """A job of its own of these samples, to be audited: nobody waits for it, and the caller may change the inputs."""
    rows = list(samples)
    return Job(job.inputs[rows], time.perf_counter(), Future(), reduced=_scores(job, continued)[rows])


def _scores(job: Job, fallen_back: tuple[int, ...]) -> np.ndarray:
    """Those of the reduced model, but for the samples that fell back."""
    assert job.reduced is not None, "it has answered"
    if not fallen_back:
        return job.reduced
    scores = job.reduced.copy()
    scores[list(fallen_back)] = job.fallback
    return scores


def answer(job: Job, resolve: Resolve, engine: str | None) -> Answer:
    """Where each of the `unsure` samples has the scores of its fallback, if it `is_verified`; `engine` ran the device's
    layers."""
    manifest, unsure = resolve.manifest, resolve.unsure
    scores = job.fallback if manifest.sends_everything else _scores(job, unsure if resolve.is_verified else ())
    assert scores is not None, "it is resolved"
    answered: Tier = "continued" if resolve.is_continued else "full"
    fell_back: Tier = answered if resolve.is_verified else "unverified"
    now = time.perf_counter()
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
            "total": now - job.asked_at,
        },
        fallback_bytes_up=job.fallback_bytes_up,
        fallback_s=0.0 if job.fell_back_at is None else now - job.fell_back_at,
    )
    return Answer(scores, receipt)
