"""Training on an accelerator: what the CPU comes to, but for rounding, and the same each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gossipfl

TESTS = Path(__file__).parent
FINITE = {"uplink": "100Mbit", "downlink": "100Mbit", "pair": "10Mbit", "latency": "20ms"}
SMALL = dict(name="small", peers=12, rounds=3, network=FINITE)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("device", "refused"),
    [
        ("foreign", "a tensor of the CPU among those of another device"),
        pytest.param("cuda", "Expected all tensors to be on the same device", marks=needs_cuda),
    ],
)
def test_what_an_accelerator_computes_meets_nothing_of_the_cpu(device, refused):
    """Every engine comes to the CPU's values; "foreign" is a device that takes no tensor of the CPU, as a GPU does not."""
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "foreign_device.py"), device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert refused in found.pop("refusal")
    assert len(found) == 21 and [what for what, is_equal in found.items() if not is_equal] == []


def run_on(device: str, folder: Path, *, clock: str = "virtual", **scenario) -> dict:
    training = {"local_epochs": 1, "batch_size": 16, "device": device, "fast_math": False} | scenario.pop("training", {})
    return gossipfl.run({**SMALL, "training": training} | scenario, clock=clock, out=folder).summary


@needs_cuda
@pytest.mark.parametrize("engine", ["loop", "stacked"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_run_on_a_gpu_comes_to_the_same_models_each_time(model, engine, momentum, tmp_path):
    scenario = dict(model=model, training={"engine": engine, "momentum": momentum})
    first, second = (run_on("cuda", tmp_path / name, **scenario) for name in ("first", "second"))
    assert first["models_sha256"] == second["models_sha256"]
    assert first["engine"]["device"] == "cuda" and first["engine"]["kind"] == engine
    assert first["engine"]["accelerator"] == torch.cuda.get_device_name()


@needs_cuda
def test_a_gpu_learns_what_a_cpu_learns(tmp_path):
    found, expected = (run_on(device, tmp_path / device, rounds=10) for device in ("cuda", "cpu"))
    assert found["virtual_seconds"] == expected["virtual_seconds"] and found["bytes"] == expected["bytes"]
    assert abs(found["accuracy"]["mean"] - expected["accuracy"]["mean"]) < 0.01


@needs_cuda
@pytest.mark.processes
def test_peers_over_sockets_that_share_a_gpu_come_to_the_models_of_virtual_time(tmp_path):
    small = dict(peers=3, training={"engine": "loop"})
    virtual = run_on("cuda", tmp_path / "virtual", **small)
    sockets = run_on("cuda", tmp_path / "sockets", clock="local", network={}, **small)
    assert virtual["models_sha256"] == sockets["models_sha256"]
