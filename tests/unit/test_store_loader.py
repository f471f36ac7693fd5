"""The native loader: the same values as the store, in an order that is random, fixed, resumable."""

import json
import os
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
from store_helpers import SEED, make_mesh, make_schema, sample_of, step_of, write

from simlab.core.errors import ConfigError, StoreError
from simlab.store import loader_files
from simlab.store.loader import Cursor, Loader
from simlab.store.storage import PROFILES, Storage
from simlab.store.store import SnapshotStore


def campaign(path, schema, n=20, shard_bytes=20_000, storage=None):
    store = SnapshotStore.create(path, schema, n=n, seed=SEED, storage=storage)
    with store.writer(segment_bytes=9000) as writer:
        for traj in reversed(range(n)):
            write(writer, schema, traj)
    store.seal(final=True, shard_bytes=shard_bytes)
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    schema = make_schema(2, 5, tensor=True, mesh=make_mesh())
    return campaign(tmp_path_factory.mktemp("loader") / "store", schema)


def repacked(store, **layout):
    """Lay the output ``u`` of the train shards out otherwise; sizes in the catalogue follow."""
    for shard in store.catalogue.live_shards:
        if shard.split != "train":
            continue
        path = store.path / "data" / shard.name
        with h5py.File(path, "r+") as file:
            values, attrs = file["t0_fields/u"][:], dict(file["t0_fields/u"].attrs)
            del file["t0_fields/u"]
            file.create_dataset("t0_fields/u", data=values, **layout).attrs.update(attrs)
        shard.n_bytes = path.stat().st_size
    return store


def numbers(batches):
    return [pair for batch in batches for pair in zip(batch.ids, batch.steps, strict=True)]


def assert_windows_are_exact(loader, found):
    schema = loader.schema
    for i, (traj, step) in enumerate(zip(found.ids.tolist(), found.steps.tolist(), strict=True)):
        sample = sample_of(schema, traj)
        assert found.parameters[i].tolist() == [sample.parameters[p] for p in schema.parameters]
        assert found.times[i].tolist() == list(schema.times[step : step + 1 + loader.ahead])
        for name, values in found.inputs.items():
            assert np.array_equal(values[i], sample.fields[name].astype(values.dtype))
        for name, values in found.outputs.items():
            assert values.shape[1] == 1 + loader.ahead
            for later in range(1 + loader.ahead):
                expected = step_of(schema, traj, step + later)[name].astype(values.dtype)
                assert np.array_equal(values[i, later], expected)


@pytest.mark.parametrize("ahead", [0, 1, 4])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_windows_are_what_was_stored(store, split, ahead):
    loader = Loader(store, split, ahead=ahead, shuffle=False)
    assert len(loader) == len(store.ids(split)) * (5 - ahead)
    found = loader.read(np.arange(len(loader)))
    assert_windows_are_exact(loader, found)
    assert found.outputs["w"].dtype == np.float64
    assert found.outputs["u"].dtype == np.float32
    assert list(zip(found.ids, found.steps, strict=True)) == [
        (traj, step) for traj in store.ids(split) for step in range(5 - ahead)
    ]


def test_values_equal_the_split_bit_for_bit(store):
    split = store.split("train")
    loader = Loader(store, "train", ahead=4, shuffle=False)
    found, arrays = loader.read(range(len(loader))), split.arrays()
    assert found.ids.tolist() == split.ids.tolist()
    for name, values in (found.inputs | found.outputs).items():
        assert values.tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize(
    ("layout", "is_mapped"),
    [
        ({}, True),
        ({"chunks": (1, 1, 7, 5)}, True),
        ({"chunks": (3, 3, 7, 5), "fletcher32": True}, True),
        ({"chunks": (1, 2, 7, 5), "compression": "gzip"}, False),
        ({"chunks": (1, 2, 4, 5)}, False),
    ],
    ids=["contiguous", "chunk-a-step", "uneven-chunks", "compressed", "chunks-cut-steps"],
)
def test_every_layout_gives_the_same(tmp_path, layout, is_mapped):
    store = repacked(campaign(tmp_path / "s", make_schema(2, 5), shard_bytes=1 << 20), **layout)
    for cache_bytes in (0, 3000, 1 << 30):
        loader = Loader(store, "train", ahead=2, seed=7, cache_bytes=cache_bytes)
        for batch in loader.batches(10, epochs=2):  # the second time from what is kept
            assert_windows_are_exact(loader, batch)
    assert {reader.is_mapped for reader in loader._readers.values()} == {is_mapped}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_gives_the_same(tmp_path, profile):
    schema = make_schema(2, 5, mesh=make_mesh())
    store = campaign(tmp_path / "s", schema, 10, 1 << 20, Storage(profile, float64=True))
    loader = Loader(store, "train", ahead=2, seed=7)
    for batch in loader.batches(10):
        assert_windows_are_exact(loader, batch)
    assert {reader.is_mapped for reader in loader._readers.values()} == {profile != "archive"}


def test_chosen_fields_only(store):
    loader = Loader(store, "train", fields=["u"])
    found = loader.read([3])
    assert list(found.outputs) == ["u"]
    assert found.inputs == {}
    with pytest.raises(ConfigError, match="no field v; there are k, u"):
        Loader(store, "train", fields=["v"])
    with pytest.raises(ConfigError, match="ahead = -1"):
        Loader(store, ahead=-1)
    with pytest.raises(IndexError, match="of 80"):
        loader.read([80])


def test_too_short_trajectories_have_no_window(store):
    loader = Loader(store, "train", ahead=5)
    assert len(loader) == 0
    assert list(loader.batches(3, epochs=4)) == []
    assert "0 windows" in repr(loader)


def test_an_epoch_is_a_permutation_of_its_own(store):
    loader = Loader(store, "train", ahead=1, seed=7)
    n = len(loader)
    first, second = loader.order(0).copy(), loader.order(1).copy()
    for order in (first, second):
        assert sorted(order.tolist()) == list(range(n))
    assert first.tolist() != second.tolist() != list(range(n))
    assert np.array_equal(Loader(store, "train", ahead=1, seed=7).order(1), second)
    assert not np.array_equal(Loader(store, "train", ahead=1, seed=8).order(1), second)
    assert Loader(store, "train", shuffle=False).order(3).tolist() == list(range(80))


@pytest.mark.parametrize("stop", [0, 1, 5, 8, 11])
def test_a_resumed_run_equals_a_straight_one(store, stop):
    straight = numbers(Loader(store, "train", ahead=1, seed=7).batches(9, epochs=2))
    assert len(straight) == 2 * 64
    assert len(set(straight[:64])) == len(set(straight[64:])) == 64
    batches = Loader(store, "train", ahead=1, seed=7).batches(9, epochs=2)
    cursor, before = None, []
    for _ in range(stop):
        batch = next(batches)
        before += numbers([batch])
        cursor = Cursor.from_json(json.loads(json.dumps(batch.cursor.to_json())))
    left = 2 - (cursor.epoch if cursor else 0)
    again = Loader(SnapshotStore.open(store.path), "train", ahead=1, seed=7)
    assert before + numbers(again.batches(9, cursor, epochs=left)) == straight


def test_parts_take_batches_in_turn(store):
    loader = Loader(store, "train", ahead=1, seed=7)
    cursor = next(loader.batches(10)).cursor
    whole = [batch.ids.tolist() for batch in loader.batches(10, cursor, epochs=3)]
    parts = [
        [batch.ids.tolist() for batch in loader.batches(10, cursor, epochs=3, part=(i, 4))]
        for i in range(4)
    ]
    assert [parts[i % 4][i // 4] for i in range(len(whole))] == whole
    assert sum(map(len, parts)) == len(whole)
    with pytest.raises(ConfigError, match="part 4 of 4"):
        next(loader.batches(10, part=(4, 4)))


def test_a_position_of_other_windows_is_refused(tmp_path):
    schema = make_schema(1, 3)
    store = SnapshotStore.create(tmp_path / "s", schema, n=20, seed=SEED)
    with store.writer() as writer:
        for traj in range(10):
            write(writer, schema, traj)
    store.seal(final=True)
    early = Loader(store, "train", seed=7)
    cursor = next(early.batches(5)).cursor
    with store.writer() as writer:
        for traj in range(10, 20):
            write(writer, schema, traj)
    store.seal(final=True)
    assert len(pickle.loads(pickle.dumps(early))) == len(early) == 24
    for other in (Loader(store, "train", seed=7), Loader(store, "valid", seed=7)):
        with pytest.raises(StoreError, match="more was sealed since"):
            next(other.batches(5, cursor))
    assert len(numbers(early.batches(5, cursor))) == 19


def test_the_higher_attempt_is_read(tmp_path):
    schema = make_schema(1, 3)
    store = SnapshotStore.create(tmp_path / "s", schema, n=10, seed=SEED)
    with store.writer() as writer:
        writer.begin(sample_of(schema, 4))
        zeros = {spec.name: np.zeros(schema.field_shape(spec)) for spec in schema.outputs}
        for step in range(3):
            writer.append(4, step, schema.times[step], zeros)
        writer.finish(4)
    store.seal(final=True)
    with store.writer() as writer:
        for traj in range(10):
            write(writer, schema, traj)
    store.seal(final=True)
    loader = Loader(store, store.split_of(4), ahead=2)
    for batch in loader.batches(3):
        assert_windows_are_exact(loader, batch)


def test_no_file_is_opened_to_count(store, tmp_path):
    loader = Loader(store, "train", ahead=1)
    hidden = store.path / "data-hidden"
    (store.path / "data").rename(hidden)
    try:
        other = Loader(SnapshotStore.open(store.path), "train", ahead=1)
        assert len(other) == len(loader) == 64
        with pytest.raises(StoreError, match="simlab store verify"):
            other.read([0])
    finally:
        hidden.rename(store.path / "data")


def test_damage_is_found_at_the_first_reading(tmp_path):
    store = campaign(tmp_path / "s", make_schema(1, 4), n=10, shard_bytes=1 << 20)
    path = next((store.path / "data/train").glob("*.h5"))
    with h5py.File(path) as file:
        offset = file["t0_fields/u"].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as stream:
        stream.seek(offset + 5)
        byte = stream.read(1)
        stream.seek(offset + 5)
        stream.write(bytes([byte[0] ^ 4]))
    with pytest.raises(StoreError, match="field 'u', row 0, step 0 is not what was sealed"):
        list(Loader(store, "train").batches(50))
    assert len(numbers(Loader(store, "train", check=False).batches(50))) == 32


def test_a_file_of_another_size_is_not_mapped(tmp_path):
    store = campaign(tmp_path / "s", make_schema(1, 4), n=10, shard_bytes=1 << 20)
    path = next((store.path / "data/train").glob("*.h5"))
    size = path.stat().st_size
    with open(path, "ab") as stream:
        stream.write(b"tail")
    with pytest.raises(StoreError, match=f"has {size + 4} bytes, sealed were {size}"):
        Loader(store, "train").read([0])
    with open(path, "r+b") as stream:
        stream.truncate(size - 4096)
    with pytest.raises(StoreError, match="cannot be read"):
        Loader(store, "train").read([0])


def test_few_handles_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_files, "MAX_HANDLES", 3)
    store = campaign(tmp_path / "s", make_schema(2, 5), shard_bytes=1)
    assert len(store.catalogue.live_shards) == 20
    before = len(os.listdir("/proc/self/fd"))
    loaders = [Loader(store, "train", seed=7), Loader(store, "valid")]
    for loader in loaders:
        for batch in loader.batches(6, epochs=2):
            assert_windows_are_exact(loader, batch)
            assert 1 <= loader_files.n_open() <= 3
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_handles_do_not_cross_a_fork(store):
    script = f"""
import os
from simlab.store import loader_files
from simlab.store.loader import Loader
from simlab.store.store import SnapshotStore
loader = Loader(SnapshotStore.open({str(store.path)!r}), "train", ahead=1, seed=7)
mine = [b.outputs["u"].tobytes() for b in loader.batches(9)]
assert loader_files.n_open() > 0
if os.fork() == 0:
    fresh = loader_files.n_open() == 0
    same = [b.outputs["u"].tobytes() for b in loader.batches(9)] == mine
    os._exit(0 if fresh and same and loader_files.n_open() > 0 else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
