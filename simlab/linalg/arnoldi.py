"""One step of Gram-Schmidt on a row-distributed basis: one pass, and a second where it is needed.

The new direction of an Arnoldi step is first freed from the last two basis vectors, which hold
nearly all of it, then from the whole basis once. What that costs in orthogonality is bounded on the
way, and a second pass is made only where the bound would exceed 1e-12. Two reductions as a rule.
"""

from __future__ import annotations

from math import hypot, isfinite, sqrt

import numpy as np

from simlab.linalg.blocks import Reducer, subtract

__all__ = ["orthogonalise"]

_LOSS = 1e-12  # of orthogonality, above which a second pass is made
_CANCELLATION = 1e-2  # norm after over before; below, the norm is not taken from Pythagoras
_EPS = float(np.finfo(float).eps)


def orthogonalise(
    Q: np.ndarray, first: int, middle: int, last: int, loss: float, reduce: Reducer
) -> tuple[np.ndarray, float, float]:
    """Free column ``last`` of [C V] from those before it. Collective.

    Parameters
    ----------
    Q : ndarray, shape (local rows, width), Fortran order
        C begins at column ``first``, V at column ``middle``; column ``last`` is overwritten.
    first, middle, last : int
    loss : float
        Bound for the loss of orthogonality among those columns.

    Returns
    -------
    h : ndarray, shape (last - first,)
    length : float
        What is left of the column, which is not yet normalised.
    loss : float
        The bound with the new column.
    """
    w, basis = Q[:, last], Q[:, first:last]
    near = min(2, last - middle)
    h = np.zeros(last - first)
    h[-near:] = reduce.sum(basis[:, -near:].T @ w)
    subtract(w, basis[:, -near:], h[-near:])
    before = 0.0
    for _ in range(2):
        products = reduce.sum(Q[:, first : last + 1].T @ w)
        part, square = products[:-1], products[-1]
        subtract(w, basis, part)
        h += part
        moved = float(part @ part)
        rest = square - moved
        before = before or square + float(h[-near:] @ h[-near:])
        if rest > _CANCELLATION**2 * square:
            length = sqrt(rest)
            added = (loss * sqrt(moved) + _EPS * sqrt(before)) / length
            if added <= _LOSS:
                return h, length, hypot(loss, 1.5 * added)
        elif not isfinite(rest):
            return h, rest, loss
    length = sqrt(max(reduce.sum(np.array([w @ w]))[0], 0.0))
    return h, length, max(loss, _LOSS)
