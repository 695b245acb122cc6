"""Requests and responses of the Open Inference Protocol v2 (kserve/open-inference-protocol, specification/protocol/
inference_rest.md) with Triton's binary tensor data extension, as bytes: nothing here knows of HTTP.

Parameters of a request carry its budget: `max_accuracy_loss`, `timeout_s`. Those of a response carry the receipt. The protocol
allows only strings, numbers and booleans there, so a receipt's lists and tables are JSON text and what it lacks is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np

from gossipfl.errors import ConfigError, RunError
from gossipfl.inference.planning.profile import Shape
from gossipfl.inference.planning.receipts import Answer, Budget, Receipt, ServedModel
from gossipfl.registry import did_you_mean

INPUT, SCORES, LABEL = "input", "scores", "label"
DATATYPES = {
    "FP32": "<f4",
    "FP64": "<f8",
    "FP16": "<f2",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
}
"""Of inputs. All become f32, as they are: nothing is scaled."""
MAX_SIZE = 10**100
"""Of a shape: Python writes no numbers of more than 4,300 digits into messages."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take from the others."""

    body_bytes: int = 16 << 20
    in_flight: int = 64
    """Requests at once, those that are still being read and those that wait for a thread included."""
    body_s: float = 10.0
    """For a request's body to arrive."""
    request_s: float = 30.0
    """For the whole of a request, and the most that `timeout_s` may be."""
    threads: int = 8
    """Requests computed at once."""


@dataclass(frozen=True, slots=True)
class Query:
    """A request, checked. `inputs` is f32[B, *input_shape]; `outputs` names those wanted, and whether as binary data."""

    inputs: np.ndarray
    budget: Budget
    id: str | None
    outputs: tuple[tuple[str, bool], ...]


def describe(model: ServedModel, versions: Iterable[int]) -> dict[str, Any]:
    """The model's metadata; -1 is the batch."""
    return {
        "name": model.name,
        "versions": [str(version) for version in versions],
        "platform": "gossipfl",
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *model.input_shape]}],
        "outputs": [
            {"name": SCORES, "datatype": "FP32", "shape": [-1, model.num_classes]},
            {"name": LABEL, "datatype": "INT64", "shape": [-1]},
        ],
    }


# --- requests ---------------------------------------------------------------------------------------------------------


def decode_query(body: bytes, header_bytes: int | None, input_shape: Shape, longest_s: float) -> Query:
    """The request in `body`; of its first `header_bytes` where binary data follows them. ConfigError says what is wrong."""
    if header_bytes is not None and not 0 < header_bytes <= len(body):
        raise ConfigError(f"Inference-Header-Content-Length = {header_bytes}, but the body has {len(body)} bytes")
    request = _parse(body[:header_bytes])
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise ConfigError(f"inputs must be a list of one tensor, called {INPUT!r}")
    parameters = _parameters(request, "the request", ("max_accuracy_loss", "timeout_s", "binary_data_output"))
    name = request.get("id")
    if not isinstance(name, str | None):
        raise ConfigError(f"id = {name!r} is no string")
    return Query(
        inputs=_tensor(inputs[0], None if header_bytes is None else memoryview(body)[header_bytes:], input_shape),
        budget=_budget(parameters, longest_s),
        id=name,
        outputs=_outputs(request.get("outputs") or [], _boolean(parameters, "binary_data_output", False)),
    )


def _parse(text: bytes) -> dict[str, Any]:
    try:
        request = json.loads(text, parse_constant=_not_finite)
    except RecursionError as error:
        raise ConfigError("the request is nested too deeply") from error
    except ValueError as error:
        if not isinstance(error, UnicodeDecodeError | json.JSONDecodeError):
            raise ConfigError("the request holds a number with thousands of digits; no model takes one") from error
        hint = "; is Inference-Header-Content-Length missing?" if isinstance(error, UnicodeDecodeError) else ""
        raise ConfigError(f"the request is not JSON: {error}{hint}") from error
    if not isinstance(request, dict):
        raise ConfigError('the request must be a JSON object, {"inputs": [...]}')
    return request


def _not_finite(name: str) -> NoReturn:
    raise ConfigError(f"the request holds {name}; JSON knows finite numbers only, and so does the model")


def _parameters(owner: dict[str, Any], whose: str, known: tuple[str, ...]) -> dict[str, Any]:
    parameters = owner.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"parameters of {whose} must be an object")
    for name in parameters:
        if name not in known:
            raise ConfigError(
                f"{whose} has the unknown parameter {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"
            )
    return parameters


def _budget(parameters: dict[str, Any], longest_s: float) -> Budget:
    loss, timeout_s = parameters.get("max_accuracy_loss"), parameters.get("timeout_s", longest_s)
    if loss is not None and not (_is_number(loss) and 0 <= loss <= 1):
        raise ConfigError(f"max_accuracy_loss = {loss!r} must be a number from 0 to 1: 0.01 allows one answer in a hundred")
    if not (_is_number(timeout_s) and 0 < timeout_s <= longest_s):
        raise ConfigError(f"timeout_s = {timeout_s!r} must be a number above 0 and at most {longest_s:g}, this server's limit")
    return Budget(loss, float(timeout_s))


def _tensor(tensor: Any, binary: memoryview | None, input_shape: Shape) -> np.ndarray:
    if not isinstance(tensor, dict) or tensor.get("name") != INPUT:
        name = tensor.get("name") if isinstance(tensor, dict) else tensor
        raise ConfigError(f"the model's only input is called {INPUT!r}, not {name!r}")
    datatype, shape = tensor.get("datatype"), _shape(tensor.get("shape"), input_shape)
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise ConfigError(f"datatype = {datatype!r} of {INPUT!r} must be one of {', '.join(DATATYPES)}")
    size = _parameters(tensor, repr(INPUT), ("binary_data_size",)).get("binary_data_size")
    if size is None:
        values = _from_json(tensor.get("data"), datatype, shape)
    else:
        values = _from_binary(binary, size, datatype, shape)
    with np.errstate(over="ignore"):
        converted = values.astype(np.float32).reshape(shape)
    if not np.isfinite(converted).all():
        raise ConfigError(f"{INPUT!r} holds values that are not finite as 32-bit floats")
    return converted


def _shape(shape: Any, input_shape: Shape) -> list[int]:
    is_shape = isinstance(shape, list) and all(type(size) is int and size < MAX_SIZE for size in shape)
    if not is_shape or tuple(shape[1:]) != input_shape or shape[0] < 1:
        wanted = ", ".join(["B", *map(str, input_shape)])
        raise ConfigError(f"shape = {shape!r} of {INPUT!r} must be [{wanted}]: one or more samples of the model's input shape")
    return list(shape)


def _from_json(data: Any, datatype: str, shape: list[int]) -> np.ndarray:
    try:
        given = np.asarray(data)
    except ValueError as error:
        raise ConfigError(f"data of {INPUT!r} is ragged or too deep: its lists must be as long as each other") from error
    if given.dtype.kind not in "iuf":
        raise ConfigError(f"data of {INPUT!r} must be a list of numbers, flat or nested as its shape")
    if given.size != math.prod(shape) or (given.ndim != 1 and given.shape != tuple(shape)):
        raise ConfigError(f"data of {INPUT!r} has the shape {list(given.shape)}, neither {shape} nor [{math.prod(shape)}]")
    with np.errstate(over="ignore", invalid="ignore"):
        values = given.astype(DATATYPES[datatype])
    if values.dtype.kind != "f" and (values != given).any():
        raise ConfigError(f"data of {INPUT!r} holds values that {datatype} cannot")
    return values


def _from_binary(binary: memoryview | None, size: Any, datatype: str, shape: list[int]) -> np.ndarray:
    if binary is None:
        raise ConfigError(
            "binary_data_size needs the header Inference-Header-Content-Length: the bytes of the JSON before the data"
        )
    wanted = math.prod(shape) * np.dtype(DATATYPES[datatype]).itemsize
    if not size == wanted == len(binary):
        raise ConfigError(
            f"{datatype} of the shape {shape} takes {wanted} bytes, but binary_data_size = {size!r} "
            f"and {len(binary)} bytes follow the JSON"
        )
    return np.frombuffer(binary, DATATYPES[datatype])


def _outputs(wanted: Any, is_binary: bool) -> tuple[tuple[str, bool], ...]:
    if not isinstance(wanted, list):
        raise ConfigError(f"outputs must be a list of {SCORES!r} and {LABEL!r}, or left out")
    outputs = []
    for output in wanted or [{"name": SCORES}, {"name": LABEL}]:
        name = output.get("name") if isinstance(output, dict) else output
        if not isinstance(output, dict) or name not in (SCORES, LABEL):
            raise ConfigError(f"there is no output {name!r}; the outputs are {SCORES!r} and {LABEL!r}")
        parameters = _parameters(output, f"the output {name!r}", ("binary_data",))
        outputs.append((name, _boolean(parameters, "binary_data", is_binary)))
    return tuple(outputs)


def _boolean(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} = {value!r} must be true or false")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- responses --------------------------------------------------------------------------------------------------------


def encode_answer(query: Query, answer: Answer) -> tuple[bytes, int | None]:
    """The response, and the bytes of its JSON where binary data follows it. RunError for scores that are not finite."""
    receipt, scores = answer.receipt, np.ascontiguousarray(answer.scores, "<f4")
    if not np.isfinite(scores).all():
        raise RunError(f"version {receipt.version} of {receipt.model!r} answers with scores that are not finite; serve another")
    tensors = {SCORES: ("FP32", scores), LABEL: ("INT64", scores.argmax(axis=1).astype("<i8"))}
    outputs, binary = [], []
    for name, is_binary in query.outputs:
        datatype, values = tensors[name]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
        if is_binary:
            output["parameters"] = {"binary_data_size": values.nbytes}
            binary.append(values.tobytes())
        else:
            output["data"] = values.ravel().tolist()
        outputs.append(output)
    response = {"model_name": receipt.model, "model_version": str(receipt.version)}
    response |= {"id": query.id} if query.id is not None else {}
    text = json.dumps({**response, "parameters": _receipt_parameters(receipt), "outputs": outputs}, allow_nan=False).encode()
    return b"".join([text, *binary]), len(text) if binary else None


def _receipt_parameters(receipt: Receipt) -> dict[str, str | int | float]:
    values = {field.name: getattr(receipt, field.name) for field in fields(receipt)}
    return {name: _scalar(value) for name, value in values.items() if value is not None}


def _scalar(value: Any) -> str | int | float:
    is_plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else json.dumps(value)
