"""The manifest: append-only lines that say which shards count, and the catalogue made of them.

Every process that seals has its own file ``manifest/<id>.jsonl``. A line is one JSON object with a
``crc`` over the rest; its kinds are

- ``shard``: a sealed shard, with where each of its trajectories came from and its moments;
- ``failed``: trajectories that failed before their first step, so that no shard holds them;
- ``retired``: a segment whose trajectories are all sealed; written just before it is unlinked;
- ``dropped``: a shard that was found damaged and no longer counts.

A last line without its end is torn and does not count; a line whose CRC is wrong is damaged.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simlab.core.errors import StoreError
from simlab.store import files

__all__ = ["Catalogue", "ManifestWriter", "Shard", "blank_damaged", "trim_torn"]


def _line(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":"))
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    head, mark, crc = line.rpartition(b',"crc":"')
    if not mark or crc[8:] != b'"}' or f"{zlib.crc32(head + b'}'):08x}".encode() != crc[:8]:
        return None
    content: dict[str, Any] = json.loads(head + b"}")
    return content


class ManifestWriter:
    """Appends lines to this process's own manifest file; to another one after a failure."""

    def __init__(self, directory: Path) -> None:
        self.id = files.process_id()
        self._path = directory / f"{self.id}.jsonl"
        self.n_shards = 0

    def append(self, content: Mapping[str, Any]) -> None:
        """Write one line and bring it to the disk: the commit point of sealing."""
        is_new = not self._path.exists()
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
            try:
                files.write_all(fd, [_line({"v": 1, **content})])
                files.sync(fd)
            except OSError as error:
                # who read the line already, or finds half of it, does not look at this file again
                failed, self._path = self._path, self._path.with_name(f"{files.process_id()}.jsonl")
                with suppress(OSError):
                    files.truncate(fd, size)
                raise StoreError(f"{failed}: cannot write ({error.strerror})") from error
            if is_new:
                files.sync_directory(self._path.parent)
        finally:
            os.close(fd)


def trim_torn(directory: Path) -> list[str]:
    """Cut torn last lines of all manifest files; call only while holding the sealing lock."""
    trimmed = []
    for path in sorted(directory.glob("*.jsonl")):
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            fd = os.open(path, os.O_RDWR)
            try:
                files.truncate(fd, whole)
                files.sync(fd)
            finally:
                os.close(fd)
            trimmed.append(path.name)
    return trimmed


def blank_damaged(directory: Path, quarantine: Path) -> list[str]:
    """Overwrite damaged lines by spaces, so that no byte moves; call only with the sealing lock.

    The file as it was goes to quarantine. What the line said is found again from the shards.
    """
    mended = []
    for path in sorted(directory.glob("*.jsonl")):
        data = path.read_bytes()
        lines = data.split(b"\n")
        whole = [line if _parse(line) or not line.strip() else b" " * len(line) for line in lines]
        whole[-1] = lines[-1]
        if whole != lines:
            files.publish(quarantine / path.name, data)
            files.publish(path, b"\n".join(whole))
            mended.append(path.name)
    return mended


@dataclass(eq=False)
class Shard:
    """A sealed shard as its manifest line describes it; rows are the trajectories in it.

    Attributes
    ----------
    name : str
        Path below ``data/``, for instance ``"train/….h5"``.
    traj, attempt : ndarray of int64, shape (B,)
    source : ndarray of int64, shape (B,)
        Which of ``segments`` a row came from.
    begin, end : ndarray of int64, shape (B,)
        Bytes of that segment in which the trajectory lay.
    """

    name: str
    split: str
    n_bytes: int
    sha256: str
    n_steps: int
    traj: np.ndarray
    attempt: np.ndarray
    segments: list[str]
    source: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    reasons: list[str]
    moments: dict[str, Any]
    is_dropped: bool = False

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Shard:
        """Read a line of kind ``shard``."""
        columns: dict[str, Any] = {
            key: np.asarray(line[key], dtype=np.int64)
            for key in ("traj", "attempt", "source", "begin", "end")
        }
        return cls(
            name=line["shard"],
            split=line["shard"].split("/")[0],
            n_bytes=line["bytes"],
            sha256=line["sha256"],
            n_steps=line["n_steps"],
            segments=line["segments"],
            reasons=line["reasons"],
            moments=line["moments"],
            **columns,
        )


@dataclass
class _Winners:
    """For each trajectory the row that counts: highest attempt; -1 where there is none."""

    attempt: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    n_rows: int = 0

    @classmethod
    def none(cls, n: int) -> _Winners:
        return cls(np.zeros(n, np.int64), np.full(n, -1), np.full(n, -1))

    def add(self, number: int, shard: Shard) -> None:
        better = shard.attempt > self.attempt[shard.traj]
        rows = np.flatnonzero(better)
        self.attempt[shard.traj[rows]] = shard.attempt[rows]
        self.shard[shard.traj[rows]] = number
        self.row[shard.traj[rows]] = rows
        self.n_rows += len(shard.traj)


@dataclass(eq=False)
class Catalogue:
    """All that the manifest says, kept up to date by reading only new lines.

    Attributes
    ----------
    shards : list of Shard
        In the order they were read.
    failed : dict of int to (attempt, reason)
        Trajectories that failed, by highest attempt.
    retired : dict of str to dict
        Segments that are gone, with their line.
    damaged : list of str
        Lines that cannot be read.
    """

    directory: Path
    n: int
    shards: list[Shard] = field(default_factory=list)
    failed: dict[int, tuple[int, str]] = field(default_factory=dict)
    retired: dict[str, dict[str, Any]] = field(default_factory=dict)
    retired_order: list[tuple[str, int, str]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._offsets: dict[str, int] = {}
        self._done = _Winners.none(self.n)
        self._attempts = np.zeros(self.n, dtype=np.int64)
        self._by_segment: dict[str, list[int]] = {}
        self._by_name: dict[str, int] = {}
        self._dropped: set[str] = set()

    def refresh(self) -> None:
        """Read what was appended since the last call."""
        for item in sorted(os.scandir(self.directory), key=lambda entry: entry.name):
            if not item.name.endswith(".jsonl"):
                continue
            offset = self._offsets.get(item.name, 0)
            if item.stat().st_size <= offset:
                continue
            with open(item.path, "rb") as stream:
                stream.seek(offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    self._take(item.name, offset, line[:-1])
            self._offsets[item.name] = offset

    def rows_of(self, segment: str) -> list[tuple[Shard, np.ndarray]]:
        """Return the shards, and the rows in them, that came from a segment."""
        found = []
        for number in self._by_segment.get(segment, ()):
            shard = self.shards[number]
            rows = np.flatnonzero(shard.source == shard.segments.index(segment))
            if len(rows) and not shard.is_dropped:
                found.append((shard, rows))
        return found

    def where(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shard number and row of finished trajectories; -1 for those not sealed."""
        return self._done.shard[ids], self._done.row[ids]

    @property
    def done_attempts(self) -> np.ndarray:
        """Attempt of the sealed finished trajectory, 0 where there is none; shape (n,)."""
        return self._done.attempt

    @property
    def n_superseded(self) -> int:
        """Sealed rows that a higher attempt has replaced."""
        return self._done.n_rows - int(np.count_nonzero(self._done.attempt))

    @property
    def live_shards(self) -> list[Shard]:
        """Shards that count."""
        return [shard for shard in self.shards if not shard.is_dropped]

    @property
    def segments(self) -> set[str]:
        """Names of all segments any shard came from."""
        return set(self._by_segment)

    def last_attempt(self, traj: int) -> int:
        """Return the highest attempt at a trajectory that the manifest knows of."""
        return int(self._attempts[traj])

    def _take(self, file: str, offset: int, line: bytes) -> None:
        content = _parse(line)
        if content is None and not line.strip(b" "):  # blanked by a recovery
            return
        if content is None:
            self.damaged.append(f"manifest/{file}: the line that ends at byte {offset} is damaged")
            return
        kind = content["kind"]
        if kind == "shard":
            self._add_shard(Shard.from_line(content))
        elif kind == "failed":
            for traj, attempt, reason in content["failed"]:
                self._add_failed(traj, attempt, reason)
        elif kind == "retired":
            if content["segment"] not in self.retired:
                self.retired_order.append((file, offset, content["segment"]))
            self.retired[content["segment"]] = content
            for traj, attempt in content["abandoned"]:
                self._attempts[traj] = max(self._attempts[traj], attempt)
        elif kind == "dropped":
            self._dropped.add(content["shard"])
            number = self._by_name.get(content["shard"])
            if number is not None:
                self._drop(number)

    def _add_shard(self, shard: Shard) -> None:
        if shard.name in self._by_name:
            return
        number = len(self.shards)
        self.shards.append(shard)
        self._by_name[shard.name] = number
        for name in shard.segments:
            self._by_segment.setdefault(name, []).append(number)
        np.maximum.at(self._attempts, shard.traj, shard.attempt)
        if shard.name in self._dropped:
            shard.is_dropped = True
        elif shard.split == "failed":
            for traj, attempt, reason in zip(
                shard.traj.tolist(), shard.attempt.tolist(), shard.reasons, strict=True
            ):
                self._add_failed(traj, attempt, reason)
        else:
            self._done.add(number, shard)

    def _add_failed(self, traj: int, attempt: int, reason: str) -> None:
        self._attempts[traj] = max(self._attempts[traj], attempt)
        if attempt > self.failed.get(traj, (0, ""))[0]:
            self.failed[traj] = (attempt, reason)

    def _drop(self, number: int) -> None:
        self.shards[number].is_dropped = True
        self._done = _Winners.none(self.n)
        for other, shard in enumerate(self.shards):
            if not shard.is_dropped and shard.split != "failed":
                self._done.add(other, shard)
