"""The tables of what is emulated: [network], [compute] and [churn], and what the floors below make of them.

Each quantity is one value for all or a table such as `{kind = "uniform", low = "1Mbit", high = "99Mbit"}`, from which every
peer (or directed pair of peers) draws its own, decided by `seed.protocol`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from gossipfl.overlay.churn import Change, ChurnConfig, build_churn
from gossipfl.overlay.churn import Churn as PeerChurn
from gossipfl.overlay.devices import SAME_SPEED, STEP, Devices, DevicesConfig, build_devices
from gossipfl.overlay.devices import DeviceClass as OverlayClass
from gossipfl.overlay.links import AT_ONCE, MIN_PERIOD_S, UNLIMITED, Links, LinksConfig, build_links
from gossipfl.scenario.problems import Problem
from gossipfl.scenario.values import (
    DelayS,
    Delays,
    DurationS,
    ExistingFile,
    Factor,
    Factors,
    Fraction,
    Rate,
    Rates,
    Share,
    Spread,
    StepTimeS,
    StepTimes,
    Table,
)

MIN_ONLINE, MAX_ONLINE = 0.01, 0.9999
"""Of draws: beyond these, millions of periods in which nothing changes are gone through before one in which somebody moves."""


class PeerLink(Table):
    """[network.peers.p3] The link of one peer, in place of what it shares with the others."""

    uplink: Rate | None = Field(default=None, description="what it sends at most")
    downlink: Rate | None = Field(default=None, description="what it receives at most")
    latency: DelayS | None = Field(default=None, description="of all its links, both ways")


class Network(Table):
    """[network] How fast, how late and how reliably bytes get from one peer to another."""

    uplink: Rates = Field(default=UNLIMITED, description="what a peer sends at most, such as '10Mbit' (per second)")
    downlink: Rates = Field(default=UNLIMITED, description="what a peer receives at most")
    pair: Rates = Field(default=UNLIMITED, description="what goes from one peer to another at most")
    latency: Delays = Field(default=AT_ONCE, description="from one peer to another, such as '50ms'")
    jitter: DelayS = Field(default=0.0, description="up to so much is added to each latency, uniformly")
    loss: Share = Field(default=0.0, description="share of the messages that never arrive, such as 0.02 or '2%'")
    pair_matrix: ExistingFile | None = Field(
        default=None, description="CSV of peers x peers, Mbit/s; 0 = no link, inf = no limit"
    )
    latency_matrix: ExistingFile | None = Field(default=None, description="CSV of peers x peers, ms")
    trace: ExistingFile | None = Field(default=None, description="CSV of time_s,peer,uplink,downlink, Mbit/s")
    trace_after: Literal["hold", "repeat"] | None = Field(
        default=None, description="after its last row: hold its rates, or repeat it; else it lasts as long as the run"
    )
    peers: dict[str, PeerLink] = Field(default_factory=dict, description="links of single peers, by name")

    @model_validator(mode="after")
    def _one_source_each(self) -> Network:
        _exclude(self, "network", "pair", "pair_matrix")
        _exclude(self, "network", "latency", "latency_matrix")
        if self.trace_after and self.trace is None:
            raise ValueError(f"network.trace_after = {self.trace_after!r} comes after no network.trace; give one, or remove it")
        return self

    def build(self, num_peers: int, seed: int) -> Links:
        """The links. ConfigError for a file that does not fit."""
        config = LinksConfig(
            uplink=self.uplink,
            downlink=self.downlink,
            pair=self.pair,
            latency=self.latency,
            jitter_s=self.jitter,
            loss=self.loss,
            pair_matrix=self.pair_matrix,
            latency_matrix=self.latency_matrix,
            trace=self.trace,
            trace_repeat=self.trace_after == "repeat",
            peer_uplink=_given(self.peers, "uplink"),
            peer_downlink=_given(self.peers, "downlink"),
            peer_latency=_given(self.peers, "latency"),
        )
        return build_links(config, num_peers, seed)


class DeviceClass(Table):
    """[compute.classes.phone] Peers that have devices of one kind: a share of them, or those named."""

    fraction: Fraction | None = Field(default=None, gt=0, le=1, description="share of the peers, drawn")
    peers: list[str] | None = Field(default=None, description="or their names")
    step_time: StepTimes | None = Field(default=None, description="of one local step")
    speed: Factors | None = Field(default=None, description="2 = twice as fast")

    @model_validator(mode="after")
    def _who_and_what(self) -> DeviceClass:
        if (self.fraction is None) == (not self.peers):
            raise ValueError("needs either fraction or peers to tell who has such devices; give one of them")
        if self.step_time is None and self.speed is None:
            raise ValueError("needs step_time or speed; give one of them")
        return self


class PeerDevice(Table):
    """[compute.peers.p3] The device of one peer."""

    step_time: StepTimeS | None = Field(default=None, description="of a local step at speed 1")
    speed: Factor | None = Field(default=None, description="2 = twice as fast")


class Stragglers(Table):
    """[compute.stragglers] Peers that are slower than the others throughout: a share of them, or those named."""

    fraction: Share | None = Field(default=None, description="share of the peers, drawn, rounded up")
    peers: list[str] | None = Field(default=None, description="or their names")
    slowdown: float = Field(ge=1, description="they take this times as long")

    @model_validator(mode="after")
    def _who(self) -> Stragglers:
        if (self.fraction is None) == (self.peers is None):
            raise ValueError("compute.stragglers needs either fraction or peers to tell who they are; give one of them")
        return self


class Compute(Table):
    """[compute] How long peers train."""

    step_time: StepTimes = Field(default=STEP, description="of one local step, such as '10ms'")
    speed: Factors = Field(default=SAME_SPEED, description="2 = twice as fast")
    classes: dict[str, DeviceClass] = Field(
        default_factory=dict, description="kinds of devices, such as phone = {fraction = 0.7, step_time = '80ms'}"
    )
    stragglers: Stragglers | None = Field(default=None, description="such as {fraction = 0.1, slowdown = 5}")
    variation: Spread = Field(default=0.0, description="sigma of a lognormal factor of each round's training time")
    peers: dict[str, PeerDevice] = Field(default_factory=dict, description="devices of single peers, by name")

    @model_validator(mode="after")
    def _one_class_each(self) -> Compute:
        owners: dict[str, str] = {}
        for name, of_class in self.classes.items():
            for peer in of_class.peers or ():
                if (other := owners.setdefault(peer, name)) != name:
                    raise ValueError(f"compute.classes.{name} and {other} both name {peer}; leave it in one of them")
        if (total := math.fsum(of_class.fraction or 0.0 for of_class in self.classes.values())) > 1 + 1e-9:
            raise ValueError(f"compute.classes have fractions that add up to {total:g}; lower them to 1 at most")
        return self

    def build(self, num_peers: int, seed: int) -> Devices:
        """The devices."""
        stragglers = self.stragglers
        config = DevicesConfig(
            step_time=self.step_time,
            speed=self.speed,
            classes=[_class(name, of_class) for name, of_class in self.classes.items()],
            straggler_fraction=(stragglers.fraction if stragglers else None) or 0.0,
            stragglers=[_index(name) for name in (stragglers.peers if stragglers else None) or ()],
            slowdown=stragglers.slowdown if stragglers else 1.0,
            variation=self.variation,
            peer_step_s=_given(self.peers, "step_time"),
            peer_speed=_given(self.peers, "speed"),
        )
        return build_devices(config, num_peers, seed)


class PlannedChange(Table):
    """{peer = "p3", at = "20s"}"""

    peer: str = Field(description="its name")
    at: DurationS = Field(description="when, of the run's clock")


class Churn(Table):
    """[churn] Peers that come and go; times are of the run's clock."""

    online: Fraction = Field(default=1.0, gt=0, le=1, description="chance to be there in a period; in the first, all are")
    period: DurationS | None = Field(default=None, description="how long that lasts before it is drawn again")
    trace: ExistingFile | None = Field(default=None, description="CSV of time_s,peer,online (0 or 1), instead of `online`")
    kill: list[PlannedChange] = Field(default_factory=list, description="who vanishes when")
    rejoin: list[PlannedChange] = Field(default_factory=list, description="who of them is back when")
    join: list[PlannedChange] = Field(default_factory=list, description="who comes late, not being there before")

    @model_validator(mode="after")
    def _makes_sense(self) -> Churn:
        if self.online < 1 and self.period is None:
            raise ValueError(f"churn.online = {self.online} needs churn.period, the time between draws, such as '30s'")
        if self.online == 1 and self.period is not None:
            raise ValueError(f"churn.period = {self.period} needs churn.online, the chance to be there, such as 0.9")
        if self.online < 1 and not MIN_ONLINE <= self.online <= MAX_ONLINE:
            raise ValueError(
                f"churn.online = {self.online} must be from {MIN_ONLINE} to {MAX_ONLINE}; "
                "give such a chance, or leave it and churn.period out"
            )
        if self.period is not None and self.period < MIN_PERIOD_S:
            raise ValueError(
                f"churn.period = {self.period} must be at least 1 ms; give a longer time between draws, such as '30s'"
            )
        if self.online < 1:
            _exclude(self, "churn", "online", "trace")
        at_once: dict[tuple[str, float], str] = {}
        for at, key, peer in self.planned:
            if other := at_once.get((peer, at)):
                raise ValueError(f"churn.{key} of {peer} at {at:g} s is at the same time as its {other}; set one of them later")
            at_once[peer, at] = key
        last: dict[str, tuple[float, str | None]] = {}
        for at, key, peer in self.planned:
            last_at, last_key = last.get(peer, (0.0, None))
            if last_key not in _ALLOWED_AFTER[key]:
                past = f"its {last_key} at {last_at:g} s" if last_key else "being there from the start"
                raise ValueError(f"churn.{key} of {peer} at {at:g} s comes after {past}; {_REMEDIES[key]}")
            last[peer] = at, key
        return self

    @property
    def planned(self) -> list[tuple[float, str, str]]:
        """(seconds, "kill", "rejoin" or "join", peer), sorted."""
        return sorted((event.at, key, event.peer) for key in _ALLOWED_AFTER for event in getattr(self, key))

    def build(self, num_peers: int, seed: int) -> PeerChurn:
        """The churn. ConfigError for a trace that does not fit."""
        planned = [Change(at, _index(peer), online=key != "kill") for at, key, peer in self.planned]
        period_s = math.inf if self.period is None else self.period
        return build_churn(ChurnConfig(planned, self.online, period_s, self.trace), num_peers, seed)


_ALLOWED_AFTER = {"kill": (None, "rejoin", "join"), "rejoin": ("kill",), "join": (None,)}
_REMEDIES = {
    "kill": "kill it once, or let it rejoin between",
    "rejoin": "kill it before, or use join for a peer that comes late",
    "join": "use rejoin for a peer that comes back",
}


def unknown_peers(tables: Mapping[str, Table], num_peers: int) -> Iterator[Problem]:
    """A problem for each name in `tables` ("network", "compute", "churn", where they are right) that no peer has."""
    for key, name in _named_peers(tables):
        if not re.fullmatch(r"p(0|[1-9]\d{0,15})", name) or _index(name) >= num_peers:
            there_are = f"peers are p0 to p{num_peers - 1}" if num_peers > 1 else "the only peer is p0"
            yield Problem(key, f"{key}: there is no peer {name!r}; {there_are}")


def _named_peers(tables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every name of a peer, with the key that it stands at."""
    for table in ("network", "compute"):
        yield from ((f"{table}.peers.{name}", name) for name in tables[table].peers)
    stragglers = tables["compute"].stragglers
    classes = tables["compute"].classes
    yield from ((f"compute.classes.{key}", name) for key, of_class in classes.items() for name in of_class.peers or ())
    yield from (("compute.stragglers", name) for name in (stragglers.peers if stragglers else None) or ())
    yield from ((f"churn.{key}", peer) for _, key, peer in tables["churn"].planned)


def _exclude(table: Table, name: str, one: str, other: str) -> None:
    if getattr(table, one) != type(table).model_fields[one].default and getattr(table, other) is not None:
        raise ValueError(f"{name}.{one} and {name}.{other} exclude each other; remove one")


def _given(peers: Mapping[str, Table], key: str) -> dict[int, float]:
    """The values of `key` that single peers have, by their index."""
    values = {_index(name): getattr(table, key) for name, table in peers.items()}
    return {index: value for index, value in values.items() if value is not None}


def _class(name: str, of_class: DeviceClass) -> OverlayClass:
    peers = [_index(peer) for peer in of_class.peers or ()]
    return OverlayClass(name, of_class.fraction or 0.0, peers, of_class.step_time, of_class.speed)


def _index(name: str) -> int:
    return int(name[1:])
