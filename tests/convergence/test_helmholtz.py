"""Helmholtz against manufactured waves and the known spectrum of its matrix."""

import numpy as np
import pytest

from simlab.core.comm import self_comm
from simlab.core.samples import Sample
from simlab.linalg import petsc as PETSc
from simlab.problems.helmholtz import Helmholtz

SEED = 3307


def centres(family):
    axes = [np.array(axis.coordinates) for axis in family.schema.axes]
    return np.meshgrid(*axes, indexing="ij")


def solved(family, mu):
    workspace = family.setup(self_comm())
    system = family.assemble(mu, workspace)
    ksp = PETSc.KSP().create(self_comm())
    ksp.setType("preonly")
    ksp.getPC().setType("lu")
    ksp.setOperators(system.A)
    x = system.b.duplicate()
    ksp.solve(system.b, x)
    assert system.residual(x) < 1e-10
    u = family.observe(mu, x, workspace)["u"]
    for item in (ksp, x, workspace):
        item.destroy()
    return u


def dense(family, mu):
    workspace = family.setup(self_comm())
    system = family.assemble(mu, workspace)
    A = np.zeros(system.A.getSize())
    rows, columns, values = system.A.getValuesCSR()
    A[np.repeat(np.arange(len(A)), np.diff(rows)), columns] = values
    b = system.b.getArray().copy()
    workspace.destroy()
    return A, b


@pytest.mark.parametrize(
    ("dim", "mean", "meshes"), [(2, 12.0, (30, 45, 68, 100)), (3, 7.0, (8, 12, 16, 24))]
)
def test_second_order_with_a_wavenumber_that_varies(dim, mean, meshes):
    # u = prod sin(m_j pi x_j), not symmetric under exchange of axes; f = (pi^2 sum m^2 - k^2) u;
    # k between resonances, so that refinement does not move one across it
    waves = (2, 3, 1)[:dim]
    errors = []
    for cells in meshes:
        family = Helmholtz(cells=cells, dim=dim, fields={"kind": "wavenumber", "mean": mean})
        x = centres(family)
        k = mean * (1 + 0.04 * np.cos(np.pi * x[0]) * np.sin(2 * np.pi * x[1]) + 0.02 * x[-1])
        u = np.prod([np.sin(m * np.pi * x_j) for m, x_j in zip(waves, x, strict=True)], axis=0)
        f = (np.pi**2 * np.sum(np.square(waves)) - k**2) * u
        found = solved(family, Sample(0, SEED, {}, {"k": k, "f": f}))
        errors.append(np.sqrt(np.mean((found - u) ** 2)))
    order = -np.polyfit(np.log(meshes), np.log(errors), 1)[0]
    assert 1.85 < order < 2.2
    assert errors[-1] < 0.03


@pytest.mark.parametrize("dim", [2, 3])
def test_matrix_is_symmetric_with_as_many_waves_below_as_the_box_has(dim):
    cells, k = (14, 13.0) if dim == 2 else (7, 8.0)
    family = Helmholtz(cells=cells, dim=dim)
    uniform = Sample(0, SEED, {}, {"k": np.full((cells,) * dim, k)})
    A, _ = dense(family, uniform)
    np.testing.assert_array_equal(A, A.T)
    one = 4 * cells**2 * np.sin(np.pi * np.arange(1, cells + 1) / (2 * cells)) ** 2
    laplace = np.sort(sum(np.meshgrid(*[one] * dim)).ravel())
    eigenvalues = np.linalg.eigvalsh(A)
    np.testing.assert_allclose(eigenvalues, (laplace - k**2) / cells**dim, atol=1e-11)
    assert 0 < np.count_nonzero(eigenvalues < 0) < len(A) // 3
    assert np.count_nonzero(A) == cells**dim + 2 * dim * (cells - 1) * cells ** (dim - 1)


def test_the_defaults_are_indefinite_and_resolve_the_wave():
    family = Helmholtz(cells=32)
    (mu,) = family.space.sample(1, SEED)
    A, b = dense(family, mu)
    eigenvalues = np.linalg.eigvalsh(A)
    assert 15 < np.count_nonzero(eigenvalues < 0) < 60  # a quarter disc of radius 20 / pi: 32
    assert 2 * np.pi / mu.fields["k"].max() * 32 > 8
    assert not family.traits.spd
    x = centres(family)
    r2 = (x[0] - 0.5) ** 2 + (x[1] - 0.5) ** 2
    np.testing.assert_allclose(b.reshape(32, 32), np.exp(-r2 / 0.01) / 32**2, rtol=1e-12)


def test_wavenumbers_follow_from_the_recorded_parameters():
    family = Helmholtz(cells=24)
    x, y = centres(family)
    for mu in family.space.sample(3, SEED):
        p = [mu.parameters[f"mu_{q}"] for q in (1, 2, 3, 4)]
        phi = [
            np.sin(np.pi * x) * np.sin(np.pi * y),
            np.cos(np.pi * x),
            np.cos(np.pi * y),
            np.sin(2 * np.pi * x) * np.sin(2 * np.pi * y),
        ]
        k = 20 * (1 + 0.05 * sum(m * q for m, q in zip(p, phi, strict=True)))
        np.testing.assert_allclose(mu.fields["k"], k, rtol=1e-13)
        assert not family.space.contains(Sample(0, SEED, mu.parameters, {"k": 1.01 * k}))
