"""Imports only go down: each file of the package stands on a floor and imports from its own and those below.

Read from the source with `ast`, so an import that only happens inside a function, or only for the type checker, counts too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gossipfl

PACKAGE = Path(gossipfl.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

FLOORS = {
    "__main__": 5,
    "_version": 0,
    "errors": 0,
    "plain": 0,
    "randomness": 0,
    "registry": 0,
    "aggregation": 1,
    "mixing": 1,
    "overlay": 1,
    "segments": 1,
    "protocol": 2,
    "inference/planning": 2,
    "inference": 3,
    "learning": 3,
    "runtime": 4,
    "simulation": 4,
    "cli": 5,
    "scenario": 5,
}
PURE = 2
"""Up to this floor nothing has a clock, a socket, a thread or a chance of its own."""
LIBRARIES_OF_THE_PURE = {
    "numpy": ("plain.py", "randomness.py", "aggregation.py", "mixing.py", "overlay/", "segments/", "inference/planning/"),
    "scipy": ("inference/planning/",),
    "networkx": ("overlay/",),
    "torch": ("segments/",),
    "msgpack": ("protocol/wire.py",),
}
"""What the pure floors may import besides the standard library, and where."""
EFFECTS = {"asyncio", "multiprocessing", "random", "select", "selectors", "socket", "subprocess", "threading", "time"}
ONLY_IN = {"msgpack": "protocol/wire.py", "click": "cli/"}
"""The one place of a library among all floors."""
RUNS_WHAT_IT_READS = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve", "yaml"}
CALLS_THAT_RUN_WHAT_THEY_READ = {"eval", "exec", "torch.load", "torch.save", "builtins.eval", "builtins.exec"}
METHODS_THAT_RUN_WHAT_THEY_READ = {"recv_pyobj", "send_pyobj"}


def floor_of(file: str) -> int | None:
    return floor(file.removesuffix(".py").split("/"))


def floor(path: list[str]) -> int | None:
    """Of the longest beginning of the path that has one."""
    return next((FLOORS[known] for length in (2, 1) if (known := "/".join(path[:length])) in FLOORS), None)


def imports(file: str, tree: ast.AST) -> Iterator[str]:
    """The dotted names that a file imports: modules, and what `from` takes out of them."""
    folder = ["gossipfl", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)


def names_used(tree: ast.AST) -> Iterator[str]:
    """Every name and dotted name of a file, with what `import x as y` calls y spelled as x."""
    spelled: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            spelled.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module:
            spelled.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield spelled.get(node.id, node.id)
        elif isinstance(node, ast.Attribute):
            owner = node.value
            yield f"{spelled.get(owner.id, owner.id)}.{node.attr}" if isinstance(owner, ast.Name) else f".{node.attr}"


def may_import(file: str, floor: int, library: str) -> bool:
    if floor > PURE:
        return file.startswith(ONLY_IN.get(library, file))
    if library in sys.stdlib_module_names:
        return library not in EFFECTS
    return file.startswith(LIBRARIES_OF_THE_PURE.get(library, ()))


def offences(file: str, source: str) -> list[str]:
    """What the file (`protocol/wire.py`) may not do and does."""
    own, tree = floor_of(file), ast.parse(source)
    if own is None:
        return ["stands on no floor"]
    found = set()
    for name in imports(file, tree):
        library, *inner = name.split(".")
        if library == "gossipfl":
            target = floor(inner)
            if target is None:
                found.add(f"imports {name}, which stands on no floor")
            elif target > own:
                found.add(f"imports {name}, from floor {own} up to {target}")
        elif library in RUNS_WHAT_IT_READS or not may_import(file, own, library):
            found.add(f"imports {library}")
    for name in names_used(tree):
        if name in CALLS_THAT_RUN_WHAT_THEY_READ or name.split(".")[-1] in METHODS_THAT_RUN_WHAT_THEY_READ:
            found.add(f"uses {name.lstrip('.')}")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.add("allows pickle")
    return sorted(found)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_and_stay_within_what_the_floor_may_use(file):
    assert offences(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


def test_nothing_imports_in_a_circle():
    trees = {file: ast.parse((PACKAGE / file).read_text(encoding="utf-8")) for file in FILES}
    modules = {f"gossipfl.{file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}": file for file in FILES}
    needs = {
        file: {modules.get(name) or modules.get(name.rpartition(".")[0]) for name in imports(file, tree)} - {None, file}
        for file, tree in trees.items()
    }
    TopologicalSorter(needs).prepare()  # CycleError, which has the circle


def test_there_is_something_on_every_floor():
    assert {floor_of(file) for file in FILES} == set(range(6))
    assert {file.split("/")[0].removesuffix(".py") for file in FILES} == {path.split("/")[0] for path in FLOORS}


def test_every_package_is_installed():
    setup = ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    packages = {path.parent.relative_to(PACKAGE.parent).as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert packages | {"gossipfl.scenarios"} == set(setup["options"]["packages"].split())


def test_the_front_door_imports_nothing_when_it_is_opened():
    """It may name every floor: it imports from one when a name is first used."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_once = ast.Module([node for node in tree.body if not isinstance(node, ast.If)], [])
    assert sorted(imports("__init__.py", at_once)) == [
        "__future__.annotations",
        "gossipfl._version.__version__",
        "importlib",
        "typing.Any",
        "typing.TYPE_CHECKING",
    ]


# --- the checker itself -----------------------------------------------------------------------------------------------

OFFENDER = """
from __future__ import annotations
import math, time, zmq
import torch.nn as nn
import numpy as np
import msgpack
from threading import Thread
from typing import TYPE_CHECKING
from gossipfl import errors
from gossipfl.segments.codecs import codec
from gossipfl.runtime.node import Node
from ..scenario import config
from . import messages

if TYPE_CHECKING:
    from gossipfl.learning import models

def later():
    import pickle
    from gossipfl import run
    return eval("1"), np.load("x", allow_pickle=True), later.socket.recv_pyobj()
"""


def test_every_offence_is_found():
    assert offences("protocol/made_up.py", OFFENDER) == [
        "allows pickle",
        "imports gossipfl.learning.models, from floor 2 up to 3",
        "imports gossipfl.run, which stands on no floor",
        "imports gossipfl.runtime.node.Node, from floor 2 up to 4",
        "imports gossipfl.scenario.config, from floor 2 up to 5",
        "imports msgpack",
        "imports numpy",
        "imports pickle",
        "imports threading",
        "imports time",
        "imports torch",
        "imports zmq",
        "uses eval",
        "uses recv_pyobj",
    ]


@pytest.mark.parametrize("file", ["serving/plan.py", "plan.py", "protocols/wire.py"])
def test_a_file_on_no_floor_is_found(file):
    assert offences(file, "") == ["stands on no floor"]


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("errors.py", "import numpy", ["imports numpy"]),
        ("registry.py", "import gossipfl.overlay", ["imports gossipfl.overlay, from floor 0 up to 1"]),
        ("randomness.py", "import random", ["imports random"]),
        ("aggregation.py", "import torch", ["imports torch"]),
        ("overlay/x.py", "from torch import nn", ["imports torch"]),
        ("segments/x.py", "import asyncio.queues", ["imports asyncio"]),
        ("segments/deeper/x.py", "from ... import protocol", ["imports gossipfl.protocol, from floor 1 up to 2"]),
        ("segments/x.py", "import gossipfl", ["imports gossipfl, which stands on no floor"]),
        ("protocol/x.py", "import safetensors", ["imports safetensors"]),
        ("learning/x.py", "from gossipfl.runtime import node", ["imports gossipfl.runtime.node, from floor 3 up to 4"]),
        ("runtime/x.py", "import msgpack", ["imports msgpack"]),
        ("runtime/x.py", "from gossipfl import scenario", ["imports gossipfl.scenario, from floor 4 up to 5"]),
        ("scenario/x.py", "import click", ["imports click"]),
        ("scenario/x.py", "from yaml import load", ["imports yaml"]),
        ("learning/x.py", "import torch\ntorch.load('x')", ["uses torch.load"]),
        ("learning/x.py", "import torch as t\nt.save(1, 'x')", ["uses torch.save"]),
        ("learning/x.py", "from torch import load\nload('x')", ["uses torch.load"]),
        ("learning/x.py", "from torch import load as read\nread('x')", ["uses torch.load"]),
        ("runtime/x.py", "run = exec", ["uses exec"]),
        ("runtime/x.py", "np.save('x', x, allow_pickle=flag)", ["allows pickle"]),
    ],
)
def test_an_offence_is_found_on_each_floor(file, source, found):
    assert offences(file, source) == found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("randomness.py", "import numpy as np"),
        ("segments/x.py", "import torch\nfrom gossipfl import aggregation, errors"),
        ("overlay/x.py", "import networkx\nfrom . import topology"),
        ("protocol/wire.py", "import msgpack\nfrom gossipfl.errors import RemoteProtocolError"),
        ("learning/x.py", "import time, torch\nmodel.eval()\nfile.load('x')\nnp.load('x', allow_pickle=False)"),
        ("runtime/x.py", "import zmq, threading\nfrom gossipfl.learning import training"),
        ("scenario/x.py", "from gossipfl import cli, runtime\nfrom ..learning import models"),
        ("cli/x.py", "import click\nfrom gossipfl.scenario import runner"),
    ],
)
def test_what_is_allowed_is_let_pass(file, source):
    assert offences(file, source) == []
