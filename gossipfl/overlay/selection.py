"""Which neighbours a segment is pulled from.

A rule is `f(candidates, replicas, links, rng) -> peers`: R distinct candidates for one segment. `links` maps a peer to what
is known of its link (for bandwidth-aware rules); `rng` is the round's own generator, so the seed decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gossipfl.registry import Registry

Selector = Callable[[Sequence[str], int, Mapping[str, Any], np.random.Generator], list[str]]

SELECTORS: Registry[Selector] = Registry("selection")


@SELECTORS.register("uniform")
def uniform(candidates: Sequence[str], replicas: int, links: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
    """R distinct candidates, uniformly without replacement (arXiv 1908.07782: segmented pulling); all of them if fewer."""
    if replicas >= len(candidates):
        return list(candidates)
    chosen: list[str] = []
    while len(chosen) < replicas:
        for index in rng.integers(len(candidates), size=replicas - len(chosen)):
            if candidates[index] not in chosen:
                chosen.append(candidates[index])
    return chosen


@SELECTORS.register("all")
def every(candidates: Sequence[str], replicas: int, links: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
    """Every candidate, as D-PSGD mixes (Lian et al., NeurIPS 2017)."""
    return list(candidates)
