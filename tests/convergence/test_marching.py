"""Lorenz, Burgers, advection-Burgers: exact and independent solutions, and measured orders."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from simlab.core.samples import Sample
from simlab.problems.advection_burgers import AdvectionBurgers
from simlab.problems.burgers import Burgers
from simlab.problems.lorenz import Lorenz


def last(family, mu, name="u"):
    *_, fields = family.solution(mu)
    return fields[name]


def order(sizes, errors):
    return -np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def lorenz_reference(mu, times):
    p = mu.parameters

    def slope(_, u):
        x, y, z = u
        return p["sigma"] * (y - x), x * (p["rho"] - z) - y, x * y - p["beta"] * z

    start = [p["x_0"], p["y_0"], p["z_0"]]
    found = solve_ivp(slope, (0, times[-1]), start, "DOP853", times, rtol=1e-12, atol=1e-12)
    return found.y.T


def test_lorenz_follows_an_independent_integrator():
    family = Lorenz(dt=0.02, n_steps=50, substeps=8)
    for mu in family.space.sample(3, seed=5087):
        found = [fields["u"] for fields in family.solution(mu)]
        np.testing.assert_allclose(found, lorenz_reference(mu, family.schema.times), atol=2e-4)


def test_lorenz_is_fourth_order():
    substeps = (4, 8, 16, 32)
    mu = Lorenz().space.sample(1, seed=5087)[0]
    exact = lorenz_reference(mu, (0.2, 0.4))[-1]
    families = [Lorenz(dt=0.2, n_steps=2, substeps=5 * n) for n in substeps]
    errors = [np.linalg.norm(last(family, mu) - exact) for family in families]
    assert 3.8 < order(substeps, errors) < 4.3


def cole_hopf(x, t, nu, length=1.0, speed=1.0):
    """A solution of u_t + speed (u^2)_x / 2 = nu u_xx of period ``length``."""
    k = 2 * np.pi / length
    decay = np.exp(-(k**2) * nu * t)
    return 2 * nu * k / speed * decay * np.sin(k * x) / (2.0 + decay * np.cos(k * x))


def test_burgers_agrees_with_an_exact_solution_to_rounding():
    family = Burgers(points=64, viscosity=0.05, n_steps=5, substeps=40)
    x = np.arange(64) / 64
    mu = Sample(0, 0, {}, {"u0": cole_hopf(x, 0, 0.05)})
    for time, fields in zip(family.schema.times, family.solution(mu), strict=True):
        np.testing.assert_allclose(fields["u"], cole_hopf(x, time, 0.05), atol=1e-10)


def test_burgers_is_fourth_order_in_time():
    x, substeps = np.arange(96) / 96, (16, 32, 64, 128)
    mu = Sample(0, 0, {}, {"u0": cole_hopf(x, 0, 0.1)})
    families = [Burgers(points=96, viscosity=0.1, dt=0.4, n_steps=1, substeps=n) for n in substeps]
    errors = [np.abs(last(family, mu) - cole_hopf(x, 0.4, 0.1)).max() for family in families]
    assert 3.8 < order(substeps, errors) < 4.4


def test_burgers_keeps_the_mean_and_loses_energy():
    family = Burgers()
    for mu in family.space.sample(3, seed=733):
        u = np.array([fields["u"] for fields in family.solution(mu)])
        np.testing.assert_allclose(u.mean(1), mu.fields["u0"].mean(), atol=1e-13)
        energy = (u**2).mean(1)
        assert np.all(np.diff(energy) < 0)
        assert energy[0] < (mu.fields["u0"] ** 2).mean()


def quiet(family, u0):
    """A sample without a force that begins with ``u0``."""
    mu = family.space.sample(1, seed=19)[0]
    numbers = {n: 0.0 if n.startswith("amplitude") else v for n, v in mu.parameters.items()}
    return Sample(0, 19, numbers, {"u0": u0})


def advected(points, courant=0.1, nu=0.3):
    family = AdvectionBurgers(
        points=points, alpha=0.5, beta=nu, length=4.0, dt=0.1, n_steps=3, courant=courant
    )
    x = 4.0 * np.arange(points) / points
    found = last(family, quiet(family, cole_hopf(x, 0.0, nu, 4.0)))
    return np.abs(found - cole_hopf(x, 0.3, nu, 4.0)).max()


def test_advection_burgers_is_fifth_order_in_space():
    points = (32, 48, 64, 96)
    assert 4.6 < order(points, [advected(n) for n in points]) < 6.5


def test_advection_burgers_is_third_order_in_time():
    mu = AdvectionBurgers(points=64, beta=0.0).space.sample(1, seed=4409)[0]
    exact = last(AdvectionBurgers(points=64, beta=0.0, dt=0.4, n_steps=1, courant=0.01), mu)
    courant = (0.8, 0.4, 0.2, 0.1)
    errors = [
        np.abs(
            last(AdvectionBurgers(points=64, beta=0.0, dt=0.4, n_steps=1, courant=c), mu) - exact
        ).max()
        for c in courant
    ]
    assert 2.7 < order(1 / np.array(courant), errors) < 3.4


def test_the_force_acts_at_its_own_time():
    """Without flux and diffusion the velocity is the integral of the force."""
    family = AdvectionBurgers(points=20, alpha=0.0, beta=0.0, dt=0.5, n_steps=4)
    mu = family.space.sample(1, seed=61)[0]
    p = mu.parameters
    x = 16.0 * np.arange(20) / 20
    exact = mu.fields["u0"].copy()
    for j in range(1, 6):
        place = 2 * np.pi * p[f"wave_{j}"] * x / 16.0 + p[f"phase_{j}"]
        a, omega = p[f"amplitude_{j}"], p[f"frequency_{j}"]
        exact += a / omega * (np.cos(place) - np.cos(place + omega * 2.0))
    np.testing.assert_allclose(last(family, mu), exact, atol=1e-3)


def test_shocks_keep_the_mean_and_do_not_overshoot():
    family = AdvectionBurgers(points=80, alpha=1.0, beta=0.0, dt=0.25, n_steps=16)
    x = 16.0 * np.arange(80) / 80
    u0 = 0.2 + np.sin(2 * np.pi * x / 16.0)
    for fields in family.solution(quiet(family, u0)):
        assert fields["u"].mean() == pytest.approx(u0.mean(), abs=1e-13)
        assert fields["u"].max() < u0.max() + 0.01
        assert fields["u"].min() > u0.min() - 0.01
    steepest = np.diff(fields["u"]).min()
    assert steepest < 3 * np.diff(u0).min()


def test_a_sample_that_blows_up_is_nan_from_there_on():
    family = AdvectionBurgers(points=16, n_steps=3)
    found = [f["u"] for f in family.solution(quiet(family, np.full(16, 1e9) * np.arange(16)))]
    assert all(np.isnan(u).all() for u in found)
