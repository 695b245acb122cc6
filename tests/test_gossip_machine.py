"""The machine, sentence by sentence of the paper (arXiv 1908.07782) and row by row of the table in `protocol/gossip.py`."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest

from gossipfl.protocol.gossip import Gossip, GossipConfig, Phase
from gossipfl.protocol.machine import (
    Contribution,
    Fault,
    Finish,
    Forget,
    Merge,
    Merged,
    PeerDown,
    Received,
    Rejected,
    Report,
    RoundReport,
    Send,
    Serve,
    Start,
    StopAfter,
    Train,
    Trained,
    Wake,
)
from gossipfl.protocol.membership import FIRST_ANSWER_S, MAX_CONTACTS, MIN_ANSWER_S
from gossipfl.protocol.messages import NEWEST, Data, Hello, Later, Leave, Pull, Refuse  # fmt: skip

SEGMENTS = ((0, 10), (10, 20), (20, 30), (30, 40))
OTHERS = ("b", "c", "d", "e")


def machine(*, others=OTHERS, num_samples=100, segments=SEGMENTS, **config) -> Gossip:
    settings = dict(rounds=3, segments=segments, layout="L", num_samples=num_samples)
    return Gossip("a", dict.fromkeys(others, len(others)), GossipConfig(**(settings | config)))


def joined(**config) -> Gossip:
    a = machine(**config)
    a.handle(Start(), 0.0)
    for other in a.membership.neighbours:
        actions = a.handle(Received(other, Hello("L", 0, False)), 0.0)
    assert actions == [Train(1)]
    return a


def gathering(**config) -> tuple[Gossip, dict[str, Pull]]:
    """A machine that has trained round 1 in a second, and the pulls that it sent."""
    a = joined(**config)
    return a, pulls(a.handle(Trained(1, 100), 1.0))


def pulls(actions) -> dict[str, Pull]:
    return {action.peer: action.message for action in actions if isinstance(action, Send) and isinstance(action.message, Pull)}


def data(pull: Pull, range_, *, version=None, newest=None, num_samples=100, offset=0, num_bytes=40, total=40, payload="copy"):
    version = pull.version if version is None else version
    return Data(pull.request, version, newest or version, num_samples, range_, offset, total, num_bytes, payload=payload)


def answer_all(a: Gossip, asked: dict[str, Pull], now: float, newest: int | None = None) -> list:
    """Every pull is answered in full; the merges are carried out. All actions that came of it."""
    actions = []
    for peer, pull in asked.items():
        for range_ in pull.ranges:
            actions += a.handle(Received(peer, data(pull, range_, newest=newest)), now)
    for action in [action for action in actions if isinstance(action, Merge)]:
        actions += a.handle(Merged(action.round, action.segment), now)
    return actions


def only(actions, kind):
    return [action for action in actions if isinstance(action, kind)]


# --- the paper's algorithm --------------------------------------------------------------------------------------------


def test_a_worker_first_trains_locally():
    assert joined().phase is Phase.TRAINING


def test_for_each_segment_r_distinct_peers_are_drawn():
    _, asked = gathering(replicas=2)
    copies = Counter(range_ for pull in asked.values() for range_ in pull.ranges)
    assert copies == dict.fromkeys(SEGMENTS, 2)
    assert all(len(set(pull.ranges)) == len(pull.ranges) for pull in asked.values())


def test_the_draw_is_uniform_and_fresh_for_every_segment_and_round():
    a = joined(replicas=1, rounds=200)
    drawn = Counter()
    rows = set()
    for round_ in range(1, 201):
        asked = pulls(a.handle(Trained(round_, 100), 1.0))
        row = {range_: peer for peer, pull in asked.items() for range_ in pull.ranges}
        rows.add(tuple(row[range_] for range_ in SEGMENTS))
        drawn.update((range_, peer) for range_, peer in row.items())
        answer_all(a, asked, 1.0)
    assert len(rows) > 100  # of 4^4 = 256 possible rows
    # each of the 16 counts is binomial(200, 1/4): mean 50, deviation 6.1; four deviations and a half
    assert all(23 <= drawn[range_, peer] <= 77 for range_ in SEGMENTS for peer in OTHERS)


def test_the_seed_decides_the_draw():
    assert gathering(seed=5)[1] == gathering(seed=5)[1] != gathering(seed=6)[1]


def test_only_the_chosen_segments_of_the_same_round_are_pulled():
    _, asked = gathering()
    assert {pull.version for pull in asked.values()} == {1}
    assert all(range_ in SEGMENTS for pull in asked.values() for range_ in pull.ranges)


def test_a_peer_serves_a_pull_once_its_local_training_is_finished():
    a = joined()
    pull = Pull(7, 1, 1, SEGMENTS[:1], "float32", 10.0)
    assert a.handle(Received("b", pull), 0.5) == [Send("b", Later(7, 0))]
    assert Serve("b", pull, 1) in a.handle(Trained(1, 100), 1.0)


def test_a_segment_is_merged_as_soon_as_its_copies_are_in():
    a, asked = gathering(replicas=2)
    holders = [(peer, pull) for peer, pull in asked.items() if SEGMENTS[2] in pull.ranges]
    (first, first_pull), (second, second_pull) = holders
    assert a.handle(Received(first, data(first_pull, SEGMENTS[2])), 1.1) == []
    (merge,) = a.handle(Received(second, data(second_pull, SEGMENTS[2])), 1.2)
    assert (merge.round, merge.segment) == (1, 2)


def test_copies_are_weighted_by_their_numbers_of_samples():
    a, asked = gathering(replicas=1, others=("b",))
    (merge,) = a.handle(Received("b", data(asked["b"], SEGMENTS[0], num_samples=300)), 1.1)
    assert merge.own_weight == 100
    assert merge.contributions == (Contribution("b", "copy", 300.0, 0),)


def test_copies_may_be_weighted_uniformly():
    a, asked = gathering(replicas=1, others=("b",), mixing="uniform")
    (merge,) = a.handle(Received("b", data(asked["b"], SEGMENTS[0], num_samples=300)), 1.1)
    assert (merge.own_weight, merge.contributions[0].weight) == (1.0, 1.0)


def test_metropolis_hastings_weights_sum_to_one_with_the_own_copy():
    a, asked = gathering(selection="all", mixing="metropolis_hastings")
    merges = only(answer_all(a, asked, 1.1), Merge)
    for merge in merges:
        assert [contribution.weight for contribution in merge.contributions] == [1 / 5] * 4
        assert math.isclose(merge.own_weight, 1 / 5)


def test_contributions_are_ordered_by_peer_however_they_arrive():
    a, asked = gathering(replicas=4)
    for peer in reversed(OTHERS):
        actions = a.handle(Received(peer, data(asked[peer], SEGMENTS[0])), 1.1)
    assert [contribution.peer for contribution in actions[0].contributions] == list(OTHERS)


def test_the_next_round_starts_when_every_segment_is_merged():
    a, asked = gathering()
    actions = answer_all(a, asked, 2.0)
    assert len(only(actions, Merge)) == len(SEGMENTS)
    assert actions[-1] == Train(2)
    (report,) = only(actions, Report)
    assert (report.record.round, report.record.segments_mixed, report.record.missing) == (1, 8, 0)
    assert report.record.payload_bytes == 2 * 160  # R x the model


def test_a_lone_peer_trains_with_a_warning():
    a = machine(others=())
    report, train = a.handle(Start(), 0.0)
    assert report.record.kind == "lone" and train == Train(1)
    actions = a.handle(Trained(1, 100), 1.0)
    assert [action.contributions for action in only(actions, Merge)] == [()] * 4


# --- joining ----------------------------------------------------------------------------------------------------------


def test_hello_is_repeated_until_it_is_answered():
    a = machine()
    assert [action.peer for action in a.handle(Start(), 0.0)] == list(OTHERS)
    a.handle(Received("c", Hello("L", 0, False)), 0.5)
    assert [action.peer for action in a.handle(Wake(), a.next_deadline)] == ["b", "d", "e"]


def test_a_quorum_is_enough_when_the_time_to_join_is_over():
    a = machine(quorum=2, join_timeout_s=5)
    a.handle(Start(), 0.0)
    a.handle(Received("b", Hello("L", 0, False)), 0.1)
    a.handle(Received("c", Hello("L", 0, False)), 0.1)
    actions = a.handle(Wake(), 5.0)
    assert actions[-1] == Train(1)
    assert "d, e did not answer" in actions[0].record.detail


def test_without_a_quorum_joining_fails_and_names_the_missing():
    a = machine(quorum=2, join_timeout_s=5)
    a.handle(Start(), 0.0)
    a.handle(Received("b", Hello("L", 0, False)), 0.1)
    (finish,) = a.handle(Wake(), 5.0)
    assert isinstance(finish, Finish) and "c, d, e" in finish.error


@pytest.mark.parametrize("answered", ["b", "bc"])
def test_who_is_still_joining_when_the_run_is_to_stop_soon_begins_or_gives_up(answered):
    a = machine(quorum=2, join_timeout_s=30)
    a.handle(Start(), 0.0)
    for other in answered:
        a.handle(Received(other, Hello("L", 0, False)), 0.1)
    for now in (1.5, 1.9):  # it may be told several times
        a.handle(StopAfter(1), now)
    while a.phase is Phase.JOINING:
        now = a.next_deadline
        actions = a.handle(Wake(), now)
    assert now == 1.5 + MIN_ANSWER_S
    if answered == "b":
        assert actions[0].error.startswith(
            "a: no answer from c, d, e within 3.5 s; they are not there, or have finished already"
        )
    else:
        assert actions[-1] == Train(1) and "d, e did not answer within 3.5 s" in actions[0].record.detail


def test_of_many_who_do_not_answer_ten_are_named():
    a = machine(others=[f"p{number}" for number in range(1, 31)], join_timeout_s=5)
    a.handle(Start(), 0.0)
    (finish,) = a.handle(Wake(), 5.0)
    assert re.fullmatch(r"a: no answer from (p\d+, ){9}p\d+ and 20 more within 5 s; .*", finish.error)


def test_with_too_few_neighbours_left_to_begin_with_joining_fails_and_names_those_gone():
    a = machine(quorum=3)
    a.handle(Start(), 0.0)
    for other in "bcd":
        a.handle(Received(other, Hello("L", 0, False)), 0.0)
    for other in "bc":
        a.handle(PeerDown(other), 0.1)
    (finish,) = a.handle(Received("e", Hello("L", 0, False)), 0.2)
    assert finish == Finish("a: too few neighbours are left to begin with; gone: b, c")


def test_a_neighbour_with_another_layout_is_reported_and_never_drawn():
    a = machine(replicas=3)
    a.handle(Start(), 0.0)
    for other in "bcd":
        a.handle(Received(other, Hello("L", 0, False)), 0.0)
    report, *_, train = a.handle(Received("e", Hello("other", 0, True)), 0.0)
    assert report.record.kind == "layout" and "other" in report.record.detail and train == Train(1)
    assert "e" not in pulls(a.handle(Trained(1, 100), 1.0))


def test_a_late_joiner_adopts_the_newest_model_by_segments_from_several_peers():
    a = machine(versions_kept=4, quorum=3)
    a.handle(Start(), 0.0)
    for other in "bc":
        a.handle(Received(other, Hello("L", 9, False)), 0.0)
    asked = pulls(a.handle(Received("d", Hello("L", 9, False)), 0.0))
    assert len(asked) == 3 and {pull.version for pull in asked.values()} == {9}
    actions = answer_all(a, asked, 0.5)
    assert all(merge.own_weight == 0 and len(merge.contributions) == 1 for merge in only(actions, Merge))
    assert a.phase is Phase.LINGERING or actions[-1] == Train(10)


# --- waiting and replacing --------------------------------------------------------------------------------------------


def test_later_keeps_a_neighbour_waited_for_within_the_patience():
    a, asked = gathering(patience_s=30)
    for peer, pull in asked.items():
        assert a.handle(Received(peer, Later(pull.request, 0)), 1.1) == []
    assert a.next_deadline == 31.0 - MIN_ANSWER_S
    assert pulls(a.handle(Wake(), a.next_deadline)) == asked  # once more, for it may be under way by now
    for peer, pull in asked.items():
        assert a.handle(Received(peer, Later(pull.request, 0)), 29.1) == []
    assert a.next_deadline == 31.0


@pytest.mark.parametrize("trouble", ["refuse", "rejected", "down", "silence"])
def test_the_missing_ranges_are_pulled_from_a_neighbour_not_tried_yet(trouble):
    a, asked = gathering(replicas=1)
    peer, pull = next(iter(asked.items()))
    for other, its_pull in asked.items():
        if other != peer:
            a.handle(Received(other, Later(its_pull.request, 0)), 1.1)
    event, now = {
        "refuse": (Received(peer, Refuse(pull.request, 0, 0)), 1.2),
        "rejected": (Rejected(peer, pull.request, "not finite"), 1.2),
        "down": (PeerDown(peer), 1.2),
        "silence": (Wake(), a.next_deadline),
    }[trouble]
    if trouble == "silence":  # it may be the pull that was lost
        assert [(send.peer, send.message) for send in a.handle(event, now)] == [(peer, pull)]
        now = a.next_deadline
        assert now == 1.0 + FIRST_ANSWER_S + MIN_ANSWER_S
    again = a.handle(event, now)
    assert Forget(peer, pull.request) in again
    replaced = pulls(again)
    assert sorted(range_ for its_pull in replaced.values() for range_ in its_pull.ranges) == sorted(pull.ranges)
    assert peer not in replaced


def test_only_what_is_missing_is_pulled_again():
    a, asked = gathering(replicas=1, others=("b", "c"), seed=1)
    peer, pull = max(asked.items(), key=lambda item: len(item[1].ranges))
    assert len(pull.ranges) > 1
    a.handle(Received(peer, data(pull, pull.ranges[0])), 1.1)
    again = pulls(a.handle(PeerDown(peer), 1.2))
    assert [its.ranges for its in again.values()] == [pull.ranges[1:]]


def test_with_no_neighbour_left_a_segment_is_merged_with_fewer_copies_and_reported():
    a, asked = gathering(replicas=2, others=("b", "c"))
    actions = a.handle(PeerDown("c"), 1.1)
    assert only(actions, Merge) == []
    actions = answer_all(a, {"b": asked["b"]}, 1.2)
    assert [len(merge.contributions) for merge in only(actions, Merge)] == [1] * 4
    (report,) = [a.record for a in only(actions, Report) if isinstance(a.record, RoundReport)]
    assert report.missing == 4


def test_after_the_patience_a_replacement_takes_the_newest_version_and_does_not_wait():
    a, asked = gathering(replicas=1, patience_s=10)
    for peer, pull in asked.items():
        a.handle(Received(peer, Later(pull.request, 0)), 1.1)
    again = pulls(a.handle(Wake(), 11.0))
    assert {(pull.version, pull.oldest) for pull in again.values()} == {(NEWEST, NEWEST)}


def test_a_stale_copy_counts_less_and_is_reported():
    a, asked = gathering(replicas=1, others=("b",), max_staleness=3)
    answer_all(a, asked, 1.1)
    pull = pulls(a.handle(Trained(2, 100), 2.0))["b"]
    assert (pull.version, pull.oldest) == (2, 1)
    (merge,) = a.handle(Received("b", data(pull, SEGMENTS[0], version=1)), 2.1)
    assert merge.contributions[0].weight == 100 * 2**-0.5
    assert a.report.staleness_max == 1


def test_asynchronous_gossip_asks_for_the_newest_at_once():
    _, asked = gathering(max_staleness=math.inf)
    assert {pull.version for pull in asked.values()} == {NEWEST}


def test_after_two_expired_deadlines_a_neighbour_is_drawn_last_until_heard_from():
    a = joined(replicas=1)
    a.membership.neighbours["b"].strikes = 2
    assert a.membership.candidates(at_least=3) == ["c", "d", "e"]
    assert a.membership.candidates(at_least=4) == ["c", "d", "e", "b"]
    a.handle(Received("b", Hello("L", 0, False)), 1.0)
    assert a.membership.candidates(at_least=1) == list(OTHERS)


def test_a_neighbour_that_stays_silent_costs_no_round_more_than_its_patience():
    a = joined(replicas=1, others=("b",), patience_s=3, rounds=5)
    now, waited = 1.0, []
    for round_ in range(1, 6):
        assert pulls(a.handle(Trained(round_, 100), now)), "there is nobody else to ask"
        deadline = a.next_deadline
        merges = only(a.handle(Wake(), deadline), Merge)
        waited.append(deadline - now)
        now = deadline
        for merge in merges:
            a.handle(Merged(merge.round, merge.segment), now)
    assert waited == [3.0] * 5  # and not 5, 10, 20, ...
    assert a.membership.neighbours["b"].strikes == 5


def test_after_the_patience_too_an_answer_is_waited_for_as_long_as_a_healthy_peer_may_take():
    a, asked = gathering(replicas=1, others=("b", "c"), patience_s=10)
    for other in asked:
        a.membership.neighbours[other].strikes = 5
        a.handle(Received(other, Later(asked[other].request, 0)), 1.1)
        a.membership.neighbours[other].strikes = 5
    assert pulls(a.handle(Wake(), 20.5)) and a.next_deadline == 20.5 + 2


def test_a_silent_transfer_is_resumed_at_the_same_neighbour_before_it_is_given_up():
    a, asked = gathering(replicas=1, others=("b",), patience_s=10)
    pull = asked["b"]
    a.handle(Received("b", data(pull, SEGMENTS[0], num_bytes=16)), 1.1)
    (send,) = a.handle(Wake(), a.next_deadline)
    assert send.message.request == pull.request
    assert (send.message.offset, send.message.ranges) == (16, SEGMENTS)
    a.handle(Wake(), a.next_deadline)
    assert a.report.missing == 4


def test_a_first_chunk_that_is_long_in_coming_is_waited_for_as_long_as_its_sender_says_that_it_is_queued():
    """A link of 9 kB/s, say, that a chunk of 90 kB is alone on: nothing comes for 10 s, three times the patience."""
    a, asked = gathering(replicas=2, others=("b", "c"), patience_s=3, segments=((0, 1000),))
    for peer, pull in asked.items():
        a.handle(Received(peer, Later(pull.request, 4000)), 1.1)
    a.handle(Received("b", data(asked["b"], (0, 1000), num_bytes=4000, total=4000)), 6.0)
    now = 6.0
    while now < 11.0:
        now = a.next_deadline
        (again,) = a.handle(Wake(), now)
        assert again == Send("c", asked["c"])
        assert a.handle(Received("c", Later(asked["c"].request, 4000)), now) == []
    (merge,) = a.handle(Received("c", data(asked["c"], (0, 1000), num_bytes=4000, total=4000)), now)
    assert len(merge.contributions) == 2 and a.report.timeouts == 0


def test_a_neighbour_that_only_promises_does_not_hold_the_round():
    a, asked = gathering(replicas=2, others=("b", "c"), patience_s=3, segments=((0, 1000),))
    a.handle(Received("b", data(asked["b"], (0, 1000), num_bytes=4000, total=4000)), 1.5)
    actions, now = a.handle(Received("c", Later(asked["c"].request, 4000)), 1.1), 1.1
    while not only(actions, Merge):
        now = a.next_deadline
        actions = a.handle(Wake(), now)
        if a._transfers:
            actions += a.handle(Received("c", Later(asked["c"].request, 4000)), now)
    assert now <= 1.0 + 3.0 + 2.0 and a.report.timeouts == 1  # the patience, and an answer's time


def test_patience_follows_the_time_that_transfers_take_and_not_that_of_who_stalls():
    a, asked = gathering(replicas=3, others=("b", "c", "d"), segments=((0, 1000),), rounds=5)
    for peer, at in (("b", 9.0), ("c", 9.0), ("d", 301.0)):
        a.handle(Received(peer, Later(asked[peer].request, 4000)), 1.0)
        a.handle(Received(peer, data(asked[peer], (0, 1000), num_bytes=4000, total=4000)), at)
    a.handle(Merged(1, 0), 301.0)
    a.handle(Trained(2, 100), 302.0)
    assert a._patience_end == 302.0 + 4 * 8.0


def test_an_answer_that_comes_after_it_was_given_up_tells_how_long_answers_take():
    a, asked = gathering(replicas=1, others=("b",), segments=((0, 10),), patience_s=30)
    for _ in ("asked again", "given up"):
        actions = a.handle(Wake(), a.next_deadline)
    assert only(actions, Merge) and a.report.timeouts == 1
    a.handle(Received("b", data(asked["b"], (0, 10))), 9.0)
    assert a.membership.neighbours["b"].answer_deadline_s == 8.0 + 4 * 4.0


def test_a_range_whose_beginning_was_lost_may_begin_anew_in_a_newer_version():
    a, asked = gathering(replicas=1, others=("b",), segments=((0, 10),))
    a.handle(Received("b", data(asked["b"], (0, 10), num_bytes=10, offset=30)), 1.1)
    (again,) = pulls(a.handle(Wake(), a.next_deadline)).values()
    actions = a.handle(Received("b", data(again, (0, 10), version=2)), 9.0)
    assert only(actions, Merge) and (a.report.repeated_bytes, a.report.payload_bytes) == (10, 40)


def test_a_transfer_that_progresses_outlives_the_patience():
    a, asked = gathering(replicas=1, others=("b",), patience_s=10, segments=((0, 1000),))
    pull, now = asked["b"], 1.0
    for offset in range(0, 4000, 40):
        now += 4.0
        assert a.next_deadline > now
        actions = a.handle(Received("b", data(pull, (0, 1000), offset=offset, total=4000)), now)
    assert only(actions, Merge) and a.report.repeated_bytes == 0


def test_a_neighbour_that_drips_bytes_does_not_hold_the_round():
    a, asked = gathering(replicas=2, others=("b", "c"), patience_s=10, segments=((0, 1000),))
    answer = data(asked["b"], (0, 1000), num_bytes=4000, total=4000)
    a.handle(Received("b", answer), 1.5)  # 8,000 bytes a second
    now = 1.5
    for offset in range(0, 4000, 10):
        now += 1.0
        actions = a.handle(Received("c", data(asked["c"], (0, 1000), offset=offset, num_bytes=10, total=4000)), now)
        if only(actions, Merge):
            break
    assert now < 12 and a.report.missing == 1 and a.membership.neighbours["c"].strikes == 1


def test_a_late_copy_is_counted_and_changes_nothing():
    a, asked = gathering(replicas=1)
    peer, pull = next(iter(asked.items()))
    a.handle(PeerDown(peer), 1.1)
    assert a.handle(Received(peer, data(pull, pull.ranges[0])), 1.2) == []
    assert (a.report.late, a.report.repeated_bytes) == (1, 40)


def test_what_comes_while_a_peer_trains_counts_towards_the_round_that_it_trains_for():
    a, asked = gathering(replicas=1)
    pull = asked["b"]
    assert answer_all(a, asked, 1.1)[-1] == Train(2)
    a.handle(Received("b", data(pull, pull.ranges[0], num_bytes=30, total=40)), 1.2)  # what was resumed comes twice
    a.handle(Received("b", data(pull, pull.ranges[0], num_bytes=10, offset=30, total=40)), 1.3)
    a.handle(Rejected("b", pull.request, "not finite"), 1.4)
    (report,) = only(answer_all(a, pulls(a.handle(Trained(2, 100), 2.0)), 2.1), Report)
    done = report.record
    assert (done.round, done.repeated_bytes, done.late, done.rejected, done.payload_bytes) == (2, 40, 1, 1, 160)


def test_a_peer_that_changes_its_number_of_samples_is_rejected():
    a, asked = gathering(replicas=1, others=("b",))
    a.handle(Received("b", data(asked["b"], SEGMENTS[0], num_samples=100)), 1.1)
    (report, *_) = a.handle(Received("b", data(asked["b"], SEGMENTS[1], num_samples=10**9)), 1.2)
    assert report.record.kind == "rejected" and "first claimed 100" in report.record.detail


def test_who_is_far_behind_adopts_the_newest_model_and_jumps_to_its_round():
    a, asked = gathering(rounds=20, replicas=1, versions_kept=4)
    (liar, its_pull), (peer, pull) = list(asked.items())[:2]
    a.handle(Received(liar, data(its_pull, its_pull.ranges[0], num_bytes=10, offset=30)), 1.1)  # without what comes before
    actions = a.handle(Received(liar, data(its_pull, its_pull.ranges[0], version=6, newest=10**9)), 1.1)
    assert only(actions, Report) == []  # one neighbour alone is not believed
    actions = a.handle(Received(peer, data(pull, pull.ranges[0], version=6, newest=9)), 1.1)
    assert [record.record.kind for record in only(actions, Report)] == ["behind"]
    asked = pulls(actions)
    assert {its.version for its in asked.values()} == {9} and a.round == 9
    actions = answer_all(a, asked, 1.2)
    assert actions[-1] == Train(10)
    (done,) = [action.record for action in only(actions, Report)]
    assert (done.adopted, done.round, done.train_s, done.wait_s) == (True, 9, 1.0, pytest.approx(0.2))  # none of it is lost
    assert done.repeated_bytes == 10


# --- serving ----------------------------------------------------------------------------------------------------------


def trained_to(round_: int, newest_elsewhere: int | None = 1, **config) -> Gossip:
    a = joined(rounds=round_ + 5, **config)
    for done in range(1, round_ + 1):
        asked = pulls(a.handle(Trained(done, 100), float(done)))
        if done < round_:
            answer_all(a, asked, float(done), newest_elsewhere)
    return a


@pytest.mark.parametrize(("asked_for", "served"), [(3, 3), (6, 6), (1, 3), (NEWEST, 6)])
def test_exactly_the_version_asked_for_is_served_or_else_the_oldest_newer_one(asked_for, served):
    a = trained_to(6, versions_kept=4)
    pull = Pull(1, asked_for, 1, SEGMENTS[:1], "float32", 10.0)
    assert a.handle(Received("b", pull), 9.0) == [Serve("b", pull, served)]


def test_versions_that_no_live_neighbour_can_ask_for_any_more_are_forgotten():
    a = trained_to(6, newest_elsewhere=None, replicas=4)
    assert list(a.desk.versions) == [5, 6]


def test_a_pull_that_takes_an_older_version_is_served_at_once():
    a = trained_to(6)
    pull = Pull(1, 8, 5, SEGMENTS[:1], "float32", 10.0)
    assert a.handle(Received("b", pull), 9.0) == [Serve("b", pull, 6)]


def test_a_pull_too_far_ahead_is_refused():
    a = trained_to(2)
    assert a.handle(Received("b", Pull(1, 7, 7, SEGMENTS[:1], "float32", 10.0)), 9.0) == [Send("b", Refuse(1, 1, 2))]


def test_a_parked_pull_is_dropped_when_it_expires():
    a = joined()
    a.handle(Received("b", Pull(7, 1, 1, SEGMENTS[:1], "float32", 0.4)), 0.5)
    assert only(a.handle(Trained(1, 100), 1.0), Serve) == []


def test_a_repeated_parked_pull_is_served_once():
    a = joined()
    pull = Pull(7, 1, 1, SEGMENTS[:1], "float32", 10.0)
    a.handle(Received("b", pull), 0.5)
    a.handle(Received("b", pull), 0.6)
    assert len(only(a.handle(Trained(1, 100), 1.0), Serve)) == 1


def test_a_neighbour_cannot_park_without_bound():
    a = joined()
    answers = [a.handle(Received("b", Pull(n, 1, 1, SEGMENTS[:1], "float32", 10.0)), 0.5) for n in range(1, 7)]
    assert answers[4] == [Send("b", Refuse(1, 0, 0)), Send("b", Later(5, 0))]
    assert len(only(a.handle(Trained(1, 100), 1.0), Serve)) == 4


@pytest.mark.parametrize("bad", [Pull(1, 1, 1, ((0, 41),), "float32", 1.0), Pull(1, 1, 1, ((0, 40),), "int8", 1.0)])
def test_a_pull_of_what_is_not_there_is_refused_and_reported(bad):
    a, _ = gathering()
    report, refusal = a.handle(Received("b", bad), 1.1)
    assert report.record.kind == "bad_pull" and isinstance(refusal.message, Refuse)
    assert report.record.detail.startswith("b pulls ") and report.record.detail.endswith("; give them one scenario")


def test_a_stranger_is_reported_and_not_served():
    a, _ = gathering()
    (report,) = a.handle(Received("mallory", Pull(1, 1, 1, SEGMENTS[:1], "float32", 1.0)), 1.1)
    assert isinstance(report.record, Fault) and report.record.kind == "stranger"


# --- leaving ----------------------------------------------------------------------------------------------------------


def lingering(**config) -> Gossip:
    a, asked = gathering(rounds=1, **config)
    actions = answer_all(a, asked, 2.0)
    assert [action.peer for action in only(actions, Send) if isinstance(action.message, Leave)] == list(OTHERS)
    return a


def test_a_peer_lingers_and_serves_until_every_live_neighbour_has_left():
    a = lingering()
    pull = Pull(1, 1, 1, SEGMENTS[:1], "float32", 1.0)
    assert a.handle(Received("b", pull), 2.5) == [Serve("b", pull, 1)]
    for other in "bcd":
        assert a.handle(Received(other, Leave(1)), 3.0) == []
    assert a.handle(Received("e", Leave(1)), 3.0) == [Finish()]


def test_a_lost_neighbour_is_not_lingered_for():
    a = lingering()
    for other in "bcd":
        a.handle(Received(other, Leave(1)), 3.0)
    assert a.handle(PeerDown("e"), 3.0)[-1] == Finish()


@pytest.mark.parametrize(("newest", "kinds"), [(1, []), (0, ["down"])])
def test_the_end_of_who_has_finished_is_no_fault_though_its_leave_is_overtaken(newest, kinds):
    a, asked = gathering(rounds=1)
    silent = min(set(OTHERS) - set(asked))
    answer_all(a, asked, 2.0)
    a.handle(Received(silent, Hello("L", newest, False)), 2.0)
    assert [action.record.kind for action in only(a.handle(PeerDown(silent), 3.0), Report)] == kinds


def test_lingering_ends_after_linger_s():
    a = lingering(linger_s=5)
    while a.phase is not Phase.DONE:
        now = a.next_deadline
        actions = a.handle(Wake(), now)
    assert now == 7.0 and actions == [Finish()]


CROWD = tuple(f"n{index}" for index in range(10, 10 + MAX_CONTACTS + 2))
"""The first of them are greeted on joining; the last two are met only if they are drawn, or ask."""


def lingering_in_a_crowd(**config) -> tuple[Gossip, list[str]]:
    """After a round of 2 s, at 2.0, with those two not met; and who had been met."""
    a = machine(others=CROWD, rounds=1, seed=1, **config)
    a.handle(Start(), 0.0)
    for other in CROWD[:MAX_CONTACTS]:
        a.handle(Received(other, Hello("L", 0, False)), 0.0)
    asked = pulls(a.handle(Trained(1, 100), 1.0))
    assert not {*CROWD[-2:]} & {*asked}
    answer_all(a, asked, 2.0)
    assert a.phase is Phase.LINGERING
    return a, list(CROWD[:-2])


def test_neighbours_that_were_never_met_are_lingered_for_as_long_as_the_last_round_took():
    a, met = lingering_in_a_crowd()
    for other in met:
        assert a.handle(Received(other, Leave(1)), 2.5) == []
    assert a.next_deadline == 3.0 and [action.peer for action in a.handle(Wake(), 3.0)] == met  # Leave, once more
    assert a.next_deadline == 4.0 and a.handle(Wake(), 4.0) == [Finish()]


def test_who_was_never_met_and_asks_in_that_time_is_served_to_its_end():
    a, met = lingering_in_a_crowd()
    for other in met:
        a.handle(Received(other, Leave(1)), 2.5)
    pull = Pull(1, 1, 1, SEGMENTS[:1], "float32", 1.0)
    assert a.handle(Received(CROWD[-1], pull), 2.9) == [Serve(CROWD[-1], pull, 1)]
    while a.next_deadline < 8.0:
        assert Finish() not in a.handle(Wake(), a.next_deadline)
    assert a.handle(Received(CROWD[-1], Leave(1)), 8.0) == [Finish()]


def test_who_leaves_and_was_met_too_late_to_be_told_is_told_in_return():
    a, met = lingering_in_a_crowd()
    late, pull = CROWD[-1], Pull(1, 1, 1, SEGMENTS[:1], "float32", 1.0)
    assert a.handle(Received(late, pull), 2.1) == [Serve(late, pull, 1)]
    assert a.handle(Received(late, Leave(1)), 2.2) == [Send(late, Leave(1))]
    assert a.handle(Received(late, Leave(1)), 2.3) == []
    assert a.handle(Received(met[0], Leave(1)), 2.3) == []


def test_nobody_who_was_met_is_left_behind_for_having_been_silent_that_long():
    a, met = lingering_in_a_crowd()
    for other in met[1:]:
        a.handle(Received(other, Leave(1)), 2.5)
    while a.next_deadline < 9.0:
        assert Finish() not in a.handle(Wake(), a.next_deadline)
    assert a.handle(Received(met[0], Leave(1)), 9.0) == [Finish()]


def test_who_was_never_met_is_not_lingered_for_beyond_linger_s():
    a, met = lingering_in_a_crowd(linger_s=1.5)
    for other in met:
        a.handle(Received(other, Leave(1)), 2.5)
    a.handle(Wake(), 3.0)
    assert a.next_deadline == 3.5 and a.handle(Wake(), 3.5) == [Finish()]


def test_leave_is_said_again_less_and_less_often():
    a, times = lingering(linger_s=20), []
    while a.phase is not Phase.DONE:
        now = a.next_deadline
        if only(a.handle(Wake(), now), Send):
            times.append(now)
    assert times == [2.0 + 1, 2.0 + 3, 2.0 + 7, 2.0 + 15]


def test_a_peer_stops_after_the_round_that_it_is_told():
    a, asked = gathering(rounds=10)
    a.handle(StopAfter(1), 1.5)
    answer_all(a, asked, 2.0)
    assert a.phase is Phase.LINGERING


def test_more_than_32_ranges_go_in_several_pulls():
    segments = tuple((i, i + 1) for i in range(100))
    a = joined(others=("b",), replicas=1, segments=segments)
    sent = [action.message for action in a.handle(Trained(1, 100), 1.0) if isinstance(action, Send)]
    assert [len(pull.ranges) for pull in sent] == [32, 32, 32, 4]


# --- those who come later ---------------------------------------------------------------------------------------------


def test_a_peer_that_is_known_to_come_later_is_neither_greeted_nor_waited_for():
    a = machine(late=frozenset({"c"}))
    greeted = {action.peer for action in a.handle(Start(), 0.0)}
    assert greeted == {"b", "d", "e"}
    for other in sorted(greeted):
        actions = a.handle(Received(other, Hello("L", 0, False)), 0.0)
    assert actions == [Train(1)]
    assert "c" not in pulls(a.handle(Trained(1, 100), 1.0))
    a.handle(Received("c", Hello("L", 0, False)), 1.5)
    assert a.membership.neighbours["c"].is_live


def test_a_peer_whose_neighbours_all_come_later_begins_at_once():
    assert machine(late=frozenset(OTHERS)).handle(Start(), 0.0) == [Train(1)]


def test_a_peer_that_everybody_greeted_before_its_start_trains_once():
    a = machine()
    told = [action for other in OTHERS for action in a.handle(Received(other, Hello("L", 0, False)), 0.0)]
    assert [*told, *a.handle(Start(), 0.1)] == [Train(1)]
