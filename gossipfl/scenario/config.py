"""The scenario: everything that decides a run, with defaults that run.

    scenario = load_scenario("quickstart", ["peers=12", "gossip.segments=4"])
    scenario = load_scenario("my_scenario.toml")
    scenario = Scenario(peers=16, topology={"kind": "regular", "degree": 4})
    scenario.gossip.replicas, scenario.to_toml(), scenario.sha256

Its tables (in `tables` and `emulation`) are those of the TOML file, and each field is a key with its unit. A key is either
known or an error; only `[data.partition]` and `[topology]` also take the arguments of what their `kind` names. Values are
frozen. Reading a scenario loads neither torch nor, unless its topology is drawn or read from a file, networkx.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tomli_w
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from gossipfl.errors import ConfigError
from gossipfl.overlay.churn import Churn as PeerChurn
from gossipfl.overlay.devices import Devices
from gossipfl.overlay.graphs import RedrawnTopology
from gossipfl.overlay.graphs import Topology as PeerTopology
from gossipfl.overlay.links import Links, check_links
from gossipfl.overlay.topology import build_topology, redrawn_topology
from gossipfl.plain import without_numpy
from gossipfl.registry import Registry, did_you_mean
from gossipfl.scenario.emulation import Churn, Compute, Network, unknown_peers
from gossipfl.scenario.problems import PROTOCOLS_HERE, Problem, ScenarioError, problems_of
from gossipfl.scenario.sources import apply_overrides, line_of, read_toml, resolve_paths, scenario_file
from gossipfl.scenario.tables import Data, Gossip, Inference, Seeds, Stop, Topology, Training, Transport
from gossipfl.scenario.values import Arguments, Table, Text, three_seeds

if TYPE_CHECKING:
    from gossipfl.protocol.baselines import Scheduled

BUILT_IN_MODELS = ("cnn", "gpt", "lenet5", "mlp", "resnet20")
MOST_PEERS = 1_000_000
"""Far beyond what any memory holds; the tables of so many are made in seconds, before that is known."""
MANY_PEERS = 64
"""From here on a run is simulated unless it asks for sockets, and the faster of two engines is looked for."""
BUILT_IN_CODECS = ("bfloat16", "float16", "float32", "int4", "int8", "randomk", "topk")


class Scenario(Table):
    """A run. Construction raises `ScenarioError`, with a line for each problem; `load_scenario` also checks the graph."""

    name: str = Field(default="scenario", description="letters, digits, '.', '_' and '-' (default: the file's name)")
    seed: Annotated[Seeds, BeforeValidator(three_seeds)] = Field(default=Seeds(), description="a number, or [seed]")
    peers: int = Field(default=8, ge=1, le=MOST_PEERS, description="number of peers, p0, p1, ...")
    rounds: int = Field(default=20, ge=1, description="rounds of training and exchange")
    min_peers: int = Field(
        default=cast(int, None), ge=1, description="peers that must finish for a run to count (default: half, rounded up)"
    )
    peers_per_process: int | None = Field(
        default=None, ge=1, description="peers that share a process (default: the launcher's choice)"
    )
    model: Text = Field(default="mlp", description="network: a registered name or package.module:function")
    model_args: Arguments = Field(default_factory=dict, description="its arguments")
    evaluate_every: int = Field(default=1, ge=0, description="rounds between evaluations; 0 = after the last round only")
    central: bool = Field(default=False, description="also train one model on all the data, for comparison")
    clock: Literal["auto", "virtual", "local", "netns"] = Field(
        default="auto",
        description="virtual time; real sockets; the same in network namespaces; auto = virtual where something is emulated or "
        "64 peers are there",
    )
    data: Data = Field(default=Data())
    training: Training = Field(default=Training())
    gossip: Gossip = Field(default=Gossip())
    topology: Topology = Field(default=Topology())
    network: Network = Field(default=Network(), description="emulated links")
    compute: Compute = Field(default=Compute(), description="emulated devices")
    churn: Churn = Field(default=Churn(), description="peers that come and go")
    transport: Transport = Field(default=Transport())
    inference: Inference = Field(default=Inference(), description="serving while training")
    stop: Stop = Field(default=Stop())

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**without_numpy(values))
        except ValidationError as error:
            raise ScenarioError(problems_of(error, Scenario)) from None
        if problems := [*unknown_peers(self._emulated, self.peers), *self._unreachable(), *self._unseen()]:
            raise ScenarioError(problems)

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):  # it names the folder of the results
            raise ValueError("must be made of letters, digits, '.', '_' and '-', and not begin with '.' or '-'")
        return name

    @field_validator("min_peers")
    @classmethod
    def _min_peers_exist(cls, min_peers: int, info: ValidationInfo) -> int:
        peers = info.data.get("peers", min_peers)  # absent when it is itself wrong
        if min_peers > peers:
            raise ValueError(f"exceeds peers = {peers}; lower it")
        return min_peers

    @model_validator(mode="after")
    def _derive(self) -> Scenario:
        if self.min_peers is None:
            object.__setattr__(self, "min_peers", math.ceil(self.peers / 2))
        if self.stop.rounds is not None:
            given = self.rounds if "rounds" in self.model_fields_set else self.stop.rounds
            object.__setattr__(self, "rounds", min(given, self.stop.rounds))
        return self

    @property
    def data_seed(self) -> int:
        return self.seed.data

    @property
    def model_seed(self) -> int:
        return self.seed.model

    @property
    def protocol_seed(self) -> int:
        return self.seed.protocol

    @property
    def peer_names(self) -> list[str]:
        """["p0", "p1", ...]; a peer's number is its index in the topology."""
        return [f"p{index}" for index in range(self.peers)]

    @property
    def resolved_clock(self) -> Literal["virtual", "local", "netns"]:
        """The clock; "auto" is virtual time where there are links, devices, churn or many peers, and else this machine's."""
        if self.clock != "auto":
            return self.clock
        return "virtual" if self.is_emulated or self.is_crowded else "local"

    @property
    def is_emulated(self) -> bool:
        """Whether it has links, devices or churn."""
        return any(table.model_fields_set for table in self._emulated.values())

    @property
    def is_crowded(self) -> bool:
        """Whether it has many peers, and says nothing that only sockets know of."""
        return self.peers >= MANY_PEERS and not self.asks_for_sockets

    @property
    def asks_for_sockets(self) -> bool:
        """Whether it says what only sockets know of."""
        return bool(self.inference.serve or self.peers_per_process or self.transport != Transport())

    def _unreachable(self) -> Iterator[Problem]:
        """Models that no device could call."""
        clock = self.resolved_clock
        if self.inference.serve and clock != "local":
            where = "nobody listens under virtual time" if clock == "virtual" else "no device is in these network namespaces"
            given = "" if self.clock == clock else f", which is {clock!r} here"
            yield Problem(
                "inference.serve",
                f"inference.serve = True with clock = {self.clock!r}{given}: {where}; set clock = 'local', or serve = false",
            )

    def _unseen(self) -> Iterator[Problem]:
        """A target that nobody would see reached, while the record would say that it was in the last round."""
        if self.stop.target_accuracy is not None and self.evaluate_every == 0:
            yield Problem(
                "evaluate_every",
                f"evaluate_every = 0 with stop.target_accuracy = {self.stop.target_accuracy}: nobody is evaluated before the "
                "last round; set evaluate_every = 1, or give no target",
            )

    @property
    def _emulated(self) -> dict[str, Network | Compute | Churn]:
        return {"network": self.network, "compute": self.compute, "churn": self.churn}

    def build_topology(self) -> PeerTopology:
        """The graph of this scenario; may import networkx."""
        kind, args = self.topology.kind, self.topology.args
        if self.topology.dynamic:
            return redrawn_topology(kind, self.peers, self.protocol_seed, args, self.rounds)
        return build_topology(kind, self.peers, self.protocol_seed, args)

    def build_links(self) -> Links:
        """The emulated network of this scenario."""
        return self.network.build(self.peers, self.protocol_seed)

    def build_devices(self) -> Devices:
        """The emulated devices of this scenario."""
        return self.compute.build(self.peers, self.protocol_seed)

    @property
    def late_peers(self) -> list[str]:
        """Those that are not there at the start."""
        churn = self.build_churn()
        return [name for index, name in enumerate(self.peer_names) if not churn.initially_online(index)]

    def build_churn(self) -> PeerChurn:
        """Who comes and goes in this scenario, and when."""
        return self.churn.build(self.peers, self.protocol_seed)

    def resolved(self) -> dict[str, Any]:
        """Every setting with its default filled in, as TOML values; what is None is left out."""
        values = self.model_dump(exclude_none=True)
        if len(set(values["seed"].values())) == 1:
            values["seed"] = self.data_seed
        unused = {key for key in (*self._emulated, "inference", "stop") if not getattr(self, key).model_fields_set}
        return {key: value for key, value in values.items() if key not in unused}

    def to_toml(self) -> str:
        """`resolved()` as a file, which loads back to an equal scenario."""
        return tomli_w.dumps(self.resolved())

    @property
    def sha256(self) -> str:
        """64 hex digits that differ when any setting but the name and the clock differs."""
        values = {key: value for key, value in self.resolved().items() if key not in ("name", "clock")}
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- loading


def load_scenario(source: str | Path | Mapping[str, Any] | Scenario, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario in a `.toml` file, of a built-in name ("quickstart"), or of a dictionary, changed by `key=value`s.

    A value is read as TOML, or else as text: `gossip.segments=4`, `name=mine`. Relative paths are looked for beside
    the file first, then in the current folder. ScenarioError tells every problem, with its line in the file.
    """
    scenario, refusal = load_graph(source, overrides)
    if refusal is not None:
        raise refusal
    return scenario


def load_graph(
    source: str | Path | Mapping[str, Any] | Scenario, overrides: Sequence[str] = ()
) -> tuple[Scenario, ScenarioError | None]:
    """`load_scenario` for who asks for the topology alone: also where a run on it would be refused, with the reason."""
    path, text = None, ""
    if not isinstance(source, str | Path | Mapping | Scenario):
        raise ConfigError(f"scenario = {source!r} must be a file, the name of a built-in one, a dictionary or a Scenario")
    if isinstance(source, Scenario):
        values = source.model_dump(exclude_unset=True)  # a default that follows from another key follows its override
    elif isinstance(source, Mapping):
        values = without_numpy(copy.deepcopy(dict(source)))
    else:
        path = scenario_file(source)
        values, text = read_toml(path)
        values.pop("engine", None)  # the record of a run tells what it was made with
        stem = path.stem if path.is_file() else ""  # a pipe has a number
        values.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip(".-") or "scenario")
    overridden = apply_overrides(values, overrides)
    resolve_paths(values, [path.parent, Path.cwd()] if path else [Path.cwd()])

    def located(problems: Sequence[Problem]) -> ScenarioError:
        return ScenarioError(problems if path is None else _located(problems, path, text, overridden))

    try:
        scenario = Scenario(**values)
        topology = _build_topology(scenario)
    except ScenarioError as error:
        raise located(error.problems) from None
    problems = _misfits(scenario, topology) or _emulation_problems(scenario, topology)
    return scenario, located(problems) if problems else None


def check_names(scenario: Scenario) -> None:
    """ConfigError, with a suggestion, for names that no registry knows: data set, partition, aggregation.

    The tables of models and codecs live in modules that import torch, which takes most of a second; the names that come with
    gossipfl are known here too. Others may be registered by the program, or by a module of the user's that the scenario names.
    """
    from gossipfl.aggregation import AGGREGATORS
    from gossipfl.learning.datasets import DATASETS
    from gossipfl.learning.partition import PARTITIONERS
    from gossipfl.overlay.selection import SELECTORS
    from gossipfl.protocol.baselines import PROTOCOLS

    gossip = scenario.gossip
    tables: Sequence[tuple[str, Registry[Any], str]] = [
        ("data.kind", DATASETS, scenario.data.kind),
        ("data.partition.kind", PARTITIONERS, scenario.data.partition.kind),
        ("gossip.aggregation", AGGREGATORS, gossip.aggregation),
        ("gossip.selection", SELECTORS, gossip.selection),
        ("gossip.protocol", PROTOCOLS, gossip.protocol),
    ]
    for key, table, name in tables:
        try:
            found = table.get(name)
        except ConfigError as error:
            ours = PROTOCOLS_HERE.get(re.sub("[-_]", "", name.lower())) if table is PROTOCOLS else None
            raise ConfigError(f"{key}: {error}{f'; {name} is {ours} here' if ours else ''}") from error
        if table is AGGREGATORS and not _takes(found, None, None, out=None):
            raise ConfigError(f"{key} = {name!r} is no aggregation rule: it must take (rows, weights, out)")
        if table is SELECTORS and not _takes(found, [], 1, {}, None):
            raise ConfigError(f"{key} = {name!r} is no selection: it must take (candidates, replicas, links, rng)")
        if table is PROTOCOLS and not _is_machine(found):
            raise ConfigError(
                f"{key} = {name!r} is no protocol: it must be called as (name, degrees, config, numbers) and have "
                "handle(event, now) and next_deadline, as gossipfl.Gossip does"
            )
    codec_name = gossip.codec.partition(":")[0]
    names_own_module = any(":" in name for name in (scenario.model, scenario.data.kind, scenario.training.step or ""))
    for key, kind, name, known, registered in (
        ("model", "model", scenario.model, BUILT_IN_MODELS, _if_loaded("gossipfl.learning.models", "MODELS")),
        ("gossip.codec", "codec", codec_name, BUILT_IN_CODECS, _if_loaded("gossipfl.segments.codecs", "CODECS")),
    ):
        if name not in known and name not in registered and not names_own_module:
            raise ConfigError(f"{key}: unknown {kind} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")


def _if_loaded(module: str, table: str) -> Container[str]:
    return getattr(sys.modules.get(module), table, ())


def _takes(function: Callable[..., Any], *args: Any, **named: Any) -> bool:
    """Whether it can be called so."""
    try:
        inspect.signature(function).bind(*args, **named)
    except (TypeError, ValueError):  # a value error is of what has no signature to be read
        return False
    return True


def _is_machine(protocol: Any) -> bool:
    if not _takes(protocol, "p0", {}, None, None):
        return False
    return not isinstance(protocol, type) or (hasattr(protocol, "handle") and hasattr(protocol, "next_deadline"))


def _build_topology(scenario: Scenario) -> PeerTopology:
    try:
        return scenario.build_topology()
    except ConfigError as error:
        raise ScenarioError([Problem("topology", str(error))]) from error


def _misfits(scenario: Scenario, topology: PeerTopology) -> list[Problem]:
    """Where the graph does not give every peer the neighbours that it is asked to use."""
    graphs = topology.rounds if isinstance(topology, RedrawnTopology) else [topology]
    degrees = {index: min(graph.degree(index) for graph in graphs) for index in range(topology.num_peers)}
    linked = {index: degree for index, degree in degrees.items() if degree > 0}  # a lone peer trains alone
    if not linked:
        return []
    poorest = min(linked, key=linked.__getitem__)
    gossip, problems = scenario.gossip, []
    draws = gossip.selection != "all" and getattr(_machine_of(gossip.protocol), "has_replicas", True)
    wanted = {"gossip.replicas": gossip.replicas if draws else 0, "gossip.quorum": gossip.quorum or 0}
    for key, number in wanted.items():
        if number > linked[poorest]:
            neighbours = "neighbour" if linked[poorest] == 1 else "neighbours"
            problems.append(
                Problem(
                    key,
                    f"{key} = {number} exceeds the {linked[poorest]} {neighbours} of p{poorest}; "
                    "lower it or densify the topology",
                )
            )
    if gossip.protocol == "fedavg" and degrees[0] < topology.num_peers - 1:
        problems.append(
            Problem(
                "topology.kind",
                f"gossip.protocol = 'fedavg' has its server at p0, which is linked to {degrees[0]} of {topology.num_peers - 1} "
                f"peers; use topology.kind = 'star' or 'full'{', and no dynamic' if scenario.topology.dynamic else ''}",
            )
        )
    schedules = _schedules_of(gossip.protocol)
    if schedules is None:
        return problems
    try:
        schedules.check(topology.num_peers, gossip.replicas)
    except ConfigError as error:
        if not problems:  # which would be the same one
            problems.append(Problem("gossip.replicas", str(error)))
    lacking = next((index for index, degree in degrees.items() if degree < topology.num_peers - 1), None)
    if lacking is not None:
        problems.append(
            Problem(
                "topology.kind",
                f"topology.kind = {scenario.topology.kind!r} gives p{lacking} {degrees[lacking]} neighbours, and "
                f"gossip.protocol = {gossip.protocol!r} draws who sends to whom among all; set topology.kind = 'full'",
            )
        )
    return problems


def _schedules_of(protocol: str) -> type[Scheduled] | None:
    """The machine of a protocol that draws for everybody who sends to whom."""
    from gossipfl.protocol.baselines import Scheduled

    machine = _machine_of(protocol)
    return machine if isinstance(machine, type) and issubclass(machine, Scheduled) else None


def _machine_of(protocol: str) -> Callable[..., Any] | None:
    """None for a user's own."""
    from gossipfl.protocol.baselines import PROTOCOLS

    return PROTOCOLS.get(protocol) if protocol in PROTOCOLS else None


def _emulation_problems(scenario: Scenario, topology: PeerTopology) -> list[Problem]:
    """Where the files of the emulated network or of churn do not fit, or neighbours have no link."""
    problems = []
    for table, check in (
        ("network", lambda: check_links(scenario.build_links(), topology)),
        ("compute", scenario.build_devices),
        ("churn", lambda: _check_somebody_is_there(scenario)),
    ):
        try:
            check()
        except ConfigError as error:
            problems.append(Problem(table, str(error)))
    return problems


def _check_somebody_is_there(scenario: Scenario) -> None:
    if not scenario.build_churn().is_ever_online():
        raise ConfigError("[churn] lets nobody be there at any time; have somebody be there at the start, or come later")


def _located(problems: Sequence[Problem], path: Path, text: str, overridden: set[str]) -> list[Problem]:
    """The problems in the file's order, each with its line unless an override brought it."""
    by_line = []
    for key, sentence in problems:
        line = line_of(text, key) or 0
        if any(f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.") for name in overridden):
            by_line.append((math.inf, Problem(key, sentence)))
        else:
            by_line.append((line, Problem(key, f"{path}:{line}: {sentence}" if line else f"{path}: {sentence}")))
    return [problem for _, problem in sorted(by_line, key=lambda pair: pair[0])]
