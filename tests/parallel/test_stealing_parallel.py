"""Work that changes hands between groups: everything once, tails only, nobody waits for ever."""

from __future__ import annotations

import time
from itertools import chain, pairwise

import pytest

from simlab.core.comm import split, world
from simlab.core.errors import CollectiveError
from simlab.pipeline.stealing import SEGMENT, Crew


def never() -> bool:
    return False


def walked(crew: Crew, ids, seconds: float, stop=never) -> list[int]:
    """Walk one phase with a sleep per sample."""
    found = []
    for index in crew.walk(ids, stop):
        time.sleep(seconds)
        found.append(index)
    crew.gather()
    return found


def flat(walks: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(walks))


def by_group(group, found) -> list[list[int]]:
    """Return what every group walked, on every rank; ranks of a group must agree."""
    everything = group.parent.allgather((group.index, found))
    walks = [[walk for index, walk in everything if index == g] for g in range(group.n_groups)]
    for same in walks:
        assert all(walk == same[0] for walk in same)
    return [same[0] for same in walks]


@pytest.mark.parallel([1, 2, 3])
def test_idle_groups_take_tails_and_everything_is_walked_once() -> None:
    group = split(world(), 1)
    mine = list(range(90)) if group.index == 0 else []
    with Crew(group) as crew:
        walks = by_group(group, walked(crew, mine, 0.004))
        taken = group.parent.allgather(crew.n_taken)
    assert sorted(index for walk in walks for index in walk) == list(range(90))
    assert walks[0] == list(range(len(walks[0])))  # the owner keeps the front
    for walk, n_taken in zip(walks[1:], taken[1:], strict=True):
        assert 0 < len(walk) <= n_taken  # a thief may be robbed of a tail as well
        breaks = [0, *(i for i, (a, b) in enumerate(pairwise(walk), 1) if b != a + 1), len(walk)]
        stretches = [b - a for a, b in pairwise(breaks)]
        assert min(stretches) >= SEGMENT // 2
        assert max(stretches) >= SEGMENT
    if group.n_groups > 1:
        assert max(map(len, walks)) < 70


@pytest.mark.parallel([2, 3])
def test_a_slow_group_is_relieved_and_short_chains_stay_whole() -> None:
    group = split(world(), 1)
    mine = [100 * group.index + i for i in range(40)]
    with Crew(group) as crew:
        slow = by_group(group, walked(crew, mine, 0.02 if group.index == 0 else 0.001))
        short = by_group(group, walked(crew, mine[:12], 0.01 if group.index == 0 else 0.0))
    assert sorted(flat(slow)) == [100 * g + i for g in range(group.n_groups) for i in range(40)]
    assert len(slow[0]) <= 25
    assert short == [[100 * g + i for i in range(12)] for g in range(group.n_groups)]


@pytest.mark.parallel([4])
def test_the_ranks_of_a_group_follow_their_root() -> None:
    group = split(world(), 2)
    with Crew(group) as crew:
        for phase in range(3):
            mine = [60 * phase + i for i in range(60)] if group.index == phase % 2 else []
            walks = by_group(group, walked(crew, mine if group.is_root else [], 0.003))
            assert sorted(flat(walks)) == [60 * phase + i for i in range(60)]
            assert min(map(len, walks)) >= SEGMENT


@pytest.mark.parallel([2, 3])
def test_many_phases_in_a_row_keep_their_messages_apart() -> None:
    group = split(world(), 1)
    with Crew(group) as crew:
        for phase in range(40):
            mine = [phase] * 16 if group.index == phase % group.n_groups else []
            walks = by_group(group, walked(crew, mine, 0.0))
            assert flat(walks) == [phase] * 16


@pytest.mark.parallel([2, 3])
def test_a_stop_ends_walkers_and_thieves() -> None:
    group = split(world(), 1)
    end = time.perf_counter() + 0.3
    mine = range(10_000) if group.index == 0 else []
    with Crew(group) as crew:
        walks = by_group(group, walked(crew, mine, 0.01, lambda: time.perf_counter() > end))
    assert time.perf_counter() < end + 2
    found = flat(walks)
    assert 0 < len(found) < 200
    assert len(set(found)) == len(found)


@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize("victim", ["walking", "thief"])
def test_a_group_that_fails_takes_the_others_along(victim) -> None:
    group = split(world(), max(1, world().size // 2))
    mine = range(2000) if (group.index == 0) == (victim == "walking") else []
    begun = time.perf_counter()

    def work() -> None:
        with Crew(group) as crew:
            for _ in crew.walk(mine, never):
                time.sleep(0.005)
                if group.index == 0 and time.perf_counter() - begun > 0.15:
                    raise ZeroDivisionError("the cosmic ray")
            crew.gather()

    with pytest.raises((CollectiveError, ZeroDivisionError)) as caught:
        work()
    assert time.perf_counter() - begun < 3
    assert caught.type is (ZeroDivisionError if group.index == 0 else CollectiveError)
    if group.index == 1 and group.is_root:
        assert "group 0 failed" in str(caught.value)
        assert "the cosmic ray" in str(caught.value)
    group.parent.Barrier()
