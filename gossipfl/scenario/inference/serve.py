"""`gossipfl serve` and `gossipfl device`: a run's model behind a socket, and a device that shares the work with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import torch

from gossipfl.errors import ConfigError, RunError
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.planning.profile import DeviceProfile
from gossipfl.inference.planning.receipts import Answer
from gossipfl.learning.datasets import normalise, open_dataset
from gossipfl.learning.models import MODELS, build_model
from gossipfl.registry import did_you_mean
from gossipfl.runtime.edge_device import EdgeDevice
from gossipfl.runtime.inference_server import InferenceServer
from gossipfl.runtime.model_list import Architecture, ask_models
from gossipfl.scenario.config import Scenario
from gossipfl.scenario.inference.calibrate import Certificates, calibrator_like, load_calibration, served_here, timed_here
from gossipfl.scenario.inference.trained import Trained
from gossipfl.scenario.interrupts import OneInterrupt
from gossipfl.scenario.preparation import prepare

Say = Callable[[str], None]
NUM_SAMPLES = 100
"""That a device asks, unless it is told how many."""
SAY_S = 1.0
"""After it, and again after as long, a device says what it waits for, if that is another thing."""


def open_server(trained: Trained, bind: str, advertise: str | None, insecure: bool, say: Say) -> InferenceServer:
    """A server of a calibrated model; certificates that it has not got yet are made when a plan asks for them, and kept."""
    calibration = load_calibration(trained)
    calibrator = calibrator_like(trained, calibration)
    catalogue = served_here(calibration.catalogue, timed_here(calibration, calibrator, say))

    certificates = Certificates(trained, calibration, calibrator)
    architecture = architecture_of(trained)
    chain = calibrator.chain
    server = InferenceServer(
        {architecture.name: chain}, bind, advertise=advertise, insecure=insecure, architectures=[architecture], told=say
    )
    try:
        published = catalogue.version, calibrator.vector, catalogue
        server.publish(architecture.name, *published, certificates.certify, calibrator.samples, certificates.known)
    except BaseException:
        server.close(0.0)
        raise
    return server


def architecture_of(trained: Trained) -> Architecture:
    scenario, dataset = trained.scenario, trained.dataset
    name = scenario.name if trained.name == "average" else f"{scenario.name}-{trained.name}"
    return Architecture(name, scenario.model, dataset.input_shape, dataset.num_classes, scenario.model_args)


def serve(
    trained: Trained, bind: str, advertise: str | None, http: str | None, insecure: bool, drain_s: float, say: Say
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what has been asked; more signals do not change how that ends."""
    host, port = host_and_port(http) if http is not None else ("", 0)
    with ExitStack() as stack:
        server = open_server(trained, bind, advertise, insecure, say)
        interrupt = stack.enter_context(OneInterrupt())
        stack.callback(server.close, drain_s)
        try:
            say(f"serving {', '.join(model.name for model in server.models())} for devices at {server.address}")
            if http is not None:
                from gossipfl.runtime.http import serve_http

                with interrupt.deferred():
                    web = serve_http(server, host, port, insecure=insecure)
                    stack.callback(web.close, drain_s)
                say(f"HTTP at {web.address}")
            threading.Event().wait()
        except KeyboardInterrupt:
            say("ending")


def host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--http {text} is no host:port; write 127.0.0.1:8080, or 127.0.0.1:0 for any free port")
    return host.strip("[]"), int(port)


# --- the device -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a device answers: samples (f32[n, *input_shape]), and their labels (i64[n]) where they are known."""

    x: np.ndarray
    y: np.ndarray | None


def find_architecture(servers: Sequence[str], model: str | None, timeout_s: float) -> Architecture:
    """What the first server that answers serves under this name, or at all if it is one model."""
    failure: RunError | None = None
    served: dict[str, list[str]] = {}
    for address in servers:
        try:
            listed = ask_models(address, timeout_s)
        except RunError as error:
            failure = error
            continue
        served[address] = names = [architecture.name for architecture in listed]
        if model is None and len(listed) == 1:
            return listed[0]
        if model in names:
            return listed[names.index(model)]
    if not served:
        raise failure or ConfigError("name a server with --server tcp://host:port")
    known = [name for names in served.values() for name in names]
    hint = "name one with --model" if model is None else f"{model!r} is not among them{did_you_mean(model, known)}"
    found = ", ".join(f"{address} serves {', '.join(names) or 'no model'}" for address, names in served.items())
    raise ConfigError(f"{found}; {hint}" + (f"; {failure}" if failure else ""))


def chain_of(architecture: Architecture) -> Chain:
    """The same model as the server's, with weights that do not matter. ConfigError for one whose code is not here."""
    if architecture.model not in MODELS:
        raise ConfigError(
            f"{architecture.name!r} is a {architecture.model!r}, which does not come with gossipfl; code never travels, so "
            "build the model in Python and give it to gossipfl.Device"
        )
    model = build_model(architecture.model, architecture.input_shape, architecture.num_classes, architecture.model_args, seed=0)
    return Chain.of(model, architecture.input_shape)


def read_inputs(path: Path | None, scenario: Scenario | None, count: int | None, input_shape: tuple[int, ...]) -> Inputs:
    """The first `count` samples of a .npy file (None: all), or of a scenario's test data (None: NUM_SAMPLES); else noise."""
    if path is not None:
        try:
            with open(path, "rb") as file:
                x = np.load(file, allow_pickle=False)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        except (ValueError, EOFError, BadZipFile) as error:
            raise ConfigError(f"{path} is no .npy file of numbers; write one with numpy.save") from error
        if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf":
            kind = f"holds {x.dtype}" if isinstance(x, np.ndarray) else "is an archive of arrays"
            raise ConfigError(f"{path} {kind}; write one array of real numbers with numpy.save")
        if x.shape[1:] != input_shape or not x.size:
            expected = f"[n, {', '.join(map(str, input_shape))}]"
            raise ConfigError(f"{path} holds inputs of shape {list(x.shape)}, the model takes {expected}, n at least 1")
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ConfigError(f"{path} holds values that are not finite as 32-bit floats; remove them")
        return Inputs(x[:count], None)
    count = count or NUM_SAMPLES
    if scenario is not None:
        dataset = open_dataset(prepare(scenario))
        return Inputs(normalise(np.asarray(dataset.x_test[:count]), dataset), np.asarray(dataset.y_test[:count]))
    rng = np.random.default_rng(0)
    return Inputs(rng.standard_normal((count, *input_shape), np.float32), None)


def open_device(
    servers: Sequence[str],
    architecture: Architecture,
    profile: DeviceProfile,
    max_accuracy_loss: float,
    on_no_server: Literal["unverified", "fail"],
    cache: Path | None,
    audit_share: float,
) -> EdgeDevice:
    """It computes on one core, as what was calibrated did."""
    torch.set_num_threads(1)
    return EdgeDevice(
        servers,
        chain_of(architecture),
        profile,
        max_accuracy_loss,
        on_no_server,
        model=architecture.name,
        cache=cache,
        audit_share=audit_share,
    )


def answer_all(
    device: EdgeDevice, inputs: Inputs, timeout_s: float, told: Callable[[int, Answer, float], None], say: Say
) -> None:
    """Ask for one sample after another; `told(index, answer, seconds)`. `say` hears what a first version waits for."""
    for index in range(len(inputs.x)):
        began = time.perf_counter()
        ask = device.predict if index else partial(_first_answer, device, say)
        answer = ask(inputs.x[index : index + 1], timeout_s)
        told(index, answer, time.perf_counter() - began)


def _first_answer(device: EdgeDevice, say: Say, inputs: np.ndarray, timeout_s: float) -> Answer:
    """As `EdgeDevice.predict`, but that time does not run out while a server is at a version for this device."""
    said = None
    while True:
        future, is_excused = device.submit(inputs, timeout_s), False
        while not wait([future], SAY_S).done:
            is_excused |= device.is_awaited
            waits_for = device.waits_for
            if waits_for not in (None, said):
                said = waits_for
                say(f"waiting for a first version: {waits_for}")
        if future.exception() is None or not is_excused:
            return future.result()
