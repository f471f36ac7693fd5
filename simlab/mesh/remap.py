"""Resample functions from a mesh onto a structured grid.

The grid covers the mesh's bounding box with cells of equal size; values live at cell centres, the
place where the structured families keep theirs. Each grid point is found in the mesh cell that
holds it, by barycentric coordinates: candidates are the grid points inside a cell's own bounding
box, made for all cells at once. Cost: O(grid points x cells whose boxes overlap there).
Piecewise polynomials are then evaluated exactly by one sparse matrix (:func:`interpolation`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simlab.mesh.mesh import Mesh

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["Location", "basis_values", "edge_corners", "grid_axes", "interpolation", "locate"]

_TOLERANCE = 1e-10  # barycentric slack: a point on a side belongs to the cell
_CHUNK = 2_000_000  # candidates looked at in one go


@dataclass(frozen=True, eq=False)
class Location:
    """Where grid points lie in a mesh.

    Attributes
    ----------
    shape : tuple of int
        The grid, first axis slowest.
    points : ndarray of int64, shape (k,)
        Flat numbers of the grid points inside the mesh, ascending.
    cells : ndarray of int64, shape (k,)
        The cell each lies in; the lowest-numbered one on a common side.
    weights : ndarray, shape (k, d + 1)
        Barycentric coordinates there.
    """

    shape: tuple[int, ...]
    points: np.ndarray
    cells: np.ndarray
    weights: np.ndarray

    def inside(self) -> np.ndarray:
        """Return 1.0 at grid points inside the mesh and 0.0 elsewhere, shape ``shape``."""
        mask = np.zeros(int(np.prod(self.shape)))
        mask[self.points] = 1.0
        return mask.reshape(self.shape)


def grid_axes(mesh: Mesh, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Return the coordinates of cell centres along each axis of the mesh's bounding box."""
    low, high = mesh.points.min(axis=0), mesh.points.max(axis=0)
    return tuple(
        a + (b - a) * (np.arange(n) + 0.5) / n for a, b, n in zip(low, high, shape, strict=True)
    )


def locate(mesh: Mesh, axes: Sequence[np.ndarray]) -> Location:
    """Find the mesh cell of every point of a tensor grid with ascending axes.

    Parameters
    ----------
    mesh : Mesh
    axes : sequence of ndarray
        One ascending array of coordinates for each space dimension.
    """
    dim = mesh.dim
    shape = tuple(len(axis) for axis in axes)
    corners = mesh.points[mesh.cells]
    slack = _TOLERANCE * np.ptp(mesh.points, axis=0).max()
    low, high = corners.min(axis=1) - slack, corners.max(axis=1) + slack
    start = np.stack([np.searchsorted(axes[i], low[:, i], "left") for i in range(dim)], axis=1)
    stop = np.stack([np.searchsorted(axes[i], high[:, i], "right") for i in range(dim)], axis=1)
    spans = np.maximum(stop - start, 0)
    inverse = np.linalg.inv(np.swapaxes(corners[:, 1:] - corners[:, :1], 1, 2))

    counts = np.prod(spans, axis=1)
    bounds = np.searchsorted(np.cumsum(counts), np.arange(0, counts.sum() + _CHUNK, _CHUNK))
    bounds = np.unique(np.concatenate([[0], bounds, [len(counts)]]))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for first, last in itertools.pairwise(bounds):
        cells = np.repeat(np.arange(first, last), counts[first:last])
        offset = np.arange(len(cells)) - np.repeat(
            np.cumsum(counts[first:last]) - counts[first:last], counts[first:last]
        )
        index = np.empty((dim, len(cells)), dtype=np.int64)
        for i in range(dim - 1, -1, -1):
            offset, index[i] = np.divmod(offset, spans[cells, i])
        index += start[cells].T
        places = np.stack([axes[i][index[i]] for i in range(dim)], axis=1)
        inner = np.einsum("cij,cj->ci", inverse[cells], places - corners[cells, 0])
        weights = np.concatenate([1.0 - inner.sum(axis=1, keepdims=True), inner], axis=1)
        hit = weights.min(axis=1) >= -_TOLERANCE
        flat = np.ravel_multi_index(tuple(index[:, hit]), shape)
        found.append((flat, cells[hit], weights[hit]))
    flat, cells, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
    points, chosen = np.unique(flat, return_index=True)  # the first hit: the lowest cell
    return Location(shape, points, cells[chosen], weights[chosen])


def basis_values(weights: np.ndarray, degree: int) -> np.ndarray:
    """Evaluate the Lagrange basis of a simplex at barycentric coordinates.

    Parameters
    ----------
    weights : ndarray, shape (k, d + 1)
    degree : {1, 2}

    Returns
    -------
    ndarray, shape (k, n_basis)
        Corners first, then (degree 2) edge midpoints in the order of :func:`edge_corners`.
    """
    if degree == 1:
        return weights
    a, b = edge_corners(weights.shape[1])
    return np.concatenate(
        [weights * (2.0 * weights - 1.0), 4.0 * weights[:, a] * weights[:, b]], axis=1
    )


def edge_corners(n_corners: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two corners of each edge of a simplex: 01, 02, .., 12, .."""
    a, b = np.triu_indices(n_corners, 1)
    return a, b


def interpolation(location: Location, cell_dofs: np.ndarray, n_dofs: int, degree: int) -> csr_array:
    """Return the matrix from unknowns to grid values; rows outside the mesh are empty.

    Parameters
    ----------
    location : Location
    cell_dofs : ndarray of int64, shape (n_cells, n_basis)
        Unknowns of each cell in the order of :func:`basis_values`.
    n_dofs : int
    degree : {1, 2}

    Returns
    -------
    csr_array, shape (prod(shape), n_dofs)
    """
    from scipy.sparse import csr_array

    values = basis_values(location.weights, degree)
    columns = cell_dofs[location.cells]
    rows = np.repeat(location.points, values.shape[1])
    size = (int(np.prod(location.shape)), n_dofs)
    return csr_array((values.ravel(), (rows, columns.ravel())), shape=size)
