"""How well fields on the grid stand for those on the mesh: an estimate made from the data.

A campaign on a mesh stores its fields at vertices and, for The Well's readers, resampled on the
grid. What the grid has lost shows when its values are interpolated back, multilinearly, to the
vertices: the estimate is the root mean square of the difference over that of the vertex values. It
falls with the square of the spacing where the field is smooth. Vertices count that lie between grid
points which are all inside the domain; near its boundary nothing is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import h5py
import numpy as np

from simlab.store.schema import FieldSpec, Schema

__all__ = ["BackInterpolation", "state_resampling"]

_MEANING = (
    "relative root mean square difference at mesh vertices of grid values interpolated back, "
    "multilinearly"
)


class BackInterpolation:
    """Multilinear interpolation from grid points to those mesh vertices that it can reach.

    Parameters
    ----------
    axes : sequence of ndarray
        Ascending coordinates of the grid, first axis slowest.
    points : ndarray, shape (n, d)
    inside : ndarray of bool, shape (*grid)
        Where the grid has values.

    Attributes
    ----------
    reached : ndarray of int64, shape (k,)
        The vertices between grid points that all have values.
    """

    def __init__(self, axes: Sequence[np.ndarray], points: np.ndarray, inside: np.ndarray) -> None:
        low, part = [], []
        can = np.all([len(axis) > 1 for axis in axes]) & np.ones(len(points), dtype=bool)
        for axis, x in zip(axes, points.T, strict=False):
            slack = 1e-9 * (axis[-1] - axis[0])
            can &= (x >= axis[0] - slack) & (x <= axis[-1] + slack)
            at = np.clip(np.searchsorted(axis, x, "right") - 1, 0, max(len(axis) - 2, 0))
            low.append(at)
            gap = axis[np.minimum(at + 1, len(axis) - 1)] - axis[at]
            part.append((x - axis[at]) / np.where(gap > 0, gap, 1.0))
        corners = list(product((0, 1), repeat=len(axes)))
        shape = inside.shape
        last = np.array(shape)[:, None] - 1
        flat = [
            np.ravel_multi_index(
                tuple(np.minimum(np.stack(low) + np.array(corner)[:, None], last)), shape
            )
            for corner in corners
        ]
        for number in flat:
            can &= inside.reshape(-1)[number]
        self.reached = np.flatnonzero(can)
        self._corners = [number[can] for number in flat]
        self._weights = [
            np.prod([p[can] if c else 1.0 - p[can] for p, c in zip(part, corner, strict=True)], 0)
            for corner in corners
        ]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return grid values (T, grid points flattened, components) at the vertices reached."""
        total = np.zeros((len(values), len(self.reached), values.shape[2]))
        for number, weight in zip(self._corners, self._weights, strict=True):
            total += values[:, number] * weight[:, None]
        return total


def state_resampling(file: h5py.File, schema: Schema, paths: dict[str, str]) -> None:
    """Write method and error estimate of every resampled field to a shard's attributes.

    Parameters
    ----------
    paths : dict of str to str
        Dataset of every field, by its name.
    """
    assert schema.mesh is not None
    axes = [np.asarray(axis.coordinates) for axis in schema.axes]
    worst = []
    for spec in schema.outputs:
        said = spec.resampling
        if said is None:
            continue
        inside = np.ones(schema.shape, dtype=bool)
        if said.inside:
            inside = file[paths[said.inside]][0] > 0.5
        back = BackInterpolation(axes, schema.mesh.points, inside)
        error = _error(file[paths[spec.name]], file[paths[said.source]], back, spec, schema)
        worst.append((error, said.method))
        file[paths[spec.name]].attrs.update(
            {
                "resampled_from": paths[said.source],
                "resampling_method": said.method,
                "resampling_error": error,
                "resampling_error_is": _MEANING,
                "resampling_vertices": len(back.reached),
            }
        )
    if worst:
        error, method = max(worst)
        file.attrs["resampling_method"], file.attrs["resampling_error"] = method, error
        file.attrs["resampling_error_is"] = _MEANING


def _error(
    grid: h5py.Dataset,
    vertices: h5py.Dataset,
    back: BackInterpolation,
    spec: FieldSpec,
    schema: Schema,
) -> float:
    """Return the estimate over all rows and steps; NaN when no vertex is reached."""
    width = schema.n_dims**spec.order
    lost = whole = 0.0
    for row in range(len(grid)):
        shown = grid[row].reshape(grid.shape[1], -1, width)
        exact = vertices[row].reshape(grid.shape[1], -1, width)[:, back.reached]
        lost += float(np.sum((back(shown) - exact) ** 2))
        whole += float(np.sum(exact**2))
    if not len(back.reached):
        return float("nan")
    return float(np.sqrt(lost / whole)) if whole else float(np.sqrt(lost))
