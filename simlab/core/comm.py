"""Communicators: the only module that imports mpi4py, and only when one is asked for.

Either every rank reaches a collective call or none does. A fault that only one rank sees is agreed
on first (:func:`agree`), then raised on every rank, so that nobody waits for a rank that has gone.
What slips through anyway ends the whole job within seconds (:func:`install_abort_hook`).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simlab.core.errors import CollectiveError, ConfigError, DependencyError, SimlabError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "Group",
    "agree",
    "agreement",
    "install_abort_hook",
    "is_initialised",
    "launch_rank",
    "launched_by_mpi",
    "library_version",
    "self_comm",
    "split",
    "world",
]

_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


def launched_by_mpi() -> bool:
    """Return whether a process launcher started this process. Imports nothing."""
    return any(name in os.environ for name in _LAUNCHER_VARIABLES)


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise DependencyError(
            f"mpi4py cannot be imported ({error}); run `make setup`, see docs/install.md"
        ) from error
    return MPI


def world() -> MPI.Comm:
    """Return the communicator of all ranks that were started together."""
    return _mpi().COMM_WORLD


def self_comm() -> MPI.Comm:
    """Return the communicator of this rank alone."""
    return _mpi().COMM_SELF


def library_version() -> str:
    """Return the first line of what the MPI library says it is, e.g. ``"Open MPI v4.1.4"``."""
    text: str = _mpi().Get_library_version()
    return text.strip("\x00 \n").splitlines()[0].split(",")[0]


@dataclass(frozen=True)
class Group:
    """One solver group: the ranks that work on one system together.

    Attributes
    ----------
    comm : MPI.Comm
        Ranks of this group.
    index, n_groups : int
        Which group this is, of how many.
    parent : MPI.Comm
        The communicator that was split.
    """

    comm: MPI.Comm
    index: int
    n_groups: int
    parent: MPI.Comm

    @property
    def is_root(self) -> bool:
        """Whether this rank is the one that writes for its group."""
        return self.comm.rank == 0


def split(parent: MPI.Comm, ranks_per_group: int = 1) -> Group:
    """Split a communicator into groups of equal size. Collective on ``parent``.

    Raises
    ------
    ConfigError
        When the number of ranks is not a multiple of ``ranks_per_group``.
    """
    if ranks_per_group < 1 or parent.size % ranks_per_group:
        raise ConfigError(
            f"campaign.ranks_per_group = {ranks_per_group} does not divide the {parent.size} "
            "ranks; start a multiple of it with mpirun -n"
        )
    index = parent.rank // ranks_per_group
    return Group(parent.Split(index, parent.rank), index, parent.size // ranks_per_group, parent)


def agree(comm: MPI.Comm, error: BaseException | None) -> None:
    """Raise on every rank when any rank brings an error. Collective.

    The same simlab error met on all ranks, or on one, is raised as it is; different ones are
    gathered in a
    :class:`CollectiveError` that lists ranks and reasons.
    """
    if comm.size == 1:
        if error is not None:
            raise error
        return
    portable = (
        error
        if error is None or isinstance(error, SimlabError)
        else f"{type(error).__name__}: {error}"
    )
    found = {rank: item for rank, item in enumerate(comm.allgather(portable)) if item is not None}
    if not found:
        return
    texts = {str(item) for item in found.values()}
    agreed = next(iter(found.values()))
    if len(texts) > 1 or not isinstance(agreed, SimlabError):
        reasons = "; ".join(f"rank {rank}: {item}" for rank, item in found.items())
        agreed = CollectiveError(f"{len(found)} of {comm.size} ranks failed: {reasons}")
    agreed.is_agreed = comm.size == world().size
    raise agreed from error


@contextmanager
def agreement(comm: MPI.Comm, asleep: bool = False) -> Iterator[None]:
    """Run rank-local work and :func:`agree` on its outcome. Collective, no such call inside.

    With ``asleep`` ranks that have little to do sleep until the others are through.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if asleep:
        wait_for_all(comm)
    agree(comm, error)


def wait_for_all(comm: MPI.Comm) -> None:
    """Wait, asleep, until every rank arrives: a plain barrier spins. Collective."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.002)


def launch_rank() -> int:
    """Return this process's rank as its launcher says it, 0 without one. Imports nothing."""
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)


def is_initialised() -> bool:
    """Return whether MPI has been started in this process."""
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and bool(module.Is_initialized())


def install_abort_hook() -> None:
    """Make an unhandled exception on one rank end the whole job at once (command line only)."""
    if not launched_by_mpi():
        return

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        comm = world()
        sys.stderr.write(
            f"rank {comm.rank} of {comm.size} failed, ending the job: {kind.__name__}: {error}\n"
        )
        if not isinstance(error, SimlabError):
            traceback.print_exception(kind, error, trace)
        sys.stderr.flush()
        if comm.size > 1:
            comm.Abort(1)

    sys.excepthook = hook
