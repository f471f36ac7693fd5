"""Windows as torch tensors: the loader's values and order, with and without workers."""

import numpy as np
import pytest
import torch
from store_helpers import SEED, make_schema, write
from torch.utils.data import DataLoader

from simlab.learn.windows import WindowDataset, window_batches
from simlab.store.loader import Loader
from simlab.store.store import SnapshotStore


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    schema = make_schema(2, 5)
    path = tmp_path_factory.mktemp("windows") / "store"
    store = SnapshotStore.create(path, schema, n=20, seed=SEED)
    with store.writer(segment_bytes=9000) as writer:
        for traj in range(20):
            write(writer, schema, traj)
    store.seal(final=True, shard_bytes=20_000)
    return Loader(store, "train", ahead=1, seed=7)


def assert_equal(tensors, windows):
    for name in ("ids", "steps"):
        assert np.array_equal(getattr(tensors, name), getattr(windows, name))
    for name in ("parameters", "times"):
        found = getattr(tensors, name)
        assert found.dtype == torch.float32
        assert np.array_equal(found, getattr(windows, name).astype(np.float32))
    for name in ("inputs", "outputs"):
        fields = getattr(windows, name)
        assert getattr(tensors, name).keys() == fields.keys()
        for field, values in fields.items():
            assert np.array_equal(getattr(tensors, name)[field], values)
    assert tensors.cursor == windows.cursor


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_from_any_number_of_workers(loader, workers):
    cursor = next(loader.batches(6)).cursor
    expected = list(loader.batches(9, cursor, epochs=2))
    found = list(window_batches(loader, 9, cursor, epochs=2, workers=workers))
    assert len(found) == len(expected) == 7 + 8
    for tensors, windows in zip(found, expected, strict=True):
        assert_equal(tensors, windows)


def test_single_windows_stack_as_usual(loader):
    dataset = WindowDataset(loader)
    assert len(dataset) == len(loader)
    windows = loader.read([5, 6, 7])
    batch = next(iter(DataLoader(torch.utils.data.Subset(dataset, [5, 6, 7]), batch_size=3)))
    assert batch["id"].tolist() == windows.ids.tolist()
    assert batch["step"].tolist() == windows.steps.tolist()
    assert np.array_equal(batch["u"], windows.outputs["u"])
    assert np.array_equal(batch["k"], windows.inputs["k"])
    assert np.array_equal(batch["parameters"], windows.parameters.astype(np.float32))
