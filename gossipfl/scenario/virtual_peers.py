"""The peers of a run under virtual time: their machines, how long each trains, and who is there when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from gossipfl.learning.training import TrainingConfig
from gossipfl.overlay.churn import Change, Churn
from gossipfl.overlay.graphs import degrees_of
from gossipfl.overlay.topology import Topology
from gossipfl.protocol.baselines import PROTOCOLS
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.scenario.config import Scenario
from gossipfl.segments.layout import Layout
from gossipfl.simulation.simulator import Simulator


class VirtualPeers:
    """Of a scenario; `num_samples` are those that each peer trains on."""

    def __init__(
        self,
        scenario: Scenario,
        topology: Topology,
        gossip: GossipSettings,
        training: TrainingConfig,
        layout: Layout,
        num_samples: Sequence[int],
    ) -> None:
        self._devices = scenario.build_devices()
        self._num_steps = [training.num_steps(number) for number in num_samples]
        self.config = gossip.for_peer(layout, 1)
        self._names, self._topology, self._protocol = scenario.peer_names, topology, PROTOCOLS.get(gossip.protocol)
        self._index_of = {name: index for index, name in enumerate(self._names)}
        self._num_samples, self._late = num_samples, frozenset(scenario.late_peers)
        self._requests = count(1)
        self._has_begun = False

    @property
    def usual_train_s(self) -> np.ndarray:
        """How long each peer trains in a round, variation aside (f64[N])."""
        return self._devices.step_s * np.array(self._num_steps)

    def machine(self, name: str) -> Any:
        index = self._index_of[name]
        degrees, schedule = degrees_of(self._topology, index, self._names)
        late = (
            frozenset() if name in self._late or self._has_begun else self._late
        )  # who comes later waits for whoever is there
        config = replace(self.config, num_samples=self._num_samples[index], schedule=schedule, late=late)
        return self._protocol(name, degrees, config, self._requests)

    def train_s(self, index: int, round_: int) -> float:
        return self._devices.train_s(index, round_, self._num_steps[index])

    def begin(self, simulator: Simulator, churn: Churn, changes: Iterator[Change]) -> None:
        """Have those begin who are there, and the others come and go as these changes of the churn say."""
        for index, name in enumerate(self._names):
            if churn.initially_online(index):
                simulator.start(name)
        simulator.follow(changes)
        self._has_begun = True
