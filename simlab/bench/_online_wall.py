"""Wall clock: what a coupled run takes beside its solvers alone and its trainer alone.

Everything is started the way ``simlab run`` starts it, one solver rank and one training thread on
two cores, live. ``solvers`` and ``trainer`` are the two sides alone, the trainer on the finished
store; ``sequential`` is their sum; ``coupled`` both at once. Offline at equal wall clock generates
on all cores for half the time of the coupled run, then trains with all cores for the other half,
on a schedule that ends in time.

Cost: process start-up, import of torch, pilot and checkpoints are in every time; evaluation,
figures and report are in none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simlab.bench._online_arms import Data, measured, started
from simlab.bench._online_studies import Arm, Study
from simlab.core.errors import SimlabError
from simlab.core.runs import RunDirectory
from simlab.pipeline.case import Case
from simlab.pipeline.online import launch_environment, supervise

__all__ = ["Live", "overlap"]

_PILOT_SECONDS = 6.0  # of a trainer until its first batch, which no schedule counts


@dataclass(frozen=True)
class Live:
    """A coupled run as users start it.

    Attributes
    ----------
    name : str
    arm : Arm
    solver : dict
        The ``[solver]`` table: one that is slower than the trainer makes a slow producer.
    """

    name: str
    arm: Arm
    solver: Mapping[str, Any]

    def case(self, study: Study, seed: int, **train: Any) -> Case:
        """Return the case of a run."""
        table = {**study.train, "seed": seed, "buffer": dict(self.arm.buffer), **train}
        solver = dict(self.solver)
        return study.case(self.arm.runs, seed, "train", train=table, solver=solver)


def overlap(
    study: Study, live: Live, group: str, folder: Path, n_turns: int
) -> list[dict[str, Any]]:
    """Measure one coupled run; return a row per contestant.

    Parameters
    ----------
    study : Study
    live : Live
    group : str
        Set of seeds; each of its seeds gives an error, the first ``n_turns`` also times of the two
        sides alone, before or after the coupled run in turn.
    folder : Path
    n_turns : int
    """
    valid = Data(study, folder).valid(group)
    rows: dict[str, list[dict[str, float]]] = {}
    for turn, seed in enumerate(study.seeds[group]):
        here = folder / f"{study.name}-{live.name.replace(' ', '_')}-{seed}"
        work: list[Callable[[], None]] = []

        def both(seed: int = seed, here: Path = here) -> None:
            run, seconds = _coupled(live.case(study, seed, threads=1), here / "coupled")
            row = {"wall_s": seconds, **_errors(study, run, valid), **_shares(run)}
            rows.setdefault("coupled", []).append(row)

        def apart(seed: int = seed, here: Path = here) -> None:
            solving, training, run = _apart(live.case(study, seed, threads=1), here / "apart")
            errors = _errors(study, run, valid)
            rows.setdefault("solvers", []).append({"wall_s": solving})
            rows.setdefault("trainer", []).append({"wall_s": training})
            rows.setdefault("sequential", []).append({"wall_s": solving + training, **errors})

        work = [both, apart] if turn < n_turns else [both]
        for do in work if turn % 2 == 0 else reversed(work):
            do()
    if live.arm.runs == study.most_runs:
        budget = float(np.median([row["wall_s"] for row in rows["coupled"]]))
        for seed in study.seeds[group]:
            path = folder / f"{study.name}-equal-{seed}"
            rows.setdefault("offline, equal wall", []).append(
                _offline(study, live, seed, budget, path, valid)
            )
    return [_row(study, live, group, name, found) for name, found in rows.items()]


def _row(
    study: Study, live: Live, group: str, name: str, found: list[dict[str, float]]
) -> dict[str, Any]:
    """Return medians of times and shares, mean and deviation of errors."""
    row: dict[str, Any] = {"study": study.name, "run": live.name, "seeds": group, "what": name}
    row["n"] = len(found)
    for key in dict.fromkeys(key for entry in found for key in entry):
        values = np.array([entry[key] for entry in found])
        if key.startswith("error"):
            row[key], row[f"{key}_sd"] = float(values.mean()), float(values.std(ddof=1))
        else:
            row[key] = float(np.median(values))
    return row


def _coupled(case: Case, path: Path) -> tuple[RunDirectory, float]:
    run = started(path, case)
    assert case.train is not None
    begun = time.monotonic()
    supervise(run, 1, case.campaign.n, case.train.n_batches)
    return run, time.monotonic() - begun


def _apart(case: Case, path: Path) -> tuple[float, float, RunDirectory]:
    """Return the seconds of the solvers alone, then of the trainer alone."""
    run = started(path, case)
    begun = time.monotonic()
    supervise(run, 1, case.campaign.n, 0)
    between = time.monotonic()
    _train(run, threads=1)
    return between - begun, time.monotonic() - between, run


def _train(run: RunDirectory, threads: int) -> None:
    """Run ``simlab train`` on a finished store, as a supervisor would start it."""
    here = str(run.path.absolute())
    words = ["train", str(run.path.absolute() / "case.toml"), "--out", here, "--attach"]
    done = subprocess.run(
        [sys.executable, "-m", "simlab", *words],
        env=launch_environment(threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SimlabError(f"simlab train failed in {here}: {done.stderr[-2000:]}")


def _offline(
    study: Study, live: Live, seed: int, budget: float, path: Path, valid: Path
) -> dict[str, float]:
    """Generate on all cores for about half of ``budget`` seconds, train for what is left."""
    cores = os.cpu_count() or 1
    begun = time.monotonic()
    trial = started(path / "trial", live.case(study, seed))
    supervise(trial, cores, live.arm.runs, 0)
    runs = min(live.arm.runs, max(16, int(live.arm.runs * budget / 2 / (time.monotonic() - begun))))
    begun = time.monotonic()
    generated = started(
        path / "data",
        Live(live.name, _with_runs(live.arm, runs), live.solver).case(
            study,
            seed,
            threads=cores,
            n_batches=10**6,
            buffer={"kind": "reservoir", "capacity": runs * 200, "threshold": 16},
            max_repeats=1e9,
            max_seconds=max(1.0, budget / 2 - _PILOT_SECONDS),
        ),
    )
    supervise(generated, cores, runs, 0)
    _train(generated, threads=cores)
    wall = time.monotonic() - begun
    return {"wall_s": wall, "runs": runs, **_errors(study, generated, valid), **_shares(generated)}


def _with_runs(arm: Arm, runs: int) -> Arm:
    return Arm(arm.name, runs, arm.buffer, arm.fresh)


def _errors(study: Study, run: RunDirectory, valid: Path) -> dict[str, float]:
    from simlab.learn.model import Model

    found = measured(study, Model.load(run.model), valid)
    return {f"error {name}": value for name, value in found.items()}


def _shares(run: RunDirectory) -> dict[str, float]:
    """Return batches, and how much of its time the trainer waited for data."""
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["kind"] == "train"][-1]
    return {
        "batches": last["batch"],
        "trainer_idle": last["wait_s"] / max(last["train_s"], 1e-9),
    }
