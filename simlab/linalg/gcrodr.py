r"""Recycled Krylov solver for sequences: flexible GCRO-DR(m, k) with a static and a carried space.

Every cycle looks for the solution in ``span(U) + span(Z)``, where ``A U = C`` has orthonormal
columns and ``Z = M V`` is preconditioned Arnoldi with ``C`` projected out:

    A [U Z_j] = [C V_{j+1}] [[I, B], [0, H]]        B = C^T A Z,  H upper Hessenberg

and ends by choosing the k directions of that space that the next cycle deflates (:mod:`.harmonic`).
``U`` is what a sequence hands on, in two parts: ``static``, computed once (:mod:`.seed`) and the
same for all systems, and ``carried``, renewed as the update rule says. It lives in solution space,
so a new matrix costs ``A U`` (one sparse x dense product) and no application of the preconditioner,
and a changed preconditioner spoils nothing. With k = 0 this is right-preconditioned FGMRES(m).

Method: Parks, de Sturler, Mackey, Johnson, Maiti 2006 (GCRO-DR), in the flexible form of Carvalho,
Gratton, Lago, Vasseur 2011, restricted to the complement of the static part. ``target =
"preconditioned"`` is the form found in solver packages, which carries the space of the
preconditioned unknown and pays k applications of the preconditioner per matrix.

Cost of an iteration: one preconditioner, one operator, ``4 n (k' + j)`` flops in two BLAS-2 calls,
two reductions. The new direction is first freed from the last two basis vectors, which hold nearly
all of it, then from the whole basis once; the growth of the loss of orthogonality is bounded on the
way and a second pass made only when it would exceed 1e-12. Cost of a cycle: about ``2 n m (m + 2
k)`` flops in BLAS-3 and a dense problem of size m. Cost of a new matrix: k products and ``6 n k^2``
flops. Memory: ``2 n (m + k)`` numbers.
"""

from __future__ import annotations

from dataclasses import field
from math import isfinite, sqrt
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Lt
from pydantic import NonNegativeInt, PositiveInt

from simlab.core.errors import ConfigError
from simlab.core.reports import Reason
from simlab.linalg.arnoldi import orthogonalise
from simlab.linalg.blocks import Block, orthonormalise, subtract, transform
from simlab.linalg.deflation import DeflationState
from simlab.linalg.harmonic import handed_on
from simlab.linalg.krylov import needs_entries
from simlab.linalg.ksp import Job
from simlab.linalg.least_squares import HessenbergLeastSquares
from simlab.linalg.seed import Seed, seed_space, static_vectors
from simlab.linalg.system import LinearSystem, SolveResult, solvers

__all__ = ["GCRODR", "GCRODRState"]

_BREAKDOWN = 1e-14
_PATIENCE = 3  # times the usual iterations that a control may take
_N_REPAIRS = 3  # restarts after drift, breakdown or values that are not finite
_EPS = float(np.finfo(float).eps)


@solvers.register("gcrodr")
class GCRODR:
    """Flexible GCRO-DR(m, k): GMRES that remembers, from cycle to cycle and system to system.

    Attributes
    ----------
    preconditioner : str
        PC type, as for ``krylov``.
    rtol : float
        Tolerance for the true residual relative to ``||b||``.
    max_iterations : int
    restart : int
        m, vectors per cycle, recycled ones included.
    static : int
        Vectors of the static space: the lowest eigenvectors of a reference operator.
    carried : int
        Vectors renewed from the solves themselves.
    update : {"every", "first", "never"}
        Renew the carried part after every cycle, after the first cycle of every system (fewer
        flops, more iterations), or after every cycle, but hand nothing on to the next system.
    interval : int
        Systems from one renewal to the next. Renewals cost about half of the time that a cheap
        preconditioner leaves; every eighth system is enough for most sequences.
    target : {"operator", "preconditioned"}
        Smallest harmonic Ritz values of A over the search space, or of A M (the form of the
        published experiments).
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

    preconditioner: str = "ilu"
    rtol: Annotated[float, Gt(0), Lt(1)] = 1e-8
    max_iterations: PositiveInt = 10_000
    restart: PositiveInt = 40
    static: NonNegativeInt = 0
    carried: NonNegativeInt = 20
    update: Literal["every", "first", "never"] = "every"
    interval: PositiveInt = 1
    target: Literal["operator", "preconditioned"] = "operator"
    gate: bool = True
    history: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.target == "preconditioned" and self.static:
            raise ConfigError(
                "a static space lives in solution space: target = 'preconditioned' takes static = 0"
            )
        if self.static + self.carried >= self.restart:
            raise ConfigError(
                f"static + carried = {self.static + self.carried} leaves no room in cycles of "
                f"restart = {self.restart}; raise restart or keep fewer vectors"
            )

    @property
    def wants_order(self) -> bool:
        """Whether neighbours in the sequence should resemble each other."""
        return self.carried > 0 and self.update != "never"

    def suits(self, system: LinearSystem) -> bool:
        """Whether preconditioner and static space can be built for such matrices."""
        takes_entries = self.static > 0 or needs_entries(self.preconditioner)
        if system.traits.matrix_free and takes_entries:
            return False
        return system.traits.spd or self.preconditioner not in ("icc", "cholesky")

    def seed(self, system: LinearSystem) -> Seed | None:
        """Return the static space for systems like this one, None without one. Collective."""
        return seed_space(system, self.static) if self.static else None

    def init(self, system: LinearSystem, seed: Seed | None = None) -> GCRODRState:
        """Return a fresh state. Collective.

        Parameters
        ----------
        system : LinearSystem
        seed : Seed, optional
            Its first ``static`` columns are used; computed from this system when left out.

        Raises
        ------
        ConfigError
            When the seed is too small or not of this layout.
        """
        return GCRODRState(system, self, static_vectors(self.static, system, seed))

    def solve(self, system: LinearSystem, state: GCRODRState) -> tuple[SolveResult, GCRODRState]:
        """Solve one system. Collective."""
        return state.solve(system, self.rtol, self.max_iterations), state


class GCRODRState(DeflationState):
    """Preconditioner, basis vectors, and what is handed on. Collective.

    Parameters
    ----------
    system : LinearSystem
        Any system of the sequence.
    settings : GCRODR
    static : ndarray, shape (local rows, k_s), optional
        The static space; none when left out.

    Attributes
    ----------
    static, carried : ndarray, shape (local rows, k_s) and (local rows, k_c)
        What the next system starts with.
    captured : float
        Share of the last right-hand side that the recycled space took care of, ``||C^T b||/||b||``.
    events : list of str
        What happened to the recycled space: dropped, or no longer carried, and why.
    """

    def __init__(
        self, system: LinearSystem, settings: GCRODR, static: np.ndarray | None = None
    ) -> None:
        # D = [U | Z], Q = [C | V]
        super().__init__(system, settings, static, settings.restart, settings.restart + 1)
        self._n_fixed = 0
        self._is_plain = self.ksp.getPC().getType() == "none"
        is_inner = settings.target == "preconditioned" and not self._is_plain
        self._Y = Block(system.b, self._k_max) if is_inner else None  # U = M Y, ends at k_max too
        self._usual = 0  # iterations of the last system that carried
        self._before: np.ndarray | None = None  # C at the last control that was watched
        self._norms: list[float] = []
        # a static space alone is never moved: U is its columns times this, where not None
        self._mix: np.ndarray | None = None
        self._image_version: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The solver in one line: ``gcrodr(40,0+20)+ilu``."""
        s = self._settings
        return f"gcrodr({s.restart},{s.static}+{s.carried})+{super().name}"

    @property
    def n_vectors(self) -> int:
        """Vectors of the system's length that are stored for cycles and for handing on."""
        blocks = [block.array for block in (self._Q, self._D, self._Y) if block is not None]
        return sum(part.shape[1] for part in (*blocks, self.static, self.carried))

    def destroy(self) -> None:
        """Free PETSc objects. Collective."""
        if self._Y is not None:
            self._Y.destroy()
        super().destroy()

    def forget(self) -> None:
        """Drop the carried part; the next cycle starts from the static space alone."""
        super().forget()
        self._k, self._mix, self._image_version = 0, None, None

    def deflated_pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ``U, C`` with ``A U = C`` for the last system: local rows."""
        U, C = super().deflated_pair()
        return U if self._mix is None else U @ self._mix, C

    def _mixed(self, c: np.ndarray) -> np.ndarray:
        """Return the coefficients of ``U c`` with respect to the columns that are stored."""
        return c if self._mix is None else self._mix @ c

    def _install(self, system: LinearSystem, job: Job) -> None:
        """Make ``A U = C``, ``C^T C = I`` for this system's matrix. Collective."""
        self._look_at(system)
        if self._image_version == system.version:
            return
        n_static, n_carried = self.static.shape[1], self.carried.shape[1]
        first = self._k_max - n_static - n_carried
        part = slice(first, self._k_max)
        U, inner = self._D.array[:, part], None
        if self._Y is not None:
            inner = self._Y.array[:, part]
            inner[...] = self.carried
            for j in range(first, self._k_max):
                self._apply_pc(self._Y.touch(j), self._D.vecs[j])
            job.pc_applies += n_carried
        elif self._mix is None:
            U[:, :n_static], U[:, n_static:] = self.static, self.carried
        self._make_images(system, job)
        T = orthonormalise(self._Q.array[:, part], self._reduce)
        self._k = T.shape[1]
        self._n_fixed = int(np.any(T[:n_static], axis=1).sum())
        target = slice(self._k_max - self._k, self._k_max)
        if self._settings.carried or T.shape[0] != T.shape[1]:
            transform(U, T, self._D.array[:, target])
            self._mix = None
        else:
            self._mix = T
        if inner is not None and self._Y is not None:
            transform(inner, T, self._Y.array[:, target])
        self._image_version = system.version
        self._drift = np.nan
        if self._before is not None and self._carries and self._k:
            cosines = self._reduce.gram(self.deflated_pair()[1], self._before)
            cosine = float(np.linalg.svd(cosines, compute_uv=False).min())
            self._drift, self._before = sqrt(max(1.0 - cosine**2, 0.0)), None

    def _deflate(self, r: np.ndarray) -> float:
        """Move the part of the residual in span(C) into the solution. Collective.

        Returns the length of that part.
        """
        if not self._k:
            return 0.0
        taken = 0.0
        U, C = super().deflated_pair()
        with self.x as x:
            for _ in range(2):
                c = self._reduce.sum(C.T @ r)
                subtract(x, U, -self._mixed(c))
                subtract(r, C, c)
                taken = max(taken, float(np.linalg.norm(c)))
        return taken

    def _iterate(self, job: Job) -> None:
        """Cycle until the true residual meets the tolerance."""
        system, settings, carried = job.system, self._settings, self.carried
        gate = self._admitting_gate()
        self._carries = settings.update != "never" and (gate is None or gate.admits())
        if not self._carries:
            if gate is not None and gate.watches and self._k:
                self._before = self.deflated_pair()[1].copy()
            self.forget()
        self._install(system, job)
        job.watch.lap("recycle")
        self.x.set(0.0)
        r = np.array(system.b.getArray(readonly=True))
        self.captured = self._deflate(r) / job.size
        self._norms = []
        self._has_renewed = False
        is_due = self._n_solved % settings.interval == 0 or not self.carried.shape[1]
        self._renews = settings.carried > 0 and (is_due or not self._carries)
        limit, ended = job.max_iterations, None
        is_control = gate is not None and gate.is_open and not self._carries
        if is_control:
            limit = min(limit, _PATIENCE * self._usual + settings.restart)
        for repair in range(1 + _N_REPAIRS):
            if repair:
                self._mend(system, r, ended, job)
            ended = self._cycles(system, r, job.rtol * job.size, limit, job)
            self._true_residual(system, r, job, job.size)
            job.watch.lap("solve")
            if job.relres <= job.rtol:
                ended = Reason.CONVERGED
                break
            if ended is Reason.ITERATION_LIMIT and limit == job.max_iterations:
                break
            if ended is Reason.ITERATION_LIMIT:  # too long for a control: finish with what is kept
                limit, self._carries, self.carried = job.max_iterations, True, carried
                self._image_version = None
                self._install(system, job)
        job.reason = ended or Reason.STAGNATED
        if ended is Reason.NON_FINITE or not isfinite(job.relres):
            self._fail(job, Reason.BREAKDOWN, "values that are not finite")
        if settings.history:
            job.history += [value / job.size for value in self._norms]
        if self._has_renewed and self._carries:
            U = self.deflated_pair()[0]
            if self._Y is not None:
                U = self._Y.array[:, self._k_max - self._k :]
            self.carried = np.array(U[:, self._n_fixed :], order="F")
            self._usual = job.iterations
        self._book(gate, not self._carries, carried, job)

    def _true_residual(self, system: LinearSystem, r: np.ndarray, job: Job, size: float) -> None:
        """Write ``b - A x`` to ``r``. Collective."""
        system.A.mult(self.x, self._r)
        self._r.aypx(-1.0, system.b)
        r[...] = self._r.getArray(readonly=True)
        job.operator_applies += 1
        job.relres = self._r.norm() / size

    def _mend(self, system: LinearSystem, r: np.ndarray, ended: Reason | None, job: Job) -> None:
        """Prepare another attempt after drift, a breakdown or values that are not finite."""
        if ended is Reason.NON_FINITE:
            self.forget()
            self.events.append(f"system {system.index}: not finite, recycled space dropped")
        elif ended is Reason.BREAKDOWN:  # leave the invariant subspace, by a little
            noise = np.random.default_rng(7193 + system.A.comm.rank).standard_normal(r.size)
            with self.x as x:
                x += 1e-3 * np.abs(x).max(initial=0.0) * noise
            self._true_residual(system, r, job, 1.0)
        self._deflate(r)

    def _cycles(
        self, system: LinearSystem, r: np.ndarray, goal: float, max_iterations: int, job: Job
    ) -> Reason | None:
        """Cycle until the recurrence's residual reaches the goal, and say why it ended otherwise.

        ``r`` is kept up to date. Collective.
        """
        norm = sqrt(self._reduce.sum(np.array([r @ r]))[0])
        while norm > goal:
            steps = min(self._settings.restart - self._k, max_iterations - job.iterations)
            if steps <= 0:
                return Reason.ITERATION_LIMIT
            norm, fault = self._cycle(system, r, norm, goal, steps, job)
            if fault:
                return fault
        return None if isfinite(norm) else Reason.NON_FINITE

    def _cycle(
        self,
        system: LinearSystem,
        r: np.ndarray,
        norm: float,
        goal: float,
        steps: int,
        job: Job,
    ) -> tuple[float, Reason | None]:
        """Run one cycle: update solution and residual ``r``, then the deflated pair. Collective."""
        V, first = self._k_max, self._k_max - self._k  # columns where V and [C V] begin
        Q, D = self._Q.array, self._D.array
        np.multiply(r, 1.0 / norm, out=Q[:, V])
        G = np.zeros((self._k + steps + 1, self._k + steps))
        G[: self._k, : self._k] = np.eye(self._k)
        H = G[self._k :, self._k :]
        small = HessenbergLeastSquares(norm, steps)
        loss, fault = _EPS, None
        while small.n < steps and small.residual > goal and fault is None:
            j = small.n
            self._apply_pc(self._Q.touch(V + j), self._D.vecs[V + j])
            system.A.mult(self._D.vecs[V + j], self._Q.vecs[V + j + 1])
            job.iterations += 1
            job.operator_applies += 1
            job.pc_applies += 1
            column, length, loss = orthogonalise(Q, first, V, V + j + 1, loss, self._reduce)
            if not isfinite(length):
                return norm, Reason.NON_FINITE
            G[: len(column), self._k + j] = column
            H[j + 1, j] = length
            is_new = length > _BREAKDOWN * float(np.linalg.norm(column))
            Q[:, V + j + 1] *= 1.0 / length if is_new else 0.0
            if not small.add(H[: j + 1, j], length):
                fault = Reason.BREAKDOWN  # the new direction adds nothing
                break
            if not is_new and small.residual > goal:
                fault = Reason.BREAKDOWN
            if self._settings.history:
                self._norms.append(small.residual)
        j = small.n
        if j:
            y = small.solution()
            with self.x as x:
                deflated = self._mixed(G[: self._k, self._k : self._k + j] @ y)
                part = np.concatenate([deflated, -y])
                subtract(x, D[:, first : V + j], part)
            r.fill(0.0)
            subtract(r, Q[:, V : V + j + 1], -small.residual_vector())
            norm = small.residual
            is_last = norm <= goal
            if self._renews and not (is_last and not self._carries):
                self._renew(G[: self._k + j + 1, : self._k + j], j)
                self._renews = self._settings.update != "first" or not self._carries
        return norm, fault

    def _renew(self, G: np.ndarray, j: int) -> None:
        """Choose the next deflated pair from this cycle's search space. Collective."""
        V, k, fixed = self._k_max, self._k, self._n_fixed
        first = V - k
        W, S = self._Q.array[:, first : V + j + 1], self._D.array[:, first : V + j]
        if self._is_plain or self._Y is not None:  # the block of Z, or of V, is the identity
            WS = np.zeros(G.shape)
            WS[k : k + j, k:] = np.eye(j)
            old = S[:, :k] if self._Y is None else self._Y.array[:, first:]
            if k:
                WS[:, :k] = self._reduce.gram(W, old)
        else:
            WS = self._reduce.gram(W, S)
        chosen = self._reduce.from_root(handed_on, G, WS, fixed, self._settings.carried)
        if chosen is None:
            return
        self._has_renewed = True
        Q, T = (part[:, fixed:] for part in chosen)
        self._k = fixed + T.shape[1]
        new = slice(V - T.shape[1], V)
        if self._Y is not None:
            S_inner = np.hstack([self._Y.array[:, first:], self._Q.array[:, V : V + j]])
            transform(S_inner, T, self._Y.array[:, new])
        old_static = slice(first, first + fixed)
        static = slice(V - self._k, V - T.shape[1])
        for basis, coefficients, array in ((W, Q, self._Q.array), (S, T, self._D.array)):
            kept = array[:, old_static].copy() if static != old_static else None
            transform(basis, coefficients, array[:, new])
            if kept is not None:
                array[:, static] = kept
