"""What the segments on disk hold: an index that is kept up to date by reading only new records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from simlab.store import files
from simlab.store.records import Kind, scan
from simlab.store.segments import SUFFIX

__all__ = ["Inflight", "Run", "SegmentState", "segment_names", "writer_of"]


@dataclass(slots=True)
class Run:
    """One attempt at a trajectory, as found in a segment. ``status`` is "open" until it ends."""

    traj: int
    attempt: int
    begin: int
    end: int = -1
    n_steps: int = 0
    status: str = "open"
    reason: str = ""


@dataclass
class SegmentState:
    """What is known of one segment: how far it was read, its runs, whether it is closed."""

    name: str
    offset: int = 0
    size: int = 0
    is_closed: bool = False
    is_full: bool = False
    runs: dict[int, Run] = field(default_factory=dict)
    ended: list[Run] = field(default_factory=list)

    def all_runs(self) -> Iterator[Run]:
        """Return the ended and the open runs."""
        yield from self.ended
        yield from self.runs.values()


def writer_of(segment: str) -> str:
    """Return the writer id in a segment's name."""
    return segment.split(".", 1)[0]


def segment_names(directory: Path) -> list[str]:
    """Return the names of all segments on disk, sorted."""
    return sorted(item.name for item in os.scandir(directory) if item.name.endswith(SUFFIX))


class Inflight:
    """The index of all segments of one store.

    Headers are read, values are skipped; their CRCs are checked by whoever uses the values.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._attempts: dict[int, int] = {}
        self.segments: dict[str, SegmentState] = {}

    def refresh(self, skip: str = "") -> None:
        """Read what was written since the last call, but not what the writer ``skip`` wrote."""
        names = segment_names(self._directory)
        for gone in self.segments.keys() - set(names):
            del self.segments[gone]
        for name in names:
            if writer_of(name) == skip:
                continue
            state = self.segments.setdefault(name, SegmentState(name))
            if not state.is_closed:
                self._read(state)

    def is_writable(self, name: str) -> bool:
        """Return whether a segment may still grow."""
        state = self.segments[name]
        path = self._directory / name
        return not state.is_closed and files.is_alive(writer_of(name), path)

    def last_attempt(self, traj: int) -> int:
        """Return the highest attempt at a trajectory in any segment, 0 when there is none."""
        return self._attempts.get(traj, 0)

    def _read(self, state: SegmentState) -> None:
        try:
            fd = os.open(self._directory / state.name, os.O_RDONLY)
        except FileNotFoundError:  # sealed in the meantime
            return
        try:
            size = os.fstat(fd).st_size
            if size < state.offset:  # cut by a recovery: read it anew
                state = self.segments[state.name] = SegmentState(state.name)
            state.size = size
            if size == state.offset:
                return
            for group in scan(fd, state.offset, state.size, "skip"):
                record = group.commit
                if record.kind == Kind.BEGIN:
                    traj, attempt = record.traj, record.attempt
                    state.runs[traj] = Run(traj, attempt, group.begin)
                    self._attempts[traj] = max(attempt, self._attempts.get(traj, 0))
                elif record.kind == Kind.STEP:
                    state.runs[record.traj].n_steps = record.step + 1
                elif record.kind == Kind.END:
                    run = state.runs.pop(record.traj)
                    body = record.json()
                    run.end, run.status, run.reason = group.end, body["status"], body["reason"]
                    state.ended.append(run)
                elif record.kind == Kind.CLOSE:
                    state.is_closed = True
                    state.is_full = record.json()["is_full"]
                state.offset = group.end
        finally:
            os.close(fd)
