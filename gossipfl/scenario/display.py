"""What the command line shows: progress while a run goes, and a table at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from gossipfl.scenario.config import Scenario
from gossipfl.scenario.records import Event
from gossipfl.scenario.results import Observer, RunResult
from gossipfl.scenario.terminal import counted, print_figures, print_line, size_text

if TYPE_CHECKING:
    from gossipfl.scenario.reproduce.figures import Table as Comparison

MAX_ROWS = 32
MAX_NAMED = 10
BAR_WIDTH = 6
"""So that a line fits 80 columns."""
LINE_S, ARMS_LINE_S = 2.0, 60.0
"""Where there is no terminal, seconds between two lines of progress of a run, and of a comparison."""


_PLANNED = {"kill": "is killed", "rejoin": "comes back", "join": "joins"}


class Display(Observer):
    """Draws to `console` (stderr): a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._rounds = 0
        self._peers = 0
        self._counts: dict[int, list[Event]] = {}
        self._bytes = 0
        self._shown_at = self._started_at = 0.0
        self._shown_accuracy = "accuracy", "not evaluated yet"

    def data_ready(self, scenario: Scenario, table: np.ndarray | None) -> None:
        self._rounds, self._peers = scenario.rounds, scenario.peers
        if table is None:
            return
        drawn, of = _samples(scenario, table, is_whole=True), " of each class"
        if self._console.measure(drawn, options=self._console.options.update(width=1_000)).maximum > self._console.width:
            drawn, of = _samples(scenario, table, is_whole=False), ""  # cut columns would show nothing
        title = f"{scenario.data.kind}: training samples{of} ({_partition(scenario)})"
        self._console.print(title, style="italic", highlight=False)
        self._console.print(drawn)

    def started(self, folder: Path, parameters: int) -> None:
        self._started_at = time.monotonic()
        self._console.print(
            f"{counted(self._peers, 'peer')}, {counted(parameters, 'parameter')}, writing to {folder}",
            highlight=False,
            soft_wrap=True,
        )
        if self._console.is_terminal:
            of_round = Column(no_wrap=True, min_width=len(f"round {self._rounds}/{self._rounds}"))  # is not cut, if anything is
            told = TextColumn("{task.description}", table_column=of_round)
            columns = told, BarColumn(BAR_WIDTH), TextColumn("{task.fields[figures]}")
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._progress.add_task(f"round 0/{self._rounds}", total=self._rounds * self._peers, figures="")

    def event(self, event: Event, alive: int) -> None:
        if event["event"] == "finished" and event["error"] is not None:
            self.note(f"{event['peer']} did not finish: {event['error'].removeprefix(event['peer'] + ': ')}")
        if event["event"] == "planned" and event["change"] in _PLANNED:
            self.note(f"{event['peer']} {_PLANNED[event['change']]} as planned, at {event['time_s']:.3g} s")
        if event["event"] != "round":
            return
        self._counts.setdefault(event["round"], []).append(event)
        self._bytes += event["payload_bytes"]
        reported = self._counts[event["round"]]
        if self._progress is not None:
            done = sum(len(events) for events in self._counts.values())
            self._progress.update(
                self._progress.task_ids[0],
                completed=done,
                description=f"round {event['round']}/{self._rounds}",
                figures=f"{self._accuracy(reported)[0]}  {self._pace(event['round'])}"
                + ("" if alive == self._peers else f"  peers {alive}/{self._peers}"),
            )
        elif len(reported) >= alive and (time.monotonic() - self._shown_at > LINE_S or event["round"] == self._rounds):
            self._shown_at = time.monotonic()
            figures = (
                f"{' '.join(self._accuracy(reported))}  pulled {size_text(self._bytes)}  peers alive {alive}/{self._peers}"
            )
            text = f"round {event['round']:4d}/{self._rounds}  {figures}  {self._pace(event['round'])}"
            self._console.print(text, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.note(text)

    def ended(self, result: RunResult) -> None:
        self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _accuracy(self, reported: list[Event]) -> tuple[str, str]:
        """The mean and the worst of those that have reported this round, or of the last one evaluated."""
        accuracies = [event["accuracy_after"] for event in reported if event["accuracy_after"] is not None]
        if accuracies:
            self._shown_accuracy = f"accuracy {np.mean(accuracies):.3f}", f"(worst {min(accuracies):.3f})"
        return self._shown_accuracy

    def _pace(self, round_: int) -> str:
        """How fast rounds go, and when that will have been all."""
        per_second = round_ / max(time.monotonic() - self._started_at, 1e-3)
        left = timedelta(seconds=round((self._rounds - round_) / per_second))
        return f"{per_second:.3g} rounds/s  {left} left"


def print_summary(console: Console, result: RunResult) -> None:
    """The summary as a table, and where the models are."""
    summary = result.summary
    accuracy, faults = summary["accuracy"], summary["faults"]
    rows = [
        ("test accuracy, mean of peers", _percent(accuracy["mean"])),
        ("  worst peer", _percent(accuracy["min"])),
        ("  best peer", _percent(accuracy["max"])),
        ("  before the last merge", _percent(accuracy["before_merge_mean"])),
        ("  average model", _percent(accuracy["average_model"])),
        ("  central training", _percent(accuracy["central"])),
        *_target(summary),
        ("consensus distance, first to last", _distances(summary["consensus_distance"])),
        ("payload per peer and round", size_text(summary["bytes"]["payload_per_peer_round"])),
        ("payload, all", size_text(summary["bytes"]["payload"])),
        ("on the wire, all rounds", size_text(summary["bytes"]["wire"])),
        *_times(summary["seconds"]),
        (
            "missing, late, refused, rejected",
            f"{faults['missing_segments']}, {faults['late']}, {faults['refused']}, {faults['rejected']}",
        ),
        ("peers that did not finish", _dead_peers(faults)),
    ]
    title = f"{summary['scenario']}: {counted(summary['peers'], 'peer')}, {counted(summary['rounds'], 'round')}"
    print_figures(console, title, [(name, value) for name, value in rows if value is not None])
    console.print(f"record  {result.folder}/", highlight=False, soft_wrap=True)
    if models := {path.stem for path in (result.folder / "models").glob("*.safetensors")}:
        which = "average.safetensors and one per peer" if len(models) > 1 else f"{models.pop()}.safetensors"
        console.print(f"models  {result.folder}/models/  ({which})", highlight=False, soft_wrap=True)


class ArmsProgress:
    """How many of the arms of a comparison have run, and which came last."""

    def __init__(self, console: Console, num_arms: int, jobs: int, folder: Path, num_found: int = 0) -> None:
        self._console, self._num_arms, self._jobs, self._folder = console, num_arms, jobs, folder
        self._num_done = self._num_found = num_found
        self._began = self._shown_at = time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}")
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> ArmsProgress:
        print_line(self._console, f"{self._num_arms} arms, {self._jobs} at once, records in {self._folder}/")
        if self._num_found:
            print_line(self._console, f"{self._num_found} of {self._num_arms} arms found finished there; --force begins again")
        self._progress.start()
        self._progress.add_task(f"{self._num_done}/{self._num_arms} arms", total=1.0, left="")
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def interrupted(self) -> None:
        """Ctrl-C, in the middle of it."""
        done = f"{self._num_done} of {self._num_arms} arms {'is' if self._num_done == 1 else 'are'} done"
        print_line(self._console, f"interrupted: {done}, with records in {self._folder}/; the same command goes on from there")

    def done(self, name: str, outcome: object) -> None:
        self._num_done += 1
        self._progress.update(self._progress.task_ids[0], description=f"{self._num_done}/{self._num_arms} arms, last {name}")
        if not self._console.is_terminal:
            print_line(self._console, f"{self._num_done:3d}/{self._num_arms}  {name}: {outcome}")

    def share(self, share: float | None) -> None:
        """How much of the work is done, but for arms found finished. Less is left where targets are reached early.

        None: nobody knows but by the arms that are done, of which one may take longer than all others.
        """
        now = time.monotonic()
        so_far = timedelta(seconds=round(now - self._began))
        left = f"at most {timedelta(seconds=round((now - self._began) * (1 - share) / share))} left" if share else ""
        done = f"after {so_far}" if share is None else f"{share:.2%} of the work is done  {left}"
        completed = self._num_done / self._num_arms if share is None else share
        self._progress.update(self._progress.task_ids[0], completed=completed, left=left)
        if not self._console.is_terminal and now - self._shown_at > ARMS_LINE_S and completed < 1:
            self._shown_at = now
            print_line(self._console, f"{self._num_done:3d}/{self._num_arms}  {done}".rstrip())


def print_tables(console: Console, tables: Sequence[Comparison]) -> None:
    """The tables of a comparison, each with its notes; a verdict where something was published."""
    for comparison in tables:
        columns = list(dict.fromkeys(key for row in comparison.rows for key in row.values))
        has_verdict = any(row.published is not None for row in comparison.rows)
        console.print(comparison.title, style="bold", highlight=False)
        table = Table()
        table.add_column("", no_wrap=True)
        for column in [*columns, *(["verdict"] if has_verdict else [])]:
            table.add_column(column, justify="right")
        for row in comparison.rows:
            table.add_row(row.name, *(row.values.get(key, "") for key in columns), *([row.verdict] if has_verdict else []))
        console.print(table)
        for note in comparison.notes:
            console.print(f"  {note}", highlight=False, style="dim")
        console.print()


def _samples(scenario: Scenario, table: np.ndarray, is_whole: bool) -> Table:
    """Who has how many training samples; of each class too if it is to be whole, which takes a wider terminal."""
    drawn = Table()
    drawn.add_column("peer")
    for class_ in range(table.shape[1] if is_whole else 0):
        drawn.add_column(str(class_), justify="right")
    drawn.add_column("all", justify="right", style="bold")
    for name, row in list(zip(scenario.peer_names, table, strict=True))[:MAX_ROWS]:
        drawn.add_row(name, *(str(count) if count else "." for count in row if is_whole), str(row.sum()))
    if len(table) > MAX_ROWS:
        drawn.caption = f"and {counted(len(table) - MAX_ROWS, 'more peer')}"
    return drawn


def _partition(scenario: Scenario) -> str:
    args = ", ".join(f"{key} {value}" for key, value in scenario.data.partition.args.items())
    return f"{scenario.data.partition.kind}{', ' if args else ''}{args}"


def _target(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What it took to `stop.target_accuracy`."""
    if (target := summary["to_target"]) is not None:
        unit = "s" if summary["seconds"]["virtual"] is None else "virtual s"
        reached = f"after round {target['round']:,}, {target['seconds']:,.2f} {unit}" if target["round"] else "not reached"
        yield f"  target of {target['accuracy']:g}", reached


def _times(seconds: dict[str, Any]) -> Iterator[tuple[str, str]]:
    startup_wall, virtual = f"{seconds['startup']:.1f} / {seconds['wall']:.1f}", seconds["virtual"]
    if virtual is None:
        yield "seconds to start / to run", startup_wall
        return
    a_round = "" if virtual["round_mean"] is None else f" / {virtual['round_mean']:,.4g}"
    yield "virtual seconds to run / a round", f"{virtual['run']:,.2f}{a_round}"
    yield "real seconds to start / to run", startup_wall


def _dead_peers(faults: dict[str, Any]) -> str:
    dead = faults["dead_peers"]
    names = [f"{peer} (as planned)" if peer in faults["dead_as_planned"] else peer for peer in dead[:MAX_NAMED]]
    more = [f"and {len(dead) - MAX_NAMED:,} more"] if len(dead) > MAX_NAMED else []
    return ", ".join(names + more) or "none"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _distances(distances: dict[str, float | None]) -> str | None:
    first, last = distances["first"], distances["last"]
    return None if first is None or last is None else f"{first:.4g} to {last:.4g}"
