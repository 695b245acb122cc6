"""An edge device as a person describes it: a table of a TOML file, with units.

name = "camera"
speed = 0.2               # five times slower than the machine that calibrated
memory = "256MiB"         # that the model may take
uplink = "10Mbit"
latency = "20ms"          # one way
requests = 1000           # expected for each download of the weights
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from gossipfl.errors import ConfigError
from gossipfl.inference.planning.profile import DeviceProfile, check_device
from gossipfl.scenario.problems import ScenarioError, problems_of
from gossipfl.scenario.sources import read_toml
from gossipfl.scenario.values import DelayS, Factor, Rate, Size, Table, Text

_DEFAULT = DeviceProfile()


class _Device(Table):
    name: Text = Field(default=_DEFAULT.name)
    speed: Factor = Field(default=_DEFAULT.speed, description="2 = twice as fast as the machine that calibrated")
    memory: Size = Field(default=_DEFAULT.memory_bytes, description="that the model may take")
    uplink: Rate = Field(default=_DEFAULT.uplink, description="from the device to the server, per second")
    downlink: Rate = Field(default=_DEFAULT.downlink, description="from the server to the device, per second")
    latency: DelayS = Field(default=_DEFAULT.latency_s, description="one way")
    compute_w: float = Field(default=_DEFAULT.compute_w, ge=0, description="watts while it computes")
    transmit_w: float = Field(default=_DEFAULT.transmit_w, ge=0, description="watts while it sends")
    time_weight: float = Field(default=_DEFAULT.time_weight, ge=0, description="cost of a second")
    energy_weight: float = Field(default=_DEFAULT.energy_weight, ge=0, description="cost of a joule of the device")
    price_weight: float = Field(default=_DEFAULT.price_weight, ge=0, description="cost of a second of the server")
    requests: int = Field(default=_DEFAULT.requests, ge=1, description="expected for each download of the weights")


def load_device(table: Mapping[str, Any]) -> DeviceProfile:
    """The device that `table` describes; ConfigError with a line for each problem."""
    try:
        device = _Device(**table)
    except ValidationError as error:
        raise ScenarioError(problems_of(error, _Device)) from None
    same = {key: value for key, value in device if key not in ("memory", "latency")}
    profile = DeviceProfile(memory_bytes=device.memory, latency_s=device.latency, **same)
    check_device(profile)
    return profile


def read_device(path: Path) -> DeviceProfile:
    """The device that the TOML file at `path` describes; ConfigError, naming the file, if it cannot be."""
    table, _ = read_toml(path, "a device")
    try:
        return load_device(table)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
