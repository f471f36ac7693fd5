"""A factor kept for later matrices: the rule on known costs, the solver on sequences."""

from __future__ import annotations

import numpy as np
import pytest
from linear_systems import convection, convection_system, diffusion, grid_system, refill
from linear_systems import smooth_field as smooth

from simlab.core.comm import self_comm
from simlab.core.errors import ConfigError
from simlab.core.reports import Reason
from simlab.linalg import petsc as PETSc
from simlab.linalg.direct import Direct
from simlab.linalg.kept import Kept, Lifetime
from simlab.linalg.system import LinearSystem, Traits
from simlab.problems.family import families

SHAPE = (31, 33)


def live(set_up: float, fresh: float, cost, n: int) -> tuple[list[int], float]:
    """Follow the rule over n systems; return which had a set-up, and the mean cost."""
    rule, made, total, since = Lifetime(), [], 0.0, 0
    for index in range(n):
        if index == 0 or rule.is_over:
            rule.begin(set_up)
            made.append(index)
            total, since = total + set_up, 0
        seconds = fresh if since == 0 else cost(since)
        rule.book(seconds, max(int(10 * seconds), 1))
        total, since = total + seconds, since + 1
    return made, total / n


def test_a_factor_as_good_for_all_matrices_is_kept_for_good():
    made, mean = live(10.0, 1.0, lambda age: 2.0, 200)
    assert made == [0]
    assert mean < 2.1


def test_one_that_ages_is_renewed_near_the_best_interval():
    made, mean = live(20.0, 1.0, lambda age: 1.0 + age, 400)
    means = {n: (20.0 + 1.0 + sum(1.0 + age for age in range(1, n))) / n for n in range(1, 20)}
    best = min(means, key=means.__getitem__)
    assert np.abs(np.diff(made) - best).max() <= 5
    assert mean <= 1.12 * means[best]


def test_where_a_new_factor_is_cheaper_it_comes_to_that_with_a_trial_now_and_then():
    made, mean = live(3.0, 0.5, lambda age: 5.0, 300)
    assert 0.8 < len(made) / 300 < 1.0
    assert mean < 1.1 * 3.5


def test_spread_between_systems_does_not_end_a_life():
    rng = np.random.default_rng(8317)
    made, mean = live(25.0, 2.0, lambda _: rng.normal(20.0, 4.0), 300)
    assert len(made) <= 12
    assert mean < 22.0


def test_renew_off_means_for_good():
    rule = Lifetime(may_end=False)
    rule.begin(1.0)
    for _ in range(9):
        rule.book(100.0, 5)
    assert not rule.is_over
    assert rule.limit == np.inf


def sequence(n: int, drift: float = 0.3):
    """Systems that resemble each other: one matrix object, new values each."""
    system, rng = grid_system(SHAPE), np.random.default_rng(4421)
    base = np.log(smooth(SHAPE))
    for index in range(n):
        bumps = drift * np.log(smooth(SHAPE, int(rng.integers(1, 10_000))))
        refill(system.A, diffusion(np.exp(base + bumps)))
        yield LinearSystem(system.A, system.b, Traits(spd=True, symmetric=True), index=index)


def walk(solver, systems):
    state, reports = None, []
    for system in systems:
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert system.residual(result.x) <= solver.rtol
        reports.append(result.report)
    return reports, state


@pytest.mark.parametrize("preconditioner", ["factor", "gamg", "icc"])
def test_the_first_factor_serves_all(preconditioner):
    reports, state = walk(Kept(renew=False, preconditioner=preconditioner), sequence(6))
    assert state.n_setups == 1
    assert all("earlier matrix" in report.note for report in reports[1:])
    assert "kept" in reports[0].solver
    if preconditioner == "factor":
        assert reports[0].iterations <= 2
        assert all(5 < report.iterations < 40 for report in reports[1:])
    state.destroy()


def test_a_nonsymmetric_sequence_goes_through_gmres():
    system = convection_system()
    solver, state = Kept(renew=False), None
    for seed in (5171, 5172, 5173):
        refill(system.A, convection(21, seed))
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert result.report.converged
        assert result.report.solver.startswith("gmres+kept lu")
        assert system.residual(result.x) <= 1e-8
    assert state.n_setups == 1
    assert result.report.iterations > 2
    state.destroy()


def test_a_jump_of_the_matrix_has_the_factor_made_anew_within_the_solve():
    systems = sequence(4)
    solver = Kept()
    state = None
    for _ in range(3):
        system = next(systems)
        state = state or solver.init(system)
        solver.solve(system, state)
    state._lifetime = Lifetime()  # known costs: a set-up is worth 20 iterations
    state._lifetime.begin(20.0)
    state._lifetime.book(1.0, 1)
    state._lifetime.book(5.0, 5)
    n_setups = state.n_setups
    jump = np.where(np.random.default_rng(97).random(SHAPE) < 0.5, 1e-4, 1.0)
    refill(system.A, diffusion(jump))
    result, state = solver.solve(system, state)
    assert result.report.converged
    assert state.n_setups == n_setups + 1
    assert "gave up the factor" in result.report.note
    assert system.residual(result.x) <= 1e-8
    state.destroy()


def test_a_factor_that_cannot_be_made_is_said():
    system = grid_system(SHAPE)
    solver = Kept()
    state = solver.init(system)
    solver.solve(system, state)
    system.A.scale(0.0)
    result, state = solver.solve(system, state)
    assert not result.report.converged
    assert result.report.reason in (Reason.SINGULAR, Reason.SETUP_FAILED, Reason.BREAKDOWN)
    refill(system.A, diffusion(smooth(SHAPE)))
    result, state = solver.solve(system, state)
    assert result.report.converged
    state.destroy()


def test_what_has_no_entries_is_refused():
    family = families.build({"kind": "darcy", "cells": 12, "matrix_free": True})
    workspace = family.setup(self_comm())
    system = family.assemble(family.space.sample(1, 71093)[0], workspace)
    assert not Kept().suits(system)
    with pytest.raises(ConfigError, match="matrix-free"):
        Kept().init(system)
    workspace.destroy()


def events(name: str) -> int:
    return int(PETSc.Log.Event(name).getPerfInfo()["count"])


@pytest.mark.parametrize(("kind", "package"), [("CholFctr", "cholmod"), ("LUFactor", "umfpack")])
def test_the_symbolic_factorisation_is_done_once_for_one_pattern(kind, package):
    if not PETSc.Log.isActive():
        PETSc.Log.begin()
    stage = PETSc.Log.Stage(f"count {kind}")  # a PETSc error elsewhere spoils its stage's counts
    stage.push()
    table = {"kind": "darcy", "cells": 24}
    if kind == "LUFactor":
        table = {"kind": "convection_diffusion", "cells": 24, "dim": 2}
    family = families.build(table)
    workspace = family.setup(self_comm())
    solver, state = Direct(package=package), None
    names = [f"Mat{kind}{step}" for step in ("Sym", "Num")]
    before = [events(name) for name in names]
    for mu in family.space.sample(5, 71093):
        system = family.assemble(mu, workspace)
        state = state or solver.init(system)
        assert solver.solve(system, state)[0].report.converged
    after = [events(name) for name in names]
    stage.pop()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 5]
    state.destroy()
    workspace.destroy()
