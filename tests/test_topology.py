"""Topologies: what each kind looks like, what every kind keeps, and what is refused with which remedy."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import networkx
import numpy as np
import pytest

from gossipfl.errors import ConfigError
from gossipfl.overlay import TOPOLOGIES, Topology, build_topology
from gossipfl.overlay.graphs import FullTopology, ListedTopology, degrees_of
from gossipfl.overlay.topology import redrawn_topology

RECTANGULAR_KINDS = ["grid", "torus"]
RANDOM_KINDS = ["regular", "small_world", "erdos_renyi", "barabasi_albert"]
BUILT_IN_KINDS = sorted(set(TOPOLOGIES) - {"file"})


def build(kind: str, num_peers: int, seed: int = 0, **args: object) -> Topology:
    return build_topology(kind, num_peers, seed, args)


def links(topology: Topology) -> set[tuple[int, int]]:
    return {(i, j) for i in range(topology.num_peers) for j in topology.neighbours(i) if i < j}


def degrees(topology: Topology) -> list[int]:
    return [topology.degree(index) for index in range(topology.num_peers)]


def file_topology(folder: Path, name: str, text: str, num_peers: int, **args: object) -> Topology:
    (folder / name).write_text(text)
    return build("file", num_peers, path=str(folder / name), **args)


# ---------------------------------------------------------------------------------------------- what every kind keeps


@pytest.mark.parametrize("num_peers", [7, 8, 9, 12, 30])
@pytest.mark.parametrize("kind", BUILT_IN_KINDS)
def test_every_kind_is_connected_symmetric_sorted_and_without_loops(kind, num_peers):
    if kind in RECTANGULAR_KINDS and num_peers == 7:
        pytest.skip("no rectangle has 7 places")
    topology = build(kind, num_peers)
    graph = networkx.Graph()
    graph.add_nodes_from(range(num_peers))
    for index in range(num_peers):
        neighbours = list(topology.neighbours(index))
        assert neighbours == sorted(set(neighbours) - {index})
        assert topology.degree(index) == len(neighbours)
        assert all(index in topology.neighbours(other) for other in neighbours)
        graph.add_edges_from((index, other) for other in neighbours)
    assert topology.num_peers == num_peers
    assert networkx.is_connected(graph)


@pytest.mark.parametrize("kind", BUILT_IN_KINDS)
def test_a_lone_peer_is_legal_for_every_kind_and_has_no_neighbours(kind):
    assert degrees(build(kind, 1)) == [0]


@pytest.mark.parametrize("kind", sorted(set(BUILT_IN_KINDS) - {"regular", "small_world", "barabasi_albert"}))
def test_two_peers_are_linked_by_every_kind_that_needs_no_degree(kind):
    assert links(build(kind, 2)) == {(0, 1)}


@pytest.mark.parametrize("kind", ["regular", "barabasi_albert"])
def test_two_peers_are_linked_by_degree_1(kind):
    assert links(build(kind, 2, degree=1)) == {(0, 1)}


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_the_seed_alone_decides_a_random_topology(kind):
    first, again, other = (links(build(kind, 40, seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


# ----------------------------------------------------------------------------------------------------------- each kind


def test_full_links_everyone_without_holding_lists():
    topology = build("full", 1_000_000)
    neighbours = topology.neighbours(500_000)
    assert len(neighbours) == topology.degree(0) == 999_999
    assert (neighbours[0], neighbours[499_999], neighbours[500_000], neighbours[-1]) == (0, 499_999, 500_001, 999_999)
    assert neighbours[499_998:500_002] == [499_998, 499_999, 500_001, 500_002]
    assert 500_000 not in neighbours and 500_001 in neighbours and 1_000_000 not in neighbours
    with pytest.raises(IndexError):
        neighbours[999_999]


def test_full_neighbours_are_all_others_in_order():
    assert list(build("full", 4).neighbours(2)) == [0, 1, 3]


def test_ring_links_each_peer_to_the_next():
    assert links(build("ring", 5)) == {(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)}


def test_star_links_p0_to_everyone():
    assert links(build("star", 4)) == {(0, 1), (0, 2), (0, 3)}


def test_grid_of_six_is_two_rows_of_three():
    assert links(build("grid", 6)) == {(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)}


def test_torus_of_twelve_gives_everyone_four_neighbours():
    topology = build("torus", 12)  # 3 rows of 4
    assert degrees(topology) == [4] * 12
    assert list(topology.neighbours(0)) == [1, 3, 4, 8]


@pytest.mark.parametrize("kind", RECTANGULAR_KINDS)
def test_a_prime_number_of_peers_is_no_grid_and_no_torus_but_where_nothing_else_could_be(kind):
    assert [len(links(build(kind, number))) for number in (1, 2, 3)] == [0, 1, 2 if kind == "grid" else 3]
    for number in (5, 7, 97):
        with pytest.raises(
            ConfigError, match=f"'{kind}' needs peers = a x b .* {number} is prime; set peers = {number - 1} or"
        ):
            build(kind, number)
        build(kind, number - 1)
        build(kind, number + 1)


def test_exponential_links_peers_at_distances_that_are_powers_of_two():
    topology = build("exponential", 16)
    assert list(topology.neighbours(0)) == [1, 2, 4, 8, 12, 14, 15]
    assert degrees(topology) == [7] * 16


def test_clique_ring_joins_complete_groups_by_single_links():
    topology = build("clique_ring", 6, clique=3)
    assert links(topology) == {(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5), (2, 3), (0, 5)}


def test_clique_ring_evens_out_the_groups_when_the_size_does_not_divide():
    topology = build("clique_ring", 10, clique=4)  # groups of 3, 3 and 4
    assert links(topology) >= {(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5), (6, 7), (6, 8), (6, 9), (2, 3), (5, 6), (0, 9)}
    assert len(links(topology)) == 3 + 3 + 6 + 3


def test_hierarchical_links_all_within_a_cluster_and_all_heads():
    topology = build("hierarchical", 9, cluster=3)
    inside = {(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5), (6, 7), (6, 8), (7, 8)}
    assert links(topology) == inside | {(0, 3), (0, 6), (3, 6)}


def test_hierarchical_evens_out_the_clusters_and_a_single_one_is_complete():
    assert degrees(build("hierarchical", 7, cluster=4)) == [3, 2, 2, 4, 3, 3, 3]  # clusters of 3 and 4, heads p0 and p3
    assert degrees(build("hierarchical", 5)) == [4] * 5


@pytest.mark.parametrize(("num_peers", "degree"), [(10, 2), (10, 3), (9, 4), (10, 7), (60, 57), (10, 9)])
def test_regular_gives_every_peer_the_degree_dense_or_sparse(num_peers, degree):
    assert degrees(build("regular", num_peers, degree=degree)) == [degree] * num_peers


def test_small_world_without_rewiring_is_the_lattice():
    assert list(build("small_world", 10, degree=4, rewire=0.0).neighbours(0)) == [1, 2, 8, 9]


def test_erdos_renyi_with_certain_links_is_full():
    assert degrees(build("erdos_renyi", 9, p=1.0)) == [8] * 9


def test_barabasi_albert_grows_by_degree_links_per_peer():
    assert len(links(build("barabasi_albert", 20, degree=3))) == 3 * (20 - 3)


# ------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("kind", ["full", "regular"])
def test_a_sample_is_distinct_neighbours_and_the_generator_decides(kind):
    topology = build(kind, 20)
    for index in range(20):
        sample = topology.sample(index, 3, np.random.default_rng(index))
        assert len(set(sample)) == 3 and set(sample) <= set(topology.neighbours(index))
        assert all(type(peer) is int for peer in sample)
        assert sample == topology.sample(index, 3, np.random.default_rng(index))


@pytest.mark.parametrize("topology", [FullTopology(6), ListedTopology(6, [(2, other) for other in range(6)])])
def test_samples_are_uniform(topology):
    rng = np.random.default_rng(1)
    counts = collections.Counter(peer for _ in range(5000) for peer in topology.sample(2, 2, rng))
    # Each of 5 neighbours is drawn in 2 of 5 samples: mean 2000, standard deviation sqrt(5000 * 0.4 * 0.6) = 35; 5 of
    # these leave a chance below 1e-5, and the seed is fixed.
    assert set(counts) == {0, 1, 3, 4, 5}
    assert all(abs(count - 2000) < 175 for count in counts.values())


def test_a_sample_may_be_all_neighbours_or_none_but_no_more():
    topology = build("ring", 5)
    assert sorted(topology.sample(0, 2, np.random.default_rng(0))) == [1, 4]
    assert topology.sample(0, 0, np.random.default_rng(0)) == []
    with pytest.raises(ConfigError, match="cannot draw 3 neighbours of p0, which has 2; draw fewer"):
        topology.sample(0, 3, np.random.default_rng(0))


# --------------------------------------------------------------------------------------------------------------- files


def test_a_decentralizepy_edges_file_is_read_as_it_is(tmp_path):
    text = "4\n0 1\n1 0\n1 2\n2 1\n2 3\n3 2\n"  # it lists links from both ends
    assert links(file_topology(tmp_path, "line.edges", text, 4)) == {(0, 1), (1, 2), (2, 3)}


def test_an_edges_file_is_told_by_its_content_too_with_comments_and_commas(tmp_path):
    text = "# a line of three\n3\n\n0, 1  # near\n1, 2\n"
    assert links(file_topology(tmp_path, "graph.txt", text, 3)) == {(0, 1), (1, 2)}


def test_pairs_without_a_count_are_links(tmp_path):
    assert links(file_topology(tmp_path, "graph.txt", "0 1\n1 2\n2 3\n", 4)) == {(0, 1), (1, 2), (2, 3)}


def test_a_byte_order_mark_and_line_ends_of_windows_are_none_of_the_graph(tmp_path):
    assert links(file_topology(tmp_path, "graph.edges", "\ufeff3\r\n0 1\r\n1 2\r\n", 3)) == {(0, 1), (1, 2)}


def test_two_links_are_not_taken_for_a_matrix(tmp_path):
    assert links(file_topology(tmp_path, "graph.txt", "0 1\n1 2\n", 3)) == {(0, 1), (1, 2)}


def test_an_adjacency_list_names_each_peer_and_its_neighbours(tmp_path):
    graph = networkx.petersen_graph()
    networkx.write_adjlist(graph, tmp_path / "petersen.adjlist")
    topology = build("file", 10, path=str(tmp_path / "petersen.adjlist"))
    assert links(topology) == {tuple(sorted(edge)) for edge in graph.edges()}


def test_an_adjacency_list_after_a_count_holds_a_line_of_neighbours_per_peer(tmp_path):
    assert links(file_topology(tmp_path, "star.txt", "4\n1 2 3\n0\n0\n0\n", 4)) == {(0, 1), (0, 2), (0, 3)}


@pytest.mark.parametrize("args", [{}, {"format": "adjacency"}], ids=str)
def test_the_adjacency_list_of_a_ring_after_a_count_is_not_taken_for_links(tmp_path, args):
    """Each of its lines looks like a link, and together they would link those two places apart."""
    ring = "5\n4 1\n0 2\n1 3\n2 4\n3 0\n"
    assert links(file_topology(tmp_path, "ring.txt", ring, 5, **args)) == links(build("ring", 5))


def test_as_many_links_as_peers_after_a_count_are_links(tmp_path):
    text = "5\n0 1\n1 2\n2 3\n3 4\n4 0\n"
    assert links(file_topology(tmp_path, "ring.txt", text, 5)) == links(build("ring", 5))


def test_the_adjacency_list_of_a_complete_graph_is_not_taken_for_a_matrix(tmp_path):
    text = "0 1 2 3\n1 2 3 0\n2 3 0 1\n3 0 1 2\n"  # as a matrix it would lack the links (0, 2) and (1, 3)
    assert degrees(file_topology(tmp_path, "full.txt", text, 4)) == [3] * 4


def test_an_adjacency_matrix_links_where_it_is_not_zero(tmp_path):
    text = "0 0.5 0\n0.5 0 1\n0 1 1\n"
    assert links(file_topology(tmp_path, "matrix.txt", text, 3)) == {(0, 1), (1, 2)}


def test_graphml_is_read_with_nodes_in_the_order_of_their_numbers(tmp_path):
    graph = networkx.Graph([(3, 1), (1, 0), (0, 2)])  # node 3 comes first in the file
    networkx.write_graphml(graph, tmp_path / "graph.graphml")
    assert links(build("file", 4, path=str(tmp_path / "graph.graphml"))) == {(1, 3), (0, 1), (0, 2)}


@pytest.mark.parametrize("name", ["graph.graphml", "graph.edges", "graph.adjlist"])
def test_nodes_may_be_named_as_the_peers_are_in_any_order(tmp_path, name):
    graph = networkx.Graph([("p3", "p1"), ("p1", "p0"), ("p0", "p2")])
    write = {"graphml": networkx.write_graphml, "edges": networkx.write_edgelist, "adjlist": networkx.write_adjlist}
    write[name.partition(".")[2]](graph, tmp_path / name)  # of a link, networkx writes a dictionary besides
    assert links(build("file", 4, path=str(tmp_path / name))) == {(1, 3), (0, 1), (0, 2)}


def test_a_file_may_hold_a_lone_peer(tmp_path):
    assert degrees(file_topology(tmp_path, "one.edges", "1\n", 1)) == [0]
    assert degrees(file_topology(tmp_path, "one.txt", "0\n", 1)) == [0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.edges", "3\n0 1\n1 3\n", "a.edges line 3: peer 3 is outside 0..2; peers are numbered from 0"),
        ("a.edges", "3\n0 1\n0 1 2\n", "a.edges line 3: 3 numbers instead of a pair; .*topology.format = 'adjacency'"),
        ("a.txt", "3\n0 1\n1 -2\n", "a.txt line 3: '-2' is not the number of a peer; peers are numbered from 0"),
        ("a.txt", "3\n1 2\n0\n", "announces 3 peers but 2 lists of neighbours follow; give one line per peer"),
        ("a.txt", "0 1\n1 2\n2 0\n0 4\n", "has 5 peers but peers = 3; set peers = 5"),
        ("a.edges", "99999999999\n0 1\n", "has 99999999999 peers but peers = 3; set peers = 99999999999"),
        ("a.txt", "# nothing\n", "a.txt' is empty; give the path of a graph file"),
        ("a.txt", "0 nan 0\n0 0 1\n1 0 0\n", "a.txt line 1: 'nan' in column 2 must be at least 0, and finite"),
        ("a.txt", "0 1 0\n0 0 -1\n1 0 0\n", "a.txt line 2: '-1' in column 3 must be at least 0, and finite"),
        ("a.csv", "p0,p1,p2\n0,1,0\n1,0,1\n0,1,0\n", "a.csv line 2: a peer is named twice, as in a matrix or with weights"),
        (
            "a.csv",
            "0,1,0\n1,0,1\n0,1\n",
            "a.csv line 1: a peer is named twice, as in a matrix or with weights; a matrix has as",
        ),
        ("a.txt", "0 1 1\n1 2 1\n", "a.txt line 1: a peer is named twice, as in a matrix or with weights"),
        (
            "a.txt",
            "# GMT\n0 2\n1 {}\n2 {}\n1 0\n2 0\n",
            r"a.txt line 3: '1 \{\}' is of a multi-line adjacency list, .*write_adjlist",
        ),
        ("a.graphml", "<graphml xmlns='http://graphml.graphdrawing.org/xmlns'><graph/></graphml>", "there are no nodes in it"),
        ("a.graphml", "0 1\n1 2\n", "a.graphml' cannot be read .*; topology.format names one of edges, adjacency"),
    ],
)
def test_a_graph_file_that_cannot_be_right_is_refused_with_the_place(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        file_topology(tmp_path, name, text, 3)


def test_a_matrix_that_is_not_square_or_not_of_numbers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="line 2: 3 columns in a matrix of 2 rows; they must be as many"):
        file_topology(tmp_path, "m.txt", "0 1\n1 0 1\n", 2, format="matrix")
    with pytest.raises(ConfigError, match=r"line 2: .*'x'; a matrix holds numbers"):
        file_topology(tmp_path, "m.txt", "0 1\nx 0\n", 2, format="matrix")


def test_a_missing_graph_file_and_an_unknown_format_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"topology.path = 'no.edges' does not exist; give the path of a graph file"):
        build("file", 3, path="no.edges")
    with pytest.raises(ConfigError, match=r"topology.path = 3 must be the path of a graph file, in quotes"):
        build("file", 3, path=3)
    with pytest.raises(ConfigError, match=r"topology.format = 'edge' is not known; did you mean 'edges'?"):
        build("file", 3, path="no.edges", format="edge")


# ------------------------------------------------------------------------------------------- functions of one's own


def two_hops(num_peers: int, rng: np.random.Generator, *, hops: int = 2) -> networkx.Graph:
    return networkx.circulant_graph(num_peers, range(1, hops + 1))


def with_names(num_peers: int, rng: np.random.Generator) -> networkx.Graph:
    return networkx.path_graph(["anna", "ben", "carla"])


def nothing(num_peers: int, rng: np.random.Generator) -> None:
    return None


def alone(num_peers: int) -> networkx.Graph:
    return networkx.path_graph(num_peers)


def test_a_function_that_returns_a_graph_is_wrapped_and_takes_arguments():
    assert links(build(f"{__name__}:two_hops", 8, hops=1)) == links(build("ring", 8))
    assert degrees(build(f"{__name__}:two_hops", 8)) == [4] * 8


def test_nodes_with_names_are_numbered_in_their_order():
    assert links(build(f"{__name__}:with_names", 3)) == {(0, 1), (1, 2)}


def test_a_function_that_is_not_called_so_is_refused():
    with pytest.raises(
        ConfigError, match=r"alone': too many positional arguments; it is called as f\(num_peers, rng, \*\*args\)"
    ):
        build(f"{__name__}:alone", 4)


def test_a_graph_of_another_number_of_peers_and_no_graph_at_all_are_refused():
    with pytest.raises(ConfigError, match=r"with_names' has 3 peers but peers = 4; set peers = 3"):
        build(f"{__name__}:with_names", 4)
    with pytest.raises(ConfigError, match=r"nothing' returned a NoneType; return a Topology or a networkx.Graph instead"):
        build(f"{__name__}:nothing", 4)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kind", "num_peers", "args", "message"),
    [
        ("rnig", 4, {}, "unknown topology 'rnig'; did you mean 'ring'?"),
        ("kreg", 4, {}, "unknown topology 'kreg'; did you mean 'regular'?"),
        ("fully-connected", 4, {}, "unknown topology 'fully-connected'; did you mean 'full'?"),
        ("ring", 0, {}, "peers = 0 must be at least 1"),
        ("ring", 4, {"degree": 2}, "unknown key 'topology.degree' of topology 'ring'; accepted: none"),
        (
            "regular",
            8,
            {"degre": 2},
            "unknown key 'topology.degre' of topology 'regular'; did you mean 'degree'?; accepted: degree",
        ),
        ("file", 8, {}, "topology.kind = 'file' needs topology.path; add it"),
        ("regular", 4, {"degree": 4}, "topology.degree = 4 needs at least 5 peers, there are 4; lower it to 3 or less"),
        (
            "regular",
            7,
            {"degree": 3},
            "topology.degree = 3 with peers = 7 makes an odd number of link ends; change one of them",
        ),
        ("regular", 8, {"degree": 2.5}, "topology.degree = 2.5 must be a whole number of at least 1"),
        ("regular", 8, {"degree": True}, "topology.degree = True must be a whole number of at least 1"),
        ("clique_ring", 8, {"clique": 0}, "topology.clique = 0 must be a whole number of at least 1"),
        ("hierarchical", 8, {"cluster": 2.0}, "topology.cluster = 2.0 must be a whole number of at least 1"),
        ("clusters", 8, {}, "unknown topology 'clusters'; did you mean 'hierarchical'?"),
        ("small_world", 8, {"degree": 3}, "topology.degree = 3 must be even"),
        ("small_world", 4, {}, "topology.degree = 4 needs at least 5 peers, there are 4; lower it to 2 or less"),
        ("small_world", 2, {}, "needs at least 5 peers, there are 2; have more peers, or another topology.kind"),
        ("small_world", 8, {"rewire": 1.5}, "topology.rewire = 1.5 must be a number from 0 to 1"),
        ("barabasi_albert", 3, {"degree": 3}, "topology.degree = 3 needs at least 4 peers"),
        ("erdos_renyi", 8, {"p": "half"}, "topology.p = 'half' must be a number from 0 to 1"),
        ("erdos_renyi", 50, {"p": 0.01}, "topology.p = 0.01 gave no connected graph of 50 peers in 100 draws"),
        ("regular", 8, {"degree": 1}, "topology.degree = 1 gave no connected graph of 8 peers in 100 draws; raise it"),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_value_and_a_remedy(kind, num_peers, args, message):
    with pytest.raises(ConfigError) as caught:
        build(kind, num_peers, **args)
    assert message in str(caught.value)


def test_a_disconnected_topology_is_refused_and_its_components_are_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        file_topology(tmp_path, "two.edges", "5\n0 1\n2 3\n3 4\n", 5)
    assert "topology.kind = 'file' falls into 2 components" in str(caught.value)
    assert "(p0 p1; p2 p3 p4); add links between them" in str(caught.value)


def test_long_lists_of_components_are_cut_short(tmp_path):
    with pytest.raises(ConfigError) as caught:
        file_topology(tmp_path, "none.edges", "100\n" + "".join(f"0 {index}\n" for index in range(1, 95)), 100)
    assert "6 components" in str(caught.value)
    assert "(p0 p1 p2 p3 p4 p5 p6 p7 ... 95 in all; p95; p96; p97; and 2 more)" in str(caught.value)


def test_networkx_is_loaded_only_by_kinds_that_draw_or_read_a_graph():
    code = (
        "import sys; from gossipfl.overlay import build_topology\n"
        "for kind in 'full ring star grid torus exponential clique_ring hierarchical'.split():\n"
        "    build_topology(kind, 12, 0, {})\n"
        "assert 'networkx' not in sys.modules\n"
        "build_topology('regular', 12, 0, {}); assert 'networkx' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- a graph for each round -------------------------------------------------------------------------------------------


def test_a_redrawn_graph_differs_from_round_to_round_and_the_seed_decides():
    drawn = redrawn_topology("ring", 12, 0, {}, 5)
    assert all(graph.degree(index) == 2 for graph in drawn.rounds for index in range(12))
    assert len({tuple(graph.neighbours(0)) for graph in drawn.rounds}) > 1
    again, other = redrawn_topology("ring", 12, 0, {}, 5), redrawn_topology("ring", 12, 1, {}, 5)
    assert [graph.neighbours(3) for graph in drawn.rounds] == [graph.neighbours(3) for graph in again.rounds]
    assert [graph.neighbours(3) for graph in drawn.rounds] != [graph.neighbours(3) for graph in other.rounds]


def test_the_neighbours_of_a_redrawn_graph_are_those_of_any_round():
    drawn = redrawn_topology("ring", 12, 0, {}, 5)
    names = [f"p{index}" for index in range(12)]
    degrees, schedule = degrees_of(drawn, 4, names)
    assert set(degrees) == {name for round_ in schedule for name in round_} and len(schedule) == 5
    assert all(
        round_ == {names[other]: 2 for other in graph.neighbours(4)}
        for round_, graph in zip(schedule, drawn.rounds, strict=True)
    )
    assert degrees_of(build_topology("ring", 12, 0, {}), 4, names) == ({"p3": 2, "p5": 2}, None)
