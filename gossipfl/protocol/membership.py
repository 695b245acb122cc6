"""Who is there: a peer's knowledge of each neighbour, and the joining of a run.

A neighbour is heard from by any message. It is *away* while its connection is down or before it first answers, *gone* once
it said Leave, *told* once Leave was said to it, *foreign* if its layout differs, and *suspect* after two expired deadlines in
a row: drawn last until it is heard from.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field

from gossipfl.protocol.messages import Hello, PeerId

MIN_ANSWER_S = 2.0
"""Least time allowed for the first answer to a Pull: a busy machine may starve a healthy peer of the processor for long."""
FIRST_ANSWER_S = 5.0
"""The same before a neighbour's answers have been timed."""
STRIKES_OF_A_SUSPECT = 2
HELLO_INTERVAL_S = 1.0
RATES_KEPT = 5
"""Transfers of a neighbour that its predicted rate is the mean of (BACombo's history)."""
MAX_CONTACTS = 64
"""Neighbours greeted on joining: keeps joining O(1) per peer where everybody is everybody's neighbour."""


@dataclass(slots=True)
class Neighbour:
    """What a peer knows of one neighbour."""

    name: PeerId
    answered: bool = False
    met: bool = False
    away: bool = False
    gone: bool = False
    is_told: bool = False
    foreign: bool = False
    strikes: int = 0
    newest: int = 0
    num_samples: int | None = None
    rates: tuple[float, ...] = ()
    _answer_mean_s: float | None = None
    _answer_deviation_s: float = 0.0

    @property
    def is_live(self) -> bool:
        """Can be pulled from. One that has said Leave still serves until its last neighbour has left."""
        return not (self.away or self.foreign)

    @property
    def is_suspect(self) -> bool:
        return self.strikes >= STRIKES_OF_A_SUSPECT

    def heard(self, newest: int = 0) -> None:
        self.strikes = 0
        self.met = True
        if newest > self.newest:
            self.newest = newest

    def transferred(self, bytes_per_s: float) -> None:
        """Note how fast a transfer from it was; the last few count."""
        self.rates = (*self.rates, bytes_per_s)[-RATES_KEPT:]

    @property
    def predicted_rate(self) -> float:
        """Bytes per second; infinite before the first transfer, so that everybody is tried."""
        return statistics.fmean(self.rates) if self.rates else math.inf

    def answered_after(self, seconds: float) -> None:
        """Smooth the time of first answers, as TCP does round trips (RFC 6298)."""
        if self._answer_mean_s is None:
            self._answer_mean_s, self._answer_deviation_s = seconds, seconds / 2
        else:
            error = abs(seconds - self._answer_mean_s)
            self._answer_deviation_s += (error - self._answer_deviation_s) / 4
            self._answer_mean_s += (seconds - self._answer_mean_s) / 8

    @property
    def answer_deadline_s(self) -> float:
        """Seconds within which a first answer is due; doubles with each strike."""
        if self._answer_mean_s is None:
            return FIRST_ANSWER_S * 2**self.strikes
        return max(MIN_ANSWER_S, self._answer_mean_s + 4 * self._answer_deviation_s) * 2**self.strikes


@dataclass
class Membership:
    """The neighbours of the peer `name`. `degrees` gives each neighbour's own number of neighbours.

    Those in `late` are known to come later: nobody greets them or waits for them before they say Hello.
    """

    name: PeerId
    layout: str
    degrees: Mapping[PeerId, int]
    quorum: int
    late: frozenset[PeerId] = frozenset()
    claimed: int = 0
    """The newest version that anybody has claimed to have trained."""
    neighbours: dict[PeerId, Neighbour] = field(init=False)
    contacts: list[Neighbour] = field(init=False)
    """The neighbours to greet on joining: those that follow in the order of names, so that nobody is greeted by all."""

    def __post_init__(self) -> None:
        self.neighbours = {name: Neighbour(name, away=name in self.late) for name in sorted(self.degrees)}
        names = [name for name in self.neighbours if name not in self.late]
        first = bisect(names, self.name)
        self.contacts = [self.neighbours[name] for name in (names[first:] + names[:first])[:MAX_CONTACTS]]

    def hello(self, newest: int, wants_reply: bool) -> Hello:
        return Hello(self.layout, newest, wants_reply)

    def heard(self, name: PeerId, newest: int = 0) -> Neighbour:
        """Note that a message came from this neighbour, who has trained that version if it says so."""
        neighbour = self.neighbours[name]
        neighbour.heard(newest)
        if newest > self.claimed:
            self.claimed = newest
        return neighbour

    def greeted(self, name: PeerId, hello: Hello) -> bool:
        """Take a Hello in; False if its layout differs from ours."""
        neighbour = self.heard(name, hello.newest)
        neighbour.answered = True
        neighbour.away = False  # a Hello alone brings back: other messages may be the last words of one that has gone
        neighbour.gone = neighbour.is_told = False
        neighbour.foreign = hello.layout != self.layout
        return not neighbour.foreign

    @property
    def unanswered(self) -> list[PeerId]:
        return [neighbour.name for neighbour in self.contacts if not neighbour.answered]

    @property
    def all_answered(self) -> bool:
        return all(neighbour.answered for neighbour in self.contacts)

    @property
    def has_quorum(self) -> bool:
        answered = sum(neighbour.answered and neighbour.is_live for neighbour in self.neighbours.values())
        return answered >= min(self.quorum, len(self.contacts))

    @property
    def newest(self) -> int:
        """The newest version that two neighbours (or the only one) are known to have trained: one alone may lie."""
        known = sorted((neighbour.newest for neighbour in self.neighbours.values() if not neighbour.foreign), reverse=True)
        return known[min(1, len(known) - 1)] if known else 0

    @property
    def oldest_needed(self) -> int:
        """The oldest version that a live neighbour may still ask for: who has trained round r asks for r or newer."""
        return min((neighbour.newest for neighbour in self.neighbours.values() if neighbour.is_live), default=0)

    def candidates(self, at_least: int) -> list[PeerId]:
        """Live neighbours to draw from; the suspect ones only if fewer than `at_least` others are left."""
        live = [neighbour for neighbour in self.neighbours.values() if neighbour.is_live]
        trusted = [neighbour.name for neighbour in live if not neighbour.is_suspect]
        if len(trusted) >= at_least:
            return trusted
        return trusted + [neighbour.name for neighbour in live if neighbour.is_suspect]
