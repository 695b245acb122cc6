"""What the commands of inference show: progress, and tables of what was measured and planned."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from gossipfl.inference.execution.calibration import Calibration, Progress
from gossipfl.inference.execution.engines import UNDISTURBED
from gossipfl.inference.planning.cuts import CutRow
from gossipfl.inference.planning.profile import DeviceProfile, ModelProfile, Plan
from gossipfl.scenario.inference.bench import PlanRow, ThresholdRow
from gossipfl.scenario.inference.calibrate import certificates_by_bits
from gossipfl.scenario.inference.cascades import CONFIDENCE, CascadeRow
from gossipfl.scenario.inference.fallbacks import FallbackRow
from gossipfl.scenario.inference.latency import LatencyRow
from gossipfl.scenario.inference.link_error import LinkRow
from gossipfl.scenario.inference.payload import payload, saved
from gossipfl.scenario.terminal import size_text

LINE_S = 5.0
"""Where there is no terminal, seconds between two lines of progress."""


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """Shows how far a measurement has come, on stderr."""
    console = Console(stderr=True)
    if quiet:
        yield lambda what, share: None
    elif console.is_terminal:
        with Bar(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda what, share: bar.update(task, description=what, completed=share)
    else:
        shown_at = time.monotonic()

        def line(what: str, share: float) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at > LINE_S:
                shown_at = time.monotonic()
                print(f"{what}: {share:.0%} of all", file=sys.stderr)

        yield line


def bits_text(bits: Sequence[int]) -> str:
    """`4, 3 x2` for few layers, `3 to 9, mean 6.4` for many."""
    runs = [(value, len(list(same))) for value, same in groupby(bits)]
    if len(runs) > 4:
        return f"{min(bits)} to {max(bits)}, mean {statistics.fmean(bits):.1f}"
    return ", ".join(f"{value}" + (f" x{count}" if count > 1 else "") for value, count in runs) or "-"


def print_calibration(console: Console, calibration: Calibration) -> None:
    """All layers on the device, by level: what it takes, and from which margin its answers stand."""
    profile, last = calibration.catalogue.profile, len(calibration.catalogue.profile.layers)
    certificates = certificates_by_bits(calibration)
    title = f"{calibration.model}: all on the device, by allowed loss of accuracy"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("allowed", "bits per layer", "bytes", "saved", "measured harm", "threshold", "falls back"):
        table.add_column(column, justify="left" if column == "bits per layer" else "right")
    for level, cuts in sorted(calibration.catalogue.levels.items()):
        if last not in cuts:
            continue
        bits, _ = cuts[last]
        certificate = certificates.get(bits)
        table.add_row(
            f"{level:.1%}",
            bits_text(bits),
            f"{payload(profile, last, bits, 0):,}",
            f"{saved(profile, last, bits, 0):.1%}",
            f"{calibration.harm[level][last]:.2%}",
            "-" if certificate is None or not math.isfinite(certificate.threshold) else f"{certificate.threshold:.3f}",
            "-" if certificate is None else f"{certificate.fallback_rate:.1%}",
        )
    console.print(table)
    for certificate in calibration.certificates[:1]:
        claim = (
            f"certified on {certificate.n} samples: at most {certificate.alpha:.1%} of the answers differ from the full "
            f"model's, but for {certificate.delta or 0:.0%} of calibrations"
        )
        console.print(f"note: {certificate.warning}" if certificate.warning else claim, highlight=False)
    print_note(console, calibration)


def print_plan(
    console: Console, calibration: Calibration, plan: Plan, rows: Sequence[CutRow], device: DeviceProfile, loss: float
) -> None:
    """For `device` and this loss of accuracy at most; with the certificates of the plan that there are by now."""
    profile, certificates = calibration.catalogue.profile, calibration.certificates_for(plan)
    title = f"every cut of {len(profile.layers)} layers for {device.name}, for a loss of {100 * loss:g} % at most"
    table = Table("cut after", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = (
        "bits: layers | cut",
        "engine",
        "down",
        "up",
        "saved",
        "request\nin ms",
        "falls\nback",
        "energy\nin mJ",
        "memory",
    )
    for column in columns:
        table.add_column(column, justify="left" if column.startswith(("bits", "engine")) else "right", overflow="fold")
    for row in rows:
        found = row.prediction
        if found is None:
            table.add_row(_place(profile, row.cut), row.obstacle or "")
            continue
        table.add_row(
            _place(profile, row.cut),
            f"{bits_text(row.weight_bits)} | {row.activation_bits or '-'}",
            row.device_engine if row.cut else "-",
            size_text(found.weight_bytes + found.sample_bytes + found.offer_bytes),
            size_text(found.activation_bytes),
            f"{saved(profile, row.cut, row.weight_bits, row.activation_bits):.0%}",
            f"{_thousandths(row.request_s)}{_added_ms(row)}",
            "?" if row.fallback_rate is None else f"{row.fallback_rate:.1%}",
            _thousandths(found.energy_j),
            size_text(found.memory_bytes),
            style="bold" if row.cut == plan.cut else "dim" if row.obstacle else None,
        )
    console.print(table)
    for line in (
        "down: weights, offer, and samples where an engine is compiled with some; saved: of weights and values at the cut",
        "request: with the weights there + what those that fall back add to a mean one",
        "falls back: share of the samples that the bits were chosen with, were the plan certified on them",
        f"cost: seconds (with 1/{device.requests} of the fetch), joules and the server's seconds of a mean request, weighted",
    ):
        console.print(line, highlight=False)
    for row in rows:
        if row.obstacle and row.prediction:
            console.print(f"not after {_place(profile, row.cut)}: {row.obstacle}", highlight=False)
    chosen = next(row for row in rows if row.cut == plan.cut)
    console.print(
        f"chosen  cut after {_place(profile, plan.cut)}, cost {chosen.cost:.3g}{_cost_of_fallbacks(plan)}", highlight=False
    )
    fetched = {"offer": chosen.offer_s, "weights": chosen.pull_s}
    texts = [f"{what} {1000 * seconds:.2f} ms" for what, seconds in fetched.items()]
    console.print(f"fetched once, before the first request: {', '.join(texts)}", highlight=False)
    if plan.afresh is None:
        return
    ways = {"starts afresh": plan.afresh} | ({"continues": plan.continued} if plan.continued else {})
    texts = [f"{way}: {size_text(cost.bytes_up)} up, {1000 * cost.latency_s:.2f} ms" for way, cost in ways.items()]
    console.print(f"a fallback that {' | that '.join(texts)}", highlight=False)
    for one in certificates:
        way = "continues" if one.basis.fallback == "continued" else "starts afresh"
        margin = f"from margin {one.threshold:.3f} on answers stand" if math.isfinite(one.threshold) else "no answer stands"
        console.print(
            f"certified on {one.n} samples where a fallback {way}: {margin}, {one.fallback_rate:.1%} fall back", highlight=False
        )
    if not certificates:
        console.print("not certified yet: a server does that when it first offers this plan", highlight=False)
    print_note(console, calibration)


def print_note(console: Console, calibration: Calibration) -> None:
    """Where the calibration is not as it should be."""
    if calibration.warning:
        console.print(f"note: {calibration.warning}", highlight=False)


def _added_ms(row: CutRow) -> str:
    """What fallbacks add to a mean request."""
    if row.prediction is None or row.expected is None or not row.fallback_rate:
        return ""
    return f" + {_thousandths(row.expected.latency_s - row.prediction.latency_s)}"


def _thousandths(value: float) -> str:
    return f"{1000 * value:.2f}" if value < 0.1 else f"{1000 * value:.0f}"


def _cost_of_fallbacks(plan: Plan) -> str:
    if plan.afresh is None:
        return ""
    if plan.fallback_rate is None or plan.fallback_cost is None:
        return ", fallbacks left out: nobody has measured how many there are"
    if not plan.fallback_rate:
        return ", nothing of it for fallbacks: none were seen"
    return f", of which {plan.fallback_rate * plan.fallback_cost.cost:.3g} for the {plan.fallback_rate:.1%} that fall back"


def _place(profile: ModelProfile, cut: int) -> str:
    return profile.layers[cut - 1].name if cut else "nothing"


def plain(value: Any) -> Any:
    """Numbers that JSON can hold: infinite ones as null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_plan_rows(console: Console, rows: Sequence[PlanRow]) -> None:
    """Devices that get the same plan share a line."""
    title = "QPART: bytes of one cold request against 32 bits, and accuracy on test samples"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("loss", "cut", "bits: layers | cut", "bytes", "saved", "loses", "falls back", "devices"):
        table.add_column(column, justify="left" if column in ("bits: layers | cut", "devices") else "right")
    devices: dict[PlanRow, list[str]] = {}
    for row in rows:
        devices.setdefault(replace(row, device=""), []).append(row.device)
    for row, names in devices.items():
        table.add_row(
            f"{row.level:.1%}",
            f"{row.cut}/{row.num_layers}",
            f"{bits_text(row.weight_bits)} | {row.activation_bits or '-'}",
            size_text(row.payload),
            f"{row.saved:.1%}",
            f"{row.predicted_loss:.2%} | {row.measured_loss:.2%}",
            f"{row.predicted_fallback:.1%}, {row.certified_fallback:.1%} | {row.measured_fallback:.1%}",
            ", ".join(names),
        )
    console.print(table)
    for line in (
        "loses: accuracy, at most | on test samples",
        "falls back: of the samples that bits were chosen with (as in plan-inference), of those certified on | of test samples",
    ):
        console.print(line, highlight=False)


def print_threshold_rows(console: Console, rows: Sequence[ThresholdRow]) -> None:
    title = "ARI: all on the device, the full model for small margins; on test samples"
    table = Table("bits", "threshold", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("margin", "falls back", "differs", "loss", "energy saved", "time saved"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.bits:.1f}",
            row.rule,
            f"{row.threshold:.3f}",
            f"{row.fallback:.1%}",
            f"{row.risk:.2%}",
            f"{row.loss:.2%}",
            f"{row.energy_saved:.0%}",
            f"{row.time_saved:.0%}",
        )
    console.print(table)
    for line in (
        "max: above every margin seen where the class changed; fit99, fit99.9: quantiles of an exponential fitted to those",
        "margins, at most 1, where all fall back: with few bits the fit is poor; certified: what a guarantee is given for",
        "time: of computing alone, both models on this machine, without links",
    ):
        console.print(line, highlight=False)


def print_fallback_rows(console: Console, rows: Sequence[FallbackRow]) -> None:
    """What a server would offer is in bold."""
    title = "fallbacks, to continue or to start afresh: predicted | measured"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("device, cut", "way", "bytes up", "ms", "fall back", "differ", "of all"):
        table.add_column(column, justify="left" if column in ("device, cut", "way") else "right", overflow="fold")
    for row in rows:
        table.add_row(
            f"{row.device} {row.cut}/{row.num_layers}",
            "continue" if row.fallback == "continued" else "afresh",
            _both(row.predicted_up, row.measured_up),
            f"{_ms(row.predicted_s)} | {_ms(row.measured_s)}",
            "-" if row.fallback_rate is None else f"{row.fallback_rate:.1%}",
            "-" if row.risk is None else f"{row.risk:.2%}",
            f"{row.differs:.2%}",
            style="bold" if row.is_chosen else None,
        )
    console.print(table)
    for line in (
        f"ms: of the fallback alone, as plan-inference says | the quantile {UNDISTURBED} of what was measured",
        "shares of test samples: that fall back, that differ then (-: not certified), and if all fell back",
    ):
        console.print(line, highlight=False)


def print_latency_rows(console: Console, rows: Sequence[LatencyRow]) -> None:
    """The plan that each device gets is the first, in bold; of bytes that are as predicted there is one number."""
    title = "a request without fallbacks, the weights there, and what fetching these takes; on emulated devices and links"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("device, cut", "plan\nin ms", "now\nin ms", "measured\nin ms", "error\nof plan", "error\nof now")
    for column in (*columns, "bytes up", "bytes down\nto fetch", "weights in ms:\nplan | measured"):
        table.add_column(column, justify="left" if column.startswith("device") else "right", overflow="fold")
    for row in rows:
        table.add_row(
            f"{row.device} {row.cut}/{row.num_layers}",
            _ms(row.predicted_s),
            _ms(row.predicted_now_s),
            _ms(row.measured_s),
            f"{row.error:+.1%}",
            f"{row.error_now:+.1%}",
            _both(row.predicted_up, row.measured_up),
            _both(row.predicted_pull, row.measured_pull),
            f"{_ms(row.predicted_pull_s)} | {_ms(row.measured_pull_s)}" if row.cut else "-",
            style="bold" if row.is_chosen else None,
        )
    console.print(table)
    for line in (
        "of each device first its plan (for a loss of 1 %, or the least that there is), the middle cut, all on the server",
        "plan: the request of plan-inference; what it takes beside its layers (threads, messages) is as it was calibrated",
        "now: the same with that as it is in this call, measured on devices without a link",
        f"measured: the quantile {UNDISTURBED} of {min(row.turns for row in rows)} requests or more, as other work only adds",
        "bytes to fetch: of offer and weights; weights in ms: to fetch them, after the offer",
    ):
        console.print(line, highlight=False)
    for row in rows:
        if row.refused:
            place, engines = f"{row.device} {row.cut}/{row.num_layers}", ", ".join(row.refused)
            console.print(f"{place}: was not faster with {engines} than with fp32, so its plan is without", highlight=False)


def print_cascade_rows(console: Console, rows: Sequence[CascadeRow]) -> None:
    """The plan that each device gets is the first, in bold."""
    title = "certified plans: a mean request with its fallbacks, the weights there: predicted | measured"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("device, cut", "bits", "way", "falls back:\ncertified | test", "ms, at the\ntest share", "error")
    for column in (*columns, "ms, at the\ncertified", "error", "bytes up"):
        table.add_column(column, justify="left" if column in ("device, cut", "bits", "way") else "right", overflow="fold")
    for row in rows:
        least, most = row.rate_within
        table.add_row(
            f"{row.device} {row.cut}/{row.num_layers}",
            bits_text(row.weight_bits),
            "continue" if row.fallback == "continued" else "afresh",
            f"{row.predicted_rate:.1%} ({100 * least:.1f} to {100 * most:.1f}) | {row.measured_rate:.1%}",
            f"{_ms(row.at_rate_s)} | {_ms(row.measured_s)}",
            f"{row.error_at_rate:+.1%}",
            _ms(row.predicted_s),
            f"{row.error:+.1%}",
            f"{row.predicted_up:.0f} | {row.measured_up:.0f}",
            style="bold" if row.is_chosen else None,
        )
    console.print(table)
    for line in (
        "of each device first the plan that it gets at the largest loss, then all layers on it at the bits of that loss",
        f"falls back: of the {rows[0].certified_on} samples certified on (their range at {CONFIDENCE:.0%}) | of test samples",
        "ms: predicted as `now` above and with either share; where the shares differ by chance, so do the two predictions",
        f"measured: {rows[0].turns} requests that stand and as many that fall back, if any do, weighted with the test share",
    ):
        console.print(line, highlight=False)


def print_link_rows(console: Console, rows: Sequence[LinkRow]) -> None:
    title = "emulated links by themselves: set | measured"
    table = Table("link", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("latency in ms", "error", "bytes/s", "error"):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(
            f"{row.device} {row.direction}",
            f"{1000 * row.latency_s:.1f} | {1000 * row.measured_latency_s:.2f}",
            f"{row.latency_error:+.1%}",
            f"{row.rate:,.0f} | {row.measured_rate:,.0f}",
            f"{row.rate_error:+.1%}",
        )
    console.print(table)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 0.1 else f"{1000 * seconds:.0f}"


def _both(predicted: int, measured: int) -> str:
    return f"{predicted:,}" if predicted == measured else f"{predicted:,} | {measured:,}"
