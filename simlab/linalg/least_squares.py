"""The small least-squares problem of GMRES, solved anew after every step by one more rotation.

With orthogonal omega and triangular R in ``omega H = [R; 0]``, the y that makes the length of
``beta e_1 - H y`` smallest is ``R^-1`` times the first entries of ``beta omega e_1``, and the last
entry is that length. Cost of step j: ``2 j^2`` flops.
"""

from __future__ import annotations

from math import hypot, sqrt

import numpy as np
from scipy.linalg import solve_triangular

__all__ = ["HessenbergLeastSquares"]

_DEPENDENT = 1e-14


class HessenbergLeastSquares:
    """``min || beta e_1 - H y ||`` while the Hessenberg matrix H grows by a column per step.

    Parameters
    ----------
    beta : float
    most : int
        Columns at most.

    Attributes
    ----------
    n : int
        Columns so far.
    residual : float
        Length of what is left.
    """

    def __init__(self, beta: float, most: int) -> None:
        self.n, self.residual = 0, abs(beta)
        self._R, self._omega = np.zeros((most, most)), np.eye(most + 1)
        self._g, self._last = np.zeros(most), beta  # beta omega e_1, its last entry apart

    def add(self, column: np.ndarray, below: float) -> bool:
        """Add a column of H, shape (n + 1,), and the entry below it.

        Returns False, and leaves the column out, when it depends on those before it.
        """
        j, omega = self.n, self._omega
        turned = omega[: j + 1, : j + 1] @ column
        pivot = float(turned[j])
        size = hypot(pivot, below)
        if size <= _DEPENDENT * sqrt(turned @ turned):
            return False
        cos, sin = pivot / size, below / size
        self._R[:j, j], self._R[j, j] = turned[:j], size
        omega[j + 1, : j + 1] = -sin * omega[j, : j + 1]
        omega[j, : j + 1] *= cos
        omega[j, j + 1], omega[j + 1, j + 1] = sin, cos
        self._g[j], self._last = cos * self._last, -sin * self._last
        self.n, self.residual = j + 1, abs(self._last)
        return True

    def solution(self) -> np.ndarray:
        """Return y, shape (n,)."""
        return np.asarray(solve_triangular(self._R[: self.n, : self.n], self._g[: self.n]))

    def residual_vector(self) -> np.ndarray:
        """Return ``beta e_1 - H y``, shape (n + 1,)."""
        return np.asarray(self._last * self._omega[self.n, : self.n + 1])
