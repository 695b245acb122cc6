"""Inference over HTTP: real sockets, a real model, and clients of every kind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gossipfl.errors import ConfigError, PlanError, RunError
from gossipfl.inference.planning.receipts import Answer, Budget, Receipt, ServedModel
from gossipfl.learning.models import build_model

pytest.importorskip("starlette", reason="the extra 'http' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'http' is not installed")
pytest.importorskip("prometheus_client", reason="the extra 'http' is not installed")

from prometheus_client.parser import text_string_to_metric_families

from gossipfl.runtime.http import HttpServer, Limits, connection, run_http, serve_http

DEADLINE_S = 20.0
"""Far beyond what anything here takes on a busy machine; only a failure waits that long."""
DIGITS = load_digits().data.astype(np.float32) / 16
INFER = "/v2/models/digits/infer"


class Digits:
    """Answers with a real model, and waits for `gate` before it does; `entered` counts who waits."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.network = build_model("mlp", (64,), 10, {"hidden": 16}, seed=0)
        self.listed = (ServedModel("digits", 3, (64,), 10),)
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.budgets: list[Budget] = []
        self.raises: Exception | None = None
        self.receipt = Receipt("digits", 3, ())

    def models(self) -> tuple[ServedModel, ...]:
        return self.listed

    def infer(self, model: str, inputs: np.ndarray, budget: Budget, version: int | None = None) -> Answer:
        self.budgets.append(budget)
        self.entered.release()
        if not self.gate.wait(DEADLINE_S):
            raise RunError("nobody opened the gate")
        if self.raises:
            raise self.raises
        if version not in (None, 2, 3):  # 2 is kept, though no longer the newest
            raise ConfigError(f"'digits' has no version {version}; it has 2 and 3")
        with torch.inference_mode():
            scores = self.network(torch.from_numpy(inputs)).numpy()
        top = np.sort(scores, axis=1)
        margins = tuple(float(margin) for margin in top[:, -1] - top[:, -2])
        tiers = tuple("reduced" if margin >= 0.2 else "full" for margin in margins)
        return Answer(scores, replace(self.receipt, version=version or 3, tiers=tiers, margins=margins, threshold=0.2))


@pytest.fixture
def service() -> Iterator[Digits]:
    made = Digits()
    yield made
    made.gate.set()


@pytest.fixture
def serve(service: Digits) -> Iterator[Callable[..., HttpServer]]:
    with contextlib.ExitStack() as opened:
        yield lambda **limits: opened.enter_context(serve_http(service, "127.0.0.1", 0, limits=Limits(**limits)))
        service.gate.set()


@pytest.fixture
def server(serve: Callable[..., HttpServer]) -> HttpServer:
    return serve()


@pytest.fixture(scope="module")
def common() -> Iterator[HttpServer]:
    """For requests that change nothing: a server takes 0.2 s to end."""
    with serve_http(Digits(), "127.0.0.1", 0) as server:
        yield server


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        assert list(self.json) == ["error"]
        return self.json["error"]

    def output(self, name: str) -> np.ndarray:
        """Of JSON data."""
        found = next(output for output in self.json["outputs"] if output["name"] == name)
        return np.array(found["data"], {"FP32": "f4", "INT64": "i8"}[found["datatype"]]).reshape(found["shape"])


@dataclass
class Client:
    """One kept connection."""

    server: HttpServer
    connection: HTTPConnection = field(init=False)

    def __post_init__(self) -> None:
        self.connection = HTTPConnection("127.0.0.1", self.server.port, timeout=DEADLINE_S)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        given = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        self.connection.request(method, path, given, {name.replace("_", "-"): value for name, value in headers.items()})
        return self.reply()

    def reply(self) -> Reply:
        response = self.connection.getresponse()
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def ask(server: HttpServer, method: str, path: str, body: object = None, **headers: str) -> Reply:
    client = Client(server)
    with contextlib.closing(client.connection):
        return client.ask(method, path, body, **headers)


def query(inputs: np.ndarray, datatype: str = "FP32", **more: object) -> dict:
    return {"inputs": [{"name": "input", "shape": list(inputs.shape), "datatype": datatype, "data": inputs.tolist()}], **more}


def binary_query(inputs: np.ndarray, datatype: str = "FP32", **more: object) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "input", "shape": list(inputs.shape), "datatype": datatype}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": inputs.nbytes}}], **more}).encode()
    return head + inputs.tobytes(), {"Inference_Header_Content_Length": str(len(head))}


def local(service: Digits, inputs: np.ndarray) -> np.ndarray:
    return service.infer("digits", np.ascontiguousarray(inputs, np.float32), Budget()).scores


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"


def value(server: HttpServer, name: str, **labels: str) -> float:
    """Of a metric's sample; 0 where there is none yet."""
    families = text_string_to_metric_families(ask(server, "GET", "/metrics").body.decode())
    found = (sample for family in families for sample in family.samples if sample.name == name)
    return next((sample.value for sample in found if sample.labels == labels), 0.0)


def of_code(server: HttpServer, code: str) -> list[float]:
    labels = {"model": "digits", "version": "3", "code": code}
    return [value(server, "gossipfl_infer_total", **labels, tier=tier) for tier in ("", "reduced", "full", "unverified")]


# --- what there is ----------------------------------------------------------------------------------------------------


def test_the_server_tells_its_name_its_version_and_its_extensions(common):
    told = ask(common, "GET", "/v2").json
    assert (told["name"], told["extensions"]) == ("gossipfl", ["binary_tensor_data", "parameters"])
    assert ask(common, "GET", "/v2/models").json == {"models": ["digits"]}


@pytest.mark.parametrize("path", ["/v2/models/digits", "/v2/models/digits/versions/3"])
def test_a_model_tells_what_it_takes_and_gives(common, path):
    assert ask(common, "GET", path).json == {
        "name": "digits",
        "versions": ["3"],
        "platform": "gossipfl",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 64]}],
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [-1, 10]},
            {"name": "label", "datatype": "INT64", "shape": [-1]},
        ],
    }
    assert ask(common, "GET", f"{path}/ready").json == {"name": "digits", "ready": True}


def test_a_server_without_a_model_is_live_but_not_ready(service, server):
    assert ask(server, "GET", "/v2/health/ready").json == {"ready": True}
    service.listed = ()
    assert ask(server, "GET", "/v2/health/live").json == {"live": True}
    assert ask(server, "GET", "/v2/health/ready").status == 503
    for reply in (ask(server, "GET", "/v2/models/digits/ready"), ask(server, "POST", INFER, query(DIGITS[:1]))):
        assert (reply.status, reply.error) == (503, "no model is ready yet")


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v2/models/digit", 404, ("'digit'", "ready: digits")),
        ("GET", "/v2/models/digit/ready", 404, ("'digit'", "ready: digits")),
        ("POST", "/v2/models/digit/infer", 404, ("'digit'", "ready: digits")),
        ("GET", "/v2/models/digits/versions/9", 404, ("no version '9'", "ready: 3")),
        ("GET", "/v2/models/digits/versions/9/ready", 404, ("no version '9'", "ready: 3")),
        ("POST", "/v2/models/digits/versions/latest/infer", 404, ("no version 'latest'", "ready: 3")),
        ("GET", f"/v2/models/digits/versions/{'9' * 5000}", 404, ("no version '999", "ready: 3")),
        ("POST", f"/v2/models/digits/versions/{'9' * 5000}/infer", 404, ("no version '999", "ready: 3")),
        ("POST", "/v2/models/digits/versions/9/infer", 404, ("no version 9", "2 and 3")),
        ("GET", "/predict", 404, ("nothing at /predict", "/v2/models")),
        ("GET", INFER, 405, ("does not take GET", "POST")),
        ("POST", "/v2/health/live", 405, ("does not take POST", "GET")),
    ],
)
def test_what_is_not_there_is_told_with_what_is(common, method, path, status, words):
    reply = ask(common, method, path, query(DIGITS[:1]) if method == "POST" else None)
    assert reply.status == status
    assert all(word in reply.error for word in words), reply.error


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_flat", [False, True])
def test_scores_and_labels_are_those_of_the_service(service, common, is_flat):
    asked = query(DIGITS[:5], id="a")
    if is_flat:
        asked["inputs"][0]["data"] = DIGITS[:5].ravel().tolist()
    reply = ask(common, "POST", INFER, asked)
    assert (reply.json["model_name"], reply.json["model_version"], reply.json["id"]) == ("digits", "3", "a")
    assert np.array_equal(reply.output("scores"), local(service, DIGITS[:5]))
    assert np.array_equal(reply.output("label"), local(service, DIGITS[:5]).argmax(1))


def test_an_older_version_that_is_still_kept_answers(common):
    assert ask(common, "POST", "/v2/models/digits/versions/2/infer", query(DIGITS[:1])).json["model_version"] == "2"


def test_the_receipt_comes_as_parameters(service, server):
    service.receipt = Receipt(
        "digits", 3, (), alpha=0.02, cut=1, weight_bits=(4, 8), engines=("int8", "fp32"), bytes_up=7, seconds={"total": 0.5}
    )
    parameters = ask(server, "POST", INFER, query(DIGITS[:2])).json["parameters"]
    assert all(isinstance(value, str | int | float) for value in parameters.values())
    assert "delta" not in parameters, "what a receipt lacks is left out"
    lists = {name: json.loads(parameters.pop(name)) for name in ("tiers", "margins", "weight_bits", "engines", "seconds")}
    whole = Receipt(**parameters, **{name: tuple(v) if isinstance(v, list) else v for name, v in lists.items()})
    assert whole == service.infer("digits", DIGITS[:2], Budget()).receipt


def test_a_threshold_that_nothing_reaches_is_told_as_json_can(service, server, monkeypatch):
    answer = Digits.infer
    monkeypatch.setattr(
        Digits, "infer", lambda *args: replace(a := answer(*args), receipt=replace(a.receipt, threshold=float("inf")))
    )
    assert json.loads(ask(server, "POST", INFER, query(DIGITS[:1])).json["parameters"]["threshold"]) == float("inf")


@pytest.mark.parametrize("datatype", ["FP16", "FP64", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"])
def test_every_datatype_becomes_the_models_as_it_is(service, common, datatype):
    dtype = datatype.lower().replace("fp", "float")
    inputs = (DIGITS[:3] * 16).astype(dtype)
    body, headers = binary_query(inputs, datatype)
    for reply in (ask(common, "POST", INFER, query(inputs, datatype)), ask(common, "POST", INFER, body, **headers)):
        assert np.array_equal(reply.output("scores"), local(service, inputs))


def test_tensors_travel_as_binary_data(service, common):
    body, headers = binary_query(DIGITS[:5], parameters={"binary_data_output": True})
    reply = ask(common, "POST", INFER, body, **headers)
    split = int(reply.headers["inference-header-content-length"])
    scores, label = json.loads(reply.body[:split])["outputs"]
    assert (scores["parameters"], label["parameters"]) == ({"binary_data_size": 200}, {"binary_data_size": 40})
    assert np.array_equal(np.frombuffer(reply.body[split : split + 200], "<f4").reshape(5, 10), local(service, DIGITS[:5]))
    assert np.array_equal(np.frombuffer(reply.body[split + 200 :], "<i8"), local(service, DIGITS[:5]).argmax(1))


def test_only_the_outputs_that_are_asked_for_come_each_in_its_form(service, common):
    outputs = [{"name": "label"}, {"name": "scores", "parameters": {"binary_data": True}}]
    reply = ask(common, "POST", INFER, query(DIGITS[:1], outputs=outputs))
    split = int(reply.headers["inference-header-content-length"])
    label, scores = json.loads(reply.body[:split])["outputs"]
    assert (label["data"], "data" in scores) == (local(service, DIGITS[:1]).argmax(1).tolist(), False)
    assert np.array_equal(np.frombuffer(reply.body[split:], "<f4"), local(service, DIGITS[:1])[0])
    reply = ask(common, "POST", INFER, query(DIGITS[:1], outputs=[{"name": "label"}]))
    assert [output["name"] for output in reply.json["outputs"]] == ["label"]


def test_the_budget_comes_from_the_parameters_and_what_time_it_took_is_off(service, server):
    ask(server, "POST", INFER, query(DIGITS[:1], parameters={"max_accuracy_loss": 0.01, "timeout_s": 7}))
    ask(server, "POST", INFER, query(DIGITS[:1]))
    assert [budget.max_accuracy_loss for budget in service.budgets] == [0.01, None]
    assert 0 < service.budgets[0].timeout_s < 7 and 7 < service.budgets[1].timeout_s < Limits().request_s


@pytest.mark.parametrize("is_binary", [False, True])
def test_a_stock_client_works(service, common, is_binary):
    tritonclient = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    with tritonclient.InferenceServerClient(f"127.0.0.1:{common.port}") as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("digits") and client.is_model_ready("digits", "3")
        assert not client.is_model_ready("nope")
        assert client.get_server_metadata()["name"] == "gossipfl"
        assert client.get_model_metadata("digits")["inputs"][0]["shape"] == [-1, 64]
        given = tritonclient.InferInput("input", [4, 64], "FP32")
        given.set_data_from_numpy(DIGITS[:4], binary_data=is_binary)
        outputs = [tritonclient.InferRequestedOutput(name, binary_data=is_binary) for name in ("scores", "label")]
        for wanted in (outputs, None):
            result = client.infer("digits", [given], outputs=wanted, request_id="9", parameters={"max_accuracy_loss": 0.01})
            assert np.array_equal(result.as_numpy("scores"), local(service, DIGITS[:4]))
            assert np.array_equal(result.as_numpy("label"), local(service, DIGITS[:4]).argmax(1))
            assert (result.get_response()["id"], result.get_response()["parameters"]["version"]) == ("9", 3)
        with pytest.raises(Exception, match="no version") as failure:
            client.infer("digits", [given], model_version="9")
        assert failure.value.status() == "404"


def test_eight_clients_at_once_get_what_each_would_get_alone(service, server):
    batches = [DIGITS[5 * i : 5 * i + 5] for i in range(80)]

    def work(first: int) -> list[np.ndarray]:
        client = Client(server)
        with contextlib.closing(client.connection):
            return [client.ask("POST", INFER, query(batch)).output("scores") for batch in batches[first::8]]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, range(8)))
    assert all(np.array_equal(answers[i % 8][i // 8], local(service, batch)) for i, batch in enumerate(batches))
    until(lambda: value(server, "gossipfl_in_flight") == 0)
    assert value(server, "gossipfl_infer_seconds_count", model="digits", version="3", tier="full") > 0


# --- what is wrong ----------------------------------------------------------------------------------------------------

ONE = query(DIGITS[:1])


def with_input(**changes: object) -> dict:
    return {"inputs": [{**ONE["inputs"][0], **changes}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ("not JSON",)),
        (b'{"inputs": [', ("not JSON",)),
        (b"\xff\xfe\xfd", ("not JSON", "Inference-Header-Content-Length")),
        (b"[" * 100_000, ("nested too deeply",)),
        ([], ("JSON object",)),
        ({}, ("inputs", "'input'")),
        ({"inputs": [ONE["inputs"][0]] * 2}, ("list of one tensor",)),
        ({"inputs": ["input"]}, ("'input'",)),
        (with_input(name="x"), ("'input'", "'x'")),
        (with_input(datatype="BYTES"), ("'BYTES'", "FP32")),
        (with_input(datatype=["FP32"]), ("datatype",)),
        (with_input(shape=[64]), ("[64]", "[B, 64]")),
        (with_input(shape=[1, 8, 8]), ("[1, 8, 8]", "[B, 64]")),
        (with_input(shape=[0, 64], data=[]), ("[0, 64]", "one or more")),
        (with_input(shape=[-1, 64]), ("[-1, 64]",)),
        (with_input(shape=[]), ("[B, 64]",)),
        (with_input(shape="1,64"), ("'1,64'",)),
        (with_input(shape=[True, 64]), ("[True, 64]", "[B, 64]")),
        (with_input(shape=[10**4290, 64]), ("[B, 64]",)),
        (json.dumps(with_input(data=[0] * 63)).replace("0]", f"0, {'9' * 5000}]").encode(), ("thousands of digits",)),
        (with_input(shape=[2, 64]), ("[1, 64]", "[128]")),
        (with_input(shape=[10**30, 64]), ("neither",)),
        (with_input(data=None), ("list of numbers",)),
        (with_input(data=["0.5"] * 64), ("list of numbers",)),
        (with_input(data=[True] * 64), ("list of numbers",)),
        (with_input(data=[10**400] * 64), ("list of numbers",)),
        (with_input(data=[[1.0], [1.0, 2.0]]), ("ragged",)),
        (with_input(data=[[0.0] * 32] * 2), ("[2, 32]",)),
        (with_input(data=[1e300] * 64, datatype="FP64"), ("not finite",)),
        (with_input(data=[float("nan")] * 64), ("NaN",)),
        (with_input(data=[float("-inf")] * 64), ("-Infinity",)),
        (json.dumps(with_input(data=[0] * 63)).replace("0]", "0, 1e999]").encode(), ("not finite",)),
        (with_input(data=[300] * 64, datatype="UINT8"), ("UINT8 cannot",)),
        (with_input(data=[0.5] * 64, datatype="INT32"), ("INT32 cannot",)),
        (with_input(parameters={"shared_memory_region": "x"}), ("'shared_memory_region'",)),
        (with_input(parameters={"binary_data_size": 256}), ("Inference-Header-Content-Length",)),
        ({**ONE, "parameters": ["timeout_s"]}, ("must be an object",)),
        ({**ONE, "parameters": {"timeout": 1}}, ("'timeout'", "did you mean 'timeout_s'")),
        ({**ONE, "parameters": {"timeout_s": 0}}, ("timeout_s = 0", "30")),
        ({**ONE, "parameters": {"timeout_s": 31}}, ("timeout_s = 31", "30")),
        ({**ONE, "parameters": {"timeout_s": "1"}}, ("timeout_s = '1'",)),
        ({**ONE, "parameters": {"max_accuracy_loss": -0.1}}, ("max_accuracy_loss = -0.1",)),
        ({**ONE, "parameters": {"max_accuracy_loss": 1.5}}, ("max_accuracy_loss = 1.5",)),
        ({**ONE, "parameters": {"max_accuracy_loss": True}}, ("max_accuracy_loss = True",)),
        ({**ONE, "parameters": {"binary_data_output": 1}}, ("binary_data_output = 1",)),
        ({**ONE, "outputs": [{"name": "probabilities"}]}, ("'probabilities'", "'scores'", "'label'")),
        ({**ONE, "outputs": ["label"]}, ("'label'",)),
        ({**ONE, "outputs": {"name": "label"}}, ("must be a list",)),
        ({**ONE, "outputs": [{"name": "label", "parameters": {"classification": 3}}]}, ("'classification'", "binary_data")),
        ({**ONE, "id": 7}, ("id = 7",)),
    ],
)
def test_a_wrong_request_is_refused_with_what_is_wrong(common, body, words):
    reply = ask(common, "POST", INFER, body)
    assert reply.status == 400
    assert all(word in reply.error for word in words), reply.error


@pytest.mark.parametrize(
    ("header", "cut", "words"),
    [
        ("many", 0, ("'many'",)),
        ("-1", 0, ("'-1'",)),
        ("0", 0, ("= 0",)),
        ("9" * 5000, 0, ("999", "no number of bytes")),
        ("9" * 9, 0, ("999999999", "bytes")),
        (None, 4, ("takes 256 bytes", "252 bytes follow")),
        (None, 256, ("takes 256 bytes", "0 bytes follow")),
    ],
)
def test_binary_data_that_is_not_what_its_head_says_is_refused(common, header, cut, words):
    body, headers = binary_query(DIGITS[:1])
    headers = {"Inference_Header_Content_Length": header} if header else headers
    reply = ask(common, "POST", INFER, body[: len(body) - cut], **headers)
    assert reply.status == 400
    assert all(word in reply.error for word in words), reply.error


def test_binary_values_that_are_not_finite_are_refused(common):
    body, headers = binary_query(np.full((1, 64), np.nan, np.float32))
    assert "not finite" in ask(common, "POST", INFER, body, **headers).error


def test_a_compressed_body_is_refused_by_name(common):
    reply = ask(common, "POST", INFER, b"\x1f\x8b", Content_Encoding="gzip")
    assert (reply.status, "gzip" in reply.error) == (415, True)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ConfigError("inputs do not fit"), 400, "inputs do not fit"),
        (PlanError("no plan keeps within 0.001; 0.004 would do"), 400, "0.004 would do"),
        (RunError("no answer: the server is gone"), 503, "the server is gone"),
        (ZeroDivisionError("secret"), 500, "ZeroDivisionError"),
    ],
)
def test_what_the_service_raises_becomes_a_status(service, server, caplog, error, status, words):
    service.raises = error
    reply = ask(server, "POST", INFER, query(DIGITS[:1]))
    assert reply.status == status and words in reply.error and "secret" not in reply.error
    assert ("retry-after" in reply.headers) == (status == 503)
    assert bool(caplog.records) == (status == 500), "only what should not happen is logged"
    if isinstance(error, PlanError):
        assert ask(server, "POST", "/v2/models/digits/versions/2/infer", query(DIGITS[:1])).status == 400


def test_scores_that_are_no_numbers_are_not_passed_on(service, server):
    with torch.no_grad():
        next(service.network.parameters()).fill_(float("nan"))
    reply = ask(server, "POST", INFER, query(DIGITS[:1]))
    assert (reply.status, "not finite" in reply.error) == (503, True)


def test_there_is_an_answer_in_time_even_where_the_service_has_none(service, server):
    service.gate.clear()
    reply = ask(server, "POST", INFER, query(DIGITS[:1], parameters={"timeout_s": 0.05}))
    assert (reply.status, reply.error) == (503, "no answer within 0.05 s")
    service.gate.set()
    assert ask(server, "POST", INFER, query(DIGITS[:1])).status == 200
    told = {code: sum(of_code(server, code)) for code in ("200", "503")}
    assert told == {"200": 1, "503": 1}, "what came too late does not count as an answer"


# --- limits -----------------------------------------------------------------------------------------------------------


def head(length: str) -> bytes:
    return f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode()


@contextlib.contextmanager
def raw(server: HttpServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as connected:
        yield connected


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(serve):
    with raw(serve(body_bytes=1000)) as connected:
        connected.sendall(head("Content-Length: 1001"))
        assert connected.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_say_how_large_it_is_is_read_to_the_limit_only(serve):
    with raw(serve(body_bytes=1000)) as connected:
        connected.sendall(head("Transfer-Encoding: chunked") + b"3e8\r\n" + b" " * 1000 + b"\r\n1\r\n")
        connected.sendall(b" ")
        reply = HTTPResponse(connected)
        reply.begin()
        assert reply.status == 413 and b"1000 bytes" in reply.read()


def test_a_large_body_is_answered_while_the_client_still_sends_and_the_connection_lives(serve):
    client = Client(serve(body_bytes=1000))
    with contextlib.closing(client.connection):
        assert client.ask("POST", INFER, bytes(4 << 20)).status == 413
        assert client.ask("GET", "/v2/health/live").status == 200


def test_more_requests_than_allowed_are_sent_away_and_the_others_are_answered(service, serve):
    server = serve(in_flight=2, threads=1)
    service.gate.clear()
    first, second = Client(server), Client(server)
    with contextlib.closing(first.connection), contextlib.closing(second.connection):
        for client in (first, second):
            client.connection.request("POST", INFER, json.dumps(query(DIGITS[:1])))
        until(lambda: value(server, "gossipfl_in_flight") == 2)
        reply = ask(server, "POST", INFER, query(DIGITS[:1]))
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert ask(server, "GET", "/v2/health/ready").status == 200, "health does not queue"
        service.gate.set()
        assert [first.reply().status, second.reply().status] == [200, 200]


def test_who_waits_for_a_thread_when_time_is_up_is_never_computed(service, serve):
    server = serve(threads=1)
    service.gate.clear()
    with raw(server) as holder:
        body = json.dumps(query(DIGITS[:1])).encode()
        holder.sendall(head(f"Content-Length: {len(body)}") + body)
        assert service.entered.acquire(timeout=DEADLINE_S)
        short = serve(threads=1, request_s=0.05)
        assert ask(short, "POST", INFER, query(DIGITS[:1])).status == 503  # holds the only thread of this one
        assert service.entered.acquire(timeout=DEADLINE_S)
        reply = ask(short, "POST", INFER, query(DIGITS[:1]))
        assert (reply.status, reply.error) == (503, "no answer within 0.05 s")
        service.gate.set()
        assert holder.recv(100).startswith(b"HTTP/1.1 200 ")
    assert len(service.budgets) == 2


def test_a_client_that_trickles_its_body_loses_its_place(serve):
    server = serve(in_flight=1, body_s=0.3)
    with raw(server) as slow:
        slow.sendall(head("Content-Length: 100") + b"{")
        until(lambda: value(server, "gossipfl_in_flight") == 1)
        assert ask(server, "POST", INFER, query(DIGITS[:1])).status == 429
        reply = slow.makefile("rb").read()  # until the server closes
        assert reply.startswith(b"HTTP/1.1 408 ") and b"1 bytes of the body" in reply
    assert ask(server, "POST", INFER, query(DIGITS[:1])).status == 200


def test_a_client_that_goes_away_in_the_middle_leaves_its_place(serve, caplog):
    server = serve(in_flight=1)
    with raw(server) as gone:
        gone.sendall(head("Content-Length: 100") + b"{")
        until(lambda: value(server, "gossipfl_in_flight") == 1)
    until(lambda: value(server, "gossipfl_in_flight") == 0)
    assert value(server, "gossipfl_infer_total", model="digits", version="3", tier="", code="499") == 1
    assert ask(server, "POST", INFER, query(DIGITS[:1])).status == 200
    assert not caplog.records


def test_a_client_that_does_not_wait_for_its_answer_harms_nobody(service, server, caplog):
    service.gate.clear()
    with raw(server) as gone:
        body = json.dumps(query(DIGITS[:1])).encode()
        gone.sendall(head(f"Content-Length: {len(body)}") + body)
        assert service.entered.acquire(timeout=DEADLINE_S)
    service.gate.set()
    until(lambda: value(server, "gossipfl_in_flight") == 0)
    assert ask(server, "POST", INFER, query(DIGITS[:1])).status == 200
    assert not caplog.records


@pytest.mark.parametrize("first", [b"", b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_client_that_trickles_the_head_of_a_request_is_cut_off(monkeypatch, serve, first):
    monkeypatch.setattr(connection, "IDLE_S", 0.2)
    with raw(serve()) as slow, contextlib.suppress(ConnectionError):
        slow.sendall(first)
        if first:
            assert slow.recv(1000).startswith(b"HTTP/1.1 200 ")
        slow.settimeout(0.02)
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:  # a byte every 0.02 s, which uvicorn alone would read for ever
            slow.sendall(b"G")
            with contextlib.suppress(TimeoutError):
                if slow.recv(1000) == b"":
                    return
        raise AssertionError("the connection is still open")


def test_who_speaks_no_http_is_told_so_and_harms_nobody(common):
    with raw(common) as stranger:
        stranger.sendall(bytes(range(256)) * 10 + b"\r\n\r\n")
        assert stranger.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert ask(common, "GET", "/v2/health/live").status == 200


# --- the end ----------------------------------------------------------------------------------------------------------


def test_who_is_in_flight_when_the_server_closes_is_answered_and_nobody_else(service, server):
    service.gate.clear()
    client, watcher = Client(server), Client(server)
    client.connection.request("POST", INFER, json.dumps(query(DIGITS[:1])))
    assert service.entered.acquire(timeout=DEADLINE_S)
    closing = threading.Thread(target=server.close)
    with contextlib.closing(client.connection), contextlib.closing(watcher.connection):
        closing.start()
        until(lambda: watcher.ask("GET", "/v2/health/ready").status == 503)
        assert watcher.ask("GET", "/v2/models/digits/ready").json == {"name": "digits", "ready": False}
        assert watcher.ask("GET", "/v2/health/live").status == 200
        reply = watcher.ask("POST", INFER, query(DIGITS[:1]))
        assert (reply.status, reply.error) == (503, "this server is stopping")
        assert closing.is_alive()
        service.gate.set()
        reply = client.reply()
        assert reply.status == 200 and np.array_equal(reply.output("scores"), local(service, DIGITS[:1]))
    closing.join(DEADLINE_S)
    assert not closing.is_alive()
    with pytest.raises(ConnectionRefusedError):
        ask(server, "GET", "/v2/health/live")
    server.close()  # once more: nothing happens


def test_who_is_still_in_flight_after_the_drain_is_told_so(service, server, caplog):
    service.gate.clear()
    client = Client(server)
    with contextlib.closing(client.connection):
        client.connection.request("POST", INFER, json.dumps(query(DIGITS[:1])))
        assert service.entered.acquire(timeout=DEADLINE_S)
        server.close(drain_s=0.05)
        reply = client.reply()
    assert (reply.status, reply.error) == (503, "this server stopped before the answer was there")
    assert not caplog.records


COMMAND = """
import sys
import numpy as np
from gossipfl.inference.planning.receipts import Answer, Receipt, ServedModel
from gossipfl.runtime.http import run_http

class Linear:
    def models(self):
        return (ServedModel("digits", 3, (64,), 10),)

    def infer(self, model, inputs, budget, version=None):
        print("asked", flush=True)
        sys.stdin.readline()
        return Answer(inputs @ np.eye(64, 10, dtype=np.float32), Receipt("digits", 3, ("full",)))

run_http(Linear(), "127.0.0.1", 0, told=lambda address: print(address, flush=True))
"""


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_in_order(number):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", COMMAND], text=True, env=environment, **pipes) as process:
        try:
            port = int(process.stdout.readline().rpartition(":")[2])
            client, watcher = (HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S) for _ in range(2))
            with contextlib.closing(client), contextlib.closing(watcher):
                client.request("POST", INFER, json.dumps(query(DIGITS[:1])))
                assert process.stdout.readline() == "asked\n"
                process.send_signal(number)

                def is_ready() -> bool:
                    watcher.request("GET", "/v2/health/ready")
                    response = watcher.getresponse()
                    return response.read() == b'{"ready":true}'

                until(lambda: not is_ready())
                process.stdin.write("\n")
                process.stdin.flush()
                response = client.getresponse()
                assert (response.status, b"scores" in response.read()) == (200, True)
            assert process.wait(DEADLINE_S) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_the_metrics_count_what_was_answered(service, server):
    service.receipt = Receipt("digits", 3, (), alpha=0.02, bytes_up=100, bytes_down=40)
    tiers, margins = [], []
    for inputs in (DIGITS[:5], DIGITS[5:6], DIGITS[6:9]):
        assert ask(server, "POST", INFER, query(inputs)).status == 200
        receipt = service.infer("digits", inputs, Budget()).receipt
        tiers.append(receipt.tiers)
        margins += receipt.margins
    ask(server, "POST", INFER, b"{")
    ask(server, "POST", "/v2/models/anything/infer", b"{")
    of_model = {"model": "digits", "version": "3"}
    num_full = sum("full" in of_request for of_request in tiers)
    assert num_full > 0 and value(server, "gossipfl_infer_total", **of_model, tier="full", code="200") == num_full
    assert value(server, "gossipfl_infer_seconds_count", **of_model, tier="full") == num_full
    assert value(server, "gossipfl_infer_total", **of_model, tier="reduced", code="200") == 3 - num_full
    assert value(server, "gossipfl_infer_total", **of_model, tier="", code="400") == 1
    assert value(server, "gossipfl_infer_total", model="", version="", tier="", code="404") == 1
    assert value(server, "gossipfl_fallback_total", **of_model) == sum(of_request.count("full") for of_request in tiers)
    assert value(server, "gossipfl_margin_count", **of_model) == 9
    assert value(server, "gossipfl_margin_sum", **of_model) == pytest.approx(sum(margins))
    assert value(server, "gossipfl_margin_bucket", **of_model, le="0.2") == sum(margin <= 0.2 for margin in margins)
    assert value(server, "gossipfl_certificate_alpha", **of_model) == 0.02
    assert value(server, "gossipfl_bytes_total", direction="up") == 300
    assert value(server, "gossipfl_bytes_total", direction="down") == 120
    assert value(server, "gossipfl_in_flight") == 0
    service.receipt = replace(service.receipt, alpha=None, alarm=True)
    assert ask(server, "POST", INFER, query(DIGITS[:1])).status == 200
    assert math.isnan(value(server, "gossipfl_certificate_alpha", **of_model))
    service.receipt = replace(service.receipt, alpha=None, alarm=True)
    assert ask(server, "POST", INFER, query(DIGITS[:1])).status == 200
    assert math.isnan(value(server, "gossipfl_certificate_alpha", **of_model))


def test_the_metrics_speak_prometheus_and_openmetrics(common):
    plain = ask(common, "GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name for family in text_string_to_metric_families(plain.body.decode())}
    assert families and all(name.startswith("gossipfl_") for name in families)
    newer = ask(common, "GET", "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert newer.headers["content-type"].startswith("application/openmetrics-text")
    assert newer.body.endswith(b"# EOF\n")


def test_two_servers_of_one_process_count_apart(serve):
    first, second = serve(), serve()
    ask(first, "POST", INFER, b"{")
    of_request = {"model": "digits", "version": "3", "tier": "", "code": "400"}
    assert [value(server, "gossipfl_infer_total", **of_request) for server in (first, second)] == [1, 0]


# --- where it listens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_nobody_beyond_this_machine_is_served_unless_that_is_asked_for(service, host):
    with pytest.raises(ConfigError, match=r"reachable from other machines.*--insecure"):
        serve_http(service, host, 0)


def test_everybody_is_served_where_that_is_asked_for(service):
    with serve_http(service, "0.0.0.0", 0, insecure=True) as server:
        assert server.address == f"http://0.0.0.0:{server.port}"
        assert ask(server, "GET", "/v2/health/ready").status == 200


def test_an_address_that_is_taken_or_none_is_told(service, server):
    with pytest.raises(RunError, match="is in use; choose another port"):
        serve_http(service, "127.0.0.1", server.port)
    with pytest.raises(ConfigError, match="99999"):
        serve_http(service, "127.0.0.1", 99999)


def test_no_answer_waits_until_the_client_has_acknowledged_its_head(server):
    assert server._listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_signals_are_as_before_when_the_command_cannot_start(service, server):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunError, match="in use"):
        run_http(service, "127.0.0.1", server.port)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.processes
def test_without_the_extra_it_is_named_when_it_is_needed():
    code = """
import sys
from gossipfl.runtime.http import serve_http

for library in ("prometheus_client", "starlette", "uvicorn"):
    sys.modules[library] = None
    try:
        serve_http(None, "127.0.0.1", 0)
    except Exception as error:
        print(type(error).__name__, error)
    del sys.modules[library]
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    told = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment, timeout=60)
    assert told.stderr == ""
    for library, line in zip(("prometheus_client", "starlette", "uvicorn"), told.stdout.splitlines(), strict=True):
        assert line.startswith(f"ConfigError serving HTTP needs {library}")
        assert line.endswith("which is not installed: pip install 'gossipfl[http]'")
