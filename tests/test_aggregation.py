import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gossipfl import aggregation
from gossipfl.aggregation import AGGREGATORS, mean, median, trimmed_mean

RULES = [pytest.param(AGGREGATORS.get(name), id=name) for name in AGGREGATORS]

floats = st.floats(-1e6, 1e6, width=32)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 12))
matrices = shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=floats))
HALF_STEP = 2.0**-150  # float32 numbers near 0 are 2**-149 apart
quick = settings(deadline=None, max_examples=60)


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(k, n, seed=0):
    return rng(seed).standard_normal((k, n), dtype=np.float32)


def some_weights(k, seed=1):
    return rng(seed).uniform(0.1, 3.0, k)


def some_presence(k, n, seed=2):
    """Weights per value, positive for the own copy and about half of the others."""
    weights = rng(seed).uniform(0.1, 3.0, (k, n)).astype(np.float32)
    weights[1:][rng(seed + 1).random((k - 1, n)) < 0.5] = 0.0
    return weights


def mean_bound(rows):
    """Rounding of `mean`: a difference of two rows is 2M at most, M the largest magnitude; the difference, the share
    (twice for weights per value) and the product each err by 2**-24 of it, each of k sums by as much again, and the last
    step by 2**-24 M.

    That holds down to the smallest normal number. Below it products and quotients err by up to HALF_STEP; sums and
    differences are exact there. With shares these are k - 1 products; with weights per value, of 0.1 each at least, k - 1
    products, divided by a sum of 0.1 k at least, and the quotient: less than 11 HALF_STEP.
    """
    return (len(rows) + 5) * 2 * float(np.abs(rows).max()) * 2.0**-24 + (len(rows) + 10) * HALF_STEP


@pytest.mark.parametrize("rule", RULES)
@given(row=arrays(np.float32, 5, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)), k=st.integers(1, 9))
@quick
def test_equal_rows_stay_as_they_are_to_the_last_bit(rule, row, k):
    rows = np.tile(row, (k, 1))
    assert rule(rows, some_weights(k, seed=k)).tobytes() == row.tobytes()
    assert rule(rows, rng(k).uniform(0.1, 3.0, (k, 5)).astype(np.float32)).tobytes() == row.tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_minus_zero_stays_minus_zero(rule):
    rows = np.full((4, 3), -0.0, np.float32)
    assert np.signbit(rule(rows, np.ones(4))).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_lone_copy_is_the_result(rule):
    rows = normal(1, 100)
    assert rule(rows, np.array([0.3])).tobytes() == rows.tobytes()


@given(rows=matrices)
@quick
def test_the_mean_is_the_weighted_mean(rows):
    weights = some_weights(len(rows))
    expected = np.average(rows.astype(np.float64), axis=0, weights=weights)
    assert np.abs(mean(rows, weights) - expected).max() <= mean_bound(rows)


def test_the_mean_of_exact_numbers_is_exact():
    rows = np.array([[0.0, 8.0], [4.0, 0.0]], np.float32)
    assert mean(rows, np.array([3.0, 1.0])).tolist() == [1.0, 6.0]


@given(rows=matrices)
@quick
def test_the_median_is_that_of_numpy(rows):
    # The midpoint of the middle two takes three roundings of numbers of at most twice their magnitude; near 0 halving rounds.
    bound = 6 * float(np.abs(rows).max()) * 2.0**-24 + HALF_STEP
    assert np.abs(median(rows, some_weights(len(rows))) - np.median(rows.astype(np.float64), axis=0)).max() <= bound


@pytest.mark.parametrize("k", range(1, 8))
def test_every_order_of_values_is_sorted(k):
    """All sequences of zeros and ones: a comparison network that sorts those sorts everything (the 0-1 principle)."""
    rows = np.array(list(itertools.product([0.0, 1.0], repeat=k)), np.float32).T.copy()
    (_, ordered, _), *_ = aggregation._sorted_runs(rows, np.ones(k))
    np.testing.assert_array_equal(ordered, np.sort(rows, axis=0))


@given(rows=matrices.filter(lambda rows: len(rows) >= 3))
@quick
def test_the_trimmed_mean_leaves_out_the_highest_and_the_lowest(rows):
    expected = np.sort(rows.astype(np.float64), axis=0)[1:-1].mean(axis=0)
    assert np.abs(trimmed_mean(rows, some_weights(len(rows))) - expected).max() <= mean_bound(rows)


def test_the_trimmed_mean_of_two_copies_is_their_weighted_mean():
    rows, weights = normal(2, 50), np.array([3.0, 1.0])
    assert trimmed_mean(rows, weights).tobytes() == mean(rows, weights).tobytes()


@pytest.mark.parametrize("rule", [median, trimmed_mean])
def test_the_robust_rules_do_not_listen_to_stated_weights(rule):
    rows = normal(5, 50)
    assert rule(rows, np.ones(5)).tobytes() == rule(rows, np.array([1.0, 1e9, 1.0, 1.0, 1.0])).tobytes()


@pytest.mark.parametrize("rule", RULES)
@given(rows=matrices, seed=st.integers(0, 5))
@quick
def test_the_order_of_the_neighbours_does_not_matter(rule, rows, seed):
    order = np.concatenate([[0], 1 + rng(seed).permutation(len(rows) - 1)])
    for weights in (some_weights(len(rows)), some_presence(*rows.shape)):
        difference = np.abs(rule(rows, weights) - rule(rows[order], weights[order])).max()
        assert difference <= 2 * mean_bound(rows)  # each of the two may err by the bound


@pytest.mark.parametrize(("rule", "num_bad"), [(median, 3), (trimmed_mean, 1)])
@pytest.mark.parametrize("value", [3e38, -3e38])
def test_a_robust_rule_stays_within_the_good_copies(rule, num_bad, value):
    good = normal(4, 200)
    rows = np.concatenate([good, np.full((num_bad, 200), value, np.float32)])
    result = rule(rows, np.ones(len(rows)))
    slack = mean_bound(good)
    assert (result >= good.min(axis=0) - slack).all() and (result <= good.max(axis=0) + slack).all()


def test_one_bad_copy_pulls_the_mean_anywhere():
    rows = np.concatenate([normal(4, 200), np.full((1, 200), 1e9, np.float32)])
    assert (mean(rows, np.ones(5)) > 1e8).all()


@pytest.mark.parametrize("rule", RULES)
@given(rows=matrices, seed=st.integers(0, 5))
@quick
def test_a_value_that_a_copy_lacks_does_not_count(rule, rows, seed):
    weights = some_presence(*rows.shape, seed=seed)
    result = rule(np.where(weights > 0, rows, 0.0), weights)
    for coordinate in range(rows.shape[1]):
        held = weights[:, coordinate] > 0
        alone = rule(rows[held, coordinate, None], weights[held, coordinate].astype(np.float64))
        assert abs(result[coordinate] - alone[0]) <= 2 * mean_bound(rows)


@pytest.mark.parametrize("rule", RULES)
def test_what_no_neighbour_sent_stays_the_peers_own_to_the_last_bit(rule):
    rows = np.zeros((4, 100), np.float32)
    rows[0] = normal(1, 100)
    weights = np.zeros((4, 100), np.float32)
    weights[0] = 0.7
    assert rule(rows, weights).tobytes() == rows[0].tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_weights_per_value_that_are_all_alike_are_weights_per_copy(rule):
    rows, weights = normal(5, 100), some_weights(5)
    per_value = np.tile(weights.astype(np.float32)[:, None], (1, 100))
    assert np.abs(rule(rows, weights) - rule(rows, per_value)).max() <= 2 * mean_bound(rows)


@pytest.mark.parametrize("rule", RULES)
def test_a_list_may_mix_weights_per_copy_and_weights_per_value(rule):
    rows, weights = normal(3, 100), some_presence(3, 100)
    weights[0] = 0.7
    mixed = rule(list(rows), [0.7, weights[1], weights[2]])
    assert mixed.tobytes() == rule(rows, weights).tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_a_copy_of_weight_zero_does_not_count(rule):
    rows = normal(4, 100)
    with_zero = rule(rows, np.array([1.0, 2.0, 0.5, 0.0]))
    assert np.abs(with_zero - rule(rows[:3], np.array([1.0, 2.0, 0.5]))).max() <= 2 * mean_bound(rows)


@pytest.mark.parametrize("rule", RULES)
def test_where_a_segment_is_cut_does_not_show_in_the_bits(rule):
    n = 2 * aggregation._RUN + 5
    rows = normal(5, n)
    for weights in (some_weights(5), some_presence(5, n)):
        whole = rule(rows, weights)
        for part in (slice(0, 1), slice(7, 40_000), slice(40_000, n)):
            part_weights = weights if weights.ndim == 1 else weights[:, part]
            assert rule(rows[:, part], part_weights).tobytes() == whole[part].tobytes()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_result_is_written_to_out_even_over_the_own_copy_and_nowhere_else(rule, sparse):
    n = aggregation._RUN + 5
    rows = normal(4, n)
    weights = some_presence(4, n) if sparse else some_weights(4)
    before = rows.copy()
    expected = rule(rows, weights)
    assert rows.tobytes() == before.tobytes()
    out = np.empty(n, np.float32)
    assert rule(rows, weights, out) is out
    assert out.tobytes() == expected.tobytes()
    rule(rows, weights, out=rows[0])
    assert rows[0].tobytes() == expected.tobytes()
    assert rows[1:].tobytes() == before[1:].tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_read_only_and_unaligned_copies_are_read_in_place(rule):
    rows, weights = normal(3, 100), some_weights(3)
    received = [np.frombuffer(b"?" + row.tobytes(), np.float32, offset=1) for row in rows]
    assert not received[0].flags.aligned and not received[0].flags.writeable
    assert rule(received, weights).tobytes() == rule(rows, weights).tobytes()
