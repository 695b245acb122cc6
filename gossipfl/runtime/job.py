"""All that a process needs to host its peers; plain values, so that it travels as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gossipfl.protocol.messages import PeerId


@dataclass(frozen=True)
class PeerJob:
    """One peer of a process: its shard (an .npy file of indices) and its neighbours with their degrees, also of each round."""

    name: PeerId
    indices: str
    degrees: dict[PeerId, int]
    schedule: list[dict[PeerId, int]] | None = None


@dataclass(frozen=True)
class Job:
    """What `PeerHost` is made from; its paths are those of this machine."""

    peers: list[PeerJob]
    run: int
    bind: str
    data: str
    model: str
    model_args: dict[str, Any]
    model_seed: int
    training: dict[str, Any]
    gossip: dict[str, Any]
    evaluate_every: int
    out: str
    advertise: str | None = None
    insecure: bool = False
    scenario: str = ""
    emulation: dict[str, Any] | None = None  # see `shaping.Emulation`
    namespace: str | None = None  # see `namespaces.enter`
    late: list[PeerId] = field(default_factory=list)  # peers that are not there at the start
    serving: dict[str, Any] | None = None  # see `serving_peers.ServingSettings`

    @staticmethod
    def from_json(values: dict[str, Any]) -> Job:
        return Job(**{**values, "peers": [PeerJob(**peer) for peer in values["peers"]]})
