"""Peers started by hand, each its own process with its own record, and `gossipfl collect`, which makes one record of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from sockets import free_address

import gossipfl
from gossipfl.errors import RunError
from gossipfl.scenario import load_scenario
from gossipfl.scenario.byhand import _scenario_of

DEADLINE_S = 60.0
OVERRIDES = ("peers=3", "rounds=4", "central=false")
NAMES = ("p0", "p1", "p2")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache of data sets for the session, and none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSIPFL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@dataclass
class Command:
    """`gossipfl ...` that runs; what it says to stderr is read as it comes."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.changed:
                self.lines.append(line.rstrip("\n"))
                self.changed.notify_all()

    @property
    def stderr(self) -> str:
        return "\n".join(self.lines)

    def await_line(self, part: str) -> None:
        """Until a line with `part` has been said."""
        with self.changed:
            said = self.changed.wait_for(lambda: any(part in line for line in self.lines), DEADLINE_S)
        assert said, f"{part!r} is not in {self.stderr}"

    def ended(self, deadline_s: float = DEADLINE_S) -> tuple[int, str]:
        """Exit code and stdout, once it has ended and all is read."""
        assert self.process.stdout is not None
        code = self.process.wait(deadline_s)
        self._reader.join(deadline_s)
        return code, self.process.stdout.read()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._reader.join(DEADLINE_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


Start = Callable[..., Command]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `gossipfl ...` in the test's folder, which holds a roster for three peers on free ports."""
    addresses = [free_address() for _ in NAMES]
    lines = [f'{name} = "{address}"\n' for name, address in zip(NAMES, addresses, strict=True)]
    (tmp_path / "roster.toml").write_text("[peers]\n" + "".join(lines))
    started: list[Command] = []

    def run(*words: str) -> Command:
        process = subprocess.Popen(
            [sys.executable, "-m", "gossipfl", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(Command(process))
        return started[-1]

    yield run
    for command in started:
        command.close()


def peer(name: str, *overrides: str) -> list[str]:
    """The words of a peer's command."""
    sets = [word for override in (*OVERRIDES, *overrides) for word in ("--set", override)]
    return ["peer", "--name", name, "--config", "quickstart", "--roster", "roster.toml", "--out", name, *sets]


@pytest.mark.processes
def test_peers_by_hand_are_collected_into_one_record_equal_to_that_of_run(start, tmp_path):
    """Also: whoever collects before the peers have finished, waits."""
    collector = start("collect", "roster.toml", "--out", "all", "--json")
    collector.await_line("asking p0, p1, p2")
    peers = {name: start(*peer(name)) for name in NAMES}
    code, stdout = collector.ended()
    assert code == 0, collector.stderr
    for name, command in peers.items():
        code, told = command.ended(15.0)  # they need not keep their results for a minute: these are collected
        assert code == 0, command.stderr
        assert told.strip() == name and f"{name} round 4/4  accuracy 0." in command.stderr
        assert "Traceback" not in command.stderr

    run = gossipfl.run("quickstart", overrides=OVERRIDES, out=tmp_path / "run")
    summary = json.loads(stdout)
    assert summary == json.loads((tmp_path / "all" / "summary.json").read_text())
    assert summary["models_sha256"] == run.summary["models_sha256"]
    for name in (*NAMES, "average"):
        ours, theirs = (load_file(tmp_path / folder / "models" / f"{name}.safetensors") for folder in ("all", "run"))
        assert set(ours) == set(theirs) and all((ours[tensor] == theirs[tensor]).all() for tensor in ours)
    assert set(summary) == set(run.summary)
    for key, values in run.summary.items():
        if isinstance(values, dict) and key != "engine":
            assert set(summary[key]) == set(values), key
    same = (
        "scenario",
        "scenario_sha256",
        "seed",
        "peers",
        "rounds",
        "segments",
        "replicas",
        "parameters",
        "accuracy",
        "faults",
    )
    for key in same:
        assert summary[key] == run.summary[key], key
    assert summary["consensus_distance"] == run.summary["consensus_distance"]
    assert summary["bytes"]["payload"] == run.summary["bytes"]["payload"]

    scenario = load_scenario(tomllib.loads((tmp_path / "all" / "scenario.toml").read_text()))
    assert scenario == load_scenario("quickstart", OVERRIDES)
    events = [json.loads(line) for line in (tmp_path / "all" / "events.jsonl").read_text().splitlines()]
    rounds = {(event["peer"], event["round"]) for event in events if event["event"] == "round"}
    assert rounds == {(name, round_) for name in NAMES for round_ in range(1, 5)}
    times = [event["time_s"] for event in events if event["event"] == "round"]
    assert times == sorted(times)
    assert {path.name for path in (tmp_path / "all").iterdir()} >= {"scenario.toml", "roster.toml", "events.jsonl", "models"}


@pytest.mark.processes
def test_collect_takes_what_finished_peers_keep_and_not_twice(start, tmp_path):
    peers = [start(*peer(name)) for name in NAMES]
    for name, command in zip(NAMES, peers, strict=True):
        command.await_line(f"{name} has finished; keeping its results")
        assert command.process.poll() is None
    collector = start("collect", "roster.toml", "--out", "all")
    code, stdout = collector.ended()
    assert code == 0 and "test accuracy, mean of peers" in stdout and "collected 3 of 3 peers" in collector.stderr
    assert all(command.ended(15.0)[0] == 0 for command in peers)
    again = start("collect", "roster.toml", "--out", "again", "--timeout", "1")
    assert again.ended()[0] == 1 and not (tmp_path / "again").exists()


@pytest.mark.processes
def test_collect_tells_of_a_peer_that_ran_another_scenario(start, tmp_path):
    """Its own batches and neighbours alone would not be noticed; how many threads a machine has is its own affair."""
    own = {"p1": ["training.threads=2"], "p2": ["seed=5", "training.batch_size=8"]}
    peers = [start(*peer(name, *own.get(name, []))) for name in NAMES]
    collector = start("collect", "roster.toml", "--out", "all", "--json")
    code, stdout = collector.ended()
    assert code == 0 and all(command.ended(15.0)[0] == 0 for command in peers)
    (told,) = json.loads(stdout)["warnings"]
    assert told.startswith("p2 ran another scenario than p0, by seed, training.batch_size: ") and told in collector.stderr


@pytest.mark.processes
def test_collect_leaves_the_results_where_they_are_when_its_folder_is_taken(start, tmp_path):
    """Told before anything is asked for: peers that have been thanked are gone."""
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "notes.txt").write_text("precious")
    collector = start("collect", "roster.toml", "--out", "all", "--timeout", "60")
    code, _ = collector.ended(10.0)
    assert code == 2 and "--out all exists" in collector.stderr and "asking" not in collector.stderr


@pytest.mark.processes
def test_a_peer_whose_neighbours_do_not_come_lists_them_after_its_join_timeout(start):
    alone = start(*peer("p1", "gossip.join_timeout_s=3"))
    alone.await_line("waiting for 2 neighbours")
    code, stdout = alone.ended()
    assert code == 1 and stdout == ""
    last = alone.lines[-1]
    assert last == (
        "gossipfl: p1: no answer from p2, p0 within 3 s; they are not there, or have finished already: have all peers start "
        "within gossip.join_timeout_s of each other"
    )
    assert "Traceback" not in alone.stderr


@pytest.mark.processes
def test_peers_that_are_enough_go_on_without_the_one_that_does_not_come(start, tmp_path):
    """Each of p0 and p1 has half of its two neighbours, which is the quorum."""
    overrides = ("gossip.join_timeout_s=5", "gossip.patience=1", "gossip.linger_s=1")
    peers = [start(*peer(name, *overrides), "--keep", "60") for name in NAMES[:2]]
    for name, command in zip(NAMES, peers, strict=False):
        command.await_line(f"{name} has finished; keeping its results")
    collector = start("collect", "roster.toml", "--out", "all", "--timeout", "2", "--json")
    code, stdout = collector.ended()
    assert code == 0, collector.stderr
    assert "not collected within 2 s: p2" in collector.stderr
    summary = json.loads(stdout)
    assert summary["faults"]["dead_peers"] == ["p2"] and summary["faults"]["missing_segments"] > 0
    assert all(command.ended(15.0)[0] == 0 for command in peers)
    assert sorted(path.stem for path in (tmp_path / "all" / "models").iterdir()) == ["average", "p0", "p1"]


@pytest.mark.processes
def test_a_peer_that_comes_when_the_others_are_done_is_told_so(start):
    """What they had sent it waits for it: it begins, and nobody answers."""
    overrides = ("gossip.join_timeout_s=2", "gossip.patience=1", "gossip.linger_s=0.5")
    for command in [start(*peer(name, *overrides), "--keep", "60") for name in NAMES[:2]]:
        command.await_line("has finished; keeping its results")
    late = start(*peer("p2", *overrides), "--keep", "0")
    code, _ = late.ended()
    assert "none of its neighbours answered its pulls: they had gone, or finished already" in late.stderr or (
        code == 1 and "no answer from p0, p1 within 2 s; they are not there, or have finished already" in late.stderr
    )
    collector = start("collect", "roster.toml", "--out", "all", "--timeout", "2", "--json")
    code, stdout = collector.ended()
    assert code == 0 and "not collected within 2 s: p2" in collector.stderr
    assert json.loads(stdout)["faults"]["dead_peers"] == ["p2"]


def test_collect_with_nobody_there_says_so_after_its_timeout(start, tmp_path):
    began = time.monotonic()
    collector = start("collect", "roster.toml", "--timeout", "1.5", "--json")
    code, stdout = collector.ended()
    assert code == 1 and stdout == "" and time.monotonic() - began >= 1.5
    assert "gossipfl: none of p0, p1, p2 answered within 1.5 s; are they running, with this roster?" in collector.stderr
    assert "Traceback" not in collector.stderr and not (tmp_path / "runs").exists()


@pytest.mark.processes
@pytest.mark.parametrize("moment", ["as soon as it listens", "again, while it ends"])
def test_a_peer_that_is_terminated_leaves_no_socket_behind(moment, start, tmp_path):
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 bytes at most
        sockets = [Path(short) / name for name in NAMES]
        lines = [f'{name} = "ipc://{socket}"\n' for name, socket in zip(NAMES, sockets, strict=True)]
        (tmp_path / "roster.toml").write_text("[peers]\n" + "".join(lines))
        alone, deadline = start(*peer("p1")), time.monotonic() + DEADLINE_S
        if moment == "as soon as it listens":
            while not sockets[1].exists() and time.monotonic() < deadline:
                alone.process.poll()
        else:
            alone.await_line("waiting for 2 neighbours")
        assert sockets[1].exists()
        for _ in range(1 if moment == "as soon as it listens" else 20):
            alone.process.send_signal(signal.SIGTERM)
            alone.process.poll()
        code, _ = alone.ended(20.0)
        assert (code, list(Path(short).iterdir())) == (130, []) and "Traceback" not in alone.stderr, alone.stderr


@pytest.mark.processes
def test_a_peer_that_is_interrupted_ends_with_130(start):
    alone = start(*peer("p1"))
    alone.await_line("waiting for 2 neighbours")
    alone.process.send_signal(2)
    code, _ = alone.ended(20.0)
    assert code == 130 and "Traceback" not in alone.stderr


@pytest.mark.parametrize("content", [b"\xff", b"peers = ", b"[" * 5000], ids=["no text", "no TOML", "deep"])
def test_a_peer_whose_scenario_cannot_be_read_is_named(content):
    with pytest.raises(RunError, match=r"the scenario that p1 answers with cannot be read .*; leave it out of the roster"):
        _scenario_of("p1", content)
