"""Tables of named functions: what a mistyped name says, and functions of one's own."""

from __future__ import annotations

import re
import sys

import pytest

from gossipfl.errors import ConfigError
from gossipfl.registry import Registry, did_you_mean, import_function


@pytest.fixture
def colours():
    registry = Registry("colour")
    registry.register("red")(red)
    registry.register("green")(green)
    return registry


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Write a module that can be imported; the path and the loaded modules are as before afterwards."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    written = []

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def red():
    return "#ff0000"


def green():
    return "#00ff00"


def test_a_registered_function_is_found_by_its_name(colours):
    assert colours.get("red") is red and colours.get("green") is green


def test_the_decorator_leaves_the_function_as_it_is():
    assert Registry("colour").register("red")(red) is red


def test_names_are_listed_in_order_and_asked_for_by_in(colours):
    assert list(colours) == ["green", "red"]
    assert "red" in colours and "blue" not in colours and None not in colours


def test_a_second_function_of_the_same_name_is_our_own_bug(colours):
    with pytest.raises(AssertionError, match="colour 'red' is registered twice"):
        colours.register("red")(green)
    assert colours.get("red") is red


def test_registries_do_not_share_their_names(colours):
    assert list(Registry("shape")) == []


def test_a_mistyped_name_is_answered_with_the_nearest_one(colours):
    with pytest.raises(ConfigError, match=r"^unknown colour 'gren'; did you mean 'green'\?; known: green, red$"):
        colours.get("gren")


def test_a_name_like_no_other_is_answered_with_those_there_are(colours):
    with pytest.raises(ConfigError, match=r"^unknown colour 'xyz'; known: green, red$"):
        colours.get("xyz")


def test_only_one_name_is_suggested():
    assert did_you_mean("int9", ["int8", "int4", "float16"]) in ("; did you mean 'int8'?", "; did you mean 'int4'?")
    assert did_you_mean("x", ["int8"]) == did_you_mean("x", []) == ""


def test_a_function_of_ones_own_is_imported_by_module_and_name(colours, own_module):
    own_module("own_colours_1", "def blue():\n    return '#0000ff'\n")
    assert colours.get("own_colours_1:blue")() == "#0000ff"
    assert list(colours) == ["green", "red"]


def test_a_registered_name_with_a_colon_comes_first(colours):
    colours.register("json:loads")(red)
    assert colours.get("json:loads") is red


def test_a_module_of_the_current_folder_is_found(own_module, tmp_path, monkeypatch):
    own_module("own_colours_2", "def blue():\n    return 2\n")
    sys.path.remove(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot import"):
        import_function("own_colours_2:blue", "colour")
    monkeypatch.chdir(tmp_path)
    assert import_function("own_colours_2:blue", "colour")() == 2


def test_a_module_that_is_not_there_is_named(colours):
    with pytest.raises(ConfigError, match=r"^colour 'no_such_module_1:blue': cannot import module 'no_such_module_1' \(No mod"):
        colours.get("no_such_module_1:blue")
    with pytest.raises(ConfigError, match=r"cannot import module 'json\.nothing'"):
        colours.get("json.nothing:blue")


def test_a_module_that_cannot_import_what_it_needs_says_what_that_is(colours, own_module):
    own_module("own_colours_3", "import no_such_module_2\n")
    with pytest.raises(ConfigError, match=r"cannot import module 'own_colours_3' \(No module named 'no_such_module_2'\)"):
        colours.get("own_colours_3:blue")


def test_a_module_that_fails_by_itself_is_not_blamed_for_lacking_the_function(colours, own_module):
    own_module("own_colours_4", "import os\nos.nope\ndef blue(): pass\n")
    with pytest.raises(AttributeError, match=r"^module 'os' has no attribute 'nope'$"):
        colours.get("own_colours_4:blue")


@pytest.mark.parametrize("name", [":f", ".a:f", ".:f", "json:", ":"])
def test_a_name_without_a_module_or_a_function_is_refused(colours, name):
    with pytest.raises(ConfigError, match=f"^colour '{re.escape(name)}' is not of the form package.module:function$"):
        colours.get(name)


@pytest.mark.parametrize("attribute", ["nothing", "loads.nothing"])
def test_a_function_that_is_not_in_its_module_is_named(colours, attribute):
    with pytest.raises(ConfigError, match=f"^colour 'json:{attribute}': module 'json' has no '{attribute}'$"):
        colours.get(f"json:{attribute}")


@pytest.mark.parametrize("name", ["math:pi", "os:path", "sys:argv"])
def test_what_is_not_a_function_is_not_taken_for_one(colours, name):
    module, attribute = name.split(":")
    with pytest.raises(ConfigError, match=f"^colour '{name}': '{attribute}' in '{module}' is not a function$"):
        colours.get(name)
