"""Following a store while it is written: records in, a position out, nothing lost or repeated.

A position says how many bytes of each segment were read, and the next step of each trajectory that
is open. When a segment is gone, its ``retired`` line in the manifest leads to the shards its
trajectories went to. A trajectory lies in the bytes ``begin .. end`` of its segment, so for a
reader that had come to byte ``p``: ``end <= p`` was read already; the others are read from the
shard, from their next step on. The reader's own checkpoint, position included, is the only
acknowledgement there is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from simlab.core.errors import StoreError
from simlab.store.events import Begin, End, Event, StepRecord, as_event, as_records
from simlab.store.inflight import segment_names
from simlab.store.manifest import Shard
from simlab.store.records import Group, Kind, Record, scan
from simlab.store.schema import Schema
from simlab.store.shards import field_path

if TYPE_CHECKING:
    from simlab.store.store import SnapshotStore

__all__ = [
    "CALL_BYTES",
    "Begin",
    "End",
    "Event",
    "Position",
    "StepRecord",
    "follow",
    "follow_records",
]

CALL_BYTES = 16 << 20
_BESIDES = 1 << 12  # for other records among steps


@dataclass(frozen=True)
class Position:
    """How far a follower has come; :meth:`to_json` gives plain values for a checkpoint.

    Attributes
    ----------
    campaign : str
        The store it belongs to.
    manifest : mapping of str to int
        Bytes of each manifest file up to which retired segments were dealt with.
    segments : mapping of str to int
        Bytes read of each segment. Kept after it is retired, in case that line of the manifest is
        lost to a damaged disk and written again.
    open : mapping of int to (attempt, next step, segment)
        Trajectories that have begun and not ended.
    attempts : mapping of int to int
        Attempts above 1 that were met.
    turn : int
        Calls so far; decides which writer is read first.
    """

    campaign: str
    manifest: Mapping[str, int] = field(default_factory=dict)
    segments: Mapping[str, int] = field(default_factory=dict)
    open: Mapping[int, tuple[int, int, str]] = field(default_factory=dict)
    attempts: Mapping[int, int] = field(default_factory=dict)
    turn: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Position:
        """Read :meth:`to_json`'s values, also after JSON made text of the integer keys."""
        return cls(
            campaign=plain["campaign"],
            manifest=dict(plain["manifest"]),
            segments=dict(plain["segments"]),
            open={
                int(traj): (int(attempt), int(step), str(segment))
                for traj, (attempt, step, segment) in plain["open"].items()
            },
            attempts={int(traj): int(attempt) for traj, attempt in plain["attempts"].items()},
            turn=int(plain["turn"]),
        )


def follow(
    store: SnapshotStore, position: Position | None, at_most: int
) -> tuple[list[Event], Position]:
    """Return up to ``at_most`` events after ``position``, and the position after them.

    Large ones end the call after about ``CALL_BYTES``: memory that was just used is used again.
    """
    form = _Events(store.schema)
    walk = _Walk(store, position, at_most, form)
    events: list[Event] = []
    for event in walk.events():
        events.append(event)
        if len(events) == at_most or form.n_given >= CALL_BYTES:
            break
    return events, walk.position()


def follow_records(
    store: SnapshotStore, position: Position | None, at_most: int, n_bytes: int
) -> tuple[list[memoryview], list[int], Position]:
    """Return the same as records, in runs of bytes, and end after about ``n_bytes``.

    What lies in segments is handed on as it is there, its values unchecked; see
    :func:`simlab.store.events.as_event`. Records that are neighbours there are one run.

    Returns
    -------
    list of memoryview
        The runs.
    list of int
        For every event the run that its records are the next ones of.
    Position
    """
    walk = _Walk(store, position, at_most, _Records(store.schema, n_bytes))
    runs: list[_Piece] = []
    latest: dict[int, int] = {}  # by block; the runs keep the blocks
    order: list[int] = []
    for piece in walk.events():
        block, begin, end = piece
        number = latest.get(id(block), -1)
        if number >= 0 and runs[number].end == begin:
            runs[number] = _Piece(block, runs[number].begin, end)
        else:
            number = latest[id(block)] = len(runs)
            runs.append(piece)
        order.append(number)
        n_bytes -= end - begin
        if len(order) == at_most or n_bytes <= 0:
            break
    return [block[begin:end] for block, begin, end in runs], order, walk.position()


class _Piece(NamedTuple):
    """The records of one event: where they lie in a block of bytes."""

    block: memoryview
    begin: int
    end: int


T = TypeVar("T", covariant=True)


class _Form(Protocol[T]):
    """How a walk hands out what it finds, in segments and in shards."""

    payloads: Literal["raw", "keep"]
    n_bytes: int  # about the most to take in one call

    def live(self, group: Group) -> T: ...

    def sealed(self, event: Event) -> T: ...


class _Events:
    payloads: Literal["raw", "keep"] = "keep"
    n_bytes = CALL_BYTES

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self.n_given = 0  # bytes

    def live(self, group: Group) -> Event:
        self.n_given += group.end - group.begin
        return as_event(self._schema, group)

    def sealed(self, event: Event) -> Event:
        return event


class _Records:
    payloads: Literal["raw", "keep"] = "raw"

    def __init__(self, schema: Schema, n_bytes: int) -> None:
        self._schema, self.n_bytes = schema, n_bytes

    def live(self, group: Group) -> _Piece:
        assert group.block is not None
        return _Piece(group.block, group.begin - group.block_at, group.end - group.block_at)

    def sealed(self, event: Event) -> _Piece:
        records = memoryview(as_records(self._schema, event))
        return _Piece(records, 0, len(records))


class _Walk(Generic[T]):
    """One call's working copy of a position.

    Every change is made before its event is handed out, so that the walk can stop after any event.
    """

    def __init__(
        self, store: SnapshotStore, position: Position | None, at_most: int, form: _Form[T]
    ) -> None:
        if at_most < 1:
            raise StoreError(f"at_most = {at_most}; ask for at least one event")
        position = position or Position(store.uuid)
        if position.campaign != store.uuid:
            raise StoreError(
                f"{store.path}: the position belongs to another store; start from None"
            )
        self._store = store
        self._form = form
        self._at_most = at_most
        self._directory = store.path / "inflight"
        self._manifest = dict(position.manifest)
        self._segments = dict(position.segments)
        self._open = dict(position.open)
        self._attempts = dict(position.attempts)
        self._turn = position.turn

    def position(self) -> Position:
        return Position(
            self._store.uuid,
            self._manifest,
            self._segments,
            self._open,
            self._attempts,
            self._turn + 1,
        )

    def events(self) -> Iterator[T]:
        names = segment_names(self._directory)  # before the manifest: what goes is retired first
        catalogue = self._store.catalogue
        catalogue.refresh()
        for file, offset, segment in catalogue.retired_order:
            if offset > self._manifest.get(file, 0):
                for event in self._sealed(segment):
                    yield self._form.sealed(event)
                self._manifest[file] = offset
        live = [name for name in names if name not in catalogue.retired and self._has_news(name)]
        step_bytes = self._store.step_bytes
        n_steps = min(self._at_most, -(-self._form.n_bytes // step_bytes))
        share = -(-n_steps // max(len(live), 1)) * step_bytes + _BESIDES
        walks = [self._live(name, share) for name in live]
        shift = self._turn % len(walks) if walks else 0
        walks = walks[shift:] + walks[:shift]
        while walks:
            still = []
            for walk in walks:
                item = next(walk, None)
                if item is not None:
                    still.append(walk)
                    yield item
            walks = still

    def _has_news(self, name: str) -> bool:
        try:
            size = os.stat(self._directory / name).st_size
        except FileNotFoundError:  # retired since; the next call finds its line
            return False
        return size > self._segments.get(name, 0)

    def _live(self, name: str, wanted: int) -> Iterator[T]:
        """Read on in a segment, of which about so many bytes will be taken."""
        start = self._segments.get(name, 0)
        try:
            fd = os.open(self._directory / name, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            size = os.fstat(fd).st_size
            form = self._form
            for group in scan(fd, start, size, form.payloads, wanted):
                is_news = self._take(name, group.commit)
                self._segments[name] = group.end
                if is_news:
                    yield form.live(group)
        finally:
            os.close(fd)

    def _take(self, name: str, record: Record) -> bool:
        """Note what a record says; return whether it is news to the follower."""
        traj, attempt = record.traj, record.attempt
        if record.kind == Kind.BEGIN:
            return self._begins(traj, attempt, name)
        if record.kind not in (Kind.STEP, Kind.END) or not self._is_current(traj, attempt, name):
            return False
        if record.kind == Kind.END:
            del self._open[traj]
        elif record.step < self._open[traj][1]:
            return False
        else:
            self._open[traj] = (attempt, record.step + 1, name)
        return True

    def _sealed(self, segment: str) -> Iterator[Event]:
        """Read what is left of a retired segment from the shards it went to."""
        for end, shard, row in self._left(segment):
            yield from self._row(segment, end, shard.name, shard.split, row)
            self._segments[segment] = end
        gone = [traj for traj, state in self._open.items() if state[2] == segment]
        for traj in gone:
            attempt = self._open.pop(traj)[0]
            failed = self._store.catalogue.failed.get(traj, (0, ""))[0] == attempt
            yield End(traj, attempt, "failed" if failed else "abandoned")

    def _left(self, segment: str) -> Iterator[tuple[int, Shard, int]]:
        """Return the rows of a retired segment beyond what was read, as they ended.

        There may be very many and a call takes few, so few are put in order.
        """
        come_to = self._segments.get(segment, 0)
        found = self._store.catalogue.rows_of(segment)
        ends = np.concatenate([shard.end[rows] for shard, rows in found] or [np.arange(0)])
        which = np.repeat(np.arange(len(found)), [len(rows) for _, rows in found])
        rows = np.concatenate([rows for _, rows in found] or [np.arange(0)])
        while len(left := np.flatnonzero(ends > come_to)):
            if len(left) > self._at_most:
                left = left[np.argpartition(ends[left], self._at_most)[: self._at_most]]
            for i in left[np.argsort(ends[left])].tolist():
                yield int(ends[i]), found[which[i]][0], int(rows[i])
            come_to = ends[left].max()

    def _row(self, segment: str, end: int, name: str, split: str, row: int) -> Iterator[Event]:
        files, schema = self._store.files, self._store.schema
        shard = files.get(name)
        traj, attempt = int(shard.traj[row]), int(shard.attempt[row])
        if self._begins(traj, attempt, segment):
            assigned = self._store.split_of(traj)
            yield Begin(traj, attempt, assigned, files.sample(name, row))
        if not self._is_current(traj, attempt, segment):
            return
        for step in range(self._open[traj][1], shard.n_steps):
            self._open[traj] = (attempt, step + 1, segment)
            fields = {
                spec.name: files.values(name, field_path(spec), (row, step))
                for spec in schema.outputs
            }
            yield StepRecord(traj, attempt, step, schema.times[step], fields)
        del self._open[traj]
        self._segments[segment] = end
        yield End(traj, attempt, "failed" if split == "failed" else "done")

    def _begins(self, traj: int, attempt: int, segment: str) -> bool:
        """Note that an attempt begins, unless it or a higher one has been met."""
        current = self._open.get(traj, (0, 0, ""))[0]
        if attempt <= max(current, self._attempts.get(traj, 0)):
            return False
        self._open[traj] = (attempt, 0, segment)
        if attempt > 1:
            self._attempts[traj] = attempt
        return True

    def _is_current(self, traj: int, attempt: int, segment: str) -> bool:
        state = self._open.get(traj)
        return state is not None and (state[0], state[2]) == (attempt, segment)
