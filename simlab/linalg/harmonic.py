"""Small dense problems of recycling: which directions of a search space to keep.

After a cycle the search space ``V`` (m columns) and the orthonormal basis ``W`` (m + 1 columns) of
its image satisfy ``A V = W G``. Harmonic Ritz values of A over V solve

    G^T G p = theta G^T (W^T V) p                                  (Morgan 2002, Parks et al. 2006)

and those of smallest ``|theta|`` are worth keeping. With ``S = G^+ W^T V`` the same vectors belong
to the eigenvalues of S of largest modulus (``1 / theta``; infinite theta is a harmless zero). Their
invariant subspace comes from an ordered real Schur form: real, orthonormal, and a complex pair
never falls apart. Columns of G are scaled to unit length first, so that vectors of any length mix.
Cost: a few times 10 m^3 flops, 0.5 ms for m = 40.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack, solve_triangular

__all__ = ["handed_on"]

_DEPENDENT = 1e-12


def handed_on(
    G: np.ndarray, WV: np.ndarray, n_fixed: int, n_more: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the subspace that the next cycle deflates.

    Parameters
    ----------
    G : ndarray, shape (p, m)
        ``A V = W G``.
    WV : ndarray, shape (p, m)
        ``W^T V``.
    n_fixed : int
        Leading columns of V that stay as they are; the others are chosen in their complement.
    n_more : int
        How many more to keep; one less where the limit would part a complex pair.

    Returns
    -------
    Q : ndarray, shape (p, k)
        ``C = W Q`` is orthonormal.
    T : ndarray, shape (m, k)
        ``A (V T) = C``.

    Raises
    ------
    numpy.linalg.LinAlgError
        For values that are not finite.
    """
    if not (np.isfinite(G).all() and np.isfinite(WV).all()):
        raise np.linalg.LinAlgError("not finite")
    m = G.shape[1]
    rest = _dominant(G[n_fixed:, n_fixed:], WV[n_fixed:, n_fixed:], min(n_more, m - n_fixed))
    P = np.zeros((m, n_fixed + rest.shape[1]))
    P[:n_fixed, :n_fixed] = np.eye(n_fixed)
    P[n_fixed:, n_fixed:] = rest
    image = G @ P
    length = np.linalg.norm(image, axis=0)
    kept = length > 0
    P, image = P[:, kept] / length[kept], image[:, kept] / length[kept]
    while True:
        Q, R = np.linalg.qr(image)
        weak = np.flatnonzero(np.abs(np.diag(R)) < _DEPENDENT)
        if not len(weak):
            return Q, solve_triangular(R.T, P.T, lower=True).T if P.size else P
        P, image = np.delete(P, weak[0], axis=1), np.delete(image, weak[0], axis=1)


def _dominant(G: np.ndarray, WV: np.ndarray, k: int) -> np.ndarray:
    """Return an orthonormal basis of the k smallest harmonic Ritz values' space, times scales."""
    m = G.shape[1]
    length = np.linalg.norm(G, axis=0)
    scale = np.divide(1.0, length, out=np.zeros(m), where=length > 0)
    if k >= m or k == 0:
        return np.diag(scale)[:, :k]
    Q, R = np.linalg.qr(G * scale)
    if np.abs(np.diag(R)).min() > _DEPENDENT:
        S = solve_triangular(R, Q.T @ (WV * scale))
    else:
        S = np.linalg.lstsq(G * scale, WV * scale, rcond=_DEPENDENT)[0]
    schur, vectors, size = _schur(S)
    order = np.argsort(-size, kind="stable")
    chosen = np.zeros(m, dtype=np.int32)
    chosen[order[:k]] = 1
    below = np.flatnonzero(np.diag(schur, -1))  # 2 x 2 blocks: rows i and i + 1 are one pair
    parted = below[chosen[below] != chosen[below + 1]]
    chosen[parted] = chosen[parted + 1] = 0
    if chosen.all() or not chosen.any():
        return scale[:, None] * vectors[:, : chosen.sum()]
    ordered = lapack.dtrsen(chosen, schur, vectors, wantq=1, job="N")
    if ordered[-1] != 0:
        raise np.linalg.LinAlgError("eigenvalues too close to be ordered")
    return scale[:, None] * ordered[1][:, : int(chosen.sum())]


def _schur(S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the real Schur form, its vectors and the moduli of its eigenvalues."""
    result = lapack.dgees(lambda *_: 0, S)
    schur, _, real, imaginary, vectors, _, info = result
    if info:
        raise np.linalg.LinAlgError("QR iteration did not converge")
    return schur, vectors, np.hypot(real, imaginary)
