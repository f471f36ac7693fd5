"""Burgers' equation on a periodic interval, ``u_t + (u^2 / 2)_x = nu u_xx``, ``0 <= x < 1``.

Fourier pseudo-spectral with the 2/3 rule: what the square of ``u`` aliases onto is left out, so the
mean is kept to rounding. In time the integrating factor ``exp(nu k^2 t)`` takes diffusion exactly,
and classical Runge-Kutta the rest: fourth order, four pairs of transforms per step. Spectrally
accurate as long as the grid resolves the fronts, which are about ``nu / |u|`` wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from math import pi
from typing import Annotated

import numpy as np
from annotated_types import Ge
from pydantic import PositiveFloat, PositiveInt

from simlab.core.samples import Sample
from simlab.problems.family import families
from simlab.problems.waves import AtRoot, SineSums, periodic_points, sine_sums
from simlab.store.schema import Axis, Boundary, FieldSpec, Schema

__all__ = ["Burgers"]


@families.register("burgers")
class Burgers(AtRoot):
    """Burgers' equation: the initial velocity ``u0`` in, the velocity over time out.

    ``u0`` is a sum of sines (:mod:`.waves`); a sample from Python may bring any other.

    Attributes
    ----------
    points : int
        Grid points.
    viscosity : float
        ``nu``.
    dt : float
        Time between stored fields.
    n_steps : int
        Stored fields per sample, the first one at ``dt``.
    substeps : int
        Runge-Kutta steps from one stored field to the next.
    terms, waves : int
        Sines of the initial velocity, and their largest wavenumber.
    amplitude : float
        Largest amplitude of one sine.

    Examples
    --------
    >>> family = Burgers(points=32, n_steps=2, terms=1)
    >>> family.schema.shape, family.space.names
    ((32,), ('amplitude_1', 'wave_1', 'phase_1', 'u0'))
    """

    points: Annotated[int, Ge(8)] = 128
    viscosity: PositiveFloat = 0.03 / pi
    dt: PositiveFloat = 0.02
    n_steps: PositiveInt = 40
    substeps: PositiveInt = 20
    terms: PositiveInt = 5
    waves: PositiveInt = 3
    amplitude: PositiveFloat = 0.5

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Stored fields per sample."""
        return self.n_steps

    @cached_property
    def space(self) -> SineSums:
        """Initial velocities."""
        return sine_sums(self.points, self.terms, self.waves, self.amplitude)

    @cached_property
    def schema(self) -> Schema:
        """Grid, times and velocity. The sines' numbers are not stored: ``u0`` says it all."""
        return Schema(
            name="burgers",
            axes=(Axis("x", tuple(periodic_points(self.points).tolist())),),
            fields=(
                FieldSpec("u0", "input", long_name="initial velocity"),
                FieldSpec("u", long_name="velocity"),
            ),
            times=tuple(float(round(self.dt * k, 12)) for k in range(1, self.n_steps + 1)),
            constants={"viscosity": self.viscosity, "dt": self.dt},
            boundaries=(Boundary("x", "periodic"),),
            initial={"u": "u0"},
        )

    def solution(self, mu: Sample) -> Iterator[dict[str, np.ndarray]]:
        """Yield ``{"u": velocity}`` at every stored time. Rank-local."""
        n, h = self.points, self.dt / self.substeps
        whole = np.arange(n // 2 + 1)
        kept = 3 * whole < n
        rate = -1j * pi * whole * kept  # of -(u^2 / 2)_x
        decay = np.exp(-self.viscosity * (2 * pi * whole) ** 2 * h / 2)  # over half a step

        def change(modes: np.ndarray) -> np.ndarray:
            return np.asarray(h * rate * np.fft.rfft(np.fft.irfft(modes, n) ** 2))

        modes = np.fft.rfft(mu.fields["u0"]) * kept
        for _ in range(self.n_steps):
            for _ in range(self.substeps):
                k1 = change(modes)
                half = decay * modes
                k2 = change(half + 0.5 * decay * k1)
                k3 = change(half + 0.5 * k2)
                k4 = change(decay * (half + k3))
                modes = decay * (half + decay * k1 / 6 + (k2 + k3) / 3) + k4 / 6
            yield {"u": np.fft.irfft(modes, n)}
