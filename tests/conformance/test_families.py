"""Every registered problem family keeps the promises of the protocol.

A new family is tested by existing; all it has to add is one small table to ``SMALL``.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simlab.core.comm import self_comm
from simlab.core.config import as_table
from simlab.core.errors import ConfigError, SchemaError
from simlab.core.reports import Reason, SolveReport
from simlab.linalg import petsc as PETSc
from simlab.linalg.system import SolveResult
from simlab.problems.family import families, marches, trajectory

CASES = Path(__file__).parents[2] / "cases"

SMALL = {
    "advection_burgers": [
        {"points": 16, "n_steps": 3, "terms": 2},
        {"points": 12, "n_steps": 2, "alpha": [0.5, 1.0], "beta": 0.1},
        {"points": 12, "n_steps": 2, "beta": 0.0},
    ],
    "burgers": [{"points": 16, "n_steps": 3, "substeps": 2}, {"points": 9, "n_steps": 1}],
    "convection_diffusion": [{"cells": 4}, {"cells": 7, "dim": 2, "source": -1.5}],
    "darcy": [
        {"cells": 6},
        {"cells": 5, "matrix_free": True},
        {"cells": 6, "fields": {"kind": "path", "epsilon": 0.3}},
        {"cells": 3, "dim": 3, "fields": {"kind": "four_parameter"}},
        {"cells": 7, "fields": {"kind": "two_phase", "low": 1.0, "high": 90.0}, "source": -2.0},
        {"cells": 16, "fields": {"file": str(CASES / "data" / "permeability_16.npz")}},
    ],
    "heat": [{"cells": 5, "n_steps": 3}],
    "helmholtz": [{"cells": 6}, {"cells": 4, "dim": 3, "source_variance": 0.02}],
    "lorenz": [{"n_steps": 4}, {"n_steps": 1, "rho": [28.0, 28.0]}],
    "poisson": [
        {
            "mesh": str(CASES / "meshes" / "bracket_coarse.msh"),
            "dirichlet": {"bore": [60.0, 90.0]},
            "source": [0.0, 10.0],
            "degree": degree,
            "grid": [9, 7],
        }
        for degree in (1, 2)
    ]
    + [
        {
            "mesh": {"kind": "square", "size": 0.2},
            "degree": 2,
            "grid": [6, 5],
            "source": {"kind": "chebyshev", "degree": 3},
            "dirichlet": {"left": {"kind": "chebyshev"}, "boundary": 1.0},
        },
        {
            "mesh": {"kind": "square", "size": 0.15, "blocks": [2, 1]},
            "grid": [6, 5],
            "dirichlet": {"left": [1.0, 2.0]},
            "neumann": {"right": {"kind": "chebyshev", "degree": 2}},
            "robin": {"top": {"coefficient": 3.0, "ambient": [0.0, 1.0]}},
            "conductivity": {"block_1_1": [0.1, 10.0], "block_2_1": 2.0},
        },
        {
            "mesh": {"kind": "slotted_plate", "size": 0.1},
            "grid": [5, 8],
            "dirichlet": {"left": [0.0, 100.0]},
            "conductivity": [0.5, 2.0],
            "source": 1.0,
        },
    ],
    "reaction_diffusion": [{"cells": 6, "n_steps": 3}, {"cells": 4, "n_steps": 1, "dt": 0.1}],
    "released_darcy": [
        {"side": 4},
        {"side": 5, "slip": False, "helmholtz": True, "fields": {"kind": "two_phase"}},
    ],
}
TABLES = [{"kind": kind} | table for kind, tables in SMALL.items() for table in tables]
SOLVED = [table for table in TABLES if not marches(families.kinds()[table["kind"]])]
MARCHED = [table for table in TABLES if table not in SOLVED]
SEED = 60659


def label(table):
    return "-".join(
        str(value) if not isinstance(value, dict) else "fields" for value in table.values()
    )


with_systems = pytest.mark.parametrize("table", SOLVED, ids=label)
without_systems = pytest.mark.parametrize("table", MARCHED, ids=label)


@pytest.fixture(params=TABLES, ids=label)
def table(request):
    return request.param


@pytest.fixture
def family(table):
    return families.build(table)


@pytest.fixture
def workspace(family):
    made = family.setup(self_comm())
    yield made
    made.destroy()


def dense(A):
    if A.getType() == "python":  # no entries: multiply with the columns of the identity
        return A.matMult(identity(A)).getDenseArray().copy()
    rows, columns, values = A.getValuesCSR()
    full = np.zeros(A.getSize())
    full[np.repeat(np.arange(full.shape[0]), np.diff(rows)), columns] = values
    return full


def identity(A):
    one = PETSc.Mat().createDense(A.getSize(), array=np.eye(A.getSize()[0]), comm=A.comm)
    one.assemble()
    return one


def solve(system):
    """Solve from scratch with PETSc's own LU; a shell is turned into a matrix first."""
    is_shell = system.A.getType() == "python"
    A = system.A.matMult(identity(system.A)) if is_shell else system.A
    ksp = PETSc.KSP().create(self_comm())
    ksp.setType("preonly")
    ksp.getPC().setType("lu")
    ksp.setOperators(A)
    x = system.b.duplicate()
    ksp.solve(system.b, x)
    ksp.destroy()
    report = SolveReport("lu", Reason.CONVERGED, 1, 1, 1, system.residual(x), 1e-10)
    assert report.true_relres < report.rtol
    return SolveResult(x, report)


@pytest.mark.parametrize("kind", families.kinds())
def test_every_kind_has_a_small_table(kind):
    assert SMALL.get(kind), f"add a small table for family {kind!r} to SMALL in {__file__}"


def test_settings_round_trip_through_their_table(family):
    written = json.loads(json.dumps(as_table(family)))
    assert families.build(written) == family
    assert repr(family) == repr(families.build(written))
    assert written["kind"] == family.kind


def test_unknown_keys_are_named(table):
    with pytest.raises(ConfigError, match="no_such_key: unknown key"):
        families.build(table | {"no_such_key": 1})


def test_describing_a_family_loads_neither_petsc_nor_mpi_nor_torch(table):
    code = (
        "import sys, json; from simlab.problems.family import families;"
        "family = families.build(json.loads(sys.argv[1])); family.validate(); repr(family);"
        "family.schema.check_sample(family.space.sample(1, 3)[0]); family.steps;"
        "print(*{'petsc4py', 'mpi4py', 'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(table)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_validate_accepts_the_small_table(family):
    family.validate()


def test_samples_depend_on_seed_and_index_only(family):
    eight, tail = family.space.sample(8, SEED), family.space.sample(5, SEED, start=3)
    assert [mu.index for mu in eight] == list(range(8))
    for one, other in zip(eight[3:], tail, strict=True):
        assert (one.index, one.seed, dict(one.parameters)) == (
            other.index,
            other.seed,
            dict(other.parameters),
        )
        assert one.fields.keys() == other.fields.keys()
        for name, values in one.fields.items():
            np.testing.assert_array_equal(values, other.fields[name])
    keys = [
        np.concatenate([list(mu.parameters.values()), *map(np.ravel, mu.fields.values())])
        for mu in eight
    ]
    assert all(not np.array_equal(keys[0], key) for key in keys[1:])


def test_samples_fit_space_and_schema(family):
    for mu in family.space.sample(3, SEED):
        family.schema.check_sample(mu)
        assert family.space.contains(mu)
        assert set(family.space.names) == set(mu.parameters) | set(mu.fields)
        assert {spec.name for spec in family.schema.inputs} <= set(mu.fields)
        assert set(family.schema.parameters) <= set(mu.parameters)


def test_schema_has_one_time_per_step(family):
    schema = family.schema
    assert family.steps >= 1
    assert len(schema.times) == family.steps
    assert list(schema.times) == sorted(set(schema.times))
    assert type(schema).from_json(json.loads(json.dumps(schema.to_json()))).to_json() == (
        schema.to_json()
    )


@with_systems
def test_traits_are_true(family, workspace):
    versions, matrices = set(), []
    for mu in family.space.sample(3, SEED):
        system = family.assemble(mu, workspace)
        A = dense(system.A)
        traits = system.traits
        versions.add(system.version)
        matrices.append(A)
        assert system.mu is mu
        assert system.index == mu.index
        assert np.all(np.isfinite(A))
        if traits.symmetric or traits.spd:
            np.testing.assert_allclose(A, A.T, rtol=0, atol=1e-13 * np.abs(A).max())
        if traits.spd:
            np.linalg.cholesky(A)
        if traits.grid is not None:
            check_stencil(A, traits.grid)
        assert traits.matrix_free == (system.A.getType() == "python")
        np.testing.assert_array_equal(system.A.getDiagonal().getArray(), np.diag(A))
    if traits.constant_matrix:
        assert len(versions) == 1
        np.testing.assert_array_equal(matrices[0], matrices[1])
        np.testing.assert_array_equal(matrices[0], matrices[2])
    else:
        assert len(versions) == 3
        assert not np.array_equal(matrices[0], matrices[1])


def check_stencil(A, grid):
    """Nonzeros only on the diagonal and between neighbours of the grid, last axis fastest."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    index = index.reshape(-1, len(grid.shape))
    assert len(A) == len(index)
    gap = np.abs(index[:, None] - index[None])
    if grid.boundary == "periodic":
        gap = np.minimum(gap, np.array(grid.shape) - gap)
    assert np.all(A[gap.sum(-1) > 1] == 0)


@with_systems
def test_assembling_again_gives_the_same_bits(family, workspace):
    one, two = family.space.sample(2, SEED)
    first = family.assemble(one, workspace)
    A, b, version = dense(first.A), first.b.getArray().copy(), first.version
    again = family.assemble(one, workspace)
    if again.version == version:
        np.testing.assert_array_equal(dense(again.A), A)
    other = family.assemble(two, workspace)
    assert not (np.array_equal(dense(other.A), A) and np.array_equal(other.b.getArray(), b))
    back = family.assemble(one, workspace)
    np.testing.assert_array_equal(dense(back.A), A)
    np.testing.assert_array_equal(back.b.getArray(), b)
    fresh = family.setup(self_comm())
    anew = family.assemble(one, fresh)
    np.testing.assert_array_equal(dense(anew.A), A)
    np.testing.assert_array_equal(anew.b.getArray(), b)
    fresh.destroy()


@with_systems
def test_fields_of_another_shape_or_type_are_refused_every_time(family, workspace):
    mu = family.space.sample(1, SEED)[0]
    before = dense(family.assemble(mu, workspace).A)
    for name in mu.fields.keys() - {"inside"}:  # the mask of unstructured meshes is not an input
        values = mu.fields[name]
        for wrong in (np.ones(np.add(values.shape, 1)), values.ravel(), values + 0.5j):
            changed = replace(mu, fields={**mu.fields, name: wrong})
            for _ in range(2):
                with pytest.raises(SchemaError, match=r"shape|real"):
                    family.assemble(changed, workspace)
    assert np.array_equal(before, dense(family.assemble(mu, workspace).A))


@with_systems
def test_how_a_field_lies_in_memory_does_not_matter(family, workspace):
    mu = family.space.sample(1, SEED)[0]
    system = family.assemble(mu, workspace)
    before = dense(system.A), system.b.getArray().copy()
    other = family.setup(self_comm())
    turned = {name: np.asfortranarray(values) for name, values in mu.fields.items()}
    system = family.assemble(replace(mu, fields=turned), other)
    assert np.array_equal(before[0], dense(system.A))
    assert np.array_equal(before[1], system.b.getArray())
    other.destroy()


@with_systems
def test_version_stays_when_nothing_changes(family, workspace):
    mu = family.space.sample(1, SEED)[0]
    system = family.assemble(mu, workspace)
    version = system.version
    solve(system)
    assert family.assemble(mu, workspace).version == version


def test_trajectories_have_the_shape_that_the_schema_promises(family, workspace):
    found = []
    for mu in family.space.sample(2, SEED):
        steps = list(trajectory(family, mu, workspace, solve))
        assert [(s.step, s.time) for s in steps] == list(enumerate(family.schema.times))
        for step in steps:
            assert set(step.fields) == {spec.name for spec in family.schema.outputs}
            for spec in family.schema.outputs:
                family.schema.check_field(spec, step.fields[spec.name], family.kind)
        found.append(steps[-1].fields)
    name = family.schema.outputs[0].name
    assert not np.allclose(found[0][name], found[1][name], rtol=1e-6)


@with_systems
def test_observed_fields_outlive_the_vector(family, workspace):
    mu = family.space.sample(1, SEED)[0]
    x = solve(family.assemble(mu, workspace)).x
    before = family.observe(mu, x, workspace)
    kept = {name: values.copy() for name, values in before.items()}
    x.set(-7.0)
    for name, values in before.items():
        np.testing.assert_array_equal(values, kept[name])


@with_systems
def test_workspaces_do_not_share_storage(family, workspace):
    one, two = family.space.sample(2, SEED)
    system = family.assemble(one, workspace)
    A, b = dense(system.A), system.b.getArray().copy()
    other = family.setup(self_comm())
    family.assemble(two, other)
    np.testing.assert_array_equal(dense(system.A), A)
    np.testing.assert_array_equal(system.b.getArray(), b)
    other.destroy()


@without_systems
def test_marching_again_gives_the_same_bits_and_no_solver_is_asked(family, workspace):
    def refuse(system):
        raise AssertionError("a family that marches has no systems")

    one, two = family.space.sample(2, SEED)
    runs = []
    for mu in (one, two, one):
        steps = list(trajectory(family, mu, workspace, refuse))
        assert all(step.report.converged and step.report.iterations == 0 for step in steps)
        runs.append([step.fields for step in steps])
    for name in runs[0][0]:
        first, other, again = ([fields[name] for fields in run] for run in runs)
        np.testing.assert_array_equal(first, again)
        assert not np.allclose(first, other, rtol=1e-6)
        assert all(values is not first[0] for values in first[1:])


@without_systems
def test_interleaved_marches_do_not_disturb_each_other(family, workspace):
    samples = family.space.sample(2, SEED)
    alone = [list(family.march(mu, workspace)) for mu in samples]
    together = zip(*(family.march(mu, workspace) for mu in samples), strict=True)
    for expected, found in zip(zip(*alone, strict=True), together, strict=True):
        for one, other in zip(expected, found, strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
