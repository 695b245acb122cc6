"""What a transport tells: messages that came in, connections that stand or broke."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import zmq

from gossipfl.protocol.messages import Message, PeerId

Origin = bytes
"""The connection that a message came in on; answers go back to it."""
Shared = zmq.Frame
"""A payload that is sent to many."""


class Incoming(NamedTuple):
    """A well-formed message for one of the peers here. `num_bytes` counts its header and payload frames."""

    sender: PeerId
    recipient: PeerId
    message: Message
    origin: Origin | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The connection to these peers' endpoint stands."""

    peers: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection to these peers' endpoint broke, or was closed for what it sent (`reason`)."""

    peers: tuple[PeerId, ...]
    reason: str


Happening = Incoming | LinkUp | LinkDown
