"""Parameter spaces: a box of scalars, one input field, and products of such spaces.

Every part of sample ``i`` is drawn from a stream of its own, a function of the seed, ``i`` and the
part's names, so parts are independent and no sample needs the ones before it. Scalars may be spread
by another sampler than the uniform one (:mod:`.samplers`); fields never are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from simlab.core.errors import ConfigError
from simlab.core.samples import Sample
from simlab.problems.family import ParameterSpace
from simlab.problems.fields import Field
from simlab.problems.samplers import Bounds, Sampler, Uniform

__all__ = ["Box", "FieldSpace", "Product", "bounds_of", "sampled_by"]


def sampled_by(space: ParameterSpace, sampler: Sampler) -> ParameterSpace:
    """Return a space whose scalar parameters are spread by a sampler.

    Spaces take part by having ``with_sampler(sampler)``, which returns a new space.

    Raises
    ------
    ConfigError
        When the space has no box of scalars.
    """
    made: ParameterSpace = _resampled(space, sampler)
    if made is space:
        raise ConfigError(
            f"sampler {sampler.kind!r} spreads scalar parameters over their box, and this family "
            f"draws {', '.join(space.names)} otherwise: leave the sampler out"
        )
    return made


def bounds_of(space: ParameterSpace) -> dict[str, tuple[float, float]]:
    """Return the bounds of all scalars that a sampler would spread, by name.

    Raises
    ------
    ConfigError
        When the space has no box of scalars.
    """
    listener = _Listener()
    sampled_by(space, listener).sample(1, 0)
    return listener.bounds


class _Listener:
    """A sampler that notes what it is asked for."""

    kind: ClassVar[str] = "uniform"

    def __init__(self) -> None:
        self.bounds: dict[str, tuple[float, float]] = {}

    def draw(self, bounds: Bounds, n: int, seed: int, start: int = 0) -> np.ndarray:
        self.bounds |= bounds
        return Uniform().draw(bounds, n, seed, start)


def _resampled(space: Any, sampler: Sampler) -> Any:
    change = getattr(space, "with_sampler", None)
    return space if change is None else change(sampler)


@dataclass(frozen=True)
class Box:
    """Scalar parameters between bounds, independent and uniform unless a sampler says otherwise.

    Attributes
    ----------
    bounds : mapping of str to (float, float)
        Low and high of every parameter, by name.
    sampler : Sampler
    """

    bounds: Mapping[str, tuple[float, float]]
    sampler: Sampler = field(default_factory=Uniform)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self.bounds)

    def sample(self, n: int, seed: int, start: int = 0) -> list[Sample]:
        """Return samples ``start .. start + n - 1``."""
        points = self.sampler.draw(self.bounds, n, seed, start).tolist()
        return [
            Sample(index, seed, dict(zip(self.names, point, strict=True)))
            for index, point in enumerate(points, start)
        ]

    def with_sampler(self, sampler: Sampler) -> Box:
        """Return the same box, spread by another sampler."""
        return replace(self, sampler=sampler)

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

    def with_sampler(self, sampler: Sampler) -> Product:
        """Return the product with every box in it spread by another sampler; self if none is."""
        parts = tuple(_resampled(part, sampler) for part in self.parts)
        changed = any(new is not old for new, old in zip(parts, self.parts, strict=True))
        return Product(parts) if changed else self

    def contains(self, mu: Sample) -> bool:
        """Return whether every part contains the sample."""
        return all(part.contains(mu) for part in self.parts)
