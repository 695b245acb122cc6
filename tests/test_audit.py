"""The audit of a certificate: alarms are as rare as promised while all is well, and a drift is found within a bound."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gossipfl.errors import ConfigError
from gossipfl.inference.planning.audit import Audit, audited_of, risks_bet_on

ALPHA, DELTA = 0.02, 0.05


def watched(draws: np.ndarray, audit: Audit | None = None) -> Audit:
    """The audit after these requests, or at its alarm."""
    audit = audit or Audit.start(ALPHA, DELTA)
    for differing in draws:
        audit = audit.observe(bool(differing))
        if audit.alarmed:
            break
    return audit


def test_evidence_begins_at_one_and_is_never_negative():
    audit = Audit.start(ALPHA, DELTA)
    assert audit.evidence == 1.0 and not audit.alarmed
    for _ in range(2000):
        audit = audit.observe(False)
        assert 0.0 < audit.evidence < 1.0
    assert (audit.num_audited, audit.num_differing) == (2000, 0)


@pytest.mark.parametrize("alpha", [1e-4, 0.02, 0.3, 0.5, 0.9])
def test_at_a_risk_of_alpha_evidence_stays_the_same_on_average_and_below_it_shrinks(alpha):
    risks = risks_bet_on(alpha)
    assert all(alpha < risk < 1 for risk in risks) and list(risks) == sorted(risks)
    rng, audit = np.random.default_rng(1), Audit.start(alpha, 0.001)
    for differing in rng.random(50) < alpha:
        clean, faulty = audit.observe(False).evidence, audit.observe(True).evidence
        assert (1 - alpha) * clean + alpha * faulty == pytest.approx(audit.evidence)
        assert (1 - alpha / 2) * clean + alpha / 2 * faulty < audit.evidence
        audit = audit.observe(bool(differing))


def test_evidence_is_the_mixture_over_starts_and_bets_that_it_is_said_to_be():
    draws = np.random.default_rng(2).random(40) < 0.1
    expected = 1 / (len(draws) + 1)
    for risk in risks_bet_on(ALPHA):
        bet = (risk - ALPHA) / (ALPHA * (1 - ALPHA))
        assert 0 < bet < 1 / ALPHA
        factors = 1 + bet * (draws - ALPHA)
        for start in range(len(draws)):
            expected += factors[start:].prod() / ((start + 1) * (start + 2)) / len(risks_bet_on(ALPHA))
    audit = Audit.start(ALPHA, 1e-12)
    for differing in draws:
        audit = audit.observe(bool(differing))
    assert audit.evidence == pytest.approx(expected)


def test_false_alarms_are_as_rare_as_promised_however_long_one_watches():
    """Ville: at most delta, at the highest risk that is allowed. 300 audits of 3,000 requests each."""
    rng, audits = np.random.default_rng(3), 300
    alarms = sum(watched(rng.random(3000) < ALPHA).alarmed for _ in range(audits))
    assert alarms / audits <= DELTA


def delay_bound(risk: float, after: int, sigmas: float = 5.0) -> int:
    """Audits within which a drift to `risk` is found, but for a chance of 1 / (1 + sigmas^2) (Cantelli).

    Of all stakes take only that put in at the drift on the greatest risk not above the true one: its logarithm is a sum
    of independent terms of known mean and variance, and has to reach log(number of bets (t + 1)(t + 2) / delta).
    """
    bet = max(other for other in risks_bet_on(ALPHA) if other <= risk * (1 + 1e-9))
    up, down = math.log(bet / ALPHA), math.log((1 - bet) / (1 - ALPHA))
    mean = risk * up + (1 - risk) * down
    deviation = (up - down) * math.sqrt(risk * (1 - risk))
    needed = math.log(len(risks_bet_on(ALPHA)) * (after + 1) * (after + 2) / DELTA)
    num = 1
    while num * mean - sigmas * deviation * math.sqrt(num) < needed:
        num += 1
    return num


@pytest.mark.parametrize("after", [0, 100, 2000])
@pytest.mark.parametrize("risk", [0.08, 0.2, 0.5])
def test_a_drift_is_found_within_its_bound(risk, after):
    rng, audits = np.random.default_rng(4), 40
    bound, delays = delay_bound(risk, after), []
    for _ in range(audits):
        before = Audit.start(ALPHA, DELTA)
        for differing in rng.random(after) < ALPHA / 2:
            before = before.observe(bool(differing))
        if not before.alarmed:
            drifted = watched(rng.random(bound) < risk, before)
            delays.append(drifted.alarmed_at - after if drifted.alarmed else None)
    assert len(delays) >= 0.9 * audits
    chance = 1 / 26
    assert delays.count(None) <= len(delays) * chance + 3 * math.sqrt(len(delays) * chance)


def test_a_late_drift_is_found_after_little_longer_than_an_early_one():
    """The stakes wait: a process that had bet all along would first have to win back 2,000 losses."""
    late = watched(np.ones(100, bool), watched(np.zeros(2000, bool))).alarmed_at - 2000
    assert watched(np.ones(100, bool)).alarmed_at <= late <= 10


def test_an_alarm_stays_and_says_when_it_came():
    audit = watched(np.ones(100, bool))
    at = audit.alarmed_at
    for _ in range(1000):
        audit = audit.observe(False)
    assert audit.alarmed_at == at and audit.evidence < 1 / DELTA


def test_about_the_share_that_was_asked_for_is_audited_and_the_seed_decides():
    drawn = [audited_of(4000, 0.05, np.random.default_rng(5)) for _ in range(2)]
    assert drawn[0] == drawn[1] and set(drawn[0]) < set(range(4000))
    assert abs(len(drawn[0]) - 200) <= 4 * math.sqrt(4000 * 0.05 * 0.95)
    assert audited_of(10, 0.0, np.random.default_rng(5)) == () and len(audited_of(10, 1.0, np.random.default_rng(5))) == 10


@pytest.mark.parametrize(("alpha", "delta"), [(0.0, 0.05), (0.02, 1.0), (math.nan, 0.05)])
def test_levels_of_an_audit_lie_between_0_and_1(alpha, delta):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Audit.start(alpha, delta)
