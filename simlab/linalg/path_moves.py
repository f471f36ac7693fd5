"""Shorter paths by local moves: 2-opt and Or-opt with lists of neighbours.

*2-opt* reverses a stretch of the path: steps (a, a') and (c, c') become (a, c) and (a', c').
*Or-opt* moves up to three consecutive points, either way round, between two others. Only new steps
to one of the ``k`` nearest neighbours of a point are looked at, and all reversals that break one of
the longest steps, since clusters are nobody's neighbours.

The gain of a move depends on the steps it breaks and joins, not on where they are. So all candidate
moves of a round are found at once by array operations, and then made one after the other, best
first; a move whose steps have gone in the meantime is skipped. A round looks only at points whose
steps changed in the last one and at their neighbours, until a round over all finds nothing. Long
paths are improved in overlapping windows whose ends stay.

Cost: the table of neighbours, ``N^2 d`` per window of ``N`` points; then about ten rounds of
``10 N k d`` operations. References: Croes, Oper. Res. 6, 1958; Or, thesis, Northwestern, 1976;
Bentley, ORSA J. Comput. 4, 1992.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from simlab.linalg.paths import checked_keys, checked_path, lattice, neighbours, path_length

__all__ = ["improved", "improved_points"]

_N_NEIGHBOURS = 10
_N_LONGEST = 16
_SEGMENTS = (1, 2, 3)
_WINDOW = 10_000
_MAX_ROUNDS = 200
_BLOCK = 2**16  # pairs of points whose distances are computed at once
_LEAST = 1e-9  # gain that counts, relative to the longest distance


def improved(keys: np.ndarray, path: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return a path through the same rows that is at most as long.

    Parameters
    ----------
    keys : ndarray, shape (N, d)
    path : sequence of int
        Rows in the order of the walk; some or all of them.

    Returns
    -------
    ndarray of int64
        A permutation of ``path``, a function of the arguments only; ``path`` itself when no move
        shortens it.

    Examples
    --------
    >>> keys = np.array([[0.0, 0.0], [2.0, 1.0], [2.0, 0.0], [0.0, 1.0], [4.0, 0.5]])
    >>> improved(keys, range(5)).tolist()
    [0, 3, 1, 2, 4]
    """
    keys = checked_keys(keys)
    walk = checked_path(path, len(keys))
    shorter = walk[improved_points(lattice(keys[walk]))]
    return shorter if path_length(keys, shorter) < path_length(keys, walk) else walk


def improved_points(points: np.ndarray) -> np.ndarray:
    """Return a shorter order of lattice points, given in the order of a path."""
    n = len(points)
    order = np.arange(n)
    if n <= _WINDOW:
        return _Path(points, ends_stay=False).improve()
    for offset in (0, _WINDOW // 2):
        for start in range(offset, n - 1, _WINDOW - 1):  # neighbouring windows share an end
            window = order[start : start + _WINDOW]
            order[start : start + _WINDOW] = window[_Path(points[window], ends_stay=True).improve()]
    return order


class _Path:
    """An open path and its moves. Points beyond the ends are ``n``, at distance 0 of all."""

    def __init__(self, points: np.ndarray, ends_stay: bool) -> None:
        self._points, self._ends_stay = points, ends_stay
        self._n = n = len(points)
        self._nearest, squares = neighbours(points, _N_NEIGHBOURS)
        self._near = np.sqrt(squares.astype(np.float64))
        self._extended = np.concatenate([[n], np.arange(n), [n]])  # the path between two nobodies
        self._path = self._extended[1:-1]
        self._place = np.arange(n)
        extent = np.sqrt(np.square(np.ptp(points, axis=0)).sum()) if n else 0.0
        self._least = _LEAST * float(extent)

    def improve(self) -> np.ndarray:
        """Make moves until none is left that shortens the path."""
        if self._n < 3 or self._least == 0:
            return self._path.copy()
        everybody = np.arange(self._n)
        active = everybody
        for _ in range(_MAX_ROUNDS):
            touched = self._round(active)
            if touched.size:
                active = np.unique(np.concatenate([touched, self._nearest[touched].ravel()]))
            elif active.size == self._n:
                break
            else:
                active = everybody
        return self._path.copy()

    def _round(self, active: np.ndarray) -> np.ndarray:
        """Find all moves that start at the active points and make them, best first."""
        self._steps = self._distance(self._extended[:-1], self._extended[1:])
        found = [*self._reversals(active), *self._transfers(active)]
        moves = np.concatenate(found)
        gains, codes = moves[:, 0], moves[:, 1:].astype(np.int64)
        touched: set[int] = set()
        for move in codes[np.argsort(-gains, kind="stable")].tolist():
            kind, *nodes = move
            made = self._reverse(*nodes[:4]) if kind == 0 else self._transfer(*nodes)
            if made:
                touched.update(nodes)
        touched.discard(self._n)
        return np.array(sorted(touched), dtype=np.int64)

    def _distance(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        result = np.empty(len(p))
        for start in range(0, len(p), _BLOCK):
            a, b = p[start : start + _BLOCK], q[start : start + _BLOCK]
            is_real = (a < self._n) & (b < self._n)
            inside = np.where(is_real, a, 0), np.where(is_real, b, 0)
            difference = self._points[inside[0]] - self._points[inside[1]]
            squares = np.einsum("ij,ij->i", difference, difference)
            result[start : start + _BLOCK] = np.where(is_real, np.sqrt(squares), 0.0)
        return result

    def _distances(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Return the distances of few points to many, shape (len(p), len(q))."""
        a, b = self._points[p], self._points[q]
        squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * (a @ b.T)
        return np.asarray(np.sqrt(squares))

    def _beside(self, nodes: np.ndarray, side: int) -> np.ndarray:
        """Return who comes after (+1) or before (-1) each point, ``n`` beyond the ends."""
        return self._extended[self._place[nodes] + 1 + side]

    def _step(self, nodes: np.ndarray, side: int) -> np.ndarray:
        """Return how far that is, 0 beyond the ends."""
        return self._steps[self._place[nodes] + (side == 1)]

    def _reversals(self, active: np.ndarray) -> Iterator[np.ndarray]:
        longest = np.argsort(-self._steps[1:-1], kind="stable")[:_N_LONGEST]
        for side in (1, -1):
            after, length = self._beside(active, side), self._step(active, side)
            # new steps to a neighbour, nearer than the one that is there
            row, column = np.nonzero(self._near[active] < (length - self._least)[:, None])
            a, a1 = active[row], after[row]
            c, new = self._nearest[a, column], self._near[a, column]
            yield self._reversal(a, a1, c, side, length[row] - new)
            # out of one of the longest steps, to anybody active
            a, a1 = self._path[longest], self._path[longest + 1]
            if side == -1:
                a, a1 = a1, a
            gain = self._steps[longest + 1, None] - self._distances(a, active)
            row, column = np.nonzero(gain + length > self._least)
            yield self._reversal(a[row], a1[row], active[column], side, gain[row, column])

    def _reversal(
        self, a: np.ndarray, a1: np.ndarray, c: np.ndarray, side: int, gain: np.ndarray
    ) -> np.ndarray:
        """Complete gains and return the moves worth making, rows (gain, 0, a, a1, c, c1, n, n)."""
        c1, gain = self._beside(c, side), gain + self._step(c, side)
        keep = (gain > self._least) & (a != c) & (a1 != c) & (a1 != self._n)
        if self._ends_stay:
            keep &= c1 != self._n
        a, a1, c, c1, gain = a[keep], a1[keep], c[keep], c1[keep], gain[keep]
        nobody = np.full(len(a), self._n)
        return self._table(gain - self._distance(a1, c1), 0, a, a1, c, c1, nobody, nobody)

    def _transfers(self, active: np.ndarray) -> Iterator[np.ndarray]:
        n = self._n
        for size in _SEGMENTS:
            for side in (1, -1):  # the segment goes from s to the given side, t is its far end
                at = self._place[active]
                far = at + side * (size - 1)
                whole = (far >= 0) & (far < n)
                s, at, far = active[whole], at[whole], far[whole]
                t = self._path[far]
                p, q = self._beside(s, -side), self._beside(t, side)
                broken = self._step(s, -side) + self._step(t, side)
                movable = broken > self._least
                if self._ends_stay:
                    movable &= (p != n) & (q != n)
                s, t, p, q, at, far = (x[movable] for x in (s, t, p, q, at, far))
                spared = broken[movable] - self._distance(p, q)
                row, column = np.nonzero(self._near[s] < (spared - self._least)[:, None])
                c, new = self._nearest[s[row], column], self._near[s[row], column]
                low, high = np.minimum(at, far)[row], np.maximum(at, far)[row]
                outside = (self._place[c] < low) | (self._place[c] > high)
                row, c, gain = row[outside], c[outside], (spared[row] - new)[outside]
                for way in (1, -1):
                    yield self._transfer_to(s[row], t[row], p[row], q[row], c, way, gain)

    def _transfer_to(
        self,
        s: np.ndarray,
        t: np.ndarray,
        p: np.ndarray,
        q: np.ndarray,
        c: np.ndarray,
        way: int,
        gain: np.ndarray,
    ) -> np.ndarray:
        """Return moves of segments s..t between ``c`` and who is beside it, s next to c."""
        d = self._beside(c, way)
        keep = ~(((c == p) & (d == s)) | ((c == q) & (d == t)))  # not into its own place
        if self._ends_stay:
            keep &= d != self._n
        s, t, p, q, c, d = (nodes[keep] for nodes in (s, t, p, q, c, d))
        gain = gain[keep] + self._step(c, way)
        likely = gain > self._least
        s, t, p, q, c, d, gain = (x[likely] for x in (s, t, p, q, c, d, gain))
        return self._table(gain - self._distance(t, d), 1, s, t, p, q, c, d)

    def _table(self, gain: np.ndarray, kind: int, *nodes: np.ndarray) -> np.ndarray:
        keep = gain > self._least
        columns = [gain[keep], np.full(np.count_nonzero(keep), float(kind))]
        return np.stack([*columns, *(one[keep].astype(np.float64) for one in nodes)], axis=1)

    def _where(self, node: int, beyond: int) -> int:
        return int(self._place[node]) if node < self._n else beyond

    def _reverse(self, a: int, a1: int, c: int, c1: int) -> bool:
        """Join a with c and a1 with c1, if the steps a-a1 and c-c1 are still there."""
        i, i1, j = int(self._place[a]), int(self._place[a1]), int(self._place[c])
        side = i1 - i
        if abs(side) != 1 or self._where(c1, self._n if side == 1 else -1) != j + side:
            return False
        left = min(i, i1), j if side == 1 else j - 1
        low, high = min(left) + 1, max(left) + 1
        self._path[low:high] = self._path[low:high][::-1].copy()
        self._place[self._path[low:high]] = np.arange(low, high)
        return True

    def _transfer(self, s: int, t: int, p: int, q: int, c: int, d: int) -> bool:
        """Move s..t between c and d, s next to c, if all steps are still there."""
        n = self._n
        i, j, k = int(self._place[s]), int(self._place[t]), int(self._place[c])
        side = 1 if i <= j else -1
        if i == j:
            side = 1 if self._extended[i] == p and self._extended[i + 2] == q else -1
        if self._extended[i + 1 - side] != p or self._extended[j + 1 + side] != q:
            return False
        low, high = min(i, j), max(i, j)
        if high - low >= max(_SEGMENTS) or low <= k <= high:
            return False
        if self._extended[k + 2] == d and not (d == n and k != n - 1):
            left, s_first = k, True
        elif self._extended[k] == d and not (d == n and k != 0):
            left, s_first = k - 1, False
        else:
            return False
        segment = self._path[low : high + 1].copy()
        if (segment[0] == s) != s_first:
            segment = segment[::-1]
        if left > high:
            first, last = low, left + 1
            self._path[first:last] = np.concatenate([self._path[high + 1 : last], segment])
        else:
            first, last = left + 1, high + 1
            self._path[first:last] = np.concatenate([segment, self._path[first:low]])
        self._place[self._path[first:last]] = np.arange(first, last)
        return True
