"""Blocks of row-distributed vectors: BLAS-2 and BLAS-3 on local rows, one reduction per product.

A :class:`Block` is a Fortran-ordered array of this rank's rows whose columns are PETSc vectors on
the same memory: operators and preconditioners write columns, numpy works on slices of them. Every
sum over rows goes through :class:`Reducer`, which adds the ranks' contributions and leaves the same
bits on each, so that all ranks take the same branches.

:func:`orthonormalise` is Cholesky QR with column scaling, repeated until ``W^T W = I`` to rounding
(Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015: twice, unless columns nearly depend on each other;
those are dropped). Cost for n x k: 2 n k^2 flops and one reduction per Gram matrix, 2 n k^2 per
transformation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import blas, lapack

from simlab.linalg import petsc as PETSc

if TYPE_CHECKING:
    from petsc4py import PETSc as PETScTypes

    from simlab.linalg.system import LinearSystem

__all__ = [
    "Block",
    "FixedImages",
    "Reducer",
    "apply_operator",
    "orthonormalise",
    "subtract",
    "transform",
]

_DEPENDENT = 1e-10  # a column whose pivot is smaller, relative to its length squared, is dropped
_INDEPENDENT = 0.1  # smallest pivot above which one pass gives C^T C = I to a few roundings
_ORTHONORMAL = 2e-14  # largest entry of W^T W - I that is rounding
_PASSES = 4
_ROWS = 1024  # rows of a block that stay in cache together


class Reducer:
    """Sums over the ranks of a communicator; nothing at all on one rank.

    Parameters
    ----------
    comm : petsc4py.PETSc.Comm
    """

    def __init__(self, comm: PETScTypes.Comm) -> None:
        self._comm: Any = comm.tompi4py() if comm.size > 1 else None
        self.is_root = comm.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of every rank's array, the same bits everywhere. Collective."""
        if self._comm is None:
            return values
        total = np.empty_like(values)
        self._comm.Allreduce(values, total)
        return total

    def gram(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return ``a^T b`` of two local slices. Collective."""
        return self.sum(np.ascontiguousarray(a.T @ b))

    def from_root(self, make: Any, *arguments: Any) -> Any:
        """Return what ``make(*arguments)`` gives on the root, on every rank. Collective.

        Small dense problems have ties that two ranks may break differently. A
        :class:`numpy.linalg.LinAlgError` gives None; any other error is raised on every rank.
        """
        made, error = None, None
        if self.is_root:
            try:
                made = make(*arguments)
            except np.linalg.LinAlgError:
                pass
            except Exception as caught:  # the others wait for an answer
                error = caught
        if self._comm is not None:
            made, error = self._comm.bcast((made, error))
        if error is not None:
            raise error
        return made


class Block:
    """``width`` vectors of one layout in one array.

    Parameters
    ----------
    like : PETSc.Vec
        Gives size, ranges and communicator.
    width : int

    Attributes
    ----------
    array : ndarray, shape (local rows, width), Fortran order
    vecs : list of PETSc.Vec
        Column ``j`` as a vector. PETSc may remember norms of it: after writing the array call
        :meth:`touch` before PETSc reads.
    """

    def __init__(self, like: PETScTypes.Vec, width: int) -> None:
        sizes = like.getSizes()
        self.array = np.zeros((sizes[0], width), order="F")
        self.vecs = [
            PETSc.Vec().createWithArray(self.array[:, j], size=sizes, comm=like.comm)
            for j in range(width)
        ]
        self._dense: dict[tuple[int, int], Any] = {}

    def touch(self, j: int) -> PETScTypes.Vec:
        """Return column ``j`` as a vector whose array was written from outside."""
        self.vecs[j].stateIncrease()
        return self.vecs[j]

    def dense(self, start: int, stop: int) -> PETScTypes.Mat:
        """Return columns ``start .. stop - 1`` as a dense matrix on the same memory."""
        key = (start, stop)
        if key not in self._dense:
            self._dense[key] = PETSc.Mat().createDense(
                (self.vecs[0].getSizes(), (None, stop - start)),
                array=self.array[:, start:stop].T.reshape(-1),
                comm=self.vecs[0].comm,
            )
        self._dense[key].stateIncrease()
        return self._dense[key]

    def release(self) -> None:
        """Forget dense views, which remember the operator of their last product."""
        for item in self._dense.values():
            item.destroy()
        self._dense.clear()

    def destroy(self) -> None:
        """Free PETSc objects. Collective."""
        self.release()
        for vec in self.vecs:
            vec.destroy()


def apply_operator(A: PETScTypes.Mat, source: Block, target: Block, start: int, stop: int) -> None:
    """Write ``A`` times columns of ``source`` to the same columns of ``target``. Collective.

    One sparse x dense product, one halo exchange, where the matrix has entries; otherwise one
    product per column.
    """
    if start == stop:
        return
    if A.getType() in ("seqaij", "mpiaij"):
        A.matMult(source.dense(start, stop), result=target.dense(start, stop))
        return
    for j in range(start, stop):
        A.mult(source.touch(j), target.vecs[j])


class FixedImages:
    """Images of a space that never changes, under ``A = sum_q theta_q A_q``: each term's made once.

    Memory: one block per term.
    """

    def __init__(self) -> None:
        self._terms: tuple[PETScTypes.Mat, ...] = ()
        self._images = np.zeros((0, 0))  # one column per term: all entries of A_q U

    def combine(
        self, system: LinearSystem, source: Block, target: Block, start: int, stop: int
    ) -> int:
        """Write ``A`` times columns ``start .. stop - 1`` of ``source``. Collective.

        Returns the number of operator applications: none once the terms' images are known. A
        matrix with fewer entries per row than terms is quicker to apply.
        """
        affine, A = system.affine, system.A
        columns = target.array[:, start:stop]
        if affine is None or len(affine.terms) * A.getSize()[0] > A.getInfo()["nz_used"]:
            apply_operator(A, source, target, start, stop)
            return stop - start
        n_applies = 0
        if self._terms != affine.terms:
            self._images = np.empty((columns.size, len(affine.terms)), order="F")
            for q, term in enumerate(affine.terms):
                apply_operator(term, source, target, start, stop)
                target.release()  # dense views remember the operator of their product
                self._images[:, q] = columns.T.ravel()
                n_applies += stop - start
            self._terms = affine.terms
        np.matmul(self._images, affine.theta, out=columns.T.reshape(-1))
        return n_applies


def subtract(w: np.ndarray, basis: np.ndarray, coefficients: np.ndarray) -> None:
    """Do ``w -= basis @ coefficients`` in place, without temporaries."""
    if w.size and coefficients.size:
        blas.dgemv(-1.0, basis, coefficients, beta=1.0, y=w, overwrite_y=1)


def transform(source: np.ndarray, T: np.ndarray, target: np.ndarray) -> None:
    """Write ``source @ T`` to ``target``, which may share columns with ``source``.

    Works through blocks of rows that stay in cache, so nothing of the size of the block is
    allocated. Columns of ``source`` whose row of T is zero are not read.
    """
    used = np.any(T, axis=1)
    if not used.all():
        source, T = source[:, used], T[used]
    for start in range(0, len(source), _ROWS):
        rows = slice(start, start + _ROWS)
        target[rows] = source[rows] @ T


def orthonormalise(W: np.ndarray, reduce: Reducer) -> np.ndarray:
    """Orthonormalise columns across ranks, leading columns first. Collective.

    Columns that are zero, not finite, or that depend on those before them are left out.

    Parameters
    ----------
    W : ndarray, shape (local rows, k), Fortran order
        Its last k' columns become the orthonormal ones.
    reduce : Reducer

    Returns
    -------
    T : ndarray, shape (k, k')
        They are the old ``W`` times T; rows of columns left out are zero.
    """
    k = W.shape[1]
    total = np.eye(k)
    for _ in range(_PASSES):
        gram = reduce.gram(W, W)
        if np.abs(gram - np.eye(len(gram))).max(initial=0.0) <= _ORTHONORMAL:
            break
        step, is_sharp = _whitening(gram)
        target = W[:, W.shape[1] - step.shape[1] :]
        transform(W, step, target)
        W, total = target, total @ step
        if is_sharp:
            break
    return total


def _whitening(gram: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return ``T`` with ``T^T G T = I`` over the columns worth keeping; other rows are zero.

    And whether the columns were so far from dependent that ``W T`` is orthonormal to rounding.
    """
    length = np.sqrt(np.maximum(np.diag(gram), 0.0))
    kept = np.flatnonzero(np.isfinite(length) & (length > 0))
    while len(kept):
        scaled = gram[np.ix_(kept, kept)] / np.outer(length[kept], length[kept])
        factor, info = lapack.dpotrf(scaled, lower=0, clean=1)
        sound = len(kept) if info == 0 else info - 1
        weak = np.flatnonzero(~(np.diag(factor)[:sound] ** 2 > _DEPENDENT))
        first = int(weak[0]) if len(weak) else sound
        if first == len(kept):
            break
        kept = np.delete(kept, first)
    step = np.zeros((len(gram), len(kept)))
    if not len(kept):
        return step, True
    step[kept] = lapack.dtrtri(factor, lower=0)[0] / length[kept, None]
    return step, float(np.diag(factor).min() ** 2) > _INDEPENDENT
