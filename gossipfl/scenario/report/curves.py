"""The curves over the rounds of one run or several: accuracy, consensus distance, staleness."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossipfl.scenario.report.plots import COLOURS, MIB, SCALE, Plot, Trace, axis, colourbar, faint, log_scale, short
from gossipfl.scenario.report.reading import Columns, Run, number

DASHES = {"solid": "none", "dash": "9 5", "dashdot": "9 4 3 4"}
"""Of further runs, when the colours are used up, and what SVG calls them; dotted is the average model."""


MAX_SEGMENT_LABELS = 12


@dataclass(frozen=True)
class Key:
    """How a run is drawn in all plots that it shares with others: for one legend beside them."""

    name: str
    colour: str
    dashes: str


def run_keys(runs: Sequence[Run]) -> list[Key]:
    lines = [_line(index) for index in range(len(runs))]
    return [Key(run.name, line["color"], DASHES[line["dash"]]) for run, line in zip(runs, lines, strict=True)]


def plot_curves(runs: Sequence[Run]) -> list[Plot]:
    """All runs in the same axes."""
    return [*_accuracy(runs), _consensus(runs), _staleness(runs)]


# ------------------------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class AccuracyCurve:
    """f64[rounds] each, a value per round that was evaluated."""

    round: np.ndarray
    time_s: np.ndarray
    received_mib_per_peer: np.ndarray
    mean: np.ndarray
    least: np.ndarray
    greatest: np.ndarray
    average_model: np.ndarray


def accuracy_curve(run: Run) -> AccuracyCurve:
    """Accuracy after the merge, over the peers of each round, with the mean time and bytes at which they had got there."""
    rounds, inverse = np.unique(run.rounds["round"], return_inverse=True)
    accuracy = run.rounds["accuracy_after"]
    count = _per_round(np.isfinite(accuracy), inverse, len(rounds))
    evaluated = count > 0
    mean = _per_round(np.nan_to_num(accuracy), inverse, len(rounds))[evaluated] / count[evaluated]
    least, greatest = np.full(len(rounds), np.inf), np.full(len(rounds), -np.inf)
    np.fmin.at(least, inverse, accuracy)
    np.fmax.at(greatest, inverse, accuracy)
    received = np.cumsum(_per_round(np.nan_to_num(run.rounds["payload_bytes"]), inverse, len(rounds)))
    at = rounds[evaluated]
    states = dict(zip(run.states["round"], run.states["average_accuracy"], strict=True))
    if not states and len(at):
        states = {at[-1]: number(run.figure("accuracy", "average_model"))}
    return AccuracyCurve(
        round=at,
        time_s=_round_means(run.rounds["time_s"], inverse, len(rounds))[evaluated],
        received_mib_per_peer=received[evaluated] / max(len(np.unique(run.rounds["peer"])), 1) / MIB,
        mean=mean,
        least=least[evaluated],
        greatest=greatest[evaluated],
        average_model=np.array([states.get(round_, np.nan) for round_ in at]),
    )


def _accuracy(runs: Sequence[Run]) -> list[Plot]:
    curves = [accuracy_curve(run) for run in runs]
    if not any(len(curve.round) for curve in curves):
        why = "No peer was evaluated in this record: evaluate_every = 0, or the run was cut short."
        return [Plot("accuracy", "Accuracy", missing=why)]
    about = "Test accuracy after each merge: mean of the peers, with the band from the worst to the best of them."
    if any(np.isfinite(curve.average_model).any() for curve in curves):
        about += " Dotted, or a diamond where only the last is known: the average of all peers' models."
    time = " or ".join(sorted({run.time_unit for run in runs}))
    over = (
        ("rounds", "round", "round", about),
        ("time", "time_s", time, "The same over the time at which the peers had merged, on average."),
        (
            "bytes",
            "received_mib_per_peer",
            "received per peer, MiB",
            "The same over the encoded payload received by then, mean of the peers.",
        ),
    )
    return [_accuracy_over(*horizontal, runs, curves) for horizontal in over]


def _accuracy_over(
    name: str, x_name: str, label: str, about: str, runs: Sequence[Run], curves: Sequence[AccuracyCurve]
) -> Plot:
    numbered = enumerate(zip(runs, curves, strict=True))
    return Plot(
        f"accuracy-over-{name}",
        f"Accuracy over {name}",
        about,
        [trace for index, (run, curve) in numbered for trace in _accuracy_traces(run, curve, x_name, index, len(runs) == 1)],
        {
            "xaxis": axis(label, rangemode="tozero"),
            "yaxis": axis("test accuracy", rangemode="nonnegative"),
            "showlegend": len(runs) == 1,
        },
        _accuracy_columns(runs, curves, x_name),
    )


def _accuracy_traces(run: Run, curve: AccuracyCurve, x_name: str, index: int, single: bool) -> list[Trace]:
    colour, name = COLOURS[index % len(COLOURS)], html.escape(run.name)
    shared: Trace = {"x": short(getattr(curve, x_name)), "mode": _mode(curve.mean)} | _group(index, single)
    band = shared | {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    mean = {
        "y": short(curve.mean),
        "name": "mean of the peers" if single else name,
        "line": _line(index),
        "marker": {"color": colour, "size": 7},
        "customdata": [list(ends) for ends in zip(short(curve.least), short(curve.greatest), strict=True)],
        "hovertemplate": "%{y:.4f} (%{customdata[0]:.4f} to %{customdata[1]:.4f})",
    }
    average = {
        "y": short(curve.average_model),
        "name": "average model" if single else f"{name}, average model",
        "mode": _mode(curve.average_model),
        "line": {"color": colour, "dash": "dot", "width": 2},
        "marker": {"symbol": "diamond", "size": 9, "color": colour},
        "showlegend": single,
        "hovertemplate": "%{y:.4f}",
    }
    return [
        band | {"y": short(curve.least)},
        band | {"y": short(curve.greatest), "fill": "tonexty", "fillcolor": faint(colour, 0.28)},
        shared | mean,
        *([shared | average] if np.isfinite(curve.average_model).any() else []),
    ]


def _accuracy_columns(runs: Sequence[Run], curves: Sequence[AccuracyCurve], x_name: str) -> dict[str, list[Any]]:
    """The horizontal axis, then what stands over it."""
    names = dict.fromkeys([x_name, "round", "mean", "least", "greatest", "average_model"])
    return _stacked((run.name, {name: getattr(curve, name) for name in names}) for run, curve in zip(runs, curves, strict=True))


# ------------------------------------------------------------------------------------------------ consensus and staleness


def _consensus(runs: Sequence[Run]) -> Plot:
    key, title = "consensus-distance", "Consensus distance"
    known = [(index, run, _distances(run)) for index, run in enumerate(runs)]
    known = [(index, run, curve) for index, run, curve in known if np.isfinite(curve["consensus_distance"]).any()]
    if not known:
        return Plot(key, title, missing="The record has no distances.")
    traces = []
    about = "Mean squared distance of the peers' models from their average: how far the peers are from agreeing."
    if any(not len(run.states["round"]) for _, run, _ in known):
        about += " Circles: only the distances after the first and the last merge are known, as always on this machine's clock."
    for index, run, curve in known:
        trace = _line_trace(index, run, curve, "consensus_distance", len(runs) == 1)
        if not len(run.states["round"]):
            trace |= {"mode": "markers", "marker": {"symbol": "circle-open", "size": 9, "color": trace["line"]["color"]}}
        traces.append(trace)
    every = np.concatenate([curve["consensus_distance"] for _, _, curve in known])
    scale = log_scale(every)
    if scale.get("type") == "log" and (every == 0).any():
        about += " Distances of 0 have no place on this logarithmic axis."
    layout = {
        "xaxis": axis("round", rangemode="tozero"),
        "yaxis": axis("mean squared distance", **scale),
        "showlegend": False,
    }
    return Plot(key, title, about, traces, layout, _stacked((run.name, curve) for _, run, curve in known))


def _distances(run: Run) -> Columns:
    """By round, or where the record has none by round, of the first and the last one."""
    if len(run.states["round"]):
        return {name: run.states[name] for name in ("round", "time_s", "consensus_distance")}
    rounds, times_s = run.rounds["round"], run.rounds["time_s"]
    ends = np.array([number(run.figure("consensus_distance", end)) for end in ("first", "last")])
    if not len(rounds):
        return {name: np.empty(0) for name in ("round", "time_s", "consensus_distance")}
    first, last = rounds == rounds.min(), rounds == rounds.max()
    return {
        "round": np.array([rounds.min(), rounds.max()]),
        "time_s": np.array([times_s[first].max(), times_s[last].max()]),
        "consensus_distance": ends,
    }


def _staleness(runs: Sequence[Run]) -> Plot:
    key, title = "staleness", "Staleness"
    curves = [staleness_by_round(run) for run in runs]
    if not any(curve["staleness_max"].any() for curve in curves):
        return Plot(key, title, missing="No mixed segment was stale: each copy was of the round's own version.")
    return Plot(
        key,
        title,
        "Rounds that the mixed copies were behind: mean over all segments of a round, and the greatest (triangles).",
        [
            trace
            for index, (run, curve) in enumerate(zip(runs, curves, strict=True))
            for trace in _staleness_traces(run, curve, index, len(runs) == 1)
        ],
        {
            "xaxis": axis("round", rangemode="tozero"),
            "yaxis": axis("rounds behind", rangemode="tozero"),
            "showlegend": len(runs) == 1,
        },
        _stacked((run.name, curve) for run, curve in zip(runs, curves, strict=True)),
    )


def _staleness_traces(run: Run, curve: Columns, index: int, single: bool) -> list[Trace]:
    mean = _line_trace(index, run, curve, "staleness_mean", single)
    stale = curve["staleness_max"] > 0
    greatest = {
        "x": short(curve["round"][stale]),
        "y": short(curve["staleness_max"][stale]),
        "name": "greatest",
        "mode": "markers",
        "marker": {"symbol": "triangle-up-open", "color": COLOURS[index % len(COLOURS)], "size": 6},
        "showlegend": single,
    }
    if single:
        mean |= {"name": "mean", "showlegend": True}
    return [mean, greatest | _group(index, single)]


def plot_segment_staleness(run: Run) -> list[Plot]:
    """Rounds behind by segment and round, mean over the peers; none where the record has no stale segment."""
    if not run.staleness:
        return []
    num_segments = 1 + max(segment for segment, _ in run.staleness)
    rounds, counts = np.unique(run.rounds["round"], return_counts=True)
    place = {int(round_): index for index, round_ in enumerate(rounds)}
    behind, known = np.zeros((num_segments, len(rounds))), np.zeros((num_segments, len(rounds)))
    stale_peers = np.zeros(len(rounds))
    for (segment, round_), (total, num_peers) in run.staleness.items():
        behind[segment, place[round_]], known[segment, place[round_]] = total, num_peers
        stale_peers[place[round_]] = max(stale_peers[place[round_]], num_peers)
    means = behind / np.maximum(known + counts - stale_peers, 1)  # the other peers' copies were all of the round's own version
    columns = {
        "round": np.tile(rounds, num_segments),
        "segment": np.repeat(np.arange(num_segments), len(rounds)),
        "staleness_mean": means.ravel(),
    }
    trace = {
        "type": "heatmap",
        "x": short(rounds),
        "z": [short(row) for row in means],
        "colorscale": SCALE,
        "colorbar": colourbar("rounds"),
        "hovertemplate": "segment %{y}, round %{x}: %{z:.4g} behind<extra></extra>",
    }
    layout = {
        "xaxis": axis("round"),
        "yaxis": axis("segment", dtick=-(-num_segments // MAX_SEGMENT_LABELS)),
        "hovermode": "closest",
        "showlegend": False,
    }
    about = "Rounds that the copies mixed into each segment were behind: mean over the peers."
    return [Plot("staleness-by-segment", "Staleness per segment", about, [trace], layout, columns)]


def staleness_by_round(run: Run) -> Columns:
    rounds, inverse = np.unique(run.rounds["round"], return_inverse=True)
    mixed = np.nan_to_num(run.rounds["segments_mixed"])
    behind = _per_round(np.nan_to_num(run.rounds["staleness_mean"]) * mixed, inverse, len(rounds))
    greatest = np.zeros(len(rounds))
    np.fmax.at(greatest, inverse, run.rounds["staleness_max"])
    segments = _per_round(mixed, inverse, len(rounds))
    return {
        "round": rounds,
        "time_s": _round_means(run.rounds["time_s"], inverse, len(rounds)),
        "staleness_mean": behind / np.maximum(segments, 1),
        "staleness_max": greatest,
        "segments": segments,
    }


# ---------------------------------------------------------------------------------------------------------------- parts


def _per_round(values: np.ndarray, inverse: np.ndarray, num_rounds: int) -> np.ndarray:
    return np.bincount(inverse, weights=values, minlength=num_rounds)


def _round_means(values: np.ndarray, inverse: np.ndarray, num_rounds: int) -> np.ndarray:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return _per_round(np.nan_to_num(values), inverse, num_rounds) / _per_round(known, inverse, num_rounds)


def _line_trace(index: int, run: Run, columns: Columns, name: str, single: bool) -> Trace:
    line, values = _line(index), columns[name]
    trace = {"x": short(columns["round"]), "y": short(values), "mode": _mode(values), "line": line}
    look = {"marker": {"color": line["color"], "size": 7}, "showlegend": not single, "hovertemplate": "%{y:.4g}"}
    return trace | look | {"name": html.escape(run.name)} | _group(index, single)


def _mode(values: np.ndarray) -> str:
    """A line of one value would not be seen."""
    return "markers" if np.isfinite(values).sum() == 1 else "lines"


def _line(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "dash": tuple(DASHES)[index // len(COLOURS) % len(DASHES)], "width": 2}


def _group(index: int, single: bool) -> Trace:
    """What the legend shows and hides together; a legend with groups stands upright, so a single run has none."""
    return {} if single else {"legendgroup": str(index)}


def _stacked(tables: Iterable[tuple[str, dict[str, np.ndarray]]]) -> dict[str, list[Any]]:
    """The runs' columns below each other, after one that names the run."""
    stacked: dict[str, list[Any]] = {}
    for name, columns in tables:
        for key, column in columns.items():
            stacked.setdefault("run", [])
            stacked.setdefault(key, []).extend(column.tolist())
        stacked["run"].extend([name] * (len(stacked[key]) - len(stacked["run"])))
    return stacked
