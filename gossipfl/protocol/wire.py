"""The bytes of a message: two frames, a msgpack header and a raw payload. Nothing that comes in is trusted.

    frame 1, at most 1 KiB   [version, run, kind, sender, recipient, body, identity, hash, signature]
    frame 2, at most 256 KiB the payload of Data, Record and what inference sends, empty for all others

`body` lists the message's fields in the order of its dataclass (`messages.py`), without the payload. `run` is a number that
the peers of one run share, so that a straggler of another run is not listened to. The last three are reserved, nil for now.
Any other number of frames, a wrong type, a value out of bounds or a payload of another length is a RemoteProtocolError; a
kind that this version does not know is not (`Envelope.message` is None), so that later versions may add some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, NamedTuple

import msgpack

from gossipfl.errors import RemoteProtocolError
from gossipfl.protocol.messages import (
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
    PeerId,
    PlanRequest,
    Pull,
    Record,
    Refuse,
    Result,
)

WIRE_VERSION = 1
MAX_HEADER_BYTES = 1024
MAX_PAYLOAD_BYTES = 256 * 1024
MAX_NAME_BYTES = 64
MAX_REASON_BYTES = 240
MAX_TENSOR_BYTES = 64 * 1024 * 1024
"""Of an activation, and of a result, in all its chunks."""
MAX_OFFER_BYTES = 4 * 1024 * 1024
_MAX_INT = 2**62
_PACKER = msgpack.Packer()
"""One for all: to make one takes as long as packing a header. It keeps nothing from one call to the next."""

Buffer = bytes | bytearray | memoryview


class Envelope(NamedTuple):
    """A decoded message with its addresses; `message` is None if its kind is unknown here."""

    run: int
    sender: PeerId
    recipient: PeerId
    message: Message | None


def encode(run: int, sender: PeerId, recipient: PeerId, message: Message) -> bytes:
    """The header frame of a message; its payload frame is the caller's to send, unchanged."""
    kind, body_of = _BY_CLASS[type(message)]
    header: bytes = _PACKER.pack((WIRE_VERSION, run, kind, sender, recipient, body_of(message), None, None, None))
    assert len(header) <= MAX_HEADER_BYTES, (len(header), message)
    return header


def decode(frames: Sequence[Buffer]) -> Envelope:
    """Check and decode a header and a payload frame. The payload is not copied. RemoteProtocolError on anything odd."""
    if len(frames) != 2:
        raise RemoteProtocolError(f"{len(frames)} frames; a message has two")
    header, payload = frames
    if len(header) > MAX_HEADER_BYTES:
        raise RemoteProtocolError(f"a header of {len(header)} bytes; the limit is {MAX_HEADER_BYTES}")
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise RemoteProtocolError(f"a payload of {len(payload)} bytes; the limit is {MAX_PAYLOAD_BYTES}")
    try:
        fields_ = _unpack(header)
    except Exception as error:  # msgpack raises many kinds, some of them bare ValueErrors and RecursionErrors
        raise RemoteProtocolError(f"the header is not msgpack: {error}") from error
    if type(fields_) is not tuple or len(fields_) != 9:
        raise RemoteProtocolError("the header is not a list of nine fields")
    version, run, kind, sender, recipient, body, identity, hash_, signature = fields_
    if type(version) is not int or version != WIRE_VERSION:
        raise RemoteProtocolError(f"wire version {_shown(version)}; this is version {WIRE_VERSION}")
    if not (identity is hash_ is signature is None):
        raise RemoteProtocolError("identity, hash and signature are reserved and must be nil")
    if not (_is_count(run) and _is_name(kind) and _is_name(sender) and _is_name(recipient)):
        raise RemoteProtocolError("run, kind, sender or recipient is not what it should be")
    if kind not in _BY_KIND:
        return Envelope(run, sender, recipient, None)
    return Envelope(run, sender, recipient, _message(kind, body, payload))


def parts(payload: memoryview, start: int = 0) -> list[tuple[int, memoryview]]:
    """What of it goes in one message each, from `start` on, with its offset."""
    return [(offset, payload[offset : offset + MAX_PAYLOAD_BYTES]) for offset in range(start, len(payload), MAX_PAYLOAD_BYTES)]


def _message(kind: str, body: Any, payload: Buffer) -> Message:
    class_, names, checks = _BY_KIND[kind]
    if type(body) is not tuple or len(body) != len(names):
        raise RemoteProtocolError(f"{kind}: the body is not a list of {len(names)} fields")
    for name, value, is_valid in zip(names, body, checks, strict=True):
        if not is_valid(value):
            raise RemoteProtocolError(f"{kind}.{name} = {_shown(value)} is not valid")
    if class_ is Data:
        message = Data(*(*body, payload))
        if message.num_bytes != len(payload) or not 0 < message.num_bytes <= message.total - message.offset:
            raise RemoteProtocolError(f"data: {len(payload)} payload bytes at {message.offset} of {message.total}")
        return message
    if class_ is Record:
        return Record(*(*body, payload))
    if class_ in _MAX_TOTAL_BYTES:
        message = class_(*(*body, payload))
        if not 0 < len(payload) <= message.total - message.offset or message.total > _MAX_TOTAL_BYTES[class_]:
            raise RemoteProtocolError(f"{kind}: {len(payload)} payload bytes at {message.offset} of {message.total}")
        return message
    if class_ is PlanRequest:
        return PlanRequest(*(*body, payload))
    if len(payload):
        raise RemoteProtocolError(f"{kind} carries no payload, {len(payload)} bytes came")
    return class_(*body)


def _unpack(header: Buffer) -> Any:
    return msgpack.unpackb(
        header,
        use_list=False,
        strict_map_key=True,
        max_array_len=64,
        max_map_len=0,
        max_str_len=256,
        max_bin_len=256,
        max_ext_len=0,
    )


def _shown(value: object) -> str:
    """A value for an error message; containers only by type, for printing deeply nested ones overflows the stack."""
    return repr(value)[:80] if isinstance(value, int | float | str | bytes | None) else type(value).__name__


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT


def _is_total(value: object) -> bool:
    return type(value) is int and -1 <= value <= _MAX_INT


def _is_name(value: object) -> bool:
    # no character takes more than four bytes, so short names need not be encoded to be measured
    return type(value) is str and len(value) > 0 and (4 * len(value) <= MAX_NAME_BYTES or _fits(value))


def _fits(name: str) -> bool:
    return len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES


def _is_reason(value: object) -> bool:
    return (
        type(value) is str and 0 < len(value) <= MAX_REASON_BYTES and len(value.encode("utf-8", "replace")) <= MAX_REASON_BYTES
    )


def _is_bits(value: object) -> bool:
    return type(value) is int and 0 < value <= FULL_BITS


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value) and 0 <= value <= 1e9


def _is_range(value: object) -> bool:
    return type(value) is tuple and len(value) == 2 and _is_count(value[0]) and _is_count(value[1]) and value[0] < value[1]


def _is_ranges(value: object) -> bool:
    return type(value) is tuple and 0 < len(value) <= MAX_RANGES and all(map(_is_range, value))


Check = Callable[[object], bool]
_CHECKS: dict[type, tuple[str, tuple[Check, ...]]] = {
    Hello: ("hello", (_is_name, _is_count, _is_flag)),
    Pull: ("pull", (_is_count, _is_count, _is_count, _is_ranges, _is_name, _is_seconds, _is_count)),
    Data: (
        "data",
        (_is_count, _is_count, _is_count, _is_count, _is_range, _is_count, _is_count, _is_count),
    ),
    Later: ("later", (_is_count, _is_count)),
    Refuse: ("refuse", (_is_count, _is_count, _is_count)),
    Leave: ("leave", (_is_count,)),
    Credit: ("credit", (_is_count,)),
    Collect: ("collect", (_is_count, _is_name, _is_count)),
    Record: ("record", (_is_count, _is_count, _is_total)),
    PlanRequest: ("plan_request", (_is_count,)),
    Offer: ("offer", (_is_count, _is_count, _is_count)),
    Activation: ("activation", (_is_count, _is_count, _is_count, _is_bits, _is_count, _is_count, _is_count, _is_flag)),
    Continuation: ("continuation", (_is_count, _is_count, _is_count, _is_count, _is_count)),
    Result: ("result", (_is_count, _is_count, _is_seconds, _is_count, _is_count)),
    Failed: ("failed", (_is_count, _is_name, _is_reason)),
}
_MAX_TOTAL_BYTES: dict[type, int] = {
    Offer: MAX_OFFER_BYTES,
    Activation: MAX_TENSOR_BYTES,
    Continuation: MAX_TENSOR_BYTES,
    Result: MAX_TENSOR_BYTES,
}


def _names(class_: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(class_) if field.name != "payload")


def _body_getter(class_: type) -> Callable[[Message], tuple[Any, ...]]:
    """The fields of a message as a tuple; on the path of every chunk, so not in a Python loop."""
    names = _names(class_)
    get = attrgetter(*names)
    return get if len(names) > 1 else lambda message: (get(message),)


_BY_CLASS = {class_: (kind, _body_getter(class_)) for class_, (kind, _) in _CHECKS.items()}
_BY_KIND = {kind: (class_, _names(class_), checks) for class_, (kind, checks) in _CHECKS.items()}
