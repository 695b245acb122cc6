"""When each peer trained, waited and merged, as bars: a straggler is seen at once."""

from __future__ import annotations

import html

import numpy as np

from gossipfl.scenario.report.plots import BLUE, ORANGE, PURPLE, Plot, Trace, axis, faint, short
from gossipfl.scenario.report.reading import Columns, Run

PARTS = (
    ("training", BLUE, "train_s", "training_at"),
    ("waiting for segments", faint(ORANGE, 0.45), "waiting_s", "waiting_at"),
    ("merging", PURPLE, "merge_s", "merging_at"),
)
"""Name, colour, seconds and beginning."""
MAX_PEERS, MAX_ROUNDS = 60, 100
"""18,000 bars are what a browser still draws in two seconds."""


def plot_timeline(run: Run) -> Plot:
    """Of a long run, a bar sums several rounds; of many peers, those are shown that train longest, and some of the others."""
    key, title = "timeline", "What each peer did when"
    bars = _bars(run, _rounds_per_bar(run))
    if not len(bars["peer"]):
        return Plot(key, title, missing="The record has no times of rounds.")
    shown = _peers_to_show(run)
    kept = np.isin(bars["peer"], shown)
    bars = {name: column[kept] for name, column in bars.items()}
    rows = np.searchsorted(shown, bars["peer"])
    ticks = {"tickvals": list(range(len(shown))), "ticktext": [html.escape(run.peers[peer]) for peer in shown]}
    layout = {
        "barmode": "overlay",
        "xaxis": axis(run.time_unit, range=[0, float(bars["end_s"].max()) * 1.01]),
        "yaxis": axis("", autorange="reversed", showgrid=False, zeroline=False, **ticks),
        "height": 170 + 15 * len(shown),
        "showlegend": True,
        "hovermode": "closest",
    }
    names = [run.peers[peer] for peer in bars["peer"].astype(int)]
    traces = [_part(bars, rows, *part) for part in PARTS]
    return Plot(key, title, _about(run, len(shown)), traces, layout, bars | {"peer": names})


def _part(bars: Columns, rows: np.ndarray, name: str, colour: str, duration: str, start: str) -> Trace:
    drawn = bars[duration] > 0
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": short(bars[duration][drawn]),
        "base": short(bars[start][drawn]),
        "y": rows[drawn].tolist(),
        "width": 0.8,
        "marker": {"color": colour, "line": {"width": 0}},
        "customdata": np.stack([bars["round"][drawn], bars[duration][drawn]], axis=1).tolist(),
        "hovertemplate": "round %{customdata[0]}: %{customdata[1]:.4g} s",  # plotly's x is the end of the bar
    }


def _bars(run: Run, rounds_per_bar: int) -> Columns:
    """A row per peer and bar: the seconds of its rounds, and where each part begins, laid out backwards from their end."""
    timed = np.isfinite(run.rounds["time_s"])
    columns = {key: column[timed] for key, column in run.rounds.items()}
    block = (columns["round"] - 1) // rounds_per_bar
    order = np.lexsort((columns["time_s"], block, columns["peer"]))
    peer, block = columns["peer"][order], block[order]
    if not len(peer):
        return {"peer": peer}
    first = np.flatnonzero(np.r_[True, (np.diff(peer) != 0) | (np.diff(block) != 0)])
    last = np.r_[first[1:], len(peer)] - 1

    def total(key: str) -> np.ndarray:
        return np.add.reduceat(np.nan_to_num(columns[key][order]), first)

    end = columns["time_s"][order][last]
    merge_s = total("merge_s")
    waiting_s = np.maximum(total("wait_s") - merge_s, 0)  # a round merges what has come while it waits for the rest
    train_s = total("train_s")
    merging_at, waiting_at = end - merge_s, end - merge_s - waiting_s
    return {
        "peer": peer[first],
        "round": columns["round"][order][last],
        "end_s": end,
        "train_s": train_s,
        "waiting_s": waiting_s,
        "merge_s": merge_s,
        "training_at": waiting_at - train_s,
        "waiting_at": waiting_at,
        "merging_at": merging_at,
    }


def _rounds_per_bar(run: Run) -> int:
    last = run.rounds["round"].max(initial=1)
    return int(-(-last // MAX_ROUNDS))


def _peers_to_show(run: Run) -> list[int]:
    """All peers, or the half of what fits that trained longest and as many spread over the rest."""
    if len(run.peers) <= MAX_PEERS:
        return list(range(len(run.peers)))
    slowest_first = np.argsort(-_train_s_by_peer(run), kind="stable")
    half = MAX_PEERS // 2
    spread = np.linspace(half, len(run.peers) - 1, half).astype(int)
    return sorted(slowest_first[np.r_[:half, spread]].tolist())


def _train_s_by_peer(run: Run) -> np.ndarray:
    """f64[peers]: mean training seconds of a round, 0 where a peer has trained none."""
    peer = run.rounds["peer"].astype(int)
    train_s = np.nan_to_num(run.rounds["train_s"])
    rounds = np.bincount(peer, weights=train_s > 0, minlength=len(run.peers))
    return np.bincount(peer, weights=train_s, minlength=len(run.peers)) / np.maximum(rounds, 1)


def _about(run: Run, num_shown: int) -> str:
    told = ["Training, waiting for segments and merging, back from the end of each round."]
    if run.time_unit == "seconds":
        told.append("What is left blank went to other things: evaluation, or training other peers of the same process.")
    train_s = _train_s_by_peer(run)
    slowest = int(np.argmax(train_s))
    if train_s[slowest] > 0:
        longest, middle = train_s[slowest], np.median(train_s)
        told.append(f"{run.peers[slowest]} trains longest: {longest:.3g} s a round; median of the peers: {middle:.3g} s.")
    if _rounds_per_bar(run) > 1:
        told.append(f"Thinned: each bar sums {_rounds_per_bar(run)} rounds.")
    if num_shown < len(run.peers):
        told.append(f"Thinned: {num_shown} of {len(run.peers):,} peers, half of them those that train longest.")
    return " ".join(told)
