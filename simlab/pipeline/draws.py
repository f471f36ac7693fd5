"""Where the next sample of a campaign comes from: the case's space, or what training wants to see.

With active sampling (:mod:`simlab.problems.breed`) the parameters of a training sample are drawn
when it is its turn, from the newest generation there is, and which one that is gets written down
before anything is solved (:mod:`simlab.problems.generations`). A sample that is drawn again keeps
its generation and so its parameters. Held-out samples are those of the case's space, uniform, and
so is everything while no trainer is about.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from simlab.core.comm import Group, agreement
from simlab.core.runs import RunDirectory
from simlab.pipeline.case import Case
from simlab.problems.breed import Breed, Breeder
from simlab.problems.family import ParameterSpace
from simlab.problems.generations import DrawLog, GenerationFiles
from simlab.problems.samplers import Given
from simlab.problems.spaces import bounds_of, sampled_by
from simlab.store.store import SnapshotStore

if TYPE_CHECKING:
    from simlab.learn.active import ActiveSampling
    from simlab.store.channel import Channel

__all__ = ["Draws", "active_sampling"]


def active_sampling(case: Case, run: RunDirectory, channel: Channel) -> ActiveSampling | None:
    """Return the trainer's side of a run's active sampling; None where there is none."""
    from simlab.learn.active import ActiveSampling

    sampler = case.campaign.sampler
    if not isinstance(sampler, Breed):
        return None
    return ActiveSampling(
        sampler,
        bounds_of(case.space),
        case.campaign.seed,
        _directory(run),
        n_runs=len(channel.ids("train")),
        n_steps=len(channel.schema.times),
    )


def _directory(run: RunDirectory) -> Path:
    """Return where a run keeps generations and draws."""
    return run.path / "sampling"


class Draws:
    """Says from which space each sample of a group's chain is drawn.

    Parameters
    ----------
    case : Case
    run : RunDirectory
    store : SnapshotStore
        Knows the splits.
    group : Group
        Its root reads and writes the files of the run.
    """

    def __init__(self, case: Case, run: RunDirectory, store: SnapshotStore, group: Group) -> None:
        self._case, self._run, self._store, self._group = case, run, store, group

    @cached_property
    def _root(self) -> _Root:
        sampler = self._case.campaign.sampler
        assert isinstance(sampler, Breed)
        return _Root(sampler, self._case, _directory(self._run))

    def space_of(self, index: int) -> ParameterSpace:
        """Return the space that sample ``index`` is drawn from; collective on the group."""
        case = self._case
        if not isinstance(case.campaign.sampler, Breed) or self._store.split_of(index) != "train":
            return case.space
        point = None
        with agreement(self._group.comm):
            if self._group.is_root:
                point = self._root.point(index)
        return sampled_by(case.family.space, Given(self._group.comm.bcast(point)))


class _Root:
    """What the root of a group knows of the generations."""

    def __init__(self, breed: Breed, case: Case, directory: Path) -> None:
        bounds = bounds_of(case.space)
        self._names = tuple(bounds)
        self._breeder = Breeder(breed, bounds, case.campaign.seed)
        self._files, self._log = GenerationFiles(directory), DrawLog(directory)
        self._known = self._log.news()

    def point(self, index: int) -> dict[str, float]:
        """Return the parameters of a sample by name, its generation written down."""
        for generation, _ in self._files.news():
            self._breeder.add(generation)
        if index not in self._known:
            self._known[index] = self._breeder.newest
            self._log.note(index, self._breeder.newest)
        made = self._breeder.draw([index], self._known[index])[0]
        return dict(zip(self._names, made.tolist(), strict=True))
