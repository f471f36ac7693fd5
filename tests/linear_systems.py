"""Small systems with known properties, for solver tests: scipy matrices turned into PETSc's."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from simlab.core.comm import self_comm
from simlab.linalg import petsc as PETSc
from simlab.linalg.system import LinearSystem, StructuredGrid, Traits


def diffusion(
    a: np.ndarray,
    boundary: str = "dirichlet",
    weights: tuple[float, ...] = (1.0, 1.0, 1.0),
    mass: float = 0.0,
) -> sp.csr_matrix:
    """Finite volumes for ``-div(a grad u) + mass u``, harmonic faces, unit spacing."""
    number = np.arange(a.size).reshape(a.shape)
    rows, columns, values = [], [], []
    for axis, weight in zip(range(a.ndim), weights, strict=False):
        cells, coefficient = np.moveaxis(number, axis, 0), np.moveaxis(a, axis, 0)
        pairs = [(slice(None, -1), slice(1, None))]
        if boundary == "periodic":
            pairs.append((slice(-1, None), slice(None, 1)))
        for low, high in pairs:
            i, j = cells[low].ravel(), cells[high].ravel()
            k = 2 * weight / (1 / coefficient[low] + 1 / coefficient[high]).ravel()
            rows += [i, j, i, j]
            columns += [i, j, j, i]
            values += [k, k, -k, -k]
        if boundary == "dirichlet":
            for wall in (0, -1):
                rows.append(cells[wall].ravel())
                columns.append(cells[wall].ravel())
                values.append(2 * weight * coefficient[wall].ravel())
    rows.append(number.ravel())
    columns.append(number.ravel())
    values.append(np.full(a.size, mass))
    entries = (np.concatenate(rows), np.concatenate(columns))
    matrix = sp.coo_matrix((np.concatenate(values), entries), shape=(a.size, a.size)).tocsr()
    matrix.sort_indices()
    return matrix


def smooth_field(shape: tuple[int, ...], seed: int = 5171) -> np.ndarray:
    """A positive field of three waves, contrast about ten."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij")
    phases = rng.uniform(0, 2 * np.pi, (3, len(shape)))
    waves = [
        np.prod([np.cos(2 * np.pi * (k + 1) * x + p) for x, p in zip(axes, phase, strict=True)], 0)
        for k, phase in enumerate(phases)
    ]
    return np.exp(waves[0] + 0.5 * waves[1] + 0.2 * waves[2])


def convection(n: int, seed: int = 5171) -> sp.csr_matrix:
    """Nonsymmetric: diffusion on an n x n grid plus upwind transport along the second axis."""
    A = diffusion(smooth_field((n, n), seed)).tolil()
    matrix = A.tocsr() + 0.7 * sp.kron(
        sp.identity(n), sp.diags([np.ones(n), -np.ones(n - 1)], [0, -1])
    )
    matrix = sp.csr_matrix(matrix)
    matrix.sort_indices()
    return matrix


def petsc_matrix(matrix: sp.csr_matrix, comm: Any = None) -> Any:
    """The same matrix in PETSc; each rank brings its rows."""
    comm = comm or self_comm()
    n = matrix.shape[0]
    low, high = (n * comm.rank) // comm.size, (n * (comm.rank + 1)) // comm.size
    part = matrix[low:high]
    csr = (part.indptr.astype("i4"), part.indices.astype("i4"), part.data)
    return PETSc.Mat().createAIJ(((high - low, n), (high - low, n)), csr=csr, comm=comm)


def petsc_vector(A: Any, values: np.ndarray) -> Any:
    """A right-hand side for A from its global values."""
    b = A.createVecLeft()
    low, high = b.getOwnershipRange()
    b.setArray(values[low:high])
    return b


def refill(A: Any, matrix: sp.csr_matrix) -> None:
    """Put new values into a serial matrix of the same pattern."""
    A.setValuesCSR(matrix.indptr.astype("i4"), matrix.indices.astype("i4"), matrix.data)
    A.assemble()


def grid_system(
    shape: tuple[int, ...] = (19, 23),
    boundary: str = "dirichlet",
    seed: int = 5171,
    comm: Any = None,
    mass: float = 0.0,
    constant: bool = False,
) -> LinearSystem:
    """SPD: smooth diffusion on a grid with a random right-hand side."""
    A = petsc_matrix(diffusion(smooth_field(shape, seed), boundary, mass=mass), comm)
    values = np.random.default_rng(seed + 1).normal(size=int(np.prod(shape)))
    grid = StructuredGrid(shape, boundary) if A.comm.size == 1 else None
    traits = Traits(spd=True, symmetric=True, constant_matrix=constant, grid=grid)
    return LinearSystem(A, petsc_vector(A, values), traits)


def convection_system(n: int = 21, seed: int = 5171, comm: Any = None) -> LinearSystem:
    """Nonsymmetric, no grid claimed."""
    A = petsc_matrix(convection(n, seed), comm)
    values = np.random.default_rng(seed + 1).normal(size=n * n)
    return LinearSystem(A, petsc_vector(A, values), Traits())


def option_names() -> set[str]:
    """What is in PETSc's options database now."""
    return set(PETSc.Options().getAll())
