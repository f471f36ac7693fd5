"""Small dense problems of deflated CG: a safe inverse of E, and which directions to carry.

The pencil ``F y = theta G y`` over ``S = [U P]`` is put together from the scalars of the iteration
(:class:`StepLog`); :mod:`.deflated_cg` says why that is possible. E has been freed of dependent
columns before (:func:`inverse_over`), P is conjugate, so G needs no further care. Cost: a few times
``(k + l)^3`` flops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import lapack

__all__ = ["StepLog", "inverse_over", "lowest"]

_DEPENDENT = 1e-8  # pivot of E, scaled to a unit diagonal, below which a column is dropped


class StepLog:
    """Scalars of the first steps of one solve, and the projected operators that follow from them.

    Parameters
    ----------
    capacity : int
        Directions that are kept.
    k : int
        Columns of U.
    """

    def __init__(self, capacity: int, k: int) -> None:
        self.capacity = capacity
        self._alpha: list[float] = []
        self._energy: list[float] = []
        self._rho: list[float] = []
        self._products: list[np.ndarray] = []
        self.k = k

    def take_products(self, c: Sequence[float] | np.ndarray, rho: float) -> None:
        """Keep ``c = W^T z`` and ``rho = r^T z``."""
        if len(self._rho) <= self.capacity:
            self._rho.append(rho)
            self._products.append(np.array(c))

    def take_step(self, alpha: float, energy: float) -> None:
        """Keep step length and ``p^T A p``."""
        if len(self._alpha) < self.capacity:
            self._alpha.append(alpha)
            self._energy.append(energy)

    @property
    def n_pairs(self) -> int:
        """Directions of which everything is known; the last one's next residual may not be."""
        return max(0, min(len(self._alpha), len(self._rho) - 1))

    def pencil(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ``diag(P^T A P)``, ``P^T A M A P`` and ``W^T M A P`` for U's last n columns."""
        m = self.n_pairs
        alpha, rho = np.array(self._alpha[:m]), np.array(self._rho[: m + 1])
        inner = np.diag((rho[:-1] + rho[1:]) / alpha**2)
        beside = np.arange(m - 1)
        inner[beside, beside + 1] = inner[beside + 1, beside] = -rho[1:-1] / (
            alpha[:-1] * alpha[1:]
        )
        c = np.array(self._products[: m + 1])[:, self.k - n :].T
        return np.array(self._energy[:m]), inner, (c[:, :-1] - c[:, 1:]) / alpha


def inverse_over(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns to keep of a Gram matrix, in order, and the inverse over them."""
    length = np.sqrt(np.maximum(np.diag(gram), 0.0))
    sound = np.flatnonzero(np.isfinite(length) & (length > 0))
    scaled = gram[np.ix_(sound, sound)] / np.outer(length[sound], length[sound])
    sound = sound[np.isfinite(scaled).all(axis=1)] if not np.isfinite(scaled).all() else sound
    if not len(sound):
        return sound, np.zeros((0, 0))
    scaled = gram[np.ix_(sound, sound)] / np.outer(length[sound], length[sound])
    _, pivots, rank, _ = lapack.dpstrf(0.5 * (scaled + scaled.T), tol=_DEPENDENT)
    chosen = np.sort(pivots[:rank] - 1)
    kept = sound[chosen]
    factor, info = lapack.dpotrf(scaled[np.ix_(chosen, chosen)], lower=0, clean=1)
    if info:
        return kept[:0], np.zeros((0, 0))
    half = lapack.dtrtri(factor, lower=0)[0] / length[kept, None]
    return kept, half @ half.T


def lowest(
    E: np.ndarray,
    theta: np.ndarray,
    energy: np.ndarray,
    inner: np.ndarray,
    mixed: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k smallest harmonic Ritz vectors over ``[U P]`` and their values.

    Parameters
    ----------
    E, theta : ndarray, shape (n, n) and (n,)
        ``U^T A U`` and the values that stand in for ``W^T M W``.
    energy, inner, mixed : ndarray, shape (m,), (m, m) and (n, m)
        Of :meth:`StepLog.pencil`.
    k : int

    Returns
    -------
    Y : ndarray, shape (n + m, k'), k' <= k
        Columns of unit length in the energy norm.
    theta : ndarray, shape (k',)

    Raises
    ------
    numpy.linalg.LinAlgError
        For values that are not finite.
    """
    n, m = mixed.shape
    F, half = np.zeros((n + m, n + m)), np.zeros((n + m, n + m))  # half^T G half = 1
    F[:n, :n] = 0.5 * (E * theta + theta[:, None] * E)
    F[:n, n:], F[n:, :n], F[n:, n:] = mixed, mixed.T, inner
    if n:
        length = np.sqrt(np.diag(E))
        factor = np.linalg.cholesky(E / np.outer(length, length)).T
        half[:n, :n] = lapack.dtrtri(factor, lower=0)[0] / length[:, None]
    half[n:, n:] = np.diag(1.0 / np.sqrt(energy))
    projected = half.T @ F @ half
    if not np.isfinite(projected).all():
        raise np.linalg.LinAlgError("not finite")
    values, vectors = np.linalg.eigh(projected)
    return half @ vectors[:, :k], values[:k]
