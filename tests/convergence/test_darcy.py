"""Darcy against manufactured solutions, and the discrete properties of its matrix."""

import tracemalloc

import numpy as np
import pytest

from simlab.core.comm import self_comm
from simlab.core.errors import SchemaError
from simlab.core.samples import Sample
from simlab.linalg import petsc as PETSc
from simlab.problems.darcy import Darcy
from simlab.problems.grid import CellWorkspace


def solved(family, mu):
    """Solve one sample directly; return the pressure."""
    workspace = family.setup(self_comm())
    system = family.assemble(mu, workspace)
    ksp = PETSc.KSP().create(self_comm())
    ksp.setType("preonly")
    ksp.getPC().setType("lu")
    ksp.setOperators(system.A)
    x = system.A.createVecRight()
    ksp.solve(system.b, x)
    assert system.residual(x) < 1e-11
    u = family.observe(mu, x, workspace)["u"]
    for item in (ksp, x, workspace):
        item.destroy()
    return u


def dense(family, mu):
    """Return the matrix as a dense array and the right-hand side."""
    workspace = family.setup(self_comm())
    system = family.assemble(mu, workspace)
    rows, columns, values = system.A.getValuesCSR()
    A = np.zeros(system.A.getSize())
    A[np.repeat(np.arange(len(A)), np.diff(rows)), columns] = values
    b = system.b.getArray().copy()
    workspace.destroy()
    return A, b


def manufactured(family):
    """Return a sample with a smooth coefficient and the source of a known pressure, and that.

    u = prod sin(pi x_j), a = 1 + 0.5 sin(2 x_1 + x_2 ...) : f = -grad a . grad u - a lap u.
    """
    axes = [np.array(axis.coordinates) for axis in family.schema.axes]
    x = np.meshgrid(*axes, indexing="ij")
    slope = [2.0, 1.0, 3.0][: family.dim]
    phase = sum(s * x_j for s, x_j in zip(slope, x, strict=True))
    a = 1 + 0.5 * np.sin(phase)
    sines = [np.sin(np.pi * x_j) for x_j in x]
    u = np.prod(sines, axis=0)
    f = family.dim * np.pi**2 * a * u
    for j, s in enumerate(slope):
        others = np.prod([sine for i, sine in enumerate(sines) if i != j], axis=0)
        f -= 0.5 * s * np.cos(phase) * np.pi * np.cos(np.pi * x[j]) * others
    return Sample(0, 1, {}, {"a": a, "f": f}), u


@pytest.mark.parametrize(("dim", "meshes"), [(2, (12, 24, 48, 96)), (3, (6, 10, 16, 24))])
def test_second_order_on_smooth_coefficients(dim, meshes):
    errors = []
    for cells in meshes:
        family = Darcy(cells=cells, dim=dim)
        mu, exact = manufactured(family)
        errors.append(np.sqrt(np.mean((solved(family, mu) - exact) ** 2)))
    order = -np.polyfit(np.log(meshes), np.log(errors), 1)[0]
    assert 1.9 < order < 2.15
    assert errors[-1] < 3e-3


def test_constant_coefficient_has_the_known_centre_pressure():
    # -lap u = 1 on the unit square: u at the centre is 0.07367135 (Timoshenko, torsion of a bar)
    family = Darcy(cells=81, source=2.5)
    u = solved(family, Sample(0, 1, {}, {"a": np.full((81, 81), 0.5)}))
    assert u[40, 40] == pytest.approx(0.07367135 * 2.5 / 0.5, rel=4e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_carry_an_exact_flux(axis):
    # across layers of constant a, u is linear within a layer and a u' is one constant: harmonic
    # face conductances reproduce that exactly, so A u vanishes away from the other boundaries
    n, rng = 14, np.random.default_rng(733)
    layer = np.exp(2 * rng.standard_normal(n))
    resistance = np.concatenate([[0], np.cumsum(1 / layer)]) / n
    centre = 0.5 * (resistance[1:] + resistance[:-1])
    a, u = np.tile(layer[:, None], n), np.tile(centre[:, None], n)
    if axis:
        a, u = a.T.copy(), u.T.copy()
    A, _ = dense(Darcy(cells=n), Sample(0, 1, {}, {"a": a}))
    balance = np.moveaxis((A @ u.ravel()).reshape(n, n), axis, 0)
    np.testing.assert_allclose(balance[:-1, 1:-1], 0, atol=1e-13)
    np.testing.assert_allclose(balance[-1, 1:-1], 2 * layer[-1] * resistance[-1], rtol=1e-12)


@pytest.mark.parametrize("dim", [2, 3])
def test_matrix_is_a_symmetric_m_matrix(dim):
    family = Darcy(cells=6, dim=dim, fields={"kind": "lognormal", "scale": 5.0})
    A, _ = dense(family, family.space.sample(1, seed=811)[0])
    np.testing.assert_array_equal(A, A.T)
    off = A - np.diag(np.diag(A))
    assert off.max() == 0
    assert np.count_nonzero(A) == 6**dim + 2 * dim * 5 * 6 ** (dim - 1)
    assert A.sum(axis=1).min() > -1e-13
    assert np.linalg.inv(A).min() > 0
    assert np.linalg.eigvalsh(A).min() > 0


@pytest.mark.parametrize("dim", [2, 3])
def test_what_is_injected_leaves_through_the_boundary(dim):
    family = Darcy(cells=9, dim=dim, fields={"kind": "two_phase"}, source=1.7)
    mu = family.space.sample(1, seed=467)[0]
    a, u, h = mu.fields["a"], solved(family, mu), 1 / 9
    flux = 0.0
    for axis in range(dim):
        for side in (0, -1):
            wall = 2 * a.take(side, axis) * u.take(side, axis) / h * h ** (dim - 1)
            flux += wall.sum()
    assert flux == pytest.approx(1.7, rel=1e-11)


def test_one_rank_matrix_acts_on_the_flattened_array():
    # an unsymmetric point source and coefficient: exchanging axes would be seen
    a = np.ones((4, 4))
    a[0, :] = 10.0
    A, b = dense(Darcy(cells=4), Sample(0, 1, {}, {"a": a, "f": np.arange(16.0).reshape(4, 4)}))
    np.testing.assert_allclose(b, np.arange(16.0) / 16)
    assert A[0, 1] == pytest.approx(-10.0)  # along y, within the layer
    assert A[0, 4] == pytest.approx(-2 / (1 / 10 + 1))  # along x, across it
    assert A[0, 0] == pytest.approx(20 + 20 + 10 + 2 / 1.1)


def test_unequal_axes_have_their_own_spacing():
    # box of 5 x 8 cells: the lowest discrete sine mode is an eigenvector with a known eigenvalue
    shape = (5, 8)
    workspace = CellWorkspace(self_comm(), shape)
    workspace.assemble(np.ones(shape), reaction=3.0)
    mode = np.outer(*(np.sin(np.pi * (np.arange(n) + 0.5) / n) for n in shape))
    x, y = workspace.A.createVecs()
    x.setArray(mode.ravel())
    workspace.A.mult(x, y)
    eigenvalue = sum(4 * n**2 * np.sin(np.pi / (2 * n)) ** 2 for n in shape) + 3.0
    np.testing.assert_allclose(workspace.gather(y), eigenvalue / 40 * mode, rtol=1e-12)
    workspace.destroy()


def test_version_moves_with_the_values_only():
    family = Darcy(cells=8)
    workspace = family.setup(self_comm())
    one, two = family.space.sample(2, seed=55)
    first = family.assemble(one, workspace).version
    assert family.assemble(one, workspace).version == first
    with_source = Sample(9, 55, {}, {"a": one.fields["a"], "f": np.ones((8, 8))})
    assert family.assemble(with_source, workspace).version == first
    second = family.assemble(two, workspace).version
    assert second != first
    assert family.assemble(one, workspace).version not in (first, second)
    workspace.destroy()


def test_reassembly_leaves_nothing_behind():
    family = Darcy(cells=7)
    one, two = family.space.sample(2, seed=56)
    with_source = Sample(9, 56, {}, dict(two.fields) | {"f": np.full((7, 7), 40.0)})
    workspace = family.setup(self_comm())
    for mu in (one, with_source):
        family.assemble(mu, workspace)
    again = family.assemble(one, workspace)
    A, b = dense(family, one)
    np.testing.assert_array_equal(again.A.getValuesCSR()[2], A[A != 0])
    np.testing.assert_array_equal(again.b.getArray(), b)
    workspace.destroy()


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_coefficient_that_is_not_positive_is_refused(value):
    family = Darcy(cells=4)
    workspace = family.setup(self_comm())
    a = np.ones((4, 4))
    a[2, 1] = value
    with pytest.raises(SchemaError, match="must be positive"):
        family.assemble(Sample(3, 1, {}, {"a": a}), workspace)
    with pytest.raises(SchemaError, match="shape"):
        family.assemble(Sample(3, 1, {}, {"a": np.ones((4, 5))}), workspace)
    workspace.destroy()


def test_assembly_allocates_no_grid():
    family = Darcy(cells=300)
    workspace = family.setup(self_comm())
    samples = family.space.sample(2, seed=57)
    for mu in samples:
        family.assemble(mu, workspace)
    tracemalloc.start()
    family.assemble(samples[0], workspace)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    workspace.destroy()
    assert peak < 0.5 * 8 * 300**2  # less than half a field; the matrix has five
