"""What is written down in a run about how its samples are drawn.

    sampling/generation-0003.json    the third generation, by the trainer; never changes
    sampling/draws.log               a line for each training sample, by the solvers, before it
                                     is solved: its id, its generation, a checksum
    sampling/redraws.log             a line for each sample that failed at once and is drawn anew,
                                     before it is: its id, how often by now, a checksum

The first two are active sampling's (:mod:`simlab.problems.breed`), the third is that of
``campaign.redraws``.

Generations are whole files, synced and renamed into place, so a reader sees all of one or nothing.
Lines are appended in one write and synced; each begins with a line break, so that one torn by a
crash spoils no other. A draw whose line is lost was never begun. A sample that is drawn again, by
a resumed campaign or for a second attempt, keeps the generation it has.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from simlab.core.errors import StoreError
from simlab.problems.breed import Generation
from simlab.store import files

__all__ = ["DrawLog", "GenerationFiles"]


class GenerationFiles:
    """The generations of a run, by number from 1; one process writes, any number read.

    Parameters
    ----------
    directory : Path
        May not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._n_read = 0

    def _file(self, number: int) -> Path:
        return self._directory / f"generation-{number:04d}.json"

    def write(self, number: int, generation: Generation, **facts: Any) -> None:
        """Keep a generation, with facts about how it was made; its writer knows it already.

        Raises
        ------
        StoreError
            When there is one of that number already, or it cannot be written.
        """
        path = self._file(number)
        text = json.dumps({"generation": number, **facts, **generation.to_json()})
        with files.reported(path):
            is_new = files.publish(path, text, overwrite=False)
        if not is_new:
            raise StoreError(f"{path}: is there already; two trainings of one run at a time?")
        self._n_read = max(self._n_read, number)

    def news(self) -> list[tuple[Generation, dict[str, Any]]]:
        """Return the generations since the last call, in order, with their facts.

        Costs one look for a file when there are none.
        """
        found = []
        while (path := self._file(self._n_read + 1)).is_file():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                found.append((Generation.from_json(kept), kept))
            except (OSError, ValueError, KeyError) as error:
                raise StoreError(f"{path}: cannot be read ({error})") from error
            self._n_read += 1
        return found


class DrawLog:
    """A number for each draw of a run, its generation; any number of processes write and read.

    Parameters
    ----------
    directory : Path
        May not exist yet.
    name : str
        Of the file in it.
    """

    def __init__(self, directory: Path, name: str = "draws.log") -> None:
        self._path = directory / name
        self._offset = 0

    def note(self, index: int, number: int) -> None:
        """Append one draw; it is on the disk when this returns."""
        words = f"{index} {number}"
        line = f"\n{words} {zlib.crc32(words.encode()):08x}\n".encode()
        with files.reported(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                files.write_all(fd, [line])
                files.sync(fd)
            finally:
                os.close(fd)

    def news(self) -> dict[int, int]:
        """Return the numbers of the draws noted since the last call, by id; the first of an id."""
        return dict(reversed(self.lines()))

    def lines(self) -> list[tuple[int, int]]:
        """Return id and number of every line since the last call whose checksum is right."""
        found: list[tuple[int, int]] = []
        with files.reported(self._path):
            try:
                with self._path.open("rb") as file:
                    file.seek(self._offset)
                    added = file.read()
            except FileNotFoundError:
                return found
        whole = added.rfind(b"\n") + 1
        self._offset += whole
        for line in added[:whole].split(b"\n"):
            words, _, checksum = line.rpartition(b" ")
            if words and checksum == f"{zlib.crc32(words):08x}".encode():
                index, number = map(int, words.split())
                found.append((index, number))
        return found
