"""Poisson's equation, or steady heat conduction, on an unstructured mesh with named groups.

    -div(k grad u) = f        in the domain, k and f by cell group
    u = g                     on the groups of ``dirichlet``
    k du/dn = q               on the groups of ``neumann``   (q > 0 flows in)
    k du/dn = c (w - u)       on the groups of ``robin``     (coefficient c, ambient w)

Boundary groups without data are insulated. f, g, q and w are numbers, ranges ``[low, high]`` that
every sample draws from, uniformly, or expansions in space with random coefficients
(:mod:`.data`); k is a number or a range by cell group, c a number. Elements are linear or quadratic
(:mod:`.fem`).

Without ranges of k all samples share one matrix, symmetric positive definite, and the right-hand
side is ``b_0 + sum_p mu_p b_p`` with vectors made once: a sample costs one small matrix-vector
product. With Q of them, ``A(mu) = A_0 + sum_q theta_q A_q``: a sample costs Q sums of arrays of
matrix values besides, and systems carry the parts (``LinearSystem.affine``).

Learners see the solution resampled on a structured grid over the mesh's bounding box, zero outside
the domain, with the input field ``inside`` (1 or 0) that tells them where that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from simlab.core.comm import agreement
from simlab.core.config import settings
from simlab.core.errors import ConfigError
from simlab.core.samples import Sample
from simlab.linalg import petsc as PETSc
from simlab.linalg.system import Affine, LinearSystem, Traits
from simlab.mesh.generate import MeshSource, load
from simlab.mesh.mesh import Mesh
from simlab.mesh.remap import Location, grid_axes, interpolation, locate
from simlab.problems.data import (
    Conductivity,
    Expansion,
    Number,
    Value,
    Values,
    arc_coordinate,
    x_coordinate,
)
from simlab.problems.family import families
from simlab.problems.fem import Data, Elliptic, Space, check_regular
from simlab.problems.spaces import Box, Product
from simlab.store.schema import Axis, Boundary, FieldSpec, Resampling, Schema

if TYPE_CHECKING:
    from mpi4py import MPI
    from petsc4py.PETSc import Scatter, Vec

__all__ = ["Poisson", "Robin"]

_RESAMPLING = "finite element solution evaluated at the grid points"


@settings
class Robin:
    """Exchange with the surroundings: ``k du/dn = coefficient (ambient - u)``.

    Attributes
    ----------
    coefficient : float
        Positive; the same for every sample, as it is part of the matrix.
    ambient : float, [low, high] or expansion
    """

    coefficient: PositiveFloat
    ambient: Value = 0.0


@dataclass(frozen=True, eq=False)
class FixedField:
    """An input field that is the same for every sample."""

    name: str
    values: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """The field's name."""
        return (self.name,)

    def sample(self, n: int, seed: int, start: int = 0) -> list[Sample]:
        """Return samples ``start .. start + n - 1``."""
        fields = {self.name: self.values}
        return [Sample(index, seed, {}, fields) for index in range(start, start + n)]

    def contains(self, mu: Sample) -> bool:
        """Return whether the sample holds this field."""
        values = mu.fields.get(self.name)
        return values is not None and np.array_equal(values, self.values)


@dataclass(frozen=True)
class Datum:
    """One number behind the right-hand side: where it acts, and on which function.

    Attributes
    ----------
    value : float or (low, high)
    table : {"source", "dirichlet", "neumann", "robin"}
    group : str
        Empty for a source everywhere.
    expansion : Expansion, optional
        Whose coefficient ``term`` the number is; otherwise the function is 1.
    """

    value: Number
    table: str
    group: str
    expansion: Expansion | None = None
    term: str = ""


@dataclass(eq=False)
class Workspace:
    """The matrix, the vectors that right-hand sides are combined from, and the way to the root."""

    operator: Elliptic
    columns: np.ndarray  # rank-local rows, shape (n_own, n_columns)
    factors: np.ndarray  # which theta and which mu each column is multiplied by, (n_columns, 2)
    b: Vec
    to_root: Scatter
    at_root: Vec
    resample: Any  # csr_array on the root
    shape: tuple[int, ...] = field(default=())

    def destroy(self) -> None:
        """Free PETSc objects. Collective."""
        self.to_root.destroy()
        for item in (self.at_root, self.b, self.operator):
            item.destroy()


@families.register("poisson")
class Poisson:
    """Poisson's equation on a mesh.

    Parameters of a sample are the values given as ranges, named after their place in the case:
    ``"dirichlet.bore"``, ``"robin.air"`` (the ambient value), ``"source"`` or ``"source.chip"``,
    ``"conductivity.chip"``; and the coefficients of expansions: ``"dirichlet.top.c3"``.

    Attributes
    ----------
    mesh : str or table
        Mesh file, anything meshio reads, triangles in a plane or tetrahedra; or a mesh made on the
        spot, ``{ kind = "square", size = 0.02 }`` (:mod:`simlab.mesh.generate`).
    dirichlet : table of float, [low, high] or expansion
        Values by boundary group; where two groups meet, the one named first decides. The group
        ``boundary`` is the whole boundary.
    neumann : table of float, [low, high] or expansion
        Inward fluxes by boundary group.
    robin : table of Robin
        ``{coefficient = 5.0, ambient = [15.0, 25.0]}`` by boundary group.
    source : float, [low, high] or expansion, or table of them
        f, everywhere or by cell group (zero in groups not named, a sum where groups overlap).
    conductivity : float, [low, high], or table of them
        k, everywhere or by cell group (every cell in exactly one). Ranges make the matrix vary.
    degree : {1, 2}
        Linear or quadratic elements.
    grid : tuple of int
        Points of the structured grid along each axis.

    Examples
    --------
    >>> family = Poisson(mesh="cases/meshes/bracket.msh", dirichlet={"bore": [60.0, 90.0]})
    >>> family.space.names
    ('dirichlet.bore', 'inside')
    """

    mesh: MeshSource
    dirichlet: dict[str, Value] = Field(default_factory=dict)
    neumann: dict[str, Value] = Field(default_factory=dict)
    robin: dict[str, Robin] = Field(default_factory=dict)
    source: Values = 0.0
    conductivity: Conductivity = 1.0
    degree: Literal[1, 2] = 1
    grid: tuple[PositiveInt, ...] = (64, 64)

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults: list[str] = []
        if not self.dirichlet and not self.robin:
            faults.append(
                "dirichlet: neither dirichlet nor robin data, so the solution is not unique; "
                "hold at least one boundary group"
            )
        places: dict[str, list[str]] = {}
        for place in ("dirichlet", "neumann", "robin"):
            for name in getattr(self, place):
                places.setdefault(name, []).append(place)
        faults += [
            f"{where[1]}.{name}: the group has {where[0]} data already; keep one of them"
            for name, where in places.items()
            if len(where) > 1
        ]
        if faults:
            raise ConfigError(faults)
        return self

    @property
    def steps(self) -> int:
        """One linear system per sample."""
        return 1

    @cached_property
    def data(self) -> dict[str, Datum]:
        """Every number that enters the right-hand side, by name."""
        given: list[tuple[str, str, Any]] = []
        if isinstance(self.source, dict):
            given += [("source", name, value) for name, value in self.source.items()]
        else:
            given.append(("source", "", self.source))
        given += [("dirichlet", name, value) for name, value in self.dirichlet.items()]
        given += [("neumann", name, value) for name, value in self.neumann.items()]
        given += [("robin", name, entry.ambient) for name, entry in self.robin.items()]
        found: dict[str, Datum] = {}
        for table, group, value in given:
            name = f"{table}.{group}" if group else table
            if isinstance(value, float | tuple):
                found[name] = Datum(value, table, group)
                continue
            for term, number in value.coefficients.items():
                found[f"{name}.{term}"] = Datum(number, table, group, value, term)
        return found

    @cached_property
    def conductivities(self) -> dict[str, Number]:
        """Every conductivity by name: ``"conductivity"`` or ``"conductivity.<cell group>"``."""
        if isinstance(self.conductivity, dict):
            return {f"conductivity.{name}": k for name, k in self.conductivity.items()}
        return {"conductivity": self.conductivity}

    @cached_property
    def varying(self) -> tuple[str, ...]:
        """Names of the conductivities that samples draw."""
        return tuple(name for name, k in self.conductivities.items() if isinstance(k, tuple))

    @cached_property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The values that samples draw, with their bounds; conductivities last."""
        numbers = {name: datum.value for name, datum in self.data.items()} | self.conductivities
        return {name: value for name, value in numbers.items() if isinstance(value, tuple)}

    @cached_property
    def space(self) -> Product:
        """Uniform values in the ranges, and where the grid is inside the domain."""
        inside = FixedField("inside", _located(load(self.mesh), self.grid).inside())
        return Product((Box(self.ranges), inside) if self.ranges else (inside,))

    @cached_property
    def schema(self) -> Schema:
        """Structured grid over the bounding box, mesh, and the solution on both."""
        mesh = load(self.mesh)
        axes = tuple(
            Axis(name, tuple(values.tolist()))
            for name, values in zip("xyz", _axes(mesh, self.grid), strict=False)
        )
        numbers = {name: datum.value for name, datum in self.data.items()} | self.conductivities
        constants = {name: value for name, value in numbers.items() if not isinstance(value, tuple)}
        constants |= {
            f"robin.{n}.coefficient": entry.coefficient for n, entry in self.robin.items()
        }
        return Schema(
            name="poisson",
            axes=axes,
            fields=(
                FieldSpec("inside", "input", long_name="1 inside the domain, 0 outside"),
                FieldSpec(
                    "u",
                    long_name="solution on the grid, 0 outside the domain",
                    resampling=Resampling("u_mesh", _RESAMPLING, inside="inside"),
                ),
                FieldSpec("u_mesh", long_name="solution at mesh vertices", location="vertex"),
            ),
            parameters=dict.fromkeys(self.ranges, "1"),
            constants=constants,
            boundaries=tuple(Boundary(axis.name, "wall") for axis in axes),
            mesh=mesh.stored(),
        )

    def validate(self) -> None:
        """Check the mesh, the groups and the grid, or raise ConfigError with every fault."""
        mesh = load(self.mesh)
        faults = [
            f"{name}: a group whose name holds a slash cannot name a parameter; rename it"
            for name in self.ranges
            if "/" in name
        ]
        _collect(faults, "", self._check_grid, mesh)
        for table in ("dirichlet", "neumann", "robin"):
            for name in getattr(self, table):
                _collect(faults, f"{table}.{name}: ", mesh.facet_group, name)
        for table in ("source", "conductivity"):
            value = getattr(self, table)
            for name in value if isinstance(value, dict) else ():
                _collect(faults, f"{table}.{name}: ", mesh.cell_group, name)
        if not faults:
            _collect(faults, "", check_regular, mesh, [*self.dirichlet, *self.robin])
            _collect(faults, "conductivity: ", self._by_group, mesh)
            self._check_expansions(faults, mesh)
        if faults:
            raise ConfigError(faults)

    def _check_grid(self, mesh: Mesh) -> None:
        if not len(_located(mesh, self.grid).points):
            raise ConfigError(
                f"grid: no point of {list(self.grid)} lies inside {mesh.source}; refine it"
            )

    def _check_expansions(self, faults: list[str], mesh: Mesh) -> None:
        checked = {(datum.table, datum.group): datum for datum in self.data.values()}
        for (table, group), datum in checked.items():
            if datum.expansion is not None:
                where = f"{table}.{group}: " if group else f"{table}: "
                _collect(faults, where, datum.expansion.check, mesh)
                if datum.expansion.needs_coordinate:
                    _collect(faults, where, _coordinate, mesh, table, group)

    def setup(self, comm: MPI.Comm) -> Workspace:
        """Read the mesh, assemble the matrix and the parts of right-hand sides. Collective."""
        with agreement(comm):
            mesh = load(self.mesh)
            space = Space(mesh, self.degree)
            by_group = self._by_group(mesh)
        varying = [by_group.pop(name) for name in self.varying]
        rest = sum(k * self.conductivities[name] for name, k in by_group.items())
        robin = {name: entry.coefficient for name, entry in self.robin.items()}
        operator = Elliptic(
            comm, space, rest if by_group else None, robin, tuple(self.dirichlet), varying
        )
        b = operator.A.createVecRight()
        columns, factors = self._columns(operator, b.getLocalSize())
        to_root, at_root = PETSc.Scatter.toZero(b)
        resample = None
        if comm.rank == 0:
            location = _located(mesh, self.grid)
            resample = interpolation(location, space.cell_dofs, space.n_dofs, self.degree)
        return Workspace(operator, columns, factors, b, to_root, at_root, resample, self.grid)

    def assemble(
        self, mu: Sample, state: Workspace, step: int = 0, previous: Vec | None = None
    ) -> LinearSystem:
        """Combine the right-hand side of a sample, and its matrix where it varies. Collective."""
        operator = state.operator
        values = [1.0, *(mu.parameters[name] for name in self.ranges)]
        n_mu = len(values) - len(self.varying)
        theta = np.array([1.0, *values[n_mu:]])
        weights = theta[state.factors[:, 0]] * np.array(values[:n_mu])[state.factors[:, 1]]
        with state.b as b:
            np.matmul(state.columns, weights, out=b)
        affine = None
        if self.varying:
            affine = Affine(operator.combine(theta[1:]), operator.terms)
        traits = Traits(spd=True, symmetric=True, constant_matrix=not self.varying)
        return LinearSystem(operator.A, state.b, traits, mu, mu.index, affine)

    def observe(self, mu: Sample, x: Vec, state: Workspace) -> dict[str, np.ndarray]:
        """Return ``u`` on the grid and ``u_mesh`` at the vertices, on the root. Collective."""
        state.to_root.scatter(x, state.at_root)
        if state.resample is None:
            return {}
        values = state.at_root.getArray(readonly=True)
        return {
            "u": (state.resample @ values).reshape(state.shape),
            "u_mesh": state.operator.space.natural(values),
        }

    def _columns(self, operator: Elliptic, n_own: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the parts of right-hand sides, and what multiplies each. Collective.

        Returns
        -------
        columns : ndarray, shape (n_own, n_columns), Fortran order
        factors : ndarray of int64, shape (n_columns, 2)
            Numbers of a conductivity and of a parameter, both from 1; 0 stands for the factor 1.
        """
        drawn = [name for name, datum in self.data.items() if isinstance(datum.value, tuple)]
        place = {name: i for i, name in enumerate(drawn, 1)}
        made: dict[tuple[int, int], np.ndarray] = {}
        for name, datum in self.data.items():
            if datum.value == 0.0:
                continue
            scale = 1.0 if isinstance(datum.value, tuple) else datum.value
            terms = range(len(operator.terms)) if datum.table == "dirichlet" else (0,)
            for term in terms:
                part = _unit(operator, datum, term)
                q = term + 1 - operator.n_fixed if datum.table == "dirichlet" else 0
                if part.norm() > 0:
                    column = made.setdefault((q, place.get(name, 0)), np.zeros(n_own))
                    column += scale * part.getArray(readonly=True)
                part.destroy()
        columns = np.zeros((n_own, len(made)), order="F")
        for i, column in enumerate(made.values()):
            columns[:, i] = column
        return columns, np.array(list(made), dtype=np.int64).reshape(-1, 2)

    def _by_group(self, mesh: Mesh) -> dict[str, np.ndarray]:
        """Return 1 on the cells of each conductivity and 0 elsewhere, shape (n_cells, 1).

        Raises
        ------
        ConfigError
            When a cell is in none of the groups, or in several.
        """
        if not isinstance(self.conductivity, dict):
            return {"conductivity": np.ones((len(mesh.cells), 1))}
        found = {f"conductivity.{name}": _on_cells(mesh, {name: 1.0}) for name in self.conductivity}
        count = np.sum(list(found.values()), axis=0)
        for wrong, text in ((count == 0, "in none"), (count > 1, "in more than one")):
            if np.any(wrong):
                raise ConfigError(
                    f"{int(np.sum(wrong))} of {len(count)} cells of {mesh.source} are {text} of "
                    f"the groups {', '.join(self.conductivity)} (it has: "
                    f"{', '.join(mesh.cell_groups)}); name each cell's group once"
                )
        return found


def _unit(operator: Elliptic, datum: Datum, term: int) -> Vec:
    """Return the right-hand side that a number is multiplied by. Collective.

    For Dirichlet data it belongs to one term of the matrix.
    """
    space = operator.space
    function: Data = 1.0
    if datum.expansion is not None:
        t = np.zeros(len(space.mesh.points))
        if datum.expansion.needs_coordinate:
            t = _coordinate(space.mesh, datum.table, datum.group)
        function = datum.expansion.term(datum.term, space, t)
    if datum.table == "dirichlet":
        return operator.fixed(datum.group, function, term)
    if datum.table == "neumann":
        return operator.flux(datum.group, function)
    if datum.table == "robin":
        return operator.ambient(datum.group, function)
    inside = _on_cells(space.mesh, {datum.group: 1.0}) if datum.group else 1.0
    return operator.source(function, inside)


def _coordinate(mesh: Mesh, table: str, group: str) -> np.ndarray:
    return x_coordinate(mesh, group) if table == "source" else arc_coordinate(mesh, group)


def _axes(mesh: Mesh, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    if len(shape) != mesh.dim:
        raise ConfigError(f"grid: {len(shape)} axes, but {mesh.source} has {mesh.dim}")
    return grid_axes(mesh, shape)


@lru_cache(maxsize=8)
def _located(mesh: Mesh, shape: tuple[int, ...]) -> Location:
    return locate(mesh, _axes(mesh, shape))


def _on_cells(mesh: Mesh, table: Mapping[str, float]) -> np.ndarray:
    """Return values by cell, shape (n_cells, 1), zero where no group of the table is."""
    values = np.zeros((len(mesh.cells), 1))
    for name, value in table.items():
        values[mesh.cell_group(name)] = value
    return values


def _collect(faults: list[str], prefix: str, check: Callable[..., Any], *arguments: Any) -> None:
    """Run a check and keep the faults it raises."""
    try:
        check(*arguments)
    except ConfigError as error:
        faults += [prefix + fault for fault in error.faults]
