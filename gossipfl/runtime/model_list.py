"""What a server says of the models that it serves, so that a device can build the same: a name and numbers, never code."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gossipfl.errors import RemoteProtocolError, RunError
from gossipfl.protocol.messages import INFERENCE_RUN, Collect, Record
from gossipfl.runtime.transport import Incoming, LinkDown, ZmqTransport

ITEM = "models"
"""What is asked for, of anybody at the address."""
ANYBODY, ASKER = "server", "asker"
MAX_BYTES = 1 << 20
ASK_S = 0.5
"""Between two questions: the first may come before the connection stands."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model without its weights: `model` is a name of `learning.models.MODELS`, or of a function that its owner has."""

    name: str
    model: str
    input_shape: tuple[int, ...]
    num_classes: int
    model_args: Mapping[str, Any] = field(default_factory=dict)


def to_json(architectures: list[Architecture]) -> bytes:
    return json.dumps([asdict(architecture) for architecture in architectures]).encode()


def from_json(content: bytes) -> list[Architecture]:
    """RemoteProtocolError for what `to_json` cannot have written."""
    try:
        return [_architecture(item) for item in json.loads(content)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RemoteProtocolError(f"no list of models: {str(error)[:160]}") from error


def _architecture(item: Any) -> Architecture:
    found = Architecture(item["name"], item["model"], tuple(item["input_shape"]), item["num_classes"], dict(item["model_args"]))
    if not all(isinstance(text, str) and 0 < len(text) <= 256 for text in (found.name, found.model)):
        raise ValueError("a name is no text")
    sizes = (*found.input_shape, found.num_classes)
    if not all(type(size) is int and size > 0 for size in sizes) or math.prod(sizes) > 1 << 28:
        raise ValueError(f"sizes {sizes}")
    return found


def ask_models(address: str, timeout_s: float = 10.0) -> list[Architecture]:
    """What the server at `address` serves. RunError if it does not say so within `timeout_s`."""
    transport = ZmqTransport(f"inproc://{uuid.uuid4().hex}", run=INFERENCE_RUN)
    try:
        transport.connect(ANYBODY, address)
        content, total = bytearray(), -1
        deadline, asked_at = time.monotonic() + timeout_s, -math.inf
        while len(content) != total:
            now = time.monotonic()
            if now > deadline:
                raise RunError(f"no server answers at {address} within {timeout_s:g} s; is it running, and the address right?")
            if now - asked_at > ASK_S:
                asked_at = now
                transport.send(ASKER, ANYBODY, Collect(0, ITEM, len(content)))
            for happening in transport.receive(0.1):
                if isinstance(happening, LinkDown) and happening.reason.startswith("malformed"):
                    raise RunError(f"what answers at {address} is no inference server: {happening.reason}")
                if isinstance(happening, Incoming) and isinstance(happening.message, Record):
                    record = happening.message
                    if record.offset == len(content) and 0 < record.total <= MAX_BYTES:
                        content += record.payload
                        total, asked_at = record.total, -math.inf
        return from_json(bytes(content))
    except RemoteProtocolError as error:
        raise RunError(f"what answers at {address} is no inference server: {error}") from error
    finally:
        transport.close()
