"""Many peers' local training at once: the stack learns what the loop learns, and the loop is the engine."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from gossipfl.errors import ConfigError, LayoutError
from gossipfl.learning import cohort as cohort_module
from gossipfl.learning.cohort import CohortTask, LoopCohort, StackedCohort, choose_cohort
from gossipfl.learning.datasets import Dataset
from gossipfl.learning.dense import DenseGradients
from gossipfl.learning.models import build_model
from gossipfl.learning.training import IGNORED, Engine, Learner, TrainingConfig

RAGGED = (8, 3, 12, 9, 16, 1, 4, 7, 9)
"""Samples of each peer: with batches of 4, shards that fill their batches, that do not, and that are smaller than one."""


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """Torch's settings and its random numbers as they were afterwards."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def features(num_train=40, num_test=21, shape=(5,)):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_train + num_test, *shape), dtype=np.float32)
    y = rng.integers(3, size=num_train + num_test)
    return Dataset(x[:num_train], y[:num_train], x[num_train:], y[num_train:], 3)


def images():
    rng = np.random.default_rng(0)
    x, y = rng.integers(256, size=(60, 1, 6, 6)).astype(np.uint8), rng.integers(3, size=60)
    return Dataset(x[:40], y[:40], x[40:], y[40:], 3, mean=(0.5,), std=(0.25,))


def tokens():
    x, y = np.random.default_rng(0).integers(7, size=(2, 60, 6))
    return Dataset(x[:40], y[:40], x[40:], y[40:], 7)


def perceptron():
    return build_model("mlp", (5,), 3, {"hidden": [6]}, 0)


def engine_of(model=None, dataset=None, step=None, **config):
    settings = dict(batch_size=4, learning_rate=0.1) | config
    return Engine(model or perceptron(), TrainingConfig(**settings), dataset or features(), step)


def learners_of(sizes=RAGGED, num_train=40):
    rng = np.random.default_rng(1)
    return [Learner(f"p{k}", rng.permutation(num_train)[:size]) for k, size in enumerate(sizes)]


def rounds(cohort, learners, starts, num_rounds=3):
    """The vectors after some rounds of each peer by itself, and the last round's losses."""
    vectors, losses = starts.copy(), []
    for round_ in range(1, num_rounds + 1):
        tasks = [CohortTask(learner, round_, row) for learner, row in zip(learners, vectors, strict=True)]
        losses = cohort.train(tasks, vectors)
    return vectors, losses


def starts_of(engine, num_peers):
    """Every peer from a place of its own."""
    noise = 0.1 * np.random.default_rng(2).standard_normal((num_peers, engine.layout.size), dtype=np.float32)
    return engine.initial_vector() + noise


def assert_agree(engine, sizes=RAGGED, num_rounds=3):
    """The stack and the loop come to the same vectors, losses, states and accuracies."""
    loop, stack = LoopCohort(engine), StackedCohort(engine)
    starts = starts_of(engine, len(sizes))
    ours, theirs = learners_of(sizes), learners_of(sizes)
    expected, expected_losses = rounds(loop, theirs, starts, num_rounds)
    found, losses = rounds(stack, ours, starts, num_rounds)
    # Sums in another order: parts in 2**-24 of values about 1, a few hundred of them one upon the other.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert np.abs(expected - starts).max() > 0.01
    for one, other in zip(ours, theirs, strict=True):
        assert one.optimizer_state.keys() == other.optimizer_state.keys()
        for name, state in one.optimizer_state.items():
            for a, b in zip(state, other.optimizer_state[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(one.local_buffers, other.local_buffers, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert stack.evaluate(expected, theirs) == loop.evaluate(expected, theirs)
    return stack


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_the_loop_is_the_engine_bit_for_bit():
    starts = starts_of(engine_of(), len(RAGGED))
    found, losses = rounds(LoopCohort(engine_of(momentum=0.9)), learners_of(), starts)
    engine = engine_of(momentum=0.9)
    for learner, row, vector, loss in zip(learners_of(), starts, found, losses, strict=True):
        for round_ in (1, 2, 3):
            result = engine.train(learner, row, round_)
            row = result.vector
        assert (row.tobytes(), result.loss) == (vector.tobytes(), loss)


def test_the_loop_evaluates_as_the_engine_does():
    engine, learners = engine_of(), learners_of()
    starts = starts_of(engine, len(RAGGED))
    expected = [engine.evaluate(row, learner) for row, learner in zip(starts, learners, strict=True)]
    assert LoopCohort(engine).evaluate(starts, learners) == expected and len(set(expected)) > 1


# --- the stack learns what the loop learns ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(local_epochs=3),
        dict(local_epochs=None, local_steps=5),
        dict(momentum=0.9),
        dict(momentum=0.9, reset_optimizer=True),
        dict(weight_decay=0.1),
        dict(momentum=0.5, weight_decay=0.1, local_epochs=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_the_stack_learns_what_the_loop_learns_from_ragged_shards(activation, config):
    """With gradients in closed form, and by autograd."""
    model = perceptron()
    model.relu1 = activation()
    assert (DenseGradients.of(model) is not None) == (activation is nn.ReLU)
    assert_agree(engine_of(model, **config))


RELU = nn.ReLU()


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Linear(5, 3)], (5,)),
        ([nn.Linear(5, 8), RELU, nn.Linear(8, 8), RELU, RELU, nn.Linear(8, 3)], (5,)),
        ([nn.Linear(5, 8, bias=False), nn.ReLU(inplace=True), nn.Linear(8, 3, bias=False), nn.ReLU()], (5,)),
        ([nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3)], (5,)),
        ([nn.Flatten(), nn.Linear(60, 3)], (3, 4, 5)),
        ([nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)], (4, 5)),
    ],
    ids=["regression", "deep", "without biases", "a ReLU first", "images", "sequences"],
)
def test_gradients_in_closed_form_are_those_of_autograd_and_a_step_goes_down_them(layers, shape):
    """Of three peers with 7, 2 and 1 samples, one of whose places in a sequence does not count."""
    model, rng = nn.Sequential(*layers), torch.Generator().manual_seed(0)
    values = {name: torch.randn((3, *like.shape), generator=rng) for name, like in model.named_parameters()}
    x = torch.randn((3, 7, *shape), generator=rng)
    y = torch.randint(3, (3, 7, *shape[:-1])[: 3 if len(shape) == 2 else 2], generator=rng)
    y[1, 2:] = y[2, 1:] = IGNORED
    closed = DenseGradients.of(model)
    for peers in (3, 2):  # memory is used again
        losses, gradients = closed({name: stacked[:peers] for name, stacked in values.items()}, x[:peers], y[:peers])
        for peer in range(peers):
            own = {name: stacked[peer].clone().requires_grad_() for name, stacked in values.items()}
            logits = functional_call(model, own, (x[peer].clone(),))
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), y[peer].flatten())
            torch.testing.assert_close(losses[peer], loss.detach())
            for name, expected in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
                torch.testing.assert_close(gradients[name][peer], expected)
        moved = {name: stacked[:peers].clone() for name, stacked in values.items()}
        assert torch.equal(closed.descend(moved, x[:peers], y[:peers], 0.1, 0.5), losses)
        for name, stacked in values.items():
            torch.testing.assert_close(moved[name], stacked[:peers] - 0.1 * (gradients[name] + 0.5 * stacked[:peers]))


def shared():
    linear = nn.Linear(5, 5)
    return nn.Sequential(linear, nn.ReLU(), linear)


def frozen():
    model = perceptron()
    model.fc1.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "model", [shared, frozen, lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout()), lambda: nn.Linear(5, 3)]
)
def test_other_networks_have_no_gradients_in_closed_form(model):
    assert DenseGradients.of(model()) is None


def test_a_hook_of_the_users_is_not_left_out():
    model = perceptron()
    model.fc1.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_agree(engine_of(model))


def own_step(model, x, y):
    """A user's own loss, with a look at the model's parameters and a mean over the batch that no padding may enter."""
    return (model(x) - nn.functional.one_hot(y, 3)).square().mean() + 0.01 * model.head.weight.square().sum()


def test_a_users_own_step_is_stacked_without_padding():
    assert_agree(engine_of(step=own_step, momentum=0.9, local_epochs=2))


class Normalised(nn.Module):
    """Batch statistics: no sample of a batch is alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("buffers", ["average", "local"])
def test_batch_statistics_are_each_peers_own(buffers):
    assert_agree(engine_of(Normalised(), buffers=buffers, local_epochs=2), sizes=(8, 4, 12, 10, 6, 7))


def test_a_frozen_parameter_stays_as_it_is():
    model = perceptron()
    model.fc1.requires_grad_(False)
    engine = engine_of(model, momentum=0.9, weight_decay=0.1)
    stack = assert_agree(engine)
    starts = starts_of(engine, 3)
    vectors, _ = rounds(stack, learners_of((8, 8, 8)), starts)
    for before, after in zip(starts, vectors, strict=True):
        tensors = engine.layout.tensors(after)
        same = {name: np.array_equal(values, tensors[name]) for name, values in engine.layout.tensors(before).items()}
        assert same == {"fc1.weight": True, "fc1.bias": True, "head.weight": False, "head.bias": False}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("model", "dataset"),
    [
        (lambda: build_model("cnn", (1, 6, 6), 3, {}, 0), images),
        (lambda: build_model("gpt", (6,), 7, {"width": 8, "heads": 2}, 0), tokens),
        (lambda: nn.Linear(5, 3), features),
    ],
    ids=["images", "tokens", "linear"],
)
def test_models_of_every_kind_of_sample_are_stacked(model, dataset):
    assert_agree(engine_of(model(), dataset(), learning_rate=0.02), sizes=(8, 3, 6))


def test_blocks_of_peers_learn_as_one_stack_does(monkeypatch):
    engine = engine_of(momentum=0.9)
    monkeypatch.setitem(cohort_module.MAX_BLOCK, "cpu", 2)
    assert assert_agree(engine).description()["peers_per_block"] == 2


@pytest.mark.parametrize("threads", [2, 3])
def test_blocks_on_several_threads_learn_as_on_one(threads, monkeypatch):
    monkeypatch.setitem(cohort_module.MAX_BLOCK, "cpu", 2)

    def vectors(threads):
        engine = engine_of(threads=threads, momentum=0.9)
        return rounds(StackedCohort(engine), learners_of(), starts_of(engine, len(RAGGED)))

    (one, one_losses), (several, losses) = vectors(1), vectors(threads)
    assert (several.tobytes(), losses) == (one.tobytes(), one_losses)
    assert torch.get_num_threads() == threads


def test_the_stack_draws_the_batches_of_the_engine():
    """A step whose gradient is the sum of the samples it saw."""
    seen = lambda model, x, y: (model.weight[0] * x.sum(0)).sum() + 0 * model.bias.sum()  # noqa: E731
    engine = engine_of(nn.Linear(5, 3), step=seen, learning_rate=1.0, local_epochs=None, local_steps=1)
    (learner,), start = learners_of((11,)), engine.initial_vector()
    vectors, _ = rounds(StackedCohort(engine), [learner], start[None], num_rounds=1)
    (chosen,) = engine.batch_indices(learner, 1)
    np.testing.assert_allclose((start - vectors[0])[:5], engine.dataset.x_train[chosen].sum(0), rtol=1e-4, atol=1e-5)


def test_a_start_is_left_alone_and_results_go_where_they_are_wanted():
    engine, learners = engine_of(), learners_of()
    stack = StackedCohort(engine)
    starts = starts_of(engine, len(learners))
    before = starts.tobytes()
    starts.flags.writeable = False  # as published vectors are
    apart = [np.zeros(engine.layout.size, np.float32) for _ in learners]
    stack.train([CohortTask(learner, 1, row) for learner, row in zip(learners, starts, strict=True)], apart)
    assert starts.tobytes() == before
    in_place, _ = rounds(stack, learners_of(), starts, num_rounds=1)
    assert np.stack(apart).tobytes() == in_place.tobytes() != before


def test_the_state_that_a_peer_keeps_is_its_own():
    """It holds no memory of a block, which would stay as long as any of its peers."""
    engine, learners = engine_of(momentum=0.9), learners_of()
    rounds(StackedCohort(engine), learners, starts_of(engine, len(learners)), num_rounds=1)
    for learner in learners:
        for values in learner.optimizer_state["momentum"]:
            assert values.untyped_storage().nbytes() == 4 * values.numel()


def test_a_cohort_of_nobody_learns_nothing():
    stack = StackedCohort(engine_of())
    assert (stack.train([], []), stack.evaluate([], [])) == ([], [])


def test_a_vector_that_does_not_fit_is_neither_trained_nor_evaluated():
    stack = StackedCohort(engine_of())
    for wrong in (np.zeros(1, np.float32), np.zeros(stack.layout.size + 1, np.float32)):
        with pytest.raises(LayoutError, match=f"does not fit the model's {stack.layout.size} values"):
            stack.train([CohortTask(Learner("p0", np.arange(8)), 1, wrong)], [wrong])
        with pytest.raises(LayoutError, match="does not fit"):
            stack.evaluate([wrong], [None])


# --- what is chosen ---------------------------------------------------------------------------------------------------


def careless_step(model, x, y):
    return model(x).square().mean() * float(model.head.weight.detach().sum() > -1e9)


@pytest.mark.parametrize(
    ("model", "step", "config", "reason"),
    [
        (perceptron, None, dict(optimizer="adam"), r"training\.optimizer = 'adam' cannot be stacked; use 'sgd'"),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout()), None, {}, "random"),
        (perceptron, careless_step, {}, r"cannot be stacked \(.*\); use the loop"),
    ],
    ids=["adam", "dropout", "item"],
)
def test_what_cannot_be_stacked_is_trained_in_the_loop_and_the_record_says_why(model, step, config, reason):
    engine = engine_of(model(), step=step, **config)
    with pytest.raises(ConfigError, match=reason) as error:
        choose_cohort(engine, "stacked")
    description = choose_cohort(engine).description()
    assert (description["kind"], description["reason"]) == ("loop", str(error.value))


class Rotating(nn.Module):
    """Keeps count in a plain attribute, which the peers of a stack would share."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(5, 3), 0

    def forward(self, x):
        self.calls += self.training
        return self.linear(x) * (1 + self.calls % 3)


def test_a_model_that_learns_otherwise_in_a_stack_is_found_out():
    with pytest.raises(ConfigError, match="it comes to other values than one peer after another"):
        StackedCohort(engine_of(Rotating()))


def test_a_kind_of_cohort_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="no cohort engine 'stack'; use 'auto', 'loop' or 'stacked'"):
        choose_cohort(engine_of(), "stack")


@pytest.mark.parametrize(("loop_s", "kind"), [(2.0, "stacked"), (1.0, "loop")])
def test_the_faster_one_is_chosen(loop_s, kind, monkeypatch):
    monkeypatch.setattr(cohort_module, "_peer_s", lambda cohort, _: loop_s if isinstance(cohort, LoopCohort) else 1.0)
    assert choose_cohort(engine_of()).description()["kind"] == kind


def test_a_model_that_fills_a_block_is_trained_in_the_loop_without_trying():
    engine = engine_of(nn.Linear(5, 300_000))
    assert "fills a block" in choose_cohort(engine).description()["reason"]


@pytest.mark.parametrize("kind", ["auto", "stacked", "loop"])
def test_choosing_leaves_the_initial_model_as_it_was(kind):
    engine = engine_of()
    before = engine.initial_vector().tobytes()
    assert choose_cohort(engine, kind).initial_vector().tobytes() == before == engine.initial_vector().tobytes()


def test_a_stack_costs_no_import_of_torchs_compiler():
    """torch._dynamo takes 0.8 s, and torch.func.grad would import it."""
    program = """
import sys, numpy as np
from gossipfl.learning import cohort, datasets, models, training
x, y = np.zeros((8, 5), np.float32), np.arange(8) % 3
engine = training.Engine(models.build_model("mlp", (5,), 3), training.TrainingConfig(), datasets.Dataset(x, y, x, y, 3))
stack = cohort.StackedCohort(engine)
stack.evaluate([engine.initial_vector()], [None])
print("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
