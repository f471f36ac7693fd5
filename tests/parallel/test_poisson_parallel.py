"""Poisson on 1, 2 and 3 ranks equals Poisson on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pytest_mpi import parallel_assert

from simlab.core.comm import self_comm, world
from simlab.core.errors import ConfigError
from simlab.linalg import petsc as PETSc
from simlab.mesh.mesh import make
from simlab.problems.fem import Elliptic, Part, Space
from simlab.problems.poisson import Poisson

MESHES = Path(__file__).parents[2] / "cases" / "meshes"


def solve(comm, A, b) -> np.ndarray:
    """Solve to rounding and return the whole solution on every rank."""
    ksp = PETSc.KSP().create(comm)
    ksp.setType("cg")
    ksp.getPC().setType("jacobi")
    ksp.setTolerances(rtol=1e-14, max_it=5000)
    ksp.setOperators(A)
    x = A.createVecRight()
    ksp.solve(b, x)
    scatter, whole = PETSc.Scatter.toAll(x)
    scatter.scatter(x, whole)
    values = whole.getArray().copy()
    for item in (scatter, whole, ksp):
        item.destroy()
    return values, x


SUM = {"kind": "chebyshev", "degree": 5}
SQUARE = {
    "mesh": {"kind": "square", "size": 0.12},
    "degree": 2,
    "grid": [9, 8],
    "source": SUM,
    "dirichlet": dict.fromkeys(("left", "right", "bottom", "top"), SUM),
}
BLOCK = {
    "mesh": {"kind": "square", "size": 0.12, "blocks": [2, 1]},
    "degree": 2,
    "grid": [9, 8],
    "dirichlet": {"top": SUM},
    "neumann": {"right": SUM},
    "robin": {"bottom": {"coefficient": 3.0, "ambient": [0.0, 1.0]}},
    "conductivity": {"block_1_1": [0.1, 10.0], "block_2_1": [0.1, 10.0]},
}
PLATE = {
    "mesh": {"kind": "slotted_plate", "size": 0.1},
    "degree": 2,
    "grid": [9, 14],
    "dirichlet": {"left": [0.0, 100.0]},
    "neumann": {"right": [-100.0, 0.0]},
}


KINDS = [1, 2, SQUARE, BLOCK, PLATE]
IDS = ["linear", "quadratic", "square", "block", "plate"]


def family(which: int | dict) -> Poisson:
    """Return the bracket with elements of a degree, or one of the tables above."""
    if isinstance(which, dict):
        return Poisson(**which)
    return Poisson(
        mesh=str(MESHES / "bracket_coarse.msh"),
        degree=which,
        dirichlet={"bore": [20.0, 60.0]},
        neumann={"end": [-3.0, 3.0]},
        robin={"air": {"coefficient": 4.0, "ambient": [10.0, 30.0]}},
        source={"chip": [0.0, 400.0]},
        conductivity={"plate": 1.0, "chip": 8.0},
        grid=[24, 20],
    )


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("which", KINDS, ids=IDS)
def test_fields_equal_those_of_one_rank(which) -> None:
    case = family(which)
    mu = case.space.sample(1, seed=640)[0]
    found = []
    for comm in (world(), self_comm()):
        workspace = case.setup(comm)
        system = case.assemble(mu, workspace)
        _, x = solve(comm, system.A, system.b)
        residual = system.residual(x)
        fields = case.observe(mu, x, workspace)
        parallel_assert(residual < 1e-12, f"residual {residual}")
        parallel_assert(bool(fields) == (comm.rank == 0))
        found.append(fields)
        x.destroy()
        workspace.destroy()
    together, alone = found
    for name, values in together.items():
        assert np.allclose(values, alone[name], rtol=0, atol=1e-10 * np.abs(alone[name]).max())


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("which", KINDS, ids=IDS)
def test_matrix_and_right_hand_side_equal_those_of_one_rank(which) -> None:
    case = family(which)
    mu = case.space.sample(1, seed=640)[0]
    together, alone = case.setup(world()), case.setup(self_comm())
    A, B = together.operator.A, alone.operator.A
    first, last = A.getOwnershipRange()
    rows, columns, values = A.getValuesCSR()
    mine = np.zeros((last - first, B.getSize()[1]))
    mine[np.repeat(np.arange(last - first), np.diff(rows)), columns] = values
    rows, columns, values = B.getValuesCSR()
    whole = np.zeros(B.getSize())
    whole[np.repeat(np.arange(len(whole)), np.diff(rows)), columns] = values
    gap = np.abs(mine - whole[first:last]).max() / np.abs(whole).max()
    parallel_assert(gap < 1e-14, f"matrix differs by {gap}")
    b, c = case.assemble(mu, together).b, case.assemble(mu, alone).b
    gap = np.abs(b.getArray() - c.getArray()[first:last]).max() / np.abs(c.getArray()).max()
    parallel_assert(gap < 1e-14, f"right-hand side differs by {gap}")
    info = A.getInfo(info=PETSc.Mat.InfoType.GLOBAL_SUM)
    parallel_assert(info["nz_allocated"] == info["nz_used"], str(info))
    together.destroy()
    alone.destroy()


@pytest.mark.parallel([1, 2, 3])
def test_terms_of_an_affine_matrix_equal_those_of_one_rank() -> None:
    case = family(BLOCK)
    one, two = case.space.sample(2, seed=640)
    together, alone = case.setup(world()), case.setup(self_comm())
    counters = []
    for mu in (one, one, two):
        system, serial = case.assemble(mu, together), case.assemble(mu, alone)
        counters.append(system.version[1])
        first, last = system.A.getOwnershipRange()
        total = np.zeros(last - first)
        for t, A, B in zip(
            system.affine.theta, system.affine.terms, serial.affine.terms, strict=True
        ):
            x, y = A.createVecs()
            x.setArray(np.sin(np.arange(first, last)))
            u, v = B.createVecs()
            u.setArray(np.sin(np.arange(B.getSize()[0])))
            A.mult(x, y)
            B.mult(u, v)
            gap = np.abs(y.getArray() - v.getArray()[first:last]).max() / np.abs(v.getArray()).max()
            parallel_assert(gap < 1e-13, f"term differs by {gap}")
            total += t * y.getArray()
        system.A.mult(x, y)
        gap = np.abs(y.getArray() - total).max()
        parallel_assert(gap < 1e-12, f"the sum differs by {gap}")
        parallel_assert(np.array_equal(system.affine.theta, serial.affine.theta))
    parallel_assert(counters[0] == counters[1] < counters[2], str(counters))
    together.destroy()
    alone.destroy()


@pytest.mark.parallel([1, 2, 3])
def test_every_cell_and_facet_is_assembled_once() -> None:
    # facets of an inner group lie between cells of different ranks
    import skfem

    raw = skfem.MeshTri().refined(3)
    x, facets = raw.p.T, raw.facets.T
    middle = facets[np.all(x[facets, 0] == 0.5, axis=1)]
    mesh = make(x, raw.t.T, facet_groups={"middle": middle})
    comm = world()
    part = Part(Space(mesh, 2), comm.rank, comm.size)
    area = comm.allreduce(part.load(1.0).sum())
    length = comm.allreduce(part.facet_load("middle", 1.0).sum())
    sizes = comm.allgather(part.cells.stop - part.cells.start)
    parallel_assert(abs(area - 1.0) < 1e-13, f"area {area}")
    parallel_assert(abs(length - 1.0) < 1e-13, f"length {length}")
    parallel_assert(sum(sizes) == len(mesh.cells), str(sizes))
    parallel_assert(max(sizes) - min(sizes) <= 1, str(sizes))


@pytest.mark.parallel([3])
def test_more_ranks_than_cells() -> None:
    points = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=float)
    mesh = make(points, [[0, 1, 2], [0, 2, 3]], facet_groups={"left": [[0, 3]]})
    space = Space(mesh, 2)
    found = []
    for comm in (world(), self_comm()):
        problem = Elliptic(comm, space, 2.0, {"boundary": 1.0}, ["left"])
        b = problem.source(3.0)
        b.axpy(1.0, problem.fixed("left", lambda x: x[1]))
        found.append(solve(comm, problem.A, b)[0])
        problem.destroy()
    parallel_assert(np.allclose(found[0], found[1], rtol=0, atol=1e-12), str(found))


@pytest.mark.parallel([2, 3])
def test_a_wrong_mesh_is_refused_on_every_rank() -> None:
    case = Poisson(mesh="nowhere/missing.msh", dirichlet={"boundary": [0.0, 1.0]})
    with pytest.raises(ConfigError, match=r"no mesh file nowhere/missing\.msh"):
        case.setup(world())
