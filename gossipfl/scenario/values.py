"""Kinds of values that a type alone does not describe: their checks, and the messages that follow `key = value`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator

from gossipfl.overlay.links import Constant, Distribution, Lognormal, Uniform


class Table(BaseModel):
    """A table of the scenario: frozen, and without keys that nobody knows."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # a number in quotes, or 1 for true, is a mistake to report; an integer where a float is due is none
        allow_inf_nan=False,
        protected_namespaces=(),  # our own `model` and `model_args`
    )


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


_NUMBER = r"(\d+(?:\.\d*)?(?:e[+-]?\d{1,3})?)"
_UNITS_S = {
    "": Decimal(1),
    "us": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
}
"""Decimal, so that "100us" is the number 0.0001 to the last bit."""


def _seconds(value: Any) -> float | None:
    """Seconds of a number or of text such as "50ms", "90s", "10min", "1h"; None if it is no time."""
    if isinstance(value, str):
        match = re.fullmatch(rf"{_NUMBER} *(us|ms|s|min|h|)", re.sub("[µμ]s", "us", value.strip()))
        return float(Decimal(match[1]) * _UNITS_S[match[2]]) if match else None
    return float(value) if _is_number(value) else None


def _duration(value: Any) -> float:
    seconds = _seconds(value)
    if seconds is None or not 0 < seconds < math.inf:
        raise ValueError("must be a number of seconds above 0, or text such as '90s', '10min' or '1h'")
    return seconds


def _with_unit(value: Any) -> float | None:
    """Seconds in text that says what they are: 5 may mean milliseconds to one and seconds to another. 0 needs no unit."""
    says_unit = isinstance(value, str) and value.strip()[-1:].isalpha()
    return _seconds(value) if says_unit or (_is_number(value) and value == 0) else None


def _delay(value: Any) -> float:
    seconds = _with_unit(value)
    if seconds is None or not 0 <= seconds < math.inf:
        raise ValueError("must be a time of at least 0, with its unit, such as '50ms'")
    return abs(seconds)  # -0.0 would not be read back


def _step_time(value: Any) -> float:
    seconds = _with_unit(value)
    if seconds is None or not 0 < seconds < math.inf:
        raise ValueError("must be a time above 0, with its unit, such as '10ms'")
    return seconds


def _seconds_text(seconds: float) -> str:
    """Text that reads as exactly this number."""
    text = f"{seconds * 1e3:.12g}ms"
    return text if seconds < 1 and _seconds(text) == seconds else f"{seconds!r}s"


_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
LEAST_RATE = 0.125
"""Bytes per second. Peers ask every few seconds for what is on its way: a round over slower links would never end."""
_RATE = re.compile(rf"{_NUMBER} *([kKMmGgT]?|[KMG]i)(bit|b|B)(?:/s|ps)?")


def _rate(value: Any) -> float:
    """Bytes per second of text such as "100Mbit", "2MB", "2MiB/s" or "10Mbps"; bits are meant by `bit` and `b`."""
    if value in ("unlimited", "inf", math.inf):
        return math.inf
    text = str(value).strip() if isinstance(value, str) or _is_number(value) else ""
    if re.fullmatch(_NUMBER, text) and float(text) > 0:
        raise ValueError(f'has no unit; say "{value}Mbit" (per second), or "{value}MB" if bytes are meant')
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(
            "must be a rate above 0 with its unit, such as '100Mbit', '500kbit' or '2MB' (per second), or 'unlimited'"
        )
    number, prefix, unit = match.groups()
    factor = _BINARY.get(prefix) or _DECIMAL[prefix if prefix in _DECIMAL else prefix.swapcase()]
    bytes_per_s = float(number) * factor / (1 if unit == "B" else 8)
    if bytes_per_s == math.inf:
        raise ValueError("must be finite; say 'unlimited' where there is no limit")
    if bytes_per_s < LEAST_RATE:
        raise ValueError(
            "must be at least 1bit (per second); leave the key out where there is no limit, and see [churn] for peers that are "
            "away"
        )
    return bytes_per_s


def _rate_text(bytes_per_s: float) -> str:
    """The shortest text that `_rate` reads as exactly this number."""
    if bytes_per_s == math.inf:
        return "unlimited"
    for prefix in ("G", "M", "k"):
        text = f"{bytes_per_s * 8 / _DECIMAL[prefix]:.12g}{prefix}bit"
        if not text.startswith("0") and _rate(text) == bytes_per_s:
            return text
    return f"{bytes_per_s * 8!r}bit"


_SIZE = re.compile(rf"{_NUMBER} *([kKMGT]?|[KMG]i)B")


def _size(value: Any) -> int:
    """Bytes of text such as "512MiB" or "2GB"."""
    text = value.strip() if isinstance(value, str) else ""
    if _is_number(value) or re.fullmatch(_NUMBER, text):
        raise ValueError(f'has no unit; say "{value}MiB", or "{value}B" if bytes are meant')
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError("must be a size with its unit, such as '512MiB' or '2GB'")
    number, prefix = match.groups()
    size = float(number) * (_BINARY.get(prefix) or _DECIMAL["k" if prefix == "K" else prefix])
    if not 1 <= size < math.inf:
        raise ValueError("must be at least a byte")
    return int(size)


def _of_percent(value: Any) -> Any:
    """The number that "2%" means, to the last bit; anything else as it is."""
    match = re.fullmatch(rf"{_NUMBER} *%", value.strip()) if isinstance(value, str) else None
    return float(Decimal(match[1]) / 100) if match else value


def _share(value: Any) -> float:
    """A share of a whole: 0.02 or "2%"."""
    number = _of_percent(value)
    share = float(number) if _is_number(number) else math.nan
    if not 0 <= share < 1:
        raise ValueError("must be a share of at least 0 and below 1 (100 %), such as 0.02 or '2%'")
    return share


def _factor(value: Any) -> float:
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError("must be a factor above 0: 2 = twice as fast")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_DISTRIBUTIONS = '{kind = "uniform", low = ..., high = ...} or {kind = "lognormal", median = ..., sigma = ...}'


def _distribution(parse: Callable[[Any], float]) -> Callable[[Any], Distribution]:
    """A reader of one value for all, or of a table from which each draws its own; `parse` reads the values in it."""

    def entry(table: Mapping[str, Any], key: str, read: Callable[[Any], float]) -> float:
        try:
            return read(table[key])
        except ValueError as error:
            raise ValueError(f"has {key} = {table[key]!r}, which {error}") from None

    def distribution(value: Any) -> Distribution:
        if isinstance(value, Constant | Uniform | Lognormal):
            return value
        if not isinstance(value, Mapping):
            return Constant(parse(value))
        match value.get("kind"), sorted(value.keys() - {"kind"}):
            case "uniform", ["high", "low"]:
                low, high = entry(value, "low", parse), entry(value, "high", parse)
                if not low <= high < math.inf:
                    raise ValueError("has a low that exceeds its high, or no high; exchange them, or give a finite one")
                return Uniform(low, high)
            case "lognormal", ["median", "sigma"]:
                median = entry(value, "median", parse)
                if median == math.inf:
                    raise ValueError("has no finite median; give one")
                return Lognormal(median, entry(value, "sigma", _spread))
        raise ValueError(f"must be one value for all, or {_DISTRIBUTIONS}")

    return distribution


def _spread(value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= 10:  # e^10: a factor of 22,000 between one in six and the median
        raise ValueError("must be a number from 0 to 10, the standard deviation of the logarithm")
    return float(value)


def _written(show: Callable[[float], Any]) -> Callable[[Distribution], Any]:
    """What `_distribution` reads back; `show` writes the values."""

    def written(value: Distribution) -> Any:
        match value:
            case Constant(constant):
                return show(constant)
            case Uniform(low, high):
                return {"kind": "uniform", "low": show(low), "high": show(high)}
            case Lognormal(median, sigma):
                return {"kind": "lognormal", "median": show(median), "sigma": sigma}

    return written


def _existing(path: Any) -> Any:
    if isinstance(path, str | Path) and not Path(path).exists():
        raise ValueError(
            "does not exist; give a file or folder, relative to the scenario file or to the current folder, "
            "or leave it out where the data set needs none"
        )
    return str(path) if isinstance(path, Path) else path


def _existing_file(path: Any) -> Any:
    if isinstance(path, str | Path) and not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{what}; give a CSV file, relative to the scenario file or to the current folder")
    return str(path) if isinstance(path, Path) else path


def _local_function(name: str) -> str:
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError("must name a function as package.module:function")
    return name


Text = Annotated[str, Field(min_length=1)]
FunctionName = Annotated[str, AfterValidator(_local_function)]
Arguments = Annotated[dict[str, Any], AfterValidator(toml_value)]
ExistingPath = Annotated[str, BeforeValidator(_existing)]
Staleness = Annotated[float, PlainValidator(_staleness)]
Patience = Annotated[float | Literal["auto"], PlainValidator(_patience)]
DurationS = Annotated[float, PlainValidator(_duration)]
DelayS = Annotated[float, PlainValidator(_delay), PlainSerializer(_seconds_text)]
StepTimeS = Annotated[float, PlainValidator(_step_time), PlainSerializer(_seconds_text)]
Rate = Annotated[float, PlainValidator(_rate), PlainSerializer(_rate_text)]
"""Bytes per second; inf = no limit."""
Size = Annotated[int, PlainValidator(_size)]
"""Bytes."""
Factor = Annotated[float, PlainValidator(_factor)]
Spread = Annotated[float, PlainValidator(_spread)]
Share = Annotated[float, PlainValidator(_share)]
"""From 0, and below 1."""
Fraction = Annotated[float, BeforeValidator(_of_percent)]
"""A share within the bounds of its field."""
ExistingFile = Annotated[str, BeforeValidator(_existing_file)]
Rates = Annotated[Distribution, PlainValidator(_distribution(_rate)), PlainSerializer(_written(_rate_text))]
Delays = Annotated[Distribution, PlainValidator(_distribution(_delay)), PlainSerializer(_written(_seconds_text))]
StepTimes = Annotated[Distribution, PlainValidator(_distribution(_step_time)), PlainSerializer(_written(_seconds_text))]
Factors = Annotated[Distribution, PlainValidator(_distribution(_factor)), PlainSerializer(_written(float))]
