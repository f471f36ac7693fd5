"""What the recycling solvers have in common: a deflated space in two parts, and its images.

:mod:`.deflated_cg` and :mod:`.gcrodr` take the space of U out of every system. Its ``static``
columns are computed once (:mod:`.seed`) and are the same for all systems; the ``carried`` ones come
from the systems before. Both are kept beside the directions of the iteration,

    D = [U | directions],   Q = [A U | their images],

U ending at column ``k_max``, so that [U directions] is one contiguous block for BLAS. A new matrix
costs one sparse x dense product (:class:`.FixedImages`: less where A is affine), and a gate
(:mod:`.gate`) watches whether the carried part is worth it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from simlab.linalg.blocks import Block, FixedImages, Reducer, apply_operator
from simlab.linalg.gate import Gate
from simlab.linalg.krylov import preconditioner_options
from simlab.linalg.ksp import Job, KSPState
from simlab.linalg.options import merged
from simlab.linalg.system import LinearSystem

if TYPE_CHECKING:
    from petsc4py import PETSc as PETScTypes

__all__ = ["DeflationState"]


class DeflationState(KSPState):
    """Preconditioner, the two parts of the space, blocks for them and for directions. Collective.

    Parameters
    ----------
    system : LinearSystem
        Any system of the sequence.
    settings : DeflatedCG or GCRODR
    static : ndarray, shape (local rows, k_s), or None
        The static space.
    n_directions, n_images : int
        Directions and images of directions that the iteration keeps.

    Attributes
    ----------
    static, carried : ndarray, shape (local rows, k_s) and (local rows, k_c)
        What the next system starts with.
    captured : float
        Share of the last right-hand side that the recycled space took care of.
    events : list of str
        What happened to the space, one line each.
    """

    def __init__(
        self,
        system: LinearSystem,
        settings: Any,
        static: np.ndarray | None,
        n_directions: int,
        n_images: int,
    ) -> None:
        words = {"ksp_type": "preonly", **preconditioner_options(settings.preconditioner, system)}
        super().__init__(system, merged(words, settings.options), prefix=settings.prefix)
        self._settings = settings
        self._reduce = Reducer(system.A.comm)
        rows = system.b.getLocalSize()
        self.static = np.zeros((rows, 0)) if static is None else static
        self.carried = np.zeros((rows, 0), order="F")
        self.captured = 0.0
        self.events: list[str] = []
        self._k_max, self._k = settings.static + settings.carried, 0
        self._D = Block(system.b, self._k_max + n_directions)
        self._Q = Block(system.b, self._k_max + n_images)
        self._images = FixedImages()
        self._null_space: PETScTypes.NullSpace | None = None
        self._gate = Gate(self._reduce) if settings.gate and settings.wants_order else None
        self._drift = np.nan  # sine of the angle by which A U turned, where it was measured
        self._n_solved = 0

    def destroy(self) -> None:
        """Free PETSc objects. Collective."""
        self._D.destroy()
        self._Q.destroy()
        super().destroy()

    def forget(self) -> None:
        """Drop the carried part; the next system starts from the static space alone."""
        self.carried = self.carried[:, :0]

    def deflated_pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Return U and ``A U`` of the last system: local rows, views."""
        part = slice(self._k_max - self._k, self._k_max)
        return self._D.array[:, part], self._Q.array[:, part]

    def _look_at(self, system: LinearSystem) -> None:
        """Find the null space that solutions must not have a part in."""
        space = system.A.getNullSpace()
        self._null_space = space if space.handle else None

    def _apply_pc(self, r: PETScTypes.Vec, z: PETScTypes.Vec) -> None:
        """Write ``M r`` to z. Collective."""
        self.ksp.getPC().apply(r, z)
        if self._null_space is not None:
            self._null_space.remove(z)

    def _make_images(self, system: LinearSystem, job: Job) -> None:
        """Write ``A U`` for the static and carried columns before ``k_max``. Collective."""
        n_carried = self.carried.shape[1]
        middle = self._k_max - n_carried
        first = middle - self.static.shape[1]
        job.operator_applies += n_carried
        job.operator_applies += self._images.combine(system, self._D, self._Q, first, middle)
        apply_operator(system.A, self._D, self._Q, middle, self._k_max)

    def _admitting_gate(self) -> Gate | None:
        """Return the gate where it has a say: not over the first system, which carries nothing."""
        return self._gate if self._n_solved else None

    def _book(self, gate: Gate | None, is_control: bool, carried: np.ndarray, job: Job) -> None:
        """Report a solve to the gate; after a control ``carried`` is the next system's. Collective.

        Unless the control was the last: then carrying has ended.
        """
        self._n_solved += 1
        if gate is None or not gate.is_open:
            return
        said = gate.book(self.captured, self._drift)
        job.note = "; ".join(filter(None, (job.note, said)))
        if is_control:
            self.forget()
        if not gate.is_open:
            self.events.append(gate.reason)
        elif is_control:
            self.carried = carried
