"""Emulated devices: how long peers train, who is slow, and what varies from round to round."""

from __future__ import annotations

import numpy as np
import pytest

from gossipfl.errors import ConfigError
from gossipfl.overlay.devices import DeviceClass, DevicesConfig, build_devices
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


def test_who_is_named_twice_is_there_once():
    twice = DeviceClass("phone", peers=[2, 2], speed=Constant(2.0))
    devices = build_devices(DevicesConfig(Constant(1.0), classes=[twice], stragglers=[1, 1], slowdown=5), 4, seed=0)
    assert (devices.stragglers, devices.classes) == ((1,), {"phone": [2]}) and devices.step_s.tolist() == [1, 5, 0.5, 1]


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


PHONE, LAPTOP = DeviceClass("phone", 0.7, step_time=Constant(8.0)), DeviceClass("laptop", 0.3, step_time=Constant(2.0))


@pytest.mark.parametrize(("num_peers", "phones"), [(1, 1), (2, 1), (8, 6), (10, 7), (99, 69), (1000, 700)])
def test_classes_of_devices_have_their_shares_of_the_peers(num_peers, phones):
    step_s = build_devices(DevicesConfig(classes=[PHONE], step_time=Constant(2.0)), num_peers, seed=0).step_s
    assert sorted(step_s.tolist()) == [2.0] * (num_peers - phones) + [8.0] * phones


def test_who_is_in_a_class_is_drawn_and_everybody_is_in_one_where_the_shares_add_up():
    first, same, other = (build_devices(DevicesConfig(classes=[PHONE, LAPTOP]), 10, seed).step_s.tolist() for seed in (0, 0, 1))
    assert first == same != other
    assert sorted(first) == sorted(other) == [2.0] * 3 + [8.0] * 7


def test_named_peers_are_in_their_class_alone_and_a_single_peer_and_a_straggler_stay_what_they_are():
    server = DeviceClass("server", peers=[0, 3], speed=Constant(10.0))
    config = DevicesConfig(Constant(1.0), classes=[PHONE, server], stragglers=[3], slowdown=5, peer_step_s={0: 3.0})
    step_s = build_devices(config, 10, seed=0).step_s.tolist()
    assert (step_s[0], step_s[3]) == (0.3, 0.5)
    assert sorted(step_s) == [0.3, 0.5, 1.0] + [8.0] * 7


def test_each_of_a_class_may_draw_its_own_and_the_others_keep_theirs():
    phones = DeviceClass("phone", 0.5, step_time=Uniform(10.0, 20.0))
    plain, classed = (
        build_devices(DevicesConfig(Uniform(1.0, 2.0), classes=classes), 40, seed=0).step_s for classes in ((), (phones,))
    )
    are_phones = classed >= 10
    assert are_phones.sum() == 20 == len(set(classed[are_phones].tolist()))
    assert classed[~are_phones].tolist() == plain[~are_phones].tolist()


def test_a_class_that_nobody_is_in_or_that_too_few_are_left_for_is_refused():
    with pytest.raises(
        ConfigError, match=r"phone.fraction = 0.01 does not fit 8 peers: that is nobody; raise it, or name peers"
    ):
        build_devices(DevicesConfig(classes=[DeviceClass("phone", 0.01, speed=Constant(0.1))]), 8, seed=0)
    classes = [DeviceClass("server", peers=[0, 1], speed=Constant(9.0)), DeviceClass("phone", 1.0, speed=Constant(0.1))]
    with pytest.raises(ConfigError, match=r"8 peers, 2 of them named in other classes: too few are left; lower it"):
        build_devices(DevicesConfig(classes=classes), 8, seed=0)


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
