"""What is told of a run's peers, one plain dict each: the lines of its record. Times in seconds since the run began."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gossipfl.protocol.machine import Fault, RoundReport, Traffic
from gossipfl.protocol.messages import PeerId

Event = dict[str, Any]


def round_event(
    peer: PeerId,
    report: RoundReport,
    *,
    time_s: float,
    train_loss: float,
    train_s: float,
    traffic: Traffic,
    accuracy_before: float | None,
    accuracy_after: float | None,
) -> Event:
    """The record's line for one peer and round.

    What a peer trained in a round in which it then adopted another's model counts as time, and says nothing of that model.
    `staleness_by_segment` is the mean over the copies of each segment, null where none was mixed, and empty in a round without
    a stale one. `received_from` is all payload since the peer's last line, by sender, and `payload_bytes` is its sum.
    """
    trained = not report.adopted
    return {
        "event": "round",
        "peer": peer,
        "round": report.round,
        "time_s": round(time_s, 4),
        "train_loss": train_loss if trained else None,
        "accuracy_before": accuracy_before if trained else None,
        "accuracy_after": accuracy_after,
        "train_s": round(train_s, 6),
        "wait_s": round(report.wait_s, 6),
        "merge_s": round(traffic.merge_s, 6),
        "payload_bytes": sum(traffic.received_from.values()),
        "wire_bytes": traffic.wire_bytes,
        "control_bytes": traffic.control_bytes,
        "repeated_bytes": report.repeated_bytes,
        "local_bytes": 0,
        "segments_mixed": report.segments_mixed,
        "late": report.late,
        "refused": report.refused,
        "rejected": report.rejected,
        "timeouts": report.timeouts,
        "missing": report.missing,
        "staleness_mean": report.staleness_sum / max(report.segments_mixed, 1),
        "staleness_max": report.staleness_max,
        "staleness_by_segment": _by_segment(report) if report.staleness_max else [],
        "adopted": report.adopted,
        "received_from": traffic.received_from,
    }


def _by_segment(report: RoundReport) -> list[float | None]:
    behind = report.staleness_by_segment
    means = {index: round(sum(copies) / len(copies), 4) for index, copies in behind.items()}
    return [means.get(index) for index in range(max(behind) + 1)]


def fault_event(at: PeerId, fault: Fault, time_s: float) -> Event:
    """What a peer noticed of another."""
    return {"event": "fault", "at": at, "time_s": round(time_s, 4), **asdict(fault)}


def finished_event(peer: PeerId, round_: int | None, time_s: float, error: str | None, **details: Any) -> Event:
    """A peer has come to its end, in `round_` if that is known; `error` says why if it could not take part."""
    event = {"event": "finished", "peer": peer, "round": round_, "time_s": round(time_s, 4), "error": error}
    return event | details
