"""Convection-diffusion against manufactured solutions, and what upwinding promises."""

import numpy as np
import pytest

from simlab.core.comm import self_comm
from simlab.core.errors import SchemaError
from simlab.core.samples import Sample
from simlab.linalg import petsc as PETSc
from simlab.problems.convection import ConvectionDiffusion
from simlab.problems.grid import CellWorkspace

SEED = 8117


def centres(family):
    axes = [np.array(axis.coordinates) for axis in family.schema.axes]
    return np.meshgrid(*axes, indexing="ij")


def flow(mu, x):
    """The published velocity, written down a second time."""
    p = mu.parameters
    s = 50 * (1 + 0.3 * p["mu_4"])
    v = [s * (x[1] - 0.5) + 10 * p["mu_1"], -s * (x[0] - 0.5) + 10 * p["mu_2"]]
    return [*v, np.full_like(x[0], 20 * p["mu_3"])] if len(x) == 3 else v


def solved(family, mu):
    workspace = family.setup(self_comm())
    system = family.assemble(mu, workspace)
    ksp = PETSc.KSP().create(self_comm())
    ksp.setType("bcgs")
    ksp.getPC().setType("ilu")
    ksp.setTolerances(rtol=1e-12, max_it=2000)
    ksp.setOperators(system.A)
    x = system.b.duplicate()
    ksp.solve(system.b, x)
    assert system.residual(x) < 1e-9
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
    workspace.destroy()
    return A


@pytest.mark.parametrize(("dim", "meshes"), [(2, (40, 80, 160, 320)), (3, (16, 24, 36, 48))])
def test_first_order_in_the_published_flow(dim, meshes):
    errors = []
    for cells in meshes:
        family = ConvectionDiffusion(cells=cells, dim=dim)
        mu = family.space.sample(1, SEED)[0]
        x = centres(family)
        waves = (1, 2, 1)[:dim]
        sines = [np.sin(m * np.pi * x_j) for m, x_j in zip(waves, x, strict=True)]
        u = np.prod(sines, axis=0)
        f = np.pi**2 * np.sum(np.square(waves)) * u
        for j, (m, v) in enumerate(zip(waves, flow(mu, x), strict=True)):
            others = np.prod([sine for i, sine in enumerate(sines) if i != j], axis=0)
            f += v * m * np.pi * np.cos(m * np.pi * x[j]) * others
        found = solved(family, Sample(0, SEED, mu.parameters, {"f": f}))
        errors.append(np.sqrt(np.mean((found - u) ** 2)))
    order = -np.polyfit(np.log(meshes), np.log(errors), 1)[0]
    assert 0.8 < order < 1.15
    assert errors[-1] < 0.4 * errors[0]


def test_second_order_when_nothing_moves():
    meshes, errors = (10, 20, 40), []
    for cells in meshes:
        family = ConvectionDiffusion(cells=cells, dim=2, swirl=0.0, wind=0.0, diffusivity=0.7)
        x, y = centres(family)
        u = np.sin(np.pi * x) * np.sin(3 * np.pi * y)
        mu = Sample(0, 1, {"mu_1": 0.3, "mu_2": 0.2, "mu_4": 0.9}, {"f": 7 * np.pi**2 * u})
        errors.append(np.sqrt(np.mean((solved(family, mu) - u) ** 2)))
    assert -np.polyfit(np.log(meshes), np.log(errors), 1)[0] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("dim", "cells"), [(2, 11), (3, 6)])
@pytest.mark.parametrize("diffusivity", [1.0, 1e-3])
def test_matrix_is_a_nonsymmetric_m_matrix_that_conserves(dim, cells, diffusivity):
    family = ConvectionDiffusion(cells=cells, dim=dim, diffusivity=diffusivity)
    A = dense(family, family.space.sample(1, SEED)[0])
    off = A - np.diag(np.diag(A))
    assert off.max() <= 0
    assert np.linalg.inv(A).min() > 0
    assert not np.allclose(A, A.T, rtol=1e-3)
    assert np.count_nonzero(A) == cells**dim + 2 * dim * (cells - 1) * cells ** (dim - 1)
    inner = (slice(1, -1),) * dim
    size = np.abs(A).max()
    for axis in (0, 1):  # constants are carried unchanged; what leaves a cell enters its neighbour
        sums = A.sum(axis).reshape((cells,) * dim)
        np.testing.assert_allclose(sums[inner], 0, atol=1e-13 * size)
        assert sums.min() > -1e-13 * size


def test_walls_let_in_nothing_and_hold_the_cell_at_half_a_width():
    # wind towards +x and -y only: walls at x = 0 and y = 1 are upstream, and add h v to the row sum
    family = ConvectionDiffusion(cells=5, dim=2, swirl=0.0, wind=4.0)
    A = dense(family, Sample(0, 1, {"mu_1": 0.5, "mu_2": -1.0, "mu_4": 0.0}))
    sums = A.sum(1).reshape(5, 5)
    h = 1 / 5
    np.testing.assert_allclose(sums[0, 1:-1], 2 + 2.0 * h)
    np.testing.assert_allclose(sums[-1, 1:-1], 2)
    np.testing.assert_allclose(sums[1:-1, -1], 2 + 4.0 * h)
    np.testing.assert_allclose(sums[1:-1, 0], 2)


def test_a_drop_drifts_downstream():
    family = ConvectionDiffusion(cells=31, dim=2, swirl=0.0, wind=30.0)
    drop = np.zeros((31, 31))
    drop[15, 15] = 1.0
    u = solved(family, Sample(0, 1, {"mu_1": 1.0, "mu_2": 0.5, "mu_4": 0.0}, {"f": drop}))
    x, y = centres(family)
    assert (u * (x - 0.5)).sum() / u.sum() > 0.1
    assert 0.05 < (u * (y - 0.5)).sum() / u.sum() < (u * (x - 0.5)).sum() / u.sum()


def test_any_velocity_and_coefficient_make_one_stencil():
    # against dense loops over cells, all terms at once, unequal axes
    shape, rng = (4, 3), np.random.default_rng(SEED)
    a, c = np.exp(rng.standard_normal(shape)), rng.standard_normal(shape)
    v = [rng.standard_normal((5, 3)), rng.standard_normal((4, 4))]
    workspace = CellWorkspace(self_comm(), shape, transport=True)
    workspace.assemble(a, c, v)
    expected = np.zeros((12, 12))
    for i, j in np.ndindex(shape):
        row = 3 * i + j
        expected[row, row] += c[i, j] / 12
        for axis, step in ((0, -1), (0, 1), (1, -1), (1, 1)):
            near = (i + step, j) if axis == 0 else (i, j + step)
            face = (max(i, near[0]), j) if axis == 0 else (i, max(j, near[1]))
            inside = all(0 <= p < n for p, n in zip(near, shape, strict=True))
            k = 2 / (1 / a[i, j] + 1 / a[near]) if inside else 2 * a[i, j]
            into = max(0.0, -step * v[axis][face])
            weight = (k * shape[axis] ** 2 + into * shape[axis]) / 12
            expected[row, row] += weight
            if inside:
                expected[row, 3 * near[0] + near[1]] -= weight
    found = workspace.A.convert("dense").getDenseArray()
    np.testing.assert_allclose(found, expected, atol=1e-14)
    version = workspace.A.stateGet()
    workspace.assemble(a, c, [item.copy() for item in v])
    assert workspace.A.stateGet() == version
    v[1][0, 0] += 1e-9
    workspace.assemble(a, c, v)
    assert workspace.A.stateGet() > version
    with pytest.raises(SchemaError, match="positive"):
        workspace.assemble(-a, c, v)
    workspace.destroy()
