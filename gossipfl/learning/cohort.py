"""Local training of many peers at once, for the simulator: a thousand peers in one process.

    cohort = choose_cohort(Engine(model, TrainingConfig(), dataset))
    losses = cohort.train([CohortTask(learner, 1, vector) for learner in learners], out)     # out: f32[n, P], filled
    cohort.evaluate(out, [None] * len(out))                                                  # n accuracies

`LoopCohort` trains one peer after another, bit for bit as `Engine.train`. `StackedCohort` trains a block of peers as one: their
parameters are stacked, [n, ...], and `torch.func.vmap` carries a step through for all of them. It draws the same batches and
computes the same sums in another order, so that its vectors agree with the loop's to rounding. For small models, where a step
is mostly overhead, the stack is many times faster; convolutions of large models are better off in the loop.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap

from gossipfl.errors import ConfigError, LayoutError
from gossipfl.learning.datasets.dataset import normalise
from gossipfl.learning.dense import DenseGradients, Stacked
from gossipfl.learning.training import (
    EVALUATION_BATCH,
    IGNORED,
    MIN_GAIN,
    Engine,
    Learner,
    OptimizerState,
    TrainingStep,
    cross_entropy,
    kind_of,
)
from gossipfl.segments.layout import Layout

BLOCK_BYTES = {"cpu": 5 << 20, "cuda": 256 << 20}
"""Parameters of a block. On a CPU they stay in a third-level cache with their gradients: 128 peers of 9,610 parameters."""
MAX_BLOCK = {"cpu": 128, "cuda": 4096}
"""Peers of a block, however small their model: beyond this, a step's overhead hardly shows."""
WAYS = (True, True), (True, False), (False, False)
"""To train a stack with the cross entropy, the fastest first: whether short batches are padded, and whether gradients are in
closed form. Samples of a batch may meet, as in BatchNorm, and a user's hook may do anything, so each is tried."""
MAX_DIFFERENCE = 0.01
"""By how much of the greatest change the stack may differ from the loop, which rounding explains: fast math rounds to 2**-8."""


@dataclass(frozen=True, slots=True)
class CohortTask:
    """One round of one peer, from `vector` (f32[P], left alone unless it is also where the result goes)."""

    learner: Learner
    round: int
    vector: np.ndarray


class CohortEngine(Protocol):
    layout: Layout

    def initial_vector(self) -> np.ndarray: ...

    def train(self, tasks: Sequence[CohortTask], out: np.ndarray | Sequence[np.ndarray]) -> list[float]:
        """Carry out the tasks, each of another learner; the k-th trained vector goes into `out[k]` (f32[P], may be the memory
        of its own start). Returns their mean losses."""

    def evaluate(self, vectors: Sequence[np.ndarray], learners: Sequence[Learner | None]) -> list[float]:
        """Accuracies of `vectors` (f32[P] each) on the test set, with the learners' local buffers (None: a new model's)."""

    def description(self) -> dict[str, Any]:
        """What a result depends on besides the seed, for the record."""


def choose_cohort(engine: Engine, kind: str = "auto", num_peers: int = 1000) -> CohortEngine:
    """The `kind` of cohort around `engine`: "loop", "stacked", or with "auto" the one that is faster for `num_peers` at once,
    which is measured on two local steps. ConfigError where "stacked" is asked for and cannot be."""
    match kind:
        case "loop":
            return LoopCohort(engine)
        case "stacked":
            return StackedCohort(engine)
        case "auto":
            return _faster_cohort(engine, num_peers)
    raise ConfigError(f"there is no cohort engine {kind!r}; use 'auto', 'loop' or 'stacked'")


def _faster_cohort(engine: Engine, num_peers: int) -> CohortEngine:
    if _block(engine) == 1:
        return LoopCohort(engine, f"one model of {engine.layout.num_bytes} bytes fills a block")
    try:
        stacked = StackedCohort(engine)
    except ConfigError as error:
        return LoopCohort(engine, str(error))
    num_stacked = min(num_peers, stacked.block * engine.config.threads)
    gain = _peer_s(LoopCohort(engine), min(num_peers, 4)) / _peer_s(stacked, num_stacked)
    if gain > MIN_GAIN:
        return stacked
    return LoopCohort(engine, f"a stack of peers trains {gain:.2f} times as fast")


def _peer_s(cohort: LoopCohort | StackedCohort, num_peers: int) -> float:
    """The time a peer takes for a round, in seconds: the best of three, as the first one also warms up."""
    shard = np.arange(min(cohort.engine.config.batch_size, len(cohort.engine.dataset.y_train)))
    times: list[float] = []
    _try_rounds(cohort, [shard] * num_peers, 3, times)
    return min(times) / num_peers


class LoopCohort:
    """One peer after another. `reason` is why it was chosen, for the record."""

    def __init__(self, engine: Engine, reason: str | None = None) -> None:
        self.engine, self.layout, self.reason = engine, engine.layout, reason

    def initial_vector(self) -> np.ndarray:
        return self.engine.initial_vector()

    def train(self, tasks: Sequence[CohortTask], out: np.ndarray | Sequence[np.ndarray]) -> list[float]:
        return [
            self.engine.train(task.learner, task.vector, task.round, out=trained).loss
            for task, trained in zip(tasks, out, strict=True)
        ]

    def evaluate(self, vectors: Sequence[np.ndarray], learners: Sequence[Learner | None]) -> list[float]:
        return [self.engine.evaluate(vector, learner) for vector, learner in zip(vectors, learners, strict=True)]

    def description(self) -> dict[str, Any]:
        return self.engine.description() | ({"reason": self.reason} if self.reason else {})


class StackedCohort:
    """A block of peers at a time, as one model with a leading axis.

    ConfigError for what cannot be stacked: an optimizer other than SGD, dropout, and whatever else does not come to what the
    loop comes to, which is tried when the cohort is made.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.config.optimizer != "sgd":
            raise ConfigError(f"training.optimizer = {engine.config.optimizer!r} cannot be stacked; use 'sgd', or the loop")
        self.engine, self.layout = engine, engine.layout
        self.block = _block(engine)
        # Blocks on threads of their own: torch's threads wait for each other after each operation, and on a machine that has
        # other work to do two of them were up to ten times slower than one.
        self._num_threads = engine.config.threads if kind_of(engine.config.device) == "cpu" else 1
        self._threads = ThreadPoolExecutor(self._num_threads, initializer=torch.set_num_threads, initargs=(1,))
        reason = None
        for pads, is_closed in WAYS if engine.step is cross_entropy else WAYS[-1:]:
            self._stacks = [_Stack(engine, self.block, pads, is_closed) for _ in range(self._num_threads)]
            reason = self._difference()
            if reason is None:
                return
        name = type(engine.flat.model).__name__
        raise ConfigError(f"the training of {name} cannot be stacked ({reason}); use the loop")

    def initial_vector(self) -> np.ndarray:
        return self.engine.initial_vector()

    def description(self) -> dict[str, Any]:
        return self.engine.description() | {"kind": "stacked", "memory_layout": "contiguous", "peers_per_block": self.block}

    def train(self, tasks: Sequence[CohortTask], out: np.ndarray | Sequence[np.ndarray]) -> list[float]:
        # Who has the most steps comes first: those who are still training are then always the front of a block.
        order = sorted(range(len(tasks)), key=lambda k: -len(tasks[k].learner.indices))
        losses = self._each_block(
            lambda stack, run: stack.train([tasks[k] for k in order[run]], [out[k] for k in order[run]]), len(tasks)
        )
        return [loss for _, loss in sorted(zip(order, losses, strict=True))]

    def evaluate(self, vectors: Sequence[np.ndarray], learners: Sequence[Learner | None]) -> list[float]:
        return self._each_block(lambda stack, run: stack.evaluate(vectors[run], learners[run]), len(vectors))

    def _each_block(self, function: Callable[[_Stack, slice], list[float]], num_peers: int) -> list[float]:
        """The results of `function` for all blocks, in their order."""
        size = min(self.block, -(-num_peers // self._num_threads)) or 1
        idle: SimpleQueue[_Stack] = SimpleQueue()
        for stack in self._stacks:
            idle.put(stack)

        def carry_out(start: int) -> list[float]:
            stack = idle.get()
            try:
                return function(stack, slice(start, start + size))
            finally:
                idle.put(stack)

        starts = range(0, num_peers, size)
        results = map(carry_out, starts) if self._num_threads == 1 else self._threads.map(carry_out, starts)
        return [value for result in results for value in result]

    def _difference(self) -> str | None:
        """Why two peers with ragged shards do not learn here what they learn in the loop; None if they do."""
        batch, num_samples = self.engine.config.batch_size, len(self.engine.dataset.y_train)
        shards = [np.arange(min(size, num_samples)) for size in (batch + 3, batch + 2)]
        expected = _try_rounds(LoopCohort(self.engine), shards, 2)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that vmap carries out one by one
                found = _try_rounds(self, shards, 2)
        except Exception as error:  # whatever a user's model or step raises when it meets vmap
            return str(error).partition("\n")[0]
        change = np.abs(expected[0] - self.initial_vector()).max()
        for loop, stack in zip(expected, found, strict=True):
            if not np.allclose(loop, stack, rtol=MAX_DIFFERENCE, atol=MAX_DIFFERENCE * change, equal_nan=True):
                return "it comes to other values than one peer after another"
        return None


class _Stack:
    """A block of peers in training: a copy of the model, which the peers' values pass through, and memory for their vectors."""

    def __init__(self, engine: Engine, block: int, pads: bool, is_closed: bool) -> None:
        self.engine, self.layout, self._pads = engine, engine.layout, pads
        # functional_call puts values into a model while it runs, so that threads need one each.
        self._model = model = copy.deepcopy(engine.flat.model)
        self._step = _Step(model, engine.step)
        trained = {name: values for name, values in model.named_parameters() if values.requires_grad}
        self._trained = list(trained)
        self._dense = DenseGradients.of(model) if is_closed else None
        self._matrices = [name for name, values in trained.items() if values.ndim == 2]
        travelling = {entry.name for entry in self.layout.entries}
        self._local = [name for name, _ in model.named_buffers() if name not in travelling]
        self._buffers = [name for name, _ in model.named_buffers() if name in travelling]
        # What a GPU copies from locked pages it need not copy twice.
        self._rows = torch.empty((block, self.layout.size), pin_memory=kind_of(engine.config.device) == "cuda")

    def train(self, tasks: Sequence[CohortTask], out: Sequence[np.ndarray]) -> list[float]:
        """As `CohortEngine.train`, for at most a block; the longest shards come first."""
        self._model.train()
        values = self._stack([task.vector for task in tasks], [task.learner for task in tasks])
        momenta = self._momenta([task.learner for task in tasks], values)
        batches = [list(self.engine.batch_indices(task.learner, task.round)) for task in tasks]
        losses = torch.zeros(len(tasks), device=self.engine.config.device)
        for step in range(len(batches[0])):
            for peers, x, y in self._runs([own[step] for own in batches if step < len(own)]):
                state = {"momentum": [stacked[peers] for stacked in momenta]} if momenta else {}
                losses[peers] += self._train_step({name: stacked[peers] for name, stacked in values.items()}, x, y, state)
        for stacked, own in zip(momenta, _by_parameter([task.learner for task in tasks]) if momenta else (), strict=True):
            torch._foreach_copy_(own, stacked.unbind())
        for k, task in enumerate(tasks):
            task.learner.local_buffers = [values[name][k].clone() for name in self._local]
        for vector, row in zip(out, self._unstack(values), strict=True):
            np.copyto(vector, row)
        return (losses.cpu().numpy() / [len(own) for own in batches]).tolist()

    def _train_step(self, values: Stacked, x: torch.Tensor, y: torch.Tensor, state: OptimizerState) -> torch.Tensor:
        """One local step of n peers, which moves `values` and `state` on. Returns their losses, f32[n]."""
        config, parameters = self.engine.config, [values[name] for name in self._trained]
        with torch.no_grad():
            if self._dense and not config.momentum:
                return self._dense.descend(values, x, y, config.learning_rate, config.weight_decay)
            losses, gradients = (self._dense or self._by_autograd)(values, x, y)
            self.engine.update(config, parameters, [gradients[name] for name in self._trained], state)
        return losses

    @torch.enable_grad()
    def _by_autograd(self, values: Stacked, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, Stacked]:
        """The losses of n peers, f32[n], and their gradients."""
        leaves = {name: values[name].detach().requires_grad_() for name in self._trained}
        losses = vmap(self._loss)(values | leaves, x, y)
        # Nobody's loss depends on another's parameters, so that the gradient of the sum is each one's own. torch.func.grad
        # would import torch._dynamo: 0.8 s.
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
        return losses.detach(), dict(zip(leaves, gradients, strict=True))

    def _loss(self, values: Stacked, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional_call(self._step, {f"model.{name}": value for name, value in values.items()}, (x, y))

    def _logits(self, values: Stacked, x: torch.Tensor) -> torch.Tensor:
        return functional_call(self._model, values, (x,))

    def evaluate(self, vectors: Sequence[np.ndarray], learners: Sequence[Learner | None]) -> list[float]:
        """As `CohortEngine.evaluate`, for at most a block."""
        self._model.eval()
        values, dataset = self._stack(vectors, learners), self.engine.dataset
        correct = torch.zeros(len(vectors), dtype=torch.int64, device=self.engine.config.device)
        with torch.no_grad():
            for start in range(0, len(dataset.y_test), EVALUATION_BATCH):
                chosen = slice(start, start + EVALUATION_BATCH)
                x, y = self.engine.tensors(dataset.x_test[chosen], dataset.y_test[chosen])
                logits = vmap(self._logits, in_dims=(0, None))(values, x)
                correct += (logits.argmax(-1) == y).flatten(1).sum(1)
        return [number / dataset.y_test.size for number in correct.tolist()]

    def _runs(self, batches: list[np.ndarray]) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """One step's batches of the peers at the front (i64[batch] each), as runs of peers with batches of one size:
        `(peers, x [n, batch, ...], y [n, batch, ...])`.

        For the cross entropy all are one run: shorter batches are padded with samples whose labels are ignored.
        """
        if self._pads:
            sizes = np.array([len(own) for own in batches])
            is_sample = np.arange(sizes.max()) < sizes[:, None]
            chosen = np.zeros(is_sample.shape, np.int64)
            chosen[is_sample] = np.concatenate(batches)
            x, y = self._samples(chosen)
            y[~is_sample] = IGNORED
            yield slice(0, len(batches)), self._tensor(x), self._tensor(y)
            return
        first = 0
        for _, run in groupby(batches, key=len):
            chosen = np.stack(list(run))
            x, y = self._samples(chosen)
            yield slice(first, first + len(chosen)), self._tensor(x), self._tensor(y)
            first += len(chosen)

    def _samples(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The training samples `chosen` (i64[n, batch]), fresh."""
        dataset = self.engine.dataset
        x = normalise(dataset.x_train[chosen.ravel()], dataset)
        return x.reshape(*chosen.shape, *x.shape[1:]), dataset.y_train[chosen]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.engine.config.device)

    def _stack(self, vectors: Sequence[np.ndarray], learners: Sequence[Learner | None]) -> Stacked:
        """The peers' values by name; parameters are views of `self._flat` (f32[n, P])."""
        rows = self._rows[: len(vectors)]
        for row, vector in zip(rows.numpy(), vectors, strict=True):
            if vector.shape != row.shape:
                raise LayoutError(f"a vector of shape {vector.shape} does not fit the model's {self.layout.size} values")
            row[:] = vector
        self._flat = rows.to(self.engine.config.device)
        values = self._views(len(vectors))
        for name in self._buffers:
            values[name] = values[name].clone()  # vmap loses what is written into buffers that are not contiguous
        for name in self._matrices:  # as products take them best, and as their gradients will lie in memory: a seventh faster
            values[name] = values[name].contiguous() if self._dense else values[name].mT.contiguous().mT
        own = [(learner.local_buffers if learner else []) or self.engine.initial_buffers for learner in learners]
        for name, *buffers in zip(self._local, *own, strict=True):
            values[name] = torch.stack(buffers)
        return values

    def _unstack(self, values: Stacked) -> np.ndarray:
        """The vectors of a stack, f32[n, P], good until the next one."""
        views = self._views(len(self._flat))
        for name in self._buffers + self._matrices:
            views[name].copy_(values[name])
        rows = self._rows[: len(self._flat)]
        if self._flat.device != rows.device:
            rows.copy_(self._flat)
        return rows.numpy()

    def _views(self, num_peers: int) -> Stacked:
        entries = self.layout.entries
        return {entry.name: self._flat[:, entry.start : entry.stop].view(num_peers, *entry.shape) for entry in entries}

    def _momenta(self, learners: list[Learner], values: Stacked) -> list[torch.Tensor]:
        """By trained parameter, `[n, *shape]`, from those of the learners; zeros for who has none yet."""
        config = self.engine.config
        if not config.momentum:
            return []
        for learner in learners:
            if config.reset_optimizer or not learner.optimizer_state:
                learner.optimizer_state["momentum"] = [torch.zeros_like(values[name][0]) for name in self._trained]
        momenta = [torch.empty_like(values[name]) for name in self._trained]
        for stacked, own in zip(momenta, _by_parameter(learners), strict=True):
            torch._foreach_copy_(stacked.unbind(), own)
        return momenta


def _by_parameter(learners: list[Learner]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The momenta of each parameter, of one learner after the other."""
    return zip(*(learner.optimizer_state["momentum"] for learner in learners), strict=True)


class _Step(nn.Module):
    """A training step as a module, so that `functional_call` can put a peer's values in the place of its model's."""

    def __init__(self, model: nn.Module, step: TrainingStep) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.step(self.model, x, y)


def _block(engine: Engine) -> int:
    """How many peers are trained at a time."""
    kind = "cpu" if kind_of(engine.config.device) == "cpu" else "cuda"
    return max(1, min(MAX_BLOCK[kind], BLOCK_BYTES[kind] // engine.layout.num_bytes))


def _try_rounds(
    cohort: LoopCohort | StackedCohort, shards: Sequence[np.ndarray], rounds: int, times: list[float] | None = None
) -> list[np.ndarray]:
    """What peers with these shards come to in rounds of two local steps: vectors (f32[n, P]), and local buffers.

    The engine stays as it was.
    """
    engine, learners = cohort.engine, [Learner(f"p{k}", shard) for k, shard in enumerate(shards)]
    config, values = engine.config, engine.flat.flat.clone()
    vectors = np.stack([cohort.initial_vector()] * len(shards))
    engine.config = replace(config, local_epochs=None, local_steps=2)
    try:
        for round_ in range(1, rounds + 1):
            tasks = [CohortTask(learner, round_, row) for learner, row in zip(learners, vectors, strict=True)]
            began = time.perf_counter()
            cohort.train(tasks, vectors)
            if times is not None:
                times.append(time.perf_counter() - began)
    finally:
        engine.config = config
        engine.flat.flat.copy_(values)
    return [vectors, *(buffer.cpu().numpy() for learner in learners for buffer in learner.local_buffers)]
