"""The kind `text`: next-character prediction on one file, as in the Shakespeare task of McMahan et al. 2017."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from gossipfl.errors import DataError
from gossipfl.learning.datasets.arguments import whole_number
from gossipfl.learning.datasets.dataset import DATASETS, Dataset, required_path

# A speaker's line of a play: "ROMEO:" in capitals, or "First Citizen:" after an empty line; verse that merely ends
# with a colon is neither.
_SPEAKER = re.compile(r"^(?:[A-Z][A-Z '&,.-]+|(?<![^\n]\n)[A-Z][^\n:]{0,40}):$", re.MULTILINE)


@DATASETS.register("text")
def text(path: Path | None, test_fraction: float, seed: int, *, block: int = 64) -> Dataset:
    """A UTF-8 text file as windows of `block` characters that do not overlap; `y` is `x` one character later.

    The vocabulary is the sorted characters of the whole file, the test set its last `test_fraction`. `keys` name the
    speaker of a window's first character where the file is a play, else None. The seed decides nothing.
    """
    path = required_path(path, "text", "a text file")
    whole_number("data set 'text'", "block", block)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.path = {str(path)!r} cannot be read as UTF-8 text ({error})") from error
    code_points = np.frombuffer(content.encode("utf-32-le"), dtype="<u4")
    vocabulary, tokens = np.unique(code_points, return_inverse=True)
    num_test = round(len(tokens) * test_fraction)
    if min(num_test, len(tokens) - num_test) <= block:
        raise DataError(
            f"data.path = {str(path)!r} holds {len(tokens)} characters; training and test part need more than "
            f"block = {block} each; lower block or give a longer text"
        )
    x_train, y_train = _windows(tokens[: len(tokens) - num_test], block)
    x_test, y_test = _windows(tokens[len(tokens) - num_test :], block)
    keys = _speakers(content, np.arange(len(x_train)) * block)
    return Dataset(x_train, y_train, x_test, y_test, num_classes=len(vocabulary), keys=keys)


def _windows(tokens: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """`x, y: i64[n, block]` with `y[i, t] = tokens[i * block + t + 1]`; a remainder is dropped."""
    used = (len(tokens) - 1) // block * block
    x = tokens[:used].astype(np.int64).reshape(-1, block)
    y = tokens[1 : used + 1].astype(np.int64).reshape(-1, block)
    return x, y


def _speakers(content: str, positions: np.ndarray) -> np.ndarray | None:
    """Who speaks at each position, `i64[n]` numbered from 0 without gaps; None where fewer than two speak."""
    lines = list(_SPEAKER.finditer(content))
    names = sorted({line[0] for line in lines})
    if len(names) < 2:
        return None
    number = {name: i for i, name in enumerate(names, start=1)}
    starts = [line.start() for line in lines]
    speaker = np.array([0, *(number[line[0]] for line in lines)])  # 0: what stands before the first speaker
    at_position = speaker[np.searchsorted(starts, positions, side="right")]
    return np.unique(at_position, return_inverse=True)[1].astype(np.int64)
