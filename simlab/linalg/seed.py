r"""The static seed space: the lowest eigenvectors of one reference operator, computed once.

What slows a Krylov method down on ``A(mu)`` are mostly the modes of smallest ``|lambda|``, and for
many families those of a mean coefficient serve every sample. :func:`seed_space` finds them with one
factorisation ``A = L U`` and a Krylov-Schur iteration (Stewart 2001) on ``A^-1``:

    A^-1 V = V S + v' b^T,     V^T V = I
    S = Q T Q^T (real Schur form, |t_11| >= |t_22| >= ...),  keep V Q's leading columns, go on

in real arithmetic; complex pairs stay together, and for symmetric A the same steps are Lanczos with
thick restart. One start does not show all members of a multiple eigenvalue, as constant
coefficients on a square or cube have: once the wanted modes have converged they are kept,
everything else is dropped, and sixteen steps from a new start must add nothing to them. ``A^-1 V
Q`` instead of ``V Q``, which the relation gives without a solve, turns the residual of the inverse
into that of A itself, ``||A u - lambda u|| <= tol ||A u||``. Recycling gains nothing from a ``tol``
below 1e-6.

Cost: one factorisation, about 2.5 k + 25 solves (more where modes are multiple), orthogonalisation
against at most ``3 k + 24`` vectors, which are held meanwhile. The start is a hash of the row
number, the same on any number of ranks. Where slepc4py is installed SLEPc does the work
(:mod:`.slepc`).
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simlab.core.comm import agree
from simlab.core.errors import ConfigError
from simlab.linalg import slepc
from simlab.linalg.krylov_schur import KrylovSchur
from simlab.linalg.system import LinearSystem

if TYPE_CHECKING:
    from petsc4py import PETSc as PETScTypes

__all__ = ["Seed", "seed_space", "static_vectors"]


@dataclass(frozen=True, eq=False)
class Seed:
    """Directions that every system of a family starts with.

    Attributes
    ----------
    vectors : ndarray, shape (local rows, k), float64
        This rank's rows of an orthonormal basis, lowest modes first.
    values : ndarray, shape (k,)
        Moduli of the eigenvalues, ascending; the same on every rank.
    ranges : ndarray, shape (ranks + 1,), int64
        First row of every rank, and the number of rows.
    comm : petsc4py.PETSc.Comm
    """

    vectors: np.ndarray
    values: np.ndarray
    ranges: np.ndarray
    comm: PETScTypes.Comm

    def columns(self, k: int, system: LinearSystem) -> np.ndarray:
        """Return the first k vectors, having checked that they fit the system.

        Raises
        ------
        ConfigError
            When there are fewer, or the rows are dealt out otherwise.
        """
        _check_layout(self.ranges, system, "static space")
        if self.vectors.shape[1] < k:
            raise ConfigError(
                f"static = {k} asks for more vectors than the {self.vectors.shape[1]} of this "
                "static space; lower it or compute the space again"
            )
        return self.vectors[:, :k]

    def save(self, path: str | Path) -> None:
        """Write a ``.npz`` in the matrix's own numbering, whole or not at all. Collective."""
        path = Path(path)
        n, k = int(self.ranges[-1]), self.vectors.shape[1]
        whole: np.ndarray | None = np.ascontiguousarray(self.vectors)
        if self.comm.size > 1:
            mpi = self.comm.tompi4py()
            target = np.empty((n, k)) if mpi.rank == 0 else None
            counts = np.diff(self.ranges) * k
            mpi.Gatherv(whole, None if target is None else (target, counts))
            whole = target
        error: BaseException | None = None
        if self.comm.rank == 0:
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                with draft.open("wb") as file:
                    np.savez(
                        file, vectors=np.asarray(whole), values=self.values, ranges=self.ranges
                    )
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(draft, path)
            except OSError as caught:
                draft.unlink(missing_ok=True)
                error = ConfigError(f"cannot write the static space {path}: {caught}")
        _agree(self.comm, error)

    @classmethod
    def load(cls, path: str | Path, system: LinearSystem) -> Seed:
        """Read what :meth:`save` wrote, for systems like this one. Collective.

        Raises
        ------
        ConfigError
            When the file is missing or damaged, or is of another size or layout.
        """
        comm = system.A.comm
        found: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        error: BaseException | None = None
        if comm.rank == 0:
            try:
                found = _read(Path(path))
                _check_layout(found[2], system, str(path))
            except ConfigError as caught:
                error = caught
        _agree(comm, error)
        if comm.size == 1:
            assert found is not None
            return cls(found[0], found[1], found[2], comm)
        mpi = comm.tompi4py()
        values, ranges = mpi.bcast(found[1:] if found else None)
        k = len(values)
        local = np.empty((int(ranges[mpi.rank + 1] - ranges[mpi.rank]), k))
        counts = np.diff(ranges) * k
        mpi.Scatterv((found[0], counts) if found else None, local)
        return cls(np.asfortranarray(local), values, ranges, comm)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            vectors, values, ranges = file["vectors"], file["values"], file["ranges"]
    except FileNotFoundError:
        raise ConfigError(f"no static space in {path}") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} is not a static space, or damaged ({error}); delete it to compute it again"
        ) from None
    is_sound = (
        vectors.ndim == 2
        and ranges.ndim == 1
        and len(ranges) > 1
        and vectors.shape == (ranges[-1], len(values))
        and np.isfinite(vectors).all()
    )
    if not is_sound:
        raise ConfigError(f"{path}: not a static space; delete it to compute it again")
    return np.asarray(vectors, dtype=float), np.asarray(values, dtype=float), ranges


def _check_layout(ranges: np.ndarray, system: LinearSystem, where: str) -> None:
    expected = system.A.getOwnershipRanges()
    if np.array_equal(ranges, expected):
        return
    raise ConfigError(
        f"{where}: made for {ranges[-1]} unknowns on {len(ranges) - 1} ranks, first rows "
        f"{_shown(ranges)}; these systems have {expected[-1]} on {len(expected) - 1}, first rows "
        f"{_shown(expected)}; delete it to compute it again"
    )


def _shown(ranges: np.ndarray) -> str:
    return ", ".join(map(str, ranges[:4])) + (", ..." if len(ranges) > 4 else "")


def _agree(comm: PETScTypes.Comm, error: BaseException | None) -> None:
    if comm.size > 1:
        agree(comm.tompi4py(), error)
    elif error is not None:
        raise error


def seed_space(system: LinearSystem, k: int, tol: float = 1e-6) -> Seed:
    """Return an orthonormal basis of A's k modes of smallest modulus. Collective.

    SLEPc does it where slepc4py is installed. One vector more where the limit would part a complex
    pair. Modes of an attached null space are left out.

    Parameters
    ----------
    system : LinearSystem
        The reference; only its matrix is used.
    k : int
    tol : float
        For ``||A u - lambda u|| / ||A u||``.

    Raises
    ------
    ConfigError
        When the matrix has no entries to factor, is singular, or is smaller than k.
    ConvergenceError
        When the iteration does not end.
    """
    A, comm = system.A, system.A.comm
    n = A.getSize()[0]
    if system.traits.matrix_free:
        raise ConfigError(
            "a static space takes the factors of a matrix, and this family is matrix-free; set "
            "solver.static = 0"
        )
    if not 0 < k <= n:
        raise ConfigError(f"static = {k} modes of a matrix of {n} unknowns; lower solver.static")
    by_slepc = slepc.is_installed()
    vectors, values = slepc.modes(system, k, tol) if by_slepc else KrylovSchur(system, k, tol).run()
    return Seed(vectors, values, np.asarray(A.getOwnershipRanges(), dtype=np.int64), comm)


def static_vectors(k: int, system: LinearSystem, seed: Seed | None) -> np.ndarray | None:
    """Return the first k vectors of a space, or of one made for this system; None for k = 0 alone.

    Collective. A space that is given is checked against the system even where none of it is used.
    """
    if seed is None and k:
        seed = seed_space(system, k)
    return None if seed is None else seed.columns(k, system)
