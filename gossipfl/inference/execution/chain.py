"""A trained model as a chain of layers that can be cut between any two, also inside a residual block.

    chain = Chain.of(model, input_shape=(3, 32, 32))
    device, server = chain.stage(0, 5), chain.stage(5, len(chain.profile.layers))
    (scores,) = server(*device(inputs))

The model is traced with torch.fx. Each convolution or linear layer begins a layer of the chain, which reaches up to the next
one in the order of computation; batch norm is folded into the layer that it follows. What goes over a cut is its live set: the
tensors that are computed before it and needed after it, in the order of computation.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from gossipfl.errors import ConfigError, PlanError
from gossipfl.inference.planning.profile import LayerProfile, ModelProfile, Shape
from gossipfl.segments.layout import Layout

MAX_DIFFERENCE = 1e-3
"""Of the chain's scores from the model's, relative to the greatest score: room for the rounding of folded batch norm."""
BATCHES = (2, 3)
"""Sizes that the model is run with to see which of its numbers are the batch's size."""
FUNCTIONAL = {getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")}
KEEP_PARAMETERS = "keep parameters in nn.Conv2d, nn.Linear and batch norm"


class Chain:
    """The served version of a model: its layers, their place in one flat vector (f32[P]), and stages cut from it."""

    profile: ModelProfile
    layout: Layout

    def __init__(self, traced: fx.GraphModule, input_shape: Shape, norms: Mapping[str, str]) -> None:
        """Of a graph as `Chain.of` makes it: one input, functional, batch norm folded (`norms`: into which layer which)."""
        self._norms = norms
        observed = [observe(traced, torch.zeros(batch, *input_shape)) for batch in BATCHES]
        self._traced, self._batch = traced, _resolve_sizes(traced, observed)
        nodes = list(traced.graph.nodes)
        layers = {node: layer for node in nodes if (layer := layer_of(traced, node))}
        bounds = [1, *(nodes.index(node) for node in list(layers)[1:]), len(nodes) - 1]
        self._runs = [nodes[start:stop] for start, stop in pairwise(bounds)]
        self._cuts = [[nodes[0]], *(_live(nodes, bound, self._batch) for bound in bounds[1:-1]), [nodes[-1].args[0]]]
        self.layout = Layout.of(
            (f"{node.target}.{name}", values.shape)
            for node, layer in layers.items()
            for name, values in layer.named_parameters()
        )
        ranges = {entry.name: (entry.start, entry.stop) for entry in self.layout.entries}
        profiles = []
        for (node, layer), live in zip(layers.items(), self._cuts[1:], strict=True):
            name = str(node.target)
            profiles.append(
                LayerProfile(
                    name,
                    "conv2d" if isinstance(layer, nn.Conv2d) else "linear",
                    weight=ranges[f"{name}.weight"],
                    bias=ranges.get(f"{name}.bias"),
                    channels=len(layer.weight),
                    macs=observed[0][node][0].numel() * layer.weight[0].numel(),
                    live=tuple(_shape_of_sample(tensor, node, observed) for tensor in live),
                )
            )
        self.profile = ModelProfile(tuple(profiles), input_shape, num_classes=profiles[-1].live[0][0])

    @staticmethod
    def of(model: nn.Module, input_shape: tuple[int, ...]) -> Chain:
        """The chain of a copy of `model`, which maps f32[B, *input_shape] to scores f32[B, K] in evaluation.

        No other thread may use any module meanwhile: torch.fx changes what calling one does, in the whole process.

        PlanError where it cannot be cut: a parameter outside of Conv2d, Linear and batch norm, or one used twice; batch norm
        that does not directly follow a layer; control flow that depends on values. ConfigError for samples it does not take.
        """
        own = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        traced = _trace(own)
        _check_parameters(traced, own.state_dict(keep_vars=True))
        samples = torch.rand(BATCHES[0], *input_shape, generator=torch.Generator().manual_seed(0))
        expected = _scores(own, samples)
        _make_functional(traced)
        norms = _fold_batch_norms(traced, observe(traced, samples))
        chain = Chain(traced, tuple(input_shape), norms)
        with torch.no_grad():
            (found,) = chain.stage(0, len(chain.profile.layers))(samples)
        if not torch.allclose(found, expected, rtol=MAX_DIFFERENCE, atol=MAX_DIFFERENCE * float(expected.abs().max())):
            _refuse("its trace computes other scores", "remove what is random in evaluation, or changes tensors in place")
        return chain

    def vector(self) -> np.ndarray:
        """The weights of the model that the chain was made of, f32[P]."""
        vector = np.empty(self.layout.size, np.float32)
        for name, values in self.layout.tensors(vector).items():
            values[...] = self._traced.get_parameter(name).numpy()
        return vector

    def vector_of(self, model: nn.Module) -> np.ndarray:
        """The same of another model of this kind, in evaluation. Traces nothing, so it may run beside other threads."""
        vector = np.empty(self.layout.size, np.float32)
        tensors = self.layout.tensors(vector)
        with torch.no_grad():
            for profile in self.profile.layers:
                layer: Any = model.get_submodule(profile.name)
                if profile.name in self._norms:
                    layer = _folded(layer, model.get_submodule(self._norms[profile.name]))
                for key, values in layer.named_parameters():
                    tensors[f"{profile.name}.{key}"][...] = values.numpy()
        return vector

    def stage(self, start: int, stop: int, vector: np.ndarray | None = None) -> fx.GraphModule:
        """Layers `[start, stop)` with their weights copied from `vector` (f32[P]; by default the model's).

        `forward(*live) -> tuple` takes the live tensors of cut `start`, f32[B, ...] of any B, and returns those of `stop`.
        """
        if not 0 <= start < stop <= len(self._runs):
            raise ConfigError(f"layers [{start}, {stop}) are no stage of a model of {len(self._runs)} layers")
        tensors = self.layout.tensors(self.vector() if vector is None else vector)
        graph, parts = fx.Graph(), {}
        copies = {node: graph.placeholder(f"live{k}") for k, node in enumerate(self._cuts[start])}
        first_live = next(iter(copies.values()))

        def bring(node: fx.Node) -> fx.Node:
            """The node's copy. What hangs on no live tensor (a constant, the batch's size) is computed anew in each stage."""
            if node not in copies:
                is_batch = node is self._batch
                copies[node] = graph.call_method("size", (first_live, 0)) if is_batch else graph.node_copy(node, bring)
                if node.op in ("call_module", "get_attr"):
                    parts[str(node.target)] = self._part(str(node.target), tensors)
            return copies[node]

        for run in self._runs[start:stop]:
            for node in run:
                bring(node)
        graph.output(tuple(copies[node] for node in self._cuts[stop]))
        return fx.GraphModule(parts, graph, class_name="Stage").eval()

    def _part(self, target: str, tensors: Mapping[str, np.ndarray]) -> Any:
        """The module or constant at `target`; a layer has values of its own, copied from `tensors`."""
        owner, _, name = target.rpartition(".")
        part = getattr(self._traced.get_submodule(owner), name)
        if f"{target}.weight" in tensors:
            part = copy.copy(part)
            part._parameters = {
                key: None if values is None else nn.Parameter(torch.tensor(tensors[f"{target}.{key}"]), requires_grad=False)
                for key, values in part._parameters.items()
            }
        return part


def _refuse(why: str, remedy: str) -> NoReturn:
    raise PlanError(f"the model cannot be cut: {why}; {remedy}, or serve it whole, at the server")


def _trace(model: nn.Module) -> fx.GraphModule:
    """The model's graph, with one input, at the front, and one output."""
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # whatever the user's code raises when it meets a tensor without values
        reason = str(error).partition("\n")[0] or type(error).__name__
        _refuse(f"it cannot be traced ({reason})", "let its `if`, `for` and `len` not depend on the input")
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    used = [node for node in inputs if node.users]
    if len(used) != 1:
        _refuse(f"it takes {len(used)} inputs ({', '.join(map(str, inputs))})", "let it take one tensor")
    for node in inputs:
        if node is not used[0]:
            traced.graph.erase_node(node)
    return traced


def layer_of(traced: fx.GraphModule, node: fx.Node) -> nn.Conv2d | nn.Linear | None:
    """The node's layer; what inherits from one has a forward of its own, which is traced."""
    module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, nn.Conv2d | nn.Linear) else None


def _check_parameters(traced: fx.GraphModule, state: Mapping[str, Tensor]) -> None:
    """Every parameter in use is one of a Conv2d, a Linear or batch norm, and is used once; `state` is the model's."""
    users: dict[int, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node.target in state:
            if isinstance(state[node.target], nn.Parameter):
                _refuse(f"parameter {node.target!r} is used outside of a layer", KEEP_PARAMETERS)
            _refuse(f"buffer {node.target!r} is used outside of batch norm", "register a constant with persistent=False")
        if node.op != "call_module":
            continue
        module = traced.get_submodule(node.target)
        if not (layer_of(traced, node) or isinstance(module, _BatchNorm)) and next(module.parameters(), None) is not None:
            _refuse(f"layer {node.target!r} is of kind {type(module).__name__}, which has parameters", KEEP_PARAMETERS)
        for values in module.parameters():
            other = users.setdefault(id(values), node)
            if other is not node:
                _refuse(f"{other.target!r} and {node.target!r} use the same parameters", "give each its own")
    if not any(layer_of(traced, node) for node in traced.graph.nodes):
        _refuse("it has neither a convolution nor a linear layer", "add one")


def _scores(model: nn.Module, samples: Tensor) -> Tensor:
    """What the model itself computes."""
    try:
        with torch.no_grad():
            scores = model(samples.clone())
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"the model does not take samples of shape {tuple(samples.shape[1:])}: {reason}") from error
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(samples):
        found = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        _refuse(f"it returns {found} for {len(samples)} samples", "let it return scores, f32[B, K]")
    return scores


def _make_functional(traced: fx.GraphModule) -> None:
    """Nothing writes into its input any more, so that a live tensor stays as it was sent; dropout and identity are left out."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module":
            module = traced.get_submodule(node.target)
            if isinstance(module, _DropoutNd | nn.Identity):
                node.replace_all_uses_with(node.args[0])
                traced.graph.erase_node(node)
            elif getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        elif node.op == "call_function":
            node.target = FUNCTIONAL.get(node.target, node.target)
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            node.target = node.target[:-1]
    traced.graph.eliminate_dead_code()


class _Observer(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def observe(traced: fx.GraphModule, *inputs: Tensor) -> dict[fx.Node, Any]:
    """The value of every node of a graph that is given `inputs`."""
    observer = _Observer(traced)
    with torch.no_grad():
        observer.run(*inputs)
    return observer.values


def _fold_batch_norms(traced: fx.GraphModule, values: Mapping[fx.Node, Any]) -> dict[str, str]:
    """The names of the layers that had one, and its name."""
    norms = {}
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(norm := traced.get_submodule(node.target), _BatchNorm):
            continue
        before = node.args[0]
        layer = layer_of(traced, before)
        of_sequences = isinstance(layer, nn.Linear) and values[before].ndim > 2
        if layer is None or of_sequences or len(before.users) > 1 or norm.running_mean is None:
            _refuse(
                f"batch norm {node.target!r} cannot be folded into {before.target!r}",
                "let it alone directly follow a convolution, or a linear layer of f32[B, n]",
            )
        traced.set_submodule(before.target, _folded(layer, norm))
        norms[str(before.target)] = str(node.target)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    return norms


def _folded(layer: nn.Conv2d | nn.Linear, norm: Any) -> nn.Module:
    return fuse_linear_bn_eval(layer, norm) if isinstance(layer, nn.Linear) else fuse_conv_bn_eval(layer, norm)


def _resolve_sizes(traced: fx.GraphModule, observed: list[dict[fx.Node, Any]]) -> fx.Node:
    """Puts constants in the place of shapes, and for the batch's size one node, which is returned."""
    graph = traced.graph
    source = next(iter(graph.nodes))
    with graph.inserting_after(source):
        batch = graph.call_method("size", (source, 0))

    def resolved(found: Any, found_again: Any) -> Any:
        if isinstance(found, tuple):
            return tuple(map(resolved, found, found_again))
        return batch if (found, found_again) == BATCHES else found

    def size_or_node(node: fx.Node) -> Any:
        values = [run[node] for run in observed if node in run]
        if not all(map(_is_size, values)) or not values:
            return node
        value = resolved(*values)
        for size, found in zip(BATCHES, values, strict=True):
            if map_arg(value, lambda _: size) != found:  # noqa: B023
                return node  # such as 2B, which is computed from B
        return value

    for node in graph.nodes:
        if node.op != "placeholder":
            node.args, node.kwargs = map_arg(node.args, size_or_node), map_arg(node.kwargs, size_or_node)
    graph.eliminate_dead_code()
    traced.recompile()
    return batch


def _is_size(value: Any) -> bool:
    return type(value) is int or (isinstance(value, tuple) and all(map(_is_size, value)))


def _live(nodes: list[fx.Node], bound: int, batch: fx.Node) -> list[fx.Node]:
    """What is computed from the input before `nodes[bound]` and needed there or later; from more than the batch's size."""
    varying = {nodes[0]}
    for node in nodes[1:bound]:
        if node is not batch and varying.intersection(node.all_input_nodes):
            varying.add(node)
    later = set(nodes[bound:])
    return [node for node in nodes[:bound] if node in varying and not later.isdisjoint(node.users)]


def _shape_of_sample(node: fx.Node, layer: fx.Node, observed: list[dict[fx.Node, Any]]) -> Shape:
    """Of what goes over the cut after `layer`."""
    values = [run[node] for run in observed]
    is_tensor = all(isinstance(value, Tensor) and value.dtype == torch.float32 for value in values)
    if not is_tensor or any(value.shape != (batch, *values[0].shape[1:]) for batch, value in zip(BATCHES, values, strict=True)):
        what = f"{node.name!r}, which would go over the cut after {layer.target!r}, is no f32[B, ...]"
        _refuse(what, "compute it anew where it is needed")
    return tuple(values[0].shape[1:])
