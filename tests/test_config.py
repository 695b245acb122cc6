"""Scenarios: defaults, files and overrides, what is refused with which remedy, and resolved files that load back."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gossipfl
from gossipfl.errors import ConfigError
from gossipfl.scenario import Scenario, ScenarioError, builtin_scenarios, check_names, load_scenario
from gossipfl.scenario.problems import CALLED_HERE, known_keys


def written(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def message_of(source: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_scenario(source, overrides)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ defaults


def test_an_empty_scenario_is_eight_peers_that_run_twenty_rounds():
    scenario = load_scenario({})
    assert (scenario.peers, scenario.rounds, scenario.min_peers, scenario.peers_per_process) == (8, 20, 4, None)
    assert (scenario.training.local_epochs, scenario.training.local_steps) == (1, None)
    assert (scenario.gossip.segments, scenario.gossip.replicas, scenario.gossip.max_staleness) == (8, 2, 0)
    assert (scenario.gossip.patience, scenario.gossip.quorum) == ("auto", None)
    assert (scenario.data.kind, scenario.data.partition.kind, scenario.topology.kind) == ("digits", "iid", "full")


def test_keyword_arguments_make_the_same_scenario_as_a_dictionary():
    settings = {"peers": 5, "data": {"partition": {"kind": "dirichlet", "alpha": 0.3}}}
    assert Scenario(**settings) == load_scenario(settings) == Scenario.model_validate(settings)


def test_the_numbers_of_numpy_are_those_of_python():
    settings = {
        "peers": 5,
        "seed": 3,
        "central": True,
        "model_args": {"hidden": [8]},
        "topology": {"kind": "regular", "degree": 4},
    }
    of_numpy = {
        "peers": np.int64(5),
        "seed": np.uint8(3),
        "central": np.True_,
        "model_args": {"hidden": (np.int32(8),)},
        "topology": {"kind": "regular", "degree": np.int64(4)},
    }
    assert load_scenario(of_numpy) == Scenario(**of_numpy) == load_scenario(settings)
    assert (
        load_scenario(of_numpy, ["seed.model=1"]).data_seed == 3
        and load_scenario(of_numpy).sha256 == load_scenario(settings).sha256
    )


def test_half_of_the_peers_must_finish_unless_told_otherwise():
    assert load_scenario({"peers": 9}).min_peers == 5
    assert load_scenario({"peers": 9, "min_peers": 9}).min_peers == 9


def test_min_peers_follows_an_override_of_peers():
    assert load_scenario(load_scenario({"peers": 9}), ["peers=4"]).min_peers == 2


def test_peers_are_named_by_their_index():
    assert load_scenario({"peers": 3}).peer_names == ["p0", "p1", "p2"]


def test_local_steps_take_the_place_of_local_epochs():
    training = load_scenario({"training": {"local_steps": 40}}).training
    assert (training.local_epochs, training.local_steps) == (None, 40)


def test_further_keys_of_partition_and_topology_are_their_arguments():
    scenario = Scenario(data={"partition": {"kind": "shards", "shards": 2}}, topology={"kind": "regular", "degree": 4})
    assert scenario.data.partition.args == {"shards": 2}
    assert scenario.topology.args == {"degree": 4}
    assert [scenario.build_topology().degree(index) for index in range(8)] == [4] * 8


def test_the_protocol_seed_decides_the_topology():
    def topology(**seed: int) -> list[list[int]]:
        built = Scenario(peers=30, seed=seed, topology={"kind": "regular"}).build_topology()
        return [list(built.neighbours(index)) for index in range(30)]

    assert topology(protocol=1) == topology(protocol=1, data=5) != topology(protocol=2)


def test_a_scenario_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_scenario({}).peers = 3


# --------------------------------------------------------------------------------------------------------------- seeds


def seeds(scenario: Scenario) -> tuple[int, int, int]:
    return scenario.data_seed, scenario.model_seed, scenario.protocol_seed


def test_one_seed_stands_for_all_three_and_a_table_sets_them_apart(tmp_path):
    assert seeds(load_scenario({"seed": 3})) == (3, 3, 3)
    assert seeds(load_scenario(written(tmp_path, "[seed]\ndata = 1\n"))) == (1, 0, 0)


def test_an_override_of_one_seed_keeps_the_others():
    assert seeds(load_scenario({"seed": 3}, ["seed.data=4"])) == (4, 3, 3)
    assert seeds(load_scenario({}, ["seed.model=4"])) == (0, 4, 0)
    assert seeds(load_scenario({"seed": {"data": 1}}, ["seed=9"])) == (9, 9, 9)


def test_equal_seeds_are_resolved_to_one():
    assert load_scenario({"seed": {"data": 2, "model": 2, "protocol": 2}}).resolved()["seed"] == 2
    assert load_scenario({"seed": {"data": 2}}).resolved()["seed"] == {"data": 2, "model": 0, "protocol": 0}


# ---------------------------------------------------------------------------------------------------- when a run stops


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({"rounds": 30, "stop": {"rounds": 10}}, 10),
        ({"rounds": 10, "stop": {"rounds": 30}}, 10),
        ({"stop": {"rounds": 30}}, 30),
    ],
)
def test_stop_rounds_lowers_the_rounds_or_sets_those_left_out(settings, rounds):
    assert load_scenario(settings).rounds == rounds


@pytest.mark.parametrize(
    ("value", "seconds"), [(90, 90.0), (1.5, 1.5), ("90s", 90.0), ("10min", 600.0), ("1h", 3600.0), ("0.5 h", 1800.0), ("7", 7)]
)
def test_a_duration_is_seconds_or_text_with_a_unit(value, seconds):
    assert load_scenario({"stop": {"duration": value}}).stop.duration == seconds


@pytest.mark.parametrize("value", ["inf", math.inf])
def test_infinite_staleness_may_be_written_as_text_or_number(value):
    assert load_scenario({"gossip": {"max_staleness": value}}).gossip.max_staleness == math.inf


# --------------------------------------------------------------------------------------------------- files and folders


def test_the_name_defaults_to_that_of_the_file_with_odd_letters_replaced(tmp_path):
    assert load_scenario(written(tmp_path, "", "first_try.toml")).name == "first_try"
    assert load_scenario(written(tmp_path, "", "..my try (2).toml")).name == "my-try-2-"
    assert load_scenario(written(tmp_path, "name = 'mine'", "yours.toml")).name == "mine"


def test_the_quickstart_is_found_by_name_and_by_path():
    by_name = load_scenario("quickstart")
    assert by_name == load_scenario(builtin_scenarios()["quickstart"]) == load_scenario(str(builtin_scenarios()["quickstart"]))
    assert by_name.name == "quickstart"
    assert (by_name.peers, by_name.gossip.segments, by_name.gossip.replicas, by_name.central) == (8, 8, 2, True)


@pytest.mark.parametrize("name", builtin_scenarios())
def test_every_built_in_scenario_loads_and_is_called_like_its_file(name):
    assert load_scenario(name).name == name


def test_a_scenario_may_come_from_a_pipe_which_is_read_once():
    reading, writing = os.pipe()
    os.write(writing, b"peers = 5\ngossip.segments = 4\n")
    os.close(writing)
    try:
        scenario = load_scenario(f"/dev/fd/{reading}", ["rounds=2"])
        assert (scenario.name, scenario.peers, scenario.rounds, scenario.gossip.segments) == ("scenario", 5, 2, 4)
        message = message_of(f"/dev/fd/{reading}")
        assert f"/dev/fd/{reading} is a pipe that holds nothing, or was read before; give a scenario as a file" in message
    finally:
        os.close(reading)


def test_the_commented_out_alternatives_of_the_quickstart_are_valid_too():
    text = builtin_scenarios()["quickstart"].read_text()
    parts = {line[2:] for line in text.splitlines() if line.startswith("# ") and (" = " in line or line.startswith("# ["))}
    assert {'kind = "regular"', "[stop]", "local_steps = 10  # or a number of batches instead"} <= parts
    for overrides in (
        ["training.local_steps=10"],
        ["gossip.codec=int8", "gossip.max_staleness=inf"],
        ["topology.kind=regular", "topology.degree=4"],
        ["stop.target_accuracy=0.9", "stop.duration=2min"],
    ):
        load_scenario("quickstart", overrides)


def test_a_name_of_no_file_and_no_built_in_scenario_is_refused_with_a_suggestion():
    message = message_of("quikstart")
    assert "no scenario 'quikstart'" in message and "did you mean 'quickstart'?" in message


def test_the_folder_of_a_run_leads_to_the_scenario_in_it(tmp_path):
    written(tmp_path, "peers = 3\n", "scenario.toml")
    assert message_of(tmp_path) == f"the scenario '{tmp_path}' is a folder; give the file in it, {tmp_path}/scenario.toml"


def test_a_relative_data_path_is_looked_for_beside_the_file_first_then_in_the_current_folder(tmp_path, monkeypatch):
    beside, current = tmp_path / "beside", tmp_path / "current"
    for folder in (beside, current):
        (folder / "both").mkdir(parents=True)
    (current / "only_here").mkdir()
    monkeypatch.chdir(current)
    path = written(beside, "data.path = 'both'")
    assert load_scenario(path).data.path == str(beside / "both")
    assert load_scenario(path, ["data.path=only_here"]).data.path == str(current / "only_here")
    assert load_scenario({"data": {"path": Path("both")}}).data.path == str(current / "both")


def test_a_graph_file_is_looked_for_beside_the_scenario_too(tmp_path):
    written(tmp_path, "3\n0 1\n1 2\n", "line.edges")
    path = written(tmp_path, "peers = 3\ngossip.replicas = 1\n[topology]\nkind = 'file'\npath = 'line.edges'")
    assert list(load_scenario(path).build_topology().neighbours(1)) == [0, 2]


def test_a_missing_data_path_is_refused_with_the_key_the_value_and_a_remedy(tmp_path):
    message = message_of(written(tmp_path, "peers = 2\n[data]\npath = 'gone'"))
    assert "mine.toml:3: data.path = 'gone' does not exist; give a file or folder" in message


@pytest.mark.parametrize(("text", "line"), [("peers = 2\nrounds == 3\n", 2), ("peers = 2\npeers = 3\n", 2), ("[gossip\n", 1)])
def test_broken_toml_is_refused_with_file_and_line(tmp_path, text, line):
    assert f"mine.toml:{line}: " in message_of(written(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    assert "mine.toml cannot be read" in message_of(tmp_path / "mine.toml")


# ----------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_toml_values_or_else_text():
    scenario = load_scenario(
        {},
        [
            *("gossip.segments=4", "peers = 12", "data.partition.alpha=0.1", "name=mine", 'model="cnn"', "central=true"),
            *("gossip.max_staleness=inf", "gossip.codec=topk:0.1", "model_args.hidden=[64, 32]", "stop.duration=90s"),
        ],
    )
    assert (scenario.gossip.segments, scenario.peers, scenario.data.partition.args) == (4, 12, {"alpha": 0.1})
    assert (scenario.name, scenario.model, scenario.central) == ("mine", "cnn", True)
    assert (scenario.gossip.max_staleness, scenario.gossip.codec) == (math.inf, "topk:0.1")
    assert (scenario.model_args, scenario.stop.duration) == ({"hidden": [64, 32]}, 90.0)


@pytest.mark.parametrize(("peers", "replicas"), [(7, 3), (7, 7)])
def test_an_oracle_that_no_graph_fits_is_refused(peers, replicas):
    refused = message_of({"peers": peers, "gossip": {"protocol": "epidemic_oracle", "replicas": replicas}})
    assert f"gossip.replicas = {replicas}" in refused and "\n" not in refused


def test_parts_of_the_key_of_an_override_may_be_quoted_as_in_toml():
    overrides = ["""network.peers."p0".uplink=1Mbit""", """ network . peers.'p1' . downlink = 2Mbit"""]
    scenario = load_scenario({}, [*overrides, """model_args."a.b=c"=5""", '"rounds"=7', 'model_args."\\u00e9"="x=y"'])
    assert scenario == Scenario(
        network={"peers": {"p0": {"uplink": "1Mbit"}, "p1": {"downlink": "2Mbit"}}},
        model_args={"a.b=c": 5, "é": "x=y"},
        rounds=7,
    )


def test_what_an_override_brought_is_not_said_to_stand_in_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("peers = 4\n[network]\nlatency = '1ms'\n")
    assert message_of(file, "network.peers.p3={uplink='0bit'}").startswith("network.peers.p3.uplink = '0bit' must be at least")


def test_the_last_override_of_a_key_wins_and_the_source_is_left_as_it_was():
    source = {"gossip": {"segments": 2}}
    assert load_scenario(source, ["gossip.segments=3", "gossip.segments=4"]).gossip.segments == 4
    assert source == {"gossip": {"segments": 2}}


def test_an_override_of_local_steps_replaces_local_epochs_of_the_file_and_back():
    steps = load_scenario({"training": {"local_epochs": 2}}, ["training.local_steps=5"])
    assert (steps.training.local_epochs, steps.training.local_steps) == (None, 5)
    epochs = load_scenario(steps, ["training.local_epochs=3"])
    assert (epochs.training.local_epochs, epochs.training.local_steps) == (3, None)


def test_a_value_with_line_breaks_sets_no_second_key():
    assert "name = '1\\nrounds = 3' must be made of letters" in message_of({}, "name=1\nrounds = 3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("peers", "the override 'peers' must be key=value, such as gossip.segments=4"),
        ("gossip.=3", "the override 'gossip.=3' must be key=value"),
        ('gossip."segments=3', "must be key=value"),
        ('"gossip"segments=3', "must be key=value"),
        ('network.peers."p0.x".uplink=1Mbit', "network.peers.p0.x: there is no peer 'p0.x'; peers are p0 to p7"),
        ("gossip.segmnets=3", "unknown key 'gossip.segmnets'; did you mean 'gossip.segments'?"),
        ("gossp.segments=3", "unknown key 'gossp'; did you mean 'gossip'?"),
        ("comm_round=3", "unknown key 'comm_round'; 'comm_round' is called 'rounds' here"),
        ("peers.x=3", "unknown key 'peers.x': peers = 8 is no table; override 'peers' itself"),
        ("peers=many", "peers = 'many' must be a whole number"),
        ("central=True", "central = 'True' must be true or false"),
    ],
)
def test_an_override_that_cannot_be_right_gets_the_same_help_as_a_file(override, message):
    assert message in message_of({"peers": 8}, override)


@pytest.mark.parametrize("overrides", ["peers=4", {"peers": 4}, [("peers", 4)]])
def test_overrides_that_are_no_list_of_texts_are_refused(overrides):
    for words in ({}, {"clock": "virtual"}):
        with pytest.raises(ConfigError) as caught:
            gossipfl.run("quickstart", overrides=overrides, **words)
        told = f'overrides = {overrides!r} must be a list of "key=value" texts, such as ["peers=4", "rounds=3"]'
        assert str(caught.value) == told


# ------------------------------------------------------------------------------------------------- what cannot be right


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peers": 0}, "peers = 0 must be at least 1"),
        ({"peers": 2.5}, "peers = 2.5 must be a whole number"),
        ({"peers": "8"}, "peers = '8' must be a whole number"),
        ({"rounds": True}, "rounds = True must be a whole number"),
        ({"rounds": 0}, "rounds = 0 must be at least 1"),
        ({"min_peers": 9}, "min_peers = 9 exceeds peers = 8; lower it"),
        ({"min_peers": 0}, "min_peers = 0 must be at least 1"),
        ({"peers_per_process": 0}, "peers_per_process = 0 must be at least 1"),
        ({"name": "a b"}, "name = 'a b' must be made of letters, digits, '.', '_' and '-'"),
        ({"name": ".."}, "name = '..' must be made of letters"),
        ({"model": ""}, "model = '' must not be empty"),
        ({"model_args": 3}, "model_args = 3 must be a table"),
        ({"model_args": {"x": [None]}}, "model_args = {'x': [None]} holds None; use numbers, text"),
        ({"evaluate_every": -1}, "evaluate_every = -1 must be at least 0"),
        (
            {"evaluate_every": 0, "stop": {"target_accuracy": 0.9}},
            "evaluate_every = 0 with stop.target_accuracy = 0.9: nobody is evaluated before the last round; "
            "set evaluate_every = 1, or give no target",
        ),
        ({"seed": "x"}, "seed = 'x' must be a whole number, or a table of data, model and protocol"),
        ({"seed": -1}, "seed = -1 must be at least 0"),
        ({"seed": {"modle": 1}}, "unknown key 'seed.modle'; did you mean 'seed.model'?"),
        ({"data": {"test_fraction": 1.0}}, "data.test_fraction = 1.0 must be below 1"),
        ({"data": {"test_fraction": 0}}, "data.test_fraction = 0 must be above 0"),
        ({"data": {"calibration_fraction": -0.1}}, "data.calibration_fraction = -0.1 must be at least 0"),
        (
            {"data": {"test_fraction": 0.6, "calibration_fraction": 0.5}},
            "data.test_fraction = 0.6 and data.calibration_fraction = 0.5 leave nothing to train on; lower one of them",
        ),
        ({"data": {"partition": "dirichlet"}}, "data.partition = 'dirichlet' must be a table"),
        ({"data": {"partition": {"alpha": math.nan}}}, "data.partition.alpha = nan holds nan; use numbers, text"),
        (
            {"training": {"local_epochs": 2, "local_steps": 5}},
            "training.local_epochs = 2 and training.local_steps = 5 exclude each other; remove one",
        ),
        ({"training": {"local_steps": 0}}, "training.local_steps = 0 must be at least 1"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate = 0 must be above 0"),
        ({"training": {"learning_rate": math.inf}}, "training.learning_rate = inf must be a finite number"),
        ({"training": {"learning_rate": "0.1"}}, "training.learning_rate = '0.1' must be a number"),
        ({"training": {"momentum": 1.0}}, "training.momentum = 1.0 must be below 1"),
        (
            {"training": {"optimizer": "adan"}},
            "training.optimizer = 'adan' is not known; did you mean 'adam'?; use 'sgd', 'adam'",
        ),
        ({"training": {"buffers": "share"}}, "training.buffers = 'share' is not known; use 'average' or 'local'"),
        ({"training": {"step": "my_step"}}, "training.step = 'my_step' must name a function as package.module:function"),
        ({"training": {"fast_math": 1}}, "training.fast_math = 1 must be true or false"),
        ({"gossip": {"segments": 129}}, "gossip.segments = 129 must be at most 128"),
        ({"gossip": {"segments": 0}}, "gossip.segments = 0 must be at least 1"),
        ({"gossip": {"segmentation": "by_layers"}}, "gossip.segmentation = 'by_layers' is not known; did you mean 'by_layer'?"),
        ({"gossip": {"replicas": 0}}, "gossip.replicas = 0 must be at least 1"),
        ({"gossip": {"codec": 8}}, "gossip.codec = 8 must be text, in quotes"),
        ({"gossip": {"max_staleness": -1}}, "gossip.max_staleness = -1 must be a whole number of rounds of at least 0, or inf"),
        ({"gossip": {"max_staleness": 1.5}}, "gossip.max_staleness = 1.5 must be a whole number of rounds"),
        ({"gossip": {"staleness_exponent": -1}}, "gossip.staleness_exponent = -1 must be at least 0"),
        ({"gossip": {"patience": 0}}, "gossip.patience = 0 must be 'auto' or a number of seconds above 0"),
        ({"gossip": {"patience": "10"}}, "gossip.patience = '10' must be 'auto' or a number of seconds above 0"),
        ({"gossip": {"versions_kept": 0}}, "gossip.versions_kept = 0 must be at least 1"),
        ({"gossip": {"join_timeout_s": 0}}, "gossip.join_timeout_s = 0 must be above 0"),
        ({"gossip": {"quorum": -1}}, "gossip.quorum = -1 must be at least 0"),
        (
            {"gossip": {"mixing": "metropolis_hastings"}},
            "gossip.mixing = 'metropolis_hastings' with gossip.selection = 'uniform' would not average evenly: "
            "its weights are for all neighbours; set gossip.selection = 'all'",
        ),
        (
            {"transport": {"kind": "tpc"}},
            "transport.kind = 'tpc' is not known; did you mean 'tcp'?; use 'tcp', 'ipc' or 'inproc'",
        ),
        ({"stop": {"target_accuracy": 90}}, "stop.target_accuracy = 90 must be at most 1"),
        ({"stop": {"duration": "10m"}}, "stop.duration = '10m' must be a number of seconds above 0, or text such as '90s'"),
        ({"stop": {"duration": 0}}, "stop.duration = 0 must be a number of seconds above 0"),
        ({"stop": {"rounds": 0}}, "stop.rounds = 0 must be at least 1"),
    ],
)
def test_a_value_that_cannot_be_right_is_refused_with_its_key_and_a_remedy(settings, message):
    assert message in message_of(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gossip": {"replicas": 9}}, "gossip.replicas = 9 exceeds the 7 neighbours of p0; lower it or densify the topology"),
        (
            {"topology": {"kind": "grid"}, "gossip": {"replicas": 3}, "peers": 9},
            "gossip.replicas = 3 exceeds the 2 neighbours of p0; lower it or densify the topology",
        ),
        ({"topology": {"kind": "star"}}, "gossip.replicas = 2 exceeds the 1 neighbour of p1; lower it or densify the topology"),
        ({"peers": 2}, "gossip.replicas = 2 exceeds the 1 neighbour of p0; lower it"),
        ({"gossip": {"quorum": 8}}, "gossip.quorum = 8 exceeds the 7 neighbours of p0; lower it or densify the topology"),
        ({"topology": {"kind": "rnig"}}, "unknown topology 'rnig'; did you mean 'ring'?"),
        ({"topology": {"kind": "regular", "degree": 8}}, "topology.degree = 8 needs at least 9 peers, there are 8; lower it"),
        ({"topology": {"kind": "ring", "rewire": 1}}, "unknown key 'topology.rewire' of topology 'ring'; accepted: none"),
        (
            {"topology": {"kind": "file", "path": "no.edges", "dynamic": True}},
            "topology.dynamic = True draws a graph for each round, and topology.kind = 'file' gives one; remove dynamic",
        ),
        ({"topology": {"kind": "file", "path": "no.edges"}}, "topology.path = 'no.edges' does not exist; give the path"),
    ],
)
def test_a_topology_that_does_not_fit_is_refused_with_the_peer_and_a_remedy(settings, message):
    assert message in message_of(settings)


def test_a_disconnected_topology_is_refused_with_its_components(tmp_path):
    graph = written(tmp_path, "4\n0 1\n2 3\n", "two.edges")
    settings = {"peers": 4, "gossip": {"replicas": 1}, "topology": {"kind": "file", "path": str(graph)}}
    message = message_of(settings)
    assert "falls into 2 components" in message and "(p0 p1; p2 p3); add links" in message


def test_a_lone_peer_needs_no_neighbours_and_with_selection_all_replicas_do_not_count():
    assert load_scenario({"peers": 1}).peers == 1
    star = load_scenario({"topology": {"kind": "star"}, "gossip": {"selection": "all", "mixing": "metropolis_hastings"}})
    assert star.gossip.replicas == 2


# ------------------------------------------------------------------------------------- emulated links, devices and churn


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [
        ("10Mbit", 10e6),
        ("1Gbit", 1e9),
        ("500kbit", 500e3),
        ("800bit", 800),
        ("2.5 Mbit/s", 2.5e6),
        ("10Mbps", 10e6),
        ("10mbit", 10e6),
        ("2MB", 16e6),
        ("2MBps", 16e6),
        ("4kB/s", 32e3),
        ("2MiB", 2 * 8 * 2**20),
        ("3KiB/s", 3 * 8 * 2**10),
        ("1e3kbit", 1e6),
        ("unlimited", math.inf),
    ],
)
def test_a_rate_is_text_with_a_unit_of_bits_or_bytes_per_second(text, bits_per_s):
    assert load_scenario({"network": {"uplink": text}}).build_links().uplink.tolist() == [bits_per_s / 8] * 8


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("50ms", 0.05),
        ("2s", 2.0),
        ("100us", 1e-4),
        ("100 µs", 1e-4),
        ("100\u03bcs", 1e-4),
        ("1min", 60.0),
        (0, 0.0),
        (-0.0, 0.0),
    ],
)
def test_a_latency_is_text_with_a_unit(value, seconds):
    scenario = load_scenario({"network": {"latency": value}})
    assert scenario.build_links().latency(0, 1) == seconds
    assert load_scenario(tomllib.loads(scenario.to_toml())) == scenario


@pytest.mark.parametrize(("value", "share"), [("2%", 0.02), ("0.5 %", 0.005), (0.02, 0.02), (0, 0.0)])
def test_loss_is_a_share_or_a_percentage(value, share):
    assert load_scenario({"network": {"loss": value}}).build_links().loss == share


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("churn.online", "50%", 0.5),
        ("stop.target_accuracy", "90 %", 0.9),
        ("stop.target_accuracy", "100%", 1.0),
        ("data.test_fraction", "12.5%", 0.125),
        ("data.calibration_fraction", "0%", 0.0),
        ("gossip.exploration", "57%", 0.57),
        ("inference.alpha", "2%", 0.02),
        ("inference.delta", "0.3%", 0.003),
        ("compute.stragglers.fraction", "7%", 0.07),
        ("network.loss", "0.7%", 0.007),
    ],
)
def test_every_share_may_be_a_percentage_which_is_the_same_as_the_number(key, text, value):
    beside = ["churn.period=1s"] if key == "churn.online" else ["compute.stragglers.slowdown=2"] if "stragglers" in key else []
    in_percent, as_number = (load_scenario({}, [*beside, f"{key}={written}"]) for written in (text, value))
    assert in_percent == as_number and in_percent.sha256 == as_number.sha256
    found: Any = in_percent
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is float


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": {"target_accuracy": "120%"}}, "stop.target_accuracy = '120%' must be at most 1"),
        ({"stop": {"target_accuracy": "most"}}, "stop.target_accuracy = 'most' must be a number"),
        ({"data": {"test_fraction": "0%"}}, "data.test_fraction = 0.0 must be above 0"),
        ({"inference": {"alpha": "0.1"}}, "inference.alpha = '0.1' must be a number"),
    ],
)
def test_a_percentage_keeps_within_the_bounds_of_its_key(settings, message):
    assert message in message_of(settings)


def test_without_its_tables_nothing_is_emulated():
    scenario = load_scenario({})
    assert scenario.build_links().is_ideal and scenario.build_churn().is_empty
    assert scenario.build_devices().step_s.tolist() == [0.01] * 8


def test_the_tables_are_what_links_devices_and_churn_are_built_from(tmp_path):
    text = """\
[network]
uplink = {kind = "uniform", low = "1Mbit", high = "99Mbit"}
downlink = "8Mbit"
latency = {kind = "lognormal", median = "20ms", sigma = 0.5}
jitter = "5ms"
[network.peers.p3]
uplink = "unlimited"
latency = "1s"
[compute]
step_time = "20ms"
speed = {kind = "uniform", low = 1, high = 1}
stragglers = {peers = ["p1"], slowdown = 5}
[compute.classes]
server = {peers = ["p3"], speed = 4}
phone = {peers = ["p0"], step_time = "80ms"}
[compute.peers.p2]
step_time = "1s"
[churn]
kill = [{peer = "p3", at = "20s"}]
rejoin = [{peer = "p3", at = "40s"}]
join = [{peer = "p7", at = 10}]
"""
    scenario = load_scenario(written(tmp_path, text))
    links, devices, churn = scenario.build_links(), scenario.build_devices(), scenario.build_churn()
    assert links.downlink.tolist() == [1e6] * 8 and links.uplink[3] == math.inf and links.jitter_s == 0.005
    assert all(125_000 <= rate < 99 * 125_000 for index, rate in enumerate(links.uplink) if index != 3)
    assert links.latency(0, 1) != links.latency(1, 0) and links.latency(0, 3) == 1.0
    assert devices.step_s[:5].tolist() == [0.08, 0.1, 1.0, 0.005, 0.02]
    assert [churn.initially_online(index) for index in (3, 7)] == [True, False]
    assert [(c.time_s, c.index, c.online) for c in churn.changes(60)] == [(10, 7, True), (20, 3, False), (40, 3, True)]


def test_the_protocol_seed_decides_what_is_emulated():
    def uplink(**seed: int) -> list[float]:
        drawn = {"kind": "uniform", "low": "1Mbit", "high": "99Mbit"}
        return Scenario(seed=seed, network={"uplink": drawn}).build_links().uplink.tolist()

    assert uplink(protocol=1) == uplink(protocol=1, data=5) != uplink(protocol=2)


def test_files_of_the_emulated_network_are_looked_for_beside_the_scenario(tmp_path):
    written(tmp_path, "0,8\n16,0\n", "rates.csv")
    written(tmp_path, "time_s,peer,online\n5,p1,0\n", "presence.csv")
    text = "peers = 2\ngossip.replicas = 1\nnetwork.pair_matrix = 'rates.csv'\nchurn.trace = 'presence.csv'\n"
    scenario = load_scenario(written(tmp_path, text))
    assert scenario.build_links().pair(1, 0) == 2e6
    assert [change.time_s for change in scenario.build_churn().changes(60)] == [5.0]


def test_an_override_of_a_matrix_takes_the_place_of_the_rate_of_pairs_and_back(tmp_path):
    path = written(tmp_path, "0,8\n16,0\n", "rates.csv")
    source = {"peers": 2, "gossip": {"replicas": 1}, "network": {"pair": "1Mbit"}}
    scenario = load_scenario(source, [f"network.pair_matrix={path}"])
    assert scenario.build_links().pair(0, 1) == 1e6
    assert load_scenario(scenario, ["network.pair=4Mbit"]).build_links().pair(0, 1) == 5e5


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"uplink": 100}, 'network.uplink = 100 has no unit; say "100Mbit" (per second), or "100MB" if bytes are meant'),
        ({"uplink": "100"}, "network.uplink = '100' has no unit; say \"100Mbit\""),
        (
            {"uplink": "0Mbit"},
            "network.uplink = '0Mbit' must be at least 1bit (per second); leave the key out where there is no limit",
        ),
        ({"pair": "0.999bit"}, "network.pair = '0.999bit' must be at least 1bit (per second)"),
        (
            {"uplink": {"kind": "uniform", "low": "0.001bit", "high": "1Mbit"}},
            "has low = '0.001bit', which must be at least 1bit (per second)",
        ),
        ({"uplink": "-1Mbit"}, "network.uplink = '-1Mbit' must be a rate above 0 with its unit, such as '100Mbit'"),
        ({"uplink": -5}, "network.uplink = -5 must be a rate above 0 with its unit"),
        ({"uplink": math.nan}, "network.uplink = nan must be a rate above 0 with its unit"),
        ({"pair": "nan"}, "network.pair = 'nan' must be a rate above 0 with its unit"),
        ({"pair": "10Mbits"}, "network.pair = '10Mbits' must be a rate above 0 with its unit"),
        ({"downlink": True}, "network.downlink = True must be a rate above 0 with its unit"),
        ({"latency": math.inf}, "network.latency = inf must be a time of at least 0"),
        (
            {"latency": {"kind": "uniform", "low": "1ms", "high": math.inf}},
            "has high = inf, which must be a time of at least 0",
        ),
        ({"latency": "50 m"}, "network.latency = '50 m' must be a time of at least 0, with its unit, such as '50ms'"),
        ({"latency": -1}, "network.latency = -1 must be a time of at least 0"),
        ({"jitter": math.nan}, "network.jitter = nan must be a time of at least 0"),
        ({"loss": "100%"}, "network.loss = '100%' must be a share of at least 0 and below 1 (100 %), such as 0.02 or '2%'"),
        ({"loss": 2}, "network.loss = 2 must be a share"),
        ({"loss": -0.1}, "network.loss = -0.1 must be a share"),
        (
            {"uplink": {"kind": "normal"}},
            "network.uplink = {'kind': 'normal'} must be one value for all, or {kind = \"uniform\"",
        ),
        ({"uplink": {"kind": "uniform", "low": "1Mbit", "up": 3}}, "must be one value for all, or {kind"),
        ({"uplink": {"kind": "uniform", "low": 1, "high": "2Mbit"}}, 'has low = 1, which has no unit; say "1Mbit"'),
        ({"uplink": {"kind": "uniform", "low": "2Mbit", "high": "1Mbit"}}, "has a low that exceeds its high"),
        (
            {"latency": {"kind": "lognormal", "median": "0s", "sigma": -1}},
            "has sigma = -1, which must be a number from 0 to 10",
        ),
        ({"pair": "1Mbit", "pair_matrix": __file__}, "network.pair and network.pair_matrix exclude each other; remove one"),
        ({"trace": "no.csv"}, "network.trace = 'no.csv' does not exist; give a CSV file, relative to the scenario file"),
        ({"trace": "."}, "is a folder; give a CSV file, relative to the scenario file"),
        ({"uplink": "1e400Mbit"}, "network.uplink = '1e400Mbit' must be finite; say 'unlimited' where there is no limit"),
        ({"trace_after": "hold"}, "network.trace_after = 'hold' comes after no network.trace; give one, or remove it"),
        ({"trace": __file__, "trace_after": "stop"}, "network.trace_after"),
        ({"peers": {"p8": {}}}, "network.peers.p8: there is no peer 'p8'; peers are p0 to p7"),
        ({"peers": {"p1": {"uplink": 3}}}, "network.peers.p1.uplink = 3 has no unit"),
        ({"peers": {"p1": {"uplnk": 3}}}, "unknown key 'network.peers.p1.uplnk'; did you mean 'network.peers.p1.uplink'?"),
        ({"peers": {"p1": {"down": 3}}}, "'down' is called 'network.peers.p1.downlink' here"),
    ],
)
def test_a_network_that_cannot_be_right_is_refused_with_a_remedy(network, message):
    assert message in message_of({"network": network})


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        ({"step_time": 0}, "compute.step_time = 0 must be a time above 0, with its unit, such as '10ms'"),
        ({"speed": 1e-320}, "[compute] gives p0 local steps without end; lower step_time or slowdown, or raise speed"),
        ({"speed": 0}, "compute.speed = 0 must be a factor above 0: 2 = twice as fast"),
        ({"speed": {"kind": "uniform", "low": 0, "high": 2}}, "has low = 0, which must be a factor above 0"),
        ({"variation": -1}, "compute.variation = -1 must be a number from 0 to 10"),
        ({"stragglers": {"fraction": 0.1}}, "compute.stragglers.slowdown is missing; give it"),
        ({"stragglers": {"slowdown": 2}}, "compute.stragglers needs either fraction or peers"),
        ({"stragglers": {"slowdown": 0.5, "fraction": 0.1}}, "compute.stragglers.slowdown = 0.5 must be at least 1"),
        ({"classes": {"phone": {"speed": 2}}}, "compute.classes.phone = {'speed': 2} needs either fraction or peers"),
        ({"classes": {"phone": {"speed": 2, "peers": []}}}, "needs either fraction or peers"),
        ({"classes": {"phone": {"fraction": 0.5}}}, "needs step_time or speed; give one of them"),
        ({"classes": {"phone": {"peers": ["x"], "speed": 2}}}, "compute.classes.phone: there is no peer 'x'"),
        (
            {"classes": {"phone": {"peers": ["p1"], "speed": 2}, "pc": {"peers": ["p1"], "speed": 9}}},
            "compute.classes.pc and phone both name p1; leave it in one of them",
        ),
        (
            {"classes": {"phone": {"fraction": 0.7, "speed": 2}, "pc": {"fraction": 0.5, "speed": 9}}},
            "compute.classes have fractions that add up to 1.2; lower them to 1 at most",
        ),
        ({"classes": {"phone": {"fraction": "1%", "speed": 2}}}, "compute.classes.phone.fraction = 0.01 does not fit 8 peers"),
        ({"stragglers": {"slowdown": 2, "peers": ["p3", "x"]}}, "compute.stragglers: there is no peer 'x'; peers are p0 to p7"),
        ({"peers": {"p9": {"speed": 2}}}, "compute.peers.p9: there is no peer 'p9'"),
    ],
)
def test_devices_that_cannot_be_right_are_refused_with_a_remedy(compute, message):
    assert message in message_of({"compute": compute})


def test_a_message_that_names_its_key_does_not_name_it_twice():
    message = message_of({"compute": {"stragglers": {"slowdown": 2}}})
    assert message == "compute.stragglers needs either fraction or peers to tell who they are; give one of them"


def test_a_key_that_is_like_no_other_is_told_those_of_its_table():
    message = message_of({"gossip": {"nope": 3}})
    assert message.startswith("unknown key 'gossip.nope'; known in [gossip]: protocol, segments, ")


P3_AT_20 = [{"peer": "p3", "at": "20s"}]


@pytest.mark.parametrize(
    ("churn", "message"),
    [
        ({"online": 0, "period": 1}, "churn.online = 0 must be above 0"),
        (
            {"online": 1e-9, "period": 1},
            "churn.online = 1e-09 must be from 0.01 to 0.9999; give such a chance, or leave it and churn.period out",
        ),
        ({"online": 1 - 1e-9, "period": 1}, "churn.online = 0.999999999 must be from 0.01 to 0.9999"),
        (
            {"online": 0.9, "period": "900us"},
            "churn.period = 0.0009 must be at least 1 ms; give a longer time between draws, such as '30s'",
        ),
        ({"online": 0.9}, "churn.online = 0.9 needs churn.period, the time between draws, such as '30s'"),
        ({"period": 9}, "churn.period = 9.0 needs churn.online, the chance to be there"),
        ({"online": 0.9, "period": 9, "trace": __file__}, "churn.online and churn.trace exclude each other"),
        ({"kill": "p3"}, "churn.kill = 'p3' must be a list"),
        ({"kill": [{"peer": "p8", "at": 1}]}, "churn.kill: there is no peer 'p8'; peers are p0 to p7"),
        ({"kill": [{"peer": "p3", "at": 0}]}, "churn.kill.0.at = 0 must be a number of seconds above 0"),
        ({"kill": [{"peer": "p3", "when": 1}]}, "churn.kill.0.at is missing; give it"),
        ({"kill": P3_AT_20 * 2}, "churn.kill of p3 at 20 s is at the same time as its kill; set one"),
        (
            {"kill": P3_AT_20, "rejoin": P3_AT_20},
            "churn.rejoin of p3 at 20 s is at the same time as its kill; set one of them later",
        ),
        (
            {"kill": [{"peer": "p3", "at": 9}, *P3_AT_20]},
            "churn.kill of p3 at 20 s comes after its kill at 9 s; kill it once, or let it rejoin between",
        ),
        ({"rejoin": P3_AT_20}, "churn.rejoin of p3 at 20 s comes after being there from the start; kill it before"),
        (
            {"join": P3_AT_20, "kill": [{"peer": "p3", "at": 9}]},
            "churn.join of p3 at 20 s comes after its kill at 9 s; use rejoin",
        ),
    ],
)
def test_churn_that_cannot_be_right_is_refused_with_a_remedy(churn, message):
    assert message in message_of({"churn": churn})


def test_a_file_that_does_not_fit_the_peers_is_refused_before_anything_starts(tmp_path):
    written(tmp_path, "0,1\n1,0\n", "rates.csv")
    written(tmp_path, "time_s,peer,online\n1,p9,0\n", "presence.csv")
    text = "[network]\npair_matrix = 'rates.csv'\n[churn]\ntrace = 'presence.csv'\n"
    message = message_of(written(tmp_path, text))
    assert "a matrix of 2 x 2, where 8 peers need 8 x 8" in message
    assert "line 2: there is no peer 'p9'; peers are p0 to p7" in message


def test_a_matrix_that_cuts_neighbours_off_is_refused_with_their_names(tmp_path):
    matrix = written(tmp_path, "0,0\n1,0\n", "rates.csv")
    message = message_of({"peers": 2, "gossip": {"replicas": 1}, "network": {"pair_matrix": str(matrix)}})
    assert message.startswith("network.pair_matrix gives 0 Mbit/s from p0 to p1, who are neighbours")


def test_an_unknown_peer_is_told_with_its_line(tmp_path):
    path = written(tmp_path, "peers = 4\n[network.peers.p3]\nuplink = '1Mbit'\n[network.peers.p4]\nuplink = '1Mbit'\n")
    assert message_of(path) == f"{path}:4: network.peers.p4: there is no peer 'p4'; peers are p0 to p3"


def test_the_clock_is_virtual_where_anything_is_emulated_unless_chosen():
    assert load_scenario({}).resolved_clock == "local"
    emulated = {"network": {"latency": "50ms"}, "compute": {"step_time": "1s"}, "churn": {"kill": P3_AT_20}}
    for table, values in emulated.items():
        assert load_scenario({table: values}).resolved_clock == "virtual"
        assert load_scenario({table: values, "clock": "local"}).resolved_clock == "local"
    assert "clock = 'real' is not known; use 'auto'" in message_of({"clock": "real"})


def test_the_clock_of_many_peers_is_virtual_unless_they_ask_for_sockets():
    assert [load_scenario({"peers": peers}).resolved_clock for peers in (63, 64, 1000)] == ["local", "virtual", "virtual"]
    sockets = {"clock": "local"}, {"peers_per_process": 8}, {"transport": {"kind": "ipc"}}, {"inference": {"serve": True}}
    assert {load_scenario({"peers": 64, **asked}).resolved_clock for asked in sockets} == {"local"}


# ---------------------------------------------------------------------------------------------------------- suggestions


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("nodes", "peers"),
        ("num-supernodes", "peers"),
        ("client_num_in_total", "peers"),
        ("n_procs", "peers"),
        ("comm_round", "rounds"),
        ("num-server-rounds", "rounds"),
        ("iterations", "rounds"),
        ("epochs", "training.local_epochs"),
        ("lr", "training.learning_rate"),
        ("fanout", "gossip.replicas"),
        ("k", "gossip.segments"),
        ("chunks", "gossip.segments"),
        ("graph_degree", "topology.degree"),
        ("alpha_list", "gossip.codec"),
        ("compress", "gossip.codec"),
        ("compression", "gossip.codec"),
        ("partition_niid", "data.partition.kind"),
        ("partition_method", "data.partition.kind"),
        ("partition_alpha", "data.partition.alpha"),
        ("test_after", "evaluate_every"),
        ("frequency_of_the_test", "evaluate_every"),
        ("aggregator", "gossip.aggregation"),
        ("strategy", "gossip.aggregation"),
        ("random_seed", "seed"),
        ("up", "network.uplink"),
        ("bandwidth", "network.uplink"),
        ("rate", "network.uplink"),
        ("tcset", "network.uplink"),
        ("down", "network.downlink"),
        ("link", "network.pair"),
        ("delay", "network.latency"),
        ("packet-loss", "network.loss"),
        ("stragglers_ratio", "compute.stragglers"),
        ("online_prob", "churn.online"),
    ],
)
def test_the_names_of_other_frameworks_lead_to_ours(theirs, ours):
    assert message_of({theirs: 1}) == f"unknown key '{theirs}'; '{theirs}' is called '{ours}' here"


def test_a_foreign_name_leads_to_ours_inside_tables_too():
    assert "unknown key 'gossip.fanout'; 'fanout' is called 'gossip.replicas' here" in message_of({"gossip": {"fanout": 3}})
    assert "'data.partition.partition_alpha'; 'partition_alpha' is called 'data.partition.alpha' here" in message_of(
        {"data": {"partition": {"partition_alpha": 0.3}}}
    )
    assert "'topology.graph_degree'; 'graph_degree' is called 'topology.degree' here" in message_of(
        {"topology": {"kind": "regular", "graph_degree": 3}}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local-steps": 3}, "unknown key 'local-steps'; did you mean 'training.local_steps'?"),
        ({"batch-size": 3}, "unknown key 'batch-size'; did you mean 'training.batch_size'?"),
        ({"segments": 3}, "unknown key 'segments'; did you mean 'gossip.segments'?"),
        ({"gossip": {"rounds": 3}}, "unknown key 'gossip.rounds'; did you mean 'rounds' or 'stop.rounds'?"),
        ({"trace": "x.csv"}, "unknown key 'trace'; did you mean 'network.trace' or 'churn.trace'?"),
        ({"latency": "1s"}, "unknown key 'latency'; did you mean 'network.latency'?"),
        ({"learning_rat": 3}, "unknown key 'learning_rat'; did you mean 'training.learning_rate'?"),
        ({"stop": {"target": 0.9}}, "unknown key 'stop.target'; did you mean 'stop.target_accuracy'?"),
        ({"target": 0.9}, "unknown key 'target'; did you mean 'stop.target_accuracy'?"),
        ({"training": {"local": 3}}, "unknown key 'training.local'; did you mean 'training.local_steps'?"),
        ({"training": {"reset": True}}, "unknown key 'training.reset'; did you mean 'training.reset_optimizer'?"),
        ({"num_cleints": 3}, "unknown key 'num_cleints'; did you mean 'num_clients', which is called 'peers' here?"),
        ({"comm_roud": 3}, "unknown key 'comm_roud'; did you mean 'comm_round', which is called 'rounds' here?"),
        (
            {"gossip": {"compresion": "int8"}},
            "unknown key 'gossip.compresion'; did you mean 'compression', which is called 'gossip.codec' here?",
        ),
        ({"seed": {"zzz": 3}}, "unknown key 'seed.zzz'; known in [seed]: data, model, protocol"),
    ],
)
def test_a_key_in_the_wrong_place_or_spelling_leads_to_the_right_one(settings, message):
    assert message_of(settings) == message


def test_every_suggested_key_exists_and_no_foreign_name_is_one_of_ours():
    known = {*known_keys(Scenario), "data.partition.alpha", "topology.degree", "topology.path"}
    assert set(CALLED_HERE.values()) <= known
    assert not set(CALLED_HERE) & known


def test_all_problems_of_a_file_are_told_at_once_each_with_its_line_in_the_files_order(tmp_path):
    text = """\
rounds = 0
[gossip]
segmnets = 4
replicas = 'two'
[training]
local_epochs = 1
local_steps = 2
"""
    path = written(tmp_path, text)
    with pytest.raises(ScenarioError) as caught:
        load_scenario(path, ["peers=0"])
    assert str(caught.value).splitlines() == [
        f"{path}:1: rounds = 0 must be at least 1",
        f"{path}:3: unknown key 'gossip.segmnets'; did you mean 'gossip.segments'?",
        f"{path}:4: gossip.replicas = 'two' must be a whole number",
        f"{path}:5: training.local_epochs = 1 and training.local_steps = 2 exclude each other; remove one",
        "peers = 0 must be at least 1",  # from the override
    ]
    assert {problem.key for problem in caught.value.problems} == {
        *("rounds", "gossip.segmnets", "gossip.replicas", "training", "peers")
    }


def test_no_message_is_a_traceback_of_pydantic():
    with pytest.raises(ScenarioError) as caught:
        Scenario(peers="x", gossip={"mixing": []}, stop={"duration": {}}, topology=[], nonsense=1)
    assert caught.value.__suppress_context__
    assert "pydantic" not in str(caught.value) and "http" not in str(caught.value)
    assert caught.value.exit_code == 2


# --------------------------------------------------------------------------------------------------- names in registries


def test_the_quickstart_names_only_what_exists():
    check_names(load_scenario("quickstart"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.kind=digts", "unknown data set 'digts'; did you mean 'digits'?"),
        ("data.partition.kind=dirichelt", "unknown partition 'dirichelt'; did you mean 'dirichlet'?"),
        ("gossip.aggregation=mediam", "gossip.aggregation: unknown aggregation rule 'mediam'; did you mean 'median'?"),
        ("gossip.protocol=gosip", "gossip.protocol: unknown protocol 'gosip'; did you mean 'gossip'?"),
        ("gossip.protocol=D-PSGD", "; D-PSGD is protocol = 'gossip', selection = 'all', mixing = 'metropolis_hastings' here"),
        ("gossip.selection=unifrom", "gossip.selection: unknown selection 'unifrom'; did you mean 'uniform'?"),
    ],
)
def test_a_name_that_no_registry_knows_is_refused_with_a_suggestion(override, message):
    with pytest.raises(ConfigError) as caught:
        check_names(load_scenario("quickstart", [override]))
    assert message in str(caught.value)


def test_what_a_program_has_registered_is_known_without_naming_a_module(monkeypatch):
    from gossipfl.learning.models import MODELS
    from gossipfl.segments.codecs import CODECS

    for table, name, like in ((MODELS, "mine", "mlp"), (CODECS, "sign", "int8")):
        monkeypatch.setitem(table._functions, name, table.get(like))
    check_names(load_scenario({"model": "mine", "gossip": {"codec": "sign"}}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=mpl", "unknown model 'mpl'; did you mean 'mlp'?"),
        ("gossip.codec=int9", "unknown codec 'int9'; did you mean 'int"),
    ],
)
def test_models_and_codecs_are_checked_where_torch_is_loaded(override, message):
    import torch  # noqa: F401

    with pytest.raises(ConfigError) as caught:
        check_names(load_scenario("quickstart", [override]))
    assert message in str(caught.value)


# --------------------------------------------------------------------------------------------------- resolved scenarios


def test_a_resolved_scenario_has_every_default_and_leaves_out_what_is_none():
    resolved = load_scenario({"gossip": {"max_staleness": "inf"}}).resolved()
    assert resolved["gossip"]["max_staleness"] == math.inf and resolved["min_peers"] == 4
    assert resolved["training"]["local_epochs"] == 1 and "local_steps" not in resolved["training"]
    assert "quorum" not in resolved["gossip"]
    assert not {"network", "compute", "churn", "stop"} & set(resolved)


def test_the_digest_covers_every_setting_but_the_name_and_the_clock():
    scenario = load_scenario("quickstart")
    assert len(scenario.sha256) == 64
    assert load_scenario(scenario, ["name=other", "clock=virtual"]).sha256 == scenario.sha256
    for change in (
        "seed.model=1",
        "topology.kind=ring",
        "data.partition.alpha=0.4",
        "gossip.max_staleness=inf",
        "central=false",
        "network.latency=50ms",
        "compute.step_time=20ms",
        'churn.kill=[{peer = "p3", at = "20s"}]',
    ):
        assert load_scenario(scenario, [change]).sha256 != scenario.sha256


def test_the_digest_does_not_depend_on_how_a_setting_was_written():
    written_out = {"seed": {"data": 1, "model": 1, "protocol": 1}, "training": {"learning_rate": 1}, "min_peers": 4}
    assert load_scenario(written_out).sha256 == load_scenario({"seed": 1, "training": {"learning_rate": 1.0}}).sha256
    one, other = {"uplink": "1Gbit", "latency": "50ms", "loss": "2%"}, {"uplink": "1000Mbit", "latency": "0.05s", "loss": 0.02}
    assert load_scenario({"network": one}).sha256 == load_scenario({"network": other}).sha256


def test_a_scenario_passes_to_another_process():
    scenario = load_scenario("quickstart")
    assert pickle.loads(pickle.dumps(scenario)) == scenario  # noqa: S301 (our own bytes)


toml_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
argument_names = st.text('abcxyz_-. "é', min_size=1, max_size=6).map(lambda name: f"my_{name}")


rates = st.builds("{}{}".format, st.floats(1, 1e6), st.sampled_from(["bit", "kbit", "Mbit/s", "MB", "MiB", "Gbps"]))
delays = st.builds("{}{}".format, st.floats(1e-3, 1e3), st.sampled_from(["us", "ms", "s"]))


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    """Settings that are valid, over most kinds of values."""
    optional: dict[str, st.SearchStrategy[Any]] = {
        "name": st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,8}", fullmatch=True),
        "seed": st.integers(0, 2**63 - 1)
        | st.fixed_dictionaries({}, optional={"data": st.integers(0, 9), "model": st.just(1)}),
        "peers": st.integers(4, 50),
        "min_peers": st.integers(1, 4),
        "central": st.booleans(),
        "model_args": st.dictionaries(argument_names, toml_values, max_size=2),
        "training": st.fixed_dictionaries(
            {}, optional={"local_steps": st.integers(1, 9), "learning_rate": st.floats(1e-300, 1e300), "threads": st.just(2)}
        ),
        "gossip": st.fixed_dictionaries(
            {},
            optional={
                "max_staleness": st.integers(0, 5) | st.just(math.inf) | st.just("inf"),
                "patience": st.just("auto") | st.integers(1, 9) | st.floats(1e-3, 1e9),
                "quorum": st.integers(0, 3),
                "selection": st.sampled_from(["uniform", "all"]),
            },
        ),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "partition": st.dictionaries(argument_names, toml_values, max_size=2),
                "args": st.dictionaries(argument_names, toml_values, max_size=2),
            },
        ),
        "network": st.fixed_dictionaries(
            {},
            optional={
                "uplink": rates | st.builds(lambda median: {"kind": "lognormal", "median": median, "sigma": 0.5}, rates),
                "pair": rates | st.just("unlimited"),
                "latency": delays | st.just({"kind": "uniform", "low": 0, "high": "0.3s"}),
                "loss": st.floats(0, 0.99) | st.just("2%"),
                "peers": st.just({"p1": {"uplink": "3Mbit"}, "p2": {}}),
            },
        ),
        "compute": st.fixed_dictionaries(
            {},
            optional={
                "step_time": delays,
                "speed": st.floats(0.1, 10),
                "classes": st.just(
                    {"phone": {"fraction": "50%", "step_time": "80ms"}, "server": {"peers": ["p1"], "speed": 4}}
                ),
                "stragglers": st.just({"fraction": "10%", "slowdown": 5}) | st.just({"peers": ["p1"], "slowdown": 1.5}),
            },
        ),
        "churn": st.fixed_dictionaries(
            {}, optional={"kill": st.just(P3_AT_20), "join": st.just([{"peer": "p2", "at": "1min"}])}
        ),
        "clock": st.sampled_from(["auto", "virtual", "local", "netns"]),
        "stop": st.fixed_dictionaries(
            {}, optional={"rounds": st.integers(1, 99), "duration": st.integers(1, 99) | st.just("1.5h")}
        ),
    }
    return draw(st.fixed_dictionaries({}, optional=optional))


@settings(max_examples=60, deadline=None)
@given(scenarios())
def test_a_resolved_file_loads_back_to_an_equal_scenario_with_an_equal_digest(values):
    scenario = load_scenario(values)
    again = load_scenario(tomllib.loads(scenario.to_toml()))
    assert again == scenario
    assert (again.sha256, again.resolved_clock) == (scenario.sha256, scenario.resolved_clock)
    assert again.resolved() == scenario.resolved() and again.to_toml() == scenario.to_toml()


def test_rates_and_latencies_are_resolved_to_text_with_units():
    network = {
        "uplink": "1250kB",
        "downlink": "0.5MiB",
        "latency": "0.05s",
        "jitter": "100us",
        "peers": {"p1": {"latency": "2s"}},
    }
    resolved = load_scenario({"network": network, "compute": {"step_time": "20ms"}}).resolved()
    assert resolved["network"] == {
        **{"uplink": "10Mbit", "downlink": "4.194304Mbit", "pair": "unlimited", "latency": "50ms", "jitter": "0.1ms"},
        **{"loss": 0.0, "peers": {"p1": {"latency": "2.0s"}}},
    }
    assert resolved["compute"]["step_time"] == "20ms"


# ------------------------------------------------------------------------------------------------------------- imports


def test_reading_a_scenario_loads_no_torch_networkx_sklearn_or_zmq():
    code = (
        "import sys; from gossipfl.scenario.config import load_scenario; load_scenario('quickstart')\n"
        "loaded = {'torch', 'networkx', 'sklearn', 'zmq'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_told_to_who_completes_them():
    assert set(gossipfl.__all__) <= set(dir(gossipfl))


def test_federated_averaging_needs_a_link_from_the_server_to_everybody():
    with pytest.raises(ScenarioError, match="has its server at p0, which is linked to 2 of 7 peers"):
        load_scenario({"gossip": {"protocol": "fedavg", "replicas": 1}, "topology": {"kind": "ring"}})
    with pytest.raises(ScenarioError, match=r"use topology.kind = 'star' or 'full', and no dynamic"):
        load_scenario({"gossip": {"protocol": "fedavg"}, "topology": {"kind": "star", "dynamic": True}})
    load_scenario({"gossip": {"protocol": "fedavg", "replicas": 1}, "topology": {"kind": "star"}})


@pytest.mark.parametrize(
    "table", [{"network": {"latency": 5}}, {"network": {"jitter": "5"}}, {"compute": {"step_time": 0.01}}], ids=str
)
def test_a_time_without_its_unit_is_refused_rather_than_guessed(table):
    with pytest.raises(ScenarioError, match=r"must be a time .*, with its unit, such as"):
        load_scenario(table)


@pytest.mark.parametrize("gossip", [{"protocol": "fedavg"}, {"protocol": "local"}, {"selection": "all"}], ids=str)
def test_replicas_are_not_held_against_a_star_where_they_play_no_part(gossip):
    assert load_scenario({"topology": {"kind": "star"}, "gossip": gossip}).build_topology().degree(1) == 1


def test_a_pair_may_train_in_pairs():
    assert load_scenario({"peers": 2, "gossip": {"protocol": "pairs"}}).gossip.replicas == 2
