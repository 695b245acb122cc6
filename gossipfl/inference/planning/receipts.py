"""What comes with every answer: who computed it, from which version, how precisely, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from gossipfl.inference.planning.profile import Shape

Tier = Literal["reduced", "continued", "full", "unverified"]
"""reduced: the quantized model, sure enough; continued: where it is not, its layers after the cut once more, from all planes of
the values there; full: the full model; unverified: the quantized one, for want of the others."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Of one request; `tiers` and `margins` have one value for each of its samples."""

    model: str
    version: int
    tiers: tuple[Tier, ...]
    margins: tuple[float, ...] = ()
    threshold: float | None = None
    """The margin from which a reduced answer is accepted; None where nothing was reduced."""
    alpha: float | None = None
    """Share of all requests whose answers may differ from the full model's, with probability 1 - delta. None: unknown."""
    delta: float | None = None
    alarm: bool = False
    """An audit found that more answers differ than was certified: the full model answers all, and `alpha` is not known."""
    cut: int = 0
    weight_bits: tuple[int, ...] = ()
    activation_bits: int = 0
    engines: tuple[str, ...] = ()
    bytes_up: int = 0
    bytes_down: int = 0
    fallback_bytes_up: int = 0
    """Of `bytes_up` those of the samples that fell back, in all attempts."""
    fallback_s: float = 0.0
    """From the first of them to the answer."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By part of the work: device, transfer, server, total."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`scores` f32[B, K], the logits of each sample's tier."""

    scores: np.ndarray
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Budget:
    """What a request allows. `timeout_s` bounds the whole of it."""

    max_accuracy_loss: float | None = None
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    version: int
    input_shape: Shape
    num_classes: int


class InferenceService(Protocol):
    """Anything that answers: a server in this process, or a device with its server. May be called from any thread."""

    def models(self) -> tuple[ServedModel, ...]:
        """Those that are ready, with their newest version."""

    def infer(self, model: str, inputs: np.ndarray, budget: Budget, version: int | None = None) -> Answer:
        """Scores of `inputs` (f32[B, *input_shape]).

        ConfigError for an unknown model or version and for inputs that do not fit; RunError where there is no answer in time.
        """
