"""What is emulated around peers, as plain values that travel to their processes as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossipfl.overlay.devices import Devices
from gossipfl.overlay.links import Change, Constant, Links, PairValues
from gossipfl.protocol.messages import PeerId


@dataclass(frozen=True)
class Emulation:
    """What is emulated around peers: the links and the devices of all, `names[i]` having those of index i."""

    names: Sequence[PeerId]
    seed: int
    links: Links | None = None
    devices: Devices | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; matrices where pairs differ."""
        return {
            "names": list(self.names),
            "seed": self.seed,
            "links": self.links and _plain_links(self.links),
            "devices": self.devices
            and {"step_s": self.devices.step_s.tolist(), "variation": self.devices.variation, "seed": self.seed},
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> Emulation:
        links, devices = values["links"], values["devices"]
        if devices is not None:
            devices = Devices(np.array(devices["step_s"]), devices["variation"], devices["seed"])
        return Emulation(values["names"], values["seed"], links and _links(links, len(values["names"])), devices)


def _plain_links(links: Links) -> dict[str, Any]:
    return {
        "uplink": links.uplink.tolist(),
        "downlink": links.downlink.tolist(),
        "pair": _plain(links.pair, links.num_peers),
        "latency": _plain(links.latency, links.num_peers),
        "jitter_s": links.jitter_s,
        "loss": links.loss,
        "changes": [(change.time_s, change.index, change.uplink, change.downlink) for change in links.changes],
        "repeats": links.repeats,
    }


def _plain(values: Callable[[int, int], float], num_peers: int) -> float | list[list[float]]:
    rows = [[values(sender, receiver) for receiver in range(num_peers)] for sender in range(num_peers)]
    first = rows[0][0]
    return first if all(value == first for row in rows for value in row) else rows


def _links(values: dict[str, Any], num_peers: int) -> Links:
    pair, latency = (
        PairValues(np.array(given) if isinstance(given, list) else Constant(given), num_peers)
        for given in (values["pair"], values["latency"])
    )
    return Links(
        np.array(values["uplink"]),
        np.array(values["downlink"]),
        pair,
        latency,
        jitter_s=values["jitter_s"],
        loss=values["loss"],
        changes=[Change(*change) for change in values["changes"]],
        repeats=values["repeats"],
    )
