"""What a reproduction is made of: arms that are run, the outcomes of their records, and the tables made from them."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gossipfl.errors import ConfigError, DataError, RunError
from gossipfl.registry import Registry
from gossipfl.scenario.config import load_scenario
from gossipfl.scenario.pool import processes
from gossipfl.scenario.records import finished_summary, other_run_in
from gossipfl.scenario.results import NamedObserver, RunFailed
from gossipfl.scenario.runner import run
from gossipfl.scenario.workers import num_cores

Arm = dict[str, Any]
"""The settings of one run, plain values. Where it has a table `data`, its `path` is the data set's name (see `find_data`)."""
Arms = dict[str, Arm]
WATCHED_S = 2.0
"""How often running arms are looked at."""
LAST_BYTES = 2**16
"""Of a record: the lines of many a peer in a round."""
WITHOUT_FILES = ("digits", "synthetic")
"""Kinds of data that need none."""


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

    def __str__(self) -> str:
        return f"accuracy {self.summary['accuracy']['mean']:.3f}, took {self.summary['seconds']['wall']:.0f} s"


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


def run_scenario(name: str, scenario: Arm, folder: Path) -> Outcome:
    """An arm that is a scenario, under virtual time; its record is `folder / name`."""
    try:
        result = run(scenario | {"name": name}, clock="virtual", out=folder / name, force=True, observer=NamedObserver(name))
    except RunFailed as failed:
        raise RunError(f"{name}: {failed}") from failed
    return outcome_of(result.folder, result.summary, _target(scenario))


def finished_scenario(name: str, scenario: Arm, folder: Path) -> Outcome | None:
    """What `run_scenario` has come to before; None if it has not ended well yet. ConfigError if something else is there."""
    loaded = load_scenario(scenario | {"name": name}, ["clock=virtual"])
    if other := other_run_in(folder / name, loaded):
        raise another_run(folder / name, other)
    summary = finished_summary(folder / name, loaded)
    return None if summary is None else outcome_of(folder / name, summary, _target(scenario))


def another_run(place: Path, other: str) -> ConfigError:
    return ConfigError(f"{place} holds a run of {other}; pass --force to begin again, or another --out")


def _target(scenario: Arm) -> float | None:
    target: float | None = scenario.get("stop", {}).get("target_accuracy")
    return target


@dataclass(frozen=True, slots=True)
class Reproduction:
    """`arms(full)` and `tables(outcomes, full)`; `full` is the paper's size, else it ends within a quarter of an hour.

    `run(name, arm, folder)` carries out one arm in a process of its own and returns its outcome, the tables' material: anything
    that is plain data and says in a line (`str`) what it came to. By default an arm is a scenario; a reproduction that trains
    and measures by itself gives a function of its own, of a module (it is named across processes). `finished` takes the same
    and returns the outcome of an earlier `run` of that very arm, by its record in `folder`, or None.
    """

    arms: Callable[[bool], Arms]
    tables: Callable[[Mapping[str, Any], bool], list[Table]]
    run: Callable[[str, Arm, Path], Any] = run_scenario
    finished: Callable[[str, Arm, Path], Any] = finished_scenario

    def find_finished(self, arms: Arms, folder: Path) -> dict[str, Any]:
        """The outcomes, by name, of the arms that have ended well in `folder` before."""
        outcomes = {name: self.finished(name, arm, folder) for name, arm in arms.items()}
        return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


REPRODUCTIONS: Registry[Callable[[], Reproduction]] = Registry("reproduction")


def run_arms(
    arms: Arms,
    folder: Path,
    jobs: int | None = None,
    on_done: Callable[[str, Any], None] = lambda name, outcome: None,
    run: Callable[[str, Arm, Path], Any] = run_scenario,
    finished: Mapping[str, Any] = MappingProxyType({}),
    on_share: Callable[[float | None], None] = lambda share: None,
) -> dict[str, Any]:
    """Run all arms but the `finished` ones, several at once, each in a process of its own, with records under `folder`.

    Outcomes by name, in the order of the arms. `on_share` hears now and then what share of their work has been done; None where
    they do not count it in rounds.
    """
    outcomes = dict(finished)
    waiting = arms.keys() - outcomes.keys()
    workers = min(jobs or num_cores(), max(1, len(waiting)))
    with processes(workers) as pool:
        largest_first = sorted(filter(waiting.__contains__, arms), key=lambda name: -arms[name].get("peers", 0))
        names = {pool.submit(run, name, arms[name], folder): name for name in largest_first}
        began, num_running = time.time(), len(names)
        while num_running:
            if done := pool.next_done(WATCHED_S):
                num_running -= 1
                outcomes[names[done]] = done.result()
                on_done(names[done], done.result())
            if not all("rounds" in arms[name] for name in waiting):
                on_share(None)
                continue
            shares = {name: 1.0 if name in outcomes else _share(arms[name], folder / name, began) for name in waiting}
            on_share(
                sum(_work(arms[name]) * share for name, share in shares.items()) / sum(_work(arms[name]) for name in waiting)
            )
    return {name: outcomes[name] for name in arms}


def _work(arm: Arm) -> int:
    """Local steps of all peers and rounds, as far as the arm tells."""
    steps: int = arm.get("peers", 1) * arm.get("rounds", 1) * arm.get("training", {}).get("local_steps", 1)
    return steps


def _share(arm: Arm, folder: Path, began: float) -> float:
    """How much of its rounds an arm has behind it, by the last lines of a record that was written to since `began`."""
    try:
        with (folder / "events.jsonl").open("rb") as file:
            about = os.fstat(file.fileno())
            file.seek(max(0, about.st_size - LAST_BYTES))
            last = file.read() if about.st_mtime >= began else b""
    except OSError:
        return 0.0
    rounds = re.findall(rb'^{"event": "round", "peer": "[^"]*", "round": (\d+)', last, re.MULTILINE)
    return int(rounds[-1]) / arm["rounds"] if rounds else 0.0


def find_data(arms: Arms, folder: Path) -> tuple[Arms, list[str]]:
    """The arms whose data sets lie in `folder`, with paths to them, and the names of those data sets that do not.

    A data set is the file or folder that has its name, or its name and an ending: `cifar10`, `cifar10-jpg.tar.xz`. DataError
    where there is none for any arm.
    """
    found: Arms = {}
    missing = set()
    for name, arm in arms.items():
        data = arm.get("data", {"kind": WITHOUT_FILES[0]})
        if data["kind"] in WITHOUT_FILES:
            found[name] = arm
            continue
        wanted = data.get("path", data["kind"])
        paths = [path for path in sorted(folder.glob(f"{wanted}*")) if re.fullmatch(r"([-_.].*)?", path.name[len(wanted) :])]
        if paths:
            found[name] = arm | {"data": data | {"path": str(paths[0].resolve())}}
        else:
            missing.add(wanted)
    if not found:
        raise DataError(f"{str(folder)!r} holds no {' nor '.join(sorted(missing))}; name the folder that does with --data")
    return found, sorted(missing)


def outcome_of(folder: Path, summary: dict[str, Any], target: float | None) -> Outcome:
    """Read a run's record. The target is reached when every peer has ended a round whose mean accuracy is at least that."""
    rounds: dict[int, list[dict[str, Any]]] = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "round":
            rounds.setdefault(event["round"], []).append(event)
    sync_s = statistics.median(event["wait_s"] for peers in rounds.values() for event in peers)
    for reached, peers in sorted(rounds.items()):
        known = [event["accuracy_after"] for event in peers if event["accuracy_after"] is not None]
        if target is not None and known and statistics.fmean(known) >= target:
            received = sum(event["payload_bytes"] for number in rounds if number <= reached for event in rounds[number])
            seconds = max(event["time_s"] for event in peers)
            return Outcome(summary, seconds, reached, received / summary["peers"], sync_s)
    return Outcome(summary, None, None, None, sync_s)


# --- cells of tables --------------------------------------------------------------------------------------------------


def to_target(outcome: Outcome) -> dict[str, str]:
    """What one arm took to reach its target."""
    if outcome.seconds_to_target is None:
        return {"seconds": f"target not reached, accuracy {outcome.summary['accuracy']['mean']:.3f}"}
    return {
        "seconds": f"{outcome.seconds_to_target:.2f}",
        "rounds": str(outcome.rounds_to_target),
        "MiB received": f"{(outcome.bytes_to_target or 0) / 2**20:.1f}",
        "sync s": f"{outcome.sync_s:.3f}",
    }


def accuracies(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """What several seeds of one arm came to."""
    summaries = [outcome.summary for outcome in outcomes]
    return {
        "accuracy of the peers": mean_and_spread([summary["accuracy"]["mean"] for summary in summaries], ".3f"),
        "of the worst": mean_and_spread([summary["accuracy"]["min"] for summary in summaries], ".3f"),
        "of their average model": mean_and_spread([summary["accuracy"]["average_model"] for summary in summaries], ".3f"),
        "consensus distance": mean_and_spread([_or_nan(summary["consensus_distance"]["last"]) for summary in summaries], ".2g"),
        "KiB per peer and round": f"{statistics.fmean(s['bytes']['payload_per_peer_round'] for s in summaries) / 1024:.1f}",
    }


def _or_nan(value: float | None) -> float:
    """NaN where it is not known, as of models that have diverged."""
    return math.nan if value is None else value


def mean_and_spread(values: Sequence[float], spec: str) -> str:
    """`0.870 (0.861 to 0.882)`"""
    return f"{statistics.fmean(values):{spec}} ({min(values):{spec}} to {max(values):{spec}})"
