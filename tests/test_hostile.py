"""Whoever can connect may send anything. Nothing of it stops a peer, fills its memory, or speaks for another peer."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgpack
import numpy as np
import psutil
import pytest
import zmq
from sockets import (
    DEADLINE_S,
    RUN,
    Attacker,
    FakePeer,
    Swarm,
    chunks,
    drift,
    made_attackers,
    made_swarms,
    open_files,
    opened_ends,
    random_vectors,
    raw_connection,
    until,
)
from virtual_host import VirtualHost

from gossipfl.protocol import membership, wire
from gossipfl.protocol.messages import (
    Activation,
    Collect,
    Continuation,
    Credit,
    Data,
    Hello,
    Later,
    Leave,
    Pull,
    Record,
    Refuse,
)
from gossipfl.runtime.node import MAX_SERVED
from gossipfl.runtime.transport import LinkDown

HELLO = Hello("L", 3, False)
PULL = Pull(1, 1, 1, ((0, 4),), "float32", 10.0)

ends = pytest.fixture(opened_ends)
attackers = pytest.fixture(made_attackers)
swarms = pytest.fixture(made_swarms)


# --- what is not ZeroMQ -----------------------------------------------------------------------------------------------


def garbage(address: str) -> list[socket.socket]:
    connection = raw_connection(address)
    connection.sendall(np.random.default_rng(1).bytes(100_000))
    return [connection]


def http(address: str) -> list[socket.socket]:
    connection = raw_connection(address)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl\r\nAccept: */*\r\n\r\n")
    return [connection]


def half_a_greeting(address: str) -> list[socket.socket]:
    connection = raw_connection(address)
    connection.sendall(b"\xff\0\0\0\0\0\0\0\x01\x7f\x03")
    return [connection]


def greeting_then_garbage(address: str) -> list[socket.socket]:
    connection = raw_connection(address)
    connection.sendall(b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(16 + 32) + os.urandom(5000))
    return [connection]


def an_enormous_frame(address: str) -> list[socket.socket]:
    """The old greeting of ZMTP 1.0, then a frame that announces 2^62 bytes."""
    connection = raw_connection(address)
    connection.sendall(b"\x01\0" + b"\xff" + (2**62).to_bytes(8, "big") + b"\0" + bytes(1000))
    return [connection]


def reset(address: str) -> list[socket.socket]:
    connection = raw_connection(address)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    connection.close()
    return []


def idle_connections(address: str) -> list[socket.socket]:
    return [raw_connection(address) for _ in range(400)]


@pytest.mark.parametrize(
    "attack", [garbage, http, half_a_greeting, greeting_then_garbage, an_enormous_frame, reset, idle_connections]
)
def test_what_is_not_zeromq_disturbs_nobody(attack, ends, monkeypatch):
    monkeypatch.setattr("gossipfl.runtime.transport.sockets.HANDSHAKE_S", 0.3)
    b, a = ends("tcp://127.0.0.1:0"), ends("tcp://127.0.0.1:0")
    a.transport.connect("b", b.address)
    before = open_files()
    connections = attack(b.address)
    try:
        a.transport.send("a", "b", PULL)
        until([a, b], lambda: PULL in b.messages)
        b.transport.queue(b.received[-1].origin, "b", "a", chunks(1, 2**20))
        until([a, b], lambda: len(a.messages) == 4)
        assert [incoming.sender for incoming in b.received] == ["a"]
        if len(connections) > 1:  # are closed for not saying hello: the machine's files are not used up
            until([a, b], lambda: open_files() < before + len(connections) + 50)
    finally:
        for connection in connections:
            connection.close()


# --- what is ZeroMQ, but not ours -------------------------------------------------------------------------------------


def header(*, version=1, run=RUN, kind="hello", sender="x", recipient="b", body=("L", 3, False), reserved=(None,) * 3) -> bytes:
    return msgpack.packb((version, run, kind, sender, recipient, body, *reserved))


GOOD = wire.encode(RUN, "x", "b", HELLO)
MALFORMED = {
    "one frame": (GOOD,),
    "an empty frame": (b"",),
    "three frames": (GOOD, b"", b""),
    "a thousand frames": (GOOD, *[b""] * 999),
    "not msgpack": (b"\xc1" * 40, b""),
    "cut short": (GOOD[:-3], b""),
    "trailing bytes": (GOOD + b"\0", b""),
    "two headers in one": (GOOD + GOOD, b""),
    "nested a thousand deep": (b"\x91" * 1000, b""),
    "a header of 2 KiB": (header(sender="x" * 2000), b""),
    "a list of a million announced": (b"\xdd\x00\x0f\x42\x40", b""),
    "a map": (msgpack.packb({"run": RUN}), b""),
    "another wire version": (header(version=2), b""),
    "version true": (header(version=True, run=-1), b""),
    "a run that is none": (header(run="7"), b""),
    "a sender that is none": (header(sender=7), b""),
    "an empty sender": (header(sender=""), b""),
    "reserved in use": (header(reserved=(b"id", None, None)), b""),
    "a body too long": (header(body=("L", 3, False, 1)), b""),
    "a float for a count": (header(body=("L", 3.0, False)), b""),
    "a negative count": (header(body=("L", -1, False)), b""),
    "a count beyond 2^62": (header(body=("L", 2**63, False)), b""),
    "a payload where there is none": (GOOD, b"x"),
    "NaN seconds": (header(kind="pull", body=(1, 1, 1, ((0, 4),), "float32", float("nan"), 0)), b""),
    "no ranges": (header(kind="pull", body=(1, 1, 1, (), "float32", 1.0, 0)), b""),
    "33 ranges": (header(kind="pull", body=(1, 1, 1, ((0, 4),) * 33, "float32", 1.0, 0)), b""),
    "a backward range": (header(kind="pull", body=(1, 1, 1, ((4, 0),), "float32", 1.0, 0)), b""),
    "data of another length": (header(kind="data", body=(1, 1, 1, 1, (0, 4), 0, 16, 16)), b"x" * 15),
    "data beyond its total": (header(kind="data", body=(1, 1, 1, 1, (0, 4), 8, 16, 16)), b"x" * 16),
}


@pytest.mark.parametrize("frames", MALFORMED.values(), ids=MALFORMED.keys())
def test_after_a_malformed_message_the_connection_is_not_listened_to(frames, ends, attackers):
    b, a = ends("tcp://127.0.0.1:0"), ends("tcp://127.0.0.1:0")
    attacker = attackers(b.address)
    attacker.say("x", "b", Leave(1))
    attacker.send(*frames)
    attacker.say("x", "b", Leave(2))
    attacker.say("x", "b", Leave(3))
    until(b, lambda: b.transport.dropped == 2)
    assert b.messages == [Leave(1)] and b.transport.malformed == 1
    a.transport.connect("b", b.address)
    a.transport.send("a", "b", HELLO)
    until([a, b], lambda: HELLO in b.messages)
    attackers(b.address).say("x", "b", Leave(4))  # another connection, with a clean record
    until(b, lambda: Leave(4) in b.messages)


def test_a_frame_beyond_the_limit_ends_its_connection(ends, attackers):
    b = ends("tcp://127.0.0.1:0")
    attacker = attackers(b.address)
    gone = attacker.socket.get_monitor_socket(zmq.Event.DISCONNECTED)
    data = Data(1, 1, 1, 1, (0, 2**18), 0, 2**20, wire.MAX_PAYLOAD_BYTES)
    attacker.send(wire.encode(RUN, "x", "b", data), bytes(wire.MAX_PAYLOAD_BYTES + 1))
    until(b, lambda: gone.poll(0))
    attacker.socket.disable_monitor()
    gone.close()
    assert b.messages == [] and b.transport.malformed == 0
    a = ends("tcp://127.0.0.1:0")
    a.transport.connect("b", b.address)
    a.transport.send("a", "b", HELLO)
    until([a, b], lambda: b.messages == [HELLO])


@pytest.mark.parametrize("frames", [(b"rubbish",), (GOOD, b"x"), (GOOD,) * 3])
def test_a_malformed_answer_closes_the_link_and_names_its_peers(frames, ends, attackers):
    a, honest, attacker = ends("tcp://127.0.0.1:0"), ends("tcp://127.0.0.1:0"), attackers()
    for name in ("evil", "its friend"):
        a.transport.connect(name, attacker.address)
    a.transport.connect("b", honest.address)
    a.transport.send("a", "evil", HELLO)
    until(a, lambda: a.links)
    origin, _ = attacker.hear()
    attacker.send(origin, *frames)
    until(a, lambda: any(isinstance(link, LinkDown) for link in a.links))
    down = a.links[-1]
    assert down.peers == ("evil", "its friend") and down.reason.startswith("malformed: ")
    a.transport.send("a", "its friend", HELLO)
    assert a.transport.dropped == 1
    a.transport.send("a", "b", HELLO)
    until([a, honest], lambda: honest.messages == [HELLO])


def test_a_malformed_answer_in_the_same_moment_as_news_of_its_link(ends):
    """The reply and the connection's own event are both waiting when the transport looks."""
    a = ends("tcp://127.0.0.1:0")
    with zmq.Context() as context, context.socket(zmq.DEALER) as attacker:  # a DEALER may speak first
        attacker.setsockopt(zmq.LINGER, 0)
        attacker.bind("tcp://127.0.0.1:*")
        a.transport.connect("evil", attacker.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))
        a.transport.send("a", "evil", HELLO)
        attacker.send(b"rubbish")
        (link,) = a.transport._links.values()
        assert link.socket.poll(DEADLINE_S * 1000) and link.monitor.poll(DEADLINE_S * 1000)
        until(a, lambda: any(isinstance(link, LinkDown) for link in a.links))
        a.pump(0.01)


def test_who_fills_a_connection_and_then_sends_rubbish_is_dropped_whole(ends, attackers):
    b = ends("tcp://127.0.0.1:0")
    attacker = attackers(b.address, receive_limit=1)  # and it does not read
    attacker.say("x", "b", PULL)
    until(b, lambda: b.received)
    origin = b.received[0].origin

    b.transport.queue(origin, "b", "x", chunks(1, 150_000, chunk=1))
    before: list[int] = []

    def is_full() -> bool:
        before.append(b.transport.bytes_queued(origin, "x"))
        return len(before) > 50 and before[-1] == before[-50]

    until(b, is_full)
    attacker.send(b"rubbish")
    until(b, lambda: b.transport.malformed)
    for _ in range(3):
        b.pump()
    assert not b.transport.bytes_queued(origin, "x") and not b.transport._blocked


# --- who says that they are somebody else -----------------------------------------------------------------------------


def test_answers_do_not_come_in_on_a_connection_that_asked_nothing(ends, attackers):
    """They return on the connection that asked; whoever connects to us may only ask."""
    b = ends("tcp://127.0.0.1:0")
    attacker = attackers(b.address)
    for message in (
        Data(1, 1, 1, 1, (0, 4), 0, 16, 16, payload=bytes(16)),
        Later(1, 9),
        Refuse(1, 1, 1),
        Record(1, 0, 1, payload=b"x"),
    ):
        attacker.say("p1", "b", message)
    attacker.say("x", "b", Leave(1))
    attackers(b.address).say("x", "b", Leave(2))
    until(b, lambda: Leave(2) in b.messages)
    assert {type(message) for message in b.messages} == {Leave}


def test_an_endpoint_speaks_only_for_the_peers_that_live_there(ends, attackers):
    a, attacker = ends("tcp://127.0.0.1:0"), attackers()
    a.transport.connect("evil", attacker.address)
    a.transport.connect("honest", "tcp://127.0.0.1:9")
    a.transport.send("a", "evil", PULL)
    until(a, lambda: a.links)
    origin, _ = attacker.hear()
    attacker.say("honest", "a", Later(1, 8), to=origin)
    attacker.say("evil", "a", Later(1, 9), to=origin)
    until(a, lambda: a.transport._foul or a.messages)
    assert [(i.sender, i.message) for i in a.received] in ([], [("evil", Later(1, 9))])


@pytest.fixture
def waiting(swarms) -> Swarm:
    """Three peers of whom p00 and p02 wait for what p01 has not trained yet; `finish` ends the run and checks its outcome."""
    swarm = swarms(random_vectors(3), 2, segments=4, patience=15.0)
    swarm.held.add("p01")
    swarm.start()
    for name in ("p00", "p02"):
        swarm.until(name, lambda name=name: _pulls(swarm, name, "p01") and "p01" in swarm.waiting)
        swarm.until("p01", lambda name=name: name in swarm.nodes["p01"].machine.desk._parked)
    return swarm


def _pulls(swarm: Swarm, name: str, of: str) -> list[Pull]:
    """Asked by `name`, not answered yet."""
    return [transfer.pull for transfer in swarm.nodes[name].machine._transfers.values() if transfer.peer == of]


def finish_undisturbed(swarm: Swarm) -> None:
    """The run goes on at once, and comes to what it comes to without the attack, bit for bit."""
    swarm.check_running()
    began = time.monotonic()
    swarm.release("p01")
    swarm.run()
    assert time.monotonic() - began < 10, "they waited for an answer that went astray"
    expected = VirtualHost(random_vectors(3), 2, train=drift).run().models()
    for name, vector in swarm.final.items():
        np.testing.assert_array_equal(vector, expected[name], err_msg=name)
    assert all(report.rejected == report.missing == 0 for reports in swarm.reports.values() for report in reports)


def forged(pull: Pull, value: float = 1e6) -> Iterator[Data]:
    for range_ in pull.ranges:
        payload = np.full(range_[1] - range_[0], value, np.float32).tobytes()
        yield Data(pull.request, pull.version, pull.version, 1, range_, 0, len(payload), len(payload), payload=payload)


@pytest.mark.parametrize("claimed", ["p01", "p02", "p00", "nobody"])
def test_data_that_was_not_asked_of_its_sender_is_not_mixed(claimed, waiting, attackers):
    attacker = attackers(waiting.addresses["p00"])
    for pull in _pulls(waiting, "p00", "p01"):
        for data in forged(pull):
            attacker.say(claimed, "p00", data)
    attacker.say("nobody", "p00", HELLO)
    waiting.until("p00", lambda: waiting.faults_about("nobody"))
    finish_undisturbed(waiting)


@pytest.mark.parametrize("claimed", ["p01", "nobody"])
def test_the_beginning_of_an_answer_by_somebody_else_spoils_nothing(claimed, waiting, attackers):
    attacker = attackers(waiting.addresses["p00"])
    for pull in _pulls(waiting, "p00", "p01"):
        start, stop = pull.ranges[0]
        total = 4 * (stop - start)
        for offset in (0, 4):
            attacker.say(claimed, "p00", Data(pull.request, 1, 1, 1, (start, stop), offset, total, 4, payload=bytes(4)))
    attacker.say("nobody", "p00", HELLO)
    waiting.until("p00", lambda: waiting.faults_about("nobody"))
    finish_undisturbed(waiting)


def test_who_claims_another_peers_name_does_not_get_its_answers(waiting, attackers):
    attacker = attackers(waiting.addresses["p01"])
    pulls = _pulls(waiting, "p00", "p01")
    for pull in pulls:
        attacker.say("p00", "p01", pull)
    attacker.say("nobody", "p01", HELLO)
    waiting.until("p01", lambda: waiting.faults_about("nobody"))
    finish_undisturbed(waiting)


def test_the_numbers_of_pulls_to_come_cannot_be_guessed(waiting):
    """Who guesses one asks for it in advance, in its owner's name, and gets the answer."""
    numbers = [next(node.machine._numbers) for node in waiting.nodes.values() for _ in range(10)]
    assert len(set(numbers)) == len(numbers) == 30
    assert min(abs(a - b) for a in numbers for b in numbers if a != b) > 2**32  # by chance once in a million runs


@pytest.mark.parametrize("message", [Refuse(0, 1, 1), Later(0, 10**9)], ids=["Refuse", "Later"])
def test_control_answers_of_somebody_else_change_nothing(message, waiting, attackers):
    attacker = attackers(waiting.addresses["p00"])
    for pull in _pulls(waiting, "p00", "p01"):
        attacker.say("p01", "p00", type(message)(pull.request, *[getattr(message, name) for name in message.__slots__[1:]]))
    attacker.say("nobody", "p00", HELLO)
    waiting.until("p00", lambda: waiting.faults_about("nobody"))
    finish_undisturbed(waiting)


# --- strangers --------------------------------------------------------------------------------------------------------


def test_a_strangers_pull_is_reported_and_not_answered(waiting, attackers):
    attacker = attackers(waiting.addresses["p00"])
    attacker.say("nobody", "p00", Pull(1, 1, 1, ((0, 4),), "float32", 10.0))
    waiting.until("p00", lambda: waiting.faults_about("nobody") == {"stranger"})
    assert attacker.hear(0.1) is None
    finish_undisturbed(waiting)
    assert attacker.hear(0.0) is None


def test_a_flood_of_strangers_pulls_fills_nothing_and_crowds_out_nobody(waiting, attackers):
    attacker = attackers(waiting.addresses["p01"])
    for request in range(10_000):
        attacker.say(f"nobody {request % 50}", "p01", Pull(request, 1, 1, ((0, 4),), "float32", 10.0))
    attacker.say("p00", "p01", Credit(77))
    node = waiting.nodes["p01"]
    waiting.until("p01", lambda: node.traffic.control_bytes > 10_000 * 30)
    reported = len(waiting.faults["p01"])
    finish_undisturbed(waiting)
    assert 1 <= reported < 1000, "one report for each message: whoever floods writes our disk full"


def test_a_flood_of_collects_by_who_does_not_read_is_bounded(waiting, attackers):
    """A collector is no neighbour: anybody may ask."""
    attacker = attackers(waiting.addresses["p01"], receive_limit=1)
    node, transport = waiting.nodes["p01"], waiting.loop_of["p01"].transport
    content = bytes(2**20)
    node.collect = lambda item: content if item == "model" else None
    for request in range(4000):
        attacker.say("collector", "p01", Collect(request % 7, "model" if request % 2 else "events", 0))
    waiting.until("p01", lambda: node.traffic.control_bytes > 4000 * 25)
    queued = [len(inbound.queue) for inbound in transport._inbound.values()]
    assert max(queued, default=0) <= 4 * MAX_SERVED
    attacker.say("collector", "p01", Credit(2**40))
    waiting.settle("p01")
    finish_undisturbed(waiting)


def test_a_stranger_may_say_anything(waiting, attackers):
    attacker = attackers(waiting.addresses["p00"])
    rng = np.random.default_rng(3)
    messages = (HELLO, PULL, Later(1, 1), Refuse(1, 1, 2**60), Leave(2**60), Credit(2**60), Collect(2**60, "../../x", 2**60))
    for _ in range(300):
        sender = ("nobody", "p00", "\x1b[2J\nfake line", "\N{GRINNING FACE}" * 16)[rng.integers(4)]
        recipient = ("p00", "p00", "p01", "nobody")[rng.integers(4)]
        attacker.say(sender, recipient, messages[rng.integers(len(messages))])
        if rng.integers(4) == 0:
            attacker.say(sender, recipient, Data(1, 1, 1, 1, (0, 250), 0, 1000, 1000, payload=rng.bytes(1000)))
            attacker.say(sender, recipient, Activation(1, 1, 1, 4, 1, 0, 1000, True, payload=rng.bytes(1000)))
            attacker.say(sender, recipient, Continuation(2, 1, 1, 0, 1000, payload=rng.bytes(1000)))
    attacker.say("the last", "p00", HELLO)
    waiting.until("p00", lambda: waiting.faults_about("the last"))
    waiting.check_running()
    waiting.release("p01")
    waiting.run()
    assert all(np.abs(vector).max() < 100 for vector in waiting.final.values())


# --- neighbours that lie ----------------------------------------------------------------------------------------------


@pytest.fixture
def fakes() -> Iterator[Callable[..., FakePeer]]:
    made: list[FakePeer] = []

    def make(*arguments, **options) -> FakePeer:
        made.append(FakePeer(*arguments, **options))
        return made[-1]

    yield make
    for fake in made:
        fake.close()


@pytest.fixture
def with_evil(swarms, fakes, monkeypatch) -> Callable[..., tuple[Swarm, FakePeer]]:
    """Runs three honest peers and `evil` to the end, and checks what always holds."""
    monkeypatch.setattr(membership, "FIRST_ANSWER_S", 0.6)
    monkeypatch.setattr(membership, "MIN_ANSWER_S", 0.6)

    def run(on_pull, *, rounds: int = 2, size: int = 1000, deadline_s: float = DEADLINE_S, **options) -> tuple[Swarm, FakePeer]:
        gossip = dict(segments=4, replicas=2, patience=1.0, linger_s=1.0) | options.pop("gossip", {})
        evil = fakes("evil", on_pull, **options)
        swarm = swarms(random_vectors(3, size), rounds, others={"evil": evil.address}, **gossip)
        evil.greet(swarm.layout, swarm.addresses)
        swarm.start()
        swarm.run(deadline_s=deadline_s)
        swarm.check_running()
        assert evil.pulls, "it was asked"
        assert set(swarm.errors.values()) == {None}
        assert all([report.round for report in reports] == list(range(1, rounds + 1)) for reports in swarm.reports.values())
        assert all(np.abs(vector).max() < 100 for vector in swarm.final.values()), "none of what it sent was mixed"
        return swarm, evil

    return run


def bits_of(*values: float) -> bytes:
    return np.array(values, np.float32).tobytes()


def serving(**changes) -> Callable:
    return lambda fake, origin, sender, pull: fake.serve(origin, sender, pull, **changes)


LIES = {
    "NaN": serving(value=np.nan),
    "infinity": serving(value=-np.inf),
    "a longer total": serving(total=10_000),
    "a shorter answer": serving(total=996, num_bytes=996, payload=bytes(996)),
    "an older version": serving(version=0),
    "no samples": serving(num_samples=0),
    "more samples than there are": serving(num_samples=2**62),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_in_a_segment_is_reported_and_its_copy_is_fetched_elsewhere(lie, with_evil):
    swarm, _ = with_evil(lie)
    assert swarm.faults_about("evil") >= {"rejected"}
    for reports in swarm.reports.values():
        assert all(report.missing == 0 and report.segments_mixed == 8 for report in reports)


def silent(fake, origin, sender, pull) -> None:
    pass


def patient(fake, origin, sender, pull) -> None:
    """Says Later, and no more."""
    fake.answer(origin, sender, Later(pull.request, 0))


def promising(fake, origin, sender, pull) -> None:
    """Says that it is on its way."""
    fake.answer(origin, sender, Later(pull.request, 1000))


def refusing(fake, origin, sender, pull) -> None:
    fake.answer(origin, sender, Refuse(pull.request, 0, 0))


def half(fake, origin, sender, pull) -> None:
    (start, stop), total = pull.ranges[0], 4 * (pull.ranges[0][1] - pull.ranges[0][0])
    fake.answer(origin, sender, Data(pull.request, pull.version, 1, 1, (start, stop), 0, total, 4, payload=bits_of(1e6)))


def other_ranges(fake, origin, sender, pull) -> None:
    fake.serve(origin, sender, pull, range=(0, 1000), total=4000, num_bytes=4000, payload=bits_of(*[1e6] * 1000))


def other_request(fake, origin, sender, pull) -> None:
    fake.serve(origin, sender, pull, request=pull.request + 1)


def last_chunk_only(fake, origin, sender, pull) -> None:
    for start, stop in pull.ranges:
        total = 4 * (stop - start)
        fake.answer(
            origin, sender, Data(pull.request, pull.version, 1, 1, (start, stop), total - 4, total, 4, payload=bits_of(1e6))
        )


def rubbish(fake, origin, sender, pull) -> None:
    fake.answer_frames(origin, b"rubbish")


@pytest.mark.parametrize(
    "behaviour", [silent, patient, promising, refusing, half, other_ranges, other_request, last_chunk_only, rubbish]
)
def test_a_neighbour_that_does_not_deliver_is_replaced(behaviour, with_evil):
    swarm, _ = with_evil(behaviour)
    for reports in swarm.reports.values():
        assert all(report.missing == 0 and report.segments_mixed == 8 for report in reports)


def test_rubbish_from_a_neighbour_is_reported_with_its_name(with_evil):
    swarm, _ = with_evil(rubbish)
    assert "malformed" in swarm.faults_about("evil")


@pytest.mark.parametrize("num_segments", [1, 4])
def test_a_neighbour_that_mixes_versions_within_an_answer_is_survived(num_segments, with_evil):
    """Chunks of two versions, laid so that their offsets fit: what is assembled must be what is counted."""

    def weave(fake, origin, sender, pull) -> None:
        for start, stop in pull.ranges:
            total = 4 * (stop - start)
            first, rest = total - 4, 4
            for version, offset, size in (
                (pull.version, 0, first),
                (pull.version + 1, first, rest),
                (pull.version, first, rest),
            ):
                data = Data(pull.request, version, version, 1, (start, stop), offset, total, size, payload=bytes(size))
                fake.answer(origin, sender, data)

    with_evil(weave, size=40_000, gossip=dict(segments=num_segments))


def test_each_chunk_sent_twice_and_backwards_is_survived(with_evil):
    def stutter(fake, origin, sender, pull) -> None:
        for start, stop in pull.ranges:
            total = 4 * (stop - start)
            for offset in [*range(total - 4, -4, -4), *range(0, total, 4), 0, 4]:
                data = Data(pull.request, pull.version, 1, 1, (start, stop), offset, total, 4, payload=bits_of(1.0))
                fake.answer(origin, sender, data)

    with_evil(stutter)


@pytest.mark.parametrize("drop", [Later, Data])
def test_a_neighbour_that_drips_does_not_hold_a_round(drop, with_evil):
    """It sends a sign of life, or a little of the model, before each deadline: all of it would take half a minute."""
    open_pulls: dict[tuple[bytes, str, int], list] = {}
    ticks = itertools.count()
    size, chunk = 500_000, 16 * 1024

    def begin(fake, origin, sender, pull) -> None:
        open_pulls.setdefault((origin, sender, pull.request), [pull, 0])

    def drip(fake) -> None:
        if next(ticks) % 12:
            return
        for (origin, sender, request), state in open_pulls.items():
            pull, offset = state
            total = 4 * (pull.ranges[0][1] - pull.ranges[0][0])
            if drop is Later:
                fake.answer(origin, sender, Later(request, total))
            elif offset + chunk < total:
                data = Data(request, pull.version, 1, 1, pull.ranges[0], offset, total, chunk, payload=bytes(chunk))
                fake.answer(origin, sender, data)
                state[1] += chunk

    with_evil(begin, on_tick=drip, rounds=1, size=size, gossip=dict(segments=1), deadline_s=10)


@pytest.mark.parametrize("claim", [2**62, 1000, 2])
def test_a_neighbour_that_claims_to_be_far_ahead_ends_nobodys_run(claim, with_evil):
    """Whoever believes it adopts a version that nobody has, and with it a round after the last."""
    swarm, _ = with_evil(refusing, newest=claim)
    assert all(not report.adopted for reports in swarm.reports.values() for report in reports)


def test_data_that_claims_a_far_newer_version_ends_nobodys_run(with_evil):
    swarm, _ = with_evil(serving(newest=2**62, value=0.5))
    assert all(not report.adopted for reports in swarm.reports.values() for report in reports)


@pytest.mark.parametrize("codec_name", ["float32", "float16"])
def test_a_flood_of_pulls_by_a_neighbour_that_does_not_read_is_bounded(codec_name, swarms, fakes, attackers):
    """Each asks for the whole model 32 times over, in ever different ranges: gigabytes, were all of it encoded at once."""
    size = 100_000
    evil = fakes("evil", refusing)
    gossip = dict(codec=codec_name, segments=4, linger_s=1.0)
    swarm = swarms(random_vectors(3, size), 2, others={"evil": evil.address}, **gossip)
    evil.greet(swarm.layout, swarm.addresses)
    swarm.held.add("p01")
    swarm.start()
    swarm.until("p00", lambda: swarm.nodes["p00"].machine.desk.newest == 1)
    flood = attackers(swarm.addresses["p00"], receive_limit=1)
    process = psutil.Process()
    before = process.memory_info().rss
    for request in range(3_000 if codec_name == "float32" else 120):
        ranges = tuple((request % 1000 + index, size - index) for index in range(32))
        flood.say("evil", "p00", Pull(request, 1, 1, ranges, codec_name, 10.0))
    flood.say("nobody", "p00", HELLO)
    swarm.until("p00", lambda: swarm.faults_about("nobody"))
    transport = swarm.loop_of["p00"].transport
    assert sum(len(inbound.queue) for inbound in transport._inbound.values()) <= 32 * MAX_SERVED * 2
    assert process.memory_info().rss - before < 100 * 2**20
    swarm.release("p01")
    swarm.run()
    swarm.check_running()


def test_a_peer_that_is_served_does_not_wait_for_one_that_asks_for_too_much(waiting, attackers):
    """While a neighbour's name is used to ask for everything, over and over, the others' pulls are answered."""
    attacker = attackers(waiting.addresses["p02"])
    for request in range(1000, 1200):
        attacker.say("p01", "p02", Pull(request, 1, 1, ((0, 1000),) * 32, "float32", 10.0))
    finish_undisturbed(waiting)


def test_the_machine_of_these_tests_uses_an_honest_fake(with_evil):
    """So that a silence or a fault in the other tests means something."""
    swarm, _ = with_evil(serving(value=0.5))
    assert swarm.faults_about("evil") == set()


def test_rubbish_in_the_middle_of_a_run_stops_no_loop(waiting, attackers):
    made: list[Attacker] = [attackers(waiting.addresses["p01"]) for _ in range(10)]
    rng = np.random.default_rng(5)
    for _ in range(50):
        for attacker in made:
            attacker.send(*[rng.bytes(rng.integers(1, 300)) for _ in range(rng.integers(1, 4))])
    with contextlib.closing(raw_connection(waiting.addresses["p01"])) as connection:
        connection.sendall(rng.bytes(5000))
        waiting.until("p01", lambda: waiting.loop_of["p01"].transport.malformed >= 10)
        finish_undisturbed(waiting)
    assert threading.active_count() < 50
