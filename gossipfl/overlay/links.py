"""The emulated network: how fast, how late and how reliably bytes get from one peer to another.

A message from i to j shares i's uplink and j's downlink with whatever else they carry, has the capacity of the pair (i, j)
to itself, and arrives `latency(i, j)` later, plus a jitter drawn uniformly from [0, jitter_s]. Nothing here has a clock: the
simulator and the traffic shaper read the numbers.

    links = build_links(LinksConfig(uplink=Constant(1.25e6), latency=Uniform(0.02, 0.08)), num_peers=16, seed=0)
    links.uplink[3], links.pair(3, 5), links.latency(3, 5)

Rates are in bytes per second and `math.inf` where there is no limit; times are in seconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.overlay.csv_files import read_matrix, read_trace
from gossipfl.overlay.graphs import Topology
from gossipfl.randomness import generator

BYTES_PER_MBIT = 125_000.0
DRAWN_AT_ONCE = 2_000
"""Peers up to which a matrix of drawn values is held whole (f32: 16 MB); of more, each pair is drawn when first used."""
MIN_PERIOD_S = 1e-3
"""Of what repeats: more often would keep a run busy with nothing else."""


# ------------------------------------------------------------------------------------------------------- distributions


@dataclass(frozen=True, slots=True)
class Constant:
    """The same for all."""

    value: float

    def draw(self, rng: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
        """f64[shape]."""
        return np.full(shape, self.value)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Any value of [low, high) alike."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
        """f64[shape]."""
        return rng.uniform(self.low, self.high, shape)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Half of the values below the median, two thirds within a factor of e^sigma of it."""

    median: float
    sigma: float

    def draw(self, rng: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
        """f64[shape]."""
        return self.median * np.exp(self.sigma * rng.standard_normal(shape))


Distribution = Constant | Uniform | Lognormal
UNLIMITED = Constant(math.inf)
AT_ONCE = Constant(0.0)


class PairValues:
    """A value of each directed pair of peers: constant in no memory, a matrix, or drawn, by a seed."""

    def __init__(self, values: Distribution | np.ndarray, num_peers: int, seed: int = 0, purpose: str = "pair") -> None:
        self._seed, self._purpose = seed, purpose
        self._drawn: dict[tuple[int, int], float] = {}
        if not isinstance(values, Constant | np.ndarray) and num_peers <= DRAWN_AT_ONCE:
            values = values.draw(generator(seed, purpose), (num_peers, num_peers)).astype(np.float32)
        self.values = values

    @property
    def constant(self) -> float | None:
        """The value of all pairs, where they share one."""
        return self.values.value if isinstance(self.values, Constant) else None

    def __call__(self, sender: int, receiver: int) -> float:
        """The value of the pair from `sender` to `receiver`."""
        values = self.values
        if isinstance(values, Constant):
            return values.value
        if isinstance(values, np.ndarray):
            return float(values[sender, receiver])
        pair = sender, receiver
        if pair not in self._drawn:
            rng = generator(self._seed, self._purpose, f"p{sender}", receiver)
            self._drawn[pair] = float(np.float32(values.draw(rng, ())))
        return self._drawn[pair]


# --------------------------------------------------------------------------------------------------------------- links


@dataclass(frozen=True, slots=True)
class LinksConfig:
    """What a network is built from."""

    uplink: Distribution = UNLIMITED  # bytes/s that a peer sends, drawn once per peer
    downlink: Distribution = UNLIMITED  # bytes/s that a peer receives
    pair: Distribution = UNLIMITED  # bytes/s from one peer to another, drawn once per directed pair
    latency: Distribution = AT_ONCE  # seconds from one peer to another
    jitter_s: float = 0.0  # greatest further delay of a message
    loss: float = 0.0  # share of the messages that never arrive
    pair_matrix: str | None = None  # CSV of N x N, Mbit/s, instead of `pair`; 0 = no link, inf = no limit
    latency_matrix: str | None = None  # CSV of N x N, ms, instead of `latency`
    trace: str | None = None  # CSV of time_s,peer,uplink,downlink, Mbit/s
    trace_repeat: bool = False  # begin the trace again after its last row, instead of keeping its last values
    peer_uplink: Mapping[int, float] = field(default_factory=dict)  # of single peers, bytes/s
    peer_downlink: Mapping[int, float] = field(default_factory=dict)
    peer_latency: Mapping[int, float] = field(default_factory=dict)  # of all their links, seconds; of two, the longer


@dataclass(frozen=True, slots=True)
class Change:
    """From `time_s` on, peer `index` has these rates, in bytes per second."""

    time_s: float
    index: int
    uplink: float
    downlink: float


class Links:
    """The emulated network of `num_peers` peers."""

    def __init__(
        self,
        uplink: np.ndarray,
        downlink: np.ndarray,
        pair: PairValues,
        latency: PairValues,
        *,
        peer_latency: Mapping[int, float] | None = None,
        jitter_s: float = 0.0,
        loss: float = 0.0,
        changes: Sequence[Change] = (),
        repeats: bool = False,
    ) -> None:
        """`uplink` and `downlink`: f64[N], the rates at the start; `changes`, sorted by time, come later."""
        self.num_peers = len(uplink)
        self.uplink, self.downlink, self.pair = uplink, downlink, pair
        self.jitter_s, self.loss = jitter_s, loss
        self.changes, self.repeats = changes, repeats
        self._latency, self._peer_latency = latency, dict(peer_latency or {})

    @property
    def is_unlimited(self) -> bool:
        """No rate is limited, now or later."""
        peers_unlimited = np.isinf(self.uplink).all() and np.isinf(self.downlink).all()
        return bool(peers_unlimited and self.pair.constant == math.inf and not self.changes)

    @property
    def is_ideal(self) -> bool:
        """Everything arrives at once: no limit, no latency, no jitter, no loss."""
        return self.is_unlimited and not self.has_latency and not self.jitter_s and not self.loss

    @property
    def has_latency(self) -> bool:
        """Some message takes longer than its transmission, jitter aside."""
        return any(self._peer_latency.values()) or self._latency.constant != 0

    @property
    def common_latency(self) -> float | None:
        """That of all pairs, if they have one."""
        return None if self._peer_latency else self._latency.constant

    @property
    def settled_s(self) -> float:
        """From when on no rate changes any more; inf where the changes repeat."""
        if self.repeats:
            return math.inf
        return self.changes[-1].time_s if self.changes else 0.0

    def latency(self, sender: int, receiver: int) -> float:
        """Seconds that a message takes besides its transmission, without jitter."""
        if own := self._peer_latency:
            given = [own[index] for index in (sender, receiver) if index in own]
            if given:
                return max(given)
        return self._latency(sender, receiver)

    def without_rates(self) -> Links:
        """The same latency, jitter and loss, where something else sees to the rates."""
        unlimited = np.full(self.num_peers, math.inf)
        pair = PairValues(UNLIMITED, self.num_peers)
        return Links(
            unlimited, unlimited, pair, self._latency, peer_latency=self._peer_latency, jitter_s=self.jitter_s, loss=self.loss
        )

    def without_latency(self) -> Links:
        """The same rates, jitter and loss, where something else sees to the latency."""
        at_once = PairValues(AT_ONCE, self.num_peers)
        return Links(
            self.uplink,
            self.downlink,
            self.pair,
            at_once,
            jitter_s=self.jitter_s,
            loss=self.loss,
            changes=self.changes,
            repeats=self.repeats,
        )

    def timeline(self) -> Iterator[Change]:
        """The changes in order; without end when the trace repeats, its last row being the period."""
        yield from self.changes
        if self.repeats and self.changes:
            period = self.changes[-1].time_s
            for number in itertools.count(1):
                for change in self.changes:
                    yield Change(number * period + change.time_s, change.index, change.uplink, change.downlink)


def build_links(config: LinksConfig, num_peers: int, seed: int) -> Links:
    """The network of a configuration: files are read, and each quantity is drawn by itself, so the seed decides.

    ConfigError: a file that is not there or does not fit `num_peers`, with the line and the remedy.
    """
    uplink = config.uplink.draw(generator(seed, "uplink"), num_peers)
    downlink = config.downlink.draw(generator(seed, "downlink"), num_peers)
    for rates, own in ((uplink, config.peer_uplink), (downlink, config.peer_downlink)):
        for index, rate in own.items():
            rates[index] = rate
    pair = read_matrix(config.pair_matrix, num_peers, BYTES_PER_MBIT, takes_inf=True) if config.pair_matrix else config.pair
    latency = read_matrix(config.latency_matrix, num_peers, 1e-3) if config.latency_matrix else config.latency
    changes = _read_changes(config.trace, num_peers) if config.trace else []
    if config.trace_repeat and changes and changes[-1].time_s < MIN_PERIOD_S:
        raise ConfigError(
            f"{config.trace} ends at {changes[-1].time_s:g} s, so it cannot repeat; give a last row at the time of its period, "
            "of at least 1 ms"
        )
    for change in itertools.takewhile(lambda change: change.time_s == 0, changes):
        uplink[change.index], downlink[change.index] = change.uplink, change.downlink
    return Links(
        uplink,
        downlink,
        PairValues(pair, num_peers, seed, "pair"),
        PairValues(latency, num_peers, seed, "latency"),
        peer_latency=config.peer_latency,
        jitter_s=config.jitter_s,
        loss=config.loss,
        changes=changes,
        repeats=config.trace_repeat,
    )


def check_links(links: Links, topology: Topology) -> None:
    """ConfigError, with the peers, when neighbours cannot reach each other: a rate of 0 between them."""
    rates = links.pair.values
    if not isinstance(rates, np.ndarray) or np.count_nonzero(rates == 0) == np.count_nonzero(rates.diagonal() == 0):
        return
    cut = [(i, j) for i in range(links.num_peers) for j in topology.neighbours(i) if rates[i, j] == 0]
    if cut:
        named = ", ".join(f"p{sender} to p{receiver}" for sender, receiver in cut[:5])
        more = f" and {len(cut) - 5} more" if len(cut) > 5 else ""
        raise ConfigError(
            f"network.pair_matrix gives 0 Mbit/s from {named}{more}, who are neighbours in the topology; give a rate above 0, "
            "or a topology without these links"
        )


def _read_changes(path: str, num_peers: int) -> list[Change]:
    changes = []
    for line, time_s, index, rates in read_trace(path, ("uplink", "downlink"), num_peers):
        if not all(rate > 0 for rate in rates):
            raise ConfigError(
                f"{path} line {line}: uplink = {rates[0]:g}, downlink = {rates[1]:g} must be above 0 Mbit/s; "
                "a peer that is away belongs into churn.trace"
            )
        changes.append(Change(time_s, index, rates[0] * BYTES_PER_MBIT, rates[1] * BYTES_PER_MBIT))
    return changes
