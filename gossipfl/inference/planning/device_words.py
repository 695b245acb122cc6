"""The words between the device's machine and its shell: what it hears, and what it has done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gossipfl.inference.planning.offers import Manifest
from gossipfl.protocol.machine import PeerDown, PeerUp, Received, Rejected, Start, Wake
from gossipfl.protocol.messages import Message, PeerId

Tier = Literal["reduced", "continued", "full", "audit"]
"""continued: the layers after the cut once more, with all planes of its values, on samples that the reduced model is unsure of;
audit: the full model on samples that the reduced one has answered, to compare the two."""


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """Somebody wants the scores of so many samples by `deadline`; of `version`, or None of the newest."""

    number: int
    samples: int
    deadline: float
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A LookUp: these pieces (digests) are in the cache, whole."""

    version: int
    have: frozenset[str]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A Load: the version's stage is ready, or why not. `engine` runs it; None where there is nothing to run.

    `refused`: those tried before it, the one planned among them, and why each is of no use here.
    """

    version: int
    error: str | None = None
    engine: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HeadDone:
    """A RunHead: the device's layers have run. `margins` of each sample where they are all there are; `error`: they failed."""

    number: int
    margins: tuple[float, ...] | None = None
    error: str | None = None


Event = Start | Question | Found | Loaded | HeadDone | Received | Rejected | PeerUp | PeerDown | Wake
"""The payload of a Received Offer is its Manifest, of Data nothing, of a Result the margins of its samples (f32), or where they
are audited whether each differs (bool). All are checked; Offer and Result are heard of once, when they are whole."""


# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message; of a PlanRequest the payload is an Ask."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class LookUp:
    """Say which of its pieces are in the cache; report Found."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing more is wanted of this request of ours: drop what has come of it and what has not left yet."""

    peer: PeerId
    request: int


@dataclass(frozen=True, slots=True)
class Load:
    """All pieces are in the cache: build the stage beside the one in use; report Loaded."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Unload:
    version: int


@dataclass(frozen=True, slots=True)
class RunHead:
    """Run the device's layers on the question's samples; report HeadDone."""

    number: int
    version: int


@dataclass(frozen=True, slots=True)
class Upload:
    """Send these samples of a question (None: all) as they are after `cut` layers, in chunks of an Activation.

    `keep`: they may be continued. With `first`, the request of one that was kept, only the planes go up that it lacks, in
    chunks of a Continuation.
    """

    number: int
    peer: PeerId
    request: int
    version: int
    cut: int
    bits: int
    tier: Tier
    samples: tuple[int, ...] | None
    keep: bool = False
    first: int | None = None


@dataclass(frozen=True, slots=True)
class Resolve:
    """The question is answered: the `unsure` samples by the full model, or continued, the others by the reduced one.

    Where it is not verified, the unsure ones, too, are answered by the reduced model, for want of a server. `alarm`: an audit
    has found that the version's certificate does not hold.
    """

    number: int
    manifest: Manifest
    unsure: tuple[int, ...] = ()
    is_verified: bool = True
    alarm: bool = False
    is_continued: bool = False


@dataclass(frozen=True, slots=True)
class SetAside:
    """Before the question is resolved: copy these samples, with their scores, to be uploaded as question `audit`.

    `continued`: which samples of the question were; the others of `samples` have reduced scores.
    """

    number: int
    audit: int
    samples: tuple[int, ...]
    continued: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Audited:
    """Nothing more is wanted of what was set aside."""

    audit: int


@dataclass(frozen=True, slots=True)
class Fail:
    """There is no answer. `kind`: "plan" and "input" are the caller's to mend."""

    number: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Something went wrong and was survived. `source`: the address of a server; of kind "drift" the model, whose certificate is
    void."""

    source: str
    kind: str
    detail: str


Action = Send | LookUp | Forget | Load | Unload | RunHead | Upload | SetAside | Audited | Resolve | Fail | Report
