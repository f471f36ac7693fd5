"""Checking a store: is all there that the manifest promises, and nothing that it does not know."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from simlab.core.errors import StoreError
from simlab.store import seal, shards
from simlab.store.manifest import Shard
from simlab.store.splits import SPLITS

if TYPE_CHECKING:
    from simlab.store.store import SnapshotStore

__all__ = ["damaged_shards", "quarantine_damaged", "verify"]


def verify(store: SnapshotStore, deep: bool) -> list[str]:
    """Return the problems found, one line each."""
    store.refresh()
    problems = list(store.catalogue.damaged)
    problems += _torn_lines(store)
    problems += _unknown_files(store)
    problems += [f"data/{name}: {reason}" for name, reason in damaged_shards(store, deep)]
    problems += _segments(store, deep)
    return problems


def damaged_shards(store: SnapshotStore, deep: bool) -> Iterator[tuple[str, str]]:
    """Yield name and fault of every shard that is not what the manifest says."""
    for shard in store.catalogue.live_shards:
        fault = _fault(store, shard, deep)
        if fault:
            yield shard.name, fault


def quarantine_damaged(store: SnapshotStore, deep: bool) -> list[str]:
    """Move damaged shards away and take them out of the manifest; return their names.

    Their trajectories then count as missing, so that a resumed campaign makes them again.
    """
    moved = []
    for name, fault in list(damaged_shards(store, deep)):
        store.manifest.append({"kind": "dropped", "shard": name, "reason": fault})
        path = store.path / "data" / name
        if path.exists():
            seal.quarantine(store, path, fault)
        moved.append(name)
    store.refresh()
    return moved


def _fault(store: SnapshotStore, shard: Shard, deep: bool) -> str:
    path = store.path / "data" / shard.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "missing, but the manifest counts on it"
    if size != shard.n_bytes:
        return f"has {size} bytes, {shard.n_bytes} were sealed"
    if shard.split in SPLITS:
        strays = [traj for traj in shard.traj.tolist() if store.split_of(traj) != shard.split]
        if strays:
            return f"holds trajectory {strays[0]}, which belongs to another split"
    if not deep:
        return ""
    with open(path, "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != shard.sha256:
            return "content differs from what was sealed (sha256)"
    try:
        line = shards.inspect(path, store.schema)
    except StoreError as error:
        return str(error)
    if line["traj"] != shard.traj.tolist() or line["attempt"] != shard.attempt.tolist():
        return "its rows are not those of its manifest line"
    return ""


def _torn_lines(store: SnapshotStore) -> Iterator[str]:
    for path in sorted((store.path / "manifest").glob("*.jsonl")):
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            yield f"manifest/{path.name}: its last line is torn; run recover"


def _unknown_files(store: SnapshotStore) -> Iterator[str]:
    known = {shard.name for shard in store.catalogue.live_shards}
    data = store.path / "data"
    found: list[Path] = [*data.glob("*/*.h5"), *data.glob("*/*.hdf5")]
    for path in sorted(found):
        name = f"{path.parent.name}/{path.name}"
        if name not in known:
            yield f"data/{name}: not in the manifest; run recover, or take it away"


def _segments(store: SnapshotStore, deep: bool) -> Iterator[str]:
    for name, state in store.inflight.segments.items():
        if store.inflight.is_writable(name):
            continue
        path = store.path / "inflight" / name
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # sealed in the meantime
            continue
        try:
            if name in store.catalogue.retired:
                yield f"inflight/{name}: sealed already; run recover"
            elif deep:
                found = seal.harvest(fd, name)
                size = os.fstat(fd).st_size
                if found.is_damaged:
                    yield f"inflight/{name}: damaged at byte {found.end}; run recover"
                elif found.end < size:
                    yield f"inflight/{name}: its tail is torn at byte {found.end}; run recover"
            elif state.offset < state.size:
                yield f"inflight/{name}: its tail is torn at byte {state.offset}; run recover"
        finally:
            os.close(fd)
