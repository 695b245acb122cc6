import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gossipfl.errors import CodecError, ConfigError
from gossipfl.segments.codecs import CODECS, SparseCodec, all_finite, codec
from gossipfl.segments.quantization import pack_nibbles, unpack_nibbles

DENSE = ["float32", "float16", "bfloat16", "int8:16", "int8", "int4:16", "int4"]
SPARSE = ["topk:0.07", "topk", "randomk:0.5", "topk:1"]
SIZES = [1, 2, 3, 15, 16, 17, 127, 128, 129, 1000, 65_536, 65_537]

floats = st.floats(-(2.0**100), 2.0**100, width=32)
vectors = st.integers(1, 70).flatmap(lambda n: arrays(np.float32, n, elements=floats))
quick = settings(deadline=None, max_examples=60)


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(n, seed=0):
    return rng(seed).standard_normal(n, dtype=np.float32)


def encoded(name, x):
    chosen = codec(name)
    return chosen.encode(x, chosen.select(x, rng()) if isinstance(chosen, SparseCodec) else None)


@pytest.mark.parametrize("name", DENSE + SPARSE)
@pytest.mark.parametrize("n", SIZES)
def test_the_size_formula_is_the_size_of_the_payload(name, n):
    payload = encoded(name, normal(n))
    assert len(payload) == payload.nbytes == codec(name).num_bytes(n)


def test_the_sizes_are_those_of_the_table():
    assert {name: codec(name).num_bytes(1000) for name in ("float32", "float16", "bfloat16")} == {
        "float32": 4000,
        "float16": 2000,
        "bfloat16": 2000,
    }
    assert codec("int8:100").num_bytes(1001) == 4 * 11 + 1001
    assert codec("int4:100").num_bytes(1001) == 4 * 11 + 501
    assert codec("topk:0.1").num_bytes(65_536) == 6554 * (2 + 4)
    assert codec("topk:0.1").num_bytes(65_537) == 6554 * (4 + 4)


@given(x=vectors)
@quick
def test_float32_loses_nothing(x):
    assert codec("float32").decode(codec("float32").encode(x), x.size).values.tobytes() == x.tobytes()


def test_float32_copies_nothing():
    x = normal(100)
    payload = codec("float32").encode(x)
    decoded = codec("float32").decode(payload, 100)
    x[7] = 5.0
    assert payload.format == "B"
    assert decoded.values[7] == 5.0
    assert decoded.present is None


# Rounding to p significant bits errs by 2**-p of the value at most, and by half the smallest subnormal below the normal
# numbers: float16 has p = 11 and smallest 2**-24, bfloat16 p = 8 and 2**-133.
@given(x=vectors)
@quick
def test_the_16_bit_floats_keep_their_precision_within_their_range(x):
    for name, precision, smallest, largest in (
        ("float16", 2.0**-11, 2.0**-24, 65_504.0),
        ("bfloat16", 2.0**-8, 2.0**-133, 3.3895313892515355e38),
    ):
        decoded = codec(name).decode(codec(name).encode(x), x.size).values.astype(np.float64)
        clamped = np.clip(x.astype(np.float64), -largest, largest)
        assert (np.abs(decoded - clamped) <= np.abs(clamped) * precision + smallest / 2).all()


@pytest.mark.parametrize(("name", "largest"), [("float16", 65_504.0), ("bfloat16", 3.3895313892515355e38)])
def test_only_values_beyond_the_range_are_clamped_so_that_divergence_stays_visible(name, largest):
    x = np.array([1.0, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan], np.float32)
    values = codec(name).decode(codec(name).encode(x), x.size).values
    np.testing.assert_array_equal(values, np.array([1.0, largest, -largest, np.inf, -np.inf, np.nan], np.float32))


# With a the largest magnitude of a block and L the largest level, x L / a is rounded to a level: half a level is a / 2L.
# Each of the four float32 steps (L / a, its product with x, a / L, its product with the level) errs by 2**-24 of at most
# a, together 2**-22 a; 2**-21 a leaves room for the second order. Blocks below 1e-30 become zeros.
@given(x=vectors, block=st.sampled_from([1, 2, 5, 16, 64]))
@quick
def test_quantization_errs_by_half_a_level_of_the_block_at_most(x, block):
    for kind, max_level in (("int8", 127), ("int4", 7)):
        chosen = codec(f"{kind}:{block}")
        error = np.abs(x.astype(np.float64) - chosen.decode(chosen.encode(x), x.size).values)
        for start in range(0, x.size, block):
            absmax = float(np.abs(x[start : start + block]).max())
            bound = absmax / (2 * max_level) + absmax * 2.0**-21 + 1e-30
            assert (error[start : start + block] <= bound).all()


@pytest.mark.parametrize("name", ["int8:4", "int4:4"])
def test_a_block_keeps_its_extremes_and_its_zeros(name):
    x = np.array([-8.0, 0.0, 8.0, -0.0, 0.0, 0.0, 0.0, 0.0, 5.0], np.float32)
    np.testing.assert_allclose(codec(name).decode(codec(name).encode(x), 9).values, x, rtol=2**-22)


@pytest.mark.parametrize("name", ["int8:4", "int4:4"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, -9e-31])
def test_a_block_too_small_to_be_scaled_is_all_zero_bytes(name, value):
    payload = codec(name).encode(np.full(4, value, np.float32))
    assert bytes(payload) == bytes(len(payload))


@pytest.mark.parametrize("name", ["int8:16", "int4:16"])
def test_an_outlier_costs_precision_in_its_own_block_only(name):
    x = normal(48)
    with_outlier = x.copy()
    with_outlier[20] = 1e6
    before, after = (codec(name).decode(codec(name).encode(values), 48).values for values in (x, with_outlier))
    np.testing.assert_array_equal(before[:16], after[:16])
    np.testing.assert_array_equal(before[32:], after[32:])


@pytest.mark.parametrize("name", ["int8:100", "int4:100"])
def test_a_long_vector_is_quantized_as_its_parts_are(name):
    """The work is cut into runs of blocks; the cuts must not show."""
    x, n = normal(300_050), 300_050
    whole = codec(name).decode(codec(name).encode(x), n).values
    parts = [codec(name).decode(codec(name).encode(part), part.size).values for part in np.split(x, [100_000, 150_000])]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@given(levels=arrays(np.int8, st.integers(0, 20), elements=st.integers(-8, 7)))
@quick
def test_levels_survive_packing(levels):
    packed = pack_nibbles(levels)
    assert packed.size == (levels.size + 1) // 2
    np.testing.assert_array_equal(unpack_nibbles(packed, levels.size), levels)


def test_the_first_level_of_a_pair_is_in_the_low_half_of_the_byte():
    assert pack_nibbles(np.array([1, 2, -1], np.int8)).tolist() == [0x21, 0x0F]


@given(x=vectors, name=st.sampled_from(SPARSE))
@quick
def test_a_sparse_copy_holds_the_selected_values_and_no_others(x, name):
    chosen = codec(name)
    selected = chosen.select(x, rng())
    decoded = chosen.decode(chosen.encode(x, selected), x.size)
    assert np.flatnonzero(decoded.present).tolist() == selected.tolist()
    assert decoded.values[selected].tobytes() == x[selected].tobytes()
    assert not decoded.values[~decoded.present].any()


@given(x=vectors, name=st.sampled_from(SPARSE), seed=st.integers(0, 9))
@quick
def test_a_selection_has_its_size_and_is_sorted_and_depends_on_the_seed_alone(x, name, seed):
    chosen = codec(name)
    selected = chosen.select(x, rng(seed))
    assert selected.size == chosen.num_selected(x.size)
    assert selected.dtype == np.int64
    assert selected[0] >= 0 and selected[-1] < x.size and (np.diff(selected) > 0).all()
    np.testing.assert_array_equal(selected, chosen.select(x.copy(), rng(seed)))


def test_the_number_selected_rounds_up_from_the_decimal_that_was_written():
    assert [codec("topk:0.07").num_selected(n) for n in (1, 14, 15, 100, 101)] == [1, 1, 2, 7, 8]


def test_topk_takes_the_largest_magnitudes_and_of_equal_ones_the_first():
    importance = np.array([0.0, -5.0, 2.0, 2.0, -2.0, 3.0], np.float32)
    assert codec("topk:0.5").select(importance, rng()).tolist() == [1, 2, 5]
    assert codec("topk:0.5").select(np.zeros(6, np.float32), rng()).tolist() == [0, 1, 2]


def test_topk_meets_its_number_even_where_importance_is_not_a_number():
    assert codec("topk:0.5").select(np.full(6, np.nan, np.float32), rng()).tolist() == [0, 1, 2]


def test_randomk_gives_every_value_its_turn_whatever_its_importance():
    generator, chosen = rng(), codec("randomk:0.1")
    importance = np.zeros(50, np.float32)
    importance[0] = 1e9
    counts = np.zeros(50)
    for _ in range(1000):
        counts[chosen.select(importance, generator)] += 1
    # Each count is binomial(1000, 0.1): mean 100, deviation 9.5; six deviations either way.
    assert counts.min() > 43 and counts.max() < 157


@pytest.mark.parametrize("name", DENSE + SPARSE)
def test_every_kind_of_buffer_is_read_and_none_is_warned_about(name):
    x = normal(321)
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        payload = encoded(name, x)
        first = codec(name).decode(payload, 321).values
        read_only, unaligned = bytes(payload), memoryview(b"?" + bytes(payload))[1:]
        for buffer in (read_only, bytearray(payload), np.frombuffer(payload, np.uint8), unaligned):
            np.testing.assert_array_equal(codec(name).decode(buffer, 321).values, first)
            assert first.dtype == np.float32 and first.shape == (321,)


@given(name=st.sampled_from(DENSE + SPARSE), n=st.integers(1, 40), data=st.data())
@quick
def test_garbage_of_another_length_is_refused(name, n, data):
    garbage = data.draw(st.binary(max_size=200).filter(lambda buffer: len(buffer) != codec(name).num_bytes(n)))
    with pytest.raises(CodecError, match="bytes where"):
        codec(name).decode(garbage, n)


@given(name=st.sampled_from(DENSE + SPARSE), n=st.integers(1, 40), data=st.data())
@quick
def test_garbage_of_the_right_length_is_refused_or_gives_values_of_the_right_shape(name, n, data):
    size = codec(name).num_bytes(n)
    garbage = data.draw(st.binary(min_size=size, max_size=size))
    try:
        decoded = codec(name).decode(garbage, n)
    except CodecError:
        assert name not in ("float32", "float16", "bfloat16")  # any bits are numbers there
        return
    assert decoded.values.shape == (n,) and decoded.values.dtype == np.float32
    if codec(name).sparse:
        assert np.count_nonzero(decoded.present) == codec(name).num_selected(n)
    else:
        assert decoded.present is None


@pytest.mark.parametrize("name", DENSE + SPARSE)
def test_a_truncated_payload_is_refused(name):
    payload = encoded(name, normal(100))
    for cut in (0, 1, len(payload) - 1):
        with pytest.raises(CodecError, match=f"{cut} bytes where 100 values"):
            codec(name).decode(payload[:cut], 100)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize("name", ["int8:16", "int4:16"])
def test_a_scale_that_is_negative_or_not_finite_is_refused(name, scale):
    payload = np.array(encoded(name, normal(40)))
    payload[4:8].view(np.float32)[0] = scale  # the second of three
    with pytest.raises(CodecError, match="scale"):
        codec(name).decode(payload, 40)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8:16", "int4:16"])
def test_a_model_that_diverged_is_noticed_by_the_receiver(name, value):
    x = normal(40)
    x[20] = value
    try:
        assert not all_finite(codec(name).decode(codec(name).encode(x), 40).values)
    except CodecError:
        assert name.startswith("int")


@pytest.mark.parametrize("indices", [[1, 0], [3, 3], [0, 10], [0, 65_535]])
def test_indices_that_are_not_rising_or_not_in_range_are_refused(indices):
    payload = np.array(indices, "<u2").tobytes() + np.ones(2, "<f4").tobytes()
    with pytest.raises(CodecError, match="indices"):
        codec("topk:0.2").decode(payload, 10)


def test_a_sparse_codec_of_a_long_range_spells_its_indices_in_four_bytes():
    x = np.zeros(70_000, np.float32)
    x[69_999] = 1.5
    payload = encoded("topk:1e-9", x)
    assert bytes(payload) == np.array([69_999], "<u4").tobytes() + np.array([1.5], "<f4").tobytes()


def test_a_codec_carries_the_name_it_was_asked_for_by():
    for name in DENSE + SPARSE:
        assert codec(name).name == name
        assert codec(name).sparse == (name in SPARSE)
        assert codec(name) is codec(name)


def test_every_codec_of_the_table_works_without_an_argument():
    for name in CODECS:
        assert codec(name).decode(encoded(name, normal(300)), 300).values.shape == (300,)


def test_a_mistyped_codec_is_answered_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown codec 'flaot16'; did you mean 'float16'\?"):
        codec("flaot16")


def test_a_codec_name_never_makes_anything_be_imported():
    with pytest.raises(ConfigError, match="unknown codec 'os:getcwd'"):
        codec("os:getcwd")


BAD_ARGUMENTS = {
    "float32": ["2"],
    "float16": ["x"],
    "bfloat16": ["1"],
    "int8": ["", "0", "-4", "x", "65537", "1_0", "999999999999"],
    "int4": ["\u0663"],  # a digit to Python's int()
    "topk": ["", "0", "1.1", "-1", "nan", "x"],
    "randomk": ["inf"],
}


@pytest.mark.parametrize("name", [f"{kind}:{argument}" for kind in BAD_ARGUMENTS for argument in BAD_ARGUMENTS[kind]])
def test_a_bad_argument_is_a_config_error_that_names_the_codec(name):
    with pytest.raises(ConfigError, match=name):
        codec(name)


@given(x=vectors, bad=st.sampled_from([np.nan, np.inf, -np.inf]), data=st.data())
@quick
def test_one_value_that_is_not_finite_is_found_anywhere(x, bad, data):
    assert all_finite(x)
    x[data.draw(st.integers(0, x.size - 1))] = bad
    assert not all_finite(x)


def test_large_finite_values_whose_sum_overflows_are_finite():
    assert all_finite(np.full(1000, 3e38, np.float32))
    assert not all_finite(np.array([np.inf, -np.inf, 1.0], np.float32))
