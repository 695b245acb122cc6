"""Versions on their way in: a plan is asked for, what it names is pulled, its stage is built, and then it is the one in use.

    there is no version   -> every server is asked; the last one answers when it has one
    an Offer came         -> LookUp, and a plan is asked for again: the server answers when there is a newer version
    what is missing known -> Pull it, of the server that offered it first
    all pieces are here   -> Load
    the stage is built    -> the version is `active`
    by another engine     -> those that are of no use here are refused, and another plan asked for

A server that is silent, refuses, sends something else than was asked for, or goes away, is left alone for a while; what is
missing is pulled from another. A newer offer takes the place of one whose pieces are still pulled.

A certificate speaks of the engine that was planned. Where another runs in its place, as it does not work here or is slower than
fp32, a plan without it is asked for; should it be offered all the same, its certificate is dropped. What is known not to work
here is named in the first request, so that it is not planned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from gossipfl.inference.planning.audit import SHARE
from gossipfl.inference.planning.device_words import Action, Forget, Load, Loaded, LookUp, Send, Unload
from gossipfl.inference.planning.holders import FIRST_BACKOFF_S, MAX_BACKOFF_S, Holders
from gossipfl.inference.planning.offers import Ask, Failure, Manifest, missing, samples_digest
from gossipfl.inference.planning.profile import DeviceProfile, ModelProfile
from gossipfl.protocol.messages import MAX_RANGES, Data, Failed, Later, Message, Offer, PeerId, PlanRequest, Pull, Refuse
from gossipfl.protocol.transfers import Transfer

MAX_REJECTIONS = 3
"""Times that each server may send pieces that are none before their version is given up."""

MAX_REFUSED = 8
"""Engines: a server that makes up others all the time does not keep the device from answering."""


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """`patience_s`: silence of a server before another is asked; `wait_s`: how long a server may wait for a newer version.

    `audit_share` of what a certificate speaks of is compared with the full model, to see whether it still holds; 0: nothing.
    """

    device: DeviceProfile = field(default_factory=DeviceProfile)
    max_accuracy_loss: float | None = None
    on_no_server: Literal["unverified", "fail"] = "unverified"
    patience_s: float = 5.0
    wait_s: float = 60.0
    audit_share: float = SHARE
    samples: str = ""
    """As a manifest holds them, where it holds none."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Engines that are known to be of no use here, and why."""


@dataclass(slots=True)
class _PlanAsked:
    request: int
    peer: PeerId
    is_parked: bool = False


@dataclass(slots=True)
class _Candidate:
    """A version on its way in."""

    manifest: Manifest
    offered_by: PeerId
    is_loading: bool = False
    transfers: dict[int, Transfer] = field(default_factory=dict)
    postponed: list[Pull] = field(default_factory=list)  # nobody can be asked for it now
    rejections: Counter[PeerId] = field(default_factory=Counter)
    lacking: set[PeerId] = field(default_factory=set)


class Fetcher:
    """The half of the device's machine that keeps it up to date."""

    def __init__(self, config: DeviceConfig, holders: Holders, profile: ModelProfile, numbers: Iterator[int]) -> None:
        self.active: Manifest | None = None
        """What new questions are answered by."""
        self.loaded: dict[int, Manifest] = {}
        """All versions whose stage is ready."""
        self.error: tuple[str, str] | None = None
        """Kind and reason why there is no (newer) version; None while all is well."""
        self.refused: dict[str, str] = dict(config.refused)
        """Engines that are of no use here, and why."""
        self._config, self._holders, self._profile, self._numbers = config, holders, profile, numbers
        self._candidate: _Candidate | None = None
        self._next: tuple[Manifest, PeerId] | None = None  # offered while another was loading
        self._spoilt: set[PeerId] = set()  # their offers have come to nothing since the last one that was loaded
        self._samples = config.samples
        self._unready: set[PeerId] = set()  # they have no version yet
        self._plan: _PlanAsked | None = None
        self._plan_due: float | None = None  # when the answer is overdue, or a plan is asked for again

    @property
    def next_deadline(self) -> float | None:
        times = [] if self._plan_due is None else [self._plan_due]
        candidate = self._candidate
        if candidate is not None:
            times += [transfer.deadline for transfer in candidate.transfers.values()]
            if candidate.postponed:
                times.append(self._holders.next_free(candidate.lacking))
        return min(times, default=None)

    @property
    def is_hopeless(self) -> bool:
        """No version is in use or on its way, nobody else is there to be asked for one, and `error` says why."""
        if self.error is None or self.active is not None or self._candidate is not None or self._plan is not None:
            return False
        return self.error[0] != Failure.OFFER or self._holders.are_all(self._spoilt)

    @property
    def is_awaited(self) -> bool:
        """Whether a server has said that it is at a first version for this device, and none of its has come to nothing."""
        return bool(self._unready - self._spoilt) and self.error is None

    @property
    def waits_for(self) -> str | None:
        """What keeps the first version, while something is done about it."""
        if self._candidate is not None:
            done = "built" if self._candidate.is_loading else "pulled"
            return f"version {self._candidate.manifest.version} is not {done} yet"
        if self._unready:
            addresses = sorted(self._holders.addresses[peer] for peer in self._unready)
            who = f"{' and '.join(addresses)} {'have' if len(addresses) > 1 else 'has'}"
            return f"{who} none ready yet, while it is trained, calibrated or certified for this plan"
        return None

    def receive(self, peer: PeerId, message: Message, now: float) -> list[Action] | None:
        """None if the message is no answer to what was asked here."""
        candidate = self._candidate
        request = getattr(message, "request", 0)
        if self._plan is not None and (self._plan.request, self._plan.peer) == (request, peer):
            match message:
                case Offer():
                    return self._offered(peer, message.payload, now)
                case Later():
                    return self._parked(self._plan, now)
                case Failed(_, kind, reason):
                    return self._plan_failed(peer, kind, reason, now)
            return []
        if candidate is not None and request in candidate.transfers and candidate.transfers[request].peer == peer:
            match message:
                case Data():
                    return self._data(candidate, message, now)
                case Later():
                    candidate.transfers[request].flows(now, self._config.patience_s, self._config.patience_s)
                case Refuse():
                    return self._refused(candidate, request, now)
            return []
        return None

    def wake(self, now: float) -> list[Action]:
        actions: list[Action] = []
        if self._plan_due is not None and self._plan_due <= now:
            plan, self._plan = self._plan, None
            if plan is not None:
                actions.append(Forget(plan.peer, plan.request))
                if plan.is_parked:
                    self._unready.intersection_update({plan.peer})  # the others may have a version by now
                else:
                    self._unready.discard(plan.peer)
                    actions.append(self._holders.blame(plan.peer, "silent", "no answer to a plan request", now))
            actions += self.ask_for_plan(now)
        candidate = self._candidate
        if candidate is not None:
            for request, transfer in list(candidate.transfers.items()):
                if transfer.deadline <= now:
                    actions.append(self._holders.blame(transfer.peer, "silent", "no more of what was pulled", now))
                    actions += self._pull_elsewhere(candidate, request, now)
            actions += self._pull_postponed(candidate, now)
        return actions

    def down(self, peer: PeerId, now: float) -> list[Action]:
        """Whatever was asked of it is lost."""
        actions: list[Action] = []
        self._unready.discard(peer)
        if self._plan is not None and self._plan.peer == peer:
            self._plan = None
            actions += self.ask_for_plan(now)
        candidate = self._candidate
        if candidate is not None:
            for request in [request for request, transfer in candidate.transfers.items() if transfer.peer == peer]:
                actions += self._pull_elsewhere(candidate, request, now)
        return actions

    def rejected(self, peer: PeerId, request: int, reason: str, now: float) -> list[Action] | None:
        """What came for this request is not what was asked for; None if nothing was, here."""
        if self._plan is not None and (self._plan.request, self._plan.peer) == (request, peer):
            self.error, self._plan = (Failure.OFFER, f"{self._holders.addresses[peer]}: {reason}"), None
            self._spoilt.add(peer)
            return self.ask_for_plan(now)
        candidate = self._candidate
        if candidate is None or request not in candidate.transfers or candidate.transfers[request].peer != peer:
            return None
        candidate.rejections[peer] += 1
        spoilt = [server for server, times in candidate.rejections.items() if times >= MAX_REJECTIONS]
        if self._holders.are_all({*spoilt, *candidate.lacking}):
            # all of them say something else than was offered: the offer was wrong
            self.error = Failure.OFFER, f"{self._holders.addresses[peer]}: {reason}"
            self._spoilt.add(candidate.offered_by)
            blamed = self._holders.blame(candidate.offered_by, "offer", "nobody has what it offered", now)
            return [blamed, *self._drop_candidate(), *self._ask_for_plan_at(now), *self.ask_for_plan(now)]
        return self._pull_elsewhere(candidate, request, now)

    # --- plans --------------------------------------------------------------------------------------------------------

    def ask_for_plan(self, now: float) -> list[Action]:
        """Of the next server, rather one whose offers were good; where none may be asked now, when one may."""
        peer = self._unasked(now) or self._holders.choose(now, self._spoilt) or self._holders.choose(now)
        if peer is None:
            self._plan_due = self._holders.next_free()
            return []
        config, held = self._config, self._newest
        samples = samples_digest(self._samples)
        ask = Ask(config.device, config.max_accuracy_loss, wait_s=config.wait_s, samples=samples, refused=self.refused.copy())
        if held is not None:
            ask = replace(ask, held=held.version, cached=held.plan.weight_bits)
        request = next(self._numbers)
        self._plan, self._plan_due = _PlanAsked(request, peer), now + config.patience_s
        return [Send(peer, PlanRequest(request, payload=ask))]

    def _unasked(self, now: float) -> PeerId | None:
        """A server that may have a version."""
        return self._holders.choose(now, self._spoilt | self._unready)

    def _parked(self, plan: _PlanAsked, now: float) -> list[Action]:
        """It answers when it has a (newer) version. Where there is none yet, others are asked first."""
        self._holders.praise(plan.peer)
        plan.is_parked, self._plan_due = True, now + self._config.wait_s + self._config.patience_s
        if self._newest is None:
            self._unready.add(plan.peer)
            if self._unasked(now) is not None:
                self._plan = None
                return [Forget(plan.peer, plan.request), *self.ask_for_plan(now)]
            if len(self._holders) > 1:
                self._plan_due = now + self._config.patience_s  # another may have one sooner
        return []

    def _ask_for_plan_at(self, time_s: float) -> list[Action]:
        plan, self._plan, self._plan_due = self._plan, None, time_s
        return [Forget(plan.peer, plan.request)] if plan else []

    @property
    def _newest(self) -> Manifest | None:
        """The newest offer taken up, whose pieces are in the cache or on their way."""
        offers = (self.active, self._candidate and self._candidate.manifest, self._next and self._next[0])
        return max((offer for offer in offers if offer), key=lambda offer: offer.version, default=None)

    def _plan_failed(self, peer: PeerId, kind: str, reason: str, now: float) -> list[Action]:
        self._plan = None
        if kind == Failure.PLAN:  # another server would say the same
            self.error = kind, reason
            return self._ask_for_plan_at(now + MAX_BACKOFF_S)
        if kind == Failure.MODEL:
            self.error = kind, reason
        if kind == Failure.COMPUTE:
            self._spoilt.add(peer)
        self._unready.discard(peer)
        return [self._holders.blame(peer, kind, reason, now), *self.ask_for_plan(now)]

    def _offered(self, peer: PeerId, manifest: Manifest, now: float) -> list[Action]:
        self._holders.praise(peer)
        self._plan, self._plan_due, self.error = None, None, None
        self._unready.clear()
        self._samples = manifest.samples or self._samples
        manifest = replace(manifest, samples=self._samples)
        newest = self._newest.version if self._newest else 0
        if manifest.version <= newest:  # it lags behind, or has not waited
            self._plan_due = now + FIRST_BACKOFF_S
            is_behind = manifest.version < newest
            return (
                [self._holders.blame(peer, "behind", f"it offers {manifest.version}, not {newest}", now)] if is_behind else []
            )
        if self._candidate is not None and self._candidate.is_loading:
            self._next = manifest, peer
            return self.ask_for_plan(now)
        actions = self._drop_candidate()
        self._candidate = _Candidate(manifest, peer)
        return [*actions, LookUp(manifest), *self.ask_for_plan(now)]

    def _drop_candidate(self) -> list[Action]:
        candidate, self._candidate = self._candidate, None
        if candidate is None:
            return []
        forgotten = [Forget(transfer.peer, request) for request, transfer in candidate.transfers.items()]
        return [*forgotten, Unload(candidate.manifest.version)]

    def found(self, version: int, have: frozenset[str], now: float) -> list[Action]:
        candidate = self._candidate
        if candidate is None or candidate.manifest.version != version or candidate.is_loading:
            return []
        for codec, ranges in missing(candidate.manifest, self._profile, have).items():
            for start in range(0, len(ranges), MAX_RANGES):
                part = tuple(ranges[start : start + MAX_RANGES])
                candidate.postponed.append(Pull(0, version, version, part, codec, self._config.patience_s))
        if not candidate.postponed:
            return self._load(candidate)
        return self._pull_postponed(candidate, now, first=candidate.offered_by)

    def _load(self, candidate: _Candidate) -> list[Action]:
        candidate.is_loading = True
        return [Load(candidate.manifest)]

    def loaded_now(self, loaded: Loaded, now: float) -> list[Action]:
        """The stage is ready and in use from now on, or cannot be built."""
        candidate, version, error, engine = self._candidate, loaded.version, loaded.error, loaded.engine
        if candidate is None or candidate.manifest.version != version or not candidate.is_loading:
            return []
        manifest = candidate.manifest
        is_another = error is None and engine is not None and engine != manifest.plan.stages[0].engine
        if is_another and self._refuse(manifest.plan.stages[0].engine, loaded.refused):
            self._next = None
            return [*self._drop_candidate(), *self._ask_for_plan_at(now), *self.ask_for_plan(now)]
        self._candidate = None
        actions: list[Action] = []
        if error is None:
            if is_another:
                manifest = replace(manifest, alpha=None, delta=None)  # they speak of the engine that they were measured with
            self.active = self.loaded[version] = manifest
            self._spoilt.clear()
        else:
            self.error = Failure.COMPUTE, error
            actions = [Unload(version)]
        if self._next is not None:
            (manifest, peer), self._next = self._next, None
            self._candidate = _Candidate(manifest, peer)
            return [*actions, LookUp(manifest)]
        return actions if error is None else [*actions, *self._ask_for_plan_at(now + MAX_BACKOFF_S)]

    def _refuse(self, planned: str, reasons: Mapping[str, str]) -> bool:
        """Whether it is news that the engine planned is of no use here, as those are that were tried with it."""
        is_news = planned not in self.refused and len(self.refused) < MAX_REFUSED
        if is_news:
            self.refused |= {planned: f"engine {planned!r} is of no use here", **reasons}
        return is_news

    # --- pulls --------------------------------------------------------------------------------------------------------

    def _pull_postponed(self, candidate: _Candidate, now: float, first: PeerId | None = None) -> list[Action]:
        actions: list[Action] = []
        while candidate.postponed:
            peer = first or self._choose_holder(candidate, now)
            if peer is None:
                break
            old = candidate.postponed.pop()
            request = next(self._numbers)
            pull = Pull(request, old.version, old.oldest, old.ranges, old.codec, old.expires_s)
            due = now + self._config.patience_s
            candidate.transfers[request] = Transfer(peer, pull, now, due, dict.fromkeys(pull.ranges, 0))
            actions.append(Send(peer, pull))
        return actions

    def _choose_holder(self, candidate: _Candidate, now: float) -> PeerId | None:
        """Rather one that has sent nothing wrong."""
        spoilt = candidate.lacking.union(candidate.rejections)
        return self._holders.choose(now, spoilt) or self._holders.choose(now, candidate.lacking)

    def _pull_elsewhere(self, candidate: _Candidate, request: int, now: float) -> list[Action]:
        """Ask somebody for what is still missing of this transfer."""
        transfer = candidate.transfers.pop(request)
        pull = transfer.pull
        candidate.postponed.append(Pull(0, pull.version, pull.oldest, tuple(transfer.missing), pull.codec, pull.expires_s))
        return [Forget(transfer.peer, request), *self._pull_postponed(candidate, now)]

    def _data(self, candidate: _Candidate, data: Data, now: float) -> list[Action]:
        transfer = candidate.transfers[data.request]
        if data.range not in transfer.missing:
            return []
        transfer.begin(data)
        if not transfer.continues_with(data):
            return []
        transfer.advance(data, now)
        transfer.flows(now, self._config.patience_s, self._config.patience_s)
        if transfer.missing:
            return []
        del candidate.transfers[data.request]
        self._holders.praise(transfer.peer)
        return [] if candidate.transfers or candidate.postponed else self._load(candidate)

    def _refused(self, candidate: _Candidate, request: int, now: float) -> list[Action]:
        """It does not hold this version (any more)."""
        candidate.lacking.add(candidate.transfers[request].peer)
        if not self._holders.are_all(candidate.lacking):
            return self._pull_elsewhere(candidate, request, now)
        # nobody does: there must be a newer one
        return [*self._drop_candidate(), *self._ask_for_plan_at(now + FIRST_BACKOFF_S)]
