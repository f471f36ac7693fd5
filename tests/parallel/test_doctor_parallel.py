"""Under mpirun the doctor starts no ranks: those at hand shake hands."""

import os

import pytest
from pytest_mpi import parallel_assert

from simlab.cli import doctor


@pytest.mark.parallel([1, 2, 3])
def test_ranks_at_hand_shake_hands():
    (found,) = doctor.check_handshake()
    expected = os.environ["OMPI_COMM_WORLD_SIZE"]
    parallel_assert(found.state == "ok", str(found))
    parallel_assert(found.value.startswith(f"{expected} ranks agree"), found.value)


@pytest.mark.parallel(2)
def test_world_smaller_than_what_was_started(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "5")
    (found,) = doctor.check_handshake()
    parallel_assert(found.state == "fault", str(found))
    parallel_assert("each sees a world of 2" in found.value, found.value)
