"""The commands that serve what a run has trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from gossipfl.cli.options import EPILOG, errors_are_messages, quiet_option

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
@click.option("--alpha", default=0.02, show_default=True, help="Share of answers that may differ from the full model's.")
@click.option("--delta", default=0.05, show_default=True, help="Probability that more do all the same.")
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
        print_calibration(Console(), calibration)
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
    catalogue = load_calibration(load_trained(run, model)).catalogue
    plan, rows = choose_plan(catalogue, device, max_accuracy_loss)
    if as_json:
        values = {"plan": asdict(plan), "cuts": [asdict(row) for row in rows], "device": asdict(device)}
        click.echo(json.dumps(plain(values)))
    else:
        print_plan(Console(), catalogue.profile, plan, rows, f"{device.name}, for a loss of {max_accuracy_loss:.1%} at most")


@click.command("bench-inference", epilog=EPILOG)
@run_argument
@model_option
@json_option
@quiet_option
@errors_are_messages
def bench_inference(run: Path, model: str, as_json: bool, quiet: bool) -> None:
    """What plans and thresholds promise for a calibrated model of a RUN, and what they keep on test samples.

    \b
    gossipfl bench-inference runs/quickstart
    gossipfl bench-inference runs/quickstart --json | jq '.plans[] | select(.level == 0.01)'
    """
    from gossipfl.scenario.inference.bench import plan_rows, threshold_rows
    from gossipfl.scenario.inference.calibrate import calibrator_of, load_calibration
    from gossipfl.scenario.inference.display import plain, print_plan_rows, print_threshold_rows
    from gossipfl.scenario.inference.trained import load_trained

    trained = load_trained(run, model)
    calibration = load_calibration(trained)
    calibrator, samples = calibrator_of(trained), trained.test_samples
    plans = list(plan_rows(calibrator, calibration.catalogue, calibration.harm, *samples))
    thresholds = list(threshold_rows(calibrator, calibration.catalogue, *samples))
    if as_json:
        values = {
            "plans": [asdict(row) | {"saved": row.saved} for row in plans],
            "thresholds": [asdict(row) for row in thresholds],
        }
        click.echo(json.dumps(plain(values)))
    else:
        print_plan_rows(Console(), plans)
        print_threshold_rows(Console(), thresholds)
        click.echo(f"{len(samples[1])} test samples, that neither training nor calibration saw")
