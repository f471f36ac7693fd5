"""A case says how its store keeps values."""

import subprocess

import h5py
import pytest
from commands import ROOT, command, environment

from simlab.core.config import as_table
from simlab.core.errors import ConfigError
from simlab.pipeline.case import Campaign
from simlab.store.storage import Storage
from simlab.store.store import SnapshotStore

CASE = """
[family]
kind = "heat"
cells = 12
dt = 0.01
n_steps = 3

[solver]
kind = "direct"

[campaign]
n = 10
profile = "fast"
float64 = true
"""


def test_a_case_chooses_profile_and_precision(tmp_path):
    case = tmp_path / "case.toml"
    case.write_text(CASE)
    line = command(["generate", case, "--out", tmp_path / "run"])
    done = subprocess.run(
        line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    store = SnapshotStore.open(tmp_path / "run" / "store")
    assert store.storage == Storage("fast", float64=True)
    assert store.verify(deep=True) == []
    (path, *_) = (store.path / "data" / "train").glob("*.h5")
    with h5py.File(path) as file:
        assert file["simlab/f64/u"].dtype == "f8"
        assert file["t0_fields/u"].chunks is None


def test_what_a_case_does_not_say_is_not_in_its_table():
    assert not {"profile", "float64"} & set(as_table(Campaign()))  # older runs can be resumed
    assert Campaign().storage == Storage()
    with pytest.raises(ConfigError, match="profile"):
        Campaign(profile="slow")
