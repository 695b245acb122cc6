"""How well an emulated link keeps to its latency and its rates, with nothing but two sockets at its ends."""

from __future__ import annotations

import math
import socket
import statistics
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import urlsplit

from gossipfl.inference.planning.profile import DeviceProfile
from gossipfl.runtime.link_relay import LinkRelay

TURNS, BULK_S = 7, 0.1
"""Bytes that go through alone, and how long those take that tell the rate."""
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class LinkRow:
    """One direction of a device's link: as set, and the median of what was measured."""

    device: str
    direction: str
    latency_s: float
    measured_latency_s: float
    rate: float
    measured_rate: float

    @property
    def latency_error(self) -> float:
        """Share of what was set."""
        return self.measured_latency_s / self.latency_s - 1

    @property
    def rate_error(self) -> float:
        return self.measured_rate / self.rate - 1


def link_rows(devices: Iterable[DeviceProfile]) -> list[LinkRow]:
    """Of those devices whose links have both a latency and rates."""
    rows = []
    for device in devices:
        if not device.latency_s or math.inf in (device.uplink, device.downlink):
            continue
        with ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            link = LinkRelay(address, uplink=device.uplink, downlink=device.downlink, latency_s=device.latency_s)
            url = urlsplit(stack.enter_context(link).address)
            near = stack.enter_context(socket.create_connection((url.hostname, url.port), TIMEOUT_S))
            far = stack.enter_context(listener.accept()[0])
            for end in (near, far):
                end.settimeout(TIMEOUT_S)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for direction, source, sink, rate in (("up", near, far, device.uplink), ("down", far, near, device.downlink)):
                latency_s = statistics.median(_seconds(source, sink, 1) - 1 / rate for _ in range(TURNS))
                size = math.ceil(rate * BULK_S)
                bulk_s = statistics.median(_seconds(source, sink, size) - device.latency_s for _ in range(TURNS // 2))
                rows.append(LinkRow(device.name, direction, device.latency_s, latency_s, rate, size / bulk_s))
    return rows


def _seconds(source: socket.socket, sink: socket.socket, num_bytes: int) -> float:
    """From the sending of the first byte to the last one's coming in."""
    began, left = math.nan, num_bytes

    def send() -> None:
        nonlocal began
        began = time.perf_counter()
        source.sendall(bytes(num_bytes))

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    while left:
        received = len(sink.recv(1 << 16))
        if not received:
            raise ConnectionError("the emulated link broke")
        left -= received
    ended = time.perf_counter()
    sender.join()
    return ended - began
