"""The static space of a campaign: made once, for one reference system, shared by all chains.

    group 0      reference sample -> its system -> seed = solver.seed(system) -> static_space.npz
    all others   the same system -> seed = Seed.load(file, system)

A solver takes part by having ``seed(system)``, which returns a value with ``save(path)`` and a
class method ``load(path, system)``, or None when its settings ask for no such space; every chain
then begins with ``init(system, seed=seed)``. Where ``auto`` chose such a solver, its space is made
after the pilot. The file is kept: a resumed run loads it, and makes it anew when it was made for
another layout of ranks or unknowns (``load`` raises ConfigError).
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from simlab.core.comm import Group, agreement
from simlab.core.errors import ConfigError
from simlab.core.runs import RunDirectory
from simlab.core.samples import Sample
from simlab.linalg.system import LinearSolver, LinearSystem
from simlab.pipeline.case import Case
from simlab.problems.reference import reference

__all__ = ["shared_seed"]

log = logging.getLogger("simlab.campaign")

_KEY, _FILE = "static_space", "static_space.npz"
_N_SAMPLES = 64


def shared_seed(
    case: Case, solver: LinearSolver, workspace: Any, run: RunDirectory, group: Group
) -> Any:
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
    comm = group.parent
    system = case.family.assemble(_reference(case, group), workspace)
    kept = None
    with agreement(comm):
        if comm.rank == 0 and (run.path / _FILE).is_file():
            kept = run.manifest().get(_KEY)
    kind = _class(comm.bcast(kept))
    seed, why = _loaded(kind, system, run, group)
    if kind is not None and not why:
        return seed
    made = None
    with agreement(comm, asleep=True):
        if group.index == 0:
            made = _made(case, solver, system, run, group, why)
    kind = comm.bcast(None if made is None else type(made))
    if made is not None:
        _destroy(made)  # group 0 reads the file as well: all have the same bits
    seed, why = _loaded(kind, system, run, group)
    if why:
        raise ConfigError(f"{run.path / _FILE}: {why}")
    return seed


def _reference(case: Case, group: Group) -> Sample:
    """Return the reference sample, the same on every rank. Collective on the parent."""
    comm, space = group.parent, case.family.space
    found = None
    with agreement(comm):
        if comm.rank == 0:
            n = min(_N_SAMPLES, case.campaign.n)
            found = reference(space.sample(1, case.campaign.seed, i)[0] for i in range(n))
    sample: Sample = comm.bcast(found)
    return sample


def _made(
    case: Case, solver: Any, system: LinearSystem, run: RunDirectory, group: Group, why: str
) -> Any:
    """Compute and keep the space. Collective on group 0."""
    seed = solver.seed(system)
    if seed is None:
        return None
    path, part = run.path / _FILE, run.path / f".part.{_FILE}"
    seed.save(part)
    if group.is_root:
        part.replace(path)
        name = f"{type(seed).__module__}:{type(seed).__qualname__}"
        n = min(_N_SAMPLES, case.campaign.n)
        run.update(**{_KEY: {"type": name, "n_samples": n}})
        note = f" (anew: {why})" if why else ""
        log.info("static space of the mean of %d samples kept in %s%s", n, path, note)
    return seed


def _loaded(kind: Any, system: LinearSystem, run: RunDirectory, group: Group) -> tuple[Any, str]:
    """Return the space that is kept, and why it cannot be used on some group, if so.

    Collective on the parent.
    """
    seed, why = None, ""
    if kind is not None:
        try:
            seed = kind.load(run.path / _FILE, system)
        except ConfigError as error:
            why = str(error)
    reasons = [reason for reason in group.parent.allgather(why) if reason]
    if reasons and seed is not None:
        _destroy(seed)
        seed = None
    return seed, reasons[0] if reasons else ""


def _destroy(seed: Any) -> None:
    if hasattr(seed, "destroy"):
        seed.destroy()


def _class(kept: Any) -> Any:
    """Return the class a manifest entry names, or None when there is no such class (any more)."""
    if not isinstance(kept, dict):
        return None
    module, _, name = str(kept.get("type", "")).partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
