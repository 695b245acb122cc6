"""Models: sizes from the papers, seeded construction, and what a wrong argument says."""

import sys

import pytest
import torch
from torch import nn

from gossipfl.errors import ConfigError
from gossipfl.learning.models import MODELS, build_model

CASES = [
    # name, input shape, classes, trainable parameters, from the papers or the layer sizes
    ("mlp", (1, 8, 8), 10, 9_610),  # 64 * 128 + 128 + 128 * 10 + 10
    ("cnn", (1, 28, 28), 10, 1_663_370),  # McMahan et al. 2017
    ("cnn", (1, 8, 8), 10, 188_810),
    ("lenet5", (1, 28, 28), 10, 61_706),
    ("lenet5", (3, 32, 32), 10, 62_006),
    ("resnet20", (3, 32, 32), 10, 269_722),  # He et al. 2016: "0.27M"
    ("gpt", (64,), 65, 112_512),
]


def a_batch(name: str, shape: tuple[int, ...], num_classes: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    if name == "gpt":
        return torch.randint(0, num_classes, (2, *shape), generator=rng)
    return torch.randn(2, *shape, generator=rng)


@pytest.mark.parametrize(("name", "shape", "num_classes", "num_parameters"), CASES)
def test_each_model_has_the_parameters_its_docstring_states(name, shape, num_classes, num_parameters):
    model = build_model(name, shape, num_classes, {}, seed=0)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    stated = MODELS.get(name).__doc__.replace(",", "")
    assert str(num_parameters) in stated or (name, shape) == ("cnn", (1, 8, 8))


@pytest.mark.parametrize(("name", "shape", "num_classes", "_"), CASES)
def test_each_model_maps_a_batch_to_logits_and_reaches_every_parameter(name, shape, num_classes, _):
    model = build_model(name, shape, num_classes, {}, seed=0)
    logits = model(a_batch(name, shape, num_classes))
    assert logits.shape == ((2, *shape, num_classes) if name == "gpt" else (2, num_classes))
    logits.square().sum().backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


def test_the_seed_decides_the_first_values():
    same, again, other = (build_model("lenet5", (1, 28, 28), 10, {}, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), again.parameters(), strict=True))
    assert not torch.equal(same.conv1.weight, other.conv1.weight)


def test_building_a_model_leaves_the_global_generator_alone_and_does_not_depend_on_it():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = build_model("mlp", (4,), 2, {}, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(build_model("mlp", (4,), 2, {}, seed=0).fc1.weight, first.fc1.weight)


def test_an_mlp_takes_any_number_of_hidden_layers():
    widths = [m.out_features for m in build_model("mlp", (4,), 3, {"hidden": [8, 5]}).modules() if isinstance(m, nn.Linear)]
    assert widths == [8, 5, 3]
    assert sum(p.numel() for p in build_model("mlp", (4,), 3, {"hidden": []}).parameters()) == 4 * 3 + 3


def test_a_gpt_does_not_look_ahead():
    model = build_model("gpt", (16,), 11, {"layers": 2, "heads": 2, "width": 8})
    tokens = a_batch("gpt", (16,), 11)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_a_gpt_takes_a_shorter_context():
    model = build_model("gpt", (16,), 11, {"width": 8})
    tokens = a_batch("gpt", (16,), 11)
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])


def test_an_untrained_gpt_is_close_to_uniform():
    """Small first values: the loss begins near log V, not far above it."""
    model = build_model("gpt", (64,), 65)
    tokens = a_batch("gpt", (64,), 65)
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert abs(loss.item() - torch.log(torch.tensor(65.0)).item()) < 0.1


@pytest.mark.parametrize(
    ("name", "shape", "args", "message"),
    [
        ("mlp", (4,), {"hiden": [3]}, r"model 'mlp' has no argument 'hiden'; did you mean 'hidden'\?; it accepts hidden"),
        ("cnn", (1, 28, 28), {"width": 3}, "model 'cnn' has no argument 'width'; it accepts none"),
        ("mlp", (4,), {"hidden": [0]}, "hidden = 0 must be a whole number of at least 1"),
        ("cnn", (64,), {}, r"model 'cnn' takes images \(C, H, W\).*\(64,\)"),
        ("lenet5", (1, 8, 8), {}, "28x28 or 32x32 images, not 8x8"),
        ("resnet20", (3, 2, 2), {}, "4x4 pixels at least"),
        ("gpt", (1, 28, 28), {}, r"takes token windows \(T,\)"),
        ("gpt", (8,), {"width": 10, "heads": 4}, "width = 10 is no multiple of heads = 4"),
        ("gtp", (8,), {}, "unknown model 'gtp'; did you mean 'gpt'"),
    ],
)
def test_what_a_model_cannot_take_is_named(name, shape, args, message):
    with pytest.raises(ConfigError, match=message):
        build_model(name, shape, 10, args)


def test_a_users_own_function_builds_a_model(tmp_path, monkeypatch):
    (tmp_path / "my_nets_for_test.py").write_text(
        "from torch import nn\n"
        "def linear(input_shape, num_classes, *, bias=True):\n"
        "    return nn.Linear(input_shape[0], num_classes, bias)\n"
        "def nothing(input_shape, num_classes):\n"
        "    return 3\n"
        "def needy(input_shape, num_classes, depth):\n"
        "    return nn.Identity()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the registry adds the current folder
    assert build_model("my_nets_for_test:linear", (4,), 3, {"bias": False}).bias is None
    with pytest.raises(ConfigError, match=r"returned int, not a torch\.nn\.Module"):
        build_model("my_nets_for_test:nothing", (4,), 3)
    with pytest.raises(ConfigError, match="missing a required argument: 'depth'"):
        build_model("my_nets_for_test:needy", (4,), 3)
