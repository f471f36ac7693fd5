"""Active sampling that stays unbiased: new parameters near those that were hard to learn.

After Breed (Dymchenko, Purandare and Raffin, arXiv 2410.05860), adaptive importance sampling. In
coordinates of the unit box, generation ``g`` draws

    with probability 1 - r_g    a uniform point
    with probability r_g        a child of parent i, chosen in proportion to its fitness Q_i:
                                N(theta_i, s_k^2 I), s_k^2 = shrink^k sigma^2, k = 0, 1, ...
                                until a try lies in the box; after ``tries`` of them a uniform point

    Q_i = mean over the run's steps of d,    d = max(0, (loss - mean of batch) / deviation of batch)

and ``r_g`` rises from ``share[0]`` to ``share[1]`` over ``ramp`` generations. A child that never
lands in the box is uniform here, not a copy of its parent as in the paper: so every generation has
a density that can be written down,

    q_g = 1 - r_g + r_g sum_i p_i K_i,         Z_ij the part of N(theta_i, s_j^2 I) in the box,
    K_i = sum_k (prod_{j<k} (1 - Z_ij)) N(theta_i, s_k^2 I) + prod_j (1 - Z_ij)

Samples of all generations are weighted as one mixture (deterministic-mixture adaptive importance
sampling, Cornuet et al., Scand. J. Statist. 39, 2012): ``w = 1 / q``, ``q = sum_g n_g q_g / n``,
clipped at ``clip``. A loss weighted by ``w`` and divided by the batch's mean weight estimates the
uniform law's. When few effective samples are left, ``(sum w)^2 / (n sum w^2) < least_ess``, the
next generation is uniform.

A draw is a function of the seed, its id and the generations, which :meth:`Breeder.state` keeps.
Cost: weighing ``n`` points takes ``n`` times parents times tries operations per generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi
from typing import Annotated, Any, Self

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from pydantic import PositiveFloat, PositiveInt, model_validator

from simlab.core.config import settings
from simlab.core.errors import ConfigError
from simlab.core.samples import generator

__all__ = ["Breed", "Breeder", "Fitness"]

Share = Annotated[float, Ge(0), Lt(1)]


@settings
class Breed:
    """Settings of active sampling; the defaults are the paper's public preset.

    Attributes
    ----------
    sigma : float
        Standard deviation of children, relative to the parameters' ranges.
    shrink : float
        Factor of the variance from try to try.
    tries : int
        Before a child becomes a uniform point.
    share : (float, float)
        Bred share of the first bred generation and of later ones.
    ramp : int
        Generations from the first share to the second.
    window : int
        Latest runs that may be parents.
    seen : float
        Share of a run's steps that must have been learned from before it may be a parent.
    clip : float
        Largest weight.
    least_ess : float
        Effective share of samples below which the next generation is uniform.
    """

    sigma: PositiveFloat = 0.1
    shrink: Annotated[float, Gt(0), Lt(1)] = 0.3
    tries: PositiveInt = 5
    share: tuple[Share, Share] = (0.0, 0.7)
    ramp: PositiveInt = 3
    window: PositiveInt = 200
    seen: Annotated[float, Ge(0), Le(1)] = 0.25
    clip: Annotated[float, Ge(1)] = 5.0
    least_ess: Annotated[float, Ge(0), Lt(1)] = 0.2

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.share[0] > self.share[1]:
            raise ConfigError(f"share: expected first <= last, found {self.share}")
        return self

    def share_of(self, generation: int) -> float:
        """Return ``r_g`` of bred generation 0, 1, ..."""
        first, last = self.share
        return first + (last - first) * min(generation / self.ramp, 1.0)


class Fitness:
    """What training says of runs: how far their losses lay above those of their batches."""

    def __init__(self) -> None:
        self._sums: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    def add(self, ids: Sequence[int] | np.ndarray, losses: np.ndarray) -> None:
        """Take in one batch: the run of every item, and its loss, shape (B,)."""
        losses = np.asarray(losses, dtype=float)
        spread = losses.std()
        above = np.maximum(losses - losses.mean(), 0.0) / (spread if spread > 0 else 1.0)
        for index, excess in zip(np.asarray(ids).tolist(), above.tolist(), strict=True):
            self._sums[index] = self._sums.get(index, 0.0) + excess
            self._counts[index] = self._counts.get(index, 0) + 1

    def candidates(self, settings: Breed, n_steps: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and fitness of the latest runs seen often enough, by id, each shape (n,)."""
        least = settings.seen * n_steps
        ids = sorted(index for index, count in self._counts.items() if count >= least)
        ids = ids[-settings.window :]
        values = [self._sums[index] / self._counts[index] for index in ids]
        return np.array(ids, dtype=np.int64), np.array(values)


@dataclass(frozen=True, eq=False)
class _Generation:
    """Draws ``first`` and later: parents in the unit box (n, d), their shares, the bred share."""

    first: int
    parents: np.ndarray
    shares: np.ndarray
    bred: float


class Breeder:
    """Draws of all generations, and their weights.

    Parameters
    ----------
    breed : Breed
    bounds : mapping of str to (float, float)
        The box; each low < high.
    seed : int

    Examples
    --------
    >>> breeder = Breeder(Breed(share=(0.5, 0.7)), {"k": (0.0, 2.0)}, seed=311)
    >>> points = breeder.draw(20)
    >>> breeder.evolve(20, [7, 9], [1.0, 3.0])
    >>> bool((breeder.weights(breeder.draw(40), 40) <= 5.0).all()), breeder.bred_share
    (True, 0.5)
    """

    def __init__(self, breed: Breed, bounds: Mapping[str, tuple[float, float]], seed: int) -> None:
        self.breed, self.seed = breed, seed
        self._low, self._high = np.array(list(bounds.values()), dtype=float).T
        if not np.all(self._low < self._high):
            raise ConfigError("bounds: active sampling needs low < high for every parameter")
        self._n_bred = 0
        none = np.zeros((0, len(self._low)))
        self._generations = [_Generation(0, none, none[:, 0], 0.0)]

    @property
    def bred_share(self) -> float:
        """Bred share of the latest generation."""
        return self._generations[-1].bred

    def draw(self, n: int, start: int = 0) -> np.ndarray:
        """Return the points ``start .. start + n - 1``, shape (n, d)."""
        points = np.array([self._point(index) for index in range(start, start + n)])
        return self._low + (self._high - self._low) * points.reshape(n, -1)

    def evolve(
        self, n_drawn: int, ids: Sequence[int] | np.ndarray, fitness: Sequence[float] | np.ndarray
    ) -> None:
        """Begin the next generation with draw ``n_drawn``.

        Parameters
        ----------
        n_drawn : int
            Draws so far; they stay as they are.
        ids, fitness : sequence of int, of float
            Runs that may be parents, and their fitness, as :meth:`Fitness.candidates` gives them.
        """
        if n_drawn <= self._generations[-1].first:
            raise ValueError(
                f"a generation needs a draw: {n_drawn} draws, the latest began with draw "
                f"{self._generations[-1].first}"
            )
        fitness = np.asarray(fitness, dtype=float)
        total = float(fitness.sum()) if len(fitness) else 0.0
        bred, parents = 0.0, np.zeros((0, len(self._low)))
        shares = np.zeros(0)
        if total > 0 and self.effective_share(n_drawn) >= self.breed.least_ess:
            kept = fitness > 0
            parents = np.array([self._point(int(index)) for index in np.asarray(ids)[kept]])
            shares = fitness[kept] / total
            bred = self.breed.share_of(self._n_bred)
            self._n_bred += 1
        self._generations.append(_Generation(n_drawn, parents, shares, bred))

    def weights(self, points: np.ndarray, n_drawn: int) -> np.ndarray:
        """Return ``min(1 / q, clip)`` of points, shape (n,).

        Parameters
        ----------
        points : ndarray, shape (n, d)
        n_drawn : int
            Draws so far, the first ones by id: what the mixture stands for. At least 1.
        """
        return np.minimum(1.0 / self.density(points, n_drawn), self.breed.clip)

    def density(self, points: np.ndarray, n_drawn: int) -> np.ndarray:
        """Return ``q`` relative to the uniform law's density, shape (n,)."""
        unit = (np.asarray(points, dtype=float) - self._low) / (self._high - self._low)
        firsts = [generation.first for generation in self._generations]
        counts = np.diff(np.minimum([*firsts, n_drawn], n_drawn))
        parts = [
            count * self._density(generation, unit)
            for count, generation in zip(counts, self._generations, strict=True)
            if count
        ]
        return np.asarray(sum(parts) / n_drawn)

    def effective_share(self, n_drawn: int) -> float:
        """Return ``(sum w)^2 / (n sum w^2)`` over the first draws: 1 for uniform ones."""
        w = self.weights(self.draw(n_drawn), n_drawn)
        return float(w.sum() ** 2 / (n_drawn * (w**2).sum()))

    def state(self) -> dict[str, Any]:
        """Return plain values from which :meth:`restore` makes the same draws."""
        generations = [
            {
                "first": generation.first,
                "parents": generation.parents.tolist(),
                "shares": generation.shares.tolist(),
                "bred": generation.bred,
            }
            for generation in self._generations
        ]
        return {"seed": self.seed, "n_bred": self._n_bred, "generations": generations}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that was kept."""
        self.seed, self._n_bred = int(state["seed"]), int(state["n_bred"])
        self._generations = [
            _Generation(
                int(kept["first"]),
                np.array(kept["parents"], dtype=float).reshape(-1, len(self._low)),
                np.array(kept["shares"], dtype=float),
                float(kept["bred"]),
            )
            for kept in state["generations"]
        ]

    def _point(self, index: int) -> np.ndarray:
        """Return one draw in the unit box."""
        generation = next(g for g in reversed(self._generations) if g.first <= index)
        random = generator(self.seed, index, "breed")
        if random.random() < generation.bred:
            chosen = random.choice(len(generation.shares), p=generation.shares)
            parent = generation.parents[chosen]
            for deviation in self._deviations():
                child = parent + deviation * random.standard_normal(len(parent))
                if np.all((child >= 0) & (child <= 1)):
                    return np.asarray(child)
        return random.random(len(self._low))

    def _deviations(self) -> np.ndarray:
        return np.asarray(
            self.breed.sigma * np.sqrt(self.breed.shrink) ** np.arange(self.breed.tries)
        )

    def _density(self, generation: _Generation, unit: np.ndarray) -> np.ndarray:
        """Return ``q_g`` at points of the unit box, shape (n,)."""
        if not generation.bred:
            return np.ones(len(unit))
        from scipy.special import ndtr

        parents, d = generation.parents, unit.shape[1]
        square = (unit**2).sum(1)[:, None] + (parents**2).sum(1)[None] - 2.0 * unit @ parents.T
        children = np.zeros(len(unit))
        still_out = generation.shares.copy()  # share of every parent, and no try in the box yet
        for s in self._deviations():
            bell = np.exp(-0.5 * np.maximum(square, 0.0) / s**2) / (2 * pi * s**2) ** (d / 2)
            children += bell @ still_out
            inside = (ndtr((1.0 - parents) / s) - ndtr(-parents / s)).prod(1)
            still_out *= 1.0 - inside
        return 1.0 - generation.bred + generation.bred * (children + still_out.sum())
