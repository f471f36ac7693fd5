"""How far a prediction is from the truth: the relative L2 error, and a summary of many of them."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

__all__ = ["SUMMARY", "relative_l2", "summary"]

SUMMARY = ("mean", "median", "p95", "p99", "max")


def relative_l2(prediction: np.ndarray, truth: np.ndarray, *, n_kept: int = 1) -> np.ndarray:
    """Return the relative L2 error over all axes after the first ``n_kept``.

    Parameters
    ----------
    prediction, truth : ndarray, shape (n, ...)
        Same shape.
    n_kept : int
        Leading axes that are kept: 1 gives one error per sample, 2 one per sample and time.

    Returns
    -------
    ndarray, float64
        Zero where both vanish, NaN where only the truth does, inf where the prediction is not
        finite.

    Examples
    --------
    >>> relative_l2(np.array([[3.0, 5.0], [0.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 0.0]]))
    array([0.2, 0. ])
    """
    axes = tuple(range(n_kept, truth.ndim))
    truth = truth.astype(np.float64)
    error = _norm(prediction.astype(np.float64) - truth, axes)
    norm = _norm(truth, axes)
    error = np.where(np.isfinite(error), error, np.inf)
    undefined = np.where((error > 0) & np.isfinite(error), np.nan, error)  # for norm == 0
    return np.where(norm > 0, error / np.where(norm > 0, norm, 1.0), undefined)


def summary(errors: np.ndarray) -> dict[str, float]:
    """Return mean, median, p95, p99 and max of the defined errors; all NaN when there are none."""
    known = np.sort(errors[~np.isnan(errors)].ravel())
    if known.size == 0:
        return dict.fromkeys(SUMMARY, math.nan)
    method: Literal["linear", "higher"] = "linear" if np.isfinite(known[-1]) else "higher"
    median, p95, p99 = np.quantile(known, [0.5, 0.95, 0.99], method=method)
    values = (known.mean(), median, p95, p99, known[-1])
    return {name: float(value) for name, value in zip(SUMMARY, values, strict=True)}


def _norm(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return the Euclidean norm, scaled so that squares of tiny or huge values stay numbers."""
    scale = np.max(np.abs(values), axis=axes, keepdims=True, initial=0.0)
    scaled = values / np.where((scale > 0) & np.isfinite(scale), scale, 1.0)
    root = np.sqrt(np.sum(np.square(scaled), axis=axes))
    return np.where(np.isfinite(root), root * scale.reshape(root.shape), np.inf)
