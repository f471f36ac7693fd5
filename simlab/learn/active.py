"""What a training does for active sampling: judge runs, make generations, weight its loss.

    every batch              weights of its items, 1 / q, where the loss is that of the uniform law
                             losses of its items, into the fitness of their runs
    every ``period`` runs    a new generation from the fittest, written where the solvers look

See :mod:`simlab.problems.breed` for the law, :mod:`simlab.problems.generations` for the files.
Imports no torch.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from simlab.problems.breed import Breed, Breeder, Fitness, effective_share
from simlab.problems.generations import DrawLog, GenerationFiles
from simlab.problems.samplers import Bounds

__all__ = ["ActiveSampling"]

log = logging.getLogger("simlab.train")


class ActiveSampling:
    """The trainer's side of active sampling.

    Parameters
    ----------
    breed : Breed
    bounds : mapping of str to (float, float)
        Of the parameters, as the solvers draw them.
    seed : int
        Of the campaign.
    directory : Path
        Where solvers note their draws and look for generations.
    n_runs : int
        Training runs of the campaign: no generation is made once all are drawn.
    n_steps : int
        Items of a run.
    """

    def __init__(
        self,
        breed: Breed,
        bounds: Bounds,
        seed: int,
        directory: Path,
        *,
        n_runs: int,
        n_steps: int,
    ) -> None:
        self._breed, self._n_runs, self._n_steps = breed, n_runs, n_steps
        self._breeder = Breeder(breed, bounds, seed)
        self._fitness = Fitness()
        self._files, self._draws = GenerationFiles(directory), DrawLog(directory)
        self._n_finished = 0  # when the newest generation was made
        self._effective: list[float] = []
        self._has_warned = False
        self._read()

    def _read(self) -> None:
        drawn = self._draws.news()  # first: a generation is there before it is drawn from
        for generation, facts in self._files.news():
            self._breeder.add(generation)
            self._n_finished = int(facts["finished"])
        self._breeder.record(drawn)

    def weights(self, items: np.ndarray) -> np.ndarray | None:
        """Return the weights of a batch, mean 1, or None when its loss is not to be weighted.

        Parameters
        ----------
        items : ndarray of int, shape (B, 2)
            Trajectory and step of every item. Each batch is to be shown once.
        """
        if (self._breeder.generations_of(items[:, 0]) < 0).any():
            self._read()
        w = self._breeder.weights(items[:, 0])
        self._effective.append(effective_share(w))
        return w / w.mean() if self._breed.reweight else None

    def note(self, items: np.ndarray, losses: np.ndarray) -> None:
        """Take in the losses of a batch, not weighted, shape (B,)."""
        self._fitness.add(items, losses)

    def evolve(self, n_finished: int) -> dict[str, Any] | None:
        """Make a generation when it is time for one, and return what there is to say of it.

        That is ``period`` finished runs after the last one, but not before as many have been
        learned from: a training that begins late has much to see first.

        Parameters
        ----------
        n_finished : int
            Training runs that are complete.
        """
        breed = self._breed
        if n_finished - self._n_finished < breed.period:
            return None
        self._read()
        if n_finished - self._n_finished < breed.period or self._breeder.n_drawn >= self._n_runs:
            return None
        ids, fitness = self._fitness.candidates(breed, self._n_steps)
        if len(ids) < min(breed.period, breed.window):
            return None
        effective = self._breeder.effective_share()
        made = self._breeder.evolve(ids, fitness)
        facts = {"finished": n_finished, "drawn": self._breeder.n_drawn, "ess": effective}
        self._files.write(self._breeder.newest, made, **facts)
        self._n_finished = n_finished
        if effective < breed.least_ess and not self._has_warned:
            self._has_warned = True
            log.warning(
                "active sampling: %.0f %% of the samples count after weighting, less than "
                "least_ess = %g: the next ones are uniform until that has changed",
                100 * effective,
                breed.least_ess,
            )
        say = {"generation": self._breeder.newest, "parents": len(made.shares), "bred": made.bred}
        return say | facts

    def report(self) -> dict[str, Any]:
        """Return what a line of metrics says, and start the next one.

        ``ess`` is the mean effective share of the batches since the last line.
        """
        effective, self._effective = self._effective, []
        number = self._breeder.newest
        return {
            "generation": number,
            "bred": self._breeder.generation(number).bred,
            "ess": float(np.mean(effective)) if effective else 1.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what the files do not hold."""
        plain = {
            "fitness": self._fitness.state(),
            "effective": self._effective,
        }
        return {"plain": json.dumps(plain)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with all generations that are there by now."""
        plain = json.loads(state["plain"])
        self._fitness.restore(plain["fitness"])
        self._effective = list(plain["effective"])
