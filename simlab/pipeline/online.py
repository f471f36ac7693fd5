"""Solvers and trainer side by side: one command that starts both, watches and ends them together.

    supervisor --+-- mpirun -n k simlab generate    -> store     (solver groups, MPI)
                 +-- simlab train                   -> model     (follows the store, no MPI)
                 +-- simlab store serve                          (with train.channel = "stream")

These are separate process groups and share nothing but the run directory, so any of them may be
killed: the supervisor starts that side again while the other goes on, at most ``max_restarts``
times, and notes it in the manifest (``restarts``) and in ``metrics.jsonl``. When the supervisor
itself is killed both go on, and ``--resume`` adopts them (:mod:`.supervisor`). It imports neither
MPI nor torch. Ctrl-C, or a file STOP made by hand, asks both to stop after the sample and the batch
at hand; a second Ctrl-C ends them at once.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from simlab.core import environment
from simlab.core.errors import DependencyError, SimlabError
from simlab.core.progress import Progress, console
from simlab.core.runs import RunDirectory, metric_lines
from simlab.core.signals import interrupts
from simlab.pipeline.heartbeat import LEAST_PATIENCE
from simlab.pipeline.supervisor import Side, supervising

__all__ = ["launch_environment", "refusal", "solver_command", "supervise"]

log = logging.getLogger("simlab.run")

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 60.0
_LAUNCHER_WORDS = ("OMPI_", "PMIX_", "PMI_", "HYDRA_", "MPI_LOCAL")
_REFUSALS = {
    "as root": "a launcher run as root wants OMPI_ALLOW_RUN_AS_ROOT=1 and "
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; `make` and mpi_runs/environment.sh set them",
    "not enough slots": "more ranks than cores want OMPI_MCA_rmaps_base_oversubscribe=1 (Open MPI "
    "5: PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe); set likewise",
}
_LAUNCHER_SETTINGS = ("OMPI_MCA_", "OMPI_ALLOW_RUN_AS_ROOT")


def refusal(text: str) -> str:
    """Return what to do about a launcher that said this, or nothing when it did not refuse."""
    return next((remedy for words, remedy in _REFUSALS.items() if words in text), "")


def launch_environment(threads: int = 1) -> dict[str, str]:
    """Return the environment of a child: what an outer launcher left is removed, settings stay.

    OpenMP threads sleep while they wait for each other. Spinning, as they do by default, made a
    training step on two threads a hundred times slower when another process had one of the cores.
    Ranks of Open MPI, which spin too, let others have the core while they wait: two of them on two
    cores that others used as well took three times as long, and three times the CPU time, without.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHER_WORDS)
        or (name.startswith(_LAUNCHER_SETTINGS) and not name.startswith("OMPI_MCA_ess"))
    }
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    kept.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    return kept | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def solver_command(n_ranks: int, words: Sequence[str]) -> list[str]:
    """Return the command that runs ``simlab`` with some words on ``n_ranks`` ranks.

    Raises
    ------
    DependencyError
        When there is no process launcher on the path.
    """
    launcher = environment.read("SIMLAB_MPIRUN", "mpirun").split()
    if shutil.which(launcher[0]) is None:
        raise DependencyError(
            f"no process launcher {launcher[0]!r} on the path; install the one of the MPI that "
            "mpi4py was built with (`simlab doctor` names it) or set SIMLAB_MPIRUN"
        )
    return [*launcher, "-n", str(n_ranks), sys.executable, "-m", "simlab", *words]


class _Watch:
    """Progress of both sides, read from the end of ``metrics.jsonl``."""

    def __init__(self, run: RunDirectory, n_samples: int, n_batches: int) -> None:
        self._path = run.metrics
        self._position = self._path.stat().st_size if self._path.exists() else 0
        self._n_samples = n_samples
        self._latest: dict[str, dict[str, Any]] = {}
        self._progress = Progress(
            "training" if n_batches else "solving",
            n_batches or n_samples,
            unit="batch" if n_batches else "sample",
        )
        self._trains = bool(n_batches)

    def __enter__(self) -> _Watch:
        self._progress.__enter__()
        return self

    def __exit__(self, *trace: Any) -> None:
        self._progress.__exit__(*trace)

    def look(self) -> set[str]:
        """Read what was added and show it; return the kinds of the lines."""
        if not self._path.exists():
            return set()
        with self._path.open("rb") as file:
            file.seek(self._position)
            added = file.read()
        whole = added.rfind(b"\n") + 1
        self._position += whole
        news = {str(entry.get("kind")): entry for entry in metric_lines(added[:whole])}
        self._latest |= news
        self._show()
        return set(news)

    def _show(self) -> None:
        campaign = self._latest.get("campaign", {})
        train, valid = self._latest.get("train", {}), self._latest.get("validation", {})
        solved = f"{campaign.get('done', 0)}/{self._n_samples} solved"
        if not self._trains:
            self._progress.update(campaign.get("done", 0) + campaign.get("failed", 0))
            return
        notes = [solved]
        if "loss" in train:
            notes.append(f"loss {train['loss']:.2e}")
        if "rel_l2" in valid:
            notes.append(f"validation {100 * valid['rel_l2']['mean']:.2f} %")
        self._progress.update(train.get("batch", 0), ", ".join(notes))


def supervise(
    run: RunDirectory,
    n_ranks: int,
    n_samples: int,
    n_batches: int,
    petsc_words: Sequence[str] = (),
    max_restarts: int = 3,
    channel: str = "tail",
    patience: float = LEAST_PATIENCE,
) -> int:
    """Run a started run's campaign, and its training beside it when ``n_batches`` is not 0.

    Parameters
    ----------
    run : RunDirectory
    n_ranks : int
        Solver ranks.
    n_samples, n_batches : int
        What there is to do, for the progress bar.
    petsc_words : sequence of str
    max_restarts : int
        How many times each side is started again when it dies.
    channel : {"tail", "stream"}
        Between them; for ``stream`` a server is kept beside the store until the trainer has ended.
    patience : float
        Seconds of silence, at least, before a side counts as hung (:mod:`.heartbeat`).

    Returns
    -------
    int
        0 done, 3 done but some samples failed, 130 stopped on request.

    Raises
    ------
    SimlabError
        When either side failed for good, with its last words. Both have ended by then, data are
        kept.
    """
    here = str(run.path.absolute())
    case = str(run.path.absolute() / "case.toml")
    common = ["--out", here, "--attach"]
    threads = max(1, (os.cpu_count() or 1) - n_ranks)
    words = ["generate", case, *common, *(["--", *petsc_words] if petsc_words else [])]
    command = solver_command(n_ranks, words)
    one = partial(Side, run, max_restarts=max_restarts, patience=patience)
    sides = [one("solvers", "campaign", command, launch_environment(), refusal=refusal)]
    if n_batches:
        command = [sys.executable, "-m", "simlab", "train", case, *common]
        command += ["--solver-ranks", str(n_ranks)]
        sides.append(one("trainer", "train", command, launch_environment(threads)))
    if n_batches and channel == "stream":
        command = [sys.executable, "-m", "simlab", "store", "serve", str(run.store.absolute())]
        command += ["--attach"]
        sides.append(one("server", "server", command, launch_environment(), serves=True))

    def ask() -> None:
        log.warning("stopping after the sample and batch at hand; once more ends at once")
        run.request_stop()

    def end() -> None:
        for side in sides:
            side.terminate()

    with (
        supervising(run),
        interrupts(ask, end) as received,
        _Watch(run, n_samples, n_batches) as watch,
    ):
        try:
            for side in sides:
                side.begin()
            _watch_over(sides, run, watch)
        except BaseException:  # such as a full disk: nobody would look after them
            for side in sides:
                side.end()
            raise
    failed = next((side for side in sides if side.failure), None)
    if received or (failed is None and run.manifest()["state"] == "stopped"):
        return 130
    if failed is not None:
        run.update(**{failed.section: {"state": "failed"}})
        raise SimlabError(failed.failure)
    console().print()
    return max(side.code or 0 for side in sides)


def _watch_over(sides: Sequence[Side], run: RunDirectory, watch: _Watch) -> None:
    """Return when all sides have ended; one that failed for good stops the others."""
    deadline = float("inf")
    while not all(side.has_ended for side in sides if not side.serves):
        time.sleep(_POLL_SECONDS)
        news = watch.look()
        for side in sides:
            if side.section in news:
                side.progressed()
            side.look(stopping=run.stop_requested() and not side.serves)
            if side.failure:
                run.request_stop()
        if run.stop_requested() and deadline == float("inf"):
            deadline = time.monotonic() + _GRACE_SECONDS
        if time.monotonic() > deadline:
            for side in sides:
                side.kill()
    for side in sides:
        side.dismiss()
    watch.look()
