"""What every transport must do, over TCP (IPv4 and IPv6), Unix sockets and in one process; and what is ZeroMQ's own."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import zmq
from sockets import (
    DEADLINE_S,
    Attacker,
    chunks,
    free_address,
    made_attackers,
    new_address,
    open_files,
    opened_ends,
    payload_of,
    until,
    wait_for,
)

from gossipfl.errors import ConfigError, GossipflError, RunError
from gossipfl.protocol import wire
from gossipfl.protocol.messages import (  # fmt: skip
    Activation,
    Collect,
    Credit,
    Data,
    Failed,
    Hello,
    Later,
    Leave,
    Offer,
    PlanRequest,
    Pull,
    Record,
    Refuse,
    Result,
)
from gossipfl.runtime.transport import LinkDown, LinkUp, ZmqTransport, zmq_transport
from gossipfl.runtime.transport.link import MAX_UNSENT_BYTES
from gossipfl.runtime.transport.window import FIRST_WINDOW_BYTES, MAX_WINDOW_BYTES

KINDS = ("tcp4", "tcp6", "ipc", "inproc")
NETWORKED = KINDS[:3]  # inproc reports no links and does not reconnect: there is nothing to break
CHUNK = wire.MAX_PAYLOAD_BYTES
HELLO = Hello("L", 3, False)
PULL = Pull(1, 1, 1, ((0, 4),), "float32", 10.0)

ends = pytest.fixture(opened_ends)
attackers = pytest.fixture(made_attackers)


@pytest.fixture(params=KINDS)
def pair(request, ends):
    """Two ends, a and b; a knows where b is, b does not know where a is."""
    a, b = ends(new_address(request.param)), ends(new_address(request.param))
    a.transport.connect("b", b.address)
    return a, b


def asked(a, b, request=1):
    """The connection on which a has asked b."""
    before = len(b.received)
    a.transport.send("a", "b", Pull(request, 1, 1, ((0, 4),), "float32", 10.0))
    until([a, b], lambda: len(b.received) > before)
    return b.received[-1].origin


def port_of(address):
    return urlsplit(address).port


# --- every transport --------------------------------------------------------------------------------------------------


def test_a_message_arrives_once_with_its_addresses(pair):
    a, b = pair
    a.transport.send("a", "b", HELLO)
    a.transport.send("a2", "b2", PULL)  # unknown there: lost
    a.transport.connect("b2", b.address)
    a.transport.send("a2", "b2", PULL)
    a.transport.send("a", "b", Leave(9))
    until([a, b], lambda: Leave(9) in b.messages)
    assert [(i.sender, i.recipient, i.message) for i in b.received] == [
        ("a", "b", HELLO),
        ("a2", "b2", PULL),
        ("a", "b", Leave(9)),
    ]
    assert b.received[0].num_bytes == len(wire.encode(b.transport.run, "a", "b", HELLO))
    assert all(incoming.origin == b.received[0].origin for incoming in b.received)
    assert a.transport.dropped == 1 and b.transport.dropped == 0 and a.received == []


def test_answers_return_on_the_connection_that_asked(pair):
    a, b = pair
    origin = asked(a, b)
    b.transport.send("b", "a", Later(1, 16), origin)
    b.transport.queue(origin, "b", "a", [Data(1, 1, 1, 1, (0, 4), 0, 16, 16, payload=memoryview(b"0123456789abcdef"))])
    b.transport.send("b", "a", Refuse(2, 1, 1), origin)
    b.transport.queue(origin, "b", "a", [Record(3, 0, -1, payload=b"")])
    until([a, b], lambda: len(a.received) == 4)
    assert {type(message) for message in a.messages} == {Later, Data, Refuse, Record}
    assert {(i.sender, i.recipient, i.origin) for i in a.received} == {("b", "a", None)}
    (data,) = [incoming for incoming in a.received if isinstance(incoming.message, Data)]
    assert bytes(data.message.payload) == b"0123456789abcdef"
    assert data.num_bytes == 16 + len(wire.encode(b.transport.run, "b", "a", data.message))


def test_an_answer_larger_than_the_window_arrives_whole_and_in_order(pair):
    a, b = pair
    origin = asked(a, b)
    total = 20 * 2**20
    answer = chunks(1, total)
    highest = 0

    def in_flight() -> int:
        """Handed to the socket by b and not read by a."""
        return total - b.transport.bytes_queued(origin, "a", 1) - sum(message.num_bytes for message in a.messages)

    def is_complete() -> bool:
        nonlocal highest
        highest = max(highest, in_flight())
        return len(a.messages) == len(answer)

    b.transport.queue(origin, "b", "a", answer)
    assert in_flight() <= FIRST_WINDOW_BYTES, "nothing is known of this connection's rate yet"
    until([a, b], is_complete)
    assert highest <= MAX_WINDOW_BYTES + CHUNK
    assert [message.offset for message in a.messages] == list(range(0, total, CHUNK))
    assert payload_of(a.messages) == payload_of(answer)
    assert b.transport.bytes_queued(origin, "a") == 0 and b.transport.num_queued(origin) == 0


def test_thousands_of_small_chunks_arrive_whole_and_in_order(pair):
    """More than the sockets queue (they count messages, not bytes)."""
    a, b = pair
    origin = asked(a, b)
    answer = chunks(1, 3000 * 40, chunk=40)
    b.transport.queue(origin, "b", "a", answer)
    until([a, b], lambda: len(a.messages) == len(answer))
    assert payload_of(a.messages) == payload_of(answer)


def test_a_sender_that_has_forgotten_its_credit_is_given_some_anew(pair):
    a, b = pair
    origin = asked(a, b)
    for answer in (chunks(1, 12 * 2**20), chunks(2, 12 * 2**20)):
        a.received.clear()
        b.transport.queue(origin, "b", "a", answer)
        until([a, b], lambda answer=answer: len(a.messages) == len(answer))
        b.transport._forget_idle()


def test_a_receiver_that_does_not_read_holds_back_only_itself(pair, ends):
    a, b = pair
    c = ends(new_address("tcp4"))
    b.transport.connect("nobody", free_address())
    origin = asked(a, b)
    c.transport.connect("b", b.address)
    c.transport.send("c", "b", PULL)
    until([b, c], lambda: len(b.received) == 2)
    answer = chunks(1, 12 * 2**20)
    b.transport.queue(origin, "b", "a", answer)  # a does not read
    b.transport.queue(b.received[-1].origin, "b", "c", answer)
    b.transport.send("b", "nobody", HELLO)
    until([b, c], lambda: len(c.messages) == len(answer))
    assert payload_of(c.messages) == payload_of(answer)
    assert b.transport.bytes_queued(origin, "a", 1) >= 12 * 2**20 - FIRST_WINDOW_BYTES, "the rest is not copied anywhere"
    until([a, b], lambda: len(a.messages) == len(answer))
    assert payload_of(a.messages) == payload_of(answer)


def test_a_control_message_overtakes_queued_data(pair):
    a, b = pair
    origin = asked(a, b)
    b.transport.queue(origin, "b", "a", chunks(1, 8 * 2**20))
    b.transport.send("b", "a", Later(2, 5), origin)
    until([a, b], lambda: Later(2, 5) in a.messages)
    assert a.messages.index(Later(2, 5)) * CHUNK <= FIRST_WINDOW_BYTES


def test_two_answers_on_one_connection_are_counted_apart(pair):
    a, b = pair
    origin = asked(a, b)
    b.transport.queue(origin, "b", "a", chunks(1, 2 * 2**20))
    b.transport.queue(origin, "b", "a", chunks(2, 3 * 2**20))
    b.transport.queue(origin, "b", "a2", chunks(2, 2**20))
    assert b.transport.num_queued(origin) == 3
    assert b.transport.bytes_queued(origin, "a", 2) == 3 * 2**20
    assert b.transport.bytes_queued(origin, "a2") == 2**20
    until([a, b], lambda: not b.transport.num_queued(origin))
    until([a, b], lambda: len(a.messages) == 6 * 4)


def test_an_empty_record_behind_data_of_the_same_number_is_sent(pair):
    """Nothing keeps a peer from giving one number to a Pull and to Collects."""
    a, b = pair
    origin = asked(a, b)
    b.transport.queue(origin, "b", "a", chunks(1, 2**20))
    b.transport.queue(origin, "b", "a", [Record(1, 0, -1, payload=b"") for _ in range(2)])
    until([a, b], lambda: len(a.messages) == 4 + 2)


def test_sending_to_a_peer_that_is_not_there_neither_blocks_nor_grows(pair):
    a, b = pair
    a.transport.connect("c", free_address())
    began = time.monotonic()
    for number in range(5000):
        a.transport.send("a", "c", Leave(number))
        a.transport.send("a", "unheard of", Leave(number))
    assert time.monotonic() - began < 10
    assert a.transport.dropped > 5000 + 4000
    assert sum(len(link.outbox) for link in a.transport._links.values()) <= 1000
    b.transport.send("b", "a", Later(1, 0), b"gone")  # a connection that has never been, or is no more
    b.transport.queue(b"gone", "b", "a", chunks(1, 2**20))
    assert b.transport.bytes_queued(b"gone", "a") == 0 and not b.transport._inbound
    asked(a, b)


def test_wake_ends_a_waiting_receive(pair):
    a, _ = pair
    thread = threading.Timer(0.05, a.transport.wake)
    began = time.monotonic()
    thread.start()
    a.pump(DEADLINE_S)
    assert time.monotonic() - began < DEADLINE_S / 2
    thread.join()
    a.transport.wake()
    a.transport.wake()
    a.pump(DEADLINE_S)
    began = time.monotonic()
    a.pump(0.02)
    assert time.monotonic() - began >= 0.015, "two wakes end one receive"


def test_closing_sends_what_waits_first(pair):
    """As many as the reader's socket queues: over Unix sockets ZeroMQ drops what is beyond it when a connection breaks."""
    a, b = pair
    asked(a, b)
    for round_ in range(40):
        a.transport.send("a", "b", Leave(round_))
    a.transport.close(DEADLINE_S)
    until(b, lambda: len(b.messages) == 1 + 40)


def test_closing_waits_for_answers_to_be_taken(pair):
    """All but what the connection carries at the end: ZeroMQ drops what was not read when a connection breaks."""
    a, b = pair
    origin = asked(a, b)
    answer = chunks(1, 12 * 2**20)
    b.transport.queue(origin, "b", "a", answer)
    closing = threading.Thread(target=b.transport.close, args=(DEADLINE_S,))
    closing.start()
    until(a, lambda: not closing.is_alive())
    a.pump()
    assert len(a.messages) * CHUNK >= 12 * 2**20 - MAX_WINDOW_BYTES - CHUNK


def test_closing_does_not_wait_for_who_does_not_read(pair):
    a, b = pair
    b.transport.queue(asked(a, b), "b", "a", chunks(1, 12 * 2**20))
    began = time.monotonic()
    b.transport.close(0.1)
    assert time.monotonic() - began < DEADLINE_S / 2


# --- what is asked with a payload -------------------------------------------------------------------------------------


def activation(request, total, cut=1):
    """The chunks of an activation of `total` random bytes."""
    return [Activation(request, 1, cut, 8, 1, c.offset, total, payload=c.payload) for c in chunks(request, total)]


def uploaded(end):
    return [message for message in end.messages if isinstance(message, Activation)]


def test_an_activation_arrives_whole_and_in_order_with_what_was_asked_before_it(pair):
    a, b = pair
    sent = activation(2, 9 * 2**20 + 5)
    a.transport.send("a", "b", PlanRequest(1, payload=b'{"a": 1}'))
    for chunk in sent:
        a.transport.send("a", "b", chunk)
    until([a, b], lambda: len(b.messages) == 1 + len(sent))
    assert b.messages == [PlanRequest(1), *sent] and bytes(b.messages[0].payload) == b'{"a": 1}'
    assert b"".join(bytes(m.payload) for m in uploaded(b)) == b"".join(bytes(m.payload) for m in sent)
    assert a.transport.bytes_unsent("b") == 0 and a.transport.dropped == b.transport.dropped == 0


def test_offers_results_and_failures_return_on_the_connection_that_asked(pair):
    a, b = pair
    origin = asked(a, b)
    scores = chunks(3, 12 * 2**20)
    b.transport.queue(origin, "b", "a", [Offer(2, 0, 2, payload=b"{}")])
    b.transport.queue(origin, "b", "a", [Result(3, 1, 0.5, c.offset, c.total, payload=c.payload) for c in scores])
    b.transport.send("b", "a", Failed(4, "busy", "too much to do"), origin)
    until([a, b], lambda: len(a.messages) == 2 + len(scores))
    results = [message for message in a.messages if isinstance(message, Result)]
    assert b"".join(bytes(message.payload) for message in results) == payload_of(scores)
    assert Offer(2, 0, 2) in a.messages and Failed(4, "busy", "too much to do") in a.messages


def test_a_control_message_overtakes_an_activation_that_waits(pair):
    a, b = pair
    for chunk in activation(1, 40 * 2**20):  # more than the sockets take at once
        a.transport.send("a", "b", chunk)
    a.transport.send("a", "b", Leave(1))
    until([a, b], lambda: Leave(1) in b.messages and len(uploaded(b)) == 160)
    assert b.messages[-1] != Leave(1)


def test_what_waits_for_a_peer_that_is_not_there_is_bounded_and_can_be_taken_back(ends):
    a = ends("tcp://127.0.0.1:0")
    a.transport.connect("b", free_address())
    for request in range(3):
        for chunk in activation(request, wire.MAX_TENSOR_BYTES):
            a.transport.send("a", "b", chunk)
    assert a.transport.bytes_unsent("b") == 2 * wire.MAX_TENSOR_BYTES == MAX_UNSENT_BYTES
    assert a.transport.dropped == wire.MAX_TENSOR_BYTES // CHUNK
    a.transport.cancel("b", 0)
    a.transport.cancel("unheard of", 0)
    assert a.transport.bytes_unsent("b") == wire.MAX_TENSOR_BYTES and a.transport.bytes_unsent("unheard of") == 0


@pytest.mark.parametrize("kind", NETWORKED)
def test_what_waits_to_be_sent_is_lost_with_its_connection(kind, ends):
    a, b = ends(new_address(kind)), ends(new_address(kind))
    a.transport.connect("b", b.address)
    asked(a, b)
    for chunk in activation(1, wire.MAX_TENSOR_BYTES):
        a.transport.send("a", "b", chunk)
    assert a.transport.bytes_unsent("b"), "b does not read"
    b.transport.close()
    until(a, lambda: any(isinstance(link, LinkDown) for link in a.links))
    assert a.transport.bytes_unsent("b") == 0


@pytest.mark.parametrize(
    "answer", [Offer(1, 0, 1, payload=b"x"), Result(1, 1, 0.0, 0, 1, payload=b"x"), Failed(1, "busy", "x")]
)
def test_answers_of_inference_do_not_come_in_on_a_connection_that_asked_nothing(answer, ends, attackers):
    b = ends("tcp://127.0.0.1:0")
    attackers(b.address).send(wire.encode(b.transport.run, "x", "b", answer), getattr(answer, "payload", b""))
    until(b, lambda: b.transport.dropped == 1)
    assert b.received == []


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKED)
def test_a_link_is_reported_when_the_other_end_appears_goes_and_comes_back(kind, ends):
    address = {"tcp4": free_address(), "tcp6": free_address().replace("127.0.0.1", "[::1]"), "ipc": new_address("ipc")}[kind]
    a = ends(new_address(kind))
    a.transport.connect("b", address)
    a.transport.connect("b2", address)
    a.transport.send("a", "b", HELLO)
    a.pump(0.05)
    assert a.links == [], "nobody is there"
    b = ends(address)
    until([a, b], lambda: b.received and a.links)
    assert a.links == [LinkUp(("b", "b2"))] and b.messages == [HELLO]
    b.transport.close()
    until(a, lambda: len(a.links) == 2)
    assert isinstance(a.links[1], LinkDown) and a.links[1].peers == ("b", "b2")
    b = _opened_again(ends, address)
    until([a, b], lambda: len(a.links) == 3)
    assert a.links[2] == LinkUp(("b", "b2"))
    a.transport.send("a", "b", Leave(1))  # before, it may be lost with the old connection
    until([a, b], lambda: b.messages == [Leave(1)])


def _opened_again(ends, address):
    """Once the old socket, which ZeroMQ closes in its own time, has given the address back."""
    reopened = []

    def try_() -> bool:
        try:
            reopened.append(ends(address))
        except RunError:
            return False
        return True

    assert wait_for(try_)
    return reopened[0]


def test_an_answer_to_a_peer_that_has_gone_is_forgotten(ends, attackers):
    """Otherwise each peer that vanishes in the middle of a transfer keeps a whole version of the model in memory."""
    b = ends("tcp://127.0.0.1:0")
    for number in range(1, 6):
        gone = attackers(b.address)
        gone.say("x", "b", PULL)
        until(b, lambda number=number: len(b.received) == number)
        b.transport.queue(b.received[-1].origin, "b", "x", chunks(1, 2**20))
        gone.close()
    a = ends("tcp://127.0.0.1:0")
    a.transport.connect("b", b.address)
    asked(a, b)
    until(b, lambda: not any(inbound.queue for inbound in b.transport._inbound.values()), deadline_s=12)


@pytest.mark.parametrize("num_strangers", [4, 5])
def test_a_transfer_goes_on_however_many_others_connect(num_strangers, ends, attackers, monkeypatch):
    """What is remembered of connections is bounded, but both ends of one must remember the same of it."""
    monkeypatch.setattr(zmq_transport, "MAX_REMEMBERED", 4)
    a, b = ends("tcp://127.0.0.1:0"), ends("tcp://127.0.0.1:0")
    a.transport.connect("b", b.address)
    origin = asked(a, b)
    for request in range(1, 4):
        b.transport.queue(origin, "b", "a", chunks(request, 19 * 2**20))
        until([a, b], lambda request=request: len(a.messages) == 76 * request, deadline_s=8)
        for stranger in [attackers(b.address) for _ in range(num_strangers)]:
            before = len(b.received)
            stranger.say("x", "b", PULL)
            until([a, b], lambda before=before: len(b.received) > before)
            b.transport.queue(b.received[-1].origin, "b", "x", chunks(1, 2**10))


def test_a_newcomer_is_served_when_as_many_as_are_remembered_came_before(ends, attackers, monkeypatch):
    monkeypatch.setattr(zmq_transport, "MAX_REMEMBERED", 4)
    a, b = ends("tcp://127.0.0.1:0"), ends("tcp://127.0.0.1:0")
    for number, stranger in enumerate([attackers(b.address) for _ in range(4)], start=1):
        stranger.say("x", "b", PULL)
        until(b, lambda number=number: len(b.received) == number)
        b.transport.queue(b.received[-1].origin, "b", "x", chunks(1, 2**10))
    a.transport.connect("b", b.address)
    b.transport.queue(asked(a, b), "b", "a", chunks(1, 3 * 2**20))
    until([a, b], lambda: len(a.messages) == 12, deadline_s=8)


def test_outgoing_connections_are_capped_by_closing_idle_ones(ends, monkeypatch):
    monkeypatch.setattr(zmq_transport, "IDLE_S", 0.0)
    a, b = ends("tcp://127.0.0.1:0"), ends("tcp://127.0.0.1:0")
    a.transport.connect("b", b.address)
    a.transport.send("a", "b", HELLO)
    until([a, b], lambda: b.received)
    before = open_files()
    for number in range(150):
        a.transport.connect(f"p{number}", free_address())
        a.transport.send("a", f"p{number}", HELLO)
        a.pump()
        assert len(a.transport._links) <= zmq_transport.MAX_LINKS
    assert wait_for(lambda: open_files() < before + 6 * zmq_transport.MAX_LINKS)
    a.transport.send("a", "b", Leave(2))  # its connection was closed, and is made again
    until([a, b], lambda: Leave(2) in b.messages)


def test_a_connection_that_data_comes_in_on_is_not_idle(ends, monkeypatch):
    monkeypatch.setattr(zmq_transport, "IDLE_S", 0.0)
    monkeypatch.setattr(zmq_transport, "MAX_LINKS", 2)
    a, b, c = (ends("tcp://127.0.0.1:0") for _ in range(3))
    for name, end in (("b", b), ("c", c), ("d", c)):
        a.transport.connect(name, end.address)
    a.transport.connect("d", free_address())
    origin = asked(a, b)
    a.transport.send("a", "c", HELLO)
    b.transport.queue(origin, "b", "a", chunks(1, 8 * 2**20))
    until([a, b], lambda: len(a.messages) >= 4)
    a.transport.send("a", "d", HELLO)  # one too many: c's is the one that nothing happens on
    until([a, b, c], lambda: len(a.messages) == 32, deadline_s=5)


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_address_is_one_that_others_can_use(host, ends):
    """Also those whose machine has no IPv6: no IPv4 address in the clothes of one."""
    end = ends(f"tcp://{host}:0")
    assert end.address in (f"tcp://127.0.0.1:{port_of(end.address)}", f"tcp://[::1]:{port_of(end.address)}")
    assert port_of(end.address) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_address_in_use_is_an_error_that_says_what_to_do(kind, ends):
    """Also a Unix socket, which ZeroMQ would take over in silence from whoever listens there."""
    first = ends(new_address(kind))
    host = {"tcp4": "127.0.0.1", "tcp6": "[::1]"}.get(kind)
    address = f"tcp://{host}:{port_of(first.address)}" if host else first.address
    before = open_files()
    for _ in range(3):
        with pytest.raises(RunError, match="in use; choose another") as failure:
            ends(address)
        assert address in str(failure.value)
    assert wait_for(lambda: open_files() <= before, 5), "a failed attempt leaves nothing open"


def test_a_socket_file_of_too_long_a_path_says_how_long_it_may_be(ends):
    with pytest.raises(
        RunError, match=r"is longer than the \d+ characters that the path of a socket may have; choose a shorter"
    ):
        ends(f"ipc:///tmp/{'x' * 200}")


def test_an_address_of_another_machine_is_an_error_that_says_what_to_do(ends):
    with pytest.raises(RunError, match=r"tcp://192\.0\.2\.1:0 is no address of this machine; .*advertise"):
        ends("tcp://192.0.2.1:0", insecure=True)  # RFC 5737: nobody's


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "*", "192.0.2.1", "[2001:db8::1]", "example.org", socket.gethostname()])
def test_binding_beyond_loopback_is_refused_unless_insecure(host, ends):
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1.*insecure") as refusal:
        ends(f"tcp://{host}:0")
    assert host.strip("[]").lower() in str(refusal.value).lower()


@pytest.mark.parametrize("host", ["0.0.0.0", "*"])
def test_binding_to_all_addresses_is_allowed_if_insecure(host, ends):
    b = ends(f"tcp://{host}:0", insecure=True)
    a = ends("tcp://127.0.0.1:0")
    a.transport.connect("b", f"tcp://127.0.0.1:{port_of(b.address)}")
    asked(a, b)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:5000", "udp://127.0.0.1:5000", "tcp://[::1", "tcp://127.0.0.1:99999", "tcp://", ""]
)
def test_an_address_that_is_none_is_an_error_of_ours(address, ends):
    """Never one of ZeroMQ's or of the URL parser; and found when it is given, not when it is first used."""
    with pytest.raises(GossipflError):
        ends(address)
    if not address.startswith("udp"):
        a = ends("tcp://127.0.0.1:0")
        with pytest.raises(GossipflError, match="p1"):
            a.transport.connect("p1", address)
            a.transport.send("a", "p1", HELLO)


@pytest.mark.parametrize(
    ("advertise", "expected"),
    [
        (None, "tcp://127.0.0.1:{port}"),
        ("tcp://peer.example:7000", "tcp://peer.example:7000"),
        ("tcp://peer.example:0", "tcp://peer.example:{port}"),
        ("tcp://[2001:db8::1]:0", "tcp://[2001:db8::1]:{port}"),
        ("tcp://[2001:db8:0:1::5]:7000", "tcp://[2001:db8:0:1::5]:7000"),
        ("tcp://10.0.0.1:07000", "tcp://10.0.0.1:07000"),
    ],
)
def test_what_others_are_told_is_the_advertised_address_with_the_port_found(advertise, expected, ends):
    end = ends("tcp://127.0.0.1:0", advertise=advertise)
    port = port_of(end.transport._router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))
    assert end.address == expected.format(port=port)


# --- what comes in ----------------------------------------------------------------------------------------------------


def test_messages_of_another_run_and_of_unknown_kinds_are_counted_and_ignored(ends, attackers):
    b = ends("tcp://127.0.0.1:0")
    a = attackers(b.address)
    a.say("a", "b", HELLO, run=b.transport.run + 1)
    known = wire.encode(b.transport.run, "a", "b", HELLO)
    a.send(known.replace(b"\xa5hello", b"\xa5salve"), b"")
    a.send(known.replace(b"\xa5hello", b"\xa5salve"), b"with a payload")
    a.say("a", "b", HELLO)
    until(b, lambda: b.received)
    assert b.messages == [HELLO] and b.transport.unknown == 3
    assert b.transport.malformed == b.transport.dropped == 0


def test_credit_that_is_not_owed_does_no_harm(ends, attackers):
    b = ends("tcp://127.0.0.1:0")
    a = attackers(b.address, receive_limit=1)
    for amount in (0, 1, 2**62):
        a.say("a", "b", Credit(amount))
    a.say("a", "b", PULL)
    until(b, lambda: b.received)
    origin = b.received[0].origin
    b.transport.queue(origin, "b", "a", chunks(1, 30 * 2**20))
    a.say("a", "b", Credit(2**62))
    a.say("a", "b", Credit(0))
    a.say("a", "b", HELLO)
    until(b, lambda: HELLO in b.messages)
    assert b.transport.bytes_queued(origin, "a") >= 30 * 2**20 - 3 * MAX_WINDOW_BYTES - CHUNK


def test_the_tap_sees_every_well_formed_message_once(ends):
    a, b = ends("tcp://127.0.0.1:0"), ends("tcp://127.0.0.1:0")
    seen = []
    b.transport.tap = seen.append
    a.transport.connect("b", b.address)
    for message in (HELLO, PULL, Collect(1, "events", 0)):
        a.transport.send("a", "b", message)
    until([a, b], lambda: len(b.received) == 3)
    assert seen == b.received


# --- what is left over ------------------------------------------------------------------------------------------------


def socket_file(address: str) -> Path:
    return Path(address.removeprefix("ipc://"))


def test_a_socket_file_goes_with_who_listens_there_and_with_nobody_else(ends):
    address = new_address("ipc")
    first = ends(address)
    with pytest.raises(RunError, match="in use"):
        ends(address)
    assert socket_file(address).is_socket()
    first.transport.close()
    assert not socket_file(address).exists()
    second, asker = ends(address), ends("tcp://127.0.0.1:0")  # at once: ZeroMQ may not be done with the first
    first.transport.close()
    asker.transport.connect("b", address)
    asker.transport.send("a", "b", HELLO)
    until([asker, second], lambda: second.messages == [HELLO])
    assert socket_file(address).is_socket()


def test_a_socket_file_is_found_again_from_another_folder(ends, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    end = ends("ipc://here")
    assert (tmp_path / "here").is_socket()
    monkeypatch.chdir("/")
    end.transport.close()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_that_zeromq_makes_for_a_socket_goes_too(ends):
    end = ends("ipc://*")
    assert socket_file(end.address).is_socket()
    end.transport.close()
    assert wait_for(lambda: not socket_file(end.address).parent.exists())


def test_a_socket_without_a_file_takes_none_along(ends, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"@gossipfl-{tmp_path.name}"  # Linux's own kind of name
    end = ends(f"ipc://{name}")
    (tmp_path / name).touch()
    end.transport.close()
    assert (tmp_path / name).exists()


def test_a_socket_file_that_somebody_has_removed_is_not_missed(ends):
    address = new_address("ipc")
    end = ends(address)
    socket_file(address).unlink()
    end.transport.close()


def test_closing_closes_everything_also_where_what_still_comes_in_raises(ends):
    address = new_address("ipc")
    a, b = ends("tcp://127.0.0.1:0"), ends(address)
    a.transport.connect("b", address)
    b.transport.connect("nobody", free_address())
    b.transport.send("b", "nobody", HELLO)  # keeps it from closing at once
    b.transport.tap = lambda incoming: 1 // 0
    a.transport.send("a", "b", HELLO)
    until(a, lambda: a.links)
    a.pump()
    before = open_files()
    with pytest.raises(ZeroDivisionError):
        b.transport.close(DEADLINE_S)
    assert not socket_file(address).exists()
    assert wait_for(lambda: open_files() < before)


def test_closing_leaves_no_file_open(ends):
    def once() -> None:
        a, b = ends("tcp://127.0.0.1:0"), ends("tcp://127.0.0.1:0")
        a.transport.connect("b", b.address)
        a.transport.connect("c", free_address())
        a.transport.send("a", "c", HELLO)
        b.transport.queue(asked(a, b), "b", "a", chunks(1, 2**20))
        until([a, b], lambda: len(a.messages) == 4)
        a.transport.close()
        b.transport.close()

    once()  # ZeroMQ starts its own threads
    before = open_files()
    for _ in range(3):
        once()
    assert wait_for(lambda: open_files() <= before, 5)


@pytest.mark.filterwarnings("error")
def test_closing_closes_each_socket_rather_than_leave_it_to_the_garbage_collector(ends, monkeypatch):
    unclosed = []
    monkeypatch.setattr("sys.unraisablehook", unclosed.append)
    a, b = ends("tcp://127.0.0.1:0"), ends("tcp://127.0.0.1:0")
    a.transport.connect("b", b.address)
    asked(a, b)
    links = list(a.transport._links.values())
    a.transport.close()
    assert all(link.socket.closed and link.monitor.closed for link in links)
    assert not unclosed


def test_wake_after_closing_writes_to_nobodys_file(ends):
    """The number of a closed file is given to the next that is opened."""
    end = ends("tcp://127.0.0.1:0")
    end.transport.close()
    pipes = [os.pipe() for _ in range(4)]
    try:
        end.transport.wake()
        for read, _ in pipes:
            os.set_blocking(read, False)
            with pytest.raises(BlockingIOError):
                os.read(read, 1)
    finally:
        for pipe in pipes:
            for number in pipe:
                os.close(number)


def test_closing_twice_is_allowed(ends):
    transport: ZmqTransport = ends("tcp://127.0.0.1:0").transport
    transport.close()
    transport.close()
    transport.wake()


def test_an_attacker_of_these_tests_is_heard(ends, attackers):
    """So that a silence in the other tests means something."""
    b = ends("tcp://127.0.0.1:0")
    a: Attacker = attackers(b.address)
    a.say("a", "b", HELLO)
    until(b, lambda: b.messages == [HELLO])
    b.transport.send("b", "a", Later(1, 0), b.received[0].origin)
    _, envelope = a.hear()
    assert envelope.message == Later(1, 0)
