"""The kinds of topologies: a function for each, which a scenario names in [topology] with its arguments.

networkx is imported only inside those that draw a graph, so a peer that is told its neighbours never loads it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.overlay.graph_files import Link, read_graph
from gossipfl.overlay.graphs import FullTopology, ListedTopology, Topology
from gossipfl.registry import Registry

if TYPE_CHECKING:
    import networkx

_TRIES = 100
"""Draws before giving up: of graphs that are connected with a chance of 5 %, one in 170 is missed."""

TopologyFunction = Callable[..., "Topology | networkx.Graph"]
"""`f(num_peers, rng, **args)`; `args` are the further keys of the scenario's [topology]."""

TOPOLOGIES: Registry[TopologyFunction] = Registry("topology")


@TOPOLOGIES.register("full")
def full(num_peers: int, rng: np.random.Generator) -> Topology:
    """Everyone is everyone's neighbour."""
    return FullTopology(num_peers)


@TOPOLOGIES.register("ring")
def ring(num_peers: int, rng: np.random.Generator) -> Topology:
    """Each peer and the next one, the last and the first."""
    return ListedTopology(num_peers, ((index, (index + 1) % num_peers) for index in range(num_peers)))


@TOPOLOGIES.register("star")
def star(num_peers: int, rng: np.random.Generator) -> Topology:
    """p0 and everyone else."""
    return ListedTopology(num_peers, ((0, index) for index in range(1, num_peers)))


@TOPOLOGIES.register("grid")
def grid(num_peers: int, rng: np.random.Generator) -> Topology:
    """Rows and columns, as square as the number of peers divides: 12 are 3 x 4; no prime number beyond 3 will do."""
    columns = _columns("grid", num_peers)
    right = ((index, index + 1) for index in range(num_peers) if (index + 1) % columns)
    down = ((index, index + columns) for index in range(num_peers - columns))
    return ListedTopology(num_peers, itertools.chain(right, down))


@TOPOLOGIES.register("torus")
def torus(num_peers: int, rng: np.random.Generator) -> Topology:
    """A grid whose rows and columns close into rings."""
    columns = _columns("torus", num_peers)
    right = ((index, index - index % columns + (index + 1) % columns) for index in range(num_peers))
    down = ((index, (index + columns) % num_peers) for index in range(num_peers))
    return ListedTopology(num_peers, itertools.chain(right, down))


@TOPOLOGIES.register("exponential")
def exponential(num_peers: int, rng: np.random.Generator) -> Topology:
    """Each peer and those 1, 2, 4, 8, ... places on, so that news reaches everyone in log2(n) steps.

    Ying et al., "Exponential graph is provably efficient for decentralized deep training", NeurIPS 2021; theirs is
    directed, here every link counts for both ends.
    """
    hops = [1 << power for power in range((num_peers - 1).bit_length())]
    return ListedTopology(num_peers, ((i, (i + hop) % num_peers) for i in range(num_peers) for hop in hops))


@TOPOLOGIES.register("clique_ring")
def clique_ring(num_peers: int, rng: np.random.Generator, *, clique: int = 4) -> Topology:
    """Complete groups of `clique` peers (some hold one less when that does not divide), in a ring with one link each.

    After Bellet, Kermarrec and Lavoie, "D-Cliques", SRDS 2022.
    """
    cuts = _even_cuts(num_peers, _whole("clique", clique))
    between = ((stop - 1, stop % num_peers) for stop in cuts[1:])
    # A single clique has nothing to be joined to; its "next" one is itself and the link is there already.
    return ListedTopology(num_peers, itertools.chain(_complete_groups(cuts), between))


@TOPOLOGIES.register("hierarchical")
def hierarchical(num_peers: int, rng: np.random.Generator, *, cluster: int = 8) -> Topology:
    """Complete clusters of `cluster` peers (some hold one less when that does not divide), whose heads are all linked.

    The head of a cluster is its first peer. After the edge servers of Liu, Zhang, Song and Letaief, "Client-edge-cloud
    hierarchical federated learning", ICC 2020; here a head is a peer like any other.
    """
    cuts = _even_cuts(num_peers, _whole("cluster", cluster))
    return ListedTopology(num_peers, itertools.chain(_complete_groups(cuts), itertools.combinations(cuts[:-1], 2)))


@TOPOLOGIES.register("regular")
def regular(num_peers: int, rng: np.random.Generator, *, degree: int = 4) -> Topology:
    """A random graph in which every peer has `degree` neighbours."""
    import networkx

    _check_degree(degree, num_peers)
    if num_peers > 1 and num_peers * degree % 2:
        raise ConfigError(
            f"topology.degree = {degree} with peers = {num_peers} makes an odd number of link ends; change one of them by 1"
        )
    if degree == num_peers - 1:
        return FullTopology(num_peers)

    def draw(seed: int) -> networkx.Graph:
        if 2 * degree < num_peers:
            return networkx.random_regular_graph(degree, num_peers, seed)
        # networkx pairs link ends and starts over at a clash, which for dense graphs does not come to an end.
        return networkx.complement(networkx.random_regular_graph(num_peers - 1 - degree, num_peers, seed))

    return _draw_connected(
        num_peers,
        rng,
        draw,
        f"topology.degree = {degree}",
    )


@TOPOLOGIES.register("small_world")
def small_world(num_peers: int, rng: np.random.Generator, *, degree: int = 4, rewire: float = 0.1) -> Topology:
    """A ring of `degree` nearest neighbours (half on each side), each link rewired at random with chance `rewire`.

    Watts and Strogatz, "Collective dynamics of 'small-world' networks", Nature 1998.
    """
    import networkx

    _check_degree(degree, num_peers, multiple=2)
    _chance("rewire", rewire)
    if degree % 2:
        raise ConfigError(f"topology.degree = {degree} must be even in a small_world, half on either side; change it by 1")
    return _draw_connected(
        num_peers,
        rng,
        lambda seed: networkx.watts_strogatz_graph(num_peers, degree, rewire, seed),
        f"topology.degree = {degree}",
    )


@TOPOLOGIES.register("erdos_renyi")
def erdos_renyi(num_peers: int, rng: np.random.Generator, *, p: float | None = None) -> Topology:
    """Each pair is linked with chance `p` (default: twice log(n) / n, above which such graphs tend to be connected).

    Erdos and Renyi, "On the evolution of random graphs", 1960.
    """
    import networkx

    threshold = math.log(num_peers) / num_peers
    chance = min(1.0, 2 * threshold) if p is None else _chance("p", p)
    return _draw_connected(
        num_peers,
        rng,
        lambda seed: networkx.fast_gnp_random_graph(num_peers, chance, seed),
        f"topology.p = {chance:.6g}",
        f" (graphs of {num_peers} tend to be connected above {threshold:.2g})",
    )


@TOPOLOGIES.register("barabasi_albert")
def barabasi_albert(num_peers: int, rng: np.random.Generator, *, degree: int = 2) -> Topology:
    """A few hubs and many leaves: peers join one by one, each with `degree` links to peers that already have many.

    Barabasi and Albert, "Emergence of scaling in random networks", Science 1999.
    """
    import networkx

    _check_degree(degree, num_peers)
    return _draw_connected(
        num_peers,
        rng,
        lambda seed: networkx.barabasi_albert_graph(num_peers, degree, seed),
        f"topology.degree = {degree}",
    )


@TOPOLOGIES.register("file")
def file(num_peers: int, rng: np.random.Generator, *, path: str, format: str | None = None) -> Topology:
    """A graph from a file: decentralizepy's `.edges`, GraphML, or an adjacency list or matrix (`read_graph`)."""
    found, links = read_graph(path, format)
    check_num_peers(repr(str(path)), found, num_peers)  # before lists are made for as many as a file claims
    return ListedTopology(found, links)


# ------------------------------------------------------------------------------------------------------- drawn graphs


def _draw_connected(
    num_peers: int,
    rng: np.random.Generator,
    draw: Callable[[int], networkx.Graph],
    setting: str,
    hint: str = "",
) -> Topology:
    """Draw until the graph is connected. `setting` is the argument that makes it sparse, as `key = value`."""
    import networkx

    if num_peers == 1:
        return ListedTopology(1, [])
    for _ in range(_TRIES):
        graph = draw(int(rng.integers(1 << 31)))
        if networkx.is_connected(graph):
            return ListedTopology(num_peers, graph.edges())
    raise ConfigError(
        f"{setting} gave no connected graph of {num_peers} peers in {_TRIES} draws{hint}; raise it or try another seed"
    )


# ------------------------------------------------------------------------------------------------------- checks


def check_num_peers(source: str, found: int, num_peers: int) -> None:
    """ConfigError where a graph is for another number of peers."""
    if found != num_peers:
        raise ConfigError(f"the topology {source} has {found} peers but peers = {num_peers}; set peers = {found}")


def _check_degree(degree: int, num_peers: int, multiple: int = 1) -> None:
    """A lone peer fits any degree: it has nobody to link to."""
    if _whole("degree", degree) >= num_peers > 1:
        most = (num_peers - 1) // multiple * multiple
        raise ConfigError(
            f"topology.degree = {degree} needs at least {degree + 1} peers, there are {num_peers}; "
            f"{f'lower it to {most} or less' if most else 'have more peers, or another topology.kind'}"
        )


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"topology.{name} = {value!r} must be a whole number of at least 1")
    return value


def _chance(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ConfigError(f"topology.{name} = {value!r} must be a number from 0 to 1")
    return float(value)


def _even_cuts(num_peers: int, most: int) -> list[int]:
    """Where the peers are cut, from 0 to `num_peers`, into as few groups of at most `most`, even to one peer."""
    num_groups = math.ceil(num_peers / most)
    return [index * num_peers // num_groups for index in range(num_groups + 1)]


def _complete_groups(cuts: Iterable[int]) -> Iterator[Link]:
    """All links within each group."""
    for start, stop in itertools.pairwise(cuts):
        yield from itertools.combinations(range(start, stop), 2)


def _columns(kind: str, num_peers: int) -> int:
    """The longer side of the most square rectangle of `num_peers` places. ConfigError where that is a mere row."""
    rows = next(rows for rows in range(math.isqrt(num_peers), 0, -1) if num_peers % rows == 0)
    if rows == 1 and num_peers > 3:
        raise ConfigError(
            f"topology.kind = {kind!r} needs peers = a x b with a and b of at least 2, and {num_peers} is prime; "
            f"set peers = {num_peers - 1} or {num_peers + 1}, or topology.kind = 'ring'"
        )
    return num_peers // rows
