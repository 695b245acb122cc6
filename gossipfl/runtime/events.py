"""What is told of a run's peers, one plain dict each: the lines of its record. Times in seconds since the run began."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gossipfl.protocol.messages import Fault, PeerId, RoundReport

Event = dict[str, Any]


def round_event(
    peer: PeerId,
    report: RoundReport,
    *,
    time_s: float,
    train_loss: float,
    train_s: float,
    merge_s: float,
    wire_bytes: int,
    control_bytes: int,
    accuracy_before: float | None,
    accuracy_after: float | None,
) -> Event:
    """The record's line for one peer and round; a peer that adopted a model in this round has not trained in it."""
    trained = not report.adopted
    return {
        "event": "round",
        "peer": peer,
        "round": report.round,
        "time_s": round(time_s, 4),
        "train_loss": train_loss if trained else None,
        "accuracy_before": accuracy_before if trained else None,
        "accuracy_after": accuracy_after,
        "train_s": round(train_s, 6) if trained else 0.0,
        "wait_s": round(report.wait_s, 6),
        "merge_s": round(merge_s, 6),
        "payload_bytes": report.payload_bytes,
        "wire_bytes": wire_bytes,
        "control_bytes": control_bytes,
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
        "adopted": report.adopted,
    }


def fault_event(at: PeerId, fault: Fault, time_s: float) -> Event:
    """What a peer noticed of another."""
    return {"event": "fault", "at": at, "time_s": round(time_s, 4), **asdict(fault)}


def finished_event(peer: PeerId, round_: int | None, time_s: float, error: str | None, **details: Any) -> Event:
    """A peer has come to its end, in `round_` if that is known; `error` says why if it could not take part."""
    event = {"event": "finished", "peer": peer, "round": round_, "time_s": round(time_s, 4), "error": error}
    return event | details
