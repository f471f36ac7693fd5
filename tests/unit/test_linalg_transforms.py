"""The fast inverse of the Laplacian is the inverse, for every boundary, shape and precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_systems import diffusion

from simlab.linalg.transforms import LaplaceInverse, is_smooth, laplace_diagonal


def inverse_error(shape, boundary, weights, shift, dtype):
    inverse = LaplaceInverse(shape, boundary, weights, dtype)
    inverse.set_shift(shift)
    matrix = diffusion(np.ones(shape), boundary, weights, mass=shift)
    x = np.random.default_rng(881).normal(size=shape)
    b = (matrix @ x.ravel()).reshape(shape).astype(dtype)
    return np.abs(inverse.apply(b) - x).max()


@pytest.mark.parametrize("boundary", ["dirichlet", "neumann", "periodic"])
@pytest.mark.parametrize(
    "shape", [(16,), (17,), (16, 12), (17, 19), (13, 8), (8, 26), (5, 6, 7), (13, 17, 19)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-4), (np.float64, 1e-12)])
def test_it_inverts_the_shifted_operator(shape, boundary, dtype, tolerance):
    weights = (1.0, 2.5, 0.4)[: len(shape)]
    assert inverse_error(shape, boundary, weights, 0.3, dtype) < tolerance


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 60), m=st.integers(2, 60), shift=st.floats(0.0, 10.0))
def test_any_two_lengths_with_walls(n, m, shift):
    assert inverse_error((n, m), "dirichlet", (1.0, 1.0), shift, np.float64) < 1e-9


def test_rough_and_smooth_lengths_are_told_apart():
    assert [n for n in (400, 420, 421, 432, 442, 13, 11, 1) if is_smooth(n)] == [
        400, 420, 432, 11, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("boundary", ["dirichlet", "neumann", "periodic"])
def test_the_diagonal_is_that_of_the_matrix(boundary):
    shape, weights = (5, 4, 6), (1.0, 2.0, 3.0)
    matrix = diffusion(np.ones(shape), boundary, weights)
    np.testing.assert_allclose(
        laplace_diagonal(shape, boundary, weights).ravel(), matrix.diagonal()
    )


@pytest.mark.parametrize("boundary", ["neumann", "periodic"])
def test_a_zero_mode_is_seen_and_harmless(boundary):
    inverse = LaplaceInverse((12, 12), boundary, (1.0, 1.0), np.float64)
    inverse.set_shift(0.0)
    assert inverse.is_singular
    x = np.random.default_rng(5).normal(size=(12, 12))
    x -= x.mean()
    matrix = diffusion(np.ones((12, 12)), boundary)
    b = (matrix @ x.ravel()).reshape(x.shape)
    np.testing.assert_allclose(inverse.apply(b), x, atol=1e-12)
    inverse.set_shift(0.5)
    assert not inverse.is_singular


def test_it_is_symmetric_positive_definite():
    rng = np.random.default_rng(77)
    inverse = LaplaceInverse((21, 23), "dirichlet", (1.0, 1.0), np.float64)
    inverse.set_shift(0.0)
    u, v = rng.normal(size=(2, 21, 23))
    forward, backward = np.vdot(v, inverse.apply(u.copy())), np.vdot(u, inverse.apply(v.copy()))
    assert forward == pytest.approx(backward, rel=1e-12)
    assert np.vdot(u, inverse.apply(u.copy())) > 0
