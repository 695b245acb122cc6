"""Call a registered function with the arguments of a scenario file, and say clearly which of them it does not take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gossipfl.errors import ConfigError
from gossipfl.registry import did_you_mean


def call_with(
    what: str,
    function: Callable[..., Any],
    fixed: Sequence[Any],
    args: Mapping[str, Any],
    offered: Mapping[str, Any] | None = None,
) -> Any:
    """`function(*fixed, **offered, **args)` after a check of the names in `args`.

    `fixed` and `offered` come from us, `args` from the user; `offered` are passed only to a function that takes them,
    and are no arguments for a user to give. `what` names the function in messages ("model 'mlp'").
    ConfigError names an argument that is unknown or missing, and those accepted.
    """
    offered = offered or {}
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [p.name for p in parameters[len(fixed) :] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    accepted = [name for name in names if name not in offered]
    for name in args:
        if name in offered or not (takes_any or name in accepted):
            listed = f"it accepts {', '.join(accepted)}" if accepted else "it accepts none"
            raise ConfigError(f"{what} has no argument {name!r}{did_you_mean(name, accepted)}; {listed}")
    given = {name: value for name, value in offered.items() if takes_any or name in names}
    try:
        signature.bind(*fixed, **given, **args)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}; it is called as {function.__name__}{signature}") from error
    return function(*fixed, **given, **args)


def whole_number(what: str, name: str, value: Any, least: int = 1) -> int:
    """`value` if it is an integer of at least `least`, else ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{what}: {name} = {value!r} must be a whole number of at least {least}")
    return value


def positive_number(what: str, name: str, value: Any) -> float:
    """`value` as a float if it is a finite number above 0, else ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{what}: {name} = {value!r} must be a number above 0")
    return float(value)
