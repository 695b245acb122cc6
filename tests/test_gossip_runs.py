"""Whole runs of the machines under virtual time: closed forms, determinism, loss, death, slowness, late joining."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from virtual_host import VirtualHost, keep

from gossipfl.protocol.messages import Data, Pull
from gossipfl.runtime.node import MIN_CHUNK_BYTES


def random_vectors(num_peers: int, size: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"p{index:02d}": rng.standard_normal(size).astype(np.float32) for index in range(num_peers)}


def drift(name: str, round_: int, vector: np.ndarray) -> np.ndarray:
    """A stand-in for training: each peer pulls towards its own corner."""
    return vector + np.float32(0.01 * (1 + int(name[1:]) % 7))


def distance(vectors) -> float:
    """Consensus distance: the mean squared distance from the average model."""
    rows = np.stack(list(vectors)).astype(np.float64)
    return float(((rows - rows.mean(axis=0)) ** 2).sum(axis=1).mean())


def digest(host: VirtualHost) -> str:
    return hashlib.sha256(b"".join(host.models()[name].tobytes() for name in sorted(host.models()))).hexdigest()


@pytest.mark.parametrize("num_segments", [1, 4, 16])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_each_peer_receives_r_times_the_model_a_round_whatever_s(num_segments, replicas):
    host = VirtualHost(random_vectors(8), 3, num_segments=num_segments, replicas=replicas).run()
    assert set(host.payload_bytes.values()) == {3 * replicas * 4000}
    for reports in host.reports.rounds.values():
        assert [report.payload_bytes for report in reports] == [replicas * 4000] * 3
        assert [report.segments_mixed for report in reports] == [replicas * num_segments] * 3


@pytest.mark.parametrize("num_segments", [1, 4, 16])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_consensus_distance_shrinks_by_the_closed_form(num_segments, replicas):
    """Without training and with equal weights each peer's new segment is the mean of R + 1 distinct peers' ones. With iid
    vectors of variance s^2, before: s^2 (N-1)/N per coordinate. After: the mixed copies have variance s^2/(R+1) each, any two
    share (R+1)^2/N copies on average: the ratio is (N-R-1)/((N-1)(R+1))."""
    n = 32
    ratios = []
    for seed in range(20):
        vectors = random_vectors(n, 1024, seed)
        host = VirtualHost(vectors, 1, num_segments=num_segments, replicas=replicas, seed=seed, mixing="uniform").run()
        ratios.append(distance(host.models().values()) / distance(vectors.values()))
    expected = (n - replicas - 1) / ((n - 1) * (replicas + 1))
    assert math.isclose(np.mean(ratios), expected, rel_tol=0.05)


def test_the_same_seed_gives_the_same_run_to_the_bit():
    runs = [VirtualHost(random_vectors(8), 5, train=drift, seed=3, loss=0.1).run(1e4) for _ in range(2)]
    assert runs[0].log == runs[1].log
    assert digest(runs[0]) == digest(runs[1])
    assert digest(runs[0]) != digest(VirtualHost(random_vectors(8), 5, train=drift, seed=4).run())


def test_timing_does_not_change_a_lossless_run():
    """Latency, bandwidth and who trains how fast decide when things arrive, never what is mixed."""
    fast = VirtualHost(random_vectors(6), 4, train=drift).run()
    slow = VirtualHost(
        random_vectors(6), 4, train=drift, latency_s=0.4, bytes_per_s=5e3, train_s=lambda name, round_: 1 + int(name[1:]) % 3
    ).run()
    assert fast.first_pulls == slow.first_pulls
    assert fast.data_frames == slow.data_frames
    assert digest(fast) == digest(slow)


@pytest.mark.parametrize("seed", range(5))
def test_a_run_finishes_under_thirty_percent_loss(seed):
    host = VirtualHost(random_vectors(8), 6, train=drift, loss=0.3, seed=seed, quorum=1).run(until=1500)
    assert all(peer.error is None for peer in host.peers.values())
    assert {peer.machine.round for peer in host.peers.values()} == {6}
    assert sum(report.segments_mixed for reports in host.reports.rounds.values() for report in reports) > 8 * 6 * 2


@pytest.mark.parametrize("silently", [False, True])
@pytest.mark.parametrize("at", [0.5, 1.5, 3.02, 4.015])
def test_a_run_finishes_when_a_peer_dies_in_any_round(at, silently):
    host = VirtualHost(random_vectors(6), 5, train=drift, quorum=2)
    for name in host.peers:
        host.start(name)
    host.kill("p03", at, silently=silently)
    host.run(until=300)
    survivors = [peer for peer in host.peers.values() if not peer.is_away]
    assert {peer.machine.round for peer in survivors} == {5}
    assert len(host.models()) == 5


def test_a_peer_ten_times_slower_keeps_mixing_to_the_end():
    rounds, slow = 30, "p02"
    host = VirtualHost(
        random_vectors(6), rounds, train=drift, train_s=lambda name, round_: 50.0 if name == slow else 5.0, linger_s=60
    ).run(until=1e4)
    reports = host.reports.rounds[slow]
    assert reports[-1].round == rounds
    assert all(report.segments_mixed > 0 for report in reports), "it never trains alone"
    assert any(report.adopted for report in reports), "it was more than four rounds behind"
    assert all(report.segments_mixed > 0 for name, reports in host.reports.rounds.items() for report in reports if name != slow)


def test_a_late_joiner_catches_up():
    host = VirtualHost(random_vectors(6), 20, train=drift, quorum=3, join_timeout_s=2)
    for name in list(host.peers)[:-1]:
        host.start(name)
    late = list(host.peers)[-1]
    host.start(late, at=11.0)
    host.run(until=300)
    first, *others = host.reports.rounds[late]
    assert first.adopted and first.round >= 5
    assert (
        first.segments_mixed == 4 and len({sender for _, sender, to, m in host.log if to == late and isinstance(m, Data)}) > 1
    )
    assert others[-1].round == 20 and all(report.missing == 0 for report in others)


@pytest.mark.parametrize("everybody", [True, False])
def test_a_transfer_slower_than_any_deadline_arrives_once_not_twice(everybody):
    """Each segment takes 100 s, ten times the patience; its chunks come every 10 s."""
    names = list(random_vectors(3))
    replicas = 2 if everybody else 1
    vectors = random_vectors(3, 10 * MIN_CHUNK_BYTES // 4)
    rate = MIN_CHUNK_BYTES / 10
    host = VirtualHost(vectors, 2, num_segments=1, replicas=replicas, bytes_per_s=rate, chunk_bytes=MIN_CHUNK_BYTES)
    host.run(until=5000)
    frames = [m for _, _, to, m in host.log if isinstance(m, Data)]
    assert max(host.data_frames.values()) == 1 and len(frames) == 3 * 2 * 10 * (2 if everybody else 1)
    assert all(report.repeated_bytes == 0 and report.missing == 0 for name in names for report in host.reports.rounds[name])


def test_peers_in_a_ring_and_an_isolated_one_finish():
    neighbours = {"p00": ["p01", "p02"], "p01": ["p00", "p02"], "p02": ["p00", "p01"], "p03": []}
    host = VirtualHost(random_vectors(4), 3, neighbours=neighbours, train=drift).run()
    assert [fault.kind for fault in host.reports.faults["p03"]] == ["lone"]
    assert {peer.machine.round for peer in host.peers.values()} == {3}


def test_asynchronous_gossip_never_waits():
    host = VirtualHost(
        random_vectors(6), 10, train=drift, max_staleness=math.inf, train_s=lambda name, round_: 1.0 + 0.3 * int(name[1:])
    ).run()
    waits = [report.wait_s for reports in host.reports.rounds.values() for report in reports if report.round > 2]
    assert max(waits) < 0.1  # a few latencies of 10 ms
    assert max(report.staleness_max for reports in host.reports.rounds.values() for report in reports) > 0


def test_control_traffic_is_of_the_order_of_s_times_r_per_peer_and_round():
    def control(num_peers: int) -> float:
        host = VirtualHost(random_vectors(num_peers, 100), 10).run()
        return sum(not isinstance(message, Data) for *_, message in host.log) / (num_peers * 10)

    joining_and_leaving = 3 * 39 / 10  # a Hello, its answer and a Leave per neighbour, once
    assert control(40) - joining_and_leaving < 2.2 * 4 * 2  # a Pull and a Later for each of S R copies, at the most


@pytest.mark.parametrize("codec_name", ["randomk:0.2", "int8", "bfloat16"])
def test_peers_agree_more_and_more_with_lossy_codecs(codec_name):
    vectors = random_vectors(8)
    host = VirtualHost(vectors, 12, train=keep, codec_name=codec_name, mixing="uniform").run()
    assert distance(host.models().values()) < 0.3 * distance(vectors.values())


@pytest.mark.parametrize("codec_name", ["topk:0.2", "randomk:0.2"])
def test_sparse_gossip_holds_peers_together_that_train_apart(codec_name):
    """Top-k sends what has changed since it was last sent: from one common model, that is all that peers disagree on."""
    common = random_vectors(1)["p00"]
    start = {f"p{index:02d}": common.copy() for index in range(8)}
    host = VirtualHost(start, 20, train=drift, codec_name=codec_name, mixing="uniform").run()
    apart = {name: common + 20 * (drift(name, 1, common) - common) for name in start}
    assert distance(host.models().values()) < 0.3 * distance(apart.values())


def test_every_pull_names_at_most_its_neighbours_share():
    host = VirtualHost(random_vectors(5), 2, num_segments=16).run()
    asked = [m for *_, m in host.log if isinstance(m, Pull)]
    assert sum(len(pull.ranges) for pull in asked) == 5 * 2 * 16 * 2
