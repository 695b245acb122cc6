"""The launcher's side of the processes (or the thread) that host peers.

On Linux all processes of a run are forked from the first one, once it has imported torch and before it does anything else
(it has one thread and no sockets yet): they start together in the time of one, and share the memory of what they imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Protocol

import psutil

Event = dict[str, Any]
Inbox = SimpleQueue[tuple["WorkerHandle", Event]]
"""What all workers of a run say; `{"event": "ended"}` is the last of each."""


MMAP_THRESHOLD_BYTES = 32 * 2**20
"""Of malloc: what is larger has a mapping of its own and is handed back when freed. glibc takes no more."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # memory that one thread frees serves the others: 100 MiB less with 16 models of 6 MiB
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES),  # else what comes in costs a page fault for each 20 KiB
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerHandle(Protocol):
    """A worker as the launcher sees it."""

    peers: list[str]
    heard_at: float

    def send(self, command: Event) -> None:
        """Have a command carried out; one to a worker that has ended is lost."""

    def stop(self, deadline: float) -> None:
        """End it, in order if it obeys before `deadline` (monotonic seconds), else at once."""

    def is_stopped(self) -> bool:
        """Whether the system holds it, so that it is not merely busy."""

    def memory_mib(self) -> float:
        """Memory in use: the proportional set size, where the system tells it."""


class ProcessWorker:
    """A worker in a process of its own, at the other end of two pipes."""

    def __init__(self, peers: list[str], commands: IO[str], events: IO[str], inbox: Inbox) -> None:
        self.peers, self.heard_at = peers, time.monotonic()
        self._commands, self._events = commands, events
        self._process: psutil.Process | None = None
        self._reader = threading.Thread(target=self._read, args=(inbox,), name="gossipfl-worker", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def send(self, command: Event) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._commands.write(json.dumps(command) + "\n")
            self._commands.flush()

    def stop(self, deadline: float) -> None:
        self.send({"do": "exit"})
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()
        self._reader.join(max(0.0, deadline - time.monotonic()))
        if self._reader.is_alive() and self._process is not None:
            with contextlib.suppress(psutil.Error):
                self._process.kill()
            self._reader.join(5.0)

    def is_stopped(self) -> bool:
        try:
            return self._process is not None and self._process.status() == psutil.STATUS_STOPPED
        except psutil.Error:
            return False

    def memory_mib(self) -> float:
        return _memory_mib(self._process) if self._process else 0.0

    def _read(self, inbox: Inbox) -> None:
        """Until the pipe closes, which it does however the process ends."""
        for line in self._events:
            self.heard_at = time.monotonic()
            event = json.loads(line)
            if event["event"] == "hello":
                with contextlib.suppress(psutil.Error):
                    self._process = psutil.Process(event["pid"])
            else:
                inbox.put((self, event))
        self._events.close()
        inbox.put((self, {"event": "ended"}))


def launch(groups: Sequence[list[str]], inbox: Inbox, logs: Path) -> tuple[list[ProcessWorker], subprocess.Popen[bytes]]:
    """Start a process for each group of peers, logging to `logs`; also the first process, which is to be waited for."""
    theirs, ours, handles = [], [], []
    for index in range(len(groups)):
        command_read, command_write = os.pipe()
        event_read, event_write = os.pipe()
        log = os.open(logs / f"worker{index}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        theirs += [command_read, event_write, log]
        ours.append((command_write, event_read))
    process = subprocess.Popen(
        [sys.executable, "-m", "gossipfl.runtime.worker", *map(str, theirs)],
        pass_fds=theirs,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is the launcher's to handle
        env=ENVIRONMENT | os.environ,
    )
    for number in theirs:
        os.close(number)
    for group, (command_write, event_read) in zip(groups, ours, strict=True):
        commands = os.fdopen(command_write, "w", encoding="utf-8")
        handles.append(ProcessWorker(group, commands, os.fdopen(event_read, encoding="utf-8"), inbox))
    return handles, process


class ThreadWorker:
    """A worker in a thread of this process, for the caller's own model, data set or training step."""

    def __init__(self, peers: list[str], inbox: Inbox, **objects: Any) -> None:
        from gossipfl.runtime.worker import Worker

        self.peers, self.heard_at = peers, time.monotonic()
        self._worker = Worker(lambda event: inbox.put((self, event)), **objects)

        def run() -> None:
            self._worker.run()
            inbox.put((self, {"event": "ended"}))

        self._thread = threading.Thread(target=run, name="gossipfl-worker", daemon=True)
        self._thread.start()

    def send(self, command: Event) -> None:
        self._worker.command(command)

    def stop(self, deadline: float) -> None:
        self._worker.command({"do": "exit"})
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def is_stopped(self) -> bool:
        return False

    def memory_mib(self) -> float:
        return _memory_mib(psutil.Process())


def _memory_mib(process: psutil.Process) -> float:
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0.0
    return float(getattr(memory, "pss", memory.rss)) / 2**20
