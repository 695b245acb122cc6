"""Sweeps: which combinations are made, what is refused before anything starts, what is left behind, and by whom."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from gossipfl.cli import main
from gossipfl.errors import ConfigError
from gossipfl.scenario.sweep import print_sweep, run_sweep, sweep_runs

QUICK = ("peers=4", "rounds=2", "central=false", "clock=virtual")
BASE = [word for override in QUICK for word in ("--set", override)]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache of data sets for the session, and none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSIPFL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


def sweep(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["sweep", "quickstart", *BASE, *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------------------- combinations


def test_every_combination_has_a_folder_named_after_it_the_last_setting_changing_fastest():
    runs = sweep_runs("quickstart", ["gossip.segments=1,2", "gossip.codec=int8,topk:0.1"], [0, 3], Path("out"))
    assert len(runs) == 8
    assert [run.name for run in runs[:3]] == [
        "gossip.segments=1,gossip.codec=int8,seed=0",
        "gossip.segments=1,gossip.codec=int8,seed=3",
        "gossip.segments=1,gossip.codec=topk:0.1,seed=0",
    ]
    assert (runs[-1].scenario.gossip.segments, runs[-1].scenario.gossip.codec, runs[-1].scenario.protocol_seed) == (
        2,
        "topk:0.1",
        3,
    )
    assert len({run.scenario.sha256 for run in runs}) == 8


def test_commas_within_brackets_and_quotes_do_not_divide_values():
    runs = sweep_runs(
        "quickstart", ["model_args.hidden=[8, 4],16", 'network.uplink={kind="uniform", low="1Mbit", high="2Mbit"}']
    )
    assert [run.scenario.model_args["hidden"] for run in runs] == [[8, 4], 16]
    assert all("/" not in run.name and " " not in run.name for run in runs)


def test_a_value_given_twice_is_run_once():
    assert len(sweep_runs("quickstart", ["gossip.segments=2,2"], [1, 1])) == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--param", "gossip.segmets=1,2"], ("unknown key 'gossip.segmets'", "did you mean 'gossip.segments'?")),
        (["--param", "gossip.segments"], ("--param 'gossip.segments' must be key=value,value",)),
        (["--param", "gossip.segments="], ("--param 'gossip.segments=' must be key=value,value",)),
        (["--param", "gossip.segments=1,,2"], ("must be key=value,value",)),
        (["--param", "=1"], ("--param '=1' must be key=value,value",)),
        (["--param", "rounds=1", "--param", "rounds=2"], ("--param has a key twice; give all its values at once",)),
        (["--param", "seed.data=1,2", "--param", "seed=5"], ("--param seed=... and --param seed.data=... set the same twice",)),
        (["--param", "seed=1,2", "--seeds", "1"], ("--seeds and --param seed=... exclude each other",)),
        (["--seeds", "0,one"], ("--seeds '0,one' must be whole numbers",)),
        ([], ("a sweep needs something to vary",)),
        (["--param", "gossip.replicas=1,2,5"], ("gossip.replicas=5: ", "exceeds the 3 neighbours of p0")),
        (["--param", "gossip.aggregation=mean,mediam"], ("aggregation=mediam: ", "did you mean 'median'?")),
        (
            ["--param", "rounds=0,1", "--param", "gossip.segments=0,1"],
            ("rounds=0,gossip.segments=1: rounds = 0", "rounds=1,gossip.segments=0: gossip.segments = 0"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_right_is_refused_before_anything_starts(arguments, parts, tmp_path):
    code, shown, error = sweep(*arguments, "--out", tmp_path / "out")
    assert code == 2 and shown == ""
    for part in parts:
        assert part in error
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- running


def test_a_sweep_leaves_a_record_of_each_run_and_a_table_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "out"
    words = ["--param", "gossip.segments=1,2", "--seeds", "0,1", "--out", out]
    code, shown, progress = sweep(*words)
    assert code == 0 and shown.splitlines()[-1] == str(out / "sweep.csv")
    assert [line.partition(" ")[0] for line in progress.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    first = rows(out)
    assert [(row["gossip.segments"], row["seed"]) for row in first] == [("1", "0"), ("1", "1"), ("2", "0"), ("2", "1")]
    for row in first:
        summary = json.loads((out / row["run"] / "summary.json").read_text())
        assert row["models_sha256"] == summary["models_sha256"] and row["error"] == ""
        assert float(row["accuracy_mean"]) == summary["accuracy"]["mean"]
        assert float(row["virtual_s"]) == summary["virtual_seconds"]
        assert int(row["payload_bytes"]) == summary["bytes"]["payload"]
    assert len({row["models_sha256"] for row in first}) == 4

    code, _, error = sweep(*words)
    assert code == 2 and "exists; pass --skip-existing to go on, --force to replace what is there" in error

    (out / first[2]["run"] / "summary.json").unlink()  # as if it had been cut short
    kept = [(out / row["run"] / "summary.json").stat().st_mtime_ns for row in first if row is not first[2]]
    code, _, _ = sweep(*words, "--skip-existing")
    assert code == 0
    assert kept == [(out / row["run"] / "summary.json").stat().st_mtime_ns for row in first if row is not first[2]]
    assert [row["models_sha256"] for row in rows(out)] == [row["models_sha256"] for row in first]

    summary = out / first[0]["run"] / "summary.json"
    ours = summary.read_text()
    summary.write_text(json.dumps(json.loads(ours) | {"version": "0.0.1"}))
    code, _, error = sweep(*words, "--skip-existing")
    assert code == 2 and "holds a run of gossipfl 0.0.1; pass --force to replace it" in error
    summary.write_text(json.dumps({key: value for key, value in json.loads(ours).items() if key != "accuracy"}))
    code, _, _ = sweep(*words, "--skip-existing")
    assert code == 0 and rows(out)[0]["accuracy_mean"] == ""
    summary.write_text(ours)

    code, _, error = sweep(*words, "--skip-existing", "--set", "training.batch_size=8")
    assert code == 2 and "holds a run of another scenario; pass --force to replace it, or another --out" in error


def test_the_table_of_another_sweep_is_not_replaced_unless_by_force(tmp_path):
    out = tmp_path / "out"
    assert sweep("--param", "gossip.segments=1,2", "--out", out, "--jobs", "1")[0] == 0
    ours = (out / "sweep.csv").read_text()
    for words in (["gossip.codec=int8"], ["gossip.codec=int8", "--skip-existing"], ["gossip.segments=2", "--skip-existing"]):
        code, _, error = sweep("--param", *words, "--out", out)
        assert code == 2 and f"{out}/sweep.csv has runs that are none of this sweep, such as gossip.segments=1; pass" in error
        assert "--force to replace it, another --out, or --skip-existing with the values of both" in error
        assert (out / "sweep.csv").read_text() == ours
    assert sweep("--param", "gossip.segments=1,2,4", "--skip-existing", "--out", out, "--jobs", "1")[0] == 0
    assert (out / "sweep.csv").read_text().startswith(ours) and len(rows(out)) == 3
    assert sweep("--param", "gossip.codec=int8", "--force", "--out", out, "--jobs", "1")[0] == 0
    assert [row["run"] for row in rows(out)] == ["gossip.codec=int8"]


def test_a_run_that_fails_does_not_stop_the_others_and_is_told(tmp_path):
    code, shown, error = sweep("--param", "gossip.segmentation=by_layer,even", "--out", tmp_path / "out", "--jobs", "1")
    assert code == 1 and "failed" in shown
    assert "1/2  gossip.segmentation=by_layer  failed: gossip.segments = 8 exceeds the model's 4 tensors" in error
    failed, good = rows(tmp_path / "out")
    assert "exceeds the model's" in failed["error"] and failed["accuracy_mean"] == ""
    assert good["error"] == "" and float(good["accuracy_mean"]) > 0


def test_a_run_in_which_too_few_peers_finish_is_told_with_its_figures(tmp_path):
    killed = 'churn.kill=[{peer="p1", at="0.1s"}]'
    words = ["--set", killed, "--set", "compute.step_time=100ms", "--param", "min_peers=4,3", "--out", tmp_path / "out"]
    code, shown, error = sweep(*words, "--jobs", "1")
    assert code == 1 and "1/2  min_peers=4  failed: 1 of 4 peers did not finish" in error
    assert ["failed" in line for line in shown.splitlines() if re.match(r"│ +[34] │ +0\.\d+ ", line)] == [True, False]
    failed, good = rows(tmp_path / "out")
    assert good["error"] == "" and failed["accuracy_mean"] == good["accuracy_mean"] != ""


def test_the_table_tells_keys_of_one_ending_apart_and_virtual_seconds_from_real_ones(capsys):
    row = {"wall_s": 2.0, "virtual_s": 3.0, "accuracy_mean": 0.5, "accuracy_min": 0.25, "payload_bytes": 2**20}
    row |= {"topology.kind": "ring", "data.partition.kind": "iid", "consensus_distance": None, "error": ""}
    print_sweep(Console(width=120), [row], ["topology.kind", "data.partition.kind"])
    assert re.findall(r"[\w.]+(?: s)?", capsys.readouterr().out.splitlines()[1]) == [
        *("topology.kind", "data.partition.kind", "accuracy", "worst", "virtual s", "MiB", "consensus")
    ]


def test_where_clocks_differ_the_table_says_whose_seconds_are_virtual(capsys):
    row = {"accuracy_mean": 0.5, "accuracy_min": 0.25, "payload_bytes": 2**20, "consensus_distance": None, "error": ""}
    sockets, virtual = (row | {"peers": peers, "wall_s": 2.0, "virtual_s": s} for peers, s in (("63", None), ("64", 3.0)))
    print_sweep(Console(width=120), [sockets, virtual], ["peers"])
    shown = capsys.readouterr().out
    assert "seconds" in shown and re.findall(r"│ +6[34] │ .* │ +([\d.]+(?: virtual)?) │ +1 │", shown) == ["2", "3 virtual"]


@pytest.mark.parametrize(("width", "last"), [(80, "consensus"), (60, "worst"), (40, "accuracy")])
def test_figures_that_a_terminal_has_no_room_for_are_left_out_not_cut(width, last, capsys):
    row = {"wall_s": 2.0, "virtual_s": 3.0, "accuracy_mean": 0.5125, "accuracy_min": 0.25, "payload_bytes": 2**20}
    row |= {"gossip.segments": "8", "gossip.codec": "topk:0.1", "consensus_distance": 0.5, "error": "1 of 4 died"}
    print_sweep(Console(width=width), [row], ["gossip.segments", "gossip.codec"])
    shown = capsys.readouterr().out
    assert "…" not in shown and "0.5125" in shown and "failed" in shown
    assert last in shown and all(len(line) <= width for line in shown.splitlines())


def test_runs_on_this_machines_own_clock_go_one_after_another(tmp_path):
    overrides = ["peers=2", "rounds=1", "central=false", "gossip.replicas=1", "transport.kind=inproc"]
    runs = sweep_runs("quickstart", ["training.learning_rate=0.1,0.2"], (), tmp_path, overrides)
    told: list[str] = []
    found = run_sweep(runs, tmp_path, told=lambda run, row: told.append(run.name))
    assert told == [run.name for run in runs]
    assert all(row["virtual_s"] is None and row["wall_s"] > 0 and not row["error"] for row in found)


def test_two_combinations_that_would_share_a_folder_are_refused():
    with pytest.raises(ConfigError, match=r"would share the folder .*; change one of them"):
        sweep_runs("quickstart", ["model_args.hidden=[8 ],[8\t]"])


@contextlib.contextmanager
def _ended(process):
    """It ends with the test, whatever has become of either."""
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_second_interrupt_changes_nothing_about_the_last_words_of_a_sweep(number, tmp_path):
    words = ["--clock", "virtual", "--param", "rounds=1,100000,1000000", "--jobs", "1", "--out", "out"]
    command = [sys.executable, "-m", "gossipfl", "sweep", "quickstart", *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with _ended(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("1/3  rounds=1 ")
        process.send_signal(number)
        assert process.stderr.readline().startswith("interrupted: 1 of 3 runs is done; the same command with --skip-existing")
        while process.poll() is None:
            process.send_signal(number)
        assert process.stderr.read() == "" and process.wait(timeout=30) == 130


@pytest.mark.processes
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_stops_the_processes_and_leaves_what_has_finished(tmp_path):
    words = ["--set", "central=false", "--clock", "virtual", "--param", "rounds=1,100000", "--jobs", "1", "--out", "out"]
    command = [sys.executable, "-m", "gossipfl", "sweep", "quickstart", *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with _ended(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("1/2  rounds=1 ")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        told = "interrupted: 1 of 2 runs is done; the same command with --skip-existing goes on from there"
        rest = process.stderr.read()
        assert "Traceback" not in rest and rest.splitlines()[-1] == told
    assert children and not psutil.wait_procs(children, timeout=10)[1]
    assert [row["run"] for row in rows(tmp_path / "out")] == ["rounds=1"]
    assert (tmp_path / "out" / "rounds=1" / "summary.json").exists()
    assert not (tmp_path / "out" / "rounds=100000" / "summary.json").exists()


def test_what_a_target_took_is_in_the_table(tmp_path):
    words = ["--set", "rounds=10", "--set", "stop.target_accuracy=0.3", "--param", "gossip.replicas=1,2"]
    code, _, stderr = sweep(*words, "--out", tmp_path / "sweep", "--quiet")
    assert code == 0, stderr
    for row in rows(tmp_path / "sweep"):
        target = json.loads((tmp_path / "sweep" / row["run"] / "summary.json").read_text())["to_target"]
        found = int(row["to_target_round"]), float(row["to_target_s"]), int(row["to_target_bytes"])
        assert found == (target["round"], target["seconds"], target["payload_bytes"])
