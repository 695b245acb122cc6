"""Churn: peers that come and go.

    churn = build_churn(ChurnConfig(planned=(Change(20.0, 3, False), Change(40.0, 3, True))), num_peers=8, seed=0)
    for change in churn.changes(duration_s=60.0): ...     # p3 leaves at 20 s and is back at 40 s

A peer is there when its plan (killed, back again, joining late) and its availability (drawn anew every period, or read from
a trace) both let it. Either says only when things change: before its first change a peer is the opposite of what that
change makes it, so one whose first change is to come was not there from the start. Times are of the run's clock.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.overlay.csv_files import read_trace
from gossipfl.randomness import generator


@dataclass(frozen=True, slots=True)
class Change:
    """From `time_s` on, peer `index` is there (online) or not."""

    time_s: float
    index: int
    online: bool


@dataclass(frozen=True, slots=True)
class ChurnConfig:
    """What churn is built from."""

    planned: Sequence[Change] = ()  # kills, returns and late joins, in any order
    online: float = 1.0  # chance of a peer to be available in a period after the first, in which all are
    period_s: float = math.inf  # how long each draw lasts, seconds
    trace: str | None = None  # CSV of time_s,peer,online (0 or 1), instead of `online`


class Churn:
    """Who is there when."""

    def __init__(
        self,
        num_peers: int,
        planned: Sequence[Change] = (),
        traced: Sequence[Change] = (),
        online: float = 1.0,
        period_s: float = math.inf,
        seed: int = 0,
    ) -> None:
        """`planned` and `traced` are sorted by time; `online` is above 0."""
        self.num_peers, self.planned, self.traced = num_peers, planned, traced
        self.online, self.period_s, self._seed = online, period_s, seed
        self._at_start = np.stack([_before_all(planned, num_peers), _before_all(traced, num_peers)])  # bool[2, N]

    @property
    def is_empty(self) -> bool:
        """Everybody is there all the time."""
        return not self.planned and not self.traced and not self.is_endless

    def initially_online(self, index: int) -> bool:
        """Whether a peer is there when the run begins."""
        return bool(self._at_start[:, index].all())

    def is_ever_online(self) -> bool:
        """Whether anybody is there at any time."""
        return bool(self._at_start.all(axis=0).any()) or any(change.online for change in self.changes(math.inf))

    def changes(self, duration_s: float) -> Iterator[Change]:
        """Every change until `duration_s`, in order. A drawn availability changes without end."""
        if not _after_all(self.planned, self.num_peers).any():  # no draw can bring anybody back
            duration_s = min(duration_s, self.planned[-1].time_s)
        allowed = self._at_start.copy()
        plan = ((change.time_s, 0, change) for change in self.planned)
        availability = ((change.time_s, 1, change) for change in itertools.chain(self.traced, self._redraws()))
        for time_s, source, change in heapq.merge(plan, availability, key=lambda entry: entry[:2]):
            if time_s > duration_s:
                return
            was_online = allowed[:, change.index].all()
            allowed[source, change.index] = change.online
            if allowed[:, change.index].all() != was_online:
                yield change

    def name_of(self, change: Change) -> str:
        """As a scenario calls it: kill, rejoin or join where it is planned; away or back where availability has it so."""
        own = [planned for planned in self.planned if planned.index == change.index]
        if change not in own:
            return "back" if change.online else "away"
        if not change.online:
            return "kill"
        return "join" if change == own[0] else "rejoin"

    @property
    def is_endless(self) -> bool:
        """Availability is drawn, again and again."""
        return self.online < 1 and self.period_s < math.inf

    @property
    def mean_stay_s(self) -> float:
        """How long a peer is there at a stretch, on average; what is planned aside."""
        return self.period_s / (1 - self.online) if self.is_endless else math.inf

    def _redraws(self) -> Iterator[Change]:
        """The availability of every peer in each period, by a generator of its own, so that no query shifts a later one."""
        gaps, period = _gaps(self.planned, self.num_peers), 1
        while self.is_endless:
            available = generator(self._seed, "online", round=period).random(self.num_peers) < self.online
            yield from (Change(period * self.period_s, index, online) for index, online in enumerate(available.tolist()))
            after_gap = [int(end_s / self.period_s) - 1 for begin_s, end_s in gaps if begin_s <= period * self.period_s < end_s]
            period = max([period + 1, *after_gap])  # what would be drawn in between concerns nobody


def build_churn(config: ChurnConfig, num_peers: int, seed: int) -> Churn:
    """The churn of a configuration. ConfigError: a trace that cannot be read, with the line and the remedy."""
    planned = sorted(config.planned, key=lambda change: change.time_s)
    traced = _read_changes(config.trace, num_peers) if config.trace else []
    return Churn(num_peers, planned, traced, config.online, config.period_s, seed)


def _read_changes(path: str, num_peers: int) -> list[Change]:
    changes = []
    for line, time_s, index, (online,) in read_trace(path, ("online",), num_peers):
        if online not in (0, 1):
            raise ConfigError(f"{path} line {line}: online = {online:g} must be 0 or 1")
        changes.append(Change(time_s, index, bool(online)))
    return changes


def _before_all(changes: Sequence[Change], num_peers: int) -> np.ndarray:
    """bool[N]: who is there at the start. A change at 0 s counts as done."""
    online = np.ones(num_peers, dtype=bool)
    for change in reversed(changes):  # the first of a peer's changes decides
        online[change.index] = change.online if change.time_s == 0 else not change.online
    return online


def _gaps(changes: Sequence[Change], num_peers: int) -> list[tuple[float, float]]:
    """From when to when nobody is there but somebody will be again."""
    online, gaps, gone_s = _before_all(changes, num_peers), [], 0.0
    for change in changes:
        was_anybody = online.any()
        online[change.index] = change.online
        if was_anybody and not online.any():
            gone_s = change.time_s
        elif online.any() and not was_anybody:
            gaps.append((gone_s, change.time_s))
    return gaps


def _after_all(changes: Sequence[Change], num_peers: int) -> np.ndarray:
    """bool[N]: who is there in the end."""
    online = np.ones(num_peers, dtype=bool)
    for change in changes:
        online[change.index] = change.online
    return online
