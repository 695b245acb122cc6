"""Segmented gossip, as a pure machine. Read it beside the paper:

    C. Hu, J. Jiang, Z. Wang: "Decentralized Federated Learning: A Segmented Gossip Approach", arXiv 1908.07782 (2019).

    the paper, one synchronous round of worker i                         here
    1. run local SGD from the mixed model, giving W_i                    Train(r) ... Trained(r)
    2. for every segment l = 1..S draw R other workers at random,        `_gather`: one Pull per chosen neighbour,
       afresh for each segment, and pull W_j[l] from each                naming its ranges
       (a worker serves once its local training is finished)             `PullDesk`: Serve, or Later and park
    3. W~_i[l] = (|D_i| W_i[l] + SUM |D_j| W_j[l])                       `_merge`: as soon as a segment's R copies are in
                 / (|D_i| + SUM |D_j|)
    4. rebuild W~_i from its segments; the next round starts from it     all Merged -> Train(r + 1)

`num_segments` is S, `replicas` is R, a peer's weight is its number of training samples |D_i|.

What the paper leaves open, and how it is settled:

    phase      event                                      next                      actions
    JOINING    Start, Hello, Wake                         TRAINING on a quorum      Hello until answered
    TRAINING   Trained(r)                                 GATHERING                 publish r; draw; Pull
    GATHERING  Later                                      same                      it lives: wait within the round's patience
    GATHERING  Data                                       same                      progress; a range's last chunk completes it
    GATHERING  a segment's copies are in                  same                      Merge at once
    GATHERING  Refuse, Rejected, PeerDown, late Wake      same                      the missing ranges from a neighbour not
                                                                                    tried yet; none left: merge with fewer
    GATHERING  every segment Merged(r)                    TRAINING or LINGERING     Train(r + 1)
    LINGERING  Leave from every live neighbour, or Wake   DONE                      keep serving; Finish
    any        Pull                                       same                      Serve, Later or Refuse (`serving.py`)

Deadlines. One patience budget per round, from Trained, bounds the waiting for versions that are not trained yet; after it,
replacements take the newest stored version and nothing waits again. A first answer is due within an adaptive time
(`membership.py`), and within the patience. A transfer that progresses is not cut off by either (`transfers.py`): after a
silence its pull is repeated at the same neighbour, which resumes it, and only a second silence, or a crawl, ends it.

Far behind. Who finds itself more than `versions_kept` rounds behind a neighbour adopts the newest model, by segments from
several peers, and jumps to its round: a slow peer is never left to train alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

from gossipfl.overlay.selection import SELECTORS, exploring
from gossipfl.protocol.membership import HELLO_INTERVAL_S, MIN_ANSWER_S, Membership
from gossipfl.protocol.messages import (
    MAX_RANGES,
    NEWEST,
    Action,
    Contribution,
    Data,
    Event,
    Fault,
    Finish,
    Forget,
    Hello,
    Later,
    Leave,
    Merge,
    Merged,
    PeerDown,
    PeerId,
    PeerUp,
    Pull,
    Range,
    Received,
    Refuse,
    Rejected,
    Report,
    RoundReport,
    Send,
    Start,
    StopAfter,
    Train,
    Trained,
    Wake,
    by_peer,
)
from gossipfl.protocol.serving import PullDesk
from gossipfl.protocol.transfers import Transfer
from gossipfl.randomness import generator
from gossipfl.registry import Registry

MIN_PATIENCE_S = 10.0
PATIENCE_IN_TRAININGS = 4
MAX_SAMPLES = 2**40
MIXINGS = ("data_size", "uniform", "metropolis_hastings")


MAX_STRANGERS = 64
"""Strangers that are reported, each once."""


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


@dataclass(slots=True)
class _Segment:
    """One segment in the round being gathered."""

    wanted: int
    tried: set[PeerId]
    copies: list[Contribution] = field(default_factory=list)
    is_merging: bool = False


PROTOCOLS: Registry[Callable[[PeerId, Mapping[PeerId, int], GossipConfig, Iterator[int]], Gossip]] = Registry("protocol")


@PROTOCOLS.register("gossip")
class Gossip:
    """The machine of one peer.

    `degrees` maps each neighbour to its own number of neighbours. `numbers` yields the numbers of requests, each once; where
    others may lie they should not be guessable, for who guesses one may ask in this peer's name.
    """

    def __init__(
        self, name: PeerId, degrees: Mapping[PeerId, int], config: GossipConfig, numbers: Iterator[int] | None = None
    ) -> None:
        assert 1 <= config.num_samples <= MAX_SAMPLES, config.num_samples
        self.name = name
        self.config = config
        self.phase = Phase.JOINING
        self.round = 0
        self.last_round = config.rounds
        quorum = math.ceil(len(degrees) / 2) if config.quorum is None else config.quorum
        self.membership = Membership(name, config.layout, degrees, quorum, config.late)
        self.desk = PullDesk(config.versions_kept)
        self.report = RoundReport(0)
        self._segment_of = {range_: index for index, range_ in enumerate(config.segments)}
        self._segments: list[_Segment] = []
        self._num_merged = 0
        self._transfers: dict[int, Transfer] = {}
        self._finished_rates: list[float] = []
        self._numbers = numbers or count(1)
        self._reported: set[tuple[PeerId, str]] = set()  # in this round
        self._began = 0.0  # training, then gathering
        self._patience_s = MIN_PATIENCE_S
        self._patience_end = 0.0
        self._strangers: set[PeerId] = set()
        self._wake_at: float | None = None  # hello or leave again
        self._give_up_at = math.inf  # joining or lingering

    # --- driving ------------------------------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float | None:
        match self.phase:
            case Phase.GATHERING | Phase.TRAINING:
                return min([transfer.deadline for transfer in self._transfers.values()], default=None)
            case Phase.JOINING | Phase.LINGERING:
                return None if self._wake_at is None else min(self._wake_at, self._give_up_at)
        return None

    def handle(self, event: Event, now: float) -> list[Action]:
        if self.phase is Phase.DONE:
            return []
        match event:  # by type alone: patterns that take an event apart take ten times as long
            case Received():
                return self._receive(event.peer, event.message, now)
            case Merged():
                return self._merged(event.round, event.segment, now)
            case Trained():
                return self._gather(event.round, event.num_samples, now)
            case Wake():
                return self._wake(now)
            case Rejected():
                return self._reject(event.peer, event.request, event.reason, now)
            case PeerDown():
                return self._peer_down(event.peer, now)
            case PeerUp():
                return self._peer_up(event.peer)
            case Start():
                return self._join(now)
            case StopAfter():
                self.last_round = min(self.last_round, max(event.round, 1))
                return []

    def _receive(self, peer: PeerId, message: object, now: float) -> list[Action]:
        if peer not in self.membership.neighbours:
            return self._turn_away(peer, message)
        match message:
            case Data():
                return self._take(peer, message, now)
            case Pull():
                return self._answer(peer, message, now)
            case Later():
                return self._wait(peer, message.request, message.bytes_queued, now)
            case Refuse():
                return self._refused(peer, message.request, message.newest, now)
            case Hello():
                return self._greeted(peer, message, now)
            case Leave():
                return self._left(peer, now)
        return []

    def _wake(self, now: float) -> list[Action]:
        match self.phase:
            case Phase.JOINING if now >= self._give_up_at:
                return self._begin_without_all(now)
            case Phase.JOINING if self._wake_at is not None and now >= self._wake_at:
                return self._greet(now)
            case Phase.TRAINING | Phase.GATHERING:
                due = [transfer for transfer in self._transfers.values() if transfer.deadline <= now]
                return [action for transfer in due for action in self._overdue(transfer, now)]
            case Phase.LINGERING if now >= self._give_up_at:
                return self._finish()
            case Phase.LINGERING if self._wake_at is not None and now >= self._wake_at:
                return self._say_leave(now)
        return []

    def _turn_away(self, peer: PeerId, message: object) -> list[Action]:
        """A stranger is reported once, and not at all where there are too many: reports must not fill the disk."""
        if peer in self._strangers or len(self._strangers) >= MAX_STRANGERS:
            return []
        self._strangers.add(peer)
        return [Report(Fault(self.round, peer, "stranger", f"{type(message).__name__} from a peer that is no neighbour"))]

    # --- joining ------------------------------------------------------------------------------------------------------

    def _join(self, now: float) -> list[Action]:
        if not self.membership.neighbours:
            lone = Fault(0, self.name, "lone", f"{self.name} has no neighbours and trains alone")
            return [Report(lone), *self._train(1, now)]
        if self.phase is not Phase.JOINING:
            return []  # all whom it waits for had greeted it before it was told to begin
        self._give_up_at = now + self.config.join_timeout_s
        return self._begin(now) if self.membership.all_answered else self._greet(now)

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
        missing = ", ".join(self.membership.unanswered)
        if not self.membership.has_quorum:
            return self._finish(f"{self.name}: no answer from {missing} within {self.config.join_timeout_s:g} s")
        detail = f"{missing} did not answer within {self.config.join_timeout_s:g} s; starting without"
        return [Report(Fault(0, self.name, "absent", detail)), *self._begin(now)]

    def _begin(self, now: float) -> list[Action]:
        if not self.membership.has_quorum:
            foreign = ", ".join(n.name for n in self.membership.neighbours.values() if n.foreign)
            return self._finish(f"{self.name}: too few neighbours share its model's layout; another one has {foreign}")
        for name in self.membership.unanswered:
            self.membership.neighbours[name].away = True
        if self.membership.newest > self.config.versions_kept:
            return self._adopt(now)
        return self._train(1, now)

    # --- one round (the paper's steps 1 to 4) -------------------------------------------------------------------------

    def _train(self, round_: int, now: float) -> list[Action]:
        self.phase, self.round, self._began = Phase.TRAINING, round_, now
        return [Train(round_)]

    def _gather(self, round_: int, num_samples: int, now: float) -> list[Action]:
        """Training is done: publish, draw R neighbours for each of S segments, pull (steps 1 and 2)."""
        assert self.phase is Phase.TRAINING and round_ == self.round and num_samples == self.config.num_samples
        train_s = now - self._began
        actions = self._open_round(round_, now, train_s)
        actions += self._offer(round_, now)
        chosen = self._choose(round_)
        return actions + self._ask(chosen, now)

    def _offer(self, round_: int, now: float) -> list[Action]:
        """What has been trained may be pulled from now on."""
        return self.desk.publish(round_, now, self.membership.oldest_needed)

    def _choose(self, round_: int) -> list[list[PeerId]]:
        """The neighbours that each segment is pulled from, drawn afresh for each."""
        candidates = self._candidates()
        rng = generator(self.config.seed, "neighbours", self.name, round_)
        select, links = SELECTORS.get(self.config.selection), self.membership.neighbours
        if self.config.selection == "bandwidth":
            select = exploring(select, self.config.exploration)
        chosen = [select(candidates, self.config.replicas, links, rng) for _ in self.config.segments]
        if self.config.selection != "all":
            expected = min(self.config.replicas, len(self._degrees))
            self.report.missing += sum(expected - len(peers) for peers in chosen)
        return chosen

    def _candidates(self) -> list[PeerId]:
        candidates = self.membership.candidates(at_least=self.config.replicas)
        return candidates if self.config.schedule is None else [peer for peer in candidates if peer in self._degrees]

    @property
    def _degrees(self) -> Mapping[PeerId, int]:
        """The neighbours of this round, and how many each of them has."""
        schedule = self.config.schedule
        return self.membership.degrees if schedule is None else schedule[(self.round - 1) % len(schedule)]

    def _open_round(self, round_: int, now: float, train_s: float) -> list[Action]:
        """Close what is left of an earlier gathering and start a new one."""
        actions: list[Action] = [Forget(transfer.peer, request) for request, transfer in self._transfers.items()]
        self._transfers.clear()
        self.phase, self.round, self._began = Phase.GATHERING, round_, now
        self._patience_s = self.config.patience_s or max(MIN_PATIENCE_S, PATIENCE_IN_TRAININGS * train_s)
        self._patience_end = now + self._patience_s
        late = self.report.late if self.report.round == 0 else 0
        self.report = RoundReport(round_, train_s=train_s, late=late)
        self._finished_rates.clear()
        self._reported.clear()
        return actions

    def _ask(self, chosen: Sequence[Sequence[PeerId]], now: float) -> list[Action]:
        """Pull segment i from each of `chosen[i]`."""
        self._segments = [_Segment(wanted=len(peers), tried=set(peers)) for peers in chosen]
        self._num_merged = 0
        ranges: dict[PeerId, list[Range]] = {}
        for range_, peers in zip(self.config.segments, chosen, strict=True):
            for peer in peers:
                ranges.setdefault(peer, []).append(range_)
        actions = [action for peer in sorted(ranges) for action in self._pull(peer, ranges[peer], now)]
        for index in range(len(self._segments)):
            actions += self._merge_if_complete(index)
        return actions

    def _pull(self, peer: PeerId, ranges: Sequence[Range], now: float) -> list[Action]:
        version, oldest = self._version_wanted(now)
        expires_s = max(self._patience_end - now, 1.0)
        deadline = now + min(self.membership.neighbours[peer].answer_deadline_s, self._patience_left_s(now))
        actions: list[Action] = []
        for first in range(0, len(ranges), MAX_RANGES):
            some = tuple(ranges[first : first + MAX_RANGES])
            pull = Pull(next(self._numbers), version, oldest, some, self.config.codec, expires_s)
            self._transfers[pull.request] = Transfer(peer, pull, now, deadline, dict.fromkeys(some, 0))
            actions.append(Send(peer, pull))
        return actions

    def _patience_left_s(self, now: float) -> float:
        """How long a first answer may take at most, however long its peer has been silent before: what is left of the patience,
        or of the time after it in which replacements are asked; not less than a healthy peer may need."""
        end = self._patience_end if now < self._patience_end else self._patience_end + self._patience_s
        return max(end - now, min(MIN_ANSWER_S, self._patience_s))

    def _version_wanted(self, now: float) -> tuple[int, int]:
        """`(version, oldest)` to ask for now."""
        if now >= self._patience_end:
            return NEWEST, NEWEST
        if self.report.adopted:
            return self.round, max(1, self.round - self.config.versions_kept)
        if math.isinf(self.config.max_staleness):
            return NEWEST, 1
        return self.round, max(1, self.round - int(self.config.max_staleness))

    def _take(self, peer: PeerId, data: Data, now: float) -> list[Action]:
        """A chunk came: note the progress; a range's last chunk completes one copy of its segment."""
        neighbour = self.membership.heard(peer, data.newest)
        is_last = data.is_last
        transfer = self._transfers.get(data.request)
        if transfer is None or transfer.peer != peer or data.range not in transfer.missing:
            self.report.repeated_bytes += data.num_bytes
            self.report.late += is_last
            return []
        neighbour.num_samples = neighbour.num_samples or data.num_samples
        if not 1 <= data.num_samples <= MAX_SAMPLES or data.num_samples != neighbour.num_samples:
            reason = f"claims {data.num_samples} training samples, first claimed {neighbour.num_samples}"
            return self._reject(peer, data.request, reason, now)
        if data.version < transfer.pull.oldest:
            reason = f"version {data.version} is older than {transfer.pull.oldest}"
            return self._reject(peer, data.request, reason, now)
        self._answered(transfer, now)
        self.report.repeated_bytes += transfer.begin(data)
        if not transfer.continues_with(data):
            self.report.repeated_bytes += data.num_bytes
            return []
        if is_last and data.payload is None:
            return self._reject(peer, data.request, f"the end of {data.range} came without its beginning", now)
        transfer.advance(data, now)
        self.report.payload_bytes += data.num_bytes
        if transfer.missing:
            transfer.flows(now, neighbour.answer_deadline_s, self._patience_s)
        else:
            del self._transfers[data.request]
            self._finished_rates.append(transfer.rate(now))
            neighbour.transferred(transfer.link_rate(now))
        if not is_last:
            return self._give_up(transfer, now) if self._crawls(transfer, now) else []
        if self._is_far_behind and not self.report.adopted:
            return self._fall_behind(now)
        return self._copy_is_in(peer, data)

    def _copy_is_in(self, peer: PeerId, data: Data) -> list[Action]:
        index, report = self._segment_of[data.range], self.report
        segment = self._segments[index]
        staleness = max(0, self.round - data.version)
        report.segments_mixed += 1
        report.staleness_sum += staleness
        report.staleness_max = max(report.staleness_max, staleness)
        segment.copies.append(Contribution(peer, data.payload, self._weight(peer, data.num_samples, staleness), staleness))
        return self._merge_if_complete(index)

    def _weight(self, peer: PeerId, num_samples: int, staleness: int) -> float:
        """|D_j|, or 1, or the Metropolis-Hastings weight; a stale copy counts less (Xie et al., FedAsync, 2019)."""
        match self.config.mixing:
            case "data_size":
                weight = float(num_samples)
            case "uniform":
                weight = 1.0
            case _:
                weight = 1 / (1 + max(len(self._degrees), self._degrees.get(peer, 0)))
        return weight * (1 + staleness) ** -self.config.staleness_exponent if staleness else weight

    def _own_weight(self, contributions: Iterable[Contribution]) -> float:
        match self.config.mixing:
            case "data_size":
                return float(self.config.num_samples)
            case "uniform":
                return 1.0
            case _:
                return 1 - sum(contribution.weight for contribution in contributions)

    def _merge_if_complete(self, index: int) -> list[Action]:
        segment = self._segments[index]
        if len(segment.copies) < segment.wanted or segment.is_merging:
            return []
        return self._merge(index)

    def _merge(self, index: int) -> list[Action]:
        """Step 3: mix one segment, at once: less memory, and no burst at the end of the round."""
        segment = self._segments[index]
        segment.is_merging = True
        contributions = by_peer(segment.copies)
        segment.copies = []
        own_weight = 0.0 if self.report.adopted and contributions else self._own_weight(contributions)
        return [Merge(self.round, index, contributions, own_weight)]

    def _merged(self, round_: int, index: int, now: float) -> list[Action]:
        """Step 4: when every segment is merged the round is over."""
        if self.phase is not Phase.GATHERING or round_ != self.round:
            return []
        self._num_merged += 1
        if self._num_merged < len(self._segments):
            return []
        self.report.wait_s = now - self._began
        done = self._round_done(now)
        self.report = RoundReport(0)  # what still comes in counts towards the next round
        if round_ >= self.last_round:
            return done + self._linger(now)
        return done + self._train(round_ + 1, now)

    def _round_done(self, now: float) -> list[Action]:
        return [Report(self.report)]

    # --- waiting, and what goes wrong ---------------------------------------------------------------------------------

    def _answered(self, transfer: Transfer, now: float) -> None:
        if not transfer.is_answered:
            transfer.is_answered = True
            self.membership.neighbours[transfer.peer].answered_after(now - transfer.asked_at)

    def _wait(self, peer: PeerId, request: int, bytes_queued: int, now: float) -> list[Action]:
        """Later: that neighbour lives. Wait for its training within the patience, for its queue as for a transfer."""
        neighbour = self.membership.heard(peer)
        transfer = self._transfers.get(request)
        if transfer is None or transfer.peer != peer:
            return []
        self._answered(transfer, now)
        if bytes_queued:
            if self._crawls(transfer, now):
                return self._give_up(transfer, now)
            transfer.flows(now, neighbour.answer_deadline_s, self._patience_s)
        elif not transfer.is_flowing:
            transfer.park(max(self._patience_end, now))
        return []

    def _overdue(self, transfer: Transfer, now: float) -> list[Action]:
        if transfer.is_flowing and not transfer.is_probed and not self._crawls(transfer, now):
            answer_s = self.membership.neighbours[transfer.peer].answer_deadline_s
            return [Send(transfer.peer, transfer.probe(now, answer_s, self._patience_s))]
        if transfer.is_flowing or not transfer.is_answered:
            return self._give_up(transfer, now)
        return self._replace(transfer, now)

    def _crawls(self, transfer: Transfer, now: float) -> bool:
        return now >= self._patience_end and transfer.crawls(now, self._finished_rates)

    def _give_up(self, transfer: Transfer, now: float) -> list[Action]:
        """It was silent, or crawled, for too long."""
        neighbour = self.membership.neighbours[transfer.peer]
        neighbour.strikes += 1
        neighbour.transferred(transfer.link_rate(now))
        self.report.timeouts += 1
        return self._replace(transfer, now)

    def _refused(self, peer: PeerId, request: int, newest: int, now: float) -> list[Action]:
        self.membership.heard(peer, newest)
        transfer = self._transfers.get(request)
        if transfer is None or transfer.peer != peer:
            return []
        self._answered(transfer, now)
        self.report.refused += 1
        return self._replace(transfer, now)

    def _reject(self, peer: PeerId, request: int, reason: str, now: float) -> list[Action]:
        self.report.rejected += 1
        fault = self._once(Fault(self.round, peer, "rejected", reason))
        transfer = self._transfers.get(request)
        if transfer is None or transfer.peer != peer:
            return fault
        return fault + self._replace(transfer, now)

    def _peer_down(self, peer: PeerId, now: float) -> list[Action]:
        neighbour = self.membership.neighbours.get(peer)
        if neighbour is None or neighbour.away:
            return []
        actions: list[Action] = []
        if neighbour.answered and not neighbour.gone:
            actions.append(Report(Fault(self.round, peer, "down", f"the connection to {peer} broke")))
        neighbour.away = neighbour.answered  # before its first answer, Hello goes on trying
        self.desk.forget(peer)
        for transfer in [transfer for transfer in self._transfers.values() if transfer.peer == peer]:
            actions += self._replace(transfer, now)
        return actions + self._finish_if_alone()

    def _peer_up(self, peer: PeerId) -> list[Action]:
        neighbour = self.membership.neighbours.get(peer)
        if neighbour is not None and neighbour.away:
            return [Send(peer, self.membership.hello(self.desk.newest, wants_reply=True))]
        return []

    def _replace(self, transfer: Transfer, now: float) -> list[Action]:
        """Ask neighbours not tried yet for what is missing; where none is left, merge with fewer copies."""
        if self._transfers.pop(transfer.pull.request, None) is None:
            return []
        actions: list[Action] = [Forget(transfer.peer, transfer.pull.request)]
        is_over = now >= self._patience_end + self._patience_s
        candidates = [] if is_over else self._replacements()
        ranges: dict[PeerId, list[Range]] = {}
        for range_ in transfer.missing:
            index = self._segment_of[range_]
            segment = self._segments[index]
            turned = candidates[index % len(candidates) :] + candidates[: index % len(candidates)] if candidates else []
            substitute = next((peer for peer in turned if peer not in segment.tried), None)
            if substitute is None:
                segment.wanted -= 1
                self.report.missing += 1
                actions += self._merge_if_complete(index)
            else:
                segment.tried.add(substitute)
                ranges.setdefault(substitute, []).append(range_)
        for peer in sorted(ranges):
            actions += self._pull(peer, ranges[peer], now)
        return actions

    def _replacements(self) -> list[PeerId]:
        candidates = set(self.membership.candidates(at_least=1))
        if self.config.schedule is not None and not self.report.adopted:
            candidates &= set(self._degrees)
        neighbours = list(self.membership.neighbours)  # all, so that who is away does not shift the order of the others
        generator(self.config.seed, "replacements", self.name, self.round).shuffle(neighbours)
        return [peer for peer in neighbours if peer in candidates]

    @property
    def _is_far_behind(self) -> bool:
        oldest = self.round + self.config.versions_kept
        return self.membership.claimed > oldest and self.membership.newest > oldest

    def _fall_behind(self, now: float) -> list[Action]:
        detail = f"{self.name} is at round {self.round}, others at {self.membership.newest}: adopting the newest model"
        return [Report(Fault(self.round, self.name, "behind", detail)), *self._adopt(now)]

    def _adopt(self, now: float) -> list[Action]:
        """Take over the newest known version, each segment from another peer that has it, and its round."""
        target = self.membership.newest
        actions = self._open_round(target, now, train_s=0.0)
        self.report.adopted = True
        live = self._replacements()
        holders = [peer for peer in live if self.membership.neighbours[peer].newest >= target] or live
        chosen = [[holders[index % len(holders)]] if holders else [] for index in range(len(self.config.segments))]
        return actions + self._ask(chosen, now)

    # --- serving and leaving ------------------------------------------------------------------------------------------

    def _answer(self, peer: PeerId, pull: Pull, now: float) -> list[Action]:
        self.membership.heard(peer)
        strange = [range_ for range_ in pull.ranges if range_ not in self._segment_of]
        if strange or pull.codec != self.config.codec:
            size, number = self.config.segments[-1][1], len(self.config.segments)
            detail = f"pull of {(strange or pull.ranges)[0]} as {pull.codec!r}; there are {number} segments of {size} values"
            detail += f", sent as {self.config.codec!r}"
            refusal = Refuse(pull.request, self.desk.oldest, self.desk.newest)
            return [*self._once(Fault(self.round, peer, "bad_pull", detail)), Send(peer, refusal)]
        return self.desk.answer(peer, pull, now, may_train=self.phase is not Phase.LINGERING)

    def _once(self, fault: Fault) -> list[Action]:
        """Report this kind of fault of this peer once a round: reports must not fill the disk."""
        if (fault.peer, fault.kind) in self._reported:
            return []
        self._reported.add((fault.peer, fault.kind))
        return [Report(fault)]

    def _linger(self, now: float) -> list[Action]:
        self.phase = Phase.LINGERING
        self._give_up_at = now + self.config.linger_s
        return [*self.desk.close(now), *self._say_leave(now), *self._finish_if_alone()]

    def _say_leave(self, now: float) -> list[Action]:
        self._wake_at = now + HELLO_INTERVAL_S
        return [Send(n.name, Leave(self.round)) for n in self.membership.neighbours.values() if n.is_live and n.met]

    def _left(self, peer: PeerId, now: float) -> list[Action]:
        self.membership.heard(peer).gone = True
        return self._finish_if_alone()

    def _finish_if_alone(self) -> list[Action]:
        if self.phase is not Phase.LINGERING:
            return []
        alone = all(neighbour.gone or not neighbour.is_live for neighbour in self.membership.neighbours.values())
        return self._finish() if alone else []

    def _finish(self, error: str | None = None) -> list[Action]:
        self.phase = Phase.DONE
        return [Finish(error)]
