"""Conjugate gradients preconditioned by fast transforms, for stencils on structured grids.

    A  ~  W (L + sigma) W,      W = sqrt(D),   D = (diag(A) - mass) / diag(L)

with the constant-coefficient Laplacian ``L`` of the same grid and boundary, inverted by sine,
cosine or Fourier transforms (:mod:`.transforms`). For a smooth coefficient ``D`` follows it, and
what is left, ``W^-1 A W^-1 - L``, is a bounded potential: iterations do not grow with the
grid (Concus and Golub, SIAM J. Numer. Anal. 10, 1973). For a coefficient with jumps it does, and
``W = 1`` is better: the condition number is then at most max(a)/min(a), also on any grid. The first
system is solved both ways and the better way kept; it is asked again when iterations jump.

``mass`` is the mean row sum of interior rows, ``sigma = mean(mass / D)``; a constant coefficient
makes the preconditioner exact. The preconditioner works in single precision inside double-precision
CG, whose beta in the Polak-Ribiere form forgives its rounding. Per iteration: one product with A,
two transforms of the grid, about nine passes over a vector. One rank only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Lt
from pydantic import PositiveInt
from scipy.linalg.blas import daxpy, ddot, dscal

from simlab.core.errors import ConfigError
from simlab.core.reports import Reason, SolveReport
from simlab.linalg import petsc as PETSc
from simlab.linalg.ksp import Stopwatch, check_layout
from simlab.linalg.system import LinearSystem, SolveResult, StructuredGrid, solvers
from simlab.linalg.transforms import LaplaceInverse, laplace_diagonal

if TYPE_CHECKING:
    from petsc4py import PETSc as PETScTypes

__all__ = ["Fast", "FastState"]

Scaling = Literal["diagonal", "constant"]

_N_RESTARTS = 3
_SURPRISE = 1.5  # times the usual count of iterations: compare the scalings again


@solvers.register("fast")
class Fast:
    """CG with a sine-, cosine- or Fourier-transform preconditioner.

    Attributes
    ----------
    rtol : float
        Tolerance for the true residual relative to ``||b||``.
    max_iterations : int
    scaling : {"auto", "diagonal", "constant"}
        ``W`` above: ``diagonal`` for smooth coefficients, ``constant`` for jumps; ``auto`` tries.
    precision : {"single", "double"}
        Of the preconditioner.
    """

    rtol: Annotated[float, Gt(0), Lt(1)] = 1e-8
    max_iterations: PositiveInt = 500
    scaling: Literal["auto", "diagonal", "constant"] = "auto"
    precision: Literal["single", "double"] = "single"

    def suits(self, system: LinearSystem) -> bool:
        """Whether this is a positive definite stencil on a grid, on one rank."""
        grid = system.traits.grid
        is_grid = grid is not None and max(grid.shape) > 1
        return system.traits.spd and is_grid and system.A.comm.size == 1

    def init(self, system: LinearSystem) -> FastState:
        """Return a fresh state.

        Raises
        ------
        ConfigError
            When the system is not a stencil on a structured grid of one rank.
        """
        grid, n = system.traits.grid, system.A.getSize()[0]
        if grid is None:
            raise ConfigError(
                "solver fast needs a structured grid, and this family has none; use solver auto"
            )
        if system.A.comm.size > 1:
            raise ConfigError(
                f"solver fast works on one rank, this group has {system.A.comm.size}; set "
                "campaign.ranks_per_group = 1 or use solver cg_amg"
            )
        if n == 1:
            raise ConfigError("solver fast: a grid of one cell has no neighbours; use solver auto")
        if n != np.prod(grid.shape):
            raise ConfigError(f"solver fast: a grid of {grid.shape} cells, but {n} unknowns")
        dtype = np.float32 if self.precision == "single" else np.float64
        return FastState(system, grid, dtype)

    def solve(self, system: LinearSystem, state: FastState) -> tuple[SolveResult, FastState]:
        """Solve one system."""
        return SolveResult(state.x, state.solve(system, self)), state


@dataclass
class _Run:
    """What one solve has done so far."""

    reason: Reason = Reason.ITERATION_LIMIT
    iterations: int = 0
    operator_applies: int = 0
    pc_applies: int = 0
    relres: float = np.nan


class FastState:
    """Transforms, scaling and work vectors for one grid.

    Attributes
    ----------
    x : PETSc.Vec
        The last solution.
    scaling : {"diagonal", "constant"} or None
        The way found better on the last system that was solved both ways.
    """

    def __init__(
        self, system: LinearSystem, grid: StructuredGrid, dtype: type[np.floating]
    ) -> None:
        self.scaling: Scaling | None = None
        self._grid, self._dtype = grid, dtype
        self._usual = np.inf  # iterations when the scalings were last compared
        self._version: tuple[int, int] | None = None
        n = system.A.getSize()[0]
        self._r, self._z = np.zeros(n), np.zeros(n)
        self._x, self.x = _shared(n, system)
        self._p, self._p_vec = _shared(n, system)
        self._q, self._q_vec = _shared(n, system)
        self._work = np.empty(grid.shape, dtype)
        weights = self._axis_weights(system.A)
        self._unit_diagonal = laplace_diagonal(grid.shape, grid.boundary, weights)
        self._inverse = LaplaceInverse(grid.shape, grid.boundary, weights, dtype)
        self._prepared: Scaling | None = None
        self._null_space: Any = None
        self._inverse_scale = np.empty(grid.shape, dtype)

    def destroy(self) -> None:
        """Free PETSc objects."""
        for item in (self.x, self._p_vec, self._q_vec):
            item.destroy()

    def solve(self, system: LinearSystem, solver: Fast) -> SolveReport:
        """Solve one system into ``x``."""
        check_layout(system, self.x)
        watch, run, note = Stopwatch(), _Run(), ""
        b = system.b.getArray(readonly=True)
        size = _norm(b)
        self._x.fill(0.0)
        if size == 0.0:
            run.reason, run.relres, note = Reason.CONVERGED, 0.0, "zero right-hand side"
        elif not isfinite(size):
            run.reason = Reason.NON_FINITE
        else:
            fault, note = self._look_at(system)
            watch.lap("setup")
            if fault is None:
                note = self._solve_scaled(system, solver, b, size, run, watch) or note
            else:
                run.reason = fault
        self.x.stateIncrease()
        return SolveReport(
            solver=f"cg+fast({self._prepared})" if self._prepared else "cg+fast",
            reason=run.reason,
            iterations=run.iterations,
            operator_applies=run.operator_applies,
            pc_applies=run.pc_applies,
            true_relres=run.relres,
            rtol=solver.rtol,
            seconds=watch.seconds,
            note=note,
        )

    def _axis_weights(self, A: PETScTypes.Mat) -> list[float]:
        """Return the mean coupling along each axis, relative to their mean.

        With ``s = +1, -1, +1...`` along an axis, ``s^T A s`` minus the sum of all entries is four
        times the sum of the couplings across which the sign changes.
        """
        self._p.fill(1.0)
        A.mult(self._p_vec, self._q_vec)
        total = self._q.sum()
        couplings = []
        for axis, n in enumerate(self._grid.shape):
            signs = np.where(np.arange(n) % 2, -1.0, 1.0)
            shape = [n if j == axis else 1 for j in range(len(self._grid.shape))]
            self._p.reshape(self._grid.shape)[...] = signs.reshape(shape)
            A.mult(self._p_vec, self._q_vec)
            is_closed = self._grid.boundary == "periodic" and n % 2 == 0
            n_changes = max(n if is_closed else n - 1, 1) * self._p.size / n
            couplings.append((ddot(self._p, self._q) - total) / (4.0 * n_changes))
        weights = np.array(couplings)
        good = np.all(np.isfinite(weights)) and np.all(weights > 0)
        return (weights / weights.mean()).tolist() if good else [1.0] * len(couplings)

    def _look_at(self, system: LinearSystem) -> tuple[Reason | None, str]:
        """Find ``D`` and ``mass`` of a new matrix; return what is wrong with it, and a note."""
        if system.version == self._version:
            return None, "preconditioner kept"
        self._version = self._prepared = self._null_space = None
        self._p.fill(1.0)
        system.A.mult(self._p_vec, self._q_vec)
        row_sums = self._q.reshape(self._grid.shape)
        if not isfinite(row_sums.sum()):
            return Reason.NON_FINITE, ""
        system.A.getDiagonal(self._p_vec)
        diagonal = self._p.reshape(self._grid.shape)
        inner = row_sums
        if self._grid.boundary == "dirichlet" and min(self._grid.shape) > 2:
            inner = row_sums[(slice(1, -1),) * row_sums.ndim]
        mean = float(diagonal.mean())
        mass = float(inner.mean())
        self._mass = mass if abs(mass) > 1e-10 * abs(mean) else 0.0
        self._scale = (diagonal - self._mass) / self._unit_diagonal
        if not mean > 0:
            return (Reason.SINGULAR if mean == 0 else Reason.BREAKDOWN), ""
        if self._grid.boundary != "dirichlet" and self._mass == 0.0:
            null_space = system.A.getNullSpace()
            if not null_space.handle:
                return Reason.SINGULAR, ""
            self._null_space = null_space
        self._version = system.version
        return None, ""

    def _prepare(self, scaling: Scaling) -> None:
        """Build the preconditioner for the current matrix."""
        if self._prepared == scaling:
            return
        D = self._scale
        if scaling == "diagonal" and D.min() > 0:
            np.divide(1.0, np.sqrt(D), out=self._inverse_scale, casting="same_kind")
            shift = self._mass * float(np.mean(1.0 / D)) if self._mass else 0.0
        else:
            scaling = "constant"
            mean = float(np.mean(np.abs(D)))
            self._inverse_scale.fill(1.0 / sqrt(mean))
            shift = self._mass / mean
        self._inverse.set_shift(max(shift, 0.0))
        self._prepared = scaling

    def _solve_scaled(
        self,
        system: LinearSystem,
        solver: Fast,
        b: np.ndarray,
        size: float,
        run: _Run,
        watch: Stopwatch,
    ) -> str:
        """Solve with the scaling in use, or with both when they are to be compared."""
        first: Scaling = solver.scaling if solver.scaling != "auto" else self.scaling or "diagonal"
        jump = 0.0
        is_trial = solver.scaling == "auto" and self.scaling is None
        if is_trial:
            jump = self._largest_jump()
            first = "constant" if jump > 2.0 or jump == 1.0 else "diagonal"
        self._prepare(first)
        watch.lap("setup")
        limit = solver.max_iterations
        self._refine(system, b, size, solver.rtol, limit, run, watch)
        if not is_trial:
            if run.iterations > _SURPRISE * self._usual + 2:
                self.scaling = None  # compare again on the next system
            return ""
        self.scaling, self._usual = first, run.iterations
        if jump == 1.0:
            return ""
        second: Scaling = "diagonal" if first == "constant" else "constant"
        kept, its = self._x.copy(), run.iterations
        self._prepare(second)
        watch.lap("setup")
        other = _Run()
        limit = its - 1 if run.reason.is_success else limit
        self._x.fill(0.0)
        self._refine(system, b, size, solver.rtol, limit, other, watch)
        if other.reason.is_success:
            self.scaling, self._usual = second, other.iterations
            run.reason, run.relres = other.reason, other.relres
        else:
            self._x[:] = kept
            self._prepare(first)
        run.iterations += other.iterations
        run.operator_applies += other.operator_applies
        run.pc_applies += other.pc_applies
        return f"scalings compared: {self.scaling} is better ({self._usual} iterations)"

    def _largest_jump(self) -> float:
        """Return the largest ratio of ``D`` in neighbouring cells, 1 when it is constant."""
        D = np.abs(self._scale)
        if D.max() <= (1.0 + 1e-9) * D.min():
            return 1.0
        logs = np.log(np.maximum(D, 1e-300))
        jumps = [np.abs(np.diff(logs, axis=axis)).max(initial=0.0) for axis in range(D.ndim)]
        return max(float(np.exp(min(max(jumps), 700.0))), 1.0 + 1e-9)

    def _refine(
        self,
        system: LinearSystem,
        b: np.ndarray,
        size: float,
        rtol: float,
        limit: int,
        run: _Run,
        watch: Stopwatch,
    ) -> None:
        """Run CG from x = 0, check the true residual, and go on from x while that helps."""
        self._r[:] = b
        best = np.inf
        for _ in range(1 + _N_RESTARTS):
            reason = self._conjugate_gradients(system.A, rtol * size, limit - run.iterations, run)
            watch.lap("solve")
            self.x.stateIncrease()
            if self._null_space is not None:
                self._null_space.remove(self.x)
            system.A.mult(self.x, self._q_vec)
            np.subtract(b, self._q, out=self._r)
            run.operator_applies += 1
            run.relres = _norm(self._r) / size
            watch.lap("check")
            if run.relres <= rtol:
                run.reason = Reason.CONVERGED
                return
            if reason is not Reason.CONVERGED:
                run.reason = reason
                return
            run.reason = Reason.STAGNATED
            if not run.relres < 0.5 * best:
                return
            best = run.relres

    def _conjugate_gradients(
        self, A: PETScTypes.Mat, target: float, limit: int, run: _Run
    ) -> Reason:
        """Iterate until the recurred residual norm is below ``target``; ``r`` belongs to ``x``."""
        x, p, q, r, z = self._x, self._p, self._q, self._r, self._z
        self._precondition(run)
        p[:] = z
        rz = ddot(r, z)
        for _ in range(limit):
            A.mult(self._p_vec, self._q_vec)
            run.iterations += 1
            run.operator_applies += 1
            curvature = ddot(p, q)
            if not (curvature > 0 and rz > 0 and isfinite(curvature)):
                return Reason.BREAKDOWN
            alpha = rz / curvature
            daxpy(p, x, a=alpha)
            daxpy(q, r, a=-alpha)
            if _norm(r) <= target:
                return Reason.CONVERGED
            self._precondition(run)
            beta = -alpha * ddot(z, q) / rz
            rz = ddot(r, z)
            dscal(beta, p)
            daxpy(z, p)
        return Reason.ITERATION_LIMIT

    def _precondition(self, run: _Run) -> None:
        """Compute ``z = W^-1 (L + sigma)^-1 W^-1 r``; ``r`` is scaled into single precision."""
        shape, scale = self._grid.shape, self._inverse_scale
        size = _norm(self._r) or 1.0
        np.multiply(self._r.reshape(shape), 1.0 / size, out=self._work, casting="same_kind")
        self._work *= scale
        solved = self._inverse.apply(self._work)
        solved *= scale
        np.multiply(solved, size, out=self._z.reshape(shape))
        run.pc_applies += 1


def _norm(values: np.ndarray) -> float:
    return sqrt(ddot(values, values))


def _shared(n: int, system: LinearSystem) -> tuple[np.ndarray, PETScTypes.Vec]:
    """Return an array and the PETSc vector that shares its memory."""
    values = np.zeros(n)
    return values, PETSc.Vec().createWithArray(values, comm=system.A.comm)
