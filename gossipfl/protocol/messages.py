"""What peers send each other. Payloads are opaque here: the shell checks and decodes them before a machine hears of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

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
