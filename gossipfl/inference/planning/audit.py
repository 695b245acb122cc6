"""Does a certificate still hold? A random share of the requests is compared with the full model, and a drift raises an alarm.

    audit = Audit.start(certificate.alpha, delta=0.05)
    for sample in audited_of(num, share, rng):                   # drawn of all requests, whatever their margins
        audit = audit.observe(accepted[sample] and reduced_class[sample] != full_class[sample])
    audit.alarmed                                                # P( ever, while R <= alpha ) <= delta

A request that falls back anyway costs nothing to audit: it counts as one where nothing went wrong. As the draw looks at
nothing, X = 1{accepted and different} of an audited request has the risk R as its mean (see `margins`), and each

    S_t = S_(t-1) (1 + lambda (X_t - alpha)),   0 <= lambda < 1 / alpha

is non-negative and, while R <= alpha, does not grow on average. By Ville's inequality it then reaches 1 / delta, at any time
whatsoever, with probability delta at most. Weighing with L = X / share instead, over all requests, is as valid but finds less:
its best rate of growth per request is KL(share R || share alpha) <= share KL(R || alpha), the one here, as KL is convex.

What to bet on is mixed, as a mixture of such processes is another one:
- lambda: betting on the risk r is best with lambda = (r - alpha) / (alpha (1 - alpha)), the likelihood ratio of r and alpha.
  Equal shares go to r = alpha 2^(1/2), alpha 2^(2/2), ... below 1. As what a bet on r gains on average grows with the true
  risk, a true one between two of them is found at least as fast as the lower would be.
- the start: what was bet while all was well is lost, so that a late drift would be found late. Of the unit at the beginning
  1 / (t (t + 1)) is put in before the t-th audit, and the rest, 1 / (t + 1), is kept. A drift after t audits then has to earn
  t (t + 1) / delta times the number of bets: its delay grows with log t only (the restarts of the e-detectors of Shin, Ramdas
  and Rinaldo, 2022, with weights that bound the chance of ever giving a false alarm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.inference.planning.certificates import ALPHA, DELTA

SHARE = 0.01
"""Of the requests are audited by default."""


def audited_of(num: int, share: float, rng: np.random.Generator) -> tuple[int, ...]:
    """Which of the next `num` requests are audited; draw it before anything is known of them."""
    return tuple(np.flatnonzero(rng.random(num) < share).tolist())


@dataclass(frozen=True, slots=True)
class Audit:
    """The state of an audit: what has been seen, and the stakes S_t on each risk (in the order of `risks_bet_on`)."""

    alpha: float
    delta: float
    stakes: tuple[float, ...]
    num_audited: int = 0
    num_differing: int = 0
    """Audited requests that were accepted and answered otherwise than by the full model."""
    alarmed_at: int | None = None
    """Number of audits at which the alarm was raised; it stays."""

    @staticmethod
    def start(alpha: float = ALPHA, delta: float = DELTA) -> Audit:
        for name, value in (("alpha", alpha), ("delta", delta)):
            if not 0.0 < value < 1.0:
                raise ConfigError(f"{name} = {value} must lie between 0 and 1")
        return Audit(alpha, delta, (0.0,) * len(risks_bet_on(alpha)))

    def observe(self, differing: bool) -> Audit:
        """After one more audited request; `differing`: it was accepted, and the full model answers otherwise."""
        t = self.num_audited + 1
        put_in = 1.0 / (t * (t + 1))
        stakes = tuple(
            (stake + put_in) * (risk / self.alpha if differing else (1.0 - risk) / (1.0 - self.alpha))
            for stake, risk in zip(self.stakes, risks_bet_on(self.alpha), strict=True)
        )
        after = replace(self, stakes=stakes, num_audited=t, num_differing=self.num_differing + differing)
        if self.alarmed_at is None and after.evidence >= 1.0 / self.delta:
            return replace(after, alarmed_at=t)
        return after

    @property
    def evidence(self) -> float:
        """M_t: 1 at first; 1 / delta or more raises the alarm."""
        return 1.0 / (self.num_audited + 1) + math.fsum(self.stakes) / len(self.stakes)

    @property
    def alarmed(self) -> bool:
        return self.alarmed_at is not None


@cache
def risks_bet_on(alpha: float) -> tuple[float, ...]:
    """alpha times powers of the root of 2, below 1; one at least."""
    num = max(1, math.ceil(-2.0 * math.log2(alpha)) - 1)
    return tuple(min(alpha * 2.0 ** (step / 2), (1.0 + alpha) / 2) for step in range(1, num + 1))
