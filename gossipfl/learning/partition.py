"""How the training samples are dealt to the peers: evenly at random, or skewed as data of separate owners are.

    shards = partition(dataset.y_train, num_peers=10, kind="dirichlet", seed=0, args={"alpha": 0.1})
    class_table(dataset.y_train, shards, dataset.num_classes)       # i64[10, num_classes]

Every sample is given exactly once and no peer is left empty. A partitioner is a function
`f(labels i64[n], num_peers, rng, *, keys=None, **args) -> list of num_peers index arrays`, registered in
`PARTITIONERS` or named `package.module:function`. For a survey of such skews see Li, Diao, Chen and He, "Federated
Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gossipfl.errors import ConfigError, DataError
from gossipfl.learning.datasets.arguments import call_with, positive_number, whole_number
from gossipfl.randomness import generator
from gossipfl.registry import Registry

Shards = list[np.ndarray]
"""The training samples of each peer, as sorted indices `i64[n_i]`."""

PARTITIONERS: Registry[Callable[..., Shards]] = Registry("partition")

_MIN_SIZE = 10  # least samples per peer in the study of Li et al. 2022, where there are enough of them
_REDRAWS = 10  # draws of a Dirichlet before the last one is repaired


def partition(
    dataset_labels: np.ndarray,
    num_peers: int,
    kind: str,
    seed: int,
    keys: np.ndarray | None = None,
    args: Mapping[str, Any] | None = None,
) -> Shards:
    """Deal the samples with labels `i64[n]` (or `i64[n, T]`, text) to `num_peers` peers; the seed decides.

    `keys`, `i64[n]`, name each sample's natural owner. DataError for fewer samples than peers, ConfigError for
    arguments the kind does not take or cannot fulfil, and for a user's partitioner that loses or repeats samples.
    """
    labels = np.asarray(dataset_labels)
    function = PARTITIONERS.get(kind)
    what = f"partition {kind!r}"
    whole_number(what, "num_peers", num_peers)
    if len(labels) < num_peers:
        raise DataError(f"{len(labels)} training samples cannot be dealt to {num_peers} peers; use fewer peers")
    if keys is not None and np.shape(keys) != (len(labels),):
        raise DataError(f"{what}: keys has shape {np.shape(keys)}, but there are {len(labels)} samples")
    rng = generator(seed, "partition")
    result = call_with(what, function, (labels, num_peers, rng), args or {}, offered={"keys": keys})
    shards = [np.sort(np.asarray(shard, dtype=np.int64)) for shard in result]
    _check_shards(what, shards, len(labels), num_peers)
    return shards


def class_table(labels: np.ndarray, shards: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """How many labels of each class each peer holds: `i64[num_peers, num_classes]`."""
    rows = [np.bincount(np.ravel(labels[shard]), minlength=num_classes) for shard in shards]
    return np.array(rows, dtype=np.int64).reshape(len(shards), num_classes)


@PARTITIONERS.register("iid")
def iid(labels: np.ndarray, num_peers: int, rng: np.random.Generator, *, keys: np.ndarray | None = None) -> Shards:
    """Equal parts of a random permutation; sizes differ by 1 at most."""
    return np.array_split(rng.permutation(len(labels)), num_peers)


@PARTITIONERS.register("dirichlet")
def dirichlet(
    labels: np.ndarray,
    num_peers: int,
    rng: np.random.Generator,
    *,
    keys: np.ndarray | None = None,
    alpha: float = 0.5,
    min_size: int | None = None,
) -> Shards:
    """Each class is divided by its own draw from Dir(`alpha`) over the peers (Yurochkin et al., "Bayesian
    Nonparametric Federated Learning of Neural Networks", ICML 2019; Hsu et al. 2019 draw per peer instead).

    A small `alpha` gives each peer few classes. Redrawn until every peer holds `min_size` samples (default 10, or
    half the average if that is less); what the last draw lacks comes from the largest shards.
    """
    what = "partition 'dirichlet'"
    alpha = positive_number(what, "alpha", alpha)
    min_size = _checked_min_size(what, min_size, len(labels), num_peers)
    members = _members_by_class(what, labels, rng)

    def draw() -> Shards:
        parts = [_cut(group, rng.dirichlet(np.full(num_peers, alpha))) for group in members]
        return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]

    return _drawn_until(draw, min_size, rng)


@PARTITIONERS.register("quantity_skew")
def quantity_skew(
    labels: np.ndarray,
    num_peers: int,
    rng: np.random.Generator,
    *,
    keys: np.ndarray | None = None,
    alpha: float = 0.5,
    min_size: int | None = None,
) -> Shards:
    """Random samples in shards whose sizes follow one draw from Dir(`alpha`) (Li et al. 2022, section IV-C).
    `min_size` as in `dirichlet`."""
    what = "partition 'quantity_skew'"
    alpha = positive_number(what, "alpha", alpha)
    min_size = _checked_min_size(what, min_size, len(labels), num_peers)

    def draw() -> Shards:
        return _cut(rng.permutation(len(labels)), rng.dirichlet(np.full(num_peers, alpha)))

    return _drawn_until(draw, min_size, rng)


@PARTITIONERS.register("shards")
def shards(
    labels: np.ndarray,
    num_peers: int,
    rng: np.random.Generator,
    *,
    keys: np.ndarray | None = None,
    shards_per_peer: int = 2,
) -> Shards:
    """Samples sorted by label, cut into `num_peers * shards_per_peer` equal pieces, `shards_per_peer` random ones to
    each peer (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
    2017, section 3)."""
    what = "partition 'shards'"
    whole_number(what, "shards_per_peer", shards_per_peer)
    num_pieces = num_peers * shards_per_peer
    if num_pieces > len(labels):
        raise ConfigError(
            f"{what}: {num_peers} peers times shards_per_peer = {shards_per_peer} needs {num_pieces} samples; there are "
            f"{len(labels)}; lower shards_per_peer or use fewer peers"
        )
    pieces = np.array_split(np.concatenate(_members_by_class(what, labels, rng)), num_pieces)
    dealt = rng.permutation(num_pieces).reshape(num_peers, shards_per_peer)
    return [np.concatenate([pieces[i] for i in row]) for row in dealt]


@PARTITIONERS.register("pathological")
def pathological(
    labels: np.ndarray,
    num_peers: int,
    rng: np.random.Generator,
    *,
    keys: np.ndarray | None = None,
    classes_per_peer: int = 2,
) -> Shards:
    """Each peer holds exactly `classes_per_peer` random classes, and the owners of a class share it equally (`#C = k`
    of Li et al. 2022, section IV-A).

    More where the peers are too few to cover all classes, fewer where a class has fewer samples than it needs owners.
    ConfigError if there are fewer classes than that.
    """
    what = "partition 'pathological'"
    whole_number(what, "classes_per_peer", classes_per_peer)
    members = _members_by_class(what, labels, rng)
    if classes_per_peer > len(members):
        raise ConfigError(f"{what}: classes_per_peer = {classes_per_peer} exceeds the {len(members)} classes; lower it")
    members = [members[c] for c in rng.permutation(len(members))]
    owners_of = _random_owners(_num_owners(members, num_peers, classes_per_peer), num_peers, rng)
    held: list[list[np.ndarray]] = [[] for _ in range(num_peers)]
    for group, owners in zip(members, owners_of, strict=True):
        for peer, part in zip(owners, np.array_split(group, len(owners)), strict=True):
            held[peer].append(part)
    return [np.concatenate(parts) for parts in held]


@PARTITIONERS.register("natural")
def natural(labels: np.ndarray, num_peers: int, rng: np.random.Generator, *, keys: np.ndarray | None = None) -> Shards:
    """By owner: an owner's samples stay together, and owners are grouped so that the peers hold about equally many
    (largest first to the peer with least). ConfigError without keys, or with fewer owners than peers."""
    what = "partition 'natural'"
    if keys is None:
        raise ConfigError(f"{what}: this data set names no owners (keys); choose iid, quantity_skew or dirichlet")
    owners, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    if len(owners) < num_peers:
        raise ConfigError(f"{what}: {len(owners)} owners are fewer than {num_peers} peers; use fewer peers")
    shuffled = rng.permutation(len(owners))  # the draw decides among owners of equal size
    heap = [(0, peer) for peer in range(num_peers)]
    peer_of = np.empty(len(owners), dtype=np.int64)
    for owner in shuffled[np.argsort(-counts[shuffled], kind="stable")]:
        held, peer = heapq.heappop(heap)
        peer_of[owner] = peer
        heapq.heappush(heap, (held + int(counts[owner]), peer))
    return _grouped(peer_of[inverse], num_peers)


def _check_shards(what: str, shards: Shards, num_samples: int, num_peers: int) -> None:
    """Every sample once, no peer empty: our own partitioners keep this, a user's may not."""
    if len(shards) != num_peers:
        raise ConfigError(f"{what} returned {len(shards)} shards for {num_peers} peers")
    for peer, shard in enumerate(shards):
        if shard.ndim != 1 or len(shard) == 0:
            raise ConfigError(f"{what} returned shard {peer} of shape {shard.shape}; it needs one index at least")
    given = np.sort(np.concatenate(shards))
    if not np.array_equal(given, np.arange(num_samples)):
        raise ConfigError(
            f"{what} returned {len(given)} indices, {len(np.unique(given))} of them distinct, from {given[0]} to "
            f"{given[-1]}; each of 0 to {num_samples - 1} must be given exactly once"
        )


def _members_by_class(what: str, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The samples of each class that occurs, in random order. ConfigError for text, whose samples have no class."""
    if labels.ndim != 1:
        raise ConfigError(
            f"{what} needs one class per sample, but labels have shape {labels.shape}; for text choose iid, "
            "quantity_skew or natural"
        )
    order = rng.permutation(len(labels))
    classes, inverse = np.unique(labels, return_inverse=True)
    return [order[part] for part in _grouped(inverse[order], len(classes))]


def _grouped(numbers: np.ndarray, num_groups: int) -> list[np.ndarray]:
    """The positions of each of `0 .. num_groups - 1` in `numbers`, ascending."""
    bounds = np.cumsum(np.bincount(numbers, minlength=num_groups))[:-1]
    return np.split(np.argsort(numbers, kind="stable"), bounds)


def _cut(indices: np.ndarray, proportions: np.ndarray) -> list[np.ndarray]:
    """Cut into consecutive parts of about these proportions; parts may be empty, nothing is lost."""
    bounds = np.rint(np.cumsum(proportions)[:-1] * len(indices)).astype(np.int64)
    return np.split(indices, np.minimum(bounds, len(indices)))


def _checked_min_size(what: str, min_size: int | None, num_samples: int, num_peers: int) -> int:
    if min_size is None:
        return max(1, min(_MIN_SIZE, num_samples // (2 * num_peers)))
    if whole_number(what, "min_size", min_size) * num_peers > num_samples:
        raise ConfigError(
            f"{what}: min_size = {min_size} for {num_peers} peers needs {min_size * num_peers} samples; there are "
            f"{num_samples}; lower it or use fewer peers"
        )
    return min_size


def _drawn_until(draw: Callable[[], Shards], min_size: int, rng: np.random.Generator) -> Shards:
    """Redraw while a shard is too small; then move random samples from the largest shards into those."""
    for _ in range(_REDRAWS):
        shards = draw()
        if min(len(shard) for shard in shards) >= min_size:
            return shards
    largest = [(-len(shard), peer) for peer, shard in enumerate(shards)]
    heapq.heapify(largest)
    pools = [list(rng.permutation(shard)) for shard in shards]
    for pool in pools:
        while len(pool) < min_size:
            _, donor = heapq.heappop(largest)
            pool.append(pools[donor].pop())
            heapq.heappush(largest, (-len(pools[donor]), donor))
    return [np.array(pool, dtype=np.int64) for pool in pools]


def _num_owners(members: list[np.ndarray], num_peers: int, classes_per_peer: int) -> list[int]:
    """How many peers share each class: one at least, no more than peers or samples; large classes get more."""
    num_owners = [1] * len(members)
    missing = num_peers * classes_per_peer - len(members)
    heap = [(-float(len(group)), c) for c, group in enumerate(members)]  # the largest share per owner first
    heapq.heapify(heap)
    while heap and missing > 0:
        _, c = heapq.heappop(heap)
        if num_owners[c] < min(num_peers, len(members[c])):
            num_owners[c] += 1
            missing -= 1
            heapq.heappush(heap, (-len(members[c]) / num_owners[c], c))
    return num_owners


def _random_owners(num_owners: list[int], num_peers: int, rng: np.random.Generator) -> list[list[int]]:
    """Distinct random owners for each class, such that the peers own equally many classes (or one more or less).

    The peers are dealt lap by lap, each lap in a new random order; a class that runs into the next lap takes peers
    first that it does not have yet.
    """
    owners_of: list[list[int]] = []
    lap: list[int] = []
    for wanted in num_owners:
        owners = lap[:wanted]
        lap = lap[wanted:]
        if len(owners) < wanted:
            fresh = [int(peer) for peer in rng.permutation(num_peers)]
            lap = [peer for peer in fresh if peer not in owners] + [peer for peer in fresh if peer in owners]
            missing = wanted - len(owners)
            owners, lap = owners + lap[:missing], lap[missing:]
        owners_of.append(owners)
    return owners_of
