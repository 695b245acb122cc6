#!/usr/bin/env python3
"""How fast segments move between two processes over loopback TCP: from the store of one peer to a decoded, checked segment of
another, against bare pyzmq that moves frames of the same size with the same bytes in flight and looks at nothing.

    tools/bench/transport.py              # a table
    tools/bench/transport.py --json
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import click
import numpy as np
import zmq

from gossipfl.scenario.workers import ENVIRONMENT

CHUNK_BYTES = 256 * 1024
IN_FLIGHT = 16  # chunks: 4 MiB, the transport's largest window
MODEL_SIZE, SEGMENTS = 1_663_370, 8
CREDIT_EVERY = 8


def serve_credits(connection: Any, copy: bool) -> None:
    """ROUTER that keeps IN_FLIGHT chunks under way; the DEALER at the other end returns a credit for each eight."""
    router = zmq.Context().socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    connection.send(port)
    chunk = np.random.default_rng(0).bytes(CHUNK_BYTES)
    origin, _ = router.recv_multipart()
    under_way = 0
    while True:
        while under_way < IN_FLIGHT:
            router.send_multipart((origin, b"header" * 6), zmq.SNDMORE)
            router.send(chunk, copy=copy)
            under_way += 1
        if router.recv_multipart()[1] == b"stop":
            return
        under_way -= CREDIT_EVERY


def take_credits(port: int, seconds: float, copy: bool) -> float:
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    dealer.send(b"go")

    def chunk() -> int:
        _, payload = dealer.recv_multipart(copy=copy)
        chunk.received += 1
        if chunk.received % CREDIT_EVERY == 0:
            dealer.send(b"credit")
        return len(payload)

    chunk.received = 0
    rate = measure(chunk, seconds)
    dealer.send(b"stop")
    return rate


def serve_push(connection: Any, copy: bool) -> None:
    """PUSH with a high-water mark: what is under way is bounded by the queues at both ends."""
    push = zmq.Context().socket(zmq.PUSH)
    push.setsockopt(zmq.SNDHWM, IN_FLIGHT // 2)
    push.setsockopt(zmq.SNDTIMEO, 3000)
    push.setsockopt(zmq.LINGER, 0)
    connection.send(push.bind_to_random_port("tcp://127.0.0.1"))
    chunk = np.random.default_rng(0).bytes(CHUNK_BYTES)
    try:
        while True:
            push.send(b"header" * 6, zmq.SNDMORE)
            push.send(chunk, copy=copy)
    except zmq.Again:
        return  # nobody takes any more


def take_push(port: int, seconds: float, copy: bool) -> float:
    pull = zmq.Context().socket(zmq.PULL)
    pull.setsockopt(zmq.RCVHWM, IN_FLIGHT // 2)
    pull.connect(f"tcp://127.0.0.1:{port}")
    return measure(lambda: len(pull.recv_multipart(copy=copy)[1]), seconds)


def serve_segments(connection: Any, copy: bool) -> None:
    """A peer that has trained one version, on its message loop, as in a run."""
    from gossipfl.protocol.machine import Received, Start
    from gossipfl.protocol.messages import Hello
    from gossipfl.runtime.endpoint import Endpoint
    from gossipfl.runtime.gossip_settings import GossipSettings
    from gossipfl.runtime.message_loop import MessageLoop
    from gossipfl.runtime.node import build_node
    from gossipfl.runtime.transport import ZmqTransport
    from gossipfl.segments.layout import Layout

    layout = Layout.of([("model", (MODEL_SIZE,))])
    transport = ZmqTransport("tcp://127.0.0.1:0", run=1)
    vector = np.random.default_rng(0).standard_normal(MODEL_SIZE).astype(np.float32)
    settings = GossipSettings(rounds=1, segments=SEGMENTS, replicas=1)
    node = build_node("server", {"client": 1}, settings, layout, vector, 1, transport, SimpleQueue())
    node.handle(Start())
    node.handle(Received("client", Hello(layout.digest, 0, False)))
    node.trained(1, vector.copy())
    endpoint = Endpoint()
    endpoint.add(node)
    loop = MessageLoop(transport, endpoint, "bench")
    loop.start()
    connection.send(transport.address)
    connection.recv()
    loop.stop()


def take_segments(address: str, seconds: float, copy: bool) -> float:
    import torch

    from gossipfl.protocol.messages import Data, Pull
    from gossipfl.runtime.transport import Incoming, ZmqTransport
    from gossipfl.segments.assembly import Assembler
    from gossipfl.segments.codecs import codec
    from gossipfl.segments.layout import Layout, even_segments

    torch.set_num_threads(1)
    transport = ZmqTransport("tcp://127.0.0.1:0", run=1)
    transport.connect("server", address)
    assembler = Assembler(codec("float32"))
    ranges = tuple(even_segments(Layout.of([("model", (MODEL_SIZE,))]), SEGMENTS))
    decoded: list[int] = []
    requests = iter(range(1, 1 << 40))

    def pull() -> None:
        request = next(requests)
        assembler.expect(request, ranges)
        transport.send("client", "server", Pull(request, 1, 1, ranges, "float32", 60.0))

    def segment() -> int:
        while not decoded:
            for happening in transport.receive(5.0):
                if isinstance(happening, Incoming) and isinstance(happening.message, Data):
                    data = happening.message
                    values = assembler.add(data.request, data.range, data.offset, data.total, data.payload)
                    if values is not None:
                        decoded.append(values.values.nbytes)
                        if data.range == ranges[-1]:
                            pull()
        return decoded.pop()

    pull()
    pull()
    rate = measure(segment, seconds)
    transport.close()
    return rate


def measure(take: Callable[[], int], seconds: float) -> float:
    """GiB/s of what `take` returns, after a tenth of the time to warm up."""
    warm = time.perf_counter() + seconds / 10
    while time.perf_counter() < warm:
        take()
    began, num_bytes = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        num_bytes += take()
    return num_bytes / 2**30 / (time.perf_counter() - began)


PATTERNS = {
    "gossipfl": (serve_segments, take_segments, False),
    "router-dealer-copy": (serve_credits, take_credits, True),
    "router-dealer-zero-copy": (serve_credits, take_credits, False),
    "push-pull-zero-copy": (serve_push, take_push, False),
}


def rate(pattern: str, seconds: float) -> float:
    os.environ |= ENVIRONMENT  # as the processes of a run have it, from their beginning
    serve, take, copy = PATTERNS[pattern]
    spawn = multiprocessing.get_context("spawn")
    (ours, theirs), (result, report) = spawn.Pipe(), spawn.Pipe(duplex=False)
    server = spawn.Process(target=serve, args=(theirs, copy), daemon=True)
    server.start()
    assert ours.poll(60), f"{pattern}: the server did not start"
    client = spawn.Process(target=run_client, args=(take, ours.recv(), seconds, copy, report), daemon=True)
    client.start()
    assert result.poll(60 + 2 * seconds), f"{pattern}: the client did not end"
    gib_s = result.recv()
    ours.send("stop")
    for process in (client, server):
        process.join(10)
        process.kill()
    return gib_s


def run_client(take: Callable[..., float], address: Any, seconds: float, copy: bool, report: Any) -> None:
    report.send(take(address, seconds, copy))


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seconds", default=2.0, show_default=True, help="Seconds per measurement.")
@click.option("--repeats", default=3, show_default=True, help="Measurements of each, in turn; medians are shown.")
@click.option("--json", "as_json", is_flag=True)
def main(seconds: float, repeats: int, as_json: bool) -> None:
    rates: dict[str, list[float]] = {pattern: [] for pattern in PATTERNS}
    for _ in range(repeats):
        for pattern in PATTERNS:
            rates[pattern].append(rate(pattern, seconds))
    medians = {pattern: statistics.median(values) for pattern, values in rates.items()}
    best = max((pattern for pattern in PATTERNS if pattern != "gossipfl"), key=medians.__getitem__)
    figures = {
        "ratio": round(medians["gossipfl"] / medians[best], 3),
        "best": best,
        "best_gib_s": round(medians[best], 3),
        **{f"{pattern.replace('-', '_')}_gib_s": round(value, 3) for pattern, value in medians.items()},
    }
    if as_json:
        click.echo(json.dumps(figures))
    else:
        for key, value in figures.items():
            click.echo(f"{key:32} {value}")


if __name__ == "__main__":
    main()
