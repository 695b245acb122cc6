"""Predicted latency against measured, over emulated links: the rows, their bytes exactly, and what the links alone take.

How far predictions are off depends on the machine: `gossipfl bench-inference` says so.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gossipfl.errors import ConfigError
from gossipfl.inference.execution.activations import samples_to_text
from gossipfl.inference.execution.calibration import Calibrator
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.engines import ENGINES
from gossipfl.inference.planning.catalogue import Catalogue, Overhead
from gossipfl.inference.planning.certificates import allowed_disagreements
from gossipfl.inference.planning.cuts import choose_plan, fetch_seconds
from gossipfl.inference.planning.margins import accepted, margins
from gossipfl.inference.planning.offers import offer_bytes
from gossipfl.inference.planning.profile import DeviceProfile, FallbackRates, Plan
from gossipfl.inference.planning.sizes import activation_bytes, weight_bytes
from gossipfl.runtime.edge_device import EdgeDevice
from gossipfl.runtime.stages import emulated
from gossipfl.scenario.inference import latency, link_error
from gossipfl.scenario.inference.cascades import request_rows, share_within
from gossipfl.scenario.inference.fallbacks import fallback_rows
from gossipfl.scenario.inference.latency import measure_overheads
from gossipfl.scenario.inference.link_error import link_rows

SHAPE, LAYERS = (1, 8, 8), 3
X = np.random.default_rng(0).standard_normal((40, *SHAPE)).astype(np.float32)
NEAR = DeviceProfile("near", speed=0.5, uplink=1e7, downlink=1e7, latency_s=1e-3)
FAR = DeviceProfile("far", speed=0.1, uplink=1e5, downlink=2e5, latency_s=0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(latency, "MOST_TURNS", 3)
    monkeypatch.setattr(latency, "PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def calibrator() -> Calibrator:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 5)
    )  # fmt: skip
    return Calibrator(Chain.of(network, SHAPE), X, (X, None), data="x", engines=["fp32"])


@pytest.fixture(scope="module")
def experienced(calibrator) -> Calibrator:
    """With samples enough to certify two cascades."""
    many = np.random.default_rng(1).standard_normal((800, *SHAPE)).astype(np.float32)
    return Calibrator(calibrator.chain, X, (many, None), data="x", engines=["fp32"])


@pytest.fixture
def catalogue(calibrator) -> Catalogue:
    """Computing takes a second, so that devices are best off with the server."""
    levels = {0.01: {cut: ((4, 5, 6)[:cut], 6 if cut < LAYERS else 0) for cut in range(LAYERS + 1)}}
    times = (0.0, 1.0, 2.0, 3.0)
    return Catalogue(calibrator.chain.profile, 1, levels, {"fp32": times}, {"fp32": (0.0,) * 4})


def latency_of(*words, **options):
    return request_rows(*words, **options)[0]


def test_each_device_has_a_row_for_its_plan_the_middle_cut_and_all_on_the_server(calibrator, catalogue):
    by_itself = DeviceProfile("by itself", price_weight=1e9, requests=1000)
    dear = replace(catalogue, server_s={"fp32": (3.0, 2.0, 1.0, 0.0)})
    rows = latency_of(calibrator, dear, (by_itself,), X)
    assert [(row.device, row.cut, row.num_layers, row.is_chosen) for row in rows] == [
        ("by itself", 3, 3, True),
        ("by itself", 2, 3, False),
        ("by itself", 0, 3, False),
    ]
    rows = latency_of(calibrator, catalogue, (NEAR, FAR), X)
    assert [(row.device, row.cut, row.is_chosen, row.engine, row.turns) for row in rows] == [
        ("near", 0, True, "-", 3),
        ("near", 2, False, "fp32", 3),
        ("far", 0, True, "-", 3),
        ("far", 2, False, "fp32", 3),
    ]


def test_the_bytes_that_move_are_those_that_were_predicted(calibrator, catalogue):
    profile = catalogue.profile
    for row in latency_of(calibrator, catalogue, (NEAR,), X):
        assert row.predicted_up == row.measured_up == activation_bytes(profile, row.cut, 6)
        bits = (4, 5)[: row.cut]
        assert row.predicted_pull == row.measured_pull == weight_bytes(profile, bits) + offer_bytes(profile, bits)
        assert row.predicted_pull_s == fetch_seconds(catalogue, NEAR, (4, 5)[: row.cut])


def laboured(stage, inputs):
    return lambda *live: [stage(*live) for _ in range(100)][-1]


def test_a_convolutional_plan_with_an_int8_engine_moves_the_bytes_that_were_predicted_samples_and_all(monkeypatch):
    monkeypatch.setitem(ENGINES._functions, "fp32", laboured)  # or the device might find it to be faster
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 7 * 7, 10),
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((40, 3, 16, 16)).astype(np.float32)
    calibrator = Calibrator(Chain.of(network, (3, 16, 16)), x, (x, None), data="x", engines=["fp32", "int8"])
    levels = {0.01: {cut: ((4, 5, 6)[:cut], 6 if cut < LAYERS else 0) for cut in range(LAYERS + 1)}}
    times = {"fp32": (0.0, 2.0, 3.0, 4.0), "int8": (0.0, 1e-3, 2e-3, 3e-3)}
    sample_bytes = len(samples_to_text(calibrator.samples))
    assert sample_bytes == 4 * -(-16 * (8 + 3 * 16 * 16) // 3)
    catalogue = Catalogue(calibrator.chain.profile, 1, levels, times, {"fp32": (5.0, 4.0, 3.0, 0.0)}, sample_bytes=sample_bytes)
    rows = latency_of(calibrator, catalogue, (NEAR,), x)
    assert [(row.cut, row.engine) for row in rows] == [(3, "int8"), (2, "int8"), (0, "-")]
    for row in rows:
        bits = (4, 5, 6)[: row.cut]
        pieces = weight_bytes(catalogue.profile, bits)
        expected = pieces + offer_bytes(catalogue.profile, bits) + (sample_bytes if row.cut else 0)
        assert row.predicted_pull == row.measured_pull == expected
        assert row.predicted_up == row.measured_up


def of_a_request(catalogue, cut) -> float:
    """Seconds of a request, as `plan-inference` says."""
    return choose_plan(catalogue, NEAR, 0.01)[1][cut].request_s


def test_of_an_engine_that_a_device_refuses_nothing_is_predicted(calibrator, catalogue, monkeypatch):
    monkeypatch.setitem(ENGINES._functions, "planted", laboured)
    samples = len(samples_to_text(calibrator.samples))
    planted = replace(catalogue, device_s={"planted": (0.0, 0.1, 0.2, 0.3), **catalogue.device_s}, sample_bytes=samples)
    assert choose_plan(planted, NEAR, 0.01)[1][2].device_engine == "planted"
    *_, row = latency_of(calibrator, planted, (NEAR,), X)
    assert (row.cut, row.engine, row.refused) == (2, "fp32", ("planted",))
    assert row.predicted_s == of_a_request(catalogue, 2)
    pieces, offer = weight_bytes(catalogue.profile, (4, 5)), offer_bytes(catalogue.profile, (4, 5))
    assert row.predicted_pull == row.measured_pull == pieces + 2 * offer + samples, "both offers, and samples with the first"


def test_nothing_takes_less_than_the_link_alone(calibrator, catalogue):
    for row in latency_of(calibrator, catalogue, (FAR,), X):
        link_s = 2 * FAR.latency_s
        assert row.measured_s >= link_s + row.measured_up / FAR.uplink + 4 * 5 / FAR.downlink
        pieces = row.measured_pull - offer_bytes(catalogue.profile, (4, 5)[: row.cut])
        assert row.measured_pull_s >= (link_s + pieces / FAR.downlink if row.cut else 0.0)


def test_a_prediction_is_the_plans_and_now_has_the_overheads_of_now(calibrator, catalogue):
    overhead = Overhead(1.0, 2.0, 4.0)
    catalogue = replace(catalogue, overheads=(overhead,) * 3)
    for row in latency_of(calibrator, catalogue, (NEAR,), X):
        predicted_s = of_a_request(catalogue, row.cut)
        assert row.predicted_s == predicted_s
        measured = row.predicted_now_s - (predicted_s - 2.0 - 4.0 - (1.0 / NEAR.speed))
        assert measured > 0  # threads and messages take some time
        assert row.error == row.predicted_s / row.measured_s - 1
        assert row.error_now == row.predicted_now_s / row.measured_s - 1
        assert row.measured_s <= row.median_s


def test_a_cut_that_does_not_fit_the_device_has_no_row(calibrator, catalogue):
    small = replace(NEAR, memory_bytes=2500)  # the first layer takes 1,352 bytes, the second 10 KiB of weights
    assert [row.cut for row in latency_of(calibrator, catalogue, (small,), X)] == [0, 1]


def continuing(catalogue, cut, bits, activation_bits, device=NEAR) -> Plan:
    forced = replace(catalogue, version=1, levels={0.01: {cut: ((bits,) * cut, activation_bits)}})
    return choose_plan(forced, device, 0.01)[0]


def test_a_fallback_is_certified_with_what_continuing_computes(experienced, catalogue):
    slow = replace(catalogue, server_s={"fp32": (3.0, 2.0, 1.0, 0.0)})
    plan = continuing(slow, 1, 10, 2)
    assert plan.fallback == "continued"
    certificate, full = experienced.certify(plan), experienced.certify(replace(plan, fallback="full"))
    assert (certificate.tried, certificate.basis) == (2, experienced.basis(plan)) and full.basis.fallback == "full"
    found, differs = experienced.kept_scores(plan)
    continued = experienced.kept_scores(replace(plan, activation_bits=16))[1]
    assert continued.any() and differs.sum() > 10 * continued.sum(), "weights of 10 bits change little"
    accept = accepted(margins(found), certificate.threshold)
    assert certificate.let_through == np.where(accept, differs, continued).sum() <= allowed_disagreements(400, 0.02, 0.025)
    assert full.let_through == (accepted(margins(found), full.threshold) & differs).sum()
    coarse = continuing(slow, 1, 2, 2)
    assert experienced.certify(coarse) is None and experienced.certify(replace(coarse, fallback="full")).tried == 2


def test_with_too_few_samples_for_two_cascades_all_of_delta_is_the_full_models(calibrator, catalogue):
    few = Calibrator(calibrator.chain, X, (np.repeat(X, 4, axis=0), None), data="x", engines=["fp32"])
    plan = continuing(catalogue, 0, 0, 12, replace(NEAR, uplink=1e3))
    assert plan.fallback == "continued" and few.certify(plan) is None
    certificate = few.certify(replace(plan, fallback="full"))
    assert (certificate.n, certificate.tried, certificate.threshold) == (160, 1, 0.0)


def test_both_ways_to_fall_back_are_measured_and_the_cheaper_certified_one_is_chosen(experienced, catalogue):
    levels = {0.01: {0: ((), 2), 1: ((2,), 2), 2: ((6, 6), 2), 3: ((8, 8, 8), 0)}}
    catalogue = replace(catalogue, version=1, levels=levels, server_s={"fp32": (3.0, 2.0, 1.0, 0.0)})
    rows = fallback_rows(experienced, catalogue, (FAR,), X, total_s=0.1)
    assert [(row.device, row.cut, row.fallback) for row in rows] == [
        ("far", cut, way) for cut in (0, 2) for way in ("continued", "full")
    ]
    for row in rows:
        assert row.predicted_up == row.measured_up
        assert row.measured_s > 2 * FAR.latency_s + row.measured_up / FAR.uplink
    inputs, afresh, _, _ = rows
    assert inputs.differs == 0.0 == inputs.risk - afresh.risk and inputs.is_chosen and not afresh.is_chosen
    assert (inputs.measured_up, afresh.measured_up) == (14 * 8 + 1, 4 * 64)


def test_slow_links_are_asked_less_often(calibrator, catalogue, monkeypatch):
    monkeypatch.setattr(latency, "MOST_TURNS", 9)
    fast = replace(catalogue, device_s={"fp32": (0.0, 1e-6, 1e-6, 1e-6)})
    device = replace(FAR, requests=10**6)
    rows, (cascade,) = request_rows(calibrator, fast, (device,), X, total_s=0.3)
    added_s = choose_plan(fast, device, 0.01)[0].afresh.latency_s
    assert cascade.measured_rate == 1.0, "too few samples to certify anything"
    assert {row.turns for row in rows} == {cascade.turns} == {int(0.3 / (sum(row.predicted_s for row in rows) + added_s))}
    assert 3 < cascade.turns < 9


def test_a_plan_of_both_tables_is_measured_once_and_its_fallbacks_weigh_as_many_as_fall_back(experienced, catalogue):
    levels = {0.01: {3: ((2, 3, 3), 0)}}
    catalogue = replace(catalogue, levels=levels, fallback_rates={0.01: {3: FallbackRates(0.1)}})
    (row,), (cascade,) = request_rows(experienced, catalogue, (FAR,), X)
    plan = choose_plan(catalogue, FAR, 0.01)[0]
    certificate = experienced.certify(plan)
    stands = accepted(margins(experienced.scores(plan, X)), certificate.threshold)
    assert 0 < stands.mean() < 1 and cascade.measured_rate == 1 - stands.mean()
    assert cascade.turns == 3 and row.turns == 6, "as many fall back as stand"
    assert (cascade.predicted_rate, cascade.certified_on) == (certificate.fallback_rate, 400)
    assert cascade.rate_within[0] < cascade.predicted_rate < cascade.rate_within[1]
    added_s = (cascade.at_rate_s - row.predicted_now_s) / cascade.measured_rate
    assert added_s > 2 * FAR.latency_s and (cascade.measured_s - row.measured_s) / cascade.measured_rate > 2 * FAR.latency_s
    assert cascade.predicted_s == pytest.approx(row.predicted_now_s + added_s * cascade.predicted_rate)
    ups = [cascade.predicted_up, cascade.measured_up]
    assert ups == pytest.approx([rate * 4 * 64 for rate in (cascade.predicted_rate, cascade.measured_rate)])


@pytest.mark.parametrize(("num", "n"), [(0, 179), (25, 179), (3, 3)])
def test_a_share_is_within_what_clopper_and_pearson_say(num, n):
    from scipy.stats import binomtest

    found = binomtest(num, n).proportion_ci(0.95, "exact")
    assert share_within(num, n) == pytest.approx((found.low, found.high))


def test_overheads_are_of_parts_that_there_are(calibrator, catalogue):
    catalogue = replace(catalogue, device_s={"fp32": (0.0,) * 4})
    server_alone, both, device_alone = measure_overheads(calibrator, catalogue, X)
    assert server_alone.device_s == 0.0 == device_alone.server_s
    assert min(server_alone.server_s, both.device_s, both.server_s, device_alone.device_s) > 0
    assert min(one.rest_s for one in (server_alone, both, device_alone)) > 0


def test_a_slow_device_takes_its_speeds_share_longer():
    def work() -> float:
        began = time.thread_time()
        sum(range(20_000))
        return time.thread_time() - began

    for speed in (0.5, 0.1):
        began = time.perf_counter()
        worked = emulated(work, speed)
        assert time.perf_counter() - began >= worked / speed
    assert emulated(lambda: "x", 1.0) == "x"


@pytest.mark.parametrize("speed", [0.0, -1.0, 2.0, float("nan")])
def test_a_speed_that_waiting_cannot_bring_about_is_refused(calibrator, speed):
    with pytest.raises(ConfigError, match="emulated_speed"):
        EdgeDevice(["tcp://127.0.0.1:1"], calibrator.chain, emulated_speed=speed)


def test_a_link_alone_is_never_faster_than_it_is_set(monkeypatch):
    monkeypatch.setattr(link_error, "TURNS", 3)
    unlimited = [replace(NEAR, latency_s=0.0), replace(NEAR, uplink=math.inf)]
    rows = link_rows([replace(NEAR, latency_s=0.005), *unlimited])
    assert [(row.device, row.direction) for row in rows] == [("near", "up"), ("near", "down")]
    for row in rows:
        assert row.measured_latency_s >= row.latency_s and row.measured_rate <= row.rate
        assert row.latency_error >= 0 >= row.rate_error
