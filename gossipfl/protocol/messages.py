"""The protocol's vocabulary: what peers send each other, what a machine hears, and what it asks its shell to do.

A machine is driven by `handle(event, now) -> list[Action]` and `next_deadline`; everything slow or effectful is an action
whose outcome comes back as an event. Payloads are opaque here: the shell checks and decodes them before the machine hears
of them, so the same machine runs on sockets and under virtual time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, dataclass_transform

PeerId = str
Range = tuple[int, int]
"""Half-open range `(start, stop)` of the flat model vector."""

MAX_RANGES = 32
"""Ranges that one Pull may name: keeps the header within its limit."""
NEWEST = 0
"""As `Pull.version`: whatever is newest. As `Pull.oldest`: any age will do, do not make me wait."""
PROMPT_BYTES = 32 * 1024
"""What is served without saying first that it comes: over a slow link, shared by others, even that takes seconds."""
INFERENCE_RUN = 0
"""Marks the messages of inference: servers and devices share no run of training."""
FULL_BITS = 32
"""Of values that travel as they are computed."""

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def vocabulary(class_: type[T]) -> type[T]:
    """A slotted dataclass that a type checker takes for frozen. To freeze it would triple the time that making one takes, and
    each message of a simulation makes several."""
    return dataclass(slots=True, unsafe_hash=True)(class_)


# --- messages: between peers ------------------------------------------------------------------------------------------


@vocabulary
class Hello:
    """I am here. `newest` is the newest version that the sender has trained (0: none yet)."""

    layout: str
    newest: int
    wants_reply: bool


@vocabulary
class Pull:
    """Send me these ranges of your model of round `version`.

    `oldest` is the oldest version that will do at once when `version` is not trained yet; below it the pull waits, for at
    most `expires_s` seconds. `offset` resumes the first range at that encoded byte, if the same version is still stored.
    """

    request: int
    version: int
    oldest: int
    ranges: tuple[Range, ...]
    codec: str
    expires_s: float
    offset: int = 0


@vocabulary
class Data:
    """One chunk of one encoded range: bytes `[offset, offset + num_bytes)` of `total`."""

    request: int
    version: int
    newest: int
    num_samples: int
    range: Range
    offset: int
    total: int
    num_bytes: int
    payload: Any = field(default=None, compare=False, repr=False)

    @property
    def is_last(self) -> bool:
        return self.offset + self.num_bytes == self.total


@vocabulary
class Later:
    """Still alive: the version is not trained yet (`bytes_queued` = 0), or that much is queued for you."""

    request: int
    bytes_queued: int


@vocabulary
class Refuse:
    """No. These are the versions stored (0, 0: none)."""

    request: int
    oldest: int
    newest: int


@vocabulary
class Leave:
    """I have finished and shall pull no more; I still serve for a while."""

    round: int


@vocabulary
class Credit:
    """The transport's own: this many payload bytes have been taken in, so as many more may follow."""

    num_bytes: int


@vocabulary
class Collect:
    """Hand over what this run has left behind: "events" (JSON lines) or "model" (safetensors), from `offset`."""

    request: int
    item: str
    offset: int


@vocabulary
class Record:
    """One chunk of a collected item; `total` is -1 while the peer has not finished."""

    request: int
    offset: int
    total: int
    payload: Any = field(default=None, compare=False, repr=False)


@vocabulary
class PlanRequest:
    """How should I run this model? The payload (JSON) tells the device and its budget."""

    request: int
    payload: Any = field(default=None, compare=False, repr=False)


@vocabulary
class Offer:
    """One chunk of the answer to a PlanRequest (JSON): a version, a plan for it, and the digests of what it needs."""

    request: int
    offset: int
    total: int
    payload: Any = field(default=None, compare=False, repr=False)


@vocabulary
class Activation:
    """One chunk of what `samples` samples have come to after `cut` layers (0: the inputs): run the rest of `version` on it.

    `bits` for each value: `FULL_BITS` for float32, fewer for that many planes of it. `keep`: the rest of the planes may follow
    as a Continuation, so keep these for a while.
    """

    request: int
    version: int
    cut: int
    bits: int
    samples: int
    offset: int
    total: int
    keep: bool = False
    payload: Any = field(default=None, compare=False, repr=False)


@vocabulary
class Continuation:
    """One chunk of what an Activation that was to be kept has left out: run the rest again, now with all planes.

    `first` is the Activation's request, `samples` of its samples are continued. The payload marks which (a bit for each, the
    first in the highest bit of a byte), then has their missing planes.
    """

    request: int
    first: int
    samples: int
    offset: int
    total: int
    payload: Any = field(default=None, compare=False, repr=False)


@vocabulary
class Result:
    """One chunk of the scores that an Activation or a Continuation came to (f32); `seconds` is what computing them took."""

    request: int
    version: int
    seconds: float
    offset: int
    total: int
    payload: Any = field(default=None, compare=False, repr=False)


@vocabulary
class Failed:
    """No answer will come: `kind` is a short stable word, `reason` (at most 240 bytes) is for people."""

    request: int
    kind: str
    reason: str


Chunk = Data | Record | Offer | Result
"""What answers are made of."""
Message = (
    Hello
    | Pull
    | Data
    | Later
    | Refuse
    | Leave
    | Credit
    | Collect
    | Record
    | PlanRequest
    | Offer
    | Activation
    | Continuation
    | Result
    | Failed
)


# --- events: what a machine hears -------------------------------------------------------------------------------------


@vocabulary
class Start:
    """Begin."""


@vocabulary
class Trained:
    """Local training of this round is done and its vector is stored as version `round`."""

    round: int
    num_samples: int


@vocabulary
class Merged:
    """A Merge has been carried out."""

    round: int
    segment: int


@vocabulary
class Received:
    """A well-formed message came in; the payload of a range's last chunk is decoded and finite."""

    peer: PeerId
    message: Message


@vocabulary
class Rejected:
    """What a peer sent for this request is malformed, does not decode, or is not finite."""

    peer: PeerId
    request: int
    reason: str


@vocabulary
class PeerUp:
    """The connection to a neighbour stands (again)."""

    peer: PeerId


@vocabulary
class PeerDown:
    """The connection to a neighbour broke: whatever was asked of it is lost."""

    peer: PeerId


@vocabulary
class Wake:
    """`next_deadline` has come."""


@vocabulary
class StopAfter:
    """End after this round, if it is sooner than the round planned."""

    round: int


Event = Start | Trained | Merged | Received | Rejected | PeerUp | PeerDown | Wake | StopAfter


# --- actions: what a machine asks of its shell ------------------------------------------------------------------------


@vocabulary
class Train:
    """Train locally for this round from the current mixed vector; report Trained."""

    round: int


@vocabulary
class Send:
    """Send a message without a payload."""

    peer: PeerId
    message: Message


@vocabulary
class Serve:
    """Encode and send the ranges of `pull` from the stored `version`.

    A request that is still queued is not queued twice; where bytes are queued, or more than PROMPT_BYTES are asked for, the
    shell first answers Later.
    """

    peer: PeerId
    pull: Pull
    version: int


@vocabulary
class Contribution:
    """A pulled copy of one segment: the shell's handle of its values and the weight to mix it with."""

    peer: PeerId
    payload: Any
    weight: float
    staleness: int


@vocabulary
class Merge:
    """Mix `contributions` (ordered by peer) and the own copy into the current vector; report Merged."""

    round: int
    segment: int
    contributions: tuple[Contribution, ...]
    own_weight: float


@vocabulary
class Publish:
    """Store the mixed vector as `version`, in place of what was trained under it."""

    version: int


@vocabulary
class Forget:
    """Nothing more is wanted of this request: drop what has been assembled of it."""

    peer: PeerId
    request: int


@vocabulary
class Report:
    """A record for the run's files and logs: a RoundReport or a Fault."""

    record: Any


@vocabulary
class Finish:
    """All is done; `error` says why where the peer could not take part."""

    error: str | None = None


Action = Train | Send | Serve | Merge | Publish | Forget | Report | Finish


# --- records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """Something went wrong with a peer and was survived: `kind` is a short stable word, `detail` is for people."""

    round: int
    peer: PeerId
    kind: str
    detail: str


@dataclass(slots=True)
class RoundReport:
    """What one round of gossip came to, for one peer. Bytes are encoded payload; times are seconds of the machine's clock."""

    round: int
    train_s: float = 0.0
    wait_s: float = 0.0
    segments_mixed: int = 0
    missing: int = 0
    late: int = 0
    refused: int = 0
    rejected: int = 0
    timeouts: int = 0
    payload_bytes: int = 0
    repeated_bytes: int = 0
    staleness_max: int = 0
    staleness_sum: int = 0
    staleness_by_segment: dict[int, list[int]] = field(default_factory=dict)
    """Of each copy mixed into a segment, by the segment's index."""
    adopted: bool = False


@dataclass(slots=True)
class Traffic:
    """What a shell adds to a RoundReport: bytes that came in since the last one, headers included, and those of messages other
    than Data; the payload by sender, whatever became of it; and seconds spent on merging (none under virtual time)."""

    wire_bytes: int = 0
    control_bytes: int = 0
    merge_s: float = 0.0
    received_from: dict[PeerId, int] = field(default_factory=dict)


class Machine(Protocol):
    """Anything that decides: pure, without clock, socket, thread or tensor."""

    @property
    def next_deadline(self) -> float | None:
        """When to call `handle(Wake(), now)`; None = never."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at time `now` (seconds, monotonic) and return what is to be done, in order."""


def by_peer(contributions: Iterable[Contribution]) -> tuple[Contribution, ...]:
    """In order of peer id: a floating-point sum depends on its order, so arrival must not decide it."""
    return tuple(sorted(contributions, key=lambda contribution: contribution.peer))
