"""Wall clock: what a coupled run takes beside its solvers alone and its trainer alone.

Everything is started the way ``simlab run`` starts it, one solver rank and one training thread on
two cores, live. ``solvers`` and ``trainer`` are the two sides alone, the trainer on the finished
store; ``sequential`` is their sum; ``coupled`` both at once. Offline at equal wall clock generates
on all cores for half the time of the coupled run at most, then trains with all cores for what is
left, on a schedule that ends in time.

Cost: process start-up, import of torch, pilot and checkpoints are in every time; evaluation,
figures and report are in none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    study: Study, live: Live, group: str, folder: Path, n_turns: int, n_seeds: int
) -> list[dict[str, Any]]:
    """Measure one coupled run; return a row per contestant.

    Parameters
    ----------
    study : Study
    live : Live
    group : str
        Set of seeds.
    folder : Path
    n_turns : int
        Of how many seeds the two sides are timed alone too, before or after the coupled run.
    n_seeds : int
        How many seeds of the set run coupled, and offline where all runs are used.
    """
    valid = Data(study, folder).valid(group)
    rows: dict[str, list[dict[str, float]]] = {}
    seeds = study.seeds[group][:n_seeds]
    for turn, seed in enumerate(seeds):
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
            start_up = training - _last(run)["train_s"]
            rows.setdefault("trainer", []).append({"wall_s": training, "start_up_s": start_up})
            rows.setdefault("sequential", []).append({"wall_s": solving + training, **errors})

        work = [both, apart] if turn < n_turns else [both]
        for do in work if turn % 2 == 0 else reversed(work):
            do()
    for seed in seeds if live.arm.runs == study.most_runs else ():
        run, row = _offline(study, live, seed, rows, folder / f"{study.name}-equal-{seed}")
        row |= {**_errors(study, run, valid), **_shares(run)}
        rows.setdefault("offline, equal wall", []).append(row)
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
            row[key] = float(values.mean())
            row[f"{key}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else None
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


def _train(run: RunDirectory, threads: int, *more: str) -> None:
    """Run ``simlab train`` on a finished store, as a supervisor would start it."""
    here = str(run.path.absolute())
    words = ["train", str(run.path.absolute() / "case.toml"), "--out", here, "--attach", *more]
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
    study: Study, live: Live, seed: int, rows: Mapping[str, list[dict[str, float]]], path: Path
) -> tuple[RunDirectory, dict[str, float]]:
    """Generate on all cores for about half the coupled run's time, train for what is left."""
    budget, solving = (_median(rows[name], "wall_s") for name in ("coupled", "solvers"))
    start_up = _median(rows["trainer"], "start_up_s")
    cores = os.cpu_count() or 1
    runs = min(live.arm.runs, max(16, int(live.arm.runs * cores * budget / 2 / solving)))
    shorter = replace(live, arm=replace(live.arm, runs=runs))
    kept = {"kind": "reservoir", "capacity": runs * 200, "threshold": 16}
    case = shorter.case(study, seed, threads=cores, n_batches=10**6, buffer=kept, max_repeats=1e9)
    begun = time.monotonic()
    run = started(path, case)
    supervise(run, cores, runs, 0)
    left = max(1.0, budget - (time.monotonic() - begun) - start_up)
    _train(run, cores, "--set", f"train.max_seconds={left:.1f}")
    return run, {"wall_s": time.monotonic() - begun, "runs": runs}


def _median(found: Sequence[Mapping[str, float]], key: str) -> float:
    return float(np.median([entry[key] for entry in found]))


def _errors(study: Study, run: RunDirectory, valid: Path) -> dict[str, float]:
    from simlab.learn.model import Model

    found = measured(study, Model.load(run.model), valid)
    return {f"error {name}": value for name, value in found.items()}


def _shares(run: RunDirectory) -> dict[str, float]:
    """Return batches, and how much of its time the trainer waited for data."""
    last = _last(run)
    return {
        "batches": last["batch"],
        "trainer_idle": last["wait_s"] / max(last["train_s"], 1e-9),
    }


def _last(run: RunDirectory) -> dict[str, Any]:
    """Return the trainer's last line of metrics."""
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    found: dict[str, Any] = [line for line in lines if line["kind"] == "train"][-1]
    return found
