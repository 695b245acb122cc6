"""The peers of one process: one endpoint, one message loop, one engine that trains them in turn.

    host = PeerHost(job)                       # loads data and model, binds
    host.start({"p0": "tcp://...", ...})       # joins the run
    host.work(on_event)                        # trains until every peer here has finished

Events are plain dicts: `round` and `fault` records, `serving` (a version that devices get), and `finished`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gossipfl.aggregation import AGGREGATORS
from gossipfl.errors import ConfigError, RunError
from gossipfl.learning.checkpoint import save_model
from gossipfl.learning.datasets import open_dataset
from gossipfl.learning.models import build_model
from gossipfl.learning.training import Engine, Learner, TrainingConfig
from gossipfl.overlay.selection import SELECTORS
from gossipfl.protocol.baselines import PROTOCOLS
from gossipfl.protocol.gossip import MAX_SAMPLES, MIXINGS, GossipConfig
from gossipfl.protocol.messages import Fault, PeerId, RoundReport, Start, StopAfter
from gossipfl.runtime.endpoint import Endpoint
from gossipfl.runtime.message_loop import MessageLoop
from gossipfl.runtime.node import FinishTask, Node, RoundDone, TrainTask
from gossipfl.runtime.shaping import Emulation, ShapedTransport
from gossipfl.runtime.transport import ZmqTransport
from gossipfl.segments.codecs import codec
from gossipfl.segments.layout import SEGMENTATIONS, Layout
from gossipfl.segments.store import SegmentStore

if TYPE_CHECKING:
    from gossipfl.runtime.serving_peers import Serving, ServingPeers

logger = logging.getLogger(__name__)

Event = dict[str, Any]


@dataclass(frozen=True)
class GossipSettings:
    """The protocol's dials, as in the scenario's [gossip] table; times in seconds, None where it is derived."""

    rounds: int
    seed: int = 0
    protocol: str = "gossip"
    segments: int = 8
    segmentation: str = "even"
    replicas: int = 2
    codec: str = "float32"
    mixing: str = "data_size"
    aggregation: str = "mean"
    selection: str = "uniform"
    exploration: float = 0.5
    max_staleness: float = 0
    staleness_exponent: float = 0.5
    patience: float | None = None
    versions_kept: int = 4
    linger_s: float = 10.0
    join_timeout_s: float = 30.0
    quorum: int | None = None

    def __post_init__(self) -> None:
        choices = {"segmentation": tuple(SEGMENTATIONS), "mixing": MIXINGS}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ConfigError(f"{key} = {getattr(self, key)!r}; choose one of {', '.join(known)}")
        bounds: dict[str, tuple[float, float]] = {
            **dict.fromkeys(("rounds", "segments", "replicas", "versions_kept"), (1, 1e9)),
            **dict.fromkeys(("staleness_exponent", "linger_s", "quorum"), (0, 1e9)),
            **dict.fromkeys(("patience", "join_timeout_s"), (1e-3, 1e9)),
            "exploration": (0, 1),
            "max_staleness": (0, math.inf),
        }
        for key, (least, most) in bounds.items():
            value = getattr(self, key)
            if value is not None and not least <= value <= most:  # NaN fails every comparison
                raise ConfigError(f"{key} = {value!r} is out of bounds; give {least:g} to {most:g}")
        PROTOCOLS.get(self.protocol), AGGREGATORS.get(self.aggregation), SELECTORS.get(self.selection), codec(self.codec)

    def for_peer(
        self,
        layout: Layout,
        num_samples: int,
        schedule: Sequence[Mapping[PeerId, int]] | None = None,
        late: Iterable[PeerId] = (),
    ) -> GossipConfig:
        """What a peer's machine goes by, once its model is known.

        `schedule`: its neighbours of each round, if they change; `late`: peers that are not there at the start.
        """
        return GossipConfig(
            rounds=self.rounds,
            segments=tuple(SEGMENTATIONS[self.segmentation](layout, self.segments)),
            layout=layout.digest,
            num_samples=num_samples,
            seed=self.seed,
            replicas=self.replicas,
            codec=self.codec,
            mixing=self.mixing,
            selection=self.selection,
            exploration=self.exploration,
            max_staleness=self.max_staleness,
            staleness_exponent=self.staleness_exponent,
            patience_s=self.patience,
            versions_kept=self.versions_kept,
            linger_s=self.linger_s,
            join_timeout_s=self.join_timeout_s,
            quorum=self.quorum,
            schedule=schedule,
            late=frozenset(late),
        )


def build_node(
    name: PeerId,
    degrees: Mapping[PeerId, int],
    settings: GossipSettings,
    layout: Layout,
    initial: np.ndarray,
    num_samples: int,
    transport: ZmqTransport,
    tasks: SimpleQueue[Any],
    schedule: Sequence[Mapping[PeerId, int]] | None = None,
    late: Iterable[PeerId] = (),
    **callbacks: Any,
) -> Node:
    """A peer's machine with its store, ready for an endpoint.

    `degrees`: each neighbour's own number of neighbours; `schedule`: the same for each round, where they change.
    """
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ConfigError(f"num_samples = {num_samples} of {name}; give its number of training samples, 1 to 2^40")
    config = settings.for_peer(layout, num_samples, schedule, late)
    values = codec(settings.codec)
    if values.sparse and settings.aggregation != "mean":
        raise ConfigError(
            f"gossip.aggregation = {settings.aggregation!r} needs whole copies, gossip.codec = {settings.codec!r} sends parts; "
            "use aggregation = 'mean' or a dense codec"
        )
    store = SegmentStore(initial, config.segments, values, settings.seed, name)
    numbers = iter(lambda: 1 + secrets.randbelow(2**61), None)
    machine = PROTOCOLS.get(settings.protocol)(name, degrees, config, numbers)
    return Node(machine, store, values, AGGREGATORS.get(settings.aggregation), initial, transport, tasks, **callbacks)


@dataclass(frozen=True)
class PeerJob:
    """One peer of a process: its shard (an .npy file of indices) and its neighbours with their degrees, also of each round."""

    name: PeerId
    indices: str
    degrees: dict[PeerId, int]
    schedule: list[dict[PeerId, int]] | None = None


@dataclass(frozen=True)
class Job:
    """All that a process needs to host its peers; plain values, so that it travels as JSON."""

    peers: list[PeerJob]
    run: int
    bind: str
    data: str
    model: str
    model_args: dict[str, Any]
    model_seed: int
    training: dict[str, Any]
    gossip: dict[str, Any]
    evaluate_every: int
    out: str
    advertise: str | None = None
    insecure: bool = False
    scenario: str = ""
    emulation: dict[str, Any] | None = None  # see `shaping.Emulation`
    namespace: str | None = None  # see `namespaces.enter`
    late: list[PeerId] = field(default_factory=list)  # peers that are not there at the start
    serving: dict[str, Any] | None = None  # see `serving_peers.ServingSettings`

    @staticmethod
    def from_json(values: dict[str, Any]) -> Job:
        return Job(**{**values, "peers": [PeerJob(**peer) for peer in values["peers"]]})


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
        self.transport = self._open_transport()
        self._endpoint = Endpoint(on_crash=self.calls.put)
        self._loop = MessageLoop(self.transport, self._endpoint, "gossipfl-peers")
        self.initial = self.engine.initial_vector()
        self._hosted: dict[PeerId, _Hosted] = {}
        self._last_round = self.settings.rounds
        for peer in job.peers:
            self._add(peer)

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
        is_first = not hosted.events
        accuracy = self._accuracy(hosted, mixed) if self._is_evaluated(report.round) else None
        event = round_event(
            hosted.node.name,
            report,
            time_s=time.monotonic() - self._started,
            train_loss=hosted.loss,
            train_s=hosted.train_s,
            merge_s=traffic.merge_s,
            wire_bytes=traffic.wire_bytes,
            control_bytes=traffic.control_bytes,
            accuracy_before=hosted.accuracy_before,
            accuracy_after=accuracy,
        )
        if self.emulation is not None and self.emulation.devices is not None:
            event["overrun_s"] = round(hosted.overrun_s, 6) if not report.adopted else 0.0
        hosted.events.append(event)
        if is_first:
            self._keep_first(hosted.node.name, mixed)
        on_event(event)

    def _finish(self, hosted: _Hosted, vector: np.ndarray, error: str | None, on_event: Callable[[Event], None]) -> None:
        name = hosted.node.name
        node = hosted.node
        event: Event = {"event": "finished", "peer": name, "round": node.machine.round, "error": error}
        event |= {"time_s": round(time.monotonic() - self._started, 4), "received_from": dict(node.received_from)}
        if error is None:
            hosted.model_file = Path(self.job.out) / "models" / f"{name}.safetensors"
            save_model(hosted.model_file, self.layout, vector, peer=name)
        hosted.is_finished = True
        hosted.events.append(event)
        on_event(event)

    def _keep_first(self, name: PeerId, mixed: np.ndarray) -> None:
        """Keep the first mixed vector, for the consensus distance at the start."""
        path = self._first_file(name)
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
            self._hosted[node.name].done = record

    def _tell(self, at: PeerId, record: Fault | Serving) -> None:
        """Have the thread that works tell it. May be called from any thread."""
        time_s = round(time.monotonic() - self._started, 4)
        event = {"event": "fault", "at": at} if isinstance(record, Fault) else {"event": "serving"}
        self._records.put({**event, "time_s": time_s, **asdict(record)})

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
                return self._first_file(name).read_bytes()
            case "model" if hosted.model_file is not None:
                return hosted.model_file.read_bytes()
        return None


def round_event(
    peer: PeerId,
    report: RoundReport,
    *,
    time_s: float,
    train_loss: float,
    train_s: float,
    merge_s: float,
    wire_bytes: int,
    control_bytes: int,
    accuracy_before: float | None,
    accuracy_after: float | None,
) -> Event:
    """The record's line for one peer and round; a peer that adopted a model in this round has not trained in it."""
    trained = not report.adopted
    return {
        "event": "round",
        "peer": peer,
        "round": report.round,
        "time_s": round(time_s, 4),
        "train_loss": train_loss if trained else None,
        "accuracy_before": accuracy_before if trained else None,
        "accuracy_after": accuracy_after,
        "train_s": round(train_s, 6) if trained else 0.0,
        "wait_s": round(report.wait_s, 6),
        "merge_s": round(merge_s, 6),
        "payload_bytes": report.payload_bytes,
        "wire_bytes": wire_bytes,
        "control_bytes": control_bytes,
        "repeated_bytes": report.repeated_bytes,
        "local_bytes": 0,
        "segments_mixed": report.segments_mixed,
        "late": report.late,
        "refused": report.refused,
        "rejected": report.rejected,
        "timeouts": report.timeouts,
        "missing": report.missing,
        "staleness_mean": report.staleness_sum / max(report.segments_mixed, 1),
        "staleness_max": report.staleness_max,
        "adopted": report.adopted,
    }
