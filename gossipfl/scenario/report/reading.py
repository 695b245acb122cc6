"""Reads the folder of a run back in, as columns of numbers: a simulated run may have a million events.

What is not there is NaN or empty, never an error: a record that was cut short is reported as far as it goes.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.scenario.interrupts import EXIT_INTERRUPTED

Event = dict[str, Any]
Columns = dict[str, np.ndarray]
"""Equally long f64 columns by name; NaN where an event does not say."""

MAX_IN_TITLE = 3
"""Runs that are named in the title; more are counted."""
COUNTERS = ("missing", "late", "refused", "rejected", "timeouts")
ROUND_FIELDS = (
    *("round", "time_s", "train_loss", "accuracy_before", "accuracy_after", "train_s", "wait_s", "merge_s"),
    *("payload_bytes", "wire_bytes", "segments_mixed", "staleness_mean", "staleness_max", *COUNTERS),
)
STATE_FIELDS = ("round", "time_s", "consensus_distance", "average_accuracy")


@dataclass(slots=True)
class Faults:
    """All faults of one kind that concern one peer."""

    kind: str
    peer: str
    count: int = 0
    seen_by: set[str] = field(default_factory=set)
    rounds: set[int] = field(default_factory=set)
    detail: str = ""
    """Of the first of them."""


@dataclass(slots=True)
class Planned:
    """All changes of one kind that the scenario planned for one peer: it comes or goes."""

    change: str
    peer: str
    times_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """The record of one run."""

    name: str
    """The folder's name, a sweep's in short; its path where runs that are compared share the name."""
    folder: Path
    summary: dict[str, Any]
    """summary.json; empty where the run was cut short."""
    scenario: dict[str, Any]
    scenario_text: str
    peers: list[str]
    rounds: Columns
    """A row per peer and round; `peer` is the index in `peers`."""
    states: Columns
    """A row per round of the whole run, where the record has them."""
    faults: list[Faults]
    planned: list[Planned]
    finished: dict[str, str | None]
    """The peers that ended, with the error of those that did not finish; who was killed is not among them."""
    staleness: dict[tuple[int, int], tuple[float, int]]
    """By (segment, round): the sum over the peers that mixed a stale copy in the round, each one's mean over its copies of
    the segment, and how many such peers mixed the segment."""
    received_from: dict[tuple[str, str], float]
    """Payload bytes by (receiver, sender), where the record says."""
    notes: list[str]
    """What a reader should know of the record itself."""

    @property
    def is_virtual(self) -> bool:
        if "clock" in self.summary:
            return bool(self.summary["clock"] == "virtual")
        return self.scenario.get("clock") == "virtual" or len(self.states["round"]) > 0  # on sockets nobody knows all models

    @property
    def time_unit(self) -> str:
        return "virtual seconds" if self.is_virtual else "seconds"

    def figure(self, *keys: str) -> Any:
        """A value of the summary, `figure("accuracy", "mean")`; None where there is none."""
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def was_interrupted(self) -> bool:
        return bool(self.summary.get("exit_code") == EXIT_INTERRUPTED)

    @property
    def dead(self) -> list[str]:
        """The peers that did not finish, by the summary, or as far as the events say."""
        return self.peers_told("dead_peers") or [peer for peer, error in self.finished.items() if error is not None]

    def peers_told(self, key: str) -> list[str]:
        """A list of peers among the summary's faults; empty where there is none."""
        told = self.figure("faults", key)
        return [str(name) for name in told] if isinstance(told, list) else []

    def last_accuracy(self) -> np.ndarray:
        """f64[peers]: the last known accuracy of each peer after a merge, NaN where there is none."""
        last = np.full(len(self.peers), np.nan)
        known = ~np.isnan(self.rounds["accuracy_after"])
        last[self.rounds["peer"][known].astype(int)] = self.rounds["accuracy_after"][known]  # the last one stays
        return last


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders; that of a sweep stands for those within it. ConfigError where there is none."""
    folders = [run for folder in folders for run in run_folders(folder)]
    names = [short_name(folder.resolve().name) for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder)) for folder, name in zip(folders, names, strict=True)
    ]


def short_name(folder: str) -> str:
    """Of a sweep's run: gossip.segments=1,gossip.replicas=2 -> segments=1 replicas=2. Another name stays as it is."""
    settings = [setting.partition("=") for setting in re.split(r",(?=[\w.]+=)", folder)]
    if not all(key and equals for key, equals, _ in settings):
        return folder
    lasts = [key.rpartition(".")[2] for key, _, _ in settings]
    keys = [last if lasts.count(last) == 1 else key for last, (key, _, _) in zip(lasts, settings, strict=True)]
    return " ".join(f"{key}={value}" for key, (_, _, value) in zip(keys, settings, strict=True))


def title(runs: Sequence[Run]) -> str:
    """What the report of these runs is called."""
    if len(runs) <= MAX_IN_TITLE:
        return ", ".join(run.name for run in runs)
    parents = {run.folder.resolve().parent for run in runs}
    where = f"{parents.pop().name}: " if len(parents) == 1 else ""
    return f"{where}{len(runs)} runs"


def run_folders(folder: Path) -> list[Path]:
    """The folder itself, or those within it that hold a run where only they do: of a sweep, of a reproduction."""
    within = [] if _holds_run(folder) else [path for path in folder.glob("*/") if _holds_run(path)]
    return sorted(within, key=lambda path: natural_order(path.name)) or [folder]


def _holds_run(folder: Path) -> bool:
    return (folder / "events.jsonl").is_file()


def read_run(folder: Path, name: str) -> Run:
    """The run in `folder`, called `name` in the report. ConfigError if there is none."""
    if not _holds_run(folder):
        what = "holds no run (it has no events.jsonl)" if folder.is_dir() else "is not a folder"
        raise ConfigError(f"{folder} {what}; give the folder that `gossipfl run` wrote, such as runs/quickstart")
    notes: list[str] = []
    text = _text(folder / "scenario.toml")
    summary = _summary(folder / "summary.json", notes)
    scenario = _scenario(text, notes)
    reader = _Reader()
    for event in _events(folder / "events.jsonl", notes):
        reader.add(event)
    peers, rounds = _sorted_peers(list(reader.peers), reader.rounds)
    notes += [*_ending(summary), *reader.warnings]
    if not len(rounds["round"]):
        notes.append("No peer has reported a round.")
    return Run(
        name=name,
        folder=folder,
        summary=summary,
        scenario=scenario,
        scenario_text=text,
        peers=peers,
        rounds=rounds,
        states={key: np.array(column) for key, column in reader.states.items()},
        faults=sorted(reader.faults.values(), key=lambda faults: -faults.count),
        planned=list(reader.planned.values()),
        finished=reader.finished,
        staleness=reader.staleness,
        received_from=dict(reader.received_from),
        notes=notes,
    )


class _Reader:
    """Takes events in, one by one."""

    def __init__(self) -> None:
        self.peers: dict[str, int] = {}
        self.rounds = {key: array("d") for key in ("peer", *ROUND_FIELDS)}
        self.states = {key: array("d") for key in STATE_FIELDS}
        self.faults: dict[tuple[str, str], Faults] = {}
        self.planned: dict[tuple[str, str], Planned] = {}
        self.finished: dict[str, str | None] = {}
        self.warnings: dict[str, None] = {}
        self.staleness: dict[tuple[int, int], tuple[float, int]] = {}
        self.received_from: defaultdict[tuple[str, str], float] = defaultdict(float)

    def add(self, event: Event) -> None:
        match event.get("event"):
            case "round":
                self.rounds["peer"].append(self._index(str(event.get("peer"))))
                for key in ROUND_FIELDS:
                    self.rounds[key].append(number(event.get(key)))
                self._add_received(event)
                self._add_staleness(event)
            case "state":
                for key in STATE_FIELDS:
                    self.states[key].append(number(event.get(key)))
            case "fault":
                self._add_fault(event)
            case "planned":
                change, peer = str(event.get("change")), str(event.get("peer"))
                planned = self.planned.setdefault((change, peer), Planned(change, peer))
                planned.times_s.append(number(event.get("time_s")))
            case "finished":
                peer, error = str(event.get("peer")), event.get("error")
                self._index(peer)
                self.finished[peer] = None if error is None else str(error)
                self._add_received(event)
            case "unfinished":
                self._add_received(event)
            case "warning":
                self.warnings[f"Warning: {event.get('detail')}"] = None

    def _add_received(self, event: Event) -> None:
        """What came in since the peer's last event; older records have it all in the last one."""
        peer, senders = str(event.get("peer")), event.get("received_from")
        for sender, num_bytes in senders.items() if isinstance(senders, Mapping) else ():
            self.received_from[peer, str(sender)] += np.fmax(number(num_bytes), 0.0)

    def _add_staleness(self, event: Event) -> None:
        round_, means = number(event.get("round")), event.get("staleness_by_segment")
        if math.isnan(round_) or not isinstance(means, list):
            return
        for segment, mean in enumerate(map(number, means)):
            if not math.isnan(mean):
                total, num_peers = self.staleness.get((segment, int(round_)), (0.0, 0))
                self.staleness[segment, int(round_)] = total + mean, num_peers + 1

    def _add_fault(self, event: Event) -> None:
        kind, peer = str(event.get("kind")), str(event.get("peer"))
        faults = self.faults.setdefault((kind, peer), Faults(kind, peer, detail=str(event.get("detail") or "")))
        faults.count += 1
        faults.seen_by.add(str(event.get("at")))
        round_ = number(event.get("round"))
        if not math.isnan(round_):
            faults.rounds.add(int(round_))

    def _index(self, peer: str) -> int:
        return self.peers.setdefault(peer, len(self.peers))


def number(value: Any) -> float:
    """A finite number as it is; NaN for all else."""
    try:
        as_float = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
    return as_float if math.isfinite(as_float) else math.nan


def natural_order(name: str) -> tuple[Any, ...]:
    """A sort key that puts p2 before p10."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.findall(r"[0-9]{1,18}|[^0-9]+", name))


def _sorted_peers(found: list[str], columns: Mapping[str, array[float]]) -> tuple[list[str], Columns]:
    """The peers in natural order, and the columns with `peer` made to fit."""
    peers = sorted(found, key=natural_order)
    place = {peer: index for index, peer in enumerate(peers)}
    rounds = {key: np.array(column) for key, column in columns.items()}
    known = ~np.isnan(rounds["round"])
    rounds = {key: column[known] for key, column in rounds.items()}
    rounds["peer"] = np.array([place[peer] for peer in found], dtype=float)[rounds["peer"].astype(int)]
    return peers, rounds


def _events(path: Path, notes: list[str]) -> Iterator[Event]:
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):  # the last line of a run that was killed
                event = None
            if isinstance(event, dict):
                yield event
            else:
                broken += bool(line.strip())
    if broken:
        notes.append(
            f"events.jsonl: {broken} line{'s' * (broken > 1)} could not be read and {'are' * (broken > 1) or 'is'} left out."
        )


def _summary(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_bytes())
    except FileNotFoundError:
        notes.append(
            "The record has no summary.json: the run goes on or was cut short, or this is what one peer by hand wrote, which "
            "`gossipfl collect` gathers. What follows is made from the events that there are."
        )
    except (ValueError, RecursionError):
        notes.append("summary.json cannot be read. What follows is made from the events.")
    else:
        if isinstance(summary, dict):
            return summary
        notes.append("summary.json is no summary. What follows is made from the events.")
    return {}


def _ending(summary: Mapping[str, Any]) -> list[str]:
    """What a run that did not end well came to."""
    match summary.get("exit_code"):
        case 1:
            return ["The run failed: fewer peers finished than min_peers asks for."]
        case code if code == EXIT_INTERRUPTED:
            return ["The run was interrupted. What follows is made from what there is of it."]
    return []


def _scenario(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        notes.append("scenario.toml cannot be read.")
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
