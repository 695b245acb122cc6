"""A small trained-looking model behind a server in a process of its own, for the benchmarks of requests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.planning.catalogue import Catalogue
from gossipfl.inference.planning.certificates import Basis, Certificate
from gossipfl.inference.planning.profile import Plan
from gossipfl.learning.models import build_model

LOSS = 0.01
CHANGE = np.float32(1.02)
"""From version to version all weights grow by this: enough to tell scores apart, and labels stay."""


def make_chain(model: str, shape: tuple[int, ...], seed: int) -> Chain:
    torch.set_num_threads(1)
    return Chain.of(build_model(model, shape, 10, seed=seed), shape)


def vector_of(chain: Chain, version: int) -> np.ndarray:
    return chain.vector() * CHANGE ** (version - 1)


def catalogue_of(chain: Chain, version: int, cut: int, bits: int, activation_bits: int) -> Catalogue:
    """The one plan that there is."""
    num_layers = len(chain.profile.layers)
    times = [1e-4 * layer for layer in range(num_layers + 1)]
    levels = {LOSS: {cut: ((bits,) * cut, activation_bits if cut < num_layers else 0)}}
    return Catalogue(chain.profile, version, levels, {"fp32": times}, {"fp32": times[::-1]})


def always_unsure(plan: Plan) -> Certificate:
    """With this, everything falls back to the full model."""
    basis = Basis("", plan.version, plan.cut, plan.weight_bits, plan.activation_bits, plan.device_engines, "none")
    return Certificate(float("inf"), 0.02, 0.05, 1, 0, 0, 1.0, "disagreement", basis)


@contextmanager
def server_process(model: str, shape: tuple[int, ...], seed: int, cut: int, fallback: bool) -> Iterator[str]:
    """The address of a server that serves `model` as "m" until the end of the block."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, model, shape, seed, cut, fallback), daemon=True)
    process.start()
    assert ours.poll(60), "the server did not start"
    try:
        yield ours.recv()
    finally:
        ours.send("stop")
        process.join(10)
        process.kill()


def _serve(connection: Any, model: str, shape: tuple[int, ...], seed: int, cut: int, fallback: bool) -> None:
    from gossipfl.runtime.inference_server import InferenceServer

    chain = make_chain(model, shape, seed)
    with InferenceServer({"m": chain}) as server:
        catalogue = catalogue_of(chain, 1, cut, 6, 8)
        server.publish("m", 1, chain.vector(), catalogue, always_unsure if fallback else lambda plan: None)
        connection.send(server.address)
        connection.recv()
