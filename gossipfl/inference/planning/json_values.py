"""Values of JSON as what Python's annotations say that they are: what is sent and stored is read strictly, key by key.

    found = read(Catalogue, json.loads(text), "catalogue")        # ValueError: catalogue.version = x is not a whole number

A kind is a dataclass, a tuple, a mapping, a choice, a number, text, or one of these or None. JSON cannot hold an infinite
number: null is one, where there may be no None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

MAX_INTEGER = 2**63 - 1
"""What goes over the wire, and into a float."""
EXPECTED = {int: "a whole number", float: "a number", str: "text"}


def read(kind: Any, value: Any, key: str) -> Any:
    """`value` as a `kind`; ValueError, naming the key, for what is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None else read(next(one for one in arguments if one is not type(None)), value, key)
    if origin is Literal:
        require(value in arguments, key, value, f"one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        is_open = arguments[-1] is Ellipsis
        is_list = isinstance(value, list | tuple) and (is_open or len(value) == len(arguments))
        require(is_list, key, value, "a list" if is_open else f"a list of {len(arguments)}")
        kinds = itertools.repeat(arguments[0]) if is_open else arguments
        return tuple(read(one, item, f"{key}[{index}]") for index, (item, one) in enumerate(zip(value, kinds, strict=False)))
    if origin is Mapping:
        require(isinstance(value, dict), key, value, "a table")
        return {_name(arguments[0], name, f"{key}.{name}"): read(arguments[1], value[name], f"{key}.{name}") for name in value}
    if is_dataclass(kind):
        hints = _hints(kind)  # type: ignore[arg-type]
        require(isinstance(value, dict) and value.keys() == hints.keys(), key, value, f"a table of {', '.join(hints)}")
        return cast(Any, kind)(**{name: read(hint, value[name], f"{key}.{name}") for name, hint in hints.items()})
    if kind is float and value is None:
        return math.inf
    is_right = type(value) is kind or (kind is float and type(value) is int)
    require(is_right, key, value, EXPECTED[kind])
    require(type(value) is not int or abs(value) <= MAX_INTEGER, key, value, f"{EXPECTED[kind]} of at most 63 bits")
    return kind(value)


def require(is_right: object, key: str, value: object, expected: str) -> None:
    """ValueError where it is not."""
    if not is_right:
        raise ValueError(f"{key} = {str(value)[:60]} is not {expected}")


def _name(kind: Any, text: Any, key: str) -> Any:
    """A key of a table, which JSON knows only as text."""
    try:
        return kind(text)
    except ValueError:
        return require(False, key, text, f"named by {'a whole number' if kind is int else 'a number'}")


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)
