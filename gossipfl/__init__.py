"""gossipfl: decentralized learning without a server.

import gossipfl

result = gossipfl.run("quickstart")          # a scenario: real processes, real sockets, one record
peer = gossipfl.Peer("p0", model, roster, num_samples=1000, rounds=20)    # a peer around your own model
machine = gossipfl.Gossip("p0", degrees, config)                          # the bare protocol, your own transport
calibrator = gossipfl.calibrate(model, dataset)                           # what it takes to serve a model
plan, cuts = gossipfl.plan(calibrator.measured, gossipfl.DeviceProfile(speed=0.2), max_accuracy_loss=0.01)
answer = gossipfl.Device(["tcp://10.0.0.1:5800"], calibrator.chain).predict(x)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gossipfl._version import __version__

if TYPE_CHECKING:
    from gossipfl.errors import ConfigError, GossipflError, RunError
    from gossipfl.inference.execution.calibration import calibrate
    from gossipfl.inference.planning.cuts import choose_plan as plan
    from gossipfl.inference.planning.profile import DeviceProfile
    from gossipfl.learning.datasets import Dataset
    from gossipfl.protocol.gossip import Gossip, GossipConfig
    from gossipfl.runtime.edge_device import EdgeDevice as Device
    from gossipfl.runtime.inference_server import InferenceServer as Server
    from gossipfl.runtime.peer import Peer
    from gossipfl.scenario.config import Scenario, load_scenario
    from gossipfl.scenario.results import RunFailed, RunInterrupted, RunResult
    from gossipfl.scenario.runner import run

_HOMES = {  # where they are, and what they are called there if it is something else
    "ConfigError": "gossipfl.errors",
    "Dataset": "gossipfl.learning.datasets",
    "Device": "gossipfl.runtime.edge_device:EdgeDevice",
    "DeviceProfile": "gossipfl.inference.planning.profile",
    "Gossip": "gossipfl.protocol.gossip",
    "GossipConfig": "gossipfl.protocol.gossip",
    "GossipflError": "gossipfl.errors",
    "Peer": "gossipfl.runtime.peer",
    "RunError": "gossipfl.errors",
    "RunFailed": "gossipfl.scenario.results",
    "RunInterrupted": "gossipfl.scenario.results",
    "RunResult": "gossipfl.scenario.results",
    "Scenario": "gossipfl.scenario.config",
    "Server": "gossipfl.runtime.inference_server:InferenceServer",
    "calibrate": "gossipfl.inference.execution.calibration",
    "load_scenario": "gossipfl.scenario.config",
    "plan": "gossipfl.inference.planning.cuts:choose_plan",
    "run": "gossipfl.scenario.runner",
}

__all__ = [
    "ConfigError",
    "Dataset",
    "Device",
    "DeviceProfile",
    "Gossip",
    "GossipConfig",
    "GossipflError",
    "Peer",
    "RunError",
    "RunFailed",
    "RunInterrupted",
    "RunResult",
    "Scenario",
    "Server",
    "__version__",
    "calibrate",
    "load_scenario",
    "plan",
    "run",
]


def __dir__() -> list[str]:
    """For completion: the names are not there before they are used."""
    return [*globals(), *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes most of a second, and a launcher needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gossipfl' has no attribute {name!r}")
    module, _, other_name = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), other_name or name)
