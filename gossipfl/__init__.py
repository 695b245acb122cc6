"""gossipfl: decentralized learning without a server.

import gossipfl

result = gossipfl.run("quickstart")          # a scenario: real processes, real sockets, one record
peer = gossipfl.Peer("p0", model, roster, num_samples=1000, rounds=20)    # a peer around your own model
machine = gossipfl.Gossip("p0", degrees, config)                          # the bare protocol, your own transport
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gossipfl._version import __version__

if TYPE_CHECKING:
    from gossipfl.errors import ConfigError, GossipflError, RunError
    from gossipfl.learning.datasets import Dataset
    from gossipfl.protocol.gossip import Gossip, GossipConfig
    from gossipfl.runtime.peer import Peer
    from gossipfl.scenario.config import Scenario, load_scenario
    from gossipfl.scenario.results import RunResult
    from gossipfl.scenario.runner import run

_HOMES = {
    "ConfigError": "gossipfl.errors",
    "Dataset": "gossipfl.learning.datasets",
    "Gossip": "gossipfl.protocol.gossip",
    "GossipConfig": "gossipfl.protocol.gossip",
    "GossipflError": "gossipfl.errors",
    "Peer": "gossipfl.runtime.peer",
    "RunError": "gossipfl.errors",
    "RunResult": "gossipfl.scenario.results",
    "Scenario": "gossipfl.scenario.config",
    "load_scenario": "gossipfl.scenario.config",
    "run": "gossipfl.scenario.runner",
}

__all__ = [
    "ConfigError",
    "Dataset",
    "Gossip",
    "GossipConfig",
    "GossipflError",
    "Peer",
    "RunError",
    "RunResult",
    "Scenario",
    "__version__",
    "load_scenario",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes most of a second, and a launcher needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gossipfl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
