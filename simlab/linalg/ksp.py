"""One PETSc KSP per state, checked by the true residual: what all PETSc-based solvers share.

The KSP, its vectors and its symbolic structure live as long as the state. A system whose matrix
has not changed (:attr:`LinearSystem.version`) keeps preconditioner or factor. After every solve
``r = b - A x`` is computed anew; when it misses the tolerance, ``A d = r`` is solved to what is
missing and ``x += d``, three times at most: iterative refinement for factors, a restart for Krylov
methods. KSP's own test uses the unpreconditioned residual norm where the method offers it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from simlab.core.errors import ConfigError
from simlab.core.reports import Reason, SolveReport
from simlab.linalg import petsc as PETSc
from simlab.linalg.options import inserted, user_gave
from simlab.linalg.system import LinearSystem, SolveResult

if TYPE_CHECKING:
    from petsc4py import PETSc as PETScTypes

__all__ = ["Job", "KSPState", "Stopwatch", "check_layout", "checked_values"]

_N_CORRECTIONS = 3
_RESIDUAL_NORM_METHODS = {  # KSP types whose own test can use ||b - A x||
    "bcgs",
    "cg",
    "cgs",
    "fbcgs",
    "fgmres",
    "gcr",
    "gmres",
    "lgmres",
    "pgmres",
    "pipecg",
    "richardson",
}
# operator and preconditioner applications per iteration
_APPLIES = {
    "bcgs": (2, 2),
    "cgs": (2, 2),
    "fbcgs": (2, 2),
    "preonly": (0, 1),
}
_ONE_MORE_PC = ("bcgs", "minres")  # before the first or after the last iteration
_RESTARTED = ("fgmres", "gmres", "lgmres", "pgmres")
_KSP_REASONS = {
    -3: Reason.ITERATION_LIMIT,
    -4: Reason.DIVERGED,
    -9: Reason.BREAKDOWN,  # NaN or Inf although matrix and right-hand side are finite
    -11: Reason.SETUP_FAILED,
}
_SPOILING = (Reason.BREAKDOWN, Reason.DIVERGED, Reason.SETUP_FAILED, Reason.SINGULAR)
_ZERO_PIVOT = (71, 81)  # PETSc's error codes of zero pivots in LU and Cholesky


class Stopwatch:
    """Wall seconds per phase of one solve."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def check_layout(system: LinearSystem, like: PETScTypes.Vec) -> None:
    """Raise ConfigError unless matrix and right-hand side are of a state's size and layout."""
    A, b = system.A, system.b
    parts = (A.getOwnershipRanges(), A.getOwnershipRangesColumn(), b.getOwnershipRanges())
    expected = like.getOwnershipRanges().tobytes()  # of all ranks, so that all raise or none
    if all(ranges.tobytes() == expected for ranges in parts):
        return
    rows, columns = A.getSize()
    raise ConfigError(
        f"system {system.index}: a matrix of {rows} x {columns} and a right-hand side of "
        f"{b.getSize()}, for a solver state made for {like.getSize()} unknowns; every size and "
        "layout takes a state of its own (solver.init)"
    )


def checked_values(A: PETScTypes.Mat, ones: PETScTypes.Vec, out: PETScTypes.Vec) -> bool:
    """Whether all entries of a matrix are finite, at the cost of one product. Collective.

    ``out`` becomes the row sums: NaN and Inf cannot hide in them.
    """
    ones.set(1.0)
    A.mult(ones, out)
    return isfinite(out.norm())


@dataclass
class Job:
    """One solve: what is asked for, and what has been done so far.

    Attributes
    ----------
    system : LinearSystem
    rtol : float
    max_iterations : int
    size : float
        ``||b||``.
    watch : Stopwatch
    history : list of float
        Residual norms relative to ``||b||``, where they are kept.
    relres : float
        True residual relative to ``||b||``.
    """

    system: LinearSystem
    rtol: float
    max_iterations: int
    size: float
    watch: Stopwatch
    history: list[float] = field(default_factory=list)
    iterations: int = 0
    operator_applies: int = 0
    pc_applies: int = 0
    relres: float = np.inf
    reason: Reason = Reason.STAGNATED
    note: str = ""


class KSPState:
    """KSP, solution and work vectors for systems of one layout. Collective.

    Parameters
    ----------
    system : LinearSystem
        Any system of the sequence.
    options : mapping of str to str or None
        Flat PETSc options without prefix.
    prefix : str
        Options prefix; empty for a campaign's main solver.
    is_direct : bool
        A factorisation: a failed set-up or a wild solution means a singular matrix.
    restart : int
        Restart length of GMRES methods, to count applications by.
    keep_history : bool
        Report KSP's residual norms.

    Attributes
    ----------
    ksp : PETSc.KSP
    x : PETSc.Vec
        The last solution.
    n_setups : int
        How often the preconditioner or factor was built.
    is_constant : bool
        The family claims a constant matrix and no residual has refuted it.
    """

    def __init__(
        self,
        system: LinearSystem,
        options: Mapping[str, str | None],
        *,
        prefix: str = "",
        is_direct: bool = False,
        restart: int = 30,
        keep_history: bool = False,
    ) -> None:
        self._options, self._prefix, self._is_direct = dict(options), prefix, is_direct
        self._restart, self._keep_history = restart, keep_history
        self.x = system.b.duplicate()
        self._r = system.b.duplicate()
        self._d = system.b.duplicate()
        self._version: tuple[int, int] | None = None
        self._is_spoilt = False
        self.n_setups = 0
        self.is_constant = system.traits.constant_matrix
        self.ksp = self._new_ksp(system)

    @property
    def name(self) -> str:
        """The solver in one line, as PETSc knows it: ``cg+icc``, ``lu(mumps)``."""
        pc = self.ksp.getPC()
        kind = pc.getType()
        if kind in ("cholesky", "lu"):
            with suppress(PETSc.Error):
                kind = f"{kind}({pc.getFactorSolverType() or 'petsc'})"
        elif kind == "bjacobi":
            sub = self._options.get("sub_pc_type")
            kind = f"bjacobi({sub})" if sub else kind
        method = self.ksp.getType()
        return kind if method == "preonly" else f"{method}+{kind}"

    def destroy(self) -> None:
        """Free PETSc objects. Collective."""
        for item in (self.ksp, self.x, self._r, self._d):
            item.destroy()

    def solve(self, system: LinearSystem, rtol: float, max_iterations: int) -> SolveResult:
        """Solve one system. Collective."""
        check_layout(system, self.x)
        watch = Stopwatch()
        size = system.b.norm()
        job = Job(system, rtol, max_iterations, size, watch)
        if size == 0.0:
            self.x.set(0.0)
            job.reason, job.relres, job.note = Reason.CONVERGED, 0.0, "zero right-hand side"
        elif not isfinite(size) or not self._matrix_is_finite(system):
            self._fail(job, Reason.NON_FINITE)
        else:
            self._set_up(system, job)
            watch.lap("setup")
            if job.reason is Reason.STAGNATED:
                self._iterate(job)
        watch.lap("check")
        self._is_spoilt = self._is_spoilt or job.reason in _SPOILING
        report = SolveReport(
            solver=self.name,
            reason=job.reason,
            iterations=job.iterations,
            operator_applies=job.operator_applies,
            pc_applies=job.pc_applies,
            true_relres=job.relres,
            rtol=rtol,
            history=tuple(job.history),
            seconds=watch.seconds,
            note=job.note,
        )
        return SolveResult(self.x, report)

    def keep_factor(self, system: LinearSystem) -> None:
        """Take a matrix for the one already factored, on the family's word that it is constant."""
        if self._version is not None:
            self._version = system.version

    def forget_factor(self) -> None:
        """Build the preconditioner or factor again in the next solve."""
        self._version = None

    def _new_ksp(self, system: LinearSystem) -> PETScTypes.KSP:
        ksp = PETSc.KSP().create(comm=system.A.comm)
        ksp.setOptionsPrefix(self._prefix)
        ksp.setOperators(system.A)
        with self._inserted():
            ksp.setFromOptions()
        norm_is_free = not user_gave("ksp_norm_type", prefix=self._prefix)
        if ksp.getType() in _RESIDUAL_NORM_METHODS and norm_is_free:
            ksp.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
        if self._keep_history:
            ksp.setConvergenceHistory(reset=True)
        return ksp

    def _inserted(self) -> Any:
        return inserted(self._options, self._prefix)

    def _matrix_is_finite(self, system: LinearSystem) -> bool:
        """Check new values; those of a known version have been checked."""
        return system.version == self._version or checked_values(system.A, self._d, self._r)

    def _fail(self, job: Job, reason: Reason, note: str = "") -> None:
        self.x.set(0.0)
        job.reason, job.relres, job.note = reason, np.nan, note

    def _set_up(self, system: LinearSystem, job: Job) -> None:
        is_kept = system.version == self._version
        self.ksp.getPC().setReusePreconditioner(is_kept)
        if is_kept:
            job.note = "factor kept" if self._is_direct else "preconditioner kept"
            return
        self._version = None
        if self._is_spoilt:  # what a preconditioner keeps of a matrix it failed on may be NaN
            self.ksp.destroy()
            self.ksp = self._new_ksp(system)
            self._is_spoilt = False
        self.ksp.setOperators(system.A)
        try:
            with self._inserted():
                self.ksp.setUp()
        except PETSc.Error as error:
            is_singular = self._is_direct or error.ierr in _ZERO_PIVOT
            reason = Reason.SINGULAR if is_singular else Reason.SETUP_FAILED
            self._fail(job, reason, f"PETSc error {error.ierr} in set-up")
            return
        self._version = system.version
        self.n_setups += 1

    def _iterate(self, job: Job) -> None:
        """Solve, check, and solve for the rest as long as that helps."""
        system, x, b = job.system, self.x, job.system.b
        best = np.inf
        for attempt in range(1 + _N_CORRECTIONS):
            left = job.max_iterations - job.iterations
            if left <= 0:
                job.reason = Reason.ITERATION_LIMIT
                return
            missing = job.rtol if attempt == 0 else max(1e-14, 0.5 * job.rtol / job.relres)
            self.ksp.setTolerances(rtol=min(missing, 0.5), atol=0.0, max_it=left)
            target = x if attempt == 0 else self._d
            ended = self._run(b if attempt == 0 else self._r, target, job)
            if self._keep_history and attempt == 0:
                job.history += [
                    float(value) / job.size for value in self.ksp.getConvergenceHistory()
                ]
            job.watch.lap("solve")
            if attempt:
                x.axpy(1.0, self._d)
            system.A.mult(x, self._r)
            self._r.aypx(-1.0, b)
            job.operator_applies += 1
            job.relres = self._r.norm() / job.size
            job.watch.lap("check")
            if job.relres <= job.rtol:
                job.reason = Reason.CONVERGED
                return
            if not isfinite(job.relres):
                self._fail(job, Reason.SINGULAR if self._is_direct else Reason.BREAKDOWN)
                return
            if ended < 0:
                job.reason = _KSP_REASONS.get(ended, Reason.BREAKDOWN)
                if self._is_direct:
                    job.reason = Reason.SINGULAR
                return
            if job.relres > 0.5 * best:  # the last correction did not help
                break
            best = job.relres
        job.reason = Reason.STAGNATED
        if self._is_direct and job.relres > 1e-2:
            job.reason = Reason.SINGULAR

    def _run(self, b: PETScTypes.Vec, x: PETScTypes.Vec, job: Job) -> int:
        """Run the KSP, count what it did, and return its reason code."""
        try:
            with self._inserted():
                self.ksp.solve(b, x)
        except PETSc.Error as error:
            x.set(0.0)
            job.note = f"PETSc error {error.ierr} in solve"
            self._version = None
            return -11
        its, method = self.ksp.getIterationNumber(), self.ksp.getType()
        per_operator, per_pc = _APPLIES.get(method, (1, 1))
        cycles = -(-its // self._restart) if method in _RESTARTED else 0
        job.iterations += 0 if method == "preonly" else its
        job.operator_applies += per_operator * its + max(cycles - 1, 0)
        job.pc_applies += per_pc * its + (0 if method == "fgmres" else cycles)
        job.pc_applies += method in _ONE_MORE_PC
        return int(self.ksp.getConvergedReason())
