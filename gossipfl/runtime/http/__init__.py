"""Answers over HTTP, by the Open Inference Protocol v2 that KServe, Triton and their clients speak; metrics for Prometheus.

    with serve_http(service, "127.0.0.1", 8000) as server:      # from any thread; port 0 takes a free one
        print(server.address)                                   # http://127.0.0.1:8000
    run_http(service, "127.0.0.1", 8000)                        # until SIGTERM or Ctrl-C

protocol    requests and responses as the protocol has them: JSON, tensors as JSON or as binary data
metrics     what Prometheus reads
app         the paths, and the errors as statuses
connection  uvicorn, set up, with a limit for clients that trickle
server      the socket, the thread, the end

Needs the extra `http`: pip install 'gossipfl[http]'.
"""

from gossipfl.runtime.http.protocol import Limits
from gossipfl.runtime.http.server import HttpServer, run_http, serve_http

__all__ = ["HttpServer", "Limits", "run_http", "serve_http"]
