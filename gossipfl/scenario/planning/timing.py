"""How long a run's rounds take over its links and devices, followed one by one with the neighbours that it will draw:

    trained(i, r)  = done(i, r-1) + training time of i
    done(i, r)     = max over the peers j drawn: max(trained(i, r) + latency, trained(j, r)) + transfer(j, i) + latency
    transfer(j, i) = max(b / pair rate, shared(j's sends, b) / uplink of j, shared(i's receipts, b) / downlink of i)

where b is what j sends i, and shared(.., b) sums min(b, b') over what goes through the same end: fair shares of it, all
beginning together (processor sharing). What is not in it: headers, loss, churn, capacities that change, and that fast peers
begin their next round on links that slow ones still use: where uplinks are scarce, runs took up to 21 % longer than this.

On real sockets the same holds where the scenario emulates a network or devices; what this machine is too slow for comes on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gossipfl.overlay.links import Links
from gossipfl.scenario.config import Scenario
from gossipfl.scenario.planning.exchanges import Exchange, Flows

FOLLOWED_DRAWS = 200_000
"""Of neighbours for a segment, 10 us each: as many rounds are followed as they last, but `MIN_FOLLOWED` at least."""
MIN_FOLLOWED, MAX_FOLLOWED = 3, 100
LAST_OF_SEVERAL = 0.8
"""Of ten messages there and back, with two uniform delays each, the last has about 1.6 times the greatest delay."""
ALIKE = 1.05
"""Peers within this factor of the median are not named."""
DRAWN_ALIKE = 1.5
"""The same for what depends on the neighbours drawn, which differ by chance."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds per round that one thing alone would take the peer that it takes longest; `peer` None: all alike."""

    seconds: float
    peer: str | None


@dataclass(frozen=True, slots=True)
class Timing:
    """Virtual seconds. `least_s` is a bound that no order of events gets below, `round_s` what is to be expected."""

    least_s: float
    round_s: float | None  # None where a round has too many transfers to be followed
    total_s: float | None
    bottleneck: str
    costs: dict[str, Cost]  # of "compute", "uplink", "downlink", "pair", "latency"


def time_rounds(scenario: Scenario, exchange: Exchange, num_steps: np.ndarray) -> Timing:
    """What the rounds of a run take, in which each peer trains for `num_steps` (i64[N])."""
    return _Clockwork(scenario, exchange, num_steps).timing()


class _Clockwork:
    """Follows the rounds of a run, as the module's text says."""

    def __init__(self, scenario: Scenario, exchange: Exchange, num_steps: np.ndarray) -> None:
        self.scenario, self.exchange, self.num_steps = scenario, exchange, num_steps
        self.links, self.devices = scenario.build_links(), scenario.build_devices()
        self.num_rounds = _num_followed(scenario) if exchange.can_be_followed else 0
        self._slowest_pairs = np.zeros((2, scenario.peers))  # seconds over pairs, and of latency: sums over rounds

    def timing(self) -> Timing:
        end_s = self._follow()
        round_s = end_s / self.num_rounds if self.num_rounds else None
        costs = self._costs()
        cause = max(costs, key=lambda name: costs[name].seconds) if self.exchange.is_waited_for else "compute"
        peer = costs[cause].peer
        return Timing(
            least_s=min(self._least_s(), round_s or math.inf),
            round_s=round_s,
            total_s=None if round_s is None else round_s * self.scenario.rounds,
            bottleneck=f"{cause} of {peer}" if peer else cause,
            costs=costs,
        )

    def _follow(self) -> float:
        """Until when everybody has done the followed rounds."""
        staleness = self.scenario.gossip.max_staleness
        done, trained = np.zeros(self.scenario.peers), []
        for round_ in range(1, self.num_rounds + 1):
            trained.append(done + self._train_s(round_))
            done = trained[-1].copy()
            served = trained[0] if math.isinf(staleness) else trained[max(0, round_ - 1 - int(staleness))]
            for flows in self.exchange.flows(round_):
                there, back = self._latencies(flows)
                pair_s = flows.num_bytes / _rates(self.links, flows)
                pulled = trained[-1][flows.receivers] + there
                arrived = np.maximum(pulled, served[flows.senders]) + self._transfer_s(flows, pair_s) + back
                np.maximum.at(done, flows.receivers, arrived)
                self._note_slowest(flows, pair_s, there + back)
                served = done  # of the phase that follows
        return float(done.max(initial=0.0))

    def _train_s(self, round_: int) -> np.ndarray:
        if not self.devices.variation:
            return self.devices.step_s * self.num_steps
        return np.array([self.devices.train_s(index, round_, int(steps)) for index, steps in enumerate(self.num_steps)])

    def _transfer_s(self, flows: Flows, pair_s: np.ndarray) -> np.ndarray:
        up_s = _shared_bytes(flows.senders, flows.num_bytes) / self.links.uplink[flows.senders]
        down_s = _shared_bytes(flows.receivers, flows.num_bytes) / self.links.downlink[flows.receivers]
        return np.maximum(np.maximum(up_s, down_s), pair_s)

    def _latencies(self, flows: Flows) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the pulls, and of what comes back, the last of several: it has most of the jitter."""
        if self.links.is_ideal:
            return np.zeros(flows.senders.size), np.zeros(flows.senders.size)
        pairs = list(zip(flows.senders.tolist(), flows.receivers.tolist(), strict=True))
        there = np.array([self.links.latency(receiver, sender) for sender, receiver in pairs])
        back = np.array([self.links.latency(sender, receiver) for sender, receiver in pairs])
        return there + LAST_OF_SEVERAL * self.links.jitter_s, back + LAST_OF_SEVERAL * self.links.jitter_s

    def _note_slowest(self, flows: Flows, pair_s: np.ndarray, latency_s: np.ndarray) -> None:
        for sums, seconds in zip(self._slowest_pairs, (pair_s, latency_s), strict=True):
            slowest = np.zeros(sums.size)
            np.maximum.at(slowest, flows.receivers, seconds)
            sums += slowest

    def _costs(self) -> dict[str, Cost]:
        pair_s, latency_s = self._slowest_pairs / max(1, self.num_rounds)
        return {
            "compute": _cost(self._median_train_s),
            "uplink": _cost(self.exchange.sent / self.links.uplink),
            "downlink": _cost(self.exchange.received / self.links.downlink),
            "pair": _cost(pair_s, DRAWN_ALIKE),
            "latency": _cost(latency_s, DRAWN_ALIKE),
        }

    @property
    def _median_train_s(self) -> np.ndarray:
        return self.devices.step_s * self.num_steps

    def _least_s(self) -> float:
        """A peer trains, then asks and receives, and may send all the while."""
        if not self.exchange.is_waited_for:
            return float(self._median_train_s.max())
        latency_s = self._slowest_pairs[1] / max(1, self.num_rounds) - 2 * LAST_OF_SEVERAL * self.links.jitter_s
        own_s = self._median_train_s + np.maximum(self.exchange.received / self.links.downlink, latency_s)
        return float(max(own_s.max(), (self.exchange.sent / self.links.uplink).max()))


def _num_followed(scenario: Scenario) -> int:
    draws = scenario.peers * scenario.gossip.segments
    return min(scenario.rounds, MAX_FOLLOWED, max(MIN_FOLLOWED, FOLLOWED_DRAWS // draws))


def _rates(links: Links, flows: Flows) -> np.ndarray | float:
    """Of the pairs, bytes per second."""
    if links.pair.constant is not None:
        return links.pair.constant
    return np.array([links.pair(*pair) for pair in zip(flows.senders.tolist(), flows.receivers.tolist(), strict=True)])


def _shared_bytes(ends: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
    """What an end has carried of all its flows together when one of them is done, each having had an equal share (f64[n])."""
    order = np.lexsort((num_bytes, ends))
    sorted_ends, sorted_bytes = ends[order], num_bytes[order]
    _, firsts, counts = np.unique(sorted_ends, return_index=True, return_counts=True)
    first, count = np.repeat(firsts, counts), np.repeat(counts, counts)
    before = np.concatenate([[0.0], np.cumsum(sorted_bytes)])
    larger = first + count - 1 - np.arange(order.size)
    shared = np.empty(order.size)
    shared[order] = before[1:] - before[first] + larger * sorted_bytes
    return shared


def _cost(seconds: np.ndarray, alike: float = ALIKE) -> Cost:
    """The greatest, with whose it is where it stands out, or else the mean."""
    worst = int(seconds.argmax())
    if seconds[worst] > alike * float(np.median(seconds)):
        return Cost(float(seconds[worst]), f"p{worst}")
    return Cost(float(seconds.mean()), None)
