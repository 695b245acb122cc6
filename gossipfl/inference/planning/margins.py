"""When the reduced model is sure enough: margins, thresholds, and certificates of what a threshold lets through.

Adaptive Resolution Inference (ARI; Wang, Reviriego, Niknia, Conde, Liu and Lombardi, IEEE IoT Journal 2023, arXiv 2408.14528):
run the reduced model; where the margin of its scores is at least a threshold T, its class is the answer, else the full model is
run. What can go wrong is L_T(x) = 1{margin(x) >= T and reduced(x) != full(x)}; its mean is the risk R(T): the share of *all*
requests that the reduced model answers and the full one would have answered otherwise. No labels are needed, and at most R(T)
of accuracy is lost.

    m, differs = margins(reduced), differing(reduced.argmax(1), full.argmax(1))
    certificate = certify(m, differs, basis)               # P( R(threshold) > 2 % ) <= 5 %
    answer_from_reduced = accepted(margins(scores), certificate.threshold)

All rules but the paper's fit let k of the n calibration samples that differ through, and put T just above the next margin:

    the paper's maximum      k = 0                                               P( R(T) > 1 - delta^(1/n) ) <= delta
    Learn then Test          the largest k with P[Bin(n, alpha) <= k] <= delta     P( R(T) > alpha ) <= delta
    conformal risk control   k = floor(alpha (n + 1)) - 1                        E R(T) <= alpha

The first falls back the more, the more it has seen. Learn then Test (Angelopoulos, Bates, Candes, Jordan and Lei, arXiv
2110.01052) tests a fixed sequence of thresholds from the largest down with p-values P[Bin(n, alpha) <= k_T], k_T = sum L_T. No
grid is needed that the sample could have had a say in: all real T are tested. As k_T does not increase with T, going down
while p <= delta ends just above the (k + 1)-th largest margin among the samples that differ. As R does not increase either, R
there is above alpha only if k_S <= k for some S with R(S) > alpha that is fixed beforehand (the supremum of them, or a limit of
them from below): of probability delta at most. It is Wilks' one-sided tolerance limit. Conformal risk control (Angelopoulos,
Bates, Fisch, Lei and Schuster, arXiv 2208.02814): a new sample is as likely as any of the n to be among the k + 1 that differ
with the largest margins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast, get_args

import numpy as np
from scipy.special import bdtr  # the binomial distribution function; scipy.stats takes a second to import

from gossipfl.errors import ConfigError
from gossipfl.registry import Registry

Scale = Literal["softmax", "logits"]
Loss = Literal["disagreement", "accuracy"]
"""disagreement: reduced and full model differ; accuracy: the full model is right and the reduced one is wrong."""
ALPHA, DELTA = 0.02, 0.05


# --- margins ----------------------------------------------------------------------------------------------------------


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


def _changing(margins: np.ndarray, differs: np.ndarray) -> np.ndarray:
    """The margins of the samples that differ and may be accepted at all."""
    if margins.shape != differs.shape or margins.ndim != 1:
        raise ConfigError(f"{list(margins.shape)} margins and {list(differs.shape)} comparisons; give one of each per sample")
    return margins[differs.astype(bool) & ~np.isnan(margins)].astype(np.float32)


def _just_above(margin: float) -> float:
    """The next float32: `margin >= T` then is the paper's `margin > M`."""
    return float(np.nextafter(np.float32(margin), np.float32(np.inf)))


# --- certificates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Basis:
    """What a threshold was calibrated on. Where one of these changes, nothing is known of it any more."""

    model: str
    """Digest of the served vector."""
    version: int
    cut: int
    weight_bits: tuple[int, ...]
    activation_bits: int
    engines: tuple[str, ...]
    data: str
    """Name or digest of the calibration samples."""
    scale: Scale = "softmax"


@dataclass(frozen=True, slots=True)
class Certificate:
    """P( R(threshold) > alpha ) <= delta over the draw of the calibration samples; with delta None, E R(threshold) <= alpha.

    It speaks of requests that are drawn as the calibration samples were; `audit` watches whether they still are.
    """

    threshold: float
    """Infinite where there were too few samples: every request falls back."""
    alpha: float
    delta: float | None
    n: int
    disagreements: int
    """Calibration samples that differ at all."""
    let_through: int
    """Those of them that are accepted at the threshold."""
    fallback_rate: float
    """Share of the calibration samples that fall back to the full model."""
    loss: Loss
    basis: Basis

    def holds_for(self, basis: Basis) -> bool:
        return not self.changed(basis)

    def changed(self, basis: Basis) -> tuple[str, ...]:
        """What makes the certificate void, by name."""
        return tuple(field.name for field in fields(Basis) if getattr(self.basis, field.name) != getattr(basis, field.name))

    @property
    def warning(self) -> str | None:
        """What to do where the certificate lets nothing through for want of samples."""
        needed = samples_needed(self.alpha, self.delta)
        if self.n >= needed:
            return None
        return (
            f"{self.n} calibration samples cannot show a risk of {self.alpha:g}; take {needed} at least, or allow more: "
            "until then every request falls back to the full model"
        )

    def to_json(self) -> str:
        values = asdict(self)
        values["threshold"] = self.threshold if math.isfinite(self.threshold) else None
        return json.dumps(values, sort_keys=True, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Certificate:
        """ConfigError for what `to_json` cannot have written."""
        try:
            values = json.loads(text)
            basis = values.pop("basis")
            for key in ("weight_bits", "engines"):
                basis[key] = tuple(basis[key])
            values["threshold"] = math.inf if values["threshold"] is None else values["threshold"]
            certificate = Certificate(**values, basis=Basis(**basis))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"no certificate ({error}); calibrate the model again") from error
        for wrong in _problems(certificate):
            raise ConfigError(f"no certificate: {wrong}; calibrate the model again")
        return certificate


def certify(
    margins: np.ndarray,
    differs: np.ndarray,
    basis: Basis,
    alpha: float = ALPHA,
    delta: float = DELTA,
    loss: Loss = "disagreement",
) -> Certificate:
    """Learn then Test: the smallest threshold of which P( R(T) > alpha ) <= delta can be said.

    `margins` f32[n] are the reduced model's, on the scale of `basis`; `differs` bool[n] is `differing(...)`, or `losing(...)`
    with loss "accuracy". The samples must not have been used to train or to choose the reduced model. With fewer than
    `samples_needed` the threshold is infinite and the certificate has a `warning`.
    """
    return _certificate(allowed_disagreements(len(margins), alpha, delta), margins, differs, basis, alpha, delta, loss)


def mean_risk(
    margins: np.ndarray, differs: np.ndarray, basis: Basis, alpha: float = ALPHA, loss: Loss = "disagreement"
) -> Certificate:
    """Conformal risk control: E R(T) <= alpha over calibrations; a single one may well lie above. Falls back less."""
    return _certificate(allowed_disagreements(len(margins), alpha, None), margins, differs, basis, alpha, None, loss)


def _certificate(
    num: int, margins: np.ndarray, differs: np.ndarray, basis: Basis, alpha: float, delta: float | None, loss: Loss
) -> Certificate:
    threshold = threshold_letting_through(num, margins, differs)
    accept = accepted(margins, threshold)
    return Certificate(
        threshold=threshold,
        alpha=alpha,
        delta=delta,
        n=len(margins),
        disagreements=int(np.count_nonzero(differs)),
        let_through=int(np.count_nonzero(accept & differs)),
        fallback_rate=1.0 - float(accept.mean()) if len(margins) else 1.0,
        loss=loss,
        basis=basis,
    )


def allowed_disagreements(n: int, alpha: float = ALPHA, delta: float | None = DELTA) -> int:
    """k, of `n` samples: by Learn then Test, or by conformal risk control where delta is None; -1 if there is none."""
    _check_level("alpha", alpha)
    if delta is None:
        return math.floor(alpha * (n + 1) * _ROUNDING) - 1
    _check_level("delta", delta)
    return int(np.searchsorted(bdtr(np.arange(n + 1), n, alpha), delta, side="right")) - 1


def samples_needed(alpha: float = ALPHA, delta: float | None = DELTA) -> int:
    """With fewer calibration samples nothing is accepted: n with (1 - alpha)^n <= delta, or 1 / (n + 1) <= alpha."""
    if delta is None:
        return math.ceil(1 / (alpha * _ROUNDING)) - 1
    return math.ceil(math.log(delta) / math.log1p(-alpha))


_ROUNDING = 1 + 1e-12
"""0.29 * 100 is 29 samples, whatever its last bit says."""


def _check_level(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{name} = {value} must lie between 0 and 1")


def _problems(certificate: Certificate) -> list[str]:
    """What cannot be true of a certificate that was read."""
    basis = certificate.basis
    whole: dict[str, Any] = {key: getattr(certificate, key) for key in ("n", "disagreements", "let_through")}
    whole |= {"version": basis.version, "cut": basis.cut, "activation_bits": basis.activation_bits}
    whole |= {f"weight_bits[{i}]": bits for i, bits in enumerate(basis.weight_bits)}
    found = [f"{key} = {value!r} is no count" for key, value in whole.items() if type(value) is not int or value < 0]
    shares = {"alpha": certificate.alpha, "delta": certificate.delta if certificate.delta is not None else 0.5}
    found += [f"{key} = {value!r} is no level" for key, value in shares.items() if not _is_number(value) or not 0 < value < 1]
    if not _is_number(certificate.fallback_rate) or not 0 <= certificate.fallback_rate <= 1:
        found.append(f"fallback_rate = {certificate.fallback_rate!r} is no share")
    if not _is_number(certificate.threshold) or not certificate.threshold >= 0:
        found.append(f"threshold = {certificate.threshold!r} is no margin")
    texts = (basis.model, basis.data, *basis.engines)
    found += [f"{value!r} is no name" for value in texts if not isinstance(value, str)]
    for value, known in ((certificate.loss, get_args(Loss)), (basis.scale, get_args(Scale))):
        if value not in known:
            found.append(f"{value!r} is none of {', '.join(known)}")
    if not found and not certificate.let_through <= certificate.disagreements <= certificate.n:
        found.append(f"{certificate.let_through} of {certificate.disagreements} of {certificate.n} samples let through")
    return found or _wrong_claims(certificate)


def _wrong_claims(certificate: Certificate) -> list[str]:
    """A certificate that claims more than its own counts show."""
    allowed = allowed_disagreements(certificate.n, certificate.alpha, certificate.delta)
    if certificate.let_through <= max(allowed, 0) and (allowed >= 0 or certificate.threshold == math.inf):
        return []
    return [f"{certificate.let_through} of {certificate.n} samples let through do not show a risk of {certificate.alpha:g}"]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(cast(float, value))
