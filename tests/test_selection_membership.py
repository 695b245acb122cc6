"""Whom a segment is pulled from, what a peer knows of its neighbours, and how it answers their pulls."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from gossipfl.overlay.selection import SELECTORS, every, fastest, uniform
from gossipfl.protocol.machine import Send, Serve
from gossipfl.protocol.membership import MAX_CONTACTS, Membership, Neighbour
from gossipfl.protocol.messages import NEWEST, Hello, Later, Pull, Refuse
from gossipfl.protocol.serving import MAX_AHEAD, MAX_PARKED, PullDesk

CANDIDATES = ("a", "b", "c", "d", "e")


def rng(seed=0):
    return np.random.default_rng(seed)


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_the_chosen_are_distinct_candidates(replicas):
    generator = rng()
    for _ in range(200):
        chosen = uniform(CANDIDATES, replicas, {}, generator)
        assert len(chosen) == len(set(chosen)) == replicas and set(chosen) <= set(CANDIDATES)


@pytest.mark.parametrize("replicas", [5, 6, 100])
def test_all_are_chosen_where_there_are_no_more(replicas):
    assert uniform(CANDIDATES, replicas, {}, rng()) == list(CANDIDATES)
    assert uniform([], replicas, {}, rng()) == []


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_every_set_of_candidates_is_as_likely(replicas):
    generator, num_draws = rng(1), 3000
    counts = Counter(frozenset(uniform(CANDIDATES, replicas, {}, generator)) for _ in range(num_draws))
    sets = [frozenset(each) for each in combinations(CANDIDATES, replicas)]
    expected = num_draws / len(sets)
    # Pearson's statistic has nearly a chi-square distribution with one degree of freedom less than there are sets: its mean
    # is that number, its deviation the root of twice that; six deviations.
    freedom = len(sets) - 1
    assert sum((counts[each] - expected) ** 2 / expected for each in sets) < freedom + 6 * math.sqrt(2 * freedom)


def test_every_place_is_as_likely():
    """Who comes first is drawn too: nobody is favoured by a name."""
    generator, num_draws = rng(2), 3000
    counts = Counter(uniform(CANDIDATES, 3, {}, generator)[0] for _ in range(num_draws))
    expected = num_draws / 5
    assert sum((counts[name] - expected) ** 2 / expected for name in CANDIDATES) < 4 + 6 * math.sqrt(8)  # as above


def test_the_generator_decides_who_is_chosen():
    def drawn(seed):
        return [tuple(uniform(CANDIDATES, 2, {}, generator)) for generator in [rng(seed)] for _ in range(10)]

    assert drawn(3) == drawn(3) != drawn(4)


def test_all_means_all_however_many_are_asked_for():
    assert every(CANDIDATES, 1, {}, rng()) == list(CANDIDATES)
    assert {name: SELECTORS.get(name) for name in SELECTORS} == {"all": every, "bandwidth": fastest, "uniform": uniform}


# --- membership -------------------------------------------------------------------------------------------------------


def membership(name="m", others="abcxyz", quorum=3):
    return Membership(name, "L", dict.fromkeys(others, 1), quorum)


def test_a_first_answer_is_due_within_five_seconds_and_each_strike_doubles_that():
    neighbour = Neighbour("b")
    deadlines = []
    for strikes in range(4):
        neighbour.strikes = strikes
        deadlines.append(neighbour.answer_deadline_s)
    assert deadlines == [5, 10, 20, 40]


def test_the_deadline_follows_the_answers_as_a_tcp_timeout_follows_round_trips():
    neighbour = Neighbour("b")
    deadlines = []
    for seconds in (2.0, 4.0, 4.0, 0.5):
        neighbour.answered_after(seconds)
        deadlines.append(neighbour.answer_deadline_s)
    # RFC 6298, 2.2 and 2.3: first mean R and deviation R / 2; then deviation += (|mean - R| - deviation) / 4 with the mean
    # before, mean += (R - mean) / 8; timeout = mean + 4 deviation
    #   2.0: mean 2,        deviation 1
    #   4.0: mean 2.25,     deviation 1 + (2 - 1) / 4 = 1.25
    #   4.0: mean 2.46875,  deviation 1.25 + (1.75 - 1.25) / 4 = 1.375
    #   0.5: mean 2.22265625, deviation 1.375 + (1.96875 - 1.375) / 4 = 1.5234375
    assert deadlines == [6.0, 7.25, 7.96875, 8.31640625]
    neighbour.strikes = 2
    assert neighbour.answer_deadline_s == 4 * 8.31640625


def test_a_fast_neighbour_is_still_given_two_seconds():
    neighbour = Neighbour("b")
    neighbour.answered_after(0.001)
    assert neighbour.answer_deadline_s == 2.0
    neighbour.strikes = 3
    assert neighbour.answer_deadline_s == 16.0


def test_who_missed_two_deadlines_in_a_row_is_suspect_until_heard_from():
    neighbour = Neighbour("b")
    suspicion = []
    for _ in range(3):
        neighbour.strikes += 1
        suspicion.append(neighbour.is_suspect)
    neighbour.heard()
    assert (suspicion, neighbour.is_suspect, neighbour.strikes) == ([False, True, True], False, 0)


def test_what_a_neighbour_says_never_takes_its_newest_version_away():
    neighbour = Neighbour("b")
    neighbour.heard(7)
    neighbour.heard(5)
    neighbour.heard()
    assert (neighbour.met, neighbour.newest) == (True, 7)


def test_only_a_hello_brings_back_a_neighbour_that_is_away():
    """Other messages may be the last words of one that has gone."""
    peers = membership()
    neighbour = peers.neighbours["b"]
    neighbour.away = True
    neighbour.heard(7)
    assert not neighbour.is_live
    peers.greeted("b", Hello("L", 7, False))
    assert neighbour.is_live


def test_a_neighbour_that_has_left_still_serves_and_one_of_another_layout_does_not():
    assert Neighbour("b", gone=True).is_live
    assert not Neighbour("b", foreign=True).is_live


def test_the_neighbours_greeted_are_those_that_follow_the_own_name():
    assert [neighbour.name for neighbour in membership("m").contacts] == ["x", "y", "z", "a", "b", "c"]
    assert [neighbour.name for neighbour in membership("A").contacts] == ["a", "b", "c", "x", "y", "z"]
    assert [neighbour.name for neighbour in membership("zz").contacts] == ["a", "b", "c", "x", "y", "z"]
    assert [neighbour.name for neighbour in membership("m", others="zax").contacts] == ["x", "z", "a"]


def test_at_most_sixty_four_neighbours_are_greeted_and_nobody_is_greeted_by_all():
    names = [f"p{index:03}" for index in range(200)]
    greeted = Counter()
    for index, name in enumerate(names):
        contacts = [each.name for each in membership(name, [other for other in names if other != name]).contacts]
        assert contacts == [names[(index + step) % 200] for step in range(1, 65)]
        greeted.update(contacts)
    assert MAX_CONTACTS == 64
    assert greeted == dict.fromkeys(names, 64)


def test_who_has_not_said_hello_has_not_answered():
    peers = membership()
    assert peers.unanswered == ["x", "y", "z", "a", "b", "c"]
    peers.neighbours["y"].heard(3)  # any message, but no Hello
    peers.greeted("z", Hello("L", 0, False))
    assert peers.unanswered == ["x", "y", "a", "b", "c"]


def test_the_quorum_counts_neighbours_that_answered_and_can_be_pulled_from():
    peers = membership(quorum=2)
    assert not peers.has_quorum
    assert peers.greeted("a", Hello("L", 0, True))
    assert not peers.has_quorum
    assert not peers.greeted("b", Hello("another layout", 0, True))
    assert not peers.has_quorum
    assert peers.greeted("c", Hello("L", 0, False))
    assert peers.has_quorum
    peers.neighbours["c"].away = True
    assert not peers.has_quorum


def test_a_quorum_beyond_the_neighbours_greeted_is_all_of_those():
    few = membership(others="ab", quorum=9)
    few.greeted("a", Hello("L", 0, False))
    assert not few.has_quorum
    few.greeted("b", Hello("L", 0, False))
    assert few.has_quorum
    many = membership("p", [f"q{index:03}" for index in range(100)], quorum=90)
    for count, name in enumerate(many.neighbours, start=1):
        many.greeted(name, Hello("L", 0, False))
        assert many.has_quorum == (count >= MAX_CONTACTS)


def test_a_hello_takes_a_neighbour_back_that_had_left_or_had_another_layout():
    peers = membership()
    peers.neighbours["a"].gone = peers.neighbours["a"].foreign = True
    assert peers.greeted("a", Hello("L", 4, False))
    assert (peers.neighbours["a"].gone, peers.neighbours["a"].foreign, peers.neighbours["a"].newest) == (False, False, 4)


def test_the_own_hello_names_the_layout():
    assert membership().hello(3, wants_reply=True) == Hello("L", 3, True)


def test_the_newest_version_known_is_one_that_two_neighbours_with_the_same_layout_have():
    peers = membership()
    assert (peers.newest, membership(others="").newest) == (0, 0)
    for name, layout, newest in (("a", "L", 5), ("b", "L", 7), ("c", "another", 9)):
        peers.greeted(name, Hello(layout, newest, False))
    assert peers.newest == 5


def test_an_only_neighbour_is_believed():
    peers = membership(others="b")
    peers.greeted("b", Hello("L", 5, False))
    assert peers.newest == 5


def test_the_oldest_version_needed_is_that_of_the_live_neighbour_furthest_behind():
    peers = membership(others="abc")
    assert (peers.oldest_needed, membership(others="").oldest_needed) == (0, 0)
    for name, newest in (("a", 5), ("b", 3)):
        peers.greeted(name, Hello("L", newest, False))
    assert peers.oldest_needed == 0  # of c nothing is known
    peers.neighbours["c"].away = True
    assert peers.oldest_needed == 3
    peers.neighbours["b"].foreign = True
    assert peers.oldest_needed == 5


def test_suspects_are_drawn_from_only_where_too_few_others_are_left():
    peers = membership(others="abcdef")
    peers.neighbours["a"].strikes = peers.neighbours["d"].strikes = 2
    peers.neighbours["b"].away = True
    peers.neighbours["c"].foreign = True
    peers.neighbours["e"].gone = True
    assert peers.candidates(at_least=0) == peers.candidates(at_least=2) == ["e", "f"]
    assert peers.candidates(at_least=3) == peers.candidates(at_least=99) == ["e", "f", "a", "d"]


# --- answering pulls --------------------------------------------------------------------------------------------------


def desk(*versions, kept=4):
    filled = PullDesk(kept)
    for version in versions:
        filled.publish(version, 0.0)
    return filled


def a_pull(version, *, request=1, oldest=None, expires_s=10.0):
    return Pull(request, version, version if oldest is None else oldest, ((0, 10),), "float32", expires_s)


def refusal(request, oldest, newest, peer="b"):
    return Send(peer, Refuse(request, oldest, newest))


def test_a_stored_version_is_served_and_no_other():
    full = desk(3, 4, 5)
    for version in (3, 4, 5):
        assert full.answer("b", a_pull(version), 0.0) == [Serve("b", a_pull(version), version)]


def test_for_a_forgotten_version_the_oldest_newer_one_is_served():
    assert desk(1, 2, 3, 4, 5).answer("b", a_pull(1), 0.0) == [Serve("b", a_pull(1), 2)]
    assert desk(3, 7).answer("b", a_pull(5), 0.0) == [Serve("b", a_pull(5), 7)]  # after rounds were jumped over


def test_the_newest_version_is_served_to_who_asks_for_whatever_is_newest():
    pull = a_pull(NEWEST)
    assert desk(3, 4).answer("b", pull, 0.0) == [Serve("b", pull, 4)]
    assert desk().answer("b", pull, 0.0) == [refusal(1, 0, 0)]


def test_only_the_newest_versions_are_kept():
    full = desk(1, 2, 3, 4, 5, kept=3)
    assert (list(full.versions), full.oldest, full.newest) == ([3, 4, 5], 3, 5)
    assert (desk().oldest, desk().newest) == (0, 0)


def test_versions_that_nobody_needs_any_more_are_forgotten():
    full = desk(1, 2, 3)
    full.publish(4, 0.0, needed_from=3)
    assert list(full.versions) == [3, 4]
    full.publish(5, 0.0, needed_from=9)
    assert list(full.versions) == [5]


def test_a_version_not_trained_yet_is_awaited_and_served_once_it_is_there():
    waiting = desk(1)
    first, second, far = a_pull(2), a_pull(2, request=2), a_pull(3)
    assert waiting.answer("b", first, 0.0) == [Send("b", Later(1, 0))]
    assert waiting.answer("c", second, 0.0) == [Send("c", Later(2, 0))]
    assert waiting.answer("d", far, 0.0) == [Send("d", Later(1, 0))]
    assert waiting.publish(2, 1.0) == [Serve("b", first, 2), Serve("c", second, 2)]
    assert waiting.publish(3, 2.0) == [Serve("d", far, 3)]
    assert waiting.publish(4, 3.0) == []


def test_an_older_version_is_served_at_once_to_who_says_that_it_will_do():
    for oldest in (NEWEST, 3, 4):
        pull = a_pull(6, oldest=oldest)
        assert desk(3, 4).answer("b", pull, 0.0) == [Serve("b", pull, 4)]
    assert desk(3, 4).answer("b", a_pull(6, oldest=5), 0.0) == [Send("b", Later(1, 0))]


def test_a_parked_pull_is_served_as_soon_as_its_oldest_acceptable_version_is_there():
    waiting, pull = desk(3), a_pull(6, oldest=5)
    waiting.answer("b", pull, 0.0)
    assert waiting.publish(4, 0.0) == []
    assert waiting.publish(5, 0.0) == [Serve("b", pull, 5)]


def test_who_will_not_wait_is_refused_where_there_is_nothing():
    assert desk().answer("b", a_pull(1, oldest=NEWEST), 0.0) == [refusal(1, 0, 0)]


def test_a_version_too_far_ahead_is_refused():
    assert MAX_AHEAD == 4
    assert desk(2, 3).answer("b", a_pull(7), 0.0) == [Send("b", Later(1, 0))]
    assert desk(2, 3).answer("b", a_pull(8), 0.0) == [refusal(1, 2, 3)]


def test_a_parked_pull_is_dropped_when_it_expires():
    pull = a_pull(2, expires_s=9.0)
    for published_at, actions in ((9.999, [Serve("b", pull, 2)]), (10.0, [])):
        waiting = desk(1)
        waiting.answer("b", pull, 1.0)
        assert waiting.publish(2, published_at) == actions


def test_a_repeated_pull_is_parked_once_and_expires_later():
    waiting = desk(1)
    for now in (0.0, 5.0):
        assert waiting.answer("b", a_pull(2), now) == [Send("b", Later(1, 0))]
    assert waiting.publish(2, 14.0) == [Serve("b", a_pull(2), 2)]


def test_four_pulls_are_parked_for_a_neighbour_and_a_fifth_crowds_out_the_first():
    assert MAX_PARKED == 4
    waiting = desk(1)
    pulls = [a_pull(2, request=request) for request in range(1, 7)]
    for pull in pulls[:4]:
        assert waiting.answer("b", pull, 0.0) == [Send("b", Later(pull.request, 0))]
    assert waiting.answer("c", pulls[0], 0.0) == [Send("c", Later(1, 0))]  # has a place of its own
    assert waiting.answer("b", pulls[3], 0.0) == [Send("b", Later(4, 0))]  # a repeat crowds nobody out
    assert waiting.answer("b", pulls[4], 0.0) == [refusal(1, 1, 1), Send("b", Later(5, 0))]
    assert waiting.answer("b", pulls[5], 0.0) == [refusal(2, 1, 1), Send("b", Later(6, 0))]
    assert waiting.publish(2, 0.0) == [*(Serve("b", pull, 2) for pull in pulls[2:]), Serve("c", pulls[0], 2)]


def test_what_is_parked_for_a_neighbour_that_went_away_is_dropped():
    waiting = desk(1)
    for peer in ("b", "c"):
        waiting.answer(peer, a_pull(2), 0.0)
    waiting.forget("b")
    waiting.forget("nobody")
    assert waiting.publish(2, 0.0) == [Serve("c", a_pull(2), 2)]


def test_when_no_further_version_will_come_the_parked_pulls_are_refused():
    waiting = desk(2, 3)
    waiting.answer("b", a_pull(4), 0.0)
    waiting.answer("c", a_pull(5, expires_s=1.0), 0.0)
    assert waiting.close(2.0) == [refusal(1, 2, 3)]  # that of c has expired
    assert waiting.close(2.0) == []
    assert waiting.answer("b", a_pull(4), 2.0, may_train=False) == [refusal(1, 2, 3)]
    assert waiting.answer("b", a_pull(3), 2.0, may_train=False) == [Serve("b", a_pull(3), 3)]
