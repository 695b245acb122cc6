"""The plan of a run: what its peers exchange, how long that takes, the memory and the graph, and what is left out of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from gossipfl.errors import ConfigError
from gossipfl.learning.datasets import Dataset, open_dataset
from gossipfl.learning.models import build_model
from gossipfl.learning.training import Engine, TrainingConfig
from gossipfl.overlay.graph_figures import GraphFigures, measure
from gossipfl.overlay.topology import Topology
from gossipfl.protocol.membership import MIN_ANSWER_S
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.scenario.config import Scenario, check_names
from gossipfl.scenario.hosting import about_churn, peer_settings
from gossipfl.scenario.memory import available_bytes, needed_bytes, why_too_large
from gossipfl.scenario.planning.exchanges import Exchange, exchange_of
from gossipfl.scenario.planning.timing import Timing, time_rounds
from gossipfl.scenario.preparation import deal, prepare
from gossipfl.segments.codecs import codec
from gossipfl.segments.layout import Layout


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
    refused: str | None  # what the run would be refused with: it lacks memory, or its trace ends early
    topology: GraphFigures
    timing: Timing | None  # None for a run on this machine's own clock with nothing emulated
    warnings: tuple[str, ...]  # what makes the figures far too low
    notes: tuple[str, ...]  # what else they leave out


def make_plan(scenario: Scenario) -> Plan:
    """Build what the run would build first (data, model, network), and work out the rest. ConfigError as the run's."""
    outline = _outline(scenario)
    layout, exchange, timing = outline.layout, outline.exchange, outline.timing
    return Plan(
        scenario=scenario.name,
        clock=scenario.resolved_clock,
        protocol=scenario.gossip.protocol,
        peers=scenario.peers,
        rounds=scenario.rounds,
        parameters=layout.size,
        model_bytes=layout.num_bytes,
        encoded_bytes=outline.encoded_bytes,
        received_bytes=_spread(exchange.received) if exchange else None,
        sent_bytes=_spread(exchange.sent) if exchange else None,
        total_bytes=round(scenario.rounds * float(exchange.received.sum())) if exchange else None,
        memory_bytes=needed_bytes(scenario, layout.size),
        available_bytes=available_bytes(),
        refused=why_too_large(scenario, layout.size) or _why_too_short(scenario, timing),
        topology=measure(outline.topology),
        timing=timing,
        warnings=tuple(_warnings(scenario, exchange)) if exchange else (),
        notes=tuple(_notes(scenario, outline.train_s, is_known=exchange is not None)),
    )


def check_trace(scenario: Scenario, dataset: Dataset | None = None, model: nn.Module | None = None) -> None:
    """ConfigError where the trace of rates ends before the run is expected to, and nothing is said of what comes after.

    `dataset` and `model`: the user's own.
    """
    if reason := _why_too_short(scenario, _outline(scenario, dataset, model).timing):
        raise ConfigError(reason)


@dataclass(frozen=True, slots=True)
class _Outline:
    """What a run would build first, and what follows from it."""

    layout: Layout
    encoded_bytes: int
    topology: Topology
    train_s: float  # of the median peer
    exchange: Exchange | None  # None for a protocol of the user's own
    timing: Timing | None


def _outline(scenario: Scenario, dataset: Dataset | None = None, model: nn.Module | None = None) -> _Outline:
    check_names(scenario)
    dataset = dataset or open_dataset(prepare(scenario))
    settings = peer_settings(scenario)
    model = model or build_model(
        scenario.model, dataset.input_shape, dataset.num_classes, scenario.model_args, scenario.model_seed
    )
    training = TrainingConfig(**settings["training"])
    layout = Engine(model, training, dataset).layout
    gossip = GossipSettings(**settings["gossip"])
    sent_as = codec(gossip.codec)
    segment_bytes = np.array([sent_as.num_bytes(stop - start) for start, stop in gossip.for_peer(layout, 1).segments])
    topology = scenario.build_topology()
    exchange = exchange_of(scenario, topology, segment_bytes)
    num_steps = np.array([training.num_steps(len(shard)) for shard in deal(scenario, dataset)])
    timing = time_rounds(scenario, exchange, num_steps) if exchange and _has_time(scenario) else None
    train_s = float(np.median(scenario.build_devices().step_s * num_steps))
    return _Outline(layout, int(segment_bytes.sum()), topology, train_s, exchange, timing)


def _why_too_short(scenario: Scenario, timing: Timing | None) -> str | None:
    """What to tell of a run that its trace of rates is too short for; None where it is not, or nobody can know."""
    ends_s, is_known = scenario.build_links().settled_s, _has_training_time(scenario)
    if scenario.network.trace_after or not ends_s or timing is None or not is_known:
        return None
    expected_s = timing.least_s * scenario.rounds if timing.total_s is None else timing.total_s
    takes_s = min(expected_s, scenario.stop.duration or math.inf)
    if takes_s <= ends_s:
        return None
    return (
        f"network.trace ends at {ends_s:g} s, and the run is expected to take {takes_s:.4g} s; give rows until then, or say "
        "what comes after them: network.trace_after = 'hold' keeps the last rates, 'repeat' begins again"
    )


def _has_time(scenario: Scenario) -> bool:
    """Whether the scenario says how long things take."""
    is_emulated = bool(scenario.network.model_fields_set or scenario.compute.model_fields_set)
    return is_emulated or scenario.resolved_clock == "virtual"


def _has_training_time(scenario: Scenario) -> bool:
    """Whether training takes as long as the scenario says, rather than as this machine needs."""
    return scenario.resolved_clock == "virtual" or bool(scenario.compute.model_fields_set)


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


def _notes(scenario: Scenario, train_s: float, is_known: bool) -> Iterator[str]:
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
        if not _has_training_time(scenario):
            yield "[compute] says nothing: training takes as long as this machine needs, and is counted with 10 ms a step"
    if not scenario.build_churn().is_empty:
        yield "[churn] is left out: the figures are for peers that stay"
        if _has_training_time(scenario):
            yield from about_churn(scenario, train_s)
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
