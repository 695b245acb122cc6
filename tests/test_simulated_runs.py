"""Runs under virtual time: the same as on sockets, decided by the seed, with the bytes and times that can be worked out."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import gossipfl
from gossipfl.errors import ConfigError, GossipflError
from gossipfl.learning.checkpoint import load_model
from gossipfl.scenario.display import print_summary
from gossipfl.scenario.launcher import _newest_there
from gossipfl.scenario.results import Observer, RunResult

SMALL = {
    "peers": 5,
    "rounds": 4,
    "seed": 3,
    "model": "mlp",
    "evaluate_every": 2,
    "data": {"partition": {"kind": "dirichlet", "alpha": 0.5}},
    "training": {"local_steps": 3, "batch_size": 16},
    "gossip": {"segments": 4, "replicas": 2},
}


def run(folder: Path, clock: str = "virtual", **changes: Any) -> RunResult:
    scenario = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    for key, value in changes.items():
        scenario[key] = {**scenario.get(key, {}), **value} if isinstance(value, dict) else value
    return gossipfl.run(scenario, clock=clock, out=folder)


def events(result: RunResult, kind: str) -> list[dict[str, Any]]:
    lines = (result.folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize(
    "gossip",
    [
        {},
        {"codec": "int8"},
        {"codec": "topk:0.2"},
        {"protocol": "fedavg", "segments": 1},
        {"selection": "all", "mixing": "metropolis_hastings"},
    ],
    ids=str,
)
def test_a_run_comes_to_the_same_models_as_over_sockets(tmp_path, gossip):
    virtual = run(tmp_path / "virtual", gossip=gossip)
    local = run(tmp_path / "local", clock="local", gossip=gossip)
    assert virtual.summary["models_sha256"] == local.summary["models_sha256"]
    assert virtual.summary["accuracy"] == local.summary["accuracy"]
    assert virtual.summary["bytes"]["payload"] == local.summary["bytes"]["payload"]
    assert virtual.summary["consensus_distance"]["last"] == pytest.approx(local.summary["consensus_distance"]["last"], abs=1e-9)
    assert virtual.summary["consensus_distance"]["first"] == pytest.approx(
        local.summary["consensus_distance"]["first"], abs=1e-9
    )
    assert virtual.summary["scenario_sha256"] == local.summary["scenario_sha256"]
    assert (virtual.summary["clock"], local.summary["clock"]) == ("virtual", "local")


def test_the_seed_decides_a_run_on_an_uncertain_network(tmp_path):
    network = {"uplink": "2Mbit", "latency": {"kind": "uniform", "low": "1ms", "high": "50ms"}, "jitter": "20ms", "loss": "10%"}
    compute = {"step_time": {"kind": "lognormal", "median": "50ms", "sigma": 1.0}, "variation": 0.3}
    first, again = (run(tmp_path / name, network=network, compute=compute) for name in ("first", "again"))
    assert (first.folder / "events.jsonl").read_text() == (again.folder / "events.jsonl").read_text()
    assert first.summary["models_sha256"] == again.summary["models_sha256"]
    other = run(tmp_path / "other", network=network, compute=compute, seed=4)
    assert other.summary["models_sha256"] != first.summary["models_sha256"]


@pytest.mark.parametrize("segments", [1, 4, 7])
def test_a_peer_receives_r_models_a_round(tmp_path, segments):
    result = run(tmp_path / "run", gossip={"segments": segments}, network={"pair": "1Mbit", "latency": "5ms"})
    assert {event["payload_bytes"] for event in events(result, "round")} == {2 * 4 * result.summary["parameters"]}


def test_the_time_of_a_round_is_that_of_its_steps_and_of_the_slowest_link(tmp_path):
    """Two peers, one segment: 3 steps of 0.1 s, a pull of 10 ms, 38,440 bytes at 100 kB/s, and 10 ms to arrive."""
    result = run(
        tmp_path / "run",
        peers=2,
        gossip={"segments": 1, "replicas": 1},
        network={"uplink": "100kB", "latency": "10ms"},
        compute={"step_time": "100ms"},
    )
    ends = sorted({event["time_s"] for event in events(result, "round")})
    assert np.diff(ends) == pytest.approx(0.3 + 0.01 + 4 * result.summary["parameters"] / 1e5 + 0.01, abs=2e-4)


def test_federated_averaging_leaves_everybody_with_the_weighted_mean_of_all(tmp_path):
    result = run(tmp_path / "run", rounds=1, gossip={"protocol": "fedavg", "segments": 1})
    alone = run(tmp_path / "alone", rounds=1, gossip={"protocol": "local"})
    names = [f"p{index}" for index in range(5)]
    trained = [load_model(alone.folder / "models" / f"{name}.safetensors")[1].astype(np.float64) for name in names]
    from gossipfl.learning.datasets import open_dataset
    from gossipfl.scenario.config import load_scenario
    from gossipfl.scenario.preparation import deal, prepare

    scenario = load_scenario(result.folder / "scenario.toml")
    weights = [len(shard) for shard in deal(scenario, open_dataset(prepare(scenario)))]
    expected = np.average(trained, axis=0, weights=weights)
    for name in names:
        assert load_model(result.folder / "models" / f"{name}.safetensors")[1] == pytest.approx(expected, abs=1e-6)


def test_a_server_with_a_narrow_link_takes_as_long_as_all_models_in_and_out(tmp_path):
    network, compute = {"uplink": "1MB", "downlink": "1MB"}, {"step_time": "1us"}
    result = run(tmp_path / "run", gossip={"protocol": "fedavg", "segments": 1}, network=network, compute=compute)
    model_s = 4 * result.summary["parameters"] / 1e6
    ends = [max(event["time_s"] for event in events(result, "round") if event["round"] == round_) for round_ in range(1, 5)]
    assert np.diff(ends) == pytest.approx(2 * 4 * model_s, rel=0.01)


def test_the_summary_tells_virtual_seconds_from_real_ones(tmp_path):
    """Four rounds of 3 steps of 10 s each, which take far less to simulate."""
    result = run(tmp_path / "run", gossip={"protocol": "local"}, compute={"step_time": "10s"})
    seconds = result.summary["seconds"]
    assert seconds["virtual"] == {"run": 120.0, "round_mean": 30.0, "train": 5 * 120.0, "wait": 0.0}
    assert seconds["wall"] < 120.0 and seconds["round_mean"] < 30.0
    assert (seconds["train"], seconds["wait"]) == (seconds["virtual"]["train"], seconds["virtual"]["wait"])
    assert result.summary["virtual_seconds"] == seconds["virtual"]["run"]
    console = Console(record=True, width=120)
    print_summary(console, result)
    text = console.export_text()
    assert "virtual seconds to run / a round" in text and "120.00 / 30" in text and "real seconds to start / to run" in text


def test_the_summary_tells_who_has_which_device(tmp_path):
    compute = {
        "step_time": "1s",
        "classes": {"phone": {"fraction": 0.4, "speed": 0.5}, "server": {"peers": ["p3"], "speed": 4}},
        "stragglers": {"peers": ["p0"], "slowdown": 10},
    }
    result = run(tmp_path / "run", gossip={"protocol": "local"}, compute=compute)
    devices = result.summary["devices"]
    assert devices["classes"]["server"] == ["p3"] and devices["stragglers"] == ["p0"]
    phones = devices["classes"]["phone"]
    for event in events(result, "round"):
        peer = event["peer"]
        step_s = 2.0 if peer in phones else 0.25 if peer == "p3" else 1.0
        assert event["train_s"] == pytest.approx(3 * step_s * (10 if peer == "p0" else 1))
    assert len(phones) == 2 and run(tmp_path / "plain", gossip={"protocol": "local"}).summary["devices"] is None


def test_of_many_peers_that_did_not_finish_the_summary_names_some(tmp_path):
    result = run(tmp_path / "run", gossip={"protocol": "local"})
    dead = {"dead_peers": [f"p{index}" for index in range(1_500)], "dead_as_planned": ["p1"]}
    console = Console(record=True, width=240)
    print_summary(console, replace(result, summary=result.summary | {"faults": result.summary["faults"] | dead}))
    assert "p0, p1 (as planned), p2, p3, p4, p5, p6, p7, p8, p9, and 1,490 more" in console.export_text()


def test_alone_nobody_receives_anything(tmp_path):
    result = run(tmp_path / "run", gossip={"protocol": "local"})
    assert result.exit_code == 0 and result.summary["bytes"]["payload"] == 0
    assert result.summary["faults"]["missing_segments"] == 0


@pytest.mark.parametrize("protocol", ["gossip", "fedavg", "epidemic", "epidemic_oracle", "pairs", "fragments"])
def test_a_lone_peer_trains_alone_by_any_protocol(tmp_path, protocol):
    result = run(tmp_path / "run", peers=1, gossip={"protocol": protocol})
    assert result.exit_code == 0 and result.summary["rounds"] == 4 and result.summary["bytes"]["payload"] == 0


def test_over_links_on_which_a_round_takes_longer_than_the_patience_nothing_is_lost_or_sent_twice(tmp_path):
    """At 20 kbit/s two models (75 KB) take half a minute each round, and the patience is 10 s at first."""
    result = run(tmp_path / "run", network={"uplink": "20kbit"})
    reports = events(result, "round")
    assert sum(report["wait_s"] for report in reports) / len(reports) > 25
    assert [sum(report[key] for report in reports) for key in ("missing", "timeouts", "repeated_bytes")] == [0, 0, 0]
    assert {report["payload_bytes"] for report in reports} == {2 * 4 * 9610}


def test_a_lossy_network_delays_a_run_and_does_not_stop_it(tmp_path):
    result = run(tmp_path / "run", network={"loss": "30%", "latency": "5ms"})
    assert result.exit_code == 0 and len(events(result, "round")) == 5 * 4
    assert result.summary["virtual_seconds"] > run(tmp_path / "lossless", network={"latency": "5ms"}).summary["virtual_seconds"]


def test_in_a_crowd_in_which_not_everybody_has_met_everybody_nobody_lingers_for_long_and_nothing_is_missed(tmp_path):
    """Of 299 neighbours 128 are greeted or greet; of stragglers, in rounds of 0.25 s, most are pulled from by few."""
    result = run(
        tmp_path / "run",
        peers=300,
        rounds=3,
        evaluate_every=0,
        gossip={"segments": 1, "replicas": 1},
        training={"local_steps": 1},
        compute={"step_time": "50ms", "stragglers": {"fraction": 0.1, "slowdown": 5}},
        network={"latency": "20ms"},
    )
    last = max(event["time_s"] for event in events(result, "round"))
    assert result.summary["virtual_seconds"] < last + 1.0
    assert result.summary["faults"]["missing_segments"] == 0 and not events(result, "fault")


def test_a_killed_peer_is_missed_and_one_that_comes_back_adopts_the_newest_model(tmp_path):
    churn = {"kill": [{"peer": "p1", "at": "0.5s"}, {"peer": "p3", "at": "0.5s"}], "rejoin": [{"peer": "p3", "at": "2.5s"}]}
    result = run(tmp_path / "run", rounds=12, churn=churn, compute={"step_time": "100ms"}, network={"latency": "5ms"})
    assert result.summary["faults"]["dead_peers"] == ["p1"]
    last = {event["peer"]: event["round"] for event in events(result, "round")}
    assert all(last[name] == 12 for name in ("p0", "p2", "p3", "p4")) and last["p1"] == 1
    assert any(event["adopted"] for event in events(result, "round") if event["peer"] == "p3")
    assert {(event["peer"], event["kind"]) for event in events(result, "fault")} >= {("p1", "down"), ("p3", "down")}
    planned = [(event["change"], event["peer"], event["time_s"]) for event in events(result, "planned")]
    assert planned == [("kill", "p1", 0.5), ("kill", "p3", 0.5), ("rejoin", "p3", 2.5)]
    assert result.summary["faults"]["dead_as_planned"] == ["p1"]


@pytest.mark.processes
@pytest.mark.parametrize("clock", ["virtual", "local"])
def test_a_run_tells_what_churn_was_planned_for_after_its_end(clock, tmp_path):
    churn = {"kill": [{"peer": "p1", "at": "100s"}], "rejoin": [{"peer": "p1", "at": "110s"}]}
    (warning,) = run(tmp_path / "run", clock=clock, churn=churn, peers_per_process=1, evaluate_every=0).summary["warnings"]
    assert warning.startswith("churn.kill of p1 at 100 s was never due, and 1 more after it: at ")


def test_a_run_in_which_too_few_finish_is_an_error_that_has_the_result(tmp_path):
    with pytest.raises(gossipfl.RunFailed, match="the run failed, for 4 of 5 peers finished; p1: was away") as caught:
        run(tmp_path / "run", min_peers=5, churn={"kill": [{"peer": "p1", "at": "0.1s"}]}, compute={"step_time": "100ms"})
    failed = caught.value
    assert isinstance(failed, gossipfl.GossipflError) and failed.exit_code == failed.result.exit_code == 1
    assert failed.result.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert failed.result.model("p0").keys() == failed.result.model().keys()
    again = copy.copy(failed)  # as it is when it comes from another process
    assert str(again) == str(failed) and again.result == failed.result


@pytest.mark.parametrize("clock", ["virtual", "local"])
def test_a_run_that_is_interrupted_does_not_return_and_has_left_its_record(clock, tmp_path):
    class Interrupts(Observer):
        def event(self, event: dict[str, Any], alive: int) -> None:
            if event["event"] == "round":
                os.kill(os.getpid(), signal.SIGINT)

    overrides = ["rounds=1000000", "transport.kind=inproc", "central=false"]
    with pytest.raises(gossipfl.RunInterrupted, match="interrupted after") as caught:
        gossipfl.run(SMALL, overrides=overrides, clock=clock, out=tmp_path / "run", observer=Interrupts())
    assert isinstance(caught.value, KeyboardInterrupt) and caught.value.result.exit_code == 130
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_code"] == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_interrupted_when_its_peers_are_done_has_left_what_they_came_to(number, tmp_path):
    class Interrupts(Observer):
        def note(self, text: str) -> None:
            if text.startswith("training one model"):
                os.kill(os.getpid(), number)

    with pytest.raises(gossipfl.RunInterrupted) as caught:
        gossipfl.run(SMALL, overrides=["central=true"], clock="virtual", out=tmp_path / "run", observer=Interrupts())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == caught.value.result.summary and summary["exit_code"] == 130
    assert summary["models_sha256"] and summary["accuracy"]["average_model"] and summary["accuracy"]["central"] is None


def test_a_late_joiner_is_not_there_before_its_time(tmp_path):
    churn = {"join": [{"peer": "p4", "at": "1s"}]}
    result = run(tmp_path / "run", rounds=10, churn=churn, compute={"step_time": "100ms"})
    assert min(event["time_s"] for event in events(result, "round")) < 0.4, "nobody waited for it"
    assert min(event["time_s"] for event in events(result, "round") if event["peer"] == "p4") > 1.0
    assert {event["peer"] for event in events(result, "finished") if event["error"] is None} == {f"p{i}" for i in range(5)}


@pytest.mark.processes
def test_the_first_consensus_distance_is_of_those_who_were_in_the_first_round(tmp_path):
    """p4 comes too late to be waited for: the others are in the tenth or later."""
    late = {"peers_per_process": 1, "rounds": 20, "churn": {"join": [{"peer": "p4", "at": "2s"}]}}
    virtual, local = (run(tmp_path / clock, clock, compute={"step_time": "50ms"}, **late) for clock in ("virtual", "local"))
    rounds = [event["round"] for event in events(local, "round") if event["peer"] == "p4"]
    assert 1 < min(rounds) <= max(rounds) == 20
    firsts = [result.summary["consensus_distance"]["first"] for result in (virtual, local)]
    assert firsts[0] == pytest.approx(firsts[1], abs=1e-9)


def test_a_straggler_slows_nobody_who_need_not_wait(tmp_path):
    compute = {"step_time": "100ms", "stragglers": {"peers": ["p2"], "slowdown": 10}}
    together = run(tmp_path / "together", compute=compute)
    apart = run(tmp_path / "apart", compute=compute, gossip={"max_staleness": float("inf")})

    def ended(result: RunResult, name: str) -> float:
        return max(event["time_s"] for event in events(result, "round") if event["peer"] == name)

    assert ended(together, "p0") >= 4 * 3.0
    assert ended(apart, "p0") <= 3.0 + 3 * 0.3 + 0.01  # there is no model of the straggler's to take before its first


@pytest.mark.parametrize("stop", [{"target_accuracy": 0.3}, {"duration": "2s"}], ids=str)
def test_a_run_stops_soon_after_what_was_to_end_it(tmp_path, stop):
    result = run(tmp_path / "run", rounds=200, evaluate_every=1, stop=stop, compute={"step_time": "100ms"})
    assert result.exit_code == 0 and result.summary["rounds"] < 60
    assert len({event["round"] for event in events(result, "finished")}) == 1


CLOCKS = pytest.mark.parametrize("clock", ["virtual", pytest.param("local", marks=pytest.mark.processes)])


@CLOCKS
def test_a_run_that_is_stopped_waits_for_nobody_who_has_yet_to_come(clock, tmp_path):
    changes = {"peers_per_process": 1, "stop": {"duration": "0.5s"}, "churn": {"join": [{"peer": "p4", "at": "1h"}]}}
    result = run(tmp_path / "run", clock, rounds=100_000, compute={"step_time": "50ms"}, **changes)
    assert result.exit_code == 0 and result.summary["faults"]["dead_peers"] == ["p4"]
    assert not events(result, "planned")


@CLOCKS
def test_a_run_that_is_stopped_does_not_wait_out_the_joining_of_who_has_come_too_late(clock, tmp_path):
    changes = {"peers_per_process": 1, "stop": {"duration": "3s"}, "churn": {"join": [{"peer": "p4", "at": "2.5s"}]}}
    changes["gossip"] = {"join_timeout_s": 60, "linger_s": 0.1}
    result = run(tmp_path / "run", clock, rounds=2, compute={"step_time": "50ms"}, **changes)
    (late,) = (event for event in events(result, "finished") if event["peer"] == "p4")
    assert (
        result.exit_code == 0 and late["time_s"] < 30 and re.search("p4: no answer from p0, p1, .* within [23]", late["error"])
    )


def test_who_would_come_when_a_run_is_stopped_does_not_go_on_alone(tmp_path):
    """Rounds take 0.3 s, and the others are in the fourth."""
    churn = {
        "kill": [{"peer": "p1", "at": "0.5s"}],
        "rejoin": [{"peer": "p1", "at": "1.01s"}],
        "join": [{"peer": "p4", "at": "1.02s"}],
    }
    result = run(tmp_path / "run", rounds=200, churn=churn, stop={"duration": "1s"}, compute={"step_time": "100ms"})
    assert result.summary["rounds"] == 4 and result.summary["faults"]["dead_peers"] == ["p1", "p4"]
    assert result.summary["virtual_seconds"] == pytest.approx(1.2, abs=0.01)


def test_a_run_that_is_stopped_once_all_have_begun_anew_does_not_go_on_to_where_they_were(tmp_path):
    """Rounds take 0.3 s: four are done when all are killed. All but p3 begin anew at 1.8 s; 2.2 s is in the second."""
    churn = {
        "kill": [{"peer": f"p{number}", "at": "1.3s"} for number in range(4)],
        "join": [{"peer": "p4", "at": "1.5s"}],
        "rejoin": [{"peer": f"p{number}", "at": "1.5s"} for number in range(3)],
    }
    changes = {"gossip": {"join_timeout_s": 0.3}, "compute": {"step_time": "100ms"}, "stop": {"duration": "2.2s"}}
    result = run(tmp_path / "run", rounds=200, churn=churn, **changes)
    assert {event["round"] for event in events(result, "finished")} == {2}
    assert result.summary["virtual_seconds"] == pytest.approx(2.4, abs=0.01)


def test_over_sockets_a_run_is_stopped_by_the_newest_round_of_those_who_are_there():
    told = [{"event": "round", "peer": peer, "round": round_} for round_ in (1, 2, 3) for peer in ("p0", "p1")]
    assert _newest_there([*told, {"event": "planned", "change": "kill", "peer": "p0"}]) == 3
    gone = [*told, *({"event": "planned", "change": "away", "peer": peer} for peer in ("p0", "p1"))]
    assert _newest_there(gone) == 0
    assert _newest_there([*gone, {"event": "round", "peer": "p1", "round": 1}]) == 1


@CLOCKS
def test_a_target_is_reached_by_those_who_are_there(clock, tmp_path):
    changes = {"peers_per_process": 1, "stop": {"target_accuracy": 0.3}, "churn": {"join": [{"peer": "p4", "at": "1h"}]}}
    result = run(tmp_path / "run", clock, rounds=10_000, evaluate_every=1, compute={"step_time": "50ms"}, **changes)
    assert result.exit_code == 0 and result.summary["faults"]["dead_peers"] == ["p4"]
    assert result.summary["to_target"]["round"] <= result.summary["rounds"] < 60


def test_the_summary_tells_whether_and_when_a_target_was_reached(tmp_path):
    def told(target: float) -> str:
        result = run(tmp_path / str(target), evaluate_every=1, stop={"target_accuracy": target}, compute={"step_time": "1s"})
        console = Console(record=True, width=120)
        print_summary(console, result)
        return next(line for line in console.export_text().splitlines() if "target of" in line).strip("│ ")

    assert re.fullmatch(r"target of 0.15 +│ +after round [1-4], (3|6|9|12)\.00 virtual s", told(0.15))
    assert re.fullmatch(r"target of 0.999 +│ +not reached", told(0.999))


def test_who_comes_and_goes_without_end_does_so_only_while_somebody_is_under_way(tmp_path):
    """Of the six who come back when six have finished nobody stays for the 30 s that joining takes: 0.8 ** 100."""
    network, churn = ["network.uplink=10Mbit", "network.latency=20ms"], ["churn.online=0.8", "churn.period=300ms"]
    small = ["peers=12", "rounds=6", "model_args.hidden=[16]", "gossip.protocol=fedavg", "compute.step_time=5ms"]
    small += ["seed.protocol=9", "min_peers=7"]
    with pytest.raises(gossipfl.RunFailed, match=r"for 6 of 12 peers finished; .* no answer from") as caught:
        gossipfl.run("quickstart", overrides=[*small, *network, *churn], clock="virtual", out=tmp_path / "run")
    assert caught.value.result.summary["virtual_seconds"] < 60


def test_each_evaluated_round_tells_how_far_apart_the_peers_are_and_how_good_their_average_is(tmp_path):
    result = run(tmp_path / "run")
    states = events(result, "state")
    assert [state["round"] for state in states] == [2, 4]
    assert states[-1]["average_accuracy"] == pytest.approx(result.summary["accuracy"]["average_model"], abs=1e-6)
    assert states[-1]["consensus_distance"] == pytest.approx(result.summary["consensus_distance"]["last"])


def test_peers_that_agree_have_no_distance_and_those_that_hardly_differ_have_theirs(tmp_path):
    agreed = run(tmp_path / "agreed", gossip={"protocol": "fedavg", "segments": 1})
    assert [state["consensus_distance"] for state in events(agreed, "state")] == [0.0, 0.0]
    near = run(tmp_path / "near", training={"learning_rate": 1e-6})
    vectors = [load_model(path)[1].astype(float) for path in sorted((near.folder / "models").glob("p*.safetensors"))]
    distance = np.mean([np.sum((vector - np.mean(vectors, axis=0)) ** 2) for vector in vectors])
    assert near.summary["consensus_distance"]["last"] == pytest.approx(distance, rel=1e-6, abs=0)


@pytest.mark.parametrize("clock", ["virtual", "local"])
@pytest.mark.parametrize("force", [True, False])
def test_a_record_that_a_run_is_writing_is_not_replaced(clock, force, tmp_path):
    told: list[str] = []

    class RunsAnother(Observer):
        def event(self, event: dict[str, Any], alive: int) -> None:
            if event["event"] == "round" and not told:
                with pytest.raises(ConfigError) as caught:
                    gossipfl.run(SMALL, clock="virtual", out=tmp_path / "run", force=force)
                told.append(str(caught.value))

    overrides = ["transport.kind=inproc"]
    result = gossipfl.run(SMALL, overrides=overrides, clock=clock, out=tmp_path / "run", observer=RunsAnother())
    assert told == [f"--out {tmp_path}/run is being written to by a run; choose another folder, or wait until it has ended"]
    assert [event["peer"] for event in events(result, "finished")] and result.exit_code == 0
    assert gossipfl.run(SMALL, clock="virtual", out=tmp_path / "run", force=True).exit_code == 0


def test_an_observer_hears_of_all_that_is_written_down_of_rounds(tmp_path):
    heard: list[dict[str, Any]] = []

    class Hears(Observer):
        def event(self, event: dict[str, Any], alive: int) -> None:
            heard.append(event)

    result = gossipfl.run(SMALL, clock="virtual", out=tmp_path / "run", observer=Hears())
    assert [event for event in heard if event["event"] == "state"] == events(result, "state") != []


def dropping(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(math.prod(input_shape), num_classes))


def test_runs_in_threads_come_to_what_each_comes_to_alone_and_leave_the_process_as_it_was(tmp_path):
    before = gc.get_threshold(), torch.random.get_rng_state().tolist()

    def digest(name: str, seed: int) -> str:
        return run(tmp_path / f"{name}{seed}", seed=seed, model=f"{__name__}:dropping").summary["models_sha256"]

    alone = [digest("alone", seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda seed: digest("thread", seed), range(6))) == alone
    assert (gc.get_threshold(), torch.random.get_rng_state().tolist()) == before


def test_the_record_of_an_earlier_run_is_read_from_its_folder(tmp_path):
    result = run(tmp_path / "run")
    again = RunResult.load(tmp_path / "run")
    assert again.summary == result.summary and again.model("p1").keys() == result.model("p1").keys()
    assert again.events("round") == events(result, "round") and {"round", "state"} < {
        event["event"] for event in again.events()
    }
    with pytest.raises(ConfigError, match="nothing holds no record of a run that has ended"):
        RunResult.load(tmp_path / "nothing")


OWN_RULES = """
import numpy as np
def selection(candidates, replicas, links, rng):
    return candidates[:replicas]
def wrong_selection(candidates, replicas, links, rng):
    return candidates[:1] * replicas
def selection_of_none(candidates, replicas, links, rng):
    pass
def aggregation(rows, weights, out=None):
    return np.mean(rows, axis=0)
def aggregation_of_all(rows, weights, out=None):
    return np.mean(rows)
def aggregation_of_none(rows, weights, out=None):
    np.mean(rows, axis=0)
def aggregation_of_half(rows, weights, out=None):
    out[::2] = np.mean(rows, axis=0)[::2]
def aggregation_that_writes(rows, weights, out=None):
    out[:] = np.mean(rows, axis=0)
"""


@pytest.mark.parametrize("clock", ["virtual", "local"])
def test_rules_of_ones_own_are_named_like_a_model_of_ones_own(clock, tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(OWN_RULES)
    monkeypatch.chdir(tmp_path)
    chosen = run(tmp_path / "selection", clock, gossip={"selection": "own_rules:selection"})
    assert {peer for event in events(chosen, "round") for peer in event["received_from"]} == {"p0", "p1", "p2"}
    mixed = run(tmp_path / "aggregation", clock, gossip={"aggregation": "own_rules:aggregation"})  # which leaves `out` alone
    known = run(tmp_path / "known", clock, gossip={"mixing": "uniform"})
    for name, values in mixed.model().items():
        np.testing.assert_allclose(values, known.model()[name], atol=1e-5)


@pytest.mark.parametrize("clock", ["virtual", "local"])
def test_a_selection_that_no_round_would_end_with_is_an_error(clock, tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(OWN_RULES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        GossipflError, match=r"is to pull a segment from p., p., as gossip.selection = 'own_rules:wrong_selection'"
    ):
        run(tmp_path / "run", clock, gossip={"selection": "own_rules:wrong_selection"})


@pytest.mark.parametrize("clock", ["virtual", "local"])
@pytest.mark.parametrize(
    ("key", "rule", "message"),
    [
        ("selection", "selection_of_none", r"segments from \[None, None.*return a list of neighbours for each"),
        ("aggregation", "aggregation_of_all", r"shape \(\) for 3 copies of \d+ values; return an array of \d+ values"),
    ],
)
def test_a_rule_that_returns_something_else_is_told_what_to_return(clock, key, rule, message, tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(OWN_RULES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GossipflError, match=message):
        run(tmp_path / "run", clock, gossip={key: f"own_rules:{rule}"})


@pytest.mark.parametrize("clock", ["virtual", "local"])
@pytest.mark.parametrize("rule", ["aggregation_of_none", "aggregation_of_half"])
def test_a_rule_that_neither_returns_nor_writes_a_mix_is_refused_before_the_run(clock, rule, tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(OWN_RULES)
    monkeypatch.chdir(tmp_path)
    message = rf"gossip\.aggregation = 'own_rules:{rule}' returns None and leaves values of `out` unwritten; return an array"
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", clock, gossip={"aggregation": f"own_rules:{rule}"})
    assert not (tmp_path / "run").exists()


def test_a_rule_that_writes_its_mix_need_not_return_it(tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(OWN_RULES)
    monkeypatch.chdir(tmp_path)
    written, returned = (
        run(tmp_path / rule, gossip={"aggregation": f"own_rules:{rule}"}) for rule in ("aggregation_that_writes", "aggregation")
    )
    assert written.summary["models_sha256"] == returned.summary["models_sha256"]


@pytest.mark.parametrize("clock", ["virtual", "local"])
def test_rules_for_whole_copies_are_refused_parts_on_either_clock(clock, tmp_path):
    with pytest.raises(ConfigError, match=r"gossip.aggregation = 'median' needs whole copies"):
        run(tmp_path / "run", clock, gossip={"aggregation": "median", "codec": "topk:0.2"})


@pytest.mark.parametrize(
    "changes",
    [
        {"churn": {"join": [{"peer": "p4", "at": "2s"}]}},
        {"churn": {"kill": [{"peer": "p1", "at": "0.4s"}], "rejoin": [{"peer": "p1", "at": "2.5s"}]}},
        {
            "gossip": {"max_staleness": float("inf")},
            "compute": {"step_time": "100ms", "stragglers": {"peers": ["p2"], "slowdown": 20}},
        },
    ],
    ids=["a late one", "one that is killed and comes back", "one that skips rounds"],
)
def test_so_does_a_round_that_some_have_no_part_in(tmp_path, changes):
    result = run(tmp_path / "run", rounds=20, evaluate_every=1, **({"compute": {"step_time": "100ms"}} | changes))
    states, reports = events(result, "state"), events(result, "round")
    assert [state["round"] for state in states] == list(range(1, 21))
    parts = [sum(report["round"] == round_ for report in reports) for round_ in range(1, 21)]
    assert min(parts) < 5 and max(parts) == 5
    for state in states:
        last = max(report["time_s"] for report in reports if report["round"] == state["round"])
        assert state["time_s"] <= last
    assert result.summary["consensus_distance"]["first"] == states[0]["consensus_distance"]


def test_what_each_peer_received_from_each_adds_up_to_the_payload(tmp_path):
    result = run(tmp_path / "run")
    received = [event["received_from"] for kind in ("round", "finished") for event in events(result, kind)]
    assert sum(sum(row.values()) for row in received) == result.summary["bytes"]["payload"]
    for event in events(result, "round"):
        assert sum(event["received_from"].values()) == event["payload_bytes"]


def test_more_peers_than_memory_holds_are_refused_and_the_number_that_fits_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"peers = 500 .* parameters need about .* GiB .* \d+ peers would fit"):
        run(tmp_path / "run", peers=500, model="mlp", model_args={"hidden": [8000, 8000]}, topology={"kind": "ring"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("selection", ["uniform", "all"])
def test_where_the_graph_is_redrawn_each_round_goes_over_its_own(tmp_path, selection):
    topology = {"kind": "ring", "dynamic": True}
    gossip = {"selection": selection, "mixing": "metropolis_hastings" if selection == "all" else "uniform"}
    result = run(tmp_path / "virtual", rounds=3, peers=8, topology=topology, gossip=gossip)
    from gossipfl.scenario.config import load_scenario

    graphs = load_scenario(result.folder / "scenario.toml").build_topology().rounds
    allowed = [{f"p{other}" for graph in graphs for other in graph.neighbours(index)} for index in range(8)]
    senders = [
        set().union(*(event["received_from"] for event in events(result, "round") if event["peer"] == f"p{index}"))
        for index in range(8)
    ]
    assert senders == allowed
    local = run(tmp_path / "local", clock="local", rounds=3, peers=8, topology=topology, gossip=gossip)
    assert local.summary["models_sha256"] == result.summary["models_sha256"]
