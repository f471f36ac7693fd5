"""Generated meshes: the domain, its groups, the quality, and the same one every time."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from simlab.core.config import as_table
from simlab.core.errors import ConfigError
from simlab.mesh.generate import angles, load, meshes
from simlab.mesh.mesh import Mesh


def made(**table) -> Mesh:
    return load(meshes.build(table))


def lengths(mesh: Mesh, name: str) -> np.ndarray:
    ends = mesh.points[mesh.facets[mesh.facet_group(name)]]
    return np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)


@pytest.mark.parametrize(
    ("table", "area", "sides"),
    [
        ({"kind": "square", "size": 0.05}, 1.0, {"left": 1, "right": 1, "bottom": 1, "top": 1}),
        ({"kind": "square", "size": 0.08, "blocks": [3, 2]}, 1.0, {"left": 1, "top": 1}),
        (
            {"kind": "slotted_plate", "size": 0.04},
            1.6 - 0.1 * 0.8,
            {"left": 1.6, "right": 1.6, "bottom": 1, "top": 1, "slot": 1.8},
        ),
    ],
    ids=["square", "blocks", "slotted_plate"],
)
def test_area_and_sides_are_exact(table, area, sides) -> None:
    mesh = made(**table)
    assert mesh.volumes().sum() == pytest.approx(area, rel=1e-12)
    for name, length in sides.items():
        assert lengths(mesh, name).sum() == pytest.approx(length, rel=1e-12)
        assert lengths(mesh, name).max() < 1.3 * table["size"]
    named = [mesh.facet_group(name) for name in mesh.facet_groups if name != "boundary"]
    together = np.sort(np.concatenate(named))
    assert np.array_equal(together, np.sort(mesh.facet_group("boundary")))  # each in one group


def test_groups_are_where_their_names_say() -> None:
    mesh = made(kind="slotted_plate", size=0.05)
    places = {"left": (0, -0.5), "right": (0, 0.5), "bottom": (1, -0.8), "top": (1, 0.8)}
    for name, (axis, value) in places.items():
        assert np.all(mesh.points[mesh.facets[mesh.facet_group(name)], axis] == value)
    slot = np.abs(mesh.points[mesh.facets[mesh.facet_group("slot")]])
    assert slot.max(axis=(0, 1)) == pytest.approx([0.05, 0.4])


def test_blocks_are_resolved_and_cover_the_square() -> None:
    mesh = made(kind="square", size=0.07, blocks=[3, 2])
    assert sorted(mesh.cell_groups) == [f"block_{i}_{j}" for i in (1, 2, 3) for j in (1, 2)]
    for name, cells in mesh.cell_groups.items():
        i, j = (int(word) for word in name.split("_")[1:])
        corners = mesh.points[mesh.cells[cells]]
        low, high = np.array([(i - 1) / 3, (j - 1) / 2]), np.array([i / 3, j / 2])
        assert np.all((corners >= low - 1e-12) & (corners <= high + 1e-12))
        assert mesh.volumes()[cells].sum() == pytest.approx(1 / 6, rel=1e-12)
    assert not made(kind="square", size=0.1).cell_groups


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("square", (0.2, 0.113, 0.06, 0.033)), ("slotted_plate", (0.1, 0.087, 0.05, 0.03))],
)
def test_quality_and_size(kind, sizes) -> None:
    for size in sizes:
        mesh = made(kind=kind, size=size)
        smallest = angles(mesh.points[mesh.cells])
        assert smallest.min() > 20.0
        assert np.median(smallest) > 40.0
        sides = mesh.points[mesh.facets]
        mean = np.linalg.norm(sides[:, 1] - sides[:, 0], axis=1).mean()
        assert mean == pytest.approx(size, rel=0.2)


def test_angles_of_known_triangles() -> None:
    right = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    even = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
    assert angles(np.stack([right, even])) == pytest.approx([np.degrees(np.arctan(0.75)), 60.0])


def test_the_mesh_is_unstructured() -> None:
    mesh = made(kind="square", size=0.03)
    inner = np.setdiff1d(np.arange(len(mesh.points)), mesh.facets[mesh.facet_group("boundary")])
    neighbours = np.bincount(mesh.cells.ravel(), minlength=len(mesh.points))[inner]
    assert 0.3 < np.mean(neighbours != 6) < 0.7


@pytest.mark.parametrize(
    ("kind", "size", "unknowns"),
    [("square", 0.0203, 11_237), ("slotted_plate", 0.0252, 11_063)],
)
def test_published_sizes_of_quadratic_elements(kind, size, unknowns) -> None:
    mesh = made(kind=kind, size=size)
    assert len(mesh.points) + len(mesh.facets) == pytest.approx(unknowns, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "unknowns"),
    [("square", 0.00805, 71_313), ("slotted_plate", 0.01, 70_031)],
)
def test_large_published_sizes(kind, size, unknowns) -> None:
    mesh = made(kind=kind, size=size)
    assert len(mesh.points) + len(mesh.facets) == pytest.approx(unknowns, rel=3e-3)


def test_the_same_mesh_in_every_process() -> None:
    table = {"kind": "slotted_plate", "size": 0.06}
    code = (
        "import sys; from simlab.mesh.generate import load, meshes;"
        f"mesh = load(meshes.build({table!r}));"
        "sys.stdout.buffer.write(mesh.points.tobytes() + mesh.cells.tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    mesh = made(**table)
    assert done.stdout == mesh.points.tobytes() + mesh.cells.tobytes()
    assert load(meshes.build(table)) is mesh
    assert meshes.build(as_table(meshes.build(table))) == meshes.build(table)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "squre"}, "unknown mesh kind 'squre'; did you mean 'square'"),
        ({"kind": "square", "size": 0.0}, "size: .*greater than or equal to 0.001"),
        ({"kind": "slotted_plate", "size": 0.3}, "size: .*less than or equal to 0.1"),
        ({"kind": "square", "blocks": [4, 1], "size": 0.1}, "size: 0.1 is too coarse for 4 blocks"),
        ({"kind": "square", "blocks": [0, 1]}, "blocks.0"),
    ],
)
def test_wrong_settings_are_refused(table, words) -> None:
    with pytest.raises(ConfigError, match=words):
        meshes.build(table)
