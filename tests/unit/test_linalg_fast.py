"""Fast-transform CG: exact for constants, few iterations for fields, the right scaling."""

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

from simlab.core.errors import ConfigError
from simlab.core.reports import Reason
from simlab.linalg import petsc as PETSc
from simlab.linalg.fast import Fast
from simlab.linalg.system import LinearSystem, StructuredGrid, Traits


def system_of(a, boundary="dirichlet", weights=(1.0, 1.0, 1.0), mass=0.0, seed=4021):
    A = petsc_matrix(diffusion(a, boundary, weights, mass))
    values = np.random.default_rng(seed).normal(size=a.size)
    if boundary != "dirichlet" and not mass:
        A.setNullSpace(PETSc.NullSpace().create(constant=True, comm=A.comm))
        values -= values.mean()
    traits = Traits(spd=True, symmetric=True, grid=StructuredGrid(a.shape, boundary))
    return LinearSystem(A, petsc_vector(A, values), traits)


def two_phase(shape, seed=9):
    return np.where(np.log(smooth_field(shape, seed)) > 0, 12.0, 3.0)


def solve(solver, system):
    state = solver.init(system)
    result, state = solver.solve(system, state)
    return result, state


@pytest.mark.parametrize("boundary", ["dirichlet", "neumann", "periodic"])
@pytest.mark.parametrize("mass", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(14, 21), (13, 17), (7, 8, 9)])
def test_a_constant_coefficient_is_solved_directly(shape, boundary, mass):
    system = system_of(np.full(shape, 2.5), boundary, (1.0, 3.0, 0.5), mass)
    result, state = solve(Fast(), system)
    assert result.report.converged
    assert result.report.iterations <= 2
    assert system.residual(result.x) <= 1e-8
    if boundary != "dirichlet" and not mass:
        assert abs(result.x.sum()) < 1e-8 * result.x.norm()
    state.destroy()


@pytest.mark.parametrize("boundary", ["dirichlet", "neumann", "periodic"])
@pytest.mark.parametrize("precision", ["single", "double"])
def test_smooth_fields_take_few_iterations(boundary, precision):
    system = system_of(smooth_field((60, 71)), boundary)
    result, state = solve(Fast(scaling="diagonal", precision=precision), system)
    assert result.report.converged
    assert result.report.iterations <= 30
    assert result.report.pc_applies == result.report.iterations
    state.destroy()


def test_iterations_do_not_grow_with_the_grid():
    counts = []
    for n in (24, 48, 96):
        result, state = solve(Fast(scaling="diagonal"), system_of(smooth_field((n, n))))
        counts.append(result.report.iterations)
        state.destroy()
    assert max(counts) <= min(counts) + 3


def test_auto_scaling_follows_smooth_fields_and_ignores_jumps():
    smooth, jumps = system_of(smooth_field((64, 64))), system_of(two_phase((64, 64)))
    for system, expected in ((smooth, "diagonal"), (jumps, "constant")):
        auto, state = solve(Fast(), system)
        assert state.scaling == expected
        again, state = Fast().solve(system, state)
        other = "constant" if expected == "diagonal" else "diagonal"
        worse, worse_state = solve(Fast(scaling=other), system)
        assert again.report.iterations < worse.report.iterations
        assert auto.report.iterations >= again.report.iterations
        state.destroy()
        worse_state.destroy()


def test_a_contrast_of_four_is_bounded_by_condition_four_on_any_grid():
    counts = []
    for n in (32, 64, 128):
        result, state = solve(Fast(scaling="constant"), system_of(two_phase((n, n))))
        counts.append(result.report.iterations)
        state.destroy()
    assert max(counts) <= 24  # CG at condition 4 gains a factor 3 per iteration


def test_when_iterations_jump_the_scalings_are_compared_again():
    shape = (64, 64)
    system = system_of(smooth_field(shape))
    solver = Fast()
    state = solver.init(system)
    solver.solve(system, state)
    assert state.scaling == "diagonal"
    for _ in range(2):
        refill(system.A, diffusion(two_phase(shape)))
        result, state = solver.solve(system, state)
        assert result.report.converged
    assert state.scaling == "constant"
    assert "compared" in result.report.note
    state.destroy()


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-10, 1e-12])
def test_single_precision_inside_reaches_double_precision_tolerances(rtol):
    system = system_of(smooth_field((40, 50)))
    result, state = solve(Fast(rtol=rtol, precision="single"), system)
    assert result.report.converged
    assert system.residual(result.x) <= rtol
    state.destroy()


def test_iteration_limit_is_reported():
    result, state = solve(Fast(max_iterations=3), system_of(two_phase((32, 32))))
    assert result.report.reason is Reason.ITERATION_LIMIT
    assert result.report.true_relres > 1e-8
    state.destroy()


@pytest.mark.parametrize("boundary", ["dirichlet", "neumann", "periodic"])
def test_an_indefinite_matrix_is_a_breakdown_not_an_answer(boundary):
    system = system_of(smooth_field((20, 20)), boundary, mass=-1.0)
    result, state = solve(Fast(), system)
    assert not result.report.converged
    state.destroy()


def test_it_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match="structured grid"):
        Fast().init(convection_system())
    system = grid_system((19, 23))
    wrong = LinearSystem(
        system.A, system.b, Traits(spd=True, symmetric=True, grid=StructuredGrid((19, 24)))
    )
    with pytest.raises(ConfigError, match="437 unknowns"):
        Fast().init(wrong)
    cell = grid_system((1, 1))
    assert not Fast().suits(cell)
    with pytest.raises(ConfigError, match="one cell"):
        Fast().init(cell)
