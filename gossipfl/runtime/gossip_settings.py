"""The dials of the protocol, as people set them, checked; and what a peer's machine is given of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gossipfl.aggregation import AGGREGATORS
from gossipfl.errors import ConfigError
from gossipfl.mixing import check_writes
from gossipfl.overlay.selection import SELECTORS
from gossipfl.protocol.baselines import PROTOCOLS
from gossipfl.protocol.gossip import MIXINGS, GossipConfig
from gossipfl.protocol.messages import PeerId
from gossipfl.segments.codecs import codec
from gossipfl.segments.layout import SEGMENTATIONS, Layout


@dataclass(frozen=True)
class GossipSettings:
    """The protocol's dials, as in the scenario's [gossip] table; times in seconds, None where it is derived."""

    rounds: int
    seed: int = 0
    protocol: str = "gossip"
    segments: int = 8
    segmentation: str = "even"
    replicas: int = 2
    codec: str = "float32"
    mixing: str = "data_size"
    aggregation: str = "mean"
    selection: str = "uniform"
    exploration: float = 0.5
    max_staleness: float = 0
    staleness_exponent: float = 0.5
    patience: float | None = None
    versions_kept: int = 4
    linger_s: float = 10.0
    join_timeout_s: float = 30.0
    quorum: int | None = None

    def __post_init__(self) -> None:
        choices = {"segmentation": tuple(SEGMENTATIONS), "mixing": MIXINGS}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ConfigError(f"{key} = {getattr(self, key)!r}; choose one of {', '.join(known)}")
        bounds: dict[str, tuple[float, float]] = {
            **dict.fromkeys(("rounds", "segments", "replicas", "versions_kept"), (1, 1e9)),
            **dict.fromkeys(("staleness_exponent", "linger_s", "quorum"), (0, 1e9)),
            **dict.fromkeys(("patience", "join_timeout_s"), (1e-3, 1e9)),
            "exploration": (0, 1),
            "max_staleness": (0, math.inf),
        }
        for key, (least, most) in bounds.items():
            value = getattr(self, key)
            if value is not None and not least <= value <= most:  # NaN fails every comparison
                raise ConfigError(f"{key} = {value!r} is out of bounds; give {least:g} to {most:g}")
        PROTOCOLS.get(self.protocol), SELECTORS.get(self.selection)
        check_writes(AGGREGATORS.get(self.aggregation), self.aggregation)
        if codec(self.codec).sparse and self.aggregation != "mean":
            raise ConfigError(
                f"gossip.aggregation = {self.aggregation!r} needs whole copies, gossip.codec = {self.codec!r} sends parts; "
                "use aggregation = 'mean' or a dense codec"
            )

    def for_peer(
        self,
        layout: Layout,
        num_samples: int,
        schedule: Sequence[Mapping[PeerId, int]] | None = None,
        late: Iterable[PeerId] = (),
    ) -> GossipConfig:
        """What a peer's machine goes by, once its model is known.

        `schedule`: its neighbours of each round, if they change; `late`: peers that are not there at the start.
        """
        return GossipConfig(
            rounds=self.rounds,
            segments=tuple(SEGMENTATIONS[self.segmentation](layout, self.segments)),
            layout=layout.digest,
            num_samples=num_samples,
            seed=self.seed,
            replicas=self.replicas,
            codec=self.codec,
            mixing=self.mixing,
            selection=self.selection,
            exploration=self.exploration,
            max_staleness=self.max_staleness,
            staleness_exponent=self.staleness_exponent,
            patience_s=self.patience,
            versions_kept=self.versions_kept,
            linger_s=self.linger_s,
            join_timeout_s=self.join_timeout_s,
            quorum=self.quorum,
            schedule=schedule,
            late=frozenset(late),
        )
