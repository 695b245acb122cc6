"""What a round of a run takes, and what holds it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gossipfl.overlay.links import Links
from gossipfl.scenario.planning.rehearsal import Rehearsed

ALIKE = 1.05
"""Peers within this factor of the median are not named."""
DRAWN_ALIKE = 1.5
"""The same for what depends on the neighbours drawn, which differ by chance."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds per round that one thing alone would take the peer that it takes longest; None: all alike.

    `peer` is a name; of a pair, "p2 to p5".
    """

    seconds: float
    peer: str | None


@dataclass(frozen=True, slots=True)
class Timing:
    """Virtual seconds."""

    round_s: float
    """Of the peer that it takes longest."""
    total_s: float
    bottleneck: str
    costs: dict[str, Cost]
    """Of "compute", "uplink", "downlink", "pair", "latency", and of "loss" where messages are lost."""


def timing_of(rehearsed: Rehearsed, links: Links) -> Timing:
    costs = {
        "compute": _cost(rehearsed.train_s),
        "uplink": _cost(rehearsed.sent / links.uplink, DRAWN_ALIKE),
        "downlink": _cost(rehearsed.received / links.downlink),
        "pair": _cost(rehearsed.pair_s, DRAWN_ALIKE, [f"p{sender} to " for sender in rehearsed.slowest]),
        "latency": _cost(rehearsed.latency_s, DRAWN_ALIKE),
    }
    if links.loss:  # what nothing else explains went into noticing that a message is lost, and asking again
        rest_s = rehearsed.round_s - sum(cost.seconds for cost in costs.values())
        costs["loss"] = Cost(max(rest_s, 0.0), None)
    cause = max(costs, key=lambda name: costs[name].seconds)
    if rehearsed.round_s <= ALIKE * costs["compute"].seconds:  # what is sent meanwhile holds nobody up
        cause = "compute"
    peer = costs[cause].peer
    whose = f" {peer}" if cause == "pair" else f" of {peer}"
    return Timing(rehearsed.round_s, rehearsed.total_s, f"{cause}{whose if peer else ''}", costs)


def _cost(seconds: np.ndarray, alike: float = ALIKE, begins: Sequence[str] | None = None) -> Cost:
    """The greatest, with whose it is where it stands out, or else the mean; `begins`, by peer, comes before its name."""
    worst = int(seconds.argmax())
    if seconds[worst] > alike * float(np.median(seconds)):
        return Cost(float(seconds[worst]), f"{begins[worst] if begins else ''}p{worst}")
    return Cost(float(seconds.mean()), None)
