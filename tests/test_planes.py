import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gossipfl.errors import CodecError, ConfigError
from gossipfl.segments.codecs import codec
from gossipfl.segments.codecs.planes import MAX_PLANES, Planes, PlaneSet, piece_digest

quick = settings(deadline=None, max_examples=60)
floats = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def groups(draw):
    """Whole groups of values (f32[n]) and their length."""
    group = draw(st.integers(1, 20))
    return draw(arrays(np.float32, group * draw(st.integers(1, 6)), elements=floats)), group


def direct(x, group, bits):
    """What quantizing straight to `bits` bits gives, in double precision: f64[n]. Its own scale for each group."""
    values = []
    for row in x.astype(np.float64).reshape(-1, group):
        scale = max(abs(row))
        for value in row:
            place = int((value / scale + 1) * 2 ** (bits - 1)) if scale else 0
            number = min(place, 2**bits - 1)
            values.append(scale * (2 * number + 1 - 2**bits) / 2**bits)
    return np.array(values)


def pull(x, start, stop, group):
    return bytes(codec(f"planes:{start}-{stop}:{group}").encode(x))


def normal(n, seed=0):
    return np.random.default_rng(seed).standard_normal(n, dtype=np.float32)


# Scale times an odd number of 17 bits at most is exact in double precision, so rounding it to float32 is all that differs.
@given(case=groups())
@quick
def test_every_prefix_of_the_planes_is_exactly_the_direct_quantizer(case):
    x, group = case
    held = PlaneSet(x.size, group)
    held.add(f"planes:0-{MAX_PLANES}:{group}", pull(x, 0, MAX_PLANES, group))
    for bits in range(1, MAX_PLANES + 1):
        expected = direct(x, group, bits).astype(np.float32)
        np.testing.assert_array_equal(held.decode(bits), expected)
        np.testing.assert_array_equal(
            codec(f"planes:0-{bits}:{group}").decode(pull(x, 0, bits, group), x.size).values, expected
        )


# Half a step is s / 2^b; rounding to float32 errs by 2^-24 of s at most, or by half the smallest number that there is.
@given(case=groups())
@quick
def test_a_value_errs_by_half_a_step_of_its_group_at_most(case):
    x, group = case
    scales = np.abs(x.astype(np.float64)).reshape(-1, group).max(1)
    for bits in (1, 2, 5, 8, 11, 16):
        values = codec(f"planes:0-{bits}:{group}").decode(pull(x, 0, bits, group), x.size).values
        error = np.abs(values - x.astype(np.float64)).reshape(-1, group).max(1)
        assert (error <= scales * (2.0**-bits + 2.0**-24) + 2.0**-150).all()


@given(case=groups(), cuts=st.sets(st.integers(1, MAX_PLANES), min_size=2, max_size=5))
@quick
def test_pieces_end_to_end_are_the_piece_of_all_their_planes(case, cuts):
    x, group = case
    held, start = PlaneSet(x.size, group), 0
    for stop in sorted(cuts):
        held.add(f"planes:{start}-{stop}:{group}", pull(x, start, stop, group))
        np.testing.assert_array_equal(
            held.decode(), codec(f"planes:0-{stop}:{group}").decode(held.piece(0, stop), x.size).values
        )
        assert held.depth == stop
        assert held.piece(start, stop) == pull(x, start, stop, group)
        assert held.piece(0, stop) == pull(x, 0, stop, group)
        start = stop


@given(case=groups(), ends=st.tuples(st.integers(0, 15), st.integers(1, 16)).filter(lambda ends: ends[0] < ends[1]))
@quick
def test_the_size_formula_is_the_size_of_the_payload(case, ends):
    (x, group), (start, stop) = case, ends
    scales = 4 * (x.size // group) if start == 0 else 0
    expected = scales + (stop - start) * ((x.size + 7) // 8)
    assert codec(f"planes:{start}-{stop}:{group}").num_bytes(x.size) == len(pull(x, start, stop, group)) == expected


def test_the_bytes_are_those_of_the_description():
    x = np.array([1.0, -1.0, 0.0, 0.5, -0.5, 0.25, 0.0, 0.0, 4.0, -2.0], np.float32)
    # Quarters of [-1, 1] and of [-4, 4], counted from 0: 3 0 2 3 1 and 2 2 2 3 1.
    planes = [0b10110111, 0b10_000000, 0b10011000, 0b11_000000]
    assert pull(x, 0, 2, 5) == np.array([1.0, 4.0], "<f4").tobytes() + bytes(planes)


@pytest.mark.parametrize("bits", [1, 2, 3, 8, 16])
def test_a_group_of_zeros_stays_zero_beside_one_that_is_not(bits):
    x = np.concatenate([np.zeros(6, np.float32), -np.zeros(6, np.float32), normal(6)])
    values = codec(f"planes:0-{bits}:6").decode(pull(x, 0, bits, 6), 18).values
    assert not values[:12].any()
    assert values[12:].all()


def test_runs_longer_than_the_working_memory_are_the_same_values():
    for n, group in ((300_000, 300_000), (300_000, 8), (299_997, 3), (262_152, 131_076)):
        x = normal(n)
        chosen = codec(f"planes:0-11:{group}")
        scales = np.repeat(np.abs(x).reshape(-1, group).max(1), group).astype(np.float64)
        numbers = np.minimum(np.floor((x / scales + 1) * 2**10), 2**11 - 1)
        expected = (scales * (2 * numbers + 1 - 2**11) / 2**11).astype(np.float32)
        np.testing.assert_array_equal(chosen.decode(chosen.encode(x), n).values, expected)


def test_without_a_group_the_whole_range_has_one_scale():
    x = normal(50)
    assert bytes(codec("planes:0-6").encode(x)) == pull(x, 0, 6, 50)
    assert codec("planes").name == "planes:0-8"


def test_an_empty_range_is_no_bytes():
    empty = np.zeros(0, np.float32)
    assert bytes(codec("planes:0-4:5").encode(empty)) == b""
    assert codec("planes:0-4").decode(b"", 0).values.size == 0


@pytest.mark.parametrize("use", [lambda c: c.num_bytes(10), lambda c: c.encode(normal(10)), lambda c: c.decode(bytes(99), 10)])
def test_values_that_are_no_whole_groups_are_refused(use):
    with pytest.raises(ConfigError, match=r"10 values are no whole groups of 4; use a divisor of 10"):
        use(codec("planes:0-4:4"))


@pytest.mark.parametrize(
    "argument",
    [
        "0-0",
        "4-4",
        "6-4",
        "0-17",
        "-1-4",
        "0-",
        "4",
        "0-4:0",
        "0-4:",
        "0-4:x",
        "00-4",
        "0-04",
        "0-4:1e3",
        "0-٤",
        "0-4:9999999999",
    ],
)
def test_a_name_of_no_planes_is_a_config_error_that_repeats_it(argument):
    with pytest.raises(ConfigError, match=f"codec 'planes:{argument}' names no bit planes; write 'planes:A-B'"):
        codec(f"planes:{argument}")


def test_the_name_tells_planes_and_groups():
    piece = Planes.of("planes:4-6:576")
    assert (piece.start, piece.stop, piece.group, piece.name) == (4, 6, 576, "planes:4-6:576")
    with pytest.raises(ConfigError, match="codec 'int8:64' names no bit planes"):
        Planes.of("int8:64")


@pytest.mark.parametrize("scale", [-1.0, np.nan, np.inf, -np.inf])
def test_a_scale_from_the_wire_that_is_none_is_refused(scale):
    payload = bytearray(pull(normal(12), 0, 4, 6))
    payload[4:8] = np.float32(scale).tobytes()
    held = PlaneSet(12, 6)
    for take in (lambda: codec("planes:0-4:6").decode(payload, 12), lambda: held.add("planes:0-4:6", payload)):
        with pytest.raises(CodecError, match="planes:0-4:6: a scale is negative or not finite"):
            take()
    assert held.depth == 0


@pytest.mark.parametrize("name", ["planes:0-4:6", "planes:4-6:6"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_payload_of_another_length_is_refused(name, change):
    held = PlaneSet(12, 6)
    if name.startswith("planes:4"):
        held.add("planes:0-4:6", pull(normal(12), 0, 4, 6))
    with pytest.raises(CodecError, match=rf"{name}: {codec(name).num_bytes(12) + change} bytes where 12 values take"):
        held.add(name, bytes(codec(name).num_bytes(12) + change))


@pytest.mark.parametrize("plane", range(4))
def test_bits_that_belong_to_no_value_must_be_zero(plane):
    payload = bytearray(pull(normal(12), 0, 4, 6))
    payload[8 + 2 * plane + 1] |= 1
    with pytest.raises(CodecError, match="bits that belong to none of the 12 values are not zero"):
        codec("planes:0-4:6").decode(payload, 12)


@given(n=st.integers(1, 40), data=st.data())
@quick
def test_any_bytes_decode_to_finite_values_or_are_refused(n, data):
    chosen = codec("planes:0-3")
    payload = data.draw(st.binary(min_size=chosen.num_bytes(n), max_size=chosen.num_bytes(n)))
    try:
        values = chosen.decode(payload, n).values
    except CodecError:
        return
    assert np.isfinite(values).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_get_through_unseen(bad):
    x = normal(12)
    x[7] = bad
    with pytest.raises(CodecError, match="a scale is negative or not finite"):
        codec("planes:0-8:6").decode(codec("planes:0-8:6").encode(x), 12)


def test_later_planes_decode_only_after_the_first_ones():
    x = normal(12)
    with pytest.raises(CodecError, match=r"planes:4-6:6 decodes only after planes 0-4; collect both in a PlaneSet"):
        codec("planes:4-6:6").decode(pull(x, 4, 6, 6), 12)
    held = PlaneSet(12, 6)
    with pytest.raises(CodecError, match="planes:4-6:6 does not continue the 0 planes that are here"):
        held.add("planes:4-6:6", pull(x, 4, 6, 6))
    held.add("planes:0-4:6", pull(x, 0, 4, 6))
    with pytest.raises(ConfigError, match=r"planes:4-6:12 has groups of 12 values, the planes here of 6"):
        held.add("planes:4-6:12", pull(x, 4, 6, 12))
    assert held.depth == 4


def test_a_piece_is_named_by_its_content():
    x = normal(12)
    digests = {
        piece_digest("planes:0-4:6", 12, pull(x, 0, 4, 6)),
        piece_digest("planes:0-4:12", 12, pull(x, 0, 4, 12)),
        piece_digest("planes:4-8:6", 12, pull(x, 4, 8, 6)),
        piece_digest("planes:0-4:6", 12, pull(-x, 0, 4, 6)),
        piece_digest("planes:4-8:6", 12, bytes(8)),
        piece_digest("planes:4-8:6", 16, bytes(8)),
    }
    assert len(digests) == 6
    assert {len(digest) for digest in digests} == {16}
    assert piece_digest("planes:0-4:6", 12, pull(x.copy(), 0, 4, 6)) in digests


def test_the_codec_is_known_to_whoever_knows_the_others():
    assert isinstance(codec("planes:0-4:576"), Planes)


@pytest.mark.parametrize("n", [1, 7, 8, 64, 255, 256])
def test_few_values_come_to_the_same_as_many(n, monkeypatch):
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    codecs = [Planes(start, stop) for start, stop in ((0, 1), (0, 5), (0, 8), (0, 12), (0, 16), (3, 7), (5, 11), (9, 16))]
    encoded = [bytes(planes.encode(x)) for planes in codecs]
    decoded = [planes.decode(payload, n).values for planes, payload in zip(codecs, encoded, strict=True) if not planes.start]
    monkeypatch.setattr("gossipfl.segments.codecs.planes._FEW", 0)
    assert encoded == [bytes(planes.encode(x)) for planes in codecs]
    again = [planes.decode(payload, n).values for planes, payload in zip(codecs, encoded, strict=True) if not planes.start]
    assert all((one == other).all() for one, other in zip(decoded, again, strict=True))
