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
from gossipfl.overlay.links import check_links
from gossipfl.overlay.topology import Topology
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.scenario.config import Scenario, check_names
from gossipfl.scenario.hosting import about_churn, about_clock, peer_settings
from gossipfl.scenario.memory import available_bytes, needed_bytes, why_too_large
from gossipfl.scenario.planning.rehearsal import Rehearsed, rehearse
from gossipfl.scenario.planning.timing import Timing, timing_of
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
    received_bytes: Spread
    sent_bytes: Spread
    total_bytes: int  # of all peers and rounds
    memory_bytes: int
    available_bytes: int
    refused: str | None  # what the run would be refused with: it lacks memory, or its trace ends early
    topology: GraphFigures
    timing: Timing | None  # None for a run on this machine's own clock with nothing emulated
    notes: tuple[str, ...]  # what the figures are not of


def make_plan(scenario: Scenario) -> Plan:
    """Build what the run would build first (data, model, network), and rehearse it. ConfigError as the run's."""
    outline = _outline(scenario)
    layout, rehearsed, timing = outline.layout, outline.rehearsed, outline.timing
    return Plan(
        scenario=scenario.name,
        clock=scenario.resolved_clock,
        protocol=scenario.gossip.protocol,
        peers=scenario.peers,
        rounds=scenario.rounds,
        parameters=layout.size,
        model_bytes=layout.num_bytes,
        encoded_bytes=outline.encoded_bytes,
        received_bytes=_spread(rehearsed.received),
        sent_bytes=_spread(rehearsed.sent),
        total_bytes=rehearsed.total_bytes,
        memory_bytes=needed_bytes(scenario, layout.size),
        available_bytes=available_bytes(),
        refused=why_too_large(scenario, layout.size) or _why_too_short(scenario, timing),
        topology=measure(outline.topology),
        timing=timing,
        notes=tuple(_notes(scenario, rehearsed)),
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
    rehearsed: Rehearsed
    timing: Timing | None


def _outline(scenario: Scenario, dataset: Dataset | None = None, model: nn.Module | None = None) -> _Outline:
    check_names(scenario)
    topology, links = scenario.build_topology(), scenario.build_links()
    check_links(links, topology)
    dataset = dataset or open_dataset(prepare(scenario))
    settings = peer_settings(scenario)
    model = model or build_model(
        scenario.model, dataset.input_shape, dataset.num_classes, scenario.model_args, scenario.model_seed
    )
    layout = Engine(model, TrainingConfig(**settings["training"]), dataset).layout
    gossip = GossipSettings(**settings["gossip"])
    sent_as = codec(gossip.codec)
    encoded_bytes = sum(sent_as.num_bytes(stop - start) for start, stop in gossip.for_peer(layout, 1).segments)
    rehearsed = rehearse(scenario, topology, layout, [len(shard) for shard in deal(scenario, dataset)])
    timing = timing_of(rehearsed, links) if rehearsed.rounds and _has_time(scenario) else None
    return _Outline(layout, encoded_bytes, topology, rehearsed, timing)


def _why_too_short(scenario: Scenario, timing: Timing | None) -> str | None:
    """What to tell of a run that its trace of rates is too short for; None where it is not, or nobody can know."""
    ends_s, is_known = scenario.build_links().settled_s, _has_training_time(scenario)
    if scenario.network.trace_after or not ends_s or timing is None or not is_known:
        return None
    if scenario.stop.target_accuracy is not None:
        return None
    takes_s = min(timing.total_s, scenario.stop.duration or math.inf)
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


def _notes(scenario: Scenario, rehearsed: Rehearsed) -> Iterator[str]:
    """What the figures are not of."""
    yield from about_clock(scenario)
    if scenario.resolved_clock == "netns":
        yield "clock = 'netns' needs root, Linux and iproute2"
    changes = [
        *([] if scenario.build_churn().is_empty else ["[churn]"]),
        *(["network.trace"] if scenario.network.trace else []),
    ]
    if not rehearsed.rounds:
        yield "nobody comes to the end of a round here; bytes and time are those of none"
    elif not rehearsed.is_whole:
        but = f", whatever {' and '.join(changes)} may change by then" if changes else ""
        number, most = rehearsed.rounds, f"of {scenario.rounds:,} rounds"
        first = f"the first {most} is rehearsed" if number == 1 else f"the first {number:,} {most} are rehearsed"
        yield f"{first}, and the others are taken to be like them{but}"
    if not _has_time(scenario):
        yield "how long it takes on this machine shows only when it runs; --clock virtual plans the emulated network"
        return
    if scenario.resolved_clock != "virtual":
        yield "the time is that of the emulated network and devices; what this machine is too slow for comes on top"
        if not _has_training_time(scenario):
            yield "[compute] says nothing: training takes as long as this machine needs, and is counted with 10 ms a step"
    if _has_training_time(scenario):
        yield from about_churn(scenario, float(np.median(rehearsed.train_s)))
    if scenario.stop.target_accuracy is not None or scenario.stop.duration is not None:
        yield "[stop] may end it before the last round"
