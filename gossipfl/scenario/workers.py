"""The launcher's side of the processes (or the thread) that host peers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Protocol

import psutil

Event = dict[str, Any]
Inbox = SimpleQueue[tuple["WorkerHandle", Event]]
"""What all workers of a run say; `{"event": "ended"}` is the last of each."""


class WorkerHandle(Protocol):
    """A worker as the launcher sees it."""

    peers: list[str]
    heard_at: float

    def send(self, command: Event) -> None:
        """Have a command carried out; one to a worker that has ended is lost."""

    def stop(self, deadline: float) -> None:
        """End it, in order if it obeys before `deadline` (monotonic seconds), else at once."""

    def memory_mib(self) -> float:
        """Memory in use: the proportional set size, where the system tells it."""


class ProcessWorker:
    """A worker in a process of its own; its log goes to a file."""

    def __init__(self, peers: list[str], inbox: Inbox, log: Path) -> None:
        self.peers, self.heard_at = peers, time.monotonic()
        self._log: IO[bytes] = log.open("wb")
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gossipfl.runtime.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is the launcher's to handle
            env=environment,
            text=True,
        )
        self._memory = psutil.Process(self._process.pid)
        threading.Thread(target=self._read, args=(inbox,), name="gossipfl-worker", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Event) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def stop(self, deadline: float) -> None:
        self.send({"do": "exit"})
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5.0)
        self._log.close()

    def memory_mib(self) -> float:
        try:
            memory = self._memory.memory_full_info()
        except psutil.Error:
            return 0.0
        return float(getattr(memory, "pss", memory.rss)) / 2**20

    def _read(self, inbox: Inbox) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.heard_at = time.monotonic()
            inbox.put((self, json.loads(line)))
        inbox.put((self, {"event": "ended", "status": self._process.wait()}))
        self._process.stdout.close()


class ThreadWorker:
    """A worker in a thread of this process, for the caller's own model, data set or training step."""

    def __init__(self, peers: list[str], inbox: Inbox, **objects: Any) -> None:
        from gossipfl.runtime.worker import Worker

        self.peers, self.heard_at = peers, time.monotonic()
        self._worker = Worker(lambda event: inbox.put((self, event)), **objects)

        def run() -> None:
            self._worker.run()
            inbox.put((self, {"event": "ended", "status": 0}))

        self._thread = threading.Thread(target=run, name="gossipfl-worker", daemon=True)
        self._thread.start()

    def send(self, command: Event) -> None:
        self._worker.command(command)

    def stop(self, deadline: float) -> None:
        self._worker.command({"do": "exit"})
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def memory_mib(self) -> float:
        memory = psutil.Process().memory_full_info()
        return float(getattr(memory, "pss", memory.rss)) / 2**20
