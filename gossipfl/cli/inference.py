"""The commands that serve what a run has trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from gossipfl.cli.options import (
    EPILOG,
    Number,
    errors_are_messages,
    insecure_option,
    quiet_option,
    stdout_console,
    tell,
)

run_argument = click.argument("run", type=click.Path(path_type=Path))
model_option = click.option("--model", default="average", show_default=True, help="The run's average model, or a peer's: p3.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout and nothing else.")
device_option = click.option(
    "--device", "device_file", type=click.Path(path_type=Path), help="The device, a TOML file: speed, memory, uplink, latency."
)
loss_option = click.option(
    "--max-accuracy-loss", default=0.01, show_default=True, help="Share of accuracy that quantization may cost."
)


@click.command(epilog=EPILOG)
@run_argument
@model_option
@click.option(
    "--alpha",
    type=Number(0, 1, True, True),
    default=0.02,
    show_default=True,
    help="Share of answers that may differ from the full model's.",
)
@click.option(
    "--delta", type=Number(0, 1, True, True), default=0.05, show_default=True, help="Probability that more do all the same."
)
@json_option
@quiet_option
@errors_are_messages
def calibrate(run: Path, model: str, alpha: float, delta: float, as_json: bool, quiet: bool) -> None:
    """Measure a model of a RUN for serving: bits for each layer and allowed loss, speed of the engines, margins.

    What is found is kept beside the model, for `plan-inference`, `serve` and `bench-inference`.

    \b
    gossipfl calibrate runs/quickstart
    gossipfl calibrate runs/quickstart --model p3 --alpha 0.01
    """
    from gossipfl.scenario.inference.calibrate import calibrate as measure
    from gossipfl.scenario.inference.calibrate import calibrator_of
    from gossipfl.scenario.inference.display import print_calibration, progress
    from gossipfl.scenario.inference.trained import load_trained

    trained = load_trained(run, model)
    with progress(quiet) as told:
        calibration = measure(trained, calibrator_of(trained, alpha, delta), told)
    if as_json:
        click.echo(calibration.to_json())
    else:
        print_calibration(stdout_console(), calibration)
        click.echo(f"stored  {trained.calibration_file}")


@click.command("plan-inference", epilog=EPILOG)
@run_argument
@model_option
@device_option
@loss_option
@json_option
@errors_are_messages
def plan_inference(run: Path, model: str, device_file: Path | None, max_accuracy_loss: float, as_json: bool) -> None:
    """Where to cut a calibrated model of a RUN for a device, and at how many bits: every cut, and the cheapest.

    \b
    gossipfl plan-inference runs/quickstart --device scenarios/devices/phone.toml --max-accuracy-loss 0.01
    gossipfl plan-inference runs/quickstart --json | jq .plan.cut
    """
    from gossipfl.inference.planning.cuts import choose_plan
    from gossipfl.inference.planning.profile import DeviceProfile
    from gossipfl.scenario.device_file import read_device
    from gossipfl.scenario.inference.calibrate import load_calibration
    from gossipfl.scenario.inference.display import plain, print_plan
    from gossipfl.scenario.inference.trained import load_trained

    device = read_device(device_file) if device_file else DeviceProfile()
    calibration = load_calibration(load_trained(run, model))
    plan, rows = choose_plan(calibration.catalogue, device, max_accuracy_loss)
    if as_json:
        values = {
            "plan": asdict(plan),
            "cuts": [asdict(row) | {"cost": row.cost} for row in rows],
            "device": asdict(device),
            "certificates": [asdict(certificate) for certificate in calibration.certificates_for(plan)],
        }
        click.echo(json.dumps(plain(values)))
    else:
        print_plan(stdout_console(), calibration, plan, rows, device, max_accuracy_loss)


@click.command("bench-inference", epilog=EPILOG)
@run_argument
@model_option
@click.option(
    "--device",
    "device_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A device to emulate, a TOML file; more may be given (default: a sensor, a phone and a gateway).",
)
@json_option
@quiet_option
@errors_are_messages
def bench_inference(run: Path, model: str, device_files: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """What plans and thresholds promise for a calibrated model of a RUN, and what they keep on test samples.

    Latencies are of real sockets, with devices and links of other speeds emulated; that takes a minute.

    \b
    gossipfl bench-inference runs/quickstart
    gossipfl bench-inference runs/quickstart --device scenarios/devices/phone.toml
    gossipfl bench-inference runs/quickstart --json | jq '.plans[] | select(.level == 0.01)'
    """
    from gossipfl.scenario.device_file import read_device
    from gossipfl.scenario.inference.bench import DEVICES, plan_rows, threshold_rows
    from gossipfl.scenario.inference.calibrate import calibrator_like, load_calibration, timed_here
    from gossipfl.scenario.inference.cascades import request_rows
    from gossipfl.scenario.inference.display import (
        plain,
        print_cascade_rows,
        print_fallback_rows,
        print_latency_rows,
        print_link_rows,
        print_note,
        print_plan_rows,
        print_threshold_rows,
        progress,
    )
    from gossipfl.scenario.inference.fallbacks import fallback_rows
    from gossipfl.scenario.inference.latency import check_emulated
    from gossipfl.scenario.inference.link_error import link_rows
    from gossipfl.scenario.inference.trained import load_trained

    devices = [read_device(path) for path in device_files] or DEVICES
    check_emulated(devices)
    trained = load_trained(run, model)
    calibration = load_calibration(trained)
    calibrator, samples = calibrator_like(trained, calibration), trained.test_samples
    catalogue = timed_here(calibration, calibrator, tell)
    plans = list(plan_rows(calibrator, catalogue, calibration.harm, devices, *samples))
    thresholds = list(threshold_rows(calibrator, catalogue, *samples))
    with progress(quiet) as told:
        latencies, cascades = request_rows(calibrator, catalogue, devices, samples[0], told=told)
        fallbacks = fallback_rows(calibrator, catalogue, devices, samples[0], told=told)
    links = link_rows(devices)
    if as_json:
        values = {
            "plans": [asdict(row) | {"saved": row.saved} for row in plans],
            "thresholds": [asdict(row) for row in thresholds],
            "fallbacks": [asdict(row) for row in fallbacks],
            "latency": [asdict(row) | {"error": row.error, "error_now": row.error_now} for row in latencies],
            "cascades": [asdict(row) | {"error": row.error, "error_at_rate": row.error_at_rate} for row in cascades],
            "links": [asdict(row) | {"latency_error": row.latency_error, "rate_error": row.rate_error} for row in links],
        }
        click.echo(json.dumps(plain(values)))
    else:
        print_plan_rows(stdout_console(), plans)
        print_threshold_rows(stdout_console(), thresholds)
        print_latency_rows(stdout_console(), latencies)
        print_cascade_rows(stdout_console(), cascades)
        if fallbacks:
            print_fallback_rows(stdout_console(), fallbacks)
        if links:
            print_link_rows(stdout_console(), links)
        print_note(stdout_console(), calibration)
        click.echo(f"{len(samples[1])} test samples, that neither training nor calibration saw")


@click.command(epilog=EPILOG)
@run_argument
@model_option
@click.option("--bind", default="tcp://127.0.0.1:5800", show_default=True, help="Where devices find it; port 0: any free one.")
@click.option("--advertise", help="The address to tell others, where it differs: tcp://198.51.100.7:5800.")
@click.option("--http", metavar="HOST:PORT", help="Answer over HTTP as well (Open Inference Protocol v2): 127.0.0.1:8080.")
@click.option(
    "--drain",
    "drain_s",
    type=Number(0, 1e9),
    default=10.0,
    show_default=True,
    help="Seconds to finish what was asked, at the end.",
)
@insecure_option
@errors_are_messages
def serve(run: Path, model: str, bind: str, advertise: str | None, http: str | None, drain_s: float, insecure: bool) -> None:
    """Serve a calibrated model of a RUN: the full model, and to devices the parts that they run themselves.

    Until SIGTERM or Ctrl-C; then it finishes what it has been asked.

    \b
    gossipfl serve runs/quickstart
    gossipfl serve runs/quickstart --http 127.0.0.1:8080
    curl -s localhost:8080/v2/models/quickstart
    """
    from gossipfl.scenario.inference.serve import serve as serve_until_signal
    from gossipfl.scenario.inference.trained import load_trained

    serve_until_signal(load_trained(run, model), bind, advertise, http, insecure, drain_s, tell)


@click.command(epilog=EPILOG)
@click.option(
    "--server", "servers", multiple=True, required=True, help="Where a model is served; more may be given, to fall back on."
)
@click.option("--model", help="Which of the server's models, if it has several.")
@device_option
@loss_option
@click.option("--on-no-server", type=click.Choice(["unverified", "fail"]), default="unverified", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Folder that keeps the pieces of the model.")
@click.option("--inputs", type=click.Path(path_type=Path), help="A .npy file of inputs, f32[n, ...] (default: see --config).")
@click.option("--config", "scenario", help="A scenario whose test samples are asked (default: noise).")
@click.option("--samples", type=click.IntRange(1), help="How many inputs (default: all of --inputs, or 100).")
@click.option(
    "--timeout", "timeout_s", type=Number(0, 1e9, True), default=30.0, show_default=True, help="Seconds for each answer."
)
@click.option(
    "--audit",
    "audit_share",
    type=Number(0, 1),
    default=0.01,
    show_default=True,
    help="Share of answers to compare with the full model; 0: none.",
)
@json_option
@errors_are_messages
def device(
    servers: tuple[str, ...],
    model: str | None,
    device_file: Path | None,
    max_accuracy_loss: float,
    on_no_server: Literal["unverified", "fail"],
    cache: Path | None,
    inputs: Path | None,
    scenario: str | None,
    samples: int | None,
    timeout_s: float,
    audit_share: float,
    as_json: bool,
) -> None:
    """Be an edge device: get a plan from a server, pull the part of the model that it puts here, and answer inputs.

    Answers of which the device is unsure are the full model's, or continued, where that is cheaper and certified: the server
    computes its part again, from more bits. With --json, a line for each answer: class, margin, and receipt.
    Should audits find that more answers differ from the full model's than was certified, it answers all from then on.

    \b
    gossipfl device --server tcp://127.0.0.1:5800 --device scenarios/devices/phone.toml --config quickstart
    gossipfl device --server tcp://127.0.0.1:5800 --inputs x.npy --cache cache --json | jq .receipt.tiers
    """
    from gossipfl.errors import ConfigError
    from gossipfl.inference.planning.profile import DeviceProfile, check_loss
    from gossipfl.scenario import load_scenario
    from gossipfl.scenario.device_file import read_device
    from gossipfl.scenario.inference.device_view import Answers
    from gossipfl.scenario.inference.serve import answer_all, find_architecture, open_device, read_inputs

    check_loss(max_accuracy_loss)
    if inputs and scenario:
        raise ConfigError(f"--inputs {inputs} and --config {scenario} are two sources of inputs; give one of them")
    profile = read_device(device_file) if device_file else DeviceProfile()
    found = find_architecture(servers, model, min(timeout_s, 10.0))
    asked = read_inputs(inputs, load_scenario(scenario) if scenario else None, samples, found.input_shape)
    answers = Answers(asked.y, as_json)
    with open_device(servers, found, profile, max_accuracy_loss, on_no_server, cache, audit_share) as edge:
        answer_all(edge, asked, timeout_s, answers.take, tell)
        answers.finish(edge)


@click.command(epilog=EPILOG)
@run_argument
@model_option
@click.option("--format", "format_", type=click.Choice(["safetensors", "onnx"]), default="safetensors", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="The file to write (default: exported/ in the run's folder).")
@errors_are_messages
def export(run: Path, model: str, format_: str, out: Path | None) -> None:
    """Write a model of a RUN as a file that other software reads, and print its path.

    \b
    gossipfl export runs/quickstart
    gossipfl export runs/quickstart --model p3 --format onnx --out p3.onnx
    """
    from gossipfl.scenario.inference.export import export_model
    from gossipfl.scenario.inference.trained import load_trained

    click.echo(export_model(load_trained(run, model), format_, out))
