"""Campaigns and trainings of the online bench: data by real runs, trainings spread over the cores.

Data come from ``simlab generate`` under a supervisor. Trainings are jobs of a pool of processes;
what a deterministic training makes of a finished store is what it makes of one that solvers are
still writing, bit for bit: :func:`coupled` runs both sides together and says whether it did.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simlab.bench._online_studies import Arm, Study
from simlab.core.progress import Progress
from simlab.core.runs import RunDirectory
from simlab.pipeline.case import Case
from simlab.pipeline.online import supervise
from simlab.store.store import SnapshotStore

if TYPE_CHECKING:
    from simlab.learn.model import Model

__all__ = ["Data", "Job", "coupled", "digest", "started", "trained"]


@dataclass(frozen=True)
class Job:
    """One training: an arm of a study, with a seed of a set."""

    study: Study
    group: str
    seed: int
    arm: Arm


class Data:
    """Stores of the campaigns of a study, made when they are asked for.

    Parameters
    ----------
    study : Study
    folder : Path
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self._folder = study, folder

    def train(self, seed: int, runs: int) -> Path:
        """Return the run directory with that many training runs."""
        return self._made(seed, runs, "train")

    def valid(self, group: str) -> Path:
        """Return the run directory with the validation runs of a set of seeds."""
        seed = 10_000 + sum(self.study.seeds[group])
        return self._made(seed, self.study.n_valid[group], "valid")

    def make(self) -> None:
        """Run all campaigns that trainings will ask for."""
        runs = {arm.runs for arm in self.study.arms if arm.is_online} | {self.study.most_runs}
        for group, seeds in self.study.seeds.items():
            self.valid(group)
            for seed in seeds:
                for n in sorted(runs):
                    self.train(seed, n)

    def _made(self, seed: int, runs: int, split: str) -> Path:
        path = self._folder / f"{self.study.name}-{split}-{seed}-{runs}"
        if not path.exists():
            case = self.study.case(runs, seed, split)
            supervise(started(path, case), os.cpu_count() or 1, runs, 0)
        return path


def started(path: Path, case: Case) -> RunDirectory:
    """Return a new run directory of a case."""
    return RunDirectory.start(path, case.tables(), resume=False, seed=case.campaign.seed)


def trained(jobs: Sequence[Job], folder: Path) -> list[dict[str, Any]]:
    """Do all trainings, as many at a time as there are cores; return errors and weights' digests.

    The data must be there.
    """
    n = max(1, len(os.sched_getaffinity(0)))
    results: list[dict[str, Any]] = []
    with (
        ProcessPoolExecutor(n, get_context("spawn")) as pool,
        Progress("training", len(jobs), unit="training") as progress,
    ):
        for result in pool.map(_train, jobs, [str(folder)] * len(jobs)):
            results.append(result)
            progress.update(len(results))
    return results


def _train(job: Job, folder: str) -> dict[str, Any]:
    """Train one arm in this process, from the store, and measure it."""
    from simlab.learn.stream import FollowedStream, MemoryStream, Stream
    from simlab.learn.trainer import Trainer

    study, arm = job.study, job.arm
    data = Data(study, Path(folder))
    stream: Stream
    if arm.is_online:
        stream = FollowedStream(RunDirectory(data.train(job.seed, arm.runs)).store)
    else:
        store = SnapshotStore.open(RunDirectory(data.train(job.seed, study.most_runs)).store)
        first = list(store.split("train")[: arm.runs])
        stream = MemoryStream(first, store.schema, job.seed)
    trainer = Trainer(study.settings(arm, job.seed), stream.schema)
    model = trainer.run(stream)
    errors = measured(study, model, data.valid(job.group))
    return {**errors, "batches": trainer.batch, "digest": digest(model)}


def measured(study: Study, model: Model, valid: Path) -> dict[str, float]:
    """Return the errors of a model on the validation runs of a run directory."""
    truths = list(SnapshotStore.open(RunDirectory(valid).store).split("valid"))
    return study.measures(model, truths)


def digest(model: Model) -> str:
    """Return a checksum of all weights and scales."""
    tensors = sorted(model.tensors().items())
    parts = (name.encode() + value.numpy().tobytes() for name, value in tensors)
    return _sha(parts)


def _sha(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def coupled(study: Study, arm: Arm, seed: int, path: Path) -> str:
    """Run solvers and trainer of an arm side by side; return the digest of the weights."""
    from simlab.learn.model import Model

    case = study.case(arm.runs, seed, "train", train=study.train_table(arm, seed))
    run = started(path, case)
    assert case.train is not None
    supervise(run, 1, arm.runs, case.train.n_batches)
    return digest(Model.load(run.model))
