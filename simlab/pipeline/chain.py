"""One group of ranks walking its chain of samples, and what that cost.

A chain is what a group walks: its piece of the campaign's order, then segments it takes from others
(:mod:`.stealing`). The solver's state goes along from sample to sample through all of it.

A sample that cannot be solved or stored as its schema says is recorded as failed and
skipped; every other error (a full disk, a bug) ends the campaign. Faults that one rank of the group
sees are agreed on before anything is raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np

from simlab.core.comm import Group, agreement
from simlab.core.errors import ConvergenceError, SchemaError
from simlab.core.reports import Provenance
from simlab.core.runs import RunDirectory
from simlab.core.samples import Sample
from simlab.linalg.advisor import begun
from simlab.linalg.clock import Clock
from simlab.linalg.seed import Seed
from simlab.linalg.system import LinearSystem, SolveResult
from simlab.pipeline.case import Case
from simlab.pipeline.draws import Draws
from simlab.pipeline.heartbeat import Heart
from simlab.pipeline.order import Order
from simlab.pipeline.pilot import Decision
from simlab.pipeline.stealing import Crew
from simlab.pipeline.tally import Tally
from simlab.problems.family import trajectory
from simlab.store.segments import Writer
from simlab.store.store import SnapshotStore

__all__ = ["Chain", "Outcome"]

log = logging.getLogger("simlab.campaign")

_N_EVENTS = 100  # of each group that the manifest keeps


@dataclass
class Outcome:
    """What a campaign did; sums over all groups on rank 0, this group's own elsewhere.

    Attributes
    ----------
    done, failed : int
        Samples of this call.
    n_missing, n_failed : int
        Samples that are still to be solved (after a stop), and those that have failed in any call.
    stopped : bool
        A stop was asked for before the end.
    groups : list of dict
        For every group: samples done, failed and taken over, CPU seconds of its root, and what its
        solver reported.
    """

    done: int = 0
    failed: int = 0
    n_missing: int = 0
    n_failed: int = 0
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
    groups: list[dict[str, Any]] = field(default_factory=list)

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
        self.groups += other.groups


class Chain:
    """One group at work: its workspace and solver state live as long as the campaign.

    A context manager that closes the group's writer, so that what was written can be sealed.

    Attributes
    ----------
    number : int
        Of the chain, as stored beside the data.
    order : Order
        Gives each sample's position in the order of solving, as stored beside the data.
    seed : Seed, optional
        Static space the solver begins with.
    n_systems : int
        About how many systems this group will solve.
    workspace : object
        What the family's ``setup`` made.
    """

    def __init__(
        self, case: Case, run: RunDirectory, store: SnapshotStore, group: Group, order: Order
    ) -> None:
        self._case, self._run, self._store, self._group = case, run, store, group
        self._draws = Draws(case, run, store, group)
        self.workspace = case.family.setup(group.comm)
        self.seed: Seed | None = None
        self.n_systems = 0
        self._state: Any = None
        self._adopted: Decision | None = None
        self._writer: Writer | None = None
        self._heart = Heart(run, f"solvers-{group.index}")
        self._n_events = 0
        self._events: list[str] = []
        self.clock = Clock()
        self._outcome = Outcome()
        self.solver_name = ""
        self.number = group.index
        self.order = order
        self._solve_seconds = nan  # not known where a family steps by itself

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    @property
    def decision(self) -> Decision | None:
        """What the solver has chosen, when it is one that chooses."""
        return self._adopted or Decision.of(self._state)

    def adopt(self, decision: Decision, seed: Any = None) -> None:
        """Go on with a choice and its static space. Collective on the group.

        Without a static space, a state in which this group chose the same is kept.
        """
        own = self.decision
        if seed is None and own is not None and own.solver == decision.solver:
            return
        self.seed = seed
        if self._state is not None:
            self._state.destroy()
        self._state, self._n_events = None, 0
        self._adopted = decision

    @property
    def is_stopped(self) -> bool:
        """Whether a stop has ended this group's walk."""
        return self._outcome.stopped

    def walk(
        self,
        crew: Crew,
        ids: Sequence[int] | np.ndarray,
        tally: Tally,
        until: Callable[[], bool] = lambda: False,
    ) -> list[int]:
        """Solve a chain of samples in order, then what there is to take over from other groups.

        Ends early on a stop, or when ``until()`` is true. Collective on the group.

        Returns
        -------
        list of int
            Ids that were tried, in order.
        """
        if self._writer is None and self._group.is_root:
            self._writer = self._store.writer()
        tried = []
        for index in crew.walk(ids, lambda: until() or self._stop_requested()):
            self._solve(index, self._writer)
            tried.append(index)
            tally.report(self._outcome.done, self._outcome.failed, self._outcome.bytes)
            tally.seal_if_due(self._store)
        if self._writer is not None:
            self._heart.rest()
        return tried

    def seal(self) -> None:
        """Close this group's writer and seal what it wrote. Rank-local."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self.clock("seal"):
                writer.close()
                self._store.seal(final=True, writer=writer.id)

    def _stop_requested(self) -> bool:
        """Whether to end the walk; asked by the group's root only, whose word the others follow."""
        self._outcome.stopped = self._outcome.stopped or self._run.stop_requested()
        return self._outcome.stopped

    def _solve(self, index: int, writer: Any) -> None:
        """Solve a sample, or others in its place while it fails at once. Collective."""
        outcome, is_drawn_anew = self._outcome, True
        while is_drawn_anew:
            before = outcome.solves
            reason = self._attempt(index, writer)
            if not reason:
                outcome.done += 1
                return
            # what was stored may have been learned from, as this sample
            is_drawn_anew = outcome.solves == before and self._draws.redraw(index)
            with agreement(self._group.comm):
                if writer is not None:
                    (writer.abandon if is_drawn_anew else writer.fail)(index, reason)
            what = "drawn anew" if is_drawn_anew else "skipped"
            log.warning("sample %d failed and is %s: %s", index, what, reason)
        outcome.failed += 1
        outcome.failures.append({"index": index, "reason": reason})

    def _attempt(self, index: int, writer: Any) -> str:
        """Draw a sample and solve it; return why that failed, its end not yet written. Collective.

        Returns
        -------
        str
            Empty when it did not fail.
        """
        case, outcome = self._case, self._outcome
        with self.clock("draw"):
            space, seed = self._draws.space_of(index), self._draws.seed_of(index)
            with agreement(self._group.comm):
                mu = space.sample(1, seed, index)[0]
                self._begin(mu, writer)
        try:
            for step in trajectory(case.family, mu, self.workspace, self._step, self.clock):
                report = step.report
                with self.clock("write"), agreement(self._group.comm):
                    if writer is not None:
                        writer.append(
                            index,
                            step.step,
                            step.time,
                            step.fields,
                            solve=Provenance.of(
                                report,
                                order=self.order.place[index],
                                chain=self.number,
                                seconds=self._solve_seconds,
                            ),
                        )
                        self._heart.beat()
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
        except (ConvergenceError, SchemaError) as error:
            return str(error).splitlines()[0]
        return ""

    def _begin(self, mu: Sample, writer: Any) -> None:
        self._case.family.schema.check_sample(mu)
        if writer is not None:
            writer.begin(mu)
            self._heart.beat()
            self._outcome.bytes += sum(4 * values.size for values in mu.fields.values())

    def _step(self, system: LinearSystem) -> SolveResult:
        """Solve, and note the CPU seconds of this solve, summed over the ranks of the group."""
        if self._state is None:
            if self._adopted is not None:
                self._state = self._adopted.state(self.seed)
            else:
                self._state = begun(self._case.solver, system, self.seed, self.n_systems)
        start = time.process_time()
        result, self._state = self._case.solver.solve(system, self._state)
        self._solve_seconds = time.process_time() - start
        if self._group.comm.size > 1:
            self._solve_seconds = self._group.comm.allreduce(self._solve_seconds)
        self._listen()
        return result

    def _listen(self) -> None:
        """Log and keep what the solver has reported since its last solve."""
        events = getattr(self._state, "events", ())
        for text in events[self._n_events :]:
            if self._group.is_root:
                log.info("group %d: %s", self.number, text)
            self._events.append(str(text))
        self._n_events = len(events)

    def finish(self, n_taken: int) -> Outcome:
        """Return what this group did; it took over ``n_taken`` samples."""
        outcome = self._outcome
        outcome.wall, outcome.cpu = self.clock.wall, dict(self.clock.cpu)
        facts = {"group": self.number, "done": outcome.done, "failed": outcome.failed}
        outcome.groups = [facts | {"taken": n_taken, "events": self._events[:_N_EVENTS]}]
        return outcome

    def destroy(self) -> None:
        """Free PETSc objects. Collective on the group."""
        if self._state is not None:
            self._state.destroy()
        self.workspace.destroy()
