"""The contestants of the recycling tables: settings, the order they walk in, what they start with.

All recycling solvers keep at most 20 vectors and restart after 40, unless a number in the name says
otherwise: ``static40`` and ``carried40`` restart after 60, ``static60`` after 80, so that a cycle
always has 20 new directions. ``carried_paper`` is the published scheme: the space of the
preconditioned unknown, stored beside its image in solution space. ``static_carried`` keeps 20 + 6
vectors, which is what fits into that scheme's memory, ``static_carried20`` 15 + 5;
``carried_seldom`` renews at every eighth system. Carrying is never switched off here (no gate).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from simlab.core.errors import ConfigError
from simlab.linalg.advisor import begun, chosen
from simlab.linalg.krylov import needs_entries
from simlab.linalg.system import LinearSolver, LinearSystem, solvers

__all__ = ["RECYCLING", "SOLVERS", "TABLE", "Contestant", "Turn", "contestants", "preconditioner"]

_PCS = re.compile(r"(none|jacobi|sor|ilu|icc)|(asm|bjacobi)(\d+)")


def preconditioner(name: str) -> dict[str, Any]:
    """Return a preconditioner as settings: ``"none"``, ``"ilu"``, ``"asm64"``, ``"bjacobi16"``...

    Raises
    ------
    ConfigError
        For a name of another sort.
    """
    match = _PCS.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"no preconditioner {name!r}; one of none, jacobi, sor, ilu, icc, or asm or bjacobi "
            "with a number of blocks, as in asm64"
        )
    plain, blocked, count = match.groups()
    if plain:
        return {"preconditioner": plain}
    options = {f"pc_{blocked}_blocks": int(count), "sub_ksp_type": "preonly", "sub_pc_type": "ilu"}
    return {"preconditioner": blocked, "options": options}


def _gmres(restart: int) -> Callable[[str], Any]:
    table = {"kind": "krylov", "method": "gmres", "restart": restart}
    return lambda pc: table | preconditioner(pc)


def _recycling(carried: int = 0, static: int = 0, **settings: Any) -> Callable[[str], Any]:
    table = {"kind": "gcrodr", "carried": carried, "static": static, "restart": 40, "gate": False}
    return lambda pc: table | settings | preconditioner(pc)


def _own(kind: str, **settings: Any) -> Callable[[str], Any]:
    return lambda pc: {"kind": kind, **settings}


SOLVERS: dict[str, Callable[[str], Any]] = {
    "gmres40": _gmres(40),
    "gmres200": _gmres(200),
    "gcrodr_k0": _recycling(),
    "notcarried": _recycling(20, update="never"),
    "carried_unsorted": _recycling(20),
    "carried_greedy": _recycling(20),
    "carried_seldom": _recycling(20, interval=8),
    "carried_paper": _recycling(20, target="preconditioned"),
    "static": _recycling(0, 20),
    "static_carried": _recycling(6, 20),
    "static_carried20": _recycling(5, 15),
    "carried40": _recycling(40, restart=60),
    "static40": _recycling(0, 40, restart=60),
    "static60": _recycling(0, 60, restart=80),
    "deflated_cg": _own("deflated_cg", gate=False),
    "deflated_cg_static": _own("deflated_cg", static=20, carried=0),
    "cg_icc": _own("cg_icc"),
    "cg_amg": _own("cg_amg"),
    "cholesky": _own("direct", method="cholesky"),
    "lu": _own("direct", method="lu"),
    "kept_factor": _own("kept"),
    "fast": _own("fast"),
    "auto": _own("auto"),
}
TABLE = tuple(name for name in SOLVERS if name not in ("carried40", "static40", "static60"))
RECYCLING = (
    "carried_unsorted",
    "carried_greedy",
    "carried_seldom",
    "carried_paper",
    "static",
    "static_carried",
    "static_carried20",
)
_GREEDY = (
    "carried_greedy",
    "carried_seldom",
    "carried_paper",
    "carried40",
    "static_carried",
    "static_carried20",
    "deflated_cg",
)


@dataclass(frozen=True)
class Turn:
    """What one solve did and cost.

    Attributes
    ----------
    index : int
        Of the sample.
    wall : float
        Seconds.
    iterating : float
        Share of the time spent in iterations: no set-up, nothing done once per system.
    is_pilot : bool
        ``auto`` had not made its choice before.
    """

    index: int
    iterations: int
    operator_applies: int
    pc_applies: int
    true_relres: float
    converged: bool
    method: str
    wall: float
    iterating: float
    is_pilot: bool
    history: tuple[float, ...]


class Contestant:
    """A solver with its state; call it with the systems of a turn.

    Attributes
    ----------
    order : {"sample", "greedy"}
    seed_seconds : float or None
        CPU seconds spent on the static space, once.
    """

    def __init__(self, name: str, solver: LinearSolver, seed: Any, seconds: float | None) -> None:
        self.name, self.solver, self.seed_seconds = name, solver, seconds
        self.order = "greedy" if name in _GREEDY else "sample"
        self.state: Any = None
        self._seed = seed

    @property
    def choice(self) -> str | None:
        """What ``auto`` has settled on."""
        choice = chosen(self.state) if self.name == "auto" and self.state is not None else None
        return choice.kind if choice else None

    def __call__(self, systems: Mapping[str, LinearSystem]) -> Turn:
        """Solve this contestant's system."""
        system = systems[self.order]
        start = time.perf_counter()
        if self.state is None:
            self.state = begun(self.solver, system, self._seed)
        is_pilot = self.name == "auto" and self.choice is None
        result, self.state = self.solver.solve(system, self.state)
        report = result.report
        return Turn(
            system.index,
            report.iterations,
            report.operator_applies,
            report.pc_applies,
            report.true_relres,
            report.converged,
            report.solver,
            time.perf_counter() - start,
            report.seconds.get("solve", 0.0) / max(sum(report.seconds.values()), 1e-9),
            is_pilot,
            report.history,
        )

    def destroy(self) -> None:
        """Free PETSc objects."""
        for item in (self.state, self._seed):
            if callable(getattr(item, "destroy", None)):
                item.destroy()


def contestants(
    names: tuple[str, ...], pc: str, reference: LinearSystem, rtol: float, **settings: Any
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Return the named contestants ready to start, and the others with the reason.

    Parameters
    ----------
    names : tuple of str
        Keys of ``SOLVERS``.
    pc : str
        Preconditioner of the GMRES and recycling solvers.
    reference : LinearSystem
        System of the mean sample, which static spaces come from.
    settings
        More settings, for the solvers that have them.
    """
    made, left_out = {}, {}
    for name in names:
        table = SOLVERS[name](pc)
        kind: Any = solvers.kinds()[table["kind"]]
        known = {item.name for item in fields(kind)}
        table |= {key: value for key, value in settings.items() if key in known}
        own_pc = table.get("preconditioner", "none")
        if reference.traits.matrix_free and needs_entries(own_pc):
            left_out[name] = f"{own_pc} needs the entries of a matrix"
            continue
        solver: Any = solvers.build(table | {"rtol": rtol})
        if not solver.suits(reference):
            left_out[name] = f"{solver.kind} does not take such matrices"
            continue
        seed, seconds = None, None
        if callable(getattr(solver, "seed", None)):
            start = time.process_time()
            seed = solver.seed(reference)
            seconds = None if seed is None else time.process_time() - start
        if seed is None and getattr(solver, "static", 0) > 0:
            left_out[name] = "no static space for such matrices"
            continue
        made[name] = Contestant(name, solver, seed, seconds)
    return made, left_out
