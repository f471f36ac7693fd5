"""``auto`` against everything it may choose from, on the families C1 to C8.

All contestants solve the same systems, as drawn, to rtol = 1e-8 on the true residual; every system
is a turn. ``cpu_ms`` is the median over the turns after the pilot of ``auto``, the same ones for
all. A contestant whose first system takes a second, or that fails, has no more turns, and its first
one counts. A static space is made before its first turn; ``once_ms`` is what that took.

``auto_over_best``: CPU of ``auto`` over that of the contestant with the least ``cpu_ms`` among
those that solved all their systems; the median of the ratios system by system, as neighbours on
the machine slow both down alike. One per family, in the row of ``auto``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from simlab.bench._skr_families import SEED, entry
from simlab.bench.runner import Contest
from simlab.core.comm import self_comm
from simlab.linalg.advisor import begun, chosen
from simlab.linalg.system import LinearSolver, LinearSystem, solvers
from simlab.problems.family import families

__all__ = ["COLUMNS", "FAMILIES", "rows"]

RTOL = 1e-8
FAMILIES = ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8")
SOLVERS: dict[str, dict[str, Any]] = {
    "GMRES+ILU": {"kind": "gmres_ilu"},
    "CG+ICC": {"kind": "cg_icc"},
    "CG+AMG": {"kind": "cg_amg"},
    "Cholesky or LU": {"kind": "direct"},
    "kept first factor": {"kind": "kept", "renew": False},
    "kept factor": {"kind": "kept"},
    "fast": {"kind": "fast"},
    "carried": {"kind": "recycle"},
    "static": {"kind": "recycle", "static": 20, "carried": 0},
    "auto": {"kind": "auto"},
}
COLUMNS = (
    "family",
    "n",
    "solver",
    "iterations",
    "cpu_ms",
    "once_ms",
    "true_relres",
    "systems",
    "pilot_ms",
    "chosen",
    "best",
    "auto_over_best",
)
_TOO_SLOW = 1.0
_AFTER = {False: 14, True: 24}  # systems after the longest possible pilot
_QUICK = 2_500


def rows(quick: bool = False, names: Sequence[str] = FAMILIES) -> list[dict[str, Any]]:
    """Measure and return one row per family and solver.

    Parameters
    ----------
    quick : bool
        About 2 500 unknowns and fewer systems.
    names : sequence of str
        Families.
    """
    return [row for name in names for row in _contest(name, quick)]


class _Contestant:
    """A solver and its state over the systems of one family."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.solver: LinearSolver = solvers.build(table | {"rtol": RTOL})
        self.state: Any = None
        self.once = 0.0
        self.pilot = 0
        self.has_failed = False

    def begin(self, system: LinearSystem) -> None:
        """Make the state."""
        start = time.process_time()
        self.state = begun(self.solver, system)
        self.once = time.process_time() - start

    def __call__(self, system: LinearSystem) -> tuple[int, float]:
        """Solve one system; return iterations and true residual."""
        if self.has_failed:
            return 0, np.nan
        is_pilot = self.solver.kind == "auto" and chosen(self.state) is None
        result, self.state = self.solver.solve(system, self.state)
        self.pilot += is_pilot
        self.has_failed = not result.report.converged
        return result.report.iterations, result.report.true_relres


def _contest(name: str, quick: bool) -> list[dict[str, Any]]:
    known = entry(name)
    family = families.build(known.table(_QUICK if quick else known.n))
    workspace = family.setup(self_comm())
    auto = _Contestant(SOLVERS["auto"])
    n_pilot = auto.solver.pilot  # type: ignore[attr-defined]
    samples = family.space.sample(n_pilot + _AFTER[quick], SEED)
    first = family.assemble(samples[0], workspace)
    found = {label: _Contestant(table) for label, table in SOLVERS.items()} | {"auto": auto}
    found = {label: item for label, item in found.items() if item.solver.suits(first)}
    for item in found.values():
        item.begin(first)
    contest = Contest(found, _TOO_SLOW)
    contest.run(family.assemble(mu, workspace) for mu in samples)
    skip = max(auto.pilot, 1)
    table = [_row(label, item, contest, skip) for label, item in found.items()]
    rivals = [row for row in table if row["solver"] != "auto" and not row["failed"]]
    best = min(rivals, key=lambda row: row["cpu_ms"])["solver"]
    for row in table:
        row |= {"family": name, "n": first.A.getSize()[0]}
        if row["solver"] == "auto":
            pairs = zip(contest.seconds["auto"][skip:], contest.seconds[best][skip:], strict=False)
            row["auto_over_best"] = float(np.median([ours / theirs for ours, theirs in pairs]))
            row["best"] = best
    for item in found.values():
        item.state.destroy()
    workspace.destroy()
    return table


def _row(label: str, item: _Contestant, contest: Contest, skip: int) -> dict[str, Any]:
    """Return what one contestant needed after the first ``skip`` systems."""
    its, relres = zip(*contest.answers[label], strict=True)
    seconds = contest.seconds[label]
    choice = chosen(item.state) if label == "auto" else None
    return {
        "solver": label,
        "iterations": int(np.median(its[skip:] or its)),
        "cpu_ms": contest.milliseconds(label, skip),
        "once_ms": 1e3 * item.once,
        "true_relres": max(relres),
        "systems": max(len(seconds) - skip, 1),
        "pilot_ms": 1e3 * sum(seconds[: item.pilot]) if label == "auto" else None,
        "chosen": choice.kind if choice else None,
        "best": None,
        "auto_over_best": None,
        "failed": item.has_failed,
    }
