"""Waves of one frequency in a closed box with a wavenumber that varies from place to place.

``-lap u - k(x)^2 u = f`` inside, ``u = 0`` on the boundary, a Gaussian source at the centre.
Cell-centred finite volumes (:mod:`.grid`): second order, symmetric, and indefinite as soon as some
``k^2`` exceeds the lowest eigenvalue of ``-lap``, ``d pi^2``. Without absorption every sample is
somewhere between two resonances, and ``u`` is large where it is close to one. Resolving a wave
takes at least ten cells per wavelength ``2 pi / k``: 32 for ``k = 20``.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from annotated_types import Ge
from pydantic import PositiveFloat

from simlab.core.samples import Sample
from simlab.linalg.system import LinearSystem, StructuredGrid, Traits
from simlab.problems.family import families
from simlab.problems.fields import FieldSetting, Wavenumber, cell_centres
from simlab.problems.grid import CellWorkspace, SteadyOnCells, cell_axes
from simlab.problems.spaces import FieldSpace
from simlab.store.schema import Boundary, FieldSpec, Schema

if TYPE_CHECKING:
    from mpi4py import MPI
    from petsc4py import PETSc

__all__ = ["Helmholtz"]


@families.register("helmholtz")
class Helmholtz(SteadyOnCells):
    """Helmholtz equation: wavenumber field ``k`` in, wave ``u`` out.

    Attributes
    ----------
    cells : int
        Cells along each axis.
    dim : {2, 3}
    fields : Field
        Where ``k`` comes from; 20 (1 + 0.05 sum mu_q phi_q) with four numbers mu_q by default.
    source_variance : float
        ``s`` of the source ``f = exp(-|x - centre|^2 / (2 s))``. A sample that has a field ``"f"``
        of its own is solved with that instead.

    Examples
    --------
    >>> family = Helmholtz(cells=48, fields={"kind": "wavenumber", "mean": 12.0, "contrast": 0.1})
    >>> family.schema.shape, family.space.names
    ((48, 48), ('mu_1', 'mu_2', 'mu_3', 'mu_4', 'k'))
    """

    cells: Annotated[int, Ge(2)] = 100
    dim: Literal[2, 3] = 2
    fields: FieldSetting = Wavenumber()
    source_variance: PositiveFloat = 0.005

    @cached_property
    def space(self) -> FieldSpace:
        """The fields ``k`` on this family's grid."""
        return FieldSpace("k", (self.cells,) * self.dim, self.fields)

    @cached_property
    def schema(self) -> Schema:
        """Grid, wavenumber and wave."""
        axes = cell_axes((self.cells,) * self.dim)
        return Schema(
            name="helmholtz",
            axes=axes,
            fields=(
                FieldSpec("k", "input", long_name="wavenumber"),
                FieldSpec("u", long_name="amplitude"),
            ),
            parameters=dict.fromkeys(self.fields.parameters, "1"),
            constants={"source_variance": self.source_variance},
            boundaries=tuple(Boundary(axis.name, "wall") for axis in axes),
        )

    @cached_property
    def traits(self) -> Traits:
        """What holds for every matrix of this family."""
        return Traits(symmetric=True, grid=StructuredGrid((self.cells,) * self.dim, "dirichlet"))

    def validate(self) -> None:
        """Check the wavenumber's source: file, dataset, shape, every value."""
        self.fields.validate((self.cells,) * self.dim)

    def setup(self, comm: MPI.Comm) -> CellWorkspace:
        """Make grid, matrix and vectors. Collective."""
        return CellWorkspace(comm, (self.cells,) * self.dim)

    def assemble(
        self,
        mu: Sample,
        state: CellWorkspace,
        step: int = 0,
        previous: PETSc.Vec | None = None,
    ) -> LinearSystem:
        """Fill matrix and right-hand side. Collective."""
        state.assemble(1.0, reaction=-(state.field("wavenumber k", mu.fields["k"]) ** 2))
        state.load(mu.fields.get("f", self._source))
        return LinearSystem(state.A, state.b, self.traits, mu, mu.index)

    @cached_property
    def _source(self) -> np.ndarray:
        x = np.meshgrid(*[cell_centres(self.cells) - 0.5] * self.dim, indexing="ij", sparse=True)
        return np.asarray(np.exp(-sum(x_j**2 for x_j in x) / (2.0 * self.source_variance)))
