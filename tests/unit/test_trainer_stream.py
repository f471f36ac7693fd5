"""Following a store: which items come, how often, from where on after a restart."""

import threading
import time

import numpy as np
import pytest
import torch
from learn_helpers import bare_schema, sample_of, solve, trajectories

from simlab.core.config import build
from simlab.core.errors import StoreError
from simlab.learn.encoding import Encoding, Statistics
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import FollowedStream, MemoryStream
from simlab.learn.trainer import Trainer
from simlab.store.store import SnapshotStore

T = 4
SCHEMA = bare_schema(n_times=T)


@pytest.fixture
def store(tmp_path):
    return SnapshotStore.create(tmp_path / "store", SCHEMA, n=30, seed=515)


def write(writer, traj, steps=range(T), finish=True, fail=False):
    trajectory = solve(SCHEMA, sample_of(SCHEMA, traj))
    writer.begin(trajectory.sample)
    for step in steps:
        fields = {"u": trajectory.outputs["u"][step]}
        writer.append(traj, step, float(trajectory.times[step]), fields)
    if fail:
        writer.fail(traj, "diverged")
    elif finish:
        writer.finish(traj)


def drain(stream, at_most=7):
    items, quiet = [], 0
    while quiet < 3:
        new = stream.poll(at_most)
        quiet = 0 if new else quiet + 1
        items += new
    return items


def keys(items):
    return [(item.traj, item.step) for item in items]


def expected(ids, steps=T):
    return sorted((int(traj), step) for traj in ids for step in range(steps))


def settings_with(**changes):
    plain = {
        "operator": {"kind": "mlp", "hidden": (8,)},
        "buffer": {"kind": "reservoir", "capacity": 40, "threshold": 8},
        "n_batches": 60,
        "batch": 4,
        "threads": 1,
        "pilot": 5,
    }
    return build(TrainSettings, plain | changes)


def test_only_its_split_each_once_with_its_values(store):
    with store.writer() as one, store.writer() as two:
        for traj in range(30):
            write(two if traj % 3 else one, traj)
    items = drain(FollowedStream(store.path))
    assert sorted(keys(items)) == expected(store.ids("train"))
    encoding = Encoding(SCHEMA)
    for item in items:
        row = encoding.rows(solve(SCHEMA, sample_of(SCHEMA, item.traj)))[item.step]
        np.testing.assert_array_equal(item.row, row)
    assert sorted(keys(drain(FollowedStream(store.path, "valid")))) == expected(store.ids("valid"))


def test_failed_trajectories_give_nothing_more(store):
    bad = int(store.ids("train")[2])
    with store.writer() as writer:
        for traj in range(30):
            write(writer, traj, range(2) if traj == bad else range(T), fail=traj == bad)
    stream = FollowedStream(store.path)
    items = drain(stream)
    good = [traj for traj in store.ids("train") if traj != bad]
    assert sorted(keys(items)) == sorted(expected(good) + expected([bad], 2))
    assert stream.is_exhausted


def test_a_second_attempt_gives_only_what_was_missing(store):
    traj = int(store.ids("train")[0])
    writer = store.writer()
    write(writer, traj, range(2), finish=False)
    stream = FollowedStream(store.path)
    first = drain(stream)
    writer.close()
    store.recover()
    with store.writer() as again:
        write(again, traj)
    second = drain(stream)
    assert keys(first) == [(traj, 0), (traj, 1)]
    assert keys(second) == [(traj, 2), (traj, 3)]


def test_exhausted_only_when_the_campaign_is_complete(store):
    stream = FollowedStream(store.path)
    with store.writer() as writer:
        for traj in range(29):
            write(writer, traj)
        drain(stream)
        assert not stream.is_exhausted
        write(writer, 29)
    drain(stream)
    assert stream.is_exhausted
    assert stream.n_items == T * len(store.ids("train"))


@pytest.mark.parametrize("at_most", [1, 3, 50])
def test_restart_at_any_moment_loses_and_repeats_nothing(store, at_most, tmp_path):
    """The position is saved and a new stream made after every poll, while data arrive and move."""
    items, writer = [], store.writer(segment_bytes=3000)
    state = None
    for traj in range(30):
        write(writer, traj)
        if traj == 15:
            store.seal()
        stream = FollowedStream(store.path)
        if state is not None:
            stream.load_state_dict(state)
        items += stream.poll(at_most)
        state = stream.state_dict()
    writer.close()
    stream = FollowedStream(store.path)
    stream.load_state_dict(state)
    items += drain(stream)
    assert sorted(keys(items)) == expected(store.ids("train"))
    by_traj = {}
    for traj, step in keys(items):
        assert by_traj.get(traj, -1) == step - 1
        by_traj[traj] = step


def test_rewind_gives_everything_again(store):
    with store.writer() as writer:
        for traj in range(30):
            write(writer, traj)
    stream = FollowedStream(store.path)
    first = drain(stream)
    stream.rewind()
    assert not stream.is_exhausted
    assert sorted(keys(drain(stream))) == sorted(keys(first))


def test_pilot_does_not_depend_on_the_order_of_arrival(store):
    ids = store.ids("train")
    stream = FollowedStream(store.path)
    with store.writer() as writer:
        for traj in reversed(range(int(ids[1]), 30)):
            write(writer, traj)
        drain(stream)
        assert stream.pilot(5) is None  # the first one is missing
        for traj in range(int(ids[1])):
            write(writer, traj)
        drain(stream)
    encoding = Encoding(SCHEMA)
    first = [encoding.rows(solve(SCHEMA, sample_of(SCHEMA, int(traj)))) for traj in ids[:5]]
    found, wanted = stream.pilot(5), Statistics.of(encoding, np.concatenate(first))
    for name in ("count", "total", "square"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-12)


def test_pilot_passes_over_failures(store):
    ids = store.ids("train")
    stream = FollowedStream(store.path)
    with store.writer() as writer:
        write(writer, int(ids[0]), range(1), fail=True)
        for traj in ids[1:4]:
            write(writer, int(traj))
        drain(stream)
    assert stream.pilot(3).count[0] == 3 * T


def test_a_pilot_that_comes_last_loses_nothing(store):
    """The first trajectories arrive at the end, after more items than the buffer has room for."""
    with store.writer() as writer:
        for traj in reversed(range(30)):
            write(writer, traj)
    trainer = Trainer(settings_with(), SCHEMA)
    assert len(store.ids("train")) * T > trainer.buffer.capacity
    trainer.run(FollowedStream(store.path))
    mean = np.mean(
        [solve(SCHEMA, sample_of(SCHEMA, int(t))).outputs["u"] for t in store.ids("train")[:5]]
    )
    assert float(trainer.model.network.mean_out[0]) == pytest.approx(mean, rel=1e-5)


def test_training_on_a_live_store(store):
    """The trainer starts before the first sample and ends after the last one."""

    def campaign():
        with store.writer() as writer:
            for traj in range(30):
                write(writer, traj)
                time.sleep(0.01)

    producer = threading.Thread(target=campaign)
    trainer = Trainer(
        settings_with(n_batches=80, buffer={"kind": "reservoir", "capacity": 200}), SCHEMA
    )
    producer.start()
    trainer.run(FollowedStream(store.path))
    producer.join()
    assert trainer.batch == 80
    assert trainer.buffer.n_got == pytest.approx(320, abs=8)


def test_resume_on_a_store_equals_uninterrupted(store, tmp_path):
    """A finished store is a stream whose order does not depend on time."""
    with store.writer() as writer:
        for traj in range(30):
            write(writer, traj)
    straight = Trainer(settings_with(), SCHEMA)
    straight.run(FollowedStream(store.path))
    for part in (5, 11, 60):
        trainer = Trainer(settings_with(), SCHEMA, tmp_path / "model")
        stream = FollowedStream(store.path)
        trainer.resume(stream)
        trainer.run(stream, stop=lambda t=trainer, n=part: t.batch >= n)
    for name, value in straight.model.tensors().items():
        assert torch.equal(value, trainer.model.tensors()[name]), name


def test_store_without_success_says_so(store):
    with store.writer() as writer:
        for traj in range(30):
            write(writer, traj, range(0), fail=True)
    with pytest.raises(StoreError, match="no finished training trajectories"):
        Trainer(settings_with(), SCHEMA).run(FollowedStream(store.path))


def test_memory_stream_shuffles_each_pass_and_gives_each_item_once():
    data = trajectories(SCHEMA, 9)
    stream = MemoryStream(data, SCHEMA, 77)
    first = stream.poll(1000)
    assert stream.is_exhausted
    stream.rewind()
    second = stream.poll(10) + stream.poll(1000)
    assert sorted(keys(first)) == sorted(keys(second)) == expected(range(9))
    assert keys(first) != keys(second) != expected(range(9))
