"""Ways to carry out a stage of a chain on this machine, and the choice of the fastest by measurement.

    compiled = fastest(chain.stage(0, 5), (calibration_inputs,))
    live = compiled(x)                     # f32[B, ...] of any B; compiled.engine, compiled.seconds, compiled.table

Which kernels win depends on the machine and on the shapes, so nothing is assumed: each candidate is compiled, checked and timed
when a stage is loaded. The check is against the stage in f32 on calibration inputs: 8-bit kernels of processors without the
right instructions saturate, and what differs by more than its precision explains is not used.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from gossipfl.errors import ConfigError, RunError
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.int8 import LARGEST_CODE, missing_kernels, quantize
from gossipfl.inference.planning.profile import FULL_ENGINE
from gossipfl.registry import Registry

logger = logging.getLogger(__name__)

Live = tuple[Tensor, ...]
"""Live tensors of a cut, f32[B, ...]."""
Run = Callable[..., Live]
Seconds = dict[str, tuple[list[float], list[float]]]
"""By engine, for each cut 0..L, a sample's seconds on the device and at the server; inf where the engine cannot be used."""
ENGINES: Registry[Callable[[fx.GraphModule, Live], Run]] = Registry("engine")
"""`f(stage, inputs) -> run` compiles a stage (of `Chain.stage`) with live tensors of calibration samples."""

MAX_SAMPLES = 64
"""Of the calibration samples that are used."""
EXPLAINED = 3.0
"""An engine may differ from f32 by as many times what rounding the input, weights and output of each layer to its precision
does (0.4 to 1.6 times on the models of `learning.models`); pairs of products that saturate in i16 come to ten times."""
ROUNDING = 1e-3
"""Relative difference that every engine may show: sums in another order."""
_TRACING = threading.Lock()
"""torch.jit keeps what it traces, and warnings keep what they ignore, for the whole process."""
TURN_S, TURNS = 5e-4, 40
"""Candidates are timed by turns, so that other work on the machine hits all alike, and the best turn counts."""
REST_S, CALLS = 0.02, 5
"""After a rest as long as this caches and cores are cold, and a call takes two to six times as long as in a loop; a longer rest
adds no more."""
LOAD_S = 0.3
"""Two engines rest for 0.2 s in all before their calls; more is left out where calls themselves take long."""
UNDISTURBED = 0.25
"""Quantile of several times that counts."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A stage ready to run: `compiled(*live) -> live`, from any thread."""

    engine: str
    seconds: float
    """Of a call with one sample, in a loop."""
    run: Run
    table: Mapping[str, float]
    """Of every candidate, as they were compared; inf where one cannot be used."""

    def __call__(self, *live: Tensor) -> Live:
        return self.run(*live)


def available_engines() -> list[str]:
    """The engines that work on this machine, fp32 first."""
    missing = missing_engines()
    return [FULL_ENGINE, *(name for name in ENGINES if name != FULL_ENGINE and name not in missing)]


def missing_engines() -> dict[str, str]:
    """The engines that do not, and what they lack."""
    return {name: _not_there(name, lacks) for name in ENGINES if (lacks := _missing(name))}


def compile_stage(stage: fx.GraphModule, inputs: Live, engine: str) -> Compiled:
    """The stage with one engine, checked and timed; `inputs` are live tensors of calibration samples, f32[n, ...].

    ConfigError for an engine that is unknown or not installed; RunError where it cannot carry out the stage or computes
    something else on this machine.
    """
    inputs = _few(inputs)
    run = _compile(stage, inputs, engine, _Golden(stage, inputs))
    seconds = _time_by_turns({engine: run}, inputs)[engine]
    return Compiled(engine, seconds, run, {engine: seconds})


def fastest(stage: fx.GraphModule, inputs: Live, engines: Iterable[str] | None = None) -> Compiled:
    """The stage with the engine that answers one sample soonest; fp32 is always a candidate, by default all others are too.

    An engine that cannot carry out the stage, or computes something else, is left out, and the log says why.
    """
    inputs, names = _few(inputs), dict.fromkeys([FULL_ENGINE, *(available_engines() if engines is None else engines)])
    runs = _usable(stage, inputs, names)
    seconds = _time_by_turns(runs, inputs)
    best = min(seconds, key=seconds.__getitem__)
    return Compiled(best, seconds[best], runs[best], {name: seconds.get(name, math.inf) for name in names})


def no_slower(stage: fx.GraphModule, inputs: Live, engines: Iterable[str]) -> tuple[Compiled, dict[str, str]]:
    """The stage with the first of the engines that is of use on this machine, else with fp32; and why those before it are not.

    One that does not work here, computes something else, or answers one sample later than fp32 does is of no use. It is timed
    with fp32 by turns, as `stage_seconds` does, for little longer than LOAD_S.
    """
    inputs, refused = _few(inputs), dict[str, str]()
    golden = _Golden(stage, inputs)
    full = _compile(stage, inputs, FULL_ENGINE, golden)
    seconds = {FULL_ENGINE: math.nan}  # where nothing is compared with it
    for engine in engines:
        try:
            run = _compile(stage, inputs, engine, golden)
        except (ConfigError, RunError) as error:
            refused[engine] = str(error)
            continue
        seconds = _time_rested({engine: run, FULL_ENGINE: full}, inputs, LOAD_S)
        if seconds[engine] <= seconds[FULL_ENGINE]:
            return Compiled(engine, _time_by_turns({engine: run}, inputs)[engine], run, seconds), refused
        own, of_full = (f"{1000 * seconds[name]:.3g} ms" for name in (engine, FULL_ENGINE))
        refused[engine] = (
            f"engine {engine!r} is slower than {FULL_ENGINE} on this machine: {own} a sample, {FULL_ENGINE} {of_full}"
        )
    return Compiled(FULL_ENGINE, _time_by_turns({FULL_ENGINE: full}, inputs)[FULL_ENGINE], full, seconds), refused


def stage_seconds(chain: Chain, vector: np.ndarray, inputs: np.ndarray, engines: Iterable[str] | None = None) -> Seconds:
    """What every part of the chain takes with each engine.

    `inputs` are calibration samples, f32[n, *input_shape]. Every part is compiled and timed whole, since what layers take alone
    does not add up: converting to codes and calling a kernel take as long as a small layer. Other work on the machine only adds
    to a time, so a part takes no longer than one that contains it. 40 s for ResNet-20.
    """
    num_layers = len(chain.profile.layers)
    live = [_few((torch.from_numpy(np.ascontiguousarray(inputs, np.float32)),))]
    with torch.inference_mode():
        for index in range(num_layers):
            live.append(chain.stage(index, index + 1, vector)(*live[-1]))
    parts = {(0, cut) for cut in range(1, num_layers + 1)} | {(cut, num_layers) for cut in range(num_layers)}
    names = available_engines() if engines is None else list(engines)
    tables = {}
    for part in sorted(parts):
        runs = _usable(chain.stage(*part, vector), live[part[0]], names)
        tables[part] = dict.fromkeys(names, math.inf) | _time_rested(runs, live[part[0]])
    device = {name: [0.0, *(tables[0, cut][name] for cut in range(1, num_layers + 1))] for name in names}
    server = {name: [0.0, *(tables[cut, num_layers][name] for cut in reversed(range(num_layers)))] for name in names}
    return {name: (_rising(device[name]), _rising(server[name])[::-1]) for name in names}


def _usable(stage: fx.GraphModule, inputs: Live, names: Iterable[str]) -> dict[str, Run]:
    """The stage with each engine that carries it out; the log says why others do not."""
    golden, runs = _Golden(stage, inputs), {}
    for name in names:
        try:
            runs[name] = _compile(stage, inputs, name, golden)
        except RunError as error:
            if name == FULL_ENGINE:
                raise
            logger.warning("%s; left out", error)
    return runs


def _rising(seconds: list[float]) -> list[float]:
    """Each at most what a longer part took; inf stays."""
    least = np.minimum.accumulate(seconds[::-1])[::-1]
    return [float(bound) if math.isfinite(own) else own for own, bound in zip(seconds, least, strict=True)]


@ENGINES.register(FULL_ENGINE)
def _fp32(stage: fx.GraphModule, inputs: Live) -> Run:
    """The kernels of the model itself, without Python between them."""
    return _traced(stage, inputs)


@ENGINES.register("bf16")
def _bf16(stage: fx.GraphModule, inputs: Live) -> Run:
    return _traced(_InBfloat16(stage), inputs)


@ENGINES.register("int8")
def _int8(stage: fx.GraphModule, inputs: Live) -> Run:
    return _traced(quantize(stage, inputs), inputs)


@ENGINES.register("onnxruntime")
def _onnxruntime(stage: fx.GraphModule, inputs: Live) -> Run:
    from gossipfl.inference.execution.onnx import quantized_session  # an extra

    return quantized_session(stage, inputs)


class _InBfloat16(nn.Module):
    def __init__(self, stage: fx.GraphModule) -> None:
        super().__init__()
        self.stage = copy.deepcopy(stage).bfloat16()

    def forward(self, *live: Tensor) -> Live:
        return tuple(tensor.float() for tensor in self.stage(*(tensor.bfloat16() for tensor in live)))


def _traced(module: nn.Module, inputs: Live) -> Run:
    traced = torch.jit.trace(module.eval(), _first(inputs), check_trace=False)
    run: Run = torch.jit.freeze(traced)
    return run


def _missing(engine: str) -> str | None:
    """What has to be installed before the engine works."""
    if engine == "int8" and (kernels := missing_kernels()):
        return f"this build of torch lacks {', '.join(kernels)}"
    packages = [name for name in ("onnx", "onnxruntime") if engine == "onnxruntime" and not importlib.util.find_spec(name)]
    return f"{' and '.join(packages)} missing; pip install 'gossipfl[ort]'" if packages else None


def _not_there(engine: str, lacks: str) -> str:
    return f"engine {engine!r} is not there: {lacks}"


def _compile(stage: fx.GraphModule, inputs: Live, engine: str, golden: _Golden) -> Run:
    function = ENGINES.get(engine)
    if lacks := _missing(engine):
        raise ConfigError(_not_there(engine, lacks))
    try:
        with _TRACING, warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # torch announces that tracing and quantized tensors will have successors
            run = function(stage, inputs)
            found = run(*inputs)
    except Exception as error:  # whatever a compiler raises when it meets an operation that it does not know
        reason = str(error).partition("\n")[0]
        raise RunError(f"engine {engine!r} cannot carry out the stage: {type(error).__name__}: {reason}") from error
    golden.check(engine, found)
    return run


class _Golden:
    """What a stage gives in f32 on calibration samples, and how far from that an engine's precision may lead."""

    def __init__(self, stage: fx.GraphModule, inputs: Live) -> None:
        self._stage, self._inputs = stage, inputs
        with torch.inference_mode():
            self._expected: Live = stage(*inputs)
        self._explained = cache(self._measure)

    def check(self, engine: str, found: Live) -> None:
        """RunError where the difference has another reason than precision."""
        differs = self._difference(found)
        allowed = ROUNDING + EXPLAINED * self._explained(PRECISIONS.get(engine, EIGHT_BITS))
        if not differs <= allowed:
            raise RunError(
                f"engine {engine!r} computes something else than fp32 on this machine (relative difference {differs:.2g}, "
                f"its precision explains {allowed:.2g}): its kernels saturate or are wrong"
            )

    def _measure(self, precision: Precision) -> float:
        with torch.inference_mode():
            return self._difference(_Rounded(self._stage, precision).run(*self._inputs))

    def _difference(self, found: Live) -> float:
        """The greatest of the live tensors, each relative to its norm; nan where one is not finite."""
        pairs = zip(found, self._expected, strict=True)
        differences = [float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)) for ours, theirs in pairs]
        return max(differences, key=lambda difference: math.inf if math.isnan(difference) else difference)


Rounding = Callable[[Tensor], Tensor]
"""Of the rows of a matrix, each on its own."""


class Precision(NamedTuple):
    """What an engine makes of a layer's weights, by channel, and of the values that it takes and gives."""

    weights: Rounding
    values: Rounding


def _rounded_to_codes(rows: Tensor, largest: int = 255) -> Tensor:
    """To `largest` even steps between a row's extremes, zero among their ends."""
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    step = ((high - low) / largest).clamp(min=1e-30)
    return (rows / step).round() * step


EIGHT_BITS = Precision(_rounded_to_codes, _rounded_to_codes)
PRECISIONS = {
    FULL_ENGINE: Precision(lambda rows: rows, lambda rows: rows),
    "bf16": Precision(lambda rows: rows.bfloat16().float(), lambda rows: rows.bfloat16().float()),
    "int8": Precision(_rounded_to_codes, partial(_rounded_to_codes, largest=LARGEST_CODE)),
    "onnxruntime": Precision(partial(_rounded_to_codes, largest=127), _rounded_to_codes),
}
"""Of engines with another than eight bits."""


class _Rounded(fx.Interpreter):
    """A stage in an engine's precision."""

    def __init__(self, stage: fx.GraphModule, precision: Precision) -> None:
        super().__init__(stage)
        self._precision = precision

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, nn.Conv2d | nn.Linear):
            return super().call_module(target, args, kwargs)
        layer = copy.copy(module)
        weight = self._precision.weights(module.weight.flatten(1)).view_as(module.weight)
        layer._parameters = module._parameters | {"weight": nn.Parameter(weight, requires_grad=False)}
        return self._tensor(layer(self._tensor(args[0])))

    def _tensor(self, tensor: Tensor) -> Tensor:
        return self._precision.values(tensor.reshape(1, -1)).view(tensor.shape)


def _few(inputs: Live) -> Live:
    if not inputs or not len(inputs[0]):
        raise ConfigError("an engine is checked and timed on calibration samples, and got none")
    return tuple(tensor[:MAX_SAMPLES] for tensor in inputs)


def _first(inputs: Live) -> Live:
    return tuple(tensor[:1].clone() for tensor in inputs)


def _time_by_turns(runs: Mapping[str, Run], inputs: Live) -> dict[str, float]:
    """Seconds of a call with one sample."""
    live, calls = _first(inputs), {}
    for name, run in runs.items():
        for _ in range(3):  # the first calls optimise
            run(*live)
        calls[name] = max(1, int(TURN_S / _seconds(run, live, 1)))
    best = dict.fromkeys(runs, math.inf)
    for _ in range(TURNS):
        for name, run in runs.items():
            best[name] = min(best[name], _seconds(run, live, calls[name]) / calls[name])
    return best


def _time_rested(runs: Mapping[str, Run], inputs: Live, within_s: float = math.inf) -> dict[str, float]:
    """Seconds of a call with one sample by who has had nothing to do, as a device that is asked now and then.

    After `within_s` no more turns begin; there is one at least.
    """
    live, ends = _first(inputs), time.perf_counter() + within_s
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):  # the first calls optimise
            run(*live)
    for turn in range(CALLS):
        if turn and time.perf_counter() > ends:
            break
        for name, run in runs.items():
            time.sleep(REST_S)
            began = time.perf_counter()
            run(*live)
            seconds[name].append(time.perf_counter() - began)
    return {name: undisturbed(times) for name, times in seconds.items()}


def undisturbed(seconds: Iterable[float]) -> float:
    """What is taken where other work on the machine, which only adds to it, does not count."""
    return float(np.quantile(list(seconds), UNDISTURBED))


def _seconds(run: Run, live: Live, calls: int) -> float:
    run(*live)  # caches are the previous candidate's
    began = time.perf_counter()
    for _ in range(calls):
        run(*live)
    return time.perf_counter() - began
