"""The command line: what it prints where, and how it says that something is wrong.

The commands run in processes of their own, as a user's do: whether torch is loaded already decides when some names are checked.
An audit hook notes every process that a command starts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from sockets import free_address

from gossipfl.cli import main
from gossipfl.cli.options import stdout_console

SMALL = ("--set", "peers=4", "--set", "rounds=3", "--set", "central=false")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache of data sets for the session, and none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSIPFL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@dataclass
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str
    started: str
    """The processes that it started, one per line."""


_NOTE_PROCESSES = """
import sys

def note(event, arguments):
    if event == "subprocess.Popen":
        with open({path!r}, "a") as file:
            file.write(repr(arguments[1]) + "\\n")

sys.addaudithook(note)
from gossipfl.cli import main
from gossipfl.cli.options import stdout_console
main(prog_name="gossipfl")
"""


def gossipfl(*arguments: str | Path, cwd: Path) -> Done:
    """`gossipfl <arguments>` in the folder `cwd`."""
    note = cwd / "started-processes"
    done = subprocess.run(
        [sys.executable, "-c", _NOTE_PROCESSES.format(path=str(note)), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Done(done.returncode, done.stdout, done.stderr, note.read_text() if note.exists() else "")


def check_refused(done: Done, *parts: str, code: int = 2) -> None:
    """It ended with `code` and one message that holds `parts`, without having begun anything."""
    assert done.code == code, done.stderr
    for part in parts:
        assert part in done.stderr
    assert re.search(r"^gossipfl: |^Error: ", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert done.started == ""


# ------------------------------------------------------------------------------------------------------------------- help


COMMANDS = ["run", "scenarios", "peer", "collect", "topology", "plan", "sweep", "reproduce", "report"]


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=lambda words: " ".join(words))
def test_help_shows_an_example_and_the_exit_codes(command):
    result = CliRunner().invoke(main, [*command, "--help"], prog_name="gossipfl")
    assert result.exit_code == 0
    usage, _, after = result.output.partition("\n")
    assert usage.startswith(" ".join(["Usage: gossipfl", *command]))
    assert re.search(rf"^  {' '.join(['gossipfl', *command])}", after, re.MULTILINE), "no example"
    assert "Exit codes: 0 done, 1 the run failed, 2 wrong usage or scenario, 130 interrupted." in " ".join(after.split())


def test_the_scenarios_that_come_with_gossipfl_are_listed_and_load():
    result = CliRunner().invoke(main, ["scenarios"])
    assert result.exit_code == 0
    names = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.output.splitlines()}
    assert "quickstart" in names and all(Path(path).is_file() for path in names.values())


def test_the_version_is_told():
    import gossipfl as package

    assert CliRunner().invoke(main, ["--version"]).output.split()[-1] == package.__version__


# --------------------------------------------------------------------------------------------------- scenarios that are wrong


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("modl=mlp", ("unknown key 'modl'", "did you mean 'model'?")),
        ("gossip.fanout=3", ("unknown key 'gossip.fanout'", "'gossip.replicas'")),
        ("rounds=five", ("rounds = 'five' must be a whole number",)),
        ("rounds=0", ("rounds = 0 must be at least 1",)),
        ("gossip.replicas=9", ("gossip.replicas = 9 exceeds the 7 neighbours of p0", "lower it")),
        ("model=mpl", ("unknown model 'mpl'", "did you mean 'mlp'?")),
        ("gossip.codec=int9", ("unknown codec 'int9'", "did you mean 'int8'?")),
        ("gossip.aggregation=mediam", ("unknown aggregation rule 'mediam'", "did you mean 'median'?")),
        ("data.kind=digts", ("unknown data set 'digts'", "did you mean 'digits'?")),
        ("data.partition.kind=dirichelt", ("unknown partition 'dirichelt'", "did you mean 'dirichlet'?")),
        ("data.path=nope", ("data.path = 'nope' does not exist", "give a file or folder")),
        ("topology.kind=rnig", ("unknown topology 'rnig'", "did you mean 'ring'?")),
        ("transport.host=0.0.0.0", ("transport.host = '0.0.0.0' is reachable from other machines", "--insecure")),
        ("rounds", ("the override 'rounds' must be key=value",)),
        ("=3", ("the override '=3' must be key=value",)),
        ("name.x=3", ("name = 'quickstart' is no table",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_scenario_that_is_wrong_is_refused_before_anything_starts(override, parts, tmp_path):
    done = gossipfl("run", "quickstart", "--set", override, "--out", "record", cwd=tmp_path)
    check_refused(done, *parts)
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("data.kind=idx",), ("data.path is not set", "data.kind = 'idx' needs a folder")),
        (("data.kind=npz", "data.path=empty"), ("has no train.npz",)),
        (("data.partition.alpah=3",), ("has no argument 'alpah'", "did you mean 'alpha'?")),
        (("peers=1500", "peers_per_process=1500"), ("cannot be dealt to 1500 peers", "use fewer peers")),
        (("model_args.hiden=3",), ("model 'mlp' has no argument 'hiden'", "did you mean 'hidden'?")),
        (
            ("gossip.aggregation=median", "gossip.codec=topk"),
            ("gossip.aggregation = 'median' needs whole copies", "dense codec"),
        ),
        (("model=no.such:net",), ("model 'no.such:net'", "cannot import module 'no.such'")),
        (("gossip.codec=topk:2",), ("codec 'topk:2'", "the ratio is a share of the values from 1e-9 to 1")),
        (("gossip.segmentation=by_layer",), ("gossip.segments = 8 exceeds the model's 4 tensors", "lower it")),
        (("transport.host=no.such.host.invalid",), ("no.such.host.invalid",)),
    ],
    ids=lambda values: values[0],
)
@pytest.mark.processes
@pytest.mark.parametrize("kind", ["tcp", "inproc"])
def test_what_only_the_data_or_the_workers_can_tell_is_a_message_as_well(overrides, parts, kind, tmp_path):
    (tmp_path / "empty").mkdir()
    if kind == "inproc" and overrides[0].startswith(("transport", "data.kind=npz", "peers", "model=", "gossip.codec")):
        pytest.skip("has no host, or differs in nothing from the others")
    words = [word for override in (*overrides, f"transport.kind={kind}") for word in ("--set", override)]
    done = gossipfl("run", "quickstart", *words, "--out", "record", cwd=tmp_path)
    assert done.code in (1, 2) and done.stdout == ""
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    if done.code == 2:
        assert not (tmp_path / "record").exists()  # so that the mended command finds its folder free


@pytest.mark.processes
@pytest.mark.parametrize(
    "overrides",
    [("data.partition.kind=iid",), ("data.partition.kind=shards", "data.partition.shards_per_peer=3"), ("topology.kind=ring",)],
    ids=lambda values: values[0],
)
def test_another_kind_does_not_inherit_the_arguments_of_the_files(overrides, tmp_path):
    """The quickstart's partition is dirichlet with alpha 0.3, and says in a comment that "iid" is another choice."""
    (tmp_path / "mine.toml").write_text(
        'data.partition = {kind = "dirichlet", alpha = 0.3}\ntopology = {kind = "regular", degree = 2}\n'
    )
    words = [word for override in (*overrides, "transport.kind=inproc") for word in ("--set", override)]
    done = gossipfl("run", "mine.toml", *SMALL, *words, "--quiet", cwd=tmp_path)
    assert done.code == 0, done.stderr


def test_a_disconnected_topology_is_refused_with_its_components(tmp_path):
    (tmp_path / "two.edges").write_text("4\n0 1\n2 3\n")
    words = ["--set", "topology.kind=file", "--set", "topology.path=two.edges", "--set", "gossip.replicas=1"]
    done = gossipfl("run", "quickstart", *SMALL, *words, cwd=tmp_path)
    check_refused(done, "topology", "falls into 2 components", "(p0 p1; p2 p3); add links")


def test_a_file_that_is_wrong_is_told_with_its_lines(tmp_path):
    (tmp_path / "mine.toml").write_text("peers = 4\nrounds = 0\n[gossip]\nsegmnets = 4\n")
    done = gossipfl("run", "mine.toml", cwd=tmp_path)
    check_refused(done, "mine.toml:2: rounds = 0 must be at least 1", "mine.toml:4: unknown key 'gossip.segmnets'")


def test_a_file_that_is_no_toml_or_is_not_there_is_refused(tmp_path):
    (tmp_path / "broken.toml").write_text("peers = 4\nrounds 3\n")
    check_refused(gossipfl("run", "broken.toml", cwd=tmp_path), "broken.toml:2", "the file must be TOML")
    check_refused(gossipfl("run", "quickstrat", cwd=tmp_path), "no scenario 'quickstrat'", "did you mean 'quickstart'?")
    check_refused(gossipfl("run", cwd=tmp_path), "Missing argument 'SCENARIO'")
    check_refused(gossipfl("run", "quickstart", "--peers", "3", cwd=tmp_path), "No such option", "--peers")


def test_an_existing_folder_is_replaced_only_with_force_and_only_if_it_is_a_runs(tmp_path):
    record, other = tmp_path / "record", tmp_path / "other"
    for folder, file in ((record, "scenario.toml"), (other, "thesis.tex")):
        folder.mkdir()
        (folder / file).write_text("precious")
    run = ["run", "quickstart", *SMALL, "--out"]
    check_refused(gossipfl(*run, record, cwd=tmp_path), f"--out {record} exists", "choose another folder, or pass --force")
    check_refused(
        gossipfl(*run, other, cwd=tmp_path), f"--out {other} exists and is not the folder of a run; choose another folder\n"
    )
    check_refused(gossipfl(*run, other, "--force", cwd=tmp_path), f"--out {other} is not the folder of a run")
    assert (record / "scenario.toml").read_text() == (other / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    check_refused(gossipfl(*run, tmp_path / "file" / "in", cwd=tmp_path), "cannot be made", "choose another folder")
    check_refused(gossipfl(*run, tmp_path / "file", "--force", cwd=tmp_path), "is not the folder of a run")


@pytest.mark.parametrize("words", [(), ("--clock", "virtual"), ("--set", "transport.kind=inproc")], ids=str)
def test_the_record_that_force_would_replace_stays_where_the_new_run_does_not_come_about(words, tmp_path):
    run = ["run", "quickstart", *SMALL, "--set", "data.partition.alpah=3", *words]
    assert gossipfl(*run, cwd=tmp_path).code == 2 and not (tmp_path / "runs").exists()
    record = tmp_path / "runs" / "quickstart"
    record.mkdir(parents=True)
    (record / "scenario.toml").write_text("precious")
    done = gossipfl(*run, "--force", cwd=tmp_path)
    assert done.code == 2 and "did you mean 'alpha'?" in done.stderr
    assert [path.name for path in record.parent.iterdir()] == ["quickstart"]
    assert [path.name for path in record.iterdir()] == ["scenario.toml"]
    assert (record / "scenario.toml").read_text() == "precious"


# ------------------------------------------------------------------------------------------------------------ peers by hand


@pytest.fixture
def by_hand(tmp_path: Path) -> list[str]:
    """The command of p0 of three, with a roster that is right."""
    roster(tmp_path, *(free_address() for _ in range(3)))
    overrides = ["--set", "peers=3", "--set", "rounds=1"]
    return ["peer", "--name", "p0", "--config", "quickstart", "--roster", "roster.toml", *overrides]


def roster(folder: Path, *addresses: str) -> None:
    lines = [f'p{index} = "{address}"\n' for index, address in enumerate(addresses)]
    (folder / "roster.toml").write_text("[peers]\n" + "".join(lines))


def test_a_peer_whose_port_is_in_use_says_so(by_hand, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        roster(tmp_path, address, free_address(), free_address())
        done = gossipfl(*by_hand, cwd=tmp_path)
    check_refused(done, f"{address} is in use", "choose another port", code=1)


def test_a_peer_does_not_listen_beyond_loopback_unless_told(by_hand, tmp_path):
    done = gossipfl(*by_hand, "--bind", "tcp://0.0.0.0:0", cwd=tmp_path)
    check_refused(done, "0.0.0.0", "reachable from other machines", "--insecure")
    roster(tmp_path, "tcp://192.0.2.1:5700", free_address(), free_address())
    done = gossipfl(*by_hand, cwd=tmp_path)
    check_refused(done, "192.0.2.1", "reachable from other machines", "--insecure")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[peers", ("roster roster.toml is not TOML",)),
        ("run = 3\n", ("roster roster.toml has no [peers] table", "give a line like p0 =")),
        ("[peers]\np0 = 5700\n", ("peers.p0 = 5700 is no address", 'give one like "tcp://10.0.0.1:5700"')),
        ('[peers]\np0 = "127.0.0.1:5700"\n', ("peers.p0 = '127.0.0.1:5700' is no address",)),
        ('run = "x"\n[peers]\np0 = "tcp://127.0.0.1:1"\n', ("run = 'x' is not a number",)),
        ('[peers]\np0 = "tcp://127.0.0.1:1"\np1 = "tcp://127.0.0.1:2"\n', ("has no address for p2, of 3 peers",)),
        ('[peers]\np0 = "udp://127.0.0.1:1"\np1 = "ipc://x"\np2 = "ipc://y"\n', ("udp", "ipc", "inproc")),
        (None, ("roster roster.toml cannot be read", "No such file")),
    ],
)
def test_a_roster_that_is_wrong_is_refused(text, parts, by_hand, tmp_path):
    (tmp_path / "roster.toml").unlink()
    if text is not None:
        (tmp_path / "roster.toml").write_text(text)
    check_refused(gossipfl(*by_hand, cwd=tmp_path), *parts)
    if "of 3 peers" not in parts[0] and "udp" not in parts:
        check_refused(gossipfl("collect", "roster.toml", "--timeout", "1", cwd=tmp_path), *parts)
    assert not (tmp_path / "runs").exists()


def test_a_peer_that_the_scenario_does_not_have_is_refused(by_hand, tmp_path):
    by_hand[2] = "p7"
    check_refused(gossipfl(*by_hand, cwd=tmp_path), "--name p7", "the scenario has the peers p0 to p2")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model=mpl", "unknown model 'mpl'"),
        ("gossip.codec=int9", "unknown codec 'int9'"),
        ("data.kind=digts", "unknown data set 'digts'"),
        ("gossip.replicas=5", "gossip.replicas = 5 exceeds the 2 neighbours of p0"),
        ("gossip.protocol=gosip", "gossip.protocol: unknown protocol 'gosip'"),
        ("data.kind=idx", "data.path is not set"),
        ("data.partition.alpah=3", "has no argument 'alpah'"),
        ("model_args.hiden=3", "has no argument 'hiden'"),
    ],
)
def test_a_scenario_that_is_wrong_is_refused_by_a_peer_too(override, part, by_hand, tmp_path):
    done = gossipfl(*by_hand, "--set", override, "--out", "mine", cwd=tmp_path)
    check_refused(done, part)
    assert not (tmp_path / "mine").exists()  # so that the mended command finds its folder free


def test_a_peer_whose_protocol_draws_for_everybody_needs_everybody_linked(by_hand, tmp_path):
    words = ["--set", "gossip.protocol=epidemic", "--set", "topology.kind=star", "--set", "gossip.replicas=1"]
    done = gossipfl(*by_hand, *words, "--out", "mine", cwd=tmp_path)
    check_refused(done, "topology.kind = 'star' gives p1 1 neighbours", "set topology.kind = 'full'")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("command", [("plan",), ("run", "--clock", "virtual"), ("run", "--clock", "local")])
@pytest.mark.parametrize("code", ["class Mine:\n    pass\n", "def Mine(name, degrees):\n    pass\n"])
def test_what_is_no_protocol_is_refused_before_anything_starts(command, code, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    done = gossipfl(*command, "quickstart", "--set", "gossip.protocol=mine:Mine", cwd=tmp_path)
    check_refused(done, "gossip.protocol = 'mine:Mine' is no protocol", "(name, degrees, config, numbers)")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "called_as"),
    [("gossip.aggregation", "(rows, weights, out)"), ("gossip.selection", "(candidates, replicas, links, rng)")],
)
def test_a_function_of_the_users_that_cannot_be_called_is_refused_before_anything_starts(setting, called_as, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(one):\n    pass\n")
    done = gossipfl("run", "quickstart", "--clock", "virtual", "--set", f"{setting}=mine:mine", cwd=tmp_path)
    check_refused(done, f"{setting} = 'mine:mine' is no", called_as)
    assert not (tmp_path / "runs").exists()


# --------------------------------------------------------------------------------------------------------------- two outputs


def test_tables_that_go_to_a_file_are_as_wide_as_their_figures_need(monkeypatch):
    row = "figure " * 25
    monkeypatch.delenv("COLUMNS", raising=False)
    with io.StringIO() as file, contextlib.redirect_stdout(file):
        stdout_console().print(row)
        assert file.getvalue() == f"{row}\n"
    monkeypatch.setenv("COLUMNS", "80")
    with io.StringIO() as file, contextlib.redirect_stdout(file):
        stdout_console().print(row)
        assert len(file.getvalue().splitlines()) > 1


@pytest.mark.processes
def test_json_is_the_one_thing_on_stdout_and_progress_plain_lines_on_stderr(tmp_path):
    done = gossipfl("run", "quickstart", *SMALL, "--json", "--out", "record", cwd=tmp_path)
    assert done.code == 0
    assert json.loads(done.stdout) == json.loads((tmp_path / "record" / "summary.json").read_text())
    assert "gossipfl.runtime.worker" in done.started  # the audit hook of these tests sees what it should
    assert "\x1b" not in done.stderr and "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert "4 peers, 9,610 parameters, writing to record" in lines
    (last,) = [line for line in lines if line.startswith("round    3/3")]
    figures = r"accuracy 0\.\d{3} \(worst 0\.\d{3}\)  pulled [\d.]+ KiB  peers alive 4/4  [\d.]+ rounds/s  0:00:00 left"
    assert re.fullmatch(rf"round    3/3  {figures}", last)


@pytest.mark.processes
def test_quiet_shows_nothing_but_the_result(tmp_path):
    done = gossipfl("run", "quickstart", *SMALL, "--set", "transport.kind=inproc", "--quiet", cwd=tmp_path)
    assert done.code == 0 and done.stderr == ""
    assert "test accuracy, mean of peers" in done.stdout and "record  runs/quickstart/" in done.stdout
    assert "\x1b" not in done.stdout and "gossipfl.runtime.worker" not in done.started


def test_runs_without_out_are_numbered_and_force_replaces_the_first(tmp_path):
    run = ["run", "quickstart", *SMALL, "--set", "transport.kind=inproc", "--quiet", "--set", "rounds=1"]
    for _ in range(2):
        assert gossipfl(*run, cwd=tmp_path).code == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"quickstart", "quickstart-2"}
    before = (tmp_path / "runs" / "quickstart" / "summary.json").stat().st_mtime_ns
    assert gossipfl(*run, "--force", cwd=tmp_path).code == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"quickstart", "quickstart-2"}
    assert (tmp_path / "runs" / "quickstart" / "summary.json").stat().st_mtime_ns > before


def test_the_record_of_a_run_can_be_run_again(tmp_path):
    run = ["--set", "transport.kind=inproc", "--quiet", "--json"]
    first = gossipfl("run", "quickstart", *SMALL, *run, "--out", "first", cwd=tmp_path)
    again = gossipfl("run", "first/scenario.toml", *run, "--out", "again", cwd=tmp_path)
    assert again.code == 0, again.stderr
    assert json.loads(again.stdout)["models_sha256"] == json.loads(first.stdout)["models_sha256"]


@pytest.mark.parametrize("module", ["gossipfl.cli.runs", "gossipfl.scenario.interrupts"])
def test_ctrl_c_during_the_imports_ends_with_130_and_no_traceback(module):
    code = f"""
import sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from gossipfl.cli import main
from gossipfl.cli.options import stdout_console
main(["run", "quickstart"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "gossipfl: interrupted\n")
