"""The linear system and the solver protocol, where problem families and solvers meet.

    state = solver.init(first)
    for system in systems:
        result, state = solver.solve(system, state)

A solver is a value, and what it learned is another value. Symbols: A x = b; relative residuals are
``||b - A x|| / ||b||`` with the unpreconditioned 2-norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from simlab.core.config import Registry
from simlab.core.reports import SolveReport
from simlab.core.samples import Sample

if TYPE_CHECKING:
    from petsc4py import PETSc

__all__ = [
    "Affine",
    "LinearSolver",
    "LinearSystem",
    "SolveResult",
    "SolverState",
    "StructuredGrid",
    "Traits",
    "solvers",
]


_NUMBER = "simlab number"
_numbers = count(1)


@dataclass(frozen=True)
class StructuredGrid:
    """The grid a matrix lives on: one unknown per cell, last axis fastest.

    Attributes
    ----------
    shape : tuple of int
        Cells along each axis, first axis slowest.
    boundary : {"dirichlet", "neumann", "periodic"}
        Condition on the faces of the box (cell-centred finite volumes: half a cell away from the
        first unknown).
    """

    shape: tuple[int, ...]
    boundary: Literal["dirichlet", "neumann", "periodic"] = "dirichlet"


@dataclass(frozen=True)
class Traits:
    """Claims about a matrix, which tests check.

    Attributes
    ----------
    spd, symmetric : bool
    constant_matrix : bool
        Every system of the family has the same matrix; only right-hand sides differ.
    grid : StructuredGrid, optional
        Set when A is a 5- or 7-point stencil on a uniform grid, ordered naturally within one rank.
    matrix_free : bool
        A is a shell: it multiplies and knows its diagonal, and has no entries to factor.
    """

    spd: bool = False
    symmetric: bool = False
    constant_matrix: bool = False
    grid: StructuredGrid | None = None
    matrix_free: bool = False


@dataclass(frozen=True, eq=False)
class Affine:
    """How a matrix depends on its sample: ``A = sum_q theta[q] terms[q]``.

    The terms are the same objects, with the same values, for every system of a family's workspace:
    what a solver derives from them (``terms[q] U``) holds for all of them.

    Attributes
    ----------
    theta : ndarray, shape (Q,), float64
        Of this system; the same on every rank.
    terms : tuple of PETSc.Mat
        Q matrices of A's layout. They belong to the workspace.
    """

    theta: np.ndarray
    terms: tuple[PETSc.Mat, ...]


@dataclass(frozen=True, eq=False)
class LinearSystem:
    """One system ``A x = b``. The next one may reuse ``A`` and ``b``: copy what must outlive it.

    Attributes
    ----------
    A, b : PETSc.Mat, PETSc.Vec
    traits : Traits
        Claims about A.
    mu : Sample, optional
    index : int
        Number of the sample.
    affine : Affine, optional
        The parts of A, where the family knows them.
    """

    A: PETSc.Mat
    b: PETSc.Vec
    traits: Traits = Traits()
    mu: Sample | None = None
    index: int = 0
    affine: Affine | None = None

    @property
    def version(self) -> tuple[int, int]:
        """Number and value counter of the matrix: equal versions, not an entry changed.

        The number is given here and stays with the matrix: a new one may get the memory of one
        that was destroyed, and on some ranks only.
        """
        number = self.A.getAttr(_NUMBER)
        if number is None:
            number = next(_numbers)
            self.A.setAttr(_NUMBER, number)
        return number, self.A.stateGet()

    def residual(self, x: PETSc.Vec) -> float:
        """Return ``||b - A x|| / ||b||`` (``||A x||`` when b = 0). Collective."""
        r = self.b.duplicate()
        self.A.mult(x, r)
        r.aypx(-1.0, self.b)
        reference, size = self.b.norm(), r.norm()
        r.destroy()
        return size / reference if reference else size

    def features(self) -> np.ndarray:
        """Return the sample's parameters and input fields as one vector, for orderings, tuners."""
        if self.mu is None:
            return np.zeros(0)
        parts = [np.asarray(list(self.mu.parameters.values()), dtype=float)]
        return np.concatenate([*parts, *(np.ravel(values) for values in self.mu.fields.values())])


@dataclass(frozen=True, eq=False)
class SolveResult:
    """A solution and its report. ``x`` belongs to the state; the next solve overwrites it."""

    x: PETSc.Vec
    report: SolveReport


class SolverState(Protocol):
    """What a solver carries from system to system."""

    def destroy(self) -> None:
        """Free PETSc objects. Collective."""
        ...


class LinearSolver(Protocol):
    """A linear solver, described by frozen settings."""

    kind: ClassVar[str]
    rtol: float

    def suits(self, system: LinearSystem) -> bool:
        """Whether systems with these traits, on this many ranks, are within the solver's claims."""
        ...

    def init(self, system: LinearSystem) -> Any:
        """Return a fresh state for systems that look like this one. Collective."""
        ...

    def solve(self, system: LinearSystem, state: Any) -> tuple[SolveResult, Any]:
        """Solve, check the true residual, and return the result with the next state. Collective.

        Never raises for slow convergence: ``result.report.reason`` says what happened.
        """
        ...


solvers: Registry[LinearSolver] = Registry("solver", "simlab.linalg", "simlab.solvers")
