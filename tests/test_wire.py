"""The bytes of a message: every kind comes back as it went, and nothing else gets in."""

from __future__ import annotations

import dataclasses
import random
from typing import get_args

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossipfl.errors import RemoteProtocolError
from gossipfl.protocol import wire
from gossipfl.protocol.messages import (  # fmt: skip
    FULL_BITS,
    MAX_RANGES,
    Activation,
    Collect,
    Continuation,
    Credit,
    Data,
    Failed,
    Hello,
    Later,
    Leave,
    Message,
    Offer,
    PlanRequest,
    Pull,
    Record,
    Refuse,
    Result,
)
from gossipfl.protocol.wire import (
    MAX_HEADER_BYTES,
    MAX_NAME_BYTES,
    MAX_OFFER_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_REASON_BYTES,
    MAX_TENSOR_BYTES,
    Envelope,
)

LARGEST = 2**62
quick = settings(deadline=None, max_examples=80)

# --- every message within the limits ----------------------------------------------------------------------------------

ascii_names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=MAX_NAME_BYTES)
other_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=MAX_NAME_BYTES // 4)  # at most 4 bytes each
names = ascii_names | other_names
counts = st.integers(0, LARGEST)
ranges = st.sets(counts, min_size=2, max_size=2).map(lambda ends: tuple(sorted(ends)))
seconds = st.floats(0, 1e9) | st.integers(0, 10**9)


@st.composite
def chunks(draw) -> Data:
    payload = draw(st.binary(min_size=1, max_size=100))
    offset, after = draw(st.integers(0, LARGEST // 4)), draw(st.integers(0, LARGEST // 4))
    total = offset + len(payload) + after
    request, version, newest, num_samples = draw(st.tuples(counts, counts, counts, counts))
    return Data(request, version, newest, num_samples, draw(ranges), offset, total, len(payload), payload=payload)


@st.composite
def parts(draw, class_, most, *fields, last=()):
    """A chunk of a payload of at most `most` bytes; `last` are the fields after its place in the whole."""
    payload = draw(st.binary(min_size=1, max_size=100))
    total = draw(st.integers(len(payload), most))
    offset = draw(st.integers(0, total - len(payload)))
    before, after = ([draw(field) for field in some] for some in (fields, last))
    return class_(draw(counts), *before, offset, total, *after, payload=payload)


ascii_reasons = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=MAX_REASON_BYTES)
other_reasons = st.text(st.characters(codec="utf-8"), min_size=1, max_size=MAX_REASON_BYTES // 4)
MESSAGES = {
    Hello: st.builds(Hello, names, counts, st.booleans()),
    Pull: st.builds(
        Pull, counts, counts, counts, st.lists(ranges, min_size=1, max_size=MAX_RANGES).map(tuple), names, seconds, counts
    ),
    Data: chunks(),
    Later: st.builds(Later, counts, counts),
    Refuse: st.builds(Refuse, counts, counts, counts),
    Leave: st.builds(Leave, counts),
    Credit: st.builds(Credit, counts),
    Collect: st.builds(Collect, counts, names, counts),
    Record: st.builds(Record, counts, counts, st.integers(-1, LARGEST), payload=st.binary(max_size=100)),
    PlanRequest: st.builds(PlanRequest, counts, payload=st.binary(max_size=100)),
    Offer: parts(Offer, MAX_OFFER_BYTES),
    Activation: parts(Activation, MAX_TENSOR_BYTES, counts, counts, st.integers(1, FULL_BITS), counts, last=(st.booleans(),)),
    Continuation: parts(Continuation, MAX_TENSOR_BYTES, counts, counts),
    Result: parts(Result, MAX_TENSOR_BYTES, counts, seconds),
    Failed: st.builds(Failed, counts, names, ascii_reasons | other_reasons),
}


def frames_of(run, sender, recipient, message) -> list:
    return [wire.encode(run, sender, recipient, message), getattr(message, "payload", b"")]


def test_these_are_all_the_messages_there_are():
    assert set(MESSAGES) == set(get_args(Message))


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@given(run=counts, sender=names, recipient=names, data=st.data())
@quick
def test_every_message_comes_back_as_it_went(kind, run, sender, recipient, data):
    message = data.draw(MESSAGES[kind])
    header, payload = frames_of(run, sender, recipient, message)
    assert len(header) <= MAX_HEADER_BYTES
    for frame in (header, bytearray(header), memoryview(header)):
        envelope = wire.decode([frame, payload])
        assert envelope == Envelope(run, sender, recipient, message)
        assert getattr(envelope.message, "payload", None) is getattr(message, "payload", None)


def test_the_largest_pull_fits_the_header():
    last = (LARGEST - 1, LARGEST)
    pull = Pull(LARGEST, LARGEST, LARGEST, (last,) * MAX_RANGES, "c" * MAX_NAME_BYTES, 0.1, LARGEST)
    header = wire.encode(LARGEST, "s" * MAX_NAME_BYTES, "r" * MAX_NAME_BYTES, pull)
    # an integer or a float takes 9 bytes, a name of 64 ASCII characters 66, "pull" 5, a list below 16 entries 1, another 3
    envelope = 1 + 1 + 9 + 5 + 2 * 66 + 3
    body = 1 + 3 * 9 + (3 + MAX_RANGES * (1 + 9 + 9)) + 66 + 9 + 9
    assert len(header) == envelope + body == 874 <= MAX_HEADER_BYTES
    assert wire.decode([header, b""]).message == pull


@pytest.mark.parametrize("character", ["x", "é", "中", "😀"])
def test_the_largest_pull_fits_the_header_in_any_script(character):
    longest = character * (MAX_NAME_BYTES // len(character.encode()))
    pull = Pull(LARGEST, LARGEST, LARGEST, ((LARGEST - 1, LARGEST),) * MAX_RANGES, longest, 0.1, LARGEST)
    header = wire.encode(LARGEST, longest, longest, pull)
    assert wire.decode([header, b""]) == Envelope(LARGEST, longest, longest, pull)
    for arguments in ({"sender": longest + character}, {"recipient": longest + character}):
        refused([header_of(**arguments), b""], "run, kind, sender or recipient")
    refused([header_of("hello", [longest + character, 3, True]), b""], r"^hello\.\w+ = ")


def test_a_header_beyond_the_limit_is_our_own_bug():
    with pytest.raises(AssertionError):
        wire.encode(0, "s", "r", Hello("x" * MAX_HEADER_BYTES, 0, False))


def test_the_payload_is_not_copied():
    memory = bytearray(b"12345678")
    header = wire.encode(0, "a", "b", Data(1, 2, 2, 10, (0, 2), 0, 8, 8))
    payload = memoryview(memory)
    message = wire.decode([header, payload]).message
    memory[0:1] = b"9"
    assert message.payload is payload and bytes(message.payload) == b"92345678"


def test_a_payload_of_the_full_size_is_taken_and_a_byte_more_is_not():
    for excess in (0, 1):
        size = MAX_PAYLOAD_BYTES + excess
        frames = frames_of(0, "a", "b", Data(1, 2, 2, 10, (0, size), 0, size, size, payload=bytes(size)))
        if excess:
            refused(frames, f"payload of {size} bytes")
        else:
            assert wire.decode(frames).message.num_bytes == size


# --- garbage ----------------------------------------------------------------------------------------------------------

VALID = {
    "hello": ["L", 3, True],
    "pull": [1, 2, 2, [[0, 10], [10, 20]], "float32", 1.5, 0],
    "data": [1, 2, 2, 100, [0, 10], 0, 40, 40],
    "later": [1, 0],
    "refuse": [1, 0, 0],
    "leave": [3],
    "credit": [5],
    "collect": [1, "events", 0],
    "record": [1, 0, -1],
    "plan_request": [1],
    "offer": [1, 0, 40],
    "activation": [1, 2, 3, 8, 10, 0, 40, True],
    "continuation": [2, 1, 10, 0, 40],
    "result": [1, 2, 0.5, 0, 40],
    "failed": [1, "busy", "64 requests wait already"],
}
CLASSES = {"plan_request": PlanRequest} | {class_.__name__.lower(): class_ for class_ in MESSAGES}
WITH_PAYLOAD = ("data", "record", "plan_request", "offer", "activation", "continuation", "result")
NOT_A_COUNT = [-1, LARGEST + 1, 2**64 - 1, 1.0, True, None, "1", b"1", [], [1]]
NOT_A_TOTAL = [-2, *NOT_A_COUNT[1:]]
NOT_A_NAME = ["", "x" * (MAX_NAME_BYTES + 1), b"x", 1, None, True, ["x"]]
NOT_A_FLAG = [0, 1, None, "true", []]
NOT_SECONDS = [-1, -0.5, float("nan"), float("inf"), -float("inf"), 1e9 + 1, True, None, "1", []]
NOT_A_RANGE = [[0], [0, 1, 2], [5, 5], [6, 5], [-1, 5], [0, LARGEST + 1], [0.0, 5], [False, 5], ["0", "5"], "05", 5, None, []]
NOT_RANGES = [[], [[0, 1]] * (MAX_RANGES + 1), [0, 1], [[0, 1], None], "ranges", None, *([[0, 1], bad] for bad in NOT_A_RANGE)]
NOT_BITS = [0, -1, FULL_BITS + 1, 8.0, True, None, "8", []]
NOT_A_REASON = ["", "x" * (MAX_REASON_BYTES + 1), "é" * (MAX_REASON_BYTES // 2 + 1), b"x", 1, None, ["x"]]
NOT = {
    "hello": [NOT_A_NAME, NOT_A_COUNT, NOT_A_FLAG],
    "pull": [NOT_A_COUNT, NOT_A_COUNT, NOT_A_COUNT, NOT_RANGES, NOT_A_NAME, NOT_SECONDS, NOT_A_COUNT],
    "data": [NOT_A_COUNT, NOT_A_COUNT, NOT_A_COUNT, NOT_A_COUNT, NOT_A_RANGE, NOT_A_COUNT, NOT_A_COUNT, NOT_A_COUNT],
    "later": [NOT_A_COUNT, NOT_A_COUNT],
    "refuse": [NOT_A_COUNT] * 3,
    "leave": [NOT_A_COUNT],
    "credit": [NOT_A_COUNT],
    "collect": [NOT_A_COUNT, NOT_A_NAME, NOT_A_COUNT],
    "record": [NOT_A_COUNT, NOT_A_COUNT, NOT_A_TOTAL],
    "plan_request": [NOT_A_COUNT],
    "offer": [NOT_A_COUNT] * 3,
    "activation": [NOT_A_COUNT, NOT_A_COUNT, NOT_A_COUNT, NOT_BITS, NOT_A_COUNT, NOT_A_COUNT, NOT_A_COUNT, NOT_A_FLAG],
    "continuation": [NOT_A_COUNT] * 5,
    "result": [NOT_A_COUNT, NOT_A_COUNT, NOT_SECONDS, NOT_A_COUNT, NOT_A_COUNT],
    "failed": [NOT_A_COUNT, NOT_A_NAME, NOT_A_REASON],
}
FIELDS = [(kind, position) for kind, fields in NOT.items() for position in range(len(fields))]
UNKNOWN = "from_a_later_version"


def header_of(kind="leave", body=None, *, version=1, run=7, sender="a", recipient="b", reserved=(None, None, None)) -> bytes:
    return msgpack.packb([version, run, kind, sender, recipient, VALID.get(kind) if body is None else body, *reserved])


def payload_of(kind) -> bytes:
    return bytes(40) if kind in ("data", "offer", "activation", "continuation", "result") else b""


def refused(frames, message=None) -> None:
    with pytest.raises(RemoteProtocolError, match=message) as caught:
        wire.decode(frames)
    assert caught.type is RemoteProtocolError


@pytest.mark.parametrize("kind", VALID)
def test_what_the_garbage_below_is_made_of_is_valid(kind):
    envelope = wire.decode([header_of(kind), payload_of(kind)])
    assert type(envelope.message) is CLASSES[kind]
    assert len(NOT[kind]) == len(VALID[kind])


@pytest.mark.parametrize(("kind", "position"), FIELDS)
def test_a_field_that_is_not_what_it_should_be_is_refused(kind, position):
    for bad in NOT[kind][position]:
        body = [*VALID[kind][:position], bad, *VALID[kind][position + 1 :]]
        refused([header_of(kind, body), payload_of(kind)], rf"^{kind}\.\w+ = ")


@pytest.mark.parametrize("kind", VALID)
def test_a_body_of_another_shape_is_refused(kind):
    for body in ([*VALID[kind], 0], VALID[kind][:-1], [], {}, 0, "x", b"x", False):
        refused([header_of(kind, body), payload_of(kind)], f"{kind}: the body is not a list of {len(VALID[kind])}")


@pytest.mark.parametrize("number", [0, 1, 3, 10])
def test_any_other_number_of_frames_is_refused(number):
    refused([header_of()] * number, f"{number} frames")


def test_a_header_of_the_full_size_is_read_and_a_byte_more_is_not():
    for excess in (0, 1):
        room = MAX_HEADER_BYTES + excess - len(header_of(UNKNOWN, ["x" * 200] * 4 + [""]))
        header = header_of(UNKNOWN, ["x" * 200] * 4 + ["y" * (room - 1)])  # beyond 31 characters a string takes 1 byte more
        assert len(header) == MAX_HEADER_BYTES + excess
        if excess:
            refused([header, b""], f"header of {len(header)} bytes")
        else:
            assert wire.decode([header, b""]) == Envelope(7, "a", "b", None)


@pytest.mark.parametrize("version", [0, 2, -1, "1", 1.5, None, [1], {}])
def test_another_wire_version_is_refused(version):
    refused([header_of(version=version), b""], "wire version")


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [0, False, "", b"", [], b"signed"])
def test_the_reserved_fields_must_be_nil(position, value):
    reserved = [None] * 3
    reserved[position] = value
    refused([header_of(reserved=reserved), b""], "reserved")


@pytest.mark.parametrize(
    ("field", "bad"), [("run", NOT_A_COUNT), ("kind", NOT_A_NAME), ("sender", NOT_A_NAME), ("recipient", NOT_A_NAME)]
)
def test_an_address_that_is_not_what_it_should_be_is_refused(field, bad):
    for value in bad:
        arguments = {"kind": "leave", "body": [3]} | {field: value}
        refused([header_of(**arguments), b""], "run, kind, sender or recipient")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",  # the one byte that msgpack leaves unused
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        b"\xff" * 100,
        msgpack.packb("hello"),
        msgpack.packb({}),
        msgpack.packb({"kind": "leave"}),
        msgpack.packb(None),
        msgpack.packb([]),
        msgpack.packb([1] * 8),
        msgpack.packb([1] * 10),
        msgpack.packb([1, 7, "leave", "a", "b", [3], None, None]),
        msgpack.packb([1, 7, "leave", "a", "b", [3], None, None, None, None]),
        header_of(sender="\x00").replace(b"\xa1\x00", b"\xa1\xff"),  # not UTF-8
    ],
)
def test_what_is_no_list_of_nine_fields_is_refused(header):
    refused([header, b""], "^the header is not")


@pytest.mark.parametrize("kind", VALID)
def test_a_truncated_header_is_refused_wherever_it_is_cut(kind):
    header = header_of(kind)
    for length in range(len(header)):
        refused([header[:length], payload_of(kind)], "not msgpack")


def test_bytes_after_the_header_are_refused():
    refused([header_of() + b"\x00", b""], "not msgpack")
    refused([header_of() * 2, b""], "not msgpack")


HUGE = {
    "array": b"\xdd\xff\xff\xff\xff",
    "map": b"\xdf\xff\xff\xff\xff",
    "string": b"\xdb\xff\xff\xff\xff",
    "bytes": b"\xc6\xff\xff\xff\xff",
    "extension": b"\xc9\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("declared", HUGE.values(), ids=HUGE)
def test_a_length_that_is_only_declared_is_refused(declared):
    refused([declared, b""], "not msgpack")
    refused([declared + bytes(500), b""], "not msgpack")
    refused([header_of(UNKNOWN, [3])[:-5] + declared, b""], "not msgpack")


@pytest.mark.parametrize(
    "body",
    [[0] * 65, ["x" * 257], [b"x" * 257], [{"a": 1}], [msgpack.ExtType(1, b"x")], [msgpack.Timestamp(0)]],
    ids=["array", "string", "bytes", "map", "extension", "timestamp"],
)
def test_what_no_message_holds_is_refused_even_in_a_kind_that_is_not_known(body):
    refused([header_of(UNKNOWN, body), b""], "not msgpack")


@pytest.mark.parametrize("depth", [1, 10, 500])
def test_nested_lists_are_refused_wherever_they_stand(depth):
    nested: object = 0
    for _ in range(depth):
        nested = [nested]
    for kind, position in FIELDS:
        body = [*VALID[kind][:position], nested, *VALID[kind][position + 1 :]]
        refused([header_of(kind, body), payload_of(kind)])
    for field in ("version", "run", "kind", "sender", "recipient"):
        refused([header_of(**({"kind": "leave", "body": [3]} | {field: nested})), b""])


@pytest.mark.parametrize("field", ["version", "run", "kind", "sender", "body"])
def test_lists_nested_as_deep_as_the_header_allows_are_refused(field):
    place = msgpack.packb("here")
    header = header_of(**({"body": [3]} | {field: ["here"] if field == "body" else "here"}))
    depth = MAX_HEADER_BYTES - (len(header) - len(place)) - 1
    header = header.replace(place, b"\x91" * depth + b"\xc0")
    assert len(header) == MAX_HEADER_BYTES
    refused([header, b""])


@pytest.mark.parametrize("kind", [kind for kind in VALID if kind not in WITH_PAYLOAD])
def test_a_payload_where_none_belongs_is_refused(kind):
    refused([header_of(kind), b"x"], f"{kind} carries no payload")


@pytest.mark.parametrize(
    ("offset", "total", "num_bytes", "payload"),
    [
        (0, 40, 40, bytes(39)),
        (0, 40, 40, bytes(41)),
        (0, 40, 40, b""),
        (0, 39, 40, bytes(40)),
        (1, 40, 40, bytes(40)),
        (40, 40, 40, bytes(40)),
        (LARGEST, 40, 40, bytes(40)),
        (0, 40, 0, b""),
        (40, 40, 0, b""),
        (0, 0, 0, b""),
    ],
)
def test_data_whose_numbers_disagree_with_the_payload_or_that_brings_nothing_is_refused(offset, total, num_bytes, payload):
    body = [1, 2, 2, 100, [0, 10], offset, total, num_bytes]
    refused([header_of("data", body), payload], f"data: {len(payload)} payload bytes at {offset} of {total}")


@pytest.mark.parametrize(
    ("kind", "most"),
    [("offer", MAX_OFFER_BYTES), *((kind, MAX_TENSOR_BYTES) for kind in ("activation", "continuation", "result"))],
)
def test_a_chunk_of_more_than_its_kind_may_be_or_beyond_its_end_is_refused(kind, most):
    """Of a total that is too large, before anybody takes memory for it."""
    place = [field.name for field in dataclasses.fields(CLASSES[kind])].index("offset")
    before, after = VALID[kind][:place], VALID[kind][place + 2 :]
    assert wire.decode([header_of(kind, [*before, most - 40, most, *after]), bytes(40)]).message.total == most
    for offset, total, payload in (
        (0, most + 1, 40),
        (most - 39, most, 40),
        (0, 39, 40),
        (0, 40, 0),
        (40, 40, 0),
        (LARGEST, 40, 1),
    ):
        body = [*before, offset, total, *after]
        refused([header_of(kind, body), bytes(payload)], f"{kind}: {payload} payload bytes at {offset} of")


@pytest.mark.parametrize("character", ["x", "é", "中", "😀"])
def test_the_longest_reason_fits_the_header_in_any_script(character):
    name = character * (MAX_NAME_BYTES // len(character.encode()))
    failed = Failed(LARGEST, name, character * (MAX_REASON_BYTES // len(character.encode())))
    header = wire.encode(LARGEST, name, name, failed)
    assert wire.decode([header, b""]) == Envelope(LARGEST, name, name, failed)


def test_a_kind_that_is_not_known_here_is_no_error():
    for body in ([], [1, "x", None], {}, None, [[[]]]):
        assert wire.decode([header_of(UNKNOWN, body), b"payload"]) == Envelope(7, "a", "b", None)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=12,
)


@given(
    kind=st.sampled_from([*VALID]),
    body=values | st.lists(values, max_size=8),
    payload=st.binary(max_size=41),
    others=st.just((1, 7, "a", "b")) | st.tuples(values, values, values, values),
)
@settings(deadline=None, max_examples=200)
def test_any_values_at_all_are_an_envelope_or_refused(kind, body, payload, others):
    version, run, sender, recipient = others
    header = msgpack.packb([version, run, kind, sender, recipient, body, None, None, None])
    envelope_or_refused([header, payload])


def test_twenty_thousand_mutations_are_an_envelope_or_refused():
    chance = random.Random(0)
    valid = [[header_of(kind), payload_of(kind)] for kind in VALID]
    outcomes = [envelope_or_refused(mutated(chance, chance.choice(valid), valid)) for _ in range(20_000)]
    accepted = sum(outcomes)
    assert 1000 < accepted < 15_000  # else the mutations are too wild to pass, or too tame to matter


def envelope_or_refused(frames) -> bool:
    """Whether the frames are accepted; what is accepted can be sent again and is then the same."""
    try:
        envelope = wire.decode(frames)
    except RemoteProtocolError:
        return False
    assert type(envelope) is Envelope
    if envelope.message is not None:
        header = wire.encode(envelope.run, envelope.sender, envelope.recipient, envelope.message)
        assert wire.decode([header, frames[1]]) == envelope
    return True


def mutated(chance, frames, valid) -> list[bytes]:
    header, payload = bytearray(frames[0]), frames[1]
    for _ in range(chance.randint(1, 3)):
        position = chance.randrange(len(header) + 1)
        match chance.randrange(7):
            case 0 if position < len(header):
                header[position] ^= 1 << chance.randrange(8)
            case 1 if position < len(header):
                header[position] = chance.randrange(256)
            case 2:
                header[position:position] = chance.randbytes(chance.randint(1, 9))
            case 3:
                del header[position : position + chance.randint(1, 9)]
            case 4:
                other = chance.choice(valid)[0]
                header[position:] = other[min(position, len(other)) :]
            case 5:
                header[position : position + 1] = chance.choice([b"\xc0", b"\xc3", b"\xff", b"\x90", b"\xdd", *HUGE.values()])
            case 6:
                payload = chance.choice([payload, b"", b"x", payload[1:], payload * 2])
    return [bytes(header), payload]
