"""What servers send a device, chunk by chunk: put together, checked, and told to the machine once it is whole.

A chunk that cannot be part of what was asked for is an error: a RemoteProtocolError, a CodecError or a PlanError. Memory is
taken for no more than was asked for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from gossipfl.errors import PlanError, RemoteProtocolError
from gossipfl.inference.execution.activations import samples_from_text
from gossipfl.inference.planning.device_words import Tier
from gossipfl.inference.planning.margins import differing
from gossipfl.inference.planning.offers import manifest_from_json, split
from gossipfl.inference.planning.profile import Range
from gossipfl.protocol.messages import Data, Offer, Result
from gossipfl.protocol.wire import MAX_OFFER_BYTES
from gossipfl.runtime.content_cache import ContentCache
from gossipfl.runtime.device_questions import Job
from gossipfl.runtime.device_versions import DeviceVersion
from gossipfl.runtime.stages import ModelChain
from gossipfl.segments.codecs import all_finite, codec


@dataclass(slots=True)
class Coming:
    """An answer of which some has come: an Offer, a Result of `num_samples` samples, or ranges of a Pull by `codec`."""

    job: Job | None = None
    tier: Tier = "reduced"
    num_samples: int = 0
    sent_at: float = 0.0
    codec: str = ""
    version: int = 0
    ranges: dict[Range, bytearray] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)


def take_offer(coming: Coming, offer: Offer, model: str, chain: ModelChain) -> Offer | None:
    """The Offer with its Manifest, once it is whole and adds up for the model that is here."""
    if not _continues(coming.content, offer, MAX_OFFER_BYTES):
        return None
    manifest = manifest_from_json(bytes(coming.content))
    if manifest.model != model:
        raise PlanError(f"the offer is of model {manifest.model!r}, not of {model!r}")
    manifest.check(chain.profile, chain.layout.digest)
    samples_from_text(manifest.samples, chain.profile.input_shape)
    return Offer(offer.request, offer.offset, offer.total, manifest)


def take_data(coming: Coming, data: Data, version: DeviceVersion | None, cache: ContentCache) -> Data | None:
    """The chunk without its payload; with the last one of a range the pieces in it are checked and kept."""
    content = coming.ranges.get(data.range)
    if content is None or version is None:
        return None
    size = codec(coming.codec).num_bytes(data.range[1] - data.range[0])
    if data.total != size or data.version != coming.version:
        raise RemoteProtocolError(
            f"{data.total} bytes of version {data.version} for {data.range} as {coming.codec}, "
            f"which takes {size} of version {coming.version}"
        )
    if data.offset != len(content):
        raise RemoteProtocolError(f"a chunk at {data.offset} of {data.range}, of which {len(content)} bytes have come")
    content += data.payload
    if len(content) == size:
        del coming.ranges[data.range]
        for piece, part in split(coming.codec, data.range, memoryview(content)):
            version.keep(piece.range, piece.codec, bytes(part), cache)
    told = (data.request, data.version, data.newest, data.num_samples, data.range, data.offset, data.total, data.num_bytes)
    return Data(*told)


def take_result(coming: Coming, result: Result, num_classes: int, version: DeviceVersion | None) -> Result | None:
    """The Result with the margins of its samples, or whether they differ, once it is whole; the scores are the job's."""
    job, size = coming.job, 4 * coming.num_samples * num_classes
    if job is None or version is None or result.total != size:
        raise RemoteProtocolError(
            f"{result.total} bytes of scores of version {result.version} for {coming.num_samples} samples, which take {size}"
        )
    job.bytes_down += len(result.payload)
    if not _continues(coming.content, result, size):
        return None
    scores = np.frombuffer(coming.content, np.float32).reshape(-1, num_classes)
    if not all_finite(scores.reshape(-1)):
        raise RemoteProtocolError("the scores are not finite")
    job.server_s += result.seconds
    job.transfer_s += max(0.0, time.perf_counter() - coming.sent_at - result.seconds)
    found: tuple[float, ...] | tuple[bool, ...] = ()
    if coming.tier == "audit":
        assert job.reduced is not None, "it was set aside"
        found = tuple(differing(job.reduced.argmax(1), scores.argmax(1)).tolist())
    elif coming.tier != "reduced":
        job.fallback = scores
    else:
        job.reduced, job.margins = scores, version.margins_of(scores)
        found = job.margins
    return Result(result.request, result.version, result.seconds, result.offset, result.total, found)


def _continues(content: bytearray, chunk: Offer | Result, most: int) -> bool:
    """Take a chunk in; whether it was the last. RemoteProtocolError where it does not continue what has come."""
    if chunk.offset != len(content) or chunk.total > most:
        raise RemoteProtocolError(f"a chunk at {chunk.offset} of {chunk.total} bytes, of which {len(content)} have come")
    content += chunk.payload
    return len(content) == chunk.total
