"""An emulated link over real sockets: all bytes in their order, never sooner than the link allows, and no more than it holds.

How late they are at most depends on the machine: `gossipfl bench-inference` says so.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import numpy as np
import pytest
from sockets import DEADLINE_S, open_files, wait_for

from gossipfl.errors import ConfigError
from gossipfl.runtime.link_relay import AHEAD_S, MAX_READ_BYTES, SOCKET_BYTES, LinkRelay

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def target() -> Iterator[Callable[..., str]]:
    """Serves each connection with `handle(connection)` on a thread of its own, and returns the address."""
    listeners: list[socket.socket] = []

    def serve(handle: Callable[[socket.socket], object], receive_bytes: int | None = None) -> str:
        listener = socket.socket()
        if receive_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listeners.append(listener)

        def answer(connection: socket.socket) -> None:
            with connection:
                handle(connection)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def connect(address: str) -> socket.socket:
    url = urlsplit(address)
    return socket.create_connection((url.hostname, url.port), timeout=DEADLINE_S)


def read(connection: socket.socket, num_bytes: int = 1 << 30) -> bytes:
    """So many bytes, or all until the end."""
    content = b""
    while len(content) < num_bytes and (data := connection.recv(min(1 << 16, num_bytes - len(content)))):
        content += data
    return content


@pytest.mark.parametrize("rate", [math.inf, 3e6])
@pytest.mark.parametrize("latency_s", [0.0, 0.01])
def test_bytes_come_back_as_they_were_sent_by_any_number_of_connections(target, rate, latency_s):
    contents = [CONTENT[:100_000], CONTENT[100_000:]]
    with LinkRelay(target(echo), uplink=rate, downlink=rate, latency_s=latency_s) as relay:
        connections = [connect(relay.address) for _ in contents]
        for connection, content in zip(connections, contents, strict=True):
            threading.Thread(target=connection.sendall, args=(content,), daemon=True).start()
        for connection, content in zip(connections, contents, strict=True):
            with connection:
                assert read(connection, len(content)) == content
        assert relay.bytes_up == relay.bytes_down == len(CONTENT)


def test_a_byte_and_its_answer_take_no_less_than_twice_the_latency(target):
    with LinkRelay(target(echo), latency_s=0.03) as relay, connect(relay.address) as connection:
        for _ in range(3):
            began = time.monotonic()
            connection.sendall(b"x")
            assert read(connection, 1) == b"x"
            assert time.monotonic() - began >= 0.06


@pytest.mark.parametrize(("uplink", "downlink"), [(1e6, math.inf), (math.inf, 1e6), (1e6, 2e6)])
def test_bytes_take_no_less_than_the_rate_of_each_direction_allows(target, uplink, downlink):
    with LinkRelay(target(echo), uplink=uplink, downlink=downlink) as relay, connect(relay.address) as connection:
        began = time.monotonic()
        threading.Thread(target=connection.sendall, args=(CONTENT,), daemon=True).start()
        assert read(connection, len(CONTENT)) == CONTENT
        assert time.monotonic() - began >= len(CONTENT) / min(uplink, downlink)


def test_connections_share_the_link(target):
    rate, size = 1e6, 50_000
    with LinkRelay(target(echo), downlink=rate) as relay:
        connections = [connect(relay.address) for _ in range(4)]
        began = time.monotonic()
        for connection in connections:
            connection.sendall(bytes(size))
        for connection in connections:
            with connection:
                read(connection, size)
        assert time.monotonic() - began >= 4 * size / rate


def test_a_link_that_was_idle_has_saved_nothing_up(target):
    with LinkRelay(target(echo), uplink=1e5) as relay, connect(relay.address) as connection:
        for size in (5_000, 1, 5_000):
            began = time.monotonic()
            connection.sendall(bytes(size))
            read(connection, size)
            assert time.monotonic() - began >= size / 1e5


def test_nor_has_one_that_was_idle_after_as_much_as_is_read_at_once(target):
    rate, latency_s = 1e5, 0.03
    ahead = int(rate * AHEAD_S)
    with LinkRelay(target(echo), uplink=rate, latency_s=latency_s) as relay, connect(relay.address) as connection:
        for size in range(ahead - 2, ahead + 3):  # rounding decides which of them it is
            connection.sendall(bytes(size))
            idle_at = time.monotonic() + 2 * size / rate  # while the first is still under way
            assert wait_for(lambda due=idle_at: time.monotonic() > due)
            began = time.monotonic()
            connection.sendall(bytes(size))
            read(connection, 2 * size)
            assert time.monotonic() - began >= size / rate + 2 * latency_s


@pytest.mark.parametrize("rate", [math.inf, 1e7])
def test_who_sends_to_somebody_that_reads_nothing_is_held_back(target, rate):
    over = threading.Event()
    with LinkRelay(target(lambda _: over.wait(DEADLINE_S), SOCKET_BYTES), uplink=rate) as relay:
        with connect(relay.address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):
                connection.sendall(bytes(10_000_000))
        over.set()
    # Linux gives a socket twice the buffer that it is asked for, and the link holds what it has read ahead
    ahead = MAX_READ_BYTES if rate == math.inf else min(MAX_READ_BYTES, int(rate * AHEAD_S))
    assert 0 < relay.bytes_up <= 2 * SOCKET_BYTES + 2 * SOCKET_BYTES + 2 * ahead


def test_who_has_said_all_still_hears_the_answer_and_the_end_of_it(target):
    def count(connection: socket.socket) -> None:
        connection.sendall(str(len(read(connection))).encode())

    with LinkRelay(target(count), uplink=5e6, latency_s=0.005) as relay, connect(relay.address) as connection:
        connection.sendall(CONTENT)
        connection.shutdown(socket.SHUT_WR)
        assert read(connection) == b"300000"


def test_whoever_is_hung_up_on_hears_of_it(target):
    with LinkRelay(target(lambda connection: None)) as relay, connect(relay.address) as connection:
        assert read(connection) == b""


def test_a_target_that_is_not_there_ends_the_connection_and_the_next_one_is_tried(target):
    address = target(echo)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        nowhere = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        with LinkRelay(nowhere) as relay:
            for _ in range(2):
                with connect(relay.address) as connection:
                    assert read(connection) == b""
    with LinkRelay(address) as relay, connect(relay.address) as connection:
        connection.sendall(b"x")
        assert read(connection, 1) == b"x"


def test_closing_breaks_the_connections_and_leaves_nothing_open(target):
    address, before = target(echo), open_files()
    relay = LinkRelay(address, uplink=10.0, latency_s=30.0)
    connection = connect(relay.address)
    connection.sendall(b"x" * 1000)
    relay.close()
    relay.close()
    with connection, contextlib.suppress(ConnectionResetError):
        assert read(connection) == b""
    with pytest.raises(OSError):
        connect(relay.address)
    assert wait_for(lambda: open_files() <= before)


@pytest.mark.parametrize("address", ["ipc:///tmp/x", "tcp://127.0.0.1", "127.0.0.1:80"])
def test_only_tcp_addresses_are_relayed_to(address):
    with pytest.raises(ConfigError, match="tcp://host:port"):
        LinkRelay(address)


@pytest.mark.parametrize("link", [{"uplink": 0.0}, {"downlink": -1.0}, {"latency_s": -0.1}, {"uplink": math.nan}])
def test_a_link_that_cannot_be_is_refused(link):
    with pytest.raises(ConfigError, match="is no link"):
        LinkRelay("tcp://127.0.0.1:1", **link)
