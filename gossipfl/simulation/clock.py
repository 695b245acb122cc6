"""Virtual time: what is to happen, in order of time and, at one time, of being planned."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class VirtualClock:
    """`now` is in seconds and moves only from one time at which something is planned to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._times: list[float] = []  # a heap; much happens at one time, and is kept in a list
        self._planned: dict[float, list[tuple[Callable[..., None], tuple[Any, ...]]]] = {}

    def at(self, time_s: float, call: Callable[..., None], *args: Any) -> None:
        """Plan `call(*args)`; what is planned for the past happens now."""
        if time_s < self.now:
            time_s = self.now
        planned = self._planned.get(time_s)
        if planned is None:
            self._planned[time_s] = [(call, args)]
            heappush(self._times, time_s)
        else:
            planned.append((call, args))

    @property
    def next_time(self) -> float | None:
        """When something is planned next; None if nothing is."""
        return self._times[0] if self._times else None

    def advance(self) -> None:
        """Move on to what is planned next, and do all that is planned for that time, by then or meanwhile."""
        self.now = now = self._times[0]
        while planned := self._planned[now]:
            self._planned[now] = []  # for what these plan for now
            for call, args in planned:
                call(*args)
        del self._planned[heappop(self._times)]
