"""Active sampling against uniform draws: heat in a plate, with a corner that is hard to learn.

The family is ``heat`` with five temperatures, but where ``left`` and ``bottom`` lie in the lowest
22 % of their ranges, a twentieth of the box, the right wall is heated and cooled in waves of them:
there is much to learn where few uniform runs go. Runs are solved, stored, followed and trained on
as in a coupled run, by the same code, but in turn in one process: a new run whenever the items so
far are used up at the pace of the arm. So nothing depends on how fast anybody is, and arms differ
in their draws only: numbers of runs and batches, initial weights and uniform draws are equal.

The arm ``oracle`` knows the corner and puts half of its runs there, without weights. What it gains
is there to be gained: where it gains nothing, the network or the number of batches is the limit,
not the draws. Sizes and learning rate were chosen on the seeds *explore*, such that its 99 %
quantile falls by a fifth at least; the settings of active sampling are the defaults.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from simlab.core.comm import self_comm, split
from simlab.core.config import build, settings
from simlab.core.runs import RunDirectory
from simlab.core.samples import Sample, Trajectory
from simlab.linalg.system import LinearSystem
from simlab.pipeline.case import Case
from simlab.pipeline.chain import Chain
from simlab.pipeline.draws import active_sampling
from simlab.pipeline.order import Order
from simlab.pipeline.stealing import Crew
from simlab.pipeline.tally import Tally
from simlab.problems.heat import Heat
from simlab.problems.samplers import Uniform
from simlab.problems.spaces import bounds_of
from simlab.store.channel import open_channel
from simlab.store.store import SnapshotStore

if TYPE_CHECKING:
    from petsc4py import PETSc

    from simlab.learn.stream import FollowedStream
    from simlab.problems.grid import CellWorkspace

__all__ = ["ARMS", "CONFIRM", "EXPLORE", "HardHeat", "ratios", "rows"]

EXPLORE = (2011, 2027, 2039)
CONFIRM = (83003, 83023, 83047, 83059, 83071, 83089)
ARMS: Mapping[str, dict[str, Any] | None] = {
    "uniform": None,
    "breed": {"kind": "breed", "reweight": False},
    "breed, reweighted": {"kind": "breed", "reweight": True},
    "oracle": {"kind": "list"},
}
_RUNS, _STEPS, _CELLS = 500, 5, 8
_BATCH, _BATCHES = 64, 2000
_SMALL_RUNS, _SMALL_BATCHES = 60, 200
_LEAD = 100  # items before the first batch
_N_VALID = 600
_VALID_SEEDS = {"explore": 918_273, "confirm": 918_287}
_MEASURES = ("mean", "p50", "p99", "corner", "elsewhere")


@settings
class HardHeat(Heat):
    """Heat in a plate whose right wall follows waves in a corner of the parameters.

    Attributes
    ----------
    share : float
        Of the box that the corner takes.
    swing : float
        Height of the waves, K.
    waves : float
        Periods along each side of the corner.
    """

    share: float = 0.05
    swing: float = 300.0
    waves: float = 0.5

    def hardened(self, mu: Sample) -> Sample:
        """Return the temperatures that the plate really has."""
        low, high = self.temperatures
        side = (high - low) * self.share**0.5
        x, y = ((mu.parameters[name] - low) / side for name in ("left", "bottom"))
        if max(x, y) >= 1.0:
            return mu
        wave = np.sin(2 * np.pi * self.waves * x) * np.sin(2 * np.pi * self.waves * y)
        right = mu.parameters["right"] + self.swing * float(wave)
        return replace(mu, parameters={**mu.parameters, "right": right})

    def assemble(
        self,
        mu: Sample,
        state: CellWorkspace,
        step: int = 0,
        previous: PETSc.Vec | None = None,
    ) -> LinearSystem:
        """Fill the right-hand side from the temperature before. Collective."""
        return super().assemble(self.hardened(mu), state, step, previous)


def _family() -> HardHeat:
    return build(HardHeat, {"cells": _CELLS, "n_steps": _STEPS, "dt": 0.08})


def _table(seed: int, n: int, arm: str, folder: Path) -> dict[str, Any] | None:
    """Return the sampler of an arm; that of the oracle reads a file, which is written here."""
    table = ARMS[arm]
    if table is None:
        return None
    if table["kind"] == "breed":
        return {**table, "period": max(n // 20, 1)}
    family = _family()
    bounds = bounds_of(family.space)
    points, low = Uniform().draw(bounds, n, seed), family.temperatures[0]
    for name in ("left", "bottom"):
        column = points[::2, list(bounds).index(name)]
        column[:] = low + family.share**0.5 * (column - low)
    file = folder / "points.npy"
    np.save(file, points)
    return {**table, "file": str(file)}


def _case(seed: int, n: int, batches: int, table: Mapping[str, Any] | None) -> Case:
    return Case(
        family=cast(Any, _family()),
        solver=cast(Any, "direct"),
        campaign=cast(
            Any, {"n": n, "seed": seed, "sampler": table, "train": 1.0, "valid": 0.0, "test": 0.0}
        ),
        train=cast(
            Any,
            {
                "operator": {"kind": "mlp", "hidden": [128, 128]},
                "buffer": {
                    "kind": "reservoir",
                    "capacity": n * _STEPS,
                    "threshold": _LEAD - 1,
                },
                "n_batches": batches,
                "batch": _BATCH,
                "learning_rate": 4e-3,
                "schedule": "halving",
                "loss": "mse",
                "pilot": 8,
                "max_repeats": 1e6,
                "seed": seed,
                "threads": 1,
                "log_every": 1_000_000,
            },
        ),
    )


class _Quiet:
    """A tally that nobody looks at."""

    def report(self, done: int, failed: int, size: int) -> None: ...

    def seal_if_due(self, store: SnapshotStore) -> None: ...


class _Campaign:
    """The runs of one arm, solved one by one when they are wanted."""

    def __init__(self, case: Case, run: RunDirectory) -> None:
        self.store = SnapshotStore.create(
            run.store,
            case.family.schema,
            n=case.campaign.n,
            seed=case.campaign.seed,
            split=case.campaign.split,
        )
        ids = self.store.ids("train")
        group = split(self_comm())
        self._left = list(map(int, ids))
        self._crew = Crew(group)
        self._chain = Chain(case, run, self.store, group, Order.drawn([ids]))
        self._chain.n_systems = len(ids) * case.family.steps

    @property
    def n_left(self) -> int:
        return len(self._left)

    def solve_next(self) -> None:
        self._chain.walk(self._crew, [self._left.pop(0)], cast(Tally, _Quiet()))

    def close(self) -> None:
        self._chain.seal()
        self._chain.destroy()


def _trained(case: Case, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Run one arm; return its model and what became of its draws."""
    from simlab.learn.stream import FollowedStream
    from simlab.learn.trainer import Trainer

    run = RunDirectory.start(folder, case.tables(), resume=False, seed=case.campaign.seed)
    campaign = _Campaign(case, run)
    channel = open_channel(run.store)
    assert case.train is not None
    told: list[dict[str, Any]] = []

    def listen(kind: str, **values: Any) -> None:
        if kind == "sampling":
            told.append(values)

    trainer = Trainer(
        case.train,
        channel.schema,
        observers=(listen,),
        active=active_sampling(case, run, channel),
    )

    pace = (case.campaign.n * _STEPS - _LEAD) / case.train.n_batches

    class InTurn(FollowedStream):
        """Follows the store, and has a run solved when the trainer is about to run out."""

        def poll(self, at_most: int) -> list[Any]:
            n_solved = case.campaign.n - campaign.n_left
            wanted = _LEAD + pace * trainer.batch
            while campaign.n_left and n_solved * _STEPS < wanted:
                campaign.solve_next()
                n_solved += 1
            if campaign.n_left and self.n_items == n_solved * _STEPS:
                return []  # without a look at the disk
            return super().poll(at_most)

    stream: FollowedStream = InTurn(channel)
    model = trainer.run(stream)
    campaign.close()
    facts = told[-1] if told else {"generation": 0, "ess": 1.0}
    return model, {"generations": facts["generation"], "ess": facts["ess"], "folder": folder}


@lru_cache(maxsize=2)
def _truths(n: int, seed: int) -> tuple[Trajectory, ...]:
    """Return runs of the uniform law that no training sees."""
    with tempfile.TemporaryDirectory() as folder:
        case = _case(seed, n, 1, None)
        run = RunDirectory.start(Path(folder) / "run", case.tables(), resume=False, seed=seed)
        campaign = _Campaign(case, run)
        while campaign.n_left:
            campaign.solve_next()
        campaign.close()
        return tuple(
            Trajectory(item.sample, item.times, {"u": np.asarray(item.outputs["u"])})
            for item in campaign.store.split("train")
        )


def _in_corner(family: HardHeat, mu: Sample) -> bool:
    low, high = family.temperatures
    edge = low + (high - low) * family.share**0.5
    return max(mu.parameters["left"], mu.parameters["bottom"]) < edge


def _measured(job: tuple[int, str, str, bool]) -> dict[str, float]:
    """Train one arm from one seed and return its errors, K."""
    seed, arm, group, is_small = job
    n, batches = (_SMALL_RUNS, _SMALL_BATCHES) if is_small else (_RUNS, _BATCHES)
    truths = _truths(100 if is_small else _N_VALID, _VALID_SEEDS[group])
    family = _family()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = _case(seed, n, batches, _table(seed, n, arm, folder))
        model, facts = _trained(case, folder / "run")
        drawn = [
            item.sample for item in SnapshotStore.open(facts["folder"] / "store").split("train")
        ]
    made = model.predict([truth.sample for truth in truths])["u"]
    errors = np.array(
        [
            float(np.sqrt(np.mean((u - truth.outputs["u"]) ** 2)))
            for u, truth in zip(made, truths, strict=True)
        ]
    )
    hard = np.array([_in_corner(family, truth.sample) for truth in truths])
    return {
        "mean": float(errors.mean()),
        "p50": float(np.median(errors)),
        "p99": float(np.quantile(errors, 0.99)),
        "corner": float(errors[hard].mean()),
        "elsewhere": float(errors[~hard].mean()),
        "share": float(np.mean([_in_corner(family, mu) for mu in drawn])),
        "generations": float(facts["generations"]),
        "ess": float(facts["ess"]),
    }


def rows(
    seeds: Sequence[int] = CONFIRM, group: str = "confirm", is_small: bool = False
) -> list[dict[str, Any]]:
    """Return one row per arm: errors of runs of the uniform law, root mean square over each run, K.

    Parameters
    ----------
    seeds : sequence of int
        Of parameters, initial weights and buffer; the arms share them.
    group : str
        Which set of seeds this is, ``explore`` or ``confirm``; each has validation runs of its own.
    is_small : bool
        Few runs, to see that it works.
    """
    jobs = [(seed, arm, group, is_small) for arm in ARMS for seed in seeds]
    n_processes = max(1, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(n_processes, get_context("spawn")) as pool:
        results = list(pool.map(_measured, jobs))
    made = []
    for arm in ARMS:
        found = [result for job, result in zip(jobs, results, strict=True) if job[1] == arm]
        values = {key: np.array([each[key] for each in found]) for key in found[0]}
        row: dict[str, Any] = {
            "study": "e6",
            "seeds": group,
            "draws": arm,
            "runs": _SMALL_RUNS if is_small else _RUNS,
            "n": len(seeds),
        }
        for key in _MEASURES:
            row[f"{key}_K"] = float(values[key].mean())
            if key in ("mean", "p99"):
                row[f"{key}_sd"] = float(values[key].std(ddof=1)) if len(seeds) > 1 else 0.0
        row["runs_in_corner"] = float(values["share"].mean())
        row["ess"] = float(values["ess"].mean())
        made.append(row)
    return made


def ratios(made: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return errors with active sampling over those with uniform draws, by arm and measure."""
    by_arm = {row["draws"]: row for row in made}
    uniform = by_arm["uniform"]
    names = {"breed": "breed", "reweighted": "breed, reweighted", "oracle": "oracle"}
    return {
        f"{name}_{measure}_over_uniform": by_arm[arm][f"{measure}_K"] / uniform[f"{measure}_K"]
        for name, arm in names.items()
        for measure in ("mean", "p99")
    }
