"""Numbers of emulated networks from CSV files: matrices, and traces of what changes over time.

| file | content |
|---|---|
| matrix | N rows of N numbers, sender by receiver; the diagonal may hold anything; a rate may be `inf`, no limit |
| trace | a header `time_s,peer,...`, then rows sorted by time, such as `12.5,p3,10,50` |

What follows a `#` is a comment; lines without anything else are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gossipfl.errors import ConfigError


class Row(NamedTuple):
    """A row of a trace: from `time_s` on, `peer` (its index) has these values."""

    line: int
    time_s: float
    peer: int
    values: list[float]


def read_matrix(path: str, num_peers: int, scale: float, *, takes_inf: bool = False) -> np.ndarray:
    """f64[N, N]: the numbers of a file times `scale`, the diagonal 0. ConfigError names the line that cannot be right."""
    allowed = "at least 0, or inf" if takes_inf else "at least 0, and finite"
    rows = list(_lines(path))
    matrix = np.zeros((num_peers, num_peers), dtype=np.float64)
    for index, (line, words) in enumerate(rows):
        if len(rows) != num_peers or len(words) != num_peers:
            raise ConfigError(
                f"{path} line {line}: a matrix of {len(rows)} x {len(words)}, where {num_peers} peers need "
                f"{num_peers} x {num_peers}; give a row and a column for each peer, and no names"
            )
        words[index] = "0"
        try:
            numbers = np.array(words, dtype=np.float64)
        except ValueError as error:
            raise ConfigError(f"{path} line {line}: {error}; a matrix holds numbers") from None
        if len(wrong := np.flatnonzero(~(numbers >= 0) | (np.isinf(numbers) & (not takes_inf)))):
            raise ConfigError(f"{path} line {line}: {words[wrong[0]]!r} in column {wrong[0] + 1} must be {allowed}")
        matrix[index] = numbers * scale
    if not rows:
        raise ConfigError(f"{path} is empty; {num_peers} peers need a matrix of {num_peers} x {num_peers}")
    return matrix


def read_trace(path: str, columns: Sequence[str], num_peers: int) -> Iterator[Row]:
    """The rows of a trace with the columns `time_s`, `peer` and `columns`. ConfigError names the line that cannot be right."""
    header, time_s, has_rows = ["time_s", "peer", *columns], 0.0, False
    example = ",".join(["12.5", "p0", *("1" for _ in columns)])
    last_of: dict[str, float] = {}
    lines = _lines(path)
    line, words = next(lines, (1, []))
    if words != header:
        raise ConfigError(f"{path} line {line}: the header is {','.join(words)!r}; it must be {','.join(header)!r}")
    for line, words in lines:
        if len(words) != len(header):
            raise ConfigError(f"{path} line {line}: {len(words)} columns; the header has {len(header)}")
        try:
            earlier, time_s, *values = time_s, float(words[0]), *map(float, words[2:])
        except ValueError as error:
            raise ConfigError(f"{path} line {line}: {error}; give numbers") from None
        if not 0 <= time_s < np.inf:
            raise ConfigError(f"{path} line {line}: time_s = {words[0]} must be a number of seconds of at least 0")
        if time_s < earlier:
            raise ConfigError(f"{path} line {line}: time_s = {words[0]} comes after {earlier:g}; sort the rows by time")
        number = words[1].removeprefix("p")
        if not words[1].startswith("p") or not number.isdecimal() or int(number) >= num_peers:
            raise ConfigError(f"{path} line {line}: there is no peer {words[1]!r}; peers are p0 to p{num_peers - 1}")
        if last_of.get(number) == time_s:
            raise ConfigError(f"{path} line {line}: {words[1]} has a row at {time_s:g} s already; remove one of them")
        last_of[number] = time_s
        yield Row(line, time_s, int(number), values)
        has_rows = True
    if not has_rows:
        raise ConfigError(
            f"{path} line {line}: no row comes after the header; give one like {example!r}, or leave the trace out"
        )


def _lines(path: str) -> Iterator[tuple[int, list[str]]]:
    """The lines that hold anything: their numbers and their words."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            for number, text in enumerate(file, start=1):
                if text := text.partition("#")[0].strip():
                    yield number, [word.strip() for word in text.split(",")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give the path of a CSV file") from error
