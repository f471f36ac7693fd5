"""Views of sealed data: what PDEBench's two loaders would read of them, and the master view."""

import shutil

import h5py
import numpy as np
import pytest
from store_helpers import SEED, make_mesh, make_schema, sample_of, step_of, write
from typer.testing import CliRunner

from simlab.core.errors import ConfigError
from simlab.store.pdebench import layout_of, pdebench
from simlab.store.schema import Axis, FieldSpec, Schema
from simlab.store.store import SnapshotStore
from simlab.store.views import master, verify_view

N = 20
TIMES = (0.0, 0.5, 1.0)


def schema_of(dims, fields, times=TIMES, mesh=None):
    axes = tuple(
        Axis(name, tuple(np.linspace(0, 1 + i, 9 - 2 * i).tolist()))
        for i, name in enumerate("xyz"[:dims])
    )
    return Schema("flow", axes, tuple(fields), times=times, parameters={"mu": "1"}, mesh=mesh)


def campaign(path, schema, n=N):
    """Many small shards, written in a shuffled order."""
    store = SnapshotStore.create(path, schema, n=n, seed=SEED)
    with store.writer(segment_bytes=9_000) as writer:
        for traj in np.random.default_rng(5).permutation(n).tolist():
            write(writer, schema, traj)
    store.seal(final=True, shard_bytes=12_000)
    assert len(store.catalogue.live_shards) > 4
    return store


def ids_of(store, *splits):
    return [traj for split in splits for traj in store.split(split).ids.tolist()]


# What PDEBench's loaders do with a file, said again in our own words


def single(path, test, ratio, initial=2):
    """Its loader of one file: everything in memory, test samples from the front.

    Gives for every sample (first steps, all steps, grid); arrays are (*grid, T, channels).
    """
    with h5py.File(path) as file:
        if "tensor" in file:
            values = [file["tensor"][()]]
            dims = values[0].ndim - 2
            if dims == 2:  # Darcy: the coefficient comes before the solution, as if it were time
                values = [np.concatenate([file["nu"][()][:, None], values[0]], axis=1)]
        else:
            dims = file["density"].ndim - 2
            names = ["density", "pressure", *(f"V{letter}" for letter in "xyz"[:dims])]
            values = [file[name][()] for name in names]
        stacked = np.moveaxis(np.stack(values, axis=-1).astype(np.float32), 1, -2)
        points = [file[f"{letter}-coordinate"][()] for letter in "xyz"[:dims]]
    grid = np.stack(np.meshgrid(*points, indexing="ij"), axis=-1)
    cut = int(len(stacked) * ratio)
    chosen = stacked[:cut] if test else stacked[cut:]
    return [(sample[..., :initial, :], sample, grid) for sample in chosen]


def many(path, test, ratio, initial=2):
    """Its loader of grouped files: every key is a sample, test samples from the end."""
    assert path.suffix == ".h5"
    with h5py.File(path) as file:
        keys = sorted(file)
        cut = int(len(keys) * (1 - ratio))
        found = []
        for key in keys[cut:] if test else keys[:cut]:
            data = np.moveaxis(np.array(file[key]["data"], dtype="f"), 0, -2)
            letters = "xyz"[: data.ndim - 2]
            points = [np.array(file[key]["grid"][letter], dtype="f") for letter in letters]
            grid = np.stack(np.meshgrid(*points, indexing="ij"), axis=-1)
            found.append((data[..., :initial, :], data, grid))
    return found


def steps_of(schema, traj):
    """All steps of every output, (T, *grid, ...) float32."""
    steps = [step_of(schema, traj, step) for step in range(len(schema.times))]
    return {
        name: np.stack([step[name] for step in steps]).astype(np.float32)
        for name in (spec.name for spec in schema.outputs)
    }


def grid_of(schema):
    points = (np.float32(axis.coordinates) for axis in schema.axes)
    return np.stack(np.meshgrid(*points, indexing="ij"), axis=-1)


def check_samples(store, samples, ids, expected):
    assert len(samples) == len(ids)
    for (first, whole, grid), traj in zip(samples, ids, strict=True):
        values = np.moveaxis(expected(traj), 0, -2)
        assert whole.dtype == np.float32
        assert np.array_equal(whole, values)
        assert np.array_equal(first, values[..., :2, :])
        assert np.array_equal(grid, grid_of(store.schema))


def check_both_parts(store, path, loader, expected):
    with h5py.File(path) as file:
        ratio = file.attrs["test_ratio"]
    check_samples(store, loader(path, True, ratio), ids_of(store, "test"), expected)
    rest = ("valid", "train") if loader is single else ("train", "valid")
    check_samples(store, loader(path, False, ratio), ids_of(store, *rest), expected)


SCALAR = schema_of(1, [FieldSpec("u")])
FLOWS = [
    pytest.param(
        schema_of(
            dims,
            [
                *(FieldSpec(name) for name in ("density", "pressure")),
                *(
                    [FieldSpec("velocity", order=1)]
                    if is_vector
                    else [FieldSpec(f"V{letter}") for letter in "xyz"[:dims]]
                ),
            ],
        ),
        id=f"{dims}d-{'vector' if is_vector else 'scalars'}",
    )
    for dims in (1, 2, 3)
    for is_vector in (True, False)
]


def test_one_dimensional_scalar(tmp_path, monkeypatch):
    store = campaign(tmp_path / "s", SCALAR)
    path = pdebench(store)
    assert path.name == "pdebench_flow.hdf5"
    assert verify_view(store, path) == []
    monkeypatch.chdir("/")  # sources are found beside the view, not from where one stands
    check_both_parts(store, path, single, lambda traj: steps_of(SCALAR, traj)["u"][..., None])
    with h5py.File(path) as file:
        assert file["tensor"].shape == (N, 3, 9)
        assert file["t-coordinate"][:].tolist() == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize("schema", FLOWS)
def test_flow(tmp_path, schema):
    store = campaign(tmp_path / "s", schema)
    path = pdebench(store)
    assert verify_view(store, path) == []

    def expected(traj):
        steps = steps_of(schema, traj)
        if "velocity" in steps:
            velocity = list(np.moveaxis(steps["velocity"], -1, 0))
        else:
            velocity = [steps[f"V{letter}"] for letter in "xyz"[: schema.n_dims]]
        return np.stack([steps["density"], steps["pressure"], *velocity], axis=-1)

    check_both_parts(store, path, single, expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_groups_of_every_kind_of_field(tmp_path, dims):
    schema = make_schema(dims, 3, tensor=True, mesh=make_mesh() if dims == 2 else None)
    store = campaign(tmp_path / "s", schema)
    path = pdebench(store)
    assert path.name == "pdebench_toy.h5"
    assert verify_view(store, path) == []

    def expected(traj):
        steps = steps_of(schema, traj)
        shape = (3, *schema.shape, -1)
        return np.concatenate([steps[name].reshape(shape) for name in ("u", "q", "s")], axis=-1)

    check_both_parts(store, path, many, expected)
    with h5py.File(path) as file:
        assert len(file.attrs["channels"]) == 1 + dims + dims**2
        assert file["0007/grid/t"][:].tolist() == list(schema.times)
        traj = int(file["0007"].attrs["traj_id"])
        assert file["0007"].attrs["nu"] == sample_of(schema, traj).parameters["nu"]


def test_darcy(tmp_path):
    schema = schema_of(2, [FieldSpec("a", role="input"), FieldSpec("u")], times=(0.0,))
    store = campaign(tmp_path / "s", schema)
    path = pdebench(store)
    assert verify_view(store, path) == []

    def expected(traj):
        given = sample_of(schema, traj).fields["a"].astype(np.float32)
        return np.stack([given, steps_of(schema, traj)["u"][0]])[..., None]

    check_both_parts(store, path, single, expected)
    with pytest.raises(ConfigError, match="given 'b'; there are: a"):
        pdebench(store, nu="b")


def test_pdebenchs_own_loaders_read_the_same(tmp_path, monkeypatch):
    """All of the above through its own code, where that is on PYTHONPATH (an unpacked wheel)."""
    theirs = pytest.importorskip("pdebench.models.fno.utils", reason="PDEBench not on PYTHONPATH")
    used = []

    def own_single(path, test, ratio, initial=2):
        used.append("single")
        return theirs.FNODatasetSingle(
            path.name,
            initial_step=initial,
            saved_folder=f"{path.parent}/",
            if_test=test,
            test_ratio=ratio,
        )

    def own_many(path, test, ratio, initial=2):
        used.append("many")
        return theirs.FNODatasetMult(
            path.stem,
            initial_step=initial,
            saved_folder=f"{path.parent}/",
            if_test=test,
            test_ratio=ratio,
        )

    monkeypatch.setitem(globals(), "single", lambda *words: arrays(own_single(*words)))
    monkeypatch.setitem(globals(), "many", lambda *words: arrays(own_many(*words)))
    cases = [(test_one_dimensional_scalar, monkeypatch), (test_darcy,)]
    cases += [(test_flow, case.values[0]) for case in FLOWS]
    cases += [(test_groups_of_every_kind_of_field, dims) for dims in (1, 2, 3)]
    for number, (test, *words) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        test(folder, *words)
    assert (used.count("single"), used.count("many")) == (16, 6)


def arrays(dataset):
    """All samples of a dataset of tensors, as arrays."""
    return [tuple(np.asarray(part) for part in dataset[i]) for i in range(len(dataset))]


def test_the_schema_chooses_the_layout():
    one, vector = FieldSpec("u"), FieldSpec("q", order=1)
    assert layout_of(SCALAR) == "scalar"
    assert layout_of(schema_of(1, [one, vector])) == "groups"  # else q would be left out
    assert layout_of(schema_of(1, [one, vector]), tensor="u") == "scalar"
    assert layout_of(schema_of(2, [one])) == "groups"  # its tensor would be taken for Darcy's
    assert layout_of(schema_of(1, [one], times=(0.0,))) == "groups"


def test_a_layout_that_does_not_fit_is_refused(tmp_path):
    store = campaign(tmp_path / "s", schema_of(2, [FieldSpec("u")]))
    for layout, needs in (("darcy", "stationary 2-D"), ("scalar", "1-D"), ("flow", "density")):
        with pytest.raises(ConfigError, match=needs):
            pdebench(store, layout=layout)
    with pytest.raises(ConfigError, match="did you mean 'groups'"):
        pdebench(store, layout="group")
    assert not list((store.path / "views").glob("*"))


@pytest.fixture
def views(tmp_path):
    store = campaign(tmp_path / "s", SCALAR)
    made = [pdebench(store, layout=layout) for layout in ("scalar", "groups")]
    return store, [*made, master(store)]


def test_a_missing_source_reads_nan_and_is_refused(tmp_path, views):
    store, paths = views
    victim = next((store.path / "data" / "test").glob("*.h5"))
    victim.rename(tmp_path / "away.h5")
    found = []
    for path in paths:
        assert verify_view(store, path) == [
            f"{path.name}: source data/test/{victim.name} is missing"
        ]
        with h5py.File(path) as file:
            file.visititems(
                lambda _, item: found.append(item[()]) if getattr(item, "is_virtual", 0) else None
            )
    for values in found:
        assert not (values == 0).any()
    assert sum(np.isnan(values).any() for values in found) >= 3


def test_a_source_with_other_values_is_refused(views):
    store, paths = views
    victim = next((store.path / "data" / "test").glob("*.h5"))
    changed = victim.with_suffix(".changed")
    shutil.copyfile(victim, changed)
    with h5py.File(changed, "r+") as file:
        file["t0_fields/u"][0, 1, 3] += 1.0
    assert changed.stat().st_size == victim.stat().st_size
    changed.replace(victim)
    for path in paths:
        assert any("what was not sealed" in line for line in verify_view(store, path))


def test_a_view_of_what_was_dropped_is_refused(views):
    from simlab.store.verify import quarantine_damaged

    store, (path, *_) = views
    victim = next((store.path / "data" / "train").glob("*.h5"))
    kept = victim.read_bytes()
    victim.write_bytes(kept[:-8])
    assert any("were sealed" in line for line in verify_view(store, path))
    quarantine_damaged(store, deep=False)
    victim.write_bytes(kept)
    assert any("does not count" in line for line in verify_view(store, path))
    assert verify_view(store, pdebench(store)) == []


def test_a_view_of_another_store_or_of_nothing_is_refused(tmp_path, views):
    store, (path, *_) = views
    other = SnapshotStore.create(tmp_path / "other", SCALAR, n=N, seed=SEED)
    assert "not a view of" in verify_view(other, path)[0]
    assert "cannot be read" in verify_view(store, path.with_name("none.h5"))[0]


def test_master_shows_everything_once(tmp_path, monkeypatch):
    schema = make_schema(2, 3, tensor=True, mesh=make_mesh())
    store = campaign(tmp_path / "s", schema)
    with store.writer() as writer:
        write(writer, schema, 3)  # a higher attempt replaces the first one
    store.seal(final=True)
    path = master(store)
    assert path == store.path / "views" / "master.h5"
    assert verify_view(store, path) == []
    monkeypatch.chdir("/")
    with h5py.File(path) as file:
        ids, splits = file["simlab/traj_id"][:], file["simlab/split"].asstr()[:]
        assert sorted(ids.tolist()) == list(range(N))
        for row, traj in enumerate(ids.tolist()):
            assert splits[row] == store.split_of(traj)
            given = sample_of(schema, traj)
            assert file["simlab/parameters"][row].tolist() == list(given.parameters.values())
            assert np.array_equal(file["t0_fields/k"][row], np.float32(given.fields["k"]))
            steps = steps_of(schema, traj)
            for name in ("t0_fields/u", "t1_fields/q", "t2_fields/s"):
                assert np.array_equal(file[name][row], steps[name[-1]])
            exact = step_of(schema, traj, 2)["w"]
            assert np.array_equal(file["mesh/fields/w"][row, 2], exact)


def test_command_line_of_views(views):
    from simlab.cli.store import app

    store, _ = views

    def run(*words):
        return CliRunner().invoke(app, ["view", *map(str, words)])

    assert run("master", store.path).stdout.strip().endswith("master.h5")
    assert run("pdebench", store.path, "--layout", "groups").stdout.strip().endswith("flow.h5")
    assert run("verify", store.path, "master.h5").exit_code == 0
    next((store.path / "data" / "test").glob("*.h5")).unlink()
    found = run("verify", store.path, "master.h5")
    assert found.exit_code == 1
    assert "is missing" in found.stdout
