"""Online training: feeds at equal batches, coupled runs at equal wall clock, active sampling.

``e1`` (heat equation, MLP), ``e2`` (Lorenz system, one-step MLP) and ``e3`` (Burgers' equation,
one-step FNO): the same network with the same initial weights and batches, fed offline with few runs
or with all of them, and online through every kind of buffer, by a fast solver and a slow one. Two
sets of seeds, each with validation runs of its own: ``explore``, few, and the ones that settings
may be chosen on; ``confirm``, at least six, never chosen on, the ones to quote. Every arm is
trained on the campaigns of its seed; the arm ``reservoir`` also side by side with its solvers,
which must give the same weights bit for bit (``coupled_equal``, of how many).

``e6``: uniform draws of parameters beside active sampling, where a corner of them is hard, and
beside draws that know the corner.

``wall``: solvers alone, trainer alone, both coupled, live, on the same cores; offline at equal wall
clock; a solver slower than the trainer.

Ratios are of mean errors over the seeds of a set.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simlab.bench import _online_breed
from simlab.bench._online_arms import Data, Job, coupled, trained
from simlab.bench._online_studies import STUDIES, Study
from simlab.bench._online_wall import Live, overlap
from simlab.bench.runner import outcome, print_ratios, print_table
from simlab.core.config import nearest
from simlab.core.errors import ConfigError

__all__ = ["joined", "run"]

_PARTS = ("e1", "e2", "e3", "e6", "wall")
_LIVE = ("e1", "e3")
_SLOW = {"kind": "krylov", "method": "gmres", "preconditioner": "none"}
_RATIOS: dict[str, tuple[tuple[str, str, tuple[str, int], tuple[str, int], str], ...]] = {
    "e1": (
        ("reservoir_over_offline20", "rmse_K", ("reservoir", 800), ("offline", 20), "<= 0.45"),
        ("reservoir_over_fifo", "rmse_K", ("reservoir", 800), ("fifo", 800), "<= 0.70"),
        ("reservoir_over_shuffled", "rmse_K", ("reservoir", 800), ("offline", 800), "<= 1.25"),
        ("replay160_over_offline160", "rmse_K", ("replay", 160), ("offline", 160), "<= 1.25"),
        ("replay160_over_reservoir160", "rmse_K", ("replay", 160), ("reservoir", 160), "<= 0.93"),
    ),
    "e2": (
        ("reservoir_over_fifo", "one_step", ("reservoir", 400), ("fifo", 400), ""),
        ("reservoir_over_fifo", "rollout", ("reservoir", 400), ("fifo", 400), ""),
        ("reservoir_over_shuffled", "one_step", ("reservoir", 400), ("offline", 400), ""),
        ("reservoir_over_shuffled", "rollout", ("reservoir", 400), ("offline", 400), ""),
    ),
    "e3": (
        ("reservoir_over_offline16", "one_step", ("reservoir", 1000), ("offline", 16), "<= 0.75"),
        ("reservoir_over_offline16", "rollout", ("reservoir", 1000), ("offline", 16), "<= 0.60"),
        ("reservoir_over_offline64", "one_step", ("reservoir", 1000), ("offline", 64), "<= 0.97"),
        ("reservoir_over_offline64", "rollout", ("reservoir", 1000), ("offline", 64), "<= 0.92"),
    ),
}

_E6_GOALS = {"breed_p99_over_uniform": "<= 0.80", "reweighted_mean_over_uniform": "<= 1.05"}


def run(
    quick: bool = False,
    *,
    experiment: str | None = None,
    figures: str | Path | None = None,
) -> dict[str, Any]:
    """Measure, print and return the tables.

    Parameters
    ----------
    quick : bool
        A tenth of the runs and batches, three seeds: does it run, not what does it give.
    experiment : str, optional
        Parts joined by commas: ``e1``, ``e2``, ``e3``, ``e6``, ``wall``; all when left out.
    figures : path, optional
        Folder for the figures.
    """
    parts = _PARTS if experiment is None else tuple(experiment.split(","))
    for part in parts:
        if part not in _PARTS:
            raise ConfigError(f"--experiment {part}: no such part{nearest(part, _PARTS)}")
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float | None] = {}
    goals: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="simlab-bench-") as name:
        folder = Path(name)
        for study in STUDIES.values():
            study = study.smaller() if quick else study
            if study.name in parts:
                found = _feeds(study, folder)
                rows += found
                _add_ratios(study, found, ratios, goals)
        if "e6" in parts:
            rows += _active(quick, ratios, goals)
        if "wall" in parts:
            found = _wall(quick, folder)
            rows += found
            _add_wall_ratios(found, ratios, goals)
    print_ratios(ratios, goals)
    if figures is not None:
        from simlab.bench._online_figures import draw

        for path in draw(figures, rows):
            print(path)
    return outcome("online", rows, ratios)


def joined(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with the parts that only the one recorded in a file has."""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    new = {_part(row) for row in result["rows"]}
    kept = [row for row in recorded["rows"] if _part(row) not in new]
    rows = sorted([*kept, *result["rows"]], key=lambda row: _PARTS.index(_part(row)))
    timed = result if "wall" in new else recorded  # only these rows depend on the machine's load
    ratios = recorded["ratios"] | result["ratios"]
    return {"name": result["name"], "machine": timed["machine"], "rows": rows, "ratios": ratios}


def _part(row: Mapping[str, Any]) -> str:
    return "wall" if "run" in row else str(row["study"])


def _feeds(study: Study, folder: Path) -> list[dict[str, Any]]:
    """Train every arm of a study on every seed; print and return a row per set and arm."""
    Data(study, folder).make()
    jobs = [
        Job(study, group, seed, arm)
        for group, seeds in study.seeds.items()
        for seed in seeds
        for arm in study.arms
    ]
    results = trained(jobs, folder)
    equal = _coupled_equal(study, jobs, results, folder)
    rows = []
    for group in study.seeds:
        for arm in study.arms:
            mine = [
                result
                for job, result in zip(jobs, results, strict=True)
                if (job.group, job.arm) == (group, arm)
            ]
            row: dict[str, Any] = {
                "study": study.name,
                "seeds": group,
                "feed": arm.name,
                "runs": arm.runs,
                "n": len(mine),
                "batches": mine[0]["batches"],
            }
            for measure in [key for key in mine[0] if key not in ("batches", "digest")]:
                values = [result[measure] for result in mine]
                row[measure] = float(np.mean(values))
                row[f"{measure}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
                row[f"{measure}_values"] = values
            if group == "confirm" and (arm.name, arm.runs) == ("reservoir", study.most_runs):
                row["coupled_equal"] = f"{sum(equal)} of {len(equal)}"
            rows.append(row)
    shown = [key for key in rows[0] if not key.endswith("_values") and key != "study"]
    print_table(study.title, rows, [*shown, "coupled_equal"])
    return rows


def _coupled_equal(
    study: Study, jobs: Sequence[Job], results: Sequence[Mapping[str, Any]], folder: Path
) -> list[bool]:
    """Return, per seed, whether a coupled run's weights are those trained on the finished store."""
    equal = []
    for job, result in zip(jobs, results, strict=True):
        arm = job.arm
        if job.group == "confirm" and (arm.name, arm.runs) == ("reservoir", study.most_runs):
            path = folder / f"{study.name}-coupled-{job.seed}"
            equal.append(coupled(study, arm, job.seed, path) == result["digest"])
    return equal


def _add_ratios(
    study: Study,
    rows: Sequence[Mapping[str, Any]],
    ratios: dict[str, float | None],
    goals: dict[str, str],
) -> None:
    full = STUDIES[study.name]
    places = {(arm.name, arm.runs): small for arm, small in zip(full.arms, study.arms, strict=True)}
    for group in study.seeds:
        errors = {(row["feed"], row["runs"]): row for row in rows if row["seeds"] == group}
        for name, measure, over, under, goal in _RATIOS[study.name]:
            one, two = (errors[places[arm].name, places[arm].runs] for arm in (over, under))
            key = name if study.name == "e1" else f"{study.name}_{name}_{measure}"
            key = key if group == "confirm" else f"explore_{key}"
            ratios[key] = one[measure] / two[measure]
            goals[key] = goal


def _active(
    quick: bool, ratios: dict[str, float | None], goals: dict[str, str]
) -> list[dict[str, Any]]:
    """Print and return the rows of active sampling."""
    rows = []
    sets = {"explore": _online_breed.EXPLORE, "confirm": _online_breed.CONFIRM}
    for group, seeds in sets.items():
        found = _online_breed.rows(seeds[:2] if quick else seeds, group, is_small=quick)
        rows += found
        for name, value in _online_breed.ratios(found).items():
            key = f"e6_{name}" if group == "confirm" else f"explore_e6_{name}"
            ratios[key], goals[key] = value, _E6_GOALS.get(name, "")
    print_table(
        "E6: heat with a hard corner, MLP", rows, [key for key in rows[0] if key != "study"]
    )
    return rows


def _wall(quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Print and return the times and errors of live runs."""
    rows: list[dict[str, Any]] = []
    for name in _LIVE:
        study = STUDIES[name].smaller() if quick else STUDIES[name]
        arms = {(arm.name, arm.runs): arm for arm in study.arms}
        most = study.most_runs
        lives = [Live("reservoir", arms["reservoir", most], {"kind": "auto"})]
        if name == "e1":
            slow = most // 5
            lives += [
                Live(f"{kind}, slow solver", arms[kind, slow], _SLOW)
                for kind in ("reservoir", "replay")
            ]
        for live in lives:
            n_turns, n_seeds = (3, 6) if live.arm.runs == most else (1, 3)
            rows += overlap(study, live, "confirm", folder, 1 if quick else n_turns, n_seeds)
    for name in _LIVE:
        mine = [row for row in rows if row["study"] == name]
        keys = list(dict.fromkeys(key for row in mine for key in row))
        print_table(f"{name}, live", mine, [key for key in keys if key not in ("study", "seeds")])
    return rows


def _add_wall_ratios(
    rows: Sequence[Mapping[str, Any]], ratios: dict[str, float | None], goals: dict[str, str]
) -> None:
    found = {(row["study"], row["run"], row["what"]): row for row in rows}
    for study, run, what in found:
        if what != "coupled":
            continue
        wall = {name: found[study, run, name]["wall_s"] for name in ("solvers", "trainer")}
        label = f"{study}_{run.replace(', ', '_').replace(' ', '_')}"
        key = "wall_over_max" if (study, run) == ("e1", "reservoir") else f"wall_over_max_{label}"
        ratios[key] = found[study, run, "coupled"]["wall_s"] / max(wall.values())
        goals[key] = "<= 1.15"
        if "slow" in run:
            ratios[f"trainer_idle_{label}"] = found[study, run, "coupled"]["trainer_idle"]
            goals[f"trainer_idle_{label}"] = "< 0.10"
