"""Recycled solvers over sequences of every family: true residuals, agreement with an LU factor."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from simlab.core.comm import self_comm
from simlab.linalg.system import LinearSolver, solvers
from simlab.problems.family import families

FAMILIES: dict[str, dict[str, Any]] = {
    "C1": {"kind": "darcy", "cells": 20},
    "C2": {"kind": "darcy", "cells": 20, "fields": {"kind": "two_phase"}},
    "C3": {"kind": "darcy", "cells": 20, "fields": {"kind": "four_parameter"}},
    "C4": {"kind": "darcy", "cells": 20, "fields": {"kind": "lognormal", "scale": 5.0}},
    "C5": {"kind": "convection_diffusion", "cells": 8},
    "C6": {"kind": "helmholtz", "cells": 24, "fields": {"kind": "wavenumber", "mean": 20.0}},
    "C7": {"kind": "darcy", "cells": 20, "fields": {"kind": "path"}},
    "C9": {"kind": "darcy", "cells": 20, "matrix_free": True},
}
RECYCLED: dict[str, dict[str, Any]] = {
    "static and carried": {"kind": "gcrodr", "restart": 30, "static": 6, "carried": 6},
    "carried": {"kind": "gcrodr", "restart": 30, "carried": 10},
    "deflated CG": {"kind": "deflated_cg", "carried": 8},
    "default": {"kind": "recycle"},
}


def build(name: str, rtol: float, family_name: str) -> LinearSolver:
    table = RECYCLED[name] | {"rtol": rtol}
    if family_name == "C9":
        table |= {"preconditioner": "jacobi"}
    if family_name in ("C6", "C9"):  # no factor; near resonances another sample's modes do harm
        table.pop("static", None)
    return solvers.build(table)


@lru_cache
def condition(name: str) -> float:
    """The worst condition number of the family's systems below."""
    family = families.build(FAMILIES[name])
    workspace = family.setup(self_comm())
    worst = 0.0
    for mu in family.space.sample(4, 6011):
        rows, columns, values = family.assemble(mu, workspace).A.getValuesCSR()
        worst = max(worst, float(np.linalg.cond(sp.csr_matrix((values, columns, rows)).toarray())))
    workspace.destroy()
    return worst


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9, 1e-11])
@pytest.mark.parametrize("name", RECYCLED)
@pytest.mark.parametrize("family_name", FAMILIES)
def test_true_residuals_meet_the_tolerance_and_solutions_agree_with_lu(family_name, name, rtol):
    family = families.build(FAMILIES[family_name])
    is_matrix_free = family_name == "C9"
    solver = build(name, rtol, family_name)
    reference_family = families.build(FAMILIES["C1"]) if is_matrix_free else family
    lu = solvers.build({"kind": "direct", "rtol": 1e-12})
    workspace = family.setup(self_comm())
    exact_workspace = reference_family.setup(self_comm())
    bound = 1.01 * condition("C1" if is_matrix_free else family_name) * (rtol + 1e-12)
    state: Any = None
    exact_state: Any = None
    for mu in family.space.sample(4, 6011):
        system = family.assemble(mu, workspace)
        if not solver.suits(system):
            workspace.destroy()
            pytest.skip(f"{solver.kind} does not claim {family_name}")
        state = state or solver.init(system)
        result, state = solver.solve(system, state)
        assert result.report.converged, result.report
        assert result.report.true_relres <= rtol
        assert system.residual(result.x) <= rtol * (1 + 1e-3)
        exact = reference_family.assemble(mu, exact_workspace)
        exact_state = exact_state or lu.init(exact)
        expected, exact_state = lu.solve(exact, exact_state)
        difference = result.x.getArray() - expected.x.getArray()
        scale = np.linalg.norm(expected.x.getArray())
        assert np.linalg.norm(difference) <= bound * scale
    for item in (state, exact_state, workspace, exact_workspace):
        item.destroy()
