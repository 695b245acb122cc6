"""A peer of a simulation: its machine with the vectors and counts that the simulator keeps for it, and who hears of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gossipfl.protocol.machine import Event, Fault, Merge, RoundReport, Traffic
from gossipfl.protocol.messages import PeerId
from gossipfl.segments.codecs import Decoded
from gossipfl.segments.layout import Range
from gossipfl.segments.store import SegmentStore


class ProtocolMachine(Protocol):
    """What the simulator needs of a machine beyond `Machine`."""

    name: PeerId
    config: Any
    desk: Any
    membership: Any
    round: int

    @property
    def next_deadline(self) -> float | None: ...

    def handle(self, event: Event, now: float) -> list[Any]: ...


@dataclass(slots=True, eq=False)
class SimulatedPeer:
    """One peer: its machine, what it stores, and the vectors between training and merging (all f32[P])."""

    index: int
    name: PeerId
    machine: ProtocolMachine
    store: SegmentStore
    own: np.ndarray
    """The newest trained vector; while `task` is set, the one that training starts from."""
    mixed: np.ndarray | None = None
    merges: dict[int, Merge] = field(default_factory=dict)
    """Of each segment, the merge that is due and not yet carried out."""
    task: int | None = None
    """The round that is being trained and not yet computed."""
    owns_start: bool = False
    """Whether nobody else may see the vector that training starts from, so that it is trained in place."""
    loss: float = float("nan")
    wake_at: float | None = None
    is_there: bool = False
    """Begun, not killed since, and not finished."""
    is_away: bool = False
    is_finished: bool = False
    error: str | None = None
    traffic: Traffic = field(default_factory=Traffic)
    decoded: dict[tuple[int, Range], Decoded] = field(default_factory=dict)


class Watcher:
    """Hears of what happens in a simulation. Does nothing; a run's record has one that writes it down."""

    def trained(self, peers: Sequence[SimulatedPeer]) -> None:
        """These peers' trained vectors (`own`) have just been computed."""

    def will_train(self) -> None:
        """Mixed vectors are about to be trained from, some in place: the last moment to look at them."""

    def round_done(self, peer: SimulatedPeer, report: RoundReport, traffic: Traffic) -> None:
        """The peer's merges of this round are done: `mixed` (or `own`, where nothing was merged) is what came of them."""

    def fault(self, peer: SimulatedPeer, fault: Fault) -> None: ...

    def finished(self, peer: SimulatedPeer) -> None: ...
