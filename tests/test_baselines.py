"""The baselines, sentence by sentence of their papers, as transcripts and as whole runs."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from virtual_host import VirtualHost

import gossipfl
from gossipfl.errors import ConfigError
from gossipfl.overlay.selection import exploring, fastest, random_pairs, random_regular, random_sends
from gossipfl.protocol.baselines import PROTOCOLS
from gossipfl.protocol.gossip import Gossip, GossipConfig, Phase
from gossipfl.protocol.machine import (
    Finish,
    Forget,
    Merge,
    Merged,
    PeerDown,
    Received,
    Report,
    Send,
    Serve,
    Start,
    Train,
    Trained,
    Wake,
)
from gossipfl.protocol.membership import Neighbour
from gossipfl.protocol.messages import NEWEST, Data, Hello, Later, Leave, Pull, Refuse  # fmt: skip
from gossipfl.runtime.gossip_settings import GossipSettings
from gossipfl.scenario.config import load_scenario
from gossipfl.scenario.results import RunResult

SEGMENTS = ((0, 10), (10, 20))
NAMES = ("a", "b", "c", "d", "e", "f")


def machine(protocol: str = "gossip", name: str = "a", names=NAMES, **config: Any) -> Gossip:
    settings = dict(rounds=9, segments=SEGMENTS, layout="L", num_samples=100, mixing="uniform")
    degrees = dict.fromkeys((other for other in names if other != name), len(names) - 1)
    a = PROTOCOLS.get(protocol)(name, degrees, GossipConfig(**(settings | config)), itertools.count(1))
    a.handle(Start(), 0.0)
    for other in degrees:
        actions = a.handle(Received(other, Hello("L", 0, False)), 0.0)
    assert actions == [Train(1)]
    return a


def pulls(actions) -> dict[str, Pull]:
    return {action.peer: action.message for action in actions if isinstance(action, Send) and isinstance(action.message, Pull)}


def only(actions, kind):
    return [action for action in actions if isinstance(action, kind)]


def data(pull: Pull, range_, version: int, *, offset=0, num_bytes=40, total=40) -> Data:
    return Data(pull.request, version, version, 100, range_, offset, total, num_bytes, payload="copy")


def merge_all(a: Gossip, actions, now: float) -> list:
    """Carry out the merges; what follows from them."""
    return [act for merge in only(actions, Merge) for act in a.handle(Merged(merge.round, merge.segment), now)]


def finish_round(a: Gossip, round_: int, asked: dict[str, Pull], times: dict[str, float]) -> list:
    """Everybody who was asked answers in full at his time."""
    actions = []
    for peer in sorted(asked, key=lambda peer: times.get(peer, 0.0)):
        for range_ in asked[peer].ranges:
            came = a.handle(Received(peer, data(asked[peer], range_, round_)), times[peer])
            actions += came + merge_all(a, came, times[peer])
    return actions


def run(folder, clock="virtual", **changes: Any) -> RunResult:
    scenario: dict[str, Any] = {
        "peers": 6,
        "rounds": 4,
        "seed": 3,
        "evaluate_every": 2,
        "training": {"local_steps": 3, "batch_size": 16},
        "gossip": {"segments": 4, "replicas": 2},
    }
    for key, value in changes.items():
        scenario[key] = {**scenario.get(key, {}), **value} if isinstance(value, dict) else value
    return gossipfl.run(scenario, clock=clock, out=folder)


def events(result: RunResult, kind: str) -> list[dict[str, Any]]:
    lines = (result.folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


# --- BACombo ----------------------------------------------------------------------------------------------------------


def links(**rates: float) -> dict[str, SimpleNamespace]:
    return {peer: SimpleNamespace(predicted_rate=rate) for peer, rate in rates.items()}


def test_greedily_the_r_peers_with_the_largest_predicted_bandwidth_are_taken():
    rates = links(b=3.0, c=9.0, d=math.inf, e=1.0, f=5.0)
    rng = np.random.default_rng(0)
    assert [fastest("bcdef", replicas, rates, rng) for replicas in (1, 2, 3, 9)] == [
        ["d"], ["d", "c"], ["d", "c", "f"], ["d", "c", "f", "b", "e"]
    ]  # fmt: skip


def test_among_equal_ones_each_is_as_likely():
    rng = np.random.default_rng(1)
    drawn = Counter(peer for _ in range(2000) for peer in fastest("bcde", 2, links(b=1, c=1, d=1, e=1), rng))
    # each count is binomial(2000, 1/2): mean 1000, deviation 22.4; five of them
    assert all(888 <= drawn[peer] <= 1112 for peer in "bcde")


@pytest.mark.parametrize("exploration", [0.0, 0.3, 1.0])
def test_with_probability_epsilon_the_peers_are_drawn_uniformly(exploration):
    choose, rates = exploring(fastest, exploration), links(b=5, c=4, d=3, e=2)
    rng = np.random.default_rng(2)
    slowest = sum(choose("bcde", 1, rates, rng) == ["e"] for _ in range(4000)) / 4000
    # the slowest of four is only ever explored; a share of 4000 draws deviates by at most 0.007; five of them
    assert slowest == pytest.approx(exploration / 4, abs=0.035 * (exploration > 0))


def test_the_predicted_bandwidth_is_the_mean_of_the_last_five_and_without_limit_before_the_first():
    neighbour = Neighbour("b")
    assert neighbour.predicted_rate == math.inf
    for rate in (1000.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        neighbour.transferred(rate)
    assert neighbour.predicted_rate == 3.0


def test_bytes_over_the_time_since_asking_are_observed_of_those_whose_copies_are_mixed():
    a = machine(selection="bandwidth", exploration=0.0, replicas=5)
    asked = pulls(a.handle(Trained(1, 100), 1.0))
    actions = finish_round(a, 1, asked, {"b": 1.1, "c": 1.2, "d": 1.4, "e": 1.8, "f": 2.0})
    rates = {peer: neighbour.predicted_rate for peer, neighbour in a.membership.neighbours.items()}
    assert rates == pytest.approx({"b": 800, "c": 400, "d": 200, "e": 100, "f": 80})  # two segments of 40 bytes
    assert {copy.peer for merge in only(actions, Merge) for copy in merge.contributions} == set(rates)


def test_the_next_round_pulls_from_the_fastest():
    a = machine(selection="bandwidth", exploration=0.0, replicas=2)
    times = {"b": 0.5, "c": 0.1, "d": 0.4, "e": 0.2, "f": 0.3}
    for round_ in (1, 2, 3, 4):  # two or more a round: after the third round everybody has been tried
        asked = pulls(a.handle(Trained(round_, 100), 10.0 * round_))
        finish_round(a, round_, asked, {peer: 10.0 * round_ + seconds for peer, seconds in times.items()})
    assert set(pulls(a.handle(Trained(5, 100), 50.0))) == {"c", "e"}


def test_the_time_that_a_neighbour_still_trains_is_not_held_against_its_link():
    a = machine(selection="bandwidth", replicas=5)
    asked = pulls(a.handle(Trained(1, 100), 1.0))
    a.handle(Received("b", Later(asked["b"].request, 0)), 1.1)  # not trained yet
    a.handle(Received("b", Later(asked["b"].request, 80)), 5.0)  # now its bytes are queued
    for now, range_ in zip((5.1, 5.2), SEGMENTS, strict=True):
        a.handle(Received("b", data(asked["b"], range_, 1)), now)
    a.handle(Received("c", Later(asked["c"].request, 0)), 1.1)
    for now, range_ in zip((5.0, 5.4), SEGMENTS, strict=True):  # nothing told when the first bytes set out
        a.handle(Received("c", data(asked["c"], range_, 1)), now)
    neighbours = a.membership.neighbours
    assert neighbours["b"].predicted_rate == pytest.approx(80 / 0.2)
    assert neighbours["c"].predicted_rate == pytest.approx(40 / 0.4)


def test_who_falls_silent_is_predicted_to_be_slow():
    a = machine(selection="bandwidth", replicas=5)
    asked = pulls(a.handle(Trained(1, 100), 1.0))
    del asked["f"]
    finish_round(a, 1, asked, dict.fromkeys(asked, 1.1))
    for _ in ("asked again", "given up"):
        a.handle(Wake(), a.next_deadline)
    assert a.membership.neighbours["f"].predicted_rate == 0.0


def test_where_links_differ_following_the_bandwidth_shortens_the_rounds(tmp_path):
    network = {"pair": {"kind": "uniform", "low": "1Mbit", "high": "99Mbit"}, "uplink": "100Mbit"}
    waits = {}
    for selection in ("uniform", "bandwidth"):
        gossip = {"selection": selection, "exploration": 0.0, "segments": 2, "replicas": 2}
        result = run(tmp_path / selection, peers=12, rounds=20, evaluate_every=0, gossip=gossip, network=network)
        waits[selection] = np.mean([event["wait_s"] for event in events(result, "round") if event["round"] > 10])
    assert waits["bandwidth"] < 0.7 * waits["uniform"]


@pytest.mark.parametrize("exploration", [-0.1, 1.5, math.nan])
def test_an_exploration_that_is_no_probability_is_an_error(exploration):
    with pytest.raises(ConfigError, match="exploration"):
        GossipSettings(rounds=1, exploration=exploration)
    with pytest.raises(ConfigError, match=r"gossip\.exploration"):
        load_scenario({"gossip": {"selection": "bandwidth", "exploration": exploration}})


# --- schedules --------------------------------------------------------------------------------------------------------


def sends(senders: dict[str, list[str]]) -> Counter:
    return Counter(sender for row in senders.values() for sender in row)


@pytest.mark.parametrize("num_sent", [1, 3, 5])
def test_each_peer_sends_to_s_distinct_others(num_sent):
    rng = np.random.default_rng(0)
    for _ in range(50):
        senders = random_sends(NAMES, num_sent, rng)
        assert sends(senders) == dict.fromkeys(NAMES, num_sent)
        assert all(len(set(row)) == len(row) and receiver not in row for receiver, row in senders.items())


def test_every_other_peer_is_as_likely_to_be_sent_to():
    rng = np.random.default_rng(1)
    drawn = Counter()
    for _ in range(1000):
        drawn.update((sender, receiver) for receiver, row in random_sends(NAMES, 2, rng).items() for sender in row)
    # each of the 30 counts is binomial(1000, 2/5): mean 400, deviation 15.5; five of them
    assert len(drawn) == 30 and all(322 <= count <= 478 for count in drawn.values())


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
def test_an_oracle_has_each_peer_send_and_be_sent_s_models(degree):
    rng = np.random.default_rng(2)
    drawn = [random_regular(NAMES, degree, rng) for _ in range(10)]
    for senders in drawn:
        assert all(len(set(row)) == degree and receiver not in row for receiver, row in senders.items())
        assert all(receiver in senders[sender] for receiver, row in senders.items() for sender in row)
    assert degree == 5 or any(one != other for one, other in itertools.pairwise(drawn))


@pytest.mark.parametrize(("names", "degree"), [("abcde", 3), ("abc", 3)])
def test_where_no_graph_is_regular_the_error_says_what_to_change(names, degree):
    with pytest.raises(ConfigError, match=rf"gossip\.replicas = {degree} with peers = {len(names)}.*lower it"):
        random_regular(names, degree, np.random.default_rng(0))


@pytest.mark.parametrize("names", [NAMES, NAMES[:5]])
def test_pairs_send_to_each_other_and_of_an_odd_number_one_is_left_out(names):
    rng = np.random.default_rng(3)
    partners = Counter()
    for _ in range(1000):
        senders = random_pairs(names, 1, rng)
        assert sorted(map(len, senders.values())) == [0] * (len(names) % 2) + [1] * (len(names) // 2 * 2)
        assert all(senders[row[0]] == [receiver] for receiver, row in senders.items() if row)
        partners.update((receiver, row[0]) for receiver, row in senders.items() if row)
    # either way 1000 rounds / 5 possible partners: mean 200, deviation 12.6; five of them
    assert all(137 <= partners[pair] <= 263 for pair in itertools.permutations(names, 2))


# --- epidemic learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["epidemic", "epidemic_oracle", "pairs"])
def test_all_peers_draw_the_same_so_that_each_segment_goes_from_each_peer_to_s_others(protocol):
    replicas = 1 if protocol == "pairs" else 2
    sent, rows = Counter(), set()
    for name in NAMES:
        asked = pulls(machine(protocol, name, replicas=replicas).handle(Trained(1, 100), 1.0))
        sent.update((sender, range_) for sender, pull in asked.items() for range_ in pull.ranges)
        rows.add(tuple(tuple(sorted(peer for peer, pull in asked.items() if range_ in pull.ranges)) for range_ in SEGMENTS))
    assert sent == dict.fromkeys(itertools.product(NAMES, SEGMENTS), replicas)
    assert any(first != second for first, second in rows), "each segment goes its own way"


@pytest.mark.parametrize("protocol", ["epidemic", "epidemic_oracle", "pairs"])
def test_the_draw_is_fresh_in_every_round_and_decided_by_the_seed(protocol):
    def asked(seed: int, rounds: int) -> list:
        a = machine(protocol, seed=seed, replicas=2, segments=SEGMENTS[:1])
        drawn = []
        for round_ in range(1, rounds + 1):
            actions = a.handle(Trained(round_, 100), float(round_))
            drawn.append(sorted(pulls(actions)))
            merge_all(a, actions, float(round_))
            finish_round(a, round_, pulls(actions), dict.fromkeys(NAMES, round_ + 0.1))
        return drawn

    assert asked(1, 8) == asked(1, 8) != asked(2, 8)
    assert len(set(map(tuple, asked(1, 8)))) > 2


def epidemic_round(num_senders: int) -> tuple[Gossip, dict[str, Pull], list]:
    """A machine to which this many send, its pulls and all its actions at the end of training."""
    for seed in range(100):
        a = machine("epidemic", seed=seed, replicas=2, segments=SEGMENTS[:1])
        actions = a.handle(Trained(1, 100), 1.0)
        if len(pulls(actions)) == num_senders:
            return a, pulls(actions), actions
    raise AssertionError(f"no seed in a hundred has {num_senders} send to a")


@pytest.mark.parametrize("num_senders", [1, 2, 3])
def test_whatever_was_sent_is_averaged_uniformly_with_the_own_model(num_senders):
    a, asked, _ = epidemic_round(num_senders)
    (merge,) = only(finish_round(a, 1, asked, dict.fromkeys(asked, 1.1)), Merge)
    assert merge.own_weight == 1.0 and {copy.peer: copy.weight for copy in merge.contributions} == dict.fromkeys(asked, 1.0)


def test_who_was_sent_nothing_keeps_its_model_and_goes_on_at_once():
    a, _, actions = epidemic_round(0)
    assert only(actions, Merge) == [Merge(1, 0, (), 1.0)]
    assert merge_all(a, actions, 1.0)[-1] == Train(2)


def test_nobody_stands_in_for_a_sender_that_is_gone():
    a, asked, _ = epidemic_round(2)
    lost, other = sorted(asked)
    actions = a.handle(PeerDown(lost), 1.1)
    assert pulls(actions) == {} and Forget(lost, asked[lost].request) in actions
    (merge,) = only(a.handle(Received(other, data(asked[other], SEGMENTS[0], 1)), 1.2), Merge)
    assert [copy.peer for copy in merge.contributions] == [other]
    (report,) = only(a.handle(Merged(1, 0), 1.2), Report)
    assert report.record.missing == 1


def test_a_sender_that_is_known_to_be_gone_is_not_asked():
    for seed in range(100):
        a = machine("epidemic", seed=seed, replicas=2, segments=SEGMENTS[:1])
        a.handle(PeerDown("b"), 0.5)
        assert "b" not in pulls(a.handle(Trained(1, 100), 1.0))


@pytest.mark.parametrize("protocol", ["epidemic", "epidemic_oracle", "pairs"])
def test_who_draws_for_everybody_must_be_linked_to_everybody(protocol):
    with pytest.raises(ConfigError, match=r"b has 1 neighbours and a has 2.*topology\.kind = 'full'"):
        PROTOCOLS.get(protocol)("a", {"b": 1, "c": 2}, GossipConfig(1, SEGMENTS, "L", 1), itertools.count())
    with pytest.raises(ConfigError, match=rf"topology\.kind = 'ring' gives p0 2 neighbours.*{protocol}.*set topology\.kind"):
        load_scenario({"peers": 8, "topology": {"kind": "ring"}, "gossip": {"protocol": protocol}})


def test_a_late_joiner_adopts_the_newest_model_from_anybody():
    degrees = dict.fromkeys(NAMES[1:], len(NAMES) - 1)
    a = PROTOCOLS.get("epidemic")("a", degrees, GossipConfig(20, SEGMENTS, "L", 100), itertools.count(1))
    a.handle(Start(), 0.0)
    actions = [action for other in degrees for action in a.handle(Received(other, Hello("L", 9, False)), 0.0)]
    asked = pulls(actions)
    assert len(asked) == len(SEGMENTS) and {pull.version for pull in asked.values()} == {9}
    assert finish_round(a, 9, asked, dict.fromkeys(asked, 0.1))[-1] == Train(10)


@pytest.mark.parametrize(
    "gossip",
    [{"protocol": "epidemic"}, {"protocol": "epidemic_oracle"}, {"protocol": "pairs", "codec": "randomk:0.2"}],
    ids=str,
)
def test_a_run_comes_to_the_same_models_as_over_sockets(tmp_path, gossip):
    virtual = run(tmp_path / "virtual", gossip=gossip)
    local = run(tmp_path / "local", clock="local", gossip=gossip)
    assert virtual.summary["models_sha256"] == local.summary["models_sha256"]
    assert virtual.summary["bytes"]["payload"] == local.summary["bytes"]["payload"] > 0
    assert virtual.summary["faults"]["missing_segments"] == local.summary["faults"]["missing_segments"] == 0


def random_vectors(num_peers: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"p{index:02d}": rng.standard_normal(512).astype(np.float32) for index in range(num_peers)}


def distance(vectors) -> float:
    rows = np.stack(list(vectors)).astype(np.float64)
    return float(((rows - rows.mean(axis=0)) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize(("protocol", "replicas"), [("epidemic_oracle", 2), ("epidemic_oracle", 5), ("pairs", 1)])
def test_where_all_send_and_are_sent_as_many_the_average_stays_and_the_peers_come_together(monkeypatch, protocol, replicas):
    """Each new model is the mean of R + 1 of the N, drawn without replacement: the mean squared distance from the average
    shrinks to (N - R - 1) / ((N - 1) (R + 1)) of what it was."""
    monkeypatch.setattr("virtual_host.Gossip", PROTOCOLS.get(protocol))
    n, ratios = 16, []
    for seed in range(10):
        vectors = random_vectors(n, seed)
        models = VirtualHost(vectors, 1, replicas=replicas, seed=seed, mixing="uniform").run().models()
        ratios.append(distance(models.values()) / distance(vectors.values()))
        assert np.mean(list(models.values()), axis=0) == pytest.approx(np.mean(list(vectors.values()), axis=0), abs=1e-6)
    assert np.mean(ratios) == pytest.approx((n - replicas - 1) / ((n - 1) * (replicas + 1)), rel=0.05)


# --- asynchronous fragments -------------------------------------------------------------------------------------------


def training(round_: int = 2, **config: Any) -> tuple[Gossip, dict[str, Pull]]:
    """A machine in the training of this round, and the fragments that it has asked for meanwhile."""
    a, following = machine("fragments", **({"replicas": 1} | config)), []
    for trained in range(1, round_):
        for peer, pull in pulls(following).items():  # nobody has anything yet
            a.handle(Received(peer, Refuse(pull.request, 0, 0)), trained - 0.5)
        actions = a.handle(Trained(trained, 100), float(trained))
        following = merge_all(a, actions, float(trained))
        assert Train(trained + 1) in following
    return a, pulls(following)


def test_a_node_trains_on_without_waiting_and_asks_for_fragments_meanwhile():
    a, asked = training()
    assert a.phase is Phase.TRAINING and a.round == 2
    assert Counter(range_ for pull in asked.values() for range_ in pull.ranges) == dict.fromkeys(SEGMENTS, 1)
    assert {(pull.version, pull.oldest) for pull in asked.values()} == {(NEWEST, NEWEST)}


def test_before_the_first_round_there_is_nothing_to_ask_for():
    assert pulls(machine("fragments").handle(Trained(1, 100), 1.0)) == {}


def test_what_came_while_training_is_averaged_in_when_it_is_done():
    a, asked = training(replicas=5)
    for peer in ("c", "d"):
        for range_ in asked[peer].ranges:
            assert a.handle(Received(peer, data(asked[peer], range_, 1)), 1.5) == []
    merges = only(a.handle(Trained(2, 100), 2.0), Merge)
    assert [(merge.segment, merge.own_weight) for merge in merges] == [(0, 1.0), (1, 1.0)]
    assert {tuple(copy.peer for copy in merge.contributions) for merge in merges} == {("c", "d")}


def test_each_copy_is_mixed_once():
    a, asked = training(replicas=5)
    a.handle(Received("c", data(asked["c"], SEGMENTS[0], 1)), 1.5)
    following = merge_all(a, a.handle(Trained(2, 100), 2.0), 2.0)
    assert Train(3) in following
    assert all(not merge.contributions for merge in only(a.handle(Trained(3, 100), 3.0), Merge))


def test_what_is_still_on_its_way_holds_up_nobody_and_its_sender_is_spared_meanwhile():
    a, asked = training(replicas=5)
    for peer in ("b", "c", "d", "e"):
        for range_ in asked[peer].ranges:
            a.handle(Received(peer, data(asked[peer], range_, 1)), 1.5)
    following = merge_all(a, a.handle(Trained(2, 100), 2.0), 2.0)
    assert Train(3) in following and set(pulls(following)) == {"b", "c", "d", "e"}
    a.handle(Received("f", data(asked["f"], SEGMENTS[0], 1)), 2.5)
    merges = only(a.handle(Trained(3, 100), 3.0), Merge)
    assert [[copy.peer for copy in merge.contributions] for merge in merges] == [["f"], []]


def test_a_fragment_may_be_of_any_age():
    a, asked = training(round_=8, replicas=5, staleness_exponent=0)
    a.handle(Received("b", data(asked["b"], SEGMENTS[0], 1)), 7.5)
    a.handle(Received("c", data(asked["c"], SEGMENTS[0], 40)), 7.5)
    merge = only(a.handle(Trained(8, 100), 8.0), Merge)[0]
    assert {copy.peer: (copy.staleness, copy.weight) for copy in merge.contributions} == {"b": (7, 1.0), "c": (0, 1.0)}


@pytest.mark.parametrize("loss", ["silence", "down", "refused"])
def test_a_fragment_that_does_not_come_is_done_without(loss):
    a, asked = training(replicas=5)
    match loss:
        case "silence":
            while a._transfers:
                a.handle(Wake(), a.next_deadline)
        case "down":
            a.handle(PeerDown("b"), 1.5)
        case "refused":
            a.handle(Received("b", Refuse(asked["b"].request, 0, 0)), 1.5)
    actions = a.handle(Trained(2, 100), 200.0)
    assert Train(3) in merge_all(a, actions, 200.0)


def test_a_node_that_has_published_serves_whoever_asks_for_its_newest():
    a, _ = training()
    pull = Pull(7, NEWEST, NEWEST, SEGMENTS, "float32", 1.0)
    assert a.handle(Received("b", pull), 1.5) == [Serve("b", pull, 1)]


def test_after_its_last_round_a_node_wants_no_more():
    a, asked = training(rounds=2)
    actions = merge_all(a, a.handle(Trained(2, 100), 2.0), 2.0)
    assert {action.peer for action in only(actions, Forget)} == set(asked)
    assert Send("b", Leave(2)) in actions and a.phase is Phase.LINGERING
    assert Finish() in [action for name in NAMES[1:] for action in a.handle(Received(name, Leave(2)), 3.0)]


def test_nobody_waits_for_a_slow_link_or_a_slow_peer(tmp_path):
    """Three steps of 0.1 s a round; one peer takes ten times as long, and another sends a model in 40 s."""
    result = run(
        tmp_path / "run",
        gossip={"protocol": "fragments"},
        network={"peers": {"p1": {"uplink": "1kB"}}, "latency": "5ms"},
        compute={"step_time": "100ms", "stragglers": {"peers": ["p2"], "slowdown": 10}},
    )
    last = {event["peer"]: event["time_s"] for event in events(result, "round") if event["round"] == 4}
    assert result.exit_code == 0 and last.pop("p2") == pytest.approx(4 * 3.0, abs=0.02)
    assert list(last.values()) == pytest.approx([4 * 0.3] * 5, abs=0.02)
    assert all(event["wait_s"] == 0 for event in events(result, "round"))
    mixed = [event["segments_mixed"] for event in events(result, "round") if event["peer"] == "p0"]
    assert mixed[0] == 0 and min(mixed[1:]) > 0


def test_fragments_bring_the_peers_together(tmp_path):
    data = {"partition": {"kind": "dirichlet", "alpha": 0.3}}
    alone, together = (
        run(tmp_path / name, rounds=12, data=data, gossip={"protocol": name}, network={"latency": "5ms"}).summary
        for name in ("local", "fragments")
    )
    assert together["consensus_distance"]["last"] < 0.5 * alone["consensus_distance"]["last"]
    assert together["accuracy"]["mean"] > alone["accuracy"]["mean"]


@pytest.mark.parametrize("gossip", [{"protocol": "fragments"}, {"selection": "bandwidth"}], ids=str)
def test_what_depends_on_timing_runs_over_sockets_too(tmp_path, gossip):
    result = run(tmp_path / "run", clock="local", gossip=gossip)
    assert result.exit_code == 0 and len(events(result, "round")) == 6 * 4


# --- who comes late, or back ---------------------------------------------------------------------------------------------


CHURN = {
    "kill": [{"peer": "p0", "at": "3.2s"}],
    "rejoin": [{"peer": "p0", "at": "5.2s"}],
    "join": [{"peer": "p5", "at": "2.6s"}],
}


def churned(folder, protocol: str) -> list[dict[str, Any]]:
    """The rounds of a run in which the first peer is back when others are ten rounds on, and the last comes after five."""
    compute = {"step_time": "100ms"}
    result = run(folder, rounds=16, evaluate_every=1, gossip={"protocol": protocol}, compute=compute, churn=CHURN,
                 training={"local_steps": 5})  # fmt: skip
    assert result.exit_code == 0
    return events(result, "round")


def test_a_client_of_fedavg_that_comes_late_takes_over_the_average(tmp_path):
    rounds = churned(tmp_path / "run", "fedavg")
    (joined,) = [event for event in rounds if event["peer"] == "p5" and event["adopted"]]
    assert set(joined["received_from"]) == {"p0"} and joined["payload_bytes"] > 0
    assert joined["accuracy_after"] == max(e["accuracy_after"] for e in rounds if e["peer"] == "p0" and e["time_s"] < 2.6)


def test_a_server_of_fedavg_that_is_back_goes_on_from_what_the_clients_have(tmp_path):
    rounds = churned(tmp_path / "run", "fedavg")
    (back,) = [event for event in rounds if event["peer"] == "p0" and event["adopted"]]
    meanwhile = [event["accuracy_after"] for event in rounds if 4.0 < event["time_s"] < 5.2]
    afterwards = [event["accuracy_after"] for event in rounds if event["time_s"] > 5.2]
    assert set(back["received_from"]) <= {"p1", "p2", "p3", "p4", "p5"} and back["payload_bytes"] > 0
    assert min(afterwards) >= min(meanwhile)


def test_who_trains_alone_and_comes_late_takes_nothing_from_anybody(tmp_path):
    rounds = churned(tmp_path / "run", "local")
    assert all(event["payload_bytes"] == 0 and not event["adopted"] for event in rounds)
    assert [event["round"] for event in rounds if event["peer"] == "p5"] == list(range(1, 17))
