"""Orders of samples in which neighbours resemble each other, and what a recycling solver needs.

Given keys of the samples (:mod:`.order_keys`), an ordering returns a permutation that makes

    sum_j || key(o_j+1) - key(o_j) ||

short; :func:`cut` parts it into one chain per group of ranks. No order is the shortest: the exact
problem is the travelling salesman's.

    kind      path                                             cost for N keys of d columns
    sample    as drawn                                         nothing, keys not needed
    greedy    nearest unused neighbour, 2-opt, Or-opt          N^2 d multiply-adds in blocks
    hilbert   along a space-filling curve                      N log N; a longer path

More than ``group`` keys are parted along a Hilbert curve first: the greedy walk goes group by
group, beginning each where the last one ended, for ``N group d``. Orders depend on the keys only,
to the last bit: same on every rank and machine, ties go to the lower index.

Everything here is rank-local numpy. On many ranks each reduces its own samples
(``KeyReduction.reduced``), the caller gathers the rows, one rank orders and sends the order.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Protocol

import numpy as np
from annotated_types import Ge, Le
from pydantic import PositiveInt

from simlab.core.config import Registry
from simlab.linalg.order_keys import KeyReduction, sample_keys
from simlab.linalg.path_moves import improved, improved_points
from simlab.linalg.paths import (
    checked_keys,
    cut,
    greedy_path,
    hilbert_path,
    lattice,
    neighbours,
    path_length,
)

__all__ = [
    "AsDrawn",
    "Greedy",
    "Hilbert",
    "KeyReduction",
    "Ordering",
    "cut",
    "improved",
    "orderings",
    "path_length",
    "sample_keys",
]

_N_NEIGHBOURS = 24
_MOST_DIMENSIONS = 8


class Ordering(Protocol):
    """An order of samples: frozen settings, deterministic.

    Attributes
    ----------
    needs_keys : bool
        ``order`` looks at the keys, not only at how many there are.
    """

    kind: ClassVar[str]
    needs_keys: ClassVar[bool]

    def order(self, keys: np.ndarray) -> np.ndarray:
        """Return the order of keys of shape (N, d): a permutation of 0 .. N - 1, int64."""
        ...


orderings: Registry[Ordering] = Registry("ordering", "simlab.linalg")


@orderings.register("sample")
class AsDrawn:
    """The samples as they were drawn."""

    kind: ClassVar[str]
    needs_keys: ClassVar[bool] = False

    def order(self, keys: np.ndarray) -> np.ndarray:
        """Return 0 .. N - 1; the keys may be of shape (N, 0)."""
        return np.arange(len(keys))


@orderings.register("greedy")
class Greedy:
    """Always on to the nearest sample not yet visited; then local improvement.

    Attributes
    ----------
    improve : bool
        Shorten the path by 2-opt and Or-opt moves (:mod:`.path_moves`).
    group : int
        Samples searched at once; more are parted along a Hilbert curve.

    Examples
    --------
    >>> Greedy().order(np.array([[0.0], [3.0], [1.0], [2.0]])).tolist()
    [0, 2, 3, 1]
    """

    improve: bool = True
    group: Annotated[int, Ge(2), Le(100_000)] = 10_000

    kind: ClassVar[str]
    needs_keys: ClassVar[bool] = True

    def order(self, keys: np.ndarray) -> np.ndarray:
        """Return the order of keys of shape (N, d); equal keys stand together."""
        points, copies = _distinct(lattice(keys))
        path = self._walk(points)
        if self.improve:
            path = path[improved_points(points[path])]
        return _with_copies(path, copies)

    def _walk(self, points: np.ndarray) -> np.ndarray:
        n = len(points)
        if n < 2:
            return np.arange(n)
        if n <= self.group:
            groups = [np.arange(n)]
        else:
            groups = np.array_split(_shortest_hilbert(points), -(-n // self.group))
        path: list[np.ndarray] = []
        for members in groups:
            members = np.sort(members)
            part = points[members]
            if path:
                goal, sign = points[path[-1][-1]], 1.0
            else:  # the point farthest from the middle, so that it is not left for the end
                goal, sign = np.rint(part.mean(axis=0)), -1.0
            start = int(np.argmin(sign * np.square(part - goal).sum(axis=1)))
            nearest, _ = neighbours(part, _N_NEIGHBOURS)
            path.append(members[greedy_path(part, nearest, start)])
        return np.concatenate(path)


@orderings.register("hilbert")
class Hilbert:
    """Along a Hilbert curve through the columns of largest spread.

    Attributes
    ----------
    dimensions : int, optional
        Columns that count; when left out, 1 to 8 are tried and the shortest path is kept.

    Examples
    --------
    >>> Hilbert().order(np.array([[0.0], [3.0], [1.0], [2.0]])).tolist()
    [0, 2, 3, 1]
    """

    dimensions: PositiveInt | None = None

    kind: ClassVar[str]
    needs_keys: ClassVar[bool] = True

    def order(self, keys: np.ndarray) -> np.ndarray:
        """Return the order of keys of shape (N, d)."""
        points = lattice(checked_keys(keys))
        if self.dimensions is None:
            return _shortest_hilbert(points)
        return hilbert_path(points, self.dimensions)


def _shortest_hilbert(points: np.ndarray) -> np.ndarray:
    tried = range(1, max(1, min(_MOST_DIMENSIONS, points.shape[1])) + 1)
    paths = [hilbert_path(points, n_dimensions) for n_dimensions in tried]
    return min(paths, key=lambda path: path_length(points, path))


def _distinct(points: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the different points, by first appearance, and who is at each of them."""
    n = len(points)
    if not points.shape[1] or n == 0:
        return points[:1], [np.arange(n)] if n else []
    _, first, inverse = np.unique(points, axis=0, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    label = rank[inverse.ravel()]
    members = np.argsort(label, kind="stable")
    return points[np.sort(first)], np.split(members, np.cumsum(np.bincount(label))[:-1])


def _with_copies(path: np.ndarray, copies: list[np.ndarray]) -> np.ndarray:
    pieces = [copies[place] for place in path]
    return np.concatenate(pieces) if pieces else np.arange(0)
