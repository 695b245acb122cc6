"""An emulated network around real sockets, in user space: what peers send each other is as fast, late and unreliable as the
scenario says, without root and whatever the machine really manages.

    emulation = Emulation(("p0", "p1"), seed=0, links=links, devices=None)
    transport = ShapedTransport("tcp://127.0.0.1:0", run=run, emulation=emulation)     # drives like a ZmqTransport

The sharing of capacities follows the virtual clock's, max-min fair (`simulation/network.py`), with nobody who sees it all:

    uplink     at the sender: what it sends each peer is a flow, and all its flows leave as a fluid, at max-min fair rates
    pair       bounds the rate of the flow
    latency    a chunk is put on the socket when its last byte has left, and the latency with its jitter is over
    loss       ... or never
    downlink   at the receiver: chunks are let through one by one at its rate, by start-time fair queueing (P. Goyal, H. Vin,
               H. Cheng, SIGCOMM 1996), as if each had come in while it left its sender
    window     a flow rests while its receiver has a window of it that is not let through: others have the uplink meanwhile.
               Flow control by credits over fair queues comes to max-min fair rates (E. Hahne, IEEE JSAC 9(7), 1991)

Credits are the emulation's own: never late, never lost. Messages without payload take latency and loss, and no capacity.
Peers are shaped one by one, also those of one process. Nothing sleeps: `receive` waits until the next thing is due.
"""

from __future__ import annotations

import errno
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np
import zmq

from gossipfl.overlay.devices import Devices
from gossipfl.overlay.links import Change, Constant, Links, PairValues
from gossipfl.protocol.messages import Chunk, Credit, Data, Message, PeerId, Record
from gossipfl.protocol.wire import MAX_PAYLOAD_BYTES
from gossipfl.randomness import generator
from gossipfl.runtime.transport import MAX_WINDOW_BYTES, Happening, Inbound, Incoming, Link, Origin, ZmqTransport

WINDOW_S = 0.05
"""Of a downlink's capacity that a flow may have there, not yet let through: what scheduling may delay a credit by."""
CREDIT_BYTES = MAX_PAYLOAD_BYTES // 2
"""Let through before they are credited, together: a quarter of the least window."""
_NO_WINDOW = 2**60
"""Bytes that the transport may have on a connection, where the window is the flow's."""


# ---------------------------------------------------------------------------------------------------------- what is emulated


@dataclass(frozen=True)
class Emulation:
    """What is emulated around peers: the links and the devices of all, `names[i]` having those of index i."""

    names: Sequence[PeerId]
    seed: int
    links: Links | None = None
    devices: Devices | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; matrices where pairs differ."""
        return {
            "names": list(self.names),
            "seed": self.seed,
            "links": self.links and _plain_links(self.links),
            "devices": self.devices
            and {"step_s": self.devices.step_s.tolist(), "variation": self.devices.variation, "seed": self.seed},
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> Emulation:
        links, devices = values["links"], values["devices"]
        if devices is not None:
            devices = Devices(np.array(devices["step_s"]), devices["variation"], devices["seed"])
        return Emulation(values["names"], values["seed"], links and _links(links, len(values["names"])), devices)


def _plain_links(links: Links) -> dict[str, Any]:
    return {
        "uplink": links.uplink.tolist(),
        "downlink": links.downlink.tolist(),
        "pair": _plain(links.pair, links.num_peers),
        "latency": _plain(links.latency, links.num_peers),
        "jitter_s": links.jitter_s,
        "loss": links.loss,
        "changes": [(change.time_s, change.index, change.uplink, change.downlink) for change in links.changes],
        "repeats": links.repeats,
    }


def _plain(values: Callable[[int, int], float], num_peers: int) -> float | list[list[float]]:
    rows = [[values(sender, receiver) for receiver in range(num_peers)] for sender in range(num_peers)]
    first = rows[0][0]
    return first if all(value == first for row in rows for value in row) else rows


def _links(values: dict[str, Any], num_peers: int) -> Links:
    pair, latency = (
        PairValues(np.array(given) if isinstance(given, list) else Constant(given), num_peers)
        for given in (values["pair"], values["latency"])
    )
    return Links(
        np.array(values["uplink"]),
        np.array(values["downlink"]),
        pair,
        latency,
        jitter_s=values["jitter_s"],
        loss=values["loss"],
        changes=[Change(*change) for change in values["changes"]],
        repeats=values["repeats"],
    )


# ------------------------------------------------------------------------------------------------------- shares of capacity


@dataclass(eq=False, slots=True)
class Flow:
    """What one peer sends another on one connection, chunk behind chunk."""

    origin: Origin
    sender: PeerId
    receiver: PeerId
    pair: float  # bytes/s at most
    window: int  # payload bytes that may be with the receiver, not let through
    credit: int = 0  # what of the window is left; a chunk may overdraw it
    queue: deque[Chunk] = field(default_factory=deque)
    left: float = 0.0  # bytes of the first chunk
    rate: float = 0.0  # bytes/s

    def __post_init__(self) -> None:
        self.credit = self.window


class Uplink:
    """What one peer sends: its flows leave as a fluid, at rates that are max-min fair between the uplink and their pairs.

    `depart(flow, chunk, at)` is called when the last byte of a chunk has left. Times are in seconds of any clock.
    """

    def __init__(self, capacity: float, depart: Callable[[Flow, Chunk, float], None]) -> None:
        self.capacity = capacity
        self.next_time = math.inf
        self._depart = depart
        self._queued: dict[Flow, None] = {}
        self._first: Flow | None = None  # of those that flow, the one whose chunk is through next
        self._since = 0.0  # when `left` of each flow was so

    def put(self, flow: Flow, chunks: Iterable[Chunk], now: float) -> None:
        """Send these chunks behind what the flow has queued already."""
        self._settle(now)
        flow.queue.extend(chunks)
        if flow.queue and flow not in self._queued:
            self._queued[flow], flow.left = None, float(len(flow.queue[0].payload))
        self._share()

    def allow(self, flow: Flow, num_bytes: int, now: float) -> None:
        """So many bytes more of its window are free; fewer, if negative."""
        self._settle(now)
        flow.credit = min(flow.credit + num_bytes, flow.window)
        self._share()

    def drop(self, flow: Flow, now: float) -> None:
        """Forget what is queued for who has gone."""
        self._settle(now)
        flow.queue.clear()
        self._queued.pop(flow, None)
        self._share()

    def set_capacity(self, capacity: float, now: float) -> None:
        """From now on, in bytes per second."""
        self._settle(now)
        self.capacity = capacity
        self._share()

    def run(self, now: float) -> None:
        """Let flow what flows until `now`."""
        while self.next_time <= now:
            flow = self._first
            assert flow is not None
            self._flow_until(self.next_time)
            chunk = flow.queue.popleft()
            if flow.queue:
                flow.left = float(len(flow.queue[0].payload))
            else:
                del self._queued[flow]
            self._share()
            self._depart(flow, chunk, self._since)

    def _settle(self, now: float) -> None:
        self.run(now)
        self._flow_until(now)

    def _flow_until(self, time_s: float) -> None:
        if time_s > self._since:
            for flow in self._queued:
                flow.left = max(0.0, flow.left - flow.rate * (time_s - self._since))
            self._since = time_s

    def _share(self) -> None:
        """Those whose pairs give least first: what they leave over is shared by the rest (progressive filling)."""
        self._first, self.next_time, spare = None, math.inf, self.capacity
        flowing = sorted((flow for flow in self._queued if flow.credit > 0), key=lambda flow: flow.pair)
        for flow in self._queued:
            flow.rate = 0.0
        for place, flow in enumerate(flowing):
            flow.rate = min(flow.pair, spare / (len(flowing) - place))
            if flow.rate < math.inf:
                spare -= flow.rate
            done_at = self._since + flow.left / flow.rate
            if done_at < self.next_time:
                self._first, self.next_time = flow, done_at


class Downlink:
    """What one peer receives: chunks are let through (`let_through(item)`) one by one at its capacity, fairly by sender."""

    def __init__(self, capacity: float, let_through: Callable[[Incoming], None]) -> None:
        self.capacity = capacity
        self.next_time = math.inf
        self._let_through = let_through
        self._current: Incoming | None = None
        self._free_at = -math.inf  # when all that has begun is through
        self._waiting: list[tuple[float, int, int, float, Incoming]] = []
        self._tickets = count()
        self._virtual = 0.0
        self._tags: dict[PeerId, float] = {}  # where each sender's next chunk begins, in bytes of its share

    def put(self, item: Incoming, num_bytes: int, began_at: float, now: float) -> None:
        """A chunk that has come in, from `began_at` (its first byte) to now (its last one)."""
        self.run(now)
        tag = max(self._virtual, self._tags.get(item.sender, 0.0))
        self._tags[item.sender] = tag + num_bytes
        heappush(self._waiting, (tag, next(self._tickets), num_bytes, began_at, item))
        self.run(now)

    def run(self, now: float) -> None:
        """Let through what is through by `now`."""
        while True:
            if self._current is None:
                if not self._waiting:
                    self.next_time = math.inf
                    return
                self._virtual, _, num_bytes, began_at, self._current = heappop(self._waiting)
                self._free_at = max(self._free_at, began_at) + num_bytes / self.capacity
            self.next_time = self._free_at
            if self._free_at > now:
                return
            item, self._current = self._current, None
            self._let_through(item)


# ------------------------------------------------------------------------------------------------------------------ sockets


class ShapedTransport(ZmqTransport):
    """A transport for peers of an emulated network. Who is none of `emulation.names` (a collector) is not shaped."""

    def __init__(self, bind: str, *, run: int, emulation: Emulation, **options: Any) -> None:
        super().__init__(bind, run=run, **options)
        assert emulation.links is not None
        self._network, self._seed = emulation.links, emulation.seed
        self._index = {name: index for index, name in enumerate(emulation.names)}
        self._up, self._down = self._network.uplink.copy(), self._network.downlink.copy()
        self._flows: dict[tuple[Origin, PeerId, PeerId], Flow] = {}
        self._uplinks: dict[PeerId, Uplink] = {}
        self._downlinks: dict[PeerId, Downlink] = {}
        self._chance: dict[PeerId, np.random.Generator] = {}  # of each sender here
        self._under_way: list[tuple[float, int, Callable[[], None]]] = []  # due to be put on a socket
        self._last_due: dict[tuple[PeerId, PeerId], float] = {}
        self._uncredited: dict[tuple[PeerId, PeerId], int] = {}
        self._tickets = count()
        self._timeline = self._network.timeline()
        self._change: Change | None = None
        self._began = math.inf

    def begin(self, began: float) -> None:
        """The times of a trace count from then (monotonic seconds), when the run began."""
        self._began = began
        self._change = next(self._timeline, None)

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self, sender: PeerId, recipient: PeerId, message: Message, origin: Origin | None = None) -> None:
        put = partial(super().send, sender, recipient, message, origin)
        if recipient in self._index:
            self._launch(sender, recipient, time.monotonic(), put)
        else:
            put()

    def queue(self, origin: Origin, sender: PeerId, recipient: PeerId, chunks: Iterable[Chunk]) -> None:
        if recipient not in self._index:
            super().queue(origin, sender, recipient, chunks)
            return
        key = origin, sender, recipient
        flow = self._flows.get(key)
        if flow is None:
            pair = self._network.pair(self._index[sender], self._index[recipient])
            flow = self._flows[key] = Flow(origin, sender, recipient, pair, self._window(recipient))
        self._uplink(sender).put(flow, chunks, time.monotonic())

    def bytes_queued(self, origin: Origin, recipient: PeerId, request: int | None = None) -> int:
        chunks = [chunk for flow in self._flows_on(origin) if flow.receiver == recipient for chunk in flow.queue]
        queued = sum(len(chunk.payload) for chunk in chunks if request is None or chunk.request == request)
        return queued + super().bytes_queued(origin, recipient, request)

    def num_queued(self, origin: Origin) -> int:
        requests = {(flow.receiver, chunk.request) for flow in self._flows_on(origin) for chunk in flow.queue}
        return len(requests) + super().num_queued(origin)

    def _flows_on(self, origin: Origin) -> list[Flow]:
        return [flow for flow in self._flows.values() if flow.origin == origin]

    def _uplink(self, sender: PeerId) -> Uplink:
        if sender not in self._uplinks:
            self._uplinks[sender] = Uplink(self._up[self._index[sender]], self._left)
        return self._uplinks[sender]

    def _window(self, receiver: PeerId) -> int:
        """Two chunks at least, so that one comes in while the other is let through."""
        return int(min(max(2 * MAX_PAYLOAD_BYTES, WINDOW_S * self._down[self._index[receiver]]), MAX_WINDOW_BYTES))

    def _left(self, flow: Flow, chunk: Chunk, at: float) -> None:
        self._launch(flow.sender, flow.receiver, at, partial(self._put, flow, chunk))

    def _put(self, flow: Flow, chunk: Chunk) -> None:
        """On the socket, at last."""
        if self._flows.get((flow.origin, flow.sender, flow.receiver)) is not flow:
            return  # its connection has broken
        self._uplink(flow.sender).allow(flow, -len(chunk.payload), time.monotonic())
        self._inbound.setdefault(flow.origin, Inbound(allowed=_NO_WINDOW))
        super().queue(flow.origin, flow.sender, flow.receiver, (chunk,))

    def _launch(self, sender: PeerId, receiver: PeerId, at: float, put: Callable[[], None]) -> None:
        """Put it on the socket when its latency is over. None overtakes another of its pair; some are lost."""
        if sender not in self._chance:
            self._chance[sender] = generator(self._seed, "network", sender)
        rng, network = self._chance[sender], self._network
        if network.loss and rng.random() < network.loss:
            return
        latency = network.latency(self._index[sender], self._index[receiver]) + network.jitter_s * rng.random()
        due = max(at + latency, self._last_due.get((sender, receiver), 0.0))
        self._last_due[sender, receiver] = due
        heappush(self._under_way, (due, next(self._tickets), put))

    # --- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, timeout_s: float | None) -> list[Happening]:
        now = time.monotonic()
        self._run(now)
        due = self._next_time()
        if self._happened:
            timeout_s = 0.0
        elif due < math.inf:
            timeout_s = max(0.0, due - now) if timeout_s is None else min(timeout_s, max(0.0, due - now))
        happened = super().receive(timeout_s)
        self._run(time.monotonic())
        happened += self._happened
        self._happened.clear()
        return happened

    def _next_time(self) -> float:
        """When something is due next."""
        times = [end.next_time for end in self._ends()]
        if self._under_way:
            times.append(self._under_way[0][0])
        if self._change is not None:
            times.append(self._began + self._change.time_s)
        return min(times, default=math.inf)

    def _ends(self) -> list[Uplink | Downlink]:
        return [*self._uplinks.values(), *self._downlinks.values()]

    def _run(self, now: float) -> None:
        """Whatever is due by now."""
        while self._change is not None and self._began + self._change.time_s <= now:
            self._change_rates(self._change)
            self._change = next(self._timeline, None)
        for end in self._ends():
            if end.next_time <= now:
                end.run(now)
        while self._under_way and self._under_way[0][0] <= now:
            heappop(self._under_way)[2]()

    def _change_rates(self, change: Change) -> None:
        at = self._began + change.time_s
        self._up[change.index], self._down[change.index] = change.uplink, change.downlink
        for name, uplink in self._uplinks.items():
            if self._index[name] == change.index:
                uplink.set_capacity(change.uplink, at)
        for name, downlink in self._downlinks.items():
            if self._index[name] == change.index:
                downlink.capacity = change.downlink

    def _take_chunk(self, link: Link, incoming: Incoming, num_bytes: int) -> None:
        sender, receiver = self._index.get(incoming.sender), self._index.get(incoming.recipient)
        if sender is None or receiver is None:
            super()._take_chunk(link, incoming, num_bytes)
            return
        downlink = self._downlinks.get(incoming.recipient)
        if downlink is None:
            downlink = self._downlinks[incoming.recipient] = Downlink(self._down[receiver], self._let_through)
        now = time.monotonic()
        began_at = now - num_bytes / min(self._up[sender], self._network.pair(sender, receiver))  # or before
        downlink.put(incoming, num_bytes, began_at, now)

    def _let_through(self, incoming: Incoming) -> None:
        self._happened.append(incoming)
        flow = incoming.recipient, incoming.sender
        self._uncredited[flow] = self._uncredited.get(flow, 0) + _payload_bytes(incoming)
        link = self._links.get(self._routes[incoming.sender])
        if link is not None and self._uncredited[flow] >= CREDIT_BYTES:
            self._grant(link, *flow, self._uncredited.pop(flow))

    def _credited(self, incoming: Incoming, num_bytes: int) -> None:
        flow = self._flows.get((incoming.origin or b"", incoming.recipient, incoming.sender))
        if flow is None:
            super()._credited(incoming, num_bytes)
        else:
            self._uplink(flow.sender).allow(flow, num_bytes, time.monotonic())

    # --- connections --------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        super()._sweep()
        for flow in [flow for flow in self._flows.values() if flow.queue and flow.credit <= 0]:
            self._send_back(flow.origin, flow.sender, flow.receiver, Credit(0))

    def _send_failed(self, origin: Origin, error: zmq.ZMQError) -> None:
        super()._send_failed(origin, error)
        if error.errno == errno.EHOSTUNREACH:
            for flow in self._flows_on(origin):
                self._uplink(flow.sender).drop(flow, time.monotonic())
                del self._flows[flow.origin, flow.sender, flow.receiver]

    def _is_unsent(self) -> bool:
        return bool(self._under_way) or any(flow.queue for flow in self._flows.values()) or super()._is_unsent()


def _payload_bytes(incoming: Incoming) -> int:
    assert isinstance(incoming.message, Data | Record)
    return len(incoming.message.payload)
