"""Where the settings of a scenario come from: files, the scenarios that come with the package, `key=value` overrides."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gossipfl.errors import ConfigError
from gossipfl.registry import did_you_mean

Values = dict[str, Any]
"""The settings as TOML gives them: tables are dictionaries."""


def builtin_scenarios() -> dict[str, Path]:
    """The scenarios that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "scenarios", package.parent / "scenarios"):  # an installed wheel; a checkout
        files = sorted(folder.glob("*.toml"))
        if files:
            return {file.stem: file for file in files}
    return {}


def scenario_file(source: str | Path) -> Path:
    """The file that `source` means: a path, or the name of a scenario that comes with the package."""
    path = Path(source).expanduser()
    if path.exists() and not path.is_dir():  # also a pipe
        return path
    builtin = builtin_scenarios()
    if str(source) in builtin:
        return builtin[str(source)]
    if (path / "scenario.toml").is_file():
        raise ConfigError(f"the scenario {str(source)!r} is a folder; give the file in it, {path / 'scenario.toml'}")
    guess = did_you_mean(path.stem, builtin)
    raise ConfigError(
        f"no scenario {str(source)!r}: there is no such file, and the built-in ones are {', '.join(builtin)}{guess}"
    )


def read_toml(path: Path, what: str = "a scenario") -> tuple[Values, str]:
    """The settings in a file, and its text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text and not path.is_file():
            raise ConfigError(f"{path} is a pipe that holds nothing, or was read before; give {what} as a file")
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        line = re.search(r"line (\d+)", place)
        where = f"{path}:{line[1]}" if line else f"{path}, at its end"
        raise ConfigError(f"{where}: {message}; the file must be TOML") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; {what} is a text file in UTF-8") from error


def checked_overrides(overrides: Sequence[str]) -> list[str]:
    """The same. ConfigError where they are anything but a list of texts: a text is a sequence of texts too."""
    if isinstance(overrides, str | Mapping) or not all(isinstance(override, str) for override in overrides):
        raise ConfigError(f'overrides = {overrides!r} must be a list of "key=value" texts, such as ["peers=4", "rounds=3"]')
    return list(overrides)


def apply_overrides(values: Values, overrides: Sequence[str]) -> set[str]:
    """Set each `key=value` in `values` (changed in place) and return the keys. Keys are checked later, like a file's."""
    keys = set()
    for override in checked_overrides(overrides):
        (*tables, last), text = _split(override)
        key, target = ".".join([*tables, last]), values
        for table in tables:
            if table == "seed" and isinstance(values.get("seed"), int):
                values["seed"] = dict.fromkeys(("data", "model", "protocol"), values["seed"])
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise ConfigError(f"unknown key {key!r}: {table} = {target!r} is no table; override {table!r} itself")
        rival = _RIVALS.get(key, "")
        if f"{key.rpartition('.')[0]}.{rival}" not in keys:  # of two overrides neither wins
            target.pop(rival, None)
        value = _toml_value(text.strip())
        if key in _KINDS and target.get("kind", value) != value:  # the arguments of another kind are none of this one's
            for argument in [name for name in target if f"{key.rpartition('.')[0]}.{name}" not in keys]:
                del target[argument]
        target[last] = value
        keys.add(key)
    return keys


_KEY = r"""\s*"[^"\n]*"\s*|\s*'[^'\n]*'\s*|[^."'=]+"""


def _split(override: str) -> tuple[list[str], str]:
    """The parts of the dotted key, which may be quoted as in TOML, and the text of the value."""
    match = re.fullmatch(rf"((?:{_KEY})(?:\.(?:{_KEY}))*)=(.*)", override, re.DOTALL)
    parts = [part.strip() for part in re.findall(_KEY, match[1])] if match else []
    if match is None or not all(parts):
        raise ConfigError(f"the override {override!r} must be key=value, such as gossip.segments=4")
    return [_toml_value(part) if part[0] in "\"'" else part for part in parts], match[2]


_KINDS = ("data.partition.kind", "topology.kind")
"""The kinds whose arguments stand beside them."""

_EXCLUSIVE = (
    ("training", "local_steps", "local_epochs"),
    ("network", "pair", "pair_matrix"),
    ("network", "latency", "latency_matrix"),
    ("compute.stragglers", "fraction", "peers"),
)
_RIVALS = {f"{table}.{one}": other for table, *two in _EXCLUSIVE for one, other in (two, reversed(two))}
"""Keys that exclude each other: the override of one takes the place of the file's other."""


def resolve_paths(values: Values, folders: Sequence[Path]) -> None:
    """Make the paths in `values` absolute (in place): relative to the first of `folders` that holds such a thing."""
    for table, key in _PATHS:
        settings = values.get(table)
        if isinstance(settings, dict) and isinstance(settings.get(key), str | Path):
            path = Path(settings[key]).expanduser()
            found = next((folder / path for folder in folders if (folder / path).exists()), None)
            if found is not None:
                settings[key] = str(found.resolve())


_PATHS = (
    ("data", "path"),
    ("topology", "path"),
    *(("network", key) for key in ("pair_matrix", "latency_matrix", "trace")),
    ("churn", "trace"),
)


def line_of(text: str, key: str) -> int | None:
    """The line of a TOML text that sets `key`, or else the table around it. A guess for messages: it scans, no parser."""
    lines = dict(reversed(list(_keys_with_lines(text))))  # the first of several wins
    while key:
        if key in lines:
            return lines[key]
        key = key.rpartition(".")[0]
    return None


def _keys_with_lines(text: str) -> Iterator[tuple[str, int]]:
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([\w.\-\"' ]+)\]", line):
            table = _unquoted(header[1])
            yield table, number
        elif setting := re.match(r"\s*([\w.\-\"']+)\s*=", line):
            yield f"{table}.{_unquoted(setting[1])}".lstrip("."), number


def _unquoted(key: str) -> str:
    return re.sub(r"[\"' ]", "", key)


def _toml_value(text: str) -> Any:
    """A number, boolean, list, quoted text, ... as TOML writes it; anything else is taken as text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text  # more keys: the text held line breaks
