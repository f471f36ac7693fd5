"""Poisson's equation, or steady heat conduction, on an unstructured mesh with named groups.

    -div(k grad u) = f        in the domain, k and f by cell group
    u = g                     on the groups of ``dirichlet``
    k du/dn = q               on the groups of ``neumann``   (q > 0 flows in)
    k du/dn = c (w - u)       on the groups of ``robin``     (coefficient c, ambient w)

Boundary groups without data are insulated. f, g, q and w are numbers, or ranges ``[low, high]``
that every sample draws from, uniformly; k and c are numbers. So all samples share one matrix,
symmetric positive definite (linear or quadratic elements, :mod:`.fem`), and the right-hand side is
``b_0 + sum_p mu_p b_p`` with vectors made once: a sample costs one small matrix-vector product.

Learners see the solution resampled on a structured grid over the mesh's bounding box, zero outside
the domain, with the input field ``inside`` (1 or 0) that tells them where that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

import numpy as np
from pydantic import Field, PlainValidator, PositiveFloat, PositiveInt, model_validator

from simlab.core.comm import agreement
from simlab.core.config import settings
from simlab.core.errors import ConfigError
from simlab.core.samples import Sample
from simlab.linalg import petsc as PETSc
from simlab.linalg.system import LinearSystem, Traits
from simlab.mesh.files import read
from simlab.mesh.mesh import Mesh
from simlab.mesh.remap import Location, grid_axes, interpolation, locate
from simlab.problems.family import families
from simlab.problems.fem import Elliptic, Space, check_regular
from simlab.problems.spaces import Box, Product
from simlab.store.schema import Axis, Boundary, FieldSpec, Schema

if TYPE_CHECKING:
    from mpi4py import MPI
    from petsc4py.PETSc import Scatter, Vec

__all__ = ["Poisson", "Robin"]

_TRAITS = Traits(spd=True, symmetric=True, constant_matrix=True)


def _value(given: Any) -> float | tuple[float, float]:
    """Read a number or a range."""
    pair = isinstance(given, list | tuple) and len(given) == 2
    parts = given if pair else [given]
    if all(isinstance(part, Real) and not isinstance(part, bool) for part in parts):
        numbers = [float(part) for part in parts]
        if np.all(np.isfinite(numbers)) and (not pair or numbers[0] < numbers[1]):
            return (numbers[0], numbers[1]) if pair else numbers[0]
    raise ConfigError(f"expected a finite number or [low, high] with low < high, found {given!r}")


def _values(given: Any) -> float | tuple[float, float] | dict[str, Any]:
    """Read a number, a range, or a table of them by cell group."""
    if isinstance(given, Mapping):
        return {str(name): _value(entry) for name, entry in given.items()}
    return _value(given)


def _positive(given: Any) -> float | dict[str, float]:
    """Read a positive number or a table of them by cell group."""
    table = _values(given)
    for entry in table.values() if isinstance(table, dict) else [table]:
        if isinstance(entry, tuple):
            raise ConfigError(
                f"a range {list(entry)} would change the matrix from sample to sample; "
                "give one number"
            )
        if entry <= 0:
            raise ConfigError(f"must be positive, found {entry:g}")
    return table  # type: ignore[return-value]


Value: TypeAlias = Annotated[float | tuple[float, float], PlainValidator(_value)]
Values: TypeAlias = Annotated[
    float | tuple[float, float] | dict[str, float | tuple[float, float]], PlainValidator(_values)
]
Conductivity: TypeAlias = Annotated[float | dict[str, float], PlainValidator(_positive)]


@settings
class Robin:
    """Exchange with the surroundings: ``k du/dn = coefficient (ambient - u)``.

    Attributes
    ----------
    coefficient : float
        Positive; the same for every sample, as it is part of the matrix.
    ambient : float or (low, high)
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


@dataclass(eq=False)
class Workspace:
    """The matrix, the vectors that right-hand sides are combined from, and the way to the root."""

    operator: Elliptic
    columns: np.ndarray  # rank-local rows, shape (n_own, 1 + number of parameters)
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
    """Poisson's equation on a mesh file.

    Parameters of a sample are the values given as ranges, named after their place in the case:
    ``"dirichlet.bore"``, ``"robin.air"`` (the ambient value), ``"source"`` or ``"source.chip"``.

    Attributes
    ----------
    mesh : str
        Mesh file, anything meshio reads; triangles in a plane or tetrahedra.
    dirichlet : table of float or [low, high]
        Values by boundary group; where two groups meet, the one named first decides. The group
        ``boundary`` is the whole boundary.
    neumann : table of float or [low, high]
        Inward fluxes by boundary group.
    robin : table of Robin
        ``{coefficient = 5.0, ambient = [15.0, 25.0]}`` by boundary group.
    source : float, [low, high], or table of them
        f, everywhere or by cell group (zero in groups not named, a sum where groups overlap).
    conductivity : float or table of float
        k, everywhere or by cell group (every cell in exactly one).
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

    mesh: str
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
    def data(self) -> dict[str, float | tuple[float, float]]:
        """Every value that enters the right-hand side, by name."""
        found: dict[str, float | tuple[float, float]] = {}
        if isinstance(self.source, dict):
            found |= {f"source.{name}": value for name, value in self.source.items()}
        else:
            found["source"] = self.source
        found |= {f"dirichlet.{name}": value for name, value in self.dirichlet.items()}
        found |= {f"neumann.{name}": value for name, value in self.neumann.items()}
        return found | {f"robin.{name}": entry.ambient for name, entry in self.robin.items()}

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The values that samples draw, with their bounds."""
        return {name: value for name, value in self.data.items() if isinstance(value, tuple)}

    @cached_property
    def space(self) -> Product:
        """Uniform values in the ranges, and where the grid is inside the domain."""
        inside = FixedField("inside", _located(read(self.mesh), self.grid).inside())
        return Product((Box(self.ranges), inside) if self.ranges else (inside,))

    @cached_property
    def schema(self) -> Schema:
        """Structured grid over the bounding box, mesh, and the solution on both."""
        mesh = read(self.mesh)
        axes = tuple(
            Axis(name, tuple(values.tolist()))
            for name, values in zip("xyz", _axes(mesh, self.grid), strict=False)
        )
        constants = {
            name: value for name, value in self.data.items() if not isinstance(value, tuple)
        }
        if isinstance(self.conductivity, dict):
            constants |= {f"conductivity.{name}": k for name, k in self.conductivity.items()}
        else:
            constants["conductivity"] = self.conductivity
        constants |= {
            f"robin.{n}.coefficient": entry.coefficient for n, entry in self.robin.items()
        }
        return Schema(
            name="poisson",
            axes=axes,
            fields=(
                FieldSpec("inside", "input", long_name="1 inside the domain, 0 outside"),
                FieldSpec("u", long_name="solution on the grid, 0 outside the domain"),
                FieldSpec("u_mesh", long_name="solution at mesh vertices", location="vertex"),
            ),
            parameters=dict.fromkeys(self.ranges, "1"),
            constants=constants,
            boundaries=tuple(Boundary(axis.name, "wall") for axis in axes),
            mesh=mesh.stored(),
        )

    def validate(self) -> None:
        """Check the mesh, the groups and the grid, or raise ConfigError with every fault."""
        mesh = read(self.mesh)
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
            _collect(faults, "conductivity: ", self._conductivities, mesh)
        if faults:
            raise ConfigError(faults)

    def _check_grid(self, mesh: Mesh) -> None:
        if not len(_located(mesh, self.grid).points):
            raise ConfigError(
                f"grid: no point of {list(self.grid)} lies inside {mesh.source}; refine it"
            )

    def setup(self, comm: MPI.Comm) -> Workspace:
        """Read the mesh, assemble the matrix and the parts of right-hand sides. Collective."""
        with agreement(comm):
            mesh = read(self.mesh)
            space = Space(mesh, self.degree)
            conductivity = self._conductivities(mesh)
        robin = {name: entry.coefficient for name, entry in self.robin.items()}
        operator = Elliptic(comm, space, conductivity, robin, tuple(self.dirichlet))
        b = operator.A.createVecRight()
        columns = np.zeros((b.getLocalSize(), 1 + len(self.ranges)))
        place = {name: i for i, name in enumerate(self.ranges, 1)}
        for name, value in self.data.items():
            if value == 0.0:
                continue
            part = self._unit(operator, name)
            factor = 1.0 if isinstance(value, tuple) else value
            columns[:, place.get(name, 0)] += factor * part.getArray(readonly=True)
            part.destroy()
        to_root, at_root = PETSc.Scatter.toZero(b)
        resample = None
        if comm.rank == 0:
            location = _located(mesh, self.grid)
            resample = interpolation(location, space.cell_dofs, space.n_dofs, self.degree)
        return Workspace(operator, columns, b, to_root, at_root, resample, self.grid)

    def assemble(
        self, mu: Sample, state: Workspace, step: int = 0, previous: Vec | None = None
    ) -> LinearSystem:
        """Combine the right-hand side of a sample; the matrix stays as it is. Collective."""
        theta = np.array([1.0, *(mu.parameters[name] for name in self.ranges)])
        with state.b as values:
            np.matmul(state.columns, theta, out=values)
        return LinearSystem(state.operator.A, state.b, _TRAITS, mu, mu.index)

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

    def _unit(self, operator: Elliptic, name: str) -> Vec:
        """Return the right-hand side of one value of :attr:`data` set to one. Collective."""
        table, _, group = name.partition(".")
        if table == "source":
            mesh = operator.space.mesh
            return operator.source(_on_cells(mesh, {group: 1.0}) if group else 1.0)
        make: Mapping[str, Callable[[str, float], Vec]] = {
            "dirichlet": operator.fixed,
            "neumann": operator.flux,
            "robin": operator.ambient,
        }
        return make[table](group, 1.0)

    def _conductivities(self, mesh: Mesh) -> float | np.ndarray:
        """Return k as :class:`~.fem.Elliptic` takes it, or raise ConfigError."""
        if not isinstance(self.conductivity, dict):
            return self.conductivity
        count = np.zeros(len(mesh.cells), dtype=np.int64)
        for name in self.conductivity:
            count[mesh.cell_group(name)] += 1
        for number, text in ((0, "in none"), (2, "in more than one")):
            n_cells = int(np.sum(count == 0 if number == 0 else count >= number))
            if n_cells:
                raise ConfigError(
                    f"{n_cells} of {len(count)} cells of {mesh.source} are {text} of the groups "
                    f"{', '.join(self.conductivity)} (it has: {', '.join(mesh.cell_groups)}); "
                    "name each cell's group once"
                )
        return _on_cells(mesh, self.conductivity)


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
