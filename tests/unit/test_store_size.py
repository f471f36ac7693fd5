"""Shards are hardly larger than the values in them, whatever the size of a step."""

import numpy as np
import pytest
from store_helpers import SEED

from simlab.core.samples import Sample
from simlab.store.schema import Axis, FieldSpec, Schema
from simlab.store.storage import Storage
from simlab.store.store import SnapshotStore


@pytest.mark.parametrize("profile", ["default", "fast"])
@pytest.mark.parametrize("cells", [(128, 128), (256, 128), (512, 512), (300, 301)])
def test_a_shard_is_as_large_as_its_values(tmp_path, cells, profile):
    axes = tuple(Axis(a, tuple(range(n))) for a, n in zip("xy", cells, strict=True))
    schema = Schema("size", axes, (FieldSpec("u"),), times=tuple(range(9)))
    store = SnapshotStore.create(
        tmp_path / "s", schema, n=2, seed=SEED, split={"train": 1.0}, storage=Storage(profile)
    )
    values = {"u": np.ones(cells, dtype=np.float32)}
    with store.writer() as writer:
        for traj in range(2):
            writer.begin(Sample(traj, SEED))
            for step in range(9):
                writer.append(traj, step, float(step), values)
            writer.finish(traj)
    store.seal(final=True)
    n_bytes = 2 * schema.values_per_sample * 4
    assert n_bytes < store.status().n_bytes < 1.07 * n_bytes + 100_000
