"""What Prometheus reads of a server: how many answers, how fast, how sure, and what fell back."""

from __future__ import annotations

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gossipfl.inference.planning.receipts import Receipt, Tier

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
MARGINS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0, 2.0, 5.0, 10.0)
"""Of probabilities up to 1, of logits beyond."""
WORST_FIRST: tuple[Tier, ...] = ("unverified", "full", "continued", "reduced")


class Metrics:
    """In a registry of its own, so that several servers of one process stay apart. May be told from any thread."""

    def __init__(self, in_flight: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        of_model = ("model", "version")
        self._seconds = Histogram(
            "gossipfl_infer_seconds",
            "Time from the head of a request to its answer; the tier is that of its least reduced sample, or unverified.",
            (*of_model, "tier"),
            registry=self.registry,
            buckets=SECONDS,
        )
        self._requests = Counter(
            "gossipfl_infer_total", "Requests by HTTP status.", (*of_model, "tier", "code"), registry=self.registry
        )
        self._fallback = Counter(
            "gossipfl_fallback_total",
            "Samples that the reduced model was not sure of and that were continued, or answered by the full one.",
            of_model,
            registry=self.registry,
        )
        self._margin = Histogram(
            "gossipfl_margin",
            "Margin between the two highest scores of each sample, of the reduced model where there is one.",
            of_model,
            registry=self.registry,
            buckets=MARGINS,
        )
        self._alpha = Gauge(
            "gossipfl_certificate_alpha",
            "Certified share of all answers that may differ from the full model's; NaN once an audit has found that more do.",
            of_model,
            registry=self.registry,
        )
        self._bytes = Counter(
            "gossipfl_bytes_total",
            "Bytes between device and server that the answers took, by their receipts.",
            ("direction",),
            registry=self.registry,
        )
        for direction in ("up", "down"):
            self._bytes.labels(direction)
        gauge = Gauge("gossipfl_in_flight", "Requests that are being read, computed or waiting.", registry=self.registry)
        gauge.set_function(in_flight)

    def answered(self, receipt: Receipt, seconds: float) -> None:
        of_model = (receipt.model, str(receipt.version))
        tier = next((tier for tier in WORST_FIRST if tier in receipt.tiers), "")
        self._requests.labels(*of_model, tier, "200").inc()
        self._seconds.labels(*of_model, tier).observe(seconds)
        fallen_back = sum(receipt.tiers.count(tier) for tier in ("continued", "full")) if receipt.threshold is not None else 0
        self._fallback.labels(*of_model).inc(fallen_back)
        margin = self._margin.labels(*of_model)
        for value in receipt.margins:
            margin.observe(value)
        if receipt.alpha is not None:
            self._alpha.labels(*of_model).set(receipt.alpha)
        elif receipt.alarm:
            self._alpha.labels(*of_model).set(math.nan)
        self._bytes.labels("up").inc(receipt.bytes_up)
        self._bytes.labels("down").inc(receipt.bytes_down)

    def failed(self, model: str, version: str, code: int) -> None:
        """`model` and `version` are those that are served, or empty: a label for every name somebody asks for has no end."""
        self._requests.labels(model, version, "", str(code)).inc()
