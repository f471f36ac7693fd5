"""The matrices behind published timings of recycled Krylov solvers, for reproduction only.

The released scripts of "Accelerating Data Generation for Neural Operators via Krylov Subspace
Recycling" (Wang et al., ICLR 2024) call them Darcy flow and Helmholtz. They are neither. With a
positive field ``w`` on ``S x S`` points, ``s = S - 2`` of them inside along each axis, ``a`` its
inner part in row-major order and ``i``, ``j`` flat indices of inner points,

    A_ii = 4 a_i,    A_ij = -a_j for the four neighbours:    A = L D,   that is  -lap(a u)

with ``L`` the five-point Laplacian times ``h^2`` and ``D = diag(a)``. On top of that an index is
off by two in the coupling to the row above, ``j = i - s``: it takes ``a`` at ``j - 2`` instead of
``j`` (and, where ``j < 2``, the outer row ``w[0, s - 1 + j]``). That slip makes the matrix
indefinite and far from normal, and GMRES(40) stagnate. "Helmholtz" subtracts ``h^2 k^2`` from the
diagonal, ``k`` uniform in (0, 1): at most 4e-4 beside 4. The right-hand side is ``h^2``,
``h = 1 / (s - 1)``.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from annotated_types import Ge

from simlab.core.errors import SchemaError
from simlab.core.samples import Sample
from simlab.linalg import petsc as PETSc
from simlab.linalg.system import LinearSystem, Traits
from simlab.problems.family import ParameterSpace, families
from simlab.problems.fields import FieldSetting, Lognormal
from simlab.problems.spaces import Box, FieldSpace, Product
from simlab.store.schema import Axis, FieldSpec, Schema

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["ReleasedDarcy"]


@families.register("released_darcy")
class ReleasedDarcy:
    """The released "Darcy" and "Helmholtz" matrices; campaigns refuse them.

    Attributes
    ----------
    side : int
        Unknowns along each axis, ``s``; published: 50, 80, 100, 150, 200.
    slip : bool
        With the index slip. Without, ``A = L D`` to the last bit.
    helmholtz : bool
        Subtract ``h^2 k^2`` from the diagonal; ``k`` is then a parameter of the sample.
    fields : Field
        Where ``w`` comes from.
    """

    side: Annotated[int, Ge(3)] = 50
    slip: bool = True
    helmholtz: bool = False
    fields: FieldSetting = Lognormal()

    reproduction_only: ClassVar[bool] = True
    steps: ClassVar[int] = 1

    @cached_property
    def space(self) -> ParameterSpace:
        """The fields ``w`` on all points, and ``k`` where it is used."""
        w = FieldSpace("w", (self.side + 2,) * 2, self.fields)
        return Product((w, Box({"k": (0.0, 1.0)}))) if self.helmholtz else w

    @cached_property
    def schema(self) -> Schema:
        """All points, of which the outer ones hold ``u = 0``; inner ones are ``h`` apart."""
        places = ((np.arange(self.side + 2) - 1.0) / (self.side - 1)).tolist()
        names = (*self.fields.parameters, *(("k",) if self.helmholtz else ()))
        return Schema(
            name="released_darcy",
            axes=(Axis("x", tuple(places)), Axis("y", tuple(places))),
            fields=(FieldSpec("w", "input"), FieldSpec("u")),
            parameters=dict.fromkeys(names, "1"),
        )

    def validate(self) -> None:
        """Check the field's source: file, dataset, shape, every value."""
        self.fields.validate((self.side + 2,) * 2)

    def setup(self, comm: MPI.Comm) -> _Rows:
        """Make the pattern, matrix and vectors. Collective."""
        return _Rows(comm, self.side, self.slip)

    def assemble(
        self, mu: Sample, state: _Rows, step: int = 0, previous: PETSc.Vec | None = None
    ) -> LinearSystem:
        """Fill matrix and right-hand side. Collective."""
        h = 1.0 / (self.side - 1)
        shift = (h * mu.parameters["k"]) ** 2 if self.helmholtz else 0.0
        state.assemble(mu.fields["w"], shift)
        state.b.set(h**2)
        return LinearSystem(state.A, state.b, Traits(), mu, mu.index)

    def observe(self, mu: Sample, x: PETSc.Vec, state: _Rows) -> dict[str, np.ndarray]:
        """Return ``{"u": solution}`` on the root, ``{}`` elsewhere. Collective."""
        state.scatter.scatter(x, state.whole)
        if state.comm.rank:
            return {}
        inner = np.array(state.whole.getArray(readonly=True)).reshape(self.side, self.side)
        return {"u": np.pad(inner, 1)}


class _Rows:
    """Contiguous rows of the matrix, natural order; every entry is a multiple of one of ``w``."""

    def __init__(self, comm: MPI.Comm, side: int, slip: bool) -> None:
        self.comm = comm
        self.b = PETSc.Vec().createMPI(side**2, comm=comm)
        self.scatter, self.whole = PETSc.Scatter.toZero(self.b)
        row = np.arange(*self.b.getOwnershipRange())
        r, c = np.divmod(row, side)
        column = np.stack([row - side, row - 1, row, row + 1, row + side], axis=1)
        inside = np.stack([r > 0, c > 0, r >= 0, c < side - 1, r < side - 1], axis=1)
        self._wide = wide = side + 2
        source = (r[:, None] + 1) * wide + c[:, None] + 1 + np.array([-wide, -1, 0, 1, wide])
        if slip:  # the row above is read two places too early
            r, c = np.divmod(row - 2, side)
            source[:, 0] = r * wide + c + 1
        self._source = source[inside]
        self._factor = np.broadcast_to([-1.0, -1.0, 4.0, -1.0, -1.0], inside.shape)[inside]
        self._diagonal = np.flatnonzero(self._factor > 0)
        integer = PETSc.IntType
        self._rows = np.concatenate([[0], np.cumsum(inside.sum(axis=1))]).astype(integer)
        self._columns = column[inside].astype(integer)
        self._values = np.zeros(len(self._columns))
        self._given: tuple[np.ndarray, float] | None = None
        size = (len(row), side**2)
        csr = (self._rows, self._columns, self._values)
        self.A = PETSc.Mat().createAIJ((size, size), csr=csr, comm=comm)

    def assemble(self, w: np.ndarray, shift: float) -> None:
        """Fill the matrix when something changed. Collective."""
        if self._given and shift == self._given[1] and np.array_equal(w, self._given[0]):
            return
        if w.shape != (self._wide,) * 2 or np.iscomplexobj(w):
            raise SchemaError(
                f"w of {w.dtype} numbers, shape {w.shape}; expected real ones, {self._wide} a side"
            )
        np.multiply(w.ravel()[self._source], self._factor, out=self._values)
        self._values[self._diagonal] -= shift
        self.A.setValuesCSR(self._rows, self._columns, self._values)
        self.A.assemble()
        self._given = w.copy(), shift

    def destroy(self) -> None:
        """Free PETSc objects. Collective."""
        for item in (self.A, self.b, self.scatter, self.whole):
            item.destroy()
