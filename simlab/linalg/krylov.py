"""Krylov methods with preconditioners, through PETSc's KSP.

One class, and the usual pairs as kinds of their own. Options pass through untouched: ``options``
takes any PETSc option as nested tables, the user's command line wins over everything.

Departures from PETSc's defaults: convergence is judged by ``||b - A x|| / ||b||``, so
left-preconditioned methods become right-preconditioned where PETSc can do that; the GMRES restart
is 40. ICC and ILU exist per rank only; on several ranks they work inside block Jacobi, one block
per rank, and the report says so.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from annotated_types import Gt, Lt
from pydantic import PositiveInt

from simlab.core.errors import ConfigError
from simlab.linalg.ksp import KSPState
from simlab.linalg.options import merged, user_gave
from simlab.linalg.system import LinearSystem, SolveResult, solvers

__all__ = [
    "CGAMG",
    "CGGAMG",
    "CGICC",
    "GMRESILU",
    "Krylov",
    "needs_entries",
    "preconditioner_options",
]

_NEED_SPD = ("cg", "pipecg", "groppcg", "fcg")
_SYMMETRIC_PCS = ("icc", "cholesky")
_ONE_RANK_PCS = ("icc", "ilu")
_PCS_WITHOUT_ENTRIES = ("none", "jacobi", "python", "shell")


def needs_entries(preconditioner: str) -> bool:
    """Whether a PC type cannot work with a matrix that only multiplies and has a diagonal."""
    return preconditioner not in _PCS_WITHOUT_ENTRIES


def preconditioner_options(kind: str, system: LinearSystem) -> dict[str, str]:
    """Return PETSc's options for a preconditioner; inside block Jacobi where it is rank-local."""
    if kind in _ONE_RANK_PCS and system.A.comm.size > 1:
        return {"pc_type": "bjacobi", "sub_ksp_type": "preonly", "sub_pc_type": kind}
    return {"pc_type": kind}


@solvers.register("krylov")
class Krylov:
    """A Krylov method and a preconditioner.

    Attributes
    ----------
    method : str
        KSP type: ``"cg"`` (needs a symmetric positive definite matrix), ``"gmres"``, ``"bcgs"``...
    preconditioner : str
        PC type: ``"icc"``, ``"ilu"``, ``"hypre"`` (BoomerAMG), ``"gamg"``, ``"jacobi"``, ``"asm"``,
        ``"none"``...
    rtol : float
        Tolerance for the true residual relative to ``||b||``.
    max_iterations : int
        Over all restarts and corrections of one solve.
    restart : int
        Length of a GMRES cycle.
    history : bool
        Keep residual norms in the report.
    options : dict
        More PETSc options, nested at will: ``{pc_hypre_boomeramg = {strong_threshold = 0.5}}``.
    prefix : str
        PETSc options prefix. Empty: ``-ksp_type`` on the command line reaches this solver.

    Examples
    --------
    >>> Krylov(method="gmres", preconditioner="ilu", options={"pc_factor_levels": 1}).method
    'gmres'
    """

    method: str = "cg"
    preconditioner: str = "icc"
    rtol: Annotated[float, Gt(0), Lt(1)] = 1e-8
    max_iterations: PositiveInt = 10_000
    restart: PositiveInt = 40
    history: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""

    def suits(self, system: LinearSystem) -> bool:
        """Whether the matrix is of the sort this method needs."""
        traits = system.traits
        if traits.matrix_free and needs_entries(self.preconditioner):
            return False
        if self.preconditioner in _SYMMETRIC_PCS and not traits.spd:
            return False
        return traits.spd or self.method not in _NEED_SPD

    def init(self, system: LinearSystem) -> KSPState:
        """Return a fresh state. Collective.

        Raises
        ------
        ConfigError
            When the preconditioner needs entries of a matrix that has none.
        """
        pc = merged({"pc_type": self.preconditioner}, self.options)["pc_type"]
        is_ours = not user_gave("pc_type", prefix=self.prefix)
        if system.traits.matrix_free and is_ours and needs_entries(str(pc)):
            raise ConfigError(
                f"solver krylov: preconditioner {pc!r} needs the matrix's entries, and this "
                'family is matrix-free; set solver.preconditioner = "jacobi" or use solver fast'
            )
        options = {"ksp_type": self.method, **preconditioner_options(self.preconditioner, system)}
        if "gmres" in self.method:
            options["ksp_gmres_restart"] = str(self.restart)
        return KSPState(
            system,
            merged(options, self.options),
            prefix=self.prefix,
            restart=self.restart,
            keep_history=self.history,
        )

    def solve(self, system: LinearSystem, state: KSPState) -> tuple[SolveResult, KSPState]:
        """Solve one system. Collective."""
        return state.solve(system, self.rtol, self.max_iterations), state


@solvers.register("cg_icc")
class CGICC(Krylov):
    """Conjugate gradients with an incomplete Cholesky factor: small or easy symmetric systems."""

    method: str = "cg"
    preconditioner: str = "icc"


@solvers.register("cg_amg")
class CGAMG(Krylov):
    """Conjugate gradients with hypre's BoomerAMG: the all-rounder for large diffusion problems."""

    method: str = "cg"
    preconditioner: str = "hypre"


@solvers.register("cg_gamg")
class CGGAMG(Krylov):
    """Conjugate gradients with PETSc's smoothed aggregation multigrid."""

    method: str = "cg"
    preconditioner: str = "gamg"


@solvers.register("gmres_ilu")
class GMRESILU(Krylov):
    """Restarted GMRES with an incomplete LU factor: nonsymmetric systems of moderate size."""

    method: str = "gmres"
    preconditioner: str = "ilu"
