"""When the reduced model is sure enough: margins, and thresholds that they are compared with.

Adaptive Resolution Inference (ARI; Wang, Reviriego, Niknia, Conde, Liu and Lombardi, IEEE IoT Journal 2023, arXiv 2408.14528):
run the reduced model; where the margin of its scores is at least a threshold T, its class is the answer, else the full model is
run. What can go wrong is L_T(x) = 1{margin(x) >= T and reduced(x) != full(x)}; its mean is the risk R(T): the share of *all*
requests that the reduced model answers and the full one would have answered otherwise. No labels are needed, and at most R(T)
of accuracy is lost. What a threshold lets through is certified in `certificates`.

    m, differs = margins(reduced), differing(reduced.argmax(1), full.argmax(1))
    threshold = largest_change(m, differs)
    answer_from_reduced = accepted(margins(scores), threshold)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.registry import Registry

Scale = Literal["softmax", "logits"]


def margins(scores: np.ndarray, scale: Scale = "softmax") -> np.ndarray:
    """Top-1 minus top-2 of each row of `scores` (logits f32[n, K]) as they are, or of their softmax (0 to 1): f32[n].

    Ties have margin 0. A row with a score that is not finite has margin NaN, which no threshold accepts.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ConfigError(f"scores of shape {list(scores.shape)} have no margin; give [n, K] with two classes at least")
    finite = np.isfinite(scores).all(axis=1)
    values = np.where(finite[:, None], scores, 0.0).astype(np.float64)
    second, first = np.partition(values, -2, axis=1)[:, -2:].T
    if scale == "softmax":
        total = np.exp(values - first[:, None]).sum(axis=1)
        result = -np.expm1(second - first) / total
    else:
        result = first - second
    return np.where(finite, result, np.nan).astype(np.float32)


def accepted(margins: np.ndarray, threshold: float) -> np.ndarray:
    """Which samples (bool[n]) the reduced model answers."""
    return margins >= np.float32(threshold)


def differing(reduced: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Where the classes (i64[n]) of the two models differ: bool[n]."""
    return reduced != full


def losing(reduced: np.ndarray, full: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Where the reduced model loses accuracy: the full one is right and it is wrong. A subset of `differing`."""
    return (full == labels) & (reduced != labels)


# --- thresholds -------------------------------------------------------------------------------------------------------

THRESHOLDS: Registry[Callable[[np.ndarray, np.ndarray, Scale], float]] = Registry("threshold")
"""The paper's rules, `f(margins f32[n], differs bool[n], scale) -> T`. None bounds the risk at a level of one's choice."""


@THRESHOLDS.register("max")
def largest_change(margins: np.ndarray, differs: np.ndarray, scale: Scale = "softmax") -> float:
    """The paper's M: just above the largest margin of a sample whose class changes."""
    return threshold_letting_through(0, margins, differs)


@THRESHOLDS.register("fit99")
def fitted_99(margins: np.ndarray, differs: np.ndarray, scale: Scale = "softmax") -> float:
    """The paper's PDF99%: the 99 % quantile of an exponential distribution fitted to the margins of changing samples."""
    return _fitted(0.99, margins, differs, scale)


@THRESHOLDS.register("fit99.9")
def fitted_999(margins: np.ndarray, differs: np.ndarray, scale: Scale = "softmax") -> float:
    """The paper's PDF99.9%."""
    return _fitted(0.999, margins, differs, scale)


def _fitted(share: float, margins: np.ndarray, differs: np.ndarray, scale: Scale) -> float:
    changing = _changing(margins, differs)
    if changing.size == 0:
        return 0.0
    quantile = float(changing.mean(dtype=np.float64)) * -math.log1p(-share)
    return _just_above(min(quantile, 1.0) if scale == "softmax" else quantile)


def threshold_letting_through(num: int, margins: np.ndarray, differs: np.ndarray) -> float:
    """The least threshold that accepts at most `num` of the samples that differ: infinite for -1, 0 if no more differ."""
    changing = _changing(margins, differs)
    if num < 0:
        return math.inf
    if changing.size <= num:
        return 0.0
    return _just_above(np.partition(changing, changing.size - 1 - num)[changing.size - 1 - num])


def threshold_continuing(num: int, margins: np.ndarray, differs: np.ndarray, continued: np.ndarray) -> float | None:
    """The least threshold from which on upwards at most `num` are answered otherwise, where what is not accepted is continued,
    and then differs where `continued` (bool[n]) says; None where even infinity has more."""
    _changing(margins, differs), _changing(margins, continued)
    count = int(np.count_nonzero(continued))
    if count > num:
        return None
    usable = np.flatnonzero(~np.isnan(margins))
    order = usable[np.argsort(-margins[usable].astype(np.float32), kind="stable")]
    values = margins[order].astype(np.float32)
    last_of_equals = np.append(values[1:] != values[:-1], True) if len(values) else np.zeros(0, bool)
    counts = count + np.cumsum(differs[order].astype(int) - continued[order].astype(int))
    failing = np.flatnonzero(last_of_equals & (counts > num))
    return _just_above(values[failing[0]]) if failing.size else 0.0


def _changing(margins: np.ndarray, differs: np.ndarray) -> np.ndarray:
    """The margins of the samples that differ and may be accepted at all."""
    if margins.shape != differs.shape or margins.ndim != 1:
        raise ConfigError(f"{list(margins.shape)} margins and {list(differs.shape)} comparisons; give one of each per sample")
    return margins[differs.astype(bool) & ~np.isnan(margins)].astype(np.float32)


def _just_above(margin: float) -> float:
    """The next float32: `margin >= T` then is the paper's `margin > M`."""
    return float(np.nextafter(np.float32(margin), np.float32(np.inf)))
