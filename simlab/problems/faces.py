"""The stencil of a box of equal cells, made from what passes through its faces.

    -div(a grad u) + v . grad u + c u       on the unit box, u = 0 or du/dn = 0 on its faces

Integrated over a cell of volume ``V`` and width ``h``, the face towards neighbour ``j`` gives
``(k + q) (u_i - u_j)`` with

    k = V/h^2 2 / (1/a_i + 1/a_j)       harmonic mean; 2 a_i V/h^2 on the boundary, h/2 away,
                                        and 0 there where the box is insulated
    q = V/h max(0, v into the cell)     upwind: what flows out brings nothing new

so every row is diagonally dominant with off-diagonals <= 0: an M-matrix where ``c >= 0``. Without
``v`` the two cells of a face see the same number and the matrix is symmetric. For ``v`` without
divergence the rows are the cells' balances of ``-div(a grad u - v u)`` as well. Second order
without ``v``, first order with it.

All numbers live in one buffer: minus the coupling of every face (twice with ``v``, once per
direction), then the diagonal. :meth:`FaceStencil.pattern` says from which place of the buffer each
nonzero of a sparse matrix comes; :meth:`FaceStencil.apply` multiplies without a matrix. Plain
numpy; ranks know their own box and one layer of cells around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod

import numpy as np

__all__ = ["FaceStencil", "Part"]

Part = tuple[slice, ...]
"""A rank's part of a global array."""


class FaceStencil:
    """Couplings of the cells of one rank.

    Parameters
    ----------
    shape : tuple of int
        Cells of the whole grid along each axis.
    own, ghosted : tuple of slice
        My cells, and mine with the neighbours' along each axis.
    transport : bool
        Whether a velocity will be given: twice the numbers.
    insulated : bool
        Whether nothing diffuses through the faces of the box, instead of u = 0 there.

    Attributes
    ----------
    buffer : ndarray, shape (m,)
        Minus the couplings, then ``diagonal``.
    diagonal : ndarray, shape of my box
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        own: Part,
        ghosted: Part,
        transport: bool,
        insulated: bool = False,
    ) -> None:
        self._shape, self._own, self._ghosted = shape, own, ghosted
        self._insulated = insulated
        self.mine = tuple(part.stop - part.start for part in own)
        n_axes = len(shape)
        faces = [tuple(n + (i == j) for i, n in enumerate(self.mine)) for j in range(n_axes)]
        shapes = [*faces, *(faces if transport else []), self.mine]
        ends = np.cumsum([prod(item) for item in shapes])
        self.buffer = np.zeros(ends[-1])
        self._offsets = [0, *ends[:-1].tolist()]
        parts = np.split(self.buffer, ends[:-1])
        *couplings, self.diagonal = (
            part.reshape(item) for part, item in zip(parts, shapes, strict=True)
        )
        # faces along axis j, one more than cells: what the cell below a face, and the cell above
        # it, has for its neighbour beyond; the same arrays without transport
        self._to_above, self._to_below = couplings[:n_axes], couplings[-n_axes:]
        self._resistance = np.empty([part.stop - part.start for part in ghosted])

    def walls(self, axis: int) -> tuple[bool, bool]:
        """Whether my box ends at the domain's faces, below and above."""
        own, ghosted = self._own[axis], self._ghosted[axis]
        return own.start == ghosted.start, own.stop == ghosted.stop

    def fill(
        self, a: np.ndarray, reaction: np.ndarray, velocity: Sequence[np.ndarray] = ()
    ) -> None:
        """Compute all numbers from global arrays.

        Parameters
        ----------
        a : ndarray, shape ``shape``
            Positive.
        reaction : ndarray, broadcastable to ``shape``
        velocity : sequence of ndarray
            Component j at the centres of the faces along axis j, broadcastable to ``shape`` with
            one more along j; empty without transport.
        """
        volume = 1.0 / prod(self._shape)
        np.divide(1.0, a[self._ghosted], out=self._resistance)
        np.multiply(np.broadcast_to(reaction, self._shape)[self._own], volume, out=self.diagonal)
        for axis, faces in enumerate(self._to_above):
            line = self._lines(self._resistance, axis)
            n, m = line.shape[axis], faces.shape[axis]
            at_start, at_stop = self.walls(axis)
            inside = _along(faces, axis, int(at_start), int(at_start) + n - 1)
            np.add(_along(line, axis, 0, n - 1), _along(line, axis, 1, n), out=inside)
            if at_start:
                wall = np.inf if self._insulated else _along(line, axis, 0, 1)
                _along(faces, axis, 0, 1)[...] = wall
            if at_stop:
                wall = np.inf if self._insulated else _along(line, axis, n - 1, n)
                _along(faces, axis, m - 1, m)[...] = wall
            np.divide(-2.0 * volume * self._shape[axis] ** 2, faces, out=faces)
            below = self._to_below[axis]
            if velocity:
                area = volume * self._shape[axis]
                v = self._at_my_faces(velocity[axis], axis)
                into = self._work[: faces.size].reshape(faces.shape)
                np.multiply(np.maximum(v, 0.0, out=into), area, out=into)  # into the cell above
                np.subtract(faces, into, out=below)
                faces += np.multiply(np.minimum(v, 0.0, out=into), area, out=into)
            self.diagonal -= _along(below, axis, 0, m - 1)
            self.diagonal -= _along(faces, axis, 1, m)

    def pattern(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return my rows in compressed form: row starts, columns, and places in the buffer.

        Parameters
        ----------
        number : ndarray, shape of my box with ghosts
            Global number of every unknown.
        """
        place_of = np.arange(self.buffer.size)
        columns = [self._lines(number, None)]
        places = [place_of[-self.diagonal.size :].reshape(self.mine)]
        n_axes = len(self.mine)
        for axis, faces in enumerate(self._to_above):
            above, below = (
                place_of[start : start + faces.size].reshape(faces.shape)
                for start in (self._offsets[axis], self._offsets[axis - n_axes - 1])
            )
            padding = [(0, 0)] * n_axes
            at_start, at_stop = self.walls(axis)
            padding[axis] = (int(at_start), int(at_stop))
            neighbour = np.pad(self._lines(number, axis), padding, constant_values=-1)
            n = self.mine[axis]
            columns += [_along(neighbour, axis, 0, n), _along(neighbour, axis, 2, 2 + n)]
            places += [_along(below, axis, 0, n), _along(above, axis, 1, 1 + n)]
        column = np.stack([item.ravel() for item in columns], axis=1)
        place = np.stack([item.ravel() for item in places], axis=1)
        order = np.argsort(column, axis=1, kind="stable")
        column = np.take_along_axis(column, order, axis=1)
        place = np.take_along_axis(place, order, axis=1)
        kept = column >= 0
        rows = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        return rows, column[kept], place[kept].astype(np.intp)

    def apply(self, x: np.ndarray, y: np.ndarray, transposed: bool = False) -> None:
        """Compute ``y = A x`` (or its transpose): x on my box with ghosts, y on my box."""
        to_below, to_above = self._to_below, self._to_above
        if transposed:
            to_below, to_above = to_above, to_below
        np.multiply(self.diagonal, self._lines(x, None), out=y)
        for axis, n in enumerate(self.mine):
            line = self._lines(x, axis)
            at_start, at_stop = self.walls(axis)
            first, last = int(at_start), n - int(at_stop)  # cells with a neighbour below, above
            below = _along(line, axis, 0, n - first)
            self._add(_along(to_below[axis], axis, first, n), below, _along(y, axis, first, n))
            skipped = line.shape[axis] - last
            above = _along(line, axis, skipped, skipped + last)
            self._add(_along(to_above[axis], axis, 1, 1 + last), above, _along(y, axis, 0, last))

    def _add(self, coupling: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        product = self._work[: y.size].reshape(y.shape)
        np.multiply(coupling, x, out=product)
        y += product

    @cached_property
    def _work(self) -> np.ndarray:
        return np.empty(max(faces.size for faces in self._to_above))

    def _at_my_faces(self, values: np.ndarray, axis: int) -> np.ndarray:
        """Return the view of a global face array that belongs to my faces along one axis."""
        whole = tuple(n + (j == axis) for j, n in enumerate(self._shape))
        box = tuple(slice(part.start, part.stop + (j == axis)) for j, part in enumerate(self._own))
        return np.broadcast_to(values, whole)[box]

    def _lines(self, values: np.ndarray, axis: int | None) -> np.ndarray:
        """Return the view of a ghosted array that keeps the ghosts along one axis, or none."""
        boxes = zip(self._own, self._ghosted, strict=True)
        return values[
            tuple(
                slice(None) if j == axis else slice(own.start - box.start, own.stop - box.start)
                for j, (own, box) in enumerate(boxes)
            )
        ]


def _along(values: np.ndarray, axis: int, start: int, stop: int) -> np.ndarray:
    """Return the view ``values[..., start:stop, ...]`` along one axis."""
    return values[(slice(None),) * axis + (slice(start, stop),)]
