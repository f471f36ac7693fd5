"""Krylov and direct solvers: honest counts and residuals, kept factors, singular systems."""

from __future__ import annotations

import numpy as np
import pytest
from linear_systems import (
    convection_system,
    diffusion,
    grid_system,
    petsc_matrix,
    petsc_vector,
    refill,
    smooth_field,
)

from simlab.core.reports import Reason
from simlab.linalg import petsc as PETSc
from simlab.linalg.direct import Direct
from simlab.linalg.krylov import CGAMG, CGGAMG, CGICC, GMRESILU, Krylov
from simlab.linalg.system import LinearSystem, Traits


def neumann_system(consistent=True, attach=True, shape=(18, 22)):
    A = petsc_matrix(diffusion(smooth_field(shape), "neumann"))
    values = np.random.default_rng(61).normal(size=A.getSize()[0])
    if consistent:
        values -= values.mean()
    if attach:
        A.setNullSpace(PETSc.NullSpace().create(constant=True, comm=A.comm))
    return LinearSystem(A, petsc_vector(A, values), Traits(spd=True, symmetric=True))


@pytest.mark.parametrize(
    "solver",
    [
        CGICC(),
        CGAMG(),
        GMRESILU(),
        GMRESILU(restart=7),
        CGICC(rtol=1e-13),
        GMRESILU(rtol=1e-13),
        Krylov(method="bcgs", preconditioner="jacobi"),
        Krylov(method="fgmres", preconditioner="jacobi", restart=9),
        Krylov(method="minres", preconditioner="jacobi"),
        Krylov(method="gmres", preconditioner="none"),
        Direct(),
    ],
    ids=lambda solver: f"{solver.kind}-{getattr(solver, 'method', '')}-{solver.rtol}",
)
def test_counted_applications_are_those_petsc_logs(solver):
    if not PETSc.Log.isActive():
        PETSc.Log.begin()
    stage = PETSc.Log.Stage(f"count {solver}")  # a PETSc error elsewhere spoils its stage's counts
    stage.push()
    events = [PETSc.Log.Event(name) for name in ("MatMult", "PCApply")]
    system = grid_system((30, 31))
    state = solver.init(system)
    solver.solve(system, state)
    before = [event.getPerfInfo()["count"] for event in events]
    result, state = solver.solve(system, state)
    counted = [event.getPerfInfo()["count"] - n for event, n in zip(events, before, strict=True)]
    found = [result.report.operator_applies, result.report.pc_applies]
    state.destroy()
    stage.pop()
    assert found == counted


@pytest.mark.parametrize("rtol", [1e-3, 1e-8, 1e-12])
@pytest.mark.parametrize("method", ["cg", "gmres", "bcgs", "minres"])
def test_the_true_residual_meets_every_tolerance(method, rtol):
    """MINRES tests a preconditioned norm of its own; the check afterwards must catch that."""
    system = grid_system((33, 30))
    solver = Krylov(method=method, preconditioner="jacobi", rtol=rtol)
    state = solver.init(system)
    result, state = solver.solve(system, state)
    assert result.report.converged
    assert system.residual(result.x) <= rtol
    state.destroy()


def test_an_impossible_tolerance_is_stagnation():
    system = grid_system((60, 60))
    solver = CGICC(rtol=1e-18)
    state = solver.init(system)
    result, state = solver.solve(system, state)
    assert result.report.reason in (Reason.STAGNATED, Reason.BREAKDOWN)
    assert 0 < result.report.true_relres < 1e-12
    state.destroy()


def test_iteration_limit_covers_restarts():
    system = grid_system((40, 40))
    solver = Krylov(method="cg", preconditioner="none", max_iterations=7)
    state = solver.init(system)
    result, state = solver.solve(system, state)
    assert result.report.reason is Reason.ITERATION_LIMIT
    assert result.report.iterations == 7
    state.destroy()


def test_history_is_relative_to_b_and_ends_at_the_tolerance():
    system = grid_system((30, 30))
    solver = CGICC(history=True)
    state = solver.init(system)
    for _ in range(2):  # the second one's begins anew
        result, state = solver.solve(system, state)
        history = result.report.history
        assert history[0] == pytest.approx(1.0)
        assert history[-1] <= 1e-8 < history[-2]
        assert len(history) == result.report.iterations + 1
    state.destroy()


def test_options_reach_petsc():
    system = grid_system((30, 30))
    plain, filled = CGICC(), CGICC(options={"pc_factor": {"levels": 3}})
    its = []
    for solver in (plain, filled):
        state = solver.init(system)
        result, state = solver.solve(system, state)
        its.append(result.report.iterations)
        state.destroy()
    assert its[1] < its[0]


@pytest.mark.parametrize("package", ["cholmod", "mumps", "petsc"])
def test_the_factor_is_built_once_per_set_of_values(package):
    system = grid_system((25, 25))
    solver = Direct(package=package)
    state = solver.init(system)
    for values, expected in ((0, 1), (0, 1), (1, 2), (1, 2), (2, 3)):
        if values and state.n_setups < expected:
            refill(system.A, diffusion(smooth_field((25, 25), 900 + values)))
        result, state = solver.solve(system, state)
        assert result.report.converged
        assert state.n_setups == expected
        assert package in result.report.solver
    state.destroy()


@pytest.mark.parametrize("package", ["umfpack", "mumps", "petsc", "auto"])
def test_lu_solves_nonsymmetric_systems(package):
    system = convection_system()
    solver = Direct(package=package)
    state = solver.init(system)
    result, state = solver.solve(system, state)
    assert result.report.converged
    assert result.report.true_relres < 1e-12
    state.destroy()


def test_a_claimed_constant_matrix_is_factored_once_and_a_false_claim_is_caught():
    system = grid_system((25, 25), constant=True)
    solver = Direct()
    state = solver.init(system)
    solver.solve(system, state)
    system.A.assemble()  # the value counter may move, the values do not
    result, state = solver.solve(system, state)
    assert "factor kept" in result.report.note
    assert state.n_setups == 1
    refill(system.A, diffusion(5.0 * smooth_field((25, 25), 99)))
    result, state = solver.solve(system, state)
    assert result.report.converged
    assert state.n_setups == 2
    state.destroy()


@pytest.mark.parametrize("solver", [CGICC(), CGAMG(), CGGAMG()], ids=lambda solver: solver.kind)
def test_a_consistent_neumann_system_with_its_null_space_is_solved(solver):
    system = neumann_system()
    state = solver.init(system)
    result, state = solver.solve(system, state)
    assert result.report.converged
    assert system.residual(result.x) <= 1e-8
    state.destroy()


@pytest.mark.parametrize("package", ["auto", "mumps", "petsc"])
def test_a_singular_matrix_is_called_singular(package):
    system = neumann_system(consistent=False, attach=False)
    solver = Direct(package=package)
    state = solver.init(system)
    result, state = solver.solve(system, state)
    assert result.report.reason is Reason.SINGULAR
    state.destroy()


def test_suits_follows_the_traits():
    spd, general = grid_system(), convection_system()
    assert CGICC().suits(spd)
    assert not CGICC().suits(general)
    assert not Krylov(method="gmres", preconditioner="icc").suits(general)
    assert GMRESILU().suits(general)
    assert Direct().suits(general)
    assert not Direct(method="cholesky").suits(general)
