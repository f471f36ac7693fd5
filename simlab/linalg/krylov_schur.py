"""Krylov-Schur iteration on the inverse of a matrix: its modes of smallest modulus.

The method behind :mod:`.seed`, where it is described.
"""

from __future__ import annotations

import logging
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import eigh, lapack

from simlab.core.config import build
from simlab.core.errors import ConfigError, ConvergenceError
from simlab.linalg import petsc as PETSc
from simlab.linalg.arnoldi import orthogonalise
from simlab.linalg.blocks import Block, Reducer, orthonormalise, transform
from simlab.linalg.direct import Direct
from simlab.linalg.system import LinearSystem

if TYPE_CHECKING:
    from petsc4py import PETSc as PETScTypes

__all__ = ["SINGULAR", "KrylovSchur", "null_space_shift", "start_vector"]

log = logging.getLogger("simlab.linalg.krylov_schur")

_NOISE = 1e-13  # of a column's length: what is left of it is rounding
_N_DOUBTS = 16  # columns from a new start that must show no new mode
_ROOM = 24  # columns of the basis beyond three for every mode
_MAX_RESTARTS = 30
_EPS = float(np.finfo(float).eps)
_SHIFT = 1e-6  # of a matrix with a null space, relative to its mean absolute diagonal
SINGULAR = (
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
        self.shift = null_space_shift(system)
        if self._null_space is not None:
            self._shifted = system.A.duplicate(copy=True)
            self._shifted.shift(self.shift)
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
            raise ConfigError(SINGULAR)
        if self._null_space is not None:
            self._null_space.remove(x)

    def destroy(self) -> None:
        self._factor.destroy()
        if self._shifted is not None:
            self._shifted.destroy()


class KrylovSchur:
    """The iteration of the module's docstring. Collective.

    ``V`` has ``ready`` orthonormal columns, of which ``A^-1`` has been applied to the first
    ``done``, all or all but one: ``A^-1 V[:, :done] = V[:, :ready] S[:ready, :done]``, to rounding
    until a new start drops what it takes for converged.
    """

    def __init__(self, system: LinearSystem, k: int, tol: float) -> None:
        self._system, self._k, self._tol = system, k, tol
        self._n = system.A.getSize()[0]
        self._capacity = min(3 * k + _ROOM, self._n)
        self._reduce = Reducer(system.A.comm)
        self._choose = _ordered_real if system.traits.symmetric else _ordered_schur
        self._V = Block(system.b, self._capacity + 2)
        self._S = np.zeros((self._capacity + 2, self._capacity + 1))
        self._done = self._ready = self._n_solves = self._n_drawn = 0
        self._loss = _EPS

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
        look_at, known = self._k + self._k // 2, np.zeros(0)
        basis: np.ndarray | None = None
        for _ in range(1 + _MAX_RESTARTS):
            found = self._grow(inverse, look_at)
            if found is None:
                self._restart(self._k + (self._done - self._k) // 3)
                look_at = self._done + 1
                continue
            Q, size = found
            is_whole = self._done == self._n or (
                len(known) == len(size) and np.allclose(known, size, rtol=1e-4, atol=0.0)
            )
            if not len(known):
                basis = self._images(Q)
            elif not is_whole:  # there are modes that it lacks
                basis = None
            if is_whole:
                basis = self._solved(Q, inverse) if basis is None else basis
                log.info("static space: %d modes in %d solves", self._k, self._n_solves)
                return basis, np.abs(1.0 / size - inverse.shift)
            known = size
            self._restart(self._k)
            self._ready = self._done  # whatever the old start did not contain, a new one shows
            self._draw(inverse)
            look_at = self._done + _N_DOUBTS
        raise ConvergenceError(
            f"static space: {self._k} modes not found to {self._tol:g} in {_MAX_RESTARTS} restarts"
        )

    def _grow(self, inverse: _Inverse, look_at: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Expand the basis until the wanted modes have converged or there is no room."""
        while True:
            self._expand(inverse)
            is_last = self._done == self._ready or self._ready > self._capacity
            if self._done >= look_at or is_last:
                look_at = self._done + max(2, self._k // 8)
                found = self._look()
                if found is not None or is_last:
                    return found

    def _draw(self, inverse: _Inverse) -> None:
        """Make ``A^-1`` times a pseudo-random column the next one."""
        if self._ready == self._n:
            return
        start = start_vector(self._system, self._n_drawn)
        inverse.apply(start, self._V.vecs[self._ready])
        start.destroy()
        self._n_solves += 1
        self._n_drawn += 1
        self._ready += self._freed()[1] > 0

    def _expand(self, inverse: _Inverse) -> None:
        """Apply ``A^-1`` to the next column, and take in what is new."""
        j, new = self._done, self._ready
        inverse.apply(self._V.touch(j), self._V.vecs[new])
        self._n_solves += 1
        h, length = self._freed()
        if not (np.isfinite(h).all() and isfinite(length)):
            raise ConfigError(SINGULAR)
        self._S[:new, j], self._S[new, j] = h, length
        self._done += 1
        self._ready += length > 0
        if self._done == self._ready < self._capacity:  # an invariant subspace
            self._draw(inverse)

    def _freed(self) -> tuple[np.ndarray, float]:
        """Orthonormalise the column behind the basis; return coefficients, length, 0 for noise."""
        new = self._ready
        h, length, self._loss = orthogonalise(self._V.array, 0, 0, new, self._loss, self._reduce)
        if length <= _NOISE * np.linalg.norm(h):
            return h, 0.0
        self._V.array[:, new] *= 1.0 / length
        return h, length

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

    def _images(self, Q: np.ndarray) -> np.ndarray:
        """Return an orthonormal basis of ``A^-1 V Q``, which the relation gives without a solve."""
        vectors = np.empty((len(self._V.array), Q.shape[1]), order="F")
        mixed = self._S[: self._ready, : self._done] @ Q
        transform(self._V.array[:, : self._ready], mixed, vectors)
        return self._orthonormal(vectors)

    def _solved(self, Q: np.ndarray, inverse: _Inverse) -> np.ndarray:
        """Return an orthonormal basis of ``A^-1 V Q`` by solves, after something was dropped."""
        k = Q.shape[1]
        transform(self._V.array[:, : self._done], Q, self._V.array[:, :k])
        vectors = np.empty((len(self._V.array), k), order="F")
        target = self._V.vecs[k]
        for j in range(k):
            inverse.apply(self._V.touch(j), target)
            vectors[:, j] = target.getArray(readonly=True)
        self._n_solves += k
        return self._orthonormal(vectors)

    def _orthonormal(self, vectors: np.ndarray) -> np.ndarray:
        T = orthonormalise(vectors, self._reduce)
        return vectors[:, vectors.shape[1] - T.shape[1] :]

    def _restart(self, n_kept: int) -> None:
        """Keep leading Schur vectors, and the column that waits."""
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


def null_space_shift(system: LinearSystem) -> float:
    """Return what to add to the diagonal of a matrix with a null space to factor it, else 0."""
    if not system.A.getNullSpace().handle:
        return 0.0
    diagonal = system.A.getDiagonal()
    diagonal.abs()
    shift = _SHIFT * float(diagonal.sum()) / int(system.A.getSize()[0])
    diagonal.destroy()
    return shift


def start_vector(system: LinearSystem, number: int) -> PETScTypes.Vec:
    """Return a new pseudo-random vector, the same on any number of ranks."""
    first, last = system.A.getOwnershipRange()
    start = system.b.duplicate()
    start.setArray(_hashed(np.arange(first, last), number))
    return start


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
    # numpy's divide and conquer gives up on some matrices with multiple eigenvalues
    values, vectors = eigh(0.5 * (S + S.T), driver="ev")
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
