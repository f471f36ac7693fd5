"""Block Krylov-Schur iteration on the inverse of a matrix: its modes of smallest modulus.

The method behind :mod:`.seed`, where it is described.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import lapack

from simlab.core.config import build
from simlab.core.errors import ConfigError, ConvergenceError
from simlab.linalg import petsc as PETSc
from simlab.linalg.blocks import Block, Reducer, orthonormalise, transform
from simlab.linalg.direct import Direct
from simlab.linalg.system import LinearSystem

if TYPE_CHECKING:
    from petsc4py import PETSc as PETScTypes

__all__ = ["KrylovSchur"]

log = logging.getLogger("simlab.linalg.krylov_schur")

_BLOCK = 3
_NOISE = 1e-13  # of a column's length: what is left of it is rounding
_N_DOUBTS = 8  # blocks from a new start that must show no new mode
_MAX_RESTARTS = 30
_SHIFT = 1e-6  # of a matrix with a null space, relative to its mean absolute diagonal
_SINGULAR = (
    "the reference matrix of the static space is singular; attach its null space or set "
    "solver.static = 0"
)


class _Inverse:
    """``A^-1`` through PETSc's factorisation, options prefix ``seed_``. Collective.

    A matrix with an attached null space is shifted by a little, and the null space removed from
    what comes out.
    """

    def __init__(self, system: LinearSystem) -> None:
        space = system.A.getNullSpace()
        self._null_space = space if space.handle else None
        self._shifted: Any = None
        self.shift = 0.0
        if self._null_space is not None:
            self._shifted = system.A.duplicate(copy=True)
            diagonal = system.A.getDiagonal()
            diagonal.abs()
            self.shift = _SHIFT * diagonal.sum() / system.A.getSize()[0]
            self._shifted.shift(self.shift)
            diagonal.destroy()
            system = LinearSystem(self._shifted, system.b, system.traits)
        self._factor = build(Direct, {"prefix": "seed_"}).init(system)

    def apply(self, b: PETScTypes.Vec, x: PETScTypes.Vec) -> None:
        """Write the solution of ``A x = b`` to x."""
        try:
            self._factor.ksp.solve(b, x)
            is_sound = self._factor.ksp.getConvergedReason() >= 0
        except PETSc.Error:
            is_sound = False
        if not is_sound:
            raise ConfigError(_SINGULAR)
        if self._null_space is not None:
            self._null_space.remove(x)

    def destroy(self) -> None:
        self._factor.destroy()
        if self._shifted is not None:
            self._shifted.destroy()


class KrylovSchur:
    """The iteration of the module's docstring. Collective.

    ``V`` has ``ready`` orthonormal columns, of which ``A^-1`` has been applied to the first
    ``done``: ``A^-1 V[:, :done] = V[:, :ready] S[:ready, :done]``.
    """

    def __init__(self, system: LinearSystem, k: int, tol: float) -> None:
        self._system, self._k, self._tol = system, k, tol
        self._n = system.A.getSize()[0]
        self._capacity = min(3 * k + 8 * _BLOCK, self._n)
        self._reduce = Reducer(system.A.comm)
        self._choose = _ordered_real if system.traits.symmetric else _ordered_schur
        self._V = Block(system.b, self._capacity + _BLOCK)
        self._S = np.zeros((self._capacity + _BLOCK, self._capacity))
        self._done = self._ready = self._n_solves = self._n_drawn = 0

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Return basis and moduli of the eigenvalues."""
        inverse = _Inverse(self._system)
        try:
            return self._iterate(inverse)
        finally:
            inverse.destroy()
            self._V.destroy()

    def _iterate(self, inverse: _Inverse) -> tuple[np.ndarray, np.ndarray]:
        self._draw(inverse)
        look_at, known = self._k + _BLOCK, np.zeros(0)
        for _ in range(1 + _MAX_RESTARTS):
            found = self._grow(inverse, look_at)
            if found is None:
                self._restart(self._k + (self._done - self._k) // 3)
                look_at = self._done + 2 * _BLOCK
                continue
            Q, size = found
            if self._done == self._n or (
                len(known) == len(size) and np.allclose(known, size, rtol=1e-4, atol=0.0)
            ):
                log.info("static space: %d modes in %d solves", self._k, self._n_solves + len(size))
                return self._result(Q, size, inverse)
            known = size
            self._restart(self._k)
            self._ready = self._done  # whatever the old start did not contain, a new one shows
            self._draw(inverse)
            look_at = self._done + _N_DOUBTS * _BLOCK
        raise ConvergenceError(
            f"static space: {self._k} modes not found to {self._tol:g} in {_MAX_RESTARTS} restarts"
        )

    def _grow(self, inverse: _Inverse, look_at: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Expand the basis until the wanted modes have converged or there is no room."""
        while True:
            self._expand(inverse)
            is_last = self._done == self._ready or self._ready > self._capacity
            if self._done >= look_at or is_last:
                look_at = self._done + max(_BLOCK, self._k // 4)
                found = self._look()
                if found is not None or is_last:
                    return found

    def _draw(self, inverse: _Inverse) -> None:
        """Append ``A^-1`` times pseudo-random columns, orthonormalised."""
        width = min(_BLOCK, self._n - self._ready)
        first = self._system.A.getOwnershipRange()[0]
        rows = first + np.arange(len(self._V.array))
        columns = slice(self._ready, self._ready + width)
        for j in range(columns.start, columns.stop):
            start = self._system.b.duplicate()
            start.setArray(_hashed(rows, self._n_drawn))
            self._n_drawn += 1
            inverse.apply(start, self._V.vecs[j])
            start.destroy()
        self._n_solves += width
        self._project(columns)
        self._ready += self._normalise(columns)[1]

    def _expand(self, inverse: _Inverse) -> None:
        """Apply ``A^-1`` to the columns that wait for it, and append what is new."""
        waiting = slice(self._done, self._ready)
        width = self._ready - self._done
        columns = slice(self._ready, self._ready + width)
        for j in range(self._done, self._ready):
            inverse.apply(self._V.touch(j), self._V.vecs[j + width])
        self._n_solves += width
        self._S[: self._ready, waiting] = self._project(columns)
        if not np.isfinite(self._S[: self._ready, waiting]).all():
            raise ConfigError(_SINGULAR)
        R, n_new = self._normalise(columns)
        n_new = min(n_new, self._n - self._ready)
        self._S[self._ready : self._ready + n_new, waiting] = R[:n_new]
        self._done, self._ready = self._ready, self._ready + n_new
        if not n_new and self._ready < min(self._n, self._capacity):  # an invariant subspace
            self._draw(inverse)

    def _project(self, columns: slice) -> np.ndarray:
        """Free columns from the basis, twice, and return the coefficients; noise becomes zero."""
        basis, W = self._V.array[:, : self._ready], self._V.array[:, columns]
        total = np.zeros((self._ready, W.shape[1]))
        for _ in range(2):
            part = self._reduce.gram(basis, W)
            W -= basis @ part
            total += part
        left = np.sqrt(np.diag(self._reduce.gram(W, W)))
        W[:, left <= _NOISE * np.linalg.norm(total, axis=0)] = 0.0
        return total

    def _normalise(self, columns: slice) -> tuple[np.ndarray, int]:
        """Orthonormalise columns; return R with ``old = new R`` and how many there are."""
        W = self._V.array[:, columns]
        old = W.copy(order="F")
        T = orthonormalise(W, self._reduce)
        n_new = T.shape[1]
        new = W[:, W.shape[1] - n_new :].copy(order="F")
        W[:, :n_new] = new
        return self._reduce.gram(new, old), n_new

    def _look(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the wanted Schur vectors of S and the moduli when their residuals are small."""
        done, ready, k = self._done, self._ready, min(self._k, self._done)
        made = self._reduce.from_root(self._choose, self._S[:done, :done], k)
        if made is None:
            raise ConvergenceError("static space: the small eigenvalue problem failed")
        Q, _, size = made
        residual = np.linalg.norm(self._S[done:ready, :done] @ Q, axis=0)
        if k < self._k or np.any(residual > 0.5 * self._tol * size):
            return None
        return Q, size

    def _result(
        self, Q: np.ndarray, size: np.ndarray, inverse: _Inverse
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the basis after one more application of ``A^-1``."""
        k = Q.shape[1]
        transform(self._V.array[:, : self._done], Q, self._V.array[:, :k])
        vectors = np.empty((len(self._V.array), k), order="F")
        target = self._V.vecs[k]
        for j in range(k):
            inverse.apply(self._V.touch(j), target)
            vectors[:, j] = target.getArray(readonly=True)
        T = orthonormalise(vectors, self._reduce)
        return vectors[:, k - T.shape[1] :], np.abs(1.0 / size - inverse.shift)

    def _restart(self, n_kept: int) -> None:
        """Keep leading Schur vectors, and the columns that wait."""
        done, ready = self._done, self._ready
        made = self._reduce.from_root(self._choose, self._S[:done, :done], min(n_kept, done - 1))
        if made is None:
            raise ConvergenceError("static space: the small eigenvalue problem failed")
        Q, T, _ = made
        k, width = Q.shape[1], ready - done
        coupling = self._S[done:ready, :done] @ Q
        waiting = self._V.array[:, done:ready].copy()
        transform(self._V.array[:, :done], Q, self._V.array[:, :k])
        self._V.array[:, k : k + width] = waiting
        self._S[...] = 0.0
        self._S[:k, :k], self._S[k : k + width, :k] = T, coupling
        self._done, self._ready = k, k + width


def _hashed(rows: np.ndarray, salt: int) -> np.ndarray:
    """Return one number in [-1, 1) per row number: splitmix64, the same on every machine."""
    word = rows.astype(np.uint64) + np.uint64(1 + (salt << 40))
    word *= np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return np.asarray(word / 2.0**63 - 1.0)


def _ordered_real(S: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the k eigenvectors of symmetric S of largest modulus, their values, the moduli."""
    values, vectors = np.linalg.eigh(0.5 * (S + S.T))
    chosen = np.argsort(-np.abs(values), kind="stable")[:k]
    return vectors[:, chosen], np.diag(values[chosen]), np.abs(values[chosen])


def _ordered_schur(S: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return k leading Schur vectors of S, largest moduli first, their block, the moduli.

    One more where the limit would part a complex pair.
    """
    result = lapack.dgees(lambda *_: 0, S)
    T, Q, info = result[0], result[4], result[-1]
    if info:
        raise np.linalg.LinAlgError("QR iteration did not converge")
    at, sizes = 0, []
    while at < k:
        firsts, moduli = _moduli(T, at)
        best = int(firsts[np.argmax(moduli)])
        if best > at:
            T, Q, _ = lapack.dtrexc(T, Q, best + 1, at + 1)
        is_pair = at + 1 < len(T) and T[at + 1, at] != 0
        sizes += [moduli.max()] * (1 + is_pair)
        at += 1 + is_pair
    return Q[:, :at], np.triu(T[:at, :at], -1), np.array(sizes)


def _moduli(T: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first rows and eigenvalue moduli of T's diagonal blocks from row ``at`` on."""
    below = np.append(np.diag(T, -1), 0.0)
    is_second = np.insert(below[:-1] != 0, 0, False)
    firsts = at + np.flatnonzero(~is_second[at:])
    square = np.diag(T) ** 2
    pair = below != 0
    pair_at = np.flatnonzero(pair)
    square[pair_at] -= T[pair_at, pair_at + 1] * below[pair_at]
    return firsts, np.sqrt(np.abs(square[firsts]))
