"""Single steps of a store by (trajectory, step), sealed or not: what replay reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from simlab.core.errors import StoreError
from simlab.core.samples import Sample
from simlab.learn.encoding import Encoding
from simlab.store import files
from simlab.store.records import Kind, scan
from simlab.store.segments import SUFFIX
from simlab.store.shards import field_path
from simlab.store.store import SnapshotStore

__all__ = ["Committed", "StoreSteps"]


class Committed:
    """The archive of a buffer: all steps of the trajectories in a list that may grow.

    Parameters
    ----------
    trajs : sequence of int
        Finished trajectories.
    n_times : int
    row : callable
        ``row(traj, step)`` returns shape (row_size,).
    row_size : int
    """

    def __init__(
        self,
        trajs: Sequence[int],
        n_times: int,
        row: Callable[[int, int], np.ndarray],
        row_size: int,
    ) -> None:
        self._trajs, self._n_times, self._row, self._size = trajs, n_times, row, row_size

    def __len__(self) -> int:
        return len(self._trajs) * self._n_times

    def rows(self, picks: np.ndarray) -> np.ndarray:
        """Return the steps of these numbers, shape (k, row_size), float32."""
        made = np.empty((len(picks), self._size), dtype=np.float32)
        for place, pick in enumerate(picks.tolist()):
            traj, step = divmod(pick, self._n_times)
            made[place] = self._row(self._trajs[traj], step)
        return made

    def items(self, picks: np.ndarray) -> np.ndarray:
        """Return the trajectories and steps of these numbers, shape (k, 2), int64."""
        places, steps = np.divmod(np.asarray(picks, dtype=np.int64), self._n_times)
        trajs = [self._trajs[place] for place in places.tolist()]
        return np.stack([np.array(trajs, dtype=np.int64), steps], axis=1)


class StoreSteps:
    """Rows of a store's items, one at a time.

    A finished trajectory is read from its shard or, before it is sealed, from its segment; a failed
    one too, as far as it came. Where several attempts hold a step, the finished or else the highest
    one counts.

    Parameters
    ----------
    store : SnapshotStore
    encoding : Encoding
    """

    def __init__(self, store: SnapshotStore, encoding: Encoding) -> None:
        self._store, self._encoding = store, encoding
        self._condition: dict[int, np.ndarray] = {}
        self._places: dict[int, tuple[str, list[int]]] = {}

    def row(self, traj: int, step: int) -> np.ndarray:
        """Return one item, shape (row_size,).

        Raises
        ------
        StoreError
            When the store does not hold it.
        """
        for is_news in (False, True):
            if is_news:
                self._store.refresh()
                self._places.pop(traj, None)
            found = self._from_shard(traj, step)
            if found is None:
                found = self._from_segment(traj, step)
            if found is not None:
                return found
        raise StoreError(
            f"{self._store.path}: step {step} of trajectory {traj} is not there any more; "
            "run `simlab store verify`"
        )

    def sync(self) -> None:
        """Bring the segments to the disk, whoever writes them; shards are there already."""
        for path in (self._store.path / "inflight").glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):  # sealed since
                fd = os.open(path, os.O_RDONLY)
                try:
                    files.sync(fd)
                finally:
                    os.close(fd)

    def _from_shard(self, traj: int, step: int) -> np.ndarray | None:
        catalogue = self._store.catalogue
        numbers, rows = catalogue.where(np.array([traj]))
        number, row = int(numbers[0]), int(rows[0])
        if number >= 0:
            name = catalogue.shards[number].name
        elif traj in catalogue.failed:
            attempt = catalogue.failed[traj][0]
            for shard in catalogue.live_shards:
                at = np.flatnonzero((shard.traj == traj) & (shard.attempt == attempt))
                if len(at):
                    name, row = shard.name, int(at[0])
                    break
            else:
                return None
        else:
            return None
        files, schema = self._store.files, self._store.schema
        condition = self._condition_of(traj, lambda: files.sample(name, row))
        fields = {
            spec.name: files.values(name, field_path(spec), (row, step))
            for spec in self._encoding.outputs
        }
        return self._encoding.row(condition, schema.times[step], fields)

    def _condition_of(self, traj: int, sample: Callable[[], Sample]) -> np.ndarray:
        if self._encoding.n_inputs:  # large: read anew rather than kept for every trajectory
            return self._encoding.condition(sample())
        if traj not in self._condition:
            self._condition[traj] = self._encoding.condition(sample())
        return self._condition[traj]

    def _from_segment(self, traj: int, step: int) -> np.ndarray | None:
        if traj not in self._places and not self._find(traj):
            return None
        name, offsets = self._places[traj]
        if step + 1 >= len(offsets):
            return None
        try:
            fd = os.open(self._store.path / "inflight" / name, os.O_RDONLY)
        except FileNotFoundError:  # sealed since
            return None
        try:
            size, schema = os.fstat(fd).st_size, self._store.schema
            at = offsets[step + 1]
            group = next(iter(scan(fd, at, size, "keep", self._store.step_bytes)), None)
            if group is None:
                return None
            fields = {
                spec.name: record.values().reshape(schema.field_shape(spec))
                for spec, record in zip(schema.outputs, group.fields, strict=True)
            }
            condition = self._condition_of(traj, lambda: self._sample(fd, offsets[0], size))
        finally:
            os.close(fd)
        return self._encoding.row(condition, group.commit.time, fields)

    def _sample(self, fd: int, at: int, size: int) -> Sample:
        schema = self._store.schema
        group = next(iter(scan(fd, at, size, "keep", self._store.step_bytes)))
        body = group.commit.json()
        fields = {
            spec.name: record.values().reshape(schema.field_shape(spec)).astype(np.float64)
            for spec, record in zip(schema.inputs, group.fields, strict=True)
        }
        return Sample(body["index"], body["seed"], body["parameters"], fields)

    def _find(self, traj: int) -> bool:
        """Note where the records of the best attempt at a trajectory begin: sample, then steps."""
        best, name = None, ""
        for state in self._store.inflight.segments.values():
            for run in state.all_runs():
                rank = (run.status == "done", run.attempt)
                if run.traj == traj and (
                    best is None or rank > (best.status == "done", best.attempt)
                ):
                    best, name = run, state.name
        if best is None:
            return False
        try:
            fd = os.open(self._store.path / "inflight" / name, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            stop = best.end if best.end >= 0 else self._store.inflight.segments[name].offset
            offsets = [
                group.begin
                for group in scan(fd, best.begin, stop, "skip")
                if group.commit.traj == traj and group.commit.kind in (Kind.BEGIN, Kind.STEP)
            ]
        finally:
            os.close(fd)
        self._places[traj] = name, offsets
        return True
