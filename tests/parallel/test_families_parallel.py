"""One system on 1, 2 and 3 ranks: the same matrix, right-hand side and fields as on one."""

from pathlib import Path

import numpy as np
import pytest
from pytest_mpi.parallel_assert import parallel_assert

from simlab.core.comm import self_comm, world
from simlab.core.errors import ConfigError
from simlab.linalg import petsc as PETSc
from simlab.problems.family import families

MESHES = Path(__file__).parents[2] / "cases" / "meshes"
TABLES = [
    {"kind": "darcy", "cells": 9, "fields": {"kind": "lognormal", "scale": 5.0}},
    {"kind": "darcy", "cells": 7, "fields": {"kind": "two_phase"}},
    {"kind": "darcy", "cells": 4, "dim": 3},
    {"kind": "heat", "cells": 8, "n_steps": 2},
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
def test_versions_agree_on_all_ranks():
    family = families.build(TABLES[0])
    workspace = family.setup(world())
    one, two = family.space.sample(2, SEED)
    counters = [family.assemble(mu, workspace).version[1] for mu in (one, one, two, one)]
    everywhere = world().allgather(counters)
    parallel_assert(counters[0] == counters[1] < counters[2] < counters[3])
    parallel_assert(all(other == counters for other in everywhere))
    workspace.destroy()


@pytest.mark.parallel([3])
def test_too_few_cells_for_the_ranks_is_a_clear_error():
    family = families.build({"kind": "heat", "cells": 2})
    message = ""
    try:
        family.setup(world())
    except ConfigError as error:
        message = str(error)
    parallel_assert("cannot be cut for 3 ranks" in message, message)
