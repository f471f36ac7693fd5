"""Darcy without a matrix: the same operator, solved by what needs no entries."""

import numpy as np
import pytest

from simlab.core.comm import self_comm
from simlab.core.errors import ConfigError
from simlab.linalg.system import solvers
from simlab.problems.darcy import Darcy

SEED = 1499


@pytest.fixture(params=[2, 3])
def pair(request):
    """The family without and with a matrix, their workspaces."""
    cells = 13 if request.param == 2 else 6
    both = [Darcy(cells=cells, dim=request.param, matrix_free=free) for free in (True, False)]
    workspaces = [family.setup(self_comm()) for family in both]
    yield list(zip(both, workspaces, strict=True))
    for workspace in workspaces:
        workspace.destroy()


def test_product_and_diagonal_are_those_of_the_matrix(pair):
    for mu in pair[0][0].space.sample(2, SEED):
        shell, matrix = (family.assemble(mu, workspace) for family, workspace in pair)
        x, y = shell.b.duplicate(), shell.b.duplicate()
        x.setArray(np.random.default_rng(SEED).standard_normal(x.getSize()))
        z = y.duplicate()
        shell.A.mult(x, y)
        matrix.A.mult(x, z)
        size = np.abs(z.getArray()).max()
        np.testing.assert_allclose(y.getArray(), z.getArray(), atol=1e-14 * size)
        np.testing.assert_array_equal(
            shell.A.getDiagonal().getArray(), matrix.A.getDiagonal().getArray()
        )
        np.testing.assert_array_equal(shell.b.getArray(), matrix.b.getArray())
        for item in (x, y, z):
            item.destroy()


def test_version_moves_with_the_values_only(pair):
    family, workspace = pair[0]
    one, two = family.space.sample(2, SEED)
    system = family.assemble(one, workspace)
    first = system.version
    y = system.b.duplicate()
    system.A.mult(system.b, y)
    system.A.getDiagonal().destroy()
    assert family.assemble(one, workspace).version == first
    second = family.assemble(two, workspace).version
    assert second != first
    assert family.assemble(one, workspace).version not in (first, second)
    y.destroy()


@pytest.mark.parametrize(
    "table",
    [
        "auto",
        "fast",
        {"kind": "krylov", "preconditioner": "jacobi"},
        {"kind": "krylov", "preconditioner": "none"},
        {"kind": "krylov", "method": "minres", "preconditioner": "none"},
    ],
    ids=str,
)
def test_solvers_that_need_no_entries_give_the_answer_of_the_matrix(pair, table):
    solver, direct = solvers.build(table), solvers.build("direct")
    states = [None, None]
    for mu in pair[0][0].space.sample(4, SEED):
        answers = []
        for k, (family, workspace) in enumerate(pair):
            system = family.assemble(mu, workspace)
            chosen = (solver, direct)[k]
            assert chosen.suits(system)
            states[k] = states[k] or chosen.init(system)
            result, states[k] = chosen.solve(system, states[k])
            assert result.report.converged
            assert system.residual(result.x) <= solver.rtol
            answers.append(result.x.getArray().copy())
        np.testing.assert_allclose(answers[0], answers[1], rtol=1e-5)
    for state in states:
        state.destroy()


@pytest.mark.parametrize(
    "table",
    [
        "direct",
        "cg_icc",
        "cg_amg",
        "cg_gamg",
        "gmres_ilu",
        {"kind": "krylov", "method": "gmres", "preconditioner": "asm"},
    ],
    ids=str,
)
def test_solvers_that_need_entries_say_so(pair, table):
    family, workspace = pair[0]
    solver = solvers.build(table)
    shell = family.assemble(family.space.sample(1, SEED)[0], workspace)
    assert not solver.suits(shell)
    with pytest.raises(ConfigError, match="matrix-free"):
        solver.init(shell)
    matrix = pair[1][0].assemble(shell.mu, pair[1][1])
    assert solver.suits(matrix)


def test_auto_names_only_candidates_that_can_work(pair):
    from simlab.linalg.advisor import candidates

    family, workspace = pair[0]
    system = family.assemble(family.space.sample(1, SEED)[0], workspace)
    found, about = candidates(system, 1e-8)
    assert "matrix-free" in about
    assert [item.kind for item in found] == ["fast", "krylov", "deflated_cg"]
    assert all(item.suits(system) for item in found)
