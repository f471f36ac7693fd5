"""The questions of the recycling bench beyond the main table: which systems, which solvers.

``ablation``    restarts, recycling within a system, carrying, sorting: no preconditioner
``constant``    matrices that never change: a recycled solver beside one factorisation for all
``goal``        ``auto`` against the published scheme on the family C1
``gate``        when carrying is switched off, and why
"""

from __future__ import annotations

from typing import Any

from simlab.bench._skr_families import Study
from simlab.bench._skr_solvers import contestants
from simlab.bench._skr_table import BUDGET, RTOL, Measured, measured

__all__ = ["CONSTANT", "ablation", "constant", "gate", "goal"]

CONSTANT = {"thermal": (11_062, 70_160), "poisson": (11_241, 71_277)}
_PARTS = ("gmres200", "notcarried", "carried_unsorted", "carried_greedy")
_ONE_MATRIX = (
    "gmres40",
    "notcarried",
    "carried_unsorted",
    "static",
    "deflated_cg",
    "cg_icc",
    "cg_amg",
    "cholesky",
    "auto",
)
_N_STAGNATING = 12  # systems for GMRES(40), which may take ten thousand iterations each


def ablation(
    family: str, n: int, n_samples: int, budget: float = BUDGET
) -> tuple[Measured, dict[str, float]]:
    """Measure what restarts, recycling, carrying and sorting contribute, without preconditioner.

    Returns
    -------
    Measured
    dict of str to float
        Iterations of GMRES(40) over those of the carried and of the not carried solver.
    """
    n_plain = min(_N_STAGNATING, n_samples)
    plain = measured(family, n, "none", n_samples=n_plain, names=("gmres40",), budget=budget)
    parts = measured(family, n, "none", n_samples=n_samples, names=_PARTS, budget=budget)
    found = Measured(
        plain.rows + parts.rows, parts.left_out, plain.turns | parts.turns, parts.seconds
    )
    its = {row["solver"]: row["iterations"] for row in found.rows}
    shares = {
        "gmres40_over_notcarried": its["gmres40"] / its["notcarried"],
        "gmres40_over_carried": its["gmres40"] / its["carried_greedy"],
        "carried_over_notcarried": its["carried_greedy"] / its["notcarried"],
        "greedy_over_unsorted": its["carried_greedy"] / its["carried_unsorted"],
    }
    return found, shares


def constant(family: str, n: int, n_samples: int) -> tuple[Measured, dict[str, float | None]]:
    """Measure a family of one matrix.

    Returns
    -------
    Measured
    dict
        CPU per system of the recycled solver over that of the factor kept, and of CG+ICC over it.
    """
    found = measured(family, n, "ilu", n_samples=n_samples, names=_ONE_MATRIX)
    cpu = {row["solver"]: row["cpu_ms"] for row in found.rows if not row["failed"]}
    once = cpu["factor_once"]
    return found, {
        f"{name}_over_factor_once": cpu[name] / once if name in cpu else None
        for name in ("carried_unsorted", "cg_icc", "auto")
    }


def goal(n: int, n_samples: int) -> tuple[Measured, dict[str, float]]:
    """Measure ``auto`` against unpreconditioned GCRO-DR(40, 20) along a greedy path, on C1.

    Returns
    -------
    Measured
    dict of str to float
        CPU of the published scheme over that of ``auto``: per system after the pilot, and for all
        systems with the pilot in it.
    """
    found = measured(
        "C1", n, "none", n_samples=n_samples, names=("gmres40", "carried_paper", "auto")
    )
    rows = {row["solver"]: row for row in found.rows}
    paper, auto = found.seconds["carried_paper"], found.seconds["auto"]
    return found, {
        "paper_none_over_auto_cpu": rows["carried_paper"]["cpu_ms"] / rows["auto"]["cpu_ms"],
        "paper_none_over_auto_with_pilot": sum(paper) / sum(auto),
    }


def gate(family: str, n: int, n_samples: int) -> dict[str, Any]:
    """Walk a chain with the gate on and return when and why carrying ended."""
    study = Study(family, n, n_samples)
    pc = "none" if family.startswith("F") else "ilu"
    made, _ = contestants(("carried_unsorted",), pc, study.reference(), RTOL, gate=True)
    contestant = made["carried_unsorted"]
    row: dict[str, Any] = {"family": family, "n": study.n, "pc": pc, "systems": n_samples}
    row |= {"carrying_ended_after": None, "why": "carrying pays"}
    for turn, systems in enumerate(study.systems(), 1):
        contestant(systems)
        if contestant.state.events:
            row |= {"carrying_ended_after": turn, "why": contestant.state.events[-1]}
            break
    contestant.destroy()
    study.destroy()
    return row
