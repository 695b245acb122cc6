"""The servers that a device may ask, as it has found them: who is asked next, and who is left alone for a while."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gossipfl.inference.planning.device_words import Report
from gossipfl.protocol.messages import PeerId

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.25, 5.0
"""How long a server that failed is left alone: doubled with each failure."""
BUSY_BACKOFF_S = 0.05

REMEDY = "is `gossipfl serve` running there? further servers can be named with --server"

_RANK = {True: 0, None: 1, False: 2}


@dataclass(slots=True)
class Holder:
    is_up: bool | None = None  # None: nothing is known of it
    failures: int = 0
    free_at: float = 0.0


class Holders:
    """All that can hold the model, with their addresses, by which people are told of them; they are interchangeable."""

    def __init__(self, addresses: Mapping[PeerId, str]) -> None:
        self.addresses = dict(addresses)
        self._holders = {peer: Holder() for peer in addresses}
        self.last_trouble = f"no answer from {' or '.join(addresses.values())} yet; {REMEDY}"

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._holders

    def __len__(self) -> int:
        return len(self._holders)

    def choose(self, now: float, without: Collection[PeerId] = ()) -> PeerId | None:
        """Whom to ask: one that is up if there is one, the least failing, the first named; None if nobody may be asked now."""
        free = [peer for peer, holder in self._holders.items() if holder.free_at <= now and peer not in without]
        return min(free, key=lambda peer: (_RANK[self._holders[peer].is_up], self._holders[peer].failures), default=None)

    def next_free(self, without: Collection[PeerId] = ()) -> float:
        """When somebody may be asked again."""
        return min((holder.free_at for peer, holder in self._holders.items() if peer not in without), default=math.inf)

    def are_all(self, peers: Collection[PeerId]) -> bool:
        return all(peer in peers for peer in self._holders)

    def are_hopeless(self, failed: Collection[PeerId]) -> bool:
        """Whether each has failed already or is known to be gone."""
        return all(peer in failed or holder.is_up is False for peer, holder in self._holders.items())

    def blame(self, peer: PeerId, kind: str, detail: str, now: float) -> Report:
        holder = self._holders[peer]
        holder.failures += 1
        holder.free_at = now + min(FIRST_BACKOFF_S * 2 ** min(holder.failures - 1, 10), MAX_BACKOFF_S)
        address = self.addresses[peer]
        self.last_trouble = f"{address}: {detail}" + (f"; {REMEDY}" if kind in ("gone", "silent") else "")
        return Report(address, kind, detail)

    def praise(self, peer: PeerId) -> None:
        self._holders[peer] = Holder(is_up=True)
        self.last_trouble = f"{self.addresses[peer]} has answered before; allow more time"

    def is_busy(self, peer: PeerId, now: float) -> None:
        """It works, so it is not to blame."""
        self._holders[peer].free_at = now + BUSY_BACKOFF_S

    def up(self, peer: PeerId, now: float) -> None:
        holder = self._holders[peer]
        if holder.is_up is False:
            holder.free_at = now
        holder.is_up = True

    def down(self, peer: PeerId) -> None:
        self._holders[peer].is_up = False
