"""What segmented gossip is compared with, in the same messages over the same transport.

| protocol          | who mixes whose copies                                                   | source                     |
|-------------------|--------------------------------------------------------------------------|----------------------------|
| `fedavg`          | the first peer averages the models of all and hands the average out      | McMahan et al., 2017       |
| `local`           | nobody anybody's                                                         |                            |
| `epidemic`        | each peer sends to `replicas` random ones, each segment to others        | de Vos et al., 2023        |
| `epidemic_oracle` | the same along a random graph in which each has `replicas` links         | de Vos et al., 2023        |
| `pairs`           | one random partner a round; with a sparse codec                          | Tang et al., 2023          |
| `fragments`       | what came while training is mixed, and nobody waits                      | Biswas et al., 2025        |
| `gossip`          | `selection = "bandwidth"`: BACombo                                       | Jiang et al., 2020         |
| `gossip`          | `segments = 1`: whole models of random neighbours                        | Hegedus et al., 2019       |
| `gossip`          | `selection = "all"`, `mixing = "metropolis_hastings"`: D-PSGD            | Lian et al., 2017          |

Each is the gossip machine with other choices, so that what they differ in is all there is to read here. In particular every
one of them pulls: what a paper has pushed is asked for by its receiver, so no peer takes in bytes that it did not ask for.

Further deviations of those that are `gossip` with other settings (the others say theirs themselves):

- BACombo: a neighbour that was not tried yet counts as infinitely fast, where the code that seems to be the authors' starts all
  at 50; a rate is that of a pull, with all segments that are asked of a neighbour at once; copies are weighted by numbers of
  samples, as in the paper's text, where that code weighs all alike (`mixing = "uniform"`).
- Whole models: rounds in which each peer mixes `replicas` models at once, where the paper's peers send in a rhythm of their own
  and merge each model that comes, by its age.
- D-PSGD: peers mix what they have trained, by any optimizer for any number of local steps, where the paper adds one gradient,
  taken before mixing, to the mixed values; its weights may be any symmetric, doubly stochastic ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from gossipfl.errors import ConfigError
from gossipfl.overlay.selection import Schedule, Senders, check_regular, random_pairs, random_regular, random_sends
from gossipfl.protocol.gossip import PROTOCOLS, Gossip, GossipConfig, Phase
from gossipfl.protocol.machine import Action, Contribution, Forget, Publish
from gossipfl.protocol.messages import NEWEST, PeerId
from gossipfl.randomness import generator


@PROTOCOLS.register("fedavg")
class FederatedAveraging(Gossip):
    """FedAvg with a parameter server, which lives at the first peer and shares its links.

    In each round the server pulls the trained model of every client, averages them with its own peer's by numbers of training
    samples, and publishes the average under the round's number; each client pulls that and trains on from it.

    Deviations from the paper: every client takes part in every round, and models are pulled, by who needs them, when they are
    ready, instead of pushed. A client that the server cannot reach goes on from its own model.
    """

    has_replicas = False

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
        """Nobody stands in for anybody; but who comes late has the average from the server, and a server what clients have."""
        live = super()._replacements() if self.report.adopted else []
        return live if self.is_server else [peer for peer in live if peer == self.server]

    def _round_done(self, now: float) -> list[Action]:
        done = super()._round_done(now)
        return [*done, Publish(self.round), *super()._offer(self.round, now)] if self.is_server else done


@PROTOCOLS.register("local")
class LocalTraining(Gossip):
    """Training alone, each peer on its own samples; who comes late, or back, begins at the beginning."""

    has_replicas = False

    def _adopt(self, now: float) -> list[Action]:
        return self._train(1, now)

    def _choose(self, round_: int) -> list[list[PeerId]]:
        return [[] for _ in self.config.segments]


# --- who sends to whom is drawn for everybody at once -----------------------------------------------------------------


class Scheduled(Gossip):
    """Rounds whose exchange follows from the common seed: a receiver draws what its senders draw, and pulls from them.

    A subclass names its schedule, which is drawn afresh for each segment and round. Nobody stands in for a sender that has
    gone, for nobody else has sent to this peer; who is sent nothing keeps its own copy.

    Deviations of all of them: pulled instead of pushed, which is the same bytes between the same peers and one latency more;
    every peer must be everybody's neighbour, as their papers have it, or it could not draw for the others.
    """

    def __init__(
        self, name: PeerId, degrees: Mapping[PeerId, int], config: GossipConfig, numbers: Iterator[int] | None = None
    ) -> None:
        super().__init__(name, degrees, config, numbers)
        for peer, degree in degrees.items():
            if degree != len(degrees):
                raise ConfigError(
                    f"{peer} has {degree} neighbours and {name} has {len(degrees)}, but a gossip.protocol that draws for "
                    "everybody needs everybody linked; set topology.kind = 'full'"
                )
        self._everybody = tuple(sorted((name, *degrees)))

    @staticmethod
    def check(num_peers: int, replicas: int) -> None:
        """ConfigError where so many peers cannot draw."""

    @staticmethod
    @abstractmethod
    def _schedule(names: Sequence[PeerId], replicas: int, rng: Any) -> Senders:
        """Whose copies of one segment each peer mixes (see `overlay.selection`)."""

    def _choose(self, round_: int) -> list[list[PeerId]]:
        config = self.config
        drawn = _drawn(self._schedule, self._everybody, config.replicas, len(config.segments), config.seed, round_)
        live = set(self.membership.candidates(at_least=len(self.membership.neighbours)))
        chosen = [[peer for peer in senders[self.name] if peer in live] for senders in drawn]
        self.report.missing += sum(len(senders[self.name]) for senders in drawn) - sum(map(len, chosen))
        return chosen

    def _replacements(self) -> list[PeerId]:
        return super()._replacements() if self.report.adopted else []


@lru_cache(maxsize=16)
def _drawn(
    schedule: Schedule, everybody: tuple[PeerId, ...], replicas: int, num_segments: int, seed: int, round_: int
) -> tuple[Senders, ...]:
    """The senders of every segment, the same at every peer; kept, for the peers of one process ask one after another."""
    rng = generator(seed, "schedule", round=round_)
    return tuple(schedule(everybody, replicas, rng) for _ in range(num_segments))


@PROTOCOLS.register("epidemic")
class EpidemicLearning(Scheduled):
    """EL-Local (de Vos, Farhadkhani, Guerraoui, Kermarrec, Pires and Sharma, "Epidemic Learning: Boosting Decentralized
    Learning with Randomized Communication", NeurIPS 2023, algorithm 1): in each round each peer sends its model to s peers,
    drawn uniformly and independently, and averages its own with however many it was sent.

    The paper's own is `segments = 1`, `mixing = "uniform"`, with s as `replicas`. With more segments it is Mosaic Learning
    (Biswas et al., arXiv 2602.04352, 2026): K fragments, each of them sent to s peers of its own draw, at the same bytes.

    Deviation: peers draw from a common seed, not each from a secret one.
    """

    _schedule = staticmethod(random_sends)


@PROTOCOLS.register("epidemic_oracle")
class EpidemicLearningWithOracle(Scheduled):
    """EL-Oracle (the same paper): the exchange of each round goes along a fresh random s-regular graph, so that each peer
    sends and is sent s models. The common seed takes the place of the oracle."""

    _schedule = staticmethod(random_regular)
    check = staticmethod(check_regular)


@PROTOCOLS.register("pairs")
class RandomPairs(Scheduled):
    """One partner a round, in the manner of Tang, Shi, Li and Chu, "GossipFL: A Decentralized Federated Learning Framework
    With Sparsified and Adaptive Communication", IEEE TPDS 34(3), 2023: a matching of all peers, fresh in every round; both of
    a pair send each other a sparse model and take the mean of what they have of both.

    The paper's own is `segments = 1`, `mixing = "uniform"`, `codec = "randomk:..."`; `replicas` plays no part.

    Deviations: the matching is uniform, while the paper's coordinator prefers links above a threshold of bandwidth; and each
    of a pair draws its own coordinates, while the paper's share one mask.
    """

    has_replicas = False
    _schedule = staticmethod(random_pairs)


# --- nobody waits for anybody -----------------------------------------------------------------------------------------


@PROTOCOLS.register("fragments")
class AsynchronousFragments(Gossip):
    """Fragments travel while their receiver trains, in the manner of DivShare (Biswas, Kermarrec, Marouani, Pires, Sharma and
    de Vos, "Boosting Asynchronous Decentralized Learning with Model Fragmentation", WWW 2025, arXiv 2410.12918).

    the paper, at node i                                            here
    train; cut the model into fragments, queue each for J others    Trained(r) publishes version r for who asks
    a slow link holds up nobody: what is still queued when the      a neighbour that still sends is asked for no more
    next model is trained is dropped
    mix what has come since, the newest of each sender, uniformly   `_gather`: Merge what there is, at once
    train on without waiting                                        `_train`: Pull the newest, and Train meanwhile

    The paper's own has `mixing = "uniform"` and `staleness_exponent = 0`, with J as `replicas`.

    Deviations: the receiver draws R senders for each fragment, instead of the sender J receivers, so that each peer mixes as
    many on average; a fragment is a run of the vector, not a random set of coordinates; what is on its way is not dropped but
    mixed when it is there, and its sender is spared meanwhile.
    """

    def _train(self, round_: int, now: float) -> list[Action]:
        """Train, and have the others' fragments come in meanwhile; before the first round there are none."""
        training = super()._train(round_, now)
        chosen = self._choose(round_) if round_ > 1 else [[] for _ in self.config.segments]
        return [*training, *self._ask(chosen, now)]

    def _gather(self, round_: int, num_samples: int, now: float) -> list[Action]:
        assert self.phase is Phase.TRAINING and round_ == self.round and num_samples == self.config.num_samples
        self.phase, self.report.round, self.report.train_s, self._began = Phase.GATHERING, round_, now - self._began, now
        self._finished_rates.clear()
        self._reported.clear()
        merges = [action for index in range(len(self.config.segments)) for action in self._merge(index)]
        return [*self._offer(round_, now), *merges]

    def _candidates(self) -> list[PeerId]:
        busy = {transfer.peer for transfer in self._transfers.values()}
        return [peer for peer in super()._candidates() if peer not in busy]

    def _version_wanted(self, now: float) -> tuple[int, int]:
        return super()._version_wanted(now) if self.report.adopted else (NEWEST, NEWEST)

    def _merge_if_complete(self, index: int) -> list[Action]:
        return super()._merge_if_complete(index) if self.report.adopted else []

    def _replacements(self) -> list[PeerId]:
        return super()._replacements() if self.report.adopted else []

    @property
    def _is_far_behind(self) -> bool:
        """Who is slow mixes newer models as they come, and goes on from there."""
        return False

    def _linger(self, now: float, round_s: float) -> list[Action]:
        forgotten = [Forget(transfer.peer, request) for request, transfer in self._transfers.items()]
        self._transfers.clear()
        return [*forgotten, *super()._linger(now, round_s)]
