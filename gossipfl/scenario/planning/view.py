"""What a person sees of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console

from gossipfl.scenario.planning.plan import Plan, Spread
from gossipfl.scenario.terminal import counted, print_figures, size_text
from gossipfl.scenario.topology_view import explain, gap_text

_ALONE = {
    "compute": "training",
    "uplink": "uplink",
    "downlink": "downlink",
    "pair": "slowest pair",
    "latency": "latency, there and back",
    "loss": "loss",
}


def print_plan(console: Console, plan: Plan) -> None:
    """The plan as a table, and what it leaves out."""
    title = f"{plan.scenario}: {counted(plan.peers, 'peer')}, {counted(plan.rounds, 'round')}, {plan.protocol}"
    print_figures(console, title, _rows(plan))
    console.print(explain(plan.topology), highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "model parameters", f"{plan.parameters:,}"
    yield "model, in memory / as sent", f"{size_text(plan.model_bytes)} / {size_text(plan.encoded_bytes)}"
    yield "a peer receives per round", _spread_text(plan.received_bytes)
    yield "a peer sends per round", _spread_text(plan.sent_bytes)
    yield "payload, all", size_text(plan.total_bytes)
    yield "memory needed / free", f"{size_text(plan.memory_bytes)} / {size_text(plan.available_bytes)}"
    yield "spectral gap", gap_text(plan.topology)
    if plan.timing is None:
        return
    for name, cost in plan.timing.costs.items():
        if cost.seconds > 0:
            yield f"  {_ALONE[name]} alone", f"{_seconds_text(cost.seconds)}{f' ({cost.peer})' if cost.peer else ''}"
    yield "bottleneck", plan.timing.bottleneck
    yield "a round", _seconds_text(plan.timing.round_s)
    yield "all rounds", _seconds_text(plan.timing.total_s)


def _spread_text(spread: Spread) -> str:
    if math.isclose(spread.min, spread.max):
        return size_text(spread.mean)
    return f"{size_text(spread.min)} to {size_text(spread.max)}"


def _seconds_text(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds:,.0f} s" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
