"""FitzHugh-Nagumo: the reaction alone, diffusion alone, and orders in space and time."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from simlab.core.comm import self_comm
from simlab.core.errors import ConfigError
from simlab.core.samples import Sample
from simlab.linalg.system import solvers
from simlab.problems.family import trajectory
from simlab.problems.reaction_diffusion import ReactionDiffusion

SOLVER = solvers.build({"kind": "fast", "rtol": 1e-12})


def run(family, u0, eps=0.2, kappa=0.1):
    """Return u and v over time, shape (T, 2, n, n)."""
    workspace, states = family.setup(self_comm()), []

    def solve(system):
        if not states:
            states.append(SOLVER.init(system))
        result, states[0] = SOLVER.solve(system, states[0])
        return result

    mu = Sample(4, 9, {"eps": eps, "kappa": kappa}, {"u0": u0})
    steps = [(s.fields["u"], s.fields["v"]) for s in trajectory(family, mu, workspace, solve)]
    states[0].destroy()
    workspace.destroy()
    return np.array(steps)


def order(sizes, errors):
    return -np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def medium(n_steps, time=1.0, cells=4, **settings):
    return ReactionDiffusion(cells=cells, dt=time / n_steps, n_steps=n_steps, **settings)


def test_an_even_medium_follows_its_ordinary_differential_equations_in_first_order():
    def slope(_, y):
        u, v = y
        return [u - u**3 - v, 0.2 * (u + 0.1 - 0.5 * v)]

    exact = solve_ivp(slope, (0, 4), [0.7, 0.0], "DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    sizes, errors = (20, 40, 80, 160), []
    for n in sizes:
        found = run(medium(n, time=4.0), np.full((4, 4), 0.7))[-1]
        assert np.ptp(found, axis=(1, 2)).max() < 1e-10
        errors.append(np.abs(found[:, 0, 0] - exact).max())
    assert 0.9 < order(sizes, errors) < 1.15


def smooth(cells):
    x = (np.arange(cells) + 0.5) / cells
    return 0.6 * np.outer(np.cos(np.pi * x), np.cos(2 * np.pi * x)) + 0.2


def coarsened(fields, cells):
    k = fields.shape[-1] // cells
    return fields.reshape(2, cells, k, cells, k).mean((2, 4))


def test_second_order_in_space():
    sizes, fine = (8, 16, 32), 128
    settings = {"time": 0.5, "diffusivity": 0.02}
    exact = run(medium(5, cells=fine, **settings), smooth(fine))[-1]
    errors = []
    for cells in sizes:
        start = smooth(fine).reshape(cells, fine // cells, cells, fine // cells).mean((1, 3))
        found = run(medium(5, cells=cells, **settings), start)[-1]
        errors.append(np.sqrt(np.mean((found - coarsened(exact, cells)) ** 2)))
    assert 1.85 < order(sizes, errors) < 2.25


def test_first_order_in_time_with_diffusion():
    sizes = (10, 20, 40)
    settings = {"time": 2.0, "cells": 12, "diffusivity": 0.01}
    exact = run(medium(1280, **settings), smooth(12))[-1]
    errors = [np.abs(run(medium(n, **settings), smooth(12))[-1] - exact).max() for n in sizes]
    assert 0.85 < order(sizes, errors) < 1.2


def test_nothing_diffuses_through_the_walls():
    """A small bump: to first order in its size, its total follows the even medium's equations."""
    cells, size = 16, 1e-5
    bump = np.zeros((cells, cells))
    bump[0, 0] = size
    family = medium(20, cells=cells, diffusivity=0.05)
    even = run(family, np.zeros((cells, cells)), kappa=0.0)
    assert np.abs(even).max() < 1e-15
    spread = run(family, bump, kappa=0.0).mean((2, 3))
    flat = run(family, np.full((cells, cells), bump.mean()), kappa=0.0).mean((2, 3))
    np.testing.assert_allclose(spread, flat, rtol=1e-6)


def test_steps_out_of_order_are_refused_and_the_same_step_is_not():
    family = medium(3)
    workspace = family.setup(self_comm())
    one, other = family.space.sample(2, seed=811)
    x = family.assemble(one, workspace).b.copy()
    first = family.assemble(one, workspace, 1, x).b.getArray().copy()
    np.testing.assert_array_equal(family.assemble(one, workspace, 1, x).b.getArray(), first)
    for mu, step in ((one, 3), (other, 2)):
        with pytest.raises(ValueError, match=f"step {step} of sample {mu.index} comes after"):
            family.assemble(mu, workspace, step, x)
    x.destroy()
    workspace.destroy()


def test_samples_are_excited_and_stay_bounded():
    family = ReactionDiffusion(cells=32, n_steps=50)
    mu = family.space.sample(1, seed=90007)[0]
    assert 0.5 < mu.fields["u0"].std() < 1
    fields = run(family, mu.fields["u0"], mu.parameters["eps"], mu.parameters["kappa"])
    assert np.abs(fields).max() < 2
    assert fields[-1, 0].std() > 0.05 or np.abs(np.diff(fields[:, 0].mean((1, 2)))).max() > 0.01


def test_a_step_too_long_is_refused():
    with pytest.raises(ConfigError, match=r"unstable above 0\.5"):
        ReactionDiffusion(dt=0.6)
