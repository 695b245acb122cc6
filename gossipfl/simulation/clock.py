"""Virtual time: what is to happen, in order of time and, at one time, of being planned."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class VirtualClock:
    """`now` is in seconds and moves only from one time at which something is planned to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._times: list[float] = []  # a heap; much happens at one time, and is kept in a queue
        self._planned: dict[float, deque[tuple[Callable[..., None], tuple[Any, ...]]]] = {}

    def at(self, time_s: float, call: Callable[..., None], *args: Any) -> None:
        """Plan `call(*args)`; what is planned for the past happens now."""
        if time_s < self.now:
            time_s = self.now
        planned = self._planned.get(time_s)
        if planned is None:
            planned = self._planned[time_s] = deque()
            heappush(self._times, time_s)
        planned.append((call, args))

    @property
    def next_time(self) -> float | None:
        """When something is planned next; None if nothing is."""
        return self._times[0] if self._times else None

    def advance(self) -> None:
        """Move on to what is planned next, and do all that is planned for that time, by then or meanwhile."""
        self.now = self._times[0]
        planned = self._planned[self.now]
        while planned:
            call, args = planned.popleft()
            call(*args)
        del self._planned[heappop(self._times)]
