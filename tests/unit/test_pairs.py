"""Windows over time: each once, of one attempt, the same after a restart, and learned from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learn_helpers import field_schema, heat_schema, trajectories

from simlab.core.config import build
from simlab.core.errors import ConfigError
from simlab.learn.encoding import Encoding, Statistics
from simlab.learn.pairs import PairedStream, paired_schema
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import FollowedStream, MemoryStream
from simlab.learn.trainer import Trainer
from simlab.store.store import SnapshotStore

T = 6
SCHEMA = heat_schema(5, T)
DATA = trajectories(SCHEMA, 12)


def write(writer, traj, steps=range(T), shift=0.0, finish=True):
    trajectory = DATA[traj]
    writer.begin(trajectory.sample)
    for step in steps:
        fields = {name: values[step] + shift for name, values in trajectory.outputs.items()}
        writer.append(traj, step, float(trajectory.times[step]), fields)
    if finish:
        writer.finish(traj)


def drain(stream, at_most=7):
    items, quiet = [], 0
    while quiet < 3:
        new = stream.poll(at_most)
        quiet = 0 if new else quiet + 1
        items += new
    return items


@pytest.mark.parametrize("ahead", [1, 3, T - 1])
def test_windows_hold_what_their_schema_says(ahead):
    stream = PairedStream(MemoryStream(DATA, SCHEMA, 5), ahead)
    encoding = Encoding(stream.schema)
    items = drain(stream)
    keys = sorted((item.traj, item.step) for item in items)
    assert keys == [(traj, step) for traj in range(12) for step in range(T - ahead)]
    assert stream.n_items == len(items)
    assert not any(stream._held.values())  # nothing is kept longer than it is needed
    for item in items:
        trajectory = DATA[item.traj]
        parts = encoding.split(item.row[None])
        fields = encoding.decode(parts.outputs)
        for k in range(1, ahead + 1):
            for name, values in trajectory.outputs.items():
                np.testing.assert_array_equal(fields[f"{name}_next{k}"][0], values[item.step + k])
        now = np.concatenate(
            [
                trajectory.outputs["u"][item.step][None],
                np.moveaxis(trajectory.outputs["flux"][item.step], -1, 0),
            ]
        )
        np.testing.assert_array_equal(parts.fields[0], now)
        wanted = list(trajectory.sample.parameters.values())
        np.testing.assert_allclose(parts.parameters[0], wanted, rtol=1e-6)
        if T - ahead > 1:
            assert parts.time[0, 0] == np.float32(trajectory.times[item.step])
        np.testing.assert_array_equal(stream.row(item.traj, item.step), item.row)


def test_windows_never_cross_attempts(tmp_path):
    """The second attempt differs by 100, so a mixed window would show."""
    store = SnapshotStore.create(tmp_path / "s", SCHEMA, n=12, seed=77)
    traj = int(store.ids("train")[0])
    stream = PairedStream(FollowedStream(store.path), 2)
    writer = store.writer()
    write(writer, traj, range(4), finish=False)
    first = drain(stream)
    writer.close()
    store.recover()
    with store.writer() as again:
        write(again, traj, shift=100.0)
        second = drain(stream)
    assert [item.step for item in first] == [0, 1]
    assert [item.step for item in second] == []  # steps 4 and 5 alone are no window of three
    assert {item.attempt for item in first} == {1}


def test_later_windows_of_the_second_attempt_come(tmp_path):
    store = SnapshotStore.create(tmp_path / "s", SCHEMA, n=12, seed=77)
    traj = int(store.ids("train")[0])
    stream = PairedStream(FollowedStream(store.path), 1)
    writer = store.writer()
    write(writer, traj, range(2), finish=False)
    first = drain(stream)
    writer.close()
    store.recover()
    with store.writer() as again:
        write(again, traj, shift=100.0)
        second = drain(stream)
    assert [item.step for item in first + second] == [0, 2, 3, 4]
    encoding = Encoding(stream.schema)
    for item in second:
        parts = encoding.split(item.row[None])
        jump = parts.outputs[0, 0] - parts.fields[0, 0]
        assert np.abs(jump).max() < 50


@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 30))
@settings(max_examples=20, deadline=None)
def test_restart_at_any_moment(ahead, at_most, cut):
    straight = drain(PairedStream(MemoryStream(DATA, SCHEMA, 5), ahead), at_most)
    one = PairedStream(MemoryStream(DATA, SCHEMA, 5), ahead)
    items = []
    for _ in range(cut):
        items += one.poll(at_most)
    two = PairedStream(MemoryStream(DATA, SCHEMA, 5), ahead)
    two.load_state_dict(one.state_dict())
    items += drain(two, at_most)
    assert [(i.traj, i.step) for i in items] == [(i.traj, i.step) for i in straight]
    assert all(np.array_equal(a.row, b.row) for a, b in zip(items, straight, strict=True))


def test_pilot_is_that_of_the_first_windows():
    stream = PairedStream(MemoryStream(DATA[::-1], SCHEMA, 5), 2)
    assert stream.pilot(3) is None
    items = drain(stream)
    encoding = Encoding(stream.schema)
    rows = [item.row for item in items if item.traj < 3]
    found, wanted = stream.pilot(3), Statistics.of(encoding, np.stack(rows))
    for name in ("count", "total", "square"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("mode", ["live", "deterministic"])
def test_training_on_windows_resumes_bit_for_bit(mode, tmp_path):
    schema = paired_schema(SCHEMA, 2)
    settings = build(
        TrainSettings,
        {
            "operator": {"kind": "fno", "modes": 2, "width": 4, "layers": 1},
            "buffer": {"kind": "replay", "capacity": 20},
            "n_batches": 20,
            "batch": 4,
            "threads": 1,
            "pilot": 3,
            "mode": mode,
        },
    )
    straight = Trainer(settings, schema)
    straight.run(PairedStream(MemoryStream(DATA, SCHEMA, 5), 2))
    for part in (8, 20):
        trainer = Trainer(settings, schema, tmp_path / "m")
        stream = PairedStream(MemoryStream(DATA, SCHEMA, 5), 2)
        trainer.resume(stream)
        trainer.run(stream, stop=lambda t=trainer, n=part: t.batch >= n)
    other = trainer.model.tensors()
    assert all(torch.equal(v, other[n]) for n, v in straight.model.tensors().items())


@pytest.mark.parametrize("ahead", [0, T])
def test_windows_longer_than_trajectories_are_refused(ahead):
    with pytest.raises(ConfigError, match=f"windows of {ahead} steps ahead need"):
        paired_schema(SCHEMA, ahead)
    with pytest.raises(ConfigError, match="has 1"):
        paired_schema(field_schema(4), 1)
