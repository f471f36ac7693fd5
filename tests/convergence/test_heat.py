"""Heat conduction against exact solutions, in space and in time."""

import numpy as np
import pytest

from simlab.core.comm import self_comm
from simlab.core.reports import Reason, SolveReport
from simlab.core.samples import Sample
from simlab.linalg import petsc as PETSc
from simlab.linalg.system import SolveResult
from simlab.problems.family import trajectory
from simlab.problems.heat import Heat


class Run:
    """A family, its workspace and a direct solver that keeps its factor."""

    def __init__(self, family):
        self.family, self.workspace = family, family.setup(self_comm())
        self.x = self.workspace.A.createVecRight()
        self.ksp = PETSc.KSP().create(self_comm())
        self.ksp.setType("preonly")
        self.ksp.getPC().setType("lu")
        self.ksp.setOperators(self.workspace.A)

    def solve(self, system):
        self.ksp.solve(system.b, self.x)
        report = SolveReport("lu", Reason.CONVERGED, 1, 1, 1, system.residual(self.x), 1e-10)
        assert report.true_relres < 1e-11
        return SolveResult(self.x, report)

    def fields(self, mu):
        steps = trajectory(self.family, mu, self.workspace, self.solve)
        return np.array([step.fields["u"] for step in steps])

    def from_field(self, mu, field):
        """March the family's steps from any temperature field; return the last one."""
        previous = self.x.duplicate()
        previous.setArray(field.ravel())
        for step in range(1, self.family.steps + 1):
            self.solve(self.family.assemble(mu, self.workspace, step, previous))
            self.x.copy(previous)
        previous.destroy()
        return self.family.observe(mu, self.x, self.workspace)["u"]

    def destroy(self):
        for item in (self.ksp, self.x, self.workspace):
            item.destroy()


def plate(initial, left, right, bottom, top):
    names = ("initial", "left", "right", "bottom", "top")
    return Sample(0, 1, dict(zip(names, (initial, left, right, bottom, top), strict=True)))


def mode(cells):
    x = (np.arange(cells) + 0.5) / cells
    return np.outer(np.sin(np.pi * x), np.sin(np.pi * x))


def decay_error(cells, dt, n_steps, kappa=0.7):
    run = Run(Heat(cells=cells, dt=dt, n_steps=n_steps, diffusivity=kappa))
    found = run.from_field(plate(0, 0, 0, 0, 0), mode(cells))
    run.destroy()
    exact = np.exp(-2 * np.pi**2 * kappa * dt * n_steps) * mode(cells)
    return np.sqrt(np.mean((found - exact) ** 2))


def test_a_sine_mode_decays_by_the_discrete_factor():
    cells, dt, kappa = 12, 0.03, 0.7
    run = Run(Heat(cells=cells, dt=dt, n_steps=7, diffusivity=kappa))
    found = run.from_field(plate(0, 0, 0, 0, 0), mode(cells))
    run.destroy()
    eigenvalue = 2 * 4 * cells**2 * np.sin(np.pi / (2 * cells)) ** 2
    np.testing.assert_allclose(found, (1 + kappa * dt * eigenvalue) ** -7 * mode(cells), rtol=1e-10)


def test_second_order_in_space():
    meshes = (4, 8, 16)
    errors = [decay_error(cells, dt=1e-5, n_steps=200) for cells in meshes]
    assert 1.9 < -np.polyfit(np.log(meshes), np.log(errors), 1)[0] < 2.2


def test_first_order_in_time():
    steps = (5, 10, 20, 40)
    errors = [decay_error(48, dt=0.05 / n, n_steps=n) for n in steps]
    assert 0.9 < -np.polyfit(np.log(steps), np.log(errors), 1)[0] < 1.15


def test_cooling_plate_follows_the_fourier_series():
    cells, dt, n_steps = 32, 2.5e-4, 200
    run = Run(Heat(cells=cells, dt=dt, n_steps=n_steps))
    found = run.fields(plate(400, 150, 150, 150, 150))
    run.destroy()
    x = (np.arange(cells) + 0.5) / cells
    odd = np.arange(1, 40, 2)
    times = np.array(Heat(cells=cells, dt=dt, n_steps=n_steps).schema.times)
    decay = np.exp(-(np.pi**2) * odd**2 * times[:, None])
    line = 4 / np.pi * (decay / odd) @ np.sin(np.pi * np.outer(odd, x))
    exact = 150 + 250 * line[:, :, None] * line[:, None, :]
    np.testing.assert_allclose(found[39:], exact[39:], atol=2.5)  # 1 % of the step of 250 K
    assert np.abs(found[39:] - exact[39:]).mean() < 0.5


def test_walls_are_where_they_are_said_to_be():
    run = Run(Heat(cells=9, n_steps=300))
    left, right, bottom, top = 110.0, 460.0, 230.0, 340.0
    u = run.fields(plate(300, left, right, bottom, top))[-1]
    run.destroy()
    assert u[4, 4] == pytest.approx((left + right + bottom + top) / 4, rel=1e-10)
    for found, wall in ((u[0, 4], left), (u[-1, 4], right), (u[4, 0], bottom), (u[4, -1], top)):
        assert found == pytest.approx(wall, abs=25)
    assert u.min() > left
    assert u.max() < right


def test_equal_temperatures_stay_as_they_are():
    run = Run(Heat(cells=6, n_steps=5))
    np.testing.assert_allclose(run.fields(plate(321.5, *[321.5] * 4)), 321.5, rtol=1e-12)
    run.destroy()


def test_matrix_and_version_never_change():
    family = Heat(cells=5, n_steps=4)
    run = Run(family)
    version = family.assemble(family.space.sample(1, seed=71)[0], run.workspace).version
    values = run.workspace.A.getValuesCSR()[2].copy()
    for mu in family.space.sample(3, seed=72):
        assert run.fields(mu).shape == (4, 5, 5)
        assert family.assemble(mu, run.workspace).version == version
    np.testing.assert_array_equal(run.workspace.A.getValuesCSR()[2], values)
    run.destroy()
