"""Checkpoints that name items instead of holding them: equal weights, small, honest refusal."""

import json

import numpy as np
import pytest
import torch
from learn_helpers import bare_schema, sample_of, solve, trajectories

from simlab.core.config import build
from simlab.core.errors import StoreError
from simlab.learn import checkpoints
from simlab.learn.buffers import buffers
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import FollowedStream, MemoryStream
from simlab.learn.trainer import Trainer
from simlab.store.store import SnapshotStore

T, N = 3, 5000  # a row is worth a read
SCHEMA = bare_schema(T, N)
DATA = trajectories(SCHEMA, 24)
ROW = 4 * N


class Forgetful(MemoryStream):
    """Reads nothing once more, as a stream over a network."""

    def sync(self):
        return False

    def row(self, traj, step):
        raise AssertionError("nobody may ask")


def settings_with(**changes):
    plain = {
        "operator": {"kind": "mlp", "hidden": (4,)},
        "buffer": {"kind": "reservoir", "capacity": 20, "threshold": 4},
        "n_batches": 24,
        "batch": 4,
        "pilot": 4,
        "threads": 1,
    }
    return build(TrainSettings, plain | changes)


def buffer_of(directory):
    state = checkpoints.newest(directory / "checkpoints")["buffer"]
    return state, json.loads(state["plain"])


@pytest.mark.parametrize(
    ("kind", "cls"),
    [("reservoir", MemoryStream), ("replay", MemoryStream), ("reservoir", Forgetful)],
)
def test_resumed_equals_straight_both_ways(kind, cls, tmp_path):
    settings = settings_with(buffer={"kind": kind, "capacity": 20})
    straight = Trainer(settings, SCHEMA)
    straight.run(MemoryStream(DATA, SCHEMA, 31))
    for last in (7, 15, 24):
        trainer = Trainer(settings, SCHEMA, tmp_path)
        stream = cls(DATA, SCHEMA, 31)
        assert trainer.resume(stream) == (last > 7)
        trainer.run(stream, stop=lambda t=trainer, n=last: t.batch >= n)
        state, plain = buffer_of(tmp_path)
        n_held = len(plain["held"])
        assert n_held > 8
        assert len(state["rows"]) == (0 if cls is MemoryStream else n_held)
    for name, value in straight.model.tensors().items():
        assert torch.equal(value, trainer.model.tensors()[name]), name


def test_the_file_is_smaller_by_the_rows(tmp_path):
    sizes = {}
    for cls in (MemoryStream, Forgetful):
        settings = settings_with(
            n_batches=2, buffer={"kind": "reservoir", "capacity": 60, "threshold": 50}
        )
        Trainer(settings, SCHEMA, tmp_path / cls.__name__).run(cls(DATA, SCHEMA, 5))
        (file,) = (tmp_path / cls.__name__).glob("checkpoints/*/state.pt")
        n_held = len(buffer_of(tmp_path / cls.__name__)[1]["held"])
        assert n_held > 50
        sizes[cls] = file.stat().st_size
    assert sizes[Forgetful] - sizes[MemoryStream] > 0.95 * n_held * ROW


def write(writer, traj, shift=0.0, steps=range(T), finish=True):
    made = solve(SCHEMA, sample_of(SCHEMA, traj))
    writer.begin(made.sample)
    for step in steps:
        fields = {"u": made.outputs["u"][step] + np.float32(shift)}
        writer.append(traj, step, SCHEMA.times[step], fields)
    if finish:
        writer.finish(traj)


@pytest.fixture
def store(tmp_path):
    return SnapshotStore.create(tmp_path / "store", SCHEMA, n=12, seed=515)


def train(store, directory, last, **changes):
    """Go on to a batch; return the trainer and what its checkpoint holds of the buffer."""
    trainer = Trainer(settings_with(pilot=2, **changes), SCHEMA, directory)
    stream = FollowedStream(store.path)
    trainer.resume(stream)
    trainer.run(stream, stop=lambda: trainer.batch >= last)
    return trainer, *buffer_of(directory)


def contents(trainer):
    return trainer.buffer.columns(range(N + 2))


def test_only_what_the_store_gives_again_is_named(store, tmp_path):
    """Not steps of an open trajectory, nor those that its next attempt made otherwise."""
    ids = store.ids("train").tolist()
    writer = store.writer()
    for traj in ids[:4]:
        write(writer, traj)
    write(writer, ids[4], shift=1.0, steps=range(2), finish=False)
    trainer, state, plain = train(store, tmp_path / "model", 5)
    assert len(plain["held"]) == 4 * T + 2
    assert [plain["trajs"][i] for i, kept in enumerate(plain["kept"]) if not kept] == [ids[4]] * 2
    assert len(state["rows"]) == 2
    before = contents(trainer)

    writer.close()
    store.recover()
    with store.writer() as again:
        write(again, ids[4])
    trainer, state, plain = train(store, tmp_path / "model", 9)
    assert len(plain["held"]) == 5 * T
    rest = [plain["steps"][i] for i, kept in enumerate(plain["kept"]) if not kept]
    assert sorted(rest) == [0, 1]
    after = contents(trainer)
    assert np.isin(before.view(np.uint32), after.view(np.uint32)).all()

    store.seal()
    trainer, _, _ = train(store, tmp_path / "model", 9)
    assert np.array_equal(contents(trainer).view(np.uint32), after.view(np.uint32))


def test_a_store_with_other_values_is_refused(store, tmp_path):
    with store.writer() as writer:
        for traj in range(12):
            write(writer, traj)
    train(store, tmp_path / "model", 5)
    other = SnapshotStore.create(tmp_path / "other", SCHEMA, n=12, seed=515)
    with other.writer() as writer:
        for traj in range(12):
            write(writer, traj, shift=0.5)
    with pytest.raises(StoreError, match=r"step \d of trajectory \d+ .* holds other values by now"):
        train(other, tmp_path / "model", 9)
    empty = SnapshotStore.create(tmp_path / "empty", SCHEMA, n=12, seed=515)
    with pytest.raises(StoreError, match="cannot read it; give the store it was made with"):
        train(empty, tmp_path / "model", 9)


@pytest.mark.parametrize("kind", sorted(buffers.kinds()))
def test_states_from_before_are_read(kind):
    """Without trajectories, references and the last batch, as once written."""
    one, two = (buffers.build({"kind": kind, "capacity": 9}).build(2, 77) for _ in range(2))
    for number in range(7):
        one.put(np.full(2, number, np.float32), number % 3, traj=number)
    one.get(2)
    state = one.state_dict()
    plain = json.loads(state["plain"])
    for name in ("kept", "crcs", "trajs", "drawn"):
        del plain[name]
    two.load_state_dict(state | {"plain": json.dumps(plain)})
    for buffer in (one, two):
        buffer.finish()
    assert np.array_equal(one.get(3), two.get(3))
    assert one.drawn[:, 1].tolist() == two.drawn[:, 1].tolist()
    assert set(two.drawn[:, 0].tolist()) == {-1}
