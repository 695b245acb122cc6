"""Graphs as peers see them: who are the neighbours of one, how many, and a draw of some.

The complete graph is implicit: as lists, one of 10,000 peers would hold 10^8 indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.overlay.graph_files import Link


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
