"""BACombo: segments pulled rather from where bandwidth is large (Jiang, Hu, Hu and Wang, Electronics 9(3):440, 2020).

Published: the training time is up to 18 times as short as with the baselines, without loss of accuracy. The network and the
dials are those of the code that seems to be the authors': a model of 20 to 30 units, 1 to 99 units per unit of time from each
peer to each other, at most 100 out of each, 10 to 30 units of time to train; S = 8, R = 5, epsilon = 0.5, IID.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossipfl.scenario.reproduce.figures import REPRODUCTIONS, Arms, Outcome, Reproduction, Row, Table, to_target

PEERS = 30
SEGMENTS, REPLICAS = 8, 5
EXPLORATIONS = (0.0, 0.2, 0.5, 0.8)
PUBLISHED = 18.0
STEPS = 5
EVALUATED_EVERY = {False: 1, True: 10}
"""Rounds, by `full`: ten thousand test samples take fifty times as long as training does."""
IDLE = "-idle"
"""Of the arms in which training takes no time."""
PARAMETERS = {False: 9_610, True: 2_156_490}
"""Of the MLP on digits; of the CNN on CIFAR-10, by `full`."""
UNIT_S = {full: 32 * parameters / 1e6 / 25 for full, parameters in PARAMETERS.items()}
"""Seconds in which 1 Mbit/s carries a 25th of the model: their unit of time, if their unit of bandwidth is 1 Mbit/s. It keeps
their ratio of sending to training, whatever the model's size."""
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "combo": ("Combo: neighbours drawn uniformly", {"selection": "uniform"}),
    "plain": ("plain gossip: whole models", {"selection": "uniform", "segments": 1}),
    "server": ("FedAvg: a server at one peer", {"protocol": "fedavg", "selection": "uniform", "segments": 1}),
}


def _scenario(full: bool, **gossip: Any) -> dict[str, Any]:
    fastest, slowest = (training * UNIT_S[full] / STEPS for training in (10, 30))
    return {
        "peers": PEERS,
        "rounds": 200 if full else 100,
        "evaluate_every": EVALUATED_EVERY[full],
        "model": "cnn" if full else "mlp",
        "data": {"kind": "cifar10" if full else "digits"},
        "training": {"local_steps": STEPS, "batch_size": 10, "learning_rate": 0.05},
        "gossip": {
            "selection": "bandwidth",
            "segments": SEGMENTS,
            "replicas": REPLICAS,
            "mixing": "uniform",
            "patience": 36_000.0,
            **gossip,
        },
        "network": {"uplink": "100Mbit", "pair": {"kind": "uniform", "low": "1Mbit", "high": "99Mbit"}},
        "compute": {"step_time": {"kind": "uniform", "low": _ms(fastest), "high": _ms(slowest)}},
        "stop": {"target_accuracy": _target(full)},
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.6g}ms"


def _target(full: bool) -> float:
    return 0.6 if full else 0.9


def _arms(full: bool) -> Arms:
    arms = {_name(exploration): _scenario(full, exploration=exploration) for exploration in EXPLORATIONS}
    arms |= {name: _scenario(full, **changes) for name, (_, changes) in BASELINES.items()}
    return arms | {f"{name}{IDLE}": {**arm, "compute": {"step_time": "1us"}} for name, arm in arms.items()}


def _name(exploration: float) -> str:
    return f"bacombo-{exploration:g}"


def _tables(outcomes: Mapping[str, Outcome], full: bool) -> list[Table]:
    def ratios(suffix: str) -> list[Row]:
        published = outcomes[_name(0.5) + suffix]
        return [_ratio(title, published, outcomes[name + suffix]) for name, (title, _) in BASELINES.items()]

    def details(suffix: str) -> list[Row]:
        rows = [
            Row(f"epsilon = {exploration:g}", to_target(outcomes[_name(exploration) + suffix])) for exploration in EXPLORATIONS
        ]
        return rows + [Row(title, to_target(outcomes[name + suffix])) for name, (title, _) in BASELINES.items()]

    comparison = f"time to accuracy {_target(full)}, the baseline's / BACombo's"
    return [
        Table(comparison, ratios(""), _notes(full)),
        Table(f"{comparison}, where training takes no time", ratios(IDLE)),
        Table(f"S = {SEGMENTS}, R = {REPLICAS}", details("")),
        Table(f"S = {SEGMENTS}, R = {REPLICAS}, where training takes no time", details(IDLE)),
    ]


def _ratio(name: str, bacombo: Outcome, baseline: Outcome) -> Row:
    values, band = {"published": f"up to {PUBLISHED:g}"}, (1.0, PUBLISHED)
    if bacombo.seconds_to_target is None or baseline.seconds_to_target is None:
        return Row(name, values | {"measured": "target not reached"}, None, band, is_best=True)
    ratio = baseline.seconds_to_target / bacombo.seconds_to_target
    values |= {"measured": f"{ratio:.2f}", "of synchronising alone": f"{baseline.sync_s / bacombo.sync_s:.2f}"}
    return Row(name, values, ratio, band, is_best=True)


def _notes(full: bool) -> list[str]:
    return [
        f"{'CIFAR-10 and the CNN of McMahan et al.' if full else 'digits and an MLP'} in place of FEMNIST, IID; {PEERS} peers "
        f"assumed; {STEPS} steps of 10 samples a round at learning rate 0.05"
        + (f"; evaluated every {EVALUATED_EVERY[full]} rounds" if full else ""),
        f"their units: a model is 25 of them, so that training takes {10 * UNIT_S[full]:.2f} to {30 * UNIT_S[full]:.2f} s "
        "here, each peer its own time; the less it takes, the more synchronising counts: hence the second table, in which it "
        "takes none",
        "rates are max-min fair; no latency; a round's end is no common barrier; pulls of a neighbour that still trains wait",
        f"ahead: quicker than the baseline; {PUBLISHED:g} times is the best published, not what is to be expected here",
    ]


@REPRODUCTIONS.register("bacombo")
def bacombo() -> Reproduction:
    """Bandwidth-aware segmented gossip against uniform selection, plain gossip and a parameter server."""
    return Reproduction(_arms, _tables)
