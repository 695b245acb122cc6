"""The data of a run: converted once, and dealt to the peers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from gossipfl.errors import DataError
from gossipfl.learning.checkpoint import writing
from gossipfl.learning.datasets import Dataset, open_dataset, prepare_dataset, save_dataset
from gossipfl.learning.partition import class_table, partition
from gossipfl.randomness import generator
from gossipfl.scenario.config import Scenario


def prepare(scenario: Scenario) -> Path:
    """The folder of the scenario's data set, converted to memory-mapped files once and kept for later runs."""
    data = scenario.data
    path = Path(data.path) if data.path else None
    return prepare_dataset(data.kind, path, data.test_fraction, scenario.data_seed, data.args, _cache())


def deal(scenario: Scenario, dataset: Dataset) -> list[np.ndarray]:
    """The indices (i64[n]) of the training samples of each peer; those kept for calibration are nobody's."""
    kept = calibration_indices(scenario, dataset)
    dealt = np.setdiff1d(np.arange(len(dataset.y_train)), kept)
    keys = None if dataset.keys is None else dataset.keys[dealt]
    kind, args = scenario.data.partition.kind, scenario.data.partition.args
    shards = partition(dataset.y_train[dealt], scenario.peers, kind, scenario.data_seed, keys, args)
    return [dealt[shard] for shard in shards]


def deal_to_files(scenario: Scenario, folder: Path, dataset: Dataset | None) -> tuple[Path, list[Path], np.ndarray | None]:
    """Convert the data once, deal it to the peers, keep each peer's indices in a file; also the table of classes."""
    if dataset is not None:
        prepared = folder / "data"
        with writing(prepared):
            save_dataset(dataset, prepared)
    else:
        prepared = prepare(scenario)
    opened = open_dataset(prepared)
    shards = deal(scenario, opened)
    table = class_table(opened.y_train, shards, opened.num_classes) if opened.num_classes <= 20 else None
    paths = []
    for name, shard in zip(scenario.peer_names, shards, strict=True):
        path = folder / "shards" / f"{name}.npy"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            np.save(path, shard)
        paths.append(path)
    return prepared, paths, table


def calibration_indices(scenario: Scenario, dataset: Dataset) -> np.ndarray:
    """The training samples (sorted i64[n]) that no peer trains on, `data.calibration_fraction` of all."""
    total = len(dataset.y_train)
    rng = generator(scenario.data_seed, "calibration")
    return np.sort(rng.choice(total, round(scenario.data.calibration_fraction * total), replace=False))


def seen_indices(scenario: Scenario, dataset: Dataset, num_samples: int) -> np.ndarray:
    """Some of the training samples (sorted i64[n]) that peers train on."""
    kept = calibration_indices(scenario, dataset)
    rng = generator(scenario.data_seed, "noise")
    return np.sort(rng.permutation(np.setdiff1d(np.arange(len(dataset.y_train)), kept))[:num_samples])


def held_out_halves(scenario: Scenario, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The test samples (sorted i64[n]), one half for calibration where the scenario has kept no others, and the other half."""
    order = generator(scenario.data_seed, "calibration").permutation(len(dataset.y_test))
    half = len(order) // 2
    return np.sort(order[:half]), np.sort(order[half:])


def data_name(scenario: Scenario, dataset: Dataset) -> str:
    """What a certificate says that it was calibrated on."""
    return f"{scenario.data.kind}-{len(dataset.y_train)}-{len(dataset.y_test)}"


def _cache() -> Path:
    try:
        return Path(os.environ.get("GOSSIPFL_CACHE") or Path.home() / ".cache" / "gossipfl")
    except RuntimeError as error:  # a user whom the system does not know, as in a container
        raise DataError("there is no home folder to keep data sets in; set GOSSIPFL_CACHE to a folder") from error
