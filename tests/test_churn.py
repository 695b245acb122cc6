"""Churn: who is there at the start, who comes and goes when, and traces of it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from gossipfl.errors import ConfigError
from gossipfl.overlay.churn import Change, Churn, ChurnConfig, build_churn

KILLED = (Change(20.0, 3, False), Change(40.0, 3, True))


def written(folder: Path, rows: str) -> str:
    path = folder / "presence.csv"
    path.write_text(f"time_s,peer,online\n{rows}\n")
    return str(path)


def test_without_churn_everybody_is_there_all_the_time():
    churn = build_churn(ChurnConfig(), num_peers=3, seed=0)
    assert churn.is_empty and all(churn.initially_online(index) for index in range(3))
    assert list(churn.changes(math.inf)) == []


def test_a_plan_is_followed_in_the_order_of_time_until_the_run_ends():
    churn = build_churn(ChurnConfig(planned=(KILLED[1], Change(30.0, 0, False), KILLED[0])), num_peers=4, seed=0)
    assert not churn.is_empty and churn.initially_online(3)
    assert list(churn.changes(math.inf)) == [KILLED[0], Change(30.0, 0, False), KILLED[1]]
    assert list(churn.changes(30.0)) == [KILLED[0], Change(30.0, 0, False)]
    assert list(churn.changes(math.inf)) == list(churn.changes(100.0))


def test_a_peer_that_joins_late_is_not_there_before():
    churn = build_churn(ChurnConfig(planned=(Change(10.0, 1, True),)), num_peers=2, seed=0)
    assert [churn.initially_online(index) for index in range(2)] == [True, False]
    assert list(churn.changes(60.0)) == [Change(10.0, 1, True)]


# ----------------------------------------------------------------------------------------------------------- drawn anew


def test_a_change_is_called_as_the_scenario_calls_it():
    planned = (Change(1.0, 2, True), Change(2.0, 0, False), Change(3.0, 0, True), Change(4.0, 2, False), Change(5.0, 2, True))
    churn = Churn(3, planned, traced=(Change(2.5, 1, False), Change(3.5, 1, True)))
    names = [(change.index, churn.name_of(change)) for change in churn.changes(60.0)]
    assert names == [(2, "join"), (0, "kill"), (1, "away"), (0, "rejoin"), (1, "back"), (2, "kill"), (2, "rejoin")]


def test_availability_is_drawn_anew_for_every_peer_in_every_period_after_the_first():
    churn = build_churn(ChurnConfig(online=0.7, period_s=5.0), num_peers=200, seed=0)
    assert not churn.is_empty and all(churn.initially_online(index) for index in range(200))
    online, share = [True] * 200, []
    for _, changes in itertools.groupby(churn.changes(250.0), key=lambda change: change.time_s):
        for change in changes:
            assert change.online != online[change.index] and change.time_s % 5 == 0
            online[change.index] = change.online
        share.append(sum(online) / 200)
    assert len(share) == 50
    assert abs(sum(share) / 50 - 0.7) < 0.02  # four standard deviations of 10,000 draws


def test_the_seed_decides_and_a_longer_run_begins_like_a_shorter_one():
    config = ChurnConfig(online=0.5, period_s=1.0)
    first, other = build_churn(config, 10, seed=1), build_churn(config, 10, seed=2)
    short, long = list(first.changes(5.0)), list(first.changes(10.0))
    assert long[: len(short)] == short and len(long) > len(short)
    assert short != list(other.changes(5.0))


def test_drawn_availability_has_no_end_of_its_own():
    churn = build_churn(ChurnConfig(online=0.5, period_s=1.0), num_peers=2, seed=0)
    assert len(list(itertools.islice(churn.changes(math.inf), 1000))) == 1000


def test_a_killed_peer_stays_away_however_available_it_would_be():
    planned = (Change(20.5, 0, False), Change(40.5, 0, True))
    churn = build_churn(ChurnConfig(planned=planned, online=0.5, period_s=1.0), num_peers=1, seed=0)
    alone = build_churn(ChurnConfig(online=0.5, period_s=1.0), num_peers=1, seed=0)
    changes = list(churn.changes(60.0))
    assert not [change for change in changes if 20.5 < change.time_s < 40.5]
    assert [c for c in changes if c.time_s < 20.5] == [c for c in alone.changes(20.5)]
    assert [c for c in changes if c.time_s > 41] == [c for c in alone.changes(60.0) if c.time_s > 41]


@pytest.mark.parametrize(
    ("killed_s", "back_s"), [(20.5, 40.5), (20.0, 40.0), (20.25, 20.75), (20.0, 21.0), (0.5, 3.0), (7.0, 9.5)]
)
def test_a_gap_in_which_nobody_is_there_changes_nothing_of_what_follows(killed_s, back_s):
    """Beside a peer that nobody kills there is no gap."""
    config = ChurnConfig((Change(killed_s, 0, False), Change(back_s, 0, True)), online=0.5, period_s=1.0)
    alone, beside = (build_churn(config, num_peers, seed=3).changes(60.0) for num_peers in (1, 2))
    assert list(alone) == [change for change in beside if change.index == 0]


@pytest.mark.parametrize(
    "planned", [[Change(9e5, 0, True)], [Change(1e-4, 0, False), Change(9e5, 0, True)]], ids=["late", "back"]
)
def test_who_is_away_for_long_is_not_drawn_for_all_the_while(planned):
    """Else it would take hours."""
    churn = build_churn(ChurnConfig(planned, online=0.5, period_s=1e-3), num_peers=1, seed=0)
    assert churn.is_ever_online()
    back = next(change for change in churn.changes(math.inf) if change.online)
    assert 9e5 <= back.time_s < 9e5 + 0.1


def test_when_everybody_is_killed_for_good_the_draws_end_too():
    planned = tuple(Change(2.5, index, False) for index in range(3))
    changes = list(build_churn(ChurnConfig(planned, online=0.9, period_s=1.0), num_peers=3, seed=0).changes(math.inf))
    assert {change.index for change in changes} == {0, 1, 2} and changes[-1].time_s == 2.5


# -------------------------------------------------------------------------------------------------------------- traces


def test_a_trace_tells_who_is_there_also_before_its_first_row(tmp_path):
    path = written(tmp_path, "0,p0,0\n2,p1,1\n3,p0,1\n4,p2,0\n4.5,p2,0\n")
    churn = build_churn(ChurnConfig(trace=path), num_peers=4, seed=0)
    assert [churn.initially_online(index) for index in range(4)] == [False, False, True, True]
    assert list(churn.changes(60.0)) == [Change(2.0, 1, True), Change(3.0, 0, True), Change(4.0, 2, False)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,p0,yes", "line 2: could not convert string to float: 'yes'; give numbers"),
        ("", "line 1: no row comes after the header; give one like '12.5,p0,1', or leave the trace out"),
        ("0,p0,0.5", "line 2: online = 0.5 must be 0 or 1"),
        ("0,p9,1", "line 2: there is no peer 'p9'; peers are p0 to p3"),
        ("3,p0,1\n2,p0,0", "line 3: time_s = 2 comes after 3; sort the rows by time"),
    ],
)
def test_a_trace_that_cannot_be_right_is_refused_with_its_line(tmp_path, rows, message):
    with pytest.raises(ConfigError) as caught:
        build_churn(ChurnConfig(trace=written(tmp_path, rows)), num_peers=4, seed=0)
    assert message in str(caught.value)
