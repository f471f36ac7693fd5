"""Poisson against manufactured and exact solutions, and the properties of its matrix."""

from __future__ import annotations

from pathlib import Path

import meshio
import numpy as np
import pytest
import skfem

from simlab.core.comm import self_comm
from simlab.core.samples import Sample
from simlab.linalg import petsc as PETSc
from simlab.mesh.files import read
from simlab.mesh.mesh import make
from simlab.problems.fem import Elliptic, Space
from simlab.problems.poisson import Poisson

MESHES = Path(__file__).parents[2] / "cases" / "meshes"


def solve(A, b) -> np.ndarray:
    """Solve directly on this rank."""
    ksp = PETSc.KSP().create(self_comm())
    ksp.setType("preonly")
    ksp.getPC().setType("cholesky")
    ksp.setOperators(A)
    x = A.createVecRight()
    ksp.solve(b, x)
    values = x.getArray().copy()
    ksp.destroy()
    x.destroy()
    return values


def box(dim: int, times: int):
    """The unit square or cube with moved inner vertices; groups x0, x1, y0, ... of its sides."""
    raw = (skfem.MeshTri if dim == 2 else skfem.MeshTet)().refined(times)
    x = raw.p.T
    facets = raw.facets.T
    groups = {
        f"{name}{end}": facets[np.all(x[facets, i] == end, axis=1)]
        for i, name in enumerate("xyz"[:dim])
        for end in (0, 1)
    }
    moved = x + 0.05 * np.prod(np.sin(np.pi * x), axis=1, keepdims=True)
    return make(moved, raw.t.T, facet_groups=groups)


class Manufactured:
    """u = exp(x/2) sin(2 y + 0.3) + x^2 (+ cos z), k = 1 + 0.3 x y, c = 1 + x."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def u(self, x):
        flat = np.exp(x[0] / 2) * np.sin(2 * x[1] + 0.3) + x[0] ** 2
        return flat + (np.cos(x[2]) if self.dim == 3 else 0.0)

    def k(self, x):
        return 1 + 0.3 * x[0] * x[1]

    def c(self, x):
        return 1 + x[0]

    def gradient(self, x):
        wave, tilt = np.exp(x[0] / 2), 2 * x[1] + 0.3
        parts = [wave / 2 * np.sin(tilt) + 2 * x[0], 2 * wave * np.cos(tilt)]
        return parts if self.dim == 2 else [*parts, -np.sin(x[2])]

    def f(self, x):
        wave, tilt = np.exp(x[0] / 2), 2 * x[1] + 0.3
        laplacian = (0.25 - 4.0) * wave * np.sin(tilt) + 2
        laplacian -= np.cos(x[2]) if self.dim == 3 else 0.0
        g = self.gradient(x)
        return -(self.k(x) * laplacian + 0.3 * x[1] * g[0] + 0.3 * x[0] * g[1])

    def flux(self, axis: int, sign: float):
        return lambda x: sign * self.k(x) * self.gradient(x)[axis]

    def ambient(self, axis: int, sign: float):
        return lambda x: self.u(x) + self.flux(axis, sign)(x) / self.c(x)


def l2_error(dim: int, degree: int, times: int) -> tuple[float, float]:
    """Return mesh width and error with Dirichlet, Neumann and Robin data on different sides."""
    exact = Manufactured(dim)
    space = Space(box(dim, times), degree)
    held = ["x0"] if dim == 2 else ["x0", "z1"]
    problem = Elliptic(self_comm(), space, exact.k, {"y1": exact.c}, held)
    b = problem.source(exact.f)
    loads = [problem.fixed(name, exact.u) for name in held]
    loads += [problem.flux("x1", exact.flux(0, 1)), problem.flux("y0", exact.flux(1, -1))]
    loads += [problem.ambient("y1", exact.ambient(1, 1))]
    if dim == 3:
        loads.append(problem.flux("z0", exact.flux(2, -1)))
    for load in loads:
        b.axpy(1.0, load)
        load.destroy()
    u = solve(problem.A, b)
    basis = skfem.CellBasis(problem.part.basis.mesh, problem.part.basis.elem, intorder=8)
    there = np.asarray(basis.interpolate(u[problem.part.dofs]))
    x = np.asarray(basis.global_coordinates())
    error = np.sqrt(np.sum((there - exact.u(x)) ** 2 * basis.dx))
    problem.destroy()
    b.destroy()
    return 2.0**-times, error


@pytest.mark.parametrize(
    ("dim", "degree", "levels"),
    [(2, 1, (2, 3, 4, 5)), (2, 2, (2, 3, 4, 5)), (3, 1, (2, 3, 4)), (3, 2, (1, 2, 3))],
)
def test_order_with_all_three_kinds_of_data(dim, degree, levels) -> None:
    h, errors = np.array([l2_error(dim, degree, times) for times in levels]).T
    order = np.polyfit(np.log(h), np.log(errors), 1)[0]
    assert degree + 0.8 < order < degree + 1.35
    assert errors[-1] < {1: 6e-3, 2: 2e-4}[degree]


@pytest.mark.parametrize("degree", [1, 2])
def test_data_as_numbers_functions_and_arrays_agree(degree) -> None:
    space = Space(box(2, 2), degree)
    n_cells = len(space.mesh.cells)
    made = []
    for three in (
        3.0,
        lambda x: np.full(x.shape[1:], 3.0),
        np.full(space.n_dofs, 3.0),
        np.full((n_cells, 1), 3.0),
    ):
        problem = Elliptic(self_comm(), space, three, {"y1": three}, ["x0"])
        vectors = [problem.source(three), problem.flux("x1", three), problem.ambient("y1", three)]
        made.append((problem.A.getValuesCSR()[2], *(v.getArray().copy() for v in vectors)))
    for other in made[1:]:
        for a, b in zip(made[0], other, strict=True):
            assert np.allclose(a, b, rtol=1e-13, atol=1e-13)
    # integrals: area of the square, length of a side, and 3 x 3 on the Robin side
    assert made[0][2].sum() == pytest.approx(3.0)
    assert made[0][3][~np.isin(np.arange(space.n_dofs), space.group_dofs("x0"))].sum() < 9.0


def family(**changes) -> Poisson:
    table = {
        "mesh": str(MESHES / "bracket_coarse.msh"),
        "dirichlet": {"bore": [20.0, 60.0], "wall": 5.0},
        "neumann": {"end": [-3.0, 3.0]},
        "robin": {"air": {"coefficient": 4.0, "ambient": [10.0, 30.0]}},
        "source": {"chip": [0.0, 400.0], "plate": 1.0},
        "conductivity": {"plate": 1.0, "chip": 8.0},
        "grid": [24, 20],
    }
    return Poisson(**(table | changes))


def observed(case: Poisson, mu: Sample) -> dict[str, np.ndarray]:
    workspace = case.setup(self_comm())
    system = case.assemble(mu, workspace)
    x = system.A.createVecRight()
    x.setArray(solve(system.A, system.b))
    assert system.residual(x) < 1e-12
    fields = case.observe(mu, x, workspace)
    x.destroy()
    workspace.destroy()
    return fields


@pytest.mark.parametrize("degree", [1, 2])
def test_the_matrix_keeps_its_promises(degree) -> None:
    case = family(degree=degree)
    workspace = case.setup(self_comm())
    first, second = case.space.sample(2, seed=413)
    system = case.assemble(first, workspace)
    version, b = system.version, system.b.getArray().copy()
    again = case.assemble(second, workspace)
    assert again.version == version
    assert not np.allclose(again.b.getArray(), b)
    assert again.traits.constant_matrix
    assert again.traits.spd
    rows, columns, values = system.A.getValuesCSR()
    A = np.zeros(system.A.getSize())
    A[np.repeat(np.arange(len(A)), np.diff(rows)), columns] = values
    assert np.abs(A - A.T).max() <= 1e-13 * np.abs(A).max()
    assert np.linalg.eigvalsh(A).min() > 0
    info = system.A.getInfo()
    assert info["mallocs"] == 0
    assert info["nz_allocated"] == info["nz_used"]
    workspace.destroy()


@pytest.mark.parametrize("degree", [1, 2])
def test_a_plate_at_one_temperature_stays_there(degree) -> None:
    # held walls and surroundings at 21 degrees, nothing flows: u = 21 in both materials
    case = family(
        degree=degree,
        dirichlet={"bore": [20.0, 60.0], "wall": 21.0},
        neumann={},
        source=0.0,
    )
    fields = observed(case, Sample(0, 1, {"dirichlet.bore": 21.0, "robin.air": 21.0}))
    assert np.allclose(fields["u_mesh"], 21.0, rtol=1e-11)
    inside = case.space.sample(1, 1)[0].fields["inside"]
    assert np.allclose(fields["u"], 21.0 * inside, rtol=1e-11)


def write_bar(path: Path) -> str:
    """Write a bar of two materials, lengths 1 and 1, height 0.5; groups in Gmsh's format 2.2."""
    raw = skfem.MeshTri.init_tensor(np.linspace(0, 2, 9), np.linspace(0, 0.5, 4))
    x, facets = raw.p.T, raw.facets.T
    lines = [facets[np.all(x[facets, 0] == end, axis=1)] for end in (0.0, 2.0)]
    halves = [
        raw.t.T[side] for side in np.array([1, -1])[:, None] * (x[raw.t.T, 0].mean(1) - 1) < 0
    ]
    blocks = [
        ("line", lines[0]),
        ("line", lines[1]),
        ("triangle", halves[0]),
        ("triangle", halves[1]),
    ]
    tags = [np.full(len(rows), tag) for tag, (_, rows) in enumerate(blocks, 1)]
    names = {"left": [1, 1], "right": [2, 1], "soft": [3, 2], "hard": [4, 2]}
    meshio.Mesh(
        np.column_stack([x, np.zeros(len(x))]),
        blocks,
        cell_data={"gmsh:physical": tags, "gmsh:geometrical": tags},
        field_data={name: np.array(entry) for name, entry in names.items()},
    ).write(path, file_format="gmsh22")
    return str(path)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("end", ["neumann", "robin", "dirichlet"])
def test_a_bar_of_two_materials_is_exact(tmp_path, degree, end) -> None:
    g, flux, k, c, w = 3.0, 0.7, 4.0, 2.5, 11.0
    data = {"neumann": {"right": flux}}
    if end == "robin":
        flux = c * (w - g) / (1 + c * (1 + 1 / k))
        data = {"robin": {"right": {"coefficient": c, "ambient": w}}}
    elif end == "dirichlet":
        flux = (w - g) / (1 + 1 / k)
        data = {"dirichlet": {"right": w}}
    data["dirichlet"] = data.get("dirichlet", {}) | {"left": g}
    case = Poisson(
        mesh=write_bar(tmp_path / "bar.msh"),
        conductivity={"soft": 1.0, "hard": k},
        degree=degree,
        grid=[10, 3],
        **data,
    )
    case.validate()
    fields = observed(case, case.space.sample(1, 5)[0])
    x = case.schema.mesh.points[:, 0]
    exact = g + flux * (np.minimum(x, 1) + np.maximum(x - 1, 0) / k)
    assert np.allclose(fields["u_mesh"], exact, rtol=1e-12)
    x = np.array(case.schema.axes[0].coordinates)
    exact = g + flux * (np.minimum(x, 1) + np.maximum(x - 1, 0) / k)
    assert np.allclose(fields["u"], exact[:, None], rtol=1e-12)


def test_solutions_are_affine_in_the_parameters() -> None:
    case = family(degree=2)
    mus = case.space.sample(2, seed=88)
    middle = {n: 0.5 * (mus[0].parameters[n] + mus[1].parameters[n]) for n in case.ranges}
    a, b, m = (observed(case, mu)["u_mesh"] for mu in (*mus, Sample(7, 88, middle, mus[0].fields)))
    assert np.allclose(0.5 * (a + b), m, rtol=1e-10)
    assert not np.allclose(a, b, rtol=1e-2)


def test_heat_balance() -> None:
    """With Robin data only: what the source and the flux bring in leaves to the surroundings."""
    case = family(
        dirichlet={},
        source={"chip": 50.0},
        neumann={"end": 2.0},
        robin={"air": {"coefficient": 3.0}},
    )
    mesh = read(case.mesh)
    u = observed(case, case.space.sample(1, 1)[0])["u_mesh"]

    def lengths(name):
        ends = mesh.points[mesh.facets[mesh.facet_group(name)]]
        return np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)

    brought = 50.0 * mesh.volumes()[mesh.cell_group("chip")].sum() + 2.0 * lengths("end").sum()
    air = u[mesh.facets[mesh.facet_group("air")]].mean(axis=1)
    assert 3.0 * np.sum(lengths("air") * air) == pytest.approx(brought, rel=1e-10)
