"""Answering pulls: serve what is stored, park what is not trained yet, refuse the rest.

Asked for version r, a peer serves exactly r while it is stored. If r is forgotten it serves its oldest stored newer version
(newer is always acceptable). If r is not trained yet it answers Later and parks the pull, unless the puller said that an
older one will do (`Pull.oldest`). What is parked is bounded per neighbour and dropped when the pull expires.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from gossipfl.protocol.machine import Action, Send, Serve
from gossipfl.protocol.messages import NEWEST, Later, PeerId, Pull, Refuse

MAX_PARKED = 4
"""Pulls parked per neighbour: 4 x 32 ranges, all the segments that a model may have."""
MAX_AHEAD = 4
"""A pull for a version further ahead than this is refused: its sender lives in another time."""


@dataclass
class PullDesk:
    """The serving half of a peer: which versions are stored, and which pulls wait for the next one."""

    versions_kept: int
    versions: deque[int] = field(init=False)
    _parked: dict[PeerId, dict[int, tuple[Pull, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.versions = deque(maxlen=self.versions_kept)

    @property
    def newest(self) -> int:
        return self.versions[-1] if self.versions else 0

    @property
    def oldest(self) -> int:
        return self.versions[0] if self.versions else 0

    def answer(self, peer: PeerId, pull: Pull, now: float, may_train: bool = True) -> list[Action]:
        """Serve, park or refuse a pull. `may_train` is False once no further version will come."""
        version = self._version_for(pull)
        if version is not None:
            return [Serve(peer, pull, version)]
        waits = may_train and pull.oldest != NEWEST and pull.version <= self.newest + MAX_AHEAD
        if not waits:
            return [self._refusal(peer, pull)]
        actions: list[Action] = []
        parked = self._parked.setdefault(peer, {})
        parked[pull.request] = (pull, now + pull.expires_s)  # a repeat takes its own place
        if len(parked) > MAX_PARKED:
            crowded_out, _ = parked.pop(next(iter(parked)))
            actions.append(self._refusal(peer, crowded_out))
        return [*actions, Send(peer, Later(pull.request, 0))]

    def publish(self, version: int, now: float, needed_from: int = 0) -> list[Action]:
        """Store `version`, forget those older than `needed_from`, and serve the parked pulls that can now be."""
        while self.versions and self.versions[0] < needed_from:
            self.versions.popleft()
        self.versions.append(version)
        return self._revisit(now)

    def close(self, now: float) -> list[Action]:
        """No further version will come: refuse what is still parked."""
        return self._revisit(now, may_train=False)

    def forget(self, peer: PeerId) -> None:
        """Drop what is parked for a neighbour that went away."""
        self._parked.pop(peer, None)

    def _revisit(self, now: float, may_train: bool = True) -> list[Action]:
        parked, self._parked = self._parked, {}
        actions: list[Action] = []
        for peer, pulls in parked.items():
            for pull, expires in pulls.values():
                if expires <= now:
                    continue
                if may_train and self._version_for(pull) is None:
                    self._parked.setdefault(peer, {})[pull.request] = (pull, expires)
                else:
                    actions += self.answer(peer, pull, now, may_train)
        return actions

    def _version_for(self, pull: Pull) -> int | None:
        """The stored version to serve; None if there is none that will do yet."""
        if not self.versions:
            return None
        newest = self.versions[-1]
        if pull.version in (newest, NEWEST) or pull.oldest <= newest < pull.version:
            return newest
        return next((version for version in self.versions if version >= pull.version), None)

    def _refusal(self, peer: PeerId, pull: Pull) -> Send:
        return Send(peer, Refuse(pull.request, self.oldest, self.newest))
