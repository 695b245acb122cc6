"""One version of a model as a server holds it: its stages, its pieces, and the offers made of them."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from gossipfl.errors import CodecError, ConfigError, LayoutError, RunError
from gossipfl.inference.execution.activations import samples_to_text
from gossipfl.inference.planning.cascade import cheapest
from gossipfl.inference.planning.catalogue import Catalogue
from gossipfl.inference.planning.certificates import Certificate
from gossipfl.inference.planning.cuts import choose_plan
from gossipfl.inference.planning.offers import BIASES, Ask, LayerOffer, Manifest, Piece, offer_to_json, samples_digest
from gossipfl.inference.planning.profile import FULL, FULL_ENGINE, Fallback, Plan, Range, Stage
from gossipfl.runtime.content_cache import digest_of
from gossipfl.runtime.stages import ModelChain, RunnableStage, check_inputs
from gossipfl.segments.codecs import all_finite, codec
from gossipfl.segments.codecs.planes import MAX_PLANES, Planes, PlaneSet

logger = logging.getLogger(__name__)

SERVED_CODECS = ("float32", "float16", "planes")
CACHE_BYTES = 64 * 1024 * 1024
"""Of encoded ranges that are no layer's, by version."""
Certifier = Callable[[Plan], Certificate | None]
"""Of the plan with its fallback; None where nothing is certified. With `Plan.continued` it is asked for both fallbacks."""


_Key = tuple[tuple[Stage, ...], int, Fallback]


def nothing_certified(plan: Plan) -> None:
    """A certifier."""


@dataclass
class ServedVersion:
    """`stage` may be called by the thread that computes, `certify` by another, all else by a third.

    `known` are certificates that need not be made any more.
    """

    model: str
    version: int
    chain: ModelChain
    vector: np.ndarray
    catalogue: Catalogue
    certificate: Certifier
    samples: np.ndarray | None = None
    known: Certifier = nothing_certified
    _stages: dict[int, RunnableStage] = field(default_factory=dict)
    _planes: dict[Range, PlaneSet] = field(default_factory=dict)
    _digests: dict[tuple[Range, str], str] = field(default_factory=dict)
    _same: dict[int, tuple[bool, ...]] = field(default_factory=dict)
    _encoded: OrderedDict[tuple[Range, str], memoryview] = field(default_factory=OrderedDict)
    _certificates: dict[_Key, tuple[Certificate, ...]] = field(default_factory=dict)
    _failed: set[_Key] = field(default_factory=set)  # of which a certifier has raised, which is logged once of each

    def __post_init__(self) -> None:
        size, profile = self.chain.layout.size, self.chain.profile
        is_array = isinstance(self.vector, np.ndarray)
        if not is_array or self.vector.shape != (size,) or self.vector.dtype != np.float32:
            found = f"{self.vector.dtype}{self.vector.shape}" if is_array else f"a {type(self.vector).__name__}"
            raise LayoutError(f"version {self.version} of {self.model!r} is {found}; its chain has float32 ({size},)")
        if not all_finite(self.vector):
            raise ConfigError(f"version {self.version} of {self.model!r} holds NaN or infinite weights; publish another")
        if self.catalogue.version != self.version or self.catalogue.profile != profile:
            what = f"version {self.catalogue.version}" if self.catalogue.version != self.version else "another model"
            raise ConfigError(f"the catalogue is of {what}, not of version {self.version} of {self.model!r}; calibrate that")
        if FULL_ENGINE in self.catalogue.server_s:  # the server runs the full model, and nothing faster in its place
            self.catalogue = replace(self.catalogue, server_s={FULL_ENGINE: self.catalogue.server_s[FULL_ENGINE]})
        self._samples_text = ""
        if self.samples is not None:
            try:
                self._samples_text = samples_to_text(check_inputs(self.samples, profile.input_shape))
            except ConfigError as error:
                raise ConfigError(f"the samples of version {self.version} of {self.model!r}: {error}") from error
        self._samples_digest = samples_digest(self._samples_text)
        self.catalogue = replace(self.catalogue, sample_bytes=len(self._samples_text))
        self.vector = self.vector.copy()
        self.vector.flags.writeable = False
        self._layers = {layer.weight: layer.group for layer in profile.layers}

    def stage(self, cut: int) -> RunnableStage:
        """The layers after the cut, with all their bits."""
        if cut not in self._stages:
            self._stages[cut] = RunnableStage(self.chain, cut, len(self.chain.profile.layers), self.vector, FULL_ENGINE)
        return self._stages[cut]

    def is_brief(self, cut: int, num_samples: int) -> bool:
        """Whether the layers after the cut are ready, and take less than handing them to another thread."""
        stage = self._stages.get(cut)
        return stage is not None and stage.is_brief(num_samples)

    # --- pieces -------------------------------------------------------------------------------------------------------

    def piece(self, range_: Range, name: str) -> memoryview:
        """The range as the codec sends it; CodecError or ConfigError for what is not served.

        All planes of a layer are made once; those that are asked for are cut from them.
        """
        if name.partition(":")[0] not in SERVED_CODECS or len(name) > 32:
            raise CodecError(f"codec {name!r} is not served; pull one of {', '.join(SERVED_CODECS)}")
        if range_[1] > self.vector.size:
            raise CodecError(f"range {range_} of a vector of {self.vector.size} values")
        if name.startswith("planes"):
            planes = Planes.of(name)
            if range_ in self._layers and planes.group == self._layers[range_]:
                return self._planes_of(range_).piece(planes.start, planes.stop)
        values = self.vector[slice(*range_)]
        if name == BIASES:
            return codec(BIASES).encode(values)
        key = range_, name
        if key not in self._encoded:
            self._encoded[key] = codec(name).encode(values)
            while sum(map(len, self._encoded.values())) > CACHE_BYTES and len(self._encoded) > 1:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key]

    def _planes_of(self, range_: Range) -> PlaneSet:
        if range_ not in self._planes:
            all_ = Planes(0, MAX_PLANES, self._layers[range_])
            planes = PlaneSet(range_[1] - range_[0], all_.group)
            planes.add(all_.name, all_.encode(self.vector[slice(*range_)]))
            self._planes[range_] = planes
        return self._planes[range_]

    def _digest(self, range_: Range, name: str) -> str:
        key = range_, name
        if key not in self._digests:
            self._digests[key] = digest_of(Piece("", range_, name), self.piece(range_, name))
        return self._digests[key]

    # --- offers -------------------------------------------------------------------------------------------------------

    def plan(self, ask: Ask, held: ServedVersion | None = None) -> Plan:
        """PlanError or ConfigError where nothing keeps within what the device allows.

        `held` is the version that it has already, if that is known here: what has not changed since need not be pulled.
        """
        loss = min(self.catalogue.levels) if ask.max_accuracy_loss is None else ask.max_accuracy_loss
        cached = ask.cached if held is not None else ()
        if held is not None and len(cached) <= len(self.chain.profile.layers):  # else the plan says what is wrong
            cached = tuple(planes if same else 0 for planes, same in zip(cached, self._unchanged(held), strict=False))
        plan, _ = choose_plan(self.catalogue, ask.device, loss, cached, self._has_samples(ask), ask.refused)
        return plan

    def _has_samples(self, ask: Ask) -> bool:
        return ask.samples == self._samples_digest

    def is_certified(self, plan: Plan) -> bool:
        """Whether no certificates have to be made before it is offered; errors as of `certify`."""
        if _key(plan) not in self._certificates:
            found = self._certificates_of(plan, self.known)
            if len(found) == len(_fallbacks(plan)):
                self._certificates[_key(plan)] = found
        return _key(plan) in self._certificates

    def certify(self, plan: Plan) -> None:
        """Have certificates made, which may take many seconds. ConfigError for one of another plan, RunError if that failed."""
        if not self.is_certified(plan):
            self._certificates[_key(plan)] = self._certificates_of(plan, self.certificate)

    def offer(self, plan: Plan, ask: Ask) -> bytes:
        """A plan that is certified, as it is offered, in JSON."""
        if plan.cut < len(self.chain.profile.layers):
            self.stage(plan.cut)  # now, rather than when the first activation comes
        layers = tuple(self._layer_offers(plan))
        certificate = cheapest(self._certificates[_key(plan)], plan)
        if certificate is not None:
            plan = replace(plan, fallback=certificate.basis.fallback, fallback_rate=certificate.fallback_rate)
        else:  # then every answer is accepted
            plan = replace(plan, fallback=FULL, fallback_rate=0.0)
        manifest = Manifest(self.model, self.version, self.chain.layout.digest, plan, layers)
        if plan.cut and plan.stages[0].engine != FULL_ENGINE and not self._has_samples(ask):
            manifest = replace(manifest, samples=self._samples_text)
        if certificate is not None:
            manifest = replace(manifest, threshold=certificate.threshold, scale=certificate.basis.scale)
            if certificate.loss == "disagreement":  # of a loss of accuracy no device could tell without labels
                manifest = replace(manifest, alpha=certificate.alpha, delta=certificate.delta)
        return offer_to_json(manifest)

    def _unchanged(self, held: ServedVersion) -> tuple[bool, ...]:
        """Of each layer, whether weight and bias are those of `held`."""
        if held.version not in self._same:
            self._same[held.version] = tuple(
                all(
                    part is None or np.array_equal(self.vector[slice(*part)], held.vector[slice(*part)])
                    for part in (layer.weight, layer.bias)
                )
                for layer in self.chain.profile.layers
            )
        return self._same[held.version]

    def _layer_offers(self, plan: Plan) -> list[LayerOffer]:
        offers = []
        for layer, bits in zip(self.chain.profile.layers, plan.weight_bits, strict=False):
            digests = tuple(self._digest(layer.weight, Planes(k, k + 1, layer.group).name) for k in range(bits))
            bias = None if layer.bias is None else self._digest(layer.bias, BIASES)
            offers.append(LayerOffer(Planes(0, bits, layer.group).name, digests, bias))
        return offers

    def _certificates_of(self, plan: Plan, certifier: Certifier) -> tuple[Certificate, ...]:
        """With the full model to fall back on, and where that is cheaper also with continuing, if it is certified."""
        found = []
        for fallback in _fallbacks(plan):
            certificate = self._certificate_of(replace(plan, fallback=fallback), certifier)
            if certificate is not None and certificate.basis.fallback == fallback:
                self._check_certificate(certificate, plan)
                found.append(certificate)
        return tuple(found)

    def _certificate_of(self, plan: Plan, certifier: Certifier) -> Certificate | None:
        try:
            return certifier(plan)
        except ConfigError:
            raise
        except Exception as error:  # whatever a user's own code raises: devices ask again and again, and are told each time
            what = f"a plan of version {self.version} of {self.model!r} cannot be certified"
            if _key(plan) not in self._failed:
                self._failed.add(_key(plan))
                logger.exception(what)
            raise RunError(f"{what}: {type(error).__name__}: {error}") from error

    def _check_certificate(self, certificate: Certificate, plan: Plan) -> None:
        basis = certificate.basis
        certified = basis.version, basis.cut, basis.weight_bits, basis.activation_bits, basis.engines
        planned = self.version, plan.cut, plan.weight_bits, plan.activation_bits, plan.device_engines
        if certified != planned or math.isnan(certificate.threshold):
            raise ConfigError(
                f"the certificate is of (version, cut, bits, engines) {certified}, the plan of {planned}; certify the plan"
            )


def _fallbacks(plan: Plan) -> tuple[Fallback, ...]:
    return (FULL,) if plan.fallback == FULL else (FULL, plan.fallback)


def _key(plan: Plan) -> _Key:
    """What its certificates hang on."""
    return plan.stages, plan.activation_bits, plan.fallback
