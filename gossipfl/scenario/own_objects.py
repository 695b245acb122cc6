"""A program's own model, data set and training step: copied, and tried before a run begins with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from gossipfl.errors import ConfigError, DataError
from gossipfl.learning.datasets import Dataset, check_dataset, open_dataset
from gossipfl.scenario.config import Scenario, check_names
from gossipfl.scenario.hosting import peer_settings
from gossipfl.scenario.preparation import prepare


def take_objects(scenario: Scenario, model: Any, dataset: Any, step: Any) -> dict[str, Any]:
    """What a run is given of them: a copy of the model, so that training leaves the program's as it is, and the others.

    ConfigError for a data set that cannot be right, and for what a model and a step raise on a first batch, also where the
    scenario names them as package.module:function and they would run in this process.
    """
    if dataset is not None:
        _check_own_dataset(dataset)
    elif model is None and (scenario.model, scenario.data.kind) == ("mlp", "text"):  # the others of ours look at the shape
        raise ConfigError("model = 'mlp' takes numbers, not the characters of data.kind = 'text'; set model = 'gpt'")
    names_own = any(":" in name for name in (scenario.model, scenario.data.kind, scenario.training.step or ""))
    if any(own is not None for own in (model, dataset, step)) or (names_own and scenario.resolved_clock == "virtual"):
        check_names(scenario)
        model = _copied(model)
        _try_on_a_batch(scenario, _copied(model), dataset, step)
    return {"model": model, "dataset": dataset, "step": step}


def own_of(objects: Mapping[str, Any]) -> dict[str, str]:
    """What the record says of them beside its engine, for its scenario does not have them."""
    own = [name for name, value in objects.items() if value is not None]
    return {"own": ", ".join(own)} if own else {}


def _check_own_dataset(dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"dataset is a {type(dataset).__name__}; give a gossipfl.Dataset")
    try:
        check_dataset(dataset)
    except DataError as error:
        raise DataError(f"dataset: {error}") from None


def _copied(model: Any) -> Any:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"model {type(model).__name__} cannot be copied ({reason}); give one that copy.deepcopy copies"
        ) from error


def _try_on_a_batch(scenario: Scenario, model: Any, dataset: Dataset | None, step: Any) -> None:
    from gossipfl.learning.models import build_model  # torch, which a launcher of processes needs not
    from gossipfl.learning.training import Engine, TrainingConfig

    dataset = dataset or open_dataset(prepare(scenario))
    if model is None:
        model = build_model(scenario.model, dataset.input_shape, dataset.num_classes, scenario.model_args, scenario.model_seed)
    Engine(model, TrainingConfig(**peer_settings(scenario)["training"]), dataset, step).try_batch()
