"""Who is linked to whom: the traffic of each link, and the topology."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from gossipfl.errors import GossipflError
from gossipfl.overlay.graph_files import Link
from gossipfl.overlay.graphs import Topology
from gossipfl.overlay.topology import build_topology, topology_of_round
from gossipfl.scenario.config import MOST_PEERS
from gossipfl.scenario.report.plots import MIB, SCALE, Plot, Trace, axis, colourbar, short
from gossipfl.scenario.report.reading import Run
from gossipfl.scenario.tables import Topology as TopologyTable

MAX_CELLS = 100
"""Rows and columns of the traffic; of more peers, neighbours in the list share a row."""
MAX_DRAWN_PEERS, MAX_DRAWN_LINKS = 300, 3000
MAX_NAMED = 40
MAX_LABELS = 24
MAX_EXACT = 100
"""Up to here peers are placed by the lengths of all paths (T. Kamada and S. Kawai, 1989), which is slow; then by springs."""
DRAWN_ROUND = 1
"""Of a topology that is redrawn in each."""
CIRCULAR = ("full", "ring", "exponential")

Points = dict[int, np.ndarray]
"""Where a peer is drawn, f64[2], by its number."""


def plot_traffic(run: Run) -> Plot:
    """Of many peers, neighbours in the list share a row and a column."""
    key, title = "traffic", "Traffic per link"
    place = {name: index for index, name in enumerate(run.peers)}
    known = [(to, sender, size) for (to, sender), size in run.received_from.items() if to in place and sender in place]
    if not known:
        is_silent = len(run.rounds["round"]) > 0 and not run.rounds["payload_bytes"].any()
        why = "Nobody received anything." if is_silent else "The record does not say who received how much from whom."
        return Plot(key, title, missing=why)
    group = -(-len(run.peers) // MAX_CELLS)
    groups = [run.peers[first : first + group] for first in range(0, len(run.peers), group)]
    labels = [_span(names) for names in groups]
    cells = np.zeros((len(labels), len(labels)))
    for to, sender, size in known:
        cells[place[to] // group, place[sender] // group] += size / MIB
    trace: Trace = {
        "type": "heatmap",
        "z": [[value or None for value in short(row)] for row in cells],
        "colorscale": SCALE,
        "colorbar": colourbar("MiB"),
        "customdata": [[f"{to} from {sender}" for sender in labels] for to in labels],
        "hovertemplate": "%{customdata}: %{z:.4g} MiB<extra></extra>",
    }
    if np.allclose(cells[cells > 0], cells.max()):  # or the scale would go below nothing and above all
        trace |= {"zmin": 0, "zmax": float(cells.max())}
    every = -(-len(labels) // MAX_LABELS)
    ticks = {"tickvals": list(range(0, len(labels), every)), "ticktext": [html.escape(names[0]) for names in groups[::every]]}
    layout = {
        "xaxis": axis("sender", showgrid=False, zeroline=False, **ticks),
        "yaxis": axis("receiver", autorange="reversed", showgrid=False, zeroline=False, **ticks),
        "height": 440,
        "showlegend": False,
        "hovermode": "closest",
    }
    about = "Encoded payload that each peer (row) received from each other (column), repeats included. Blank: nothing."
    if run.planned and not run.is_virtual:
        about += " What a peer was in the middle of receiving when it was killed is not known."
    if group > 1:
        about += f" Thinned: each cell sums {group} by {group} peers."
    columns = dict(zip(("receiver", "sender", "payload_bytes"), zip(*known, strict=True), strict=True))
    return Plot(key, title, about, [trace], layout, columns)


def plot_topology(run: Run) -> Plot:
    """Of many peers, those nearest to p0 are drawn, and of many links some."""
    key, title = "topology", "Topology"
    try:
        table = TopologyTable(**run.scenario["topology"])
        topology = _rebuilt(run, table)
    except (GossipflError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        return Plot(key, title, missing=f"The graph cannot be rebuilt from scenario.toml: {error}")
    shown = _nearest(topology, MAX_DRAWN_PEERS)
    links = [(one, other) for one in shown for other in topology.neighbours(one) if one < other and other in shown]
    drawn = links[:: max(-(-len(links) // MAX_DRAWN_LINKS), 1)]
    at = _positions(table.kind, list(shown), links)
    names = [f"p{peer}" for peer in shown]
    known = dict(zip(run.peers, run.last_accuracy().tolist(), strict=True))
    accuracy = np.array([known.get(name, np.nan) for name in names])
    degrees = [topology.degree(peer) for peer in shown]
    bare = {"visible": False, "automargin": False}
    layout = {
        "xaxis": bare,
        "yaxis": bare | {"scaleanchor": "x"},
        "margin": {"l": 12, "r": 12, "t": 36, "b": 12},
        "height": 440,
        "hovermode": "closest",
        "showlegend": False,
    }
    about = [f"{html.escape(table.kind)}: peers coloured by their last accuracy. A cross: did not finish."]
    if table.dynamic:
        about.insert(0, f"The graph of round {DRAWN_ROUND}; each round has one of its own.")
    if len(shown) < topology.num_peers:
        about.append(f"Thinned: {len(shown)} of {topology.num_peers:,} peers, those nearest to p0.")
    if len(drawn) < len(links):
        about.append(f"Thinned: {len(drawn):,} of {len(links):,} links.")
    traces = [_drawn_links(at, drawn), _drawn_peers(run, at, names, accuracy, degrees)]
    columns = {"peer": names, "accuracy": accuracy, "num_neighbours": degrees}
    return Plot(key, title, " ".join(about), traces, layout, columns)


def _drawn_links(at: Points, links: Sequence[Link]) -> Trace:
    """One line with gaps."""
    ends = np.array([(*at[one], *at[other]) for one, other in links]).reshape(-1, 4)
    gaps = np.full(len(ends), np.nan)
    return {
        "x": short(np.stack([ends[:, 0], ends[:, 2], gaps], axis=1).ravel()),
        "y": short(np.stack([ends[:, 1], ends[:, 3], gaps], axis=1).ravel()),
        "mode": "lines",
        "line": {"width": 1, "color": "rgba(128,128,128,0.45)"},
        "hoverinfo": "skip",
    }


def _drawn_peers(run: Run, at: Points, names: list[str], accuracy: np.ndarray, degrees: list[int]) -> Trace:
    dead = set(run.dead)
    failed = [name in dead for name in names]
    points = np.array(list(at.values()))
    hover = [
        f"{name}: {'not evaluated' if np.isnan(value) else f'{value:.4f}'}, {degree} neighbours"
        + ", did not finish" * has_failed
        for name, value, degree, has_failed in zip(names, accuracy, degrees, failed, strict=True)
    ]
    are_few = len(names) <= MAX_NAMED
    return {
        "x": short(points[:, 0]),
        "y": short(points[:, 1]),
        "mode": "markers+text" if are_few else "markers",
        "text": names,
        "textposition": "top center",
        "hovertext": hover,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "size": 16 if are_few else 9,
            "symbol": ["x" if has_failed else "circle" for has_failed in failed],
            "color": short(accuracy),
            "colorscale": SCALE,
            "colorbar": colourbar("accuracy"),
            "showscale": len(np.unique(accuracy[np.isfinite(accuracy)])) > 1,
            "line": {"width": 1, "color": "rgb(128,128,128)"},
        },
    }


def _rebuilt(run: Run, table: TopologyTable) -> Topology:
    """The graph of the run, or of one round of it, built again. A function of the user's own is not run for a report."""
    if ":" in table.kind:
        raise ValueError(f"it comes from {table.kind}, which a report does not run.")
    peers, seed = int(run.scenario["peers"]), run.scenario.get("seed", 0)
    if peers > MOST_PEERS:
        raise ValueError(f"peers = {peers} exceeds {MOST_PEERS:,}; put back the number that the run had.")
    seed = seed["protocol"] if isinstance(seed, dict) else seed
    if table.dynamic:
        return topology_of_round(table.kind, peers, seed, table.args, DRAWN_ROUND)
    return build_topology(table.kind, peers, seed, table.args)


def _nearest(topology: Topology, limit: int) -> dict[int, None]:
    """At most `limit` peers by their distance from p0, as the keys of a dictionary: ordered, and quick to look up."""
    if topology.num_peers <= limit:
        return dict.fromkeys(range(topology.num_peers))
    found = {0: None}
    for peer in (queue := [0]):
        for other in topology.neighbours(peer):
            if len(found) == limit:
                return found
            if other not in found:
                found[other] = None
                queue.append(other)
    return found


def _positions(kind: str, peers: list[int], links: list[Link]) -> Points:
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(peers)
    graph.add_edges_from(links)
    if kind in CIRCULAR:
        at = networkx.circular_layout(graph)
    elif len(peers) <= MAX_EXACT:
        at = networkx.kamada_kawai_layout(graph)
    else:
        at = networkx.spring_layout(graph, seed=0, iterations=100)
    return {peer: at[peer] for peer in peers}


def _span(names: Sequence[str]) -> str:
    return html.escape(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}")
