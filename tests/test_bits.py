import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossipfl.errors import PlanError
from gossipfl.inference.planning.bits import allocate_bits, exact_bits, relaxed_bits

quick = settings(deadline=None, max_examples=80)

layers = st.lists(
    st.tuples(
        st.one_of(st.just(0.0), st.floats(1e-6, 1e6)),
        st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 10**7)),
    ),
    min_size=1,
    max_size=4,
)


def noise(energies, bits):
    return math.fsum(energy * 4.0**-number for energy, number in zip(energies, bits, strict=True))


def cost(sizes, bits):
    return sum(size * number for size, number in zip(sizes, bits, strict=True))


def random_case(rng, num_layers):
    """Energies, sizes and a budget between the noise of 16 bits in each layer and that of 2."""
    sizes = np.floor(10 ** rng.uniform(2, 6, num_layers))
    energies = 10 ** rng.uniform(-2, 3, num_layers) * sizes / 1e3
    low, high = (math.log10(noise(energies, [bits] * num_layers)) for bits in (16, 2))
    return energies, sizes, 10 ** rng.uniform(low, high)


# Equal shares of the budget per value: with D = 3 * 4^-5 and sizes 1 and 2, the noises are 4^-5 and 2 * 4^-5.
def test_the_closed_form_is_met_exactly_where_it_is_whole():
    energies, sizes, budget = [4.0**3, 2 * 4.0**-1], [1, 2], 3 * 4.0**-5
    np.testing.assert_allclose(relaxed_bits(energies, sizes, budget), [8.0, 4.0], rtol=1e-12)
    assert allocate_bits(energies, sizes, budget) == (8, 4)


# The first layer is held at 6 bits and uses 1/4 of the budget; the others share the rest by their sizes: 3/4 as 1/4 and 1/2.
def test_layers_at_a_limit_leave_the_others_what_is_left_of_the_budget():
    energies, sizes = [0.25 * 4.0**6, 0.25 * 4.0**4, 0.5 * 4.0**5, 1e-9], [1, 1000, 2000, 500]
    bits = relaxed_bits(energies, sizes, 1.0 + 1e-9 * 4.0**-2, least=2, most=6)
    np.testing.assert_allclose(bits, [6, 4, 5, 2], rtol=1e-12)


@given(case=layers, share=st.floats(0, 1))
@quick
def test_the_whole_bits_are_the_best_of_all(case, share):
    energies, sizes = zip(*case, strict=True)
    least, most = 2, 6
    tightest, loosest = noise(energies, [most] * len(case)), noise(energies, [least] * len(case))
    budget = tightest + share**4 * (loosest - tightest)
    choices = itertools.product(range(least, most + 1), repeat=len(case))
    best = min(cost(sizes, bits) for bits in choices if noise(energies, bits) <= budget)
    for allocate in (allocate_bits, exact_bits):
        bits = allocate(energies, sizes, budget, least, most)
        assert noise(energies, bits) <= budget
        assert all(least <= number <= most for number in bits)
        assert cost(sizes, bits) == best


@pytest.mark.parametrize(("num_layers", "num_cases"), [(5, 200), (12, 15)])
def test_the_allocation_is_as_good_as_the_exact_search(num_layers, num_cases):
    rng = np.random.default_rng(num_layers)
    for _ in range(num_cases):
        energies, sizes, budget = random_case(rng, num_layers)
        bits = allocate_bits(energies, sizes, budget)
        assert noise(energies, bits) <= budget
        assert cost(sizes, bits) == cost(sizes, exact_bits(energies, sizes, budget))


# A bound from below: the relaxation. A bit too many in each layer is what rounding up alone costs at most.
@pytest.mark.parametrize("num_layers", [20, 54, 100])
def test_many_layers_come_close_to_what_real_bits_would_cost(num_layers):
    rng = np.random.default_rng(num_layers)
    for _ in range(5):
        energies, sizes, budget = random_case(rng, num_layers)
        bits, real = allocate_bits(energies, sizes, budget), relaxed_bits(energies, sizes, budget)
        assert noise(energies, bits) <= budget
        assert cost(sizes, real) * (1 - 1e-9) <= cost(sizes, bits) <= cost(sizes, np.minimum(real + 1, 16)) + sizes.max()


@given(case=layers, share=st.floats(0, 1))
@quick
def test_the_relaxation_spends_the_whole_budget_and_costs_no_more_than_whole_bits(case, share):
    energies, sizes = zip(*case, strict=True)
    budget = noise(energies, [16] * len(case)) * (1 - share) + noise(energies, [2] * len(case)) * share
    real = relaxed_bits(energies, sizes, budget)
    assert ((real >= 2) & (real <= 16)).all()
    assert noise(energies, real) <= budget * (1 + 1e-9)
    assert cost(sizes, real) <= cost(sizes, allocate_bits(energies, sizes, budget)) * (1 + 1e-9)
    if any(number > 2 for number, size in zip(real, sizes, strict=True) if size):
        assert noise(energies, real) >= budget * (1 - 1e-9)


def test_more_budget_never_costs_more():
    energies, sizes, _ = random_case(np.random.default_rng(7), 8)
    tightest = noise(energies, [16] * 8)
    costs = [cost(sizes, allocate_bits(energies, sizes, tightest * 2.0**step)) for step in range(0, 32)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == cost(sizes, [2] * 8)


def test_without_a_limit_every_layer_gets_the_least():
    assert allocate_bits([1.0, 1e9], [10, 10], math.inf) == (2, 2)


def test_a_layer_that_causes_no_noise_gets_the_least_and_one_without_size_the_most():
    assert allocate_bits([0.0, 1.0, 1.0], [10, 0, 10], 4.0**-5 + 4.0**-16) == (2, 16, 5)
    assert allocate_bits([0.0, 0.0], [10, 10], 0.0) == (2, 2)


def test_no_layers_need_no_bits():
    assert allocate_bits([], [], 0.0) == exact_bits([], [], 1.0) == ()


@pytest.mark.parametrize("allocate", [allocate_bits, exact_bits, relaxed_bits])
@pytest.mark.parametrize(
    ("energies", "sizes", "budget", "limits", "message"),
    [
        ([4.0**8], [1], 0.125, (2, 8), "even 8 bits in each layer cause noise of 1.0, above the budget of 0.125; allow that"),
        ([1.0], [1], 0.0, (2, 16), "even 16 bits in each layer cause noise"),
        ([1.0], [1], math.nan, (2, 16), "budget = nan is no noise energy"),
        ([1.0], [1], -1.0, (2, 16), "budget = -1.0 is no noise energy"),
        ([1.0, math.nan], [1, 1], 1.0, (2, 16), r"energies\[1\] = nan cannot be"),
        ([1.0, 1.0], [1, math.inf], 1.0, (2, 16), r"sizes\[1\] = inf cannot be"),
        ([-1.0], [1], 1.0, (2, 16), r"energies\[0\] = -1.0 cannot be"),
        ([1.0], [1, 2], 1.0, (2, 16), "there are 1 energies and 2 sizes; give one of each"),
        ([1.0], [1], 1.0, (0, 16), "bits from 0 to 16 cannot be"),
        ([1.0], [1], 1.0, (9, 8), "bits from 9 to 8 cannot be"),
    ],
)
def test_what_cannot_be_is_a_plan_error_that_says_why(allocate, energies, sizes, budget, limits, message):
    with pytest.raises(PlanError, match=message):
        allocate(energies, sizes, budget, *limits)
