"""Certificates of what a threshold of the margin lets through: the risk R(T) of `margins`, from n calibration samples.

    m, differs = margins(reduced), differing(reduced.argmax(1), full.argmax(1))
    certificate = certify(m, differs, basis)               # P( R(threshold) > 2 % ) <= 5 %
    answer_from_reduced = accepted(margins(scores), certificate.threshold)
    certificate = certify_continued(m, differs, continued_differs, basis, tried=2)      # or None

These rules, and the paper's maximum, let k of the n samples that differ through, and put T just above the next margin:

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

Where the fallback is not the full model but one that continues (`profile.Fallback`), what falls back can be wrong as well:

    L_T(x) = 1{margin(x) >= T and reduced(x) != full(x)} + 1{margin(x) < T and continued(x) != full(x)}

R is still the share of all requests that are answered otherwise than by the full model, but neither it nor k_T falls with T.
Learn then Test holds all the same, with the same sequence: all T from infinity down, until p first exceeds delta, which ends
above the first margin at which k_T > k. Let T* be the supremum of all T with R(T) > alpha. There are t_1 <= t_2 <= ... with
R(t_j) > alpha that reach T* or tend to it; they hang on the distribution alone. To end at a threshold with R > alpha the
sequence has to pass all t_j from some j on, and P( k_(t_j) <= k for all j >= i ) <= delta for each i, as it is for each t_j
alone; the union over i is one of events that grow with i, so of probability delta at most, too. It starts at T = infinity,
where all continue: if more than k differ there, continuing is not certified at all, with any threshold.

Two cascades, with one fallback and with the other, are two sequences on the same samples. Each is tested at delta / 2, so that
with probability 1 - delta both keep what they claim: the cheaper may be chosen afterwards, whatever the samples say. Whether
there are two is decided by costs and by n, before anything is seen of the samples; where there is one, it is tested at delta.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast, get_args

import numpy as np
from scipy.special import bdtr  # the binomial distribution function; scipy.stats takes a second to import

from gossipfl.errors import ConfigError
from gossipfl.inference.planning.margins import Scale, accepted, threshold_continuing, threshold_letting_through
from gossipfl.inference.planning.profile import Fallback

Loss = Literal["disagreement", "accuracy"]
"""disagreement: reduced and full model differ; accuracy: the full model is right and the reduced one is wrong."""
ALPHA, DELTA = 0.02, 0.05


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
    fallback: Fallback = "full"


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
    """Those that are answered otherwise than by the full model at the threshold; also by continuing."""
    fallback_rate: float
    """Share of the calibration samples that fall back."""
    loss: Loss
    basis: Basis
    tried: int = 1
    """Of so many certificates on the same samples one was chosen: each is tested at delta / tried."""

    def holds_for(self, basis: Basis) -> bool:
        return not self.changed(basis)

    def changed(self, basis: Basis) -> tuple[str, ...]:
        """What makes the certificate void, by name."""
        return tuple(field.name for field in fields(Basis) if getattr(self.basis, field.name) != getattr(basis, field.name))

    @property
    def warning(self) -> str | None:
        """What to do where the certificate lets nothing through for want of samples."""
        needed = samples_needed(self.alpha, _shared(self.delta, self.tried))
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
    tried: int = 1,
) -> Certificate:
    """Learn then Test: the smallest threshold of which P( R(T) > alpha ) <= delta can be said.

    `margins` f32[n] are the reduced model's, on the scale of `basis`; `differs` bool[n] is `differing(...)`, or `losing(...)`
    with loss "accuracy". The samples must not have been used to train or to choose the reduced model. With fewer than
    `samples_needed` the threshold is infinite and the certificate has a `warning`.
    """
    num = allowed_disagreements(len(margins), alpha, _shared(delta, tried))
    threshold = threshold_letting_through(num, margins, differs)
    return _certificate(threshold, margins, differs, None, basis, alpha, delta, loss, tried)


def certify_continued(
    margins: np.ndarray,
    differs: np.ndarray,
    continued: np.ndarray,
    basis: Basis,
    alpha: float = ALPHA,
    delta: float = DELTA,
    loss: Loss = "disagreement",
    tried: int = 1,
) -> Certificate | None:
    """As `certify`, of a cascade that falls back to continuing; `continued` bool[n]: where that differs from the full model.

    None where it differs too often, or there are too few samples to say how often.
    """
    num = allowed_disagreements(len(margins), alpha, _shared(delta, tried))
    threshold = threshold_continuing(num, margins, differs, continued)
    if threshold is None:
        return None
    return _certificate(threshold, margins, differs, continued, basis, alpha, delta, loss, tried)


def _shared(delta: float | None, tried: int) -> float | None:
    return None if delta is None else delta / tried


def mean_risk(
    margins: np.ndarray, differs: np.ndarray, basis: Basis, alpha: float = ALPHA, loss: Loss = "disagreement"
) -> Certificate:
    """Conformal risk control: E R(T) <= alpha over calibrations; a single one may well lie above. Falls back less."""
    threshold = threshold_letting_through(allowed_disagreements(len(margins), alpha, None), margins, differs)
    return _certificate(threshold, margins, differs, None, basis, alpha, None, loss, 1)


def _certificate(
    threshold: float,
    margins: np.ndarray,
    differs: np.ndarray,
    continued: np.ndarray | None,
    basis: Basis,
    alpha: float,
    delta: float | None,
    loss: Loss,
    tried: int,
) -> Certificate:
    accept = accepted(margins, threshold)
    otherwise = accept & differs if continued is None else np.where(accept, differs, continued)
    return Certificate(
        threshold=threshold,
        alpha=alpha,
        delta=delta,
        n=len(margins),
        disagreements=int(np.count_nonzero(differs)),
        let_through=int(np.count_nonzero(otherwise)),
        fallback_rate=1.0 - float(accept.mean()) if len(margins) else 1.0,
        loss=loss,
        basis=basis,
        tried=tried,
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
    choices = (certificate.loss, get_args(Loss)), (basis.scale, get_args(Scale)), (basis.fallback, get_args(Fallback))
    for value, known in choices:
        if value not in known:
            found.append(f"{value!r} is none of {', '.join(known)}")
    if type(certificate.tried) is not int or not 1 <= certificate.tried <= 2:
        found.append(f"tried = {certificate.tried!r} is neither 1 nor 2")
    most = certificate.n if basis.fallback == "continued" else certificate.disagreements
    if not found and not (certificate.let_through <= most and certificate.disagreements <= certificate.n):
        found.append(f"{certificate.let_through} of {certificate.disagreements} of {certificate.n} samples let through")
    return found or _wrong_claims(certificate)


def _wrong_claims(certificate: Certificate) -> list[str]:
    """A certificate that claims more than its own counts show."""
    allowed = allowed_disagreements(certificate.n, certificate.alpha, _shared(certificate.delta, certificate.tried))
    is_safe = certificate.threshold == math.inf and certificate.basis.fallback == "full"
    if certificate.let_through <= max(allowed, 0) and (allowed >= 0 or is_safe):
        return []
    return [f"{certificate.let_through} of {certificate.n} samples let through do not show a risk of {certificate.alpha:g}"]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(cast(float, value))
