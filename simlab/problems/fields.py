"""Random coefficient fields on the cells of the unit box, in one, two or three dimensions.

Two Gaussian random fields feed the kinds below. With integer wavenumbers ``k``, ``N`` cells and
``d`` dimensions, ``w`` and ``xi`` independent standard normal numbers, and the constant mode
dropped,

    periodic  g = irfft( sqrt(N) sigma (4 pi^2 |k|^2 + tau^2)^(-alpha/2) rfft(w) )
    neumann   g = idct ( sqrt(N) sigma (  pi^2 |k|^2 + tau^2)^(-alpha/2) xi )       (orthonormal)

and ``sigma = tau^(alpha - d/2)`` unless given. The periodic form filters real white noise, which
has the law of ``Re ifft(N sqrt(2) sigma (...) zeta)`` with standard complex ``zeta``, the form
found in published generators, at half the random numbers and half the transform. The Neumann form
is that of the Fourier neural operator's Darcy data. Cost per field: N normal numbers and one or two
transforms. The field of sample ``i`` depends on the seed, ``i``, the name and the shape only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import pi, prod
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from annotated_types import Gt, Lt
from pydantic import FiniteFloat, PlainValidator, PositiveFloat

from simlab.core.config import Registry
from simlab.core.samples import generator

__all__ = [
    "Draw",
    "Field",
    "FieldSetting",
    "FourParameter",
    "Lognormal",
    "TwoPhase",
    "Wavenumber",
    "cell_centres",
    "fields",
    "gaussian",
]


@dataclass(frozen=True, eq=False)
class Draw:
    """One field, shape of the grid, float64, and the scalar parameters it was made from."""

    values: np.ndarray
    parameters: Mapping[str, float] = field(default_factory=dict)


class Field(Protocol):
    """A source of positive coefficient fields, described by frozen settings."""

    kind: ClassVar[str]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the scalar parameters that every draw records."""
        ...

    def draw(
        self, shape: tuple[int, ...], n: int, seed: int, start: int = 0, name: str = "a"
    ) -> list[Draw]:
        """Return the fields ``start .. start + n - 1`` of the study ``seed``.

        Fields of different ``name`` are independent.
        """
        ...

    def contains(self, values: np.ndarray, parameters: Mapping[str, float]) -> bool:
        """Return whether values and parameters could have been drawn together."""
        ...

    def validate(self, shape: tuple[int, ...]) -> None:
        """Raise ConfigError for what can be known to be wrong before the first draw."""
        ...


fields: Registry[Field] = Registry("field", "simlab.problems")


def _build(value: Any) -> Field:
    """Read ``{file = ...}`` as kind ``file``; the rest is the registry's."""
    if isinstance(value, Mapping) and "kind" not in value and "file" in value:
        value = {"kind": "file", **value}
    return fields.build(value)


FieldSetting = Annotated[Field, PlainValidator(_build)]
"""Annotation of a settings field that holds a :class:`Field`; ``{file = ...}`` needs no kind."""


def cell_centres(n: int) -> np.ndarray:
    """Return the centres of ``n`` equal cells of the unit interval, shape (n,)."""
    return (np.arange(n) + 0.5) / n


def gaussian(
    shape: tuple[int, ...],
    random: np.random.Generator,
    spectrum: Literal["periodic", "neumann"],
    alpha: float,
    tau: float,
    sigma: float | None = None,
) -> np.ndarray:
    """Draw one Gaussian random field with zero mean; see the module's formulas.

    Parameters
    ----------
    shape : tuple of int
        Cells along each axis.
    random : numpy.random.Generator
        Source of the ``prod(shape)`` normal numbers.
    alpha, tau : float
        Smoothness and inverse length scale.
    sigma : float, optional
        Amplitude; ``tau ** (alpha - d / 2)`` when left out.

    Returns
    -------
    ndarray, shape ``shape``, float64
    """
    from scipy import fft  # here, since describing a case should not load it

    amplitude = _amplitude(shape, spectrum, alpha, tau, sigma)
    noise = random.standard_normal(shape)
    if spectrum == "periodic":
        modes = fft.rfftn(noise, overwrite_x=True)
        modes *= amplitude
        return np.asarray(fft.irfftn(modes, s=shape, overwrite_x=True))
    noise *= amplitude
    return np.asarray(fft.idctn(noise, norm="ortho", overwrite_x=True))


@lru_cache(maxsize=4)
def _amplitude(
    shape: tuple[int, ...], spectrum: str, alpha: float, tau: float, sigma: float | None
) -> np.ndarray:
    """Return the standard deviation of every mode, in the layout of the transform."""
    if spectrum == "periodic":
        waves = [2 * pi * np.fft.fftfreq(n, 1 / n) for n in shape[:-1]]
        waves.append(2 * pi * np.fft.rfftfreq(shape[-1], 1 / shape[-1]))
    else:
        waves = [pi * np.arange(n) for n in shape]
    square = sum(wave**2 for wave in np.meshgrid(*waves, indexing="ij", sparse=True))
    scale = tau ** (alpha - len(shape) / 2) if sigma is None else sigma
    values = np.sqrt(prod(shape)) * scale * (square + tau**2) ** (-alpha / 2)
    values.flat[0] = 0.0
    values.setflags(write=False)
    return np.asarray(values)


@fields.register("lognormal")
class Lognormal:
    """``a = exp(scale g)`` with a Gaussian random field ``g``.

    With the defaults ``a`` lies in about [0.57, 1.83]; ``scale = 5`` gives a contrast near 65.

    Attributes
    ----------
    spectrum : {"periodic", "neumann"}
    alpha, tau : float, optional
        Smoothness and inverse length scale: 2.5 and 7 (periodic), 2 and 3 (Neumann) when left out.
    sigma : float, optional
        Amplitude of the Gaussian field; ``tau ** (alpha - d / 2)`` when left out.
    """

    spectrum: Literal["periodic", "neumann"] = "periodic"
    alpha: PositiveFloat | None = None
    tau: PositiveFloat | None = None
    sigma: PositiveFloat | None = None
    scale: FiniteFloat = 1.0

    kind: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ()

    def draw(
        self, shape: tuple[int, ...], n: int, seed: int, start: int = 0, name: str = "a"
    ) -> list[Draw]:
        """Return fields ``start .. start + n - 1``."""
        draws = []
        for index in range(start, start + n):
            values = self.gaussian(shape, generator(seed, index, f"field {name}"))
            values *= self.scale
            draws.append(Draw(np.exp(values, out=values)))
        return draws

    def gaussian(self, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        """Return one Gaussian field ``g``."""
        alpha, tau = (2.5, 7.0) if self.spectrum == "periodic" else (2.0, 3.0)
        return gaussian(
            shape, random, self.spectrum, self.alpha or alpha, self.tau or tau, self.sigma
        )

    def contains(self, values: np.ndarray, parameters: Mapping[str, float]) -> bool:
        """Return whether every value is positive and finite."""
        return bool(np.all(np.isfinite(values)) and np.all(values > 0))

    def validate(self, shape: tuple[int, ...]) -> None:
        """Accept every shape."""


@fields.register("two_phase")
class TwoPhase:
    """``a = high`` where a Gaussian random field with Neumann spectrum is >= 0, else ``low``."""

    low: PositiveFloat = 3.0
    high: PositiveFloat = 12.0
    alpha: PositiveFloat = 2.0
    tau: PositiveFloat = 3.0

    kind: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ()

    def draw(
        self, shape: tuple[int, ...], n: int, seed: int, start: int = 0, name: str = "a"
    ) -> list[Draw]:
        """Return fields ``start .. start + n - 1``."""
        draws = []
        for index in range(start, start + n):
            random = generator(seed, index, f"field {name}")
            values = gaussian(shape, random, "neumann", self.alpha, self.tau)
            draws.append(Draw(np.where(values >= 0, self.high, self.low)))
        return draws

    def contains(self, values: np.ndarray, parameters: Mapping[str, float]) -> bool:
        """Return whether every value is one of the two phases."""
        return bool(np.all((values == self.low) | (values == self.high)))

    def validate(self, shape: tuple[int, ...]) -> None:
        """Accept every shape."""


@fields.register("four_parameter")
class FourParameter:
    """``a = exp(sum_q mu_q phi_q)`` with ``mu_1 .. mu_4`` uniform in (-1, 1).

    ``phi`` = product of sin(pi x_j), cos(pi x_1), cos(pi x_d), product of sin(2 pi x_j): smooth,
    and known by four numbers, which every sample records.
    """

    kind: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ("mu_1", "mu_2", "mu_3", "mu_4")

    def draw(
        self, shape: tuple[int, ...], n: int, seed: int, start: int = 0, name: str = "a"
    ) -> list[Draw]:
        """Return fields ``start .. start + n - 1``."""
        draws = []
        for index in range(start, start + n):
            mu = generator(seed, index, f"field {name}").uniform(-1.0, 1.0, 4)
            draws.append(Draw(self._values(shape, mu), _named(self.parameters, mu)))
        return draws

    def contains(self, values: np.ndarray, parameters: Mapping[str, float]) -> bool:
        """Return whether the parameters are in range and the values follow from them."""
        mu = np.array([parameters.get(name, np.nan) for name in self.parameters])
        if not np.all(np.abs(mu) <= 1):
            return False
        return bool(np.allclose(values, self._values(values.shape, mu), rtol=1e-12, atol=0))

    def validate(self, shape: tuple[int, ...]) -> None:
        """Accept every shape."""

    def _values(self, shape: tuple[int, ...], mu: np.ndarray) -> np.ndarray:
        return np.exp(_four_modes(shape, mu))


@fields.register("wavenumber")
class Wavenumber(FourParameter):
    """``k = mean (1 + contrast sum_q mu_q phi_q)``, with ``mu`` and ``phi`` of ``four_parameter``.

    Linear in its parameters and never far from its mean.

    Attributes
    ----------
    mean : float
    contrast : float
        Below 1/4, so that ``k`` is positive.
    """

    mean: PositiveFloat = 20.0
    contrast: Annotated[float, Gt(0), Lt(0.25)] = 0.05

    def _values(self, shape: tuple[int, ...], mu: np.ndarray) -> np.ndarray:
        return self.mean * (1.0 + self.contrast * _four_modes(shape, mu))


def _four_modes(shape: tuple[int, ...], mu: np.ndarray) -> np.ndarray:
    """Return ``sum_q mu_q phi_q`` at the cells' centres."""
    axes = [cell_centres(n) for n in shape]
    x = np.meshgrid(*axes, indexing="ij", sparse=True)
    values = mu[0] * prod(np.sin(pi * x_j) for x_j in x)
    values = values + mu[1] * np.cos(pi * x[0]) + mu[2] * np.cos(pi * x[-1])
    return np.asarray(values + mu[3] * prod(np.sin(2 * pi * x_j) for x_j in x))


def _named(names: tuple[str, ...], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}
