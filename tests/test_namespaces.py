"""Network namespaces: what the kernel is told, and, where this user may, real TCP over links that it shapes."""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import gossipfl
from gossipfl.errors import ConfigError, RunError
from gossipfl.overlay.links import Constant, LinksConfig, build_links
from gossipfl.runtime import namespaces
from gossipfl.runtime.namespaces import Namespaces, enter, incoming, outgoing
from gossipfl.scenario.config import Scenario
from gossipfl.scenario.hosting import emulation, fidelity

needs_root = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")),
    reason="network namespaces need Linux, root and iproute2",
)

RUN = {
    "peers": 4,
    "rounds": 3,
    "evaluate_every": 0,
    "training": {"local_steps": 2},
    "gossip": {"segments": 2, "replicas": 1},
    "network": {"pair": "500kbit", "latency": "10ms"},
    "compute": {"step_time": "20ms"},
}


def test_each_neighbour_gets_a_class_within_the_uplink():
    links = build_links(LinksConfig(uplink=Constant(1e6), pair=Constant(250e3)), 4, 0)
    lines = outgoing(0, links, [1, 2, 3])
    assert "class add dev eth0 parent 1: classid 1:1 htb rate 8000000bit quantum 16384" in lines
    assert "class add dev eth0 parent 1:1 classid 1:11 htb rate 2000000bit ceil 2000000bit quantum 16384" in lines
    assert sum("match ip dst 10.213.0.3/32 flowid 1:12" in line for line in lines) == 1
    assert sum(line.startswith("class") for line in lines) == 1 + 3


def test_what_is_not_limited_is_not_shaped():
    links = build_links(LinksConfig(downlink=Constant(1e6)), 3, 0)
    assert outgoing(0, links, [1, 2]) == []
    assert len(incoming(1, links)) == 1 and "tbf rate 8000000bit" in incoming(1, links)[0]
    assert incoming(1, build_links(LinksConfig(), 3, 0)) == []


def test_what_each_neighbour_sends_is_late_behind_the_bridge_also_where_no_rate_is_limited():
    links = build_links(LinksConfig(latency=Constant(0.02), peer_latency={2: 0.1}), 3, 0)
    assert outgoing(0, links, [1, 2]) == []
    lines = incoming(0, links, [1, 2])
    assert "class add dev v0 parent 1: classid 1:1 htb rate 10000000000bit quantum 16384" in lines
    assert sum("match ip src 10.213.0.3/32 flowid 1:12" in line for line in lines) == 1
    assert any(line.startswith("qdisc add dev v0 parent 1:11 netem delay 20000us limit") for line in lines)
    assert any(line.startswith("qdisc add dev v0 parent 1:12 netem delay 100000us limit") for line in lines)


def test_a_late_downlink_is_shared_by_the_senders():
    links = build_links(LinksConfig(downlink=Constant(1e6), latency=Constant(0.02)), 3, 0)
    lines = incoming(0, links, [1, 2])
    assert "class add dev v0 parent 1: classid 1:1 htb rate 8000000bit quantum 16384" in lines
    assert "class add dev v0 parent 1:1 classid 1:12 htb rate 4000000bit ceil 8000000bit quantum 16384" in lines


def test_what_is_under_way_does_not_fill_the_queue():
    for rate in (125e3, 12.5e6, 1.25e9):
        links = build_links(LinksConfig(pair=Constant(rate), latency=Constant(0.1)), 2, 0)
        (limit,) = (int(line.split()[-1]) for line in incoming(0, links, [1]) if "netem" in line)
        assert limit * 1448 >= rate * 0.1 + namespaces.QUEUE_S * rate / 2


@pytest.mark.parametrize(
    ("jitter", "by_kernel", "shaping", "left"),
    [
        ("0ms", (), "user space", (62_500, 0.01)),
        ("0ms", ("rates",), "kernel: rates; user space: latency, jitter, loss", (math.inf, 0.01)),
        ("0ms", ("rates", "latency"), "kernel: rates, latency", None),
        ("5ms", ("rates", "latency"), "kernel: rates, latency; user space: jitter, loss", (math.inf, 0.0)),
    ],
    ids=str,
)
def test_the_record_says_who_shapes_what_and_user_space_does_the_rest(jitter, by_kernel, shaping, left):
    scenario = Scenario.model_validate(RUN | {"network": RUN["network"] | {"jitter": jitter}})
    assert fidelity(scenario, [], pytest.fail, by_kernel)["shaping"] == shaping
    links = emulation(scenario, by_kernel)["links"]
    assert (links and (links["pair"], links["latency"])) == left


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("os.geteuid", lambda: 1000, "needs root, this is user 1000"),
        ("shutil.which", lambda tool: None, "needs ip and tc of iproute2"),
        ("sys.platform", "darwin", "needs Linux, this is darwin"),
    ],
    ids=["root", "tools", "system"],
)
def test_what_is_missing_is_named_with_what_to_use_instead(monkeypatch, attribute, value, message):
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 0)
    monkeypatch.setattr(f"gossipfl.runtime.namespaces.{attribute}", value)
    with pytest.raises(ConfigError, match=f"{message}.*--clock virtual"):
        namespaces.check_available(4)


@needs_root
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transport": {"kind": "ipc"}}, "transport.kind = 'ipc'; set transport.kind = 'tcp', or use --clock local"),
        ({"transport": {"kind": "inproc"}}, "set transport.kind = 'tcp', or use --clock local"),
        ({"peers_per_process": 2}, "peers_per_process = 2, but each has a network of its own; remove it"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_before_anything_starts(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        gossipfl.run(RUN | changes, clock="netns", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_root
def test_a_run_in_namespaces_comes_to_the_same_models_no_faster_than_its_links(tmp_path):
    virtual = gossipfl.run(RUN, clock="virtual", out=tmp_path / "virtual")
    netns = gossipfl.run(RUN, clock="netns", out=tmp_path / "netns")
    assert netns.summary["models_sha256"] == virtual.summary["models_sha256"]
    assert netns.summary["clock"] == "netns" and netns.summary["shaping"] in (
        "kernel: rates, latency",
        "kernel: rates; user space: latency, jitter, loss",
    )
    segment_s = 4 * virtual.summary["parameters"] / 2 / 62_500
    assert netns.summary["seconds"]["wall"] >= 0.9 * 3 * (2 * 0.02 + segment_s)  # the bucket may hold a burst
    assert not list(namespaces.FOLDER.glob(f"gossipfl-{os.getpid()}-*"))


@needs_root
def test_peers_in_namespaces_are_killed_and_come_back(tmp_path):
    churn = {"kill": [{"peer": "p1", "at": "0.5s"}, {"peer": "p2", "at": "0.5s"}], "rejoin": [{"peer": "p2", "at": "3s"}]}
    changes = {"rounds": 14, "churn": churn, "compute": {"step_time": "150ms"}, "peers": 5}
    result = gossipfl.run(RUN | changes, clock="netns", out=tmp_path / "run")
    assert result.exit_code == 0 and result.summary["faults"]["dead_peers"] == ["p1"]


def talk(made: Namespaces, at_p1: Callable[[socket.socket], Any], at_p0: Callable[[socket.socket], Any]) -> tuple[Any, Any]:
    """What each end makes of a connection from p0 to p1, in a thread that is in the end's namespace."""
    is_listening = threading.Event()

    def listen() -> Any:
        enter(made.path("p1"))
        with socket.create_server((made.address("p1"), 5000)) as server:
            server.settimeout(20)
            is_listening.set()
            connection, _ = server.accept()
            with connection:
                connection.settimeout(20)
                return at_p1(connection)

    def connect() -> Any:
        assert is_listening.wait(20)
        enter(made.path("p0"))
        with socket.create_connection((made.address("p1"), 5000), timeout=20) as connection:
            return at_p0(connection)

    with ThreadPoolExecutor(2) as threads:
        ends = threads.submit(listen), threads.submit(connect)
        return ends[0].result(), ends[1].result()


@needs_root
def test_the_kernel_holds_a_pair_to_its_rate():
    links = build_links(LinksConfig(pair=Constant(1e6)), 2, 0)
    num_bytes = 600_000

    def receive_all(connection: socket.socket) -> float:
        began, total = time.monotonic(), 0
        while part := connection.recv(65_536):
            total += len(part)
        assert total == num_bytes
        return time.monotonic() - began

    with Namespaces(["p0", "p1"], links, [[1], [0]]) as made:
        seconds, _ = talk(made, receive_all, lambda connection: connection.sendall(bytes(num_bytes)))
    assert seconds >= 0.8 * num_bytes / 1e6


@needs_root
def test_a_round_trip_takes_the_latency_there_and_back():
    links = build_links(LinksConfig(latency=Constant(0.05)), 2, 0)

    def ask(connection: socket.socket) -> float:
        began = time.monotonic()
        connection.sendall(b"?")
        assert connection.recv(1) == b"?"
        return time.monotonic() - began

    with Namespaces(["p0", "p1"], links, [[1], [0]]) as made:
        if "latency" not in made.by_kernel:
            pytest.skip("this kernel has no netem")
        _, seconds = talk(made, lambda connection: connection.sendall(connection.recv(1)), ask)
    assert seconds >= 2 * 0.05


def shaped(namespace: str, kind: str, device: str) -> str:
    """What the kernel says of the device's classes or queues."""
    return subprocess.run(
        ["tc", "-n", namespace, kind, "show", "dev", device], check=True, capture_output=True, text=True
    ).stdout


@needs_root
def test_the_kernel_follows_a_trace_of_rates(tmp_path):
    """An end that has no limit at first gets one, and another later; rates that are due together are not lived through."""
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,peer,uplink,downlink\n1,p0,4,8\n2,p0,2,3\n3,p0,1,1\n1000,p0,9,9\n")
    links = build_links(LinksConfig(trace=str(trace)), 2, 0)
    with Namespaces(["p0", "p1"], links, [[1], [0]]) as made:
        own = Path(made.path("p0")).name
        switch = own.removesuffix("0") + "switch"
        assert made.next_in_s == math.inf and "rate 10Gbit" in shaped(own, "class", "eth0")
        made.begin(time.monotonic() - 1.5)
        made.follow()
        assert "1:1 root rate 4Mbit ceil 4Mbit" in shaped(own, "class", "eth0") and "rate 8Mbit" in shaped(
            switch, "qdisc", "v0"
        )
        made.begin(time.monotonic() - 4)
        made.follow()
        assert "rate 1Mbit ceil 1Mbit" in shaped(own, "class", "eth0") and "rate 1Mbit" in shaped(switch, "qdisc", "v0")
        assert 900 < made.next_in_s < 1000
        assert math.isinf(links.uplink[0]) and "noqueue" in shaped(switch, "qdisc", "v1")


@needs_root
def test_rates_that_the_kernel_does_not_take_in_a_run_are_no_mistake_of_the_scenario(tmp_path):
    """What there is of the run is then kept."""
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,peer,uplink,downlink\n1,p0,4,8\n")
    with Namespaces(["p0", "p1"], build_links(LinksConfig(trace=str(trace)), 2, 0), [[1], [0]]) as made:
        subprocess.run(["tc", "-n", Path(made.path("p0")).name, "qdisc", "del", "dev", "eth0", "root"], check=True)
        made.begin(time.monotonic() - 2)
        with pytest.raises(RunError, match="the kernel refuses `tc "):
            made.follow()


@needs_root
def test_a_run_over_a_trace_of_rates_takes_as_long_as_they_allow(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,peer,uplink,downlink\n" + "".join(f"0,p{peer},0.5,inf\n" for peer in range(4)))
    run = RUN | {"network": {"latency": "10ms", "trace": str(trace)}}
    virtual = gossipfl.run(run, clock="virtual", out=tmp_path / "virtual")
    netns = gossipfl.run(run, clock="netns", out=tmp_path / "netns")
    assert netns.summary["models_sha256"] == virtual.summary["models_sha256"]
    assert netns.summary["seconds"]["wall"] >= 0.8 * virtual.summary["virtual_seconds"]  # its buckets may hold a burst


@needs_root
def test_what_a_killed_launcher_left_behind_is_removed_by_the_next():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = f"gossipfl-{gone.pid}-0"
    subprocess.run(["ip", "netns", "add", stale], check=True)
    with Namespaces(["p0"], build_links(LinksConfig(), 1, 0), [[]]):
        assert not Path(namespaces.FOLDER, stale).exists()


@pytest.mark.processes
@needs_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_root_without_capabilities_is_told_and_leaves_nothing_in_the_way(tmp_path):
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-m", "gossipfl", "run", "quickstart"]
    out = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, "--clock", "netns", "--set", "peers=2", "--set", "gossip.replicas=1", "--quiet", "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2 and "the kernel refuses `ip netns add " in done.stderr
    assert done.stderr.endswith("; run with the capabilities SYS_ADMIN and NET_ADMIN, or use --clock local\n")
    assert done.stderr.count("\n") == 1 and not out.exists()
