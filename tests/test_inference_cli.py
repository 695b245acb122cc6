"""Calibrating and planning for what a run has trained, as a person does: `gossipfl run`, `calibrate`, `plan-inference`, ..."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file
from sockets import wait_for

import gossipfl
from gossipfl.cli import main
from gossipfl.errors import ConfigError
from gossipfl.inference.execution import engines
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.planning.cuts import choose_plan
from gossipfl.inference.planning.offers import Ask, manifest_from_json
from gossipfl.inference.planning.profile import DeviceProfile
from gossipfl.learning.models import build_model
from gossipfl.protocol.messages import FULL_BITS
from gossipfl.runtime import edge_device
from gossipfl.runtime.inference_server import InferenceServer
from gossipfl.runtime.model_list import Architecture, ask_models
from gossipfl.runtime.served import ServedVersion
from gossipfl.scenario.inference import latency
from gossipfl.scenario.inference.calibrate import (
    Certificates,
    calibrator_like,
    calibrator_of,
    load_calibration,
    served_here,
    timed_here,
)
from gossipfl.scenario.inference.serve import find_architecture, open_device, open_server, read_inputs
from gossipfl.scenario.inference.trained import load_trained

SCENARIO = {
    "name": "digits",
    "peers": 3,
    "rounds": 6,
    "central": False,
    "data": {"kind": "digits", "calibration_fraction": 0.5},
    "gossip": {"segments": 2, "replicas": 1},
}


def call(*words: str) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": None}).invoke(main, list(map(str, words)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Seconds are measured once, for what they are is not asked here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "MOST_TURNS", 1)
        patch.setattr(latency, "PAUSE_S", 0.0)
        patch.setattr(engines, "REST_S", 0.0)
        yield


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
    assert stored["model"] == "average" and stored["made_with"].keys() == {"version", "machine", "kernels", "seed"}
    assert stored["catalogue"]["version"] == 6
    assert {certificate["n"] for certificate in stored["certificates"]} == {360}


def test_who_kept_too_few_samples_for_tables_is_told_where_to_keep_more(run):
    trained = load_trained(run)
    assert calibrator_of(trained).warning is None
    trained.__dict__["calibration_samples"] = tuple(part[:100] for part in trained.calibration_samples)
    assert calibrator_of(trained).warning.endswith("; keep more with data.calibration_fraction")


def test_the_model_of_one_peer_has_a_calibration_of_its_own(run):
    code, stdout, _ = call("calibrate", run, "--model", "p1", "--json", "--quiet")
    assert code == 0 and json.loads(stdout)["model"] == "p1"
    assert (run / "models" / "p1.calibration.json").is_file()


def test_a_plan_names_every_cut_and_the_cheapest(run):
    code, stdout, _ = call("plan-inference", run, "--json", "--max-accuracy-loss", "0.02")
    plan = json.loads(stdout)
    assert code == 0 and [row["cut"] for row in plan["cuts"]] == [0, 1, 2]
    costs = {row["cut"]: row["expected"]["cost"] for row in plan["cuts"] if not row["obstacle"]}
    assert plan["plan"]["cut"] == min(costs, key=costs.get)
    for row in plan["cuts"]:
        assert row["cost"] == row["expected"]["cost"] >= row["prediction"]["cost"] and 0 <= row["fallback_rate"] <= 1


def test_a_plan_tells_what_those_that_fall_back_add_and_from_when_answers_stand(run, tmp_path):
    """At bits of the greatest loss alone, with all to be done by a device that is far from the server."""
    copy, device = shutil.copytree(run, tmp_path / "copy"), tmp_path / "far.toml"
    file = copy / "models" / "average.calibration.json"
    stored = json.loads(file.read_text())
    bits = stored["catalogue"]["levels"]["0.05"]
    stored["catalogue"]["levels"], stored["harm"] = {"0.05": {"2": bits["2"]}}, {"0.05": {"2": 0.04}}
    stored["catalogue"]["fallback_rates"] = {"0.05": {"2": {"full": 0.125, "continued": None}}}
    file.write_text(json.dumps(stored))
    device.write_text('name = "far"\nlatency = "100s"\nrequests = 1000000000\n')
    code, stdout, stderr = call("plan-inference", copy, "--device", device, "--max-accuracy-loss", "0.05")
    said = " ".join(stdout.split())
    assert code == 0, stderr
    assert "fetched once, before the first request: offer 0.00 ms, weights 20" in said
    assert re.search(r" \+ 25\d\d\d ", said) and "12.5%" in said and "for the 12.5% that fall back" in said
    (certificate,) = [one for one in stored["certificates"] if one["basis"]["weight_bits"] == bits["2"][0]]
    assert f"certified on {certificate['n']} samples where a fallback starts afresh: from margin" in said
    assert f"{certificate['fallback_rate']:.1%} fall back" in said and "note:" not in said
    stored["certificates"], stored["catalogue"]["fallback_rates"], stored["warning"] = [], {}, "9 unseen samples are too few"
    file.write_text(json.dumps(stored))
    _, stdout, _ = call("plan-inference", copy, "--device", device, "--max-accuracy-loss", "0.05")
    said = " ".join(stdout.split())
    assert "?" in said and "fallbacks left out: nobody has measured how many there are" in said
    assert "not certified yet: a server does that when it first offers this plan" in said
    assert said.endswith("note: 9 unseen samples are too few")


def test_the_device_by_example_gets_a_plan(run):
    code, stdout, stderr = call("plan-inference", run, "--device", "scenarios/devices/phone.toml")
    assert code == 0, stderr
    assert "phone" in stdout and "chosen" in stdout


def test_the_bench_tells_what_was_promised_and_what_was_kept(run):
    code, stdout, _ = call("bench-inference", run, "--json", "--quiet")
    tables = json.loads(stdout)
    assert code == 0
    for row in tables["plans"]:
        is_exact = row["activation_bits"] == FULL_BITS  # which seconds on a busy machine may make the cheapest
        assert 0 <= row["payload"] <= row["payload_32"] and (row["payload"] == row["payload_32"]) == is_exact
        assert row["predicted_loss"] <= row["level"]
    assert {row["rule"] for row in tables["thresholds"]} == {"max", "fit99", "fit99.9", "certified"}
    assert {row["device"] for row in tables["latency"]} == {"sensor", "phone", "gateway"}
    assert len(tables["links"]) == 2 * 3
    for row in tables["latency"]:
        assert row["predicted_up"] == row["measured_up"] and row["predicted_pull"] == row["measured_pull"]
    assert {row["fallback"] for row in tables["fallbacks"]} == {"continued", "full"}
    for row in tables["plans"]:
        assert all(0 <= row[key] <= 1 for key in ("predicted_fallback", "certified_fallback", "measured_fallback"))
    assert {row["device"] for row in tables["cascades"] if row["is_chosen"]} == {"sensor", "phone", "gateway"}
    for row in tables["cascades"]:
        assert row["measured_s"] > 0 and row["error_at_rate"] == row["at_rate_s"] / row["measured_s"] - 1
        assert row["turns"] == 1 and row["rate_within"][0] <= row["predicted_rate"] <= row["rate_within"][1]
        # Where the device finds the plan's engine too slow, the one sample that is asked may be none of its doubtful ones.
        if row["cut"] == row["num_layers"] and row["measured_up"]:
            assert row["measured_up"] == pytest.approx(row["measured_rate"] * 4 * 64)
    for row in tables["fallbacks"]:
        assert row["predicted_up"] == row["measured_up"] and row["measured_s"] > 0
        if row["is_chosen"]:
            assert 0 <= row["risk"] <= 0.05 and 0 <= row["fallback_rate"] <= 1


def test_the_bench_is_of_the_devices_that_it_is_given(run, tmp_path):
    near, far = tmp_path / "near.toml", tmp_path / "far.toml"
    near.write_text('name = "near"\nspeed = 0.5\n')
    far.write_text('name = "far"\nspeed = 0.5\nuplink = "1Mbit"\ndownlink = "1Mbit"\nlatency = "1ms"\n')
    code, stdout, stderr = call("bench-inference", run, "--device", near, "--device", far, "--json", "--quiet")
    assert code == 0, stderr
    tables = json.loads(stdout)
    assert {row["device"] for row in tables["plans"]} == {"alone", "near", "far"}
    assert {row["device"] for row in tables["latency"]} == {"near", "far"}
    assert {row["device"] for row in tables["links"]} == {"far"}, "the other's has no limits"
    for row in tables["latency"]:
        file = near if row["device"] == "near" else far
        plan = json.loads(call("plan-inference", run, "--device", file, "--json")[1])
        if not row["refused"]:
            assert row["predicted_s"] == plan["cuts"][row["cut"]]["request_s"], "the same plan has one figure everywhere"
        assert row["is_chosen"] == (row["cut"] == plan["plan"]["cut"])
        assert row["predicted_up"] == row["measured_up"] and row["predicted_pull"] == row["measured_pull"]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_folder_without_a_run_is_refused(tmp_path):
    code, _, stderr = call("calibrate", tmp_path)
    assert code == 2 and "holds no run" in stderr and "gossipfl run" in stderr


def test_an_unknown_model_is_refused_with_the_known_ones(run):
    code, _, stderr = call("calibrate", run, "--model", "averge")
    assert code == 2 and "did you mean 'average'" in stderr and "p0, p1, p2" in stderr


def test_what_a_plan_is_certified_for_is_what_the_calibration_was(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "copy")
    assert call("calibrate", copied, "--alpha", "0.1", "--delta", "0.2", "--quiet")[0] == 0
    trained = load_trained(copied)
    calibrator = calibrator_like(trained, load_calibration(trained))
    assert (calibrator.alpha, calibrator.delta) == (0.1, 0.2)


def test_a_device_that_is_faster_than_this_machine_cannot_be_emulated(run, tmp_path):
    fast = tmp_path / "fast.toml"
    fast.write_text('name = "mainframe"\nspeed = 2\n')
    code, _, stderr = call("bench-inference", run, "--device", fast)
    assert code == 2 and "speed = 2.0 of device 'mainframe' cannot be emulated" in stderr


def test_a_certificate_that_a_plan_asks_for_is_kept_beside_the_model(run, tmp_path):
    trained = load_trained(shutil.copytree(run, tmp_path / "copy"))
    calibration = load_calibration(trained)
    calibrator = calibrator_like(trained, calibration)
    forced = latency.only(calibration.catalogue, 1, ((4,), 3))
    plan, _ = choose_plan(forced, DeviceProfile(uplink=1.0), 0.01)
    assert plan.fallback == "continued" and calibration.certificates_for(plan) == ()
    afresh, alone = replace(plan, fallback="full"), replace(plan, fallback="full", continued=None)
    made = [Certificates(trained, calibration, calibrator).certify(one) for one in (afresh, alone)]
    assert [one.tried for one in made] == [2, 1], "to choose from two, each at half of delta, or there is one only"
    stored = load_calibration(trained)
    assert stored.certificates == (*calibration.certificates, *made) and not calibration.certificates_for(alone)
    assert [stored.certificates_for(one) for one in (plan, alone)] == [(made[0],), (made[1],)]
    assert replace(stored, certificates=calibration.certificates) == calibration
    calibrator.certify = None  # what is kept is not made again
    again = Certificates(trained, stored, calibrator).certify
    assert [again(one) for one in (afresh, alone)] == made
    assert load_calibration(trained) == stored


def test_a_certificate_is_not_kept_with_a_calibration_at_other_levels_nor_where_there_is_none(run, tmp_path, caplog):
    trained = load_trained(shutil.copytree(run, tmp_path / "copy"))
    calibration = load_calibration(trained)
    calibrator = calibrator_like(trained, calibration)
    plan, _ = choose_plan(latency.only(calibration.catalogue, 1, ((4,), 3)), DeviceProfile(), 0.01)
    plan = replace(plan, fallback="full", continued=None)
    other = replace(calibration, certificates=tuple(replace(one, alpha=0.1) for one in calibration.certificates))
    trained.calibration_file.write_text(other.to_json())
    assert Certificates(trained, calibration, calibrator).certify(plan).alpha == 0.02
    assert load_calibration(trained) == other
    trained.calibration_file.unlink()
    with caplog.at_level("INFO"):
        assert Certificates(trained, calibration, calibrator).certify(plan).alpha == 0.02
    assert "a certificate is not kept" in caplog.text and not trained.calibration_file.exists()


@pytest.mark.parametrize("uplink", [1e3, 1e9])
def test_whatever_plan_is_offered_there_is_a_certificate_of_the_way_that_it_falls_back(run, uplink):
    trained = load_trained(run)
    calibration = load_calibration(trained)
    calibrator = calibrator_like(trained, calibration)
    catalogue, certificates, ways = calibration.catalogue, [], set()

    def certify(plan):
        certificates.append(calibrator.certify(plan))
        return certificates[-1]

    for level, cuts in catalogue.levels.items():
        for cut, bits in cuts.items():
            forced = latency.only(catalogue, cut, bits, catalogue.fallback_rates[level][cut])
            served = ServedVersion("m", catalogue.version, calibrator.chain, calibrator.vector, forced, certify)
            certificates.clear()
            ask = Ask(DeviceProfile(uplink=uplink), 0.01)
            served.certify(plan := served.plan(ask))
            manifest = manifest_from_json(served.offer(plan, ask))
            (offered,) = [one for one in certificates if one and one.basis.fallback == manifest.plan.fallback]
            assert offered.basis == calibrator.basis(manifest.plan)
            assert (manifest.threshold, manifest.alpha, manifest.delta) == (offered.threshold, 0.02, 0.05)
            assert manifest.plan.fallback_rate == offered.fallback_rate
            ways.add(manifest.plan.fallback)
    assert "full" in ways


def test_a_plan_needs_a_calibration(run):
    code, _, stderr = call("plan-inference", run, "--model", "p2")
    assert code == 2 and f"p2 of {run} is not calibrated" in stderr and f"run `gossipfl calibrate {run} --model p2`" in stderr


def test_the_title_of_a_plan_shows_the_loss_as_it_was_asked(run):
    code, stdout, _ = call("plan-inference", run, "--max-accuracy-loss", "0.0001")
    assert code == 0 and "for a loss of 0.01 % at most" in " ".join(stdout.split())


def test_a_loss_that_no_plan_keeps_within_is_answered_with_the_nearest(run, tmp_path):
    device = tmp_path / "device.toml"
    device.write_text('memory = "1KiB"\n')
    code, _, stderr = call("plan-inference", run, "--device", device, "--max-accuracy-loss", "-1")
    assert code == 2 and "max_accuracy_loss = -1" in stderr


@pytest.mark.parametrize("number", ["nan", "-1"])
@pytest.mark.parametrize(
    "words",
    [
        ("calibrate", "--alpha"),
        ("calibrate", "--delta"),
        ("serve", "--drain"),
        ("device", "--server", "tcp://127.0.0.1:9", "--timeout"),
        ("device", "--server", "tcp://127.0.0.1:9", "--audit"),
        ("device", "--server", "tcp://127.0.0.1:9", "--max-accuracy-loss"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_is_done(words, number, run):
    code, stdout, stderr = call(*words, number, *([run] if "--server" not in words else []))
    assert code == 2 and not stdout
    assert words[-1].replace("-", "_").strip("_") in stderr.replace("-", "_") and number in stderr


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
    "spoil", [lambda text: "", lambda text: text[:100], lambda text: "{}", lambda text: text.replace('"levels"', '"lvels"')]
)
def test_a_calibration_that_was_damaged_is_refused(run, tmp_path, spoil):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    stored = copy / "models" / "average.calibration.json"
    stored.write_text(spoil(stored.read_text()))
    code, _, stderr = call("plan-inference", copy)
    said = "".join(stderr.split())
    assert code == 2 and "Traceback" not in stderr
    assert str(stored) in said and f"`gossipfl calibrate {copy} --model average`".replace(" ", "") in said


def of_another_machine(run, folder):
    """The run as if calibrated where all takes a second, there is an engine more, and nobody measured what falls back."""
    shutil.copytree(run, folder)
    file = folder / "models" / "average.calibration.json"
    stored = json.loads(file.read_text())
    catalogue, last = stored["catalogue"], len(stored["catalogue"]["profile"]["layers"])
    stored["made_with"]["kernels"] = "a Cray-1"
    catalogue["device_s"] = {"fp32": [0, *[1] * last], "int8": [0, *[1] * last], "vector": [0, *[0.5] * last]}
    catalogue["server_s"] = {"fp32": [*[1] * last, 0]}
    catalogue["fallback_rates"] = {}
    catalogue["overheads"] = [{"device_s": 3, "server_s": 3, "rest_s": 3}] * 3
    file.write_text(json.dumps(stored))
    return load_trained(folder)


def test_seconds_of_another_machine_are_measured_again_where_the_model_is_served(run, tmp_path):
    trained, lines = of_another_machine(run, tmp_path / "copy"), []
    calibration = load_calibration(trained)
    calibrator = calibrator_like(trained, calibration)
    here = timed_here(calibration, calibrator, lines.append)
    (line,) = lines
    assert line.startswith("the engines were timed on a Cray-1; timing them again on ") and torch.__version__ in line
    assert here.device_s.keys() == {"fp32", "int8"}, "those that are here"
    assert all(seconds > 0 for times in here.device_s.values() for seconds in times[1:])
    served = served_here(calibration.catalogue, here)
    assert served.server_s["fp32"] == here.server_s["fp32"] and served.overheads[0].rest_s == here.overheads[0].rest_s < 3
    assert served.device_s == {engine: calibration.catalogue.device_s[engine] for engine in ("fp32", "int8")}
    assert served.overheads[2].device_s == 3, "of a device of that machine's speed"
    broken = served_here(calibration.catalogue, replace(here, device_s=here.device_s | {"int8": (0.0, None, None)}))
    assert broken.device_s["int8"] == (0.0, None, None), "an engine that computes something else here is not certified here"
    assert timed_here(load_calibration(load_trained(run)), calibrator, lines.append) and len(lines) == 1


def test_a_certificate_that_cannot_be_given_says_how_many_samples_it_takes(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    code, stdout, _ = call("calibrate", copy, "--alpha", "0.001", "--quiet")
    assert code == 0 and "2995" in stdout and "certified on" not in stdout


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


# --- serving ----------------------------------------------------------------------------------------------------------


@contextmanager
def serving(folder, *words):
    """A `gossipfl serve` in a process of its own, and the lines of addresses that it has printed."""
    command = [sys.executable, "-m", "gossipfl", "serve", str(folder), "--bind", "tcp://127.0.0.1:0", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = []
        while len(lines) < 1 + ("--http" in words):
            line = process.stderr.readline()
            assert line, "it ended before it served"
            if " at " in line:
                lines.append(line.split()[-1])
        yield process, lines
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.processes
def test_a_device_that_knows_nothing_but_an_address_answers_and_the_server_ends_in_order(run, tmp_path):
    of_another_machine(run, tmp_path / "copy")
    with serving(tmp_path / "copy") as (process, (address,)):
        words = ["--server", address, "--max-accuracy-loss", "0.05", "--samples", "20", "--cache", tmp_path / "cache"]
        code, stdout, stderr = call("device", *words, "--config", run / "scenario.toml", "--json")
        assert code == 0, stderr
        answers = [json.loads(line) for line in stdout.splitlines()]
        assert [answer["sample"] for answer in answers] == list(range(20))
        for answer in answers:
            receipt = answer["receipt"]
            assert receipt["model"] == "digits" and receipt["version"] == 6
            assert (receipt["alpha"], receipt["delta"]) == (0.02, 0.05)
            assert receipt["tiers"] == ["reduced" if receipt["margins"][0] >= receipt["threshold"] else "full"]
        code, stdout, _ = call("device", *words)
        assert code == 0 and "20 answers of digits" in stdout
        assert re.search(r"first [\d.]+, then median [\d.]+, slowest [\d.]+ ms", stdout)
        np.save(tmp_path / "noise.npy", 5 * np.random.default_rng(0).standard_normal((300, 1, 8, 8)))
        code, stdout, _ = call("device", *words, "--inputs", tmp_path / "noise.npy", "--samples", "300", "--audit", "1")
        assert code == 0 and "alarm: version 6 differs from the full model more often than alpha" in " ".join(stdout.split())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_gossipfl_serve_tells_which_engines_devices_do_without(run, monkeypatch):
    trained, lines = load_trained(run), []
    monkeypatch.setattr(edge_device, "missing_engines", lambda: {"int8": "engine 'int8' is not there: build torch with it"})
    with open_server(trained, "tcp://127.0.0.1:0", None, False, lines.append) as server:
        (listed,) = ask_models(server.address)
        with open_device([server.address], listed, DeviceProfile("phone"), 0.05, "fail", None, 0.0) as device:
            device.predict(trained.test_samples[0][:1], 20.0)
    assert re.fullmatch(
        r"device phone \(device-[0-9a-f]{16}\) does without an engine: engine 'int8' is not there: build torch with it",
        lines[0],
    )


@pytest.mark.processes
def test_http_answers_as_the_model_does_beside_the_sockets(run):
    pytest.importorskip("uvicorn", reason="the extra http is not installed")
    with serving(run, "--http", "127.0.0.1:0") as (process, (_, url)):
        body = {"inputs": [{"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.5] * 64}]}
        request = urllib.request.Request(f"{url}/v2/models/digits/infer", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=20) as answer:
            outputs = {output["name"]: output for output in json.load(answer)["outputs"]}
        assert outputs["scores"]["shape"] == [1, 10]
        assert outputs["label"]["data"] == [max(range(10), key=outputs["scores"]["data"].__getitem__)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def get(url: str, path: str) -> str:
    with closing(HTTPConnection(url.removeprefix("http://"), timeout=20)) as client:
        client.request("GET", path)
        return client.getresponse().read().decode()


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_further_signals_do_not_change_how_a_server_ends(number, run):
    pytest.importorskip("uvicorn", reason="the extra http is not installed")
    with serving(run, "--http", "127.0.0.1:0") as (process, (_, url)):
        body = json.dumps({"inputs": [{"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.5] * 64}]})
        with closing(HTTPConnection(url.removeprefix("http://"), timeout=20)) as client:
            client.putrequest("POST", "/v2/models/digits/infer")
            client.putheader("Content-Length", str(len(body)))
            client.endheaders(body[:1].encode())  # in flight until the rest comes
            assert wait_for(lambda: "gossipfl_in_flight 1.0" in get(url, "/metrics"))
            process.send_signal(number)
            assert wait_for(lambda: get(url, "/v2/health/ready") == '{"ready":false}')
            process.send_signal(number)
            client.send(body[1:].encode())
            with client.getresponse() as answer:
                assert (answer.status, "scores" in answer.read().decode()) == (200, True)
        assert process.wait(20) == 0


def test_inputs_of_a_file_and_of_a_scenario_are_not_asked_both(run, free_port, tmp_path):
    words = ["--server", f"tcp://127.0.0.1:{free_port}", "--inputs", tmp_path / "x.npy", "--config", run / "scenario.toml"]
    code, stdout, stderr = call("device", *words)
    assert code == 2 and not stdout
    assert (
        f"--inputs {tmp_path / 'x.npy'}" in stderr and f"--config {run / 'scenario.toml'}" in stderr and "one of them" in stderr
    )


def test_a_server_that_is_not_there_is_named(free_port):
    code, _, stderr = call("device", "--server", f"tcp://127.0.0.1:{free_port}", "--timeout", "1")
    assert code == 1 and f"127.0.0.1:{free_port}" in stderr and "running" in stderr


def test_the_next_server_is_asked_where_the_first_has_not_got_the_model(free_port):
    digits, letters = (Architecture(name, "mlp", (1, 8, 8), 10) for name in ("digits", "letters"))
    chain = Chain.of(build_model("mlp", (1, 8, 8), 10), (1, 8, 8))
    gone = f"tcp://127.0.0.1:{free_port}"
    with ExitStack() as stack:
        one, other = (
            stack.enter_context(InferenceServer({one.name: chain}, architectures=[one])).address for one in (digits, letters)
        )
        assert find_architecture([one, other], "letters", 5.0) == letters
        says = f"{one} serves digits, {other} serves letters; 'letter' is not among them; did you mean 'letters'?"
        with pytest.raises(ConfigError, match=re.escape(says)):
            find_architecture([one, other], "letter", 5.0)
        with pytest.raises(
            ConfigError, match=re.escape(f"{one} serves digits; 'x' is not among them; no server answers at {gone}")
        ):
            find_architecture([gone, one], "x", 0.5)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.float32(3), r"holds inputs of shape \[\], the model takes \[n, 1, 8, 8\], n at least 1"),
        (np.zeros((0, 1, 8, 8)), r"holds inputs of shape \[0, 1, 8, 8\]"),
        (np.zeros((3, 8, 8)), r"holds inputs of shape \[3, 8, 8\]"),
        (np.full((1, 1, 8, 8), "a"), "holds <U1; write one array of real numbers"),
        (np.ones((1, 1, 8, 8), complex), "holds complex128; write one array of real numbers"),
        (np.full((1, 1, 8, 8), 1e300), "holds values that are not finite as 32-bit floats"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_file_that_holds_no_inputs_is_refused(values, says, tmp_path):
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(ConfigError, match=says):
        read_inputs(tmp_path / "x.npy", None, 1, (1, 8, 8))


@pytest.mark.parametrize(("count", "num_read"), [(2, 2), (9, 5), (None, 5)])
def test_of_a_file_of_inputs_all_are_asked_or_the_first_of_them(count, num_read, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(5 * 64.0).reshape(5, 1, 8, 8))
    assert read_inputs(tmp_path / "x.npy", None, count, (1, 8, 8)).x[:, 0, 0, 0].tolist() == [0, 64, 128, 192, 256][:num_read]
    assert len(read_inputs(None, None, count, (1, 8, 8)).x) == (count or 100)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x"])
def test_a_file_that_is_no_array_is_refused(content, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is no \.npy file of numbers"):
        read_inputs(path, None, 1, (1, 8, 8))
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(ConfigError, match="is an archive of arrays"):
        read_inputs(tmp_path / "x.npz", None, 1, (1, 8, 8))


@pytest.fixture
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_an_address_for_http_that_cannot_be_is_refused(run):
    code, _, stderr = call("serve", run, "--bind", "tcp://127.0.0.1:0", "--http", "8080")
    assert code == 2 and "--http 8080" in stderr


# --- exporting --------------------------------------------------------------------------------------------------------


def test_safetensors_hold_the_tensors_by_the_models_own_names(run):
    code, stdout, _ = call("export", run)
    tensors = load_file(stdout.strip())
    model = build_model("mlp", (1, 8, 8), 10)
    assert code == 0 and not model.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()})[0]


def test_onnx_computes_what_the_model_does_for_any_batch(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra ort is not installed")
    path = tmp_path / "model.onnx"
    code, stdout, stderr = call("export", run, "--format", "onnx", "--out", path)
    assert (code, stdout.strip()) == (0, str(path)), stderr
    trained = load_trained(run)
    x = trained.test_samples[0][:7]
    with torch.no_grad():
        expected = trained.model(torch.from_numpy(x)).numpy()
    (scores,) = onnxruntime.InferenceSession(path).run(["scores"], {"input": x})
    assert np.allclose(scores, expected, atol=1e-4)


def test_a_folder_is_no_file_to_export_to(run, tmp_path):
    code, _, stderr = call("export", run, "--out", tmp_path)
    assert code == 2 and "is a folder" in stderr
