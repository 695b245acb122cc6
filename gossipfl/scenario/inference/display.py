"""What the commands of inference show: progress, and tables of what was measured and planned."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from gossipfl.inference.execution.calibration import Calibration, Progress
from gossipfl.inference.planning.cuts import CutRow, activation_bytes, weight_bytes
from gossipfl.inference.planning.profile import ModelProfile, Plan
from gossipfl.scenario.inference.calibrate import certificates_by_bits

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
    """`4 x12, 5, 6 x3`: runs of equal bits."""
    runs: list[list[int]] = []
    for value in bits:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return ", ".join(f"{value}" + (f" x{count}" if count > 1 else "") for value, count in runs) or "-"


def saved(profile: ModelProfile, cut: int, weight_bits: Sequence[int], activation_bits: int) -> float:
    """Share of the bytes of one cold request that quantization saves, against 32 bits for the same cut."""
    return 1 - payload(profile, cut, weight_bits, activation_bits) / payload_32(profile, cut)


def payload(profile: ModelProfile, cut: int, weight_bits: Sequence[int], activation_bits: int) -> int:
    """Bytes of one request whose weights are not there yet: weights, scales and biases down, the cut up."""
    return weight_bytes(profile, weight_bits) + activation_bytes(profile, cut, activation_bits)


def payload_32(profile: ModelProfile, cut: int) -> int:
    """The same in float32."""
    layers = profile.layers[:cut]
    biases = sum(layer.bias[1] - layer.bias[0] for layer in layers if layer.bias)
    return 4 * (sum(layer.num_weights for layer in layers) + biases + profile.num_cut(cut))


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
        console.print(
            f"certified on {certificate.n} samples: at most {certificate.alpha:.1%} of the answers differ from the full "
            f"model's, but for {certificate.delta or 0:.0%} of calibrations",
            highlight=False,
        )
        if certificate.warning:
            console.print(f"note: {certificate.warning}", highlight=False)
    if calibration.warning:
        console.print(f"note: {calibration.warning}", highlight=False)


def size_text(num_bytes: float) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def print_plan(console: Console, profile: ModelProfile, plan: Plan, rows: Sequence[CutRow], device: str) -> None:
    title = f"every cut of {len(profile.layers)} layers for {device}"
    table = Table("cut after", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("bits: layers | cut", "down", "up", "saved", "latency", "energy", "memory"):
        table.add_column(
            column, justify="left" if column.startswith("bits") else "right", no_wrap=not column.startswith("bits")
        )
    table.add_column("")
    for row in rows:
        name = profile.layers[row.cut - 1].name if row.cut else "all on server"
        found = row.prediction
        if found is None:
            table.add_row(name, *[""] * 7, row.obstacle or "")
            continue
        is_chosen = row.cut == plan.cut
        table.add_row(
            name,
            f"{bits_text(row.weight_bits)} | {row.activation_bits or '-'}",
            size_text(found.weight_bytes),
            size_text(found.activation_bytes),
            f"{saved(profile, row.cut, row.weight_bits, row.activation_bits):.0%}",
            f"{1000 * found.latency_s:.2f} ms",
            f"{1000 * found.energy_j:.2f} mJ",
            size_text(found.memory_bytes),
            "chosen" if is_chosen else row.obstacle or "",
            style="bold" if is_chosen else None,
        )
    console.print(table)


def plain(value: Any) -> Any:
    """Numbers that JSON can hold: infinite ones as null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
