"""torch's own random numbers, by which models get their first values and dropout chooses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.RLock()


@contextlib.contextmanager
def own_draws() -> Iterator[None]:
    """To seed torch within: nobody else's draws come between, for threads share a generator. Then the CPU's is as it was."""
    with _lock, torch.random.fork_rng(devices=[]):
        yield
