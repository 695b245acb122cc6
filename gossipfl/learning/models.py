"""The networks that peers train, by name, and the seeded construction that gives every peer the same first values.

    model = build_model("cnn", input_shape=(1, 28, 28), num_classes=10, args={}, seed=0)

A model is a function `f(input_shape, num_classes, **args) -> nn.Module` registered in `MODELS`, or any
`package.module:function` of the user. The module maps a batch `f32[B, *input_shape]` to logits `f32[B, num_classes]`;
`gpt` maps tokens `i64[B, T]` to logits `f32[B, T, num_classes]`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossipfl.errors import ConfigError
from gossipfl.learning.datasets.arguments import call_with, whole_number
from gossipfl.learning.draws import own_draws
from gossipfl.randomness import derived_seed
from gossipfl.registry import Registry

MODELS: Registry[Callable[..., nn.Module]] = Registry("model")


def build_model(
    name: str, input_shape: tuple[int, ...], num_classes: int, args: Mapping[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """The model `name` on the CPU, its values decided by `seed` alone; torch's own generators stay as they were.

    ConfigError for arguments the model does not take, an input it cannot take, or a function that builds no module.
    """
    function = MODELS.get(name)
    what = f"model {name!r}"
    whole_number(what, "num_classes", num_classes)
    shape = tuple(whole_number(what, "input_shape", size) for size in input_shape)
    with own_draws(), torch.device("cpu"):
        torch.default_generator.manual_seed(derived_seed(seed, "model"))  # torch.manual_seed would reseed GPUs too
        model = call_with(what, function, (shape, num_classes), args or {})
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{what} returned {type(model).__name__}, not a torch.nn.Module")
    return model


@MODELS.register("mlp")
def mlp(input_shape: tuple[int, ...], num_classes: int, *, hidden: Sequence[int] | int = (128,)) -> nn.Module:
    """Fully connected layers with ReLU on the flattened input; one layer per entry of `hidden`, none for logistic
    regression. 9,610 parameters as 64-128-10."""
    widths = [hidden] if isinstance(hidden, int) else list(hidden)
    for width in widths:
        whole_number("model 'mlp'", "hidden", width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    fan_in = math.prod(input_shape)
    for i, width in enumerate(widths, start=1):
        layers[f"fc{i}"] = nn.Linear(fan_in, width)
        layers[f"relu{i}"] = nn.ReLU()
        fan_in = width
    layers["head"] = nn.Linear(fan_in, num_classes)
    return nn.Sequential(layers)


@MODELS.register("cnn")
def cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The CNN of FedAvg (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, section 3): 5x5 convolutions of 32 and 64 channels, each with 2x2 pooling, then 512 units.

    1,663,370 parameters on 1x28x28 with 10 classes, as in the paper; images from 4x4 pixels on.
    """
    channels, height, width = _image_shape("cnn", input_shape, least=4)
    features = 64 * (height // 4) * (width // 4)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(features, 512),
            relu3=nn.ReLU(),
            head=nn.Linear(512, num_classes),
        )
    )


@MODELS.register("lenet5")
def lenet5(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """LeNet-5 (LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", Proc.
    IEEE 1998) in its modern form: ReLU, max pooling, all channels connected.

    Images of 32x32, or of 28x28, which the first layer pads to 32x32 as the authors did. With 10 classes 61,706
    parameters on 1x28x28 and 62,006 on 3x32x32.
    """
    channels, height, width = _image_shape("lenet5", input_shape, least=1)
    if height != width or height not in (28, 32):
        raise ConfigError(f"model 'lenet5' takes 28x28 or 32x32 images, not {height}x{width}; cnn adapts to other sizes")
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 6, 5, padding=(32 - height) // 2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * 5 * 5, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            head=nn.Linear(84, num_classes),
        )
    )


@MODELS.register("resnet20")
def resnet20(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The 20-layer residual network for CIFAR-10 (He, Zhang, Ren and Sun, "Deep Residual Learning for Image
    Recognition", CVPR 2016, section 4.2): three stages of three blocks, BatchNorm, shortcuts without parameters
    (option A).

    269,722 parameters on 3x32x32 with 10 classes; images from 4x4 pixels on.
    """
    channels, _, _ = _image_shape("resnet20", input_shape, least=4)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(channels, 16, 3, padding=1, bias=False), norm=nn.BatchNorm2d(16), relu=nn.ReLU()
    )
    fan_in = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(1, 4):
            stride = 2 if stage > 1 and block == 1 else 1
            layers[f"block{stage}_{block}"] = ResidualBlock(fan_in, width, stride)
            fan_in = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(64, num_classes)
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # section 3.4 of the paper
    return model


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: `f32[B, fan_in, H, W] -> f32[B, width, H / stride, W / stride]`."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.new_channels = width - fan_in

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        shortcut = x
        if self.stride > 1 or self.new_channels:  # option A: skip pixels, fill new channels with zeros
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(out + shortcut)


@MODELS.register("gpt")
def gpt(input_shape: tuple[int, ...], num_classes: int, *, layers: int = 2, heads: int = 4, width: int = 64) -> nn.Module:
    """A decoder-only transformer over characters (Radford et al., "Language Models are Unsupervised Multitask
    Learners", 2019): `input_shape` is `(T,)`, the longest context, and `num_classes` the vocabulary V.

    112,512 parameters by default with T = 64 and V = 65, the size for Shakespeare's plays.
    """
    what = "model 'gpt'"
    if len(input_shape) != 1:
        raise ConfigError(f"{what} takes token windows (T,), not samples of shape {input_shape}")
    for name, value in (("layers", layers), ("heads", heads), ("width", width)):
        whole_number(what, name, value)
    if width % heads:
        raise ConfigError(f"{what}: width = {width} is no multiple of heads = {heads}")
    return Gpt(num_classes, input_shape[0], layers, heads, width)


class Gpt(nn.Module):
    """Tokens `i64[B, t]`, `t <= context`, to logits `f32[B, t, vocabulary]` of each next token."""

    def __init__(self, vocabulary: int, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(TransformerBlock(heads, width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)  # not tied to `token`: each parameter travels once
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                # GPT-2: 0.02, and less where 2 * layers branches add up in the residual stream
                std = 0.02 / math.sqrt(2 * layers) if name.endswith("out.weight") else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position[: tokens.shape[-1]]
        return self.head(self.norm(self.blocks(x)))


class TransformerBlock(nn.Module):
    """Causal self-attention, then a feed-forward layer, each after a LayerNorm: `f32[B, T, width]` to the same."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.fc_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.fc_out(F.gelu(self.fc(self.norm2(x))))


def _image_shape(name: str, input_shape: tuple[int, ...], least: int) -> tuple[int, int, int]:
    """`(C, H, W)`, with `least` pixels a side; ConfigError for other inputs."""
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise ConfigError(
            f"model {name!r} takes images (C, H, W) of {least}x{least} pixels at least, not samples of shape "
            f"{input_shape}; mlp takes any shape"
        )
    channels, height, width = input_shape
    return channels, height, width
