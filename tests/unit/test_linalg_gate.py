"""The gate of recycling: controls, verdicts, and what the solver makes of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from linear_systems import diffusion, grid_system, refill, smooth_field

from simlab.core.comm import self_comm
from simlab.linalg import gate as gates
from simlab.linalg.blocks import Reducer
from simlab.linalg.gate import Gate
from simlab.linalg.gcrodr import GCRODR
from simlab.linalg.system import LinearSystem, Traits, solvers
from simlab.problems.family import families

SHAPE = (29, 31)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Root:
    """Stands in for the reducer of a group: this rank's word holds."""

    is_root = True

    def from_root(self, make: Callable[[], object]) -> object:
        return make()


def walk(
    n: int, cost: Callable[[int, bool], float], drift: float = np.nan
) -> tuple[Gate, list[int], list[str]]:
    """Book systems 2 .. n; return the gate, the numbers of the controls, and what was said."""
    clock = Clock()
    gate = Gate(Root(), clock)
    controls, said = [], []
    for number in range(2, n + 1):
        was_open, carries = gate.is_open, gate.admits()
        if was_open and not carries:
            controls.append(number)
        clock.now += cost(number, carries)
        said.append(gate.book(captured=0.25, drift=drift))
    return gate, controls, said


def test_carrying_that_costs_more_ends_at_the_20th_system_and_says_why(caplog):
    with caplog.at_level(logging.INFO, "simlab.linalg.gate"):
        gate, controls, said = walk(60, lambda _, carries: 0.030 if carries else 0.020, drift=0.5)
    assert not gate.is_open
    assert controls == list(range(2, 21, 2))
    assert gate.reason in caplog.text
    assert "after 20 systems" in gate.reason
    assert "30 ms each with it, 20 ms without" in gate.reason
    assert "0.25 of the right-hand side" in gate.reason
    assert "sin 0.5" in gate.reason
    assert said[18].endswith(gate.reason)
    assert set(said[19:]) == {""}
    assert not gate.admits()


def test_carrying_that_clearly_pays_goes_on_with_few_controls(caplog):
    gate, controls, said = walk(210, lambda _, carries: 0.010 if carries else 0.020)
    assert gate.is_open
    assert not gate.reason
    assert controls == [2, 4, 6, 8, 10, *range(30, 211, 20)]
    assert [line for line in said if line] == ["control: solved without the carried part"] * 15


def test_a_small_gain_takes_three_windows_to_settle():
    _, controls, _ = walk(120, lambda _, carries: 0.9 if carries else 1.0)
    assert controls == [*range(2, 31, 2), 50, 70, 90, 110]


def test_a_gain_of_less_than_five_percent_does_not_count():
    assert not walk(20, lambda _, carries: 0.96 if carries else 1.0)[0].is_open
    assert walk(400, lambda _, carries: 0.94 if carries else 1.0)[0].is_open


def test_one_bad_window_is_not_enough_and_brings_the_controls_back():
    def cost(number: int, carries: bool) -> float:
        return (3.0 if 10 < number <= 110 else 1.0) if carries else 2.0

    gate, controls, _ = walk(400, cost)
    assert gate.is_open
    gaps = np.diff(controls)
    assert (gaps[: np.argmax(gaps == 20)] == 2).all()  # often, seldom, often again, seldom
    assert [int(gap) for gap, before in zip(gaps[1:], gaps, strict=False) if gap != before] == [
        20,
        2,
        20,
    ]


def test_medians_ignore_a_neighbour_on_the_machine():
    def cost(number: int, carries: bool) -> float:
        return 50.0 if number in (3, 4, 13) else 1.0 if carries else 2.0

    assert walk(60, cost)[0].is_open


def sequence(n: int) -> Iterator[LinearSystem]:
    system = grid_system(SHAPE)
    base, rng = np.log(smooth_field(SHAPE)), np.random.default_rng(6131)
    for index in range(n):
        bumps = 0.2 * np.log(smooth_field(SHAPE, int(rng.integers(1, 10_000))))
        refill(system.A, diffusion(np.exp(base + bumps)))
        yield LinearSystem(system.A, system.b, Traits(spd=True, symmetric=True), index=index)


def with_clock(monkeypatch, seconds_of) -> None:
    """Give new gates a clock that advances by ``seconds_of(carries)`` per system."""
    clock = Clock()
    made, admits, book = Gate.__init__, Gate.admits, Gate.book
    carries = [False]

    def noted(self):
        carries[0] = admits(self)
        return carries[0]

    def booked(self, *args, **kwargs):
        clock.now += seconds_of(carries[0])
        return book(self, *args, **kwargs)

    monkeypatch.setattr(gates.Gate, "__init__", lambda self, reduce: made(self, reduce, clock))
    monkeypatch.setattr(gates.Gate, "admits", noted)
    monkeypatch.setattr(gates.Gate, "book", booked)


@pytest.mark.parametrize("target", ["operator", "preconditioned"])
def test_controls_leave_what_is_carried_alone(monkeypatch, target):
    with_clock(monkeypatch, lambda carries: 1.0 if carries else 2.0)
    solver, state = GCRODR(restart=20, carried=8, target=target), None
    plain = GCRODR(restart=20, carried=8, target=target, update="never")
    fresh = None
    for system in sequence(14):
        if state is None:
            state, fresh = solver.init(system), plain.init(system)
        before = state.carried
        result, state = solver.solve(system, state)
        without, fresh = plain.solve(system, fresh)
        assert result.report.converged
        if "control" in result.report.note:
            assert state.carried is before
            assert result.report.iterations == without.report.iterations
        elif system.index > 2:
            assert result.report.iterations < without.report.iterations
            U, C = state.deflated_pair()
            assert np.abs(C.T @ C - np.eye(8)).max() < 1e-12
            assert U.shape == C.shape
    state.destroy()
    fresh.destroy()


def test_when_carrying_ends_the_solver_goes_on_without_and_the_note_says_why(monkeypatch):
    with_clock(monkeypatch, lambda carries: 2.0 if carries else 1.0)
    solver, state = GCRODR(restart=20, carried=8), None
    plain = GCRODR(restart=20, carried=8, update="never")
    fresh, notes = None, []
    for system in sequence(24):
        if state is None:
            state, fresh = solver.init(system), plain.init(system)
        result, state = solver.solve(system, state)
        without, fresh = plain.solve(system, fresh)
        assert result.report.converged
        notes.append(result.report.note)
    assert len(state.events) == 1
    assert notes[19].endswith(state.events[0])
    assert re.search(r"turned by sin 0?\.?\d", state.events[0])
    held = re.search(r"held (0\.\d+) of", state.events[0])
    assert held
    assert 0.0 < float(held[1]) < 1.0
    assert notes[20:] == [""] * 4
    assert state.carried.shape[1] == 0
    assert result.report.iterations == without.report.iterations
    state.destroy()
    fresh.destroy()


def test_without_the_gate_nothing_is_left_out(monkeypatch):
    with_clock(monkeypatch, lambda carries: 2.0 if carries else 1.0)
    for solver in (
        GCRODR(restart=20, carried=8, gate=False),
        GCRODR(restart=20, carried=8, update="never"),
    ):
        state = None
        for system in sequence(8):
            state = state or solver.init(system)
            assert solver.solve(system, state)[0].report.note == ""
        state.destroy()


def test_the_gate_counts_on_every_rank_alike():
    """Two ranks whose clocks disagree follow the root's."""
    root, other = Clock(), Clock()

    class Follower(Root):
        is_root = False

        def from_root(self, make):
            make()
            return verdicts.pop(0)

    verdicts: list[object] = []

    class Leader(Root):
        def from_root(self, make):
            verdicts.append(make())
            return verdicts[-1]

    first, second = Gate(Leader(), root), Gate(Follower(), other)
    for _ in range(30):
        for gate, clock, slow in ((first, root, True), (second, other, False)):
            carries = gate.admits()
            clock.now += 2.0 if carries == slow else 1.0
            gate.book(0.5)
        assert first.is_open == second.is_open
    assert not second.is_open
    assert first.reason == second.reason


def test_one_rank_needs_no_communication():
    system = grid_system(SHAPE)
    gate = Gate(Reducer(system.A.comm))
    for _ in range(6):
        gate.admits()
        gate.book()
    assert gate.is_open


REAL = {
    "released": ({"kind": "released_darcy", "side": 100}, "none", False),
    "transport": ({"kind": "convection_diffusion", "cells": 24}, "ilu", False),
    "path": (
        {"kind": "darcy", "cells": 100, "fields": {"kind": "path", "scale": 3.0, "epsilon": 0.05}},
        "ilu",
        True,
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param("released", marks=pytest.mark.slow), "transport", "path"]
)
def test_real_sequences(name):
    table, preconditioner, pays = REAL[name]
    family = families.build(table)
    workspace = family.setup(self_comm())
    solver = solvers.build({"kind": "gcrodr", "preconditioner": preconditioner})
    state = None
    for mu in family.space.sample(40, 71093):
        system = family.assemble(mu, workspace)
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert result.report.converged
        if state.events:
            break
    assert bool(state.events) is not pays
    assert pays or "ms each with it" in state.events[0]
    state.destroy()
    workspace.destroy()
