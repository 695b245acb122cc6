"""The thread that moves the messages of one shell and wakes its machine when a deadline comes."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from gossipfl.runtime.transport import Happening, ZmqTransport

logger = logging.getLogger(__name__)


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
        self._is_stopping = False
        self._flush_s = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` run on the loop's thread. May be called from any thread; after the end it is lost."""
        self._posted.append(call)
        self.transport.wake()

    def stop(self, flush_s: float = 1.0, timeout_s: float = 5.0) -> None:
        """Send what is queued, for at most `flush_s`, close the sockets and end the thread. Stopping twice is allowed."""
        self._flush_s, self._is_stopping = flush_s, True
        if not self._thread.ident:
            self.transport.close()
        elif threading.current_thread() is not self._thread:
            self.transport.wake()
            self._thread.join(timeout_s)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._is_stopping

    def _run(self) -> None:
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
        deadline = self._shell.next_deadline
        timeout_s = None if deadline is None or deadline == math.inf else max(0.0, deadline - time.monotonic())
        for happening in self.transport.receive(0.0 if self._posted else timeout_s):
            self._shell.take(happening)
        while self._posted:
            self._posted.popleft()()
        deadline = self._shell.next_deadline
        if deadline is not None and deadline <= time.monotonic():
            self._shell.wake()
