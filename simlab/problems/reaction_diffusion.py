"""Waves in an excitable medium: the FitzHugh-Nagumo equations in an insulated square.

    u_t = D lap u + u - u^3 - v          activator, du/dn = 0 on the walls
    v_t = eps (u + kappa - gamma v)      recovery, does not diffuse; v = 0 at first

on the unit square; ``u`` is at first ``tanh`` of a Gaussian random field. Cell-centred finite
volumes (:mod:`.grid`) and one linear system per step: diffusion implicit, reaction explicit,
recovery implicit from the new ``u`` cell by cell (cell volume ``h^2``),

    (h^2 I + dt D K) u_new = h^2 (u + dt (u - u^3 - v))
    v_new = (v + dt eps (u_new + kappa)) / (1 + dt eps gamma)

Second order in space, first in time. The explicit reaction keeps ``u`` bounded, whatever the grid,
while ``|u| < sqrt(1 + 2 / dt)`` to begin with: 3.3 for ``dt = 0.2``. The matrix never changes,
neither between steps nor between samples. ``eps`` and ``kappa`` are drawn.

The workspace remembers ``v`` on this rank's cells, so the steps of a sample come in order; the same
step may be assembled again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np
from annotated_types import Ge
from pydantic import FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from simlab.core.errors import ConfigError
from simlab.core.samples import Sample, generator
from simlab.linalg.system import LinearSystem, StructuredGrid, Traits
from simlab.problems.family import families
from simlab.problems.fields import gaussian
from simlab.problems.grid import CellWorkspace, cell_axes
from simlab.problems.spaces import Box, Product
from simlab.store.schema import Boundary, FieldSpec, Schema

if TYPE_CHECKING:
    from mpi4py import MPI
    from petsc4py import PETSc

__all__ = ["Patches", "ReactionDiffusion"]


@dataclass(frozen=True)
class Patches:
    """Fields ``name`` of patches near -1 and 1, ``tanh(scale g)``.

    Attributes
    ----------
    alpha, tau : float
        Smoothness and inverse length scale of ``g``, a Gaussian random field with Neumann spectrum
        (:func:`simlab.problems.fields.gaussian`).
    scale : float
        Sharpness of the patches' edges.
    """

    name: str
    shape: tuple[int, ...]
    alpha: float
    tau: float
    scale: float

    @property
    def names(self) -> tuple[str, ...]:
        """The field's name."""
        return (self.name,)

    def sample(self, n: int, seed: int, start: int = 0) -> list[Sample]:
        """Return samples ``start .. start + n - 1``."""
        made = []
        for index in range(start, start + n):
            random = generator(seed, index, f"field {self.name}")
            values = gaussian(self.shape, random, "neumann", self.alpha, self.tau)
            made.append(Sample(index, seed, {}, {self.name: np.tanh(self.scale * values)}))
        return made

    def contains(self, mu: Sample) -> bool:
        """Return whether the field has the right shape and lies between -1 and 1."""
        u = mu.fields.get(self.name)
        return u is not None and u.shape == self.shape and bool(np.all(np.abs(u) <= 1))


class _Medium:
    """Grid, matrix and vectors, and the recovery at the beginning of the step at hand."""

    def __init__(self, comm: MPI.Comm, cells: int) -> None:
        self.cells = CellWorkspace(comm, (cells, cells), insulated=True)
        self.spare = self.cells.b.duplicate()
        self.v = np.zeros(self.cells.local_shape)
        self.at: tuple[int, int, int] | None = None  # seed and index of the sample, step

    def destroy(self) -> None:
        """Free PETSc objects. Collective."""
        self.spare.destroy()
        self.cells.destroy()


@families.register("reaction_diffusion")
class ReactionDiffusion:
    """FitzHugh-Nagumo: the initial activator ``u0`` and two numbers in, ``u`` and ``v`` over time.

    Parameters of a sample: ``eps`` (rate of recovery) and ``kappa`` (offset of recovery).

    Attributes
    ----------
    cells : int
        Cells along each axis.
    dt : float
        Time step, at most 0.5.
    n_steps : int
        Steps per sample; every one is stored.
    diffusivity : float
        ``D``: fronts are about ``sqrt(8 D)`` wide and want a few cells.
    gamma : float
    eps, kappa : (float, float)
        Bounds.
    alpha, tau, scale : float
        Smoothness, inverse length scale and sharpness of the patches of ``u0``.

    Examples
    --------
    >>> family = ReactionDiffusion(cells=8, n_steps=3)
    >>> family.schema.times, family.space.names
    ((0.2, 0.4, 0.6), ('eps', 'kappa', 'u0'))
    """

    cells: Annotated[int, Ge(2)] = 64
    dt: PositiveFloat = 0.2
    n_steps: PositiveInt = 50
    diffusivity: PositiveFloat = 5e-4
    gamma: NonNegativeFloat = 0.5
    eps: tuple[PositiveFloat, PositiveFloat] = (0.05, 0.3)
    kappa: tuple[FiniteFloat, FiniteFloat] = (-0.3, 0.3)
    alpha: PositiveFloat = 2.0
    tau: PositiveFloat = 12.0
    scale: PositiveFloat = 4.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = [
            f"{name}: expected [low, high] with low < high, found {low} >= {high}"
            for name, (low, high) in {"eps": self.eps, "kappa": self.kappa}.items()
            if low >= high
        ]
        if self.dt > 0.5:
            faults.append(f"dt: the explicit reaction is unstable above 0.5, found {self.dt}")
        if faults:
            raise ConfigError(faults)
        return self

    @property
    def steps(self) -> int:
        """Linear systems per sample."""
        return self.n_steps

    @cached_property
    def space(self) -> Product:
        """Two numbers and the initial activator."""
        shape = (self.cells, self.cells)
        initial = Patches("u0", shape, self.alpha, self.tau, self.scale)
        return Product((Box({"eps": self.eps, "kappa": self.kappa}), initial))

    @cached_property
    def schema(self) -> Schema:
        """Grid, times, the initial activator, and both fields over time."""
        axes = cell_axes((self.cells, self.cells))
        return Schema(
            name="reaction_diffusion",
            axes=axes,
            fields=(
                FieldSpec("u0", "input", long_name="initial activator"),
                FieldSpec("u", long_name="activator"),
                FieldSpec("v", long_name="recovery"),
            ),
            times=tuple(float(round(self.dt * k, 12)) for k in range(1, self.n_steps + 1)),
            parameters={"eps": "1", "kappa": "1"},
            constants={"diffusivity": self.diffusivity, "gamma": self.gamma, "dt": self.dt},
            boundaries=tuple(Boundary(axis.name, "wall") for axis in axes),
            initial={"u": "u0", "v": 0.0},
        )

    @cached_property
    def traits(self) -> Traits:
        """What holds for the one matrix of this family."""
        grid = StructuredGrid((self.cells, self.cells), "neumann")
        return Traits(spd=True, symmetric=True, constant_matrix=True, grid=grid)

    def validate(self) -> None:
        """Nothing outside the settings can be wrong."""

    def setup(self, comm: MPI.Comm) -> _Medium:
        """Make grid, the matrix with its values, and vectors. Collective."""
        medium = _Medium(comm, self.cells)
        medium.cells.assemble(self.dt * self.diffusivity, reaction=1.0)
        return medium

    def assemble(
        self, mu: Sample, state: _Medium, step: int = 0, previous: PETSc.Vec | None = None
    ) -> LinearSystem:
        """Fill the right-hand side from the activator before. Collective.

        ``previous`` is None in the first step, which starts from ``mu``'s field ``u0``.

        Raises
        ------
        ValueError
            When the step before was not assembled before.
        """
        cells, at = state.cells, (mu.seed, mu.index, step)
        if previous is None:
            u = cells.field("initial activator u0", mu.fields["u0"])[cells.own]
            state.v[...] = 0.0
        else:
            u = previous.getArray(readonly=True).reshape(cells.local_shape)
            if state.at == (mu.seed, mu.index, step - 1):
                state.v = self._recovered(mu, u, state.v)
            elif state.at != at:
                raise ValueError(f"step {step} of sample {mu.index} comes after step {step - 1}")
        state.at = at
        with cells.b as flat:
            b = flat.reshape(cells.local_shape)
            b[...] = cells.volume * (u + self.dt * (u - u**3 - state.v))
        return LinearSystem(cells.A, cells.b, self.traits, mu, mu.index)

    def observe(self, mu: Sample, x: PETSc.Vec, state: _Medium) -> dict[str, np.ndarray]:
        """Return both fields at the end of the step at hand on the root, ``{}`` elsewhere.

        Collective.
        """
        cells = state.cells
        new = self._recovered(mu, x.getArray(readonly=True).reshape(cells.local_shape), state.v)
        with state.spare as flat:
            flat[...] = new.ravel()
        u, v = cells.gather(x), cells.gather(state.spare)
        return {} if u is None or v is None else {"u": u, "v": v}

    def _recovered(self, mu: Sample, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the recovery one step on, where the activator is ``u`` by then."""
        rate = self.dt * mu.parameters["eps"]
        return np.asarray((v + rate * (u + mu.parameters["kappa"])) / (1.0 + rate * self.gamma))
