"""The socket and the thread that serve HTTP, and how they end: in order, within a time."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING

from gossipfl.errors import ConfigError, RunError
from gossipfl.inference.planning.receipts import InferenceService
from gossipfl.runtime.addresses import bind_failure, check_address, is_loopback
from gossipfl.runtime.http.protocol import Limits

if TYPE_CHECKING:
    from uvicorn import Server

    from gossipfl.runtime.http.app import App


class HttpServer:
    """Serves from the moment it is made, in a thread of its own, until `close`."""

    def __init__(self, app: App, server: Server, listener: socket.socket) -> None:
        host, self.port = listener.getsockname()[:2]
        self.address = f"http://{_in_url(host)}:{self.port}"
        self._app, self._server, self._listener = app, server, listener
        self._loop: SimpleQueue[asyncio.AbstractEventLoop] = SimpleQueue()
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gossipfl-http", daemon=True)
        self._thread.start()

    def close(self, drain_s: float = 30.0) -> None:
        """Refuse new requests, let those in flight finish within `drain_s`, then end; from any thread, more than once.

        What the service still computes after that goes on in its threads, which the process waits for when it exits.
        """
        with self._closing:
            if self._thread.is_alive():
                asyncio.run_coroutine_threadsafe(self._app.drain(drain_s), self._loop.get()).result()
                self._server.should_exit = True
                self._thread.join()

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def _serve(self) -> None:
        self._loop.put(asyncio.get_running_loop())
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            self._app.pool.shutdown(wait=False, cancel_futures=True)


def serve_http(
    service: InferenceService, host: str, port: int, *, insecure: bool = False, limits: Limits | None = None
) -> HttpServer:
    """Answer for `service` at http://host:port until the server that is returned is closed; port 0 takes a free one.

    ConfigError without the extra `http`, and for a host beyond loopback unless `insecure` allows it: clients are not
    authenticated. RunError where the address cannot be bound to.
    """
    try:
        from gossipfl.runtime.http.app import App
        from gossipfl.runtime.http.connection import uvicorn_server
    except ImportError as error:
        raise ConfigError(f"serving HTTP needs {error.name}, which is not installed: pip install 'gossipfl[http]'") from error
    listener = _listen(host, port, insecure)
    app = App(service, limits or Limits())
    return HttpServer(app, uvicorn_server(app.asgi), listener)


def run_http(
    service: InferenceService,
    host: str,
    port: int,
    *,
    insecure: bool = False,
    limits: Limits | None = None,
    drain_s: float = 30.0,
    told: Callable[[str], None] = lambda address: None,
) -> None:
    """`serve_http` until SIGTERM or SIGINT, then `close(drain_s)`; `told` hears the address. Of the main thread only.

    A second signal does what it would do without us.
    """
    signals: SimpleQueue[int] = SimpleQueue()

    def caught(number: int, frame: FrameType | None) -> None:
        signals.put(number)

    handlers = {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server = serve_http(service, host, port, insecure=insecure, limits=limits)
        told(server.address)
        signals.get()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    server.close(drain_s)


def _listen(host: str, port: int, insecure: bool) -> socket.socket:
    address = f"tcp://{_in_url(host)}:{port}"
    check_address(address, "the address to listen at")
    if not insecure and not is_loopback(host):
        raise ConfigError(
            f"{host!r} is reachable from other machines and clients are not authenticated; "
            "use 127.0.0.1 or ::1, or pass --insecure on a network where you trust everybody"
        )
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except OSError as error:
        raise RunError(bind_failure(address, error)) from error
    # Connections inherit it. asyncio sets it only on sockets that were made for TCP by name; without, each answer takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
