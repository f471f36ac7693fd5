"""What boundary data, sources and conductivities can be in a case.

A value is a number, a range ``[low, high]`` that every sample draws from, or an *expansion* in
space: a table with a ``kind`` whose coefficients are numbers or ranges again.

    dirichlet = { left = 1.0, right = [0.0, 2.0], top = { kind = "chebyshev", degree = 5 } }

Expansions on a boundary group run along the group's own arc coordinate: t = -1 at one end, t = 1 at
the other, t linear in the length between; the end with the smaller x (then y) comes first. Sources
run along x: t = -1 and 1 at the smallest and largest x of the cells concerned.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.polynomial import Chebyshev as ChebyshevT
from pydantic import Field, PlainValidator

from simlab.core.config import Registry
from simlab.core.errors import ConfigError
from simlab.mesh.mesh import Mesh
from simlab.problems.fem import Along, Data, Space

__all__ = [
    "Chebyshev",
    "Conductivity",
    "Expansion",
    "Number",
    "Value",
    "Values",
    "Vertices",
    "arc_coordinate",
    "expansions",
    "x_coordinate",
]

Number: TypeAlias = float | tuple[float, float]
"""A number, or the ends of a range."""


class Expansion(Protocol):
    """Data ``sum_k c_k phi_k`` with few coefficients.

    Attributes
    ----------
    needs_coordinate : bool
        Whether the functions are functions of t.
    """

    needs_coordinate: ClassVar[bool]

    @property
    def coefficients(self) -> dict[str, Number]:
        """Number or range of every coefficient, by name."""
        ...

    def check(self, mesh: Mesh) -> None:
        """Raise ConfigError when the data do not fit a mesh."""
        ...

    def term(self, name: str, space: Space, coordinate: np.ndarray) -> Data:
        """Return the function that coefficient ``name`` multiplies.

        ``coordinate`` is t at every vertex of the mesh, shape (n_points,).
        """
        ...


expansions: Registry[Expansion] = Registry("expansion", "simlab.problems.data")


def _number(given: Any) -> Number:
    """Read a number or a range."""
    pair = isinstance(given, list | tuple) and len(given) == 2
    parts = given if pair else [given]
    if all(isinstance(part, Real) and not isinstance(part, bool) for part in parts):
        numbers = [float(part) for part in parts]
        if np.all(np.isfinite(numbers)) and (not pair or numbers[0] < numbers[1]):
            return (numbers[0], numbers[1]) if pair else numbers[0]
    raise ConfigError(f"expected a finite number or [low, high] with low < high, found {given!r}")


def _names_a_kind(given: Any) -> bool:
    return isinstance(given, Mapping) and isinstance(given.get("kind"), str)


def _value(given: Any) -> Any:
    """Read a number, a range or an expansion."""
    if _names_a_kind(given) or isinstance(given, tuple(expansions.kinds().values())):
        return expansions.build(given)
    return _number(given)


def _values(given: Any) -> Any:
    """Read a value, or a table of them by cell group."""
    if isinstance(given, Mapping) and not _names_a_kind(given):
        return _table(given, _value)
    return _value(given)


def _positive(given: Any) -> Number:
    """Read a positive number or a range of them."""
    number = _number(given)
    low = number[0] if isinstance(number, tuple) else number
    if low <= 0:
        raise ConfigError(f"must be positive, found {low:g}")
    return number


def _positives(given: Any) -> Any:
    """Read a positive number or range, or a table of them by cell group."""
    return _table(given, _positive) if isinstance(given, Mapping) else _positive(given)


def _table(given: Mapping[Any, Any], read: Any) -> dict[str, Any]:
    """Read every entry of a table, and gather the faults."""
    made, faults = {}, []
    for name, entry in given.items():
        try:
            made[str(name)] = read(entry)
        except ConfigError as error:
            faults += [f"{name}: {fault}" for fault in error.faults]
    if faults:
        raise ConfigError(faults)
    return made


Value: TypeAlias = Annotated[Any, PlainValidator(_value)]
"""A settings field: number, range or expansion."""
Values: TypeAlias = Annotated[Any, PlainValidator(_values)]
"""The same, or a table by cell group."""
Conductivity: TypeAlias = Annotated[Any, PlainValidator(_positives)]
"""A settings field: positive number or range, or a table of them by cell group."""


@expansions.register("chebyshev")
class Chebyshev:
    """A Chebyshev sum ``sum_k c_k T_k(t)`` with random coefficients, uniform and independent.

    Attributes
    ----------
    degree : int
        Of the last polynomial: ``degree + 1`` coefficients ``c0``, ``c1``, ...
    low, high : float
        Bounds of every coefficient.
    """

    needs_coordinate: ClassVar[bool] = True

    degree: int = Field(5, ge=0, le=40)
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not -np.inf < self.low < self.high < np.inf:
            raise ConfigError(f"low: must be below high, found {self.low:g} and {self.high:g}")

    @property
    def coefficients(self) -> dict[str, Number]:
        """``c0`` to ``c<degree>`` with their bounds."""
        return {f"c{k}": (self.low, self.high) for k in range(self.degree + 1)}

    def check(self, mesh: Mesh) -> None:
        """Fits every mesh."""

    def term(self, name: str, space: Space, coordinate: np.ndarray) -> Along:
        """Return ``T_k(t)``."""
        return Along(space.from_vertices(coordinate), ChebyshevT.basis(int(name[1:])))


@expansions.register("vertices")
class Vertices:
    """Values at the mesh's vertices from a file, linear between them.

    Attributes
    ----------
    file : str
        ``.npy`` with one number per vertex in the order of the mesh; those away from the group are
        not looked at.
    scale : float or [low, high]
        What all of them are multiplied by.
    """

    needs_coordinate: ClassVar[bool] = False

    file: str
    scale: Annotated[Any, PlainValidator(_number)] = 1.0

    @property
    def coefficients(self) -> dict[str, Number]:
        """``scale``."""
        return {"scale": self.scale}

    @cached_property
    def values(self) -> np.ndarray:
        """The file's array, shape (n_points,), float64."""
        if not Path(self.file).is_file():
            raise ConfigError(f"file: no such file {self.file}")
        try:
            values = np.load(self.file, allow_pickle=False)
            values = np.asarray(values, dtype=np.float64)
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise ConfigError(f"file: cannot read {self.file}: {error}") from None
        bad = int(np.sum(~np.isfinite(values)))
        if bad:
            raise ConfigError(f"file: {bad} values of {self.file} are not finite")
        return values

    def check(self, mesh: Mesh) -> None:
        """Raise ConfigError unless there is one finite value per vertex."""
        if self.values.shape != (len(mesh.points),):
            raise ConfigError(
                f"file: {self.file} has shape {self.values.shape}, but {mesh.source} has "
                f"{len(mesh.points)} vertices"
            )

    def term(self, name: str, space: Space, coordinate: np.ndarray) -> np.ndarray:
        """Return the values at the unknowns."""
        self.check(space.mesh)
        return space.from_vertices(self.values)


def arc_coordinate(mesh: Mesh, group: str) -> np.ndarray:
    """Return t in [-1, 1] along a boundary group at its vertices and 0 elsewhere, (n_points,).

    Raises
    ------
    ConfigError
        When the group is not one curve with two ends.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import dijkstra

    if mesh.dim != 2:
        raise ConfigError(
            f"{mesh.source} has {mesh.dim} dimensions: a boundary group has no arc coordinate; "
            "give a number, a range or values at vertices"
        )
    sides = mesh.facets[mesh.facet_group(group)]
    vertices, local = np.unique(sides, return_inverse=True)
    local = local.reshape(-1, 2)
    n = len(vertices)
    degree = np.bincount(local.ravel(), minlength=n)
    ends = np.flatnonzero(degree == 1)
    lengths = np.linalg.norm(mesh.points[sides[:, 1]] - mesh.points[sides[:, 0]], axis=1)
    along = np.full(n, np.inf)
    if len(ends) == 2 and degree.max() <= 2:
        start = ends[np.lexsort(mesh.points[vertices[ends]].T[::-1])[0]]
        graph = coo_array((lengths, (local[:, 0], local[:, 1])), shape=(n, n))
        along = dijkstra(graph.tocsr(), directed=False, indices=start)
    if not np.all(np.isfinite(along)):
        raise ConfigError(
            f"group {group!r} of {mesh.source} is not one curve with two ends "
            f"({len(ends)} ends), so it has no arc coordinate; split it in the mesher"
        )
    coordinate = np.zeros(len(mesh.points))
    coordinate[vertices] = 2.0 * along / along.max() - 1.0
    return coordinate


def x_coordinate(mesh: Mesh, group: str = "") -> np.ndarray:
    """Return t in [-1, 1] along x over the cells of a group, or all, at every vertex."""
    used = mesh.points[mesh.cells[mesh.cell_group(group)] if group else mesh.cells, 0]
    low, high = used.min(), used.max()
    return 2.0 * (mesh.points[:, 0] - low) / (high - low) - 1.0
