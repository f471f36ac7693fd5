"""Recycling solvers and the static space on several ranks: iterations and answers of one rank."""

from __future__ import annotations

import numpy as np
import pytest
from linear_systems import convection, convection_system, diffusion, grid_system, smooth_field

from simlab.core.comm import self_comm, world
from simlab.core.errors import ConfigError
from simlab.linalg import petsc as PETSc
from simlab.linalg.blocks import Reducer
from simlab.linalg.seed import Seed, seed_space
from simlab.linalg.system import LinearSystem, Traits, solvers

RTOL = 1e-9
RANKS = [1, 2, 3]
# block Jacobi is another preconditioner on every number of ranks; Jacobi is the same one
SETTINGS = {
    "gcrodr carried": {"kind": "gcrodr", "carried": 12, "restart": 30},
    "gcrodr static": {"kind": "gcrodr", "carried": 0, "static": 12, "restart": 30},
    "deflated_cg carried": {"kind": "deflated_cg", "carried": 12},
    "deflated_cg both": {"kind": "deflated_cg", "carried": 8, "static": 8},
    "recycle": {"kind": "recycle", "carried": 10},
}


def built(name, **more):
    gate = {} if name == "recycle" else {"gate": False}
    return solvers.build(SETTINGS[name] | {"preconditioner": "jacobi", "rtol": RTOL} | gate | more)


def gathered(comm, values):
    return np.concatenate(comm.allgather(np.array(values)))


def everywhere(comm, claim):
    """Fail on all ranks when the claim is false on one, so that none is left waiting."""
    claims = comm.allgather(bool(claim))
    assert all(claims), f"false on ranks {[k for k, ok in enumerate(claims) if not ok]}"


def refill(system, matrix):
    """Put a serial matrix's values into a distributed one of the same pattern."""
    low, high = system.A.getOwnershipRange()
    part = matrix[low:high]
    system.A.setValuesCSR(part.indptr.astype("i4"), part.indices.astype("i4"), part.data)
    system.A.assemble()


def walk(solver, comm, *, symmetric):
    """Iterations and solutions of five systems, each with a matrix of its own."""
    n = 25
    system = grid_system((n, n), comm=comm) if symmetric else convection_system(n, comm=comm)
    state, its, answers = solver.init(system), [], []
    for seed in range(31, 36):
        field = smooth_field((n, n), seed)
        refill(system, diffusion(field) if symmetric else convection(n, seed))
        result, state = solver.solve(system, state)
        everywhere(comm, result.report.converged)
        its.append(result.report.iterations)
        answers.append(gathered(comm, result.x.getArray()))
    U, image = state.deflated_pair()
    everywhere(comm, U.shape == image.shape)
    columns = set(comm.allgather(U.shape[1]))
    state.destroy()
    assert len(columns) == 1
    return np.array(its), answers, columns.pop()


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_iterations_and_answers_do_not_depend_on_the_ranks(name, symmetric):
    comm = world()
    solver = built(name)
    if not symmetric and name.startswith("deflated_cg"):
        pytest.skip("needs an SPD matrix")
    its, answers, columns = walk(solver, comm, symmetric=symmetric)
    serial, expected, serial_columns = walk(solver, self_comm(), symmetric=symmetric)
    everywhere(comm, len(set(comm.allgather(tuple(its)))) == 1)
    everywhere(comm, abs(its.sum() - serial.sum()) <= 0.02 * serial.sum() + 1)
    everywhere(comm, columns == serial_columns)
    for x, y in zip(answers, expected, strict=True):
        everywhere(comm, np.linalg.norm(x - y) <= 10 * RTOL * np.linalg.norm(y))


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("make", [grid_system, convection_system])
def test_the_static_space_is_that_of_one_rank(make):
    comm = world()
    system = make(comm=comm)
    seed, serial = seed_space(system, 7), seed_space(make(), 7)
    everywhere(comm, np.allclose(seed.values, serial.values, rtol=1e-6))
    everywhere(comm, len(set(comm.allgather(seed.values.tobytes()))) == 1)
    whole = gathered(comm, seed.vectors)
    missing = serial.vectors - whole @ (whole.T @ serial.vectors)
    everywhere(comm, np.linalg.norm(missing, 2) <= 1e-5)


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("name", ["gcrodr static", "deflated_cg both"])
def test_a_saved_space_is_read_on_as_many_ranks(name, tmp_path_factory):
    comm = world()
    path = comm.bcast(tmp_path_factory.mktemp("space") / "space.npz" if not comm.rank else None)
    system, solver = grid_system(comm=comm), built(name)
    seed = solver.seed(system)
    seed.save(path)
    again = Seed.load(path, system)
    everywhere(comm, np.array_equal(again.vectors, seed.vectors))
    everywhere(comm, np.array_equal(again.values, seed.values))
    its = []
    for space in (seed, again):
        state = solver.init(system, seed=space)
        result, state = solver.solve(system, state)
        everywhere(comm, result.report.converged)
        its.append(result.report.iterations)
        state.destroy()
    everywhere(comm, its[0] == its[1])


@pytest.mark.parallel([2, 3])
def test_a_space_of_another_layout_is_refused_by_all_ranks(tmp_path_factory):
    comm = world()
    path = comm.bcast(tmp_path_factory.mktemp("space") / "space.npz" if not comm.rank else None)
    if comm.rank == 0:
        seed_space(grid_system(), 4).save(path)
    comm.Barrier()
    for make in (
        lambda: Seed.load(path, grid_system(comm=comm)),
        lambda: Seed.load(path.with_name("missing.npz"), grid_system(comm=comm)),
        lambda: built("gcrodr static").init(grid_system(comm=comm), seed_space(grid_system(), 12)),
    ):
        refused = False
        try:
            make()
        except ConfigError:
            refused = True
        everywhere(comm, refused)


@pytest.mark.parallel(RANKS)
def test_spoilt_columns_on_one_rank_are_dropped_on_all():
    comm = world()
    solver, system = built("deflated_cg carried"), grid_system((25, 25), comm=comm)
    state = solver.init(system)
    for _ in range(2):
        result, state = solver.solve(system, state)
    spoilt = np.array(state.carried, order="F")
    if comm.rank == comm.size - 1:
        spoilt[0, 3] = np.nan
    state.carried = spoilt
    result, state = solver.solve(system, state)
    everywhere(comm, result.report.converged)
    everywhere(comm, any("1 of 12 recycled vectors dropped" in line for line in state.events))
    state.destroy()


@pytest.mark.parallel([2, 3])
def test_ranks_without_rows():
    comm = world()
    sizes = (2 if comm.rank == 0 else 0, 2)
    A = PETSc.Mat().createAIJ((sizes, sizes), comm=comm)
    A.setUp()
    if comm.rank == 0:
        A.setValues([0, 1], [0, 1], [[2.0, -1.0], [-1.0, 2.0]])
    A.assemble()
    b = A.createVecLeft()
    b.set(1.0)
    like = grid_system()
    system = type(like)(A, b, like.traits)
    for name in ("deflated_cg carried", "gcrodr carried"):
        solver = built(name)
        state = solver.init(system)
        for _ in range(3):
            result, state = solver.solve(system, state)
            everywhere(comm, result.report.converged)
        everywhere(comm, np.allclose(result.x.getArray(), 1.0))
        state.destroy()


def refuse(value):
    raise ValueError(f"cannot do with {value}")


@pytest.mark.parallel(RANKS)
def test_an_error_on_the_root_is_raised_on_every_rank():
    comm = world()
    with pytest.raises(ValueError, match="cannot do with 7"):
        Reducer(PETSc.Comm(comm)).from_root(refuse, 7)
    everywhere(comm, comm.allreduce(1) == comm.size)


@pytest.mark.parallel([3])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_rank_may_have_no_rows(name):
    comm = world()
    matrix = diffusion(smooth_field((5, 6)))
    rows = 15 if comm.rank != 1 else 0
    part = matrix[15:] if comm.rank else matrix[:rows]
    part = part[:rows]
    csr = (part.indptr.astype("i4"), part.indices.astype("i4"), part.data)
    A = PETSc.Mat().createAIJ(((rows, 30), (rows, 30)), csr=csr, comm=comm)
    b = A.createVecLeft()
    b.set(1.0)
    system = LinearSystem(A, b, Traits(spd=True, symmetric=True))
    solver = built(name)
    state = solver.init(system)
    for _ in range(3):
        result, state = solver.solve(system, state)
        everywhere(comm, result.report.converged)
        A.scale(1.5)
    state.destroy()
