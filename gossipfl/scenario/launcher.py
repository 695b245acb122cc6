"""Running a scenario over sockets: real processes on this machine, one record.

The launcher prepares the data, starts the workers, watches over them and writes the record. It decides nothing about the
protocol: peers find each other through the roster and gossip among themselves; a worker that dies takes its peers with it
and the others go on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

import numpy as np
import tomli_w

from gossipfl import errors
from gossipfl.errors import ConfigError, GossipflError, RunError
from gossipfl.learning.datasets import open_dataset
from gossipfl.overlay.churn import Change
from gossipfl.overlay.graphs import degrees_of
from gossipfl.overlay.links import check_links
from gossipfl.runtime.addresses import check_loopback
from gossipfl.runtime.namespaces import Namespaces
from gossipfl.scenario.config import Scenario, check_names
from gossipfl.scenario.hosting import (
    about_statistics,
    allow_file_descriptors,
    check_namespaces,
    device_address,
    emulation,
    fidelity,
    groups_of,
    peer_settings,
    serving,
    tcp_address,
)
from gossipfl.scenario.memory import check_memory
from gossipfl.scenario.preparation import deal_to_files
from gossipfl.scenario.presence import Presence, check_churn
from gossipfl.scenario.records import Event, RunFolder, RunRecord, final_models, planned_event, remove_files, summarize
from gossipfl.scenario.results import Observer, RunResult
from gossipfl.scenario.temporary import temporary_folder
from gossipfl.scenario.workers import Inbox, ProcessWorker, ThreadWorker, WorkerHandle, launch

logger = logging.getLogger(__name__)

READY_S = 120.0
SILENCE_S = 60.0
"""A worker says every two seconds that it lives; one silent for this long, which may be busy, is taken for dead and killed."""
STOPPED_S = 10.0
"""The same of one that is not busy but stopped (SIGSTOP)."""
STOP_S = 2.0
"""What Ctrl-C leaves the workers to end in order; within 3 s everything has stopped."""
MEMORY_SAMPLE_S = 0.5
HEARS_S = 0.5
"""How long a command may take to be obeyed on a busy machine."""
EXIT_INTERRUPTED = 130


@dataclass
class Launcher:
    """One run over real sockets. `run` makes the record in `out` and returns what the run came to."""

    scenario: Scenario
    observer: Observer
    began: float  # epoch seconds
    insecure: bool
    inbox: Inbox = field(default_factory=SimpleQueue)
    workers: list[WorkerHandle] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    presence: Presence = field(init=False)
    sockets: Path | None = None
    namespaces: Namespaces | None = None
    ended: set[int] = field(default_factory=set)
    served_at: set[str] = field(default_factory=set)
    finished: dict[str, str | None] = field(default_factory=dict)
    peak_mib: float = 0.0
    sampled_at: float = 0.0
    startup_s: float = 0.0
    started_at: float = 0.0
    is_interrupted: bool = False
    stop_round: float = math.inf

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
        allow_file_descriptors(self.scenario.peers)
        folder = RunFolder(out, self.scenario.name, force)
        record = RunRecord(folder.path)
        record.write("scenario.toml", self.scenario.to_toml())
        handlers = self._catch_signals()
        try:
            with temporary_folder() as self.sockets:
                return self._run(folder, record, groups, in_process, objects)
        except (ConfigError, KeyboardInterrupt):
            self._stop_workers()
            folder.give_up()
            raise
        finally:
            self._stop_workers()
            folder.keep()
            if self.namespaces is not None:
                self.namespaces.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            record.close()

    def _run(
        self, place: RunFolder, record: RunRecord, groups: list[list[str]], in_process: bool, objects: dict[str, Any]
    ) -> RunResult:
        scenario, folder = self.scenario, record.folder
        if in_process:
            self.workers = [ThreadWorker(groups[0], self.inbox, **objects)]
        else:  # they import torch while the data is prepared
            self.workers += self._launch(groups, folder / "log")
        data, shards, table = deal_to_files(scenario, folder, objects["dataset"])
        if self._is_in_namespaces:
            topology = scenario.build_topology()
            neighbours = [topology.neighbours(index) for index in range(scenario.peers)]
            self.namespaces = Namespaces(scenario.peer_names, scenario.build_links(), neighbours)
        served = serving(scenario, open_dataset(data))
        jobs = [self._job(index, worker.peers, folder, data, shards, served) for index, worker in enumerate(self.workers)]
        for worker, job in zip(self.workers, jobs, strict=True):
            worker.send(job)
        ready = self._await_ready()
        first = ready[0]
        check_memory(scenario, first["parameters"])
        place.keep()
        self.observer.data_ready(scenario, table)
        for line in about_statistics(scenario, first["has_statistics"]):
            self.observer.note(line)
        roster = {peer: event["address"] for worker, event in zip(self.workers, ready, strict=True) for peer in worker.peers}
        record.write("roster.toml", tomli_w.dumps(_roster(self._run_number(folder), roster)))
        engine = first["engine"]
        record.write("scenario.toml", tomli_w.dumps(scenario.resolved() | {"engine": engine}))
        self.startup_s, self.started_at = time.time() - self.began, time.monotonic()

        def start(worker: WorkerHandle, elapsed_s: float) -> None:
            command = {"do": "start", "roster": roster, "fast_math": engine["fast_math"]}
            worker.send(command | {"elapsed_s": elapsed_s})

        def replace(index: int) -> WorkerHandle:
            number, peers = len(self.processes), groups[index]
            (worker,) = self._launch([peers], folder / "log" / f"{peers[0]}-{number}")
            worker.send(jobs[index] | {"bind": roster[peers[0]], "late": []})
            return worker

        churn = scenario.build_churn()

        def planned(change: Change) -> None:
            elapsed_s = time.monotonic() - self.started_at
            event = planned_event(churn.name_of(change), scenario.peer_names[change.index], elapsed_s)
            record.add(event)
            self.observer.event(event, self._num_alive())

        self.presence = Presence(churn, self.workers, start, replace, planned)
        self.presence.begin()
        self.observer.started(folder, first["parameters"])
        self._follow(record)
        wall_s = time.monotonic() - self.started_at
        result = self._conclude(record, first, wall_s)
        self.observer.ended(result)
        return result

    # --- before -------------------------------------------------------------------------------------------------------

    def _launch(self, groups: Sequence[list[str]], logs: Path) -> list[ProcessWorker]:
        logs.mkdir(exist_ok=True)
        workers, process = launch(groups, self.inbox, logs)
        self.processes.append(process)
        return workers

    def _job(self, index: int, peers: list[str], folder: Path, data: Path, shards: list[Path], served: Event | None) -> Event:
        scenario, insecure = self.scenario, self.insecure or self._is_in_namespaces  # nobody else is on the network there
        topology, names = scenario.build_topology(), scenario.peer_names
        jobs = []
        for peer in peers:
            number = names.index(peer)
            degrees, schedule = degrees_of(topology, number, names)
            indices = str(shards[number].resolve())
            jobs.append({"name": peer, "indices": indices, "degrees": degrees, "schedule": schedule})
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

    def _await_ready(self) -> list[Event]:
        """Until every worker has loaded its model and bound its port."""
        deadline = time.monotonic() + READY_S
        ready: dict[int, Event] = {}
        while len(ready) < len(self.workers):
            worker, event = self._next(deadline - time.monotonic())
            if event["event"] == "ready":
                ready[id(worker)] = event
            elif self.is_interrupted:
                raise KeyboardInterrupt
            elif event["event"] == "timeout" and time.monotonic() >= deadline:
                raise RunError(f"{len(self.workers) - len(ready)} processes were not ready after {READY_S:g} s; see log/")
        return [ready[id(worker)] for worker in self.workers]

    # --- during -------------------------------------------------------------------------------------------------------

    def _follow(self, record: RunRecord) -> None:
        """Record what the workers tell, until every peer has finished or died, or the run is interrupted."""
        stop = self.scenario.stop
        while not self.is_interrupted and self._present():
            worker, event = self._next(self.presence.next_in_s)
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
                case "ended":
                    self._bury(worker, record)
            self.presence.follow(self.finished)
            self._watch_silence()
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

    def _next(self, timeout_s: float) -> tuple[WorkerHandle | None, Event]:
        """What a worker says next; `timeout` if none does in time. Raises a failed worker's error before the start."""
        self._sample_memory()
        try:
            worker, event = self.inbox.get(timeout=max(0.0, min(timeout_s, 0.5)))
        except Empty:
            return None, {"event": "timeout"}
        worker.heard_at = time.monotonic()
        if event["event"] == "ended":
            self.ended.add(id(worker))
        if not self.started_at:
            if event["event"] == "failed":
                raise _error_of(event)
            if event["event"] == "ended":
                raise RunError("a process ended before it was ready; see log/")
        return worker, event

    def _bury(self, worker: WorkerHandle, record: RunRecord) -> None:
        """A worker has ended before its peers had finished: they are dead."""
        if self.presence.was_killed(worker):
            return
        for peer in worker.peers:
            if peer not in self.finished:
                self.finished[peer] = "its process ended"
                time_s = round(time.monotonic() - self.started_at, 4)
                event = {"event": "finished", "peer": peer, "round": None, "time_s": time_s, "error": "its process ended"}
                record.add(event)
                self.observer.event(event, self._num_alive())

    def _watch_silence(self) -> None:
        now = time.monotonic()
        for worker in self.workers:
            silence_s = now - worker.heard_at
            if id(worker) in self.ended or silence_s <= min(STOPPED_S, SILENCE_S):
                continue
            if silence_s > SILENCE_S or worker.is_stopped():
                what = "stopped" if worker.is_stopped() else "silent"
                self.observer.note(f"the process of {', '.join(worker.peers)} was {what} for {silence_s:.0f} s and is killed")
                worker.stop(now)

    def _has_reached(self, record: RunRecord, round_: int) -> bool:
        """Whether the mean accuracy of all peers that are alive, after this round's merge, is on target."""
        accuracies = {
            event["peer"]: event["accuracy_after"]
            for event in record.events
            if event["event"] == "round" and event["round"] == round_ and event["accuracy_after"] is not None
        }
        present = self._present()
        target = self.scenario.stop.target_accuracy
        return bool(present) and set(present) <= set(accuracies) and float(np.mean(list(accuracies.values()))) >= (target or 0)

    def _stop_soon(self, record: RunRecord) -> None:
        """End after a round that no peer has passed by the time it hears of it, `HEARS_S` from now.

        Peers are at most two rounds ahead of what they have told.
        """
        if math.isinf(self.stop_round):
            told = max((event["round"] for event in record.events if event["event"] == "round"), default=0)
            per_second = told / max(time.monotonic() - self.started_at, 0.1)
            self.stop_round = told + 2 + math.ceil(HEARS_S * per_second)
            for worker in self.workers:
                worker.send({"do": "stop_after", "round": self.stop_round})

    def _sample_memory(self) -> None:
        now = time.monotonic()
        if now - self.sampled_at >= MEMORY_SAMPLE_S:
            self.sampled_at = now
            self.peak_mib = max(self.peak_mib, sum(worker.memory_mib() for worker in self.workers))

    # --- after --------------------------------------------------------------------------------------------------------

    def _conclude(self, record: RunRecord, ready: Event, wall_s: float) -> RunResult:
        scenario = self.scenario
        well = [name for name in scenario.peer_names if name in self.finished and self.finished[name] is None]
        figures = final_models(record.folder, well)
        average = central = None
        if well and not self.is_interrupted:
            average = self._ask({"do": "evaluate", "path": str(record.folder / "models" / "average.safetensors")}, "evaluated")
            if scenario.central:
                self.observer.note("training one model on all the data, for comparison")
                num_rounds = max((event["round"] for event in record.events if event["event"] == "round"), default=0)
                central = self._ask({"do": "central", "rounds": num_rounds, "peers": scenario.peers}, "central")
        for leftover in ("first", "shards"):
            remove_files(record.folder / leftover)
        summary = summarize(
            record.events,
            scenario,
            parameters=ready["parameters"],
            figures=figures,
            average_accuracy=average,
            central_accuracy=central,
            startup_s=self.startup_s,
            wall_s=wall_s,
            peak_memory_mib=self.peak_mib or None,
            engine=ready["engine"],
            clock=scenario.resolved_clock,
            exit_code=EXIT_INTERRUPTED if self.is_interrupted else None,
        )
        summary |= fidelity(scenario, record.events, self.observer.note, self._by_kernel)
        record.write("summary.json", json.dumps(summary, indent=1) + "\n")
        return RunResult(summary, record.folder)

    def _ask(self, command: Event, answer: str) -> float | None:
        """Have a worker that still lives compute an accuracy; None if none does."""
        for worker in self.workers:
            if id(worker) in self.ended:
                continue
            worker.send(command)
            while id(worker) not in self.ended and not self.is_interrupted:
                who, event = self._next(0.5)
                if who is worker and event["event"] == answer:
                    return float(event["accuracy"])
                self._watch_silence()
        return None

    def _stop_workers(self) -> None:
        deadline = time.monotonic() + STOP_S
        for worker in self.workers:
            worker.send({"do": "exit"})
        for worker in self.workers:
            worker.stop(deadline)
        for process in self.processes:
            process.wait(5.0)

    def _catch_signals(self) -> dict[int, Any]:
        """Ctrl-C and SIGTERM end the run in order; only the main thread may ask for them."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            self.is_interrupted = True

        handlers: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                handlers[number] = signal.signal(number, interrupt)
            except ValueError:
                break  # not the main thread
        return handlers


def _roster(run_number: int, addresses: Mapping[str, str]) -> dict[str, Any]:
    return {"run": run_number, "peers": {name: {"address": address} for name, address in addresses.items()}}


def _error_of(event: Event) -> GossipflError:
    """The worker's error, as the class that it was there."""
    class_ = getattr(errors, event["kind"], RunError)
    return class_(event["message"]) if issubclass(class_, GossipflError) else RunError(event["message"])
