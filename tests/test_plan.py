"""What a plan says against what virtual runs come to, and the command that prints it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import gossipfl
from gossipfl.cli import main
from gossipfl.protocol.baselines import PROTOCOLS
from gossipfl.scenario import load_scenario
from gossipfl.scenario.planning import Plan, make_plan

MLP = 64 * 128 + 128 + 128 * 10 + 10


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache of data sets for the session, and none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSIPFL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


def scenario(**changes: Any) -> dict[str, Any]:
    """Digits and an mlp of 9,610 parameters: 20 peers, S = 8, R = 2, 20 ms of training a round."""
    return {
        "peers": 20,
        "rounds": 6,
        "clock": "virtual",
        "evaluate_every": 0,
        "training": {"local_steps": 2},
        "gossip": {"segments": 8, "replicas": 2},
    } | changes


def plan(**changes: Any) -> Plan:
    return make_plan(load_scenario(scenario(**changes)))


def ran(folder: Path, **changes: Any) -> tuple[dict[str, Any], float]:
    """The summary of the run, and when the last peer had done the last round: then they only say goodbye."""
    result = gossipfl.run(scenario(**changes), out=folder / "run")
    events = map(json.loads, (result.folder / "events.jsonl").read_text().splitlines())
    return result.summary, max(event["time_s"] for event in events if event["event"] == "round")


# --------------------------------------------------------------------------------------------------- against virtual runs


@pytest.mark.parametrize(
    ("network", "bottleneck"),
    [
        ({"pair": "1Mbit"}, "pair"),
        ({"uplink": "1Mbit"}, "uplink"),
        ({"downlink": "1Mbit"}, "downlink"),
        ({"latency": "50ms"}, "latency"),
        ({}, "compute"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bytes_and_times_are_those_of_the_run(network, bottleneck, tmp_path):
    made = plan(network=network)
    summary, ends_s = ran(tmp_path, network=network)
    assert made.total_bytes == summary["bytes"]["payload"] == 20 * 6 * 2 * MLP * 4
    assert made.received_bytes.mean == summary["bytes"]["payload_per_peer_round"]
    assert made.timing is not None and made.timing.bottleneck == bottleneck
    assert made.timing.total_s == pytest.approx(ends_s, abs=1e-4)
    assert made.timing.round_s == pytest.approx(made.timing.total_s / 6, rel=0.1)
    assert made.notes == ()


@pytest.mark.parametrize(
    ("gossip", "topology"),
    [
        ({"protocol": "fedavg"}, {}),
        ({"protocol": "local"}, {}),
        ({"selection": "all", "mixing": "metropolis_hastings"}, {"kind": "star"}),
        ({"codec": "int8", "segments": 7}, {"kind": "hierarchical"}),
        ({"codec": "topk:0.1"}, {"kind": "ring"}),
        ({"replicas": 3}, {"kind": "regular", "degree": 4, "dynamic": True}),
        ({"selection": "all", "segments": 2}, {"kind": "erdos_renyi", "p": 0.5, "dynamic": True}),
        ({"protocol": "epidemic", "segments": 3}, {}),
        ({"protocol": "epidemic_oracle", "segments": 2, "replicas": 4}, {}),
        ({"protocol": "pairs", "segments": 1}, {}),
    ],
    ids=["fedavg", "local", "all", "int8", "topk", "redrawn", "all, redrawn", "epidemic", "oracle", "pairs"],
)
def test_the_bytes_of_every_protocol_codec_and_selection_are_exact(gossip, topology, tmp_path):
    changes = {"peers": 10, "rounds": 2, "gossip": gossip, "topology": topology, "network": {"uplink": "10Mbit"}}
    made, (summary, ends_s) = plan(**changes), ran(tmp_path, **changes)
    assert made.total_bytes == summary["bytes"]["payload"]
    assert 2 * 10 * made.sent_bytes.mean == pytest.approx(made.total_bytes)
    assert made.timing is not None
    assert made.timing.total_s == pytest.approx(ends_s, abs=1e-4)


@pytest.mark.parametrize("uplink", ["1Gbit", "10Mbit"])
def test_of_fragments_what_is_sent_meanwhile_holds_nobody_up(uplink, tmp_path):
    changes = {"rounds": 4, "gossip": {"protocol": "fragments", "segments": 4}, "network": {"uplink": uplink}}
    made, summary = plan(**changes), gossipfl.run(scenario(**changes), out=tmp_path / "run").summary
    most = 3 * 20 * 2 * MLP * 4
    assert made.total_bytes == summary["bytes"]["payload"] and (made.total_bytes == most) == (uplink == "1Gbit")
    assert made.timing is not None and made.timing.bottleneck == "compute"
    assert made.timing.total_s == pytest.approx(0.08) == summary["seconds"]["virtual"]["run"]


@pytest.mark.parametrize(
    "changes",
    [
        {"peers": 6, "gossip": {"protocol": "fragments", "segments": 3}},
        {"churn": {"kill": [{"peer": "p1", "at": "0.4s"}]}},
        {"seed": 6, "rounds": 20, "churn": {"online": 0.8, "period": "1s"}},
    ],
    ids=["after the last round", "killed", "too late"],
)
def test_bytes_that_no_round_comes_of_are_in_the_plan(changes, tmp_path):
    changes |= {"network": {"uplink": "5Mbit", "latency": "20ms"}, "compute": {"step_time": "30ms"}}
    made, (summary, ends_s) = plan(**changes), ran(tmp_path, **changes)
    assert made.total_bytes == summary["bytes"]["payload"]
    assert made.timing is not None and made.timing.total_s == pytest.approx(ends_s, abs=1e-4) and made.notes == ()


def test_pairs_of_an_odd_number_of_peers_leave_one_out(tmp_path):
    changes = {"peers": 7, "rounds": 3, "gossip": {"protocol": "pairs", "segments": 1}}
    assert plan(**changes).total_bytes == 3 * 6 * MLP * 4
    assert gossipfl.run(scenario(**changes), out=tmp_path / "run").summary["bytes"]["payload"] == 3 * 6 * MLP * 4


def test_a_round_takes_the_latency_there_and_back():
    made = plan(network={"latency": "2s"})
    assert made.timing is not None and made.timing.costs["latency"].seconds == 4.0
    assert made.timing.round_s == pytest.approx(4.02) and made.timing.total_s == pytest.approx(2.0 + 6 * 4.02), "and joining"


@pytest.mark.parametrize("clock", ["local", "netns"])
def test_an_emulated_network_tells_the_time_also_on_real_sockets(clock):
    changes = {"network": {"uplink": "1Mbit", "latency": "20ms"}, "compute": {"step_time": "10ms"}}
    made, virtual = plan(clock=clock, **changes), plan(**changes)
    assert made.timing == virtual.timing and made.timing is not None and made.timing.round_s is not None
    assert any("needs root" in note for note in made.notes) == (clock == "netns")
    assert any("counted with 10 ms a step" in note for note in plan(clock=clock, network={"latency": "1ms"}).notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"network": {"loss": 0.05, "uplink": "100Mbit"}, "gossip": {"segments": 1}},
        {"network": {"latency": "20ms", "jitter": "30ms"}, "gossip": {"max_staleness": float("inf")}},
        {"network": {"uplink": {"kind": "uniform", "low": "1Mbit", "high": "9Mbit"}}, "gossip": {"selection": "bandwidth"}},
        {"churn": {"kill": [{"peer": "p1", "at": "50ms"}], "rejoin": [{"peer": "p1", "at": "90ms"}]}},
        {
            "topology": {"kind": "star"},
            "gossip": {"replicas": 1},
            "network": {"pair": "1Mbit"},
            "training": {"local_epochs": 1},
        },
    ],
    ids=["loss", "jitter, stale", "bandwidth", "churn", "star, uneven"],
)
def test_whatever_slows_a_run_is_in_its_plan(changes, tmp_path):
    made, (summary, ends_s) = plan(**changes), ran(tmp_path, **changes)
    assert made.timing is not None
    assert made.timing.total_s == pytest.approx(ends_s, abs=1e-4)
    assert made.total_bytes == pytest.approx(summary["bytes"]["payload"], rel=0.02)


# ------------------------------------------------------------------------------------------------------------ closed forms


def test_the_server_of_fedavg_sends_and_receives_the_models_of_all_clients():
    made = plan(gossip={"protocol": "fedavg"}, network={"uplink": "1Mbit", "downlink": "1Mbit"})
    assert (made.received_bytes.min, made.received_bytes.max) == (MLP * 4, 19 * MLP * 4)
    assert made.sent_bytes == made.received_bytes
    assert made.timing is not None and made.timing.bottleneck in ("uplink of p0", "downlink of p0")
    # 20 ms of training, then all models into the server and out of it again.
    assert made.timing.round_s == pytest.approx(0.02 + 2 * 19 * MLP * 4 / 125_000, rel=0.01)


@pytest.mark.parametrize("name", ["registered", "own_rounds:Mine"])
def test_a_protocol_of_ones_own_is_planned_like_any_other(name, tmp_path, monkeypatch):
    (tmp_path / "own_rounds.py").write_text("from gossipfl.protocol.gossip import Gossip\n\nclass Mine(Gossip):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PROTOCOLS._functions, "registered", PROTOCOLS.get("gossip"))
    made, known = plan(gossip={"protocol": name}), plan(gossip={})
    assert (made.received_bytes, made.sent_bytes, made.timing) == (known.received_bytes, known.sent_bytes, known.timing)
    more = 20 * 4 * MLP  # nobody knows whether it trains in lockstep
    assert (made.memory_bytes, made.topology, made.parameters) == (known.memory_bytes + more, known.topology, MLP)


def test_a_peer_with_many_neighbours_sends_more():
    made = plan(gossip={"replicas": 1}, topology={"kind": "star"})
    # Each leaf asks the centre for everything; the centre spreads one model over 19 leaves.
    assert made.sent_bytes.max == pytest.approx(19 * MLP * 4)
    assert 20 * made.sent_bytes.mean - made.sent_bytes.max == pytest.approx(MLP * 4)


@pytest.mark.parametrize(
    ("changes", "bottleneck"),
    [
        ({"network": {"uplink": "10Mbit", "peers": {"p3": {"uplink": "1Mbit"}}}}, "uplink of p3"),
        ({"network": {"pair": "100Mbit"}, "compute": {"stragglers": {"peers": ["p5"], "slowdown": 10}}}, "compute of p5"),
        ({"network": {"peers": {"p7": {"latency": "80ms"}}, "latency": "10ms"}, "topology": {"kind": "star"}}, "latency of p7"),
        ({"network": {"loss": "5%", "latency": "30ms"}}, "loss"),
    ],
    ids=["uplink", "compute", "latency", "loss"],
)
def test_who_holds_everybody_up_is_named(changes, bottleneck):
    if changes.get("topology"):
        changes |= {"gossip": {"replicas": 1}}
    made = plan(**changes)
    assert made.timing is not None and made.timing.bottleneck == bottleneck


def test_the_pair_that_holds_everybody_up_is_named(tmp_path):
    rates = np.full((20, 20), 100.0)
    rates[2, 5] = 0.1
    np.savetxt(tmp_path / "mbit.csv", rates, delimiter=",")
    made = plan(network={"pair_matrix": str(tmp_path / "mbit.csv")})
    assert made.timing is not None and made.timing.bottleneck == "pair p2 to p5"
    assert made.timing.costs["pair"].peer == "p2 to p5"


def test_memory_grows_with_the_peers_and_the_versions_kept():
    few, many = plan(), plan(gossip={"versions_kept": 9})
    assert many.memory_bytes - few.memory_bytes == 5 * 20 * MLP * 4
    assert plan(peers=40).memory_bytes - few.memory_bytes == 20 * (4 + 1) * MLP * 4
    assert plan(gossip={"max_staleness": 3}).memory_bytes - few.memory_bytes == 20 * MLP * 4, "one trains while others mix"


def test_of_a_long_run_the_first_rounds_are_rehearsed(monkeypatch):
    whole = plan(network={"uplink": "1Mbit"}, rounds=12)
    monkeypatch.setattr("gossipfl.scenario.planning.rehearsal.MESSAGES", 1000)
    made = plan(network={"uplink": "1Mbit"}, rounds=12)
    assert made.total_bytes == whole.total_bytes == 12 * 20 * 2 * MLP * 4 and whole.notes == ()
    assert made.timing.total_s == pytest.approx(whole.timing.total_s, rel=0.2)
    (note,) = made.notes
    assert re.fullmatch(r"the first [23] of 12 rounds are rehearsed, and the others are taken to be like them", note)


def test_where_nobody_comes_to_the_end_of_a_round_that_is_told():
    made = plan(churn={"kill": [{"peer": f"p{index}", "at": "1ms"} for index in range(20)]})
    assert made.timing is None and made.total_bytes == 0
    assert "nobody comes to the end of a round here; bytes and time are those of none" in made.notes


# ----------------------------------------------------------------------------------------------------------- the command


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["plan", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_a_table_and_what_it_leaves_out():
    code, shown, _ = run("combo", "--set", "network.loss=2%", "--set", "stop.target_accuracy=0.9")
    assert code == 0
    for part in (
        "188,810",
        "bottleneck",
        "a round",
        "spectral gap",
        "[stop] may end it",
    ):
        assert part in shown


def test_the_command_prints_json_and_no_time_for_this_machines_own_clock():
    code, shown, _ = run("quickstart", "--json")
    made = json.loads(shown)
    assert code == 0 and made["clock"] == "local" and made["timing"] is None and "--clock virtual" in made["notes"][0]
    code, shown, _ = run("quickstart", "--json", "--clock", "virtual")
    made = json.loads(shown)
    assert code == 0 and made["notes"] == [] and made["parameters"] == MLP and math.isfinite(made["timing"]["round_s"])
    assert set(made["timing"]["costs"]) == {"compute", "uplink", "downlink", "pair", "latency"}


def test_a_plan_tells_who_has_not_asked_for_virtual_time_what_it_takes_for_granted():
    (note,) = plan(peers=64, clock="auto").notes
    assert note == (
        "64 peers or more run under virtual time, where a local step takes 10 ms and links have no limits; "
        "--clock local has them talk over sockets"
    )
    assert plan(peers=64).notes == plan(clock="auto", network={"latency": "1ms"}).notes == ()
    (note,) = plan(clock="auto", network={"latency": "1ms"}, peers_per_process=1).notes
    assert "under virtual time, where peers_per_process and [transport] play no part; --clock local has" in note


def test_a_run_that_does_not_fit_is_planned_and_ends_as_the_run_itself_would(tmp_path, monkeypatch):
    monkeypatch.setattr("gossipfl.scenario.memory.available_bytes", lambda: 2**30)
    large = ("quickstart", "--clock", "virtual", "--set", "peers=64", "--set", "model_args.hidden=[1500, 1500]")
    code, shown, error = run(*large)
    # 2,364,010 float32 values, 4 versions and 1 more model of each peer; of 1 GiB Python and torch leave 774 MiB.
    told = "peers = 64 with 2,364,010 parameters need about 3.1 GiB and 1.0 GiB are free; 17 peers would fit"
    assert code == 2 and "memory needed / free" in shown and f"gossipfl: the run would be refused: {told}" in error
    code, shown, _ = run(*large, "--json")
    assert code == 2 and told in json.loads(shown)["refused"]
    ran = CliRunner().invoke(main, ["run", *large, "--out", str(tmp_path / "runs" / "large")])
    assert ran.exit_code == 2 and ran.stdout == "" and ran.stderr.startswith(f"gossipfl: {told}")
    assert not (tmp_path / "runs").exists()


def test_where_each_peer_has_a_process_as_many_fit_as_have_one_with_it(monkeypatch):
    monkeypatch.setattr("gossipfl.scenario.memory.available_bytes", lambda: 2**30)
    code, shown, _ = run("quickstart", "--json", "--clock", "netns", "--set", "peers=64")
    assert code == 2 and "; 4 peers would fit" in json.loads(shown)["refused"]  # 250 MiB each, and a third of one


def test_a_run_that_takes_longer_than_its_trace_is_refused_unless_it_says_what_comes_after(tmp_path):
    trace = tmp_path / "rates.csv"
    trace.write_text("time_s,peer,uplink,downlink\n0,p0,5,5\n0.5,p0,10,10\n")
    traced = ("quickstart", "--clock", "virtual", "--set", f"network.trace={trace}")
    code, shown, error = run(*traced, "--json")
    made = json.loads(shown)
    total_s = made["timing"]["total_s"]
    told = f"network.trace ends at 0.5 s, and the run is expected to take {total_s:.4g} s; give rows until then"
    assert code == 2 and made["refused"].startswith(told) and f"the run would be refused: {told}" in error
    ran = CliRunner().invoke(main, ["run", *traced, "--out", str(tmp_path / "runs" / "traced")])
    assert ran.exit_code == 2 and ran.stdout == "" and ran.stderr.startswith(f"gossipfl: {told}")
    assert not (tmp_path / "runs").exists(), "nothing has started"
    for words in ("network.trace_after=hold", "network.trace_after=repeat", "stop.duration=0.4s", "rounds=1"):
        code, shown, _ = run(*traced, "--json", "--set", words, "--set", "compute.speed=10")
        assert code == 0 and json.loads(shown)["refused"] is None


def test_a_trace_of_first_rates_alone_has_no_end(tmp_path):
    (tmp_path / "rates.csv").write_text("time_s,peer,uplink,downlink\n0,p0,5,5\n")
    code, shown, _ = run("quickstart", "--json", "--clock", "virtual", "--set", f"network.trace={tmp_path / 'rates.csv'}")
    assert code == 0 and json.loads(shown)["refused"] is None


def test_a_run_that_nobody_knows_the_duration_of_is_not_refused_for_its_trace(tmp_path):
    (tmp_path / "rates.csv").write_text("time_s,peer,uplink,downlink\n0,p0,5,5\n0.001,p0,10,10\n")
    code, shown, _ = run("quickstart", "--json", "--clock", "local", "--set", f"network.trace={tmp_path / 'rates.csv'}")
    assert code == 0 and json.loads(shown)["refused"] is None, "trainings take as long as this machine needs"


@pytest.mark.parametrize("period", ["90ms", "120ms"])
def test_peers_that_are_gone_before_they_have_trained_are_told_of(period, tmp_path):
    words = ("quickstart", "--clock", "virtual", "--set", "churn.online=0.9", "--set", f"churn.period={period}")
    words += ("--set", "training.local_steps=10", "--set", "compute.step_time=100ms")
    told = "[churn] has a peer there for 0.9 s at a stretch, on average, and a round takes 1 s to train: most are begun in vain"
    _, shown, _ = run(*words, "--json")
    assert any(note.startswith(told) for note in json.loads(shown)["notes"]) == (period == "90ms")
    CliRunner().invoke(main, ["run", *words, "--set", "stop.duration=2s", "--out", str(tmp_path / "run"), "--quiet"])
    warnings = json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"]
    assert any(warning.startswith(told) for warning in warnings) == (period == "90ms")


def test_every_clock_can_be_planned():
    for clock, processes in (("virtual", 1), ("local", 2), ("netns", 8)):
        code, shown, _ = run("quickstart", "--json", "--clock", clock, "--set", "peers_per_process=4")
        made = json.loads(shown)
        assert code == 0 and made["clock"] == clock and made["refused"] is None
        models = 4 + (1 if clock == "virtual" else 2 + 2)
        assert made["memory_bytes"] == 8 * models * MLP * 4 + processes * 250 * 2**20


def test_a_scenario_that_is_wrong_is_refused():
    code, shown, error = run("quickstart", "--set", "gossip.codec=int9")
    assert code == 2 and shown == "" and "did you mean 'int8'?" in error
