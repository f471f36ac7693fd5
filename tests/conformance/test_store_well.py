"""Sealed stores through The Well's own loader."""

import warnings

import h5py
import numpy as np
import pytest
from store_helpers import SEED, make_mesh, make_schema, sample_of, step_of, write

from simlab.store.storage import PROFILES, Storage
from simlab.store.store import SnapshotStore

pytest.importorskip("the_well")

CASES = [
    pytest.param(dims, n_steps, id=f"{dims}d-{n_steps}-steps")
    for dims in (1, 2, 3)
    for n_steps in (1, 4)
]


def campaign(path, schema, n=20, storage=None):
    store = SnapshotStore.create(path, schema, n=n, seed=SEED, storage=storage)
    with store.writer(segment_bytes=20_000) as writer:
        for traj in range(n):
            write(writer, schema, traj)
    store.seal(final=True, shard_bytes=60_000)
    return store


def load(store, split="train", **options):
    from the_well.data import WellDataset

    steps = {"n_steps_input": 1, "n_steps_output": 0 if len(store.schema.times) == 1 else 1}
    return WellDataset(path=str(store.path), well_split_name=split, **steps | options)


def in_file_order(store, split):
    """Ids in the order The Well's loader shows them: files by name, rows as they lie."""
    ids = []
    for path in sorted((store.path / "data" / split).glob("*.h5")):
        with h5py.File(path) as file:
            ids += file["simlab/traj_id"][:].tolist()
    return ids


@pytest.mark.parametrize(("dims", "n_steps"), CASES)
def test_the_wells_loader_reads_every_value(tmp_path, dims, n_steps):
    schema = make_schema(dims, n_steps, tensor=True, mesh=make_mesh() if dims == 2 else None)
    assert_the_wells_loader_reads(campaign(tmp_path / "s", schema))


@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_wells_loader_reads_every_profile(tmp_path, profile, float64):
    schema = make_schema(2, 4, tensor=True, mesh=make_mesh())
    store = campaign(tmp_path / "s", schema, storage=Storage(profile, float64))
    assert_the_wells_loader_reads(store)
    assert store.verify(deep=True) == []
    for path in (store.path / "data").glob("*/*.h5"):
        check_well_format(path)


def assert_the_wells_loader_reads(store):
    schema = store.schema
    dims, n_steps = schema.n_dims, len(schema.times)
    for split, n in (("train", 16), ("valid", 2), ("test", 2)):
        ids = in_file_order(store, split)
        assert sorted(ids) == store.ids(split).tolist()
        dataset = load(store, split)
        windows = max(1, n_steps - 1)
        assert len(dataset) == n * windows
        assert dataset.metadata.n_spatial_dims == dims
        assert dataset.metadata.constant_scalar_names == ["mu", "nu", "rho"]
        for index in range(len(dataset)):
            traj, step = ids[index // windows], index % windows
            sample = dataset[index]
            expected = step_of(schema, traj, step)
            shape = (1, *schema.shape, -1)
            together = np.concatenate(
                [expected[name].reshape(shape) for name in ("u", "q", "s")], axis=-1
            )
            assert np.array_equal(sample["input_fields"], together.astype(np.float32))
            if n_steps > 1:
                later = step_of(schema, traj, step + 1)["u"].astype(np.float32)
                assert np.array_equal(sample["output_fields"][0, ..., 0], later)
            given = sample_of(schema, traj)
            assert np.array_equal(
                sample["constant_fields"][..., 0], given.fields["k"].astype(np.float32)
            )
            scalars = [given.parameters["mu"], given.parameters["nu"], 2.5]
            assert np.array_equal(sample["constant_scalars"], np.float32(scalars))
            codes = [[0, 0], [2, 2], [1, 1]][:dims]  # wall, periodic, open
            assert sample["boundary_conditions"].tolist() == codes
            grid = np.stack(
                np.meshgrid(*(axis.coordinates for axis in schema.axes), indexing="ij"), axis=-1
            )
            assert np.array_equal(sample["space_grid"], grid.astype(np.float32))


def test_the_well_normalises_with_our_constants(tmp_path):
    from the_well.data.normalization import RMSNormalization, ZScoreNormalization

    schema = make_schema(2, 4, tensor=True)
    store = campaign(tmp_path / "s", schema)
    plain = load(store)
    scored = load(store, use_normalization=True, normalization_type=ZScoreNormalization)
    scaled = load(store, use_normalization=True, normalization_type=RMSNormalization)
    values = store.split("train").arrays()["q"].astype(np.float64)
    mean, std = values.mean(axis=(0, 1, 2, 3)), values.std(axis=(0, 1, 2, 3))
    rms = np.sqrt((values**2).mean(axis=(0, 1, 2, 3)))
    q = np.asarray(plain[5]["input_fields"])[..., 1:3].astype(np.float64)
    assert np.asarray(scored[5]["input_fields"])[..., 1:3] == pytest.approx(
        (q - mean) / std, rel=1e-4
    )
    assert np.asarray(scaled[5]["input_fields"])[..., 1:3] == pytest.approx(q / rms, rel=1e-4)
    assert scored.norm.stds_delta["q"].numpy() == pytest.approx(
        np.diff(values, axis=1).std(axis=(0, 1, 2, 3)), rel=1e-6
    )


def test_the_wells_loader_in_worker_processes(tmp_path):
    from torch.utils.data import DataLoader

    store = campaign(tmp_path / "s", make_schema(2, 3))
    dataset = load(store)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context="spawn")
    together = np.concatenate([np.asarray(batch["input_fields"]) for batch in loader])
    alone = np.stack([np.asarray(dataset[i]["input_fields"]) for i in range(len(dataset))])
    assert np.array_equal(together, alone)


def test_the_wells_export_to_xarray(tmp_path):
    pytest.importorskip("xarray")
    dataset = load(campaign(tmp_path / "s", make_schema(2, 3)))
    table = dataset.to_xarray(backend="numpy")
    assert table.sizes["sample"] == 16
    assert table.u.isel(sample=0, time=2).dtype == np.float32


def check_well_format(path):
    """Hold a file against The Well's written format; raises on the first violation.

    Our own statement of the rules of its format page (the loader does not check them).
    """
    with h5py.File(path) as file:
        n = file.attrs["n_trajectories"]
        dims = list(file["dimensions"].attrs["spatial_dims"])
        assert isinstance(file.attrs["dataset_name"], str)
        assert file.attrs["grid_type"] in ("cartesian", "spherical")
        assert isinstance(n, np.integer)
        assert isinstance(file.attrs["n_spatial_dims"], np.integer)
        assert file.attrs["n_spatial_dims"] == len(dims) > 0
        for name in file.attrs["simulation_parameters"]:
            assert name in file.attrs
            assert name in file["scalars"]
        n_times = file["dimensions/time"].shape[-1]
        sizes = {dim: file["dimensions"][dim].shape[-1] for dim in dims}

        def lead(item):
            for flag in ("sample_varying", "time_varying"):
                assert isinstance(item.attrs[flag], np.bool_)
            sample = (n,) if item.attrs["sample_varying"] else ()
            return sample + ((n_times,) if item.attrs["time_varying"] else ())

        assert file["dimensions/time"].shape == lead(file["dimensions/time"])
        for dim in dims:
            assert file["dimensions"][dim].shape == (*lead(file["dimensions"][dim]), sizes[dim])
        for order in range(3):
            group = file[f"t{order}_fields"]
            assert set(group) == set(group.attrs["field_names"])
            for name in group.attrs["field_names"]:
                assert isinstance(name, str)
                field = group[name]
                varying = field.attrs["dim_varying"]
                assert varying.dtype == bool
                assert len(varying) == len(dims)
                space = tuple(sizes[d] for d, flag in zip(dims, varying, strict=True) if flag)
                assert field.shape == lead(field) + space + (len(dims),) * order
                assert field.dtype == np.float32
        scalars = file["scalars"]
        assert set(scalars) == set(scalars.attrs["field_names"])
        for name in scalars.attrs["field_names"]:
            assert scalars[name].shape == lead(scalars[name])
        for name, boundary in file["boundary_conditions"].items():
            kind = boundary.attrs["bc_type"]
            assert kind in ("wall", "open", "periodic")
            assert kind in name
            assert list(boundary.attrs["associated_fields"]) == []
            where = list(boundary.attrs["associated_dims"])
            assert all(dim in dims and dim in name for dim in where)
            shape = lead(boundary) + tuple(sizes[dim] for dim in where)
            assert boundary["mask"].shape == shape
            assert boundary["mask"].dtype == bool
            assert boundary["values"].shape == (np.count_nonzero(boundary["mask"]),)


@pytest.mark.parametrize(("dims", "n_steps"), CASES)
def test_shards_keep_the_wells_format(tmp_path, dims, n_steps):
    store = campaign(
        tmp_path / "s", make_schema(dims, n_steps, tensor=True, mesh=make_mesh()), n=10
    )
    paths = list((store.path / "data").glob("*/*.h5"))
    assert len(paths) >= 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            check_well_format(path)


def test_the_wells_own_check_finds_nothing(tmp_path):
    """Needs ``scripts`` of a checkout of The Well on PYTHONPATH: its package does not have it."""
    checks = pytest.importorskip(
        "check_thewell_formatting", reason="scripts of a checkout of The Well not on PYTHONPATH"
    )
    for case in CASES:
        dims, n_steps = case.values
        for profile in PROFILES:
            schema = make_schema(dims, n_steps, tensor=True, mesh=make_mesh())
            store = campaign(tmp_path / f"{case.id}-{profile}", schema, 10, Storage(profile))
            paths = list((store.path / "data").glob("*/*.h5"))
            assert len(paths) >= 3
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for path in paths:
                    checks.check_hdf5_format(str(path))
    with h5py.File(path, "r+") as file:
        file["t0_fields/u"].attrs["time_varying"] = False
    with pytest.raises(AssertionError):
        checks.check_hdf5_format(str(path))


def test_the_format_check_can_fail(tmp_path):
    store = campaign(tmp_path / "s", make_schema(), n=10)
    path = next((store.path / "data" / "train").glob("*.h5"))
    with h5py.File(path, "r+") as file:
        file["t0_fields/u"].attrs["time_varying"] = False
    with pytest.raises(AssertionError):
        check_well_format(path)
