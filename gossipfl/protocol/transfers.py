"""Pulls in flight: how far each has come, and when its silence is too long.

A transfer is *asked* until the first answer of any kind, then *parked* (Later: the version is not trained yet) or *flowing*
(bytes are queued or have come). One that is not answered, or flows and falls silent, is asked again once, at the same
neighbour, which resumes it, or says how much is still queued.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from gossipfl.protocol.membership import MIN_ANSWER_S
from gossipfl.protocol.messages import Data, PeerId, Pull, Range

CRAWL = 32
"""Past the patience, a transfer this many times slower than the round's median one is given up: a peer that drips bytes must
not hold a round."""
MAX_WAIT = 8
"""The same where nothing has come yet but word that it will, against what the round's median transfer took in all."""
MAX_SILENCE = 4
"""Silence is never waited out for longer than this many patiences, however long the gaps between chunks have been."""


@dataclass(slots=True)
class Transfer:
    """One Pull in flight. `missing` maps the ranges not yet complete to the encoded bytes that have come of them."""

    peer: PeerId
    pull: Pull
    asked_at: float
    deadline: float
    missing: dict[Range, int]
    versions: dict[Range, int] = field(default_factory=dict)
    last_byte_at: float | None = None
    longest_gap_s: float = 0.0
    num_bytes: int = 0
    is_answered: bool = False
    is_flowing: bool = False
    is_probed: bool = False
    timed_from: float | None = None
    timed_bytes: int = 0

    def __post_init__(self) -> None:
        self.timed_from = self.asked_at

    def begin(self, data: Data) -> int:
        """Note the version that a range is served in; bytes that had come of another one, which count for nothing now."""
        range_ = data.range
        if range_ in self.versions and data.offset:
            return 0
        wasted, self.missing[range_], self.versions[range_] = self.missing[range_], 0, data.version
        return wasted

    def continues_with(self, data: Data) -> bool:
        return data.offset == self.missing[data.range] and data.version == self.versions[data.range]

    def advance(self, data: Data, now: float) -> None:
        """Take a chunk that continues its range; the range is no longer missing after its last one."""
        num_bytes = data.num_bytes
        if self.last_byte_at is not None and now - self.last_byte_at > self.longest_gap_s:
            self.longest_gap_s = now - self.last_byte_at
        self.last_byte_at = now
        self.num_bytes += num_bytes
        if self.timed_from is not None:
            self.timed_bytes += num_bytes
        if data.is_last:
            del self.missing[data.range]
        else:
            self.missing[data.range] += num_bytes

    def flows(self, now: float, answer_s: float, patience_s: float) -> None:
        """Bytes are on their way. Until chunks are timed they are asked for again after a quarter of the patience, and given up
        after all of it more; then four of their gaps are as long."""
        self.is_flowing, self.is_probed = True, False
        if self.timed_from is None:
            self.timed_from = now
        silence_s = self._silence_s(answer_s, patience_s)
        self.deadline = now + (silence_s if self.longest_gap_s else min(silence_s, max(answer_s, patience_s / 4)))

    def park(self, now: float, until: float) -> None:
        """The version is not trained yet: its bytes are timed from when the first of them, or news of them, comes. Before the
        time is over it is asked for once more: it may be under way by then."""
        remind_at = until - MIN_ANSWER_S
        self.timed_from, self.deadline = None, remind_at if remind_at > now and not self.is_probed else max(until, now)

    def probe(self, now: float, answer_s: float, patience_s: float) -> Pull:
        """The same request again for what is missing, resuming the first range where it stopped."""
        self.is_probed = True
        self.deadline = now + (max(self._silence_s(answer_s, patience_s), answer_s) if self.is_flowing else answer_s)
        first, offset = next(iter(self.missing.items()))
        old = self.pull
        version = self.versions.get(first, old.version)
        return Pull(old.request, version, old.oldest, tuple(self.missing), old.codec, old.expires_s, offset)

    def rate(self, now: float) -> float:
        """Encoded bytes per second since the pull was asked."""
        return self.num_bytes / max(now - self.asked_at, 1e-6)

    def link_rate(self, now: float) -> float:
        """Encoded bytes per second without the neighbour's training; with it, where all came at once after that."""
        if self.timed_from is None or not self.timed_bytes:
            return self.rate(now)
        return self.timed_bytes / max(now - self.timed_from, 1e-6)

    def crawls(self, now: float, finished_rates: Sequence[float], finished_s: Sequence[float]) -> bool:
        """Whether it is far slower than the transfers that have been finished, by their rates and what they took."""
        if not self.num_bytes and finished_s:
            return now - self.asked_at > MAX_WAIT * statistics.median(finished_s)
        return bool(finished_rates) and self.rate(now) < statistics.median(finished_rates) / CRAWL

    def _silence_s(self, answer_s: float, patience_s: float) -> float:
        if not self.longest_gap_s:
            return patience_s
        return min(max(4 * self.longest_gap_s, answer_s), MAX_SILENCE * patience_s)
