"""The static space by SLEPc is the one that our own iteration finds; needs slepc4py."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from linear_systems import convection, diffusion, option_names, petsc_matrix, smooth_field

from simlab.core.comm import self_comm
from simlab.core.errors import ConfigError
from simlab.linalg import petsc as PETSc
from simlab.linalg import slepc
from simlab.linalg.krylov_schur import KrylovSchur
from simlab.linalg.seed import seed_space
from simlab.linalg.system import LinearSystem, Traits

pytest.importorskip("slepc4py")


def system_of(matrix, *, symmetric=True):
    A = petsc_matrix(sp.csr_matrix(matrix))
    return LinearSystem(A, A.createVecLeft(), Traits(spd=symmetric, symmetric=symmetric))


@pytest.mark.parametrize(
    ("matrix", "symmetric", "k"),
    [
        (diffusion(smooth_field((23, 29))), True, 9),
        (diffusion(np.ones((9, 9, 9))), True, 17),  # modes come in groups of up to six
        (diffusion(smooth_field((19, 19))) - 0.9 * sp.identity(361), True, 8),
        (convection(21), False, 11),
    ],
)
def test_both_find_the_same_space(matrix, symmetric, k):
    system, before = system_of(matrix, symmetric=symmetric), option_names()
    vectors, values = slepc.modes(system, k, 1e-6)
    expected, moduli = KrylovSchur(system, k, 1e-6).run()
    np.testing.assert_allclose(values[:k], moduli[:k], rtol=1e-5)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), atol=1e-12)
    assert vectors.shape == expected.shape
    cosines = np.linalg.svd(vectors.T @ expected, compute_uv=False)
    assert cosines.min() >= 1 - 1e-8
    assert option_names() == before


def test_a_complex_pair_is_not_parted():
    pair = sp.kron(sp.diags(np.arange(1.0, 61.0)), np.array([[1.0, 0.7], [-0.7, 1.0]]))
    vectors, values = slepc.modes(system_of(pair.tocsr(), symmetric=False), 5, 1e-6)
    assert vectors.shape == (120, 6)
    np.testing.assert_allclose(values, np.hypot(1, 0.7) * np.repeat([1.0, 2, 3], 2))


def test_an_attached_null_space_is_left_out():
    matrix = diffusion(smooth_field((17, 15)), "neumann")
    system = system_of(matrix)
    system.A.setNullSpace(PETSc.NullSpace().create(constant=True, comm=self_comm()))
    seed = seed_space(system, 6)
    expected = np.linalg.eigvalsh(matrix.toarray())[1:7]
    np.testing.assert_allclose(seed.values, expected, rtol=1e-5)
    assert np.abs(seed.vectors.sum(axis=0)).max() <= 1e-9


def test_a_singular_reference_is_refused():
    with pytest.raises(ConfigError, match="singular"):
        seed_space(system_of(sp.diags(np.r_[np.zeros(3), np.ones(50)])), 4)
