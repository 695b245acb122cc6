"""Reproductions: their arms can be run and differ only in what is compared, and their tables say what was measured."""

from __future__ import annotations

import copy
import io
import json
import time
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from gossipfl.cli import main
from gossipfl.errors import ConfigError, DataError
from gossipfl.learning.models import build_model
from gossipfl.scenario.config import load_scenario
from gossipfl.scenario.display import ArmsProgress
from gossipfl.scenario.reproduce import REPRODUCTIONS, Outcome, Reproduction, Row, Table, bacombo, combo, epidemic, mosaic
from gossipfl.scenario.reproduce.bacombo import PARAMETERS
from gossipfl.scenario.reproduce.figures import _share, accuracies, find_data, finished_scenario, run_arms, run_scenario
from gossipfl.scenario.runner import run

AHEAD = "ahead, below the published best"
SCENARIOS = [name for name in REPRODUCTIONS if REPRODUCTIONS.get(name)().run is run_scenario]
ARMS = [(name, full) for name in SCENARIOS for full in (False, True)]


def outcome(mean=0.9, average=0.9, seconds=None, rounds=None, sync_s=1.0) -> Outcome:
    summary = {
        "accuracy": {"mean": mean, "min": mean - 0.1, "average_model": average},
        "consensus_distance": {"last": 0.5},
        "bytes": {"payload_per_peer_round": 2048},
    }
    return Outcome(summary, seconds, rounds, None if rounds is None else 2048.0 * rounds, sync_s)


def rows(table: Table) -> dict[str, Any]:
    return {row.name: row for row in table.rows}


def small_run(scenario: dict[str, Any], folder) -> dict[str, Any]:
    """Two rounds of an arm, without its target; its summary."""
    return run({**copy.deepcopy(scenario), "rounds": 2, "stop": {}}, clock="virtual", out=folder).summary


# --- arms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "full"), ARMS)
def test_every_arm_is_a_scenario(name, full):
    arms = REPRODUCTIONS.get(name)().arms(full)
    assert arms
    for arm in arms.values():  # their data need not be there
        assert load_scenario(arm | {"data": {"kind": arm["data"]["kind"]}}).peers == arm["peers"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_epidemic_learning_and_d_psgd_start_alike_and_move_as_much(tmp_path, seed):
    arms = epidemic().arms(False)
    differing = ("gossip", "topology")
    shared = [
        {key: value for key, value in arms[f"{arm}-{seed}"].items() if key not in differing}
        for arm in ("local", "oracle", "fixed")
    ]
    assert shared[0] == shared[1] == shared[2] and shared[0]["seed"] == seed
    if seed == 0:
        moved = [small_run(arms[f"{arm}-0"], tmp_path / arm)["bytes"]["payload"] for arm in ("local", "oracle", "fixed")]
        assert moved == [2 * 96 * 7 * 4 * 9_610] * 3


@pytest.mark.parametrize("protocol", ["epidemic", "gossip"])
def test_with_any_number_of_segments_as_many_bytes_move(tmp_path, protocol):
    arms = mosaic().arms(False)
    moved = [
        small_run(arms[f"{protocol}-skewed-{segments}-1"], tmp_path / str(segments))["bytes"]["payload"]
        for segments in (1, 4, 16)
    ]
    assert moved == [2 * 32 * 2 * 4 * 9_610] * 3


def test_bacombo_keeps_the_published_ratio_of_sending_to_training():
    """10 to 30 units of time to train, and a model of 25 units at up to 100 a unit of time."""
    for full, data_shape in ((False, (1, 8, 8)), (True, (3, 32, 32))):
        arm = bacombo().arms(full)["bacombo-0.5"]
        scenario = load_scenario(arm)
        model = build_model(scenario.model, data_shape, 10, scenario.model_args, 0)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        assert num_parameters == PARAMETERS[full]
        devices = scenario.build_devices()
        training = [devices.train_s(index, 1, scenario.training.local_steps) for index in range(scenario.peers)]
        sending = 4 * num_parameters / scenario.build_links().uplink[0]
        assert all(10 / 0.25 <= seconds / sending <= 30 / 0.25 for seconds in training)


def test_the_arms_of_bacombo_differ_in_who_is_asked_for_what():
    arms = bacombo().arms(False)
    without = [{key: value for key, value in arm.items() if key not in ("gossip", "compute")} for arm in arms.values()]
    assert all(other == without[0] for other in without)
    assert all(arms[f"{name}-idle"]["gossip"] == arm["gossip"] for name, arm in arms.items() if not name.endswith("-idle"))
    assert {arm["gossip"]["replicas"] for arm in arms.values()} == {5}


def test_bandwidth_aware_rounds_are_shorter_than_uniform_ones_where_all_train_as_long(tmp_path):
    arms = bacombo().arms(False)
    seconds = {}
    for name in ("bacombo-0.2", "combo", "plain"):
        arm = {**copy.deepcopy(arms[name]), "peers": 16, "rounds": 12, "stop": {}, "compute": {}, "evaluate_every": 0}
        seconds[name] = run(arm, clock="virtual", out=tmp_path / name).summary["seconds"]["virtual"]["wait"]
    assert seconds["bacombo-0.2"] < seconds["combo"] < seconds["plain"]


def told(name: str, arm: dict[str, Any], folder) -> str:
    return f"{name} of {arm['data'].get('path', 'nothing')} in {folder.name}"


def test_an_arm_may_be_run_by_a_function_of_the_reproduction(tmp_path):
    arms = {"second": {"data": {"kind": "digits"}}, "first": {"data": {"kind": "idx", "path": "x"}}}
    seen: list[str] = []
    outcomes = run_arms(arms, tmp_path / "here", 1, lambda name, outcome: seen.append(outcome), told)
    assert sorted(seen) == sorted(outcomes.values())
    assert list(outcomes.items()) == [("second", "second of nothing in here"), ("first", "first of x in here")]


TINY = {"peers": 2, "rounds": 1, "gossip": {"replicas": 1}, "network": {"uplink": "1Mbit"}, "central": False}


def tiny() -> Reproduction:
    """Two arms, and a table of their accuracies."""
    arms = {name: TINY | {"seed": seed} for seed, name in enumerate(("first", "second"))}
    return Reproduction(
        lambda full: arms,
        lambda outcomes, full: [Table("tiny", [Row(name, {"is": str(found)}) for name, found in outcomes.items()])],
    )


def test_a_reproduction_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(REPRODUCTIONS._functions, "tiny", tiny)
    monkeypatch.setenv("GOSSIPFL_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"

    def reproduced(*arguments: str) -> tuple[int, str, list[str]]:
        result = CliRunner().invoke(main, ["reproduce", "tiny", "--json", "--jobs", "1", "--out", str(out), *arguments])
        told = [line for line in result.stderr.splitlines() if "of the work" not in line]  # a slow machine tells more
        return result.exit_code, result.stdout, told

    code, tables, told = reproduced()
    assert code == 0 and told[0] == f"2 arms, 1 at once, records in {out}/" and len(told) == 3
    written = {name: (out / name / "summary.json").stat().st_mtime_ns for name in ("first", "second")}

    (out / "second" / "summary.json").unlink()  # as if it had been cut short
    code, again, told = reproduced()
    assert code == 0 and told[1] == "1 of 2 arms found finished there; --force begins again"
    assert [line.partition(":")[0] for line in told[2:]] == ["  2/2  second"]
    assert written["first"] == (out / "first" / "summary.json").stat().st_mtime_ns
    assert json.loads(again)[0]["rows"][0] == json.loads(tables)[0]["rows"][0]

    assert reproduced()[2][1:] == ["2 of 2 arms found finished there; --force begins again"]
    assert [line[:6] for line in reproduced("--force")[2][1:]] == ["  1/2 ", "  2/2 "]
    assert written["first"] != (out / "first" / "summary.json").stat().st_mtime_ns


def test_an_arm_is_found_by_its_scenario_and_its_end(tmp_path):
    arm = TINY | {"stop": {"target_accuracy": 0.01}}
    outcome = run_scenario("arm", arm, tmp_path)
    assert outcome.rounds_to_target == 1 and finished_scenario("arm", arm, tmp_path) == outcome
    summary = tmp_path / "arm" / "summary.json"
    summary.write_text(json.dumps(outcome.summary | {"exit_code": 130}))
    assert finished_scenario("arm", arm, tmp_path) is None
    for changed in ({"seed": 1}, {"rounds": 2}):
        with pytest.raises(ConfigError, match="arm holds a run of another scenario; pass --force to begin again, or another"):
            finished_scenario("arm", arm | changed, tmp_path)
    summary.write_text(json.dumps(outcome.summary | {"version": "0.0.1"}))
    with pytest.raises(ConfigError, match=r"holds a run of gossipfl 0\.0\.1; pass --force"):
        finished_scenario("arm", arm, tmp_path)


def test_the_share_of_the_work_follows_the_rounds_of_running_arms_and_ends_at_all_of_it(tmp_path):
    outcome = run_scenario("half", TINY, tmp_path)
    assert _share(TINY | {"rounds": 4}, tmp_path / "half", 0.0) == 1 / 4
    assert _share(TINY, tmp_path / "half", time.time() + 60) == 0.0  # a record of another time
    assert _share(TINY, tmp_path / "none", 0.0) == 0.0
    shares: list[float] = []
    arms = {"found": TINY | {"rounds": 1000}, "run": TINY | {"rounds": 3}}
    run_arms(arms, tmp_path, 1, finished={"found": outcome}, on_share=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_of_arms_without_rounds_nobody_says_how_much_is_left(tmp_path, monkeypatch):
    shares: list[float | None] = []
    run_arms({"only": {"data": {"path": "x"}}}, tmp_path, 1, run=told, on_share=shares.append)
    assert shares and set(shares) == {None}
    monkeypatch.setattr("gossipfl.scenario.display.ARMS_LINE_S", -1.0)
    console = Console(file=io.StringIO(), width=80)
    with ArmsProgress(console, 2, 1, tmp_path) as progress:
        progress.done("only", "well")
        progress.share(None)
    assert console.file.getvalue().splitlines()[-1] == "  1/2  after 0:00:00"


def test_data_sets_are_found_by_name_and_arms_without_theirs_are_left_out(tmp_path):
    for name in ("mnist", "cifar10-jpg.tar.xz", "cifar100.tar"):
        (tmp_path / name).touch()
    arms = {
        "a": {"data": {"kind": "digits"}},
        "b": {"data": {"kind": "idx", "path": "mnist"}},
        "c": {"data": {"kind": "cifar10"}},
        "d": {"data": {"kind": "idx", "path": "fashion-mnist"}},
    }
    found, missing = find_data(arms, tmp_path)
    assert missing == ["fashion-mnist"] and list(found) == ["a", "b", "c"]
    assert found["a"] == arms["a"] and found["b"]["data"] == {"kind": "idx", "path": str(tmp_path / "mnist")}
    assert found["c"]["data"]["path"] == str(tmp_path / "cifar10-jpg.tar.xz")
    with pytest.raises(DataError, match="--data"):
        find_data({"d": arms["d"]}, tmp_path)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "mnist-"])
def test_combo_is_compared_with_a_server_and_plain_gossip_on_each_data_set(prefix):
    outcomes = dict.fromkeys(combo().arms(False), outcome(seconds=10.0, rounds=10))
    outcomes |= {f"{prefix}server-20": outcome(seconds=25.0, rounds=10), f"{prefix}plain-40": outcome(seconds=31.0, rounds=10)}
    tables = combo().tables(outcomes, False)
    assert len(tables) == 7
    ratios = rows(tables[5 if prefix else 0])
    assert (ratios["20 workers, server"].measured, ratios["20 workers, server"].verdict) == (2.5, "inside")
    assert (ratios["40 workers, plain"].measured, ratios["40 workers, plain"].verdict) == (3.1, "above")
    assert rows(tables[0 if prefix else 5])["20 workers, server"].measured == 1.0


@pytest.mark.parametrize(
    ("full", "there", "num_tables"), [(False, "nothing", 5), (True, "nothing", 1), (True, "mnist", 3), (True, "cifar10", 5)]
)
def test_combo_makes_the_tables_of_the_data_that_are_there(full, there, num_tables, tmp_path):
    (tmp_path / there).mkdir()
    arms, _ = find_data(combo().arms(full), tmp_path)
    assert len(combo().tables(dict.fromkeys(arms, outcome(seconds=10.0, rounds=10)), full)) == num_tables


def bacombo_outcomes(**changes: Outcome) -> dict[str, Outcome]:
    outcomes = dict.fromkeys(bacombo().arms(False), outcome(seconds=10.0, rounds=20))
    return outcomes | changes


def test_bacombo_is_compared_by_the_time_to_the_target():
    changes = {
        "combo": outcome(seconds=15.0, rounds=20, sync_s=3.0),
        "plain": outcome(seconds=8.0, rounds=20),
        "server": outcome(seconds=200.0, rounds=20),
    }
    ratios, idle, details, _ = bacombo().tables(bacombo_outcomes(**changes), False)
    assert [row.measured for row in idle.rows] == [1.0, 1.0, 1.0]
    assert [row.measured for row in ratios.rows] == [1.5, 0.8, 20.0]
    assert [row.verdict for row in ratios.rows] == [AHEAD, "behind", "above the published best"]
    assert ratios.rows[0].values["of synchronising alone"] == "3.00"
    assert 2 * len(details.rows) == len(bacombo().arms(False))


def test_a_target_that_was_not_reached_is_told_and_not_judged():
    ratios, _, details, _ = bacombo().tables(bacombo_outcomes(plain=outcome(mean=0.5)), False)
    plain = ratios.rows[1]
    assert plain.values["measured"] == "target not reached" and plain.verdict == ""
    assert "0.500" in details.rows[-2].values["seconds"]


def test_epidemic_learning_is_compared_by_rounds_and_by_points_over_the_seeds():
    outcomes = {}
    for seed, (fixed, local) in enumerate([(30, 20), (28, 20), (32, 20)]):
        outcomes |= {
            f"fixed-{seed}-timed": outcome(rounds=fixed, seconds=1.0),
            f"local-{seed}-timed": outcome(rounds=local, seconds=1.0),
            f"oracle-{seed}-timed": outcome(rounds=10, seconds=1.0),
            f"fixed-{seed}": outcome(mean=0.80),
            f"local-{seed}": outcome(mean=0.80 + 0.01 * seed),
            f"oracle-{seed}": outcome(mean=0.79),
        }
    assert set(outcomes) == set(epidemic().arms(False))
    quicker, better, after = epidemic().tables(outcomes, False)
    assert rows(quicker)["EL-Local"].measured == pytest.approx(1.5)
    assert rows(quicker)["EL-Local"].values["measured"] == "1.50 (1.40 to 1.60)"
    assert rows(quicker)["EL-Local"].values["rounds"] == "30 / 20, 28 / 20, 32 / 20"
    assert [row.verdict for row in quicker.rows] == [AHEAD, "above the published best"]
    assert rows(better)["EL-Local"].values["measured"] == "+1.0 (+0.0 to +2.0)"
    assert [row.verdict for row in better.rows] == [AHEAD, "behind"]
    assert rows(after)["D-PSGD"].values["accuracy of the peers"] == "0.800 (0.800 to 0.800)"


def test_epidemic_learning_is_not_judged_where_a_seed_did_not_reach_the_target():
    outcomes = dict.fromkeys(epidemic().arms(False), outcome(rounds=20, seconds=1.0))
    quicker, *_ = epidemic().tables(outcomes | {"local-1-timed": outcome()}, False)
    assert rows(quicker)["EL-Local"].verdict == "" and rows(quicker)["EL-Oracle"].verdict == AHEAD


def test_mosaic_is_compared_seed_by_seed_with_whole_models():
    base = {0: 0.60, 1: 0.70, 2: 0.80}
    gain = {("skewed", 4): 0.05, ("skewed", 16): 0.20, ("iid", 4): 0.005, ("iid", 16): -0.03}
    outcomes = {}
    for name in mosaic().arms(False):
        _, partition, segments, seed = name.split("-")
        outcomes[name] = outcome(mean=base[int(seed)] + gain.get((partition, int(segments)), 0.0), average=base[int(seed)])
    gains, details = mosaic().tables(outcomes, False)
    judged = {row.name: row.verdict for row in gains.rows if row.verdict}
    assert judged == {
        "Mosaic, skewed, S = 4": AHEAD,
        "Mosaic, skewed, S = 16": "above the published best",
        "Mosaic, iid, S = 4": "inside",
        "Mosaic, iid, S = 16": "below",
    }
    skewed = rows(gains)["Mosaic, skewed, S = 4"].values
    assert skewed["measured"] == "+5.0 (+5.0 to +5.0)" and skewed["of the average model"] == "+0.0 (+0.0 to +0.0)"
    assert rows(details)["Mosaic, skewed, S = 1"].values["accuracy of the peers"] == "0.700 (0.600 to 0.800)"


def test_an_arm_that_diverged_has_no_distance_in_its_table():
    accuracy = dict.fromkeys(("mean", "min", "average_model"), 0.1)
    summary = {"accuracy": accuracy, "consensus_distance": {"last": None}, "bytes": {"payload_per_peer_round": 1024}}
    assert accuracies([Outcome(summary, None, None, None, 0.0)])["consensus distance"] == "nan (nan to nan)"
