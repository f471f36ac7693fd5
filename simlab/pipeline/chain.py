"""One group of ranks walking its chain of samples, and what that cost.

A sample that cannot be solved or stored as its schema says is recorded as failed and
skipped; every other error (a full disk, a bug) ends the campaign. Faults that one rank of the group
sees are agreed on before anything is raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simlab.core.comm import Group, agreement
from simlab.core.errors import ConvergenceError, SchemaError
from simlab.core.reports import Provenance
from simlab.core.runs import RunDirectory
from simlab.core.samples import Sample
from simlab.linalg.clock import Clock
from simlab.linalg.system import LinearSystem, SolveResult
from simlab.pipeline.case import Case
from simlab.pipeline.tally import Tally
from simlab.problems.family import trajectory
from simlab.store.store import SnapshotStore

__all__ = ["Chain", "Outcome"]

log = logging.getLogger("simlab.campaign")


@dataclass
class Outcome:
    """What a campaign did; sums over all groups on rank 0, this group's own elsewhere.

    Attributes
    ----------
    done, failed : int
        Samples of this call; ``n_missing`` are still to be solved (after a stop or in other
        shards).
    stopped : bool
        A stop was asked for before the end.
    """

    done: int = 0
    failed: int = 0
    n_missing: int = 0
    stopped: bool = False
    iterations: int = 0
    operator_applies: int = 0
    pc_applies: int = 0
    solves: int = 0
    bytes: int = 0
    worst_relres: float = 0.0
    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def merge(self, other: Outcome) -> None:
        """Add another group's sums."""
        for name in (
            "done",
            "failed",
            "iterations",
            "operator_applies",
            "pc_applies",
            "solves",
            "bytes",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.stopped |= other.stopped
        self.worst_relres = max(self.worst_relres, other.worst_relres)
        for mine, theirs in ((self.wall, other.wall), (self.cpu, other.cpu)):
            for phase, seconds in theirs.items():
                mine[phase] = mine.get(phase, 0.0) + seconds
        self.failures += other.failures


class Chain:
    """One group at work: its workspace and solver state live as long as the campaign.

    Attributes
    ----------
    number : int
        Of the chain, as stored beside the data.
    order : int
        Position of the present sample in the order of solving, as stored beside the data.
    """

    def __init__(self, case: Case, run: RunDirectory, store: SnapshotStore, group: Group) -> None:
        self._case, self._run, self._store, self._group = case, run, store, group
        self._workspace = case.family.setup(group.comm)
        self._state: Any = None
        self.clock = Clock()
        self._outcome = Outcome()
        self.solver_name = ""
        self.number = group.index
        self.order = -1
        self._solve_seconds = 0.0

    @property
    def advice(self) -> dict[str, Any]:
        """What the solver says of its choice."""
        said = {
            "reason": getattr(self._state, "reason", ""),
            "pilot": getattr(self._state, "table", []),
        }
        return {name: value for name, value in said.items() if value}

    def walk(self, ids: Sequence[int] | np.ndarray, tally: Tally) -> None:
        """Solve a chain of samples in order, until its end or a stop. Collective on the group."""
        if not len(ids):
            return
        writer = self._store.writer() if self._group.is_root else None
        try:
            for index in map(int, ids):
                self.order += 1
                if self._stop_requested():
                    self._outcome.stopped = True
                    break
                self._solve(index, writer)
                tally.report(self._outcome.done, self._outcome.failed, self._outcome.bytes)
                tally.seal_if_due(self._store)
        finally:
            if writer is not None:
                writer.close()
        if writer is not None:
            with self.clock("seal"):
                self._store.seal(final=True, writer=writer.id)

    def _stop_requested(self) -> bool:
        stop = self._run.stop_requested() if self._group.is_root else False
        return bool(self._group.comm.bcast(stop)) if self._group.comm.size > 1 else stop

    def _solve(self, index: int, writer: Any) -> None:
        case, outcome = self._case, self._outcome
        with self.clock("draw"), agreement(self._group.comm):
            mu = case.family.space.sample(1, case.campaign.seed, index)[0]
            self._begin(mu, writer)
        try:
            for step in trajectory(case.family, mu, self._workspace, self._step, self.clock):
                report = step.result.report
                with self.clock("write"), agreement(self._group.comm):
                    if writer is not None:
                        writer.append(
                            index,
                            step.step,
                            step.time,
                            step.fields,
                            solve=Provenance.of(
                                report,
                                order=self.order,
                                chain=self.number,
                                seconds=self._solve_seconds,
                            ),
                        )
                        outcome.bytes += sum(4 * values.size for values in step.fields.values())
                outcome.iterations += report.iterations
                outcome.operator_applies += report.operator_applies
                outcome.pc_applies += report.pc_applies
                outcome.solves += 1
                outcome.worst_relres = max(outcome.worst_relres, report.true_relres)
                self.solver_name = report.solver
            with self.clock("write"), agreement(self._group.comm):
                if writer is not None:
                    writer.finish(index)
            outcome.done += 1
        except (ConvergenceError, SchemaError) as error:
            reason = str(error).splitlines()[0]
            with agreement(self._group.comm):
                if writer is not None:
                    writer.fail(index, reason)
            log.warning("sample %d failed and is skipped: %s", index, reason)
            outcome.failed += 1
            outcome.failures.append({"index": index, "reason": reason})

    def _begin(self, mu: Sample, writer: Any) -> None:
        self._case.family.schema.check_sample(mu)
        if writer is not None:
            writer.begin(mu)
            self._outcome.bytes += sum(4 * values.size for values in mu.fields.values())

    def _step(self, system: LinearSystem) -> SolveResult:
        """Solve, and note the CPU seconds of this solve, summed over the ranks of the group."""
        if self._state is None:
            self._state = self._case.solver.init(system)
        begun = time.process_time()
        result, self._state = self._case.solver.solve(system, self._state)
        self._solve_seconds = time.process_time() - begun
        if self._group.comm.size > 1:
            self._solve_seconds = self._group.comm.allreduce(self._solve_seconds)
        return result

    def finish(self) -> Outcome:
        """Return what this group did."""
        self._outcome.wall, self._outcome.cpu = self.clock.wall, dict(self.clock.cpu)
        return self._outcome

    def destroy(self) -> None:
        """Free PETSc objects. Collective on the group."""
        if self._state is not None:
            self._state.destroy()
        self._workspace.destroy()
