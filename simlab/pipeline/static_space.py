"""The static space of a campaign: made once, for one reference system, shared by all chains.

    group 0      reference sample -> its system -> seed = solver.seed(system) -> static_space.npz
    all          the same system -> seed = Seed.load(file, system)

A solver takes part by having ``seed(system)``, which returns a :class:`~simlab.linalg.seed.Seed`,
or None when its settings ask for no such space; every chain then begins with ``init(system,
seed=seed)``. Where ``auto`` chose such a solver, its space is made after the pilot. The file is
kept: a resumed run loads it, and makes it anew when it was made for another layout of ranks or
unknowns.
"""

from __future__ import annotations

import logging
from typing import Any

from simlab.core.comm import Group, agreement
from simlab.core.errors import ConfigError
from simlab.core.runs import RunDirectory
from simlab.core.samples import Sample
from simlab.linalg.seed import Seed
from simlab.linalg.system import LinearSolver, LinearSystem
from simlab.pipeline.case import Case
from simlab.problems.reference import reference

__all__ = ["shared_seed"]

log = logging.getLogger("simlab.campaign")

_FILE = "static_space.npz"
_N_SAMPLES = 64


def shared_seed(
    case: Case, solver: LinearSolver, workspace: Any, run: RunDirectory, group: Group
) -> Seed | None:
    """Return the static space of a solver, or None when it has none.

    Collective on ``group.parent``.

    Parameters
    ----------
    solver : LinearSolver
        The case's, or what ``auto`` chose.
    workspace : object
        What the family's ``setup`` made for this group; its matrix is overwritten.
    """
    if not callable(getattr(solver, "seed", None)):
        return None
    comm, path = group.parent, run.path / _FILE
    system = case.family.assemble(_reference(case, group), workspace)
    seed, why = None, ""
    if comm.bcast(path.is_file()):
        seed, why = _loaded(system, run, group)
    if seed is not None:
        return seed
    is_made = False
    with agreement(comm, asleep=True):
        if group.index == 0:
            is_made = _make(case, solver, system, run, group, why)
    if not comm.bcast(is_made):
        return None
    seed, why = _loaded(system, run, group)  # group 0 as well: all have the same bits
    if seed is None:
        raise ConfigError(f"{path}: {why}")
    return seed


def _reference(case: Case, group: Group) -> Sample:
    """Return the reference sample, the same on every rank. Collective on the parent."""
    comm, space = group.parent, case.space
    found = None
    with agreement(comm):
        if comm.rank == 0:
            n = min(_N_SAMPLES, case.campaign.n)
            found = reference(space.sample(1, case.campaign.seed, i)[0] for i in range(n))
    sample: Sample = comm.bcast(found)
    return sample


def _make(
    case: Case, solver: Any, system: LinearSystem, run: RunDirectory, group: Group, why: str
) -> bool:
    """Compute and keep the space; False when the solver wants none. Collective on group 0."""
    seed: Seed | None = solver.seed(system)
    if seed is None:
        return False
    seed.save(run.path / _FILE)
    if group.is_root:
        n = min(_N_SAMPLES, case.campaign.n)
        note = f" (anew: {why})" if why else ""
        log.info("static space of the mean of %d samples: %s%s", n, run.path / _FILE, note)
    return True


def _loaded(system: LinearSystem, run: RunDirectory, group: Group) -> tuple[Seed | None, str]:
    """Return the space that is kept, or None and why some group cannot use it.

    Collective on the parent.
    """
    seed, why = None, ""
    try:
        seed = Seed.load(run.path / _FILE, system)
    except ConfigError as error:
        why = str(error)
    reasons = [reason for reason in group.parent.allgather(why) if reason]
    return (None, reasons[0]) if reasons else (seed, "")
