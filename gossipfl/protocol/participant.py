"""Taking part in a run, whatever is done in its rounds: joining it, answering pulls, leaving it. The base of the machines.

    phase      event                                      next                      actions
    JOINING    Start, Hello, Wake                         TRAINING on a quorum      Hello until answered
    any        Pull                                       same                      Serve, Later or Refuse (`serving.py`)
    LINGERING  Leave from all live neighbours met; Wake   DONE                      keep serving; Finish

Nobody waits for all: who has heard from a quorum of its neighbours when `join_timeout_s` is over begins without the others,
and who finds the others under way adopts the newest model. Who is joining when the run is to stop waits a moment more.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gossipfl.protocol.machine import Action, Fault, Finish, Report, Send
from gossipfl.protocol.membership import HELLO_INTERVAL_S, MIN_ANSWER_S, Membership, Neighbour
from gossipfl.protocol.messages import Hello, Leave, PeerId, Pull, Range, Refuse
from gossipfl.protocol.serving import PullDesk

MAX_STRANGERS = 64
"""Strangers that are reported, each once."""
MAX_NAMED = 10
"""Neighbours that a message names; there may be a thousand."""


class Phase(Enum):
    JOINING = "joining"
    TRAINING = "training"
    GATHERING = "gathering"
    LINGERING = "lingering"
    DONE = "done"


@dataclass(frozen=True)
class GossipConfig:
    """What one peer of a run goes by. Times are in seconds."""

    rounds: int
    segments: tuple[Range, ...]
    layout: str
    num_samples: int
    seed: int = 0
    replicas: int = 2
    codec: str = "float32"
    mixing: str = "data_size"
    selection: str = "uniform"
    exploration: float = 0.5
    max_staleness: float = 0
    staleness_exponent: float = 0.5
    patience_s: float | None = None  # None: max(10 s, 4 x own training time)
    versions_kept: int = 4
    linger_s: float = 10.0
    join_timeout_s: float = 30.0
    quorum: int | None = None  # neighbours that must answer; None: half of them, rounded up
    late: frozenset[PeerId] = frozenset()  # neighbours that are not there at the start
    schedule: Sequence[Mapping[PeerId, int]] | None = None  # the neighbours of round 1, 2, ... with their degrees; then again


class Participant(ABC):
    """A machine but for its rounds. `degrees` maps each neighbour to its own number of neighbours."""

    def __init__(self, name: PeerId, degrees: Mapping[PeerId, int], config: GossipConfig) -> None:
        self.name = name
        self.config = config
        self.phase = Phase.JOINING
        self.round = 0
        quorum = math.ceil(len(degrees) / 2) if config.quorum is None else config.quorum
        self.membership = Membership(name, config.layout, degrees, quorum, config.late)
        self.desk = PullDesk(config.versions_kept)
        self._segment_of = {range_: index for index, range_ in enumerate(config.segments)}
        self._reported: set[tuple[PeerId, str]] = set()  # in this round
        self._strangers: set[PeerId] = set()
        self._wake_at: float | None = None  # hello or leave again
        self._give_up_at = math.inf  # joining or lingering
        self._joins_since = 0.0
        self._unmet_until: float | None = None  # lingering for those that were never met
        self._leave_again_s = HELLO_INTERVAL_S

    @abstractmethod
    def _train(self, round_: int, now: float) -> list[Action]:
        """Begin this round."""

    @abstractmethod
    def _adopt(self, now: float) -> list[Action]:
        """Take over the newest known version and go on from its round."""

    # --- joining ------------------------------------------------------------------------------------------------------

    def _join(self, now: float) -> list[Action]:
        if not self.membership.neighbours:
            lone = Fault(0, self.name, "lone", f"{self.name} has no neighbours and trains alone")
            return [Report(lone), *self._train(1, now)]
        if self.phase is not Phase.JOINING:
            return []  # all whom it waits for had greeted it before it was told to begin
        self._joins_since, self._give_up_at = now, now + self.config.join_timeout_s
        return self._begin(now) if self.membership.all_answered else self._greet(now)

    def _join_soon(self, now: float) -> None:
        """The run is to stop: only who is about to answer is waited for."""
        if self.phase is Phase.JOINING:
            self._give_up_at = min(self._give_up_at, now + MIN_ANSWER_S)

    def _greet(self, now: float) -> list[Action]:
        self._wake_at = now + HELLO_INTERVAL_S
        hello = self.membership.hello(self.desk.newest, wants_reply=True)
        return [Send(name, hello) for name in self.membership.unanswered]

    def _greeted(self, peer: PeerId, hello: Hello, now: float) -> list[Action]:
        actions: list[Action] = []
        if not self.membership.greeted(peer, hello):
            detail = f"{peer} has the model layout {hello.layout}, {self.name} has {self.config.layout}; give them one model"
            actions.append(Report(Fault(self.round, peer, "layout", detail)))
        if hello.wants_reply:
            actions.append(Send(peer, self.membership.hello(self.desk.newest, wants_reply=False)))
        if self.phase is Phase.JOINING:
            under_way = self.membership.claimed > 0 and self.membership.newest > 0 and self.membership.has_quorum
            if under_way or self.membership.all_answered:
                actions += self._begin(now)
        return actions

    def _begin_without_all(self, now: float) -> list[Action]:
        missing, waited_s = _listed(self.membership.unanswered), round(now - self._joins_since, 1)
        if not self.membership.has_quorum:
            return self._finish(
                f"{self.name}: no answer from {missing} within {waited_s:g} s; they are not there, or have finished already: "
                "have all peers start within gossip.join_timeout_s of each other"
            )
        detail = f"{missing} did not answer within {waited_s:g} s; starting without"
        return [Report(Fault(0, self.name, "absent", detail)), *self._begin(now)]

    def _begin(self, now: float) -> list[Action]:
        if not self.membership.has_quorum:
            foreign = _listed([n.name for n in self.membership.neighbours.values() if n.foreign])
            if not foreign:
                gone = _listed([n.name for n in self.membership.neighbours.values() if not n.is_live])
                return self._finish(f"{self.name}: too few neighbours are left to begin with; gone: {gone}")
            return self._finish(f"{self.name}: too few neighbours share its model's layout; another one has {foreign}")
        for name in self.membership.unanswered:
            self.membership.neighbours[name].away = True
        if self.membership.newest > self.config.versions_kept:
            return self._adopt(now)
        return self._train(1, now)

    def _peer_up(self, peer: PeerId) -> list[Action]:
        neighbour = self.membership.neighbours.get(peer)
        if neighbour is not None and neighbour.away:
            return [Send(peer, self.membership.hello(self.desk.newest, wants_reply=True))]
        return []

    # --- answering ----------------------------------------------------------------------------------------------------

    def _answer(self, peer: PeerId, pull: Pull, now: float) -> list[Action]:
        self.membership.heard(peer)
        strange = [range_ for range_ in pull.ranges if range_ not in self._segment_of]
        if strange or pull.codec != self.config.codec:
            size, number = self.config.segments[-1][1], len(self.config.segments)
            detail = f"{peer} pulls {(strange or pull.ranges)[0]} as {pull.codec!r}, and {self.name} has {number} segments of "
            detail += f"{size} values, sent as {self.config.codec!r}; give them one scenario"
            refusal = Refuse(pull.request, self.desk.oldest, self.desk.newest)
            return [*self._once(Fault(self.round, peer, "bad_pull", detail)), Send(peer, refusal)]
        return self.desk.answer(peer, pull, now, may_train=self.phase is not Phase.LINGERING)

    def _once(self, fault: Fault) -> list[Action]:
        """Report this kind of fault of this peer once a round: reports must not fill the disk."""
        if (fault.peer, fault.kind) in self._reported:
            return []
        self._reported.add((fault.peer, fault.kind))
        return [Report(fault)]

    def _turn_away(self, peer: PeerId, message: object) -> list[Action]:
        """A stranger is reported once, and not at all where there are too many: reports must not fill the disk."""
        if peer in self._strangers or len(self._strangers) >= MAX_STRANGERS:
            return []
        self._strangers.add(peer)
        return [Report(Fault(self.round, peer, "stranger", f"{type(message).__name__} from a peer that is no neighbour"))]

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _linger(self, now: float, round_s: float) -> list[Action]:
        """Serve on after the last round, which took `round_s`.

        Neighbours that it has met say Leave when they need it no more. Of one that it never met it hears nothing before that
        one asks, if it ever does: it may be a round behind, but hardly more, for those who drew it have waited for it.
        """
        self.phase = Phase.LINGERING
        self._give_up_at = now + self.config.linger_s
        self._unmet_until = now + round_s
        return [*self.desk.close(now), *self._say_leave(now), *self._finish_if_alone()]

    def _say_leave(self, now: float) -> list[Action]:
        """Again after 1, 2, 4, ... seconds, for it may be lost: where everybody is a neighbour, there are many to say it to."""
        self._wake_at, self._leave_again_s = now + self._leave_again_s, 2 * self._leave_again_s
        return [self._leave(n) for n in self.membership.neighbours.values() if n.is_live and n.met]

    def _leave(self, neighbour: Neighbour) -> Action:
        neighbour.is_told = True
        return Send(neighbour.name, Leave(self.round))

    def _left(self, peer: PeerId, now: float) -> list[Action]:
        neighbour = self.membership.heard(peer)
        neighbour.gone = True
        returned = [] if neighbour.is_told or self.phase is not Phase.LINGERING else [self._leave(neighbour)]  # met only now
        return [*returned, *self._finish_if_alone()]

    def _finish_if_alone(self) -> list[Action]:
        if self.phase is not Phase.LINGERING:
            return []
        present = (neighbour for neighbour in self.membership.neighbours.values() if neighbour.is_live and not neighbour.gone)
        waited_for = any(neighbour.met or self._unmet_until is not None for neighbour in present)
        return [] if waited_for else self._finish()

    def _wake_lingering(self, now: float) -> list[Action]:
        if now >= self._give_up_at:
            return self._finish()
        if self._unmet_until is not None and now >= self._unmet_until:
            self._unmet_until = None
            if finished := self._finish_if_alone():
                return finished
        return self._say_leave(now) if self._wake_at is not None and now >= self._wake_at else []

    def _finish(self, error: str | None = None) -> list[Action]:
        self.phase = Phase.DONE
        return [Finish(error)]


def _listed(names: Sequence[PeerId]) -> str:
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
