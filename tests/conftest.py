"""Fixtures shared by the tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets: `$GOSSIPFL_DATA`, else `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("GOSSIPFL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; set GOSSIPFL_DATA")
    return folder
