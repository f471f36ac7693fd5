"""XDMF sidecars, evaluated the way a viewer would, and the store's part of the command line."""

import json
from xml.etree import ElementTree as XML

import h5py
import numpy as np
import pytest
from store_helpers import SEED, make_mesh, make_schema, sample_of, step_of, write
from typer.testing import CliRunner

from simlab.core.errors import ConfigError
from simlab.store.store import SnapshotStore
from simlab.store.xdmf import xdmf


def campaign(path, schema, n=10):
    store = SnapshotStore.create(path, schema, n=n, seed=SEED)
    with store.writer() as writer:
        for traj in range(n):
            write(writer, schema, traj)
    store.seal(final=True)
    return store


def numbers(text):
    return [int(word) for word in text.split()]


def evaluate(item, folder):
    """Return what a DataItem stands for."""
    if item.get("ItemType") == "HyperSlab":
        selection, source = item.findall("DataItem")
        rows = np.array(numbers(selection.text)).reshape(numbers(selection.get("Dimensions")))
        start, stride, count = rows
        values = evaluate(source, folder)
        cut = tuple(slice(a, a + s * c, s) for a, s, c in zip(start, stride, count, strict=True))
        return values[cut].reshape(numbers(item.get("Dimensions")))
    file, _, dataset = item.text.strip().partition(":")
    with h5py.File(folder / file) as source:
        values = source[dataset][()]
    assert values.dtype.itemsize == int(item.get("Precision"))
    assert values.shape == tuple(numbers(item.get("Dimensions")))
    return values


def uniform_grids(path):
    """Yield (time, grid element) of a sidecar."""
    series = XML.parse(path).find("Domain/Grid")
    assert series.get("CollectionType") == "Temporal"
    for grid in series.findall("Grid"):
        time = float(grid.find("Time").get("Value"))
        parts = grid.findall("Grid") if grid.get("GridType") == "Collection" else [grid]
        for part in parts:
            yield time, part


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_xdmf_of_a_time_series(tmp_path, dims):
    schema = make_schema(dims, 3)
    store = campaign(tmp_path / "s", schema)
    (traj,) = store.split("test").ids.tolist()
    (path,) = xdmf(store, "test")
    grids = list(uniform_grids(path))
    assert [time for time, _ in grids] == list(schema.times)
    for step, (_, grid) in enumerate(grids):
        points = evaluate(grid.find("Geometry/DataItem"), path.parent)
        shape = numbers(grid.find("Topology").get("Dimensions"))
        assert np.prod(shape) == points[..., 0].size
        along_x = points[..., 0].reshape(len(schema.axes[0].coordinates), -1)[:, 0]
        assert np.array_equal(along_x, np.float32(schema.axes[0].coordinates))
        found = {
            item.get("Name"): evaluate(item.find("DataItem"), path.parent)
            for item in grid.findall("Attribute")
        }
        expected = step_of(schema, traj, step)
        assert np.array_equal(found["u"], expected["u"].astype(np.float32))
        if dims == 3:
            assert np.array_equal(found["q"], expected["q"].astype(np.float32))
        else:
            last = schema.axes[-1].name
            assert np.array_equal(found[f"q_{last}"], expected["q"][..., -1].astype(np.float32))
        assert "k" in found


def test_xdmf_of_a_stationary_campaign_on_a_mesh(tmp_path):
    schema = make_schema(2, 1, mesh=make_mesh())
    store = campaign(tmp_path / "s", schema)
    grid_path, mesh_path = xdmf(store, "train")
    assert len(list(uniform_grids(grid_path))) == 8
    frames = list(uniform_grids(mesh_path))
    assert len(frames) == 16  # triangles and quads of eight trajectories
    for (time, part), kind in zip(frames, 8 * ["Triangle", "Quadrilateral"], strict=True):
        topology = part.find("Topology")
        assert topology.get("TopologyType") == kind
        cells = evaluate(topology.find("DataItem"), mesh_path.parent)
        assert len(cells) == int(topology.get("NumberOfElements"))
        points = evaluate(part.find("Geometry/DataItem"), mesh_path.parent)
        assert np.array_equal(points, schema.mesh.points)
        values = evaluate(part.find("Attribute/DataItem"), mesh_path.parent)
        assert np.array_equal(values, step_of(schema, int(time), 0)["w"])


def test_xdmf_of_chosen_trajectories(tmp_path):
    store = campaign(tmp_path / "s", make_schema(1, 2))
    ids = store.split("train").ids[:2].tolist()
    made = xdmf(store, "train", ids=ids)
    assert [path.name for path in made] == [f"train_t{traj:08d}.xdmf" for traj in ids]
    with pytest.raises(ConfigError, match="not sealed in train"):
        xdmf(store, "train", ids=store.split("test").ids.tolist())


# The command line


@pytest.fixture
def run():
    app = pytest.importorskip("simlab.cli.store").app

    def run(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    return run


def test_command_line(tmp_path, run):
    store = SnapshotStore.create(tmp_path / "s", make_schema(2, 1), n=10, seed=SEED)
    writer = store.writer()
    for traj in range(9):
        write(writer, store.schema, traj)
    writer.begin(sample_of(store.schema, 9))
    writer.close()
    assert json.loads(run("status", store.path, "--json").stdout)["n_unsealed"] == 9
    assert "abandoned    trajectory 9" in run("recover", store.path).stdout
    assert run("seal", store.path).stdout == ""
    assert run("seal", store.path, "--final").stdout.count("sealed data/") == 3
    assert run("verify", store.path, "--deep").exit_code == 0
    assert run("stats", store.path).stdout == (store.path / "stats.yaml").read_text()
    assert run("view", "pdebench", store.path).stdout.strip().endswith("pdebench_toy.hdf5")
    assert run("xdmf", store.path, "--split", "test").stdout.strip().endswith(".xdmf")
    victim = next((store.path / "data" / "train").glob("*.h5"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 16
    victim.write_bytes(data)
    assert run("verify", store.path).exit_code == 0
    found = run("verify", store.path, "--deep", "--quarantine")
    assert found.exit_code == 1
    assert "sha256" in found.stdout
    assert run("verify", store.path, "--deep").exit_code == 0
    assert "train           0" in run("status", store.path).stdout


def test_command_line_on_what_is_not_a_store(tmp_path, run):
    for verb in ("status", "verify", "seal", "recover", "stats"):
        assert run(verb, tmp_path).exit_code == 2
