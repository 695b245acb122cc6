import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossipfl.errors import ConfigError, PlanError
from gossipfl.inference.execution.activations import encode_missing, num_bytes
from gossipfl.inference.planning.catalogue import Catalogue, Overhead
from gossipfl.inference.planning.cuts import choose_plan, fetch_seconds
from gossipfl.inference.planning.offers import Ask, ask_from_json, offer_bytes, to_json
from gossipfl.inference.planning.profile import (
    ON_DEVICE,
    ON_SERVER,
    DeviceProfile,
    FallbackRates,
    LayerProfile,
    ModelProfile,
    Stage,
    check_device,
)
from gossipfl.inference.planning.sizes import HEADER_BYTES, RANGE_BYTES, activation_bytes, missing_bytes, weight_bytes
from gossipfl.protocol import wire
from gossipfl.protocol.messages import Activation, Continuation, Data, Pull, Result
from gossipfl.segments.codecs import codec

quick = settings(deadline=None, max_examples=100)
LEVELS = (0.005, 0.01, 0.05)


def layer(name, start, channels, group, live, bias=True):
    stop = start + channels * group
    return LayerProfile(
        name, "conv2d", (start, stop), (stop, stop + channels) if bias else None, channels, 100 * channels * group, live
    )


SMALL = ModelProfile(
    (
        layer("a", 0, 4, 9, ((4, 5, 5),)),  # 36 weights, 4 biases, 100 live values
        layer("b", 40, 2, 36, ((2, 3, 3), (4, 5, 5)), bias=False),  # 72 weights, 118 live values
        layer("c", 112, 3, 18, ((3,),)),  # 54 weights, 3 biases
    ),
    input_shape=(1, 6, 6),
    num_classes=3,
)
EXAMPLE = Catalogue(
    SMALL,
    version=7,
    levels={
        0.01: {0: ((), 8), 1: ((4,), 6), 2: ((4, 5), 6), 3: ((5, 6, 7), 0)},
        0.05: {0: ((), 4), 1: ((2,), 3), 2: ((2, 3), 3), 3: ((3, 3, 4), 0)},
    },
    device_s={"fp32": (0.0, 1.0, 2.0, 4.0), "int8": (0.0, 2.0, 3.0, 3.5)},
    server_s={"fp32": (3.0, 2.0, 1.0, 0.0)},
)


@st.composite
def catalogues(draw):
    """A model of up to six layers with bits at up to three levels, not all cuts at each, and times of up to two engines."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers, start = [], 0
    for index in range(rng.integers(1, 7)):
        live = tuple((int(rng.integers(1, 9)), int(rng.integers(1, 30))) for _ in range(rng.integers(1, 3)))
        layers.append(layer(f"l{index}", start, int(rng.integers(1, 9)), int(rng.integers(1, 40)), live, rng.random() < 0.7))
        start = (layers[-1].bias or layers[-1].weight)[1]
    last = len(layers)
    levels = {}
    for level in LEVELS[: rng.integers(1, 4)]:
        cuts = [cut for cut in range(last + 1) if rng.random() < 0.8] or [last]
        levels[level] = {
            cut: (tuple(rng.integers(2, 17, cut).tolist()), int(rng.choice([4, 8, 16, 32])) if cut < last else 0)
            for cut in cuts
        }
    times = {}
    for side, none in (("device_s", 0), ("server_s", last)):
        seconds = {"fp32": rng.random(last + 1).tolist()}
        if rng.random() < 0.5:
            seconds["int8"] = [value if rng.random() < 0.7 else None for value in rng.random(last + 1)]
        for values in seconds.values():
            values[none] = 0.0
        times[side] = {engine: tuple(values) for engine, values in seconds.items()}
    overheads = tuple(Overhead(*rng.random(3).tolist()) for _ in range(3))
    sample_bytes = int(rng.integers(0, 2000))
    return Catalogue(
        ModelProfile(tuple(layers), (1, 5, 7), 10), 3, levels, **times, overheads=overheads, sample_bytes=sample_bytes
    )


devices = st.builds(
    DeviceProfile,
    speed=st.floats(0.01, 10),
    memory_bytes=st.integers(300, 10_000),
    uplink=st.one_of(st.just(math.inf), st.floats(100, 1e6)),
    downlink=st.one_of(st.just(math.inf), st.floats(100, 1e6)),
    latency_s=st.floats(0, 0.3),
    compute_w=st.floats(0, 5),
    transmit_w=st.floats(0, 5),
    time_weight=st.floats(0.1, 1),
    energy_weight=st.floats(0, 1),
    price_weight=st.floats(0, 1),
    requests=st.integers(1, 1000),
)


def cost_by_hand(catalogue, device, level, cut, cached):
    """Cost of one cut with the best engine that fits, from the definitions; None where it cannot be."""
    profile = catalogue.profile
    if cut not in catalogue.levels[level]:
        return None
    weights, activations = catalogue.levels[level][cut]
    pulled, up = [], 0
    for index, one in enumerate(profile.layers[:cut]):
        n, held = one.weight[1] - one.weight[0], cached[index]
        if held < weights[index]:
            pulled.append(codec(f"planes:{held}-{weights[index]}:{n // one.channels}").num_bytes(n))
        if held == 0 and one.bias:
            pulled.append(codec("float32").num_bytes(one.bias[1] - one.bias[0]))
    # none of these pieces takes more than one message, nor all of them more ranges than one Pull has
    codecs = {(bits, one.group) for bits, one in zip(weights, profile.layers, strict=False)} | {"float32"}
    down = sum(pulled) + HEADER_BYTES * len(pulled)
    asked = HEADER_BYTES * len(codecs) + RANGE_BYTES * len(pulled)
    is_cut = cut < len(profile.layers)
    if is_cut:
        up = num_bytes(profile.layers[cut - 1].live if cut else [profile.input_shape], 1, activations)
    overhead = catalogue.overheads[1 if 0 < cut < len(profile.layers) else 2 if cut else 0]
    server_s = min(seconds[cut] for seconds in catalogue.server_s.values() if seconds[cut] is not None) + overhead.server_s
    costs = []
    for engine, seconds in catalogue.device_s.items():
        live = [math.prod(profile.input_shape), *(sum(map(math.prod, one.live)) for one in profile.layers[:cut])]
        memory = 8 * max(live)
        for one in profile.layers[:cut]:
            memory += (one.weight[1] - one.weight[0]) * {"fp32": 4, "int8": 1}[engine]
            memory += 4 * (one.bias[1] - one.bias[0]) if one.bias else 0
        if seconds[cut] is None or memory > device.memory_bytes:
            continue
        device_s = (seconds[cut] + overhead.device_s) / device.speed
        uplink_s = (up + HEADER_BYTES) / device.uplink if is_cut else 0.0
        total_s = device_s + server_s + uplink_s + overhead.rest_s
        if is_cut:
            total_s += 2 * device.latency_s + (4 * profile.num_classes + HEADER_BYTES) / device.downlink
        if pulled:
            fetch_s = asked / device.uplink + 2 * device.latency_s + down / device.downlink + catalogue.overheads[0].rest_s
            total_s += fetch_s / device.requests
        offered = offer_bytes(profile, weights) + (catalogue.sample_bytes if cut and engine != "fp32" else 0)
        total_s += (offered + HEADER_BYTES) / device.downlink / device.requests
        energy = device.compute_w * device_s + device.transmit_w * uplink_s
        costs.append(device.time_weight * total_s + device.energy_weight * energy + device.price_weight * server_s)
    return min(costs, default=None)


@given(catalogue=catalogues(), device=devices, loss=st.floats(0, 0.1), data=st.data())
@quick
def test_the_plan_is_the_cheapest_of_all_cuts(catalogue, device, loss, data):
    num_layers = len(catalogue.profile.layers)
    cached = data.draw(st.lists(st.integers(0, 16), min_size=num_layers, max_size=num_layers))
    allowed = [level for level in catalogue.levels if level <= loss]
    costs = {}
    if allowed:
        found = [cost_by_hand(catalogue, device, max(allowed), cut, cached) for cut in range(num_layers + 1)]
        costs = {cut: cost for cut, cost in enumerate(found) if cost is not None}
    if not costs:
        with pytest.raises(PlanError):
            choose_plan(catalogue, device, loss, cached)
        return
    plan, rows = choose_plan(catalogue, device, loss, cached)
    assert plan.cut in costs
    assert plan.prediction.cost == pytest.approx(min(costs.values()))
    assert costs[plan.cut] == pytest.approx(min(costs.values()))
    assert plan.prediction.memory_bytes <= device.memory_bytes
    assert plan.prediction.accuracy_loss == max(allowed) <= loss
    assert [row.cut for row in rows] == list(range(num_layers + 1))
    for row in rows:
        assert (row.obstacle is None) == (row.cut in costs)
        if row.obstacle is None:
            assert row.prediction.cost == pytest.approx(costs[row.cut])


# Cut 1 at 0.01: 5 bytes a plane, 4 planes, 4 scales and 4 biases down; 2 float32 and 13 bytes for each of 6 planes up. Two
# Pulls (one for each codec) of one range each, two Data that answer them; one Activation and one Result. Each has a header.
def test_a_request_costs_what_its_parts_cost():
    device = DeviceProfile(
        speed=0.5,
        uplink=86.0,
        downlink=52.0,
        latency_s=0.25,
        compute_w=3.0,
        transmit_w=5.0,
        time_weight=1.0,
        energy_weight=0.1,
        price_weight=0.01,
        requests=4,
    )
    catalogue = replace(EXAMPLE, overheads=(Overhead(0.0, 0.0, 2.0), Overhead(0.5, 0.25, 0.125), Overhead()))
    row = choose_plan(catalogue, device, 0.01)[1][1]
    expected = row.prediction
    assert (expected.weight_bytes, expected.activation_bytes) == (4 * 5 + 16 + 16, 8 + 6 * 13)
    assert expected.device_s == (1.0 + 0.5) / 0.5
    assert expected.server_s == 2.0 + 0.25
    header, range_ = HEADER_BYTES, RANGE_BYTES
    fetch_s = (2 * header + 2 * range_) / 86 + (52 + 2 * header) / 52 + 0.5 + 2.0
    assert fetch_seconds(catalogue, device, (4,)) == pytest.approx(fetch_s)
    offer_s = (expected.offer_bytes + header) / 52
    assert expected.transfer_s == pytest.approx((offer_s + fetch_s) / 4 + (86 + header) / 86 + (12 + header) / 52 + 0.5)
    assert expected.latency_s == pytest.approx(3 + 2.25 + 0.125 + expected.transfer_s)
    assert (row.offer_s, row.pull_s) == pytest.approx((offer_s, fetch_s))
    assert row.request_s == pytest.approx(expected.latency_s - (offer_s + fetch_s) / 4), "the weights are there"
    assert expected.energy_j == pytest.approx(3 * 3 + 5 * (86 + header) / 86)
    assert expected.cost == pytest.approx(expected.latency_s + 0.1 * expected.energy_j + 0.01 * 2.25)
    assert expected.memory_bytes == 4 * 36 + 4 * 4 + 8 * 100
    assert (row.weight_bits, row.activation_bits, row.device_engine, row.obstacle) == ((4,), 6, "fp32", None)


def test_a_plan_says_who_runs_what_and_how_it_is_pulled():
    near = DeviceProfile(price_weight=10.0, uplink=1e6, downlink=1e6)
    everything, _ = choose_plan(EXAMPLE, near, 0.01)
    assert everything.stages == (Stage(ON_DEVICE, 0, 3, ("planes:0-5:9", "planes:0-6:36", "planes:0-7:18"), "int8"),)
    assert (everything.version, everything.cut, everything.weight_bits, everything.activation_bits) == (7, 3, (5, 6, 7), 0)
    nothing, _ = choose_plan(EXAMPLE, replace(near, price_weight=0.0, speed=0.1), 0.01)
    assert nothing.stages == (Stage(ON_SERVER, 0, 3, ("float32",) * 3, "fp32"),)
    assert (nothing.cut, nothing.weight_bits, nothing.activation_bits) == (0, (), 8)
    half = replace(near, price_weight=0.0, speed=1.0, uplink=1e3)
    cut, _ = choose_plan(replace(EXAMPLE, server_s={"fp32": (9.0, 0.5, 0.4, 0.0)}), half, 0.01)
    assert cut.stages == (
        Stage(ON_DEVICE, 0, 1, ("planes:0-4:9",), "fp32"),
        Stage(ON_SERVER, 1, 3, ("float32",) * 2, "fp32"),
    )


# Cut 1 at 0.01: 10 planes of 13 bytes are missing, and a byte marks the sample; afresh 36 values go up in float32.
def test_a_plan_says_what_falling_back_costs_and_names_the_cheaper_way():
    device = DeviceProfile(
        speed=0.5, uplink=50.0, downlink=46.0, latency_s=0.25, transmit_w=5.0, energy_weight=0.1, price_weight=0.01
    )
    overheads = Overhead(0.0, 0.0, 2.0), Overhead(0.5, 0.25, 0.125), Overhead()
    catalogue = replace(EXAMPLE, levels={0.01: {1: ((4,), 6)}}, overheads=overheads)
    plan, _ = choose_plan(catalogue, device, 0.01)
    answer_s = (12 + HEADER_BYTES) / 46 + 0.5
    afresh_s, afresh_up_s = 3.0 + 2.0 + answer_s, (144 + HEADER_BYTES) / 50
    continued_s, continued_up_s = 1.0 + 2.25 + 0.125 + answer_s, (131 + HEADER_BYTES) / 50
    assert (plan.fallback, plan.afresh.bytes_up, plan.continued.bytes_up) == ("continued", 144, 131)
    assert plan.afresh.latency_s == pytest.approx(afresh_s + afresh_up_s)
    assert plan.continued.latency_s == pytest.approx(continued_s + continued_up_s)
    assert plan.afresh.cost == pytest.approx(plan.afresh.latency_s + 0.1 * 5 * afresh_up_s + 0.01 * 3.0)
    energy_j = 1.0 + 5 * continued_up_s
    assert plan.continued.cost == pytest.approx(plan.continued.latency_s + 0.1 * energy_j + 0.01 * 2.25)


@pytest.mark.parametrize(
    ("cut", "bits", "is_afresh"),
    [(3, ((4, 5, 6), 0), True), (1, ((4,), 16), True), (1, ((4,), 32), True), (0, ((), 32), False)],
)
def test_where_nothing_is_left_to_send_a_fallback_starts_afresh(cut, bits, is_afresh):
    plan, _ = choose_plan(replace(EXAMPLE, levels={0.01: {cut: bits}}), DeviceProfile(), 0.01)
    assert (plan.fallback, plan.continued, plan.afresh is not None) == ("full", None, is_afresh)


def test_where_the_values_at_the_cut_are_more_than_the_input_a_slow_link_starts_afresh():
    plans = [
        choose_plan(replace(EXAMPLE, levels={0.01: {2: ((4, 5), 6)}}), DeviceProfile(uplink=uplink), 0.01)[0]
        for uplink in (1e3, 1.0)
    ]
    assert [plan.fallback for plan in plans] == ["continued", "full"] and plans[1].continued is None
    inputs, _ = choose_plan(replace(EXAMPLE, levels={0.01: {0: ((), 4)}}), DeviceProfile(uplink=1.0), 0.01)
    assert (inputs.fallback, inputs.continued.bytes_up, inputs.afresh.bytes_up) == ("continued", 12 * 5 + 1, 4 * 36)


# --- the price of falling back ----------------------------------------------------------------------------------------


def rated(catalogue, rng):
    """With shares that fall back, of some rows or of all; more bits than 31 are the full model's."""
    rates = {
        level: {cut: FallbackRates(rng.choice([0.0, rng.random()]), rng.choice([None, rng.random()])) for cut in cuts}
        for level, cuts in catalogue.levels.items()
    }
    return replace(catalogue, fallback_rates=rates)


@given(catalogue=catalogues(), device=devices, seed=st.integers(0, 2**32 - 1))
@quick
def test_with_its_fallbacks_the_plan_is_the_cheapest_of_all_cuts_and_levels(catalogue, device, seed):
    """Costs alone are those of a catalogue without rates, one cut at a time."""
    catalogue = rated(catalogue, np.random.default_rng(seed))
    device = replace(device, memory_bytes=2**30)
    best = {}
    for cut in range(len(catalogue.profile.layers) + 1):
        for level in sorted(catalogue.levels, reverse=True):
            if cut not in catalogue.levels[level]:
                continue
            only = replace(catalogue, levels={level: {cut: catalogue.levels[level][cut]}}, fallback_rates={})
            plan, _ = choose_plan(only, device, level)
            rates, cost, rate = catalogue.fallback_rates[level][cut], plan.prediction.cost, 0.0
            if plan.afresh is not None:
                ways = [(rates.full * plan.afresh.cost, rates.full)]
                if plan.continued is not None and rates.continued is not None:
                    ways.append((rates.continued * plan.continued.cost, rates.continued))
                added, rate = min(ways)
                cost += added
            best[cut] = min(best.get(cut, (math.inf, 0.0)), (cost, rate))
            if not best[cut][1]:
                break  # what does not fall back needs no more bits
    plan, rows = choose_plan(catalogue, device, 1.0)
    for row in rows:
        assert row.cost == (pytest.approx(best[row.cut][0]) if row.cut in best else math.inf)
    assert rows[plan.cut].cost == pytest.approx(min(cost for cost, _ in best.values()))


# As above, cut 1: 86 bytes go up, and 131 more where an answer is continued, 144 where the full model starts afresh.
@pytest.mark.parametrize(("rates", "way"), [(FallbackRates(0.25, 0.25), "continued"), (FallbackRates(0.25), "full")])
def test_a_share_of_a_fallback_is_in_every_term(rates, way):
    device = DeviceProfile(
        speed=0.5, uplink=50.0, downlink=46.0, latency_s=0.25, transmit_w=5.0, energy_weight=0.1, price_weight=0.01
    )
    bare = replace(EXAMPLE, levels={0.01: {1: ((4,), 6)}})
    known, _ = choose_plan(bare, device, 0.01)
    catalogue = replace(bare, fallback_rates={0.01: {1: rates}})
    plan, rows = choose_plan(catalogue, device, 0.01)
    reduced, each = plan.prediction, known.continued if way == "continued" else known.afresh
    assert (plan.fallback, plan.fallback_rate, plan.fallback_cost) == (way, 0.25, each)
    assert reduced == known.prediction and (plan.continued is not None) == (way == "continued")
    mean = rows[1].expected
    assert mean.latency_s == reduced.latency_s + 0.25 * each.latency_s
    assert mean.server_s == reduced.server_s + 0.25 * (2.0 if way == "continued" else 3.0)
    assert mean.energy_j == reduced.energy_j + 0.25 * each.energy_j
    assert mean.bytes_up == 86 + 0.25 * (131 if way == "continued" else 144)
    assert mean.cost == pytest.approx(mean.latency_s + 0.1 * mean.energy_j + 0.01 * mean.server_s) == rows[1].cost


def test_where_many_fall_back_another_cut_or_more_bits_are_the_cheaper():
    device = DeviceProfile(uplink=100.0, downlink=1e9, requests=10**9, latency_s=0.1)
    alone = replace(EXAMPLE, levels={level: {cut: EXAMPLE.levels[level][cut] for cut in (0, 3)} for level in EXAMPLE.levels})
    sure = {level: {cut: FallbackRates(0.0) for cut in (0, 3)} for level in EXAMPLE.levels}
    found = []
    for rate, strict in ((0.0, 0.0), (0.5, 0.0), (0.9, 0.9)):
        rates = {0.01: sure[0.01] | {3: FallbackRates(strict)}, 0.05: sure[0.05] | {3: FallbackRates(rate)}}
        plan, _ = choose_plan(replace(alone, fallback_rates=rates), device, 0.05)
        found.append((plan.cut, plan.prediction.accuracy_loss))
    assert found == [(3, 0.05), (3, 0.01), (0, 0.05)]


def test_inputs_as_they_are_never_fall_back_and_go_up_where_others_do():
    levels = {0.0: {0: ((), 32)}, 0.05: {0: ((), 4)}}
    for rate, bits in ((0.1, 4), (0.95, 32)):
        rates = {0.0: {0: FallbackRates(0.0)}, 0.05: {0: FallbackRates(rate)}}
        plan, rows = choose_plan(replace(EXAMPLE, levels=levels, fallback_rates=rates), DeviceProfile(uplink=100.0), 0.05)
        assert plan.activation_bits == bits and rows[0].expected.cost == rows[0].cost
    assert (plan.fallback_rate, plan.fallback_cost, rows[0].expected.bytes_up) == (0.0, None, 4 * 36)


def test_where_nobody_knows_how_many_fall_back_the_plan_says_so_and_is_chosen_as_if_none_did():
    catalogue = replace(EXAMPLE, fallback_rates={0.05: {cut: FallbackRates(1.0) for cut in (0, 1, 2)}})
    plan, rows = choose_plan(catalogue, DeviceProfile(price_weight=100.0), 0.05)
    assert (plan.cut, plan.fallback_rate, plan.prediction.accuracy_loss) == (3, None, 0.05)
    assert rows[3].expected is None and rows[3].cost == rows[3].prediction.cost
    unknown, rows = choose_plan(EXAMPLE, DeviceProfile(price_weight=100.0), 0.05)
    assert unknown == plan and all(row.fallback_rate is row.expected is None for row in rows)


class Counted(dict):
    """Bits by cut, which count how often they are looked at."""

    looks = 0

    def __getitem__(self, cut):
        Counted.looks += 1
        return super().__getitem__(cut)


@pytest.mark.parametrize("num_layers", [10, 20, 40])
def test_every_cut_is_priced_once_for_each_level_that_is_allowed(num_layers):
    layers = tuple(layer(f"l{index}", 40 * index, 4, 9, ((4, 5, 5),)) for index in range(num_layers))
    levels = {
        level: Counted({cut: ((bits,) * cut, bits if cut < num_layers else 0) for cut in range(num_layers + 1)})
        for level, bits in zip(LEVELS, (8, 6, 4), strict=True)
    }
    times = (0.0,) + (1.0,) * num_layers
    catalogue = Catalogue(ModelProfile(layers, (1, 5, 5), 10), 1, levels, {"fp32": times}, {"fp32": times[::-1]})
    for rate, num_levels in ((None, 1), (0.0, 1), (0.5, 3)):
        known = {} if rate is None else {level: dict.fromkeys(cuts, FallbackRates(rate)) for level, cuts in levels.items()}
        catalogue = replace(catalogue, fallback_rates=known)
        Counted.looks = 0
        choose_plan(catalogue, DeviceProfile(), 1.0)
        assert Counted.looks == num_levels * (num_layers + 1)


@pytest.mark.parametrize("bits", [2, 7, 15])
def test_what_is_continued_is_counted_as_it_is_sent(bits):
    for cut, shapes in ((0, [(1, 6, 6)]), (1, [(4, 5, 5)]), (2, [(2, 3, 3), (4, 5, 5)])):
        live = [np.zeros((1, *shape), np.float32) for shape in shapes]
        assert missing_bytes(SMALL, cut, bits) == len(encode_missing(live, bits, [0]))


def test_a_slow_device_a_slow_link_and_a_dear_server_move_the_cut():
    middling = DeviceProfile(speed=1.0, uplink=1e3, downlink=1e3, requests=100)
    cuts = [choose_plan(EXAMPLE, replace(middling, speed=speed), 0.01)[0].cut for speed in (0.01, 100.0)]
    assert cuts == [0, 3]
    assert choose_plan(EXAMPLE, replace(middling, uplink=1.0), 0.01)[0].cut == 3
    assert choose_plan(EXAMPLE, replace(middling, downlink=0.1, requests=1), 0.01)[0].cut == 0
    assert choose_plan(EXAMPLE, replace(middling, price_weight=100.0), 0.01)[0].cut == 3


def test_headers_are_those_of_the_messages_on_the_wire():
    device, server, request = "device-0123456789abcdef", "quickstart@0", 2**60

    def framed(message) -> int:
        """With ZeroMQ's flags and length of two frames, each short."""
        return len(wire.encode(0, device, server, message)) + 2 * 2

    ranges = tuple((100_000 + at, 100_144 + at) for at in range(20))
    for message in (
        Activation(request, 60, 3, 4, 1, 0, 9000, payload=b"x"),
        Continuation(request, request, 1, 0, 9000, payload=b"x"),
        Result(request, 60, 0.00123, 0, 40, payload=b"x"),
        Data(request, 60, 60, 0, ranges[0], 0, 9000, 9000, b"x"),
        Pull(request, 60, 60, ranges, "planes:0-4:144", 5.0),
    ):
        expected = HEADER_BYTES + (RANGE_BYTES * len(ranges) if isinstance(message, Pull) else 0)
        assert abs(framed(message) - expected) <= 10


def test_a_piece_of_many_messages_has_as_many_headers():
    large = replace(SMALL, layers=(replace(SMALL.layers[0], weight=(0, 2**20), bias=None, channels=1),))
    size, levels = weight_bytes(large, (4,)), {0.01: {1: ((4,), 0)}}
    assert size == 2 * wire.MAX_PAYLOAD_BYTES + 4
    catalogue = Catalogue(large, 1, levels, {"fp32": (0.0, 1.0)}, {"fp32": (1.0, 0.0)})
    assert fetch_seconds(catalogue, DeviceProfile(downlink=1.0), (4,)) == size + 3 * HEADER_BYTES


def test_planes_that_are_there_already_are_not_fetched_again():
    fetched = [weight_bytes(SMALL, (4, 5), cached) for cached in ((), (0, 5), (2, 5), (4, 16), (6, 3))]
    first, second = 4 * 5 + 16 + 16, 5 * 9 + 8
    assert fetched == [first + second, first, 2 * 5, 0, 2 * 9]
    slow = DeviceProfile(downlink=1.0)
    rows = {cached: choose_plan(EXAMPLE, slow, 0.01, cached)[1] for cached in ((), (5, 6, 7))}
    offer = offer_bytes(SMALL, (5, 6, 7)) + HEADER_BYTES
    assert rows[()][3].prediction.transfer_s == 4 * (4 + 2 + 3) + 28 + 5 * 5 + 6 * 9 + 7 * 7 + 5 * HEADER_BYTES + offer
    assert rows[(5, 6, 7)][3].prediction.transfer_s == offer
    often = replace(slow, requests=12)
    assert [choose_plan(EXAMPLE, often, 0.01, cached)[0].cut for cached in ((), (5, 6, 7))] == [0, 3]


def test_the_requests_that_are_expected_share_the_download_of_the_weights():
    rows = [choose_plan(EXAMPLE, DeviceProfile(downlink=1.0, requests=requests), 0.01)[1] for requests in (1, 50)]
    once, shared = (row[3].prediction for row in rows)
    assert shared.transfer_s == pytest.approx(once.transfer_s / 50)
    assert shared.weight_bytes == once.weight_bytes


# 1.5 s on the device are saved by an engine whose samples take 5 s to come: worth it for four requests, and not for three.
def test_the_samples_that_an_engine_is_compiled_with_are_part_of_what_comes_down():
    catalogue = replace(EXAMPLE, device_s={"fp32": (0.0, 1.0, 2.0, 5.0), "int8": (0.0, 1.0, 2.0, 3.5)}, sample_bytes=500)
    device = DeviceProfile(downlink=100.0, price_weight=9.0)
    for requests, engine, sample_bytes in ((3, "fp32", 0), (4, "int8", 500)):
        plan, rows = choose_plan(catalogue, replace(device, requests=requests), 0.01)
        assert (plan.cut, plan.stages[0].engine, plan.prediction.sample_bytes) == (3, engine, sample_bytes)
        assert rows[0].prediction.sample_bytes == 0, "nothing is compiled"
    plan, _ = choose_plan(catalogue, device, 0.01, has_samples=True)
    assert (plan.stages[0].engine, plan.prediction.sample_bytes) == ("int8", 0)
    fetch_s = fetch_seconds(catalogue, device, (5, 6, 7))
    offer_s = (offer_bytes(SMALL, (5, 6, 7)) + HEADER_BYTES) / 100
    assert plan.prediction.transfer_s == pytest.approx(fetch_s + offer_s)
    plan, _ = choose_plan(catalogue, replace(device, requests=4), 0.01)
    assert plan.prediction.transfer_s == pytest.approx((fetch_s + offer_s + 5.0) / 4)


def test_the_largest_level_that_is_allowed_is_used():
    device = DeviceProfile(price_weight=100.0)
    plans = [choose_plan(EXAMPLE, device, loss)[0] for loss in (0.01, 0.049, 0.05, 1.0)]
    assert [plan.weight_bits for plan in plans] == [(5, 6, 7), (5, 6, 7), (3, 3, 4), (3, 3, 4)]
    assert [plan.prediction.accuracy_loss for plan in plans] == [0.01, 0.01, 0.05, 0.05]


def test_without_a_level_that_is_allowed_the_nearest_is_named():
    with pytest.raises(PlanError, match=r"no plan keeps within max_accuracy_loss = 0.0001; the nearest is 0.01$"):
        choose_plan(EXAMPLE, DeviceProfile(), 0.0001)
    with pytest.raises(PlanError, match="max_accuracy_loss = nan is no loss of accuracy"):
        choose_plan(EXAMPLE, DeviceProfile(), math.nan)


def test_a_level_may_offer_only_the_full_model_at_the_server():
    exact = replace(EXAMPLE, levels={0.0: {0: ((), 32)}, **EXAMPLE.levels})
    for loss in (0.0, 0.001, 0.00035):
        plan, rows = choose_plan(exact, DeviceProfile(price_weight=9.0), loss)
        assert (plan.cut, plan.activation_bits, plan.prediction.activation_bytes) == (0, 32, 4 * 36)
        assert [row.obstacle for row in rows[1:]] == [f"has no bits for a loss of {loss:g}"] * 3, "the loss that was asked"


def test_an_engine_with_smaller_weights_is_taken_where_the_faster_one_does_not_fit():
    dear_server = DeviceProfile(price_weight=100.0)
    dear = replace(EXAMPLE, device_s={"fp32": (0.0, 1.0, 2.0, 3.0), "int8": (0.0, 2.0, 3.0, 3.5)})
    int8, fp32 = (28 + 8 * 118 + size * (36 + 72 + 54) for size in (1, 4))
    for memory, engine in ((fp32, "fp32"), (fp32 - 1, "int8"), (int8, "int8")):
        plan, rows = choose_plan(dear, replace(dear_server, memory_bytes=memory), 0.01)
        assert (plan.cut, rows[3].device_engine, rows[3].prediction.memory_bytes) == (
            3,
            engine,
            int8 if engine == "int8" else fp32,
        )
    plan, rows = choose_plan(dear, replace(dear_server, memory_bytes=int8 - 1), 0.01)
    assert rows[3].obstacle == f"takes {int8:,} bytes of memory, of {int8 - 1:,}"
    assert plan.cut == 2


def test_an_engine_that_the_device_has_refused_is_not_planned_for_it():
    catalogue = replace(
        EXAMPLE, device_s={"fp32": (0.0, 1.0, 2.0, 3.0), "int8": (0.0, 0.1, 0.2, 0.3), "bf16": (0.0, 0.5, 1.0, 1.5)}
    )
    for refused, engine in (((), "int8"), (("int8",), "bf16"), (("int8", "bf16", "fp32"), "fp32"), (("unheard of",), "int8")):
        plan, rows = choose_plan(catalogue, DeviceProfile(price_weight=9.0), 0.01, refused=refused)
        assert {row.device_engine for row in rows[1:]} == {plan.stages[0].engine} == {engine}
        assert plan.prediction.device_s == catalogue.device_s[engine][3]
        assert plan.other_engines == (("bf16",) if engine == "int8" else ())
    alone = replace(catalogue, device_s={"int8": catalogue.device_s["int8"]})
    assert choose_plan(alone, DeviceProfile(price_weight=9.0), 0.01, refused=("int8",))[0].stages[0].engine == "int8"


def test_engines_that_are_cheaper_once_the_samples_are_there_may_take_the_place_of_the_one_that_they_come_for():
    times = {"fp32": (0.0, 1.0, 2.0, 3.0), "int8": (0.0, 0.1, 0.2, 0.3), "bf16": (0.0, 0.9, 1.9, 2.9)}
    catalogue = replace(EXAMPLE, device_s=times, sample_bytes=1000)
    device = DeviceProfile(price_weight=9.0, downlink=1000.0)  # 1 s for the samples, and bf16 saves 0.1 s
    first, _ = choose_plan(catalogue, device, 0.01)
    assert (first.stages[0].engine, first.other_engines) == ("int8", ("bf16",))
    second, _ = choose_plan(catalogue, device, 0.01, has_samples=True, refused=("int8",))
    assert (second.stages[0].engine, second.other_engines) == ("bf16", ()), "what was tried in its place"
    without, _ = choose_plan(catalogue, device, 0.01, refused=("int8",))
    assert (without.stages[0].engine, without.other_engines) == ("fp32", ())


def test_where_nothing_fits_the_smallest_memory_that_would_do_is_named():
    device = DeviceProfile("watch", memory_bytes=200)
    message = r"memory_bytes = 200 of device 'watch' is too little for every cut; the smallest, after 0 of 3 layers, takes 288"
    with pytest.raises(PlanError, match=message):
        choose_plan(EXAMPLE, device, 0.01)
    assert choose_plan(EXAMPLE, replace(device, memory_bytes=288), 0.01)[0].cut == 0


@pytest.mark.parametrize("bits", [2, 7, 16, 32])
def test_activations_are_counted_as_they_are_sent(bits):
    for cut, shapes in ((0, [(1, 6, 6)]), (1, [(4, 5, 5)]), (2, [(2, 3, 3), (4, 5, 5)])):
        assert activation_bytes(SMALL, cut, bits) == num_bytes(shapes, 1, bits)
    assert activation_bytes(SMALL, 3, bits) == 0


@pytest.mark.parametrize("cached", [(0, 0, 0, 0), (17,), (-1,)])
def test_cached_bits_that_cannot_be_are_a_plan_error(cached):
    with pytest.raises(PlanError, match=r"cached bits \(.*\) are not 0 to 16 for each of at most 3 layers"):
        choose_plan(EXAMPLE, DeviceProfile(), 0.01, cached)


# --- the catalogue's JSON ---------------------------------------------------------------------------------------------


@given(catalogue=catalogues(), seed=st.integers(0, 2**32 - 1), is_rated=st.booleans())
@quick
def test_a_catalogue_survives_json(catalogue, seed, is_rated):
    catalogue = rated(catalogue, np.random.default_rng(seed)) if is_rated else catalogue
    assert Catalogue.from_json(json.loads(json.dumps(catalogue.to_json(), allow_nan=False))) == catalogue


def changed(path, value):
    """The example's JSON with one value replaced, or removed if it is `...`."""
    root = json.loads(json.dumps(EXAMPLE.to_json()))
    *steps, last = path
    place = root
    for step in steps:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return root


LAYER = ("profile", "layers", 1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), ..., "catalogue = .* is not a table of profile, version, levels, device_s, server_s"),
        (("more",), 1, "catalogue = .* is not a table of"),
        (("version",), "7", "catalogue.version = 7 is not a whole number"),
        (("version",), True, "catalogue.version = True is not a whole number"),
        (("version",), -1, "catalogue.version = -1 is not a number of at least 0"),
        (("profile",), None, "catalogue.profile = None is not a table of layers, input_shape, num_classes"),
        (("profile", "layers"), [], r"catalogue.profile.layers = \(\) is not a list of at least one layer"),
        (("profile", "layers"), {}, r"catalogue.profile.layers = {} is not a list"),
        (("profile", "input_shape"), [3, 0], r"catalogue.profile.input_shape = \(3, 0\) is not a shape"),
        (("profile", "num_classes"), 0, "catalogue.profile.num_classes = 0 is not at least 1"),
        ((*LAYER, "kind"), "lstm", r"catalogue.profile.layers\[1\].kind = lstm is not one of conv2d, linear"),
        ((*LAYER, "weight"), [40], r"catalogue.profile.layers\[1\].weight = \[40\] is not a list of 2"),
        ((*LAYER, "weight"), [0, 72], r"catalogue.profile.layers\[1\].weight = \(0, 72\) is not a range that begins at 40"),
        ((*LAYER, "weight"), [50, 40], r"catalogue.profile.layers\[1\].weight = \(50, 40\) is not a range"),
        ((*LAYER, "channels"), 5, r"catalogue.profile.layers\[1\].channels = 5 is not a divisor of its 72 weights"),
        ((*LAYER, "channels"), 0, r"catalogue.profile.layers\[1\].channels = 0 is not a divisor"),
        ((*LAYER, "macs"), 1.5, r"catalogue.profile.layers\[1\].macs = 1.5 is not a whole number"),
        ((*LAYER, "live"), [], r"catalogue.profile.layers\[1\].live = \(\) is not a list of at least one shape"),
        ((*LAYER, "live"), [[2, "3"]], r"catalogue.profile.layers\[1\].live\[0\]\[1\] = 3 is not a whole number"),
        (("levels",), {}, "catalogue.levels = {} is not a table with at least one level"),
        (("levels", "nan"), {"0": [[], 8]}, "catalogue.levels.nan = nan is not a loss of accuracy of at least 0"),
        (("levels", "low"), {"0": [[], 8]}, "catalogue.levels.low = low is not named by a number"),
        (("levels", "0.01"), {}, "catalogue.levels.0.01 = {} is not a table with at least one cut"),
        (("levels", "0.01", "1.5"), [[4], 6], "catalogue.levels.0.01.1.5 = 1.5 is not named by a whole number"),
        (("levels", "0.01", "4"), [[4] * 4, 6], "catalogue.levels.0.01.4 = 4 is not a cut of 0 to 3"),
        (("levels", "0.01", "2"), [[4], 6], r"catalogue.levels.0.01.2\[0\] = \(4,\) is not bits for 2 layers"),
        (("levels", "0.01", "2"), [[4, 17], 6], r"catalogue.levels.0.01.2\[0\] = \(4, 17\) is not bits of 1 to 16"),
        (("levels", "0.01", "2"), [[4, 4], 0], r"catalogue.levels.0.01.2\[1\] = 0 is not 0 where nothing is cut, else 2 to 16"),
        (("levels", "0.01", "3"), [[4, 4, 4], 8], r"catalogue.levels.0.01.3\[1\] = 8 is not 0 where nothing is cut"),
        (("device_s",), {}, "catalogue.device_s = {} is not a table with an engine that runs cut 0"),
        (("device_s", "fp32"), [0, 1, 2], r"catalogue.device_s.fp32 = \(0.0, 1.0, 2.0\) is not 4 numbers, one for each cut"),
        (("device_s", "fp32", 2), -1.0, r"catalogue.device_s.fp32\[2\] = -1.0 is not seconds"),
        (("device_s", "fp32", 2), math.inf, r"catalogue.device_s.fp32\[2\] = inf is not seconds"),
        (("device_s", "fp32", 2), math.nan, r"catalogue.device_s.fp32\[2\] = nan is not seconds"),
        (("device_s", "fp32", 0), 0.1, r"catalogue.device_s.fp32\[0\] = 0.1 is not 0, with nothing to compute"),
        (("server_s", "fp32", 3), 0.1, r"catalogue.server_s.fp32\[3\] = 0.1 is not 0, with nothing to compute"),
        (("overheads",), [], r"catalogue.overheads = \[\] is not a list of 3"),
        (("overheads", 1, "rest_s"), -1.0, r"catalogue.overheads\[1\] = \(0.0, 0.0, -1.0\) is not seconds of at least 0"),
        (("sample_bytes",), -1, "catalogue.sample_bytes = -1 is not a number of at least 0"),
        (
            ("fallback_rates", "0.02"),
            {"0": {"full": 0.5, "continued": None}},
            "catalogue.fallback_rates.0.02.0 = 0 is not a cut",
        ),
        (
            ("fallback_rates", "0.01"),
            {"4": {"full": 0.5, "continued": None}},
            "catalogue.fallback_rates.0.01.4 = 4 is not a cut",
        ),
        (
            ("fallback_rates", "0.01"),
            {"0": {"full": 1.5, "continued": None}},
            "catalogue.fallback_rates.0.01.0 = .* is not a share",
        ),
        (
            ("fallback_rates", "0.01"),
            {"0": {"full": 0.5, "continued": -1}},
            "catalogue.fallback_rates.0.01.0 = .* is not a share",
        ),
        (
            ("fallback_rates", "0.01"),
            {"0": [0.5, 0.5]},
            "catalogue.fallback_rates.0.01.0 = .* is not a table of full, continued",
        ),
        (("server_s", "fp32", 1), None, "catalogue.server_s = {} is not a table with an engine that runs cut 1"),
    ],
)
def test_a_catalogue_that_cannot_be_is_a_plan_error_that_names_the_key(path, value, message):
    with pytest.raises(PlanError, match=f"{message}.*; calibrate again"):
        Catalogue.from_json(changed(path, value))


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_what_is_no_table_is_no_catalogue(value):
    with pytest.raises(PlanError, match="is not a table of"):
        Catalogue.from_json(value)


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("speed", [0.0, -1.0, math.nan, "x", None], "above 0: 1 is the machine that calibrated"),
        ("memory_bytes", [0, -1], "above 0: the bytes that the model may take"),
        ("uplink", [0.0, -1.0, math.nan], "above 0: bytes per second, or inf where there is no limit"),
        ("downlink", [0.0, -1.0, math.nan], "above 0: bytes per second, or inf where there is no limit"),
        ("latency_s", [-0.1, math.nan], "seconds of at least 0, one way"),
        ("compute_w", [-1.0], "watts of at least 0"),
        ("transmit_w", [-1.0, math.nan], "watts of at least 0"),
        ("time_weight", [-1.0], "a number of at least 0"),
        ("energy_weight", [-1.0, math.nan], "a number of at least 0"),
        ("price_weight", [-1.0], "a number of at least 0"),
        ("requests", [0, -3], "at least 1: those expected for each download of the weights"),
        ("requests", [10**26], r"at most 1e\+15$"),
        ("speed", [1e300, math.inf], r"at most 1e\+15$"),
        ("latency_s", [math.inf], r"at most 1e\+15$"),
    ],
)
def test_a_device_that_cannot_be_is_a_config_error_that_names_the_key(key, values, message):
    for value in values:
        device = replace(DeviceProfile("pi"), **{key: value})
        for use in (check_device, lambda device: choose_plan(EXAMPLE, device, 0.01)):
            with pytest.raises(ConfigError, match=f"{re.escape(f'{key} = {value!r}')} of device 'pi' must be {message}"):
                use(device)


def test_a_device_of_numpys_numbers_is_one():
    device = DeviceProfile("pi", speed=np.float32(0.5), requests=np.int64(3))
    assert choose_plan(EXAMPLE, device, 0.01)[0] == choose_plan(EXAMPLE, DeviceProfile("pi", speed=0.5, requests=3), 0.01)[0]
    assert ask_from_json(to_json(Ask(device, np.float32(0.5)))) == Ask(DeviceProfile("pi", speed=0.5, requests=3), 0.5)


def test_a_device_that_weighs_nothing_is_a_config_error():
    with pytest.raises(ConfigError, match="device 'pi' weighs nothing; give time_weight"):
        check_device(DeviceProfile("pi", time_weight=0.0))


# Whatever a device claims: a cost that is not a number could neither be compared nor sent.
@given(
    device=st.builds(
        DeviceProfile,
        speed=st.sampled_from([1e-9, 1e15]),
        uplink=st.sampled_from([1e-9, math.inf]),
        downlink=st.sampled_from([1e-9, math.inf]),
        latency_s=st.sampled_from([0.0, 1e15]),
        compute_w=st.sampled_from([0.0, 1e15]),
        transmit_w=st.sampled_from([0.0, 1e15]),
        energy_weight=st.sampled_from([0.0, 1e15]),
        requests=st.sampled_from([1, 10**15]),
    )
)
@quick
def test_every_cost_is_finite(device):
    _, rows = choose_plan(EXAMPLE, device, 0.01)
    assert all(math.isfinite(row.prediction.cost) for row in rows)
