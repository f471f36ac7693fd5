"""Mesh files: the formats, their groups, and what is wrong with bad ones."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import meshio
import numpy as np
import pytest

from simlab.core.errors import ConfigError
from simlab.mesh.files import read

MESHES = Path(__file__).parents[2] / "cases" / "meshes"

# two squares side by side, four triangles; the left one is tagged 11, the right one 12
POINTS = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 1, 0], [1, 1, 0], [2, 1, 0]], dtype=float)
TRIANGLES = np.array([[0, 1, 4], [0, 4, 3], [1, 2, 5], [1, 5, 4]])
LINES = np.array([[0, 3], [2, 5], [3, 4], [4, 5]])
CELLS = [("line", LINES), ("triangle", TRIANGLES)]
TAGS = [np.array([1, 2, 3, 3]), np.array([11, 11, 12, 12])]
NAMES = {"west": [1, 1], "east": [2, 1], "top": [3, 1], "soft": [11, 2], "hard": [12, 2]}


def write(path: Path, file_format: str, **extra) -> Path:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        meshio.Mesh(POINTS, CELLS, **extra).write(path, file_format=file_format)
    return path


def check_groups(mesh, west, east, top, soft, hard) -> None:
    for name, x in ((west, 0.0), (east, 2.0)):
        facets = mesh.facets[mesh.facet_group(name)]
        assert facets.shape == (1, 2)
        assert np.all(mesh.points[facets, 0] == x)
    assert np.all(mesh.points[mesh.facets[mesh.facet_group(top)], 1] == 1.0)
    assert len(mesh.facet_group(top)) == 2
    centres = mesh.points[mesh.cells].mean(axis=1)
    assert np.array_equal(np.flatnonzero(centres[:, 0] < 1), mesh.cell_group(soft))
    assert np.array_equal(np.flatnonzero(centres[:, 0] > 1), mesh.cell_group(hard))
    assert mesh.volumes().sum() == pytest.approx(2.0)


def test_gmsh_4_with_physical_names() -> None:
    mesh = read(MESHES / "bracket.msh")
    assert set(mesh.facet_groups) == {"bore", "foot", "end", "air", "wall", "boundary"}
    assert len(mesh.facet_group("boundary")) == sum(
        len(mesh.facet_group(name)) for name in ("bore", "foot", "end", "air", "wall")
    )
    assert mesh.volumes()[mesh.cell_group("chip")].sum() == pytest.approx(0.3 * 0.2)
    assert mesh.points.shape[1] == 2
    radius = np.hypot(*(mesh.points[mesh.facets[mesh.facet_group("bore")]] - [0.25, 0.72]).T)
    assert np.allclose(radius, 0.12)


def test_gmsh_2_and_4_agree() -> None:
    fine, coarse = read(MESHES / "bracket.msh"), read(MESHES / "bracket_coarse.msh")
    assert set(fine.facet_groups) == set(coarse.facet_groups)
    assert set(fine.cell_groups) == set(coarse.cell_groups)
    assert coarse.volumes().sum() == pytest.approx(fine.volumes().sum(), rel=2e-3)


@pytest.mark.parametrize(
    ("suffix", "file_format", "key", "has_names"),
    [
        ("msh", "gmsh22", "gmsh:physical", True),
        ("xdmf", "xdmf", "gmsh:physical", False),
        ("mesh", "medit", "medit:ref", False),
        ("bdf", "nastran", "nastran:ref", False),
    ],
)
def test_tags_become_groups(tmp_path, monkeypatch, suffix, file_format, key, has_names) -> None:
    monkeypatch.chdir(tmp_path)  # meshio's XDMF writer drops its .h5 in the working directory
    data = {key: TAGS}
    names = {name: np.array(entry) for name, entry in NAMES.items()} if has_names else {}
    path = tmp_path / f"plate.{suffix}"
    extra = {"cell_data": data, "field_data": names}
    mesh = read(write(path, file_format, **extra))
    words = ("west", "east", "top", "soft", "hard") if has_names else ("1", "2", "3", "11", "12")
    check_groups(mesh, *words)


def test_cell_sets_and_vertex_sets_become_groups(tmp_path) -> None:
    path = tmp_path / "plate.inp"
    path.write_text(
        "*NODE\n"
        + "".join(f"{i}, {x}, {y}, 0.0\n" for i, (x, y, _) in enumerate(POINTS, 1))
        + "*ELEMENT, TYPE=CPS3, ELSET=soft\n1, 1, 2, 5\n2, 1, 5, 4\n"
        + "*ELEMENT, TYPE=CPS3, ELSET=hard\n3, 2, 3, 6\n4, 2, 6, 5\n"
        + "*NSET, NSET=west\n1, 4\n*NSET, NSET=east\n3, 6\n*NSET, NSET=top\n4, 5, 6\n"
    )
    mesh = read(path)
    soft, hard = (next(n for n in mesh.cell_groups if n.lower() == w) for w in ("soft", "hard"))
    west, east, top = (
        next(n for n in mesh.facet_groups if n.lower() == w) for w in ("west", "east", "top")
    )
    check_groups(mesh, west, east, top, soft, hard)


def test_a_gmsh_2_element_in_two_groups_counts_once(tmp_path) -> None:
    path = tmp_path / "plate.msh"
    cells = [("triangle", np.concatenate([TRIANGLES, TRIANGLES[:2]]))]
    tags = [np.array([11, 11, 12, 12, 13, 13])]
    raw = meshio.Mesh(
        POINTS,
        cells,
        cell_data={"gmsh:physical": tags, "gmsh:geometrical": tags},
        field_data={"soft": np.array([11, 2]), "extra": np.array([13, 2])},
    )
    raw.write(path, file_format="gmsh22")
    mesh = read(path)
    assert mesh.volumes().sum() == pytest.approx(2.0)
    assert np.array_equal(mesh.cell_group("soft"), mesh.cell_group("extra"))
    assert len(mesh.cell_group("12")) == 2  # a tag without a name is known by its number


def test_curved_triangles_and_tetrahedra(tmp_path) -> None:
    path = tmp_path / "curved.vtu"
    points = np.concatenate([np.eye(3)[:2], np.zeros((1, 3)), np.full((3, 3), 0.5)])
    points[:, 2] = 3.5  # a plane z = constant
    meshio.Mesh(points, [("triangle6", np.arange(6)[None])]).write(path)
    mesh = read(path)
    assert mesh.cells.shape == (1, 3)
    assert len(mesh.points) == 3
    path = tmp_path / "tet.vtu"
    corners = np.concatenate([np.zeros((1, 3)), np.eye(3)])
    meshio.Mesh(corners, [("tetra", np.arange(4)[None]), ("triangle", np.arange(3)[None])]).write(
        path
    )
    assert read(path).dim == 3


def test_gmsh_in_space_ignores_lines_and_keeps_surfaces_and_volumes(tmp_path) -> None:
    path = tmp_path / "tets.msh"
    points = np.concatenate([np.zeros((1, 3)), np.eye(3), np.ones((1, 3))])
    cells = [
        ("line", np.array([[0, 1]])),
        ("triangle", np.array([[2, 1, 0], [1, 2, 3]])),  # a side of the boundary, and an inner one
        ("tetra", np.array([[0, 1, 2, 3], [1, 3, 2, 4]])),
    ]
    tags = [np.array([1]), np.array([1, 2]), np.array([1, 2])]  # numbers are used per dimension
    names = {"rod": [1, 1], "floor": [1, 2], "inner": [2, 2], "low": [1, 3], "high": [2, 3]}
    meshio.Mesh(
        points,
        cells,
        cell_data={"gmsh:physical": tags, "gmsh:geometrical": tags},
        field_data={name: np.array(entry) for name, entry in names.items()},
    ).write(path, file_format="gmsh22")
    mesh = read(path)
    assert mesh.dim == 3
    assert set(mesh.facet_groups) == {"floor", "inner", "boundary"}
    assert np.array_equal(mesh.facets[mesh.facet_group("inner")], [[1, 2, 3]])
    assert len(mesh.facet_group("boundary")) == 6
    assert mesh.volumes()[mesh.cell_group("low")] == pytest.approx(1 / 6)
    assert mesh.volumes()[mesh.cell_group("high")] == pytest.approx(1 / 3)


def test_a_changed_file_is_read_again(tmp_path) -> None:
    path = write(tmp_path / "plate.vtu", "vtu")
    first = read(path)
    assert read(path) is first
    meshio.Mesh(2 * POINTS, CELLS).write(path)
    os.utime(path, ns=(1, 1))
    assert read(path).volumes().sum() == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.msh", "this is no mesh\n", r"cannot read mesh .*a\.msh"),
        ("a.vtu", "<VTKFile><oops></VTKFile>", r"cannot read mesh .*a\.vtu"),
        ("a.xyz", "1 2 3\n", "Could not deduce file format"),
        ("a.msh", "", "cannot read mesh"),
        ("a.stl", "solid x\nendsolid x\n", "cannot read mesh|no triangles"),
    ],
)
def test_bad_files_are_one_config_error(tmp_path, capfd, name, content, words) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read(path)
    assert len(caught.value.faults) == 1
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_cut_off_file_is_refused(tmp_path) -> None:
    text = (MESHES / "bracket_coarse.msh").read_text()
    path = tmp_path / "cut.msh"
    path.write_text(text[: len(text) * 2 // 3])
    with pytest.raises(ConfigError, match=r"cut\.msh"):
        read(path)


def test_a_missing_file_names_one_like_it() -> None:
    with pytest.raises(
        ConfigError, match=r"no mesh file .*brackt\.msh; did you mean .*bracket\.msh"
    ):
        read(MESHES / "brackt.msh")
    with pytest.raises(ConfigError, match="no mesh file nowhere/at/all"):
        read("nowhere/at/all.msh")


@pytest.mark.parametrize(
    ("points", "cells", "words"),
    [
        (POINTS, [("line", LINES)], r"no triangles and no tetrahedra \(cells: line\)"),
        (POINTS, [("quad", [[0, 1, 4, 3]]), ("triangle", TRIANGLES[2:])], "cells of type quad"),
        (POINTS + np.array([0, 0, 1]) * POINTS[:, :1], [("triangle", TRIANGLES)], "z varies by 2"),
    ],
)
def test_meshes_of_the_wrong_kind_are_refused(tmp_path, points, cells, words) -> None:
    path = tmp_path / "wrong.vtu"
    meshio.Mesh(points, [(kind, np.asarray(rows)) for kind, rows in cells]).write(path)
    with pytest.raises(ConfigError, match=words):
        read(path)
