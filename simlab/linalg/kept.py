"""A factor of one matrix as the preconditioner of later ones, renewed when that is cheaper.

Neighbours in a sequence resemble each other, so the factor of an earlier matrix (or its multigrid
hierarchy) preconditions CG or GMRES well, and saves most of the set-up. How long? With ``s``
seconds for the set-up and ``c_1, c_2...`` for the solves since, the mean cost of a system after
``a`` of them is ``(s + c_1 + ... + c_a) / a``. It falls while the next solve costs less than that;
a factor whose next solve is expected to cost clearly more than the best mean of its life, or than
the mean of the life before, is given up (the marginal value rule of foraging). One that needs more
than twice that within a single solve, after a jump of the matrix, is given up at once and the solve
done again with a new one. Where a new factor for every matrix is the cheapest, this is what the
rule comes to, with a trial now and then.

Times are CPU seconds of the root, so all ranks of a group decide the same. Cost: 1 or 2 iterations
on the factored matrix itself, and from 15 (smooth coefficients) to 40 (phases that jump) on
independent samples of a diffusion problem, on any mesh.
"""

from __future__ import annotations

import time
from dataclasses import field
from math import ceil, inf, sqrt
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Lt
from pydantic import PositiveInt

from simlab.core.errors import ConfigError
from simlab.core.reports import Reason
from simlab.linalg.blocks import Reducer
from simlab.linalg.direct import Package, factor_options
from simlab.linalg.krylov import preconditioner_options
from simlab.linalg.ksp import Job, KSPState
from simlab.linalg.options import merged
from simlab.linalg.system import LinearSystem, SolveResult, solvers

__all__ = ["Kept", "KeptState", "Lifetime"]

_CLEARLY = 1.05  # times the mean cost of a system
_N_RECENT = 5  # solves whose median predicts the next one
_N_ERRORS = 2.0  # by which that must exceed the mean, on top
_OPTIMISM = 0.98  # what the second solve of a life cost fades while lives are too short to tell
_AT_ONCE = 2.0  # times the mean cost, within one solve


@solvers.register("kept")
class Kept:
    """CG or GMRES with the factor of an earlier matrix of the sequence.

    Attributes
    ----------
    method : {"auto", "cg", "gmres"}
        ``auto``: CG for symmetric positive definite matrices, else GMRES.
    preconditioner : str
        ``"factor"``: Cholesky or LU as ``direct`` takes them; or a PC type whose set-up is worth
        saving, e.g. ``"hypre"``, ``"gamg"``.
    package : {"auto", "cholmod", "umfpack", "mumps", "petsc"}
        Of the factor, as for ``direct``.
    renew : bool
        Make a new factor when that is cheaper; else only when the old one fails.
    rtol : float
        Tolerance for the true residual relative to ``||b||``.
    max_iterations : int
    restart : int
        Length of a GMRES cycle.
    options : dict
        More PETSc options, nested at will.
    prefix : str
        PETSc options prefix.
    """

    method: Literal["auto", "cg", "gmres"] = "auto"
    preconditioner: str = "factor"
    package: Package = "auto"
    renew: bool = True
    rtol: Annotated[float, Gt(0), Lt(1)] = 1e-8
    max_iterations: PositiveInt = 1_000
    restart: PositiveInt = 40
    options: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""

    def suits(self, system: LinearSystem) -> bool:
        """Whether there are entries to factor, and the method is one for such matrices."""
        traits = system.traits
        if traits.matrix_free or (self.method == "cg" and not traits.spd):
            return False
        if self.preconditioner in ("icc", "cholesky") and not traits.spd:
            return False
        return system.A.comm.size == 1 or self.package in ("auto", "mumps")

    def init(self, system: LinearSystem) -> KeptState:
        """Return a fresh state. Collective.

        Raises
        ------
        ConfigError
            When the matrix has no entries.
        """
        if system.traits.matrix_free:
            raise ConfigError(
                "solver kept factors a matrix's entries, and this family is matrix-free; use "
                "solver auto or fast"
            )
        method: str = self.method
        if method == "auto":
            method = "cg" if system.traits.spd else "gmres"
        options = {"ksp_type": method}
        if method == "gmres":
            options["ksp_gmres_restart"] = str(self.restart)
        if self.preconditioner == "factor":
            options |= factor_options(system, self.package)
        else:
            options |= preconditioner_options(self.preconditioner, system)
        return KeptState(
            system,
            merged(options, self.options),
            prefix=self.prefix,
            restart=self.restart,
            lifetime=Lifetime(self.renew),
        )

    def solve(self, system: LinearSystem, state: KeptState) -> tuple[SolveResult, KeptState]:
        """Solve one system. Collective."""
        return state.solve(system, self.rtol, self.max_iterations), state


class Lifetime:
    """The rule: when to give up a factor, from what set-ups and solves have cost.

    Parameters
    ----------
    may_end : bool
        Without that, a life ends only when the factor fails.

    Attributes
    ----------
    age : int
        Solves with the present factor.
    """

    def __init__(self, may_end: bool = True) -> None:
        self.age = 0
        self._may_end = may_end
        self._spent = 0.0
        self._least = self._before = inf  # least mean of this life; mean of the last one
        self._second = 0.0  # expected cost of the first solve with a matrix not factored
        self._recent: list[float] = []
        self._variance = 0.0  # of solves, from the differences of neighbours: drift is no spread
        self._per_iteration = 0.0

    def begin(self, seconds: float) -> None:
        """Book a set-up."""
        if self.age:
            self._before = self._spent / self.age
            if self.age == 1:
                self._second *= _OPTIMISM
        self.age, self._spent, self._least, self._recent = 0, seconds, inf, []

    def book(self, seconds: float, iterations: int) -> None:
        """Book a solve."""
        self.age += 1
        self._spent += seconds
        self._least = min(self._least, self._spent / self.age)
        if self.age == 1:  # on the very matrix that was factored
            return
        if self.age == 2:
            self._second = seconds
        if self._recent:
            self._variance += 0.25 * (0.5 * (seconds - self._recent[-1]) ** 2 - self._variance)
        self._recent = [*self._recent[1 - _N_RECENT :], seconds]
        self._per_iteration = seconds / max(iterations, 1)

    def give_up(self, seconds: float) -> None:
        """Book a solve that was in vain."""
        self._spent += seconds
        if self.age == 1:
            self._second = seconds

    @property
    def is_over(self) -> bool:
        """Whether the next system should have a factor of its own."""
        if not self._may_end or self.age == 0:
            return False
        expected = float(np.median(self._recent)) if self._recent else self._second
        error = sqrt(self._variance / max(len(self._recent), 1))
        return expected - _N_ERRORS * error > _CLEARLY * min(self._least, self._before)

    @property
    def limit(self) -> float:
        """Iterations with a factor of another matrix after which a new one is cheaper."""
        if not self._may_end or not self._per_iteration:
            return inf
        return ceil(_AT_ONCE * min(self._least, self._before) / self._per_iteration)


class KeptState(KSPState):
    """The KSP, the factor in use, and the rule's memory. Collective.

    Parameters
    ----------
    lifetime : Lifetime
    **others
        As for :class:`KSPState`.
    """

    def __init__(self, *arguments: Any, lifetime: Lifetime, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._lifetime = lifetime
        self._reduce = Reducer(self.x.comm)

    @property
    def name(self) -> str:
        """The solver in one line: ``cg+kept cholesky(cholmod)``."""
        return super().name.replace("+", "+kept ", 1)

    def _set_up(self, system: LinearSystem, job: Job) -> None:
        """Make a factor when there is none or its life is over."""
        has_other = self._version is not None and self._version != system.version
        if has_other and not self._lifetime.is_over:
            self.ksp.getPC().setReusePreconditioner(True)
            self.ksp.setOperators(system.A)
            job.note = f"factor of an earlier matrix, in use for {self._lifetime.age} systems"
            return
        self._renew(system, job)

    def _renew(self, system: LinearSystem, job: Job) -> None:
        n_setups, start = self.n_setups, time.process_time()
        super()._set_up(system, job)
        if self.n_setups > n_setups:
            self._lifetime.begin(self._seconds_since(start))

    def _iterate(self, job: Job) -> None:
        """Solve; where the factor of another matrix fails or drags on, again with a new one."""
        start, is_own = time.process_time(), self._version == job.system.version
        asked = job.max_iterations
        job.max_iterations = asked if is_own else int(min(asked, self._lifetime.limit))
        super()._iterate(job)
        job.max_iterations = asked
        if not (is_own or job.reason is Reason.CONVERGED):
            said = f"gave up the factor of an earlier matrix after {job.iterations} iterations"
            self._lifetime.give_up(self._seconds_since(start))
            self.forget_factor()
            job.reason, job.note = Reason.STAGNATED, said
            self._renew(job.system, job)
            job.watch.lap("setup")
            if self._version != job.system.version:  # the set-up failed and says why
                return
            start = time.process_time()
            super()._iterate(job)
        self._lifetime.book(self._seconds_since(start), job.iterations)

    def _seconds_since(self, start: float) -> float:
        """Return the root's CPU seconds on every rank. Collective."""
        seconds = time.process_time() - start
        return float(self._reduce.from_root(lambda: seconds))
