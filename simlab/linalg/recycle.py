"""``kind = "recycle"``: the recycling solver that fits the matrix, with its defaults.

Deflated CG with an incomplete Cholesky factor where A is symmetric positive definite, flexible
GCRO-DR with an incomplete LU factor everywhere else, Jacobi where there are no entries to factor.
For more settings than the common ones use the kinds themselves.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt, Lt
from pydantic import NonNegativeInt, PositiveInt

from simlab.core.config import build
from simlab.linalg.deflated_cg import DeflatedCG, DeflatedCGState
from simlab.linalg.gcrodr import GCRODR, GCRODRState
from simlab.linalg.seed import Seed
from simlab.linalg.system import LinearSystem, SolveResult, solvers

__all__ = ["Recycle"]

_CYCLE, _ROOM = 40, 20  # vectors of a GCRO-DR cycle, and how many of them at least are new
_INTERVAL = 8  # systems between two renewals of what GCRO-DR carries


@solvers.register("recycle")
class Recycle:
    """A Krylov solver that remembers directions from system to system.

    Attributes
    ----------
    preconditioner : str
        PC type, as for ``krylov``; ``"auto"``: ICC, ILU or Jacobi, as the matrix allows.
    rtol : float
        Tolerance for the true residual relative to ``||b||``.
    max_iterations : int
    static : int
        Vectors of the static space: the lowest eigenvectors of a reference operator.
    carried : int
        Vectors renewed from the solves themselves.

    Examples
    --------
    >>> Recycle(static=20, carried=0).wants_order
    False
    """

    preconditioner: str = "auto"
    rtol: Annotated[float, Gt(0), Lt(1)] = 1e-8
    max_iterations: PositiveInt = 10_000
    static: NonNegativeInt = 0
    carried: NonNegativeInt = 20

    @property
    def wants_order(self) -> bool:
        """Whether neighbours in the sequence should resemble each other."""
        return self.carried > 0

    def method(self, system: LinearSystem) -> DeflatedCG | GCRODR:
        """Return the settings of the solver for such systems."""
        traits, pc = system.traits, self.preconditioner
        if pc == "auto":
            pc = "jacobi" if traits.matrix_free else "icc" if traits.spd else "ilu"
        table = {
            "preconditioner": pc,
            "rtol": self.rtol,
            "max_iterations": self.max_iterations,
            "static": self.static,
            "carried": self.carried,
        }
        if traits.spd:
            return build(DeflatedCG, table)
        restart = max(_CYCLE, self.static + self.carried + _ROOM)
        # near the resonances of an indefinite matrix, another sample's modes do harm
        interval = 1 if traits.symmetric else _INTERVAL
        return build(GCRODR, table | {"restart": restart, "interval": interval})

    def suits(self, system: LinearSystem) -> bool:
        """Whether the solver that fits can take such systems."""
        if self.static and system.traits.matrix_free:
            return False
        return self.method(system).suits(system)

    def seed(self, system: LinearSystem) -> Seed | None:
        """Return the static space for systems like this one, None without one. Collective."""
        return self.method(system).seed(system)

    def init(self, system: LinearSystem, seed: Seed | None = None) -> DeflatedCGState | GCRODRState:
        """Return a fresh state. Collective.

        Parameters
        ----------
        system : LinearSystem
        seed : Seed, optional
            Its first ``static`` columns are used; computed from this system when left out.
        """
        return self.method(system).init(system, seed)

    def solve(
        self, system: LinearSystem, state: DeflatedCGState | GCRODRState
    ) -> tuple[SolveResult, DeflatedCGState | GCRODRState]:
        """Solve one system. Collective."""
        return state.solve(system, self.rtol, self.max_iterations), state
