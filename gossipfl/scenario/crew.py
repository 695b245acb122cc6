"""The processes (or the one thread) that host the peers of a run, all together: started, heard, watched and ended.

    crew = Crew(note, is_interrupted)
    crew.launch(groups, logs)
    for worker, job in zip(crew.workers, jobs): worker.send(job)
    ready = crew.await_ready()
    worker, event = crew.hear(timeout_s)                # as long as there is something to hear
    crew.stop()

What they are told, and what comes of what they say, is the launcher's.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from gossipfl import errors
from gossipfl.errors import GossipflError, RunError
from gossipfl.scenario.workers import Event, Inbox, ProcessWorker, ThreadWorker, WorkerHandle, launch

READY_S = 120.0
SILENCE_S = 60.0
"""A worker says every two seconds that it lives; one silent for this long, which may be busy, is taken for dead and killed."""
STOPPED_S = 10.0
"""The same of one that is not busy but stopped (SIGSTOP)."""
STOP_S = 2.0
"""What Ctrl-C leaves the workers to end in order; within 3 s everything has stopped."""
END_S = 0.5
"""What a process takes to end, once its peers have."""
MEMORY_SAMPLE_S, MEMORY_SHARE = 0.5, 0.05
"""How often memory is looked at, and how much of the time at most: of a hundred processes it takes seconds."""


@dataclass
class Crew:
    """`note` tells a person; `is_interrupted` says whether there is no use in waiting any longer."""

    note: Callable[[str], None]
    is_interrupted: Callable[[], bool]
    workers: list[WorkerHandle] = field(default_factory=list)
    peak_mib: float = 0.0
    _inbox: Inbox = field(default_factory=SimpleQueue)
    _first_processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _ended: set[int] = field(default_factory=set)
    _killed_for: dict[int, str] = field(default_factory=dict)
    _sample_at: float = 0.0

    def launch(self, groups: Sequence[list[str]], logs: Path) -> None:
        """A process for each group of peers."""
        self.workers += self._launch(groups, logs)

    def host_here(self, peers: list[str], objects: dict[str, Any]) -> None:
        """All peers in a thread of this process, with the caller's own objects."""
        self.workers.append(ThreadWorker(peers, self._inbox, **objects))

    def successor(self, index: int, logs: Path) -> WorkerHandle:
        """Another process for the peers of this worker, which has been killed; the caller puts it in its place."""
        peers = self.workers[index].peers
        (worker,) = self._launch([peers], logs / f"{peers[0]}-{len(self._first_processes)}")
        return worker

    def _launch(self, groups: Sequence[list[str]], logs: Path) -> list[ProcessWorker]:
        logs.mkdir(exist_ok=True)
        workers, process = launch(groups, self._inbox, logs)
        self._first_processes.append(process)
        return workers

    def await_ready(self) -> list[Event]:
        """Until every worker has loaded its model and bound its port. Raises what a worker failed of."""
        deadline = time.monotonic() + READY_S
        ready: dict[int, Event] = {}
        while len(ready) < len(self.workers):
            if self.is_interrupted():
                raise KeyboardInterrupt
            if time.monotonic() >= deadline:  # however much they say that they live
                raise RunError(f"{len(self.workers) - len(ready)} processes were not ready after {READY_S:g} s; see log/")
            worker, event = self.hear(deadline - time.monotonic())
            match event["event"]:
                case "ready":
                    ready[id(worker)] = event
                case "failed":
                    raise _error_of(event)
                case "ended":
                    raise RunError("a process ended before it was ready; see log/")
        return [ready[id(worker)] for worker in self.workers]

    def hear(self, timeout_s: float) -> tuple[WorkerHandle | None, Event]:
        """What a worker says next; `timeout`, of nobody, if none does in time, or within half a second."""
        self._sample_memory()
        try:
            worker, event = self._inbox.get(timeout=max(0.0, min(timeout_s, 0.5)))
        except Empty:
            return None, {"event": "timeout"}
        worker.heard_at = time.monotonic()
        if event["event"] == "ended":
            self._ended.add(id(worker))
        return worker, event

    def ask(self, command: Event, answer: str) -> float | None:
        """Have a worker that still lives compute an accuracy; None if none does."""
        for worker in self.workers:
            if id(worker) in self._ended:
                continue
            worker.send(command)
            while id(worker) not in self._ended and not self.is_interrupted():
                who, event = self.hear(0.5)
                if who is worker and event["event"] == answer:
                    return float(event["accuracy"])
                self.watch_silence()
        return None

    def watch_silence(self) -> None:
        """Kill who has not been heard for too long."""
        now = time.monotonic()
        for worker in self.workers:
            silence_s = now - worker.heard_at
            if id(worker) in self._ended or silence_s <= min(STOPPED_S, SILENCE_S):
                continue
            if silence_s > SILENCE_S or worker.is_stopped():
                what = "stopped" if worker.is_stopped() else "silent"
                self.note(f"the process of {', '.join(worker.peers)} was {what} for {silence_s:.0f} s and is killed")
                self._killed_for[id(worker)] = f"its process was {what} for {silence_s:.0f} s and was killed"
                worker.stop(now)

    def why_ended(self, worker: WorkerHandle) -> str:
        """Of one that has."""
        return self._killed_for.get(id(worker), "its process ended")

    def stop(self) -> None:
        """End them all, in order if they obey in time."""
        deadline = time.monotonic() + STOP_S
        for worker in self.workers:
            worker.send({"do": "exit"})
        for worker in self.workers:
            worker.stop(deadline)
        for process in self._first_processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:  # it has not come as far as to listen
                process.kill()
                process.wait()

    def _sample_memory(self) -> None:
        began = time.monotonic()
        if began >= self._sample_at:
            self.peak_mib = max(self.peak_mib, sum(worker.memory_mib() for worker in self.workers))
            now = time.monotonic()
            self._sample_at = now + max(MEMORY_SAMPLE_S, (now - began) / MEMORY_SHARE)


def _error_of(event: Event) -> GossipflError:
    """The worker's error, as the class that it was there."""
    class_ = getattr(errors, event["kind"], RunError)
    return class_(event["message"]) if issubclass(class_, GossipflError) else RunError(event["message"])
