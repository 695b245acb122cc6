"""The commands that run scenarios, look at them beforehand, and look at their records."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from gossipfl.cli.options import (
    EPILOG,
    errors_are_messages,
    insecure_option,
    quiet_option,
    set_option,
    stderr_console,
    stdout_console,
    tell,
)
from gossipfl.errors import ConfigError

if TYPE_CHECKING:
    from gossipfl.scenario.results import RunResult

CLOCKS = ["virtual", "local", "netns"]


@click.command(epilog=EPILOG)
@click.argument("scenario")
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the record (default: runs/<name>, numbered if taken).")
@click.option("--force", is_flag=True, help="Replace the folder of an earlier run.")
@click.option(
    "--clock",
    type=click.Choice(CLOCKS),
    help="virtual: emulated network, virtual time; local: real processes and sockets; netns: in network namespaces, as root "
    "(default: the scenario's).",
)
@click.option("--json", "as_json", is_flag=True, help="Print summary.json to stdout and nothing else.")
@quiet_option
@insecure_option
@errors_are_messages
def run(
    scenario: str,
    overrides: tuple[str, ...],
    out: Path | None,
    force: bool,
    clock: str | None,
    as_json: bool,
    quiet: bool,
    insecure: bool,
) -> None:
    """Run a SCENARIO (a .toml file or the name of a built-in one) on this machine.

    \b
    gossipfl run quickstart
    gossipfl run quickstart --clock virtual --set peers=100 --set network.uplink=10Mbit
    gossipfl run scenarios/quickstart.toml --set gossip.segments=4 --set peers=12 --out runs/mine --json
    """
    from gossipfl.scenario.display import Display
    from gossipfl.scenario.interrupts import last_interrupt
    from gossipfl.scenario.results import Observer, RunFailed, RunInterrupted
    from gossipfl.scenario.runner import run as run_scenario

    display = Display(stderr_console())
    observer = Observer() if quiet else display
    try:
        result = run_scenario(
            scenario,
            overrides=overrides,
            clock=clock,
            out=out,
            force=force,
            insecure=insecure,
            observer=observer,
            began=_process_began(),
        )
    except RunFailed as failed:
        result = failed.result
    except RunInterrupted as interrupted:
        last_interrupt()
        result = interrupted.result
    finally:
        display.close()
    _end(result, as_json)


@click.command(epilog=EPILOG)
@errors_are_messages
def scenarios() -> None:
    """List the scenarios that come with gossipfl, and where their files are.

    \b
    gossipfl scenarios
    """
    from gossipfl.scenario import builtin_scenarios

    for name, path in sorted(builtin_scenarios().items()):
        click.echo(f"{name:16} {path}")


@click.command(epilog=EPILOG)
@click.option("--name", required=True, help="This peer's name, p0, p1, ...: its place in the roster and its shard of the data.")
@click.option("--config", "scenario", required=True, help="The scenario, the same at every peer.")
@click.option("--roster", required=True, type=click.Path(path_type=Path), help="Who listens where (see below).")
@set_option
@click.option("--bind", help="Where to listen, if not at the roster's address: tcp://0.0.0.0:5703.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of this peer's record (default: runs/<scenario>-<name>).")
@click.option("--force", is_flag=True, help="Replace the folder of an earlier run.")
@click.option("--keep", "keep_s", type=float, default=60.0, show_default=True, help="Seconds to wait for `collect` at the end.")
@insecure_option
@errors_are_messages
def peer(
    name: str,
    scenario: str,
    roster: Path,
    overrides: tuple[str, ...],
    bind: str | None,
    out: Path | None,
    force: bool,
    keep_s: float,
    insecure: bool,
) -> None:
    """Run one peer of a scenario by hand, on any machine.

    Every machine has the scenario, its data and the roster:

    \b
    [peers]
    p0 = "tcp://10.0.0.1:5700"
    p1 = "tcp://10.0.0.2:5700"

    \b
    gossipfl peer --name p1 --config quickstart --roster roster.toml --insecure
    """
    from gossipfl.scenario.byhand import run_peer

    folder = run_peer(name, scenario, roster, overrides, bind, out, force, keep_s, insecure, tell)
    click.echo(folder)


@click.command(epilog=EPILOG)
@click.argument("roster", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the record (default: runs/<scenario>).")
@click.option("--force", is_flag=True, help="Replace the folder of an earlier run.")
@click.option(
    "--timeout", "timeout_s", type=float, default=600.0, show_default=True, help="Seconds to wait for peers to finish."
)
@click.option("--json", "as_json", is_flag=True, help="Print summary.json to stdout and nothing else.")
@errors_are_messages
def collect(roster: Path, out: Path | None, force: bool, timeout_s: float, as_json: bool) -> None:
    """Gather a run of peers by hand into one record, one summary and the average model.

    Peers keep their results for a while after they have finished; those that have not finished yet are waited for.

    \b
    gossipfl collect roster.toml
    """
    from gossipfl.scenario.byhand import collect_run

    result = collect_run(roster, out, force, timeout_s, tell)
    _end(result, as_json)


@click.command(epilog=EPILOG)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="The page to write (default: report.html in the first run's folder)."
)
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Also write the curves to this folder, for TensorBoard.")
@errors_are_messages
def report(runs: tuple[Path, ...], out: Path | None, tensorboard: Path | None) -> None:
    """Make one HTML page of the records RUNS, to be opened without a network; of several, with curves overlaid.

    The numbers of the plots are written beside it, as CSV files in a folder of the same name.

    \b
    gossipfl report runs/quickstart
    gossipfl report runs/quickstart runs/quickstart-2 --out compared.html
    """
    from gossipfl.scenario.report import write_report

    if tensorboard is not None:
        from gossipfl.scenario.report.tensorboard import summary_writer, write_tensorboard

        summary_writer()  # before a page is written that the command would not tell of
    page = write_report(runs, out)
    if tensorboard is not None:
        write_tensorboard(runs, tensorboard)
    click.echo(page)


@click.command(epilog=EPILOG)
@click.argument("name")
@click.option("--full", is_flag=True, help="The paper's size, not a quarter of an hour's (see below).")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the records (default: runs/reproduce-<name>[-full]).")
@click.option("--force", is_flag=True, help="Begin again, and replace the records of earlier runs.")
@click.option("--jobs", type=click.IntRange(1), help="Arms that run at once (default: one per core).")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default="data",
    show_default=True,
    help="Folder with the data sets that do not come with gossipfl: mnist/, cifar10.tar, ...",
)
@click.option("--json", "as_json", is_flag=True, help="Print the tables as JSON.")
@errors_are_messages
def reproduce(name: str, full: bool, out: Path | None, force: bool, jobs: int | None, data: Path, as_json: bool) -> None:
    """Run a published comparison again: what was published and what is measured, side by side.

    NAME is combo, bacombo, epidemic, mosaic, ari or qpart. The same command again goes on where it stopped.

    Core-hours of --full, at most, measured on a shared EPYC machine: mosaic 10, bacombo and epidemic 40, combo 330.

    \b
    gossipfl reproduce combo
    gossipfl reproduce combo --data ~/data                   also on MNIST, if mnist/ lies there
    gossipfl reproduce mosaic --jobs 4 --json
    gossipfl reproduce ari --data ~/data                     also on what lies there: mnist/, fashion-mnist/, cifar10*
    """
    from gossipfl.scenario.display import ArmsProgress, print_tables
    from gossipfl.scenario.interrupts import last_interrupt
    from gossipfl.scenario.reproduce import REPRODUCTIONS, find_data, run_arms
    from gossipfl.scenario.workers import num_cores

    reproduction = REPRODUCTIONS.get(name)()
    arms, missing = find_data(reproduction.arms(full), data)
    if missing:
        tell(f"left out, for want of them in {data}/: {', '.join(missing)}")
    folder = out or Path("runs") / f"reproduce-{name}{'-full' if full else ''}"
    finished = {} if force else reproduction.find_finished(arms, folder)
    jobs = max(1, min(jobs or num_cores(), len(arms) - len(finished)))
    progress = ArmsProgress(stderr_console(), len(arms), jobs, folder, len(finished))
    try:
        with progress:
            outcomes = run_arms(arms, folder, jobs, progress.done, reproduction.run, finished, progress.share)
    except KeyboardInterrupt:
        last_interrupt()
        progress.interrupted()
        sys.exit(130)
    tables = reproduction.tables(outcomes, full)
    if as_json:
        click.echo(json.dumps([asdict(table) for table in tables]))
    else:
        print_tables(stdout_console(), tables)
        click.echo(f"records  {folder}/")


@click.command(epilog=EPILOG)
@click.argument("scenario")
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="Also write the graph: a .svg, .graphml or .edges file.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures to stdout as JSON and nothing else.")
@errors_are_messages
def topology(scenario: str, overrides: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Show who is whose neighbour in a SCENARIO, how far peers are apart, and how fast averaging brings them together.

    Where a run on it would be refused, that is said at the end.

    \b
    gossipfl topology quickstart --set topology.kind=ring
    gossipfl topology my.toml --set topology.kind=regular --set topology.degree=4 --out graph.svg
    gossipfl topology my.toml --json | jq .spectral_gap
    """
    from gossipfl.overlay.graph_figures import measure
    from gossipfl.scenario.config import load_graph
    from gossipfl.scenario.topology_view import check_path, print_topology, write_topology

    if out is not None:
        check_path(out)
    loaded, refusal = load_graph(scenario, overrides)
    graph = loaded.build_topology()
    if out is not None:
        write_topology(graph, out)
    figures = measure(graph)
    if as_json:
        click.echo(json.dumps(asdict(figures) | {"rounds_to_tenth": figures.rounds_to_tenth}))
    else:
        print_topology(stdout_console(), loaded, graph, figures)
    if refusal is not None:
        tell(f"a run on it would be refused: {refusal}")


@click.command(epilog=EPILOG)
@click.argument("scenario")
@set_option
@click.option("--clock", type=click.Choice(CLOCKS), help="As of `gossipfl run` (default: the scenario's).")
@click.option("--json", "as_json", is_flag=True, help="Print the plan to stdout as JSON and nothing else.")
@errors_are_messages
def plan(scenario: str, overrides: tuple[str, ...], clock: str | None, as_json: bool) -> None:
    """Tell what a SCENARIO will take before it is run: bytes, time, memory, and which link or device is the bottleneck.

    Where memory or a trace is too short, the plan ends with the message and the exit code that the run would end with.

    \b
    gossipfl plan combo
    gossipfl plan my.toml --clock virtual --set peers=1000 --set network.uplink=10Mbit
    gossipfl plan my.toml --json | jq .timing.bottleneck
    """
    from gossipfl.scenario import load_scenario
    from gossipfl.scenario.planning import make_plan
    from gossipfl.scenario.planning.view import print_plan

    loaded = load_scenario(scenario, [*overrides, *([f"clock={clock}"] if clock else [])])
    with stderr_console().status("rehearsing"):  # seconds, and half a minute with ten thousand peers
        made = make_plan(loaded)
    if as_json:
        click.echo(json.dumps(asdict(made)))
    else:
        print_plan(stdout_console(), made)
    if made.refused:
        raise ConfigError(f"the run would be refused: {made.refused}")


@click.command(epilog=EPILOG)
@click.argument("scenario")
@click.option("--param", "params", multiple=True, metavar="KEY=VALUE,...", help="Values of a key to try; may be repeated.")
@click.option("--seeds", metavar="N,...", help="Run every combination with each of these seeds.")
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder of all records (default: runs/<name>-sweep).")
@click.option("--skip-existing", is_flag=True, help="Go on where an earlier sweep into this folder stopped.")
@click.option("--force", is_flag=True, help="Replace the folders of earlier runs.")
@click.option("--jobs", type=click.IntRange(min=1), help="Virtual runs side by side (default: one per core).")
@click.option("--clock", type=click.Choice(CLOCKS), help="As of `gossipfl run` (default: the scenario's).")
@quiet_option
@errors_are_messages
def sweep(
    scenario: str,
    params: tuple[str, ...],
    seeds: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    skip_existing: bool,
    force: bool,
    jobs: int | None,
    clock: str | None,
    quiet: bool,
) -> None:
    """Run a SCENARIO with every combination of some settings, and gather the figures in one table, sweep.csv.

    Runs under virtual time go side by side; on this machine's own clock, one after another. A run that fails does not stop
    the others.

    \b
    gossipfl sweep combo --param gossip.segments=1,2,4,8 --param gossip.replicas=1,2,4
    gossipfl sweep quickstart --clock virtual --param gossip.codec=float32,int8,topk:0.1 --seeds 0,1,2
    gossipfl sweep combo --param gossip.segments=1,2,4,8 --skip-existing       goes on where it stopped
    """
    from gossipfl.scenario.interrupts import last_interrupt
    from gossipfl.scenario.sweep import SweepDisplay, parse_seeds, print_sweep, run_sweep, sweep_runs

    if clock:
        overrides = (*overrides, f"clock={clock}")
    runs = sweep_runs(scenario, params, parse_seeds(seeds), out, overrides)
    folder = runs[0].folder.parent
    display = SweepDisplay(stderr_console(), len(runs), quiet)
    try:
        with display:
            rows = run_sweep(runs, folder, jobs=jobs, skip_existing=skip_existing, force=force, told=display.told)
    except KeyboardInterrupt:
        last_interrupt()
        display.interrupted()
        sys.exit(130)
    print_sweep(stdout_console(), rows, list(runs[0].settings))
    click.echo(folder / "sweep.csv")
    sys.exit(1 if any(row["error"] for row in rows) else 0)


def _end(result: RunResult, as_json: bool) -> NoReturn:
    """Show what the run came to, and end as it did."""
    from gossipfl.scenario.display import print_summary

    if as_json:
        click.echo(json.dumps(result.summary))
    else:
        print_summary(stdout_console(), result)
    if result.ending is not None:
        tell(f"gossipfl: {result.ending}")
    sys.exit(result.exit_code)


def _process_began() -> float:
    """When this process was started, in epoch seconds: the start-up that a user waits for includes Python's own."""
    import psutil

    began = psutil.Process().create_time()
    return began if 0 <= time.time() - began < 60 else time.time()
