"""A transport whose messages take as long, between peers of an emulated network, as its links say.

Credits are the emulation's own: never late, never lost. Messages without payload take latency and loss, and no capacity.
Peers are shaped one by one, also those of one process. Nothing sleeps: `receive` waits until the next thing is due.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np
import zmq

from gossipfl.overlay.links import Change
from gossipfl.protocol.messages import Chunk, Credit, Data, Message, PeerId, Record
from gossipfl.protocol.wire import MAX_PAYLOAD_BYTES
from gossipfl.randomness import generator
from gossipfl.runtime.shaping.capacities import Downlink, Flow, Uplink
from gossipfl.runtime.shaping.emulation import Emulation
from gossipfl.runtime.transport import Happening, Incoming, Origin, ZmqTransport
from gossipfl.runtime.transport.inbound import Inbound
from gossipfl.runtime.transport.link import Link
from gossipfl.runtime.transport.window import MAX_WINDOW_BYTES

WINDOW_S = 0.05
"""Of a downlink's capacity that a flow may have there, not yet let through: what scheduling may delay a credit by."""
CREDIT_BYTES = MAX_PAYLOAD_BYTES // 2
"""Let through before they are credited, together: a quarter of the least window."""
_NO_WINDOW = 2**60
"""Bytes that the transport may have on a connection, where the window is the flow's."""


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
