"""Coefficient fields that change a little from sample to sample, along one random path.

    g_{i+1} = c g_i + eps g',      c = sqrt(1 - eps^2),      a_i = exp(scale g_i),

with independent Gaussian fields ``g'`` of the law of every ``g_i``. Followed literally, ``g_i``
takes ``i + 1`` draws, which no rank that starts in the middle can afford. The path is Markov and
Gaussian, so it may as well be drawn coarse to fine (Levy's construction): ``g_0``, ``g_1``, then
``g_2``, ``g_4``, ``g_8``... each given the one before it, then midpoints given both ends. For
``d`` steps between ``g_l`` and ``g_i``, and ``e`` between ``g_i`` and ``g_h``,

    g_i = c^d (1 - c^2e) / (1 - c^2(d+e)) g_l + c^e (1 - c^2d) / (1 - c^2(d+e)) g_h + s g'
    s^2 = (1 - c^2d) (1 - c^2e) / (1 - c^2(d+e))

which is the same law of the whole path, innovations ``(g_{i+1} - c g_i) / eps`` included: they are
independent, only not what the generator drew.
"""

from __future__ import annotations

from functools import lru_cache
from math import expm1, log1p, sqrt
from typing import Annotated

import numpy as np
from annotated_types import Gt, Lt
from pydantic import FiniteFloat

from simlab.core.samples import generator
from simlab.problems.fields import Draw, Lognormal, fields

__all__ = ["Path"]


@fields.register("path")
class Path(Lognormal):
    """``a_i = exp(scale g_i)`` along a stationary random walk: neighbours in ``i`` look alike.

    Field ``i`` depends on the seed and ``i`` only, to the last bit. Cost: in sequence one Gaussian
    field per sample on average, from nothing at most ``2 log2(i) + 2``. Kept between calls: the
    ``2 log2(i) + 2`` fields that the last one was made from, for the last two paths in use.

    Samples of one path are not independent: an error on a test split says little about new fields.
    For tests and timings of solvers that learn from one system to the next.

    Attributes
    ----------
    epsilon : float
        Step: neighbours have the correlation ``sqrt(1 - epsilon^2)``.
    scale : float
    spectrum, alpha, tau, sigma
        Law of the Gaussian fields, as for ``lognormal``.
    """

    scale: FiniteFloat = 3.0
    epsilon: Annotated[float, Gt(0), Lt(1)] = 0.05

    def draw(
        self, shape: tuple[int, ...], n: int, seed: int, start: int = 0, name: str = "a"
    ) -> list[Draw]:
        """Return fields ``start .. start + n - 1``."""
        walk = _walk(self, shape, seed, name)
        return [Draw(np.exp(self.scale * walk.at(index))) for index in range(start, start + n)]


class _Walk:
    """One path ``g_0, g_1, ...``, with the fields that the last one asked for was made from."""

    def __init__(self, law: Path, shape: tuple[int, ...], seed: int, name: str) -> None:
        self._law, self._shape, self._seed, self._name = law, shape, seed, name
        self._log_c = 0.5 * log1p(-(law.epsilon**2))
        self._known: dict[int, np.ndarray] = {}

    def at(self, index: int) -> np.ndarray:
        """Return ``g_index``; not to be written to."""
        known = self._known
        line: dict[int, np.ndarray] = {}

        def visit(i: int, *ends: int) -> None:
            line[i] = known[i] if i in known else self._given(i, {end: line[end] for end in ends})

        low, high = 0, 1
        visit(low)
        visit(high, low)
        while high < index:
            low, high = high, 2 * high
            visit(high, low)
        while index not in (low, high):
            middle = (low + high) // 2
            visit(middle, low, high)
            low, high = (low, middle) if index <= middle else (middle, high)
        self._known = line
        return line[index]

    def _given(self, i: int, ends: dict[int, np.ndarray]) -> np.ndarray:
        """Draw ``g_i`` given nothing, one earlier field, or one on either side."""
        random = generator(self._seed, i, f"path {self._name}")
        values = self._law.gaussian(self._shape, random)
        free = [self._innovation(abs(i - end)) for end in ends]  # 1 - c^2d
        between = self._innovation(max(ends) - min(ends)) if len(ends) == 2 else 1.0
        values *= sqrt(np.prod(free) / between)
        for (end, field), other in zip(ends.items(), free[::-1], strict=True):
            weight = np.exp(self._log_c * abs(i - end))
            values += weight * (other / between if len(ends) == 2 else 1.0) * field
        return values

    def _innovation(self, steps: int) -> float:
        """Return ``1 - c^(2 steps)``, the share of variance that ``steps`` steps renew."""
        return -expm1(2.0 * steps * self._log_c)


@lru_cache(maxsize=2)
def _walk(law: Path, shape: tuple[int, ...], seed: int, name: str) -> _Walk:
    return _Walk(law, shape, seed, name)
