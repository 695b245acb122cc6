"""`gossipfl export`: a run's model as a file that other software reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from gossipfl.errors import ConfigError
from gossipfl.inference.execution.chain import Chain
from gossipfl.scenario.inference.trained import Trained

FORMATS = ("safetensors", "onnx")


def export_model(trained: Trained, format_: str, out: Path | None) -> Path:
    """The path of the file: by default in `exported/` of the run's folder.

    safetensors has the tensors by the names of the model's `state_dict` (batch norm's counters are not among them). ONNX has
    the network with batch norm folded, from `input` f32[B, ...] to `scores` f32[B, K]; its metadata say how images are
    normalised.
    """
    path = out or trained.folder / "exported" / f"{trained.name}.{format_}"
    if path.is_dir():
        raise ConfigError(f"--out {path} is a folder; name a file in it, as {path / f'{trained.name}.{format_}'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if format_ == "safetensors":
        shutil.copyfile(trained.file, path)
    else:
        _write_onnx(trained, path)
    return path


def _write_onnx(trained: Trained, path: Path) -> None:
    try:
        import onnx

        from gossipfl.inference.execution.onnx import export
    except ImportError as error:
        raise ConfigError(f"exporting ONNX needs {error.name}, which is not installed: pip install 'gossipfl[ort]'") from error
    dataset = trained.dataset
    chain = Chain.of(trained.model, dataset.input_shape)
    inputs = torch.tensor(np.asarray(trained.test_samples[0][:2]))
    partial = path.with_name(f".{path.name}.part")
    export(chain.stage(0, len(chain.profile.layers)), (inputs,), ["input"], partial)
    model = onnx.load(partial)
    partial.unlink()
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "out0" else name for name in node.output]
    model.graph.output[0].name = "scores"
    facts = {
        "scenario": trained.scenario.name,
        "model": trained.name,
        "version": trained.version,
        "classes": dataset.num_classes,
        "mean of x / 255": dataset.mean,
        "std of x / 255": dataset.std,
    }
    for key, value in facts.items():
        if value is not None:
            model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.checker.check_model(model)
    onnx.save(model, path)
