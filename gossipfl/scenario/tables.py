"""The tables of a scenario but for what is emulated (`emulation`): their keys, with defaults that run."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self, cast

from pydantic import ConfigDict, Field, model_validator

from gossipfl.scenario.problems import misplaced_key, shown
from gossipfl.scenario.values import (
    Arguments,
    DurationS,
    ExistingPath,
    Fraction,
    FunctionName,
    Patience,
    Staleness,
    Table,
    Text,
    toml_value,
)


class _OpenTable(Table):
    """A table that also takes the arguments of what its `kind` names."""

    model_config = ConfigDict(extra="allow")
    dotted_name: ClassVar[str]

    @property
    def args(self) -> dict[str, Any]:
        """The keys beside `kind`."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="after")
    def _check_args(self) -> Self:
        for name, value in self.args.items():
            if sentence := misplaced_key(self.dotted_name, name):
                raise ValueError(sentence)
            try:
                cast(dict[str, Any], self.__pydantic_extra__)[name] = toml_value(value)
            except ValueError as error:
                raise ValueError(f"{self.dotted_name}.{name} = {shown(value)} {error}") from None
        return self


class Seeds(Table):
    """[seed] What is random, each part by its own seed; `seed = 3` sets all three."""

    data: int = Field(default=0, ge=0, description="test split and partition")
    model: int = Field(default=0, ge=0, description="first values of the model that all peers start from")
    protocol: int = Field(default=0, ge=0, description="topology, neighbour choices, batches")


class Partition(_OpenTable):
    """[data.partition] How the training samples are dealt to the peers."""

    dotted_name = "data.partition"
    kind: Text = Field(
        default="iid", description="iid, dirichlet, shards, ..., or package.module:function; its arguments beside it"
    )


class Data(Table):
    """[data] What the peers learn from."""

    kind: Text = Field(default="digits", description="data set: a registered name or package.module:function")
    path: ExistingPath | None = Field(default=None, description="its file or folder, relative to the scenario file")
    test_fraction: Fraction = Field(
        default=0.2, gt=0, lt=1, description="share of the samples held out, where no test set is given"
    )
    calibration_fraction: Fraction = Field(default=0.0, ge=0, lt=1, description="share of the samples kept for calibration")
    args: Arguments = Field(default_factory=dict, description="further arguments of the data set")
    partition: Partition = Field(default=Partition(), description="how the samples are dealt to the peers")

    @model_validator(mode="after")
    def _leaves_some_to_train(self) -> Data:
        if self.test_fraction + self.calibration_fraction >= 1:
            raise ValueError(
                f"data.test_fraction = {self.test_fraction} and data.calibration_fraction = {self.calibration_fraction} "
                "leave nothing to train on; lower one of them"
            )
        return self


class Training(Table):
    """[training] What a peer does between two exchanges."""

    local_epochs: int | None = Field(default=None, ge=1, description="passes over the peer's own samples per round (default 1)")
    local_steps: int | None = Field(default=None, ge=1, description="batches per round, instead of local_epochs")
    batch_size: int = Field(default=32, ge=1, description="samples per batch")
    learning_rate: float = Field(default=0.05, gt=0, description="step size of the optimizer")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 penalty; decoupled with adamw")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="sgd", description="sgd, adam or adamw")
    reset_optimizer: bool = Field(default=False, description="forget momenta after each exchange instead of keeping them")
    buffers: Literal["average", "local"] = Field(
        default="average", description="batch norm statistics: averaged, or each its own"
    )
    device: Text = Field(default="cpu", description="torch device, such as cpu or cuda:0")
    fast_math: bool = Field(default=False, description="allow kernels whose results differ in the last bits from run to run")
    threads: int = Field(default=1, ge=1, description="torch threads per process")
    step: FunctionName | None = Field(default=None, description="package.module:function, a training step of one's own")
    engine: Literal["auto", "loop", "stacked"] = Field(
        default="auto", description="virtual clock: one peer after another, or many as one; auto = the faster from 64 peers on"
    )

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> Training:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError(
                f"training.local_epochs = {self.local_epochs} and training.local_steps = {self.local_steps} "
                "exclude each other; remove one"
            )
        if self.local_epochs is None and self.local_steps is None:
            object.__setattr__(self, "local_epochs", 1)
        return self


class Gossip(Table):
    """[gossip] Who sends what to whom after each local training, and how copies become one model."""

    protocol: Text = Field(default="gossip", description="the protocol's name")
    segments: int = Field(default=8, ge=1, le=128, description="segments that the model is cut into (S)")
    segmentation: Literal["even", "by_layer"] = Field(default="even", description="equal segments, or whole tensors")
    replicas: int = Field(default=2, ge=1, description="neighbours that each segment is pulled from (R)")
    codec: Text = Field(default="float32", description="how values travel: float32, float16, int8, topk:0.1, ...")
    mixing: Literal["data_size", "uniform", "metropolis_hastings"] = Field(
        default="data_size", description="weights of the copies"
    )
    aggregation: Text = Field(default="mean", description="rule that makes one of the copies of a segment")
    selection: Text = Field(
        default="uniform",
        description="uniform: replicas random neighbours; all of them; bandwidth: rather those with fast links; or a function",
    )
    exploration: Fraction = Field(
        default=0.5, ge=0, le=1, description="with selection = 'bandwidth': share of the segments whose neighbours are random"
    )
    max_staleness: Staleness = Field(
        default=0, description="age in rounds up to which a neighbour's model is used; inf = asynchronous"
    )
    staleness_exponent: float = Field(default=0.5, ge=0, description="a copy a rounds old weighs (1 + a) ** -exponent")
    patience: Patience = Field(
        default="auto", description="seconds per round to wait for neighbours; auto = max(10 s, 4 x own training time)"
    )
    versions_kept: int = Field(default=4, ge=1, description="own models kept for slower neighbours")
    linger_s: float = Field(default=10.0, ge=0, description="seconds to keep serving after the last round")
    join_timeout_s: float = Field(default=30.0, gt=0, description="seconds to wait for the first neighbours")
    quorum: int | None = Field(default=None, ge=0, description="neighbours needed to begin (default: half of them, rounded up)")

    @model_validator(mode="after")
    def _mixing_fits_selection(self) -> Gossip:
        if self.mixing == "metropolis_hastings" and self.selection != "all":
            raise ValueError(
                f"gossip.mixing = 'metropolis_hastings' with gossip.selection = {self.selection!r} would not average "
                "evenly: its weights are for all neighbours; set gossip.selection = 'all'"
            )
        return self


class Topology(_OpenTable):
    """[topology] Who may talk to whom."""

    dotted_name = "topology"
    kind: Text = Field(
        default="full", description="full, ring, regular, file, ..., or package.module:function; its arguments beside it"
    )
    dynamic: bool = Field(default=False, description="a graph of its own for each round, drawn by the seed")

    @model_validator(mode="after")
    def _can_be_redrawn(self) -> Topology:
        if self.dynamic and self.kind == "file":
            raise ValueError(
                "topology.dynamic = True draws a graph for each round, and topology.kind = 'file' gives one; "
                "remove dynamic, or choose a kind that is drawn, such as 'regular'"
            )
        return self


class Transport(Table):
    """[transport] How peers reach each other."""

    kind: Literal["tcp", "ipc", "inproc"] = Field(default="tcp", description="tcp, ipc (one machine) or inproc (one process)")
    host: Text = Field(default="127.0.0.1", description="address that peers listen on")
    advertise: Text | None = Field(default=None, description="address that peers tell others, where it differs from host")


class Inference(Table):
    """[inference] Serving the peers' models to devices while they train."""

    serve: bool = Field(default=False, description="whether every peer serves its newest model, as <name>-p0, <name>-p1, ...")
    port: int = Field(
        default=0, ge=0, le=65535, description="where the first process listens for devices, the next one at the next; 0 = any"
    )
    every: int = Field(
        default=1, ge=1, description="rounds between two versions; those that end while one is calibrated are passed over"
    )
    alpha: Fraction = Field(default=0.02, gt=0, lt=1, description="share of answers that may differ from the full model's")
    delta: Fraction = Field(default=0.05, gt=0, lt=1, description="probability that more do all the same")
    max_samples: int = Field(
        default=600, ge=1, description="samples that a version is calibrated on, of those that were trained on and of others"
    )


class Stop(Table):
    """[stop] What ends a run early."""

    rounds: int | None = Field(
        default=None, ge=1, description="lowers the top-level rounds, or sets them where those are left out"
    )
    target_accuracy: Fraction | None = Field(default=None, ge=0, le=1, description="mean test accuracy that is enough")
    duration: DurationS | None = Field(default=None, description="seconds, or text such as '90s', '10min', '1h'")
