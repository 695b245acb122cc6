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
    LINGERING  Leave from all live neighbours met; Wake   DONE                      keep serving; Finish
    any        Pull                                       same                      Serve, Later or Refuse (`serving.py`)

The rows of JOINING, LINGERING and Pull are in `participant.py`, those of what comes in and what goes wrong in `gathering.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from gossipfl.overlay.selection import SELECTORS, exploring
from gossipfl.protocol.gathering import Gatherer
from gossipfl.protocol.machine import (
    Action,
    Contribution,
    Event,
    Merge,
    Merged,
    PeerDown,
    PeerUp,
    Received,
    Rejected,
    Report,
    RoundReport,
    Start,
    StopAfter,
    Train,
    Trained,
    Wake,
    by_peer,
)
from gossipfl.protocol.messages import Data, Hello, Later, Leave, PeerId, Pull, Refuse
from gossipfl.protocol.participant import GossipConfig, Phase
from gossipfl.randomness import generator
from gossipfl.registry import Registry

__all__ = ["MIXINGS", "PROTOCOLS", "Gossip", "GossipConfig", "Phase"]

MIXINGS = ("data_size", "uniform", "metropolis_hastings")

PROTOCOLS: Registry[Callable[[PeerId, Mapping[PeerId, int], GossipConfig, Iterator[int]], Gossip]] = Registry("protocol")


@PROTOCOLS.register("gossip")
class Gossip(Gatherer):
    """The machine of one peer.

    `degrees` maps each neighbour to its own number of neighbours. `numbers` yields the numbers of requests, each once; where
    others may lie they should not be guessable, for who guesses one may ask in this peer's name.
    """

    has_replicas = True
    """Whether `config.replicas` plays a part."""

    def __init__(
        self, name: PeerId, degrees: Mapping[PeerId, int], config: GossipConfig, numbers: Iterator[int] | None = None
    ) -> None:
        super().__init__(name, degrees, config, numbers)
        self.last_round = config.rounds

    # --- driving ------------------------------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float | None:
        match self.phase:
            case Phase.GATHERING | Phase.TRAINING:
                return min([transfer.deadline for transfer in self._transfers.values()], default=None)
            case Phase.JOINING | Phase.LINGERING if self._wake_at is not None:
                unmet_until = math.inf if self._unmet_until is None else self._unmet_until
                return min(self._wake_at, self._give_up_at, unmet_until)
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
                self._join_soon(now)
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
            case Phase.LINGERING:
                return self._wake_lingering(now)
        return []

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
            self.report.missing += sum(max(0, expected - len(peers)) for peers in chosen if peers is not None)
        return chosen

    def _candidates(self) -> list[PeerId]:
        candidates = self.membership.candidates(at_least=self.config.replicas)
        return candidates if self.config.schedule is None else [peer for peer in candidates if peer in self._degrees]

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
        round_s = self.report.train_s + self.report.wait_s
        done = self._round_done(now)
        self.report = RoundReport(0)  # what still comes in counts towards the next round
        if round_ >= self.last_round:
            return done + self._linger(now, round_s)
        return done + self._train(round_ + 1, now)

    def _round_done(self, now: float) -> list[Action]:
        return [Report(self.report)]
