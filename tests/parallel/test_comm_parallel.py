"""Agreement and groups on 1, 2 and 3 ranks."""

from __future__ import annotations

import pytest

from simlab.core.comm import agree, agreement, split, wait_for_all, world
from simlab.core.errors import CollectiveError, ConfigError


@pytest.mark.parallel([1, 2, 3])
def test_one_rank_s_fault_is_raised_on_every_rank() -> None:
    comm = world()
    fault = ConfigError("the last rank is unhappy") if comm.rank == comm.size - 1 else None
    with pytest.raises(ConfigError) as caught:
        agree(comm, fault)
    assert caught.value.faults == ["the last rank is unhappy"]


@pytest.mark.parallel([2, 3])
def test_different_faults_are_listed_by_rank() -> None:
    comm = world()
    with pytest.raises(CollectiveError, match="rank 1: ValueError: 1") as caught, agreement(comm):
        raise ValueError(str(comm.rank))
    assert f"{comm.size} of {comm.size} ranks failed" in str(caught.value)


@pytest.mark.parallel([1, 2, 3])
def test_no_fault_no_error() -> None:
    comm = world()
    with agreement(comm):
        pass
    wait_for_all(comm)


@pytest.mark.parallel([1, 2, 3])
def test_groups_cover_all_ranks() -> None:
    comm = world()
    group = split(comm, 1)
    assert (group.comm.size, group.index, group.n_groups) == (1, comm.rank, comm.size)
    whole = split(comm, comm.size)
    assert (whole.comm.size, whole.index, whole.n_groups) == (comm.size, 0, 1)
    assert whole.is_root == (comm.rank == 0)


@pytest.mark.parallel([3])
def test_groups_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide the 3 ranks"):
        split(world(), 2)
