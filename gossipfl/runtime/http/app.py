"""The paths of the Open Inference Protocol v2 as an ASGI application, and the errors as statuses.

400 the request is wrong · 404 no such model, version or path · 408 the body took too long · 413 the body is too large ·
429 too many requests at once · 503 no answer in time, no model yet, or the server is stopping. Each with {"error": "..."}.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gossipfl._version import __version__
from gossipfl.errors import ConfigError, PlanError, RunError
from gossipfl.inference.planning.receipts import InferenceService, Receipt, ServedModel
from gossipfl.runtime.http.metrics import Metrics
from gossipfl.runtime.http.protocol import Limits, Query, decode_query, describe, encode_answer
from gossipfl.runtime.stages import threads

logger = logging.getLogger(__name__)

RETRY = {"Retry-After": "1"}
ABORTED = 499
"""What proxies note where the client has gone; nobody receives it."""
HEADER_BYTES = "Inference-Header-Content-Length"
SHOWN = 64
"""Characters of what a client has sent, in messages."""


class App:
    """Answers for `service`. All but `drain` belongs to the event loop that serves `asgi`."""

    def __init__(self, service: InferenceService, limits: Limits) -> None:
        self._service, self._limits = service, limits
        self._in_flight: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._is_draining = self._has_given_up = False
        self._metrics = Metrics(lambda: len(self._in_flight))
        self.pool = threads("gossipfl-http", limits.threads)
        of_model = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
        self.asgi = Starlette(
            routes=[
                Route("/v2", self._server),
                Route("/v2/health/live", self._live),
                Route("/v2/health/ready", self._ready),
                Route("/v2/models", self._models),
                *(Route(path, self._model) for path in of_model),
                *(Route(f"{path}/ready", self._model_ready) for path in of_model),
                *(Route(f"{path}/infer", self._infer, methods=["POST"]) for path in of_model),
                Route("/metrics", self._scrape),
            ],
            exception_handlers={HTTPException: _tell},
        )

    async def drain(self, drain_s: float) -> None:
        """Take no more requests, wait for those in flight, and after `drain_s` answer them with 503."""
        self._is_draining = True
        try:
            async with asyncio.timeout(drain_s):
                await self._until_idle()
        except TimeoutError:
            self._has_given_up = True
            for timeout in self._in_flight:
                timeout.reschedule(asyncio.get_running_loop().time())
            await self._until_idle()

    async def _until_idle(self) -> None:
        while self._in_flight:
            self._idle.clear()
            await self._idle.wait()

    # --- what there is ---

    async def _server(self, request: Request) -> Response:
        return JSONResponse({"name": "gossipfl", "version": __version__, "extensions": ["binary_tensor_data", "parameters"]})

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, request: Request) -> Response:
        is_ready = bool(self._service.models()) and not self._is_draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"models": sorted({model.name for model in self._service.models()})})

    async def _model(self, request: Request) -> Response:
        found, version = self._find(request)
        if not _is_listed(version, found):
            raise _no_version(request, found)
        return JSONResponse(describe(found[-1], (model.version for model in found)))

    async def _model_ready(self, request: Request) -> Response:
        found, version = self._find(request)
        if not _is_listed(version, found):
            raise _no_version(request, found)
        is_ready = not self._is_draining
        return JSONResponse({"name": found[-1].name, "ready": is_ready}, 200 if is_ready else 503)

    async def _scrape(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._metrics.registry), headers={"Content-Type": content_type})

    def _find(self, request: Request) -> tuple[list[ServedModel], int | None]:
        """The versions of the model that the path names, the newest last, and the version that it names."""
        name, version = request.path_params["model"], request.path_params.get("version")
        models = self._service.models()
        if not models:
            raise HTTPException(503, "no model is ready yet", RETRY)
        found = sorted((model for model in models if model.name == name), key=lambda model: model.version)
        if not found:
            raise HTTPException(404, f"there is no model {name!r}; ready: {', '.join(sorted({m.name for m in models}))}")
        if version is not None and not _is_short_number(version):
            raise _no_version(request, found)
        return found, None if version is None else int(version)

    # --- answers ---

    async def _infer(self, request: Request) -> Response:
        model = version = ""
        try:
            found, asked = self._find(request)
            model = found[-1].name
            version = str(found[-1].version if asked is None else asked) if _is_listed(asked, found) else ""
            async with self._slot() as began:
                return await self._answer(request, found, asked, began)
        except Exception as error:
            failure = self._failure(error)
        self._metrics.failed(model, version, failure.status_code)
        return _tell(request, failure)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[float]:
        """One of the requests in flight, for `request_s` at most; yields when it began."""
        if self._is_draining:
            raise HTTPException(503, "this server is stopping", RETRY)
        if len(self._in_flight) >= self._limits.in_flight:
            raise HTTPException(429, f"{self._limits.in_flight} requests are in flight, the most at once; try again", RETRY)
        async with asyncio.timeout(self._limits.request_s) as timeout:
            self._in_flight.add(timeout)
            try:
                yield asyncio.get_running_loop().time()
            finally:
                self._in_flight.discard(timeout)
                self._idle.set()

    async def _answer(self, request: Request, found: list[ServedModel], version: int | None, began: float) -> Response:
        header_bytes = _header_bytes(request)
        body = await self._read(request)
        shape, longest_s = found[-1].input_shape, self._limits.request_s
        query = await self._in_pool(decode_query, body, header_bytes, shape, longest_s)
        try:
            async with asyncio.timeout_at(began + query.budget.timeout_s):
                receipt, content, header_bytes = await self._in_pool(self._compute, query, found[-1].name, version, began)
        except TimeoutError:
            raise RunError(f"no answer within {query.budget.timeout_s:g} s") from None
        except ConfigError as error:
            if _is_listed(version, found) or isinstance(error, PlanError):
                raise
            raise HTTPException(404, str(error)) from error
        self._metrics.answered(receipt, time.monotonic() - began)
        if header_bytes is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={HEADER_BYTES: str(header_bytes)}, media_type="application/octet-stream")

    async def _read(self, request: Request) -> bytes:
        """The body, no more of it than is allowed and no longer."""
        most, body = self._limits.body_bytes, bytearray()
        too_large = HTTPException(413, f"the body has more than {most} bytes, the most this server takes; send fewer samples")
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            message = f"{len(body)} bytes of the body came within {self._limits.body_s:g} s and not the last; send it faster"
            raise HTTPException(408, message, {"Connection": "close"}) from None
        return bytes(body)

    async def _in_pool(self, function: Callable[..., Any], *args: Any) -> Any:
        """In a thread of the pool. One that is still waiting for its thread when time is up never runs."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    def _compute(self, query: Query, model: str, version: int | None, began: float) -> tuple[Receipt, bytes, int | None]:
        left_s = max(began + query.budget.timeout_s - time.monotonic(), 0.0)
        answer = self._service.infer(model, query.inputs, replace(query.budget, timeout_s=left_s), version)
        return answer.receipt, *encode_answer(query, answer)

    def _failure(self, error: Exception) -> HTTPException:
        match error:
            case HTTPException():
                return error
            case ConfigError():
                return HTTPException(400, str(error))
            case RunError():
                return HTTPException(503, str(error), RETRY)
            case TimeoutError() if self._has_given_up:
                return HTTPException(503, "this server stopped before the answer was there", RETRY)
            case TimeoutError():
                return HTTPException(503, f"no answer within {self._limits.request_s:g} s", RETRY)
            case ClientDisconnect():
                return HTTPException(ABORTED, "the client has gone")
        logger.error("a request failed in a way it should not", exc_info=error)
        return HTTPException(500, f"{type(error).__name__}; this is the server's fault, its log says more")


def _is_listed(version: int | None, found: list[ServedModel]) -> bool:
    return version in (None, *(model.version for model in found))


def _no_version(request: Request, found: list[ServedModel]) -> HTTPException:
    versions = ", ".join(str(model.version) for model in found)
    asked = request.path_params["version"][:SHOWN]
    return HTTPException(404, f"{found[-1].name!r} has no version {asked!r}; ready: {versions}")


def _is_short_number(text: str) -> bool:
    """One that Python reads: of 4,300 digits and more it does not."""
    return text.isdecimal() and len(text) <= SHOWN


def _header_bytes(request: Request) -> int | None:
    value = request.headers.get(HEADER_BYTES)
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise HTTPException(415, f"Content-Encoding {encoding!r} is not supported; send the body as it is")
    if value is not None and not _is_short_number(value):
        raise ConfigError(f"{HEADER_BYTES} = {value[:SHOWN]!r} is no number of bytes")
    return None if value is None else int(value)


def _tell(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404 and message == "Not Found":
        message = f"there is nothing at {request.url.path}; models are at /v2/models, metrics at /metrics"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}, but {(error.headers or {}).get('Allow')}"
    return JSONResponse({"error": message}, error.status_code, error.headers)
