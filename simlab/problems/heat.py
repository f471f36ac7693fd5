"""Heat conduction in a plate, ``u_t = kappa lap(u)`` on the unit square, four wall temperatures.

Cell-centred finite volumes (:mod:`.grid`) and implicit Euler: with the cell volume ``h^2``,

    (h^2 I + dt kappa K) u_new = h^2 u_old + dt kappa * 2 * (wall temperatures at the walls' cells)

The matrix never changes, neither between steps nor between samples, so a solver that keeps its
factor pays for it once per campaign. Second order in space, first in time. Five parameters, as in
the published benchmark of online training on the heat equation.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np
from annotated_types import Ge
from pydantic import FiniteFloat, PositiveFloat, PositiveInt, model_validator

from simlab.core.errors import ConfigError
from simlab.core.samples import Sample
from simlab.linalg.system import LinearSystem, StructuredGrid, Traits
from simlab.problems.family import families
from simlab.problems.grid import CellWorkspace, cell_axes
from simlab.problems.spaces import Box
from simlab.store.schema import Boundary, FieldSpec, Schema

if TYPE_CHECKING:
    from mpi4py import MPI
    from petsc4py import PETSc

__all__ = ["Heat"]


@families.register("heat")
class Heat:
    """Heat equation: initial and wall temperatures in, temperature over time out.

    Parameters of a sample: ``initial`` (uniform), ``left`` (x = 0), ``right`` (x = 1), ``bottom``
    (y = 0), ``top`` (y = 1), all in K.

    Attributes
    ----------
    cells : int
        Cells along each axis.
    dt : float
        Time step.
    n_steps : int
        Steps per sample; every one is stored.
    diffusivity : float
        ``kappa``.
    temperatures : (float, float)
        Bounds of all five parameters, K.

    Examples
    --------
    >>> family = Heat(cells=8, n_steps=4)
    >>> family.schema.times, family.space.names
    ((0.01, 0.02, 0.03, 0.04), ('initial', 'left', 'right', 'bottom', 'top'))
    """

    cells: Annotated[int, Ge(2)] = 32
    dt: PositiveFloat = 0.01
    n_steps: PositiveInt = 100
    diffusivity: PositiveFloat = 1.0
    temperatures: tuple[FiniteFloat, FiniteFloat] = (100.0, 500.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.temperatures
        if low >= high:
            raise ConfigError(
                f"temperatures: expected [low, high] with low < high, found {low} >= {high}"
            )
        return self

    @property
    def steps(self) -> int:
        """Linear systems per sample."""
        return self.n_steps

    @cached_property
    def space(self) -> Box:
        """The five temperatures."""
        names = ("initial", "left", "right", "bottom", "top")
        return Box(dict.fromkeys(names, self.temperatures))

    @cached_property
    def schema(self) -> Schema:
        """Grid, times and temperature."""
        axes = cell_axes((self.cells, self.cells))
        return Schema(
            name="heat",
            axes=axes,
            fields=(FieldSpec("u", units="K", long_name="temperature"),),
            times=tuple(float(round(self.dt * k, 12)) for k in range(1, self.n_steps + 1)),
            parameters=dict.fromkeys(self.space.names, "K"),
            constants={"diffusivity": self.diffusivity, "dt": self.dt},
            boundaries=tuple(Boundary(axis.name, "wall") for axis in axes),
            initial={"u": "initial"},
        )

    @cached_property
    def traits(self) -> Traits:
        """What holds for the one matrix of this family."""
        grid = StructuredGrid((self.cells, self.cells), "dirichlet")
        return Traits(spd=True, symmetric=True, constant_matrix=True, grid=grid)

    def validate(self) -> None:
        """Nothing outside the settings can be wrong."""

    def setup(self, comm: MPI.Comm) -> CellWorkspace:
        """Make grid, the matrix with its values, and vectors. Collective."""
        workspace = CellWorkspace(comm, (self.cells, self.cells))
        conductivity = np.full(workspace.shape, self.dt * self.diffusivity)
        workspace.assemble(conductivity, reaction=1.0)
        return workspace

    def assemble(
        self,
        mu: Sample,
        state: CellWorkspace,
        step: int = 0,
        previous: PETSc.Vec | None = None,
    ) -> LinearSystem:
        """Fill the right-hand side from the temperature before. Collective.

        ``previous`` is None in the first step, which starts from ``mu``'s uniform temperature.
        """
        with state.b as flat:
            if previous is None:
                flat[...] = state.volume * mu.parameters["initial"]
            else:
                np.multiply(previous.getArray(readonly=True), state.volume, out=flat)
            b = flat.reshape(state.local_shape)
            gain = 2.0 * self.dt * self.diffusivity  # conductance of half a cell, h^2 / (h * h/2)
            for axis, (low, high) in enumerate((("left", "right"), ("bottom", "top"))):
                at_low, at_high = state.walls(axis)
                lines = np.moveaxis(b, axis, 0)
                if at_low:
                    lines[0] += gain * mu.parameters[low]
                if at_high:
                    lines[-1] += gain * mu.parameters[high]
        return LinearSystem(state.A, state.b, self.traits, mu, mu.index)

    def observe(self, mu: Sample, x: PETSc.Vec, state: CellWorkspace) -> dict[str, np.ndarray]:
        """Return ``{"u": temperature}`` on the root, ``{}`` elsewhere. Collective."""
        u = state.gather(x)
        return {} if u is None else {"u": u}
