"""Gradients in closed form: of fully connected networks with ReLU and the cross entropy, for a stack of peers at once.

    gradients = DenseGradients.of(model)            # None for any other network
    losses, by_name = gradients(values, x, y)       # f32[n], and of each parameter [n, *shape]
    losses = gradients.descend(values, x, y, 0.05)  # a step of plain SGD, which moves the values

Backpropagation as in Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors" (Nature 1986). What
autograd comes to, to rounding, in 0.6 of the time where layers are small: gradients go into memory that stays, matrices lie as
the products take them best, and no graph is made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gossipfl.learning.training import IGNORED

Stacked = dict[str, torch.Tensor]
"""By name of a parameter or buffer, the values of n peers: `[n, *shape]`."""


class DenseGradients:
    """Of a chain of layers: the name of each that is linear, None for a ReLU."""

    def __init__(self, layers: list[str | None], flattens: bool) -> None:
        self._layers, self._flattens = layers, flattens
        self._first = next((name for name in layers if name), None)
        self._memory: Stacked = {}

    @classmethod
    def of(cls, model: nn.Module) -> DenseGradients | None:
        """For an `nn.Sequential` of linear layers and ReLUs, perhaps behind a Flatten, all of it trained."""
        if type(model) is not nn.Sequential:
            return None
        layers = list(model._modules.items())  # named_children() leaves out a layer that is there again
        flattens = bool(layers) and type(model[0]) is nn.Flatten and (model[0].start_dim, model[0].end_dim) == (1, -1)
        layers = layers[flattens:]
        expected = [f"{name}.{own}" for name, layer in layers for own, _ in layer.named_parameters()]
        trained = [name for name, values in model.named_parameters() if values.requires_grad]
        if any(type(layer) not in (nn.Linear, nn.ReLU) for _, layer in layers) or expected != trained:
            return None
        return cls([name if type(layer) is nn.Linear else None for name, layer in layers], flattens)

    def __call__(self, values: Stacked, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, Stacked]:
        """Mean losses of n peers, f32[n], and their gradients, good until the next call.

        `x` is f32[n, batch, ...], `y` i64[n, batch, ...] with IGNORED for what does not count.
        """
        gradients: Stacked = {}

        def keep(name: str, error: torch.Tensor, h: torch.Tensor) -> None:
            weight, bias = f"{name}.weight", f"{name}.bias"
            gradients[weight] = torch.bmm(error.mT, h, out=self._room(weight, values[weight]))
            if bias in values:
                gradients[bias] = error.sum(1)

        return self._backpropagate(values, x, y, keep), gradients

    def descend(self, values: Stacked, x: torch.Tensor, y: torch.Tensor, rate: float, decay: float = 0.0) -> torch.Tensor:
        """Move `values` (weights contiguous) by a step of SGD without momentum; returns the losses before it, f32[n].

        No gradient is stored: the product that it is goes into the weights at once, in two thirds of the time.
        """

        def move(name: str, error: torch.Tensor, h: torch.Tensor) -> None:
            values[f"{name}.weight"].baddbmm_(error.mT, h, beta=1 - rate * decay, alpha=-rate)
            if (bias := values.get(f"{name}.bias")) is not None:
                bias.mul_(1 - rate * decay).add_(error.sum(1), alpha=-rate)

        return self._backpropagate(values, x, y, move)

    def _backpropagate(
        self,
        values: Stacked,
        x: torch.Tensor,
        y: torch.Tensor,
        take: Callable[[str, torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        """The losses; `take` gets each linear layer's name, the error of its outputs, and its inputs, the last layer first."""
        h, y = x.flatten(2) if self._flattens else x.flatten(1, -2), y.flatten(1)
        inputs = []
        for name in self._layers:
            inputs.append(h)
            h = torch.relu(h) if name is None else self._linear(name, values, h)
        is_sample = y != IGNORED
        share = is_sample / is_sample.sum(1, keepdim=True)
        label = torch.where(is_sample, y, 0).unsqueeze(2)
        scores = h.log_softmax(2)
        losses = -(scores.gather(2, label).squeeze(2) * share).sum(1)
        error = scores.exp_().scatter_add_(2, label, share.new_full(label.shape, -1.0)).mul_(share.unsqueeze(2))
        for name, h in zip(reversed(self._layers), reversed(inputs), strict=True):
            if name is None:
                error = torch.ops.aten.threshold_backward(error, h, 0)
                continue
            below = torch.bmm(error, values[f"{name}.weight"]) if name != self._first else None
            take(name, error, h)
            if below is None:
                break
            error = below
        return losses

    def _linear(self, name: str, values: Stacked, h: torch.Tensor) -> torch.Tensor:
        weight, bias = values[f"{name}.weight"], values.get(f"{name}.bias")
        return torch.bmm(h, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), h, weight.mT)

    def _room(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Memory that is there already: what large tensors are put into afresh costs a page fault for each 4 KiB."""
        room = self._memory.get(name)
        if room is None or len(room) < len(like):
            room = self._memory[name] = torch.empty_like(like)
        return room[: len(like)]
