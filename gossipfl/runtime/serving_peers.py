"""Peers that serve their models while they train: the newest one becomes a version, is calibrated, and takes over.

    serving = ServingPeers(settings, ["p0", "p1"], model, dataset, architecture, told)
    serving.start()
    serving.take("p0", round_, vector, learner.local_buffers)    # after each round, by the thread that trains
    serving.close()

One thread of low priority calibrates, one peer's model after another; the rounds that end meanwhile are passed over. The first
version of a peer makes its model ready, and once all are, the thread rests for most of the time. Nothing that goes wrong here
reaches training: it is told as a fault, and the peer's next version is tried after twice as many rounds as before.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from gossipfl.errors import ConfigError, GossipflError
from gossipfl.inference.execution.calibration import Calibrator
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.engines import Seconds, available_engines, stage_seconds
from gossipfl.learning.datasets import Dataset, normalise
from gossipfl.learning.training import FlatModel
from gossipfl.protocol.machine import Fault
from gossipfl.protocol.messages import PeerId
from gossipfl.runtime.inference_server import InferenceServer
from gossipfl.runtime.model_list import Architecture

logger = logging.getLogger(__name__)

NICENESS = 10
SLOW_ENGINES = ("onnxruntime",)
"""Not tried: compiling a stage takes them seconds, in which Python does nothing else."""
SHARE = 0.1
"""Of the time may be spent on newer versions: while it computes, training halts for what holds Python's lock."""
DRAIN_S = 0.5
"""What devices have asked is finished at the end, within this."""


@dataclass(frozen=True)
class ServingSettings:
    """Plain values, so that it travels as JSON; `seen` and `unseen` are indices of samples, the latter maybe test ones."""

    scenario: str  # models are called <scenario>-<peer>
    bind: str
    advertise: str | None
    insecure: bool
    every: int
    alpha: float
    delta: float
    data: str
    seen: list[int]
    unseen: list[int]
    is_of_test: bool


@dataclass(frozen=True)
class Serving:
    """A version that devices get from now on."""

    peer: PeerId
    model: str
    version: int
    address: str
    calibration_s: float


class _Newest(NamedTuple):
    """What a peer's model has come to; not to be written to."""

    round: int
    vector: np.ndarray
    local_buffers: Sequence[torch.Tensor]


class _Closed(Exception):
    """There is no point in going on."""


class ServingPeers:
    """`told` hears of versions and faults, on the thread that calibrates. ConfigError for a model that cannot be cut."""

    def __init__(
        self,
        settings: ServingSettings,
        peers: Sequence[PeerId],
        model: nn.Module,
        buffers: str,
        dataset: Dataset,
        architecture: Architecture | None,
        told: Callable[[PeerId, Serving | Fault], None],
    ) -> None:
        """A copy of `model` is made; `architecture` is what devices build, None where its code is the caller's own."""
        self._settings, self._told = settings, told
        self._names = {peer: f"{settings.scenario}-{peer}" for peer in peers}
        self._architecture = architecture
        try:
            self._chain = Chain.of(model, dataset.input_shape)  # now: see there what may not run beside it
        except ConfigError as error:
            raise ConfigError(f"inference.serve = True: {error}") from error
        self._flat = FlatModel(copy.deepcopy(model).eval(), buffers)
        self._initial_buffers = [values.clone() for values in self._flat.local_buffers]
        self._seen = normalise(np.asarray(dataset.x_train[settings.seen]), dataset)
        x, y = (dataset.x_test, dataset.y_test) if settings.is_of_test else (dataset.x_train, dataset.y_train)
        self._unseen = normalise(np.asarray(x[settings.unseen]), dataset), np.asarray(y[settings.unseen])
        self._seconds: Seconds | None = None
        self._newest: dict[PeerId, _Newest] = {}
        self._due = dict.fromkeys(peers, 1)  # the round from which on there may be a version
        self._tried = dict.fromkeys(peers, 0)
        self._num_failures = dict.fromkeys(peers, 0)  # since the last version
        self._changed = threading.Condition()
        self._is_closed = False
        self._server: InferenceServer | None = None
        self._thread = threading.Thread(target=self._run, name="gossipfl-calibration", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self, peer: PeerId, round_: int, vector: np.ndarray, local_buffers: Sequence[torch.Tensor] = ()) -> None:
        """The peer's model after this round (f32[P], not to be written to), and those of its buffers that do not travel."""
        with self._changed:
            if round_ >= self._due[peer]:
                self._newest[peer] = _Newest(round_, vector, local_buffers)
                self._changed.notify()

    def close(self) -> None:
        """Finish what devices have asked, and end. Closing twice is allowed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
            server = self._server
        if server is not None:
            server.close(DRAIN_S)
        if self._thread.is_alive():
            self._thread.join(DRAIN_S)  # it may be timing engines, and is not waited for

    # --- the thread that calibrates -----------------------------------------------------------------------------------

    def _run(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        torch.get_num_threads()  # until it asks for it, a new thread ignores torch.set_num_threads
        try:
            server = self._open()
        except Exception as error:
            self._failed(next(iter(self._names)), 0, error)
            return
        with contextlib.suppress(_Closed):
            while True:
                are_all_ready = all(self._tried.values())
                peer, newest = self._next()
                began = time.perf_counter()
                try:
                    self._publish(server, peer, newest)
                except _Closed:
                    raise
                except Exception as error:  # whatever a model's own code raises
                    self._failed(peer, newest.round, error)
                if are_all_ready:
                    self._rest((time.perf_counter() - began) * (1 / SHARE - 1))

    def _open(self) -> InferenceServer:
        settings, own = self._settings, self._architecture
        server = InferenceServer(
            dict.fromkeys(self._names.values(), self._chain),
            settings.bind,
            advertise=settings.advertise,
            insecure=settings.insecure,
            architectures=[replace(own, name=name) for name in self._names.values()] if own else (),
        )
        with self._changed:
            self._server = server
            is_closed = self._is_closed
        if is_closed:
            server.close(0.0)
        return server

    def _next(self) -> tuple[PeerId, _Newest]:
        """Of the peers that have a new model, the one whose version is the oldest."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._is_closed)
            self._go_on()
            peer = min(self._newest, key=self._tried.__getitem__)
            newest = self._newest.pop(peer)
            self._tried[peer], self._due[peer] = newest.round, newest.round + self._settings.every
            return peer, newest

    def _rest(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, seconds)

    def _go_on(self, what: str = "", share: float = 0.0) -> None:
        if self._is_closed:
            raise _Closed

    def _publish(self, server: InferenceServer, peer: PeerId, newest: _Newest) -> None:
        began, settings, version = time.perf_counter(), self._settings, newest.round
        calibrator = Calibrator(
            self._chain,
            self._seen,
            self._unseen,
            data=settings.data,
            version=version,
            vector=self._served_vector(newest),
            engines=[name for name in available_engines() if name not in SLOW_ENGINES],
            alpha=settings.alpha,
            delta=settings.delta,
        )
        if self._seconds is None:
            self._seconds = stage_seconds(self._chain, calibrator.vector, calibrator.samples, calibrator.engines)
        catalogue, _ = calibrator.catalogue(self._go_on, self._seconds)
        name = self._names[peer]
        server.publish(name, version, calibrator.vector, catalogue, calibrator.certify, calibrator.samples)
        self._num_failures[peer] = 0
        seconds = time.perf_counter() - began
        self._told(peer, Serving(peer, name, version, server.address, round(seconds, 4)))

    def _served_vector(self, newest: _Newest) -> np.ndarray:
        self._flat.write(newest.vector)
        for own, values in zip(self._flat.local_buffers, newest.local_buffers or self._initial_buffers, strict=True):
            own.copy_(values)
        return self._chain.vector_of(self._flat.model)

    def _failed(self, peer: PeerId, round_: int, error: Exception) -> None:
        if self._is_closed:
            return  # a server that is closed takes no version
        expected = isinstance(error, GossipflError)
        logger.error("%s cannot be served after round %d", peer, round_, exc_info=None if expected else error)
        self._num_failures[peer] += 1
        with self._changed:
            self._due[peer] = round_ + self._settings.every * 2 ** self._num_failures[peer]
        detail = str(error) if expected else f"{type(error).__name__}: {error}"
        self._told(peer, Fault(round_, peer, "serving", detail))
