"""A temporary folder that does not outlive its process for long: the next one removes what a killed one left.

    with temporary_folder() as folder: ...

Each such folder holds a file that its process keeps locked. Whoever gets the lock knows that the owner is gone, however it
went; a folder without that file, or of another user, is none of ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gossipfl.scenario.records import remove_files

PREFIX = "gossipfl-"
MARK = "gossipfl.lock"


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A fresh folder, for the time of the context; also removes those whose process is gone."""
    remove_stale()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / f"{MARK}.new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"{MARK}.new").rename(folder / MARK)  # locked from the moment that it is seen
            yield folder


def remove_stale() -> None:
    """Remove the folders of processes that were killed before they could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, still in use, or removed in the meantime
            _remove_if_stale(folder)


def _remove_if_stale(folder: Path) -> None:
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        return
    descriptor = os.open(folder / MARK, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_files(folder)
    finally:
        os.close(descriptor)
