"""How the stored steps were solved: one table over sealed shards and segments not sealed yet.

Shards of format 1 say less than those of format 2; what they do not say is -1 or NaN.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from simlab.store.records import Kind, SolverNames, scan
from simlab.store.shards import SOLVE_COLUMNS

if TYPE_CHECKING:
    from simlab.store.reader import ShardFiles
    from simlab.store.store import SnapshotStore

__all__ = ["read_solves"]

_BEFORE = {"iterations": "iterations", "true_relres": "residual"}  # columns of format 1
_PLACE = [("index", "<i8"), ("step", "<i4")]
_NUMBERS = [(attribute, dtype.str) for attribute, dtype in SOLVE_COLUMNS.values()]


def read_solves(store: SnapshotStore, split: str | None) -> np.ndarray:
    """Return one row per step of every finished trajectory, by index and step.

    See :meth:`simlab.store.store.SnapshotStore.solves`.
    """
    store.refresh()
    names = list(store.fractions) if split is None else [split]
    ids = np.concatenate([store.ids(name) for name in names])
    shards, rows = store.catalogue.where(ids)
    parts = []
    for number in np.unique(shards[shards >= 0]).tolist():
        here = shards == number
        parts.append(_of_shard(store.files, store.catalogue.shards[number].name, rows[here]))
    try:
        parts += _unsealed(store, set(ids[shards < 0].tolist()))
    except FileNotFoundError:  # sealed in the meantime
        return read_solves(store, split)
    width = max((part["solver"].dtype.itemsize // 4 for part in parts), default=1)
    found = np.concatenate([*parts, np.empty(0, dtype=_dtype(width))])
    return found[np.lexsort((found["step"], found["index"]))]


def _dtype(width: int) -> np.dtype:
    return np.dtype([*_PLACE, *_NUMBERS, ("solver", f"<U{max(width, 1)}")])


def _of_shard(files: ShardFiles, name: str, rows: np.ndarray) -> np.ndarray:
    """Return the steps of some rows of one shard."""
    shard = files.get(name)
    is_old = "solve" not in shard.file
    words = [""] if is_old else shard.dataset("solve").attrs["solver"].tolist()
    found = np.zeros((len(rows), shard.n_steps), dtype=_dtype(max(map(len, words))))
    found["index"] = shard.traj[rows][:, None]
    found["step"] = np.arange(shard.n_steps)
    for column, (attribute, dtype) in SOLVE_COLUMNS.items():
        if not is_old:
            found[attribute] = files.values(name, f"solve/{column}", slice(None))[rows]
        elif attribute in _BEFORE:
            found[attribute] = files.values(name, f"simlab/{_BEFORE[attribute]}", slice(None))[rows]
        else:
            found[attribute] = np.nan if dtype.kind == "f" else -1
    if not is_old:
        numbers = files.values(name, "solve/solver", slice(None))[rows]
        found["solver"] = np.asarray(words, dtype=str)[numbers]
    return found.reshape(-1)


def _unsealed(store: SnapshotStore, wanted: set[int]) -> list[np.ndarray]:
    """Return the steps of finished trajectories that are in segments only."""
    best: dict[int, tuple[int, str]] = {}
    for name, segment in store.inflight.segments.items():
        for run in segment.ended:
            if run.status == "done" and run.traj in wanted:
                best[run.traj] = max(best.get(run.traj, (0, "")), (run.attempt, name))
    return [
        part
        for name in sorted({name for _, name in best.values()})
        if len(part := _of_segment(store, name, best))
    ]


def _of_segment(store: SnapshotStore, name: str, best: dict[int, tuple[int, str]]) -> np.ndarray:
    solvers = SolverNames()
    found = []
    fd = os.open(store.path / "inflight" / name, os.O_RDONLY)
    try:
        for group in scan(fd, 0, store.inflight.segments[name].offset, "skip"):
            record = group.commit
            if record.kind == Kind.SOLVER:
                solvers.take(record)
            elif record.kind == Kind.STEP and best.get(record.traj) == (record.attempt, name):
                solve = solvers.provenance(record)
                numbers = (getattr(solve, attribute) for attribute, _ in SOLVE_COLUMNS.values())
                found.append((record.traj, record.step, *numbers, solve.solver))
    finally:
        os.close(fd)
    width = max((len(row[-1]) for row in found), default=1)
    return np.array(found, dtype=_dtype(width))
