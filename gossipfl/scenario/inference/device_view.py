"""What `gossipfl device` prints: a line for each answer with --json, else what all of them came to."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from gossipfl.inference.planning.receipts import Answer, Receipt, Tier
from gossipfl.runtime.edge_device import EdgeDevice
from gossipfl.scenario.inference.display import bits_text, plain
from gossipfl.scenario.terminal import print_line, size_text


class Answers:
    """Gathers answers; `labels` (i64[n]) where they are known."""

    def __init__(self, labels: np.ndarray | None, as_json: bool) -> None:
        self._labels, self._as_json = labels, as_json
        self._seconds: list[float] = []
        self._receipts: list[Receipt] = []
        self._right = 0

    def take(self, index: int, answer: Answer, seconds: float) -> None:
        class_ = int(answer.scores[0].argmax())
        self._seconds.append(seconds)
        self._receipts.append(answer.receipt)
        if self._labels is not None:
            self._right += class_ == self._labels[index]
        if self._as_json:
            receipt = plain(asdict(answer.receipt))
            print(json.dumps({"sample": index, "class": class_, "receipt": receipt}), flush=True)

    def finish(self, device: EdgeDevice) -> None:
        for reason in device.refused.values():
            print_line(Console(stderr=True), f"not used on this device: {reason}")
        if self._as_json or not self._receipts:
            return
        last, count = self._receipts[-1], len(self._receipts)
        tiers = Counter(tier for receipt in self._receipts for tier in receipt.tiers)
        table = Table("figure", title=f"{count} answers of {last.model}, version {last.version}", title_justify="left")
        table.box, table.show_header = box.SIMPLE, False
        table.add_column("value", justify="right")
        rows = {
            "layers here": f"{last.cut} at {bits_text(last.weight_bits)} bits, by {last.engines[0]}" if last.cut else "none",
            "pulled": size_text(device.bytes_pulled + device.bytes_offered),
            "sent up / down, each": " / ".join(
                size_text(statistics.fmean(getattr(receipt, name) for receipt in self._receipts))
                for name in ("bytes_up", "bytes_down")
            ),
            "answered": ", ".join(f"{tiers[tier] / count:.1%} {tier}" for tier in get_args(Tier) if tiers[tier]),
            "for a fallback": _fallbacks(self._receipts),
            "accepted from margin": "-" if last.threshold is None else f"{last.threshold:.3f}",
            "guarantee": _guarantee(last),
            "latency": _latency(self._seconds),
        }
        if self._labels is not None:
            rows["accuracy"] = f"{self._right / count:.3f}"
        for name, value in rows.items():
            table.add_row(name, value)
        console = Console()
        console.print(table)
        for fault in device.faults:
            is_drift = fault.kind == "drift"
            console.print(
                f"alarm: {fault.detail}" if is_drift else f"survived: {fault.source}: {fault.detail}", highlight=False
            )


def _fallbacks(receipts: Sequence[Receipt]) -> str:
    """Each, beside what it had taken already."""
    fallen_back = [receipt for receipt in receipts if receipt.fallback_bytes_up]
    if not fallen_back:
        return "-"
    up = statistics.fmean(receipt.fallback_bytes_up for receipt in fallen_back)
    return f"{size_text(up)} up, {1000 * statistics.median(receipt.fallback_s for receipt in fallen_back):.2f} ms"


def _latency(seconds: Sequence[float]) -> str:
    """The first apart: it waits for the plan and for the pieces."""
    first, *then = (1000 * one for one in seconds)
    rest = f", then median {statistics.median(then):.2f}, slowest {max(then):.1f}" if then else ""
    return f"first {first:.1f}{rest} ms"


def _guarantee(receipt: Receipt) -> str:
    if receipt.alarm:
        return "none: audits found more answers that differ than was certified"
    if receipt.threshold is None:
        return "these are the full model's answers"
    if receipt.alpha is None:
        return "none: not certified"
    return f"at most {receipt.alpha:.1%} differ from the full model, with probability {1 - (receipt.delta or 0):.0%}"
