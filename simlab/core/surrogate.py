"""The protocol every learned or reduced model answers, so that no caller asks which it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from simlab.core.samples import Sample, Trajectory

__all__ = ["Surrogate"]


@runtime_checkable
class Surrogate(Protocol):
    """A model from samples to output fields that says how far to trust it."""

    def fit(self, samples: Iterable[Trajectory]) -> Surrogate:
        """Learn from trajectories and return the fitted model."""
        ...

    def predict(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Return output fields by name, each of shape (n_samples, T, *grid), float32."""
        ...

    def estimate(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return an estimated relative L2 error per sample, shape (n_samples,).

        Infinite where there is no ground for an estimate.
        """
        ...

    def save(self, directory: str | Path) -> None:
        """Write the model so that ``load`` of its class gives it back."""
        ...
