"""The words between the server's machine and its shell: what it hears, and what it has done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from gossipfl.inference.planning.offers import Ask
from gossipfl.inference.planning.remembered import First
from gossipfl.protocol.machine import Wake
from gossipfl.protocol.messages import Activation, Continuation, Message, Pull


class Caller(NamedTuple):
    """Who asks, on which connection, and by which name the model is called (`name@anything`). Answers go back the same way."""

    origin: bytes
    name: str
    called: str

    @property
    def model(self) -> str:
        return self.called.partition("@")[0]


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heard:
    """A well-formed message; the payload of a PlanRequest is its Ask, or None if it is none."""

    caller: Caller
    message: Message


@dataclass(frozen=True, slots=True)
class Published:
    """A version can be served. `num_bytes(cut, bits, samples)`: what an activation takes, None where there is no such cut."""

    model: str
    version: int
    num_bytes: Callable[[int, int, int], int | None]


@dataclass(frozen=True, slots=True)
class Planned:
    """A MakePlan has been carried out and answered, well or not."""

    caller: Caller
    request: int


@dataclass(frozen=True, slots=True)
class Ran:
    """A RunStage has been carried out and answered, well or not."""

    caller: Caller
    request: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing more."""


Event = Heard | Published | Planned | Ran | Drain | Wake


# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    caller: Caller
    message: Message


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Plan for this device and answer with an Offer of `version`, or Failed; report Planned."""

    caller: Caller
    request: int
    version: int
    ask: Ask


@dataclass(frozen=True, slots=True)
class Serve:
    """Encode and send what is pulled, or Refuse where it is nothing that is served."""

    caller: Caller
    pull: Pull


@dataclass(frozen=True, slots=True)
class Keep:
    """Add this chunk to its activation."""

    caller: Caller
    chunk: Activation | Continuation


@dataclass(frozen=True, slots=True)
class Discard:
    """Drop what was kept of an activation."""

    caller: Caller
    request: int


@dataclass(frozen=True, slots=True)
class RunStage:
    """Run the layers after the cut on what was kept and answer with a Result, or Failed; report Ran.

    `remember`: go on keeping it, until it is discarded or run again.
    """

    caller: Caller
    activation: Activation
    remember: bool = False


@dataclass(frozen=True, slots=True)
class RunAgain:
    """Run the layers after the cut on what was kept as the continuation of `first` and answer as with RunStage; report Ran.

    Nothing more is wanted of what was kept of both.
    """

    caller: Caller
    continuation: Continuation
    first: First


@dataclass(frozen=True, slots=True)
class Retire:
    """Forget a version of a model."""

    model: str
    version: int


@dataclass(frozen=True, slots=True)
class Finish:
    """All that was taken is done."""


Action = Reply | MakePlan | Serve | Keep | Discard | RunStage | RunAgain | Retire | Finish
