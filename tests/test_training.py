"""Local training, the model as one flat vector, and the model file."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import nn
from torch.nn import functional as F

import gossipfl
from gossipfl._version import __version__
from gossipfl.errors import ConfigError, DataError, LayoutError
from gossipfl.learning.checkpoint import load_model, model_bytes, save_model, write_atomically
from gossipfl.learning.datasets import Dataset
from gossipfl.learning.flatten import flatten, layout_of, unflatten_
from gossipfl.learning.models import MODELS, build_model
from gossipfl.learning.training import OPTIMIZERS, Engine, Learner, TrainingConfig, cross_entropy
from gossipfl.segments.layout import Layout

# name: input shape, classes, arguments; the smallest that each takes
ALL_MODELS = {
    "mlp": ((1, 4, 4), 3, {"hidden": [5]}),
    "cnn": ((1, 4, 4), 3, {}),
    "lenet5": ((1, 28, 28), 3, {}),
    "resnet20": ((3, 8, 8), 3, {}),
    "gpt": ((6,), 7, {"width": 8, "heads": 2}),
}
RNG = np.random.default_rng


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """The same first values for every model, and torch's settings as they were afterwards."""
    threads, precision, state = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_rng_state(state)


def model_of(name, seed=0):
    shape, num_classes, args = ALL_MODELS[name]
    return build_model(name, shape, num_classes, args, seed)


def dataset_for(name, num_train=24, num_test=10):
    shape, num_classes, _ = ALL_MODELS[name]
    rng, num = RNG(0), num_train + num_test
    if name == "gpt":
        x, y = rng.integers(num_classes, size=(2, num, *shape))
    else:
        x, y = rng.standard_normal((num, *shape), dtype=np.float32), rng.integers(num_classes, size=num)
    return Dataset(x[:num_train], y[:num_train], x[num_train:], y[num_train:], num_classes)


def vectors(num=24, num_test=10):
    """Two features, three classes."""
    rng = RNG(0)
    x, y = rng.standard_normal((num + num_test, 2), dtype=np.float32), rng.integers(3, size=num + num_test)
    return Dataset(x[:num], y[:num], x[num:], y[num:], 3)


class WithEverything(nn.Module):
    """Batch statistics and dropout: all by which peers of one process could disturb each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


def engine_of(model=None, dataset=None, step=None, **config):
    settings = dict(batch_size=8, learning_rate=0.1) | config
    return Engine(model or WithEverything(), TrainingConfig(**settings), dataset or vectors(), step)


class Batches:
    """A training step that keeps the batches it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, model, x, y):
        self.seen.append((x.clone(), y.clone()))
        return cross_entropy(model, x, y)

    @property
    def sizes(self):
        return [len(x) for x, _ in self.seen]

    def rows(self, start, stop):
        """The samples of these batches, sorted."""
        return sorted(torch.cat([x for x, _ in self.seen[start:stop]]).tolist())


# --- the model as one flat vector -------------------------------------------------------------------------------------


def test_these_are_all_the_models_there_are():
    assert set(ALL_MODELS) == set(MODELS)


def used(model, name):
    """The model after a batch in training, so that its statistics are not those it began with."""
    dataset = dataset_for(name)
    model.train()(torch.from_numpy(dataset.x_train[:4]))
    return model


@pytest.mark.parametrize("buffers", ["average", "local"])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_model_comes_back_from_its_flat_vector(name, buffers):
    source, target = used(model_of(name, seed=1), name), model_of(name, seed=2)
    local = [values.clone() for values in target.buffers()]
    vector = flatten(source, buffers)
    assert vector.dtype == np.float32 and vector.shape == (layout_of(source, buffers).size,)
    unflatten_(target, vector, buffers)
    for (key, one), (_, other) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        assert torch.equal(one, other), key
    for (key, one), other, before in zip(source.named_buffers(), target.buffers(), local, strict=True):
        travels = buffers == "average" and one.is_floating_point()
        assert torch.equal(other, one if travels else before), key
        assert not torch.equal(one, before), key
    assert flatten(target, buffers).tobytes() == vector.tobytes()


def test_the_statistics_of_batchnorm_travel_only_when_they_are_averaged():
    model = model_of("resnet20")
    num_parameters = sum(values.numel() for values in model.parameters())
    num_channels = 16 * 7 + 32 * 6 + 64 * 6  # one BatchNorm behind each of 19 convolutions
    assert layout_of(model, "local").size == num_parameters
    assert layout_of(model, "average").size == num_parameters + 2 * num_channels
    names = [entry.name for entry in layout_of(model, "average").entries]
    assert names[: len(names) - 2 * 19] == [entry.name for entry in layout_of(model, "local").entries]
    assert {name.split(".")[-1] for name in names[-2 * 19 :]} == {"running_mean", "running_var"}


def test_the_flat_vector_is_a_copy():
    model = model_of("mlp")
    vector = flatten(model)
    before = vector.tobytes()
    vector[:] = 1
    assert flatten(model).tobytes() == before
    unflatten_(model, vector)
    vector[:] = 2
    assert (flatten(model) == 1).all()


def test_a_vector_of_another_size_does_not_fit():
    model = model_of("mlp")
    before = flatten(model)
    for size in (0, before.size - 1, before.size + 1):
        with pytest.raises(LayoutError, match=f"does not fit a layout of {before.size} values"):
            unflatten_(model, np.zeros(size, np.float32))
    assert flatten(model).tobytes() == before.tobytes()


def test_the_engine_lays_a_model_out_as_flatten_does():
    for name in ALL_MODELS:
        for buffers in ("average", "local"):
            model = model_of(name)
            expected, layout = flatten(model, buffers), layout_of(model, buffers)
            engine = engine_of(model, dataset_for(name), buffers=buffers)
            assert engine.layout == layout
            assert engine.initial_vector().tobytes() == expected.tobytes()


# --- what an engine takes ---------------------------------------------------------------------------------------------


def test_a_model_that_is_not_float32_is_refused_with_the_tensors_name():
    with pytest.raises(LayoutError, match=r"0\.weight is torch\.float64; the engine trains float32 models"):
        engine_of(nn.Sequential(nn.Linear(2, 3)).double())
    mixed = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    mixed[1].running_var = mixed[1].running_var.half()
    with pytest.raises(LayoutError, match=r"1\.running_var is torch\.float16"):
        engine_of(mixed)


def test_a_model_without_parameters_is_refused():
    for build in (engine_of, flatten, layout_of):
        with pytest.raises(LayoutError, match="Flatten has no parameters to train"):
            build(nn.Flatten())


def test_what_is_no_module_is_refused():
    with pytest.raises(ConfigError, match=r"the model is a function; give a torch\.nn\.Module"):
        engine_of(lambda x: x)


def test_an_optimizer_or_a_step_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"unknown optimizer 'sdg'; did you mean 'sgd'\?"):
        engine_of(optimizer="sdg")
    with pytest.raises(ConfigError, match="unknown training step 'mine'"):
        Engine(WithEverything(), TrainingConfig(step="mine"), vectors())


def test_a_vector_that_does_not_fit_is_neither_trained_nor_evaluated():
    engine = engine_of()
    bad = np.zeros(engine.layout.size + 1, np.float32)
    for use in (lambda: engine.train(Learner("p0", np.arange(8)), bad, 1), lambda: engine.evaluate(bad)):
        with pytest.raises(LayoutError, match=f"does not fit the model's {engine.layout.size} values"):
            use()


# --- the same again ---------------------------------------------------------------------------------------------------

SHARDS = {"p0": np.arange(0, 8), "p1": np.arange(6, 19), "p2": np.arange(19, 24)}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("buffers", ["average", "local"])
def test_training_again_gives_the_same_bits(buffers, optimizer):
    config = dict(buffers=buffers, optimizer=optimizer, momentum=0.9, local_epochs=2)
    results = []
    for _ in range(2):
        engine, learner = engine_of(**config), Learner("p0", SHARDS["p0"])
        vector = engine.initial_vector()
        for round_ in (1, 2, 3):
            result = engine.train(learner, vector, round_)
            vector = result.vector
        results.append((vector.tobytes(), result.loss, result.num_steps))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ALL_MODELS)
def test_each_model_learns_the_same_in_the_same_engine_and_in_another(name):
    engines = [engine_of(model_of(name), dataset_for(name), learning_rate=0.01) for _ in range(2)]
    start = engines[0].initial_vector()
    results = [engine.train(Learner("p0", SHARDS["p0"]), start, 1) for engine in (*engines, engines[0])]
    assert len({(result.vector.tobytes(), result.loss) for result in results}) == 1
    assert np.isfinite(results[0].loss) and results[0].vector.tobytes() != start.tobytes()


@pytest.mark.parametrize("buffers", ["average", "local"])
@pytest.mark.parametrize("order", [("p1", "p2", "p0"), ("p2", "p1", "p0")])
def test_the_order_in_which_peers_train_does_not_change_what_they_learn(order, buffers):
    def trained(order):
        engine = engine_of(momentum=0.9, buffers=buffers)
        learners = {name: Learner(name, indices) for name, indices in SHARDS.items()}
        current = dict.fromkeys(SHARDS, engine.initial_vector())
        for round_ in (1, 2):
            for name in order if round_ == 1 else reversed(order):
                current[name] = engine.train(learners[name], current[name], round_).vector
        scores = {name: engine.evaluate(current[name], learners[name]) for name in sorted(SHARDS)}
        return {name: current[name].tobytes() for name in sorted(SHARDS)}, scores

    assert trained(order) == trained(("p0", "p1", "p2"))


def test_peer_round_and_seed_decide_the_batches():
    def vector(name="p0", round=1, seed=0):
        engine = engine_of(model_of("mlp"), dataset_for("mlp"), seed=seed)
        return engine.train(Learner(name, np.arange(24)), engine.initial_vector(), round).vector.tobytes()

    assert vector() == vector()
    assert len({vector(), vector(name="p1"), vector(round=2), vector(seed=1)}) == 4


# --- one round --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "config", "times", "sizes"),
    [
        (10, dict(local_epochs=1), 1, [4, 4, 2]),
        (10, dict(local_epochs=2), 1, [4, 4, 2] * 2),
        (8, dict(local_epochs=1), 1, [4, 4]),
        (10, dict(local_epochs=None, local_steps=5), 1, [4, 4, 2, 4, 4]),
        (10, dict(local_epochs=None, local_steps=2), 1, [4, 4]),
        (10, dict(local_epochs=None, local_steps=2), 3, [4, 4, 2, 4, 4, 2]),
        (3, dict(local_epochs=2), 1, [3, 3]),  # a shard smaller than a batch is one batch
        (3, dict(local_epochs=None, local_steps=3), 1, [3, 3, 3]),
        (1, dict(local_epochs=1), 1, [1]),
    ],
)
def test_a_round_has_the_steps_and_batches_that_were_asked_for(num_samples, config, times, sizes):
    batches = Batches()
    engine = engine_of(nn.Linear(2, 3), step=batches, batch_size=4, **config)
    result = engine.train(Learner("p0", np.arange(num_samples)), engine.initial_vector(), 1, times)
    assert (batches.sizes, result.num_steps) == (sizes, len(sizes))


def test_each_epoch_goes_over_the_shard_once_in_an_order_of_its_own():
    batches, dataset, shard = Batches(), vectors(), np.array([1, 3, 5, 7, 9, 11, 13, 15, 17, 19])
    engine = engine_of(nn.Linear(2, 3), dataset, step=batches, batch_size=4, local_epochs=2)
    engine.train(Learner("p0", shard), engine.initial_vector(), 1)
    assert batches.rows(0, 3) == batches.rows(3, 6) == sorted(dataset.x_train[shard].tolist())
    assert not torch.equal(torch.cat([x for x, _ in batches.seen[:3]]), torch.cat([x for x, _ in batches.seen[3:]]))


def test_the_vector_a_round_starts_from_is_left_alone():
    engine = engine_of()
    start = engine.initial_vector()
    before = start.tobytes()
    start.flags.writeable = False  # as published vectors are
    result = engine.train(Learner("p0", SHARDS["p0"]), start, 1)
    assert start.tobytes() == before != result.vector.tobytes()


def test_the_trained_vector_is_the_callers_to_keep():
    engine = engine_of()
    start = engine.initial_vector()
    first = engine.train(Learner("p0", SHARDS["p0"]), start, 1).vector
    kept = first.tobytes()
    engine.train(Learner("p1", SHARDS["p1"]), start, 1)
    engine.evaluate(start)
    assert first.tobytes() == kept and first.flags.writeable


def test_the_loss_is_the_mean_over_the_steps_of_the_round():
    losses = iter([1.0, 2.0, 6.0])

    def step(model, x, y):
        return model.weight.sum() * 0 + next(losses)

    engine = engine_of(nn.Linear(2, 3), step=step, local_epochs=None, local_steps=3)
    assert engine.train(Learner("p0", SHARDS["p0"]), engine.initial_vector(), 1).loss == 3.0


def test_a_users_own_step_is_what_is_differentiated():
    engine = engine_of(nn.Linear(2, 3), step=lambda model, x, y: sum(values.sum() for values in model.parameters()))
    start = np.arange(9, dtype=np.float32)
    result = engine.train(Learner("p0", np.arange(8)), start, 1)  # one step: all gradients are 1
    assert result.vector.tolist() == [float(np.float32(value) - np.float32(0.1)) for value in range(9)]
    assert result.loss == 36.0


def test_a_users_own_step_may_be_named_in_the_settings(tmp_path, monkeypatch):
    (tmp_path / "own_steps_for_test.py").write_text("def bias_only(model, x, y):\n    return model.bias.sum()\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config = TrainingConfig(step="own_steps_for_test:bias_only", learning_rate=0.5)
    try:
        engine = Engine(nn.Linear(2, 3), config, vectors())
    finally:
        sys.modules.pop("own_steps_for_test", None)
    result = engine.train(Learner("p0", np.arange(8)), np.zeros(9, np.float32), 1)
    assert result.vector.tolist() == [0.0] * 6 + [-0.5] * 3


def test_the_default_step_is_the_cross_entropy_of_each_label():
    logits = torch.tensor([[0.0, 0.0], [np.log(3.0), 0.0]])
    constant = lambda x: logits  # noqa: E731
    assert cross_entropy(constant, None, torch.tensor([0, 1])).item() == pytest.approx((np.log(2) + np.log(4)) / 2)
    tokens = lambda x: logits[None]  # noqa: E731
    assert cross_entropy(tokens, None, torch.tensor([[0, 1]])).item() == pytest.approx((np.log(2) + np.log(4)) / 2)


def test_images_of_bytes_are_normalised_before_they_are_trained_on():
    images = RNG(0).integers(0, 256, size=(10, 1, 2, 2)).astype(np.uint8)
    labels = np.arange(10) % 3
    batches = Batches()
    dataset = Dataset(images, labels, images, labels, 3, mean=(0.5,), std=(0.25,))
    engine = engine_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), dataset, step=batches)
    engine.train(Learner("p0", np.array([4])), engine.initial_vector(), 1)
    ((x, y),) = batches.seen
    torch.testing.assert_close(x, (torch.from_numpy(images[4:5]).float() / 255 - 0.5) / 0.25)
    assert y.tolist() == [4 % 3]


# --- optimizers -------------------------------------------------------------------------------------------------------

SETTINGS = {
    "sgd": (dict(optimizer="sgd"), torch.optim.SGD, {}),
    "sgd with momentum": (dict(optimizer="sgd", momentum=0.9), torch.optim.SGD, dict(momentum=0.9)),
    "sgd with all": (
        dict(optimizer="sgd", momentum=0.5, weight_decay=0.1),
        torch.optim.SGD,
        dict(momentum=0.5, weight_decay=0.1),
    ),
    "adam": (dict(optimizer="adam"), torch.optim.Adam, {}),
    "adam with decay": (dict(optimizer="adam", weight_decay=0.1), torch.optim.Adam, dict(weight_decay=0.1)),
    "adamw": (dict(optimizer="adamw", weight_decay=0.1), torch.optim.AdamW, dict(weight_decay=0.1)),
    "adamw without decay": (dict(optimizer="adamw"), torch.optim.AdamW, dict(weight_decay=0.0)),
}


def test_these_are_all_the_optimizers_there_are():
    assert {config["optimizer"] for config, _, _ in SETTINGS.values()} == set(OPTIMIZERS)


def each_value_alone(model, *_):
    """A loss whose gradients are the same bits wherever the values lie in memory: no sums of products."""
    return sum((values * values * (index + 1)).sum() for index, values in enumerate(model.parameters()))


def both(model, config, optimizer, arguments, step):
    """The values after five steps of the engine, and of torch's own optimizer; `step` is also told how often it was called."""
    reference = copy.deepcopy(model)
    calls = iter(range(10))
    engine = engine_of(model, step=lambda model, x, y: step(model, next(calls)), local_epochs=None, local_steps=5, **config)
    ours = engine.train(Learner("p0", np.arange(8)), engine.initial_vector(), 1).vector
    trained = [values for values in reference.parameters() if values.requires_grad]
    theirs = optimizer(trained, lr=0.1, foreach=False, **arguments)
    for call in range(5):
        for values in trained:
            values.grad = torch.zeros_like(values)
        step(reference, call).backward()
        theirs.step()
    return ours, flatten(reference)


@pytest.mark.parametrize(("config", "optimizer", "arguments"), SETTINGS.values(), ids=SETTINGS)
def test_an_optimizer_does_what_torchs_own_does_to_the_last_bit(config, optimizer, arguments):
    ours, theirs = both(WithEverything(), config, optimizer, arguments, each_value_alone)
    assert ours.tobytes() == theirs.tobytes() != flatten(WithEverything()).tobytes()


@pytest.mark.parametrize(("config", "optimizer", "arguments"), SETTINGS.values(), ids=SETTINGS)
def test_a_frozen_parameter_stays_as_it_is(config, optimizer, arguments):
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    layout, before = layout_of(model), flatten(model)
    ours, theirs = both(model, config, optimizer, arguments, each_value_alone)
    assert ours.tobytes() == theirs.tobytes()
    changed = {name for name, values in layout.tensors(ours != before).items() if values.any()}
    assert changed == {"1.weight", "1.bias"}


@pytest.mark.parametrize(("config", "optimizer", "arguments"), SETTINGS.values(), ids=SETTINGS)
def test_a_parameter_that_a_step_does_not_use_has_a_gradient_of_zero_there(config, optimizer, arguments):
    """And keeps its own momentum, whichever others are used: two heads of one shape, trained in turn."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(4, 3))

    def one_head(model, call):
        return each_value_alone(nn.ModuleList([model[0], model[1 + call % 2]]))

    ours, theirs = both(model, config, optimizer, arguments, one_head)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(("config", "optimizer", "arguments"), SETTINGS.values(), ids=SETTINGS)
def test_rounds_of_training_are_those_of_torchs_optimizer_on_the_same_batches(config, optimizer, arguments):
    batches = Batches()
    engine = engine_of(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)), step=batches, **config)
    model = copy.deepcopy(engine.flat.model)
    start = engine.initial_vector()
    unflatten_(model, start)
    learner, vector = Learner("p0", SHARDS["p1"]), start
    for round_ in (1, 2, 3):
        vector = engine.train(learner, vector, round_).vector
    reference = optimizer(model.parameters(), lr=0.1, **arguments)
    for x, y in batches.seen:
        reference.zero_grad()
        F.cross_entropy(model(x), y).backward()
        reference.step()
    assert len(batches.seen) == 6
    # The gradients may be summed in another order, by parts in 2**-24 of about 1; Adam divides them by their size, and the
    # smallest here is far above that.
    np.testing.assert_allclose(vector, flatten(model), rtol=1e-4, atol=1e-5)
    assert np.abs(vector - start).max() > 0.05


def test_the_state_of_the_optimizer_is_kept_from_round_to_round_unless_it_is_to_be_reset():
    def second_round(keep_learner, **config):
        engine, learner = engine_of(model_of("mlp"), dataset_for("mlp"), momentum=0.9, **config), Learner("p0", SHARDS["p0"])
        first = engine.train(learner, engine.initial_vector(), 1).vector
        return engine.train(learner if keep_learner else Learner("p0", SHARDS["p0"]), first, 2).vector.tobytes()

    fresh = second_round(keep_learner=False)
    assert second_round(keep_learner=True) != fresh
    assert second_round(keep_learner=True, reset_optimizer=True) == fresh


def test_averaged_statistics_are_not_touched_by_the_optimizer():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    engine = engine_of(model, step=each_value_alone, learning_rate=0.1, weight_decay=0.5)
    result = engine.train(Learner("p0", np.arange(8)), engine.initial_vector(), 1)
    tensors = engine.layout.tensors(result.vector)
    assert tensors["0.running_mean"].tolist() == [0, 0] and tensors["0.running_var"].tolist() == [1, 1]
    assert tensors["0.weight"].tolist() == pytest.approx([1 - 0.1 * (2 + 0.5)] * 2)


# --- statistics that stay with a peer ---------------------------------------------------------------------------------


def test_local_statistics_stay_with_the_peer_that_gathered_them():
    engine = engine_of(buffers="local")
    assert engine.layout.size == 2 * 8 + 8 + 2 * 8 + 8 * 3 + 3
    start, learners = engine.initial_vector(), [Learner(name, indices) for name, indices in SHARDS.items()]
    results = [engine.train(learner, start, 1) for learner in learners]
    kept = [[values.clone() for values in learner.local_buffers] for learner in learners]
    for (means, variances, counter), result in zip(kept, results, strict=True):
        assert means.shape == variances.shape == (8,) and counter.item() == result.num_steps
    for statistic in (0, 1):
        assert len({tuple(buffers[statistic].tolist()) for buffers in kept}) == len(learners)
    engine.train(learners[1], results[1].vector, 2)
    for before, after in zip(kept[0], learners[0].local_buffers, strict=True):
        assert torch.equal(before, after)
    for before, after in zip(kept[1], learners[1].local_buffers, strict=True):
        assert not torch.equal(before, after)


def test_a_peers_own_statistics_go_on_from_where_its_last_round_left_them():
    x = np.full((8, 2), 4.0, np.float32)
    engine = engine_of(
        nn.BatchNorm1d(2, momentum=0.5), Dataset(x, np.zeros(8, np.int64), x, np.zeros(8, np.int64), 2), buffers="local"
    )
    learner, other, means = Learner("p0", np.arange(8)), Learner("p1", np.arange(8)), []
    for round_ in (1, 2, 3):
        engine.train(learner, engine.initial_vector(), round_)
        means.append(learner.local_buffers[0].tolist())
        engine.train(other, engine.initial_vector(), 1)
    assert means == [[2.0] * 2, [3.0] * 2, [3.5] * 2]  # half the way to 4 with each step, of which a round has one


def test_averaged_statistics_are_part_of_the_vector_and_only_the_counter_stays_behind():
    engine, learner = engine_of(buffers="average"), Learner("p0", SHARDS["p0"])
    assert learner.local_buffers == []
    start = engine.initial_vector()
    result = engine.train(learner, start, 1)
    before, after = (engine.layout.tensors(vector)["layers.1.running_mean"] for vector in (start, result.vector))
    assert (before == 0).all() and (after != 0).all()
    (counter,) = learner.local_buffers
    assert not counter.is_floating_point() and counter.item() == result.num_steps


def test_a_model_without_buffers_leaves_nothing_behind():
    engine, learner = engine_of(nn.Linear(2, 3), buffers="local"), Learner("p0", SHARDS["p0"])
    engine.train(learner, engine.initial_vector(), 1)
    assert learner.local_buffers == []


@pytest.mark.parametrize("buffers", ["average", "local"])
def test_the_counters_of_batchnorm_are_each_peers_own(buffers):
    def trained(order):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 3))  # averages by its counter
        engine = engine_of(model, buffers=buffers)
        start, learners = engine.initial_vector(), {name: Learner(name, SHARDS[name]) for name in order}
        results = {name: engine.train(learners[name], start, 1) for name in order}
        assert all(learners[name].local_buffers[-1].item() == results[name].num_steps for name in order)
        kept = {name: [values.tolist() for values in learners[name].local_buffers] for name in order}
        return kept, {name: result.vector.tobytes() for name, result in results.items()}

    assert trained(("p0", "p1")) == trained(("p1", "p0"))


def statistics_of(means, variances):
    """What a BatchNorm keeps, in its order."""
    return [torch.tensor(means), torch.tensor(variances), torch.tensor(1)]


def test_a_model_is_evaluated_with_the_peers_own_statistics():
    model = nn.BatchNorm1d(2, affine=True)
    x = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], np.float32)
    dataset = Dataset(x, np.zeros(4, np.int64), x, np.zeros(4, np.int64), 2)
    engine = engine_of(model, dataset, buffers="local")
    vector = np.array([1, 1, 0, 0], np.float32)  # weights, then biases
    shifted = Learner("p0", np.arange(4), local_buffers=statistics_of([2.0, 0.0], [1.0, 1.0]))
    assert engine.evaluate(vector, Learner("p1", np.arange(4))) == 0.75  # all but [0, 1]; of equal logits the first
    assert engine.evaluate(vector, shifted) == 0.25  # [3, 0] only
    assert engine.evaluate(vector) == 0.75  # a new model's, not those that it was last given


def test_evaluating_does_not_depend_on_who_trained_last():
    data = vectors()
    dataset = Dataset(data.x_train, data.y_train % 2, data.x_train, data.y_train % 2, 2)
    engine = engine_of(nn.BatchNorm1d(2), dataset, buffers="local")
    start, fresh = engine.initial_vector(), Learner("p9", SHARDS["p0"])
    before = engine.evaluate(start, fresh), engine.evaluate(start)
    far = Learner("p0", SHARDS["p1"], local_buffers=statistics_of([-50.0, 0.0], [1.0, 1.0]))
    engine.train(far, start, 1)
    assert engine.evaluate(start, far) not in before  # else its statistics would not show below
    assert (engine.evaluate(start, fresh), engine.evaluate(start)) == before


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_test", [1, 7, 1203])
def test_the_accuracy_is_the_share_of_test_samples_whose_largest_logit_is_right(num_test):
    x = RNG(0).standard_normal((num_test, 3), dtype=np.float32)
    y = RNG(1).integers(3, size=num_test)
    model = nn.Linear(3, 3)
    engine = engine_of(model, Dataset(x, y, x, y, 3))
    identity = np.concatenate([np.eye(3).reshape(-1), np.zeros(3)]).astype(np.float32)
    assert engine.evaluate(identity) == np.count_nonzero(x.argmax(1) == y) / num_test
    reversed_ = np.concatenate([-np.eye(3).reshape(-1), np.zeros(3)]).astype(np.float32)
    assert engine.evaluate(reversed_) == np.count_nonzero(x.argmin(1) == y) / num_test


def test_the_accuracy_on_tokens_counts_each_next_token():
    x = RNG(0).integers(5, size=(9, 4))
    y = np.where(RNG(1).random((9, 4)) < 0.5, x, (x + 1) % 5)
    engine = engine_of(nn.Embedding(5, 5), Dataset(x, y, x, y, 5))
    assert engine.evaluate(np.eye(5, dtype=np.float32).reshape(-1)) == np.count_nonzero(x == y) / 36


def test_evaluating_changes_nothing_that_is_trained():
    plain, evaluating = engine_of(momentum=0.9), engine_of(momentum=0.9)
    learner, other, start = Learner("p0", SHARDS["p0"]), Learner("p0", SHARDS["p0"]), plain.initial_vector()
    first, same = plain.train(learner, start, 1).vector, evaluating.train(other, start, 1).vector
    assert evaluating.evaluate(same, other) == evaluating.evaluate(same, other)
    evaluating.evaluate(start)
    assert same.tobytes() == first.tobytes()
    assert evaluating.train(other, same, 2).vector.tobytes() == plain.train(learner, first, 2).vector.tobytes()


# --- fast math --------------------------------------------------------------------------------------------------------


def test_fast_math_learns_the_same_but_for_rounding():
    results = []
    for fast in (False, True):
        engine = engine_of(model_of("cnn"), dataset_for("cnn"), learning_rate=0.01)
        engine.set_fast_math(fast)
        assert (engine.uses_fast_math, engine.description()["fast_math"]) == (fast, fast)
        results.append(engine.train(Learner("p0", np.arange(24)), engine.initial_vector(), 1))
    plain, fast = results
    # Products of numbers rounded to 8 bits err by up to 2**-8 each; the loss is a mean over logits of about 1.
    assert fast.loss == pytest.approx(plain.loss, abs=4 * 2.0**-8)
    assert np.linalg.norm(fast.vector - plain.vector) < 0.01 * np.linalg.norm(plain.vector)


def test_trying_fast_math_leaves_the_model_as_it_was():
    engine = engine_of(model_of("resnet20"), dataset_for("resnet20", num_train=8))
    before = engine.initial_vector()
    assert engine.try_fast_math(2) is engine.uses_fast_math
    assert engine.initial_vector().tobytes() == before.tobytes()
    assert torch.get_float32_matmul_precision() == ("medium" if engine.uses_fast_math else "highest")


# --- starting up ------------------------------------------------------------------------------------------------------

STARTS_LEAN = """
import sys
import numpy as np
from torch import nn
from gossipfl.learning.datasets import Dataset
from gossipfl.learning.training import Engine, Learner, TrainingConfig

x, y = np.ones((4, 2), np.float32), np.arange(4) % 3
for optimizer in ("sgd", "adam", "adamw"):
    engine = Engine(nn.Linear(2, 3), TrainingConfig(optimizer=optimizer, momentum=0.9), Dataset(x, y, x, y, 3))
    result = engine.train(Learner("p0", np.arange(4)), engine.initial_vector(), 1)
    assert result.num_steps == 1
print("torch._dynamo" in sys.modules)
"""


def test_training_does_not_import_the_compiler():
    """torch._dynamo takes most of a second and 74 MiB in each peer's process."""
    environment = os.environ | {"PYTHONPATH": str(Path(gossipfl.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", STARTS_LEAN], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


# --- model files ------------------------------------------------------------------------------------------------------

LAYOUT = Layout.of([("z.weight", (2, 3)), ("a.bias", (3,)), ("m", (1, 1, 2))])  # not in the order of names
VECTOR = RNG(0).standard_normal(11, dtype=np.float32)


def test_a_saved_model_comes_back_to_the_last_bit(tmp_path):
    path = tmp_path / "new" / "folder" / "model.safetensors"
    save_model(path, LAYOUT, VECTOR, round="7")
    layout, vector = load_model(path)
    assert layout == LAYOUT and layout.digest == LAYOUT.digest
    assert vector.dtype == np.float32 and vector.tobytes() == VECTOR.tobytes()
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("shapes", [[("scale", ()), ("v", (3,))], [("v", (0, 2)), ("scale", ())], [("v", (0,))], []])
def test_scalars_and_tensors_without_values_come_back_with_their_shapes(tmp_path, shapes):
    layout = Layout.of(shapes)
    save_model(tmp_path / "model", layout, VECTOR[: layout.size])
    again, vector = load_model(tmp_path / "model")
    assert again == layout and again.digest == layout.digest
    assert vector.dtype == np.float32 and vector.tobytes() == VECTOR[: layout.size].tobytes()


def test_every_model_comes_back_from_its_file(tmp_path):
    for name in ALL_MODELS:
        model = used(model_of(name), name)
        save_model(tmp_path / name, layout_of(model), flatten(model))
        layout, vector = load_model(tmp_path / name)
        assert layout == layout_of(model) and vector.tobytes() == flatten(model).tobytes()


def test_a_model_file_is_read_by_others_under_the_models_own_names(tmp_path):
    from safetensors import safe_open

    save_model(tmp_path / "model", LAYOUT, VECTOR, round="7", peer="p0")
    with safe_open(tmp_path / "model", framework="numpy") as file:
        assert sorted(file.keys()) == ["a.bias", "m", "z.weight"]
        np.testing.assert_array_equal(file.get_tensor("z.weight"), VECTOR[:6].reshape(2, 3))
        metadata = file.metadata()
    order = json.dumps(["z.weight", "a.bias", "m"])
    assert metadata == {"order": order, "gossipfl": __version__, "round": "7", "peer": "p0"}


def test_a_vector_that_does_not_fit_its_layout_is_not_saved(tmp_path):
    with pytest.raises(LayoutError, match="does not fit a layout of 11 values"):
        save_model(tmp_path / "model", LAYOUT, VECTOR[:-1])
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_a_data_error_wherever_it_ends(tmp_path):
    path, content = tmp_path / "model", model_bytes(LAYOUT, VECTOR)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="model is no model file of gossipfl"):
            load_model(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a model",
        bytes(1000),
        b"\xff" * 1000,
        b"PK\x03\x04" + bytes(100),  # what torch.save writes
        save({"a": np.zeros(2, np.float32)}),  # another's safetensors file
        save({"a": np.zeros(2, np.float32)}, {"format": "pt"}),
        save({"a": np.zeros(2, np.float32)}, {"order": "not json"}),
        *(
            save({"a": np.zeros(2, np.float32)}, {"order": order})
            for order in (
                '["b"]',
                '["a", "a"]',
                '["a", "b"]',
                '"a"',
                "3",
                "null",
                "[1]",
                "[[1]]",
                '[["a"]]',
                "[null]",
                "[]",
                "{}",
            )
        ),
        save({"a": np.zeros(2, np.float32)}, {"order": '{"a": 1}'}),
        save({"None": np.zeros(2, np.float32)}, {"order": "[null]"}),  # no name, though it reads like one
        save({"1": np.zeros(2, np.float32)}, {"order": "[1]"}),
    ],
)
def test_what_is_no_model_file_is_a_data_error(tmp_path, content):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(DataError, match="model is no model file of gossipfl"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.bool_])
def test_a_model_that_is_not_float32_is_a_data_error_with_the_tensors_name(tmp_path, dtype):
    tensors = {"a": np.zeros(2, np.float32), "b": np.zeros(2, dtype)}
    (tmp_path / "model").write_bytes(save(tensors, {"order": '["a", "b"]'}))
    with pytest.raises(DataError, match=f"model: b is {np.dtype(dtype)}; models are float32$"):
        load_model(tmp_path / "model")


def test_a_model_file_that_is_not_there_is_a_data_error(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(DataError, match="is no model file of gossipfl"):
            load_model(path)


def test_a_file_with_wrong_bytes_is_a_data_error_or_a_model_of_the_same_size(tmp_path):
    path, content, chance = tmp_path / "model", model_bytes(LAYOUT, VECTOR), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            layout, vector = load_model(path)
        except DataError:
            refused += 1
        else:
            assert vector.shape == (layout.size,) and vector.dtype == np.float32
    assert 100 < refused < 300


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "model"
    for content in (b"old and long", b"new", b""):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    def fail(*_):
        raise OSError("no space left on device")

    path = tmp_path / "model"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail() if path.read_bytes() != b"old" else None)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
