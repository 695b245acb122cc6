"""The peers of one process: one endpoint, one message loop, one engine that trains them in turn.

    host = PeerHost(job)                       # loads data and model, binds
    host.start({"p0": "tcp://...", ...})       # joins the run
    host.work(on_event)                        # trains until every peer here has finished

Events are plain dicts: `round` and `fault` records, `serving` (a version that devices get), and `finished`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gossipfl.errors import RunError
from gossipfl.learning.checkpoint import save_model, writing
from gossipfl.learning.datasets import open_dataset
from gossipfl.learning.models import build_model
from gossipfl.learning.training import Engine, Learner, TrainingConfig
from gossipfl.protocol.machine import Fault, Start, StopAfter
from gossipfl.protocol.messages import PeerId
from gossipfl.runtime.endpoint import Endpoint
from gossipfl.runtime.events import Event, fault_event, finished_event, round_event
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.runtime.job import Job, PeerJob
from gossipfl.runtime.message_loop import MessageLoop
from gossipfl.runtime.node import FinishTask, Node, RoundDone, TrainTask, build_node
from gossipfl.runtime.shaping import Emulation, ShapedTransport
from gossipfl.runtime.transport import ZmqTransport
from gossipfl.segments.layout import Layout

if TYPE_CHECKING:
    from gossipfl.runtime.serving_peers import Serving, ServingPeers


@dataclass
class _Hosted:
    """A peer here, and what of its current round waits for the merge to be told."""

    node: Node
    learner: Learner
    index: int  # among all peers, where devices are emulated
    loss: float = float("nan")
    train_s: float = 0.0
    overrun_s: float = 0.0
    accuracy_before: float | None = None
    done: RoundDone | None = None
    done_s: float = 0.0  # when that was: the last round's task follows only once the neighbours need the peer no more
    is_finished: bool = False
    is_collected: bool = False
    model_file: Path | None = None
    events: list[Event] = field(default_factory=list)


class PeerHost:
    """Hosts the peers of `job`. `on_event` hears of rounds, faults and ends, on the thread that works."""

    def __init__(self, job: Job, model: torch.nn.Module | None = None, dataset: Any = None, step: Any = None) -> None:
        self.job = job
        training = TrainingConfig(**job.training)
        self.dataset = dataset or open_dataset(Path(job.data))
        is_callers_own = model is not None
        if model is None:
            model = build_model(job.model, self.dataset.input_shape, self.dataset.num_classes, job.model_args, job.model_seed)
        self.engine = Engine(model, training, self.dataset, step)
        if training.fast_math:
            self.engine.try_fast_math()
        self.settings = GossipSettings(**job.gossip)
        self.calls: SimpleQueue[Any] = SimpleQueue()
        self.emulation = Emulation.from_json(job.emulation) if job.emulation else None
        self._started = time.monotonic()
        self._records: SimpleQueue[Event] = SimpleQueue()
        self._serving = self._make_serving(job.serving, is_callers_own) if job.serving else None
        self.initial = self.engine.initial_vector()
        self._hosted: dict[PeerId, _Hosted] = {}
        self._last_round = self.settings.rounds
        self.transport = self._open_transport()
        self._endpoint = Endpoint(on_crash=self.calls.put)
        self._loop = MessageLoop(self.transport, self._endpoint, "gossipfl-peers")
        try:
            for peer in job.peers:
                self._add(peer)
        except BaseException:
            self.transport.close()
            raise

    @property
    def address(self) -> str:
        return self.transport.address

    @property
    def layout(self) -> Layout:
        return self.engine.layout

    def _open_transport(self) -> ZmqTransport:
        job = self.job
        if self.emulation is None or self.emulation.links is None:
            return ZmqTransport(job.bind, run=job.run, advertise=job.advertise, insecure=job.insecure)
        options = {"advertise": job.advertise, "insecure": job.insecure}
        return ShapedTransport(job.bind, run=job.run, emulation=self.emulation, **options)

    def _make_serving(self, settings: dict[str, Any], is_callers_own: bool) -> ServingPeers:
        from gossipfl.runtime.model_list import Architecture
        from gossipfl.runtime.serving_peers import ServingPeers, ServingSettings  # takes a quarter of a second, for few runs

        data, engine, build = self.dataset, self.engine, None
        if not is_callers_own:
            build = Architecture("", self.job.model, data.input_shape, data.num_classes, self.job.model_args)
        return ServingPeers(
            ServingSettings(**settings),
            [peer.name for peer in self.job.peers],
            engine.flat.model,
            engine.config.buffers,
            data,
            build,
            self._tell,
        )

    def _add(self, peer: PeerJob) -> None:
        learner = Learner(peer.name, np.load(peer.indices, allow_pickle=False))
        node = build_node(
            peer.name,
            peer.degrees,
            self.settings,
            self.layout,
            self.initial,
            len(learner.indices),
            self.transport,
            self.calls,
            peer.schedule,
            self.job.late,
            on_record=self._record,
            collect=lambda item: self._collect(peer.name, item),
        )
        index = self.emulation.names.index(peer.name) if self.emulation else 0
        self._hosted[peer.name] = _Hosted(node, learner, index)
        self._endpoint.add(node)

    def start(self, roster: Mapping[PeerId, str], elapsed_s: float = 0.0) -> None:
        """Join the run whose peers live at these addresses, and which began `elapsed_s` ago."""
        for name, address in roster.items():
            self.transport.connect(name, address)
        while elapsed_s and self.transport.receive(0.0):
            pass  # it was not there when this was said
        self._started = time.monotonic() - elapsed_s
        if isinstance(self.transport, ShapedTransport):
            self.transport.begin(self._started)
        self._loop.start()
        if self._serving is not None:
            self._serving.start()
        for hosted in self._hosted.values():
            self._loop.post(lambda node=hosted.node: node.handle(Start()))  # type: ignore[misc]

    def stop_after(self, round_: int) -> None:
        """End after this round; a peer that is past it, after the round that it is in."""
        self._last_round = min(self._last_round, round_)
        for hosted in self._hosted.values():
            self._loop.post(lambda node=hosted.node: node.handle(StopAfter(round_)))  # type: ignore[misc]

    @property
    def num_active(self) -> int:
        return sum(not hosted.is_finished for hosted in self._hosted.values())

    @property
    def is_collected(self) -> bool:
        """Whether a collector has taken what all peers here have left behind."""
        return all(hosted.is_collected for hosted in self._hosted.values())

    def work(self, on_event: Callable[[Event], None], timeout_s: float | None = None) -> bool:
        """Do what is asked next, within `timeout_s`; False if nothing was. Raises what the message loop died of."""
        task = None
        with contextlib.suppress(Empty):
            task = self.calls.get(timeout=timeout_s)
        while not self._records.empty():
            on_event(self._records.get_nowait())
        match task:
            case None:
                return False
            case TrainTask():
                hosted = self._hosted[task.node.name]
                self._close_round(hosted, task.vector, on_event)
                self._train(hosted, task)
            case FinishTask(node, vector, error):
                hosted = self._hosted[node.name]
                self._close_round(hosted, vector, on_event)
                self._finish(hosted, vector, error, on_event)
            case BaseException():
                raise RunError(f"the message thread stopped: {task}") from task
            case _:
                task()
        return True

    def close(self, flush_s: float = 0.5) -> None:
        self._loop.stop(flush_s)
        if self._serving is not None:
            self._serving.close()

    # --- one peer's round ---------------------------------------------------------------------------------------------

    def _train(self, hosted: _Hosted, task: TrainTask) -> None:
        round_ = task.round
        result = self.engine.train(hosted.learner, task.vector, round_)
        hosted.loss, hosted.train_s = result.loss, result.seconds
        devices = self.emulation.devices if self.emulation else None
        if devices is None:
            self._loop.post(lambda: hosted.node.trained(round_, result.vector))
        else:
            hosted.train_s = devices.train_s(hosted.index, round_, result.num_steps)
            due = task.asked_at + hosted.train_s
            hosted.overrun_s = max(0.0, time.monotonic() - due)
            self._loop.post_at(due, lambda: hosted.node.trained(round_, result.vector))
        hosted.accuracy_before = self._accuracy(hosted, result.vector) if self._is_evaluated(round_) else None

    def _close_round(self, hosted: _Hosted, mixed: np.ndarray, on_event: Callable[[Event], None]) -> None:
        """Tell of the round whose merge is done: `mixed` is what came of it."""
        if hosted.done is None:
            return
        report, traffic = hosted.done.report, hosted.done.traffic
        hosted.done = None
        if self._serving is not None:
            self._serving.take(hosted.node.name, report.round, mixed, hosted.learner.local_buffers)
        accuracy = self._accuracy(hosted, mixed) if self._is_evaluated(report.round) else None
        event = round_event(
            hosted.node.name,
            report,
            time_s=hosted.done_s,
            train_loss=hosted.loss,
            train_s=hosted.train_s,
            traffic=traffic,
            accuracy_before=hosted.accuracy_before,
            accuracy_after=accuracy,
        )
        if self.emulation is not None and self.emulation.devices is not None:
            event["overrun_s"] = round(hosted.overrun_s, 6) if not report.adopted else 0.0
        hosted.events.append(event)
        if report.round == 1:  # else the peer has come late, or back, to others that are nearer to each other by then
            self._keep_first(hosted.node.name, mixed)
        on_event(event)

    def _finish(self, hosted: _Hosted, vector: np.ndarray, error: str | None, on_event: Callable[[Event], None]) -> None:
        node, name = hosted.node, hosted.node.name
        time_s = time.monotonic() - self._started
        event = finished_event(name, node.machine.round, time_s, error, received_from=node.traffic.received_from)
        if error is None:
            hosted.model_file = Path(self.job.out) / "models" / f"{name}.safetensors"
            save_model(hosted.model_file, self.layout, vector, peer=name)
        hosted.is_finished = True
        hosted.events.append(event)
        on_event(event)

    def _keep_first(self, name: PeerId, mixed: np.ndarray) -> None:
        """Keep what came of the first round, for the consensus distance at the start."""
        path = self._first_file(name)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, mixed)

    def _first_file(self, name: PeerId) -> Path:
        return Path(self.job.out) / "first" / f"{name}.npy"

    def _is_evaluated(self, round_: int) -> bool:
        every = self.job.evaluate_every
        return round_ >= self._last_round or (every > 0 and round_ % every == 0)

    def _accuracy(self, hosted: _Hosted, vector: np.ndarray) -> float:
        return self.engine.evaluate(vector, hosted.learner)

    def _record(self, node: Node, record: RoundDone | Fault) -> None:
        """On the loop's thread; the round's task follows and takes it up."""
        if isinstance(record, Fault):
            self._tell(node.name, record)
        else:
            hosted = self._hosted[node.name]
            hosted.done, hosted.done_s = record, time.monotonic() - self._started

    def _tell(self, at: PeerId, record: Fault | Serving) -> None:
        """Have the thread that works tell it. May be called from any thread."""
        time_s = time.monotonic() - self._started
        if isinstance(record, Fault):
            self._records.put(fault_event(at, record, time_s))
        else:
            self._records.put({"event": "serving", "time_s": round(time_s, 4), **asdict(record)})

    def _collect(self, name: PeerId, item: str) -> bytes | None:
        """On the loop's thread: what a collector may have, once the peer has finished."""
        hosted = self._hosted[name]
        if not hosted.is_finished:
            return None
        match item:
            case "thanks":
                hosted.is_collected = True
            case "scenario":
                return self.job.scenario.encode()
            case "events":
                return "".join(json.dumps(event) + "\n" for event in hosted.events).encode()
            case "first":
                path = self._first_file(name)
                return path.read_bytes() if path.exists() else b""
            case "model" if hosted.model_file is not None:
                return hosted.model_file.read_bytes()
        return None
