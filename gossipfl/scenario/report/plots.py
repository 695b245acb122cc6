"""What the plots of a report are made of: plain data for plotly.js. Colours that depend on light and dark come in the page.

The colours of the runs are those of M. Okabe and K. Ito, "Color Universal Design" (2008), and the scale is Cividis
(J. R. Nuñez, C. R. Anderton and R. S. Renslow, PLOS ONE 13(7), 2018): both read the same with a colour vision deficiency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Trace = dict[str, Any]
"""One of plotly's: what is drawn in one colour."""

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
SCALE = "Cividis"
MIB = 2.0**20


@dataclass(frozen=True)
class Plot:
    """What plotly draws, and the same as columns for a CSV file; or, in `missing`, why there is nothing to draw."""

    key: str
    """Of the page and of the CSV file."""
    title: str
    about: str = ""
    """How to read it."""
    traces: list[Trace] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Equally long ones."""
    missing: str = ""


def short(values: np.ndarray) -> list[float | None]:
    """Six digits are more than a screen shows, and halve the page; None, for plotly a gap, where there is no value."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def axis(title: str, **settings: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True} | settings


def log_scale(values: np.ndarray) -> dict[str, Any]:
    """Settings of a logarithmic axis whose labels keep apart on 220 pixels; of a plain one where values hardly differ."""
    values = values[np.isfinite(values) & (values > 0)]
    decades = float(np.log10(values.max() / values.min())) if len(values) else 0.0
    if decades < 0.7:
        return {"rangemode": "tozero"}
    dtick = "D2" if decades < 4 else math.ceil(decades / 12)  # at 1, 2 and 5 of each decade, or at decades
    return {"type": "log", "dtick": dtick, "exponentformat": "none", "minorloglabels": "complete"}


def colourbar(title: str) -> dict[str, Any]:
    return {"title": {"text": title}, "thickness": 10, "outlinewidth": 0}


def faint(colour: str, opacity: float) -> str:
    """A colour (#RRGGBB) that lets through what is behind it."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
