"""Fixtures shared by the tests."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples each time; `--hypothesis-profile search` looks for others.
settings.register_profile("same", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("same")


def pytest_configure() -> None:
    """What the tests start hears Ctrl-C, also where they run in the background of a shell, which lets nobody there hear it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets: `$GOSSIPFL_DATA`, else `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("GOSSIPFL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; set GOSSIPFL_DATA")
    return folder
