"""A client on several ranks: parts are gathered in the order of the grid, faults reach all."""

import shutil
import tempfile

from petsc4py import PETSc

import numpy as np
import pytest

from simlab.client import Client
from simlab.core.comm import world
from simlab.core.errors import CollectiveError, SchemaError
from simlab.store.schema import FieldSpec
from simlab.store.store import SnapshotStore

N = (5, 7)


@pytest.fixture
def path():
    comm = world()
    made = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    yield made
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(made)


def grid(n=N):
    return {name: np.linspace(0, 1, size) for name, size in zip("xy", n, strict=True)}


def client(path):
    return Client(path, 0, {"mu": 2.0}, n=1, seed=313, comm=PETSc.COMM_WORLD)


@pytest.mark.parallel([1, 2, 3])
def test_boxes_and_rows_are_put_in_order(path):
    comm = world()
    i, j = np.meshgrid(*map(np.arange, N), indexing="ij")
    truth = 100.0 * i + j
    boxes = PETSc.DMDA().create(N, dof=1, comm=PETSc.COMM_WORLD, setup=True)
    vec = boxes.createGlobalVec()
    (x0, x1), (y0, y1) = boxes.getRanges()
    boxes.getVecArray(vec)[:, :] = truth[x0:x1, y0:y1]
    rows = np.array_split(truth, comm.size)[comm.rank]
    with client(path) as c:
        assert c.resume_step == 0
        c.declare((FieldSpec("u"), FieldSpec("v")), grid(), (0.0, 1.0), layout=boxes)
        c.send(0, 0.0, {"u": vec, "v": rows})
    with client(path) as c:
        assert c.resume_step == 1
        c.declare((FieldSpec("u"), FieldSpec("v")), grid(), (0.0, 1.0), layout=boxes)
        c.send(1, 1.0, {"v": 3 * rows, "u": 2 * vec})
    if comm.rank == 0:
        store = SnapshotStore.open(path)
        found = [t for name in store.fractions for t in store.split(name)]
        assert len(found) == 1
        for step in range(2):
            np.testing.assert_array_equal(found[0].outputs["u"][step], (step + 1) * truth)
            np.testing.assert_array_equal(found[0].outputs["v"][step], (2 * step + 1) * truth)
    boxes.destroy()
    vec.destroy()


def run(path, n_own, bad_rank=-1):
    """Send one step of ``n_own`` values a rank; one rank may fail before it."""
    comm = world()
    with client(path) as c:
        c.declare({"u": "K"}, grid((comm.size, 1)))
        if comm.rank == bad_rank:
            raise ZeroDivisionError("a bad part")
        c.send(0, 0.0, {"u": np.ones(n_own)})


@pytest.mark.parallel([2, 3])
def test_an_exception_of_one_rank_ends_all(path):
    comm = world()
    kind = ZeroDivisionError if comm.rank == 1 else CollectiveError
    with pytest.raises(kind):
        run(path, 1, bad_rank=1)
    if comm.rank == 0:
        assert "a bad part" in SnapshotStore.open(path).failed()[0]
    comm.barrier()
    with pytest.raises(SchemaError, match="values"):
        run(path, 2)
    comm.barrier()
    run(path, 1)
    assert client(path).is_done
