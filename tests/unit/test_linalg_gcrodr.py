"""Flexible GCRO-DR: exactness, counts against PETSc, robustness of what is handed on."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
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
from simlab.linalg.gcrodr import GCRODR, GCRODRState
from simlab.linalg.harmonic import handed_on
from simlab.linalg.krylov import Krylov
from simlab.linalg.system import Affine, LinearSystem, Traits

SHAPE = (29, 31)


def dense(A) -> np.ndarray:
    rows, columns, values = A.getValuesCSR()
    return sp.csr_matrix((values, columns, rows), shape=A.getSize()).toarray()


def sequence(n: int, drift: float = 0.2, seed: int = 6131):
    """Systems that resemble each other: one matrix object, new values each."""
    rng = np.random.default_rng(seed)
    base = np.log(smooth_field(SHAPE, seed))
    system = grid_system(SHAPE)
    for index in range(n):
        bumps = drift * np.log(smooth_field(SHAPE, int(rng.integers(1, 10_000))))
        refill(system.A, diffusion(np.exp(base + bumps)))
        yield LinearSystem(system.A, system.b, Traits(spd=True, symmetric=True), index=index)


def lowest(A, k: int) -> np.ndarray:
    return np.asfortranarray(np.linalg.eigh(dense(A))[1][:, :k])


def iterations(solver: GCRODR, systems, state=None) -> list[int]:
    found = []
    for system in systems:
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert result.report.converged, result.report
        assert result.report.true_relres <= solver.rtol
        assert system.residual(result.x) <= solver.rtol * (1 + 1e-6)
        found.append(result.report.iterations)
    state.destroy()
    return found


@pytest.mark.parametrize("preconditioner", ["none", "jacobi", "ilu"])
@pytest.mark.parametrize("make", [lambda: grid_system(SHAPE), lambda: convection_system(30)])
def test_without_a_space_it_is_petscs_right_preconditioned_gmres(make, preconditioner):
    mine, theirs = make(), make()
    solver = GCRODR(carried=0, preconditioner=preconditioner, restart=25)
    result, state = solver.solve(mine, solver.init(mine))
    reference = Krylov(method="gmres", preconditioner=preconditioner, restart=25)
    expected, other = reference.solve(theirs, reference.init(theirs))
    assert abs(result.report.iterations - expected.report.iterations) <= 1
    assert result.report.pc_applies == result.report.iterations
    state.destroy()
    other.destroy()


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9, 1e-11])
@pytest.mark.parametrize("target", ["operator", "preconditioned"])
@pytest.mark.parametrize("update", ["every", "first", "never"])
def test_every_true_residual_meets_every_tolerance(update, target, rtol):
    solver = GCRODR(rtol=rtol, update=update, target=target, restart=20, carried=8)
    iterations(solver, sequence(4))


@pytest.mark.parametrize("static", [0, 4])
@pytest.mark.parametrize("preconditioner", ["none", "ilu"])
def test_the_deflated_pair_is_exact_after_every_system(preconditioner, static):
    solver = GCRODR(preconditioner=preconditioner, restart=20, carried=6, static=static, gate=False)
    state = None
    for system in sequence(5):
        state = state or GCRODRState(system, solver, lowest(system.A, static))
        result, state = solver.solve(system, state)
        U, C = state.deflated_pair()
        A = dense(system.A)
        k = U.shape[1]
        assert 0 < k <= static + 6
        np.testing.assert_allclose(C.T @ C, np.eye(k), atol=1e-12)
        scale = np.linalg.norm(A) * np.linalg.norm(U)
        assert np.linalg.norm(A @ U - C) <= 1e-10 * scale
        # the basis of the last cycle, which the pair was chosen from, had been orthogonal too
        r = system.b.getArray() - A @ result.x.getArray()
        assert np.linalg.norm(C.T @ r) <= 1e-7 * np.linalg.norm(system.b.getArray())
    state.destroy()


def test_the_basis_stays_orthogonal_without_a_second_pass(monkeypatch):
    solver = GCRODR(restart=24, carried=10, rtol=1e-11)
    worst = []
    original = GCRODRState._renew

    def watched(self, G, j):
        basis = self._Q.array[:, self._k_max - self._k : self._k_max + j + 1]
        worst.append(np.abs(basis.T @ basis - np.eye(basis.shape[1])).max())
        original(self, G, j)

    monkeypatch.setattr(GCRODRState, "_renew", watched)
    iterations(solver, sequence(4))
    assert len(worst) >= 8
    assert max(worst) <= 1e-11


def test_counts_are_products_and_nothing_hidden():
    solver = GCRODR(restart=20, carried=8, gate=False)
    state = None
    for system in sequence(4):
        state = state or solver.init(system)
        k = state.carried.shape[1]
        report = solver.solve(system, state)[0].report
        assert report.pc_applies == report.iterations
        assert 1 <= report.operator_applies - report.iterations - k <= 2
    assert k == 8
    state.destroy()


def test_the_form_of_published_experiments_pays_for_the_preconditioner():
    solver = GCRODR(restart=20, carried=8, target="preconditioned", gate=False)
    state = None
    for system in sequence(3):
        state = state or solver.init(system)
        k = state.carried.shape[1]
        report = solver.solve(system, state)[0].report
        assert report.pc_applies == report.iterations + k
    state.destroy()


def test_carrying_and_a_static_space_save_iterations():
    kept_back = iterations(GCRODR(restart=20, carried=8, update="never"), sequence(8))[1:]
    carried = iterations(GCRODR(restart=20, carried=8, gate=False), sequence(8))[1:]
    solver = GCRODR(restart=20, carried=0, static=8)
    first = next(sequence(1))
    state = GCRODRState(first, solver, lowest(first.A, 8))
    static = iterations(solver, sequence(8), state)[1:]
    assert np.mean(carried) < 0.75 * np.mean(kept_back)
    assert np.mean(static) < 0.75 * np.mean(kept_back)


def test_the_same_matrix_costs_no_new_images():
    system = next(sequence(1))
    solver = GCRODR(restart=20, carried=8)
    state = solver.init(system)
    solver.solve(system, state)
    report = solver.solve(system, state)[0].report
    assert report.operator_applies <= report.iterations + 2
    assert report.converged
    state.destroy()


def test_an_affine_operator_keeps_the_images_of_the_static_space():
    low, high = diffusion(smooth_field(SHAPE, 3)), diffusion(smooth_field(SHAPE, 4))
    terms = (petsc_matrix(low), petsc_matrix(high))
    A = petsc_matrix(low)
    b = petsc_vector(A, np.ones(A.getSize()[0]))
    solver = GCRODR(restart=20, carried=3, static=5)
    state = None
    for theta in ([1.0, 0.5], [0.3, 2.0], [0.9, 0.1]):
        refill(A, theta[0] * low + theta[1] * high)
        system = LinearSystem(A, b, affine=Affine(np.array(theta), terms))
        is_first = state is None
        state = state or GCRODRState(system, solver, lowest(A, 5))
        n_carried = state.carried.shape[1]
        report = solver.solve(system, state)[0].report
        assert report.converged
        extra = report.operator_applies - report.iterations - n_carried
        assert extra <= (12 if is_first else 2)
        U, C = state.deflated_pair()
        np.testing.assert_allclose(dense(A) @ U, C, atol=1e-9)
    state.destroy()


def test_renewals_keep_their_interval():
    solver = GCRODR(restart=20, carried=8, interval=3, gate=False)
    state, before, renewed = None, np.zeros((0, 0)), []
    for system in sequence(7):
        state = state or solver.init(system)
        assert solver.solve(system, state)[0].report.converged
        renewed.append(not np.array_equal(state.carried, before))
        before = state.carried.copy()
    assert renewed == [True, False, False, True, False, False, True]
    state.destroy()


def spoilt(kind: str, carried: np.ndarray) -> np.ndarray:
    made = carried.copy(order="F")
    if kind == "duplicate":
        made[:, 1] = made[:, 0]
    elif kind == "zero":
        made[:, 2] = 0.0
    elif kind == "nan":
        made[5, 3] = np.nan
    elif kind == "tiny":
        made *= 1e-200
    elif kind == "all zero":
        made[...] = 0.0
    return made


@pytest.mark.parametrize("kind", ["duplicate", "zero", "nan", "tiny", "all zero"])
@pytest.mark.parametrize("target", ["operator", "preconditioned"])
def test_a_spoilt_space_is_mended_and_the_answer_right(kind, target):
    solver = GCRODR(restart=20, carried=8, target=target)
    state = None
    for index, system in enumerate(sequence(4)):
        state = state or solver.init(system)
        if index == 2:
            state.carried = spoilt(kind, state.carried)
        result, state = solver.solve(system, state)
        assert result.report.converged
        assert system.residual(result.x) <= 1e-8 * (1 + 1e-6)
        assert np.isfinite(state.carried).all()
    assert state.carried.shape[1] == 8  # grown again
    state.destroy()


def test_a_preconditioner_that_gives_nan_once_costs_the_space_not_the_answer(monkeypatch):
    solver = GCRODR(restart=20, carried=8)
    original, calls = GCRODRState._apply_pc, [0]

    def faulty(self, v, z):
        original(self, v, z)
        calls[0] += 1
        if calls[0] == 30:
            z.set(np.nan)

    monkeypatch.setattr(GCRODRState, "_apply_pc", faulty)
    state = None
    for system in sequence(2):
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert result.report.converged
    assert any("not finite" in event for event in state.events)
    state.destroy()


def test_nan_from_a_preconditioner_costs_a_static_space_one_system_only(monkeypatch):
    solver = GCRODR(restart=20, carried=0, static=6)
    original, calls = GCRODRState._apply_pc, [0]

    def faulty(self, v, z):
        original(self, v, z)
        calls[0] += 1
        if calls[0] == 9:
            z.set(np.nan)

    monkeypatch.setattr(GCRODRState, "_apply_pc", faulty)
    state = None
    for system in sequence(3):
        state = state or GCRODRState(system, solver, lowest(system.A, 6))
        result, state = solver.solve(system, state)
        assert result.report.converged
        assert system.residual(result.x) <= 1e-8 * (1 + 1e-6)
    assert len(state.events) == 1
    assert state.deflated_pair()[0].shape[1] == 6
    state.destroy()


def test_a_preconditioner_that_always_gives_nan_is_a_breakdown(monkeypatch):
    solver = GCRODR(restart=20, carried=8)
    monkeypatch.setattr(GCRODRState, "_apply_pc", lambda self, v, z: z.set(np.nan))
    system = next(sequence(1))
    result, state = solver.solve(system, solver.init(system))
    assert result.report.reason is Reason.BREAKDOWN
    assert np.isfinite(result.x.getArray()).all()
    state.destroy()


def test_a_space_larger_than_half_of_the_unknowns():
    system = grid_system((3, 5))
    solver = GCRODR(restart=14, carried=11, preconditioner="none")
    state = solver.init(system)
    for seed in (1, 2, 3):
        refill(system.A, diffusion(smooth_field((3, 5), seed)))
        result, state = solver.solve(system, state)
        assert result.report.converged
    state.destroy()


def test_a_sudden_jump_of_the_matrix_is_survived():
    system = grid_system(SHAPE)
    solver = GCRODR(restart=20, carried=8)
    state = solver.init(system)
    for matrix in (
        diffusion(smooth_field(SHAPE)),
        1e8 * diffusion(np.exp(5 * np.log(smooth_field(SHAPE, 77)))),
        1e-6 * diffusion(1.0 / smooth_field(SHAPE)),
    ):
        refill(system.A, matrix)
        result, state = solver.solve(system, state)
        assert result.report.converged
    state.destroy()


def test_a_consistent_singular_system_with_its_null_space():
    A = petsc_matrix(diffusion(smooth_field(SHAPE), "neumann"))
    A.setNullSpace(PETSc.NullSpace().create(constant=True, comm=A.comm))
    values = np.random.default_rng(811).normal(size=A.getSize()[0])
    solver = GCRODR(restart=20, carried=8, preconditioner="jacobi")
    state = None
    for seed in (1, 2, 3):
        refill(A, diffusion(smooth_field(SHAPE, seed), "neumann"))
        system = LinearSystem(A, petsc_vector(A, values - values.mean()))
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert result.report.converged
        assert abs(result.x.getArray().mean()) <= 1e-8 * np.abs(result.x.getArray()).max()
    state.destroy()


def test_an_eigenvector_as_right_hand_side_ends_in_one_step():
    system = grid_system(SHAPE)
    values = lowest(system.A, 1)[:, 0].copy()
    exact = LinearSystem(system.A, petsc_vector(system.A, values), system.traits)
    solver = GCRODR(restart=20, carried=8, preconditioner="none")
    result, state = solver.solve(exact, solver.init(exact))
    assert result.report.converged
    assert result.report.iterations <= 2
    result, state = solver.solve(system, state)  # a space of one vector is handed on
    assert result.report.converged
    state.destroy()


def test_indefinite_and_rotating_spectra():
    """Complex harmonic Ritz values: a nonsymmetric matrix with eigenvalues around zero."""
    rng = np.random.default_rng(97)
    n = 120
    matrix = sp.block_diag(
        [np.array([[a + 1.5, b], [-b, a + 1.5]]) for a, b in rng.normal(size=(n // 2, 2))]
    )
    A = petsc_matrix(sp.csr_matrix(matrix + 0.02 * sp.random(n, n, 0.1, random_state=3)))
    system = LinearSystem(A, petsc_vector(A, rng.normal(size=n)))
    solver = GCRODR(restart=40, carried=9, preconditioner="none", max_iterations=2000)
    result, state = solver.solve(system, solver.init(system))
    assert result.report.converged
    U, C = state.deflated_pair()
    np.testing.assert_allclose(dense(A) @ U, C, atol=1e-9)
    state.destroy()


def test_the_limit_of_iterations_is_kept_and_said():
    system = grid_system(SHAPE)
    solver = GCRODR(preconditioner="none", max_iterations=17, restart=10, carried=3)
    result, state = solver.solve(system, solver.init(system))
    assert result.report.reason is Reason.ITERATION_LIMIT
    assert result.report.iterations == 17
    assert 0 < result.report.true_relres < 1
    state.destroy()


def test_history_falls_to_the_tolerance():
    system = grid_system(SHAPE)
    solver = GCRODR(history=True, restart=20, carried=5)
    report = solver.solve(system, solver.init(system))[0].report
    assert len(report.history) == report.iterations
    assert np.all(np.diff(report.history) <= 1e-12)
    assert report.history[-1] <= 1e-8


def test_settings_that_leave_no_room_are_refused():
    with pytest.raises(ConfigError, match="no room in cycles"):
        GCRODR(restart=20, carried=12, static=8)
    with pytest.raises(ConfigError, match="target"):
        GCRODR(static=5, target="preconditioned")


def test_harmonic_ritz_vectors_of_an_invariant_space_are_eigenvectors():
    values = np.array([5.0, -0.1, 3.0, 0.5, -7.0, 11.0])
    G = np.vstack([np.diag(values), np.zeros(6)])
    WV = np.vstack([np.eye(6), np.zeros(6)])
    Q, T = handed_on(G, WV, 0, 2)
    assert Q.shape == (7, 2)
    np.testing.assert_allclose(G @ T, Q, atol=1e-14)
    assert set(np.flatnonzero(np.abs(T).max(axis=1) > 1e-12)) == {1, 3}
    Q, T = handed_on(G, WV, 1, 2)  # the first column stays, two more beside it
    assert set(np.flatnonzero(np.abs(T).max(axis=1) > 1e-12)) == {0, 1, 3}


def test_a_complex_pair_is_never_parted():
    pair = np.array([[0.1, 0.7], [-0.7, 0.1]])
    matrix = np.zeros((4, 4))
    matrix[:2, :2], matrix[2, 2], matrix[3, 3] = pair, 0.2, 9.0
    G, WV = np.vstack([matrix, np.zeros(4)]), np.vstack([np.eye(4), np.zeros(4)])
    assert handed_on(G, WV, 0, 3)[0].shape[1] == 3
    Q, T = handed_on(G, WV, 0, 2)
    assert Q.shape[1] == 1  # the pair would need a third vector
    assert set(np.flatnonzero(np.abs(T).max(axis=1) > 1e-12)) == {2}


def test_non_finite_pencils_are_refused():
    G = np.full((3, 2), np.nan)
    with pytest.raises(np.linalg.LinAlgError):
        handed_on(G, G, 0, 1)
