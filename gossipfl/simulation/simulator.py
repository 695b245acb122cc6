"""A run under virtual time: the same machines as on sockets, and every message simulated.

    simulator = Simulator(names, make_machine, LazyLearning(...), codec, links, train_s)
    simulator.run()                       # until every peer has finished

How long training takes comes from the scenario's devices, so that what is learned may be computed later, or not at all
(`learning`). Headers are really encoded; payload passes by reference.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gossipfl.overlay.churn import Change
from gossipfl.overlay.links import Links
from gossipfl.protocol import wire
from gossipfl.protocol.machine import (
    Event,
    Fault,
    Finish,
    Forget,
    Merge,
    Merged,
    PeerDown,
    PeerUp,
    Publish,
    Received,
    Report,
    Send,
    Serve,
    Start,
    StopAfter,
    Traffic,
    Train,
    Trained,
    Wake,
)
from gossipfl.protocol.messages import PROMPT_BYTES, Data, Later, Message, PeerId, Pull
from gossipfl.randomness import generator
from gossipfl.segments.codecs import Codec
from gossipfl.simulation.clock import VirtualClock
from gossipfl.simulation.learning import Learning
from gossipfl.simulation.network import Network
from gossipfl.simulation.peer import ProtocolMachine, SimulatedPeer, Watcher

RUN = 1
"""The number of a simulated run in its headers: there are no other runs to be told apart from."""


class Simulator:
    """Runs the machines of a run. `train_s(index, round)` is how long a peer trains, in virtual seconds.

    `make_machine(name)` makes a peer's anew when it comes back after it was killed.
    """

    def __init__(
        self,
        names: Sequence[PeerId],
        make_machine: Callable[[PeerId], ProtocolMachine],
        learning: Learning,
        codec: Codec,
        links: Links,
        train_s: Callable[[int, int], float],
        *,
        seed: int = 0,
        watcher: Watcher | None = None,
        chunk_bytes: int = wire.MAX_PAYLOAD_BYTES,
    ) -> None:
        self.clock = VirtualClock()
        self.network = Network(links, self.clock, generator(seed, "network"))
        self.num_messages = 0
        self._make_machine, self._learning, self._codec = make_machine, learning, codec
        self._links, self._train_s, self._watcher, self._chunk_bytes = links, train_s, watcher or Watcher(), chunk_bytes
        self.peers: dict[PeerId, SimulatedPeer] = {
            name: SimulatedPeer(index, name, make_machine(name), learning.new_store(name), learning.initial)
            for index, name in enumerate(names)
        }
        self._by_index = list(self.peers.values())
        self._num_active = len(self.peers)  # there, or yet to come
        self.num_alive = 0  # there, or finished
        self._is_stopping = False

    # --- driving ------------------------------------------------------------------------------------------------------

    def start(self, name: PeerId, at: float = 0.0) -> None:
        """Have a peer join the run at this time; it is not there before."""
        self.clock.at(at, self._start, self.peers[name])

    def kill(self, name: PeerId, at: float) -> None:
        """Have a peer vanish with all that it knows; its neighbours see their connections break."""
        self.clock.at(at, self._kill, self.peers[name])

    def follow(self, changes: Iterator[Change]) -> None:
        """Have peers come and go as these changes say; there may be no end to them."""
        change = next(changes, None)
        if change is not None:
            self.clock.at(change.time_s, self._change, change, changes)

    def stop_after(self, round_: int) -> None:
        """End after this round; a peer that is past it, after the round that it is in. From now on nobody comes or goes."""
        self._is_stopping = True
        for peer in self.peers.values():
            self._handle(peer, StopAfter(round_))
        self._num_active = sum(peer.is_there for peer in self.peers.values())

    def run(self, until: float = math.inf, messages: float = math.inf) -> None:
        """Until every peer has finished or is gone for good, until then (virtual seconds), or until so many are delivered."""
        clock, network = self.clock, self.network
        with _rare_collections():
            while self._num_active and self.num_messages < messages:
                network.settle()
                next_time = clock.next_time
                if next_time is None or next_time > until:
                    return
                clock.advance()

    @property
    def has_only_newcomers(self) -> bool:
        """Somebody has finished, and nobody who is there has begun: they have come too late to take over a model."""
        peers = self.peers.values()
        has_finished = any(peer.is_finished and peer.error is None for peer in peers)
        return has_finished and not any(peer.is_there and peer.machine.round for peer in peers)

    # --- peers come and go --------------------------------------------------------------------------------------------

    def _change(self, change: Change, changes: Iterator[Change]) -> None:
        if self._is_stopping:
            return
        peer = self._by_index[change.index]
        (self._start if change.online else self._kill)(peer)
        self.follow(changes)

    def _start(self, peer: SimulatedPeer) -> None:
        if peer.is_there or peer.is_finished:
            return
        if peer.is_away:
            peer.machine = self._make_machine(peer.name)
            peer.wake_at, peer.is_away = None, False
            self._num_active += 1
        self.num_alive += 1
        peer.is_there = True
        for other in self._neighbours(peer):
            self.network.send(peer.index, other.index, self._handle, other, PeerUp(peer.name))
        self._handle(peer, Start())

    def _kill(self, peer: SimulatedPeer) -> None:
        if not peer.is_there:
            return
        peer.is_there, peer.is_away = False, True
        self._learning.lose(peer)
        self._num_active -= 1
        self.num_alive -= 1
        self._disconnect(peer)

    def _disconnect(self, peer: SimulatedPeer) -> None:
        self.network.cut(peer.index)
        for other in self._neighbours(peer):
            latency = self._links.latency(peer.index, other.index)
            self.clock.at(self.clock.now + latency, self._handle, other, PeerDown(peer.name))

    def _neighbours(self, peer: SimulatedPeer) -> Iterable[SimulatedPeer]:
        """Those that have begun and not finished: the others have no connection to be told of."""
        for name in peer.machine.membership.neighbours:
            other = self.peers[name]
            if other.is_there:
                yield other

    # --- the shell of a machine ---------------------------------------------------------------------------------------

    def _handle(self, peer: SimulatedPeer, event: Event) -> None:
        if peer.is_there:
            self._carry_out(peer, peer.machine.handle(event, self.clock.now))

    def _carry_out(self, peer: SimulatedPeer, actions: list[Any]) -> None:
        """What the machine has decided, and what follows from that."""
        now = self.clock.now
        following = [happened for action in actions if (happened := self._perform(peer, action)) is not None]
        for happened in following:
            for action in peer.machine.handle(happened, now):
                next_ = self._perform(peer, action)
                if next_ is not None:
                    following.append(next_)
        deadline = peer.machine.next_deadline
        if deadline is not None and (peer.wake_at is None or deadline < peer.wake_at):
            peer.wake_at = deadline
            self.clock.at(deadline, self._wake, peer, deadline)

    def _wake(self, peer: SimulatedPeer, planned: float) -> None:
        """A deadline may have moved since it was planned; what is planned is never later than it."""
        if peer.wake_at != planned:
            return
        peer.wake_at = None
        deadline = peer.machine.next_deadline
        if deadline is None:
            return
        if deadline <= self.clock.now:
            self._handle(peer, Wake())
        else:
            peer.wake_at = deadline
            self.clock.at(deadline, self._wake, peer, deadline)

    def _perform(self, peer: SimulatedPeer, action: Any) -> Event | None:
        match action:  # by type alone: patterns that take an action apart take ten times as long
            case Send():
                self._send(peer, action.peer, action.message)
            case Serve():
                self._serve(peer, action.peer, action.pull, action.version)
            case Merge():
                self._learning.merge(peer, action)
                return Merged(action.round, action.segment)
            case Train():
                self._train(peer, action.round)
            case Publish():
                self._learning.publish(peer, action.version)
            case Report():
                if isinstance(action.record, Fault):
                    self._watcher.fault(peer, action.record)
                else:
                    traffic, peer.traffic = peer.traffic, Traffic()
                    self._watcher.round_done(peer, action.record, traffic)
            case Finish():
                self._finish(peer, action.error)
            case Forget():
                pass  # nothing is assembled here
        return None

    def _finish(self, peer: SimulatedPeer, error: str | None) -> None:
        peer.error = error
        self.num_alive -= error is not None
        self._learning.vector(peer)
        peer.is_there, peer.is_finished = False, True
        self._num_active -= 1
        self._watcher.finished(peer)
        self._disconnect(peer)

    # --- messages -----------------------------------------------------------------------------------------------------

    def _send(self, peer: SimulatedPeer, to: PeerId, message: Message) -> None:
        header = wire.encode(RUN, peer.name, to, message)
        receiver = self.peers[to]
        self.network.send(peer.index, receiver.index, self._deliver, peer, receiver, message, len(header))

    def _deliver(self, sender: SimulatedPeer, receiver: SimulatedPeer, message: Message, num_bytes: int) -> None:
        if not receiver.is_there:
            return
        self.num_messages += 1
        traffic = receiver.traffic
        traffic.wire_bytes += num_bytes
        if type(message) is Data:
            received_from = traffic.received_from
            received_from[sender.name] = received_from.get(sender.name, 0) + message.num_bytes
        else:
            traffic.control_bytes += num_bytes
        actions = receiver.machine.handle(Received(sender.name, message), self.clock.now)
        if not actions:
            return
        if type(message) is Pull:  # no deadline comes nearer by that, and looking for the nearest takes longer than all else
            for action in actions:
                self._perform(receiver, action)
        else:
            self._carry_out(receiver, actions)

    def _serve(self, peer: SimulatedPeer, to: PeerId, pull: Pull, version: int) -> None:
        """The chunks of an answer, as `Node._serve` sends them."""
        receiver = self.peers[to]
        flow = self.network.flow(peer.index, receiver.index)
        ahead = 0
        if flow is not None and flow.is_active:
            queued = flow.bytes_queued(pull.request)
            if queued:  # a repeat of what is on its way already
                self._send(peer, to, Later(pull.request, queued))
                return
            ahead = flow.bytes_queued()
        sizes = [self._codec.num_bytes(stop - start) for start, stop in pull.ranges]
        total = sum(sizes)
        if ahead or total > PROMPT_BYTES:
            self._send(peer, to, Later(pull.request, ahead + total))
        newest, num_samples = peer.machine.desk.newest, peer.machine.config.num_samples
        resumed = pull.offset if version == pull.version else 0
        request, stream = pull.request, self.network.stream
        for range_, size in zip(pull.ranges, sizes, strict=True):
            values = self._learning.read(peer, version, range_)
            for offset, end in _chunks(size, resumed, self._chunk_bytes):
                payload, num_bytes = values if end == size else None, end - offset
                data = Data(request, version, newest, num_samples, range_, offset, size, num_bytes, payload)
                wire_bytes = len(wire.encode(RUN, peer.name, to, data)) + num_bytes
                stream(peer.index, receiver.index, request, num_bytes, self._deliver, peer, receiver, data, wire_bytes)
            resumed = 0

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(self, peer: SimulatedPeer, round_: int) -> None:
        self._learning.train(peer, round_)
        self.clock.at(self.clock.now + self._train_s(peer.index, round_), self._trained, peer, peer.machine, round_)

    def _trained(self, peer: SimulatedPeer, machine: ProtocolMachine, round_: int) -> None:
        if peer.is_away or peer.machine is not machine:
            return
        self._handle(peer, Trained(round_, machine.config.num_samples))
        self._learning.retain(peer, machine.desk.versions)


def _chunks(size: int, resumed: int, chunk_bytes: int) -> Iterable[tuple[int, int]]:
    """Where the chunks of a range of `size` encoded bytes begin and end, from the byte `resumed` on, or the last one."""
    if size <= chunk_bytes and not resumed:
        return ((0, size),)
    first = min(resumed, size - 1)
    starts = range(first - first % chunk_bytes, size, chunk_bytes)
    return [(max(start, first), min(start + chunk_bytes, size)) for start in starts]


_usual_thresholds: list[tuple[int, int, int]] = []
"""Of the collector of garbage, once for each simulator that runs, for a program may run several in threads."""
_thresholds_lock = threading.Lock()


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Messages make no cycles; looking for some among all that lives takes a third of the time."""
    with _thresholds_lock:
        usual = _usual_thresholds[0] if _usual_thresholds else gc.get_threshold()
        _usual_thresholds.append(usual)
        gc.freeze()
        gc.set_threshold(min(1000 * usual[0], 2**31 - 1), *usual[1:])
    try:
        yield
    finally:
        with _thresholds_lock:
            _usual_thresholds.pop()
            if not _usual_thresholds:
                gc.set_threshold(*usual)
                gc.unfreeze()
