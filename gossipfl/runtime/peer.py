"""A peer around your own model, in your own process.

    peer = Peer("p0", model, roster, num_samples=len(data), rounds=20)
    for round in peer.rounds():                 # your loop drives
        train_one_epoch(model, loader)
        peer.mix(model)                         # pulls, mixes, and writes the mixed values into the model

    peer.run(train_one_epoch)                   # or the peer drives: calls train_one_epoch(model, round) each round

The other peers run the same with their own names, on this machine or another. `roster` maps every name to its address.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from gossipfl.errors import ConfigError, RunError
from gossipfl.learning.flatten import flatten, layout_of, unflatten_
from gossipfl.learning.training import TrainingStep, cross_entropy
from gossipfl.plain import without_numpy
from gossipfl.protocol.machine import Fault, RoundReport, Start, StopAfter
from gossipfl.protocol.wire import MAX_NAME_BYTES
from gossipfl.registry import did_you_mean
from gossipfl.runtime.endpoint import Endpoint
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.runtime.message_loop import MessageLoop
from gossipfl.runtime.node import FinishTask, Node, RoundDone, build_node
from gossipfl.runtime.transport import ZmqTransport


class Peer:
    """One peer of a run, around a torch model that stays yours.

    `roster` maps all names to addresses (`tcp://host:port`, `ipc://path`); `bind` is where to listen, if not at the own
    address. `neighbours` are those to gossip with, all others by default. All peers must start from equal values: seed the
    model's construction alike. `gossip` takes the keys of a scenario's [gossip] table (`segments`, `replicas`, `codec`, ...),
    alike at all peers. ConfigError for what cannot be right, RunError for an address in use.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        roster: Mapping[str, str],
        *,
        num_samples: int,
        rounds: int,
        neighbours: Iterable[str] | None = None,
        bind: str | None = None,
        buffers: str = "average",
        insecure: bool = False,
        **gossip: Any,
    ) -> None:
        known = {field.name for field in fields(GossipSettings)}
        for key in gossip:
            if key not in known:
                raise ConfigError(f"unknown gossip setting {key!r}{did_you_mean(key, known)}")
        if not isinstance(roster, Mapping):
            raise ConfigError(f"roster is a {type(roster).__name__}; give the address of each peer by its name")
        for other in roster:
            if not 0 < len(other.encode()) <= MAX_NAME_BYTES:
                raise ConfigError(f"peer name {other!r}: a name has 1 to {MAX_NAME_BYTES} bytes")
        if name not in roster:
            raise ConfigError(f"{name!r} is not in the roster of {', '.join(roster)}")
        others = [other for other in roster if other != name] if neighbours is None else list(neighbours)
        for other in others:
            if other == name or other not in roster:
                raise ConfigError(f"neighbour {other!r} of {name!r} is not one of the others in the roster")
        if buffers not in ("average", "local"):
            raise ConfigError(f"buffers = {buffers!r}; choose 'average' or 'local'")
        self.name, self.model, self.buffers = name, model, buffers
        self.reports: list[RoundReport] = []
        self.faults: list[Fault] = []
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._round = self._yielded = 0
        self._has_begun = False
        num_samples, settings = without_numpy(num_samples), GossipSettings(**without_numpy(gossip | {"rounds": rounds}))
        layout = layout_of(model, buffers)
        run = int.from_bytes(hashlib.blake2b("/".join(sorted(roster)).encode(), digest_size=6).digest(), "little")
        transport = ZmqTransport(bind or roster[name], run=run, advertise=roster[name], insecure=insecure)
        try:
            for other in others:
                transport.connect(other, roster[other])
            degrees = dict.fromkeys(others, len(roster) - 1)
            initial = flatten(model, buffers)
            self._node = build_node(
                name, degrees, settings, layout, initial, num_samples, transport, self._tasks, on_record=self._record
            )
        except BaseException:
            transport.close()
            raise
        endpoint = Endpoint(on_crash=self._tasks.put)
        endpoint.add(self._node)
        self._loop = MessageLoop(transport, endpoint, "gossipfl-peers")

    def rounds(self) -> Iterator[int]:
        """The rounds to train for, 1, 2, ...; call `mix` once in each. Ends when the run does.

        A peer that joins late or falls far behind skips rounds: the model then holds the newest one of the others.
        RunError if the run cannot be joined.
        """
        if self._has_begun:
            raise RunError(f"{self.name}: a Peer is good for one run; make another")
        self._has_begun = True
        self._loop.start()
        self._loop.post(lambda: self._node.handle(Start()))
        try:
            start = self._next_task()
            if self._round > 1:
                unflatten_(self.model, start, self.buffers)
            while self._round:
                current = self._yielded = self._round
                yield current
                if self._round == current:
                    raise RunError(f"{self.name}: round {current} ended without peer.mix(model)")
        finally:
            self.close()

    def mix(self, model: nn.Module | None = None) -> RoundReport:
        """Hand over what training has come to, wait for the round's gossip, and write the mixed values into the model."""
        if not self._round or self._round != self._yielded:
            raise RunError(f"{self.name}: call peer.mix() once in each round of `for round in peer.rounds()`")
        model = model or self.model
        vector, round_ = flatten(model, self.buffers), self._round
        self._loop.post(lambda: self._node.trained(round_, vector))
        mixed = self._next_task()
        unflatten_(model, mixed, self.buffers)
        return self.reports[-1]

    def run(self, train: Callable[[nn.Module, int], Any]) -> nn.Module:
        """Call `train(model, round)` in every round and mix after each; the model at the end."""
        for round_ in self.rounds():
            train(self.model, round_)
            self.mix()
        return self.model

    def fit(
        self, loader: Iterable[Any], optimizer: torch.optim.Optimizer, step: TrainingStep = cross_entropy, local_epochs: int = 1
    ) -> nn.Module:
        """Train over `loader`, which yields `(x, y)`, for `local_epochs` a round; the model at the end."""

        def train(model: nn.Module, round_: int) -> None:
            model.train()
            for _ in range(local_epochs):
                for x, y in loader:
                    optimizer.zero_grad()
                    step(model, x, y).backward()
                    optimizer.step()

        return self.run(train)

    def stop_after(self, round_: int) -> None:
        """End after this round instead of the last one planned."""
        self._loop.post(lambda: self._node.handle(StopAfter(round_)))

    def close(self) -> None:
        """Leave at once; closing twice is allowed."""
        self._round = 0
        self._loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _next_task(self) -> np.ndarray:
        """Wait for the next round or the end; the mixed vector. The machine's own deadlines bound the wait."""
        while True:
            try:
                task = self._tasks.get(timeout=1.0)
                break
            except Empty:
                if not self._loop.is_running:
                    raise RunError(f"{self.name}: closed while waiting") from None
        if isinstance(task, BaseException):
            raise RunError(f"the message thread stopped: {task}") from task
        if isinstance(task, FinishTask):
            if task.error:
                raise RunError(task.error)
            self._round = 0
        else:
            self._round = task.round
        return task.vector

    def _record(self, node: Node, record: RoundDone | Fault) -> None:
        if isinstance(record, Fault):
            self.faults.append(record)
        else:
            self.reports.append(record.report)
