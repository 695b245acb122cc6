"""Problems of a scenario in sentences: the key, its value and the remedy, one line each, all of them at once.

pydantic finds them; its own wording names neither our keys nor what to do, and links to its manual.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from gossipfl.errors import ConfigError
from gossipfl.registry import did_you_mean


class Problem(NamedTuple):
    """One thing to mend: the dotted key it is about, and a sentence that says all."""

    key: str
    text: str


class ScenarioError(ConfigError):
    """A scenario that cannot be right; the message has a line for each problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(problem.text for problem in problems))
        self.problems = tuple(problems)


CALLED_HERE = {
    "nodes": "peers",
    "num_nodes": "peers",
    "n_nodes": "peers",
    "num_peers": "peers",
    "workers": "peers",
    "num_workers": "peers",
    "clients": "peers",
    "num_clients": "peers",
    "num_supernodes": "peers",
    "client_num_in_total": "peers",
    "n_procs": "peers",
    "procs_per_machine": "peers_per_process",
    "num_rounds": "rounds",
    "comm_round": "rounds",
    "num_server_rounds": "rounds",
    "iterations": "rounds",
    "random_seed": "seed",
    "test_after": "evaluate_every",
    "test_interval": "evaluate_every",
    "frequency_of_the_test": "evaluate_every",
    "dataset": "data.kind",
    "data_dir": "data.path",
    "partition_niid": "data.partition.kind",
    "partition_method": "data.partition.kind",
    "partitioner": "data.partition.kind",
    "partition_alpha": "data.partition.alpha",
    "dirichlet_alpha": "data.partition.alpha",
    "epochs": "training.local_epochs",
    "num_epochs": "training.local_epochs",
    "full_epochs": "training.local_epochs",
    "synchronization_interval": "training.local_steps",
    "lr": "training.learning_rate",
    "wd": "training.weight_decay",
    "k": "gossip.segments",
    "s": "gossip.segments",
    "num_segments": "gossip.segments",
    "chunks": "gossip.segments",
    "fragments": "gossip.segments",
    "vnodes": "gossip.segments",
    "r": "gossip.replicas",
    "num_replicas": "gossip.replicas",
    "fanout": "gossip.replicas",
    "sample_size": "gossip.replicas",
    "compress": "gossip.codec",
    "compression": "gossip.codec",
    "compressor": "gossip.codec",
    "alpha_list": "gossip.codec",
    "strategy": "gossip.aggregation",
    "aggregator": "gossip.aggregation",
    "mixing_matrix": "gossip.mixing",
    "graph_degree": "topology.degree",
    "graph_type": "topology.kind",
    "graph_file": "topology.path",
    "up": "network.uplink",
    "upload": "network.uplink",
    "up_bandwidth": "network.uplink",
    "upload_rate": "network.uplink",
    "bandwidth": "network.uplink",
    "bw": "network.uplink",
    "rate": "network.uplink",
    "tcset": "network.uplink",
    "down": "network.downlink",
    "download": "network.downlink",
    "down_bandwidth": "network.downlink",
    "download_rate": "network.downlink",
    "link": "network.pair",
    "links": "network.pair",
    "bandwidth_matrix": "network.pair_matrix",
    "delay": "network.latency",
    "rtt": "network.latency",
    "delay_matrix": "network.latency_matrix",
    "delay_distro": "network.jitter",
    "delay_distribution": "network.jitter",
    "packet_loss": "network.loss",
    "loss_rate": "network.loss",
    "compute_time": "compute.step_time",
    "compute_speed": "compute.speed",
    "stragglers_ratio": "compute.stragglers",
    "straggler_ratio": "compute.stragglers",
    "online_prob": "churn.online",
    "drop_prob": "churn.online",
    "dropout_rate": "churn.online",
    "availability": "churn.online",
    "leave": "churn.kill",
    "crash": "churn.kill",
    "late_join": "churn.join",
}
"""What decentralizepy, FedML, Flower, GossipFL, p2pfl and the papers call our keys: a suggestion, not a second name."""
PROTOCOLS_HERE = {
    "dpsgd": "protocol = 'gossip', selection = 'all', mixing = 'metropolis_hastings'",
    "bacombo": "protocol = 'gossip', selection = 'bandwidth'",
    "combo": "protocol = 'gossip'",
    "el": "protocol = 'epidemic'",
    "mosaic": "protocol = 'epidemic'",
    "divshare": "protocol = 'fragments'",
    "gossipfl": "protocol = 'pairs'",
}
"""By names of papers, without `-` and `_`."""

# Keys of the open tables that everyone expects, so that a suggestion can name them.
_OPEN_KEYS = ("data.partition.alpha", "topology.degree", "topology.path")

_SENTENCES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text, in quotes",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
}
"""By pydantic's type of error; the braces are filled from its context."""


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """pydantic's findings about `model` as sentences."""
    known = list(known_keys(model))
    found = []
    for detail in error.errors(include_url=False):
        key = ".".join(map(str, detail["loc"]))
        table = "".join(f"{step}." for step in detail["loc"][:-1])
        beside = [table + name for name in _fields_at(model, detail["loc"][:-1])]
        found.append(Problem(key, _sentence(key, detail, known + [name for name in beside if name not in known])))
    return found


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys of the table at `location`."""
    table = model
    for step in location:
        if step in table.model_fields:  # else it is a place in a list of such tables, or the name of one
            annotation = table.model_fields[str(step)].annotation
            held = [
                kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)
            ]
            if not held:
                return []
            table = held[0]
    return list(table.model_fields)


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a scenario, tables included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def misplaced_key(table: str, key: str) -> str | None:
    """A sentence about a key of an open table that another framework uses for one of ours in this very table."""
    ours = CALLED_HERE.get(_plain(key), "")
    if ours.rpartition(".")[0] != table:
        return None
    return f"unknown key '{table}.{key}'; {key!r} is called {ours!r} here"


def shown(value: object) -> str:
    """A value for a message: short, whatever it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sentence(key: str, detail: Mapping[str, Any], known: Sequence[str]) -> str:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        return f"unknown key {key!r}{_suggestion(key, known)}"
    if kind == "missing":
        return f"{key} is missing; give it"
    if kind == "value_error":
        message = str(context["error"])
        about_several = message.startswith((f"{key}.", f"{key} ", "unknown key"))  # such a message names its keys and values
        return message if about_several else f"{key} = {shown(value)} {message}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"{key} = {shown(value)} is not known{did_you_mean(str(value), choices)}; use {context['expected']}"
    reason = _SENTENCES[kind].format(**context) if kind in _SENTENCES else f"is wrong: {detail['msg']}"
    return f"{key} = {shown(value)} {reason}"


def _suggestion(key: str, known: Sequence[str]) -> str:
    table, _, leaf = key.rpartition(".")
    plain = _plain(leaf)
    if plain in CALLED_HERE:
        ours = CALLED_HERE[plain]
        beside = f"{table}.{ours.rpartition('.')[2]}".lstrip(".")
        return f"; {leaf!r} is called {beside if beside in known else ours!r} here"
    by_leaf = [(candidate.rpartition(".")[2], candidate) for candidate in (*known, *_OPEN_KEYS)]
    elsewhere = [candidate for name, candidate in by_leaf if name == plain]
    if elsewhere:
        return f"; did you mean {' or '.join(map(repr, elsewhere))}?"
    siblings = {name: candidate for name, candidate in by_leaf if candidate.rpartition(".")[0] == table}
    theirs = _closest(plain, CALLED_HERE, cutoff=0.75)
    if theirs and theirs == _closest(plain, [theirs, *(name for name, _ in by_leaf)]):
        return f"; did you mean {theirs!r}, which is called {CALLED_HERE[theirs]!r} here?"
    everywhere = dict(reversed(by_leaf))
    for pool, find in ((siblings, _closest), (siblings, _begun), (everywhere, _begun), (everywhere, _closest)):
        if found := find(plain, pool):  # a slip in this table is likelier than a slip and the wrong table
            return f"; did you mean {pool[found]!r}?"
    return f"; known {f'in [{table}]' if table else 'here'}: {', '.join(siblings)}"


def _closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def _begun(name: str, known: Iterable[str]) -> str | None:
    """The shortest that begins so, where that says enough."""
    return min((other for other in known if len(name) >= 3 and other.startswith(name)), key=len, default=None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
