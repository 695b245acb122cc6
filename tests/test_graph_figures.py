"""The figures of topologies against closed forms and networkx, and the command that shows and writes them."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import networkx
import numpy as np
import pytest
from click.testing import CliRunner

from gossipfl.cli import main
from gossipfl.errors import ConfigError
from gossipfl.overlay import graph_figures
from gossipfl.overlay.graph_figures import measure
from gossipfl.overlay.graphs import Topology
from gossipfl.overlay.topology import build_topology, redrawn_topology
from gossipfl.scenario.topology_view import adjacency, explain, write_topology


def build(kind: str, num_peers: int, **args: object) -> Topology:
    return build_topology(kind, num_peers, 0, args)


def as_graph(topology: Topology) -> networkx.Graph:
    pairs = [(i, j) for i in range(topology.num_peers) for j in topology.neighbours(i)]
    graph = networkx.Graph(pairs)
    graph.add_nodes_from(range(topology.num_peers))
    return graph


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("kind", ["ring", "star", "torus", "clique_ring", "hierarchical", "regular", "barabasi_albert", "full"])
def test_distances_and_clustering_are_those_of_networkx(kind):
    topology = build(kind, 30)
    graph, figures = as_graph(topology), measure(topology)
    assert (figures.num_peers, figures.num_links) == (30, graph.number_of_edges())
    assert figures.diameter == networkx.diameter(graph)
    assert figures.path_mean == pytest.approx(networkx.average_shortest_path_length(graph))
    assert figures.clustering == pytest.approx(networkx.average_clustering(graph))
    assert figures.is_gap_exact and not figures.is_sampled


def test_the_degrees_of_a_star_are_its_leaves_and_its_centre():
    figures = measure(build("star", 10))
    assert (figures.degree_min, figures.degree_mean, figures.degree_max) == (1, 1.8, 9)


def test_the_gap_of_a_ring_is_that_of_its_circulant_matrix():
    # Every weight is 1/3, so the eigenvalues are (1 + 2 cos(2 pi k / n)) / 3.
    assert measure(build("ring", 24)).spectral_gap == pytest.approx(2 / 3 * (1 - math.cos(2 * math.pi / 24)))


def test_a_redrawn_graph_is_described_by_that_of_one_round_and_the_mean_over_rounds():
    redrawn = redrawn_topology("regular", 20, 0, {"degree": 4}, 30)
    figures = measure(redrawn)
    each = [measure(graph) for graph in redrawn.rounds[:10]]
    assert (figures.num_links, figures.degree_max) == (40, 4) and figures.spectral_gap == each[0].spectral_gap < 1
    assert figures.spectral_gap_mean == pytest.approx(np.mean([one.spectral_gap for one in each])) != figures.spectral_gap
    values = np.random.default_rng(0).standard_normal(20)
    values -= values.mean()
    before = np.linalg.norm(values)
    for graph in redrawn.rounds[: math.ceil(figures.rounds_to_tenth)]:
        values = np.array([(values[index] + values[list(graph.neighbours(index))].sum()) / 5 for index in range(20)])
    assert np.linalg.norm(values) <= before / 10


def test_the_command_shows_one_round_of_a_redrawn_graph(tmp_path):
    settings = ["peers=20", "topology.kind=regular", "topology.degree=4", "topology.dynamic=true"]
    arguments = ["topology", "quickstart", *(part for setting in settings for part in ("--set", setting))]
    shown = CliRunner().invoke(main, [*arguments, "--json", "--out", str(tmp_path / "graph.edges")])
    figures = json.loads(shown.stdout)
    assert (figures["num_links"], figures["degree_max"], len(figures["rounds"])) == (40, 4, 10)
    assert 0 < figures["spectral_gap"] < 0.5 and 2 < figures["rounds_to_tenth"] < 15
    assert len((tmp_path / "graph.edges").read_text().splitlines()) == 1 + 40
    table = CliRunner().invoke(main, arguments).stdout
    matrix = [line.split()[1] for line in table.splitlines() if re.match(r" *p\d+ ", line)]
    assert sum({"█": 2, "▀": 1, "▄": 1, "·": 0}[cell] for line in matrix for cell in line) == 2 * 40
    assert "this is round 1's" in table


def test_a_full_graph_agrees_in_one_round_and_needs_no_lists():
    figures = measure(build("full", 1_000_000))
    assert (figures.spectral_gap, figures.rounds_to_tenth, figures.diameter) == (1.0, 1.0, 1)
    # The same from its matrix, all of whose entries are 1/n.
    listed = measure(build("hierarchical", 20, cluster=20))
    assert listed.spectral_gap == pytest.approx(1.0) and listed.rounds_to_tenth == 1.0
    assert replace(listed, spectral_gap=1.0) == measure(build("full", 20))


@pytest.mark.parametrize(("num_peers", "diameter"), [(1, 0), (2, 1)])
def test_one_and_two_peers_have_figures_too(num_peers, diameter):
    figures = measure(build("ring", num_peers))
    assert (figures.diameter, figures.path_mean, figures.clustering) == (diameter, diameter, 0.0)
    assert figures.spectral_gap == pytest.approx(1.0)  # two halves each


def test_the_rounds_to_a_tenth_are_what_averaging_takes():
    topology = build("ring", 8)
    matrix = np.zeros((8, 8))
    for index in range(8):
        matrix[index, [index, *topology.neighbours(index)]] = 1 / 3
    slowest = np.cos(2 * math.pi * np.arange(8) / 8)  # the eigenvector of the second eigenvalue
    num_rounds = math.ceil(measure(topology).rounds_to_tenth)
    norms = [np.linalg.norm(np.linalg.matrix_power(matrix, rounds) @ slowest) for rounds in (0, num_rounds - 1, num_rounds)]
    assert norms[2] <= norms[0] / 10 < norms[1]


@pytest.mark.parametrize("kind", ["regular", "star", "hierarchical", "exponential"])
def test_the_gap_without_all_eigenvalues_is_the_same(kind, monkeypatch):
    topology = build(kind, 120)
    exact = measure(topology)
    monkeypatch.setattr(graph_figures, "DENSE_PEERS", 50)
    found = measure(topology)
    assert found.is_gap_exact
    assert found.spectral_gap == pytest.approx(exact.spectral_gap, rel=2e-3)


def test_of_many_peers_a_sample_is_measured_and_the_figures_say_so(monkeypatch):
    topology = build("ring", 3_000)
    monkeypatch.setattr(graph_figures, "LANCZOS_STEPS", 40)
    figures = measure(topology)
    assert figures.is_sampled and figures.num_sampled == 256
    assert figures.diameter == 1_500 and figures.path_mean == pytest.approx(3_000**2 / 4 / 2_999)  # alike from each peer
    true_gap = 2 / 3 * (1 - math.cos(2 * math.pi / 3_000))
    assert not figures.is_gap_exact and figures.spectral_gap > true_gap
    assert "at least" in explain(figures) and "256 sampled peers" in explain(figures)
    assert figures == measure(topology)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_matrix_in_the_terminal_has_two_peers_to_a_line():
    assert adjacency(build("star", 3)).plain == "p0 ▄▀▀\np2 ▀··"


@pytest.mark.parametrize("name", ["graph.edges", "graph.graphml"])
def test_a_written_graph_is_read_back_as_it_was(name, tmp_path):
    topology = build("regular", 12)
    write_topology(topology, tmp_path / name)
    again = build("file", 12, path=str(tmp_path / name))
    assert [list(again.neighbours(i)) for i in range(12)] == [list(topology.neighbours(i)) for i in range(12)]


def test_a_picture_has_a_dot_with_its_name_per_peer_and_a_line_per_link_within_its_frame(tmp_path):
    write_topology(build("hierarchical", 20), tmp_path / "graph.svg")
    elements = [(element.tag.partition("}")[2], element) for element in ElementTree.parse(tmp_path / "graph.svg").iter()]
    tags = [tag for tag, _ in elements]
    assert tags.count("circle") == 20
    assert tags.count("line") == as_graph(build("hierarchical", 20)).number_of_edges()
    assert [element.text for tag, element in elements if tag == "text"] == [f"p{index}" for index in range(20)]
    places = [float(element.get(axis)) for tag, element in elements if tag == "circle" for axis in ("cx", "cy")]
    assert 0 < min(places) < 400 < max(places) < 800


def test_too_many_links_or_peers_for_a_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"49,995,000 links exceed 5,000,000; lower peers"):
        write_topology(build("full", 10_000), tmp_path / "graph.edges")
    with pytest.raises(ConfigError, match=r"peers = 2000 are too many for a picture, 1000 at most; write .graphml"):
        write_topology(build("ring", 2_000), tmp_path / "graph.svg")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- the command


def test_a_narrow_terminal_shows_bars_in_proportion_where_the_matrix_would_be_broken_up():
    words = ["topology", "quickstart", "--set", "peers=60", "--set", "topology.kind=small_world", "--set", "topology.degree=4"]
    shown = CliRunner().invoke(main, words, env={"COLUMNS": "40"}).stdout
    bars = [line.split() for line in shown.partition("neighbours  peers")[2].splitlines()[1:]]
    most = max(int(count) for _, count, _ in bars)
    assert "▀" not in shown and all(len(bar) == -(-16 * int(count) // most) for _, count, bar in bars)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["topology", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_shows_the_figures_and_the_links():
    code, shown, _ = run("quickstart", "--set", "topology.kind=ring")
    assert code == 0
    assert re.search(r"diameter +│ +4 │", shown) and re.search(r"spectral gap +│ +0.1953 │", shown)
    assert "tenfold in about 11 rounds" in shown
    assert "p0 ▄▀▄····▀" in shown


def test_a_graph_on_which_a_run_would_be_refused_is_shown_all_the_same_with_the_reason(tmp_path):
    code, shown, told = run("quickstart", "--set", "topology.kind=star")
    assert code == 0 and re.search(r"diameter +│ +2 │", shown) and "p0 ▄█▀" not in shown
    reason = "gossip.replicas = 2 exceeds the 1 neighbour of p1; lower it or densify the topology"
    assert told.startswith("a run on it would be refused: ") and told.endswith(f": {reason}\n")
    scenario = tmp_path / "mine.toml"
    scenario.write_text('peers = 4\n[topology]\nkind = "star"\n[gossip]\nreplicas = 2\n[network]\nlatency_matrix = "ms.csv"\n')
    (tmp_path / "ms.csv").write_text("0,1\n1,0\n")  # of two peers
    code, shown, told = run(scenario, "--json")
    assert code == 0 and json.loads(shown)["num_links"] == 3
    assert told.startswith(f"a run on it would be refused: {scenario}:5: gossip.replicas = 2 exceeds")
    code, shown, told = run(scenario, "--json", "--set", "gossip.replicas=1")
    assert code == 0 and json.loads(shown)["num_links"] == 3 and "ms.csv" in told
    assert run("quickstart", "--set", "topology.kind=star", "--set", "gossip.replicas=1")[2] == ""


def test_the_command_shows_how_many_neighbours_peers_have_where_they_are_many():
    code, shown, _ = run("quickstart", "--set", "peers=72", "--set", "topology.kind=hierarchical")
    assert code == 0 and "▀" not in shown
    assert re.search(r"^ +7 +63 +█{40}$", shown, re.MULTILINE)  # of nine clusters of 8; the heads have 15


def test_the_command_prints_json_and_writes_the_file(tmp_path):
    code, shown, _ = run("quickstart", "--set", "topology.kind=ring", "--json", "--out", tmp_path / "graph.edges")
    figures = json.loads(shown)
    assert code == 0 and figures["num_links"] == 8 and figures["rounds_to_tenth"] == pytest.approx(10.6, abs=0.1)
    assert (tmp_path / "graph.edges").read_text().startswith("8\n0 1\n0 7\n")


@pytest.mark.parametrize(
    ("name", "part"),
    [("graph.pdf", "must end with one of .svg, .graphml, .edges"), ("none/graph.svg", "there is no folder")],
)
def test_a_file_that_cannot_be_written_is_refused(name, part, tmp_path):
    code, shown, error = run("quickstart", "--out", tmp_path / name)
    assert code == 2 and shown == "" and part in error
