"""Memory for whole vectors, and vectors that stay in the parts in which they came."""

from __future__ import annotations

import mmap
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
"""With all pages at once where the system can: one by one they take a third longer, and nearly twice as long if shared."""


class VectorPool:
    """Vectors of one size (f32[size]), each in a mapping of its own that is used again once nobody refers to it.

    Large and long-lived, they would leave holes in the heap. Used again, a vector costs no page faults; fresh from the heap,
    one of 6 MiB costs a millisecond of them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[mmap.mmap] = []

    def take(self) -> np.ndarray:
        """A writable f32[size] of arbitrary contents."""
        memory = self._free.pop() if self._free else mmap.mmap(-1, max(4 * self.size, 1), flags=_FLAGS)
        vector = np.frombuffer(memory, np.float32, self.size)
        weakref.finalize(vector, self._free.append, memory).atexit = False
        return vector


class Pieces:
    """f32[n] in several parts, each a view of the message that it came in; read by slices, like an array."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(part.size for part in parts)]

    @property
    def size(self) -> int:
        return self._starts[-1]

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    def __getitem__(self, run: slice) -> np.ndarray:
        """The values of `run` (start and stop given): a view if they lie in one part, else a copy."""
        index = min(bisect_right(self._starts, run.start), len(self._parts)) - 1
        first = self._starts[index]
        if run.stop <= self._starts[index + 1]:
            return self._parts[index][run.start - first : run.stop - first]
        last = min(bisect_right(self._starts, run.stop - 1), len(self._parts))
        return np.concatenate(self._parts[index:last])[run.start - first : run.stop - first]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts).astype(dtype or np.float32, copy=False)
