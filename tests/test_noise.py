"""Reduced models: their noise is that of real streams of bits, and their numbers are those of few bits."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from gossipfl.errors import ConfigError
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.noise import scores_of, with_integers, with_mantissas, with_streams
from gossipfl.learning.models import build_model

CODINGS = ("signed", "bipolar")


def numbers(*shape: int, seed: int = 0, signed: bool = True) -> torch.Tensor:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return 2 * values - 1 if signed else values


def one_layer(layer: nn.Module, seed: int = 1) -> nn.Module:
    for values in layer.parameters():
        values.data = numbers(*values.shape, seed=seed)
    return nn.Sequential(layer)


# --- streams ----------------------------------------------------------------------------------------------------------


def counted(weights: np.ndarray, inputs: np.ndarray, coding: str, length: int, rng: np.random.Generator) -> float:
    """What a counter makes of real streams of one output's products, one gate each."""
    if coding == "bipolar":
        first = rng.random((length, len(weights))) < (1 + weights) / 2
        second = rng.random((length, len(weights))) < (1 + inputs) / 2
        return float((2.0 * (first == second) - 1).sum() / length)
    first = rng.random((length, len(weights))) < np.abs(weights)
    second = rng.random((length, len(weights))) < np.abs(inputs)
    return float(((first & second) * np.sign(weights * inputs)).sum() / length)


@pytest.mark.parametrize("coding", CODINGS)
def test_the_noise_is_that_of_real_streams(coding):
    model, repeats, bits = one_layer(nn.Linear(12, 1)), 4000, 6
    x = numbers(1, 12, seed=2)
    weight, bias = model[0].weight.detach(), float(model[0].bias.detach())
    weight_scale, input_scale = float(weight.abs().max()), float(x.abs().max())
    rng = np.random.default_rng(3)
    scaled = weight[0].double().numpy() / weight_scale, x[0].double().numpy() / input_scale
    real = np.array([counted(*scaled, coding, 2**bits, rng) for _ in range(repeats)]) * weight_scale * input_scale + bias
    modelled = scores_of(with_streams(model, x, bits, 0, coding), x.expand(repeats, -1)).ravel()
    exact = float(scores_of(model.eval(), x)[0, 0])
    # Means of `repeats` draws lie within 4 standard errors; so do variances, whose relative error is sqrt(2 / repeats)
    for found in (real, modelled):
        assert abs(found.mean() - exact) <= 4 * found.std() / math.sqrt(repeats)
    assert abs(modelled.var() / real.var() - 1) <= 4 * math.sqrt(2) * math.sqrt(2 / repeats)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_convolution_is_as_noisy_as_the_products_it_adds_up(coding):
    conv = one_layer(nn.Conv2d(2, 3, 3, bias=False))
    linear = one_layer(nn.Linear(18, 3, bias=False))
    linear[0].weight.data = conv[0].weight.data.flatten(1)
    x = numbers(1, 2, 3, 3, seed=4)
    images, rows = x.expand(3000, -1, -1, -1), x.flatten(1).expand(3000, -1)
    of_conv = scores_of(with_streams(conv, x, 8, 0, coding), images)[:, :, 0, 0]
    of_linear = scores_of(with_streams(linear, x.flatten(1), 8, 0, coding), rows)
    assert np.allclose(of_conv, of_linear, atol=1e-5)


@pytest.mark.parametrize("coding", CODINGS)
def test_two_more_bits_halve_the_noise(coding):
    model, x = one_layer(nn.Linear(16, 4)), numbers(2000, 16, seed=5)
    exact = scores_of(model, x)
    noise = {bits: (scores_of(with_streams(model, x, bits, 0, coding), x) - exact).std() for bits in (6, 8, 12)}
    assert noise[6] / noise[8] == pytest.approx(2, rel=1e-3) and noise[6] / noise[12] == pytest.approx(8, rel=1e-3)


def test_with_signs_apart_a_product_of_zero_is_exact():
    model, samples = one_layer(nn.Linear(16, 4)), numbers(10, 16)
    zero = torch.zeros(5, 16)
    assert np.array_equal(scores_of(with_streams(model, samples, 6, 0, "signed"), zero), scores_of(model, zero))
    assert not np.allclose(scores_of(with_streams(model, samples, 6, 0, "bipolar"), zero), scores_of(model, zero), atol=0.1)


def test_the_seed_decides_and_the_model_is_left_alone():
    model, x = build_model("mlp", (1, 8, 8), 10), numbers(300, 1, 8, 8, signed=False)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    first, second, other = (scores_of(with_streams(model, x, 8, seed), x) for seed in (0, 0, 1))
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())


def test_inputs_beyond_the_range_of_the_samples_saturate():
    model = one_layer(nn.Linear(4, 2))
    reduced = with_streams(model, numbers(50, 4), 24, 0)
    far, edge = torch.full((1, 4), 100.0), numbers(50, 4).abs().max().expand(1, 4)
    assert scores_of(reduced, far) == pytest.approx(scores_of(model, edge), abs=0.01)


def test_streams_run_through_a_stage_of_a_residual_network():
    model = build_model("resnet20", (3, 16, 16), 10).eval()
    chain = Chain.of(model, (3, 16, 16))
    whole = chain.stage(0, len(chain.profile.layers))
    x = numbers(4, 3, 16, 16)
    close = scores_of(with_streams(whole, x, 24, 0), x)
    assert np.allclose(close, scores_of(whole, x), atol=0.05 * np.abs(close).max())
    assert not np.allclose(scores_of(with_streams(whole, x, 6, 0), x), scores_of(whole, x), atol=0.01 * np.abs(close).max())


# --- integers and mantissas -------------------------------------------------------------------------------------------


def test_integers_are_few_levels_within_the_range_of_the_samples():
    model = one_layer(nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(0.7)
    for signed in (True, False):
        x = numbers(4000, 1, signed=signed)
        found = np.unique(scores_of(with_integers(model, x, 3), x))
        assert len(found) == (7 if signed else 8) and found.max() == pytest.approx(0.7 * float(x.max()), rel=1e-2)
        assert np.diff(found) == pytest.approx(np.diff(found)[0], rel=1e-4)


def test_a_bit_more_of_integers_brings_the_scores_twice_as_close():
    model, x = one_layer(nn.Linear(64, 8)), numbers(500, 64)
    exact = scores_of(model, x)
    errors = [(scores_of(with_integers(model, x, bits), x) - exact).std() for bits in (6, 7, 8, 9)]
    assert [coarse / fine for coarse, fine in pairwise(errors)] == pytest.approx([2.0] * 3, rel=0.15)


def test_of_a_mantissa_only_the_leading_bits_are_left():
    model = one_layer(nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(1.0)
    x = torch.tensor([[1.0], [1.24], [1.26], [-1.99], [3.9], [0.0], [1e6]])
    assert scores_of(with_mantissas(model, 2), x).ravel().tolist() == [1.0, 1.0, 1.25, -1.75, 3.5, 0.0, 57344.0]
    assert scores_of(with_mantissas(model, 10), x).ravel().tolist() == x.clamp(max=65504).half().float().ravel().tolist()


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_layer_of_zeros_stays_finite():
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.zeros(3, 4)
    for values in model.parameters():
        values.data.zero_()
    for reduced in (with_streams(model, x, 8, 0), with_integers(model, x, 4), with_mantissas(model, 2)):
        assert scores_of(reduced, x).tolist() == [[0.0, 0.0]] * 3


def test_bits_that_make_no_sense_and_models_without_layers_are_refused():
    model, x = one_layer(nn.Linear(4, 2)), numbers(3, 4)
    for refused in (
        lambda: with_streams(model, x, 3, 0),
        lambda: with_integers(model, x, 1),
        lambda: with_mantissas(model, 11),
    ):
        with pytest.raises(ConfigError, match="must lie between"):
            refused()
    with pytest.raises(ConfigError, match="no layers"):
        with_mantissas(nn.Sequential(nn.ReLU()), 4)
