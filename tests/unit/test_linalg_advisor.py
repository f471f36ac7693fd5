"""The advisor: candidates by traits, a pilot that decides, a next best that steps in."""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import replace

import numpy as np
import pytest
from linear_systems import (
    convection_system,
    diffusion,
    grid_system,
    petsc_matrix,
    petsc_vector,
    refill,
    smooth_field,
)

from simlab.core.comm import self_comm
from simlab.core.errors import ConfigError
from simlab.core.reports import Reason
from simlab.linalg import advisor
from simlab.linalg import petsc as PETSc
from simlab.linalg.advisor import Auto, AutoState, adopt, candidates, chosen
from simlab.linalg.deflated_cg import DeflatedCG
from simlab.linalg.gcrodr import GCRODR
from simlab.linalg.krylov import CGICC, Krylov
from simlab.linalg.system import LinearSystem, Traits
from simlab.problems.family import families


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
    assert {"cg_amg", "cg_icc", "direct", "kept"} <= set(kinds(grid_system((24, 24))))
    assert kinds(grid_system((10, 10))) == ["direct"]
    general = kinds(convection_system())
    assert {"gmres_ilu", "direct", "kept", "gcrodr"} <= set(general)
    assert not {"fast", "cg_icc", "cg_amg"} & set(general)
    assert set(kinds(grid_system((24, 24), constant=True))) == {"direct", "fast"}


def without_grid(system, **traits):
    return replace(system, traits=replace(system.traits, grid=None, **traits))


def test_recycled_solvers_compete_where_nothing_is_far_quicker():
    assert "deflated_cg" not in kinds(grid_system((24, 24)))
    assert "deflated_cg" in kinds(without_grid(grid_system((24, 24))))
    assert "gcrodr" in kinds(convection_system())


def test_a_static_space_competes_when_systems_are_known_to_be_many():
    def static(system, n_systems):
        found = candidates(system, 1e-8, n_systems)[0]
        return [item.kind for item in found if getattr(item, "static", 0)]

    for system, kind in (
        (without_grid(grid_system((24, 24))), "deflated_cg"),
        (convection_system(), "gcrodr"),
    ):
        assert static(system, 0) == static(system, 20) == []
        assert static(system, 5_000) == [kind]


@pytest.mark.parametrize("shape", [(2,), (1, 5), (9, 11), (24, 25)])
def test_nothing_is_factored_where_a_null_space_is_attached(shape):
    A = petsc_matrix(diffusion(smooth_field(shape), "neumann"))
    A.setNullSpace(PETSc.NullSpace().create(constant=True, comm=self_comm()))
    values = np.random.default_rng(317).standard_normal(A.getSize()[0])
    system = LinearSystem(
        A, petsc_vector(A, values - values.mean()), Traits(spd=True, symmetric=True)
    )
    assert "direct" not in kinds(system)
    results, state = walk(Auto(), system, 2)
    assert all(report.converged for report, _ in results)
    state.destroy()


def test_no_entries_leave_what_multiplies():
    system = grid_system((24, 24))
    free = replace(system, traits=replace(system.traits, matrix_free=True))
    assert kinds(free) == ["fast", "krylov", "deflated_cg"]
    assert kinds(without_grid(free)) == ["krylov", "deflated_cg"]
    general = convection_system()
    general = replace(general, traits=replace(general.traits, matrix_free=True))
    found = candidates(general, 1e-8, 5_000)[0]
    assert {item.kind for item in found} == {"krylov", "gcrodr"}
    assert {item.preconditioner for item in found} == {"jacobi"}
    for item in (*found, *candidates(free, 1e-8, 5_000)[0]):
        assert item.suits(general if item in found else free)


def test_a_family_without_entries_is_solved():
    family = families.build({"kind": "darcy", "cells": 24, "matrix_free": True})
    workspace = family.setup(self_comm())
    solver, state = Auto(), None
    for mu in family.space.sample(7, 71093):
        system = family.assemble(mu, workspace)
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert result.report.converged
    assert state.choice is not None
    assert len(state.table) == 3
    assert all("slower" in row["verdict"] for row in state.table if row["verdict"])
    state.destroy()
    workspace.destroy()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"pc_type": "asm"}, {"cg+hypre", "deflated_cg+hypre", "gcrodr+hypre"}),
        ({"pc_type": "asm", "ksp_type": "cg"}, set()),
    ],
)
def test_a_preconditioner_on_the_command_line_meets_recycling(words, expected):
    options = PETSc.Options()
    for name, value in words.items():
        options[name] = value
    try:
        system = grid_system((24, 24))
        solver, state = Auto(), None
        for index in range(7):
            refill(system.A, diffusion(smooth_field((24, 24), 700 + index)))
            state = state or solver.init(system)
            result, state = solver.solve(system, state)
            assert result.report.converged
            assert "asm" in result.report.solver
        assert {row["solver"] for row in state.table} == expected
        assert "on the command line" in state.reason
        state.destroy()
    finally:
        for name in words:
            options.delValue(name)


def test_the_pilot_decides_logs_and_tells_why(caplog):
    system = grid_system((30, 30))
    with caplog.at_level(logging.INFO, "simlab.linalg.advisor"):
        results, state = walk(Auto(), system, 7, (30, 30))
    assert all(report.converged for report, _ in results)
    assert chosen(state) is state.choice is not None
    assert state.choice.kind in state.reason
    assert "n = 900" in state.reason
    assert state.reason in caplog.text
    assert {row["solver"] for row in state.table} == set(kinds(system))
    rounds = max(len(row["cpu_ms"]) for row in state.table)
    to_the_end = {
        row["solver"]: sorted(row["cpu_ms"][1:])[(rounds - 2) // 2]
        for row in state.table
        if len(row["cpu_ms"]) == rounds and not row["verdict"]
    }
    assert to_the_end[state.choice.kind] == min(to_the_end.values())
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
    results, state = walk(solver, grid_system((24, 24)), 7, (24, 24))
    assert {row["solver"] for row in state.table} == {"cg_icc", "cg+jacobi"}
    assert all(report.converged for report, _ in results)
    state.destroy()
    with pytest.raises(ConfigError, match="fast, cg_icc"):
        Auto(candidates=("fast", "cg_icc")).init(convection_system())


class Slow(CGICC):
    """A solver with a known, large cost: spends CPU time before it solves."""

    kind = "slow"

    def solve(self, system, state):
        spend(0.03)
        return super().solve(system, state)


class Learner:
    """Solves like CG+ICC, and spends CPU time as a script says: system by system, or at first."""

    kind = "learner"
    rtol = 1e-8

    def __init__(self, cost, wants_order=False, once=0.0):
        self.cost, self.wants_order, self.once = cost, wants_order, once
        self._inner, self._n = CGICC(), 0

    def suits(self, system):
        return True

    def init(self, system):
        spend(self.once)
        return self._inner.init(system)

    def solve(self, system, state):
        spend(self.cost(self._n))
        self._n += 1
        return self._inner.solve(system, state)


def spend(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def compete(monkeypatch, n_systems=0, **field):
    """Let learners compete; return title -> verdict and the winner."""
    names = {id(solver): name for name, solver in field.items()}
    monkeypatch.setattr(advisor, "_title", lambda solver: names[id(solver)])
    monkeypatch.setattr(advisor, "as_table", lambda solver: {})
    system, solver = grid_system((24, 24)), Auto()
    state = AutoState(list(field.values()), "test", n_systems)
    for index in range(6):
        refill(system.A, diffusion(smooth_field((24, 24), 700 + index)))
        _, state = solver.solve(system, state)
    table, winner = state.table, names[id(state.choice)]
    state.destroy()
    return {row["solver"]: row["verdict"] for row in table}, winner


def test_one_that_carries_is_given_time_to_learn(monkeypatch):
    def learns(n):
        return 0.03 if n < 2 else 0.004

    def steady(n):
        return 0.008

    verdicts, winner = compete(
        monkeypatch, steady=Learner(steady), carrier=Learner(learns, wants_order=True)
    )
    assert winner == "carrier"
    verdicts, winner = compete(monkeypatch, steady=Learner(steady), other=Learner(learns))
    assert winner == "steady"
    assert "slower after round 2" in verdicts["other"]


def test_what_is_paid_once_is_shared_by_the_systems_to_come(monkeypatch):
    def field():
        return {
            "steady": Learner(lambda n: 0.010),
            "static": Learner(lambda n: 0.007, once=0.12),
        }

    assert compete(monkeypatch, n_systems=10, **field())[1] == "steady"
    assert compete(monkeypatch, n_systems=1_000, **field())[1] == "static"


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
    for _ in range(7):
        result, state = solver.solve(system, state)
        assert result.report.converged
    assert state.choice is not None
    assert all(not row["verdict"] or "slower" in row["verdict"] for row in state.table)
    state.destroy()


def test_a_decision_can_be_shared():
    _, state = walk(Auto(), grid_system((24, 24)), 7, (24, 24))
    choice = pickle.loads(pickle.dumps(chosen(state)))
    state.destroy()
    other = grid_system((24, 24), seed=77)
    shared = adopt(choice, "pilot of group 0")
    result, shared = Auto().solve(other, shared)
    assert result.report.converged
    assert shared.choice == choice
    assert "pilot of group 0" in shared.reason
    shared.destroy()


def test_a_decision_for_a_static_space_is_adopted_with_it():
    system = without_grid(grid_system((24, 24)))
    choice = DeflatedCG(static=6, carried=0)
    seed = choice.seed(system)
    made = []

    class Counting(DeflatedCG):
        def seed(self, system):
            made.append(system)
            return super().seed(system)

    shared = adopt(Counting(static=6, carried=0), "pilot of group 0", (CGICC(),), seed)
    result, shared = Auto().solve(system, shared)
    assert result.report.converged
    assert not made
    assert chosen(shared).static == 6
    assert shared.events == []
    shared.destroy()


def test_what_the_choice_says_of_its_space_is_passed_on():
    system = convection_system()
    state = AutoState([GCRODR(restart=20, carried=8)], "test")
    _, state = Auto().solve(system, state)
    state._field[0].state.events.append("carrying ends")
    assert state.events == ["carrying ends"]
    state.destroy()


@pytest.mark.parametrize("n", [3_000, pytest.param(71_000, marks=pytest.mark.slow)])
def test_quadratic_triangles_with_one_matrix_are_factored_once(n):
    family = families.build(
        {
            "kind": "poisson",
            "mesh": {"kind": "square", "size": (4.63 / n) ** 0.5},
            "degree": 2,
            "source": [0.0, 1.0],
            "dirichlet": {"left": [-1.0, 1.0], "right": 0.0},
        }
    )
    workspace = family.setup(self_comm())
    solver, state, notes = Auto(), None, []
    for mu in family.space.sample(4, 71093):
        system = family.assemble(mu, workspace)
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert result.report.converged
        notes.append(result.report.note)
    assert notes == ["", *["factor kept"] * 3]
    assert "factor once" in state.reason
    assert abs(system.A.getSize()[0] / n - 1.0) < 0.1
    state.destroy()
    workspace.destroy()
