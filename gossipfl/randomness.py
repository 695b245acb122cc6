"""One root seed, one generator per (purpose, peer, round).

A generator is made afresh for each use, so a retry, a restart or the order in which peers happen to run never shifts a
later draw, and simulated and real runs choose alike.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, purpose: str, peer: str = "", round: int = 0) -> np.random.Generator:
    """The generator for one purpose ("neighbours", "batches", "partition", ...) of one peer in one round."""
    return np.random.default_rng(derived_seed(seed, purpose, peer, round))


def derived_seed(seed: int, purpose: str, peer: str = "", round: int = 0) -> int:
    """An unsigned 63-bit seed, for libraries that take an integer (torch, scikit-learn)."""
    text = f"{seed}/{purpose}/{peer}/{round}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
