"""Real sockets for the tests: transports that are pumped by hand, whole swarms of nodes, and attackers.

Nothing here sleeps: every wait is for an event, with a deadline. The generators are fixtures, to be named where they are used:

    swarms = pytest.fixture(made_swarms)
"""

from __future__ import annotations

import contextlib
import gc
import secrets
import socket
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import zmq

from gossipfl.protocol import wire
from gossipfl.protocol.machine import Fault, RoundReport, Start
from gossipfl.protocol.messages import Credit, Data, Hello, Leave, Message, Pull, Record
from gossipfl.runtime.endpoint import Endpoint
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.runtime.message_loop import MessageLoop
from gossipfl.runtime.node import FinishTask, Node, RoundDone, TrainTask, build_node
from gossipfl.runtime.transport import Happening, Incoming, LinkDown, LinkUp, ZmqTransport
from gossipfl.segments.layout import Layout

RUN = 7
DEADLINE_S = 40.0
"""Far beyond what anything here takes on a busy machine; only a failure waits that long."""


# --- transports, pumped by hand ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class End:
    """A transport and all that has happened at it."""

    transport: ZmqTransport
    happened: list[Happening] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.transport.address

    @property
    def received(self) -> list[Incoming]:
        """What came in from peers, without the transport's own Credit."""
        return [h for h in self.happened if isinstance(h, Incoming) and not isinstance(h.message, Credit)]

    @property
    def messages(self) -> list[Message]:
        return [incoming.message for incoming in self.received]

    @property
    def links(self) -> list[LinkUp | LinkDown]:
        return [h for h in self.happened if isinstance(h, LinkUp | LinkDown)]

    def pump(self, timeout_s: float = 0.0) -> None:
        self.happened += self.transport.receive(timeout_s)


Opener = Callable[..., End]


def opened_ends() -> Iterator[Opener]:
    """Fixture: opens transports (`ends("tcp://127.0.0.1:0")`) and closes them when the test is over."""
    opened: list[End] = []

    def open_(bind: str, *, run: int = RUN, **options: object) -> End:
        opened.append(End(ZmqTransport(bind, run=run, **options)))  # type: ignore[arg-type]
        return opened[-1]

    yield open_
    for end in opened:
        with contextlib.suppress(OSError):  # the test has closed it
            end.transport.close()


def until(ends: End | list[End], condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Receive at these ends, in turn, until `condition` holds."""
    ends = [ends] if isinstance(ends, End) else ends
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            happened = [[type(h).__name__ for h in end.happened][-8:] for end in ends]
            raise AssertionError(f"not within {deadline_s:g} s; the last of what happened: {happened}")
        for end in ends:
            end.pump(0.002)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def new_address(kind: str) -> str:
    """Somewhere to bind: `tcp4`, `tcp6` (skips where there is none), `ipc` or `inproc`."""
    if kind == "tcp6" and not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    return {
        "tcp4": "tcp://127.0.0.1:0",
        "tcp6": "tcp://[::1]:0",
        "ipc": f"ipc://{Path(tempfile.gettempdir()) / f'gossipfl-{uuid.uuid4().hex[:12]}'}",
        "inproc": f"inproc://{uuid.uuid4().hex}",
    }[kind]


def free_address() -> str:
    """A TCP address on which nothing listens, for a peer that is not there (yet).

    Below the ports that systems give to outgoing connections, so that no other test gets it by chance meanwhile.
    """
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return f"tcp://127.0.0.1:{port}"


def chunks(request: int, total: int, chunk: int = wire.MAX_PAYLOAD_BYTES, seed: int = 0) -> list[Data]:
    """An answer of `total` random bytes."""
    content = np.random.default_rng(seed).bytes(total)
    return [
        Data(request, 1, 1, 1, (0, total // 4), at, total, len(part), payload=part)
        for at in range(0, total, chunk)
        for part in [memoryview(content)[at : at + chunk]]
    ]


def payload_of(messages: list[Message]) -> bytes:
    return b"".join(bytes(message.payload) for message in messages if isinstance(message, Data | Record))


# --- attackers --------------------------------------------------------------------------------------------------------


class Attacker:
    """A bare ZeroMQ socket: a DEALER that connects to `address`, or a ROUTER that others connect to. Sends any frames."""

    def __init__(self, address: str | None = None, *, receive_limit: int = 0) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER if address is None else zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, receive_limit)
        if receive_limit:  # what is not read fills up soon; less than a segment of TCP would stall what is sent, too
            self.socket.setsockopt(zmq.RCVBUF, 262_144)
        if address is None:
            self.socket.bind("tcp://127.0.0.1:*")
        else:
            self.socket.connect(address)
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def say(self, sender: str, recipient: str, message: Message, *, to: bytes | None = None, run: int = RUN) -> None:
        """A well-formed message; `to` is the connection to answer on, for a ROUTER."""
        payload = bytes(getattr(message, "payload", None) or b"")
        prefix = () if to is None else (to,)
        self.send(*prefix, wire.encode(run, sender, recipient, message), payload)

    def hear(self, timeout_s: float = DEADLINE_S) -> tuple[bytes, wire.Envelope] | None:
        """The next message that came in, with the connection that it came on (b"" for a DEALER); None: none in time."""
        if not self.socket.poll(round(timeout_s * 1000)):
            return None
        *origin, header, payload = self.socket.recv_multipart()
        return (origin[0] if origin else b""), wire.decode([header, payload])

    def close(self, linger_s: float = 0.0) -> None:
        self.socket.close(linger=int(linger_s * 1000))
        self._context.term()


def made_attackers() -> Iterator[Callable[..., Attacker]]:
    """Fixture: makes attackers (`attackers(address)`, or `attackers()` for one to connect to) and closes them."""
    made: list[Attacker] = []

    def make(*arguments: object, **options: object) -> Attacker:
        made.append(Attacker(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for attacker in made:
        if not attacker.socket.closed:
            attacker.close()


class FakePeer(threading.Thread):
    """A neighbour that keeps its manners, Hello and Leave, but answers pulls as it is told to.

    `on_pull(fake, origin, sender, pull)` runs for each Pull and answers with `fake.answer`; `on_tick(fake)` runs about every
    20 ms. `newest` is what its Hello claims.
    """

    def __init__(
        self,
        name: str,
        on_pull: Callable[[FakePeer, bytes, str, Pull], object] = lambda *_: None,
        on_tick: Callable[[FakePeer], object] = lambda fake: None,
        newest: int = 0,
    ) -> None:
        super().__init__(name=f"fake-{name}", daemon=True)
        self.peer, self.newest = name, newest
        self.pulls: list[Pull] = []
        self.layout = ""
        self.error: Exception | None = None
        self._on_pull, self._on_tick = on_pull, on_tick
        self._router = Attacker()
        self._dealers: dict[str, Attacker] = {}
        self._over = threading.Event()
        self.address = self._router.address

    def greet(self, layout: str, victims: Mapping[str, str]) -> FakePeer:
        """Answer the Hello of these peers from now on."""
        self.layout = layout
        self._dealers = {name: Attacker(address) for name, address in victims.items()}
        self.start()
        return self

    def answer(self, origin: bytes, recipient: str, message: Message) -> None:
        self._router.say(self.peer, recipient, message, to=origin)

    def answer_frames(self, origin: bytes, *frames: bytes) -> None:
        self._router.send(origin, *frames)

    def serve(self, origin: bytes, recipient: str, pull: Pull, value: float = 1e6, **changes: object) -> None:
        """Answer a Pull in full with float32 `value`s; `changes` are fields of Data to get wrong."""
        for range_ in pull.ranges:
            payload = np.full(range_[1] - range_[0], value, np.float32).tobytes()
            version, size = max(pull.version, 1), len(payload)
            fields = dict(request=pull.request, version=version, newest=version, num_samples=1, range=range_, offset=0)
            fields |= dict(total=size, num_bytes=size, payload=payload)
            self.answer(origin, recipient, Data(**(fields | changes)))  # type: ignore[arg-type]

    def run(self) -> None:
        try:
            while not self._over.is_set():
                heard = self._router.hear(0.02)
                if heard is not None:
                    self._take(*heard)
                self._on_tick(self)
        except Exception as error:
            self.error = error

    def _take(self, origin: bytes, envelope: wire.Envelope) -> None:
        sender = envelope.sender
        match envelope.message:
            case Hello(wants_reply=True):
                self._dealers[sender].say(self.peer, sender, Hello(self.layout, self.newest, False))
            case Leave(round_):
                self._dealers[sender].say(self.peer, sender, Leave(round_))
            case Pull() as pull:
                self.pulls.append(pull)
                self._on_pull(self, origin, sender, pull)

    def close(self) -> None:
        self._over.set()
        if self.is_alive():
            self.join()
        for attacker in (self._router, *self._dealers.values()):
            attacker.close()
        assert self.error is None, self.error


def raw_connection(address: str) -> socket.socket:
    """A plain TCP connection to a tcp:// address."""
    url = urlsplit(address)
    return socket.create_connection((url.hostname, url.port), timeout=DEADLINE_S)


# --- swarms -----------------------------------------------------------------------------------------------------------

TrainFunction = Callable[[str, int, np.ndarray], np.ndarray]


def drift(name: str, round_: int, vector: np.ndarray) -> np.ndarray:
    """A stand-in for training: each peer pulls towards its own corner."""
    return vector + np.float32(0.01 * (1 + sum(map(ord, name)) % 7))


def random_vectors(names: int | list[str], size: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    names = [f"p{index:02d}" for index in range(names)] if isinstance(names, int) else names
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(size).astype(np.float32) for name in names}


class Swarm:
    """Nodes with a stub for training, `per_endpoint` of them at each endpoint; this thread trains and collects.

    `others` are peers that are run by somebody else (an attacker, or nobody), with their addresses. Everybody is
    everybody's neighbour. `gossip` are settings of the protocol.
    """

    def __init__(
        self,
        vectors: Mapping[str, np.ndarray],
        rounds: int,
        *,
        per_endpoint: int = 1,
        train: TrainFunction = drift,
        others: Mapping[str, str] | None = None,
        bind: Callable[[], str] = lambda: "tcp://127.0.0.1:0",
        **gossip: object,
    ) -> None:
        self.train, self.rounds = train, rounds
        self.tasks: SimpleQueue = SimpleQueue()
        self.held: set[str] = set()  # peers that are not let finish their training
        self.held_at: dict[str, int] = {}  # the round for which a peer is not let finish its training
        self.heard: set[tuple[str, str]] = set()  # who has said something to whom, on a connection of its own
        self.waiting: dict[str, TrainTask] = {}
        self.final: dict[str, np.ndarray] = {}
        self.errors: dict[str, str | None] = {}
        self.reports: dict[str, list[RoundReport]] = {name: [] for name in vectors}
        self.faults: dict[str, list[Fault]] = {name: [] for name in vectors}
        self.first_pulls: Counter = Counter()
        self.data_frames: Counter = Counter()
        self.nodes: dict[str, Node] = {}
        self.loop_of: dict[str, MessageLoop] = {}
        self.loops: list[MessageLoop] = []
        self._seen: set = set()
        self._lock = threading.Lock()
        names = [*vectors, *(others or {})]
        size = next(iter(vectors.values())).size
        layout = Layout.of([("vector", (size,))])
        self.layout = layout.digest
        settings = GossipSettings(rounds=rounds, **gossip)  # type: ignore[arg-type]
        own = list(vectors)
        for first in range(0, len(own), per_endpoint):
            transport = ZmqTransport(bind(), run=RUN)
            transport.tap = self._tap
            endpoint = Endpoint(on_crash=self.tasks.put)
            loop = MessageLoop(transport, endpoint, "gossipfl-swarm")
            self.loops.append(loop)
            for name in own[first : first + per_endpoint]:
                degrees = {other: len(names) - 1 for other in names if other != name}
                node = build_node(
                    name, degrees, settings, layout, vectors[name], 1, transport, self.tasks, on_record=self._on_record
                )
                endpoint.add(node)
                self.nodes[name], self.loop_of[name] = node, loop
        self.addresses = {name: loop.transport.address for name, loop in self.loop_of.items()} | dict(others or {})
        for loop in self.loops:
            for name, address in self.addresses.items():
                loop.transport.connect(name, address)

    # --- what a test does ---------------------------------------------------------------------------------------------

    def start(self, *names: str) -> Swarm:
        """Start these peers (default: all)."""
        for loop in self.loops:
            if not loop.is_running and any(self.loop_of[name] is loop for name in names or self.nodes):
                loop.start()
        for name in names or self.nodes:
            self.loop_of[name].post(lambda node=self.nodes[name]: node.handle(Start()))
        return self

    def run_until(self, condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> Swarm:
        """Train whoever asks for it until `condition` holds. Fails if a loop crashes."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > deadline:
                phases = {name: (node.machine.phase.value, node.machine.round) for name, node in self.nodes.items()}
                raise AssertionError(f"not within {deadline_s:g} s: {phases}")
            with contextlib.suppress(Empty):
                self._perform(self.tasks.get(timeout=0.02))
        return self

    def run(self, *names: str, deadline_s: float = DEADLINE_S) -> Swarm:
        """Until these peers (default: all) have finished."""
        return self.run_until(lambda: set(names or self.nodes) <= set(self.final), deadline_s)

    def release(self, *names: str) -> None:
        """Let peers that were held finish their training (default: all)."""
        for name in names or self.nodes:
            self.held.discard(name)
            self.held_at.pop(name, None)
            if name in self.waiting:
                self._train(self.waiting.pop(name))

    def settle(self, name: str) -> None:
        """Wait until the loop of this peer has done what was asked of it so far."""
        done = threading.Event()
        self.loop_of[name].post(done.set)
        assert done.wait(DEADLINE_S), f"the loop of {name} does not answer"

    def until(self, name: str, condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
        """Wait until `condition`, seen between two turns of this peer's loop, holds; meanwhile train whoever asks."""
        deadline = time.monotonic() + deadline_s
        while True:
            answers: SimpleQueue = SimpleQueue()
            self.loop_of[name].post(lambda answers=answers: answers.put(condition()))
            if answers.get(timeout=DEADLINE_S):
                return
            assert time.monotonic() < deadline, f"not within {deadline_s:g} s at {name}"
            with contextlib.suppress(Empty):
                self._perform(self.tasks.get(timeout=0.005))

    def check_running(self) -> None:
        """Fails if anything was raised out of a loop."""
        while not self.tasks.empty():
            self._perform(self.tasks.get())
        assert all(loop.is_running for loop in self.loops)

    def close(self) -> None:
        for loop in self.loops:
            loop.stop(flush_s=0.05)

    def faults_about(self, peer: str) -> set[str]:
        return {fault.kind for faults in self.faults.values() for fault in faults if fault.peer == peer}

    # --- the shell ----------------------------------------------------------------------------------------------------

    def _perform(self, task: object) -> None:
        match task:
            case TrainTask(node, round_, _) if node.name in self.held or self.held_at.get(node.name) == round_:
                self.waiting[node.name] = task
            case TrainTask():
                self._train(task)
            case FinishTask(node, vector, error):
                self.final[node.name], self.errors[node.name] = vector, error
            case BaseException():
                raise AssertionError(f"raised out of the loop: {task!r}") from task

    def _train(self, task: TrainTask) -> None:
        node, round_ = task.node, task.round
        vector = self.train(node.name, round_, task.vector).astype(np.float32)
        self.loop_of[node.name].post(lambda: node.trained(round_, vector))

    def _on_record(self, node: Node, record: RoundDone | Fault) -> None:
        if isinstance(record, Fault):
            self.faults[node.name].append(record)
        else:
            self.reports[node.name].append(record.report)

    def _tap(self, incoming: Incoming) -> None:
        if incoming.origin is not None:
            self.heard.add((incoming.sender, incoming.recipient))
        match incoming.message:
            case Pull() as pull:
                with self._lock:
                    if (incoming.sender, pull.request) not in self._seen:
                        self._seen.add((incoming.sender, pull.request))
                        self.first_pulls[incoming.sender, incoming.recipient, pull.version, pull.ranges] += 1
            case Data() as data:
                with self._lock:
                    self.data_frames[incoming.sender, incoming.recipient, data.version, data.range, data.offset] += 1


def made_swarms() -> Iterator[Callable[..., Swarm]]:
    """Fixture: makes swarms and closes them when the test is over."""
    made: list[Swarm] = []

    def make(*arguments: object, **options: object) -> Swarm:
        made.append(Swarm(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for swarm in made:
        swarm.close()


# --- what is left over ------------------------------------------------------------------------------------------------


def open_files() -> int:
    return psutil.Process().num_fds()


def wait_for(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> bool:
    """Whether `condition` comes true in time: for what other threads do in their own time, such as closing sockets."""
    began = time.monotonic()
    deadline, collect_at = began + deadline_s, began
    tick = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            return False
        if time.monotonic() >= collect_at:  # it keeps the others from going on: a tenth of a second on a busy machine
            gc.collect()
            collect_at = time.monotonic() + 1.0
        tick.wait(0.01)
    return True
