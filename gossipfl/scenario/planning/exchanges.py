"""What the peers of each protocol send each other in a round.

Bytes are exact where nothing is lost and everybody stays: R copies of each segment per peer and round, as the codec sends
them, or what else a protocol has in their place. Who sends to whom is drawn as the run itself draws it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gossipfl.overlay.graphs import RedrawnTopology, Topology
from gossipfl.overlay.selection import SELECTORS, Senders
from gossipfl.protocol.baselines import PROTOCOLS, Scheduled
from gossipfl.randomness import generator
from gossipfl.scenario.config import Scenario

MAX_FLOWS = 5_000_000
"""Transfers of one round that are followed one by one."""
NAMED_PEERS = 1_000
"""Up to so many, neighbours are drawn from in the order of their names, as the run does; of more, the chances are the same."""


@dataclass(frozen=True, slots=True)
class Flows:
    """`num_bytes` (f64[n]) go from `senders` to `receivers` (i64[n])."""

    senders: np.ndarray
    receivers: np.ndarray
    num_bytes: np.ndarray


class Exchange(ABC):
    """What the peers of a run send each other in a round."""

    is_waited_for = True
    """Whether a round ends when all has come."""
    received: np.ndarray
    """Bytes of each peer (f64[N]), as `sent`: what is expected, the mean over the rounds."""
    sent: np.ndarray
    max_flows: float
    """Transfers of one round, at most."""

    @abstractmethod
    def flows(self, round_: int) -> list[Flows]:
        """What is sent in a round, in phases; each begins when its senders have done the one before."""

    @property
    def can_be_followed(self) -> bool:
        return self.max_flows <= MAX_FLOWS


def exchange_of(scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> Exchange | None:
    """What the scenario's protocol exchanges; `segment_bytes` (i64[S]) as sent. None where the protocol is the user's own."""
    made = _EXCHANGES.get(scenario.gossip.protocol)
    return None if made is None else made(scenario, topology, segment_bytes)


class _Gossip(Exchange):
    """R copies of each segment from neighbours drawn afresh, or one from every neighbour."""

    def __init__(self, scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> None:
        self.scenario, self.segment_bytes = scenario, segment_bytes
        takes_all = scenario.gossip.selection == "all"
        self._graphs = topology.rounds if isinstance(topology, RedrawnTopology) else [topology]
        self._candidates: tuple[int, list[Sequence[int]]] = (-1, [])  # of the graph of this number
        self.received, self.sent = np.zeros(scenario.peers), np.zeros(scenario.peers)
        self.max_flows = 0.0
        for graph in self._graphs:
            degrees = np.array([graph.degree(index) for index in range(scenario.peers)], np.float64)
            copies = degrees if takes_all else np.minimum(degrees, scenario.gossip.replicas)
            received = copies * segment_bytes.sum()
            self.received += received / len(self._graphs)
            self.sent += self._expected_sent(graph, degrees, received) / len(self._graphs)
            self.max_flows = max(self.max_flows, float((degrees if takes_all else copies * len(segment_bytes)).sum()))

    def flows(self, round_: int) -> list[Flows]:
        gossip, num_peers = self.scenario.gossip, self.scenario.peers
        select = SELECTORS.get("all" if gossip.selection == "all" else "uniform")  # others choose by what they have seen
        pairs: list[tuple[int, int, float]] = []
        candidates = self._candidates_of(round_)
        for index in range(num_peers):
            neighbours = candidates[index]
            rng = generator(self.scenario.protocol_seed, "neighbours", f"p{index}", round_)
            for size in self.segment_bytes if gossip.selection != "all" else [self.segment_bytes.sum()]:
                chosen = select(neighbours, gossip.replicas, {}, rng)  # type: ignore[arg-type]  # numbers, in place of names
                pairs += [(int(sender), index, float(size)) for sender in chosen]
        return [_summed(pairs, num_peers)]

    def _candidates_of(self, round_: int) -> list[Sequence[int]]:
        """The neighbours of each peer in this round."""
        number = (round_ - 1) % len(self._graphs)
        if self._candidates[0] != number:
            neighbours = map(self._graphs[number].neighbours, range(self.scenario.peers))
            in_order = self.scenario.peers > NAMED_PEERS
            self._candidates = number, [others if in_order else sorted(others, key=str) for others in neighbours]  # p10, p2
        return self._candidates[1]

    def _expected_sent(self, graph: Topology, degrees: np.ndarray, received: np.ndarray) -> np.ndarray:
        share = np.divide(received, degrees, out=np.zeros_like(degrees), where=degrees > 0)
        if degrees.min() == degrees.max():
            return received
        return np.array([share[list(graph.neighbours(index))].sum() for index in range(len(degrees))])


def _summed(transfers: Sequence[tuple[int, int, float]], num_peers: int) -> Flows:
    """Transfers (sender, receiver, bytes), those of a pair together."""
    senders, receivers, num_bytes = (
        (np.array(column) for column in zip(*transfers, strict=True)) if transfers else [np.empty(0)] * 3
    )
    pairs, places = np.unique(senders.astype(np.int64) * num_peers + receivers.astype(np.int64), return_inverse=True)
    return Flows(pairs // num_peers, pairs % num_peers, np.bincount(places, num_bytes, pairs.size))


class _FedAvg(Exchange):
    """The first peer takes in the models of all the others and hands out their average."""

    def __init__(self, scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> None:
        self.num_clients = scenario.peers - 1
        self.model_bytes = float(segment_bytes.sum())
        self.received = np.full(scenario.peers, self.model_bytes)
        self.received[0] *= self.num_clients
        self.sent = self.received
        self.max_flows = 2.0 * self.num_clients

    def flows(self, round_: int) -> list[Flows]:
        clients, server = np.arange(1, self.num_clients + 1), np.zeros(self.num_clients, np.int64)
        models = np.full(self.num_clients, self.model_bytes)
        return [Flows(clients, server, models), Flows(server, clients, models)]


class _Local(Exchange):
    """Nobody sends anything."""

    def __init__(self, scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> None:
        self.received = self.sent = np.zeros(scenario.peers)
        self.max_flows = 0.0

    def flows(self, round_: int) -> list[Flows]:
        return []


class _Scheduled(Exchange):
    """Who sends to whom is drawn for everybody at once, as the run draws it."""

    def __init__(self, scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> None:
        self.scenario, self.segment_bytes = scenario, segment_bytes
        machine = PROTOCOLS.get(scenario.gossip.protocol)
        assert isinstance(machine, type) and issubclass(machine, Scheduled)
        self._schedule = machine._schedule
        copies = np.mean([len(senders) for senders in self._drawn(1).values()])  # of all peers it is the same in each round
        self.received = self.sent = np.full(scenario.peers, copies * segment_bytes.sum())
        self.max_flows = float(scenario.peers * copies * len(segment_bytes))

    def flows(self, round_: int) -> list[Flows]:
        rng = generator(self.scenario.protocol_seed, "schedule", round=round_)
        names = sorted(self.scenario.peer_names)
        pairs = [
            (int(sender[1:]), int(receiver[1:]), float(size))
            for size in self.segment_bytes
            for receiver, senders in self._schedule(names, self.scenario.gossip.replicas, rng).items()
            for sender in senders
        ]
        return [_summed(pairs, self.scenario.peers)]

    def _drawn(self, round_: int) -> Senders:
        """For the first segment."""
        rng = generator(self.scenario.protocol_seed, "schedule", round=round_)
        return self._schedule(sorted(self.scenario.peer_names), self.scenario.gossip.replicas, rng)


class _Fragments(_Gossip):
    """What comes while a peer trains is mixed, and nobody waits: at most this much, from the second round on."""

    is_waited_for = False

    def __init__(self, scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> None:
        super().__init__(scenario, topology, segment_bytes)
        share = (scenario.rounds - 1) / scenario.rounds
        self.received, self.sent = self.received * share, self.sent * share

    def flows(self, round_: int) -> list[Flows]:
        return []


_EXCHANGES: dict[str, Callable[[Scenario, Topology, np.ndarray], Exchange]] = {
    "gossip": _Gossip,
    "fedavg": _FedAvg,
    "local": _Local,
    "epidemic": _Scheduled,
    "epidemic_oracle": _Scheduled,
    "pairs": _Scheduled,
    "fragments": _Fragments,
}
