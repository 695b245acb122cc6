"""The device's machine: sees every question through to an answer, beside fetching the versions to answer it with.

    WAITING   no version is ready: one is                    -> as below
    HEAD      the device's layers run: they have             -> ASKED where there are more layers, else RESOLVED or ASKED
    ASKED     a server runs the rest: its scores are here    -> RESOLVED where the margins are large enough, else ASKED
    ASKED     ... or once more, continued, on those unsure   -> RESOLVED, or ASKED afresh if that server cannot
    ASKED     ... or the full model, afresh, on those        -> RESOLVED
    FREE      no server can be asked now: one can            -> ASKED

A question is answered by one version from beginning to end. New ones go to the newest that is ready; an old one is unloaded
when its last question is answered. A reduced answer is accepted from the threshold's margin on. The other samples fall back as
the plan says: to the full model, or to continuing, where the server that has answered is sent what its values at the cut lack.
Whatever goes wrong with that, they start afresh with the full model, at any server. Whoever is silent, refuses, fails or goes
away is left alone for a while and the next server is asked, until the question's deadline. Where no server is left, what the
reduced model said is the answer, marked unverified, if `on_no_server` says so.

Of what the full model has not answered, samples that were drawn to be audited are asked for once more, as a question of their
own that nobody waits for. Once an audit has raised its alarm nothing more is accepted of that version, or continued.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from gossipfl.inference.planning.audits import Audits
from gossipfl.inference.planning.device_words import (
    Action,
    Audited,
    Event,
    Fail,
    Forget,
    Found,
    HeadDone,
    Loaded,
    Question,
    Report,
    Resolve,
    RunHead,
    SetAside,
    Tier,
    Unload,
    Upload,
)
from gossipfl.inference.planning.fetching import DeviceConfig, Fetcher
from gossipfl.inference.planning.holders import Holders
from gossipfl.inference.planning.offers import Failure, Manifest
from gossipfl.inference.planning.profile import ModelProfile
from gossipfl.protocol.machine import PeerDown, PeerUp, Received, Rejected, Start, Wake
from gossipfl.protocol.messages import FULL_BITS, Failed, Later, Message, PeerId, Result

AUDIT_S, MAX_AUDITS = 30.0, 16
"""How long an audit may take, and how many may be under way; what is more, or what a busy server refuses, is left out."""


class Phase(Enum):
    WAITING = "waiting"
    HEAD = "head"
    ASKED = "asked"
    FREE = "free"


@dataclass(slots=True)
class _Asked:
    """A question in the works."""

    question: Question
    asked_at: float = 0.0
    phase: Phase = Phase.WAITING
    manifest: Manifest | None = None
    tier: Tier = "reduced"
    unsure: tuple[int, ...] = ()
    audited: tuple[int, ...] = ()
    audit_of: int | None = None  # the question whose audited samples these are
    requests: dict[int, PeerId] = field(default_factory=dict)  # of this tier, also those given up
    peer: PeerId | None = None
    silent_at: float = 0.0
    failed: set[PeerId] = field(default_factory=set)  # in this tier
    lacking: set[PeerId] = field(default_factory=set)  # servers that do not have its version
    last_failure: str | None = None


class Asker:
    """Of one model. `servers`: the peers that may hold it, with their addresses; `profile` is the device's own."""

    def __init__(
        self,
        config: DeviceConfig,
        servers: Mapping[PeerId, str],
        profile: ModelProfile,
        numbers: Iterator[int] | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        """`rng` draws what is audited."""
        self.config = config
        self._numbers = numbers or iter(lambda: 1 + secrets.randbelow(2**61), None)
        self._holders = Holders(servers)
        self.fetcher = Fetcher(config, self._holders, profile, self._numbers)
        self._audits = Audits(config.audit_share, rng or np.random.default_rng())
        self._in_use: Counter[int] = Counter()
        self._questions: dict[int, _Asked] = {}
        self._by_request: dict[int, _Asked] = {}

    @property
    def waits_for(self) -> str | None:
        """What keeps questions from being begun; None where there is a version to answer them."""
        return None if self.fetcher.active else self.fetcher.waits_for or self._holders.last_trouble

    # --- driving ------------------------------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float | None:
        fetching = self.fetcher.next_deadline
        times = [] if fetching is None else [fetching]
        for asked in self._questions.values():
            times.append(asked.question.deadline)
            if asked.phase is Phase.ASKED:
                times.append(asked.silent_at)
            elif asked.phase is Phase.FREE:
                times.append(self._holders.next_free(asked.lacking))
        return min(times, default=None)

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Question():
                self._questions[event.number] = asked = _Asked(event, now)
                return self._begin(asked, now) if self.fetcher.active else self._settled(now)
            case HeadDone(number, margins, error):
                return self._head_done(number, margins, error, now)
            case Received(peer, message) if peer in self._holders:
                actions = self.fetcher.receive(peer, message, now)
                return self._receive(peer, message, now) if actions is None else actions + self._settled(now)
            case Rejected(peer, request, reason) if peer in self._holders:
                return self._rejected(peer, request, reason, now)
            case Wake():
                return self._wake(now)
            case Found(version, have):
                return self.fetcher.found(version, have, now)
            case Loaded():
                actions = self.fetcher.loaded_now(event, now)
                return actions + self._settled(now) + self._unload()
            case PeerDown(peer) if peer in self._holders:
                return self._down(peer, now)
            case PeerUp(peer) if peer in self._holders:
                self._holders.up(peer, now)
                return self._wake(now)
            case Start():
                return self.fetcher.ask_for_plan(now)
        return []

    def _receive(self, peer: PeerId, message: Message, now: float) -> list[Action]:
        asked = self._by_request.get(getattr(message, "request", 0))
        if asked is None or asked.requests.get(message.request) != peer:  # type: ignore[union-attr]
            return []
        match message:
            case Result():
                return self._result(asked, peer, message, now)
            case Failed(_, kind, reason) if asked.peer == peer:
                return self._failed(asked, peer, kind, reason, now)
            case Later() if asked.peer == peer:
                asked.silent_at = now + self._patience_s(asked, now)
        return []

    def _wake(self, now: float) -> list[Action]:
        actions = self.fetcher.wake(now)
        for asked in list(self._questions.values()):
            if asked.question.deadline <= now:
                actions += self._give_up(asked, "deadline", f"no answer in time; {self._trouble_of(asked, now)}", now)
            elif asked.phase is Phase.ASKED and asked.silent_at <= now:
                assert asked.peer is not None
                actions.append(self._holders.blame(asked.peer, "silent", "no answer to an activation", now))
                actions += self._ask_another(asked, now)
            elif asked.phase is Phase.FREE:
                actions += self._ask(asked, now)
        return actions

    def _down(self, peer: PeerId, now: float) -> list[Action]:
        """Whatever was asked of it is lost."""
        actions: list[Action] = [self._holders.blame(peer, "gone", "the connection broke", now)]
        self._holders.down(peer)
        actions += self.fetcher.down(peer, now)
        for asked in list(self._questions.values()):
            if asked.phase is Phase.ASKED and asked.peer == peer:
                actions += self._ask_another(asked, now)
        return actions

    def _rejected(self, peer: PeerId, request: int, reason: str, now: float) -> list[Action]:
        """What came for this request is not what was asked for."""
        actions: list[Action] = [self._holders.blame(peer, "rejected", reason, now)]
        fetched = self.fetcher.rejected(peer, request, reason, now)
        if fetched is not None:
            return actions + fetched + self._settled(now)
        asked = self._by_request.get(request)
        if asked is not None and asked.peer == peer and request in asked.requests:
            actions += self._ask_another(asked, now)
        return actions

    # --- versions -----------------------------------------------------------------------------------------------------

    def _settled(self, now: float) -> list[Action]:
        """Those who wait for a version begin with it, or hear why there is none."""
        waiting = [asked for asked in self._questions.values() if asked.phase is Phase.WAITING]
        if self.fetcher.is_hopeless and self.fetcher.error is not None:
            kind, reason = self.fetcher.error
            return [action for asked in waiting for action in self._give_up(asked, kind, reason, now)]
        active = self.fetcher.active
        return [action for asked in waiting if active and active is not asked.manifest for action in self._begin(asked, now)]

    def _begin(self, asked: _Asked, now: float) -> list[Action]:
        """With the newest version, or the one that is wanted, forgetting what another one may have said."""
        wanted, loaded = asked.question.version, self.fetcher.loaded
        manifest = self.fetcher.active if wanted is None else loaded.get(wanted)
        if manifest is None:
            here = ", ".join(map(str, sorted(loaded)))
            return self._give_up(asked, Failure.VERSION, f"version {wanted} is not here; ask for {here} or for the newest", now)
        actions = self._leave(asked)
        self._in_use[manifest.version] += 1
        asked.manifest, asked.tier, asked.unsure = manifest, "reduced", ()
        asked.failed, asked.lacking = set(), set()
        asked.audited = self._audits.draw(manifest, asked.question.number, asked.question.samples)
        if manifest.cut:
            asked.phase = Phase.HEAD
            return [*actions, RunHead(asked.question.number, manifest.version)]
        if manifest.sends_everything:
            asked.tier, asked.unsure = "full", tuple(range(asked.question.samples))
        return [*actions, *self._ask(asked, now)]

    def _leave(self, asked: _Asked) -> list[Action]:
        """The question is done with its version."""
        actions = self._drop_requests(asked)
        if asked.manifest is not None:
            actions += self._audits.left_out(asked.manifest.version, asked.question.number)
            self._in_use[asked.manifest.version] -= 1
            asked.manifest = None
            actions += self._unload()
        return actions

    def _unload(self) -> list[Action]:
        """The versions that nobody uses, but for the newest."""
        active, loaded = self.fetcher.active, self.fetcher.loaded
        unused = [version for version in loaded if not self._in_use[version] and loaded[version] is not active]
        for version in unused:
            del loaded[version], self._in_use[version]
            self._audits.end(version)
        return [Unload(version) for version in unused]

    # --- questions ----------------------------------------------------------------------------------------------------

    def _head_done(self, number: int, margins: tuple[float, ...] | None, error: str | None, now: float) -> list[Action]:
        asked = self._questions.get(number)
        if asked is None or asked.phase is not Phase.HEAD:
            return []
        if error is not None:
            return self._give_up(asked, Failure.COMPUTE, error, now)
        return self._decide(asked, margins, now) if margins is not None else self._ask(asked, now)

    def _decide(
        self, asked: _Asked, margins: tuple[float, ...], now: float, kept: tuple[PeerId, int] | None = None
    ) -> list[Action]:
        """The reduced scores are there: whose margin is large enough is answered, the others fall back.

        `kept`: who has computed them, and the request, if that was to be kept.
        """
        assert asked.manifest is not None
        is_alarmed, threshold = self._audits.is_alarmed(asked.manifest.version), asked.manifest.threshold
        asked.unsure = tuple(index for index, margin in enumerate(margins) if is_alarmed or not margin >= threshold)
        if not asked.unsure:
            return self._resolve(asked, now)
        actions = self._drop_requests(asked)
        asked.failed = set()
        if kept is not None and not is_alarmed:
            return [*actions, self._continue(asked, *kept, now)]
        return [*actions, *self._start_afresh(asked), *self._ask(asked, now)]

    def _continue(self, asked: _Asked, peer: PeerId, first: int, now: float) -> Action:
        """Send who has answered the activation of request `first` what that lacked of the samples unsure."""
        assert asked.manifest is not None
        asked.tier = "continued"
        return self._send(asked, peer, asked.manifest.cut, asked.manifest.plan.activation_bits, now, first=first)

    def _start_afresh(self, asked: _Asked) -> list[Action]:
        """The samples unsure are left to the full model."""
        asked.tier = "full"
        return [*self._drop_requests(asked), *self._no_difference(asked)]

    def _no_difference(self, asked: _Asked) -> list[Report]:
        """Those of the samples unsure that are audited do not differ, or nobody will know: then they are taken not to."""
        assert asked.manifest is not None
        fell_back = dict.fromkeys(set(asked.audited).intersection(asked.unsure), False)
        return self._audits.known(asked.manifest.version, asked.question.number, fell_back)

    def _resolve(self, asked: _Asked, now: float, is_verified: bool = True) -> list[Action]:
        manifest, number = asked.manifest, asked.question.number
        assert manifest is not None
        del self._questions[number]
        is_continued = is_verified and asked.tier == "continued"
        is_alarmed = self._audits.is_alarmed(manifest.version)
        resolve = Resolve(number, manifest, asked.unsure, is_verified, is_alarmed, is_continued)
        accepted = tuple(sorted(set(asked.audited).difference(() if is_continued else asked.unsure)))
        num_audits = sum(other.audit_of is not None for other in self._questions.values())
        if not accepted or num_audits >= MAX_AUDITS or resolve.alarm:
            # the answer first: what it is made of may go with the version
            return [resolve, *self._no_difference(asked), *self._leave(asked)]
        question = Question(~number, len(accepted), now + AUDIT_S, manifest.version)
        continued = asked.unsure if is_continued else ()
        reports = [] if is_continued else self._no_difference(asked)
        audit = _Asked(question, manifest=manifest, tier="audit", unsure=continued, audited=accepted, audit_of=number)
        self._questions[~number] = audit
        aside = SetAside(number, ~number, accepted, continued)
        return [aside, resolve, *reports, *self._drop_requests(asked), *self._ask(audit, now)]

    def _end_audit(self, audit: _Asked, differs: Sequence[bool] = ()) -> list[Action]:
        """`differs` of each sample; nothing where no server has said."""
        assert audit.manifest is not None and audit.audit_of is not None
        del self._questions[audit.question.number]
        known = dict(zip(audit.audited, differs, strict=False))
        known = dict.fromkeys(set(audit.audited).intersection(audit.unsure), False) | known
        reports = self._audits.known(audit.manifest.version, audit.audit_of, known)
        reports += self._audits.left_out(audit.manifest.version, audit.audit_of)
        return [*reports, Audited(audit.question.number), *self._leave(audit)]

    def _has_spoken(self, asked: _Asked) -> bool:
        """Whether there is an answer of the reduced model."""
        return asked.tier in ("continued", "full") and asked.manifest is not None and not asked.manifest.sends_everything

    def _will_do(self, asked: _Asked) -> bool:
        """Whether there is an answer of the reduced model that counts where there is no other."""
        return self._has_spoken(asked) and self.config.on_no_server == "unverified"

    def _trouble_of(self, asked: _Asked, now: float) -> str:
        """What has kept the answer, and what may help."""
        if asked.manifest is None:
            waits_for = self.fetcher.waits_for
            trouble = f"{waits_for}; allow more time" if waits_for else self._holders.last_trouble
            return f"waited {now - asked.asked_at:.3g} s for a first version: {trouble}"
        trouble = asked.last_failure or self._holders.last_trouble
        return f"{trouble}; --on-no-server unverified lets the device's own answer do" if self._has_spoken(asked) else trouble

    def _give_up(self, asked: _Asked, kind: str, reason: str, now: float) -> list[Action]:
        if asked.audit_of is not None:
            return self._end_audit(asked)
        if self._will_do(asked) and kind != Failure.INPUT:
            return self._resolve(asked, now, is_verified=False)
        del self._questions[asked.question.number]
        return [Fail(asked.question.number, kind, reason), *self._leave(asked)]

    def _ask(self, asked: _Asked, now: float) -> list[Action]:
        """Send a server what this tier needs, or wait until one can be asked."""
        manifest = asked.manifest
        assert manifest is not None
        if asked.tier == "continued":
            return [*self._start_afresh(asked), *self._ask(asked, now)]
        if asked.lacking and self._holders.are_all(asked.lacking):
            return self._restart(asked, now)
        if self._will_do(asked) and self._holders.are_hopeless(asked.failed | asked.lacking):
            return self._give_up(asked, "no_server", self._holders.last_trouble, now)
        peer = self._holders.choose(now, asked.lacking | asked.failed) or self._holders.choose(now, asked.lacking)
        if peer is None:
            asked.phase, asked.peer = Phase.FREE, None
            return []
        is_full = asked.tier != "reduced"
        cut, bits = (0, FULL_BITS) if is_full else (manifest.cut, manifest.plan.activation_bits)
        return [self._send(asked, peer, cut, bits, now)]

    def _send(self, asked: _Asked, peer: PeerId, cut: int, bits: int, now: float, first: int | None = None) -> Upload:
        question, manifest, request = asked.question, asked.manifest, next(self._numbers)
        assert manifest is not None
        asked.phase, asked.peer, asked.requests[request] = Phase.ASKED, peer, peer
        asked.silent_at = now + self._patience_s(asked, now)
        self._by_request[request] = asked
        fell_back = asked.tier in ("continued", "full")
        samples = asked.unsure if fell_back and len(asked.unsure) < question.samples else None
        keep = asked.tier == "reduced" and manifest.plan.fallback == "continued"
        return Upload(question.number, peer, request, manifest.version, cut, bits, asked.tier, samples, keep, first)

    def _ask_another(self, asked: _Asked, now: float) -> list[Action]:
        """What has been asked so far is given up, but its answer is still welcome. Who was asked has been blamed."""
        asked.last_failure = self._holders.last_trouble
        if asked.peer is not None:
            asked.failed.add(asked.peer)
        return self._ask(asked, now)

    def _patience_s(self, asked: _Asked, now: float) -> float:
        """No more than half of what is left, where somebody else could be asked."""
        assert asked.manifest is not None
        left = asked.question.deadline - now
        expected = asked.question.samples * asked.manifest.plan.prediction.latency_s
        return min(self.config.patience_s + 4 * expected, left / 2 if len(self._holders) > 1 else left)

    def _failed(self, asked: _Asked, peer: PeerId, kind: str, reason: str, now: float) -> list[Action]:
        failure = f"{self._holders.addresses[peer]}: {reason}"
        match kind:
            case Failure.INPUT if asked.tier != "continued":
                return self._give_up(asked, kind, reason, now)
            case Failure.BUSY if asked.audit_of is not None:
                return self._end_audit(asked)
            case Failure.BUSY:
                asked.last_failure = failure
                self._holders.is_busy(peer, now)
                return self._ask(asked, now)
            case Failure.VERSION:
                asked.lacking.add(peer)
                asked.last_failure = failure
                return self._ask(asked, now)
            case Failure.FORGOTTEN if asked.tier == "continued":
                asked.last_failure = failure
                return self._ask(asked, now)
        return [self._holders.blame(peer, kind, reason, now), *self._ask_another(asked, now)]

    def _restart(self, asked: _Asked, now: float) -> list[Action]:
        """No server has its version any more: with the newest one from the beginning, or as soon as there is one."""
        assert asked.manifest is not None
        if asked.question.version is not None:
            return self._give_up(asked, Failure.VERSION, f"no server has version {asked.manifest.version} any more", now)
        asked.phase, asked.peer = Phase.WAITING, None
        return self._settled(now)

    def _result(self, asked: _Asked, peer: PeerId, result: Result, now: float) -> list[Action]:
        """Also of a server that was given up before: what it says is as good."""
        if asked.manifest is None or result.version != asked.manifest.version:
            return []
        self._holders.praise(peer)
        match asked.tier:
            case "audit":
                return self._end_audit(asked, result.payload)
            case "continued" | "full":
                return self._resolve(asked, now)
        is_kept = asked.manifest.plan.fallback == "continued"
        return self._decide(asked, result.payload, now, (peer, result.request) if is_kept else None)

    def _drop_requests(self, asked: _Asked) -> list[Action]:
        actions: list[Action] = [Forget(peer, request) for request, peer in asked.requests.items()]
        for request in asked.requests:
            del self._by_request[request]
        asked.requests.clear()
        return actions
