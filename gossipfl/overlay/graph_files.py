"""Graphs from files, in the forms that other tools write them.

| format | content |
|---|---|
| edges | decentralizepy's `.edges`: the number of peers on the first line, then one link `u v` per line |
| adjacency | `u v w ...`: u and its neighbours; or the number of peers, then a line with the neighbours of each peer |
| matrix | as many rows as columns of numbers; not 0 = linked |
| graphml | what networkx, Gephi and yEd write |

Peers are numbered from 0, or named p0, p1, ... Links count for both ends, may be given once or twice, and carry no weight. In
text, what follows a `#` is a comment, so is `{...}`, where networkx writes what it knows of a link, and commas are spaces.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gossipfl.errors import ConfigError
from gossipfl.registry import did_you_mean

if TYPE_CHECKING:
    import networkx

Link = tuple[int, int]
FORMATS = ("edges", "adjacency", "matrix", "graphml")

_Rows = list[tuple[int, list[str]]]
"""The lines that hold anything: their numbers and their words."""
_Lists = list[tuple[int, list[int]]]


def read_graph(path: str | Path, format: str | None = None) -> tuple[int, list[Link]]:
    """The number of peers and the links in the file at `path`; `format` None is told by its name and content.

    ConfigError with the line that cannot be right.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"topology.path = {path!r} must be the path of a graph file, in quotes")
    if format is not None and format not in FORMATS:
        guess = did_you_mean(str(format), FORMATS)
        raise ConfigError(f"topology.format = {format!r} is not known{guess}; known: {', '.join(FORMATS)}")
    source = Path(path)
    if format is None and source.suffix in (".edges", ".graphml"):
        format = source.suffix[1:]
    try:
        if format == "graphml":
            return _from_graphml(source)
        text = source.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"topology.path = {str(path)!r} does not exist; give the path of a graph file") from None
    except (OSError, SyntaxError, ValueError, KeyError) as error:  # SyntaxError: the XML parser's errors are such
        raise ConfigError(
            f"topology.path = {str(path)!r} cannot be read ({error}); topology.format names one of {', '.join(FORMATS)}"
        ) from error
    lines = [(number, line, _words(line)) for number, line in enumerate(text.splitlines(), start=1)]
    for number, line, words in lines:
        if len(words) == 1 and "{" in line.partition("#")[0]:
            raise ConfigError(
                f"{source} line {number}: {line.strip()!r} is of a multi-line adjacency list, which is not read here; networkx "
                "also writes others: write_adjlist, write_edgelist, write_graphml"
            )
    rows = [(number, words) for number, _, words in lines if words]
    if not rows:
        raise ConfigError(f"topology.path = {str(path)!r} is empty; give the path of a graph file")
    if format == "matrix" or (format is None and _looks_like_a_matrix(rows)):
        return _from_matrix(source, rows)
    return _from_lists(source, rows, format)


def numbered(graph: networkx.Graph) -> networkx.Graph:
    """The graph with nodes named 0..n-1: their own numbers where they have such (also as text, or as p0), else their order."""
    import networkx

    numbers = {node: str(node).removeprefix("p") for node in graph}
    if set(numbers.values()) == {str(index) for index in range(len(graph))}:
        return networkx.relabel_nodes(graph, {node: int(number) for node, number in numbers.items()})
    return networkx.convert_node_labels_to_integers(graph)


def _from_graphml(source: Path) -> tuple[int, list[Link]]:
    import networkx

    try:
        graph = numbered(networkx.read_graphml(source))
    except networkx.NetworkXError as error:  # well-formed XML without a graph
        raise ValueError(error) from error
    if not graph:
        raise ValueError("there are no nodes in it")
    return len(graph), list(graph.edges())


def _from_lists(source: Path, rows: _Rows, format: str | None) -> tuple[int, list[Link]]:
    """Edges and adjacency lists. Without a count the two read alike: a pair `u v` is u and its neighbour v."""
    lists = [(line, [_peer_number(source, line, word) for word in words]) for line, words in rows]
    num_peers: int | None = None
    if len(lists[0][1]) == 1 and lists != [(lists[0][0], [0])]:  # a lone 0 is one peer without neighbours
        num_peers, lists = lists[0][1][0], lists[1:]
    not_pairs = [(line, numbers) for line, numbers in lists if len(numbers) != 2]
    for line, numbers in not_pairs if format is None else ():
        if len(set(numbers)) < len(numbers):
            raise ConfigError(
                f"{source} line {line}: a peer is named twice, as in a matrix or with weights; a matrix has as many rows as "
                "columns and no names, links carry no weight, and topology.format = 'adjacency' takes the line as it is"
            )
    if format == "edges" and not_pairs:
        line, numbers = not_pairs[0]
        raise ConfigError(
            f"{source} line {line}: {len(numbers)} numbers instead of a pair; "
            "an adjacency list needs topology.format = 'adjacency'"
        )
    if num_peers is not None and lists and (format == "adjacency" or not_pairs or _is_mutual(lists, num_peers, format)):
        if len(lists) != num_peers:
            raise ConfigError(
                f"{source}: the first line announces {num_peers} peers but {len(lists)} lists of neighbours follow; "
                "give one line per peer"
            )
        lists = [(line, [index, *numbers]) for index, (line, numbers) in enumerate(lists)]
    if num_peers is None:
        num_peers = 1 + max(max(numbers) for _, numbers in lists)
    for line, numbers in lists:
        if max(numbers) >= num_peers:
            raise ConfigError(
                f"{source} line {line}: peer {max(numbers)} is outside 0..{num_peers - 1}; peers are numbered from 0"
            )
    return num_peers, [(numbers[0], other) for _, numbers in lists for other in numbers[1:]]


def _is_mutual(lists: _Lists, num_peers: int, format: str | None) -> bool:
    """Whether pairs after a count are the neighbours of each peer, as in a ring: who is in whose list has it in its own. Links
    that happen to read so are those of a triangle, which both readings give, or of an order that nobody writes."""
    if format is not None or len(lists) != num_peers:
        return False
    near = [set(numbers) for _, numbers in lists]
    return all(
        index not in others and all(other < num_peers and index in near[other] for other in others)
        for index, others in enumerate(near)
    )


def _looks_like_a_matrix(rows: _Rows) -> bool:
    """As many rows as columns. So is the adjacency list of a complete graph, but then the first column names each
    peer once, which 0 and 1 cannot do for more than two; for two, both readings give the same link. So are two links, but
    then they name more than two peers."""
    square = all(len(words) == len(rows) for _, words in rows)
    are_two_links = len(rows) == 2 and any(word.isdecimal() and int(word) > 1 for _, words in rows for word in words)
    return square and len(rows) > 1 and len({words[0] for _, words in rows}) < max(3, len(rows)) and not are_two_links


def _from_matrix(source: Path, rows: _Rows) -> tuple[int, list[Link]]:
    links = []
    for index, (line, words) in enumerate(rows):
        if len(words) != len(rows):
            raise ConfigError(
                f"{source} line {line}: {len(words)} columns in a matrix of {len(rows)} rows; they must be as many"
            )
        try:
            numbers = [float(word) for word in words]
        except ValueError as error:
            raise ConfigError(f"{source} line {line}: {error}; a matrix holds numbers") from None
        for other, number in enumerate(numbers):
            if not 0 <= number < math.inf:
                raise ConfigError(
                    f"{source} line {line}: {words[other]!r} in column {other + 1} must be at least 0, and finite"
                )
            if number:
                links.append((index, other))
    return len(rows), links


def _words(line: str) -> list[str]:
    return re.split("[#{]", line, maxsplit=1)[0].replace(",", " ").split()


def _peer_number(source: Path, line: int, word: str) -> int:
    number = word.removeprefix("p")
    if not number.isdecimal():
        raise ConfigError(f"{source} line {line}: {word!r} is not the number of a peer; peers are numbered from 0")
    return int(number)
