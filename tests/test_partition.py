"""Partitioners: every sample once, no peer empty, the seed decides; and the skew that each one promises."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossipfl.errors import ConfigError, DataError
from gossipfl.learning.partition import PARTITIONERS, class_table, partition

TEN_CLASSES = np.arange(2000) % 10


@st.composite
def problems(draw):
    """Labels of up to 8 classes, some perhaps rare, and no more peers than samples."""
    num_samples = draw(st.integers(1, 120))
    num_classes = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = rng.dirichlet(np.full(num_classes, draw(st.sampled_from([0.2, 10.0]))))
    labels = rng.choice(num_classes, size=num_samples, p=share)
    return labels, draw(st.integers(1, num_samples)), draw(st.integers(0, 10))


def assert_dealt(shards, num_samples, num_peers):
    assert len(shards) == num_peers
    assert all(len(shard) > 0 for shard in shards)
    assert all((np.diff(shard) > 0).all() for shard in shards)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(num_samples))


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("iid", {}),
        ("dirichlet", {"alpha": 0.01}),
        ("dirichlet", {"alpha": 5.0}),
        ("quantity_skew", {"alpha": 0.05}),
        ("shards", {"shards_per_peer": 1}),
        ("pathological", {"classes_per_peer": 1}),
    ],
)
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_every_sample_is_given_once_no_peer_is_empty_and_the_seed_decides(kind, args, problem):
    labels, num_peers, seed = problem
    shards = partition(labels, num_peers, kind, seed, args=args)
    assert_dealt(shards, len(labels), num_peers)
    again = partition(labels, num_peers, kind, seed, args=args)
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))


@pytest.mark.parametrize("kind", sorted(PARTITIONERS))
def test_another_seed_deals_otherwise(kind):
    keys = np.arange(len(TEN_CLASSES)) // 20
    one, two = (partition(TEN_CLASSES, 7, kind, seed, keys=keys) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_iid_shards_differ_in_size_by_one_at_most():
    sizes = [len(shard) for shard in partition(TEN_CLASSES[:1003], 10, "iid", 0)]
    assert sorted(sizes) == [100] * 7 + [101] * 3


def test_a_small_alpha_gives_each_peer_few_classes_and_a_large_one_all():
    def classes_held(alpha):
        table = class_table(TEN_CLASSES, partition(TEN_CLASSES, 10, "dirichlet", 0, args={"alpha": alpha}), 10)
        return (table > 0.02 * table.sum(axis=1, keepdims=True)).sum(axis=1).mean()

    assert classes_held(0.05) < 4
    assert classes_held(100.0) == 10


@settings(max_examples=30, deadline=None)
@given(
    alpha=st.sampled_from([1e-3, 0.05, 1.0]),
    kind=st.sampled_from(["dirichlet", "quantity_skew"]),
    num_peers=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_min_size_is_kept_even_where_no_draw_fulfils_it(alpha, kind, num_peers, seed):
    labels = TEN_CLASSES[:200]
    least = 200 // num_peers  # as much as can be asked: the shards become equal
    shards = partition(labels, num_peers, kind, seed, args={"alpha": alpha, "min_size": least})
    assert_dealt(shards, 200, num_peers)
    assert min(len(shard) for shard in shards) >= least


def test_quantity_skew_makes_unequal_shards_of_equal_mixture():
    shards = partition(TEN_CLASSES, 8, "quantity_skew", 1, args={"alpha": 0.5})
    sizes = np.array([len(shard) for shard in shards])
    assert sizes.max() > 4 * sizes.min()
    largest = class_table(TEN_CLASSES, shards, 10)[sizes.argmax()]
    assert largest.min() > 0.05 * largest.sum()  # each class has a tenth of the data


def test_shards_of_sorted_labels_hold_few_classes():
    shards = partition(TEN_CLASSES, 10, "shards", 0, args={"shards_per_peer": 2})
    assert [len(shard) for shard in shards] == [200] * 10
    held = (class_table(TEN_CLASSES, shards, 10) > 0).sum(axis=1)
    assert held.max() <= 2  # 20 pieces of 100 samples, none of which crosses a class of 200


@settings(max_examples=40, deadline=None)
@given(num_peers=st.integers(5, 40), classes_per_peer=st.integers(2, 10), seed=st.integers(0, 9))
def test_pathological_peers_hold_exactly_that_many_classes(num_peers, classes_per_peer, seed):
    args = {"classes_per_peer": classes_per_peer}
    shards = partition(TEN_CLASSES, num_peers, "pathological", seed, args=args)
    assert_dealt(shards, len(TEN_CLASSES), num_peers)
    held = (class_table(TEN_CLASSES, shards, 10) > 0).sum(axis=1)
    assert (held == classes_per_peer).all()


def test_pathological_peers_hold_more_classes_where_they_are_too_few_to_cover_all():
    shards = partition(TEN_CLASSES, 4, "pathological", 0, args={"classes_per_peer": 2})
    assert sorted((class_table(TEN_CLASSES, shards, 10) > 0).sum(axis=1)) == [2, 2, 3, 3]


def test_natural_keeps_an_owner_whole_and_balances_the_peers():
    keys = np.repeat(np.arange(30), np.arange(1, 31))  # owner k holds k + 1 samples, 465 in all
    labels = np.zeros((465, 8), dtype=np.int64)
    shards = partition(labels, 5, "natural", 0, keys=keys)
    assert_dealt(shards, 465, 5)
    for key in range(30):
        assert sum(key in keys[shard] for shard in shards) == 1
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1  # the last owners dealt hold 1, 2, 3, ... samples


@pytest.mark.parametrize("kind", ["iid", "quantity_skew"])
def test_text_can_be_dealt_without_classes(kind):
    assert_dealt(partition(np.zeros((50, 8), dtype=np.int64), 4, kind, 0), 50, 4)


@pytest.mark.parametrize("kind", ["dirichlet", "shards", "pathological"])
def test_text_has_no_class_to_deal_by(kind):
    with pytest.raises(ConfigError, match=f"partition '{kind}' needs one class per sample.*iid, quantity_skew or natural"):
        partition(np.zeros((50, 8), dtype=np.int64), 4, kind, 0)


@pytest.mark.parametrize(
    ("kind", "num_peers", "keys", "args", "message"),
    [
        ("dirichlet", 4, None, {"alfa": 1}, r"no argument 'alfa'; did you mean 'alpha'\?; it accepts alpha, min_size"),
        ("iid", 4, None, {"alpha": 1}, "partition 'iid' has no argument 'alpha'; it accepts none"),
        ("natural", 4, None, {"keys": [1]}, "partition 'natural' has no argument 'keys'"),
        ("dirichlet", 4, None, {"alpha": 0}, "alpha = 0 must be a number above 0"),
        ("dirichlet", 4, None, {"min_size": 30}, "min_size = 30 for 4 peers needs 120 samples; there are 100"),
        ("shards", 4, None, {"shards_per_peer": 26}, "needs 104 samples; there are 100"),
        ("pathological", 4, None, {"classes_per_peer": 11}, "classes_per_peer = 11 exceeds the 10 classes"),
        ("natural", 4, None, {}, "names no owners"),
        ("natural", 4, np.arange(100) % 3, {}, "3 owners are fewer than 4 peers"),
        ("iid", 0, None, {}, "num_peers = 0 must be a whole number of at least 1"),
        ("idd", 4, None, {}, "unknown partition 'idd'; did you mean 'iid'"),
    ],
)
def test_what_cannot_be_fulfilled_is_named(kind, num_peers, keys, args, message):
    with pytest.raises(ConfigError, match=message):
        partition(TEN_CLASSES[:100], num_peers, kind, 0, keys=keys, args=args)


def test_fewer_samples_than_peers_is_an_error_of_the_data():
    with pytest.raises(DataError, match="3 training samples cannot be dealt to 4 peers"):
        partition(np.zeros(3, dtype=np.int64), 4, "iid", 0)


def test_keys_must_belong_to_the_samples():
    with pytest.raises(DataError, match=r"keys has shape \(5,\), but there are 100 samples"):
        partition(TEN_CLASSES[:100], 4, "iid", 0, keys=np.arange(5))


def test_a_users_partitioner_is_used_and_checked(tmp_path, monkeypatch):
    (tmp_path / "my_partition_for_test.py").write_text(
        "import numpy as np\n"
        "def strided(labels, num_peers, rng, *, step=1):\n"
        "    return [np.arange(i, len(labels), num_peers * step) for i in range(num_peers)]\n"
        "def hollow(labels, num_peers, rng):\n"
        "    return [np.arange(len(labels))] + [[]] * (num_peers - 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shards = partition(TEN_CLASSES[:8], 2, "my_partition_for_test:strided", 0)
    assert [list(shard) for shard in shards] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(ConfigError, match="returned 4 indices, 4 of them distinct, from 0 to 5; each of 0 to 7"):
        partition(TEN_CLASSES[:8], 2, "my_partition_for_test:strided", 0, args={"step": 2})
    with pytest.raises(ConfigError, match="shard 1 of shape"):
        partition(TEN_CLASSES[:8], 2, "my_partition_for_test:hollow", 0)


def test_a_class_table_counts_classes_and_tokens():
    shards = [np.array([0, 1, 3]), np.array([2])]
    assert class_table(np.array([0, 2, 1, 2]), shards, 4).tolist() == [[1, 0, 2, 0], [0, 1, 0, 0]]
    text = np.array([[0, 1], [1, 1], [0, 0], [2, 2]])
    assert class_table(text, shards, 3).tolist() == [[1, 3, 2], [2, 0, 0]]
