"""Single steps of a store by trajectory and step, wherever they are at the moment."""

import numpy as np
import pytest
from learn_helpers import bare_schema, field_schema, sample_of, solve

from simlab.core.errors import StoreError
from simlab.learn.encoding import Encoding
from simlab.learn.lookup import Committed, StoreSteps
from simlab.learn.stream import FollowedStream
from simlab.store.store import SnapshotStore


def write(writer, schema, traj, n_steps=None, fail=False):
    trajectory = solve(schema, sample_of(schema, traj))
    writer.begin(trajectory.sample)
    for step in range(len(schema.times) if n_steps is None else n_steps):
        fields = {name: values[step] for name, values in trajectory.outputs.items()}
        writer.append(traj, step, float(trajectory.times[step]), fields)
    if fail:
        writer.fail(traj, "diverged")
    else:
        writer.finish(traj)


@pytest.mark.parametrize("schema", [bare_schema(4), field_schema(6)], ids=["times", "inputs"])
def test_rows_before_while_and_after_sealing(schema, tmp_path):
    store, encoding = SnapshotStore.create(tmp_path / "s", schema, n=8, seed=31), Encoding(schema)
    steps = StoreSteps(SnapshotStore.open(store.path), encoding)
    with store.writer() as writer:
        for traj in range(6):
            write(writer, schema, traj)
        write(writer, schema, 6, 1, fail=True)

    def check():
        for traj in range(6):
            rows = encoding.rows(solve(schema, sample_of(schema, traj)))
            for step in reversed(range(len(rows))):
                np.testing.assert_array_equal(steps.row(traj, step), rows[step])
        row = encoding.rows(solve(schema, sample_of(schema, 6)))[0]
        np.testing.assert_array_equal(steps.row(6, 0), row)

    check()
    store.seal(final=True)
    check()  # the places in the segments, now gone, are not trusted
    steps = StoreSteps(SnapshotStore.open(store.path), encoding)
    check()
    with pytest.raises(StoreError, match="step 0 of trajectory 7"):
        steps.row(7, 0)


def test_the_archive_is_what_the_stream_found_finished(tmp_path):
    schema = bare_schema(3)
    store, encoding = SnapshotStore.create(tmp_path / "s", schema, n=12, seed=31), Encoding(schema)
    stream = FollowedStream(store.path)
    archive = Committed(stream.finished, 3, stream.row, encoding.row_size)
    assert len(archive) == 0
    with store.writer() as writer:
        for traj in range(12):
            write(writer, schema, traj)
        while stream.poll(9):
            pass
    ids = store.ids("train").tolist()
    assert sorted(stream.finished) == ids
    assert len(archive) == 3 * len(ids)
    found = {tuple(row) for row in archive.rows(np.arange(len(archive)))}
    wanted = [encoding.rows(solve(schema, sample_of(schema, traj))) for traj in ids]
    assert found == {tuple(row) for rows in wanted for row in rows}
    stream.rewind()
    assert len(archive) == 3 * len(ids)
    again = FollowedStream(store.path)
    again.load_state_dict(stream.state_dict())
    assert again.finished == stream.finished
