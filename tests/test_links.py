"""Emulated links: rates, latencies and their draws, files of matrices and traces, and links that cannot carry a run."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from gossipfl.errors import ConfigError
from gossipfl.overlay import links as links_module
from gossipfl.overlay.links import Change, Constant, Links, LinksConfig, Lognormal, Uniform, build_links, check_links
from gossipfl.overlay.topology import build_topology

MBIT = 125_000.0
SLOW_TO_FAST = Uniform(1 * MBIT, 99 * MBIT)


def written(folder: Path, text: str) -> str:
    path = folder / "numbers.csv"
    path.write_text(text)
    return str(path)


def message_of(config: LinksConfig, num_peers: int = 2) -> str:
    with pytest.raises(ConfigError) as caught:
        build_links(config, num_peers, seed=0)
    return str(caught.value)


def pair_rates(links: Links) -> list[float]:
    return [links.pair(i, j) for i, j in itertools.permutations(range(links.num_peers), 2)]


# ---------------------------------------------------------------------------------------------------- what links are


def test_by_default_nothing_is_limited_and_everything_arrives_at_once():
    links = build_links(LinksConfig(), num_peers=3, seed=0)
    assert links.num_peers == 3 and links.is_unlimited and links.is_ideal
    assert (links.uplink == math.inf).all() and (links.downlink == math.inf).all()
    assert (links.pair(0, 1), links.latency(0, 1), links.changes) == (math.inf, 0.0, [])


@pytest.mark.parametrize(
    "config",
    [
        LinksConfig(uplink=Constant(MBIT)),
        LinksConfig(downlink=Constant(MBIT)),
        LinksConfig(pair=Constant(MBIT)),
        LinksConfig(peer_uplink={1: MBIT}),
    ],
)
def test_one_limited_rate_is_a_limited_network(config):
    links = build_links(config, num_peers=3, seed=0)
    assert not links.is_unlimited and not links.is_ideal


@pytest.mark.parametrize(
    "config",
    [
        LinksConfig(latency=Constant(0.05)),
        LinksConfig(jitter_s=0.01),
        LinksConfig(loss=0.02),
        LinksConfig(peer_latency={0: 0.05}),
    ],
)
def test_what_comes_late_or_not_at_all_is_unlimited_but_not_ideal(config):
    links = build_links(config, num_peers=3, seed=0)
    assert links.is_unlimited and not links.is_ideal


def test_single_peers_have_their_own_rates_and_the_others_what_all_have():
    links = build_links(LinksConfig(uplink=Constant(MBIT), peer_uplink={1: 5 * MBIT}, peer_downlink={2: MBIT}), 3, seed=0)
    assert links.uplink.tolist() == [MBIT, 5 * MBIT, MBIT]
    assert links.downlink.tolist() == [math.inf, math.inf, MBIT]


def test_the_latency_of_a_peer_is_that_of_all_its_links_and_of_two_the_longer():
    links = build_links(LinksConfig(latency=Constant(0.01), peer_latency={1: 0.2, 2: 0.1}), 4, seed=0)
    assert [links.latency(0, 3), links.latency(0, 1), links.latency(1, 0), links.latency(2, 1)] == [0.01, 0.2, 0.2, 0.2]


# --------------------------------------------------------------------------------------------------------------- draws


def test_every_peer_draws_its_own_rates_within_the_bounds():
    links = build_links(LinksConfig(uplink=SLOW_TO_FAST), num_peers=100, seed=0)
    assert len(set(links.uplink.tolist())) == 100
    assert links.uplink.min() >= 1 * MBIT and links.uplink.max() < 99 * MBIT


def test_every_directed_pair_draws_its_own_rate_and_keeps_it():
    links = build_links(LinksConfig(pair=SLOW_TO_FAST), num_peers=10, seed=0)
    rates = pair_rates(links)
    assert len(set(rates)) == 90 and rates == pair_rates(links)
    assert all(1 * MBIT <= rate <= 99 * MBIT for rate in rates)


def test_half_of_lognormal_draws_are_below_the_median():
    latencies = Lognormal(0.02, 0.5).draw(np.random.default_rng(0), 10_000)
    below = np.mean(latencies < 0.02)
    assert abs(below - 0.5) < 0.02  # four standard deviations of 10,000 coins
    within = np.mean(np.abs(np.log(latencies / 0.02)) < 0.5)
    assert abs(within - 0.683) < 0.02


def test_the_seed_decides_and_no_quantity_shifts_another():
    config = LinksConfig(uplink=SLOW_TO_FAST, pair=SLOW_TO_FAST)
    more = LinksConfig(uplink=SLOW_TO_FAST, downlink=SLOW_TO_FAST, pair=SLOW_TO_FAST, latency=Uniform(0.01, 0.1))
    first, same, other = build_links(config, 8, seed=1), build_links(more, 8, seed=1), build_links(config, 8, seed=2)
    assert first.uplink.tolist() == same.uplink.tolist() != other.uplink.tolist()
    assert pair_rates(first) == pair_rates(same) != pair_rates(other)
    assert same.uplink.tolist() != same.downlink.tolist()


def test_pairs_of_many_peers_are_drawn_when_first_used_in_any_order(monkeypatch):
    monkeypatch.setattr(links_module, "DRAWN_AT_ONCE", 4)
    config = LinksConfig(pair=SLOW_TO_FAST)
    forward, backward = build_links(config, 5, seed=0), build_links(config, 5, seed=0)
    pairs = list(itertools.permutations(range(5), 2))
    assert {pair: forward.pair(*pair) for pair in pairs} == {pair: backward.pair(*pair) for pair in reversed(pairs)}
    assert len(set(pair_rates(forward))) == 20
    assert all(1 * MBIT <= rate <= 99 * MBIT for rate in pair_rates(forward))


def test_a_drawn_network_of_ten_thousand_peers_holds_no_matrix():
    links = build_links(LinksConfig(pair=SLOW_TO_FAST, latency=Constant(0.05)), num_peers=10_000, seed=0)
    assert not isinstance(links.pair.values, np.ndarray)
    assert links.pair(0, 9_999) != links.pair(9_999, 0) and links.latency(0, 9_999) == 0.05


# ------------------------------------------------------------------------------------------------------------ matrices


def test_a_matrix_gives_rates_in_megabits_and_latencies_in_milliseconds_by_sender_and_receiver(tmp_path):
    path = written(tmp_path, "# three peers\n-, 10, 2.5\n\n1, nan, 0\ninf, 4, 0\n")
    links = build_links(LinksConfig(pair_matrix=path), 3, seed=0)
    assert pair_rates(links) == [10 * MBIT, 2.5 * MBIT, 1 * MBIT, 0.0, math.inf, 4 * MBIT]
    path = written(tmp_path, "0,50\n20,0\n")
    latencies = build_links(LinksConfig(latency_matrix=path), 2, seed=0)
    assert (latencies.latency(0, 1), latencies.latency(1, 0)) == (0.05, 0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1,2\n1,0,2\n", "line 1: a matrix of 2 x 3, where 2 peers need 2 x 2; give a row and a column for each peer"),
        ("0,1\n1,0\n1,1\n", "line 1: a matrix of 3 x 2, where 2 peers need 2 x 2"),
        ("0,1\n1\n", "line 2: a matrix of 2 x 1, where 2 peers need 2 x 2"),
        ("0,1\nfast,0\n", "line 2: could not convert string to float: 'fast'; a matrix holds numbers"),
        ("0,-1\n1,0\n", "line 1: '-1' in column 2 must be at least 0"),
        ("0,nan\n1,0\n", "line 1: 'nan' in column 2 must be at least 0"),
        ("# nothing\n", "is empty; 2 peers need a matrix of 2 x 2"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused_with_its_line_and_a_remedy(tmp_path, text, message):
    assert message in message_of(LinksConfig(pair_matrix=written(tmp_path, text)))


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_a_latency_that_is_no_time_is_refused_with_its_line_and_column(tmp_path, value):
    path = written(tmp_path, f"0,50\n{value},0\n")
    assert f"{path} line 2: '{value}' in column 1 must be at least 0, and finite" in message_of(
        LinksConfig(latency_matrix=path)
    )


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path):
    assert "gone.csv cannot be read: " in message_of(LinksConfig(latency_matrix=str(tmp_path / "gone.csv")))


def test_neighbours_without_a_link_between_them_are_refused_by_name(tmp_path):
    links = build_links(LinksConfig(pair_matrix=written(tmp_path, "0,1,0\n1,0,1\n1,0,0\n")), 3, seed=0)
    with pytest.raises(
        ConfigError, match=r"gives 0 Mbit/s from p0 to p2, p2 to p1, who are neighbours in the topology; give a rate"
    ):
        check_links(links, build_topology("full", 3, 0, {}))


def test_peers_who_are_no_neighbours_need_no_link(tmp_path):
    links = build_links(LinksConfig(pair_matrix=written(tmp_path, "0,1,1\n1,0,0\n1,0,0\n")), 3, seed=0)
    check_links(links, build_topology("star", 3, 0, {}))
    check_links(build_links(LinksConfig(), 3, seed=0), build_topology("full", 3, 0, {}))


# -------------------------------------------------------------------------------------------------------------- traces

TRACE = "time_s,peer,uplink,downlink\n0,p1,8,16\n2.5,p0,1,2\n2.5,p1,4,inf\n10,p0,3,3\n"


def test_a_trace_changes_rates_over_time_and_its_rows_at_zero_are_the_first_ones(tmp_path):
    links = build_links(LinksConfig(uplink=Constant(MBIT), trace=written(tmp_path, TRACE)), 2, seed=0)
    assert links.uplink.tolist() == [1 * MBIT, 8 * MBIT] and links.downlink.tolist() == [math.inf, 16 * MBIT]
    assert (
        list(links.timeline())
        == list(links.changes)
        == [
            Change(0.0, 1, 8 * MBIT, 16 * MBIT),
            Change(2.5, 0, 1 * MBIT, 2 * MBIT),
            Change(2.5, 1, 4 * MBIT, math.inf),
            Change(10.0, 0, 3 * MBIT, 3 * MBIT),
        ]
    )
    assert not links.is_unlimited


def test_a_network_that_only_its_trace_limits_is_limited(tmp_path):
    path = written(tmp_path, "time_s,peer,uplink,downlink\n5,p0,1,1\n")
    assert not build_links(LinksConfig(trace=path), 2, seed=0).is_unlimited


def test_a_trace_may_repeat_with_its_last_row_as_the_period(tmp_path):
    links = build_links(LinksConfig(trace=written(tmp_path, TRACE), trace_repeat=True), 2, seed=0)
    times = [(change.time_s, change.index) for change in itertools.islice(links.timeline(), 9)]
    assert times == [(0, 1), (2.5, 0), (2.5, 1), (10, 0), (10, 1), (12.5, 0), (12.5, 1), (20, 0), (20, 1)]


@pytest.mark.parametrize("ends_s", ["0", "1e-09", "0.00099"])
def test_a_trace_without_a_period_cannot_repeat(ends_s, tmp_path):
    path = written(tmp_path, f"time_s,peer,uplink,downlink\n0,p0,1,1\n{ends_s},p1,1,1\n")
    told = f"ends at {ends_s} s, so it cannot repeat; give a last row at the time of its period, of at least 1 ms"
    assert told in message_of(LinksConfig(trace=path, trace_repeat=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,p0,1", "line 2: 3 columns; the header has 4"),
        ("0,p0,1,fast", "line 2: could not convert string to float: 'fast'; give numbers"),
        ("-1,p0,1,1", "line 2: time_s = -1 must be a number of seconds of at least 0"),
        ("nan,p0,1,1", "line 2: time_s = nan must be"),
        ("5,p0,1,1\n4,p0,1,1", "line 3: time_s = 4 comes after 5; sort the rows by time"),
        ("0,p2,1,1", "line 2: there is no peer 'p2'; peers are p0 to p1"),
        ("0,0,1,1", "line 2: there is no peer '0'; peers are p0 to p1"),
        ("1,p0,1,1\n1,p0,2,1", "line 3: p0 has a row at 1 s already; remove one of them"),
        ("0,p0,0,1", "line 2: uplink = 0, downlink = 1 must be above 0 Mbit/s; a peer that is away belongs into churn.trace"),
        ("0,p0,1,nan", "line 2: uplink = 1, downlink = nan must be above 0 Mbit/s"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused_with_its_line_and_a_remedy(tmp_path, rows, message):
    assert message in message_of(LinksConfig(trace=written(tmp_path, f"time_s,peer,uplink,downlink\n{rows}\n")))


def test_a_trace_without_rows_is_refused_with_its_line_and_an_example(tmp_path):
    path = written(tmp_path, "# rates\ntime_s,peer,uplink,downlink\n\n")
    assert f"{path} line 2: no row comes after the header; give one like '12.5,p0,1,1'" in message_of(LinksConfig(trace=path))


@pytest.mark.parametrize("text", ["", "0,p0,1,1\n", "time_s,peer,online\n"])
def test_a_trace_without_its_header_is_refused_with_the_header_it_needs(tmp_path, text):
    assert "it must be 'time_s,peer,uplink,downlink'" in message_of(LinksConfig(trace=written(tmp_path, text)))
