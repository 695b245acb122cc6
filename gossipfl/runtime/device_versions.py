"""One version of the model on a device: its pieces while they come in, then its stage."""

from __future__ import annotations

import numpy as np

from gossipfl.errors import ConfigError, RemoteProtocolError, RunError
from gossipfl.inference.execution.activations import samples_from_text
from gossipfl.inference.execution.engines import available_engines
from gossipfl.inference.planning.margins import margins
from gossipfl.inference.planning.offers import Manifest, Piece, pieces
from gossipfl.inference.planning.profile import FULL_ENGINE, Range
from gossipfl.inference.planning.sizes import resident_bytes
from gossipfl.runtime.content_cache import ContentCache, digest_of
from gossipfl.runtime.stages import ModelChain, RunnableStage
from gossipfl.segments.codecs import all_finite
from gossipfl.segments.codecs.planes import PlaneSet


class DeviceVersion:
    """With `memory_bytes` for the model."""

    def __init__(self, manifest: Manifest, chain: ModelChain, memory_bytes: int) -> None:
        self.manifest = manifest
        self.stage: RunnableStage | None = None
        """Of the layers before the cut, once loaded; None also where there are none."""
        self.refused: dict[str, str] = {}
        """Engines that were tried for it and are of no use here, and why."""
        self._chain, self._memory_bytes = chain, memory_bytes
        self._expected = {(piece.range, piece.codec): piece.digest for piece in pieces(manifest, chain.profile)}
        self._contents: dict[str, bytes] = {}

    @property
    def engine(self) -> str | None:
        return self.stage.engine if self.stage else None

    def look_up(self, cache: ContentCache) -> frozenset[str]:
        """Take from the cache what is there; its digests."""
        for (range_, codec), digest in self._expected.items():
            content = cache.get(Piece(digest, range_, codec))
            if content is not None:
                self._contents[digest] = content
        return frozenset(self._contents)

    def keep(self, range_: Range, codec: str, content: bytes, cache: ContentCache) -> None:
        """Take in a piece that was pulled; RemoteProtocolError if it is not the one that was offered."""
        expected = self._expected.get((range_, codec))
        found = digest_of(Piece("", range_, codec), content)
        if found != expected:
            raise RemoteProtocolError(
                f"{codec} of range {range_} of version {self.manifest.version} is not what was offered: "
                f"its digest is {found}, not {expected}"
            )
        self._contents[found] = content
        cache.put(found, content)

    def load(self, before: DeviceVersion | None = None) -> None:
        """Build the stage from the pieces, all of which are here, or take that of `before` where it is the same.

        In place of an engine that does not work here, computes something else on this machine, or is slower than fp32, the next
        one of the plan is tried, and fp32 is used in the end.
        """
        manifest, profile = self.manifest, self._chain.profile
        planned = manifest.plan.stages[0].engine if manifest.cut else None
        if before is not None and before.engine == planned and before._is_built_of(manifest):
            self.stage = before.stage
        elif manifest.cut:
            vector = np.zeros(self._chain.layout.size, np.float32)
            for layer, offer in zip(profile.layers, manifest.layers, strict=False):
                held = PlaneSet(layer.num_weights, layer.group)
                held.add(offer.codec, b"".join(self._contents[digest] for digest in offer.planes))
                vector[slice(*layer.weight)] = held.decode()
                if layer.bias is not None and offer.bias is not None:
                    vector[slice(*layer.bias)] = np.frombuffer(self._contents[offer.bias], np.float32)
            if not all_finite(vector):
                raise RunError("it holds NaN or infinite weights")
            assert planned is not None, "there are layers"
            samples = samples_from_text(manifest.samples, profile.input_shape)
            fits = resident_bytes(profile, manifest.cut, FULL_ENGINE) <= self._memory_bytes
            here = available_engines()
            others = [engine for engine in manifest.plan.other_engines if engine in here] if fits else None
            try:
                self.stage = RunnableStage(self._chain, 0, manifest.cut, vector, planned, samples, others)
                self.refused = self.stage.refused
            except (ConfigError, RunError) as error:
                if planned == FULL_ENGINE:
                    raise
                self.refused = {planned: str(error)}
                self.stage = RunnableStage(self._chain, 0, manifest.cut, vector, FULL_ENGINE)
        self._contents.clear()

    def _is_built_of(self, manifest: Manifest) -> bool:
        """Whether its stage is what comes of this offer's pieces and samples."""
        return (self.manifest.layers, self.manifest.samples) == (manifest.layers, manifest.samples)

    def margins_of(self, scores: np.ndarray) -> tuple[float, ...]:
        return tuple(margins(scores, self.manifest.scale).tolist())
