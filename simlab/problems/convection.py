"""Transport in a swirling flow: convection and diffusion in the unit cube or square.

``-kappa lap u + v . grad u = f`` inside, ``u = 0`` on the boundary, with a rotation about the
centre and a uniform wind,

    v = (s (y - 1/2) + w mu_1,  -s (x - 1/2) + w mu_2,  2 w mu_3),     s = swirl (1 + 0.3 mu_4),

``mu`` uniform in (-1, 1), ``w = wind``. The flow has no divergence, and enters and leaves through
the walls. Cell-centred finite volumes (:mod:`.faces`), first-order upwind: an M-matrix at any
speed, nonsymmetric, and numerically more diffusive than the equation by ``|v| h / 2`` along ``v``.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from annotated_types import Ge
from pydantic import FiniteFloat, NonNegativeFloat, PositiveFloat

from simlab.core.samples import Sample
from simlab.linalg.system import LinearSystem, StructuredGrid, Traits
from simlab.problems.family import families
from simlab.problems.fields import cell_centres
from simlab.problems.grid import CellWorkspace, SteadyOnCells, cell_axes
from simlab.problems.spaces import Box
from simlab.store.schema import Boundary, FieldSpec, Schema

if TYPE_CHECKING:
    from mpi4py import MPI
    from petsc4py import PETSc

__all__ = ["ConvectionDiffusion"]


@families.register("convection_diffusion")
class ConvectionDiffusion(SteadyOnCells):
    """Convection-diffusion: flow parameters in, concentration ``u`` out.

    Parameters of a sample: ``mu_1``, ``mu_2`` (wind along x, y), ``mu_3`` (along z, in three
    dimensions only), ``mu_4`` (strength of the rotation).

    Attributes
    ----------
    cells : int
        Cells along each axis.
    dim : {2, 3}
    swirl : float
        Angular velocity; 0 leaves the wind alone, and ``mu_4`` without effect.
    wind : float
        Largest uniform velocity along x and y; twice that along z.
    diffusivity : float
        ``kappa``.
    source : float
        Constant ``f``. A sample that has a field ``"f"`` of its own is solved with that instead.

    Examples
    --------
    >>> family = ConvectionDiffusion(cells=16, dim=2)
    >>> family.schema.shape, family.space.names
    ((16, 16), ('mu_1', 'mu_2', 'mu_4'))
    """

    cells: Annotated[int, Ge(2)] = 24
    dim: Literal[2, 3] = 3
    swirl: FiniteFloat = 50.0
    wind: NonNegativeFloat = 10.0
    diffusivity: PositiveFloat = 1.0
    source: FiniteFloat = 1.0

    @cached_property
    def space(self) -> Box:
        """Parameters of the flow."""
        names = ("mu_1", "mu_2", "mu_3", "mu_4") if self.dim == 3 else ("mu_1", "mu_2", "mu_4")
        return Box(dict.fromkeys(names, (-1.0, 1.0)))

    @cached_property
    def schema(self) -> Schema:
        """Grid and concentration."""
        axes = cell_axes((self.cells,) * self.dim)
        names = ("swirl", "wind", "diffusivity", "source")
        return Schema(
            name="convection_diffusion",
            axes=axes,
            fields=(FieldSpec("u", long_name="concentration"),),
            parameters=dict.fromkeys(self.space.names, "1"),
            constants={name: getattr(self, name) for name in names},
            boundaries=tuple(Boundary(axis.name, "wall") for axis in axes),
        )

    @cached_property
    def traits(self) -> Traits:
        """What holds for every matrix of this family."""
        return Traits(grid=StructuredGrid((self.cells,) * self.dim, "dirichlet"))

    def validate(self) -> None:
        """Nothing outside the settings can be wrong."""

    def setup(self, comm: MPI.Comm) -> CellWorkspace:
        """Make grid, matrix and vectors. Collective."""
        return CellWorkspace(comm, (self.cells,) * self.dim, transport=True)

    def velocity(self, mu: Sample) -> list[np.ndarray]:
        """Return each component at the faces it crosses, broadcastable to their global array."""
        p, centre = mu.parameters, cell_centres(self.cells) - 0.5
        s = self.swirl * (1.0 + 0.3 * p["mu_4"])
        x, y, *_ = np.meshgrid(*[centre] * self.dim, indexing="ij", sparse=True)
        components = [s * y + self.wind * p["mu_1"], -s * x + self.wind * p["mu_2"]]
        if self.dim == 3:
            components.append(np.array(2.0 * self.wind * p["mu_3"]))
        return components

    def assemble(
        self,
        mu: Sample,
        state: CellWorkspace,
        step: int = 0,
        previous: PETSc.Vec | None = None,
    ) -> LinearSystem:
        """Fill matrix and right-hand side. Collective."""
        state.assemble(self.diffusivity, velocity=self.velocity(mu))
        state.load(mu.fields.get("f", self.source))
        return LinearSystem(state.A, state.b, self.traits, mu, mu.index)
