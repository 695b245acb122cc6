"""What segmented gossip is compared with, in the same messages over the same transport.

| protocol | who sends what to whom                                                         | source                     |
|----------|--------------------------------------------------------------------------------|----------------------------|
| `fedavg` | the first peer averages the models of all and hands the average out            | McMahan et al., 2017       |
| `local`  | nobody sends anything                                                          |                            |
| `gossip` | `segments = 1`: whole models of random neighbours                              | Hegedus et al., 2019       |
| `gossip` | `selection = "all"`, `mixing = "metropolis_hastings"`: D-PSGD                  | Lian et al., 2017          |

Each is the gossip machine with other choices, so that what they differ in is all there is to read here.
"""

from __future__ import annotations

from collections.abc import Iterable

from gossipfl.protocol.gossip import PROTOCOLS, Gossip
from gossipfl.protocol.messages import Action, Contribution, PeerId, Publish


@PROTOCOLS.register("fedavg")
class FederatedAveraging(Gossip):
    """FedAvg with a parameter server, which lives at the first peer and shares its links.

    In each round the server pulls the trained model of every client, averages them with its own peer's by numbers of training
    samples, and publishes the average under the round's number; each client pulls that and trains on from it.

    Deviations from the paper: every client takes part in every round, and models are pulled, by who needs them, when they are
    ready, instead of pushed. A client that the server cannot reach goes on from its own model.
    """

    @property
    def server(self) -> PeerId:
        return min(self.name, *self.membership.neighbours)

    @property
    def is_server(self) -> bool:
        return self.name == self.server

    def _offer(self, round_: int, now: float) -> list[Action]:
        return [] if self.is_server else super()._offer(round_, now)

    def _choose(self, round_: int) -> list[list[PeerId]]:
        live = self.membership.candidates(at_least=1)
        peers = live if self.is_server else [peer for peer in live if peer == self.server]
        expected = len(self.membership.neighbours) if self.is_server else 1
        self.report.missing += (expected - len(peers)) * len(self.config.segments)
        return [peers for _ in self.config.segments]

    def _own_weight(self, contributions: Iterable[Contribution]) -> float:
        return super()._own_weight(contributions) if self.is_server or not contributions else 0.0

    def _replacements(self) -> list[PeerId]:
        return []

    def _round_done(self, now: float) -> list[Action]:
        done = super()._round_done(now)
        return [*done, Publish(self.round), *super()._offer(self.round, now)] if self.is_server else done


@PROTOCOLS.register("local")
class LocalTraining(Gossip):
    """Training alone, each peer on its own samples."""

    def _choose(self, round_: int) -> list[list[PeerId]]:
        return [[] for _ in self.config.segments]
