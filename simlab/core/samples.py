"""What goes into a solve and what comes out: a sample, and the trajectory it leads to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Sample", "Trajectory", "generator"]


def generator(seed: int, index: int, stream: str = "sample") -> np.random.Generator:
    """Return the random generator of one sample, a function of its arguments only.

    Never of ranks; counter-based (Philox), so a sample is drawn without the ones before it.
    """
    words = [seed, index, *stream.encode()]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


@dataclass(frozen=True, eq=False)
class Sample:
    """One point of a parameter space, ``mu``.

    Attributes
    ----------
    index : int
        Number of the sample in its study; it is also the trajectory id in the store.
    seed : int
        Seed of the study.
    parameters : mapping of str to float
        Scalar parameters.
    fields : mapping of str to ndarray
        Input fields (coefficients, sources) on the family's grid, float64, global.
    """

    index: int
    seed: int
    parameters: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A sample and its solution: what the store hands out and surrogates learn from.

    Attributes
    ----------
    sample : Sample
    times : ndarray, shape (T,)
        Times of the stored steps; one entry, 0, for a stationary problem.
    outputs : mapping of str to ndarray, shape (T, *grid) or (T, *grid, D)
        Output fields, float32 from the store.
    """

    sample: Sample
    times: np.ndarray
    outputs: Mapping[str, np.ndarray]
