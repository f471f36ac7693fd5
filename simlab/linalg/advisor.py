"""``kind = "auto"``: traits name the candidates, a pilot on the first systems decides.

    1. traits, size and ranks -> a list of solvers that may win (:func:`candidates`)
    2. every candidate solves each of the first three systems; the quickest right answer is returned
    3. the candidate with the least CPU time after its first system (set-up, ordering and trials of
       its own are paid once) solves the rest; the others are freed
    4. where the winner fails later, the next best solves that system, and takes over when the
       winner keeps failing

A candidate far behind in its first solve drops out at once. There is no pilot where there is
nothing to find out: one candidate, a tiny system, or a constant matrix off the grid (factored
once). Times are the root's, broadcast, so that all ranks of a group decide the same. The reason and
the table of the pilot go to the log and, through the state, to the manifest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt

from simlab.core.config import as_table
from simlab.core.errors import ConfigError
from simlab.core.reports import Reason
from simlab.linalg import petsc as PETSc
from simlab.linalg.options import user_gave
from simlab.linalg.system import LinearSolver, LinearSystem, SolveResult, solvers

__all__ = ["Auto", "AutoState", "adopt", "begun", "candidates", "chosen"]

log = logging.getLogger("simlab.linalg.advisor")

_TINY = 400  # unknowns; below, every solver takes well under a millisecond
_FACTOR_2D, _FACTOR_3D = 60_000, 12_000  # unknowns up to which one factor per system may win
_FACTOR_ONCE_2D, _FACTOR_ONCE_3D = 500_000, 50_000  # the same for one factor per campaign
_ICC_2D = 40_000  # unknowns up to which CG+ICC may beat multigrid in two dimensions
_FAR_BEHIND_FIRST, _FAR_BEHIND = 6.0, 2.5  # times the quickest, in the first and later rounds
_TOO_MANY_FAILURES = 3


@solvers.register("auto")
class Auto:
    """The quickest solver for this family on this machine, found by trying.

    Attributes
    ----------
    rtol : float
        Tolerance for the true residual relative to ``||b||``; given on to the candidates.
    pilot : int
        Systems the candidates compete on.
    candidates : tuple of LinearSolver
        Instead of the built-in choice, e.g. ``["cg_amg", {kind = "direct", package = "mumps"}]``.
    """

    rtol: Annotated[float, Gt(0), Lt(1)] = 1e-8
    pilot: Annotated[int, Ge(2)] = 3
    candidates: tuple[Annotated[Any, solvers.field], ...] = ()

    def suits(self, system: LinearSystem) -> bool:
        """Whether any candidate does: always, when they are ours to choose."""
        return not self.candidates or any(item.suits(system) for item in self.candidates)

    def init(self, system: LinearSystem) -> AutoState:
        """Return a state that is about to choose. Collective.

        Raises
        ------
        ConfigError
            When none of the user's candidates can take such a system.
        """
        if self.candidates:
            wanted: list[LinearSolver] = [
                replace(item, rtol=self.rtol) for item in self.candidates if item.suits(system)
            ]
            if not wanted:
                names = ", ".join(item.kind for item in self.candidates)
                raise ConfigError(
                    f"solver auto: none of the candidates {names} can take this system"
                )
            return AutoState(wanted, "named in the case")
        return AutoState(*candidates(system, self.rtol))

    def solve(self, system: LinearSystem, state: AutoState) -> tuple[SolveResult, AutoState]:
        """Solve one system. Collective."""
        return state.solve(system, self.pilot), state


def candidates(system: LinearSystem, rtol: float) -> tuple[list[LinearSolver], str]:
    """Return the solvers that may be quickest for such systems, likely ones first, and why.

    A single one means that there is nothing to find out by a pilot.
    """
    given = user_gave("ksp_type", "pc_type")
    if given:
        method = "cg" if system.traits.spd else "gmres"
        words = " and ".join(f"-{name}" for name in given)
        pc = "jacobi" if system.traits.matrix_free else _multigrid()
        krylov = _make("krylov", rtol, method=method, preconditioner=pc)
        return [krylov], f"{words} on the command line"
    traits, n = system.traits, system.A.getSize()[0]
    grid = traits.grid
    sort = "SPD" if traits.spd else "symmetric" if traits.symmetric else "nonsymmetric"
    where = f"{'x'.join(map(str, grid.shape))} grid" if grid else "no grid"
    about = f"{sort}, n = {n}, {where}" + (", constant matrix" if traits.constant_matrix else "")
    is_3d = grid is not None and len(grid.shape) == 3
    limits = (
        (_FACTOR_ONCE_2D, _FACTOR_ONCE_3D) if traits.constant_matrix else (_FACTOR_2D, _FACTOR_3D)
    )
    may_factor = n <= limits[is_3d]
    fast, direct = _make("fast", rtol), _make("direct", rtol)
    if traits.matrix_free:
        methods = ("cg",) if traits.spd else ("gmres", "bcgs")
        free = [fast] if fast.suits(system) else []
        free += [_make("krylov", rtol, method=m, preconditioner="jacobi") for m in methods]
        return free, f"{about}, matrix-free"
    if n <= _TINY:
        return [direct], f"{about}: tiny"
    if traits.constant_matrix and may_factor:
        if not fast.suits(system):
            return [direct], f"{about}: factor once"
        return [direct, fast], about
    found: list[LinearSolver] = [fast] if fast.suits(system) else []
    if traits.spd:
        found.append(_make("cg_amg", rtol) if _has("hypre") else _make("cg_gamg", rtol))
        if n > 2_000 and _has("hypre"):
            found.append(_make("cg_gamg", rtol))
        if is_3d or grid is None or n <= _ICC_2D:
            found.append(_make("cg_icc", rtol))
    else:
        found.append(_make("gmres_ilu", rtol))
        found.append(_make("krylov", rtol, method="bcgs", preconditioner="ilu"))
        found.append(_make("krylov", rtol, method="gmres", preconditioner=_multigrid()))
    if may_factor:
        found.append(direct)
    return found, about


def begun(solver: LinearSolver, system: LinearSystem, seed: Any = None) -> Any:
    """Return a solver's fresh state, with a static space when there is one. Collective."""
    if seed is None or not callable(getattr(solver, "seed", None)):
        return solver.init(system)
    return solver.init(system, seed=seed)  # type: ignore[call-arg]


def chosen(state: AutoState) -> LinearSolver | None:
    """Return the winner's settings, or None while the pilot runs; for sharing between groups."""
    return state.choice


def adopt(
    choice: LinearSolver, reason: str, others: Sequence[LinearSolver] = (), seed: Any = None
) -> AutoState:
    """Return a state in which another group's decision holds.

    Parameters
    ----------
    choice : LinearSolver
    reason : str
        That group's.
    others : sequence of LinearSolver
        Who steps in where the choice fails, the next best first: :attr:`AutoState.others`.
    seed : optional
        The static space that the choice begins with.
    """
    state = AutoState([choice, *others], reason)
    state.begin_with(seed)
    state.decide(f"adopted {_title(choice)}: {reason}")
    return state


@dataclass(eq=False)
class _Candidate:
    """One contestant of the pilot: settings, state, and what each round gave."""

    solver: LinearSolver
    state: Any = None
    seed: Any = None
    cpu: list[float] = field(default_factory=list)
    result: SolveResult | None = None
    failed: bool = False
    verdict: str = ""  # why it left the pilot

    @property
    def is_alive(self) -> bool:
        return not self.verdict

    @property
    def cost(self) -> float:
        """CPU seconds of a system after the first; of the first when there is no other."""
        return min(self.cpu[1:] or self.cpu or [float("inf")])

    @property
    def rank(self) -> tuple[bool, bool, int, float]:
        """Smallest is best: in the race to the end, right, measured often, cheap."""
        return self.failed, not self.is_alive, -len(self.cpu), self.cost

    def solve(self, system: LinearSystem) -> SolveResult:
        if self.state is None:
            self.state = begun(self.solver, system, self.seed)
        self.result, self.state = self.solver.solve(system, self.state)
        return self.result

    def destroy(self) -> None:
        if self.state is not None:
            self.state.destroy()
            self.state = None


class AutoState:
    """The pilot while it runs, then the winner's state and the ranking behind it.

    Attributes
    ----------
    choice : LinearSolver or None
        The winner's settings; None while the pilot runs.
    reason : str
        Why, in one line.
    table : list of dict
        One row per candidate: solver, cpu_ms per round, iterations, true_relres, verdict.
    """

    def __init__(self, wanted: list[LinearSolver], about: str) -> None:
        self.choice: LinearSolver | None = None
        self.reason = ""
        self.table: list[dict[str, Any]] = []
        self._about = about
        self._field = [_Candidate(solver) for solver in wanted]
        self._round = 0
        self._n_failures = 0

    def destroy(self) -> None:
        """Free the candidates' states. Collective."""
        for item in self._field:
            item.destroy()

    def solve(self, system: LinearSystem, n_rounds: int) -> SolveResult:
        """Solve one system: by all candidates in the pilot, then by the winner. Collective."""
        if self.choice is None and len(self._field) == 1:
            self.decide(f"{_title(self._field[0].solver)}: {self._about}")
        if self.choice is not None:
            return self._solve_by_ranking(system)
        rounds = 2 if system.traits.constant_matrix else n_rounds
        result = self._solve_by_all(system)
        if result.report.reason is Reason.NON_FINITE:
            return result
        self._round += 1
        if self._round >= rounds or sum(item.is_alive for item in self._field) <= 1:
            self._rank()
            result = self._field[0].result or result  # the others' vectors are gone
        return result

    @property
    def others(self) -> tuple[LinearSolver, ...]:
        """Who steps in where the choice fails, the next best first."""
        return tuple(item.solver for item in self._field[1:])

    def begin_with(self, seed: Any) -> None:
        """Give the first of the field the static space that it begins with."""
        self._field[0].seed = seed

    def decide(self, reason: str) -> None:
        """Settle on the first of the field."""
        self.choice, self.reason = self._field[0].solver, reason
        log.info("solver auto: %s", reason)

    def _solve_by_all(self, system: LinearSystem) -> SolveResult:
        """Run one round of the pilot and return the quickest right answer.

        Where nobody has one the system is at fault, and nobody leaves.
        """
        alive = [item for item in self._field if item.is_alive]
        order = alive if self._round % 2 == 0 else alive[::-1]
        seconds: dict[int, float] = {}
        for item in order:
            start = time.process_time()
            result = item.solve(system)
            if result.report.reason is Reason.NON_FINITE:
                return result
            seconds[id(item)] = _of_root(system, time.process_time() - start)
        right = [item for item in order if item.result and item.result.report.converged]
        if not right:
            return result
        best = min(right, key=lambda item: seconds[id(item)])
        behind = _FAR_BEHIND_FIRST if self._round == 0 else _FAR_BEHIND
        for item in order:
            item.cpu.append(seconds[id(item)])
            slower = seconds[id(item)] / max(seconds[id(best)], 1e-9)
            item.failed = item not in right
            if item.failed and item.result:
                item.verdict = f"{item.result.report.reason.text} in round {self._round + 1}"
            elif slower > behind:
                item.verdict = f"{slower:.1f} x slower in round {self._round + 1}"
        return best.result or result

    def _rank(self) -> None:
        """Order the field by cost, failures last, free all but the winner, and say why."""
        for item in self._field:
            report = item.result.report if item.result else None
            self.table.append(
                {
                    "solver": _title(item.solver),
                    "settings": as_table(item.solver),
                    "cpu_ms": [round(1e3 * seconds, 3) for seconds in item.cpu],
                    "iterations": report.iterations if report else None,
                    "true_relres": report.true_relres if report else None,
                    "verdict": item.verdict,
                }
            )
        self._field.sort(key=lambda item: item.rank)
        winner, *others = self._field
        for item in others:
            item.destroy()
        times = ", ".join(
            f"{_title(item.solver)} {1e3 * item.cost:.3g} ms" for item in self._field if item.cpu
        )
        self.decide(
            f"{_title(winner.solver)}: quickest of {len(self._field)} in a pilot on "
            f"{self._round} systems ({times}); {self._about}"
        )

    def _solve_by_ranking(self, system: LinearSystem) -> SolveResult:
        """Solve by the winner, or by the next best that succeeds."""
        result = self._field[0].solve(system)
        if result.report.converged or result.report.reason is Reason.NON_FINITE:
            return result
        failed = f"{_title(self._field[0].solver)} {result.report.reason.text}"
        for place, item in enumerate(self._field[1:], start=1):
            second = item.solve(system)
            if second.report.converged:
                self._n_failures += 1
                note = f"{failed}; solved by {_title(item.solver)}"
                log.warning("system %d: %s", system.index, note)
                if self._n_failures >= _TOO_MANY_FAILURES:
                    self._promote(place)
                joined = "; ".join(filter(None, (note, second.report.note)))
                return SolveResult(second.x, replace(second.report, note=joined))
        return result

    def _promote(self, place: int) -> None:
        """Make a follower the winner after repeated failures; the old one becomes the last."""
        old = self._field[0]
        self._field = [
            self._field[place],
            *(item for k, item in enumerate(self._field) if k not in (0, place)),
            old,
        ]
        self._n_failures = 0
        self.decide(
            f"{_title(self._field[0].solver)} replaces {_title(old.solver)}, which failed "
            f"{_TOO_MANY_FAILURES} times; {self._about}"
        )


def _of_root(system: LinearSystem, seconds: float) -> float:
    """Return the root's value on every rank. Collective."""
    if system.A.comm.size == 1:
        return seconds
    return float(system.A.comm.tompi4py().bcast(seconds))


def _make(kind: str, rtol: float, **settings: Any) -> LinearSolver:
    return solvers.build({"kind": kind, "rtol": rtol, **settings})


def _title(solver: LinearSolver) -> str:
    """Return a solver in a few words: its kind and what tells it from its siblings."""
    if solver.kind == "krylov":
        return "{method}+{preconditioner}".format_map(as_table(solver))
    package = getattr(solver, "package", "auto")
    return solver.kind if package == "auto" else f"{solver.kind}({package})"


def _has(package: str) -> bool:
    return bool(PETSc.Sys.hasExternalPackage(package))


def _multigrid() -> str:
    return "hypre" if _has("hypre") else "gamg"
