"""Sparse direct solvers through PETSc: Cholesky or LU, factored again only when values change.

The ordering and symbolic factorisation are done once per state. The factor is kept for every system
whose matrix has not changed, or whose family claims a constant matrix; a claim that the true
residual refutes costs one new factorisation. Refinement steps follow when the residual misses the
tolerance. Cost for n unknowns, nested dissection: O(n^1.5) in two dimensions, O(n^2) in three.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt

from simlab.core.errors import ConfigError
from simlab.linalg import petsc as PETSc
from simlab.linalg.ksp import KSPState
from simlab.linalg.options import merged
from simlab.linalg.system import LinearSystem, SolveResult, solvers

__all__ = ["Direct", "Package", "factor_options"]

_LARGE = 30_000  # unknowns from where MUMPS was measured to be faster than CHOLMOD
_MAX_APPLICATIONS = 1_000

Package = Literal["auto", "cholmod", "umfpack", "mumps", "petsc"]


def factor_options(
    system: LinearSystem, package: Package = "auto", method: str = "auto"
) -> dict[str, str]:
    """Return PETSc's options for the factor of such a matrix, ``auto`` resolved."""
    if method == "auto":
        method = "cholesky" if system.traits.spd else "lu"
    name: str = package
    if package == "auto":
        has_mumps = PETSc.Sys.hasExternalPackage("mumps")
        is_large = system.A.getSize()[0] > _LARGE and not system.traits.constant_matrix
        if system.A.comm.size > 1 or (has_mumps and is_large):
            name = "mumps"
        elif PETSc.Sys.hasExternalPackage("suitesparse"):
            name = "cholmod" if method == "cholesky" else "umfpack"
        else:
            name = "petsc"
    options = {"pc_type": method, "pc_factor_mat_solver_type": name}
    if name == "petsc":
        options["pc_factor_mat_ordering_type"] = "nd"
    return options


@solvers.register("direct")
class Direct:
    """A sparse factorisation.

    Attributes
    ----------
    method : {"auto", "cholesky", "lu"}
        ``auto``: Cholesky for symmetric positive definite matrices, LU otherwise.
    package : {"auto", "cholmod", "umfpack", "mumps", "petsc"}
        ``auto``: MUMPS on several ranks and for large matrices that change, else CHOLMOD or
        UMFPACK, whose triangular sweeps are quicker; PETSc's own where they are missing.
    rtol : float
        Tolerance for the true residual relative to ``||b||``.
    options : dict
        More PETSc options, nested at will: ``{mat_mumps = {icntl_14 = 50}}``.
    prefix : str
        PETSc options prefix.
    """

    method: Literal["auto", "cholesky", "lu"] = "auto"
    package: Package = "auto"
    rtol: Annotated[float, Gt(0), Lt(1)] = 1e-8
    options: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""

    def suits(self, system: LinearSystem) -> bool:
        """Whether method and package can take this matrix on this many ranks."""
        if system.traits.matrix_free:
            return False
        if self.method == "cholesky" and not system.traits.spd:
            return False
        return system.A.comm.size == 1 or self.package in ("auto", "mumps")

    def init(self, system: LinearSystem) -> KSPState:
        """Return a fresh state. Collective.

        Raises
        ------
        ConfigError
            When the matrix has no entries.
        """
        if system.traits.matrix_free:
            raise ConfigError(
                "solver direct factors a matrix's entries, and this family is matrix-free; use "
                "solver auto or fast"
            )
        options = {"ksp_type": "preonly", **factor_options(system, self.package, self.method)}
        return KSPState(system, merged(options, self.options), prefix=self.prefix, is_direct=True)

    def solve(self, system: LinearSystem, state: KSPState) -> tuple[SolveResult, KSPState]:
        """Solve one system. Collective."""
        if state.is_constant:
            state.keep_factor(system)
        n_setups = state.n_setups
        result = state.solve(system, self.rtol, _MAX_APPLICATIONS)
        is_claim_at_fault = state.is_constant and state.n_setups == n_setups
        if is_claim_at_fault and not result.report.converged:
            state.is_constant = False
            state.forget_factor()
            result = state.solve(system, self.rtol, _MAX_APPLICATIONS)
        return result, state
