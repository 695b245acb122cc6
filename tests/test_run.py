"""Whole runs: `gossipfl run` starts real processes, which gossip over real sockets and leave a record.

The small runs have 4 peers and 5 rounds on the digits. What only concerns the numbers (codecs, models, partitions, ...) runs
with `transport.kind = "inproc"`, in a thread of this process; the others start processes.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file
from sockets import wait_for
from torch import nn
from torch.nn import functional as F

import gossipfl
from gossipfl.errors import ConfigError, RunError
from gossipfl.learning.checkpoint import load_model
from gossipfl.scenario import load_scenario
from gossipfl.scenario.crew import Crew
from gossipfl.scenario.results import Observer
from gossipfl.scenario.temporary import MARK, remove_stale
from gossipfl.segments.codecs import codec

REPOSITORY = Path(__file__).parents[1]
DEADLINE_S = 60.0
SMALL = ("peers=4", "rounds=5", "central=false")
INPROC = (*SMALL, "transport.kind=inproc")

SUMMARY_KEYS = {
    *("scenario", "scenario_sha256", "seed", "clock", "peers", "rounds", "segments", "replicas", "parameters", "accuracy"),
    *("consensus_distance", "bytes", "seconds", "virtual_seconds", "faults", "memory_mib", "models_sha256", "engine"),
    *("to_target", "version", "machine", "messages", "warnings", "exit_code", "devices"),
}
NESTED_KEYS = {
    "accuracy": {"mean", "min", "max", "std", "average_model", "before_merge_mean", "central"},
    "consensus_distance": {"first", "last"},
    "bytes": {"payload", "wire", "control", "repeated", "local", "payload_per_peer_round"},
    "seconds": {"startup", "wall", "round_mean", "train", "wait", "merge", "virtual"},
    "faults": {"missing_segments", "late", "refused", "rejected", "dead_peers", "dead_as_planned"},
    "memory_mib": {"peak_total"},
    "engine": {"kind", "device", "threads", "fast_math", "memory_layout", "torch"},
}
ROUND_KEYS = {
    *("event", "peer", "round", "time_s", "train_loss", "accuracy_before", "accuracy_after", "train_s", "wait_s", "merge_s"),
    *("payload_bytes", "wire_bytes", "control_bytes", "repeated_bytes", "local_bytes", "segments_mixed", "late", "refused"),
    *("rejected", "timeouts", "missing", "staleness_mean", "staleness_max", "staleness_by_segment", "adopted", "received_from"),
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache of data sets for the session, and none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSIPFL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


# ----------------------------------------------------------------------------------------------- reading what a run leaves


def events_of(folder: Path, kind: str = "round") -> list[dict[str, Any]]:
    """The complete lines of events.jsonl of this kind, also while the run goes on."""
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["event"] == kind]
    return []


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def check_keys(summary: dict[str, Any]) -> None:
    """Exactly the documented keys, at every level."""
    assert set(summary) == SUMMARY_KEYS
    for key, nested in NESTED_KEYS.items():
        assert set(summary[key]) == nested, key


def even_sizes(parameters: int, segments: int) -> list[int]:
    """Lengths of `segments` parts that differ by one value at most."""
    least, longer = divmod(parameters, segments)
    return [least + 1] * longer + [least] * (segments - longer)


# ------------------------------------------------------------------------------------------------- runs that can be hurt


@dataclass
class Launched:
    """`gossipfl run` in a process of its own, in its own session; all processes of it carry a mark in their environment."""

    process: subprocess.Popen[str]
    folder: Path
    mark: str

    def workers(self) -> list[psutil.Process]:
        """The worker processes of this run, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "gossipfl.runtime.worker" in process.cmdline() and process.environ().get("GOSSIPFL_TEST") == self.mark:
                    found.append(process)
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def worker(self, index: int) -> psutil.Process:
        """The worker that logs to log/worker<index>.log; with one peer per process, that of p<index>."""
        log = str((self.folder / "log" / f"worker{index}.log").resolve())
        (worker,) = [worker for worker in self.workers() if os.readlink(f"/proc/{worker.pid}/fd/1") == log]
        return worker

    def await_round(self, round_: int, peers: int = 4) -> None:
        """Until this many peers have told of this round."""

        def reached() -> bool:
            assert self.process.poll() is None, "the run has ended:\n" + self.process.communicate()[1]
            return sum(event["round"] == round_ for event in events_of(self.folder)) >= peers

        assert wait_for(reached, DEADLINE_S), "the run does not proceed"

    def ended(self, deadline_s: float = DEADLINE_S) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, once it has ended."""
        stdout, stderr = self.process.communicate(timeout=deadline_s)
        return self.process.returncode, stdout, stderr


Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts `gossipfl run` and kills what is left of it when the test is over."""
    launched: list[Launched] = []

    def start(*arguments: str, patch: str = "", cwd: Path = tmp_path) -> Launched:
        mark, folder = uuid.uuid4().hex, tmp_path / f"record{len(launched)}"
        process = subprocess.Popen(
            [sys.executable, "-c", f"{patch}\nfrom gossipfl.cli import main; main()", "run", *arguments, "--out", str(folder)],
            env=os.environ | {"GOSSIPFL_TEST": mark},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        launched.append(Launched(process, folder, mark))
        return launched[-1]

    yield start
    for each in launched:
        with contextlib.suppress(ProcessLookupError):
            each.process.kill()
        each.process.communicate()
        for worker in each.workers():
            with contextlib.suppress(psutil.Error):
                worker.kill()


GATED_STEP = """
import fcntl
from torch.nn import functional as F

num_steps = 0

def step(model, x, y):
    global num_steps
    num_steps += 1
    if num_steps > 3:
        with open("gate") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
    return F.cross_entropy(model(x), y)
"""
GATED = (*SMALL, "rounds=30", "training.local_steps=1", "training.step=gated:step", "peers_per_process=1")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Holds runs with the settings `GATED`, each of whose peers trains a step per round, in round 4, until it is called."""
    (tmp_path / "gated.py").write_text(GATED_STEP)
    with (tmp_path / "gate").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lambda: fcntl.flock(file, fcntl.LOCK_UN)


def settings(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


# --------------------------------------------------------------------------------------------------------- the quickstart


@dataclass
class Ended:
    stdout: str
    stderr: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return summary_of(self.folder)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The quickstart as shipped."""
    folder = tmp_path_factory.mktemp("quickstart") / "record"
    command = [sys.executable, "-m", "gossipfl", "run", "scenarios/quickstart.toml", "--out", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return Ended(done.stdout, done.stderr, folder)


@pytest.mark.processes
def test_the_quickstart_as_shipped_learns_the_digits(quickstart):
    accuracy = quickstart.summary["accuracy"]
    assert accuracy["min"] >= 0.93 and accuracy["mean"] >= 0.95
    assert accuracy["central"] >= 0.95 and accuracy["average_model"] >= 0.95
    assert accuracy["min"] <= accuracy["mean"] <= accuracy["max"] and accuracy["std"] < 0.05
    distance = quickstart.summary["consensus_distance"]
    assert 0 < distance["last"] < distance["first"]


@pytest.mark.processes
def test_the_quickstart_leaves_and_tells_every_file_of_the_record(quickstart):
    files = {path.relative_to(quickstart.folder).as_posix() for path in quickstart.folder.rglob("*") if path.is_file()}
    models = {f"models/{name}.safetensors" for name in [*(f"p{index}" for index in range(8)), "average"]}
    assert {file for file in files if not file.startswith("log/")} == {
        *("scenario.toml", "roster.toml", "events.jsonl", "summary.json", *models)
    }
    assert any(file.startswith("log/worker") for file in files)
    assert f"record  {quickstart.folder}/" in quickstart.stdout and f"models  {quickstart.folder}/models/" in quickstart.stdout
    assert f"{quickstart.summary['accuracy']['mean']:.4f}" in quickstart.stdout
    assert f"{quickstart.summary['accuracy']['min']:.4f}" in quickstart.stdout


@pytest.mark.processes
def test_the_records_scenario_loads_back_to_an_equal_one_apart_from_the_engine(quickstart):
    values = tomllib.loads((quickstart.folder / "scenario.toml").read_text())
    assert set(values.pop("engine")) == NESTED_KEYS["engine"]
    again = load_scenario(values)
    assert again == load_scenario("quickstart") and again.sha256 == quickstart.summary["scenario_sha256"]


@pytest.mark.processes
def test_the_events_have_a_line_for_each_peer_and_round(quickstart):
    rounds, names = events_of(quickstart.folder), [f"p{index}" for index in range(8)]
    assert len(rounds) == 8 * 60
    assert {(event["peer"], event["round"]) for event in rounds} == {(name, r) for name in names for r in range(1, 61)}
    for event in rounds:
        assert set(event) == ROUND_KEYS
        assert event["accuracy_before"] is not None and event["accuracy_after"] is not None
        assert event["segments_mixed"] == 8 * 2 and event["missing"] == 0 and event["staleness_max"] == 0
        assert event["train_s"] > 0 and event["time_s"] > 0 and not event["adopted"]
    finished = events_of(quickstart.folder, "finished")
    assert sorted(event["peer"] for event in finished) == names
    assert all(event["error"] is None and event["round"] == 60 for event in finished)
    assert events_of(quickstart.folder, "fault") == []


@pytest.mark.processes
def test_the_summary_has_exactly_the_documented_keys_and_fits_the_events(quickstart):
    summary, rounds = quickstart.summary, events_of(quickstart.folder)
    check_keys(summary)
    assert (summary["scenario"], summary["seed"], summary["clock"]) == ("quickstart", 0, "local")
    assert (summary["peers"], summary["rounds"], summary["segments"], summary["replicas"]) == (8, 60, 8, 2)
    assert summary["parameters"] == 64 * 128 + 128 + 128 * 10 + 10
    assert summary["version"] == gossipfl.__version__ and summary["exit_code"] == 0 and summary["virtual_seconds"] is None
    counts = dict.fromkeys(("missing_segments", "late", "refused", "rejected"), 0)
    assert summary["faults"] == counts | {"dead_peers": [], "dead_as_planned": []}
    assert summary["seconds"]["virtual"] is None
    for key in ("payload", "wire", "control", "repeated", "local"):
        assert summary["bytes"][key] == sum(event[f"{key}_bytes"] for event in rounds), key
    for key in ("train", "wait", "merge"):
        assert summary["seconds"][key] == pytest.approx(sum(event[f"{key}_s"] for event in rounds), abs=1e-3), key
    last = [event["accuracy_after"] for event in rounds if event["round"] == 60]
    assert summary["accuracy"]["mean"] == pytest.approx(np.mean(last), abs=1e-6)
    assert summary["accuracy"]["min"] == pytest.approx(min(last), abs=1e-6)
    assert summary["accuracy"]["std"] == pytest.approx(np.std(last), abs=1e-6)
    assert summary["memory_mib"]["peak_total"] > 50 and summary["seconds"]["startup"] > 0


@pytest.mark.processes
def test_the_average_model_is_the_mean_of_the_peers_and_the_digest_that_of_their_files(quickstart):
    folder = quickstart.folder / "models"
    names = [f"p{index}" for index in range(8)]
    peers = [load_file(folder / f"{name}.safetensors") for name in names]
    average = load_file(folder / "average.safetensors")
    assert set(average) == {"fc1.weight", "fc1.bias", "head.weight", "head.bias"}
    for tensor, values in average.items():
        mean = np.mean([peer[tensor].astype(np.float64) for peer in peers], axis=0)
        np.testing.assert_array_equal(values, mean.astype(np.float32))
    digest = hashlib.sha256()
    for name in names:
        digest.update(load_model(folder / f"{name}.safetensors")[1].tobytes())
    assert digest.hexdigest() == quickstart.summary["models_sha256"]


@pytest.mark.processes
def test_the_payload_of_each_peer_and_round_is_replicas_times_the_model(quickstart):
    """R copies of every segment, together R whole models of 4-byte values."""
    for event in events_of(quickstart.folder):
        assert event["payload_bytes"] == 2 * 9610 * 4
        # Beside control messages, each of the 16 segments comes in one message with a header of under 200 bytes.
        headers = event["wire_bytes"] - event["control_bytes"] - event["payload_bytes"]
        assert 16 * 10 < headers < 16 * 200
        assert 0 <= event["control_bytes"] < event["payload_bytes"]  # none, where all that was asked came in another round
    figures = quickstart.summary["bytes"]
    assert figures["payload_per_peer_round"] == 2 * 9610 * 4 and figures["payload"] == 480 * 2 * 9610 * 4
    assert figures["wire"] > figures["payload"] + figures["control"] > figures["payload"]
    assert figures["repeated"] == figures["local"] == 0


# ------------------------------------------------------------------------------------------------------------- same seed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> gossipfl.RunResult:
    """The small run over tcp, as many processes as there are cores."""
    return gossipfl.run("quickstart", overrides=SMALL, out=tmp_path_factory.mktemp("small") / "record")


@pytest.mark.processes
@pytest.mark.parametrize(
    "override", ["seed=0", "peers_per_process=1", "peers_per_process=4", "transport.kind=ipc", "transport.kind=inproc"]
)
def test_the_same_seed_gives_the_same_models_however_the_peers_are_hosted(override, small, tmp_path):
    again = gossipfl.run("quickstart", overrides=[*SMALL, override], out=tmp_path / "record")
    assert again.exit_code == 0
    assert again.summary["models_sha256"] == small.summary["models_sha256"]
    assert again.summary["accuracy"] == small.summary["accuracy"]
    assert again.summary["bytes"]["payload"] == small.summary["bytes"]["payload"]
    check_keys(again.summary)


@pytest.mark.processes
def test_another_seed_gives_other_models(small, tmp_path):
    for seed in ("seed=1", "seed.model=1", "seed.data=1", "seed.protocol=1"):
        other = gossipfl.run("quickstart", overrides=[*INPROC, seed], out=tmp_path / seed)
        assert other.summary["models_sha256"] != small.summary["models_sha256"]


@pytest.mark.processes
def test_runs_leave_no_socket_files_behind(tmp_path, monkeypatch):
    """Peers that meet over ipc listen at files of a temporary folder, which goes with them."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    overrides = [*SMALL, "rounds=1", "transport.kind=ipc"]
    assert gossipfl.run("quickstart", overrides=overrides, out=tmp_path / "record").exit_code == 0
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.processes
def test_what_a_killed_launcher_left_in_the_temporary_folder_goes_with_the_next_run(launch, tmp_path, monkeypatch):
    for name in ("tmp", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    run = launch("quickstart", *settings(*SMALL, "rounds=100000", "transport.kind=ipc"))
    run.await_round(2)
    (left,) = (tmp_path / "tmp").iterdir()
    (tmp_path / "tmp" / "gossipfl-not-marked").mkdir()
    (tmp_path / "tmp" / "gossipfl-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / MARK).touch()
    remove_stale()
    assert left.exists() and list(left.glob("*")) and (left / MARK).exists()
    run.process.kill()
    run.process.wait()  # until then it may hold its lock
    assert wait_for(lambda: not run.workers(), 5.0)

    def is_clean() -> bool:
        remove_stale()
        return {path.name for path in (tmp_path / "tmp").iterdir()} == {"gossipfl-not-marked", "gossipfl-link"}

    assert wait_for(is_clean, 5.0)
    assert (tmp_path / "elsewhere" / MARK).exists()


# ------------------------------------------------------------------------------------------------------- processes that die


@pytest.mark.processes
@pytest.mark.parametrize("victim", [0, 2])  # the process of p0 is the one that the others were forked from
def test_a_worker_that_is_killed_takes_only_its_peer_with_it(victim, launch, gate):
    run = launch("quickstart", *settings(*GATED))
    run.await_round(3)
    run.worker(victim).kill()
    gate()
    code, stdout, stderr = run.ended()
    assert code == 0, stderr
    summary = summary_of(run.folder)
    check_keys(summary)
    assert summary["faults"]["dead_peers"] == [f"p{victim}"] and summary["exit_code"] == 0
    assert f"p{victim} did not finish" in stderr and "Traceback" not in stderr and f"p{victim}" in stdout
    finished = {event["peer"]: event for event in events_of(run.folder, "finished")}
    assert all(event["time_s"] > 0 for kind in ("fault", "finished") for event in events_of(run.folder, kind))
    assert events_of(run.folder, "fault") and events_of(run.folder, "planned") == []
    assert summary["faults"]["dead_as_planned"] == [] and finished.pop(f"p{victim}")["error"]
    assert len(finished) == 3 and all(event["error"] is None and event["round"] == 30 for event in finished.values())
    assert not (run.folder / "models" / f"p{victim}.safetensors").exists()
    assert (run.folder / "models" / "average.safetensors").exists()
    assert run.workers() == []


@pytest.mark.processes
def test_a_run_whose_peers_fail_in_code_of_its_user_says_what_that_raised(launch, tmp_path):
    net = "class Net(torch.nn.Linear):\n    def forward(self, x):\n        raise ValueError('the moon is full')"
    (tmp_path / "mine.py").write_text(f"import torch\n{net}\ndef net(shape, classes): return Net(7, classes)\n")
    run = launch("quickstart", *settings(*SMALL, "model=mine:net", "peers_per_process=2"))
    code, _, stderr = run.ended()
    assert code == 1 and "Traceback" not in stderr
    reason = "its process failed: ValueError: the moon is full"
    assert f"gossipfl: the run failed, for 0 of 4 peers finished; p0, p1, p2 ...: {reason}\n" in stderr
    assert {event["peer"]: event["error"] for event in events_of(run.folder, "finished")} == {
        f"p{index}": reason for index in range(4)
    }


@pytest.mark.processes
def test_a_run_whose_majority_is_killed_has_failed_with_a_readable_summary(launch, gate):
    run = launch("quickstart", *settings(*GATED))
    run.await_round(3)
    for index in (0, 1, 3):
        run.worker(index).kill()
    gate()
    code, _, stderr = run.ended()
    assert code == 1 and "Traceback" not in stderr
    summary = summary_of(run.folder)
    check_keys(summary)
    assert summary["exit_code"] == 1 and set(summary["faults"]["dead_peers"]) >= {"p0", "p1", "p3"}
    assert run.workers() == []


@pytest.mark.processes
def test_a_worker_that_is_stopped_for_the_rest_of_the_run_is_named_and_the_others_finish(launch, gate):
    """A stopped process keeps its connections: nothing but its silence tells of it. Ten seconds of that are cut to 4 here."""
    patch = "import gossipfl.scenario.crew as crew; crew.STOPPED_S = 4.0"
    run = launch("quickstart", *settings(*GATED, "gossip.patience=2"), patch=patch)
    run.await_round(3)
    run.worker(1).suspend()
    gate()
    code, _, stderr = run.ended()
    assert code == 0, stderr
    assert summary_of(run.folder)["faults"]["dead_peers"] == ["p1"]
    assert "the process of p1 was stopped for 4 s and is killed" in stderr
    assert "p1 did not finish: its process was stopped for 4 s and was killed" in stderr
    assert {event["peer"] for event in events_of(run.folder) if event["round"] == 30} == {"p0", "p2", "p3"}
    assert run.workers() == []


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_ends_soon_and_leaves_a_summary_but_no_process(number, launch):
    run = launch("quickstart", *settings(*SMALL, "rounds=100000"))
    run.await_round(2)
    assert len(run.workers()) >= 1
    run.process.send_signal(number)
    code, stdout, stderr = run.ended(10.0)
    assert code == 130 and "Traceback" not in stderr
    assert f"record  {run.folder}/" in stdout and ("models  " in stdout) == (run.folder / "models").exists()
    summary = summary_of(run.folder)
    check_keys(summary)
    assert summary["exit_code"] == 130 and summary["faults"]["dead_peers"] == ["p0", "p1", "p2", "p3"]
    assert summary["rounds"] >= 2 and summary["bytes"]["payload"] > 0
    assert run.workers() == []


@pytest.mark.processes
def test_a_run_that_is_interrupted_before_it_begins_ends_at_once_with_130(launch):
    run = launch("quickstart", *settings(*SMALL, "rounds=100000"))
    assert wait_for(lambda: run.workers() or run.process.poll() is not None, DEADLINE_S)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    code, _, stderr = run.ended(10.0)
    assert code == 130 and "Traceback" not in stderr
    assert run.workers() == []


@pytest.mark.processes
def test_a_process_that_has_not_come_as_far_as_to_listen_is_ended_as_well(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import threading\nthreading.Event().wait()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = set(psutil.Process().children())
    crew = Crew(print, lambda: False)
    crew.launch([["p0"], ["p1"]], tmp_path / "log")
    assert set(psutil.Process().children()) - before
    crew.stop()
    assert not set(psutil.Process().children()) - before


@pytest.mark.processes
def test_workers_whose_launcher_is_killed_end_within_5_s(launch):
    run = launch("quickstart", *settings(*SMALL, "rounds=100000", "peers_per_process=1"))
    run.await_round(2)
    assert len(run.workers()) == 4
    run.process.kill()
    assert wait_for(lambda: not run.workers(), 5.0)


@pytest.mark.processes
def test_a_worker_ends_also_where_its_launcher_died_in_the_middle_of_a_command(tmp_path):
    with (tmp_path / "log").open("w") as log:
        commands, ours = os.pipe()
        events, theirs = os.pipe()
        numbers = commands, theirs, log.fileno()
        process = subprocess.Popen([sys.executable, "-m", "gossipfl.runtime.worker", *map(str, numbers)], pass_fds=numbers)
    os.close(commands)
    os.close(theirs)
    os.write(ours, b'{"do": "sta')
    os.close(ours)
    try:
        process.wait(30)
    finally:
        process.kill()
        os.close(events)
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.processes
def test_a_worker_that_is_told_a_bad_model_ends_the_run_with_its_message(launch):
    run = launch("quickstart", *settings(*SMALL, "model_args.hiden=3"))
    code, stdout, stderr = run.ended()
    assert code == 2 and stdout == ""
    assert "gossipfl: model 'mlp' has no argument 'hiden'; did you mean 'hidden'?" in stderr and "Traceback" not in stderr
    assert run.workers() == []


@pytest.mark.parametrize("clock", ["local", "virtual"])
def test_a_run_that_memory_does_not_hold_is_refused_before_anything_is_shown_or_left(clock, tmp_path, monkeypatch):
    monkeypatch.setattr("gossipfl.scenario.memory.available_bytes", lambda: 2**20)
    shown: list[str] = []

    class Shown(Observer):
        def data_ready(self, scenario: Any, table: Any) -> None:
            shown.append("data")

    with pytest.raises(ConfigError, match=r"peers = 4 with 9,610 parameters need about .* GiB are free; 0 peers would fit"):
        gossipfl.run("quickstart", overrides=INPROC, clock=clock, out=tmp_path / "runs" / "large", observer=Shown())
    assert shown == [] and not (tmp_path / "runs").exists()


def test_more_processes_than_memory_holds_are_refused_before_there_are_any(tmp_path, monkeypatch):
    monkeypatch.setattr("gossipfl.scenario.memory.available_bytes", lambda: 2**29)
    monkeypatch.setattr("gossipfl.scenario.crew.launch", lambda *args: pytest.fail("processes were started"))
    overrides = ["peers=4", "peers_per_process=1"]
    with pytest.raises(ConfigError, match=r"peers = 4 in 4 processes need about 1\.0 GiB and 0\.5 GiB are free; 2 processes"):
        gossipfl.run("quickstart", overrides=overrides, clock="local", out=tmp_path / "runs" / "large")
    assert not (tmp_path / "runs").exists()


class _Ticking:
    """A clock that goes on by a second whenever it is read, and more when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


class _Lively:
    """A worker of which nothing is heard but that it lives, and whose memory takes long to look at."""

    def __init__(self, clock: _Ticking) -> None:
        self.peers, self.clock, self.num_looks, self.heard_at = ["p0"], clock, 0, 0.0

    def memory_mib(self) -> float:
        self.num_looks += 1
        self.clock.now += 40.0
        return 1.0

    def get(self, timeout: float) -> tuple[Any, dict[str, Any]]:
        assert self.clock.now < 10_000, "it was waited for all the same"
        return self, {"event": "alive"}


def test_processes_that_say_only_that_they_live_are_not_waited_for_without_end(monkeypatch):
    clock = _Ticking()
    monkeypatch.setattr("gossipfl.scenario.crew.time", clock)
    worker = _Lively(clock)
    crew = Crew(lambda text: None, lambda: False, [worker], _inbox=worker)
    with pytest.raises(RunError, match="1 processes were not ready after 120 s"):
        crew.await_ready()


def test_memory_that_takes_long_to_look_at_is_looked_at_seldom(monkeypatch):
    clock = _Ticking()
    monkeypatch.setattr("gossipfl.scenario.crew.time", clock)
    worker = _Lively(clock)
    crew = Crew(lambda text: None, lambda: False, [worker], _inbox=worker)
    while clock.now < 4000:
        crew.hear(1.0)
    assert crew.peak_mib == 1.0 and worker.num_looks * 40 <= 0.1 * clock.now


# --------------------------------------------------------------------------------------------------- ends and evaluations


@pytest.mark.processes
def test_a_run_ends_early_when_the_target_accuracy_is_reached(tmp_path):
    overrides = [*SMALL, "rounds=2000", "stop.target_accuracy=0.85"]
    result = gossipfl.run("quickstart", overrides=overrides, out=tmp_path / "record")
    assert result.exit_code == 0 and result.summary["accuracy"]["mean"] >= 0.8
    assert 3 <= result.summary["rounds"] < 200
    rounds = events_of(result.folder)
    means = [
        np.mean([event["accuracy_after"] for event in rounds if event["round"] == round_])
        for round_ in range(1, result.summary["rounds"] + 1)
    ]
    assert max(means) >= 0.85 and max(means[:2]) < 0.85


@pytest.mark.processes
def test_a_run_ends_early_when_its_time_is_up(tmp_path):
    result = gossipfl.run("quickstart", overrides=[*SMALL, "rounds=100000", "stop.duration=1.5s"], out=tmp_path / "record")
    assert result.exit_code == 0 and 1 < result.summary["rounds"] < 100_000
    assert 1.5 <= result.summary["seconds"]["wall"] < 10
    assert result.summary["accuracy"]["mean"] is not None
    last = {event["peer"]: event["round"] for event in events_of(result.folder)}
    assert len(last) == 4 and max(last.values()) - min(last.values()) <= 1


@pytest.mark.parametrize(("every", "evaluated"), [(0, {7}), (3, {3, 6, 7}), (1, set(range(1, 8)))])
def test_accuracies_are_evaluated_as_often_as_asked_and_after_the_last_round(every, evaluated, tmp_path):
    overrides = [*INPROC, "rounds=7", f"evaluate_every={every}"]
    result = gossipfl.run("quickstart", overrides=overrides, out=tmp_path / "record")
    for key in ("accuracy_before", "accuracy_after"):
        assert {event["round"] for event in events_of(result.folder) if event[key] is not None} == evaluated
    assert result.summary["accuracy"]["mean"] > 0.5 and result.summary["accuracy"]["before_merge_mean"] > 0.2


def test_central_training_is_told_only_when_asked_for(tmp_path):
    for central, out in ((True, "with"), (False, "without")):
        overrides = [*INPROC, f"central={str(central).lower()}"]
        result = gossipfl.run("quickstart", overrides=overrides, out=tmp_path / out)
        assert (result.summary["accuracy"]["central"] is not None) == central
        if central:
            assert result.summary["accuracy"]["central"] > 0.9


# -------------------------------------------------------------------------------------------------------- one's own objects


class Net(nn.Module):
    """A user's own network."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(12, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


def blobs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return (rng.standard_normal((n, 12)) + 3 * np.eye(12)[y]).astype(np.float32), y.astype(np.int64)


def test_a_program_may_bring_its_own_model_data_and_training_step(tmp_path):
    steps = []

    def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        steps.append(len(x))
        return F.cross_entropy(model(x), y, label_smoothing=0.1)

    torch.manual_seed(0)
    x, y = blobs(360, 0)
    dataset = gossipfl.Dataset(x[:300], y[:300], x[300:], y[300:], num_classes=3)
    scenario = gossipfl.Scenario(name="mine", peers=3, rounds=4, training={"batch_size": 20})
    result = gossipfl.run(scenario, model=Net(), dataset=dataset, step=step, out=tmp_path / "record")
    assert result.exit_code == 0 and result.summary["scenario"] == "mine"
    assert result.summary["accuracy"]["mean"] > 0.8
    assert len(steps) == 1 + 3 * 4 * 5 and set(steps) == {20}, "one is tried before"
    average = result.model()
    assert average["first.weight"].shape == (16, 12) and average["norm.running_var"].shape == (16,)
    fresh = Net()
    fresh.load_state_dict({name: torch.tensor(values) for name, values in average.items()}, strict=False)
    assert (fresh.eval()(torch.tensor(x[300:])).argmax(1).numpy() == y[300:]).mean() == pytest.approx(
        result.summary["accuracy"]["average_model"], abs=1e-6
    )
    assert result.summary["engine"].pop("own") == "model, dataset, step", "the scenario does not have them"
    check_keys(result.summary)


@pytest.mark.parametrize("clock", ["local", "virtual"])
def test_a_program_s_own_model_is_left_as_it_was_so_that_a_second_run_comes_to_the_same(clock, tmp_path):
    x, y = blobs(60, 0)
    dataset = gossipfl.Dataset(x[:45], y[:45], x[45:], y[45:], num_classes=3)
    model = Net()
    before = copy.deepcopy(model.state_dict())
    first, second = (
        gossipfl.run({"peers": 3, "rounds": 2}, clock=clock, model=model, dataset=dataset, out=tmp_path / name)
        for name in ("first", "second")
    )
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert first.summary["models_sha256"] == second.summary["models_sha256"] is not None
    told = tomllib.loads((first.folder / "scenario.toml").read_text())["engine"]
    assert told["own"] == first.summary["engine"]["own"] == "model, dataset"


def own_mistakes() -> dict[str, tuple[dict[str, Any], str]]:
    x, y = blobs(60, 0)
    lacks_a_label = gossipfl.Dataset(x[:45], y[:44], x[45:], y[45:], 3)
    good = {"model": Net(), "dataset": gossipfl.Dataset(x[:45], y[:45], x[45:], y[45:], 3)}
    holds_nan = gossipfl.Dataset(x[:45] * np.nan, y[:45], x[45:], y[45:], 3)
    of_two_classes = gossipfl.Dataset(x[:45], y[:45], x[45:], y[45:], 2)
    of_tensors = gossipfl.Dataset(torch.tensor(x), torch.tensor(y), x, y, 3)
    knotted = Net()
    knotted.tied = knotted.first.weight * 2  # which copy.deepcopy does not copy
    asks = "it is called as step(model, x, y) and returns the loss, a scalar"
    return {
        "labels": (
            good | {"dataset": lacks_a_label},
            "dataset: x_train holds 45 samples but y_train 44; give a label for each",
        ),
        "nan": (good | {"dataset": holds_nan}, "dataset: x_train holds values that are not finite; clean or impute them first"),
        "classes": (
            good | {"dataset": of_two_classes},
            "dataset: y_train holds labels 0 to 2; 2 classes allow 0 to 1: mend the labels or num_classes",
        ),
        "tensors": (good | {"dataset": of_tensors}, "dataset: x_train is a Tensor, not a numpy array; convert it"),
        "pair": (good | {"dataset": (x, y)}, "dataset is a tuple; give a gossipfl.Dataset"),
        "inputs": (
            good | {"model": nn.Linear(13, 3)},
            "model Linear does not take a batch of float32[32, 12] (RuntimeError: mat1",
        ),
        "logits": (
            good | {"model": nn.Linear(12, 2)},
            "makes [32, 2] of a batch of float32[32, 12]; give one that makes logits [32, 3]",
        ),
        "frozen": (
            good | {"model": Net().requires_grad_(False)},
            "model Net cannot be trained on a batch of float32[32, 12] (Run",
        ),
        "copy": (
            good | {"model": knotted},
            "model Net cannot be copied (RuntimeError: Only Tensors created explicitly by the user",
        ),
        "function": (good | {"model": blobs}, "the model is a function; give a torch.nn.Module"),
        "step": (good | {"step": lambda model: 1}, "step '<lambda>' fails on a batch of float32[32, 12] (TypeError: "),
        "loss": (good | {"step": lambda model, x, y: 1}, f"'int' object has no attribute 'backward'); {asks}"),
        "built-in model": ({"step": lambda model, x: 1}, f"takes 2 positional arguments but 3 were given); {asks}"),
    }


@pytest.mark.parametrize("clock", ["local", "virtual"])
@pytest.mark.parametrize("mistake", own_mistakes())
def test_what_cannot_be_right_of_a_program_s_own_objects_is_told_before_anything_starts(clock, mistake, tmp_path):
    objects, told = own_mistakes()[mistake]
    with pytest.raises(ConfigError) as caught:
        gossipfl.run({"peers": 3, "rounds": 1}, clock=clock, out=tmp_path / "record", **objects)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_so_is_what_is_wrong_with_functions_that_a_scenario_names(tmp_path, monkeypatch):
    (tmp_path / "wrong_parts.py").write_text(
        "import torch\ndef net(shape, classes): return torch.nn.Linear(7, classes)\ndef step(model, x): return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    for override, told in (
        ("model=wrong_parts:net", "model Linear does not take a batch of float32"),
        ("training.step=wrong_parts:step", "step 'step' fails on a batch of float32"),
    ):
        with pytest.raises(ConfigError, match=f"^{told}"):
            gossipfl.run("quickstart", overrides=[*SMALL, override], clock="virtual")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("clock", ["local", "virtual"])
@pytest.mark.parametrize(
    ("codec", "buffers", "warned"),
    [
        ("int4", "average", ["gossip.codec = 'int4' blurs these statistics"]),
        ("topk:0.1", "average", ["gossip.codec = 'topk:0.1' blurs these statistics"]),
        ("int4", "local", ["training.buffers = 'local': the files of the models are without these statistics"]),
        ("int8", "average", []),
    ],
)
def test_statistics_of_batch_norm_that_a_codec_blurs_or_files_lack_are_warned_of_in_a_line(
    clock, codec, buffers, warned, tmp_path
):
    notes: list[str] = []

    class Notes(Observer):
        def note(self, text: str) -> None:
            notes.append(text)

        def warn(self, text: str) -> None:
            notes.append(text)

    x, y = blobs(60, 0)
    dataset = gossipfl.Dataset(x[:45], y[:45], x[45:], y[45:], num_classes=3)
    scenario = {"peers": 3, "rounds": 1, "training": {"buffers": buffers}, "gossip": {"codec": codec}}
    result = gossipfl.run(scenario, clock=clock, model=Net(), dataset=dataset, out=tmp_path / "record", observer=Notes())
    assert notes[0].startswith("the model has BatchNorm: its statistics are ")
    assert [note[: len(start)] for note, start in zip(notes[1:], warned, strict=True)] == warned
    assert result.summary["warnings"] == notes[1:]


@pytest.mark.parametrize("clock", ["local", "virtual"])
@pytest.mark.parametrize(
    ("training", "gossip", "warned"),
    [
        ({"optimizer": "adamw", "momentum": 0.9}, {}, ["training.momentum = 0.9 plays no part: adamw has moments of its own"]),
        (
            {},
            {"aggregation": "median", "selection": "all", "mixing": "metropolis_hastings"},
            ["gossip.mixing = 'metropolis_hastings' plays no part: median weighs all copies alike"],
        ),
        (
            {},
            {"aggregation": "trimmed_mean", "max_staleness": 2},
            ["gossip.staleness_exponent = 0.5 plays no part: trimmed_mean weighs all copies alike, also old ones"],
        ),
        ({"optimizer": "adam"}, {"aggregation": "median", "mixing": "uniform", "max_staleness": 0}, []),
    ],
)
def test_a_setting_that_plays_no_part_is_warned_of(clock, training, gossip, warned, tmp_path):
    scenario = {"peers": 3, "rounds": 1, "central": False, "training": training, "gossip": gossip}
    assert gossipfl.run(scenario, clock=clock, out=tmp_path / "record").summary["warnings"] == warned


MODULE = """
import numpy as np
import torch
from gossipfl.learning.datasets import Dataset

def net(input_shape, num_classes, *, width=8):
    print("building", input_shape, num_classes, width)
    return torch.nn.Sequential(torch.nn.Linear(input_shape[0], width), torch.nn.Tanh(), torch.nn.Linear(width, num_classes))

def data(path, test_fraction, seed, *, n=100):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return (rng.standard_normal((n, 12)) + 3 * np.eye(12)[y]).astype(np.float32), y

def step(model, x, y):
    print("a step of one's own")
    return torch.nn.functional.multi_margin_loss(model(x), y)

def odd_and_even(labels, num_peers, rng):
    return [np.arange(len(labels))[first::num_peers] for first in range(num_peers)]
"""
MINE = """
name = "mine"
peers = 3
rounds = 3
model = "my_parts:net"
model_args = {width = 10}

[data]
kind = "my_parts:data"
args = {n = 200}
partition = {kind = "my_parts:odd_and_even"}

[training]
step = "my_parts:step"
"""


@pytest.mark.processes
def test_a_scenario_may_name_functions_of_the_current_folder(launch, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my_parts.py").write_text(MODULE)
    (folder / "mine.toml").write_text(MINE)
    run = launch("mine.toml", "--json", cwd=folder)
    code, stdout, stderr = run.ended()
    assert code == 0, stderr
    summary = json.loads(stdout)
    assert summary["parameters"] == 12 * 10 + 10 + 10 * 3 + 3 and summary["accuracy"]["mean"] > 0.4
    log = "".join(path.read_text() for path in (run.folder / "log").iterdir())
    assert "building (12,) 3 10" in log and "a step of one's own" in log


# ------------------------------------------------------------------------------------------------- all that is registered


@pytest.mark.parametrize(
    ("model", "shape", "n"),
    [
        ("mlp", [1, 28, 28], 120),
        ("mlp", [20], 120),
        ("cnn", [1, 28, 28], 60),
        ("lenet5", [1, 28, 28], 60),
        ("lenet5", [3, 32, 32], 60),
        ("resnet20", [3, 32, 32], 60),
    ],
)
def test_every_image_model_runs(model, shape, n, tmp_path):
    scenario = {
        "peers": 3,
        "rounds": 2,
        "model": model,
        "data": {"kind": "synthetic", "args": {"n": n, "shape": shape}},
        "transport": {"kind": "inproc"},
    }
    result = gossipfl.run(scenario, out=tmp_path / "record")
    assert result.exit_code == 0 and result.summary["rounds"] == 2 and result.summary["accuracy"]["mean"] >= 0
    assert result.summary["parameters"] == sum(values.size for values in result.model("p0").values())
    assert all(np.isfinite(values).all() for values in result.model().values())
    with pytest.raises(ConfigError, match=r"has no model 'p99'; its models: average, p0, "):
        result.model("p99")


def test_gpt_learns_the_characters_of_a_text_file(tmp_path):
    (tmp_path / "poem.txt").write_text("so much depends upon a red wheel barrow glazed with rain water\n" * 40)
    scenario = {
        "peers": 3,
        "rounds": 2,
        "model": "gpt",
        "model_args": {"layers": 1, "heads": 2, "width": 16},
        "data": {"kind": "text", "path": str(tmp_path / "poem.txt"), "args": {"block": 16}},
        "training": {"optimizer": "adamw", "learning_rate": 0.01},
        "transport": {"kind": "inproc"},
    }
    result = gossipfl.run(scenario, out=tmp_path / "record")
    assert result.exit_code == 0 and result.summary["accuracy"]["mean"] > 0.05


@pytest.mark.parametrize("clock", ["virtual", "local"])
def test_the_default_model_does_not_take_characters(clock, tmp_path):
    (tmp_path / "poem.txt").write_text("so much depends upon a red wheel barrow glazed with rain water\n" * 40)
    scenario = {"peers": 3, "clock": clock, "data": {"kind": "text", "path": str(tmp_path / "poem.txt")}}
    with pytest.raises(ConfigError, match=r"takes numbers, not the characters of .*; set model = 'gpt'"):
        gossipfl.run(scenario, out=tmp_path / "record")
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize(
    "partition",
    [
        {"kind": "iid"},
        {"kind": "dirichlet", "alpha": 0.1},
        {"kind": "quantity_skew", "alpha": 0.5},
        {"kind": "shards", "shards_per_peer": 2},
        {"kind": "pathological", "classes_per_peer": 3},
    ],
    ids=lambda partition: partition["kind"],
)
def test_every_partition_runs(partition, tmp_path):
    scenario = {"peers": 4, "rounds": 1, "data": {"partition": partition}, "transport": {"kind": "inproc"}}
    result = gossipfl.run(scenario, out=tmp_path / "record")
    assert result.exit_code == 0 and len(events_of(result.folder)) == 4


def test_the_natural_partition_and_data_of_a_npz_file_run(tmp_path):
    x, y = blobs(120, 0)
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    base = {"peers": 3, "rounds": 1, "transport": {"kind": "inproc"}}
    npz = gossipfl.run({**base, "data": {"kind": "npz", "path": str(tmp_path / "mine.npz")}}, out=tmp_path / "npz")
    assert npz.exit_code == 0 and npz.summary["parameters"] == 12 * 128 + 128 + 128 * 3 + 3
    play = "".join(f"{name}:\nmy words are these and those of no one else\n\n" for name in ("ROMEO", "JULIET", "NURSE") * 8)
    (tmp_path / "play.txt").write_text(play)
    data = {"kind": "text", "path": str(tmp_path / "play.txt"), "args": {"block": 8}, "partition": {"kind": "natural"}}
    gpt = {"model": "gpt", "model_args": {"layers": 1, "heads": 2, "width": 8}}
    assert gossipfl.run({**base, **gpt, "data": data}, out=tmp_path / "natural").exit_code == 0


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8", "int8:64", "int4", "topk:0.1", "randomk:0.1"])
def test_every_codec_runs_and_its_payload_has_the_closed_form(name, tmp_path):
    result = gossipfl.run("quickstart", overrides=[*INPROC, f"gossip.codec={name}"], out=tmp_path / "record")
    expected = 2 * sum(codec(name).num_bytes(size) for size in even_sizes(9610, 8))
    assert {event["payload_bytes"] for event in events_of(result.folder)} == {expected}
    assert all(event["wire_bytes"] > event["payload_bytes"] for event in events_of(result.folder))
    assert result.exit_code == 0 and result.summary["faults"]["rejected"] == 0
    assert result.summary["accuracy"]["mean"] > 0.4


@pytest.mark.processes
def test_quantized_segments_travel_between_processes_as_within_one(tmp_path):
    digests = set()
    for kind in ("tcp", "inproc"):
        overrides = [*SMALL, "gossip.codec=int8", f"transport.kind={kind}"]
        result = gossipfl.run("quickstart", overrides=overrides, out=tmp_path / kind)
        digests.add(result.summary["models_sha256"])
    assert len(digests) == 1


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_every_robust_rule_runs(rule, tmp_path):
    overrides = [*INPROC, f"gossip.aggregation={rule}", "gossip.replicas=3"]
    result = gossipfl.run("quickstart", overrides=overrides, out=tmp_path / "record")
    assert result.exit_code == 0 and result.summary["accuracy"]["mean"] > 0.3
    assert {event["segments_mixed"] for event in events_of(result.folder)} == {8 * 3}


def test_all_neighbours_with_metropolis_hastings_weights_on_a_ring(tmp_path):
    overrides = [
        *INPROC,
        *("peers=5", "topology.kind=ring", "gossip.selection=all", "gossip.mixing=metropolis_hastings"),
        *("gossip.segments=1", 'data.partition={kind="iid"}'),
    ]
    result = gossipfl.run("quickstart", overrides=overrides, out=tmp_path / "record")
    assert result.exit_code == 0 and result.summary["accuracy"]["mean"] > 0.7
    assert {event["payload_bytes"] for event in events_of(result.folder)} == {2 * 9610 * 4}  # both neighbours' models


@pytest.mark.parametrize("segmentation", ["even", "by_layer"])
def test_segments_of_whole_tensors_carry_the_same_bytes(segmentation, tmp_path):
    overrides = [*INPROC, f"gossip.segmentation={segmentation}", "gossip.segments=3"]
    result = gossipfl.run("quickstart", overrides=overrides, out=tmp_path / "record")
    assert {event["payload_bytes"] for event in events_of(result.folder)} == {2 * 9610 * 4}


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["tcp", "inproc"])
def test_a_lone_peer_trains_alone(kind, tmp_path):
    overrides = ["peers=1", "rounds=3", "central=false", f"transport.kind={kind}"]
    result = gossipfl.run("quickstart", overrides=overrides, out=tmp_path / "record")
    assert result.exit_code == 0 and result.summary["accuracy"]["mean"] > 0.8
    assert result.summary["bytes"]["wire"] == 0 and result.summary["faults"]["missing_segments"] == 0
    assert result.summary["consensus_distance"] == {"first": 0.0, "last": 0.0}
    assert len(events_of(result.folder)) == 3


def test_asynchronous_gossip_runs(tmp_path):
    overrides = [*INPROC, "gossip.max_staleness=inf"]
    result = gossipfl.run("quickstart", overrides=overrides, out=tmp_path / "record")
    assert result.exit_code == 0 and result.summary["rounds"] == 5 and len(events_of(result.folder)) == 20
