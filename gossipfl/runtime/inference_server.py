"""Serves models to edge devices: plans, the pieces of the model that a plan puts on the device, and the layers after the cut.

    server = InferenceServer({"digits": chain})
    server.publish("digits", 1, chain.vector(), catalogue, calibrator.certify)
    print(server.address)                                  # where devices find it
    server.publish("digits", 2, newer, newer_catalogue)    # devices change over as they can; nobody mixes the two

Messages move on one thread, stages run on a second, and a third makes plans and pieces, so that a new version does not hold up
the answers of the one in use. A fourth certifies plans, which takes seconds and more: who needs one that nobody has needed
before waits for that, and nobody else. Devices call a model by its name, or by `name@anything`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from typing import Any

import numpy as np

from gossipfl.errors import CodecError, ConfigError, GossipflError, RemoteProtocolError, RunError
from gossipfl.inference.execution.activations import num_bytes
from gossipfl.inference.planning.answering import Answerer, ServerConfig
from gossipfl.inference.planning.catalogue import Catalogue
from gossipfl.inference.planning.json_values import MAX_INTEGER
from gossipfl.inference.planning.offers import Ask, Failure, ask_from_json
from gossipfl.inference.planning.profile import Plan
from gossipfl.inference.planning.receipts import Answer, Budget, Receipt, ServedModel
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
from gossipfl.protocol import wire
from gossipfl.protocol.machine import Wake
from gossipfl.protocol.messages import (
    FULL_BITS,
    INFERENCE_RUN,
    Activation,
    Chunk,
    Collect,
    Continuation,
    Data,
    Failed,
    Later,
    PlanRequest,
    Pull,
    Record,
    Refuse,
)
from gossipfl.runtime import model_list
from gossipfl.runtime.message_loop import MessageLoop
from gossipfl.runtime.model_list import Architecture
from gossipfl.runtime.served import Certifier, ServedVersion, nothing_certified
from gossipfl.runtime.server_answers import offered, pulled, run_again, run_stage, timed
from gossipfl.runtime.stages import ModelChain, check_inputs, clipped, live_shapes, threads
from gossipfl.runtime.transport import Happening, Incoming, ZmqTransport
from gossipfl.segments.codecs.planes import MAX_PLANES

logger = logging.getLogger(__name__)

MAX_SERVED = 256
"""Pulls being answered at once on one connection, and pulls that wait to be; more are refused."""
MAX_TOLD = 4096
"""Engines that devices refuse, each told once of each device; more are not told."""


Work = Callable[[], list[Chunk] | Failed | None]
"""What is answered; None: another thread goes on with it."""


class InferenceServer:
    """Serves `models`, once a version of each has been published. An `InferenceService` for callers in this process."""

    def __init__(
        self,
        models: Mapping[str, ModelChain],
        bind: str = "tcp://127.0.0.1:0",
        *,
        advertise: str | None = None,
        insecure: bool = False,
        config: ServerConfig | None = None,
        architectures: Iterable[Architecture] = (),
        told: Callable[[str], None] = logger.info,
    ) -> None:
        """`architectures` of the models, for devices that ask what is served here (`model_list.ask_models`); `told` hears of
        engines that devices do without."""
        for name in models:
            if not name or "@" in name or len(name.encode()) > wire.MAX_NAME_BYTES - 8:
                raise ConfigError(f"model {name!r}: name it with 1 to {wire.MAX_NAME_BYTES - 8} bytes and without '@'")
        self._chains = dict(models)
        self._architectures = {architecture.name: architecture for architecture in architectures}
        self._machine = Answerer(config, models)
        self._max_queued = self._machine.config.max_queued
        self._transport = ZmqTransport(bind, run=INFERENCE_RUN, advertise=advertise, insecure=insecure)
        self._loop = MessageLoop(self._transport, self, "gossipfl-inference-server")
        self._compute = threads("gossipfl-stages")
        self._library = threads("gossipfl-library")
        self._certifying = threads("gossipfl-certifying")
        self._served: dict[str, dict[int, ServedVersion]] = {name: {} for name in models}
        self._kept: dict[tuple[Caller, int], list[Any]] = {}  # chunks of activations
        self._num_pulls = 0
        self._told = told
        self._told_refused: set[tuple[str, str]] = set()
        self._publishing = threading.Lock()
        self._local = threading.Semaphore(self._max_queued)
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._loop.start()

    @property
    def address(self) -> str:
        return self._transport.address

    # --- for people ---------------------------------------------------------------------------------------------------

    def publish(
        self,
        model: str,
        version: int,
        vector: np.ndarray,
        catalogue: Catalogue,
        certificate: Certifier = nothing_certified,
        samples: np.ndarray | None = None,
        known: Certifier = nothing_certified,
    ) -> None:
        """Serve `vector` (f32[P], copied) as the newest version; returns once it is. Questions under way keep theirs.

        `certificate(plan)` is asked once for each plan that is offered, and each fallback that it may have, where there is none
        that is `known` already: that takes no time, and devices do not have to wait for their turn. Devices compile
        their engines with `samples` (f32[n, *input_shape]), if given. ConfigError for what does not fit the model or is no
        newer than what is served.
        """
        self._check_running()
        if model not in self._chains:
            raise ConfigError(f"no model {model!r} here; there is {', '.join(self._chains)}")
        if type(version) is not int or version > MAX_INTEGER:
            raise ConfigError(f"version = {version!r} of {model!r}; give a whole number of at most 63 bits")
        with self._publishing:
            newest = max(self._served[model], default=0)
            if version <= newest:
                raise ConfigError(f"version {version} of {model!r} is not newer than {newest}, which is served; count on")
            served = ServedVersion(model, version, self._chains[model], vector, catalogue, certificate, samples, known)
            served.stage(0)
            done: Future[None] = Future()
            self._loop.post(lambda: self._publish(served, done))
            _wait(done, 30.0, "the server did not take the version")

    def models(self) -> tuple[ServedModel, ...]:
        """Those of which a version has been published, the newest."""
        found = []
        for name, chain in self._chains.items():
            versions = tuple(self._served[name])
            if versions:
                found.append(ServedModel(name, max(versions), chain.profile.input_shape, chain.profile.num_classes))
        return tuple(found)

    def infer(self, model: str, inputs: np.ndarray, budget: Budget | None = None, version: int | None = None) -> Answer:
        """Scores of the full model for `inputs` (f32[B, *input_shape]). May be called from any thread."""
        budget = budget or Budget()
        self._check_running()
        served = self._version(model, version)
        inputs = check_inputs(inputs, self._chains[model].profile.input_shape)
        began = time.perf_counter()
        if not self._local.acquire(blocking=False):
            raise RunError(f"{self._max_queued} questions wait already; ask again, or ask another server")
        future = self._compute.submit(timed, lambda: served.stage(0)((inputs,)))
        future.add_done_callback(lambda _: self._local.release())
        (scores,), seconds = _wait(future, budget.timeout_s, "the server is busy")
        total = time.perf_counter() - began
        receipt = Receipt(
            model,
            served.version,
            tuple("full" for _ in inputs),
            engines=(served.stage(0).engine,),
            seconds={"device": 0.0, "transfer": 0.0, "server": seconds, "total": total},
        )
        return Answer(scores, receipt)

    def close(self, drain_s: float = 5.0) -> None:
        """Take nothing more, finish what has been taken within `drain_s`, and end. Closing twice is allowed."""
        if self._loop.is_running:
            self._loop.post(lambda: self._handle(Drain()))
            self._finished.wait(drain_s)
        self._loop.stop(flush_s=min(drain_s, 1.0))
        self._compute.shutdown(wait=False, cancel_futures=True)
        self._library.shutdown(wait=False, cancel_futures=True)
        self._certifying.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> InferenceServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_running(self) -> None:
        if self._error is not None:
            raise RunError(f"the message thread stopped: {self._error}") from self._error
        if not self._loop.is_running:
            raise RunError("the server is closed; make another")

    def _version(self, model: str, version: int | None) -> ServedVersion:
        if model not in self._chains:
            raise ConfigError(f"no model {model!r} here; there is {', '.join(self._chains)}")
        versions = self._served[model].copy()
        if not versions:
            raise ConfigError(f"no version of {model!r} has been published yet")
        wanted = max(versions) if version is None else version
        if wanted not in versions:
            raise ConfigError(f"no version {wanted} of {model!r} here; there is {', '.join(map(str, sorted(versions)))}")
        return versions[wanted]

    # --- the machine's shell, on the loop's thread --------------------------------------------------------------------

    @property
    def next_deadline(self) -> float | None:
        return self._machine.next_deadline

    def wake(self) -> None:
        self._handle(Wake())

    def crashed(self, error: BaseException) -> None:
        self._error = error

    def take(self, happening: Happening) -> None:
        if not isinstance(happening, Incoming) or happening.origin is None:
            return
        caller = Caller(happening.origin, happening.sender, happening.recipient)
        match happening.message:
            case PlanRequest(request, payload):
                self._handle(Heard(caller, PlanRequest(request, _ask(payload))))
            case Activation() | Continuation() | Pull():
                self._handle(Heard(caller, happening.message))
            case Collect(request, model_list.ITEM, offset):
                self._tell_models(caller, request, offset)

    def _tell_models(self, caller: Caller, request: int, offset: int) -> None:
        listed = model_list.to_json([self._architectures[name] for name in self._chains if name in self._architectures])
        if 0 <= offset < len(listed) and self._transport.num_queued(caller.origin) < MAX_SERVED:
            part = memoryview(listed)[offset : offset + wire.MAX_PAYLOAD_BYTES]
            answer = Record(request, offset, len(listed), payload=part)
            self._transport.queue(caller.origin, caller.called, caller.name, [answer])

    def _publish(self, served: ServedVersion, done: Future[None]) -> None:
        profile = served.chain.profile
        self._served[served.model][served.version] = served

        def bytes_of(cut: int, bits: int, samples: int) -> int | None:
            if not 0 <= cut < len(profile.layers) or not (0 < bits <= MAX_PLANES or bits == FULL_BITS):
                return None
            return num_bytes(live_shapes(profile, cut), samples, bits)

        self._handle(Published(served.model, served.version, bytes_of))
        done.set_result(None)

    def _handle(self, event: Event) -> None:
        for action in self._machine.handle(event, time.monotonic()):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case Reply(caller, message):
                self._transport.send(caller.called, caller.name, message, caller.origin)
            case Keep(caller, chunk):
                self._kept.setdefault((caller, chunk.request), []).append(chunk.payload)
            case Discard(caller, request):
                self._kept.pop((caller, request), None)
            case RunStage(caller, activation, remember):
                key = caller, activation.request
                parts = self._kept[key] if remember else self._kept.pop(key)
                served = self._served[caller.model][activation.version]
                is_brief = served.is_brief(activation.cut, activation.samples)
                self._run(Ran(*key), is_brief, lambda: run_stage(served, activation, parts))
            case RunAgain(caller, continuation, first):
                kept, missing = (self._kept.pop((caller, request)) for request in (first.request, continuation.request))
                served = self._served[caller.model][first.version]
                ran, is_brief = Ran(caller, continuation.request), served.is_brief(first.cut, continuation.samples)
                self._run(ran, is_brief, lambda: run_again(served, continuation, first, kept, missing))
            case MakePlan(caller, request, version, ask):
                planned = Planned(caller, request)
                self._submit(self._library, planned, lambda: self._offer(planned, version, ask))
            case Serve(caller, pull) if self._num_pulls < MAX_SERVED:
                self._num_pulls += 1
                self._library.submit(self._serve, caller, pull, self._served[caller.model][pull.version])
            case Serve(caller, pull):
                self._refuse(caller, pull)
            case Retire(model, version):
                self._served[model].pop(version, None)
            case Finish():
                self._finished.set()

    def _run(self, ran: Ran, is_brief: bool, work: Work) -> None:
        if is_brief:
            self._do(ran, work)
            return
        if self._machine.num_running > 1:
            self._transport.send(ran.caller.called, ran.caller.name, Later(ran.request, 0), ran.caller.origin)
        self._submit(self._compute, ran, work)

    def _submit(self, pool: ThreadPoolExecutor, done: Planned | Ran, work: Work) -> None:
        if self._loop.is_running:
            pool.submit(self._do, done, work)

    def _do(self, done: Planned | Ran, work: Work) -> None:
        """Do `work`, have what it returns sent, and the machine told that it is `done`. From any thread."""
        try:
            answer = work()
        except Exception as error:  # whatever a model's kernels raise: the device hears of it
            logger.exception("request %d of %s failed", done.request, done.caller.name)
            answer = Failed(done.request, Failure.COMPUTE, clipped(f"{type(error).__name__}: {error}"))
        if answer is not None:
            self._loop.post(lambda: self._answered(done, answer))

    def _answered(self, done: Planned | Ran, answer: list[Chunk] | Failed) -> None:
        caller = done.caller
        if isinstance(answer, Failed):
            self._transport.send(caller.called, caller.name, answer, caller.origin)
        else:
            self._transport.queue(caller.origin, caller.called, caller.name, answer)
        self._handle(done)

    def _offer(self, planned: Planned, version: int, ask: Ask) -> list[Chunk] | Failed | None:
        """None where the plan is certified first, on another thread, and then offered."""
        caller, request, versions = planned.caller, planned.request, self._served[planned.caller.model]
        served = versions.get(version)
        if served is None:
            return Failed(request, Failure.VERSION, f"version {version} has been retired; ask again")
        self._tell_refused(caller, ask, served)
        try:
            plan = served.plan(ask, versions.get(ask.held))
            if served.is_certified(plan):
                return offered(request, served.offer(plan, ask))
        except ConfigError as error:
            return Failed(request, Failure.PLAN, clipped(error))
        except RunError as error:
            return Failed(request, Failure.COMPUTE, clipped(error))
        self._submit(self._certifying, planned, lambda: self._certify(planned, served, plan, ask))
        return None

    def _certify(self, planned: Planned, served: ServedVersion, plan: Plan, ask: Ask) -> Failed | None:
        try:
            served.certify(plan)
        except ConfigError as error:
            return Failed(planned.request, Failure.PLAN, clipped(error))
        except RunError as error:
            return Failed(planned.request, Failure.COMPUTE, clipped(error))
        self._submit(self._library, planned, lambda: offered(planned.request, served.offer(plan, ask)))
        return None

    def _tell_refused(self, caller: Caller, ask: Ask, served: ServedVersion) -> None:
        """Of the engines that would be planned, once for each device."""
        for engine, reason in ask.refused.items():
            key = caller.name, engine
            if engine in served.catalogue.device_s and key not in self._told_refused and len(self._told_refused) < MAX_TOLD:
                self._told_refused.add(key)
                name, own, why = (ascii(text)[1:-1] for text in (clipped(ask.device.name), caller.name, clipped(reason)))
                self._told(f"device {name} ({own}) does without an engine: {why}")

    def _serve(self, caller: Caller, pull: Pull, served: ServedVersion) -> None:
        try:
            answer = pulled(served, pull)
        except (CodecError, ConfigError) as error:
            logger.info("%s pulls what is not served: %s", caller.name, error)
            self._loop.post(lambda: self._send_pulled(caller, pull, None))
            return
        self._loop.post(lambda: self._send_pulled(caller, pull, answer))

    def _send_pulled(self, caller: Caller, pull: Pull, answer: list[Data] | None) -> None:
        self._num_pulls -= 1
        if self._transport.bytes_queued(caller.origin, caller.name, pull.request):
            return  # a repeat of what is on its way already
        if answer is None or self._transport.num_queued(caller.origin) >= MAX_SERVED:
            self._refuse(caller, pull)
        else:
            self._transport.queue(caller.origin, caller.called, caller.name, answer)

    def _refuse(self, caller: Caller, pull: Pull) -> None:
        refusal = Refuse(pull.request, pull.version, pull.version)
        self._transport.send(caller.called, caller.name, refusal, caller.origin)


def _ask(payload: wire.Buffer) -> Ask | None:
    try:
        return ask_from_json(bytes(payload))
    except RemoteProtocolError as error:
        logger.info("no plan request: %s", error)
        return None


def _wait(future: Future[Any], timeout_s: float, what: str) -> Any:
    try:
        return future.result(timeout_s)
    except NotInTime as error:
        future.cancel()
        raise RunError(f"{what}: no answer within {timeout_s:g} s; allow more time, or ask less at once") from error
    except (GossipflError, ValueError):
        raise
    except Exception as error:
        raise RunError(f"computing went wrong: {type(error).__name__}: {error}") from error
