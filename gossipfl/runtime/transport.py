"""Messages over ZeroMQ: a ROUTER that others connect to, and one DEALER for each endpoint that is asked for something.

Several peers may share an endpoint (all peers of one process do); the header says who speaks to whom. Answers return on the
connection that asked, so they reach peers that cannot be connected to. Everything here runs on one thread, but for `wake`.

ZeroMQ queues count messages, not bytes, so what is in flight is bounded here: a sender may send `FIRST_WINDOW_BYTES` of payload
on a connection and then as much as the receiver's Credits allow. The receiver's window follows the rate of the connection (a
quarter of a second's worth), so that small messages are not stuck behind seconds of payload.

What is asked with a payload (as an Activation) is bounded where it leaves: by `MAX_UNSENT_BYTES` and what the connection takes.

A Credit that comes the other way says what the sender may still send, where the two might disagree: when it begins to serve on
a connection (perhaps anew, having forgotten it), and when it has waited for long.

A connection that sends something malformed is not listened to again; what it still sends is counted and dropped.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

import zmq
import zmq.utils.monitor

from gossipfl.errors import RemoteProtocolError, RunError
from gossipfl.protocol import wire
from gossipfl.protocol.messages import (
    Activation,
    Chunk,
    Continuation,
    Credit,
    Data,
    Failed,
    Later,
    Message,
    Offer,
    PeerId,
    PlanRequest,
    Record,
    Refuse,
    Result,
)
from gossipfl.runtime.addresses import bind_failure, check_address, check_loopback, in_use, is_listened_at

logger = logging.getLogger(__name__)

FIRST_WINDOW_BYTES = 4 * wire.MAX_PAYLOAD_BYTES
MAX_WINDOW_BYTES = 16 * wire.MAX_PAYLOAD_BYTES
WINDOW_S = 0.25
MAX_LINKS = 64
"""Outgoing connections kept open; beyond it the one that has been idle longest is closed."""
IDLE_S = 5.0
RETRY_S = 0.005
SWEEP_S = 5.0
"""How often those who take nothing of what is queued for them are asked whether they are still there."""
HIGH_WATER_MARK = 64
MAX_UNSENT_BYTES = 2 * wire.MAX_TENSOR_BYTES
"""Payload that waits for one connection to take it; what is sent beyond it is lost."""
HANDSHAKE_S = 3.0
MAX_REMEMBERED = 4096
"""Incoming connections whose credit, or whose ban, is remembered."""
BATCH = 16
"""Messages taken from one socket before the others get their turn."""

# Plain numbers: combining the enumeration's members takes longer than a receive.
_POLLIN, _POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
_DONTWAIT, _SNDMORE = int(zmq.DONTWAIT), int(zmq.SNDMORE)
_CHUNKED = (Data, Record, Offer, Result)
_ANSWERS = (Data, Record, Later, Refuse, Offer, Result, Failed)
"""Come in on the connection that asked, and there only."""
_UPLOADS = (PlanRequest, Activation, Continuation)
"""Ask with a payload."""

Origin = bytes
"""The connection that a message came in on; answers go back to it."""
Shared = zmq.Frame
"""A payload that is sent to many."""


class Incoming(NamedTuple):
    """A well-formed message for one of the peers here. `num_bytes` counts its header and payload frames."""

    sender: PeerId
    recipient: PeerId
    message: Message
    origin: Origin | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The connection to these peers' endpoint stands."""

    peers: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection to these peers' endpoint broke, or was closed for what it sent (`reason`)."""

    peers: tuple[PeerId, ...]
    reason: str


Happening = Incoming | LinkUp | LinkDown


@dataclass(slots=True)
class Link:
    """An outgoing connection, to an endpoint where one or more peers live."""

    address: str
    socket: zmq.Socket
    monitor: zmq.Socket
    outbox: deque[bytes] = field(default_factory=deque)
    uploads: deque[tuple[PeerId, int, bytes, wire.Buffer]] = field(default_factory=deque)  # behind all of the outbox
    unsent: int = 0  # payload bytes of the uploads
    last_used: float = 0.0
    allowed: int = FIRST_WINDOW_BYTES  # payload bytes that may still come
    window: int = FIRST_WINDOW_BYTES
    uncredited: int = 0
    credited_at: float = 0.0


@dataclass(slots=True)
class Inbound:
    """An incoming connection: what is queued for it, and how many payload bytes it may still be sent."""

    queue: deque[tuple[PeerId, PeerId, Chunk]] = field(default_factory=deque)
    requests: dict[tuple[PeerId, int], int] = field(default_factory=dict)  # payload bytes still queued
    allowed: int = FIRST_WINDOW_BYTES
    moved_at: float = field(default_factory=time.monotonic)


class ZmqTransport:
    """Sends and receives for the peers at one endpoint.

    `bind` is `tcp://host:port` (port 0: any free one), `ipc://path` or `inproc://name`; `advertise` is the address that others
    are told, where it differs. `run` is the number that marks this run's messages. Until peers can be authenticated, binding
    beyond loopback is refused unless `insecure`.
    """

    def __init__(self, bind: str, *, run: int, advertise: str | None = None, insecure: bool = False) -> None:
        check_loopback(bind, insecure)
        self.run = run
        self.malformed = 0
        self.dropped = 0
        self.unknown = 0
        self.tap: Callable[[Incoming], None] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._context.set(zmq.MAX_SOCKETS, max(self._context.get(zmq.MAX_SOCKETS), 4096))
        self._routes: dict[PeerId, str] = {}
        self._links: dict[str, Link] = {}
        self._foul: set[str] = set()
        self._inbound: dict[Origin, Inbound] = {}
        self._blocked: set[Origin] = set()
        self._banned: dict[Origin, None] = {}
        self._swept_at = time.monotonic()
        self._happened: deque[Happening] = deque()
        self._router = self._bind(bind)
        bound = self._router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self.address = re.sub(r":0$", f":{urlsplit(bound).port}", advertise) if advertise else bound
        self._wake_lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read, _POLLIN)
        self._poller.register(self._router, _POLLIN)

    # --- sending ------------------------------------------------------------------------------------------------------

    def connect(self, peer: PeerId, address: str) -> None:
        """Learn where a peer lives (ConfigError if that is no address); connected to when there is something to send."""
        check_address(address, f"the address of {peer}")
        self._routes[peer] = address

    def send(self, sender: PeerId, recipient: PeerId, message: Message, origin: Origin | None = None) -> None:
        """Send a message, on the connection `origin` if given and then without payload. What cannot be sent is lost.

        The payload of a PlanRequest, an Activation or a Continuation is not copied: it must stay as it is until it has left.
        """
        if origin is not None:
            self._send_back(origin, sender, recipient, message)
            return
        address = self._routes.get(recipient)
        if address is None or address in self._foul:
            self.dropped += 1
            return
        link = self._links.get(address) or self._open(address)
        link.last_used = time.monotonic()
        header = wire.encode(self.run, sender, recipient, message)
        if isinstance(message, _UPLOADS):
            if link.unsent + len(message.payload) > MAX_UNSENT_BYTES:
                self.dropped += 1
                return
            link.uploads.append((recipient, message.request, header, message.payload))
            link.unsent += len(message.payload)
        else:
            link.outbox.append(header)
        while len(link.outbox) > HIGH_WATER_MARK * 4:
            link.outbox.popleft()
            self.dropped += 1
        self._flush(link)

    def bytes_unsent(self, recipient: PeerId) -> int:
        """Payload bytes that wait for the connection to this peer's endpoint."""
        link = self._links.get(self._routes.get(recipient, ""))
        return link.unsent if link else 0

    def cancel(self, recipient: PeerId, request: int) -> None:
        """Forget what waits to be sent to this peer with the payload of this request."""
        link = self._links.get(self._routes.get(recipient, ""))
        if link is not None and link.uploads:
            link.uploads = deque(upload for upload in link.uploads if upload[:2] != (recipient, request))
            link.unsent = sum(len(payload) for *_, payload in link.uploads)

    def queue(self, origin: Origin, sender: PeerId, recipient: PeerId, chunks: Iterable[Chunk]) -> None:
        """Queue the chunks of an answer; they go out as the connection takes them, each zero-copy."""
        if origin not in self._inbound:
            if len(self._inbound) >= MAX_REMEMBERED:
                self._forget_idle()
            self._send_back(origin, sender, recipient, Credit(FIRST_WINDOW_BYTES))
        inbound = self._inbound.setdefault(origin, Inbound())
        for chunk in chunks:
            key = recipient, chunk.request
            inbound.requests[key] = inbound.requests.get(key, 0) + len(chunk.payload)
            inbound.queue.append((sender, recipient, chunk))
        self._pump(origin, inbound)

    @staticmethod
    def shared(payload: memoryview) -> Shared:
        """The payload in a form that can be sent to many: wrapping it each time takes longer than sending it."""
        return zmq.Frame(payload)

    def bytes_queued(self, origin: Origin, recipient: PeerId, request: int | None = None) -> int:
        """Payload bytes not yet handed over on this connection for one request, or for all of a peer's."""
        inbound = self._inbound.get(origin)
        if inbound is None:
            return 0
        if request is not None:
            return inbound.requests.get((recipient, request), 0)
        return sum(num_bytes for (peer, _), num_bytes in inbound.requests.items() if peer == recipient)

    def num_queued(self, origin: Origin) -> int:
        """Requests being answered on this connection."""
        inbound = self._inbound.get(origin)
        return len(inbound.requests) if inbound else 0

    def num_chunks_queued(self, origin: Origin) -> int:
        inbound = self._inbound.get(origin)
        return len(inbound.queue) if inbound else 0

    # --- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, timeout_s: float | None) -> list[Happening]:
        """Wait at most `timeout_s` (None: for ever) for something to happen; all that has happened, in order."""
        limit_s = RETRY_S if self._blocked else SWEEP_S if self._inbound else None
        if limit_s is not None:
            timeout_s = limit_s if timeout_s is None else min(timeout_s, limit_s)
        ready = dict(self._poller.poll(None if timeout_s is None else max(0, round(timeout_s * 1000 + 0.499))))
        if self._wake_read in ready:
            self._drain_wakes()
        for link in list(self._links.values()):
            if ready.get(link.socket, 0) & _POLLOUT:
                self._flush(link)
            if link.monitor in ready:
                self._read_monitor(link)
            if ready.get(link.socket, 0) & _POLLIN:
                self._read_link(link)  # last: it may drop the link
        if self._router in ready:
            self._read_router()
        for origin in list(self._blocked):
            self._pump(origin, self._inbound[origin])
        if time.monotonic() - self._swept_at > SWEEP_S:
            self._sweep()
        happened = list(self._happened)
        self._happened.clear()
        return happened

    def wake(self) -> None:
        """Make `receive` return soon. May be called from any thread."""
        with self._wake_lock, contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            if not self._router.closed:
                os.write(self._wake_write, b"\0")

    def close(self, flush_s: float = 0.0) -> None:
        """Close all sockets; what is queued gets `flush_s` seconds to leave."""
        if self._router.closed:
            return
        deadline = time.monotonic() + flush_s
        while time.monotonic() < deadline and self._is_unsent():
            self.receive(min(0.05, flush_s))
        for address in list(self._links):
            self._drop_link(address, linger_s=max(0.0, flush_s))
        with self._wake_lock:
            self._router.close(linger=int(flush_s * 1000))
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _is_unsent(self) -> bool:
        return any(link.outbox or link.uploads for link in self._links.values()) or any(i.queue for i in self._inbound.values())

    # --- sockets ------------------------------------------------------------------------------------------------------

    def _bind(self, address: str) -> zmq.Socket:
        if address.startswith("ipc://") and is_listened_at(address.removeprefix("ipc://")):
            raise RunError(in_use(address))  # ZeroMQ would take it over in silence
        router = self._context.socket(zmq.ROUTER)
        _set_limits(router, address)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.ROUTER_HANDOVER, 0)
        router.setsockopt(zmq.BACKLOG, 512)
        try:
            router.bind(address)
        except zmq.ZMQError as error:
            router.close(linger=0)
            raise RunError(bind_failure(address, error)) from error
        return router

    def _open(self, address: str) -> Link:
        if len(self._links) >= MAX_LINKS:
            idle = min(self._links.values(), key=lambda link: link.last_used)
            if time.monotonic() - idle.last_used > IDLE_S:
                self._drop_link(idle.address)
        dealer = self._context.socket(zmq.DEALER)
        _set_limits(dealer, address)
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.setsockopt(zmq.RECONNECT_IVL, 100)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
        events = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
        if address.startswith("inproc:"):  # has neither handshake nor monitor events
            events = zmq.Event.CLOSED
        monitor = dealer.get_monitor_socket(events)
        dealer.connect(address)
        link = self._links[address] = Link(address, dealer, monitor)
        self._poller.register(dealer, _POLLIN)
        self._poller.register(monitor, _POLLIN)
        return link

    def _drop_link(self, address: str, linger_s: float = 0.0) -> None:
        link = self._links.pop(address)
        self._poller.unregister(link.socket)
        self._poller.unregister(link.monitor)
        link.socket.disable_monitor()
        link.monitor.close(linger=0)
        link.socket.close(linger=int(linger_s * 1000))

    def _flush(self, link: Link) -> None:
        """Send what waits for this link; what does not go waits for the socket to become writable."""
        send = link.socket.send
        try:
            while link.outbox:
                link.socket.send_multipart((link.outbox[0], b""), _DONTWAIT)
                link.outbox.popleft()
            while link.uploads:
                _, _, header, payload = link.uploads[0]
                send(header, _DONTWAIT | _SNDMORE)
                send(payload, _DONTWAIT, copy=False)
                link.uploads.popleft()
                link.unsent -= len(payload)
        except zmq.Again:
            self._poller.modify(link.socket, _POLLIN | _POLLOUT)
            return
        self._poller.modify(link.socket, _POLLIN)

    def _send_back(self, origin: Origin, sender: PeerId, recipient: PeerId, message: Message) -> None:
        """Send a message without payload ahead of what is queued."""
        try:
            self._router.send_multipart((origin, wire.encode(self.run, sender, recipient, message), b""), _DONTWAIT)
        except zmq.ZMQError as error:
            self._send_failed(origin, error)
            self.dropped += 1

    def _pump(self, origin: Origin, inbound: Inbound) -> None:
        """Hand over queued chunks while the receiver's credit lasts."""
        self._blocked.discard(origin)
        send, requests, now = self._router.send, inbound.requests, time.monotonic()
        while inbound.queue and inbound.allowed > 0:
            sender, recipient, chunk = inbound.queue[0]
            header = wire.encode(self.run, sender, recipient, chunk)
            try:
                send(origin, _DONTWAIT | _SNDMORE)
                send(header, _DONTWAIT | _SNDMORE)
                send(chunk.payload, _DONTWAIT, copy=False)
            except zmq.ZMQError as error:
                self._send_failed(origin, error)
                return
            inbound.queue.popleft()
            key, num_bytes = (recipient, chunk.request), len(chunk.payload)
            inbound.allowed -= num_bytes
            left = requests.pop(key, 0) - num_bytes
            if left > 0:
                requests[key] = left
            inbound.moved_at = now

    def _send_failed(self, origin: Origin, error: zmq.ZMQError) -> None:
        if error.errno == zmq.EAGAIN:
            if origin in self._inbound:
                self._blocked.add(origin)
        elif error.errno == errno.EHOSTUNREACH:
            self._inbound.pop(origin, None)
            self._blocked.discard(origin)
        else:
            raise error

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read_link(self, link: Link) -> None:
        link.last_used = time.monotonic()
        for _ in range(BATCH):
            try:
                frames = _receive(link.socket)
            except zmq.Again:
                break
            incoming = self._decode(frames, None)
            if isinstance(incoming, str):
                logger.warning("malformed message from %s: %s; it is not listened to again", link.address, incoming)
                self._foul.add(link.address)
                self._drop_link(link.address)
                self._happened.append(LinkDown(self._peers_at(link.address), f"malformed: {incoming}"))
                return
            if incoming is None:
                continue
            message = incoming.message
            if isinstance(message, Credit):
                link.allowed = min(link.allowed, message.num_bytes)
            elif not isinstance(message, _ANSWERS) or self._routes.get(incoming.sender) != link.address:
                self.dropped += 1
            elif isinstance(message, _CHUNKED):
                self._take_chunk(link, incoming, len(message.payload))
            else:
                self._happened.append(incoming)

    def _take_chunk(self, link: Link, incoming: Incoming, num_bytes: int) -> None:
        link.allowed -= num_bytes
        link.uncredited += num_bytes
        if link.allowed <= link.window // 2:
            self._credit(link, incoming.recipient, incoming.sender)
        self._happened.append(incoming)

    def _credit(self, link: Link, sender: PeerId, recipient: PeerId) -> None:
        """Allow a window more, of what the link has lately carried in `WINDOW_S`."""
        now = time.monotonic()
        rate = link.uncredited / max(now - link.credited_at, 1e-6)
        link.credited_at, link.uncredited = now, 0
        link.window = int(min(max(rate * WINDOW_S, FIRST_WINDOW_BYTES), MAX_WINDOW_BYTES))
        credit = max(link.window - link.allowed, FIRST_WINDOW_BYTES)
        link.allowed += credit
        self._grant(link, sender, recipient, credit)

    def _grant(self, link: Link, sender: PeerId, recipient: PeerId, num_bytes: int) -> None:
        link.outbox.append(wire.encode(self.run, sender, recipient, Credit(num_bytes)))
        self._flush(link)

    def _read_router(self) -> None:
        for _ in range(BATCH):
            try:
                first = self._router.recv(_DONTWAIT, copy=False)
                frames = _receive(self._router)
            except zmq.Again:
                return
            origin = first.bytes
            if origin in self._banned:
                self.dropped += 1
                continue
            incoming = self._decode(frames, origin)
            if isinstance(incoming, str):
                logger.warning("malformed message from %s: %s; its connection is ignored", _source(first), incoming)
                self._ban(origin)
                self._inbound.pop(origin, None)
                self._blocked.discard(origin)
            elif incoming is not None and isinstance(incoming.message, _ANSWERS):
                self.dropped += 1
            elif incoming is not None and isinstance(incoming.message, Credit):
                self._credited(incoming, incoming.message.num_bytes)
                self._happened.append(incoming)
            elif incoming is not None:
                self._happened.append(incoming)

    def _credited(self, incoming: Incoming, num_bytes: int) -> None:
        origin = incoming.origin
        inbound = None if origin is None else self._inbound.get(origin)
        if origin is not None and inbound is not None:
            inbound.allowed = min(inbound.allowed + num_bytes, MAX_WINDOW_BYTES)
            self._pump(origin, inbound)

    def _sweep(self) -> None:
        """Who has gone in the middle of a transfer is found out by sending it something; what is queued for it is dropped."""
        self._swept_at = now = time.monotonic()
        for origin, inbound in list(self._inbound.items()):
            if inbound.queue and now - inbound.moved_at > SWEEP_S:
                sender, recipient, _ = inbound.queue[0]
                self._send_back(origin, sender, recipient, Credit(max(inbound.allowed, 0)))

    def _forget_idle(self) -> None:
        """Forget the connections that have nothing queued; one that is still in use starts with a first window again."""
        for origin in [origin for origin, inbound in self._inbound.items() if not inbound.queue]:
            del self._inbound[origin]

    def _decode(self, frames: list[wire.Buffer], origin: Origin | None) -> Incoming | str | None:
        """The message, None where it is not for anybody here to read, or what is wrong with it."""
        try:
            envelope = wire.decode(frames)
        except RemoteProtocolError as error:
            self.malformed += 1
            return str(error)
        if envelope.message is None or envelope.run != self.run:
            self.unknown += 1
            return None
        num_bytes = len(frames[0]) + len(frames[1])
        incoming = Incoming(envelope.sender, envelope.recipient, envelope.message, origin, num_bytes)
        if self.tap is not None:
            self.tap(incoming)
        return incoming

    def _ban(self, origin: Origin) -> None:
        self._banned[origin] = None
        while len(self._banned) > MAX_REMEMBERED:
            del self._banned[next(iter(self._banned))]

    def _read_monitor(self, link: Link) -> None:
        while link.monitor.poll(0):
            event = zmq.utils.monitor.recv_monitor_message(link.monitor)["event"]
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._happened.append(LinkUp(self._peers_at(link.address)))
            elif event == zmq.Event.DISCONNECTED:
                link.allowed, link.window, link.uncredited = FIRST_WINDOW_BYTES, FIRST_WINDOW_BYTES, 0
                link.uploads.clear()  # who asked hears of it
                link.unsent = 0
                self._happened.append(LinkDown(self._peers_at(link.address), "the connection broke"))

    def _peers_at(self, address: str) -> tuple[PeerId, ...]:
        return tuple(peer for peer, at in self._routes.items() if at == address)

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass


def _set_limits(end: zmq.Socket[bytes], address: str) -> None:
    end.setsockopt(zmq.IPV6, int(address.startswith("tcp://[")))
    end.setsockopt(zmq.LINGER, 0)
    end.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    end.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    end.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
    end.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))


def _receive(end: zmq.Socket[bytes]) -> list[wire.Buffer]:
    """The frames of one message; the payload is not copied. Frames beyond those that a message has are passed over."""
    frame = end.recv(_DONTWAIT, copy=False)
    frames: list[wire.Buffer] = [frame.buffer]
    while frame.more:
        frame = end.recv(copy=False)
        if len(frames) <= 2:
            frames.append(frame.buffer)
    return frames


def _source(frame: zmq.Frame) -> str:
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return "an unknown address"
