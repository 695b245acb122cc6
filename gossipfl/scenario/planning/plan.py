"""The plan of a run: what its peers exchange, how long that takes, the memory and the graph, and what is left out of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gossipfl.learning.datasets import open_dataset
from gossipfl.learning.models import build_model
from gossipfl.learning.training import Engine, TrainingConfig
from gossipfl.overlay.graph_figures import GraphFigures, measure
from gossipfl.protocol.membership import MIN_ANSWER_S
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.scenario.config import Scenario, check_names
from gossipfl.scenario.hosting import peer_settings
from gossipfl.scenario.memory import available_bytes, needed_bytes, why_too_large
from gossipfl.scenario.planning.exchanges import Exchange, exchange_of
from gossipfl.scenario.planning.timing import Timing, time_rounds
from gossipfl.scenario.preparation import deal, prepare
from gossipfl.segments.codecs import codec


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity of all peers."""

    min: float
    mean: float
    max: float


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
    received_bytes: Spread | None  # None, as all that follows from it, for a protocol of the user's own
    sent_bytes: Spread | None  # expected
    total_bytes: int | None  # of all peers and rounds
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
    dataset = open_dataset(prepare(scenario))
    settings = peer_settings(scenario)
    model = build_model(scenario.model, dataset.input_shape, dataset.num_classes, scenario.model_args, scenario.model_seed)
    training = TrainingConfig(**settings["training"])
    layout = Engine(model, training, dataset).layout
    gossip = GossipSettings(**settings["gossip"])
    sent_as = codec(gossip.codec)
    segment_bytes = np.array([sent_as.num_bytes(stop - start) for start, stop in gossip.for_peer(layout, 1).segments])
    topology = scenario.build_topology()
    exchange = exchange_of(scenario, topology, segment_bytes)
    num_steps = np.array([training.num_steps(len(shard)) for shard in deal(scenario, dataset)])
    timing = time_rounds(scenario, exchange, num_steps) if exchange and _has_time(scenario) else None
    return Plan(
        scenario=scenario.name,
        clock=scenario.resolved_clock,
        protocol=scenario.gossip.protocol,
        peers=scenario.peers,
        rounds=scenario.rounds,
        parameters=layout.size,
        model_bytes=layout.num_bytes,
        encoded_bytes=int(segment_bytes.sum()),
        received_bytes=_spread(exchange.received) if exchange else None,
        sent_bytes=_spread(exchange.sent) if exchange else None,
        total_bytes=round(scenario.rounds * float(exchange.received.sum())) if exchange else None,
        memory_bytes=needed_bytes(scenario, layout.size),
        available_bytes=available_bytes(),
        too_large=why_too_large(scenario, layout.size),
        topology=measure(topology),
        timing=timing,
        warnings=tuple(_warnings(scenario, exchange)) if exchange else (),
        notes=tuple(_notes(scenario, timing, is_known=exchange is not None)),
    )


def _has_time(scenario: Scenario) -> bool:
    """Whether the scenario says how long things take."""
    is_emulated = bool(scenario.network.model_fields_set or scenario.compute.model_fields_set)
    return is_emulated or scenario.resolved_clock == "virtual"


def _spread(values: np.ndarray) -> Spread:
    return Spread(float(values.min()), float(values.mean()), float(values.max()))


# ------------------------------------------------------------------------------------------------------------------- notes


def _warnings(scenario: Scenario, exchange: Exchange) -> Iterator[str]:
    """What makes the figures far too low."""
    loss = scenario.network.loss
    if loss and exchange.max_flows:
        messages = 2 * sum(len(flows.senders) for flows in exchange.flows(1)) if exchange.can_be_followed else 0
        lost = f", here about {loss * messages:,.3g} of {messages:,} messages a round" if messages else ""
        patience = scenario.gossip.patience
        wait = f"the patience, {patience:g} s" if isinstance(patience, (int, float)) else "the patience, 10 s or 4 trainings"
        yield (
            f"network.loss = {loss:g} is left out, and may take longer than all else: a peer finds out that a message was lost "
            f"only after {MIN_ANSWER_S:g} s or more, up to {wait}{lost}"
        )


def _notes(scenario: Scenario, timing: Timing | None, is_known: bool) -> Iterator[str]:
    """What the figures leave out, and all of it where the protocol is not known."""
    if scenario.resolved_clock == "netns":
        yield "clock = 'netns' needs root, Linux and iproute2"
    if not is_known:
        yield f"gossip.protocol = {scenario.gossip.protocol!r} is your own: what it sends, and how long that takes, is left out"
        return
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
        settled_s, total_s = scenario.build_links().settled_s, timing.total_s if timing else None
        if total_s is not None and total_s > settled_s:
            yield (
                f"network.trace ends at {settled_s:g} s, and the run may take {total_s:.4g} s: the last rates hold on; "
                "network.trace_repeat = true begins it again"
            )
    if scenario.stop.target_accuracy is not None or scenario.stop.duration is not None:
        yield "[stop] may end it before the last round"
