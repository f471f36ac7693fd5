"""Every registered solver keeps the protocol's promises. A new solver is tested by existing."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import scipy.sparse as sp
import tomli_w
from linear_systems import (
    convection_system,
    diffusion,
    grid_system,
    option_names,
    petsc_matrix,
    petsc_vector,
    refill,
    smooth_field,
)

from simlab.core.comm import self_comm
from simlab.core.config import as_table
from simlab.core.errors import ConfigError, ConvergenceError
from simlab.core.reports import Reason
from simlab.linalg import petsc as PETSc
from simlab.linalg.system import LinearSystem, StructuredGrid, Traits, solvers

KINDS = list(solvers)
RTOL = 1e-9


@pytest.fixture(params=KINDS)
def solver(request):
    return solvers.build({"kind": request.param, "rtol": RTOL})


@pytest.fixture(autouse=True)
def _no_option_is_left():
    before = option_names()
    yield
    assert option_names() == before


def solve_one(solver, system):
    state = solver.init(system)
    result, state = solver.solve(system, state)
    return result, state


def dense_solution(system):
    rows, columns, values = system.A.getValuesCSR()
    matrix = sp.csr_matrix((values, columns, rows)).toarray()
    return np.linalg.solve(matrix, system.b.getArray())


def test_solves_spd_systems_to_the_true_tolerance(solver):
    system = grid_system()
    result, state = solve_one(solver, system)
    report = result.report
    assert report.converged
    assert report.reason is Reason.CONVERGED
    assert report.rtol == RTOL
    assert report.true_relres <= RTOL
    assert report.true_relres == pytest.approx(system.residual(result.x), rel=1e-3, abs=1e-15)
    np.testing.assert_allclose(result.x.getArray(), dense_solution(system), rtol=1e-6, atol=1e-8)
    assert {"setup", "solve", "check"} <= set(report.seconds)
    assert all(value >= 0 for value in report.seconds.values())
    assert report.operator_applies >= 1
    assert report.pc_applies >= 1
    assert report.solver
    report.check()
    state.destroy()


def test_solves_nonsymmetric_systems_where_claimed(solver):
    system = convection_system()
    if not solver.suits(system):
        pytest.skip(f"{solver.kind} does not claim nonsymmetric systems")
    result, state = solve_one(solver, system)
    assert result.report.converged
    np.testing.assert_allclose(result.x.getArray(), dense_solution(system), rtol=1e-6, atol=1e-8)
    state.destroy()


def test_zero_right_hand_side_gives_zero(solver):
    system = grid_system()
    state = solver.init(system)
    solver.solve(system, state)
    system.b.set(0.0)
    result, state = solver.solve(system, state)
    assert result.report.converged
    assert result.report.true_relres == 0.0
    assert result.report.iterations == 0
    assert not np.any(result.x.getArray())
    state.destroy()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_right_hand_side_is_named(solver, value):
    system = grid_system()
    system.b.setValue(7, value)
    system.b.assemble()
    result, state = solve_one(solver, system)
    assert result.report.reason is Reason.NON_FINITE
    with pytest.raises(ConvergenceError, match="not finite"):
        result.report.check()
    state.destroy()


def test_non_finite_matrix_is_named_and_the_state_recovers(solver):
    system = grid_system()
    state = solver.init(system)
    solver.solve(system, state)
    good = system.A.getValue(11, 11)
    system.A.setValue(11, 11, np.nan)
    system.A.assemble()
    result, state = solver.solve(system, state)
    assert result.report.reason is Reason.NON_FINITE
    system.A.setValue(11, 11, good)
    system.A.assemble()
    result, state = solver.solve(system, state)
    assert result.report.converged
    state.destroy()


def test_singular_matrix_without_a_solution_is_an_honest_failure(solver):
    matrix = diffusion(smooth_field((13, 19)), "neumann")
    A = petsc_matrix(matrix)
    b = petsc_vector(A, 1.0 + np.arange(13.0 * 19))  # not in the range of A
    grid = StructuredGrid((13, 19), "neumann")
    system = LinearSystem(A, b, Traits(spd=True, symmetric=True, grid=grid))
    result, state = solve_one(solver, system)
    report = result.report
    assert not report.converged
    assert report.reason is not Reason.NON_FINITE
    assert not report.true_relres <= RTOL
    state.destroy()


def test_zero_matrix_is_an_honest_failure(solver):
    system = grid_system()
    system.A.scale(0.0)
    result, state = solve_one(solver, system)
    assert not result.report.converged
    state.destroy()


def test_the_state_recovers_from_a_zero_matrix(solver):
    system = grid_system((19, 23))
    values = system.A.getValuesCSR()[2].copy()
    state = solver.init(system)
    expected = (True, False, True, True)
    for is_sound, scale in zip(expected, (1.0, 0.0, 1.5, 2.0), strict=True):
        rows, columns, _ = system.A.getValuesCSR()
        system.A.setValuesCSR(rows, columns, scale * values)
        system.A.assemble()
        result, state = solver.solve(system, state)
        assert result.report.converged is is_sound
    state.destroy()


@pytest.mark.parametrize("shape", [(9, 23), (19, 24)])
def test_a_system_of_another_size_is_refused_and_changes_nothing(solver, shape):
    system = grid_system((19, 23))
    state = solver.init(system)
    solver.solve(system, state)
    with pytest.raises(ConfigError, match="437 unknowns"):
        solver.solve(grid_system(shape), state)
    assert solver.solve(system, state)[0].report.converged
    state.destroy()


def test_a_matrix_that_is_not_square_is_refused():
    A = PETSc.Mat().createAIJ((6, 4), nnz=4, comm=self_comm())
    for row in range(6):
        A.setValue(row, row % 4, 1.0)
    A.assemble()
    system = LinearSystem(A, A.createVecLeft())
    solver = solvers.build({"kind": "gmres_ilu"})
    with pytest.raises(ConfigError, match="6 x 4"):
        solver.solve(system, solver.init(system))


def test_changed_matrix_is_noticed(solver):
    system = grid_system((19, 23))
    state = solver.init(system)
    for seed in (811, 812, 813, 814, 815):
        refill(system.A, diffusion(smooth_field((19, 23), seed)))
        result, state = solver.solve(system, state)
        assert result.report.converged
        assert "kept" not in result.report.note
        expected = dense_solution(system)
        np.testing.assert_allclose(result.x.getArray(), expected, rtol=1e-6, atol=1e-8)
    state.destroy()


def test_unchanged_matrix_keeps_factor_or_preconditioner(solver):
    system = grid_system((19, 23))
    state = solver.init(system)
    notes = []
    for shift in range(5):
        system.b.setArray(np.roll(system.b.getArray().copy(), shift))
        result, state = solver.solve(system, state)
        np.testing.assert_allclose(
            result.x.getArray(), dense_solution(system), rtol=1e-6, atol=1e-8
        )
        notes.append(result.report.note)
    assert "kept" in notes[-1]
    state.destroy()


def test_new_matrices_are_new_wherever_they_lie(solver):
    """A matrix may get the memory of one that was destroyed, its value counter is the same then."""
    state, versions = None, []
    for seed in range(821, 829):
        system = grid_system((19, 23), seed=seed)
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert result.report.converged
        assert "kept" not in result.report.note
        versions.append(system.version)
        system.A.destroy()
    assert len(set(versions)) == len(versions)
    state.destroy()


def test_two_states_are_independent(solver):
    first, second = grid_system((19, 23), seed=31), grid_system((9, 25), seed=32)
    states = [solver.init(first), solver.init(second)]
    alone, other = solve_one(solver, grid_system((19, 23), seed=31))
    expected = alone.x.getArray().copy()
    other.destroy()
    result, states[0] = solver.solve(first, states[0])
    before = result.x.getArray().copy()
    second_result, states[1] = solver.solve(second, states[1])
    assert second_result.report.converged
    states[1].destroy()
    assert np.array_equal(result.x.getArray(), before)
    result, states[0] = solver.solve(first, states[0])
    np.testing.assert_allclose(result.x.getArray(), expected, rtol=1e-6, atol=1e-8)
    states[0].destroy()


def test_scale_of_the_system_does_not_matter(solver):
    system = grid_system()
    system.A.scale(1e-9)
    system.b.scale(1e-25)
    result, state = solve_one(solver, system)
    assert result.report.converged
    np.testing.assert_allclose(
        result.x.getArray() * 1e16, dense_solution(system) * 1e16, rtol=1e-6, atol=1e-8
    )
    state.destroy()


def test_settings_go_through_toml_repr_and_pickle(solver):
    table = as_table(solver)
    assert solvers.build(tomllib.loads(tomli_w.dumps(table))) == solver
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert str(RTOL) in repr(solver)


@pytest.mark.parametrize("rtol", [0.0, -1e-8, 1.0, float("nan")])
@pytest.mark.parametrize("kind", KINDS)
def test_senseless_tolerances_are_refused(kind, rtol):
    with pytest.raises(ConfigError, match="rtol"):
        solvers.build({"kind": kind, "rtol": rtol})


def test_describing_solvers_loads_neither_petsc_nor_mpi():
    code = (
        "import sys; from simlab.linalg.system import solvers\n"
        "for kind in solvers: solvers.build(kind)\n"
        "loaded = {'petsc4py', 'mpi4py', 'torch', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_petsc_is_there():
    assert PETSc.Sys.getVersion() >= (3, 18, 0)
