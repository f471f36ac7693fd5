"""Resampling from meshes to structured grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simlab.mesh import remap
from simlab.mesh.files import read
from simlab.mesh.mesh import make
from simlab.problems.fem import Space

MESHES = Path(__file__).parents[2] / "cases" / "meshes"


def distorted(dim: int, times: int):
    """A unit square or cube of simplices with moved vertices."""
    import skfem

    raw = (skfem.MeshTri if dim == 2 else skfem.MeshTet)().refined(times)
    x = raw.p.T.copy()
    x += 0.06 * np.prod(np.sin(np.pi * x), axis=1, keepdims=True)
    return make(x, raw.t.T)


@pytest.mark.parametrize(("dim", "degree"), [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_polynomials_of_the_degree_are_exact(dim, degree) -> None:
    mesh = distorted(dim, 3 if dim == 2 else 2)
    space = Space(mesh, degree)
    axes = remap.grid_axes(mesh, (9, 14, 6)[:dim])
    location = remap.locate(mesh, axes)
    assert np.all(location.inside() == 1.0)

    def polynomial(x):
        linear = 1.0 + sum((i + 2) * x[i] for i in range(dim))
        return linear if degree == 1 else linear + x[0] * x[-1] - 3 * x[1] ** 2

    matrix = remap.interpolation(location, space.cell_dofs, space.n_dofs, degree)
    found = (matrix @ polynomial(space.points.T)).reshape(location.shape)
    expected = polynomial(np.meshgrid(*axes, indexing="ij"))
    assert np.allclose(found, expected, rtol=0, atol=1e-12)


def test_outside_is_zero_and_inside_is_the_domain() -> None:
    mesh = read(MESHES / "bracket.msh")
    axes = remap.grid_axes(mesh, (120, 100))
    location = remap.locate(mesh, axes)
    x, y = np.meshgrid(*axes, indexing="ij")
    exact = ((y < 0.5) | (x < 0.5)) & (np.hypot(x - 0.25, y - 0.72) > 0.12)
    wrong = location.inside() != exact
    assert np.all(np.abs(np.hypot(x - 0.25, y - 0.72)[wrong] - 0.12) < 2e-3)  # chords of the bore
    matrix = remap.interpolation(location, mesh.cells, len(mesh.points), 1)
    values = (matrix @ np.ones(len(mesh.points))).reshape(120, 100)
    assert np.allclose(values, location.inside(), rtol=0, atol=1e-12)


def test_axes_are_cell_centres_of_the_bounding_box() -> None:
    mesh = make([[1.0, 2.0], [3.0, 2.0], [1.0, 6.0]], [[0, 1, 2]])
    x, y = remap.grid_axes(mesh, (2, 4))
    assert x.tolist() == [1.5, 2.5]
    assert y.tolist() == [2.5, 3.5, 4.5, 5.5]


def test_points_on_common_sides_belong_to_the_lowest_cell(monkeypatch) -> None:
    points = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.5]])
    mesh = make(points, [[0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]])
    axis = np.linspace(0, 1, 5)  # grid points on every side and vertex
    whole = remap.locate(mesh, (axis, axis))
    assert len(whole.points) == 25
    centre = whole.cells[np.searchsorted(whole.points, 12)]
    assert centre == 0
    monkeypatch.setattr(remap, "_CHUNK", 7)  # the same in pieces
    pieces = remap.locate(mesh, (axis, axis))
    assert np.array_equal(pieces.cells, whole.cells)
    assert np.array_equal(pieces.weights, whole.weights)
