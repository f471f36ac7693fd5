"""Lorenz's three equations, the small chaotic system on which online training was first studied.

    x' = sigma (y - x),    y' = x (rho - z) - y,    z' = x y - beta z

Classical Runge-Kutta, fourth order, ``substeps`` steps of ``dt / substeps`` between stored states.
Nearby trajectories separate like ``exp(0.9 t)`` at the classical parameters, so errors are bounded
over a few units of time only. Parameters and initial state are drawn for every sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Self

import numpy as np
from pydantic import FiniteFloat, PositiveFloat, PositiveInt, model_validator

from simlab.core.errors import ConfigError
from simlab.core.samples import Sample
from simlab.problems.family import families
from simlab.problems.spaces import Box
from simlab.problems.waves import AtRoot
from simlab.store.schema import Axis, FieldSpec, Schema

__all__ = ["Lorenz"]

Range = tuple[FiniteFloat, FiniteFloat]
_PARAMETERS = ("sigma", "rho", "beta")
_STATE = ("x", "y", "z")


@families.register("lorenz")
class Lorenz(AtRoot):
    """Lorenz system: three parameters and the initial state in, the state over time out.

    The field ``u`` holds ``(x, y, z)``; the initial state is ``x_0``, ``y_0``, ``z_0``.

    Attributes
    ----------
    dt : float
        Time between stored states.
    n_steps : int
        Stored states per sample, the first one at ``dt``.
    substeps : int
        Runge-Kutta steps from one stored state to the next.
    sigma, rho, beta, x, y, z : (float, float)
        Bounds of the parameters, and of the initial state.

    Examples
    --------
    >>> family = Lorenz(n_steps=3)
    >>> family.schema.times, family.space.names
    ((0.02, 0.04, 0.06), ('sigma', 'rho', 'beta', 'x_0', 'y_0', 'z_0'))
    """

    dt: PositiveFloat = 0.02
    n_steps: PositiveInt = 100
    substeps: PositiveInt = 4
    sigma: Range = (8.0, 12.0)
    rho: Range = (24.0, 32.0)
    beta: Range = (2.2, 3.1)
    x: Range = (-15.0, 15.0)
    y: Range = (-15.0, 15.0)
    z: Range = (10.0, 40.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = [
            f"{name}: expected [low, high] with low <= high, found {getattr(self, name)}"
            for name in (*_PARAMETERS, *_STATE)
            if getattr(self, name)[0] > getattr(self, name)[1]
        ]
        if faults:
            raise ConfigError(faults)
        return self

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Stored states per sample."""
        return self.n_steps

    @cached_property
    def space(self) -> Box:
        """Parameters and initial state."""
        bounds = {name: getattr(self, name) for name in _PARAMETERS}
        return Box(bounds | {f"{name}_0": getattr(self, name) for name in _STATE})

    @cached_property
    def schema(self) -> Schema:
        """The state as a field on three points."""
        return Schema(
            name="lorenz",
            axes=(Axis("component", (0.0, 1.0, 2.0)),),
            fields=(FieldSpec("u", long_name="state (x, y, z)"),),
            times=tuple(float(round(self.dt * k, 12)) for k in range(1, self.n_steps + 1)),
            parameters=dict.fromkeys(self.space.names, "1"),
            constants={"dt": self.dt},
            initial={"u": tuple(f"{name}_0" for name in _STATE)},
        )

    def solution(self, mu: Sample) -> Iterator[dict[str, np.ndarray]]:
        """Yield ``{"u": (x, y, z)}`` at every stored time. Rank-local."""
        sigma, rho, beta = (mu.parameters[name] for name in _PARAMETERS)
        u = np.array([mu.parameters[f"{name}_0"] for name in _STATE])
        h = self.dt / self.substeps

        def slope(u: np.ndarray) -> np.ndarray:
            x, y, z = u
            return np.array([sigma * (y - x), x * (rho - z) - y, x * y - beta * z])

        for _ in range(self.n_steps):
            for _ in range(self.substeps):
                k1 = slope(u)
                k2 = slope(u + 0.5 * h * k1)
                k3 = slope(u + 0.5 * h * k2)
                k4 = slope(u + h * k3)
                u = u + h / 6.0 * (k1 + 2.0 * (k2 + k3) + k4)
            yield {"u": u}
