"""One round's gathering: who is asked for which segments, what has come, and who stands in for whom.

    event                                 actions
    Later                                 it lives: wait within the round's patience
    Data                                  progress; a range's last chunk completes one copy of a segment
    a segment's copies are in             Merge at once
    Refuse, Rejected, PeerDown, late Wake the missing ranges from a neighbour not tried yet; none left: merge with fewer

Deadlines. One patience budget per round, from Trained, bounds the waiting for versions that are not trained yet; after it,
replacements take the newest stored version and nothing waits again. It follows the time that training takes and, on slow links,
the time that transfers take. A first answer is due within an adaptive time (`membership.py`), and within the patience. A
transfer that progresses is not cut off by either (`transfers.py`): after a silence its pull is repeated at the same neighbour,
which resumes it, and only a second silence, or a crawl, ends it.

Far behind. Who finds itself more than `versions_kept` rounds behind a neighbour adopts the newest model, by segments from
several peers, and jumps to its round: a slow peer is never left to train alone.
"""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from gossipfl.errors import ConfigError
from gossipfl.protocol.machine import Action, Contribution, Fault, Forget, Report, RoundReport, Send
from gossipfl.protocol.membership import MIN_ANSWER_S, Neighbour
from gossipfl.protocol.messages import MAX_RANGES, NEWEST, Data, PeerId, Pull, Range
from gossipfl.protocol.participant import GossipConfig, Participant, Phase
from gossipfl.protocol.transfers import Transfer
from gossipfl.randomness import generator

MIN_PATIENCE_S = 10.0
PATIENCE_IN_TRAININGS = 4
PATIENCE_IN_TRANSFERS = 4
"""Of the median one, so that who stalls on purpose does not prolong it: neighbours are behind by what transfers took them."""
MAX_GIVEN_UP = 256
"""Requests given up that are remembered, to learn from a late answer how long answers take."""
MAX_SAMPLES = 2**40


@dataclass(slots=True)
class _Segment:
    """One segment in the round being gathered."""

    wanted: int
    tried: set[PeerId]
    copies: list[Contribution] = field(default_factory=list)
    is_merging: bool = False


class Gatherer(Participant):
    """A participant that pulls segments. What is asked of whom, and what becomes of the copies, its rounds decide.

    `numbers` yields the numbers of requests, each once; where others may lie they should not be guessable, for who guesses one
    may ask in this peer's name.
    """

    def __init__(
        self, name: PeerId, degrees: Mapping[PeerId, int], config: GossipConfig, numbers: Iterator[int] | None = None
    ) -> None:
        assert 1 <= config.num_samples <= MAX_SAMPLES, config.num_samples
        super().__init__(name, degrees, config)
        self.report = RoundReport(0)
        self._segments: list[_Segment] = []
        self._num_merged = 0
        self._transfers: dict[int, Transfer] = {}
        self._finished_rates: list[float] = []
        self._transfers_s: list[float] = []  # of those that came to an end since this round began
        self._usual_transfer_s = 0.0
        self._given_up: dict[int, float] = {}  # when they were asked
        self._numbers = numbers or count(1)
        self._began = 0.0  # training, then gathering
        self._patience_s = MIN_PATIENCE_S
        self._patience_end = 0.0

    @abstractmethod
    def _weight(self, peer: PeerId, num_samples: int, staleness: int) -> float:
        """What a neighbour's copy is mixed with."""

    @abstractmethod
    def _merge(self, index: int) -> list[Action]:
        """Mix the copies of this segment."""

    @property
    def _degrees(self) -> Mapping[PeerId, int]:
        """The neighbours of this round, and how many each of them has."""
        schedule = self.config.schedule
        return self.membership.degrees if schedule is None else schedule[(self.round - 1) % len(schedule)]

    # --- asking -------------------------------------------------------------------------------------------------------

    def _open_round(self, round_: int, now: float, train_s: float) -> list[Action]:
        """Close what is left of an earlier gathering and start a new one."""
        actions: list[Action] = [Forget(transfer.peer, request) for request, transfer in self._transfers.items()]
        self._transfers.clear()
        self.phase, self.round, self._began = Phase.GATHERING, round_, now
        if self._transfers_s:
            self._usual_transfer_s = statistics.median(self._transfers_s)
            self._transfers_s.clear()
        usual_s = max(PATIENCE_IN_TRAININGS * train_s, PATIENCE_IN_TRANSFERS * self._usual_transfer_s)
        self._patience_s = self.config.patience_s or max(MIN_PATIENCE_S, usual_s)
        self._patience_end = now + self._patience_s
        since = self.report  # of what came while it trained, or of a round that ends in adoption
        self.report = RoundReport(
            round_,
            train_s=train_s,
            late=since.late,
            refused=since.refused,
            rejected=since.rejected,
            timeouts=since.timeouts,
            repeated_bytes=since.repeated_bytes,
        )
        self._finished_rates.clear()
        self._reported.clear()
        return actions

    def _ask(self, chosen: Sequence[Sequence[PeerId]], now: float) -> list[Action]:
        """Pull segment i from each of `chosen[i]`. ConfigError where a user's rule has chosen what would never be complete."""
        if len(chosen) != len(self.config.segments) or not all(isinstance(peers, Collection) for peers in chosen):
            raise ConfigError(
                f"{self.name} is to pull its {len(self.config.segments)} segments from {str(chosen)[:80]}, as "
                f"gossip.selection = {self.config.selection!r} or the protocol has it; return a list of neighbours for each"
            )
        self._segments = [_Segment(wanted=len(peers), tried=set(peers)) for peers in chosen]
        for segment, peers in zip(self._segments, chosen, strict=True):
            if len(segment.tried) < segment.wanted or not segment.tried <= self.membership.neighbours.keys():
                raise ConfigError(
                    f"{self.name} is to pull a segment from {', '.join(map(str, peers))}, as gossip.selection = "
                    f"{self.config.selection!r} or the protocol has it; choose different ones of its neighbours"
                )
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

    # --- what comes ---------------------------------------------------------------------------------------------------

    def _take(self, peer: PeerId, data: Data, now: float) -> list[Action]:
        """A chunk came: note the progress; a range's last chunk completes one copy of its segment."""
        neighbour = self.membership.heard(peer, data.newest)
        is_last = data.is_last
        transfer = self._transfers.get(data.request)
        if transfer is None or transfer.peer != peer or data.range not in transfer.missing:
            self.report.repeated_bytes += data.num_bytes
            self.report.late += is_last
            self._came_late(neighbour, data.request, now)
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
            self._transfers_s.append(now - transfer.asked_at)
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
        report.staleness_by_segment.setdefault(index, []).append(staleness)
        report.staleness_max = max(report.staleness_max, staleness)
        segment.copies.append(Contribution(peer, data.payload, self._weight(peer, data.num_samples, staleness), staleness))
        return self._merge_if_complete(index)

    def _merge_if_complete(self, index: int) -> list[Action]:
        segment = self._segments[index]
        if len(segment.copies) < segment.wanted or segment.is_merging:
            return []
        return self._merge(index)

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
            transfer.park(now, self._patience_end)
        return []

    def _overdue(self, transfer: Transfer, now: float) -> list[Action]:
        may_wait = not self._crawls(transfer, now) if transfer.is_flowing else now < self._patience_end
        if may_wait and not transfer.is_probed:
            answer_s = self.membership.neighbours[transfer.peer].answer_deadline_s
            if not transfer.is_flowing:
                answer_s = min(answer_s, MIN_ANSWER_S, self._patience_left_s(now))
            return [Send(transfer.peer, transfer.probe(now, answer_s, self._patience_s))]
        is_parked = transfer.is_answered and not transfer.is_flowing
        return self._replace(transfer, now) if is_parked else self._give_up(transfer, now)

    def _crawls(self, transfer: Transfer, now: float) -> bool:
        return now >= self._patience_end and transfer.crawls(now, self._finished_rates, self._transfers_s)

    def _give_up(self, transfer: Transfer, now: float) -> list[Action]:
        """It was silent, or crawled, for too long."""
        neighbour = self.membership.neighbours[transfer.peer]
        neighbour.strikes += 1
        neighbour.transferred(transfer.link_rate(now))
        self.report.timeouts += 1
        self._given_up[transfer.pull.request] = transfer.asked_at
        if len(self._given_up) > MAX_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]
        return self._replace(transfer, now)

    def _came_late(self, neighbour: Neighbour, request: int, now: float) -> None:
        """What was given up comes after all: links are slower than was thought."""
        asked_at = self._given_up.pop(request, None)
        if asked_at is not None:
            neighbour.answered_after(now - asked_at)
            self._transfers_s.append(now - asked_at)

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
        is_finished = self.phase is Phase.LINGERING and neighbour.newest >= self.round  # its Leave may be on its way
        if neighbour.answered and not neighbour.gone and not is_finished:
            actions.append(Report(Fault(self.round, peer, "down", f"the connection to {peer} broke")))
        neighbour.away = neighbour.answered  # before its first answer, Hello goes on trying
        self.desk.forget(peer)
        for transfer in [transfer for transfer in self._transfers.values() if transfer.peer == peer]:
            actions += self._replace(transfer, now)
        return actions + self._finish_if_alone()

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

    # --- far behind ---------------------------------------------------------------------------------------------------

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
        spent_s, began = self.report.train_s, self._began if self.report.round else now
        actions = self._open_round(target, now, train_s=0.0)
        self.report.adopted, self.report.train_s, self._began = True, spent_s, began  # the round that ends here took its time
        live = self._replacements()
        holders = [peer for peer in live if self.membership.neighbours[peer].newest >= target] or live
        chosen = [[holders[index % len(holders)]] if holders else [] for index in range(len(self.config.segments))]
        return actions + self._ask(chosen, now)
