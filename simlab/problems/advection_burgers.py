"""Forced advection-Burgers equation on a periodic interval, from without to with diffusion.

    u_t + (alpha u^2 - beta u_x)_x = d(t, x),    0 <= x < L,    u(0, x) = d(0, x)

with moving sums of sines ``d`` (:mod:`.waves`): the experiments E1 (``alpha = 1, beta = 0``) and E2
(``beta`` drawn from (0, 0.2)) of Brandstetter, Worrall and Welling, "Message Passing Neural PDE
Solvers" (ICLR 2022). Method, as there: fifth-order WENO fluxes (Jiang and Shu, J. Comput. Phys.
126, 1996) with Lax-Friedrichs splitting, and third-order strong-stability-preserving Runge-Kutta.
Diffusion by sixth-order central differences. Steps follow the largest velocity and never pass a
stored time. Both differences add up to zero over the interval, so the mean changes by the force
alone, which has none: it is kept to rounding, through shocks too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from math import ceil
from typing import Annotated, Self

import numpy as np
from annotated_types import Ge, Gt, Le
from pydantic import FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from simlab.core.errors import ConfigError
from simlab.core.samples import Sample
from simlab.problems.family import ParameterSpace, families
from simlab.problems.spaces import Box, Product
from simlab.problems.waves import AtRoot, SineSums, periodic_points, sine_sums
from simlab.store.schema import Axis, Boundary, FieldSpec, Schema

__all__ = ["AdvectionBurgers"]

_MOST_STEPS = 100_000  # between two stored fields: more means that the solution has blown up
_SECOND = (2.0, -27.0, 270.0, -490.0, 270.0, -27.0, 2.0)  # 180 h^2 u_xx, sixth order


@families.register("advection_burgers")
class AdvectionBurgers(AtRoot):
    """Advection-Burgers: coefficients and a moving force in, the velocity over time out.

    Attributes
    ----------
    points : int
        Grid points.
    length : float
        ``L``.
    dt : float
        Time between stored fields.
    n_steps : int
        Stored fields per sample, the first one at ``dt``.
    alpha, beta : float or (float, float)
        Coefficients; a range makes a parameter of every sample.
    courant : float
        Share of the largest stable step; smaller is more accurate in time.
    terms, waves : int
        Sines of the force, and their largest wavenumber.
    amplitude, frequency : float
        Largest amplitude and angular frequency of one sine.

    Examples
    --------
    >>> family = AdvectionBurgers(points=40, terms=1)
    >>> family.space.names
    ('beta', 'amplitude_1', 'wave_1', 'phase_1', 'frequency_1', 'u0')
    """

    points: Annotated[int, Ge(8)] = 100
    length: PositiveFloat = 16.0
    dt: PositiveFloat = 0.04
    n_steps: PositiveInt = 100
    alpha: FiniteFloat | tuple[FiniteFloat, FiniteFloat] = 1.0
    beta: NonNegativeFloat | tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 0.2)
    courant: Annotated[float, Gt(0), Le(1)] = 0.5
    terms: PositiveInt = 5
    waves: PositiveInt = 3
    amplitude: PositiveFloat = 0.5
    frequency: PositiveFloat = 0.4

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, (low, high) in self._ranges.items():
            if low >= high:
                raise ConfigError(f"{name}: expected [low, high] with low < high, or one number")
        return self

    @property
    def _ranges(self) -> dict[str, tuple[float, float]]:
        both = {"alpha": self.alpha, "beta": self.beta}
        return {name: value for name, value in both.items() if isinstance(value, tuple)}

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Stored fields per sample."""
        return self.n_steps

    @cached_property
    def space(self) -> ParameterSpace:
        """Coefficients given as ranges, and the force."""
        return Product((Box(self._ranges), self._force)) if self._ranges else self._force

    @cached_property
    def _force(self) -> SineSums:
        return sine_sums(
            self.points, self.terms, self.waves, self.amplitude, self.frequency, self.length
        )

    @cached_property
    def schema(self) -> Schema:
        """Grid, times and velocity; all numbers of the force, which ``u0`` alone does not tell."""
        given = {"alpha": self.alpha, "beta": self.beta, "dt": self.dt}
        return Schema(
            name="advection_burgers",
            axes=(Axis("x", tuple(periodic_points(self.points, self.length).tolist())),),
            fields=(
                FieldSpec("u0", "input", long_name="initial velocity"),
                FieldSpec("u", long_name="velocity"),
            ),
            times=tuple(float(round(self.dt * k, 12)) for k in range(1, self.n_steps + 1)),
            parameters=dict.fromkeys((*self._ranges, *self._force.box.names), "1"),
            constants={n: value for n, value in given.items() if not isinstance(value, tuple)},
            boundaries=(Boundary("x", "periodic"),),
            initial={"u": "u0"},
        )

    def solution(self, mu: Sample) -> Iterator[dict[str, np.ndarray]]:
        """Yield ``{"u": velocity}`` at every stored time, NaN once it has blown up. Rank-local."""
        h = self.length / self.points
        alpha = mu.parameters["alpha"] if isinstance(self.alpha, tuple) else self.alpha
        beta = mu.parameters["beta"] if isinstance(self.beta, tuple) else self.beta

        def slope(time: float, u: np.ndarray) -> np.ndarray:
            speed = 2.0 * abs(alpha) * float(np.abs(u).max())
            flux = alpha * u * u
            up, down = 0.5 * (flux + speed * u), 0.5 * (flux - speed * u)
            # what passes the face above every point: from below, and mirrored from above
            face = _weno(up) + np.roll(_weno(down[::-1])[::-1], -1)
            change = (np.roll(face, 1) - face) / h
            if beta:
                change += beta / (180.0 * h * h) * _stencil(u)
            return np.asarray(change + self._force.values(mu, time))

        u, time = mu.fields["u0"], 0.0
        for end in self.schema.times:
            speed = 2.0 * abs(alpha) * float(np.abs(u).max())
            # WENO with three stages is stable up to about speed dt = 1.4 h, diffusion to 0.41 h^2
            rate = speed / h + beta / (0.4 * h * h)
            steps = ceil((end - time) * rate / self.courant) if np.isfinite(rate) else _MOST_STEPS
            if steps >= _MOST_STEPS:
                u, steps = np.full_like(u, np.nan), 0
            steps = max(steps, 1)
            dt = (end - time) / steps
            for step in range(steps):
                t = time + step * dt
                first = u + dt * slope(t, u)
                second = 0.75 * u + 0.25 * (first + dt * slope(t + dt, first))
                u = (u + 2.0 * (second + dt * slope(t + 0.5 * dt, second))) / 3.0
            time = end
            yield {"u": u}


def _stencil(u: np.ndarray) -> np.ndarray:
    """Return ``180 h^2 u_xx``."""
    n = len(u)
    around = np.concatenate([u[-3:], u, u[:3]])
    return np.asarray(sum(w * around[k : k + n] for k, w in enumerate(_SECOND)))


def _weno(f: np.ndarray) -> np.ndarray:
    """Return the fifth-order value at the face above every point, from the side below it."""
    n = len(f)
    around = np.concatenate([f[-2:], f, f[:2]])
    a, b, c, d, e = (around[k : k + n] for k in range(5))
    rough = (
        13 / 12 * (a - 2 * b + c) ** 2 + 0.25 * (a - 4 * b + 3 * c) ** 2,
        13 / 12 * (b - 2 * c + d) ** 2 + 0.25 * (b - d) ** 2,
        13 / 12 * (c - 2 * d + e) ** 2 + 0.25 * (3 * c - 4 * d + e) ** 2,
    )
    value = (
        (2 * a - 7 * b + 11 * c) / 6,
        (-b + 5 * c + 2 * d) / 6,
        (2 * c + 5 * d - e) / 6,
    )
    weight = [w / (1e-6 + s) ** 2 for w, s in zip((0.1, 0.6, 0.3), rough, strict=True)]
    total = weight[0] + weight[1] + weight[2]
    return np.asarray(sum(w * v for w, v in zip(weight, value, strict=True)) / total)
