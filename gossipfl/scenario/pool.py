"""Processes for runs side by side, none of which outlives the one that asked for them, however that ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from gossipfl.scenario.workers import ENVIRONMENT


@contextlib.contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes. An error, Ctrl-C among them, ends them at once."""
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), initializer=_belong_to_parent)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _belong_to_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, name="gossipfl-parent", daemon=True).start()
