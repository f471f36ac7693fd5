"""Small frozen values that travel between layers: why a solve ended, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from simlab.core.errors import ConvergenceError

__all__ = ["Provenance", "Reason", "SolveReport"]


class Reason(Enum):
    """Why a solve ended. ``advice`` says what to try next."""

    CONVERGED = ("converged", "the true residual meets the tolerance")
    ITERATION_LIMIT = ("iteration limit", "raise max_iterations or use a stronger preconditioner")
    STAGNATED = (
        "stagnated",
        "the true residual stays above the tolerance: loosen rtol or use a direct solver",
    )
    BREAKDOWN = (
        "breakdown",
        "the method broke down: check symmetry and definiteness claims, or use GMRES",
    )
    DIVERGED = ("diverged", "the residual grew: check the operator and the preconditioner")
    NON_FINITE = (
        "not finite",
        "NaN or Inf in the matrix, right-hand side or solution: check the input data",
    )
    SINGULAR = (
        "singular",
        "the matrix is singular: check boundary conditions or attach a null space",
    )
    SETUP_FAILED = (
        "set-up failed",
        "the preconditioner or factorisation could not be built: try another one",
    )

    def __init__(self, text: str, advice: str) -> None:
        self.text = text
        self.advice = advice

    @property
    def is_success(self) -> bool:
        """Whether the answer may be used."""
        return self is Reason.CONVERGED


@dataclass(frozen=True)
class SolveReport:
    """What one linear solve did and cost.

    Attributes
    ----------
    solver : str
        Solver in one line, e.g. ``"cg+hypre"``.
    reason : Reason
    iterations, operator_applies, pc_applies : int
    true_relres : float
        ``||b - A x|| / ||b||``, recomputed after the solve, never taken from a recurrence.
    rtol : float
        The tolerance ``true_relres`` was held against.
    history : tuple of float
        Residual norms as the solver saw them, relative to ``||b||``; empty unless asked for.
    seconds : mapping of str to float
        Wall seconds per phase (``"setup"``, ``"solve"``, ``"check"``).
    note : str
        Anything a person should know, e.g. ``"factor kept"``.
    """

    solver: str
    reason: Reason
    iterations: int
    operator_applies: int
    pc_applies: int
    true_relres: float
    rtol: float
    history: tuple[float, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def converged(self) -> bool:
        """Whether the true residual meets the tolerance."""
        return self.reason.is_success

    def check(self) -> SolveReport:
        """Return self, or raise :class:`ConvergenceError` when the solve failed."""
        if not self.converged:
            raise ConvergenceError(
                f"{self.solver}: {self.reason.text}; {self.reason.advice}\n{self}", self
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {
            "reason": self.reason.text,
            "history": list(self.history),
            "seconds": dict(self.seconds),
        }

    def __str__(self) -> str:
        phases = "  ".join(f"{name} {1e3 * value:.2f} ms" for name, value in self.seconds.items())
        lines = [
            f"solver            {self.solver}",
            f"reason            {self.reason.text}",
            f"iterations        {self.iterations}",
            f"operator applies  {self.operator_applies}",
            f"pc applies        {self.pc_applies}",
            f"true ||b-Ax||/||b||  {self.true_relres:.3e}  (rtol {self.rtol:.1e})",
            f"time              {phases}",
        ]
        return "\n".join([*lines, f"note              {self.note}"] if self.note else lines)


@dataclass(frozen=True)
class Provenance:
    """How one stored step came about; travels with its data.

    Attributes
    ----------
    order : int
        Position of the sample in the order of solving, over all chains; -1 when not known.
    chain : int
        Chain that solved it; -1 when not known.
    iterations, operator_applies, pc_applies : int
        What the solve took; -1 when not known.
    true_relres : float
        ``||b - A x|| / ||b||``, recomputed after the solve; NaN when not known.
    seconds : float
        CPU seconds of the solve; NaN when not known.
    solver : str
        Solver in one line, e.g. ``"cg+hypre"``.
    """

    order: int = -1
    chain: int = -1
    iterations: int = -1
    operator_applies: int = -1
    pc_applies: int = -1
    true_relres: float = float("nan")
    seconds: float = float("nan")
    solver: str = ""

    @classmethod
    def of(cls, report: SolveReport, *, order: int, chain: int, seconds: float) -> Provenance:
        """Return what a report says, with the place in the campaign and the CPU seconds."""
        return cls(
            order=order,
            chain=chain,
            iterations=report.iterations,
            operator_applies=report.operator_applies,
            pc_applies=report.pc_applies,
            true_relres=report.true_relres,
            seconds=seconds,
            solver=report.solver,
        )
