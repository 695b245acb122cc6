"""Devices and servers over real sockets: the same scores as without them, whatever dies, lies or changes under way."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, cached_property

import numpy as np
import pytest
import torch
from sockets import DEADLINE_S, made_attackers, new_address, open_files, wait_for
from test_audit import delay_bound
from torch import nn

from gossipfl.errors import ConfigError, PlanError, RunError
from gossipfl.inference.execution.activations import decode_live, encode_live, samples_to_text
from gossipfl.inference.execution.calibration import calibrate
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.engines import ENGINES, missing_engines
from gossipfl.inference.planning.catalogue import Catalogue
from gossipfl.inference.planning.certificates import Basis, Certificate, certify
from gossipfl.inference.planning.cuts import choose_plan
from gossipfl.inference.planning.margins import accepted, differing, margins
from gossipfl.inference.planning.offers import Ask, Piece, manifest_from_json, offer_bytes, to_json
from gossipfl.inference.planning.profile import DeviceProfile
from gossipfl.inference.planning.receipts import Budget, Receipt
from gossipfl.inference.planning.sizes import resident_bytes
from gossipfl.protocol import wire
from gossipfl.protocol.messages import (
    INFERENCE_RUN,
    Activation,
    Continuation,
    Credit,
    Failed,
    Offer,
    PlanRequest,
    Pull,
    Refuse,
    Result,
)
from gossipfl.runtime import edge_device, inference_server
from gossipfl.runtime.content_cache import ContentCache, digest_of
from gossipfl.runtime.edge_device import EdgeDevice
from gossipfl.runtime.inference_server import InferenceServer
from gossipfl.runtime.stages import RunnableStage, live_shapes
from gossipfl.scenario.inference.device_view import Answers
from gossipfl.scenario.inference.serve import SAY_S, Inputs, answer_all
from gossipfl.segments.codecs.planes import Planes

SHAPE, CLASSES, LAYERS = (1, 8, 8), 5, 4
LOSS = 0.01
X = np.random.default_rng(0).standard_normal((6, *SHAPE)).astype(np.float32)

attackers = pytest.fixture(made_attackers)
torch.set_num_threads(1)  # the layers are small, and servers and devices compute at the same time


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 12), nn.ReLU(), nn.Linear(12, CLASSES),
    )  # fmt: skip


@cache
def chain() -> Chain:
    return Chain.of(network(), SHAPE)


def vector_of(version: int) -> np.ndarray:
    """Weights that differ from version to version by far more than any rounding."""
    vector = chain().vector()
    return vector * np.float32(1 + (version - 1) / 50)


def catalogue(version=1, cut=2, bits=6, activation_bits=None) -> Catalogue:
    """The one plan that there is."""
    if activation_bits is None:
        activation_bits = 8 if cut < LAYERS else 0
    times = [1e-3 * k for k in range(LAYERS + 1)]
    return Catalogue(
        chain().profile, version, {LOSS: {cut: ((bits,) * cut, activation_bits)}}, {"fp32": times}, {"fp32": times[::-1]}
    )


def certified(threshold: float) -> Callable:
    def certificate(plan) -> Certificate:
        basis = Basis("", plan.version, plan.cut, plan.weight_bits, plan.activation_bits, plan.device_engines, "x")
        return Certificate(threshold, 0.02, 0.05, 300, 10, 2, 0.1, "disagreement", basis)

    return certificate


def also_continued(threshold: float, shares: tuple[float, float] = (0.3, 0.1)) -> Callable:
    """With any fallback; `shares` of the samples are said to fall back to the full model, and to continuing."""

    def certificate(plan) -> Certificate:
        made = certified(threshold)(plan)
        share = shares[plan.fallback == "continued"]
        return replace(made, fallback_rate=share, basis=replace(made.basis, fallback=plan.fallback), tried=2)

    return certificate


def reduced_scores(inputs, version=1, cut=2, bits=6, activation_bits=8) -> np.ndarray:
    """What a plan comes to where nothing is sent anywhere."""
    layers, vector = chain().profile.layers, vector_of(version)
    quantized = vector.copy()
    for layer in layers[:cut]:
        planes, part = Planes(0, bits, layer.group), slice(*layer.weight)
        quantized[part] = planes.decode(planes.encode(vector[part]), layer.num_weights).values
    live = (inputs,)
    if cut:
        live = run(0, cut, quantized, live)
    if cut < LAYERS:
        shapes = live_shapes(chain().profile, cut)
        live = decode_live(encode_live(live, activation_bits), shapes, len(inputs), activation_bits)
        live = run(cut, LAYERS, vector, live)
    return live[0]


def full_scores(inputs, version=1) -> np.ndarray:
    return run(0, LAYERS, vector_of(version), (inputs,))[0]


def run(start, stop, vector, live) -> tuple[np.ndarray, ...]:
    """The stage as it is, not compiled."""
    with torch.inference_mode():
        return tuple(tensor.numpy() for tensor in chain().stage(start, stop, vector)(*map(torch.from_numpy, live)))


def assert_same(found, expected) -> None:
    """But for the order of sums, which torch chooses by the number of samples."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def servers() -> Iterator[Callable[..., InferenceServer]]:
    """Opens servers with a version published, and closes them when the test is over."""
    opened: list[InferenceServer] = []

    def open_(kind="tcp4", *, version=1, certificate=None, config=None, **plan) -> InferenceServer:
        opened.append(InferenceServer({"m": chain()}, new_address(kind), config=config))
        if version:
            opened[-1].publish("m", version, vector_of(version), catalogue(version, **plan), certificate or (lambda plan: None))
        return opened[-1]

    yield open_
    for server in opened:
        server.close(0.1)


@pytest.fixture
def devices() -> Iterator[Callable[..., EdgeDevice]]:
    opened: list[EdgeDevice] = []

    def open_(*addresses: object, **options) -> EdgeDevice:
        names = [getattr(address, "address", address) for address in addresses]
        opened.append(EdgeDevice(names, chain(), **(dict(model="m", max_accuracy_loss=LOSS) | options)))
        return opened[-1]

    yield open_
    for device in opened:
        device.close()


# --- scores -----------------------------------------------------------------------------------------------------------


def test_a_model_calibrated_with_few_samples_answers_with_the_full_model():
    x = np.random.default_rng(1).standard_normal((120, *SHAPE)).astype(np.float32)
    calibrator = calibrate(network(), (x, full_scores(x).argmax(1)), engines=["fp32"])
    with InferenceServer({"m": calibrator.chain}) as server:
        server.publish("m", 1, calibrator.vector, calibrator.measured, calibrator.certify, calibrator.samples)
        with EdgeDevice([server.address], calibrator.chain, max_accuracy_loss=0.05, model="m") as device:
            answer = device.predict(X, DEADLINE_S)
    assert_same(answer.scores, full_scores(X))
    assert answer.receipt.tiers == ("full",) * len(X)


@pytest.mark.parametrize("kind", ["tcp4", "tcp6", "ipc", "inproc"])
@pytest.mark.parametrize(("cut", "activation_bits"), [(2, 8), (1, 32), (LAYERS, 0), (0, 8), (0, 32)])
def test_the_scores_are_those_of_the_same_plan_in_one_place(kind, cut, activation_bits, servers, devices):
    if kind != "tcp4" and cut not in (2, LAYERS):
        pytest.skip("once for each place to cut is enough")
    server = servers(kind, cut=cut, activation_bits=activation_bits)
    device = devices(server)
    answer = device.predict(X, DEADLINE_S)
    assert_same(answer.scores, reduced_scores(X, 1, cut, 6, activation_bits))
    receipt = answer.receipt
    is_full = (cut, activation_bits) == (0, 32)
    assert receipt.tiers == (("full",) if is_full else ("reduced",)) * 6 and receipt.threshold == (None if is_full else 0.0)
    assert (receipt.model, receipt.version, receipt.cut) == ("m", 1, cut)
    assert (receipt.weight_bits, receipt.activation_bits) == ((6,) * cut, activation_bits)
    assert receipt.engines == ("fp32",) * ((cut > 0) + (cut < LAYERS))
    if not is_full:
        np.testing.assert_allclose(receipt.margins, margins(answer.scores), rtol=1e-5)
    shapes = live_shapes(chain().profile, cut)
    up = len(encode_live([np.zeros((6, *shape), np.float32) for shape in shapes], activation_bits)) if cut < LAYERS else 0
    assert (receipt.bytes_up, receipt.bytes_down) == (up, 4 * 6 * CLASSES if up else 0)
    parts = receipt.seconds
    assert set(parts) == {"device", "transfer", "server", "total"}
    assert parts["total"] >= parts["device"] + parts["server"] > 0
    assert device.faults == [] and [model.version for model in device.models()] == [1]


@pytest.mark.parametrize("is_brief", [True, False])
def test_only_what_takes_longer_than_that_is_handed_to_another_thread(is_brief, servers, devices, monkeypatch):
    monkeypatch.setattr("gossipfl.runtime.stages.BRIEF_S", float("inf") if is_brief else 0.0)
    server = servers()
    device = devices(server)
    device.predict(X, DEADLINE_S)  # the server has compiled its stage
    ran, call = [], RunnableStage.__call__
    monkeypatch.setattr(
        RunnableStage, "__call__", lambda *of: ran.append(threading.current_thread().name.rstrip("_0")) or call(*of)
    )
    assert_same(device.predict(X, DEADLINE_S).scores, reduced_scores(X))
    shells = ["gossipfl-edge-device", "gossipfl-inference-server"]
    assert ran == (shells if is_brief else ["gossipfl-head", "gossipfl-stages"])


def test_an_activation_of_many_chunks_is_answered(servers, devices):
    server = servers(cut=1, activation_bits=32)
    many = np.random.default_rng(1).standard_normal((2000, *SHAPE)).astype(np.float32)
    answer = devices(server).predict(many, DEADLINE_S)
    assert answer.receipt.bytes_up == 4 * 2000 * 256 > 7 * wire.MAX_PAYLOAD_BYTES
    assert_same(answer.scores, reduced_scores(many, 1, 1, 6, 32))


def test_those_unsure_get_the_scores_of_the_full_model(servers, devices):
    reduced, full = reduced_scores(X, cut=LAYERS, bits=3), full_scores(X)
    threshold = float(np.sort(margins(reduced))[3] - 1e-5)
    server = servers(cut=LAYERS, bits=3, certificate=certified(threshold))
    answer = devices(server).predict(X, DEADLINE_S)
    is_unsure = margins(reduced) < threshold
    assert is_unsure.sum() == 3
    assert answer.receipt.tiers == tuple("full" if unsure else "reduced" for unsure in is_unsure)
    assert_same(answer.scores, np.where(is_unsure[:, None], full, reduced))
    receipt = answer.receipt
    assert (receipt.threshold, receipt.alpha, receipt.delta) == (pytest.approx(threshold), 0.02, 0.05)
    assert receipt.bytes_up == 3 * 4 * 64 and receipt.engines == ("fp32", "fp32")


@pytest.mark.parametrize("cut", [2, LAYERS, 0])
def test_where_nothing_is_sure_every_label_is_the_full_models(cut, servers, devices):
    server = servers(cut=cut, bits=2, certificate=certified(float("inf")))
    answer = devices(server).predict(X, DEADLINE_S)
    assert answer.receipt.tiers == ("full",) * 6
    with torch.no_grad():
        labels = network().eval()(torch.from_numpy(X)).argmax(1).numpy()
    np.testing.assert_array_equal(answer.scores.argmax(1), labels)


def laboured(stage, inputs):
    """An engine that does everything thirty times."""
    return lambda *live: [stage(*live) for _ in range(30)][-1]


@pytest.fixture
def slow_fp32(monkeypatch) -> None:
    """Every other engine is faster."""
    monkeypatch.setitem(ENGINES._functions, "fp32", laboured)


def by_engine(plan) -> Certificate:
    """At threshold 0.25 with fp32, at 0.125 with another engine."""
    return certified(0.25 if plan.stages[0].engine == "fp32" else 0.125)(plan)


def refused(device) -> tuple[str, ...]:
    """Beside what is not installed here."""
    return tuple(engine for engine in device.refused if engine not in missing_engines())


def test_a_certificate_is_of_the_engine_that_runs(slow_fp32, servers, devices, capsys):
    """Engines other than fp32 take samples to be compiled; a device that has none runs fp32 instead."""
    server = servers(version=0)
    plan = catalogue(cut=LAYERS)
    server.publish("m", 1, vector_of(1), with_engine("bf16", plan), by_engine)
    without, with_samples = devices(server), devices(server, samples=X)
    for device, engine, threshold in ((without, "fp32", 0.25), (with_samples, "bf16", 0.125)):
        receipt = device.predict(X, DEADLINE_S).receipt
        assert (receipt.engines[0], receipt.threshold, receipt.alpha) == (engine, threshold, 0.02)
        assert refused(device) == (() if engine == "bf16" else ("bf16",))
        Answers(None, as_json=True).finish(device)
        said = "not used on this device: engine 'bf16' is compiled with samples, and there are none\n"
        assert (said in capsys.readouterr().err) == (device is without)


def test_fp32_runs_where_it_is_faster_than_what_was_planned_and_has_a_certificate_of_its_own(servers, devices, monkeypatch):
    monkeypatch.setitem(ENGINES._functions, "planted", laboured)
    server, planned = servers(version=0), []

    def publish(version):
        def certificate(plan) -> Certificate:
            planned.append((version, plan.stages[0].engine))
            return by_engine(plan)

        server.publish("m", version, vector_of(version), with_engine("planted", catalogue(version, LAYERS)), certificate, X)

    publish(1)
    slow = DeviceProfile(speed=0.1)
    for device in (devices(server), devices(server, device_profile=slow, emulated_speed=0.1)):
        receipt = device.predict(X, DEADLINE_S).receipt
        assert (receipt.engines[0], receipt.threshold, receipt.alpha) == ("fp32", 0.25, 0.02)
        assert refused(device) == ("planted",)
    publish(2)
    assert wait_for(lambda: device.models()[0].version == 2)
    assert device.predict(X, DEADLINE_S).receipt.threshold == 0.25
    assert planned == [(1, "planted"), (1, "fp32"), (2, "fp32")], "it is not tried again"


def test_however_many_engines_a_device_refuses_there_is_one_more_offer_and_nothing_is_pulled_or_compiled_again(
    servers, devices, monkeypatch, capsys
):
    compiled, wrong = [], lambda stage, inputs: lambda x: (x.flatten(1)[:, :CLASSES],)
    monkeypatch.setitem(ENGINES._functions, "slow", lambda *of: compiled.append("slow") or laboured(*of))
    monkeypatch.setitem(ENGINES._functions, "wrong", lambda *of: compiled.append("wrong") or wrong(*of))
    full = ENGINES.get("fp32")
    monkeypatch.setitem(ENGINES._functions, "fp32", lambda *of: compiled.append("fp32") or full(*of))
    monkeypatch.setitem(ENGINES._functions, "gone", laboured)
    server, plain, planned = servers(version=0), servers(cut=LAYERS), []

    def certificate(plan) -> Certificate:
        planned.append(plan.stages[0].engine)
        return certified(0.0)(plan)

    times = catalogue().device_s["fp32"]
    faster = {name: [seconds / k for seconds in times] for k, name in ((2, "slow"), (3, "wrong"), (4, "gone"))}
    server.publish("m", 1, vector_of(1), replace(catalogue(cut=LAYERS), device_s={"fp32": times} | faster), certificate, X)
    monkeypatch.setattr(edge_device, "missing_engines", lambda: {"gone": "engine 'gone' is not there: pip install it"})
    other = devices(plain)
    assert other.predict(X, DEADLINE_S).receipt.engines == ("fp32",)
    del compiled[:]
    device = devices(server)
    assert device.predict(X, DEADLINE_S).receipt.engines == ("fp32",)
    assert list(device.refused) == ["gone", "wrong", "slow"]
    assert planned == ["wrong", "fp32"] and compiled == ["fp32", "wrong", "slow"]
    assert device.bytes_pulled == other.bytes_pulled
    assert device.bytes_offered == 2 * other.bytes_offered + len(samples_to_text(X))
    Answers(None, as_json=True).finish(device)
    gone, differs, slower = capsys.readouterr().err.splitlines()
    assert gone == "not used on this device: engine 'gone' is not there: pip install it"
    assert re.match(r"not used .*: engine 'wrong' computes something else than fp32 .*\(relative difference [\d.]+, ", differs)
    assert re.match(
        r"not used .*: engine 'slow' is slower than fp32 on this machine: [\d.]+ ms a sample, fp32 [\d.]+ ms", slower
    )


def test_a_server_tells_once_of_each_device_what_it_refuses_of_the_engines_that_would_be_planned(servers, attackers, caplog):
    server = servers(version=0)
    server.publish("m", 1, vector_of(1), with_engine("int8", catalogue(cut=LAYERS)), samples=X)
    refused = {"int8": "engine 'int8' is slower\x1b[2J\n" + 500 * "!", "unheard of": "no"}
    asked = Ask(DeviceProfile(name="a\nphone"), LOSS, refused=refused)
    with caplog.at_level("INFO", inference_server.__name__):
        for sender in ("d0", "d1"):
            attacker = attackers(server.address)
            for request in (1, 2):
                attacker.say(sender, "m", PlanRequest(request, payload=to_json(asked)), run=INFERENCE_RUN)
                assert isinstance(heard(attacker), Offer)
    first, second = caplog.messages
    assert first.startswith("device a\\nphone (d0) does without an engine: engine 'int8' is slower\\x1b[2J\\n!!!")
    assert second == first.replace("(d0)", "(d1)") and len(first) < 400 and first.isprintable()


def test_fp32_does_not_run_in_a_planned_engines_place_where_its_weights_do_not_fit(servers, devices, monkeypatch):
    monkeypatch.setitem(ENGINES._functions, "int8", laboured)
    server = servers(version=0)
    server.publish("m", 1, vector_of(1), with_engine("int8", catalogue(cut=LAYERS)), by_engine, samples=X)
    needed = resident_bytes(chain().profile, LAYERS, "fp32")
    for memory_bytes, engine in ((needed, "fp32"), (needed - 1, "int8")):
        receipt = devices(server, device_profile=DeviceProfile(memory_bytes=memory_bytes)).predict(X, DEADLINE_S).receipt
        assert receipt.engines[0] == engine


def with_engine(engine: str, plan: Catalogue) -> Catalogue:
    return replace(plan, device_s={"fp32": plan.device_s["fp32"], engine: [s / 2 for s in plan.device_s["fp32"]]})


def test_samples_come_with_an_offer_unless_the_device_has_them(slow_fp32, servers, devices):
    server = servers(version=0)
    server.publish("m", 1, vector_of(1), with_engine("bf16", catalogue(1, LAYERS)), certified(0.0), samples=X)
    without, with_these, with_others = devices(server), devices(server, samples=X), devices(server, samples=X[:2])
    plain = devices(servers(cut=LAYERS))
    opened = plain, without, with_these, with_others
    everything = [device.predict(X, DEADLINE_S) and device.bytes_offered for device in opened]
    text = len(samples_to_text(X))
    assert [offered - everything[0] for offered in everything] == [0, text, 0, text]
    assert len({device.bytes_pulled for device in opened}) == 1
    layer = chain().profile.layers[1]
    vector = vector_of(1)
    vector[slice(*layer.bias)] += 1.0
    server.publish("m", 2, vector, with_engine("bf16", catalogue(2, LAYERS)), certified(0.0), samples=X)
    for device, before in zip((without, with_these, with_others), everything[1:], strict=True):
        assert wait_for(lambda device=device: device.models()[0].version == 2)
        receipt = device.predict(X, DEADLINE_S).receipt
        assert (receipt.version, receipt.engines, receipt.alpha) == (2, ("bf16",), 0.02)
        assert device.bytes_offered - before == everything[0], "no samples"
        assert device.bytes_pulled - plain.bytes_pulled == 4 * layer.channels, "a bias"
        assert device._versions[2].manifest.plan.prediction.sample_bytes == 0


@pytest.mark.parametrize(("cut", "activation_bits"), [(0, 32), (0, 3), (2, 2), (LAYERS, 0)])
@pytest.mark.parametrize("threshold", [0.0, float(np.float32(1 / 3) * np.float32(1e-9)), math.inf])
def test_an_offer_takes_the_bytes_that_were_predicted(threshold, cut, activation_bits, slow_fp32, devices):
    """Whatever the threshold and the plan; 16 digits of each number of the plan, and the longest name."""
    times = [k / 3 for k in range(LAYERS + 1)]
    plan = with_engine("bf16", replace(catalogue(1, cut, 7, activation_bits), device_s={"fp32": times}))
    name = "m" * (wire.MAX_NAME_BYTES - 8)
    profile = DeviceProfile(uplink=7e5, downlink=3e5, latency_s=1 / 7, requests=3)
    with InferenceServer({name: chain()}, new_address("tcp4")) as server:
        server.publish(name, 1, vector_of(1), plan, also_continued(threshold), samples=X)
        device = devices(server, model=name, device_profile=profile, max_accuracy_loss=LOSS)
        receipt = device.predict(X, DEADLINE_S).receipt
    expected, _ = choose_plan(replace(plan, sample_bytes=len(samples_to_text(X))), profile, LOSS)
    predicted = expected.prediction
    assert (receipt.cut, predicted.sample_bytes > 0) == (cut, cut > 0)
    assert device.bytes_offered == predicted.offer_bytes + predicted.sample_bytes
    assert device.bytes_pulled == predicted.weight_bytes


def test_where_the_planned_engine_does_not_work_the_plan_of_another_is_asked_for_and_holds(servers, devices):
    """It is not installed on the device, or computes something else there."""
    server = servers(version=0)
    plan = catalogue(cut=LAYERS)
    server.publish("m", 1, vector_of(1), with_engine("elsewhere", plan), certified(0.0), samples=X)
    device = devices(server)
    receipt = device.predict(X, DEADLINE_S).receipt
    assert (receipt.engines, receipt.alpha, receipt.tiers) == (("fp32",), 0.02, ("reduced",) * 6)
    assert refused(device) == ("elsewhere",)


def test_a_certificate_of_accuracy_says_nothing_of_how_many_answers_differ(servers, devices):
    server = servers(cut=LAYERS, certificate=lambda plan: replace(certified(0.001)(plan), loss="accuracy"))
    receipt = devices(server).predict(X, DEADLINE_S).receipt
    assert (receipt.threshold, receipt.alpha, receipt.delta) == (pytest.approx(0.001), None, None)


def test_a_certificate_for_another_plan_is_not_offered(servers, devices):
    def of_another(plan) -> Certificate:
        return certified(0.5)(replace(plan, weight_bits=(16,) * plan.cut))

    with pytest.raises(PlanError, match=r"the certificate is of .* \(16, 16\).*certify the plan"):
        devices(servers(certificate=of_another)).predict(X, DEADLINE_S)

    def of_another_engine(plan) -> Certificate:
        made = certified(0.5)(plan)
        return replace(made, basis=replace(made.basis, engines=("int8",)))

    with pytest.raises(PlanError, match=r"the certificate is of .*'int8'.*, the plan of .*'fp32'.*certify the plan"):
        devices(servers(certificate=of_another_engine)).predict(X, DEADLINE_S)


def test_a_certifier_that_raises_is_logged_once_of_each_plan_and_every_device_hears_why(servers, devices, caplog):
    asked = []

    def certificate(plan) -> Certificate:
        asked.append(plan)
        raise ValueError("no samples for today")

    server, whole = servers(version=0), catalogue(cut=LAYERS)
    server.publish("m", 1, vector_of(1), replace(whole, levels={2 * LOSS: {2: ((6,) * 2, 8)}} | whole.levels), certificate)
    for loss in (LOSS, 2 * LOSS):
        before = len(asked)
        with devices(server, max_accuracy_loss=loss) as device:
            assert wait_for(lambda before=before: len(asked) >= before + 3), "it asks again and again"
            with pytest.raises(
                RunError, match="a plan of version 1 of 'm' cannot be certified: ValueError: no samples for today"
            ):
                device.predict(X, 0.1)
    assert len({plan.cut for plan in asked}) == 2
    told = [record for record in caplog.records if record.exc_info]
    assert [record.getMessage() for record in told] == ["a plan of version 1 of 'm' cannot be certified"] * 2


@pytest.fixture
def certifying(servers) -> Iterator[tuple[InferenceServer, threading.Event]]:
    """A server that certifies plans when the event is set, but for those of the cut after two layers: they are certified."""
    is_let = threading.Event()

    def certificate(plan) -> Certificate:
        assert is_let.wait(DEADLINE_S)
        return certified(0.0)(plan)

    def known(plan) -> Certificate | None:
        return also_continued(0.0)(plan) if plan.cut == 2 else None

    server, whole = servers(version=0), catalogue(cut=LAYERS)
    levels = {LOSS: {2: ((6,) * 2, 8)}, 2 * LOSS: whole.levels[LOSS]}
    server.publish("m", 1, vector_of(1), replace(whole, levels=levels), certificate, known=known)
    yield server, is_let
    is_let.set()


def test_a_device_waits_while_its_plan_is_certified_and_others_are_not_held_up(certifying, devices):
    server, is_let = certifying
    slow = devices(server, max_accuracy_loss=2 * LOSS)
    future = slow.submit(X, DEADLINE_S)
    assert wait_for(lambda: slow.is_awaited)
    other = devices(server)
    assert other.predict(X, DEADLINE_S).receipt.cut == 2, "its plan is made, its pieces come, and the server computes for it"
    with pytest.raises(RunError, match=f"first version: {server.address} has none ready yet, while it is .* certified"):
        slow.predict(X, 1.5)
    assert not future.done() and slow.models() == ()
    is_let.set()
    assert future.result(DEADLINE_S).receipt.cut == LAYERS
    assert slow.faults == other.faults == [] and slow.waits_for is None and not slow.is_awaited


def test_gossipfl_device_says_what_it_waits_for_and_has_time_as_long_as_a_server_is_at_it(certifying, devices, monkeypatch):
    server, is_let = certifying
    asked, said, answers = [], [], []
    device = devices(server, max_accuracy_loss=2 * LOSS)
    submit = device.submit

    def spied(*question):
        asked.append(question)
        if len(asked) == 2:  # the first one's time is over
            is_let.set()
        return submit(*question)

    monkeypatch.setattr(device, "submit", spied)
    answer_all(device, Inputs(X[:1], None), 3 * SAY_S, lambda index, answer, seconds: answers.append(answer), said.append)
    assert len(answers) == 1 and len(asked) >= 2 and len(said) >= 1
    assert said[0].startswith(f"waiting for a first version: {server.address} has none ready yet, while it is ")


def test_gossipfl_device_does_not_wait_for_who_cannot_offer_a_plan(servers, devices):
    device = devices(servers(), max_accuracy_loss=LOSS / 2)
    with pytest.raises(PlanError, match="no plan keeps within"):
        answer_all(device, Inputs(X, None), DEADLINE_S, lambda *_: None, lambda text: None)
    nobody = devices("tcp://127.0.0.1:9")
    with pytest.raises(RunError, match=r"no answer in time; .*is `gossipfl serve` running there"):
        answer_all(nobody, Inputs(X, None), 0.1, lambda *_: None, lambda text: None)


def test_a_server_answers_callers_of_its_own_process_with_the_full_model(servers):
    server = servers()
    answer = server.infer("m", X, Budget())
    assert_same(answer.scores, full_scores(X))
    assert answer.receipt.tiers == ("full",) * 6 and answer.receipt.version == 1 and answer.receipt.bytes_up == 0
    assert [(model.name, model.version, model.input_shape, model.num_classes) for model in server.models()] == [
        ("m", 1, SHAPE, CLASSES)
    ]


def test_many_threads_ask_at_once_and_each_gets_its_own_answer(servers, devices):
    device = devices(servers(cut=2))
    inputs = [np.roll(X, k, axis=0)[: 1 + k % 3].copy() for k in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda x: device.predict(x, DEADLINE_S), inputs))
    for x, answer in zip(inputs, answers, strict=True):
        assert_same(answer.scores, reduced_scores(x))


# --- continuing -------------------------------------------------------------------------------------------------------


def missing_bytes(cut, bits, samples, of_samples=6) -> int:
    shapes = live_shapes(chain().profile, cut)
    whole, part = (len(encode_live([np.zeros((samples, *s), np.float32) for s in shapes], depth)) for depth in (16, bits))
    return whole - part + -(-of_samples // 8)


SLOW = DeviceProfile(uplink=1e5)


@pytest.mark.parametrize(("cut", "activation_bits"), [(2, 4), (1, 3), (0, 4)])
@pytest.mark.parametrize("kind", ["tcp4", "inproc"])
def test_those_unsure_are_continued_with_what_was_missing(kind, cut, activation_bits, servers, devices):
    plan = dict(cut=cut, activation_bits=activation_bits)
    reduced, continued = reduced_scores(X, **plan), reduced_scores(X, cut=cut, activation_bits=16)
    threshold = float(np.sort(margins(reduced))[3] - 1e-5)
    server = servers(kind, certificate=also_continued(threshold), **plan)
    device = devices(server, device_profile=DeviceProfile(uplink=1e9) if cut else SLOW)
    receipt = (answer := device.predict(X, DEADLINE_S)).receipt
    is_unsure = margins(reduced) < threshold
    assert is_unsure.sum() == 3
    assert receipt.tiers == tuple("continued" if unsure else "reduced" for unsure in is_unsure)
    assert_same(answer.scores, np.where(is_unsure[:, None], continued, reduced))
    up = len(encode_live([np.zeros((6, *s), np.float32) for s in live_shapes(chain().profile, cut)], activation_bits))
    assert receipt.fallback_bytes_up == missing_bytes(cut, activation_bits, 3)
    assert receipt.bytes_up == up + receipt.fallback_bytes_up and receipt.bytes_down == 4 * (6 + 3) * CLASSES
    assert 0 < receipt.fallback_s < receipt.seconds["total"]
    assert (receipt.threshold, receipt.alpha, receipt.delta) == (pytest.approx(threshold), 0.02, 0.05)
    assert device.faults == [] and not server._kept and not server._machine._remembered.keys


def test_a_continuation_of_many_chunks_is_answered(servers, devices):
    many = np.random.default_rng(1).standard_normal((3000, *SHAPE)).astype(np.float32)
    server = servers(cut=1, activation_bits=4, certificate=also_continued(0.2))
    answer = devices(server).predict(many, DEADLINE_S)
    reduced, continued = (reduced_scores(many, cut=1, activation_bits=bits) for bits in (4, 16))
    is_continued = np.array(answer.receipt.tiers) == "continued"
    assert answer.receipt.fallback_bytes_up == missing_bytes(1, 4, is_continued.sum(), 3000) > 3 * wire.MAX_PAYLOAD_BYTES
    np.testing.assert_array_equal(is_continued, np.array(answer.receipt.margins) < np.float32(0.2))
    assert_same(answer.scores, np.where(is_continued[:, None], continued, reduced))


@pytest.mark.parametrize(
    ("plan", "certificate", "profile"),
    [
        (dict(cut=LAYERS), also_continued(math.inf), DeviceProfile()),
        (dict(cut=2, activation_bits=16), also_continued(math.inf), DeviceProfile()),
        (dict(cut=2, activation_bits=32), also_continued(math.inf), DeviceProfile()),
        (dict(cut=1, activation_bits=4), also_continued(math.inf), SLOW),  # 256 values there, of an input of 64
        (dict(cut=2, activation_bits=4), also_continued(math.inf, shares=(0.1, 0.9)), DeviceProfile(uplink=1e9)),
        (dict(cut=2, activation_bits=4), certified(math.inf), DeviceProfile()),
    ],
    ids=["nothing at the server", "all planes there", "float32 there", "dearer", "falls back too often", "not certified"],
)
def test_where_continuing_is_not_cheaper_or_not_certified_the_full_model_starts_afresh(
    plan, certificate, profile, servers, devices
):
    answer = devices(servers(certificate=certificate, **plan), device_profile=profile).predict(X, DEADLINE_S)
    assert answer.receipt.tiers == ("full",) * 6 and answer.receipt.fallback_bytes_up == 4 * 6 * 64
    assert_same(answer.scores, full_scores(X))


def test_a_certificate_of_continuing_is_not_offered_where_nothing_can_be_continued(servers, devices):
    def always(plan) -> Certificate:
        return also_continued(math.inf)(replace(plan, fallback="continued"))

    receipt = devices(servers(cut=2, activation_bits=16, certificate=always)).predict(X, DEADLINE_S).receipt
    assert (receipt.tiers, receipt.threshold, receipt.alpha) == (("reduced",) * 6, 0.0, None)


def test_a_server_that_has_forgotten_says_so_and_the_full_model_starts_afresh(servers, devices):
    from gossipfl.inference.planning.answering import ServerConfig

    config = ServerConfig(max_remembered_bytes=100)
    server = servers(cut=2, activation_bits=4, certificate=also_continued(math.inf), config=config)
    device = devices(server)
    receipt = (answer := device.predict(X, DEADLINE_S)).receipt
    assert receipt.tiers == ("full",) * 6 and device.faults == []
    assert_same(answer.scores, full_scores(X))
    assert receipt.fallback_bytes_up == missing_bytes(2, 4, 6) + 4 * 6 * 64
    assert not server._kept


def heard(attacker):
    """What the server answers, beside the credit that it grants."""
    return next(message for _, (*_, message) in iter(attacker.hear, None) if not isinstance(message, Credit))


@pytest.mark.parametrize("scores", [np.zeros(1), np.full(6 * CLASSES, np.nan), np.zeros(7 * CLASSES)])
def test_a_server_that_lies_when_it_continues_is_left_and_another_starts_afresh(scores, servers, devices, monkeypatch):
    payload = scores.astype(np.float32).tobytes()

    def lie(served, continuation, *_) -> list[Result]:
        return [Result(continuation.request, served.version, 0.0, 0, len(payload), payload=payload)]

    monkeypatch.setattr(inference_server, "run_again", lie)
    liar, honest = (servers(cut=2, activation_bits=4, certificate=also_continued(math.inf)) for _ in range(2))
    device = devices(liar, honest)
    answer = device.predict(X, DEADLINE_S)
    assert answer.receipt.tiers == ("full",) * 6
    assert_same(answer.scores, full_scores(X))
    assert [(fault.source, fault.kind) for fault in device.faults] == [(liar.address, "rejected")]


def test_what_is_kept_to_be_continued_is_bounded_whatever_devices_do(servers, attackers):
    from gossipfl.inference.planning.answering import ServerConfig

    config = ServerConfig(max_remembered_bytes_per_caller=5000, max_remembered_bytes=8000)
    server = servers(cut=0, activation_bits=4, config=config)
    payload = encode_live((X[:1],), 4)
    several = [attackers(server.address) for _ in range(3)]
    for request in range(1, 51):
        for attacker in several:
            say(attacker, Activation(request, 1, 0, 4, 1, 0, len(payload), True, payload=payload))
            assert isinstance(heard(attacker), Result)
    assert wait_for(lambda: len(server._kept) == len(server._machine._remembered.keys))
    assert 3 <= len(server._kept) <= 8000 // (1024 + len(payload))
    say(several[0], Continuation(99, 1, 1, 0, missing_bytes(0, 4, 1, 1), payload=bytes(missing_bytes(0, 4, 1, 1))))
    assert heard(several[0]).kind == "forgotten"


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (Continuation(2, 1, 1, 0, 98, payload=bytes(98)), "input"),
        (Continuation(2, 1, 1, 0, 97, payload=bytes(97)), "input"),
        (Continuation(2, 1, 2, 0, 193, payload=bytes(193)), "input"),
        (Continuation(2, 1, 1, 0, 97, payload=b"\xc0" + bytes(96)), "input"),
        (Continuation(2, 1, 1, 0, 97, payload=b"\x20" + bytes(96)), "input"),
        (Continuation(2, 3, 1, 0, 97, payload=b"\x80" + bytes(96)), "forgotten"),
        (Continuation(1, 1, 1, 0, 97, payload=b"\x80" + bytes(96)), "forgotten"),
    ],
)
def test_what_continues_wrongly_is_refused_and_the_server_goes_on(message, kind, servers, attackers, devices):
    server = servers(cut=0, activation_bits=4)
    payload = encode_live((X[:2],), 4)
    attacker = attackers(server.address)
    say(attacker, Activation(1, 1, 0, 4, 2, 0, len(payload), True, payload=payload))
    assert isinstance(heard(attacker), Result)
    say(attacker, message)
    answer = heard(attacker)
    assert isinstance(answer, Failed) and answer.kind == kind, answer
    assert_same(devices(server).predict(X, DEADLINE_S).scores, reduced_scores(X, cut=0, activation_bits=4))


def test_what_was_continued_is_audited_and_an_alarm_ends_it(servers, devices):
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((2000, *SHAPE)).astype(np.float32)
    plan = dict(cut=2, bits=2, activation_bits=4)
    continued, full = reduced_scores(inputs, cut=2, bits=2, activation_bits=16), full_scores(inputs)
    differs = differing(continued.argmax(1), full.argmax(1))
    assert differs.mean() > 0.05, "continuing is not certified in earnest"
    device = devices(servers(certificate=also_continued(math.inf), **plan), audit_share=1.0)
    tiers = []
    for start in range(0, 2000, 20):
        tiers.append(set(device.predict(inputs[start : start + 20].copy(), DEADLINE_S).receipt.tiers))
        assert wait_for(lambda: not device._machine._audits._watched[1].drawn and len(device._jobs) == 0)
        if device.faults:
            break
    audit = device._machine._audits._watched[1].audit
    assert audit.alarmed_at <= delay_bound(float(differs.mean()), 0)
    assert audit.num_differing == differs[: audit.alarmed_at].sum()
    assert all(found == {"continued"} for found in tiers)
    answer = device.predict(X, DEADLINE_S)
    assert answer.receipt.tiers == ("full",) * 6 and answer.receipt.alarm


# --- what is pulled ---------------------------------------------------------------------------------------------------


def plane_bytes(layers, num_planes) -> int:
    return sum(num_planes * -(-layer.num_weights // 8) for layer in layers)


def test_only_missing_planes_are_pulled(servers, devices, tmp_path):
    """The same version at 4 bits, then at 6: two planes of each layer, and nothing else."""
    layers = chain().profile.layers
    first = devices(servers(cut=LAYERS, bits=4), cache=tmp_path)
    first.predict(X, DEADLINE_S)
    scales_and_biases = sum(4 * layer.channels + 4 * (layer.bias[1] - layer.bias[0]) for layer in layers)
    assert first.bytes_pulled == plane_bytes(layers, 4) + scales_and_biases
    first.close()
    second = devices(servers(cut=LAYERS, bits=6), cache=tmp_path)
    answer = second.predict(X, DEADLINE_S)
    assert second.bytes_pulled == plane_bytes(layers, 2)
    assert_same(answer.scores, reduced_scores(X, cut=LAYERS, bits=6))
    second.close()
    third = devices(servers(cut=3, bits=5), cache=tmp_path)
    assert_same(third.predict(X, DEADLINE_S).scores, reduced_scores(X, cut=3, bits=5))
    assert third.bytes_pulled == 0, "fewer bits are a part of what is there"


def test_of_a_new_version_only_the_layers_that_changed_are_pulled(servers, devices):
    server = servers(cut=LAYERS)
    device = devices(server)
    device.predict(X, DEADLINE_S)
    before, layer = device.bytes_pulled, chain().profile.layers[1]
    vector = vector_of(1)
    vector[slice(*layer.weight)] *= 1.5
    vector[slice(*layer.bias)] += 1.0
    server.publish("m", 2, vector, catalogue(2, LAYERS))
    assert wait_for(lambda: device.models()[0].version == 2)
    # half as large again: all scales differ, and no plane does
    changed = -(-layer.num_weights // 8) + 4 * layer.channels + 4 * layer.channels
    assert device.bytes_pulled - before == changed
    assert device.predict(X, DEADLINE_S).receipt.version == 2


@pytest.mark.parametrize(("changed", "cut"), [((), LAYERS), ((1,), 0), ((2,), 0)])
def test_what_a_device_holds_already_moves_the_cut(changed, cut, servers, devices):
    """Over a slow link a new version is worth running here only where its weights are here."""
    slow = DeviceProfile(downlink=5e3)
    server = servers(cut=LAYERS)
    device = devices(server, device_profile=slow)
    assert device.predict(X, DEADLINE_S).receipt.cut == LAYERS
    vector = vector_of(1)
    for index in changed:
        vector[slice(*chain().profile.layers[index].weight)] *= 1.5
    plans = catalogue(2, LAYERS)
    level = {LOSS: {0: ((), 32), LAYERS: plans.levels[LOSS][LAYERS]}}
    here, there = (offer_bytes(chain().profile, (6,) * cut) for cut in (LAYERS, 0))  # what it has to hear in either case
    times = tuple((0.02 + (here - there) / slow.downlink) / LAYERS * k for k in range(LAYERS + 1))
    plans = replace(plans, levels=level, device_s={"fp32": times}, server_s={"fp32": tuple(2 * s for s in times[::-1])})
    server.publish("m", 2, vector, plans)
    assert wait_for(lambda: device.models()[0].version == 2)
    assert device.predict(X, DEADLINE_S).receipt.cut == cut
    assert devices(server, device_profile=slow).predict(X, DEADLINE_S).receipt.cut == 0, "a new device holds nothing"


def test_damaged_pieces_are_pulled_again(servers, devices, tmp_path):
    server = servers(cut=LAYERS)
    device = devices(server, cache=tmp_path)
    device.predict(X, DEADLINE_S)
    device.close()
    damaged, shortened = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_size)[-2:]
    content = bytearray(damaged.read_bytes())
    content[3] ^= 1
    damaged.write_bytes(content)
    shortened.write_bytes(shortened.read_bytes()[:-1])
    lost = len(content) + shortened.stat().st_size + 1
    again = devices(server, cache=tmp_path)
    assert_same(again.predict(X, DEADLINE_S).scores, reduced_scores(X, cut=LAYERS))
    assert again.bytes_pulled == lost


@pytest.mark.parametrize("folder", [True, False])
def test_the_cache_keeps_within_its_bound_and_forgets_the_longest_unused(folder, tmp_path):
    cache_ = ContentCache(tmp_path if folder else None, max_bytes=100)
    contents = [bytes([k]) * 40 for k in range(3)]
    kept = [Piece(digest_of(Piece("", (0, 10), "float32"), content), (0, 10), "float32") for content in contents]
    for piece, content in zip(kept[:2], contents, strict=False):
        cache_.put(piece.digest, content)
    assert cache_.get(kept[0]) == contents[0]
    cache_.put(kept[2].digest, contents[2])
    assert [cache_.get(piece) for piece in kept] == [contents[0], None, contents[2]] and cache_.num_bytes == 80
    cache_.put("f" * 32, bytes(101))
    cache_.put("../" + "f" * 29, bytes(5))
    assert cache_.num_bytes == 80
    if folder:
        assert len(list(tmp_path.iterdir())) == 2
        assert ContentCache(tmp_path, max_bytes=100).get(kept[2]) == contents[2]
        assert ContentCache(tmp_path, max_bytes=40).num_bytes == 40


def test_a_cache_that_cannot_be_written_to_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache = .*name a folder"):
        ContentCache(tmp_path / "file")


def offer_of(served) -> bytes:
    ask = Ask(DeviceProfile(), LOSS)
    served.certify(plan := served.plan(ask))
    return served.offer(plan, ask)


def tamper(server: InferenceServer) -> None:
    """From now on what is pulled of it differs from what it has offered, by a bit."""
    served = server._served["m"][1]
    offer_of(served)
    honest = served.piece

    def piece(range_, name):
        payload = bytearray(honest(range_, name))
        payload[0] ^= 1
        return memoryview(payload)

    served.piece = piece


def test_a_tampered_piece_is_pulled_from_another(servers, devices):
    liar, honest = servers(cut=LAYERS), servers(cut=LAYERS)
    tamper(liar)
    device = devices(liar, honest)
    assert_same(device.predict(X, DEADLINE_S).scores, reduced_scores(X, cut=LAYERS))
    assert {(fault.source, fault.kind) for fault in device.faults} == {(liar.address, "rejected")}
    assert all("is not what was offered: its digest is" in fault.detail for fault in device.faults)


def test_where_all_pieces_are_tampered_with_the_error_says_so(servers, devices):
    liar = servers(cut=LAYERS)
    tamper(liar)
    with pytest.raises(RunError, match=r"planes:0-1:\d+ of range .* is not what was offered: its digest is|float32 of range"):
        devices(liar).predict(X, DEADLINE_S)


# --- versions ---------------------------------------------------------------------------------------------------------


def test_twenty_versions_change_under_four_threads_and_none_is_mixed(servers, devices):
    """Each sample is answered by the reduced or the full model of one version, and the receipt says which."""
    versions = range(1, 22)
    inputs = X[:3]
    reduced = {version: reduced_scores(inputs, version) for version in versions}
    full = {version: full_scores(inputs, version) for version in versions}
    threshold = {version: float(np.sort(margins(reduced[version]))[1]) for version in versions}
    certificates = {version: certified(threshold[version]) for version in versions}
    server = servers(version=0)
    server.publish("m", 1, vector_of(1), catalogue(1), certificates[1])
    device = devices(server)
    is_over = threading.Event()
    answers = []

    def ask() -> None:
        while not is_over.is_set():
            answers.append(device.predict(inputs, DEADLINE_S))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for version in versions[1:]:
            seen = len(answers)
            assert wait_for(lambda seen=seen: len(answers) >= seen + 8 or any(future.done() for future in asking))
            server.publish("m", version, vector_of(version), catalogue(version), certificates[version])
        assert wait_for(lambda: answers[-1].receipt.version == 21 or any(future.done() for future in asking))
        is_over.set()
        for future in asking:
            future.result(DEADLINE_S)
    assert len(answers) >= 160 and len({answer.receipt.version for answer in answers}) > 5
    for answer in answers:
        version = answer.receipt.version
        for row, tier in enumerate(answer.receipt.tiers):
            assert_same(answer.scores[row], (full if tier == "full" else reduced)[version][row])
        assert "full" in answer.receipt.tiers and answer.receipt.threshold == pytest.approx(threshold[version])
    assert list(device._versions) == [21] and len(server._served["m"]) == 4
    assert all(coming.job is None for coming in device._coming.values()), "only a plan is waited for"


def test_a_version_can_be_asked_for_by_number_while_it_is_there(servers, devices):
    server = servers()
    device = devices(server)
    device.predict(X, DEADLINE_S)
    assert device.infer("m", X, Budget(timeout_s=DEADLINE_S), version=1).receipt.version == 1
    with pytest.raises(ConfigError, match="version 7 is not here; ask for 1"):
        device.infer("m", X, Budget(timeout_s=DEADLINE_S), version=7)
    with pytest.raises(ConfigError, match="no version 7 of 'm' here; there is 1"):
        server.infer("m", X, Budget(), version=7)


def test_a_version_that_does_not_fit_or_is_not_newer_is_refused(servers):
    server = servers(version=3)
    for version in (3, 2, 0):
        with pytest.raises(ConfigError, match="not newer than 3"):
            server.publish("m", version, vector_of(1), catalogue(version))
    with pytest.raises(ConfigError, match=r"float32\(5,\); its chain has float32"):
        server.publish("m", 4, np.zeros(5, np.float32), catalogue(4))
    with pytest.raises(ConfigError, match="catalogue is of version 5, not of version 4"):
        server.publish("m", 4, vector_of(1), catalogue(5))
    with pytest.raises(ConfigError, match="NaN or infinite weights"):
        server.publish("m", 4, vector_of(1) * np.float32("nan"), catalogue(4))
    with pytest.raises(ConfigError, match="no model 'n' here; there is m"):
        server.publish("n", 4, vector_of(1), catalogue(4))
    with pytest.raises(ConfigError, match="is a list; its chain has float32"):
        server.publish("m", 4, list(vector_of(1)), catalogue(4))
    for version in (2**70, "4", 4.0):
        with pytest.raises(ConfigError, match=f"version = {version!r} of 'm'; give a whole number"):
            server.publish("m", version, vector_of(1), catalogue(4))
    for samples, message in (
        (X * np.float32("nan"), "inputs hold NaN"),
        (X[0], "inputs of shape"),
        (X.tolist(), "inputs are list"),
    ):
        with pytest.raises(ConfigError, match=f"the samples of version 4 of 'm': {message}"):
            server.publish("m", 4, vector_of(1), catalogue(4), samples=samples)
    assert server.models()[0].version == 3


# --- audits -----------------------------------------------------------------------------------------------------------


def test_inputs_that_have_drifted_raise_an_alarm_in_time_and_then_the_full_model_answers_all(servers, devices):
    rng = np.random.default_rng(3)
    clean, late = (rng.standard_normal((2000, *SHAPE)).astype(np.float32) for _ in range(2))
    drifted = late - 2
    basis = Basis("", 1, LAYERS, (2,) * LAYERS, 0, ("fp32",), "x")
    reduced = reduced_scores(clean, cut=LAYERS, bits=2)
    certificate = certify(margins(reduced), differing(reduced.argmax(1), full_scores(clean).argmax(1)), basis)
    reduced, full = reduced_scores(drifted, cut=LAYERS, bits=2), full_scores(drifted)
    risk = float((accepted(margins(reduced), certificate.threshold) & differing(reduced.argmax(1), full.argmax(1))).mean())
    assert risk > 5 * certificate.alpha
    server = servers(cut=LAYERS, bits=2, certificate=lambda plan: certificate)
    device = devices(server, audit_share=1.0)

    def ask(inputs) -> Receipt:
        asked = inputs.copy()
        receipt = device.predict(asked, DEADLINE_S).receipt
        asked[:] = np.nan  # what was set aside to be audited is a copy
        assert wait_for(lambda: not device._machine._audits._watched[1].drawn and len(device._jobs) == 0)
        return receipt

    for start in range(0, 200, 10):
        receipt = ask(clean[start : start + 10])
        assert (receipt.alpha, receipt.delta, receipt.alarm) == (0.02, 0.05, False) and "reduced" in receipt.tiers
    audit = device._machine._audits._watched[1].audit
    assert audit.num_audited == 200
    for start in range(0, 2000, 10):
        if device.faults:
            break
        ask(drifted[start : start + 10])
    audit = device._machine._audits._watched[1].audit
    assert audit.alarmed_at is not None and audit.alarmed_at <= 200 + delay_bound(risk, 200)
    (fault,) = device.faults
    assert (fault.source, fault.kind) == ("m", "drift") and f"of {audit.alarmed_at} audits" in fault.detail
    answer = device.predict(drifted[:10], DEADLINE_S)
    assert answer.receipt.tiers == ("full",) * 10
    assert (answer.receipt.alpha, answer.receipt.delta, answer.receipt.alarm) == (None, None, True)
    assert_same(answer.scores, full[:10])
    server.publish("m", 2, vector_of(2), catalogue(2, LAYERS, 2), certified(0.0))
    assert wait_for(lambda: device.models()[0].version == 2)
    assert not device.predict(X, DEADLINE_S).receipt.alarm


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("audit_share", (1.5, math.nan)),
        ("emulated_speed", (0, 2.0, math.nan)),
        ("max_accuracy_loss", (math.nan, -0.1, 2.0, "x")),
        ("patience_s", (0, -1, math.nan, math.inf, "x")),
        ("wait_s", (-1, math.nan, math.inf)),
    ],
)
def test_what_a_device_cannot_be_made_with_is_refused(key, values, devices):
    for value in values:
        with pytest.raises(ConfigError, match=f"{key} = {value!r}; "):
            devices("tcp://127.0.0.1:9", **{key: value})
    with pytest.raises(ConfigError, match="speed = nan of device 'device' must be above 0"):
        devices("tcp://127.0.0.1:9", device_profile=DeviceProfile(speed=math.nan))


# --- what is asked wrongly --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (X[0], r"shape \[1, 8, 8\], the model takes \[B, 1, 8, 8\]"),
        (X[:, :, :7], r"shape \[6, 1, 7, 8\]"),
        (X[:0], "one sample at least"),
        (X.astype(np.float64), "float64, the model takes float32; convert"),
        (X.tolist(), "list, the model takes float32"),
        (np.where(X > 1, np.nan, X).astype(np.float32), "NaN or infinite"),
        (X * np.float32("inf"), "NaN or infinite"),
        (np.zeros((300_000, *SHAPE), np.float32), "at most 67,108,864 go at once; ask in smaller batches"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_remedy(inputs, message, servers, devices):
    server = servers()
    device = devices(server)
    for ask in (device.predict, lambda x: server.infer("m", x, Budget())):
        with pytest.raises(ConfigError, match=message):
            ask(inputs)


def test_what_cannot_be_asked_is_an_error_that_says_what_can(servers, devices):
    server = servers()
    device = devices(server)
    for service in (server, device):
        with pytest.raises(ConfigError, match="no model 'n' here; there is m"):
            service.infer("n", X, Budget())
    with pytest.raises(ConfigError, match=r"max_accuracy_loss = 0\.001, this device is made for 0\.01"):
        device.infer("m", X, Budget(max_accuracy_loss=0.001))
    with pytest.raises(ConfigError, match=r"servers = \[\]"):
        devices()
    with pytest.raises(ConfigError, match="on_no_server = 'guess'"):
        devices(server, on_no_server="guess")
    with pytest.raises(ConfigError, match="the address of m@0"):
        devices("localhost:5000")
    with pytest.raises(ConfigError, match="without '@'"):
        InferenceServer({"m@1": chain()})
    device.close()
    with pytest.raises(RunError, match="the device is closed"):
        device.predict(X)
    server.close()
    with pytest.raises(RunError, match="the server is closed"):
        server.infer("m", X, Budget())


def test_a_plan_that_cannot_be_is_an_error_that_names_the_nearest(servers, devices):
    server = servers(cut=LAYERS)
    with pytest.raises(PlanError, match=r"max_accuracy_loss = 0\.001; the nearest is 0\.01"):
        devices(server, max_accuracy_loss=0.001).predict(X, DEADLINE_S)
    with pytest.raises(PlanError, match=r"memory_bytes = 10 .* takes "):
        devices(server, device_profile=DeviceProfile(memory_bytes=10)).predict(X, DEADLINE_S)
    with pytest.raises(ConfigError, match="no model 'n' here; there is m"):
        devices(server, model="n").predict(X, DEADLINE_S)
    assert devices(server).predict(X, DEADLINE_S).receipt.version == 1


def test_a_device_that_asks_before_the_first_version_gets_it_as_soon_as_there_is_one(servers, devices):
    early, other = servers(version=0), servers(version=0)
    with pytest.raises(ConfigError, match="no model 'n' here; there is m"):
        devices(early, model="n").predict(X, DEADLINE_S)
    for addresses in ((early,), (other, early)):
        device = devices(*addresses)
        names = " and ".join(sorted(server.address for server in addresses)) + (" has" if len(addresses) == 1 else "")
        with pytest.raises(RunError, match=rf"waited 0\.\d+ s for a first version: {names}.* none ready yet.*allow more time"):
            device.predict(X, 0.5)
        assert device.faults == []
    waiting = device.submit(X, DEADLINE_S)
    early.publish("m", 1, vector_of(1), catalogue(1, LAYERS))
    assert_same(waiting.result(DEADLINE_S).scores, reduced_scores(X, cut=LAYERS))


def test_a_device_with_another_model_is_told_so(servers):
    other = Chain.of(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), SHAPE)
    with (
        EdgeDevice([servers().address], other, model="m", max_accuracy_loss=LOSS) as device,
        pytest.raises(RunError, match=r"the offer does not add up: its model has layout .*build the same model at both ends"),
    ):
        device.predict(X, DEADLINE_S)


# --- what goes wrong under way ----------------------------------------------------------------------------------------


def test_where_nobody_is_there_a_question_ends_in_time(devices):
    device = devices("tcp://127.0.0.1:9", patience_s=0.1)
    with pytest.raises(
        RunError, match=r"no answer in time; .* no answer from tcp://127.0.0.1:9 yet; is .* running there\? .*--server"
    ):
        device.predict(X, 0.05)
    with pytest.raises(RunError, match=r"no answer in time; .* tcp://127.0.0.1:9: no answer to a plan request; is .* there\?"):
        device.predict(X, 0.5)


class Process:
    """A server in a process of its own, which can be stopped and killed."""

    def __init__(self, cut: int, threshold: str, activation_bits: int) -> None:
        code = (
            f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
            "from test_inference_runs import *\n"
            "server = InferenceServer({'m': chain()})\n"
            f"plan = catalogue(1, {cut}, 6, {activation_bits})\n"
            f"server.publish('m', 1, vector_of(1), plan, certified(float({threshold!r})))\n"
            "print(server.address, flush=True)\n"
            "sys.stdin.read()\n"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @cached_property
    def address(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def processes() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(cut=LAYERS, threshold="inf", activation_bits=0) -> Process:
        started.append(Process(cut, threshold, activation_bits))
        return started[-1]

    yield start
    for process in started:
        process.end()


def asked_and_killed(device: EdgeDevice, process: Process):
    """A question that the process has been sent and does not live to answer."""
    device.predict(X, DEADLINE_S)
    process.signal(signal.SIGSTOP)
    future = device.submit(X, DEADLINE_S)
    assert wait_for(lambda: any(coming.job for coming in list(device._coming.values())))
    assert not future.done()
    process.signal(signal.SIGKILL)
    return future


@pytest.mark.processes
@pytest.mark.parametrize(("cut", "activation_bits"), [(2, 8), (LAYERS, 0)])
def test_a_question_whose_server_is_killed_is_answered_by_another(cut, activation_bits, processes, servers, devices):
    process = processes(cut, "inf", activation_bits)
    other = servers(cut=cut, activation_bits=activation_bits, certificate=certified(float("inf")))
    device = devices(process, other)
    answer = asked_and_killed(device, process).result(DEADLINE_S)
    assert answer.receipt.tiers == ("full",) * 6
    assert_same(answer.scores, full_scores(X))
    assert (process.address, "gone") in {(fault.source, fault.kind) for fault in device.faults}


@pytest.mark.processes
def test_where_there_is_no_other_the_device_answers_for_itself_and_says_so(processes, devices):
    process = processes()
    device = devices(process)
    answer = asked_and_killed(device, process).result(DEADLINE_S)
    assert answer.receipt.tiers == ("unverified",) * 6
    assert_same(answer.scores, reduced_scores(X, cut=LAYERS))
    again = device.predict(X, DEADLINE_S)
    assert again.receipt.tiers == ("unverified",) * 6 and again.receipt.seconds["total"] < DEADLINE_S / 2


@pytest.mark.processes
def test_or_fails_where_that_is_not_wanted_or_half_of_the_model_is_missing(processes, devices):
    whole, half = processes(), processes(2, "0", 8)
    for process, policy in ((whole, "fail"), (half, "unverified")):
        device = devices(process, on_no_server=policy)
        device.predict(X, DEADLINE_S)
        process.signal(signal.SIGKILL)
        with pytest.raises(RunError) as error:
            device.predict(X, 1.0)
        said = str(error.value)
        assert said.startswith(
            f"no answer in time; {process.address}: the connection broke; is `gossipfl serve` running there?"
        )
        assert "--server" in said and ("--on-no-server unverified" in said) == (process is whole), "half a model has no answer"


def test_a_server_that_closes_finishes_what_it_has_taken_and_others_go_on(servers, devices):
    first, second = (servers(cut=2) for _ in range(2))
    device = devices(first, second)
    device.predict(X, DEADLINE_S)
    futures = [device.submit(X, DEADLINE_S) for _ in range(20)]
    first.close()
    futures += [device.submit(X, DEADLINE_S) for _ in range(20)]
    for future in futures:
        assert_same(future.result(DEADLINE_S).scores, reduced_scores(X))
    assert device._machine._holders.choose(1e12) == "m@1"


def test_a_busy_server_is_asked_again(servers, devices):
    from gossipfl.inference.planning.answering import ServerConfig

    device = devices(servers(cut=2, config=ServerConfig(max_queued=1)))
    futures = [device.submit(X, DEADLINE_S) for _ in range(12)]
    for future in futures:
        assert_same(future.result(DEADLINE_S).scores, reduced_scores(X))


# --- who lies ---------------------------------------------------------------------------------------------------------


class Liar(threading.Thread):
    """A server that answers each question as it is told to."""

    def __init__(self, attacker, answer) -> None:
        super().__init__(daemon=True)
        self.router, self.answer = attacker, answer
        self.address = attacker.address
        self.is_over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.is_over.is_set():
            if not self.router.socket.poll(20):
                continue
            origin, header, payload = self.router.socket.recv_multipart()
            envelope = wire.decode([header, payload])
            for frames in self.answer(envelope):
                self.router.send(origin, *frames)


@pytest.fixture
def liars(attackers) -> Iterator[Callable[..., Liar]]:
    made: list[Liar] = []

    def make(answer) -> Liar:
        made.append(Liar(attackers(), answer))
        return made[-1]

    yield make
    for liar in made:
        liar.is_over.set()
        liar.join()


def says(envelope, message) -> list[tuple[bytes, bytes]]:
    header = wire.encode(INFERENCE_RUN, envelope.recipient, envelope.sender, message)
    return [(header, bytes(getattr(message, "payload", b"")))]


def offering(content: bytes):
    def answer(envelope):
        if not isinstance(envelope.message, PlanRequest):
            return []
        return says(envelope, Offer(envelope.message.request, 0, len(content), payload=content))

    return answer


def honest_offer() -> bytes:
    served = inference_server.ServedVersion("m", 1, chain(), vector_of(1), catalogue(1, LAYERS), lambda plan: None)
    return offer_of(served)


LIES = {
    "garbage": offering(b"garbage"),
    "another model": offering(to_json(replace(manifest_from_json(honest_offer()), model="n"))),
    "another version": offering(to_json(replace(manifest_from_json(honest_offer()), version=9))),
    "a number of 400 digits": offering(honest_offer().replace(b'"accuracy_loss":0.01', b'"accuracy_loss":' + b"1" * 400)),
    "garbled samples": offering(to_json(replace(manifest_from_json(honest_offer()), samples="AAAA"))),
    "no frames": lambda envelope: [(b"\xc1", b"")],
    "too large": lambda envelope: says(envelope, Offer(1, 0, 2**40, payload=b"x")),
    "half": lambda envelope: says(envelope, Offer(envelope.message.request, 5, 10, payload=b"x")),
    "refusing": lambda envelope: says(envelope, Failed(envelope.message.request, "whatever", "no")),
    "silent": lambda envelope: [],
}


@pytest.mark.parametrize("lie", LIES)
def test_who_lies_about_plans_is_passed_over(lie, liars, servers, devices):
    device = devices(liar := liars(LIES[lie]), servers(cut=2), patience_s=2.0)  # of which a busy machine may need some
    assert_same(device.predict(X, DEADLINE_S).scores, reduced_scores(X))
    assert {fault.source for fault in device.faults} == {liar.address}


def test_who_offers_and_then_says_nothing_or_something_else_is_passed_over(liars, servers, devices):
    def refusing(envelope):
        message = envelope.message
        if isinstance(message, Pull):
            return says(envelope, Refuse(message.request, 0, 0))
        return offering(honest_offer())(envelope)

    for liar in (offering(honest_offer()), refusing):
        device = devices(liars(liar), servers(cut=LAYERS), patience_s=0.3)
        assert_same(device.predict(X, DEADLINE_S).scores, reduced_scores(X, cut=LAYERS))


@pytest.mark.parametrize("seed", range(4))
def test_a_server_that_garbles_what_it_sends_spoils_no_answer(seed, servers, devices):
    """Bits of offers and of pieces flip, and results are cut short: each is noticed."""
    garbling, honest = servers(cut=3), servers(cut=3)
    chance, queue = random.Random(seed), garbling._transport.queue

    def garbled(chunk):
        content = bytearray(chunk.payload)
        if chance.random() < 0.5 or not content:
            return chunk
        if isinstance(chunk, Result):
            return Result(chunk.request, chunk.version, chunk.seconds, 0, chunk.total - 4, content[:-4])
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        return replace(chunk, payload=bytes(content))

    garbling._transport.queue = lambda origin, sender, recipient, chunks: queue(
        origin, sender, recipient, [garbled(chunk) for chunk in chunks]
    )
    device = devices(garbling, honest, patience_s=0.5)
    for _ in range(10):
        assert_same(device.predict(X, DEADLINE_S).scores, reduced_scores(X, cut=3))
    assert all(fault.kind in ("rejected", "silent", "behind", "offer") for fault in device.faults)


def say(attacker, message, model="m", payload=None) -> None:
    content = bytes(message.payload) if payload is None else payload
    attacker.send(wire.encode(INFERENCE_RUN, "x", model, message), content)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (PlanRequest(1, payload=b"{"), "input"),
        (PlanRequest(1, payload=to_json(Ask(DeviceProfile())).replace(b'"speed":1.0', b'"speed":' + b"1" * 400)), "input"),
        (PlanRequest(1, payload=to_json(Ask(DeviceProfile(speed=-1.0)))), "plan"),
        (PlanRequest(1, payload=to_json(Ask(DeviceProfile(), -5.0))), "plan"),
        (PlanRequest(1, payload=to_json(Ask(DeviceProfile(), held=1, cached=(6, 99)))), "plan"),
        (PlanRequest(1, payload=to_json(Ask(DeviceProfile(), held=1, cached=(6,) * 9))), "plan"),
        (Activation(1, 1, 0, 32, 1, 0, 100, payload=bytes(100)), "input"),
        (Activation(1, 1, 9, 32, 1, 0, 256, payload=bytes(256)), "input"),
        (Activation(1, 1, 0, 17, 1, 0, 256, payload=bytes(256)), "input"),
        (Activation(1, 9, 0, 32, 1, 0, 256, payload=bytes(256)), "version"),
        (Activation(1, 1, 0, 32, 1, 0, 256, payload=np.full(64, np.nan, np.float32).tobytes()), "input"),
        (Activation(1, 1, 0, 8, 1, 0, 72, payload=b"\xff" * 72), "input"),
        (Activation(1, 1, 0, 32, 2**61, 0, 256, payload=bytes(256)), "input"),
    ],
)
def test_what_a_device_asks_wrongly_is_refused_and_the_server_goes_on(message, kind, servers, attackers, devices):
    server = servers()
    attacker = attackers(server.address)
    say(attacker, message)
    _, envelope = attacker.hear()
    assert isinstance(envelope.message, Failed) and envelope.message.kind == kind, envelope
    assert_same(devices(server).predict(X, DEADLINE_S).scores, reduced_scores(X))


@pytest.mark.parametrize(
    ("range_", "codec"),
    [((0, 10**9), "float32"), ((0, 4), "int8"), ((0, 4), "topk:0.5"), ((0, 5), "planes:0-4:2"), ((0, 4), "planes:9-4")],
)
def test_what_is_not_served_is_refused(range_, codec, servers, attackers):
    attacker = attackers(servers().address)
    say(attacker, Pull(5, 1, 1, (range_,), codec, 1.0), payload=b"")
    assert attacker.hear()[1].message == Refuse(5, 1, 1)


@pytest.mark.parametrize("codec", ["float32", "float16", "planes:0-3:6", "planes:3-4:6", "planes:0-16:36"])
def test_any_range_is_served_in_the_codecs_that_are(codec, servers, attackers):
    attacker = attackers(servers().address)
    say(attacker, Pull(5, 1, 1, ((0, 36), (36, 72)), codec, 1.0), payload=b"")
    received = {}
    while len(received) < 2:
        message = attacker.hear()[1].message
        if hasattr(message, "range"):
            received[message.range] = bytes(message.payload)
    for (start, stop), content in received.items():
        assert content == bytes(inference_server.ServedVersion(
            "m", 1, chain(), vector_of(1), catalogue(), lambda plan: None
        ).piece((start, stop), codec))  # fmt: skip


# --- what is left over ------------------------------------------------------------------------------------------------


def test_closing_leaves_neither_files_nor_threads(servers, devices):
    def once() -> None:
        server = servers()
        device = devices(server)
        device.predict(X, DEADLINE_S)
        device.close()
        device.close()
        server.close()
        server.close()

    once()
    files, threads = open_files(), threading.active_count()
    for _ in range(3):
        once()
    assert wait_for(lambda: open_files() <= files and threading.active_count() <= threads)


@pytest.mark.skipif(sys.platform != "linux", reason="finds OpenMP in /proc")
def test_every_thread_that_computes_takes_as_many_cores_as_torch_was_told_from_the_start(servers, devices):
    """As OpenMP itself has it: asking torch would tell the thread, and some of its kernels do, but not all."""
    with open("/proc/self/maps") as maps:
        (library,) = {line.split()[-1] for line in maps if re.search(r"/torch.*/lib(g|i|)omp[^/]*$", line)}
    omp = ctypes.CDLL(library)
    told = 1 + (os.cpu_count() or 1)
    torch.set_num_threads(told)
    try:
        server, device = servers(version=0), devices("tcp://127.0.0.1:9")
        for pool in (server._compute, server._library, device._compute, device._loader):
            assert pool.submit(omp.omp_get_max_threads).result(DEADLINE_S) == told
        stage = RunnableStage(chain(), 0, LAYERS, vector_of(1), "fp32")
        with ThreadPoolExecutor(1) as any_other:
            assert any_other.submit(lambda: stage((X,)) and omp.omp_get_max_threads()).result(DEADLINE_S) == told
    finally:
        torch.set_num_threads(1)


def test_questions_under_way_hear_of_the_closing(devices):
    device = devices("tcp://127.0.0.1:9")
    future = device.submit(X, 1000.0)
    device.close()
    with pytest.raises(RunError, match="was closed"):
        future.result(DEADLINE_S)


def test_requests_have_numbers_that_cannot_be_guessed(servers, devices):
    device = devices(servers())
    device.predict(X, DEADLINE_S)
    numbers = list(itertools.islice(device._machine._numbers, 100))
    assert len(set(numbers)) == 100 and min(numbers) > 2**40
