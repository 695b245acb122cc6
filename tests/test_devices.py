"""Emulated devices: how long peers train, who is slow, and what varies from round to round."""

from __future__ import annotations

import numpy as np

from gossipfl.overlay.devices import DevicesConfig, build_devices
from gossipfl.overlay.links import Constant, Lognormal, Uniform


def test_a_round_takes_the_steps_times_the_time_of_one():
    devices = build_devices(DevicesConfig(step_time=Constant(0.5)), num_peers=3, seed=0)
    assert devices.step_s.tolist() == [0.5, 0.5, 0.5]
    assert devices.train_s(1, round=7, num_steps=20) == 10.0
    assert devices.stragglers == ()


def test_twice_the_speed_takes_half_the_time():
    config = DevicesConfig(step_time=Constant(1.0), speed=Constant(2.0), peer_speed={1: 0.5}, peer_step_s={2: 3.0})
    assert build_devices(config, 3, seed=0).step_s.tolist() == [0.5, 2.0, 1.5]


def test_named_stragglers_take_longer_by_the_slowdown():
    devices = build_devices(DevicesConfig(step_time=Constant(1.0), stragglers=[3, 1], slowdown=5), 4, seed=0)
    assert devices.step_s.tolist() == [1, 5, 1, 5] and devices.stragglers == (1, 3)


def test_a_fraction_of_the_peers_rounded_up_are_stragglers():
    def stragglers(fraction: float, num_peers: int) -> tuple[int, ...]:
        config = DevicesConfig(step_time=Constant(1.0), straggler_fraction=fraction, slowdown=5)
        devices = build_devices(config, num_peers, seed=0)
        assert np.flatnonzero(devices.step_s == 5).tolist() == list(devices.stragglers)
        return devices.stragglers

    assert [len(stragglers(0.1, num_peers)) for num_peers in (4, 10, 11, 30)] == [1, 1, 2, 3]
    assert set(stragglers(0.1, 30)) < set(stragglers(0.5, 30))
    assert stragglers(0.0, 30) == ()


def test_the_seed_decides_who_is_slow_and_no_quantity_shifts_another():
    config = DevicesConfig(step_time=Uniform(0.01, 0.02), straggler_fraction=0.3, slowdown=5)
    more = DevicesConfig(step_time=Uniform(0.01, 0.02), speed=Constant(2.0), straggler_fraction=0.3, slowdown=5)
    first, same, other = build_devices(config, 20, 1), build_devices(more, 20, 1), build_devices(config, 20, 2)
    assert first.stragglers == same.stragglers != other.stragglers
    assert first.step_s.tolist() == (2 * same.step_s).tolist() != other.step_s.tolist()


def test_the_speed_of_each_peer_may_be_drawn():
    step_s = build_devices(DevicesConfig(step_time=Constant(1.0), speed=Lognormal(1.0, 0.5)), 50, seed=0).step_s
    assert len(set(step_s.tolist())) == 50 and (step_s < 1).any() and (step_s > 1).any()


def test_variation_differs_by_peer_and_round_but_not_by_when_it_is_asked():
    devices = build_devices(DevicesConfig(step_time=Constant(1.0), variation=0.2), 10, seed=0)
    asked = [(index, round) for round in range(20) for index in range(10)]
    times = {key: devices.train_s(*key, num_steps=1) for key in asked}
    assert len(set(times.values())) == 200
    assert times == {key: devices.train_s(*key, num_steps=1) for key in reversed(asked)}
    spread = np.std(np.log(list(times.values())))
    assert abs(spread - 0.2) < 0.04  # four standard deviations of that of 200 draws, 0.2 / sqrt(400)
    steady = build_devices(DevicesConfig(step_time=Constant(1.0)), 10, seed=0)
    assert {steady.train_s(*key, num_steps=1) for key in asked} == {1.0}
