"""The emulated network: how long messages take over links of finite rate, under virtual time.

Payload is a fluid. What one peer sends another is one flow, chunk behind chunk; the flows share the uplink of their sender,
the downlink of their receiver and have the capacity of their directed pair for themselves. Up to `EXACT_PEERS` peers the
rates are max-min fair (Bertsekas and Gallager, Data Networks, section 6.5.2): nobody's can be raised without lowering that of
somebody who has no more. Beyond, a flow gets min(uplink / flows there, downlink / flows there, pair), which gives away what
those limited elsewhere leave over. Messages without payload take the latency of the pair and no capacity.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from gossipfl.overlay.links import Change, Links, PairValues
from gossipfl.simulation.clock import VirtualClock

EXACT_PEERS = 100

Delivery = tuple[Callable[..., None], tuple[Any, ...]]


class Flow:
    """What one peer sends another; active while anything is queued."""

    __slots__ = ("is_active", "latency", "left", "number", "pair", "queue", "rate", "receiver", "sender", "since", "stamp")

    def __init__(self, sender: int, receiver: int, pair: float, latency: float = 0.0) -> None:
        self.sender, self.receiver, self.pair, self.latency = sender, receiver, pair, latency
        self.queue: deque[tuple[int, int, Delivery]] = deque()  # request, bytes, what to do on arrival
        self.left = 0.0  # bytes of the first chunk, at `since`
        self.rate = 0.0  # bytes per second
        self.since = 0.0
        self.stamp = 0  # of the completion that is planned; others are out of date
        self.is_active = False
        self.number = 0  # in the order in which flows became active

    def bytes_queued(self, request: int | None = None) -> int:
        """Bytes not yet sent in full, of one request or of all."""
        return sum(num_bytes for of, num_bytes, _ in self.queue if request is None or of == request)


class Network:
    """Delivers messages and chunks between peers `0..n-1`; `rng` draws what is lost and the jitter."""

    def __init__(self, links: Links, clock: VirtualClock, rng: np.random.Generator) -> None:
        self._links, self._clock, self._rng = links, clock, rng
        self._uplink, self._downlink = links.uplink.tolist(), links.downlink.tolist()
        self._up_share, self._down_share = [0.0] * links.num_peers, [0.0] * links.num_peers  # of a flow there
        self._widest_pair = _greatest(links.pair)
        self._opened: list[Flow] = []  # since capacities were shared
        self._num_opened = 0
        self._flows: dict[tuple[int, int], Flow] = {}
        self._sending: list[dict[Flow, None]] = [{} for _ in range(links.num_peers)]
        self._receiving: list[dict[Flow, None]] = [{} for _ in range(links.num_peers)]
        self._touched: dict[int, None] = {}  # peers whose flows came, went, or got other capacities
        self._last_arrival: dict[tuple[int, int], float] = {}
        self._latency = links.common_latency
        self._is_plain = not links.jitter_s and not links.loss
        self.is_exact = links.num_peers <= EXACT_PEERS
        self._is_unlimited = links.is_unlimited
        self._timeline = links.timeline()
        self._plan_change()

    # --- what is sent -------------------------------------------------------------------------------------------------

    def send(self, sender: int, receiver: int, deliver: Callable[..., None], *args: Any) -> None:
        """A message without payload: `deliver(*args)` when it arrives, if it does."""
        if self._is_plain:
            latency = self._latency if self._latency is not None else self._links.latency(sender, receiver)
            self._clock.at(self._clock.now + latency, deliver, *args)
        else:
            self._launch(sender, receiver, deliver, args)

    def stream(
        self, sender: int, receiver: int, request: int, num_bytes: int, deliver: Callable[..., None], *args: Any
    ) -> None:
        """A chunk of the answer to `request`, behind what the sender has queued for this receiver already."""
        if self._is_unlimited:
            self.send(sender, receiver, deliver, *args)
            return
        flow = self._flow(sender, receiver)
        flow.queue.append((request, num_bytes, (deliver, args)))
        if not flow.is_active:
            self._num_opened += 1
            flow.is_active, flow.left, flow.rate, flow.number = True, float(num_bytes), 0.0, self._num_opened
            self._sending[sender][flow] = self._receiving[receiver][flow] = None
            self._opened.append(flow)
            self._touch(flow)

    def flow(self, sender: int, receiver: int) -> Flow | None:
        """What is queued between these two, if anything ever was."""
        return self._flows.get((sender, receiver))

    def cut(self, peer: int) -> None:
        """Drop all that is queued from and to a peer that has gone."""
        for flow in [*self._sending[peer], *self._receiving[peer]]:
            flow.queue.clear()
            self._close(flow)

    def settle(self) -> None:
        """Share the capacities anew where something has changed. To be called before time moves on."""
        if not self._touched:
            return
        if self.is_exact:
            self._share_fairly()
        else:
            self._share_evenly()
        self._touched.clear()
        self._opened.clear()

    def _share_fairly(self) -> None:
        flows = [flow for flows in self._sending for flow in flows]
        rates = fair_rates(flows, np.array(self._uplink), np.array(self._downlink)).tolist()
        for flow, rate in zip(flows, rates, strict=True):
            if rate != flow.rate:
                self._set_rate(flow, rate)

    def _share_evenly(self) -> None:
        """A rate changes only where an end has another share for each of its flows, or with a flow that is new."""
        up_share, down_share = self._up_share, self._down_share
        flows = {flow: None for flow in self._opened if flow.is_active}
        for peer in self._touched:
            for share, capacity, there in (
                (up_share, self._uplink[peer], self._sending[peer]),
                (down_share, self._downlink[peer], self._receiving[peer]),
            ):
                of_each = min(capacity / (len(there) or 1), self._widest_pair)
                if of_each != share[peer]:
                    share[peer] = of_each
                    flows.update(there)
        changed = []
        for flow in flows:
            rate = min(up_share[flow.sender], down_share[flow.receiver], flow.pair)
            if rate != flow.rate:
                changed.append((flow, rate))
        if len(changed) > 1:  # the seed decides which of two messages comes first at one time, so this order has to be one
            place = {peer: number for number, peer in enumerate(self._touched)}
            changed.sort(key=lambda entry: _order(entry[0], place))
        for flow, rate in changed:
            self._set_rate(flow, rate)

    # --- flows --------------------------------------------------------------------------------------------------------

    def _flow(self, sender: int, receiver: int) -> Flow:
        flow = self._flows.get((sender, receiver))
        if flow is None:
            links = self._links
            flow = Flow(sender, receiver, links.pair(sender, receiver), links.latency(sender, receiver))
            self._flows[sender, receiver] = flow
        return flow

    def _touch(self, flow: Flow) -> None:
        self._touched[flow.sender] = self._touched[flow.receiver] = None

    def _set_rate(self, flow: Flow, rate: float) -> None:
        now = self._clock.now
        if flow.rate:
            flow.left = max(0.0, flow.left - flow.rate * (now - flow.since))
        flow.since, flow.rate = now, rate
        self._plan(flow)

    def _plan(self, flow: Flow) -> None:
        flow.stamp += 1
        if flow.rate > 0:
            done_at = flow.since if math.isinf(flow.rate) else flow.since + flow.left / flow.rate
            self._clock.at(done_at, self._sent, flow, flow.stamp)

    def _sent(self, flow: Flow, stamp: int) -> None:
        if stamp != flow.stamp:
            return
        _, _, (deliver, args) = flow.queue.popleft()
        if self._is_plain:
            self._clock.at(self._clock.now + flow.latency, deliver, *args)
        else:
            self._launch(flow.sender, flow.receiver, deliver, args)
        if flow.queue:
            flow.left, flow.since = float(flow.queue[0][1]), self._clock.now
            self._plan(flow)
        else:
            self._close(flow)

    def _close(self, flow: Flow) -> None:
        flow.is_active = False
        flow.stamp += 1
        self._sending[flow.sender].pop(flow, None)
        self._receiving[flow.receiver].pop(flow, None)
        self._touch(flow)

    def _plan_change(self) -> None:
        change = next(self._timeline, None)
        if change is not None:
            self._clock.at(change.time_s, self._change, change)

    def _change(self, change: Change) -> None:
        self._uplink[change.index], self._downlink[change.index] = change.uplink, change.downlink
        self._touched[change.index] = None
        self._plan_change()

    def _launch(self, sender: int, receiver: int, deliver: Callable[..., None], args: tuple[Any, ...]) -> None:
        """With chance: some are lost, none overtakes another of the same pair."""
        if self._links.loss and self._rng.random() < self._links.loss:
            return
        latency = self._links.latency(sender, receiver) + self._links.jitter_s * self._rng.random()
        arrival = max(self._clock.now + latency, self._last_arrival.get((sender, receiver), 0.0))
        self._last_arrival[sender, receiver] = arrival
        self._clock.at(arrival, deliver, *args)


def _greatest(pair: PairValues) -> float:
    """A bound of the capacities of all pairs."""
    return float(np.max(pair.values)) if isinstance(pair.values, np.ndarray) else pair.constant or math.inf


def _order(flow: Flow, place: dict[int, int]) -> tuple[int, bool, int]:
    """By the end of it that has the first place, what that sends before what it receives, and what was there first."""
    sender, receiver = place.get(flow.sender, len(place)), place.get(flow.receiver, len(place))
    return min(sender, receiver), receiver < sender, flow.number


def fair_rates(flows: list[Flow], uplink: np.ndarray, downlink: np.ndarray) -> np.ndarray:
    """The max-min fair rate of each flow (f64[len(flows)], bytes per second), given capacities (f64[n]) of both ends.

    Progressive filling, every local bottleneck at once: an end whose fair share is the least for all of its flows is one
    whatever happens elsewhere, and so is a pair that has no more than both its ends would give.
    """
    num_peers, num_flows = uplink.size, len(flows)
    ends = np.empty((2, num_flows), np.int64)
    ends[0] = np.fromiter((flow.sender for flow in flows), np.int64, num_flows)
    ends[1] = np.fromiter((flow.receiver + num_peers for flow in flows), np.int64, num_flows)
    pair = np.fromiter((flow.pair for flow in flows), np.float64, num_flows)
    capacity = np.concatenate([uplink, downlink])
    rates = np.zeros(num_flows)
    open_ = np.arange(num_flows)
    while open_.size:
        here = ends[:, open_]
        counts = np.bincount(here.ravel(), minlength=2 * num_peers)
        shares = np.maximum(capacity, 0.0) / np.maximum(counts, 1)
        limits = shares[here].min(axis=0)
        offered = np.minimum(limits, pair[open_])
        least = np.full(2 * num_peers, np.inf)
        np.minimum.at(least, here[0], offered)
        np.minimum.at(least, here[1], offered)
        is_bottleneck = least >= shares * (1 - 1e-12)
        fixed = is_bottleneck[here].any(axis=0) | (pair[open_] <= limits)
        rates[open_[fixed]] = offered[fixed]
        used = offered[fixed]
        finite = np.isfinite(used)
        for end in (0, 1):
            np.subtract.at(capacity, here[end][fixed][finite], used[finite])
        open_ = open_[~fixed]
    return rates
