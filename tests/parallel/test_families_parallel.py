"""One system on 1, 2 and 3 ranks: the same matrix, right-hand side and fields as on one."""

from pathlib import Path

import numpy as np
import pytest
from pytest_mpi.parallel_assert import parallel_assert

from simlab.core.comm import self_comm, world
from simlab.core.errors import ConfigError
from simlab.linalg import petsc as PETSc
from simlab.problems.family import families
from simlab.problems.grid import CellWorkspace

MESHES = Path(__file__).parents[2] / "cases" / "meshes"
TABLES = [
    {"kind": "darcy", "cells": 9, "fields": {"kind": "lognormal", "scale": 5.0}},
    {"kind": "darcy", "cells": 7, "fields": {"kind": "two_phase"}},
    {"kind": "darcy", "cells": 4, "dim": 3},
    {"kind": "darcy", "cells": 9, "fields": {"kind": "path"}, "matrix_free": True},
    {"kind": "darcy", "cells": 4, "dim": 3, "matrix_free": True},
    {"kind": "convection_diffusion", "cells": 5, "dim": 2},
    {"kind": "convection_diffusion", "cells": 4},
    {"kind": "helmholtz", "cells": 5},
    {"kind": "released_darcy", "side": 5},
    {"kind": "heat", "cells": 8, "n_steps": 2},
    {"kind": "reaction_diffusion", "cells": 7, "n_steps": 3},
    {
        "kind": "poisson",
        "mesh": str(MESHES / "bracket_coarse.msh"),
        "dirichlet": {"bore": [60.0, 90.0]},
        "source": [0.0, 10.0],
        "grid": [9, 7],
    },
]
SEED = 40289


def probes(family, mu, comm):
    """Return natural-order fields of b, A b, A A b and the solution of every step, on the root."""
    workspace = family.setup(comm)
    found, previous = [], None
    for step in range(family.steps):
        system = family.assemble(mu, workspace, step, previous)
        vector = system.b.copy()
        for _ in range(3):
            found.append(family.observe(mu, vector, workspace))
            product = vector.duplicate()
            system.A.mult(vector, product)
            vector.destroy()
            vector = product
        ksp = PETSc.KSP().create(comm)
        ksp.setType("cg" if system.traits.spd else "gmres")
        ksp.getPC().setType("jacobi")
        ksp.setTolerances(rtol=1e-13)
        ksp.setOperators(system.A)
        ksp.solve(system.b, vector)
        found.append(family.observe(mu, vector, workspace))
        if previous is not None:
            previous.destroy()
        previous = vector
        ksp.destroy()
    previous.destroy()
    workspace.destroy()
    return found


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t['kind']}-{TABLES.index(t)}")
def test_any_number_of_ranks_gives_the_serial_answer(table):
    family = families.build(table)
    comm = world()
    for mu in family.space.sample(2, SEED):
        shared = probes(family, mu, comm)
        alone = probes(family, mu, self_comm())
        if comm.rank:
            parallel_assert(all(fields == {} for fields in shared))
            continue
        close = all(
            np.allclose(one[name], other[name], rtol=1e-10, atol=1e-12 * np.abs(one[name]).max())
            for one, other in zip(alone, shared, strict=True)
            for name in one
        )
        parallel_assert(close and len(alone) == len(shared) > 0)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("table", [TABLES[0], TABLES[3], TABLES[5]], ids=lambda t: t["kind"])
def test_versions_agree_on_all_ranks(table):
    family = families.build(table)
    workspace = family.setup(world())
    one, two = family.space.sample(2, SEED)
    counters = [family.assemble(mu, workspace).version[1] for mu in (one, one, two, one)]
    everywhere = world().allgather(counters)
    parallel_assert(counters[0] == counters[1] < counters[2] < counters[3])
    parallel_assert(all(other == counters for other in everywhere))
    workspace.destroy()


@pytest.mark.parallel([1, 2, 3])
def test_a_shell_is_its_matrix_transposed_and_on_the_diagonal_too():
    comm = world()
    shape = (5, 6, 7)
    rng = np.random.default_rng(SEED)
    a = np.exp(rng.standard_normal(shape))
    velocity = [rng.standard_normal([n + (i == j) for i, n in enumerate(shape)]) for j in range(3)]
    found = []
    for matrix_free in (False, True):
        workspace = CellWorkspace(comm, shape, transport=True, matrix_free=matrix_free)
        workspace.assemble(a, 2.0, velocity)
        workspace.load(np.cos(np.arange(210.0)).reshape(shape))
        y = workspace.b.duplicate()
        workspace.A.mult(workspace.b, y)
        fields = [workspace.gather(y)]
        workspace.A.multTranspose(workspace.b, y)
        fields.append(workspace.gather(y))
        workspace.A.getDiagonal(y)
        found.append([*fields, workspace.gather(y)])
        y.destroy()
        workspace.destroy()
    if comm.rank:
        parallel_assert(found[0] == found[1] == [None] * 3)
        return
    close = [np.allclose(p, q, rtol=0, atol=1e-15) for p, q in zip(*found, strict=True)]
    parallel_assert(all(close) and not np.allclose(found[0][0], found[0][1], rtol=1e-3), str(close))


@pytest.mark.parallel([3])
def test_too_few_cells_for_the_ranks_is_a_clear_error():
    family = families.build({"kind": "heat", "cells": 2})
    message = ""
    try:
        family.setup(world())
    except ConfigError as error:
        message = str(error)
    parallel_assert("cannot be cut for 3 ranks" in message, message)
