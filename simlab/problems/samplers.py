"""How the points of a box of scalar parameters are spread: at random, or more evenly than that.

    uniform    independent points                                     discrepancy ~ N^(-1/2)
    sobol      scrambled Sobol sequence; best at powers of two              ~ N^(-1) log^d N
    halton     scrambled Halton sequence; any N
    lhs        Latin hypercube: N points, one in each of N slices of every axis
    list       your own points, from a file
    breed      uniform first, then near what a training found hard (:mod:`.breed`)

Point ``i`` is a function of the seed, ``i``, the names of the parameters and the sampler's own
settings, so a resumed campaign draws the same points on any number of ranks. That is why ``lhs``
wants its number of points as a setting: it cannot depend on how many are asked for. Points of the
sequences are made in blocks, of which a few are kept. They are scipy's (``scipy.stats.qmc``), which
promises the same numbers for the same version.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from pydantic import PositiveInt

from simlab.core.config import Registry, nearest
from simlab.core.errors import ConfigError
from simlab.core.samples import generator

if TYPE_CHECKING:
    from scipy.stats.qmc import QMCEngine

__all__ = [
    "LHS",
    "Bounds",
    "Given",
    "Halton",
    "Listed",
    "Sampler",
    "Sobol",
    "Uniform",
    "samplers",
]

Bounds = Mapping[str, tuple[float, float]]

_BLOCK = 256
_MOST_SOBOL = 2**30


class Sampler(Protocol):
    """A way to spread points over a box, described by frozen settings."""

    kind: ClassVar[str]

    def draw(self, bounds: Bounds, n: int, seed: int, start: int = 0) -> np.ndarray:
        """Return the points ``start .. start + n - 1``, shape (n, len(bounds)), in the box."""
        ...


samplers: Registry[Sampler] = Registry("sampler", "simlab.problems", "simlab.samplers")


@samplers.register("uniform")
class Uniform:
    """Independent points, uniform in the box; each from a stream of its own."""

    kind: ClassVar[str]

    def draw(self, bounds: Bounds, n: int, seed: int, start: int = 0) -> np.ndarray:
        """Return points ``start .. start + n - 1``."""
        low, high = _edges(bounds)
        stream = f"box {' '.join(bounds)}"
        points = [generator(seed, i, stream).uniform(low, high) for i in range(start, start + n)]
        return np.array(points).reshape(n, len(bounds))


class _InBlocks:
    """What samplers that make many points at once have in common."""

    kind: ClassVar[str]

    def draw(self, bounds: Bounds, n: int, seed: int, start: int = 0) -> np.ndarray:
        """Return points ``start .. start + n - 1``."""
        low, high = _edges(bounds)
        size = self._block_size()
        points = np.empty((n, len(bounds)))
        for block in range(start // size, -(-(start + n) // size)):
            made = _kept(self, tuple(bounds), seed, block)
            first, last = max(start, block * size), min(start + n, (block + 1) * size)
            points[first - start : last - start] = made[first - block * size : last - block * size]
        return np.asarray(low + (high - low) * points)

    def _block_size(self) -> int:
        return _BLOCK

    def _points(self, names: tuple[str, ...], seed: int, block: int) -> np.ndarray:
        """Return one block of points of the unit box."""
        raise NotImplementedError

    def _random(self, names: tuple[str, ...], seed: int, index: int = 0) -> np.random.Generator:
        return generator(seed, index, f"{self.kind} {' '.join(names)}")


@lru_cache(maxsize=16)
def _kept(sampler: _InBlocks, names: tuple[str, ...], seed: int, block: int) -> np.ndarray:
    points = sampler._points(names, seed, block)
    points.setflags(write=False)
    return points


def _stretch(engine: QMCEngine, block: int) -> np.ndarray:
    """Return one block of a sequence."""
    if block:
        engine.fast_forward(block * _BLOCK)
    return np.asarray(engine.random(_BLOCK))


@samplers.register("sobol")
class Sobol(_InBlocks):
    """Scrambled Sobol sequence (Owen scrambling by random matrices and a digital shift).

    Any first ``2^m`` points are evenly spread; other numbers of points are less so.
    """

    def _points(self, names: tuple[str, ...], seed: int, block: int) -> np.ndarray:
        from scipy.stats import qmc  # here, since describing a case should not load it

        if (block + 1) * _BLOCK > _MOST_SOBOL:
            raise ConfigError(f"sampler sobol: has {_MOST_SOBOL} points, more are asked for")
        return _stretch(qmc.Sobol(len(names), rng=self._random(names, seed)), block)


@samplers.register("halton")
class Halton(_InBlocks):
    """Scrambled Halton sequence: evenly spread at any number of points, best below ten scalars."""

    def _points(self, names: tuple[str, ...], seed: int, block: int) -> np.ndarray:
        from scipy.stats import qmc

        return _stretch(qmc.Halton(len(names), rng=self._random(names, seed)), block)


@samplers.register("lhs")
class LHS(_InBlocks):
    """Latin hypercubes of ``n`` points; point ``i`` belongs to hypercube ``i // n``.

    Attributes
    ----------
    n : int
        Points of one hypercube: the campaign's number of samples, as a rule. A campaign made longer
        later goes on with a second hypercube, and its first ``n`` samples stay.
    """

    n: PositiveInt

    def _block_size(self) -> int:
        return int(self.n)

    def _points(self, names: tuple[str, ...], seed: int, block: int) -> np.ndarray:
        from scipy.stats import qmc

        engine = qmc.LatinHypercube(len(names), rng=self._random(names, seed, block))
        return np.asarray(engine.random(self.n))


@samplers.register("list")
class Listed:
    """Points from a file: sample ``i`` is row ``start + i``, whatever the seed.

    Attributes
    ----------
    file : Path
        ``.csv`` with the names of the parameters in its first line, in any order and among others,
        or ``.npy`` of shape (points, parameters) in the family's order.
    start : int
        Rows to skip.
    """

    file: Path
    start: int = 0

    kind: ClassVar[str]

    def draw(self, bounds: Bounds, n: int, seed: int, start: int = 0) -> np.ndarray:
        """Return rows ``self.start + start ..``, every value of the file checked.

        Raises
        ------
        ConfigError
            When the file has not got them, lacks a parameter, or has a value out of its bounds.
        """
        try:
            changed = self.file.stat().st_mtime_ns
        except OSError as error:
            raise ConfigError(f"file: cannot read {self.file}: {error.strerror}") from None
        points = _read(self.file, tuple(bounds.items()), changed)
        first = self.start + start
        if first < 0 or first + n > len(points):
            raise ConfigError(
                f"{self.file}: holds {len(points)} points, but rows {first} to {first + n - 1} are "
                f"asked for; there are enough for n = {max(len(points) - self.start, 0)} samples"
            )
        return points[first : first + n].copy()


@dataclass(frozen=True)
class Given:
    """One point that somebody has chosen, whatever the id. Not for case files.

    Attributes
    ----------
    point : mapping of str to float
        By name of the parameter; may hold others as well.
    """

    point: Mapping[str, float]
    kind: ClassVar[str] = "given"

    def draw(self, bounds: Bounds, n: int, seed: int, start: int = 0) -> np.ndarray:
        """Return the point ``n`` times."""
        return np.tile([float(self.point[name]) for name in bounds], (n, 1))


def _edges(bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.array(list(bounds.values()), dtype=float).T
    return low, high


@lru_cache(maxsize=4)
def _read(
    file: Path, bounds: tuple[tuple[str, tuple[float, float]], ...], changed: int
) -> np.ndarray:
    """Return the points of a file as last ``changed``, in the order of the bounds."""
    names = [name for name, _ in bounds]
    if file.suffix == ".csv":
        points = _read_csv(file, names)
    elif file.suffix == ".npy":
        try:
            points = np.load(file, allow_pickle=False).astype(float)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from None
        if points.ndim != 2 or points.shape[1] != len(names):
            raise ConfigError(
                f"{file}: has shape {points.shape}, expected (points, {len(names)}), columns "
                f"{', '.join(names)}"
            )
    else:
        raise ConfigError(f"{file}: a list of points is a .csv or a .npy file")
    low, high = _edges(dict(bounds))
    wrong = np.argwhere(~((points >= low) & (points <= high)))
    if len(wrong):
        row, column = wrong[0]
        raise ConfigError(
            f"{file}: point {row}: {names[column]} = {points[row, column]:g} is not between "
            f"{low[column]:g} and {high[column]:g}"
        )
    return points


def _read_csv(file: Path, names: Sequence[str]) -> np.ndarray:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    header = [name.strip() for name in rows[0]] if rows else []
    missing = [name for name in names if name not in header]
    if missing:
        raise ConfigError(
            f"{file}: its first line names no {', '.join(missing)}{nearest(missing[0], header)}"
        )
    columns = [header.index(name) for name in names]
    points = np.empty((len(rows) - 1, len(names)))
    for number, row in enumerate(rows[1:]):
        try:
            points[number] = [float(row[column]) for column in columns]
        except (ValueError, IndexError):
            raise ConfigError(f"{file}: point {number}: expected numbers, found {row}") from None
    return points
