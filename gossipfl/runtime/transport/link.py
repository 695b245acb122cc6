"""An outgoing connection, to an endpoint where one or more peers live: a DEALER, and what waits for it.

What is asked with a payload (as an Activation) is bounded where it leaves: by `MAX_UNSENT_BYTES` and what the connection takes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq
import zmq.utils.monitor

from gossipfl.protocol import wire
from gossipfl.protocol.messages import PeerId
from gossipfl.runtime.transport.sockets import DONTWAIT, HIGH_WATER_MARK, SNDMORE
from gossipfl.runtime.transport.window import Window

MAX_UNSENT_BYTES = 2 * wire.MAX_TENSOR_BYTES
"""Payload that waits for one connection to take it; what is sent beyond it is lost."""


@dataclass(eq=False, slots=True)
class Link:
    address: str
    socket: zmq.Socket
    monitor: zmq.Socket
    outbox: deque[bytes] = field(default_factory=deque)
    uploads: deque[tuple[PeerId, int, bytes, wire.Buffer]] = field(default_factory=deque)  # behind all of the outbox
    unsent: int = 0  # payload bytes of the uploads
    last_used: float = field(default_factory=time.monotonic)
    window: Window = field(default_factory=Window)

    def put(self, header: bytes) -> int:
        """Queue a message without payload; how many of the oldest have been given up for it."""
        self.outbox.append(header)
        given_up = max(0, len(self.outbox) - 4 * HIGH_WATER_MARK)
        for _ in range(given_up):
            self.outbox.popleft()
        return given_up

    def upload(self, recipient: PeerId, request: int, header: bytes, payload: wire.Buffer) -> bool:
        """Queue a message with its payload, which must stay as it is until it has left; False if too much waits already."""
        if self.unsent + len(payload) > MAX_UNSENT_BYTES:
            return False
        self.uploads.append((recipient, request, header, payload))
        self.unsent += len(payload)
        return True

    def cancel(self, recipient: PeerId, request: int) -> None:
        """Forget what waits to be sent to this peer with the payload of this request."""
        if self.uploads:
            self.uploads = deque(upload for upload in self.uploads if upload[:2] != (recipient, request))
            self.unsent = sum(len(payload) for *_, payload in self.uploads)

    def flush(self) -> bool:
        """Send what waits; False if some of it must wait until the socket is writable."""
        send = self.socket.send
        try:
            while self.outbox:
                self.socket.send_multipart((self.outbox[0], b""), DONTWAIT)
                self.outbox.popleft()
            while self.uploads:
                _, _, header, payload = self.uploads[0]
                send(header, DONTWAIT | SNDMORE)
                send(payload, DONTWAIT, copy=False)
                self.uploads.popleft()
                self.unsent -= len(payload)
        except zmq.Again:
            return False
        return True

    def changes(self) -> Iterator[bool]:
        """Whether the connection stands, as often as that has changed. Where it broke, all begins anew."""
        while self.monitor.poll(0):
            event = zmq.utils.monitor.recv_monitor_message(self.monitor)["event"]
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                yield True
            elif event == zmq.Event.DISCONNECTED:
                self.window.reset()
                self.uploads.clear()  # who asked hears of it
                self.unsent = 0
                yield False

    def close(self, linger_s: float) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=int(linger_s * 1000))
