"""Flow control: how many payload bytes may be under way on one connection.

ZeroMQ queues count messages, not bytes, so what is in flight is bounded here: a sender may send `FIRST_WINDOW_BYTES` of payload
on a connection and then as much as the receiver's Credits allow. The receiver's window follows the rate of the connection (a
quarter of a second's worth), so that small messages are not stuck behind seconds of payload.

A Credit that comes the other way says what the sender may still send, where the two might disagree: when it begins to serve on
a connection (perhaps anew, having forgotten it), and when it has waited for long.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossipfl.protocol import wire

FIRST_WINDOW_BYTES = 4 * wire.MAX_PAYLOAD_BYTES
MAX_WINDOW_BYTES = 16 * wire.MAX_PAYLOAD_BYTES
WINDOW_S = 0.25


@dataclass(slots=True)
class Window:
    """What may still come on a connection, as its receiver reckons; in payload bytes, times in seconds of any clock."""

    allowed: int = FIRST_WINDOW_BYTES
    num_bytes: int = FIRST_WINDOW_BYTES
    uncredited: int = 0
    credited_at: float = 0.0

    def take(self, num_bytes: int) -> bool:
        """So much has come; whether the sender is to get a credit."""
        self.allowed -= num_bytes
        self.uncredited += num_bytes
        return self.allowed <= self.num_bytes // 2

    def credit(self, now: float) -> int:
        """Allow a window more, of what the connection has lately carried in `WINDOW_S`; the bytes of the Credit."""
        rate = self.uncredited / max(now - self.credited_at, 1e-6)
        self.credited_at, self.uncredited = now, 0
        self.num_bytes = int(min(max(rate * WINDOW_S, FIRST_WINDOW_BYTES), MAX_WINDOW_BYTES))
        credit = max(self.num_bytes - self.allowed, FIRST_WINDOW_BYTES)
        self.allowed += credit
        return credit

    def reset(self) -> None:
        """The connection begins anew."""
        self.allowed, self.num_bytes, self.uncredited = FIRST_WINDOW_BYTES, FIRST_WINDOW_BYTES, 0
