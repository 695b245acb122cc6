"""Peers that serve their models while they train: over real processes, by hand, and what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from sockets import free_address, wait_for
from torch import nn

import gossipfl
from gossipfl.errors import ConfigError
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.tables import planned_scores
from gossipfl.learning.datasets import Dataset, normalise, open_dataset
from gossipfl.learning.flatten import flatten
from gossipfl.learning.models import build_model
from gossipfl.learning.training import FlatModel
from gossipfl.protocol.machine import Fault
from gossipfl.protocol.messages import FULL_BITS, INFERENCE_RUN, Data, Pull
from gossipfl.runtime.edge_device import EdgeDevice
from gossipfl.runtime.model_list import ask_models
from gossipfl.runtime.serving_peers import Serving, ServingPeers, ServingSettings
from gossipfl.runtime.transport import Incoming, ZmqTransport
from gossipfl.scenario import load_scenario
from gossipfl.scenario.hosting import device_address
from gossipfl.scenario.preparation import prepare
from gossipfl.scenario.results import Observer

DEADLINE_S = 60.0
SHAPE, CLASSES = (1, 8, 8), 10
RUN = {
    "name": "digits",
    "peers": 2,
    "rounds": 60,
    "peers_per_process": 1,
    "evaluate_every": 0,
    "clock": "local",
    "data": {"kind": "digits", "calibration_fraction": 0.4},
    "training": {"local_steps": 2},
    "gossip": {"segments": 2, "replicas": 1},
    "compute": {"step_time": "100ms"},  # long enough for several versions, also where other work goes on
}
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSIPFL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


class Watcher(Observer):
    """Hands over what a run tells of serving, as it goes."""

    def __init__(self) -> None:
        self.serving: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.notes: list[str] = []

    def event(self, event: dict[str, Any], alive: int) -> None:
        if event["event"] == "serving":
            self.serving.put(event)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Puller:
    """Pulls whole versions from a server, as they are."""

    def __init__(self, address: str, model: str, size: int) -> None:
        self._size, self._server, self._name = size, f"{model}@pulled", f"puller-{uuid.uuid4().hex}"
        self._transport = ZmqTransport(f"inproc://{uuid.uuid4().hex}", run=INFERENCE_RUN)
        self._transport.connect(self._server, address)

    def pull(self, version: int) -> np.ndarray:
        payload = bytearray()

        def is_whole() -> bool:
            for happening in self._transport.receive(0.1):
                if isinstance(happening, Incoming) and isinstance(happening.message, Data):
                    payload.extend(happening.message.payload)
            return len(payload) == 4 * self._size

        self._transport.send(self._name, self._server, Pull(version, version, version, ((0, self._size),), "float32", 10.0))
        assert wait_for(is_whole, DEADLINE_S)
        return np.frombuffer(payload, np.float32)

    def close(self) -> None:
        self._transport.close()


def test_devices_get_rising_versions_while_peers_train_and_peers_learn_what_they_would_without(tmp_path):
    scenario = load_scenario(RUN | {"inference": {"serve": True, "max_samples": 400}})
    watcher, results = Watcher(), []

    def run() -> None:
        results.append(gossipfl.run(scenario, out=tmp_path / "run", observer=watcher))

    dataset = open_dataset(prepare(scenario))
    x = normalise(np.asarray(dataset.x_test[:8]), dataset)
    chain = Chain.of(build_model("mlp", SHAPE, CLASSES, {}, 0), SHAPE)  # before threads use modules
    training = threading.Thread(target=run)
    training.start()
    first = watcher.serving.get(timeout=DEADLINE_S)
    assert first["model"] == f"digits-{first['peer']}" and first["version"] >= 1
    (listed,) = ask_models(first["address"])
    assert (listed.name, listed.model, listed.input_shape) == (first["model"], "mlp", SHAPE)
    exact = EdgeDevice([first["address"]], chain, max_accuracy_loss=0.0, model=first["model"])
    # not audited: eight samples, asked again and again, are no draw of what was calibrated for
    reduced = EdgeDevice([first["address"]], chain, max_accuracy_loss=0.05, model=first["model"], audit_share=0.0)
    puller = Puller(first["address"], first["model"], chain.layout.size)
    vectors: dict[int, np.ndarray] = {}
    seen: dict[EdgeDevice, list[int]] = {exact: [], reduced: []}
    answers: dict[tuple[int, tuple[str, ...]], np.ndarray] = {}
    while len(set(seen[exact])) < 2 or len(set(seen[reduced])) < 2:
        for device, versions in seen.items():
            answer = device.predict(x, DEADLINE_S)
            version = answer.receipt.version
            versions.append(version)
            if version not in vectors:
                vectors[version] = puller.pull(version)
            if device is exact:
                local = planned_scores(chain, vectors[version], 0, ((), FULL_BITS), x)
                assert set(answer.receipt.tiers) == {"full"}
                np.testing.assert_allclose(answer.scores, local, rtol=1e-4, atol=1e-4)
            else:  # of one version, as long as it is that one
                before = answers.setdefault((version, answer.receipt.tiers), answer.scores)
                np.testing.assert_allclose(answer.scores, before, rtol=1e-4, atol=1e-4)
    assert training.is_alive(), "versions changed only when training had ended"
    assert all(versions == sorted(versions) for versions in seen.values())
    for device in seen:
        assert not device.faults
        device.close()
    puller.close()
    training.join()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event for event in events if event["event"] == "fault"] == []
    told = {event["version"] for event in events if event["event"] == "serving" and event["peer"] == first["peer"]}
    assert set(vectors) <= told
    assert f"serving {first['model']} for devices at {first['address']}" in watcher.notes
    without = gossipfl.run(RUN, clock="virtual", out=tmp_path / "without")
    assert results[0].exit_code == 0 and results[0].summary["models_sha256"] == without.summary["models_sha256"]


def test_a_peer_by_hand_tells_where_it_serves(tmp_path):
    (tmp_path / "roster.toml").write_text(f'[peers]\np0 = "{free_address()}"\n')
    (tmp_path / "alone.toml").write_text("peers = 1\nrounds = 3\n[inference]\nserve = true\nmax_samples = 200\n")
    words = ["peer", "--name", "p0", "--roster", "roster.toml", "--config", "alone.toml", "--keep", "60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gossipfl", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("serving alone-p0 for devices at tcp://127.0.0.1:"))
        (listed,) = ask_models(line.split()[-1])
        assert listed.name == "alone-p0"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((120, *SHAPE)).astype(np.float32), rng.integers(0, CLASSES, 120)
    return Dataset(x[:80], y[:80], x[80:], y[80:], CLASSES)


class Opened:
    """Peers that serve, without the training."""

    def __init__(self, model: nn.Module, buffers: str = "average", **settings: Any) -> None:
        self.told: SimpleQueue[Serving | Fault] = SimpleQueue()
        self.model = model
        given = {"scenario": "s", "bind": "tcp://127.0.0.1:0", "advertise": None, "insecure": False, "every": 1}
        given |= {"alpha": 0.1, "delta": 0.1, "data": "d", "seen": list(range(40)), "unseen": list(range(40))}
        self.serving = ServingPeers(
            ServingSettings(**given | {"is_of_test": True} | settings),
            ["p0", "p1"],
            model,
            buffers,
            dataset(),
            None,
            lambda peer, record: self.told.put(record),
        )

    def __enter__(self) -> Opened:
        self.serving.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.serving.close()

    def next(self) -> Serving | Fault:
        return self.told.get(timeout=DEADLINE_S)


def mlp() -> nn.Module:
    return build_model("mlp", SHAPE, CLASSES, {}, 0)


def test_what_cannot_be_served_is_a_fault_and_later_versions_are_tried_after_more_rounds():
    model = mlp()
    good = flatten(model)
    bad = np.full_like(good, np.nan)
    with Opened(model) as opened:
        opened.serving.take("p0", 1, bad)
        fault = opened.next()
        assert isinstance(fault, Fault) and (fault.round, fault.peer, fault.kind) == (1, "p0", "serving")
        opened.serving.take("p0", 2, good)  # too soon
        opened.serving.take("p0", 3, good)
        told = opened.next()
        assert isinstance(told, Serving) and (told.model, told.version) == ("s-p0", 3)


def test_each_peer_serves_its_own_model_and_rounds_between_versions_are_passed_over():
    model = mlp()
    one, other = flatten(model), 2 * flatten(model)
    x = dataset().x_test[:4]
    chain = Chain.of(model, SHAPE)
    with Opened(model, every=5) as opened:
        opened.serving.take("p0", 1, one)
        opened.serving.take("p1", 1, other)
        addresses = {told.model: told.address for told in (opened.next(), opened.next()) if isinstance(told, Serving)}
        for round_ in range(2, 8):
            opened.serving.take("p0", round_, one)
        later = opened.next()
        assert isinstance(later, Serving) and (later.peer, later.version >= 6) == ("p0", True)
        for name, vector in (("s-p0", one), ("s-p1", other)):
            with EdgeDevice([addresses[name]], chain, max_accuracy_loss=0.0, model=name) as device:
                expected = planned_scores(chain, vector, 0, ((), FULL_BITS), x)
                np.testing.assert_allclose(device.predict(x).scores, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_traced_or_drawn_once_there_is_training(monkeypatch):
    """It would break the training beside it: torch.fx takes the place of every module's call, in all threads.

    Nor is anything drawn from the generator that dropout draws from.
    """
    model = mlp()
    chain = Chain.of(model, SHAPE)
    with Opened(model) as opened:
        state = torch.get_rng_state()
        monkeypatch.setattr(torch.fx.Tracer, "trace", lambda *_: pytest.fail("traced"))
        opened.serving.take("p0", 1, flatten(model))
        told = opened.next()
        assert isinstance(told, Serving), told
        with EdgeDevice([told.address], chain, max_accuracy_loss=0.9, model="s-p0") as device:
            assert device.predict(dataset().x_test[:4]).receipt.version == 1
        assert torch.equal(torch.get_rng_state(), state)


def test_an_address_that_is_taken_is_a_fault():
    with Opened(mlp()) as first:
        first.serving.take("p0", 1, flatten(first.model))
        told = first.next()
        assert isinstance(told, Serving)
        with Opened(mlp(), bind=told.address) as second:
            fault = second.next()
            assert isinstance(fault, Fault) and "in use" in fault.detail
            second.serving.take("p0", 1, flatten(second.model))  # goes nowhere
        with pytest.raises(Empty):
            second.told.get_nowait()


def test_a_model_that_cannot_be_cut_is_refused_before_training():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(64, CLASSES), nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flatten(1)) * self.scale

    with pytest.raises(ConfigError, match=r"inference\.serve = True: the model cannot be cut"):
        Opened(Scaled())


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20"])
def test_new_weights_are_folded_as_a_new_chain_would(name):
    shape = (3, 32, 32) if name == "resnet20" else SHAPE
    chain = Chain.of(build_model(name, shape, CLASSES, {}, 0), shape)
    other = build_model(name, shape, CLASSES, {}, 1).eval()
    rng = torch.Generator().manual_seed(0)
    for _, values in other.named_buffers():
        if values.is_floating_point():
            values.copy_(torch.rand(values.shape, generator=rng) + 0.5)
    assert np.array_equal(chain.vector_of(other), Chain.of(other, shape).vector())


def test_statistics_that_stay_with_a_peer_are_served_with_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))
    model(torch.randn(32, *SHAPE))  # what a peer's own samples come to
    own = FlatModel(model, "local")
    x = dataset().x_test[:4]
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(x)).numpy()
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))
    chain = Chain.of(fresh, SHAPE)
    with Opened(fresh, "local") as opened:
        opened.serving.take("p0", 1, own.read(), own.local_buffers)
        told = opened.next()
        assert isinstance(told, Serving)
        with EdgeDevice([told.address], chain, max_accuracy_loss=0.0, model="s-p0") as device:
            np.testing.assert_allclose(device.predict(x).scores, expected, rtol=1e-4, atol=1e-4)


# --- the scenario -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"inference": {"serv": True}}, "unknown key 'inference.serv'; did you mean 'inference.serve'?"),
        ({"inference": {"serve": "yes"}}, "inference.serve = 'yes' must be true or false"),
        ({"inference": {"every": 0}}, "inference.every = 0 must be at least 1"),
        ({"inference": {"alpha": 1.0}}, "inference.alpha = 1.0 must be below 1"),
        ({"inference": {"delta": 0}}, "inference.delta = 0 must be above 0"),
        ({"inference": {"port": 65536}}, "inference.port = 65536 must be at most 65535"),
        ({"inference": {"max_samples": 0}}, "inference.max_samples = 0 must be at least 1"),
        ({"inference": {"serve": True}, "clock": "virtual"}, "clock = 'virtual': nobody listens under virtual time; set clock"),
        ({"inference": {"serve": True}, "clock": "netns"}, "no device is in these network namespaces"),
        ({"inference": {"serve": True}, "network": {"latency": "1ms"}}, "clock = 'auto', which is 'virtual' here"),
    ],
)
def test_serving_that_cannot_be_is_refused_with_a_remedy(values, says):
    with pytest.raises(ConfigError) as raised:
        load_scenario(values)
    assert says in str(raised.value)


def test_a_problem_is_told_with_its_line(tmp_path: Path):
    path = tmp_path / "s.toml"
    path.write_text('clock = "virtual"\n[inference]\nserve = true\n')
    with pytest.raises(ConfigError, match=r"s\.toml:3: inference\.serve = True with clock = 'virtual'"):
        load_scenario(path)


def test_a_scenario_that_serves_nothing_is_the_one_that_it_was():
    scenario = load_scenario({})
    assert "inference" not in scenario.resolved()
    again = load_scenario({"inference": {"serve": True}})
    assert load_scenario(again.resolved()).inference.serve and again.sha256 != scenario.sha256


def test_processes_listen_at_ports_that_follow_each_other():
    scenario = load_scenario({"inference": {"serve": True, "port": 65534}})
    assert device_address(scenario, 1, "127.0.0.1") == "tcp://127.0.0.1:65535"
    with pytest.raises(ConfigError, match=r"inference\.port = 65534 leaves no port to process 3"):
        device_address(scenario, 2, "127.0.0.1")
    assert device_address(load_scenario({}), 7, "::1") == "tcp://[::1]:0"
