"""Running a scenario over sockets: real processes on this machine, one record.

The launcher prepares the data, starts the workers, watches over them and writes the record. It decides nothing about the
protocol: peers find each other through the roster and gossip among themselves; a worker that dies takes its peers with it
and the others go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import tomli_w

from gossipfl.errors import ConfigError
from gossipfl.learning.datasets import open_dataset
from gossipfl.overlay.churn import Change
from gossipfl.overlay.links import check_links
from gossipfl.runtime.addresses import check_loopback
from gossipfl.runtime.events import finished_event
from gossipfl.runtime.namespaces import Namespaces
from gossipfl.scenario.config import Scenario, check_names
from gossipfl.scenario.crew import Crew
from gossipfl.scenario.hosting import (
    about_planned,
    about_trace,
    allow_file_descriptors,
    check_namespaces,
    device_address,
    emulation,
    fidelity,
    groups_of,
    peer_job,
    peer_settings,
    serving,
    tcp_address,
    tell_of_settings,
)
from gossipfl.scenario.interrupts import EXIT_INTERRUPTED, handled
from gossipfl.scenario.memory import check_memory, check_processes
from gossipfl.scenario.own_objects import own_of
from gossipfl.scenario.preparation import deal_to_files
from gossipfl.scenario.presence import Presence, check_churn
from gossipfl.scenario.records import Event, RunFolder, RunRecord, final_models, planned_event, remove_files, summarize
from gossipfl.scenario.results import Observer, RunResult
from gossipfl.scenario.temporary import temporary_folder
from gossipfl.scenario.workers import WorkerHandle

HEARS_S = 0.5
"""How long a command may take to be obeyed on a busy machine."""


@dataclass
class Launcher:
    """One run over real sockets. `run` makes the record in `out` and returns what the run came to."""

    scenario: Scenario
    observer: Observer
    began: float  # epoch seconds
    insecure: bool
    crew: Crew = field(init=False)
    presence: Presence = field(init=False)
    sockets: Path | None = None
    namespaces: Namespaces | None = None
    served_at: set[str] = field(default_factory=set)
    finished: dict[str, str | None] = field(default_factory=dict)
    startup_s: float = 0.0
    started_at: float = 0.0
    is_interrupted: bool = False
    stop_round: float = math.inf

    def __post_init__(self) -> None:
        self.crew = Crew(self.observer.note, lambda: self.is_interrupted)

    def run(self, out: Path | None, force: bool, objects: dict[str, Any]) -> RunResult:
        check_names(self.scenario)
        check_links(self.scenario.build_links(), self.scenario.build_topology())
        in_process = any(value is not None for value in objects.values()) or self.scenario.transport.kind == "inproc"
        groups = groups_of(self.scenario, in_process)
        check_churn(self.scenario.build_churn(), groups, in_process)
        if self._is_in_namespaces:
            check_namespaces(self.scenario, in_process)
        elif self.scenario.transport.kind == "tcp":
            check_loopback(tcp_address(self.scenario.transport.host, 0), self.insecure)
        check_processes(self.scenario)
        allow_file_descriptors(self.scenario.peers)
        folder = RunFolder(out, self.scenario.name, force)
        record = folder.record(self.scenario, self.observer.warn)

        def interrupt(number: int, frame: FrameType | None) -> None:  # the run ends in order
            self.is_interrupted = True

        with contextlib.closing(record), handled(interrupt):
            try:
                with temporary_folder() as self.sockets:
                    try:
                        return self._run(folder, record, groups, in_process, objects)
                    finally:
                        self.crew.stop()  # while the folder is there: nobody is to come and listen in what is left of it
            except (ConfigError, KeyboardInterrupt):
                folder.give_up()
                raise
            finally:
                folder.keep()
                for leftover in ("first", "shards"):
                    remove_files(folder.path / leftover)
                if self.namespaces is not None:
                    self.namespaces.close()

    def _run(
        self, place: RunFolder, record: RunRecord, groups: list[list[str]], in_process: bool, objects: dict[str, Any]
    ) -> RunResult:
        scenario, folder = self.scenario, record.folder
        if in_process:
            self.crew.host_here(groups[0], objects)
        else:  # they import torch while the data is prepared
            self.crew.launch(groups, folder / "log")
        data, shards, table = deal_to_files(scenario, folder, objects["dataset"])
        if self._is_in_namespaces:
            topology = scenario.build_topology()
            neighbours = [topology.neighbours(index) for index in range(scenario.peers)]
            self.namespaces = Namespaces(scenario.peer_names, scenario.build_links(), neighbours)
        served = serving(scenario, open_dataset(data))
        workers = self.crew.workers
        jobs = [self._job(index, worker.peers, folder, data, shards, served) for index, worker in enumerate(workers)]
        for worker, job in zip(workers, jobs, strict=True):
            worker.send(job)
        ready = self.crew.await_ready()
        first = ready[0]
        check_memory(scenario, first["parameters"])
        place.keep()
        self.observer.data_ready(scenario, table)
        tell_of_settings(scenario, first["has_statistics"], self.observer.note, record.warn)
        roster = {peer: event["address"] for worker, event in zip(workers, ready, strict=True) for peer in worker.peers}
        record.write("roster.toml", tomli_w.dumps(_roster(self._run_number(folder), roster)))
        engine = first["engine"] = first["engine"] | own_of(objects)
        record.write("scenario.toml", tomli_w.dumps(scenario.resolved() | {"engine": engine}))
        self.startup_s, self.started_at = time.time() - self.began, time.monotonic()

        def start(worker: WorkerHandle, elapsed_s: float) -> None:
            command = {"do": "start", "roster": roster, "fast_math": engine["fast_math"]}
            worker.send(command | {"elapsed_s": elapsed_s})

        def replace(index: int) -> WorkerHandle:
            worker = self.crew.successor(index, folder / "log")
            worker.send(jobs[index] | {"bind": roster[worker.peers[0]], "late": []})
            return worker

        churn = scenario.build_churn()

        def planned(change: Change) -> None:
            elapsed_s = time.monotonic() - self.started_at
            event = planned_event(churn.name_of(change), scenario.peer_names[change.index], elapsed_s)
            record.add(event)
            self.observer.event(event, self._num_alive())

        self.presence = Presence(churn, workers, start, replace, planned)
        self.presence.begin()
        if self.namespaces is not None:
            self.namespaces.begin(self.started_at)
        self.observer.started(folder, first["parameters"])
        self._follow(record)
        wall_s = time.monotonic() - self.started_at
        for line in (*about_trace(scenario, wall_s), *about_planned(scenario, wall_s), *self.presence.about_late()):
            record.warn(line)
        result = self._conclude(record, first, wall_s)
        self.observer.ended(result)
        return result

    # --- before -------------------------------------------------------------------------------------------------------

    def _job(self, index: int, peers: list[str], folder: Path, data: Path, shards: list[Path], served: Event | None) -> Event:
        scenario, insecure = self.scenario, self.insecure or self._is_in_namespaces  # nobody else is on the network there
        topology, numbers = scenario.build_topology(), map(scenario.peer_names.index, peers)
        jobs = [peer_job(scenario, topology, number, shards[number].resolve()) for number in numbers]
        advertise = f"tcp://{scenario.transport.advertise}:0" if scenario.transport.advertise else None
        if served is not None:
            bind = device_address(scenario, index, scenario.transport.host)
            served = served | {"bind": bind, "advertise": advertise, "insecure": insecure}
        return peer_settings(scenario) | {
            "emulation": emulation(scenario, self._by_kernel),
            "late": [] if peers[0] in scenario.late_peers else scenario.late_peers,  # a late one waits for who is there
            "namespace": self.namespaces.path(peers[0]) if self.namespaces else None,
            "peers": jobs,
            "run": self._run_number(folder),
            "bind": self._bind_address(index),
            "advertise": advertise,
            "data": str(data),
            "out": str(folder.resolve()),
            "insecure": insecure,
            "serving": served,
        }

    def _bind_address(self, index: int) -> str:
        """Where the process number `index` listens: any free port, or a socket file that nobody else has."""
        if self.namespaces is not None:
            return tcp_address(self.namespaces.address(self.scenario.peer_names[index]), 0)
        match self.scenario.transport.kind:
            case "tcp":
                return tcp_address(self.scenario.transport.host, 0)
            case "ipc":
                return f"ipc://{self.sockets}/{index}"
        return f"inproc://gossipfl-{os.getpid()}-{time.monotonic_ns()}"

    @property
    def _is_in_namespaces(self) -> bool:
        return self.scenario.resolved_clock == "netns"

    @property
    def _by_kernel(self) -> tuple[str, ...]:
        return self.namespaces.by_kernel if self.namespaces is not None else ()

    def _run_number(self, folder: Path) -> int:
        text = f"{self.scenario.sha256}/{folder.resolve()}/{self.began}/{os.getpid()}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")

    # --- during -------------------------------------------------------------------------------------------------------

    def _follow(self, record: RunRecord) -> None:
        """Record what the workers tell, until every peer has finished or died, or the run is interrupted."""
        stop = self.scenario.stop
        while not self.is_interrupted and self._present():
            rates_in_s = math.inf if self.namespaces is None else self.namespaces.next_in_s
            worker, event = self.crew.hear(min(rates_in_s, self.presence.next_in_s))
            match event["event"]:
                case _ if worker is None:
                    pass
                case "round" | "fault" | "serving" | "finished":
                    if event["event"] == "finished":
                        self.finished[event["peer"]] = event["error"]
                    if event["event"] == "serving":
                        self._tell_of_serving(event["address"], worker.peers)
                    if event["event"] == "fault" and event["kind"] == "serving":
                        self.observer.note(f"{event['at']} is not served after round {event['round']}: {event['detail']}")
                    record.add(event)
                    self.observer.event(event, self._num_alive())
                case "ready":
                    self.presence.is_ready(worker)
                case "failed":
                    record.add(event | {"peers": worker.peers})
                    self.observer.note(f"the process of {', '.join(worker.peers)} failed: {event['message']}")
                    self._bury(worker, record, f"its process failed: {event['message']}")
                case "ended":
                    self._bury(worker, record, self.crew.why_ended(worker))
            self.presence.follow(self.finished)
            if self.namespaces is not None:
                self.namespaces.follow()
            self.crew.watch_silence()
            if stop.duration is not None and time.monotonic() - self.started_at > stop.duration:
                self._stop_soon(record)
            if stop.target_accuracy is not None and event["event"] == "round" and self._has_reached(record, event["round"]):
                self._stop_soon(record)

    def _tell_of_serving(self, address: str, peers: list[str]) -> None:
        """Once of each address."""
        if address not in self.served_at:
            self.served_at.add(address)
            names = [f"{self.scenario.name}-{peer}" for peer in peers]
            shown = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('-')[2]}"
            self.observer.note(f"serving {shown} for devices at {address}")

    def _present(self) -> list[str]:
        """Peers that have not finished and are there, or have yet to come."""
        return [name for name in self.scenario.peer_names if name not in self.finished and name not in self.presence.away]

    def _num_alive(self) -> int:
        return len(self._present()) + sum(error is None for error in self.finished.values())

    def _bury(self, worker: WorkerHandle, record: RunRecord, reason: str) -> None:
        """A worker has ended, or is about to, before its peers had finished: they are dead."""
        if self.presence.was_killed(worker):
            return
        for peer in worker.peers:
            if peer not in self.finished:
                self.finished[peer] = reason
                event = finished_event(peer, None, time.monotonic() - self.started_at, self.finished[peer])
                record.add(event)
                self.observer.event(event, self._num_alive())

    def _has_reached(self, record: RunRecord, round_: int) -> bool:
        """Whether the mean accuracy of all peers that are there, after this round's merge, is on target."""
        accuracies = {
            event["peer"]: event["accuracy_after"]
            for event in record.events
            if event["event"] == "round" and event["round"] == round_ and event["accuracy_after"] is not None
        }
        present = set(self._present()) - self.presence.late
        target = self.scenario.stop.target_accuracy
        return bool(present) and present <= set(accuracies) and float(np.mean(list(accuracies.values()))) >= (target or 0)

    def _stop_soon(self, record: RunRecord) -> None:
        """End after a round that no peer has passed by the time it hears of it, `HEARS_S` from now.

        Peers are at most two rounds ahead of what they have told. Nobody comes or goes any more.
        """
        if math.isinf(self.stop_round):
            told = max((event["round"] for event in record.events if event["event"] == "round"), default=0)
            per_second = told / max(time.monotonic() - self.started_at, 0.1)
            self.stop_round = _newest_there(record.events) + 2 + math.ceil(HEARS_S * per_second)
            for worker in self.crew.workers:
                worker.send({"do": "stop_after", "round": self.stop_round})
            self.presence.end()

    # --- after --------------------------------------------------------------------------------------------------------

    def _conclude(self, record: RunRecord, ready: Event, wall_s: float) -> RunResult:
        scenario = self.scenario
        well = [name for name in scenario.peer_names if name in self.finished and self.finished[name] is None]
        figures = final_models(record.folder, well)
        average = central = None
        if well and not self.is_interrupted:
            average = self.crew.ask(
                {"do": "evaluate", "path": str(record.folder / "models" / "average.safetensors")}, "evaluated"
            )
            if scenario.central:
                self.observer.note("training one model on all the data, for comparison")
                num_rounds = max((event["round"] for event in record.events if event["event"] == "round"), default=0)
                central = self.crew.ask({"do": "central", "rounds": num_rounds, "peers": scenario.peers}, "central")
        emulated = fidelity(scenario, record.events, record.warn, self._by_kernel)
        summary = summarize(
            record.events,
            scenario,
            parameters=ready["parameters"],
            figures=figures,
            average_accuracy=average,
            central_accuracy=central,
            startup_s=self.startup_s,
            wall_s=wall_s,
            peak_memory_mib=self.crew.peak_mib or None,
            engine=ready["engine"],
            clock=scenario.resolved_clock,
            exit_code=EXIT_INTERRUPTED if self.is_interrupted else None,
        )
        summary |= emulated
        record.write("summary.json", json.dumps(summary, indent=1) + "\n")
        return RunResult(summary, record.folder)


def _newest_there(events: Sequence[Event]) -> int:
    """The newest round told by somebody who has not left since: if all have, those who are back begin with the first."""
    newest: dict[str, int] = {}
    for event in events:
        match event:
            case {"event": "round", "peer": peer, "round": round_}:
                newest[peer] = round_
            case {"event": "planned" | "finished", "peer": peer}:
                newest.pop(peer, None)
    return max(newest.values(), default=0)


def _roster(run_number: int, addresses: Mapping[str, str]) -> dict[str, Any]:
    return {"run": run_number, "peers": {name: {"address": address} for name, address in addresses.items()}}
