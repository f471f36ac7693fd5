"""Steady flow through a porous medium on the unit square or cube.

``-div(a grad u) = f`` inside, ``u = 0`` on the boundary. Conservative cell-centred finite volumes
with harmonic face conductances (:mod:`.grid`): a symmetric M-matrix, second order for smooth ``a``,
exact fluxes across layers of constant ``a``. Every sample has a matrix of its own and, unless it
brings a source, the same right-hand side. ``matrix_free`` solves the same equations without ever
storing a matrix: with one, 2 d + 1 numbers and indices per cell; without, d + 1 numbers.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge
from pydantic import FiniteFloat

from simlab.core.samples import Sample
from simlab.linalg.system import LinearSystem, StructuredGrid, Traits
from simlab.problems.family import families
from simlab.problems.fields import FieldSetting, Lognormal
from simlab.problems.grid import CellWorkspace, SteadyOnCells, cell_axes
from simlab.problems.spaces import FieldSpace
from simlab.store.schema import Boundary, FieldSpec, Schema

if TYPE_CHECKING:
    from mpi4py import MPI
    from petsc4py import PETSc

__all__ = ["Darcy"]


@families.register("darcy")
class Darcy(SteadyOnCells):
    """Darcy flow: coefficient field ``a`` in, pressure ``u`` out.

    Attributes
    ----------
    cells : int
        Cells along each axis.
    dim : {2, 3}
    fields : Field
        Where ``a`` comes from: ``{kind = "lognormal"}``, ``"two_phase"``, ``"four_parameter"``, or
        the user's own, ``{file = "a.npy"}``.
    source : float
        Constant ``f``. A sample that has a field ``"f"`` of its own is solved with that instead.
    matrix_free : bool
        Give solvers an operator that multiplies and knows its diagonal instead of a sparse matrix:
        only ``auto``, ``fast`` and Krylov methods with Jacobi or no preconditioner take it.

    Examples
    --------
    >>> family = Darcy(cells=16, fields={"kind": "two_phase", "low": 1.0, "high": 4.0})
    >>> family.schema.shape, family.space.names
    ((16, 16), ('a',))
    """

    cells: Annotated[int, Ge(2)] = 64
    dim: Literal[2, 3] = 2
    fields: FieldSetting = Lognormal()
    source: FiniteFloat = 1.0
    matrix_free: bool = False

    @cached_property
    def space(self) -> FieldSpace:
        """The fields ``a`` on this family's grid."""
        return FieldSpace("a", (self.cells,) * self.dim, self.fields)

    @cached_property
    def schema(self) -> Schema:
        """Grid, coefficient and pressure."""
        axes = cell_axes((self.cells,) * self.dim)
        return Schema(
            name="darcy",
            axes=axes,
            fields=(
                FieldSpec("a", "input", long_name="permeability"),
                FieldSpec("u", long_name="pressure"),
            ),
            parameters=dict.fromkeys(self.fields.parameters, "1"),
            constants={"source": self.source},
            boundaries=tuple(Boundary(axis.name, "wall") for axis in axes),
        )

    @cached_property
    def traits(self) -> Traits:
        """What holds for every matrix of this family."""
        grid = StructuredGrid((self.cells,) * self.dim, "dirichlet")
        return Traits(spd=True, symmetric=True, grid=grid, matrix_free=self.matrix_free)

    def validate(self) -> None:
        """Check the coefficient's source: file, dataset, shape, every value."""
        self.fields.validate((self.cells,) * self.dim)

    def setup(self, comm: MPI.Comm) -> CellWorkspace:
        """Make grid, matrix and vectors. Collective."""
        return CellWorkspace(comm, (self.cells,) * self.dim, matrix_free=self.matrix_free)

    def assemble(
        self,
        mu: Sample,
        state: CellWorkspace,
        step: int = 0,
        previous: PETSc.Vec | None = None,
    ) -> LinearSystem:
        """Fill matrix and right-hand side. Collective."""
        state.assemble(mu.fields["a"])
        state.load(mu.fields.get("f", self.source))
        return LinearSystem(state.A, state.b, self.traits, mu, mu.index)
