"""Local training of many peers at once, for the simulator: a thousand peers in one process.

    cohort = choose_cohort(Engine(model, TrainingConfig(), dataset))
    losses = cohort.train([CohortTask(learner, 1, vector) for learner in learners], out)     # out: f32[n, P], filled
    cohort.evaluate(out, [None] * len(out))                                                  # n accuracies

The loop trains one peer after another, bit for bit as `Engine.train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gossipfl.learning.training import Engine, Learner
from gossipfl.segments.layout import Layout


@dataclass(frozen=True, slots=True)
class CohortTask:
    """One round of one peer, from `vector` (f32[P], left alone unless it is also where the result goes)."""

    learner: Learner
    round: int
    vector: np.ndarray


class CohortEngine(Protocol):
    layout: Layout

    def initial_vector(self) -> np.ndarray: ...

    def train(self, tasks: Sequence[CohortTask], out: np.ndarray | Sequence[np.ndarray]) -> list[float]:
        """Carry out the tasks, each of another learner; the k-th trained vector goes into `out[k]` (f32[P], may be the memory
        of its own start). Returns their mean losses."""

    def evaluate(self, vectors: Sequence[np.ndarray], learners: Sequence[Learner | None]) -> list[float]:
        """Accuracies of `vectors` (f32[P] each) on the test set, with the learners' local buffers (None: a new model's)."""

    def description(self) -> dict[str, Any]:
        """What a result depends on besides the seed, for the record."""


class LoopCohort:
    """One peer after another."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.layout = engine, engine.layout

    def initial_vector(self) -> np.ndarray:
        return self.engine.initial_vector()

    def train(self, tasks: Sequence[CohortTask], out: np.ndarray | Sequence[np.ndarray]) -> list[float]:
        return [
            self.engine.train(task.learner, task.vector, task.round, out=trained).loss
            for task, trained in zip(tasks, out, strict=True)
        ]

    def evaluate(self, vectors: Sequence[np.ndarray], learners: Sequence[Learner | None]) -> list[float]:
        return [self.engine.evaluate(vector, learner) for vector, learner in zip(vectors, learners, strict=True)]

    def description(self) -> dict[str, Any]:
        return self.engine.description()


def choose_cohort(engine: Engine, kind: str = "auto") -> CohortEngine:
    return LoopCohort(engine)
