"""Whole runs over real sockets: the same as under virtual time, to the bit; and peers that come, go and do not fit."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

import numpy as np
import pytest
import torch
from sockets import (
    DEADLINE_S,
    RUN,
    Swarm,
    drift,
    free_address,
    has_ipv6,
    made_swarms,
    new_address,
    open_files,
    opened_ends,
    random_vectors,
    until,
    wait_for,
)
from torch import nn
from virtual_host import VirtualHost

from gossipfl.errors import ConfigError, GossipflError, RunError
from gossipfl.learning.datasets import Dataset
from gossipfl.learning.flatten import flatten, layout_of
from gossipfl.protocol.machine import Fault
from gossipfl.protocol.messages import Data, Hello, Pull
from gossipfl.runtime.endpoint import Endpoint
from gossipfl.runtime.host import PeerHost
from gossipfl.runtime.job import Job, PeerJob
from gossipfl.runtime.message_loop import MessageLoop
from gossipfl.runtime.peer import Peer
from gossipfl.runtime.transport import ZmqTransport

swarms = pytest.fixture(made_swarms)
ends = pytest.fixture(opened_ends)


# --- the same run, real and virtual -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec_name", ["float32", "int8", "topk:0.1"])
@pytest.mark.parametrize("kind", ["tcp4", "tcp6", "ipc", "inproc"])
def test_a_run_over_sockets_equals_the_run_under_virtual_time(kind, codec_name, swarms):
    if codec_name != "float32" and kind != "tcp4":
        pytest.skip("once for each codec is enough")
    swarm = swarms(random_vectors(6), 5, per_endpoint=3, bind=lambda: new_address(kind), segments=4, seed=3, codec=codec_name)
    swarm.start().run()
    virtual = VirtualHost(random_vectors(6), 5, train=drift, seed=3, codec_name=codec_name).run()
    assert swarm.first_pulls == virtual.first_pulls
    assert swarm.data_frames == virtual.data_frames
    for name, vector in virtual.models().items():
        np.testing.assert_array_equal(swarm.final[name], vector, err_msg=name)
    for name, reports in swarm.reports.items():
        ours = [(r.round, r.segments_mixed, r.missing, r.payload_bytes, r.repeated_bytes, r.staleness_max) for r in reports]
        theirs = virtual.reports.rounds[name]
        assert ours == [(r.round, r.segments_mixed, r.missing, r.payload_bytes, r.repeated_bytes, 0) for r in theirs]
    swarm.check_running()


def test_a_model_of_many_chunks_travels_whole(swarms):
    """Segments of 5.6 chunks each, 4 from each of 2 peers at once."""
    size = 1_460_000
    swarm = swarms(random_vectors(4, size), 2, per_endpoint=2, segments=4).start().run()
    virtual = VirtualHost(random_vectors(4, size), 2, train=drift).run()
    assert swarm.data_frames == virtual.data_frames and max(swarm.data_frames.values()) == 1
    for name, vector in virtual.models().items():
        np.testing.assert_array_equal(swarm.final[name], vector, err_msg=name)


def test_a_peer_answers_while_it_trains(swarms):
    """The others have p00's version of round 1 while it trains for round 2, and hear from it that they must wait for that."""
    swarm = swarms(random_vectors(3), 2, segments=4)
    swarm.held_at["p00"] = 2
    swarm.start().run_until(lambda: "p00" in swarm.waiting and all(swarm.reports.values()))
    for name in ("p01", "p02"):
        swarm.until(name, lambda name=name: any(t.is_answered for t in swarm.nodes[name].machine._transfers.values()))
    swarm.release()
    swarm.run()
    for reports in swarm.reports.values():
        assert [(report.segments_mixed, report.timeouts) for report in reports] == [(8, 0), (8, 0)]


# --- those who go and come --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_", [2, 4])
def test_the_others_finish_when_a_peer_vanishes(round_, swarms):
    swarm = swarms(random_vectors(4), 6, segments=4)
    others, late = ("p00", "p01", "p02"), "p03"
    swarm.held_at[late] = round_
    swarm.start().run_until(lambda: late in swarm.waiting and {(name, late) for name in others} <= swarm.heard)
    swarm.loop_of[late].stop(flush_s=0.0)  # the others have asked for what it was training, or will
    swarm.run(*others)
    for name in others:
        assert [report.round for report in swarm.reports[name]] == [1, 2, 3, 4, 5, 6]
        assert all(report.segments_mixed == 8 for report in swarm.reports[name]), "there were two others for each segment"
        assert {fault.kind for fault in swarm.faults[name] if fault.peer == late} == {"down"}
        assert swarm.loop_of[name].is_running


def test_the_last_words_of_a_peer_do_not_bring_it_back(swarms):
    """They are read after the news that the connection to it broke: it stays away, and nobody waits for it."""
    swarm = swarms(random_vectors(4), 6, segments=4)
    others, late = ("p00", "p01", "p02"), "p03"
    swarm.held_at = dict.fromkeys(swarm.nodes, 2)
    swarm.start().run_until(lambda: set(swarm.waiting) == set(swarm.nodes) and {(name, late) for name in others} <= swarm.heard)
    go_on, said = threading.Event(), threading.Event()
    swarm.loop_of["p02"].post(lambda: go_on.wait(DEADLINE_S))

    def last_words() -> None:
        for request in (10**6, 10**6 + 1):
            swarm.nodes[late].transport.send(late, "p02", Pull(request, 1, 1, ((0, 250),), "float32", 1.0))
        said.set()

    swarm.loop_of[late].post(last_words)
    assert said.wait(DEADLINE_S)
    swarm.loop_of[late].stop(flush_s=1.0)
    link = swarm.loop_of["p02"].transport._links[swarm.addresses[late]]
    assert link.monitor.poll(DEADLINE_S * 1000)  # its thread is busy, so that this one may look
    go_on.set()
    swarm.until("p02", lambda: "down" in swarm.faults_about(late))
    swarm.release(*others)
    swarm.run(*others)
    for name in others:
        assert sum(report.timeouts for report in swarm.reports[name]) == 0
        assert all(report.segments_mixed == 8 for report in swarm.reports[name])


def test_a_late_joiner_catches_up(swarms):
    swarm = swarms(random_vectors(4), 12, segments=4, join_timeout_s=0.3)
    early, late = ("p00", "p01", "p02"), "p03"
    swarm.held_at = dict.fromkeys((*early, late), 8)
    swarm.start(*early).run_until(lambda: set(early) <= set(swarm.waiting))
    assert all("absent" in {fault.kind for fault in swarm.faults[name]} for name in early)
    swarm.start(late).run_until(lambda: swarm.reports[late])
    adopted = swarm.reports[late][0]
    assert adopted.adopted and adopted.round == 7 and adopted.segments_mixed == 4
    swarm.run_until(lambda: late in swarm.waiting)
    swarm.release()
    swarm.run()
    assert swarm.reports[late][-1].round == 12
    for name in swarm.nodes:
        assert all(report.segments_mixed == 8 for report in swarm.reports[name] if report.round >= 8)
    asked = {to for name, to, version, _ in swarm.first_pulls if name in early and version >= 8}
    assert late in asked, "the others mix with it"


def test_a_peer_that_comes_back_at_its_address_is_mixed_with_again(swarms):
    """The same name starts afresh after a crash, while the others go on."""
    address = free_address()
    binds = iter(["tcp://127.0.0.1:0", "tcp://127.0.0.1:0", address])
    others = ("p00", "p01")
    swarm = swarms(random_vectors(3), 20, segments=4, bind=lambda: next(binds))

    def train(name: str, round_: int, vector: np.ndarray) -> np.ndarray:
        if name == "p02" and round_ == 3:
            swarm.loop_of["p02"].stop(flush_s=0.0)
        return drift(name, round_, vector)

    swarm.train, swarm.held_at = train, dict.fromkeys(others, 12)
    swarm.start().run_until(lambda: set(others) <= set(swarm.waiting))
    again: list[Swarm] = []

    def open_again() -> bool:
        addresses = {name: swarm.addresses[name] for name in others}
        with contextlib.suppress(RunError):
            again.append(swarms({"p02": random_vectors(3)["p02"]}, 20, segments=4, bind=lambda: address, others=addresses))
        return bool(again)

    assert wait_for(open_again)
    back = again[0].start().run_until(lambda: again[0].reports["p02"])
    assert back.reports["p02"][0].adopted and back.reports["p02"][0].round == 11
    swarm.release()
    with ThreadPoolExecutor() as pool:
        for run in [pool.submit(swarm.run, *others), pool.submit(back.run)]:
            run.result(2 * DEADLINE_S)
    assert [swarm.reports[name][-1].round for name in others] == [20, 20] and back.reports["p02"][-1].round == 20
    assert any(to == "p02" and version > 11 for name, to, version, _ in back.first_pulls if name in others)


# --- Peer -------------------------------------------------------------------------------------------------------------


def linear(outputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))


def roster_of(num_peers: int, kind: str = "tcp4") -> dict[str, str]:
    return {f"p{index}": free_address() if kind == "tcp4" else new_address(kind) for index in range(num_peers)}


QUICK = dict(segments=2, replicas=2, join_timeout_s=10.0, linger_s=2.0)


def in_threads(work: Callable[[Peer], object], peers: list[Peer]) -> list[object]:
    """What `work` returns for each peer, or the error that it raised."""
    results: SimpleQueue = SimpleQueue()

    def guarded(peer: Peer) -> None:
        try:
            results.put((peer.name, work(peer)))
        except BaseException as error:
            results.put((peer.name, error))

    for peer in peers:
        threading.Thread(target=guarded, args=(peer,), daemon=True).start()
    outcome: dict[str, object] = {}
    for _ in peers:
        try:
            outcome.update([results.get(timeout=DEADLINE_S)])
        except Empty:
            waiting = {peer.name for peer in peers} - set(outcome)
            raise AssertionError(f"{waiting} still at it after {DEADLINE_S:g} s, the others: {outcome}") from None
    for result in outcome.values():
        if isinstance(result, BaseException) and not isinstance(result, GossipflError):
            raise result
    return [outcome[peer.name] for peer in peers]


@pytest.fixture
def peers() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(*arguments: object, **options: object) -> Peer:
        made.append(Peer(*arguments, **(QUICK | options)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for peer in made:
        peer.close()


def shift(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for values in model.parameters():
            values += amount


@pytest.mark.parametrize("kind", ["tcp4", "ipc", "inproc"])
def test_a_loop_over_rounds_mixes_what_the_peers_have(kind, peers):
    """Three peers who pull from both others each round hold the common mean after each."""
    roster = roster_of(3, kind)
    trio = [peers(name, linear(), roster, num_samples=10, rounds=3) for name in roster]

    def work(peer: Peer) -> list[int]:
        seen = []
        for round_ in peer.rounds():
            shift(peer.model, float(peer.name[1:]))
            report = peer.mix()
            assert report.round == round_ and report.segments_mixed == 2 * 2 and report.missing == 0
            seen.append(round_)
        return seen

    assert in_threads(work, trio) == [[1, 2, 3]] * 3
    expected = flatten(linear()) + 3 * 1.0  # the mean of 0, 1 and 2, three times
    for peer in trio:
        np.testing.assert_allclose(flatten(peer.model), expected, rtol=1e-5, atol=1e-5)
        assert len(peer.reports) == 3 and peer.faults == []


def test_weights_are_the_numbers_of_samples(peers):
    roster = roster_of(2)
    duo = [peers(name, linear(), roster, num_samples=count, rounds=1) for name, count in zip(roster, (1, 3), strict=True)]
    in_threads(lambda peer: peer.run(lambda model, round_: shift(model, float(peer.name[1:]))), duo)
    for peer in duo:
        np.testing.assert_allclose(flatten(peer.model), flatten(linear()) + 0.75, rtol=1e-5, atol=1e-5)


def test_the_numbers_of_a_peer_may_be_those_of_numpy(peers):
    roster = roster_of(2)
    numbers = {"num_samples": np.int64(1), "rounds": np.int32(2), "segments": np.int64(2), "replicas": np.uint8(1)}
    duo = [peers(name, linear(), roster, **numbers) for name in roster]
    in_threads(lambda peer: peer.run(lambda model, round_: shift(model, float(peer.name[1:]))), duo)
    assert [len(peer.reports) for peer in duo] == [2, 2]


def test_run_calls_the_training_function_with_model_and_round(peers):
    roster = roster_of(2)
    duo = [peers(name, linear(), roster, num_samples=1, rounds=2) for name in roster]
    calls = []
    models = in_threads(lambda peer: peer.run(lambda model, round_: calls.append((model is peer.model, round_))), duo)
    assert sorted(calls) == [(True, 1), (True, 1), (True, 2), (True, 2)]
    assert models == [peer.model for peer in duo]


def test_fit_trains_over_a_loader(peers):
    roster = roster_of(3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 4, generator=generator)
    y = (x.sum(dim=1) > 0).long()
    trio = [peers(name, linear(), roster, num_samples=32, rounds=8) for name in roster]

    def work(peer: Peer) -> nn.Module:
        rows = slice(32 * int(peer.name[1:]), 32 * int(peer.name[1:]) + 32)
        loader = [(part_x, part_y) for part_x, part_y in zip(x[rows].split(8), y[rows].split(8), strict=True)]
        return peer.fit(loader, torch.optim.SGD(peer.model.parameters(), lr=0.5), local_epochs=2)

    for model in in_threads(work, trio):
        assert (model(x).argmax(dim=1) == y).float().mean() > 0.9


def test_stop_after_ends_the_run_sooner(peers):
    roster = roster_of(2)
    duo = [peers(name, linear(), roster, num_samples=1, rounds=50) for name in roster]

    def work(peer: Peer) -> list[int]:
        peer.stop_after(3)
        return list(_mixing(peer))

    assert in_threads(work, duo) == [[1, 2, 3]] * 2


def _mixing(peer: Peer) -> Iterator[int]:
    for round_ in peer.rounds():
        peer.mix()
        yield round_


def test_a_peer_alone_trains_alone(peers):
    roster = roster_of(1)
    peer = peers("p0", linear(), roster, num_samples=1, rounds=2)
    assert list(_mixing(peer)) == [1, 2]
    assert [fault.kind for fault in peer.faults] == ["lone"]


# --- Peer: what cannot work says why ----------------------------------------------------------------------------------


def test_models_of_different_layouts_end_with_an_error_that_names_both(peers):
    roster = roster_of(2)
    duo = [peers(name, linear(outputs), roster, num_samples=1, rounds=2) for name, outputs in zip(roster, (2, 3), strict=True)]
    errors = in_threads(lambda peer: peer.run(lambda model, round_: None), duo)
    for error in errors:
        assert isinstance(error, RunError), error
        assert "layout" in str(error) and "p0" in str(error) and "p1" in str(error)
    told = " ".join(fault.detail for peer in duo for fault in peer.faults if fault.kind == "layout")
    assert all(layout_of(peer.model).digest in told for peer in duo)


def test_two_of_a_kind_go_on_without_the_one_that_does_not_fit(peers):
    roster = roster_of(3)
    trio = [peers(name, linear(3 if name == "p1" else 2), roster, num_samples=1, rounds=2) for name in roster]
    first, odd, last = in_threads(lambda peer: peer.run(lambda model, round_: None), trio)
    assert isinstance(odd, RunError) and "p0" in str(odd) and "p2" in str(odd)
    assert first is trio[0].model and last is trio[2].model
    for peer in (trio[0], trio[2]):
        assert [report.segments_mixed for report in peer.reports] == [2, 2]
    # who begins when the other has trained already may not have heard of p1 at all
    assert "layout" in {fault.kind for peer in (trio[0], trio[2]) for fault in peer.faults if fault.peer == "p1"}


def test_peers_that_never_come_are_listed_after_the_join_timeout(peers):
    roster = roster_of(4)
    peer = peers("p1", linear(), roster, num_samples=1, rounds=2, join_timeout_s=0.2)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"p1: no answer from p2, p3, p0 within 0\.2 s"):
        next(peer.rounds())
    assert time.monotonic() - began < 5
    peer.close()


def test_half_the_neighbours_are_enough_to_begin(peers):
    roster = roster_of(3)
    duo = [peers(name, linear(), roster, num_samples=1, rounds=2, join_timeout_s=0.5) for name in ("p0", "p1")]
    assert in_threads(lambda peer: list(_mixing(peer)), duo) == [[1, 2]] * 2
    for peer in duo:
        assert "absent" in {fault.kind for fault in peer.faults}
        assert [report.segments_mixed for report in peer.reports] == [2, 2]


def test_an_unknown_setting_is_an_error_with_a_suggestion(peers):
    with pytest.raises(ConfigError, match=r"unknown gossip setting 'replica'.*replicas"):
        peers("p0", linear(), roster_of(2), num_samples=1, rounds=2, replica=3)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(replicas=0), dict(segments=0), dict(segments=10_000), dict(segmentation="layers"), dict(codec="flot32"),
        dict(codec="topk:2"), dict(mixing="datasize"), dict(aggregation="meen"), dict(selection="unifrom"),
        dict(max_staleness=-1), dict(versions_kept=0), dict(quorum=-1), dict(patience=-1.0), dict(join_timeout_s=math.nan),
        dict(protocol="gosip"), dict(rounds=0), dict(num_samples=0), dict(num_samples=1.5), dict(name="nobody"),
        dict(neighbours=["p9"]), dict(neighbours=["p0"]), dict(bind="127.0.0.1:7000"), dict(bind="tcp://0.0.0.0:0"),
        dict(buffers="averag"),
        dict(roster=["p0", "p1"]), dict(roster={"p0": "tcp://127.0.0.1:0", "p1": "localhost:7001"}),
        dict(roster={"p0": "tcp://127.0.0.1:0", "p" * 65: "tcp://127.0.0.1:7001"}),
        dict(roster={"p0": "tcp://127.0.0.1:0", "": "tcp://127.0.0.1:7001"}),
    ],
    ids=lambda wrong: next(f"{key}={str(value)[:40]}" for key, value in wrong.items()),
)  # fmt: skip
def test_what_cannot_be_right_is_an_error_of_the_callers_and_leaves_nothing_open(wrong):
    """Found at once, and not by a crash of the message thread later on."""
    address = free_address()
    settings = dict(name="p0", model=linear(), roster={"p0": address, "p1": free_address()}, num_samples=1, rounds=2)
    Peer("p0", linear(), {"p0": free_address()}, num_samples=1, rounds=2).close()  # the first in a process opens what stays
    before = open_files()
    with pytest.raises(ConfigError) as failure:
        Peer(**(settings | wrong)).close()  # type: ignore[arg-type]
    assert str(failure.value) and wait_for(lambda: open_files() <= before, 3), "its port is still taken"
    Peer(**settings).close()  # type: ignore[arg-type]


def test_an_address_in_use_is_an_error_that_names_it(peers, ends):
    roster = roster_of(2)
    ends(roster["p0"])
    with pytest.raises(RunError, match=f"{roster['p0']} is in use"):
        peers("p0", linear(), roster, num_samples=1, rounds=2)


def test_a_peer_that_cannot_be_made_leaves_no_socket_behind():
    address = new_address("ipc")
    with pytest.raises(ConfigError, match="num_samples"):
        Peer("p0", linear(), {"p0": address}, num_samples=0, rounds=1)
    assert not Path(address.removeprefix("ipc://")).exists()


def test_a_host_that_cannot_be_made_leaves_no_socket_behind(tmp_path):
    address = new_address("ipc")
    np.save(tmp_path / "shard.npy", np.arange(4))
    x, y = np.zeros((8, 3), np.float32), np.arange(8) % 2
    job = Job(
        peers=[PeerJob("p0", str(tmp_path / "shard.npy"), {})],
        run=1,
        bind=address,
        data="",
        model="",
        model_args={},
        model_seed=0,
        training={},
        gossip={"rounds": 1, "codec": "topk:0.5", "aggregation": "median"},
        evaluate_every=0,
        out=str(tmp_path),
    )
    with pytest.raises(ConfigError, match="whole copies"):
        PeerHost(job, linear(), Dataset(x, y, x, y, 2))
    assert not Path(address.removeprefix("ipc://")).exists()


class Deadline:
    """The shell of a machine whose deadline is always past."""

    next_deadline = 0.0

    def __init__(self) -> None:
        self.is_woken, self.has_heard = threading.Event(), threading.Event()

    def wake(self) -> None:
        self.is_woken.set()

    def take(self, happening: object) -> None:
        self.has_heard.set()

    def crashed(self, error: BaseException) -> None:
        raise AssertionError(error)


def test_calls_without_end_keep_neither_messages_nor_deadlines_from_their_turn(ends):
    """As a stage that is computed on the loop's thread posts what came of it, and another question is there by then."""
    transport, shell, asker = ZmqTransport(new_address("tcp4"), run=RUN), Deadline(), ends("tcp://127.0.0.1:0")
    loop = MessageLoop(transport, shell, "gossipfl-test")

    def again() -> None:
        loop.post(again)

    loop.start()
    try:
        loop.post(again)
        shell.is_woken.clear()
        asker.transport.connect("p0", transport.address)
        asker.transport.send("p1", "p0", Hello("L", 0, False))
        until(asker, shell.has_heard.is_set)
        assert shell.is_woken.wait(DEADLINE_S)
    finally:
        loop.stop()


def test_a_loop_that_dies_says_of_what_and_leaves_no_socket_behind(ends):
    address = new_address("ipc")
    transport = ZmqTransport(address, run=RUN)
    transport.tap = lambda incoming: 1 // 0
    crashed: SimpleQueue = SimpleQueue()
    loop = MessageLoop(transport, Endpoint(crashed.put), "gossipfl-test")
    loop.start()
    asker = ends("tcp://127.0.0.1:0")
    asker.transport.connect("p0", address)
    asker.transport.send("p1", "p0", Hello("L", 0, False))
    until(asker, lambda: not crashed.empty())
    assert isinstance(crashed.get(), ZeroDivisionError) and not loop.is_running
    assert wait_for(lambda: not Path(address.removeprefix("ipc://")).exists())
    loop.stop()


def test_a_loop_whose_start_is_interrupted_closes_its_sockets_once():
    """Ctrl-C, or SIGTERM, while the new thread is awaited: whoever stops the loop may do so before the thread runs."""
    closed: SimpleQueue = SimpleQueue()

    class Counted(ZmqTransport):
        def close(self, flush_s: float = 0.0) -> None:
            closed.put(threading.current_thread().name)
            super().close(flush_s)

    def interrupt(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is threading.Event.wait.__code__:
            raise KeyboardInterrupt

    for number in range(50):
        loop = MessageLoop(Counted(f"inproc://interrupted-{number}", run=RUN), Endpoint(), "gossipfl-interrupted")
        sys.setprofile(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                loop.start()
        finally:
            sys.setprofile(None)
        loop.stop()
        assert wait_for(lambda: "gossipfl-interrupted" not in {thread.name for thread in threading.enumerate()})
        assert loop.transport._router.closed and closed.qsize() == number + 1


def test_a_round_that_ends_without_mix_is_an_error(peers):
    peer = peers("p0", linear(), roster_of(1), num_samples=1, rounds=3)
    with pytest.raises(RunError, match=r"p0: round 1 ended without peer\.mix"):
        list(peer.rounds())


def test_mix_outside_a_round_is_an_error(peers):
    peer = peers("p0", linear(), roster_of(1), num_samples=1, rounds=1)
    with pytest.raises(RunError, match="mix"):
        peer.mix()
    for _ in peer.rounds():
        peer.mix()
        with pytest.raises(RunError, match="mix"):
            peer.mix()  # the run is over with the first
    with pytest.raises(RunError, match="mix"):
        peer.mix()


def test_a_peer_is_good_for_one_run(peers):
    peer = peers("p0", linear(), roster_of(1), num_samples=1, rounds=1)
    assert list(_mixing(peer)) == [1]
    with pytest.raises(RunError, match="p0"):
        next(peer.rounds())


def test_an_error_of_the_training_function_is_raised_and_closes_the_peer(peers):
    roster = roster_of(1)
    peer = peers("p0", linear(), roster, num_samples=1, rounds=3)
    with pytest.raises(ZeroDivisionError):
        peer.run(lambda model, round_: 1 // 0)
    assert not peer._loop.is_running


def test_a_model_that_changes_its_shape_is_an_error(peers):
    peer = peers("p0", linear(), roster_of(1), num_samples=1, rounds=3)
    with pytest.raises(GossipflError, match="layout"):
        for _ in peer.rounds():
            peer.mix(linear(3))


@pytest.mark.parametrize("setting", ["patience", "join_timeout_s", "linger_s"])
def test_every_wait_has_an_end(setting, peers):
    with pytest.raises(ConfigError, match=setting):
        peers("p0", linear(), roster_of(2), num_samples=1, rounds=3, **{setting: math.inf})


def test_roster_addresses_may_be_of_ipv6(peers):
    if not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    roster = {name: address.replace("127.0.0.1", "[::1]") for name, address in roster_of(2).items()}
    duo = [peers(name, linear(), roster, num_samples=1, rounds=2) for name in roster]
    assert in_threads(lambda peer: list(_mixing(peer)), duo) == [[1, 2]] * 2


# --- what is left over ------------------------------------------------------------------------------------------------


def _num_threads() -> int:
    return sum(thread.name.startswith("gossipfl") for thread in threading.enumerate())


@pytest.mark.parametrize("how", ["to the end", "broken off", "never started", "failed to join", "with"])
def test_no_thread_or_file_is_left(how):
    def once() -> None:
        roster = roster_of(2)
        settings = QUICK | dict(join_timeout_s=0.1 if how == "failed to join" else DEADLINE_S)
        duo = [Peer(name, linear(), roster, num_samples=1, rounds=2, **settings) for name in roster]
        match how:
            case "to the end":
                in_threads(lambda peer: list(_mixing(peer)), duo)
            case "broken off":
                in_threads(lambda peer: next(iter(_mixing(peer))), duo)
            case "failed to join":
                duo[1].close()
                with pytest.raises(RunError):
                    next(duo[0].rounds())
            case "with":
                with duo[0], duo[1]:
                    pass
        if how in ("never started", "broken off"):
            for peer in duo:
                peer.close()
                peer.close()

    once()  # ZeroMQ starts its own threads, torch its own files
    before = open_files()
    assert wait_for(lambda: not _num_threads())
    for _ in range(3):
        once()
    assert wait_for(lambda: open_files() <= before, 5) and not _num_threads()


def test_faults_and_reports_are_kept_for_the_caller(peers):
    roster = roster_of(3)
    trio = [peers(name, linear(), roster, num_samples=1, rounds=4) for name in roster]

    def work(peer: Peer) -> int:
        for round_ in peer.rounds():
            if peer.name == "p2" and round_ == 2:
                break
            peer.mix()
        return len(peer.reports)

    assert in_threads(work, trio) == [4, 4, 1]
    assert all(isinstance(fault, Fault) for peer in trio for fault in peer.faults)
    assert {fault.kind for fault in trio[0].faults} == {"down"}
    assert Data not in {type(report) for report in trio[0].reports}
