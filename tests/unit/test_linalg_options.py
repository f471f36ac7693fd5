"""PETSc options from tables: names, precedence, and nothing left behind."""

from __future__ import annotations

import numpy as np
import pytest
from linear_systems import grid_system, option_names

from simlab.core.errors import ConfigError
from simlab.linalg import petsc as PETSc
from simlab.linalg.krylov import Krylov
from simlab.linalg.options import flatten, inserted, merged, user_gave


@pytest.fixture
def command_line():
    """Put words into PETSc's database as a user's command line would."""
    database = PETSc.Options()
    given = []

    def give(**words):
        for name, value in words.items():
            database.setValue(name, value)
            given.append(name)

    yield give
    for name in given:
        database.delValue(name)


def test_nested_tables_become_flat_names():
    nested = {"pc": {"hypre_boomeramg": {"max_iter": 2, "grid": [1, 2]}}, "-ksp_view": None}
    assert flatten(nested, "flow_") == {
        "flow_pc_hypre_boomeramg_max_iter": "2",
        "flow_pc_hypre_boomeramg_grid": "1,2",
        "flow_ksp_view": None,
    }
    assert flatten({"a": True, "b": False, "c": 1e-9}) == {"a": "true", "b": "false", "c": "1e-09"}


def test_later_tables_win():
    assert merged({"pc_type": "icc"}, {"pc": {"type": "jacobi"}}) == {"pc_type": "jacobi"}


def test_values_petsc_cannot_read_are_refused():
    with pytest.raises(ConfigError, match="pc_shape"):
        flatten({"pc_shape": np.zeros(3)})


def test_options_are_there_inside_and_gone_outside_even_after_an_error():
    before = option_names()
    seen = []

    def fail():
        with inserted({"ksp_rtol": "1e-3", "ksp_view": None}, "mine_"):
            seen.extend(user_gave("ksp_rtol", "ksp_view", prefix="mine_"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == ["ksp_rtol", "ksp_view"]
    assert option_names() == before


def test_the_command_line_wins_and_survives(command_line):
    command_line(mine_ksp_type="bcgs")
    with inserted({"ksp_type": "cg", "pc_type": "icc"}, "mine_"):
        assert PETSc.Options().getString("mine_ksp_type") == "bcgs"
        assert PETSc.Options().getString("mine_pc_type") == "icc"
    assert PETSc.Options().getString("mine_ksp_type") == "bcgs"
    assert not user_gave("pc_type", prefix="mine_")


def test_ksp_type_on_the_command_line_reaches_the_main_solver(command_line):
    command_line(ksp_type="gmres", pc_type="jacobi")
    system = grid_system()
    solver = Krylov(method="cg", preconditioner="icc")
    state = solver.init(system)
    result, state = solver.solve(system, state)
    assert result.report.solver == "gmres+jacobi"
    assert result.report.converged
    state.destroy()


def test_a_prefix_keeps_other_solvers_apart(command_line):
    command_line(ksp_type="gmres", flow_pc_type="jacobi")
    system = grid_system()
    solver = Krylov(method="cg", preconditioner="icc", prefix="flow_")
    state = solver.init(system)
    result, state = solver.solve(system, state)
    assert result.report.solver == "cg+jacobi"
    state.destroy()


def test_the_advisor_obeys_the_command_line(command_line):
    from simlab.linalg.advisor import Auto

    command_line(pc_type="sor", ksp_max_it="2000")
    system = grid_system((24, 24))
    solver = Auto()
    state = solver.init(system)
    for _ in range(solver.pilot):
        result, state = solver.solve(system, state)
        assert result.report.solver.endswith("+sor")
    assert "-pc_type" in state.reason
    state.destroy()
