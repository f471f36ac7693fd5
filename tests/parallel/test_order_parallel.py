"""Orders and static spaces on several ranks: the same whatever their number, made once."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from simlab.core.comm import split, world
from simlab.core.config import build
from simlab.core.runs import RunDirectory
from simlab.linalg.krylov import CGICC
from simlab.linalg.ordering import orderings
from simlab.linalg.seed import seed_space
from simlab.pipeline.case import Case
from simlab.pipeline.order import Order, make_order
from simlab.pipeline.static_space import shared_seed
from simlab.problems.darcy import Darcy
from simlab.store.splits import assign

N = 40
FAMILY = Darcy(cells=8)
CASE = build(Case, {"family": FAMILY, "solver": "cg_icc", "campaign": {"n": N, "seed": 9157}})


def parts() -> list[np.ndarray]:
    which = assign(np.arange(N), 9157, CASE.campaign.split)
    return [np.flatnonzero(which > 0), np.flatnonzero(which == 0)]


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("kind", ["greedy", "hilbert"])
def test_the_order_does_not_depend_on_the_ranks(kind) -> None:
    ordering = orderings.build(kind)
    first = parts()[0][:2]
    order = make_order(CASE, ordering, parts(), first, world())
    alone = make_order(CASE, ordering, parts(), first, world().Split(world().rank))
    assert order.path.tolist() == alone.path.tolist()
    assert order.path[:2].tolist() == first.tolist()
    n_held_out = len(parts()[0])
    assert sorted(order.path[:n_held_out].tolist()) == parts()[0].tolist()
    assert sorted(order.path.tolist()) == list(range(N))
    if world().rank == 0:
        np.testing.assert_array_equal(order.keys, alone.keys)
        assert order.ratio() < 1
        pieces = order.chains(parts()[1], 3)
        assert np.concatenate(pieces).tolist() == order.path[n_held_out:].tolist()
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 3
        assert [len(piece) for piece in order.chains(parts()[1][:2], 3)] == [1, 1, 0]


@pytest.mark.parallel([1, 3])
def test_a_path_as_drawn_is_cut_evenly() -> None:
    order = make_order(CASE, orderings.build("sample"), parts(), np.arange(0), world())
    assert isinstance(order, Order)
    assert order.path.tolist() == np.concatenate(parts()).tolist()
    assert [len(piece) for piece in order.chains(np.arange(10), 4)] == [3, 3, 2, 2]


class Seeding(CGICC):
    """Notes where its static space is made."""

    kind: ClassVar[str] = "seeding_for_tests"
    made: ClassVar[list[int]] = []

    def seed(self, system):
        self.made.append(world().rank)
        return seed_space(system, 3)


class Unseeded(CGICC):
    kind: ClassVar[str] = "unseeded_for_tests"

    def seed(self, system):
        return None


def seed_of(solver, out: Path):
    group = split(world(), max(1, world().size // 2))
    workspace = FAMILY.setup(group.comm)
    try:
        return shared_seed(CASE, solver, workspace, RunDirectory(out), group), group
    finally:
        workspace.destroy()


@pytest.fixture
def out(tmp_path_factory) -> Path:
    path = world().bcast(tmp_path_factory.mktemp("run") if world().rank == 0 else None)
    if world().rank == 0:
        RunDirectory.start(path, CASE.tables(), resume=True)
    Seeding.made.clear()
    world().Barrier()
    return path


@pytest.mark.parallel([1, 2, 4])
def test_group_0_makes_the_static_space_and_all_load_it(out) -> None:
    seed, group = seed_of(Seeding(), out)
    assert Seeding.made == ([world().rank] if group.index == 0 else [])
    whole = np.concatenate(group.comm.allgather(seed.vectors))
    for other in world().allgather(whole):
        np.testing.assert_array_equal(whole, other)
    again, _ = seed_of(Seeding(), out)
    np.testing.assert_array_equal(again.vectors, seed.vectors)
    assert len(Seeding.made) <= 1  # loaded
    if world().rank == 0:
        (out / "static_space.npz").write_bytes(b"damaged")
    world().Barrier()
    seed_of(Seeding(), out)
    assert len(Seeding.made) == (2 if group.index == 0 else 0)
    world().Barrier()


@pytest.mark.parallel([1, 2])
def test_no_space_wanted_no_space_made(out) -> None:
    assert seed_of(Unseeded(), out)[0] is None
    assert seed_of(CGICC(), out)[0] is None
    assert not (out / "static_space.npz").exists()
    world().Barrier()
