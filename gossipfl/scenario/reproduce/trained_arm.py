"""An arm that trains one model centrally, for reproductions that measure what can be done with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

from gossipfl._version import __version__
from gossipfl.learning.checkpoint import write_atomically, writing
from gossipfl.learning.datasets import Dataset, normalise, open_dataset
from gossipfl.learning.models import build_model
from gossipfl.learning.training import Engine, Learner, TrainingConfig
from gossipfl.scenario.config import load_scenario
from gossipfl.scenario.preparation import calibration_indices, prepare
from gossipfl.scenario.reproduce.figures import Arm, another_run

M = TypeVar("M")


@dataclass(frozen=True, eq=False)
class TrainedArm:
    """The model, and the training samples (i64[n] each) that it has seen and that were kept from it."""

    model: nn.Module
    engine: Engine
    dataset: Dataset
    seen: np.ndarray
    kept: np.ndarray
    seconds: float

    def inputs(self, x: np.ndarray) -> np.ndarray:
        """Samples of the data set as the model is fed them, f32[n, *input_shape]."""
        return np.array(normalise(x, self.dataset))


def train_arm(arm: Arm, prepared: Callable[[Dataset], Dataset] = lambda dataset: dataset) -> TrainedArm:
    """One round of the arm's [training] on all but the calibration samples, on one thread; `prepared` may change the data."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    scenario = load_scenario(arm | {"rounds": 1})
    dataset = prepared(open_dataset(prepare(scenario)))
    kept = calibration_indices(scenario, dataset)
    seen = np.setdiff1d(np.arange(len(dataset.y_train)), kept)
    model = build_model(scenario.model, dataset.input_shape, dataset.num_classes, scenario.model_args, scenario.model_seed)
    engine = Engine(model, TrainingConfig(**scenario.training.model_dump(), seed=scenario.protocol_seed), dataset)
    engine.flat.write(engine.train(Learner("central", seen), engine.initial_vector(), 1).vector)
    return TrainedArm(model, engine, dataset, seen, kept, time.perf_counter() - began)


def write_record(folder: Path, name: str, arm: Arm, measured: Any) -> None:
    """`measured` (a dataclass of plain data) as `folder / name.json`, with what it was measured of and by."""
    about = {"arm": arm, "version": __version__}
    path = folder / f"{name}.json"
    with writing(path):
        write_atomically(path, json.dumps(asdict(measured) | about, indent=1).encode())


def read_record(kind: type[M], name: str, arm: Arm, folder: Path) -> M | None:
    """What `write_record` has kept of this arm, None if there is nothing. ConfigError where it is of something else."""
    try:
        record = json.loads((folder / f"{name}.json").read_text())
        arm_there, version = record.pop("arm"), record.pop("version")
        measured = TypeAdapter(kind).validate_python(record)
    except (OSError, ValueError, KeyError):
        return None  # it was not written to the end, or before records told their arms
    if arm_there != json.loads(json.dumps(arm)):
        raise another_run(folder / f"{name}.json", "another scenario")
    if version != __version__:
        raise another_run(folder / f"{name}.json", f"gossipfl {version}")
    return measured
