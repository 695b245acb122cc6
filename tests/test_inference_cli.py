"""Calibrating and planning for what a run has trained, as a person does: `gossipfl run`, `calibrate`, `plan-inference`, ..."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

import gossipfl
from gossipfl.cli import main

SCENARIO = {
    "name": "digits",
    "peers": 3,
    "rounds": 6,
    "central": False,
    "data": {"kind": "digits", "calibration_fraction": 0.5},
    "gossip": {"segments": 2, "replicas": 1},
}


def call(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The record of a short run, calibrated."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    gossipfl.run(SCENARIO, clock="virtual", out=folder)
    code, _, stderr = call("calibrate", folder, "--quiet")
    assert code == 0, stderr
    return folder


def test_a_calibration_is_stored_beside_the_model_and_says_what_it_was_made_with(run):
    stored = json.loads((run / "models" / "average.calibration.json").read_text())
    assert stored["model"] == "average" and stored["made_with"].keys() == {"version", "machine", "torch", "seed"}
    assert stored["catalogue"]["version"] == 6
    assert {certificate["n"] for certificate in stored["certificates"]} == {360}


def test_the_model_of_one_peer_has_a_calibration_of_its_own(run):
    code, stdout, _ = call("calibrate", run, "--model", "p1", "--json", "--quiet")
    assert code == 0 and json.loads(stdout)["model"] == "p1"
    assert (run / "models" / "p1.calibration.json").is_file()


def test_a_plan_names_every_cut_and_the_cheapest(run):
    code, stdout, _ = call("plan-inference", run, "--json", "--max-accuracy-loss", "0.02")
    plan = json.loads(stdout)
    assert code == 0 and [row["cut"] for row in plan["cuts"]] == [0, 1, 2]
    costs = {row["cut"]: row["prediction"]["cost"] for row in plan["cuts"] if not row["obstacle"]}
    assert plan["plan"]["cut"] == min(costs, key=costs.get)


def test_the_device_by_example_gets_a_plan(run):
    code, stdout, stderr = call("plan-inference", run, "--device", "scenarios/devices/phone.toml")
    assert code == 0, stderr
    assert "phone" in stdout and "chosen" in stdout


def test_the_bench_tells_what_was_promised_and_what_was_kept(run):
    code, stdout, _ = call("bench-inference", run, "--json", "--quiet")
    tables = json.loads(stdout)
    assert code == 0
    for row in tables["plans"]:
        assert 0 <= row["payload"] < row["payload_32"] and row["predicted_loss"] <= row["level"]
    assert {row["rule"] for row in tables["thresholds"]} == {"max", "fit99", "fit99.9", "certified"}


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_folder_without_a_run_is_refused(tmp_path):
    code, _, stderr = call("calibrate", tmp_path)
    assert code == 2 and "holds no run" in stderr and "gossipfl run" in stderr


def test_an_unknown_model_is_refused_with_the_known_ones(run):
    code, _, stderr = call("calibrate", run, "--model", "averge")
    assert code == 2 and "did you mean 'average'" in stderr and "p0, p1, p2" in stderr


def test_a_plan_needs_a_calibration(run):
    code, _, stderr = call("plan-inference", run, "--model", "p2")
    assert code == 2 and "gossipfl calibrate" in stderr


def test_a_loss_that_no_plan_keeps_within_is_answered_with_the_nearest(run, tmp_path):
    device = tmp_path / "device.toml"
    device.write_text('memory = "1KiB"\n')
    code, _, stderr = call("plan-inference", run, "--device", device, "--max-accuracy-loss", "-1")
    assert code == 2 and "max_accuracy_loss = -1" in stderr


@pytest.mark.parametrize(("line", "says"), [("memory = 0", "memory"), ("speed = -1", "speed"), ('uplik = "1Mbit"', "uplink")])
def test_a_device_that_cannot_be_is_refused(run, tmp_path, line, says):
    device = tmp_path / "device.toml"
    device.write_text(line + "\n")
    code, _, stderr = call("plan-inference", run, "--device", device)
    assert code == 2 and says in stderr and "Traceback" not in stderr


def test_a_calibration_of_other_weights_is_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.copy(copy / "models" / "p0.safetensors", copy / "models" / "average.safetensors")
    code, _, stderr = call("plan-inference", copy)
    assert code == 2 and "other weights" in stderr


@pytest.mark.parametrize(
    "spoil", [lambda text: text[:100], lambda text: "{}", lambda text: text.replace('"levels"', '"lvels"')]
)
def test_a_calibration_that_was_damaged_is_refused(run, tmp_path, spoil):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    stored = copy / "models" / "average.calibration.json"
    stored.write_text(spoil(stored.read_text()))
    code, _, stderr = call("plan-inference", copy)
    assert code == 2 and "calibrate" in stderr and "Traceback" not in stderr


def test_a_certificate_that_cannot_be_given_says_how_many_samples_it_takes(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    code, stdout, _ = call("calibrate", copy, "--alpha", "0.001", "--quiet")
    assert code == 0 and "2995" in stdout


def test_statistics_that_stayed_local_cannot_be_served(tmp_path):
    folder = tmp_path / "local"
    scenario = {**SCENARIO, "rounds": 1, "model": "resnet20", "training": {"buffers": "local", "local_steps": 1}}
    gossipfl.run(scenario, clock="virtual", out=folder)
    code, _, stderr = call("calibrate", folder)
    assert code == 2 and "training.buffers" in stderr


def test_a_model_that_cannot_be_cut_says_where_and_why(tmp_path):
    poem = tmp_path / "poem.txt"
    poem.write_text("so much depends upon a red wheel barrow glazed with rain water\n" * 60)
    folder = tmp_path / "poem"
    scenario = {
        **SCENARIO,
        "rounds": 1,
        "model": "gpt",
        "model_args": {"width": 8, "heads": 1, "layers": 1},
        "data": {"kind": "text", "path": str(poem), "args": {"block": 16}},
        "training": {"local_steps": 1},
    }
    gossipfl.run(scenario, clock="virtual", out=folder)
    code, _, stderr = call("calibrate", folder)
    assert code == 2 and "cannot be cut" in stderr
