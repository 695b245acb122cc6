"""Running a scenario under virtual time: the machines of a real run, an emulated network, one record."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from gossipfl.aggregation import AGGREGATORS
from gossipfl.learning.central import train_centrally
from gossipfl.learning.checkpoint import save_model
from gossipfl.learning.cohort import CohortEngine, choose_cohort
from gossipfl.learning.datasets import Dataset, open_dataset
from gossipfl.learning.models import build_model
from gossipfl.learning.partition import class_table
from gossipfl.learning.training import Engine, Learner, TrainingConfig
from gossipfl.overlay.churn import Change, Churn
from gossipfl.overlay.links import Links, check_links
from gossipfl.overlay.topology import Topology
from gossipfl.protocol.machine import Fault, RoundReport, Traffic
from gossipfl.runtime.events import fault_event, finished_event, round_event
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.scenario.config import MANY_PEERS, Scenario, check_names
from gossipfl.scenario.hosting import about_churn, about_clock, about_planned, about_trace, peer_settings, tell_of_settings
from gossipfl.scenario.interrupts import EXIT_INTERRUPTED, not_interrupted, terminate_is_interrupt
from gossipfl.scenario.memory import check_memory, keep_freed_memory
from gossipfl.scenario.own_objects import own_of
from gossipfl.scenario.preparation import deal, prepare
from gossipfl.scenario.records import Event, RunFolder, RunRecord, known, models_sha256, planned_event, summarize
from gossipfl.scenario.results import Observer, RunResult
from gossipfl.scenario.virtual_peers import VirtualPeers
from gossipfl.segments.codecs import codec
from gossipfl.segments.store import SegmentStore
from gossipfl.simulation.learning import LazyLearning
from gossipfl.simulation.peer import SimulatedPeer, Watcher
from gossipfl.simulation.simulator import Simulator

MAX_MODELS_BYTES = 2**30
"""Of the peers' final models together, to be kept one by one; beyond it only the average is."""
SAVED_AT_ONCE = 16
"""Models: a disk that is asked to keep many files takes little longer than for one."""
SUMMED_AT_ONCE = 2**13
"""Values: their float64s stay in the cache, and are too few for several threads, which would take longer to agree."""


def simulate(
    scenario: Scenario, out: Path | None, force: bool, objects: Mapping[str, Any], observer: Observer, began: float
) -> RunResult:
    """Run `scenario` under virtual time. `objects`: the user's own model, dataset and step; `began` in epoch seconds."""
    check_names(scenario)
    topology, links = scenario.build_topology(), scenario.build_links()
    check_links(links, topology)
    keep_freed_memory()
    dataset = objects["dataset"] or open_dataset(prepare(scenario))
    folder = RunFolder(out, scenario.name, force)
    record = folder.record(scenario, observer.warn)
    try:
        simulation = _Simulation(scenario, record, observer, dataset, objects, began, topology, links)
        simulation.plan_presence()
    except BaseException:
        record.close()
        folder.give_up()
        raise
    folder.keep()
    try:
        return simulation.run()
    finally:
        record.close()


@dataclass
class _Sums:
    """Over the vectors (f32[P]) of several peers: enough for their mean and their consensus distance.

    What is summed are differences from the first vector: rounding would hide how near to each other vectors are that are long.
    """

    total: np.ndarray
    first: np.ndarray | None = None
    squares: float = 0.0
    num_peers: int = 0
    time_s: float = 0.0  # of the last of them
    accuracies: list[float] = field(default_factory=list)

    def add(self, vectors: Sequence[np.ndarray]) -> None:
        """Run by run, for the sums of a run then stay in the cache while all vectors are added to it."""
        if self.first is None:
            self.first = vectors[0].copy()
        buffer = np.empty(SUMMED_AT_ONCE)
        for start in range(0, self.first.size, SUMMED_AT_ONCE):
            run = slice(start, start + SUMMED_AT_ONCE)
            first, total = self.first[run].astype(np.float64), self.total[run]
            difference = buffer[: total.size]
            for vector in vectors:
                difference[:] = vector[run]
                difference -= first
                total += difference
                self.squares += float(difference @ difference)
        self.num_peers += len(vectors)

    @property
    def mean(self) -> np.ndarray:
        assert self.first is not None
        return self.first + self.total / self.num_peers

    @property
    def consensus_distance(self) -> float:
        """mean ||x_i - x_bar||^2 as mean ||x_i||^2 - ||x_bar||^2, which needs no second look at the vectors.

        NaN where a vector has diverged: 0 would say that all agree.
        """
        centre = self.total / self.num_peers
        return max(self.squares / self.num_peers - float(centre @ centre), 0.0)  # in this order NaN stays


class _Simulation(Watcher):
    """Builds the simulator of a scenario and writes down what it tells."""

    def __init__(
        self,
        scenario: Scenario,
        record: RunRecord,
        observer: Observer,
        dataset: Dataset,
        objects: Mapping[str, Any],
        began: float,
        topology: Topology,
        links: Links,
    ) -> None:
        self.scenario, self.record, self.observer, self.dataset, self.began = scenario, record, observer, dataset, began
        settings = peer_settings(scenario)
        training = TrainingConfig(**settings["training"])
        self.gossip = GossipSettings(**settings["gossip"])
        model = objects["model"] or build_model(
            scenario.model, dataset.input_shape, dataset.num_classes, scenario.model_args, scenario.model_seed
        )
        self.engine = Engine(model, training, dataset, objects["step"])
        check_memory(scenario, self.engine.layout.size)
        if training.fast_math:
            self.engine.try_fast_math()
        shards = deal(scenario, dataset)
        self.cohort: CohortEngine = choose_cohort(self.engine, self._engine_kind(), scenario.peers)
        table = class_table(dataset.y_train, shards, dataset.num_classes) if dataset.num_classes <= 20 else None
        observer.data_ready(scenario, table)
        for line in about_clock(scenario):
            observer.note(line)
        tell_of_settings(scenario, self.engine.flat.has_statistics, observer.note, record.warn)
        self._own = own_of(objects)
        names = scenario.peer_names
        self.layout, self.initial = self.engine.layout, self.cohort.initial_vector()
        num_samples = [len(shard) for shard in shards]
        self.virtual = VirtualPeers(scenario, topology, self.gossip, training, self.layout, num_samples)
        for line in about_churn(scenario, float(np.median(self.virtual.usual_train_s))):
            record.warn(line)
        self.learners = {name: Learner(name, shard) for name, shard in zip(names, shards, strict=True)}
        sent_as, aggregate = codec(self.gossip.codec), AGGREGATORS.get(self.gossip.aggregation)
        self.learning = LazyLearning(self.cohort, self.learners, self._store, sent_as, aggregate, self)
        self.simulator = Simulator(
            names,
            self.virtual.machine,
            self.learning,
            sent_as,
            links,
            self.virtual.train_s,
            seed=scenario.protocol_seed,
            watcher=self,
        )
        self._done: list[tuple[SimulatedPeer, Event, np.ndarray]] = []  # not yet evaluated and told
        self._before: dict[str, float] = {}  # accuracy of each peer's newest trained vector
        self._rounds: dict[int, _Sums] = {}  # that somebody may still report
        self._closed: set[int] = set()  # that nobody was to report any more; who comes back may train some of them again
        self._may_be_past = False  # whether somebody has skipped rounds, come or gone since it was seen who may
        self._last_round = self.gossip.rounds
        self._first_distance: float | None = None
        self._is_stopping = False
        self._figures: dict[str, Any] = {"last": None, "models_sha256": None}
        self._average_accuracy: float | None = None
        self._central_accuracy: float | None = None

    def _engine_kind(self) -> str:
        """Few peers are trained as they would be on sockets, to the last bit, unless the scenario says otherwise."""
        kind = self.scenario.training.engine
        return "loop" if kind == "auto" and self.scenario.peers < MANY_PEERS else kind

    # --- what the simulator is made of --------------------------------------------------------------------------------

    def _store(self, name: str) -> SegmentStore:
        return SegmentStore(self.initial, self.virtual.config.segments, codec(self.gossip.codec), self.gossip.seed, name)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        scenario, simulator = self.scenario, self.simulator
        engine = self.cohort.description() | self._own
        self.record.write("scenario.toml", tomli_w.dumps(scenario.resolved() | {"engine": engine}))
        self.observer.started(self.record.folder, self.initial.size)
        startup_s, started = time.time() - self.began, time.monotonic()
        is_interrupted = False
        try:
            with terminate_is_interrupt():
                if scenario.stop.duration is not None:
                    simulator.run(until=scenario.stop.duration)
                    self._stop_soon()
                simulator.run()
                self._tell()
                self._close(self._rounds)
        except KeyboardInterrupt:
            is_interrupted = True
        for line in (*about_trace(scenario, simulator.clock.now), *about_planned(scenario, simulator.clock.now)):
            self.record.warn(line)
        wall_s = time.monotonic() - started
        try:
            if not is_interrupted:
                with terminate_is_interrupt():
                    self._take_figures()
        except KeyboardInterrupt:
            is_interrupted = True
        with not_interrupted():
            result = self._conclude(startup_s, wall_s, engine, is_interrupted)
        self.observer.ended(result)
        return result

    def plan_presence(self) -> None:
        """Have those begin who are there, and the others come and go."""
        churn = self.scenario.build_churn()
        self.virtual.begin(self.simulator, churn, self._recorded(churn))

    def _recorded(self, churn: Churn) -> Iterator[Change]:
        """The changes, each written down when the next is asked for, which is when it has been made."""
        for change in churn.changes(math.inf):
            if churn.is_endless and self.simulator.has_only_newcomers:
                return  # else they would come and go for ever
            yield change
            self._may_be_past = True
            name = self.scenario.peer_names[change.index]
            if not self.simulator.peers[name].is_finished:
                self._add(planned_event(churn.name_of(change), name, change.time_s))

    def _stop_soon(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            newest = max((peer.machine.round for peer in self.simulator.peers.values() if peer.is_there), default=0)
            self._last_round = min(self._last_round, newest)
            self.simulator.stop_after(newest)

    # --- what the simulator tells -------------------------------------------------------------------------------------

    def trained(self, peers: Sequence[SimulatedPeer]) -> None:
        due = [peer for peer in peers if self._is_evaluated(peer.machine.round)]
        accuracies = self.cohort.evaluate([peer.own for peer in due], [self.learners[peer.name] for peer in due]) if due else []
        self._before |= {peer.name: accuracy for peer, accuracy in zip(due, accuracies, strict=True)}

    def will_train(self) -> None:
        self._tell()

    def round_done(self, peer: SimulatedPeer, report: RoundReport, traffic: Traffic) -> None:
        vector = self.learning.vector(peer)
        event = round_event(
            peer.name,
            report,
            time_s=self.simulator.clock.now,
            train_loss=peer.loss,
            train_s=report.train_s,
            traffic=traffic,
            accuracy_before=self._before.pop(peer.name, None) if self._is_evaluated(report.round) else None,
            accuracy_after=None,
        )
        self._done.append((peer, event, vector))

    def fault(self, peer: SimulatedPeer, fault: Fault) -> None:
        self._may_be_past |= fault.kind == "behind"
        self._add(fault_event(peer.name, fault, self.simulator.clock.now))

    def finished(self, peer: SimulatedPeer) -> None:
        self._tell()
        time_s, received_from = self.simulator.clock.now, peer.traffic.received_from
        self._add(finished_event(peer.name, peer.machine.round, time_s, peer.error, received_from=received_from))

    def _is_evaluated(self, round_: int) -> bool:
        every = self.scenario.evaluate_every
        return round_ >= self._last_round or (every > 0 and round_ % every == 0)

    def _tell(self) -> None:
        """Evaluate the rounds that are done together, and write them down."""
        done, self._done = self._done, []
        due = [(peer, event, vector) for peer, event, vector in done if self._is_evaluated(event["round"])]
        if due:
            accuracies = self.cohort.evaluate(
                [vector for _, _, vector in due], [self.learners[peer.name] for peer, _, _ in due]
            )
            for (_, event, _), accuracy in zip(due, accuracies, strict=True):
                event["accuracy_after"] = accuracy
        ended: dict[int, list[tuple[Event, np.ndarray]]] = {}
        for _, event, vector in done:
            self._add(event)
            if event["accuracy_after"] is not None or self._first_distance is None:
                ended.setdefault(event["round"], []).append((event, vector))
        for round_, those in ended.items():
            self._add_to_round(round_, [event for event, _ in those], [vector for _, vector in those])
        self._close(self._past_rounds())

    def _add(self, event: Event) -> None:
        self.record.add(event)
        if event["event"] == "round":
            del event["received_from"]  # it is written; kept, a million of them would take a gigabyte
        self.observer.event(event, self.simulator.num_alive)

    def _add_to_round(self, round_: int, events: list[Event], vectors: list[np.ndarray]) -> None:
        if round_ in self._closed:
            return
        sums = self._rounds.setdefault(round_, _Sums(np.zeros(self.initial.size)))
        sums.add(vectors)
        sums.time_s = events[-1]["time_s"]
        sums.accuracies += [event["accuracy_after"] for event in events if event["accuracy_after"] is not None]

    def _past_rounds(self) -> set[int]:
        """Those that all who are there have reported, or got past, for some skip rounds."""
        past = {round_ for round_, sums in self._rounds.items() if sums.num_peers >= self.simulator.num_alive}
        if past or self._may_be_past:
            self._may_be_past = False
            reached = (peer.machine.round for peer in self.simulator.peers.values() if peer.is_there)
            least = min((round_ for round_ in reached if round_), default=math.inf)  # 0: it joins, and will adopt
            past.update(round_ for round_ in self._rounds if round_ < least)
        return past

    def _close(self, rounds: Iterable[int]) -> None:
        """Nobody will report these any more: how far apart the peers were after each, and how good their average was."""
        for round_ in sorted(rounds):
            sums = self._rounds.pop(round_)
            self._closed.add(round_)
            distance = sums.consensus_distance
            self._first_distance = distance if self._first_distance is None else self._first_distance
            if sums.accuracies:
                self._tell_of_round(round_, sums, distance)

    def _tell_of_round(self, round_: int, sums: _Sums, distance: float) -> None:
        accuracy = self.engine.evaluate(sums.mean.astype(np.float32))
        state = {
            "event": "state",
            "round": round_,
            "time_s": sums.time_s,
            "consensus_distance": known(distance),
            "average_accuracy": accuracy,
        }
        self._add(state)
        target, are_enough = self.scenario.stop.target_accuracy, len(sums.accuracies) >= self.scenario.min_peers
        if target is not None and are_enough and float(np.mean(sums.accuracies)) >= target:
            self._stop_soon()

    # --- after --------------------------------------------------------------------------------------------------------

    def _take_figures(self) -> None:
        """What the models have come to; they are saved."""
        scenario = self.scenario
        peers = [peer for peer in self.simulator.peers.values() if peer.is_finished and peer.error is None]
        if not peers:
            return
        vectors = [self.learning.vector(peer) for peer in peers]
        sums = _Sums(np.zeros(self.initial.size))
        sums.add(vectors)
        average = sums.mean.astype(np.float32)
        self._figures = {"last": sums.consensus_distance, "models_sha256": models_sha256(vectors)}
        self._save("average", average)
        if len(vectors) * average.nbytes > MAX_MODELS_BYTES:
            self.observer.note("the peers' models would take more than a GiB: only their average is saved")
        else:
            with ThreadPoolExecutor(SAVED_AT_ONCE) as pool:
                saved = [pool.submit(self._save, peer.name, vector) for peer, vector in zip(peers, vectors, strict=True)]
                for future in saved:
                    future.result()
        self._average_accuracy = self.engine.evaluate(average)
        if scenario.central:
            self.observer.note("training one model on all the data, for comparison")
            num_rounds = max((event["round"] for event in self.record.events if event["event"] == "round"), default=0)
            self._central_accuracy = train_centrally(self.engine, self.initial, num_rounds, scenario.peers)

    def _conclude(self, startup_s: float, wall_s: float, engine: dict[str, Any], is_interrupted: bool) -> RunResult:
        for peer in self.simulator.peers.values():
            if not peer.is_finished and peer.traffic.received_from:
                self.record.add({"event": "unfinished", "peer": peer.name, "received_from": peer.traffic.received_from})
        summary = summarize(
            self.record.events,
            self.scenario,
            parameters=self.initial.size,
            figures={"first": self._first_distance} | self._figures,
            average_accuracy=self._average_accuracy,
            central_accuracy=self._central_accuracy,
            startup_s=startup_s,
            wall_s=wall_s,
            peak_memory_mib=_peak_mib(),
            engine=engine,
            clock="virtual",
            virtual_s=self.simulator.clock.now,
            messages=self.simulator.num_messages,
            exit_code=EXIT_INTERRUPTED if is_interrupted else None,
        )
        self.record.write("summary.json", json.dumps(summary, indent=1) + "\n")
        return RunResult(summary, self.record.folder)

    def _save(self, name: str, vector: np.ndarray) -> None:
        save_model(self.record.folder / "models" / f"{name}.safetensors", self.layout, vector, peer=name)


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
