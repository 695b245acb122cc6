"""The nodes of one endpoint, as the shell of one message loop: each is given what is for it, and woken when its time has come.

    endpoint = Endpoint(on_crash)
    endpoint.add(node)
    loop = MessageLoop(transport, endpoint, "gossipfl-peers")

Peers that train are driven so; servers and devices of inference are shells of such a loop themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from gossipfl.protocol.machine import Wake
from gossipfl.protocol.messages import PeerId
from gossipfl.runtime.node import Node
from gossipfl.runtime.transport import Happening, Incoming, LinkDown, LinkUp


class Endpoint:
    """`on_crash` hears of what has ended the loop."""

    def __init__(self, on_crash: Callable[[BaseException], None] | None = None) -> None:
        self.nodes: dict[PeerId, Node] = {}
        self._on_crash = on_crash

    def add(self, node: Node) -> None:
        """Before the loop starts."""
        self.nodes[node.name] = node

    # --- the loop's shell ---------------------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float | None:
        deadlines = [node.machine.next_deadline for node in self.nodes.values()]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def take(self, happening: Happening) -> None:
        match happening:
            case Incoming():
                node = self.nodes.get(happening.recipient)
                if node is not None:
                    node.take(happening)
            case LinkUp(peers):
                for node in self.nodes.values():
                    for peer in peers:
                        node.link_up(peer)
            case LinkDown(peers, reason):
                for node in self.nodes.values():
                    for peer in peers:
                        node.link_down(peer, reason)

    def wake(self) -> None:
        now = time.monotonic()
        for node in self.nodes.values():
            deadline = node.machine.next_deadline
            if deadline is not None and deadline <= now:
                node.handle(Wake())

    def crashed(self, error: BaseException) -> None:
        if self._on_crash is not None:
            self._on_crash(error)
