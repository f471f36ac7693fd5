"""Meshes: checks, numbering, groups, partition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simlab.core.errors import ConfigError
from simlab.mesh.mesh import find_rows, hilbert_index, make, unique_rows

# a unit square cut into four triangles about its centre
POINTS = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.5]], dtype=float)
CELLS = np.array([[0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]])


def grid_triangles(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and triangles of an n x n square grid, two triangles per square."""
    x, y = np.meshgrid(np.arange(n + 1) / n, np.arange(n + 1) / n, indexing="ij")
    corner = np.arange((n + 1) ** 2).reshape(n + 1, n + 1)
    a, b, c, d = (
        v.ravel() for v in (corner[:-1, :-1], corner[1:, :-1], corner[:-1, 1:], corner[1:, 1:])
    )
    cells = np.concatenate([np.stack([a, b, d], 1), np.stack([a, d, c], 1)])
    return np.stack([x.ravel(), y.ravel()], 1), cells


def test_cells_are_turned_to_positive_orientation() -> None:
    turned = CELLS.copy()
    turned[[1, 3]] = turned[[1, 3]][:, [1, 0, 2]]
    mesh = make(POINTS, turned)
    assert np.allclose(mesh.volumes(), 0.25)
    tetra = make(np.concatenate([np.zeros((1, 3)), np.eye(3)]), [[0, 2, 1, 3]])
    assert np.allclose(tetra.volumes(), 1 / 6)


def test_vertices_without_cells_go_and_the_others_keep_their_order() -> None:
    points = np.insert(POINTS, [0, 3], [[9.0, 9.0], [7.0, 7.0]], axis=0)
    shift = np.array([1, 2, 3, 5, 6])
    mesh = make(points, shift[CELLS], facet_groups={"low": shift[[[1, 0]]]})
    assert np.array_equal(mesh.points, POINTS)
    assert np.array_equal(mesh.facets[mesh.facet_group("low")], [[0, 1]])


def test_repeated_cells_are_one_cell_in_both_groups() -> None:
    cells = np.concatenate([CELLS, CELLS[[2]][:, [1, 2, 0]]])
    mesh = make(POINTS, cells, cell_groups={"first": [0, 1, 2, 3], "again": [4], "top": [2]})
    assert mesh.volumes().sum() == pytest.approx(1.0)
    assert np.array_equal(mesh.cell_group("again"), mesh.cell_group("top"))
    assert len(mesh.cell_group("first")) == 4


def test_boundary_and_facet_owners() -> None:
    mesh = make(POINTS, CELLS)
    boundary = mesh.facets[mesh.facet_group("boundary")]
    assert sorted(map(tuple, boundary.tolist())) == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert len(mesh.facets) == 8
    for facet, owner in zip(mesh.facets, mesh.facet_cells, strict=True):
        holders = [i for i, cell in enumerate(mesh.cells) if set(facet) <= set(cell)]
        assert owner == min(holders)


def test_point_sets_name_boundary_facets() -> None:
    mesh = make(POINTS, CELLS, point_groups={"corner": [0, 1, 2, 4], "lonely": [3]})
    corner = mesh.facets[mesh.facet_group("corner")]
    assert sorted(map(tuple, corner.tolist())) == [(0, 1), (1, 2)]  # never (0, 4): not boundary
    assert "lonely" not in mesh.facet_groups


@pytest.mark.parametrize(
    ("points", "cells", "words"),
    [
        (POINTS, CELLS[:0], r"cells have shape \(0, 3\)"),
        (POINTS, [[0, 1, 9]], "vertices 0 to 9, but there are 5"),
        (POINTS, [[0, 1, 4], [0, 4, 2]], "1 of 2 cells have no volume.*repair"),
        (np.where(POINTS == 0.5, np.nan, POINTS), CELLS, "1 points .* not finite"),
        (
            np.concatenate([POINTS, [[0.5, -1], [0.4, -2]]]),
            [[0, 1, 4], [0, 1, 5], [0, 1, 6]],
            r"1 facets have more than two cells.*\(0.5, 0\)",
        ),
        (np.zeros((4, 1)), [[0, 1]], r"\(n, 2\) or \(n, 3\)"),
    ],
)
def test_unusable_meshes_are_refused(points, cells, words) -> None:
    with pytest.raises(ConfigError, match=words):
        make(points, cells)


def test_a_facet_that_is_no_side_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 of the 2 facets of group 'cut' are not sides"):
        make(POINTS, CELLS, facet_groups={"cut": [[0, 1], [0, 2]]})


def test_unknown_groups_name_the_known_ones() -> None:
    mesh = make(POINTS, CELLS, facet_groups={"hot": [[0, 1]]}, cell_groups={"steel": [0]})
    with pytest.raises(
        ConfigError, match=r"no boundary group 'hott'; did you mean 'hot'\?.*boundary, hot"
    ):
        mesh.facet_group("hott")
    with pytest.raises(ConfigError, match=r"no cell group 'hot' \(it has: steel\)"):
        mesh.cell_group("hot")


def test_parts_are_even_and_compact() -> None:
    mesh = make(*grid_triangles(16))
    centres = mesh.points[mesh.cells].mean(axis=1)
    for n_ranks in (1, 2, 3, 4, 7):
        parts = [np.arange(len(mesh.cells))[mesh.part(r, n_ranks)] for r in range(n_ranks)]
        assert np.array_equal(np.concatenate(parts), np.arange(len(mesh.cells)))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    # four parts of a square are its quarters: area of each part's box
    boxes = [np.prod(np.ptp(centres[mesh.part(r, 4)], axis=0)) for r in range(4)]
    assert max(boxes) < 0.27


def test_numbering_does_not_depend_on_the_order_of_cells_given() -> None:
    points, cells = grid_triangles(5)
    shuffled = np.random.default_rng(907).permutation(cells)
    assert np.array_equal(make(points, cells).facets.shape, make(points, shuffled).facets.shape)
    first, second = make(points, cells), make(points, shuffled)
    assert np.array_equal(np.sort(first.cells, axis=1), np.sort(second.cells, axis=1))


@pytest.mark.parametrize(("dim", "bits"), [(2, 5), (3, 3)])
def test_hilbert_curve_visits_every_box_by_single_steps(dim, bits) -> None:
    axis = np.arange(2**bits) + 0.5
    boxes = np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    index = hilbert_index(boxes, bits)
    assert np.array_equal(np.sort(index), np.arange(len(boxes)))
    steps = np.abs(np.diff(boxes[np.argsort(index)], axis=0)).sum(axis=1)
    assert np.all(steps == 1)


def test_components() -> None:
    far = POINTS + 10.0
    mesh = make(np.concatenate([POINTS, far]), np.concatenate([CELLS, CELLS + 5]))
    assert len(set(mesh.components[:5])) == 1
    assert len(set(mesh.components)) == 2


@given(st.integers(1, 4), st.integers(2, 9), st.integers(1, 40), st.integers(0, 999))
def test_rows_are_found_where_they_are(width, n, count, seed) -> None:
    rows = np.random.default_rng(seed).integers(0, n, (count, width))
    first, inverse = unique_rows(rows, n)
    assert np.array_equal(rows[first][inverse], rows)
    assert len(first) == len({tuple(row) for row in rows.tolist()})
    table = rows[first]
    assert np.array_equal(find_rows(rows, table, n), inverse)
    missing = np.full((1, width), -1)
    assert find_rows(missing, table, n).tolist() == [-1]
    assert find_rows(table[:1], table[1:], n).tolist() == [-1]
