"""Meshes of triangles or tetrahedra: one checked, frozen value that every rank holds whole.

:func:`make` turns arrays into a :class:`Mesh`: vertices that no cell uses are dropped, repeated
cells merged, negatively oriented ones turned round; cells without volume and facets with more than
two cells are refused. Cells are numbered along a Hilbert curve (Skilling, AIP Conf. Proc. 707,
381, 2004), so that a contiguous range of them is a compact piece of the domain: that is the whole
partition. It is the same numbering for any number of ranks.

Vertices keep the order they came in. A facet is a side of a cell (an edge in 2-D, a triangle in
3-D); groups of facets and of cells have names. The group ``boundary`` always exists. Cost:
O(n log n), sorting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from simlab.core.config import nearest
from simlab.core.errors import ConfigError
from simlab.store import schema

__all__ = ["Mesh", "find_rows", "hilbert_index", "make", "unique_rows"]

CELL_KIND = {2: "triangle", 3: "tetra"}
_FLAT = 1e-12  # cell volume over (longest edge)^d below which a cell has no volume


@dataclass(frozen=True, eq=False)
class Mesh:
    """A conforming mesh of simplices. Make one with :func:`make` or ``files.read``.

    Attributes
    ----------
    points : ndarray, shape (n_points, d), float64
    cells : ndarray, shape (n_cells, d + 1), int64
        Vertex numbers, positively oriented, ordered along a Hilbert curve.
    facets : ndarray, shape (n_facets, d), int64
        Vertex numbers of every side of a cell, ascending in each row.
    facet_cells : ndarray, shape (n_facets,), int64
        The lowest-numbered cell of each facet: who assembles on it.
    facet_groups, cell_groups : mapping of str to ndarray of int64
        Facet and cell numbers by name.
    source : str
        Where it came from, for messages.
    """

    points: np.ndarray
    cells: np.ndarray
    facets: np.ndarray
    facet_cells: np.ndarray
    facet_groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    cell_groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    source: str = "mesh"

    @property
    def dim(self) -> int:
        """Space dimension, 2 or 3."""
        return int(self.points.shape[1])

    def facet_group(self, name: str) -> np.ndarray:
        """Return the facet numbers of a group, or raise ConfigError naming those there are."""
        return _group(self.facet_groups, name, "boundary", self.source)

    def cell_group(self, name: str) -> np.ndarray:
        """Return the cell numbers of a group, or raise ConfigError naming those there are."""
        return _group(self.cell_groups, name, "cell", self.source)

    def part(self, rank: int, n_ranks: int) -> slice:
        """Return the range of cells that is one rank's share; shares differ by one cell at most."""
        n = len(self.cells)
        return slice(n * rank // n_ranks, n * (rank + 1) // n_ranks)

    @cached_property
    def components(self) -> np.ndarray:
        """Number of the connected piece each vertex belongs to, shape (n_points,)."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        n = len(self.points)
        heads = np.repeat(self.cells[:, 0], self.dim)
        tails = self.cells[:, 1:].ravel()
        graph = coo_array((np.ones(len(heads), dtype=np.int8), (heads, tails)), shape=(n, n))
        labels: np.ndarray = connected_components(graph, directed=False)[1]
        return labels

    def volumes(self) -> np.ndarray:
        """Area or volume of every cell, shape (n_cells,)."""
        return _signed_volumes(self.points, self.cells)

    def stored(self) -> schema.Mesh:
        """Return the mesh as a store's schema holds it."""
        return schema.Mesh(self.points, {CELL_KIND[self.dim]: self.cells})


def make(
    points: np.ndarray,
    cells: np.ndarray,
    *,
    facet_groups: Mapping[str, np.ndarray] | None = None,
    cell_groups: Mapping[str, np.ndarray] | None = None,
    point_groups: Mapping[str, np.ndarray] | None = None,
    source: str = "mesh",
) -> Mesh:
    """Check arrays and make a mesh of them.

    Parameters
    ----------
    points : array_like, shape (n, 2) or (n, 3)
    cells : array_like of int, shape (m, d + 1)
    facet_groups : mapping of str to array_like of int, shape (k, d)
        Facets by their vertices, any order.
    cell_groups : mapping of str to array_like of int
        Row numbers of ``cells``.
    point_groups : mapping of str to array_like of int
        Vertex sets; a boundary facet belongs to the group when all its vertices do.
    source : str
        Named in messages.

    Raises
    ------
    ConfigError
        Naming what is wrong with the mesh.
    """
    points = np.array(points, dtype=np.float64)
    cells = np.array(cells, dtype=np.int64)
    _check_arrays(points, cells, source)
    n_given, dim = points.shape

    used = np.unique(cells)
    compact = np.full(n_given + 1, -1, dtype=np.int64)  # the last entry stands for "no such vertex"
    compact[used] = np.arange(len(used))
    points, cells = points[used], compact[cells]
    n = len(points)

    first, position = unique_rows(np.sort(cells, axis=1), n)
    cells = _oriented(points, cells[first], source)
    order = np.argsort(hilbert_index(points[cells].mean(axis=1)), kind="stable")
    cells = cells[order]
    rank_of = np.empty(len(order), dtype=np.int64)
    rank_of[order] = np.arange(len(order))
    position = rank_of[position]

    corners = np.stack([np.delete(np.arange(dim + 1), i) for i in range(dim + 1)])
    sides = np.sort(cells[:, corners].reshape(-1, dim), axis=1)
    first, side_facets = unique_rows(sides, n)
    facets, facet_cells = sides[first], first // (dim + 1)
    counts = np.bincount(side_facets)
    if counts.max() > 2:
        worst = int(np.argmax(counts))
        raise ConfigError(
            f"{source}: {int(np.sum(counts > 2))} facets have more than two cells, e.g. the one at "
            f"{_place(points[facets[worst]].mean(axis=0))}; cells overlap or the mesh is no "
            "manifold"
        )
    boundary = np.flatnonzero(counts == 1)

    named = {"boundary": boundary}
    for name, members in (point_groups or {}).items():
        inside = np.zeros(n_given + 1, dtype=bool)
        inside[np.minimum(np.asarray(members, dtype=np.int64), n_given)] = True
        named[name] = boundary[inside[:-1][used][facets[boundary]].all(axis=1)]
    for name, rows in (facet_groups or {}).items():
        vertices = compact[np.minimum(np.asarray(rows, np.int64).reshape(-1, dim), n_given)]
        found = find_rows(np.sort(vertices, axis=1), facets, n)
        if np.any(found < 0):
            raise ConfigError(
                f"{source}: {int(np.sum(found < 0))} of the {len(found)} facets of group {name!r} "
                "are not sides of any cell; mesh the group's neighbours too, or drop the group"
            )
        named[name] = np.unique(found)
    return Mesh(
        points=points,
        cells=cells,
        facets=facets,
        facet_cells=facet_cells,
        facet_groups={name: members for name, members in named.items() if len(members)},
        cell_groups={
            name: np.unique(position[np.asarray(members, dtype=np.int64)])
            for name, members in (cell_groups or {}).items()
            if len(members)
        },
        source=source,
    )


def hilbert_index(points: np.ndarray, bits: int = 20) -> np.ndarray:
    """Return the place of each point along a Hilbert curve through their bounding box.

    Parameters
    ----------
    points : ndarray, shape (n, d)
        With ``d * bits <= 63``.
    bits : int
        The curve passes ``2**bits`` boxes along each axis.

    Returns
    -------
    ndarray of int64, shape (n,)
    """
    dim = points.shape[1]
    low = points.min(axis=0)
    extent = max(float(np.max(points.max(axis=0) - low)), np.finfo(float).tiny)
    box = np.minimum(((points - low) / extent * 2**bits).astype(np.int64), 2**bits - 1)
    axes = [box[:, i].copy() for i in range(dim)]
    for level in range(bits - 1, 0, -1):  # undo the turns of the curve, coarse to fine
        bit, below = 1 << level, (1 << level) - 1
        for i in range(dim):
            turned = (axes[i] & bit) != 0
            swapped = np.where(turned, 0, (axes[0] ^ axes[i]) & below)
            axes[0] ^= np.where(turned, below, swapped)
            axes[i] ^= swapped
    for i in range(1, dim):  # Gray code
        axes[i] ^= axes[i - 1]
    flips = np.zeros_like(axes[0])
    for level in range(bits - 1, 0, -1):
        flips ^= np.where(axes[-1] & (1 << level), (1 << level) - 1, 0)
    index = np.zeros_like(axes[0])
    for level in range(bits - 1, -1, -1):
        for axis in axes:
            index = (index << 1) | (((axis ^ flips) >> level) & 1)
    return index


def unique_rows(rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the different rows of an array of vertex numbers below ``n``.

    Returns
    -------
    first : ndarray of int64
        Where each different row occurs first.
    inverse : ndarray of int64, shape (len(rows),)
        Which different row each row is.
    """
    key = rows[:, 0]
    for column in rows.T[1:]:  # renumbered at each column, so that no product overflows
        key = np.unique(key, return_inverse=True)[1] * np.int64(n) + column
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def find_rows(rows: np.ndarray, table: np.ndarray, n: int) -> np.ndarray:
    """Return where each row stands in a table of different rows, -1 where it does not."""
    if not len(rows) or not len(table):
        return np.full(len(rows), -1, dtype=np.int64)
    _, inverse = unique_rows(np.concatenate([table, rows]), n + 1)  # rows may hold -1: shift
    where = np.full(int(inverse.max()) + 1, -1, dtype=np.int64)
    where[inverse[: len(table)]] = np.arange(len(table))
    return where[inverse[len(table) :]]


def _check_arrays(points: np.ndarray, cells: np.ndarray, source: str) -> None:
    if points.ndim != 2 or points.shape[1] not in CELL_KIND:
        raise ConfigError(f"{source}: points have shape {points.shape}, expected (n, 2) or (n, 3)")
    if cells.ndim != 2 or cells.shape[1] != points.shape[1] + 1 or not len(cells):
        raise ConfigError(
            f"{source}: cells have shape {cells.shape}, expected (m, {points.shape[1] + 1}), m > 0"
        )
    if cells.min() < 0 or cells.max() >= len(points):
        raise ConfigError(
            f"{source}: cells name vertices {cells.min()} to {cells.max()}, "
            f"but there are {len(points)} points"
        )
    bad = int(np.sum(~np.isfinite(points).all(axis=1)))
    if bad:
        raise ConfigError(f"{source}: {bad} points have coordinates that are not finite")


def _signed_volumes(points: np.ndarray, cells: np.ndarray) -> np.ndarray:
    edges = points[cells[:, 1:]] - points[cells[:, :1]]
    return np.linalg.det(edges) / (2.0 if points.shape[1] == 2 else 6.0)


def _oriented(points: np.ndarray, cells: np.ndarray, source: str) -> np.ndarray:
    """Turn negative cells round; refuse those without volume."""
    volumes = _signed_volumes(points, cells)
    corners = points[cells]
    longest = np.sqrt(
        np.max(np.sum((corners[:, :, None] - corners[:, None]) ** 2, axis=-1), axis=(1, 2))
    )
    flat = np.flatnonzero(np.abs(volumes) <= _FLAT * longest ** points.shape[1])
    if len(flat):
        raise ConfigError(
            f"{source}: {len(flat)} of {len(cells)} cells have no volume, e.g. the one at "
            f"{_place(corners[flat[0]].mean(axis=0))}; repair the mesh"
        )
    cells = cells.copy()
    negative = volumes < 0
    cells[negative, -2:] = cells[negative, -2:][:, ::-1]
    return cells


def _group(groups: Mapping[str, np.ndarray], name: str, what: str, source: str) -> np.ndarray:
    if name not in groups:
        have = ", ".join(sorted(groups)) or "none"
        hint = nearest(name, groups)
        hint = hint if "did you mean" in hint else ""
        raise ConfigError(f"{source} has no {what} group {name!r}{hint} (it has: {have})")
    return groups[name]


def _place(point: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in point) + ")"
