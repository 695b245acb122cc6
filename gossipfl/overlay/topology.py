"""The topology: an undirected, connected graph whose edges say which peers are neighbours.

    topology = build_topology("regular", num_peers=16, seed=0, args={"degree": 4})
    topology.neighbours(3)             # the sorted indices of the neighbours of p3
    topology.sample(3, k=2, rng=rng)   # two different ones, drawn uniformly

A function of one's own, named as `package.module:function` in a scenario, may return a `Topology` or a networkx graph:

    def pairs(num_peers, rng, *, hops=1): ...   # what stands after the `*` are the keys of [topology]
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gossipfl.errors import ConfigError
from gossipfl.overlay.graph_files import numbered
from gossipfl.overlay.graphs import FullTopology, ListedTopology, RedrawnTopology, Topology
from gossipfl.overlay.topology_kinds import TOPOLOGIES, TopologyFunction, check_num_peers
from gossipfl.randomness import derived_seed, generator
from gossipfl.registry import did_you_mean

if TYPE_CHECKING:
    import networkx

_OTHER_NAMES = {
    "complete": "full",
    "fully_connected": "full",
    "all_to_all": "full",
    "mesh": "full",
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
    "exp": "exponential",
    "edges": "file",
    "graphml": "file",
    "adjacency": "file",
}
"""What others call our kinds: a suggestion in the error, not a second name."""


def build_topology(kind: str, num_peers: int, seed: int, args: Mapping[str, Any]) -> Topology:
    """The topology `kind` with its arguments `args`; the seed decides what is random about it.

    ConfigError: an unknown kind or argument, a number of peers that does not fit, or a graph that is not connected.
    """
    if num_peers < 1:
        raise ConfigError(f"peers = {num_peers} must be at least 1")
    if (ours := _OTHER_NAMES.get(kind.replace("-", "_"))) is not None:
        raise ConfigError(f"unknown topology {kind!r}; did you mean {ours!r}? known: {', '.join(TOPOLOGIES)}")
    build = TOPOLOGIES.get(kind)
    _check_arguments(kind, build, args)
    topology = _as_topology(kind, build(num_peers, generator(seed, "topology"), **args))
    check_num_peers(repr(kind), topology.num_peers, num_peers)
    _check_connected(kind, topology)
    return topology


def redrawn_topology(kind: str, num_peers: int, seed: int, args: Mapping[str, Any], num_rounds: int) -> RedrawnTopology:
    """`build_topology` afresh for each round, with the peers in other places each time; the seed decides."""
    return RedrawnTopology([topology_of_round(kind, num_peers, seed, args, round_) for round_ in range(1, num_rounds + 1)])


def topology_of_round(kind: str, num_peers: int, seed: int, args: Mapping[str, Any], round_: int) -> Topology:
    """One of the graphs of `redrawn_topology`."""
    drawn = build_topology(kind, num_peers, derived_seed(seed, "topology", round=round_), args)
    place = generator(seed, "places", round=round_).permutation(num_peers).tolist()
    links = ((place[index], place[other]) for index in range(num_peers) for other in drawn.neighbours(index))
    return ListedTopology(num_peers, links)


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
    try:
        inspect.signature(build).bind(1, None, **args)
    except TypeError as error:
        raise ConfigError(f"topology {kind!r}: {error}; it is called as f(num_peers, rng, **args)") from error


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
