"""Virtual time: what is to happen, in order of time and, at one time, of being planned."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any


class VirtualClock:
    """`now` is in seconds and moves only from one planned call to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._tickets = count()

    def at(self, time_s: float, call: Callable[..., None], *args: Any) -> None:
        """Plan `call(*args)`; what is planned for the past happens now."""
        heappush(self._planned, (max(time_s, self.now), next(self._tickets), call, args))

    @property
    def next_time(self) -> float | None:
        """When something is planned next; None if nothing is."""
        return self._planned[0][0] if self._planned else None

    def advance(self) -> None:
        """Move on to what is planned next, and do it."""
        self.now, _, call, args = heappop(self._planned)
        call(*args)
