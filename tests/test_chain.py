"""Chains: models cut anywhere compute what they compute whole, and what cannot be cut is named."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossipfl.errors import ConfigError, LayoutError, PlanError
from gossipfl.inference.execution.chain import Chain
from gossipfl.learning.models import build_model

MODELS = {"mlp": (64,), "cnn": (1, 28, 28), "lenet5": (1, 28, 28), "resnet20": (3, 32, 32)}


def trained(model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """With statistics and scales of batch norm as training leaves them: not those of a new model."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(generator=generator)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(16, *input_shape, generator=generator))
    return model.eval()


def built(name: str) -> nn.Module:
    return trained(build_model(name, MODELS[name], 10), MODELS[name])


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def assert_cuts_change_nothing(model: nn.Module, input_shape: tuple[int, ...], batch: int = 5) -> Chain:
    chain = Chain.of(model, input_shape)
    num_layers, x = len(chain.profile.layers), samples(batch, *input_shape)
    (whole,) = chain.stage(0, num_layers)(x)
    expected = copy.deepcopy(model).eval()(x.clone())
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for cut in range(1, num_layers):
        live = chain.stage(0, cut)(x)
        sent = [tensor.clone() for tensor in live]
        assert tuple(tuple(tensor.shape[1:]) for tensor in live) == chain.profile.layers[cut - 1].live
        assert all(len(tensor) == batch for tensor in live)
        assert torch.equal(chain.stage(cut, num_layers)(*live)[0], whole)
        assert all(map(torch.equal, live, sent)), f"the stage after cut {cut} changed what it was given"
    return chain


@pytest.mark.parametrize("name", MODELS)
def test_a_model_cut_anywhere_computes_what_it_computes_whole(name: str) -> None:
    assert_cuts_change_nothing(built(name), MODELS[name])


@torch.no_grad()
def test_one_layer_after_another_computes_what_they_compute_together() -> None:
    chain = Chain.of(built("resnet20"), MODELS["resnet20"])
    x = samples(2, 3, 32, 32)
    live: tuple[Tensor, ...] = (x,)
    for layer in range(20):
        live = chain.stage(layer, layer + 1)(*live)
    assert torch.equal(live[0], chain.stage(0, 20)(x)[0])


def test_a_cut_inside_a_residual_block_sends_the_shortcut_too() -> None:
    layers = Chain.of(built("resnet20"), MODELS["resnet20"]).profile.layers
    assert [layer.name for layer in layers[:4]] == ["conv", "block1_1.conv1", "block1_1.conv2", "block1_2.conv1"]
    assert [len(layer.live) for layer in layers] == [1, *[2, 1] * 9, 1]
    assert layers[7].live == ((16, 32, 32), (32, 16, 16))


def test_the_profile_counts_what_the_layers_do() -> None:
    profile = Chain.of(built("cnn"), MODELS["cnn"]).profile
    assert [(layer.name, layer.kind) for layer in profile.layers] == [
        ("conv1", "conv2d"),
        ("conv2", "conv2d"),
        ("fc1", "linear"),
        ("head", "linear"),
    ]
    assert [layer.macs for layer in profile.layers] == [28 * 28 * 32 * 25, 14 * 14 * 64 * 32 * 25, 3136 * 512, 5120]
    assert [layer.channels for layer in profile.layers] == [32, 64, 512, 10]
    assert [profile.num_cut(cut) for cut in range(5)] == [784, 32 * 14 * 14, 3136, 512, 0]
    assert (profile.input_shape, profile.num_classes) == ((1, 28, 28), 10)


def test_groups_strides_and_dilation_are_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=2, dilation=2, groups=4)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(x)).mean((2, 3)))

    chain = assert_cuts_change_nothing(Net(), (8, 12, 12))
    assert [layer.macs for layer in chain.profile.layers] == [6 * 6 * 16 * 2 * 9, 48]
    assert chain.profile.layers[0].group == 18


def test_the_vector_is_the_weight_then_the_bias_of_each_layer() -> None:
    chain = Chain.of(built("resnet20"), MODELS["resnet20"])
    layers = chain.profile.layers
    assert [entry.name for entry in chain.layout.entries[:2]] == ["conv.weight", "conv.bias"]  # of batch norm
    assert (layers[0].weight, layers[0].bias) == ((0, 432), (432, 448))
    assert chain.layout.size == sum(layer.num_weights + layer.channels for layer in layers)
    assert chain.vector().dtype == np.float32
    assert chain.layout.digest == Chain.of(build_model("resnet20", (3, 32, 32), 10, seed=7), (3, 32, 32)).layout.digest


@torch.no_grad()
def test_a_stage_has_the_weights_of_the_vector_it_is_given() -> None:
    ours, theirs = (Chain.of(build_model("cnn", (1, 28, 28), 10, seed=seed), (1, 28, 28)) for seed in (0, 1))
    vector, x = theirs.vector(), samples(3, 1, 28, 28)
    stage, (expected,) = ours.stage(0, 4, vector), theirs.stage(0, 4)(x)
    vector[:] = math.nan  # the store may write over it
    assert torch.equal(stage(x)[0], expected)
    assert not torch.equal(ours.stage(0, 4)(x)[0], expected)


def test_a_stage_needs_only_its_own_part_of_the_vector() -> None:
    chain = Chain.of(built("mlp"), MODELS["mlp"])
    vector = chain.vector()
    (start, _), (_, stop) = chain.profile.layers[0].weight, chain.profile.layers[0].bias or (0, 0)
    vector[:start], vector[stop:] = math.nan, math.nan
    assert torch.isfinite(chain.stage(0, 1, vector)(samples(2, 64))[0]).all()


def test_a_chain_leaves_the_model_as_it_was() -> None:
    model = built("resnet20").train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    chain = Chain.of(model, MODELS["resnet20"])
    chain.stage(0, 20, np.zeros(chain.layout.size, np.float32))
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


class Functional(nn.Module):
    """What people write: functions, in-place writes, shapes, a branch, a constant, dropout, several inputs to one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.hidden, self.norm2 = nn.Linear(16 * 6 * 6, 20), nn.BatchNorm1d(20)
        self.drop, self.head = nn.Dropout(), nn.Linear(20, 4)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.25), persistent=False)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        batch, height = x.shape[0], x.size(2)
        x = self.relu(self.stem(x - self.mean))
        left = self.norm(self.left(x))
        left += self.right(x)
        x = torch.cat([left.relu_(), F.max_pool2d(x, 3, 1, 1)], 1)
        x = F.dropout(F.avg_pool2d(x, 2), 0.5, self.training)
        x = F.relu(self.norm2(self.hidden(x.view(batch, 16 * (height // 2) ** 2))), inplace=True)
        return self.head(self.drop(x)).view(batch, -1)


def test_a_module_of_functions_is_cut_too() -> None:
    chain = assert_cuts_change_nothing(trained(Functional(), (3, 12, 12)), (3, 12, 12))
    assert [len(layer.live) for layer in chain.profile.layers] == [1, 2, 1, 1, 1]


def test_batches_of_any_size_pass_through_a_stage() -> None:
    model = trained(Functional(), (3, 12, 12))
    for batch in (1, 2, 7):
        assert_cuts_change_nothing(model, (3, 12, 12), batch)


class Broken(nn.Module):
    """A small model with a flaw."""

    def __init__(self, flaw: str) -> None:
        super().__init__()
        self.flaw, self.conv, self.head = flaw, nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.again, self.norm, self.layer_norm = nn.Linear(8, 8), nn.BatchNorm2d(8), nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("seen", torch.ones(8))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        match self.flaw:
            case "norm after relu":
                x = self.norm(x.relu())
            case "norm beside":
                x = x + self.norm(x)
            case "rows":
                return self.head(x.mean((2, 3)).T.mean(1)[None])
            case "sorted batch":
                return self.head(x.mean((2, 3)).sum(0, keepdim=True)) + x.sum((1, 2, 3))[:, None]
            case "random":
                x = F.dropout(x)
        x = x.mean((2, 3))
        match self.flaw:
            case "twice":
                x = self.again(self.again(x))
            case "parameter":
                x = x * self.scale
            case "buffer":
                x = x * self.seen
            case "other layer":
                x = self.layer_norm(x)
            case "control flow":
                x = x if x.sum() > 0 else -x
            case "dictionary":
                return {"scores": self.head(x)}  # type: ignore[return-value]
            case "sequence":
                return self.head(x)[:, None]
            case "two inputs":
                x = x + mask
            case "integers":
                return x.argmax(1, keepdim=True) + self.head(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        ("twice", "'again' and 'again' use the same parameters"),
        ("parameter", "parameter 'scale'"),
        ("buffer", "buffer 'seen' .* persistent=False"),
        ("other layer", "'layer_norm' is of kind LayerNorm"),
        ("control flow", "cannot be traced"),
        ("norm after relu", "'norm' cannot be folded"),
        ("norm beside", "'norm' cannot be folded into 'conv'"),
        ("dictionary", "returns a dict"),
        ("sequence", r"shape \(2, 1, 2\)"),
        ("rows", "for 2 samples"),
        ("sorted batch", "after 'conv'"),
        ("random", "other scores"),
        ("two inputs", "2 inputs .x, mask."),
        ("integers", "'argmax'.* cut after"),
    ],
)
def test_what_cannot_be_cut_is_named_with_a_remedy(flaw: str, said: str) -> None:
    with pytest.raises(PlanError) as refused:
        Chain.of(Broken(flaw), (3, 8, 8))
    assert re.search(said, str(refused.value)), refused.value
    assert str(refused.value).endswith("or serve it whole, at the server")


def test_a_model_without_a_flaw_is_cut() -> None:
    assert_cuts_change_nothing(Broken("none"), (3, 8, 8))


def test_a_transformer_is_refused_for_what_it_has() -> None:
    with pytest.raises(PlanError, match="'token' is of kind Embedding"):
        Chain.of(build_model("gpt", (64,), 65), (64,))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(PlanError, match="neither a convolution nor a linear"):
        Chain.of(nn.Sequential(nn.Flatten(), nn.ReLU()), (4,))


def test_samples_that_do_not_fit_are_an_error_of_their_shape() -> None:
    with pytest.raises(ConfigError, match=r"\(1, 20, 20\)"):
        Chain.of(built("cnn"), (1, 20, 20))


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (1, 1), (2, 1), (-1, 1), (0, 3)])
def test_layers_that_are_not_there_are_no_stage(start: int, stop: int) -> None:
    with pytest.raises(ConfigError, match="no stage of a model of 2 layers"):
        Chain.of(built("mlp"), MODELS["mlp"]).stage(start, stop)


def test_a_vector_of_another_model_is_refused() -> None:
    with pytest.raises(LayoutError):
        Chain.of(built("mlp"), MODELS["mlp"]).stage(0, 1, np.zeros(7, np.float32))
