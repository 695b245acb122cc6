"""Pieces of models by the digest of their content, in a folder or in memory, within a bound; the longest unused go first."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path

from gossipfl.errors import ConfigError
from gossipfl.inference.planning.offers import Piece
from gossipfl.segments.codecs.planes import piece_digest

DEFAULT_BYTES = 1 << 30
_DIGEST = re.compile(r"[0-9a-f]{32}", re.ASCII)


def digest_of(piece: Piece, payload: bytes | memoryview) -> str:
    """What names this content of a piece."""
    return piece_digest(piece.codec, piece.range[1] - piece.range[0], payload).hex()


class ContentCache:
    """Of at most `max_bytes`. With a folder its files, each written in one step, outlive the process and may be shared.

    May be used from any thread. What has been damaged is found when it is read, and forgotten.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = DEFAULT_BYTES) -> None:
        self.folder = None if folder is None else Path(folder)
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the longest unused first
        self._contents: dict[str, bytes] = {}
        if self.folder is not None:
            self._open(self.folder)

    def get(self, piece: Piece) -> bytes | None:
        """The content of a piece; None if it is not here, or not whole."""
        with self._lock:
            if piece.digest not in self._sizes:
                return None
            self._sizes.move_to_end(piece.digest)
            content = self._read(piece.digest)
            if content is not None and digest_of(piece, content) == piece.digest:
                return content
            self._drop(piece.digest)
            return None

    def put(self, digest: str, content: bytes) -> None:
        """Keep a content that has been checked, unless there is no room or no permission for it."""
        with self._lock:
            if digest in self._sizes or len(content) > self.max_bytes or not _DIGEST.fullmatch(digest):
                return
            while self.num_bytes + len(content) > self.max_bytes:
                self._drop(next(iter(self._sizes)))
            if self.folder is None:
                self._contents[digest] = content
            else:
                try:
                    _write_at_once(self.folder / digest, content)
                except OSError:
                    return  # a full disk: the piece is pulled again another time
            self._sizes[digest] = len(content)
            self.num_bytes += len(content)

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = [(entry.stat(), entry.name) for entry in os.scandir(folder) if _DIGEST.fullmatch(entry.name)]
        except OSError as error:
            raise ConfigError(f"cache = {str(folder)!r} cannot be used: {error.strerror}; name a folder to write to") from error
        for status, digest in sorted(found, key=lambda item: item[0].st_mtime):
            self._sizes[digest] = status.st_size
            self.num_bytes += status.st_size
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._sizes)))

    def _read(self, digest: str) -> bytes | None:
        if self.folder is None:
            return self._contents.get(digest)
        with contextlib.suppress(OSError):
            path = self.folder / digest
            content = path.read_bytes()
            os.utime(path)
            return content
        return None

    def _drop(self, digest: str) -> None:
        self.num_bytes -= self._sizes.pop(digest)
        self._contents.pop(digest, None)
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / digest).unlink()


def _write_at_once(path: Path, content: bytes) -> None:
    """Nobody ever sees half of it."""
    descriptor, partial = tempfile.mkstemp(prefix=".piece-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
