"""Addresses that peers listen at: `tcp://host:port`, `ipc://path` or `inproc://name`, checked before a socket sees them."""

from __future__ import annotations

import contextlib
import errno
import socket
from ipaddress import ip_address
from urllib.parse import urlsplit

import zmq

from gossipfl.errors import ConfigError


def check_loopback(address: str, insecure: bool) -> None:
    """ConfigError if a tcp address is reachable from other machines and `insecure` does not allow it."""
    check_address(address, "the address to listen at")
    url = urlsplit(address)
    if url.scheme != "tcp" or insecure:
        return
    host = url.hostname or ""
    if not is_loopback(host):
        raise ConfigError(
            f"transport.host = {host!r} is reachable from other machines and peers are not authenticated yet; "
            "use 127.0.0.1 or ::1, or pass --insecure on a network where you trust everybody"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, an IP address or a name."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(address: str, what: str) -> None:
    """ConfigError unless it is `tcp://host:port`, `ipc://path` or `inproc://name`."""
    kind, separator, rest = address.partition("://")
    is_address = bool(separator and rest) and kind in ("tcp", "ipc", "inproc")
    if is_address and kind == "tcp":
        try:
            url = urlsplit(address)
            is_address = bool(url.hostname) and url.port is not None
        except ValueError:
            is_address = False
    if not is_address:
        raise ConfigError(
            f"{what}, {address!r}, is none (tcp, ipc or inproc): give tcp://host:port, ipc://path or inproc://name"
        )


def is_listened_at(path: str) -> bool:
    """Whether somebody accepts connections at this socket file."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(path)
        return True
    return False


def in_use(address: str) -> str:
    """What to tell of an address that somebody else listens at."""
    return f"{address} is in use; choose another{' port, or 0 for any free one' if address.startswith('tcp:') else ''}"


def bind_failure(address: str, error: zmq.ZMQError | OSError) -> str:
    """What to tell of an address that cannot be bound to."""
    if error.errno == zmq.EADDRINUSE:
        return in_use(address)
    if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
        return f"{address} is no address of this machine; bind to one that is, and advertise the other"
    if error.errno == errno.ENAMETOOLONG:
        return (
            f"{address} is longer than the {zmq.IPC_PATH_MAX_LEN} characters that the path of a socket may have; choose a "
            "shorter one (in a run, set TMPDIR to a folder of a shorter path), or tcp"
        )
    return f"cannot bind to {address}: {error}"
