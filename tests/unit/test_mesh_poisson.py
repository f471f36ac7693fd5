"""Poisson's settings: parameters, schema, and what is refused before anything is assembled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simlab.core.config import as_table, build
from simlab.core.errors import ConfigError
from simlab.problems.family import families
from simlab.problems.poisson import Poisson

MESHES = Path(__file__).parents[2] / "cases" / "meshes"
MESH = str(MESHES / "bracket_coarse.msh")
TABLE = {
    "mesh": MESH,
    "dirichlet": {"bore": [20.0, 60.0], "foot": 5},
    "neumann": {"end": [-3.0, 3.0]},
    "robin": {"air": {"coefficient": 4.0, "ambient": [10.0, 30.0]}},
    "source": {"chip": [0.0, 400.0]},
    "conductivity": {"plate": 1.0, "chip": 8.0},
    "grid": [24, 20],
}


def test_ranges_become_parameters_and_numbers_constants() -> None:
    family = build(Poisson, TABLE)
    family.validate()
    names = ("source.chip", "dirichlet.bore", "neumann.end", "robin.air")
    assert family.space.names == (*names, "inside")
    assert tuple(family.schema.parameters) == names
    assert family.schema.constants == {
        "dirichlet.foot": 5.0,
        "conductivity.plate": 1.0,
        "conductivity.chip": 8.0,
        "robin.air.coefficient": 4.0,
    }
    for mu in family.space.sample(20, seed=5):
        family.schema.check_sample(mu)
        assert family.space.contains(mu)
        assert 20.0 <= mu.parameters["dirichlet.bore"] <= 60.0
    whole, part = family.space.sample(9, 31), family.space.sample(2, 31, start=7)
    assert [mu.parameters for mu in whole[7:]] == [mu.parameters for mu in part]


def test_the_schema_has_grid_mesh_and_mask() -> None:
    family = build(Poisson, TABLE | {"degree": 2})
    schema = family.schema
    assert schema.shape == (24, 20)
    assert [(s.name, s.role, s.location) for s in schema.fields] == [
        ("inside", "input", "grid"),
        ("u", "output", "grid"),
        ("u_mesh", "output", "vertex"),
    ]
    (vertex,) = (s for s in schema.outputs if s.location == "vertex")
    assert schema.field_shape(vertex) == (len(schema.mesh.points),)
    inside = family.space.sample(1, 1)[0].fields["inside"]
    assert set(np.unique(inside)) == {0.0, 1.0}
    assert inside.mean() == pytest.approx(0.806 / 1.2, abs=0.03)


def test_tables_round_trip() -> None:
    family = families.build({"kind": "poisson"} | TABLE)
    table = as_table(family)
    assert table["dirichlet"] == {"bore": [20.0, 60.0], "foot": 5.0}
    assert families.build(table) == family


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dirichlet": {}, "robin": {}}, "neither dirichlet nor robin data.*not unique"),
        ({"dirichlet": {"bore": [2.0, 1.0]}}, r"dirichlet.bore: expected .*low < high, found \[2"),
        ({"dirichlet": {"bore": "warm"}}, "dirichlet.bore: expected a finite number or"),
        ({"dirichlet": {"bore": float("nan")}}, "dirichlet.bore: expected a finite number"),
        ({"neumann": {"end": True}}, "neumann.end: expected a finite number"),
        ({"source": [1.0, 2.0, 3.0]}, "source: expected a finite number or"),
        ({"conductivity": -2.0}, "conductivity: must be positive, found -2"),
        ({"conductivity": {"chip": [0.0, 2.0]}}, r"conductivity.chip: must be positive, found 0"),
        ({"conductivity": {"chip": {"kind": "chebyshev"}}}, "conductivity.chip: expected a finite"),
        ({"dirichlet": {"bore": {"kind": "chebyshov"}}}, "dirichlet.bore: unknown expansion kind"),
        (
            {"neumann": {"end": {"kind": "chebyshev", "degree": -1}}},
            "neumann.end.degree: .*greater than or equal to 0",
        ),
        ({"source": {"kind": "chebyshev", "low": 1.0}}, "source.low: must be below high, found 1"),
        ({"mesh": {"kind": "square", "sise": 0.1}}, "mesh.sise: unknown key; did you mean 'size'"),
        ({"robin": {"air": {"coefficient": 0.0}}}, "robin.air.coefficient.*greater than 0"),
        ({"robin": {"air": {"coeficient": 1.0}}}, "robin.air.coefficient: required"),
        ({"neumann": {"bore": 1.0}}, "neumann.bore: the group has dirichlet data already"),
        ({"degree": 3}, "degree"),
        ({"grid": [0, 4]}, "grid.0"),
        ({"dirchlet": {}}, "dirchlet: unknown key; did you mean 'dirichlet'"),
    ],
)
def test_wrong_settings_are_refused(change, words) -> None:
    with pytest.raises(ConfigError, match=words):
        build(Poisson, TABLE | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mesh": MESH + "x"}, "no mesh file"),
        (
            {"dirichlet": {"bor": 1.0}},
            r"dirichlet.bor: .*no boundary group 'bor'; did you mean 'bore'",
        ),
        ({"neumann": {"chip": 1.0}}, r"neumann.chip: .*\(it has: air, bore"),
        ({"source": {"end": 1.0}}, r"source.end: .*no cell group 'end' \(it has: chip, plate\)"),
        (
            {"conductivity": {"chip": 1.0}},
            "conductivity: 421 of 453 cells .* in none of the groups",
        ),
        (
            {"neumann": {"bore": {"kind": "chebyshev"}}, "dirichlet": {"end": 1.0}},
            r"neumann.bore: group 'bore' of .* is not one curve with two ends \(0 ends\)",
        ),
        (
            {"dirichlet": {"bore": {"kind": "vertices", "file": "nowhere.npy"}}},
            "dirichlet.bore: file: no such file nowhere.npy",
        ),
        ({"grid": [8, 8, 8]}, "grid: 3 axes, but .* has 2"),
        ({"grid": [16]}, "grid: 1 axes, but .* has 2"),
    ],
)
def test_validate_finds_what_does_not_fit_the_mesh(change, words) -> None:
    family = build(Poisson, TABLE | change)
    with pytest.raises(ConfigError, match=words):
        family.validate()


def test_all_faults_are_shown_together() -> None:
    change = {"dirichlet": {"bor": 1.0}, "neumann": {"en": 2.0}, "grid": [4]}
    with pytest.raises(ConfigError) as caught:
        build(Poisson, TABLE | change).validate()
    assert len(caught.value.faults) == 3


def test_a_loose_piece_is_refused(tmp_path) -> None:
    import meshio

    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=float)
    path = tmp_path / "two.msh"
    tags = [np.array([1]), np.array([2, 2, 2, 2])]
    meshio.Mesh(
        np.concatenate([square, square + np.array([5, 5, 0])]),
        [("line", [[0, 1]]), ("triangle", [[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])],
        cell_data={"gmsh:physical": tags, "gmsh:geometrical": tags},
        field_data={"low": np.array([1, 1])},
    ).write(path, file_format="gmsh22")
    with pytest.raises(ConfigError, match="1 of its 2 unconnected pieces"):
        Poisson(mesh=str(path), dirichlet={"low": 1.0}).validate()
    Poisson(mesh=str(path), dirichlet={"low": 1.0, "boundary": 2.0}).validate()


def test_where_two_groups_meet_the_first_named_decides() -> None:
    from simlab.core.comm import self_comm

    for first, second in (("foot", "wall"), ("wall", "foot")):
        family = Poisson(mesh=MESH, dirichlet={first: 1.0, second: 2.0}, degree=2)
        workspace = family.setup(self_comm())
        problem = workspace.operator
        shared = np.intersect1d(*(problem.space.group_dofs(n) for n in (first, second)))
        assert len(shared) == 1  # the corner of the bracket
        system = family.assemble(family.space.sample(1, 3)[0], workspace)
        held = system.b.getArray()[shared] / system.A.getDiagonal().getArray()[shared]
        assert held == pytest.approx(1.0)
        workspace.destroy()


def test_describing_a_case_loads_neither_petsc_nor_mpi() -> None:
    code = (
        "import sys\n"
        "from simlab.problems.poisson import Poisson\n"
        f"f = Poisson(mesh={MESH!r}, dirichlet={{'bore': [1.0, 2.0]}}, degree=2)\n"
        "f.validate(); f.schema; f.space.sample(2, 3)\n"
        "print([m for m in ('petsc4py', 'mpi4py', 'torch', 'matplotlib') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
