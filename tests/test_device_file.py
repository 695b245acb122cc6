import math
import tomllib

import pytest

from gossipfl.errors import ConfigError
from gossipfl.inference.planning.profile import DeviceProfile
from gossipfl.scenario import device_file
from gossipfl.scenario.device_file import load_device, read_device

CAMERA = """
name = "camera"
speed = 0.2
memory = "256MiB"
uplink = "10Mbit"
downlink = "2MB/s"
latency = "20ms"
compute_w = 2.5
transmit_w = 1
time_weight = 1
energy_weight = 0.1
price_weight = 0.5
requests = 1000
"""


def message_of(table):
    with pytest.raises(ConfigError) as caught:
        load_device(table)
    return str(caught.value)


def test_every_key_is_read_with_its_unit():
    assert load_device(tomllib.loads(CAMERA)) == DeviceProfile(
        name="camera",
        speed=0.2,
        memory_bytes=256 * 2**20,
        uplink=1_250_000.0,
        downlink=2_000_000.0,
        latency_s=0.02,
        compute_w=2.5,
        transmit_w=1.0,
        time_weight=1.0,
        energy_weight=0.1,
        price_weight=0.5,
        requests=1000,
    )


def test_what_is_left_out_is_as_ever():
    assert load_device({}) == DeviceProfile()
    assert load_device({"uplink": "unlimited"}).uplink == math.inf


def test_the_description_shows_a_device_that_can_be():
    example = device_file.__doc__.partition("\n\n")[2]
    assert load_device(tomllib.loads(example)).memory_bytes == 256 * 2**20


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), ("2GB", 2 * 10**9), ("64kB", 64_000), ("64KB", 64_000), ("300000B", 300_000)],
)
def test_sizes_are_decimal_or_binary_as_they_say(text, num_bytes):
    assert load_device({"memory": text}).memory_bytes == num_bytes


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"memroy": "1GB"}, "unknown key 'memroy'; did you mean 'memory'?"),
        ({"memory_bytes": 3}, "unknown key 'memory_bytes'; did you mean 'memory'?"),
        ({"bandwidth": "1Mbit"}, "unknown key 'bandwidth'; 'bandwidth' is called 'uplink' here"),
        ({"memory": 512}, 'memory = 512 has no unit; say "512MiB", or "512B" if bytes are meant'),
        ({"memory": "512"}, 'memory = \'512\' has no unit; say "512MiB", or "512B" if bytes are meant'),
        ({"memory": "0MiB"}, "memory = '0MiB' must be at least a byte"),
        ({"memory": "-1MiB"}, "memory = '-1MiB' must be a size with its unit, such as '512MiB' or '2GB'"),
        ({"memory": "1Mbit"}, "memory = '1Mbit' must be a size with its unit, such as '512MiB' or '2GB'"),
        ({"speed": 0}, "speed = 0 must be a factor above 0: 2 = twice as fast"),
        ({"speed": math.nan}, "speed = nan must be a factor above 0: 2 = twice as fast"),
        ({"uplink": 10}, 'uplink = 10 has no unit; say "10Mbit" (per second), or "10MB" if bytes are meant'),
        ({"latency": 20}, "latency = 20 must be a time of at least 0, with its unit, such as '50ms'"),
        ({"compute_w": -1}, "compute_w = -1 must be at least 0.0"),
        ({"energy_weight": "much"}, "energy_weight = 'much' must be a number"),
        ({"requests": 0}, "requests = 0 must be at least 1"),
        ({"requests": 1.5}, "requests = 1.5 must be a whole number"),
        ({"name": ""}, "name = '' must not be empty"),
        ({"time_weight": 0}, "device 'device' weighs nothing; give time_weight, energy_weight or price_weight, such as 1"),
        (
            {"speed": 1e-12},
            "speed = 1e-12 of device 'device' must be above 0: 1 is the machine that calibrated, 0.1 is ten times slower",
        ),
    ],
)
def test_what_cannot_be_is_told_by_its_key(table, message):
    assert message_of(table) == message


def test_all_problems_are_told_at_once():
    assert message_of({"speed": -1, "latency": "x", "memroy": 1}).count("\n") == 2


def test_a_file_is_named_with_each_problem(tmp_path):
    path = tmp_path / "camera.toml"
    path.write_text(CAMERA)
    assert read_device(path).name == "camera"
    path.write_text("speed = 0\nmemory = 1\n")
    with pytest.raises(ConfigError) as caught:
        read_device(path)
    assert [line.startswith(f"{path}: ") for line in str(caught.value).splitlines()] == [True, True]
    with pytest.raises(ConfigError, match="a device is a text file in UTF-8"):
        read_device(tmp_path / "nope.toml")
