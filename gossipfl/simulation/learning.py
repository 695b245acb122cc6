"""What the peers of a simulation learn: lazily, for its values may be computed later than they are due, or not at all.

How long training takes comes from the scenario's devices. When a trained vector is first needed, all peers that are training
then are trained together, as one cohort. Large models are mixed segment by segment as merges come due, the segments of a small
one together when the mixed vector is needed. Payload passes by reference, and a codec that loses something is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import numpy as np

from gossipfl.aggregation import Aggregator
from gossipfl.learning.cohort import CohortEngine, CohortTask
from gossipfl.learning.training import Learner
from gossipfl.mixing import SegmentMix, mix_segments
from gossipfl.protocol.machine import Merge
from gossipfl.protocol.messages import PeerId
from gossipfl.segments.buffers import VectorPool
from gossipfl.segments.codecs import Codec, Decoded, codec
from gossipfl.segments.layout import Range
from gossipfl.segments.store import SegmentStore
from gossipfl.simulation.peer import SimulatedPeer, Watcher

LARGE = 2**18
"""Parameters from which on a vector (1 MiB) has a mapping of its own and is mixed as its segments come in."""


class Learning(Protocol):
    """What a simulator asks for as its machines decide it; the vectors are kept with the peers."""

    @property
    def initial(self) -> np.ndarray:
        """The model that all begin with, f32[P], read-only."""

    def new_store(self, name: PeerId) -> SegmentStore:
        """What a peer begins with."""

    def train(self, peer: SimulatedPeer, round_: int) -> None:
        """Begin to train for this round."""

    def merge(self, peer: SimulatedPeer, merge: Merge) -> None: ...

    def vector(self, peer: SimulatedPeer) -> np.ndarray:
        """What the peer's merges have come to, or its trained vector where there are none (f32[P])."""

    def publish(self, peer: SimulatedPeer, version: int) -> None:
        """Store that as a version."""

    def read(self, peer: SimulatedPeer, version: int, range_: Range) -> Decoded:
        """What the receiver of this range of a version decodes."""

    def retain(self, peer: SimulatedPeer, versions: Collection[int]) -> None:
        """Forget all versions but these."""

    def lose(self, peer: SimulatedPeer) -> None:
        """The peer has been killed: it trains no longer, and begins anew should it come back."""


class LazyLearning:
    """As the module's text says. `make_store(name)` makes what a peer begins with; `watcher` hears of what has been trained."""

    def __init__(
        self,
        cohort: CohortEngine,
        learners: Mapping[PeerId, Learner],
        make_store: Callable[[PeerId], SegmentStore],
        codec_: Codec,
        aggregate: Aggregator,
        watcher: Watcher | None = None,
    ) -> None:
        self.initial = cohort.initial_vector()
        self.initial.flags.writeable = False
        self._cohort, self._learners, self._codec, self._aggregate = cohort, learners, codec_, aggregate
        self.new_store, self._watcher = make_store, watcher or Watcher()
        self._pool = VectorPool(self.initial.size)
        self._training: dict[SimulatedPeer, None] = {}  # computed together when the first is needed

    def train(self, peer: SimulatedPeer, round_: int) -> None:
        self._mix(peer)
        if peer.mixed is not None:
            self._compute(peer)
            peer.own, peer.mixed = peer.mixed, None
        peer.task = round_
        self._training[peer] = None

    def merge(self, peer: SimulatedPeer, merge: Merge) -> None:
        """At once where vectors are large, for the copies take memory; small ones are mixed together when all are in."""
        self._compute(peer)
        peer.merges[merge.segment] = merge
        if self._pool.size >= LARGE:
            self._mix(peer)

    def vector(self, peer: SimulatedPeer) -> np.ndarray:
        self._mix(peer)
        if peer.mixed is not None:
            return peer.mixed
        self._compute(peer)
        return peer.own

    def publish(self, peer: SimulatedPeer, version: int) -> None:
        peer.store.publish(version, self.vector(peer))
        peer.owns_start = False

    def read(self, peer: SimulatedPeer, version: int, range_: Range) -> Decoded:
        if peer.task == version:
            self._compute(peer)
        if self._codec.name == "float32":
            return Decoded(peer.store.read(version, range_), None)
        key = version, range_
        if key not in peer.decoded:
            peer.decoded[key] = self._codec.decode(peer.store.encode(version, range_), range_[1] - range_[0])
        return peer.decoded[key]

    def retain(self, peer: SimulatedPeer, versions: Collection[int]) -> None:
        peer.store.retain(versions)
        for key in [key for key in peer.decoded if key[0] not in versions]:
            del peer.decoded[key]

    def lose(self, peer: SimulatedPeer) -> None:
        self._training.pop(peer, None)
        peer.task, peer.store = None, self.new_store(peer.name)
        peer.own, peer.mixed, peer.owns_start = self.initial, None, False
        peer.decoded.clear()
        peer.merges.clear()

    def _compute(self, peer: SimulatedPeer) -> None:
        """Compute what this peer has trained, and with it all others that are training."""
        if peer.task is None:
            return
        self._watcher.will_train()
        peers = list(self._training)
        tasks = [CohortTask(self._learners[peer.name], peer.task or 0, peer.own) for peer in peers]
        vectors = [peer.own if peer.owns_start else self._new_vector() for peer in peers]
        losses = self._cohort.train(tasks, vectors)
        self._training.clear()
        for trained, vector, loss in zip(peers, vectors, losses, strict=True):
            round_, trained.task = trained.task or 0, None
            trained.own, trained.loss, trained.owns_start = vector, loss, False
            trained.store.publish(round_, vector)
        self._watcher.trained(peers)

    def _new_vector(self) -> np.ndarray:
        """f32[P] of arbitrary contents. Small ones come from the heap: a process may have 65,530 mappings."""
        return self._pool.take() if self._pool.size >= LARGE else np.empty(self._pool.size, np.float32)

    def _mix(self, peer: SimulatedPeer) -> None:
        """Carry out the merges that are due."""
        if not peer.merges:
            return
        if peer.mixed is None:
            peer.mixed, peer.owns_start = self._new_vector(), True
        segments = peer.machine.config.segments
        mixes = [
            SegmentMix(segments[merge.segment], merge.own_weight, [(copy.payload, copy.weight) for copy in merge.contributions])
            for _, merge in sorted(peer.merges.items())
        ]
        peer.merges.clear()
        mix_segments(self._aggregate, peer.own, mixes, out=peer.mixed)


NOTHING = Decoded(np.empty(0, np.float32), None)


class NoLearning:
    """Everybody keeps the initial model: what happens when, and how many bytes it takes, does not depend on values."""

    def __init__(self, num_parameters: int) -> None:
        self.initial = np.zeros(num_parameters, np.float32)
        self.initial.flags.writeable = False

    def new_store(self, name: PeerId) -> SegmentStore:
        return SegmentStore(self.initial, (), codec("float32"), 0, name)

    def train(self, peer: SimulatedPeer, round_: int) -> None: ...

    def merge(self, peer: SimulatedPeer, merge: Merge) -> None: ...

    def vector(self, peer: SimulatedPeer) -> np.ndarray:
        return self.initial

    def publish(self, peer: SimulatedPeer, version: int) -> None: ...

    def read(self, peer: SimulatedPeer, version: int, range_: Range) -> Decoded:
        return NOTHING

    def retain(self, peer: SimulatedPeer, versions: Collection[int]) -> None: ...

    def lose(self, peer: SimulatedPeer) -> None: ...
