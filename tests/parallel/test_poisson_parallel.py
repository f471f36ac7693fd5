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


def family(degree: int) -> Poisson:
    return Poisson(
        mesh=str(MESHES / "bracket_coarse.msh"),
        degree=degree,
        dirichlet={"bore": [20.0, 60.0]},
        neumann={"end": [-3.0, 3.0]},
        robin={"air": {"coefficient": 4.0, "ambient": [10.0, 30.0]}},
        source={"chip": [0.0, 400.0]},
        conductivity={"plate": 1.0, "chip": 8.0},
        grid=[24, 20],
    )


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("degree", [1, 2])
def test_fields_equal_those_of_one_rank(degree) -> None:
    case = family(degree)
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
@pytest.mark.parametrize("degree", [1, 2])
def test_matrix_and_right_hand_side_equal_those_of_one_rank(degree) -> None:
    case = family(degree)
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
