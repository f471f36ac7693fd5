"""The problem family protocol: parameters in, linear systems out, fields back.

One frozen dataclass per PDE. A stationary problem is one step; a time-dependent one is ``steps``
systems per sample, each made from the solution before. A problem that needs no linear solver (an
explicit scheme, a spectral one) steps by itself: it has ``march`` instead of ``assemble`` and
``observe``. :func:`trajectory` is the loop that all callers share, for both sorts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np

from simlab.core.config import Registry
from simlab.core.reports import Reason, SolveReport
from simlab.core.samples import Sample
from simlab.linalg.clock import Clock
from simlab.linalg.system import LinearSystem, SolveResult
from simlab.store.schema import Schema

if TYPE_CHECKING:
    from mpi4py import MPI
    from petsc4py import PETSc

__all__ = [
    "Family",
    "MarchingFamily",
    "ParameterSpace",
    "ProblemFamily",
    "Step",
    "families",
    "marches",
    "trajectory",
]


class ParameterSpace(Protocol):
    """Where samples come from. Sample ``i`` depends on ``(seed, i)`` only."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of scalar parameters and input fields."""
        ...

    def sample(self, n: int, seed: int, start: int = 0) -> list[Sample]:
        """Return samples ``start .. start + n - 1`` of the study ``seed``."""
        ...

    def contains(self, mu: Sample) -> bool:
        """Return whether a sample could have been drawn from this space."""
        ...


class Family(Protocol):
    """A parametric problem, discretised: frozen settings; storage lives in what ``setup`` returns.

    A family that only rebuilds somebody's published systems says so with a class variable
    ``reproduction_only = True``: benchmarks take it, campaigns refuse it.
    """

    kind: ClassVar[str]

    @property
    def space(self) -> ParameterSpace:
        """Parameter space."""
        ...

    @property
    def schema(self) -> Schema:
        """Grid, times, fields and parameters of every trajectory. Needs neither PETSc nor MPI."""
        ...

    @property
    def steps(self) -> int:
        """Steps per sample, of which every one is stored; 1 for a stationary problem."""
        ...

    def validate(self) -> None:
        """Check files, groups and values the case names, or raise ConfigError. Rank-local."""
        ...

    def setup(self, comm: MPI.Comm) -> Any:
        """Make the workspace: grid, matrix and vectors, with ``destroy()``. Collective."""
        ...


class ProblemFamily(Family, Protocol):
    """A family whose every step is one linear system."""

    def assemble(
        self, mu: Sample, state: Any, step: int = 0, previous: PETSc.Vec | None = None
    ) -> LinearSystem:
        """Fill the workspace's matrix and right-hand side for one step. Collective."""
        ...

    def observe(self, mu: Sample, x: PETSc.Vec, state: Any) -> dict[str, np.ndarray]:
        """Return every output field, global, natural order, on the root; ``{}`` elsewhere.

        Collective.
        """
        ...


class MarchingFamily(Family, Protocol):
    """A family that steps by itself; campaigns give it no solver."""

    def march(self, mu: Sample, state: Any) -> Iterator[dict[str, np.ndarray]]:
        """Yield the output fields of every step, as ``observe`` gives them. Collective."""
        ...


@dataclass(frozen=True, eq=False)
class Step:
    """One step of one sample: ``fields`` as ``observe`` gives them, and what the solve reported."""

    step: int
    time: float
    fields: dict[str, np.ndarray]
    report: SolveReport


def marches(family: Any) -> bool:
    """Whether a family steps by itself, without linear systems."""
    return callable(getattr(family, "march", None))


def trajectory(
    family: ProblemFamily | MarchingFamily,
    mu: Sample,
    workspace: Any,
    solve: Callable[[LinearSystem], SolveResult],
    clock: Clock | None = None,
) -> Iterator[Step]:
    """Solve one sample step by step. Collective on the workspace's communicator.

    ``solve`` is not called for a family that marches.

    Yields
    ------
    Step
        In order of time. A failed solve raises :class:`simlab.core.errors.ConvergenceError` on
        every rank.
    """
    clock = clock or Clock()
    if marches(family):
        yield from _marched(cast(MarchingFamily, family), mu, workspace, clock)
    else:
        yield from _solved(cast(ProblemFamily, family), mu, workspace, solve, clock)


def _marched(family: MarchingFamily, mu: Sample, workspace: Any, clock: Clock) -> Iterator[Step]:
    report = SolveReport(f"{family.kind} steps", Reason.CONVERGED, 0, 0, 0, nan, nan)
    steps = family.march(mu, workspace)
    for step, time in enumerate(family.schema.times):
        with clock("solve"):
            fields = next(steps)
        yield Step(step, time, fields, report)


def _solved(
    family: ProblemFamily,
    mu: Sample,
    workspace: Any,
    solve: Callable[[LinearSystem], SolveResult],
    clock: Clock,
) -> Iterator[Step]:
    times = family.schema.times
    previous = None
    try:
        for step in range(family.steps):
            with clock("assemble"):
                system = family.assemble(mu, workspace, step, previous)
            with clock("solve"):
                result = solve(system)
            result.report.check()
            with clock("observe"):
                fields = family.observe(mu, result.x, workspace)
            yield Step(step, times[step], fields, result.report)
            if step + 1 < family.steps:  # the solver overwrites x in its next solve
                previous = previous or result.x.duplicate()
                result.x.copy(previous)
    finally:
        if previous is not None:
            previous.destroy()


families: Registry[ProblemFamily] = Registry("family", "simlab.problems", "simlab.families")
