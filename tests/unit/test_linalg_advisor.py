"""The advisor: candidates by traits, a pilot that decides, a next best that steps in."""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import replace

import numpy as np
import pytest
from linear_systems import convection_system, diffusion, grid_system, refill, smooth_field

from simlab.core.errors import ConfigError
from simlab.core.reports import Reason
from simlab.linalg.advisor import Auto, AutoState, adopt, candidates, chosen
from simlab.linalg.krylov import CGICC, Krylov


def kinds(system):
    return [solver.kind for solver in candidates(system, 1e-8)[0]]


def walk(solver, system, n, shape=None):
    """Solve n systems; new values each time when a grid's shape is given."""
    state, results = solver.init(system), []
    for index in range(n):
        if shape is not None:
            refill(system.A, diffusion(smooth_field(shape, 700 + index)))
        result, state = solver.solve(system, state)
        results.append((result.report, result.x.getArray().copy()))
    return results, state


def test_traits_decide_the_candidates():
    assert kinds(grid_system((24, 24)))[0] == "fast"
    assert {"cg_amg", "cg_icc", "direct"} <= set(kinds(grid_system((24, 24))))
    assert kinds(grid_system((10, 10))) == ["direct"]
    general = kinds(convection_system())
    assert "gmres_ilu" in general
    assert "direct" in general
    assert not {"fast", "cg_icc", "cg_amg"} & set(general)
    assert set(kinds(grid_system((24, 24), constant=True))) == {"direct", "fast"}


def test_the_pilot_decides_logs_and_tells_why(caplog):
    system = grid_system((30, 30))
    with caplog.at_level(logging.INFO, "simlab.linalg.advisor"):
        results, state = walk(Auto(), system, 5, (30, 30))
    assert all(report.converged for report, _ in results)
    assert chosen(state) is state.choice is not None
    assert state.choice.kind in state.reason
    assert "n = 900" in state.reason
    assert state.reason in caplog.text
    assert {row["solver"] for row in state.table} == set(kinds(system))
    costs = {row["solver"]: min(row["cpu_ms"][1:] or [np.inf]) for row in state.table}
    assert costs[state.choice.kind] == min(costs.values())
    state.destroy()


def test_answers_of_the_pilot_are_right_even_when_their_solver_is_dropped():
    system = grid_system((30, 30))
    solver = Auto()
    state = solver.init(system)
    for index in range(4):
        refill(system.A, diffusion(smooth_field((30, 30), 700 + index)))
        result, state = solver.solve(system, state)
        assert system.residual(result.x) <= 1e-8
    state.destroy()


def test_rtol_goes_to_the_candidates():
    found, _ = candidates(grid_system((30, 30)), 3e-5)
    assert {solver.rtol for solver in found} == {3e-5}
    solver = Auto(rtol=1e-4, candidates=("cg_icc", {"kind": "fast", "rtol": 1e-12}))
    results, state = walk(solver, grid_system((30, 30)), 1)
    assert results[0][0].rtol == 1e-4
    state.destroy()


def test_the_users_candidates_are_the_only_ones():
    solver = Auto(candidates=("cg_icc", {"kind": "krylov", "preconditioner": "jacobi"}))
    results, state = walk(solver, grid_system((24, 24)), 4, (24, 24))
    assert {row["solver"] for row in state.table} == {"cg_icc", "cg+jacobi"}
    assert all(report.converged for report, _ in results)
    state.destroy()
    with pytest.raises(ConfigError, match="fast, cg_icc"):
        Auto(candidates=("fast", "cg_icc")).init(convection_system())


class Slow(CGICC):
    """A solver with a known, large cost: spends CPU time before it solves."""

    kind = "slow"

    def solve(self, system, state):
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass
        return super().solve(system, state)


def test_the_quicker_one_wins_whatever_the_order():
    for names in (("cg_icc", "slow"), ("slow", "cg_icc")):
        made = {"cg_icc": CGICC(), "slow": Slow()}
        solver = Auto()
        system = grid_system((24, 24))
        state = AutoState([made[name] for name in names], "test")
        for _ in range(3):
            result, state = solver.solve(system, state)
            assert result.report.converged
        assert state.choice.kind == "cg_icc"
        assert "slower" in next(row for row in state.table if row["solver"] == "slow")["verdict"]
        state.destroy()


def test_a_constant_matrix_off_the_grid_is_factored_once_without_a_pilot():
    base = grid_system((24, 24), constant=True)
    system = replace(base, traits=replace(base.traits, grid=None))
    results, state = walk(Auto(), system, 3)
    assert state.choice.kind == "direct"
    assert "factor once" in state.reason
    assert [report.note for report, _ in results[1:]] == ["factor kept"] * 2
    assert state.table == []
    state.destroy()


def test_a_failing_winner_is_replaced_for_that_system_and_says_so(caplog):
    weak = Krylov(method="cg", preconditioner="none", max_iterations=3)
    strong = CGICC()
    system = grid_system((24, 24))
    solver = Auto()
    state = AutoState([weak, strong], "test")
    state.decide("weak by decree")
    with caplog.at_level(logging.WARNING, "simlab.linalg.advisor"):
        result, state = solver.solve(system, state)
    assert result.report.converged
    assert "iteration limit" in result.report.note
    assert "cg_icc" in result.report.note
    assert "iteration limit" in caplog.text
    for _ in range(3):
        result, state = solver.solve(system, state)
    assert state.choice.kind == "cg_icc"
    assert "replaces" in state.reason
    assert result.report.note == "preconditioner kept"
    state.destroy()


def test_a_candidate_that_fails_in_the_pilot_cannot_win():
    solver = Auto(
        candidates=({"kind": "krylov", "preconditioner": "none", "max_iterations": 2}, "cg_icc")
    )
    results, state = walk(solver, grid_system((24, 24)), 3, (24, 24))
    assert all(report.converged for report, _ in results)
    assert state.choice.kind == "cg_icc"
    state.destroy()


def test_bad_input_is_nobodys_fault():
    system = grid_system((24, 24))
    solver = Auto()
    state = solver.init(system)
    good = system.b.getArray().copy()
    system.b.setArray(np.full_like(good, np.nan))
    result, state = solver.solve(system, state)
    assert result.report.reason is Reason.NON_FINITE
    system.b.setArray(good)
    for _ in range(4):
        result, state = solver.solve(system, state)
        assert result.report.converged
    assert state.choice is not None
    assert all(not row["verdict"] or "slower" in row["verdict"] for row in state.table)
    state.destroy()


def test_a_decision_can_be_shared():
    _, state = walk(Auto(), grid_system((24, 24)), 4, (24, 24))
    choice = pickle.loads(pickle.dumps(chosen(state)))
    state.destroy()
    other = grid_system((24, 24), seed=77)
    shared = adopt(choice, "pilot of group 0")
    result, shared = Auto().solve(other, shared)
    assert result.report.converged
    assert shared.choice == choice
    assert "pilot of group 0" in shared.reason
    shared.destroy()
