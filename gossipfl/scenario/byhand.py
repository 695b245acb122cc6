"""Peers started by hand, each on its own machine, and gathering what they leave behind.

The roster is a TOML file that all of them share; `run` is a number that keeps runs apart and may be left out:

    [peers]
    p0 = "tcp://10.0.0.1:5700"
    p1 = "tcp://10.0.0.2:5700"
"""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from gossipfl.errors import ConfigError, DataError, RunError
from gossipfl.learning.checkpoint import load_model, write_atomically
from gossipfl.learning.datasets import open_dataset
from gossipfl.protocol.messages import Collect, PeerId, Record
from gossipfl.protocol.wire import MAX_NAME_BYTES
from gossipfl.registry import did_you_mean
from gossipfl.scenario.config import Scenario, check_names, load_scenario
from gossipfl.scenario.hosting import (
    device_address,
    emulation,
    fidelity,
    peer_job,
    peer_settings,
    serving,
    tcp_address,
    tell_of_settings,
)
from gossipfl.scenario.interrupts import OneInterrupt
from gossipfl.scenario.preparation import deal, prepare
from gossipfl.scenario.records import RunFolder, check_free, final_models, remove_files, summarize
from gossipfl.scenario.results import RunResult

Say = Callable[[str], None]
ITEMS = ("scenario", "events", "first", "model")
"""Of each peer: its scenario, its events, its vector after the first merge (.npy) and its final model (safetensors)."""
ASK_S = 1.0
"""How often a peer that has not answered, or not finished, is asked again."""
COLLECTOR = "collector"
OWN_SETTINGS = ("name", "clock", "data.path", "training.device", "training.threads", "transport.host", "transport.advertise")
"""What may differ from machine to machine."""


@dataclass(frozen=True)
class Roster:
    """Who listens where, and the number of the run."""

    run: int
    peers: dict[PeerId, str]


def read_roster(path: Path) -> Roster:
    """The roster in a TOML file. ConfigError names what is wrong with it."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"roster {path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"roster {path} is not TOML: {error}") from error
    peers = {}
    entries = values.get("peers")
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f'roster {path} has no [peers] table; give a line like p0 = "tcp://10.0.0.1:5700" for each peer')
    for name, entry in entries.items():
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise ConfigError(f"roster {path}: peer name {name!r} has not 1 to {MAX_NAME_BYTES} bytes")
        address = entry.get("address") if isinstance(entry, dict) else entry
        if not isinstance(address, str) or "://" not in address:
            raise ConfigError(f'roster {path}: peers.{name} = {entry!r} is no address; give one like "tcp://10.0.0.1:5700"')
        peers[name] = address
    run = values.get("run")
    if run is None:
        text = "/".join(f"{name}={address}" for name, address in sorted(peers.items()))
        run = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")
    if not isinstance(run, int) or not 0 <= run < 2**62:
        raise ConfigError(f"roster {path}: run = {run!r} is not a number from 0 to 2^62")
    return Roster(run, peers)


def run_peer(
    name: PeerId,
    source: str,
    roster_path: Path,
    overrides: Sequence[str],
    bind: str | None,
    out: Path | None,
    force: bool,
    keep_s: float,
    insecure: bool,
    say: Say,
) -> Path:
    """Run one peer to its end, then keep its results for `keep_s` seconds for `collect`; its folder."""
    from gossipfl.runtime.addresses import check_loopback
    from gossipfl.runtime.host import PeerHost
    from gossipfl.runtime.job import Job, PeerJob

    scenario = load_scenario(source, overrides)
    check_names(scenario)
    if not scenario.build_churn().is_empty:
        raise ConfigError("[churn] does not kill peers that are started by hand; remove it, and stop them by hand")
    roster = read_roster(roster_path)
    _check_names_match(name, scenario, roster, roster_path)
    check_loopback(bind or roster.peers[name], insecure)
    prepared = prepare(scenario)
    number = scenario.peer_names.index(name)
    dataset = open_dataset(prepared)
    indices = deal(scenario, dataset)[number]
    place = RunFolder(out, f"{scenario.name}-{name}", force)
    folder, record = place.path, place.record(scenario, say)
    shard = folder / "shard.npy"
    np.save(shard, indices)
    peer = PeerJob(**peer_job(scenario, scenario.build_topology(), number, shard))
    settings = peer_settings(scenario) | {"advertise": roster.peers[name], "emulation": emulation(scenario)}
    served = serving(scenario, dataset)
    if served is not None:
        served |= {"bind": device_address(scenario, number, _host_of(bind or roster.peers[name])), "insecure": insecure}
        served["advertise"] = tcp_address(_host_of(roster.peers[name]), 0)
    job = Job(
        peers=[peer],
        run=roster.run,
        bind=bind or roster.peers[name],
        data=str(prepared),
        out=str(folder),
        insecure=insecure,
        scenario=scenario.to_toml(),
        serving=served,
        **settings,
    )
    problem: str | None = None
    is_served = False
    num_mixed = num_missing = 0

    def hear(event: dict[str, Any]) -> None:
        nonlocal problem, is_served, num_mixed, num_missing
        record.add(event)
        match event:
            case {"event": "round", "round": round_, "accuracy_after": accuracy, "segments_mixed": mixed, "missing": missing}:
                num_mixed, num_missing = num_mixed + mixed, num_missing + missing
                shown = "" if accuracy is None else f"  accuracy {accuracy:.3f}"
                say(f"{name} round {round_}/{scenario.rounds}{shown}  segments mixed {mixed}")
            case {"event": "fault", "detail": detail}:
                say(f"{name}: {detail}")
            case {"event": "serving", "model": model, "address": address} if not is_served:
                is_served = True
                say(f"serving {model} for devices at {address}")
            case {"event": "finished", "error": error}:
                problem = error
                if error is None and num_missing and not num_mixed:
                    record.warn(
                        f"{name} has mixed nothing, for none of its neighbours answered its pulls: they had gone, or finished "
                        "already; have all peers start within gossip.join_timeout_s of each other"
                    )

    host: PeerHost | None = None
    with OneInterrupt() as interrupt:  # a second one would leave the socket's file behind
        try:
            with interrupt.deferred():
                host = PeerHost(job)
            place.keep()
            tell_of_settings(scenario, host.engine.flat.has_statistics, say, record.warn)
            say(f"{name} listens at {host.address}; waiting for {len(peer.degrees)} neighbours")
            host.start({other: address for other, address in roster.peers.items() if other in peer.degrees or other == name})
            began = time.monotonic()
            while host.num_active:
                host.work(hear, timeout_s=0.5)
                if scenario.stop.duration is not None and time.monotonic() - began > scenario.stop.duration:
                    host.stop_after(1)
            if problem is not None:
                raise RunError(problem)
            if keep_s > 0:
                say(f"{name} has finished; keeping its results for {keep_s:g} s, or until they are collected")
                deadline = time.monotonic() + keep_s
                while time.monotonic() < deadline and not host.is_collected:
                    host.work(hear, timeout_s=0.2)
        finally:
            if host is not None:
                host.close(flush_s=1.0)
            record.close()
            if place.is_kept:
                shard.unlink(missing_ok=True)
            else:
                place.give_up()
    return folder


def _host_of(address: str) -> str:
    """Where devices find what is at this address: on this machine, unless it says otherwise."""
    return (urlsplit(address).hostname if address.startswith("tcp:") else None) or "127.0.0.1"


@dataclass
class _Gathering:
    """What has come of one peer's items."""

    contents: dict[str, bytearray] = field(default_factory=lambda: {item: bytearray() for item in ITEMS})
    totals: dict[str, int] = field(default_factory=dict)
    asked_at: float = 0.0

    def next_item(self) -> str | None:
        """The first item that is not there in full."""
        for item in ITEMS:
            if len(self.contents[item]) != self.totals.get(item, -1):
                return item
        return None


def collect_run(roster_path: Path, out: Path | None, force: bool, timeout_s: float, say: Say) -> RunResult:
    """Gather a run of peers by hand into one record. Waits for peers that have not finished, `timeout_s` at the most."""
    roster = read_roster(roster_path)
    if out is not None:
        check_free(out, force)  # before peers give away what they keep
    began = time.monotonic()
    gathered = _gather(roster, timeout_s, say)
    if not gathered:
        raise RunError(
            f"none of {', '.join(roster.peers)} answered within {timeout_s:g} s; are they running, with this roster?"
        )
    scenarios = {name: _scenario_of(name, items["scenario"]) for name, items in gathered.items()}
    scenario = load_scenario(next(iter(scenarios.values())))
    place = RunFolder(out, scenario.name, force)
    folder, record = place.path, place.record(scenario, say)
    record.write("roster.toml", roster_path.read_text())
    for line in _about_others(scenarios):
        record.warn(line)
    events = [json.loads(line) for items in gathered.values() for line in items["events"].decode().splitlines()]
    for event in sorted(events, key=lambda event: event.get("time_s") or float("inf")):
        if event["event"] != "warning":  # is made again of the others
            record.add(event)
    for name, items in gathered.items():
        write_atomically(folder / "models" / f"{name}.safetensors", items["model"])
        load_model(folder / "models" / f"{name}.safetensors")
        if items["first"]:
            write_atomically(folder / "first" / f"{name}.npy", items["first"])
    well = sorted(gathered, key=scenario.peer_names.index)
    figures = final_models(folder, well)
    remove_files(folder / "first")
    wall_s = max((event["time_s"] for event in record.events if event["event"] == "round"), default=0.0)
    emulated = fidelity(scenario, record.events, record.warn)
    summary = summarize(
        record.events,
        scenario,
        parameters=load_model(folder / "models" / "average.safetensors")[1].size,
        figures=figures,
        average_accuracy=_accuracy_of_average(scenario, folder, say),
        central_accuracy=None,
        startup_s=0.0,
        wall_s=wall_s,
        peak_memory_mib=None,
        engine={},
    )
    summary |= emulated
    record.write("summary.json", json.dumps(summary, indent=1) + "\n")
    record.close()
    place.keep()
    say(f"collected {len(well)} of {len(roster.peers)} peers in {time.monotonic() - began:.1f} s")
    return RunResult(summary, folder)


def _scenario_of(name: PeerId, content: bytes) -> dict[str, Any]:
    """What a peer says that it ran. RunError where that is no TOML."""
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise RunError(f"the scenario that {name} answers with cannot be read ({error}); leave it out of the roster") from error


def _about_others(scenarios: dict[PeerId, dict[str, Any]]) -> list[str]:
    """What to tell of peers whose scenario is not that of the first, which the record takes for all of them."""
    settings = {name: _settings(scenario) for name, scenario in scenarios.items()}
    first, its = next(iter(settings.items()))
    lines = []
    for name, others in settings.items():
        if differing := sorted(key for key in its.keys() | others.keys() if its.get(key) != others.get(key)):
            lines.append(
                f"{name} ran another scenario than {first}, by {', '.join(differing)}: the record takes them for one; "
                "start all peers with the same scenario and the same --set"
            )
    return lines


def _settings(scenario: dict[str, Any]) -> dict[str, Any]:
    """Each by its name with that of its table, but for what is a machine's own."""
    settings: dict[str, Any] = {}
    for table, values in scenario.items():
        settings |= {f"{table}.{key}": value for key, value in values.items()} if isinstance(values, dict) else {table: values}
    return {key: value for key, value in settings.items() if key not in OWN_SETTINGS}


def _gather(roster: Roster, timeout_s: float, say: Say) -> dict[PeerId, dict[str, bytes]]:
    from gossipfl.runtime.transport import ZmqTransport

    transport = ZmqTransport("tcp://127.0.0.1:0", run=roster.run)
    try:
        done = _gather_through(transport, roster, timeout_s, say)
    finally:
        transport.close(flush_s=1.0)
    missing = [name for name in roster.peers if name not in done]
    if missing:
        say(f"not collected within {timeout_s:g} s: {', '.join(missing)}")
    return {name: done[name] for name in roster.peers if name in done}


def _gather_through(transport: Any, roster: Roster, timeout_s: float, say: Say) -> dict[PeerId, dict[str, bytes]]:
    from gossipfl.runtime.transport import Incoming

    for name, address in roster.peers.items():
        transport.connect(name, address)
    waiting = {name: _Gathering() for name in roster.peers}
    done: dict[PeerId, dict[str, bytes]] = {}
    deadline = time.monotonic() + timeout_s
    say(f"asking {', '.join(roster.peers)}")
    while waiting and time.monotonic() < deadline:
        for name, gathering in waiting.items():
            if time.monotonic() - gathering.asked_at > ASK_S:
                _ask(transport, name, gathering)
        for happening in transport.receive(0.2):
            if not isinstance(happening, Incoming) or not isinstance(happening.message, Record):
                continue
            asked = waiting.get(happening.sender)
            item = asked.next_item() if asked else None
            if asked is None or item is None or happening.message.request != ITEMS.index(item):
                continue
            _take(asked, item, happening.message)
            if asked.next_item() is None:
                done[happening.sender] = {item: bytes(content) for item, content in asked.contents.items()}
                del waiting[happening.sender]
                transport.send(COLLECTOR, happening.sender, Collect(len(ITEMS), "thanks", 0))
                say(f"{happening.sender} is collected")
            elif happening.message.total >= 0:
                _ask(transport, happening.sender, asked)
    return done


def _ask(transport: Any, name: PeerId, gathering: _Gathering) -> None:
    item = gathering.next_item()
    assert item is not None
    gathering.asked_at = time.monotonic()
    transport.send(COLLECTOR, name, Collect(ITEMS.index(item), item, len(gathering.contents[item])))


def _take(gathering: _Gathering, item: str, record: Record) -> None:
    content = gathering.contents[item]
    if record.total < 0 or record.offset != len(content):
        return
    content += record.payload
    gathering.totals[item] = record.total


def _check_names_match(name: PeerId, scenario: Scenario, roster: Roster, path: Path) -> None:
    if name not in scenario.peer_names:
        raise ConfigError(f"--name {name}: the scenario has the peers p0 to p{scenario.peers - 1}")
    missing = [peer for peer in scenario.peer_names if peer not in roster.peers]
    if missing:
        hint = did_you_mean(missing[0], roster.peers)
        raise ConfigError(f"roster {path} has no address for {', '.join(missing)}, of {scenario.peers} peers{hint}")


def _accuracy_of_average(scenario: Scenario, folder: Path, say: Say) -> float | None:
    """On the test set, where this machine has the data."""
    try:
        dataset = open_dataset(prepare(scenario))
    except DataError as error:
        say(f"the average model is not evaluated: {error}")
        return None
    from gossipfl.learning.models import build_model
    from gossipfl.learning.training import Engine, TrainingConfig

    model = build_model(scenario.model, dataset.input_shape, dataset.num_classes, scenario.model_args, scenario.model_seed)
    config = TrainingConfig(buffers=scenario.training.buffers)
    return Engine(model, config, dataset).evaluate(load_model(folder / "models" / "average.safetensors")[1])
