"""Solvers and trainer side by side: one command that starts both, watches and ends them together.

    supervisor --+-- mpirun -n k simlab generate    -> store     (solver groups, MPI)
                 +-- simlab train                   -> model     (follows the store, no MPI)

The two are separate process groups and share nothing but the run directory, so either may be
killed, and ``--resume`` goes on with both. The supervisor imports neither MPI nor torch. Ctrl-C, or
a file STOP made by hand, asks both to stop after the sample and the batch at hand; a second Ctrl-C
ends them at once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simlab.core import environment
from simlab.core.errors import DependencyError, SimlabError
from simlab.core.progress import Progress, console
from simlab.core.runs import RunDirectory
from simlab.core.signals import interrupts

__all__ = ["launch_environment", "refusal", "solver_command", "supervise"]

log = logging.getLogger("simlab.run")

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 60.0
_ENDED_WELL = (0, 3)  # 3: finished, some samples failed
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
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHER_WORDS)
        or (name.startswith(_LAUNCHER_SETTINGS) and not name.startswith("OMPI_MCA_ess"))
    }
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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


@dataclass
class _Child:
    """One side of the run and its log file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    begin: int  # where this start's words begin in the log

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def signal(self, number: int) -> None:
        if self.code is None:
            os.killpg(self.process.pid, number)

    def last_words(self, n_lines: int = 12) -> str:
        text = self.log.read_bytes()[self.begin :].decode(errors="replace")
        lines = text.splitlines()
        if refusal(text):
            return refusal(text)
        errors = [line for line in lines if line.startswith("error:")]
        return "\n".join(errors[-1:] or lines[-n_lines:])


def _start(name: str, command: Sequence[str], run: RunDirectory, threads: int) -> _Child:
    directory = run.path / "logs"
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.log"
    begin = path.stat().st_size if path.exists() else 0
    with path.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=launch_environment(threads),
            start_new_session=True,  # Ctrl-C reaches the supervisor only
        )
    log.info("%s started (pid %d), log in %s", name, process.pid, path)
    return _Child(name, process, path, begin)


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

    def look(self) -> None:
        """Read what was added and show it."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            added = file.read()
        whole = added.rfind(b"\n") + 1
        self._position += whole
        for line in added[:whole].splitlines():
            entry = json.loads(line)
            self._latest[entry["kind"]] = entry
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
    run: RunDirectory, n_ranks: int, n_samples: int, n_batches: int, petsc_words: Sequence[str] = ()
) -> int:
    """Run a started run's campaign, and its training beside it when ``n_batches`` is not 0.

    Returns
    -------
    int
        0 done, 3 done but some samples failed, 130 stopped on request.

    Raises
    ------
    SimlabError
        When either side failed, with its last words. Both have ended by then, data are kept.
    """
    case = str(run.path / "case.toml")
    common = ["--out", str(run.path), "--attach"]
    threads = max(1, (os.cpu_count() or 1) - n_ranks)
    words = ["generate", case, *common, *(["--", *petsc_words] if petsc_words else [])]
    children = [_start("solvers", solver_command(n_ranks, words), run, 1)]
    if n_batches:
        trainer = [sys.executable, "-m", "simlab", "train", case, *common]
        children.append(_start("trainer", [*trainer, "--solver-ranks", str(n_ranks)], run, threads))
    failed: _Child | None = None

    def ask() -> None:
        log.warning("stopping after the sample and batch at hand; once more ends at once")
        run.request_stop()

    def end() -> None:
        for child in children:
            child.signal(signal.SIGTERM)

    with interrupts(ask, end) as received, _Watch(run, n_samples, n_batches) as watch:
        deadline = float("inf")
        while any(child.code is None for child in children):
            time.sleep(_POLL_SECONDS)
            watch.look()
            broken = [child for child in children if child.code not in (None, *_ENDED_WELL)]
            if broken and failed is None:
                failed = broken[0]
                run.request_stop()
            if run.stop_requested() and deadline == float("inf"):
                deadline = time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > deadline:
                for child in children:
                    child.signal(signal.SIGKILL)
        watch.look()
    failed = failed or next((c for c in children if c.code not in _ENDED_WELL), None)
    if received or (failed is None and run.manifest()["state"] == "stopped"):
        return 130
    if failed is not None:
        run.update(**{"campaign" if failed.name == "solvers" else "train": {"state": "failed"}})
        raise SimlabError(
            f"the {failed.name} ended with exit code {failed.code}; what is solved is kept and "
            f"--resume goes on. {failed.log} ends with:\n{failed.last_words()}"
        )
    console().print()
    return max(child.code or 0 for child in children)
