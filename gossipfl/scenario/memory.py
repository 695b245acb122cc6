"""The memory that a run takes, worked out before it begins: what a plan tells, and what a run is refused for."""

from __future__ import annotations

import ctypes

import psutil

from gossipfl.errors import ConfigError
from gossipfl.scenario.config import Scenario
from gossipfl.scenario.hosting import groups_of
from gossipfl.scenario.workers import MMAP_THRESHOLD_BYTES
from gossipfl.segments.codecs import SparseCodec, codec

PROCESS_BYTES = 250 * 2**20
"""What Python and torch take in each process, beside the peers."""
TRIM_THRESHOLD_BYTES = 256 * 2**20
"""What a process with all peers in it may keep of what it has freed; worker processes, which may be many, keep less."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have this process use again what it frees, up to `TRIM_THRESHOLD_BYTES`, rather than hand it back: a training step of a
    large model costs a page fault for each 4 KiB of its gradients otherwise. Only where the C library is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def needed_bytes(scenario: Scenario, parameters: int) -> int:
    """What all peers hold at once, and the processes that they live in, for a model of so many float32 values."""
    return scenario.peers * _peer_bytes(scenario, parameters) + _num_processes(scenario) * PROCESS_BYTES


def available_bytes() -> int:
    """What this machine can give without swapping."""
    return psutil.virtual_memory().available


def why_too_large(scenario: Scenario, parameters: int) -> str | None:
    """What to tell of a run that does not fit this machine, with the number of peers that would; None if it does."""
    needed, available = needed_bytes(scenario, parameters), available_bytes()
    if needed <= available:
        return None
    peer, processes = _peer_bytes(scenario, parameters), _num_processes(scenario)
    if processes > 1 and (scenario.peers_per_process or scenario.resolved_clock == "netns"):  # fewer peers, fewer processes
        fitting = available * scenario.peers // (peer * scenario.peers + PROCESS_BYTES * processes)
    else:
        fitting = max(0, available - processes * PROCESS_BYTES) // peer
    return (
        f"peers = {scenario.peers} with {parameters:,} parameters need about {needed / 2**30:,.1f} GiB and "
        f"{available / 2**30:,.1f} GiB are free; {fitting} peers would fit, or lower gossip.versions_kept"
    )


def check_memory(scenario: Scenario, parameters: int) -> None:
    """ConfigError where the run does not fit this machine."""
    if reason := why_too_large(scenario, parameters):
        raise ConfigError(reason)


def check_processes(scenario: Scenario) -> None:
    """ConfigError where not even the processes fit, whatever the model: before there are any."""
    processes, available = _num_processes(scenario), available_bytes()
    if processes > 1 and processes * PROCESS_BYTES > available:
        raise ConfigError(
            f"peers = {scenario.peers} in {processes} processes need about {processes * PROCESS_BYTES / 2**30:,.1f} GiB and "
            f"{available / 2**30:,.1f} GiB are free; {available // PROCESS_BYTES} processes would fit: lower peers, or use "
            "--clock virtual"
        )


def _peer_bytes(scenario: Scenario, parameters: int) -> int:
    """The models of one peer: stored versions, the one in training, the mixed one, and copies of others."""
    gossip = scenario.gossip
    copies = gossip.versions_kept + 2
    if scenario.resolved_clock != "virtual":
        copies += min(gossip.replicas, scenario.peers - 1)
    else:
        copies += gossip.versions_kept if gossip.codec != "float32" else 0  # what each version decodes to
        if gossip.protocol == "fragments":
            copies += 4  # of which others hold a fragment that they have not mixed yet; measured
        elif gossip.protocol == "gossip" and not gossip.max_staleness:
            copies -= 1  # all train in place, at one time, before any of them mixes
    if isinstance(codec(gossip.codec), SparseCodec):
        copies += 2  # the accumulator of what was not sent yet
    return copies * parameters * 4


def _num_processes(scenario: Scenario) -> int:
    in_process = scenario.resolved_clock == "virtual" or scenario.transport.kind == "inproc"
    return len(groups_of(scenario, in_process))
