"""What travels: tensors laid end to end, and the segments cut from them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossipfl.errors import ConfigError, LayoutError
from gossipfl.segments.layout import SEGMENTATIONS, Entry, Layout, even_segments, layer_segments

quick = settings(deadline=None, max_examples=100)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
layouts = st.lists(shapes, min_size=1, max_size=12).map(
    lambda drawn: Layout.of((f"t{index}", shape) for index, shape in enumerate(drawn))
)
CONV = Layout.of([("conv.weight", (4, 2, 3)), ("conv.bias", (4,)), ("scale", ()), ("head.weight", (2, 4))])


def vector(layout):
    return np.arange(layout.size, dtype=np.float32)


def assert_cover(segments, size):
    """In order, without gaps or overlaps, none empty, from 0 to `size`."""
    assert segments[0][0] == 0 and segments[-1][1] == size
    assert all(before[1] == after[0] for before, after in pairwise(segments))
    assert all(start < stop for start, stop in segments)


def test_tensors_are_laid_end_to_end_in_the_order_given():
    assert CONV.entries == (
        Entry("conv.weight", (4, 2, 3), 0, 24),
        Entry("conv.bias", (4,), 24, 28),
        Entry("scale", (), 28, 29),
        Entry("head.weight", (2, 4), 29, 37),
    )
    assert (CONV.size, CONV.num_bytes) == (37, 148)


def test_a_layout_of_nothing_has_no_values():
    empty = Layout.of([])
    assert (empty.entries, empty.size, empty.tensors(vector(empty))) == ((), 0, {})


@given(layout=layouts)
@quick
def test_the_entries_cover_the_vector_once(layout):
    assert [entry.start for entry in layout.entries] == [0, *(entry.stop for entry in layout.entries)][:-1]
    assert all(entry.stop - entry.start == math.prod(entry.shape) for entry in layout.entries)
    assert layout.size == layout.entries[-1].stop


def test_the_tensors_are_views_of_the_vector_in_their_own_shapes():
    flat = vector(CONV)
    tensors = CONV.tensors(flat)
    assert list(tensors) == ["conv.weight", "conv.bias", "scale", "head.weight"]
    assert {name: values.shape for name, values in tensors.items()} == {entry.name: entry.shape for entry in CONV.entries}
    assert tensors["head.weight"].tolist() == [[29, 30, 31, 32], [33, 34, 35, 36]]
    assert all(np.shares_memory(values, flat) for values in tensors.values())
    tensors["conv.bias"][1] = -1
    assert flat[25] == -1


@given(layout=layouts)
@quick
def test_the_tensors_laid_end_to_end_are_the_vector_again(layout):
    flat = vector(layout)
    parts = [values.reshape(-1) for values in layout.tensors(flat).values()]
    assert np.concatenate(parts).tobytes() == flat.tobytes()


@pytest.mark.parametrize("shape", [(36,), (38,), (0,), (37, 1), (1, 37), ()])
def test_a_vector_that_does_not_fit_is_refused(shape):
    with pytest.raises(LayoutError, match=r"does not fit a layout of 37 values"):
        CONV.tensors(np.zeros(shape, np.float32))


def test_the_digest_is_the_same_for_the_same_tensors():
    first, again = (Layout.of([("a", (2, 3)), ("b", [4])]) for _ in range(2))
    assert first.digest == again.digest
    assert len(first.digest) == 16 and set(first.digest) <= set("0123456789abcdef")


def test_the_digest_differs_where_any_name_shape_or_order_differs():
    different = [
        [("a", (2, 3)), ("b", (4,))],
        [("a", (2, 3)), ("c", (4,))],  # a name
        [("a", (3, 2)), ("b", (4,))],  # a shape of the same size
        [("a", (6,)), ("b", (4,))],
        [("a", (2, 3)), ("b", (5,))],
        [("b", (4,)), ("a", (2, 3))],  # the order
        [("b", (2, 3)), ("a", (4,))],
        [("a", (2, 3))],
        [("a", (2, 3)), ("b", (4,)), ("c", ())],
        [("a", (2, 3)), ("b", (4,)), ("c", (1,))],
        [("a", (2, 3)), ("b", (4,)), ("c", (0,))],
        [("a:2,3;b", (4,))],  # a name that looks like a tensor and the next one's name
        [("a', (2, 3)), ('b", (4,))],
        [],
    ]
    assert len({Layout.of(tensors).digest for tensors in different}) == len(different)


# --- segments ---------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 10_000), data=st.data())
@quick
def test_even_segments_cover_every_value_once_and_differ_by_one_at_most(size, data):
    num_segments = data.draw(st.integers(1, min(size, 300)))
    segments = even_segments(Layout.of([("v", (size,))]), num_segments)
    lengths = [stop - start for start, stop in segments]
    assert len(segments) == num_segments
    assert_cover(segments, size)
    assert max(lengths) - min(lengths) <= 1


def test_even_segments_of_ten_values():
    layout = Layout.of([("a", (3,)), ("b", (7,))])
    assert even_segments(layout, 1) == [(0, 10)]
    assert even_segments(layout, 4) == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert even_segments(layout, 10) == [(index, index + 1) for index in range(10)]


@given(layout=layouts.filter(lambda layout: layout.size), data=st.data())
@quick
def test_layer_segments_cover_every_value_once_and_cut_at_the_ends_of_tensors_only(layout, data):
    num_filled = sum(entry.stop > entry.start for entry in layout.entries)
    num_segments = data.draw(st.integers(1, num_filled))
    segments = layer_segments(layout, num_segments)
    assert len(segments) == num_segments
    assert_cover(segments, layout.size)
    assert {stop for _, stop in segments} <= {entry.stop for entry in layout.entries}


def layout_of_sizes(*sizes):
    return Layout.of((f"t{index}", (size,)) for index, size in enumerate(sizes))


@pytest.mark.parametrize(
    ("sizes", "num_segments", "expected"),
    [
        ((4, 4, 4, 4), 2, [(0, 8), (8, 16)]),
        ((4, 4, 4, 4), 4, [(0, 4), (4, 8), (8, 12), (12, 16)]),
        ((1, 2, 9, 8), 2, [(0, 12), (12, 20)]),  # goal 10: 12 is nearer than 3
        ((7, 2, 2, 9), 2, [(0, 9), (9, 20)]),  # goal 10: 9 and 11 are as near, the first is taken
        ((97, 1, 1, 1), 3, [(0, 97), (97, 98), (98, 100)]),  # goals 33.3, 66.7: 97, then the nearest still free
        ((1, 1, 1, 97), 3, [(0, 2), (2, 3), (3, 100)]),  # the first cut leaves a tensor for each segment to come
        ((1, 1, 98), 3, [(0, 1), (1, 2), (2, 100)]),
        ((3, 0, 3, 0), 2, [(0, 3), (3, 6)]),  # a tensor without values is no segment
        ((5, 6), 1, [(0, 11)]),
    ],
)
def test_layer_segments_are_cut_nearest_to_the_even_cuts(sizes, num_segments, expected):
    assert layer_segments(layout_of_sizes(*sizes), num_segments) == expected


def test_more_segments_than_values_is_an_error_that_says_what_to_change():
    assert len(even_segments(layout_of_sizes(7), 7)) == 7
    with pytest.raises(ConfigError, match=r"^gossip\.segments = 8 exceeds the model's 7 values; lower it$"):
        even_segments(layout_of_sizes(7), 8)


def test_more_segments_than_tensors_is_an_error_that_says_what_to_change():
    layout = layout_of_sizes(3, 0, 3)
    assert len(layer_segments(layout, 2)) == 2
    message = r"^gossip\.segments = 3 exceeds the model's 2 tensors with segmentation = 'by_layer'; lower it or .* = 'even'$"
    with pytest.raises(ConfigError, match=message):
        layer_segments(layout, 3)


def test_each_segmentation_has_its_name():
    assert {"even": even_segments, "by_layer": layer_segments} == SEGMENTATIONS
