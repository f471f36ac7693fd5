"""Linear and quadratic Lagrange elements on simplices, assembled rank by rank into PETSc.

Find u with u = g on the Dirichlet groups and, for every v that vanishes there,

    int k grad u . grad v + sum_R int_R c u v = int f v + sum_N int_N q v + sum_R int_R c w v

that is ``-div(k grad u) = f``, ``k du/dn = q`` on Neumann groups (q > 0 flows in) and
``k du/dn = c (w - u)`` on Robin groups, with k > 0 and c > 0; groups without data are insulated.

:class:`Space` numbers the unknowns the same way for any number of ranks: in the order in which
cells, which follow a Hilbert curve, first meet them. Rows are split into equal contiguous ranges
and cells likewise, so most of what a rank assembles is its own. :class:`Part` is one rank's cells
in scikit-fem; :class:`Elliptic` sums the parts into one matrix, and turns data into right-hand
sides. Dirichlet rows keep their diagonal and lose everything else, their columns move to the
right-hand side (the lift), so the matrix stays symmetric positive definite. Where conductivities
vary from sample to sample, ``A = sum_q theta_q A_q`` with terms of one pattern: the terms are
assembled once, values are combined, and the lift and the kept diagonal are combined alike.

Right-hand sides are linear in the data: families whose data are a few numbers make one vector per
number, once, and combine them. Errors are O(h^(degree + 1)) in L2 for smooth u.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from simlab.core.comm import agreement
from simlab.core.errors import ConfigError
from simlab.linalg import petsc as PETSc
from simlab.mesh.mesh import Mesh, find_rows, unique_rows
from simlab.mesh.remap import edge_corners

if TYPE_CHECKING:
    from mpi4py import MPI
    from petsc4py.PETSc import Mat, Vec

__all__ = ["Along", "Data", "Elliptic", "Part", "Space", "check_regular"]


@dataclass(frozen=True, eq=False)
class Along:
    """Data ``function(t)``, with t given at every unknown and interpolated in between.

    Attributes
    ----------
    t : ndarray, shape (n_dofs,)
    function : callable
        Elementwise.
    """

    t: np.ndarray
    function: Callable[[np.ndarray], np.ndarray]


Data: TypeAlias = float | np.ndarray | Callable[[np.ndarray], np.ndarray] | Along
"""A number; one value per unknown, shape (n_dofs,), in the space's numbering; one value per cell of
the mesh, shape (n_cells, 1); a function from coordinates (d, ...) to values (...); or
:class:`Along`."""


class Space:
    """Continuous Lagrange elements of one degree on a mesh: the global numbering of unknowns.

    Parameters
    ----------
    mesh : Mesh
    degree : {1, 2}

    Attributes
    ----------
    cell_dofs : ndarray of int64, shape (n_cells, n_basis)
        Unknowns of each cell: corners, then edge midpoints in the order of ``edge_corners``.
    vertex_dofs : ndarray of int64, shape (n_points,)
        The unknown at each vertex of the mesh.
    edges : ndarray of int64, shape (n_edges, 2)
        Edges by vertices, ascending in each row; none for degree 1.
    edge_dofs : ndarray of int64, shape (n_edges,)
        The unknown at the middle of each edge.
    n_dofs : int
    """

    def __init__(self, mesh: Mesh, degree: int) -> None:
        self.mesh, self.degree = mesh, degree
        n = len(mesh.points)
        natural = mesh.cells
        self.edges = np.empty((0, 2), dtype=np.int64)
        if degree == 2:
            a, b = edge_corners(mesh.dim + 1)
            sides = np.sort(np.stack([mesh.cells[:, a], mesh.cells[:, b]], axis=2), axis=2)
            sides = sides.reshape(-1, 2)
            first, number = unique_rows(sides, n)
            self.edges = sides[first]
            natural = np.concatenate([natural, n + number.reshape(len(natural), -1)], axis=1)
        _, first = np.unique(natural, return_index=True)  # every vertex and edge has a cell
        self.n_dofs = len(first)
        place = np.empty(self.n_dofs, dtype=np.int64)
        place[np.argsort(first)] = np.arange(self.n_dofs)
        self.cell_dofs = place[natural]
        self.vertex_dofs, self.edge_dofs = place[:n], place[n:]

    @cached_property
    def points(self) -> np.ndarray:
        """Where each unknown lives, shape (n_dofs, d)."""
        points = np.empty((self.n_dofs, self.mesh.dim))
        points[self.vertex_dofs] = self.mesh.points
        points[self.edge_dofs] = self.mesh.points[self.edges].mean(axis=1)
        return points

    def group_dofs(self, name: str) -> np.ndarray:
        """Return the unknowns on a facet group, ascending, or raise ConfigError."""
        facets = self.mesh.facets[self.mesh.facet_group(name)]
        dofs = self.vertex_dofs[facets].ravel()
        if self.degree == 2:
            a, b = edge_corners(self.mesh.dim)
            sides = np.stack([facets[:, a], facets[:, b]], axis=2).reshape(-1, 2)
            number = find_rows(sides, self.edges, len(self.mesh.points))
            dofs = np.concatenate([dofs, self.edge_dofs[number]])
        return np.unique(dofs)

    def from_vertices(self, values: np.ndarray) -> np.ndarray:
        """Return values at the unknowns of what is linear between vertices, shape (n_dofs,)."""
        found = np.empty(self.n_dofs)
        found[self.vertex_dofs] = values
        found[self.edge_dofs] = values[self.edges].mean(axis=1)
        return found

    def natural(self, values: np.ndarray) -> np.ndarray:
        """Return values at the mesh's vertices, in the mesh's order, shape (n_points,)."""
        return values[self.vertex_dofs]


class Part:
    """The cells of one rank, and what scikit-fem assembles on them. Nothing here communicates.

    Matrices and vectors come back in local numbers; ``dofs`` translates them.

    Parameters
    ----------
    space : Space
    rank, n_ranks : int

    Attributes
    ----------
    cells : slice
        The rank's share of the mesh's cells.
    dofs : ndarray of int64, shape (n_local,)
        Global number of each local unknown; empty where a rank has no cells.
    basis : skfem.CellBasis or None
    """

    def __init__(self, space: Space, rank: int = 0, n_ranks: int = 1) -> None:
        self.space = space
        self.cells = space.mesh.part(rank, n_ranks)
        self.dofs = np.empty(0, dtype=np.int64)
        self.basis: Any = None
        if self.cells.stop == self.cells.start:
            return
        import skfem

        mesh = space.mesh
        self._vertices, local = np.unique(mesh.cells[self.cells], return_inverse=True)
        local = local.reshape(-1, mesh.dim + 1)
        self._mesh = (skfem.MeshTri if mesh.dim == 2 else skfem.MeshTet)(
            np.ascontiguousarray(mesh.points[self._vertices].T), np.ascontiguousarray(local.T)
        )
        element = {
            (2, 1): skfem.ElementTriP1,
            (2, 2): skfem.ElementTriP2,
            (3, 1): skfem.ElementTetP1,
            (3, 2): skfem.ElementTetP2,
        }[mesh.dim, space.degree]
        # exact for products of two basis functions with linear data
        self._rule = {"elem": element(), "intorder": 2 * space.degree + 1}
        self.basis = skfem.CellBasis(self._mesh, **self._rule)
        self.dofs = np.empty(self.basis.N, dtype=np.int64)
        self.dofs[self.basis.nodal_dofs[0]] = space.vertex_dofs[self._vertices]
        if space.degree == 2:
            sides, numbers = (
                (self._mesh.facets, self.basis.facet_dofs)
                if mesh.dim == 2
                else (self._mesh.edges, self.basis.edge_dofs)
            )
            rows = np.sort(self._vertices[sides], axis=0).T
            found = find_rows(rows, space.edges, len(mesh.points))
            self.dofs[numbers[0]] = space.edge_dofs[found]

    def stiffness(self, conductivity: Data) -> Any:
        """Return ``int k grad u . grad v``, a local csr_matrix."""
        import skfem
        from skfem.helpers import dot, grad

        form = skfem.BilinearForm(lambda u, v, w: w["k"] * dot(grad(u), grad(v)))
        return form.assemble(self.basis, k=self._values(self.basis, conductivity))

    def load(self, *factors: Data) -> np.ndarray:
        """Return ``int f v`` over the rank's cells, shape (n_local,); f is the factors' product."""
        import skfem

        product = np.prod([self._values(self.basis, factor) for factor in factors], axis=0)
        values: np.ndarray = skfem.LinearForm(lambda v, w: w["f"] * v).assemble(
            self.basis, f=product
        )
        return values

    def facet_mass(self, group: str, coefficient: Data) -> Any:
        """Return ``int c u v`` over the rank's facets of a group, or None when it has none."""
        import skfem

        basis = self._facet_basis(group)
        if basis is None:
            return None
        form = skfem.BilinearForm(lambda u, v, w: w["c"] * u * v)
        return form.assemble(basis, c=self._values(basis, coefficient))

    def facet_load(self, group: str, *factors: Data) -> np.ndarray:
        """Return ``int q v`` over the rank's facets of a group; q is the product of factors."""
        import skfem

        basis = self._facet_basis(group)
        if basis is None:
            return np.zeros(len(self.dofs))
        product = np.prod([self._values(basis, factor) for factor in factors], axis=0)
        values: np.ndarray = skfem.LinearForm(lambda v, w: w["q"] * v).assemble(basis, q=product)
        return values

    def _facet_basis(self, group: str) -> Any:
        """Return the basis on the facets of a group whose lowest-numbered cell is this rank's."""
        import skfem

        mesh = self.space.mesh
        members = mesh.facet_group(group)
        owners = mesh.facet_cells[members]
        rows = mesh.facets[members[(owners >= self.cells.start) & (owners < self.cells.stop)]]
        if not len(rows):
            return None
        local = np.sort(self._vertices[self._mesh.facets], axis=0).T
        found = find_rows(rows, local, len(mesh.points))
        return skfem.FacetBasis(self._mesh, **self._rule, facets=found)

    def _values(self, basis: Any, data: Data) -> np.ndarray:
        """Evaluate data at quadrature points, shape (n_elements, n_points)."""
        found: Any
        if isinstance(data, Along):
            found = data.function(np.asarray(basis.interpolate(data.t[self.dofs])))
        elif callable(data):
            found = data(np.asarray(basis.global_coordinates()))
        elif np.ndim(data) == 2:
            own = np.asarray(data)[self.cells]
            found = own if basis.tind is None else own[basis.tind]
        elif np.ndim(data) == 1:
            found = np.asarray(basis.interpolate(np.asarray(data, dtype=float)[self.dofs]))
        else:
            found = data
        return np.broadcast_to(np.asarray(found, dtype=float), basis.dx.shape)


class Elliptic:
    """The matrix of an elliptic problem and its right-hand sides. Collective, all methods.

    Parameters
    ----------
    comm : MPI.Comm
    space : Space
    conductivity : Data
        k, or what of it does not vary; None where all of it does.
    robin : mapping of str to Data
        Coefficient c by facet group.
    dirichlet : sequence of str
        Facet groups with given values; where two meet, the one named first decides.
    varying : sequence of Data
        Conductivities to be multiplied by factors that :meth:`combine` takes.

    Attributes
    ----------
    A : PETSc.Mat
        AIJ, symmetric positive definite, rows of ``space`` in equal contiguous ranges. With
        ``varying``, its values are those of the last :meth:`combine`.
    terms : tuple of PETSc.Mat
        ``(A,)``, or with ``varying`` the matrices that A is combined from: what does not vary
        first (when there is such a part), then one of each conductivity; all of A's pattern.
    n_fixed : int
        Terms that no factor multiplies, 0 or 1.

    Raises
    ------
    ConfigError
        When a group is unknown, or a piece of the mesh has neither Dirichlet nor Robin data.
    """

    A: Mat

    def __init__(
        self,
        comm: MPI.Comm,
        space: Space,
        conductivity: Data | None = 1.0,
        robin: Mapping[str, Data] | None = None,
        dirichlet: Sequence[str] = (),
        varying: Sequence[Data] = (),
    ) -> None:
        self.space = space
        self._robin = dict(robin or {})
        with agreement(comm):
            check_regular(space.mesh, [*dirichlet, *self._robin])
            self._held = np.zeros(space.n_dofs, dtype=bool)
            self._group_dofs: dict[str, np.ndarray] = {}
            for name in dirichlet:
                dofs = space.group_dofs(name)
                self._group_dofs[name] = dofs[~self._held[dofs]]
                self._held[dofs] = True
            self.part = Part(space, comm.rank, comm.size)
            is_whole = not varying
            self.n_fixed = int(conductivity is not None or bool(self._robin))
            shares = [self._split(conductivity, self._robin, is_whole)] if self.n_fixed else []
            shares += [self._split(data, {}, is_whole) for data in varying]
        self._lifts = [lift for _, lift in shares]
        self.terms = tuple(self._sum(comm, kept) for kept, _ in shares)
        self._theta: np.ndarray | None = None
        if is_whole:
            self.A = self.terms[0]
            self.A.setOption(PETSc.Mat.Option.SPD, True)
        else:
            self.A = self.terms[0].duplicate(copy=True)
            for term in self.terms:
                term.setOption(PETSc.Mat.Option.SYMMETRIC, True)
                term.setOption(PETSc.Mat.Option.SYMMETRY_ETERNAL, True)

    def combine(self, factors: np.ndarray) -> np.ndarray:
        """Set the values of A for the factors of ``varying``, unless they are those of last time.

        Returns
        -------
        theta : ndarray, shape (len(terms),)
            The factors, after a 1 where there is a part that does not vary.
        """
        theta = np.concatenate([np.ones(self.n_fixed), factors])
        if self._theta is not None and np.array_equal(theta, self._theta):
            return theta
        same = PETSc.Mat.Structure.SAME_NONZERO_PATTERN
        self.terms[0].copy(self.A, structure=same)
        self.A.scale(theta[0])
        for factor, term in zip(theta[1:], self.terms[1:], strict=True):
            self.A.axpy(factor, term, structure=same)
        self.A.setOption(PETSc.Mat.Option.SPD, True)
        self._theta = theta
        return theta

    def source(self, *factors: Data) -> Vec:
        """Return the right-hand side of the source ``f``, a product of factors."""
        return self._vector(lambda part: part.load(*factors))

    def flux(self, group: str, data: Data) -> Vec:
        """Return the right-hand side of the inward flux ``q`` through a facet group."""
        return self._vector(lambda part: part.facet_load(group, data))

    def ambient(self, group: str, data: Data) -> Vec:
        """Return the right-hand side of the ambient value ``w`` of a Robin group."""
        return self._vector(lambda part: part.facet_load(group, self._robin[group], data))

    def fixed(self, group: str, data: Data, term: int = 0) -> Vec:
        """Return the right-hand side of the values ``g`` on a Dirichlet group, lift included.

        It belongs to the matrix ``terms[term]`` and is combined as the matrices are.
        """
        dofs = self._group_dofs[group]
        given = np.zeros(self.space.n_dofs)
        if isinstance(data, Along):
            given[dofs] = data.function(data.t[dofs])
        elif callable(data):
            given[dofs] = data(self.space.points[dofs].T)
        else:
            given[dofs] = data if np.ndim(data) == 0 else np.asarray(data)[dofs]
        lift = self._lifts[term]
        b = self._vector(lambda part: -(lift @ given[part.dofs]))
        first, last = b.getOwnershipRange()
        diagonal = self.terms[term].getDiagonal()
        with b as values:
            values += diagonal.getArray(readonly=True) * given[first:last]
        diagonal.destroy()
        return b

    def destroy(self) -> None:
        """Free the matrices."""
        for term in self.terms:
            if term is not self.A:
                term.destroy()
        self.A.destroy()

    def _split(
        self, conductivity: Data | None, robin: Mapping[str, Data], is_whole: bool
    ) -> tuple[Any, Any]:
        """Assemble this rank's share of a matrix; return what is kept of it, and its lift.

        A share that is not the whole matrix keeps an entry, maybe zero, wherever cells couple
        unknowns.
        """
        from scipy.sparse import csr_matrix

        part = self.part
        n = len(part.dofs)
        if not n:
            return csr_matrix((0, 0)), csr_matrix((0, 0))
        parts = [] if conductivity is None else [part.stiffness(conductivity).tocoo()]
        masses = [part.facet_mass(name, coefficient) for name, coefficient in robin.items()]
        parts += [mass.tocoo() for mass in masses if mass is not None]
        if not is_whole:
            parts.append(_zeros(part.basis.element_dofs.T, n))
        rows, columns, values = (
            np.concatenate([getattr(item, name) for item in parts])
            for name in ("row", "col", "data")
        )
        held = self._held[part.dofs]
        lift = ~held[rows] & held[columns] & (values != 0)
        keep = ~(held[rows] | held[columns]) | (rows == columns)
        kept = csr_matrix((values[keep], (rows[keep], columns[keep])), (n, n))
        return kept, csr_matrix((values[lift], (rows[lift], columns[lift])), (n, n))

    def _sum(self, comm: MPI.Comm, share: Any) -> Mat:
        """Make a matrix with room for exactly its pattern and add every rank's share."""
        n = self.space.n_dofs
        layout = PETSc.Vec().createMPI(n, comm=comm)
        (first, last), n_own = layout.getOwnershipRange(), layout.getLocalSize()
        layout.destroy()
        A = PETSc.Mat().create(comm)
        A.setSizes(((n_own, n), (n_own, n)))
        A.setType("aij")
        A.setPreallocationNNZ(self._pattern(first, last))
        A.setValuesIJV(
            share.indptr.astype(PETSc.IntType),
            self.part.dofs[share.indices].astype(PETSc.IntType),
            share.data,
            addv=True,
            rowmap=self.part.dofs.astype(PETSc.IntType),
        )
        A.assemble()
        return A

    def _pattern(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Count the entries of rows ``first .. last - 1`` inside and outside those columns."""
        from scipy.sparse import coo_matrix

        cells = self.space.cell_dofs
        cells = cells[((cells >= first) & (cells < last)).any(axis=1)]
        size = cells.shape[1]
        rows, columns = np.repeat(cells, size, axis=1).ravel(), np.tile(cells, (1, size)).ravel()
        kept = ~(self._held[rows] | self._held[columns]) | (rows == columns)
        kept &= (rows >= first) & (rows < last)
        ones = np.ones(int(kept.sum()), dtype=np.int32)
        shape = (last - first, self.space.n_dofs)
        pattern = coo_matrix((ones, (rows[kept] - first, columns[kept])), shape).tocsr().tocoo()
        own = (pattern.col >= first) & (pattern.col < last)
        counts = [np.bincount(pattern.row[which], minlength=shape[0]) for which in (own, ~own)]
        return counts[0].astype(PETSc.IntType), counts[1].astype(PETSc.IntType)

    def _vector(self, share: Callable[[Part], np.ndarray]) -> Vec:
        """Sum what every rank's part gives; Dirichlet rows stay zero."""
        b = self.A.createVecRight()
        if len(self.part.dofs):
            values = np.where(self._held[self.part.dofs], 0.0, share(self.part))
            b.setValues(self.part.dofs.astype(PETSc.IntType), values, addv=True)
        b.assemble()
        return b


def _zeros(cells: np.ndarray, n: int) -> Any:
    """Return a zero for every two unknowns of a cell, one after the other, a coo_matrix."""
    from scipy.sparse import coo_matrix

    size = cells.shape[1]
    rows, columns = np.repeat(cells, size, axis=1).ravel(), np.tile(cells, (1, size)).ravel()
    return coo_matrix((np.zeros(len(rows)), (rows, columns)), (n, n))


def check_regular(mesh: Mesh, groups: Sequence[str]) -> None:
    """Raise ConfigError unless every connected piece of a mesh has a facet of one of the groups.

    A piece without Dirichlet or Robin data has solutions that differ by a constant.
    """
    if not groups:
        raise ConfigError(
            f"{mesh.source}: neither Dirichlet nor Robin data, so the solution is not unique; "
            "hold at least one boundary group"
        )
    n_pieces = int(mesh.components.max()) + 1
    facets = np.concatenate([mesh.facet_group(name) for name in groups])
    loose = np.setdiff1d(np.arange(n_pieces), mesh.components[mesh.facets[facets]])
    if len(loose):
        raise ConfigError(
            f"{mesh.source}: {len(loose)} of its {n_pieces} unconnected pieces have neither "
            f"Dirichlet nor Robin data ({', '.join(groups)} do not touch them), so the solution "
            "is not unique; hold a boundary group of each, or merge the pieces in the mesher"
        )
