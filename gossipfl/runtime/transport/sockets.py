"""ZeroMQ's sockets as the transport wants them: their limits, where they listen, the frames of one message."""

from __future__ import annotations

from pathlib import Path

import zmq

from gossipfl.errors import RunError
from gossipfl.protocol import wire
from gossipfl.runtime.addresses import bind_failure, in_use, is_listened_at

HIGH_WATER_MARK = 64
HANDSHAKE_S = 3.0

# Plain numbers: combining the enumeration's members takes longer than a receive.
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
DONTWAIT, SNDMORE = int(zmq.DONTWAIT), int(zmq.SNDMORE)


def listening_router(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """A ROUTER at this address. RunError where that cannot be."""
    if address.startswith("ipc://") and is_listened_at(address.removeprefix("ipc://")):
        raise RunError(in_use(address))  # ZeroMQ would take it over in silence
    router = context.socket(zmq.ROUTER)
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


def socket_file(address: str) -> Path | None:
    """The file that listening at this address makes and that ZeroMQ does not remove, as it does for `ipc://*`."""
    kind, _, name = address.partition("://")
    return Path(name).absolute() if kind == "ipc" and name != "*" and not name.startswith("@") else None


def connecting_dealer(context: zmq.Context[zmq.Socket[bytes]], address: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """A DEALER that connects to this address, and the socket that tells of its connection."""
    dealer = context.socket(zmq.DEALER)
    _set_limits(dealer, address)
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.RECONNECT_IVL, 100)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
    events = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
    if address.startswith("inproc:"):  # has neither handshake nor monitor events
        events = zmq.Event.CLOSED
    monitor = dealer.get_monitor_socket(events)
    dealer.connect(address)
    return dealer, monitor


def _set_limits(end: zmq.Socket[bytes], address: str) -> None:
    end.setsockopt(zmq.IPV6, int(address.startswith("tcp://[")))
    end.setsockopt(zmq.LINGER, 0)
    end.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    end.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    end.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
    end.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))


def receive_frames(end: zmq.Socket[bytes]) -> list[wire.Buffer]:
    """The frames of one message; the payload is not copied. Frames beyond those that a message has are passed over."""
    frame = end.recv(DONTWAIT, copy=False)
    frames: list[wire.Buffer] = [frame.buffer]
    while frame.more:
        frame = end.recv(copy=False)
        if len(frames) <= 2:
            frames.append(frame.buffer)
    return frames


def source_of(frame: zmq.Frame) -> str:
    """Where a frame came from, as people say it."""
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return "an unknown address"
