"""Central training, for comparison: one model, all the data at once, as many passes as the peers make together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gossipfl.learning.training import Engine, Learner


def train_centrally(
    engine: Engine, initial: np.ndarray, rounds: int, num_peers: int, go_on: Callable[[], bool] = lambda: True
) -> float | None:
    """Test accuracy after `rounds` from `initial` (f32[P], left alone); None if `go_on` became false between two rounds."""
    learner = Learner("central", np.arange(len(engine.dataset.y_train)))
    vector = initial
    for round_ in range(1, rounds + 1):
        if not go_on():
            return None
        vector = engine.train(learner, vector, round_, times=num_peers).vector
    return engine.evaluate(vector)
