"""What HDF5 writes through: any writes and reads, a disk that refuses, an end in order."""

import errno
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from simlab.store import files
from simlab.store.drafts import Draft


def open_draft(path):
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    return Draft(fd), fd


class Refusing:
    """``files.write_at`` on a disk that is full from the ``k``-th call on."""

    def __init__(self, monkeypatch, k):
        self.left, self.real = k, files.write_at
        monkeypatch.setattr(files, "write_at", self)

    def __call__(self, fd, data, offset):
        if self.left == 0:
            self.real(fd, memoryview(data)[: len(data) // 3], offset)  # torn
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        self.real(fd, data, offset)


@pytest.mark.parametrize("refused_from", [None, 0, 7])
def test_overlapping_writes_read_back_as_from_a_file(tmp_path, monkeypatch, refused_from):
    """Small and large blocks at any offsets, also after the disk has refused one."""
    rng = np.random.default_rng(811)
    draft, fd = open_draft(tmp_path / "a")
    if refused_from is not None:
        Refusing(monkeypatch, refused_from)
    model, size = bytearray(200_000), 0
    for _ in range(300):
        at = int(rng.integers(120_000))
        length = int(rng.choice([1, 48, 4096, 5000, 16384, 40_001]))
        if rng.random() < 0.5:
            data = rng.bytes(length)
            draft.seek(at)
            assert draft.write(memoryview(data)) == length
            model[at : at + length] = data
            size = max(size, at + length)
        else:
            draft.seek(at)
            assert draft.read(length) == model[at : at + length]
        assert draft.seek(0, os.SEEK_END) == size
    if refused_from is None:
        draft.check()
        draft.truncate(size + 77)
        draft.finish()
        assert (tmp_path / "a").read_bytes() == model[: size + 77]
    else:
        with pytest.raises(OSError, match="No space"):
            draft.check()
        with pytest.raises(OSError, match="No space"):
            draft.finish()
    os.close(fd)


def fill(file):
    rng = np.random.default_rng(812)
    for number in range(6):
        values = rng.standard_normal((8, 40, 40, 3))
        name = f"group{number}/values"
        file.create_dataset(name, data=values, chunks=(1, 40, 40, 3), fletcher32=True)
        file[name].attrs["number"] = number
        assert np.array_equal(file[name][:], values)


def test_hdf5_writes_the_file_that_it_would_write_itself(tmp_path):
    settings = {"libver": ("v110", "v110"), "fs_strategy": "page", "fs_page_size": 4096}
    draft, fd = open_draft(tmp_path / "a.h5")
    with h5py.File(draft, "w", **settings) as file:
        fill(file)
    draft.finish()
    os.close(fd)
    with h5py.File(tmp_path / "b.h5", "w", **settings) as file:
        fill(file)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize("k", [0, 3, 47])
def test_hdf5_ends_in_order_when_the_disk_refuses(tmp_path, monkeypatch, k):
    Refusing(monkeypatch, k)
    draft, fd = open_draft(tmp_path / "a.h5")
    with h5py.File(draft, "w") as file:
        fill(file)  # reads its values back
    with pytest.raises(OSError, match="No space"):
        draft.finish()
    os.close(fd)
    assert not h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)


def test_a_process_whose_shards_meet_a_full_disk_ends_in_order(tmp_path):
    """Shards of megabytes, a limit in the middle of the values; with space all is sealed."""
    script = """
import resource, sys
import numpy as np
from simlab.core.errors import StoreError
from simlab.core.samples import Sample
from simlab.store.schema import Axis, FieldSpec, Schema
from simlab.store.store import SnapshotStore
axes = tuple(Axis(name, tuple(np.arange(160.0).tolist())) for name in "xy")
schema = Schema("big", axes, (FieldSpec("u"),))
store = SnapshotStore.create(sys.argv[1], schema, n=40, seed=3)
with store.writer() as writer:
    for traj in range(40):
        writer.begin(Sample(traj, 3))
        writer.append(traj, 0, 0.0, {"u": np.full((160, 160), float(traj))})
        writer.finish(traj)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (0, 20_000, 700_001, 1_500_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        store.seal(final=True)
    except StoreError as error:
        assert "too large" in str(error), error
    else:
        raise SystemExit("sealed beyond the limit")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
store.recover()
store.seal(final=True)
assert store.verify(deep=True) == [], store.verify(deep=True)
assert len(store.done()) == 40 and len(store.split("train")) == 32
print("in order")
"""
    words = [sys.executable, "-c", script, str(tmp_path / "s")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "in order\n", "")
