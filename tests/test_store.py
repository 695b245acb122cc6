"""What a peer serves, what it puts together from others' chunks, and how the copies of a segment become one."""

from __future__ import annotations

import tracemalloc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gossipfl import aggregation
from gossipfl.aggregation import AGGREGATORS, mean, median
from gossipfl.errors import CodecError, LayoutError
from gossipfl.mixing import SegmentMix, mix, mix_segments
from gossipfl.segments.assembly import Assembler
from gossipfl.segments.buffers import Pieces, VectorPool
from gossipfl.segments.codecs import Decoded, SparseCodec, codec
from gossipfl.segments.layout import Layout
from gossipfl.segments.quantization import tensor
from gossipfl.segments.store import SegmentStore

SEGMENTS = ((0, 4), (4, 8))
quick = settings(deadline=None, max_examples=60)


def f32(*values):
    return np.array(values, np.float32)


def normal(n, seed=0):
    return np.random.default_rng(seed).standard_normal(n, dtype=np.float32)


class Spy:
    """A codec that notes what is asked of it; what it makes can be watched for being freed."""

    def __init__(self, name):
        self._codec = codec(name)
        self.name, self.sparse = name, self._codec.sparse
        self.num_encoded = 0
        self.made = []

    def _watched(self, thing):
        self.made.append(weakref.ref(thing))
        return thing

    def num_bytes(self, n):
        return self._codec.num_bytes(n)

    def select(self, importance, rng):
        return self._watched(self._codec.select(importance, rng))

    def encode(self, x, selected=None):
        self.num_encoded += 1
        return self._watched(self._codec.encode(x, selected))


class SparseSpy(Spy, SparseCodec):
    """The same of a sparse codec."""


def watched(name):
    return SparseSpy(name) if codec(name).sparse else Spy(name)


def store_of(name="float32", *, initial=None, segments=SEGMENTS, seed=0, peer="p0"):
    initial = np.zeros(segments[-1][1], np.float32) if initial is None else initial
    chosen = codec(name) if isinstance(name, str) else name
    return SegmentStore(initial, segments, chosen, seed, peer)


def sent(store, version, range_=(0, 4), name="topk:0.25"):
    """The coordinates and values of a served sparse segment, as {coordinate: value}."""
    decoded = codec(name).decode(store.encode(version, range_), range_[1] - range_[0])
    return {int(index): float(decoded.values[index]) for index in np.flatnonzero(decoded.present)}


# --- the store --------------------------------------------------------------------------------------------------------


def test_a_store_keeps_all_versions_but_those_it_is_told_to_forget():
    store = store_of()
    for version in range(1, 6):
        store.publish(version, np.full(8, version, np.float32))
        assert [store.read(kept, (2, 6)).tolist() for kept in range(1, version + 1)] == [[k] * 4 for k in range(1, version + 1)]
    store.retain((2, 4, 5, 9))
    assert [store.read(kept, (2, 6))[0] for kept in (2, 4, 5)] == [2, 4, 5]
    for forgotten in (1, 3, 9):
        with pytest.raises(KeyError):
            store.read(forgotten, (0, 4))
    store.retain(())
    with pytest.raises(KeyError):
        store.read(5, (0, 4))


def test_what_is_published_is_never_written_to_again():
    store, vector = store_of(), normal(8)
    store.publish(1, vector)
    for array in (vector, store.read(1, (0, 4))):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0


def test_reading_copies_nothing():
    store, vector = store_of(), normal(8)
    store.publish(1, vector)
    assert np.shares_memory(store.read(1, (2, 6)), vector)
    assert store.read(1, (2, 6)).tobytes() == vector[2:6].tobytes()


@pytest.mark.parametrize(
    "vector", [np.zeros(7, np.float32), np.zeros(9, np.float32), np.zeros((8, 1), np.float32), np.zeros(8)]
)
def test_a_vector_that_does_not_fit_is_not_published(vector):
    store = store_of()
    with pytest.raises(LayoutError, match=r"version 1 is float.*the layout has float32 \(8,\)"):
        store.publish(1, vector)
    with pytest.raises(KeyError):
        store.read(1, (0, 4))


def test_float32_is_served_as_a_view_and_nothing_is_kept_of_it():
    spy = watched("float32")
    store, vector = store_of(spy), normal(8)
    store.publish(1, vector)
    for range_ in ((0, 4), (3, 8)):  # any range will do
        payload = store.encode(1, range_)
        assert np.shares_memory(np.frombuffer(payload, np.uint8), vector)
        assert bytes(payload) == vector[slice(*range_)].tobytes()
    del payload
    assert [made() for made in spy.made] == [None, None]


@pytest.mark.parametrize("name", ["float16", "int8:16", "topk:0.25", "randomk:0.5"])
def test_a_lossy_range_is_encoded_once_and_served_to_many(name):
    spy = watched(name)
    store = store_of(spy)
    for version in (1, 2):
        store.publish(version, normal(8, seed=version))
    first = store.encode(1, (0, 4))
    assert store.encode(1, (0, 4)) is first
    others = [store.encode(1, (4, 8)), store.encode(2, (0, 4))]
    assert len({bytes(payload) for payload in (first, *others)}) == 3
    assert store.encode(1, (0, 4)) is first
    assert spy.num_encoded == 3


@pytest.mark.parametrize(("name", "made_per_version"), [("float16", 2), ("topk:0.25", 4)])
def test_a_forgotten_version_leaves_nothing_behind(name, made_per_version):
    spy = watched(name)
    store = store_of(spy)
    vectors = []
    for version in (1, 2, 3):
        vector = normal(8, seed=version)
        vectors.append(weakref.ref(vector))
        store.publish(version, vector)
        for range_ in SEGMENTS:
            store.encode(version, range_)
    del vector
    assert all(made() is not None for made in (*spy.made, *vectors))
    store.retain((2, 3))
    assert [made() is None for made in spy.made] == [True] * made_per_version + [False] * 2 * made_per_version
    assert [kept() is None for kept in vectors] == [True, False, False]
    with pytest.raises(KeyError):
        store.encode(1, (0, 4))


def test_a_sparse_store_sends_the_coordinates_that_changed_most_since_they_were_last_sent():
    store = store_of("topk:0.25", segments=((0, 4),))
    store.publish(1, f32(1, -2, 3, 4))  # changed by 1 2 3 4
    store.publish(2, f32(1, -2, 3, 4.5))  # 1 2 3 0.5
    store.publish(3, f32(1, -2, 3, 4.5))  # 1 2 0 0.5
    store.publish(4, f32(-0.25, -2, 3, 4.5))  # 0.25 0 0 0.5: a change that is taken back is none
    store.publish(5, f32(-0.25, -2, 3, 4.5))  # 0.25 0 0 0
    assert [sent(store, version) for version in range(1, 6)] == [{3: 4}, {2: 3}, {1: -2}, {3: 4.5}, {0: -0.25}]


def test_the_first_change_is_counted_from_the_common_initial_model():
    initial = f32(10, 20, 30, 40)
    store = store_of("topk:0.25", initial=initial, segments=((0, 4),))
    store.publish(1, f32(10, 22, 31, 40))
    store.publish(2, f32(10, 22, 31, 40))
    assert (sent(store, 1), sent(store, 2)) == ({1: 22}, {2: 31})
    assert initial.tolist() == [10, 20, 30, 40]


def test_each_segment_sends_its_own_coordinates():
    store = store_of("topk:0.25")
    store.publish(1, f32(0, 1, 0, 0, 9, 9, 10, 9))
    assert (sent(store, 1, (0, 4)), sent(store, 1, (4, 8))) == ({1: 1}, {2: 10})


def test_serving_does_not_advance_what_is_sent_next():
    served, quiet = (store_of("topk:0.25") for _ in range(2))
    for version in range(1, 6):
        for store in (served, quiet):
            store.publish(version, normal(8, seed=version))
        for _ in range(version):
            served.encode(version, (0, 4))
    for version in range(1, 6):
        for range_ in SEGMENTS:
            assert bytes(served.encode(version, range_)) == bytes(quiet.encode(version, range_))


@pytest.mark.parametrize("range_", [(0, 3), (1, 4), (0, 8), (3, 5)])
def test_a_sparse_range_that_is_no_segment_cannot_be_served(range_):
    store = store_of("topk:0.25")
    store.publish(1, normal(8))
    with pytest.raises(CodecError, match=r"is no segment; topk:0\.25 serves whole segments"):
        store.encode(1, range_)


@pytest.mark.parametrize("range_", [(0, 3), (1, 4), (0, 8), (3, 5)])
def test_a_dense_range_need_not_be_a_segment(range_):
    store, vector = store_of("float16"), normal(8)
    store.publish(1, vector)
    assert bytes(store.encode(1, range_)) == vector[slice(*range_)].astype(np.float16).tobytes()


def coordinates(version=1, versions=(1,), **settings):
    store = store_of("randomk:0.1", segments=((0, 500), (500, 1000)), **settings)
    for published in versions:
        store.publish(published, normal(1000))
    return [tuple(sent(store, version, range_, "randomk:0.1")) for range_ in ((0, 500), (500, 1000))]


def test_random_coordinates_are_decided_by_seed_peer_and_version_alone():
    assert coordinates() == coordinates()
    assert coordinates(version=2, versions=(1, 2)) == coordinates(version=2, versions=(2,))
    first, second = coordinates()
    assert len(first) == len(second) == 50 and first != second
    drawn = [coordinates(), coordinates(seed=1), coordinates(peer="p1"), coordinates(version=2, versions=(2,))]
    assert len({tuple(each) for each in drawn}) == 4


# --- memory for whole vectors -----------------------------------------------------------------------------------------


def test_vectors_that_are_held_have_memory_of_their_own():
    pool = VectorPool(1000)
    held = [pool.take() for _ in range(3)]
    for index, vector in enumerate(held):
        assert vector.shape == (1000,) and vector.dtype == np.float32 and vector.flags.writeable
        vector[:] = index
    assert [set(vector.tolist()) for vector in held] == [{0.0}, {1.0}, {2.0}]


def test_the_memory_of_a_vector_is_used_again_once_nobody_holds_it():
    pool = VectorPool(1000)
    first, second = pool.take(), pool.take()
    first[:], second[:] = 1, 2
    del first
    third, fourth = pool.take(), pool.take()
    assert set(third.tolist()) == {1.0}  # what the first left there; new memory is all zeros
    assert set(fourth.tolist()) == {0.0}
    third[:] = 3
    assert set(second.tolist()) == {2.0} and set(fourth.tolist()) == {0.0}


@pytest.mark.parametrize(
    "hold",
    [
        lambda vector: vector[10:20],
        lambda vector: vector.reshape(10, 100)[3].view(np.uint8),
        lambda vector: codec("float32").encode(vector[10:20]),
        lambda vector: memoryview(codec("float32").encode(vector))[8:],
        lambda vector: codec("float32").decode(codec("float32").encode(vector), 1000).values,
        lambda vector: tensor(vector),
        lambda vector: torch.from_numpy(vector)[5:],
        lambda vector: Layout.of([("a", (10, 100))]).tensors(vector),
    ],
)
def test_a_vector_is_held_by_whatever_looks_into_it(hold):
    pool = VectorPool(1000)
    vector = pool.take()
    vector[:] = 1
    looking = hold(vector)
    del vector
    assert pool.take()[0] == 0
    del looking
    assert 1 in (pool.take()[0], pool.take()[0])


def test_a_pool_may_go_before_its_vectors():
    pool = VectorPool(1000)
    vector = pool.take()
    vector[:] = 1
    del pool
    assert vector.sum() == 1000
    del vector
    assert VectorPool(0).take().size == 0


# --- vectors in pieces ------------------------------------------------------------------------------------------------


def in_pieces(values, *cuts):
    return Pieces([values[start:stop] for start, stop in pairwise((0, *cuts, values.size))])


@given(size=st.integers(1, 30), cuts=st.sets(st.integers(1, 29)), ends=st.tuples(st.integers(0, 30), st.integers(0, 30)))
@quick
def test_pieces_are_read_like_the_array_that_they_make_up(size, cuts, ends):
    whole = normal(size)
    pieces = in_pieces(whole, *sorted(cut for cut in cuts if cut < size))
    start, stop = sorted(min(end, size) for end in ends)
    assert (pieces.size, pieces.nbytes) == (whole.size, whole.nbytes)
    assert pieces[start:stop].dtype == np.float32 and pieces[start:stop].tobytes() == whole[start:stop].tobytes()
    assert np.asarray(pieces).dtype == np.float32 and np.asarray(pieces).tobytes() == whole.tobytes()


def test_a_run_within_one_piece_is_not_copied():
    whole = normal(30)
    pieces = in_pieces(whole, 10, 20)
    for start, stop in ((0, 10), (10, 20), (20, 30), (13, 17)):
        assert np.shares_memory(pieces[start:stop], whole)


# --- chunks become segments -------------------------------------------------------------------------------------------

X = normal(10)
PAYLOAD = X.tobytes()
RANGE = (20, 30)


def assembler(name="float32", request=1, ranges=(RANGE,)):
    taker = Assembler(codec(name))
    taker.expect(request, ranges)
    return taker


def add(taker, start, stop, payload=PAYLOAD, range_=RANGE, request=1, total=None):
    return taker.add(request, range_, start, len(payload) if total is None else total, memoryview(payload)[start:stop])


def bytes_of(decoded):
    return np.asarray(decoded.values).tobytes()


def payload_of(name):
    chosen = codec(name)
    return bytes(chosen.encode(X, np.arange(5) * 2 if chosen.sparse else None))


BY_VALUE = ["float32", "float16", "bfloat16"]  # any run of whole values decodes on its own
AS_A_WHOLE = ["int8:4", "int4:4", "topk:0.5", "randomk:0.5"]


@st.composite
def cut_payloads(draw):
    """A codec, a payload of it, and where the chunks of this begin and end."""
    name = draw(st.sampled_from(BY_VALUE + AS_A_WHOLE))
    payload, step = payload_of(name), codec(name).item_bytes or 1
    cuts = draw(st.sets(st.integers(1, len(payload) // step - 1)))
    return name, payload, [0, *(step * cut for cut in sorted(cuts)), len(payload)]


@given(cut_payload=cut_payloads())
@quick
def test_chunks_in_order_complete_a_range_wherever_it_was_cut(cut_payload):
    name, payload, ends = cut_payload
    chosen, taker = codec(name), assembler(name)
    results = [add(taker, start, stop, payload) for start, stop in pairwise(ends)]
    assert results[:-1] == [None] * (len(ends) - 2)
    expected = chosen.decode(payload, 10)
    assert bytes_of(results[-1]) == expected.values.tobytes()
    if chosen.sparse:
        assert results[-1].present.tolist() == expected.present.tolist() == [True, False] * 5
    else:
        assert results[-1].present is None


def test_a_range_that_comes_in_one_piece_is_not_copied():
    payload = np.frombuffer(bytearray(PAYLOAD), np.uint8)
    decoded = assembler().add(1, RANGE, 0, 40, memoryview(payload))
    assert np.shares_memory(decoded.values, payload)


def test_a_chunk_of_float32_is_not_copied():
    taker, payload = assembler(), np.frombuffer(bytearray(PAYLOAD), np.uint8)
    ends = (0, 20, 32, 40)
    decoded = [taker.add(1, RANGE, start, 40, memoryview(payload)[start:stop]) for start, stop in pairwise(ends)][-1]
    for start, stop in pairwise(ends):
        assert np.shares_memory(decoded.values[start // 4 : stop // 4], payload[start:stop])
    payload[:] = 0
    assert bytes_of(decoded) == bytes(40)


@pytest.mark.parametrize("name", ["float16", "bfloat16", *AS_A_WHOLE])
def test_the_buffer_of_a_chunk_that_is_not_float32_may_be_used_again(name):
    taker, payload = assembler(name), payload_of(name)
    half = len(payload) // 4 * 2
    buffer = bytearray(payload)
    assert add(taker, 0, half, buffer) is None
    buffer[:] = bytes(len(payload))
    assert bytes_of(add(taker, half, len(payload), payload)) == codec(name).decode(payload, 10).values.tobytes()


@pytest.mark.parametrize("name", BY_VALUE)
@pytest.mark.parametrize("num_before", [0, 1])
def test_a_chunk_that_cuts_a_value_is_an_error(name, num_before):
    payload, item_bytes = payload_of(name), codec(name).item_bytes
    start = num_before * item_bytes
    for num_bytes in (num_values * item_bytes + odd for num_values in (0, 1) for odd in range(1, item_bytes)):
        taker = assembler(name)
        if start:
            assert add(taker, 0, start, payload) is None
        with pytest.raises(CodecError, match=f"^a chunk of {num_bytes} bytes, not whole values of {item_bytes}$"):
            add(taker, start, start + num_bytes, payload)
        assert bytes_of(add(taker, 0, len(payload), payload)) == codec(name).decode(payload, 10).values.tobytes()


def test_a_chunk_out_of_order_is_passed_over():
    taker = assembler()
    assert add(taker, 8, 16) is None  # nothing is there to continue
    assert add(taker, 0, 8) is None
    assert add(taker, 16, 40) is None  # a gap
    assert add(taker, 8, 16) is None
    assert add(taker, 8, 16) is None  # a repeat
    assert add(taker, 12, 40) is None  # an overlap
    assert bytes_of(add(taker, 16, 40)) == PAYLOAD


def test_a_range_that_begins_again_is_put_together_from_its_new_beginning():
    taker, old = assembler(), normal(10, seed=1).tobytes()
    assert add(taker, 0, 24, old) is None
    assert add(taker, 0, 8) is None
    assert add(taker, 24, 40) is None  # would continue the old copy
    assert bytes_of(add(taker, 8, 40)) == PAYLOAD
    taker = assembler()
    assert add(taker, 0, 24, old) is None
    assert bytes_of(add(taker, 0, 40)) == PAYLOAD


def test_ranges_and_requests_are_put_together_apart():
    other = normal(10, seed=1).tobytes()
    taker = assembler(ranges=(RANGE, (30, 40)))
    taker.expect(2, (RANGE,))
    assert add(taker, 0, 20) is None
    assert add(taker, 0, 12, other, (30, 40)) is None
    assert add(taker, 0, 4, other, request=2) is None
    assert bytes_of(add(taker, 20, 40)) == PAYLOAD
    assert bytes_of(add(taker, 4, 40, other, request=2)) == other
    assert bytes_of(add(taker, 12, 40, other, (30, 40))) == other


def test_what_nobody_asked_for_is_ignored():
    taker = assembler()
    assert add(taker, 0, 40, request=2) is None
    assert add(taker, 0, 40, range_=(20, 31)) is None
    assert add(taker, 0, 40, range_=(0, 10)) is None
    assert add(taker, 0, 40, range_=(0, 10), total=7) is None  # not even looked at
    assert bytes_of(add(taker, 0, 40)) == PAYLOAD
    assert add(taker, 0, 40) is None  # complete, so no longer asked for


@pytest.mark.parametrize("total", [0, 39, 41, 80])
def test_another_total_than_the_codec_takes_is_an_error(total):
    taker = assembler()
    with pytest.raises(CodecError, match=f"^{total} bytes for 10 values; float32 takes 40$"):
        add(taker, 0, 20, total=total)
    assert bytes_of(add(taker, 0, 40)) == PAYLOAD


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ends", [(0, 40), (0, 8, 40), (0, 8, 28, 32), (0, 32)])
def test_values_that_are_not_finite_are_an_error_as_soon_as_they_come_and_may_be_asked_for_again(bad, ends):
    poisoned = X.copy()
    poisoned[7] = bad
    taker = assembler()
    for start, stop in pairwise(ends[:-1]):
        assert add(taker, start, stop, poisoned.tobytes()) is None
    with pytest.raises(CodecError, match=r"^the values are not finite$"):
        add(taker, *ends[-2:], poisoned.tobytes())
    assert add(taker, 0, 8) is None
    assert bytes_of(add(taker, 8, 40)) == PAYLOAD


def test_bytes_that_do_not_decode_are_an_error():
    payload = np.array(codec("int8:4").encode(X))
    payload[:4].view(np.float32)[0] = -1.0  # a scale
    with pytest.raises(CodecError, match="scale"):
        add(assembler("int8:4"), 0, len(payload), payload.tobytes())


def test_what_is_forgotten_is_no_longer_asked_for():
    taker = assembler()
    taker.expect(2, (RANGE,))
    assert add(taker, 0, 20) is None
    taker.forget(1)
    taker.forget(99)  # never asked
    assert add(taker, 20, 40) is None
    assert add(taker, 0, 40) is None
    assert bytes_of(add(taker, 0, 40, request=2)) == PAYLOAD


def test_asking_again_keeps_what_is_there_of_the_ranges_still_missing():
    taker = assembler(ranges=(RANGE, (30, 40)))
    assert add(taker, 0, 20) is None
    assert add(taker, 0, 20, range_=(30, 40)) is None
    taker.expect(1, (RANGE,))
    assert add(taker, 20, 40, range_=(30, 40)) is None
    assert bytes_of(add(taker, 20, 40)) == PAYLOAD


@pytest.mark.parametrize(("name", "is_copied"), [("float32", False), ("int8", True), ("topk:0.5", True)])
def test_memory_is_taken_only_for_what_was_asked_for_and_has_come(name, is_copied):
    taker = Assembler(codec(name))
    num_values = 2**20
    chunk, total = memoryview(bytes(2**16)), codec(name).num_bytes(num_values)
    tracemalloc.start()
    try:
        taker.expect(1, ((0, num_values), (0, 2**50)))
        assert taker.add(2, (0, num_values), 0, total, chunk) is None  # no such request
        assert taker.add(1, (1, num_values + 1), 0, total, chunk) is None  # no such range
        assert taker.add(1, (0, num_values), len(chunk), total, chunk) is None  # does not continue anything
        with pytest.raises(CodecError):
            taker.add(1, (0, num_values), 0, total + 4, chunk)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        for num_chunks in range(8):
            assert taker.add(1, (0, num_values), num_chunks * len(chunk), total, chunk) is None
            kept = (num_chunks + 1) * len(chunk) if is_copied else 0
            assert kept <= tracemalloc.get_traced_memory()[0] < 1.2 * kept + 100_000  # a bytearray grows by an eighth more
        taker.forget(1)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


# --- the copies of a segment become one -------------------------------------------------------------------------------

finite = st.floats(-1e6, 1e6, width=32)
anything_finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
RULES = [pytest.param(AGGREGATORS.get(name), id=name) for name in AGGREGATORS]


def dense(*values):
    return Decoded(f32(*values), None)


def sparse(*values):
    """None where the sender sent nothing."""
    present = np.array([value is not None for value in values])
    return Decoded(f32(*(value or 0 for value in values)), present)


def mixed(own, own_weight, *copies, rule=mean):
    out = np.full(own.size, np.nan, np.float32)
    before = [own.tobytes(), *(bytes_of(decoded) for decoded, _ in copies)]
    mix(rule, own, own_weight, list(copies), out)
    assert [own.tobytes(), *(bytes_of(decoded) for decoded, _ in copies)] == before
    return out


@pytest.mark.parametrize("own_weight", [0.0, 3.0])
def test_with_no_copies_the_own_one_stays_as_it_is(own_weight):
    own = f32(1.5, -0.0, 3e38)
    assert mixed(own, own_weight).tobytes() == own.tobytes()


def test_copies_are_mixed_by_their_weights():
    assert mixed(f32(0, 8, 1), 3.0, (dense(4, 0, 1), 1.0)).tolist() == [1, 6, 1]
    assert mixed(f32(0, 0), 100.0, (dense(8, 0), 100.0), (dense(0, 4), 200.0)).tolist() == [2, 2]


def test_the_own_copy_may_be_written_over():
    own = f32(0, 8)
    mix(mean, own, 1.0, [(dense(4, 0), 1.0)], own)
    assert own.tolist() == [2, 4]


def test_the_rule_is_the_one_that_was_asked_for():
    copies = (dense(1), 1.0), (dense(1000), 9.0)
    assert mixed(f32(2), 1.0, *copies, rule=median).tolist() == [2]


def test_a_sparse_copy_counts_only_where_it_holds_a_value():
    own = f32(1, 2, 3, 4)
    result = mixed(own, 1.0, (sparse(5, None, None, 0), 1.0), (sparse(None, None, 6, 8), 2.0))
    assert result.tolist() == [(1 + 5) / 2, 2, (3 + 2 * 6) / 3, (4 + 0 + 2 * 8) / 4]


def test_dense_and_sparse_copies_may_be_mixed():
    result = mixed(f32(0, 0, 1), 1.0, (dense(4, 4, 1), 1.0), (sparse(None, 8, None), 2.0))
    assert result.tolist() == [2, 5, 1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weight", [0.3, 4.0])
@given(own=arrays(np.float32, 5, elements=st.floats(width=32)), row=arrays(np.float32, 5, elements=anything_finite))
@quick
def test_adopting_takes_the_copy_to_the_last_bit_whatever_the_rule_and_the_own_one(rule, weight, own, row):
    assert mixed(own, 0.0, (Decoded(row, None), weight), rule=rule).tobytes() == row.tobytes()
    assert mixed(own, 0.0, (Decoded(in_pieces(row, 2), None), weight), rule=rule).tobytes() == row.tobytes()


def test_a_peer_that_diverged_can_adopt():
    own = f32(np.inf, np.nan, 1e8, -np.inf)
    assert mixed(own, 0.0, (dense(1, 2, 3, -0.0), 1.0)).tobytes() == f32(1, 2, 3, -0.0).tobytes()
    assert mixed(own, 0.0, (sparse(1, 2, None, 4), 1.0)).tolist() == [1, 2, 1e8, 4]


def test_adopting_may_write_over_the_own_copy():
    own = f32(0, np.nan, 7)
    mix(mean, own, 0.0, [(sparse(4, 5, None), 1.0)], own)
    assert own.tolist() == [4, 5, 7]


@pytest.mark.parametrize("rule", RULES)
def test_adopting_a_sparse_copy_keeps_the_own_values_that_it_does_not_hold(rule):
    result = mixed(f32(64, 0.1, 32, -0.3), 0.0, (sparse(1, None, 0, None), 3.0), rule=rule)
    assert result.tobytes() == f32(1, 0.1, 0, -0.3).tobytes()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cuts", [(1,), (30_000, 60_000), (32_768, 65_536)])
def test_copies_in_pieces_are_mixed_as_whole_ones_are(rule, cuts):
    n = 2 * aggregation._RUN + 5
    own, first, second = (normal(n, seed) for seed in range(3))
    whole = mixed(own, 0.7, (Decoded(first, None), 1.0), (Decoded(second, None), 2.0), rule=rule)
    pieces = (Decoded(in_pieces(first, *cuts), None), 1.0), (Decoded(in_pieces(second, 40_000), None), 2.0)
    assert mixed(own, 0.7, *pieces, rule=rule).tobytes() == whole.tobytes()


@pytest.mark.parametrize("rule", RULES)
@given(row=arrays(np.float32, 5, elements=anything_finite), k=st.integers(1, 5), seed=st.integers(0, 9))
@quick
def test_equal_copies_stay_as_they_are_to_the_last_bit(rule, row, k, seed):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 3.0, k)
    held = rng.random((k, 5)) < 0.5
    everywhere = [(Decoded(row.copy(), None), weight) for weight in weights]
    somewhere = [(Decoded(np.where(mask, row, 0), mask), weight) for mask, weight in zip(held, weights, strict=True)]
    assert mixed(row, 0.7, *everywhere, rule=rule).tobytes() == row.tobytes()
    assert mixed(row, 0.7, *somewhere, rule=rule).tobytes() == row.tobytes()


@given(
    rows=st.tuples(st.integers(2, 6), st.integers(1, 8)).flatmap(lambda shape: arrays(np.float32, shape, elements=finite)),
    are_sparse=st.booleans(),
    seed=st.integers(0, 9),
)
@quick
def test_the_order_of_the_copies_shows_in_the_last_bits_at_most(rows, are_sparse, seed):
    rng = np.random.default_rng(seed)
    masks = rng.random(rows.shape) < 0.5
    copies = [
        (Decoded(np.where(mask, row, 0), mask) if are_sparse else Decoded(row, None), rng.uniform(0.1, 3.0))
        for row, mask in zip(rows[1:], masks[1:], strict=True)
    ]
    order = rng.permutation(len(copies))
    first, second = mixed(rows[0], 0.7, *copies), mixed(rows[0], 0.7, *(copies[index] for index in order))
    # k terms of at most 2M, M the largest magnitude, each with a share of at most 1 and k + 4 roundings of 2**-24; below the
    # normal numbers each of k - 1 products errs by 2**-150, divided by weights of more than 0.1 k, and the quotient by as much
    k = len(rows)
    bound = k * (k + 4) * 2 * float(np.abs(rows).max()) * 2.0**-24 + (k + 10) * 2.0**-150
    assert np.abs(first - second).max() <= 2 * bound


@pytest.mark.parametrize("rule", ["mean", "median"])
@pytest.mark.parametrize("numbers", [(2, 2, 2), (2, 0, 3), (1, 2)], ids=str)
@pytest.mark.parametrize("weights", [(7.0, 7.0, 7.0), (3.0, 1.0, 5.5)], ids=str)
def test_segments_mixed_together_come_to_the_same_bits(rule, numbers, weights):
    ranges = [(0, 3), (3, 10), (10, 11)]
    own = normal(11)
    own[:2] = 0.0, -0.0
    mixes = [
        SegmentMix(
            (start, stop),
            weights[0],
            [(Decoded(normal(stop - start, seed), None), weights[seed % 3]) for seed in range(1, number + 1)],
        )
        for (start, stop), number in zip(ranges, numbers, strict=False)
    ]
    one_by_one, together = np.zeros(11, np.float32), np.zeros(11, np.float32)
    for (start, stop), weight, copies in mixes:
        mix(AGGREGATORS.get(rule), own[start:stop], weight, copies, out=one_by_one[start:stop])
    mix_segments(AGGREGATORS.get(rule), own, mixes, out=together)
    assert one_by_one.tobytes() == together.tobytes()
