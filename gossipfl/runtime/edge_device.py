"""Inference on an edge device that shares the work with servers: the first layers here, quantized, the others there.

    device = EdgeDevice(["tcp://10.0.0.1:5800", "tcp://10.0.0.2:5800"], chain, model="digits", max_accuracy_loss=0.01)
    answer = device.predict(x)                       # x f32[B, *input_shape]; answer.scores f32[B, K], answer.receipt
    device.close()

`chain` is the same model as the servers' (its weights do not matter): code never travels. The device asks for a plan, pulls
what it lacks, and from then on answers from the newest version that is ready. Messages move on one thread, layers run on a
second, unless they are too brief for that, and a third loads new versions beside the one in use.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gossipfl.errors import ConfigError, GossipflError, PlanError, RunError
from gossipfl.inference.execution.activations import encode_live, encode_missing, samples_to_text
from gossipfl.inference.execution.engines import MAX_SAMPLES, missing_engines
from gossipfl.inference.planning.asking import Asker
from gossipfl.inference.planning.audit import SHARE
from gossipfl.inference.planning.device_words import (
    Action,
    Audited,
    Event,
    Fail,
    Forget,
    Found,
    HeadDone,
    Load,
    Loaded,
    LookUp,
    Question,
    Report,
    Resolve,
    RunHead,
    Send,
    SetAside,
    Unload,
    Upload,
)
from gossipfl.inference.planning.fetching import DeviceConfig
from gossipfl.inference.planning.offers import Ask, Failure, to_json
from gossipfl.inference.planning.profile import DeviceProfile, check_device, check_loss, is_within
from gossipfl.inference.planning.receipts import Answer, Budget, ServedModel
from gossipfl.protocol import wire
from gossipfl.protocol.machine import PeerDown, PeerUp, Received, Rejected, Start, Wake
from gossipfl.protocol.messages import (
    INFERENCE_RUN,
    Activation,
    Continuation,
    Data,
    Failed,
    Message,
    Offer,
    PeerId,
    PlanRequest,
    Pull,
    Refuse,
    Result,
)
from gossipfl.runtime.content_cache import DEFAULT_BYTES, ContentCache
from gossipfl.runtime.device_inbox import Coming, take_data, take_offer, take_result
from gossipfl.runtime.device_questions import Job, answer, set_aside
from gossipfl.runtime.device_versions import DeviceVersion
from gossipfl.runtime.message_loop import MessageLoop
from gossipfl.runtime.stages import ModelChain, check_inputs, emulated, threads
from gossipfl.runtime.transport import Happening, Incoming, LinkDown, LinkUp, ZmqTransport

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""Past its timeout a question has been answered or has failed, unless a thread here has died."""
MAX_S = 1e9
"""Of any time that is given: decades, and the sum of two is still a time."""
Key = tuple[PeerId, int]


class EdgeDevice:
    """Asks `servers` (their addresses), which all serve `model`. An `InferenceService` of one model.

    `cache` is a folder for the pieces that have been pulled (None: in memory), of at most `cache_bytes`. Where no server
    answers in time, the reduced model's answer stands, marked "unverified", or the question fails (`on_no_server`). `samples`
    (f32[n, *input_shape]) are what engines other than "fp32" are compiled with where the server sends none. An engine that
    cannot be used here, or is slower than "fp32", is `refused`, and a plan without it asked for. `audit_share`
    of the samples are compared with the full model after they have been answered, to see whether a certificate still holds; 0:
    none. `emulated_speed` makes the device's part take as much longer as on a device of that speed, for measuring.
    """

    def __init__(
        self,
        servers: Sequence[str],
        chain: ModelChain,
        device_profile: DeviceProfile | None = None,
        max_accuracy_loss: float | None = None,
        on_no_server: Literal["unverified", "fail"] = "unverified",
        *,
        model: str = "model",
        cache: str | Path | None = None,
        cache_bytes: int = DEFAULT_BYTES,
        samples: np.ndarray | None = None,
        patience_s: float = 5.0,
        wait_s: float = 60.0,
        audit_share: float = SHARE,
        emulated_speed: float = 1.0,
    ) -> None:
        if not servers:
            raise ConfigError("servers = [] answers nothing; name the address of one at least, as tcp://host:port")
        if on_no_server not in ("unverified", "fail"):
            raise ConfigError(f"on_no_server = {on_no_server!r}; choose 'unverified' or 'fail'")
        if not is_within(0, emulated_speed, 1) or not emulated_speed:
            raise ConfigError(
                f"emulated_speed = {emulated_speed!r}; waiting only makes slower, give a number above 0, 1 at most"
            )
        if not is_within(0, audit_share, 1):
            raise ConfigError(f"audit_share = {audit_share!r}; give the share of answers to audit, 0 to 1")
        if not is_within(0, patience_s, MAX_S) or not patience_s:
            raise ConfigError(f"patience_s = {patience_s!r}; give seconds above 0, {MAX_S:g} at most")
        if not is_within(0, wait_s, MAX_S):
            raise ConfigError(f"wait_s = {wait_s!r}; give seconds of at least 0, {MAX_S:g} at most")
        profile = device_profile or DeviceProfile()
        check_device(profile)
        check_loss(max_accuracy_loss)
        self._chain, self._model = chain, model
        self._emulated_speed = emulated_speed
        self._cache = ContentCache(cache, cache_bytes)
        self._name = f"device-{secrets.token_hex(8)}"
        addresses = {f"{model}@{index}": address for index, address in enumerate(servers)}
        own = "" if samples is None else samples_to_text(check_inputs(samples[:MAX_SAMPLES], chain.profile.input_shape))
        config = DeviceConfig(profile, max_accuracy_loss, on_no_server, patience_s, wait_s, audit_share, own, missing_engines())
        self._machine = Asker(config, addresses, chain.profile)
        self._transport = ZmqTransport(f"inproc://{uuid.uuid4().hex}", run=INFERENCE_RUN)
        try:
            for peer, address in addresses.items():
                self._transport.connect(peer, address)
        except ConfigError:
            self._transport.close()
            raise
        self._loop = MessageLoop(self._transport, self, "gossipfl-edge-device")
        self._compute = threads("gossipfl-head")
        self._loader = threads("gossipfl-loader")
        self._numbers = itertools.count()
        self._jobs: dict[int, Job] = {}
        self._coming: dict[Key, Coming] = {}
        self._versions: dict[int, DeviceVersion] = {}
        self._not_as_planned: DeviceVersion | None = None  # loaded, of the loader's thread
        self._error: BaseException | None = None
        self.faults: list[Report] = []
        """The last things that went wrong with servers and were survived."""
        self.bytes_pulled = 0
        """Payload of the pieces that have been pulled."""
        self.bytes_offered = 0
        """Payload of the offers that have come, with the samples to compile engines with."""
        self.first_asks: list[Ask] = []
        """For a first version, each without other engines than the one before."""
        self.seconds_pulled = 0.0
        """From the last Pull to the last of what it asked for."""
        self._loop.start()
        self._loop.post(lambda: self._handle(Start()))

    # --- for people ---------------------------------------------------------------------------------------------------

    def predict(self, inputs: np.ndarray, timeout_s: float = 30.0) -> Answer:
        """Scores of `inputs` (f32[B, *input_shape]) within `timeout_s`. May be called from any thread.

        ConfigError for inputs that do not fit and plans that cannot be; RunError where there is no answer in time.
        """
        return self.infer(self._model, inputs, Budget(timeout_s=timeout_s))

    def infer(self, model: str, inputs: np.ndarray, budget: Budget | None = None, version: int | None = None) -> Answer:
        """As `predict`. The accuracy is as the device was made with: a budget of less loss than that is refused."""
        budget = budget or Budget()
        if model != self._model:
            raise ConfigError(f"no model {model!r} here; there is {self._model}")
        wanted, planned = budget.max_accuracy_loss, self._machine.config.max_accuracy_loss
        if wanted is not None and planned is not None and wanted < planned:
            raise ConfigError(f"max_accuracy_loss = {wanted}, this device is made for {planned}; make one for {wanted}")
        try:
            return self.submit(inputs, budget.timeout_s, version).result(budget.timeout_s + GRACE_S)
        except NotInTime as error:
            raise RunError(f"no answer within {budget.timeout_s:g} s, nor soon after; ask less at once") from error

    def submit(self, inputs: np.ndarray, timeout_s: float = 30.0, version: int | None = None) -> Future[Answer]:
        """As `predict`, without waiting. `inputs` must stay as they are until there is an answer."""
        if not is_within(0, timeout_s, MAX_S) or not timeout_s:
            raise ConfigError(f"timeout_s = {timeout_s!r}; give seconds above 0, {MAX_S:g} at most")
        inputs = check_inputs(inputs, self._chain.profile.input_shape)
        if not self._loop.is_running:
            raise RunError("the device is closed; make another") from self._error
        job = Job(inputs, time.perf_counter(), Future())
        question = Question(next(self._numbers), len(inputs), time.monotonic() + timeout_s, version)
        self._jobs[question.number] = job
        self._loop.post(lambda: self._handle(question))
        if not self._loop.is_running:  # it may have ended before it took the job
            _fail(job, RunError("the device is closed; make another"))
        return job.future

    def models(self) -> tuple[ServedModel, ...]:
        """The one model, once a version of it is ready."""
        active, profile = self._machine.fetcher.active, self._chain.profile
        if active is None:
            return ()
        return (ServedModel(self._model, active.version, profile.input_shape, profile.num_classes),)

    @property
    def refused(self) -> dict[str, str]:
        """Engines that do not work here, or were planned and did not, or were slower than "fp32"; and why."""
        return self._machine.fetcher.refused.copy()

    @property
    def waits_for(self) -> str | None:
        """What keeps the first version, for people; None once it is there."""
        return self._machine.waits_for

    @property
    def is_awaited(self) -> bool:
        """Whether a server has said that it is at a first version for this device, which may take long."""
        return self._machine.fetcher.is_awaited

    def close(self) -> None:
        """Give up what is under way. Closing twice is allowed."""
        self._loop.stop(flush_s=0.0)
        self._compute.shutdown(wait=False, cancel_futures=True)
        self._loader.shutdown(wait=False, cancel_futures=True)
        for job in list(self._jobs.values()):
            _fail(job, RunError("the device was closed before there was an answer"))

    def __enter__(self) -> EdgeDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the machine's shell, on the loop's thread --------------------------------------------------------------------

    @property
    def next_deadline(self) -> float | None:
        return self._machine.next_deadline

    def wake(self) -> None:
        self._handle(Wake())

    def crashed(self, error: BaseException) -> None:
        self._error = error
        for job in list(self._jobs.values()):
            _fail(job, RunError(f"the message thread stopped: {error}"))

    def take(self, happening: Happening) -> None:
        match happening:
            case Incoming():
                self._hear(happening)
            case LinkUp(peers):
                for peer in peers:
                    self._handle(PeerUp(peer))
            case LinkDown(peers):
                for peer in peers:
                    self._handle(PeerDown(peer))

    def _handle(self, event: Event) -> None:
        for action in self._machine.handle(event, time.monotonic()):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case Send(peer, message):
                self._send(peer, message)
            case RunHead(number, version):
                self._begin_head(number, self._jobs[number], self._versions[version])
            case Upload():
                self._upload(action)
            case Resolve(number, manifest):
                job, engine = self._jobs.pop(number), self._versions[manifest.version].engine
                _settle(job.future.set_result, answer(job, action, engine))
            case SetAside(number, audit, samples, continued):
                self._jobs[audit] = set_aside(self._jobs[number], samples, continued)
            case Audited(audit):
                del self._jobs[audit]
            case Fail(number, kind, reason):
                _fail(self._jobs.pop(number), _error_of(kind, reason))
            case Forget(peer, request):
                self._coming.pop((peer, request), None)
                self._transport.cancel(peer, request)
            case LookUp(manifest):
                memory_bytes = self._machine.config.device.memory_bytes
                self._versions[manifest.version] = DeviceVersion(manifest, self._chain, memory_bytes)
                self._loader.submit(self._look_up, self._versions[manifest.version])
            case Load(manifest):
                self._loader.submit(self._load, self._versions[manifest.version])
            case Unload(version):
                self._versions.pop(version, None)
            case Report():
                logger.info("%s %s: %s", action.source, action.kind, action.detail)
                self.faults = [*self.faults[-63:], action]

    # --- what goes out ------------------------------------------------------------------------------------------------

    def _send(self, peer: PeerId, message: Message) -> None:
        match message:
            case PlanRequest(request, ask):
                assert isinstance(ask, Ask)
                if not ask.held and (not self.first_asks or self.first_asks[-1].refused != ask.refused):
                    self.first_asks.append(ask)
                self._coming[peer, request] = Coming()
                self._transport.send(self._name, peer, PlanRequest(request, payload=to_json(ask)))
            case Pull(request, version, _, ranges, codec_):
                parts = {range_: bytearray() for range_ in ranges}
                self._coming[peer, request] = Coming(sent_at=time.perf_counter(), codec=codec_, version=version, ranges=parts)
                self._transport.send(self._name, peer, message)

    def _upload(self, upload: Upload) -> None:
        job, request, now = self._jobs[upload.number], upload.request, time.perf_counter()
        rows = list(range(len(job.inputs)) if upload.samples is None else upload.samples)
        if upload.first is not None:
            live = job.live if upload.cut else (job.inputs,)
            payload = memoryview(encode_missing(live, upload.bits, rows))
        elif not upload.cut:
            inputs = job.inputs if upload.samples is None else job.inputs[rows]
            payload = memoryview(encode_live((inputs,), upload.bits))
        else:
            assert job.payload is not None, "its head has run"
            payload = memoryview(job.payload)
        self._coming[upload.peer, request] = Coming(job, upload.tier, len(rows), time.perf_counter())
        job.bytes_up += len(payload)
        if upload.tier in ("continued", "full") and job.reduced is not None:
            job.fallback_bytes_up += len(payload)
            job.fell_back_at = job.fell_back_at or now
        for offset, part in wire.parts(payload):
            place = offset, len(payload)
            chunk: Activation | Continuation
            if upload.first is not None:
                chunk = Continuation(request, upload.first, len(rows), *place, payload=part)
            else:
                of = upload.version, upload.cut, upload.bits, len(rows)
                chunk = Activation(request, *of, *place, upload.keep, payload=part)
            self._transport.send(self._name, upload.peer, chunk)

    # --- what comes in ------------------------------------------------------------------------------------------------

    def _hear(self, incoming: Incoming) -> None:
        peer, message = incoming.sender, incoming.message
        request = getattr(message, "request", -1)
        coming = self._coming.get((peer, request))
        if coming is None or incoming.recipient != self._name:
            return
        heard: Message | None = message
        try:
            match message:
                case Offer():
                    heard = take_offer(coming, message, self._model, self._chain)
                    self.bytes_offered += message.total if heard is not None else 0
                case Data():
                    heard = take_data(coming, message, self._versions.get(coming.version), self._cache)
                    self.bytes_pulled += message.num_bytes if heard is not None else 0
                case Result():
                    heard = take_result(coming, message, self._chain.profile.num_classes, self._versions.get(message.version))
        except GossipflError as error:
            del self._coming[peer, request]
            self._handle(Rejected(peer, request, str(error)))
            return
        is_pulled = isinstance(heard, Data) and not coming.ranges
        if is_pulled:
            self.seconds_pulled = time.perf_counter() - coming.sent_at
        if is_pulled or isinstance(heard, Offer | Failed | Refuse):  # nothing more will come
            del self._coming[peer, request]
        if heard is not None:
            self._handle(Received(peer, heard))

    # --- what is computed ---------------------------------------------------------------------------------------------

    def _begin_head(self, number: int, job: Job, version: DeviceVersion) -> None:
        assert version.stage is not None, "it is loaded"
        if version.stage.is_brief(len(job.inputs) / self._emulated_speed):
            self._run_head(number, job, version)
        else:
            self._compute.submit(self._run_head, number, job, version)

    def _run_head(self, number: int, job: Job, version: DeviceVersion) -> None:
        found, failure = None, None
        began = time.perf_counter()
        try:
            found = emulated(lambda: self._head(job, version), self._emulated_speed)
        except Exception as error:  # whatever the kernels raise: the caller hears of it
            logger.exception("the device's layers failed")
            failure = f"the device's layers failed: {type(error).__name__}: {error}"
        job.device_s += time.perf_counter() - began
        self._loop.post(lambda: self._handle(HeadDone(number, found, failure)))

    def _head(self, job: Job, version: DeviceVersion) -> tuple[float, ...] | None:
        """The margins, or None where there are more layers."""
        assert version.stage is not None, "it is loaded"
        live, manifest = version.stage((job.inputs,)), version.manifest
        if manifest.cut < len(self._chain.profile.layers):
            job.payload = encode_live(live, manifest.plan.activation_bits)
            job.live = live if manifest.plan.fallback == "continued" else ()
            return None
        job.reduced, job.margins = live[0], version.margins_of(live[0])
        return job.margins

    def _look_up(self, version: DeviceVersion) -> None:
        """On the thread that loads."""
        have = version.look_up(self._cache)
        self._loop.post(lambda: self._handle(Found(version.manifest.version, have)))

    def _load(self, version: DeviceVersion) -> None:
        """On the thread that loads: the stage, from the pieces. Of one not as planned it is kept for the plan that follows."""
        failure = None
        try:
            version.load(self._not_as_planned)
            self._not_as_planned = version if version.refused else None
            for reason in version.refused.values():
                logger.info("%s; another plan is asked for", reason)
        except Exception as error:  # whatever a compiler raises: the device goes on with the version before
            logger.exception("version %d cannot be loaded", version.manifest.version)
            failure = f"version {version.manifest.version} cannot be loaded: {type(error).__name__}: {error}"
        self._loop.post(lambda: self._handle(Loaded(version.manifest.version, failure, version.engine, version.refused)))


def _error_of(kind: str, reason: str) -> GossipflError:
    """Whose fault it was."""
    if kind == Failure.PLAN:
        return PlanError(reason)
    return ConfigError(reason) if kind in (Failure.INPUT, Failure.VERSION, Failure.MODEL) else RunError(reason)


def _fail(job: Job, error: GossipflError) -> None:
    _settle(job.future.set_exception, error)


def _settle(settle: Callable[[Any], None], value: object) -> None:
    """Unless it has been given up by who asked, or by closing."""
    try:
        settle(value)
    except Exception:
        logger.debug("a question that nobody waits for is answered")
