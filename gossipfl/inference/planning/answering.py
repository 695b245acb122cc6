"""The server's machine: whose questions are taken, what is computed next, and which versions are kept for it.

    PlanRequest   -> MakePlan, at once or when there is a version (newer than the device's); Later says that it waits
    Pull          -> Serve while the version is kept, else Refuse
    Activation    -> Keep each chunk; RunStage with the last one, else Failed: busy, draining, version, input
    Published     -> the versions beyond those kept are retired when nothing that runs uses them
    Drain         -> nothing more is taken; Finish when all that was taken is done

Nothing is kept that was not admitted: the first chunk of an activation says how large it is and is compared with what its cut
takes, and all that is under way or waits has a bound, for each caller and together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gossipfl.inference.planning.offers import Ask, Failure
from gossipfl.protocol.messages import (
    MAX_RANGES,
    NEWEST,
    Activation,
    Failed,
    Later,
    Message,
    PlanRequest,
    Pull,
    Refuse,
)

MAX_SAMPLES = 65_536
"""In one activation."""


class Caller(NamedTuple):
    """Who asks, on which connection, and by which name the model is called (`name@anything`). Answers go back the same way."""

    origin: bytes
    name: str
    called: str

    @property
    def model(self) -> str:
        return self.called.partition("@")[0]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Bounds of what is under way: stages and plans that wait or run, requests of one caller, bytes of activations in all."""

    max_queued: int = 64
    max_per_caller: int = 16
    max_waiting_plans: int = 4096
    max_bytes: int = 512 * 1024 * 1024
    versions_kept: int = 4
    upload_s: float = 10.0
    """Silence after which an activation that is not whole is dropped."""


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heard:
    """A well-formed message; the payload of a PlanRequest is its Ask, or None if it is none."""

    caller: Caller
    message: Message


@dataclass(frozen=True, slots=True)
class Published:
    """A version can be served. `num_bytes(cut, bits, samples)`: what an activation takes, None where there is no such cut."""

    model: str
    version: int
    num_bytes: Callable[[int, int, int], int | None]


@dataclass(frozen=True, slots=True)
class Planned:
    """A MakePlan has been carried out and answered, well or not."""

    caller: Caller
    request: int


@dataclass(frozen=True, slots=True)
class Ran:
    """A RunStage has been carried out and answered, well or not."""

    caller: Caller
    request: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing more."""


@dataclass(frozen=True, slots=True)
class Wake:
    """`next_deadline` has come."""


Event = Heard | Published | Planned | Ran | Drain | Wake


# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    caller: Caller
    message: Message


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Plan for this device and answer with an Offer of `version`, or Failed; report Planned."""

    caller: Caller
    request: int
    version: int
    ask: Ask


@dataclass(frozen=True, slots=True)
class Serve:
    """Encode and send what is pulled, or Refuse where it is nothing that is served."""

    caller: Caller
    pull: Pull


@dataclass(frozen=True, slots=True)
class Keep:
    """Add this chunk to its activation."""

    caller: Caller
    chunk: Activation


@dataclass(frozen=True, slots=True)
class Discard:
    """Drop what was kept of an activation."""

    caller: Caller
    request: int


@dataclass(frozen=True, slots=True)
class RunStage:
    """Run the layers after the cut on what was kept and answer with a Result, or Failed; report Ran."""

    caller: Caller
    activation: Activation


@dataclass(frozen=True, slots=True)
class Retire:
    """Forget a version of a model."""

    model: str
    version: int


@dataclass(frozen=True, slots=True)
class Finish:
    """All that was taken is done."""


Action = Reply | MakePlan | Serve | Keep | Discard | RunStage | Retire | Finish


# --- the machine ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Upload:
    """An activation on its way in, or in the works."""

    total: int
    model: str
    version: int
    deadline: float
    num_bytes: int = 0
    is_running: bool = False


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
        self._planning: set[Key] = set()
        self._retiring: list[tuple[str, int]] = []
        self._is_draining = False
        self._has_finished = False

    @property
    def next_deadline(self) -> float | None:
        times = [upload.deadline for upload in self._uploads.values() if not upload.is_running]
        times += [expires for served in self._models.values() for _, _, expires in served.waiting.values()]
        return min(times, default=None)

    @property
    def num_running(self) -> int:
        """Stages that run or wait for the one that does."""
        return sum(upload.is_running for upload in self._uploads.values())

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Heard(caller, Activation() as chunk):
                return self._activation(caller, chunk, now)
            case Heard(caller, PlanRequest(request, ask)):
                return self._plan(caller, request, ask, now)
            case Heard(caller, Pull() as pull):
                return self._pull(caller, pull)
            case Planned(caller, request):
                self._planning.discard((caller, request))
                return self._finish()
            case Ran(caller, request):
                del self._uploads[caller, request]
                return [*self._retire(), *self._finish()]
            case Published(model, version, num_bytes):
                return self._published(model, version, num_bytes)
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
        for served in self._models.values():
            for caller, (_, _, expires) in list(served.waiting.items()):
                if expires <= now:
                    del served.waiting[caller]  # it asks again
        return [*actions, *self._retire(), *self._finish()]

    # --- versions -----------------------------------------------------------------------------------------------------

    def _published(self, model: str, version: int, num_bytes: Callable[[int, int, int], int | None]) -> list[Action]:
        served = self._models.setdefault(model, _Served())
        served.num_bytes = num_bytes
        served.versions.append(version)
        while len(served.versions) > self.config.versions_kept:
            self._retiring.append((model, served.versions.pop(0)))
        waiting, served.waiting = served.waiting, {}
        actions: list[Action] = []
        for caller, (request, ask, _) in waiting.items():
            actions += self._make_plan(caller, request, version, ask)
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
            return self._make_plan(caller, request, newest, ask)
        if not ask.wait_s:
            return _fail(caller, request, Failure.VERSION, f"no version of {caller.model!r} is ready yet; wait for one")
        if caller not in served.waiting and len(served.waiting) >= self.config.max_waiting_plans:
            return _fail(caller, request, Failure.BUSY, f"{len(served.waiting)} devices wait for a new version already")
        served.waiting[caller] = request, ask, now + ask.wait_s
        return [Reply(caller, Later(request, 0))]

    def _make_plan(self, caller: Caller, request: int, version: int, ask: Ask) -> list[Action]:
        if (caller, request) in self._planning:
            return []
        if len(self._planning) >= self.config.max_waiting_plans:
            return _fail(caller, request, Failure.BUSY, f"{len(self._planning)} plans are made already")
        self._planning.add((caller, request))
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

    def _activation(self, caller: Caller, chunk: Activation, now: float) -> list[Action]:
        key = caller, chunk.request
        upload = self._uploads.get(key)
        if chunk.offset == 0 and upload is None:
            obstacle = self._obstacle(caller, chunk)
            if obstacle is not None:
                return _fail(caller, chunk.request, *obstacle)
            upload = self._uploads[key] = _Upload(chunk.total, caller.model, chunk.version, now)
        elif upload is None or upload.is_running or (chunk.offset, chunk.total) != (upload.num_bytes, upload.total):
            return []  # what is not admitted, or comes twice
        upload.num_bytes += len(chunk.payload)
        upload.deadline = now + self.config.upload_s
        if upload.num_bytes < upload.total:
            return [Keep(caller, chunk)]
        upload.is_running = True
        return [Keep(caller, chunk), RunStage(caller, chunk)]

    def _obstacle(self, caller: Caller, chunk: Activation) -> tuple[Failure, str] | None:
        """Why this activation cannot be taken."""
        config, served = self.config, self._models.get(caller.model)
        if self._is_draining:
            return Failure.DRAINING, "this server is about to stop; ask another"
        if served is None:
            return Failure.MODEL, f"no model {caller.model!r} here"
        if chunk.version not in served.versions:
            here = ", ".join(map(str, served.versions)) or "none yet"
            return Failure.VERSION, f"no version {chunk.version} here; there is {here}"
        expected = served.num_bytes(chunk.cut, chunk.bits, chunk.samples) if 0 < chunk.samples <= MAX_SAMPLES else None
        if expected != chunk.total:
            what = f"{chunk.samples} samples of {chunk.bits} bits after {chunk.cut} layers"
            return (
                Failure.INPUT,
                f"{chunk.total} bytes for {what}, which take {'no such cut' if expected is None else expected}",
            )
        if len(self._uploads) >= config.max_queued:
            return Failure.BUSY, f"{len(self._uploads)} requests are here already; ask again, or another server"
        if sum(caller == other for other, _ in self._uploads) >= config.max_per_caller:
            return Failure.BUSY, f"{config.max_per_caller} requests of yours are here already; ask again"
        if sum(upload.total for upload in self._uploads.values()) + chunk.total > config.max_bytes:
            return Failure.BUSY, f"{chunk.total} bytes more than there is room for now; ask again"
        return None


def _fail(caller: Caller, request: int, kind: Failure, reason: str) -> list[Action]:
    return [Reply(caller, Failed(request, kind, reason))]
