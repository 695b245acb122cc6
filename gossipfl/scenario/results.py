"""What a run shows while it goes, and what it comes to."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossipfl.errors import ConfigError, RunError
from gossipfl.learning.checkpoint import load_model
from gossipfl.scenario.config import Scenario
from gossipfl.scenario.interrupts import EXIT_INTERRUPTED
from gossipfl.scenario.records import Event

logger = logging.getLogger(__name__)

MAX_REASONS = 3


class Observer:
    """What a run shows while it goes. It only warns; the command line has one that draws."""

    def data_ready(self, scenario: Scenario, table: np.ndarray | None) -> None:
        """`table`: i64[peers, classes], the training samples of each class that each peer has."""

    def started(self, folder: Path, parameters: int) -> None: ...

    def event(self, event: Event, alive: int) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        """What changes how the result is to be read. It is logged, which is to stderr if logging is not set up otherwise."""
        logger.warning("%s", text)

    def ended(self, result: RunResult) -> None: ...


class NamedObserver(Observer):
    """Of a run among others: what it warns of says which it is."""

    def __init__(self, name: str) -> None:
        self._name = name

    def warn(self, text: str) -> None:
        super().warn(f"{self._name}: {text}")


@dataclass(frozen=True)
class RunResult:
    """What a run came to: its summary (summary.json) and its folder, which also has its events and models."""

    summary: dict[str, Any]
    folder: Path

    @classmethod
    def load(cls, folder: str | Path) -> RunResult:
        """That of an earlier run. ConfigError if there is none in `folder`."""
        try:
            return cls(json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8")), Path(folder))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} holds no record of a run that has ended ({error})") from error

    @property
    def exit_code(self) -> int:
        return int(self.summary["exit_code"])

    @property
    def ending(self) -> str | None:
        """Why the run did not end well, in a sentence; None if it did."""
        num_done = self.summary["peers"] - len(self.summary["faults"]["dead_peers"])
        if self.exit_code == EXIT_INTERRUPTED:
            return f"interrupted after {self.summary['rounds']} rounds"
        if self.exit_code == 0:
            return None
        reasons: dict[str, list[str]] = {}
        for peer, reason in self._reasons().items():
            reasons.setdefault(reason, []).append(peer)
        told = [f"{', '.join(peers[:3])}{' ...' if len(peers) > 3 else ''}: {reason}" for reason, peers in reasons.items()]
        more = [f"{len(told) - MAX_REASONS} more reasons in events.jsonl"] if len(told) > MAX_REASONS else []
        return "; ".join(
            [f"the run failed, for {num_done} of {self.summary['peers']} peers finished", *told[:MAX_REASONS], *more]
        )

    def _reasons(self) -> dict[str, str]:
        """Of each peer that did not finish, by the record."""
        reasons = dict.fromkeys(self.summary["faults"]["dead_peers"], "was not done when the run ended")
        for event in self.events():
            if event.get("peer") not in reasons:
                continue
            if event["event"] == "finished" and event["error"]:
                reasons[event["peer"]] = event["error"].removeprefix(f"{event['peer']}: ")
            if event["event"] == "planned":
                is_gone = event["change"] in ("kill", "away")
                reasons[event["peer"]] = "was away, as [churn] has it" if is_gone else "had come too late to be done"
        return reasons

    def events(self, kind: str | None = None) -> list[Event]:
        """The lines of events.jsonl, or those of one kind: "round" is a line per peer and round, "state" one per round."""
        lines = (self.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if kind in (None, event["event"])]

    def model(self, name: str = "average") -> dict[str, np.ndarray]:
        """The final tensors of a peer, or of the average model. ConfigError, with those that there are, for any other."""
        path = self.folder / "models" / f"{name}.safetensors"
        if not path.exists():
            known = sorted(other.stem for other in path.parent.glob("*.safetensors"))
            raise ConfigError(f"{self.folder} has no model {name!r}; its models: {', '.join(known) or 'none'}")
        layout, vector = load_model(path)
        return layout.tensors(vector)

    def check(self) -> RunResult:
        """Itself, if the run ended well; else RunFailed or RunInterrupted."""
        if self.exit_code == 0:
            return self
        raise RunInterrupted(self) if self.exit_code == EXIT_INTERRUPTED else RunFailed(self)


class RunFailed(RunError):
    """Fewer than `min_peers` peers finished. `result` is what there is of the run: its summary and its folder."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(result.ending)
        self.result = result

    def __reduce__(self) -> tuple[type, tuple[RunResult]]:
        return type(self), (self.result,)


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run. `result` is what there is of it: its summary and its folder."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(result.ending)
        self.result = result

    def __reduce__(self) -> tuple[type, tuple[RunResult]]:
        return type(self), (self.result,)
