"""Active sampling that stays unbiased: new parameters near those that were hard to learn.

After Breed (Dymchenko, Purandare and Raffin, arXiv 2410.05860), adaptive importance sampling. In
coordinates of the unit box, generation ``g`` draws

    with probability 1 - r_g    a uniform point
    with probability r_g        a child of parent i, chosen in proportion to its fitness Q_i:
                                N(theta_i, s_k^2 I), s_k^2 = shrink^k sigma^2, k = 0, 1, ...
                                until a try lies in the box; after ``tries`` of them a uniform point

    Q_i = mean over what was learned from of the run of d,
          d = max(0, (loss - mean of batch) / deviation of batch)

and ``r_g`` rises from ``share[0]`` to ``share[1]`` over ``ramp`` generations. A child that never
lands in the box is uniform here, not a copy of its parent as in the paper: so every generation has
a density that can be written down,

    q_g = 1 - r_g + r_g sum_i p_i K_i,         Z_ij the part of N(theta_i, s_j^2 I) in the box,
    K_i = sum_k (prod_{j<k} (1 - Z_ij)) N(theta_i, s_k^2 I) + prod_j (1 - Z_ij)

A draw weighs ``w = 1 / q_g``, clipped at ``clip``, ``g`` its own generation, which was there before
it: so the mean of ``w f`` is that of ``f`` under the uniform law, for every generation. Weights by
the mixture of all generations (Cornuet et al., Scand. J. Statist. 39, 2012) do not have that here:
parents lie at the peaks of their own children, and in five dimensions a hard corner then weighs
half of what it should (measured with the defaults). A weighted loss, divided by the batch's mean
weight, estimates the uniform law's. When few effective samples are left,
``(sum w)^2 / (n sum w^2) < least_ess``, the next generation is uniform.

A draw is a function of the seed, its id and its generation, and a generation is what it says of
itself; generation 0 is uniform, and its draws are those of a campaign without a sampler. Which
generation a draw is of depends on when it was made, so somebody has to write that down
(:mod:`.generations`). Cost: weighing a draw takes parents times tries operations, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import pi
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from pydantic import PositiveFloat, PositiveInt, model_validator

from simlab.core.errors import ConfigError
from simlab.core.samples import generator
from simlab.problems.samplers import Bounds, Uniform, samplers

__all__ = ["Breed", "Breeder", "Fitness", "Generation", "effective_share"]

Share = Annotated[float, Ge(0), Lt(1)]


@samplers.register("breed")
class Breed:
    """Settings of active sampling; most defaults are the paper's public preset.

    Attributes
    ----------
    period : int
        Finished training runs from one generation to the next.
    reweight : bool
        Whether the loss estimates that of the uniform law; else that of the draws.
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

    period: PositiveInt = 50
    reweight: bool = True
    sigma: PositiveFloat = 0.1
    shrink: Annotated[float, Gt(0), Lt(1)] = 0.3
    tries: PositiveInt = 5
    share: tuple[Share, Share] = (0.0, 0.7)
    ramp: PositiveInt = 3
    window: PositiveInt = 200
    seen: Annotated[float, Ge(0), Le(1)] = 0.25
    clip: Annotated[float, Ge(1)] = 5.0
    least_ess: Annotated[float, Ge(0), Lt(1)] = 0.2

    kind: ClassVar[str]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.share[0] > self.share[1]:
            raise ConfigError(f"share: expected first <= last, found {self.share}")
        return self

    def draw(self, bounds: Bounds, n: int, seed: int, start: int = 0) -> np.ndarray:
        """Return uniform points: those of held-out splits, and of all before anything is known."""
        return Uniform().draw(bounds, n, seed, start)

    def share_of(self, generation: int) -> float:
        """Return ``r_g`` of bred generation 0, 1, ..."""
        first, last = self.share
        return first + (last - first) * min(generation / self.ramp, 1.0)


class Fitness:
    """What training says of runs: how far their losses lay above those of their batches."""

    def __init__(self) -> None:
        self._sums: dict[int, float] = {}  # in the order in which runs were first learned from
        self._counts: dict[int, int] = {}
        self._seen: dict[int, int] = {}  # bit s: step s

    def add(self, items: np.ndarray, losses: np.ndarray) -> None:
        """Take in one batch: run and step of every item, shape (B, 2), and its loss, (B,)."""
        losses = np.asarray(losses, dtype=float)
        spread = losses.std()
        above = np.maximum(losses - losses.mean(), 0.0) / (spread if spread > 0 else 1.0)
        for (run, step), excess in zip(np.asarray(items).tolist(), above.tolist(), strict=True):
            self._sums[run] = self._sums.get(run, 0.0) + excess
            self._counts[run] = self._counts.get(run, 0) + 1
            self._seen[run] = self._seen.get(run, 0) | 1 << step

    def candidates(self, breed: Breed, n_steps: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and fitness of the latest runs seen enough of, each shape (n,)."""
        least = breed.seen * n_steps
        runs = [run for run, steps in self._seen.items() if steps.bit_count() >= least]
        runs = runs[-breed.window :]
        values = [self._sums[run] / self._counts[run] for run in runs]
        return np.array(runs, dtype=np.int64), np.array(values)

    def state(self) -> list[tuple[int, float, int, int]]:
        """Return plain values from which :meth:`restore` makes the same."""
        return [(run, self._sums[run], self._counts[run], self._seen[run]) for run in self._sums]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Go back to a state that was kept."""
        self._sums = {int(run): float(total) for run, total, _, _ in state}
        self._counts = {int(run): int(count) for run, _, count, _ in state}
        self._seen = {int(run): int(seen) for run, _, _, seen in state}


@dataclass(frozen=True, eq=False)
class Generation:
    """One law of drawing; uniform by default.

    Attributes
    ----------
    parents : ndarray, shape (m, d)
        In the unit box; none when it is uniform because nothing is known, or too much was bred.
    shares : ndarray, shape (m,)
        With which each is chosen; they add up to 1.
    bred : float
        Bred share ``r_g``.
    """

    parents: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    shares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bred: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values that say all of it, bit for bit."""
        parents, shares = self.parents.tolist(), self.shares.tolist()
        return {"parents": parents, "shares": shares, "bred": self.bred}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Generation:
        """Undo :meth:`to_json`."""
        shares = np.array(kept["shares"], dtype=float)
        if not len(shares):
            return cls()
        parents = np.array(kept["parents"], dtype=float).reshape(len(shares), -1)
        return cls(parents, shares, float(kept["bred"]))


class Breeder:
    """Draws of all generations, and the weights of those that are on record.

    Parameters
    ----------
    breed : Breed
    bounds : mapping of str to (float, float)
        The box; each low < high.
    seed : int

    Examples
    --------
    >>> breeder = Breeder(Breed(share=(0.5, 0.7)), {"k": (0.0, 2.0)}, seed=311)
    >>> breeder.record(dict.fromkeys(range(20), 0))
    >>> new = breeder.evolve([7, 9], [1.0, 3.0])
    >>> points = breeder.draw(range(20, 60), breeder.newest)
    >>> breeder.record(dict.fromkeys(range(20, 60), breeder.newest))
    >>> bool((breeder.weights(range(60)) <= 5.0).all()), new.bred, points.shape
    (True, 0.5, (40, 1))
    """

    def __init__(self, breed: Breed, bounds: Bounds, seed: int) -> None:
        self.breed, self.seed, self._bounds = breed, seed, dict(bounds)
        self._low, self._high = np.array(list(bounds.values()), dtype=float).T
        if not np.all(self._low < self._high):
            raise ConfigError("bounds: active sampling needs low < high for every parameter")
        self._generations = [Generation()]
        self._place: dict[int, int] = {}
        self._of = np.zeros(0, dtype=np.int64)  # generation of every draw on record
        self._points = np.zeros((0, len(self._low)))  # in the unit box
        self._densities = np.zeros(0)  # each under the generation of the draw

    @property
    def newest(self) -> int:
        """Number of the latest generation."""
        return len(self._generations) - 1

    @property
    def n_drawn(self) -> int:
        """Draws on record."""
        return len(self._of)

    def generation(self, number: int) -> Generation:
        """Return a generation; number 0 is uniform."""
        return self._generations[number]

    def add(self, generation: Generation) -> None:
        """Take over a generation that somebody made: it is the newest now."""
        self._generations.append(generation)

    def draw(self, ids: Sequence[int] | np.ndarray | range, generation: Any) -> np.ndarray:
        """Return points, shape (n, d); ``generation`` is a number, or one for each id."""
        numbers = np.broadcast_to(np.asarray(generation, dtype=np.int64), len(ids))
        points = [self._point(int(i), int(g)) for i, g in zip(ids, numbers, strict=True)]
        return np.array(points).reshape(len(ids), -1)

    def record(self, drawn: Mapping[int, int]) -> None:
        """Note of which generation draws are, by id; ids that are known already are left out."""
        new = {run: number for run, number in drawn.items() if run not in self._place}
        if not new:
            return
        of = np.array(list(new.values()), dtype=np.int64)
        points = self.draw(list(new), of)
        densities = np.ones(len(new))
        for number in np.unique(of):
            densities[of == number] = self.density(points[of == number], number)
        self._place |= {run: self.n_drawn + k for k, run in enumerate(new)}
        self._of = np.concatenate([self._of, of])
        self._points = np.concatenate([self._points, self._unit(points)])
        self._densities = np.concatenate([self._densities, densities])

    def generations_of(self, ids: Sequence[int] | np.ndarray | range) -> np.ndarray:
        """Return the generations of draws on record, -1 for others, shape (n,)."""
        numbers = [
            self._of[self._place[run]] if run in self._place else -1 for run in map(int, ids)
        ]
        return np.array(numbers, dtype=np.int64)

    def weights(self, ids: Sequence[int] | np.ndarray | range) -> np.ndarray:
        """Return ``min(1 / q_g, clip)`` of draws on record, shape (n,); 1 for others."""
        places = np.array([self._place.get(run, -1) for run in map(int, ids)], dtype=np.int64)
        q = np.ones(len(places))
        known = places >= 0
        q[known] = self._densities[places[known]]
        return np.asarray(np.minimum(1.0 / q, self.breed.clip))

    def density(self, points: np.ndarray, generation: int) -> np.ndarray:
        """Return ``q_g`` of any points relative to the uniform law's density, shape (n,)."""
        return _density(self.breed, self._generations[generation], self._unit(points))

    def effective_share(self) -> float:
        """Return ``(sum w)^2 / (n sum w^2)`` over the draws on record: 1 for uniform ones."""
        if not self.n_drawn:
            return 1.0
        return effective_share(self.weights(list(self._place)))

    def evolve(
        self, ids: Sequence[int] | np.ndarray, fitness: Sequence[float] | np.ndarray
    ) -> Generation:
        """Make and return the next generation, the newest from now on.

        Parameters
        ----------
        ids, fitness : sequence of int, of float
            Runs that may be parents, and their fitness, as :meth:`Fitness.candidates` gives them.
            Runs that are not on record are left out.
        """
        values = np.where(self.generations_of(ids) < 0, 0.0, np.asarray(fitness, dtype=float))
        total = float(values.sum())
        made = Generation()
        if total > 0 and self.effective_share() >= self.breed.least_ess:
            kept = [self._place[int(run)] for run, value in zip(ids, values, strict=True) if value]
            n_bred = sum(len(generation.shares) > 0 for generation in self._generations)
            share = self.breed.share_of(n_bred)
            made = Generation(self._points[kept], values[values > 0] / total, share)
        self.add(made)
        return made

    def _unit(self, points: np.ndarray) -> np.ndarray:
        return np.asarray((np.asarray(points, dtype=float) - self._low) / (self._high - self._low))

    def _point(self, index: int, number: int) -> np.ndarray:
        """Return one draw, shape (d,)."""
        generation = self._generations[number]
        random = generator(self.seed, index, "breed")
        if random.random() < generation.bred:
            chosen = random.choice(len(generation.shares), p=generation.shares)
            parent = generation.parents[chosen]
            for deviation in _deviations(self.breed):
                child = parent + deviation * random.standard_normal(len(parent))
                if np.all((child >= 0) & (child <= 1)):
                    made = self._low + (self._high - self._low) * child
                    return np.clip(made, self._low, self._high)
        uniform: np.ndarray = Uniform().draw(self._bounds, 1, self.seed, index)[0]
        return uniform


def effective_share(w: np.ndarray) -> float:
    """Return ``(sum w)^2 / (n sum w^2)`` of weights: 1 when they are equal."""
    return float(w.sum() ** 2 / (len(w) * (w**2).sum()))


def _deviations(breed: Breed) -> np.ndarray:
    return np.asarray(breed.sigma * np.sqrt(breed.shrink) ** np.arange(breed.tries))


def _density(breed: Breed, generation: Generation, unit: np.ndarray) -> np.ndarray:
    """Return ``q_g`` at points of the unit box, shape (n,)."""
    if not generation.bred or not len(unit):
        return np.ones(len(unit))
    from scipy.special import ndtr  # here, since describing a case should not load it

    parents, d = generation.parents, unit.shape[1]
    square = (unit**2).sum(1)[:, None] + (parents**2).sum(1)[None] - 2.0 * unit @ parents.T
    children = np.zeros(len(unit))
    still_out = generation.shares.copy()  # share of every parent, and no try in the box yet
    for s in _deviations(breed):
        bell = np.exp(-0.5 * np.maximum(square, 0.0) / s**2) / (2 * pi * s**2) ** (d / 2)
        children += bell @ still_out
        inside = (ndtr((1.0 - parents) / s) - ndtr(-parents / s)).prod(1)
        still_out *= 1.0 - inside
    return 1.0 - generation.bred + generation.bred * (children + still_out.sum())
