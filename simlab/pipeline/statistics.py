"""What a store says about its data: moments of fields, and what the solver logged per step.

Read from the manifest and the small log columns of sealed shards; no field is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simlab.store.schema import FieldSpec
from simlab.store.stats import Moments, merged
from simlab.store.store import SnapshotStore

__all__ = ["SolverLog", "field_moments", "solver_log"]


@dataclass(frozen=True, eq=False)
class SolverLog:
    """What the solver logged about every stored step.

    Attributes
    ----------
    ids : ndarray of int64, shape (n,)
        Samples, sorted.
    iterations : ndarray of int64, shape (n, T)
    residuals : ndarray, shape (n, T)
        True relative residuals; NaN where the solver gave none.
    seconds : ndarray, shape (n,)
        Wall seconds of all solves of the sample.
    """

    ids: np.ndarray
    iterations: np.ndarray
    residuals: np.ndarray
    seconds: np.ndarray


def solver_log(store: SnapshotStore) -> SolverLog:
    """Return the solver's log of all sealed trajectories of all splits."""
    store.refresh()
    ids = np.sort(np.concatenate([store.ids(name) for name in store.fractions]))
    shards, rows = store.catalogue.where(ids)
    ids, shards, rows = ids[shards >= 0], shards[shards >= 0], rows[shards >= 0]
    shape = (len(ids), len(store.schema.times))
    log = SolverLog(ids, np.zeros(shape, np.int64), np.full(shape, np.nan), np.zeros(len(ids)))
    columns = {"iterations": log.iterations, "residual": log.residuals, "wall_s": log.seconds}
    for number in np.unique(shards):
        here = shards == number
        name = store.catalogue.shards[number].name
        for column, target in columns.items():
            target[here] = store.files.values(name, f"simlab/{column}", slice(None))[rows[here]]
    return log


def field_moments(store: SnapshotStore) -> list[tuple[FieldSpec, Moments]]:
    """Return count, extremes, mean and deviation of every field over all splits."""
    store.refresh()
    live = [shard for shard in store.catalogue.live_shards if shard.split in store.fractions]
    found = merged(shard.moments for shard in live)
    return [(spec, found[spec.name]) for spec in store.schema.fields if spec.name in found]
