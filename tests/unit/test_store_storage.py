"""Storage profiles and double precision twins: what lies in shards, and that damage is found."""

import h5py
import numpy as np
import pytest
from store_helpers import (
    SEED,
    Reader,
    assert_split_is_exact,
    make_mesh,
    make_schema,
    sample_of,
    step_of,
    write,
)

from simlab.core.errors import ConfigError, SchemaError, StoreError
from simlab.store.shards import exact_path, field_path
from simlab.store.storage import PROFILES, Storage
from simlab.store.store import SnapshotStore

N = 10


def campaign(path, storage, schema=None):
    schema = schema or make_schema(2, 3, mesh=make_mesh())
    store = SnapshotStore.create(path, schema, n=N, seed=SEED, storage=storage)
    with store.writer(segment_bytes=9000) as writer:
        for traj in range(N):
            write(writer, schema, traj)
    store.seal(final=True)
    return store


def shards_of(store):
    return sorted((store.path / "data").glob("*/*.h5"))


@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_keeps_every_value(tmp_path, profile, float64):
    store = campaign(tmp_path / "s", Storage(profile, float64))
    store = SnapshotStore.open(store.path)
    assert store.storage == Storage(profile, float64)
    assert store.verify(deep=True) == []
    for split in store.fractions:
        assert_split_is_exact(store.schema, store.split(split))
    with h5py.File(shards_of(store)[0]) as file:
        assert file.attrs["simlab_profile"] == profile
        for spec in store.schema.fields:
            data = file[field_path(spec)]
            assert (data.chunks is None) == (profile == "fast")
            assert (data.id.get_offset() is not None) == (profile == "fast")
            assert data.compression == ("gzip" if profile == "archive" else None)
            assert data.fletcher32 == (profile != "fast")


def test_a_reader_may_map_the_fast_profile(tmp_path):
    store = campaign(tmp_path / "s", Storage("fast"))
    (path, *_) = (store.path / "data" / "train").glob("*.h5")
    with h5py.File(path) as file:
        ids, data = file["simlab/traj_id"][:], file["t0_fields/u"]
        mapped = np.memmap(path, data.dtype, "r", data.id.get_offset(), data.shape)
    for row, traj in enumerate(ids.tolist()):
        for step in range(3):
            expected = step_of(store.schema, traj, step)["u"].astype(np.float32)
            assert np.array_equal(mapped[row, step], expected)


def test_the_archive_profile_is_smaller_for_smooth_fields(tmp_path):
    schema = make_schema(2, 40)
    sizes = {}
    for profile in PROFILES:
        store = SnapshotStore.create(
            tmp_path / profile, schema, n=N, seed=SEED, storage=Storage(profile)
        )
        with store.writer() as writer:
            for traj in range(N):
                writer.begin(sample_of(schema, traj))
                for step, time in enumerate(schema.times):
                    fields = {"u": np.ones((7, 5)), "q": np.zeros((7, 5, 2))}
                    writer.append(traj, step, time, fields)
                writer.finish(traj)
        store.seal(final=True)
        with h5py.File(shards_of(store)[0]) as file:
            sizes[profile] = file["t0_fields/u"].id.get_storage_size()
    assert sizes["archive"] < sizes["fast"] <= sizes["default"]


@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_flipped_bit_is_found_in_every_profile(tmp_path, profile, float64):
    store = campaign(tmp_path / "s", Storage(profile, float64))
    path = shards_of(store)[0]
    with h5py.File(path) as file:
        data = file["simlab/f64/u" if float64 else "t0_fields/u"]
        at = data.id.get_offset() if profile == "fast" else data.id.get_chunk_info(0).byte_offset
    raw = bytearray(path.read_bytes())
    raw[at + 5] ^= 4
    path.write_bytes(raw)
    assert any(path.name in line for line in store.verify(deep=True))


@pytest.mark.parametrize("profile", PROFILES)
def test_double_precision_twins(tmp_path, profile):
    store = campaign(tmp_path / "s", Storage(profile, float64=True))
    for split in store.fractions:
        found = store.split(split).arrays(exact=True)
        for row, traj in enumerate(store.split(split).ids.tolist()):
            assert np.array_equal(found["k"][row], sample_of(store.schema, traj).fields["k"])
            for step in range(3):
                for name, values in step_of(store.schema, traj, step).items():
                    assert found[name].dtype == np.float64
                    assert np.array_equal(found[name][row, step], values)


def test_what_is_followed_does_not_depend_on_sealing_or_precision(tmp_path):
    schema = make_schema(2, 3, mesh=make_mesh())
    store = SnapshotStore.create(
        tmp_path / "s", schema, n=N, seed=SEED, storage=Storage(float64=True)
    )

    class Typed(Reader):
        types = frozenset()

        def take(self, event):
            super().take(event)
            for name, values in getattr(event, "fields", {}).items():
                assert values.dtype == ("f8" if name == "w" else "f4")
                self.types = self.types | {values.dtype}

    live, later = Typed(schema), Typed(schema)
    with store.writer() as writer:
        for traj in range(N):
            write(writer, schema, traj)
            live.drain(store)
    store.seal(final=True)
    later.drain(store)
    assert live.types == later.types == {np.dtype("f4"), np.dtype("f8")}
    assert live.done() == later.done() == set(range(N))


def test_a_twin_that_is_not_the_field_is_found(tmp_path):
    store = campaign(tmp_path / "s", Storage("fast", float64=True))
    path = shards_of(store)[0]
    spec = store.schema.outputs[0]
    with h5py.File(path, "r+") as file:  # consistent with its own CRC, not with the field
        import zlib

        twin, crcs = file[exact_path(spec)], file["simlab/f64_crc32"]
        twin[0, 0] = twin[0, 0] + 1.0
        crcs[0, 0, 0] = zlib.crc32(np.ascontiguousarray(twin[0, 0]).data)
    from simlab.store import shards

    with pytest.raises(StoreError, match="not its double precision twin"):
        shards.inspect(path, store.schema)


def test_values_beyond_single_precision_are_refused_also_with_twins(tmp_path):
    schema = make_schema(1, 1)
    store = SnapshotStore.create(
        tmp_path / "s", schema, n=N, seed=SEED, storage=Storage(float64=True)
    )
    with store.writer() as writer:
        writer.begin(sample_of(schema, 0))
        fields = step_of(schema, 0, 0)
        with pytest.raises(SchemaError, match="beyond float32"):
            writer.append(0, 0, 0.0, fields | {"u": np.full(7, 1e300)})


def test_no_twins_where_none_are_kept(tmp_path):
    store = campaign(tmp_path / "s", Storage())
    with pytest.raises(StoreError, match="simlab/f64/k"):
        store.split("train").arrays(exact=True)
    with h5py.File(shards_of(store)[0]) as file:
        assert not [name for name in file["simlab"] if name.startswith("f64")]


def test_storage_is_part_of_what_a_store_is(tmp_path):
    schema = make_schema(1, 1)
    SnapshotStore.create(tmp_path / "s", schema, n=N, seed=SEED, storage=Storage("fast"))
    assert SnapshotStore.open(tmp_path / "s").storage.profile == "fast"
    with pytest.raises(ConfigError, match="storage"):
        SnapshotStore.create(tmp_path / "s", schema, n=N, seed=SEED)
    with pytest.raises(ConfigError, match="did you mean 'fast'"):
        Storage("fest")
