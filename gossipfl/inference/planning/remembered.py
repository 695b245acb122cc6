"""Activations that a server has answered and that may be continued: for a while, and within a bound of bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

OVERHEAD_BYTES = 1024
"""That each is taken to need beside its payload."""
CallerT = TypeVar("CallerT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class First:
    """An activation that may be continued, without what it holds."""

    request: int
    version: int
    cut: int
    bits: int
    samples: int
    num_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.num_bytes + OVERHEAD_BYTES


class Remembered(Generic[CallerT]):
    """By caller and request, the oldest first. Whoever has `max_bytes_per_caller` loses its own oldest, not another's."""

    def __init__(self, for_s: float, max_bytes: int, max_bytes_per_caller: int) -> None:
        self._for_s, self._max_bytes, self._max_bytes_per_caller = for_s, max_bytes, max_bytes_per_caller
        self._found: dict[tuple[CallerT, int], tuple[First, float]] = {}  # until when
        self.num_bytes: Counter[CallerT] = Counter()

    @property
    def next_deadline(self) -> float | None:
        return next((expires for _, expires in self._found.values()), None)

    @property
    def keys(self) -> tuple[tuple[CallerT, int], ...]:
        return tuple(self._found)

    def get(self, caller: CallerT, request: int) -> First | None:
        return self._found.get((caller, request), (None, 0.0))[0]

    def add(self, caller: CallerT, first: First, now: float) -> list[tuple[CallerT, int]]:
        """Those that are forgotten for it; it is one of them where it does not fit by itself."""
        if first.size_bytes > min(self._max_bytes, self._max_bytes_per_caller):
            return [(caller, first.request)]
        gone = []
        while self.num_bytes[caller] + first.size_bytes > self._max_bytes_per_caller:
            gone.append(next(key for key in self._found if key[0] == caller))
            self.take(*gone[-1])
        while self.num_bytes.total() + first.size_bytes > self._max_bytes:
            gone.append(next(iter(self._found)))
            self.take(*gone[-1])
        self._found[caller, first.request] = first, now + self._for_s
        self.num_bytes[caller] += first.size_bytes
        return gone

    def take(self, caller: CallerT, request: int) -> First | None:
        """What was remembered, and no longer is."""
        first, _ = self._found.pop((caller, request), (None, 0.0))
        if first is not None:
            self.num_bytes[caller] -= first.size_bytes
            if not self.num_bytes[caller]:
                del self.num_bytes[caller]
        return first

    def expire(self, now: float) -> list[tuple[CallerT, int]]:
        """Those whose time is over, which are forgotten."""
        gone = []
        while self._found and next(iter(self._found.values()))[1] <= now:
            gone.append(next(iter(self._found)))
            self.take(*gone[-1])
        return gone
