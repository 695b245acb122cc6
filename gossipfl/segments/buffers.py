"""Memory for whole vectors, apart from the heap: they are large and long-lived, and would leave holes in it."""

from __future__ import annotations

import mmap
import weakref

import numpy as np


class VectorPool:
    """Vectors of one size (f32[size]), each in a mapping of its own that is used again once nobody refers to it.

    Used again, a vector costs no page faults; fresh from the heap, one of 6 MiB costs a millisecond of them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[mmap.mmap] = []

    def take(self) -> np.ndarray:
        """A writable f32[size] of arbitrary contents."""
        memory = self._free.pop() if self._free else mmap.mmap(-1, max(4 * self.size, 1))
        vector = np.frombuffer(memory, np.float32, self.size)
        weakref.finalize(vector, self._free.append, memory).atexit = False
        return vector
