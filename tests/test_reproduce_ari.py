"""The reproduction of ARI: what its tables say follows from what was measured, and thresholds never see the test data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gossipfl.errors import ConfigError, RunError
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.planning.cascade import Cost
from gossipfl.inference.planning.certificates import samples_needed
from gossipfl.learning.models import build_model
from gossipfl.scenario.config import load_scenario
from gossipfl.scenario.reproduce.ari import (
    ALPHA,
    DELTA,
    INTEGER_BITS,
    MANTISSA_BITS,
    PUBLISHED,
    STREAM_BITS,
    Cascade,
    Measured,
    Point,
    ari,
    measure,
    measure_cascades,
)
from gossipfl.scenario.reproduce.figures import find_data
from gossipfl.scenario.reproduce.trained_arm import write_record


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Measured, dict]:
    """The smallest arm, run as the command runs it, and its record."""
    folder = tmp_path_factory.mktemp("records")
    measured = measure("mlp-digits", ari().arms(False)["mlp-digits"], folder)
    return measured, json.loads((folder / "mlp-digits.json").read_text())


def test_a_record_that_cannot_be_kept_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"/file/mlp-digits.json cannot be written: (File exists|Not a directory)"):
        write_record(tmp_path / "file", "mlp-digits", {}, Cost(1.0, 0.5))


def test_the_arms_are_two_models_on_every_data_set_that_is_there(tmp_path):
    arms = ari().arms(False)
    assert {tuple(name.split("-", 1)) for name in arms} == {*PUBLISHED, ("mlp", "digits"), ("cnn", "digits")}
    assert set(find_data(arms, tmp_path)[0]) == {"mlp-digits", "cnn-digits"}
    (tmp_path / "mnist").mkdir()
    found, missing = find_data(arms, tmp_path)
    assert set(found) == {"mlp-digits", "cnn-digits", "mlp-mnist", "cnn-mnist"}
    assert missing == ["cifar10", "fashion-mnist", "svhn"]
    for full in (False, True):
        for arm in find_data(ari().arms(full), tmp_path)[0].values():
            load_scenario({key: value for key, value in arm.items() if key != "samples"})


def test_every_published_rate_has_its_bits():
    assert all(len(rates) == len(STREAM_BITS) for rates in PUBLISHED.values())
    assert all(list(rates) == sorted(rates) for rates in PUBLISHED.values())


def test_an_arm_that_was_measured_is_found_again(digits, tmp_path):
    measured, record = digits
    arm = ari().arms(False)["mlp-digits"]
    (tmp_path / "mlp-digits.json").write_text(json.dumps(record))
    assert ari().finished("mlp-digits", arm, tmp_path) == measured
    with pytest.raises(ConfigError, match="holds a run of another scenario"):
        ari().finished("mlp-digits", ari().arms(True)["mlp-digits"], tmp_path)


def test_every_kind_of_reduced_model_is_measured(digits):
    measured, record = digits
    kinds = {(point.kind, point.bits) for point in measured.points}
    for kind, bits in (("signed", STREAM_BITS), ("bipolar", STREAM_BITS)):
        assert {(kind, number) for number in bits} <= kinds
    assert {("integers", bits) for bits in INTEGER_BITS} <= kinds and {("mantissas", bits) for bits in MANTISSA_BITS} <= kinds
    assert measured.num_calibration >= samples_needed(ALPHA, DELTA)
    assert record["accuracy"] == measured.accuracy > 0.9 and len(record["points"]) == len(measured.points)


def test_on_digits_streams_and_floats_save_what_was_published_at_the_same_accuracy(digits):
    """Deterministic: data, training and noise have seeds."""
    measured, _ = digits
    summary, *_ = ari().tables({"mlp-digits": measured}, False)
    verdicts = {row.name.partition(", ")[2]: row.verdict for row in summary.rows}
    assert {verdicts[kind] for kind in ("signed", "bipolar", "mantissas")} <= {"inside", "above"}


def test_more_bits_disagree_less(digits):
    measured, _ = digits
    for kind in ("signed", "bipolar"):
        thresholds = {point.bits: point.largest.threshold for point in measured.points if point.kind == kind}
        assert thresholds[12] < thresholds[9] < thresholds[6]


def test_thresholds_come_from_the_calibration_data_alone():
    chain = Chain.of(build_model("mlp", (1, 4, 4), 5), (1, 4, 4))
    rng = np.random.default_rng(0)
    seen, calibration, *tests = (torch.from_numpy(rng.random((400, 1, 4, 4), np.float32)) for _ in range(4))
    labels = rng.integers(0, 5, 400)
    first, second = (measure_cascades(chain, seen, calibration, test, labels)[1] for test in tests)
    assert [point.largest.threshold for point in first] == [point.largest.threshold for point in second]
    assert [point.certified.threshold for point in first] == [point.certified.threshold for point in second]
    assert [point.largest.fallback for point in first] != [point.largest.fallback for point in second]


# --- tables -----------------------------------------------------------------------------------------------------------


def cascade(expected: float, fallback: float, accuracy: float = 0.9) -> Cascade:
    return Cascade(0.5, expected, fallback, accuracy, 0.005, 0.01)


def made_up(data: str = "cifar10") -> Measured:
    streams = [
        Point("signed", bits, 0.8, Cost(None, bits / 16, 0.25, 2.0 ** (bits - 12)), mine, certified)
        for bits, mine, certified in (
            (10, cascade(0.1, 0.15), cascade(0.0, 0.0)),
            (8, cascade(0.2, 0.30), cascade(0.1, 0.12)),
            (6, cascade(0.9, 0.05), cascade(0.9, 0.05)),
        )
    ]
    engine = Point("int8", 8, 0.9, Cost(0.4, 0.25, 0.0625), cascade(0.1, 0.1), cascade(0.1, 0.1))
    return Measured("cnn", data, 0.9, 1000, 1000, [*streams, engine], 1.0)


def test_the_best_number_of_bits_is_chosen_on_the_calibration_data():
    best, certified, costs, *_ = ari().tables({"cnn-cifar10": made_up()}, False)
    streams, engine = best.rows
    assert streams.values["bits"] == "8" and streams.measured == pytest.approx(1 - 1 / 16 - 0.30)
    assert streams.verdict == "inside" and streams.values["plots"] == "72"
    assert engine.values["saved"] == "50" and engine.published is None
    assert certified.rows[0].values["bits"] == "8" and certified.rows[0].values["differ"] == "1.00"
    assert [row.values["time"] for row in costs.rows] == ["", "50"]
    assert [row.values["bytes"] for row in costs.rows] == ["20", "65"]


def test_recompute_rates_are_compared_with_the_published_ones_to_a_point():
    *_, points, _ = ari().tables({"cnn-cifar10": made_up()}, False)
    assert [row.values["published"] for row in points.rows] == ["6", "30", "98", ""]
    assert [row.verdict for row in points.rows] == ["above", "inside", "below", ""]
    *_, unpublished, _ = ari().tables({"cnn-digits": made_up("digits")}, False)
    assert all(row.verdict == "" for row in unpublished.rows)


def test_a_cascade_that_loses_accuracy_is_not_judged():
    just = cascade(0.0, 0.0, accuracy=0.891)
    assert just.keeps(0.9) and not replace(just, accuracy=0.889).keeps(0.9)
    worse = replace(made_up(), accuracy=0.92)
    assert [row.verdict for row in ari().tables({"cnn-cifar10": worse}, False)[0].rows] == ["", ""]
