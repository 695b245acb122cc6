"""The topology: an undirected, connected graph whose edges say which peers are neighbours.

    topology = build_topology("regular", num_peers=16, seed=0, args={"degree": 4})
    topology.neighbours(3)             # the sorted indices of the neighbours of p3
    topology.sample(3, k=2, rng=rng)   # two different ones, drawn uniformly

A function of one's own, named as `package.module:function` in a scenario, may return a `Topology` or a networkx graph:

    def pairs(num_peers, rng, *, hops=1): ...   # what stands after the `*` are the keys of [topology]

networkx is imported only inside the builders that draw or read a graph, so a peer that is told its neighbours never
loads it. The complete graph is implicit: as lists, one of 10,000 peers would hold 10^8 indices.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.overlay.graph_files import Link, numbered, read_graph
from gossipfl.randomness import derived_seed, generator
from gossipfl.registry import Registry, did_you_mean

if TYPE_CHECKING:
    import networkx

_TRIES = 100
"""Draws before giving up: of graphs that are connected with a chance of 5 %, one in 170 is missed."""


class Topology(Protocol):
    """Peers 0..num_peers-1 and their links. A subclass gives `num_peers` and `neighbours`; the rest follows."""

    @property
    def num_peers(self) -> int: ...

    def neighbours(self, index: int) -> Sequence[int]:
        """The neighbours of one peer, sorted, without itself. Every link counts for both of its ends."""
        ...

    def degree(self, index: int) -> int:
        """The number of neighbours."""
        return len(self.neighbours(index))

    def sample(self, index: int, k: int, rng: np.random.Generator) -> list[int]:
        """`k` different neighbours, uniformly, in the order drawn. ConfigError when there are fewer."""
        neighbours = self.neighbours(index)
        if k > len(neighbours):
            raise ConfigError(f"cannot draw {k} neighbours of p{index}, which has {len(neighbours)}; draw fewer")
        return [neighbours[position] for position in rng.choice(len(neighbours), size=k, replace=False).tolist()]


def build_topology(kind: str, num_peers: int, seed: int, args: Mapping[str, Any]) -> Topology:
    """The topology `kind` with its arguments `args`; the seed decides what is random about it.

    ConfigError: an unknown kind or argument, a number of peers that does not fit, or a graph that is not connected.
    """
    if num_peers < 1:
        raise ConfigError(f"peers = {num_peers} must be at least 1")
    if kind in _OTHER_NAMES:
        known = ", ".join(TOPOLOGIES)
        raise ConfigError(f"unknown topology {kind!r}; did you mean {_OTHER_NAMES[kind]!r}? known: {known}")
    build = TOPOLOGIES.get(kind)
    _check_arguments(kind, build, args)
    topology = _as_topology(kind, build(num_peers, generator(seed, "topology"), **args))
    _check_num_peers(repr(kind), topology.num_peers, num_peers)
    _check_connected(kind, topology)
    return topology


def metropolis_hastings(degree_i: int, degree_j: int) -> float:
    """The weight of a link between peers of these degrees: `1 / (1 + max)`.

    With the rest of each row kept by the peer itself, the matrix is symmetric and doubly stochastic, so averaging
    leads to the uniform mean on any connected graph. Xiao and Boyd, "Fast linear iterations for distributed
    averaging", Systems & Control Letters 2004; as the mixing matrix of D-PSGD, Lian et al., NeurIPS 2017.
    """
    return 1.0 / (1 + max(degree_i, degree_j))


@dataclass(frozen=True, slots=True)
class FullTopology(Topology):
    """Everyone is everyone's neighbour, in constant memory."""

    num_peers: int

    def neighbours(self, index: int) -> Sequence[int]:
        return _AllBut(self.num_peers, index)


class ListedTopology(Topology):
    """Any graph, as one sorted tuple of neighbours per peer."""

    def __init__(self, num_peers: int, links: Iterable[Link]) -> None:
        """A link may be given once or from both ends; one from a peer to itself is dropped."""
        sets: list[set[int]] = [set() for _ in range(num_peers)]
        for one, other in links:
            if one != other:
                sets[one].add(other)
                sets[other].add(one)
        self._neighbours = tuple(tuple(sorted(others)) for others in sets)

    @property
    def num_peers(self) -> int:
        return len(self._neighbours)

    def neighbours(self, index: int) -> Sequence[int]:
        return self._neighbours[index]


class RedrawnTopology(Topology):
    """A graph for each round, and the same ones again after the last. `neighbours` are those of any round."""

    def __init__(self, rounds: Sequence[Topology]) -> None:
        self.rounds = rounds
        ever = [{other for drawn in rounds for other in drawn.neighbours(index)} for index in range(rounds[0].num_peers)]
        self._neighbours = tuple(tuple(sorted(others)) for others in ever)

    @property
    def num_peers(self) -> int:
        return len(self._neighbours)

    def neighbours(self, index: int) -> Sequence[int]:
        return self._neighbours[index]


def redrawn_topology(kind: str, num_peers: int, seed: int, args: Mapping[str, Any], num_rounds: int) -> RedrawnTopology:
    """`build_topology` afresh for each round, with the peers in other places each time; the seed decides."""
    rounds = []
    for round_ in range(1, num_rounds + 1):
        drawn = build_topology(kind, num_peers, derived_seed(seed, "topology", round=round_), args)
        place = generator(seed, "places", round=round_).permutation(num_peers).tolist()
        links = ((place[index], place[other]) for index in range(num_peers) for other in drawn.neighbours(index))
        rounds.append(ListedTopology(num_peers, links))
    return RedrawnTopology(rounds)


Degrees = dict[str, int]
"""Neighbours by name, and how many each of them has."""


def degrees_of(topology: Topology, index: int, names: Sequence[str]) -> tuple[Degrees, list[Degrees] | None]:
    """The neighbours of a peer and, where the graph is redrawn, those of each round."""

    def of(drawn: Topology) -> Degrees:
        return {names[other]: drawn.degree(other) for other in drawn.neighbours(index)}

    return of(topology), [of(drawn) for drawn in topology.rounds] if isinstance(topology, RedrawnTopology) else None


@dataclass(frozen=True, slots=True)
class _AllBut(Sequence[int]):
    """The numbers 0..num_peers-1 without `left_out`, never written out."""

    num_peers: int
    left_out: int

    def __len__(self) -> int:
        return self.num_peers - 1

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: slice) -> list[int]: ...
    def __getitem__(self, position: int | slice) -> int | list[int]:
        if isinstance(position, slice):
            return [self[place] for place in range(*position.indices(len(self)))]
        place = range(len(self))[position]  # IndexError out of range; negative ones count from the end
        return place + (place >= self.left_out)

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and 0 <= index < self.num_peers and index != self.left_out


# ---------------------------------------------------------------------------------------------------------- the kinds

TopologyFunction = Callable[..., "Topology | networkx.Graph"]
"""`f(num_peers, rng, **args)`; `args` are the further keys of the scenario's [topology]."""

TOPOLOGIES: Registry[TopologyFunction] = Registry("topology")

_OTHER_NAMES = {
    "complete": "full",
    "fully_connected": "full",
    "all_to_all": "full",
    "cycle": "ring",
    "lattice": "grid",
    "kreg": "regular",
    "k_regular": "regular",
    "random_regular": "regular",
    "watts_strogatz": "small_world",
    "er": "erdos_renyi",
    "gnp": "erdos_renyi",
    "random": "erdos_renyi",
    "ba": "barabasi_albert",
    "scale_free": "barabasi_albert",
    "ring_of_cliques": "clique_ring",
    "hierarchy": "hierarchical",
    "clustered": "hierarchical",
    "clusters": "hierarchical",
    "edges": "file",
    "graphml": "file",
    "adjacency": "file",
}
"""What others call our kinds: a suggestion in the error, not a second name."""


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
    """Rows and columns, as square as the number of peers divides: 12 are 3 x 4, a prime number is a line."""
    columns = _columns(num_peers)
    right = ((index, index + 1) for index in range(num_peers) if (index + 1) % columns)
    down = ((index, index + columns) for index in range(num_peers - columns))
    return ListedTopology(num_peers, itertools.chain(right, down))


@TOPOLOGIES.register("torus")
def torus(num_peers: int, rng: np.random.Generator) -> Topology:
    """A grid whose rows and columns close into rings; a prime number of peers is one ring."""
    columns = _columns(num_peers)
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

    _check_degree(degree, num_peers)
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
    _check_num_peers(repr(str(path)), found, num_peers)  # before lists are made for as many as a file claims
    return ListedTopology(found, links)


# ------------------------------------------------------------------------------------------- graphs from networkx


def _as_topology(kind: str, built: Topology | networkx.Graph) -> Topology:
    if isinstance(built, FullTopology | ListedTopology):
        return built
    import networkx

    if isinstance(built, networkx.Graph):
        graph = numbered(built)
        return ListedTopology(len(graph), graph.edges())
    if not hasattr(built, "neighbours"):
        raise ConfigError(f"topology {kind!r} returned a {type(built).__name__}; return a Topology or a networkx.Graph instead")
    return built


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


def _check_arguments(kind: str, build: TopologyFunction, args: Mapping[str, Any]) -> None:
    """ConfigError when `args` are not what the builder takes after `num_peers` and `rng`."""
    parameters = list(inspect.signature(build).parameters.values())[2:]
    accepted = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(accepted) == len(parameters):  # no **kwargs that would take anything
        for name in args:
            if name not in accepted:
                raise ConfigError(
                    f"unknown key 'topology.{name}' of topology {kind!r}{did_you_mean(name, accepted)}; "
                    f"accepted: {', '.join(accepted) or 'none'}"
                )
    for parameter in parameters:
        if parameter.name in accepted and parameter.default is parameter.empty and parameter.name not in args:
            raise ConfigError(f"topology.kind = {kind!r} needs topology.{parameter.name}; add it")


def _check_num_peers(source: str, found: int, num_peers: int) -> None:
    if found != num_peers:
        raise ConfigError(f"the topology {source} has {found} peers but peers = {num_peers}; set peers = {found}")


def _check_connected(kind: str, topology: Topology) -> None:
    if isinstance(topology, FullTopology):
        return
    components: list[set[int]] = []
    seen: set[int] = set()
    for index in range(topology.num_peers):
        if index not in seen:
            components.append(_component(topology, index))
            seen |= components[-1]
    if len(components) > 1:
        listed = "; ".join(_peers_text(sorted(component)) for component in components[:4])
        more = f"; and {len(components) - 4} more" if len(components) > 4 else ""
        raise ConfigError(
            f"topology.kind = {kind!r} falls into {len(components)} components that cannot reach each other "
            f"({listed}{more}); add links between them"
        )


def _component(topology: Topology, start: int) -> set[int]:
    """Everyone whom `start` can reach; ends as soon as that is everyone."""
    reached, frontier = {start}, [start]
    while frontier and len(reached) < topology.num_peers:
        fresh = set(topology.neighbours(frontier.pop())) - reached
        reached |= fresh
        frontier += fresh
    return reached


def _peers_text(indices: list[int]) -> str:
    named = " ".join(f"p{index}" for index in indices[:8])
    return named if len(indices) <= 8 else f"{named} ... {len(indices)} in all"


def _check_degree(degree: int, num_peers: int) -> None:
    """A lone peer fits any degree: it has nobody to link to."""
    if _whole("degree", degree) >= num_peers > 1:
        raise ConfigError(
            f"topology.degree = {degree} needs at least {degree + 1} peers, there are {num_peers}; "
            f"lower it to {num_peers - 1} or less"
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


def _columns(num_peers: int) -> int:
    """The longer side of the most square rectangle of `num_peers` places."""
    return next(num_peers // rows for rows in range(math.isqrt(num_peers), 0, -1) if num_peers % rows == 0)
