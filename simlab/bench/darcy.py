"""Darcy flow: every solver on fields of two kinds, in two and three dimensions, and ``auto``.

Families: ``C1``, a = exp(GRF), smooth, contrast about 3; ``two_phase``, a in {3, 12} with sharp
interfaces. Every sample is a new matrix of the same pattern. All solvers must reach rtol = 1e-8 on
the true residual ``||b - A x|| / ||b||``. Per row: iterations (median), CPU milliseconds per system
after the first (``auto``: after its pilot, whose cost is ``pilot_ms``), assembly of one system, the
worst true residual. A solver whose first system took longer than four CPU seconds has that as its
only one (``systems`` says how many count).

Ratios: ``auto_over_best`` is the worst over all sizes and families; ``amg_over_fast_*`` compare
CG+BoomerAMG with the fast-transform CG on C1, 421 being a prime; ``parallel_efficiency`` is the
wall time per sample of a campaign step (draw, assemble, solve) on one rank over that on two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from rich.console import Console
from scipy.sparse.linalg import spsolve

from simlab.bench._launch import NotMeasured, launched
from simlab.bench.runner import Contest, outcome, print_ratios, print_table
from simlab.core.comm import self_comm
from simlab.linalg.system import LinearSolver, LinearSystem, SolveResult, solvers
from simlab.problems.family import families

__all__ = ["run"]

RTOL = 1e-8
SEED = 71093
_TOO_SLOW = 4.0
_PILOT = 3

FAMILIES: dict[str, Any] = {"C1": "lognormal", "two_phase": "two_phase"}
SOLVERS: dict[str, dict[str, Any] | None] = {
    "scipy spsolve": None,
    "Cholesky": {"kind": "direct", "package": "cholmod"},
    "MUMPS": {"kind": "direct", "package": "mumps"},
    "CG+ICC": {"kind": "cg_icc"},
    "CG+BoomerAMG": {"kind": "cg_amg"},
    "CG+GAMG": {"kind": "cg_gamg"},
    "GMRES+ILU": {"kind": "gmres_ilu"},
    "fast": {"kind": "fast"},
    "auto": {"kind": "auto", "pilot": _PILOT},
}
GOALS = {
    "auto_over_best": "<= 1.15",
    "amg_over_fast_400": ">= 3",
    "amg_over_fast_421": ">= 2",
    "parallel_efficiency": ">= 0.9",
    "assembly_over_best_400": "<= 0.25",
}
_COLUMNS = (
    "family",
    "n",
    "solver",
    "iterations",
    "cpu_ms",
    "assembly_ms",
    "true_relres",
    "systems",
    "pilot_ms",
    "chosen",
)


def run(
    quick: bool = False,
    *,
    sizes: Sequence[Sequence[int]] | None = None,
    n_samples: int | None = None,
    ranks: bool = True,
) -> dict[str, Any]:
    """Measure, print and return the table.

    Parameters
    ----------
    quick : bool
        100^2 and 16^3 with all solvers, 400^2 and 421^2 without the slow ones, fewer samples.
    sizes : sequence of (cells, dimensions), optional
        Instead of the standard ones.
    n_samples : int, optional
        Systems per size and family, more than the pilot's three.
    ranks : bool
        Measure the parallel efficiency too; needs a process launcher.
    """
    sizes = sizes or (
        [(100, 2), (400, 2), (421, 2), (16, 3)]
        if quick
        else [(100, 2), (200, 2), (400, 2), (421, 2), (48, 3)]
    )
    n_samples = n_samples or (6 if quick else 10)
    rows: list[dict[str, Any]] = []
    for cells, dim in sizes:
        slow = {"scipy spsolve", "Cholesky", "MUMPS", "CG+ICC", "GMRES+ILU"}
        left_out = slow if quick and cells**dim > 50_000 else set()
        names = [name for name in SOLVERS if name not in left_out]
        for family in FAMILIES:
            rows += _contest(family, cells, dim, names, n_samples)
            print_table(f"{family}, {cells}^{dim}", rows[-len(names) :], _COLUMNS)
    ratios = _ratios(rows)
    if ranks:
        ratios["parallel_efficiency"] = _parallel_efficiency(quick)
    print_ratios(ratios, GOALS)
    return outcome("darcy", rows, ratios)


class _Contestant:
    """A solver and its state over the samples of one family and size."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._solver: LinearSolver = solvers.build(settings | {"rtol": RTOL})
        self.state: Any = None

    def __call__(self, item: tuple[LinearSystem, Any]) -> tuple[int, float]:
        system = item[0]
        if self.state is None:
            self.state = self._solver.init(system)
        result: SolveResult
        result, self.state = self._solver.solve(system, self.state)
        report = result.report.check()
        return report.iterations, report.true_relres

    def destroy(self) -> None:
        if self.state is not None:
            self.state.destroy()


def _spsolve(item: tuple[LinearSystem, Any]) -> tuple[int, float]:
    system, matrix = item
    b = system.b.getArray(readonly=True)
    x = spsolve(matrix, b)
    return 0, float(np.linalg.norm(b - matrix @ x) / np.linalg.norm(b))


def _contest(
    family: str, cells: int, dim: int, names: Sequence[str], n_samples: int
) -> list[dict[str, Any]]:
    """Let the named solvers compete on the first samples of a family."""
    darcy = families.build(
        {"kind": "darcy", "cells": cells, "dim": dim, "fields": FAMILIES[family]}
    )
    workspace = darcy.setup(self_comm())
    samples = darcy.space.sample(n_samples, SEED)
    settings = {name: SOLVERS[name] for name in names}
    contestants = {
        name: _spsolve if table is None else _Contestant(table) for name, table in settings.items()
    }
    assembly = Contest({"assembly": lambda mu: darcy.assemble(mu, workspace)})
    contest = Contest(contestants, _TOO_SLOW)

    def systems() -> Any:
        for mu in samples:
            assembly.run([mu])
            system = assembly.answers["assembly"].pop()
            matrix = None
            if "scipy spsolve" in names:
                rows, columns, values = system.A.getValuesCSR()
                matrix = sp.csr_matrix((values, columns, rows)).tocsc()
            yield system, matrix

    contest.run(systems())
    found = []
    for name in names:
        n_pilot = min(_PILOT, n_samples - 1) if name == "auto" else 1
        turns = contest.seconds[name]
        auto = getattr(contestants[name], "state", None) if name == "auto" else None
        its, relres = zip(*contest.answers[name], strict=True)
        found.append(
            {
                "family": family,
                "n": cells**dim,
                "size": f"{cells}^{dim}",
                "solver": name,
                "iterations": int(np.median(its[n_pilot:] or its)),
                "cpu_ms": contest.milliseconds(name, n_pilot),
                "assembly_ms": assembly.milliseconds("assembly"),
                "true_relres": max(relres),
                "systems": max(len(turns) - n_pilot, 1),
                "pilot_ms": 1e3 * sum(turns[:n_pilot]) if auto else None,
                "chosen": auto.choice.kind if auto else None,
            }
        )
    for contestant in contestants.values():
        if isinstance(contestant, _Contestant):
            contestant.destroy()
    workspace.destroy()
    return found


def _ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    cases = sorted({(row["family"], row["size"]) for row in rows})
    times = {
        case: {row["solver"]: row for row in rows if (row["family"], row["size"]) == case}
        for case in cases
    }

    def best(case: tuple[str, str]) -> float:
        return min(row["cpu_ms"] for name, row in times[case].items() if name != "auto")

    def amg_over_fast(size: str) -> float | None:
        found = times.get(("C1", size))
        if found is None:
            return None
        return float(found["CG+BoomerAMG"]["cpu_ms"] / found["fast"]["cpu_ms"])

    large = [case for case in cases if case[1] == "400^2"]
    return {
        "auto_over_best": max(times[case]["auto"]["cpu_ms"] / best(case) for case in cases),
        "amg_over_fast_400": amg_over_fast("400^2"),
        "amg_over_fast_421": amg_over_fast("421^2"),
        "assembly_over_best_400": max(
            (times[case]["auto"]["assembly_ms"] / best(case) for case in large), default=None
        ),
    }


def _parallel_efficiency(quick: bool) -> float | None:
    """Return time per sample on one rank over that on two, medians of alternating runs."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    words = ["--cells", "128", "--samples", "100" if quick else "300"]
    try:
        for turn in range(2 if quick else 6):
            for n_ranks in (1, 2) if turn % 2 == 0 else (2, 1):
                seconds[n_ranks].append(launched("_ranks", n_ranks, *words)["seconds"])
    except NotMeasured as why:
        Console().print(f"parallel efficiency not measured: {why}")
        return None
    return float(np.median(seconds[1]) / np.median(seconds[2]))
