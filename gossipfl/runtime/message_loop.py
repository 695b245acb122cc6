"""The thread that moves the messages of one shell and wakes its machine when a deadline comes."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

from gossipfl.runtime.transport import Happening, ZmqTransport

logger = logging.getLogger(__name__)

BATCH = 16
"""Calls that were posted, before messages get their turn again."""


class Shell(Protocol):
    """Called on the loop's thread only."""

    @property
    def next_deadline(self) -> float | None: ...

    def take(self, happening: Happening) -> None: ...

    def wake(self) -> None: ...

    def crashed(self, error: BaseException) -> None: ...


class MessageLoop:
    def __init__(self, transport: ZmqTransport, shell: Shell, name: str) -> None:
        self.transport = transport
        self._shell = shell
        self._posted: deque[Callable[[], None]] = deque()
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._tickets = count()
        self._is_stopping = False
        self._flush_s = 0.0
        self._closing = threading.Lock()  # who has it closes the sockets: the thread, or whoever stops it before it runs
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` run on the loop's thread. May be called from any thread; after the end it is lost."""
        self._posted.append(call)
        if threading.get_ident() != self._thread.ident:
            self.transport.wake()

    def post_at(self, time_s: float, call: Callable[[], None]) -> None:
        """Have `call` run there at this time (monotonic seconds), or soon if it is past. May be called from any thread."""
        self.post(lambda: heappush(self._planned, (time_s, next(self._tickets), call)))

    def stop(self, flush_s: float = 1.0, timeout_s: float = 5.0) -> None:
        """Send what is queued, for at most `flush_s`, close the sockets and end the thread. Stopping twice is allowed.

        Also where `start` was interrupted, and the thread may be about to run.
        """
        self._flush_s, self._is_stopping = flush_s, True
        if self._closing.acquire(blocking=False):
            self.transport.close()
        elif self._thread.is_alive() and threading.current_thread() is not self._thread:
            self.transport.wake()
            self._thread.join(timeout_s)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._is_stopping

    def _run(self) -> None:
        if not self._closing.acquire(blocking=False):
            return
        try:
            while not self._is_stopping:
                self._turn()
        except BaseException as error:
            logger.exception("the message loop stopped")
            self._is_stopping = True
            self._shell.crashed(error)
        finally:
            self.transport.close(self._flush_s)

    def _turn(self) -> None:
        for happening in self.transport.receive(0.0 if self._posted else self._timeout_s()):
            self._shell.take(happening)
        for _ in range(min(BATCH, len(self._posted))):
            self._posted.popleft()()
        while self._planned and self._planned[0][0] <= time.monotonic():
            heappop(self._planned)[2]()
        deadline = self._shell.next_deadline
        if deadline is not None and deadline <= time.monotonic():
            self._shell.wake()

    def _timeout_s(self) -> float | None:
        """Until there is something to do without anything coming in; None: for ever."""
        deadline = self._shell.next_deadline
        nearest = min(math.inf if deadline is None else deadline, self._planned[0][0] if self._planned else math.inf)
        return None if nearest == math.inf else max(0.0, nearest - time.monotonic())
