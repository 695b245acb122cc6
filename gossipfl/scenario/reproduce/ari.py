"""Adaptive Resolution Inference: how much the reduced model saves where the full one is run only for small margins.

Wang, Reviriego, Niknia, Conde, Liu and Lombardi, IEEE IoT Journal 2023, arXiv 2408.14528. Published: 40 to 85 % of the energy
saved at unchanged accuracy, for an MLP and a CNN on MNIST, Fashion-MNIST, SVHN and CIFAR-10, in stochastic computing of 6 to 12
bits and in floats cut from FP16 down to FP8. The recompute rates here are read off the plots of the co-authors' repository
(github.com/javicond3/Adaptive-Resolution-Inference_ARI), to about a point. That the longest streams stand for the energy of the
full model is assumed: it gives the published savings. Models, their training and the coding of the streams were not at hand.

Each arm trains one model centrally, sets the thresholds on calibration data and measures on test data, the three disjoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from gossipfl.errors import ConfigError, RunError
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.engines import compile_stage
from gossipfl.inference.execution.noise import Coding, scores_of, with_integers, with_mantissas, with_streams
from gossipfl.inference.planning.cascade import (
    Cost,
    of_cascade,
    relative_energy_of_integers,
    relative_energy_of_mantissas,
    relative_energy_of_streams,
)
from gossipfl.inference.planning.certificates import Basis, certify
from gossipfl.inference.planning.margins import accepted, largest_change, margins
from gossipfl.learning.datasets import Dataset
from gossipfl.scenario.reproduce.figures import REPRODUCTIONS, Arm, Arms, Reproduction, Row, Table
from gossipfl.scenario.reproduce.trained_arm import read_record, train_arm, write_record

ALPHA, DELTA = 0.01, 0.05
STREAM_BITS = tuple(range(12, 5, -1))
INTEGER_BITS = (8, 6, 5, 4, 3)
MANTISSA_BITS = (8, 6, 4, 3, 2)
SAVED = (0.40, 0.85)
READING = 1.0
"""Points by which a recompute rate may have been misread."""
SAMPLES = 2000
"""Of calibration and of test data at most, but for the paper's size."""
RANGE_SAMPLES = 256
"""Training samples that set the range of each layer's inputs."""
PUBLISHED_KINDS = (*get_args(Coding), "mantissas")
FULL = Cost(1.0, 1.0, 1.0, 1.0)

DATA_SETS = {"digits": "digits", "mnist": "idx", "fashion-mnist": "idx", "svhn": "npz", "cifar10": "cifar10"}
"""Their kinds, as the scenarios' `[data]`."""
STEPS = {("mlp", False): 3000, ("cnn", False): 1200, ("mlp", True): 20_000, ("cnn", True): 15_000}
"""Of training, with 64 samples each; digits take few."""
PUBLISHED: dict[tuple[str, str], tuple[float, ...]] = {
    ("mlp", "mnist"): (0, 0, 0, 0, 1, 1, 1),
    ("cnn", "mnist"): (0, 0, 0, 0, 1, 1, 3),
    ("mlp", "fashion-mnist"): (0, 0, 0.7, 2.8, 8.3, 17.7, 38),
    ("cnn", "fashion-mnist"): (0.3, 1, 2, 4, 8.5, 19, 40),
    ("mlp", "svhn"): (3, 8, 15, 27, 44, 64, 78),
    ("cnn", "svhn"): (0, 1, 2.5, 6.5, 13.6, 25, 48),
    ("mlp", "cifar10"): (2, 6, 14, 34, 57, 77, 95),
    ("cnn", "cifar10"): (0, 1.3, 6, 15, 30, 47, 98),
}
"""Recompute rate in % with the paper's threshold M, for each of `STREAM_BITS`; of MNIST, "less than 1" stands as 1."""


@dataclass(frozen=True, slots=True)
class Cascade:
    """A threshold, and what comes of it on the test data."""

    threshold: float
    expected_fallback: float
    """On the calibration data."""
    fallback: float
    accuracy: float
    accuracy_sd: float
    """Standard error of the difference to the full model's accuracy, from the samples on which just one of them is right."""
    disagreement: float

    def keeps(self, full: float) -> bool:
        """Whether the full model's accuracy is kept, as far as these samples can tell."""
        return self.accuracy >= full - 2 * self.accuracy_sd


@dataclass(frozen=True, slots=True)
class Point:
    """One reduced model. `cost` is of a request, relative to the full model's."""

    kind: str
    bits: int
    accuracy: float
    cost: Cost
    largest: Cascade
    certified: Cascade


@dataclass(frozen=True, slots=True)
class Measured:
    """What an arm came to."""

    model: str
    data: str
    accuracy: float
    """Of the full model."""
    num_calibration: int
    num_test: int
    points: list[Point]
    seconds: float

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.3f}, {len(self.points)} reduced models, took {self.seconds:.0f} s"


# --- arms -------------------------------------------------------------------------------------------------------------


def _arms(full: bool) -> Arms:
    """Scenarios, as far as they say what is trained on what; the largest first."""
    return {
        f"{model}-{data}": {
            "model": model,
            "data": _data(data),
            "rounds": 1,
            "training": {
                "local_steps": 400 if data == "digits" else STEPS[model, full],
                "batch_size": 64,
                "learning_rate": 0.001,
                "optimizer": "adam",
            },
            "samples": None if full else SAMPLES,
        }
        for data in reversed(DATA_SETS)
        for model in ("cnn", "mlp")
    }


def _data(name: str) -> dict[str, Any]:
    if name == "digits":
        return {"kind": name, "test_fraction": 0.3, "calibration_fraction": 0.45}
    return {"kind": DATA_SETS[name], "path": name, "calibration_fraction": 0.1}


def measure(name: str, arm: Arm, folder: Path) -> Measured:
    """Train, calibrate and test one model; `folder / name.json` is the record."""
    began = time.perf_counter()
    trained = train_arm({key: value for key, value in arm.items() if key != "samples"}, _with_background_0)
    dataset, num_samples = trained.dataset, arm["samples"]
    calibration, test, seen = (
        torch.from_numpy(trained.inputs(x))
        for x in (
            dataset.x_train[trained.kept[:num_samples]],
            dataset.x_test[:num_samples],
            dataset.x_train[trained.seen[:RANGE_SAMPLES]],
        )
    )
    chain = Chain.of(trained.model, dataset.input_shape)
    accuracy, points = measure_cascades(chain, seen, calibration, test, dataset.y_test[:num_samples])
    seconds = time.perf_counter() - began
    measured = Measured(arm["model"], name.partition("-")[2], accuracy, len(calibration), len(test), points, seconds)
    write_record(folder, name, arm, measured)
    return measured


def _with_background_0(dataset: Dataset) -> Dataset:
    """Grey images as 0 to 1: drawn on a background that streams then need not carry. Colours are standardised as ever."""
    return replace(dataset, mean=(0.0,), std=(1.0,)) if dataset.mean and len(dataset.mean) == 1 else dataset


def measure_cascades(
    chain: Chain, seen: Tensor, calibration: Tensor, test: Tensor, labels: np.ndarray
) -> tuple[float, list[Point]]:
    """The full model's accuracy on `test`, and every reduced model with its thresholds from `calibration` (f32[n, ...]).

    `seen` are training samples, for the ranges of the layers' inputs: a certificate's samples have had no say in the model.
    """
    full = chain.stage(0, len(chain.profile.layers))
    expected, answers = scores_of(full, calibration).argmax(1), scores_of(full, test).argmax(1)
    points = []
    for kind, bits, cost, run in _reduced(chain, seen):
        known, found = run(calibration), run(test)
        known_margins, found_margins = margins(known), margins(found)
        differs = known.argmax(1) != expected
        basis = Basis("", 0, 0, (bits,), bits, (kind,), "calibration")
        thresholds = (
            largest_change(known_margins, differs, "softmax"),
            certify(known_margins, differs, basis, ALPHA, DELTA).threshold,
        )
        cascades = []
        for threshold in thresholds:
            accept = accepted(found_margins, threshold)
            mixed = np.where(accept, found.argmax(1), answers)
            swings = np.count_nonzero((mixed == labels) != (answers == labels))
            cascades.append(
                Cascade(
                    threshold,
                    1.0 - float(accepted(known_margins, threshold).mean()),
                    1.0 - float(accept.mean()),
                    float((mixed == labels).mean()),
                    math.sqrt(swings) / len(labels),
                    float((mixed != answers).mean()),
                )
            )
        points.append(Point(kind, bits, float((found.argmax(1) == labels).mean()), cost, *cascades))
    return float((answers == labels).mean()), points


def _reduced(chain: Chain, samples: Tensor) -> Iterator[tuple[str, int, Cost, Callable[[Tensor], np.ndarray]]]:
    """Kind, bits, relative cost and scores of every reduced model."""
    full = chain.stage(0, len(chain.profile.layers))
    for coding in get_args(Coding):
        for bits in STREAM_BITS:
            model = with_streams(full, samples, bits, 0, coding)
            yield coding, bits, _cost(bits, bits, relative_energy_of_streams(bits)), partial(scores_of, model)
    for bits in INTEGER_BITS:
        model = with_integers(full, samples, bits)
        yield "integers", bits, _cost(bits, bits, relative_energy_of_integers(bits, bits)), partial(scores_of, model)
    for bits in MANTISSA_BITS:
        model = with_mantissas(full, bits)
        yield "mantissas", bits, _cost(6 + bits, 1 + bits, relative_energy_of_mantissas(bits), 11), partial(scores_of, model)
    try:
        engine, plain = (compile_stage(full, (samples,), name) for name in ("int8", "fp32"))
    except (ConfigError, RunError):  # this machine has no such kernels
        return
    cost = Cost(seconds=engine.seconds / plain.seconds, num_bytes=8 / 32, bit_macs=(8 / 32) ** 2)
    yield "int8", 8, cost, partial(scores_of, engine)


def _cost(stored_bits: int, computed_bits: int, energy: float, full_bits: int = 16) -> Cost:
    """Against 16 bits that are stored and `full_bits` that are computed with; nothing is timed, as it is only modelled here."""
    return Cost(num_bytes=stored_bits / 16, bit_macs=(computed_bits / full_bits) ** 2, energy=energy)


# --- tables -----------------------------------------------------------------------------------------------------------


def _tables(outcomes: Mapping[str, Measured], full: bool) -> list[Table]:
    best = [(measured, points) for measured in outcomes.values() for points in _by_kind(measured).values()]
    summary = [
        Table(
            "the paper's thresholds, at the best number of bits (published: 40 to 85 % saved)",
            [_best(*each) for each in best],
            NOTES,
        ),
        Table("certified thresholds, at the best number of bits", [_best_certified(*each) for each in best], CERTIFIED_NOTES),
        Table("the first table's cascades: % saved of what", [_costs(*each) for each in best], COST_NOTES),
    ]
    return summary + [table for measured in outcomes.values() for table in _details(measured)]


NOTES = [
    "best: what saves most on the calibration data; everything shown is of the test data",
    "saved: 1 - E_R / E_F - rerun, in %; E_R / E_F is assumed to be 2^(bits - 12) for streams, bits^2 / 16^2 for integers and "
    "(1 + bits)^2 / 11^2 for mantissas of floats; of int8, which runs here, it is measured time",
    "rerun: share of samples that the full model is run for, in %",
    "plots: the most that the recompute rates in its authors' plots give for this model and data set",
    "lost: points of accuracy, with two standard errors; where more than those are lost, there is no verdict",
    "signed, bipolar: codings of streams (see gossipfl/inference/execution/noise.py); which one the paper has was not at hand",
    "the MLP has 128 hidden units and the CNN is that of FedAvg; those of the paper were not at hand",
]
CERTIFIED_NOTES = [
    f"P( more than {ALPHA:.0%} of the answers differ from the full model's ) <= {DELTA:.0%}; differ: those that did, in %",
    "so it is for each number of bits by itself; that the best of them was picked on the same samples is not accounted for",
]
COST_NOTES = [
    "bytes: of weights and activations; bit-MACs: multiply-accumulates times the bits of both factors; against 16 bits each, "
    "for the engine against float32",
    "time is measured, of one sample on this machine, where the reduced model runs on it; the others are modelled",
]


def _by_kind(measured: Measured) -> dict[str, list[Point]]:
    kinds = dict.fromkeys(point.kind for point in measured.points)
    return {kind: [point for point in measured.points if point.kind == kind] for kind in kinds}


def _at_its_best(points: list[Point], chosen: Callable[[Point], Cascade]) -> tuple[Point, Cascade]:
    point = max(points, key=lambda point: _saved(point.cost, chosen(point).expected_fallback))
    return point, chosen(point)


def _saved(cost: Cost, fallback: float) -> float:
    """Share of energy, or of time where that is measured."""
    mixed = of_cascade(cost, FULL, fallback)
    value = mixed.energy if mixed.energy is not None else mixed.seconds
    assert value is not None, "every reduced model has one of the two"
    return 1.0 - value


def _best(measured: Measured, points: list[Point]) -> Row:
    point, cascade = _at_its_best(points, lambda point: point.largest)
    saved, rates = _saved(point.cost, cascade.fallback), _published(measured, point)
    values = {
        "bits": str(point.bits),
        "saved": _percent(saved),
        "plots": _percent(max(map(_saved_in_plot, STREAM_BITS, rates))) if rates else "",
        "rerun": _percent(cascade.fallback, 1),
        "lost": _lost(measured, cascade),
    }
    is_judged = point.kind in PUBLISHED_KINDS and cascade.keeps(measured.accuracy)
    return Row(_name(measured, point), values, saved, SAVED if is_judged else None)


def _best_certified(measured: Measured, points: list[Point]) -> Row:
    point, cascade = _at_its_best(points, lambda point: point.certified)
    values = {
        "bits": str(point.bits),
        "saved": _percent(_saved(point.cost, cascade.fallback)),
        "rerun": _percent(cascade.fallback, 1),
        "differ": _percent(cascade.disagreement, 2),
        "lost": _lost(measured, cascade),
    }
    return Row(_name(measured, point), values)


def _costs(measured: Measured, points: list[Point]) -> Row:
    point, cascade = _at_its_best(points, lambda point: point.largest)
    mixed = of_cascade(point.cost, FULL, cascade.fallback)
    columns = {"energy": mixed.energy, "time": mixed.seconds, "bytes": mixed.num_bytes, "bit-MACs": mixed.bit_macs}
    values = {name: "" if value is None else _percent(1 - value) for name, value in columns.items()}
    return Row(_name(measured, point), {"bits": str(point.bits)} | values)


def _details(measured: Measured) -> list[Table]:
    title = f"{measured.model} on {measured.data}, full model {measured.accuracy:.4f}"
    samples = f"{measured.num_calibration} samples to calibrate, {measured.num_test} to test"
    band = f"published: rerun, in %, as read off plots; inside: within {READING:g} point of it"
    return [
        Table(f"{title}: the paper's thresholds", [_detail(measured, point) for point in measured.points], [samples, band]),
        Table(f"{title}: certified thresholds", [_certified_detail(point) for point in measured.points], [samples]),
    ]


def _detail(measured: Measured, point: Point) -> Row:
    rates = _published(measured, point)
    rate = rates[STREAM_BITS.index(point.bits)] if rates else None
    values = {"published": "" if rate is None else f"{rate:g}"} | _measured(point, point.largest)
    band = None if rate is None else (rate - READING, rate + READING)
    return Row(f"{point.kind}, {point.bits}", values, 100 * point.largest.fallback, band)


def _certified_detail(point: Point) -> Row:
    return Row(
        f"{point.kind}, {point.bits}", _measured(point, point.certified) | {"differ": _percent(point.certified.disagreement, 2)}
    )


def _measured(point: Point, cascade: Cascade) -> dict[str, str]:
    return {
        "rerun": _percent(cascade.fallback, 1),
        "T": f"{cascade.threshold:.3f}",
        "reduced": f"{point.accuracy:.4f}",
        "cascade": f"{cascade.accuracy:.4f}",
        "saved": _percent(_saved(point.cost, cascade.fallback)),
    }


def _published(measured: Measured, point: Point) -> tuple[float, ...]:
    """The recompute rates, by `STREAM_BITS`; none for what was not published."""
    return PUBLISHED.get((measured.model, measured.data), ()) if point.kind in get_args(Coding) else ()


def _saved_in_plot(bits: int, rate: float) -> float:
    return _saved(Cost(energy=relative_energy_of_streams(bits)), rate / 100)


def _name(measured: Measured, point: Point) -> str:
    return f"{measured.model} {measured.data}, {point.kind}"


def _lost(measured: Measured, cascade: Cascade) -> str:
    return f"{100 * (measured.accuracy - cascade.accuracy):.1f} ± {200 * cascade.accuracy_sd:.1f}"


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}"


@REPRODUCTIONS.register("ari")
def ari() -> Reproduction:
    """Reduced models whose margins are too small are run in full."""
    return Reproduction(_arms, _tables, measure, partial(read_record, Measured))
