"""What it takes to serve a model: bits for every cut and allowed loss, seconds of every engine, thresholds with a guarantee.

    calibrator = calibrate(model, dataset)
    plan, cuts = choose_plan(calibrator.measured, device, max_accuracy_loss=0.01)
    certificate = calibrator.certify(plan)

Two kinds of samples: `seen` ones, that the model was trained on, for the noise of each layer and the ranges of activations; and
`unseen` ones, in two disjoint parts, for the harm of each table (`tables`) and for `planning.certificates`. Where there are too
few unseen ones for both, the tables are made from seen ones and `warning` says so.

How many requests fall back is measured twice. For the choice of a plan, with each row of the tables, on their samples: what a
certificate on as many samples as are kept would let fall back there. For the guarantee, on the samples kept. Were plans chosen
by what certificates let fall back, the lucky ones among them, which let too much through, would be chosen more often than one
time in 1 / delta; chosen by other samples, any plan's certificate has the delta that it says, however many were to choose from.
On unseen samples the former shares are on average those of the latter, or little less; on seen ones they are a fraction of them
(`tools/bench/certificate`), which only other samples could mend: (k + 1) / (n + 2) of n adds next to nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from gossipfl.errors import ConfigError
from gossipfl.inference.execution.activations import samples_to_text
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.engines import Compiled, Seconds, available_engines, compile_stage, stage_seconds
from gossipfl.inference.execution.sensitivity import BATCH, Sensitivity, measure, quantized, rounded
from gossipfl.inference.execution.tables import Row, make_tables, planned_scores
from gossipfl.inference.planning.catalogue import Catalogue
from gossipfl.inference.planning.certificates import (
    ALPHA,
    DELTA,
    Basis,
    Certificate,
    certify,
    certify_continued,
    samples_needed,
)
from gossipfl.inference.planning.margins import Scale, differing, margins
from gossipfl.inference.planning.offers import SAMPLE_BITS
from gossipfl.inference.planning.profile import FULL_ENGINE, FallbackRates, Plan
from gossipfl.learning.datasets import Dataset, normalise
from gossipfl.protocol.messages import FULL_BITS
from gossipfl.segments.codecs.planes import MAX_PLANES

logger = logging.getLogger(__name__)

Samples = tuple[np.ndarray, np.ndarray | None]
"""Inputs f32[n, *input_shape] and their labels i64[n], or None."""
COMMON_LEVEL = 0.01
"""Tables are made from unseen samples if those can vouch for this loss of accuracy."""
MAX_SAMPLES = 2000
"""Of the unseen ones, for the tables: one forward pass of all of them for each row that is tried."""
UNSEEN = 2 * samples_needed(COMMON_LEVEL)
"""So many are enough for tables and certificates."""
SEEN = 256
NUM_SAMPLES = 16
"""Inputs that engines are compiled with, here and on the device, so that both compute the same."""
PARTS = (0.1, 0.8)
"""Of all work, done after the noise and after the tables."""
EngineSeconds = dict[str, tuple[float | None, ...]]
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `gossipfl calibrate` stores beside a model; `digest` is of the served vector, `data` the name of the samples."""

    model: str
    digest: str
    data: str
    catalogue: Catalogue
    harm: dict[float, dict[int, float]]
    """Of the rows of the catalogue, by level and cut: what they were measured to keep within."""
    certificates: tuple[Certificate, ...]
    warning: str | None
    made_with: dict[str, str]
    """Versions, machine and seed."""

    def certificates_for(self, plan: Plan) -> tuple[Certificate, ...]:
        """Those of the plan that were made by now: with either fallback where it may continue, else of the one."""
        wanted = plan.version, plan.cut, plan.weight_bits, plan.activation_bits, plan.device_engines
        found = [
            one
            for one, of in ((one, one.basis) for one in self.certificates)
            if (of.version, of.cut, of.weight_bits, of.activation_bits, of.engines) == wanted
        ]
        tried = 1 if plan.continued is None else max((one.tried for one in found), default=1)
        return tuple(one for one in found if one.tried == tried)

    def to_json(self) -> str:
        values = {
            "model": self.model,
            "digest": self.digest,
            "data": self.data,
            "catalogue": self.catalogue.to_json(),
            "harm": {str(level): {str(cut): harm for cut, harm in cuts.items()} for level, cuts in self.harm.items()},
            "certificates": [json.loads(certificate.to_json()) for certificate in self.certificates],
            "warning": self.warning,
            "made_with": self.made_with,
        }
        return json.dumps(values, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Calibration:
        """ConfigError for what `to_json` cannot have written."""
        try:
            values = json.loads(text)
            return Calibration(
                values["model"],
                values["digest"],
                values["data"],
                Catalogue.from_json(values["catalogue"]),
                {float(level): {int(cut): float(x) for cut, x in cuts.items()} for level, cuts in values["harm"].items()},
                tuple(Certificate.from_json(json.dumps(one)) for one in values["certificates"]),
                values["warning"],
                dict(values["made_with"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"no calibration ({error}); calibrate the model again") from error


def calibrate(
    model: nn.Module,
    data: Dataset | Samples,
    *,
    name: str = "data",
    version: int = 1,
    progress: Progress = lambda what, share: None,
    **options: Any,
) -> Calibrator:
    """Measure `model` (f32[B, *input_shape] to scores f32[B, K]) for serving; `measured` then is its catalogue.

    `data` is a Dataset whose training samples the model was trained on, and half of whose test samples are used; or inputs
    f32[n, ...] and labels i64[n] (or None) that it was not trained on: of these half at least are left for certificates, and
    where that is too little, it is said and every request falls back. `options` are the Calibrator's.
    """
    unseen: Samples
    if isinstance(data, Dataset):
        seen = normalise(np.asarray(data.x_train[:SEEN]), data)
        unseen = normalise(np.asarray(data.x_test[::2]), data), np.asarray(data.y_test[::2])
        remedy = f"give {2 * UNSEEN} test samples"
    else:
        inputs, labels = _checked(*data)
        num_seen = min(SEEN, len(inputs) // 2)
        seen, unseen = inputs[:num_seen], (inputs[num_seen:], None if labels is None else labels[num_seen:])
        remedy = f"give {SEEN + UNSEEN} samples"
    chain = Chain.of(model, tuple(seen.shape[1:]))
    if unseen[1] is not None and unseen[1].max() >= chain.profile.num_classes:
        raise ConfigError(f"label {unseen[1].max()}, but the model has {chain.profile.num_classes} classes, counted from 0")
    calibrator = Calibrator(chain, seen, unseen, data=name, version=version, remedy=remedy, **options)
    if (needed := samples_needed(calibrator.alpha, calibrator.delta)) > len(unseen[0]):
        logger.warning("%d samples for certificates, and it takes %d: every request falls back", len(unseen[0]), needed)
    calibrator.catalogue(progress)
    return calibrator


def _checked(inputs: Any, labels: Any) -> Samples:
    """ConfigError for what are no samples."""
    try:
        with np.errstate(over="ignore"):
            x, y = np.asarray(inputs, np.float32), None if labels is None else np.asarray(labels)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the samples are no array of numbers ({error}); give inputs f32[n, ...] and labels i64[n]"
        ) from error
    if x.ndim < 2 or len(x) < 2:
        raise ConfigError(f"samples of shape {list(x.shape)} calibrate nothing; give inputs f32[n, ...], n at least 2")
    if not np.isfinite(x).all():
        raise ConfigError("the samples hold values that are not finite as 32-bit floats; remove them")
    if y is None:
        return x, None
    if y.shape != (len(x),):
        raise ConfigError(f"labels of shape {list(y.shape)} for {len(x)} samples; give one for each, or None")
    if y.dtype.kind not in "iu" or y.min() < 0:
        raise ConfigError(f"labels of {y.dtype} from {y.min()} on; classes are whole numbers from 0 on")
    return x, y


def continuation_of(plan: Plan) -> Plan:
    """What computes as the plan does where it continues: with all planes of the values at the cut."""
    return replace(plan, activation_bits=MAX_PLANES)


def by_side(seconds: Seconds) -> tuple[EngineSeconds, EngineSeconds]:
    """Those of the device and of the server as a catalogue has them: None where an engine cannot be used.

    The server runs the full model, and nothing faster in its place.
    """
    device_s, server_s = (
        {engine: tuple(time if math.isfinite(time) else None for time in times[side]) for engine, times in seconds.items()}
        for side in (0, 1)
    )
    return device_s, {FULL_ENGINE: server_s[FULL_ENGINE]}


class Calibrator:
    """Measures one version of a chain. Deterministic but for seconds."""

    def __init__(
        self,
        chain: Chain,
        seen: np.ndarray,
        unseen: Samples,
        *,
        data: str,
        version: int = 1,
        vector: np.ndarray | None = None,
        engines: Sequence[str] | None = None,
        alpha: float = ALPHA,
        delta: float = DELTA,
        scale: Scale = "softmax",
        remedy: str = "give more of them",
    ) -> None:
        """`seen` f32[n, *input_shape]; `vector` f32[P], by default the chain's own; `engines` by default all that work here.

        `remedy` is what the caller may do about too few unseen samples.
        """
        self.chain, self.version, self.data = chain, version, data
        self.vector = chain.vector() if vector is None else vector
        self.digest = hashlib.blake2b(self.vector.tobytes(), digest_size=16).hexdigest()
        self.seen, self.engines = seen, tuple(engines or available_engines())
        (self.samples,) = (values.numpy() for values in rounded((torch.tensor(seen[:NUM_SAMPLES]),), SAMPLE_BITS))
        self.alpha, self.delta, self.scale = alpha, delta, scale
        inputs, labels = unseen
        self.warning: str | None = None
        if len(inputs) >= UNSEEN:
            half = min(len(inputs) // 2, MAX_SAMPLES)
            self._tried: Samples = inputs[:half], None if labels is None else labels[:half]
            self._kept = inputs[half:]
        else:
            self._tried, self._kept = (seen, None), inputs
            self.warning = (
                f"{len(inputs)} unseen samples are too few for tables and certificates, which take {UNSEEN}: the tables are "
                f"made from other samples, of which fewer fall back if the model was trained on them; {remedy}"
            )
        self._full: np.ndarray | None = None
        self._known: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = {}
        self._measured: Catalogue | None = None

    @property
    def measured(self) -> Catalogue:
        """What `catalogue` came to last."""
        return self._measured or self.catalogue()[0]

    def sensitivity(self, progress: Callable[[float], None] = lambda share: None) -> Sensitivity:
        return measure(self.chain, self.vector, self.seen, progress)

    def catalogue(
        self, progress: Progress = lambda what, share: None, seconds: Seconds | None = None
    ) -> tuple[Catalogue, dict[float, dict[int, Row]]]:
        """The catalogue, and its rows with the harm that was measured. The inputs as they are go up at any level.

        `seconds` are those of `stage_seconds`, where they are known: they hang on the model, not on its weights.
        """
        begun, tabled = PARTS
        sensitivity = self.sensitivity(lambda share: progress("noise of each layer", begun * share))
        rows = make_tables(
            self.chain,
            self.vector,
            sensitivity,
            *self._tried,
            lambda share: progress("bits for each cut", begun + (tabled - begun) * share),
            self.scale,
        )
        exact = Row((), FULL_BITS, 0.0, np.zeros(0, np.float32), np.zeros(0, bool))
        rates = {0.0: {0: FallbackRates(0.0)}, **self._fallback_rates(rows)}
        rows = {0.0: {0: exact}, **{level: cuts for level, cuts in rows.items() if cuts}}
        seconds = seconds or stage_seconds(self.chain, self.vector, self.samples, self.engines)
        progress("seconds of each engine", 1.0)
        levels = {
            level: {cut: (row.weight_bits, row.activation_bits) for cut, row in cuts.items()} for level, cuts in rows.items()
        }
        device_s, server_s = by_side(seconds)
        sample_bytes = len(samples_to_text(self.samples))
        self._measured = Catalogue(
            self.chain.profile, self.version, levels, device_s, server_s, sample_bytes=sample_bytes, fallback_rates=rates
        )
        return self._measured, rows

    def _fallback_rates(self, rows: dict[float, dict[int, Row]]) -> dict[float, dict[int, FallbackRates]]:
        """Of each row, what a certificate on as many of the tables' samples as are kept would let fall back.

        Layers are computed in float32, as for the harm of the row. It takes a pass over these samples for each row whose
        fallbacks could be continued, which is less than the tables have taken.
        """
        inputs = self._tried[0][: len(self._kept)]
        full: np.ndarray | None = None
        known: dict[tuple[int, Row], FallbackRates] = {}
        for cut, row in dict.fromkeys((cut, row) for cuts in rows.values() for cut, row in cuts.items()):
            found, differs = row.margins[: len(inputs)], row.differs[: len(inputs)]
            basis = Basis(self.digest, self.version, cut, row.weight_bits, row.activation_bits, (), self.data, self.scale)
            afresh = certify(found, differs, basis, self.alpha, self.delta).fallback_rate
            known[cut, row] = FallbackRates(afresh)
            if afresh and 0 < row.activation_bits < MAX_PLANES and self._has_enough_for_two(len(inputs)):
                if full is None:
                    full = planned_scores(self.chain, self.vector, 0, ((), FULL_BITS), inputs).argmax(1)
                scores = planned_scores(self.chain, self.vector, cut, (row.weight_bits, MAX_PLANES), inputs)
                basis, continued = replace(basis, fallback="continued"), differing(scores.argmax(1), full)
                certificate = certify_continued(found, differs, continued, basis, self.alpha, self.delta, tried=2)
                known[cut, row] = FallbackRates(afresh, None if certificate is None else certificate.fallback_rate)
        return {level: {cut: known[cut, row] for cut, row in cuts.items()} for level, cuts in rows.items() if cuts}

    def _has_enough_for_two(self, num_samples: int) -> bool:
        return num_samples >= samples_needed(self.alpha, self.delta / 2)

    def basis(self, plan: Plan) -> Basis:
        """What a certificate of this plan speaks of."""
        return Basis(
            self.digest,
            self.version,
            plan.cut,
            plan.weight_bits,
            plan.activation_bits,
            plan.device_engines,
            self.data,
            self.scale,
            plan.fallback,
        )

    def tried(self, plan: Plan) -> int:
        """Of how many certificates the plan's is chosen: of two where it may continue, and the samples suffice for two."""
        return 2 if plan.continued is not None and self._has_enough_for_two(len(self._kept)) else 1

    def certify(self, plan: Plan) -> Certificate | None:
        """From which margin on the plan's answers may be accepted, with its fallback. None where that is no good at any.

        Where the plan could continue there are two to choose from, and each of them is tested at half of delta; unless there
        are too few samples for that.
        """
        if plan.fallback == "continued" and self.tried(plan) == 1:
            return None
        (found, differs), basis, tried = self._judged(plan), self.basis(plan), self.tried(plan)
        if plan.fallback == "full":
            return certify(found, differs, basis, self.alpha, self.delta, tried=tried)
        continued = self._judged(continuation_of(plan))[1]
        return certify_continued(found, differs, continued, basis, self.alpha, self.delta, tried=tried)

    def _judged(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Margins of the samples kept for certificates, and where classes differ; once for plans that compute alike."""
        key = plan.cut, plan.weight_bits, plan.activation_bits, plan.device_engines
        if key not in self._known:
            scores, differs = self.kept_scores(plan)
            self._known[key] = margins(scores, self.scale), differs
        return self._known[key]

    def kept_scores(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """The plan's scores (f32[n, K]) of the samples kept for certificates, and where its class is not the full model's."""
        if self._full is None:
            self._full = planned_scores(self.chain, self.vector, 0, ((), FULL_BITS), self._kept).argmax(1)
        scores = self.scores(plan, self._kept)
        return scores, differing(scores.argmax(1), self._full)

    def scores(self, plan: Plan, inputs: np.ndarray) -> np.ndarray:
        """What the plan answers (f32[n, K]), its device's stage carried out with its engine."""
        head, last = self.head(plan), len(self.chain.profile.layers)
        tail = self.chain.stage(plan.cut, last, self.vector) if plan.cut < last else None
        scores = [np.zeros((0, self.chain.profile.num_classes), np.float32)]  # of no inputs
        for start in range(0, len(inputs), BATCH):
            live: tuple[torch.Tensor, ...] = (torch.tensor(inputs[start : start + BATCH]),)
            with torch.inference_mode():
                live = head(*live) if head is not None else live
                if tail is not None:
                    live = tail(*rounded(live, plan.activation_bits))
                scores.append(live[0].numpy())
        return np.concatenate(scores)

    def head(self, plan: Plan) -> Compiled | None:
        """The device's stage; None where it has none."""
        if not plan.cut:
            return None
        (engine,) = plan.device_engines
        stage = self.chain.stage(0, plan.cut, quantized(self.chain, self.vector, plan.weight_bits))
        return compile_stage(stage, (torch.from_numpy(self.samples),), engine)
