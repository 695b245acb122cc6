"""Processes for runs side by side, none of which outlives the one that asked for them, however that ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from queue import Empty, SimpleQueue
from typing import Any

from gossipfl.scenario.interrupts import interrupts_held, not_interrupted
from gossipfl.scenario.workers import ENVIRONMENT


@contextlib.contextmanager
def processes(number: int) -> Iterator[Pool]:
    """A pool of fresh processes. An error, Ctrl-C among them, ends them at once."""
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    # Multiprocessing's own helper leaves Ctrl-C and SIGTERM to this process; started so, SIGHUP too, which waits meanwhile.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    before = set(multiprocessing.active_children())
    pool = Pool(number, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        yield pool
        with interrupts_held():
            pool.shutdown()
    except BaseException:
        with not_interrupted():
            for child in set(multiprocessing.active_children()) - before:
                child.kill()  # a run takes SIGTERM as a wish to end in order
            pool.shutdown(cancel_futures=True)
        raise


class Pool(ProcessPoolExecutor):
    """Its processes, which start when there is something to do, leave Ctrl-C to this one.

    Wait for what they do with `next_done`: Ctrl-C within `concurrent.futures.wait` may leave a future locked, which the pool's
    own thread then waits for without end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._done: SimpleQueue[Future[Any]] = SimpleQueue()

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        with interrupts_held():
            future = super().submit(*args, **kwargs)
            future.add_done_callback(self._done.put)
        return future

    def next_done(self, timeout_s: float | None = None) -> Future[Any] | None:
        """The next of the futures that is done, each once; None where none is within this time."""
        try:
            return self._done.get(timeout=timeout_s)
        except Empty:
            return None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, name="gossipfl-parent", daemon=True).start()
