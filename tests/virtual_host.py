"""Runs of bare vectors under virtual time: the simulator with a training function in place of a model, and a log of all that it
delivers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from gossipfl.aggregation import AGGREGATORS
from gossipfl.learning.cohort import CohortTask
from gossipfl.learning.training import Learner
from gossipfl.overlay.links import Constant, LinksConfig, build_links
from gossipfl.protocol import wire
from gossipfl.protocol.gossip import Gossip, GossipConfig
from gossipfl.protocol.machine import Fault, RoundReport, Traffic
from gossipfl.protocol.messages import Data, Message, Pull
from gossipfl.segments.codecs import codec
from gossipfl.segments.layout import Layout, even_segments
from gossipfl.segments.store import SegmentStore
from gossipfl.simulation.learning import LazyLearning
from gossipfl.simulation.peer import SimulatedPeer, Watcher
from gossipfl.simulation.simulator import Simulator

TrainFunction = Callable[[str, int, np.ndarray], np.ndarray]


def keep(name: str, round_: int, vector: np.ndarray) -> np.ndarray:
    """Training that changes nothing: what is left is the mixing."""
    return vector.copy()


class FunctionCohort:
    """Trains by a function, each peer from a first vector of its own."""

    def __init__(self, train: TrainFunction, size: int) -> None:
        self._train, self.layout = train, Layout.of([("vector", (size,))])

    def initial_vector(self) -> np.ndarray:
        return np.zeros(self.layout.size, np.float32)

    def train(self, tasks: Sequence[CohortTask], out: Sequence[np.ndarray]) -> list[float]:
        for task, trained in zip(tasks, out, strict=True):
            trained[:] = self._train(task.learner.name, task.round, task.vector)
        return [0.0] * len(tasks)

    def evaluate(self, vectors: Sequence[np.ndarray], learners: Sequence[Learner | None]) -> list[float]:
        raise AssertionError("bare vectors have no accuracy")

    def description(self) -> dict[str, Any]:
        return {"kind": "function"}


class Reports(Watcher):
    """What the machines of each peer reported."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[RoundReport]] = {}
        self.faults: dict[str, list[Fault]] = {}

    def round_done(self, peer: SimulatedPeer, report: RoundReport, traffic: Traffic) -> None:
        self.rounds.setdefault(peer.name, []).append(report)

    def fault(self, peer: SimulatedPeer, fault: Fault) -> None:
        self.faults.setdefault(peer.name, []).append(fault)


class VirtualHost(Simulator):
    """A run of `vectors` by name; links have one latency and one rate per directed pair. Other settings are GossipConfig's."""

    def __init__(
        self,
        vectors: Mapping[str, np.ndarray],
        rounds: int,
        *,
        train: TrainFunction = keep,
        train_s: Callable[[str, int], float] = lambda name, round_: 1.0,
        num_segments: int = 4,
        neighbours: Mapping[str, Sequence[str]] | None = None,
        num_samples: Callable[[str], int] = lambda name: 1,
        latency_s: float = 0.01,
        bytes_per_s: float = 1e9,
        loss: float = 0.0,
        chunk_bytes: int = wire.MAX_PAYLOAD_BYTES,
        seed: int = 0,
        aggregation: str = "mean",
        codec_name: str = "float32",
        **config: Any,
    ) -> None:
        names = sorted(vectors)
        cohort = FunctionCohort(train, vectors[names[0]].size)
        segments = tuple(even_segments(cohort.layout, num_segments))
        graph = neighbours or {name: [other for other in names if other != name] for name in names}
        numbers = count(1)
        self.log: list[tuple[float, str, str, Message]] = []
        self.first_pulls: Counter[tuple[Any, ...]] = Counter()
        self.data_frames: Counter[tuple[Any, ...]] = Counter()
        self.payload_bytes: Counter[str] = Counter()
        self.reports = Reports()
        self._pulled: set[int] = set()

        def machine(name: str) -> Gossip:
            settings = GossipConfig(
                rounds=rounds, segments=segments, layout=cohort.layout.digest, num_samples=num_samples(name), seed=seed,
                codec=codec_name, **config,
            )  # fmt: skip
            return Gossip(name, {other: len(graph[other]) for other in graph[name]}, settings, numbers)

        links = LinksConfig(pair=Constant(bytes_per_s), latency=Constant(latency_s), loss=loss)
        self._learning = LazyLearning(
            cohort,
            {name: Learner(name, np.arange(1)) for name in names},
            lambda name: SegmentStore(vectors[name], segments, codec(codec_name), seed, name),
            codec(codec_name),
            AGGREGATORS.get(aggregation),
        )
        super().__init__(
            names,
            machine,
            self._learning,
            codec(codec_name),
            build_links(links, len(names), seed),
            lambda index, round_: train_s(names[index], round_),
            seed=seed,
            watcher=self.reports,
            chunk_bytes=chunk_bytes,
        )
        for name, peer in self.peers.items():
            peer.own = vectors[name].astype(np.float32)
            self.reports.rounds[name], self.reports.faults[name] = [], []

    def kill(self, name: str, at: float, *, silently: bool = False) -> None:
        """Have a peer vanish; silently: its neighbours' connections do not break, it only never answers again."""
        if silently:
            self.clock.at(at, self._silence, self.peers[name])
        else:
            super().kill(name, at)

    def _silence(self, peer: SimulatedPeer) -> None:
        peer.is_there, peer.is_away = False, True
        self._learning.lose(peer)
        self._num_active -= 1

    def run(self, until: float = 1e5) -> VirtualHost:  # type: ignore[override]
        """Until every peer is done or dead. Fails if time runs out, or nothing is left to happen, before that."""
        if self.clock.next_time is None:
            for name in self.peers:
                self.start(name)
        super().run(until)
        rounds = {name: (peer.machine.phase, peer.machine.round) for name, peer in self.peers.items()}
        assert not self._num_active, f"not done at {self.clock.now} s: {rounds}"
        return self

    def models(self) -> dict[str, np.ndarray]:
        return {name: self._learning.vector(peer) for name, peer in self.peers.items() if not peer.is_away}

    def _send(self, peer: SimulatedPeer, to: str, message: Message) -> None:
        if isinstance(message, Pull) and message.request not in self._pulled:
            self._pulled.add(message.request)
            self.first_pulls[peer.name, to, message.version, message.ranges] += 1
        super()._send(peer, to, message)

    def _deliver(self, sender: SimulatedPeer, receiver: SimulatedPeer, message: Message, num_bytes: int) -> None:
        if not sender.is_away and receiver.is_there:
            self.log.append((round(self.clock.now, 9), sender.name, receiver.name, message))
            if isinstance(message, Data):
                frame = sender.name, receiver.name, message.version, message.range, message.offset
                self.data_frames[frame] += 1
                self.payload_bytes[receiver.name] += message.num_bytes
        super()._deliver(sender, receiver, message, num_bytes)
