"""A network namespace for each peer, with links that the kernel shapes: real TCP over links of finite rate. Linux, root.

    with Namespaces(names, links, neighbours) as namespaces:
        namespaces.address("p3"), namespaces.path("p3")        # an IP address, and what `enter` takes in the peer's process
        namespaces.begin(time.monotonic())
        namespaces.follow()                                    # again in `next_in_s`: the rates of a trace that are due

Each namespace hangs by a pair of virtual Ethernet devices on a bridge, in a namespace of its own; none of them reaches the
machine's networks. The kernel's hierarchical token bucket at the peer's end shapes its uplink and, within that, what goes to
each neighbour; a token bucket at the bridge's end shapes its downlink (tc-htb(8), tc-tbf(8)).

Where the kernel has netem (tc-netem(8)) it delays, too: at the receiver's end of the bridge, in a class for each sender. Round
trips are then as long for TCP as for a message, and its slow start costs what it costs on a real network. It is behind the
sender's bucket, not in it: netem takes a packet off its socket's account, which is what keeps the queue in front of the bucket
short, and pulls would wait behind whole windows.

`by_kernel` says what the kernel does. The rest is left to user space (`shaping`): the latency where there is no netem, and
always jitter and loss, which are of messages. netem's are of packets: TCP takes those that its jitter lets overtake others
for lost, and sends again what it drops; so no message would be lost, and all of them would be slower.
"""

from __future__ import annotations

import copy
import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address
from pathlib import Path

from gossipfl.errors import ConfigError, RunError
from gossipfl.overlay.links import Change, Links
from gossipfl.protocol.messages import PeerId

FOLDER = Path("/run/netns")
FIRST_ADDRESS = IPv4Address("10.213.0.1")
PREFIX_BITS = 16
MAX_PEERS = 1000
COMMAND_S = 60.0
LEAST_BIT = 8_000
"""The least rate that a class is promised: the kernel takes no 0."""
MOST_BIT = 10_000_000_000
"""What an end without a limit gets, where another limit is shaped there: the kernel knows no infinite rate."""
QUEUE_S, LEAST_QUEUE_BYTES = 0.05, 65_536
"""What waits in front of a limited link: enough for TCP to fill it, too little to delay a pull by much."""
GSO_BYTES = 16_384
"""Largest piece that TCP hands down at once: 64 KiB of the default would be bursts of 52 ms at 10 Mbit/s."""
PACKET_BYTES, LEAST_PACKETS = 1_500, 100
"""netem's queue counts packets, of this size or more; and small ones, such as acknowledgements, at the least."""
_CLONE_NEWNET = 0x40000000


class Namespaces:
    """The namespaces of the peers `names`; `neighbours[i]` are the indices that peer i sends to.

    ConfigError where they cannot be made: no root, no Linux, or no iproute2.
    """

    def __init__(self, names: Sequence[PeerId], links: Links, neighbours: Sequence[Sequence[int]]) -> None:
        check_available(len(names))
        self._names, self._neighbours = names, neighbours
        self._links = copy.copy(links)  # as they are now
        self._links.uplink, self._links.downlink = links.uplink.copy(), links.downlink.copy()
        self._timeline = links.timeline()
        self._change: Change | None = None
        self._began = math.inf
        self._prefix = f"gossipfl-{os.getpid()}-"
        self._switch = f"{self._prefix}switch"
        self.by_kernel: tuple[str, ...] = ("rates",)
        """What of the links the kernel shapes, besides the rates perhaps the latency."""
        remove_stale()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def address(self, name: PeerId) -> str:
        """The peer's IPv4 address."""
        return _address(self._names.index(name))

    def path(self, name: PeerId) -> str:
        """What the peer's process enters."""
        return str(FOLDER / f"{self._prefix}{self._names.index(name)}")

    def begin(self, began: float) -> None:
        """The times of a trace count from then (monotonic seconds), when the run began."""
        self._began = began
        self._change = next(self._timeline, None)

    @property
    def next_in_s(self) -> float:
        """Seconds until rates change; infinite where they never do again."""
        return math.inf if self._change is None else self._began + self._change.time_s - time.monotonic()

    def follow(self) -> None:
        """Have the kernel shape by the rates that are due. RunError where it will not."""
        changed: dict[int, None] = {}
        while self._change is not None and self.next_in_s <= 0:
            index = self._change.index
            self._links.uplink[index], self._links.downlink[index] = self._change.uplink, self._change.downlink
            changed[index] = None
            self._change = next(self._timeline, None)
        try:
            for index in changed:
                _run(["tc", "-n", f"{self._prefix}{index}"], _changes(outgoing(index, self._links, self._neighbours[index])))
            _run(["tc", "-n", self._switch], _changes([line for index in changed for line in self._incoming(index)]))
        except ConfigError as error:  # the run is under way, and what there is of it is kept
            raise RunError(str(error)) from error

    def close(self) -> None:
        """Remove them all, and with them their devices; processes inside keep theirs until they end."""
        _remove(path.name for path in FOLDER.glob(f"{self._prefix}*"))

    def _build(self) -> None:
        indices = range(len(self._names))
        _run(["ip"], [f"netns add {self._switch}", *(f"netns add {self._prefix}{index}" for index in indices)])
        on_switch = ["link add br0 type bridge", "link set br0 up"]
        for index in indices:
            on_switch += [
                f"link add v{index} type veth peer name eth0 netns {self._prefix}{index}",
                f"link set v{index} master br0 up gso_max_size {GSO_BYTES}",
            ]
        _run(["ip", "-n", self._switch], on_switch)
        for index in indices:
            addresses = [f"addr add {_address(index)}/{PREFIX_BITS} dev eth0", "link set lo up"]
            _run(["ip", "-n", f"{self._prefix}{index}"], [*addresses, f"link set eth0 up gso_max_size {GSO_BYTES}"])
            _run(["tc", "-n", f"{self._prefix}{index}"], outgoing(index, self._links, self._neighbours[index]))
        if self._links.has_latency and self._has_netem():
            self.by_kernel = ("rates", "latency")
        _run(["tc", "-n", self._switch], [line for index in indices for line in self._incoming(index)])

    def _incoming(self, index: int) -> list[str]:
        return incoming(index, self._links, self._neighbours[index] if "latency" in self.by_kernel else ())

    def _has_netem(self) -> bool:
        """By trying it, which also has the kernel load it, where nobody is."""
        attempt = ["tc", "-n", self._switch, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
        return subprocess.run(attempt, check=False, capture_output=True, timeout=COMMAND_S).returncode == 0


def outgoing(index: int, links: Links, neighbours: Sequence[int]) -> list[str]:
    """tc's commands for what a peer sends: its uplink, shared by a class for each neighbour, which the pair bounds."""
    pairs = {other: links.pair(index, other) for other in neighbours}
    is_limited = not all(map(math.isinf, (links.uplink[index], *pairs.values())))
    if not neighbours or not (is_limited or _is_traced(index, links)):
        return []
    uplink = _bit(float(links.uplink[index]))
    ceilings = {other: min(uplink, _bit(rate)) for other, rate in pairs.items()}
    leaves = {other: f"bfifo limit {_queue_bytes(most)}" for other, most in ceilings.items()}
    return _classes("eth0", "dst", uplink, ceilings, leaves)


def incoming(index: int, links: Links, senders: Sequence[int] = ()) -> list[str]:
    """tc's commands at the bridge for what a peer receives: its downlink, and the latency from each of `senders`."""
    rate = float(links.downlink[index])
    bits = _bit(rate)
    if senders:
        leaves = {}
        for other in senders:
            latency = links.latency(other, index)
            uplinks, downlinks = _rates(other, links)[0], _rates(index, links)[1]
            most = min(max(uplinks), max(downlinks), links.pair(other, index))
            packets = LEAST_PACKETS + math.ceil(_bit(most) / 8 * (latency + QUEUE_S) / PACKET_BYTES)
            leaves[other] = f"netem delay {round(1e6 * latency)}us limit {packets}"
        return _classes(f"v{index}", "src", bits, dict.fromkeys(senders, bits), leaves)
    if math.isinf(rate) and not _is_traced(index, links):
        return []
    burst = max(2 * GSO_BYTES, bits // 8 // 250)  # of a timer tick, at the least
    return [f"qdisc add dev v{index} root tbf rate {bits}bit burst {burst} limit {burst + _queue_bytes(bits)}"]


def _is_traced(index: int, links: Links) -> bool:
    return any(change.index == index for change in links.changes)


def _rates(index: int, links: Links) -> tuple[list[float], list[float]]:
    """All that a peer's uplink and downlink ever have, now and by the trace."""
    changes = [change for change in links.changes if change.index == index]
    uplinks, downlinks = [change.uplink for change in changes], [change.downlink for change in changes]
    return [float(links.uplink[index]), *uplinks], [float(links.downlink[index]), *downlinks]


def _changes(lines: Iterable[str]) -> list[str]:
    """tc's commands that have what is there already go by the rates in those that would add it."""
    return [line.replace(" add ", " change ", 1) for line in lines if not line.startswith("filter") and " handle " not in line]


def _classes(device: str, end: str, total: int, ceilings: Mapping[int, int], leaves: Mapping[int, str]) -> list[str]:
    """tc's commands for `total` bit/s, shared by a class for each peer at the other `end`, with its ceiling and its queue."""
    lines = [
        f"qdisc add dev {device} root handle 1: htb",
        f"class add dev {device} parent 1: classid 1:1 htb rate {total}bit quantum {GSO_BYTES}",
    ]
    promised = max(LEAST_BIT, total // len(ceilings))
    for other, most in ceilings.items():
        class_ = f"1:{other + 16:x}"
        lines += [
            f"class add dev {device} parent 1:1 classid {class_} htb rate {min(promised, most)}bit ceil {most}bit "
            f"quantum {GSO_BYTES}",
            f"qdisc add dev {device} parent {class_} {leaves[other]}",
            f"filter add dev {device} protocol ip parent 1: prio 1 u32 match ip {end} {_address(other)}/32 flowid {class_}",
        ]
    return lines


def enter(path: str) -> None:
    """Move this thread, and those that it starts from now on, into a namespace. RunError if that fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET):
            raise RunError(f"cannot enter the network namespace {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


def check_available(num_peers: int) -> None:
    """ConfigError, with the remedy, where this machine or this user cannot make namespaces."""
    remedy = "use --clock virtual, or --clock local, which shapes in user space"
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"clock = 'netns' needs Linux, this is {sys.platform}; {remedy}")
    if os.geteuid() != 0:
        raise ConfigError(f"clock = 'netns' needs root, this is user {os.geteuid()}; run as root, or {remedy}")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ConfigError(f"clock = 'netns' needs {' and '.join(missing)} of iproute2; install it, or {remedy}")
    if num_peers > MAX_PEERS:
        raise ConfigError(f"clock = 'netns' takes at most {MAX_PEERS} peers, not {num_peers}; use --clock virtual")


def remove_stale() -> None:
    """Remove the namespaces of launchers that were killed before they could."""
    owners = {path.name: re.fullmatch(r"gossipfl-(\d+)-\w+", path.name) for path in FOLDER.glob("gossipfl-*")}
    _remove(name for name, owner in owners.items() if owner and not Path("/proc", owner.group(1)).exists())


def _remove(names: Iterable[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=COMMAND_S)


def _run(command: Sequence[str], lines: Sequence[str]) -> None:
    """Give `ip` or `tc` a batch of commands."""
    if not lines:
        return
    batch = [*command, "-batch", "-"]
    done = subprocess.run(batch, input="\n".join(lines) + "\n", text=True, capture_output=True, check=False, timeout=COMMAND_S)
    if done.returncode:
        number = re.search(r":(\d+)", done.stderr)
        line = lines[int(number.group(1)) - 1] if number and int(number.group(1)) <= len(lines) else ""
        reason = done.stderr.strip().partition("\n")[0]  # what follows is the number of the line
        remedy = "run with the capabilities SYS_ADMIN and NET_ADMIN, or " if "not permitted" in reason else ""
        raise ConfigError(f"the kernel refuses `{' '.join(command)} {line}`: {reason}; {remedy}use --clock local")


def _address(index: int) -> str:
    return str(FIRST_ADDRESS + index)


def _bit(rate: float) -> int:
    """Bits per second of a rate in bytes per second."""
    return int(min(max(8 * rate, LEAST_BIT), MOST_BIT))


def _queue_bytes(bits: int) -> int:
    return max(LEAST_QUEUE_BYTES, int(bits / 8 * QUEUE_S))
