"""Kinds of values that a type alone does not describe: their checks, and the messages that follow `key = value`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator


def toml_value(value: Any) -> Any:
    """`value` as TOML can hold it and a digest can cover it: tuples become lists, dates and nan are refused."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: toml_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [toml_value(item) for item in value]
    if not isinstance(value, bool | int | float | str) or value != value:
        raise ValueError(f"holds {value!r}; use numbers, text, true, false, lists and tables of these")
    return value


def three_seeds(value: Any) -> Any:
    """One integer stands for all three seeds."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError("must be at least 0")
        return {"data": value, "model": value, "protocol": value}
    if isinstance(value, bool | float | str | list):
        raise ValueError("must be a whole number, or a table of data, model and protocol")
    return value


def _staleness(value: Any) -> int | float:
    if value == "inf" or (isinstance(value, float) and value == math.inf):
        return math.inf
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("must be a whole number of rounds of at least 0, or inf for asynchronous gossip")
    return value


def _patience(value: Any) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError("must be 'auto' or a number of seconds above 0")
    return float(value)


_UNITS_S = {"": 1, "s": 1, "min": 60, "h": 3600}


def _duration(value: Any) -> float | None:
    """Seconds from a number or from text such as "90s", "10min", "1h"."""
    number: float | None = None
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|min|h|)", value.strip())
        number = float(match[1]) * _UNITS_S[match[2]] if match else None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif value is None:
        return None
    if number is None or not 0 < number < math.inf:
        raise ValueError("must be a number of seconds above 0, or text such as '90s', '10min' or '1h'")
    return number


def _existing(path: Any) -> Any:
    if isinstance(path, str | Path) and not Path(path).exists():
        raise ValueError(
            "does not exist; give a file or folder, relative to the scenario file or to the current folder, "
            "or leave it out where the data set needs none"
        )
    return str(path) if isinstance(path, Path) else path


def _local_function(name: str) -> str:
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError("must name a function as package.module:function")
    return name


def _unsupported(value: dict[str, Any]) -> dict[str, Any]:
    if value:
        raise ValueError("is not supported by `run` yet; remove the table")
    return value


Text = Annotated[str, Field(min_length=1)]
FunctionName = Annotated[str, AfterValidator(_local_function)]
Arguments = Annotated[dict[str, Any], AfterValidator(toml_value)]
Reserved = Annotated[dict[str, Any], AfterValidator(_unsupported)]
ExistingPath = Annotated[str, BeforeValidator(_existing)]
Staleness = Annotated[float, PlainValidator(_staleness)]
Patience = Annotated[float | Literal["auto"], PlainValidator(_patience)]
DurationS = Annotated[float | None, PlainValidator(_duration)]
