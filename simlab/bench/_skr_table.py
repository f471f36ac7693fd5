"""One table of the recycling bench: solvers side by side on the systems of one family and size.

Per row: ``iterations``, ``operator_applies`` and ``pc_applies`` are means after the first system,
``cpu_ms`` and ``wall_ms`` medians after it (``auto``: after its pilot, which cost ``pilot_ms``),
``iterating_ms`` the part of ``cpu_ms`` that iterations took, ``true_relres`` the worst of all
systems, ``n_systems`` how many count, ``failed`` how many missed the tolerance. Times are those of
``solver.solve``, assembly excluded. ``first_ms`` is the first system, which sets up what lasts;
``seed_ms`` the static space, once per campaign; ``vectors`` of the system's length are stored by a
recycling solver. Where all systems have one matrix, ``cholesky`` is
called ``factor_once``, which is what it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simlab.bench._skr_families import Study, entry
from simlab.bench._skr_solvers import RECYCLING, TABLE, Contestant, Turn, contestants
from simlab.bench.runner import Contest

__all__ = ["BUDGET", "COLUMNS", "RTOL", "Measured", "measured", "ratios"]

RTOL = 1e-8
COLUMNS = (
    "solver",
    "iterations",
    "operator_applies",
    "pc_applies",
    "cpu_ms",
    "wall_ms",
    "true_relres",
    "n_systems",
    "failed",
    "vectors",
    "seed_ms",
    "pilot_ms",
)
BUDGET = 12.0  # CPU seconds of one contestant


@dataclass(frozen=True, eq=False)
class Measured:
    """The rows of one table, who is not in it and why, and every single turn.

    Attributes
    ----------
    turns : dict of str to list of Turn
        By solver, in the order it walked in.
    """

    rows: list[dict[str, Any]]
    left_out: dict[str, str]
    turns: dict[str, list[Turn]]
    seconds: dict[str, list[float]]

    @property
    def title(self) -> str:
        """Family, size and preconditioner."""
        row = self.rows[0]
        return f"{row['family']}, n = {row['n']}, pc {row['pc']}"


def measured(
    family: str,
    n: int | None = None,
    pc: str | None = None,
    *,
    n_samples: int = 24,
    names: tuple[str, ...] = TABLE,
    budget: float = BUDGET,
    **settings: Any,
) -> Measured:
    """Let solvers compete on one family.

    Parameters
    ----------
    family : str
        As for :class:`Study`.
    n : int, optional
    pc : str, optional
        The family's own when left out.
    n_samples : int
    names : tuple of str
    budget : float
        CPU seconds after which a solver meets no more systems.
    settings
        More settings of the GMRES and recycling solvers.
    """
    pc = pc or entry(family).pc
    study = Study(family, n, n_samples)
    names = tuple(name for name in names if name != "lu" or not study.traits.spd)
    made, left_out = contestants(names, pc, study.reference(), RTOL, **settings)
    contest = Contest(made, budget=budget)
    contest.run(study.systems())
    head = {"family": study.label, "n": study.n, "pc": pc}
    rows = [head | _row(contest, contestant) for contestant in made.values()]
    if study.traits.constant_matrix:
        for row in rows:
            row["solver"] = "factor_once" if row["solver"] == "cholesky" else row["solver"]
    found = Measured(rows, left_out, contest.answers, contest.seconds)
    for contestant in made.values():
        contestant.destroy()
    study.destroy()
    return found


def _row(contest: Contest, contestant: Contestant) -> dict[str, Any]:
    name = contestant.name
    turns: Sequence[Turn] = contest.answers[name]
    seconds = contest.seconds[name]
    n_pilot = sum(turn.is_pilot for turn in turns)
    skipped = min(max(n_pilot, 1), len(turns) - 1)
    counted = turns[skipped:]
    spent = zip(seconds[skipped:], counted, strict=True)
    iterating = [1e3 * cpu * turn.iterating for cpu, turn in spent]
    is_auto = name == "auto"
    return {
        "solver": name,
        "method": turns[-1].method,
        "iterations": float(np.mean([turn.iterations for turn in counted])),
        "operator_applies": float(np.mean([turn.operator_applies for turn in counted])),
        "pc_applies": float(np.mean([turn.pc_applies for turn in counted])),
        "cpu_ms": contest.milliseconds(name, skipped),
        "wall_ms": 1e3 * float(np.median([turn.wall for turn in counted])),
        "iterating_ms": float(np.median(iterating)),
        "true_relres": max(turn.true_relres for turn in turns),
        "n_systems": len(counted),
        "failed": sum(not turn.converged for turn in turns),
        "vectors": getattr(contestant.state, "n_vectors", None),
        "first_ms": 1e3 * seconds[0],
        "seed_ms": 1e3 * contestant.seed_seconds if contestant.seed_seconds else None,
        "pilot_ms": 1e3 * sum(seconds[:skipped]) if is_auto else None,
    }


def ratios(found: Measured) -> dict[str, float | None]:
    """Return the ratios of one table; None where a solver is missing or failed."""
    by_name = {row["solver"]: row for row in found.rows if not row["failed"]}

    def over(column: str, name: str, other: str) -> float | None:
        if name not in by_name or other not in by_name:
            return None
        return float(by_name[name][column] / by_name[other][column])

    def overhead(name: str, column: str = "cpu_ms") -> float | None:
        """CPU per iteration over that of PETSc's GMRES(40)."""
        time, its = over(column, name, "gmres40"), over("iterations", name, "gmres40")
        return time / its if time and its else None

    recycled = [name for name in RECYCLING if name in by_name]
    best_recycled = min(recycled, key=lambda name: by_name[name]["cpu_ms"], default="")
    others = [name for name in by_name if name != "auto"]
    best = min(others, key=lambda name: by_name[name]["cpu_ms"], default="")
    return {
        "carried_over_notcarried": over("iterations", "carried_greedy", "notcarried"),
        "greedy_over_unsorted": over("iterations", "carried_greedy", "carried_unsorted"),
        "static_over_notcarried": over("iterations", "static", "notcarried"),
        "static_over_paper": over("iterations", "static", "carried_paper"),
        "static_carried_over_paper": over("iterations", "static_carried", "carried_paper"),
        "notcarried_over_best_recycled_cpu": over("cpu_ms", "notcarried", best_recycled),
        "auto_over_best": over("cpu_ms", "auto", best),
        "overhead_static": overhead("static"),
        "overhead_carried": overhead("carried_greedy"),
        "overhead_seldom": overhead("carried_seldom"),
        "overhead_k0": overhead("gcrodr_k0"),
        "iterating_overhead_static": overhead("static", "iterating_ms"),
        "iterating_overhead_carried": overhead("carried_greedy", "iterating_ms"),
        "iterating_overhead_seldom": overhead("carried_seldom", "iterating_ms"),
        "k0_difference": _largest_difference(found.turns, "gcrodr_k0", "gmres40"),
    }


def _largest_difference(turns: Mapping[str, Sequence[Turn]], name: str, other: str) -> float | None:
    """Return the largest difference of iterations on one system that both have solved."""
    its = [
        {turn.index: turn.iterations for turn in turns.get(key, ()) if turn.converged}
        for key in (name, other)
    ]
    both = its[0].keys() & its[1].keys()
    return float(max(abs(its[0][index] - its[1][index]) for index in both)) if both else None
