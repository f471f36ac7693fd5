r"""Conjugate gradients for sequences of symmetric positive definite systems: deflated, recycled.

With ``W = A U``, ``E = U^T A U``, a residual ``r`` orthogonal to U stays so when every direction is
conjugate to U:

    x += U E^-1 U^T r,  r -= W E^-1 U^T r                           once
    z = M r,  p = z + beta p - U E^-1 (W^T z)                       in every step

and the iteration behaves as if the modes in span(U) were not there (Saad, Yeung, Erhel,
Guyomarc'h 2000). U has a static part, computed once (:mod:`.seed`), and a carried part that every
system renews from its first ``l`` pairs ``(p_j, A p_j)``, which are kept where they are computed:
the k smallest harmonic Ritz vectors of ``M A`` over ``S = [U P]``,

    F y = theta G y,      G = S^T A S,      F = (A S)^T M (A S).

Nothing of that needs a product of long vectors: G is E and ``diag(p_j^T A p_j)``, and because
``A p_j = (r_j - r_{j+1}) / alpha_j`` the rest of F follows from the scalars of the iteration,

    P^T A M A P  tridiagonal in rho_j = r_j^T z_j and alpha_j,   W^T M A p_j = (c_j - c_{j+1}) /
    alpha_j with c_j = W^T z_j.

Departure: ``W^T M W`` would take k applications of the preconditioner. The theta that U's columns
were chosen by stand in for it, ``(E Theta + Theta E) / 2``, none below a tenth of the largest so
that no column stays for ever. Measured on sequences of unrelated coefficients this needs as many
iterations as the exact form, or fewer: theta becomes a mean over the sequence.

The method is sensitive to how exactly E is applied: errors come back as directions of almost no
energy, along which steps are huge. So U and W stay in double precision (in single, measured, a
carried space diverges), nearly dependent columns are dropped, and every so often ``U^T r`` is
looked at and projected out again.

Cost of an iteration over plain CG: ``4 n k`` flops in two BLAS-2 calls; three reductions in all,
no orthogonalisation. Cost of a system: k products ``A U``, ``2 n k^2`` flops for E and ``2 n k (k +
l)`` for the new U. Preconditioner applications: one per iteration. Memory: ``2 n (k + l)`` numbers.
"""

from __future__ import annotations

from dataclasses import field
from math import isfinite, sqrt
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Lt
from pydantic import NonNegativeInt, PositiveInt
from scipy.linalg import blas

from simlab.core.errors import ConfigError
from simlab.core.reports import Reason
from simlab.linalg.blocks import Block, subtract
from simlab.linalg.deflation import DeflationState
from simlab.linalg.krylov import needs_entries
from simlab.linalg.ksp import Job
from simlab.linalg.pencil import StepLog, inverse_over, lowest
from simlab.linalg.seed import Seed, seed_space, static_vectors
from simlab.linalg.system import LinearSystem, SolveResult, solvers

__all__ = ["DeflatedCG", "DeflatedCGState"]

_THETA_FLOOR = 0.1  # of the largest
_N_RESTARTS = 3
_CHECK_EVERY = 20  # iterations between two looks at U^T r
_DRIFT = 1e-3  # share of the residual in span(U), in the energy norm, that is projected out again
_DIVERGED = 1e5


@solvers.register("deflated_cg")
class DeflatedCG:
    """Conjugate gradients that remember directions from system to system.

    Attributes
    ----------
    preconditioner : str
        PC type, as for ``krylov``; must be symmetric positive definite.
    rtol : float
        Tolerance for the true residual relative to ``||b||``.
    max_iterations : int
    static : int
        Vectors of the static space: the lowest eigenvectors of a reference operator.
    carried : int
        Vectors renewed from the solves themselves. Worth raising with the number of small outlying
        eigenvalues of the preconditioned matrix.
    harvest : int
        Leading directions of a solve that the carried part is renewed from.
    gate : bool
        Solve a system without the carried part now and then, and stop carrying when that is as
        cheap (:mod:`.gate`).
    history : bool
        Keep residual norms in the report.
    options : dict
        More PETSc options for the preconditioner.
    prefix : str
        PETSc options prefix.
    """

    preconditioner: str = "icc"
    rtol: Annotated[float, Gt(0), Lt(1)] = 1e-8
    max_iterations: PositiveInt = 10_000
    static: NonNegativeInt = 0
    carried: NonNegativeInt = 20
    harvest: PositiveInt = 30
    gate: bool = True
    history: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""

    @property
    def wants_order(self) -> bool:
        """Whether neighbours in the sequence should resemble each other."""
        return self.carried > 0

    def suits(self, system: LinearSystem) -> bool:
        """Whether the matrix is SPD and has the entries that preconditioner and seed need."""
        takes_entries = self.static > 0 or needs_entries(self.preconditioner)
        return system.traits.spd and not (system.traits.matrix_free and takes_entries)

    def seed(self, system: LinearSystem) -> Seed | None:
        """Return the static space for systems like this one, None without one. Collective."""
        return seed_space(system, self.static) if self.static else None

    def init(self, system: LinearSystem, seed: Seed | None = None) -> DeflatedCGState:
        """Return a fresh state. Collective.

        Parameters
        ----------
        system : LinearSystem
        seed : Seed, optional
            Its first ``static`` columns are used; computed from this system when left out.

        Raises
        ------
        ConfigError
            When the preconditioner needs entries of a matrix that has none, or the seed is not of
            this layout or too small.
        """
        if system.traits.matrix_free and needs_entries(self.preconditioner):
            raise ConfigError(
                f"solver deflated_cg: preconditioner {self.preconditioner!r} needs the matrix's "
                'entries, and this family is matrix-free; set solver.preconditioner = "jacobi"'
            )
        return DeflatedCGState(system, self, static_vectors(self.static, system, seed))

    def solve(
        self, system: LinearSystem, state: DeflatedCGState
    ) -> tuple[SolveResult, DeflatedCGState]:
        """Solve one system. Collective."""
        return state.solve(system, self.rtol, self.max_iterations), state


class DeflatedCGState(DeflationState):
    """Preconditioner, directions, and what is handed on. Collective.

    Parameters
    ----------
    system : LinearSystem
        Any system of the sequence.
    settings : DeflatedCG
    static : ndarray, shape (local rows, k_s), optional
        The static space; none when left out.

    Attributes
    ----------
    static, carried : ndarray, shape (local rows, k_s) and (local rows, k_c)
        What the next system starts with.
    theta : ndarray, shape (k_c,)
        Harmonic Ritz values of ``M A`` that the carried columns were chosen by.
    captured : float
        ``||W E^-1 U^T b|| / ||b||`` of the last system: what the recycled space took care of.
    events : list of str
        Columns dropped, restarts, projections repeated, no longer carried: one line each.
    """

    def __init__(
        self, system: LinearSystem, settings: DeflatedCG, static: np.ndarray | None = None
    ) -> None:
        width = 1 + (settings.harvest if settings.carried else 0)
        super().__init__(system, settings, static, width, width)  # D = [U | P], Q = [A U | A P]
        self.theta = np.zeros(0)
        self._work = Block(system.b, 2)  # r and z = M r
        self._n_carried = 0
        self._E = self._E_inverse = np.zeros((0, 0))
        self._theta_in_use = self.theta
        self._installed: tuple[tuple[int, int], np.ndarray] | None = None

    @property
    def name(self) -> str:
        """The solver in one line: ``deflated_cg(0+20)+icc``."""
        s = self._settings
        return f"deflated_cg({s.static}+{s.carried})+{super().name}"

    def destroy(self) -> None:
        """Free PETSc objects. Collective."""
        self._work.destroy()
        super().destroy()

    def _install(self, system: LinearSystem, job: Job) -> None:
        """Make ``W = A U`` and ``E`` for this system's matrix. Collective."""
        self._look_at(system)
        if (
            self._installed is not None
            and self._installed[0] == system.version
            and self._installed[1] is self.carried
        ):
            return
        n_static, n_carried = self.static.shape[1], self.carried.shape[1]
        k = n_static + n_carried
        self._k, self._n_carried = k, n_carried
        U, W = self.deflated_pair()
        U[:, :n_static], U[:, n_static:] = self.static, self.carried
        self._make_images(system, job)
        with np.errstate(invalid="ignore", over="ignore"):  # spoilt columns are found below
            gram = self._reduce.gram(U, W)
        kept, self._E_inverse = self._reduce.from_root(inverse_over, gram)
        if len(kept) < k:
            self.events.append(
                f"system {system.index}: {k - len(kept)} of {k} recycled vectors dropped"
            )
            self._k = len(kept)
            for block in (self._D, self._Q):
                old = block.array[:, self._k_max - k : self._k_max]
                block.array[:, self._k_max - self._k : self._k_max] = old[:, kept]
        self._n_carried = int(np.sum(kept >= n_static))
        self._E = gram[np.ix_(kept, kept)]
        self._E = 0.5 * (self._E + self._E.T)
        largest = self.theta.max(initial=0.0) or 1.0
        known = self.theta if len(self.theta) == n_carried else np.full(n_carried, largest)
        known = np.maximum(known, _THETA_FLOOR * largest)
        self._theta_in_use = known[kept[kept >= n_static] - n_static]
        self._installed = system.version, self.carried

    def _deflate(self, r: np.ndarray, x: np.ndarray) -> None:
        """Make the residual orthogonal to U. Collective."""
        U, W = self.deflated_pair()
        for _ in range(2 if self._k else 0):
            d = self._E_inverse @ self._reduce.sum(U.T @ r)
            subtract(x, U, -d)
            subtract(r, W, d)

    def _iterate(self, job: Job) -> None:
        """Iterate until the true residual meets the tolerance."""
        system, s = job.system, self._settings
        carried = self.carried
        gate = self._admitting_gate()
        renews = s.carried > 0 and (gate is None or gate.admits())
        if not renews and self.carried.shape[1]:
            self.forget()
        self._install(system, job)
        job.watch.lap("recycle")
        self.x.set(0.0)
        r = self._work.array[:, 0]
        r[...] = system.b.getArray(readonly=True)
        self.captured = self._start(r) / job.size
        norms: list[float] = []
        log = StepLog(s.harvest if renews else 0, self._k)
        ended: Reason | None = None
        for restart in range(1 + _N_RESTARTS):
            if restart and not self._mend(system, ended):
                break
            taken = StepLog(0, self._k) if restart else log
            with self.x as x:
                if restart:
                    self._deflate(r, x)
                ended = self._recur(job, x, taken, norms)
            self._true_residual(system, r, job, job.size)
            job.watch.lap("solve")
            if job.relres <= job.rtol:
                ended = Reason.CONVERGED
                break
            if ended is Reason.ITERATION_LIMIT:
                break
        job.reason = Reason.STAGNATED if ended is None else ended
        if ended is Reason.NON_FINITE:
            job.reason = Reason.BREAKDOWN
        if not isfinite(job.relres):
            self._fail(job, Reason.BREAKDOWN, "values that are not finite")
        if s.history:
            job.history += [value / job.size for value in norms]
        if job.reason is Reason.CONVERGED and log.n_pairs and log.k == self._k:
            self._renew(log)
        job.watch.lap("recycle")
        self._book(gate, not renews, carried, job)

    def _start(self, r: np.ndarray) -> float:
        """Deflate the right-hand side; return the length of what that took out. Collective."""
        before = r.copy()
        with self.x as x:
            self._deflate(r, x)
        before -= r
        return sqrt(float(self._reduce.sum(np.array([before @ before]))[0]))

    def _true_residual(self, system: LinearSystem, r: np.ndarray, job: Job, size: float) -> None:
        """Write ``b - A x`` to ``r``; start from zero where x is lost. Collective."""
        if self._null_space is not None:
            self._null_space.remove(self.x)
        system.A.mult(self.x, self._r)
        self._r.aypx(-1.0, system.b)
        job.operator_applies += 1
        job.relres = self._r.norm() / size
        if not isfinite(job.relres):
            self.x.set(0.0)
        r[...] = (system.b if not isfinite(job.relres) else self._r).getArray(readonly=True)

    def _mend(self, system: LinearSystem, ended: Reason | None) -> bool:
        """Prepare another attempt, and say whether there is any point in one."""
        where = f"system {system.index}"
        if ended is None:
            self.events.append(f"{where}: restarted, the recurrence's residual had drifted")
            return True
        if not self._k:
            return False
        self.events.append(f"{where}: {ended.text}, recycled space dropped")
        self.forget()
        self._k, self._n_carried, self._installed = 0, 0, None
        return True

    def _recur(self, job: Job, x: np.ndarray, log: StepLog, norms: list[float]) -> Reason | None:
        """Iterate until the recurrence's residual meets the tolerance; None: it did. Collective.

        ``r`` in the work block and ``x`` are kept up to date.
        """
        system, total, goal = job.system, self._reduce.sum, job.rtol * job.size
        r, z = self._work.array[:, 0], self._work.array[:, 1]
        U, W = self.deflated_pair()
        k, keeps_history = self._k, self._settings.history
        last = self._D.array.shape[1] - 1  # its directions are not kept
        column = last - log.capacity
        products = np.empty(k + 1)
        rho = 0.0
        norm = start = sqrt(float(total(np.array([r @ r]))[0]))
        n_since_check = 0
        while not norm <= goal:
            if not isfinite(norm):
                return Reason.NON_FINITE
            if norm > _DIVERGED * start:
                return Reason.DIVERGED
            if job.iterations >= job.max_iterations:
                return Reason.ITERATION_LIMIT
            if n_since_check == _CHECK_EVERY and k:
                n_since_check = 0
                self._project_again(system, r, x, rho)
            self._apply_pc(self._work.touch(0), self._work.vecs[1])
            job.pc_applies += 1
            np.matmul(W.T, z, out=products[:k])
            products[k] = r @ z
            reduced = total(products)
            rho, old_rho = float(reduced[k]), rho
            log.take_products(reduced[:k], rho)
            if not rho > 0:
                return Reason.BREAKDOWN if isfinite(rho) else Reason.NON_FINITE
            p = self._D.array[:, column]
            if old_rho:
                if column < last:
                    column += 1
                    self._D.array[:, column] = z
                    _add(rho / old_rho, p, self._D.array[:, column])
                    p = self._D.array[:, column]
                else:
                    p *= rho / old_rho
                    p += z
            else:
                p[...] = z
            if k:
                subtract(p, U, self._E_inverse @ reduced[:k])
            system.A.mult(self._D.touch(column), self._Q.vecs[column])
            job.operator_applies += 1
            job.iterations += 1
            n_since_check += 1
            q = self._Q.array[:, column]
            energy = float(total(np.array([p @ q]))[0])
            if not energy > 0:
                return Reason.BREAKDOWN if isfinite(energy) else Reason.NON_FINITE
            alpha = rho / energy
            log.take_step(alpha, energy)
            _add(alpha, p, x)
            _add(-alpha, q, r)
            norm = sqrt(float(total(np.array([r @ r]))[0]))
            if keeps_history:
                norms.append(norm)
        return None

    def _project_again(
        self, system: LinearSystem, r: np.ndarray, x: np.ndarray, rho: float
    ) -> None:
        """Take out what rounding has brought back into span(U). Collective."""
        U = self.deflated_pair()[0]
        u = self._reduce.sum(U.T @ r)
        if float(u @ self._E_inverse @ u) > _DRIFT**2 * rho:
            self._deflate(r, x)
            self.events.append(f"system {system.index}: projected again after drift")

    def _renew(self, log: StepLog) -> None:
        """Choose the carried part from U's and the directions kept. Collective."""
        n, m = self._n_carried, log.n_pairs
        E = self._E[self._k - n :, self._k - n :]
        chosen = self._reduce.from_root(
            lowest, E, self._theta_in_use, *log.pencil(n), self._settings.carried
        )
        if chosen is None:
            return
        Y, self.theta = chosen
        S = self._D.array[:, self._k_max - n : self._k_max + m]
        self.carried = np.empty((len(S), Y.shape[1]), order="F")
        np.matmul(Y.T, S.T, out=self.carried.T)


def _add(a: float, x: np.ndarray, y: np.ndarray) -> None:
    """Do ``y += a x`` in one pass; BLAS refuses ranks without rows."""
    if x.size:
        blas.daxpy(x, y, a=a)
