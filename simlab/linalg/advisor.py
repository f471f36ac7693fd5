"""``kind = "auto"``: traits name the candidates, a pilot on the first systems decides.

    1. traits, size and ranks -> a list of solvers that may win (:func:`candidates`)
    2. every candidate solves each of the first systems; the quickest right answer is returned
    3. the candidate with the least CPU time after its first system (set-up, ordering and trials of
       its own are paid once) solves the rest; the others are freed
    4. where the winner fails later, the next best solves that system, and takes over when the
       winner keeps failing

A candidate far behind in its first solve drops out at once, later ones have to be closer and
closer, and the pilot ends when one is left: after two systems as a rule, where one method suits
best, after six where several are near each other. Solvers that carry something from system to
system are judged from their third on, when they have something to carry; those that begin with a
static space pay for it over the systems that are to come, and take part only where these are known
to be many. There is no pilot where there is nothing to find out: one candidate, a tiny system, or a
constant matrix off the grid (factored once). Times are the root's, broadcast, so that all ranks of
a group decide the same. The reason and the table of the pilot go to the log and, through the
state, to the manifest.
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
from simlab.linalg.candidates import MANY, candidates
from simlab.linalg.system import LinearSolver, LinearSystem, SolveResult, solvers

__all__ = ["Auto", "AutoState", "adopt", "begun", "candidates", "chosen"]

log = logging.getLogger("simlab.linalg.advisor")

_FAR_BEHIND = (6.0, 2.5, 2.0, 1.5)  # best round over the least cost, after round 1, 2...
_SLOW_TO_LEARN = 2  # rounds of one that carries: not held against it
_TOO_MANY_FAILURES = 3
_VARIED = ("direct", "kept")  # kinds whose settings tell one candidate from another


@solvers.register("auto")
class Auto:
    """The quickest solver for this family on this machine, found by trying.

    Attributes
    ----------
    rtol : float
        Tolerance for the true residual relative to ``||b||``; given on to the candidates.
    pilot : int
        Systems the candidates compete on, at most.
    candidates : tuple of LinearSolver
        Instead of the built-in choice, e.g. ``["cg_amg", {kind = "direct", package = "mumps"}]``.
    """

    rtol: Annotated[float, Gt(0), Lt(1)] = 1e-8
    pilot: Annotated[int, Ge(2)] = 6
    candidates: tuple[Annotated[Any, solvers.field], ...] = ()

    def suits(self, system: LinearSystem) -> bool:
        """Whether any candidate does: always, when they are ours to choose."""
        return not self.candidates or any(item.suits(system) for item in self.candidates)

    def init(self, system: LinearSystem, n_systems: int = 0) -> AutoState:
        """Return a state that is about to choose. Collective.

        Parameters
        ----------
        system : LinearSystem
        n_systems : int
            How many are to come, 0 when that is not known.

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
            return AutoState(wanted, "named in the case", n_systems)
        return AutoState(*candidates(system, self.rtol, n_systems), n_systems)

    def solve(self, system: LinearSystem, state: AutoState) -> tuple[SolveResult, AutoState]:
        """Solve one system. Collective."""
        return state.solve(system, self.pilot), state


def begun(solver: LinearSolver, system: LinearSystem, seed: Any = None, n_systems: int = 0) -> Any:
    """Return a solver's fresh state. Collective.

    Parameters
    ----------
    solver : LinearSolver
    system : LinearSystem
    seed : optional
        The static space, where there is one.
    n_systems : int
        How many systems are to come, 0 when that is not known.
    """
    if isinstance(solver, Auto):
        return solver.init(system, n_systems)
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
    n_systems: int = 0
    state: Any = None
    seed: Any = None
    one_off: float = 0.0  # CPU seconds before the first solve
    cpu: list[float] = field(default_factory=list)
    result: SolveResult | None = None
    failed: bool = False
    verdict: str = ""  # why it left the pilot

    @property
    def is_alive(self) -> bool:
        return not self.verdict

    @property
    def carries(self) -> bool:
        """Whether it becomes quicker as it goes."""
        return bool(getattr(self.solver, "wants_order", False))

    @property
    def share(self) -> float:
        """A system's share of the one-off cost."""
        return self.one_off / (self.n_systems or MANY)

    @property
    def cost(self) -> float:
        """CPU seconds of a system later on: its share, and the lower median of what was seen."""
        late = self.cpu[_SLOW_TO_LEARN:] if self.carries else self.cpu[1:]
        known = sorted(late or self.cpu[1:] or self.cpu or [float("inf")])
        return self.share + known[(len(known) - 1) // 2]

    @property
    def rank(self) -> tuple[bool, bool, int, float]:
        """Smallest is best: in the race to the end, right, measured often, cheap."""
        return self.failed, not self.is_alive, -len(self.cpu), self.cost

    def solve(self, system: LinearSystem) -> SolveResult:
        if self.state is None:
            self.begin(system)
        self.result, self.state = self.solver.solve(system, self.state)
        return self.result

    def begin(self, system: LinearSystem) -> None:
        """Make the state, and a static space when it needs one of its own."""
        start = time.process_time()
        self.state = begun(self.solver, system, self.seed)
        self.one_off = _of_root(system, time.process_time() - start)

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
        One row per candidate: solver, cpu_ms per round, iterations, true_relres, verdict; and
        once_ms, what it cost before its first solve.
    """

    def __init__(self, wanted: list[LinearSolver], about: str, n_systems: int = 0) -> None:
        self.choice: LinearSolver | None = None
        self.reason = ""
        self.table: list[dict[str, Any]] = []
        self._about = about
        self._field = [_Candidate(solver, n_systems) for solver in wanted]
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

    @property
    def events(self) -> list[str]:
        """What the choice has to say of its recycled space."""
        return list(getattr(self._field[0].state, "events", ()))

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
            if item.state is None:
                item.begin(system)
            start = time.process_time()
            result = item.solve(system)
            if result.report.reason is Reason.NON_FINITE:
                return result
            seconds[id(item)] = _of_root(system, time.process_time() - start) + item.share
        right = [item for item in order if item.result and item.result.report.converged]
        if not right:
            return result
        best = min(right, key=lambda item: seconds[id(item)])
        for item in order:
            item.cpu.append(seconds[id(item)] - item.share)
        least = min(item.cost for item in right)
        for item in order:
            patient = item.carries and self._round < _SLOW_TO_LEARN
            behind = _FAR_BEHIND[0 if patient else min(self._round, len(_FAR_BEHIND) - 1)]
            slower = (item.share + min(item.cpu)) / max(least, 1e-9)
            item.failed = item not in right
            if item.failed and item.result:
                item.verdict = f"{item.result.report.reason.text} in round {self._round + 1}"
            elif slower > behind:
                item.verdict = f"{slower:.1f} x slower after round {self._round + 1}"
        return best.result or result

    def _rank(self) -> None:
        """Order the field by cost, failures last, free all but the winner, and say why."""
        for item in self._field:
            report = item.result.report if item.result else None
            self.table.append(
                {
                    "solver": _title(item.solver),
                    "settings": as_table(item.solver),
                    "once_ms": round(1e3 * item.one_off, 3),
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


def _title(solver: LinearSolver) -> str:
    """Return a solver in a few words: its kind and what tells it from its siblings."""
    table = as_table(solver)
    if solver.kind == "krylov":
        return "{method}+{preconditioner}".format_map(table)
    if "carried" in table:
        static = "static " if table["static"] else ""
        return f"{static}{solver.kind}+{table['preconditioner']}"
    words = [str(table[name]) for name in ("package", "preconditioner") if name in table]
    said = [word for word in words if word not in ("auto", "factor")]
    return f"{solver.kind}({', '.join(said)})" if said and solver.kind in _VARIED else solver.kind
