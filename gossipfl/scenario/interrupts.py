"""Signals that ask a program to stop, all taken like Ctrl-C; processes of ours leave Ctrl-C to who started them.

SIGTERM is one, and SIGHUP, which comes when the terminal or the connection is gone; under nohup, nobody hears of it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

EXIT_INTERRUPTED = 130
"""128 and the number of SIGINT, as shells have it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def terminate_is_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, also where Ctrl-C is ignored; nothing outside of the main thread."""
    with handled(signal.default_int_handler, SIGNALS[1:]):
        yield


@contextlib.contextmanager
def not_interrupted() -> Iterator[None]:
    """Ctrl-C and the like are ignored, for what is short and must be done; does nothing outside of the main thread."""
    with handled(signal.SIG_IGN):
        yield


class OneInterrupt:
    """While entered, the first of the signals raises KeyboardInterrupt, and further ones are ignored: cleaning up goes on.

    Does nothing outside of the main thread.
    """

    def __init__(self) -> None:
        self._is_heard = self._is_deferred = False
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> OneInterrupt:
        self._handlers.enter_context(handled(self._hear))
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
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """The signals wait until afterwards. A process started within never hears of Ctrl-C: a terminal sends it to all.

    Blocking a signal here is not enough: any other thread, such as a library's, may take it, and this one then hears of it.
    """
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with handled(hold):
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for number in held[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def handled(handler: signal._HANDLER, numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """`handler` has these signals, until the end or `last_interrupt`; does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, its in before.items():
            if signal.getsignal(number) == handler:
                signal.signal(number, its or signal.SIG_DFL)  # None: one that was not set in Python
