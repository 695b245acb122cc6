"""Processes for runs side by side, none of which outlives the one that asked for them, however that ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from typing import Any

from gossipfl.scenario.interrupts import interrupts_held, not_interrupted
from gossipfl.scenario.workers import ENVIRONMENT


@contextlib.contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes. An error, Ctrl-C among them, ends them at once."""
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    # Multiprocessing's own helper leaves Ctrl-C and SIGTERM to this process; started so, SIGHUP too, which waits meanwhile.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    before = set(multiprocessing.active_children())
    pool = _Pool(number, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        with not_interrupted():
            for child in set(multiprocessing.active_children()) - before:
                child.kill()  # a run takes SIGTERM as a wish to end in order
            pool.shutdown(cancel_futures=True)
        raise


class _Pool(ProcessPoolExecutor):
    """Its processes, which start when there is something to do, leave Ctrl-C to this one."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        with interrupts_held():
            return super().submit(*args, **kwargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, name="gossipfl-parent", daemon=True).start()
