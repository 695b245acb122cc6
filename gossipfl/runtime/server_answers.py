"""What a server answers with, made on its threads: the chunks of an offer, of what is pulled, and of scores."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gossipfl.errors import CodecError
from gossipfl.inference.execution.activations import decode_continued, decode_live
from gossipfl.inference.planning.offers import Failure
from gossipfl.inference.planning.remembered import First
from gossipfl.protocol import wire
from gossipfl.protocol.messages import Activation, Chunk, Continuation, Data, Failed, Offer, Pull, Result
from gossipfl.runtime.served import ServedVersion
from gossipfl.runtime.stages import clipped, live_shapes
from gossipfl.segments.codecs import all_finite


def offered(request: int, offer: bytes) -> list[Chunk]:
    return [Offer(request, offset, len(offer), payload=part) for offset, part in wire.parts(memoryview(offer))]


def pulled(served: ServedVersion, pull: Pull) -> list[Data]:
    """CodecError or ConfigError for what is not served."""
    answer, resumed = list[Data](), pull.offset
    for range_ in pull.ranges:
        payload = served.piece(range_, pull.codec)
        for offset, part in wire.parts(payload, min(resumed, len(payload) - 1)):
            answer.append(Data(pull.request, pull.version, pull.version, 0, range_, offset, len(payload), len(part), part))
        resumed = 0
    return answer


def run_stage(served: ServedVersion, activation: Activation, parts: list[Any]) -> list[Chunk] | Failed:
    """The scores, or what was wrong with what came."""
    shapes = live_shapes(served.chain.profile, activation.cut)
    try:
        live = decode_live(_joined(parts), shapes, activation.samples, activation.bits)
    except CodecError as error:
        return Failed(activation.request, Failure.INPUT, clipped(error))
    return _scores(served, activation.request, activation.cut, live)


def run_again(
    served: ServedVersion, continuation: Continuation, first: First, kept: list[Any], missing: list[Any]
) -> list[Chunk] | Failed:
    """The scores of the samples that are continued, or what was wrong with what came."""
    shapes = live_shapes(served.chain.profile, first.cut)
    try:
        live = decode_continued(_joined(kept), _joined(missing), shapes, first.samples, first.bits)
        if len(live[0]) != continuation.samples:
            raise CodecError(f"{len(live[0])} samples are marked, not {continuation.samples}")
    except CodecError as error:
        return Failed(continuation.request, Failure.INPUT, clipped(error))
    return _scores(served, continuation.request, first.cut, live)


def _scores(served: ServedVersion, request: int, cut: int, live: tuple[np.ndarray, ...]) -> list[Chunk] | Failed:
    (scores,), seconds = timed(lambda: served.stage(cut)(live))
    if not all_finite(scores.reshape(-1)):
        return Failed(request, Failure.COMPUTE, "the scores are not finite")
    encoded = memoryview(np.ascontiguousarray(scores, np.float32).tobytes())
    return [
        Result(request, served.version, seconds, offset, len(encoded), payload=part) for offset, part in wire.parts(encoded)
    ]


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else b"".join(parts)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began
