"""A small virtual-time host: drives the machines of one run as the real shell does, with lossy, slow or broken links.

Links are per ordered pair: control messages take `latency_s`; chunks queue and take their bytes over `bytes_per_s` more.
Everything that comes by chance comes from one seed.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gossipfl.aggregation import AGGREGATORS
from gossipfl.protocol import wire
from gossipfl.protocol.gossip import Gossip, GossipConfig, Phase
from gossipfl.protocol.messages import (
    Data,
    Event,
    Fault,
    Finish,
    Forget,
    Later,
    Merge,
    Merged,
    Message,
    PeerDown,
    Pull,
    Received,
    Report,
    RoundReport,
    Send,
    Serve,
    Start,
    Train,
    Trained,
    Wake,
)  # fmt: skip
from gossipfl.segments.assembly import Assembler
from gossipfl.segments.codecs import codec
from gossipfl.segments.layout import Layout, even_segments
from gossipfl.segments.mixing import mix
from gossipfl.segments.store import SegmentStore

TrainFunction = Callable[[str, int, np.ndarray], np.ndarray]


def keep(name: str, round_: int, vector: np.ndarray) -> np.ndarray:
    """Training that changes nothing: what is left is the mixing."""
    return vector.copy()


@dataclass
class VirtualPeer:
    machine: Gossip
    vector: np.ndarray  # mixed, to train from
    store: SegmentStore
    assembler: Assembler
    trained: np.ndarray | None = None
    is_started: bool = False
    is_dead: bool = False
    error: str | None = None
    reports: list[RoundReport] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    wake_at: float | None = None

    @property
    def is_done(self) -> bool:
        return self.machine.phase is Phase.DONE


class VirtualHost:
    def __init__(
        self,
        vectors: dict[str, np.ndarray],
        rounds: int,
        *,
        train: TrainFunction = keep,
        train_s: Callable[[str, int], float] = lambda name, round_: 1.0,
        num_segments: int = 4,
        neighbours: dict[str, list[str]] | None = None,
        num_samples: Callable[[str], int] = lambda name: 1,
        latency_s: float = 0.01,
        bytes_per_s: float = 1e9,
        loss: float = 0.0,
        chunk_bytes: int = wire.MAX_PAYLOAD_BYTES,
        seed: int = 0,
        aggregation: str = "mean",
        codec_name: str = "float32",
        **config: object,
    ) -> None:
        self.now = 0.0
        self.train, self.train_s, self.latency_s, self.bytes_per_s = train, train_s, latency_s, bytes_per_s
        self.loss, self.chunk_bytes, self.chance = loss, chunk_bytes, random.Random(seed)
        self.aggregate = AGGREGATORS.get(aggregation)
        self.log: list[tuple] = []  # every message delivered
        self.first_pulls: Counter = Counter()
        self.data_frames: Counter = Counter()
        self.payload_bytes: Counter = Counter()
        self._events: list = []
        self._ticket = itertools.count()
        self._queues: dict[tuple[str, str], list[tuple[int, Data]]] = {}
        size = next(iter(vectors.values())).size
        layout = Layout.of([("vector", (size,))])
        segments = tuple(even_segments(layout, num_segments))
        names = sorted(vectors)
        graph = neighbours or {name: [other for other in names if other != name] for name in names}
        self.peers: dict[str, VirtualPeer] = {}
        for name in names:
            settings = GossipConfig(
                rounds=rounds, segments=segments, layout=layout.digest, num_samples=num_samples(name), seed=seed,
                codec=codec_name, **config,
            )  # fmt: skip
            machine = Gossip(name, {other: len(graph[other]) for other in graph[name]}, settings)
            store = SegmentStore(vectors[name], segments, codec(codec_name), seed, name)
            self.peers[name] = VirtualPeer(machine, vectors[name].copy(), store, Assembler(codec(codec_name)))

    # --- what a test does ---------------------------------------------------------------------------------------------

    def start(self, name: str, at: float = 0.0) -> None:
        def begin() -> None:
            self.peers[name].is_started = True
            self._handle(name, Start())

        self._at(at, begin)

    def kill(self, name: str, at: float, *, silently: bool = False) -> None:
        def die() -> None:
            self.peers[name].is_dead = True
            if not silently:
                self._disconnect(name)

        self._at(at, die)

    def run(self, until: float = 1e5) -> VirtualHost:
        """Until every peer is done or dead. Fails if nothing is left to happen before that, or if time runs out."""
        if not self._events:
            for name in self.peers:
                self.start(name)
        while not all(peer.is_done or peer.is_dead for peer in self.peers.values()):
            assert self._events, f"stuck at {self.now}: {[(n, p.machine.phase) for n, p in self.peers.items()]}"
            self.now, _, act = heapq.heappop(self._events)
            assert self.now <= until, f"not done at {until} s: {[(n, p.machine.round) for n, p in self.peers.items()]}"
            act()
        return self

    def models(self) -> dict[str, np.ndarray]:
        return {name: peer.vector for name, peer in self.peers.items() if not peer.is_dead}

    def _disconnect(self, name: str) -> None:
        for other in self.peers:
            self._at(self.now + self.latency_s, lambda other=other: self._handle(other, PeerDown(name)))

    # --- the shell ----------------------------------------------------------------------------------------------------

    def _at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._ticket), act))

    def _handle(self, name: str, event: Event) -> None:
        peer = self.peers[name]
        if peer.is_dead:
            return
        for action in peer.machine.handle(event, self.now):
            self._perform(name, peer, action)
        deadline = peer.machine.next_deadline
        if deadline is not None and deadline != peer.wake_at:
            peer.wake_at = deadline
            self._at(max(deadline, self.now), lambda: self._wake(name, deadline))

    def _wake(self, name: str, deadline: float) -> None:
        peer = self.peers[name]
        if peer.wake_at == deadline:
            peer.wake_at = None
            self._handle(name, Wake())

    def _perform(self, name: str, peer: VirtualPeer, action: object) -> None:
        match action:
            case Train(round_):
                self._at(self.now + self.train_s(name, round_), lambda: self._trained(name, round_))
            case Send(to, message):
                if isinstance(message, Pull):
                    if message.request not in peer.assembler._asked:
                        self.first_pulls[name, to, message.version, message.ranges] += 1
                    peer.assembler.expect(message.request, message.ranges)
                self._send(name, to, message)
            case Serve(to, pull, version):
                self._serve(name, peer, to, pull, version)
            case Merge(round_, segment, contributions, own_weight):
                start, stop = peer.machine.config.segments[segment]
                own = peer.trained if peer.trained is not None else peer.vector
                copies = [(contribution.payload, contribution.weight) for contribution in contributions]
                mix(self.aggregate, own[start:stop], own_weight, copies, out=peer.vector[start:stop])
                self._at(self.now, lambda: self._handle(name, Merged(round_, segment)))
            case Forget(_, request):
                peer.assembler.forget(request)
            case Report(record):
                (peer.faults if isinstance(record, Fault) else peer.reports).append(record)
            case Finish(error):
                peer.error = error
                self._disconnect(name)

    def _trained(self, name: str, round_: int) -> None:
        peer = self.peers[name]
        if not peer.is_dead:
            peer.trained = self.train(name, round_, peer.vector).astype(np.float32)
            peer.store.publish(round_, peer.trained)
            self._handle(name, Trained(round_, peer.machine.config.num_samples))
            peer.store.retain(peer.machine.desk.versions)

    def _send(self, sender: str, to: str, message: Message) -> None:
        if to in self.peers and self.chance.random() >= self.loss:
            self._at(self.now + self.latency_s, lambda: self._deliver(sender, to, message))

    def _deliver(self, sender: str, to: str, message: Message) -> None:
        receiver = self.peers[to]
        if self.peers[sender].is_dead or receiver.is_dead or receiver.is_done or not receiver.is_started:
            return
        payload = message.payload if isinstance(message, Data) else b""
        message = wire.decode([wire.encode(1, sender, to, message), payload]).message
        self.log.append((round(self.now, 9), sender, to, message))
        if isinstance(message, Data):
            self.data_frames[sender, to, message.version, message.range, message.offset] += 1
            self.payload_bytes[to] += message.num_bytes
            chunk = memoryview(message.payload)
            decoded = self.peers[to].assembler.add(message.request, message.range, message.offset, message.total, chunk)
            message = dataclasses.replace(message, payload=decoded)
        self._handle(to, Received(sender, message))

    def _serve(self, name: str, peer: VirtualPeer, to: str, pull: Pull, version: int) -> None:
        queue = self._queues.setdefault((name, to), [])
        bytes_queued = sum(data.num_bytes for _, data in queue)
        if any(request == pull.request for request, _ in queue):
            self._send(name, to, Later(pull.request, bytes_queued))
            return
        chunks = []
        for index, range_ in enumerate(pull.ranges):
            encoded = bytes(peer.store.encode(version, range_))
            first = pull.offset if index == 0 and version == pull.version else 0
            for offset in range(first, len(encoded), self.chunk_bytes):
                part = encoded[offset : offset + self.chunk_bytes]
                newest, samples = peer.machine.desk.newest, peer.machine.config.num_samples
                chunks.append(Data(pull.request, version, newest, samples, range_, offset, len(encoded), len(part), part))
        self._send(name, to, Later(pull.request, bytes_queued + sum(data.num_bytes for data in chunks)))
        queue += [(pull.request, data) for data in chunks]
        if not bytes_queued:
            self._transmit(name, to)

    def _transmit(self, sender: str, to: str) -> None:
        queue = self._queues[sender, to]
        if queue:
            _, data = queue[0]

            def sent() -> None:
                queue.pop(0)
                if not self.peers[sender].is_dead:
                    self._send(sender, to, data)
                    self._transmit(sender, to)

            self._at(self.now + data.num_bytes / self.bytes_per_s, sent)
