"""What the online bench compares: feeds of the same runs to the same network.

A study is a family, a network with its training, and arms: how many runs, and how their items reach
the network. Offline arms shuffle everything epoch by epoch from memory. Online arms see the runs as
they arrive, sixteen trajectories in lock step, a fixed number of new items before every batch, so
that their weights do not depend on how fast anybody is (``mode = "deterministic"``); the pace is
that of a fast solver (as many new items as a batch has rows) or of a slow one. All arms have equal
numbers of batches, initial weights and parameters of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from simlab.core.config import build
from simlab.core.metrics import relative_l2
from simlab.learn.settings import TrainSettings
from simlab.pipeline.case import Case

if TYPE_CHECKING:
    from simlab.core.samples import Trajectory
    from simlab.learn.model import Model

__all__ = ["STUDIES", "Arm", "Study"]

LANES = 16


@dataclass(frozen=True)
class Arm:
    """One way to feed runs to a network.

    Attributes
    ----------
    name : str
    runs : int
    buffer : dict
        The ``[train.buffer]`` table of an online arm; empty: offline.
    fresh : int
        New items before every batch, online.
    """

    name: str
    runs: int
    buffer: Mapping[str, Any] = field(default_factory=dict)
    fresh: int = 0

    @property
    def is_online(self) -> bool:
        """Whether runs are seen in the order of their arrival."""
        return bool(self.buffer)


@dataclass(frozen=True)
class Study:
    """A family, its training, and the arms that are compared.

    Attributes
    ----------
    name, title : str
    family, train : dict
        Tables of a case.
    arms : sequence of Arm
    n_valid : dict of str to int
        Validation runs of each set of seeds.
    seeds : dict of str to sequence of int
        ``explore``: few, settings may be chosen on them; ``confirm``: never chosen on.
    measures : callable
        ``measures(model, trajectories)`` returns named errors.
    """

    name: str
    title: str
    family: Mapping[str, Any]
    train: Mapping[str, Any]
    arms: Sequence[Arm]
    n_valid: Mapping[str, int]
    seeds: Mapping[str, Sequence[int]]
    measures: Callable[[Model, Sequence[Trajectory]], dict[str, float]]

    @property
    def most_runs(self) -> int:
        """Runs of the largest arm."""
        return max(arm.runs for arm in self.arms)

    def case(self, runs: int, seed: int, split: str, **changes: Any) -> Case:
        """Return the case of a campaign whose runs all belong to one split."""
        shares = {name: float(name == split) for name in ("train", "valid", "test")}
        campaign = {"n": runs, "seed": seed, **shares}
        return build(Case, {"family": dict(self.family), "campaign": campaign, **changes})

    def settings(self, arm: Arm, seed: int) -> TrainSettings:
        """Return the training of an arm."""
        return build(TrainSettings, self.train_table(arm, seed))

    def train_table(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Return the ``[train]`` table of an arm."""
        table = {**self.train, "seed": seed, "threads": 1}
        if not arm.is_online:  # a queue of a whole epoch, so that the normalisation sees all of it
            family = self.case(1, seed, "train").family
            n_items = arm.runs * len(family.schema.times)
            return {**table, "buffer": {"kind": "fifo", "capacity": n_items}}
        order = {"mode": "deterministic", "lanes": LANES, "fresh": arm.fresh}
        return {**table, **order, "buffer": dict(arm.buffer)}

    def smaller(self) -> Study:
        """Return the study with a tenth of runs and batches and three seeds: a look, no result."""
        train = {**self.train, "n_batches": self.train["n_batches"] // 10, "pilot": 2}
        arms = []
        for arm in self.arms:
            buffer = dict(arm.buffer)
            for name in ("capacity", "threshold"):
                if name in buffer:
                    buffer[name] //= 10
            arms.append(replace(arm, runs=max(arm.runs // 10, 2), buffer=buffer))
        seeds = {"explore": self.seeds["explore"][:1], "confirm": self.seeds["confirm"][:2]}
        n_valid = dict.fromkeys(self.n_valid, 6)
        return replace(self, train=train, arms=tuple(arms), seeds=seeds, n_valid=n_valid)


def _heat_errors(model: Model, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    made = model.predict([trajectory.sample for trajectory in trajectories])["u"]
    truth = np.stack([trajectory.outputs["u"] for trajectory in trajectories])
    return {"rmse_K": float(np.sqrt(np.mean(np.square(made - truth, dtype=np.float64))))}


def _march_errors(model: Model, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    made = model.predict([trajectory.sample for trajectory in trajectories])["u"]
    truth = np.stack([trajectory.outputs["u"] for trajectory in trajectories])
    last = relative_l2(made[:, -1:], truth[:, -1:])
    return {
        "one_step": float(model.step_errors(trajectories).mean()),
        "rollout": float(last.mean()),
    }


def _buffer(kind: str, capacity: int, threshold: int | None = None, **more: Any) -> dict[str, Any]:
    start = {} if threshold is None else {"threshold": threshold}
    return {"kind": kind, "capacity": capacity, **start, **more}


_HEAT = Study(
    name="e1",
    title="E1: heat equation with 5 random temperatures, 100 steps of 16^2, MLP",
    family={"kind": "heat", "cells": 16},
    train={
        "operator": {"kind": "mlp", "hidden": [128, 128]},
        "batch": 10,
        "n_batches": 8000,
        "learning_rate": 1e-3,
        "schedule": "halving",
        "loss": "mse",
    },
    arms=(
        Arm("offline, as much as the buffer holds", 15),
        Arm("offline", 20),
        Arm("offline", 80),
        Arm("offline", 160),
        Arm("offline", 800),
        Arm("fifo", 800, _buffer("fifo", 1500), fresh=10),
        Arm("firo", 800, _buffer("firo", 1500, 400), fresh=10),
        Arm("reservoir", 800, _buffer("reservoir", 1500, 400), fresh=10),
        Arm("time_stratified", 800, _buffer("time_stratified", 1500, 400), fresh=10),
        Arm("replay", 800, _buffer("replay", 1500, 400, q=0.5), fresh=10),
        Arm("reservoir", 160, _buffer("reservoir", 1500, 400), fresh=2),
        Arm("reservoir, all kept", 160, _buffer("reservoir", 16000, 400), fresh=2),
        Arm("time_stratified", 160, _buffer("time_stratified", 1500, 400), fresh=2),
        Arm("replay", 160, _buffer("replay", 1500, 400, q=0.5), fresh=2),
    ),
    n_valid={"explore": 10, "confirm": 40},
    seeds={"explore": (311, 457, 593), "confirm": (7013, 7121, 7333, 7561, 7793, 7907)},
    measures=_heat_errors,
)

_LORENZ = Study(
    name="e2",
    title="E2: Lorenz system with random parameters, 100 outputs, one-step MLP",
    family={"kind": "lorenz"},
    train={
        "operator": {"kind": "mlp", "hidden": [128, 128]},
        "batch": 16,
        "n_batches": 2500,
        "ahead": 1,
    },
    arms=(
        Arm("offline", 400),
        Arm("fifo", 400, _buffer("fifo", 1000), fresh=16),
        Arm("firo", 400, _buffer("firo", 1000, 200), fresh=16),
        Arm("reservoir", 400, _buffer("reservoir", 1000, 200), fresh=16),
    ),
    n_valid={"explore": 32, "confirm": 64},
    seeds={"explore": (317, 461), "confirm": (7027, 7129, 7351, 7577, 7823, 7927)},
    measures=_march_errors,
)

_BURGERS = Study(
    name="e3",
    title="E3: Burgers' equation, 40 outputs of 128 points, one-step FNO",
    family={"kind": "burgers"},
    train={
        "operator": {"kind": "fno", "modes": 16, "width": 24, "layers": 4},
        "batch": 16,
        "n_batches": 2500,
        "learning_rate": 1e-3,
        "ahead": 1,
    },
    arms=(
        Arm("offline", 16),
        Arm("offline", 64),
        Arm("offline", 1000),
        Arm("fifo", 1000, _buffer("fifo", 2000), fresh=16),
        Arm("firo", 1000, _buffer("firo", 2000, 500), fresh=16),
        Arm("reservoir", 1000, _buffer("reservoir", 2000, 500), fresh=16),
        Arm("time_stratified", 1000, _buffer("time_stratified", 2000, 500), fresh=16),
        Arm("replay", 1000, _buffer("replay", 2000, 500, q=0.5), fresh=16),
    ),
    n_valid={"explore": 32, "confirm": 64},
    seeds={"explore": (331, 467), "confirm": (7019, 7127, 7349, 7573, 7817, 7919)},
    measures=_march_errors,
)

STUDIES = {study.name: study for study in (_HEAT, _LORENZ, _BURGERS)}
