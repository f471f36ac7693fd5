"""Random sums of sines on a periodic interval, and what explicit 1-D families have in common.

    d(t, x) = sum_j A_j sin(omega_j t + 2 pi l_j x / L + phi_j),        u(0, x) = d(0, x)

``A_j`` and ``phi_j`` are uniform, ``l_j`` is a whole number in ``1 .. n_waves``, each equally
likely, and ``omega_j`` is zero or uniform. Every sample records its numbers and brings ``u(0, x)``
as the input field ``u0``; a sample from Python may bring another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import floor, pi
from typing import TYPE_CHECKING

import numpy as np

from simlab.core.samples import Sample
from simlab.problems.samplers import Sampler
from simlab.problems.spaces import Box

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["AtRoot", "SineSums", "Workplace", "periodic_points", "sine_sums"]


def periodic_points(n: int, length: float = 1.0) -> np.ndarray:
    """Return ``n`` equally spaced points of ``[0, length)``, the first at 0."""
    return length * np.arange(n) / n


def sine_sums(
    n: int, terms: int, n_waves: int, amplitude: float, frequency: float = 0.0, length: float = 1.0
) -> SineSums:
    """Return the space of sums of ``terms`` sines, with ``u0`` on ``n`` points.

    Amplitudes lie in ``(-amplitude, amplitude)``, frequencies likewise; without a frequency the
    sums do not move, and samples have no parameter of that name.
    """
    bounds = {}
    for j in range(1, terms + 1):
        bounds[f"amplitude_{j}"] = (-amplitude, amplitude)
        bounds[f"wave_{j}"] = (1.0, n_waves + 1.0)
        bounds[f"phase_{j}"] = (0.0, 2 * pi)
        if frequency:
            bounds[f"frequency_{j}"] = (-frequency, frequency)
    return SineSums(Box(bounds), n, terms, length)


@dataclass(frozen=True)
class SineSums:
    """The space of sums of sines; made by :func:`sine_sums`.

    Attributes
    ----------
    box : Box
        All numbers, wavenumbers before they are cut to whole ones.
    n, terms : int
        Points of the interval, sines of a sum.
    length : float
        ``L``.
    """

    box: Box
    n: int
    terms: int
    length: float

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers, then the field ``u0``."""
        return (*self.box.names, "u0")

    def sample(self, n: int, seed: int, start: int = 0) -> list[Sample]:
        """Return samples ``start .. start + n - 1``."""
        made = []
        for mu in self.box.sample(n, seed, start):
            numbers = {
                name: float(floor(value)) if name.startswith("wave_") else value
                for name, value in mu.parameters.items()
            }
            bare = Sample(mu.index, seed, numbers)
            made.append(replace(bare, fields={"u0": self.values(bare, 0.0)}))
        return made

    def values(self, mu: Sample, time: float) -> np.ndarray:
        """Return ``d(time, x)`` on the points, shape (n,)."""
        a, waves, phi, omega = self._numbers(mu)
        x = periodic_points(self.n, self.length)
        angle = omega[:, None] * time + 2 * pi / self.length * np.outer(waves, x) + phi[:, None]
        return np.asarray(a @ np.sin(angle))

    def contains(self, mu: Sample) -> bool:
        """Return whether the numbers are in range and ``u0`` follows from them."""
        u0 = mu.fields.get("u0")
        if u0 is None or u0.shape != (self.n,) or not self.box.contains(mu):
            return False
        waves = self._numbers(mu)[1]
        is_whole = bool(np.all(waves == np.floor(waves)))
        return is_whole and bool(np.allclose(u0, self.values(mu, 0.0), rtol=1e-12, atol=1e-12))

    def with_sampler(self, sampler: Sampler) -> SineSums:
        """Return the same space, its numbers spread by another sampler."""
        return replace(self, box=self.box.with_sampler(sampler))

    def _numbers(self, mu: Sample) -> np.ndarray:
        """Return amplitudes, wavenumbers, phases and frequencies, shape (4, terms)."""
        return np.array(
            [
                [mu.parameters.get(f"{name}_{j}", 0.0) for j in range(1, self.terms + 1)]
                for name in ("amplitude", "wave", "phase", "frequency")
            ]
        )


@dataclass(frozen=True)
class Workplace:
    """What a family needs that works without PETSc on one rank: which rank that is."""

    is_root: bool

    def destroy(self) -> None:
        """Nothing to free."""


class AtRoot:
    """What families that march on one rank have in common; the other ranks of a group wait.

    A family has ``steps`` and ``solution(mu)``, which yields the output fields of every step.
    """

    steps: int

    def solution(self, mu: Sample) -> Iterator[dict[str, np.ndarray]]:
        """Yield the output fields of every step. Rank-local.

        It never raises, since the other ranks would not hear of it: what goes wrong is NaN, which
        campaigns refuse on all ranks.
        """
        raise NotImplementedError

    def validate(self) -> None:
        """Nothing outside the settings can be wrong."""

    def setup(self, comm: MPI.Comm) -> Workplace:
        """Note who the root is."""
        return Workplace(comm.rank == 0)

    def march(self, mu: Sample, state: Workplace) -> Iterator[dict[str, np.ndarray]]:
        """Yield the fields of every step on the root, ``{}`` elsewhere; nobody communicates."""
        if not state.is_root:
            yield from ({} for _ in range(self.steps))
            return
        with np.errstate(over="ignore", invalid="ignore"):  # the store refuses what blows up
            yield from self.solution(mu)
