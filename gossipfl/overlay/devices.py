"""The emulated devices: how long each peer trains, in virtual time.

    devices = build_devices(DevicesConfig(speed=Lognormal(1.0, 0.5), straggler_fraction=0.1, slowdown=5), num_peers=100, seed=0)
    devices.train_s(3, round=7, num_steps=20)

Stragglers are peers that are slower than the others by a factor, throughout; `variation` is what differs from round to round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.overlay.links import Constant, Distribution, Lognormal
from gossipfl.randomness import generator

STEP = Constant(0.01)
"""Seconds, where nothing else is said."""
SAME_SPEED = Constant(1.0)


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """Devices of one kind: of a share of the peers, drawn, or of these. What is None is as for all."""

    name: str
    fraction: float = 0.0
    peers: Sequence[int] = ()
    step_time: Distribution | None = None
    speed: Distribution | None = None


@dataclass(frozen=True, slots=True)
class DevicesConfig:
    """What devices are built from."""

    step_time: Distribution = STEP  # seconds of a local step at speed 1, drawn once per peer
    speed: Distribution = SAME_SPEED  # 2 = twice as fast, drawn once per peer
    classes: Sequence[DeviceClass] = ()
    straggler_fraction: float = 0.0  # share of the peers, drawn, rounded up
    stragglers: Sequence[int] = ()  # or these peers
    slowdown: float = 1.0  # a straggler takes this times as long
    variation: float = 0.0  # sigma of a lognormal factor of each round's training time, with median 1
    peer_step_s: Mapping[int, float] = field(default_factory=dict)  # of single peers, in place of what would be drawn
    peer_speed: Mapping[int, float] = field(default_factory=dict)


class Devices:
    """The devices of all peers; what they do not know of is what is trained."""

    def __init__(
        self,
        step_s: np.ndarray,
        variation: float = 0.0,
        seed: int = 0,
        stragglers: Sequence[int] = (),
        classes: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        """`step_s`: f64[N], seconds of a local step; `classes`: who is in each."""
        self.step_s, self.variation, self.stragglers, self.classes = step_s, variation, tuple(stragglers), classes
        self._seed = seed

    def train_s(self, index: int, round: int, num_steps: int) -> float:
        """Seconds that peer `index` takes for the local steps of a round; the same whenever it is asked."""
        seconds = float(self.step_s[index]) * num_steps
        if self.variation:
            rng = generator(self._seed, "variation", f"p{index}", round)
            seconds *= float(Lognormal(1.0, self.variation).draw(rng, ()))
        return seconds


def build_devices(config: DevicesConfig, num_peers: int, seed: int) -> Devices:
    """The devices of a configuration; each quantity is drawn by itself, so the seed decides. ConfigError: too few peers."""
    step_s = config.step_time.draw(generator(seed, "step_time"), num_peers)
    speed = config.speed.draw(generator(seed, "speed"), num_peers)
    all_members = _members(config.classes, num_peers, seed)
    for of_class, members in zip(config.classes, all_members, strict=True):
        for values, drawn_from, purpose in ((step_s, of_class.step_time, "step_time"), (speed, of_class.speed, "speed")):
            if drawn_from is not None:
                values[members] = drawn_from.draw(generator(seed, purpose, of_class.name), num_peers)[members]
    for values, own in ((step_s, config.peer_step_s), (speed, config.peer_speed)):
        for index, value in own.items():
            values[index] = value
    stragglers = sorted(set(config.stragglers)) or _drawn_stragglers(config.straggler_fraction, num_peers, seed)
    with np.errstate(over="ignore"):
        step_s /= speed
        step_s[stragglers] *= config.slowdown
    if not np.isfinite(step_s).all():
        slowest = int(np.argmin(np.isfinite(step_s)))
        raise ConfigError(f"[compute] gives p{slowest} local steps without end; lower step_time or slowdown, or raise speed")
    classes = {of_class.name: sorted(members) for of_class, members in zip(config.classes, all_members, strict=True)}
    return Devices(step_s, config.variation, seed, stragglers, classes)


def _members(classes: Sequence[DeviceClass], num_peers: int, seed: int) -> list[list[int]]:
    """The peers of each class; shares are drawn from those that no class names, and rounded so that their sum is right."""
    named = {index for of_class in classes for index in of_class.peers}
    free = [index for index in generator(seed, "classes").permutation(num_peers).tolist() if index not in named]
    members, share, first = [], 0.0, 0
    for of_class in classes:
        share += of_class.fraction
        end = round(share * num_peers)
        members.append(list(dict.fromkeys(of_class.peers)) or free[first:end])
        if end > len(free) or not members[-1]:
            there_are = f"{num_peers} peers, {len(named)} of them named in other classes" if named else f"{num_peers} peers"
            raise ConfigError(
                f"compute.classes.{of_class.name}.fraction = {of_class.fraction:g} does not fit {there_are}: "
                f"{'that is nobody; raise it' if end == first else 'too few are left; lower it'}, or name peers"
            )
        first = end
    return members


def _drawn_stragglers(fraction: float, num_peers: int, seed: int) -> list[int]:
    """That share of the peers, rounded up; those of a smaller share are among those of a greater one."""
    count = math.ceil(round(fraction * num_peers, 9))  # 0.1 * 30 is a little above 3
    return sorted(generator(seed, "stragglers").permutation(num_peers)[:count].tolist())
