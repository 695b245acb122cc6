"""A stage of a chain in onnxruntime's 8-bit arithmetic (extra `ort`): u8 activations of fixed scales, 7-bit weights by channel.

Seven bits, since processors without dot products of bytes (AVX2) add pairs of products in 16 bits, where 2 x 255 x 127
saturates and 2 x 255 x 64 does not. Its mode that is exact with eight takes 1.4 times as long there.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, fx

OPSET = 17


def quantized_session(stage: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """The stage in 8 bits; `inputs` are live tensors of calibration samples, f32[n, ...]."""
    names = [f"live{index}" for index in range(len(inputs))]
    with tempfile.TemporaryDirectory() as folder, _root_logger_as_it_is():
        exported, simplified, quantized = (Path(folder) / f"{step}.onnx" for step in ("exported", "simplified", "quantized"))
        export(stage, inputs, names, exported)
        # Constants are folded first, or convolutions that share one through an Identity stay in f32.
        _session(exported, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, simplified)
        model = onnx.load(simplified)
        model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")  # else it advises to do that
        quantize_static(
            model,
            quantized,
            _Samples(names, inputs),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},  # scores are not rounded to codes
        )
        session = _session(quantized, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)

    def run(*live: Tensor) -> tuple[Tensor, ...]:
        arrays = (tensor.numpy() for tensor in live)
        return tuple(map(torch.from_numpy, session.run(None, dict(zip(names, arrays, strict=True)))))

    return run


def export(stage: fx.GraphModule, inputs: tuple[Tensor, ...], names: list[str], path: Path) -> None:
    """Write the stage in f32 as ONNX, for any batch size; its inputs are called `names`, its outputs out0, out1, ..."""
    outputs = [f"out{index}" for index in range(len(stage(*inputs)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter that needs no other package
        torch.onnx.export(
            stage,
            tuple(tensor[:1] for tensor in inputs),
            path,
            dynamo=False,  # its successor takes seconds for a stage, and another package
            input_names=names,
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in (*names, *outputs)},
            opset_version=OPSET,
        )


def _session(
    model: Path, level: onnxruntime.GraphOptimizationLevel, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextmanager
def _root_logger_as_it_is() -> Iterator[None]:
    """onnxruntime's Python logs to the root logger, which configures it where nobody has."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


class _Samples(CalibrationDataReader):
    def __init__(self, names: list[str], inputs: tuple[Tensor, ...]) -> None:
        samples = zip(*(tensor.split(1) for tensor in inputs), strict=True)
        self._samples: Iterator = iter([dict(zip(names, (t.numpy() for t in sample), strict=True)) for sample in samples])

    def get_next(self) -> dict | None:
        return next(self._samples, None)
