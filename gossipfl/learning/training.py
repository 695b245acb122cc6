"""Local training: one reusable model whose parameters are views of one flat vector, trained for one peer after another.

    engine = Engine(model, TrainingConfig(), dataset)
    learner = Learner("p0", indices)
    vector = engine.initial_vector()
    result = engine.train(learner, vector, round=1)     # result.vector: f32[P], fresh
    engine.evaluate(result.vector)                      # accuracy on the common test set

Any number of peers of one process share the model; what is a peer's own (its shard, its optimizer state, its local buffers) is
in its `Learner`. The order in which peers train does not change what they learn.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.adam import adam as adam_step
from torch.optim.sgd import sgd as sgd_step

from gossipfl.errors import ConfigError, LayoutError
from gossipfl.learning.datasets import Dataset, normalise
from gossipfl.learning.draws import own_draws
from gossipfl.learning.flatten import layout_of, travelling_tensors
from gossipfl.randomness import derived_seed, generator
from gossipfl.registry import Registry
from gossipfl.segments.buffers import VectorPool
from gossipfl.segments.quantization import tensor

TrainingStep = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""`f(model, x, y) -> loss`, a scalar to be differentiated."""

STEPS: Registry[TrainingStep] = Registry("training step")
"""Named training steps; mostly used for a user's own `package.module:function`."""

EVALUATION_BATCH = 128
"""Test samples at a time: the activations of a convolutional network take 0.2 MiB for each."""
IGNORED = -100
"""The label that `F.cross_entropy` leaves out of its mean."""
MIN_GAIN = 1.05
"""Fast math is used where it is at least this many times faster: below that the difference is noise."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a peer trains between two merges. Of `local_epochs` and `local_steps` one is given."""

    local_epochs: int | None = 1
    local_steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: str = "sgd"
    reset_optimizer: bool = False
    buffers: Literal["average", "local"] = "average"
    device: str = "cpu"
    fast_math: bool = False
    threads: int = 1
    step: str | None = None
    engine: str = "auto"
    seed: int = 0

    def num_steps(self, num_samples: int) -> int:
        """Local steps of a round for a peer with so many training samples."""
        per_epoch = -(-num_samples // min(self.batch_size, num_samples))
        return self.local_steps or per_epoch * (self.local_epochs or 1)


@dataclass
class Learner:
    """What one peer keeps between rounds. `indices` (i64[n]) is its shard of the training set."""

    name: str
    indices: np.ndarray
    optimizer_state: OptimizerState = field(default_factory=dict)
    local_buffers: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The trained vector (f32[P], fresh), the mean loss over the round's steps, and how long it took."""

    vector: np.ndarray
    loss: float
    num_steps: int
    seconds: float


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The default training step; logits [..., classes] against labels [...]."""
    logits = model(x)
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


OptimizerState = dict[str, list[torch.Tensor]]
"""By name of the quantity, a tensor for each parameter; empty at first."""
Update = Callable[[TrainingConfig, list[torch.Tensor], list[torch.Tensor], OptimizerState], None]
"""`f(config, parameters_, gradients, state_)`: one step of an optimizer."""

OPTIMIZERS: Registry[Update] = Registry("optimizer")

# torch's own optimizers, in their functional form: the first torch.optim object of a process imports torch._dynamo, which
# takes 0.8 s and 74 MiB.


@OPTIMIZERS.register("sgd")
def sgd(config: TrainingConfig, parameters: list[torch.Tensor], gradients: list[torch.Tensor], state: OptimizerState) -> None:
    momenta: list[torch.Tensor | None] = list(state.get("momentum", [None] * len(parameters)))
    sgd_step(
        parameters,
        gradients,
        momenta,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        lr=config.learning_rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        foreach=False,
    )
    if config.momentum:
        state["momentum"] = cast(list[torch.Tensor], momenta)


@OPTIMIZERS.register("adam")
def adam(config: TrainingConfig, parameters: list[torch.Tensor], gradients: list[torch.Tensor], state: OptimizerState) -> None:
    _adam(config, parameters, gradients, state, decoupled=False)


@OPTIMIZERS.register("adamw")
def adamw(config: TrainingConfig, parameters: list[torch.Tensor], gradients: list[torch.Tensor], state: OptimizerState) -> None:
    _adam(config, parameters, gradients, state, decoupled=True)


def _adam(
    config: TrainingConfig,
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    state: OptimizerState,
    decoupled: bool,
) -> None:
    if not state:
        state["mean"] = [torch.zeros_like(values) for values in parameters]
        state["square"] = [torch.zeros_like(values) for values in parameters]
        state["step"] = [torch.tensor(0.0) for _ in parameters]
    adam_step(
        parameters,
        gradients,
        state["mean"],
        state["square"],
        [],
        state["step"],
        foreach=False,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        eps=1e-8,
        maximize=False,
        decoupled_weight_decay=decoupled,
    )


class FlatModel:
    """A model whose float parameters and buffers are views of one flat tensor, `[parameters | buffers]`.

    `layout` is what travels: the parameters, and with `buffers = "average"` the float buffers too (BatchNorm statistics);
    integer buffers stay with the model.
    """

    def __init__(self, model: nn.Module, buffers: str = "average", device: str = "cpu") -> None:
        self.model = model.to(device)
        parameters = list(model.named_parameters())
        tensors = travelling_tensors(model)
        for name, values in tensors:
            if values.dtype != torch.float32:
                raise LayoutError(f"{name} is {values.dtype}; the engine trains float32 models")
        self.has_statistics = len(tensors) > len(parameters)
        self.layout = layout_of(model, buffers)
        everything = layout_of(model)
        self.flat = torch.empty(everything.size, device=device)
        self.pool = VectorPool(self.layout.size)
        self.trained: list[torch.Tensor] = [values for _, values in parameters if values.requires_grad]
        for entry, (_, values) in zip(everything.entries, tensors, strict=True):
            view = self.flat[entry.start : entry.stop].view(entry.shape)
            view.copy_(values.detach())
            values.data = view
        travelling = {entry.name for entry in self.layout.entries}
        self.local_buffers = [values for name, values in model.named_buffers() if name not in travelling]

    def read(self, out: np.ndarray | None = None) -> np.ndarray:
        """What travels, as f32[P] in main memory: `out`, or fresh."""
        vector = self.pool.take() if out is None else out
        torch.from_numpy(vector).copy_(self.flat[: self.layout.size])
        return vector

    def write(self, vector: np.ndarray) -> None:
        """Load `vector` (f32[P]) into the model. LayoutError if it does not fit."""
        if vector.shape != (self.layout.size,):
            raise LayoutError(f"a vector of shape {vector.shape} does not fit the model's {self.layout.size} values")
        self.flat[: self.layout.size] = tensor(vector)


class Engine:
    """The loop engine: trains peers one after another in one model."""

    def __init__(self, model: nn.Module, config: TrainingConfig, dataset: Dataset, step: TrainingStep | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
        _prepare_device(config.device)
        torch.set_num_threads(config.threads)
        self.config, self.dataset = config, dataset
        self.flat = FlatModel(model, config.buffers, config.device)
        self.layout = self.flat.layout
        self._model = self.flat.model
        self.step = step or (STEPS.get(config.step) if config.step else cross_entropy)
        self.update = OPTIMIZERS.get(config.optimizer)
        self.initial_buffers = [values.clone() for values in self.flat.local_buffers]
        self.uses_fast_math = False
        # torch.manual_seed takes 0.1 ms, nearly all of it for devices that are not there
        self._seed_draws = torch.default_generator.manual_seed if kind_of(config.device) == "cpu" else torch.manual_seed

    def initial_vector(self) -> np.ndarray:
        return self.flat.read()

    def description(self) -> dict[str, Any]:
        """What a result depends on besides the seed, for the record."""
        device = self.config.device
        return {
            "kind": "loop",
            "device": device,
            **({"accelerator": torch.cuda.get_device_name(device)} if kind_of(device) == "cuda" else {}),
            "threads": self.config.threads,
            "fast_math": self.uses_fast_math,
            "memory_layout": "channels_last" if self.uses_fast_math else "contiguous",
            "torch": torch.__version__,
        }

    def train(
        self, learner: Learner, vector: np.ndarray, round: int, times: int = 1, out: np.ndarray | None = None
    ) -> TrainResult:
        """Train from `vector` (f32[P], left alone) on the learner's shard, for one round.

        `times` multiplies `local_steps`: one central model takes as many steps as all peers together. The trained vector is
        written into `out` (f32[P], may be `vector`) where that is given.
        """
        began = time.perf_counter()
        self.flat.write(vector)
        self._load_buffers(learner)
        if self.config.reset_optimizer:
            learner.optimizer_state.clear()
        self._model.train()
        with own_draws():
            self._seed_draws(derived_seed(self.config.seed, "training", learner.name, round))
            losses = [self._train_step(x, y, learner.optimizer_state) for x, y in self._batches(learner, round, times)]
        learner.local_buffers = [values.clone() for values in self.flat.local_buffers]
        loss = float(torch.stack(losses).mean())
        return TrainResult(self.flat.read(out), loss, len(losses), time.perf_counter() - began)

    def evaluate(self, vector: np.ndarray, learner: Learner | None = None) -> float:
        """Accuracy of `vector` (f32[P]) on the test set, with the learner's local buffers (None: those of a new model)."""
        self.flat.write(vector)
        self._load_buffers(learner)
        self._model.eval()
        correct = total = 0
        with torch.no_grad():
            for start in range(0, len(self.dataset.y_test), EVALUATION_BATCH):
                chosen = slice(start, start + EVALUATION_BATCH)
                x, y = self.tensors(self.dataset.x_test[chosen], self.dataset.y_test[chosen])
                correct += int((self._model(x).argmax(-1) == y).sum())
                total += y.numel()
        return correct / total

    def try_batch(self) -> None:
        """Evaluate and train once on the first samples. ConfigError with what the model or the step raises.

        Afterwards the model has other values: this is for a copy of it.
        """
        chosen = slice(self.config.batch_size)
        x, y = self.tensors(self.dataset.x_train[chosen], self.dataset.y_train[chosen])
        model, batch = f"model {type(self._model).__name__}", f"a batch of {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        self._model.eval()
        remedy = "give one that maps samples of this shape to logits"
        with _raises_as_config_error(f"{model} does not take {batch}", remedy), torch.no_grad():
            logits = list(self._model(x).shape)
        if logits[:-1] != list(y.shape) or logits[-1] < self.dataset.num_classes:
            wanted = [*y.shape, self.dataset.num_classes]
            raise ConfigError(f"{model} makes {logits} of {batch}; give one that makes logits {wanted}")
        self._model.train()
        if self.step is cross_entropy:
            what, remedy = f"{model} cannot be trained on {batch}", "give one that can"
        else:
            name = getattr(self.step, "__name__", type(self.step).__name__)
            what, remedy = f"step {name!r} fails on {batch}", "it is called as step(model, x, y) and returns the loss, a scalar"
        with _raises_as_config_error(what, remedy), own_draws():
            self._train_step(x, y, {})

    def try_fast_math(self, num_pairs: int = 8) -> bool:
        """Switch fast math on if it wins here: channels_last images and reduced-precision float32 products.

        Times training steps with and without it in turn, so that a busy machine slows both, and leaves the model as it was.
        """
        before = self.flat.flat.clone()
        batch = self.dataset.x_train[: self.config.batch_size], self.dataset.y_train[: self.config.batch_size]
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(num_pairs):
            for fast in times:
                self.set_fast_math(fast)
                began = time.perf_counter()
                with own_draws():
                    float(self._train_step(*self.tensors(*batch), {}))  # waits for an accelerator
                times[fast].append(time.perf_counter() - began)
        self.flat.flat.copy_(before)
        plain_s, fast_s = (statistics.median(times[fast][1:]) for fast in (False, True))
        self.set_fast_math(plain_s > MIN_GAIN * fast_s)
        return self.uses_fast_math

    def set_fast_math(self, use: bool) -> None:
        self.uses_fast_math = use
        torch.set_float32_matmul_precision("medium" if use else "highest")
        if kind_of(self.config.device) == "cuda":
            torch.backends.cudnn.allow_tf32 = use

    def _load_buffers(self, learner: Learner | None) -> None:
        values = (learner.local_buffers if learner else []) or self.initial_buffers
        for buffer, value in zip(self.flat.local_buffers, values, strict=True):
            buffer.copy_(value)

    def _train_step(self, x: torch.Tensor, y: torch.Tensor, state: OptimizerState) -> torch.Tensor:
        for values in self.flat.trained:
            values.grad = None  # backward then stores gradients instead of adding to them
        loss = self.step(self._model, x, y)
        loss.backward()
        gradients = [torch.zeros_like(values) if values.grad is None else values.grad for values in self.flat.trained]
        with torch.no_grad():
            self.update(self.config, self.flat.trained, gradients, state)
        return loss.detach()

    def _batches(self, learner: Learner, round: int, times: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for chosen in self.batch_indices(learner, round, times):
            yield self.tensors(self.dataset.x_train[chosen], self.dataset.y_train[chosen])

    def batch_indices(self, learner: Learner, round: int, times: int = 1) -> Iterator[np.ndarray]:
        """The training samples (i64[batch]) of each local step of a round."""
        rng = generator(self.config.seed, "batches", learner.name, round)
        size = min(self.config.batch_size, len(learner.indices))
        per_epoch = -(-len(learner.indices) // size)
        num_steps = self.config.num_steps(len(learner.indices)) * (times if self.config.local_steps else 1)
        for step in range(num_steps):
            if step % per_epoch == 0:
                order = learner.indices[rng.permutation(len(learner.indices))]
            start = step % per_epoch * size
            yield order[start : start + size]

    def tensors(self, x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples and labels as the model takes them, on its device."""
        inputs = torch.from_numpy(np.array(normalise(x, self.dataset))).to(self.config.device)
        if self.uses_fast_math and inputs.ndim == 4:
            inputs = inputs.to(memory_format=torch.channels_last)  # contiguous() leaves one-channel images as they are
        return inputs, torch.from_numpy(np.array(y)).to(self.config.device)


@contextlib.contextmanager
def _raises_as_config_error(what: str, remedy: str) -> Iterator[None]:
    """Around code of the user's, which may raise anything."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"{what} ({reason}); {remedy}") from error


def kind_of(device: str) -> str:
    """cuda of cuda:1."""
    return device.partition(":")[0]


def _prepare_device(device: str) -> None:
    """ConfigError if it is not to be had. CUDA is told to come to the same values each time, which costs it some speed.

    What it has no such kernel for, torch warns of when it is used.
    """
    if kind_of(device) == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"training.device = {device!r} is not to be had here ({reason}); use 'cpu'") from error
    if kind_of(device) == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.allow_tf32 = False
