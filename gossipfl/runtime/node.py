"""The shell of one peer's machine.

A node performs what its machine decides: it sends, serves, assembles, decodes and merges, on the message loop's thread.
Training is somebody else's (`tasks` says when and from which vector), so a peer answers pulls while it trains.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np

from gossipfl.aggregation import AGGREGATORS, Aggregator
from gossipfl.errors import CodecError, ConfigError
from gossipfl.mixing import mix
from gossipfl.protocol import wire
from gossipfl.protocol.baselines import PROTOCOLS
from gossipfl.protocol.gathering import MAX_SAMPLES
from gossipfl.protocol.gossip import Gossip
from gossipfl.protocol.machine import (
    Action,
    Contribution,
    Event,
    Fault,
    Finish,
    Forget,
    Merge,
    Merged,
    PeerDown,
    PeerUp,
    Publish,
    Received,
    Rejected,
    Report,
    RoundReport,
    Send,
    Serve,
    Traffic,
    Train,
    Trained,
)
from gossipfl.protocol.messages import PROMPT_BYTES, Collect, Credit, Data, Later, PeerId, Pull, Record, Refuse
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.runtime.transport import Incoming, Origin, Shared, ZmqTransport
from gossipfl.segments.assembly import Assembler
from gossipfl.segments.buffers import VectorPool
from gossipfl.segments.codecs import Codec, codec
from gossipfl.segments.layout import Layout, Range
from gossipfl.segments.store import SegmentStore

logger = logging.getLogger(__name__)

MAX_ORIGINS = 256
"""Pulls of one neighbour whose connection is remembered until they are answered; the oldest are forgotten first."""
MIN_CHUNK_BYTES = 16 * 1024
"""Of any chunk but a range's last one: progress is to be worth the wait."""
MAX_SERVED = 256
"""Pulls being served at once on one connection; more are refused."""


@dataclass(frozen=True, slots=True)
class TrainTask:
    """Train `node` for `round`, from `vector` (f32[P], to be copied, not written to)."""

    node: Node
    round: int
    vector: np.ndarray
    asked_at: float  # monotonic seconds


@dataclass(frozen=True, slots=True)
class FinishTask:
    """The node has finished with `vector`; `error` says why if it could not take part."""

    node: Node
    vector: np.ndarray
    error: str | None


@dataclass(frozen=True, slots=True)
class RoundDone:
    """A round's report with the traffic of the same time."""

    report: RoundReport
    traffic: Traffic


@dataclass
class Node:
    """One peer: its machine, its vectors and its share of the transport.

    `own` is the newest trained vector; merges write the mixed one, which the next training starts from and takes over (both
    f32[P]).
    """

    machine: Gossip
    store: SegmentStore
    codec: Codec
    aggregate: Aggregator
    initial: np.ndarray
    transport: ZmqTransport
    tasks: SimpleQueue[TrainTask | FinishTask]
    on_record: Callable[[Node, RoundDone | Fault], None] = lambda node, record: None
    collect: Callable[[str], bytes | None] = lambda item: None
    pool: VectorPool = field(init=False)
    own: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.machine.name
        self.pool = VectorPool(self.initial.size)
        self.own = self.initial
        self._mixed: np.ndarray | None = None
        self._assembler = Assembler(self.codec)
        self._chunks: dict[tuple[int, Range], list[Shared]] = {}
        self._origins: dict[PeerId, dict[int, Origin]] = {name: {} for name in self.machine.membership.neighbours}
        self.traffic = Traffic()

    # --- what comes in ------------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Let the machine decide and carry out what it decides, until nothing more follows."""
        events = deque([event])
        while events:
            for action in self.machine.handle(events.popleft(), time.monotonic()):
                following = self._perform(action)
                if following is not None:
                    events.append(following)

    def trained(self, round_: int, vector: np.ndarray) -> None:
        """Take over the vector (f32[P], not to be written to again) that training has come to."""
        self.own = vector
        self.store.publish(round_, vector)
        self.handle(Trained(round_, self.machine.config.num_samples))
        self.store.retain(self.machine.desk.versions)
        for key in [key for key in self._chunks if key[0] not in self.machine.desk.versions]:
            del self._chunks[key]

    def take(self, incoming: Incoming) -> None:
        """A message for this peer: count it, check and decode its payload, and let the machine hear of it."""
        peer, message = incoming.sender, incoming.message
        self.traffic.wire_bytes += incoming.num_bytes
        match message:
            case Data():
                received_from = self.traffic.received_from
                received_from[peer] = received_from.get(peer, 0) + message.num_bytes
                self.handle(self._assemble(peer, message))
                return
            case Pull():
                self._remember(peer, message.request, incoming.origin)
            case Collect():
                self._hand_over(peer, message, incoming.origin)
        self.traffic.control_bytes += incoming.num_bytes
        if not isinstance(message, Collect | Record | Credit):
            self.handle(Received(peer, message))

    def link_up(self, peer: PeerId) -> None:
        """The connection to this peer's endpoint stands."""
        self.handle(PeerUp(peer))

    def link_down(self, peer: PeerId, reason: str) -> None:
        """It broke, or was closed for what it sent."""
        if peer in self.machine.membership.neighbours and reason.startswith("malformed"):
            self._report(Fault(self.machine.round, peer, "malformed", reason))
        self.handle(PeerDown(peer))

    def _assemble(self, peer: PeerId, data: Data) -> Event:
        request = peer, data.request  # nobody completes what was asked of another
        try:
            if not data.is_last and data.num_bytes < MIN_CHUNK_BYTES:
                raise CodecError(f"a chunk of {data.num_bytes} bytes; the least is {MIN_CHUNK_BYTES}")
            decoded = self._assembler.add(request, data.range, data.offset, data.total, data.payload)
            if decoded is None and data.is_last and self._assembler.is_open(request):
                raise CodecError(f"the end of {data.range} does not continue what has come of it")
        except CodecError as error:
            self._assembler.forget(request)
            return Rejected(peer, data.request, str(error))
        chunk = Data(
            data.request,
            data.version,
            data.newest,
            data.num_samples,
            data.range,
            data.offset,
            data.total,
            data.num_bytes,
            decoded,
        )
        return Received(peer, chunk)

    def _remember(self, peer: PeerId, request: int, origin: Origin | None) -> None:
        origins = self._origins.get(peer)
        if origin is None or origins is None:
            return
        origins.setdefault(request, origin)  # who repeats another's pull does not get its answer
        while len(origins) > MAX_ORIGINS:
            del origins[next(iter(origins))]

    # --- what goes out ------------------------------------------------------------------------------------------------

    def _perform(self, action: Action) -> Event | None:
        match action:
            case Send(peer, message):
                if isinstance(message, Pull):
                    self._assembler.expect((peer, message.request), message.ranges)
                if isinstance(message, Later | Refuse):
                    self._answer(peer, message)
                else:
                    self.transport.send(self.name, peer, message)
            case Merge(round_, segment, contributions, own_weight):
                self._merge(segment, contributions, own_weight)
                return Merged(round_, segment)
            case Serve(peer, pull, version):
                self._serve(peer, pull, version)
            case Publish(version):
                mixed = self._take_mixed()
                self.store.publish(version, mixed)
                self._mixed = mixed
            case Forget(peer, request):
                self._assembler.forget((peer, request))
            case Train(round_):
                self.tasks.put(TrainTask(self, round_, self._take_mixed(), time.monotonic()))
            case Report(record):
                self._report(record)
            case Finish(error):
                self.tasks.put(FinishTask(self, self._take_mixed(), error))
        return None

    def _answer(self, peer: PeerId, answer: Later | Refuse) -> None:
        """On the connection that asked."""
        origins = self._origins.get(peer, {})
        origin = origins.get(answer.request)
        if isinstance(answer, Refuse):
            origins.pop(answer.request, None)
        if origin is not None:
            self.transport.send(self.name, peer, answer, origin)

    def _serve(self, peer: PeerId, pull: Pull, version: int) -> None:
        origin = self._origins.get(peer, {}).pop(pull.request, None)
        if origin is None:
            return
        queued = self.transport.bytes_queued(origin, peer, pull.request)
        if queued:  # a repeat of what is on its way already
            self.transport.send(self.name, peer, Later(pull.request, queued), origin)
            return
        newest = self.machine.desk.newest
        if self.transport.num_queued(origin) >= MAX_SERVED:
            self.transport.send(self.name, peer, Refuse(pull.request, self.machine.desk.oldest, newest), origin)
            return
        try:
            encoded = [self._chunks_of(version, range_) for range_ in pull.ranges]
        except CodecError as error:
            self._report(Fault(self.machine.round, peer, "bad_pull", str(error)))
            self.transport.send(self.name, peer, Refuse(pull.request, self.machine.desk.oldest, newest), origin)
            return
        ahead = self.transport.bytes_queued(origin, peer)
        total = sum(self.codec.num_bytes(stop - start) for start, stop in pull.ranges)
        if ahead or total > PROMPT_BYTES:  # the first chunk may be long in coming
            self.transport.send(self.name, peer, Later(pull.request, ahead + total), origin)
        num_samples = self.machine.config.num_samples
        resumed = pull.offset if version == pull.version else 0
        answer = []
        for range_, chunks in zip(pull.ranges, encoded, strict=True):
            size = self.codec.num_bytes(range_[1] - range_[0])
            for index, chunk in enumerate(chunks):
                offset = index * wire.MAX_PAYLOAD_BYTES
                if offset + len(chunk) <= min(resumed, size - 1):
                    continue
                if offset < resumed < size:
                    chunk, offset = self.transport.shared(chunk.buffer[resumed - offset :]), resumed
                answer.append(Data(pull.request, version, newest, num_samples, range_, offset, size, len(chunk), chunk))
            resumed = 0
        self.transport.queue(origin, self.name, peer, answer)

    def _chunks_of(self, version: int, range_: Range) -> list[Shared]:
        """What the encoded range is sent as; made once for a segment, however many pull it."""
        key = version, range_
        if key in self._chunks:
            return self._chunks[key]
        encoded = self.store.encode(version, range_)
        chunks = [self.transport.shared(part) for _, part in wire.parts(encoded)]
        if range_ in self.machine.config.segments:
            self._chunks[key] = chunks
        return chunks

    def _merge(self, segment: int, contributions: tuple[Contribution, ...], own_weight: float) -> None:
        began = time.perf_counter()
        start, stop = self.machine.config.segments[segment]
        copies = [(contribution.payload, contribution.weight) for contribution in contributions]
        if self._mixed is None:
            self._mixed = self.pool.take()
        mix(self.aggregate, self.own[start:stop], own_weight, copies, out=self._mixed[start:stop])
        self.traffic.merge_s += time.perf_counter() - began

    def _take_mixed(self) -> np.ndarray:
        """The vector that the merges have come to; the own one before there are any."""
        mixed, self._mixed = self._mixed, None
        return self.own if mixed is None else mixed

    def _report(self, record: RoundReport | Fault) -> None:
        if isinstance(record, Fault):
            logger.info("%s round %d: %s by %r: %r", self.name, record.round, record.kind, record.peer, record.detail)
            self.on_record(self, record)
        else:
            traffic, self.traffic = self.traffic, Traffic()
            self.on_record(self, RoundDone(record, traffic))

    def _hand_over(self, peer: PeerId, collect: Collect, origin: Origin | None) -> None:
        """Answer a Collect with what is ready: one window's worth of chunks, or that it is not (`total` = -1)."""
        if origin is None or self.transport.num_chunks_queued(origin) >= MAX_SERVED:
            return
        content = self.collect(collect.item)
        if content is None:
            self.transport.queue(origin, self.name, peer, [Record(collect.request, 0, -1, payload=b"")])
            return
        part = memoryview(content)[collect.offset : collect.offset + wire.MAX_PAYLOAD_BYTES]
        self.transport.queue(origin, self.name, peer, [Record(collect.request, collect.offset, len(content), payload=part)])


def build_node(
    name: PeerId,
    degrees: Mapping[PeerId, int],
    settings: GossipSettings,
    layout: Layout,
    initial: np.ndarray,
    num_samples: int,
    transport: ZmqTransport,
    tasks: SimpleQueue[Any],
    schedule: Sequence[Mapping[PeerId, int]] | None = None,
    late: Iterable[PeerId] = (),
    **callbacks: Any,
) -> Node:
    """A peer's machine with its store, ready for an endpoint.

    `degrees`: each neighbour's own number of neighbours; `schedule`: the same for each round, where they change.
    """
    if not isinstance(num_samples, int) or not 1 <= num_samples <= MAX_SAMPLES:
        raise ConfigError(f"num_samples = {num_samples} of {name}; give its number of training samples, 1 to 2^40")
    config = settings.for_peer(layout, num_samples, schedule, late)
    values = codec(settings.codec)
    store = SegmentStore(initial, config.segments, values, settings.seed, name)
    numbers = iter(lambda: 1 + secrets.randbelow(2**61), None)
    machine = PROTOCOLS.get(settings.protocol)(name, degrees, config, numbers)
    return Node(machine, store, values, AGGREGATORS.get(settings.aggregation), initial, transport, tasks, **callbacks)
