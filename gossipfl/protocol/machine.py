"""What a machine hears, what it asks its shell to do, and what it reports.

A machine is driven by `handle(event, now) -> list[Action]` and `next_deadline`; everything slow or effectful is an action
whose outcome comes back as an event. So the same machine runs on sockets and under virtual time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from gossipfl.protocol.messages import Message, PeerId, Pull, vocabulary

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
