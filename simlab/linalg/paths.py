"""Short paths through points: lattice, neighbours, greedy chain, Hilbert curve, cuts.

Points are moved to a lattice of ``2^b`` steps per largest extent, ``2 b + log2 d <= 45``. Squared
distances ``|p|^2 + |q|^2 - 2 p.q`` from matrix products of doubles are then exact integers, however
a BLAS sums: equal points are at distance 0, ties are ties, the lower index wins, and a path is a
function of the keys on every machine and rank. Single precision would be twice as quick here and
right only for distances that are not small.

* *greedy*: go to the nearest point not yet visited, from the point farthest from the middle. A list
  of the ``k`` nearest of each point (``N^2 d`` multiply-adds in blocks of 16 MiB, never ``N x N``)
  gives most steps; where a list is used up, all points left are scanned.
* *Hilbert*: Skilling's transpose form (AIP Conf. Proc. 707, 2004) of the curve in ``p`` dimensions,
  over the columns of largest spread, all with one scale; ``N p b`` operations.
* *cut*: contiguous pieces of near equal cost, parted at the longest step near each ideal place.

The greedy walk is that of Wang et al., arXiv:2401.09516, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, fsum, log2

import numpy as np

from simlab.core.errors import ConfigError

__all__ = [
    "checked_keys",
    "checked_path",
    "cut",
    "greedy_path",
    "hilbert_path",
    "lattice",
    "neighbours",
    "path_length",
]

_BITS = 45  # of a squared distance
_BLOCK_BYTES = 2**24
_HILBERT_BITS = 16


def path_length(keys: np.ndarray, path: Sequence[int] | np.ndarray | None = None) -> float:
    """Return the sum of distances along a path; of all keys as they stand when left out.

    Parameters
    ----------
    keys : ndarray, shape (N, d)
    path : sequence of int, optional
        Rows in the order of the walk; some or all of them.

    Examples
    --------
    >>> path_length(np.array([[0.0], [5.0], [1.0]]), [0, 2, 1])
    5.0
    """
    keys = checked_keys(keys)
    walked = keys if path is None else keys[checked_path(path, len(keys))]
    return fsum(_steps(walked).tolist())


def cut(
    keys: np.ndarray,
    path: Sequence[int] | np.ndarray,
    n_chains: int,
    cost: Sequence[float] | np.ndarray | None = None,
    slack: float = 0.05,
) -> list[np.ndarray]:
    """Part a path into contiguous chains of near equal cost, at long steps.

    Parameters
    ----------
    keys : ndarray, shape (N, d)
    path : sequence of int
        Rows in the order of the walk; some or all of them.
    n_chains : int
    cost : sequence of float, shape (N,), optional
        Predicted cost of every row; equal when left out.
    slack : float
        How far a cut may move from its ideal place to the longest step nearby, as a part of the
        mean cost of a chain.

    Returns
    -------
    list of ndarray of int64
        ``n_chains`` pieces; their concatenation is the path. None is empty while the path has at
        least ``n_chains`` rows.

    Raises
    ------
    ConfigError
        For costs that are negative or not finite, less than one chain, a path that is none.

    Examples
    --------
    >>> keys = np.array([[0.0], [0.1], [0.2], [5.0], [5.1]])
    >>> [piece.tolist() for piece in cut(keys, range(5), 2, slack=0.3)]
    [[0, 1, 2], [3, 4]]
    """
    keys = checked_keys(keys)
    walk = checked_path(path, len(keys))
    if n_chains < 1:
        raise ConfigError(f"n_chains = {n_chains}: at least one chain is needed")
    costs = np.ones(len(keys)) if cost is None else np.asarray(cost, dtype=np.float64)
    if costs.shape != (len(keys),):
        raise ConfigError(f"cost has shape {costs.shape}: one number for each of {len(keys)} keys")
    if not np.all(np.isfinite(costs)) or np.any(costs < 0):
        raise ConfigError("cost has entries that are negative or not finite")
    n, steps = len(walk), _steps(keys[walk])
    done = np.cumsum(costs[walk] if costs[walk].any() else np.ones(n))
    total = float(done[-1]) if n else 0.0
    places, last = [], 0
    for chain in range(1, n_chains):
        low, high = last + 1, n - (n_chains - chain)  # so that no chain is left without a row
        if low > high:  # fewer rows than chains: one each, then none
            last = min(last + 1, n)
            places.append(last)
            continue
        candidates = np.arange(low, high + 1)
        miss = np.abs(done[candidates - 1] - total * chain / n_chains)
        near = miss <= max(slack * total / n_chains, miss.min())
        order = np.lexsort((candidates, miss, -steps[candidates - 1], ~near))
        last = int(candidates[order[0]])
        places.append(last)
    return [piece.copy() for piece in np.split(walk, places)]


def checked_keys(keys: np.ndarray) -> np.ndarray:
    """Return keys as doubles, shape (N, d), or raise ConfigError that names the faulty row."""
    keys = np.asarray(keys, dtype=np.float64)
    if keys.ndim != 2:
        raise ConfigError(f"keys have shape {keys.shape}: expected (samples, columns)")
    finite = np.isfinite(keys).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise ConfigError(
            f"the key of row {row} is not finite ({np.count_nonzero(~finite)} such rows), so it "
            "has no place in the order; mend or leave out the sample"
        )
    return keys


def checked_path(path: Sequence[int] | np.ndarray, n: int) -> np.ndarray:
    """Return a path as int64, or raise ConfigError when a row is unknown or visited twice."""
    walk = np.asarray(path)
    if walk.ndim != 1 or (walk.size and not np.issubdtype(walk.dtype, np.integer)):
        raise ConfigError("a path is a list of row numbers")
    walk = walk.astype(np.int64)
    unknown = walk[(walk < 0) | (walk >= n)]
    if unknown.size:
        raise ConfigError(f"a path visits row {unknown[0]}; there are {n} rows, from 0")
    visits = np.bincount(walk, minlength=1)
    if visits.max() > 1:
        raise ConfigError(f"a path visits row {int(visits.argmax())} twice")
    return walk


def lattice(keys: np.ndarray) -> np.ndarray:
    """Return keys as integers in doubles, one scale for all columns, centred.

    Squared distances are at most about ``2^45``.
    """
    keys = checked_keys(keys)
    if not keys.size:
        return np.zeros_like(keys)
    keys = np.ldexp(keys, -np.frexp(np.abs(keys).max())[1])  # differences cannot overflow
    low, high = keys.min(axis=0), keys.max(axis=0)
    extent = float((high - low).max())
    if extent == 0:
        return np.zeros_like(keys)
    n_bits = (_BITS - ceil(log2(keys.shape[1]))) // 2
    return np.asarray(np.rint(np.ldexp(keys - (low + high) / 2, n_bits - np.frexp(extent)[1])))


def neighbours(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``k`` nearest others of every lattice point, nearest first.

    Parameters
    ----------
    points : ndarray, shape (N, d)
        From :func:`lattice`.
    k : int
        Fewer when there are not so many others.

    Returns
    -------
    nearest : ndarray of int64, shape (N, k)
        At equal distance the lower index first.
    squares : ndarray of int64, shape (N, k)
        Squared distances, exact.
    """
    n = len(points)
    k = min(k, n - 1)
    if k < 1:
        return np.zeros((n, 0), np.int64), np.zeros((n, 0), np.int64)
    n_bits = (n - 1).bit_length()
    if n_bits > 62 - _BITS:
        raise ValueError(f"{n} points in one table of neighbours; order them in groups")
    norms = np.square(points).sum(axis=1)
    codes = np.empty((n, k), np.int64)
    labels = np.arange(n)
    rows = max(1, _BLOCK_BYTES // (8 * n))
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        squares = points[block] @ points.T
        squares *= -2
        squares += norms
        squares += norms[block, None]
        found = squares.astype(np.int64)  # distance in the high bits, index in the low ones
        found <<= n_bits
        found |= labels
        found[labels[block] - start, labels[block]] = np.iinfo(np.int64).max  # not itself
        found.partition(k - 1, axis=1)
        codes[block] = np.sort(found[:, :k], axis=1)
    return codes & ((1 << n_bits) - 1), codes >> n_bits


def greedy_path(points: np.ndarray, nearest: np.ndarray, start: int) -> np.ndarray:
    """Return the path that always goes to the nearest point not yet visited.

    Parameters
    ----------
    points : ndarray, shape (N, d)
        From :func:`lattice`.
    nearest : ndarray, shape (N, k)
        From :func:`neighbours`.
    start : int

    Returns
    -------
    ndarray of int64, shape (N,)
    """
    n = len(points)
    visited = bytearray(n)
    is_visited = np.frombuffer(visited, dtype=np.bool_)
    lists = nearest.tolist()
    left = np.arange(n)
    left_points, left_norms = points, np.square(points).sum(axis=1)
    path, current = [], start
    for n_left in range(n - 1, -1, -1):
        path.append(current)
        visited[current] = 1
        if n_left == 0:
            break
        for candidate in lists[current]:
            if not visited[candidate]:
                break
        else:
            if n_left < 0.7 * len(left):
                left = left[~is_visited[left]]
                left_points = points[left]
                left_norms = np.square(left_points).sum(axis=1)
            scores = left_norms - 2 * (left_points @ points[current])
            scores[is_visited[left]] = np.inf
            candidate = int(left[scores.argmin()])
        current = candidate
    return np.array(path, dtype=np.int64)


def hilbert_path(points: np.ndarray, n_dimensions: int) -> np.ndarray:
    """Return the order of lattice points along a Hilbert curve.

    Parameters
    ----------
    points : ndarray, shape (N, d)
        From :func:`lattice`.
    n_dimensions : int
        Columns of largest spread that count, all when there are fewer.

    Returns
    -------
    ndarray of int64, shape (N,)
        Points of one cell in the order of their indices.
    """
    extents = np.ptp(points, axis=0) if len(points) else np.zeros(points.shape[1])
    columns = np.argsort(-extents, kind="stable")[:n_dimensions]
    columns = columns[extents[columns] > 0]
    if not columns.size:
        return np.arange(len(points))
    chosen = points[:, columns] - points[:, columns].min(axis=0)
    n_bits = min(_HILBERT_BITS, max(1, int(chosen.max()).bit_length()))
    shift = int(chosen.max()).bit_length() - n_bits
    x = list((chosen.astype(np.int64) >> shift).T.copy())
    n = len(x)
    for level in range(n_bits - 1, 0, -1):
        bit, below = 1 << level, (1 << level) - 1
        for i in range(n):
            is_set = (x[i] & bit) != 0
            swap = np.where(is_set, 0, (x[0] ^ x[i]) & below)
            x[0] = x[0] ^ np.where(is_set, below, swap)
            x[i] = x[i] ^ swap if i else x[0]
    for i in range(1, n):
        x[i] = x[i] ^ x[i - 1]
    flips = np.zeros_like(x[0])
    for level in range(n_bits - 1, 0, -1):
        flips ^= np.where((x[-1] & (1 << level)) != 0, (1 << level) - 1, 0)
    words = []
    for level in range(n_bits - 1, -1, -1):
        for start in range(0, n, 62):
            word = np.zeros_like(flips)
            for values in x[start : start + 62]:
                word = (word << 1) | ((values ^ flips) >> level & 1)
            words.append(word)
    return np.lexsort(words[::-1])


def _steps(walked: np.ndarray) -> np.ndarray:
    """Return the distances between consecutive rows."""
    return np.asarray(np.linalg.norm(np.diff(walked, axis=0), axis=1))
