"""The audits of a device: of each version that has a certificate, whether it still holds for what the device is asked.

Which samples are audited is drawn before anything is known of them. What the full model has answered counts at once as not
differing; what was accepted counts when the full model has answered too, and not at all if no server does. So does what was
continued, but that it is taken not to differ if no server says so. They count in the order in which they were drawn: those that
fall back are known sooner, and counted first would make those that follow look worse than they are. Leaving out accepted ones,
and never others, makes the risk seem smaller, so that false alarms do not become more likely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gossipfl.inference.planning.audit import Audit, audited_of
from gossipfl.inference.planning.device_words import Report
from gossipfl.inference.planning.offers import Manifest

Sample = tuple[int, int]
"""The number of a question and the index of the sample in it."""


@dataclass(slots=True)
class _Watched:
    """The audit of a version, and the samples drawn for it that have not been counted: whether they differ, if it is known."""

    manifest: Manifest
    audit: Audit
    drawn: dict[Sample, bool | None] = field(default_factory=dict)


class Audits:
    """`share` of the samples are audited; `rng` draws them."""

    def __init__(self, share: float, rng: np.random.Generator) -> None:
        self._share, self._rng = share, rng
        self._watched: dict[int, _Watched] = {}

    def draw(self, manifest: Manifest, number: int, samples: int) -> tuple[int, ...]:
        """Which samples of a question are audited. None where there is no certificate, or one that is known not to hold."""
        if not self._share or manifest.alpha is None or manifest.delta is None or manifest.sends_everything:
            return ()
        watched = self._watched.get(manifest.version)
        if watched is None:
            watched = self._watched[manifest.version] = _Watched(manifest, Audit.start(manifest.alpha, manifest.delta))
        if watched.audit.alarmed:
            return ()
        drawn = audited_of(samples, self._share, self._rng)
        watched.drawn.update({(number, index): None for index in drawn})
        return drawn

    def is_alarmed(self, version: int) -> bool:
        return version in self._watched and self._watched[version].audit.alarmed

    def known(self, version: int, number: int, differs: Mapping[int, bool]) -> list[Report]:
        """Of these samples of a question: whether they were accepted and the full model answers otherwise."""
        watched = self._watched.get(version)
        if watched is None:
            return []
        watched.drawn.update({(number, index): value for index, value in differs.items() if (number, index) in watched.drawn})
        return self._count(watched)

    def left_out(self, version: int, number: int) -> list[Report]:
        """Nothing more will be known of this question."""
        watched = self._watched.get(version)
        if watched is None:
            return []
        for sample in [key for key, differs in watched.drawn.items() if key[0] == number and differs is None]:
            del watched.drawn[sample]
        return self._count(watched)

    def end(self, version: int) -> None:
        """The version is unloaded."""
        self._watched.pop(version, None)

    def _count(self, watched: _Watched) -> list[Report]:
        while watched.drawn and not watched.audit.alarmed:
            sample, differs = next(iter(watched.drawn.items()))
            if differs is None:
                return []
            del watched.drawn[sample]
            watched.audit = watched.audit.observe(differs)
            if watched.audit.alarmed:
                watched.drawn.clear()
                return [self._alarm(watched)]
        return []

    @staticmethod
    def _alarm(watched: _Watched) -> Report:
        manifest, audit = watched.manifest, watched.audit
        return Report(
            manifest.model,
            "drift",
            f"version {manifest.version} differs from the full model more often than alpha = {audit.alpha:g}: it did in "
            f"{audit.num_differing} of {audit.num_audited} audits; until there is a newer one the full model answers all",
        )
