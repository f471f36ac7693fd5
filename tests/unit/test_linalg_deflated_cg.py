"""Deflated CG carries what helps, stays honest, and survives whatever the carried space becomes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
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
from simlab.core.errors import ConfigError
from simlab.core.reports import Reason
from simlab.linalg import petsc as PETSc
from simlab.linalg.krylov import Krylov
from simlab.linalg.seed import seed_space
from simlab.linalg.system import LinearSystem, Traits, solvers
from simlab.problems.darcy import Darcy

SHAPE = (31, 37)
SPD = Traits(spd=True, symmetric=True)


def deflated(**settings):
    return solvers.build({"kind": "deflated_cg", "carried": 12, "gate": False, **settings})


def walk(solver, n, shape=SHAPE, state=None, **more):
    """Reports of n systems with coefficients of their own, and the state after them."""
    system = grid_system(shape)
    state = state or solver.init(system, **more)
    reports = []
    for seed in range(900, 900 + n):
        refill(system.A, diffusion(smooth_field(shape, seed)))
        result, state = solver.solve(system, state)
        assert result.report.true_relres == pytest.approx(system.residual(result.x), rel=1e-3)
        reports.append(result.report)
    return reports, state, system


def exact(system):
    rows, columns, values = system.A.getValuesCSR()
    return np.linalg.solve(sp.csr_matrix((values, columns, rows)).toarray(), system.b.getArray())


def assert_pair(state, system):
    U, W = state.deflated_pair()
    rows, columns, values = system.A.getValuesCSR()
    matrix = sp.csr_matrix((values, columns, rows))
    scale = sp.linalg.norm(matrix) * np.linalg.norm(U)
    assert np.linalg.norm(matrix @ U - W) <= 1e-14 * scale


def test_carried_directions_save_iterations_and_cost_no_preconditioner():
    plain, _, _ = walk(deflated(carried=0), 8)
    reports, state, system = walk(deflated(), 8)
    assert all(report.converged for report in reports)
    assert reports[0].iterations == plain[0].iterations
    late, without = (np.mean([r.iterations for r in item[4:]]) for item in (reports, plain))
    assert late <= 0.65 * without
    assert all(r.pc_applies == r.iterations for r in reports)
    assert reports[0].operator_applies == reports[0].iterations + 1
    assert all(r.operator_applies == r.iterations + 12 + 1 for r in reports[1:])
    assert_pair(state, system)
    assert 0 < state.captured < 2
    assert state.events == []
    assert reports[-1].solver == "deflated_cg(0+12)+icc"
    state.destroy()


def test_without_a_space_it_is_petscs_cg():
    krylov = Krylov(method="cg", preconditioner="icc")
    mine, _, _ = walk(deflated(carried=0), 3)
    theirs, _, _ = walk(krylov, 3)
    for a, b in zip(mine, theirs, strict=True):
        assert abs(a.iterations - b.iterations) <= 1


def test_a_static_space_saves_iterations_from_the_first_system_on():
    plain, _, _ = walk(deflated(carried=0), 3)
    solver = deflated(carried=0, static=12)
    reports, state, system = walk(solver, 3)  # its own seed, of the first system
    for report, without in zip(reports, plain, strict=True):
        assert report.iterations <= 0.65 * without.iterations
        assert report.operator_applies == report.iterations + 12 + 1
    assert state.carried.shape[1] == 0
    assert_pair(state, system)
    seed = seed_space(grid_system(SHAPE), 15)  # larger than asked for
    given, state, _ = walk(solver, 3, seed=seed)
    assert np.array_equal(state.static, seed.vectors[:, :12])
    assert [r.iterations for r in given] == [r.iterations for r in reports]
    with pytest.raises(ConfigError, match="static = 12 asks for more vectors than the 5"):
        solver.init(grid_system(SHAPE), seed=seed_space(grid_system(SHAPE), 5))
    with pytest.raises(ConfigError, match="unknowns"):
        solver.init(grid_system((9, 9)), seed=seed)


def test_static_and_carried_parts_work_together():
    one, _, _ = walk(deflated(carried=0, static=8), 8)
    both, state, system = walk(deflated(carried=8, static=8), 8)
    assert np.mean([r.iterations for r in both[4:]]) <= 0.85 * np.mean(
        [r.iterations for r in one[4:]]
    )
    assert_pair(state, system)
    assert state.deflated_pair()[0].shape[1] == 16


def test_ritz_values_of_the_iterations_scalars_are_those_of_the_vectors():
    """With U empty, theta = u^T A M A u / u^T A u holds for every carried direction."""
    system = grid_system(SHAPE)
    state = (solver := deflated(preconditioner="jacobi", harvest=25)).init(system)
    solver.solve(system, state)
    A = diffusion(smooth_field(SHAPE)).toarray()
    U = state.carried
    gram, inner = U.T @ A @ U, (A @ U).T @ ((A @ U) / np.diag(A)[:, None])
    np.testing.assert_allclose(gram, np.eye(12), atol=1e-9)
    np.testing.assert_allclose(inner, np.diag(state.theta), atol=1e-7)


def test_the_carried_space_becomes_the_lowest_modes_of_the_preconditioned_matrix():
    system = grid_system(SHAPE)
    state = (solver := deflated(preconditioner="jacobi")).init(system)
    for _ in range(14):
        _, state = solver.solve(system, state)
    A = diffusion(smooth_field(SHAPE)).toarray()
    _, modes = scipy.linalg.eigh(A, np.diag(np.diag(A)), subset_by_index=(0, 3))
    Q = np.linalg.qr(state.carried)[0]
    modes = np.linalg.qr(modes)[0]
    assert np.linalg.norm(modes - Q @ (Q.T @ modes), 2) <= 0.05


def test_an_unchanged_matrix_and_space_need_no_new_images():
    system = grid_system(SHAPE)
    state = (solver := deflated(static=10, carried=0)).init(system)
    counts = []
    for shift in range(3):
        system.b.setArray(np.roll(system.b.getArray().copy(), shift))
        result, state = solver.solve(system, state)
        counts.append(result.report.operator_applies - result.report.iterations)
    assert counts == [11, 1, 1]
    assert "kept" in result.report.note


def test_identical_systems_in_a_row():
    system = grid_system(SHAPE)
    state = (solver := deflated()).init(system)
    its = []
    for _ in range(6):
        result, state = solver.solve(system, state)
        assert result.report.converged
        its.append(result.report.iterations)
    assert its[-1] < 0.6 * its[0]
    np.testing.assert_allclose(result.x.getArray(), exact(system), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["nan", "inf", "zero", "double", "all zero", "tiny", "huge"])
def test_spoilt_columns_are_dropped(how):
    solver = deflated()
    _, state, _ = walk(solver, 3)
    spoilt = np.array(state.carried, order="F")
    if how == "all zero":
        spoilt[:] = 0.0
    elif how == "double":
        spoilt[:, 4] = -3.0 * spoilt[:, 7]
    elif how in ("tiny", "huge"):
        spoilt[:, 4] *= {"tiny": 1e-150, "huge": 1e120}[how]
    else:
        spoilt[:, 4] = {"nan": np.nan, "inf": np.inf, "zero": 0.0}[how]
    state.carried = spoilt
    reports, state, _ = walk(solver, 2, state=state)
    assert all(report.converged for report in reports)
    assert np.isfinite(state.carried).all()
    assert state.carried.shape[1] == 12
    if how not in ("tiny", "huge"):
        dropped = 12 if how == "all zero" else 1
        assert f"{dropped} of 12 recycled vectors dropped" in state.events[0]
    else:
        assert state.events == []


def test_a_jump_of_the_matrix():
    solver = deflated()
    _, state, _ = walk(solver, 4)
    rng = np.random.default_rng(4471)
    n = SHAPE[0] * SHAPE[1]
    shuffle = rng.permutation(n)
    matrix = 1e6 * diffusion(smooth_field(SHAPE, 3))[shuffle][:, shuffle]
    A = petsc_matrix(sp.csr_matrix(matrix))  # another object, other entries, other numbering
    system = LinearSystem(A, petsc_vector(A, rng.normal(size=n)), SPD)
    its = []
    for _ in range(10):
        result, state = solver.solve(system, state)
        assert result.report.converged
        its.append(result.report.iterations)
    np.testing.assert_allclose(result.x.getArray(), exact(system), rtol=1e-6, atol=1e-12)
    assert_pair(state, system)
    assert its[-1] <= 0.7 * its[0]  # it learns the new matrix


@pytest.mark.parametrize(("shape", "carried"), [((1,), 3), ((2,), 5), ((5, 4), 15), ((6,), 6)])
def test_more_vectors_than_make_sense(shape, carried):
    solver = deflated(carried=carried, rtol=1e-10)
    reports, state, _ = walk(solver, 5, shape)
    assert all(report.converged for report in reports)
    assert state.carried.shape[1] <= min(carried, np.prod(shape))
    state.destroy()


def test_zero_right_hand_side_leaves_the_space_alone():
    solver = deflated()
    _, state, system = walk(solver, 3)
    before = state.carried
    system.b.set(0.0)
    result, state = solver.solve(system, state)
    assert result.report.converged
    assert not result.x.getArray().any()
    assert state.carried is before


def test_singular_systems_with_their_null_space():
    matrix = diffusion(smooth_field((17, 15)), "neumann")
    A = petsc_matrix(matrix)
    A.setNullSpace(PETSc.NullSpace().create(constant=True, comm=self_comm()))
    values = np.random.default_rng(8123).normal(size=255)
    system = LinearSystem(A, petsc_vector(A, values - values.mean()), SPD)
    for settings in ({"carried": 8}, {"carried": 0, "static": 8}):
        solver = deflated(preconditioner="jacobi", rtol=1e-9, **settings)
        state = solver.init(system)
        its = []
        for seed in range(5):
            refill(A, diffusion(smooth_field((17, 15), seed), "neumann"))
            result, state = solver.solve(system, state)
            assert result.report.converged
            assert abs(result.x.sum()) <= 1e-8 * result.x.norm()
            its.append(result.report.iterations)
        assert its[-1] < 57


def test_a_matrix_that_is_not_definite_is_an_honest_failure():
    matrix = diffusion(smooth_field((15, 15))) - 2.0 * sp.identity(225)
    A = petsc_matrix(sp.csr_matrix(matrix))
    b = petsc_vector(A, np.random.default_rng(5).normal(size=225))
    solver = deflated(preconditioner="none")
    result, state = solver.solve(LinearSystem(A, b, SPD), solver.init(LinearSystem(A, b, SPD)))
    assert result.report.reason is Reason.BREAKDOWN
    assert state.carried.shape[1] == 0


def test_a_faulty_space_is_dropped_and_the_system_solved_without():
    """An indefinite matrix leaves a space behind that has no place in the next system."""
    solver = deflated()
    _, state, system = walk(solver, 3)
    state.carried = 1e200 * np.array(state.carried)  # E overflows
    result, state = solver.solve(system, state)
    assert result.report.converged
    assert any("dropped" in line for line in state.events)


def test_a_carried_space_is_stable_over_many_iterations():
    """Projections in single precision pass every other test and diverge here."""
    family = Darcy(cells=200)
    workspace, solver = family.setup(self_comm()), deflated(carried=20)
    state, its = None, []
    for sample in family.space.sample(4, 71):
        system = family.assemble(sample, workspace)
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert result.report.converged
        its.append(result.report.iterations)
    assert its == sorted(its, reverse=True)
    assert its[-1] <= 0.85 * its[0]


@pytest.mark.parametrize("noise", [1e-5, 1e-4, 1e-3, 1e-2])
def test_nearly_dependent_columns_do_no_harm(noise):
    plain, _, _ = walk(deflated(carried=0, rtol=1e-10), 4)
    solver = deflated(rtol=1e-10)
    _, state, _ = walk(solver, 3)
    U = np.array(state.carried, order="F")
    U[:, 9:] = U[:, :3] + noise * U[:, 9:]
    state.carried = U
    reports, state, _ = walk(solver, 4, state=state)
    for report, without in zip(reports, plain, strict=True):
        assert report.converged
        assert report.iterations <= 0.9 * without.iterations


def test_tight_tolerances_are_met_truly():
    reports, _, _ = walk(deflated(rtol=1e-13), 5, (40, 40))
    assert all(report.converged for report in reports)
    assert all(report.true_relres <= 1e-13 for report in reports)


def test_an_impossible_tolerance_ends_as_stagnation_after_restarts():
    reports, state, _ = walk(deflated(rtol=1e-17), 2)
    assert all(report.reason is Reason.STAGNATED for report in reports)
    assert all(report.true_relres < 1e-13 for report in reports)
    assert sum("restarted" in line for line in state.events) == 6


def test_the_limit_of_iterations_is_kept():
    reports, _, _ = walk(deflated(max_iterations=7), 2)
    assert all(report.reason is Reason.ITERATION_LIMIT for report in reports)
    assert [report.iterations for report in reports] == [7, 7]


def test_history_ends_below_the_tolerance():
    reports, _, _ = walk(deflated(history=True), 2)
    for report in reports:
        assert len(report.history) == report.iterations
        assert report.history[-1] <= report.rtol < report.history[-2]
        assert report.history[-1] == pytest.approx(report.true_relres, rel=1e-3)


def test_controls_do_without_and_leave_the_space_to_the_next():
    solver = deflated(gate=True)
    system = grid_system(SHAPE)
    state = solver.init(system)
    sizes, its = [], []
    for seed in range(8):
        refill(system.A, diffusion(smooth_field(SHAPE, 700 + seed)))
        before = state.carried
        result, state = solver.solve(system, state)
        assert result.report.converged
        if "control" in result.report.note:
            assert result.report.operator_applies == result.report.iterations + 1
            assert state.carried is before
            sizes.append(before.shape[1])
        else:
            its.append(result.report.iterations)
    assert len(sizes) >= 2
    assert set(sizes) == {12}
    assert its[-1] < 0.7 * its[0]


def test_forgetting_starts_anew():
    solver = deflated()
    _, state, system = walk(solver, 4)
    state.forget()
    result, state = solver.solve(system, state)
    plain, _, _ = walk(deflated(carried=0), 4)
    assert result.report.iterations == plain[-1].iterations


def test_matrix_free_systems_take_jacobi():
    family = Darcy(cells=16, matrix_free=True)
    workspace = family.setup(self_comm())
    system = family.assemble(family.space.sample(1, 5171)[0], workspace)
    solver = deflated(preconditioner="jacobi")
    assert solver.suits(system)
    state = solver.init(system)
    for sample in family.space.sample(3, 5171):
        result, state = solver.solve(family.assemble(sample, workspace), state)
        assert result.report.converged
    assert not deflated().suits(system)
    assert not deflated(preconditioner="jacobi", static=3).suits(system)
    with pytest.raises(ConfigError, match="matrix-free"):
        deflated().init(system)
    with pytest.raises(ConfigError, match="matrix-free"):
        deflated(preconditioner="jacobi", static=3).init(system)


def test_options_and_prefix_reach_the_preconditioner():
    before = option_names()
    solver = deflated(options={"pc_factor_levels": 2}, prefix="mine_")
    fewer, state, _ = walk(solver, 1)
    plain, _, _ = walk(deflated(), 1)
    assert state.ksp.getOptionsPrefix() == "mine_"
    assert fewer[0].iterations < plain[0].iterations
    assert option_names() == before


def test_carrying_wants_an_order():
    assert deflated().wants_order
    assert not deflated(carried=0, static=5).wants_order
    assert not deflated().suits(convection_system())


class TestRecycle:
    """``recycle`` is the solver that fits, with the settings it was given."""

    def test_cg_where_it_may_and_gcrodr_elsewhere(self):
        solver = solvers.build({"kind": "recycle", "carried": 6, "rtol": 1e-7})
        for system, name in (
            (grid_system(), "deflated_cg(0+6)+icc"),
            (convection_system(), "gcrodr(40,0+6)+ilu"),
            (
                dataclasses.replace(grid_system(), traits=Traits(symmetric=True)),
                "gcrodr(40,0+6)+ilu",
            ),
        ):
            assert solver.suits(system)
            state = solver.init(system)
            for _ in range(3):
                result, state = solver.solve(system, state)
                assert result.report.converged
                assert result.report.rtol == 1e-7
            assert result.report.solver == name
            state.destroy()

    def test_its_preconditioner_and_static_space(self):
        solver = solvers.build(
            {"kind": "recycle", "preconditioner": "jacobi", "static": 30, "carried": 5}
        )
        for system, name in (
            (grid_system(), "deflated_cg(30+5)+jacobi"),
            (convection_system(), "gcrodr(55,30+5)+jacobi"),
        ):
            seed = solver.seed(system)
            assert seed.vectors.shape[1] in (30, 31)
            state = solver.init(system, seed=seed)
            result, state = solver.solve(system, state)
            assert result.report.converged
            assert result.report.solver == name
            assert state.static.shape[1] == 30
        assert solver.wants_order
        assert not solvers.build({"kind": "recycle", "carried": 0}).wants_order
        assert solvers.build("recycle").seed(grid_system()) is None

    def test_matrix_free_systems_take_jacobi_and_no_static_space(self):
        family = Darcy(cells=12, matrix_free=True)
        system = family.assemble(family.space.sample(1, 5171)[0], family.setup(self_comm()))
        solver = solvers.build("recycle")
        assert solver.suits(system)
        result, _ = solver.solve(system, solver.init(system))
        assert result.report.converged
        assert result.report.solver == "deflated_cg(0+20)+jacobi"
        assert not solvers.build({"kind": "recycle", "static": 4}).suits(system)
