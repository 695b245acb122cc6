"""How a scenario is hosted: what its processes are told, which peers share one, what the machine must allow."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gossipfl.errors import ConfigError, RunError
from gossipfl.learning.datasets import Dataset
from gossipfl.overlay.devices import STEP
from gossipfl.overlay.graphs import Topology, degrees_of
from gossipfl.randomness import generator
from gossipfl.runtime.namespaces import check_available
from gossipfl.runtime.shaping import Emulation
from gossipfl.scenario.config import MANY_PEERS, Scenario
from gossipfl.scenario.preparation import calibration_indices, data_name, held_out_halves, seen_indices
from gossipfl.scenario.records import Event
from gossipfl.scenario.workers import num_cores

MAX_PORT = 65535


def peer_settings(scenario: Scenario) -> Event:
    """What of a scenario every process that hosts peers is told."""
    gossip = scenario.gossip.model_dump()
    gossip["patience"] = None if gossip["patience"] == "auto" else gossip["patience"]
    return {
        "model": scenario.model,
        "model_args": scenario.model_args,
        "model_seed": scenario.model_seed,
        "training": scenario.training.model_dump() | {"seed": scenario.protocol_seed},
        "gossip": gossip | {"rounds": scenario.rounds, "seed": scenario.protocol_seed},
        "evaluate_every": scenario.evaluate_every,
    }


def peer_job(scenario: Scenario, topology: Topology, number: int, indices: Path) -> Event:
    """What a process is told of one peer (`runtime.job.PeerJob`), whose training samples are listed in the file `indices`."""
    names = scenario.peer_names
    degrees, schedule = degrees_of(topology, number, names)
    return {"name": names[number], "indices": str(indices), "degrees": degrees, "schedule": schedule}


def emulation(scenario: Scenario, by_kernel: Sequence[str] = ()) -> Event | None:
    """What processes that host peers emulate around them (`runtime.shaping.Emulation`), None if nothing.

    That is, what of the links `by_kernel` (see `runtime.namespaces`) leaves to them, and the devices.
    """
    links = scenario.build_links()
    if "rates" in by_kernel:
        links = links.without_rates()
    if "latency" in by_kernel:
        links = links.without_latency()
    emulated = Emulation(
        scenario.peer_names,
        scenario.protocol_seed,
        None if links.is_ideal else links,
        scenario.build_devices() if scenario.compute.model_fields_set else None,
    )
    return emulated.to_json() if emulated.links or emulated.devices else None


def serving(scenario: Scenario, dataset: Dataset) -> Event | None:
    """What processes are told of serving their peers (`runtime.serving_peers`), but for the address; None if they do not."""
    inference = scenario.inference
    if not inference.serve:
        return None
    kept = calibration_indices(scenario, dataset)
    unseen = kept if len(kept) else held_out_halves(scenario, dataset)[0]
    some = generator(scenario.data_seed, "serving").permutation(unseen)[: inference.max_samples]
    return {
        "scenario": scenario.name,
        "every": inference.every,
        "alpha": inference.alpha,
        "delta": inference.delta,
        "data": data_name(scenario, dataset),
        "seen": seen_indices(scenario, dataset, inference.max_samples).tolist(),
        "unseen": np.sort(some).tolist(),
        "is_of_test": not len(kept),
    }


def device_address(scenario: Scenario, index: int, host: str) -> str:
    """Where the process number `index` listens for devices."""
    port = scenario.inference.port and scenario.inference.port + index
    if port > MAX_PORT:
        raise ConfigError(f"inference.port = {scenario.inference.port} leaves no port to process {index + 1}; lower it")
    return tcp_address(host, port)


def tcp_address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def fidelity(scenario: Scenario, events: Sequence[Event], note: Callable[[str], None], by_kernel: Sequence[str] = ()) -> Event:
    """What summary.json says of the emulation: what shaped the links, and how many trainings took longer than told."""
    emulated = emulation(scenario, by_kernel)
    if emulated is None and not by_kernel:
        return {}
    rounds = [event for event in events if event["event"] == "round"]
    overrun = [event["overrun_s"] for event in rounds if event.get("overrun_s")]
    if overrun:
        note(
            f"{len(overrun)} of {len(rounds)} trainings took longer than [compute] says, by up to {max(overrun):.3f} s: "
            "this run claims no fidelity; lengthen compute.step_time, or use --clock virtual"
        )
    shaping = "user space" if emulated and emulated["links"] else None
    if by_kernel:
        left = [what for what in ("latency", "jitter", "loss") if what not in by_kernel]
        shaping = f"kernel: {', '.join(by_kernel)}" + (f"; user space: {', '.join(left)}" if shaping else "")
    return {"shaping": shaping, "overrun": len(overrun)}


def groups_of(scenario: Scenario, in_process: bool) -> list[list[str]]:
    """The peers of each process: one process per core, unless the scenario says how many peers share one."""
    names = scenario.peer_names
    size = scenario.peers_per_process or math.ceil(len(names) / num_cores())
    if in_process:
        size = len(names)
    elif scenario.resolved_clock == "netns":
        size = 1
    return [names[first : first + size] for first in range(0, len(names), size)]


def about_trace(scenario: Scenario, ran_s: float) -> list[str]:
    """What to tell of a run that went on, in seconds of its clock, after its trace of rates had ended, against expectations."""
    settled_s = scenario.build_links().settled_s
    if scenario.network.trace_after or not 0 < settled_s < ran_s:
        return []
    return [
        f"network.trace ends at {settled_s:g} s: its last rates held from then until {ran_s:.4g} s; give rows until then, "
        "or network.trace_after"
    ]


def about_planned(scenario: Scenario, ran_s: float) -> list[str]:
    """What to tell of a run that was over, after so many seconds of its clock, before all that [churn] plans was due."""
    to_come = [(at, key, peer) for at, key, peer in scenario.churn.planned if at > ran_s]
    if not to_come:
        return []
    at, key, peer = to_come[0]
    more = f", and {len(to_come) - 1} more after it" if len(to_come) > 1 else ""
    return [
        f"churn.{key} of {peer} at {at:g} s was never due{more}: at {ran_s:.4g} s everybody had finished or gone; "
        "set it earlier, or give the run more rounds"
    ]


def about_clock(scenario: Scenario) -> list[str]:
    """What to tell of a run that is under virtual time though nobody has said so."""
    if scenario.clock != "auto" or scenario.resolved_clock != "virtual":
        return []
    if not scenario.is_emulated:
        return [
            f"{MANY_PEERS} peers or more run under virtual time, where a local step takes {STEP.value * 1000:g} ms and links "
            "have no limits; --clock local has them talk over sockets"
        ]
    if scenario.asks_for_sockets:
        return [
            "[network], [compute] and [churn] are emulated under virtual time, where peers_per_process and [transport] play no "
            "part; --clock local has the peers talk over sockets"
        ]
    return []


def about_churn(scenario: Scenario, train_s: float) -> list[str]:
    """What to tell of a run whose peers, as a rule, are gone again before they have trained for `train_s`, a round."""
    stays_s = scenario.build_churn().mean_stay_s
    if train_s <= stays_s:
        return []
    return [
        f"[churn] has a peer there for {stays_s:.3g} s at a stretch, on average, and a round takes {train_s:.3g} s to train: "
        "most are begun in vain, and the run hardly advances; lengthen churn.period, or give stop.duration"
    ]


def check_namespaces(scenario: Scenario, in_process: bool) -> None:
    """ConfigError for what the clock netns cannot do."""
    check_available(scenario.peers)
    if scenario.transport.kind != "tcp":
        raise ConfigError(
            f"clock = 'netns' runs processes that talk over tcp, and transport.kind = {scenario.transport.kind!r}; "
            "set transport.kind = 'tcp', or use --clock local"
        )
    if in_process:
        raise ConfigError("clock = 'netns' runs processes, and objects of your own stay in this one; use --clock local")
    if scenario.peers_per_process not in (None, 1):
        raise ConfigError(f"peers_per_process = {scenario.peers_per_process}, but each has a network of its own; remove it")


def allow_file_descriptors(num_peers: int) -> None:
    """Sockets, monitors and pipes of one process, at the most; raises the soft limit where it may."""
    needed = 256 + 16 * min(num_peers, 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed <= hard or hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    elif needed > hard:
        raise RunError(f"{num_peers} peers need {needed} file descriptors, {hard} are allowed; see ulimit -n")


_BUFFERS = {"average": "averaged like the weights", "local": "each peer's own"}
_FINE_CODECS = ("float32", "float16", "bfloat16", "int8")


def tell_of_settings(
    scenario: Scenario, has_statistics: bool, note: Callable[[str], None], warn: Callable[[str], None]
) -> None:
    """Which settings play no part, and what a model with BatchNorm does with its statistics."""
    for line in _without_part(scenario):
        warn(line)
    if not has_statistics:
        return
    note(f"the model has BatchNorm: its statistics are {_BUFFERS[scenario.training.buffers]}")
    codec = scenario.gossip.codec
    if scenario.training.buffers == "local":
        warn(
            "training.buffers = 'local': the files of the models are without these statistics, and the average model is "
            "evaluated with those of an untrained one"
        )
    elif codec.partition(":")[0] not in _FINE_CODECS:
        warn(
            f"gossip.codec = {codec!r} blurs these statistics, which may cost accuracy: "
            "set training.buffers = 'local', or a finer codec, such as 'int8'"
        )


def _without_part(scenario: Scenario) -> Iterator[str]:
    """They are no mistake: a sweep over optimizers or rules has them for the sake of the others."""
    training, gossip = scenario.training, scenario.gossip
    if training.optimizer in ("adam", "adamw") and training.momentum:
        yield f"training.momentum = {training.momentum:g} plays no part: {training.optimizer} has moments of its own"
    if gossip.aggregation in ("median", "trimmed_mean"):
        alike = f"plays no part: {gossip.aggregation} weighs all copies alike"
        if gossip.mixing == "metropolis_hastings":
            yield f"gossip.mixing = {gossip.mixing!r} {alike}"
        if gossip.max_staleness and gossip.staleness_exponent:
            yield f"gossip.staleness_exponent = {gossip.staleness_exponent:g} {alike}, also old ones"
