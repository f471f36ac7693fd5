"""Several ranks find the answer of one, to ten times the tolerance; all ranks decide the same."""

from __future__ import annotations

import numpy as np
import pytest
from linear_systems import convection_system, grid_system

from simlab.core.comm import world
from simlab.core.errors import ConfigError
from simlab.core.reports import Reason
from simlab.linalg.system import solvers

RTOL = 1e-9
KINDS = [kind for kind in solvers if kind != "fast"]


def gathered(comm, x):
    return np.concatenate(comm.allgather(x.getArray().copy()))


def everywhere(comm, claim):
    """Fail on all ranks when the claim is false on one, so that none is left waiting."""
    claims = comm.allgather(bool(claim))
    assert all(claims), f"false on ranks {[k for k, ok in enumerate(claims) if not ok]}"


def serial_answer(make):
    system, solver = make(), solvers.build({"kind": "direct", "rtol": 1e-12})
    state = solver.init(system)
    result, state = solver.solve(system, state)
    answer = result.x.getArray().copy()
    state.destroy()
    return answer


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_solution_on_any_number_of_ranks(kind):
    comm = world()
    solver = solvers.build({"kind": kind, "rtol": RTOL})
    for make in (grid_system, convection_system):
        system = make(comm=comm)
        if not solver.suits(system):
            continue
        state = solver.init(system)
        for _ in range(4):
            result, state = solver.solve(system, state)
            everywhere(comm, result.report.converged)
        expected = serial_answer(make)
        error = np.linalg.norm(gathered(comm, result.x) - expected) / np.linalg.norm(expected)
        everywhere(comm, error <= 10 * RTOL)
        everywhere(comm, result.report.true_relres <= RTOL)
        everywhere(comm, len(set(comm.allgather(result.report.solver))) == 1)
        state.destroy()


@pytest.mark.parallel([2, 3])
def test_incomplete_factors_work_inside_block_jacobi_and_say_so():
    comm = world()
    solver = solvers.build("cg_icc")
    system = grid_system(comm=comm)
    state = solver.init(system)
    result, state = solver.solve(system, state)
    everywhere(comm, result.report.converged)
    everywhere(comm, result.report.solver == "cg+bjacobi(icc)")
    state.destroy()


@pytest.mark.parallel([2, 3])
def test_factors_go_to_mumps():
    comm = world()
    solver = solvers.build("direct")
    system = grid_system(comm=comm)
    state = solver.init(system)
    result, state = solver.solve(system, state)
    everywhere(comm, result.report.solver == "cholesky(mumps)")
    state.destroy()


@pytest.mark.parallel([2, 3])
def test_the_pilot_decides_the_same_everywhere_and_leaves_out_fast():
    comm = world()
    solver = solvers.build("auto")
    system = grid_system((30, 31), comm=comm)
    state = solver.init(system)
    for _ in range(solver.pilot):
        result, state = solver.solve(system, state)
        everywhere(comm, result.report.converged)
    everywhere(comm, len(set(comm.allgather(state.reason))) == 1)
    everywhere(comm, state.choice is not None and state.choice.kind != "fast")
    state.destroy()


@pytest.mark.parallel([2, 3])
def test_fast_refuses_several_ranks_on_all_of_them():
    comm = world()
    system = grid_system(comm=comm)
    solver = solvers.build("fast")
    everywhere(comm, not solver.suits(system))
    with pytest.raises(ConfigError):
        solver.init(system)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_on_one_rank_is_known_on_all(kind):
    comm = world()
    system = grid_system(comm=comm)
    if comm.rank == comm.size - 1:
        system.b.setValue(system.b.getOwnershipRange()[0], np.nan)
    system.b.assemble()
    solver = solvers.build(kind)
    state = solver.init(system)
    result, state = solver.solve(system, state)
    everywhere(comm, result.report.reason is Reason.NON_FINITE)
    state.destroy()
