"""Runs of one scenario with every combination of some settings, each in a folder of its own, and one table of them all.

    runs = sweep_runs("quickstart", ["gossip.segments=1,2,4", "gossip.replicas=1,2"], seeds=[0, 1], out=Path("runs/mine"))
    results = run_sweep(runs, Path("runs/mine"), jobs=2, told=lambda run, row: print(row))

    runs/mine/gossip.segments=1,gossip.replicas=1,seed=0/     the record of a run
             /sweep.csv                                       a row per run that has ended, in the order of the combinations

Runs under virtual time go side by side, each in a process; runs on this machine's own clock need its cores, and go one after
another. What has finished stays, so that a sweep that was cut short goes on with `skip_existing`.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gossipfl.errors import ConfigError, GossipflError
from gossipfl.learning.checkpoint import write_atomically, writing
from gossipfl.scenario.config import Scenario, check_names, load_scenario
from gossipfl.scenario.pool import processes
from gossipfl.scenario.records import finished_summary, other_run_in
from gossipfl.scenario.terminal import print_line
from gossipfl.scenario.workers import num_cores

FIGURES = {
    "accuracy_mean": ("accuracy", "mean"),
    "accuracy_min": ("accuracy", "min"),
    "virtual_s": ("virtual_seconds",),
    "wall_s": ("seconds", "wall"),
    "payload_bytes": ("bytes", "payload"),
    "to_target_round": ("to_target", "round"),
    "to_target_s": ("to_target", "seconds"),
    "to_target_bytes": ("to_target", "payload_bytes"),
    "consensus_distance": ("consensus_distance", "last"),
    "models_sha256": ("models_sha256",),
}
"""The columns of sweep.csv after the settings, and where summary.json has them."""
MAX_PROBLEMS = 5

Row = dict[str, Any]
"""One line of sweep.csv."""


@dataclass(frozen=True)
class SweepRun:
    """One combination: its settings as text, by their keys, and where its record goes."""

    settings: dict[str, str]
    scenario: Scenario
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


# ------------------------------------------------------------------------------------------------------------ combinations


def sweep_runs(
    scenario: str | Path,
    params: Sequence[str],
    seeds: Sequence[int] = (),
    out: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[SweepRun]:
    """Every combination of `params` ("key=value,value,...") and `seeds`, the last one fastest; all are loaded and checked.

    ConfigError: a parameter that is none, or, with one line for each problem, combinations that cannot be right.
    """
    values = dict(_parameter(param) for param in params)
    if len(values) < len(params):
        raise ConfigError("--param has a key twice; give all its values at once, such as gossip.segments=1,2,4")
    for whole, part in itertools.permutations(values, 2):
        if part.startswith(f"{whole}."):
            raise ConfigError(f"--param {whole}=... and --param {part}=... set the same twice, and one is lost; remove one")
    if seeds:
        if any(key.partition(".")[0] == "seed" for key in values):
            raise ConfigError("--seeds and --param seed=... exclude each other; remove one")
        values["seed"] = [str(seed) for seed in dict.fromkeys(seeds)]
    if not values:
        raise ConfigError("a sweep needs something to vary; give --param key=value,value or --seeds 0,1,2")
    runs: list[SweepRun] = []
    problems: dict[str, str] = {}
    for combination in itertools.product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        own = [f"{key}={value}" for key, value in settings.items()]
        try:
            loaded = load_scenario(scenario, [*overrides, *own])
            check_names(loaded)
        except ConfigError as error:
            problems.setdefault(str(error), ",".join(own))
            continue
        folder = out or Path("runs") / f"{loaded.name}-sweep"
        runs.append(SweepRun(settings, loaded, folder / re.sub(r"[^\w.=,+:-]+", "_", ",".join(own))))
    if problems:
        lines = [f"{name}: {problem}" for problem, name in problems.items()]
        more = [f"and {len(lines) - MAX_PROBLEMS} more combinations that cannot be right"] if len(lines) > MAX_PROBLEMS else []
        raise ConfigError("\n".join(lines[:MAX_PROBLEMS] + more))
    _check_folders_differ(runs)
    return runs


def parse_seeds(text: str | None) -> list[int]:
    """The seeds in "0,1,2"; none in None."""
    found = [] if text is None else [seed.strip() for seed in text.split(",")]
    if not all(re.fullmatch(r"\d+", seed) for seed in found):
        raise ConfigError(f"--seeds {text!r} must be whole numbers of at least 0, such as 0,1,2")
    return [int(seed) for seed in found]


def _parameter(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    key, found = key.strip(), [value.strip() for value in _split(values)]
    if not equals or not key or not all(found):
        raise ConfigError(f"--param {text!r} must be key=value,value,..., such as gossip.segments=1,2,4")
    return key, list(dict.fromkeys(found))


def _split(text: str) -> Iterator[str]:
    """At the commas, except those within brackets or quotes: `[64, 32]` is one value."""
    piece, depth, quote = "", 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            yield piece
            piece = ""
        else:
            piece += character
    yield piece


def _check_folders_differ(runs: Sequence[SweepRun]) -> None:
    folders: dict[Path, SweepRun] = {}
    for run in runs:
        other = folders.setdefault(run.folder, run)
        if other is not run:
            raise ConfigError(f"{other.settings} and {run.settings} would share the folder {run.folder}; change one of them")


# ----------------------------------------------------------------------------------------------------------------- running


def run_sweep(
    runs: Sequence[SweepRun],
    out: Path,
    *,
    jobs: int | None = None,
    skip_existing: bool = False,
    force: bool = False,
    told: Callable[[SweepRun, Row], None] = lambda run, row: None,
) -> list[Row]:
    """Run them all and return their rows in order; `told` hears of each when it has ended. `jobs`: default one per core.

    A run that fails has an "error" in its row. ConfigError, before anything starts, for folders that are taken.
    """
    rows: dict[str, Row] = {}

    def ended(run: SweepRun, summary: dict[str, Any] | None, error: str = "") -> None:
        rows[run.name] = _row(run, summary, error)
        with writing(out / "sweep.csv"):
            write_atomically(out / "sweep.csv", _csv([rows[other.name] for other in runs if other.name in rows]).encode())
        told(run, rows[run.name])

    finished = {run.name: finished_summary(run.folder, run.scenario) for run in runs} if skip_existing else {}
    waiting = [run for run in runs if finished.get(run.name) is None]
    if not force:
        _check_table(out / "sweep.csv", runs)
    _check_folders(waiting, skip_existing, force)
    _check_writable(out)
    for run in runs:
        if run not in waiting:
            ended(run, finished[run.name])
    virtual = deque(run for run in waiting if run.scenario.resolved_clock == "virtual")
    while virtual:  # again where a process died and took its pool with it
        _run_side_by_side(virtual, min(jobs or num_cores(), len(virtual)), ended)
    for run in waiting:
        if run.scenario.resolved_clock != "virtual":
            ended(run, *_run_one(run.scenario, run.folder))
    return [rows[run.name] for run in runs]


def _check_table(table: Path, runs: Sequence[SweepRun]) -> None:
    """ConfigError where there is the table of another sweep, whose rows would be lost."""
    if not table.is_file():
        return
    with table.open(newline="", encoding="utf-8", errors="replace") as file:
        others = [row.get("run") for row in csv.DictReader(file) if row.get("run") not in {run.name for run in runs}]
    if others:
        raise ConfigError(
            f"{table} has runs that are none of this sweep, such as {others[0]}; pass --force to replace it, another --out, "
            "or --skip-existing with the values of both"
        )


def _check_folders(runs: Sequence[SweepRun], skip_existing: bool, force: bool) -> None:
    for run in runs:
        other = other_run_in(run.folder, run.scenario)
        taken = other is not None if skip_existing else run.folder.exists()
        if taken and not force:
            remedy = "--force to replace it" if skip_existing else "--skip-existing to go on, --force to replace what is there"
            what = f"holds a run of {other}" if other else "exists"
            raise ConfigError(f"{run.folder} {what}; pass {remedy}, or another --out")


def _check_writable(out: Path) -> None:
    """ConfigError, before anything runs, where the table cannot be kept."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written to: {error.strerror}; choose another folder") from error


def _run_side_by_side(waiting: deque[SweepRun], jobs: int, ended: Callable[..., None]) -> None:
    """Take runs from `waiting`, `jobs` at a time, until none is left or a process dies. On Ctrl-C end the processes at once."""
    running: dict[Future[Any], SweepRun] = {}
    with processes(jobs) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running[pool.submit(_run_one, waiting[0].scenario, waiting[0].folder)] = waiting[0]
                    waiting.popleft()
                future = pool.next_done()
                assert future is not None
                ended(running[future], *future.result())
                del running[future]
        except BrokenProcessPool:
            reason = "a process of the sweep died, perhaps for want of memory; go on with --skip-existing and fewer --jobs"
            for run in running.values():
                ended(run, None, reason)


def _run_one(scenario: Scenario, folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The summary of one run, and what went wrong with it."""
    from gossipfl.scenario.results import NamedObserver, RunFailed
    from gossipfl.scenario.runner import run  # torch, which the parent of virtual runs needs not

    try:
        return run(scenario, out=folder, force=True, observer=NamedObserver(folder.name)).summary, ""
    except RunFailed as failed:
        summary = failed.result.summary
        return summary, f"{len(summary['faults']['dead_peers'])} of {summary['peers']} peers did not finish"
    except GossipflError as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


# ------------------------------------------------------------------------------------------------------------------ tables


def _row(run: SweepRun, summary: dict[str, Any] | None, error: str) -> Row:
    row: Row = {"run": run.name, **run.settings}
    row.setdefault("seed", run.scenario.resolved()["seed"])
    for column, keys in FIGURES.items():
        value: Any = summary
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        row[column] = value
    return row | {"error": error}


def _csv(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def print_sweep(console: Console, rows: Sequence[Row], settings: Sequence[str]) -> None:
    """The rows as a table; `settings` are the keys that vary. Where it is too wide the last figures are left out."""
    titles = ["accuracy", "worst", "virtual s" if _are_virtual(rows) <= {True} else "seconds", "MiB", "consensus"]
    boundless = console.options.update(width=1_000)
    table = _table(rows, settings, titles)
    while len(titles) > 1 and console.measure(table, options=boundless).minimum > console.width:
        table = _table(rows, settings, titles := titles[:-1])
    console.print(table)


def _are_virtual(rows: Sequence[Row]) -> set[bool]:
    """Whether the seconds of those that have run are virtual ones; a sweep may have both."""
    return {row["virtual_s"] is not None for row in rows if row["wall_s"] is not None}


def _table(rows: Sequence[Row], settings: Sequence[str], titles: Sequence[str]) -> Table:
    table, clocks_differ = Table(), len(_are_virtual(rows)) > 1
    lasts = [key.rpartition(".")[2] for key in settings]
    for key, last in zip(settings, lasts, strict=True):
        table.add_column(last if lasts.count(last) == 1 else key, justify="right", overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    if any(row["error"] for row in rows):
        table.add_column("", no_wrap=True)
    for row in rows:
        seconds = row["wall_s"] if row["virtual_s"] is None else row["virtual_s"]
        mib = None if row["payload_bytes"] is None else row["payload_bytes"] / 2**20
        figures = [row["accuracy_mean"], row["accuracy_min"], seconds, mib, row["consensus_distance"]][: len(titles)]
        cells = ["" if figure is None else f"{figure:.4g}" for figure in figures]
        if clocks_differ and row["virtual_s"] is not None and len(cells) > 2:
            cells[2] += " virtual"
        table.add_row(*(row[key] for key in settings), *cells, *(["failed"] if row["error"] else []))
    return table


class SweepDisplay:
    """Progress: a bar on a terminal, and a line for each run that has ended."""

    def __init__(self, console: Console, num_runs: int, quiet: bool = False) -> None:
        self._console, self._num_runs, self._quiet = console, num_runs, quiet
        self._num_ended = self._num_done = 0
        columns = TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self._task = self._progress.add_task("runs", total=num_runs)

    def __enter__(self) -> SweepDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def interrupted(self) -> None:
        """Ctrl-C, in the middle of it."""
        done = f"{self._num_done} of {self._num_runs} runs {'is' if self._num_done == 1 else 'are'} done"
        text = f"interrupted: {done}; the same command with --skip-existing goes on from there"
        print_line(self._console, text)

    def told(self, run: SweepRun, row: Row) -> None:
        """A run has ended."""
        self._num_ended += 1
        self._num_done += not row["error"]
        self._progress.update(self._task, completed=self._num_ended)
        if not self._quiet:
            mean = row["accuracy_mean"]
            outcome = f"failed: {row['error']}" if row["error"] else "done" if mean is None else f"accuracy {mean:.3f}"
            line = f"{self._num_ended}/{self._num_runs}  {run.name}  {outcome}"
            print_line(self._console, line)
