"""An incoming connection: what is queued for it in answer, and how many payload bytes it may still be sent."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import zmq

from gossipfl.protocol import wire
from gossipfl.protocol.messages import Chunk, PeerId
from gossipfl.runtime.transport.happenings import Origin
from gossipfl.runtime.transport.sockets import DONTWAIT, SNDMORE
from gossipfl.runtime.transport.window import FIRST_WINDOW_BYTES, MAX_WINDOW_BYTES


@dataclass(slots=True)
class Inbound:
    queue: deque[tuple[PeerId, PeerId, Chunk]] = field(default_factory=deque)
    requests: dict[tuple[PeerId, int], int] = field(default_factory=dict)  # payload bytes still queued
    allowed: int = FIRST_WINDOW_BYTES
    moved_at: float = field(default_factory=time.monotonic)

    def put(self, sender: PeerId, recipient: PeerId, chunks: Iterable[Chunk]) -> None:
        """Queue the chunks of an answer."""
        for chunk in chunks:
            key = recipient, chunk.request
            self.requests[key] = self.requests.get(key, 0) + len(chunk.payload)
            self.queue.append((sender, recipient, chunk))

    def bytes_queued(self, recipient: PeerId, request: int | None) -> int:
        """Payload bytes not yet handed over for one request, or for all of a peer's."""
        if request is not None:
            return self.requests.get((recipient, request), 0)
        return sum(num_bytes for (peer, _), num_bytes in self.requests.items() if peer == recipient)

    def allow(self, num_bytes: int) -> None:
        self.allowed = min(self.allowed + num_bytes, MAX_WINDOW_BYTES)

    def hand_over(self, router: zmq.Socket[bytes], origin: Origin, run: int) -> None:
        """Send queued chunks, each zero-copy, while the receiver's credit lasts. ZMQError where the socket takes no more."""
        send, requests, now = router.send, self.requests, time.monotonic()
        while self.queue and self.allowed > 0:
            sender, recipient, chunk = self.queue[0]
            header = wire.encode(run, sender, recipient, chunk)
            send(origin, DONTWAIT | SNDMORE)
            send(header, DONTWAIT | SNDMORE)
            send(chunk.payload, DONTWAIT, copy=False)
            self.queue.popleft()
            key, num_bytes = (recipient, chunk.request), len(chunk.payload)
            self.allowed -= num_bytes
            left = requests.pop(key, 0) - num_bytes
            if left > 0:
                requests[key] = left
            self.moved_at = now
