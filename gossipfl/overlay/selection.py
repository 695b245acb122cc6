"""Which neighbours a segment is pulled from.

A rule is `f(candidates, replicas, links, rng) -> peers`: R distinct candidates for one segment. `links` maps a peer to what
is known of its link (for bandwidth-aware rules); `rng` is the round's own generator, so the seed decides.

A schedule is `f(names, replicas, rng) -> {receiver: senders}`: who mixes whose copy, drawn for everybody at once. Peers that
draw from equal generators draw the same, so a receiver knows who sends to it without being told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.registry import Registry

Selector = Callable[[Sequence[str], int, Mapping[str, Any], np.random.Generator], list[str]]
Senders = dict[str, list[str]]
"""Whose copies each peer mixes."""
Schedule = Callable[[Sequence[str], int, np.random.Generator], Senders]

SELECTORS: Registry[Selector] = Registry("selection")


@SELECTORS.register("uniform")
def uniform(candidates: Sequence[str], replicas: int, links: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
    """R distinct candidates, uniformly without replacement (arXiv 1908.07782: segmented pulling); all of them if fewer."""
    if replicas >= len(candidates):
        return list(candidates)
    chosen: list[str] = []
    while len(chosen) < replicas:
        drawn = candidates[int(rng.integers(len(candidates)))]  # one at a time: numpy takes longer for an array of two
        if drawn not in chosen:
            chosen.append(drawn)
    return chosen


@SELECTORS.register("all")
def every(candidates: Sequence[str], replicas: int, links: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
    """Every candidate, as D-PSGD mixes (Lian et al., NeurIPS 2017)."""
    return list(candidates)


@SELECTORS.register("bandwidth")
def fastest(candidates: Sequence[str], replicas: int, links: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
    """The R candidates with the largest `links[peer].predicted_rate`, equal ones in random order; all of them if fewer.

    The greedy half of BACombo (Jiang, Hu, Hu and Wang, "BACombo: Bandwidth-Aware Decentralized Federated Learning",
    Electronics 9(3):440, 2020); `exploring` is the other. The code that seems to be the authors' takes the first five in
    place of R, may choose a peer itself, and finds one peer again and again among equal ones; here none of these happens.
    """
    in_random_order = [candidates[index] for index in rng.permutation(len(candidates))]
    return sorted(in_random_order, key=lambda peer: links[peer].predicted_rate, reverse=True)[:replicas]


def exploring(select: Selector, exploration: float) -> Selector:
    """Epsilon-greedy: with probability `exploration` (epsilon) a segment's peers are drawn uniformly, else by `select`."""

    def choose(candidates: Sequence[str], replicas: int, links: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
        rule = uniform if rng.random() < exploration else select
        return rule(candidates, replicas, links, rng)

    return choose


# --- schedules: drawn for everybody at once ---------------------------------------------------------------------------


def random_sends(names: Sequence[str], replicas: int, rng: np.random.Generator) -> Senders:
    """Each peer sends to `replicas` others, drawn uniformly; how many send to a peer is left to chance, and may be none."""
    senders: Senders = {name: [] for name in names}
    num_others = len(names) - 1
    for index, sender in enumerate(names):
        for drawn in rng.choice(num_others, size=min(replicas, num_others), replace=False):
            senders[names[drawn + (drawn >= index)]].append(sender)
    return senders


def random_regular(names: Sequence[str], replicas: int, rng: np.random.Generator) -> Senders:
    """A random graph in which each peer has `replicas` links and sends over all of them. ConfigError where there is none."""
    import networkx

    num_peers = len(names)
    if num_peers == 1:
        return {names[0]: []}
    check_regular(num_peers, replicas)
    seed = int(rng.integers(2**32))
    # networkx pairs link ends and starts over at a clash, which for dense graphs does not come to an end.
    if 2 * replicas < num_peers:
        graph = networkx.random_regular_graph(replicas, num_peers, seed)
    else:
        graph = networkx.complement(networkx.random_regular_graph(num_peers - 1 - replicas, num_peers, seed))
    return {name: [names[other] for other in sorted(graph[index])] for index, name in enumerate(names)}


def check_regular(num_peers: int, replicas: int) -> None:
    """ConfigError where there is no graph for `random_regular`."""
    if num_peers * replicas % 2 or replicas >= num_peers:
        raise ConfigError(
            f"gossip.replicas = {replicas} with peers = {num_peers}: no graph gives every peer that many links; "
            f"lower it{' or change one of them by 1' if replicas < num_peers else ''}"
        )


def random_pairs(names: Sequence[str], replicas: int, rng: np.random.Generator) -> Senders:
    """A random matching, whatever `replicas` is: both of a pair send to each other; of an odd number one is left out."""
    order = [names[index] for index in rng.permutation(len(names))]
    senders: Senders = {name: [] for name in names}
    for one, other in zip(order[::2], order[1::2], strict=False):
        senders[one], senders[other] = [other], [one]
    return senders
