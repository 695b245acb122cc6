"""The run record: the folder that every run leaves behind, and the summary made from it.

runs/<name>/scenario.toml   resolved: every default, and the engine, memory layout and threads that were used
           /roster.toml     who listened where
           /events.jsonl    a line per peer and round, per fault, per peer that ended, that came or went as planned, per
                            warning; under virtual time, per peer that was in a round when the run ended
           /summary.json    the figures (`summarize` says what each is)
           /models/         <peer>.safetensors and average.safetensors
           /log/            what each process logged
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gossipfl._version import __version__
from gossipfl.errors import ConfigError, RunError
from gossipfl.learning.checkpoint import load_model, save_model, write_atomically, writing
from gossipfl.scenario.config import Scenario

Event = dict[str, Any]


class RunRecord:
    """Writes the folder of one run, as it goes; what is there when a run is cut short can be read."""

    def __init__(self, folder: Path, scenario: Scenario, tell: Callable[[str], None]) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self._tell = tell
        self._has_diverged = False
        self.write("scenario.toml", scenario.to_toml())
        with writing(folder / "events.jsonl"):
            (folder / "log").mkdir(parents=True, exist_ok=True)
            self._file = (folder / "events.jsonl").open("w", encoding="utf-8")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def add(self, event: Event) -> None:
        self.events.append(event)
        loss = event.get("train_loss")
        written = event if known(loss) == loss else event | {"train_loss": None}
        with writing(self.folder / "events.jsonl"):
            self._file.write(json.dumps(written) + "\n")
            self._file.flush()
            is_removed = os.fstat(self._file.fileno()).st_nlink == 0
        if is_removed:  # what comes now would be lost, or be mixed with the record of who has the folder next
            raise RunError(f"{self.folder} has been removed during the run, and the record with it; give the command again")
        if written is not event and not self._has_diverged:
            self._has_diverged = True
            self.warn(
                f"training diverges: the loss of {event['peer']} in round {event['round']} is {loss}; "
                "lower training.learning_rate"
            )

    def warn(self, text: str) -> None:
        """Write down, and tell, what changes how the result is to be read."""
        self.add({"event": "warning", "detail": text})
        self._tell(text)

    def write(self, name: str, text: str) -> None:
        with writing(self.folder / name):
            write_atomically(self.folder / name, text.encode())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # only what `add` has failed to write, and told
            self._file.close()


def planned_event(change: str, peer: str, time_s: float) -> Event:
    """The record's line for a peer that comes or goes because [churn] says so; `change` as `Churn.name_of` calls it."""
    return {"event": "planned", "change": change, "peer": peer, "time_s": round(time_s, 4)}


def check_free(folder: Path, force: bool) -> None:
    """ConfigError if `folder` holds anything, unless `force` may replace it, which it may where that is a run."""
    if _is_free(folder):
        return
    if not (folder / "scenario.toml").exists() and not (folder / "events.jsonl").exists():
        what = (
            "is not the folder of a run, so --force does not replace it" if force else "exists and is not the folder of a run"
        )
        raise ConfigError(f"--out {folder} {what}; choose another folder")
    if _is_being_written(folder / "events.jsonl"):
        raise ConfigError(f"--out {folder} is being written to by a run; choose another folder, or wait until it has ended")
    if not force:
        raise ConfigError(f"--out {folder} exists; choose another folder, or pass --force to replace it")


def _is_being_written(events: Path) -> bool:
    try:
        with events.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none there, or a file system without locks
        return False
    return False


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def finished_summary(folder: Path, scenario: Scenario) -> dict[str, Any] | None:
    """The summary of a run of this very scenario, by this version, that has ended well in `folder`."""
    summary = _summary_in(folder)
    return summary if summary and summary.get("exit_code") == 0 and not other_run_in(folder, scenario) else None


def other_run_in(folder: Path, scenario: Scenario) -> str | None:
    """Of what `folder` has the record, where that is another scenario, clock or version; None where it has none."""
    summary = _summary_in(folder)
    if summary is None:
        return None
    if (summary.get("scenario_sha256"), summary.get("clock")) != (scenario.sha256, scenario.resolved_clock):
        return "another scenario"
    return None if summary.get("version") == __version__ else f"gossipfl {summary.get('version')}"


def _summary_in(folder: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # it has not ended, or was cut short
    return summary if isinstance(summary, dict) else None


class RunFolder:
    """The folder for a run that is about to begin: `out`, or the first free of runs/<name>, runs/<name>-2, ...

    ConfigError if `out` exists. With `force` it may; the record that was there stays aside until `keep`, and is back after
    `give_up`, which leaves nothing else behind.
    """

    def __init__(self, out: Path | None, name: str, force: bool) -> None:
        folder = _free_place(name, force) if out is None else out
        check_free(folder, force)
        self.path = folder = Path(os.path.realpath(folder)) if folder.is_symlink() else folder  # the link stays what it is
        self.is_kept = False
        self._replaced = None if _is_free(folder) else _moved_aside(folder)
        self._made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {folder} cannot be made: {error.strerror}; choose another folder") from error

    def record(self, scenario: Scenario, tell: Callable[[str], None]) -> RunRecord:
        """The record of the run, begun; `tell` hears its warnings. RunError where it cannot be written; all is as it was."""
        try:
            return RunRecord(self.path, scenario, tell)
        except BaseException:
            self.give_up()
            raise

    def keep(self) -> None:
        """The run begins: what it replaces goes."""
        self.is_kept = True
        if self._replaced is not None:
            remove_files(self._replaced)
            self._replaced = None

    def give_up(self) -> None:
        """The run does not come about: all is as it was."""
        remove_files(self.path)
        if self._replaced is not None:
            self._replaced.rename(self.path)
        elif not self._made:
            self.path.mkdir(exist_ok=True)  # it was there, and empty; a mounted one still is
        with contextlib.suppress(OSError):  # somebody else has put something there
            for parent in self._made[1:]:
                parent.rmdir()


def _free_place(name: str, force: bool) -> Path:
    candidates = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return Path("runs") / name if force else next(path for path in candidates if not path.exists())


def _moved_aside(folder: Path) -> Path:
    """Where the record of a run now is; nothing else is moved."""
    try:
        return folder.rename(folder.with_name(f".{folder.name}-replaced-{os.getpid()}"))
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be replaced: {error.strerror}; choose another folder") from error


def final_models(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The figures made from the peers' final vectors; writes their mean to models/average.safetensors.

    These are the consensus distances after the first round, of those who were in it, and after the last; and the digest of all.
    """
    vectors: dict[str, np.ndarray] = {}
    layout = None
    for name in names:
        layout, vectors[name] = load_model(folder / "models" / f"{name}.safetensors")
    if layout is None:
        return {"first": None, "last": None, "models_sha256": None}
    save_model(folder / "models" / "average.safetensors", layout, mean_vector(vectors.values()), peer="average")
    first = [np.load(path) for path in sorted((folder / "first").glob("*.npy"))]
    return {
        "first": consensus_distance(first) if first else None,
        "last": consensus_distance(list(vectors.values())),
        "models_sha256": models_sha256(vectors.values()),
    }


def models_sha256(vectors: Iterable[np.ndarray]) -> str:
    """The digest of the peers' final vectors (f32[P]), given in the order of the peers."""
    digest = hashlib.sha256()
    for vector in vectors:
        digest.update(vector.tobytes())
    return digest.hexdigest()


def mean_vector(vectors: Iterable[np.ndarray]) -> np.ndarray:
    """The plain mean of vectors (f32[P]), summed in float64."""
    first, *others = vectors
    total = first.astype(np.float64)
    for vector in others:
        total += vector
    return (total / (1 + len(others))).astype(np.float32)


def consensus_distance(vectors: Sequence[np.ndarray]) -> float:
    """Mean squared distance of the peers' vectors from their mean: mean ||x_i - x_bar||^2."""
    mean = np.mean(vectors, axis=0, dtype=np.float64)
    return float(np.mean([np.sum((vector - mean) ** 2) for vector in vectors]))


def summarize(
    events: Sequence[Event],
    scenario: Scenario,
    *,
    parameters: int,
    figures: dict[str, Any],
    average_accuracy: float | None,
    central_accuracy: float | None,
    startup_s: float,
    wall_s: float,
    peak_memory_mib: float | None,
    engine: dict[str, Any],
    clock: str = "local",
    virtual_s: float | None = None,
    messages: int | None = None,
    exit_code: int | None = None,
) -> dict[str, Any]:
    """The contents of summary.json.

    Accuracies are on the common test set, after the last merge of each peer that has finished (of all, where none has);
    payload is all that was received, also where no round came of it, other bytes are those of the rounds; train, wait and
    merge seconds are summed over peers and rounds; `exit_code` is made from the scenario's `min_peers` where it is not given.
    Seconds are real ones but, under virtual time, those of the table `virtual` and the `train` and `wait` beside it, which
    repeat it, and those of `to_target`. `devices`: who has which, None where the scenario has neither classes nor stragglers.
    """
    rounds = [event for event in events if event["event"] == "round"]
    finished = {event["peer"] for event in events if event["event"] == "finished" and event["error"] is None}
    last = {event["peer"]: event for event in rounds if event["peer"] in finished or not finished}
    after = [event["accuracy_after"] for event in last.values() if event["accuracy_after"] is not None]
    before = [event["accuracy_before"] for event in last.values() if event["accuracy_before"] is not None]

    def total(key: str) -> Any:
        return sum(event[key] for event in rounds)

    outside_rounds = sum(sum(event.get("received_from", {}).values()) for event in events if event["event"] != "round")
    if exit_code is None:
        exit_code = 0 if len(finished) >= scenario.min_peers else 1
    num_rounds = max((event["round"] for event in rounds), default=0)
    planned = {event["peer"]: event["change"] for event in events if event["event"] == "planned"}
    away = {peer for peer, last_change in planned.items() if last_change in ("kill", "away")}
    dead = [name for name in scenario.peer_names if name not in finished]
    return {
        "scenario": scenario.name,
        "scenario_sha256": scenario.sha256,
        "seed": scenario.resolved()["seed"],
        "clock": clock,
        "peers": scenario.peers,
        "rounds": num_rounds,
        "segments": scenario.gossip.segments,
        "replicas": scenario.gossip.replicas,
        "parameters": parameters,
        "devices": _devices(scenario),
        "accuracy": {
            "mean": _rounded(statistics.fmean(after) if after else None),
            "min": _rounded(min(after, default=None)),
            "max": _rounded(max(after, default=None)),
            "std": _rounded(statistics.pstdev(after) if after else None),
            "average_model": _rounded(average_accuracy),
            "before_merge_mean": _rounded(statistics.fmean(before) if before else None),
            "central": _rounded(central_accuracy),
        },
        "to_target": to_target(rounds, scenario),
        "consensus_distance": {"first": known(figures["first"]), "last": known(figures["last"])},
        "bytes": {
            "payload": total("payload_bytes") + outside_rounds,
            "wire": total("wire_bytes"),
            "control": total("control_bytes"),
            "repeated": total("repeated_bytes"),
            "local": total("local_bytes"),
            "payload_per_peer_round": round(total("payload_bytes") / len(rounds)) if rounds else 0,
        },
        "seconds": {
            "startup": round(startup_s, 3),
            "wall": round(wall_s, 3),
            "round_mean": round(wall_s / num_rounds, 4) if num_rounds else None,
            "train": round(total("train_s"), 3),
            "wait": round(total("wait_s"), 3),
            "merge": round(total("merge_s"), 3),
            "virtual": None
            if virtual_s is None
            else _virtual_seconds(virtual_s, num_rounds, total("train_s"), total("wait_s")),
        },
        "virtual_seconds": None if virtual_s is None else round(virtual_s, 6),
        "messages": messages,
        "faults": {
            "missing_segments": total("missing"),
            "late": total("late"),
            "refused": total("refused"),
            "rejected": total("rejected"),
            "dead_peers": dead,
            "dead_as_planned": [name for name in dead if name in away],
        },
        "warnings": [event["detail"] for event in events if event["event"] == "warning"],
        "memory_mib": {"peak_total": None if peak_memory_mib is None else round(peak_memory_mib, 1)},
        "models_sha256": figures["models_sha256"],
        "engine": engine,
        "version": __version__,
        "machine": machine(),
        "exit_code": exit_code,
    }


def to_target(rounds: Sequence[Event], scenario: Scenario) -> dict[str, Any] | None:
    """What it took to `stop.target_accuracy`; None where there is none to reach, and within it where it was not reached.

    It is reached after the first round of at least `min_peers` evaluated peers whose mean accuracy is on target, when the last
    of them has merged; the payload is that of all peers and rounds up to it.
    """
    target = scenario.stop.target_accuracy
    if target is None:
        return None
    evaluated: dict[int, list[Event]] = {}
    for event in rounds:
        if event["accuracy_after"] is not None:
            evaluated.setdefault(event["round"], []).append(event)
    for round_, its in sorted(evaluated.items()):
        if len(its) >= scenario.min_peers and statistics.fmean(event["accuracy_after"] for event in its) >= target:
            payload = sum(event["payload_bytes"] for event in rounds if event["round"] <= round_)
            time_s = max(event["time_s"] for event in its)
            return {"accuracy": target, "round": round_, "seconds": time_s, "payload_bytes": payload}
    return {"accuracy": target, "round": None, "seconds": None, "payload_bytes": None}


def _devices(scenario: Scenario) -> dict[str, Any] | None:
    devices = scenario.build_devices()
    if not devices.classes and not devices.stragglers:
        return None
    classes = {name: [f"p{index}" for index in members] for name, members in devices.classes.items()}
    return {"classes": classes, "stragglers": [f"p{index}" for index in devices.stragglers]}


def _virtual_seconds(run_s: float, num_rounds: int, train_s: float, wait_s: float) -> dict[str, float | None]:
    round_s = round(run_s / num_rounds, 6) if num_rounds else None
    return {"run": round(run_s, 6), "round_mean": round_s, "train": round(train_s, 3), "wait": round(wait_s, 3)}


def machine() -> str:
    """One line on where this ran."""
    system = f"{platform.system()} {platform.release()}"
    return f"{system}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def known(value: float | None) -> float | None:
    """None for what is no number, as the distance of models that have diverged: JSON has none but numbers."""
    return value if value is not None and math.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    return None if (value := known(value)) is None else round(value, 6)


def remove_files(folder: Path) -> None:
    """Remove a folder of working files, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
