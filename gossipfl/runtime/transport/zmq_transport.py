"""Sends and receives for the peers at one endpoint.

Several peers may share an endpoint (all peers of one process do); the header says who speaks to whom. Answers return on the
connection that asked, so they reach peers that cannot be connected to. Everything here runs on one thread, but for `wake`.

A connection that sends something malformed is not listened to again; what it still sends is counted and dropped.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

import zmq

from gossipfl.errors import RemoteProtocolError
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
from gossipfl.runtime.addresses import check_address, check_loopback
from gossipfl.runtime.transport.happenings import Happening, Incoming, LinkDown, LinkUp, Origin, Shared
from gossipfl.runtime.transport.inbound import Inbound
from gossipfl.runtime.transport.link import Link
from gossipfl.runtime.transport.sockets import (
    DONTWAIT,
    POLLIN,
    POLLOUT,
    connecting_dealer,
    listening_router,
    receive_frames,
    socket_file,
    source_of,
)
from gossipfl.runtime.transport.wakeup import Wakeup
from gossipfl.runtime.transport.window import FIRST_WINDOW_BYTES

logger = logging.getLogger(__name__)

MAX_LINKS = 64
"""Outgoing connections kept open; beyond it the one that has been idle longest is closed."""
IDLE_S = 5.0
RETRY_S = 0.005
SWEEP_S = 5.0
"""How often those who take nothing of what is queued for them are asked whether they are still there."""
MAX_REMEMBERED = 4096
"""Incoming connections whose credit, or whose ban, is remembered."""
BATCH = 16
"""Messages taken from one socket before the others get their turn."""

_CHUNKED = (Data, Record, Offer, Result)
_ANSWERS = (Data, Record, Later, Refuse, Offer, Result, Failed)
"""Come in on the connection that asked, and there only."""
_UPLOADS = (PlanRequest, Activation, Continuation)
"""Ask with a payload."""


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
        self._router = listening_router(self._context, bind)
        self._socket_file = socket_file(bind)
        bound = self._router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self.address = re.sub(r":0$", f":{urlsplit(bound).port}", advertise) if advertise else bound
        self._wakeup = Wakeup()
        self._poller = zmq.Poller()
        self._poller.register(self._wakeup.fileno(), POLLIN)
        self._poller.register(self._router, POLLIN)

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
            if not link.upload(recipient, message.request, header, message.payload):
                self.dropped += 1
                return
        else:
            self.dropped += link.put(header)
        self._flush(link)

    def bytes_unsent(self, recipient: PeerId) -> int:
        """Payload bytes that wait for the connection to this peer's endpoint."""
        link = self._links.get(self._routes.get(recipient, ""))
        return link.unsent if link else 0

    def cancel(self, recipient: PeerId, request: int) -> None:
        """Forget what waits to be sent to this peer with the payload of this request."""
        link = self._links.get(self._routes.get(recipient, ""))
        if link is not None:
            link.cancel(recipient, request)

    def queue(self, origin: Origin, sender: PeerId, recipient: PeerId, chunks: Iterable[Chunk]) -> None:
        """Queue the chunks of an answer; they go out as the connection takes them, each zero-copy."""
        if origin not in self._inbound:
            if len(self._inbound) >= MAX_REMEMBERED:
                self._forget_idle()
            self._send_back(origin, sender, recipient, Credit(FIRST_WINDOW_BYTES))
        inbound = self._inbound.setdefault(origin, Inbound())
        inbound.put(sender, recipient, chunks)
        self._pump(origin, inbound)

    @staticmethod
    def shared(payload: memoryview) -> Shared:
        """The payload in a form that can be sent to many: wrapping it each time takes longer than sending it."""
        return zmq.Frame(payload)

    def bytes_queued(self, origin: Origin, recipient: PeerId, request: int | None = None) -> int:
        """Payload bytes not yet handed over on this connection for one request, or for all of a peer's."""
        inbound = self._inbound.get(origin)
        return inbound.bytes_queued(recipient, request) if inbound else 0

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
        if self._wakeup.fileno() in ready:
            self._wakeup.clear()
        for link in list(self._links.values()):
            if ready.get(link.socket, 0) & POLLOUT:
                self._flush(link)
            if ready.get(link.socket, 0) & POLLIN:
                self._read_link(link)
        if self._router in ready:
            self._read_router()
        for link in list(self._links.values()):  # after the last words of whoever has gone
            if link.monitor in ready:
                self._read_monitor(link)
        for origin in list(self._blocked):
            self._pump(origin, self._inbound[origin])
        if time.monotonic() - self._swept_at > SWEEP_S:
            self._sweep()
        happened = list(self._happened)
        self._happened.clear()
        return happened

    def wake(self) -> None:
        """Make `receive` return soon. May be called from any thread."""
        self._wakeup.set()

    def close(self, flush_s: float = 0.0) -> None:
        """Close all sockets; what is queued gets `flush_s` seconds to leave."""
        if self._router.closed:
            return
        deadline = time.monotonic() + flush_s
        try:
            while time.monotonic() < deadline and self._is_unsent():
                self.receive(min(0.05, flush_s))
        finally:
            if self._socket_file is not None:  # while it is still ours: whoever listens there next makes another
                with contextlib.suppress(OSError):  # somebody else has removed it, or its folder
                    self._socket_file.unlink()
            for address in list(self._links):
                self._drop_link(address, linger_s=max(0.0, flush_s))
            self._router.close(linger=int(flush_s * 1000))
            self._wakeup.close()

    def _is_unsent(self) -> bool:
        return any(link.outbox or link.uploads for link in self._links.values()) or any(i.queue for i in self._inbound.values())

    # --- sockets ------------------------------------------------------------------------------------------------------

    def _open(self, address: str) -> Link:
        if len(self._links) >= MAX_LINKS:
            idle = min(self._links.values(), key=lambda link: link.last_used)
            if time.monotonic() - idle.last_used > IDLE_S:
                self._drop_link(idle.address)
        dealer, monitor = connecting_dealer(self._context, address)
        link = self._links[address] = Link(address, dealer, monitor)
        self._poller.register(dealer, POLLIN)
        self._poller.register(monitor, POLLIN)
        return link

    def _drop_link(self, address: str, linger_s: float = 0.0) -> None:
        link = self._links.pop(address)
        self._poller.unregister(link.socket)
        self._poller.unregister(link.monitor)
        link.close(linger_s)

    def _flush(self, link: Link) -> None:
        """Send what waits for this link; what does not go waits for the socket to become writable."""
        self._poller.modify(link.socket, POLLIN if link.flush() else POLLIN | POLLOUT)

    def _send_back(self, origin: Origin, sender: PeerId, recipient: PeerId, message: Message) -> None:
        """Send a message without payload ahead of what is queued."""
        try:
            self._router.send_multipart((origin, wire.encode(self.run, sender, recipient, message), b""), DONTWAIT)
        except zmq.ZMQError as error:
            self._send_failed(origin, error)
            self.dropped += 1

    def _pump(self, origin: Origin, inbound: Inbound) -> None:
        """Hand over queued chunks while the receiver's credit lasts."""
        self._blocked.discard(origin)
        try:
            inbound.hand_over(self._router, origin, self.run)
        except zmq.ZMQError as error:
            self._send_failed(origin, error)

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
                frames = receive_frames(link.socket)
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
                link.window.allowed = min(link.window.allowed, message.num_bytes)
            elif not isinstance(message, _ANSWERS) or self._routes.get(incoming.sender) != link.address:
                self.dropped += 1
            elif isinstance(message, _CHUNKED):
                self._take_chunk(link, incoming, len(message.payload))
            else:
                self._happened.append(incoming)

    def _take_chunk(self, link: Link, incoming: Incoming, num_bytes: int) -> None:
        if link.window.take(num_bytes):
            self._grant(link, incoming.recipient, incoming.sender, link.window.credit(time.monotonic()))
        self._happened.append(incoming)

    def _grant(self, link: Link, sender: PeerId, recipient: PeerId, num_bytes: int) -> None:
        link.outbox.append(wire.encode(self.run, sender, recipient, Credit(num_bytes)))
        self._flush(link)

    def _read_router(self) -> None:
        for _ in range(BATCH):
            try:
                first = self._router.recv(DONTWAIT, copy=False)
                frames = receive_frames(self._router)
            except zmq.Again:
                return
            origin = first.bytes
            if origin in self._banned:
                self.dropped += 1
                continue
            incoming = self._decode(frames, origin)
            if isinstance(incoming, str):
                logger.warning("malformed message from %s: %s; its connection is ignored", source_of(first), incoming)
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
            inbound.allow(num_bytes)
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
        for stands in link.changes():
            peers = self._peers_at(link.address)
            self._happened.append(LinkUp(peers) if stands else LinkDown(peers, "the connection broke"))

    def _peers_at(self, address: str) -> tuple[PeerId, ...]:
        return tuple(peer for peer, at in self._routes.items() if at == address)
