"""What a run shows while it goes, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossipfl.learning.checkpoint import load_model
from gossipfl.scenario.config import Scenario
from gossipfl.scenario.records import Event


class Observer:
    """What a run shows while it goes. Does nothing; the command line has one that draws."""

    def data_ready(self, scenario: Scenario, table: np.ndarray | None) -> None:
        """`table`: i64[peers, classes], the training samples of each class that each peer has."""

    def started(self, folder: Path, parameters: int) -> None: ...

    def event(self, event: Event, alive: int) -> None: ...

    def note(self, text: str) -> None: ...

    def ended(self, result: RunResult) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """What a run came to: its summary (summary.json) and its folder."""

    summary: dict[str, Any]
    folder: Path

    @property
    def exit_code(self) -> int:
        return int(self.summary["exit_code"])

    def model(self, name: str = "average") -> dict[str, np.ndarray]:
        """The final tensors of a peer, or of the average model."""
        layout, vector = load_model(self.folder / "models" / f"{name}.safetensors")
        return layout.tensors(vector)
