"""Poisson on meshes made on the spot: order, expansions in space, and affine matrices."""

from __future__ import annotations

import numpy as np
import pytest
import skfem
from numpy.polynomial import Chebyshev, Polynomial, chebyshev

from simlab.core.comm import self_comm
from simlab.core.samples import Sample
from simlab.linalg import petsc as PETSc
from simlab.mesh.generate import load, meshes
from simlab.mesh.mesh import make
from simlab.problems.data import arc_coordinate
from simlab.problems.fem import Along, Elliptic, Space
from simlab.problems.poisson import Poisson

SUM = {"kind": "chebyshev", "degree": 5}


def solve(A, b) -> np.ndarray:
    """Solve directly on this rank."""
    ksp = PETSc.KSP().create(self_comm())
    ksp.setType("preonly")
    ksp.getPC().setType("cholesky")
    ksp.setOperators(A)
    x = A.createVecRight()
    ksp.solve(b, x)
    values = x.getArray().copy()
    ksp.destroy()
    x.destroy()
    return values


def observed(case: Poisson, mu: Sample) -> dict[str, np.ndarray]:
    workspace = case.setup(self_comm())
    system = case.assemble(mu, workspace)
    x = system.b.duplicate()
    x.setArray(solve(system.A, system.b))
    assert system.residual(x) < 1e-11
    fields = case.observe(mu, x, workspace)
    x.destroy()
    workspace.destroy()
    return fields


def dense(A) -> np.ndarray:
    rows, columns, values = A.getValuesCSR()
    full = np.zeros(A.getSize())
    full[np.repeat(np.arange(len(full)), np.diff(rows)), columns] = values
    return full


class Exact:
    """u = p(x) + Re (x + i y)^4, so that -u_xx - u_yy = -p''(x): everything is a short sum."""

    p = Polynomial([0.2, -1.0, 0.7, 0.4, -0.9, 0.6])

    def u(self, x, y):
        return self.p(x) + ((x + 1j * y) ** 4).real

    def gradient(self, x, y):
        slope = 4 * (x + 1j * y) ** 3
        return self.p.deriv()(x) + slope.real, -slope.imag

    def f(self, x):
        return -self.p.deriv(2)(x)


def coefficients(name: str, function, low: float = 0.0, high: float = 1.0) -> dict[str, float]:
    """Interpolate by a Chebyshev sum of degree 5; exact for our polynomials."""
    found = Chebyshev.interpolate(function, 5, domain=[low, high]).coef
    return {f"{name}.c{k}": float(c) for k, c in enumerate(found)}


def error(case: Poisson, mu: Sample) -> float:
    """Return the L2 error of u by the midpoint rule on the grid."""
    u = observed(case, mu)["u"]
    x, y = (np.array(axis.coordinates) for axis in case.schema.axes)
    gap = u - Exact().u(x[:, None], y[None])
    return float(np.sqrt(np.mean(gap**2)))


@pytest.mark.parametrize("degree", [1, 2])
def test_order_with_sums_on_every_side(degree) -> None:
    exact = Exact()
    sides = {
        "left": lambda s: exact.u(0.0, s),
        "right": lambda s: exact.u(1.0, s),
        "bottom": lambda s: exact.u(s, 0.0),
        "top": lambda s: exact.u(s, 1.0),
    }
    parameters = coefficients("source", exact.f)
    for name, values in sides.items():
        parameters |= coefficients(f"dirichlet.{name}", values)
    sizes, errors = (0.12, 0.06, 0.03), []
    for size in sizes:
        case = Poisson(
            mesh={"kind": "square", "size": size},
            degree=degree,
            grid=(41, 37),
            source=SUM,
            dirichlet=dict.fromkeys(sides, SUM),
        )
        assert set(parameters) == set(case.ranges)
        errors.append(error(case, Sample(0, 1, parameters)))
    order = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert degree + 0.75 < order < degree + 1.5
    assert errors[-1] < {1: 1e-3, 2: 6e-6}[degree]


@pytest.mark.parametrize("degree", [1, 2])
def test_order_with_sums_as_fluxes_and_ambient_values(degree) -> None:
    exact, c, k = Exact(), 2.5, 3.0
    parameters = (
        coefficients("source", lambda s: k * exact.f(s))
        | coefficients("dirichlet.left", lambda s: exact.u(0.0, s))
        | coefficients("neumann.right", lambda s: k * exact.gradient(1.0, s)[0])
        | coefficients("neumann.bottom", lambda s: -k * exact.gradient(s, 0.0)[1])
        | coefficients("robin.top", lambda s: exact.u(s, 1.0) + k / c * exact.gradient(s, 1.0)[1])
    )
    parameters |= {"conductivity.block_1_1": k, "conductivity.block_2_1": k}
    sizes, errors = (0.12, 0.06, 0.03), []
    for size in sizes:
        case = Poisson(
            mesh={"kind": "square", "size": size, "blocks": [2, 1]},
            degree=degree,
            grid=(41, 37),
            source=SUM,
            dirichlet={"left": SUM},
            neumann={"right": SUM, "bottom": SUM},
            robin={"top": {"coefficient": c, "ambient": SUM}},
            conductivity={"block_1_1": [1.0, 4.0], "block_2_1": [1.0, 4.0]},
        )
        errors.append(error(case, Sample(0, 1, parameters)))
    order = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert degree + 0.75 < order < degree + 1.5
    assert errors[-1] < {1: 2e-3, 2: 1e-5}[degree]


def test_quadratic_elements_are_third_order_on_the_slotted_plate() -> None:
    def u(x):
        return np.exp(x[0]) * np.sin(2 * x[1])

    sizes, errors = (0.1, 0.05, 0.025), []
    for size in sizes:
        space = Space(load(meshes.build({"kind": "slotted_plate", "size": size})), 2)
        problem = Elliptic(self_comm(), space, 1.0, {}, ["boundary"])
        b = problem.source(lambda x: 3 * u(x))
        b.axpy(1.0, problem.fixed("boundary", u))
        found = solve(problem.A, b)
        basis = skfem.CellBasis(problem.part.basis.mesh, problem.part.basis.elem, intorder=8)
        there = np.asarray(basis.interpolate(found[problem.part.dofs]))
        gap = there - u(np.asarray(basis.global_coordinates()))
        errors.append(np.sqrt(np.sum(gap**2 * basis.dx)))
        problem.destroy()
    assert 2.75 < np.polyfit(np.log(sizes), np.log(errors), 1)[0] < 3.4


def test_boundary_sums_are_exact_at_every_unknown() -> None:
    names = ("left", "right", "bottom", "top")
    case = Poisson(
        mesh={"kind": "square", "size": 0.1},
        degree=2,
        grid=(5, 5),
        dirichlet=dict.fromkeys(names, SUM),
    )
    mu = case.space.sample(1, seed=5571)[0]
    assert all(-1 <= value <= 1 for value in mu.parameters.values())
    assert len(mu.parameters) == 24
    workspace = case.setup(self_comm())
    system = case.assemble(mu, workspace)
    space = workspace.operator.space
    held = system.b.getArray() / system.A.getDiagonal().getArray()
    seen = np.zeros(space.n_dofs, dtype=bool)
    for name in names:  # where two sides meet, the one named first decides
        dofs = space.group_dofs(name)
        dofs = dofs[~seen[dofs]]
        seen[dofs] = True
        along = space.points[dofs, 0 if name in ("bottom", "top") else 1]
        c = [mu.parameters[f"dirichlet.{name}.c{k}"] for k in range(6)]
        assert np.allclose(held[dofs], chebyshev.chebval(2 * along - 1, c), rtol=0, atol=1e-13)
    workspace.destroy()


def test_sources_run_along_x_of_their_cells() -> None:
    case = Poisson(
        mesh={"kind": "square", "size": 0.1, "blocks": [2, 1]},
        degree=2,
        grid=(5, 5),
        source={"block_2_1": SUM},
        dirichlet={"left": 0.0},
    )
    values = {f"source.block_2_1.c{k}": float(k == 2) for k in range(6)}
    workspace = case.setup(self_comm())
    b = case.assemble(Sample(0, 1, values), workspace).b.getArray()
    # T_2(t) = 2 t^2 - 1 on 0.5 < x < 1, zero elsewhere; its integral is -1/3 of the area
    x = workspace.operator.space.points[:, 0]
    assert b.sum() == pytest.approx(-1 / 6, rel=1e-12)
    assert (b * x).sum() == pytest.approx(-1 / 3 * 0.5 * 0.75, rel=1e-12)
    assert np.all(b[x < 0.5 - 1e-9] == 0)
    workspace.destroy()


def test_the_arc_goes_round_a_corner() -> None:
    raw = skfem.MeshTri().refined(3)
    x, facets = raw.p.T, raw.facets.T
    bent = facets[np.all(x[facets, 0] == 0, axis=1) | np.all(x[facets, 1] == 0, axis=1)]
    mesh = make(x, raw.t.T, facet_groups={"bent": bent})
    t = arc_coordinate(mesh, "bent")  # from (0, 1) down to the corner and along to (1, 0)
    left, bottom = mesh.points[:, 0] == 0, mesh.points[:, 1] == 0
    assert np.allclose(t[left], -mesh.points[left, 1], atol=1e-14)
    assert np.allclose(t[bottom], mesh.points[bottom, 0], atol=1e-14)
    assert np.all(t[~left & ~bottom] == 0)


def test_values_at_vertices_from_a_file(tmp_path) -> None:
    mesh = load(meshes.build({"kind": "square", "size": 0.1}))
    x, y = mesh.points.T
    np.save(tmp_path / "plane.npy", 3.0 * x - 2.0 * y + 1.0)  # harmonic and linear: exact
    case = Poisson(
        mesh={"kind": "square", "size": 0.1},
        degree=2,
        grid=(9, 8),
        dirichlet={"boundary": {"kind": "vertices", "file": str(tmp_path / "plane.npy")}},
    )
    case.validate()
    fields = observed(case, case.space.sample(1, 1)[0])
    assert np.allclose(fields["u_mesh"], 3.0 * x - 2.0 * y + 1.0, rtol=0, atol=1e-12)
    drawn = case.__class__(
        mesh=case.mesh,
        grid=(9, 8),
        dirichlet={"left": 0.0},
        source={"kind": "vertices", "file": str(tmp_path / "plane.npy"), "scale": [1.0, 2.0]},
    )
    assert set(drawn.ranges) == {"source.scale"}
    workspace = drawn.setup(self_comm())
    b = drawn.assemble(Sample(0, 1, {"source.scale": 1.5}), workspace).b.getArray()
    free = np.setdiff1d(np.arange(len(b)), workspace.operator.space.group_dofs("left"))
    load_of_free = workspace.operator.part.load(lambda p: 1.5 * (3 * p[0] - 2 * p[1] + 1))
    local = np.argsort(workspace.operator.part.dofs)
    assert np.allclose(b[free], load_of_free[local][free], rtol=1e-12)
    workspace.destroy()


def block(conductivity, **changes) -> Poisson:
    table = {
        "mesh": {"kind": "square", "size": 0.09, "blocks": [3, 1]},
        "degree": 2,
        "grid": (9, 8),
        "source": {"block_2_1": [1.0, 2.0]},
        "dirichlet": {"left": SUM, "top": 2.0},
        "neumann": {"right": 1.0},
        "robin": {"bottom": {"coefficient": 3.0, "ambient": [0.0, 1.0]}},
        "conductivity": conductivity,
    }
    return Poisson(**(table | changes))


RANGES = {"block_1_1": [0.1, 10.0], "block_2_1": 2.0, "block_3_1": [0.1, 10.0]}


@pytest.mark.parametrize(
    ("ranges", "changes"),
    [
        (RANGES, {}),
        ([0.1, 10.0], {}),
        ([0.1, 10.0], {"robin": {}}),
        ({name: [0.1, 10.0] for name in RANGES}, {"robin": {}, "degree": 1}),
    ],
    ids=["some", "one", "one-alone", "all"],
)
def test_the_affine_sum_is_direct_assembly(ranges, changes) -> None:
    case = block(ranges, **changes)
    workspace = case.setup(self_comm())
    for mu in case.space.sample(2, seed=907):
        system = case.assemble(mu, workspace)
        drawn = {n.partition(".")[2]: v for n, v in mu.parameters.items() if n in case.varying}
        fixed = drawn[""] if isinstance(ranges, list) else ranges | drawn
        other = block(fixed, **changes)
        assert not other.varying
        there = other.setup(self_comm())
        direct = other.assemble(mu, there)
        A, B = dense(system.A), dense(direct.A)
        assert np.abs(A - B).max() <= 1e-13 * np.abs(B).max()
        b, c = system.b.getArray(), direct.b.getArray()
        assert np.abs(b - c).max() <= 1e-13 * np.abs(c).max()
        assert direct.affine is None
        assert direct.traits.constant_matrix
        there.destroy()
    workspace.destroy()


def test_systems_carry_their_terms() -> None:
    case = block(RANGES)
    assert case.varying == ("conductivity.block_1_1", "conductivity.block_3_1")
    assert tuple(case.ranges)[-2:] == case.varying
    workspace = case.setup(self_comm())
    one, two = case.space.sample(2, seed=411)
    system = case.assemble(one, workspace)
    traits, version = system.traits, system.version
    assert traits.spd
    assert traits.symmetric
    assert not traits.constant_matrix
    assert system.affine.theta == pytest.approx(
        [1.0, *(one.parameters[name] for name in case.varying)]
    )
    terms = [dense(term) for term in system.affine.terms]
    states = [term.stateGet() for term in system.affine.terms]
    whole = sum(t * A for t, A in zip(system.affine.theta, terms, strict=True))
    assert np.allclose(dense(system.A), whole, rtol=1e-14, atol=1e-14)
    for A in terms:  # each is symmetric and semidefinite, and none is zero
        assert np.abs(A - A.T).max() <= 1e-14 * np.abs(A).max()
        assert np.linalg.eigvalsh(A).min() > -1e-12
        assert np.abs(A).max() > 0.1
    other_load = {**one.parameters, "source.block_2_1": 1.9}
    again = case.assemble(Sample(7, 411, other_load, one.fields), workspace)
    assert again.version == version  # same conductivities: nothing to factor again
    other = case.assemble(two, workspace)
    assert other.version != version
    assert other.affine.terms == system.affine.terms
    assert [term.stateGet() for term in other.affine.terms] == states
    assert not np.array_equal(other.affine.theta, system.affine.theta)
    workspace.destroy()


def test_the_plate_is_symmetric_and_its_answers_scale() -> None:
    case = Poisson(
        mesh={"kind": "slotted_plate", "size": 0.05},
        degree=2,
        grid=(20, 32),
        dirichlet={"left": [0.0, 100.0]},
        neumann={"right": [-100.0, 0.0]},
    )
    draws = [
        Sample(0, 1, {"dirichlet.left": T, "neumann.right": q}) for T, q in ((80, 0), (0, -50))
    ]
    warm, cold = (observed(case, mu) for mu in draws)
    inside = case.space.sample(1, 1)[0].fields["inside"] == 1
    assert np.allclose(warm["u"][inside], 80.0, rtol=1e-11)
    u = cold["u"]
    assert np.abs(u - u[:, ::-1]).max() < 2e-3 * np.abs(u).max()
    assert np.all(np.diff(u[:, 0]) < 0)  # ever colder towards the side that loses heat
    # without the slot the drop would be flux x length = 50; the slot is in the way
    assert -100 < u.min() < -51


def test_data_along_a_function_of_the_unknowns() -> None:
    space = Space(load(meshes.build({"kind": "square", "size": 0.15})), 2)
    problem = Elliptic(self_comm(), space, 1.0, {"top": 2.0}, ["left"])
    along = Along(space.points[:, 1], lambda t: np.cos(3 * t))

    def plain(x):
        return np.cos(3 * x[1])

    pairs = [
        (problem.source(along), problem.source(plain)),
        (problem.flux("right", along), problem.flux("right", plain)),
        (problem.ambient("top", along), problem.ambient("top", plain)),
        (problem.fixed("left", along), problem.fixed("left", plain)),
    ]
    for one, other in pairs:
        assert np.allclose(one.getArray(), other.getArray(), rtol=1e-12, atol=1e-14)
        assert other.norm() > 0
    problem.destroy()
