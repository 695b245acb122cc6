"""A stage of a chain in 8-bit arithmetic: torch's quantized kernels, with scales fixed by calibration.

    module = quantize(stage, inputs)      # as the stage, f32 in and out

Activations are 7-bit codes with one scale for each tensor, weights i8 with one for each output channel. Values stay codes from
one layer to the next, through relu, max pooling, padding, slices and residual adds; what has no exact counterpart on codes
(means, say) happens in f32 between. Scales do not depend on the batch, so neither does a sample's answer. Seven bits, since
kernels of processors without dot products of bytes (AVX2) add pairs of products in 16 bits, where 2 x 255 x 127 saturates and
2 x 127 x 127 does not: a certificate holds on every machine.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gossipfl.inference.execution.chain import layer_of, observe

KERNELS = ("conv2d", "conv2d_prepack", "conv2d_relu", "linear", "linear_prepack", "linear_relu", "add", "add_relu")
TO_FLOAT = "linear_with_input_q_dq_qweight_dq_output_fp32"
ADDS = (operator.add, torch.add, "add")
RELUS = (nn.ReLU, F.relu, torch.relu, "relu")
FLATTENS = (nn.Flatten, torch.flatten)
SAME_ON_CODES = (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, *FLATTENS, F.pad, operator.getitem)
"""What selects or arranges values and computes none."""

LARGEST_CODE = 127
"""Of activations."""


class Codes(NamedTuple):
    """value = scale * (code - zero), code in 0..LARGEST_CODE."""

    scale: float
    zero: int


def missing_kernels() -> list[str]:
    """Those that this build of torch has not, or no machine for; none where `quantize` works."""
    if torch.backends.quantized.engine == "none":
        return ["an engine for quantized kernels"]
    return [name for name in (*KERNELS, TO_FLOAT) if not hasattr(torch.ops.quantized, name)]


def quantize(stage: fx.GraphModule, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The stage in 8 bits; `inputs` are live tensors of typical samples, f32[n, ...], that decide the scales."""
    return _Quantizer(stage, inputs).module()


class _Quantizer:
    """Writes the stage's graph anew; each of its values is there as f32, as codes, or as both where both are needed."""

    def __init__(self, stage: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
        self._stage, self._values = stage, observe(stage, *inputs)
        self._graph = fx.Graph()
        self._parts: dict[str, Any] = {}
        self._floats: dict[fx.Node, Any] = {}
        self._codes: dict[fx.Node, tuple[fx.Node, Codes]] = {}
        self._channels_last: set[fx.Node] = set()  # flattened so

    def module(self) -> fx.GraphModule:
        for node in self._stage.graph.nodes:
            if node not in self._codes:  # else a relu that the kernel before it has done
                self._write(node)
        return fx.GraphModule(self._parts, self._graph, class_name="Int8Stage").eval()

    def _write(self, node: fx.Node) -> None:
        kernels, layer, kind = torch.ops.quantized, layer_of(self._stage, node), self._kind(node)
        source: Any = node.args[0] if node.args else None
        if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            how = (layer.stride, layer.padding, layer.dilation, layer.groups)
            packed = _packed_for_convolution(_codes_of_weight(layer.weight), layer.bias, *how)
            self._write_on_codes(node, "conv2d", self._as_codes(source), self._part(node, packed))
        elif isinstance(layer, nn.Linear):
            weight = self._with_channels_last(layer.weight, source) if source in self._channels_last else layer.weight
            packed = self._part(node, kernels.linear_prepack(_codes_of_weight(weight), layer.bias))
            if self._relu_of(node) or any(user.op != "output" for user in node.users):
                self._write_on_codes(node, "linear", self._as_codes(source), packed)
            else:  # scores are not rounded to codes
                given = (self._as_float(source), *self._range(source), packed)
                self._floats[node] = self._graph.call_function(getattr(kernels, TO_FLOAT), given)
        elif kind in ADDS and self._adds_tensors(node) and any(argument in self._codes for argument in node.all_input_nodes):
            terms: Any = node.args
            self._write_on_codes(node, "add", *map(self._as_codes, terms))
        elif kind in (*RELUS, *SAME_ON_CODES) and source in self._codes and self._is_same_on_codes(node):
            copy, codes = self._codes[source]
            self._codes[node] = self._on_codes(node, kind, source, copy, codes), codes
        else:
            self._floats[node] = self._copy(node, {})

    def _on_codes(self, node: fx.Node, kind: Any, source: fx.Node, copy: fx.Node, codes: Codes) -> fx.Node:
        """What arranges codes, done so that it takes little time: they lie with their channels last in memory."""
        if kind is F.pad and (channels := _padded_channels(node, self._values[source].shape)):
            packed = _packed_for_convolution(_identity(*channels), None, (1, 1), (0, 0), (1, 1), 1)
            return self._graph.call_function(torch.ops.quantized.conv2d, (copy, self._part(node, packed), *codes))
        if kind in FLATTENS and self._is_image_for_linear(node, source):
            self._channels_last.add(node)
            copy = self._graph.call_method("permute", (copy, 0, 2, 3, 1))
            return self._graph.call_method("flatten", (copy, 1))
        return self._copy(node, {source: copy})

    def _is_image_for_linear(self, node: fx.Node, source: fx.Node) -> bool:
        shape, layers = self._values[source].shape, [layer_of(self._stage, user) for user in node.users]
        is_image = len(shape) == 4 and self._values[node].shape == (shape[0], shape[1:].numel())
        return is_image and all(isinstance(layer, nn.Linear) for layer in layers)

    def _with_channels_last(self, weight: Tensor, flattened: fx.Node) -> Tensor:
        """Its columns in the order of what is flattened with its channels last."""
        shape = self._values[flattened.all_input_nodes[0]].shape[1:]
        return weight.view(-1, *shape).permute(0, 2, 3, 1).flatten(1)

    def _write_on_codes(self, node: fx.Node, kernel: str, *arguments: fx.Node) -> None:
        """The kernel's result as codes, with the relu that alone follows the node, if there is one."""
        relu = self._relu_of(node)
        function, result = getattr(torch.ops.quantized, f"{kernel}_relu" if relu else kernel), relu or node
        codes = self._range(result)
        self._codes[result] = self._graph.call_function(function, (*arguments, *codes)), codes

    def _copy(self, node: fx.Node, instead: dict[fx.Node, fx.Node]) -> fx.Node:
        if node.op in ("call_module", "get_attr"):
            self._parts[str(node.target)] = operator.attrgetter(str(node.target))(self._stage)
        copy = self._graph.node_copy(node, lambda argument: instead.get(argument) or self._as_float(argument))
        if node.op == "call_method" and node.target == "view":
            copy.target = "reshape"  # codes come with their channels last in memory
        return copy

    def _part(self, node: fx.Node, packed: Any) -> fx.Node:
        self._parts[f"{node.name}_packed"] = packed
        return self._graph.get_attr(f"{node.name}_packed")

    def _as_float(self, node: fx.Node) -> fx.Node:
        if node not in self._floats:
            self._floats[node] = self._graph.call_method("dequantize", (self._codes[node][0],))
        return self._floats[node]

    def _as_codes(self, node: fx.Node) -> fx.Node:
        if node not in self._codes:
            codes = self._range(node)
            given = (self._as_float(node), *codes, torch.quint8)
            self._codes[node] = self._graph.call_function(torch.quantize_per_tensor, given), codes
        return self._codes[node][0]

    def _range(self, node: fx.Node) -> Codes:
        low, high = (float(value) for value in self._values[node].aminmax())
        scale = (max(high, 0.0) - min(low, 0.0)) / LARGEST_CODE or 1.0
        return Codes(scale, round(-min(low, 0.0) / scale))

    def _kind(self, node: fx.Node) -> Any:
        return type(self._stage.get_submodule(str(node.target))) if node.op == "call_module" else node.target

    def _relu_of(self, node: fx.Node) -> fx.Node | None:
        user = next(iter(node.users))
        return user if len(node.users) == 1 and self._kind(user) in RELUS else None

    def _adds_tensors(self, node: fx.Node) -> bool:
        values = [self._values.get(argument) if isinstance(argument, fx.Node) else None for argument in node.args]
        shapes = {value.shape for value in values if isinstance(value, Tensor) and value.dtype == torch.float32}
        return not node.kwargs and len(shapes) == 1 and all(isinstance(value, Tensor) for value in values)

    def _is_same_on_codes(self, node: fx.Node) -> bool:
        if self._kind(node) is F.pad:
            return (*node.args, *node.kwargs.values())[2:] in ((), ("constant",), ("constant", 0), ("constant", None))
        return isinstance(self._values[node], Tensor)


def _codes_of_weight(weight: Tensor) -> Tensor:
    """i8, with a scale for each output channel."""
    scales = weight.flatten(1).abs().amax(1).double() / 127
    scales[scales == 0] = 1.0
    return torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8)


def _packed_for_convolution(*how: Any) -> Any:
    """For oneDNN where there is one. FBGEMM, which torch takes where there are no dot products of bytes, needs up to 1.5 times
    as long for one sample, and up to 5 times for 64."""
    with _engine("onednn"):
        return torch.ops.quantized.conv2d_prepack(*how)


@contextlib.contextmanager
def _engine(name: str) -> Iterator[None]:
    backends: Any = torch.backends.quantized
    before = backends.engine
    if name in backends.supported_engines:
        backends.engine = name
    try:
        yield
    finally:
        backends.engine = before


def _padded_channels(node: fx.Node, shape: torch.Size) -> tuple[int, int, int] | None:
    """Channels before, within and after, where zeros are added to the channels of images alone."""
    pads = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    match pads:
        case (0, 0, 0, 0, int(before), int(after)) if len(shape) == 4 and min(before, after) >= 0:
            return before, shape[1], after
    return None


def _identity(before: int, channels: int, after: int) -> Tensor:
    """i8 weights of a 1x1 convolution that takes codes to the same codes with zeros around: a quarter of what padding takes."""
    weight = torch.zeros(before + channels + after, channels, 1, 1)
    weight[before : before + channels, :, 0, 0] = torch.eye(channels)
    return torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8)
