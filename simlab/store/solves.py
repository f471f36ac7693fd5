"""How the stored steps were solved: what a shard says of it, and one table over all of a store.

A shard's group ``solve`` has a dataset of shape (B, T) per number of
:class:`simlab.core.reports.Provenance`; the words of the solvers are an attribute, of which the
dataset ``solver`` gives the number. Data lie in the order of their ids whatever the order of
solving was: ``order`` says which was solved when. What a store of format 1 does not say is -1 or
NaN.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simlab.core.reports import Provenance
from simlab.store.records import Kind, SolverNames, scan

if TYPE_CHECKING:
    from simlab.store.reader import ShardFiles
    from simlab.store.store import SnapshotStore

__all__ = ["NORM", "columns", "of_shard", "read_solves", "settings", "summary", "summary_text"]

NORM = "true residual / ||b||"
_COLUMNS: dict[str, tuple[str, np.dtype]] = {
    "order": ("order", np.dtype("<i8")),
    "chain": ("chain", np.dtype("<i4")),
    "its": ("iterations", np.dtype("<i8")),
    "op_applies": ("operator_applies", np.dtype("<i8")),
    "pc_applies": ("pc_applies", np.dtype("<i8")),
    "true_relres": ("true_relres", np.dtype("<f8")),
    "cpu_s": ("seconds", np.dtype("<f8")),
}  # dataset of a shard: attribute of Provenance, type
_BEFORE = {"iterations": "iterations", "true_relres": "residual"}  # what format 1 has
_PLACE = [("index", "<i8"), ("step", "<i4")]
_NUMBERS = [(attribute, dtype.str) for attribute, dtype in _COLUMNS.values()]


def columns(solves: Sequence[Sequence[Provenance]]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the datasets of a shard's group ``solve``, each (B, T), and its solvers."""
    solvers = sorted({solve.solver for row in solves for solve in row})
    numbers = {solver: number for number, solver in enumerate(solvers)}
    found = {
        name: np.array([[getattr(solve, attribute) for solve in row] for row in solves], dtype)
        for name, (attribute, dtype) in _COLUMNS.items()
    }
    found["solver"] = np.array([[numbers[solve.solver] for solve in row] for row in solves], "<i4")
    return found, solvers


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a resolved case says of all its solves; what it does not say is left out."""
    family, solver = (config.get(name) or {} for name in ("family", "solver"))
    fields = family.get("fields")
    found = {"rtol": solver.get("rtol"), "family": family.get("kind")}
    if "carried" in solver:  # it recycles
        found["m"] = solver.get("restart")
        found["k_static"], found["k_carried"] = solver.get("static"), solver["carried"]
    if isinstance(fields, Mapping) and fields.get("kind") == "two_phase":
        found["phase_values"] = [fields["low"], fields["high"]]
    return {name: value for name, value in found.items() if value is not None}


def summary(solves: np.ndarray) -> list[dict[str, Any]]:
    """Return one row per solver of what :func:`read_solves` gives, the most used one first.

    Unknown counts, and means of nothing, are NaN.
    """
    rows = []
    names, numbers = np.unique(solves["solver"], return_inverse=True)
    for number, name in enumerate(names.tolist()):
        mine = solves[numbers == number]
        row: dict[str, Any] = {"solver": name, "solves": len(mine)}
        for column in ("iterations", "operator_applies", "pc_applies"):
            row[column] = _mean(mine[column][mine[column] >= 0])
        seconds = mine["seconds"][np.isfinite(mine["seconds"])]
        residuals = mine["true_relres"][np.isfinite(mine["true_relres"])]
        row["worst_true_relres"] = float(residuals.max()) if len(residuals) else float("nan")
        row["cpu_seconds_mean"], row["cpu_seconds"] = _mean(seconds), float(seconds.sum())
        rows.append(row)
    return sorted(rows, key=lambda row: -row["solves"])


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
        parts.append(of_shard(store.files, store.catalogue.shards[number].name, rows[here]))
    try:
        parts += _unsealed(store, set(ids[shards < 0].tolist()))
    except FileNotFoundError:  # sealed in the meantime
        return read_solves(store, split)
    width = max((part["solver"].dtype.itemsize // 4 for part in parts), default=1)
    found = np.concatenate([*parts, np.empty(0, dtype=_dtype(width))])
    return found[np.lexsort((found["step"], found["index"]))]


def summary_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of :func:`summary` as a table."""
    width = max([6, *(len(row["solver"]) for row in rows)])
    heads = ("solves", "iterations", "op applies", "pc applies", "worst relres", "CPU ms", "CPU s")
    lines = [" ".join([f"{'solver':{width}s}", *(f"{head:>12s}" for head in heads)])]
    lines += [
        f"{row['solver'] or '-':{width}s} {row['solves']:12d} {row['iterations']:12.1f} "
        f"{row['operator_applies']:12.1f} {row['pc_applies']:12.1f} "
        f"{row['worst_true_relres']:12.2e} {1e3 * row['cpu_seconds_mean']:12.2f} "
        f"{row['cpu_seconds']:12.2f}"
        for row in rows
    ]
    return "\n".join([*lines, "iterations, applies and CPU ms: means per solve"])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _dtype(width: int) -> np.dtype:
    return np.dtype([*_PLACE, *_NUMBERS, ("solver", f"<U{max(width, 1)}")])


def of_shard(files: ShardFiles, name: str, rows: np.ndarray) -> np.ndarray:
    """Return the steps of some rows of one shard."""
    shard = files.get(name)
    words = shard.solvers or [""]
    found = np.zeros((len(rows), shard.n_steps), dtype=_dtype(max(map(len, words))))
    found["index"] = shard.traj[rows][:, None]
    found["step"] = np.arange(shard.n_steps)
    for column, (attribute, dtype) in _COLUMNS.items():
        if shard.solvers is not None:
            found[attribute] = files.values(name, f"solve/{column}", slice(None))[rows]
        elif attribute in _BEFORE:
            found[attribute] = files.values(name, f"simlab/{_BEFORE[attribute]}", slice(None))[rows]
        else:
            found[attribute] = np.nan if dtype.kind == "f" else -1
    if shard.solvers is not None:
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
                numbers = (getattr(solve, attribute) for attribute, _ in _COLUMNS.values())
                found.append((record.traj, record.step, *numbers, solve.solver))
    finally:
        os.close(fd)
    width = max((len(row[-1]) for row in found), default=1)
    return np.array(found, dtype=_dtype(width))
