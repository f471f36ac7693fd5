"""Training through either channel is the same training."""

import time

import pytest
import torch
from learn_helpers import bare_schema, sample_of, solve

from simlab.core.config import build
from simlab.core.errors import StoreError
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import FollowedStream
from simlab.learn.trainer import Trainer
from simlab.store.store import SnapshotStore
from simlab.store.stream import StreamChannel, StreamServer

T = 4
SCHEMA = bare_schema(n_times=T)
N = 30


def fill(path, first, last):
    store = SnapshotStore.create(path, SCHEMA, n=N, seed=515)
    with store.writer() as writer:
        for traj in range(first, last):
            trajectory = solve(SCHEMA, sample_of(SCHEMA, traj))
            writer.begin(trajectory.sample)
            for step in range(T):
                fields = {"u": trajectory.outputs["u"][step]}
                writer.append(traj, step, float(trajectory.times[step]), fields)
            writer.finish(traj)
    return store


def weights(where, seed=3):
    settings = {
        "operator": {"kind": "mlp", "hidden": (8,)},
        "buffer": {"kind": "reservoir", "capacity": 40, "threshold": 8},
        "n_batches": 40,
        "batch": 4,
        "threads": 1,
        "pilot": 5,
        "seed": seed,
    }
    trainer = Trainer(build(TrainSettings, settings), SCHEMA)
    stream = FollowedStream(where)
    trainer.run(stream)
    assert len(stream.finished) > 10
    return [value.clone() for value in trainer.model.network.state_dict().values()]


def test_weights_are_bit_equal(tmp_path):
    fill(tmp_path, 0, N)
    with StreamServer(tmp_path) as server:
        patient = [StreamChannel(server.endpoint, wait=30.0) for _ in range(2)]
        tail, stream = weights(tmp_path), weights(patient[0])
        other = weights(patient[1], seed=4)
    assert all(torch.equal(a, b) for a, b in zip(tail, stream, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tail, other, strict=True))


def items_of(stream):
    return [(item.traj, item.step, item.row.tobytes()) for item in stream.poll(9)]


def test_a_server_that_is_gone_for_a_while_ends_nothing(tmp_path):
    """Items equal those of the files, and the end is known only from an answer."""
    store = fill(tmp_path, 0, N)
    expected, tail = [], FollowedStream(tmp_path)
    while not tail.is_exhausted:
        expected += items_of(tail)
    assert len(expected) == T * len(store.ids("train"))
    found, n_stops = [], 0
    with StreamServer(tmp_path) as server:
        channel = StreamChannel(server.endpoint, wait=0.2, timeout=0.1)
        stream = FollowedStream(channel)
        found += items_of(stream)
    deadline = time.monotonic() + 60
    while not stream.is_exhausted:
        assert time.monotonic() < deadline
        for _ in range(8):
            found += items_of(stream)  # at most what was under way
        assert n_stops or not stream.is_exhausted
        time.sleep(0.1)
        n_stops += 1
        with StreamServer(tmp_path):
            for _ in range(30):
                found += items_of(stream)
                time.sleep(0.01)
    assert n_stops >= 1
    assert found == expected
    with pytest.raises(StoreError, match="directory"):
        stream.row(int(store.ids("train")[0]), 0)


def test_a_checkpoint_moves_from_one_channel_to_the_other(tmp_path):
    fill(tmp_path, 0, N)
    expected = FollowedStream(tmp_path)
    first, rest = FollowedStream(tmp_path), None
    with StreamServer(tmp_path) as server:
        rest = FollowedStream(server.endpoint)
        everything = [items_of(expected) for _ in range(8)]
        half = [items_of(first) for _ in range(3)]
        rest.load_state_dict(first.state_dict())
        half += [items_of(rest) for _ in range(5)]
    assert half == everything
