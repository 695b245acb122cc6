"""What a run will take, before it is run: bytes, time, memory, and which link or device holds everybody up.

    plan = make_plan(load_scenario("combo"))
    plan.received_bytes.mean, plan.timing.round_s, plan.timing.bottleneck

Bytes are exact where nothing is lost and everybody stays: R copies of each segment per peer and round, as the codec sends
them. Times are followed round by round, with the neighbours that the run itself will draw:

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.learning.datasets import open_dataset
from gossipfl.learning.models import build_model
from gossipfl.learning.training import Engine, TrainingConfig
from gossipfl.overlay.graph_figures import GraphFigures, measure
from gossipfl.overlay.graphs import RedrawnTopology, Topology
from gossipfl.overlay.links import Links
from gossipfl.overlay.selection import SELECTORS, Senders
from gossipfl.protocol.baselines import PROTOCOLS, Scheduled
from gossipfl.protocol.membership import MIN_ANSWER_S
from gossipfl.randomness import generator
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.scenario.config import Scenario, check_names
from gossipfl.scenario.hosting import peer_settings
from gossipfl.scenario.memory import available_bytes, needed_bytes, why_too_large
from gossipfl.scenario.preparation import deal, prepare
from gossipfl.segments.codecs import codec

FOLLOWED_DRAWS = 200_000
"""Of neighbours for a segment, 10 us each: as many rounds are followed as they last, but `MIN_FOLLOWED` at least."""
MIN_FOLLOWED, MAX_FOLLOWED = 3, 100
MAX_FLOWS = 5_000_000
"""Transfers of one round that are followed one by one."""
LAST_OF_SEVERAL = 0.8
"""Of ten messages there and back, with two uniform delays each, the last has about 1.6 times the greatest delay."""
NAMED_PEERS = 1_000
"""Up to so many, neighbours are drawn from in the order of their names, as the run does; of more, the chances are the same."""
ALIKE = 1.05
"""Peers within this factor of the median are not named."""
DRAWN_ALIKE = 1.5
"""The same for what depends on the neighbours drawn, which differ by chance."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity of all peers."""

    min: float
    mean: float
    max: float


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


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take. Bytes are payload per peer and round, unless they are called total."""

    scenario: str
    clock: str
    protocol: str
    peers: int
    rounds: int
    parameters: int
    model_bytes: int  # as float32
    encoded_bytes: int  # as the codec sends it
    received_bytes: Spread
    sent_bytes: Spread  # expected
    total_bytes: int  # of all peers and rounds
    memory_bytes: int
    available_bytes: int
    too_large: str | None  # what the run would be refused with, for want of memory
    topology: GraphFigures
    timing: Timing | None  # None for a run on this machine's own clock with nothing emulated
    warnings: tuple[str, ...]  # what makes the figures far too low
    notes: tuple[str, ...]  # what else they leave out


def make_plan(scenario: Scenario) -> Plan:
    """Build what the run would build first (data, model, network), and work out the rest. ConfigError as the run's."""
    check_names(scenario)
    if scenario.gossip.protocol not in _EXCHANGES:
        raise ConfigError(
            f"gossip.protocol = {scenario.gossip.protocol!r} cannot be planned; those that can are {', '.join(_EXCHANGES)}"
        )
    dataset = open_dataset(prepare(scenario))
    settings = peer_settings(scenario)
    model = build_model(scenario.model, dataset.input_shape, dataset.num_classes, scenario.model_args, scenario.model_seed)
    layout = Engine(model, TrainingConfig(**settings["training"]), dataset).layout
    gossip = GossipSettings(**settings["gossip"])
    sent_as = codec(gossip.codec)
    segment_bytes = np.array([sent_as.num_bytes(stop - start) for start, stop in gossip.for_peer(layout, 1).segments])
    topology = scenario.build_topology()
    exchange = _EXCHANGES[scenario.gossip.protocol](scenario, topology, segment_bytes)
    training = TrainingConfig(**peer_settings(scenario)["training"])
    num_steps = np.array([training.num_steps(len(shard)) for shard in deal(scenario, dataset)])
    timing = _Clockwork(scenario, exchange, num_steps).timing() if _has_time(scenario) else None
    return Plan(
        scenario=scenario.name,
        clock=scenario.resolved_clock,
        protocol=scenario.gossip.protocol,
        peers=scenario.peers,
        rounds=scenario.rounds,
        parameters=layout.size,
        model_bytes=layout.num_bytes,
        encoded_bytes=int(segment_bytes.sum()),
        received_bytes=_spread(exchange.received),
        sent_bytes=_spread(exchange.sent),
        total_bytes=round(scenario.rounds * float(exchange.received.sum())),
        memory_bytes=needed_bytes(scenario, layout.size),
        available_bytes=available_bytes(),
        too_large=why_too_large(scenario, layout.size),
        topology=measure(topology),
        timing=timing,
        warnings=tuple(_warnings(scenario, exchange)),
        notes=tuple(_notes(scenario)),
    )


def _has_time(scenario: Scenario) -> bool:
    """Whether the scenario says how long things take."""
    is_emulated = bool(scenario.network.model_fields_set or scenario.compute.model_fields_set)
    return is_emulated or scenario.resolved_clock == "virtual"


def _spread(values: np.ndarray) -> Spread:
    return Spread(float(values.min()), float(values.mean()), float(values.max()))


# --------------------------------------------------------------------------------------------------- who sends what to whom


@dataclass(frozen=True, slots=True)
class _Flows:
    """`num_bytes` (f64[n]) go from `senders` to `receivers` (i64[n])."""

    senders: np.ndarray
    receivers: np.ndarray
    num_bytes: np.ndarray


class _Gossip:
    """R copies of each segment from neighbours drawn afresh, or one from every neighbour. `received`, `sent`: f64[N]."""

    is_waited_for = True

    def __init__(self, scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> None:
        self.scenario, self.segment_bytes = scenario, segment_bytes
        takes_all = scenario.gossip.selection == "all"
        self._graphs = topology.rounds if isinstance(topology, RedrawnTopology) else [topology]
        self._candidates: tuple[int, list[Sequence[int]]] = (-1, [])  # of the graph of this number
        self.received, self.sent = np.zeros(scenario.peers), np.zeros(scenario.peers)  # means over the rounds
        self.max_flows = 0.0
        for graph in self._graphs:
            degrees = np.array([graph.degree(index) for index in range(scenario.peers)], np.float64)
            copies = degrees if takes_all else np.minimum(degrees, scenario.gossip.replicas)
            received = copies * segment_bytes.sum()
            self.received += received / len(self._graphs)
            self.sent += self._expected_sent(graph, degrees, received) / len(self._graphs)
            self.max_flows = max(self.max_flows, float((degrees if takes_all else copies * len(segment_bytes)).sum()))

    def flows(self, round_: int) -> list[_Flows]:
        """What is sent in a round, in phases; each begins when its senders have done the one before."""
        gossip, num_peers = self.scenario.gossip, self.scenario.peers
        select = SELECTORS.get("all" if gossip.selection == "all" else "uniform")  # others choose by what they have seen
        pairs: list[tuple[int, int, float]] = []
        candidates = self._candidates_of(round_)
        for index in range(num_peers):
            neighbours = candidates[index]
            rng = generator(self.scenario.protocol_seed, "neighbours", f"p{index}", round_)
            for size in self.segment_bytes if gossip.selection != "all" else [self.segment_bytes.sum()]:
                chosen = select(neighbours, gossip.replicas, {}, rng)  # type: ignore[arg-type]  # numbers, in place of names
                pairs += [(int(sender), index, float(size)) for sender in chosen]
        return [_summed(pairs, num_peers)]

    def _candidates_of(self, round_: int) -> list[Sequence[int]]:
        """The neighbours of each peer in this round."""
        number = (round_ - 1) % len(self._graphs)
        if self._candidates[0] != number:
            neighbours = map(self._graphs[number].neighbours, range(self.scenario.peers))
            in_order = self.scenario.peers > NAMED_PEERS
            self._candidates = number, [others if in_order else sorted(others, key=str) for others in neighbours]  # p10, p2
        return self._candidates[1]

    def _expected_sent(self, graph: Topology, degrees: np.ndarray, received: np.ndarray) -> np.ndarray:
        share = np.divide(received, degrees, out=np.zeros_like(degrees), where=degrees > 0)
        if degrees.min() == degrees.max():
            return received
        return np.array([share[list(graph.neighbours(index))].sum() for index in range(len(degrees))])


def _summed(transfers: Sequence[tuple[int, int, float]], num_peers: int) -> _Flows:
    """Transfers (sender, receiver, bytes), those of a pair together."""
    senders, receivers, num_bytes = (
        (np.array(column) for column in zip(*transfers, strict=True)) if transfers else [np.empty(0)] * 3
    )
    pairs, places = np.unique(senders.astype(np.int64) * num_peers + receivers.astype(np.int64), return_inverse=True)
    return _Flows(pairs // num_peers, pairs % num_peers, np.bincount(places, num_bytes, pairs.size))


class _FedAvg(_Gossip):
    """The first peer takes in the models of all the others and hands out their average."""

    def __init__(self, scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> None:
        self.num_clients = scenario.peers - 1
        self.model_bytes = float(segment_bytes.sum())
        self.received = np.full(scenario.peers, self.model_bytes)
        self.received[0] *= self.num_clients
        self.sent = self.received
        self.max_flows = 2.0 * self.num_clients

    def flows(self, round_: int) -> list[_Flows]:
        clients, server = np.arange(1, self.num_clients + 1), np.zeros(self.num_clients, np.int64)
        models = np.full(self.num_clients, self.model_bytes)
        return [_Flows(clients, server, models), _Flows(server, clients, models)]


class _Local(_Gossip):
    """Nobody sends anything."""

    def __init__(self, scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> None:
        self.received = self.sent = np.zeros(scenario.peers)
        self.max_flows = 0.0

    def flows(self, round_: int) -> list[_Flows]:
        return []


class _Scheduled(_Gossip):
    """Who sends to whom is drawn for everybody at once, as the run draws it. `received`, `sent`: what is expected."""

    def __init__(self, scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> None:
        self.scenario, self.segment_bytes = scenario, segment_bytes
        machine = PROTOCOLS.get(scenario.gossip.protocol)
        assert isinstance(machine, type) and issubclass(machine, Scheduled)
        self._schedule = machine._schedule
        copies = np.mean([len(senders) for senders in self._drawn(1).values()])  # of all peers it is the same in each round
        self.received = self.sent = np.full(scenario.peers, copies * segment_bytes.sum())
        self.max_flows = float(scenario.peers * copies * len(segment_bytes))

    def flows(self, round_: int) -> list[_Flows]:
        rng = generator(self.scenario.protocol_seed, "schedule", round=round_)
        names = sorted(self.scenario.peer_names)
        pairs = [
            (int(sender[1:]), int(receiver[1:]), float(size))
            for size in self.segment_bytes
            for receiver, senders in self._schedule(names, self.scenario.gossip.replicas, rng).items()
            for sender in senders
        ]
        return [_summed(pairs, self.scenario.peers)]

    def _drawn(self, round_: int) -> Senders:
        """For the first segment."""
        rng = generator(self.scenario.protocol_seed, "schedule", round=round_)
        return self._schedule(sorted(self.scenario.peer_names), self.scenario.gossip.replicas, rng)


class _Fragments(_Gossip):
    """What comes while a peer trains is mixed, and nobody waits: at most this much, from the second round on."""

    is_waited_for = False

    def __init__(self, scenario: Scenario, topology: Topology, segment_bytes: np.ndarray) -> None:
        super().__init__(scenario, topology, segment_bytes)
        share = (scenario.rounds - 1) / scenario.rounds
        self.received, self.sent = self.received * share, self.sent * share

    def flows(self, round_: int) -> list[_Flows]:
        return []


_EXCHANGES: dict[str, type[_Gossip]] = {
    "gossip": _Gossip,
    "fedavg": _FedAvg,
    "local": _Local,
    "epidemic": _Scheduled,
    "epidemic_oracle": _Scheduled,
    "pairs": _Scheduled,
    "fragments": _Fragments,
}


# -------------------------------------------------------------------------------------------------------------------- time


class _Clockwork:
    """Follows the rounds of a run over its links and devices, as the module's text says. `num_steps`: i64[N]."""

    def __init__(self, scenario: Scenario, exchange: _Gossip, num_steps: np.ndarray) -> None:
        self.scenario, self.exchange, self.num_steps = scenario, exchange, num_steps
        self.links, self.devices = scenario.build_links(), scenario.build_devices()
        self.num_rounds = 0 if exchange.max_flows > MAX_FLOWS else _num_followed(scenario)
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

    def _transfer_s(self, flows: _Flows, pair_s: np.ndarray) -> np.ndarray:
        up_s = _shared_bytes(flows.senders, flows.num_bytes) / self.links.uplink[flows.senders]
        down_s = _shared_bytes(flows.receivers, flows.num_bytes) / self.links.downlink[flows.receivers]
        return np.maximum(np.maximum(up_s, down_s), pair_s)

    def _latencies(self, flows: _Flows) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the pulls, and of what comes back, the last of several: it has most of the jitter."""
        if self.links.is_ideal:
            return np.zeros(flows.senders.size), np.zeros(flows.senders.size)
        pairs = list(zip(flows.senders.tolist(), flows.receivers.tolist(), strict=True))
        there = np.array([self.links.latency(receiver, sender) for sender, receiver in pairs])
        back = np.array([self.links.latency(sender, receiver) for sender, receiver in pairs])
        return there + LAST_OF_SEVERAL * self.links.jitter_s, back + LAST_OF_SEVERAL * self.links.jitter_s

    def _note_slowest(self, flows: _Flows, pair_s: np.ndarray, latency_s: np.ndarray) -> None:
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


def _rates(links: Links, flows: _Flows) -> np.ndarray | float:
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


# ------------------------------------------------------------------------------------------------------------------- notes


def _warnings(scenario: Scenario, exchange: _Gossip) -> Iterator[str]:
    """What makes the figures far too low."""
    loss = scenario.network.loss
    if loss and exchange.max_flows:
        messages = 2 * sum(len(flows.senders) for flows in exchange.flows(1)) if exchange.max_flows <= MAX_FLOWS else 0
        lost = f", here about {loss * messages:,.3g} of {messages:,} messages a round" if messages else ""
        patience = scenario.gossip.patience
        wait = f"the patience, {patience:g} s" if isinstance(patience, (int, float)) else "the patience, 10 s or 4 trainings"
        yield (
            f"network.loss = {loss:g} is left out, and may take longer than all else: a peer finds out that a message was lost "
            f"only after {MIN_ANSWER_S:g} s or more, up to {wait}{lost}"
        )


def _notes(scenario: Scenario) -> Iterator[str]:
    """What the figures leave out."""
    if scenario.resolved_clock == "netns":
        yield "clock = 'netns' needs root, Linux and iproute2"
    if not _has_time(scenario):
        yield "how long it takes on this machine shows only when it runs; --clock virtual plans the emulated network"
        return
    if scenario.resolved_clock != "virtual":
        yield "the time is that of the emulated network and devices; what this machine is too slow for comes on top"
        if not scenario.compute.model_fields_set:
            yield "[compute] says nothing: training takes as long as this machine needs, and is counted with 10 ms a step"
    if not scenario.build_churn().is_empty:
        yield "[churn] is left out: the figures are for peers that stay"
    if scenario.gossip.protocol == "fragments":
        yield "the bytes are the most there can be: a neighbour that still sends is asked for no more"
    if scenario.gossip.selection not in ("uniform", "all"):
        yield f"gossip.selection = {scenario.gossip.selection!r} depends on what peers see; the time is for uniform draws"
    if math.isinf(scenario.gossip.max_staleness):
        yield "a peer far behind adopts the newest model and skips rounds; the time is for peers that train all rounds"
    if scenario.network.trace:
        yield "network.trace is left out: the figures are for the rates at the start"
    if scenario.stop.target_accuracy is not None or scenario.stop.duration is not None:
        yield "[stop] may end it before the last round"
