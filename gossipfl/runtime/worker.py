"""A process that hosts peers for a launcher: JSON lines in on one pipe, JSON lines out on another, logs in a file.

    in   the job; {"do": "start", "roster": {...}, "fast_math": bool, "elapsed_s": seconds of the run so far};
         {"do": "stop_after", "round": r}; {"do": "evaluate", "path": "..."}; {"do": "central", "rounds": n}; {"do": "exit"}
    out  hello, ready, round, fault, serving, finished, evaluated, central, alive, failed

The end of its commands ends the process: a launcher that dies leaves no orphans. The same worker runs inside a process when the
caller's own objects are to be trained (`InlineWorker`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from gossipfl.errors import GossipflError
from gossipfl.learning.central import train_centrally
from gossipfl.learning.checkpoint import load_model
from gossipfl.runtime.events import Event
from gossipfl.runtime.host import PeerHost
from gossipfl.runtime.job import Job
from gossipfl.runtime.namespaces import enter

logger = logging.getLogger(__name__)

ALIVE_S = 2.0
"""How often a worker says that it lives, whatever its training does."""

STOP_S = 1.5
"""How long a worker may take to end in order once its launcher is gone."""

Emit = Callable[[Event], None]


class Worker:
    """Carries out a launcher's commands. `model`, `dataset` and `step` are the caller's own objects, if any."""

    def __init__(self, emit: Emit, model: Any = None, dataset: Any = None, step: Any = None) -> None:
        self._emit = emit
        self._objects = {"model": model, "dataset": dataset, "step": step}
        self._commands: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._host: PeerHost | None = None
        self._is_over = threading.Event()

    def command(self, values: dict[str, Any] | None) -> None:
        """Take a command; None ends the worker. May be called from any thread."""
        if values is None:
            self._is_over.set()
        self._commands.put(values)
        if self._host is not None:
            self._host.calls.put(self._obey)

    def run(self) -> None:
        """Until told to exit. Errors are emitted as `failed`, not raised."""
        threading.Thread(target=self._say_alive, name="gossipfl-alive", daemon=True).start()
        try:
            job = self._commands.get()
            if job is None or job.get("do") == "exit":  # before there was anything to do
                return
            if job.get("namespace"):
                enter(job["namespace"])  # before there is a socket, or a thread that makes some
            self._host = PeerHost(Job.from_json(job), **self._objects)
            self._emit(self._ready(self._host))
            for _ in range(self._commands.qsize()):  # came while the host was being made
                self._host.calls.put(self._obey)
            while not self._is_over.is_set():
                self._host.work(self._emit, timeout_s=1.0)
        except GossipflError as error:
            self._emit({"event": "failed", "kind": type(error).__name__, "message": str(error)})
        except Exception as error:
            logger.exception("the worker failed")
            self._emit({"event": "failed", "kind": type(error).__name__, "message": f"{type(error).__name__}: {error}"})
        finally:
            self._is_over.set()
            if self._host is not None:
                self._host.close()

    def _ready(self, host: PeerHost) -> Event:
        return {
            "event": "ready",
            "address": host.address,
            "parameters": host.layout.size,
            "layout": host.layout.digest,
            "has_statistics": host.engine.flat.has_statistics,
            "engine": host.engine.description(),
            "pid": os.getpid(),
        }

    def _obey(self) -> None:
        host = self._host
        assert host is not None
        try:
            command = self._commands.get_nowait()
        except Empty:  # a command that came while the host was being made is announced twice
            return
        match command:
            case {"do": "start", "roster": roster, "fast_math": fast_math, "elapsed_s": elapsed_s}:
                host.engine.set_fast_math(fast_math)
                host.start(roster, elapsed_s)
                self._emit({"event": "started"})
            case {"do": "stop_after", "round": round_}:
                host.stop_after(round_)
            case {"do": "evaluate", "path": path}:
                _, vector = load_model(Path(path))
                self._emit({"event": "evaluated", "accuracy": host.engine.evaluate(vector)})
            case {"do": "central", "rounds": rounds, "peers": num_peers}:
                self._train_centrally(host, rounds, num_peers)
            case {"do": "exit"} | None:
                self._is_over.set()

    def _train_centrally(self, host: PeerHost, rounds: int, num_peers: int) -> None:
        """The same number of passes over all the data at once, by one model."""
        began = time.perf_counter()
        accuracy = train_centrally(host.engine, host.initial, rounds, num_peers, lambda: not self._is_over.is_set())
        if accuracy is None:
            return
        self._emit({"event": "central", "accuracy": accuracy, "seconds": round(time.perf_counter() - began, 3)})

    def _say_alive(self) -> None:
        while not self._is_over.wait(ALIVE_S):
            self._emit({"event": "alive"})


def serve(commands: int, events: int, log: int) -> None:
    """Serve the launcher at the other end of two pipes, until it says so or is gone; never returns."""
    os.dup2(log, 1)  # what a user's own code prints goes to the log
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    results = os.fdopen(events, "w", buffering=1, encoding="utf-8")
    lock = threading.Lock()

    def emit(event: Event) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            results.write(json.dumps(event) + "\n")

    worker = Worker(emit)

    def read() -> None:
        with os.fdopen(commands, encoding="utf-8") as lines, contextlib.suppress(ValueError):  # a launcher died in mid-command
            for line in lines:
                worker.command(json.loads(line))
        worker.command(None)
        time.sleep(STOP_S)  # a worker in the middle of a long step would not notice
        os._exit(1)

    emit({"event": "hello", "pid": os.getpid()})
    threading.Thread(target=read, name="gossipfl-commands", daemon=True).start()
    worker.run()
    logging.shutdown()
    os._exit(0)


def main(descriptors: Sequence[int]) -> None:
    """Fork a worker for each three file descriptors (commands, events, log), this process becoming the first."""
    sys.path.insert(0, os.getcwd())
    gc.freeze()  # so that the collector does not write to, and so copy, the pages that the forks share
    mine, others = descriptors[:3], list(zip(*[iter(descriptors[3:])] * 3, strict=True))
    for theirs in others:
        if os.fork() == 0:
            for number in set(descriptors) - set(theirs):
                os.close(number)
            os.setsid()
            serve(*theirs)
    for number in descriptors[3:]:
        os.close(number)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that have ended need nobody to wait for them
    serve(*mine)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
