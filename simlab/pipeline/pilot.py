"""What ``solver = "auto"`` decided: shared by all groups and by all starts of a run.

Every group begins with a pilot of its own, on samples that count: the groups share out the first
ones as drawn, so none waits idle, and nothing is solved in vain. When all have decided, the verdict
of group 0 holds (of the next one when group 0 had no sample), the others adopt it. It is written to
the run's manifest under ``decision``: a resumed run, and the other parts of a job array, adopt it
as well. Delete the entry to have the pilot again. It does not count where the PETSc words that
choose a method are others than they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simlab.core.config import as_table
from simlab.core.errors import ConfigError
from simlab.core.runs import RunDirectory
from simlab.linalg import petsc
from simlab.linalg.advisor import AutoState, adopt, chosen
from simlab.linalg.options import user_gave
from simlab.linalg.system import LinearSolver, solvers
from simlab.pipeline.case import Case
from simlab.problems.family import marches

__all__ = ["Decision", "samples_of_a_pilot"]

_KEY = "decision"


@dataclass(frozen=True)
class Decision:
    """The solver of a campaign, who steps in where it fails, why, and the table behind it."""

    solver: LinearSolver
    others: tuple[LinearSolver, ...]
    reason: str
    table: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, state: Any) -> Decision | None:
        """Return what a solver's state says of a choice; None where there is none (yet)."""
        if not isinstance(state, AutoState):
            return None
        choice = chosen(state)
        if choice is None:
            return None
        return cls(choice, state.others, state.reason, tuple(state.table))

    @classmethod
    def read(cls, run: RunDirectory) -> Decision | None:
        """Return the decision of an earlier start of this run, if it holds for this one too."""
        entry = run.manifest().get(_KEY)
        if not isinstance(entry, dict) or entry.get("petsc_words", []) != _words():
            return None
        try:
            choice, *others = [solvers.build(table) for table in entry["solvers"]]
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{run.path}/manifest.json: {_KEY} cannot be read ({error}); delete the entry to "
                "have the solver chosen again"
            ) from None
        return cls(choice, tuple(others), str(entry["reason"]), tuple(entry["pilot"]))

    def write(self, run: RunDirectory) -> None:
        """Keep the decision for later starts of this run."""
        entry = {
            "solvers": [as_table(solver) for solver in (self.solver, *self.others)],
            "reason": self.reason,
            "pilot": list(self.table),
            "petsc_words": _words(),
        }
        run.update(**{_KEY: entry})

    def state(self, seed: Any = None) -> AutoState:
        """Return a solver state in which this decision holds."""
        return adopt(self.solver, self.reason, self.others, seed)


def samples_of_a_pilot(case: Case) -> int:
    """Return how many samples a group's pilot takes; 0 where there is no solver to choose."""
    if marches(case.family):
        return 0
    systems = int(getattr(case.solver, "pilot", 0))
    return -(-systems // case.family.steps)


def _words() -> list[str]:
    """Return the PETSc words when they choose a method. Loads PETSc."""
    return petsc.arguments() if user_gave("ksp_type", "pc_type") else []
