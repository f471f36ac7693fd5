"""What a writer that died left of a trajectory, so that the next attempt need not begin at nothing.

A trajectory that is begun again is a new attempt and needs all its steps. Those that the attempt
before had stored are still in its segment, until that is sealed; whoever begins again may copy
them and go on from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simlab.core.errors import StoreError
from simlab.core.reports import Provenance
from simlab.core.samples import Sample
from simlab.store.events import field_values
from simlab.store.records import Group, Kind, SolverNames, scan
from simlab.store.schema import Schema
from simlab.store.segments import stored_dtype

if TYPE_CHECKING:
    from simlab.store.store import SnapshotStore

__all__ = ["Partial", "StoredStep", "find_partial"]


@dataclass(frozen=True, eq=False)
class StoredStep:
    """One step as it was appended, with how it was solved."""

    step: int
    time: float
    fields: Mapping[str, np.ndarray]
    solve: Provenance


@dataclass(frozen=True)
class Partial:
    """The steps of one attempt that was never ended.

    Attributes
    ----------
    path : Path
        Its segment.
    traj, attempt, n_steps : int
    """

    path: Path
    traj: int
    attempt: int
    n_steps: int

    def is_of(self, sample: Sample, schema: Schema | None = None) -> bool:
        """Return whether it was begun with this sample; inputs count where a schema is given."""
        for group, _ in self._groups():
            if group.commit.kind != Kind.BEGIN:
                continue
            body = group.commit.json()
            given = {name: float(value) for name, value in sample.parameters.items()}
            if (body["seed"], body["parameters"]) != (sample.seed, given):
                return False
            if schema is None:
                return True
            stored = field_values(schema, schema.inputs, group.fields)
            return all(
                np.array_equal(
                    stored[spec.name], np.asarray(sample.fields[spec.name], stored_dtype(spec))
                )
                for spec in schema.inputs
            )
        return False

    def steps(self, schema: Schema) -> Iterator[StoredStep]:
        """Yield its steps in order; none when its segment is gone by now."""
        for group, solvers in self._groups():
            record = group.commit
            if record.kind == Kind.STEP:
                fields = field_values(schema, schema.outputs, group.fields, exact=True)
                yield StoredStep(record.step, record.time, fields, solvers.provenance(record))

    def _groups(self) -> Iterator[tuple[Group, SolverNames]]:
        solvers = SolverNames()
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:  # sealed since
            return
        try:
            for group in scan(fd, 0, os.fstat(fd).st_size, "keep"):
                record = group.commit
                if record.kind == Kind.SOLVER:
                    solvers.take(record)
                elif (record.traj, record.attempt) == (self.traj, self.attempt):
                    yield group, solvers
        finally:
            os.close(fd)


def find_partial(store: SnapshotStore, traj: int) -> Partial | None:
    """Return the longest unfinished attempt at a trajectory since it last failed, if there is one.

    Raises
    ------
    StoreError
        When a living process is writing the trajectory.
    """
    store.refresh()
    failed = store.catalogue.failed.get(traj, (0, ""))[0]
    found = []
    for name, segment in store.inflight.segments.items():
        ended = [run.attempt for run in segment.ended if run.traj == traj]
        failed = max([failed, *ended])
        run = segment.runs.get(traj)
        if run is None:
            continue
        if store.inflight.is_writable(name):
            raise StoreError(
                f"{store.path}: trajectory {traj} is being written by {name}; "
                "wait for that process, or end it"
            )
        found.append(Partial(store.path / "inflight" / name, traj, run.attempt, run.n_steps))
    found = [item for item in found if item.attempt > failed and item.n_steps]
    return max(found, key=lambda item: item.n_steps, default=None)
