"""The tables of a report: figures of one run, figures of several beside each other, what differs between them, faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossipfl.scenario.report.reading import COUNTERS, Faults, Run, number

MAX_NAMED = 10
"""Peers of a kind of device; of more their number is told, and summary.json has their names."""
MAX_FAULTS = 200
"""Rows of the table of faults; the CSV file has them all."""


@dataclass(frozen=True)
class Figure:
    """One figure of a run: its name, its value (NaN where unknown) and how it is written.

    `is_emulated`: of the scenario's own clock, so that virtual seconds stand beside real ones and say which they are.
    """

    name: str
    of: Callable[[Run], float]
    write: Callable[[float], str]
    is_emulated: bool = False

    def text(self, run: Run) -> str:
        return self.write(self.of(run)) + " virtual" * (self.is_emulated and run.is_virtual)


@dataclass(frozen=True)
class Cell:
    """A value as text, and its ratio to the same of the first run, "" where that says nothing."""

    text: str
    ratio: str = ""


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def size(num_bytes: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def seconds(value: float) -> str:
    return f"{value:,.4g} s" if value < 10_000 else f"{value:,.0f} s"


def _known(*keys: str, otherwise: Callable[[Run], float] = lambda run: np.nan) -> Callable[[Run], float]:
    """The figure of the summary, or what the events make of it."""

    def value(run: Run) -> float:
        told = number(run.figure(*keys))
        return otherwise(run) if np.isnan(told) else told

    return value


def _over_peers(reduce: Callable[[np.ndarray], Any]) -> Callable[[Run], float]:
    def value(run: Run) -> float:
        accuracies = run.last_accuracy()
        known = accuracies[np.isfinite(accuracies)]
        return float(reduce(known)) if len(known) else np.nan

    return value


def _over_rounds(key: str, reduce: Callable[[np.ndarray], Any] = np.nansum) -> Callable[[Run], float]:
    return lambda run: float(reduce(run.rounds[key])) if np.isfinite(run.rounds[key]).any() else np.nan


def _run_s(run: Run) -> float:
    """On the clock of the scenario."""
    keys = ("virtual_seconds",) if run.is_virtual else ("seconds", "wall")
    return _known(*keys, otherwise=_over_rounds("time_s", np.nanmax))(run)


def _target(was_reached: bool) -> Callable[[Run], float]:
    def value(run: Run) -> float:
        is_reached = np.isfinite(number(run.figure("to_target", "round")))
        return number(run.figure("to_target", "accuracy")) if is_reached == was_reached else np.nan

    return value


def _simulation_s(run: Run) -> float:
    return number(run.figure("seconds", "wall")) if run.is_virtual else np.nan


def _payload_per_peer_round(run: Run) -> float:
    return _over_rounds("payload_bytes", np.nanmean)(run)


FIGURES = (
    Figure("accuracy, mean of the peers", _known("accuracy", "mean", otherwise=_over_peers(np.mean)), percent),
    Figure("accuracy, worst peer", _known("accuracy", "min", otherwise=_over_peers(np.min)), percent),
    Figure("accuracy, best peer", _known("accuracy", "max", otherwise=_over_peers(np.max)), percent),
    Figure("accuracy before the last merge", _known("accuracy", "before_merge_mean"), percent),
    Figure("accuracy of the average model", _known("accuracy", "average_model"), percent),
    Figure("accuracy of central training", _known("accuracy", "central"), percent),
    Figure("time to run", _run_s, seconds, is_emulated=True),
    Figure("target accuracy, reached", _target(was_reached=True), percent),
    Figure("target accuracy, not reached", _target(was_reached=False), percent),
    Figure("round of the target", _known("to_target", "round"), lambda value: f"{value:,.0f}"),
    Figure("time to the target", _known("to_target", "seconds"), seconds, is_emulated=True),
    Figure("payload to the target, all", _known("to_target", "payload_bytes"), size),
    Figure("training, all peers", _known("seconds", "train", otherwise=_over_rounds("train_s")), seconds, is_emulated=True),
    Figure("waiting, all peers", _known("seconds", "wait", otherwise=_over_rounds("wait_s")), seconds, is_emulated=True),
    Figure("consensus distance, last", _known("consensus_distance", "last"), lambda value: f"{value:.4g}"),
    Figure(
        "payload, peer and round",
        _known("bytes", "payload_per_peer_round", otherwise=_payload_per_peer_round),
        size,
    ),
    Figure("payload, all", _known("bytes", "payload", otherwise=_over_rounds("payload_bytes")), size),
    Figure("on the wire, all rounds", _known("bytes", "wire", otherwise=_over_rounds("wire_bytes")), size),
    Figure("time to start", _known("seconds", "startup"), seconds),
    Figure("time to simulate", _simulation_s, seconds),
    Figure("memory at the peak", _known("memory_mib", "peak_total"), lambda value: size(value * 2**20)),
    Figure("peers", lambda run: float(number(run.figure("peers")) or len(run.peers)), lambda value: f"{value:,.0f}"),
    Figure("peers that did not finish", lambda run: len(run.dead) if run.summary else np.nan, lambda value: f"{value:,.0f}"),
    Figure("rounds", _known("rounds", otherwise=_over_rounds("round", np.nanmax)), lambda value: f"{value:,.0f}"),
    Figure("parameters", _known("parameters"), lambda value: f"{value:,.0f}"),
)


def figures(run: Run) -> list[tuple[str, str]]:
    """Name and value of all that is known of one run."""
    return [(figure.name, figure.text(run)) for figure in FIGURES if np.isfinite(figure.of(run))]


def origin(run: Run) -> list[tuple[str, str]]:
    """What a result must name to be found again: seed, scenario, engine, version, machine."""
    seed = run.figure("seed") if run.figure("seed") is not None else run.scenario.get("seed")
    engine = run.figure("engine") or run.scenario.get("engine")
    told = [
        ("folder", str(run.folder)),
        ("scenario", run.figure("scenario") or run.scenario.get("name")),
        ("seed", _flat(seed) if isinstance(seed, Mapping) else seed),
        ("scenario SHA-256", run.figure("scenario_sha256")),
        ("models SHA-256", run.figure("models_sha256")),
        ("devices", _devices(run.figure("devices"))),
        ("engine", _flat(engine) if isinstance(engine, Mapping) else engine),
        ("version", run.figure("version")),
        ("machine", run.figure("machine")),
        ("exit code", run.figure("exit_code")),
    ]
    return [(name, str(value)) for name, value in told if value is not None]


def _devices(told: Any) -> str | None:
    """Who has which; None where all are alike."""
    match told:
        case {"classes": {**classes}, "stragglers": stragglers}:
            kinds = {**classes, "stragglers": stragglers}
        case _:
            return None
    who = {kind: list(map(str, peers)) for kind, peers in kinds.items() if isinstance(peers, list) and peers}
    named = (
        f"{kind} {', '.join(peers) if len(peers) <= MAX_NAMED else f'{len(peers):,} peers'}" for kind, peers in who.items()
    )
    return "; ".join(named) or None


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def compared(runs: Sequence[Run]) -> list[tuple[str, list[Cell]]]:
    """A row per figure, a cell per run."""
    rows = []
    for figure in FIGURES:
        values = [figure.of(run) for run in runs]
        if np.isfinite(values).any():
            cells = [
                Cell(figure.text(run), _ratio(value, values[0])) if np.isfinite(value) else Cell("–")
                for run, value in zip(runs, values, strict=True)
            ]
            rows.append((figure.name, [Cell(cells[0].text), *cells[1:]]))
    return rows


def _ratio(value: float, first: float) -> str:
    return f"× {value / first:.3g}" if np.isfinite(first) and first != 0 else ""


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which the scenarios are not all equal."""
    settings = [_dotted(run.scenario) for run in runs]
    keys = dict.fromkeys(key for values in settings for key in values)
    rows = [(key, [str(values.get(key, "–")) for values in settings]) for key in keys]
    return [(key, texts) for key, texts in rows if len(set(texts)) > 1 and key != "name"]


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


FAULT_COLUMNS = ("what", "who", "seen by", "rounds", "times", "the first says")


def faults(run: Run) -> list[tuple[str, str, str, str, str, str]]:
    """A row per kind of fault and peer, the most frequent first; then the peers that did not finish."""
    rows = [_fault_row(fault) for fault in run.faults]
    return rows + [("did not finish", peer, "", "", "1", why) for peer in run.dead if (why := _why_dead(run, peer))]


def _why_dead(run: Run, peer: str) -> str:
    """Nothing where the whole run was interrupted, which is told once."""
    if error := run.finished.get(peer):
        return error.removeprefix(f"{peer}: ")
    if peer in run.peers_told("dead_as_planned"):
        return "was away at the end, as planned"
    return "" if run.was_interrupted else "was not done when the run ended"


def _fault_row(fault: Faults) -> tuple[str, str, str, str, str, str]:
    seen_by = sorted(fault.seen_by)
    who = ", ".join(seen_by) if len(seen_by) <= 4 else f"{len(seen_by)} peers"
    rounds = sorted(fault.rounds)
    when = "" if not rounds else str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return (fault.kind, fault.peer, who, when, f"{fault.count:,}", fault.detail)


PLANNED_COLUMNS = ("what", "who", "times", "at, seconds")


def planned(run: Run) -> list[tuple[str, str, str, str]]:
    """A row per kind of change and peer, in the order in which they first happened."""
    return [(each.change, each.peer, f"{len(each.times_s):,}", _few(each.times_s)) for each in run.planned]


def _few(times_s: Sequence[float]) -> str:
    shown = ", ".join(f"{time_s:.4g}" for time_s in times_s[:4])
    return shown if len(times_s) <= 4 else f"{shown}, ..."


def counters(run: Run) -> str:
    """What the rounds counted, in one line: `missing` are segments mixed without all their copies, the rest are pulls."""
    totals = {key: int(np.nansum(run.rounds[key])) for key in COUNTERS}
    words = {"missing": "missing", "late": "late", "refused": "refused", "rejected": "rejected", "timeouts": "timed out"}
    return "Pulls and segments: " + ", ".join(f"{totals[key]:,} {words[key]}" for key in COUNTERS) + "."
