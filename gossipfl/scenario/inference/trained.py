"""The trained model of a run's record, ready to be served, with the data that inference is calibrated and measured on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from gossipfl.errors import ConfigError
from gossipfl.learning.checkpoint import load_model
from gossipfl.learning.datasets import Dataset, open_dataset
from gossipfl.learning.datasets.dataset import normalise
from gossipfl.learning.flatten import float_buffers, layout_of, unflatten_
from gossipfl.learning.models import build_model
from gossipfl.registry import did_you_mean
from gossipfl.scenario.config import Scenario, load_scenario
from gossipfl.scenario.preparation import calibration_indices, data_name, held_out_halves, prepare, seen_indices

Samples = tuple[np.ndarray, np.ndarray]
"""Inputs as the model is fed them (f32[n, *input_shape]) and their labels (i64[n])."""


@dataclass(frozen=True, eq=False)
class Trained:
    """One model of a run: `name` is "average" or a peer's; `version` the rounds that it was trained for."""

    folder: Path
    name: str
    version: int
    model: nn.Module
    scenario: Scenario
    dataset: Dataset
    digest: str

    @property
    def file(self) -> Path:
        return self.folder / "models" / f"{self.name}.safetensors"

    @property
    def calibration_file(self) -> Path:
        return self.folder / "models" / f"{self.name}.calibration.json"

    @property
    def data_name(self) -> str:
        """What a certificate says that it was calibrated on."""
        return data_name(self.scenario, self.dataset)

    def fit_samples(self, num_samples: int = 1024) -> Samples:
        """Samples that peers trained on, for what needs no unseen ones: noise energies, ranges of activations."""
        used = seen_indices(self.scenario, self.dataset, num_samples)
        return self._samples(self.dataset.x_train, self.dataset.y_train, used)

    @cached_property
    def calibration_samples(self) -> Samples:
        """Samples that nobody trained on: those the scenario kept for it, else half of the test samples."""
        kept = calibration_indices(self.scenario, self.dataset)
        if len(kept):
            return self._samples(self.dataset.x_train, self.dataset.y_train, kept)
        return self._samples(self.dataset.x_test, self.dataset.y_test, self._halves[0])

    @cached_property
    def test_samples(self) -> Samples:
        """Test samples that calibration did not see."""
        if self.scenario.data.calibration_fraction:
            return self._samples(self.dataset.x_test, self.dataset.y_test, np.arange(len(self.dataset.y_test)))
        return self._samples(self.dataset.x_test, self.dataset.y_test, self._halves[1])

    @cached_property
    def _halves(self) -> tuple[np.ndarray, np.ndarray]:
        return held_out_halves(self.scenario, self.dataset)

    def _samples(self, x: np.ndarray, y: np.ndarray, indices: np.ndarray) -> Samples:
        return normalise(np.asarray(x[indices]), self.dataset), np.asarray(y[indices])


def load_trained(folder: Path, name: str = "average") -> Trained:
    """The model `name` of the run recorded in `folder`. ConfigError or DataError for what is not there."""
    summary, scenario_file = folder / "summary.json", folder / "scenario.toml"
    if not scenario_file.is_file():
        raise ConfigError(f"{folder} holds no run (no scenario.toml); make one with `gossipfl run`")
    names = sorted(path.name.removesuffix(".safetensors") for path in (folder / "models").glob("*.safetensors"))
    if name not in names:
        known = ", ".join(names) or "none: the run did not finish"
        raise ConfigError(f"{folder} has no model {name!r}{did_you_mean(name, names)}; its models: {known}")
    try:
        rounds = int(json.loads(summary.read_text(encoding="utf-8"))["rounds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{summary} does not say how many rounds were trained ({error}); run it again") from error
    scenario = load_scenario(str(scenario_file))
    dataset = open_dataset(prepare(scenario))
    model = build_model(scenario.model, dataset.input_shape, dataset.num_classes, scenario.model_args, scenario.model_seed)
    buffers = scenario.training.buffers
    if buffers != "average" and float_buffers(model):
        raise ConfigError(
            f"{folder}: the statistics of BatchNorm stayed with each peer (training.buffers = {buffers!r}), so its models "
            "cannot be served; train with training.buffers = 'average'"
        )
    layout, vector = load_model(folder / "models" / f"{name}.safetensors")
    if layout.digest != layout_of(model, buffers).digest:
        raise ConfigError(f"{folder}: the model file {name} does not fit the scenario's model {scenario.model!r}")
    unflatten_(model, vector, buffers)
    digest = hashlib.blake2b(vector.tobytes(), digest_size=16).hexdigest()
    return Trained(folder, name, max(rounds, 1), model.eval(), scenario, dataset, digest)
