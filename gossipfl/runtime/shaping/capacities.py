"""How one peer's uplink is shared by what it sends, and its downlink by what it receives; driven by the times it is given."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from gossipfl.protocol.messages import Chunk, PeerId
from gossipfl.runtime.transport import Incoming, Origin


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
