"""Where the next sample of a campaign comes from: which space, and from which seed.

With active sampling (:mod:`simlab.problems.breed`) the parameters of a training sample are drawn
when it is its turn, from the newest generation there is, and which one that is gets written down
before anything is solved (:mod:`simlab.problems.generations`). A sample that is drawn again keeps
its generation and so its parameters. Held-out samples are those of the case's space, uniform, and
so is everything while no trainer is about.

With ``campaign.redraws`` a sample that fails at once is drawn anew, from another seed. That too is
written down before anything is done, so that a campaign which is killed there goes on with the same
draw.
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

__all__ = ["Draws", "active_sampling", "redrawn"]

_APART = 1_000_003  # the seeds of a sample's draws


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


def redrawn(run: RunDirectory) -> dict[int, int]:
    """Return how often each sample of a run was drawn anew, where it was."""
    return dict(_redraws(run).lines())


def _redraws(run: RunDirectory) -> DrawLog:
    return DrawLog(_directory(run), "redraws.log")


def _directory(run: RunDirectory) -> Path:
    """Return where a run keeps generations and draws."""
    return run.path / "sampling"


class Draws:
    """Says from which space and seed each sample of a group's chain is drawn.

    Collective on the group: when made, and every method.

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
        found: tuple[dict[int, int], set[int]] = {}, set()
        with agreement(group.comm):
            if group.is_root and case.campaign.redraws:
                found = redrawn(run), _with_steps(store)
        self._redrawn, self._with_steps = group.comm.bcast(found)

    @cached_property
    def _root(self) -> _Root:
        sampler = self._case.campaign.sampler
        assert isinstance(sampler, Breed)
        return _Root(sampler, self._case, _directory(self._run))

    def seed_of(self, index: int) -> int:
        """Return the seed that sample ``index`` is drawn from."""
        return self._case.campaign.seed + _APART * self._redrawn.get(index, 0)

    def redraw(self, index: int) -> bool:
        """Draw a sample from the next seed from now on; False when it must be taken as failed.

        That is when it was drawn often enough, and when an earlier start of the campaign has stored
        a step of it, which may have been learned from as this sample.
        """
        number = self._redrawn.get(index, 0) + 1
        if number > self._case.campaign.redraws or index in self._with_steps:
            return False
        self._redrawn[index] = number
        with agreement(self._group.comm):
            if self._group.is_root:
                _redraws(self._run).note(index, number)
        return True

    def space_of(self, index: int) -> ParameterSpace:
        """Return the space that sample ``index`` is drawn from."""
        case = self._case
        if not isinstance(case.campaign.sampler, Breed) or self._store.split_of(index) != "train":
            return case.space
        point = None
        with agreement(self._group.comm):
            if self._group.is_root:
                point = self._root.point(index)
        return sampled_by(case.family.space, Given(self._group.comm.bcast(point)))


def _with_steps(store: SnapshotStore) -> set[int]:
    """Return the ids of which an attempt that never ended has left steps."""
    store.refresh()
    segments = store.inflight.segments.values()
    return {run.traj for item in segments for run in item.runs.values() if run.n_steps}


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
