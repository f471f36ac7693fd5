"""The static seed space: the lowest modes, all of them, and a file that is checked on reading."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.sparse as sp
from linear_systems import (
    convection,
    convection_system,
    diffusion,
    grid_system,
    option_names,
    petsc_matrix,
    smooth_field,
)

from simlab.core.comm import self_comm
from simlab.core.errors import ConfigError
from simlab.linalg import petsc as PETSc
from simlab.linalg.krylov_schur import KrylovSchur
from simlab.linalg.seed import Seed, seed_space
from simlab.linalg.system import LinearSystem, Traits
from simlab.problems.darcy import Darcy


def system_of(matrix, *, symmetric=True):
    A = petsc_matrix(sp.csr_matrix(matrix))
    return LinearSystem(A, A.createVecLeft(), Traits(spd=symmetric, symmetric=symmetric))


def residuals(matrix, vectors):
    """Of the invariant subspace: ``A V - V (V^T A V)`` over the length of ``A V``."""
    images = matrix @ vectors
    rest = images - vectors @ (vectors.T @ images)
    return np.linalg.norm(rest, axis=0) / np.linalg.norm(images, axis=0)


@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((31, 31), 1),
        ((31, 31), 12),
        ((31, 31), 25),
        ((9, 9, 9), 17),
        ((9, 9, 9), 20),
        ((11, 11, 11), 15),
        ((14, 14, 14), 51),
        ((40,), 39),
    ],
)
def test_every_member_of_multiple_eigenvalues_is_found(shape, k):
    """On a square modes come in pairs, on a cube up to six at a time."""
    lines = [2 - 2 * np.cos(np.pi * np.arange(1, n + 1) / n) for n in shape]
    exact = np.sort(sum(np.meshgrid(*lines, indexing="ij")).ravel())
    matrix = diffusion(np.ones(shape))
    seed = seed_space(system_of(matrix), k)
    np.testing.assert_allclose(seed.values, exact[:k], rtol=1e-6)
    np.testing.assert_allclose(seed.vectors.T @ seed.vectors, np.eye(k), atol=1e-12)
    assert residuals(matrix, seed.vectors).max() <= 1e-6


def test_modes_take_few_solves(caplog):
    """Three to four solves a mode where eigenvalues are simple, the check for others included."""
    with caplog.at_level("INFO", logger="simlab.linalg.krylov_schur"):
        KrylovSchur(system_of(diffusion(smooth_field((31, 29)))), 20, 1e-6).run()
    modes, solves = (int(word) for word in re.findall(r"\d+", caplog.messages[-1]))
    assert modes == 20
    assert solves <= 85


def test_lowest_modes_of_a_varying_coefficient():
    matrix = diffusion(smooth_field((23, 29)))
    seed = seed_space(system_of(matrix), 9)
    values, vectors = np.linalg.eigh(matrix.toarray())
    np.testing.assert_allclose(seed.values, values[:9], rtol=1e-8)
    cosines = np.linalg.svd(vectors[:, :9].T @ seed.vectors, compute_uv=False)
    assert cosines.min() >= 1 - 1e-10


def test_nonsymmetric_matrices_give_a_real_invariant_subspace():
    matrix = convection(21)
    seed = seed_space(system_of(matrix, symmetric=False), 11)
    moduli = np.sort(np.abs(np.linalg.eigvals(matrix.toarray())))
    np.testing.assert_allclose(seed.values[:11], moduli[:11], rtol=1e-5)
    assert residuals(matrix, seed.vectors).max() <= 1e-6


def test_a_complex_pair_is_not_parted():
    size = np.arange(1.0, 61.0)
    matrix = sp.kron(sp.diags(size), np.array([[1.0, 0.7], [-0.7, 1.0]])).tocsr()
    seed = seed_space(system_of(matrix, symmetric=False), 5)
    assert seed.vectors.shape == (120, 6)
    np.testing.assert_allclose(seed.values, np.hypot(1, 0.7) * np.repeat([1.0, 2, 3], 2))
    assert residuals(matrix, seed.vectors).max() <= 1e-6


def test_symmetric_indefinite_matrices_give_the_modes_next_to_zero():
    matrix = diffusion(smooth_field((19, 19))) - 0.9 * sp.identity(361)
    A = petsc_matrix(sp.csr_matrix(matrix))
    seed = seed_space(LinearSystem(A, A.createVecLeft(), Traits(symmetric=True)), 8)
    moduli = np.sort(np.abs(np.linalg.eigvalsh(matrix.toarray())))
    np.testing.assert_allclose(seed.values, moduli[:8], rtol=1e-6)


def test_all_modes_of_a_small_matrix():
    matrix = diffusion(smooth_field((7,)))
    seed = seed_space(system_of(matrix), 7)
    np.testing.assert_allclose(seed.values, np.linalg.eigvalsh(matrix.toarray()), rtol=1e-8)


def test_a_multiple_of_the_identity_has_only_multiple_eigenvalues():
    seed = seed_space(system_of(2.5 * sp.identity(40)), 9)
    assert seed.vectors.shape == (40, 9)
    np.testing.assert_allclose(seed.values, 2.5)


def test_an_attached_null_space_is_left_out():
    matrix = diffusion(smooth_field((17, 15)), "neumann")
    system = system_of(matrix)
    system.A.setNullSpace(PETSc.NullSpace().create(constant=True, comm=self_comm()))
    seed = seed_space(system, 6)
    np.testing.assert_allclose(
        seed.values, np.linalg.eigvalsh(matrix.toarray())[1:7], rtol=1e-6, atol=1e-12
    )
    assert np.abs(seed.vectors.sum(axis=0)).max() <= 1e-9


def test_the_same_bits_every_time_and_no_option_left():
    before = option_names()
    first, second = (seed_space(grid_system(), 5) for _ in range(2))
    assert np.array_equal(first.vectors, second.vectors)
    assert option_names() == before


@pytest.mark.parametrize("k", [0, -3, 438])
def test_more_modes_than_unknowns_are_refused(k):
    with pytest.raises(ConfigError, match="lower solver"):
        seed_space(grid_system(), k)


def test_matrices_without_entries_are_refused():
    family = Darcy(cells=8, matrix_free=True)
    system = family.assemble(family.space.sample(1, 5171)[0], family.setup(self_comm()))
    with pytest.raises(ConfigError, match="matrix-free"):
        seed_space(system, 4)


def test_a_singular_reference_is_refused():
    with pytest.raises(ConfigError, match="singular"):
        seed_space(system_of(sp.diags(np.r_[np.zeros(3), np.ones(50)])), 4)


def test_a_file_gives_back_the_same_space(tmp_path):
    system = grid_system()
    seed = seed_space(system, 6)
    path = tmp_path / "space.npz"
    seed.save(path)
    seed.save(str(path))  # a second time, over the first
    assert [item.name for item in tmp_path.iterdir()] == ["space.npz"]
    again = Seed.load(path, grid_system(seed=77))
    assert np.array_equal(again.vectors, seed.vectors)
    assert np.array_equal(again.values, seed.values)


def test_files_of_other_systems_missing_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "space.npz"
    with pytest.raises(ConfigError, match="no static space"):
        Seed.load(path, grid_system())
    seed = seed_space(grid_system(), 4)
    seed.save(path)
    with pytest.raises(ConfigError, match=r"437 unknowns on 1 ranks.*these systems have 99 on 1"):
        Seed.load(path, grid_system((9, 11)))
    whole = path.read_bytes()
    flipped = whole[:900] + bytes([whole[900] ^ 1]) + whole[901:]
    for damaged in (b"", whole[: len(whole) // 2], b"text", flipped):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"space\.npz"):
            Seed.load(path, grid_system())
    for wrong in (
        {"vectors": seed.vectors},
        {"vectors": seed.vectors, "values": seed.values[:2], "ranges": seed.ranges},
        {"vectors": seed.vectors * np.nan, "values": seed.values, "ranges": seed.ranges},
    ):
        np.savez(path, **wrong)
        with pytest.raises(ConfigError, match=r"space\.npz"):
            Seed.load(path, grid_system())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    seed = seed_space(grid_system(), 3)
    with pytest.raises(ConfigError, match="cannot write"):
        seed.save(tmp_path / "missing" / "space.npz")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        seed.save(tmp_path / "taken")
    assert [item.name for item in tmp_path.iterdir()] == ["taken"]


def test_as_many_columns_as_asked_for():
    seed = seed_space(grid_system(), 6)
    assert np.array_equal(seed.columns(4, grid_system(seed=3)), seed.vectors[:, :4])
    with pytest.raises(ConfigError, match="static = 7 asks for more vectors than the 6"):
        seed.columns(7, grid_system())
    with pytest.raises(ConfigError, match="these systems have 441"):
        seed.columns(4, convection_system())
