"""Files of others are adopted, stores are written anew; nothing that is read is changed."""

import hashlib
import json

import h5py
import numpy as np
import pytest
from store_helpers import SEED, assert_split_is_exact, make_mesh, make_schema, sample_of, step_of
from store_helpers import write as write_row
from typer.testing import CliRunner

from simlab.cli.store import app
from simlab.core.errors import ConfigError, StoreError
from simlab.core.reports import Provenance
from simlab.store.storage import Storage
from simlab.store.store import SnapshotStore
from simlab.store.transfer import adopt, migrate, schema_of

N = 12


def foreign(path, n=3, times=(0.0, 0.5), shift=0.0):
    """A file in The Well's format as somebody else would write it: sparse in what it varies."""
    rng = np.random.default_rng([SEED, n])
    values = {
        "u": rng.random((n, len(times), 6, 4), dtype=np.float32),
        "q": rng.random((n, len(times), 6, 4, 2), dtype=np.float32),
        "k": rng.random((6,), dtype=np.float32),  # the same for all, along x only
    }
    with h5py.File(path, "w") as file:
        file.attrs.update(
            dataset_name="theirs", grid_type="cartesian", n_spatial_dims=2, n_trajectories=n
        )
        file.attrs["simulation_parameters"] = ["rho"]
        file.attrs["rho"] = 2.0
        file["dimensions/time"] = np.float32(times)
        file["dimensions/x"] = np.linspace(0, 1, 6, dtype=np.float32) + np.float32(shift)
        file["dimensions/y"] = np.linspace(0, 1, 4, dtype=np.float32)
        file["dimensions"].attrs["spatial_dims"] = ["x", "y"]
        wall = file.create_group("boundary_conditions/x_wall")
        wall.attrs.update(bc_type="WALL", associated_dims=["x"], associated_fields=[])
        wall["mask"] = np.array([True, *[False] * 4, True])
        wall["values"] = np.full(2, np.nan, dtype=np.float32)
        file["scalars/mu"] = rng.random(n, dtype=np.float32)
        file["scalars/mu"].attrs.update(sample_varying=True, time_varying=False)
        file["scalars/rho"] = np.float32(2.0)
        file["scalars/rho"].attrs.update(sample_varying=False, time_varying=False)
        values["mu"] = file["scalars/mu"][:]
        for name, order in (("u", 0), ("q", 1), ("k", 0)):
            file[f"t{order}_fields/{name}"] = values[name]
            file[f"t{order}_fields/{name}"].attrs.update(
                sample_varying=name != "k",
                time_varying=name != "k",
                dim_varying=[True, name != "k"],
            )
        file.create_group("t2_fields")
    return values


def digests(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_a_foreign_file_becomes_a_sealed_shard(tmp_path):
    values = foreign(tmp_path / "theirs.h5")
    before = digests(tmp_path)
    schema = schema_of(tmp_path / "theirs.h5")
    assert [(s.name, s.role, s.order) for s in schema.fields] == [
        ("k", "input", 0),
        ("u", "output", 0),
        ("q", "output", 1),
    ]
    store = SnapshotStore.create(tmp_path / "s", schema, n=N, seed=SEED)
    ids = adopt(store, tmp_path / "theirs.h5", split="train")
    assert ids == store.ids("train")[:3].tolist()
    assert store.verify(deep=True) == []
    found = store.split("train").arrays()
    assert np.array_equal(found["u"], values["u"])
    assert np.array_equal(found["q"], values["q"])
    assert np.array_equal(found["k"], np.broadcast_to(values["k"][:, None], (3, 6, 4)))
    assert np.array_equal(found["mu"], values["mu"])
    assert adopt(store, tmp_path / "theirs.h5", split="train") == []  # it has them
    assert before.items() <= digests(tmp_path).items()
    name, row = store.split("train").places()[1]
    origin = json.loads(store.files.values(name, "simlab/trajectory_provenance", row))
    assert origin["adopted"]["row"] == 1


def test_an_adopted_file_is_read_by_the_wells_loader(tmp_path):
    data = pytest.importorskip("the_well.data")
    values = foreign(tmp_path / "theirs.h5")
    run = CliRunner().invoke(
        app, ["adopt", str(tmp_path / "s"), str(tmp_path / "theirs.h5"), "--split", "train"]
    )
    assert "adopted 3 trajectories" in run.stdout
    found = data.WellDataset(path=str(tmp_path / "s"), well_split_name="train")
    assert len(found) == 3
    assert np.array_equal(found[2]["input_fields"][0, ..., 0], values["u"][2, 0])


def test_what_a_store_cannot_keep_is_refused_before_anything_is_written(tmp_path):
    foreign(tmp_path / "theirs.h5")
    store = SnapshotStore.create(tmp_path / "s", schema_of(tmp_path / "theirs.h5"), n=N, seed=SEED)
    foreign(tmp_path / "shifted.h5", shift=0.25)
    with pytest.raises(ConfigError, match="its grid"):
        adopt(store, tmp_path / "shifted.h5")
    foreign(tmp_path / "longer.h5", times=(0.0, 0.5, 1.0))
    with pytest.raises(ConfigError, match="its 3 times"):
        adopt(store, tmp_path / "longer.h5")
    foreign(tmp_path / "many.h5", n=N + 1)
    with pytest.raises(ConfigError, match="13 trajectories, of the store's ids 12 are free"):
        adopt(store, tmp_path / "many.h5")
    with h5py.File(tmp_path / "theirs.h5", "r+") as file:
        file["boundary_conditions/x_wall/mask"][2] = True
        file["scalars/mu"].attrs["time_varying"] = True
    with pytest.raises(ConfigError, match="both ends of an axis") as caught:
        schema_of(tmp_path / "theirs.h5")
    assert "varies in time" in str(caught.value)
    (tmp_path / "no.h5").write_bytes(b"no")
    with pytest.raises(StoreError, match="cannot be read"):
        schema_of(tmp_path / "no.h5")
    assert store.done() == set()
    assert not list((store.path / "inflight").glob("*.seg"))


def test_values_that_are_not_finite_are_refused(tmp_path):
    foreign(tmp_path / "theirs.h5")
    with h5py.File(tmp_path / "theirs.h5", "r+") as file:
        file["t0_fields/u"][1, 1, 2, 2] = np.inf
    store = SnapshotStore.create(tmp_path / "s", schema_of(tmp_path / "theirs.h5"), n=N, seed=SEED)
    with pytest.raises(ValueError, match="not finite"):
        adopt(store, tmp_path / "theirs.h5")


def solve_of(traj, step):
    return Provenance(traj, 1, 5 + step, 7, 8, 1e-9 * (1 + traj), 0.25, "cg")


def campaign(path, storage=None):
    schema = make_schema(2, 2, mesh=make_mesh())
    store = SnapshotStore.create(path, schema, n=N, seed=SEED, storage=storage)
    with store.writer(segment_bytes=6000) as writer:
        for traj in range(N - 3):
            writer.begin(sample_of(schema, traj), provenance={"host": "a"})
            for step, time in enumerate(schema.times):
                fields = step_of(schema, traj, step)
                writer.append(traj, step, time, fields, solve=solve_of(traj, step))
            writer.finish(traj)
        writer.begin(sample_of(schema, 10))
        writer.append(10, 0, 0.0, step_of(schema, 10, 0))
        writer.fail(10, "diverged")
        writer.begin(sample_of(schema, 11))
        writer.fail(11, "no matrix")
        write_row(writer, schema, 4)  # a second attempt
    store.seal(final=True)
    return store


def as_format_1(store):
    """Make of a store what format 1 left: no solves in shards but iterations and residuals."""
    for shard in (store.path / "data").glob("*/*.h5"):
        copy = shard.with_suffix(".copy")
        copy.write_bytes(shard.read_bytes())
        with h5py.File(copy, "r+") as file:
            file["simlab/iterations"] = file["solve/its"][:].astype(np.uint32)
            file["simlab/residual"] = file["solve/true_relres"][:].astype(np.float32)
            del file["solve"]
        copy.replace(shard)
    path = store.path / "campaign.json"
    content = json.loads(path.read_text())
    del content["digest"]
    content["schema"] = "simlab-store/1"
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "digest": digest}))
    return SnapshotStore.open(store.path)


def assert_same(old, new):
    assert new.verify(deep=True) == []
    assert new.done() == old.done() == set(range(N - 3))
    assert new.failed() == old.failed() == {10: "diverged", 11: "no matrix"}
    assert new.status().n_superseded == 0
    for name in old.fractions:
        assert new.split(name).ids.tolist() == old.split(name).ids.tolist()
        assert_split_is_exact(new.schema, new.split(name))


def test_a_store_of_format_1_is_migrated(tmp_path):
    old = as_format_1(campaign(tmp_path / "old"))
    before = digests(tmp_path / "old")
    new = migrate(old, tmp_path / "new")
    assert json.loads((new.path / "campaign.json").read_text())["schema"] == "simlab-store/2"
    assert_same(old, new)
    assert new.solves()["iterations"].tolist() == old.solves()["iterations"].tolist()
    assert digests(tmp_path / "old") == before


def test_a_migration_that_was_killed_goes_on(tmp_path, monkeypatch):
    old = campaign(tmp_path / "old")
    from simlab.store import transfer

    row = transfer._migrate_rows
    calls = []

    def dying(writer, store, shard, rows):
        calls.append(shard)
        if len(calls) == 2:
            row(writer, store, shard, rows[:1])
            raise KeyboardInterrupt
        row(writer, store, shard, rows)

    monkeypatch.setattr(transfer, "_migrate_rows", dying)
    with pytest.raises(KeyboardInterrupt):
        migrate(old, tmp_path / "new")
    assert_same(old, migrate(old, tmp_path / "new"))


@pytest.mark.parametrize("profile", ["fast", "archive"])
def test_another_profile_by_command(tmp_path, profile):
    old = campaign(tmp_path / "old", Storage(float64=True))
    words = ["migrate", str(old.path), str(tmp_path / "new"), "--profile", profile]
    ran = CliRunner().invoke(app, words)
    assert f"9 trajectories, format 2, {profile}" in ran.stdout
    new = SnapshotStore.open(tmp_path / "new")
    assert new.storage == Storage(profile, float64=True)
    assert_same(old, new)
    assert np.array_equal(
        new.split("train").arrays(exact=True)["u"], old.split("train").arrays(exact=True)["u"]
    )
    kept = [name for name in old.solves().dtype.names if name != "solver"]
    for name in kept:
        assert np.array_equal(new.solves()[name], old.solves()[name], equal_nan=True)


def test_what_is_not_sealed_or_damaged_is_not_migrated(tmp_path):
    old = campaign(tmp_path / "old")
    with old.writer() as writer:
        write_row(writer, old.schema, 9)
    with pytest.raises(StoreError, match="not all is sealed"):
        migrate(old, tmp_path / "new")
    old.seal(final=True)
    victim = next((old.path / "data" / "train").glob("*.h5"))
    with h5py.File(victim) as file:
        at = file["t0_fields/u"].id.get_chunk_info(0).byte_offset
    raw = bytearray(victim.read_bytes())
    raw[at + 2] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(StoreError, match=victim.name):
        migrate(SnapshotStore.open(old.path), tmp_path / "new")
