"""Signals that ask a program to stop: SIGTERM is taken like Ctrl-C, and processes of ours leave Ctrl-C to who started them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_INTERRUPTED = 130
"""128 and the number of SIGINT, as shells have it."""


@contextlib.contextmanager
def terminate_is_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, also where Ctrl-C is ignored; does nothing outside of the main thread."""
    with _handled(signal.SIGTERM, signal.default_int_handler):
        yield


@contextlib.contextmanager
def not_interrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM are ignored, for what is short and must be done; does nothing outside of the main thread."""
    with _handled(signal.SIGINT, signal.SIG_IGN), _handled(signal.SIGTERM, signal.SIG_IGN):
        yield


class OneInterrupt:
    """While entered, the first Ctrl-C or SIGTERM raises KeyboardInterrupt, and further ones are ignored: cleaning up goes on.

    Does nothing outside of the main thread.
    """

    def __init__(self) -> None:
        self._is_heard = self._is_deferred = False
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> OneInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers.enter_context(_handled(number, self._hear))
        return self

    def __exit__(self, *raised: object) -> None:
        self._handlers.close()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        is_first, self._is_heard = not self._is_heard, True
        if is_first and not self._is_deferred:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """It is raised afterwards: what is made within can then be cleaned up."""
        self._is_deferred = True
        yield
        self._is_deferred = False
        if self._is_heard:
            raise KeyboardInterrupt


def last_interrupt() -> None:
    """Further ones are ignored for good: the program has its last words to say, and to end. Only for its main thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until afterwards. A process started within never hears of Ctrl-C: a terminal sends it to all.

    Blocking a signal here is not enough: any other thread, such as a library's, may take it, and this one then hears of it.
    """
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _handled(signal.SIGINT, hold), _handled(signal.SIGTERM, hold):
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for number in held[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: signal._HANDLER) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before or signal.SIG_DFL)  # None: one that was not set in Python
