"""How a store's files are read: no more than is taken, and whole where the kernel gives less."""

import os

import numpy as np
import pytest
from store_helpers import SEED, Reader, assert_split_is_exact, make_schema, write

from simlab.core.samples import Sample
from simlab.store.follow import follow_records
from simlab.store.schema import Axis, FieldSpec, Schema
from simlab.store.store import SnapshotStore


@pytest.fixture
def reads(monkeypatch):
    """The number of bytes of every read of a segment."""
    found = []
    real = os.preadv

    def counted(fd, rooms, offset):
        found.append(real(fd, rooms, offset))
        return found[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return found


@pytest.mark.parametrize("form", ["values", "records"])
@pytest.mark.parametrize(("side", "n_steps"), [(32, 200), (512, 12)])
def test_a_follower_reads_little_more_than_it_takes(tmp_path, reads, form, side, n_steps):
    """Of several segments at once, call after call."""
    places = tuple(map(float, range(side)))
    axes = (Axis("x", places), Axis("y", places))
    schema = Schema("big", axes, (FieldSpec("u"),), tuple(map(float, range(n_steps))))
    store = SnapshotStore.create(tmp_path / "s", schema, n=3, seed=SEED, split={"train": 1.0})
    values = np.random.default_rng(SEED).standard_normal((side, side))
    with store.writer(segment_bytes=1) as writer:
        for traj in range(3):
            writer.begin(Sample(traj, SEED))
            for step in range(n_steps):
                writer.append(traj, step, float(step), {"u": values})
            writer.finish(traj)
    size = sum(path.stat().st_size for path in (store.path / "inflight").glob("*.seg"))
    follower = SnapshotStore.open(store.path)
    follower.catalogue.refresh()
    at_most = 30 if side < 512 else 64
    position, taken = None, -1
    while taken:
        if form == "values":
            events, position = follower.follow(position, at_most)
            taken = len(events)
        else:
            _, order, position = follow_records(follower, position, at_most, 16 << 20)
            taken = len(order)
    assert sum(reads) < 1.3 * size


def test_short_reads_change_nothing(tmp_path, monkeypatch):
    """The kernel gives at most 2 GiB at once; here it gives at most 100 bytes."""
    schema = make_schema(2, 3)
    store = SnapshotStore.create(tmp_path / "s", schema, n=6, seed=SEED)
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, rooms, at: real(fd, [memoryview(rooms[0]).cast("B")[:100]], at)
    )
    with store.writer() as writer:
        for traj in range(6):
            write(writer, schema, traj)
    reader = Reader(schema)
    reader.drain(SnapshotStore.open(store.path))
    assert reader.done() == set(range(6))
    store.seal(final=True)
    assert store.verify(deep=True) == []
    for name in store.fractions:
        assert_split_is_exact(schema, store.split(name))
