"""What a reproduction is made of: arms that are run, the outcomes of their records, and the tables made from them."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossipfl.registry import Registry
from gossipfl.scenario.pool import processes
from gossipfl.scenario.runner import run

Arms = dict[str, dict[str, Any]]
"""Scenarios by name."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one arm came to; times are virtual seconds, those to the target None where it was not reached."""

    summary: dict[str, Any]
    seconds_to_target: float | None
    rounds_to_target: int | None
    bytes_to_target: float | None
    """Payload that a peer received, on average."""
    sync_s: float
    """Median over peers and rounds of the time between the end of training and the end of merging."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table. `published`: the range `(least, most)` that `measured` is compared with.

    `is_best`: "up to `most`" was published, the best of several results, and `least` is where there is no difference.
    """

    name: str
    values: dict[str, str]
    measured: float | None = None
    published: tuple[float, float] | None = None
    is_best: bool = False

    @property
    def verdict(self) -> str:
        if self.published is None or self.measured is None:
            return ""
        least, most = self.published
        below, inside, above = _BEST if self.is_best else ("below", "inside", "above")
        return below if self.measured < least else above if self.measured > most else inside


_BEST = ("behind", "ahead, below the published best", "above the published best")


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reproduction:
    """`arms(full)` and `tables(outcomes, full)`; `full` is the paper's size, else it ends within a quarter of an hour."""

    arms: Callable[[bool], Arms]
    tables: Callable[[Mapping[str, Outcome], bool], list[Table]]


REPRODUCTIONS: Registry[Callable[[], Reproduction]] = Registry("reproduction")


def run_arms(
    arms: Arms, folder: Path, jobs: int | None = None, on_done: Callable[[str, Outcome], None] = lambda name, outcome: None
) -> dict[str, Outcome]:
    """Run all arms under virtual time, several at once, each in a process of its own; records are kept under `folder`."""
    outcomes: dict[str, Outcome] = {}
    workers = min(jobs or len(os.sched_getaffinity(0)), len(arms))
    with processes(workers) as pool:
        largest_first = sorted(arms, key=lambda name: -arms[name]["peers"])
        names = {pool.submit(_run_arm, name, arms[name], folder): name for name in largest_first}
        for done in as_completed(names):
            outcomes[names[done]] = done.result()
            on_done(names[done], done.result())
    return outcomes


def _run_arm(name: str, scenario: dict[str, Any], folder: Path) -> Outcome:
    result = run(scenario | {"name": name}, clock="virtual", out=folder / name, force=True)
    return outcome_of(result.folder, result.summary, scenario.get("stop", {}).get("target_accuracy"))


def outcome_of(folder: Path, summary: dict[str, Any], target: float | None) -> Outcome:
    """Read a run's record. The target is reached when every peer has ended a round whose mean accuracy is at least that."""
    rounds: dict[int, list[dict[str, Any]]] = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "round":
            rounds.setdefault(event["round"], []).append(event)
    sync_s = statistics.median(event["wait_s"] for peers in rounds.values() for event in peers)
    for reached, peers in sorted(rounds.items()):
        accuracies = [event["accuracy_after"] for event in peers if event["accuracy_after"] is not None]
        if target is not None and accuracies and statistics.fmean(accuracies) >= target:
            received = sum(event["payload_bytes"] for number in rounds if number <= reached for event in rounds[number])
            seconds = max(event["time_s"] for event in peers)
            return Outcome(summary, seconds, reached, received / summary["peers"], sync_s)
    return Outcome(summary, None, None, None, sync_s)
