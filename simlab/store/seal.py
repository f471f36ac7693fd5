"""Sealing and recovery: segments become shards, in an order that survives a crash at any point.

Sealing one batch of segments:

1. write ``inflight/x.h5.part`` and sync it; its attribute ``n_trajectories`` comes last;
2. open it again, hold every value against the CRC its record had in the segment;
3. rename it to ``data/<split>/x.h5``, sync the directory;
4. append its manifest line and sync: the commit point;
5. append a ``retired`` line for each segment whose trajectories are all sealed, and unlink it.

What a crash leaves behind is put right by :func:`recover`, and by the next sealing before it
starts: a draft is deleted; a shard without a manifest line is checked and adopted; a retired
segment is unlinked. One process at a time seals or recovers (``inflight/seal.lock``).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from simlab.core.errors import StoreError
from simlab.store import files, shards
from simlab.store.inflight import SegmentState, writer_of
from simlab.store.manifest import blank_damaged, trim_torn
from simlab.store.records import Kind, SolverNames, has_record_after, scan
from simlab.store.shards import Row

if TYPE_CHECKING:
    from simlab.store.store import SnapshotStore

__all__ = ["SHARD_BYTES", "RecoverReport", "harvest", "quarantine", "recover", "seal"]

SHARD_BYTES = 128 << 20
_MAX_BATCH = 128
_WAIT_SECONDS = 600.0
_log = logging.getLogger("simlab.store")


@dataclass
class RecoverReport:
    """What :func:`recover` did; empty when the store was in order.

    Attributes
    ----------
    truncated : dict of str to int
        Segments whose torn tail was cut, with the bytes cut.
    abandoned : dict of int to int
        Unfinished trajectories of dead writers, with the first step that is missing.
    adopted, deleted, retired, quarantined, trimmed : list of str
        Shards adopted; drafts and duplicates deleted; segments retired; damaged files moved away;
        manifest files whose torn last line was cut.
    """

    truncated: dict[str, int] = field(default_factory=dict)
    abandoned: dict[int, int] = field(default_factory=dict)
    adopted: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    trimmed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"truncated    {name} by {cut} bytes" for name, cut in self.truncated.items()]
        lines += [
            f"abandoned    trajectory {traj}, first missing step {step}"
            for traj, step in self.abandoned.items()
        ]
        for what in ("adopted", "deleted", "retired", "quarantined", "trimmed"):
            lines += [f"{what:12s} {name}" for name in getattr(self, what)]
        return "\n".join(lines) or "nothing to recover"


@dataclass
class _Harvest:
    """What a segment holds after its CRCs were checked."""

    rows: list[Row]
    abandoned: list[Row]
    end: int
    is_damaged: bool


def harvest(fd: int, name: str) -> _Harvest:
    """Read a segment that nobody writes any more."""
    size = os.fstat(fd).st_size
    end, rows, live = 0, [], {}
    solvers = SolverNames()
    is_closed = False
    for group in scan(fd, 0, size, "check"):
        record, end = group.commit, group.end
        if record.kind == Kind.BEGIN:
            live[record.traj] = Row(
                record.traj,
                record.attempt,
                name,
                group.begin,
                group.end,
                record.json(),
                group.fields,
                [],
                fd,
            )
        elif record.kind == Kind.STEP:
            live[record.traj].steps.append((group.fields, solvers.provenance(record)))
        elif record.kind == Kind.SOLVER:
            solvers.take(record)
        elif record.kind == Kind.END:
            row = live.pop(record.traj)
            body = record.json()
            row.status, row.reason, row.end = body["status"], body["reason"], group.end
            rows.append(row)
        elif record.kind == Kind.CLOSE:
            is_closed = True
    is_damaged = end < size and (is_closed or has_record_after(fd, end, size))
    return _Harvest(rows, list(live.values()), end, is_damaged)


def seal(
    store: SnapshotStore, *, final: bool, writer: str = "", shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Seal what can be sealed; return the names of new shards below ``data/``.

    With ``writer`` only that writer's segments, side by side with other writers that seal theirs.
    """
    made: list[str] = []
    wait = _WAIT_SECONDS if final else 0.0
    if not final:
        store.refresh()
        if not any(_batches(store, final, writer, shard_bytes)):
            return made
    with files.reported(store.path), _lock(store, wait=wait, shared=bool(writer)) as is_held:
        if not is_held:
            if final:
                raise StoreError(f"{store.path}: another process has been sealing for minutes")
            return made
        if not writer:
            _tidy(store, RecoverReport())
        for batch in _batches(store, final, writer, shard_bytes):
            made += _seal_batch(store, batch, shard_bytes)
    store.refresh()
    return made


def recover(store: SnapshotStore) -> RecoverReport:
    """Put right what a crash left behind; live writers are not touched."""
    report = RecoverReport()
    with files.reported(store.path), _lock(store, wait=_WAIT_SECONDS) as is_held:
        if not is_held:
            raise StoreError(f"{store.path}: another process has been sealing for minutes")
        for name in blank_damaged(store.path / "manifest", store.path / "quarantine"):
            report.quarantined.append(name)
        store.catalogue.damaged.clear()
        _tidy(store, report)
        for name in list(store.inflight.segments):
            if not store.inflight.is_writable(name):
                _recover_segment(store, store.inflight.segments[name], report)
    store.refresh()
    return report


def quarantine(store: SnapshotStore, path: Path, reason: str) -> Path:
    """Move a file to ``quarantine/`` beside a file that says why."""
    target = store.path / "quarantine" / path.name
    target.parent.mkdir(exist_ok=True)
    files.publish(target.with_name(path.name + ".reason"), reason + "\n")
    files.rename(path, target)
    return target


@contextmanager
def _lock(store: SnapshotStore, *, wait: float, shared: bool = False) -> Iterator[bool]:
    lock = store.path / "inflight" / "seal.lock"
    with files.locked(lock, wait=wait, shared=shared) as is_held:
        if is_held:
            store.refresh()
        yield is_held


def _tidy(store: SnapshotStore, report: RecoverReport) -> None:
    """Finish what an interrupted sealing began. Needs the lock."""
    directory = store.path / "inflight"
    report.trimmed += trim_torn(store.path / "manifest")
    for draft in sorted(directory.glob("*.part")):
        files.unlink(draft)
        report.deleted.append(draft.name)
    catalogue = store.catalogue
    known = {shard.name: shard for shard in catalogue.shards}
    for path in sorted((store.path / "data").glob(f"*/{store.uuid[:8]}-w*.h5")):
        name = f"{path.parent.name}/{path.name}"
        if name not in known:
            _adopt(store, path, name, report)
        elif known[name].is_dropped:
            quarantine(store, path, "dropped from the manifest")
            report.quarantined.append(name)
    on_disk = set(store.inflight.segments)
    for name in sorted(catalogue.segments - on_disk - set(catalogue.retired)):
        store.manifest.append({"kind": "retired", "segment": name, "abandoned": []})
        report.retired.append(name)
    for name in sorted(on_disk & set(catalogue.retired)):
        files.unlink(directory / name)
        report.retired.append(name)
    store.refresh()


def _adopt(store: SnapshotStore, path: Path, name: str, report: RecoverReport) -> None:
    """Take a renamed shard into the manifest, or move it away when it cannot be trusted."""
    try:
        line = shards.inspect(path, store.schema)
    except StoreError as error:
        quarantine(store, path, str(error))
        report.quarantined.append(name)
        return
    is_failed = path.parent.name == "failed"
    sealed = store.catalogue.done_attempts
    is_known = [
        (store.catalogue.failed.get(traj, (0, ""))[0] if is_failed else sealed[traj]) >= attempt
        for traj, attempt in zip(line["traj"], line["attempt"], strict=True)
    ]
    if any(is_known):
        files.unlink(path)
        report.deleted.append(name)
        return
    store.manifest.append({**line, "shard": name})
    store.refresh()
    report.adopted.append(name)


def _recover_segment(store: SnapshotStore, state: SegmentState, report: RecoverReport) -> None:
    """Cut the torn tail of one segment of a dead writer."""
    path = store.path / "inflight" / state.name
    fd = os.open(path, os.O_RDWR)
    try:
        found = harvest(fd, state.name)
        before = os.fstat(fd)
        size = before.st_size
        for row in found.abandoned:
            report.abandoned[row.traj] = len(row.steps)
        if found.is_damaged:
            _keep_head(store, path, found.end)
            report.quarantined.append(state.name)
        if found.end == 0:
            files.unlink(path)
            report.deleted.append(state.name)
        elif found.is_damaged:
            return
        elif found.end < size:
            files.truncate(fd, found.end)
            os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))  # no sign of its writer
            files.sync(fd)
            report.truncated[state.name] = size - found.end
    finally:
        os.close(fd)


def _keep_head(store: SnapshotStore, path: Path, end: int) -> None:
    """Replace a damaged segment by its good head; the original goes to quarantine."""
    draft = path.with_name(path.name + ".part")
    shutil.copyfile(path, draft)
    with open(draft, "r+b") as stream:
        stream.truncate(end)
        files.sync(stream.fileno())
    target = store.path / "quarantine" / path.name
    target.parent.mkdir(exist_ok=True)
    files.publish(target.with_name(path.name + ".reason"), f"damaged from byte {end} on\n")
    files.unlink(target)
    os.link(path, target)
    files.rename(draft, path)


def _batches(
    store: SnapshotStore, final: bool, writer: str, shard_bytes: int
) -> Iterator[list[SegmentState]]:
    """Group the segments that may be sealed now.

    Those of writers that wrote little and closed, such as clients of one trajectory each, wait for
    each other, so that they become few shards; but not until the end, as everybody looks at all
    segments there are.
    """
    batch: list[SegmentState] = []
    small: list[SegmentState] = []
    for name in sorted(store.inflight.segments):
        if writer and writer_of(name) != writer:
            continue
        state = store.inflight.segments[name]
        if (state.is_closed and state.is_full) or (final and not store.inflight.is_writable(name)):
            batch.append(state)
        elif state.is_closed and not state.runs:
            small.append(state)
        for group in (batch, small):
            if sum(item.size for item in group) >= shard_bytes or len(group) >= _MAX_BATCH:
                yield list(group)
                group.clear()
    if batch:
        yield batch


def _seal_batch(store: SnapshotStore, batch: Sequence[SegmentState], shard_bytes: int) -> list[str]:
    made: list[str] = []
    directory = store.path / "inflight"
    with ExitStack() as stack:
        groups: dict[tuple[str, int], list[Row]] = {}
        without_steps: list[Row] = []
        retiring: list[tuple[str, list[Row]]] = []
        best: dict[int, int] = {}
        for state in batch:
            fd = os.open(directory / state.name, os.O_RDONLY)
            stack.callback(os.close, fd)
            found = harvest(fd, state.name)
            if found.is_damaged:
                _log.warning("%s: %s is damaged; run recover", store.path, state.name)
                continue
            retiring.append((state.name, found.abandoned))
            for row in found.rows:
                if row.status == "abandoned":
                    found.abandoned.append(row)
                    continue
                if row.status == "done":
                    best[row.traj] = max(best.get(row.traj, 0), row.attempt)
                elif not row.steps:
                    without_steps.append(row)
                    continue
                split = row.sample["split"] if row.status == "done" else "failed"
                groups.setdefault((split, len(row.steps)), []).append(row)
        for (split, _), rows in sorted(groups.items()):
            rows = _not_sealed(store, split, rows, best)
            for part in _parts(rows, shard_bytes):
                made.append(_seal_shard(store, split, part))
        failed = [
            [row.traj, row.attempt, row.reason]
            for row in without_steps
            if store.catalogue.failed.get(row.traj, (0, ""))[0] < row.attempt
        ]
        if failed:
            store.manifest.append({"kind": "failed", "failed": failed})
        for name, abandoned in retiring:
            left = [[row.traj, row.attempt] for row in abandoned]
            store.manifest.append({"kind": "retired", "segment": name, "abandoned": left})
            files.unlink(directory / name)
    store.refresh()
    return made


def _not_sealed(
    store: SnapshotStore, split: str, rows: Sequence[Row], best: dict[int, int]
) -> list[Row]:
    """Leave out rows that a shard holds already, or that a higher attempt replaces."""
    kept: dict[int, Row] = {}
    for row in sorted(rows, key=lambda item: (item.traj, -item.attempt)):
        if split == "failed":
            sealed = store.catalogue.failed.get(row.traj, (0, ""))[0]
        else:
            sealed = max(int(store.catalogue.done_attempts[row.traj]), best[row.traj] - 1)
        if row.attempt > sealed:
            kept.setdefault(row.traj, row)
    return list(kept.values())


def _parts(rows: Sequence[Row], shard_bytes: int) -> Iterator[list[Row]]:
    part: list[Row] = []
    n_bytes = 0
    for row in rows:
        part.append(row)
        n_bytes += row.end - row.begin
        if n_bytes >= shard_bytes:
            yield part
            part, n_bytes = [], 0
    if part:
        yield part


def _seal_shard(store: SnapshotStore, split: str, rows: Sequence[Row]) -> str:
    """Take steps 1 to 4 for one shard."""
    writer = store.manifest
    name = f"{store.uuid[:8]}-w{writer.id}-{writer.n_shards:06d}.h5"
    writer.n_shards += 1
    draft = store.path / "inflight" / f"{name}.part"
    target = store.path / "data" / split / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shards.write(
            draft,
            store.schema,
            rows,
            campaign=store.uuid,
            seed=store.seed,
            config=store.config,
            storage=store.storage,
        )
        line = shards.inspect(draft, store.schema)
        files.rename(draft, target)
    except OSError as error:
        files.unlink(draft)
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{draft}: cannot be written ({error}); nothing was lost") from error
    files.sync_directory(target.parent)
    writer.append({**line, "shard": f"{split}/{name}"})
    return f"{split}/{name}"
