"""Stages that are ready to run on arrays, and the checks of what people ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import fx

from gossipfl.errors import ConfigError
from gossipfl.inference.execution.engines import Compiled, compile_stage, no_slower
from gossipfl.inference.planning.profile import FULL_ENGINE, ModelProfile, Shape
from gossipfl.protocol.wire import MAX_REASON_BYTES, MAX_TENSOR_BYTES
from gossipfl.segments.codecs import all_finite
from gossipfl.segments.layout import Layout

T = TypeVar("T")
Arrays = Sequence[np.ndarray]
BRIEF_S = 1e-4
"""A stage that takes less, in a loop, has run before another thread has begun with it."""
AWAKE_S = 3e-4
"""At the end of an emulated wait: what sleeps is woken 0.1 ms late."""
_COMPILING = threading.Lock()
"""Compiling changes what warnings do for the whole process, and one at a time is timed more fairly."""


class ModelChain(Protocol):
    """A model that can be cut between its layers (`inference.execution.chain.Chain`)."""

    profile: ModelProfile
    layout: Layout

    def stage(self, start: int, stop: int, vector: np.ndarray | None = None) -> fx.GraphModule: ...


class RunnableStage:
    """Layers `[start, stop)` with the weights of `vector`, compiled for `engine` with the help of calibration `samples`.

    `samples` are inputs of the model, f32[n, *input_shape]; without them only "fp32" can be compiled. If it is `contested` by
    others (there may be none) they are tried where it is of no use here, and "fp32" runs where none is; `refused` says why.
    """

    def __init__(
        self,
        chain: ModelChain,
        start: int,
        stop: int,
        vector: np.ndarray,
        engine: str,
        samples: np.ndarray | None = None,
        contested: Sequence[str] | None = None,
    ) -> None:
        self.refused: dict[str, str] = {}
        if samples is None:
            without = dict.fromkeys((engine, *(contested or ())))
            self.refused = {name: f"engine {name!r} is compiled with samples, and there are none" for name in without}
            self.refused.pop(FULL_ENGINE, None)
            engine = FULL_ENGINE
            live = tuple(torch.zeros(1, *shape) for shape in live_shapes(chain.profile, start))
        else:
            live = (torch.from_numpy(np.ascontiguousarray(samples, np.float32)),)
            if start:
                with torch.inference_mode():
                    live = chain.stage(0, start, vector)(*live)
        stage = chain.stage(start, stop, vector)
        with _COMPILING:
            if contested is None or engine == FULL_ENGINE:
                self._compiled: Compiled = compile_stage(stage, live, engine)
            else:
                self._compiled, self.refused = no_slower(stage, live, (engine, *contested))
        self.engine = self._compiled.engine

    def is_brief(self, num_samples: float) -> bool:
        """Whether so many take less than handing them to another thread."""
        return self._compiled.seconds * num_samples <= BRIEF_S

    def __call__(self, live: Arrays) -> tuple[np.ndarray, ...]:
        """The live tensors (f32[B, ...]) of the cut after it, from those of the cut before it."""
        torch.get_num_threads()  # see `threads`
        with torch.inference_mode():
            return tuple(tensor.numpy() for tensor in self._compiled(*map(_tensor, live)))


def threads(name: str, count: int = 1) -> ThreadPoolExecutor:
    """Until it asks for it, a new thread ignores torch.set_num_threads: it takes every core, and rounds differently."""
    return ThreadPoolExecutor(count, name, torch.get_num_threads)


def emulated(work: Callable[[], T], speed: float) -> T:
    """What `work` returns, no sooner than from a machine of this speed, of 1 at most.

    Reckoned from the processor's time of this thread, so that a busy machine is not taken for a slow one.
    """
    began, worked = time.perf_counter(), time.thread_time()
    result = work()
    if speed < 1:
        ends = began + (time.thread_time() - worked) / speed
        time.sleep(max(0.0, ends - time.perf_counter() - AWAKE_S))
        while time.perf_counter() < ends:
            pass
    return result


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Over the same memory, if that may be written to: torch warns of what may not."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def live_shapes(profile: ModelProfile, cut: int) -> tuple[Shape, ...]:
    """Of the tensors that go over the cut, per sample."""
    return profile.layers[cut - 1].live if cut else (profile.input_shape,)


def check_inputs(inputs: np.ndarray, input_shape: Shape) -> np.ndarray:
    """`inputs` as contiguous f32[B, *input_shape]; ConfigError for any others."""
    if not isinstance(inputs, np.ndarray) or inputs.dtype != np.float32:
        kind = inputs.dtype if isinstance(inputs, np.ndarray) else type(inputs).__name__
        raise ConfigError(f"inputs are {kind}, the model takes float32; convert them with numpy.asarray(x, numpy.float32)")
    if inputs.ndim != len(input_shape) + 1 or inputs.shape[1:] != tuple(input_shape) or not len(inputs):
        expected = f"[B, {', '.join(map(str, input_shape))}]"
        raise ConfigError(f"inputs of shape {list(inputs.shape)}, the model takes {expected} with one sample at least")
    if inputs.nbytes > MAX_TENSOR_BYTES:
        raise ConfigError(f"inputs of {inputs.nbytes:,} bytes, at most {MAX_TENSOR_BYTES:,} go at once; ask in smaller batches")
    if not all_finite(inputs.reshape(-1)):
        raise ConfigError("inputs hold NaN or infinite values; remove them")
    return np.ascontiguousarray(inputs)


def clipped(reason: object) -> str:
    """As much of an explanation as goes over the wire."""
    return str(reason).encode("utf-8", "replace")[:MAX_REASON_BYTES].decode("utf-8", "ignore") or "no reason given"
