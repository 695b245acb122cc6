"""Numbers as Python has them: numpy's, such as a sum over labels gives, neither travel nor fit a record."""

from __future__ import annotations

from typing import Any

import numpy as np


def without_numpy(value: Any) -> Any:
    """numpy's numbers as Python's, in dictionaries and lists too; anything else as it is."""
    match value:
        case np.generic():
            return value.item()
        case dict():
            return {key: without_numpy(item) for key, item in value.items()}
        case list():
            return [without_numpy(item) for item in value]
        case tuple():
            return tuple(without_numpy(item) for item in value)
    return value
