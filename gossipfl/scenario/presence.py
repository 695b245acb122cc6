"""Who of a run over sockets is there: processes that are killed and started as [churn] says.

A peer that is killed, and may be back, gets a new process at once, which waits with everything loaded until then; what it
knew is gone. One that comes late waits likewise from the beginning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence

from gossipfl.errors import ConfigError
from gossipfl.overlay.churn import Change, Churn
from gossipfl.scenario.workers import WorkerHandle


class Presence:
    """Kills and starts the processes of peers; `workers[i]` is that of peer i, or, without churn, of any number of peers.

    `start(worker, elapsed_s)` has a worker that is ready join the run, which began so long ago; `replace(index)` makes the
    next one of a peer that was killed; `told(change)` hears of each change that has been made.
    """

    def __init__(
        self,
        churn: Churn,
        workers: list[WorkerHandle],
        start: Callable[[WorkerHandle, float], None],
        replace: Callable[[int], WorkerHandle],
        told: Callable[[Change], None],
    ) -> None:
        self.away: set[str] = set()
        """Peers that were killed and are not back. Those that come late are not among them: the run waits for them."""
        self.late: set[str] = set()
        """Peers that have not come yet."""
        self._churn, self._workers = churn, workers
        self._start, self._replace, self._told = start, replace, told
        self._former: list[WorkerHandle] = []
        self._not_ready: list[WorkerHandle] = []
        self._due_s: dict[WorkerHandle, float] = {}  # when those were to be back that are not ready yet
        self._late_s: dict[str, float] = {}  # how long they kept the run waiting, at the most
        self._began = math.inf
        self._changes = churn.changes(math.inf)
        self._next: Change | None = None

    def begin(self) -> None:
        """The run begins, with those who are there."""
        self._began = time.monotonic()
        self._next = next(self._changes, None)
        for index, worker in enumerate(self._workers):
            if self._churn.is_empty or self._churn.initially_online(index):
                self._start(worker, 0.0)
            else:
                self.late.update(worker.peers)

    def end(self) -> None:
        """Nobody comes or goes any more."""
        self._next, self._changes = None, iter(())
        self.away |= self.late

    @property
    def next_in_s(self) -> float:
        """Seconds until somebody comes or goes."""
        return math.inf if self._next is None else self._began + self._next.time_s - time.monotonic()

    def follow(self, finished: Collection[str]) -> None:
        """Kill and start whoever is due, but those who have finished."""
        while self._next is not None and self.next_in_s <= 0:
            index, online = self._next.index, self._next.online
            if self._workers[index].peers[0] not in finished:
                if online:
                    self._bring(index)
                else:
                    self._kill(index)
                self._told(self._next)
            self._next = next(self._changes, None)

    def is_ready(self, worker: WorkerHandle) -> None:
        """This one, the next of a peer that was killed, has loaded everything."""
        if worker in self._not_ready:
            self._not_ready.remove(worker)
            if worker.peers[0] not in self.away:  # it was to be back before
                self._was_missed(worker)
                self._start(worker, time.monotonic() - self._began)

    def was_killed(self, worker: WorkerHandle) -> bool:
        return worker in self._former

    def _kill(self, index: int) -> None:
        worker = self._workers[index]
        self._was_missed(worker)
        self.away.update(worker.peers)
        self._former.append(worker)
        worker.stop(time.monotonic())
        if self._may_return(index):
            self._workers[index] = self._replace(index)
            self._not_ready.append(self._workers[index])

    def _may_return(self, index: int) -> bool:
        """As planned from this change on: the clock may be past the return already."""
        assert self._next is not None
        since_s, later = self._next.time_s, (*self._churn.planned, *self._churn.traced)
        return self._churn.online < 1 or any(
            change.online and change.index == index and change.time_s >= since_s for change in later
        )

    def _bring(self, index: int) -> None:
        worker = self._workers[index]
        self.away.difference_update(worker.peers)
        self.late.difference_update(worker.peers)
        if worker in self._not_ready:
            self._due_s[worker] = time.monotonic() - self._began
        else:
            self._start(worker, time.monotonic() - self._began)

    def _was_missed(self, worker: WorkerHandle) -> None:
        """It was to be back before, where it is among those."""
        due_s = self._due_s.pop(worker, None)
        if due_s is not None:
            name, late_s = worker.peers[0], time.monotonic() - self._began - due_s
            self._late_s[name] = max(late_s, self._late_s.get(name, 0.0))

    def about_late(self) -> list[str]:
        """What to tell of peers that were back later than planned: they count as back, but there was no process yet."""
        if not self._late_s:
            return []
        latest = max(self._late_s, key=self._late_s.__getitem__)
        return [
            f"{', '.join(sorted(self._late_s))} came back later than [churn] says, {latest} by {self._late_s[latest]:.3g} s, "
            "as its process took so long to start; leave more time between a kill and the return, or use --clock virtual"
        ]


def check_churn(churn: Churn, groups: Sequence[Sequence[str]], in_process: bool) -> None:
    """ConfigError if peers are to be killed that have no process of their own."""
    if not churn.is_empty and (in_process or any(len(group) > 1 for group in groups)):
        where = "in this process" if in_process else f"{len(groups[0])} to a process"
        raise ConfigError(
            f"[churn] kills the processes of peers, and they live {where}: set peers_per_process = 1 and "
            "transport.kind = 'tcp', or use --clock virtual"
        )
