"""Unstructured triangle meshes of a few polygons, made on the spot: the same ones every time.

    1. cut every line of the outline, inner lines too, into equal pieces of about ``size``
    2. fill the domain with a triangular lattice whose points are shaken by up to half a width
    3. six times: Delaunay triangles; every inner point moves to the mean of its triangles' centres,
       weighted by their areas (centroidal patch smoothing, Chen, Meshing Roundtable 13, 2004)
    4. Delaunay triangles again; the smallest angle must not be below 20 degrees

Inner points keep clear of the lines, so that each piece of a line is a side of a triangle: boundary
groups and blocks are resolved exactly. Half of the inner points end with other than six
neighbours. About ``2.3 / size^2`` triangles per unit of area, twice as many unknowns with
quadratic elements; 71 000 unknowns take two seconds.

A generated mesh stands in a case where a file name does:

    mesh = { kind = "square", size = 0.02 }
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias

import numpy as np
from pydantic import Field, PlainValidator, PositiveInt

from simlab.core.config import Registry
from simlab.core.errors import ConfigError
from simlab.core.samples import generator
from simlab.mesh.files import read
from simlab.mesh.mesh import Mesh, find_rows, make

__all__ = ["Generator", "MeshSource", "Outline", "angles", "load", "meshes", "triangulate"]

_N_SWEEPS = 6
_SHAKE = 0.5  # largest step of a lattice point along each axis, over size
_CLEARANCE = 0.65  # least distance of a lattice point from a line, over size
_MIN_ANGLE = 20.0  # degrees
_FLAT = 1e-6  # area over size^2 below which a triangle lies within a line


@dataclass(frozen=True, eq=False)
class Outline:
    """Straight lines around and inside a domain.

    Attributes
    ----------
    corners : ndarray, shape (n, 2)
    lines : ndarray of int, shape (m, 2)
        Two corners each; lines meet at corners only.
    names : tuple of str
        Boundary group of each line; empty for a line inside the domain.
    holes : tuple of ((float, float), (float, float))
        Lower left and upper right corner of each box that is cut out of the bounding box.
    """

    corners: np.ndarray
    lines: np.ndarray
    names: tuple[str, ...]
    holes: tuple[tuple[tuple[float, float], tuple[float, float]], ...] = ()

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Return which points, shape (n, 2), lie inside the domain."""
        low, high = self.corners.min(axis=0), self.corners.max(axis=0)
        found: np.ndarray = np.all((points > low) & (points < high), axis=1)
        for corner, opposite in self.holes:
            found &= ~np.all((points > corner) & (points < opposite), axis=1)
        return found


class Generator(Protocol):
    """Frozen settings of a mesh."""

    kind: ClassVar[str]

    def __hash__(self) -> int:
        """Equal settings, equal meshes."""
        ...

    def make(self) -> Mesh:
        """Make the mesh. Deterministic and rank-local."""
        ...


meshes: Registry[Generator] = Registry("mesh", "simlab.mesh.generate")


@meshes.register("square")
class Square:
    """The unit square; groups ``left``, ``right``, ``bottom``, ``top``.

    Attributes
    ----------
    size : float
        Length of a side of a triangle, about.
    blocks : (int, int)
        Equal blocks along x and y, as cell groups ``block_1_1``, ``block_2_1``, ...: the first
        number counts from the left, the second from the bottom. A mesh of one block has no groups.
    """

    size: float = Field(0.02, ge=1e-3, le=0.2)
    blocks: tuple[PositiveInt, PositiveInt] = (1, 1)

    def __post_init__(self) -> None:
        largest = 0.3 / max(self.blocks)
        if self.size > largest * (1 + 1e-12):
            raise ConfigError(
                f"size: {self.size:g} is too coarse for {max(self.blocks)} blocks in a row; "
                f"at most {largest:g}"
            )

    def make(self) -> Mesh:
        """Make the mesh."""
        nx, ny = self.blocks
        i, j = (axis.ravel() for axis in np.indices((nx + 1, ny + 1)))
        number = np.arange(len(i)).reshape(nx + 1, ny + 1)
        across, up = number[:-1].ravel(), number[:, :-1].ravel()
        lines = np.concatenate(
            [np.stack([across, across + ny + 1], axis=1), np.stack([up, up + 1], axis=1)]
        )
        names = [{0: "bottom", ny: "top"}.get(int(j[a]), "") for a in across]
        names += [{0: "left", nx: "right"}.get(int(i[a]), "") for a in up]
        outline = Outline(np.stack([i / nx, j / ny], axis=1), lines, tuple(names))
        points, cells = triangulate(outline, self.size, _title(self))
        groups = {}
        if nx * ny > 1:
            place = (points[cells].mean(axis=1) * self.blocks).astype(np.int64)
            groups = {
                f"block_{a + 1}_{b + 1}": np.flatnonzero(np.all(place == (a, b), axis=1))
                for b in range(ny)
                for a in range(nx)
            }
        return _named(outline, points, cells, self.size, groups, _title(self))


@meshes.register("slotted_plate")
class SlottedPlate:
    """The rectangle [-0.5, 0.5] x [-0.8, 0.8] without the slot [-0.05, 0.05] x [-0.4, 0.4].

    Groups ``left``, ``right``, ``bottom``, ``top`` and ``slot``.

    Attributes
    ----------
    size : float
        Length of a side of a triangle, about.
    """

    size: float = Field(0.025, ge=1e-3, le=0.1)

    def make(self) -> Mesh:
        """Make the mesh."""
        box = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=float)
        ring = np.stack([np.arange(4), np.roll(np.arange(4), -1)], axis=1)
        outline = Outline(
            np.concatenate([box * (0.5, 0.8), box * (0.05, 0.4)]),
            np.concatenate([ring, ring + 4]),
            ("bottom", "right", "top", "left", *["slot"] * 4),
            (((-0.05, -0.4), (0.05, 0.4)),),
        )
        points, cells = triangulate(outline, self.size, _title(self))
        return _named(outline, points, cells, self.size, {}, _title(self))


def _source(given: Any) -> Any:
    return given if isinstance(given, str) else meshes.build(given)


MeshSource: TypeAlias = Annotated[Any, PlainValidator(_source)]
"""A settings field: the name of a mesh file, or a table that names a generator."""


def load(source: str | Generator) -> Mesh:
    """Read a mesh file, or make a mesh; either is done once per process."""
    return read(source) if isinstance(source, str) else _made(source)


@lru_cache(maxsize=8)
def _made(settings: Generator) -> Mesh:
    return settings.make()


def triangulate(outline: Outline, size: float, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Fill an outline with triangles whose sides are about ``size`` long.

    Returns
    -------
    points : ndarray, shape (n, 2)
    cells : ndarray of int, shape (m, 3)

    Raises
    ------
    ConfigError
        When a line is not resolved or an angle is too small: the size does not fit the outline.
    """
    fixed = _on_lines(outline, size)[0]
    points = np.concatenate([fixed, _lattice(outline, size)])
    inner = np.arange(len(fixed), len(points))
    for _ in range(_N_SWEEPS):
        cells = _delaunay(outline, points, size)
        corners = points[cells]
        weight = np.repeat(_areas(corners), 3)
        centre = np.repeat(corners.mean(axis=1), 3, axis=0)
        total = np.bincount(cells.ravel(), weight, len(points))[inner]
        moment = [np.bincount(cells.ravel(), weight * c, len(points))[inner] for c in centre.T]
        points[inner] = np.stack(moment, axis=1) / total[:, None]
    cells = _delaunay(outline, points, size)
    worst = float(angles(points[cells]).min())
    if worst < _MIN_ANGLE:
        raise ConfigError(
            f"{source}: a triangle has an angle of {worst:.1f} degrees, below {_MIN_ANGLE:g}; "
            "change size a little"
        )
    return points, cells


def angles(corners: np.ndarray) -> np.ndarray:
    """Return the smallest angle of each triangle in degrees, from corners of shape (n, 3, 2)."""
    sides = np.roll(corners, -1, axis=1) - corners
    lengths = np.linalg.norm(sides, axis=2)
    products = -np.sum(sides * np.roll(sides, 1, axis=1), axis=2)
    cosines = products / (lengths * np.roll(lengths, 1, axis=1))
    smallest: np.ndarray = np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0))).min(axis=1)
    return smallest


def _on_lines(outline: Outline, size: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the points on the lines, corners first, and the pieces of each line."""
    points, pieces = [outline.corners], []
    n = len(outline.corners)
    for first, last in outline.lines:
        a, b = outline.corners[first], outline.corners[last]
        count = max(1, round(float(np.linalg.norm(b - a)) / size))
        between = a + (b - a) * (np.arange(1, count)[:, None] / count)
        chain = np.array([first, *range(n, n + count - 1), last])
        pieces.append(np.stack([chain[:-1], chain[1:]], axis=1))
        points.append(between)
        n += count - 1
    return np.concatenate(points), pieces


def _lattice(outline: Outline, size: float) -> np.ndarray:
    """Return a shaken triangular lattice inside the domain, clear of its lines."""
    low, high = outline.corners.min(axis=0), outline.corners.max(axis=0)
    row = size * np.sqrt(3) / 2
    i, j = np.indices(tuple(((high - low) / (size, row)).astype(int) + 2))
    points = low + np.stack([size * (i + 0.5 * (j % 2)), row * j], axis=-1).reshape(-1, 2)
    random = generator(60217, len(points), "mesh lattice")
    points += _SHAKE * size * random.uniform(-1.0, 1.0, points.shape)
    points = points[outline.inside(points)]
    for first, last in outline.lines:
        a, b = outline.corners[first], outline.corners[last]
        along = np.clip((points - a) @ (b - a) / np.sum((b - a) ** 2), 0.0, 1.0)
        gap = np.linalg.norm(points - (a + along[:, None] * (b - a)), axis=1)
        points = points[gap > _CLEARANCE * size]
    return points


def _delaunay(outline: Outline, points: np.ndarray, size: float) -> np.ndarray:
    """Return the Delaunay triangles inside the domain."""
    from scipy.spatial import Delaunay

    cells: np.ndarray = Delaunay(points).simplices.astype(np.int64)
    corners = points[cells]
    return cells[(_areas(corners) > _FLAT * size**2) & outline.inside(corners.mean(axis=1))]


def _areas(corners: np.ndarray) -> np.ndarray:
    u, v = np.moveaxis(corners[:, 1:] - corners[:, :1], 1, 0)
    areas: np.ndarray = 0.5 * np.abs(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0])
    return areas


def _named(
    outline: Outline,
    points: np.ndarray,
    cells: np.ndarray,
    size: float,
    groups: dict[str, np.ndarray],
    source: str,
) -> Mesh:
    """Make a mesh with the outline's groups; every piece of a line must be there."""
    pieces = _on_lines(outline, size)[1]
    parts: dict[str, list[np.ndarray]] = {}
    for name, rows in zip(outline.names, pieces, strict=True):
        parts.setdefault(name, []).append(rows)
    sides = np.sort(cells[:, [[0, 1], [1, 2], [0, 2]]].reshape(-1, 2), axis=1)
    wanted = np.sort(np.concatenate(pieces), axis=1)
    lost = int(np.sum(find_rows(wanted, np.unique(sides, axis=0), len(points)) < 0))
    if lost:
        raise ConfigError(
            f"{source}: {lost} of {len(wanted)} pieces of the outline are not sides of triangles; "
            "change size a little"
        )
    return make(
        points,
        cells,
        facet_groups={name: np.concatenate(rows) for name, rows in parts.items() if name},
        cell_groups=groups,
        source=source,
    )


def _title(settings: Any) -> str:
    """Return a generator in a few words, for messages."""
    blocks = getattr(settings, "blocks", (1, 1))
    divided = f", blocks {blocks[0]} x {blocks[1]}" if blocks != (1, 1) else ""
    return f"mesh {settings.kind} (size {settings.size:g}{divided})"
