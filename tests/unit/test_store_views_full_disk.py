"""A disk that is full while a view is made: an error, and the process lives."""

import os
import resource
import signal

import pytest
from store_helpers import SEED, make_schema, write

from simlab.core.errors import StoreError
from simlab.store.pdebench import pdebench
from simlab.store.store import SnapshotStore
from simlab.store.views import master, verify_view
from simlab.store.xdmf import xdmf

LIMIT = 1500


@pytest.mark.parametrize("view", [master, pdebench, xdmf])
def test_a_full_disk_ends_no_process(tmp_path, view):
    store = SnapshotStore.create(tmp_path / "s", make_schema(2, 3), n=8, seed=SEED)
    with store.writer() as writer:
        for traj in range(8):
            write(writer, store.schema, traj)
    store.seal(final=True)
    child = os.fork()  # HDF5 may take the process down, at exit
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
            with pytest.raises(StoreError, match="File too large"):
                view(store)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert not list((store.path / "views").glob("*"))
    made = view(store)
    assert view is xdmf or verify_view(store, made) == []
