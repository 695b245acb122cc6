"""Margins, the thresholds put on them, and what a certificate promises: exact counts, and the promise itself on known risks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from gossipfl.errors import ConfigError
from gossipfl.inference.planning.cascade import (
    Cost,
    bit_macs,
    cascade_cost,
    of_cascade,
    relative_energy_of_integers,
    relative_energy_of_mantissas,
    relative_energy_of_streams,
    saving,
)
from gossipfl.inference.planning.certificates import (
    Basis,
    Certificate,
    allowed_disagreements,
    certify,
    certify_continued,
    mean_risk,
    samples_needed,
)
from gossipfl.inference.planning.margins import THRESHOLDS, accepted, differing, losing, margins, threshold_letting_through
from gossipfl.inference.planning.profile import LayerProfile, ModelProfile

BASIS = Basis("5f1c", 3, 2, (4, 6), 8, ("int8", "fp32"), "digits")


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def flags(*values: int) -> np.ndarray:
    return np.array(values, bool)


# --- margins ----------------------------------------------------------------------------------------------------------


def test_a_margin_is_the_distance_of_the_two_best_scores():
    scores = f32(3, 1, 2).reshape(1, 3)
    assert margins(scores, "logits").tolist() == [1.0]
    share = np.exp(scores) / np.exp(scores).sum()
    assert margins(scores, "softmax")[0] == pytest.approx(share[0, 0] - share[0, 2], rel=1e-6)


def test_ties_have_no_margin_and_scores_that_are_not_finite_are_never_accepted():
    scores = np.array([[2, 2, 1], [np.nan, 1, 0], [np.inf, 1, 0], [-np.inf, 1, 0]], np.float32)
    for scale in ("softmax", "logits"):
        found = margins(scores, scale)
        assert found.dtype == np.float32 and found[0] == 0.0 and np.isnan(found[1:]).all()
        assert accepted(found, 0.0).tolist() == [True, False, False, False]
        assert not accepted(found, math.inf).any()


def test_large_scores_do_not_overflow():
    assert margins(f32(1e30, -1e30).reshape(1, 2), "softmax").tolist() == [1.0]
    assert margins(f32(1e4, 1e4 - 1).reshape(1, 2), "softmax")[0] == pytest.approx(math.tanh(0.5), rel=1e-6)


def test_one_class_has_no_margin():
    with pytest.raises(ConfigError, match="two classes"):
        margins(np.zeros((4, 1), np.float32))


def test_a_lost_sample_is_one_that_only_the_full_model_gets_right():
    reduced, full, labels = np.array([1, 2, 3, 4]), np.array([1, 1, 1, 4]), np.array([1, 1, 3, 0])
    assert differing(reduced, full).tolist() == [False, True, True, False]
    assert losing(reduced, full, labels).tolist() == [False, True, False, False]


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_a_threshold_lets_through_as_many_as_it_may_and_no_more():
    values = f32(0.9, 0.8, 0.7, 0.6, 0.5, np.nan)
    differs = flags(0, 1, 1, 0, 1, 1)
    for num, expected in ((-1, 0), (0, 0), (1, 1), (2, 2), (3, 3), (4, 3)):
        threshold = threshold_letting_through(num, values, differs)
        assert (accepted(values, threshold) & differs).sum() == expected
    assert threshold_letting_through(-1, values, differs) == math.inf
    assert threshold_letting_through(3, values, differs) == 0.0
    assert threshold_letting_through(0, values, differs) == np.nextafter(np.float32(0.8), np.float32(1))


def test_of_equal_margins_all_are_let_through_or_none():
    values, differs = f32(0.5, 0.5, 0.5, 0.2), flags(1, 1, 1, 1)
    for num, expected in ((1, 0), (2, 0), (3, 3)):
        assert (accepted(values, threshold_letting_through(num, values, differs)) & differs).sum() == expected


def test_the_papers_rules_are_the_maximum_and_an_exponential_fit():
    values, differs = f32(0.1, 0.3, 0.2, 0.9), flags(1, 1, 1, 0)
    assert THRESHOLDS.get("max")(values, differs, "softmax") == pytest.approx(0.3)
    assert THRESHOLDS.get("fit99")(values, differs, "softmax") == pytest.approx(0.2 * math.log(100))
    assert THRESHOLDS.get("fit99.9")(values, differs, "softmax") == pytest.approx(1.0)
    assert THRESHOLDS.get("fit99.9")(values, differs, "logits") == pytest.approx(0.2 * math.log(1000))
    assert not accepted(f32(1.0), THRESHOLDS.get("fit99.9")(values, differs, "softmax")).any()


@pytest.mark.parametrize("rule", list(THRESHOLDS))
def test_where_no_class_changes_everything_is_accepted(rule):
    assert THRESHOLDS.get(rule)(f32(0.0, 0.4), flags(0, 0), "softmax") == 0.0


# --- certificates -----------------------------------------------------------------------------------------------------


def tail(n: int, alpha: Fraction, k: int) -> Fraction:
    """P[Bin(n, alpha) <= k], exactly."""
    return sum((math.comb(n, i) * alpha**i * (1 - alpha) ** (n - i) for i in range(k + 1)), Fraction(0))


@pytest.mark.parametrize(
    ("alpha", "n", "k"),
    [
        *[(0.01, 300, 0), (0.01, 500, 1), (0.01, 1000, 4), (0.01, 2000, 12), (0.01, 5000, 38), (0.01, 10000, 83)],
        *[(0.005, 1000, 1), (0.005, 2000, 4), (0.005, 5000, 16), (0.005, 10000, 38)],
    ],
)
def test_the_allowed_disagreements_are_those_of_the_exact_binomial(alpha, n, k):
    assert allowed_disagreements(n, alpha, 0.05) == k
    if n <= 2000:
        exact = Fraction(str(alpha))
        assert tail(n, exact, k) <= Fraction(5, 100) < tail(n, exact, k + 1)


@pytest.mark.parametrize(("alpha", "delta", "needed"), [(0.02, 0.05, 149), (0.01, 0.05, 299), (0.02, None, 49), (0.5, 0.5, 1)])
def test_fewer_samples_than_needed_certify_nothing(alpha, delta, needed):
    assert samples_needed(alpha, delta) == needed
    assert allowed_disagreements(needed, alpha, delta) == 0
    assert allowed_disagreements(needed - 1, alpha, delta) == -1


def test_too_few_samples_always_fall_back_and_say_how_many_are_needed():
    few = certify(np.linspace(0, 1, 148, dtype=np.float32), np.zeros(148, bool), BASIS)
    assert few.threshold == math.inf and few.fallback_rate == 1.0
    assert "148 calibration samples" in few.warning and "149" in few.warning
    enough = certify(np.linspace(0, 1, 149, dtype=np.float32), np.zeros(149, bool), BASIS)
    assert enough.threshold == 0.0 and enough.fallback_rate == 0.0 and enough.warning is None
    nothing = certify(f32(), flags(), BASIS)
    assert nothing.threshold == math.inf and nothing.fallback_rate == 1.0


def test_a_certificate_counts_what_it_lets_through():
    values = np.linspace(1, 0, 1000, dtype=np.float32)
    differs = np.arange(1000) % 10 == 9  # 100 of them; 12 may pass at 2 %, so the 13th falls back
    certificate = certify(values, differs, BASIS)
    assert (certificate.n, certificate.disagreements, certificate.let_through) == (1000, 100, 12)
    assert certificate.fallback_rate == pytest.approx(1 - 129 / 1000)
    assert accepted(values, certificate.threshold).sum() == 129


def by_hand(num, values, differs, continued) -> float | None:
    """Going down from infinity over every threshold that makes a difference."""
    found = None
    for threshold in [math.inf, *sorted({float(np.nextafter(m, np.float32(np.inf))) for m in values if m >= 0} | {0.0})[::-1]]:
        if np.where(accepted(values, threshold), differs, continued).sum() > num:
            return found
        found = threshold
    return found


@pytest.mark.parametrize("seed", range(30))
def test_continuing_is_certified_down_to_the_first_threshold_that_lets_too_many_through(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(150, 400))
    values = (rng.random(n) * rng.choice([5, 50, 1000])).astype(int).astype(np.float32)  # with ties
    values[rng.random(n) < 0.02] = math.nan
    differs, continued = (rng.random(n) < share for share in rng.random(2) * (0.2, 0.02))
    certificate = certify_continued(values, differs, continued, BASIS, tried=2)
    expected = by_hand(allowed_disagreements(n, 0.02, 0.025), values, differs, continued)
    assert (certificate is None) == (expected is None)
    if certificate is not None:
        accept = accepted(values, expected)
        assert (accepted(values, certificate.threshold) == accept).all()
        assert certificate.let_through == np.where(accept, differs, continued).sum()
        assert certificate.fallback_rate == pytest.approx(1 - accept.mean())


def test_samples_of_equal_margins_are_accepted_together_also_where_they_make_up_for_each_other():
    values, differs = np.linspace(0.9, 0.1, 1000, dtype=np.float32), np.arange(1000) == 0
    continued = (np.arange(1000) > 0) & (np.arange(1000) <= allowed_disagreements(1000))  # as many as there may be
    assert certify_continued(values, differs, continued, BASIS).threshold > values[0], "the first would be one too many"
    values[1] = values[0]  # and the second one less
    assert certify_continued(values, differs, continued, BASIS).threshold == 0.0


def test_continuing_that_changes_nothing_is_certified_as_the_full_model_is():
    rng = np.random.default_rng(0)
    values, differs, none = rng.random(1000, np.float32), rng.random(1000) < 0.1, np.zeros(1000, bool)
    for tried in (1, 2):
        full = certify(values, differs, BASIS, tried=tried)
        assert certify_continued(values, differs, none, BASIS, tried=tried) == full
    assert full.let_through == allowed_disagreements(1000, 0.02, 0.025) < allowed_disagreements(1000)


def test_continuing_that_differs_too_often_or_is_hardly_known_is_not_certified():
    values, differs = np.linspace(1, 0, 1000, dtype=np.float32), np.zeros(1000, bool)
    allowed = allowed_disagreements(1000)
    for num in (allowed, allowed + 1):
        certificate = certify_continued(values, differs, np.arange(1000) < num, BASIS)
        assert (certificate is None) == (num > allowed)
    assert certify_continued(values[:148], differs[:148], differs[:148], BASIS) is None


def test_the_mean_version_lets_more_through():
    values, differs = np.linspace(1, 0, 1000, dtype=np.float32), np.arange(1000) % 10 == 9
    assert mean_risk(values, differs, BASIS).let_through == 19
    assert mean_risk(values, differs, BASIS).delta is None


@pytest.mark.parametrize(("alpha", "delta"), [(0.0, 0.05), (1.0, 0.05), (0.02, 0.0), (math.nan, 0.05)])
def test_levels_lie_between_0_and_1(alpha, delta):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        certify(f32(0.5), flags(0), BASIS, alpha, delta)


def test_a_certificate_is_void_once_what_it_was_made_for_changes():
    certificate = certify(f32(0.5), flags(0), BASIS)
    assert certificate.holds_for(BASIS)
    other = Basis("5f1c", 3, 2, (4, 5), 8, ("int8", "int8"), "digits")
    assert not certificate.holds_for(other)
    assert certificate.changed(other) == ("weight_bits", "engines")


@pytest.mark.parametrize("n", [10, 400])
def test_a_certificate_survives_json(n):
    rng = np.random.default_rng(n)
    for delta in (0.05, None):
        values, differs = rng.random(n, np.float32), rng.random(n) < 0.1
        certificate = mean_risk(values, differs, BASIS) if delta is None else certify(values, differs, BASIS)
        assert Certificate.from_json(certificate.to_json()) == certificate
        json.loads(certificate.to_json(), parse_constant=pytest.fail)
    older = json.loads(certify(values, differs, BASIS).to_json())
    del older["tried"], older["basis"]["fallback"]
    assert Certificate.from_json(json.dumps(older)) == certify(values, differs, BASIS)
    if n == 400:
        continued = certify_continued(values, differs, flags(*[0] * n), replace(BASIS, fallback="continued"), tried=2)
        assert Certificate.from_json(continued.to_json()) == continued and not continued.holds_for(BASIS)


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": -0.1},
        {"threshold": math.nan},
        {"threshold": "0.5"},
        {"alpha": 0},
        {"alpha": True},
        {"delta": 2},
        {"n": 1.5},
        {"n": 100},
        {"let_through": 13},
        {"let_through": 101},
        {"fallback_rate": 1.5},
        {"loss": "anything"},
        {"tried": 3},
        {"tried": 2},
        {"basis": None},
        {"basis": {"model": "5f1c"}},
        {"more": 1},
    ],
)
def test_a_certificate_that_cannot_be_true_is_refused(change):
    values, differs = np.linspace(1, 0, 1000, dtype=np.float32), np.arange(1000) % 10 == 9
    written = json.loads(certify(values, differs, BASIS).to_json())
    with pytest.raises(ConfigError, match="no certificate"):
        Certificate.from_json(json.dumps(written | change))


def test_a_certificate_of_continuing_with_an_infinite_threshold_needs_samples():
    """Where all go to the full model nothing can be wrong; where all continue it can."""
    few = json.loads(certify(f32(0.5), flags(0), BASIS).to_json())
    assert Certificate.from_json(json.dumps(few)).threshold == math.inf
    few["basis"]["fallback"] = "continued"
    with pytest.raises(ConfigError, match="no certificate"):
        Certificate.from_json(json.dumps(few))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_what_is_no_certificate_at_all_is_refused(text):
    with pytest.raises(ConfigError, match="no certificate"):
        Certificate.from_json(text)


# --- the promise ------------------------------------------------------------------------------------------------------

ALPHA, DELTA = 0.01, 0.05
HEIGHT, DECAY = 0.5, 0.192


def known_risk(threshold: float) -> float:
    """Margins are uniform on 0..1, and a sample of margin m differs with probability HEIGHT exp(-m / DECAY)."""
    return HEIGHT * DECAY * max(0.0, math.exp(-min(threshold, 1.0) / DECAY) - math.exp(-1 / DECAY))


@pytest.mark.parametrize("n", [500, 1000, 2000])
def test_the_risk_is_above_alpha_as_rarely_as_promised(n):
    rng = np.random.default_rng(n)
    calibrations = 1000
    violations = {"certify": 0, "mean_risk": 0}
    risks, fallbacks = [], {"certify": 0.0, "mean_risk": 0.0, "max": 0.0}
    for _ in range(calibrations):
        values = rng.random(n, np.float32)
        differs = rng.random(n) < HEIGHT * np.exp(-values / DECAY)
        thresholds = {
            "certify": certify(values, differs, BASIS, ALPHA, DELTA).threshold,
            "mean_risk": mean_risk(values, differs, BASIS, ALPHA).threshold,
            "max": THRESHOLDS.get("max")(values, differs, "softmax"),
        }
        for rule in violations:
            violations[rule] += known_risk(thresholds[rule]) > ALPHA
        risks.append(known_risk(thresholds["mean_risk"]))
        for rule, threshold in thresholds.items():
            fallbacks[rule] += threshold / calibrations
    # margins have no ties here, so the chance of a violation is exactly that of so few disagreements at a risk of alpha
    chance = float(tail(n, Fraction(str(ALPHA)), allowed_disagreements(n, ALPHA, DELTA)))
    assert violations["certify"] / calibrations <= DELTA
    assert abs(violations["certify"] / calibrations - chance) <= 4 * math.sqrt(chance * (1 - chance) / calibrations)
    assert violations["mean_risk"] / calibrations > DELTA  # which promises its mean alone
    assert np.mean(risks) <= ALPHA + 4 * np.std(risks) / math.sqrt(calibrations)
    assert fallbacks["mean_risk"] < fallbacks["certify"] < fallbacks["max"]


def known_risk_of_continuing(height: float, threshold: float) -> float:
    """As above, and a sample that continues differs with probability height exp(-m / DECAY)."""
    return known_risk(threshold) + height * DECAY * (1 - math.exp(-min(threshold, 1.0) / DECAY))


@pytest.mark.parametrize("height", [0.02, 0.0520, 0.0535])
def test_with_two_cascades_to_choose_from_the_risk_is_above_alpha_as_rarely_as_promised(height):
    """The last two have risks just below and just above alpha where all continue, so that only luck certifies them."""
    n, calibrations, violations, num_continued = 1000, 1000, 0, 0
    rng = np.random.default_rng(n)
    assert (known_risk_of_continuing(height, 1.0) > ALPHA) == (height == 0.0535)
    for _ in range(calibrations):
        values = rng.random(n, np.float32)
        differs, continued = (rng.random(n) < high * np.exp(-values / DECAY) for high in (HEIGHT, height))
        full = certify(values, differs, BASIS, ALPHA, DELTA, tried=2)
        other = certify_continued(values, differs, continued, BASIS, ALPHA, DELTA, tried=2)
        if other is None or 3 * full.fallback_rate < other.fallback_rate:  # continuing is 3 times cheaper
            violations += known_risk(full.threshold) > ALPHA
        else:
            num_continued += 1
            violations += known_risk_of_continuing(height, other.threshold) > ALPHA
    assert violations / calibrations <= DELTA
    assert num_continued > 0


def test_of_several_plans_one_may_be_chosen_by_other_samples_but_not_by_those_of_the_certificates():
    """By what certificates let fall back the lucky ones are chosen, which let too much through."""
    n, calibrations, num_plans = 500, 300, 10
    rng, violations = np.random.default_rng(0), {"own": 0, "other": 0}

    def certificate():
        values = rng.random(n, np.float32)
        return certify(values, rng.random(n) < HEIGHT * np.exp(-values / DECAY), BASIS, ALPHA, DELTA)

    for _ in range(calibrations):
        own, other = ([certificate() for _ in range(num_plans)] for _ in range(2))
        for name, by in (("own", own), ("other", other)):
            chosen = min(range(num_plans), key=lambda plan, by=by: by[plan].fallback_rate)
            violations[name] += known_risk(own[chosen].threshold) > ALPHA
    assert violations["other"] / calibrations <= DELTA < 3 * DELTA < violations["own"] / calibrations


def test_on_held_out_digits_disagreement_is_above_alpha_as_rarely_as_promised():
    from scipy.stats import binom
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    bunch = load_digits()
    x, y = bunch.data / 16.0, bunch.target
    model = LogisticRegression(max_iter=200).fit(x[:600], y[:600])
    scale = np.abs(model.coef_).max() / 3
    full = x[600:] @ model.coef_.T + model.intercept_
    reduced = x[600:] @ (np.round(model.coef_ / scale) * scale).T + model.intercept_
    values, differs = margins(reduced), differing(reduced.argmax(1), full.argmax(1))
    assert differs.mean() > 0.02  # without a threshold there would be too many
    rng, splits, above = np.random.default_rng(0), 300, 0
    for _ in range(splits):
        order = rng.permutation(len(values))
        kept, held_out = order[:600], order[600:]
        certificate = certify(values[kept], differs[kept], BASIS)
        wrong = int((accepted(values, certificate.threshold) & differs)[held_out].sum())
        above += binom.sf(wrong - 1, len(held_out), certificate.alpha) <= 0.05
    assert above / splits <= DELTA + 2 * math.sqrt(DELTA * (1 - DELTA) / splits)


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "fallback", "saved"), [(8, 0.083, 0.85), (9, 0.065, 0.81), (9, 0.15, 0.72), (10, 0.15, 0.60), (10, 0.14, 0.61)]
)
def test_the_papers_savings_follow_from_its_recompute_rates(bits, fallback, saved):
    assert saving(relative_energy_of_streams(bits), 1.0, fallback) == pytest.approx(saved, abs=0.006)


def test_energies_are_relative_to_the_full_model():
    assert relative_energy_of_streams(12) == 1.0 and relative_energy_of_streams(11) == 0.5
    assert relative_energy_of_integers(16, 16) == 1.0 and relative_energy_of_integers(8, 4) == 1 / 8
    assert relative_energy_of_mantissas(10) == 1.0 and relative_energy_of_mantissas(2) == pytest.approx(9 / 121)


def test_a_cascade_costs_the_reduced_model_and_a_share_of_the_full_one():
    assert cascade_cost(2.0, 10.0, 0.3) == 5.0
    mixed = of_cascade(Cost(1.0, 10.0, 100.0), Cost(4.0, None, 1000.0), 0.25)
    assert mixed == Cost(2.0, None, 350.0, None)


def test_work_is_weighted_by_bits_layer_by_layer():
    layers = (
        LayerProfile("a", "linear", (0, 8), None, 2, 8, ((2,),)),
        LayerProfile("b", "linear", (8, 14), None, 3, 6, ((3,),)),
    )
    profile = ModelProfile(layers, (4,), 3)
    assert bit_macs(profile, (4, 6), (8, 8)) == 8 * 4 * 8 + 6 * 6 * 8
    with pytest.raises(ConfigError, match="one for each"):
        bit_macs(profile, (4,), (8, 8))
