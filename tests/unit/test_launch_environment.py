"""What a side of a supervised run finds in its environment."""

import pytest

from simlab.pipeline.online import launch_environment


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "OMPI_MCA_mpi_yield_when_idle"])
def test_who_waits_gives_way_unless_told_otherwise(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    assert launch_environment()[name] == {"OMP_WAIT_POLICY": "PASSIVE"}.get(name, "1")
    monkeypatch.setenv(name, "0")
    assert launch_environment()[name] == "0"


def test_an_outer_launcher_is_forgotten_and_its_settings_stay(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_MCA_btl", "self,vader")
    found = launch_environment(threads=5)
    assert "OMPI_COMM_WORLD_RANK" not in found
    assert (found["OMPI_MCA_btl"], found["OMP_NUM_THREADS"]) == ("self,vader", "5")
