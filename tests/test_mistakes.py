"""What a user or a machine gets wrong ends with one message that names it, and leaves nothing in the way of the next try."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import gossipfl
from gossipfl.cli import main
from gossipfl.errors import ConfigError, RunError
from gossipfl.scenario.config import load_scenario
from gossipfl.scenario.display import Display
from gossipfl.scenario.results import Observer

SMALL = [word for key in ("peers=4", "rounds=3", "central=false") for word in ("--set", key)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of so many bytes."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("a small file system needs a user who may mount one")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def gossipfl_says(*words: str | Path) -> tuple[int, list[str]]:
    """The exit code and the lines of stderr; anything but an exit is raised."""
    result = CliRunner().invoke(main, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr.splitlines()


# ---------------------------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize("clock", ["virtual", pytest.param("local", marks=pytest.mark.processes)])
@pytest.mark.parametrize("size", ["40k", "200k"])
def test_a_full_disk_ends_a_run_with_the_file_that_could_not_be_written(clock, size, small_disk):
    out = small_disk(size) / "run"
    code, lines = gossipfl_says("run", "quickstart", *SMALL, "--set", "rounds=20", "--clock", clock, "--quiet", "--out", out)
    assert code == 1 and len(lines) == 1, lines
    assert lines[0].startswith(f"gossipfl: {out}/") and "cannot be written: " in lines[0]
    assert not (out / "first").exists() and not (out / "shards").exists()


@pytest.mark.parametrize("clock", ["virtual", pytest.param("local", marks=pytest.mark.processes)])
def test_a_run_whose_folder_is_removed_ends_before_it_fills_the_next_ones(clock, tmp_path):
    out = tmp_path / "run"

    class Remover(Observer):
        def event(self, event: dict[str, Any], alive: int) -> None:
            shutil.rmtree(out, ignore_errors=True)

    with pytest.raises(RunError, match=rf"^{out} has been removed during the run, "):
        gossipfl.run("quickstart", overrides=["peers=4", "rounds=1000"], clock=clock, out=out, observer=Remover())
    assert not (out / "summary.json").exists() and not (out / "models").exists()


def test_a_page_that_a_disk_has_no_room_for_is_named(small_disk, tmp_path):
    (tmp_path / "events.jsonl").touch()
    page = small_disk("40k") / "page.html"
    code, lines = gossipfl_says("report", tmp_path, "--out", page)
    assert (code, lines) == (2, [f"gossipfl: {page} cannot be written: No space left on device; give another place with --out"])


def test_a_record_that_cannot_be_moved_away_is_not_replaced(small_disk):
    out = small_disk("1m")  # where something is mounted, nothing can be renamed
    (out / "events.jsonl").touch()
    code, lines = gossipfl_says("run", "quickstart", *SMALL, "--clock", "virtual", "--quiet", "--force", "--out", out)
    assert code == 2 and lines[0].startswith(f"gossipfl: --out {out} cannot be replaced: ") and len(lines) == 1


@pytest.mark.parametrize("clock", ["virtual", pytest.param("local", marks=pytest.mark.processes)])
def test_where_something_is_mounted_a_run_that_does_not_come_about_leaves_nothing(clock, small_disk):
    out = small_disk("1m")
    words = ["--clock", clock, "--quiet", "--set", "data.partition.alpah=3", "--out", out]
    code, lines = gossipfl_says("run", "quickstart", *SMALL, *words)
    assert code == 2 and len(lines) == 1 and "did you mean 'alpha'?" in lines[0]
    assert not list(out.iterdir())


def test_a_link_to_a_folder_stays_one_and_force_replaces_what_is_there(tmp_path):
    out, there = tmp_path / "run", tmp_path / "large disk" / "run"
    out.symlink_to(there)
    words = ["run", "quickstart", *SMALL, "--clock", "virtual", "--quiet", "--out", out]
    assert gossipfl_says(*words) == (0, [])  # also where nothing is there yet
    assert gossipfl_says(*words)[0] == 2
    (there / "of the first").touch()
    assert gossipfl_says(*words, "--force") == (0, [])
    assert out.is_symlink() and (there / "summary.json").exists() and not (there / "of the first").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large disk", "run"] and len(list(there.parent.iterdir())) == 1


@pytest.mark.parametrize("variables", [{"GOSSIPFL_CACHE": "/proc/cache"}, {"GOSSIPFL_CACHE": "", "HOME": "/proc"}], ids=str)
def test_where_no_data_can_be_kept_the_variable_to_set_is_named(variables, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, lines = gossipfl_says("run", "quickstart", *SMALL, "--clock", "virtual", "--quiet", "--out", tmp_path / "run")
    assert code == 2 and len(lines) == 1 and lines[0].startswith("gossipfl: /proc/"), lines
    assert lines[0].endswith("cannot be written: No such file or directory; mend that, or set GOSSIPFL_CACHE")


def test_a_sweep_that_cannot_keep_its_table_does_not_begin(tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "sweep"
    code, lines = gossipfl_says("sweep", "quickstart", *SMALL, "--clock", "virtual", "--seeds", "0,1", "--out", out)
    assert (code, lines) == (2, [f"gossipfl: --out {out} cannot be written to: Not a directory; choose another folder"])


# ---------------------------------------------------------------------------------------------------------------- inputs


def test_a_graph_file_without_a_graph_is_named(tmp_path):
    path = tmp_path / "e.graphml"
    path.write_text("<graphml></graphml>")
    code, lines = gossipfl_says("topology", "quickstart", "--set", "topology.kind=file", "--set", f"topology.path={path}")
    assert code == 2 and len(lines) == 1 and f"{str(path)!r} cannot be read (" in lines[0]


def test_more_peers_than_anybody_could_hold_are_refused_at_once():
    code, lines = gossipfl_says("plan", "quickstart", "--set", "peers=100000000")
    assert code == 2 and "peers = 100000000 must be at most 1000000" in lines[0]


def test_what_is_no_scenario_is_named():
    with pytest.raises(ConfigError, match="scenario = None must be a file, the name of a built-in one, a dictionary"):
        gossipfl.run(None)


# ---------------------------------------------------------------------------------------------------- runs that end badly


def test_a_failed_run_says_why(tmp_path):
    words = ["--clock", "virtual", "--quiet", "--set", "network.latency=1e300h", "--out", tmp_path / "run"]
    code, lines = gossipfl_says("run", "quickstart", *SMALL, *words)
    assert code == 1
    assert lines[-1].startswith(
        "gossipfl: the run failed, for 0 of 4 peers finished; p0: no answer from p1, p2, p3 within 30 s; "
    )
    assert lines[-1].endswith("; 1 more reasons in events.jsonl")


def test_a_run_that_too_many_have_left_says_so(tmp_path):
    kill = "churn.kill=[{peer='p1', at='0.01s'}, {peer='p2', at='0.01s'}, {peer='p3', at='0.01s'}]"
    words = ["--clock", "virtual", "--quiet", "--set", kill, "--out", tmp_path / "run"]
    code, lines = gossipfl_says("run", "quickstart", *SMALL, *words)
    assert code == 1
    assert "for 1 of 4 peers finished; p1, p2, p3: was away, as [churn] has it" in lines[-1]


def test_a_run_in_which_nobody_is_ever_there_is_refused(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,peer,online\n" + "".join(f"0,p{index},0\n" for index in range(4)))
    words = ["run", "quickstart", *SMALL, "--quiet", "--set", f"churn.trace={trace}", "--out", tmp_path / "run"]
    code, lines = gossipfl_says(*words)
    assert code == 2 and "[churn] lets nobody be there at any time; have somebody be there" in lines[0]
    with trace.open("a") as file:
        file.write("1,p0,1\n1,p1,1\n2,p2,1\n2,p3,1\n")
    assert gossipfl_says(*words)[0] == 0


# -------------------------------------------------------------------------------------------------------------- progress


def shell_says(redirections: str, *words: str | Path) -> tuple[int, str]:
    """The exit code of the command with these redirections of a shell, and what it writes besides."""
    command = f"{shlex.join([sys.executable, '-m', 'gossipfl', *map(str, words)])} {redirections}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("clock", ["virtual", "local"])
@pytest.mark.parametrize("redirections", ["2> >(true)", "2> /dev/full", "2>&-", "<&- >&- 2>&-"], ids=str)
def test_a_run_goes_on_where_nobody_hears_of_it_any_more(redirections, clock, tmp_path):
    out = tmp_path / "run"
    code, said = shell_says(redirections, "run", "quickstart", *SMALL, "--clock", clock, "--out", out)
    assert code == 0 and "Traceback" not in said, said
    assert json.loads((out / "summary.json").read_text())["exit_code"] == 0


@pytest.mark.processes
@pytest.mark.parametrize("words", [["--json"], []], ids=str)
def test_a_result_that_cannot_be_written_is_a_message(words, tmp_path):
    words = ["run", "quickstart", *SMALL, "--clock", "virtual", "--quiet", "--out", tmp_path / "run", *words]
    code, said = shell_says("> /dev/full", *words)
    assert code == 1
    assert said == "gossipfl: the system says: No space left on device; mend that, and give the command again\n"


def test_a_terminal_of_80_columns_shows_round_accuracy_rate_and_time_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    display = Display(console)
    display.data_ready(load_scenario({"peers": 20, "rounds": 1000}), None)
    display.started(Path("run"), 1000)
    for peer in range(20):
        event = {"event": "round", "peer": f"p{peer}", "round": 990, "payload_bytes": 1, "accuracy_after": 0.5}
        display.event(event, 19)
    display.close()
    frames = re.split(r"[\r\n]", re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", console.file.getvalue()))
    last = [frame for frame in frames if frame.startswith("round ")][-1]
    assert re.fullmatch(r"round 990/1000 +accuracy 0\.500  \S+ rounds/s  0:00:\d\d left  peers 19/20", last.rstrip())


def test_a_terminal_without_block_characters_shows_something_in_their_place():
    words = [sys.executable, "-m", "gossipfl", "topology", "quickstart", "--set", "topology.kind=ring"]
    done = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and b"\np6 ?" in done.stdout


def test_brackets_are_shown_as_they_are(tmp_path):
    folder = tmp_path / "[red]" / "[" / "red]"
    words = ["--clock", "virtual", "--set", "churn.online=0.9", "--set", "churn.period=10ms", "--set", "min_peers=1"]
    _, lines = gossipfl_says("run", "quickstart", *SMALL, *words, "--out", folder)
    assert f"4 peers, 9,610 parameters, writing to {folder}" in lines
    assert any(line.startswith("[churn] has a peer there for") for line in lines)


def test_a_terminal_of_40_columns_shows_the_round_and_how_many_samples_each_has():
    console = Console(file=io.StringIO(), force_terminal=True, width=40, color_system=None)
    display = Display(console)
    display.data_ready(load_scenario({"peers": 2, "rounds": 60, "gossip": {"replicas": 1}}), np.full((2, 10), 7))
    display.started(Path("run"), 1000)
    display.event({"event": "round", "peer": "p0", "round": 59, "payload_bytes": 1, "accuracy_after": 0.5}, 2)
    display.close()
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", console.file.getvalue())
    assert re.search(r"p1 +│ +70 ", shown) and "round 59/60 " in shown


# ---------------------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("after", ["hold", "repeat", None])
def test_a_run_that_outlasts_its_trace_against_expectations_says_that_the_last_rates_held(after, tmp_path):
    trace = tmp_path / "rates.csv"
    trace.write_text("time_s,peer,uplink,downlink\n0,p0,1,1\n0.125,p0,2,2\n")
    words = ["--set", f"network.trace={trace}", *(["--set", f"network.trace_after={after}"] if after else [])]
    code, lines = gossipfl_says("run", "quickstart", "--clock", "local", *SMALL, *words, "--out", tmp_path / "run")
    told = [line for line in lines if line.startswith("network.trace ends at 0.125 s: its last rates held from then until ")]
    assert code == 0 and len(told) == (after is None)


def test_two_overrides_that_exclude_each_other_are_refused(tmp_path):
    matrix = tmp_path / "rates.csv"
    matrix.write_text("0,1\n1,0\n")
    words = ["--set", "network.pair=1Mbit", "--set", f"network.pair_matrix={matrix}", "--set", "peers=2"]
    code, lines = gossipfl_says("plan", "quickstart", "--set", "gossip.replicas=1", *words)
    assert code == 2 and "network.pair and network.pair_matrix exclude each other; remove one" in lines[0]


# ---------------------------------------------------------------------------------------------------------------- others


def test_a_scenario_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "scenario.toml"
    path.write_text("peers = 5\n", encoding="utf-8-sig")
    assert load_scenario(path).peers == 5


@pytest.mark.parametrize("rate", ["1e30", "0.1"])
def test_a_run_that_diverges_is_remarked_upon_once(rate, tmp_path):
    words = ["--clock", "virtual", "--set", f"training.learning_rate={rate}", "--out", tmp_path / "run"]
    code, lines = gossipfl_says("run", "quickstart", *SMALL, *words)
    told = [line for line in lines if line.startswith("training diverges: the loss of p")]
    assert code == 0 and len(told) == (rate == "1e30")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"] == told


@pytest.mark.parametrize("clock", ["virtual", "local"])
def test_figures_of_models_that_diverged_are_not_known_in_json_that_anyone_reads(clock, tmp_path):
    scenario = {"peers": 4, "rounds": 2, "training": {"learning_rate": 1e30}, "model_args": {"hidden": [8]}}
    summary = gossipfl.run(scenario, clock=clock, out=tmp_path / "run").summary
    json.dumps(summary, allow_nan=False)
    assert summary["consensus_distance"] == {"first": None, "last": None}
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    json.dumps(events, allow_nan=False)
    assert None in [event["train_loss"] for event in events if event["event"] == "round"]


@pytest.mark.parametrize(("clock", "ends_s"), [("virtual", 0.5), ("local", 0.001)])
def test_what_changes_how_a_result_is_to_be_read_is_told_also_where_nothing_else_is(clock, ends_s, tmp_path):
    trace = tmp_path / "rates.csv"
    trace.write_text(f"time_s,peer,uplink,downlink\n0,p0,10,10\n{ends_s},p0,20,20\n")
    words = ["--quiet", "--json", "--clock", clock, "--set", "training.learning_rate=1e30", "--set", f"network.trace={trace}"]
    if clock == "virtual":  # where only a target makes the end uncertain
        words += ["--set", "stop.target_accuracy=1"]
    done = subprocess.run(
        [sys.executable, "-m", "gossipfl", "run", "quickstart", *SMALL, *words, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=os.environ | {"GOSSIPFL_CACHE": str(tmp_path / "cache")},
    )
    told = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in told] == ["training diverges", f"network.trace ends at {ends_s} s"]
    assert json.loads(done.stdout)["warnings"] == told


def test_a_folder_that_is_taken_is_told_before_torch_is_loaded(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    lines = (
        f"import sys, gossipfl\ntry: gossipfl.run('quickstart', out={str(tmp_path / 'run')!r})\nexcept gossipfl.ConfigError:"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{lines} print('torch' in sys.modules)"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
