"""What p ranks compute, as sealed shards: the same for every p, and as near as they say."""

from __future__ import annotations

import importlib.util

import h5py
import numpy as np
import pytest
from numpy.polynomial import Chebyshev
from pytest_mpi import parallel_assert

from simlab.core.comm import agreement, world
from simlab.core.samples import Sample
from simlab.linalg import petsc as PETSc
from simlab.problems.poisson import Poisson
from simlab.store.store import SnapshotStore

SUM = {"kind": "chebyshev", "degree": 5}
SIDES = ("left", "right", "bottom", "top")
FAMILY = Poisson(
    mesh={"kind": "square", "size": 0.05},
    degree=2,
    grid=[18, 15],
    source=SUM,
    dirichlet=dict.fromkeys(SIDES, SUM),
)
P = Chebyshev([0.3, -0.2, 0.15, 0.1, -0.05, 0.02])
N = 3
OWN = {"simlab_campaign", "simlab_shard", "history", "segments"}  # names, and when


def exact(traj, x, y):
    """A solution that is cubic and more in x and y; its sides are polynomials of degree 5."""
    return (1 + traj) * P(2 * x - 1) + 0.7 * (x**3 - 3 * x * y**2) + 0.4 * (3 * x**2 * y - y**3)


def sample_of(traj):
    """The sample whose solution that is."""
    t = np.linspace(0, 1, 6)  # along a side, from its end with the smaller x, then y
    at = {"left": (0 * t, t), "right": (1 + 0 * t, t), "bottom": (t, 0 * t), "top": (t, 1 + 0 * t)}
    given = {side: Chebyshev.fit(2 * t - 1, exact(traj, *at[side]), 5).coef for side in SIDES}
    data = {f"dirichlet.{side}": values for side, values in given.items()}
    data["source"] = -4 * (1 + traj) * P.deriv(2).coef
    drawn = FAMILY.space.sample(1, seed=917)[0]
    parameters = dict.fromkeys(drawn.parameters, 0.0)
    for name, values in data.items():
        parameters |= {f"{name}.c{k}": float(value) for k, value in enumerate(values)}
    assert parameters.keys() == drawn.parameters.keys()
    return Sample(traj, 917, parameters, drawn.fields)


def solve(system):
    ksp = PETSc.KSP().create(system.A.comm)
    ksp.setType("cg")
    ksp.getPC().setType("jacobi")
    ksp.setTolerances(rtol=1e-14, max_it=5000)
    ksp.setOperators(system.A)
    x = system.A.createVecRight()
    ksp.solve(system.b, x)
    ksp.destroy()
    return x


def fill(comm, path, is_solved):
    """Make and seal a store on some ranks; return what the root sent. Collective."""
    workspace = FAMILY.setup(comm)
    store, sent = None, []
    if comm.rank == 0:
        store = SnapshotStore.create(path, FAMILY.schema, n=N, seed=917, split={"train": 1.0})
        writer = store.writer()
    for traj in range(N):
        sample = sample_of(traj)
        system = FAMILY.assemble(sample, workspace)
        if is_solved:
            x = solve(system)
        else:
            x = system.A.createVecRight()
            x.setArray(
                exact(traj, *workspace.operator.space.points[slice(*x.getOwnershipRange())].T)
            )
        fields = FAMILY.observe(sample, x, workspace)
        x.destroy()
        if store is not None:
            writer.begin(sample)
            writer.append(traj, 0, 0.0, fields)
            writer.finish(traj)
            sent.append(fields)
    workspace.destroy()
    if store is not None:
        writer.close()
        store.seal(final=True)
    return store, sent


def contents(path):
    """Every attribute and every dataset of a file, without names that are its own."""
    found = {}

    def take(name, item):
        found.update(
            {f"{name}@{key}": value for key, value in item.attrs.items() if key not in OWN}
        )
        if isinstance(item, h5py.Dataset) and name.rpartition("/")[2] not in OWN:
            found[name] = item[()]

    with h5py.File(path) as file:
        take("", file)
        file.visititems(take)
    return found


def shard_of(store):
    (path,) = (store.path / "data" / "train").glob("*.h5")
    return path


@pytest.mark.parallel([3])
@pytest.mark.parametrize("is_solved", [False, True], ids=["given", "solved"])
def test_shards_of_1_2_and_3_ranks_are_the_same(tmp_path, is_solved) -> None:
    """Bit for bit where the ranks were given the values, to rounding where they solved."""
    comm, found = world(), []
    for size in (1, 2, 3):
        part = comm.Split(0 if comm.rank < size else 1, comm.rank)
        if comm.rank < size:
            store, _ = fill(part, tmp_path / str(size), is_solved)
            if store is not None:
                found.append(contents(shard_of(store)))
        part.Free()
    with agreement(comm):
        for other in found[1:]:
            assert other.keys() == found[0].keys()
            for name, values in found[0].items():
                if is_solved and name.endswith(("/u", "/u_mesh", "crc32", "resampling_error")):
                    scale = np.abs(values).max()
                    close = np.allclose(other[name], values, rtol=0, atol=1e-7 * scale)
                    assert close or name.endswith("crc32"), name
                else:
                    np.testing.assert_array_equal(other[name], values, err_msg=name)
        if found and is_solved:
            gap = np.abs(found[0]["mesh/fields/u_mesh"] - found[2]["mesh/fields/u_mesh"]).max()
            assert gap < 1e-11
    parallel_assert(len(found) == (3 if comm.rank == 0 else 0))


@pytest.mark.parallel([1, 2, 3])
def test_the_grid_is_as_near_to_the_exact_solution_as_its_shard_says(tmp_path) -> None:
    from scipy.interpolate import RegularGridInterpolator

    comm = world()
    store, _ = fill(comm, tmp_path / "s", is_solved=True)
    with agreement(comm):
        if store is not None:
            with h5py.File(shard_of(store)) as file:
                u = file["t0_fields/u"][:, 0].astype(float)
                said = file["t0_fields/u"].attrs["resampling_error"]
                u_mesh, points = file["mesh/fields/u_mesh"][:, 0], file["mesh/points"][:]
            axes = [np.array(axis.coordinates) for axis in store.schema.axes]
            grid = np.meshgrid(*axes, indexing="ij")
            low, high = (np.array([axis[at] for axis in axes]) for at in (0, -1))
            between = low + (high - low) * np.random.default_rng(918).random((20_000, 2))
            squares = np.zeros((4, 2))
            for traj in range(N):
                back = RegularGridInterpolator(axes, u[traj])
                found = (u[traj].ravel(), back(between), u_mesh[traj])
                at = (np.stack(grid, -1).reshape(-1, 2), between, points)
                for k, (values, where) in enumerate(zip(found, at, strict=True)):
                    truth = exact(traj, *where.T)
                    squares[k] += np.sum((values - truth) ** 2), np.sum(truth**2)
            at_points, anywhere, at_vertices = np.sqrt(squares[:3, 0] / squares[:3, 1])
            assert 0 < at_vertices < 1e-4  # of quadratic elements: the solution is the right one
            assert 0 < at_points < 0.1 * said
            assert 0.85 * said < anywhere < said
            assert said < 0.01
            print(f"stated {said:.2e}, between {anywhere:.2e}, at grid points {at_points:.2e}")


@pytest.mark.parallel([2])
def test_the_wells_loader_gives_what_two_ranks_sent(tmp_path) -> None:
    if importlib.util.find_spec("the_well") is None:
        pytest.skip("the_well is not installed")
    comm = world()
    store, sent = fill(comm, tmp_path / "s", is_solved=True)
    with agreement(comm):
        if store is not None:
            from the_well.data import WellDataset

            dataset = WellDataset(
                path=str(store.path), well_split_name="train", n_steps_input=1, n_steps_output=0
            )
            assert len(dataset) == N
            axes = [np.array(axis.coordinates) for axis in store.schema.axes]
            grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.float32)
            for traj in range(N):
                item = dataset[traj]
                u = np.asarray(item["input_fields"])[0, ..., 0]
                assert np.array_equal(u, sent[traj]["u"].astype(np.float32))
                assert np.array_equal(item["space_grid"], grid)
                assert item["boundary_conditions"].tolist() == [[0, 0], [0, 0]]  # walls
                inside = sample_of(traj).fields["inside"].astype(np.float32)
                assert np.array_equal(np.asarray(item["constant_fields"])[..., 0], inside)
