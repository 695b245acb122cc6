"""Name -> function tables, filled by a decorator, with a suggestion for a mistyped name.

    MODELS: Registry[Callable[..., nn.Module]] = Registry("model")

    @MODELS.register("mlp")
    def mlp(...): ...

    MODELS.get("mpl")          # ConfigError: unknown model 'mpl'; did you mean 'mlp'? ...
    MODELS.get("my_pkg.nets:small")   # a user's own function, imported from the local machine

Such `package.module:function` names are read from local files and arguments only, never from the wire.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from gossipfl.errors import ConfigError

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """A table of named functions of one kind (`kind` names it in error messages)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a function under `name`; a second one of the same name is our own bug."""

        def add(function: T) -> T:
            assert name not in self._functions, f"{self.kind} {name!r} is registered twice"
            self._functions[name] = function
            return function

        return add

    def get(self, name: str) -> T:
        """The function called `name`, or the one that a `package.module:function` points at."""
        if name in self._functions:
            return self._functions[name]
        if ":" in name:
            return cast(T, import_function(name, self.kind))
        raise ConfigError(f"unknown {self.kind} {name!r}{did_you_mean(name, self)}; known: {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._functions))

    def __contains__(self, name: object) -> bool:
        return name in self._functions


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def import_function(name: str, kind: str) -> Callable[..., Any]:
    """Import `package.module:function`, also from the current folder. ConfigError names what is missing."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ConfigError(f"{kind} {name!r} is not of the form package.module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{kind} {name!r}: cannot import module {module_name!r} ({error})") from error
    function = getattr(module, attribute, None)
    if function is None:
        raise ConfigError(f"{kind} {name!r}: module {module_name!r} has no {attribute!r}{did_you_mean(attribute, dir(module))}")
    if not callable(function):
        raise ConfigError(f"{kind} {name!r}: {attribute!r} in {module_name!r} is not a function")
    return cast(Callable[..., Any], function)
