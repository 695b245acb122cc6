"""What a topology is like: its degrees, how far peers are apart, and how fast averaging with neighbours brings them together.

    figures = measure(build_topology("regular", num_peers=16, seed=0, args={"degree": 4}))
    figures.diameter, figures.spectral_gap, figures.rounds_to_tenth

Exact up to `EXACT_PEERS` peers and for the complete graph; of more, distances and clustering are those of a sample of peers,
and the spectral gap may be only a bound. The figures say which.

The mixing matrix W has Metropolis-Hastings weights: 1 / (1 + the larger degree) for each link, and the rest of each row for the
peer itself (Xiao and Boyd, "Fast linear iterations for distributed averaging", Systems & Control Letters 2004). One round in
which everyone averages with all neighbours shrinks the distance of the peers from their mean to at most max(|lambda_2|,
|lambda_n|) of what it was; the spectral gap is 1 minus that (Boyd, Ghosh, Prabhakar and Shah, "Randomized gossip algorithms",
IEEE Trans. Inf. Theory 2006; Lian et al., NeurIPS 2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gossipfl.overlay.graphs import FullTopology, RedrawnTopology, Topology
from gossipfl.randomness import generator

EXACT_PEERS = 2_000
"""All eigenvalues of a matrix of so many rows take 7 s; they are needed only where the gap is tiny, as in a ring."""
DENSE_PEERS = 500
"""Up to so many they take less than 0.2 s."""
SAMPLED_PEERS = 256
LANCZOS_STEPS = 200
MEASURED_ROUNDS = 10
"""Of a topology that is redrawn in each."""

Neighbours = list[Sequence[int]]
"""Of each peer."""


@dataclass(frozen=True, slots=True)
class GraphFigures:
    """The figures of one topology. `num_sampled`: the peers whose distances and clustering were measured."""

    num_peers: int
    num_links: int
    degree_min: int
    degree_mean: float
    degree_max: int
    diameter: int  # links on the longest of the shortest paths; at least so many, where peers are sampled
    path_mean: float  # links on the shortest path between two peers
    clustering: float  # share of a peer's pairs of neighbours that are linked, mean over peers
    spectral_gap: float
    is_gap_exact: bool  # to a thousandth; else the gap is at most so large
    num_sampled: int
    rounds: tuple[GraphFigures, ...] = ()  # where the graph is redrawn: of the first rounds; the figures above are round 1's

    @property
    def spectral_gap_mean(self) -> float:
        """Over the rounds."""
        return float(np.mean([figures.spectral_gap for figures in self.rounds or (self,)]))

    @property
    def is_sampled(self) -> bool:
        return self.num_sampled < self.num_peers

    @property
    def rounds_to_tenth(self) -> float:
        """Rounds of averaging with all neighbours after which the peers are ten times closer to their mean; a bound where the
        graph is redrawn, for what one round leaves apart another may bring together."""
        gaps = [figures.spectral_gap for figures in self.rounds or (self,)]
        if max(gaps) >= 1:
            return 1.0  # at once, and wholly
        return max(1.0, -math.log(10) / float(np.mean(np.log1p(np.negative(gaps)))))


def measure(topology: Topology) -> GraphFigures:
    """The figures of a connected topology; the same whenever they are asked for. Of one that is redrawn, round by round."""
    if isinstance(topology, RedrawnTopology):
        rounds = tuple(map(measure, topology.rounds[:MEASURED_ROUNDS]))
        return replace(rounds[0], rounds=rounds)
    num_peers = topology.num_peers
    if isinstance(topology, FullTopology):
        degree, links = num_peers - 1, num_peers * (num_peers - 1) // 2
        apart, clustering = min(1, degree), float(num_peers > 2)
        return GraphFigures(
            num_peers, links, degree, float(degree), degree, apart, float(apart), clustering, 1.0, True, num_peers
        )
    neighbours = [topology.neighbours(index) for index in range(num_peers)]
    degrees = np.array([len(others) for others in neighbours])
    sample = _sample(num_peers)
    diameter, path_mean = _distances(neighbours, sample)
    gap, is_exact = _spectral_gap(neighbours, degrees)
    return GraphFigures(
        num_peers=num_peers,
        num_links=int(degrees.sum()) // 2,
        degree_min=int(degrees.min()),
        degree_mean=float(degrees.mean()),
        degree_max=int(degrees.max()),
        diameter=diameter,
        path_mean=path_mean,
        clustering=_clustering(neighbours, sample),
        spectral_gap=gap,
        is_gap_exact=is_exact,
        num_sampled=len(sample),
    )


def _sample(num_peers: int) -> list[int]:
    if num_peers <= EXACT_PEERS:
        return list(range(num_peers))
    rng = generator(0, "graph figures")
    return sorted(rng.choice(num_peers, SAMPLED_PEERS, replace=False).tolist())


def _distances(neighbours: Neighbours, sources: list[int]) -> tuple[int, float]:
    """The greatest and the mean number of links from `sources` to the other peers.

    Breadth first from all sources together: bit b of `reached[i]` says that source b reaches peer i.
    """
    reached = [0] * len(neighbours)
    fresh = {source: 1 << bit for bit, source in enumerate(sources)}
    for source, bits in fresh.items():
        reached[source] = bits
    diameter = total = 0
    while True:
        arriving: dict[int, int] = {}
        for index, bits in fresh.items():
            for other in neighbours[index]:
                arriving[other] = arriving.get(other, 0) | bits
        fresh = {index: new for index, bits in arriving.items() if (new := bits & ~reached[index])}
        if not fresh:
            return diameter, total / max(1, len(sources) * (len(neighbours) - 1))
        diameter += 1
        for index, bits in fresh.items():
            reached[index] |= bits
            total += diameter * bits.bit_count()


def _clustering(neighbours: Neighbours, sample: list[int]) -> float:
    """Watts and Strogatz, Nature 1998; a peer with fewer than two neighbours counts as 0."""
    shares = []
    for index in sample:
        near = set(neighbours[index])
        pairs = len(near) * (len(near) - 1)
        shares.append(sum(len(near.intersection(neighbours[other])) for other in near) / pairs if pairs else 0.0)
    return float(np.mean(shares))


def _spectral_gap(neighbours: Neighbours, degrees: np.ndarray) -> tuple[float, bool]:
    """The gap, and whether it is exact."""
    num_peers = len(degrees)
    ends = np.repeat(np.arange(num_peers), degrees), np.concatenate([np.asarray(others, np.int64) for others in neighbours])
    weights = 1.0 / (1 + np.maximum(degrees[ends[0]], degrees[ends[1]]))
    kept = 1.0 - np.bincount(ends[0], weights, num_peers)
    if num_peers > DENSE_PEERS:
        gap, is_exact = _lanczos_gap(ends, weights, kept)
        if is_exact or num_peers > EXACT_PEERS:
            return gap, is_exact
    matrix = np.diag(kept)
    matrix[ends] = weights
    others = np.linalg.eigvalsh(matrix)[:-1]  # rising: the last one is 1, of the mean itself
    return 1.0 - float(np.abs(others).max(initial=0.0)), True


def _lanczos_gap(ends: tuple[np.ndarray, np.ndarray], weights: np.ndarray, kept: np.ndarray) -> tuple[float, bool]:
    """The same from a Krylov space beside the mean (Golub and Van Loan, Matrix Computations, section 10.1).

    Its eigenvalues lie within those of the matrix, so what has not converged makes the gap too large.
    """
    basis = np.zeros((LANCZOS_STEPS + 1, kept.size))
    inner = np.zeros((LANCZOS_STEPS + 1, LANCZOS_STEPS + 1))  # tridiagonal: the matrix in this basis
    vector = generator(0, "lanczos").standard_normal(kept.size)
    vector -= vector.mean()
    basis[0] = vector / np.linalg.norm(vector)
    for step in range(LANCZOS_STEPS):
        vector = kept * basis[step] + np.bincount(ends[0], weights * basis[step][ends[1]], kept.size)
        inner[step, step] = vector @ basis[step]
        for _ in range(2):  # once leaves rounding errors along the basis, which come back as copies of eigenvalues
            vector -= (basis[: step + 1] @ vector) @ basis[: step + 1]
            vector -= vector.mean()
        beside = float(np.linalg.norm(vector))
        if step % 20 == 19 or beside < 1e-12:
            values, vectors = np.linalg.eigh(inner[: step + 1, : step + 1])
            largest = int(np.abs(values).argmax())
            gap = 1.0 - abs(float(values[largest]))
            if beside * abs(float(vectors[-1, largest])) < 1e-3 * gap:
                return gap, True
        inner[step, step + 1] = inner[step + 1, step] = beside
        basis[step + 1] = vector / beside
    return gap, False
