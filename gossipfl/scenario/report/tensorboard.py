"""The curves of a report for TensorBoard: a folder per run, the round as the step, the run's time as the wall time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gossipfl.errors import ConfigError
from gossipfl.scenario.report.curves import accuracy_curve, staleness_by_round
from gossipfl.scenario.report.reading import Run, read_runs

SUFFIX = ".gossipfl"
"""Of the files that are written here, so that nobody else's are replaced."""
Series = tuple[str, np.ndarray, np.ndarray, np.ndarray]
"""A tag, and f64 columns of rounds, values and seconds."""


def summary_writer() -> Any:
    """torch's SummaryWriter. ConfigError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs tensorboard, which is not installed: pip install 'gossipfl[tensorboard]'"
        ) from error
    return SummaryWriter


def write_tensorboard(folders: Sequence[Path], out: Path) -> None:
    """Write the curves of the runs in `folders` below `out`, for `tensorboard --logdir`, in the place of an earlier export.

    ConfigError if a folder holds no run, or tensorboard is not installed.
    """
    SummaryWriter = summary_writer()
    for run in read_runs(folders):
        folder = out / re.sub(r"[^\w.-]+", "-", run.name).strip("-.")
        for earlier in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            earlier.unlink()  # TensorBoard would draw both as one curve
        with SummaryWriter(log_dir=str(folder), filename_suffix=SUFFIX) as writer:
            for tag, rounds, values, times_s in _series(run):
                for round_, value, time_s in zip(rounds, values, times_s, strict=True):
                    if np.isfinite(value):
                        writer.add_scalar(tag, value, int(round_), walltime=float(np.nan_to_num(time_s)))


def _series(run: Run) -> Iterator[Series]:
    curve, staleness, states = accuracy_curve(run), staleness_by_round(run), run.states
    for tag, values in (
        ("accuracy/mean", curve.mean),
        ("accuracy/worst", curve.least),
        ("accuracy/best", curve.greatest),
        ("accuracy/average_model", curve.average_model),
        ("received_mib_per_peer", curve.received_mib_per_peer),
    ):
        yield tag, curve.round, values, curve.time_s
    yield "consensus_distance", states["round"], states["consensus_distance"], states["time_s"]
    for tag in ("staleness_mean", "staleness_max"):
        yield tag, staleness["round"], staleness[tag], staleness["time_s"]
