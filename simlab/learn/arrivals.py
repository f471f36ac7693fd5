"""The log of what entered the buffer, and when: enough to train once more, bit for bit.

One line each, in the order in which it happened::

    p 17 3                a put: step 3 of trajectory 17
    f 17                  trajectory 17 is complete from here on
    s {"mean": ...}       the normalisation
    e                     the stream has ended, and the buffer holds all of it
    b 0.0029              a batch, with its learning rate

Lines are written at checkpoints and whenever many have come together; a resumed training cuts the
file back to its checkpoint first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from simlab.core.errors import StoreError

__all__ = ["ArrivalLog", "read_arrivals"]

_MANY = 10_000


class ArrivalLog:
    """Writes the log; to nowhere without a path.

    Attributes
    ----------
    size : int
        Bytes written and waiting to be.
    """

    def __init__(self, path: Path | None, size: int = 0) -> None:
        self._path, self.size = path, size
        self._lines: list[str] = []
        self._is_cut = False

    def note(self, line: str) -> None:
        """Add a line."""
        if self._path is None:
            return
        self._lines.append(line)
        self.size += len(line) + 1
        if len(self._lines) >= _MANY:
            self.flush()

    def flush(self) -> None:
        """Write and sync the lines that wait."""
        if self._path is None or not (self._lines or not self._is_cut):
            return
        text = "".join(f"{line}\n" for line in self._lines).encode()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.ftruncate(fd, self.size - len(text))
            os.pwrite(fd, text, self.size - len(text))
            os.fsync(fd)
        finally:
            os.close(fd)
        self._lines.clear()
        self._is_cut = True


def read_arrivals(path: Path, offset: int = 0) -> Iterator[tuple[str, str, int]]:
    """Yield the kind, the rest and the end of every whole line from a byte on.

    Raises
    ------
    StoreError
        When the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                kind, _, rest = line.decode().rstrip("\n").partition(" ")
                yield kind, rest, offset
    except OSError as error:
        raise StoreError(f"{path}: the log of arrivals cannot be read ({error})") from error
