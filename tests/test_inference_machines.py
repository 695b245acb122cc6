"""The machines of a device and of its server: what they say to what they hear, and whole runs of both under virtual time."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossipfl.errors import PlanError, RemoteProtocolError
from gossipfl.inference.planning import offers
from gossipfl.inference.planning.answering import PLAN_S, Answerer, ServerConfig
from gossipfl.inference.planning.asking import AUDIT_S, MAX_AUDITS, Asker, _Asked
from gossipfl.inference.planning.device_words import (
    Audited,
    Fail,
    Forget,
    Found,
    HeadDone,
    Load,
    Loaded,
    LookUp,
    Question,
    Report,
    Resolve,
    RunHead,
    Send,
    SetAside,
    Unload,
    Upload,
)
from gossipfl.inference.planning.fetching import MAX_REFUSED, MAX_REJECTIONS, DeviceConfig
from gossipfl.inference.planning.offers import Ask, Failure, LayerOffer, Manifest, missing, pieces, split
from gossipfl.inference.planning.profile import DeviceProfile, LayerProfile, ModelProfile, Plan, Prediction, Stage
from gossipfl.inference.planning.remembered import OVERHEAD_BYTES, First
from gossipfl.inference.planning.server_words import (
    Caller,
    Discard,
    Drain,
    Finish,
    Heard,
    Keep,
    MakePlan,
    Planned,
    Published,
    Ran,
    Reply,
    Retire,
    RunAgain,
    RunStage,
    Serve,
)
from gossipfl.protocol.machine import PeerDown, PeerUp, Received, Rejected, Start, Wake
from gossipfl.protocol.messages import (  # fmt: skip
    FULL_BITS,
    NEWEST,
    Activation,
    Continuation,
    Data,
    Failed,
    Later,
    Offer,
    PlanRequest,
    Pull,
    Refuse,
    Result,
)
from gossipfl.segments.codecs.planes import Planes, PlaneSet

PROFILE = ModelProfile(
    (
        LayerProfile("a", "conv2d", (0, 64), (64, 68), 4, 100, ((4, 2),)),
        LayerProfile("b", "linear", (68, 132), None, 8, 64, ((8,), (4,))),
        LayerProfile("c", "linear", (132, 164), (164, 168), 4, 32, ((4,),)),
    ),
    (3, 3),
    4,
)
PATIENCE, WAIT = 5.0, 60.0


def manifest(version=1, cut=3, bits=4, activation_bits=None, threshold=0.0, **changes) -> Manifest:
    layers = tuple(
        LayerOffer(
            Planes(0, bits, layer.group).name,
            tuple(f"{layer.name}{version}.{k}" for k in range(bits)),
            f"{layer.name}{version}.bias" if layer.bias else None,
        )
        for layer in PROFILE.layers[:cut]
    )
    if activation_bits is None:
        activation_bits = 8 if cut < 3 else 0
    prediction = Prediction(0.01, 0.01, 0.0, 0.0, 0.0, 0.01, 10, 10, 10, 0.01)
    stages = (Stage("device", 0, cut, tuple(layer.codec for layer in layers)),)
    plan = Plan(version, stages, cut, (bits,) * cut, activation_bits, prediction, changes.pop("fallback", "full"))
    return Manifest("m", version, "L", plan, layers, threshold, **changes)


def digests(of: Manifest) -> frozenset[str]:
    return frozenset(piece.digest for piece in pieces(of, PROFILE))


# --- offers -----------------------------------------------------------------------------------------------------------


def test_asks_and_manifests_come_back_from_json_as_they_went():
    described = Ask(
        DeviceProfile("d", uplink=1e6, memory_bytes=5), 0.02, 7, 60.0, (4, 6), refused={"int8": "too slow", "bf16": "not there"}
    )
    for ask in (Ask(DeviceProfile()), described):
        assert offers.ask_from_json(offers.to_json(ask)) == ask
    for offer in (
        manifest(),
        manifest(2, 0),
        manifest(4, 1, fallback="continued"),
        manifest(3, 2, 16, threshold=math.inf, alpha=0.02, delta=0.05, scale="logits"),
    ):
        assert offers.manifest_from_json(offers.to_json(offer)) == offer


@pytest.mark.parametrize(
    "garbage",
    [b"", b"[", b"{}", b"null", b"\xff", b"[" * 100_000, b'{"a": NaN}', b"9" * 5000, b'"text"', b'{"device": {}}'],
)
def test_what_is_no_ask_and_no_manifest_is_refused(garbage):
    for read in (offers.ask_from_json, offers.manifest_from_json):
        with pytest.raises(RemoteProtocolError):
            read(garbage)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b'"speed":1.0', b'"speed":' + b"1" * 400, "no ask: ask.device.speed = 1111.* is not a number of at most 63 bits"),
        (b'"speed":1.0', b'"speed":1e999', "no ask: 1e999 is no number"),
        (b'"held":0', b'"held":9223372036854775808', "no ask: ask.held = 9223372036854775808 is not a whole number of at most"),
        (b'"cached":[]', b'"cached":[4,4.5]', r"no ask: ask.cached\[1\] = 4.5 is not a whole number"),
        (b'"held":0', b'"hold":0', "no ask: ask = .* is not a table of device, max_accuracy_loss, held"),
    ],
)
def test_an_ask_that_cannot_be_is_refused_by_the_name_of_what_is_wrong(old, new, says):
    valid = offers.to_json(Ask(DeviceProfile()))
    assert valid.count(old) == 1
    with pytest.raises(RemoteProtocolError, match=says):
        offers.ask_from_json(valid.replace(old, new))


def test_twenty_thousand_mutated_manifests_are_manifests_or_refused():
    chance = random.Random(0)
    valid = [offers.to_json(offer) for offer in (manifest(), manifest(2, 1, 6, alpha=0.1))]
    accepted = 0
    for _ in range(20_000):
        content = bytearray(chance.choice(valid))
        for _ in range(chance.randint(1, 3)):
            position = chance.randrange(len(content))
            match chance.randrange(3):
                case 0:
                    content[position] = chance.choice(b'0123456789-"[]{},:.eEnull')
                case 1:
                    del content[position : position + chance.randint(1, 9)]
                case 2:
                    content[position:position] = chance.choice([b"null", b"1e999", b"-1", b'""', b"[]", b"true", b"0.5"])
        try:
            offer = offers.manifest_from_json(bytes(content))
            assert offers.manifest_from_json(offers.to_json(offer)) == offer
            offer.check(PROFILE, "L")
        except (RemoteProtocolError, PlanError):
            continue
        accepted += 1
    assert 100 < accepted < 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "other"}, "layout other.*build the same model"),
        ({"version": 0}, "version 0"),
        ({"version": 2}, "version 2 with a plan for version 1"),
        ({"plan": replace(manifest().plan, cut=4)}, "a cut after 4 of 3 layers"),
        ({"plan": replace(manifest().plan, cut=-1)}, "a cut after -1"),
        ({"plan": replace(manifest().plan, weight_bits=(4, 4))}, "2 weight bits and 3 layers"),
        ({"plan": replace(manifest().plan, weight_bits=(4, 4, 17))}, "4 planes as .* for 17 bits of layer 'c'"),
        ({"plan": replace(manifest().plan, activation_bits=8)}, "activation_bits = 8"),
        ({"layers": manifest().layers[:2]}, "3 weight bits and 2 layers"),
        ({"layers": manifest(bits=5).layers}, "5 planes as 'planes:0-5:16' for 4 bits of layer 'a'"),
        ({"layers": (replace(manifest().layers[0], bias=None), *manifest().layers[1:])}, "layer 'a' has a bias"),
        ({"threshold": -0.1}, "threshold = -0.1"),
        ({"alpha": 0.0}, "alpha = 0.0"),
        ({"alpha": 0.1, "delta": 1.5}, "delta = 1.5"),
    ],
)
def test_an_offer_that_does_not_add_up_is_refused(changes, message):
    with pytest.raises(PlanError, match=message):
        replace(manifest(), **changes).check(PROFILE, "L")


def test_offers_that_add_up_are_taken():
    for cut, activation_bits in ((3, 0), (2, 8), (1, 32), (0, 32), (0, 8)):
        manifest(cut=cut, activation_bits=activation_bits).check(PROFILE, "L")


def test_what_is_missing_is_pulled_once_and_planes_that_follow_each_other_together():
    offer = manifest(bits=6)
    everything = digests(offer)
    assert missing(offer, PROFILE, everything) == {}
    assert missing(offer, PROFILE, frozenset()) == {
        "planes:0-6:16": [(0, 64)],
        "planes:0-6:8": [(68, 132), (132, 164)],
        "float32": [(64, 68), (164, 168)],
    }
    four_bits = everything - {"a1.4", "a1.5", "b1.2"}
    assert missing(offer, PROFILE, four_bits) == {"planes:4-6:16": [(0, 64)], "planes:2-3:8": [(68, 132)]}


@given(st.integers(0, 15), st.integers(1, 16), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_pulled_planes_come_apart_into_the_pieces_that_are_cached(start, length, groups):
    stop = min(16, start + length)
    values = np.random.default_rng(start).standard_normal(9 * groups).astype(np.float32)
    payload = Planes(start, stop, 9).encode(values)
    parts = list(split(f"planes:{start}-{stop}:9", (5, 5 + values.size), payload))
    assert [piece.codec for piece, _ in parts] == [f"planes:{k}-{k + 1}:9" for k in range(start, stop)]
    assert b"".join(part for _, part in parts) == bytes(payload)
    for piece, part in parts:
        assert part == Planes.of(piece.codec).encode(values)
    if not start:
        held = PlaneSet(values.size, 9)
        for piece, part in parts:
            held.add(piece.codec, part)
        np.testing.assert_array_equal(held.decode(), Planes(0, stop, 9).decode(payload, values.size).values)


# --- the device's machine ---------------------------------------------------------------------------------------------


def asker(servers=("s0", "s1"), **config) -> Asker:
    settings_ = dict(patience_s=PATIENCE, wait_s=WAIT) | config
    return Asker(DeviceConfig(**settings_), {peer: f"tcp://{peer}" for peer in servers}, PROFILE, itertools.count(1))


def sent(actions, kind):
    """(peer, message) of that kind."""
    return [
        (action.peer, action.message) for action in actions if isinstance(action, Send) and isinstance(action.message, kind)
    ]


def of(actions, kind):
    return [action for action in actions if isinstance(action, kind)]


def offered(machine, offer, now=0.0, peer="s0"):
    """The machine has been started; its plan request is answered with `offer`."""
    plan = machine.fetcher._plan
    return machine.handle(Received(peer, Offer(plan.request, 0, 1, payload=offer)), now)


def ready(offer=None, servers=("s0", "s1"), **config) -> Asker:
    """A machine that has loaded `offer`, all of whose pieces were cached."""
    machine = asker(servers, **config)
    machine.handle(Start(), 0.0)
    switch(machine, offer or manifest())
    return machine


def switch(machine, offer, now=0.0):
    offered(machine, offer, now)
    assert machine.handle(Found(offer.version, digests(offer)), now) == [Load(offer)]
    return machine.handle(Loaded(offer.version), now)


def data(pull, range_=None, offset=0, num_bytes=None, total=100):
    range_ = range_ or pull.ranges[0]
    return Data(pull.request, pull.version, pull.version, 0, range_, offset, total, num_bytes or total)


def test_a_plan_is_asked_for_and_again_for_what_comes_after_it():
    machine = asker()
    ((peer, request),) = sent(machine.handle(Start(), 0.0), PlanRequest)
    assert peer == "s0" and request.payload == Ask(DeviceProfile(), None, 0, WAIT), "there may be none yet"
    actions = offered(machine, manifest())
    assert actions[0] == LookUp(manifest())
    ((peer, request),) = sent(actions, PlanRequest)
    assert peer == "s0" and request.payload == Ask(DeviceProfile(), None, 1, WAIT, (4, 4, 4)), "the server may wait"
    assert machine.handle(Found(1, digests(manifest())), 0.1) == [Load(manifest())]
    assert machine.fetcher.active is None
    assert machine.handle(Loaded(1), 0.2) == [] and machine.fetcher.active == manifest()
    machine.handle(Received("s0", Later(request.request, 0)), 0.2)
    assert machine.next_deadline == 0.2 + WAIT + PATIENCE


def test_who_does_not_answer_a_plan_request_is_left_alone_and_another_is_asked():
    machine = asker()
    ((_, first),) = sent(machine.handle(Start(), 0.0), PlanRequest)
    assert machine.next_deadline == PATIENCE and machine.handle(Wake(), PATIENCE - 0.1) == []
    actions = machine.handle(Wake(), PATIENCE)
    assert Forget("s0", first.request) in actions and [r.source for r in of(actions, Report)] == ["tcp://s0"]
    assert [peer for peer, _ in sent(actions, PlanRequest)] == ["s1"]
    actions = machine.handle(PeerDown("s1"), PATIENCE + 1.0)
    assert [peer for peer, _ in sent(actions, PlanRequest)] == ["s0"], "its time alone is over"
    actions = machine.handle(PeerDown("s0"), PATIENCE + 1.1)
    assert not sent(actions, PlanRequest) and PATIENCE + 1.1 < machine.next_deadline < PATIENCE + 2
    assert [peer for peer, _ in sent(machine.handle(Wake(), machine.next_deadline), PlanRequest)] == ["s1"]


def test_what_is_missing_is_pulled_and_then_loaded():
    machine = asker()
    machine.handle(Start(), 0.0)
    offered(machine, manifest())
    pulls = sent(machine.handle(Found(1, frozenset()), 0.0), Pull)
    assert {peer for peer, _ in pulls} == {"s0"}
    by_codec = {pull.codec: pull for _, pull in pulls}
    assert {codec: pull.ranges for codec, pull in by_codec.items()} == {
        "planes:0-4:16": ((0, 64),),
        "planes:0-4:8": ((68, 132), (132, 164)),
        "float32": ((64, 68), (164, 168)),
    }
    assert {(pull.version, pull.oldest) for _, pull in pulls} == {(1, 1)}
    assert machine.handle(Received("s0", data(by_codec["planes:0-4:16"], num_bytes=60)), 1.0) == []
    assert machine.handle(Received("s0", data(by_codec["planes:0-4:16"], offset=60, num_bytes=40)), 1.0) == []
    loads = []
    for codec in ("planes:0-4:8", "float32"):
        for range_ in by_codec[codec].ranges:
            loads += machine.handle(Received("s0", data(by_codec[codec], range_)), 2.0)
    assert loads == [Load(manifest())]


@pytest.mark.parametrize("trouble", ["silent", "gone", "refused", "rejected"])
def test_what_is_still_missing_is_pulled_elsewhere(trouble):
    machine = asker()
    machine.handle(Start(), 0.0)
    offered(machine, manifest(cut=2))
    pulls = {
        pull.codec: pull for _, pull in sent(machine.handle(Found(1, digests(manifest(cut=2)) - {"a1.2", "b1.0"}), 0.0), Pull)
    }
    assert {codec: pull.ranges for codec, pull in pulls.items()} == {"planes:2-3:16": ((0, 64),), "planes:0-1:8": ((68, 132),)}
    machine.handle(Received("s0", data(pulls["planes:0-1:8"])), 0.5)
    pull = pulls["planes:2-3:16"]
    event = {
        "gone": PeerDown("s0"),
        "refused": Received("s0", Refuse(pull.request, 2, 2)),
        "rejected": Rejected("s0", pull.request, "its digest is wrong"),
    }.get(trouble, Wake())
    actions = machine.handle(event, PATIENCE)
    assert Forget("s0", pull.request) in actions
    ((peer, again),) = sent(actions, Pull)
    assert peer == "s1" and (again.codec, again.ranges) == (pull.codec, pull.ranges) and again.request != pull.request
    assert machine.handle(Received("s0", data(pull)), PATIENCE) == [], "too late"
    assert machine.handle(Received("s1", data(again)), PATIENCE) == [Load(manifest(cut=2))]


def test_when_nobody_has_what_was_offered_another_offer_is_asked_for_and_then_the_reason_is_told():
    machine = asker()
    actions = [*machine.handle(Start(), 0.0), *machine.handle(Question(7, 1, 1000.0), 0.0)]
    offer, now, offerers, pulled = manifest(cut=1), 0.0, [], []
    while not of(actions, Fail):
        if sent(actions, Pull):
            ((peer, pull),) = sent(actions, Pull)
            pulled.append(peer)
            actions = machine.handle(Rejected(peer, pull.request, "its digest is wrong"), now)
        elif of(actions, LookUp):
            actions = machine.handle(Found(1, digests(offer) - {"a1.0"}), now)
        elif sent(actions, PlanRequest) and sent(actions, PlanRequest)[0][1].payload.held == 0:
            ((peer, _),) = sent(actions, PlanRequest)
            offerers.append(peer)
            actions = offered(machine, offer, now, peer)
        else:
            now = machine.next_deadline
            actions = machine.handle(Wake(), now)
    assert set(offerers) == {"s0", "s1"} and len(pulled) <= 10 * MAX_REJECTIONS and now < 100
    (failure,) = of(actions, Fail)
    assert (failure.number, failure.kind) == (7, "offer") and "its digest is wrong" in failure.reason
    assert Unload(1) in actions
    while not sent(actions, PlanRequest):
        now = machine.next_deadline
        actions = machine.handle(Wake(), now)
    assert of(offered(machine, manifest(2), now, sent(actions, PlanRequest)[0][0]), LookUp), "a new version may be better"


def test_a_newer_offer_takes_the_place_of_one_that_is_still_pulled():
    machine = asker()
    machine.handle(Start(), 0.0)
    offered(machine, manifest(1))
    pulls = sent(machine.handle(Found(1, frozenset()), 0.0), Pull)
    actions = offered(machine, manifest(2), 1.0)
    assert {forget.request for forget in of(actions, Forget)} == {pull.request for _, pull in pulls}
    assert Unload(1) in actions and LookUp(manifest(2)) in actions
    assert machine.handle(Found(1, frozenset()), 1.0) == [] and machine.handle(Loaded(1), 1.0) == []
    assert machine.handle(Found(2, digests(manifest(2))), 1.0) == [Load(manifest(2))]
    assert of(offered(machine, manifest(3), 1.5), LookUp) == [], "one is loading"
    assert of(machine.handle(Loaded(2), 2.0), LookUp) == [LookUp(manifest(3))]
    assert machine.fetcher.active == manifest(2)


def test_an_older_offer_is_not_taken_and_the_same_one_is_not_asked_for_in_a_hurry():
    machine = ready(manifest(5))
    before = machine.fetcher.active
    for version in (5, 4):
        actions = offered(machine, manifest(version), 1.0)
        assert not of(actions, LookUp) and not sent(actions, PlanRequest)
        assert machine.next_deadline > 1.0
        machine.handle(Wake(), machine.next_deadline)
    assert machine.fetcher.active is before


def by_engine(offer, engine) -> Manifest:
    return replace(offer, plan=replace(offer.plan, stages=(replace(offer.plan.stages[0], engine=engine),)))


def test_for_an_engine_that_is_of_no_use_here_another_plan_is_asked_for_and_then_its_certificate_holds():
    machine = ready(manifest(1), servers=("s0",))
    certified = manifest(2, threshold=0.5, alpha=0.02, delta=0.05)
    offer = by_engine(certified, "int8")
    ((_, parked),) = sent(offered(machine, offer, 1.0), PlanRequest)
    assert parked.payload.held == 2
    machine.handle(Found(2, digests(offer)), 1.0)
    actions = machine.handle(Loaded(2, engine="bf16", refused={"int8": "too slow"}), 1.0)
    assert of(actions, Unload) == [Unload(2)] and of(actions, Forget) == [Forget("s0", parked.request)]
    ((_, request),) = sent(actions, PlanRequest)
    assert (request.payload.held, request.payload.refused) == (1, {"int8": "too slow"})
    assert machine.fetcher.active == manifest(1) and machine.handle(Question(1, 1, 100.0), 1.0) == [RunHead(1, 1)]
    ((_, request),) = sent(offered(machine, certified, 1.0), PlanRequest)
    assert (request.payload.held, request.payload.refused) == (2, {"int8": "too slow"}), (
        "nor is it planned for the next version"
    )
    machine.handle(Found(2, digests(certified)), 1.0)
    assert machine.handle(Loaded(2, engine="fp32"), 1.0) == [] and machine.fetcher.active == certified


def test_what_is_known_to_be_missing_and_all_that_was_tried_is_named_so_that_there_is_one_more_offer_at_most():
    machine = asker(("s0",), refused={"onnxruntime": "not there"})
    ((_, request),) = sent(machine.handle(Start(), 0.0), PlanRequest)
    assert request.payload.refused == {"onnxruntime": "not there"}
    offered(machine, by_engine(manifest(), "int8"))
    machine.handle(Found(1, digests(manifest())), 0.0)
    actions = machine.handle(Loaded(1, engine="fp32", refused={"int8": "too slow", "bf16": "wrong"}), 0.0)
    ((_, request),) = sent(actions, PlanRequest)
    assert request.payload.refused == {"onnxruntime": "not there", "int8": "too slow", "bf16": "wrong"}
    offered(machine, manifest())
    assert machine.handle(Found(1, digests(manifest())), 0.0) == [Load(manifest())], "its pieces are there"
    assert machine.handle(Loaded(1, engine="fp32"), 0.0) == [] and machine.fetcher.active == manifest()


def test_who_offers_a_refused_engine_all_the_same_is_taken_up_without_its_certificate():
    machine, asked = asker(), []
    machine.handle(Start(), 0.0)
    for engine in ("int8", *(f"made up {k}" for k in range(MAX_REFUSED))):
        assert machine.fetcher.active is None
        offer = by_engine(manifest(threshold=0.5, alpha=0.02, delta=0.05), engine)
        offered(machine, offer, 0.0, machine.fetcher._plan.peer)
        machine.handle(Found(1, digests(offer)), 0.0)
        asked += [request.payload.refused for _, request in sent(machine.handle(Loaded(1, engine="fp32"), 0.0), PlanRequest)]
    assert [len(refused) for refused in asked] == list(range(1, MAX_REFUSED + 1)) and len(set(asked[-1])) == MAX_REFUSED
    assert machine.fetcher.active == replace(offer, alpha=None, delta=None)


def test_what_was_offered_while_a_refused_engine_was_built_is_asked_for_again():
    machine = asker(("s0",))
    machine.handle(Start(), 0.0)
    offered(machine, by_engine(manifest(1), "int8"))
    machine.handle(Found(1, digests(manifest(1))), 0.0)
    assert not of(offered(machine, by_engine(manifest(2), "int8")), LookUp), "one is loading"
    actions = machine.handle(Loaded(1, engine="fp32"), 0.0)
    assert not of(actions, LookUp) and sent(actions, PlanRequest)[0][1].payload.held == 0
    assert of(offered(machine, manifest(2)), LookUp) == [LookUp(manifest(2))]


def test_a_stage_that_cannot_be_built_leaves_the_one_in_use():
    machine = ready(manifest(1))
    offered(machine, manifest(2), 1.0)
    machine.handle(Found(2, digests(manifest(2))), 1.0)
    assert Unload(2) in machine.handle(Loaded(2, "no memory"), 1.0)
    assert machine.fetcher.active == manifest(1) and machine.fetcher.error == ("compute", "no memory")
    assert machine.handle(Question(1, 1, 100.0), 1.0) == [RunHead(1, 1)]


@pytest.mark.parametrize("kind", [Failure.PLAN, Failure.MODEL])
def test_questions_hear_why_there_is_no_plan(kind):
    machine = asker(servers=("s0",))
    ((_, request),) = sent(machine.handle(Start(), 0.0), PlanRequest)
    assert machine.handle(Question(1, 1, 100.0), 0.0) == []
    actions = machine.handle(Received("s0", Failed(request.request, kind, "not within 0.001; the nearest is 0.01")), 1.0)
    assert of(actions, Fail) == [Fail(1, kind, "not within 0.001; the nearest is 0.01")]
    assert of(machine.handle(Question(2, 1, 100.0), 1.5), Fail), "also those who come later"
    assert sent(machine.handle(Wake(), machine.next_deadline), PlanRequest), "it may have become possible"


def later(machine, peer, now):
    return machine.handle(Received(peer, Later(machine.fetcher._plan.request, 0)), now)


def test_where_there_is_no_version_yet_the_question_waits_for_it():
    machine = asker(servers=("s0",))
    machine.handle(Start(), 0.0)
    assert machine.handle(Question(1, 1, 100.0), 1.0) == machine.handle(Question(2, 1, 30.0), 1.0) == []
    assert later(machine, "s0", 1.0) == []
    assert machine.next_deadline == 30.0
    (failure,) = of(machine.handle(Wake(), 30.0), Fail)
    assert (failure.number, failure.kind) == (2, "deadline")
    assert failure.reason == (
        "no answer in time; waited 29 s for a first version: tcp://s0 has none ready yet, while it is trained, "
        "calibrated or certified for this plan; allow more time"
    )
    assert machine.next_deadline == 1.0 + WAIT + PATIENCE
    actions = machine.handle(Wake(), 66.0)
    assert of(actions, Forget) and not of(actions, Report) and sent(actions, PlanRequest), "it is asked again, and not blamed"
    later(machine, "s0", 66.0)
    offered(machine, manifest(), 70.0)
    machine.handle(Found(1, frozenset()), 70.0)
    machine.handle(Question(3, 1, 71.0), 70.0)
    (failure,) = of(machine.handle(Wake(), 71.0), Fail)
    assert failure.reason == "no answer in time; waited 1 s for a first version: version 1 is not pulled yet; allow more time"


def test_who_has_said_that_it_is_at_a_version_and_falls_silent_is_not_waited_for():
    machine = asker(servers=("s0",))
    machine.handle(Start(), 0.0)
    assert not machine.fetcher.is_awaited and machine.waits_for.startswith("no answer from tcp://s0 yet")
    later(machine, "s0", 0.5)
    assert machine.fetcher.is_awaited and machine.waits_for.startswith("tcp://s0 has none ready yet")
    assert sent(machine.handle(Wake(), 0.5 + WAIT + PATIENCE), PlanRequest) and machine.fetcher.is_awaited, "it is asked again"
    assert of(machine.handle(Wake(), machine.next_deadline), Report) and not machine.fetcher.is_awaited
    assert machine.waits_for.startswith("tcp://s0: no answer to a plan request; is `gossipfl serve` running there?")


def test_who_fails_at_the_version_that_it_was_at_is_not_waited_for_but_says_why():
    machine = asker(servers=("s0",))
    machine.handle(Start(), 0.0)
    for now in (0.5, 10.0):
        later(machine, "s0", now)
        assert machine.fetcher.is_awaited == (now < 1)
        machine.handle(Received("s0", Failed(machine.fetcher._plan.request, Failure.COMPUTE, "no memory")), now)
        assert not machine.fetcher.is_awaited and machine.waits_for == "tcp://s0: no memory"
        machine.handle(Wake(), machine.next_deadline)


def test_a_server_that_has_a_version_is_found_while_others_prepare_their_first():
    machine = asker(servers=("s0", "s1", "s2"))
    machine.handle(Start(), 0.0)
    asked = [sent(later(machine, peer, 0.0), PlanRequest) for peer in ("s0", "s1")]
    assert [peer for ((peer, _),) in asked] == ["s1", "s2"]
    assert later(machine, "s2", 0.0) == [], "the last one says when it has one"
    assert machine.next_deadline == PATIENCE, "but another may have one sooner"
    asked = [sent(machine.handle(Wake(), PATIENCE), PlanRequest), sent(later(machine, "s0", 5.0), PlanRequest)]
    assert [peer for ((peer, _),) in asked] == ["s0", "s1"]
    ((_, request),) = sent(offered(machine, manifest(), 5.0, "s1"), PlanRequest)
    assert (request.payload.held, request.payload.wait_s) == (1, WAIT)


def test_one_server_that_prepares_its_first_version_is_reason_enough_to_wait():
    machine = asker()
    machine.handle(Start(), 0.0)
    machine.handle(Question(1, 1, 100.0), 0.0)
    plan = machine.fetcher._plan
    actions = machine.handle(Received("s0", Failed(plan.request, Failure.MODEL, "no model 'm' here; there is n")), 0.0)
    assert [peer for peer, _ in sent(actions, PlanRequest)] == ["s1"] and not of(actions, Fail)
    assert later(machine, "s1", 0.1) == []
    actions = machine.handle(PeerDown("s1"), 1.0)
    assert [peer for peer, _ in sent(actions, PlanRequest)] == ["s0"] and not of(actions, Fail)
    plan = machine.fetcher._plan
    actions = machine.handle(Received("s0", Failed(plan.request, Failure.MODEL, "no model 'm' here; there is n")), 1.0)
    assert of(actions, Fail) == [Fail(1, Failure.MODEL, "no model 'm' here; there is n")], "nobody is left"


def test_a_question_waits_for_the_first_version_and_no_longer_than_its_deadline():
    machine = asker()
    machine.handle(Start(), 0.0)
    assert machine.handle(Question(1, 1, 3.0), 0.0) == [] and machine.handle(Question(2, 1, 9.0), 0.0) == []
    (failure,) = of(machine.handle(Wake(), machine.next_deadline), Fail)
    assert machine.next_deadline is not None and (failure.number, failure.kind) == (1, "deadline")
    offered(machine, manifest(), 3.0)
    machine.handle(Found(1, digests(manifest())), 3.0)
    assert of(machine.handle(Loaded(1), 4.0), RunHead) == [RunHead(2, 1)]


# --- questions --------------------------------------------------------------------------------------------------------


def test_where_all_is_on_the_device_and_sure_no_server_is_asked():
    machine = ready(manifest(threshold=0.5))
    assert machine.handle(Question(1, 2, 10.0), 0.0) == [RunHead(1, 1)]
    assert machine.handle(HeadDone(1, (0.5, 0.9)), 0.1) == [Resolve(1, manifest(threshold=0.5))]
    assert machine.handle(HeadDone(1, (0.5, 0.9)), 0.1) == [], "it has been answered"


def test_only_those_unsure_go_to_the_full_model():
    machine = ready(manifest(threshold=0.5))
    machine.handle(Question(1, 4, 10.0), 0.0)
    (upload,) = machine.handle(HeadDone(1, (0.6, 0.4, 0.9, math.nan)), 0.1)
    assert upload == Upload(1, "s0", upload.request, 1, 0, FULL_BITS, "full", (1, 3))
    actions = machine.handle(Received("s0", Result(upload.request, 1, 0.1, 0, 1, payload=())), 0.2)
    assert actions[0] == Resolve(1, manifest(threshold=0.5), (1, 3), True)


def test_a_model_cut_in_the_middle_goes_on_at_the_server_and_falls_back_there():
    offer = manifest(cut=2, threshold=0.5)
    machine = ready(offer)
    machine.handle(Question(1, 2, 10.0), 0.0)
    (upload,) = machine.handle(HeadDone(1), 0.1)
    assert upload == Upload(1, "s0", upload.request, 1, 2, 8, "reduced", None)
    actions = machine.handle(Received("s0", Result(upload.request, 1, 0.1, 0, 1, payload=(0.3, 0.2))), 0.2)
    assert actions[0] == Forget("s0", upload.request)
    (full,) = of(actions, Upload)
    assert full == Upload(1, "s0", full.request, 1, 0, FULL_BITS, "full", None), "all of them"
    assert machine.handle(Received("s0", Result(upload.request, 1, 0.1, 0, 1, payload=(0.9, 0.9))), 0.2) == []
    assert machine.handle(Received("s0", Result(full.request, 1, 0.1, 0, 1)), 0.3)[0] == Resolve(1, offer, (0, 1), True)


def test_where_everything_goes_to_the_server_as_it_is_nothing_is_reduced():
    offer = manifest(cut=0, activation_bits=FULL_BITS, threshold=0.5)
    machine = ready(offer)
    (upload,) = machine.handle(Question(1, 2, 10.0), 0.0)
    assert upload == Upload(1, "s0", upload.request, 1, 0, FULL_BITS, "full", None)
    assert machine.handle(Received("s0", Result(upload.request, 1, 0.1, 0, 1)), 0.3)[0] == Resolve(1, offer, (0, 1), True)


def test_a_server_that_has_answered_before_is_not_asked_whether_it_runs_where_time_is_too_short():
    machine = ready(manifest(cut=0, activation_bits=FULL_BITS), servers=("s0",))
    assert of(machine.handle(Question(1, 1, 1e-6), 0.0), Upload)
    (failure,) = of(machine.handle(Wake(), 1e-6), Fail)
    assert failure.reason == "no answer in time; tcp://s0 has answered before; allow more time"
    machine.handle(PeerDown("s0"), 1.0)
    machine.handle(Question(2, 1, 1.1), 1.0)
    (failure,) = of(machine.handle(Wake(), 1.1), Fail)
    assert "tcp://s0: the connection broke; is `gossipfl serve` running there?" in failure.reason


def fallen_back(machine, number=1, deadline=100.0, now=0.0):
    """A question whose one sample is unsure: the upload to the full model."""
    machine.handle(Question(number, 1, deadline), now)
    (upload,) = of(machine.handle(HeadDone(number, (0.1,)), now), Upload)
    return upload


@pytest.mark.parametrize("trouble", ["silent", "gone", "draining", "failed", "rejected", "version"])
def test_another_server_is_asked(trouble):
    machine = ready(manifest(threshold=0.5))
    upload = fallen_back(machine)
    assert upload.peer == "s0"
    failures = {"draining": Failure.DRAINING, "failed": Failure.COMPUTE, "version": Failure.VERSION}
    event = {"silent": Wake(), "gone": PeerDown("s0"), "rejected": Rejected("s0", upload.request, "not finite")}.get(trouble)
    event = event or Received("s0", Failed(upload.request, failures[trouble], "no"))
    (again,) = of(machine.handle(event, PATIENCE + 1), Upload)
    assert again == replace(upload, peer="s1", request=again.request)
    assert machine.handle(Received("s1", Result(again.request, 1, 0.1, 0, 1)), 8.0)[0] == Resolve(
        1, manifest(threshold=0.5), (0,), True
    )


def test_the_answer_of_a_server_that_was_given_up_is_as_good():
    machine = ready(manifest(threshold=0.5))
    upload = fallen_back(machine)
    (again,) = of(machine.handle(Wake(), PATIENCE + 1), Upload)
    actions = machine.handle(Received("s0", Result(upload.request, 1, 0.1, 0, 1)), 8.0)
    assert of(actions, Resolve) and {f.request for f in of(actions, Forget)} == {upload.request, again.request}


def test_a_busy_server_is_asked_again_where_there_is_no_other():
    machine = ready(manifest(threshold=0.5), servers=("s0",))
    upload = fallen_back(machine)
    assert machine.handle(Received("s0", Failed(upload.request, Failure.BUSY, "64 wait")), 1.0) == []
    assert 1.0 < machine.next_deadline < 1.2
    (again,) = of(machine.handle(Wake(), machine.next_deadline), Upload)
    assert again.peer == "s0" and again.request != upload.request


def test_later_is_a_sign_of_life():
    machine = ready(manifest(threshold=0.5))
    upload = fallen_back(machine)
    machine.handle(Received("s0", Later(upload.request, 0)), 4.0)
    assert not of(machine.handle(Wake(), PATIENCE + 1), Upload)
    assert of(machine.handle(Wake(), 4.0 + PATIENCE + 1), Upload)


def test_silence_never_takes_more_than_half_of_the_time_where_another_could_answer():
    machine = ready(manifest(threshold=0.5))
    fallen_back(machine, deadline=4.0)
    (again,) = of(machine.handle(Wake(), 2.0), Upload)
    assert again.peer == "s1"
    assert of(machine.handle(Wake(), 3.0), Resolve) == [Resolve(1, manifest(threshold=0.5), (0,), False)], "both are silent"


@pytest.mark.parametrize("policy", ["unverified", "fail"])
def test_where_every_server_is_gone_the_policy_decides(policy):
    machine = ready(manifest(threshold=0.5), on_no_server=policy)
    fallen_back(machine)
    assert of(machine.handle(PeerDown("s0"), 1.0), Upload)
    actions = machine.handle(PeerDown("s1"), 2.0)
    if policy == "unverified":
        assert of(actions, Resolve) == [Resolve(1, manifest(threshold=0.5), (0,), False)]
        machine.handle(Question(2, 1, 100.0), 2.1)
        assert of(machine.handle(HeadDone(2, (0.1,)), 2.2), Resolve), "at once: it is known that nobody is there"
    else:
        assert not of(actions, Fail), "somebody may come back before the deadline"
        while not of(actions, Fail):
            now = machine.next_deadline
            actions = machine.handle(Wake(), now)
        (failure,) = of(actions, Fail)
        assert now == 100.0 and failure.kind == "deadline" and "--on-no-server unverified" in failure.reason
    assert 1 not in machine._questions and not machine._by_request


def test_a_server_that_comes_back_is_asked_at_once():
    machine = ready(manifest(threshold=0.5), on_no_server="fail")
    fallen_back(machine)
    machine.handle(PeerDown("s0"), 1.0)
    machine.handle(PeerDown("s1"), 1.0)
    (again,) = of(machine.handle(PeerUp("s1"), 1.01), Upload)
    assert again.peer == "s1"


def test_a_question_that_cannot_be_right_fails_without_asking_others():
    machine = ready(manifest(cut=1))
    machine.handle(Question(1, 1, 100.0), 0.0)
    (upload,) = machine.handle(HeadDone(1), 0.1)
    actions = machine.handle(Received("s0", Failed(upload.request, Failure.INPUT, "4 bytes for 8")), 0.2)
    assert of(actions, Fail) == [Fail(1, "input", "4 bytes for 8")] and not of(actions, Upload)


def test_layers_that_fail_fail_the_question_only():
    machine = ready(manifest(cut=1))
    machine.handle(Question(1, 1, 100.0), 0.0)
    assert of(machine.handle(HeadDone(1, error="no memory"), 0.1), Fail) == [Fail(1, "compute", "no memory")]
    assert of(machine.handle(Question(2, 1, 100.0), 0.2), RunHead)


def test_a_question_ends_with_the_version_it_began_with():
    machine = ready(manifest(1, threshold=0.5))
    upload = fallen_back(machine)
    machine.handle(Question(2, 1, 100.0), 0.0)
    assert not of(switch(machine, manifest(2, threshold=0.5), 1.0), Unload), "two questions use it"
    assert machine.handle(Question(3, 1, 100.0), 1.0) == [RunHead(3, 2)]
    assert machine.handle(Received("s0", Result(upload.request, 2, 0.1, 0, 1)), 1.0) == [], "of another version"
    actions = machine.handle(Received("s0", Result(upload.request, 1, 0.1, 0, 1)), 1.1)
    assert actions[0] == Resolve(1, manifest(1, threshold=0.5), (0,), True) and Unload(1) not in actions
    actions = machine.handle(HeadDone(2, (0.9,)), 1.2)
    assert actions == [Resolve(2, manifest(1, threshold=0.5)), Unload(1)]


def test_where_no_server_has_the_version_any_more_the_question_begins_again_with_the_newest():
    machine = ready(manifest(1, threshold=0.5))
    upload = fallen_back(machine)
    switch(machine, manifest(2, threshold=0.5), 1.0)
    (again,) = of(machine.handle(Received("s0", Failed(upload.request, Failure.VERSION, "gone")), 1.0), Upload)
    actions = machine.handle(Received("s1", Failed(again.request, Failure.VERSION, "gone")), 1.0)
    assert RunHead(1, 2) in actions and Unload(1) in actions
    assert machine.handle(HeadDone(1, (0.9,)), 1.1)[0] == Resolve(1, manifest(2, threshold=0.5))


def test_where_the_newest_is_not_ready_yet_the_question_waits_for_it():
    machine = ready(manifest(1, threshold=0.5), servers=("s0",))
    upload = fallen_back(machine)
    assert not of(machine.handle(Received("s0", Failed(upload.request, Failure.VERSION, "gone")), 1.0), Resolve)
    assert RunHead(1, 2) in switch(machine, manifest(2), 2.0)


def test_a_version_that_is_asked_for_by_number_is_that_one_or_an_error():
    machine = ready(manifest(1, threshold=0.5))
    fallen_back(machine)
    switch(machine, manifest(2), 1.0)
    assert machine.handle(Question(2, 1, 100.0, version=1), 1.0) == [RunHead(2, 1)]
    (failure,) = of(machine.handle(Question(3, 1, 100.0, version=9), 1.0), Fail)
    assert failure.kind == "version" and "1, 2" in failure.reason


# --- audits -----------------------------------------------------------------------------------------------------------


# --- continuing -------------------------------------------------------------------------------------------------------


def continuing(version=1, **changes) -> Manifest:
    return manifest(version, **(dict(cut=2, threshold=0.5, fallback="continued") | changes))


def scored(machine, upload, *margins_, now=0.1) -> list:
    return machine.handle(Received(upload.peer, Result(upload.request, upload.version, 0.1, 0, 1, payload=margins_)), now)


def continued(machine, margins_=(0.9, 0.1, 0.2), number=1) -> tuple[Upload, Upload]:
    """A question of which some samples are unsure: the activation, and what continues it."""
    machine.handle(Question(number, len(margins_), 100.0), 0.0)
    (upload,) = of(machine.handle(HeadDone(number), 0.0), Upload)
    (again,) = of(scored(machine, upload, *margins_), Upload)
    return upload, again


def test_those_unsure_are_continued_by_who_has_answered():
    machine = ready(continuing())
    upload, again = continued(machine)
    assert (upload.tier, upload.keep, upload.first) == ("reduced", True, None)
    assert again == Upload(1, "s0", again.request, 1, 2, 8, "continued", (1, 2), False, upload.request)
    actions = scored(machine, again)
    assert actions == [Resolve(1, continuing(), (1, 2), is_continued=True), Forget("s0", again.request)]
    assert not machine._questions and not machine._by_request


def test_inputs_of_a_few_bits_are_continued_too():
    machine = ready(continuing(cut=0, activation_bits=8))
    (upload,) = machine.handle(Question(1, 1, 100.0), 0.0)
    assert (upload.tier, upload.keep) == ("reduced", True)
    (again,) = of(scored(machine, upload, 0.1), Upload)
    assert (again.tier, again.cut, again.bits, again.first) == ("continued", 0, 8, upload.request)


def test_a_late_answer_is_continued_where_it_came_from():
    machine = ready(continuing())
    machine.handle(Question(1, 1, 100.0), 0.0)
    (upload,) = of(machine.handle(HeadDone(1), 0.0), Upload)
    (other,) = of(machine.handle(Wake(), PATIENCE + 1), Upload)
    assert (upload.peer, other.peer, other.keep) == ("s0", "s1", True)
    (again,) = of(scored(machine, upload, 0.1, now=7.0), Upload)
    assert (again.peer, again.first) == ("s0", upload.request)


@pytest.mark.parametrize(
    "trouble", ["silent", "gone", "rejected", "forgotten", "busy", "draining", "version", "input", "compute"]
)
def test_whatever_goes_wrong_with_continuing_the_full_model_starts_afresh(trouble):
    machine = ready(continuing())
    _, again = continued(machine)
    event = {"silent": Wake(), "gone": PeerDown("s0"), "rejected": Rejected("s0", again.request, "not finite")}.get(trouble)
    event = event or Received("s0", Failed(again.request, trouble, "no"))
    actions = machine.handle(event, PATIENCE + 1)
    (afresh,) = of(actions, Upload)
    peer = "s0" if trouble == "forgotten" else "s1"
    assert afresh == Upload(1, peer, afresh.request, 1, 0, FULL_BITS, "full", (1, 2))
    assert Forget("s0", again.request) in actions and bool(of(actions, Report)) == (
        trouble not in ("forgotten", "busy", "version")
    )
    assert scored(machine, again, now=6.5) == [], "too late"
    assert of(scored(machine, afresh, now=7.0), Resolve) == [Resolve(1, continuing(), (1, 2))]
    assert not machine._questions and not machine._by_request


@pytest.mark.parametrize("policy", ["unverified", "fail"])
def test_where_nobody_can_continue_nor_start_afresh_the_policy_decides(policy):
    machine = ready(continuing(), servers=("s0",), on_no_server=policy)
    continued(machine)
    actions = machine.handle(PeerDown("s0"), 1.0)
    if policy == "unverified":
        assert of(actions, Resolve) == [Resolve(1, continuing(), (1, 2), False)]
    else:
        assert not of(actions, (Resolve, Fail))
        assert of(machine.handle(Wake(), 100.0), Fail)[0].kind == "deadline"


@pytest.mark.parametrize(("cut", "activation_bits"), [(3, 0), (1, 16), (1, FULL_BITS)])
def test_an_offer_to_continue_what_is_all_there_does_not_add_up(cut, activation_bits):
    with pytest.raises(PlanError, match=f"fallbacks that continue what went up at {activation_bits} bits"):
        continuing(cut=cut, activation_bits=activation_bits).check(PROFILE, "L")
    continuing(cut=1, activation_bits=15).check(PROFILE, "L")


def audited_continuing(**config) -> Asker:
    return ready(continuing(alpha=0.02, delta=0.05), audit_share=1.0, **config)


def test_what_was_continued_is_audited_as_what_was_accepted_is():
    machine = audited_continuing()
    _, again = continued(machine)
    assert counted(machine) == (0, 0), "nothing is known of what continues"
    aside, resolve, *_, upload = scored(machine, again)
    assert aside == SetAside(1, ~1, (0, 1, 2), (1, 2)) and resolve.is_continued
    assert (upload.tier, upload.cut, upload.bits) == ("audit", 0, FULL_BITS)
    compared(machine, upload, False, True, False)
    assert counted(machine) == (3, 1)


def test_what_starts_afresh_after_all_counts_as_not_differing():
    machine = audited_continuing()
    _, again = continued(machine)
    (afresh,) = of(machine.handle(Received("s0", Failed(again.request, Failure.FORGOTTEN, "no")), 0.2), Upload)
    actions = scored(machine, afresh, now=0.3)
    assert of(actions, SetAside) == [SetAside(1, ~1, (0,))]
    compared(machine, of(actions, Upload)[0], False, now=0.4)
    assert counted(machine) == (3, 0)


@pytest.mark.parametrize("trouble", ["busy", "many", "deadline"])
def test_what_was_continued_and_nobody_compares_is_taken_not_to_differ(trouble):
    """Left out it would make what was accepted, and has been compared, look worse than all of it is."""
    machine = audited_continuing()
    _, again = continued(machine, (0.1, 0.2))
    if trouble == "deadline":
        assert of(machine.handle(Wake(), 100.0), Resolve) == [
            Resolve(1, continuing(alpha=0.02, delta=0.05), (0, 1), is_verified=False)
        ]
    else:
        if trouble == "many":
            under_way = {~number: _Asked(Question(~number, 1, 1e9), audit_of=number) for number in range(90, 90 + MAX_AUDITS)}
            machine._questions.update(under_way)
        for upload in of(scored(machine, again), Upload):
            machine.handle(Received(upload.peer, Failed(upload.request, Failure.BUSY, "no")), 0.2)
    assert counted(machine) == (2, 0)


def test_after_an_alarm_nothing_is_continued():
    machine = audited_continuing()
    for number in itertools.count(1000):
        _, again = continued(machine, (0.1,), number)
        (upload,) = of(scored(machine, again), Upload)
        if of(compared(machine, upload, True), Report):
            break
    machine.handle(Question(1, 2, 100.0), 0.0)
    (upload,) = of(machine.handle(HeadDone(1), 0.0), Upload)
    (afresh,) = of(scored(machine, upload, 0.9, 0.1), Upload)
    assert (afresh.tier, afresh.first, afresh.samples) == ("full", None, None)


# --- audits -----------------------------------------------------------------------------------------------------------


def certified(version=1, **changes) -> Manifest:
    return manifest(version, **(dict(threshold=0.5, alpha=0.02, delta=0.05) | changes))


def audited(offer=None, **config) -> Asker:
    """A machine that audits every sample."""
    return ready(offer or certified(), **(dict(audit_share=1.0) | config))


def ask_sure(machine, number, margins_=(0.9,), now=0.0) -> list:
    machine.handle(Question(number, len(margins_), now + 100.0), now)
    return machine.handle(HeadDone(number, margins_), now)


def compared(machine, upload, *differ, now=0.0) -> list:
    return machine.handle(Received(upload.peer, Result(upload.request, upload.version, 0.1, 0, 1, payload=differ)), now)


def counted(machine, version=1) -> tuple[int, int]:
    """Audits, and how many of them differed."""
    audit = machine._audits._watched[version].audit
    return audit.num_audited, audit.num_differing


def alarm(machine) -> list:
    """Answers that all differ, until there is an alarm: what was done last."""
    for number in itertools.count(1000):
        (upload,) = of(ask_sure(machine, number), Upload)
        actions = compared(machine, upload, True)
        if of(actions, Report):
            return actions


def test_an_answer_goes_out_at_once_and_is_compared_afterwards():
    machine = audited()
    aside, resolve, upload = ask_sure(machine, 7, (0.9, 0.6))
    assert aside == SetAside(7, ~7, (0, 1)) and resolve == Resolve(7, certified())
    assert upload == Upload(~7, "s0", upload.request, 1, 0, FULL_BITS, "audit", None)
    assert counted(machine) == (0, 0)
    assert compared(machine, upload, True, False) == [Audited(~7), Forget("s0", upload.request)]
    assert counted(machine) == (2, 1)
    assert not machine._questions and not machine._by_request


def test_what_falls_back_counts_at_once_as_not_differing_and_is_not_asked_for_twice():
    machine = audited()
    machine.handle(Question(1, 3, 100.0), 0.0)
    (upload,) = machine.handle(HeadDone(1, (0.1, 0.9, 0.2)), 0.0)
    assert (upload.tier, upload.samples) == ("full", (0, 2)) and counted(machine) == (1, 0)
    actions = machine.handle(Received("s0", Result(upload.request, 1, 0.1, 0, 1)), 0.1)
    assert of(actions, SetAside) == [SetAside(1, ~1, (1,))] and of(actions, Resolve) == [Resolve(1, certified(), (0, 2))]
    assert Forget("s0", upload.request) in actions
    compared(machine, of(actions, Upload)[0], True)
    assert counted(machine) == (3, 1)


def test_audits_count_in_the_order_in_which_they_were_drawn():
    """Else those that fall back would come before those that are accepted, and be missing among those that follow."""
    machine = audited()
    (first,) = of(ask_sure(machine, 1), Upload)
    (upload,) = ask_sure(machine, 2, (0.1, 0.1))
    assert of(machine.handle(Received("s0", Result(upload.request, 1, 0.1, 0, 1)), 0.1), Resolve), "nobody waits"
    assert counted(machine) == (0, 0)
    compared(machine, first, True)
    assert counted(machine) == (3, 1)


@pytest.mark.parametrize("policy", ["unverified", "fail"])
def test_after_an_alarm_the_full_model_answers_all_and_where_there_is_none_the_policy_decides(policy):
    machine = audited(on_no_server=policy)
    (report,) = of(alarm(machine), Report)
    num_audited, num_differing = counted(machine)
    assert num_audited == num_differing <= 10
    assert (report.source, report.kind) == ("m", "drift") and f"alpha = 0.02: it did in {num_audited} of" in report.detail
    (upload,) = ask_sure(machine, 1, (0.9, 1.0))
    assert (upload.tier, upload.samples) == ("full", None), "however sure"
    actions = machine.handle(Received("s0", Result(upload.request, 1, 0.1, 0, 1)), 0.1)
    assert actions[0] == Resolve(1, certified(), (0, 1), True, alarm=True) and not of(actions, SetAside)
    machine.handle(PeerDown("s0"), 0.2)
    machine.handle(PeerDown("s1"), 0.2)
    actions = ask_sure(machine, 2, now=0.3)
    while not of(actions, (Resolve, Fail)):
        actions = machine.handle(Wake(), machine.next_deadline)
    if policy == "unverified":
        assert of(actions, Resolve) == [Resolve(2, certified(), (0,), False, alarm=True)]
    else:
        assert of(actions, Fail)[0].kind == "deadline"


def test_questions_under_way_at_an_alarm_say_so_and_the_next_version_begins_anew():
    machine = audited()
    audits = [of(ask_sure(machine, number), Upload)[0] for number in range(2, 12)]
    machine.handle(Question(1, 2, 100.0), 0.0)
    (upload,) = machine.handle(HeadDone(1, (0.1, 0.9)), 0.0)
    assert sum(len(of(compared(machine, audit, True), Report)) for audit in audits) == 1
    actions = machine.handle(Received("s0", Result(upload.request, 1, 0.1, 0, 1)), 0.1)
    assert actions[0] == Resolve(1, certified(), (0,), True, alarm=True) and not of(actions, Upload)
    assert switch(machine, certified(2), 1.0) == [Unload(1)]
    resolve, upload = ask_sure(machine, 2, now=1.0)[1:]
    assert resolve == Resolve(2, certified(2)) and upload.tier == "audit"
    compared(machine, upload, False, now=1.0)
    assert counted(machine, 2) == (1, 0) and list(machine._audits._watched) == [2]


def test_a_version_stays_until_its_last_audit_is_over():
    machine = audited()
    (upload,) = of(ask_sure(machine, 1), Upload)
    assert not of(switch(machine, certified(2), 1.0), Unload)
    assert compared(machine, upload, False, now=1.1) == [Audited(~1), Forget("s0", upload.request), Unload(1)]


@pytest.mark.parametrize("trouble", ["gone", "busy", "silent", "draining", "retired", "wrong"])
def test_what_no_server_compares_does_not_count(trouble):
    machine = audited()
    (upload,) = of(ask_sure(machine, 1), Upload)
    failures = {
        "busy": (Failure.BUSY, 1),
        "draining": (Failure.DRAINING, math.inf),
        "retired": (Failure.VERSION, 2),
        "wrong": (Failure.INPUT, 1),
    }
    kind, most = failures.get(trouble, (None, math.inf))
    if trouble == "gone":
        machine.handle(PeerDown("s0"), 0.0)
    actions, now, asked = [upload], 0.0, 0
    while not of(actions, Audited):
        uploads = of(actions, Upload)
        if uploads and kind:
            asked += 1
            actions = machine.handle(Received(uploads[0].peer, Failed(uploads[0].request, kind, "no")), now)
        else:
            now = machine.next_deadline
            actions = machine.handle(Wake(), now)
    assert now <= AUDIT_S and asked <= most and not of(actions, (Fail, Resolve)) and counted(machine) == (0, 0)
    assert not machine._questions and not machine._by_request and not machine._audits._watched[1].drawn


def test_a_question_that_fails_does_not_count():
    machine = audited()
    machine.handle(Question(1, 2, 100.0), 0.0)
    assert of(machine.handle(HeadDone(1, error="no memory"), 0.1), Fail)
    ask_sure(machine, 2, (0.1,))
    assert counted(machine) == (1, 0), "and holds up no other"


def test_only_so_many_audits_are_under_way():
    machine = audited()
    uploads = [of(ask_sure(machine, number), Upload) for number in range(MAX_AUDITS + 3)]
    assert [len(sent_) for sent_ in uploads] == [1] * MAX_AUDITS + [0] * 3
    for (upload,) in uploads[:MAX_AUDITS]:
        compared(machine, upload, False)
    assert counted(machine) == (MAX_AUDITS, 0) and not machine._audits._watched[1].drawn


def test_about_the_share_is_audited_and_the_generator_decides():
    def run(seed) -> list:
        machine = Asker(
            DeviceConfig(audit_share=0.1), {"s0": "tcp://s0"}, PROFILE, itertools.count(1), np.random.default_rng(seed)
        )
        machine.handle(Start(), 0.0)
        switch(machine, certified())
        uploads = [of(ask_sure(machine, number), Upload) for number in range(500)]
        return [compared(machine, *sent_, False) for sent_ in uploads if sent_]

    assert run(1) == run(1) != run(2) and len(run(1)) > 10


@pytest.mark.parametrize("why", ["no certificate", "no delta", "nothing reduced", "another engine", "share 0"])
def test_where_nothing_is_certified_or_wanted_nothing_is_audited(why):
    offer = {
        "no certificate": certified(alpha=None, delta=None),
        "no delta": certified(delta=None),
        "nothing reduced": certified(cut=0, activation_bits=FULL_BITS),
    }.get(why, certified())
    machine = asker(audit_share=0.0 if why == "share 0" else 1.0)
    machine.handle(Start(), 0.0)
    for _ in range(2 if why == "another engine" else 1):  # the server insists
        offered(machine, offer)
        machine.handle(Found(1, digests(offer)), 0.0)
        machine.handle(Loaded(1, engine="int8" if why == "another engine" else None), 0.0)
    machine.handle(Question(1, 1, 100.0), 0.0)
    actions = machine.handle(HeadDone(1, (0.9,)), 0.0)
    assert not of(actions, SetAside) and not machine._audits._watched
    if why == "another engine":
        assert of(actions, Resolve) == [Resolve(1, certified(alpha=None, delta=None))], "it speaks of the plan's"


def test_what_strangers_say_and_answers_to_nothing_change_nothing():
    machine = ready(manifest(threshold=0.5))
    upload = fallen_back(machine)
    for peer in ("x", "s1"):
        for message in (Result(upload.request, 1, 0.0, 0, 1), Failed(upload.request, "busy", "x"), Later(upload.request, 0)):
            assert machine.handle(Received(peer, message), 1.0) == []
    for event in (PeerDown("x"), PeerUp("x"), Rejected("x", upload.request, "?")):
        assert machine.handle(event, 1.0) == []
    assert machine.handle(Received("s0", Refuse(999, 0, 0)), 1.0) == []


# --- the server's machine ---------------------------------------------------------------------------------------------

DEVICE = Caller(b"1", "device", "m@0")
OTHER = Caller(b"2", "device", "m@0")


def num_bytes(cut, bits, samples):
    return (2 + bits) * samples if cut < 3 else None


def server(versions=(1,), **config) -> Answerer:
    machine = Answerer(ServerConfig(**config))
    for version in versions:
        machine.handle(Published("m", version, num_bytes), 0.0)
    return machine


def activation(request=1, version=1, samples=1, offset=0, total=None, length=None, cut=1):
    total = 10 * samples if total is None else total
    return Activation(request, version, cut, 8, samples, offset, total, payload=bytes(total if length is None else length))


def failures(actions):
    return [action.message.kind for action in actions if isinstance(action, Reply) and isinstance(action.message, Failed)]


def test_a_plan_is_made_at_once_or_when_there_is_something_newer():
    machine = server()
    ask = Ask(DeviceProfile(), held=0, wait_s=60.0)
    assert machine.handle(Heard(DEVICE, PlanRequest(1, payload=ask)), 0.0) == [MakePlan(DEVICE, 1, 1, ask)]
    assert machine.handle(Planned(DEVICE, 1), 0.0) == []
    ask = Ask(DeviceProfile(), held=1, wait_s=60.0)
    assert machine.handle(Heard(DEVICE, PlanRequest(2, payload=ask)), 0.0) == [Reply(DEVICE, Later(2, 0))]
    assert machine.handle(Heard(OTHER, PlanRequest(2, payload=replace(ask, wait_s=1.0))), 0.0) == [Reply(OTHER, Later(2, 0))]
    assert machine.next_deadline == 1.0 and machine.handle(Wake(), 1.0) == []
    assert machine.handle(Published("m", 2, num_bytes), 2.0) == [MakePlan(DEVICE, 2, 2, ask)], "the other has gone"
    at_once = replace(ask, held=2, wait_s=0.0)
    assert machine.handle(Heard(DEVICE, PlanRequest(3, payload=at_once)), 0.0) == [MakePlan(DEVICE, 3, 2, at_once)]
    assert failures(machine.handle(Heard(DEVICE, PlanRequest(4)), 0.0)) == ["input"]
    stranger = Caller(b"1", "device", "unheard of")
    assert failures(machine.handle(Heard(stranger, PlanRequest(5, payload=ask)), 0.0)) == ["model"]


def test_that_making_a_plan_takes_long_is_said_once():
    machine, ask = server(), Ask(DeviceProfile(), wait_s=60.0)
    machine.handle(Heard(DEVICE, PlanRequest(1, payload=ask)), 0.0)
    machine.handle(Heard(OTHER, PlanRequest(1, payload=ask)), 0.1)
    assert machine.handle(Planned(OTHER, 1), 0.2) == [] and machine.next_deadline == PLAN_S < PATIENCE
    assert machine.handle(Wake(), PLAN_S) == [Reply(DEVICE, Later(1, 0))]
    assert machine.next_deadline is None and machine.handle(Wake(), 100.0) == []
    assert machine.handle(Planned(DEVICE, 1), 101.0) == [] and not machine._planning


def test_who_asks_before_there_is_a_version_may_wait_for_it():
    machine = Answerer(models=("m", "n"))
    ask = Ask(DeviceProfile(), wait_s=60.0)
    assert machine.handle(Heard(DEVICE, PlanRequest(1, payload=ask)), 0.0) == [Reply(DEVICE, Later(1, 0))]
    assert failures(machine.handle(Heard(OTHER, PlanRequest(2, payload=replace(ask, wait_s=0.0))), 0.0)) == ["version"]
    assert failures(machine.handle(Heard(DEVICE, activation()), 0.0)) == ["version"]
    assert machine.handle(Heard(DEVICE, Pull(1, 1, 1, ((0, 4),), "float32", 5.0)), 0.0) == [Reply(DEVICE, Refuse(1, 0, 0))]
    stranger = Caller(b"1", "device", "unheard of")
    (reply,) = machine.handle(Heard(stranger, PlanRequest(5, payload=ask)), 0.0)
    assert (reply.message.kind, reply.message.reason) == ("model", "no model 'unheard of' here; there is m, n")
    assert machine.handle(Published("n", 1, num_bytes), 1.0) == []
    assert machine.handle(Published("m", 4, num_bytes), 1.0) == [MakePlan(DEVICE, 1, 4, ask)]
    waiting = Answerer(models=("m",))
    waiting.handle(Heard(DEVICE, PlanRequest(1, payload=ask)), 0.0)
    assert waiting.next_deadline == 60.0
    assert failures(waiting.handle(Drain(), 0.0)) == ["draining"]


def test_pulls_of_versions_that_are_kept_are_served():
    machine = server((3, 4))
    pull = Pull(1, 3, 3, ((0, 4),), "float32", 5.0)
    assert machine.handle(Heard(DEVICE, pull), 0.0) == [Serve(DEVICE, pull)]
    assert machine.handle(Heard(DEVICE, replace(pull, version=NEWEST)), 0.0) == [Serve(DEVICE, replace(pull, version=4))]
    assert machine.handle(Heard(DEVICE, replace(pull, version=2)), 0.0) == [Reply(DEVICE, Refuse(1, 3, 4))]
    assert machine.handle(Heard(Caller(b"1", "d", "n"), pull), 0.0) == [Reply(Caller(b"1", "d", "n"), Refuse(1, 0, 0))]


def test_an_activation_runs_when_it_is_whole():
    machine = server()
    first, last = activation(samples=2, length=15), activation(samples=2, offset=15, length=5)
    assert machine.handle(Heard(DEVICE, first), 0.0) == [Keep(DEVICE, first)]
    for wrong in (last_ := replace(last, offset=16), replace(last, total=21), first):
        assert machine.handle(Heard(DEVICE, wrong), 0.0) == [], wrong
    assert machine.handle(Heard(OTHER, last_), 0.0) == [], "of another connection"
    assert machine.handle(Heard(DEVICE, last), 0.0) == [Keep(DEVICE, last), RunStage(DEVICE, last)]
    assert machine.handle(Heard(DEVICE, first), 0.0) == [], "it runs"
    assert machine.num_running == 1 and machine.handle(Ran(DEVICE, 1), 1.0) == [] and machine.num_running == 0


@pytest.mark.parametrize(
    ("chunk", "kind"),
    [
        (activation(version=2), "version"),
        (activation(cut=3), "input"),
        (activation(total=11), "input"),
        (activation(samples=0, total=1), "input"),
        (activation(samples=2**62, total=1), "input"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_kept(chunk, kind):
    actions = server().handle(Heard(DEVICE, chunk), 0.0)
    assert failures(actions) == [kind] and len(actions) == 1


def test_what_waits_is_bounded_in_number_by_caller_and_in_bytes():
    machine = server(max_queued=3, max_per_caller=2, max_bytes=1000)
    for request in (1, 2):
        assert machine.handle(Heard(DEVICE, activation(request)), 0.0)
    assert failures(machine.handle(Heard(DEVICE, activation(3)), 0.0)) == ["busy"]
    assert failures(machine.handle(Heard(OTHER, activation(1, samples=99)), 0.0)) == ["busy"]
    assert not failures(machine.handle(Heard(OTHER, activation(1)), 0.0))
    assert failures(machine.handle(Heard(OTHER, activation(2)), 0.0)) == ["busy"]
    machine.handle(Ran(DEVICE, 1), 1.0)
    assert not failures(machine.handle(Heard(OTHER, activation(2)), 0.0)), "there is room again"


def test_a_plan_and_an_activation_may_have_the_same_number():
    machine = server()
    ask = Ask(DeviceProfile())
    machine.handle(Heard(DEVICE, PlanRequest(1, payload=ask)), 0.0)
    machine.handle(Heard(DEVICE, activation(1, length=5)), 0.0)
    machine.handle(Planned(DEVICE, 1), 0.0)
    last = activation(1, offset=5, length=5)
    assert machine.handle(Heard(DEVICE, last), 0.0) == [Keep(DEVICE, last), RunStage(DEVICE, last)]


def test_an_activation_that_does_not_go_on_is_dropped():
    machine = server(upload_s=10.0)
    machine.handle(Heard(DEVICE, activation(samples=2, length=5)), 0.0)
    machine.handle(Heard(DEVICE, activation(samples=2, offset=5, length=5)), 8.0)
    assert machine.next_deadline == 18.0 and machine.handle(Wake(), 18.0) == [Discard(DEVICE, 1)]
    assert machine.handle(Heard(DEVICE, activation(samples=2, offset=10, length=10)), 19.0) == []
    assert machine.next_deadline is None


def test_a_version_is_kept_while_a_question_uses_it():
    machine = server((1, 2), versions_kept=2)
    machine.handle(Heard(DEVICE, activation(1, version=1)), 0.0)
    assert machine.handle(Published("m", 3, num_bytes), 1.0) == [], "a question uses version 1"
    assert failures(machine.handle(Heard(DEVICE, activation(2, version=1)), 1.0)) == ["version"], "but no new one may"
    assert machine.handle(Ran(DEVICE, 1), 2.0) == [Retire("m", 1)]
    assert machine.handle(Published("m", 4, num_bytes), 3.0) == [Retire("m", 2)]


def test_a_server_that_drains_finishes_what_it_has_taken_and_takes_nothing_more():
    machine = server()
    waiting = Ask(DeviceProfile(), held=1, wait_s=60.0)
    machine.handle(Heard(OTHER, PlanRequest(9, payload=waiting)), 0.0)
    machine.handle(Heard(DEVICE, activation(1)), 0.0)
    machine.handle(Heard(DEVICE, PlanRequest(2, payload=Ask(DeviceProfile()))), 0.0)
    assert failures(machine.handle(Drain(), 1.0)) == ["draining"], "who waits for news asks another"
    assert failures(machine.handle(Heard(DEVICE, activation(3)), 1.0)) == ["draining"]
    assert failures(machine.handle(Heard(DEVICE, PlanRequest(4, payload=waiting)), 1.0)) == ["draining"]
    assert machine.handle(Ran(DEVICE, 1), 2.0) == []
    assert machine.handle(Planned(DEVICE, 2), 2.0) == [Finish()]
    assert server().handle(Drain(), 0.0) == [Finish()]


# --- what may be continued --------------------------------------------------------------------------------------------


def answered(machine, request=1, caller=DEVICE, samples=1, now=0.0, keep=True, **changes) -> list:
    """An activation that has come and been computed: what is done after that."""
    chunk = replace(activation(request, samples=samples, **changes), keep=keep)
    assert RunStage(caller, chunk, keep) in machine.handle(Heard(caller, chunk), now)
    return machine.handle(Ran(caller, request), now)


def continuation(request=2, first=1, samples=1, of_samples=1, offset=0, total=None, length=None) -> Continuation:
    total = 8 * samples + -(-of_samples // 8) if total is None else total
    return Continuation(request, first, samples, offset, total, payload=bytes(total if length is None else length))


def test_what_was_to_be_kept_is_continued_once():
    machine = server()
    assert answered(machine, samples=9) == []
    first, last = continuation(samples=2, of_samples=9, length=10), continuation(samples=2, of_samples=9, offset=10, length=8)
    assert machine.handle(Heard(DEVICE, first), 1.0) == [Keep(DEVICE, first)]
    assert machine.handle(Heard(DEVICE, replace(last, offset=11)), 1.0) == []
    kept = First(1, 1, 1, 8, 9, 90)
    assert machine.handle(Heard(DEVICE, last), 2.0) == [Keep(DEVICE, last), RunAgain(DEVICE, last, kept)]
    assert machine.num_running == 1 and machine.handle(Ran(DEVICE, 2), 3.0) == [] and machine.next_deadline is None
    assert failures(machine.handle(Heard(DEVICE, continuation(3, of_samples=9)), 3.0)) == ["forgotten"]


def test_what_was_not_to_be_kept_or_is_anothers_is_not_continued():
    machine = server()
    answered(machine, 1, keep=False)
    answered(machine, 2)
    for caller, first in ((DEVICE, 1), (OTHER, 2), (Caller(b"1", "device", "m@1"), 2), (DEVICE, 9)):
        assert failures(machine.handle(Heard(caller, continuation(5, first)), 0.0)) == ["forgotten"]
    assert failures(machine.handle(Heard(DEVICE, continuation(2, 2)), 0.0)) == ["forgotten"], "two of one number"
    whole = replace(activation(3, total=18), bits=16, keep=True)
    assert machine.handle(Heard(DEVICE, whole), 0.0) == [Keep(DEVICE, whole), RunStage(DEVICE, whole)], "nothing is missing"


@pytest.mark.parametrize(
    "chunk",
    [
        continuation(of_samples=9, total=9),
        continuation(of_samples=9, samples=0, total=2),
        continuation(of_samples=9, samples=10),
        continuation(of_samples=9, samples=2**62, total=1),
    ],
)
def test_a_continuation_that_cannot_be_is_refused_and_the_right_one_may_follow(chunk):
    machine = server()
    answered(machine, samples=9)
    assert failures(machine.handle(Heard(DEVICE, chunk), 0.0)) == ["input"]
    assert not failures(machine.handle(Heard(DEVICE, continuation(of_samples=9)), 0.0))


def test_nothing_is_remembered_for_longer_than_a_while():
    machine = server(remember_s=30.0, upload_s=10.0)
    answered(machine, 1, now=0.0)
    answered(machine, 2, now=5.0)
    assert machine.next_deadline == 30.0 and machine.handle(Wake(), 30.0) == [Discard(DEVICE, 1)]
    assert failures(machine.handle(Heard(DEVICE, continuation(3, 1)), 30.0)) == ["forgotten"]
    machine.handle(Heard(DEVICE, continuation(3, 2, length=5)), 31.0)
    assert machine.next_deadline == 41.0, "it lasts as long as it goes on"
    assert machine.handle(Wake(), 41.0) == [Discard(DEVICE, 3), Discard(DEVICE, 2)]
    assert machine.next_deadline is None and not machine._remembered.num_bytes


def test_what_is_remembered_is_bounded_by_caller_and_in_all_and_the_oldest_goes_first():
    each = OVERHEAD_BYTES + 10
    machine = server(max_remembered_bytes_per_caller=2 * each, max_remembered_bytes=3 * each)
    assert [answered(machine, request) for request in (1, 2, 3)] == [[], [], [Discard(DEVICE, 1)]]
    assert answered(machine, 1, OTHER) == [] and answered(machine, 2, OTHER) == [Discard(DEVICE, 2)]
    assert answered(machine, 4, samples=200) == [Discard(DEVICE, 4)], "it does not fit at all"
    assert list(machine._remembered.keys) == [(DEVICE, 3), (OTHER, 1), (OTHER, 2)]


def test_a_continuation_takes_the_room_of_both():
    machine = server(max_bytes=25)
    answered(machine, 1)
    machine.handle(Heard(OTHER, activation(1)), 0.0)
    assert failures(machine.handle(Heard(DEVICE, continuation(2, 1)), 0.0)) == ["busy"], "9 and 10 beside 10"
    machine.handle(Ran(OTHER, 1), 0.0)
    assert not failures(machine.handle(Heard(DEVICE, continuation(2, 1)), 0.0))


def test_a_number_that_is_used_again_does_not_mix_two_activations():
    machine = server()
    answered(machine, 1)
    answered(machine, 1)
    again = replace(activation(1), keep=True)
    assert machine.handle(Heard(DEVICE, again), 0.0) == [Discard(DEVICE, 1), Keep(DEVICE, again), RunStage(DEVICE, again, True)]
    machine.handle(Ran(DEVICE, 1), 0.0)
    machine.handle(Heard(DEVICE, continuation(2, 1, length=5)), 0.0)
    assert failures(machine.handle(Heard(DEVICE, activation(1)), 0.0)) == ["input"], "it is being continued"


def test_a_version_that_is_not_kept_any_more_is_not_continued():
    machine = server((1, 2), versions_kept=2)
    answered(machine, 1, version=1)
    answered(machine, 2, version=2)
    late = replace(activation(3, version=1), keep=True)
    machine.handle(Heard(DEVICE, late), 0.0)
    assert machine.handle(Published("m", 3, num_bytes), 1.0) == [Discard(DEVICE, 1)]
    assert machine.handle(Ran(DEVICE, 3), 1.0) == [Discard(DEVICE, 3), Retire("m", 1)]
    assert failures(machine.handle(Heard(DEVICE, continuation(4, 3)), 1.0)) == ["forgotten"]
    assert not failures(machine.handle(Heard(DEVICE, continuation(5, 2)), 1.0))


def test_a_server_that_drains_continues_nothing_more_and_waits_for_nothing_that_it_remembers():
    machine = server()
    answered(machine, 1)
    machine.handle(Heard(DEVICE, replace(activation(2), keep=True)), 0.0)
    assert machine.handle(Drain(), 0.0) == []
    assert failures(machine.handle(Heard(DEVICE, continuation(3, 1)), 0.0)) == ["draining"]
    assert machine.handle(Ran(DEVICE, 2), 0.0) == [Discard(DEVICE, 2), Finish()]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_devices_send_what_is_kept_is_bounded_and_each_computation_finds_its_own(seed):
    chance, now, version = random.Random(seed), 0.0, 1
    machine = server(max_bytes=200, max_remembered_bytes=6000, max_remembered_bytes_per_caller=3000, versions_kept=2)
    kept: dict[tuple[Caller, int], int] = {}  # as the shell has it
    running: list[tuple[Caller, int]] = []
    again = 0

    def perform(actions) -> None:
        nonlocal again
        for action in actions:
            match action:
                case Keep(caller, chunk):
                    kept[caller, chunk.request] = kept.get((caller, chunk.request), 0) + len(chunk.payload)
                case Discard(caller, request):
                    kept.pop((caller, request), None)
                case RunStage(caller, chunk, remember):
                    key = caller, chunk.request
                    assert (kept[key] if remember else kept.pop(key)) == chunk.total
                    running.append(key)
                case RunAgain(caller, chunk, first):
                    found = [kept.pop((caller, request)) for request in (first.request, chunk.request)]
                    assert found == [first.num_bytes, chunk.total]
                    running.append((caller, chunk.request))
                    again += 1

    for _ in range(2000):
        now += chance.expovariate(1.0)
        caller, request = chance.choice((DEVICE, OTHER)), chance.randrange(6)
        if running and chance.random() < 0.4:
            perform(machine.handle(Ran(*running.pop(chance.randrange(len(running)))), now))
        elif chance.random() < 0.02:
            version += 1
            perform(machine.handle(Published("m", version, num_bytes), now))
        elif chance.random() < 0.5:
            samples = chance.choice((1, 1, 3, 9))
            offset = chance.choice((0, 0, 5))
            length = chance.choice((None, 5))
            length = 10 * samples - offset if length is None else length
            chunk = activation(request, version, samples, offset, length=length)
            perform(machine.handle(Heard(caller, replace(chunk, keep=chance.random() < 0.8)), now))
        else:
            samples, of_samples = chance.choice(((1, 1), (1, 3), (3, 3), (2, 9)))
            total = 8 * samples + -(-of_samples // 8)
            offset, length = chance.choice(((0, total), (0, total), (0, 4), (4, total - 4)))
            chunk = continuation(request, chance.randrange(6), samples, of_samples, offset, length=length)
            perform(machine.handle(Heard(caller, chunk), now))
        if machine.next_deadline is not None and machine.next_deadline <= now:
            perform(machine.handle(Wake(), now))
        assert sum(kept.values()) <= 200 + 6000
        known = [machine._remembered.get(*key) for key in machine._remembered.keys]
        assert machine._remembered.num_bytes.total() == sum(first.num_bytes + OVERHEAD_BYTES for first in known)
        assert all(total <= 3000 for total in machine._remembered.num_bytes.values())
    for key in running:
        perform(machine.handle(Ran(*key), now))
    perform(machine.handle(Wake(), now + 100.0))
    assert not kept and not machine._remembered.keys and again > 10


# --- both, under virtual time -----------------------------------------------------------------------------------------


class World:
    """A device and servers that lose messages, die and come back, with versions that change; all drawn from a seed.

    Every score is the version that it was computed with, so that a mixture would show.
    """

    def __init__(self, seed: int, num_servers: int, loss: float, policy: str) -> None:
        self.chance = random.Random(seed)
        self.loss = loss
        self.now = 0.0
        self.events: list = []
        self.tickets = itertools.count()
        self.peers = [f"m@{k}" for k in range(num_servers)]
        self.device = Asker(
            DeviceConfig(on_no_server=policy, patience_s=0.5, wait_s=2.0, audit_share=0.5),
            dict(zip(self.peers, self.peers, strict=True)),
            PROFILE,
            itertools.count(1),
            np.random.default_rng(seed),
        )
        self.servers = {peer: Answerer(ServerConfig(versions_kept=2, max_queued=4), ["m"]) for peer in self.peers}
        self.lives = dict.fromkeys(self.peers, True)
        self.newest = 0
        self.computed: dict[int, dict[str, tuple[int, int]]] = {}  # question -> tier -> version
        self.tiers: dict[tuple[str, int], tuple[int, str]] = {}  # request -> question and tier
        self.loaded: set[int] = set()
        self.ends: dict[int, tuple[float, object]] = {}
        self.set_aside: set[int] = set()
        self.num_compared = self.num_continued = 0
        self.deadlines: dict[int, float] = {}
        self.last_wakes = 0

    def after(self, delay: float, call) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.tickets), call))

    def run(self, until: float) -> None:
        wakes = 0
        while True:
            machines = [(self.device, self.tell_device)]
            machines += [(machine, lambda e, p=peer: self.tell_server(p, e)) for peer, machine in self.servers.items()]
            due = [(machine.next_deadline, k) for k, (machine, _) in enumerate(machines) if machine.next_deadline is not None]
            wake_at, index = min(due, default=(math.inf, 0))
            next_at = self.events[0][0] if self.events else math.inf
            if min(wake_at, next_at) > until:
                self.now = until
                return
            if wake_at <= next_at:
                wakes = wakes + 1 if wake_at <= self.now else 0
                assert wakes < 50, "the machine wakes and wakes"
                self.now = max(self.now, wake_at)
                machines[index][1](Wake())
            else:
                self.now, _, call = heapq.heappop(self.events)
                call()

    # the device's shell

    def tell_device(self, event) -> None:
        for action in self.device.handle(event, self.now):
            match action:
                case Send(peer, message):
                    self.to_server(peer, message)
                case LookUp(offer):
                    have = frozenset(d for d in digests(offer) if self.chance.random() < 0.5)
                    self.after(0.01, lambda v=offer.version, have=have: self.tell_device(Found(v, have)))
                case Load(offer):
                    self.after(0.05, lambda v=offer.version: self.load(v))
                case Unload(version):
                    self.loaded.discard(version)
                case RunHead(number, version):
                    assert version in self.loaded
                    whole = self.device.fetcher.loaded[version].cut == 3
                    if whole:
                        self.computed[number] = {"reduced": version}
                    found = (self.chance.random(),) if whole else None
                    self.after(0.01, lambda n=number, m=found: self.tell_device(HeadDone(n, m)))
                case Upload():
                    self.tiers[action.peer, action.request] = action.number, action.tier
                    if action.tier == "reduced":
                        self.computed[action.number] = {}
                    if action.first is not None:
                        total = num_bytes(action.cut, 16, 1) - num_bytes(action.cut, action.bits, 1) + 1
                        self.to_server(action.peer, Continuation(action.request, action.first, 1, 0, total, bytes(total)))
                        continue
                    total = num_bytes(action.cut, action.bits, 1)
                    message = Activation(
                        action.request, action.version, action.cut, action.bits, 1, 0, total, action.keep, bytes(total)
                    )
                    self.to_server(action.peer, message)
                case Resolve(number, offer, unsure, is_verified, _, is_continued):
                    found = self.computed.get(number, {})
                    fallback = "continued" if is_continued else "full"
                    used = {found[fallback]} if unsure and is_verified else {found["reduced"]}
                    self.num_continued += is_continued
                    assert used == {offer.version}, "a mixture of versions"
                    assert number not in self.ends
                    self.ends[number] = self.now, action
                case SetAside(number, audit, _):
                    assert number not in self.ends and self.computed[number]
                    self.set_aside.add(audit)
                case Audited(audit):
                    self.set_aside.remove(audit)
                case Fail(number):
                    assert number not in self.ends
                    self.ends[number] = self.now, action

    def load(self, version: int) -> None:
        self.loaded.add(version)
        self.tell_device(Loaded(version))

    def ask(self, number: int, budget: float) -> None:
        self.deadlines[number] = self.now + budget
        self.tell_device(Question(number, 1, self.now + budget))

    # the network

    def to_server(self, peer, message) -> None:
        if self.chance.random() >= self.loss:
            caller = Caller(b"o", "device", peer)
            self.after(
                self.chance.uniform(0.001, 0.02), lambda: self.lives[peer] and self.tell_server(peer, Heard(caller, message))
            )

    def to_device(self, peer, message) -> None:
        if self.chance.random() >= self.loss and self.lives[peer]:
            event = Received(peer, message)
            if self.chance.random() < self.loss and not isinstance(message, Later | Failed):
                event = Rejected(peer, message.request, "garbage")
            self.after(self.chance.uniform(0.001, 0.02), lambda: self.hear(peer, event))

    def hear(self, peer, event) -> None:
        message = getattr(event, "message", None)
        if isinstance(message, Result):  # as the shell does: computed scores are kept, then the machine hears of them
            known = self.tiers.get((peer, message.request))
            number, tier = known or (None, None)
            if known and tier == "audit":
                self.num_compared += 1
                event = replace(event, message=replace(message, payload=(False,)))
            elif number is not None and number not in self.ends:
                self.computed.setdefault(number, {})
                asked = self.device._by_request.get(message.request)
                if asked is not None and asked.tier == tier and message.request in asked.requests:
                    self.computed[number][tier] = message.version
        self.tell_device(event)

    # the servers' shells

    def tell_server(self, peer, event) -> None:
        for action in self.servers[peer].handle(event, self.now):
            match action:
                case Reply(_, message):
                    self.to_device(peer, message)
                case MakePlan(caller, request, version, _):
                    self.after(0.01, lambda c=caller, r=request, v=version: self.offer(peer, c, r, v))
                case Serve(_, pull):
                    for range_ in pull.ranges:
                        self.to_device(peer, data(pull, range_))
                case RunStage(caller, chunk):
                    self.after(0.02, lambda c=caller, a=chunk: self.ran(peer, c, a.request, a.version))
                case RunAgain(caller, chunk, first):
                    self.after(0.02, lambda c=caller, a=chunk, v=first.version: self.ran(peer, c, a.request, v))

    def offer(self, peer, caller, request, version) -> None:
        cut, activation_bits = [(3, 0), (2, 8), (0, 32), (0, 8)][version % 4]
        fallback = "continued" if activation_bits == 8 and version % 8 < 4 else "full"
        offer = certified(version, cut=cut, activation_bits=activation_bits, threshold=0.3, fallback=fallback)
        self.to_device(peer, Offer(request, 0, 1, payload=offer))
        self.tell_server(peer, Planned(caller, request))

    def ran(self, peer, caller, request, version) -> None:
        self.to_device(peer, Result(request, version, 0.02, 0, 1, payload=(self.chance.random(),)))
        self.tell_server(peer, Ran(caller, request))

    def publish(self) -> None:
        self.newest += 1
        for peer in self.peers:
            if self.lives[peer]:
                self.tell_server(peer, Published("m", self.newest, num_bytes))

    def kill(self, peer) -> None:
        if self.lives[peer]:
            self.lives[peer] = False
            self.after(0.005, lambda: self.tell_device(PeerDown(peer)))

    def revive(self, peer) -> None:
        if not self.lives[peer]:
            self.lives[peer] = True
            self.servers[peer] = Answerer(ServerConfig(versions_kept=2, max_queued=4), ["m"])
            if self.newest:
                self.tell_server(peer, Published("m", self.newest, num_bytes))
            self.after(0.01, lambda: self.tell_device(PeerUp(peer)))


def troubled_world(seed: int, loss: float, policy: str) -> World:
    world = World(seed, num_servers=1 + seed % 3, loss=loss, policy=policy)
    chance = random.Random(seed + 1)
    world.publish()
    world.tell_device(Start())
    for number in range(60):
        world.after(chance.uniform(0, 20), lambda n=number: world.ask(n, chance.choice([0.05, 0.5, 3.0])))
    for _ in range(chance.randrange(8)):
        world.after(chance.uniform(0, 20), world.publish)
    for _ in range(chance.randrange(6)):
        peer, at = chance.choice(world.peers), chance.uniform(0, 18)
        world.after(at, lambda p=peer: world.kill(p))
        world.after(at + chance.uniform(0.02, 3), lambda p=peer: world.revive(p))
    world.run(300.0)
    return world


@pytest.mark.parametrize("policy", ["unverified", "fail"])
@pytest.mark.parametrize("loss", [0.0, 0.1, 0.4])
def test_whatever_is_lost_and_whoever_dies_every_question_ends_in_time_and_with_one_version(loss, policy):
    kinds, num_continued = set(), 0
    for seed in range(12):
        world = troubled_world(seed, loss, policy)
        num_continued += world.num_continued
        assert len(world.ends) == 60
        for number, (ended, how) in world.ends.items():
            assert ended <= world.deadlines[number] + 1e-9, (seed, number, how)
            kinds.add(type(how).__name__ + str(getattr(how, "is_verified", "")))
        assert not world.device._questions and not world.device._by_request and not world.set_aside
        assert set(world.device._audits._watched) <= world.loaded
        assert world.loaded == {world.device.fetcher.active.version} and world.device.fetcher.active.version == world.newest
    assert "ResolveTrue" in kinds and num_continued > 0
    assert ("ResolveFalse" in kinds) <= (policy == "unverified")


def test_without_trouble_every_question_is_answered():
    for seed in range(6):
        world = World(seed, 2, 0.0, "fail")
        world.publish()
        world.tell_device(Start())
        for number in range(100):
            world.after(0.5 + number * 0.05, lambda n=number, w=world: w.ask(n, 5.0))
        for k in range(5):
            world.after(1.0 + k, world.publish)
        world.run(20.0)
        assert len(world.ends) == 100 and all(isinstance(how, Resolve) and how.is_verified for _, how in world.ends.values())
        assert world.num_compared > 10 and world.num_continued > 0


def test_questions_that_come_before_the_first_version_are_answered_soon_after_it():
    """With 14 messages of at most 20 ms, and what takes 10 to 50 ms at both ends."""
    for seed in range(6):
        world = World(seed, 1 + seed % 3, 0.0, "fail")
        world.tell_device(Start())
        for number in range(3):
            world.after(number * 5.0, lambda n=number, w=world: w.ask(n, 60.0))
        world.after(20.0, world.publish)
        world.run(100.0)
        assert all(isinstance(how, Resolve) and 20.0 < ended < 20.5 for ended, how in world.ends.values())
        assert len(world.ends) == 3


def test_the_same_events_give_the_same_run():
    runs = [troubled_world(5, 0.2, "unverified") for _ in range(2)]
    assert runs[0].ends == runs[1].ends
