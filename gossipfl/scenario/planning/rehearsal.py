"""The first rounds of a run, rehearsed: its own machines over its network, under virtual time, without learning.

    rehearsed = rehearse(scenario, topology, layout, [len(shard) for shard in shards])
    rehearsed.total_s, rehearsed.received            # virtual seconds of all rounds; bytes of each peer in one

What happens when, and how many bytes it takes, does not depend on what is learned, so it comes out as in the run itself. Of a
long run the first rounds are taken, and the others to be like them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from gossipfl.learning.training import TrainingConfig
from gossipfl.overlay.topology import Topology
from gossipfl.protocol.machine import RoundReport, Traffic
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.scenario.config import Scenario
from gossipfl.scenario.hosting import peer_settings
from gossipfl.scenario.virtual_peers import VirtualPeers
from gossipfl.segments.codecs import codec
from gossipfl.segments.layout import Layout
from gossipfl.simulation.learning import NoLearning
from gossipfl.simulation.peer import SimulatedPeer, Watcher
from gossipfl.simulation.simulator import Simulator

MIN_ROUNDS, MAX_ROUNDS = 2, 100
"""All begin the first at one time, and the next as they come."""
MESSAGES, MAX_MESSAGES = 50_000, 1_000_000
"""Delivered before `MIN_ROUNDS` are enough, and before any are; 30 us each."""
SLICE = 1_000
"""Of messages, between two looks at how far all are."""
MAX_CHANGES = 10_000
"""Peers that come or go: some may do so for ever without a message."""
LAST_OF_SEVERAL = 0.8
"""Of ten messages there and back, with two uniform delays each, the last has about 1.6 times the greatest delay."""


@dataclass(frozen=True)
class Rehearsed:
    """Means over the rounds rehearsed, of each peer (f64[N])."""

    rounds: int
    """That were rehearsed; 0: in none did anybody get to the end."""
    is_whole: bool
    """Whether these were all rounds of the run."""
    round_s: float
    """Virtual seconds of a round, by the peer that is last in each; joining aside."""
    total_s: float
    total_bytes: int
    """Of payload, of all peers and rounds."""
    received: np.ndarray
    """Bytes of payload a round, as `sent`."""
    sent: np.ndarray
    train_s: np.ndarray
    pair_s: np.ndarray
    """What the slowest pair that a peer is sent by would take alone, as `latency_s`: of the farthest, there and back."""
    slowest: list[int | None]
    """Who sends to each peer over that pair, of several the one that takes longest in all; None where nobody does."""
    latency_s: np.ndarray


def rehearse(scenario: Scenario, topology: Topology, layout: Layout, num_samples: Sequence[int]) -> Rehearsed:
    """As many rounds of the scenario as `MESSAGES` allow. ConfigError for what cannot be built."""
    return _Rehearsal(scenario, topology, layout, num_samples).run()


class _Rehearsal(Watcher):
    def __init__(self, scenario: Scenario, topology: Topology, layout: Layout, num_samples: Sequence[int]) -> None:
        settings, names = peer_settings(scenario), scenario.peer_names
        gossip = GossipSettings(**settings["gossip"])
        self._rounds = min(gossip.rounds, MAX_ROUNDS)
        gossip = replace(gossip, rounds=self._rounds)
        self._scenario, self._links, self._churn = scenario, scenario.build_links(), scenario.build_churn()
        self._peers = VirtualPeers(scenario, topology, gossip, TrainingConfig(**settings["training"]), layout, num_samples)
        self._simulator = Simulator(
            names,
            self._peers.machine,
            NoLearning(layout.size),
            codec(gossip.codec),
            self._links,
            self._peers.train_s,
            seed=scenario.protocol_seed,
            watcher=self,
        )
        self._indices = {name: index for index, name in enumerate(names)}
        self._ends_s: dict[int, float] = {}  # of each round
        self._last_round, self._counts = np.zeros((2, len(names)), np.int64)
        self._received, self._sent, self._pair_s, self._latency_s = np.zeros((4, len(names)))
        self._slowest: list[dict[int, float]] = [defaultdict(float) for _ in names]  # seconds by sender

    def run(self) -> Rehearsed:
        simulator = self._simulator
        self._peers.begin(simulator, self._churn, islice(self._churn.changes(math.inf), MAX_CHANGES))
        while not self._is_enough():
            before = simulator.num_messages
            simulator.run(messages=before + SLICE)
            if simulator.num_messages == before:
                break
        return self._rehearsed()

    def _is_enough(self) -> bool:
        """Of a whole run what comes in after the last rounds counts too, unless there are many neighbours to say goodbye to."""
        messages, rounds = self._simulator.num_messages, self._rounds_of_all()
        if messages < MESSAGES:
            return self._rounds <= rounds < self._scenario.rounds
        return rounds >= MIN_ROUNDS or messages >= MAX_MESSAGES

    def _rounds_of_all(self) -> int:
        """That all have done who are there, or have finished; who came too late for a round never will."""
        peers = [peer for peer in self._simulator.peers.values() if peer.is_there or (peer.is_finished and peer.error is None)]
        return int(min((self._last_round[peer.index] for peer in peers), default=0))

    def round_done(self, peer: SimulatedPeer, report: RoundReport, traffic: Traffic) -> None:
        receiver = peer.index
        self._last_round[receiver] = report.round
        self._ends_s[report.round] = self._simulator.clock.now
        self._counts[receiver] += 1
        self._received[receiver] += sum(traffic.received_from.values())
        pairs_s: dict[int, float] = {}
        latencies_s, jitter_s = [0.0], 2 * LAST_OF_SEVERAL * self._links.jitter_s
        for name, num_bytes in traffic.received_from.items():
            sender = self._indices[name]
            self._sent[sender] += num_bytes
            pairs_s[sender] = num_bytes / self._links.pair(sender, receiver)
            latencies_s.append(self._links.latency(receiver, sender) + self._links.latency(sender, receiver) + jitter_s)
        if pairs_s:
            slowest = max(pairs_s, key=pairs_s.__getitem__)
            self._pair_s[receiver] += pairs_s[slowest]
            self._slowest[receiver][slowest] += pairs_s[slowest]
        self._latency_s[receiver] += max(latencies_s)

    def _rehearsed(self) -> Rehearsed:
        counts, most = np.maximum(self._counts, 1), self._scenario.rounds
        received, rounds = self._received / counts, self._rounds_of_all()
        outside_rounds = sum(sum(peer.traffic.received_from.values()) for peer in self._simulator.peers.values())
        is_whole = rounds >= most
        rounds, first = rounds or max(self._ends_s, default=0), min(self._ends_s, default=0)
        ends_s = round_s = self._ends_s.get(rounds, 0.0)
        if rounds > first:  # which may have begun with waiting for others to join
            round_s = (ends_s - self._ends_s[first]) / (rounds - first)
        return Rehearsed(
            rounds=rounds,
            is_whole=is_whole,
            round_s=round_s,
            total_s=max(self._ends_s.values()) if is_whole else ends_s + (most - rounds) * round_s,
            total_bytes=round(float(self._received.sum() + outside_rounds if is_whole else most * received.sum())),
            received=received,
            sent=self._sent / max(1.0, float(self._counts.mean())),
            train_s=self._peers.usual_train_s,
            pair_s=self._pair_s / counts,
            latency_s=self._latency_s / counts,
            slowest=[max(senders, key=senders.__getitem__, default=None) for senders in self._slowest],
        )
