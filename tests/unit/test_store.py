"""The store through its public interface: writing, sealing, reading, following, counting."""

import json
import multiprocessing
import os
import pickle

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_helpers import (
    Reader,
    assert_split_is_exact,
    make_mesh,
    make_schema,
    sample_of,
    step_of,
    write,
)

from simlab.core.errors import ConfigError, SchemaError, StoreError
from simlab.core.reports import Provenance
from simlab.core.samples import Sample
from simlab.store import files
from simlab.store.follow import Position
from simlab.store.schema import Axis, FieldSpec, Schema
from simlab.store.splits import assign
from simlab.store.stats import Moments
from simlab.store.store import SnapshotStore

SEED = 71093


@pytest.fixture
def schema():
    return make_schema()


@pytest.fixture
def store(tmp_path, schema):
    return SnapshotStore.create(tmp_path / "store", schema, n=20, seed=SEED, config={"case": "toy"})


def fill(store, trajs, **options):
    with store.writer(**options) as writer:
        for traj in trajs:
            write(writer, store.schema, traj)


def test_round_trip_is_exact_and_ordered(store):
    fill(store, reversed(range(20)), segment_bytes=9000)
    made = store.seal(final=True, shard_bytes=20_000)
    assert len(made) > 3  # several shards of a split
    assert store.verify(deep=True) == []
    ids = []
    for name in ("train", "valid", "test"):
        split = store.split(name)
        assert split.ids.tolist() == store.ids(name).tolist()
        assert all(store.split_of(traj) == name for traj in split.ids.tolist())
        assert_split_is_exact(store.schema, split)
        ids += split.ids.tolist()
    assert sorted(ids) == list(range(20))
    assert os.listdir(store.path / "inflight") == ["seal.lock"]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("n_steps", [1, 4])
def test_round_trip_of_tensors_and_meshes(tmp_path, dims, n_steps):
    schema = make_schema(dims, n_steps, mesh=make_mesh(), tensor=True)
    store = SnapshotStore.create(tmp_path / "s", schema, n=10, seed=5)
    fill(store, range(10))
    store.seal(final=True)
    again = SnapshotStore.open(tmp_path / "s")
    assert np.array_equal(again.schema.mesh.points, schema.mesh.points)
    assert np.array_equal(again.schema.mesh.cells["quad"], schema.mesh.cells["quad"])
    reader = Reader(schema)
    reader.drain(again, 7)
    assert reader.done() == set(range(10))
    for name in ("train", "valid", "test"):
        assert_split_is_exact(schema, again.split(name))
    shard = next((tmp_path / "s" / "data" / "test").glob("*.h5"))
    with h5py.File(shard) as file:
        assert file["mesh/fields/w"].dtype == np.float64
        assert file["mesh/fields/w"].shape == (1, n_steps, 6)


def test_arrays_stack_everything(store):
    fill(store, range(20), segment_bytes=5000)
    store.seal(final=True)
    split = store.split("train")
    arrays = split.arrays()
    assert arrays["k"].shape == (16, 7, 5)
    assert arrays["q"].shape == (16, 3, 7, 5, 2)
    assert arrays["u"].dtype == np.float32
    for i in (0, 7, 15):
        one = split[i]
        assert arrays["mu"][i] == one.sample.parameters["mu"]
        assert np.array_equal(arrays["k"][i], one.sample.fields["k"])
        assert np.array_equal(arrays["q"][i], one.outputs["q"])
    part = split[3:9:2]
    assert part.ids.tolist() == split.ids[3:9:2].tolist()
    assert np.array_equal(part.arrays()["u"], arrays["u"][3:9:2])
    assert np.array_equal(pickle.loads(pickle.dumps(split))[2].outputs["u"], split[2].outputs["u"])
    with pytest.raises(IndexError):
        split[16]


def test_create_is_idempotent_and_refuses_another_campaign(tmp_path, schema):
    make = {"n": 20, "seed": SEED, "config": {"solver": {"rtol": 1e-8}}}
    first = SnapshotStore.create(tmp_path / "s", schema, **make)
    again = SnapshotStore.create(tmp_path / "s", schema, **make)
    assert again.uuid == first.uuid
    with pytest.raises(ConfigError, match=r"config\.solver\.rtol: 1e-08 -> 1e-06"):
        SnapshotStore.create(
            tmp_path / "s", schema, **make | {"config": {"solver": {"rtol": 1e-6}}}
        )
    with pytest.raises(ConfigError, match="n: 20 -> 21"):
        SnapshotStore.create(tmp_path / "s", schema, **make | {"n": 21})
    other = make_schema(n_steps=4)
    with pytest.raises(ConfigError, match=r"spec\.times"):
        SnapshotStore.create(tmp_path / "s", other, **make)
    with pytest.raises(ConfigError, match=r"split\.holdout"):
        SnapshotStore.create(tmp_path / "t", schema, n=3, seed=1, split={"holdout": 1.0})


def test_a_split_without_a_share_is_empty(tmp_path, schema):
    store = SnapshotStore.create(tmp_path / "s", schema, n=3, seed=SEED, split={"train": 1.0})
    fill(store, range(3))
    store.seal(final=True)
    assert len(store.split("train")) == 3
    assert len(store.split("valid")) == 0
    assert store.split("test").arrays()["u"].shape == (0, 3, 7, 5)
    with pytest.raises(ConfigError, match="no split 'holdout'"):
        store.split("holdout")


def test_open_refuses_what_is_not_a_store(tmp_path, store):
    with pytest.raises(StoreError, match="not a store"):
        SnapshotStore.open(tmp_path / "nothing")
    campaign = store.path / "campaign.json"
    campaign.write_text(campaign.read_text().replace('"n": 20', '"n": 30'))
    with pytest.raises(StoreError, match=r"campaign\.json was changed"):
        SnapshotStore.open(store.path)


def test_writer_refuses_what_does_not_fit(store, schema):
    good = step_of(schema, 3, 0)
    with store.writer() as writer:
        with pytest.raises(SchemaError, match="trajectories 0 to 19"):
            writer.begin(sample_of(schema, 20))
        with pytest.raises(SchemaError, match="no parameter mu"):
            writer.begin(Sample(3, SEED, {"nu": 1.0}, sample_of(schema, 3).fields))
        writer.begin(sample_of(schema, 3))
        with pytest.raises(StoreError, match="open already"):
            writer.begin(sample_of(schema, 3))
        for bad, message in [
            (good | {"u": good["u"][:-1]}, "'u' has shape"),
            (good | {"u": np.where(good["u"] > 9, 0, np.nan)}, "35 values that are not finite"),
            (good | {"u": np.full((7, 5), 1e39)}, "beyond float32"),
            ({"u": good["u"]}, "u, q expected"),
        ]:
            with pytest.raises(SchemaError, match=message):
                writer.append(3, 0, 0.0, bad)
        with pytest.raises(SchemaError, match="expected step 0"):
            writer.append(3, 1, 0.25, good)
        with pytest.raises(SchemaError, match=r"time 0\.3"):
            writer.append(3, 0, 0.3, good)
        writer.append(3, 0, 0.0, good)
        with pytest.raises(SchemaError, match="1 of 3 steps"):
            writer.finish(3)
        with pytest.raises(StoreError, match="not open"):
            writer.append(4, 0, 0.0, good)
        writer.fail(3, "enough")
        with pytest.raises(StoreError, match="attempt 1 is not above"):
            writer.begin(sample_of(schema, 3), attempt=1)
    with pytest.raises(StoreError, match="closed"):
        writer.begin(sample_of(schema, 4))
    assert store.failed() == {3: "enough"}


def test_large_float32_values_whose_sum_overflows_are_accepted(store, schema):
    values = {name: np.full_like(item, 3e38) for name, item in step_of(schema, 1, 0).items()}
    with store.writer() as writer:
        writer.begin(sample_of(schema, 1))
        for step, time in enumerate(schema.times):
            writer.append(1, step, time, values)
        writer.finish(1)
    assert store.done() == {1}


def test_several_trajectories_open_at_once(store, schema):
    with store.writer(segment_bytes=4000) as writer:
        for group in range(0, 20, 5):
            trajs = range(group, group + 5)
            for traj in trajs:
                writer.begin(sample_of(schema, traj))
            for step, time in enumerate(schema.times):
                for traj in trajs:
                    writer.append(traj, step, time, step_of(schema, traj, step))
            for traj in reversed(trajs):
                writer.finish(traj)
        assert store.seal() != []  # full segments are sealed while the writer lives
    store.seal(final=True)
    assert_split_is_exact(schema, store.split("train"))
    assert len(store.done()) == 20
    assert store.verify(deep=True) == []


def test_seal_leaves_open_segments_of_live_writers_alone(store, schema):
    with store.writer() as writer:
        write(writer, schema, 0)
        writer.begin(sample_of(schema, 1))
        assert store.seal() == []
        assert store.seal(final=True) == []
        assert store.recover().truncated == {}
        assert store.status().n_unsealed == 1
        for step, time in enumerate(schema.times):
            writer.append(1, step, time, step_of(schema, 1, step))
        writer.finish(1)
    assert len(store.seal(final=True)) >= 1
    assert store.done() == {0, 1}


def test_status_counts_every_state(store, schema):
    with store.writer() as writer:
        for traj in range(6):
            write(writer, schema, traj)
        write(writer, schema, 6, n_steps=2)
        writer.fail(6, "diverged at step 2")
        writer.begin(sample_of(schema, 7))
        writer.fail(7, "no preconditioner")
        writer.begin(sample_of(schema, 8))
        status = store.status()
        total = {
            key: sum(getattr(item, key) for item in status.splits.values())
            for key in ("done", "failed", "in_flight", "missing")
        }
        assert total == {"done": 6, "failed": 2, "in_flight": 1, "missing": 11}
        assert status.n_unsealed == 6
        assert not store.is_complete()
    store.seal(final=True)
    again = SnapshotStore.open(store.path)
    assert again.done() == set(range(6))
    assert again.failed() == {6: "diverged at step 2", 7: "no preconditioner"}
    assert again.status().n_unsealed == 0
    assert sum(item.in_flight for item in again.status().splits.values()) == 0
    with again.writer() as writer:
        assert write(writer, schema, 6) == 2  # a failed one may be tried again
        assert write(writer, schema, 8) == 2  # so may one that was abandoned
    again.seal(final=True)
    assert again.failed() == {7: "no preconditioner"}
    shard = next((store.path / "data" / "failed").glob("*.h5"))
    with h5py.File(shard) as file:
        assert file["t0_fields/u"].shape == (1, 2, 7, 5)
        assert file["simlab/reason"].asstr()[0] == "diverged at step 2"


def test_a_higher_attempt_supersedes(store, schema):
    fill(store, [4])
    store.seal(final=True)
    with store.writer() as writer:
        writer.begin(sample_of(schema, 4), provenance={"why": "again"})
        for step, time in enumerate(schema.times):
            fields = {name: values + 1 for name, values in step_of(schema, 4, step).items()}
            writer.append(4, step, time, fields)
        writer.finish(4)
    store.seal(final=True)
    split = store.split(store.split_of(4))
    assert split.ids.tolist() == [4]
    expected = (step_of(schema, 4, 2)["u"] + 1).astype(np.float32)
    assert np.array_equal(split[0].outputs["u"][2], expected)
    assert store.status().n_superseded == 1
    assert store.verify(deep=True) == []


def test_provenance_and_solver_log_are_kept(store, schema):
    with store.writer() as writer:
        writer.begin(sample_of(schema, 2), provenance={"solver": "cg", "host": "here"})
        for step, time in enumerate(schema.times):
            solve = Provenance(7, 1, 5 + step, 6 + step, 4 + step, 1e-9, 0.25, "cg+icc")
            writer.append(2, step, time, step_of(schema, 2, step), solve=solve)
        writer.finish(2)
    (name,) = store.seal(final=True)
    with h5py.File(store.path / "data" / name) as file:
        assert json.loads(file["simlab/trajectory_provenance"].asstr()[0])["solver"] == "cg"
        assert json.loads(file["simlab/provenance"].asstr()[()]) == {"case": "toy"}
        assert file["solve/its"][0].tolist() == [5, 6, 7]
        assert file["solve/op_applies"][0].tolist() == [6, 7, 8]
        assert file["solve/pc_applies"][0].tolist() == [4, 5, 6]
        assert file["solve/true_relres"][0].tolist() == [1e-9] * 3
        assert file["solve/cpu_s"][0].tolist() == [0.25] * 3
        assert file["solve/order"][0].tolist() == [7] * 3
        assert file["solve/chain"][0].tolist() == [1] * 3
        assert file["solve/solver"][0].tolist() == [0] * 3
        assert file["solve"].attrs["solver"].tolist() == [b"cg+icc"]
        assert file["t0_fields/u"].attrs["cast_to"] == "float32"


@settings(max_examples=40, deadline=None)
@given(st.integers(-5, 2**40), st.integers(10, 400))
def test_splits_are_stable_and_balanced(seed, n):
    fractions = {"train": 0.8, "valid": 0.1, "test": 0.1}
    which = assign(np.arange(n), seed, fractions)
    full = n - n % 10
    assert np.bincount(which[:full], minlength=3).tolist() == [
        8 * full // 10,
        full // 10,
        full // 10,
    ]
    assert np.array_equal(which, assign(np.arange(n + 37), seed, fractions)[:n])
    assert assign(np.array([n - 1]), seed, fractions)[0] == which[-1]


def test_splits_of_any_fractions_meet_them():
    ids = np.arange(20_000)
    which = assign(ids, 9, {"train": 0.63, "valid": 0.04, "test": 0.33})
    assert np.bincount(which) / len(ids) == pytest.approx([0.63, 0.04, 0.33], abs=2e-3)
    assert not np.array_equal(which, assign(ids, 10, {"train": 0.63, "valid": 0.04, "test": 0.33}))
    assert set(assign(ids, 9, {"train": 1.0}).tolist()) == {0}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40), st.integers(1, 39))
def test_moments_merge_to_those_of_the_whole(values, cut):
    values = np.array(values).reshape(-1, 1)
    cut = min(cut, len(values) - 1)
    both = Moments.of(values[:cut], 1) + Moments.of(values[cut:], 1)
    whole = Moments.of(values, 1)
    assert (both.count, both.low, both.high) == (whole.count, whole.low, whole.high)
    assert both.mean == pytest.approx(whole.mean, abs=1e-9)
    assert both.std == pytest.approx(values.std(axis=0), abs=1e-6)
    again = Moments.from_json(json.loads(json.dumps(both.to_json())))
    assert np.array_equal(again.mean, both.mean)


def test_stats_are_those_of_the_train_split(store):
    fill(store, range(20), segment_bytes=5000)
    store.seal(final=True)
    found = store.stats()
    arrays = store.split("train").arrays()
    q = arrays["q"].astype(np.float64)
    assert found["mean"]["q"] == pytest.approx(q.mean(axis=(0, 1, 2, 3)), rel=1e-12)
    assert found["std"]["q"] == pytest.approx(q.std(axis=(0, 1, 2, 3)), rel=1e-12)
    assert found["std"]["k"] == pytest.approx(arrays["k"].astype(np.float64).std(), rel=1e-12)
    delta = np.diff(q, axis=1)
    assert found["rms_delta"]["q"] == pytest.approx(np.sqrt((delta**2).mean(axis=(0, 1, 2, 3))))
    assert found["mean_delta"]["q"] == pytest.approx(delta.mean(axis=(0, 1, 2, 3)))


# Following


def test_follow_across_sealing_with_json_positions(store, schema):
    reader, late = Reader(schema), Reader(schema)
    rng = np.random.default_rng(17)
    other = SnapshotStore.open(store.path)
    with store.writer(segment_bytes=6000) as writer:
        for traj in range(20):
            write(writer, schema, traj)
            reader.pull(other, int(rng.integers(1, 8)))
            reader.position = Position.from_json(json.loads(json.dumps(reader.position.to_json())))
            if traj % 6 == 5:
                store.seal()
                other = SnapshotStore.open(store.path)
    store.seal(final=True)
    reader.drain(other, 3)
    late.drain(SnapshotStore.open(store.path), 5)
    for one in (reader, late):
        assert one.done() == set(range(20))
        assert set(one.steps.values()) == {3}
        assert one.pull(other, 10) == 0


@pytest.mark.parametrize("at_most", [1, 2, 3, 5, 8, 100])
def test_follow_in_the_middle_of_trajectories_when_they_are_sealed(store, schema, at_most):
    """Some trajectories ended, some half read, some not begun when their segment goes."""
    with store.writer() as writer:
        for traj in range(4):
            writer.begin(sample_of(schema, traj))
        for step, time in enumerate(schema.times):
            for traj in range(4):
                writer.append(traj, step, time, step_of(schema, traj, step))
        for traj in (2, 0, 3, 1):
            writer.finish(traj)
        write(writer, schema, 9)
    for head in range(1, 26):
        reader = Reader(schema)
        reader.pull(store, head)
        if head == 13:
            middle = reader
    store.seal(final=True)
    middle.drain(store, at_most)
    assert middle.done() == {0, 1, 2, 3, 9}
    assert middle.position.open == {}


def test_follow_ignores_lower_attempts_and_reports_the_abandoned(store, schema):
    reader = Reader(schema)
    writer = store.writer()
    write(writer, schema, 6, n_steps=2)
    write(writer, schema, 7, n_steps=1)
    reader.drain(store)
    writer.close()
    with store.writer() as writer:
        assert write(writer, schema, 6) == 2
    reader.drain(store)
    store.seal(final=True)
    reader.drain(store)
    assert reader.ends == {6: "done", 7: "abandoned"}
    with store.writer() as writer:
        assert write(writer, schema, 7) == 2  # the attempt is remembered though its segment is gone
    reader.drain(store)
    assert reader.ends == {6: "done", 7: "done"}


def test_follow_shows_failures(store, schema):
    reader, late = Reader(schema), Reader(schema)
    with store.writer() as writer:
        write(writer, schema, 1, n_steps=2)
        writer.begin(sample_of(schema, 2))
        reader.drain(store)
        writer.fail(1, "diverged")
        writer.fail(2, "no start")
    store.seal(final=True)
    reader.drain(store)
    late.drain(store)
    assert reader.ends == {1: "failed", 2: "failed"}
    assert late.ends == {1: "failed"}  # the other one left no data
    assert late.steps == {1: 2}


def test_follow_refuses_nonsense(store, tmp_path, schema):
    _, position = store.follow(None, 1)
    with pytest.raises(StoreError, match="at least one"):
        store.follow(position, 0)
    other = SnapshotStore.create(tmp_path / "other", schema, n=20, seed=SEED)
    with pytest.raises(StoreError, match="another store"):
        other.follow(position, 1)


def test_follow_is_fair_to_many_writers(store, schema):
    writers = [store.writer() for _ in range(3)]
    for number, writer in enumerate(writers):
        for traj in range(5 * number, 5 * number + 5):
            write(writer, schema, traj)
    reader = Reader(schema)
    reader.pull(store, 15)
    assert sorted(len([t for t in reader.steps if t // 5 == k]) for k in range(3)) == [1, 1, 1]
    for writer in writers:
        writer.close()
    reader.drain(store, 1)
    assert reader.done() == set(range(15))


def test_ids_of_writers_are_unique_and_tell_who_lives(tmp_path):
    names = {files.process_id() for _ in range(100)}
    assert len(names) == 100
    path = tmp_path / "x.seg"
    path.touch()
    host, _, key, number = files.process_id().split("-")
    init = f"{host}-1-{key}-{number}"
    assert not files.is_alive(init, path)  # pid 1 lives, but it is not the process that was meant
    foreign = f"elsewhere-1-{key}-{number}"
    assert files.is_alive(foreign, path)  # touched just now
    os.utime(path, (1, 1))
    assert not files.is_alive(foreign, path)


def test_schema_refuses_ambiguous_names():
    axis = (Axis("x", (0.0, 1.0)),)
    with pytest.raises(SchemaError, match="u names both"):
        Schema("s", axis, (FieldSpec("u"),), parameters={"u": "1"})
    with pytest.raises(SchemaError, match="no '/'"):
        Schema("s", axis, (FieldSpec("u/v"),))


def _write_and_seal(path, trajs, barrier):
    """What one of several group roots does at the end of its chain."""
    store = SnapshotStore.open(path)
    with store.writer(segment_bytes=2000) as writer:
        for traj in trajs:
            write(writer, store.schema, traj)
    barrier.wait(30)
    assert store.seal(final=True, writer=writer.id)


def test_writers_seal_their_own_segments_side_by_side(tmp_path, schema):
    store = SnapshotStore.create(tmp_path / "many", schema, n=60, seed=SEED)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    parts = [range(k, 60, 3) for k in range(3)]
    workers = [
        context.Process(target=_write_and_seal, args=(store.path, part, barrier)) for part in parts
    ]
    with store.writer() as other:  # a live writer's segment is nobody else's business
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert store.is_complete()
        assert store.status().n_unsealed == 0
        assert other.id
    store.seal(final=True)
    assert not store.verify(deep=True)
    for name in store.fractions:
        assert store.split(name).ids.tolist() == store.ids(name).tolist()
        assert_split_is_exact(schema, store.split(name))
    assert (store.path / "stats.yaml").is_file()
