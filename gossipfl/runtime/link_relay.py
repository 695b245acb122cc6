"""An emulated link between two TCP endpoints: what goes through is as slow and as late as its device's link, for measuring.

    with LinkRelay(server.address, uplink=25e3, downlink=100e3, latency_s=0.05) as relay:
        device = EdgeDevice([relay.address], chain)

Bytes that come in leave one behind the other at the direction's rate, and arrive when the latency is over. The times are
reckoned from when the link was free, not from when the thread awoke, so that being woken late adds no delay to what follows.
No more is read than leaves within AHEAD_S: then TCP holds the sender back. Connections share the link.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from gossipfl.errors import ConfigError, RunError

AHEAD_S = 4e-3
"""Of a rate, read before it may leave."""
EARLY_S = 3e-4
"""Awake before something is due: what sleeps is woken 0.1 to 0.2 ms late, and then its caches are cold."""
MAX_READ_BYTES = 64 * 1024
MAX_HELD_BYTES = 16 * 1024 * 1024
"""Under way in one direction of a connection: what bounds a link without a rate."""
SOCKET_BYTES = 64 * 1024
"""Of the sockets' buffers, before and behind the link."""


class LinkRelay:
    """Forwards to `target` (tcp://host:port) what connects to `address`. Rates in bytes per second, `latency_s` one way."""

    def __init__(self, target: str, *, uplink: float = math.inf, downlink: float = math.inf, latency_s: float = 0.0) -> None:
        url = urlsplit(target)
        if url.scheme != "tcp" or url.hostname is None or url.port is None:
            raise ConfigError(f"target = {target!r} is no address to relay to; give tcp://host:port")
        if not (uplink > 0 and downlink > 0 and 0 <= latency_s < math.inf):
            raise ConfigError(
                f"uplink = {uplink}, downlink = {downlink}, latency_s = {latency_s} is no link; give rates above 0 and a "
                "latency of at least 0"
            )
        self._target = url.hostname, url.port
        self._up, self._down = _Direction(uplink, latency_s), _Direction(downlink, latency_s)
        self._pipes: list[_Pipe] = []
        self._listener = _limited(socket.socket())
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="gossipfl-link-relay", daemon=True)
        self._thread.start()

    @property
    def bytes_up(self) -> int:
        """Taken from those who connected, so far."""
        return self._up.num_bytes

    @property
    def bytes_down(self) -> int:
        """Taken from the target, so far."""
        return self._down.num_bytes

    def close(self, timeout_s: float = 5.0) -> None:
        """Break all connections; what is under way is lost. Closing twice is allowed. RunError if the thread does not end."""
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise RunError(f"the link to {self._target} did not close within {timeout_s:g} s")
        self._wake_write.close()

    def __enter__(self) -> LinkRelay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            for end in (self._listener, self._wake_read, *(pipe.source for pipe in self._pipes)):
                end.close()

    def _turn(self) -> bool:
        """Wait for the next thing to do, and do it; whether there may be more."""
        now = time.monotonic()
        reading = [pipe for pipe in self._pipes if pipe.may_read(now)]
        blocked = [pipe for pipe in self._pipes if pipe.is_blocked]
        # who is behind has something waiting or is not behind any more: that is to be known before anything else comes in
        waits = [0.0 for pipe in reading if pipe.direction.is_behind]
        waits += [max(0.0, due - now - EARLY_S) for pipe in self._pipes if (due := pipe.next_time(now)) is not None]
        readers = [self._wake_read, self._listener, *(pipe.source for pipe in reading)]
        # not epoll, whose timeouts are whole milliseconds
        readable, writable, _ = select.select(readers, [pipe.sink for pipe in blocked], [], min(waits, default=None))
        if self._wake_read in readable:
            return False
        if self._listener in readable:
            self._accept()
        broken = []
        for pipe in self._pipes:
            try:
                if pipe in reading:
                    pipe.read(pipe.source in readable)
                if not pipe.is_blocked or pipe.sink in writable:
                    pipe.write()
            except OSError:
                broken.append(pipe)
        for pipe in self._pipes:
            if pipe in broken or (pipe.is_over and pipe.back.is_over):
                pipe.source.close()
                pipe.sink.close()
        self._pipes = [pipe for pipe in self._pipes if pipe.source.fileno() >= 0]
        return True

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = _limited(socket.socket())
        try:
            far.connect(self._target)
        except OSError:
            near.close()
            far.close()
            return
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        up, down = _Pipe(self._up, near, far), _Pipe(self._down, far, near)
        up.back, down.back = down, up
        self._pipes += [up, down]


@dataclass(slots=True)
class _Direction:
    rate: float
    latency_s: float
    free_at: float = -math.inf  # when all that has been read will have left
    is_behind: bool = False  # more was waiting, at the last reading, than could be read
    num_bytes: int = 0


@dataclass(eq=False, slots=True)
class _Pipe:
    """One direction of one connection."""

    direction: _Direction
    source: socket.socket
    sink: socket.socket
    under_way: deque[tuple[float, memoryview]] = field(default_factory=deque)  # due at; nothing: the end
    held: int = 0
    is_ended: bool = False
    is_blocked: bool = False
    is_over: bool = False
    back: _Pipe = field(init=False)

    def may_read(self, now: float) -> bool:
        return self._is_open and now >= self.direction.free_at - AHEAD_S / 2

    def next_time(self, now: float) -> float | None:
        """When there is something to do, without anybody having to send anything."""
        times = [self.under_way[0][0]] if self.under_way and not self.is_blocked else []
        if self._is_open and not self.may_read(now):
            times.append(self.direction.free_at - AHEAD_S / 2)
        return min(times, default=None)

    @property
    def _is_open(self) -> bool:
        return not self.is_ended and not self.is_blocked and self.held < MAX_HELD_BYTES

    def read(self, is_ready: bool) -> None:
        direction, now = self.direction, time.monotonic()
        if not is_ready:
            direction.is_behind = False
            return
        # what had to wait for the thread leaves as if it had not
        start = direction.free_at if direction.is_behind else max(direction.free_at, now)
        allowed = max(1.0, direction.rate * (now + AHEAD_S - start))
        size = int(min(allowed, MAX_READ_BYTES))
        data = self.source.recv(size)
        direction.free_at = start + len(data) / direction.rate
        direction.is_behind = len(data) == size
        direction.num_bytes += len(data)
        self.held += len(data)
        self.is_ended = not data
        self.under_way.append((direction.free_at + direction.latency_s, memoryview(data)))

    def write(self) -> None:
        self.is_blocked = False
        while self.under_way and self.under_way[0][0] <= time.monotonic():
            due, data = self.under_way[0]
            if not data:
                self.sink.shutdown(socket.SHUT_WR)
                self.is_over = True
            else:
                try:
                    sent = self.sink.send(data)
                except BlockingIOError:
                    self.is_blocked, self.direction.is_behind = True, False
                    return
                self.held -= sent
                if sent < len(data):
                    self.under_way[0] = due, data[sent:]
                    continue
            self.under_way.popleft()


def _limited(end: socket.socket) -> socket.socket:
    """With buffers that hold little, also in the connections that it accepts."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    return end
