"""Parameter spaces: a box of scalars, one input field, and products of such spaces.

Every part of sample ``i`` is drawn from a stream of its own, a function of the seed, ``i`` and the
part's names, so parts are independent and no sample needs the ones before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simlab.core.samples import Sample, generator
from simlab.problems.family import ParameterSpace
from simlab.problems.fields import Field

__all__ = ["Box", "FieldSpace", "Product"]


@dataclass(frozen=True)
class Box:
    """Scalar parameters, independent and uniform between bounds.

    Attributes
    ----------
    bounds : mapping of str to (float, float)
        Low and high of every parameter, by name.
    """

    bounds: Mapping[str, tuple[float, float]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self.bounds)

    def sample(self, n: int, seed: int, start: int = 0) -> list[Sample]:
        """Return samples ``start .. start + n - 1``."""
        low, high = np.array(list(self.bounds.values()), dtype=float).T
        stream = "box " + " ".join(self.names)
        samples = []
        for index in range(start, start + n):
            values = generator(seed, index, stream).uniform(low, high)
            named = {name: float(value) for name, value in zip(self.names, values, strict=True)}
            samples.append(Sample(index, seed, named))
        return samples

    def contains(self, mu: Sample) -> bool:
        """Return whether every parameter is there and within its bounds."""
        return all(
            low <= mu.parameters.get(name, np.nan) <= high
            for name, (low, high) in self.bounds.items()
        )


@dataclass(frozen=True)
class FieldSpace:
    """One input field ``name`` on a grid, with the scalar parameters its source records."""

    name: str
    shape: tuple[int, ...]
    source: Field

    @property
    def names(self) -> tuple[str, ...]:
        """Scalar parameters of the field, then the field."""
        return (*self.source.parameters, self.name)

    def sample(self, n: int, seed: int, start: int = 0) -> list[Sample]:
        """Return samples ``start .. start + n - 1``.

        Raises
        ------
        ConfigError
            When the fields come from a file that holds fewer.
        """
        draws = self.source.draw(self.shape, n, seed, start, self.name)
        return [
            Sample(index, seed, draw.parameters, {self.name: draw.values})
            for index, draw in enumerate(draws, start)
        ]

    def contains(self, mu: Sample) -> bool:
        """Return whether the field has the right shape and could have been drawn."""
        values = mu.fields.get(self.name)
        return (
            values is not None
            and values.shape == self.shape
            and self.source.contains(values, mu.parameters)
        )


@dataclass(frozen=True)
class Product:
    """Several spaces at once; their names must differ."""

    parts: tuple[ParameterSpace, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"two parts of a product share a name: {self.names}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parts, in order."""
        return tuple(name for part in self.parts for name in part.names)

    def sample(self, n: int, seed: int, start: int = 0) -> list[Sample]:
        """Return samples ``start .. start + n - 1``."""
        merged = []
        for pieces in zip(*(part.sample(n, seed, start) for part in self.parts), strict=True):
            parameters = {name: x for piece in pieces for name, x in piece.parameters.items()}
            values = {name: x for piece in pieces for name, x in piece.fields.items()}
            merged.append(Sample(pieces[0].index, seed, parameters, values))
        return merged

    def contains(self, mu: Sample) -> bool:
        """Return whether every part contains the sample."""
        return all(part.contains(mu) for part in self.parts)
