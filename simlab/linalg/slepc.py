"""The modes of smallest modulus by SLEPc, where slepc4py is installed: shift-invert Krylov-Schur.

The factor is the one that :mod:`.direct` would choose, the start the hash of :mod:`.krylov_schur`,
and convergence is judged by the residual of A itself. One start does not show all members of a
multiple eigenvalue: for symmetric A further modes are sought beside the known ones, until the next
is no smaller than the largest wanted. Options prefixes ``seed_`` and ``seed_st_``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from simlab.core.errors import ConfigError, ConvergenceError
from simlab.linalg import petsc as PETSc
from simlab.linalg.blocks import Reducer, orthonormalise
from simlab.linalg.direct import factor_options
from simlab.linalg.krylov_schur import SINGULAR, null_space_shift, start_vector
from simlab.linalg.options import inserted
from simlab.linalg.system import LinearSystem

if TYPE_CHECKING:
    from petsc4py import PETSc as PETScTypes

__all__ = ["is_installed", "modes"]

_SHARPER = 0.1  # a basis of eigenvectors that are not orthogonal loses some accuracy


def is_installed() -> bool:
    """Whether slepc4py can be imported."""
    return find_spec("slepc4py") is not None


def modes(system: LinearSystem, k: int, tol: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a basis and the moduli of the eigenvalues. Collective.

    Raises
    ------
    ConfigError
        When the matrix is singular.
    ConvergenceError
        When fewer than k modes are found.
    """
    PETSc.Sys.getVersion()  # initialises PETSc with the user's words first
    SLEPc = import_module("slepc4py.SLEPc")
    kind = SLEPc.EPS.ProblemType
    solver = SLEPc.EPS().create(comm=system.A.comm)
    known = _kernel(system)
    n_kernel = len(known)
    try:
        solver.setOptionsPrefix("seed_")
        solver.setOperators(system.A)
        solver.setProblemType(kind.HEP if system.traits.symmetric else kind.NHEP)
        solver.setWhichEigenpairs(SLEPc.EPS.Which.TARGET_MAGNITUDE)
        solver.setTarget(-null_space_shift(system))
        solver.getST().setType(SLEPc.ST.Type.SINVERT)
        solver.setTolerances(tol=_SHARPER * tol)
        solver.setTrueResidual(True)
        with inserted({"ksp_type": "preonly", **factor_options(system)}, "seed_st_"):
            solver.setFromOptions()
            values = _extended(solver, system, k, known)
            while system.traits.symmetric and len(known) < system.A.getSize()[0]:
                largest = np.sort(values)[k - 1]
                values = np.append(values, _extended(solver, system, 1, known))
                if values[-1] >= (1 - tol) * largest:
                    break
        order = np.argsort(values, kind="stable")[: k if system.traits.symmetric else None]
        columns = [known[n_kernel + j].getArray() for j in order]
        basis = np.asfortranarray(np.column_stack(columns))
        T = orthonormalise(basis, Reducer(system.A.comm))
        return basis[:, len(order) - T.shape[1] :], values[order]
    finally:
        for item in (solver, *known):
            item.destroy()


def _kernel(system: LinearSystem) -> list[PETScTypes.Vec]:
    """Return vectors that span the null space attached to the matrix."""
    space = system.A.getNullSpace()
    if not space.handle:
        return []
    vectors = [vector.copy() for vector in space.getVecs()]
    if space.hasConstant():
        vectors.append(system.b.duplicate())
        vectors[-1].set(1.0)
    return vectors


def _extended(solver: Any, system: LinearSystem, k: int, known: list[PETScTypes.Vec]) -> np.ndarray:
    """Append k real vectors to those known and return their moduli; a pair is never parted."""
    start = start_vector(system, len(known))
    solver.setDimensions(k)
    solver.setInitialSpace([start])
    solver.setDeflationSpace(known)
    try:
        solver.solve()
    except PETSc.Error:
        raise ConfigError(SINGULAR) from None
    finally:
        start.destroy()
    if solver.getConverged() < k:
        raise ConvergenceError(
            f"static space: SLEPc found {solver.getConverged()} of the {k} modes asked for"
        )
    moduli: list[float] = []
    while len(moduli) < k:
        real, imaginary = system.b.duplicate(), system.b.duplicate()
        value = complex(solver.getEigenpair(len(moduli), real, imaginary))
        known.append(real)
        moduli.append(abs(value))
        if value.imag:
            known.append(imaginary)
            moduli.append(abs(value))
        else:
            imaginary.destroy()
    return np.array(moduli)
