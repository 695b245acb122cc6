"""What a person sees of a topology: its figures in a table, its links in the terminal or in a file.

figures = measure(topology)
print_topology(Console(), scenario, topology, figures)
write_topology(topology, Path("graph.svg"))            # or .graphml, or decentralizepy's .edges
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gossipfl.errors import ConfigError
from gossipfl.learning.checkpoint import write_atomically
from gossipfl.overlay.graph_figures import GraphFigures
from gossipfl.overlay.graph_files import Link
from gossipfl.overlay.graphs import FullTopology, RedrawnTopology, Topology
from gossipfl.scenario.config import Scenario
from gossipfl.scenario.terminal import print_figures

if TYPE_CHECKING:
    import networkx

MAX_MATRIX = 64
"""Peers whose links fit a terminal, a character wide and half a one high each."""
MAX_DRAWN = 1_000
"""Peers of a picture: laying them out takes 10 s."""
MAX_WRITTEN = 5_000_000
"""Links of a file: 60 MB as .edges."""
BARS = 12
MAX_BAR, MAX_LABELS = 40, 24
"""Characters of the longest bar, and of what stands before it."""

# ------------------------------------------------------------------------------------------------------- in the terminal


def print_topology(console: Console, scenario: Scenario, topology: Topology, figures: GraphFigures) -> None:
    """The figures, then the links themselves, or how many peers have how many where they are too many to be shown."""
    print_figures(console, f"{scenario.name}: topology {_kind(scenario)}", _rows(figures))
    console.print(explain(figures), highlight=False, soft_wrap=True)
    if isinstance(topology, FullTopology):
        return
    topology = of_one_round(topology)
    if topology.num_peers <= min(MAX_MATRIX, console.width - len(f"p{MAX_MATRIX} ")):
        console.print(adjacency(topology))
    else:
        console.print(_degree_bars(topology, max(1, min(MAX_BAR, console.width - MAX_LABELS))))


def explain(figures: GraphFigures) -> str:
    """What the spectral gap means, in words."""
    rounds = figures.rounds_to_tenth
    about = "at most" if figures.rounds else "about" if figures.is_gap_exact else "at least"
    taken = "one round" if rounds <= 1 else f"{about} {rounds:,.{1 if rounds < 10 else 0}f} rounds"
    text = f"Averaging with all neighbours shrinks the peers' disagreement tenfold in {taken}."
    if figures.rounds:
        text = f"Each round has a graph of its own; this is round 1's. {text}"
    if figures.is_sampled:
        text += f" Distances and clustering are those of {figures.num_sampled} sampled peers."
    return text


def adjacency(topology: Topology) -> Text:
    """The matrix of links, two rows to a line; `▀` a link of the upper peer, `▄` of the lower, `█` of both."""
    lines = []
    width = len(f"p{topology.num_peers - 1}")
    for upper in range(0, topology.num_peers, 2):
        rows = [set(topology.neighbours(index)) for index in range(upper, min(upper + 2, topology.num_peers))]
        rows.append(set())
        cells = ("·▀▄█"[(column in rows[0]) + 2 * (column in rows[1])] for column in range(topology.num_peers))
        lines.append(f"{f'p{upper}':>{width}} {''.join(cells)}")
    return Text("\n".join(lines), no_wrap=True)


def _degree_bars(topology: Topology, longest: int) -> Table:
    counts = Counter(topology.degree(index) for index in range(topology.num_peers))
    least, most = min(counts), max(counts)
    width = -(-(most - least + 1) // BARS)
    bars: Counter[int] = Counter()
    for degree, count in counts.items():
        bars[(degree - least) // width] += count
    table = Table(box=None, pad_edge=False)
    table.add_column("neighbours", justify="right")
    table.add_column("peers", justify="right")
    table.add_column("")
    for bar in range((most - least) // width + 1):
        first = least + bar * width
        label = str(first) if width == 1 else f"{first} to {first + width - 1}"
        table.add_row(label, f"{bars[bar]:,}", "█" * -(-longest * bars[bar] // max(bars.values())))
    return table


def _rows(figures: GraphFigures) -> Iterator[tuple[str, str]]:
    about, least = ("about ", "at least ") if figures.is_sampled else ("", "")
    yield "peers", f"{figures.num_peers:,}"
    yield "links", f"{figures.num_links:,}"
    yield "neighbours, least / mean / most", f"{figures.degree_min:,} / {figures.degree_mean:,.4g} / {figures.degree_max:,}"
    yield "diameter", f"{least}{figures.diameter:,}"
    yield "shortest path, mean", f"{about}{figures.path_mean:.4g}"
    yield "clustering", f"{about}{figures.clustering:.3f}"
    yield "spectral gap", gap_text(figures)


def gap_text(figures: GraphFigures) -> str:
    about = "" if figures.is_gap_exact else "at most "
    mean = f" (mean of {len(figures.rounds)} rounds: {figures.spectral_gap_mean:.4g})" if figures.rounds else ""
    return f"{about}{figures.spectral_gap:.4g}{mean}"


def of_one_round(topology: Topology) -> Topology:
    """The topology itself, or the graph of round 1 where each round has its own."""
    return topology.rounds[0] if isinstance(topology, RedrawnTopology) else topology


def _kind(scenario: Scenario) -> str:
    args = ", ".join(f"{key} {value}" for key, value in scenario.topology.args.items())
    redrawn = ", redrawn in each round" if scenario.topology.dynamic else ""
    return f"{scenario.topology.kind}{', ' if args else ''}{args}{redrawn}"


# ------------------------------------------------------------------------------------------------------------ in a file


def write_topology(topology: Topology, path: Path) -> None:
    """Write the graph, or round 1's where it is redrawn, in the form that the name of `path` ends with.

    ConfigError for another ending or too many links.
    """
    check_path(path)
    topology = of_one_round(topology)
    num_links = sum(topology.degree(index) for index in range(topology.num_peers)) // 2
    if num_links > MAX_WRITTEN:
        raise ConfigError(
            f"--out {path}: {num_links:,} links exceed {MAX_WRITTEN:,}; lower peers, or leave out --out: "
            "the scenario's [topology] says it all"
        )
    try:
        write_atomically(path, WRITERS[path.suffix](topology).encode())
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}; choose another file") from error


def check_path(path: Path) -> None:
    """ConfigError where a graph cannot be written to a file of this name."""
    if path.suffix not in WRITERS:
        raise ConfigError(f"--out {path} must end with one of {', '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}; make it, or choose another")


def _edges(topology: Topology) -> str:
    return "".join([f"{topology.num_peers}\n", *(f"{one} {other}\n" for one, other in _links(topology))])


def _graphml(topology: Topology) -> str:
    import networkx

    return "\n".join(networkx.generate_graphml(_graph(topology))) + "\n"


def _svg(topology: Topology) -> str:
    """Springs, starting from a circle: a ring stays one, and what is near in the graph comes near in the picture."""
    import networkx

    if topology.num_peers > MAX_DRAWN:
        raise ConfigError(
            f"peers = {topology.num_peers} are too many for a picture, {MAX_DRAWN} at most; write .graphml, "
            "which Gephi and Cytoscape draw"
        )
    graph = _graph(topology)
    places = networkx.circular_layout(graph)
    if topology.num_peers > 2:
        places = networkx.spring_layout(graph, pos=places, seed=0)
    radius = max(1.2, 8 - topology.num_peers / 20)
    scale, side = 380.0, 800
    xy = {index: (side / 2 + scale * float(x), side / 2 + scale * float(y)) for index, (x, y) in places.items()}
    lines = [
        f'<line x1="{xy[i][0]:.1f}" y1="{xy[i][1]:.1f}" x2="{xy[j][0]:.1f}" y2="{xy[j][1]:.1f}"/>' for i, j in _links(topology)
    ]
    dots, names = [], []
    for index, (x, y) in xy.items():
        about = f"<title>p{index}: {topology.degree(index)} neighbours</title>"
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">{about}</circle>')
        names.append(f'<text x="{x:.1f}" y="{y - radius - 3:.1f}">p{index}</text>')
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" font-family="sans-serif" font-size="11">',
        f'<rect width="{side}" height="{side}" fill="white"/>',
        f'<g stroke="#888888" stroke-opacity="{0.8 if len(lines) < 1_000 else 0.2}">',
        *lines,
        '</g>\n<g fill="#0072B2">',
        *dots,
        '</g>\n<g fill="#222222" text-anchor="middle">',
        *(names if topology.num_peers <= MAX_MATRIX else ()),
        "</g>\n</svg>\n",
    ]
    return "\n".join(parts)


def _links(topology: Topology) -> Iterator[Link]:
    for index in range(topology.num_peers):
        yield from ((index, other) for other in topology.neighbours(index) if index < other)


def _graph(topology: Topology) -> networkx.Graph:
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(range(topology.num_peers))
    graph.add_edges_from(_links(topology))
    return graph


WRITERS: dict[str, Callable[[Topology], str]] = {".svg": _svg, ".graphml": _graphml, ".edges": _edges}
