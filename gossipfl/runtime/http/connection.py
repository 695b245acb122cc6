"""Uvicorn as it serves here: quiet, without what is not needed, and with one limit more for clients that trickle."""

from __future__ import annotations

import asyncio

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_S = 30
"""Between requests, and for the whole head of the next one: uvicorn lets it trickle in for ever."""
FLUSH_S = 1
"""For clients to take the last responses, once all are there."""


def uvicorn_server(app: ASGIApp) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=FLUSH_S,
        )
    )


class Connection(H11Protocol):
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer:
            self._timer.cancel()

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def _expect_request(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle, self.cycle)

    def _close_if_idle(self, last: object) -> None:
        """`last` is the request that was the newest when the wait began. What such a client does not read is dropped, too."""
        if self.cycle is last:
            self.transport.abort()
