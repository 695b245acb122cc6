"""The emulated network: max-min fair sharing against a plain oracle, and closed-form times of transfers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gossipfl.overlay.links import Constant, LinksConfig, build_links
from gossipfl.simulation.clock import VirtualClock
from gossipfl.simulation.network import Flow, Network, fair_rates


def filled(flows: list[Flow], uplink: np.ndarray, downlink: np.ndarray) -> list[float]:
    """Progressive filling as the textbook has it: raise all rates together, freeze whom the first full link stops."""
    rates, open_ = {flow: 0.0 for flow in flows}, set(flows)

    def headroom(flow: Flow) -> float:
        def left(capacity: float, same: list[Flow]) -> float:
            used = sum(rates[other] for other in same)
            return (capacity - used) / sum(other in open_ for other in same)

        up = left(uplink[flow.sender], [other for other in flows if other.sender == flow.sender])
        down = left(downlink[flow.receiver], [other for other in flows if other.receiver == flow.receiver])
        return min(up, down, flow.pair - rates[flow])

    while open_:
        step = min(headroom(flow) for flow in open_)
        for flow in open_:
            rates[flow] += step
        open_ -= {flow for flow in open_ if headroom(flow) <= 1e-9 * max(rates[flow], 1.0)}
    return [rates[flow] for flow in flows]


@pytest.mark.parametrize("seed", range(20))
def test_rates_are_those_of_progressive_filling(seed):
    rng = np.random.default_rng(seed)
    num_peers = int(rng.integers(2, 9))
    pairs = [(i, j) for i in range(num_peers) for j in range(num_peers) if i != j and rng.random() < 0.6] or [(0, 1)]
    flows = [Flow(i, j, float(rng.integers(1, 40))) for i, j in pairs]
    uplink, downlink = rng.integers(5, 60, num_peers).astype(float), rng.integers(5, 60, num_peers).astype(float)
    assert fair_rates(flows, uplink, downlink) == pytest.approx(filled(flows, uplink, downlink))


def test_without_limits_rates_are_infinite():
    infinite = np.full(3, math.inf)
    rates = fair_rates([Flow(0, 1, math.inf), Flow(0, 2, 5.0)], infinite, infinite)
    assert rates.tolist() == [math.inf, 5.0]


def network(num_peers: int = 4, **limits: float) -> tuple[Network, VirtualClock, list]:
    config = {name: value if name in ("jitter_s", "loss") else Constant(value) for name, value in limits.items()}
    clock = VirtualClock()
    return Network(build_links(LinksConfig(**config), num_peers, 0), clock, np.random.default_rng(0)), clock, []


def run(net: Network, clock: VirtualClock) -> None:
    while True:
        net.settle()
        if clock.next_time is None:
            return
        clock.advance()


@pytest.mark.parametrize("num_peers", [4, 200])
def test_flows_that_share_an_uplink_take_turns_and_speed_up_when_one_ends(num_peers):
    net, clock, arrived = network(num_peers, uplink=100.0, latency=0.5)
    net.stream(0, 1, 7, 100, lambda: arrived.append(("a", clock.now)))
    net.stream(0, 2, 7, 300, lambda: arrived.append(("b", clock.now)))
    run(net, clock)  # at 50 each until 2 s; the 200 left of b then go at 100
    assert arrived == [("a", 2.5), ("b", 4.5)]


@pytest.mark.parametrize("pair", [math.inf, 12.0])
def test_beyond_100_peers_each_flow_has_the_least_of_its_even_shares_and_its_pair(pair):
    rng = np.random.default_rng(1)
    net, clock, _ = network(200, uplink=100.0, downlink=60.0, pair=pair)
    seen = 0
    for step in range(300):
        sender, receiver = rng.choice(12, 2, replace=False).tolist()
        if step % 50 == 49:
            net.cut(sender)
        else:
            net.stream(sender, receiver, step, int(rng.integers(1, 200)), lambda: None)
        net.settle()
        flows = [flow for sent in net._sending for flow in sent]
        for flow in flows:
            num_sent, num_received = len(net._sending[flow.sender]), len(net._receiving[flow.receiver])
            assert flow.rate == min(100.0 / num_sent, 60.0 / num_received, pair)
        seen = max(seen, len(flows))
        if step % 3 == 2 and clock.next_time is not None:
            clock.advance()
    assert seen > 20


def test_a_pair_is_slower_than_both_its_ends():
    net, clock, arrived = network(uplink=100.0, downlink=100.0, pair=10.0)
    for receiver in (1, 2, 3):
        net.stream(0, receiver, 7, 100, lambda: arrived.append(clock.now))
    run(net, clock)
    assert arrived == [10.0, 10.0, 10.0]


def test_chunks_of_a_flow_arrive_one_after_another():
    net, clock, arrived = network(uplink=100.0)
    for number in range(3):
        net.stream(0, 1, 7, 50, lambda number=number: arrived.append((number, clock.now)))
    assert net.flow(0, 1).bytes_queued() == net.flow(0, 1).bytes_queued(7) == 150
    run(net, clock)
    assert arrived == [(0, 0.5), (1, 1.0), (2, 1.5)]


def test_a_message_takes_the_latency_and_no_capacity():
    net, clock, arrived = network(uplink=1.0, latency=0.25)
    net.send(0, 1, lambda: arrived.append(clock.now))
    run(net, clock)
    assert arrived == [0.25]


def test_with_jitter_no_message_overtakes_another_of_its_pair():
    net, clock, arrived = network(latency=0.1, jitter_s=1.0)
    for number in range(50):
        net.send(0, 1, arrived.append, number)
    run(net, clock)
    assert arrived == list(range(50)) and clock.now <= 1.1


def test_the_share_that_is_lost_is_the_one_asked_for():
    net, clock, arrived = network(loss=0.3)
    for number in range(5000):
        net.send(0, 1, arrived.append, number)
    run(net, clock)
    assert abs(len(arrived) / 5000 - 0.7) < 4 * math.sqrt(0.3 * 0.7 / 5000)


def test_what_is_queued_for_a_peer_that_has_gone_is_dropped_and_frees_capacity():
    net, clock, arrived = network(uplink=100.0)
    net.stream(0, 1, 7, 1000, lambda: arrived.append("gone"))
    net.stream(0, 2, 7, 100, lambda: arrived.append(clock.now))
    net.settle()
    clock.at(1.0, net.cut, 1)
    run(net, clock)  # 50 bytes until 1 s, the other 50 at 100 a second
    assert arrived == [1.5]


def test_a_trace_changes_a_rate_in_the_middle_of_a_transfer(tmp_path):
    (tmp_path / "trace.csv").write_text("time_s,peer,uplink,downlink\n0,p0,8e-4,8\n1,p0,1.6e-3,8\n")  # 100, then 200 bytes/s
    clock, arrived = VirtualClock(), []
    net = Network(build_links(LinksConfig(trace=str(tmp_path / "trace.csv")), 2, 0), clock, np.random.default_rng(0))
    net.stream(0, 1, 7, 300, lambda: arrived.append(clock.now))
    run(net, clock)
    assert arrived == pytest.approx([2.0])
