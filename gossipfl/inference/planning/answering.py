"""The server's machine: whose questions are taken, what is computed next, and which versions are kept for it.

    PlanRequest   -> MakePlan, at once or when there is a version (newer than the device's); Later says that it waits, or that
                     making it takes long, as a certificate does
    Pull          -> Serve while the version is kept, else Refuse
    Activation    -> Keep each chunk; RunStage with the last one, else Failed: busy, draining, version, input
    Continuation  -> the same with RunAgain, of an activation that is remembered, else Failed: forgotten
    Published     -> the versions beyond those kept are retired when nothing that runs uses them
    Drain         -> nothing more is taken; Finish when all that was taken is done

Nothing is kept that was not admitted: the first chunk of an activation says how large it is and is compared with what its cut
takes, and all that is under way or waits has a bound, for each caller and together. So has what is remembered of answered
activations that may be continued; the oldest are forgotten first, and whoever comes too late starts afresh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from gossipfl.inference.planning.offers import Ask, Failure
from gossipfl.inference.planning.remembered import First, Remembered
from gossipfl.inference.planning.server_words import (
    Action,
    Caller,
    Discard,
    Drain,
    Event,
    Finish,
    Heard,
    Keep,
    MakePlan,
    Planned,
    Published,
    Ran,
    Reply,
    Retire,
    RunAgain,
    RunStage,
    Serve,
)
from gossipfl.protocol.machine import Wake
from gossipfl.protocol.messages import MAX_RANGES, NEWEST, Activation, Continuation, Failed, Later, PlanRequest, Pull, Refuse
from gossipfl.segments.codecs.planes import MAX_PLANES

MAX_SAMPLES = 65_536
"""In one activation."""
PLAN_S = 0.5
"""After it Later says that a plan is made: devices are patient for 5 s without a word."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Bounds of what is under way: stages and plans that wait or run, requests of one caller, bytes of activations in all; and
    of the answered activations that are remembered."""

    max_queued: int = 64
    max_per_caller: int = 16
    max_waiting_plans: int = 4096
    max_bytes: int = 512 * 1024 * 1024
    versions_kept: int = 4
    upload_s: float = 10.0
    """Silence after which an activation that is not whole is dropped."""
    remember_s: float = 30.0
    """For so long an activation may be continued: to send the first chunk takes a slow device seconds."""
    max_remembered_bytes: int = 64 * 1024 * 1024
    max_remembered_bytes_per_caller: int = 16 * 1024 * 1024


@dataclass(slots=True)
class _Upload:
    """An activation on its way in, or in the works; `first`: what it continues. `remember`: it may be continued itself."""

    total: int
    model: str
    version: int
    deadline: float
    first: First | None = None
    remember: First | None = None
    num_bytes: int = 0
    is_running: bool = False

    @property
    def held_bytes(self) -> int:
        return self.total + (self.first.num_bytes if self.first else 0)


@dataclass(slots=True)
class _Served:
    num_bytes: Callable[[int, int, int], int | None] = lambda cut, bits, samples: None
    versions: list[int] = field(default_factory=list)
    waiting: dict[Caller, tuple[int, Ask, float]] = field(default_factory=dict)  # request and when it expires


Key = tuple[Caller, int]


class Answerer:
    def __init__(self, config: ServerConfig | None = None, models: Iterable[str] = ()) -> None:
        """`models` that there will be a version of: who asks for a plan before there is one may wait for it."""
        self.config = config or ServerConfig()
        self._models = {model: _Served() for model in models}
        self._uploads: dict[Key, _Upload] = {}
        self._remembered = Remembered[Caller](
            self.config.remember_s, self.config.max_remembered_bytes, self.config.max_remembered_bytes_per_caller
        )
        self._planning: dict[Key, float] = {}  # when to say that it takes long
        self._retiring: list[tuple[str, int]] = []
        self._is_draining = False
        self._has_finished = False

    @property
    def next_deadline(self) -> float | None:
        times = [upload.deadline for upload in self._uploads.values() if not upload.is_running]
        times += [expires for served in self._models.values() for _, _, expires in served.waiting.values()]
        times += [due for due in self._planning.values() if due < math.inf]
        forgetting = self._remembered.next_deadline
        return min(times if forgetting is None else [*times, forgetting], default=None)

    @property
    def num_running(self) -> int:
        """Stages that run or wait for the one that does."""
        return sum(upload.is_running for upload in self._uploads.values())

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Heard(caller, Activation() | Continuation() as chunk):
                return self._upload(caller, chunk, now)
            case Heard(caller, PlanRequest(request, ask)):
                return self._plan(caller, request, ask, now)
            case Heard(caller, Pull() as pull):
                return self._pull(caller, pull)
            case Planned(caller, request):
                self._planning.pop((caller, request), None)
                return self._finish()
            case Ran(caller, request):
                first = self._uploads.pop((caller, request)).remember
                return [*(self._remember(caller, first, now) if first else []), *self._retire(), *self._finish()]
            case Published(model, version, num_bytes):
                return self._published(model, version, num_bytes, now)
            case Wake():
                return self._wake(now)
            case Drain():
                self._is_draining = True
                refused = [
                    Reply(caller, Failed(request, Failure.DRAINING, "this server is about to stop; ask another"))
                    for served in self._models.values()
                    for caller, (request, _, _) in served.waiting.items()
                ]
                for served in self._models.values():
                    served.waiting.clear()
                return [*refused, *self._finish()]
        return []

    def _wake(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for key, upload in list(self._uploads.items()):
            if not upload.is_running and upload.deadline <= now:
                del self._uploads[key]
                actions.append(Discard(*key))
                actions += [Discard(key[0], upload.first.request)] if upload.first else []
        actions += [Discard(*key) for key in self._remembered.expire(now)]
        for served in self._models.values():
            for caller, (_, _, expires) in list(served.waiting.items()):
                if expires <= now:
                    del served.waiting[caller]  # it asks again
        for (caller, request), due in self._planning.items():
            if due <= now:
                self._planning[caller, request] = math.inf
                actions.append(Reply(caller, Later(request, 0)))
        return [*actions, *self._retire(), *self._finish()]

    # --- versions -----------------------------------------------------------------------------------------------------

    def _published(
        self, model: str, version: int, num_bytes: Callable[[int, int, int], int | None], now: float
    ) -> list[Action]:
        served = self._models.setdefault(model, _Served())
        served.num_bytes = num_bytes
        served.versions.append(version)
        actions: list[Action] = []
        while len(served.versions) > self.config.versions_kept:
            self._retiring.append((model, served.versions.pop(0)))
            actions += self._forget_version(*self._retiring[-1])
        waiting, served.waiting = served.waiting, {}
        for caller, (request, ask, _) in waiting.items():
            actions += self._make_plan(caller, request, version, ask, now)
        return [*actions, *self._retire()]

    def _retire(self) -> list[Action]:
        """Forget the versions that are no longer kept, once nothing uses them."""
        in_use = {(upload.model, upload.version) for upload in self._uploads.values()}
        ready = [key for key in self._retiring if key not in in_use]
        self._retiring = [key for key in self._retiring if key in in_use]
        return [Retire(*key) for key in ready]

    def _finish(self) -> list[Action]:
        if not self._is_draining or self._has_finished or self._uploads or self._planning:
            return []
        self._has_finished = True
        return [Finish()]

    # --- plans and pulls ----------------------------------------------------------------------------------------------

    def _plan(self, caller: Caller, request: int, ask: Ask | None, now: float) -> list[Action]:
        served = self._models.get(caller.model)
        if ask is None:
            return _fail(caller, request, Failure.INPUT, "this is no plan request; send what `offers.Ask` says, as JSON")
        if self._is_draining:
            return _fail(caller, request, Failure.DRAINING, "this server is about to stop; ask another")
        if served is None:
            here = ", ".join(sorted(self._models)) or "none"
            return _fail(caller, request, Failure.MODEL, f"no model {caller.model!r} here; there is {here}")
        newest = served.versions[-1] if served.versions else 0
        if newest and (ask.held < newest or not ask.wait_s):
            return self._make_plan(caller, request, newest, ask, now)
        if not ask.wait_s:
            return _fail(caller, request, Failure.VERSION, f"no version of {caller.model!r} is ready yet; wait for one")
        if caller not in served.waiting and len(served.waiting) >= self.config.max_waiting_plans:
            return _fail(caller, request, Failure.BUSY, f"{len(served.waiting)} devices wait for a new version already")
        served.waiting[caller] = request, ask, now + ask.wait_s
        return [Reply(caller, Later(request, 0))]

    def _make_plan(self, caller: Caller, request: int, version: int, ask: Ask, now: float) -> list[Action]:
        if (caller, request) in self._planning:
            return []
        if len(self._planning) >= self.config.max_waiting_plans:
            return _fail(caller, request, Failure.BUSY, f"{len(self._planning)} plans are made already")
        self._planning[caller, request] = now + PLAN_S
        return [MakePlan(caller, request, version, ask)]

    def _pull(self, caller: Caller, pull: Pull) -> list[Action]:
        served = self._models.get(caller.model)
        versions = served.versions if served else []
        version = versions[-1] if versions and pull.version == NEWEST else pull.version
        if version not in versions or len(pull.ranges) > MAX_RANGES:
            oldest, newest = (versions[0], versions[-1]) if versions else (0, 0)
            return [Reply(caller, Refuse(pull.request, oldest, newest))]
        return [Serve(caller, replace(pull, version=version))]

    # --- activations --------------------------------------------------------------------------------------------------

    def _upload(self, caller: Caller, chunk: Activation | Continuation, now: float) -> list[Action]:
        key, actions = (caller, chunk.request), list[Action]()
        upload = self._uploads.get(key)
        if chunk.offset == 0 and upload is None:
            found = self._admit(caller, chunk, now)
            if isinstance(found, tuple):
                return _fail(caller, chunk.request, *found)
            actions += self._forget(key)  # what has this number is another now
            upload = self._uploads[key] = found
        elif upload is None or upload.is_running or (chunk.offset, chunk.total) != (upload.num_bytes, upload.total):
            return []  # what is not admitted, or comes twice
        upload.num_bytes += len(chunk.payload)
        upload.deadline = now + self.config.upload_s
        if upload.num_bytes < upload.total:
            return [*actions, Keep(caller, chunk)]
        upload.is_running = True
        if isinstance(chunk, Activation):
            return [*actions, Keep(caller, chunk), RunStage(caller, chunk, upload.remember is not None)]
        assert upload.first is not None, "it was admitted"
        return [*actions, Keep(caller, chunk), RunAgain(caller, chunk, upload.first)]

    def _admit(self, caller: Caller, chunk: Activation | Continuation, now: float) -> _Upload | tuple[Failure, str]:
        """What begins with this chunk, or why it cannot be taken."""
        if isinstance(chunk, Activation):
            first = First(chunk.request, chunk.version, chunk.cut, chunk.bits, chunk.samples, chunk.total)
            upload = _Upload(chunk.total, caller.model, chunk.version, now)
            upload.remember = first if chunk.keep and chunk.bits < MAX_PLANES else None
            return self._obstacle(caller, chunk, first) or upload
        known = self._remembered.get(caller, chunk.first)
        if known is None or chunk.first == chunk.request:
            return Failure.FORGOTTEN, f"nothing is kept of request {chunk.first} (any more); start afresh"
        obstacle = self._obstacle(caller, chunk, known)
        if obstacle is not None:
            return obstacle
        self._remembered.take(caller, chunk.first)
        return _Upload(chunk.total, caller.model, known.version, now, known)

    def _obstacle(self, caller: Caller, chunk: Activation | Continuation, of: First) -> tuple[Failure, str] | None:
        """Why this cannot be taken: the activation `of`, or a continuation of it."""
        config, served = self.config, self._models.get(caller.model)
        if self._is_draining:
            return Failure.DRAINING, "this server is about to stop; ask another"
        if served is None:
            return Failure.MODEL, f"no model {caller.model!r} here"
        if of.version not in served.versions:
            here = ", ".join(map(str, served.versions)) or "none yet"
            return Failure.VERSION, f"no version {of.version} here; there is {here}"
        if isinstance(chunk, Activation):
            held_bytes, most, expected = chunk.total, MAX_SAMPLES, served.num_bytes
        else:
            held_bytes, most, expected = chunk.total + of.num_bytes, of.samples, partial(_missing_bytes, served, of)
        takes = expected(of.cut, of.bits, chunk.samples) if 0 < chunk.samples <= most else None
        if takes != chunk.total:
            what = f"{chunk.samples} samples of {of.bits} bits after {of.cut} layers"
            return Failure.INPUT, f"{chunk.total} bytes for {what}, which take {'no such cut' if takes is None else takes}"
        if any((caller, chunk.request) == (other, one.first.request) for (other, _), one in self._uploads.items() if one.first):
            return Failure.INPUT, f"request {chunk.request} is being continued; number requests anew"
        if len(self._uploads) >= config.max_queued:
            return Failure.BUSY, f"{len(self._uploads)} requests are here already; ask again, or another server"
        if sum(caller == other for other, _ in self._uploads) >= config.max_per_caller:
            return Failure.BUSY, f"{config.max_per_caller} requests of yours are here already; ask again"
        if sum(upload.held_bytes for upload in self._uploads.values()) + held_bytes > config.max_bytes:
            return Failure.BUSY, f"{chunk.total} bytes more than there is room for now; ask again"
        return None

    # --- what may be continued ----------------------------------------------------------------------------------------

    def _remember(self, caller: Caller, first: First, now: float) -> list[Action]:
        if self._is_draining or first.version not in self._models[caller.model].versions:
            return [Discard(caller, first.request)]
        return [Discard(*key) for key in self._remembered.add(caller, first, now)]

    def _forget(self, key: Key) -> list[Action]:
        return [] if self._remembered.take(*key) is None else [Discard(*key)]

    def _forget_version(self, model: str, version: int) -> list[Action]:
        actions: list[Action] = []
        for caller, request in self._remembered.keys:
            first = self._remembered.get(caller, request)
            if caller.model == model and first is not None and first.version == version:
                actions += self._forget((caller, request))
        return actions


def _missing_bytes(served: _Served, of: First, cut: int, bits: int, samples: int) -> int | None:
    """What a continuation takes: the planes that are missing, and the marks of the samples."""
    whole, part = served.num_bytes(cut, MAX_PLANES, samples), served.num_bytes(cut, bits, samples)
    return None if whole is None or part is None else whole - part + -(-of.samples // 8)


def _fail(caller: Caller, request: int, kind: Failure, reason: str) -> list[Action]:
    return [Reply(caller, Failed(request, kind, reason))]
