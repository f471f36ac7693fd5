"""A campaign of 1e5 trajectories: counting and starting to read stay quick and small."""

import json
import subprocess
import sys

import numpy as np
import pytest
from store_helpers import SEED

from simlab.store.schema import Axis, FieldSpec, Schema
from simlab.store.store import SnapshotStore

N = 100_000
PER_SHARD = 128  # of 1 MiB each
MEASURE = """
import json, resource, sys, time
from simlab.store.loader import Loader
from simlab.store.store import SnapshotStore
start = time.process_time()
status = SnapshotStore.open(sys.argv[1]).status()
counted = time.process_time()
loader = Loader(SnapshotStore.open(sys.argv[1]), "train", ahead=1, seed=7)
loader.locate(loader.order(0)[:64])
started = time.process_time()
print(json.dumps({
    "done": sum(split.done for split in status.splits.values()),
    "windows": len(loader),
    "status_s": counted - start,
    "loader_s": started - counted,
    "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


def declare(store):
    """Write the manifest lines of a finished campaign whose shards nobody made."""
    moment = {"count": 1, "min": 0.0, "max": 1.0, "mean": 0.5, "m2": 0.25}
    rng = np.random.default_rng(SEED)
    for split in store.fractions:
        ids = rng.permutation(store.ids(split))
        for number, first in enumerate(range(0, len(ids), PER_SHARD)):
            rows = ids[first : first + PER_SHARD]
            at = np.arange(len(rows)) * (1 << 20)
            store.manifest.append(
                {
                    "kind": "shard",
                    "shard": f"{split}/{store.uuid[:8]}-whost-7-{number:06d}.h5",
                    "bytes": int(len(rows) << 20),
                    "sha256": "0" * 64,
                    "n_steps": 16,
                    "traj": rows.tolist(),
                    "attempt": [1] * len(rows),
                    "segments": [f"host-7-8-{split}.{number:06d}.seg"],
                    "source": [0] * len(rows),
                    "begin": at.tolist(),
                    "end": (at + (1 << 20)).tolist(),
                    "reasons": [],
                    "params": {name: rng.random(len(rows)).tolist() for name in ("mu", "nu")},
                    "moments": {"u": moment, "u.delta": moment},
                }
            )


@pytest.mark.slow
def test_a_hundred_thousand_trajectories(tmp_path):
    axes = tuple(Axis(name, tuple(np.linspace(0, 1, 128).tolist())) for name in "xy")
    schema = Schema(
        "large",
        axes,
        (FieldSpec("u"),),
        times=tuple(0.1 * k for k in range(16)),
        parameters={"mu": "1", "nu": "1"},
    )
    store = SnapshotStore.create(tmp_path / "s", schema, n=N, seed=SEED)
    declare(store)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(store.path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["done"] == N
    assert found["windows"] == len(store.ids("train")) * 15
    assert found["status_s"] < 2
    assert found["loader_s"] < 5
    assert found["mb"] < 300
